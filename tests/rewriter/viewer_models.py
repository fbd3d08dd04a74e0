"""Models for the viewer's tests: small, wide, long, and one whose names try to break the page."""
from __future__ import annotations

import tablewright as tw
import torch
from torch import nn

HOSTILE = "</script><img src=x onerror=alert(1)>'\"&amp;"


class Dlrm(nn.Module):
    def __init__(self, tables=4, dim=8):
        super().__init__()
        self.embs = nn.ModuleList(nn.EmbeddingBag(100 + i, dim, mode="sum") for i in range(tables))
        self.bottom = nn.Sequential(nn.Linear(13, 32), nn.ReLU(), nn.Linear(32, dim), nn.ReLU())
        features = tables + 1
        self.top = nn.Sequential(nn.Linear(dim + features * tables // 2, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 1))
        self.register_buffer("pairs", torch.tril_indices(features, features, -1), persistent=False)

    def forward(self, dense, ids):
        x = self.bottom(dense)
        z = torch.stack([x] + [table(ids[:, i : i + 1]) for i, table in enumerate(self.embs)], 1)
        products = torch.bmm(z, z.transpose(1, 2))
        return self.top(torch.cat([x, products[:, self.pairs[0], self.pairs[1]]], 1)).squeeze(1)


class Wide(nn.Module):
    """Tables of two widths, in one concatenation."""

    def __init__(self, tables=1000):
        super().__init__()
        self.embs = nn.ModuleList(nn.EmbeddingBag(10, 8 if i % 3 else 16, mode="sum") for i in range(tables))
        self.top = nn.Linear(sum(e.embedding_dim for e in self.embs), 1)

    def forward(self, ids):
        return self.top(torch.cat([table(ids[:, i : i + 1]) for i, table in enumerate(self.embs)], 1))


class Long(nn.Module):
    """Blocks in a list with other work between them."""

    def __init__(self, blocks=300, between=9):
        super().__init__()
        self.table, self.between = nn.Embedding(100, 8), between
        self.blocks = nn.ModuleList(nn.ModuleDict({"a": nn.Linear(8, 8), "norm": nn.LayerNorm(8)}) for _ in range(blocks))

    def forward(self, ids):
        x = self.table(ids)
        for block in self.blocks:
            x = x + block["norm"](torch.relu(block["a"](x)))
            for _ in range(self.between):
                x = torch.tanh(x * 0.5)
        return x


class Hostile(nn.Module):
    """Names that hold markup, quotes, a right-to-left override and 10,000 characters."""

    def __init__(self):
        super().__init__()
        names = [HOSTILE.replace(".", ""), "x\u202egnp.exe".replace(".", ""), "n" * 10_000, "with \"quotes' and\nlines"]
        self.tables = nn.ModuleDict({name: nn.EmbeddingBag(10, 4, mode="sum") for name in names})

    def forward(self, ids):  # </script><script>alert(1)</script> in the user's own source
        return torch.cat([table(ids) for table in self.tables.values()], 1)


def optimized(model: nn.Module, *inputs, **options):
    return tw.optimize(model, sample_inputs=inputs, **options)


def dlrm(tables=4, dim=8, rows=16):
    torch.manual_seed(0)
    return optimized(Dlrm(tables, dim), torch.randn(rows, 13), torch.randint(0, 100, (rows, tables)))
