"""Cross layers in all their spellings, and what only looks like one."""
from __future__ import annotations

import pytest
import torch
from pass_harness import assert_sound, rewrite
from tablewright.passes.fuse_cross import FuseCross
from torch import nn

DIM, LAYERS = 6, 3
FUSE = FuseCross(measure=False)


class Layers(nn.Module):
    """``forward`` runs ``step(self, l, x0, x)`` for each layer; rows, or columns ``[batch, dim, 1]``."""

    def __init__(self, step, form, column=False, biased=False):
        super().__init__()
        torch.manual_seed(0)
        out = 1 if form == "vector" else DIM
        self.linear = nn.ModuleList(nn.Linear(DIM, out, bias=biased) for _ in range(LAYERS))
        self.kernels = nn.Parameter(torch.randn(LAYERS, out, DIM) / 3)
        self.turned = nn.Parameter(torch.randn(LAYERS, DIM, out) / 3)
        self.flat = nn.ParameterList(torch.randn(DIM) / 3 for _ in range(LAYERS))
        self.bias = nn.ParameterList(torch.randn(DIM) for _ in range(LAYERS))
        self.tall = nn.Parameter(torch.randn(LAYERS, DIM, 1))
        self.step, self.column = step, column

    def forward(self, x):
        x0 = x.unsqueeze(2) if self.column else x
        x = x0
        for number in range(LAYERS):
            x = self.step(self, number, x0, x)
        return x.squeeze(2) if self.column else x


def transposed(m, n, x0, x):
    return (x0.transpose(0, 1) * torch.tensordot(x, m.flat[n], dims=([1], [0]))).transpose(0, 1) + m.bias[n] + x


VECTOR = {
    "x0 * linear + b + x": (lambda m, n, x0, x: x0 * m.linear[n](x) + m.bias[n] + x, {}),
    "linear * x0 + b, x first": (lambda m, n, x0, x: x + (m.linear[n](x) * x0 + m.bias[n]), {}),
    "the shift last": (lambda m, n, x0, x: x0 * m.linear[n](x) + x + m.bias[n], {}),
    "no shift": (lambda m, n, x0, x: x + x0 * m.linear[n](x), {}),
    "linear with a bias": (lambda m, n, x0, x: x0 * m.linear[n](x) + m.bias[n] + x, {"biased": True}),
    "matmul by a column": (lambda m, n, x0, x: x0 * (x @ m.turned[n]) + m.bias[n] + x, {}),
    "columns, tensordot": (
        lambda m, n, x0, x: torch.matmul(x0, torch.tensordot(x, m.turned[n], dims=([1], [0]))) + m.tall[n] + x, {"column": True},
    ),
    "columns, matmul": (lambda m, n, x0, x: torch.matmul(x0, torch.matmul(m.kernels[n], x)) + m.tall[n] + x, {"column": True}),
    "transposed twice": (transposed, {}),
}  # fmt: skip
MATRIX = {
    "x + x0 * linear": (lambda m, n, x0, x: x + x0 * m.linear[n](x), {"biased": True}),
    "x0 * linear + b + x": (lambda m, n, x0, x: x0 * m.linear[n](x) + m.bias[n] + x, {}),
    "the shift last": (lambda m, n, x0, x: x0 * m.linear[n](x) + x + m.bias[n], {}),
    "both biases": (lambda m, n, x0, x: m.bias[n] + m.linear[n](x) * x0 + x, {"biased": True}),
    "columns, matmul": (lambda m, n, x0, x: x0 * (torch.matmul(m.kernels[n], x) + m.tall[n]) + x, {"column": True}),
    "columns, no bias": (lambda m, n, x0, x: x0 * torch.matmul(m.kernels[n], x) + x, {"column": True}),
    "columns, shift outside": (lambda m, n, x0, x: x + (x0 * (m.kernels[n] @ x) + m.tall[n]), {"column": True}),
    "matmul from the right": (lambda m, n, x0, x: x0 * (x @ m.turned[n] + m.bias[n]) + x, {}),
    "tensordot": (lambda m, n, x0, x: x0 * torch.tensordot(x, m.turned[n], dims=([1], [0])) + m.bias[n] + x, {}),
}  # fmt: skip


@pytest.mark.parametrize("rows", [5, 1, 0])
@pytest.mark.parametrize("spelling", VECTOR)
def test_vector_layers(spelling, rows):
    step, how = VECTOR[spelling]
    done = rewrite(Layers(step, "vector", **how), (torch.randn(rows, DIM),), FUSE)
    assert len(done.of("APPLIED")) == LAYERS and len(done.nodes("cross_vector")) == 1
    assert not done.nodes("tensordot") and not done.nodes("linear") and not done.nodes("matmul")
    assert_sound(done)


@pytest.mark.parametrize("rows", [5, 1, 0])
@pytest.mark.parametrize("spelling", MATRIX)
def test_matrix_layers(spelling, rows):
    step, how = MATRIX[spelling]
    done = rewrite(Layers(step, "matrix", **how), (torch.randn(rows, DIM),), FUSE)
    assert len(done.of("APPLIED")) == len(done.nodes("cross")) == LAYERS
    assert not done.nodes("linear") and not done.nodes("matmul") and not done.nodes("mul")
    assert_sound(done)


@pytest.mark.parametrize("form", ["vector", "matrix"])
def test_rows_of_more_dimensions_and_float64(form):
    step, how = (VECTOR if form == "vector" else MATRIX)["x0 * linear + b + x"]
    done = rewrite(Layers(step, form, **how).double(), (torch.randn(4, 3, DIM, dtype=torch.float64),), FUSE)
    assert len(done.of("APPLIED")) == LAYERS
    assert_sound(done)


@pytest.mark.parametrize("form", ["vector", "matrix"])
def test_frozen_and_shared_weights(form):
    step, how = (VECTOR if form == "vector" else MATRIX)["x0 * linear + b + x"]
    model = Layers(step, form, **how)
    model.linear[2].weight = model.linear[0].weight
    model.linear[1].requires_grad_(False)
    model.bias[0].requires_grad_(False)
    done = rewrite(model, (torch.randn(4, DIM),), FUSE)
    assert len(done.of("APPLIED")) == LAYERS
    assert_sound(done)


def test_a_further_sum_is_left():
    done = rewrite(One(lambda m, x, z: x * m.w(x) + x + x), (torch.randn(5, DIM), torch.randn(5, DIM)), FUSE)
    assert len(done.of("APPLIED")) == len(done.nodes("add")) == 1
    assert_sound(done)


class One(nn.Module):
    def __init__(self, forward, out=DIM):
        super().__init__()
        self.w, self.v = nn.Linear(DIM, out, bias=False), nn.Linear(DIM, DIM)
        self.b, self.k = nn.Parameter(torch.randn(DIM)), nn.Parameter(torch.randn(DIM, DIM))
        self.how = forward

    def forward(self, x, z):
        return self.how(self, x, z)


NOT_CROSS = {
    "the product of another x": lambda m, x, z: x * m.w(z) + x,
    "no residual": lambda m, x, z: x * m.w(x) + m.b,
    "a batch-dependent third term": lambda m, x, z: x * m.w(x) + z + x,
    "an affine function of the wrong half": lambda m, x, z: torch.cat([x, x], 1)[:, 3:9] * m.w(x) + z,
    "relu inside": lambda m, x, z: z * m.w(x).relu() + x,
    "a scaled sum": lambda m, x, z: torch.add(z * m.w(x), x, alpha=2),
    "matmul over the batch": lambda m, x, z: z * (m.k[:5, :5] @ x) + x,
}  # fmt: skip


@pytest.mark.parametrize("what", NOT_CROSS)
def test_what_only_looks_like_a_cross_layer(what):
    done = rewrite(One(NOT_CROSS[what]), (torch.randn(5, DIM), torch.randn(5, DIM)), FUSE)
    assert not done.records
    assert_sound(done, exact=True)


def test_broadcasting_x0_is_not_a_cross_layer():
    done = rewrite(One(lambda m, x, z: z * m.w(x) + x), (torch.randn(5, DIM), torch.randn(1, DIM)), FUSE)
    assert not done.of("APPLIED")


SKIPPED = {
    "read elsewhere": (lambda m, x, z: (lambda y: (z * y + x, y))(m.w(x)), None),
    "gated": (lambda m, x, z: z * m.w(x) * torch.sigmoid(m.v(x)) + x, "a gated cross layer"),
    "a bias per column of the batch": (lambda m, x, z: z * m.w(x) + m.k[:5] + x, "adds a term of shape"),
}


@pytest.mark.parametrize("what", SKIPPED)
def test_skips_say_why(what):
    how, words = SKIPPED[what]
    done = rewrite(One(how), (torch.randn(5, DIM), torch.randn(5, DIM)), FUSE)
    assert not done.of("APPLIED")
    assert words is None or [r for r in done.of("SKIPPED") if words in r.reason]
    assert_sound(done, exact=True)


def test_a_chain_that_starts_elsewhere_is_skipped():
    done = rewrite(One(lambda m, x, z: z * m.w(x) + m.b + x, out=1), (torch.randn(5, DIM), torch.randn(5, DIM)), FUSE)
    (row,) = done.of("SKIPPED")
    assert "does not start at x0" in row.reason
    assert_sound(done, exact=True)


def test_a_value_read_between_layers_ends_the_chain():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(DIM, 1), nn.Linear(DIM, 1)

        def forward(self, x):
            y = x * self.a(x) + x
            return x * self.b(y) + y, y

    done = rewrite(Two(), (torch.randn(5, DIM),), FUSE)
    assert len(done.of("APPLIED")) == 1 and "does not start at x0" in done.of("SKIPPED")[0].reason
    assert_sound(done)


def test_without_shapes_it_is_skipped():
    done = rewrite(Layers(*_args("vector")), None, FUSE)
    assert not done.of("APPLIED") and all("not known without sample_inputs" in r.reason for r in done.records) and done.records


def _args(form):
    return (VECTOR if form == "vector" else MATRIX)["x0 * linear + b + x"][0], form


@pytest.mark.parametrize("form", ["vector", "matrix"])
def test_measured(form):
    """With tiny layers the answer may be either; it must be given, and the model must stay right."""
    done = rewrite(Layers(*_args(form)), (torch.randn(5, DIM),), FuseCross())
    assert len(done.records) == LAYERS and len({r.status for r in done.records}) >= 1 and done.context.timings
    for row in done.of("SKIPPED"):
        assert "measured on 2048 rows" in row.reason
    assert_sound(done, idempotent=False)


def test_budget():
    done = rewrite(Layers(*_args("matrix")), (torch.randn(5, DIM),), FUSE, budget=2)
    assert len(done.of("APPLIED")) == 2 and len(done.of("DISABLED")) == 1
    assert_sound(done, idempotent=False)


class Experts(nn.Module):
    """DCN v2's mixture of low-rank experts; ``how`` changes one thing about it."""

    def __init__(self, how="", experts=3, rank=4):
        super().__init__()
        torch.manual_seed(0)
        self.u, self.v = (nn.Parameter(torch.randn(LAYERS, experts, DIM, rank) / 3) for _ in range(2))
        self.c = nn.Parameter(torch.randn(LAYERS, experts, rank, rank) / 3)
        self.gates = nn.ModuleList(nn.Linear(DIM, 1, bias=False) for _ in range(experts))
        self.b = nn.Parameter(torch.randn(LAYERS, DIM, 1))
        self.how, self.experts = how, experts

    def forward(self, x):
        x0 = x.unsqueeze(2)
        x = x0
        for n in range(LAYERS):
            outs, scores = [], []
            for e in range(self.experts):
                scores.append(self.gates[e](x.squeeze(2)))
                low = torch.tanh(torch.matmul(self.v[n][e].t(), x))
                low = torch.matmul(self.c[n][e], low)
                low = torch.relu(low) if self.how == "two activations" else torch.tanh(low)
                raised = torch.matmul(self.u[n][e], low) + self.b[(n + e) % LAYERS if self.how == "a bias each" else n]
                outs.append((x0 * raised).squeeze(2))
            outs, scores = torch.stack(outs, 2), torch.stack(scores, 1)
            mixed = torch.matmul(outs, scores if self.how == "no softmax" else scores.softmax(1))
            x = mixed + x if self.how != "x first" else x + mixed
        return (x.squeeze(2), outs) if self.how == "read elsewhere" else x.squeeze(2)


@pytest.mark.parametrize("rows", [5, 1, 0])
@pytest.mark.parametrize("how", ["", "x first"])
def test_low_rank_experts(rows, how):
    done = rewrite(Experts(how).double(), (torch.randn(rows, DIM, dtype=torch.float64),), FUSE)
    assert [r.detail for r in done.of("APPLIED")] == ["a low rank layer"] * LAYERS
    assert len(done.nodes("linear")) == 3 * LAYERS and not done.nodes("matmul")
    assert_sound(done)


OTHERS = {
    "no softmax": "whose gates are not the softmax", "two activations": None, "a bias each": "that differ in activation, bias or x0",
    "read elsewhere": None,
}  # fmt: skip


@pytest.mark.parametrize("how", OTHERS)
def test_other_mixtures_are_left_alone(how):
    done = rewrite(Experts(how).double(), (torch.randn(5, DIM, dtype=torch.float64),), FUSE)
    assert len(done.of("APPLIED")) == (LAYERS - 1 if how == "read elsewhere" else 0)
    if OTHERS[how]:
        assert len(done.of("SKIPPED")) == LAYERS and all(OTHERS[how] in r.reason for r in done.records)
    assert_sound(done)


class Product(nn.Module):
    """A true matrix product of square matrices, not an elementwise one."""

    def __init__(self, dim, multiply):
        super().__init__()
        self.layer, self.multiply = nn.Linear(dim, dim), multiply

    def forward(self, x0, h):
        return self.multiply(x0, self.layer(h)) + h


@pytest.mark.parametrize("shape", [(6, 6), (3, 6, 6)])
@pytest.mark.parametrize("multiply", [torch.matmul, torch.bmm])
def test_a_matrix_product_of_square_matrices(shape, multiply):
    if multiply is torch.bmm and len(shape) == 2:
        return
    for measure in (False, True):  # also: it cannot be timed at a larger batch
        done = rewrite(Product(6, multiply), (torch.randn(shape), torch.randn(shape)), FuseCross(measure=measure))
        assert not done.of("APPLIED")
        assert_sound(done)


def test_low_rank_experts_that_read_what_is_written():
    class Written(Experts):
        def forward(self, x):
            x = x.unsqueeze(2)
            low = torch.tanh(torch.matmul(self.c[0][0], torch.tanh(torch.matmul(self.v[0][0].t(), x))))
            outs = torch.stack([(x * (torch.matmul(self.u[0][0], low) + self.b[0])).squeeze(2)], 2)
            self.u.mul_(2)
            scores = torch.stack([self.gates[0](x.squeeze(2))], 1).softmax(1)
            return (torch.matmul(outs, scores) + x).squeeze(2)

    done = rewrite(Written(experts=1).double().requires_grad_(False), (torch.randn(5, DIM, dtype=torch.float64),), FUSE)
    assert not done.of("APPLIED") and "written to in place" in done.of("SKIPPED")[0].reason
    assert_sound(done, exact=True)
