"""The sort beside the forward: what is begun when, on which stream, and when it may be used. Run by ``test_embedding_triton.py``, in a process of
its own. There is one stream in the interpreter, so what the streams are told is written down."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from embedding_triton_cases import Case, ids, mixed, rule_for
from tablewright.kernels.embedding import gpu, gpu_small, gpu_sort, in_backward, op
from tablewright.kernels.embedding.optimizers import RowUpdates


@pytest.fixture(autouse=True)
def log(monkeypatch) -> list:
    """What happens, in order: streams' doings, sorts (and whether beside), the forward and the reduction."""
    torch.manual_seed(0)
    done, within = [], []

    class Side:
        def __enter__(self):
            done.append("side waits")
            within.append(self)
            return self

        def __exit__(self, *error):
            done.append("side done")
            within.pop()

        def reads(self, tensors):
            done.append(("side reads", [t.data_ptr() for t in tensors]))

        def join(self):
            done.append("joined")

        def handed_over(self, tensors):
            done.append(("handed over", len(list(tensors))))

    def told(module, name, what):
        run = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, **kwargs: (done.append(what + (" beside" if within else "")), run(*args, **kwargs))[1])

    monkeypatch.setattr(gpu_sort, "beside", lambda device: Side())
    monkeypatch.setattr(gpu_small, "ROWS", 0)
    monkeypatch.setattr(op, "implementation", lambda device: gpu)
    told(gpu_sort, "_sorted", "sort")
    told(gpu, "forward", "forward")
    told(gpu, "reduce_runs", "reduce")
    yield done
    gpu.check_ids()
    assert not gpu_sort._ahead, "what was sorted outlives its graph"


def case_of(grad: str, **options) -> Case:
    case = Case(**options) if options else mixed()
    case.specs = [type(s)(s.name, s.rows, s.dim, grad) for s in case.specs]
    case.tables = [t.requires_grad_() for t in case.tables]
    return case


def run(case: Case, owner: int = -1) -> list[torch.Tensor]:
    return op.call(case.tables, case.ids, case.offsets, case.weights, case.extras, case.spec.encode(), None, owner)


def gradients(case: Case, between=lambda: None) -> list[torch.Tensor]:
    """Of all tables, dense."""
    for table in case.tables:
        table.grad = None
    loss = sum((slot * slot).sum() for slot in run(case))
    between()
    loss.backward()
    return [t.grad.to_dense() for t in case.tables]


@pytest.mark.parametrize("grad", ["sparse", "dense"])
def test_sorted_once_beside_the_forward_and_joined_before_it_is_used(grad, log, monkeypatch):
    case = case_of(grad)
    made = gradients(case)
    reads = [t.data_ptr() for t in (*case.ids, *case.offsets) if t is not None]
    begun = ["side waits", "sort beside", "side done", ("side reads", reads), "forward"]
    assert log == [*begun, "joined", ("handed over", 5), "reduce"]
    monkeypatch.setattr(gpu, "SORT_AHEAD", False)
    log.clear()
    assert all(map(torch.equal, made, gradients(case)))
    assert log == ["forward", "sort", "reduce"]


def test_two_forwards_before_their_backwards(log):
    first, second = (case_of("sparse", rows_and_dims=((50, 16),)).lookup(0, "none", ids(50, 90)).lookup(0, "sum", ids(50, 9, 2)) for _ in range(2))
    alone = gradients(first), gradients(second)
    log.clear()
    losses = [sum((slot * slot).sum() for slot in run(c)) for c in (first, second)]
    for c, loss in zip((first, second), losses):
        for table in c.tables:
            table.grad = None
        loss.backward()
    assert log.count("sort beside") == 2 and "sort" not in log
    for c, grads in zip((first, second), alone):
        assert all(torch.equal(t.grad.to_dense(), g) for t, g in zip(c.tables, grads))


def test_a_backward_that_reaches_less_sorts_for_itself(log):
    case = case_of("sparse")
    run(case)[0].sum().backward()
    assert log.count("sort beside") == 1 and log.count("sort") == 1


def test_other_ids_at_the_same_address_are_sorted_again(log):
    """As after a change in place: only equal tensors of an equal version were sorted."""
    case = Case().lookup(0, "none", ids(50, 90))
    rules = [rule_for("sgd", case.tables[0])]
    grads = case.gradients()
    kept = gpu.ahead_of_backward(case.spec, case.tables, case.ids, case.offsets, ["in_backward"])
    case.ids[0].copy_(ids(50, 90))
    ours, plain = copy.deepcopy(case.tables), copy.deepcopy(case.tables)
    gpu.update(case.spec, grads, ours, *case.reads[1:], rules)
    assert log.count("sort") == 1 and len(kept) == 1
    del kept
    gpu.update(case.spec, grads, plain, *case.reads[1:], rules)
    assert torch.equal(ours[0], plain[0]) and not torch.equal(ours[0], case.tables[0])


def test_updates_in_the_backward_use_it(log, monkeypatch):
    tables = []
    for ahead in (True, False):
        monkeypatch.setattr(gpu, "SORT_AHEAD", ahead)
        torch.manual_seed(1)
        case = case_of("in_backward")
        case.weights = [None if w is None else w.detach() for w in case.weights]
        names = [s.name for s in case.specs]
        rows = RowUpdates([{"params": case.tables, "param_names": names, "kind": "rowwise_adagrad", "lr": 0.1, "eps": 1e-3, "in_backward": True}])
        owner = in_backward.register(rows)
        before = [t.detach().clone() for t in case.tables]
        sum((slot * slot).sum() for slot in run(case, owner)).backward()
        assert all(not torch.equal(t, b) for t, b in zip(case.tables, before))
        tables.append([t.detach() for t in case.tables])
        assert ("sort beside" in log, "sort" in log) == (ahead, not ahead)
        log.clear()
    assert all(map(torch.equal, *tables))


def test_a_recorded_forward_joins_at_its_end(log, monkeypatch):
    monkeypatch.setattr(gpu_sort, "capturing", lambda: True)
    gradients(case_of("dense"), between=lambda: log.append("recorded"))
    assert log.index("forward") < log.index("joined") < log.index("recorded") < log.index("reduce")
    assert log.count("joined") == 1 and "sort" not in log


def test_small_and_frozen_tables_and_evaluation_sort_nothing(log, monkeypatch):
    with torch.no_grad():
        run(case_of("sparse"))
    frozen = case_of("none")
    frozen.extras = [e.requires_grad_() for e in frozen.extras]
    run(frozen)
    monkeypatch.setattr(gpu_small, "ROWS", 512)
    gradients(case_of("dense"))
    assert not [entry for entry in log if "sort" in entry]


def test_a_forward_without_a_backward_keeps_nothing(log):
    run(case_of("sparse"))
    gc.collect()
    assert log.count("sort beside") == 1 and not gpu_sort._ahead
