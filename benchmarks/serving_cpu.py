"""Serving on CPU, against the plain model in eager PyTorch, ONNX Runtime with the tables inside, and stores against each other.

``python benchmarks/serving_cpu.py [--seconds 4] [--threads 1] [--out benchmarks/results/serving_cpu_DATE.md]``

Each figure is a median of calls taken in turn, fp32, the same number of threads everywhere. Servers are processes on this machine that the
script starts and ends; Redis is left out where ``redis-server`` is not installed.
"""
from __future__ import annotations

import argparse
import itertools
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime
import tablewright as tw
import torch
from pyarrow import flight
from tablewright.kernels.gather.flight import FlightStore
from tablewright.kernels.gather.redis_rows import publish
from tablewright.kernels.gather.unique import Unique
from tablewright.rewriter.serving import manifest as manifests
from tablewright.rewriter.serving.stores import open_store, published
from torch import nn

ROOT = Path(tw.__file__).resolve().parent
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "tests" / "rewriter")]
from dlrm import DLRM  # noqa: E402
from serving_nodes import Redis, address, shard_servers  # noqa: E402

TABLES, ROWS, DIM = 26, 20_000, 64


class Ranker(nn.Module):
    """A user part (history of 50, a profile, two layers) beside a candidate part, as in a two-stage ranker: nothing here says what is shared."""

    def __init__(self, dim: int = 64):
        super().__init__()
        self.users, self.items, self.topics = nn.Embedding(100_000, dim), nn.Embedding(100_000, dim), nn.Embedding(1000, dim)
        self.user = nn.Sequential(nn.Linear(3 * dim, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, dim))
        self.top = nn.Sequential(nn.Linear(4 * dim, 256), nn.ReLU(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, user, history, user_topics, item, topic):
        seen, liked = self.items(history).mean(1), self.topics(user_topics).mean(1)
        person = self.user(torch.cat([self.users(user), seen, liked], 1))
        thing = self.items(item)
        return self.top(torch.cat([person, thing, person * thing, self.topics(topic)], 1)).squeeze(1)


def in_turn(calls: dict, seconds: float, burst: int = 1) -> dict[str, list[float]]:
    """Milliseconds of each call, taken in turn (``burst`` at a time, the first of them not counted) for so long."""
    for call in calls.values():
        for _ in range(3):
            call()
    taken: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(taken.values()))) < 15:
        for name, call in calls.items():
            for k in range(burst):
                started = time.perf_counter()
                call()
                if k or burst == 1:
                    taken[name].append((time.perf_counter() - started) * 1e3)
    return taken


def medians(taken: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(times) for name, times in taken.items()}


def p99(times: list[float]) -> float:
    return sorted(times)[int(len(times) * 0.99)]


def dlrm(folder: Path, seconds: float, threads: int) -> list[str]:
    torch.manual_seed(0)
    model = DLRM([ROWS] * TABLES, dim=DIM, bottom=(512, 256), top=(1024, 1024, 512, 256), mode="single").eval()
    sample = (torch.randn(8, 13), torch.randint(ROWS, (8, TABLES)))
    served = tw.export_serving(model, sample, folder / "dlrm")
    inside = tw.export_serving(model, sample, folder / "inside", plan=tw.Plan(serving={"inline_below": 1 << 40}))
    p = tw.load_serving(folder / "dlrm", threads=threads)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    whole = onnxruntime.InferenceSession(str(inside / "dense.onnx"), options)
    lines = ["| DLRM, batch | torch eager, ms | ONNX Runtime, Gather inside | served, local store | p99 | eager / served | Gather inside / served |", "|---|---|---|---|---|---|---|"]
    for batch in (1, 32, 256):
        rng = np.random.default_rng(batch)
        batches = [(rng.standard_normal((batch, 13), dtype=np.float32), rng.integers(0, ROWS, (batch, TABLES))) for _ in range(16)]
        tensors = [(torch.from_numpy(a), torch.from_numpy(b)) for a, b in batches]
        turn = iter(range(1 << 60))

        def eager(tensors=tensors, turn=turn):
            with torch.inference_mode():
                return model(*tensors[next(turn) % 16])

        def gather(batches=batches, turn=turn):
            dense, ids = batches[next(turn) % 16]
            return whole.run(None, {"dense": dense, "ids": ids})

        def split(batches=batches, turn=turn):
            dense, ids = batches[next(turn) % 16]
            return p(dense=dense, ids=ids)

        with torch.inference_mode():
            assert max(np.abs(p(dense=a, ids=b) - model(x, y).numpy()).max() for (a, b), (x, y) in zip(batches, tensors)) < 1e-6
        taken = in_turn({"eager": eager, "inside": gather, "served": split}, seconds)
        m = medians(taken)
        lines.append(
            f"| {batch} | {m['eager']:.3f} | {m['inside']:.3f} | {m['served']:.3f} | {p99(taken['served']):.3f} | "
            f"**{m['eager'] / m['served']:.2f}** | **{m['inside'] / m['served']:.2f}** |"
        )
    sizes = {f.name: f.stat().st_size for f in served.glob("*.onnx")}
    tables = sum(t.rows * t.row_bytes for t in p.manifest.tables.values())
    dense_bytes = sum(q.numel() * 4 for n, q in model.named_parameters() if not n.startswith("tables"))
    return [*lines, "", f"Tables {tables:,} bytes in {TABLES} files; the dense weights are {dense_bytes:,} bytes; files: "
            + ", ".join(f"{n} {size:,}" for n, size in sizes.items()) + f"; with the tables inside {(inside / 'dense.onnx').stat().st_size:,}."]  # fmt: skip


def candidates(folder: Path, seconds: float, threads: int) -> list[str]:
    torch.manual_seed(0)
    model = Ranker().eval()
    draw = lambda users, items: (torch.randint(100_000, (users,)), torch.randint(100_000, (users, 50)), torch.randint(1000, (users, 10)),  # noqa: E731
                                 torch.randint(100_000, (items,)), torch.randint(1000, (items,)))  # fmt: skip
    tw.export_serving(model, draw(4, 4), folder / "ranker", shared=["user*", "history"])
    p, names = tw.load_serving(folder / "ranker", threads=threads), ("user", "history", "user_topics", "item", "topic")
    once = dict(zip(names, (t.numpy() for t in draw(1, 500))))
    repeated = {n: np.repeat(a, 500, axis=0) if len(a) == 1 else a for n, a in once.items()}
    plain = [torch.from_numpy(a) for a in repeated.values()]

    def eager():
        with torch.inference_mode():
            return model(*plain)

    assert np.abs(p(**once) - eager().numpy()).max() < 1e-6 and np.abs(p(**once) - p(**repeated)).max() < 1e-6
    m = medians(in_turn({"eager": eager, "repeated": lambda: p(**repeated), "once": lambda: p(**once)}, seconds))
    return ["| one user, 500 candidates | ms | repeated / this |", "|---|---|---|", f"| torch eager, the user repeated | {m['eager']:.3f} | {m['repeated'] / m['eager']:.2f} |",
            f"| served, the user repeated | {m['repeated']:.3f} | 1 |", f"| served, the user once | {m['once']:.3f} | **{m['repeated'] / m['once']:.1f}** |"]  # fmt: skip


def stores(folder: Path, seconds: float) -> list[str]:
    manifest = manifests.read(folder / "dlrm")
    rng = np.random.default_rng(0)
    every = [[(name, rng.permutation(ROWS)[:256]) for name in manifest.tables] for _ in range(64)]
    turn = itertools.count()
    local = open_store(manifest)
    memory = {name: local.lookup_many([(name, np.arange(ROWS))])[0].copy() for name in manifest.tables}
    calls = {"numpy: table[ids], in memory": lambda: [memory[name][ids] for name, ids in every[next(turn) % 64]],
             "local files, mapped": lambda: local.lookup_many(every[next(turn) % 64])}  # fmt: skip
    counts: dict[str, object] = {}

    def add(name: str, store, requests=every) -> None:
        for asked in requests:
            assert all(np.array_equal(a, b) for a, b in zip(store.lookup_many(asked), local.lookup_many(asked)))
        calls[name], counts[name] = lambda: store.lookup_many(requests[next(turn) % len(requests)]), store

    redis = None
    with shard_servers(folder / "dlrm", 3) as nodes:
        try:
            rpc = flight.FlightClient(f"grpc://127.0.0.1:{nodes[0][0].port}")
            calls["one empty RPC of Arrow Flight"] = lambda: list(rpc.do_action("describe"))
            floor, first = open_store(manifest, address(nodes)), [(name, np.zeros(1, np.int64)) for name in list(manifest.tables)[:3]]
            calls["Arrow Flight, one row of each process"] = lambda: floor.lookup_many(first)
            add("Arrow Flight, 3 processes", open_store(manifest, address(nodes)))
            twice = [[(name, rng.zipf(1.05, 256) % ROWS) for name in manifest.tables] for _ in range(64)]
            add("Arrow Flight, 3 processes, Zipf 1.05", open_store(manifest, address(nodes)), twice)
            exchange = FlightStore(address(nodes).partition("://")[2], manifest.tables, manifest.digest, 5, sockets=False)
            add("Arrow Flight, by its own exchange", Unique(exchange, manifest.tables))
            add("Arrow Flight, one request again and again, from the cache", open_store(manifest, address(nodes), cache_rows=60_000), every[:1])
            if shutil.which("redis-server"):
                redis = Redis(folder / "redis")
                publish(published(manifest), local, redis.address.partition("://")[2])
                add("Redis Cluster, 3 nodes", open_store(manifest, redis.address))
            before = {name: store.stats() for name, store in counts.items()}  # type: ignore[attr-defined]
            taken = in_turn(calls, seconds, burst=20)
            m = medians(taken)
            numpy, base, remote = m["numpy: table[ids], in memory"], m["local files, mapped"], m["Arrow Flight, 3 processes"]
            lines = [f"| store: {TABLES * 256:,} rows x {DIM} fp32 | ms | p99 | x numpy | x local | requests a call | rows a call |", "|---|---|---|---|---|---|---|"]
            for name, value in m.items():
                rows = requests = "-"
                if name in counts:
                    after, calls_made = counts[name].stats(), len(taken[name]) * 20 // 19 + 3  # type: ignore[attr-defined]
                    requests = f"{(after['requests'] - before[name]['requests']) / calls_made:.2f}"
                    rows = f"{(after['rows'] - before[name]['rows']) / calls_made:,.0f}"
                lines.append(f"| {name} | {value:.3f} | {p99(taken[name]):.3f} | {value / numpy:.2f} | {value / base:.2f} | {requests} | {rows} |")
            said = (f"Flight takes {remote / numpy:.1f} times what numpy takes to gather the same rows in memory (the baseline that 5 times was asked of), "
                    f"{remote / base:.1f} times the local store and {remote / m['Arrow Flight, one row of each process']:.1f} times a request of one row to "
                    "each process; all Flight rows but one use the servers' row ports")  # fmt: skip
            return [*lines, "", said + (f"; Redis Cluster takes {m['Redis Cluster, 3 nodes'] / remote:.1f} times what Flight takes." if redis else ".")]
        finally:
            if redis:
                redis.end()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4, help="for each comparison")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=("dlrm", "candidates", "stores"), nargs="*")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), platform.machine())
    commit = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    lines = [f"{cpu}, {os.cpu_count()} cores, {options.threads} thread(s), load {os.getloadavg()[0]:.1f}; torch {torch.__version__}, "
             f"ONNX Runtime {onnxruntime.__version__}, numpy {np.__version__}; commit {commit}; medians, ms"]  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wanted = options.only or ("dlrm", "candidates", "stores")
        if "dlrm" in wanted or "stores" in wanted:
            lines += ["", *dlrm(folder, options.seconds if "dlrm" in wanted else 0, options.threads)]
        if "candidates" in wanted:
            lines += ["", *candidates(folder, options.seconds, options.threads)]
        if "stores" in wanted:
            lines += ["", *stores(folder, options.seconds)]
    print("\n".join(lines))
    if options.out:
        options.out.write_text("# Serving on CPU\n\n`python benchmarks/serving_cpu.py`\n\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
