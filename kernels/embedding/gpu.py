"""Table-batched lookups on a GPU: the launches of the Triton kernels, with the signatures and meanings of ``reference.py``.

One forward is one launch. One backward or update is: keys of all reads (one launch), a stable sort, the pieces of equal keys
(two launches and a small cumulative sum), then sums and optimizer fused (two launches). Sums run in float32 in an order fixed
by the ids alone and nothing is added atomically, so equal inputs give equal bits.

Nothing here waits for the GPU, with one exception: ``sparse_gradients`` must know how many distinct rows there are. Ids are
checked by the kernel: see ``id_status.py``. Tables of another dtype than float32, float16 and bfloat16, or wider than
``MAX_DIM``, go to ``reference.py``, which waits.

Pointers are read from the tensors at every call and never kept.
"""
from __future__ import annotations

import functools
import math
from array import array
from collections.abc import Sequence
from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference
from .id_status import IdStatus, check_ids
from .reference import OptionalTensors, leading_shape
from .spec import GroupSpec
from .triton_common import MAX_DIM, LookupEntry, tile_rows
from .triton_forward import forward_kernel
from .updates import TableUpdate

TYPES = {
    torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.int32: tl.int32, torch.int64: tl.int64,
}  # fmt: skip
UNROLL = 2  # ids read per step and bag: with 16 loads in flight per thread for each


def _or_reference(function):
    """Hand calls that the kernels do not take (float64 tables, very wide rows) to the function's namesake in reference.py."""
    plain = getattr(reference, function.__name__)

    @functools.wraps(function)
    def call(first, *rest):
        tables = first if function.__name__ == "update_from_sparse" else rest[0 if function.__name__ == "forward" else 1]
        fits = all(t.dtype in TYPES and t.dim() == 2 and t.shape[1] <= MAX_DIM for t in tables)
        return (function if fits else plain)(first, *rest)

    return call


def _on(device: torch.device):
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def send(entries: Sequence[tuple[int, ...]], device: torch.device) -> Tensor:
    """The entries on the device, int64 [n, fields], in one copy that nobody waits for."""
    host = torch.frombuffer(array("q", [v for e in entries for v in e]), dtype=torch.int64).view(len(entries), -1)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def alignment(itemsize: int, *element_counts: int, addresses: Sequence[int] = ()) -> int:
    """How many elements one load may take, up to 16 bytes, if rows begin at these addresses plus these multiples."""
    return max(1, math.gcd(16, *addresses, *(n * itemsize for n in element_counts)) // itemsize)


def one_type(tensors: OptionalTensors, used: Sequence[bool], widest: torch.dtype) -> tuple[list[Tensor | None], torch.dtype]:
    """The used tensors, contiguous and of one dtype: their own where they agree, else ``widest``."""
    types = {t.dtype for t, u in zip(tensors, used) if u and t is not None}
    dtype = types.pop() if len(types) == 1 else widest
    if dtype not in TYPES:
        dtype = widest
    return [t.detach().to(dtype).contiguous() if u and t is not None else None for t, u in zip(tensors, used)], dtype


class Lookups:
    """The reads of some lookups, ready to be described: ids, offsets and weights contiguous, each kind in one dtype."""

    def __init__(self, spec, tables, indices, offsets, sample_weights, used: Sequence[bool]) -> None:
        self.spec, self.tables = spec, tables
        self.ids, ids = one_type(indices, used, torch.int64)
        self.offsets, offs = one_type(offsets, used, torch.int64)
        self.weights, weights = one_type(sample_weights, used, torch.float32)
        self.types = {"ID_T": TYPES[ids], "OFFSET_T": TYPES[offs]}
        self.weight_type = TYPES[weights] if any(w is not None for w in self.weights) else None

    def entry(self, i: int, program: int, kind: int, out: int, out_stride: int, train: bool, **more: int) -> LookupEntry:
        """The entry of lookup ``i``. ``train``: padding_idx counts for pooling "none" too (it stops the gradient)."""
        lookup = self.spec.lookups[i]
        table, ids, offs, weights = self.tables[lookup.table], self.ids[i], self.offsets[i], self.weights[i]
        bags = math.prod(leading_shape(lookup, ids, offs))
        padding = lookup.padding_idx if lookup.padding_idx is not None and (train or lookup.pooling != "none") else -1
        return LookupEntry(
            program=program, kind=kind, number=i, ids=ids.data_ptr(), n_ids=ids.numel(),
            offsets=0 if offs is None else offs.data_ptr(), n_offsets=0 if offs is None else offs.numel(),
            bag=0 if offs is not None else ids.numel() // max(1, bags), bags=bags, ends=int(lookup.include_last_offset),
            weights=0 if weights is None else weights.data_ptr(), table=table.data_ptr(), rows=table.shape[0],
            dim=table.shape[1], stride=table.stride(0), padding=padding, wrap=int(lookup.wrap_negative),
            mean=int(lookup.pooling == "mean"), out=out, out_stride=out_stride, **more,
        )  # fmt: skip


def _check_shapes(spec: GroupSpec, tables, indices, offsets, sample_weights) -> None:
    """What can be checked without reading values. Raises ValueError and TypeError as ``reference.check_inputs`` does."""
    for table, tensor in zip(spec.tables, tables, strict=True):
        if tuple(tensor.shape) != (table.rows, table.dim):
            raise ValueError(f"table {table.name!r} has shape {tuple(tensor.shape)}; its graph was built for {(table.rows, table.dim)}")
    for lookup, ids, offs, weights in zip(spec.lookups, indices, offsets, sample_weights, strict=True):
        reference._check_shapes(lookup, ids, offs, weights)


def _rows_contiguous(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t if t.dim() and t.stride(-1) == 1 else t.contiguous() for t in tensors]


@_or_reference
def forward(spec: GroupSpec, tables, indices, offsets, sample_weights, extras) -> list[Tensor]:
    """Look everything up in one launch: ``[*leading, width]`` per slot, in the tables' dtype; columns nobody writes are zero.

    Raises ValueError and TypeError for shapes and dtypes at once; IndexError for a bad id and ValueError for bad offsets as
    ``id_status.py`` says: with the next forward or at ``check_ids()``. Extras must have the tables' dtype."""
    check_ids(wait=False)
    _check_shapes(spec, tables, indices, offsets, sample_weights)
    device, dtype, size = tables[0].device, tables[0].dtype, tables[0].element_size()
    reads = Lookups(spec, tables, indices, offsets, sample_weights, [True] * len(spec.lookups))
    slots = _slots(spec, tables, indices, offsets, extras)
    kinds: dict[tuple[int, ...], int] = {}
    entries: list[LookupEntry] = []
    program = 0

    def add(make, bags: int, table: Tensor, slot: Tensor, column: int, unroll: int) -> None:
        nonlocal program
        if bags == 0 or table.shape[-1] == 0:
            return
        dim, out = table.shape[-1], slot.data_ptr() + column * size
        block = triton.next_power_of_2(dim)
        vectors = alignment(size, dim, table.stride(-2), addresses=[table.data_ptr()]), alignment(size, dim, slot.shape[-1], addresses=[out])
        kind = kinds.setdefault((tile_rows(block), block, *vectors, unroll), len(kinds))
        entries.append(make(program, kind, out, slot.shape[-1]))
        program += triton.cdiv(bags, tile_rows(block))

    for i, lookup in enumerate(spec.lookups):
        bags = math.prod(leading_shape(lookup, indices[i], offsets[i]))
        make = functools.partial(reads.entry, i, train=False)
        add(make, bags, tables[lookup.table], slots[lookup.slot], lookup.column, 1 if lookup.pooling == "none" else UNROLL)
    flat = [_rows_contiguous([e.detach().reshape(-1, e.shape[-1]).to(dtype)])[0] for e in extras]
    for place, extra in zip(spec.extras, flat, strict=True):
        for column in range(0, place.width, MAX_DIM):
            part = extra[:, column : column + MAX_DIM]
            add(functools.partial(_extra_entry, part), part.shape[0], part, slots[place.slot], place.column + column, 0)
    status = IdStatus(spec, indices, offsets, device)
    if program:
        with _on(device):
            forward_kernel[(program,)](
                send(entries, device), status.found, len(entries), status.found.shape[1], tuple(kinds), TYPES[dtype],
                **reads.types, WEIGHT_T=reads.weight_type,
            )  # fmt: skip
        status.send()
    return slots


def _extra_entry(rows: Tensor, program: int, kind: int, out: int, out_stride: int) -> LookupEntry:
    nothing = dict.fromkeys(LookupEntry._fields, 0)
    shape = {"bags": rows.shape[0], "rows": rows.shape[0], "dim": rows.shape[1], "stride": rows.stride(0), "table": rows.data_ptr()}
    return LookupEntry(**nothing | shape | {"program": program, "kind": kind, "out": out, "out_stride": out_stride})


def _slots(spec: GroupSpec, tables, indices, offsets, extras) -> list[Tensor]:
    """New output tensors; zero-filled only where some column has no writer."""
    leading: list[tuple[tuple[int, ...], str] | None] = [None] * len(spec.slots)
    written = [0] * len(spec.slots)
    for lookup, ids, offs in zip(spec.lookups, indices, offsets, strict=True):
        shape, held = leading_shape(lookup, ids, offs), leading[lookup.slot]
        if held is not None and held[0] != shape:
            raise ValueError(
                f"lookups {held[1]!r} and {lookup.name!r} write one tensor, but their leading shapes differ: {list(held[0])} and {list(shape)}"
            )
        leading[lookup.slot] = held or (shape, lookup.name)
        written[lookup.slot] += spec.tables[lookup.table].dim
    for place, value in zip(spec.extras, extras, strict=True):
        held = leading[place.slot] or (tuple(value.shape[:-1]), "")
        if tuple(value.shape) != (*held[0], place.width):
            raise ValueError(
                f"a dense tensor of shape {list(value.shape)} cannot be joined to embeddings of leading shape {list(held[0])} "
                f"at width {place.width}"
            )
        leading[place.slot] = held
        written[place.slot] += place.width
    new = [tables[0].new_empty if w == width else tables[0].new_zeros for w, width in zip(written, spec.slots)]
    return [make((*(held or ((0,), ""))[0], width)) for make, held, width in zip(new, leading, spec.slots)]
