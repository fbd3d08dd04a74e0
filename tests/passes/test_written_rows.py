"""Lookups whose rows the model changes in place are fused, with the plain model's numbers."""
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from pass_harness import assert_sound, rewrite
from tablewright.passes.graph import packet_name
from tablewright.passes.group_tables import GroupTables
from torch import nn

IDS = torch.tensor([[3, 1], [3, 7], [0, 0]])


class Written(nn.Module):
    """Rows of ``t``, by ``how``, beside rows that nothing writes to."""

    def __init__(self, how):
        super().__init__()
        self.ok, self.t = nn.Embedding(9, 4), nn.Embedding(9, 4, padding_idx=0)
        self.shared = nn.Parameter(torch.randn(2))
        self.how = how

    def forward(self, ids):
        kept = self.ok(ids[:, 0])
        return torch.cat([kept, self.how(self, ids)], -1), kept


def _scaled(m, ids):
    rows = m.t(ids)
    rows[:, 0].mul_(2.5)
    return rows.sum(1)


def _shared_part(m, ids):
    rows = m.t(ids[:, 1])
    before = rows * 2
    rows[:, :2] = m.shared
    return rows + before


def _bag(m, ids):
    rows = F.embedding_bag(ids, m.t.weight, mode="sum")
    rows[:, :2].add_(1)
    return rows


def _indexed(m, ids):
    rows = m.t.weight[ids[:, 0]]
    rows[1:].clamp_(-0.5, 0.5)
    return rows


@pytest.mark.parametrize("how", [_scaled, _shared_part, _bag, _indexed])
def test_fused_with_the_same_numbers(how):
    torch.manual_seed(0)
    done = rewrite(Written(how), (IDS,), GroupTables())
    assert [n for n in done.before.nodes if packet_name(n) in ("mul_", "copy_", "add_", "clamp_")]
    assert len(done.of("APPLIED")) == 2 and not done.of("SKIPPED")
    assert [t.name for spec in done.specs for t in spec.tables] == ["ok.weight", "t.weight"]
    assert_sound(done)


def test_ids_written_to_keep_the_lookup_as_it_is():
    def how(m, ids):
        ids = ids + 1
        ids[0].sub_(1)
        rows = m.t(ids)
        rows[:, 0].add_(1)
        return rows.sum(1)

    done = rewrite(Written(how), (IDS,), GroupTables())
    assert [r.reason for r in done.of("SKIPPED")] == ["sub_ changes its ids, weights or result in place"]
    assert not [n for n in done.nodes("clone") if packet_name(n.args[0]) == "embedding"]
    assert_sound(done)
