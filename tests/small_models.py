"""Small plain models that tests optimize, and how a plain and an optimized one are compared."""
from __future__ import annotations

import copy
from dataclasses import fields

import torch
from tablewright.passes import DEFAULT
from torch import Tensor, nn

ROWS, DIM = 20, 4


class Dot(nn.Module):
    """Two embeddings and a bag, concatenated with a dense vector, and an MLP: a DLRM in small."""

    def __init__(self, sparse: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.user = nn.Embedding(ROWS, DIM, sparse=sparse)
        self.item = nn.Embedding(ROWS + 10, DIM, padding_idx=0, sparse=sparse)
        self.tags = nn.EmbeddingBag(ROWS, 6, mode="mean", sparse=sparse)
        self.over = nn.Sequential(nn.Linear(3 + DIM + DIM + 6, 8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 1))
        self.temperature = 2.0

    def forward(self, dense: Tensor, user: Tensor, item: Tensor, tags: Tensor) -> Tensor:
        """One logit a row."""
        x = torch.cat([dense, self.user(user), self.item(item), self.tags(tags)], dim=1)
        return self.over(x).squeeze(1) / self.temperature

    def describe(self) -> str:
        return f"a Dot with temperature {self.temperature}"


def dot_batch(rows: int = 5, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs of :class:`Dot`, with duplicate ids."""
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rows, 3, generator=g),
        torch.randint(0, ROWS, (rows,), generator=g),
        torch.randint(0, ROWS + 10, (rows,), generator=g),
        torch.randint(0, ROWS, (rows, 3), generator=g),
    )


class Tied(nn.Module):
    """One table under two names, read twice, once pooled; and a table of another dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Embedding(ROWS, DIM)
        self.document = nn.Embedding(ROWS, DIM)
        self.document.weight = self.query.weight
        self.wide = nn.Embedding(ROWS, DIM, dtype=torch.float64)

    def forward(self, query: Tensor, document: Tensor) -> Tensor:
        pooled = self.document(document).mean(1)
        return (self.query(query) * pooled).sum(-1) + self.wide(query).sum(-1)


def tied_batch(rows: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, ROWS, (rows,), generator=g), torch.randint(0, ROWS, (rows, 3), generator=g)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """Every gradient, dense; none is zeros."""
    return {
        n: torch.zeros_like(p) if p.grad is None else (p.grad.to_dense() if p.grad.is_sparse else p.grad).clone()
        for n, p in model.named_parameters()
    }


def assert_close(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert list(a) == list(b)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


def twin(model: nn.Module) -> nn.Module:
    """An independent copy with the same weights."""
    return copy.deepcopy(model)


def untimed() -> dict[str, bool]:
    """``passes`` of a plan without those that are made or left by a measurement, so that two models get the same ops."""
    return {p.name: False for p in DEFAULT if any(f.name == "measure" for f in fields(p))}
