"""Bounded staleness: what it does to the AUC, and what it hides.

    python benchmarks/staleness.py --data ml-100k           # AUC at staleness 0..8 on real MovieLens (the model of examples/train_movielens.py)
    python benchmarks/staleness.py --speed                  # time of a step of a DLRM with tables in memory, at staleness 0, 1 and 2, in turn

The AUC is of the newest tenth of the ratings, after training on the older ones with AdaGrad in shuffled batches; the same batches and the
same starting weights for every staleness. Prints tables for benchmarks/results/.
"""
from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy
import tablewright as tw
import torch
from tablewright.rewriter.prefetch import PipelineReport
from torch import nn

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))
import movielens  # noqa: E402
from side_by_side import Learner  # noqa: E402
from train_movielens import FilmModel  # noqa: E402


def train_and_judge(ratings: movielens.Ratings, staleness: int, seed: int, args: argparse.Namespace) -> tuple[float, PipelineReport]:
    """(AUC on the newest ratings, the pipeline's report)."""
    count = len(ratings.liked)
    newest = int(count * 0.9)
    shuffle = numpy.random.default_rng(seed)
    torch.manual_seed(seed)
    model = FilmModel(ratings.sizes())
    held_out = list(ratings.batches(numpy.arange(newest, count), args.batch))
    plan = {"version": 1, "numerics": "approximate", "pipeline": {"prefetch": 2, "staleness": staleness}}
    opt, optimizer = tw.optimize(model, plan, optimizer=torch.optim.Adagrad(model.parameters(), lr=args.lr), sample_inputs=held_out[0][0])
    loss = nn.BCEWithLogitsLoss()

    def loader():
        for _ in range(args.epochs):
            yield from ratings.batches(shuffle.permutation(newest), args.batch)

    line = tw.pipeline(loader(), opt, inputs=lambda batch: batch[0])
    for inputs, liked in line:
        loss(opt(*inputs), liked).backward()
        optimizer.step()
        optimizer.zero_grad()
    return Learner("", opt, []).auc(held_out), line.report


def quality(args: argparse.Namespace) -> None:
    ratings = movielens.load(args.data)
    print(f"{len(ratings.liked):,} ratings, batch {args.batch}, {args.epochs} epochs, AdaGrad lr {args.lr}, seeds 0..{args.seeds - 1}\n")
    print("| staleness | AUC (mean) | least, most | beside 0, same seed | updates late: most | mean | batches looked up ahead |\n|---|---|---|---|---|---|---|")
    base: list[float] = []
    for staleness in args.staleness:
        found = [train_and_judge(ratings, staleness, seed, args) for seed in range(args.seeds)]
        aucs = [auc for auc, _ in found]
        base = base or aucs
        apart = [a - b for a, b in zip(aucs, base)]
        report = found[0][1]
        print(
            f"| {staleness} | {statistics.mean(aucs):.4f} | {min(aucs):.4f}, {max(aucs):.4f} | {statistics.mean(apart):+.4f} ({min(apart):+.4f} to {max(apart):+.4f}) "
            f"| {max(r.latest for _, r in found)} | {report.mean_lateness:.2f} | {report.looked_ahead} of {report.batches} |", flush=True,
        )  # fmt: skip


class Dlrm(nn.Module):
    """26 bags concatenated with a dense vector, and a perceptron."""

    def __init__(self, rows: int, dim: int) -> None:
        super().__init__()
        self.bags = nn.ModuleList(nn.EmbeddingBag(rows, dim, mode="sum") for _ in range(26))
        self.bottom = nn.Sequential(nn.Linear(13, 64), nn.ReLU(), nn.Linear(64, dim), nn.ReLU())
        self.top = nn.Sequential(nn.Linear(27 * dim, 256), nn.ReLU(), nn.Linear(256, 1))

    def forward(self, dense, ids):
        return self.top(torch.cat([self.bottom(dense), *(bag(i) for bag, i in zip(self.bags, ids))], 1)).squeeze(1)


def speed(args: argparse.Namespace) -> None:
    rows, dim, batch, pooling = 100_000, 64, 2048, 10
    chance = torch.Generator().manual_seed(0)
    batches = [
        (torch.randn(batch, 13, generator=chance), [torch.randint(0, rows, (batch, pooling), generator=chance) for _ in range(26)]) for _ in range(8)
    ]
    lines = {}
    for staleness in (0, 1, 2):
        torch.manual_seed(0)
        plan = {"version": 1, "numerics": "approximate", "pipeline": {"staleness": staleness}, "embedding_optimizer": {"adagrad": {"in_backward": True}}}
        model = Dlrm(rows, dim)
        dense = [p for n, p in model.named_parameters() if "bags" not in n]
        opt, optimizer = tw.optimize(model, plan, optimizer=torch.optim.SGD(dense, lr=0.01), sample_inputs=batches[0])
        line = tw.pipeline([b for _ in range(args.steps // 8 + 1) for b in batches], opt)
        lines[staleness] = (opt, optimizer, line, iter(line))
    seconds: dict[int, list[float]] = {k: [] for k in lines}
    for _ in range(args.steps):
        for staleness, (opt, optimizer, _, each) in lines.items():
            started = time.perf_counter()
            one = next(each)
            opt(*one).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds[staleness].append(time.perf_counter() - started)
    print(f"26 tables of {rows:,} x {dim}, batch {batch}, pooling {pooling}, AdaGrad in the backward, {torch.get_num_threads()} thread(s), medians of {args.steps} steps in turn\n")
    print("| staleness | ms a step | beside 0 | lookups ahead, ms a batch |\n|---|---|---|---|")
    base = statistics.median(seconds[0])
    for staleness, (_, _, line, _) in lines.items():
        now = statistics.median(seconds[staleness])
        print(f"| {staleness} | {1e3 * now:.1f} | {base / now:.2f}x | {1e3 * line.report.looking / max(1, line.report.batches):.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("ml-100k"), help="folder of MovieLens-100k (see examples/movielens.py)")
    parser.add_argument("--staleness", type=int, nargs="+", default=list(range(9)))
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    speed(args) if args.speed else quality(args)


if __name__ == "__main__":
    main()
