"""Real systems in small: retrieval with in-batch negatives, jagged sequences, graph propagation; one graph for every batch size."""
import copy

import pytest
import tablewright as tw
import torch
import torch.nn.functional as F
from torch import nn

ROWS, DIM, LENGTH = 30, 4, 5


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.user, self.item = nn.Embedding(ROWS, DIM), nn.Embedding(ROWS, DIM, padding_idx=0)


class InBatchNegatives(Base):
    """Two towers; the other items of the batch are the negatives, but for the same item again."""

    def forward(self, user, item):
        scores = F.normalize(self.user(user), dim=-1) @ F.normalize(self.item(item), dim=-1).t()
        same = item.unsqueeze(0) == item.unsqueeze(1)
        same.fill_diagonal_(False)
        return F.cross_entropy(scores.masked_fill(same, -1e9), torch.arange(len(user)), reduction="none")


class Jagged(Base):
    """Sequences without their padding through the layers, padded again for the attention, and the last row of each."""

    def __init__(self):
        super().__init__()
        self.mix, self.out = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, 1)

    def forward(self, user, ids):
        mask = ids != 0
        rows = self.item(ids)[mask]
        query, key, value = (self._padded(part, mask) for part in F.silu(self.mix(rows)).chunk(3, -1))
        scores = F.silu(query @ key.transpose(1, 2)) * torch.tril(torch.ones(LENGTH, LENGTH))
        rows = rows + (scores @ value)[mask]
        return self.out(rows[mask.sum(1).cumsum(0) - 1] + self.user(user))

    def _padded(self, rows, mask):
        out = torch.zeros(len(mask), LENGTH, DIM)
        out[mask] = rows
        return out


class Propagation(Base):
    """Embeddings of users and items spread over a sparse graph, as in LightGCN."""

    def __init__(self):
        super().__init__()
        edges = torch.stack([torch.randint(0, ROWS, (60,)), torch.randint(ROWS, 2 * ROWS, (60,))])
        graph = torch.sparse_coo_tensor(torch.cat([edges, edges.flip(0)], 1), torch.full((120,), 0.1), (2 * ROWS, 2 * ROWS), check_invariants=True)
        self.register_buffer("graph", graph.coalesce(), persistent=False)

    def forward(self, user, item):
        layers = [torch.cat([self.user.weight, self.item.weight])]
        for _ in range(2):
            layers.append(torch.sparse.mm(self.graph, layers[-1]))
        users, items = torch.stack(layers, 1).mean(1).split([ROWS, ROWS])
        return (users[user] * items[item]).sum(1)


def pairs(rows):
    return torch.randint(0, ROWS, (rows,)), torch.randint(1, ROWS, (rows,))


def histories(rows):
    lengths = torch.randint(1, LENGTH + 1, (rows, 1))
    return torch.randint(0, ROWS, (rows,)), torch.randint(1, ROWS, (rows, LENGTH)) * (torch.arange(LENGTH) < lengths)


@pytest.mark.parametrize("kind, batch, lookups", [(InBatchNegatives, pairs, 2), (Jagged, histories, 2), (Propagation, pairs, 0)])
def test_one_graph_for_every_batch_size(kind, batch, lookups):
    model = kind()
    plain = copy.deepcopy(model)
    opt = tw.optimize(model, sample_inputs=batch(4))
    assert opt.report.door == "export" and opt.report.coverage["lookups"] == (lookups, lookups)
    for rows in (4, 7, 2, 1):
        given = batch(rows)
        results = []
        for each in (plain, opt):
            each.zero_grad()
            results.append(each(*given))
            results[-1].square().sum().backward()
        torch.testing.assert_close(results[1], results[0])
        for (name, a), b in zip(plain.named_parameters(), opt.parameters()):
            gradients = [g.grad.to_dense() if g.grad.is_sparse else g.grad for g in (b, a)]
            torch.testing.assert_close(*gradients, msg=lambda text, name=name: f"{name}: {text}")
    assert len(opt._variants) <= 2  # a batch of one may need its own
    assert all(variant.captured.door == "export" for variant in opt._variants)
