"""``tablewright::tier_slots(ids, table, first) -> slots``: bring the rows of ``ids`` into a table's memory and say where they are.

``ids``: int32 or int64, any shape. ``table``: :attr:`~.table.SlotTable.number` of one in tiers or with dynamic ids. ``first``: whether it is its graph's first
lookup of the table, so that what the calls before it looked up without gradients may leave. ``slots``: int64, of the shape of ``ids``. What it does to
the cache is no part of the graph's values, so it is called once for each node, in the order of the graph.
"""
from __future__ import annotations

import torch
from torch import Tensor

from ..library import DIRECT, LIBRARY
from .table import table_of

LIBRARY.define("tier_slots(Tensor ids, int table, bool first=True) -> Tensor", tags=[torch.Tag.nondeterministic_seeded])  # neither moved nor dropped


def slots(ids: Tensor, table: int, first: bool = True) -> Tensor:
    """See the module."""
    return table_of(table).slots(ids, first)


@torch.library.register_fake("tablewright::tier_slots", lib=LIBRARY)
def _fake(ids, table, first=True):
    return torch.empty_like(ids, dtype=torch.int64)


LIBRARY.impl("tier_slots", slots, "CompositeExplicitAutograd")
OP = torch.ops.tablewright.tier_slots.default
DIRECT[OP] = slots
