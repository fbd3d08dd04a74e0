"""Where the gradient of a weight is wanted: in a part of a tensor that travels to other ranks, say. A product that can write it there does so, and
nobody copies it; one that cannot leaves the place unused.

An offer stands for one gradient of the backward that runs when it is made: each place is given once, and never to a backward of its own inside
that one (``torch.autograd.grad`` in a hook), whose results somebody may keep.
"""
from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

_places: dict[int, tuple[int, Tensor]] = {}  # by the weight's address: the backward that may write there, and where


def offer(weight: Tensor, place: Tensor) -> None:
    """Inside a backward: let the next product that makes the gradient of ``weight`` (contiguous) write it to ``place`` (of its shape and dtype)."""
    _places[weight.data_ptr()] = torch._C._current_graph_task_id(), place


def withdraw(weights: Iterable[Tensor]) -> None:
    """Forget what was offered for these."""
    for weight in weights:
        _places.pop(weight.data_ptr(), None)


def taken(weight: Tensor) -> Tensor | None:
    """The place for the gradient of ``weight``, which its caller must now fill; ``None``: there is none."""
    found = _places.get(weight.data_ptr()) if _places else None
    if found is None or found[0] != torch._C._current_graph_task_id():
        return None
    place = found[1]
    if place.shape != weight.shape or place.dtype != weight.dtype or not weight.is_contiguous():
        return None
    del _places[weight.data_ptr()]
    return place
