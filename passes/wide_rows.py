"""Rows of tables that a plan stores in float16 or bfloat16 come out of the fused lookup in float32.

``to(embedding_bags(...)[slot], float32)``  ->  ``embedding_bags(..., wide)[slot]``

The values are the same. The gradients that come back are then float32 too, instead of being rounded to the table's dtype before they
are summed (float16 would lose what is below 6e-8), and the launch updates its rows from sums in float32.
"""
from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch.fx import Node

from ..kernels.embedding.op import OP
from ..kernels.embedding.spec import decode
from .graph import Editor, aten, is_op, stored_tensor, value_of
from .records import APPLIED, DISABLED, SKIPPED, Record, record
from .rule import Context, Pass

_VIEWS = (
    aten.narrow.default, aten.unflatten.int, aten.unsqueeze.default, aten.squeeze.dim, aten.view.default, aten.reshape.default,
    aten.flatten.using_ints, aten.slice.Tensor, aten.select.int, aten.clone.default,
)  # fmt: skip


@dataclass
class WideRows(Pass):
    """Widen the rows of low-precision launches whose readers widen them; one record ("wide rows") for each launch."""

    name: ClassVar[str] = "wide_rows"
    kind: ClassVar[str] = "wide rows"
    numerics: ClassVar[str] = "reassociated"

    def run(self, context: Context) -> list[Record]:
        return [r for node in list(context.graph.nodes) if node.target is OP and (r := self._rewrite(node, context)) is not None]

    def _rewrite(self, node: Node, context: Context) -> Record | None:
        spec, dtype = decode(node.args[5]), stored_tensor(node.args[0][0], context.root).dtype  # type: ignore[index, arg-type, union-attr]
        if spec.wide or dtype not in (torch.float16, torch.bfloat16):
            return None
        parts = {n: None for user in node.users if is_op(user, operator.getitem) for n in _views(user)}
        casts = [u for part in parts for u in part.users if _widens(u)]
        if not casts:
            return record(self.name, self.kind, SKIPPED, node, f"nobody reads the rows in float32; they stay {str(dtype).removeprefix('torch.')}")
        if not context.allowed():
            return record(self.name, self.kind, DISABLED, node, "beyond the number of rewrites that were asked for")
        editor = Editor(context.graph, self.name)
        editor.set_argument(node, 5, replace(spec, wide=True).encode())
        for part in parts:
            for user in list(part.users):
                if user not in parts and not _widens(user):
                    low = editor.call(aten.to.dtype, part, dtype, before=user, sources=[part], value=value_of(part))
                    editor.replace_input(user, part, low)
        for cast in casts:
            editor.replace(cast, cast.all_input_nodes[0])
        for part in (node, *parts):
            _widen_value(part)
        return record(self.name, self.kind, APPLIED, node, detail=f"{len(casts)} reads of {str(dtype).removeprefix('torch.')} rows")


def _views(part: Node) -> list[Node]:
    """``part`` and what is made of it without computing."""
    return [part, *(n for user in part.users if is_op(user, *_VIEWS) for n in _views(user))]


def _widens(node: Node) -> bool:
    if is_op(node, aten.to.dtype):
        return node.args[1] is torch.float32 and len(node.args) == 2 and not node.kwargs
    return is_op(node, aten._to_copy.default) and dict(node.kwargs) == {"dtype": torch.float32}


def _widen_value(node: Node) -> None:
    value = node.meta.get("val")
    if isinstance(value, (list, tuple)):
        node.meta["val"] = [v.float() for v in value]
    elif value_of(node) is not None:
        node.meta["val"] = value.float()  # type: ignore[union-attr]
