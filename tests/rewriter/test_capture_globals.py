"""Python globals and closure variables that a model reads are guarded: a changed one recaptures, it never runs the stale graph."""
from __future__ import annotations

import sys
import types

import pytest
import tablewright as tw
import torch
from tablewright.rewriter.capture.globals_read import globals_read
from torch import nn

TEMPERATURE = 2.0
UNREAD = 1.0
CONFIG = types.ModuleType("made_up_config")
CONFIG.__file__ = __file__
CONFIG.ALPHA = 1.0


def _scaled(x):
    return x * FACTOR


FACTOR = 3.0


def _model(bias: float = 0.5):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(10, 4)

        def forward(self, ids):
            return _scaled(self.table(ids).sum(1)) / TEMPERATURE + CONFIG.ALPHA + bias

    def change(value):
        nonlocal bias
        bias = value

    torch.manual_seed(0)
    return Net(), change


def test_what_is_found():
    model, _ = _model()
    names = [g.label.split("'")[1] for g in globals_read(model)]
    assert sorted(names) == ["CONFIG.ALPHA", "FACTOR", "TEMPERATURE", "bias"]


@pytest.mark.parametrize("name", ["TEMPERATURE", "FACTOR", "CONFIG.ALPHA", "bias"])
def test_a_changed_one_is_followed(name, monkeypatch):
    model, change = _model()
    ids = torch.arange(6).reshape(3, 2)
    opt = tw.optimize(model, sample_inputs=(ids,))
    before = opt(ids)
    torch.testing.assert_close(before, model(ids))
    if name == "bias":
        change(7.0)
    else:
        monkeypatch.setattr(*((CONFIG, "ALPHA") if "." in name else (sys.modules[__name__], name)), 7.0)
    torch.testing.assert_close(opt(ids), model(ids))
    assert not torch.allclose(opt(ids), before)
    assert len(opt._variants) == 2
    opt(ids)
    assert len(opt._variants) == 2


def test_a_global_that_is_gone_is_named(monkeypatch):
    model, _ = _model()
    found = next(g for g in globals_read(model) if "TEMPERATURE" in g.label)
    assert found.changed() is None
    monkeypatch.delattr(sys.modules[__name__], "TEMPERATURE")
    assert "gone now" in found.changed()


def test_libraries_are_not_walked():
    assert globals_read(nn.Sequential(nn.Linear(2, 2), nn.ReLU())) == []


SETTINGS = {"scale": 2.0, "shifts": [1.0, 2.0]}
NAMESPACE = types.SimpleNamespace(power=2)
TABLE = torch.ones(4)


class ReadsSettings(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(10, 4)

    def forward(self, ids):
        return (self.table(ids).sum(1) * SETTINGS["scale"] + SETTINGS["shifts"][0]) ** NAMESPACE.power * TABLE


@pytest.mark.parametrize("what", ["dict", "list in it", "namespace", "tensor in place", "tensor replaced"])
def test_settings_that_change_inside(what, monkeypatch):
    model, ids = ReadsSettings(), torch.arange(6).reshape(3, 2)
    opt = tw.optimize(model, sample_inputs=(ids,))
    torch.testing.assert_close(opt(ids), model(ids))
    if what == "dict":
        monkeypatch.setitem(SETTINGS, "scale", 5.0)
    elif what == "list in it":
        SETTINGS["shifts"][0] += 7.0
    elif what == "namespace":
        monkeypatch.setattr(NAMESPACE, "power", 3)
    elif what == "tensor in place":
        TABLE.mul_(3)
    else:
        monkeypatch.setattr(sys.modules[__name__], "TABLE", torch.full((4,), 5.0))
    torch.testing.assert_close(opt(ids), model(ids))
