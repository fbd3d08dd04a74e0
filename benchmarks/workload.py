"""Tables, ids and plain models that every benchmark variant shares, and the timer that takes their calls in turn."""
from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """One setting: ``tables`` x ``rows`` x ``dim``, ``batch`` bags of ``pooling`` ids; ``skew`` 0 is uniform, else Zipf's exponent."""

    tables: int
    rows: int
    dim: int
    pooling: int
    batch: int = 2048
    skew: float = 0.0
    batches: int = 48

    def __str__(self) -> str:
        ids = f"zipf {self.skew}" if self.skew else "uniform"
        return f"{self.tables} x {self.rows:,} x {self.dim}, pooling {self.pooling}, batch {self.batch}, {ids}"


def draw_ids(shape: Shape, seed: int = 0) -> list[Tensor]:
    """``batches`` tensors ``[tables, batch * pooling]`` int64. Zipf by inverting the continuous power law, ranks scattered over
    the table by an odd multiplier, so that hot rows are not neighbours."""
    random = np.random.default_rng(seed)
    out = []
    for _ in range(shape.batches):
        size = (shape.tables, shape.batch * shape.pooling)
        if shape.skew:
            power = 1.0 - shape.skew
            rank = ((shape.rows + 1.0) ** power - 1.0) * random.random(size) + 1.0
            ids = (np.minimum(rank ** (1.0 / power), shape.rows).astype(np.int64) - 1) * 40503 % shape.rows
        else:
            ids = random.integers(0, shape.rows, size)
        out.append(torch.from_numpy(ids))
    return out


class Bags(nn.Module):
    """What a user writes: one nn.EmbeddingBag a table, results stacked to ``[batch, tables, dim]``."""

    def __init__(self, weights: list[Tensor], sparse: bool) -> None:
        super().__init__()
        rows, dim = weights[0].shape
        self.bags = nn.ModuleList(nn.EmbeddingBag(rows, dim, mode="sum", sparse=sparse, _weight=w) for w in weights)

    def forward(self, ids: list[Tensor], offsets: Tensor) -> Tensor:
        return torch.stack([bag(i, offsets) for bag, i in zip(self.bags, ids)], dim=1)


def mlp(sizes: list[int], last_relu: bool) -> nn.Sequential:
    """Linear layers with ReLU between (and after the last, if asked)."""
    layers: list[nn.Module] = []
    for i, (inputs, outputs) in enumerate(zip(sizes, sizes[1:])):
        layers.append(nn.Linear(inputs, outputs))
        if last_relu or i < len(sizes) - 2:
            layers.append(nn.ReLU())
    return nn.Sequential(*layers)


class Dense(nn.Module):
    """The dense part of MLPerf's DLRM: 13-512-256-dim below, dot interaction, 1024-1024-512-256-1 above."""

    def __init__(self, tables: int, dim: int) -> None:
        super().__init__()
        self.bottom = mlp([13, 512, 256, dim], True)
        self.top = mlp([dim + (tables + 1) * tables // 2, 1024, 1024, 512, 256, 1], False)
        row, column = torch.tril_indices(tables + 1, tables + 1, -1)
        self.register_buffer("triangle", row * (tables + 1) + column)

    def forward(self, dense: Tensor, embedded: Tensor) -> Tensor:
        x = self.bottom(dense)
        z = torch.cat([x.unsqueeze(1), embedded], 1)
        products = torch.bmm(z, z.transpose(1, 2)).flatten(1).index_select(1, self.triangle)
        return self.top(torch.cat([x, products], 1))


class Whole(nn.Module):
    """Embedding part and dense part."""

    def __init__(self, embedding: nn.Module, dense: Dense) -> None:
        super().__init__()
        self.embedding, self.dense = embedding, dense

    def forward(self, dense: Tensor, *ids) -> Tensor:
        return self.dense(dense, self.embedding(*ids))


def interleaved(calls: dict[str, Callable[[int], object]], rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of each call, all variants taken in turn. ``call(i)`` gets a running number, so that every call sees another batch; the
    numbers start apart, so that no variant finds the rows in the cache that the one before it just read. Every round has an order of its
    own, and before each timed call there is one that is not counted: code and small tensors are then in the caches as in a loop of its own, and
    not as another variant left them, which costs a step of 1 ms up to a fifth."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    counts = {name: 7 * k for k, name in enumerate(calls)}
    order = random.Random(0)
    for i in range(warmup + rounds):
        for name in order.sample(list(calls), len(calls)):
            calls[name](counts[name])
            started = time.perf_counter()
            calls[name](counts[name] + 1)
            elapsed = time.perf_counter() - started
            counts[name] += 2
            if i >= warmup:
                times[name].append(elapsed)
    return times


def median_ms(seconds: list[float]) -> float:
    """The median in milliseconds."""
    return statistics.median(seconds) * 1e3
