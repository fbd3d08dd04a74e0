"""Recognise cross layers in ATen form: ``x0 * (W x + b) + c + x``, in the ways that people write it.

The sum has two or three terms in any order and nesting: the residual ``x``, at most one term made of parameters alone, and the
product. The product is ``mul`` of ``x0`` and an affine function of that same ``x``, ``matmul`` of a column ``x0`` with a number per row, or
``(x0.T * numbers).T``. The affine function is ``linear``, ``matmul`` or ``tensordot`` with a parameter on either side, plus a parameter or
not. Values are rows ``[*, dim]`` or columns ``[batch, dim, 1]``. A weight of ``dim`` elements is a DCN v1 ("vector") layer, one of
``dim * dim`` a DCN v2 ("matrix") layer.
"""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import nn
from torch.fx import Node

from .graph import Writes, ancestors, arguments, aten, is_op, is_pure, stored_tensor, value_of
from .records import Skip, skip


@dataclass(frozen=True)
class CrossLayer:
    """``out = x0 * (weight x + bias) + shift + x``. ``turned``: ``weight`` is stored as ``[in, out]``. ``column``: the values are
    ``[batch, dim, 1]``. ``inside``: the nodes that the layer is made of, ``out`` last."""

    out: Node
    x0: Node
    x: Node
    weight: Node
    bias: Node | None
    shift: Node | None
    form: str
    turned: bool
    column: bool
    dim: int
    inside: tuple[Node, ...]

    def operands(self) -> list[Node]:
        """What the layer reads."""
        return [n for n in (self.x0, self.x, self.weight, self.bias, self.shift) if n is not None]


@dataclass(frozen=True)
class _Affine:
    """``weight x + bias``."""

    weight: Node
    bias: Node | None
    turned: bool
    column: bool
    inside: tuple[Node, ...]


def read_cross(node: Node, root: nn.Module, writes: Writes) -> CrossLayer | Skip | None:
    """The cross layer whose value ``node`` is, a :class:`Skip` if it is one that cannot be fused, ``None`` if it is none."""
    terms, sums = _flatten(node, aten.add.Tensor)
    if len(terms) not in (2, 3) or len(set(terms)) != len(terms):
        return None
    for product in terms:
        for x0, y, between in _products(product):
            for x in terms:
                if x is product or (affine := _affine(y, x)) is None:
                    continue
                rest = [t for t in terms if t is not product and t is not x]
                if all(is_constant(t) for t in rest):
                    inside = (*affine.inside, *between, product, *sums)
                    found = _layer(node, x0, x, affine, rest[0] if rest else None, y, inside, root)
                    return _unfit(found, writes) or found if isinstance(found, CrossLayer) else found
        if _is_gated(product, terms):
            return skip("a gated cross layer, x0*(Wx+b)*sigmoid(Gx)+x; only its linear layers are rewritten, as dense layers", at=node)
    return None


def _flatten(node: Node, op) -> tuple[list[Node], list[Node]]:
    """The operands of nested sums or products, and the nested nodes, inner ones first; only ``node`` may have several readers."""
    if not is_op(node, op) or len(node.args) != 2 or node.kwargs or not all(isinstance(a, Node) for a in node.args):
        return [node], []
    leaves: list[Node] = []
    inner: list[Node] = []
    for operand in node.args:
        assert isinstance(operand, Node)
        more, nested = _flatten(operand, op) if len(operand.users) == 1 else ([operand], [])
        leaves += more
        inner += nested
    return leaves, [*inner, node]


def _products(node: Any) -> Iterator[tuple[Node, Node, tuple[Node, ...]]]:
    """(x0, y, nodes in between) for each reading of ``node`` as ``x0 * y``."""
    if is_op(node, aten.mul.Tensor) and all(isinstance(a, Node) for a in node.args):
        a, b = node.args
        yield a, b, ()
        yield b, a, ()
    elif is_op(node, aten.matmul.default, aten.bmm.default):
        yield node.args[0], node.args[1], ()
    elif _swaps(node) and is_op(node.args[0], aten.mul.Tensor) and len(node.args[0].users) == 1:
        product = node.args[0]
        for a, b in (product.args, product.args[::-1]):
            if _swaps(a):
                yield a.args[0], b, (a, product)


def _swaps(node) -> bool:
    value = value_of(node)
    if value is None or value.dim() != 2:
        return False
    if is_op(node, aten.transpose.int):
        return {d % 2 for d in node.args[1:3]} == {0, 1}
    return is_op(node, aten.t.default, aten.numpy_T.default, aten.mT.default)


def _affine(y: Node, x: Node) -> _Affine | None:
    """``y`` as an affine function of ``x`` that nothing else reads."""
    if not isinstance(y, Node) or len(y.users) != 1:
        return None
    if is_op(y, aten.linear.default):
        a = arguments(y)
        return _Affine(a["weight"], a["bias"], False, False, (y,)) if a["input"] is x and is_constant(a["weight"]) else None
    if is_op(y, aten.matmul.default, aten.mm.default):
        left, right = y.args
        if right is x and is_constant(left):
            return _Affine(left, None, False, True, (y,))
        return _Affine(right, None, True, False, (y,)) if left is x and is_constant(right) else None
    if is_op(y, aten.tensordot.default):
        a = arguments(y)
        fits = a["self"] is x and is_constant(a["other"]) and list(a["dims_self"]) == [1] and list(a["dims_other"]) == [0]
        value = value_of(x)
        return _Affine(a["other"], None, True, value is not None and value.dim() == 3, (y,)) if fits else None
    if is_op(y, aten.add.Tensor) and len(y.args) == 2 and not y.kwargs:
        for inner, bias in (y.args, y.args[::-1]):
            found = _affine(inner, x)
            if found is not None and found.bias is None and is_constant(bias):
                return _Affine(found.weight, bias, found.turned, found.column, (*found.inside, y))
    return None


def _layer(out, x0, x, affine: _Affine, shift, y, inside, root) -> CrossLayer | Skip | None:
    """Check shapes: broadcasting could make other things of the same ops."""
    shape, outer, result, scores = (_sizes(n, root) for n in (x, x0, out, y))
    weight = _sizes(affine.weight, root)
    if shape is None or outer is None or result is None or scores is None or weight is None:
        return skip("the shapes of a cross layer are not known without sample_inputs; they decide what its ops mean", at=out)
    column = affine.column
    if shape != outer or shape != result or (column and (len(shape) != 3 or shape[-1] != 1)):
        return None
    dim = shape[-2] if column else shape[-1]
    lead = shape[:-2] if column else shape[:-1]
    if not isinstance(dim, int) or not all(isinstance(s, int) for s in weight):
        return None
    vector = prod(weight) == dim
    if not vector and (weight != [dim, dim] or scores != shape):
        return None
    multiplies = [n for n in inside if n not in affine.inside and is_op(n, aten.matmul.default, aten.bmm.default)]
    if multiplies and not (vector and column and scores == [*lead, 1, 1]):
        return None  # a matrix product, which is elementwise only for a column times a number
    if vector and scores not in ([*lead, 1], [*lead, 1, 1] if column else lead):
        return None
    if vector and scores == lead and not any(is_op(n, aten.transpose.int, aten.t.default, aten.numpy_T.default, aten.mT.default) for n in inside):
        return None
    wanted = [dim, 1] if column else [dim]
    for node, sizes in ((shift, wanted), (affine.bias, [1] if vector else wanted)):
        given = _sizes(node, root) if node is not None else sizes
        if given is None or (given != sizes and [1, *sizes] != given and not (vector and node is affine.bias and prod(given) == 1)):
            return skip(f"the cross layer adds a term of shape {given}; {sizes} was needed", at=out)
    form = "vector" if vector else "matrix"
    unique = tuple(dict.fromkeys(inside))
    return CrossLayer(out, x0, x, affine.weight, affine.bias, shift, form, affine.turned, column, dim, unique)


def _unfit(found: CrossLayer, writes: Writes) -> Skip | None:
    inside = set(found.inside)
    for node in found.inside:
        reader = next((u for u in node.users if u not in inside), None) if node is not found.out else None
        if reader is not None and not _swaps(node):
            return skip(f"{node.name} inside the cross layer is also read by {reader.name}; only the layer may read it", at=found.out)
    return written_inside(found, writes)


def written_inside(found: Any, writes: Writes) -> Skip | None:
    """A :class:`Skip` where something that the layer reads or is made of is written to in place. ``found``: a layer of either kind."""
    written = next((n for n in (*found.operands(), *found.inside) if writes.to(n) is not None), None)
    if written is not None:
        return skip(f"{written.name} is written to in place; a fused cross layer reads it at another time", at=found.out)
    return None


def _is_gated(product: Node, terms: list[Node]) -> bool:
    factors, _ = _flatten(product, aten.mul.Tensor)
    inputs = [f.args[0].args[0] for f in factors if is_op(f, aten.sigmoid.default) and is_op(f.args[0], aten.linear.default)]
    return len(factors) == 3 and any(x in terms for x in inputs)


def is_constant(node) -> bool:
    """Is ``node`` computed from stored tensors alone?"""
    return isinstance(node, Node) and all(n.op != "placeholder" and is_pure(n) for n in ancestors([node]))


def _sizes(node: Node, root: nn.Module) -> list | None:
    """The shape, sizes that vary as text; ``None`` where unknown."""
    value = value_of(node)
    if value is None:
        value = stored_tensor(node, root)
    return None if value is None else [s if isinstance(s, int) else str(s) for s in value.shape]
