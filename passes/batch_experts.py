"""Linear layers that read one input become one product: the experts of a mixture, their gates, query, key and value.

``y1 = linear(x, W1, b1); y2 = linear(x, W2, b2); ...``  ->  ``[y1, y2, ...] = dense_group(x, [W1, W2, ...], [b1, b2, ...])``

Only layers at most ``max_width`` wide: from there on each product fills the processor by itself (numbers in
``kernels/dense/group.py``), and the layer runs as ``tablewright.dense`` (``dense_chains.py``). The parameters stay separate tensors under
their plain names. What follows the first layers of experts reads different inputs and stays as it is; whether a batched product
of those would be faster has not been measured.
"""
from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

from torch.fx import Node

from ..kernels.dense import group
from .graph import Editor, Writes, ancestors, arguments, aten, common_path, is_op, is_pure, positions, stored_tensor, value_of
from .measure import Measured
from .records import APPLIED, DISABLED, SKIPPED, Record, record
from .rule import Context


@dataclass
class BatchExperts(Measured):
    """Batch linear layers on one input; one record ("experts") for each such group of layers."""

    max_width: int = 128
    name: ClassVar[str] = "batch_experts"
    kind: ClassVar[str] = "experts"
    numerics: ClassVar[str] = "reassociated"

    def __post_init__(self) -> None:
        if type(self.max_width) is not int or self.max_width < 1:
            raise ValueError(f"max_width is {self.max_width!r}; it must be a whole number above 0")

    def run(self, context: Context) -> list[Record]:
        readers: dict[Node, list[Node]] = {}
        for node in context.graph.nodes:
            if is_op(node, aten.linear.default) and isinstance(node.args[0], Node):
                readers.setdefault(node.args[0], []).append(node)
        writes = Writes(context.graph, context.root)
        return [self._rewrite(nodes, context, writes) for nodes in readers.values() if len(nodes) > 1]

    def _rewrite(self, nodes: list[Node], context: Context, writes: Writes) -> Record:
        subject = common_path([n.meta["origin"].module_path for n in nodes])

        def row(status: str, reason: str = "", detail: str = "") -> Record:
            return record(self.name, self.kind, status, nodes[0], reason, detail, subject)

        sizes = {n: _sizes(n, context) for n in nodes}
        if any(s is None for s in sizes.values()):
            return row(SKIPPED, "a layer's weight is not a fixed [out, in] of known shape")
        if len({s[1:] for s in sizes.values()}) > 1:
            return row(SKIPPED, "the layers differ in dtype or device")
        narrow = [n for n in nodes if sizes[n][0] <= self.max_width]
        if len(narrow) < 2:
            width = max(s[0] for s in sizes.values())
            return row(SKIPPED, f"the layers are up to {width} wide; one product for all gains for layers up to {self.max_width} wide")
        made_of = {n: ancestors(_parameters(n)) for n in narrow}
        if any(map(writes.to, (n for node in narrow for n in (*node.all_input_nodes, *made_of[node])))):
            return row(SKIPPED, "what the layers read is written to in place between them")
        late = [a for n in narrow for a in made_of[n] if not is_pure(a) or a.op == "placeholder"]
        if late:
            return row(SKIPPED, f"a weight is computed from {late[0].name}; only parameters may be read ahead of their layer")
        refusal = self.no_gain(context, narrow, lambda editor, copy_of: _replace(editor, [copy_of[n] for n in narrow]))
        if refusal is not None:
            return row(SKIPPED, refusal.reason)
        if not context.allowed():
            return row(DISABLED, "beyond the number of rewrites that were asked for")
        done = row(APPLIED, detail=f"{len(narrow)} of {len(nodes)} linear layers on one input as one product")
        _replace(Editor(context.graph, self.name), narrow)
        return done


def _parameters(node: Node) -> list[Node]:
    a = arguments(node)
    return [n for n in (a["weight"], a["bias"]) if n is not None]


def _sizes(node: Node, context: Context) -> tuple | None:
    """(out, in, dtype, device) of a layer."""
    weight = arguments(node)["weight"]
    value = stored_tensor(weight, context.root)
    value = value_of(weight) if value is None else value
    if value is None or value.dim() != 2 or not all(isinstance(s, int) for s in value.shape):
        return None
    return (*value.shape, value.dtype, value.device)


def _replace(editor: Editor, nodes: list[Node]) -> None:
    place, order = nodes[0], positions(editor.graph)
    needed = ancestors([p for n in nodes for p in _parameters(n)])
    for node in sorted(needed, key=order.__getitem__):
        if order[node] > order[place]:
            place.prepend(node)
    a = [arguments(n) for n in nodes]
    values = [value_of(n) for n in nodes]
    known = all(v is not None for v in values)
    made = editor.call(
        group.OP, a[0]["input"], [each["weight"] for each in a], [each["bias"] for each in a],
        before=place, sources=nodes, value=values if known else None,
    )  # fmt: skip
    results = [
        editor.call(operator.getitem, made, number, before=place, sources=[node], value=value)
        for number, (node, value) in enumerate(zip(nodes, values))
    ]
    for node, result in zip(nodes, results):
        editor.replace(node, result)
