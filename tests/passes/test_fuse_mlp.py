"""Chains of linear layers with ReLU and dropout: one op, the same bits from the same seed, train() and eval() followed."""
from __future__ import annotations

import copy

import pytest
import torch
from pass_harness import again, assert_same_numbers, assert_sound, rewrite
from tablewright.kernels.dropout import cpu as draws
from tablewright.kernels.mlp.layers import FORMS
from tablewright.passes import dense_chains, fuse_mlp
from tablewright.passes.dense_chains import DenseChains
from tablewright.passes.fast_dropout import FastDropout
from tablewright.passes.fuse_dot_interaction import FuseDotInteraction
from tablewright.passes.fuse_mlp import FuseMlp
from tablewright.passes.graph import arguments
from tablewright.passes.measure import Timing
from tablewright.passes.mixed_precision import MixedPrecision
from tablewright.rewriter.capture import attach
from tablewright.rewriter.verify import check_structure, copy_graph
from torch import nn
from torch.nn import functional as F

FUSE = FuseMlp(measure=False)
needs_library = pytest.mark.skipif(not draws.available(), reason=f"NOT TESTED: {draws.describe()}, or another random stream here")


def tower(*between, last=()):
    return nn.Sequential(nn.Linear(7, 40), *between, nn.Linear(40, 33), nn.ReLU(), nn.Dropout(0.3), nn.Linear(33, 1), *last)


def layers(done):
    return [n.args[3] for n in done.nodes("mlp")]


SPELLINGS = {
    "relu, dropout": ((nn.ReLU(), nn.Dropout(0.2)), ["relu 0.2 blas,relu 0.3 blas,none 0.0 blas"]),
    "relu in place": ((nn.ReLU(inplace=True), nn.Dropout(0.2)), ["relu 0.2 blas,relu 0.3 blas,none 0.0 blas"]),
    "relu": ((nn.ReLU(),), ["relu 0.0 blas,relu 0.3 blas,none 0.0 blas"]),
    "dropout": ((nn.Dropout(0.2),), ["none 0.2 blas,relu 0.3 blas,none 0.0 blas"]),
    "nothing": ((), ["none 0.0 blas,relu 0.3 blas,none 0.0 blas"]),
    "dropout of everything": ((nn.ReLU(), nn.Dropout(1.0)), ["relu 0.3 blas,none 0.0 blas"]),
    "batch norm": ((nn.BatchNorm1d(40), nn.ReLU()), ["relu 0.3 blas,none 0.0 blas"]),
    "dropout, relu": ((nn.Dropout(0.2), nn.ReLU()), ["none 0.2 blas", "relu 0.3 blas,none 0.0 blas"]),
    "sigmoid": ((nn.Sigmoid(),), ["relu 0.3 blas,none 0.0 blas"]),
}


@needs_library
@pytest.mark.parametrize("rows", [64, 1, 0])
@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name, rows):
    if name == "batch norm" and rows < 2:
        pytest.skip("batch norm needs two rows")
    between, wanted = SPELLINGS[name]
    done = rewrite(tower(*between), (torch.randn(rows, 7),), FUSE)
    assert layers(done) == wanted and len(done.of("APPLIED")) == len(wanted) == len(done.records)
    if name == "relu in place":
        assert_same_numbers(done.shell, done.before, done.after, done.leaves)
    else:
        assert_sound(done)


@needs_library
def test_it_takes_over_from_dense_chains_and_fast_dropout(monkeypatch):
    """The same bits as theirs; the parameters keep their names."""
    monkeypatch.setattr(dense_chains, "LEAST_WORK", 0)
    model, x = tower(nn.ReLU(), nn.Dropout(0.2), last=(nn.Sigmoid(),)), torch.randn(9, 7)
    done = rewrite(model, (x,), DenseChains(measure=False))
    for item in (FastDropout(measure=False), FUSE):
        before = done.after
        done = again(done.shell, before, done.leaves, item)
        assert done.of("APPLIED")
    assert layers(done) == ["relu 0.2 blas,relu 0.3 blas"] and len(done.nodes("dense")) == 1, "the layer with a sigmoid stays"
    assert not done.nodes("dropout")
    one = torch.get_num_threads() == 1  # then dense layers add up a bias's gradient in an order of their own
    assert_same_numbers(done.shell, before, done.after, done.leaves, exact=not one)
    weights = [n for n in done.after.nodes if n.op == "get_attr"]
    assert {"0.weight", "0.bias", "3.weight"} <= {str(n.target) for n in weights}


class Branches(nn.Module):
    """The result after the first layer is read twice; a flag of its own for the second dropout."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(7, 40), nn.Linear(40, 33), nn.Linear(33, 2)

    def forward(self, x):
        first = F.dropout(self.a(x).relu(), 0.2, self.training)
        second = F.dropout(self.b(first).relu(), 0.3, True)
        return self.c(second) + first.sum(1, keepdim=True)


@needs_library
def test_what_others_read_ends_a_chain():
    done = rewrite(Branches(), (torch.randn(5, 7),), FUSE)
    assert layers(done) == ["relu 0.2 blas", "relu 0.3 blas,none 0.0 blas"]
    assert_sound(done)


class Flags(Branches):
    def forward(self, x):
        return self.c(F.dropout(self.b(F.dropout(self.a(x).relu(), 0.2, self.training)).relu(), 0.3, True))


@needs_library
def test_every_dropout_follows_its_own_flag():
    done = rewrite(Flags(), (torch.randn(5, 7),), FUSE)
    assert layers(done) == ["relu 0.2 blas,relu 0.3 blas,none 0.0 blas"]
    assert_sound(done)


class Written(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(7, 8), nn.Linear(8, 8)

    def forward(self, x):
        y = F.dropout(self.a(x), 0.2, self.training)
        y.add_(1)
        return F.dropout(self.b(y).relu(), 0.2, self.training)


@needs_library
def test_writes_in_place_are_not_lost():
    done = rewrite(Written(), (torch.randn(5, 7),), FUSE)
    assert len(done.nodes("mlp")) == 1 and len(done.nodes("dropout")) == 1
    assert_sound(done)


@pytest.mark.parametrize(
    ("model", "given", "words"),
    [
        (tower().double(), (torch.randn(4, 7, dtype=torch.float64),), "float64; one dtype of"),
        (tower().half(), (torch.randn(4, 7, dtype=torch.float16),), "float16 on cpu"),
        (tower(), None, "not known without sample_inputs"),
    ],
    ids=["float64", "float16", "no inputs"],
)
def test_skips(model, given, words):
    done = rewrite(model, given, FUSE)
    assert len(done.records) == 1 and words in done.of("SKIPPED")[0].reason
    assert_sound(done)


@needs_library
def test_bfloat16():
    done = rewrite(tower().bfloat16(), (torch.randn(4, 7, dtype=torch.bfloat16),), FUSE)
    assert done.of("APPLIED")
    assert_sound(done)


def test_another_stream_is_left_alone(monkeypatch):
    monkeypatch.setattr(draws, "available", lambda: False)
    done = rewrite(tower(), (torch.randn(4, 7),), FUSE)
    assert "not those of this PyTorch" in done.of("SKIPPED")[0].reason


def test_chains_without_dropout_are_left_to_dense_chains():
    assert not rewrite(nn.Sequential(nn.Linear(7, 8), nn.ReLU(), nn.Linear(8, 1)), (torch.randn(4, 7),), FUSE).records


@needs_library
def test_budget():
    done = rewrite(tower(nn.Sigmoid(), nn.Dropout(0.2)), (torch.randn(64, 7),), FUSE, budget=0)
    assert len(done.of("DISABLED")) == 1


@needs_library
def test_what_is_not_faster_is_left_and_the_fastest_form_is_taken(monkeypatch):
    seconds = dict(zip(FORMS, (3.0, 1.0, 2.0)))
    monkeypatch.setattr(fuse_mlp, "time_both", lambda context, nodes, rewrite, name: Timing(9.0, seconds[name.split()[1]], 4))
    done = rewrite(tower(), (torch.randn(4, 7),), FUSE)
    chain = fuse_mlp._chain(next(n for n in done.before.nodes if fuse_mlp._is_product(n)), fuse_mlp.Writes(done.before, done.shell))
    assert FuseMlp()._fastest(chain, [n for p in chain for n in p.nodes], done.context) == "square"
    monkeypatch.setattr("tablewright.passes.measure.time_both", lambda *args: Timing(1.0, 1.0, 4))
    done = rewrite(tower(), (torch.randn(4, 7),), FuseMlp())
    assert "must be 1.05x faster" in done.of("SKIPPED")[0].reason and not done.nodes("mlp")


class Interaction(nn.Module):
    """10 columns of an interaction of 4 features, or with a reader more."""

    def __init__(self, read_twice=False):
        super().__init__()
        self.first, self.top, self.read_twice = nn.Linear(7, 4), nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 1)), read_twice

    def forward(self, x):
        rows = self.first(x)
        z = torch.stack([rows, rows * 2, rows + 1, rows * rows], 1)
        i, j = torch.tril_indices(4, 4, -1)
        out = torch.cat([rows, torch.bmm(z, z.mT)[:, i, j]], 1)
        return self.top(out) + (out.sum(1, keepdim=True) if self.read_twice else 0)


@needs_library
@pytest.mark.parametrize("read_twice", [False, True])
def test_rows_are_filled_up_to_16_bytes_where_asked(monkeypatch, read_twice):
    """As on a GPU in half precision, here in float32 on CPU."""
    monkeypatch.setattr(fuse_mlp, "_columns", lambda value: 8)
    done = rewrite(Interaction(read_twice), (torch.randn(5, 7),), FuseDotInteraction(measure=False))
    before = done.after
    check_structure(done.before, before, done.shell)  # which leaves the shapes of new nodes behind
    done = again(done.shell, before, done.leaves, FUSE)
    assert len(done.of("APPLIED")) == 1 and arguments(done.nodes("dot_interaction")[0])["multiple"] == (1 if read_twice else 8)
    assert len(done.nodes("constant_pad_nd")) == (2 if read_twice else 1), "the weight, and what nobody fills up as it is made"
    assert_same_numbers(done.shell, before, done.after, done.leaves)
    plain = rewrite(tower(nn.ReLU()), (torch.randn(5, 7),), FUSE)
    assert len(plain.nodes("constant_pad_nd")) == 2
    assert_sound(plain)


class Tied(nn.Module):
    """A chain, and a product outside of it with its last weight, whose place among what is cast changes when others leave."""

    def __init__(self):
        super().__init__()
        self.chain = nn.Sequential(nn.Linear(7, 40), nn.ReLU(), nn.Linear(40, 7))

    def forward(self, x):
        return self.chain(x) + (x @ self.chain[2].weight) @ self.chain[2].weight.t()


@pytest.mark.parametrize("here", [True, False])
@needs_library
def test_low_chains_read_the_parameters_themselves(monkeypatch, here):
    """Behind mixed_precision, where the package has bfloat16 products: what the op reads is not cast any more, what others read is."""
    monkeypatch.setattr(fuse_mlp.bf16, "available", lambda: here)
    done = rewrite(Tied(), (torch.randn(9, 7),), MixedPrecision(precision="bf16"))
    cast = len(done.nodes("cast_all")[0].args[0])
    done = again(done.shell, done.after, [], FUSE)
    if not here:
        assert not done.records and len(done.nodes("cast_all")[0].args[0]) == cast
        return
    (made,) = done.nodes("mlp")
    assert [n.target for n in made.args[1] + made.args[2]] == ["chain.0.weight", "chain.2.weight", "chain.0.bias", "chain.2.bias"]
    (left,) = done.nodes("cast_all")
    assert [n.target for n in left.args[0]] == ["chain.2.weight"] and cast == 4 and len(left.meta["val"]) == 1
    check_structure(done.before, done.after, done.shell)
    results = []
    for graph in (done.before, done.after):
        module = attach(copy.deepcopy(done.shell), copy_graph(graph))
        out = module(torch.linspace(-1, 1, 63).view(9, 7))
        out = out[0] if isinstance(out, (tuple, list)) else out
        out.sum().backward()
        results.append([out, *(p.grad for p in module.parameters())])
    for ours, plain in zip(*results):
        assert ours.dtype == plain.dtype == torch.float32
        torch.testing.assert_close(ours, plain, rtol=0.02, atol=0.03 * plain.abs().max().item())
