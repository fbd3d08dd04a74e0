"""Lookups whose rows were read before: the forward takes them as they are, the backward is that of any other lookup.

``given_bags(given, tables, indices, ..., spec)`` is ``embedding_bags(tables, indices, ..., spec)`` with the result of :func:`read` in place
of the tables' rows of today. It is a function of eager mode, no op: a pipeline calls it whose lookups may be stale.
"""
from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from .op import GivenLookup, autograd, forward
from .spec import decode


def read(tables, indices, offsets, sample_weights, spec: str) -> list[Tensor]:
    """The slots of ``spec`` without its extras, whose columns are zero, from the tables as they are now."""
    with torch.no_grad():
        return forward(tables, indices, offsets, sample_weights, [], _bare(spec))


class Given:
    """What :func:`read` made for one launch of one batch. ``wait()`` returns when nothing reads the tables any more: an update of them that
    comes of this launch waits for that."""

    def __init__(self, slots: list[Tensor], wait: Callable[[], None]) -> None:
        self._slots = slots
        self._seen = -1
        self._versions: list[int] = []  # of the tables, at the first call
        self.wait = wait

    def outdated(self, tables) -> bool:
        """Whether ``tables`` were updated since the first call, and this is no forward that a backward runs again."""
        versions = [t._version for t in tables]
        self._versions = self._versions or versions
        return versions != self._versions and torch._C._current_graph_task_id() == -1

    def slots(self, extras, spec: str) -> list[Tensor]:
        """The slots with ``extras`` in their columns. The first call gives them away; later ones (a checkpoint that runs the forward again)
        get copies. Raises ``RuntimeError`` where what was given away has been changed in place since."""
        slots, places = list(self._slots), decode(spec).extras
        if self._seen >= 0:
            if sum(s._version for s in slots) != self._seen:
                raise RuntimeError("a batch of a pipeline with staleness went through the model twice, and looked-up rows were changed in place between: use staleness: 0")
            slots = [s.clone() for s in slots]
        with torch.no_grad():
            for place, extra in zip(places, extras):
                slots[place.slot] = slots[place.slot].to(torch.promote_types(slots[place.slot].dtype, extra.dtype))
            for place, extra in zip(places, extras):
                slots[place.slot].narrow(-1, place.column, place.width).copy_(extra)
        if self._seen < 0:
            self._slots = [s.detach() for s in slots]
            self._seen = sum(s._version for s in slots)
        return slots


def given_bags(given: Given, tables, indices, offsets, sample_weights, extras, spec, ticket=None, owner=-1) -> list[Tensor]:
    """See the module. Rows that were updated since they were given out are read anew."""
    if given.outdated(tables):
        given.wait()
        return autograd(tables, indices, offsets, sample_weights, extras, spec, ticket, owner)
    if not torch.is_grad_enabled():
        return given.slots(extras, spec)
    return autograd(tables, indices, offsets, sample_weights, extras, spec, given, owner, GivenLookup.apply)


@functools.lru_cache(maxsize=1024)
def _bare(text: str) -> str:
    return replace(decode(text), extras=()).encode()
