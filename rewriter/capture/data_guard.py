"""Graphs that are for some data only: the way through forward() that Python took for the sample.

Where forward() looked at data (``if mask.any()``, a loop over lengths), such a graph asserts what it took for granted. It is asked
at every call: other data raises :class:`OtherData`, and whatever the graph had changed until then is put back.
"""
from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx, nn

from ...passes.graph import fetch
from ..errors import CaptureError, explain
from .cleanup import is_mutable, may_alias

aten = torch.ops.aten
ASSERT = aten._assert_scalar.default
MARK = "other data than this graph is for: it takes for granted that "


class OtherData(Exception):
    """The batch takes another way through forward() than the captured one. With a ``__cause__``, the graph stopped for some other
    reason, which may be the model's own."""


def holds(condition: bool, message: str) -> None:
    """What an assertion of a graph is in eager mode."""
    if not condition:
        raise OtherData(message)


def is_other_data(error: BaseException) -> bool:
    """Whether an assertion of :func:`mark` failed, in whichever way the graph is run."""
    return isinstance(error, OtherData) or str(error).startswith(MARK)


def mark(graph: fx.Graph) -> None:
    """Give the assertions that export wrote a text that says what they are. Drops those that can never fail."""
    for node in list(graph.nodes):
        if node.target is not ASSERT:
            continue
        if _always(node.args[0]):
            graph.erase_node(node)
            continue
        found = re.search(r"expression (.+) on node", str(node.args[1]))
        node.args = (node.args[0], MARK + (found[1] if found else str(node.args[1])))


def _always(condition: Any) -> bool:
    """A size is never negative."""
    if not isinstance(condition, fx.Node) or condition.target is not operator.ge or condition.args[1] != 0:
        return condition is True
    return isinstance(condition.args[0], fx.Node) and condition.args[0].target is aten.sym_size.int


def asserted(graph: fx.Graph) -> list[fx.Node]:
    """The assertions of a graph, in order."""
    return [node for node in graph.nodes if node.target is ASSERT]


def require_undoable(graph: fx.Graph) -> None:
    """Raises CaptureError where an input that may have a gradient is changed in place before the last assertion: values can be put
    back, but not what autograd has recorded."""
    for node in _before_the_last(graph):
        if is_mutable(node) and (source := _root(node)).op == "placeholder" and not _whole_numbers(source):
            raise CaptureError(explain("forward() changes an input in place and then looks at data", fix="change a copy of it"))


def _whole_numbers(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and not value.dtype.is_floating_point and not value.dtype.is_complex


def guarded(run: Callable[..., tuple], shell: nn.Module, graph: fx.Graph) -> Callable[..., tuple]:
    """``run`` (what ``graph`` does), raising :class:`OtherData` with everything as it was where the graph is not for these inputs."""
    if not asserted(graph):
        return run
    before = list(_before_the_last(graph))
    changed = list(dict.fromkeys(_changed(before)))
    paths = [str(node.target) for node in changed if node.op == "get_attr"]
    given = [i for i, node in enumerate(graph.find_nodes(op="placeholder")) if node in changed]
    draws = any(map(_is_random, before))

    def call(*inputs):
        live = [value for path in paths if isinstance(value := fetch(shell, path), torch.Tensor)]
        live += [inputs[i] for i in given]
        state = [(tensor, tensor.detach().clone()) for tensor in live]
        random = _random_state() if draws else None
        try:
            return run(*inputs)
        except Exception as error:
            with torch.no_grad():
                for tensor, content in state:
                    tensor.copy_(content)
            if random is not None:
                _set_random_state(random)
            if isinstance(error, OtherData):
                raise
            raise OtherData(f"the graph stops with {type(error).__name__}") from error

    return call


def _before_the_last(graph: fx.Graph) -> Iterable[fx.Node]:
    left = len(asserted(graph))
    for node in graph.nodes:
        if not left:
            return
        left -= node.target is ASSERT
        yield node


def _changed(nodes: list[fx.Node]) -> Iterable[fx.Node]:
    for node in nodes:
        if is_mutable(node):
            sources = [_root(node)]
        elif node.target is aten.batch_norm.default:  # changes its running statistics, which its schema does not say
            sources = node.all_input_nodes
        else:
            continue
        yield from (each for each in sources if each.op in ("get_attr", "placeholder"))


def _is_random(node: fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    return torch.Tag.nondeterministic_seeded in node.target.tags or "dropout" in node.target._schema.name or (
        node.target.namespace == "tablewright")


def _root(node: fx.Node) -> fx.Node:
    source: Any = node.args[0]
    while source.op == "call_function" and may_alias(source) and source.args and isinstance(source.args[0], fx.Node):
        source = source.args[0]
    return source


def _random_state() -> tuple:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
    return torch.get_rng_state(), cuda


def _set_random_state(state: tuple) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state_all(state[1])
