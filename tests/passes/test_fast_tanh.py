"""tanh made faster: equal to the plain model in train() and eval(), decided by what is measured, skips with reasons."""
from __future__ import annotations

import pytest
import torch
from pass_harness import assert_sound, rewrite
from tablewright.kernels.tanh import cpu, op
from tablewright.passes import measure
from tablewright.passes.fast_tanh import FastTanh
from torch import nn

FUSE = FastTanh(measure=False)
needs_library = pytest.mark.skipif(not cpu.available(), reason=f"NOT TESTED: {cpu.describe()}")


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 6)

    def forward(self, x):
        return torch.tanh(self.a(x) * x.tanh())


@needs_library
@pytest.mark.parametrize("rows", [64, 1, 0])
def test_equal(rows):
    done = rewrite(Model(), (torch.randn(rows, 6),), FUSE)
    assert len(done.of("APPLIED")) == 2 and len([n for n in done.after.nodes if n.target is op.OP]) == 2
    assert not [n for n in done.after.nodes if n.target is torch.ops.aten.tanh.default]
    assert_sound(done)


@needs_library
@pytest.mark.parametrize("gain, status", [(2.0, "APPLIED"), (1.0, "SKIPPED")])
def test_what_is_measured_decides(monkeypatch, gain, status):
    monkeypatch.setattr(measure, "_time", lambda modules, inputs: measure.Timing(gain * 1e-3, 1e-3, measure.ROWS))
    done = rewrite(Model(), (torch.randn(6, 6),), FastTanh())
    assert len(done.of(status)) == 2 == len(done.records) and done.context.timings


@pytest.mark.parametrize(("model", "given", "words"), [(Model().double(), (torch.randn(4, 6, dtype=torch.float64),), "float64 on cpu"), (Model(), None, "not known without sample_inputs")], ids=["float64", "no inputs"])
def test_skips(model, given, words):
    done = rewrite(model, given, FUSE)
    assert len(done.of("SKIPPED")) == 2 and all(words in r.reason for r in done.records)
    assert_sound(done, exact=True)


def test_without_the_library(monkeypatch):
    monkeypatch.setattr(cpu, "_lib", None)
    monkeypatch.setattr(cpu, "_why_not", "not built")
    done = rewrite(Model(), (torch.randn(4, 6),), FUSE)
    assert len(done.of("SKIPPED")) == 2 and "not built" in done.records[0].reason


@needs_library
def test_budget():
    done = rewrite(Model(), (torch.randn(64, 6),), FUSE, budget=1)
    assert len(done.of("APPLIED")) == len(done.of("DISABLED")) == 1
