"""Dot interactions of rows that are looked up on the spot, in plain PyTorch: what the fast forms are tested against."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from ..embedding import reference as embedding
from ..embedding.spec import GroupSpec
from ..interaction import reference as interaction


def features(spec: GroupSpec) -> tuple[int, int]:
    """(how many features the slot of ``spec`` holds, their width). Raises ``ValueError`` where it is not one slot of rows of one width."""
    widths = {spec.tables[lookup.table].dim for lookup in spec.lookups} | {e.width for e in spec.extras}
    plain = all(lookup.pooling == "none" for lookup in spec.lookups)
    if len(spec.slots) != 1 or len(widths) != 1 or not plain:
        raise ValueError(
            f"{len(spec.slots)} slots of widths {sorted(widths)}; plain lookups of one width in one slot were needed"
        )
    (width,) = widths
    return spec.slots[0] // width, width


def rows_of(run, spec: GroupSpec, tables: Sequence[Tensor], indices: Sequence[Tensor], dense: Sequence[Tensor]) -> Tensor:
    """``[batch, features, width]``: the slot of ``spec``, made by ``run.forward``."""
    nothing = [None] * len(spec.lookups)
    made = replace(spec, unmade=False) if spec.unmade else spec  # implementations know a spec by its identity
    (slot,) = run.forward(made, tables, indices, nothing, nothing, list(dense))
    return slot.view(-1, *features(spec))


def dots(spec: GroupSpec, tables: Sequence[Tensor], indices: Sequence[Tensor], dense: Sequence[Tensor], pairs: str) -> Tensor:
    """``[batch, pairs]``: the inner products of the pairs of features."""
    return interaction.dots(rows_of(embedding, spec, tables, indices, dense), pairs)


def dots_backward(
    grad: Tensor, spec: GroupSpec, tables: Sequence[Tensor], indices: Sequence[Tensor], dense: Sequence[Tensor], pairs: str
) -> Tensor:
    """The gradient of :func:`dots` for the slot: ``[batch, features * width]``."""
    return interaction.dots_backward(grad, rows_of(embedding, spec, tables, indices, dense), pairs).flatten(1)
