"""Dot interactions of rows looked up on the spot, on CPU: a part of the batch at a time, so that its rows stay in the cache."""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..embedding import cpu as embedding
from ..embedding.spec import GroupSpec
from ..interaction import cpu as interaction
from .reference import features, rows_of

_CACHE = 1 << 20  # bytes of rows in work at a time
empty = interaction.empty


def _parts(spec: GroupSpec, tables: Sequence[Tensor], indices: Sequence[Tensor], dense: Sequence[Tensor]):
    """(rows, samples) of each part of the batch. A bad id is reported as for the whole batch."""
    batch = indices[0].shape[0]
    size = max(1, _CACHE // (spec.slots[0] * tables[0].element_size()))
    for start in range(0, batch, size):
        part = slice(start, min(start + size, batch))
        try:
            x = rows_of(embedding, spec, tables, [i[part] for i in indices], [d[part] for d in dense])
        except IndexError:
            rows_of(embedding, spec, tables, indices, dense)
            raise
        yield part, x


def dots(
    spec: GroupSpec, tables: Sequence[Tensor], indices: Sequence[Tensor], dense: Sequence[Tensor], pairs: str, out: Tensor,
    beside: Sequence[tuple[Tensor, Tensor]] = (),
) -> None:  # fmt: skip
    """Write ``[batch, pairs]`` to ``out``, and ``beside`` it."""
    for extra, columns in beside:
        columns.copy_(extra)
    for part, x in _parts(spec, tables, indices, dense):
        if out.dtype == x.dtype:
            interaction.dots(x, pairs, out[part])
        else:
            out[part].copy_(interaction.dots(x, pairs))


def dots_backward(
    grad: Tensor, spec: GroupSpec, tables: Sequence[Tensor], indices: Sequence[Tensor], dense: Sequence[Tensor], pairs: str
) -> Tensor:
    """See :func:`reference.dots_backward`."""
    made = empty((indices[0].shape[0], *features(spec)), tables[0].dtype, torch.device("cpu"))
    grad = grad.to(tables[0].dtype)
    for part, x in _parts(spec, tables, indices, dense):
        made[part] = interaction.dots_backward(grad[part], x, pairs)
    return made.flatten(1)
