"""A call that has to capture again may come from any thread, under inference mode, or inside a checkpoint."""
from __future__ import annotations

import copy
import threading

import pytest
import tablewright as tw
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class Branches(nn.Module):
    """Another graph in each mode; FM, layers on one input and a batch norm, so that passes have something to measure."""

    def __init__(self):
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(20, 8) for _ in range(4))
        self.a, self.b, self.norm = nn.Linear(8, 16), nn.Linear(8, 16), nn.BatchNorm1d(16)

    def forward(self, ids):
        x = torch.stack([table(ids[:, i]) for i, table in enumerate(self.tables)], 1)
        second = 0.5 * (x.sum(1) ** 2 - (x**2).sum(1))
        hidden = self.norm(torch.relu(self.a(second)) + self.b(second))
        return hidden * 2 if self.training else hidden


def made():
    torch.manual_seed(0)
    model, ids = Branches(), torch.randint(20, (6, 4))
    return model, tw.optimize(model, sample_inputs=(ids,)), ids


def test_inference_mode():
    model, opt, ids = made()
    opt.eval()
    other = copy.deepcopy(model).eval()
    with torch.inference_mode():
        found = opt(ids.clone())
        fresh = tw.optimize(other, sample_inputs=(ids.clone(),))(ids)
    model.eval()
    torch.testing.assert_close(found, model(ids))
    torch.testing.assert_close(fresh, model(ids))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant):
    model, opt, ids = made()
    opt.eval()
    model.eval()
    dense = torch.zeros((), requires_grad=True)
    loss = checkpoint(lambda d: opt(ids).square().sum() + d, dense, use_reentrant=reentrant)
    loss.backward()
    mine = [p.grad.to_dense().clone() for p in opt.parameters()]
    opt.zero_grad()
    model(ids).square().sum().backward()
    for grad, p in zip(mine, model.parameters()):
        torch.testing.assert_close(grad, p.grad, rtol=1e-4, atol=1e-4)


def test_threads():
    model, opt, ids = made()
    opt.eval()
    model.eval()
    wanted, found, errors = model(ids), [], []

    def call():
        try:
            found.append(opt(ids))
        except BaseException as error:  # whatever it is, the test must see it
            errors.append(error)

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and len(found) == 4
    for each in found:
        torch.testing.assert_close(each, wanted)
    assert len(opt._variants) == 2


@pytest.mark.parametrize("plan", [tw.Plan(), tw.Plan(passes={"group_tables": False})])
def test_other_threads_run_while_one_captures(plan):
    """A capture gives the modules other classes and modes, which the graphs of other threads must not read."""
    torch.manual_seed(0)
    model, ids = nn.Sequential(nn.Embedding(20, 8), nn.Flatten(), nn.BatchNorm1d(32), nn.Linear(32, 4)).eval(), torch.randint(20, (6, 4))
    opt, wanted, statistics = tw.optimize(model, plan, sample_inputs=(ids,)), model(ids), model[2].running_mean.clone()
    found, errors, over = [], [], threading.Event()

    def call():
        try:
            while not over.is_set():
                found.append(opt(ids))
        except BaseException as error:  # whatever it is, the test must see it
            errors.append(error)

    threads = [threading.Thread(target=call) for _ in range(2)]
    for thread in threads:
        thread.start()
    for form in (ids.int(), ids[:, None].clone()[:, 0], ids.int()):
        for _ in range(5):
            del opt._variants[1:]
            torch.testing.assert_close(opt(form), wanted)
    over.set()
    for thread in threads:
        thread.join()
    assert not errors and found
    for each in found:
        torch.testing.assert_close(each, wanted)
    assert torch.equal(model[2].running_mean, statistics)
