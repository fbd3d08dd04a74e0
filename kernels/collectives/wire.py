"""In which form rows travel: as they are, or encoded stream by stream (``kernels/codecs``).

A flat tensor of numbers (see ``exchange_rows.py`` for its order) becomes a flat tensor of wire elements: the same tensor where no
stream of that direction has a codec; else bytes.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..codecs.op import decode, encode, row_bytes
from .spec import ExchangeSpec

AS_IS = "fp32"  # the plan's word for no codec; tables of other dtypes then travel in theirs


@dataclass(frozen=True)
class WireSizes:
    """``codecs`` and ``elements`` (wire elements of one bag) of each stream; ``plain``: no stream has a codec."""

    codecs: tuple[str, ...]
    elements: tuple[int, ...]
    plain: bool

    def size(self, stream: int, bags: int) -> int:
        """Wire elements of ``bags`` bags."""
        return bags * self.elements[stream]


def wire_sizes(spec: ExchangeSpec, direction: str) -> WireSizes:
    """``direction``: "forward" for rows, "backward" for their gradients (of frozen tables none travel). Kept with the spec."""
    kept = spec.__dict__.setdefault("_wire", {})
    if direction not in kept:
        kept[direction] = _wire_sizes(spec, direction == "forward")
    return kept[direction]


def _wire_sizes(spec: ExchangeSpec, forward: bool) -> WireSizes:
    codecs = [(s.forward, True) if forward else (s.backward, s.trained) for s in spec.streams]
    plain = all(codec == AS_IS for codec, _ in codecs)
    elements = []
    for (codec, sent), stream in zip(codecs, spec.streams):
        width = stream.shard.columns
        each = width if plain else width * spec.torch_dtype.itemsize if codec == AS_IS else row_bytes(codec, width)
        elements.append(each if sent else 0)
    return WireSizes(tuple(c for c, _ in codecs), tuple(elements), plain)


def encoded(flat: Tensor, spec: ExchangeSpec, parts: list[list[tuple[int, int]]], sizes: WireSizes) -> Tensor:
    """The wire elements of ``flat``. Streams of which nothing is sent are left out."""
    if sizes.plain and all(sizes.elements):
        return flat
    pieces, at = [], 0
    for k, bags in (part for rank in parts for part in rank):
        columns = spec.streams[k].shard.columns
        rows = flat[at : at + bags * columns].view(bags, columns)
        at += bags * columns
        if sizes.elements[k] and bags:
            if sizes.plain:
                pieces.append(rows.reshape(-1))
            else:
                codec = sizes.codecs[k]
                pieces.append((rows.contiguous().view(torch.uint8) if codec == AS_IS else encode(rows, codec)).reshape(-1))
    return torch.cat(pieces) if pieces else flat.new_empty(0, dtype=flat.dtype if sizes.plain else torch.uint8)


def decoded(wire: Tensor, spec: ExchangeSpec, parts: list[list[tuple[int, int]]], sizes: WireSizes) -> Tensor:
    """The numbers; zeros for streams of which nothing was sent."""
    if sizes.plain and all(sizes.elements):
        return wire
    dtype = spec.torch_dtype
    pieces, at = [], 0
    for k, bags in (part for rank in parts for part in rank):
        columns, size = spec.streams[k].shard.columns, sizes.size(k, bags)
        piece = wire[at : at + size]
        at += size
        if not bags:
            continue
        if not size:
            pieces.append(torch.zeros(bags * columns, dtype=dtype, device=wire.device))
        elif sizes.plain:
            pieces.append(piece)
        elif sizes.codecs[k] == AS_IS:
            pieces.append((piece.clone() if piece.storage_offset() % dtype.itemsize else piece).view(dtype))
        else:
            pieces.append(decode(piece.view(bags, -1), sizes.codecs[k], columns, dtype).reshape(-1))
    return torch.cat(pieces) if pieces else wire.new_empty(0, dtype=dtype)
