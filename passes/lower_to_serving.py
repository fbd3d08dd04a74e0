"""Every lookup of an evaluation graph -> ``tablewright.distributed_gather`` or ``distributed_gather_bag``, which name their table.

The tables then are in the graph no more: whoever runs it brings the rows. A table stays inside, with the reason, where the plan
says so (``serving.inline_below``) and where it is also read by something that is no lookup (an output layer tied to it).
Runs after ``EvalForm``. Half precision tables are gathered as float32, which holds their values exactly, and cast back.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node

from ..kernels.gather.op import BAG, GATHER
from .graph import Editor, Writes, ancestors, aten, stored_tensor, value_of
from .lookups import LookupNode, read_lookup
from .records import APPLIED, DISABLED, SKIPPED, Record, Skip, record
from .rule import Context, Pass


@dataclass
class LowerToServing(Pass):
    """Take the tables out. ``inline_below``: tables of fewer bytes stay inside, but for those named in ``numbered``, whose rows go by other
    numbers where they are served: table -> (rows there, the row of its ``padding_idx``)."""

    name: ClassVar[str] = "lower_to_serving"
    kind: ClassVar[str] = "lookups"
    numerics: ClassVar[str] = "exact"
    inline_below: int = 0
    numbered: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def run(self, context: Context) -> list[Record]:
        graph, root = context.graph, context.root
        writes, editor, records = Writes(graph, root), Editor(graph, self.name), []
        found: list[LookupNode] = []
        for node in graph.nodes:
            lookup = read_lookup(node, root, writes, largest=True)
            if isinstance(lookup, Skip):
                records.append(record(self.name, self.kind, SKIPPED, node, f"its table stays inside the graph: {lookup.reason}"))
            elif lookup is not None and lookup.result is not None:
                found.append(lookup)
        names, others = table_names(root), _other_readers(graph, root, found)
        nodes = {each.node for each in found}
        staged = {each.node for each in found if ancestors(p for p in (each.ids, each.offsets, each.sample_weights) if p is not None) & nodes}
        for lookup in found:
            table: Tensor = stored_tensor(lookup.table, root)  # type: ignore[assignment]
            size, other = table.numel() * table.element_size(), others.get(id(table))
            if other is not None:
                reason = f"its table is also read by {other.name}, which is not a lookup that can leave the graph; the table stays inside"
                records.append(record(self.name, self.kind, SKIPPED, lookup.node, reason))
            elif lookup.node in staged:
                reason = "its ids or weights come from rows of another lookup; all rows are fetched at once, so its table stays inside"
                records.append(record(self.name, self.kind, SKIPPED, lookup.node, reason))
            elif table.dtype == torch.float64:
                reason = "its table is float64 and stays inside the graph; rows outside are float32 at most"
                records.append(record(self.name, self.kind, SKIPPED, lookup.node, reason))
            elif size < self.inline_below and names[id(table)] not in self.numbered:
                reason = f"its table has {size} bytes; the plan keeps those below {self.inline_below} inside (serving.inline_below)"
                records.append(record(self.name, self.kind, DISABLED, lookup.node, reason))
            elif not context.allowed():
                records.append(record(self.name, self.kind, DISABLED, lookup.node, "beyond the number of rewrites that were asked for"))
            else:
                made = _lowered(editor, lookup, names[id(table)], table, self.numbered.get(names[id(table)]))
                records.append(record(self.name, self.kind, APPLIED, made, detail=f"rows of table '{names[id(table)]}'"))
                editor.replace(lookup.result, made)  # type: ignore[arg-type]
        editor.remove_dead()
        return records


def table_names(root: nn.Module) -> dict[int, str]:
    """``id(tensor)`` -> what a serving graph calls it: the module's path for its ``weight``, else the tensor's own first name."""
    named = [*root.named_parameters(), *root.named_buffers()]
    return {id(tensor): name.removesuffix(".weight") for name, tensor in reversed(named)}


def _other_readers(graph: Graph, root: nn.Module, found: list[LookupNode]) -> dict[int, Node]:
    """``id(table)`` -> a node that reads it and is none of ``found``."""
    lookups = {each.node for each in found}
    return {
        id(tensor): user for node in graph.nodes if (tensor := stored_tensor(node, root)) is not None
        for user in node.users if user not in lookups
    }  # fmt: skip


def _lowered(editor: Editor, lookup: LookupNode, name: str, table: Tensor, numbered: tuple[int, int] | None) -> Node:
    rows, dim = table.shape
    if numbered is not None:
        rows = numbered[0]
        lookup = replace(lookup, wrap_negative=False, padding_idx=None if lookup.padding_idx is None else numbered[1])
    result: Node = lookup.result  # type: ignore[assignment]
    value = value_of(result)
    wide = value if value is None or table.dtype == torch.float32 else value.float()
    sources = [lookup.node] if lookup.node is result else [lookup.node, result]
    if lookup.pooling == "none":
        made = editor.call(
            GATHER, lookup.ids, name, rows, dim, lookup.wrap_negative, before=lookup.node, sources=sources, value=wide
        )  # fmt: skip
    else:
        padding = -1 if lookup.padding_idx is None else lookup.padding_idx
        made = editor.call(
            BAG, lookup.ids, lookup.offsets, lookup.sample_weights, name, rows, dim, lookup.pooling, padding,
            lookup.include_last_offset, lookup.wrap_negative, before=lookup.node, sources=sources, value=wide,
        )  # fmt: skip
    if table.dtype == torch.float32:
        return made
    return editor.call(aten.to.dtype, made, table.dtype, before=lookup.node, sources=sources, value=value)
