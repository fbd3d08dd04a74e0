"""Tables behind a cache on the GPU over the host's memory beside the same model wholly in the GPU's memory: MLPerf's DLRM, Zipf ids.

    python benchmarks/tiers_gpu.py             # an H200 and 128 GB of memory: 90 GB of tables, 12 GB of cache; benchmarks/results/tiers_gpu_<date>.md
    python benchmarks/tiers_gpu.py --tiny      # no GPU: tiny sizes with the cache in the CPU's memory, which proves this script (equal weights) and times nothing

The row counts are MLPerf's, the largest cut so that all weights take ``--gb``; tables of more than ``--small`` rows are in tiers and share
``--cache`` by their rows. Both models train with rowwise AdaGrad in the backward and a bfloat16 dense part, through ``tw.pipeline``, in turn, on batches that
are made beforehand and never come twice (exponent 1.05, ranks spread over each table). Warm until the cache is full and rows leave. It has not
been run on a GPU yet.
"""
from __future__ import annotations

import argparse
import datetime
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import tablewright as tw
import torch
from gpu_ops import MLPERF_ROWS
from gpu_steps import Dlrm
from torch import Tensor, nn

BAR = 0.85


def cut_to(rows: tuple[int, ...], wanted: float, row_bytes: int) -> list[int]:
    """``rows`` with the largest cut to one size, so that all take at most ``wanted`` bytes."""
    low, high = 1, max(rows)
    while low < high:
        middle = (low + high + 1) // 2
        if sum(min(r, middle) for r in rows) * row_bytes <= wanted:
            low = middle
        else:
            high = middle - 1
    return [min(r, low) for r in rows]


def zipf(batch: int, rows: Tensor, exponent: float, generator: torch.Generator) -> Tensor:
    """Ids int32 ``[tables, batch]``: ranks by inversion of the continuous power law, spread over each of ``rows`` (int64 ``[tables, 1]``)."""
    uniform = torch.rand(len(rows), batch, dtype=torch.float64, generator=generator, device=rows.device)
    power = 1.0 - exponent
    ranks = (((rows + 1.0) ** power - 1.0) * uniform + 1.0) ** (1.0 / power)
    return ((ranks.long().clamp(min=1).minimum(rows) - 1) * 2654435761 % rows).int()


class Batches:
    """``count`` batches of one round: dense features, ids of each table, labels, all on the host."""

    def __init__(self, args: argparse.Namespace, rows: list[int], device: torch.device) -> None:
        self.batch, self.exponent = args.batch, args.exponent
        self.rows = torch.tensor(rows, device=device)[:, None]
        self.generator = torch.Generator(device).manual_seed(0)

    def make(self, count: int) -> list[tuple[Tensor, ...]]:
        made = []
        for _ in range(count):
            ids = zipf(self.batch, self.rows, self.exponent, self.generator).cpu()
            made.append((torch.rand(self.batch, 13), *ids.unbind(0), torch.randint(2, (self.batch,)).float()))
        return made


def model_of(rows: list[int], dim: int, hidden: int, device: torch.device, above: int | None) -> nn.Module:
    """The DLRM; tables of more than ``above`` rows (None: no table) on the meta device."""
    here = [r if above is None or r <= above else 1 for r in rows]
    model = Dlrm(here, dim, torch.float32, device, hidden).to(device)
    for i, r in enumerate(rows):
        if r != here[i]:
            model.tables[i] = nn.Embedding(r, dim, device="meta")
    return model


def optimized(model: nn.Module, tables: dict, sample: tuple[Tensor, ...]):
    plan = tw.Plan.from_dict(
        {
            "version": 1, "precision": "bf16", "numerics": "reassociated", "tables": tables, "pipeline": {"prefetch": 3},
            "embedding_optimizer": {"rowwise_adagrad": {"lr": 0.01, "eps": 1e-8, "in_backward": True}},
        }
    )  # fmt: skip
    opt = tw.optimize(model, plan, sample_inputs=sample)
    return opt, torch.optim.SGD(opt.dense_parameters(), lr=0.01)


def train(opt, dense: torch.optim.Optimizer, batches: list, wait: Callable[[], None]):
    """Seconds a step over ``batches``, and the pipeline's report."""
    loss_of = nn.BCEWithLogitsLoss()
    line = tw.pipeline(batches, opt, inputs=lambda b: b[:-1])
    wait()
    started = time.perf_counter()
    for *inputs, labels in line:
        loss = loss_of(opt(*inputs).float(), labels)
        loss.backward()
        dense.step()
        dense.zero_grad()
    wait()
    return (time.perf_counter() - started) / len(batches), line.report


def totals(opt) -> dict[str, float]:
    """What all caches counted, summed."""
    names = ("hits", "misses", "made", "written", "bytes_in", "bytes_out", "late", "stalled")
    return {n: sum(getattr(c, n) for c in opt.tiers.values()) for n in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--gb", type=float, default=90.0, help="of weights")
    parser.add_argument("--cache", type=float, default=12.0, help="GB, of weights and state")
    parser.add_argument("--small", type=int, default=1_000_000, help="rows up to which a table is wholly on the GPU")
    parser.add_argument("--batch", type=int, default=65536)
    parser.add_argument("--exponent", type=float, default=1.05)
    parser.add_argument("--warm", type=int, default=600, help="batches")
    parser.add_argument("--steps", type=int, default=40, help="in each round")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if not args.tiny and not torch.cuda.is_available():
        parser.error("there is no GPU here; --tiny proves the script without one")
    dim, hidden, device, wait = 128, 1024, torch.device("cuda", 0), torch.cuda.synchronize
    rows = cut_to(MLPERF_ROWS, args.gb * 1e9, dim * 4)
    if args.tiny:
        dim, hidden, device, wait = 8, 16, torch.device("cpu"), (lambda: None)
        rows, args.small, args.cache, args.batch, args.warm, args.steps, args.rounds = [3000, 40, 2000, 7], 1000, 4e-5, 64, 20, 5, 2
    torch.manual_seed(0)
    source = Batches(args, rows, device)
    sample = tuple(t.to(device) for t in source.make(1)[0][:-1])
    large = [i for i, r in enumerate(rows) if r > args.small]
    share = args.cache * 1e9 / sum(rows[i] for i in large)
    storage = {
        f"tables.{i}": {"storage": {"cache": int(share * rows[i]), "cache_on": device.type, "backing": "host", "init": {"uniform": [-0.01, 0.01]}}} for i in large
    }
    tiered, tiered_dense = optimized(model_of(rows, dim, hidden, device, args.small), storage, sample)
    whole, whole_dense = optimized(model_of(rows, dim, hidden, device, None), {}, sample)
    if args.tiny:
        whole.load_state_dict(tiered.state_dict())
    for first in range(0, args.warm, 100):
        batches = source.make(min(100, args.warm - first))
        seconds, report = train(tiered, tiered_dense, batches, wait)
        print(f"warm {first + len(batches)}: {seconds * 1e3:.2f} ms a step; {report}", file=sys.stderr, flush=True)
        if first + 100 >= args.warm or args.tiny:
            train(whole, whole_dense, batches, wait)
    times: dict[str, list[float]] = {"wholly on the GPU": [], f"{args.cache:g} GB of cache over the host's memory": []}
    before, reports = totals(tiered), []
    names = list(times)
    for _ in range(args.rounds):
        batches = source.make(args.steps)
        times[names[0]].append(train(whole, whole_dense, batches, wait)[0])
        seconds, report = train(tiered, tiered_dense, batches, wait)
        times[names[1]].append(seconds)
        reports.append(report)
    after, steps = totals(tiered), args.rounds * args.steps
    moved = {n: (after[n] - before[n]) / steps for n in after}
    median = {n: statistics.median(t) for n, t in times.items()}
    ratio = median[names[0]] / median[names[1]]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    where = "no GPU: times mean nothing" if args.tiny else torch.cuda.get_device_name()
    lines = [
        f"# Tables behind a GPU cache, {datetime.date.today()}", "",
        f"{where}; Python {platform.python_version()}, torch {torch.__version__}, commit {commit or 'unknown'}. {len(rows)} tables, {sum(rows):,} rows x {dim} float32 = "
        f"{sum(rows) * dim * 4 / 1e9:.2f} GB, {len(large)} of them in tiers, {args.cache:g} GB of cache; batch {args.batch}, Zipf {args.exponent}, rowwise AdaGrad, bfloat16 dense part.", "",
        "| | ms a step | samples/s | of wholly on the GPU |", "|---|---|---|---|",
        *(f"| {n} | {t * 1e3:.2f} | {args.batch / t / 1e6:.3f} M | {median[names[0]] / t:.2f} |" for n, t in median.items()),
        "", *([] if args.tiny else [f"Bar: {BAR} of wholly on the GPU; measured {ratio:.2f}."]),
        f"A step: {moved['hits']:,.0f} distinct rows hit and {moved['misses']:,.0f} missed ({moved['hits'] / max(1, moved['hits'] + moved['misses']):.1%} hits), {moved['made']:,.0f} of "
        f"these made from the seed; {moved['written']:,.0f} written back; {moved['bytes_in'] / 1e6:,.1f} MB to the GPU and {moved['bytes_out'] / 1e6:,.1f} MB back; "
        f"{moved['late']:.2f} lookups waited for rows, {moved['stalled'] * 1e3:.3f} ms.",
        *(f"* round {i}: {report}" for i, report in enumerate(reports, 1)),
    ]  # fmt: skip
    print("\n".join(lines))
    if args.tiny:
        wrong = [n for n, v in tiered.state_dict().items() if not torch.equal(v, whole.state_dict()[n])]
        print(f"weights after {args.warm + steps} steps: {'equal in both' if not wrong else 'DIFFERENT: ' + ', '.join(wrong)}")
        sys.exit(bool(wrong))
    (args.out or Path(__file__).parent / "results" / f"tiers_gpu_{datetime.date.today()}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
