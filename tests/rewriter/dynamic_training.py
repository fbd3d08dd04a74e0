"""A model whose ids are any 64-bit numbers, and the loop that trains it."""
from __future__ import annotations

import tablewright as tw
import torch
from torch import nn

PADDING = 3
VOCABULARY = torch.randint(-(2**63), 2**63 - 1, (300,), generator=torch.Generator().manual_seed(5))
VOCABULARY[0], VOCABULARY[1], VOCABULARY[2] = PADDING, -1, 2**63 - 1


class Model(nn.Module):
    """``query`` and ``asked`` are one table with an id that is left out; ``words`` has bags."""

    def __init__(self, rows=10, device=None):
        super().__init__()
        self.query = nn.Embedding(rows, 8, padding_idx=PADDING, device=device)
        self.asked = nn.Embedding(rows, 8, padding_idx=PADDING, device=device)
        self.asked.weight = self.query.weight
        self.words = nn.EmbeddingBag(rows, 8, mode="mean", device=device)
        self.user = nn.EmbeddingBag(500, 8, mode="sum")
        self.top = nn.Linear(40, 1)

    def forward(self, query, words, user):
        mask = (query != PADDING).float().unsqueeze(2)  # made of the ids themselves
        asked = (self.asked(query.flip(0)) * 2).sum(1) + mask.sum(1)
        return self.top(torch.cat([self.query(query).flatten(1), self.words(words), self.user(user), asked], 1)).squeeze(1)


def batch(step):
    g = torch.Generator().manual_seed(step)
    query, words = ((torch.rand(32, n, generator=g) ** 3 * 300).long() for n in (2, 4))
    return VOCABULARY[query], VOCABULARY[words], torch.randint(0, 500, (32, 3), generator=g), torch.rand(32, generator=g)


def plan(optimizer=None, **ids):
    table = {"ids": {"dynamic": True, "capacity": 400, "init": {"normal": [0, 0.5]}, "seed": 9, **ids}}
    more = {} if optimizer is None else {"embedding_optimizer": optimizer}
    return tw.Plan.from_dict({"version": 1, "tables": {"query": table, "words": table}, **more})


def made(the_plan=None, optimizer=None, model=None):
    torch.manual_seed(0)
    model = Model() if model is None else model
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1, initial_accumulator_value=0.1) if optimizer is None else optimizer(model.parameters())
    return tw.optimize(model, the_plan or plan(), optimizer=optimizer, sample_inputs=batch(0)[:3])


def train(opt, optimizer, first, last, at=batch):
    for step in range(first, last):
        *inputs, wanted = at(step)
        ((opt(*inputs) - wanted) ** 2).mean().backward()
        if optimizer is not None:
            optimizer.step()
        opt.zero_grad()
