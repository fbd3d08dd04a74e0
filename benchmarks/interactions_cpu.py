"""Interactions on CPU, forward and backward, against the plain spellings: one table.

``python benchmarks/interactions_cpu.py [--rounds 7] [--out benchmarks/results/interactions_cpu_DATE.md]``

Each cell is the median of one forward and backward in milliseconds, variants taken in turn; the ratio is plain / ours.
"""
from __future__ import annotations

import argparse
import itertools
import platform
from pathlib import Path

import torch
from tablewright.kernels.interaction import cpu
from tablewright.kernels.interaction.op import DOT_INTERACTION, FM, PAIR_PRODUCTS
from workload import interleaved, median_ms

SHAPES = ((2048, 27, 64), (2048, 27, 128), (2048, 10, 16))


def cases(batch: int, features: int, dim: int):
    """(what, plain spelling, our op) of functions of x and the dense vector."""
    low, high = torch.tril_indices(features, features, -1)
    lower = f"{features} lower"
    yield (
        "dot interaction, then cat",
        lambda x, d: torch.cat([d, torch.bmm(x, x.transpose(1, 2))[:, low, high]], 1),
        lambda x, d: DOT_INTERACTION(x, [d], lower, 1),
    )
    flat = low * features + high
    yield (
        "dot interaction by a flat index, then cat",
        lambda x, d: torch.cat([d, torch.bmm(x, x.transpose(1, 2)).flatten(1).index_select(1, flat)], 1),
        lambda x, d: DOT_INTERACTION(x, [d], lower, 1),
    )
    yield "FM", lambda x, d: 0.5 * (x.sum(1) ** 2 - (x**2).sum(1)).sum(1), lambda x, d: FM(x, 1.0, True)
    yield "FM, not summed over dim", lambda x, d: 0.5 * (x.sum(1) ** 2 - (x**2).sum(1)), lambda x, d: FM(x, 1.0, False)
    yield "inner products by index lists", lambda x, d: (x[:, low] * x[:, high]).sum(2), lambda x, d: DOT_INTERACTION(x, [], lower)
    yield "pair products by index lists", lambda x, d: x[:, low] * x[:, high], lambda x, d: PAIR_PRODUCTS(x, lower)


def step(function, x, d):
    seed = torch.randn_like(function(x, d))
    return lambda _: torch.autograd.grad(function(x, d), [x, d], seed, allow_unused=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    lines = [
        f"{platform.processor() or platform.machine()}, {cpu.describe()}, torch {torch.__version__}; forward and backward, ms, median",
        "", "| batch x features x dim | threads | what | plain | tablewright | ratio |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for shape, threads in itertools.product(SHAPES, options.threads):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        x, d = torch.randn(shape, requires_grad=True), torch.randn(shape[0], shape[2], requires_grad=True)
        for what, plain, ours in cases(*shape):
            rounds = 2 if "lists" in what and shape[1] > 20 else options.rounds
            times = interleaved({"plain": step(plain, x, d), "ours": step(ours, x, d)}, rounds, warmup=1)
            before, after = median_ms(times["plain"]), median_ms(times["ours"])
            size = " x ".join(map(str, shape))
            lines.append(f"| {size} | {threads} | {what} | {before:.2f} | {after:.2f} | {before / after:.1f}x |")
            print(lines[-1], flush=True)
    text = "\n".join(lines) + "\n"
    if options.out is not None:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
