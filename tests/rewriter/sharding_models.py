"""What sharding tests train: a model with every kind of lookup, and the plain reference it must equal."""
from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class Everything(nn.Module):
    """Rows, bags with padding, ragged bags, sequences, weighted bags; one table read twice; a tiny one; several widths."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.user = nn.Embedding(23, 8, padding_idx=0, dtype=dtype)
        self.tags = nn.EmbeddingBag(17, 6, mode="mean", padding_idx=2, dtype=dtype)
        self.seq = nn.Embedding(31, 5, dtype=dtype)
        self.ragged = nn.EmbeddingBag(19, 8, mode="sum", dtype=dtype)
        self.weighted = nn.EmbeddingBag(13, 4, mode="sum", dtype=dtype)
        self.tiny = nn.Embedding(3, 4, dtype=dtype)
        self.scale = nn.Parameter(torch.tensor(0.7, dtype=dtype))
        self.over = nn.Sequential(nn.Linear(3 + 8 + 8 + 6 + 5 + 8 + 4 + 4, 7, dtype=dtype), nn.Tanh(), nn.Linear(7, 2, dtype=dtype))

    def forward(self, dense: Tensor, user: Tensor, friend: Tensor, tags: Tensor, seq: Tensor, values: Tensor, offsets: Tensor,
                chosen: Tensor, tiny: Tensor) -> Tensor:
        history = torch.tanh(self.seq(seq)).sum(1)
        weights = (self.scale * torch.sigmoid(dense[:, :1])).expand(-1, chosen.shape[1])
        rows = [
            dense, self.user(user), self.user(friend), self.tags(tags), history, self.ragged(values, offsets),
            self.weighted(chosen, per_sample_weights=weights), self.tiny(tiny),
        ]  # fmt: skip
        return self.over(torch.cat(rows, 1))


def batch_of(rows: int, seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Inputs of :class:`Everything`: few distinct ids, so that ranks share many; empty bags among the ragged ones."""
    g = torch.Generator().manual_seed(seed)

    def ids(high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=g)

    lengths = torch.randint(0, 4, (rows,), generator=g)
    values = ids(19, int(lengths.sum()))
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)[:-1]]) if rows else torch.zeros(0, dtype=torch.int64)
    return (
        torch.randn(rows, 3, generator=g, dtype=dtype), ids(9, rows), ids(23, rows), ids(17, rows, 3), ids(31, rows, 4), values, offsets,
        ids(13, rows, 2), ids(3, rows),
    )  # fmt: skip


class Alike(nn.Module):
    """Bags of several widths that share their offsets, and stand in one concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.bags = nn.ModuleList(nn.EmbeddingBag(rows, dim, mode="sum", dtype=torch.float64) for rows, dim in ((7, 8), (11, 6), (5, 8)))
        self.over = nn.Linear(3 + 8 + 6 + 8, 2, dtype=torch.float64)

    def forward(self, dense: Tensor, values: Tensor, offsets: Tensor) -> Tensor:
        return self.over(torch.cat([dense, *(bag(values[i], offsets) for i, bag in enumerate(self.bags))], 1))

    @staticmethod
    def batch(rows: int, seed: int) -> tuple[Tensor, ...]:
        """Empty bags among them; every batch has an id."""
        g = torch.Generator().manual_seed(seed)
        lengths = torch.randint(0, 3, (rows,), generator=g)
        lengths[-1:] += 1
        values = torch.stack([torch.randint(0, n, (int(lengths.sum()),), generator=g) for n in (7, 11, 5)])
        return torch.randn(rows, 3, generator=g, dtype=torch.float64), values, lengths.cumsum(0) - lengths


def loss_of(out: Tensor) -> Tensor:
    """A mean over the local batch that an empty batch has too."""
    return (out * out).sum() / max(1, out.shape[0]) + 0.1 * out.sum() / 7


TABLES = {"user": (1, 2), "tags": (3,), "seq": (4,), "ragged": (5,), "weighted": (7,), "tiny": (8,)}  # which inputs are their ids
PADDING = {"user": 0, "tags": 2}


def touched(batches: list[tuple[Tensor, ...]]) -> dict[str, Tensor]:
    """The rows of each table that any rank looks up and trains."""
    found = {}
    for name, places in TABLES.items():
        ids = torch.cat([b[i].reshape(-1) for b in batches for i in places]).unique()
        found[name] = ids[ids != PADDING.get(name, -1)]
    return found


class ReferenceUpdates:
    """SGD, AdaGrad, rowwise AdaGrad and lazy Adam on touched rows, as the formulas of kernels/embedding/updates.py say."""

    def __init__(self, kind: str, lr: float, eps: float, weight_decay: float = 0.0) -> None:
        self.kind, self.lr, self.eps, self.decay = kind, lr, eps, weight_decay
        self.state: dict[str, dict[str, Tensor]] = {}
        self.steps = 0

    @torch.no_grad()
    def step(self, model: nn.Module, rows_of: dict[str, Tensor]) -> None:
        self.steps += 1
        for name, rows in rows_of.items():
            table = model.get_parameter(f"{name}.weight")
            grad, row = table.grad[rows].double(), table[rows].double()
            shape = table.shape[:1] if self.kind == "rowwise_adagrad" else table.shape
            keys = {"sgd": (), "adagrad": ("sum",), "rowwise_adagrad": ("sum",), "adam": ("exp_avg", "exp_avg_sq")}[self.kind]
            state = self.state.setdefault(name, {key: torch.zeros(shape, dtype=torch.float64) for key in keys})
            row *= 1 - self.lr * self.decay
            if self.kind == "sgd":
                row -= self.lr * grad
            elif self.kind == "adam":
                state["exp_avg"][rows] = 0.9 * state["exp_avg"][rows] + 0.1 * grad
                state["exp_avg_sq"][rows] = 0.999 * state["exp_avg_sq"][rows] + 0.001 * grad**2
                rate = self.lr * math.sqrt(1 - 0.999**self.steps) / (1 - 0.9**self.steps)
                row -= rate * state["exp_avg"][rows] / (state["exp_avg_sq"][rows].sqrt() + self.eps)
            else:
                square = grad**2 if self.kind == "adagrad" else (grad**2).mean(1)
                state["sum"][rows] += square
                root = state["sum"][rows].sqrt() + self.eps
                row -= self.lr * grad / (root if self.kind == "adagrad" else root[:, None])
            table[rows] = row.to(table.dtype)
