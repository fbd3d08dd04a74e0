"""``batch_norm`` of evaluation mode, which is ``x * scale + shift``, goes into the linear layer before it.

    scale = gamma / sqrt(running_var + eps)        linear then batch_norm = x @ (scale * W).T + (b - running_mean) * scale + beta
    shift = beta - running_mean * scale            elsewhere x * scale + shift, with the channels in dimension 1

Constants are computed in float64 and stored as buffers of ``context.root``, which is the export's own copy of the module tree.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from torch.fx import Node

from .graph import Editor, arguments, aten, is_op, stored_tensor, value_of
from .records import APPLIED, SKIPPED, Record, record
from .rule import Context, Pass


@dataclass
class FoldBatchNorm(Pass):
    """Fold each batch norm of an evaluation graph; one record ("batch norms") for each."""

    name: ClassVar[str] = "fold_batch_norm"
    kind: ClassVar[str] = "batch norms"

    def run(self, context: Context) -> list[Record]:
        editor = Editor(context.graph, self.name)
        nodes = [n for n in context.graph.nodes if is_op(n, aten.batch_norm.default)]
        records = [self._fold(n, context, editor, i) for i, n in enumerate(nodes)]
        editor.remove_dead()
        return records

    def _fold(self, node: Node, context: Context, editor: Editor, number: int) -> Record:
        a = arguments(node)
        mean, var = stored_tensor(a["running_mean"], context.root), stored_tensor(a["running_var"], context.root)
        if a["training"] is not False or mean is None or var is None:
            return record(self.name, self.kind, SKIPPED, node, "it normalizes by the batch's own mean; stored running statistics are needed")
        gamma, beta = (stored_tensor(a[k], context.root) for k in ("weight", "bias"))
        if (a["weight"] is not None and gamma is None) or (a["bias"] is not None and beta is None):
            return record(self.name, self.kind, SKIPPED, node, "its weight is computed in the graph; stored ones are needed")
        scale = 1 / (var.detach().double() + a["eps"]).sqrt()
        if gamma is not None:
            scale = scale * gamma.detach().double()
        shift = -mean.detach().double() * scale
        if beta is not None:
            shift = shift + beta.detach().double()

        def stored(name: str, value: Tensor, place: Node = node) -> Node:
            full = f"folded_{name}_{number}"
            context.root.register_buffer(full, value.to(mean.dtype), persistent=False)
            return editor.attribute(full, before=place, sources=[node], value=value.to(mean.dtype))

        before: Any = a["input"]
        rank = _rank(node)
        if rank is None:
            return record(self.name, self.kind, SKIPPED, node, "the number of its input's dimensions is not known without sample_inputs")
        if is_op(before, aten.linear.default) and len(before.users) == 1 and rank == 2:  # with more dimensions the channels are not last
            b = arguments(before)
            weight, bias = stored_tensor(b["weight"], context.root), stored_tensor(b["bias"], context.root)
            if weight is not None and (b["bias"] is None or bias is not None):
                if bias is not None:
                    shift = shift + bias.detach().double() * scale
                # in the linear layer's place: what it reads may be written to after it
                folded = stored("weight", weight.detach().double() * scale[:, None], before), stored("bias", shift, before)
                made = editor.call(aten.linear.default, b["input"], *folded, before=before, sources=[before, node], value=value_of(node))
                editor.replace(node, made)
                return record(self.name, self.kind, APPLIED, made, detail="folded into the linear layer before it")
        done = record(self.name, self.kind, APPLIED, node, detail="a scale and a shift")
        shape = (-1,) + (1,) * (rank - 2)
        scaled = editor.call(
            aten.mul.Tensor, before, stored("scale", scale.reshape(shape)), before=node, sources=[node], value=value_of(node)
        )  # fmt: skip
        editor.replace(
            node, editor.call(aten.add.Tensor, scaled, stored("shift", shift.reshape(shape)), before=node, sources=[node], value=value_of(node))
        )  # fmt: skip
        return done


def _rank(node: Node) -> int | None:
    value = value_of(node)
    value = value_of(node.args[0]) if value is None else value
    return None if value is None else value.dim()
