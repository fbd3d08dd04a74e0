"""Whole models trained on the Triton kernels, in Triton's interpreter, beside the plain model. Run by ``test_triton_models.py``.

The tensors are on the CPU; each op is told that its GPU module is the one for them.
"""
from __future__ import annotations

import copy

import pytest
import torch
from tablewright import Plan, RowwiseAdagrad, optimize
from tablewright.kernels.embedding import gpu as embedding_gpu
from tablewright.kernels.embedding import op as embedding
from tablewright.kernels.interaction import gpu as interaction_gpu
from tablewright.kernels.interaction import op as interaction
from tablewright.kernels.lookup_dots import gpu as lookup_dots_gpu
from tablewright.kernels.lookup_dots import op as lookup_dots
from tablewright.kernels.mlp import gpu as mlp_gpu
from tablewright.kernels.mlp import op as mlp
from tablewright.passes import dense_chains
from torch import nn


@pytest.fixture(autouse=True)
def on_triton(monkeypatch):
    """Every op runs its Triton form; ``calls`` says which were asked."""
    calls = set()
    for op, gpu in ((embedding, embedding_gpu), (interaction, interaction_gpu), (lookup_dots, lookup_dots_gpu), (mlp, mlp_gpu)):

        def chosen(device, gpu=gpu):
            calls.add(gpu.__name__.split(".")[-2])
            return gpu

        monkeypatch.setattr(op, "implementation", chosen)
    monkeypatch.setattr(mlp, "_seed", lambda x, layers, train: torch.randint(2**62, (1,)) if any(train) else None)
    monkeypatch.setattr(dense_chains, "LEAST_WORK", 0)
    yield calls
    embedding_gpu.check_ids()


class Model(nn.Module):
    """A DLRM: one id or a bag of ids a table, dropout ``p`` in the upper perceptron."""

    def __init__(self, p, bags):
        super().__init__()
        self.bottom = nn.Sequential(nn.Linear(3, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU())
        kind = (lambda n: nn.EmbeddingBag(n, 8, mode="sum")) if bags else (lambda n: nn.Embedding(n, 8))
        self.tables = nn.ModuleList(kind(n) for n in (30, 4, 11))
        self.top = nn.Sequential(nn.Linear(14, 20), nn.ReLU(), nn.Dropout(p), nn.Linear(20, 1))
        self.bags = bags

    def forward(self, dense, ids):
        x = self.bottom(dense)
        z = torch.stack([x, *(t(ids[:, i : i + 2] if self.bags else ids[:, i]) for i, t in enumerate(self.tables))], 1)
        i, j = torch.tril_indices(4, 4, -1)
        return self.top(torch.cat([x, torch.bmm(z, z.transpose(1, 2))[:, i, j]], 1)).squeeze(1)


def batch(rows, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 3, generator=generator), torch.randint(4, (rows, 4), generator=generator)


PASSES = {name: {"measure": False} for name in ("fuse_dot_interaction", "fuse_lookup_dots", "fuse_mlp", "dense_chains", "fast_dropout")}


def trained(model, optimized, bags):
    """Losses and parameters after three steps."""
    optim = torch.optim.Adagrad(model.parameters(), lr=0.1)
    run = model
    if optimized:
        run, optim = optimize(model, Plan(passes=PASSES), optimizer=optim, sample_inputs=batch(6, 0))
        assert ("lookup_dots" in run.code()) == (not bags) and "mlp" in run.code() and "embedding_bags" in run.code()
    losses = []
    for seed, rows in ((1, 6), (2, 5), (3, 1)):
        loss = run(*batch(rows, seed)).square().mean()
        optim.zero_grad()
        loss.backward()
        optim.step()
        losses.append(loss.detach())
    return [*losses, *(p.detach() for p in model.parameters())]


@pytest.mark.parametrize("bags", [False, True], ids=["one id", "bags"])
def test_training_is_that_of_the_plain_model(bags, on_triton, monkeypatch):
    """Without drops: dropout's mask is of another stream on a GPU, so it keeps everything here."""
    monkeypatch.setattr(mlp_gpu, "_keep", lambda seed, bits, layer, p: bits.fill_(-1))
    torch.manual_seed(0)
    plain = Model(1e-9, bags)
    ours = copy.deepcopy(plain)
    for made, want in zip(trained(ours, True, bags), trained(plain, False, bags), strict=True):
        torch.testing.assert_close(made, want, rtol=2e-5, atol=2e-5)
    assert on_triton == {"embedding", "mlp", *(["interaction"] if bags else ["lookup_dots"])}


def test_rowwise_adagrad_in_the_backward_and_drops_that_follow_the_seed():
    results = []
    for again in range(3):
        torch.manual_seed(0)
        model = Model(0.5, False)
        plan = Plan(passes=PASSES, embedding_optimizer=RowwiseAdagrad(lr=0.1, eps=1e-8, in_backward=True))
        opt = optimize(model, plan, sample_inputs=batch(6, 0))
        before = [t.weight.detach().clone() for t in model.tables]
        torch.manual_seed(5 if again < 2 else 6)
        opt(*batch(6, 1)).square().mean().backward()
        looked_up = batch(6, 1)[1]
        for i, (was, table) in enumerate(zip(before, model.tables)):
            moved = (was != table.weight).any(1)
            assert moved.any() and set(moved.nonzero().flatten().tolist()) <= set(looked_up[:, i].tolist())
        results.append([t.weight.detach() for t in model.tables])
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[1]))
    assert not all(torch.equal(a, b) for a, b in zip(results[0], results[2]))
