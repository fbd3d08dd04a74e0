"""Calls that a pass may still decide not to make: built while it looks at the graph, made once it is sure."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from .graph import Editor, Writes, is_pure


@dataclass(frozen=True)
class Lazy:
    """A call of ``target``; among its ``args``, lazy calls and (lists of) nodes."""

    target: Any
    args: tuple


def make(value: Any, editor: Editor, before: Node, sources: Sequence[Node]) -> Any:
    """``value`` with every lazy call in it made just before ``before``."""
    if isinstance(value, Lazy):
        args = [make(a, editor, before, sources) for a in value.args]
        return editor.call(value.target, *args, before=before, sources=sources)
    if isinstance(value, (list, tuple)):
        return [make(v, editor, before, sources) for v in value]
    return value


def same_value(a: Any, b: Any, writes: Writes | None = None, depth: int = 8) -> bool:
    """Are ``a`` and ``b`` the same computation of the same inputs? Models often slice and cast one column of ids twice. ``writes``: what the
    graph writes to is no such thing; without it, a graph that writes is refused elsewhere."""
    if a is b:
        return True
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(same_value(x, y, writes, depth) for x, y in zip(a, b))
    if not isinstance(a, Node) or not isinstance(b, Node):
        return type(a) is type(b) and a == b
    if depth == 0 or a.target != b.target or a.op != b.op or not (is_pure(a) and is_pure(b)):
        return False
    if writes is not None and (writes.to(a) or writes.to(b)):
        return False
    if a.op == "get_attr":
        return True
    return (
        a.op == "call_function"
        and isinstance(a.target, torch._ops.OpOverload)
        and same_value(a.args, b.args, writes, depth - 1)
        and same_value(sorted(a.kwargs.items()), sorted(b.kwargs.items()), writes, depth - 1)
    )
