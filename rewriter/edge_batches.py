"""Batches that sample inputs rarely hold: the largest id, one id many times, padding ids, a batch of one and one of none.

They are made from a real batch, for the comparisons of ``equivalence.py``. Every other id is overwritten where a lookup
reads them straight out of an input, through views at most; ids that the model computes are left as they come.
"""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node, map_arg
from torch.utils import _pytree as pytree

from ..passes.graph import ancestors, base_of, stored_tensor
from ..passes.lookups import LookupNode, read_lookup
from .capture import Guards
from .capture.check import derived_batches


def copies(values: Any) -> Any:
    """The same structure with tensors of its own."""
    return pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), values)


def edge_batches(graph: Graph, shell: nn.Module, guards: Guards, args: tuple, kwargs: dict) -> list[tuple[str, tuple, dict]]:
    """(what it is, args, kwargs) of each; the plain model may refuse some of them. ``graph`` is the captured one, whose lookups
    say what their ids may be."""
    made: list[tuple[str, tuple, dict]] = []
    for name, write in (("the largest id", _largest), ("one id many times", _one), ("padding ids", _padding)):
        other_args, other_kwargs = copies((args, kwargs))
        found = _given_ids(graph, shell, guards.flatten(other_args, other_kwargs))
        if any([write(*each) for each in found]):
            made.append((name, other_args, other_kwargs))
    for rows, other_args, other_kwargs in derived_batches(guards.inputs, args, kwargs):
        made.append((f"a batch of {rows}", other_args, other_kwargs))
    return [(name, a, k) for name, a, k in made if guards.failure(a, k) is None]


def _largest(ids: Tensor, rows: int, padding: int | None) -> bool:
    ids[::2] = rows - 1
    return True


def _one(ids: Tensor, rows: int, padding: int | None) -> bool:
    ids[::2] = int(ids.reshape(-1)[0])
    return True


def _padding(ids: Tensor, rows: int, padding: int | None) -> bool:
    if padding is None:
        return False
    ids[::2] = padding
    return True


def _given_ids(graph: Graph, shell: nn.Module, leaves: list) -> list[tuple[Tensor, int, int | None]]:
    """(ids, rows of their table, padding id) of the lookups that read ``leaves``; the ids are writable views of them. Those of
    the smallest tables come last, so that ids which several tables share end up valid for all of them."""
    inputs = dict(zip((n for n in graph.nodes if n.op == "placeholder"), leaves))
    found = []
    for node in graph.nodes:
        lookup = read_lookup(node, shell, None)
        if isinstance(lookup, LookupNode):
            ids, table = _view_of_input(lookup.ids, inputs), stored_tensor(lookup.table, shell)
            if ids is not None and ids.numel() and table is not None:
                found.append((ids, table.shape[0], lookup.padding_idx))
    return sorted(found, key=lambda each: -each[1])


def _view_of_input(node: Node, inputs: dict[Node, Any]) -> Tensor | None:
    """The value of ``node`` if it is part of an input tensor of whole numbers, and one memory place for each element."""
    base = inputs.get(base_of(node))
    if not isinstance(base, Tensor) or any(n.op not in ("placeholder", "call_function") for n in ancestors([node])):
        return None
    value = _evaluate(node, dict(inputs))
    distinct = all(stride or size < 2 for stride, size in zip(value.stride(), value.shape))
    shared = value.untyped_storage().data_ptr() == base.untyped_storage().data_ptr()
    return value if distinct and shared and value.dtype in (torch.int32, torch.int64) else None


def _evaluate(node: Node, values: dict[Node, Any]) -> Any:
    if node not in values:
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: _evaluate(n, values))
        values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return values[node]
