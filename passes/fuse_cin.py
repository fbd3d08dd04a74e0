"""Layers of a compressed interaction network: a convolution of width 1 over all products of rows becomes one op.

``conv1d(einsum("bhd,bmd->bhmd", x, y).view(B, H * M, D), w)``  ->  ``cin_layer(x, y, w)``, where that is measured faster. The products are also
found as ``x.unsqueeze(2) * y.unsqueeze(1)``. The tensor of products is by far the largest of such a model; the op never makes it.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, cast

from torch import Tensor
from torch.fx import Node

from ..kernels.cin.op import OP
from .feature_pairs import Facts, Found, InteractionPass, only_user, shape_of
from .graph import Editor, arguments, aten, is_op
from .records import Skip, skip

_VIEWS = (aten.view.default, aten.reshape.default, aten.flatten.using_ints)


@dataclass
class FuseCin(InteractionPass):
    """Rewrite convolutions over outer products of features, where that is measured faster."""

    name: ClassVar[str] = "fuse_cin"
    kind: ClassVar[str] = "interactions"
    numerics: ClassVar[str] = "reassociated"

    def find(self, node: Node, facts: Facts) -> Found | Skip | None:
        found = _products(node)
        if found is None:
            return None
        left, right, nodes = found
        shapes = [shape_of(n) for n in (left, right, node)]
        if any(s is None for s in shapes):
            return None
        (_, rows, dim), (_, others, _), _ = shapes  # type: ignore[misc]
        asked = [u for u in node.users if is_op(u, aten.sym_size.int)]
        readers = [u for u in node.users if u not in asked]
        flat = readers[0] if len(readers) == 1 else None
        if flat is None or not is_op(flat, *_VIEWS) or not all(isinstance(s, int) for s in (rows, others, dim)):
            return None
        merged = shape_of(flat)
        conv = None if merged is None or len(merged) != 3 or merged[1:] != (rows * others, dim) else only_user(flat)
        if not is_op(conv, aten.conv1d.default) or conv.args[0] is not flat:
            return None
        a = arguments(conv)
        weight = shape_of(a["weight"])
        if weight is None or weight[1:] != (rows * others, 1) or a["groups"] != 1 or _any_but(a["stride"], 1) or _any_but(a["padding"], 0):
            return skip("a convolution over outer products that is not of width 1 over all of them", at=conv)
        devices = {n.meta["val"].device.type for n in (left, conv)}
        if devices != {"cpu"}:
            return skip(f"the layer runs on {devices.pop()}, where the products and the convolution run as they are", at=conv)

        def build(editor: Editor, copy_of) -> Node:
            last = copy_of(conv)
            more = {"before": last, "sources": [copy_of(n) for n in (*nodes, flat, conv)]}
            matrix = editor.call(aten.squeeze.dim, copy_of(a["weight"]), -1, **more)
            bias = None if a["bias"] is None else copy_of(a["bias"])
            return editor.call(OP, copy_of(left), copy_of(right), matrix, bias, **more, value=conv.meta.get("val"))

        detail = f"{rows} x {others} outer products and their convolution in 1 call"
        sources = ((left, 0), (left, 1), (right, 1), (left, 2))
        sizes = [(u, *sources[u.args[1] % 4]) for u in asked]  # type: ignore[operator]
        return Found(conv, [*nodes, *asked, *_numbers(flat), flat, conv], [left, right], build, detail, sizes=sizes)


def _numbers(node: Node) -> list[Node]:
    """The sizes, and what is computed from them, that ``node`` reads: they go with it where it is measured at another batch."""
    found = dict.fromkeys(n for n in node.all_input_nodes if n.op == "call_function" and not isinstance(n.meta.get("val"), Tensor))
    return [*(m for n in found if not is_op(n, aten.sym_size.int) for m in _numbers(n)), *found]


def _any_but(value: Any, number: int) -> bool:
    return any(v != number for v in (value if isinstance(value, (list, tuple)) else [value]))


def _products(node: Node) -> tuple[Node, Node, list[Node]] | None:
    """(x, y, nodes) where ``node`` is ``x[b, h, d] * y[b, m, d]`` as ``[b, h, m, d]``."""
    if is_op(node, aten.einsum.default) and isinstance(node.args[0], str) and len(node.args[1]) == 2:  # type: ignore[arg-type]
        left, _, rest = node.args[0].replace(" ", "").partition(",")
        right, _, out = rest.partition("->")
        if len(left) == len(right) == 3 and left[0] == right[0] and left[2] == right[2] and len({*left, *right}) == 4:
            if out == left[:2] + right[1:]:
                x, y = cast("tuple[Node, Node]", node.args[1])
                return x, y, [node]
        return None
    if not is_op(node, aten.mul.Tensor) or not all(is_op(a, aten.unsqueeze.default) for a in node.args):
        return None
    x, y = cast("tuple[Node, Node]", node.args)
    at = [arg.args[1] % 4 for arg in (x, y)]  # type: ignore[operator]
    if sorted(at) != [1, 2] or any(len(shape_of(arg.args[0]) or ()) != 3 for arg in (x, y)):
        return None
    left, right = (x, y) if at == [2, 1] else (y, x)
    return left.args[0], right.args[0], [x, y, node]  # type: ignore[return-value]
