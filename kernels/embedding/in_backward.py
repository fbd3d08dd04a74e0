"""Updates inside the backward: one per table, after **all** its contributions of that backward.

The backward of every lookup *defers*: it hands its slot gradients and ids over and goes on. When autograd has finished that
backward (every group, every forward call in the loss, checkpointed recomputation), the contributions are merged into one
:class:`GroupSpec` and each table is updated once, with duplicates summed first. Nothing is materialised per table.

A backward that fails part-way drops its contributions with the autograd task that held them: no table changes.
"""
from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from ..errors import InBackwardError
from .spec import GroupSpec, Lookup, Table, decode


class Owner(Protocol):
    """Whoever holds the optimizer state; see :class:`.optimizers.RowUpdates`."""

    def update_rows(self, spec: GroupSpec, slot_grads, indices, offsets, sample_weights) -> None: ...

    def launch_key(self, table: str) -> tuple: ...

    def tables_of(self, names: tuple[str, ...]) -> list[torch.Tensor | None]: ...


_owners: weakref.WeakValueDictionary[int, Owner] = weakref.WeakValueDictionary()
_numbers = itertools.count(1)


def register(owner: Owner) -> int:
    """A number by which a graph node can name ``owner`` for as long as ``owner`` lives."""
    number = next(_numbers)
    _owners[number] = owner
    return number


@dataclass
class _Backward:
    """What one running backward has deferred for one owner."""

    texts: list[str] = field(default_factory=list)
    slot_grads: list = field(default_factory=list)
    indices: list = field(default_factory=list)
    offsets: list = field(default_factory=list)
    sample_weights: list = field(default_factory=list)
    __hash__ = object.__hash__


# Held strongly only by the callback that autograd queued, so a failed backward forgets its contributions. One launch is of
# one device and dtype.
_running: weakref.WeakValueDictionary[tuple, _Backward] = weakref.WeakValueDictionary()


def defer(number: int, text: str, slot_grads, indices, offsets, sample_weights, tables=(), due=()) -> None:
    """Keep one lookup group's contribution until the running backward ends. ``tables``: those that were looked up, of which the
    places ``due`` are to be updated.

    Raises ``RuntimeError`` outside a backward, and where other tensors than the optimizer's own tables were looked up.
    """
    if number not in _owners:
        raise RuntimeError(
            "a lookup asks for its update inside the backward, but the optimizer that would make it is gone: "
            "keep the model that optimize() returned alive until backward() has run"
        )
    owner = _owners[number]
    lookups, names = _due(text)
    held = owner.tables_of(names)
    for i in due:
        table, mine = tables[i], held[i]
        if table is not mine and (mine is None or table.data_ptr() != mine.data_ptr()):
            raise RuntimeError(
                f"table '{names[i]}' was looked up in a tensor that is not the model's own (torch.func.functional_call?), so it "
                "cannot be updated inside the backward: set in_backward: false in the plan"
            )
    key = (number, torch._C._current_graph_task_id(), owner.launch_key(names[decode(text).lookups[lookups[0]].table]))
    backward = _running.get(key)
    if backward is None:
        backward = _running[key] = _Backward()
        engine = torch.autograd.Variable._execution_engine
        engine.queue_callback(functools.partial(_finish, number, backward))
    backward.texts.append(text)
    backward.slot_grads.extend(slot_grads)
    if len(lookups) < len(indices):
        indices, offsets, sample_weights = ([given[i] for i in lookups] for given in (indices, offsets, sample_weights))
    backward.indices.extend(indices)
    backward.offsets.extend(offsets)
    backward.sample_weights.extend(sample_weights)


_WAY_OUT = "set in_backward: false in the plan's embedding_optimizer. No table was changed by this backward"


def reaches(nodes: Sequence[Any]) -> bool:
    """Whether the running backward comes to tables that are updated in it, by the ``nodes`` where autograd ends for them.

    Raises :class:`InBackwardError` where it was asked for the gradient of one (``torch.autograd.grad``), or comes to some of them only."""
    try:
        found = [torch._C._will_engine_execute_node(node) for node in nodes]
    except RuntimeError as error:  # autograd says that it is one of those that were asked for
        raise InBackwardError(
            "torch.autograd.grad was asked for the gradient of a table that is updated inside the backward, which keeps none: "
            f"leave the table out of its inputs, or {_WAY_OUT}"
        ) from error
    if True in found and False in found:
        raise InBackwardError(
            "backward(inputs=...) names some of the tables that are updated inside the backward, and others are looked up with them: "
            f"name all tables or none, or {_WAY_OUT}"
        )
    return True in found


@functools.lru_cache(maxsize=1024)
def _due(text: str) -> tuple[list[int], tuple[str, ...]]:
    """The lookups of tables that are updated in the backward; the names of all tables."""
    spec = decode(text)
    lookups = [i for i, lookup in enumerate(spec.lookups) if spec.tables[lookup.table].grad == "in_backward"]
    return lookups, tuple(table.name for table in spec.tables)


def _finish(number: int, backward: _Backward) -> None:
    spec = merge(tuple(backward.texts))
    with torch.no_grad():
        _owners[number].update_rows(spec, backward.slot_grads, backward.indices, backward.offsets, backward.sample_weights)


@functools.lru_cache(maxsize=1024)
def merge(texts: tuple[str, ...]) -> GroupSpec:
    """One spec for the in-backward lookups of several launches: tables of one name become one, slots are numbered on."""
    tables: dict[str, Table] = {}
    places: dict[str, int] = {}
    lookups: list[Lookup] = []
    slots: list[int] = []
    for text in texts:
        spec = decode(text)
        for lookup in spec.lookups:
            table = spec.tables[lookup.table]
            if table.grad == "in_backward":
                place = places.setdefault(table.name, len(places))
                tables.setdefault(table.name, table)
                lookups.append(replace(lookup, table=place, slot=lookup.slot + len(slots)))
        slots.extend(spec.slots)
    return GroupSpec(tuple(tables.values()), tuple(lookups), tuple(slots))
