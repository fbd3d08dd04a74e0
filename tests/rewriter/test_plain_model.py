"""What is replaced on the user's own model after ``optimize``: buffers are followed, the rest is an error."""
from __future__ import annotations

import copy
import gc
import weakref

import pytest
import tablewright as tw
import torch
from tablewright.rewriter.errors import CaptureError
from torch import nn


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head, self.norm = nn.Embedding(20, 4), nn.Sequential(nn.Linear(4, 4)), nn.BatchNorm1d(4)
        self.register_buffer("scale", torch.full((4,), 2.0))
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("shift", None)

    def forward(self, ids):
        out = self.norm(self.head(self.table(ids).sum(1))) * self.scale
        return out if self.shift is None else out + self.shift

    def scaled(self, ids):
        return self.table(ids) * self.scale


class Counting(Model):
    def forward(self, ids):
        self.calls = self.calls + 1
        return super().forward(ids) * self.calls


@pytest.fixture
def ids():
    torch.manual_seed(0)
    return torch.randint(20, (6, 3))


def made(ids, cls=Model):
    model = cls()
    twin = copy.deepcopy(model)
    opt = tw.optimize(model, sample_inputs=(ids,))
    torch.testing.assert_close(opt(ids), twin(ids))
    return model, twin, opt


def check(model, twin, opt, ids):
    for _ in range(2):  # the first call looks, the second enters at once
        want, got = twin(ids), opt(ids)
        torch.testing.assert_close(got, want)
        for each, out in ((model, got), (twin, want)):
            each.zero_grad(set_to_none=True)
            out.square().sum().backward()
        for mine, plain in zip(model.parameters(), twin.parameters()):
            torch.testing.assert_close(mine.grad, plain.grad)
    assert type(model) is Counting or opt._variants[-1].enter((ids,), {}) is not None


@pytest.mark.parametrize("value", [torch.full((4,), 3.0), torch.rand(1, 4), torch.tensor(5.0), torch.rand(4, dtype=torch.float64)])
def test_a_buffer_that_is_replaced_is_followed(ids, value):
    model, twin, opt = made(ids)
    for each in (model, twin):
        each.scale = value.clone()
    check(model, twin, opt, ids)
    assert opt.state_dict()["scale"].data_ptr() == model.scale.data_ptr()
    for each in (model, twin):
        each.scale.add_(1)  # shared again
    check(model, twin, opt, ids)


def test_a_buffer_that_was_none_is_followed(ids):
    model, twin, opt = made(ids)
    for each in (model, twin):
        each.shift = torch.ones(4)
    check(model, twin, opt, ids)


def test_converting_the_model_replaces_its_buffers(ids):
    model, twin, opt = made(ids)
    for convert in (nn.Module.double, nn.Module.float):
        for each in (model, twin):
            convert(each)
        check(model, twin, opt, ids)
        assert opt(ids).dtype == model.scale.dtype


def test_methods_that_were_not_captured_follow_too(ids):
    model, _, opt = made(ids)
    model.scale = torch.full((4,), 7.0)
    torch.testing.assert_close(opt.scaled(ids), model.scaled(ids))


def test_saving_loading_and_converting_see_buffers_that_were_replaced(ids):
    model, twin, opt = made(ids)
    model.double()
    assert opt.state_dict()["scale"].dtype == torch.float64
    model.scale = torch.full((4,), 7.0, dtype=torch.float64)
    torch.testing.assert_close(opt.unoptimized()(ids), model(ids))
    model.scale = torch.full((4,), 8.0, dtype=torch.float64)
    opt.load_state_dict(twin.state_dict())
    check(model, twin.double(), opt, ids)
    model.scale = torch.full((4,), 9.0, dtype=torch.float64)
    opt.float()
    assert torch.equal(opt.get_buffer("scale"), torch.full((4,), 9.0))


def test_a_buffer_that_forward_assigns_is_its_own(ids):
    model, twin, opt = made(ids, Counting)
    check(model, twin, opt, ids)
    assert opt.calls == 3 and model.calls == 0
    opt.scale = twin.scale = torch.full((4,), 3.0)  # assigned on the optimized model: its own as well
    check(model, twin, opt, ids)


def test_what_cannot_be_followed_raises(ids):
    for name, change in {
        "'head'": lambda m: setattr(m, "head", nn.Linear(4, 4)), "'head.0'": lambda m: m.head.__setitem__(0, nn.Linear(4, 4)),
        "'norm'": lambda m: setattr(m, "norm", nn.BatchNorm1d(4)), "buffer 'scale'": lambda m: delattr(m, "scale"),
        "'table.weight'": lambda m: setattr(m.table, "weight", nn.Parameter(torch.rand(20, 4))),
    }.items():  # fmt: skip
        model, _, opt = made(ids)
        change(model)
        for _ in range(2):
            with pytest.raises(CaptureError, match=f"{name} of the plain model"):
                opt(ids)


def test_the_plain_model_is_not_kept_alive(ids):
    model, twin, opt = made(ids)
    refs = [weakref.ref(module) for module in model.modules()]
    old = weakref.ref(model.scale)
    del model
    opt.double()
    gc.collect()
    assert not any(ref() is not None for ref in refs) and old() is None
    torch.testing.assert_close(opt(ids), twin.double()(ids))
