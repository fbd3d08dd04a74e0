"""Products of many small matrices  ->  ``tablewright.small_products``, where that is measured faster.

``bmm(a, b)``, ``matmul(a, b)`` and ``einsum`` of two tensors, with one or two leading dimensions that both have and a result of at most 256 columns: attention over the
fields of a row or over a short history, products of fields with a matrix each. PyTorch hands them to MKL's batched products after copying what is
turned; the op (``kernels/small_products/op.py``) reads any strides. Forward + backward on an AMD EPYC (Zen 5), torch 2.13, one thread, float32: 4096 products of 10 x 8
and 8 x 10 2.3 -> 0.6 ms, 2048 of 13 x 16 and 16 x 13 2.4 -> 0.9, 66 of 2048 x 16 and 16 x 16 4.7 -> 3.0.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from ..kernels.small_products import cpu
from ..kernels.small_products.op import OP
from .graph import Editor, aten, is_op, value_of
from .measure import Measured
from .records import APPLIED, DISABLED, SKIPPED, Record, record
from .rule import Context


@dataclass(frozen=True)
class _Product:
    """``node`` multiplies two tensors. ``orders`` (of an einsum): the axes of them and of the result in which they are ``[*, m, k]``, ``[*, k, n]``
    and ``[*, m, n]``."""

    node: Node
    orders: tuple[list[int], list[int], list[int]] | None = None


@dataclass
class SmallProducts(Measured):
    """Make products of many small matrices where they lie; one record ("small products") for each that the op takes."""

    name: ClassVar[str] = "small_products"
    kind: ClassVar[str] = "small products"
    numerics: ClassVar[str] = "reassociated"

    def run(self, context: Context) -> list[Record]:
        found = [f for n in list(context.graph.nodes) if (f := _product(n)) is not None]
        return [self._rewrite(f, context) for f in found]

    def _rewrite(self, found: _Product, context: Context) -> Record:
        node = found.node
        refusal = self.no_gain(context, [node], lambda editor, copy_of: _replace(editor, copy_of[node], found.orders))
        if refusal is not None:
            return record(self.name, self.kind, SKIPPED, node, refusal.reason)
        if not context.allowed():
            return record(self.name, self.kind, DISABLED, node, "beyond the number of rewrites that were asked for")
        done = record(self.name, self.kind, APPLIED, node, detail="products made where their operands lie")
        _replace(Editor(context.graph, self.name), node, found.orders)
        return done


def _product(node: Node) -> _Product | None:
    if is_op(node, aten.bmm.default, aten.matmul.default):
        found = _Product(node)
    elif is_op(node, aten.einsum.default):
        orders = _orders(str(node.args[0]), node.args[1])
        found = None if orders is None else _Product(node, orders)
    else:
        return None
    return found if found is not None and _fits(found) else None


def _orders(equation: str, operands: Any) -> tuple[list[int], list[int], list[int]] | None:
    """The axes of the operands and of the result in the order that a matrix product has; ``None`` if it is none."""
    given, arrow, out = equation.replace(" ", "").partition("->")
    sides = given.split(",")
    if not arrow or len(sides) != 2 or len(operands) != 2 or "." in equation or any(len(set(s)) < len(s) for s in (*sides, out)):
        return None
    a, b = sides
    lead = [c for c in out if c in a and c in b]
    m, k, n = [c for c in out if c not in b], [c for c in a if c in b and c not in out], [c for c in out if c not in a]
    if len(m) != 1 or len(k) != 1 or len(n) != 1 or not set(a) | set(b) <= {*lead, *m, *k, *n}:
        return None
    return [a.index(c) for c in (*lead, *m, *k)], [b.index(c) for c in (*lead, *k, *n)], [(*lead, *m, *n).index(c) for c in out]


def _fits(found: _Product) -> bool:
    """Are the operands ones that the op takes, as far as shapes tell?"""
    a, b = map(value_of, _operands(found.node))
    if a is None or b is None or a.dim() != b.dim() or a.dim() not in (3, 4):
        return False
    if any(t.dtype != torch.float32 or t.device.type != "cpu" for t in (a, b)):
        return False
    x, y = (a.shape, b.shape) if found.orders is None else ([a.shape[i] for i in found.orders[0]], [b.shape[i] for i in found.orders[1]])
    columns = y[-1].node.hint if isinstance(y[-1], torch.SymInt) else y[-1]
    same = [str(s) for s in x[:-2]] == [str(s) for s in y[:-2]] and str(x[-1]) == str(y[-2])  # einsum widens sizes of 1
    return same and columns is not None and columns <= cpu.WIDEST


def _operands(node: Node) -> tuple[Any, Any]:
    a, b = node.args[1] if is_op(node, aten.einsum.default) else node.args[:2]  # type: ignore[misc]
    return a, b


def _replace(editor: Editor, node: Node, orders: tuple[list[int], list[int], list[int]] | None) -> None:
    more: dict[str, Any] = {"before": node, "sources": [node]}

    def turned(given: Node, order: list[int]) -> Node:
        value = value_of(given)
        turn = None if value is None else value.permute(order)
        return given if order == sorted(order) else editor.call(aten.permute.default, given, order, **more, value=turn)

    a, b = _operands(node)
    value = value_of(node)
    if orders is None:
        made = editor.call(OP, a, b, **more, value=value)
    else:
        into = [orders[2].index(i) for i in range(len(orders[2]))]
        made = editor.call(OP, turned(a, orders[0]), turned(b, orders[1]), **more, value=None if value is None else value.permute(into))
        made = turned(made, orders[2])
    editor.replace(node, made)
