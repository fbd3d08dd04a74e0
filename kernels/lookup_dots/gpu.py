"""Dot interactions of rows looked up on the spot, on a GPU: the launches of the Triton kernels.

More features than a square holds, repeated pairs and dtypes that Triton does not take are looked up first. Bad ids contribute zeros and are
reported as ``embedding/id_status.py`` says. Nothing here waits for the GPU.
"""

# Triton types what a kernel takes as constexpr.
# pyright: reportArgumentType=false, reportOptionalMemberAccess=false
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..embedding import gpu as embedding
from ..embedding.gpu_launch import TYPES, alignment, on_device, one_type, send
from ..embedding.id_status import IdStatus, check_ids
from ..embedding.spec import GroupSpec
from ..interaction import gpu as interaction
from ..interaction.pairs import check, decode
from .reference import features, rows_of
from .triton_kernels import FeatureEntry, lookup_dots_backward_kernel, lookup_dots_kernel

empty = interaction.empty


def _fits(tables: Sequence[Tensor], dense: Sequence[Tensor], count: int, pairs: str) -> bool:
    same = {t.dtype for t in (*tables, *dense)} <= {tables[0].dtype} and tables[0].dtype in TYPES
    return same and count <= interaction.MOST_FEATURES and decode(pairs).distinct and all(t.stride(1) == 1 for t in tables)


def _entries(spec: GroupSpec, tables: Sequence[Tensor], indices: Sequence[Tensor], dense: Sequence[Tensor]):
    """(the entries on the device, the ids' dtype, alignment, tensors that must live until the launch)."""
    _, dim = features(spec)
    ids, id_type = one_type(indices, [True] * len(indices), torch.int64)
    extras = [d if d.stride(1) == 1 else d.contiguous() for d in dense]
    by_column: dict[int, FeatureEntry] = {}
    for number, (lookup, given) in enumerate(zip(spec.lookups, ids)):
        table = tables[lookup.table]
        by_column[lookup.column] = FeatureEntry(
            given.data_ptr(), number, table.data_ptr(), table.shape[0], table.stride(0), int(lookup.wrap_negative)
        )
    for place, extra in zip(spec.extras, extras):
        by_column[place.column] = FeatureEntry(0, 0, extra.data_ptr(), extra.shape[0], extra.stride(0), 0)
    read = [*tables, *extras]
    size = tables[0].element_size()
    vector = alignment(size, dim, *(t.stride(0) for t in read), addresses=[t.data_ptr() for t in read])
    entries = [by_column[column] for column in sorted(by_column)]
    return send(entries, tables[0].device), TYPES[id_type], vector, (ids, extras)


def dots(
    spec: GroupSpec, tables: Sequence[Tensor], indices: Sequence[Tensor], dense: Sequence[Tensor], pairs: str, out: Tensor,
    beside: Sequence[tuple[Tensor, Tensor]] = (),
) -> None:  # fmt: skip
    """Write ``[batch, pairs]`` to ``out``, and ``beside`` it. Raises for bad ids of earlier calls, as every lookup does."""
    count, dim = features(spec)
    batch = indices[0].shape[0]
    if not _fits(tables, dense, count, pairs) or batch == 0:
        for extra, columns in beside:
            columns.copy_(extra)
        out.copy_(interaction.dots(rows_of(embedding, spec, tables, indices, dense), pairs))
        return
    check_ids(wait=False)
    check(decode(pairs), count)
    device, dtype = tables[0].device, tables[0].dtype
    entries, id_type, vector, _alive = _entries(spec, tables, indices, dense)
    status = IdStatus(spec, indices, [None] * len(indices), device)
    side, copies = interaction.copy_options(beside, out)
    with on_device(device):
        lookup_dots_kernel[(batch,)](
            entries, status.found, interaction.where(pairs, count, device), out, out.stride(0), count, dim, *side, **copies,
            VEC=vector, TABLE_T=TYPES[dtype], ID_T=id_type,
            **interaction.square_options(count, dim, dtype, interaction.must_widen(tables[0], pairs)),
        )  # fmt: skip
    status.send()


def dots_backward(
    grad: Tensor, spec: GroupSpec, tables: Sequence[Tensor], indices: Sequence[Tensor], dense: Sequence[Tensor], pairs: str
) -> Tensor:
    """See :func:`reference.dots_backward`."""
    count, dim = features(spec)
    batch = indices[0].shape[0]
    if not _fits(tables, dense, count, pairs) or batch == 0:
        return interaction.dots_backward(grad.to(tables[0].dtype), rows_of(embedding, spec, tables, indices, dense), pairs).flatten(1)
    device, dtype = tables[0].device, tables[0].dtype
    entries, id_type, vector, _alive = _entries(spec, tables, indices, dense)
    dx = empty((batch, count * dim), dtype, device)
    with on_device(device):
        lookup_dots_backward_kernel[(batch,)](
            grad, grad.stride(0), grad.stride(1), entries, interaction.where(pairs, count, device), dx, count, dim,
            VEC=vector, TABLE_T=TYPES[dtype], ID_T=id_type,
            **interaction.square_options(count, dim, dtype, interaction.must_widen(tables[0], pairs, True) or grad.dtype != dtype),
        )  # fmt: skip
    return dx
