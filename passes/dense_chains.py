"""Chains of linear layers: each layer with its activation becomes one ``tablewright.dense``, where that is measured faster.

``relu(linear(x, W, b))``  ->  ``dense(x, W, b, "relu")``, and the same for sigmoid, tanh and no activation. The gain is in the matrix
products (``kernels/dense/gemm.py``), so ``matmul(x, W)``, ``einsum("bi,ij->bj", x, W)`` and ``matmul(W, x)`` of columns ``[*, in, 1]`` with a parameter are
layers too, and each layer is timed by itself, at the rows of the sample batch but at least at 2048: a
batch that was made for capture says little about training, and for small products the op does at run time what PyTorch does.
(PyTorch makes the last two as batched products, at a half to a tenth of the speed.) Layers of equal shape are timed once. What lies between the layers (batch norm, dropout, other activations) stays; so
does an activation after a product that reads what the graph writes to in place, for the op takes the activation's place.
"""
from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from ..kernels.dense import op as dense
from ..kernels.dense.gemm import LEAST_WORK
from .cross_layers import is_constant
from .graph import Editor, Writes, arguments, aten, is_op, value_of
from .measure import LEAST_GAIN, ROWS, Measured, Timing, clock_of
from .records import APPLIED, DISABLED, SKIPPED, Record, record
from .rule import Context

_ACTIVATIONS = {aten.relu.default: "relu", aten.sigmoid.default: "sigmoid", aten.tanh.default: "tanh"}
# What may stand between the layers of one chain.
_BETWEEN = (
    *_ACTIVATIONS, aten.dropout.default, aten.batch_norm.default, aten.layer_norm.default, aten.prelu.default, aten.gelu.default,
    aten.leaky_relu.default, aten.elu.default, aten.silu.default, aten.softplus.default, aten.hardtanh.default, aten.selu.default,
)  # fmt: skip
_LEAST, _ROUNDS, _SECONDS = 3, 9, 0.1  # of timing one layer: the fewest and the most rounds, and the time after which no further one starts


@dataclass(frozen=True)
class Layer:
    """The node ``product`` computes ``x weight^T + bias`` (``turned``: with ``weight`` itself; ``column``: of x ``[*, in, 1]``, giving
    ``[*, out, 1]``); ``activation`` alone reads it, if there is one. ``sizes``: in, out."""

    product: Node
    x: Node
    weight: Node
    bias: Node | None
    turned: bool
    column: bool = False
    activation: Node | None = None
    sizes: tuple[int, int] = (0, 0)

    @property
    def last(self) -> Node:
        return self.activation or self.product

    @property
    def function(self) -> str:
        return _ACTIVATIONS[self.activation.target] if self.activation is not None else "none"


@dataclass
class DenseChains(Measured):
    """Run linear layers through ``tablewright.dense``; one record ("mlps") for each chain of them."""

    name: ClassVar[str] = "dense_chains"
    kind: ClassVar[str] = "mlps"
    numerics: ClassVar[str] = "reassociated"

    def run(self, context: Context) -> list[Record]:
        seen: set[Node] = set()
        records: list[Record] = []
        writes = Writes(context.graph, context.root)
        for node in list(context.graph.nodes):
            if node not in seen and _product(node) is not None:
                chain = _chain(node)
                seen.update(chain)
                records.append(self._rewrite(chain, context, writes))
        _tell(context)
        return records

    def _rewrite(self, chain: list[Node], context: Context, writes: Writes) -> Record:
        subject = chain[0].meta["origin"].module_path

        def row(status: str, reason: str = "", detail: str = "") -> Record:
            return record(self.name, self.kind, status, chain[-1], reason, detail, subject)

        layers: list[Layer] = []
        refusals: list[str] = []
        for node in chain:
            layer = _layer(node, writes)
            if isinstance(layer, str):
                refusals.append(layer)
            else:
                layers.append(layer)
        if not layers:
            return row(SKIPPED, refusals[0])
        timings = {layer: self._time(layer, context) for layer in layers} if self.measure else {}
        chosen = [layer for layer in layers if not self.measure or timings[layer].gain >= LEAST_GAIN]
        text = _timed(list(timings.values()))
        if not chosen:
            return row(SKIPPED, f"{text}: PyTorch's own kernels are as fast")
        if not context.allowed():
            return row(DISABLED, "beyond the number of rewrites that were asked for")
        editor = Editor(context.graph, self.name)
        for layer in chosen:
            _replace(editor, layer)
        gain = f"; {_timed([timings[layer] for layer in chosen])}" if self.measure else ""
        return row(APPLIED, detail=f"{len(chosen)} of {len(chain)} linear layers{gain}")

    def _time(self, layer: Layer, context: Context) -> Timing:
        value = value_of(layer.x)
        facts = (_rows(layer), *layer.sizes, layer.bias is not None, layer.function, value.dtype, value.device)
        key = (self.name, facts, torch.get_num_threads())
        if key not in context.timings:
            context.timings[key] = _time(*facts)
        return context.timings[key]


def _chain(first: Node) -> list[Node]:
    """The linear layers from ``first`` on, each the only reader of what is before it."""
    layers, node = [first], first
    while len(node.users) == 1:
        user = next(iter(node.users))
        if user.args[:1] != (node,) or node in user.args[1:]:
            break
        node = user
        if _product(node) is not None:
            layers.append(node)
        elif not is_op(node, *_BETWEEN):
            break
    return layers


def _product(node: Node) -> Layer | None:
    """The product with a parameter that ``node`` is."""
    if is_op(node, aten.linear.default):
        a = arguments(node)
        return Layer(node, a["input"], a["weight"], a["bias"], False)
    if is_op(node, aten.matmul.default, aten.mm.default):
        x, weight = node.args
        if _is_matrix(weight) and not is_constant(x):
            return Layer(node, x, weight, None, True)
        return Layer(node, weight, x, None, False, column=True) if _is_matrix(x) and _is_columns(weight) else None
    if is_op(node, aten.einsum.default) and len(read := node.all_input_nodes) == 2:
        x, weight = read
        turned = _einsum_turned(str(node.args[0])) if _is_matrix(weight) and not is_constant(x) else None
        return None if turned is None else Layer(node, x, weight, None, turned)
    return None


def _is_matrix(node: Node) -> bool:
    """Is it a matrix that depends on nothing but parameters?"""
    value = value_of(node)
    return value is not None and value.dim() == 2 and is_constant(node)


def _is_columns(node: Node) -> bool:
    value = value_of(node)
    return value is not None and value.dim() > 2 and isinstance(value.shape[-1], int) and value.shape[-1] == 1 and not is_constant(node)


def _einsum_turned(equation: str) -> bool | None:
    """Whether the einsum of x and a weight is ``x weight`` (or ``x weight^T``, which is ``False``); ``None`` if it is neither."""
    given, arrow, out = equation.replace(" ", "").partition("->")
    x, _, weight = given.partition(",")
    if not arrow or len(weight) != 2 or not x.isalpha() or len(set(x)) < len(x) or x[:-1] != out[:-1] or set(weight) != {x[-1], out[-1:]}:
        return None
    if weight[0] == weight[1]:  # "bi,ii->bi" reads the diagonal
        return None
    return weight[0] == x[-1]


def _layer(node: Node, writes: Writes) -> Layer | str:
    """The layer that ``node`` is, or why it is not one for the op."""
    layer = _product(node)
    value, weight = value_of(layer.x), value_of(layer.weight)
    if value is None or weight is None or value_of(node) is None:
        return "whether it pays depends on the layer's dtype and device, and they are not known without sample_inputs"
    if value.device.type != "cpu":
        return f"the layer runs on {value.device.type}, where PyTorch's own kernels are used; the fused layer gains on cpu only"
    if value.dtype != torch.float32 or weight.dtype != torch.float32:
        return f"the layer is {str(value.dtype).removeprefix('torch.')}; the fused layer gains for float32 only"
    sizes = tuple(weight.shape)
    if weight.dim() != 2 or not all(isinstance(s, int) for s in weight.shape):
        return f"the weight has {weight.dim()} dimensions or a size that varies; a fixed [out, in] was needed"
    fan_in = sizes[0] if layer.turned else sizes[1]
    if is_op(node, aten.einsum.default) and type(value.shape[-1]) is int and value.shape[-1] != fan_in:
        return f"the einsum repeats its one input column; an input of {fan_in} columns was needed"
    rows = _rows(layer)
    if rows * prod(sizes) < LEAST_WORK:
        return f"at {rows} rows the layer is {rows * prod(sizes) / 1e6:.2g} million multiply-adds; the fused layer gains from {LEAST_WORK / 1e6} on"
    users = list(node.users)
    activation = users[0] if len(users) == 1 and is_op(users[0], *_ACTIVATIONS) else None
    if activation is not None and any(map(writes.to, (node, *node.all_input_nodes))):
        activation = None  # the product reads them before they are written, and stays where it is
    return replace(layer, activation=activation, sizes=sizes if layer.turned else sizes[::-1])


def _replace(editor: Editor, layer: Layer) -> None:
    sources = [layer.product] if layer.activation is None else [layer.product, layer.activation]
    operands = _product(layer.product)  # read again: the layer before may have been replaced
    weight = operands.weight
    if layer.turned and is_op(weight, aten.t.default):
        weight = weight.args[0]
    elif layer.turned:
        weight = editor.call(aten.t.default, weight, before=layer.last, sources=sources)
    more: dict[str, Any] = {"before": layer.last, "sources": sources}
    x, value = operands.x, value_of(layer.last)
    if layer.column:
        x = editor.call(aten.squeeze.dim, x, -1, **more, value=value_of(x).squeeze(-1))
        value = value.squeeze(-1)
    made = editor.call(dense.OP, x, weight, operands.bias, layer.function, **more, value=value)
    if layer.column:
        made = editor.call(aten.unsqueeze.default, made, -1, **more, value=value_of(layer.last))
    editor.replace(layer.last, made)
    if layer.activation is not None:
        editor.graph.erase_node(layer.product)


def _tell(context: Context) -> None:
    """Let each layer know that it alone reads the result of a ReLU: a graph's output, whose gradient may be asked for, is read by the output."""
    for node in context.graph.nodes:
        if is_op(node, dense.OP) and is_op(x := node.args[0], dense.OP) and x.args[3] == "relu" and list(x.users) == [node]:
            node.args = (*node.args[:4], True)


def _rows(layer: Layer) -> int:
    """How many rows the layer is timed with: the sample's, but not fewer than ``ROWS``."""
    sizes = [s.node.hint if isinstance(s, torch.SymInt) else s for s in value_of(layer.product).shape[: -2 if layer.column else -1]]
    return max(ROWS, prod(s or 1 for s in sizes))


def _timed(timings: list[Timing]) -> str:
    if not timings:
        return "not measured"
    gain = sum(t.plain for t in timings) / sum(t.rewritten for t in timings)
    return f"measured {gain:.2f}x on {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"


def _time(rows: int, fan_in: int, fan_out: int, biased: bool, function: str, dtype: torch.dtype, device: torch.device) -> Timing:
    """Forward and backward of one layer, plain and fused, in turns; the least of each, which a busy machine disturbs least."""

    def tensor(*shape: int) -> Tensor:
        return torch.ones(shape, dtype=dtype, device=device, requires_grad=True)

    with torch.enable_grad():
        given = [tensor(rows, fan_in), tensor(fan_out, fan_in)] + ([tensor(fan_out)] if biased else [])
        seed = torch.ones(rows, fan_out, dtype=dtype, device=device)
        taken: tuple[list[float], list[float]] = ([], [])
        clock = clock_of(given)
        until = clock() + _SECONDS
        for i in range(_ROUNDS + 1):
            for run, times in zip((dense.reference, dense.call), taken):
                start = clock()
                out = run(given[0], given[1], given[2] if biased else None, function)
                torch.autograd.grad(out, given, seed)
                times.append(clock() - start)
            if i >= _LEAST and clock() > until:
                break
    return Timing(*(min(times[1:]) for times in taken))
