"""Dice activations as four packages write them, train and eval mode with their batch norms' statistics, and look-alikes."""
from __future__ import annotations

import copy

import pytest
import tablewright as tw
import torch
from pass_harness import assert_sound, rewrite
from tablewright.passes.fuse_dice import FuseDice
from torch import nn

FUSE = FuseDice(measure=False)
WIDTH = 5


class Dice(nn.Module):
    """``how(x, p, alpha)`` with ``p = sigmoid(batch_norm(x))``; ``turned``: x is a sequence, normalized as [batch, channels, length]."""

    def __init__(self, how, turned=False, alpha=None):
        super().__init__()
        self.before, self.bn, self.how, self.turned = nn.Linear(4, WIDTH, bias=False), nn.BatchNorm1d(WIDTH), how, turned
        self.alpha = nn.Parameter(torch.randn((WIDTH, 1) if turned else alpha or (WIDTH,)))

    def forward(self, x):
        x = self.before(x)
        x = x.transpose(1, 2) if self.turned else x
        out = self.how(x, torch.sigmoid(self.bn(x)), self.alpha)
        return out.transpose(1, 2) * 2 if self.turned else out * 2


SPELLINGS = {
    "FuxiCTR": lambda x, p, a: p * x + a * (1 - p) * x,
    "DeepCTR": lambda x, p, a: a * (1 - p) * x + p * x,
    "torch-rechub": lambda x, p, a: p * x + (1 - p) * a * x,
    "other order": lambda x, p, a: x * p + x * (a * (1 - p)),
}
HARMLESS = SPELLINGS["FuxiCTR"]


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("how", SPELLINGS.values(), ids=SPELLINGS)
def test_spellings(how, turned):
    torch.manual_seed(0)
    done = rewrite(Dice(how, turned), (torch.randn(6, 3, 4) if turned else torch.randn(6, 4),), FUSE)
    assert len(done.of("APPLIED")) == 1 and len(done.nodes("dice")) == 1 and not done.nodes("sigmoid")
    assert len(done.nodes("batch_norm")) == 1 and not done.nodes("transpose")
    assert_sound(done)


@pytest.mark.parametrize("turned", [False, True])
def test_running_statistics(turned):
    """Training moves them as in the plain model, and eval mode reads them; at other sizes than the sample's."""
    torch.manual_seed(0)
    plain = Dice(HARMLESS, turned)
    other = copy.deepcopy(plain)
    shape = (6, 3, 4) if turned else (6, 4)
    opt = tw.optimize(other, tw.Plan(passes={"fuse_dice": {"measure": False}}), sample_inputs=(torch.randn(shape),))
    assert opt.report.coverage["activations"] == (1, 1)
    for size in (4, 7, 2):
        x = torch.randn(size, *((size + 1,) if turned else ()), 4)
        torch.testing.assert_close(opt(x), plain(x))
        torch.testing.assert_close(other.bn.running_var, plain.bn.running_var)
        torch.testing.assert_close(other.bn.running_mean, plain.bn.running_mean)
    x = torch.randn(shape)
    torch.testing.assert_close(opt.eval()(x), plain.eval()(x))


@pytest.mark.parametrize("alpha", [(1,), (), (1, WIDTH)])
def test_shapes_of_alpha(alpha):
    done = rewrite(Dice(HARMLESS, alpha=alpha), (torch.randn(6, 4),), FUSE)
    assert done.nodes("dice")
    assert_sound(done)


class NoTurnBack(Dice):
    def forward(self, x):
        x = self.before(x).transpose(1, 2)
        return self.how(x, torch.sigmoid(self.bn(x)), self.alpha).sum(2)


def test_a_sequence_that_stays_turned():
    done = rewrite(NoTurnBack(HARMLESS, True), (torch.randn(6, 3, 4),), FUSE)
    assert done.nodes("dice") and done.nodes("transpose")
    assert_sound(done)


LOOK_ALIKES = {
    "2 - p": lambda x, p, a: p * x + a * (2 - p) * x,
    "another x": lambda x, p, a: p * x + a * (1 - p) * x.abs(),
    "another p": lambda x, p, a: p * x + a * (1 - p.abs()) * x,
    "no alpha": lambda x, p, a: p * x + (1 - p) * x * x,
    "p is read again": lambda x, p, a: p * x + a * (1 - p) * x + p,
    "a difference": lambda x, p, a: p * x - a * (1 - p) * x,
    "x twice": lambda x, p, a: p * p + a * (1 - p) * p,
}


@pytest.mark.parametrize("how", LOOK_ALIKES.values(), ids=LOOK_ALIKES)
def test_look_alikes(how):
    torch.manual_seed(0)
    done = rewrite(Dice(how), (torch.randn(6, 4),), FUSE)
    assert not done.nodes("dice")
    assert_sound(done)


def test_budget_and_missing_inputs():
    assert rewrite(Dice(HARMLESS), (torch.randn(6, 4),), FUSE, budget=0).of("DISABLED")
    assert not rewrite(Dice(HARMLESS), None, FUSE).of("APPLIED")
