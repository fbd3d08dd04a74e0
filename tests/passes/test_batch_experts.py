"""Linear layers on one input: mixtures of experts, gates, towers; parameters stay as they are."""
from __future__ import annotations

import pytest
import torch
from pass_harness import assert_sound, rewrite
from tablewright.passes.batch_experts import BatchExperts
from torch import nn

FUSE = BatchExperts(measure=False)


class Mixture(nn.Module):
    """MMoE: experts and gates on one input, a tower for each task."""

    def __init__(self, experts=4, width=5, tasks=2, bias=True):
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(6, width, bias=bias), nn.ReLU(), nn.Linear(width, 3)) for _ in range(experts)
        )
        self.gates = nn.ModuleList(nn.Sequential(nn.Linear(6, experts), nn.Softmax(-1)) for _ in range(tasks))
        self.towers = nn.ModuleList(nn.Linear(3, 1) for _ in range(tasks))

    def forward(self, x):
        made = torch.stack([e(x) for e in self.experts], 1)
        pooled = [(g(x).unsqueeze(-1) * made).sum(1) for g in self.gates]
        return [t(p).sigmoid() for t, p in zip(self.towers, pooled)]


@pytest.mark.parametrize("shape", [(5, 6), (1, 6), (0, 6), (2, 3, 6)])
@pytest.mark.parametrize("bias", [True, False])
def test_experts_and_gates(shape, bias):
    model = Mixture(bias=bias) if len(shape) == 2 else Heads(bias)
    done = rewrite(model, (torch.randn(shape),), FUSE)
    (row,) = done.of("APPLIED")
    count = 6 if len(shape) == 2 else 3
    assert row.detail == f"{count} of {count} linear layers on one input as one product" and len(done.nodes("dense_group")) == 1
    assert_sound(done)


class Heads(nn.Module):
    """Query, key and value of an attention."""

    def __init__(self, bias=True):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(6, 4, bias=bias) for _ in range(3))

    def forward(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        return (q @ k.transpose(-1, -2)).tanh() @ v


def test_frozen_tied_and_float64():
    model = Mixture().double()
    model.experts[1][0].weight = model.experts[0][0].weight
    model.experts[2].requires_grad_(False)
    model.gates[0][0].bias = None
    done = rewrite(model, (torch.randn(5, 6, dtype=torch.float64),), FUSE)
    assert done.of("APPLIED")
    assert_sound(done)


def test_a_layer_whose_result_gets_no_gradient_gets_none():
    """Weight decay and momentum would move a parameter whose gradient is 0 instead of none."""
    from tablewright.kernels.dense import group

    x, weights = torch.randn(4, 6), [torch.randn(3, 6, requires_grad=True) for _ in range(3)]
    biases = [torch.randn(3, requires_grad=True), None, torch.randn(3, requires_grad=True)]
    for run in (group.OP, group.call):
        first, _, last = run(x, weights, biases)
        (first.sum() + last.detach().sum()).backward()
        assert weights[0].grad is not None and weights[1].grad is None and weights[2].grad is None and biases[2].grad is None
        weights[0].grad = None


class Two(nn.Module):
    def __init__(self, how, widths=(3, 4)):
        super().__init__()
        self.a, self.b = nn.Linear(6, widths[0]), nn.Linear(6, widths[1])
        self.how = how

    def forward(self, x):
        return self.how(self, x)


def test_wide_layers_stay_apart():
    done = rewrite(Two(lambda m, x: (m.a(x), m.b(x)), (200, 4)), (torch.randn(5, 6),), FUSE)
    (row,) = done.of("SKIPPED")
    assert "up to 200 wide" in row.reason
    assert_sound(done, exact=True)


def test_layers_on_two_inputs_are_no_group():
    done = rewrite(Two(lambda m, x: (m.a(x), m.b(x + 1))), (torch.randn(5, 6),), FUSE)
    assert not done.records


def test_the_second_layer_is_made_early():
    """Its result is read after other work; its weight is fetched ahead."""
    done = rewrite(Two(lambda m, x: (lambda y: y + m.b(x)[:, :3])(m.a(x).relu().cumsum(0))), (torch.randn(5, 6),), FUSE)
    assert done.of("APPLIED")
    assert_sound(done)


def test_a_weight_made_from_the_input_is_left_alone():
    def how(m, x):
        return m.a(x), nn.functional.linear(x, m.b.weight * x.sum())

    done = rewrite(Two(how), (torch.randn(5, 6),), FUSE)
    assert "only parameters may be read ahead" in done.of("SKIPPED")[0].reason
    assert_sound(done, exact=True)


def test_in_place_writes_are_respected():
    def how(m, x):
        y = x * 1
        first = m.a(y)
        y.view(-1).mul_(2)
        return first, m.b(y)

    done = rewrite(Two(how).requires_grad_(False), (torch.randn(5, 6),), FUSE)
    assert "written to in place" in done.of("SKIPPED")[0].reason
    assert_sound(done, exact=True)


def test_without_sample_inputs_the_shapes_are_those_of_the_parameters():
    assert rewrite(Two(lambda m, x: (m.a(x), m.b(x))), None, FUSE).of("APPLIED")
    assert "not known" in rewrite(Two(lambda m, x: (m.a(x), m.b(x))), None, BatchExperts()).of("SKIPPED")[0].reason


def test_measured_and_options():
    done = rewrite(Mixture(), (torch.randn(5, 6),), BatchExperts())
    assert len(done.records) == 1 and done.context.timings
    with pytest.raises(ValueError, match="max_width is 0"):
        BatchExperts(max_width=0)


def test_opcheck():
    from tablewright.kernels.dense import group

    x, w = torch.randn(5, 6, requires_grad=True), [torch.randn(n, 6, requires_grad=True) for n in (3, 1)]
    torch.library.opcheck(group.OP, (x, w, [torch.randn(3, requires_grad=True), None]))
    torch.library.opcheck(group.OP, (x.detach(), w, [None, None]))


def test_a_weight_made_from_what_is_written_is_not_read_ahead():
    class Scaled(Two):
        def __init__(self, how):
            super().__init__(how)
            self.register_buffer("scale", torch.ones(1))

    def how(m, x):
        first = m.a(x)
        m.scale.add_(1)
        return first, nn.functional.linear(x, m.b.weight * m.scale)

    done = rewrite(Scaled(how), (torch.randn(5, 6),), FUSE)
    assert "written to in place" in done.of("SKIPPED")[0].reason
    assert_sound(done, exact=True)


def test_second_derivatives_of_the_op():
    from tablewright.kernels.dense import group

    torch.manual_seed(0)
    given = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((3, 4), (2, 4), (5, 4), (2,))]
    for run in (group.call, group.OP):
        assert torch.autograd.gradgradcheck(lambda x, v, w, b, run=run: tuple(run(x, [v, w], [b, None])), given)
