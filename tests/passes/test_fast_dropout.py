"""Dropouts with faster draws: the same bits from the same seed, train() and eval() followed, skips with reasons."""
from __future__ import annotations

import pytest
import torch
from pass_harness import assert_sound, rewrite
from tablewright.kernels.dropout import cpu
from tablewright.passes import measure
from tablewright.passes.fast_dropout import FastDropout
from torch import nn
from torch.nn import functional as F

FUSE = FastDropout(measure=False)
needs_library = pytest.mark.skipif(not cpu.available(), reason=f"NOT TESTED: {cpu.describe()}, or another random stream here")


class Model(nn.Module):
    def __init__(self, p=0.4):
        super().__init__()
        self.a, self.drop, self.p = nn.Linear(60, 60), nn.Dropout(p), p

    def forward(self, x):
        return F.dropout(self.drop(self.a(x)).relu(), self.p, self.training)


@needs_library
@pytest.mark.parametrize("rows", [64, 1, 0])
def test_same_bits_in_train_and_eval(rows):
    done = rewrite(Model(), (torch.randn(rows, 60),), FUSE)
    assert len(done.of("APPLIED")) == 2
    assert not [n for n in done.after.nodes if n.target is torch.ops.aten.dropout.default]
    assert_sound(done, exact=True)


@needs_library
@pytest.mark.parametrize("gain, status", [(2.0, "APPLIED"), (1.0, "SKIPPED")])
def test_what_is_measured_decides(monkeypatch, gain, status):
    monkeypatch.setattr(measure, "_time", lambda modules, inputs: measure.Timing(gain * 1e-3, 1e-3, measure.ROWS))
    done = rewrite(Model(), (torch.randn(6, 60),), FastDropout())
    assert len(done.of(status)) == 2 == len(done.records) and done.context.timings


@pytest.mark.parametrize(
    ("model", "given", "words"),
    [
        (Model(1.0), (torch.randn(4, 60),), "draws nothing"),
        (Model().double(), (torch.randn(4, 60, dtype=torch.float64),), "float64 on cpu"),
        (Model(), None, "not known without sample_inputs"),
    ],
    ids=["p=1", "float64", "no inputs"],
)
def test_skips(model, given, words):
    done = rewrite(model, given, FUSE)
    assert len(done.of("SKIPPED")) == 2 and all(words in r.reason for r in done.records)
    assert_sound(done, exact=True)


def test_another_stream_is_left_alone(monkeypatch):
    monkeypatch.setattr(cpu, "available", lambda: False)
    done = rewrite(Model(), (torch.randn(4, 60),), FUSE)
    assert len(done.of("SKIPPED")) == 2 and "not those of this PyTorch" in done.records[0].reason


@needs_library
def test_budget():
    done = rewrite(Model(), (torch.randn(64, 60),), FUSE, budget=1)
    assert len(done.of("APPLIED")) == len(done.of("DISABLED")) == 1
