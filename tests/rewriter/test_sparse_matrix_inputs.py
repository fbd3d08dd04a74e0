"""A sparse matrix as an input of linear layers (rows of features as in a knowledge graph's FM): torch's products take it."""

import copy

import pytest
import tablewright as tw
import torch
from torch import nn

FEATURES = 500


class Model(nn.Module):
    def __init__(self, kind: str):
        super().__init__()
        self.table, self.kind = nn.Embedding(20, 8), kind
        hidden, dropout = (nn.Linear(FEATURES, 16), nn.ReLU()), nn.Dropout(0.5)
        self.first, self.second = nn.Linear(FEATURES, 8), nn.Linear(FEATURES, 8)
        self.layers = nn.Sequential(*hidden, *([dropout] if kind == "dropout" else []), nn.Linear(16, 8))

    def forward(self, rows, ids):
        made = self.first(rows) + self.second(rows) if self.kind == "two" else self.first(rows).relu() if self.kind == "relu" else self.layers(rows)
        return self.table(ids) * made


@pytest.mark.parametrize("kind", ["relu", "two", "layers", "dropout"])
def test_linear_layers_of_a_sparse_matrix_are_the_plain_ones(kind):
    torch.manual_seed(0)
    plain = Model(kind)

    def batch(size):
        return (torch.rand(size, FEATURES) < 0.05).float().to_sparse(), torch.randint(0, 20, (size,))

    opt = tw.optimize(copy.deepcopy(plain), "auto", sample_inputs=batch(64))
    for size in (64, 40):
        args, gradients = batch(size), []
        for model in (plain, opt):
            model.zero_grad()
            torch.manual_seed(1)
            model(*args).pow(2).sum().backward()
            gradients.append({name: p.grad.to_dense() for name, p in model.named_parameters() if p.grad is not None})
        torch.testing.assert_close(*gradients)
