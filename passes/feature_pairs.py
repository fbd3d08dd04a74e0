"""What the interaction passes share: constants of the graph, features of a ``[batch, features, dim]`` tensor, and the chain of
sums and scalings that follows an interaction.

A *feature* is one ``[batch, dim]`` row block of such a tensor: ``X[:, i]``, ``X[:, i:i+1]``, a part of ``unbind``, ``split`` or
``chunk`` along dimension 1, or a tensor of its own (one lookup of a list of lookups).
"""
from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.fx.node import map_arg

from ..kernels.interaction.constants import digest
from .graph import Editor, Writes, aten, is_op, is_pure, stored_tensor, value_of
from .measure import Measured
from .records import APPLIED, DISABLED, SKIPPED, Record, Skip, record, skip
from .rule import Context

_LOOKUPS = (aten.embedding.default, aten.embedding_bag.default, aten.embedding_bag.padding_idx)
_MOST_EXTRAS = 8

Copy = Callable[[Node], Node]


@dataclass
class Found:
    """An interaction: ``build(editor, copy_of)`` makes what takes the place of ``anchor``; ``nodes`` are all that it replaces;
    ``reads`` are the feature tensors; ``checks`` assert what is true of the replacement by construction, and go away; ``sizes`` ask
    for sizes of what goes away: (node, the tensor and dimension to ask instead)."""

    anchor: Node
    nodes: list[Node]
    reads: list[Node]
    build: Callable[[Editor, Copy], Node]
    detail: str
    checks: list[Node] = field(default_factory=list)
    sizes: list[tuple[Node, Node, int]] = field(default_factory=list)

    def make(self, editor: Editor, copy_of: Copy) -> None:
        """Replace ``anchor``, or its copy."""
        for node, source, dim in self.sizes:
            old = copy_of(node)
            value = node.meta.get("val")
            editor.replace(old, editor.call(aten.sym_size.int, copy_of(source), dim, before=old, sources=[old], value=value))
        editor.replace(copy_of(self.anchor), self.build(editor, copy_of))
        for node in reversed(self.checks):
            editor.graph.erase_node(copy_of(node))


class InteractionPass(Measured):
    """Finds interactions node by node, and replaces those that are safe and measured faster."""

    kind = "interactions"

    def find(self, node: Node, facts: Facts) -> Found | Skip | None:
        """What starts at ``node``; ``None`` if nothing does."""
        raise TypeError(f"{type(self).__name__} must define find()")

    def run(self, context: Context) -> list[Record]:
        editor = Editor(context.graph, self.name)
        facts = Facts(context.root, Writes(context.graph, context.root))
        records: list[Record] = []
        for node in list(context.graph.nodes):
            if node._erased or not node.users:
                continue
            found = self.find(node, facts)
            if isinstance(found, Found):
                records.append(self._replace(context, editor, found, facts))
            elif found is not None:
                records.append(record(self.name, self.kind, SKIPPED, found.node or node, found.reason, subject=_path(node)))
        return records

    def _replace(self, context: Context, editor: Editor, found: Found, facts: Facts) -> Record:
        anchor, path = found.anchor, _path(found.nodes[0])
        refusal = facts.written(found)
        if refusal is None:
            nodes = list(dict.fromkeys(found.nodes))
            refusal = self.no_gain(context, nodes, lambda e, copies: found.make(e, copies.__getitem__))
        if refusal is not None:
            return record(self.name, self.kind, SKIPPED, anchor, refusal.reason, subject=path)
        if not context.allowed():
            return record(self.name, self.kind, DISABLED, anchor, "beyond the number of rewrites that were asked for", subject=path)
        made = record(self.name, self.kind, APPLIED, anchor, detail=found.detail, subject=path)
        found.make(editor, lambda n: n)
        editor.remove_dead()
        return made


def _path(node: Node) -> str:
    return node.meta["origin"].module_path


# --- facts of the graph --------------------------------------------------------------------------------------------------------


@dataclass
class Constant:
    """A tensor that only depends on tensors which the model keeps: ``stored`` are the nodes that read those, ``nodes`` the rest."""

    value: Tensor
    stored: list[Node]
    nodes: list[Node]


@dataclass
class Facts:
    """What the passes ask of the graph."""

    root: nn.Module
    writes: Writes

    def written(self, found: Found) -> Skip | None:
        """A Skip if anything that is replaced or read is also written to in place."""
        for node in (*found.reads, *found.nodes):
            writer = self.writes.to(node)
            if writer is not None:
                return skip(f"{node.name} is written to in place by {writer.name}", at=writer)
        return None

    def digest(self, constants: Sequence[Constant]) -> tuple[list[Node], str]:
        """The nodes that read the stored tensors of ``constants``, and the digest by which an op notices that they change."""
        stored = list(dict.fromkeys(n for c in constants for n in c.stored))
        return stored, digest([t for n in stored if (t := stored_tensor(n, self.root)) is not None])

    def constant(self, node: Any) -> Constant | None:
        """The value of ``node`` if it is the same at every call, else ``None``."""
        stored: list[Node] = []
        nodes: list[Node] = []

        def value(n: Node) -> Any:
            if n.op == "get_attr":
                tensor = stored_tensor(n, self.root)
                if tensor is None or tensor.requires_grad or self.writes.to(n) is not None:
                    raise LookupError
                stored.append(n)
                return tensor.detach()
            if n.op != "call_function" or not is_pure(n):
                raise LookupError
            args, kwargs = map_arg(n.args, value), map_arg(n.kwargs, value)
            nodes.append(n)
            return n.target(*args, **kwargs)  # type: ignore[operator]

        if not isinstance(node, Node):
            return None
        try:
            with torch.no_grad():
                result = value(node)
        except LookupError:
            return None
        return Constant(result, stored, nodes) if isinstance(result, Tensor) else None


def integers(found: Constant | None, size: Any = None) -> list[int] | None:
    """The numbers of a constant 1-d integer tensor; negative ones count from ``size`` and need it."""
    if found is None or found.value.dim() != 1 or found.value.dtype not in (torch.int64, torch.int32):
        return None
    numbers = found.value.tolist()
    if min(numbers, default=0) < 0:
        return [n + size if n < 0 else n for n in numbers] if isinstance(size, int) else None
    return numbers


def shape_of(node: Any) -> tuple | None:
    """The shape of ``node``'s float value, if it is known."""
    value = value_of(node)
    return tuple(value.shape) if value is not None and value.is_floating_point() else None


def rank_of(node: Any) -> int:
    """The rank of ``node``'s float value, or -1."""
    shape = shape_of(node)
    return -1 if shape is None else len(shape)


def is_one(size: Any) -> bool:
    """Is ``size`` 1 for sure? (Comparing a symbolic size would put a guard on it.)"""
    return isinstance(size, int) and size == 1


def only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def dim_of(node: Node, place: int, rank: int) -> Any:
    """Argument ``place`` of ``node`` as a dimension from 0 (0 where it is absent)."""
    dim = node.args[place] if len(node.args) > place else 0
    return dim % rank if isinstance(dim, int) and rank > 0 else None


# --- features ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Feature:
    """Feature ``index`` of ``base``; ``index`` None: ``base`` itself. ``kept``: it is [batch, 1, dim], else [batch, dim]."""

    base: Node
    index: int | None
    kept: bool
    nodes: tuple[Node, ...] = field(compare=False, hash=False, default=())

    @property
    def key(self) -> tuple[Node, int | None]:
        return self.base, self.index


def feature(node: Any) -> Feature | None:
    """``node`` as a feature, or ``None`` if it is no [batch, dim] or [batch, 1, dim] tensor of known shape."""
    shape = shape_of(node)
    if shape is None or not (len(shape) == 2 or (len(shape) == 3 and is_one(shape[1]))):
        return None
    return _taken_out(node) or Feature(node, None, len(shape) == 3)


def _taken_out(node: Node) -> Feature | None:
    if is_op(node, aten.unsqueeze.default) and rank_of(node.args[0]) == 2 and dim_of(node, 1, 3) == 1:
        inner = feature(node.args[0])
        return inner and Feature(inner.base, inner.index, True, (*inner.nodes, node))
    if is_op(node, operator.getitem):
        whole, number = node.args
        if is_op(whole, aten.unbind.int, aten.split.Tensor, aten.chunk.default):
            flat = whole.target is aten.unbind.int  # type: ignore[union-attr]
            base, dim = whole.args[0], dim_of(whole, 1 if flat else 2, 3)  # type: ignore[union-attr]
            if rank_of(base) == 3 and dim == 1 and isinstance(number, int) and number >= 0 and _ones(whole, flat):
                return Feature(base, number, not flat, (whole, node))  # type: ignore[arg-type]
        return None
    if not is_op(node, aten.select.int, aten.slice.Tensor):
        return None
    base, first = node.args[0], node.args[2] if len(node.args) > 2 else None
    shape = shape_of(base)
    if shape is None or len(shape) != 3 or dim_of(node, 1, 3) != 1 or not isinstance(first, int):
        return None
    if first < 0:
        if not isinstance(shape[1], int):
            return None
        first += shape[1]
    if is_op(node, aten.select.int) and is_op(base, aten.select.int) and (outer := _block(base, shape[1])) is not None:
        return Feature(base.args[0], outer + first, False, (base, node))  # type: ignore[arg-type, union-attr]
    return Feature(base, first, node.target is aten.slice.Tensor, (node,))  # type: ignore[arg-type]


def _block(node: Any, width: Any) -> int | None:
    """Where the features ``X[:, i]`` of a ``[batch, blocks, width, dim]`` tensor begin among all ``blocks * width``."""
    shape, block = shape_of(node.args[0]), node.args[2]
    known = shape is not None and len(shape) == 4 and all(isinstance(s, int) for s in (*shape[1:3], block, width))
    return block % shape[1] * width if known and dim_of(node, 1, 4) == 1 else None  # type: ignore[index]


def _ones(whole: Any, flat: bool) -> bool:
    """Are all parts one feature wide? (Else part ``i`` is not feature ``i``.)"""
    value = whole.meta.get("val")
    return flat or (isinstance(value, (list, tuple)) and all(is_one(v.shape[1]) for v in value))


@dataclass
class Table:
    """Features numbered in one tensor: ``bases`` side by side. ``existing``: a node that already is that tensor."""

    bases: list[Node]
    starts: dict[Node, int]
    features: Any  # how many; not always a known number
    existing: Node | None = None

    @staticmethod
    def of(keys: Sequence[tuple[Node, int | None]], nodes: list[Node]) -> Table | None:
        """The tensor that holds the features ``keys``, to replace ``nodes`` (to which an existing one is added). ``None`` where
        batch sizes, dims, dtypes or the number of features of a base do not allow it."""
        bases = list(dict.fromkeys(base for base, _ in keys))
        values = [v for b in bases if (v := value_of(b)) is not None]
        if len(values) < len(bases) or len({(str(v.shape[0]), str(v.shape[-1]), v.dtype) for v in values}) != 1:
            return None
        table = Table(bases, {}, 0)
        for base, value in zip(bases, values):
            width = {2: 1, 3: value.shape[1]}.get(value.dim(), value.shape[1:-1].numel())
            if len(bases) > 1 and not isinstance(width, int):
                return None
            table.starts[base] = table.features
            table.features = width if len(bases) == 1 else table.features + width
        if len(bases) == 1 and values[0].dim() == 3:
            table.existing = bases[0]
        else:
            target = aten.stack.default if rank_of(bases[0]) == 2 else aten.cat.default
            first = min(nodes)
            same = (u for u in bases[0].users if is_op(u, target) and list(u.args[0]) == bases)  # type: ignore[arg-type]
            table.existing = next((u for u in same if dim_of(u, 1, 3) == 1 and u < first), None)
            nodes += [table.existing] if table.existing is not None else []
        return table

    def number(self, key: tuple[Node, int | None]) -> int:
        return self.starts[key[0]] + (key[1] or 0)

    def build(self, editor: Editor, copy_of: Copy, before: Node) -> Node:
        """The tensor [batch, features, dim]."""
        if self.existing is not None:
            return copy_of(self.existing)
        parts = [copy_of(b) for b in self.bases]
        if all(rank_of(b) == 2 for b in self.bases):
            return editor.call(aten.stack.default, parts, 1, before=before, sources=[before])
        for i, base in enumerate(self.bases):
            if rank_of(base) == 2:
                parts[i] = editor.call(aten.unsqueeze.default, parts[i], 1, before=before, sources=[before])
            elif rank_of(base) == 4:
                parts[i] = editor.call(aten.flatten.using_ints, parts[i], 1, 2, before=before, sources=[before])
        if len(parts) == 1:
            return parts[0]
        return editor.call(aten.cat.default, parts, 1, before=before, sources=[before])


# --- making the calls ------------------------------------------------------------------------------------------------------------


@dataclass
class Join:
    """The concatenation that dots are written into: ``cat`` node and its other inputs, ``place`` of them before the dots."""

    node: Node
    extras: list[Node]
    place: int


def join_of(node: Node) -> Join | None:
    """The ``cat`` along dimension 1 that is the only reader of the ``[batch, pairs]`` tensor ``node``, if it can be taken over."""
    cat = only_user(node)
    if cat is None or not is_op(cat, aten.cat.default) or len(cat.args) < 2 or cat.args[1] not in (1, -1):
        return None
    inputs: list[Node] = list(cat.args[0])  # type: ignore[arg-type]
    others = [n for n in inputs if n is not node]
    if len(others) != len(inputs) - 1 or not 1 <= len(others) <= _MOST_EXTRAS:
        return None
    for other in others:
        shape = shape_of(other)
        if shape is None or len(shape) != 2 or not isinstance(shape[1], int):
            return None
        if is_op(other, *_LOOKUPS) or (is_op(other, operator.getitem) and is_op(other.args[0], *_LOOKUPS)):
            return None  # table groups write lookups into concatenations themselves
    return Join(cat, others, inputs.index(node))
