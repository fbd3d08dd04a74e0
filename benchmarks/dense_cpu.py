"""The dense part of recommenders, plain and optimized: forward and backward at batch 2048, in one process, calls in turn.

    python benchmarks/dense_cpu.py --threads 1 2 --out benchmarks/results/dense_cpu.md

The optimized model is what ``tw.optimize`` makes of the plain one with a sample batch of 4 rows; nothing is chosen by hand.
"""
from __future__ import annotations

import argparse
from pathlib import Path

import tablewright as tw
import torch
from embedding_cpu import heading
from torch import Tensor, nn
from workload import interleaved, median_ms

BATCH = 2048


def mlp(*sizes: int, dropout: float = 0.0, norm: bool = False) -> nn.Sequential:
    layers: list[nn.Module] = []
    for fan_in, fan_out in zip(sizes, sizes[1:-1]):
        layers += [nn.Linear(fan_in, fan_out), *([nn.BatchNorm1d(fan_out)] if norm else []), nn.ReLU()]
        layers += [nn.Dropout(dropout)] if dropout else []
    return nn.Sequential(*layers, nn.Linear(*sizes[-2:]))


class Cross(nn.Module):
    """DCN v1 ("vector") or v2 ("matrix")."""

    def __init__(self, dim: int, layers: int, form: str) -> None:
        super().__init__()
        self.linear = nn.ModuleList(nn.Linear(dim, 1 if form == "vector" else dim, bias=False) for _ in range(layers))
        self.bias = nn.ParameterList(torch.zeros(dim) for _ in range(layers))

    def forward(self, x0: Tensor) -> Tensor:
        x = x0
        for linear, bias in zip(self.linear, self.bias):
            x = x0 * linear(x) + bias + x
        return x


class LowRankCross(nn.Module):
    """DCN v2's mixture of low-rank experts, as published implementations write it."""

    def __init__(self, dim: int, layers: int, rank: int, experts: int) -> None:
        super().__init__()
        self.u, self.v = (nn.Parameter(torch.randn(layers, experts, dim, rank) / dim) for _ in range(2))
        self.c = nn.Parameter(torch.randn(layers, experts, rank, rank) / rank)
        self.gates = nn.ModuleList(nn.Linear(dim, 1, bias=False) for _ in range(experts))
        self.bias = nn.Parameter(torch.zeros(layers, dim, 1))

    def forward(self, x: Tensor) -> Tensor:
        x0 = x = x.unsqueeze(2)
        for u, v, c, bias in zip(self.u, self.v, self.c, self.bias):
            outs, scores = [], []
            for e, gate in enumerate(self.gates):
                low = torch.tanh(torch.matmul(c[e], torch.tanh(torch.matmul(v[e].t(), x))))
                outs.append((x0 * (torch.matmul(u[e], low) + bias)).squeeze(2))
                scores.append(gate(x.squeeze(2)))
            x = torch.matmul(torch.stack(outs, 2), torch.stack(scores, 1).softmax(1)) + x
        return x.squeeze(2)


class Mixture(nn.Module):
    """MMoE with two tasks."""

    def __init__(self, dim: int, experts: int, *sizes: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(mlp(dim, *sizes) for _ in range(experts))
        self.gates = nn.ModuleList(nn.Linear(dim, experts) for _ in range(2))
        self.towers = nn.ModuleList(mlp(sizes[-1], 16, 1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        made = torch.stack([expert(x) for expert in self.experts], 1)
        pooled = [(gate(x).softmax(-1).unsqueeze(-1) * made).sum(1) for gate in self.gates]
        return torch.cat([tower(p) for tower, p in zip(self.towers, pooled)], -1)


MODELS = {
    "MLP 13-512-256-128 (DLRM, bottom)": (lambda: mlp(13, 512, 256, 128), 13),
    "MLP 479-1024-1024-512-256-1 (DLRM, top)": (lambda: mlp(479, 1024, 1024, 512, 256, 1), 479),
    "MLP 400-256-128-64-1, dropout 0.2": (lambda: mlp(400, 256, 128, 64, 1, dropout=0.2), 400),
    "MLP 160-64-32-1, batch norm, dropout 0.2": (lambda: mlp(160, 64, 32, 1, dropout=0.2, norm=True), 160),
    "DCN v1, 3 layers of 429": (lambda: Cross(429, 3, "vector"), 429),
    "DCN v1, 3 layers of 1024": (lambda: Cross(1024, 3, "vector"), 1024),
    "DCN v2, 3 layers of 160": (lambda: Cross(160, 3, "matrix"), 160),
    "DCN v2, 3 layers of 429": (lambda: Cross(429, 3, "matrix"), 429),
    "DCN v2, 1 layer of 1024": (lambda: Cross(1024, 1, "matrix"), 1024),
    "DCN v2, 4 experts of rank 32, 2 layers of 429": (lambda: LowRankCross(429, 2, 32, 4), 429),
    "MMoE, 8 experts 160-16-8": (lambda: Mixture(160, 8, 16, 8), 160),
    "MMoE, 8 experts 400-256-64": (lambda: Mixture(400, 8, 256, 64), 400),
}


def measure(name: str, rounds: int) -> tuple[float, float, str]:
    """Milliseconds of the plain and of the optimized model, and the report's first line."""
    make, width = MODELS[name]
    torch.manual_seed(0)
    plain, x = make(), torch.randn(BATCH, width, requires_grad=True)
    ours = tw.optimize(plain, sample_inputs=(x.detach()[:4],))
    seed = torch.randn_like(plain(x))

    def step(model: nn.Module):
        def call(i: int) -> None:
            model(x).backward(seed)

        return call

    times = interleaved({"plain": step(plain), "ours": step(ours)}, rounds)
    return median_ms(times["plain"]), median_ms(times["ours"]), ours.report._summary()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=9, help="of timing for each model and thread count")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    lines = ["| model | threads | plain ms | optimized ms | times as fast | what was done |", "|---|---|---|---|---|---|"]
    for threads in options.threads:
        torch.set_num_threads(threads)
        for name in MODELS:
            plain, ours, done = measure(name, options.rounds)
            done = done.removeprefix("0/0 lookups fused; ")
            lines.append(f"| {name} | {threads} | {plain:.2f} | {ours:.2f} | {plain / ours:.2f} | {done} |")
            print(lines[-1], flush=True)
    if options.out:
        text = heading().split("Milliseconds")[0] + f"Batch {BATCH}, forward and backward, medians in milliseconds.\n\n"
        options.out.write_text(text + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
