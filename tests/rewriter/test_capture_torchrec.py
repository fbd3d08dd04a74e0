"""Models written with TorchRec's collections and KeyedJaggedTensor, as input. They need torchrec, which the tests do not install."""
import copy

import pytest
import tablewright as tw
import torch
from torch import nn

torchrec = pytest.importorskip("torchrec", reason="torchrec is not installed: models written with it are NOT tested here")
KEYS = ["a", "b", "c"]


def jagged(rows, weighted=False):
    lengths = torch.randint(0, 4, (len(KEYS) * rows,))
    count = int(lengths.sum())
    return torchrec.KeyedJaggedTensor.from_lengths_sync(
        keys=KEYS, values=torch.randint(0, 20, (count,)), lengths=lengths, weights=torch.rand(count) if weighted else None)


def bags(weighted=False):
    config, pooling = torchrec.EmbeddingBagConfig, torchrec.PoolingType
    tables = [config(name="first", embedding_dim=4, num_embeddings=30, feature_names=["a", "b"]),
              config(name="second", embedding_dim=8, num_embeddings=20, feature_names=["c"],
                     pooling=pooling.SUM if weighted else pooling.MEAN)]
    return torchrec.EmbeddingBagCollection(tables=tables, is_weighted=weighted)


class Pooled(nn.Module):
    def __init__(self, weighted=False):
        super().__init__()
        self.bags, self.over = bags(weighted), nn.Linear(3 + 16, 1)

    def forward(self, dense, features):
        return self.over(torch.cat([dense, self.bags(features).values()], 1)).squeeze(-1)


class Built(Pooled):
    """The KeyedJaggedTensor is made inside forward from one id of each feature."""

    def forward(self, dense, ids):
        features = torchrec.KeyedJaggedTensor(
            keys=KEYS, values=ids.t().reshape(-1), lengths=torch.ones(ids.numel(), dtype=torch.int64))
        return super().forward(dense, features)


class Keyed(Pooled):
    """Reads single features out of the KeyedTensor."""

    def forward(self, dense, features):
        pooled = self.bags(features).to_dict()
        return self.over(torch.cat([dense, pooled["c"], pooled["a"] * pooled["b"], pooled["a"]], 1)).squeeze(-1)


class Sequence(nn.Module):
    def __init__(self):
        super().__init__()
        config = torchrec.EmbeddingConfig
        self.rows = torchrec.EmbeddingCollection(tables=[
            config(name="first", embedding_dim=4, num_embeddings=30, feature_names=["a", "b"]),
            config(name="second", embedding_dim=4, num_embeddings=20, feature_names=["c"])])

    def forward(self, features):
        return torch.cat([each.values() for each in self.rows(features).values()]).square().sum(1)


CASES = {
    "bags": (Pooled, lambda rows: (torch.rand(rows, 3), jagged(rows)), 3),
    "weighted bags": (lambda: Pooled(True), lambda rows: (torch.rand(rows, 3), jagged(rows, True)), 3),
    "built in forward": (Built, lambda rows: (torch.rand(rows, 3), torch.randint(0, 20, (rows, 3))), 3),
    "keyed tensor": (Keyed, lambda rows: (torch.rand(rows, 3), jagged(rows)), 3),
    "sequences": (Sequence, lambda rows: (jagged(rows),), 3),
}


@pytest.mark.parametrize("name", CASES)
def test_trains_as_plain(name):
    make, batch, lookups = CASES[name]
    model = make()
    plain = copy.deepcopy(model)
    theirs = torch.optim.Adagrad(plain.parameters(), lr=0.1)
    opt, mine = tw.optimize(model, optimizer=torch.optim.Adagrad(model.parameters(), lr=0.1), sample_inputs=batch(6))
    assert opt.report.pieces == 1, opt.report
    assert opt.report.coverage["lookups"] == (lookups, lookups), opt.report.table()
    for rows in (6, 9, 1, 4):
        given = batch(rows)
        for each, optim in ((plain, theirs), (opt, mine)):
            optim.zero_grad()
            each(*given).square().sum().backward()
            optim.step()
        for (key, a), b in zip(plain.named_parameters(), opt.parameters()):
            torch.testing.assert_close(b, a, atol=1e-5, rtol=1e-4, msg=lambda text, key=key: f"{key}: {text}")
    plain.eval(), opt.eval()
    with torch.no_grad():
        torch.testing.assert_close(opt(*given), plain(*given))
    plain.load_state_dict(opt.state_dict())
