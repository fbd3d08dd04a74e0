"""Low precision as torch.autocast would have it: the same ops, gradients and outputs in float32, and the rest untouched."""
from __future__ import annotations

import pytest
import torch
from pass_harness import again, assert_sound, rewrite
from tablewright.kernels.cross import matrix
from tablewright.passes import mixed_precision
from tablewright.passes.batch_experts import BatchExperts
from tablewright.passes.fuse_cross import FuseCross
from tablewright.passes.fuse_dot_interaction import FuseDotInteraction
from tablewright.passes.graph import value_of
from tablewright.passes.group_tables import GroupTables
from tablewright.passes.mixed_precision import MixedPrecision, lowered
from tablewright.rewriter.capture import attach
from tablewright.rewriter.verify import check_structure
from torch import nn
from torch.nn import functional as F

BF16 = MixedPrecision("bf16")


class Model(nn.Module):
    """``forward`` is the function; its linear layers are ``a`` [6 -> 8], ``b`` [8 -> 8] and ``c`` [8 -> 1]."""

    def __init__(self, function):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 1)
        self.norm, self.table = nn.LayerNorm(8), nn.Embedding(9, 8)
        self.function = function

    def forward(self, x):
        return self.function(self, x)


def written(tensor, write):
    """``tensor`` after ``write`` has changed it in place, or through a view."""
    write(tensor)
    return tensor


def ids(x):
    return (x[:, 0].abs() * 3).long().clamp(max=8)


FUNCTIONS = {
    "mlp": lambda m, x: m.c(F.relu(m.b(F.relu(m.a(x))))),
    "gelu, norm": lambda m, x: m.c(m.norm(F.gelu(m.a(x)))),
    "softmax between": lambda m, x: m.c(m.a(x).softmax(-1)),
    "matmul": lambda m, x: m.c(torch.matmul(m.a(x), m.b.weight)),
    "bmm": lambda m, x: torch.bmm(m.a(x).unsqueeze(1), m.b(m.a(x)).unsqueeze(2)).flatten(1),
    "addmm, mm": lambda m, x: torch.addmm(m.b.bias, torch.mm(x, m.a.weight.t()), m.b.weight),
    "baddbmm": lambda m, x: torch.baddbmm(torch.zeros(1), m.a(x).unsqueeze(1), m.b(m.a(x)).unsqueeze(2)).flatten(1),
    "einsum": lambda m, x: m.c(torch.einsum("bi,bj->bj", m.a(x), m.b(m.a(x)))),
    "conv": lambda m, x: F.conv1d(m.a(x).unsqueeze(1), m.b.weight.unsqueeze(1)[:, :, :3]).flatten(1),
    "attention": lambda m, x: F.scaled_dot_product_attention(*(m.b(m.a(x)).view(1, 2, -1, 4) for _ in range(3))).flatten(),
    "concatenation": lambda m, x: m.c(torch.cat([m.a(x), m.b(m.a(x))], 1).view(-1, 2, 8).sum(1)),
    "concatenation with float32": lambda m, x: m.c(torch.cat([m.a(x)[:, :4], x[:, :4]], 1)),
    "added to float32": lambda m, x: m.c(m.a(x) + m.table(ids(x))),
    "residual": lambda m, x: m.c(m.a(x) + m.b(F.relu(m.a(x)))),
    "chunks": lambda m, x: m.c(torch.cat([F.relu(p) for p in m.a(x).chunk(2, 1)], 1)),
    "power, exp": lambda m, x: m.c((m.a(x) ** 2).exp().clamp(max=3) + 1),
    "where, comparison": lambda m, x: m.c(torch.where(m.a(x) > 0, m.a(x), m.b(m.a(x)))),
    "explicit float": lambda m, x: m.c(m.a(x).float() * 2),
    "index and scatter": lambda m, x: m.c(torch.zeros(x.shape[0], 8).index_add(0, torch.arange(x.shape[0]), m.a(x))),
    "outer weights twice": lambda m, x: F.linear(F.linear(m.a(x), m.b.weight), m.b.weight),
    "two outputs": lambda m, x: (m.c(m.a(x)).sigmoid(), m.a(x)),
    "loss inside": lambda m, x: F.binary_cross_entropy_with_logits(m.c(m.a(x)), (x[:, :1] > 0).float()),
    "written in place": lambda m, x: m.c(written(m.a(x), lambda y: y[:, :2].mul_(3))),
    "written after": lambda m, x: m.c(written(F.gelu(m.a(x)), lambda y: y[:, :1].add_(x[:, :1]))),
    "copied from low": lambda m, x: m.c(written(torch.zeros(x.shape[0], 8), lambda y: y[:, :4].copy_(m.a(x)[:, 4:]))),
    "low copied over": lambda m, x: m.c(written(F.gelu(m.a(x)), lambda y: y.index_copy_(1, torch.tensor([0]), x[:, :1]))),
}


UNLIKE_AUTOCAST = {
    "gelu, norm", "loss inside",  # what follows the last product, here the loss, is float32
    "bmm", "baddbmm", "conv", "attention", "two outputs",  # their last product is the output, or is beside one
    "written in place", "written after", "copied from low",  # what is written to is float32
    "index and scatter", "low copied over",  # autocast stops: "must have the same scalar type"
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_numbers_and_dtypes(name):
    """Outputs and gradients; a second run changes nothing; on CPU even the bits are those of autocast."""
    torch.manual_seed(3)
    model, x = Model(FUNCTIONS[name]), torch.rand(6, 6)
    with torch.no_grad():  # no value so near zero that rounding takes it through a relu
        for bias in (model.a.bias, model.b.bias):
            bias.copy_(torch.tensor([3.0, -3.0]).repeat(4))
    done = rewrite(model, (x,), BF16)
    check_structure(done.before, done.after, done.shell)
    products = [n for n in done.after.nodes if str(n.target) in ("aten.linear.default", "aten.bmm.default", "aten.mm.default")]
    assert done.of("APPLIED") and any(value_of(n).dtype == torch.bfloat16 for n in products)
    (plain, plain_grads), (low, low_grads) = (outputs_and_gradients(done.shell, graph, x) for graph in (done.before, done.after))
    for a, b in zip([*plain, *plain_grads], [*low, *low_grads], strict=True):
        assert b.dtype == torch.float32
        torch.testing.assert_close(b, a, rtol=3e-2, atol=6e-2 * float(a.abs().max()) + 1e-6)
    assert any(not torch.equal(a, b) for a, b in zip(plain, low)), "nothing was computed in low precision"
    second = again(done.shell, done.after, [], BF16)
    assert [n.name for n in second.after.nodes] == [n.name for n in done.after.nodes] and not second.of("APPLIED")
    if name not in UNLIKE_AUTOCAST:
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(low[0], model(x).float())


def outputs_and_gradients(shell, graph, x):
    shell.zero_grad()
    out = attach(shell, graph)(x)
    sum((o.double() * torch.linspace(0.5, 1.5, o.numel()).view(o.shape)).sum() for o in out).backward()
    return out, [p.grad for p in shell.parameters() if p.grad is not None]


@pytest.mark.parametrize("rows", [0, 1])
def test_batches_of_none_and_one(rows):
    done = rewrite(Model(FUNCTIONS["mlp"]), (torch.randn(5, 6),), BF16)
    check_structure(done.before, done.after, done.shell)
    x = torch.randn(rows, 6)
    plain, low = (attach(done.shell, g)(x)[0] for g in (done.before, done.after))
    torch.testing.assert_close(low, plain, rtol=3e-2, atol=3e-2)


def test_which_ops_run_low_and_why_the_others_do_not():
    model = Model(lambda m, x: m.c(F.relu(m.a(x)) + m.table(ids(x))).sigmoid())
    done = rewrite(model, (torch.randn(6, 6),), BF16)
    rows = {(r.status, r.reason or r.detail) for r in done.records}
    assert rows == {
        ("APPLIED", "linear: in bf16"),
        ("APPLIED", "relu: in bf16, as its inputs"),
        ("SKIPPED", "one of its inputs is float32, and so is its result"),
        ("SKIPPED", "after the last product: outputs and losses are computed in float32"),
    }
    assert all(r.location for r in done.records)


def test_weights_are_cast_once_together():
    """Also where one weight is read by two layers."""
    done = rewrite(Model(lambda m, x: m.c(m.b(m.b(m.a(x))))), (torch.randn(6, 6),), BF16)
    (cast,) = done.nodes("cast_all")
    assert len(cast.args[0]) == 6
    assert len(done.nodes("to")) == 2, "the input and the output"


def test_activations_are_cast_once():
    done = rewrite(Model(lambda m, x: m.c(m.a(x)) + m.c(m.a(x + 1)) + m.a(x).sum()), (torch.randn(6, 6),), BF16)
    assert [str(n.args[0]) for n in done.nodes("to")].count("x") == 1


def test_what_is_written_in_place_is_left_alone():
    model = Model(FUNCTIONS["written in place"])
    done = rewrite(model, (torch.randn(6, 6),), BF16)
    (row,) = [r for r in done.records if r.status == "SKIPPED" and "in place" in r.reason]
    assert row.reason.startswith("'mul_' changes it in place")


def test_float64_models_stay():
    done = rewrite(nn.Linear(4, 2).double(), (torch.randn(3, 4).double(),), BF16)
    assert not done.of("APPLIED") and "float64 in the plain model; float32 was needed" in done.records[0].reason
    assert_sound(done, exact=True)


def test_without_sample_inputs_nothing_is_known():
    done = rewrite(nn.Linear(4, 2), None, BF16)
    (row,) = done.records
    assert row.status == "SKIPPED" and "without sample_inputs" in row.reason


def test_fp32_does_nothing():
    done = rewrite(nn.Linear(4, 2), (torch.randn(3, 4),), MixedPrecision())
    assert not done.records and lowered(done.after) is None
    with pytest.raises(ValueError, match="fp8.*fp32, bf16, fp16"):
        MixedPrecision("fp8")


def test_a_budget_of_one():
    done = rewrite(Model(FUNCTIONS["mlp"]), (torch.randn(6, 6),), BF16, budget=1)
    check_structure(done.before, done.after, done.shell)
    assert len([r for r in done.of("APPLIED") if "linear" in r.detail]) == 1 and len(done.of("DISABLED")) == 2


def test_fp16():
    done = rewrite(Model(FUNCTIONS["mlp"]), (torch.randn(6, 6),), MixedPrecision("fp16"))
    check_structure(done.before, done.after, done.shell)
    assert lowered(done.after) == torch.float16
    assert [value_of(n).dtype for n in done.nodes("linear")] == [torch.float16] * 3


# --- the ops of kernels/ -------------------------------------------------------------------------------------------------------


class Cross(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))

    def forward(self, x0):
        x = x0
        for layer in self.layers:
            x = x0 * layer(x) + x
        return x


def test_cross_layers_keep_a_float32_residual():
    first = rewrite(Cross(), (torch.randn(5, 6),), FuseCross(measure=False))
    check_structure(first.before, first.after, first.shell)
    done = again(first.shell, first.after, first.leaves, BF16)
    check_structure(first.before, done.after, done.shell)
    made = [n for n in done.after.nodes if n.target is matrix.OP]
    assert len(made) == 2 and all(value_of(n).dtype == torch.float32 and value_of(n.args[2]).dtype == torch.bfloat16 for n in made)
    assert {r.detail for r in done.of("APPLIED")} == {"cross: products in bf16, sums in fp32"}
    x = first.leaves[0]
    torch.testing.assert_close(attach(done.shell, done.after)(x), attach(done.shell, first.before)(x), rtol=2e-2, atol=2e-2)


class Dlrm(nn.Module):
    def __init__(self):
        super().__init__()
        self.users, self.items = nn.Embedding(9, 8), nn.Embedding(9, 8)
        self.bottom, self.top = nn.Linear(6, 8), nn.Linear(8 + 3, 1)

    def forward(self, x, ids):
        x = F.relu(self.bottom(x))
        rows = torch.stack([x, self.users(ids), self.items(ids)], 1)
        i, j = torch.tril_indices(3, 3, -1)
        return self.top(torch.cat([x, torch.bmm(rows, rows.transpose(1, 2))[:, i, j]], 1))


@pytest.mark.parametrize("rounds", [False, True])
def test_lookups_stay_in_float32_and_interactions_read_it(rounds, monkeypatch):
    monkeypatch.setattr(mixed_precision.interaction, "rounds", lambda x, pairs, dtype: rounds and (pairs, dtype) == ("3 lower", torch.bfloat16))
    args = torch.randn(5, 6), torch.tensor([0, 8, 1, 1, 3])
    graph = rewrite(Dlrm(), args, FuseDotInteraction(measure=False))
    check_structure(graph.before, graph.after, graph.shell)
    grouped = again(graph.shell, graph.after, graph.leaves, GroupTables())
    check_structure(graph.after, grouped.after, graph.shell)
    done = again(graph.shell, grouped.after, graph.leaves, BF16)
    check_structure(graph.before, done.after, graph.shell)
    values = {n.name.split("_default")[0]: value_of(n) for n in done.nodes("dot_interaction")}
    assert values["dot_interaction"].dtype == (torch.bfloat16 if rounds else torch.float32)
    casts = [n for n in done.nodes("dot_interaction")[0].all_input_nodes if n.target is torch.ops.aten.to.dtype and n.args[1] == torch.float32]
    assert len(casts) == (0 if rounds else 1)
    assert {"tables, lookups and their updates stay in float32"} <= {r.reason for r in done.of("SKIPPED")}
    assert len([r for r in done.of("APPLIED") if "linear" in r.detail]) == 2
    out, plain = (attach(graph.shell, g)(*graph.leaves)[0] for g in (done.after, graph.before))
    torch.testing.assert_close(out, plain, rtol=3e-2, atol=3e-2)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(6, 4) for _ in range(4))

    def forward(self, x):
        return torch.stack([F.relu(e(x)) for e in self.experts], 1).sum(1)


def test_layers_on_one_input():
    first = rewrite(Experts(), (torch.randn(5, 6),), BatchExperts(measure=False))
    check_structure(first.before, first.after, first.shell)
    done = again(first.shell, first.after, first.leaves, BF16)
    check_structure(first.before, done.after, done.shell)
    (made,) = done.nodes("dense_group")
    assert made.meta["val"][0].dtype == torch.bfloat16
    x = first.leaves[0]
    torch.testing.assert_close(attach(done.shell, done.after)(x), attach(done.shell, first.before)(x), rtol=2e-2, atol=2e-2)
