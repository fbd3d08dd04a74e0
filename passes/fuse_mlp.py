"""Linear layers with their ReLU and dropout, one after the other, become one ``tablewright.mlp``.

``dropout(relu(linear(x, W1, b1)), p); linear(..., W2, b2); ...``  ->  ``mlp(x, [W1, W2, ...], [b1, b2, ...], "relu 0.2 blas,...")``

What ReLU and dropout do is then part of the products, or one pass over their results, and is kept for the backward as one bit a
value. The op takes the model's own parameters, so names and checkpoints stay.

On CPU it takes over from ``dense_chains`` and ``fast_dropout``, which run before it, and only where a chain has dropout, for without it there
is nothing that they leave to gain, or is bfloat16 with ReLU and the package has products of its own for that here: then the op reads the
float32 parameters, and the casts of ``mixed_precision`` go away. On a GPU it takes every chain with a ReLU; how each chain's products are made ("blas": cuBLASLt
through PyTorch; "square", "wide": Triton products that end in ReLU, dropout and the mask) is what is measured fastest. Where no form is measured
faster than the chain as it is, the chain stays. Half-precision rows that are no multiple of 16 bytes (DLRM's 479 columns, its 13 numbers) are
filled up with zeros there, by the interaction that makes them where there is one: tensor cores are fed 16 bytes at a time. A GPU draws dropout's values from another stream than torch's kernel (same distribution).
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from ..kernels.dense import bf16
from ..kernels.dense import op as dense
from ..kernels.dropout import cpu as draws
from ..kernels.dropout import op as dropout
from ..kernels.interaction.op import DOT_INTERACTION
from ..kernels.mlp import op as mlp
from ..kernels.mlp.layers import FORMS, Layer, encode
from .graph import Editor, Writes, arguments, aten, is_op, value_of
from .measure import LEAST_GAIN, Measured, time_both
from .mixed_precision import drop_casts, master
from .records import APPLIED, DISABLED, SKIPPED, Record, record
from .rule import Context

_DROPOUTS = (aten.dropout.default, dropout.OP)


@dataclass
class _Part:
    """One layer: its product, and the ReLU and the dropout that alone read it; ``nodes`` in their order."""

    nodes: list[Node]
    relu: bool = False
    p: float = 0.0
    train: Node | bool = False  # whether its dropout drops

    @property
    def last(self) -> Node:
        return self.nodes[-1]


@dataclass
class FuseMlp(Measured):
    """Run chains of linear layers with ReLU and dropout as one op; one record ("fused mlps") for each chain."""

    name: ClassVar[str] = "fuse_mlp"
    kind: ClassVar[str] = "fused mlps"
    numerics: ClassVar[str] = "reassociated"

    def run(self, context: Context) -> list[Record]:
        writes = Writes(context.graph, context.root)
        seen: set[Node] = set()
        records = []
        for node in list(context.graph.nodes):
            if node in seen or not _is_product(node):
                continue
            chain = _chain(node, writes)
            seen.update(n for part in chain for n in part.nodes)
            value = value_of(node)
            on_cpu = value is None or value.device.type == "cpu"
            gains = not on_cpu or (value is not None and value.dtype == torch.bfloat16 and bf16.available())
            if any(part.p for part in chain) or (gains and any(part.relu for part in chain)):
                records.append(self._rewrite(chain, context))
        if records:
            drop_casts(Editor(context.graph, self.name))
        return records

    def _rewrite(self, chain: list[_Part], context: Context) -> Record:
        nodes = [n for part in chain for n in part.nodes]
        form, reason = FORMS[0], _unfit(chain)
        if reason is None and self.measure and _operands(nodes[0])[0].meta["val"].device.type != "cpu":
            form = self._fastest(chain, nodes, context)
        if reason is None:
            # On CPU the weights' casts, which are not timed, go away: as fast without them is faster.
            value = value_of(nodes[-1])
            casts = value is not None and value.device.type == "cpu" and master(_operands(nodes[0])[1]) is not _operands(nodes[0])[1]
            least = 1.0 if casts else LEAST_GAIN
            refusal = self.no_gain(context, nodes, lambda editor, copy_of: _replace(editor, _copied(chain, copy_of), form), least)
            reason = refusal.reason if refusal is not None else None
        if reason is not None:
            return record(self.name, self.kind, SKIPPED, nodes[-1], reason)
        if not context.allowed():
            return record(self.name, self.kind, DISABLED, nodes[-1], "beyond the number of rewrites that were asked for")
        dropouts = sum(part.p > 0 for part in chain)
        detail = f"{len(chain)} layers in 1 call, {dropouts} of them with dropout; form {form}"
        done = record(self.name, self.kind, APPLIED, nodes[-1], detail=detail)
        _replace(Editor(context.graph, self.name), chain, form)
        return done

    def _fastest(self, chain: list[_Part], nodes: list[Node], context: Context) -> str:
        """The form of products that is measured fastest on the sample's shapes."""
        taken: dict[str, float] = {}
        for form in FORMS:
            timing = time_both(
                context, nodes, lambda editor, copy_of, form=form: _replace(editor, _copied(chain, copy_of), form), f"{self.name} {form}"
            )
            if timing is not None:
                taken[form] = timing.rewritten
        return min(taken, key=taken.__getitem__, default=FORMS[0])


def _is_product(node: Node) -> bool:
    return is_op(node, aten.linear.default) or (is_op(node, dense.OP) and arguments(node)["activation"] in ("none", "relu"))


def _operands(node: Node) -> tuple[Node, Node, Node | None]:
    """(x, weight, bias) of a product."""
    x, weight, bias = list(arguments(node).values())[:3]
    return x, weight, bias


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _chain(first: Node, writes: Writes) -> list[_Part]:
    """The layers from ``first`` on, each the only reader of the one before."""
    chain: list[_Part] = []
    node: Node | None = first
    while node is not None and _is_product(node):
        if chain and (_operands(node)[0] is not chain[-1].last or _written(node, writes)):
            break
        part = _Part([node], relu=is_op(node, dense.OP) and arguments(node)["activation"] == "relu")
        user = _only_user(node)
        if user is not None and not part.relu and is_op(user, aten.relu.default) and not _written(user, writes):
            part = _Part([node, user], relu=True)
            user = _only_user(user)
        if user is not None and is_op(user, *_DROPOUTS) and user.args[0] is part.last and not _written(user, writes):
            a = arguments(user)
            if isinstance(a["p"], (int, float)) and 0 < a["p"] < 1:
                part = replace(part, nodes=[*part.nodes, user], p=float(a["p"]), train=a["train"])
                user = _only_user(user)
        chain.append(part)
        node = user
    return chain


def _written(node: Node, writes: Writes) -> bool:
    """Is ``node`` or what it reads written to in place?"""
    return any(map(writes.to, (node, *node.all_input_nodes)))


def _unfit(chain: Sequence[_Part]) -> str | None:
    values = [value_of(_operands(chain[0].nodes[0])[0]), *(value_of(_operands(part.nodes[0])[1]) for part in chain)]
    if any(v is None for v in values):
        return "whether it pays depends on the layers' dtype and device, and they are not known without sample_inputs"
    dtypes = {v.dtype for v in values}
    if values[0].device.type == "cpu" and values[0].dtype == torch.bfloat16:
        dtypes -= {torch.float32}  # which the op takes there
    if len(dtypes) > 1 or not dtypes <= {torch.float32, torch.float16, torch.bfloat16}:
        kinds = ", ".join(sorted(str(d).removeprefix("torch.") for d in dtypes))
        return f"inputs and weights are {kinds}; one dtype of float32, float16 and bfloat16 was needed"
    weight = next((v for v in values[1:] if v.dim() != 2), None)
    if weight is not None:
        return f"a weight has {weight.dim()} dimensions; [out, in] was needed"
    if values[0].device.type != "cpu":
        return None
    if dtypes == {torch.float16}:
        return "the layers are float16 on cpu; the fused form gains for float32 and bfloat16 there"
    if not draws.available():
        return f"the draws are not those of this PyTorch, or cannot be made ({draws.describe()})"
    return None


def _columns(x: Tensor | None) -> int:
    """Of how many columns a row's length should be a multiple."""
    half = x is not None and x.device.type != "cpu" and x.dtype in (torch.float16, torch.bfloat16)
    return 8 if half else 1


def _filled(editor: Editor, x: Node, more: int, nodes: list[Node]) -> Node:
    """``x`` with ``more`` zero columns: from the interaction that makes it, where only this chain reads it, else by a copy."""
    source = x.args[0] if is_op(x, aten.to.dtype) else x
    if is_op(source, DOT_INTERACTION) and all(len(n.users) == 1 for n in (x, source)) and arguments(source)["multiple"] == 1:
        given = list({**arguments(source), "multiple": 8}.values())
        source.args, source.kwargs = tuple(given), {}
        for node in [x] if x is source else [x, source]:
            if (value := value_of(node)) is not None:
                node.meta["val"] = value.new_empty(value.shape[0], value.shape[1] + more)
        return x
    return editor.call(aten.constant_pad_nd.default, x, [0, more], before=nodes[-1], sources=nodes[:1])


def _copied(chain: Sequence[_Part], copy_of: dict[Node, Node]) -> list[_Part]:
    return [
        replace(part, nodes=[copy_of[n] for n in part.nodes], train=copy_of[part.train] if isinstance(part.train, Node) else part.train)
        for part in chain
    ]


def _replace(editor: Editor, chain: Sequence[_Part], form: str) -> None:
    nodes = [n for part in chain for n in part.nodes]
    inputs, weights, biases = map(list, zip(*(_operands(part.nodes[0]) for part in chain)))
    if value_of(nodes[-1]).device.type == "cpu":  # type: ignore[union-attr]
        weights, biases = [master(w) for w in weights], [b if b is None else master(b) for b in biases]
    width = value_of(weights[0]).shape[1]  # type: ignore[union-attr]
    if isinstance(width, int) and (more := -width % _columns(value_of(inputs[0]))):
        weights[0] = editor.call(aten.constant_pad_nd.default, weights[0], [0, more], before=nodes[-1], sources=nodes[:1])
        inputs[0] = _filled(editor, inputs[0], more, nodes)
    layers = encode(tuple(Layer(part.relu, part.p, form) for part in chain))
    made = editor.call(
        mlp.OP, inputs[0], weights, biases, layers, [part.train for part in chain],
        before=nodes[-1], sources=nodes, value=value_of(nodes[-1]),
    )  # fmt: skip
    editor.replace(nodes[-1], made)
    for node in reversed(nodes[:-1]):
        editor.graph.erase_node(node)
