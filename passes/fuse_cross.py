"""Cross layers of Deep & Cross Networks become one op each, one op for a whole chain of DCN v1 layers, or wider products.

DCN v2: ``x0 * (W x + b) + c + x``  ->  ``cross(x0, x, W, b, c)``: the product by the faster library, then one pass over memory.
DCN v1: ``x[l+1] = x0 (x[l] . w[l]) + b[l] + x[l]`` from ``x[0] = x0`` on  ->  ``cross_vector(x0, [w], [i], [b])``: every ``x[l]`` is
``a[l] x0 + c[l]``, so only dot products are needed.
Mixture of low-rank experts: all experts' projections as one product each, and the gates applied in the low-rank space, so that no
``[batch, dim, experts]`` is made: ``x0 * ([g_e f(C_e f(V_e x))] [U_e]^T + b) + x`` (the softmaxed gates sum to 1). The spellings are in ``cross_layers.py`` and ``low_rank_cross.py``, the algebra in ``kernels/cross/``.

Measured at batch 2048, one thread, forward + backward: three v1 layers of width 429 15.6 -> 3.6 ms (1024: 43.7 -> 8.0), one v2
layer of width 429 30.9 -> 16.2 ms (1024: 144 -> 74). Columns ``[batch, dim, 1]`` are computed as rows.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch.fx import Node

from ..kernels.cross import matrix, vector
from .cross_layers import CrossLayer, read_cross
from .graph import Editor, Writes, aten, is_op, value_of
from .low_rank_cross import LowRankCross, read_low_rank
from .measure import Measured
from .records import APPLIED, DISABLED, SKIPPED, Record, Skip, record
from .rule import Context

Layer = CrossLayer | LowRankCross


@dataclass
class FuseCross(Measured):
    """Fuse cross layers; one record ("cross") for each layer."""

    name: ClassVar[str] = "fuse_cross"
    kind: ClassVar[str] = "cross"
    numerics: ClassVar[str] = "reassociated"

    def run(self, context: Context) -> list[Record]:
        writes = Writes(context.graph, context.root)
        records: list[Record] = []
        layers: list[Layer] = []
        for node in context.graph.nodes:
            found = read_low_rank(node, writes) or read_cross(node, context.root, writes) if is_op(node, aten.add.Tensor) else None
            if isinstance(found, Skip):
                records.append(self._row(SKIPPED, found.node or node, found.reason))
            elif found is not None:
                layers.append(found)
        parts = {n for layer in layers for n in layer.inside if n is not layer.out}
        layers = [layer for layer in layers if layer.out not in parts]  # (product + x) + c is one layer, not two
        now: dict[Node, Node] = {}  # what stands for a layer's value that has been replaced
        for group in _groups(layers):
            records += self._fuse(group, context, now)
        Editor(context.graph, self.name).remove_dead()
        return records

    def _fuse(self, group: list[Layer], context: Context, now: dict[Node, Node]) -> list[Record]:
        first = group[0]
        if first.form == "vector" and first.x is not first.x0:
            reason = "the chain of vector cross layers does not start at x0; the closed form holds from x[0] = x0 on"
            return [self._row(SKIPPED, layer.out, reason) for layer in group]
        make = {"vector": _vector, "matrix": _matrix, "low rank": _low_rank}[first.form]
        nodes = [n for layer in group for n in layer.inside]

        def rewrite(editor: Editor, copy_of: dict[Node, Node]) -> None:
            make(editor, group, lambda node: copy_of[now.get(node, node)])

        refusal = self.no_gain(context, nodes, rewrite)
        if refusal is not None:
            return [self._row(SKIPPED, layer.out, refusal.reason) for layer in group]
        if not context.allowed():
            return [self._row(DISABLED, layer.out, "beyond the number of rewrites that were asked for") for layer in group]
        now[group[-1].out] = make(Editor(context.graph, self.name), group, lambda node: now.get(node, node))
        detail = f"{len(group)} vector layers as one op" if first.form == "vector" else f"a {first.form} layer"
        return [self._row(APPLIED, layer.out, detail=detail) for layer in group]

    def _row(self, status: str, node: Node, reason: str = "", detail: str = "") -> Record:
        return record(self.name, self.kind, status, node, reason, detail)


def _groups(layers: list[Layer]) -> list[list[Layer]]:
    """Matrix layers one by one; vector layers in chains whose inner values nothing else reads."""
    groups: list[list[Layer]] = []
    for layer in layers:
        before = groups[-1][-1] if groups else None
        follows = (
            before is not None and before.form == layer.form == "vector" and layer.x is before.out and layer.x0 is before.x0
            and set(before.out.users) <= set(layer.inside)
        )  # fmt: skip
        if follows:
            groups[-1].append(layer)
        else:
            groups.append([layer])
    return groups


def _matrix(editor: Editor, group: list[Layer], of: Callable[[Node], Node]) -> Node:
    (layer,) = group
    build = _Builder(editor, group, of)
    weight = of(layer.weight)
    if layer.turned:
        weight = build(aten.t.default, weight)
    made = build(
        matrix.OP, build.row(layer.x0), build.row(layer.x), weight, build.flat(layer.bias), build.flat(layer.shift),
    )  # fmt: skip
    return build.finish(made)


def _vector(editor: Editor, group: list[Layer], of: Callable[[Node], Node]) -> Node:
    build = _Builder(editor, group, of)
    weights = [of(layer.weight) for layer in group]
    inner = [None if layer.bias is None else of(layer.bias) for layer in group]
    shifts = [None if layer.shift is None else of(layer.shift) for layer in group]
    return build.finish(build(vector.OP, build.row(group[0].x0), weights, inner, shifts))


def _low_rank(editor: Editor, group: list[Layer], of: Callable[[Node], Node]) -> Node:
    (layer,) = group
    build = _Builder(editor, group, of)
    x, experts = build.row(layer.x), len(layer.down)

    def joined(nodes: list[Node], dim: int) -> Node:
        return build(aten.cat.default, [of(n) for n in nodes], dim)

    low = build(layer.activation, build(aten.linear.default, x, joined(layer.down, 0)))
    low = build(aten.unflatten.int, low, -1, [experts, layer.rank])
    middle = build(aten.stack.default, [of(n) for n in layer.middle])
    low = build(layer.activation, build(aten.einsum.default, "ber,esr->bes", [low, middle]))
    gates = build(aten.softmax.int, build(aten.linear.default, x, joined(layer.gates, 0)), -1)
    low = build(aten.mul.Tensor, low, build(aten.unsqueeze.default, gates, -1))
    up = build(aten.linear.default, build(aten.flatten.using_ints, low, -2), joined(layer.up, 1), build.flat(layer.shift))
    return build.finish(build(aten.addcmul.default, x, build.row(layer.x0), up))


class _Builder:
    """Makes the nodes that replace a group of layers, just before its value; columns become rows on the way in and back on the
    way out."""

    def __init__(self, editor: Editor, group: list[Layer], of: Callable[[Node], Node]) -> None:
        self.editor, self.layer, self.of = editor, group[-1], of
        self.sources = [of(n) for layer in reversed(group) for n in reversed(layer.inside)]

    def __call__(self, target: Any, *args: Any, value: Any = None) -> Node:
        return self.editor.call(target, *args, before=self.of(self.layer.out), sources=self.sources, value=value)

    def row(self, node: Node) -> Node:
        given, value = self.of(node), value_of(node)
        if not self.layer.column:
            return given
        if is_op(given, aten.unsqueeze.default) and given.args[1] in (2, -1):
            return given.args[0]  # type: ignore[return-value]
        return self(aten.squeeze.dim, given, -1, value=None if value is None else value[..., 0])

    def flat(self, node: Node | None) -> Node | None:
        if node is None:
            return None
        value = value_of(node)
        plain = value is not None and value.dim() == 1
        return self.of(node) if plain else self(aten.reshape.default, self.of(node), [self.layer.dim])

    def finish(self, made: Node) -> Node:
        """Let ``made`` take the place of the group's value; what stands there then."""
        out, value = self.of(self.layer.out), value_of(self.layer.out)
        if value is not None:
            made.meta["val"] = value[..., 0] if self.layer.column else value
        if self.layer.column:
            made = self(aten.unsqueeze.default, made, -1, value=value)
        self.editor.replace(out, made)
        for node in self.sources[1:]:
            if not node.users:
                self.editor.graph.erase_node(node)
        return made
