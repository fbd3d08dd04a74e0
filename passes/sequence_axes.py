"""Ids of any rank as the matrix ``[bags, positions]`` that a bag takes, and what comes of the bags with the axes that the model gave it."""

from __future__ import annotations

from typing import Any

from .graph import aten
from .lazy import Lazy
from .position_weights import NONE, Ids


def as_matrix(value: Any, kept: list[int], over: tuple[int, ...]) -> Any:
    """``[*kept, *over]`` as two axes."""
    order = [*kept, *over]
    if order != sorted(order):
        value = Lazy(aten.permute.default, (value, order))
    if len(over) > 1:
        value = Lazy(aten.flatten.using_ints, (value, len(kept), -1))
    return Lazy(aten.flatten.using_ints, (value, 0, len(kept) - 1)) if len(kept) > 1 else value


def size_of(ids: Ids, axis: int) -> Any:
    """The size of an axis of the ids: never the sample's number, for a graph that was traced serves batches and sequences of any size."""
    return Lazy(aten.sym_size.int, (ids.node, axis))


def arranged(value: Any, kept: list[int], axes: tuple[int, ...], ids: Ids) -> Any:
    """``value``, ``[bags, D]`` for the axes ``kept`` of the ids, as a value with ``axes``."""
    if len(kept) > 1:
        value = Lazy(aten.unflatten.int, (value, 0, [size_of(ids, axis) for axis in kept]))
    held = [*kept, ids.rank]
    if ids.rank not in axes:
        value, held = Lazy(aten.squeeze.dim, (value, -1)), kept
    order = [held.index(label) for label in axes if label != NONE]
    if order != sorted(order):
        value = Lazy(aten.permute.default, (value, order))
    for at, label in enumerate(axes):
        if label == NONE:
            value = Lazy(aten.unsqueeze.default, (value, at))
    return value
