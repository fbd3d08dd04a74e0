"""Calls of ``tablewright::embedding_max`` that every form of the kernel is tested on, and what they are compared with."""
from __future__ import annotations

import torch
from tablewright.kernels.max_pool.op import reference
from torch import Tensor

ROWS, DIM, BAGS, LENGTH = 12, 5, 7, 6


def tables(dtype=torch.float64, device="cpu") -> Tensor:
    """[ROWS, DIM]; rows 3 and 4 are equal, so are some columns of others: several values are the largest."""
    torch.manual_seed(0)
    table = torch.randn(ROWS, DIM, device=device).to(dtype)
    table[4] = table[3]
    table[:, 2] = (table[:, 2] * 2).round()
    return table


def cases() -> list[tuple]:
    """Arguments after the table: ids, offsets, mask, kind, fill, mode, padding_idx, include_last_offset."""
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(0, ROWS, (BAGS, LENGTH), generator=g)
    ids[0], ids[1, :3] = ROWS - 1, 3  # the largest id, all of a bag; duplicates
    keep = torch.rand(BAGS, LENGTH, generator=g) < 0.6
    keep[2] = False  # nothing is kept
    shift = (keep.float() - 1) * 1e9
    scale = torch.randn(BAGS, LENGTH, generator=g)
    scale[3] = 0
    found: list[tuple] = []
    for mode in ("max", "amax"):
        for padding in (-1, 3):
            found.append((ids, None, None, "none", 0.0, mode, padding, False))
            found += [(ids, None, keep, "keep", fill, mode, padding, False) for fill in (-torch.inf, -1e9, 0.0)]
            found += [(ids, None, shift, "add", 0.0, mode, padding, False), (ids, None, scale, "multiply", 0.0, mode, padding, False)]
        found += [(ids[:1], None, None, "none", 0.0, mode, -1, False), (ids[:0], None, None, "none", 0.0, mode, -1, False)]
        found.append((ids.int(), None, None, "none", 0.0, mode, -1, False))
    offsets = torch.tensor([0, 0, 5, 6, 6, 20, 42])
    found += [(ids, None, None, "none", 0.0, "bag", padding, False) for padding in (-1, 3, ROWS - 1)]
    for padding in (-1, ROWS - 1):
        found.append((ids.flatten(), offsets, None, "none", 0.0, "bag", padding, False))
        found.append((ids.flatten(), torch.cat([offsets, offsets[-1:]]), None, "none", 0.0, "bag", padding, True))
    found += [(ids[:0].flatten(), offsets[:2] * 0, None, "none", 0.0, "bag", -1, False)]  # no ids at all
    return found


def expected(table: Tensor, given: tuple, seed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(maxima, gradient of the table) in float64."""
    wide = table.double().requires_grad_()
    ids, offsets, mask, *rest = given
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(table.dtype).double()
    out = reference(wide, ids, offsets, mask, *rest)
    return out.detach(), torch.autograd.grad(out, wide, seeds(out) if seed is None else seed)[0]


def seeds(out: Tensor) -> Tensor:
    """The gradient that is put in."""
    return torch.linspace(-1, 2, out.numel(), dtype=out.dtype, device=out.device).view(out.shape)
