"""The maximum over the rows of a bag in plain PyTorch: what the kernels are compared with, and what runs where there is none.

A position's value is its table row, changed by ``mask`` as :class:`How` says. Bags are the rows of ``ids`` ``[bags, length]``, or
``ids[starts[b] : starts[b + 1]]``. The tensor of all values, ``[bags, longest, dim]``, exists here.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

KINDS = ("none", "keep", "add", "multiply")
MODES = ("max", "amax", "bag")


@dataclass(frozen=True)
class How:
    """``kind``: positions where the bool ``mask`` is false have the value ``fill`` ("keep"); ``mask`` is added to the row ("add") or
    multiplied by it ("multiply").

    ``mode``: "max" is ``tensor.max(dim)`` (the first of equal values takes the gradient, NaN is largest), "amax" is ``tensor.amax``
    (equal values share the gradient), "bag" is ``nn.EmbeddingBag`` (the first takes it; ``padding_idx`` is left out; empty bags are 0;
    NaN counts only in a bag's first row). ``padding_idx`` (-1: none) never gets a gradient. ``grad``: "dense", "sparse" (coalesced,
    all rows that were read), "none"."""

    kind: str = "none"
    mode: str = "max"
    fill: float = 0.0
    padding_idx: int = -1
    grad: str = "dense"


def matrix(ids: Tensor, starts: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """(positions ``[bags, longest]`` in the flat ids, which of them are in the bag; None: all)."""
    if starts is None:
        return torch.arange(ids.numel(), device=ids.device).view(ids.shape), None
    lengths = starts.diff()
    places = torch.arange(int(lengths.max()) if lengths.numel() else 0, device=ids.device)
    held = places < lengths[:, None]
    return torch.where(held, starts[:-1, None] + places, 0), held


def values(weight: Tensor, ids: Tensor, mask: Tensor | None, places: Tensor, how: How) -> Tensor:
    """``[bags, longest, dim]``."""
    rows = weight.index_select(0, ids.reshape(-1)[places].flatten()).view(*places.shape, weight.shape[1])  # which refuses negative ids
    if mask is None:
        return rows
    by_place = mask.reshape(-1)[places].unsqueeze(-1)
    if how.kind == "keep":
        return torch.where(by_place, rows, torch.full((), how.fill, dtype=rows.dtype, device=rows.device))
    return rows + by_place if how.kind == "add" else rows * by_place


def forward(weight: Tensor, ids: Tensor, starts: Tensor | None, mask: Tensor | None, how: How) -> tuple[Tensor, Tensor]:
    """The maxima ``[bags, dim]``, and int64 of their shape: for "amax" how many values are equal to each, else the position
    in the bag that takes its gradient, -1 for none."""
    places, held = matrix(ids, starts)
    if not ids.numel() and how.mode == "bag":
        return weight.new_zeros(len(places), weight.shape[1]), ids.new_full((len(places), weight.shape[1]), -1)
    made = values(weight, ids, mask, places, how)
    if how.mode == "amax":
        best = made.amax(1)
        return best, (made == best.unsqueeze(1)).sum(1)
    if how.mode == "max":
        best, chosen = made.max(1)
        if how.kind == "keep":
            assert mask is not None
            chosen = torch.where(mask.reshape(-1)[places].gather(1, chosen), chosen, -1)
        return best, chosen
    counts = ids.reshape(-1)[places] != how.padding_idx
    counts = counts if held is None else counts & held
    is_first = counts & (counts.cumsum(1) == 1)
    seen = counts.unsqueeze(-1) & (is_first.unsqueeze(-1) | ~made.isnan())
    made = torch.where(seen, made, -torch.inf)
    best = made.amax(1)
    equal = seen & ((made == best.unsqueeze(1)) | made.isnan())
    return torch.where(equal.any(1), best, 0), torch.where(equal.any(1), equal.int().argmax(1), -1)


def slots(weight: Tensor, ids: Tensor, how: How) -> tuple[Tensor | None, Tensor]:
    """(the rows of a sparse gradient in order, None for a dense one; for each flat position its row there, -1 for padding)."""
    flat = ids.reshape(-1).long()
    if how.grad == "dense":
        return None, torch.where(flat == how.padding_idx, -1, flat)
    rows, number = flat.unique(return_inverse=True)
    is_padding = rows == how.padding_idx
    number = number - (rows > how.padding_idx)[number].long() * is_padding.any()
    return rows[~is_padding], torch.where(flat == how.padding_idx, -1, number)


def backward(
    grad: Tensor, weight: Tensor, ids: Tensor, starts: Tensor | None, mask: Tensor | None, out: Tensor, chosen: Tensor, how: How,
    rows: Tensor | None, numbers: Tensor,
) -> Tensor:  # fmt: skip
    """The values of the gradient, ``[rows, dim]``; ``rows`` and ``numbers`` as :func:`slots` gives them."""
    count = weight.shape[0] if rows is None else len(rows)
    made = grad.new_zeros(count + 1, weight.shape[1])  # the last takes what has no row
    if how.mode == "amax":
        places, _ = matrix(ids, starts)
        equal = values(weight, ids, mask, places, how) == out.unsqueeze(1)
        each = grad.unsqueeze(1) * equal / chosen.unsqueeze(1)
        if how.kind in ("keep", "multiply"):
            assert mask is not None
            factor = mask.reshape(-1)[places].unsqueeze(-1)
            each = each * factor if how.kind == "multiply" else torch.where(factor, each, 0)
        made.index_add_(0, numbers.remainder(count + 1), each.flatten(0, 1))
        return made[:count]
    begins = torch.arange(len(out), device=ids.device) * ids.shape[-1] if starts is None else starts[:-1]
    places = begins[:, None] + chosen
    if numbers.numel():
        places = torch.where(chosen < 0, 0, places)
        into = torch.where(chosen < 0, -1, numbers[places]).remainder(count + 1)
        if how.kind == "multiply":
            assert mask is not None
            grad = grad * mask.reshape(-1)[places]
        columns = torch.arange(weight.shape[1], device=ids.device)
        made.view(-1).scatter_add_(0, (into * weight.shape[1] + columns).flatten(), grad.flatten())
    return made[:count]
