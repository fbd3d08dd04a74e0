"""Measured passes, at a batch of training size: what is faster is made, what is slower is skipped with the figures, and nothing of the model changes."""
from __future__ import annotations

import copy
import time
from dataclasses import dataclass

import pytest
import torch
from pass_harness import rewrite
from tablewright.kernels.library import LIBRARY
from tablewright.passes import measure
from tablewright.passes.graph import aten, is_op
from tablewright.passes.measure import Measured
from tablewright.passes.records import APPLIED, SKIPPED, record
from torch import nn

LIBRARY.define("test_slow_relu(Tensor x, int millis) -> Tensor")


@torch.library.register_fake("tablewright::test_slow_relu", lib=LIBRARY)
def _fake(x, millis):
    return torch.empty_like(x)


def _slow_relu(x, millis):
    time.sleep(millis / 1000)
    return torch.relu(x)


LIBRARY.impl("test_slow_relu", _slow_relu, "CompositeImplicitAutograd")
SLOW = torch.ops.tablewright.test_slow_relu.default


@dataclass
class SwapRelu(Measured):
    """relu -> a relu that takes 20 ms; sigmoid(-x) chains the other way round."""

    name = "swap_relu"
    kind = "relus"

    def run(self, context):
        records = []
        for node in list(context.graph.nodes):
            if not is_op(node, aten.relu.default):
                continue

            def edit(editor, copy_of, node=node):
                relu = copy_of[node]
                editor.replace(relu, editor.call(SLOW, relu.args[0], 20, before=relu, sources=[relu], value=relu.meta.get("val")))

            why = self.no_gain(context, [node], edit)
            if why is None:
                from tablewright.passes.graph import Editor

                edit(Editor(context.graph, self.name), {node: node})
            records.append(record(self.name, self.kind, APPLIED if why is None else SKIPPED, node, why.reason if why else ""))
        return records


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), nn.BatchNorm1d(8)

    def forward(self, x):
        return torch.relu(self.norm(self.b(torch.relu(self.a(x)))))


def test_slower_is_skipped_with_the_figures_and_faster_is_made():
    done = rewrite(Net(), (torch.randn(6, 8),), SwapRelu())
    assert [r.status for r in done.records] == [SKIPPED, SKIPPED]
    assert "us and the plain ops" in done.records[0].reason
    done = rewrite(Net(), (torch.randn(6, 8),), SwapRelu(measure=False))
    assert [r.status for r in done.records] == [APPLIED, APPLIED]


def test_equal_layers_are_timed_once(monkeypatch):
    timed = []
    monkeypatch.setattr(measure, "_time", lambda modules, inputs: timed.append(inputs) or measure.Timing(2.0, 1.0))
    done = rewrite(Net(), (torch.randn(6, 8),), SwapRelu())
    assert [r.status for r in done.records] == [APPLIED, APPLIED] and len(timed) == 1
    assert timed[0][0].shape == (measure.ROWS, 8) and timed[0][0].requires_grad


def test_unknown_shapes_are_said():
    done = rewrite(Net(), None, SwapRelu())
    assert "sample_inputs" in done.records[0].reason


@pytest.mark.parametrize("training", [True, False])
def test_measuring_changes_nothing_of_the_model(training):
    model = Net().train(training)

    @dataclass
    class Whole(Measured):
        name = "whole"
        kind = "wholes"

        def run(self, context):
            calls = [n for n in context.graph.nodes if n.op == "call_function"]
            timing = measure.time_both(context, calls, lambda editor, copy_of: None, self.name)
            assert timing is not None and timing.plain > 0 and timing.rewritten > 0
            return []

    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    rewrite(model, (torch.randn(6, 8, generator=torch.Generator().manual_seed(0)),), Whole())
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values()))
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())


class Square(nn.Module):
    def forward(self, x):
        return torch.relu(x @ x)


def test_nodes_that_hold_for_the_samples_sizes_only(capfd):
    @dataclass
    class Whole(Measured):
        name = "whole"
        kind = "wholes"

        def run(self, context):
            calls = [n for n in context.graph.nodes if n.op == "call_function"]
            timing = measure.time_both(context, calls, lambda editor, copy_of: None, self.name)
            assert timing is not None and timing.rows == 6
            return []

    rewrite(Square(), (torch.randn(6, 6),), Whole())
    assert not capfd.readouterr().err  # of the attempt at more rows
