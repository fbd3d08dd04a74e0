"""Calls packed in C (native/python.cpp) against calls packed in Python: the same bits, and None for whatever is not plain."""
from __future__ import annotations

import gc
import os
import weakref

import pytest
import torch
from tablewright.kernels.embedding import cpu, op
from tablewright.kernels.embedding.spec import GroupSpec, Lookup, Table
from tablewright.kernels.embedding.updates import TableUpdate
from test_embedding_cpu import DTYPES, Group
from torch.utils.checkpoint import checkpoint

direct = pytest.mark.skipif(cpu._direct is None, reason="built without Python's headers")


def every_call(group: Group, kind: str) -> list:
    """All that the kernels compute for ``group``, tables and state after an update included."""
    wanted = [True] * len(group.tables)
    pairs = cpu.sparse_gradients(group.spec, group.grads, *group.inputs, wanted)
    dense = cpu.dense_gradients(group.spec, group.grads, *group.inputs, wanted)
    tables = [t.clone() for t in group.tables]
    rules = group.rules(kind, weight_decay=0.1, maximize=True)
    cpu.update(group.spec, group.grads, tables, *group.inputs[1:], rules)
    found = cpu.forward(group.spec, *group.inputs, group.extras)
    return [*found, *(x for pair in pairs for x in pair), *dense, *tables, *(s for r in rules for s in r.state)]


@direct
@pytest.mark.parametrize("kind", ["sgd", "adagrad", "rowwise_adagrad", "adam"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [0, 1, 37])
def test_same_bits_as_calls_packed_in_python(dtype, kind, batch, monkeypatch):
    ids = {"id_dtype": torch.int32, "offset_dtype": torch.int64} if kind == "adam" else {"offset_dtype": torch.int32}
    taken = []
    native = cpu._direct

    class Spy:
        def __getattr__(self, name):
            return lambda *args: taken.append(getattr(native, name)(*args)) or taken[-1]

    monkeypatch.setattr(cpu, "_direct", Spy())
    group = Group(dtype, batch=batch, **ids)
    if batch == 37:  # views: every second id, rows of a wider matrix
        group.indices[0] = torch.stack([group.indices[0]] * 2, 1)[:, 0]
        group.grads = [torch.cat([group.grads[0]] * 2, 1)[:, : group.spec.slots[0]]]
        group.tables[0] = torch.cat([group.tables[0]] * 2, 1)[:, :16]
    got = every_call(group, kind)
    assert len(taken) == 4 and all(result is not None for result in taken)
    monkeypatch.setattr(cpu, "_direct", None)
    want = every_call(group, kind)
    assert len(got) == len(want)
    for mine, theirs in zip(got, want):
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape and torch.equal(mine, theirs)


@direct
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sparse_tensors_made_in_c_hold_the_same_rows_and_values(dtype):
    group = Group(dtype)
    args = (group.spec, group.grads, *group.inputs)
    made = cpu.coalesced_gradients(*args, [True, False])
    (rows, values), _ = cpu.sparse_gradients(*args, [True, False])
    assert made[1] is None and made[0].is_coalesced() and made[0].shape == group.tables[0].shape
    assert torch.equal(made[0].indices(), rows[None]) and torch.equal(made[0].values(), values)
    torch.sparse_coo_tensor(made[0].indices(), made[0].values(), made[0].shape, is_coalesced=True, check_invariants=True)


@direct
def test_count_up():
    steps = [torch.tensor(0.0), torch.tensor(7.0)]
    assert cpu.count_up(steps) and steps == [1, 8] and cpu.count_up([])
    for other in (torch.tensor(1), torch.tensor(1.0, dtype=torch.float64), torch.tensor([1.0]), 3, torch.tensor(1.0, device="meta")):
        assert not cpu.count_up([steps[0], other])
    assert steps == [1, 8]


@direct
@pytest.mark.parametrize("kind", ["sgd", "adagrad", "rowwise_adagrad", "adam"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_update_from_coalesced_gradients(dtype, kind):
    group = Group(dtype)
    grads = [
        torch.sparse_coo_tensor(torch.tensor([[0, 3, 49]]), torch.randn(3, t.shape[1]).to(dtype), t.shape, is_coalesced=True)
        for t in group.tables
    ]
    mine, theirs = ([t.clone() for t in group.tables] for _ in range(2))
    rules, other_rules = group.rules(kind), group.rules(kind)
    assert cpu.update_from_gradients(mine, grads, rules)
    cpu.update_from_sparse(theirs, [g._indices()[0] for g in grads], [g._values() for g in grads], other_rules)
    for a, b in zip([*mine, *(s for r in rules for s in r.state)], [*theirs, *(s for r in other_rules for s in r.state)]):
        assert torch.equal(a, b)


@direct
def test_gradients_that_are_not_coalesced_are_left_alone():
    table = torch.randn(5, 4)
    before = table.clone()
    twice = torch.sparse_coo_tensor(torch.tensor([[3, 3]]), torch.ones(2, 4), (5, 4))
    liar = torch.sparse_coo_tensor(torch.tensor([[3, 1]]), torch.ones(2, 4), (5, 4), is_coalesced=True, check_invariants=False)
    outside = torch.sparse_coo_tensor(torch.tensor([[1, 9]]), torch.ones(2, 4), (10, 4), is_coalesced=True)
    for grad in (twice, liar, outside, torch.ones(5, 4).to_sparse().double(), torch.ones(5, 3).to_sparse()):
        assert not cpu.update_from_gradients([table], [grad], [TableUpdate("sgd", 0.1)])
    assert torch.equal(table, before)


class Mine(torch.Tensor):
    pass


SPEC = GroupSpec((Table("t", 5, 4),), (Lookup(0, "l", "none", 0, 0),), (4,))


@direct
@pytest.mark.parametrize(
    "table,ids",
    [
        (torch.zeros(5, 4, dtype=torch.int32), torch.tensor([1])),
        (torch.zeros(5, 4, dtype=torch.complex64), torch.tensor([1])),
        (torch.zeros(5, 4, device="meta"), torch.tensor([1])),
        (torch.zeros(5, 4).as_subclass(Mine), torch.tensor([1])),
        (torch.zeros(5, 4), torch.tensor([1]).as_subclass(Mine)),
        (torch.zeros(5, 4), torch.tensor([1], device="meta")),
        (torch.zeros(5, 4), torch.tensor([1.0])),
        (torch.zeros(5, 4), torch.tensor([1], dtype=torch.int16)),
        (torch.zeros(5, 4), torch.tensor([5])),
        (torch.zeros(5, 4), torch.tensor([-1])),
        (torch.zeros(4, 5).t(), torch.tensor([1])),
        (torch.zeros(6, 4), torch.tensor([1])),
        (torch.zeros(20), torch.tensor([1])),
        (None, torch.tensor([1])),
        (torch.zeros(5, 4), [1]),
    ],
)
def test_what_is_not_plain_is_not_taken(table, ids):
    plan = cpu.plan_of(SPEC)
    assert cpu._direct.forward(plan.reading, 1, [table], [ids], [None], [None], [], SPEC.slots) is None
    for layout in range(3):
        args = (plan.pointer, 1, [torch.ones(1, 4)], [table], [ids], [None], [None], SPEC.slots, [True], layout)
        assert cpu._direct.gradients(*args) is None
    rules = [TableUpdate("sgd", 0.1)]
    assert cpu._direct.update(plan.pointer, 1, [torch.ones(1, 4)], [table], [ids], [None], [None], SPEC.slots, rules) is None


@direct
def test_lists_of_the_wrong_length_are_not_taken():
    plan, table, ids = cpu.plan_of(SPEC), torch.zeros(5, 4), torch.tensor([1])
    assert cpu._direct.forward(plan.reading, 1, [table, table], [ids], [None], [None], [], SPEC.slots) is None
    assert cpu._direct.forward(plan.reading, 1, [table], [], [None], [None], [], SPEC.slots) is None
    with pytest.raises(TypeError, match="arguments"):
        cpu._direct.forward(plan.reading)


@direct
def test_nothing_is_leaked():
    group = Group()
    watched = [weakref.ref(t) for t in (*group.tables, *group.indices, *group.grads, *group.extras)]
    results = every_call(group, "adagrad")
    watched += [weakref.ref(t) for t in results]
    del group, results
    gc.collect()
    assert all(ref() is None for ref in watched)


@direct
def test_memory_is_used_again_but_never_while_in_use():
    table, ids = torch.randn(10, 512), torch.zeros(1024, dtype=torch.int64)  # results of two megabytes
    first = lookup(table, ids)
    where, view = first.data_ptr(), first[5:]
    del first
    assert lookup(table, ids).data_ptr() != where
    numpy_view = view.numpy()
    del view
    assert lookup(table, ids).data_ptr() != where and (numpy_view == table[0].numpy()).all()
    del numpy_view
    assert lookup(table, ids).data_ptr() == where


@direct
def test_the_gradient_of_one_table_outlives_the_others():
    group = Group(torch.float32, batch=37)
    wanted = [True] * len(group.tables)
    gradients = cpu.coalesced_gradients(group.spec, group.grads, *group.inputs, wanted)
    kept = gradients[1]
    before = kept.to_dense()
    assert kept.is_coalesced() and kept._values().untyped_storage().nbytes() == 4 * kept._values().numel()
    del gradients
    for _ in range(3):
        cpu.coalesced_gradients(group.spec, [2 * g for g in group.grads], *group.inputs, wanted)
    assert torch.equal(kept.to_dense(), before) and torch.equal((kept + kept).to_dense(), 2 * before)


@direct
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_writes_into_results_of_its_own(run_python):
    code = """
import os, torch
from tablewright.kernels.embedding.op import call
from tablewright.kernels.embedding.spec import GroupSpec, Lookup, Table
torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
spec = GroupSpec((Table("t", 10, 512),), (Lookup(0, "l", "none", 0, 0),), (512,)).encode()
table, ids = torch.ones(10, 512), torch.zeros(1024, dtype=torch.int64)
held = call([table], [ids], [None], [None], [], spec)[0]
child = os.fork()
if child == 0:
    held.zero_()
    call([table * 2], [ids], [None], [None], [], spec)[0].zero_()
    os._exit(0)
os.waitpid(child, 0)
print(bool((held == 1.0).all()))
"""
    assert run_python(code) == "True"


# --- what autograd keeps of a lookup ----------------------------------------------------------------------------------------


def lookup(table, ids, offsets=None, weights=None):
    pooling = "none" if offsets is None else "sum"
    spec = GroupSpec((Table("t", *table.shape),), (Lookup(0, "l", pooling, 0, 0),), (table.shape[1],))
    return op.call([table], [ids], [offsets], [weights], [], spec.encode())[0]


@pytest.mark.parametrize("count", [0, 1, op._FEW, op._FEW + 1])
@pytest.mark.parametrize("grad", ["dense", "sparse", "none"])
@pytest.mark.parametrize("padding", [None, 3])
def test_one_lookup_of_few_ids_means_what_many_do(count, grad, padding):
    table = torch.randn(50, 4, requires_grad=True)
    ids = torch.randint(0, 50, (count,), dtype=torch.int32)
    spec = GroupSpec((Table("t", 50, 4, grad),), (Lookup(0, "l", "none", 0, 0, padding),), (4,)).encode()
    (out,) = op.call([table], [ids], [None], [None], [], spec)
    assert torch.equal(out, table[ids.long()]) and out.requires_grad == (grad != "none")
    if out.requires_grad:
        weights = torch.randn(count, 4)
        (out * weights).sum().backward()
        rows = ids.long() if padding is None else ids.long()[ids != padding]
        expected = torch.zeros(50, 4).index_add(0, rows, weights if padding is None else weights[ids != padding])
        assert table.grad.is_sparse == (grad == "sparse")
        assert not table.grad.is_sparse or table.grad.is_coalesced()
        torch.testing.assert_close(table.grad.to_dense(), expected)
    with torch.no_grad():
        assert torch.equal(op.call([table], [ids], [None], [None], [], spec)[0], out)


@pytest.mark.parametrize("count", [3, op._FEW + 1])
def test_one_lookup_of_few_ids_is_widened_as_asked(count):
    table, ids = torch.randn(5, 4, dtype=torch.bfloat16, requires_grad=True), torch.randint(5, (count,))
    spec = GroupSpec((Table("t", 5, 4),), (Lookup(0, "l", "none", 0, 0),), (4,), wide=True).encode()
    (out,) = op.call([table], [ids], [None], [None], [], spec)
    assert out.dtype == torch.float32 and torch.equal(out, table[ids].float())


@pytest.mark.parametrize("few", [3, op._FEW + 1])
@pytest.mark.parametrize("wrong,error,words", [(9, IndexError, "9"), (-1, IndexError, "-1"), (1.0, TypeError, "float32")])
def test_one_lookup_of_bad_ids_says_which(few, wrong, error, words):
    ids = torch.zeros(few, dtype=torch.float32 if isinstance(wrong, float) else torch.int64)
    ids[2] = wrong
    for mode in (torch.no_grad(), torch.enable_grad()):
        with mode, pytest.raises(error, match=rf"'[lt]'.*{words}|{words}.*'t'"):
            lookup(torch.randn(5, 4, requires_grad=True), ids)


@pytest.mark.parametrize("which", ["ids", "offsets", "weights"])
def test_inputs_changed_before_the_backward_are_an_error(which):
    table = torch.randn(5, 4, requires_grad=True)
    given = {"ids": torch.tensor([1, 2, 3]), "offsets": torch.tensor([0, 1]), "weights": torch.rand(3)}
    out = lookup(table, *given.values())
    given[which].add_(0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_a_second_backward_is_refused_and_retaining_allows_it():
    table = torch.randn(5, 4, requires_grad=True)
    loss = lookup(table, torch.tensor([1, 1, 2])).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    assert torch.equal(table.grad, torch.tensor([0.0, 4, 2, 0, 0])[:, None].expand(5, 4))
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_saved_tensor_hooks_see_ids_and_a_checkpoint_drops_them():
    table = torch.randn(5, 4, requires_grad=True)
    ids, offsets, weights = torch.tensor([1, 1, 2]), torch.tensor([0, 2]), torch.rand(3, requires_grad=True)
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t.clone(), lambda t: t):
        lookup(table, ids, offsets, weights).square().sum().backward()
    assert any(t is ids for t in packed) and any(t is offsets for t in packed)
    want = table.grad, weights.grad
    table.grad = weights.grad = None
    kept = []

    def part(ids):
        moved = (ids + 5) % 5
        kept.append(weakref.ref(moved))
        return lookup(table, moved, offsets, weights).square()

    loss = checkpoint(part, ids, use_reentrant=False).sum()
    assert kept[0]() is None
    loss.backward()
    assert torch.equal(table.grad, want[0]) and torch.equal(weights.grad, want[1])


@pytest.mark.parametrize("rows", [50, 20_000])
def test_the_default_device_does_not_matter(rows):
    table, ids = torch.randn(rows, 32, requires_grad=True), torch.randint(rows, (rows,))
    spec = GroupSpec((Table("t", rows, 32, "sparse"),), (Lookup(0, "l", "none", 0, 0),), (32,)).encode()
    with torch.device("meta"):
        (out,) = op.call([table], [ids], [None], [None], [], spec)
        out.sum().backward()
    assert torch.equal(out, table[ids]) and table.grad.device.type == "cpu"
    assert torch.equal(table.grad.to_dense()[:, 0], torch.bincount(ids, minlength=rows).float())


def test_gradients_add_up_after_a_backward_without_ids():
    table = torch.nn.Parameter(torch.randn(9, 3))
    spec = GroupSpec((Table("t", 9, 3, "sparse"),), (Lookup(0, "l", "sum", 0, 0),), (3,)).encode()
    for ids in (torch.empty(2, 0, dtype=torch.int64), torch.tensor([[1, 4], [4, 8]])):
        (out,) = op.call([table], [ids], [None], [None], [], spec)
        out.sum().backward()
    assert torch.equal(table.grad.to_dense().sum(1), torch.tensor([0, 3, 0, 0, 6, 0, 0, 0, 3.0]))
