"""The graph as passes see it: one builder that makes nodes, and the questions passes ask."""
from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node

from ..kernels.dropout import op as dropout
from .origin import KEY, Origin

aten = torch.ops.aten


class Editor:
    """Makes and removes nodes on behalf of one pass, and stamps each new node's origin. The only way passes change a graph."""

    def __init__(self, graph: Graph, made_by: str) -> None:
        self.graph = graph
        self.made_by = made_by

    def call(self, target: Any, *args: Any, before: Node, sources: Sequence[Node], value: Any = None, **kwargs: Any) -> Node:
        """A call of ``target`` placed before ``before``, standing for ``sources``; ``value`` is its fake result, if known."""
        with self.graph.inserting_before(before):
            node = self.graph.call_function(target, args, kwargs)
        return self._stamp(node, sources, value)

    def attribute(self, name: str, *, before: Node, sources: Sequence[Node], value: Any = None) -> Node:
        """Read the plain model's parameter, buffer or flag ``name``."""
        with self.graph.inserting_before(before):
            node = self.graph.create_node("get_attr", name)
        return self._stamp(node, sources, value)

    def set_argument(self, node: Node, index: int, value: Any) -> None:
        """Replace one positional argument of ``node``."""
        node.update_arg(index, value)
        self._stamp(node, [node], node.meta.get("val"))

    def replace_input(self, node: Node, old: Node, new: Node) -> None:
        """``node`` reads ``new`` wherever it read ``old``."""
        node.replace_input_with(old, new)
        self._stamp(node, [node], node.meta.get("val"))

    def replace(self, old: Node, new: Node) -> None:
        """``new`` takes every use of ``old``, which goes away."""
        old.replace_all_uses_with(new)
        self.graph.erase_node(old)

    def remove_dead(self) -> None:
        """Erase nodes nobody reads. Inputs, and calls that change state, draw random numbers or assert something, stay."""
        for node in reversed(list(self.graph.nodes)):
            if not node.users and node.op not in ("placeholder", "output") and is_pure(node):
                self.graph.erase_node(node)

    def _stamp(self, node: Node, sources: Sequence[Node], value: Any) -> Node:
        origins = [s.meta[KEY] for s in sources]
        names = tuple(dict.fromkeys(name for o in origins for name in o.sources))
        path = common_path([o.module_path for o in origins])
        location = next((o.location for o in origins if o.location), "")
        for key in ("nn_module_stack", "stack_trace"):
            if key in sources[0].meta:
                node.meta[key] = sources[0].meta[key]
        node.meta[KEY] = Origin(names, self.made_by, path, location)
        if value is not None:
            node.meta["val"] = value
        return node


def common_path(paths: Sequence[str]) -> str:
    """The innermost module that holds all of ``paths``."""
    parts = [p.split(".") if p else [] for p in paths]
    shared = []
    for pieces in zip(*parts):
        if len(set(pieces)) > 1:
            break
        shared.append(pieces[0])
    return ".".join(shared)


def packet_name(node: Node) -> str:
    """``relu`` for ``aten.relu.default``; the function's name for others; "" for nodes that call nothing."""
    if node.op != "call_function":
        return ""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target.overloadpacket.__name__
    return getattr(target, "__name__", str(target))


def arguments(node: Node) -> dict[str, Any]:
    """The arguments of an op call by their schema names, defaults filled in."""
    schema = node.target._schema  # type: ignore[union-attr]
    found: dict[str, Any] = {}
    for i, arg in enumerate(schema.arguments):
        if i < len(node.args):
            found[arg.name] = node.args[i]
        elif arg.name in node.kwargs:
            found[arg.name] = node.kwargs[arg.name]
        else:
            found[arg.name] = arg.default_value if arg.has_default_value() else None
    return found


def is_op(node: Any, *targets: Any) -> bool:
    """Does ``node`` call one of these op overloads or functions?"""
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def is_pure(node: Node) -> bool:
    """True if ``node`` may be moved or dropped: it changes nothing, draws no random numbers and asserts nothing."""
    if node.op in ("get_attr", "placeholder"):
        return True
    if node.op != "call_function":
        return False
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        if is_detach_of_ids(node):
            return True
        seeded = torch.Tag.nondeterministic_seeded in target.tags
        return not (target._schema.is_mutable or seeded or "assert" in target._schema.name)
    return target in (operator.getitem, getattr) or getattr(target, "__module__", "") in ("_operator", "math", "torch")


def is_detach_of_ids(node: Node) -> bool:
    """``x.detach_()`` on numbers that never had a gradient, as ``x.new_tensor(offsets)`` becomes under torch.export."""
    value = value_of(node)
    return node.target is aten.detach_.default and value is not None and not value.dtype.is_floating_point


def fetch(root: nn.Module, name: str) -> Any:
    """The attribute that a ``get_attr`` node reads."""
    value: Any = root
    for part in name.split("."):
        value = getattr(value, part)
    return value


def stored_tensor(node: Any, root: nn.Module) -> Tensor | None:
    """The parameter or buffer that ``node`` reads, or ``None``."""
    if isinstance(node, Node) and node.op == "get_attr":
        value = fetch(root, str(node.target))
        return value if isinstance(value, Tensor) else None
    return None


def value_of(node: Any) -> Tensor | None:
    """The fake tensor that shape propagation left on ``node``, or ``None`` where no sample inputs were given."""
    value = node.meta.get("val") if isinstance(node, Node) else None
    return value if isinstance(value, Tensor) else None


def positions(graph: Graph) -> dict[Node, int]:
    """Each node's place in execution order."""
    return {node: i for i, node in enumerate(graph.nodes)}


def ancestors(nodes: Iterable[Node], stop: set[Node] | None = None) -> set[Node]:
    """All nodes that ``nodes`` depend on, themselves included; the walk does not go past ``stop``."""
    seen: set[Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in seen and not (stop and node in stop):
            seen.add(node)
            stack.extend(node.all_input_nodes)
    return seen


# Ops whose result may be their input itself, or a view of it, without their schema saying so.
_QUIET_VIEWS = (
    aten.dropout.default, aten.alpha_dropout.default, aten.feature_dropout.default, aten.feature_alpha_dropout.default,
    aten.type_as.default, aten.einsum.default, aten.tile.default, aten.constant_pad_nd.default, operator.getitem, dropout.OP,
)  # fmt: skip


def base_of(node: Node) -> Node:
    """The node whose memory ``node`` may be a view of (itself, if it owns its memory)."""
    while node.op == "call_function" and node.all_input_nodes:
        target = node.target
        is_view = isinstance(target, torch._ops.OpOverload) and any(r.alias_info for r in target._schema.returns)
        if not is_view and target not in _QUIET_VIEWS:
            break
        node = node.all_input_nodes[0]
    return node


class Writes:
    """What a graph writes to in place. Stored tensors count as written under each of their names, and through views."""

    def __init__(self, graph: Graph, root: nn.Module) -> None:
        self._root = root
        self._found: dict[Any, Node] = {}
        for node in graph.nodes:
            if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable:
                continue
            if is_detach_of_ids(node):
                continue
            for name, value in arguments(node).items():
                written = next(a for a in node.target._schema.arguments if a.name == name).alias_info
                if written is not None and written.is_write:
                    for part in value if isinstance(value, (list, tuple)) else (value,):
                        if isinstance(part, Node):
                            self._found[self._memory(part)] = node

    def to(self, node: Any) -> Node | None:
        """A node that writes to the memory ``node`` may be a view of, or ``None``."""
        return self._found.get(self._memory(node)) if isinstance(node, Node) and self._found else None

    def _memory(self, node: Node) -> Any:
        return memory(node, self._root)


def memory(node: Node, root: nn.Module) -> Any:
    """What stands for the memory that ``node`` may be a view of: of a stored tensor its storage (a sparse one has none), else the node that owns it."""
    base = base_of(node)
    stored = stored_tensor(base, root)
    if stored is None:
        return base
    return stored.untyped_storage()._cdata if stored.layout is torch.strided else id(stored)
