"""A table larger than memory beside one in memory: rows/s, hit rate, resident memory, and how much of the misses a prefetch hides.

The big table has ``--rows`` rows of ``--dim`` float32 with AdaGrad state beside them, in a sparse file under ``--folder``, behind a cache of
``--cache`` GB; ids are Zipf-distributed (exponent 1.05) over all rows, spread by a hash. The table in memory has as many rows as fit in
``--cache`` GB and gets the same ids modulo its rows: about the same number of distinct rows a batch, all of them hits. Both train with AdaGrad
in the backward, in short rounds in turn, whose order changes, after a warm-up that fills the cache (about 3,000 batches; from then on every miss
writes a row back). Prints medians, of each round too, and the processor time of the training thread, for benchmarks/results/.
"""
from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import time
from pathlib import Path

import numpy
import tablewright as tw
import torch
from tablewright.kernels import memory
from tablewright.rewriter.prefetch import Pipeline
from torch import nn


class Model(nn.Module):
    def __init__(self, rows: int, dim: int, hidden: int, device: str | None) -> None:
        super().__init__()
        self.item = nn.EmbeddingBag(rows, dim, mode="sum", device=device)
        self.top = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, 1))

    def forward(self, ids):
        return self.top(self.item(ids)).squeeze(1)


def zipf(count: int, rows: int, exponent: float, chance: numpy.random.Generator) -> numpy.ndarray:
    """Ranks 0..rows-1 with probability ~ 1/(rank+1)**exponent, by inversion of the continuous form; then spread over the table."""
    u, power = chance.random(count), 1 - exponent
    ranks = ((rows + 1.0) ** power - 1) * u + 1
    ranks = numpy.floor(ranks ** (1 / power)).astype(numpy.int64) - 1
    return (ranks.clip(0, rows - 1) * 0x9E3779B1 + 12345) % rows


def resident() -> float:
    """GB of anonymous and file-backed memory of this process that is in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e9


def step(model, dense, ids, wanted) -> None:
    ((model(ids) - wanted) ** 2).mean().backward()
    dense.step()
    dense.zero_grad()


def optimized(rows, dim, hidden, ids, storage=None):
    model = Model(rows, dim, hidden, "meta" if storage else None)
    table = {"embedding_optimizer": {"adagrad": {"lr": 0.01, "in_backward": True}}, **({"storage": storage} if storage else {})}
    opt = tw.optimize(model, tw.Plan.from_dict({"version": 1, "tables": {"item": table}}), sample_inputs=(ids,))
    return opt, torch.optim.SGD(opt.dense_parameters(), lr=0.01)


def timed(line, model, dense) -> list[tuple[float, float]]:
    """Of each step: seconds, and processor seconds of this thread."""
    taken, begun, worked = [], time.perf_counter(), time.thread_time()
    for ids, wanted in line:
        step(model, dense, ids, wanted)
        now, then = time.perf_counter(), time.thread_time()
        taken.append((now - begun, then - worked))
        begun, worked = now, then
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=117_000_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--cache", type=float, default=4.0, help="GB")
    parser.add_argument("--policy", choices=("lru", "lfu"), default="lfu")
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--pooling", type=int, default=10)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--exponent", type=float, default=1.05)
    parser.add_argument("--warm", type=int, default=1500, help="batches before anything is timed")
    parser.add_argument("--steps", type=int, default=30, help="of each kind, in each round")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--folder", type=Path, default=Path("/tmp/tiers_benchmark"))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shutil.rmtree(args.folder, ignore_errors=True)
    chance = numpy.random.default_rng(0)

    def batches(count):
        for _ in range(count):
            ids = zipf(args.batch * args.pooling, args.rows, args.exponent, chance)
            yield torch.from_numpy(ids.reshape(args.batch, args.pooling)), torch.rand(args.batch)

    first = next(batches(1))[0]
    small = int(args.cache * 1e9 / (args.dim * 8))
    tiered, dense = optimized(args.rows, args.dim, args.hidden, first, {"cache": f"{args.cache}GB", "path": str(args.folder / "item"), "policy": args.policy})
    started = resident()
    for k, (ids, wanted) in enumerate(tw.pipeline(batches(args.warm), tiered, inputs=lambda b: b[:1])):
        step(tiered, dense, ids, wanted)
        if k % 250 == 0:
            print(f"warm {k}: {tiered.tiers['item.weight'].hit_rate:.3f} hits, {resident():.2f} GB resident", file=sys.stderr, flush=True)
    most = resident()
    whole, other = optimized(small, args.dim, args.hidden, first % small)
    for ids, wanted in batches(20):
        step(whole, other, ids % small, wanted)
    memory.wait()  # both tables are on huge pages from here on
    beside = resident() - most
    warm = tiered.tiers["item.weight"]
    kinds = ("tiers, no prefetch", "tiers, prefetch", "in memory")
    times: dict[str, list[list[tuple[float, float]]]] = {kind: [] for kind in kinds}
    reports = []
    for number in range(args.rounds):
        for kind in kinds[number % 3 :] + kinds[: number % 3]:
            model, other_optimizer = (whole, other) if kind == "in memory" else (tiered, dense)
            given = [(ids % small if model is whole else ids, wanted) for ids, wanted in batches(args.steps)]
            line = tw.pipeline(given, tiered, inputs=lambda b: b[:1]) if kind == "tiers, prefetch" else given
            times[kind].append(timed(line, model, other_optimizer))
            if isinstance(line, Pipeline):
                reports.append(line.report)
    most = max(most, resident() - beside)
    after = tiered.tiers["item.weight"]
    steps = 2 * args.rounds * args.steps
    median = {kind: [statistics.median(s for r in rounds for s in [t[k] for t in r]) for k in range(2)] for kind, rounds in times.items()}
    per_round = [[statistics.median(t[0] for t in times[kind][k]) * 1e3 for kind in kinds] for k in range(args.rounds)]
    share = [r[2] / r[1] for r in per_round]
    rate = (after.hits - warm.hits) / max(1, after.hits - warm.hits + after.misses - warm.misses)
    lines = [
        f"{args.rows:,} rows x {args.dim} float32 + AdaGrad state = {args.rows * args.dim * 8 / 1e9:.0f} GB, cache {args.cache} GB, Zipf {args.exponent}, batch {args.batch} x {args.pooling}, {args.threads} threads",
        "", "| | median ms/step | of them at work | ids/s | of in memory |", "|---|---|---|---|---|",
        *(f"| {n} | {t * 1e3:.2f} | {w * 1e3:.2f} | {args.batch * args.pooling / t / 1e6:.2f} M | {median['in memory'][0] / t:.2f} |" for n, (t, w) in median.items()),
        "", "medians of the rounds, ms (as above): " + "; ".join(" ".join(f"{t:.2f}" for t in r) for r in per_round),
        f"in memory / prefetch, by round: {' '.join(f'{s:.2f}' for s in share)}; median {statistics.median(share):.2f}; best round of each: {min(r[2] for r in per_round) / min(r[1] for r in per_round):.2f}",
        "", f"hit rate of distinct rows {rate:.3f} (warm-up {warm.hit_rate:.3f}); misses a step {(after.misses - warm.misses) / steps:.0f}, of them read from the file {(after.read - warm.read) / steps:.0f}, made from the seed {(after.made - warm.made) / steps:.0f}; written back {(after.written - warm.written) / steps:.0f}",
        f"resident memory {started:.2f} GB at first, at most {most:.2f} GB; file {sum(f.stat().st_blocks * 512 for f in (args.folder / 'item').iterdir()) / 1e9:.1f} GB on disk",
        *(f"prefetch, round {i}: {report}" for i, report in enumerate(reports, 1)),
    ]  # fmt: skip
    print("\n".join(lines))
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
