"""What eager mode runs for a graph: the same calls, on shorter ways, and none that does nothing.

Ops are called as functions (``DIRECT``). Inputs that are converted to the dtype and device that they have, as the features of many models are,
and views that undo each other would take 1 to 4 us each, twice where autograd follows: half of the calls of many a graph.
Nothing else than eager mode sees this form: reports, exports and compilers have the graph itself.
"""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node

from ..kernels.library import DIRECT
from ..passes.graph import Writes
from .capture.data_guard import ASSERT, holds

aten = torch.ops.aten

_CONVERSIONS = {aten.to.dtype, aten.to.dtype_layout, aten.to.device}
# of a tensor whose dtype and device are sure, these make one whose dtype and device are
_SURE = _CONVERSIONS | {
    aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.default, aten.view.default, aten.reshape.default, aten.flatten.using_ints,
    aten.unflatten.int, aten.slice.Tensor, aten.select.int, aten.transpose.int, aten.permute.default, aten.t.default, aten.expand.default,
    aten.contiguous.default, aten.clone.default, aten.ne.Scalar, aten.eq.Scalar, aten.gt.Scalar, aten.ge.Scalar, aten.lt.Scalar, aten.le.Scalar,
}  # fmt: skip


def called_directly(graph: Graph) -> None:
    """Let every call of ``graph`` be of the function itself, in place."""
    for node in graph.nodes:
        node.target = holds if node.target is ASSERT else DIRECT.get(node.target, node.target)


def without_idle_calls(graph: Graph, root: nn.Module, guarded: bool) -> None:
    """Remove, in place, conversions that convert nothing and views that undo each other. ``guarded``: the graph runs only with inputs of the
    dtypes and the device that it was captured with. Parameters may have others since, so what is made of them is left alone."""
    writes = Writes(graph, root)
    sure: set[Node] = set()
    for node in list(graph.nodes):
        if node.op == "placeholder":
            value = node.meta.get("val")
            if guarded and isinstance(value, Tensor) and value.device.type == "cpu":
                sure.add(node)
            continue
        source = node.args[0] if node.args else None
        if node.op != "call_function" or not isinstance(source, Node):
            continue
        if node.target in _SURE and source in sure:
            sure.add(node)
        same = source if node in sure and node.target in _CONVERSIONS and _converts_nothing(node) else _undone(node)
        if same is None or (same is not source and (writes.to(node) or any(user.op == "output" for user in node.users))):
            continue
        node.replace_all_uses_with(same)
        graph.erase_node(node)
        if same is not source and not source.users:
            graph.erase_node(source)


def _converts_nothing(node: Node) -> bool:
    """Whether a conversion returns the very tensor it is given."""
    before, after = node.args[0].meta.get("val"), node.meta.get("val")  # type: ignore[union-attr]
    if not (isinstance(before, Tensor) and isinstance(after, Tensor)):
        return False
    given = {a.name: v for a, v in zip(node.target._schema.arguments, node.args)} | node.kwargs  # type: ignore[union-attr]
    if given.get("copy") or given.get("pin_memory") or given.get("memory_format") not in (None, torch.preserve_format):
        return False
    return (before.dtype, before.device, before.layout) == (after.dtype, after.device, after.layout)


def _undone(node: Node) -> Node | None:
    """The tensor of which ``node`` is a view of the same shape and strides, by two views."""
    given: Any = node.args
    source = given[0]
    value = source.meta.get("val")
    if source.op != "call_function" or source.kwargs or node.kwargs or not isinstance(value, Tensor):
        return None
    rank, before = value.dim(), source.args
    if node.target is aten.squeeze.dim and source.target is aten.unsqueeze.default:
        return before[0] if given[1] % rank == before[1] % rank else None
    if node.target is aten.flatten.using_ints and source.target is aten.unflatten.int:
        first, last = (*given[1:], *(0, -1)[len(given) - 1 :])
        parts = len(before[2])
        start = before[1] % (rank - parts + 1)
        return before[0] if (first % rank, last % rank) == (start, start + parts - 1) else None
    return None
