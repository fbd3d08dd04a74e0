"""A small model with some lookups, whose last step a test gives: for the passes that fuse interactions."""
from __future__ import annotations

import torch
from pass_harness import Rewritten, assert_sound, rewrite
from tablewright.passes.feature_pairs import InteractionPass
from torch import nn

F, D = 4, 6
IDS = torch.tensor([[0, 1, 2, 3], [3, 3, 0, 19], [19, 0, 5, 5], [7, 8, 9, 0], [1, 1, 1, 1]])
ROWS = [i for i in range(F) for j in range(i + 1, F)]
COLS = [j for i in range(F) for j in range(i + 1, F)]


class Lookups(nn.Module):
    """``how(self, rows, x)``: the lookups as a list of [batch, D] and as [batch, F, D]."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.tables = nn.ModuleList(nn.Embedding(20, D) for _ in range(F))
        self.dense = nn.Linear(D, 3)
        self.fields = nn.ModuleList(nn.Linear(D, D) for _ in range(F))
        self.triangle = torch.triu_indices(F, F, 1)
        self.register_buffer("mask", torch.triu(torch.ones(F, F), 1).bool())
        self.stored_mask = nn.Parameter(torch.triu(torch.ones(F, F), 1).bool(), requires_grad=False)

    def forward(self, ids):
        rows = [table(ids[:, i]) for i, table in enumerate(self.tables)]
        return self.how(self, rows, torch.stack(rows, 1))


def fused(how, item: InteractionPass, ids: torch.Tensor = IDS) -> Rewritten:
    """The rewritten model, checked for sound structure and equal outputs and gradients."""
    done = rewrite(Lookups(how), (ids,), item)
    assert_sound(done)
    return done
