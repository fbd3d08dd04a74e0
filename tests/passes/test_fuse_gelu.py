"""GELU in its written forms, look-alikes that stay, and what is refused with a reason."""
from __future__ import annotations

import math

import pytest
import torch
from pass_harness import assert_sound, rewrite
from tablewright.passes.fuse_gelu import FuseGelu
from torch import nn
from torch.nn import functional as F

FUSE = FuseGelu(measure=False)
ROOT = math.sqrt(2 / math.pi)

FORMS = {
    "erf": lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))),
    "erf, other order": lambda x: (torch.erf(x * math.sqrt(0.5)) + 1) * (0.5 * x),
    "halved at the end": lambda x: x * (1 + torch.erf(x / 2**0.5)) / 2,
    "tanh": lambda x: 0.5 * x * (1 + torch.tanh(ROOT * (x + 0.044715 * torch.pow(x, 3)))),
    "tanh, x x x": lambda x: 0.5 * x * (1 + torch.tanh(ROOT * (x + 0.044715 * x * x * x))),
}


class Layer(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.form, self.into, self.out = form, nn.Linear(6, 9), nn.Linear(9, 2)

    def forward(self, x):
        return self.out(self.form(self.into(x)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows", [5, 1, 0])
def test_forms(form, rows):
    torch.manual_seed(0)
    done = rewrite(Layer(FORMS[form]), (4 * torch.randn(rows, 6),), FUSE)
    (node,) = done.nodes("gelu")
    assert node.kwargs["approximate"] == ("tanh" if "tanh" in form else "none")
    assert [r.kind for r in done.of("APPLIED")] == ["activations"] and not done.nodes("erf") and not done.nodes("tanh") and not done.nodes("mul")
    assert_sound(done)


@pytest.mark.parametrize("form", FORMS)
def test_numbers_in_float64(form):
    x = torch.linspace(-12, 12, 4001, dtype=torch.float64, requires_grad=True)
    approximate = "tanh" if "tanh" in form else "none"
    results = [FORMS[form](x), F.gelu(x, approximate=approximate)]
    gradients = [torch.autograd.grad(r.sum(), x)[0] for r in results]
    torch.testing.assert_close(*results, atol=1e-13, rtol=1e-12)
    torch.testing.assert_close(*gradients, atol=1e-13, rtol=1e-12)


@pytest.mark.parametrize(
    "form",
    [
        lambda x: x * 0.5 * (1 + torch.erf(x / 1.4142)),
        lambda x: x * (1 + torch.erf(x / math.sqrt(2))),
        lambda x: x * 0.5 * (2 + torch.erf(x / math.sqrt(2))),
        lambda x: x.relu() * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
        lambda x: 0.5 * x * (1 + torch.tanh(ROOT * (x + 0.0447 * x**3))),
        lambda x: 0.5 * x * (1 + torch.tanh(ROOT * (x + 0.044715 * x**2))),
        lambda x: 0.5 * x * (1 - torch.erf(x / math.sqrt(2))),
        lambda x: 0.5 * x * torch.add(1, torch.erf(x / math.sqrt(2)), alpha=2),
        F.gelu,
    ],
    ids=["1.4142", "not halved", "2 + erf", "another x", "0.0447", "squared", "minus", "twice erf", "gelu"],
)
def test_look_alikes_stay(form):
    done = rewrite(Layer(form), (torch.randn(4, 6),), FUSE)
    assert not done.records and [str(n) for n in done.after.nodes] == [str(n) for n in done.before.nodes]


def shared(x):
    gate = 1 + torch.erf(x / math.sqrt(2))
    return x * 0.5 * gate + gate


def changed(x):
    x = x.clone()
    y = x / math.sqrt(2)
    x.add_(1)
    return x * 0.5 * (1 + torch.erf(y))


def test_one_of_another():
    gelu = FORMS["erf"]
    done = rewrite(Layer(lambda x: gelu(gelu(x))), (torch.randn(4, 6),), FUSE)
    assert len(done.of("APPLIED")) == len(done.nodes("gelu")) == 2
    assert_sound(done)


def test_a_step_that_is_read_elsewhere():
    done = rewrite(Layer(shared), (torch.randn(4, 6),), FUSE)
    (row,) = done.of("SKIPPED")
    assert "also read by add" in row.reason and not done.nodes("gelu")


def test_what_is_written_between():
    done = rewrite(Layer(changed), (torch.randn(4, 6),), FUSE)
    assert not done.of("APPLIED") and not done.nodes("gelu")
    assert all("written to in place" in r.reason for r in done.records)


def test_budget_and_missing_inputs():
    assert len(rewrite(Layer(FORMS["erf"]), (torch.randn(4, 6),), FUSE, budget=0).of("DISABLED")) == 1
    (row,) = rewrite(Layer(FORMS["erf"]), None, FUSE).of("SKIPPED")
    assert "sample_inputs" in row.reason
