"""Is the optimized model slower than the plain one on any shape? Forward and whole step (same Adagrad), from one lookup of one id
to a thousand tables, in one process, calls in turn.

    python benchmarks/shapes_cpu.py --out benchmarks/results/shapes_cpu.md

"plain" is the user's model as written (dense gradients); "plain sparse" has ``sparse=True``. Ratios above 1 are ours faster.
"""
from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import tablewright as tw
import torch
from embedding_cpu import heading
from tablewright.kernels import memory
from torch import Tensor, nn
from workload import interleaved, median_ms


class Lookups(nn.Module):
    """``tables`` embedding bags (pooling > 1) or embeddings, concatenated."""

    def __init__(self, tables: int, rows: int, dim: int, pooling: int, sparse: bool) -> None:
        super().__init__()
        make = nn.Embedding if pooling == 1 else nn.EmbeddingBag
        self.tables = nn.ModuleList(make(rows, dim, sparse=sparse) for _ in range(tables))

    def forward(self, ids: list[Tensor]) -> Tensor:
        return torch.cat([table(i) for table, i in zip(self.tables, ids)], dim=-1)


def shapes(args):
    for count, dim, pooling, batch in itertools.product(args.tables, args.dims, args.pooling, args.batches):
        if count * dim * pooling * batch <= 40_000_000 and count * batch * dim <= 8_000_000:
            yield count, dim, pooling, batch


def measure(count: int, dim: int, pooling: int, batch: int, seconds: float, rows: int) -> str:
    rows = max(100, min(rows, 40_000_000 // (count * dim)))
    batches = [
        [torch.randint(0, rows, (batch,) if pooling == 1 else (batch, pooling)) for _ in range(count)] for _ in range(4)
    ]
    models = {"plain": Lookups(count, rows, dim, pooling, False), "plain sparse": Lookups(count, rows, dim, pooling, True)}
    parts = {name: (m, torch.optim.Adagrad(m.parameters(), lr=0.01)) for name, m in models.items()}
    ours = Lookups(count, rows, dim, pooling, False)
    optimizer = torch.optim.Adagrad(ours.parameters(), lr=0.01)
    parts["ours"] = tw.optimize(ours, "auto", optimizer=optimizer, sample_inputs=(batches[0],))

    memory.wait()  # while pages are moved to huge ones, reads of them stop

    def forward(model):
        def call(i: int) -> None:
            with torch.no_grad():
                model(batches[i % 4])

        return call

    def step(model, optimizer):
        def call(i: int) -> None:
            model(batches[i % 4]).sum().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return call

    cells = []
    for calls in ({n: forward(p[0]) for n, p in parts.items()}, {n: step(*p) for n, p in parts.items()}):
        once = interleaved(calls, 3)
        rounds = int(max(5, min(200, seconds / sum(median_ms(t) / 1e3 for t in once.values()))))
        ms = {n: median_ms(t) for n, t in interleaved(calls, rounds).items()}
        cells += [f"{ms['ours']:.3f}", f"{ms['plain'] / ms['ours']:.2f}", f"{ms['plain sparse'] / ms['ours']:.2f}"]
    return f"| {count} x {rows} x {dim} | {pooling} | {batch} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each comparison")
    parser.add_argument("--tables", type=int, nargs="+", default=[1, 2, 4, 26, 200, 1000])
    parser.add_argument("--dims", type=int, nargs="+", default=[4, 16, 64, 512])
    parser.add_argument("--pooling", type=int, nargs="+", default=[1, 10, 100])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32, 2048, 16384])
    parser.add_argument("--rows", type=int, default=20_000, help="of a table, at most")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    lines = [f"{heading()} {args.threads} threads.", "",
             "| tables | pooling | batch | forward ms | vs plain | vs plain sparse | step ms | vs plain | vs plain sparse |",
             "|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    print("\n".join(lines), flush=True)
    for shape in shapes(args):
        lines.append(measure(*shape, args.seconds, args.rows))
        print(lines[-1], flush=True)
        if args.out:
            args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
