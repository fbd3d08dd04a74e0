"""Which pairs of features an interaction takes, and in which order: two equally long lists of feature numbers."""
from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_NAMES = {"lower": (True, False), "lower+diagonal": (True, True), "upper": (False, False), "upper+diagonal": (False, True)}


@dataclass(frozen=True)
class Pairs:
    """Pair ``p`` is ``(first[p], second[p])``; numbers count from 0, the order is that of the output, pairs may repeat."""

    first: tuple[int, ...]
    second: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.first) != len(self.second) or min((*self.first, *self.second), default=0) < 0:
            raise ValueError("pairs are two equally long lists of feature numbers from 0")

    def __len__(self) -> int:
        return len(self.first)

    @property
    def least_features(self) -> int:
        """How many features there must be."""
        return 1 + max((*self.first, *self.second), default=-1)

    @property
    def distinct(self) -> bool:
        """True if no pair is there twice, in either order."""
        return len({frozenset(p) for p in zip(self.first, self.second)}) == len(self)

    def encode(self) -> str:
        """As a short text: a row-major triangle by its name (``"27 lower"``), anything else pair by pair (``"0-1,0-2"``)."""
        n = self.least_features
        for name in _NAMES:
            if len(self) and self == _triangle(n, name):
                return f"{n} {name}"
        return ",".join(f"{i}-{j}" for i, j in zip(self.first, self.second))


@functools.cache
def _triangle(features: int, name: str) -> Pairs:
    lower, diagonal = _NAMES[name]
    offset = (0 if diagonal else 1) * (-1 if lower else 1)
    make = torch.tril_indices if lower else torch.triu_indices
    first, second = make(features, features, offset).tolist()
    return Pairs(tuple(first), tuple(second))


@functools.cache
def decode(text: str) -> Pairs:
    """The inverse of :meth:`Pairs.encode`. Raises ValueError for any other text."""
    features, _, name = text.partition(" ")
    if name in _NAMES:
        return _triangle(int(features), name)
    both = [p.split("-") for p in text.split(",")] if text else []
    if any(len(p) != 2 for p in both):
        raise ValueError(f"{text!r} is no list of pairs")
    return Pairs(tuple(int(i) for i, _ in both), tuple(int(j) for _, j in both))


@functools.cache
def index_tensors(text: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """``first`` and ``second`` as int32 ``[pairs]`` on ``device``; nobody may change them."""
    pairs = decode(text)
    first, second = (torch.tensor(n, dtype=torch.int32, device=device) for n in (pairs.first, pairs.second))
    return first, second


def check(pairs: Pairs, features: int) -> None:
    """Raise IndexError if a pair names a feature that is not there."""
    if pairs.least_features > features:
        raise IndexError(f"the interaction reads feature {pairs.least_features - 1}; its input has {features}")


def from_tensors(first: Sequence[int], second: Sequence[int]) -> Pairs:
    """Pairs from any two sequences of numbers."""
    return Pairs(tuple(int(i) for i in first), tuple(int(j) for j in second))
