"""The one feature schema of all zoos, and the small tools that the model builders share. Nothing here is third-party code.

Eight single-valued categorical features, two id sequences (one pooled by mean, one by sum; id 0 pads), three dense features; for
sequence models a history of items, padded with 0. A builder is called as ``build(rows=50, sizes=(6, 9))``: rows of each table, and
the sizes of the batches that it makes.
"""
from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

FIELDS, DENSE, BAG, HISTORY, DIM = 8, 3, 6, 20, 16
ROWS, SIZES = 50, (6, 9)

Builder = Callable[..., tuple[nn.Module, list]]


def ids(size: int, rows: int, seed: int = 0, low: int = 1) -> Tensor:
    """[size] int64 in [low, rows), some of them equal."""
    return torch.randint(low, rows, (size,), generator=torch.Generator().manual_seed(seed))


def padded(size: int, length: int, rows: int, seed: int = 0, left: bool = False) -> Tensor:
    """[size, length] int64 ids in [1, rows), padded with 0 at the right (or left) after at least one."""
    g = torch.Generator().manual_seed(seed)
    values = torch.randint(1, rows, (size, length), generator=g)
    lengths = torch.randint(1, length + 1, (size, 1), generator=g)
    lengths[0] = length  # one full sequence: nothing may depend on the longest
    mask = torch.arange(length) < lengths
    return values * (mask.flip(1) if left else mask)


def lengths_of(sequences: Tensor) -> Tensor:
    """[size] int64: how many ids are not padding."""
    return (sequences != 0).sum(1)


def dense(size: int, seed: int = 0) -> Tensor:
    """[size, DENSE] float32 in [0, 1)."""
    return torch.rand(size, DENSE, generator=torch.Generator().manual_seed(100 + seed))


def labels(size: int, seed: int = 0) -> Tensor:
    """[size] float32, 0 or 1."""
    return torch.randint(0, 2, (size,), generator=torch.Generator().manual_seed(200 + seed)).float()


def prepared(model: nn.Module) -> nn.Module:
    """``model`` with tables and weights that some authors initialize near 0 (where every interaction vanishes) made visible: tables
    N(0, 0.3), padding rows kept 0; an all-zero matrix N(0, 0.1). In place; the same for every run."""
    g = torch.Generator().manual_seed(7)
    with torch.no_grad():
        tables = {id(m.weight): m for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))}
        for table in tables.values():
            table.weight.copy_(torch.randn(table.weight.shape, generator=g) * 0.3)
            if table.padding_idx is not None:
                table.weight[table.padding_idx].zero_()
        for weight in model.parameters():
            dense = id(weight) not in tables and weight.dim() > 1 and weight.is_floating_point() and weight.numel()
            if dense and weight.abs().max() < 0.02:
                weight.copy_(torch.randn(weight.shape, generator=g) * 0.1)
    return model


def zoo(make: Callable[[str, int], nn.Module], names: Sequence[str], inputs: Callable[[str, int, int, int], Any]) -> dict[str, Builder]:
    """A builder for each name: ``make(name, rows)`` gives the model, ``inputs(name, rows, size, seed)`` one batch."""

    def builder(name: str) -> Builder:
        def build(rows: int = ROWS, sizes: Sequence[int] = SIZES) -> tuple[nn.Module, list]:
            torch.manual_seed(0)
            model = prepared(make(name, rows))
            return model, [inputs(name, rows, size, seed) for seed, size in enumerate(sizes)]

        return build

    return {name: builder(name) for name in names}


class _StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports of packages that a zoo's ``__init__`` wants and its models do not use."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = set(names)

    def find_spec(self, fullname, path=None, target=None):
        if fullname.split(".")[0] in self.names:
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__getattr__ = lambda name: _stand_in(name)  # type: ignore[method-assign]
        return module

    def exec_module(self, module) -> None:
        pass


class _Anything(type):
    def __getattr__(cls, name: str) -> Any:
        return _stand_in(name)


def _stand_in(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return _Anything(name, (), {"__init__": lambda self, *a, **k: None, "__getattr__": lambda self, n: _stand_in(n)})


def stand_in_for(*names: str) -> None:
    """Let ``import name`` succeed where the package is not installed. Its contents are empty classes
    that take any argument."""
    missing = [n for n in names if importlib.machinery.PathFinder.find_spec(n) is None]
    sys.meta_path.append(_StandIns(missing))
