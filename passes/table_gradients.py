"""Give each table the gradient its optimizer can use best: sparse rows, an update inside the backward, or what it was.

Who updates a table, and how, is decided before the passes run (``rewriter/embedding_optimizer.py``) and arrives as one
:class:`Choice` for each table. Here the choice meets the graph: it holds only if every reader of the table is a fused lookup.
"""
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch.fx import Node

from ..kernels.embedding.op import OP
from ..kernels.embedding.pooled import ROW_SUMS
from ..kernels.embedding.spec import decode
from ..kernels.max_pool.op import GRAD
from ..kernels.max_pool.op import OP as MAX
from .graph import Editor, packet_name, stored_tensor
from .records import APPLIED, SKIPPED, Record
from .rule import Context, Pass

aten = torch.ops.aten
_SPEC, _TICKET, _OWNER = 5, 6, 7  # argument positions of embedding_bags


@dataclass(frozen=True)
class Choice:
    """``grad``: "sparse", "in_backward", "none" (frozen by the plan) or "keep". ``reason`` says why it is kept; ``detail`` what
    updates the table. ``owner``: the in-backward optimizer's number. ``required``: the plan itself asked for it, so that
    an update inside the backward, or a freeze, that another reader makes impossible is an error. ``moves_by_zero``: a row that is
    looked up moves though its gradient is zero (it decays, or has moments)."""

    grad: str
    detail: str = ""
    reason: str = ""
    owner: int = -1
    required: bool = False
    moves_by_zero: bool = False


class CannotUpdate(ValueError):
    """A plan asks for an update that a table's other readers make impossible."""


@dataclass
class TableGradients(Pass):
    """Set the gradient layout of every table that fused lookups read."""

    name: ClassVar[str] = "table_gradients"
    kind: ClassVar[str] = "updates"
    numerics: ClassVar[str] = "reassociated"

    def run(self, context: Context) -> list[Record]:
        editor = Editor(context.graph, self.name)
        fused = [n for n in context.graph.nodes if n.target is OP]
        names = _names(context)
        maxima = {n: names.get(id(stored_tensor(n.args[0], context.root))) for n in context.graph.nodes if n.target is MAX}
        readers = _other_readers(context, names)
        held = {table.name for node in fused for table in decode(node.args[_SPEC]).tables}  # type: ignore[arg-type]
        held |= {name for name in maxima.values() if name is not None}
        records, grads = [], {}
        for table, choice in context.tables.items():
            other = readers.get(table)
            if choice.grad == "in_backward":  # of which a maximum is no part
                other = other or next((n for n, name in maxima.items() if name == table), None)
            reason = choice.reason
            if not reason and other is not None:
                reason = f"it is also read by {packet_name(other) or other.op}, which is not a fused lookup"
            if not reason and table not in held:
                reason = "the graph does not read it"
            asked = choice.required and context.budget is None  # with a budget, lookups may be left unfused on purpose
            if reason and asked and other is not None and choice.grad in ("none", "in_backward"):
                raise CannotUpdate(
                    f"table '{table}' cannot be {choice.detail}: {reason}. Leave it out of that entry of the plan"
                    + (", or set in_backward: false" if choice.grad == "in_backward" else "")
                )
            if not reason and choice.grad != "keep" and not context.allowed():
                reason = "beyond the number of rewrites that were asked for"
            if reason or choice.grad == "keep":
                records.append(Record(self.kind, SKIPPED, table, self.name, reason))
            else:
                grads[table] = choice
                records.append(Record(self.kind, APPLIED, table, self.name, detail=choice.detail))
        for node in fused:
            _set(editor, node, grads)
        for node, table in maxima.items():
            if table in grads:
                node.args = (*node.args[:GRAD], grads[table].grad, *node.args[GRAD + 1 :])
        return records


def _set(editor: Editor, node: Node, choices: dict[str, Choice]) -> None:
    spec = decode(node.args[_SPEC])  # type: ignore[arg-type]
    tables = tuple(replace(t, grad=choices[t.name].grad) if t.name in choices else t for t in spec.tables)
    editor.set_argument(node, _SPEC, replace(spec, tables=tables).encode())
    owners = {choices[t.name].owner for t in tables if t.grad == "in_backward"}
    if owners:
        has_one = len(node.args) > _TICKET
        ticket = node.args[_TICKET] if has_one else editor.attribute("_tablewright_ticket", before=node, sources=[node])
        node.args = (*node.args[:_TICKET], ticket, owners.pop())


def _names(context: Context) -> dict[int, str]:
    """The canonical names of stored tensors, by identity."""
    names: dict[int, str] = {}
    for name, tensor in context.root.named_parameters(remove_duplicate=False):
        names.setdefault(id(tensor), name)
    return names


def _other_readers(context: Context, names: dict[int, str]) -> dict[str, Node]:
    """For each stored tensor's canonical name, a reader that is not a fused lookup and may train it."""
    found: dict[str, Any] = {}
    for node in context.graph.nodes:
        tensor = stored_tensor(node, context.root)
        if tensor is None or id(tensor) not in names:
            continue
        for user in node.users:
            if user.target not in (OP, ROW_SUMS, MAX, aten.sym_size.int) and not _is_fact(user):  # row sums and sizes have no gradient
                found[names[id(tensor)]] = user
    return found


def _is_fact(node: Node) -> bool:
    """What ``rows.dtype`` becomes where the rows are no longer made."""
    return node.target is getattr and node.args[1] in ("dtype", "device")
