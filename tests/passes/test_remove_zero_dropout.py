"""Dropouts with p = 0 go; all others stay and say so."""
from __future__ import annotations

import torch
from pass_harness import assert_sound, rewrite
from tablewright.passes.remove_zero_dropout import RemoveZeroDropout
from torch import nn


class Layers(nn.Module):
    def __init__(self, *probabilities: float, inplace: bool = False):
        super().__init__()
        layers = [m for p in probabilities for m in (nn.Linear(3, 3), nn.Dropout(p, inplace=inplace))]
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return self.layers(x)


X = torch.randn(4, 3)


def test_removes_zero_and_keeps_the_rest_with_the_reason():
    done = rewrite(Layers(0.0, 0.5, 0.0), (X,), RemoveZeroDropout())
    assert [(r.kind, r.subject) for r in done.of("APPLIED")] == [("dropouts", "layers.1"), ("dropouts", "layers.5")]
    (kept,) = done.of("SKIPPED")
    assert (kept.subject, kept.reason) == ("layers.3", "dropout with p=0.5 drops values; only p=0 does nothing")
    assert kept.location
    assert len(done.nodes("dropout")) == 1
    assert_sound(done, exact=True)


def test_the_random_stream_is_the_same():
    """The mask of the dropout that stays is the same mask: ``assert_sound`` compares bits under one random state, in train mode."""
    done = rewrite(Layers(0.0, 0.5), (torch.randn(50, 3),), RemoveZeroDropout())
    assert done.of("APPLIED")
    assert_sound(done, exact=True)


def test_an_integer_zero_and_an_in_place_one():
    for model in (Layers(0), Layers(0.0, inplace=True)):
        done = rewrite(model, (X,), RemoveZeroDropout())
        assert len(done.nodes("dropout")) + len(done.nodes("dropout_")) == (0 if done.of("APPLIED") else 1)
        assert_sound(done, exact=True)
    assert rewrite(Layers(0), (X,), RemoveZeroDropout()).of("APPLIED")


def test_one_as_a_probability_is_not_zero():
    done = rewrite(Layers(1.0), (X,), RemoveZeroDropout())
    assert not done.of("APPLIED") and len(done.nodes("dropout")) == 1


def test_the_models_output_may_be_the_dropout():
    done = rewrite(Layers(0.0), (X,), RemoveZeroDropout())
    (out,) = (n for n in done.after.nodes if n.op == "output")
    assert out.args[0][0].name == done.nodes("linear")[0].name
