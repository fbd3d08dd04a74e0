"""``torch.compile(fullgraph=True)`` of an optimized model, and what PyTorch's own checker says of our ops."""
from __future__ import annotations

import copy
import re

import pytest
import tablewright as tw
import torch
from small_models import Dot, assert_close, dot_batch, weights_of
from tablewright.kernels.embedding.op import OP
from tablewright.kernels.embedding.spec import Extra, GroupSpec, Lookup, Table

IN_BACKWARD = tw.Plan(embedding_optimizer=tw.Adagrad(lr=0.1, in_backward=True))


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def pair(plan="auto"):
    """An eager and a compiled model with weights of their own."""
    torch.manual_seed(0)
    model = Dot()
    return tuple(tw.optimize(copy.deepcopy(model), plan, sample_inputs=dot_batch()) for _ in range(2))


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "row-wise"])
def test_compiled_training_is_the_same(backend, sparse):
    torch.manual_seed(0)
    plain = Dot()
    results = []
    for compiled in (False, True):
        model = copy.deepcopy(plain)
        given = torch.optim.Adagrad(model.parameters(), lr=0.1) if sparse else torch.optim.Adam(model.parameters())
        opt, optim = tw.optimize(model, sample_inputs=dot_batch(), optimizer=given)
        run = torch.compile(opt, backend=backend, fullgraph=True) if compiled else opt
        for seed, rows in enumerate((5, 5, 9)):
            optim.zero_grad()
            run(*dot_batch(rows, seed=seed)).square().sum().backward()
            if compiled:
                assert opt.user.weight.grad.is_sparse == sparse
            optim.step()
        results.append(weights_of(opt))
    assert_close(*results)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiled_updates_inside_the_backward(backend):
    eager, opt = pair(IN_BACKWARD)
    run = torch.compile(opt, backend=backend, fullgraph=True)
    for seed, rows in enumerate((5, 5, 9)):
        for model, each in ((eager, eager), (opt, run)):
            model.zero_grad()
            each(*dot_batch(rows, seed=seed)).square().sum().backward()
        torch.testing.assert_close(eager.over[0].weight.grad, opt.over[0].weight.grad)
    assert_close(weights_of(eager), weights_of(opt))
    assert {int(s["step"]) for s in opt.embedding_optimizer.state.values()} == {3}


def test_compile_in_place_keeps_the_names():
    eager, opt = pair()
    opt.compile(backend="aot_eager", fullgraph=True)
    assert list(opt.state_dict()) == list(eager.state_dict())
    torch.testing.assert_close(opt(*dot_batch()), eager(*dot_batch()))


def test_eval_mode_and_no_grad():
    eager, opt = pair()
    run = torch.compile(opt, backend="aot_eager", fullgraph=True)
    for mode in (False, True):
        eager.train(mode), opt.train(mode)
        with torch.no_grad():
            torch.testing.assert_close(run(*dot_batch()), eager(*dot_batch()))


_MEMORY = """
import resource, torch, tablewright as tw
from torch import nn

ROWS, DIM = 1_600_000, 32  # about 200 MB
SIZE = ROWS * DIM * 4

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.big, self.small = nn.Embedding(ROWS, DIM), nn.Embedding(100, DIM)
        self.over = nn.Linear(2 * DIM, 1)

    def forward(self, a, b):
        return self.over(torch.cat([self.big(a), self.small(b)], 1)).relu()

def batch(rows=64):
    return torch.randint(0, ROWS, (rows,)), torch.randint(0, 100, (rows,))

def warm_up(plan):  # the compiler's own memory
    global ROWS
    kept, ROWS = ROWS, 100
    train(plan, Model())
    ROWS = kept
    torch._dynamo.reset()

def train(plan, model):
    given = None if plan else torch.optim.SGD(model.parameters(), lr=0.1)
    made = tw.optimize(model, plan or "auto", sample_inputs=batch(), optimizer=given)
    opt, optim = made if given else (made, torch.optim.SGD(made.dense_parameters(), lr=0.1))
    run = torch.compile(opt, fullgraph=True)
    for _ in range(3):
        optim.zero_grad()
        run(*batch()).sum().backward()
        optim.step()

plan = tw.Plan(embedding_optimizer=tw.SGD(lr=0.1, in_backward=True)) if MODE else None
warm_up(plan)
model = Model()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
train(plan, model)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print((after - before) / SIZE)
"""


@pytest.mark.parametrize("mode", [False, True], ids=["default", "in_backward"])
def test_inductor_makes_no_second_copy_of_a_table(run_python, mode):
    grown = float(run_python(_MEMORY.replace("MODE", str(mode))))
    assert grown < 0.25, f"peak memory grew by {grown:.2f} of the table's size"


def _call(grad, ids=torch.int64):
    spec = GroupSpec(
        (Table("a", 6, 4, grad), Table("b", 5, 2, grad)),
        (Lookup(0, "a", "none", 0, 3), Lookup(1, "b", "mean", 0, 7, padding_idx=1), Lookup(0, "a2", "sum", 1, 0)),
        (9, 4), (Extra(0, 0, 3),),
    )  # fmt: skip
    tables = [torch.randn(6, 4, requires_grad=True), torch.randn(5, 2, requires_grad=True)]
    indices = [torch.tensor([0, 5, 5], dtype=ids), torch.tensor([4, 1, 2, 2, 0], dtype=ids), torch.tensor([3, 3], dtype=ids)]
    offsets = [None, torch.tensor([0, 2, 2], dtype=ids), torch.tensor([0, 1], dtype=ids)]
    weights = [None, None, torch.randn(2, requires_grad=True)]
    return tables, indices, offsets, weights, [torch.randn(3, 3, requires_grad=True)], spec.encode()


@pytest.mark.parametrize("ids", [torch.int64, torch.int32])
@pytest.mark.parametrize("grad", ["dense", "sparse"])
def test_opcheck(grad, ids):
    # AOT autograd's own comparison cannot hold a sparse gradient against a fake one; compiled training above does that.
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"] + (["test_aot_dispatch_dynamic"] if grad == "dense" else [])
    assert set(torch.library.opcheck(OP, _call(grad, ids), test_utils=tests).values()) == {"SUCCESS"}


def test_opcheck_of_the_backward():
    tables, indices, offsets, weights, _, text = _call("dense")
    grads = [torch.randn(3, 9), torch.randn(2, 4)]
    detached = [t.detach() for t in tables]
    args = (grads, detached, indices, offsets, [w if w is None else w.detach() for w in weights], text, [True, True], [False, False, True])
    op = torch.ops.tablewright.embedding_bags_backward.default
    checked = torch.library.opcheck(op, args, test_utils=["test_schema", "test_faketensor", "test_aot_dispatch_dynamic"])
    assert set(checked.values()) == {"SUCCESS"}


def test_gradcheck():
    tables, indices, offsets, weights, extras, text = _call("dense")
    double = [[None if t is None else t.detach().double().requires_grad_() for t in each] for each in (tables, weights, extras)]
    leaves = [t for each in double for t in each if t is not None]

    def run(*_):
        return tuple(OP(double[0], indices, offsets, double[1], double[2], text))

    assert torch.autograd.gradcheck(run, leaves)


def test_the_models_graph_exports():
    _, opt = pair()
    exported = torch.export.export(opt.graph_module, dot_batch())
    assert re.search(r"tablewright\.embedding_bags", str(exported.graph))
    torch.testing.assert_close(exported.module()(*dot_batch()), opt.graph_module(*dot_batch()))
