"""What ``random_models.py`` makes: a model as text, and the tensors its batches are made of."""
from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Input:
    """One tensor argument. ``ids``: ``[B, *shape]`` in ``[low, high)``; ``jagged``: values beside ``<name>_offsets`` (and
    ``<name>_weights``); ``dense``: ``[B, *shape]`` floats."""

    name: str
    kind: str
    shape: tuple[int, ...] = ()
    low: int = 0
    high: int = 1
    dtype: torch.dtype = torch.int64
    include_last: bool = False
    weighted: bool = False

    def names(self) -> list[str]:
        """The leaves this input brings."""
        if self.kind != "jagged":
            return [self.name]
        return [self.name, f"{self.name}_offsets", *([f"{self.name}_weights"] if self.weighted else [])]

    def make(self, size: int, rng: random.Random, dtype: torch.dtype) -> dict[str, Tensor]:
        """Its tensors for a batch of ``size``, drawn from torch's generator; ``rng`` chooses lengths."""
        if self.kind == "dense":
            return {self.name: torch.randn(size, *self.shape, dtype=torch.float64).to(dtype)}
        if self.kind == "ids":
            return {self.name: torch.randint(self.low, self.high, (size, *self.shape), dtype=self.dtype)}
        lengths = [rng.choice((0, 1, 1, 2, 5)) for _ in range(size)]
        bounds = torch.tensor([0, *lengths]).cumsum(0)
        count = int(bounds[-1])
        made = {self.name: torch.randint(self.low, self.high, (count,), dtype=self.dtype)}
        made[f"{self.name}_offsets"] = (bounds if self.include_last else bounds[:-1]).to(self.dtype)
        if self.weighted:
            made[f"{self.name}_weights"] = torch.randn(count, dtype=torch.float64).to(dtype)
        return made


@dataclass(frozen=True)
class Read:
    """One lookup: ``table`` is the first name of its tensor; with ``padding`` (not negative) left out of what it trains."""

    table: str
    ids: str
    padding: int | None
    kind: str  # "rows", "bags" or "other" (a form that is never fused)


@dataclass
class Program:
    """A model as text, and what its batches look like."""

    source: str
    inputs: list[Input]
    call: str  # how the inputs travel: positional, keyword, list, tuple, dict
    dtype: str
    reads: list[Read] = field(default_factory=list)
    tables: dict[str, int] = field(default_factory=dict)  # trainable tables -> rows
    read_otherwise: set[str] = field(default_factory=set)  # tables that something else than a lookup reads too
    sparse: set[str] = field(default_factory=set)  # tables all of whose lookups say sparse=True

    def build(self, seed: int) -> nn.Module:
        """The model, with weights from ``seed``."""
        namespace = {"torch": torch, "nn": nn, "F": F, "__name__": "random_model"}
        exec(compile(self.source, "random_model.py", "exec"), namespace)
        torch.manual_seed(seed)
        return namespace["Model"]().to(DTYPES[self.dtype])

    def batch(self, size: int, rng: random.Random) -> tuple[tuple, dict]:
        """Arguments of one call; the seed of torch's generator is drawn from ``rng``."""
        torch.manual_seed(rng.randrange(1 << 30))
        leaves: dict[str, Tensor] = {}
        for each in self.inputs:
            leaves.update(each.make(size, rng, DTYPES[self.dtype]))
        if self.call == "positional":
            return tuple(leaves.values()), {}
        if self.call == "keyword":
            return (), leaves
        kinds = {"list": list, "tuple": tuple}
        return (leaves if self.call == "dict" else kinds[self.call](leaves.values()),), {}

    def leaves(self, args: tuple, kwargs: dict) -> dict[str, Tensor]:
        """The tensors of one call by their names."""
        names = [n for each in self.inputs for n in each.names()]
        if kwargs:
            return kwargs
        given = args if self.call == "positional" else args[0].values() if self.call == "dict" else args[0]
        return dict(zip(names, given))
