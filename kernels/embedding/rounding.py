"""Stochastic rounding of table rows to float16 or bfloat16: the noise is a function of (row, column, seed) alone.

An update that is smaller than half a step of a low-precision table would be lost every time if it were rounded to nearest. Here a value
between two neighbours becomes the upper one with the probability of its distance from the lower one, so the mean is right. The random bits
come from a counter-based hash, so results do not depend on threads, launches or the order of rows, and every form gives the same bits::

    row_hash = mix(lo32(row) * 0x85EBCA77 + hi32(row) * 0xC2B2AE3D + seed)        (all in 32 bits, wrapping)
    hash     = mix(row_hash ^ (column * 0x9E3779B1))
    mix(h):  h ^= h >> 16;  h *= 0x7FEB352D;  h ^= h >> 15;  h *= 0x846CA68B;  h ^= h >> 16

bfloat16: the upper 16 bits of ``bits(x) + (hash >> 16)``. float16: where ``|x| >= 2^-14``, ``bits(|x|) + (hash >> 19)`` without its lower 13
bits; below, ``floor(|x| * 2^24 + (hash >> 8) * 2^-24)`` steps of ``2^-24``, where ``|x| * 2^48`` is cut to a whole number first. Finite
values stay finite (the largest is not passed); NaN and infinity stay. Values that the dtype holds stay exactly.

``mix`` is Chris Wellons' "lowbias32" (hash-prospector), in the public domain.
"""
from __future__ import annotations

import zlib

import torch
from torch import Tensor

from ..codecs import cpu

_MASK = 0xFFFFFFFF
LOW = (torch.float16, torch.bfloat16)


def seed_of(table: str, step: int) -> int:
    """The seed of a table's step, which counts from 1. Tables do not share their noise."""
    return (zlib.crc32(table.encode()) + step * 0x9E3779B1) & _MASK


def _mix(h: Tensor) -> Tensor:
    """On int64 that hold 32 bits."""
    h = h ^ (h >> 16)
    h = _times(h, 0x7FEB352D)
    h = h ^ (h >> 15)
    h = _times(h, 0x846CA68B)
    return h ^ (h >> 16)


def _times(h: Tensor, factor: int) -> Tensor:
    """The product's lower 32 bits, without passing 63."""
    return (h * (factor & 0xFFFF) + ((h * (factor >> 16) & 0xFFFF) << 16)) & _MASK


def row_hashes(rows: Tensor, seed: int) -> Tensor:
    """int64 ``[n]`` row numbers -> int64 ``[n]`` that hold 32 bits."""
    low, high = rows & _MASK, rows >> 32
    return _mix((_times(low, 0x85EBCA77) + _times(high, 0xC2B2AE3D) + seed) & _MASK)


def reference(values: Tensor, rows: Tensor, seed: int, dtype: torch.dtype) -> Tensor:
    """float32 ``[n, dim]``, rows of a table ``[n]`` -> ``dtype`` ``[n, dim]``, in plain PyTorch."""
    columns = torch.arange(values.shape[1], device=values.device)
    hashes = _mix(row_hashes(rows, seed)[:, None] ^ _times(columns, 0x9E3779B1))
    bits = values.contiguous().view(torch.int32).to(torch.int64) & _MASK
    sign, size = bits & 0x80000000, bits & 0x7FFFFFFF
    if dtype == torch.bfloat16:
        code = (size + (hashes >> 16)).clamp(max=0x7F7FFFFF) >> 16
        finite = code | (sign >> 16)
    else:
        normal = ((size + (hashes >> 19)) >> 13) - (112 << 10)
        scaled = (values.abs().double() * 2.0**48).clamp(max=2.0**40).to(torch.int64)
        code = torch.where(size < 0x38800000, (scaled + (hashes >> 8)) >> 24, normal).clamp(max=0x7BFF)
        finite = code | (sign >> 16)
    made = torch.where(finite >= 0x8000, finite - 0x10000, finite).to(torch.int16).view(dtype)
    return torch.where(values.isfinite(), made, values.to(dtype))


def write(table: Tensor, rows: Tensor, values: Tensor, seed: int) -> None:
    """``table[rows] = values`` rounded stochastically: ``table`` ``[*, dim]`` float16 or bfloat16, ``rows`` distinct int64 ``[n]``, ``values``
    float32 ``[n, dim]``."""
    hashes = row_hashes(rows, seed)
    if not cpu.write_rounded(table, rows, values, torch.where(hashes >= 2**31, hashes - 2**32, hashes).to(torch.int32)):
        table.index_copy_(0, rows, reference(values, rows, seed, table.dtype))
