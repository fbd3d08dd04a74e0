"""The reference against PyTorch itself: F.embedding, F.embedding_bag, autograd and torch.optim, in float64."""

import pytest
import torch
import torch.nn.functional as F
from tablewright.kernels.embedding import reference
from tablewright.kernels.embedding.spec import GroupSpec, Lookup, Table, decode
from tablewright.kernels.embedding.updates import TableUpdate

ROWS, DIM = 23, 5


def bag_of(ids, weight, offsets, pooling, padding_idx=None, include_last=False, sample_weights=None):
    """What PyTorch computes for one lookup."""
    if pooling == "none":
        return F.embedding(ids, weight, padding_idx=padding_idx)
    if offsets is None and ids.shape[1] == 0:  # F.embedding_bag has no answer for L = 0
        return weight.new_zeros(ids.shape[0], weight.shape[1])
    return F.embedding_bag(
        ids,
        weight,
        offsets,
        mode=pooling,
        padding_idx=padding_idx,
        include_last_offset=include_last,
        per_sample_weights=sample_weights,
    )


CASES = {
    "flat": dict(pooling="none", ids=[3, 3, 22, 0, 7]),
    "square": dict(pooling="none", ids=[[3, 1], [22, 3]]),
    "padded": dict(pooling="none", ids=[3, 4, 3, 5], padding_idx=3),
    "scalar": dict(pooling="none", ids=4),
    "no ids": dict(pooling="none", ids=[]),
    "fixed sum": dict(pooling="sum", ids=[[3, 1, 3], [22, 0, 1]]),
    "fixed mean": dict(pooling="mean", ids=[[3, 1, 3], [22, 0, 1]]),
    "fixed weighted": dict(pooling="sum", ids=[[3, 1, 3], [22, 0, 1]], weighted=True),
    "fixed padded": dict(pooling="mean", ids=[[3, 1, 3], [3, 3, 3]], padding_idx=3),
    "ragged sum": dict(pooling="sum", ids=[1, 2, 3, 3, 2, 22], offsets=[0, 2, 2, 5]),
    "ragged mean": dict(pooling="mean", ids=[1, 2, 3, 3, 2, 22], offsets=[0, 2, 2, 5]),
    "ragged padded": dict(pooling="mean", ids=[1, 2, 3, 3, 2, 22], offsets=[0, 2, 2, 4], padding_idx=2),
    "ragged weighted": dict(pooling="sum", ids=[1, 2, 3, 3, 2, 22], offsets=[0, 2, 2, 5], weighted=True),
    "weighted padded": dict(pooling="sum", ids=[1, 2, 3, 3, 2, 22], offsets=[0, 2, 2, 5], weighted=True, padding_idx=3),
    "last offset": dict(pooling="mean", ids=[1, 2, 3, 3, 2], offsets=[0, 2, 2, 5], include_last=True),
    "all bags empty": dict(pooling="mean", ids=[], offsets=[0, 0]),
    "no bags": dict(pooling="sum", ids=[], offsets=[]),
    "L is 0": dict(pooling="mean", ids=[[], []]),
}


@pytest.mark.parametrize("name", CASES)
def test_forward_and_gradients(name):
    case = dict(CASES[name])
    torch.manual_seed(0)
    ids = torch.tensor(case["ids"], dtype=torch.int64)
    offsets = None if "offsets" not in case else torch.tensor(case["offsets"], dtype=torch.int64)
    weight = torch.randn(ROWS, DIM, dtype=torch.float64, requires_grad=True)
    sample_weights = torch.randn(ids.shape, dtype=torch.float64, requires_grad=True) if case.get("weighted") else None
    padding_idx, include_last = case.get("padding_idx"), case.get("include_last", False)
    spec = GroupSpec(
        (Table("t.weight", ROWS, DIM),),
        (Lookup(0, "t", case["pooling"], 0, 2, padding_idx=padding_idx, include_last_offset=include_last),),
        (DIM + 4,),
    )
    want = bag_of(ids, weight, offsets, case["pooling"], padding_idx, include_last, sample_weights)
    (got,) = reference.forward(spec, [weight], [ids], [offsets], [sample_weights], [])
    assert got.shape == (*want.shape[:-1], DIM + 4)
    torch.testing.assert_close(got[..., 2 : 2 + DIM], want.detach(), rtol=1e-12, atol=1e-12)
    assert not got[..., :2].any() and not got[..., 2 + DIM :].any()

    grad = torch.randn(got.shape, dtype=torch.float64)
    if want.requires_grad:
        want.backward(grad[..., 2 : 2 + DIM])
    expected = torch.zeros_like(weight) if weight.grad is None else weight.grad
    arguments = (spec, [grad], [weight], [ids], [offsets], [sample_weights], [True])
    (dense,) = reference.dense_gradients(*arguments)
    torch.testing.assert_close(dense, expected, rtol=1e-12, atol=1e-12)
    ((rows, values),) = reference.sparse_gradients(*arguments)
    assert (rows[1:] > rows[:-1]).all() and rows.dtype == torch.int64
    torch.testing.assert_close(torch.zeros_like(weight).index_copy(0, rows, values).detach(), expected, rtol=1e-12, atol=1e-12)
    if padding_idx is not None:
        assert padding_idx not in rows.tolist()
    if sample_weights is not None:
        (got_weights,) = reference.sample_weight_gradients(*arguments)
        torch.testing.assert_close(got_weights, sample_weights.grad, rtol=1e-12, atol=1e-12)


OPTIMIZERS = {
    "sgd": (lambda p: torch.optim.SGD(p, lr=0.1), lambda t, step: dict(kind="sgd", lr=0.1)),
    "adagrad": (lambda p: torch.optim.Adagrad(p, lr=0.1, eps=1e-3), lambda t, step: dict(kind="adagrad", lr=0.1, eps=1e-3)),
    "adam": (
        lambda p: torch.optim.SparseAdam(p, lr=0.1, betas=(0.8, 0.9), eps=1e-3),
        lambda t, step: dict(kind="adam", lr=0.1, beta1=0.8, beta2=0.9, eps=1e-3, step=step),
    ),
    "sgd maximize": (lambda p: torch.optim.SGD(p, lr=0.1, maximize=True), lambda t, step: dict(kind="sgd", lr=0.1, maximize=True)),
    "adam maximize": (
        lambda p: torch.optim.SparseAdam(p, lr=0.1, maximize=True),
        lambda t, step: dict(kind="adam", lr=0.1, beta1=0.9, beta2=0.999, eps=1e-8, step=step, maximize=True),
    ),
}
STATES = {"sgd": 0, "adagrad": 1, "adam": 2}


@pytest.mark.parametrize("from_sparse", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_updates_equal_torch_optim(name, from_sparse):
    """Three steps over a table that two lookups share."""
    torch.manual_seed(1)
    make, rule = OPTIMIZERS[name]
    plain = torch.nn.Parameter(torch.randn(ROWS, DIM, dtype=torch.float64))
    ours = plain.detach().clone()
    optimizer = make([plain])
    spec = GroupSpec((Table("t.weight", ROWS, DIM),), (Lookup(0, "a", "sum", 0, 0), Lookup(0, "b", "none", 1, 0)), (DIM, DIM))
    kind = rule(ours, 1)["kind"]
    state = tuple(torch.zeros_like(ours) for _ in range(STATES[kind]))
    for step in range(1, 4):
        ids = [torch.randint(ROWS, (4, 3)), torch.randint(ROWS, (6,))]
        grads = [torch.randn(4, DIM, dtype=torch.float64), torch.randn(6, DIM, dtype=torch.float64)]
        optimizer.zero_grad()
        sparse = "adam" in name or "adagrad" in name
        out = [F.embedding_bag(ids[0], plain, mode="sum", sparse=sparse), F.embedding(ids[1], plain, sparse=sparse)]
        torch.autograd.backward(out, grads)
        optimizer.step()
        update = TableUpdate(state=state, **rule(ours, step))
        arguments = (spec, grads, [ours], ids, [None, None], [None, None])
        if from_sparse:
            ((rows, values),) = reference.sparse_gradients(*arguments, [True])
            reference.update_from_sparse([ours], [rows], [values], [update])
        else:
            reference.update(*arguments, [update])
        torch.testing.assert_close(ours, plain.detach(), rtol=1e-11, atol=1e-11)


def test_rowwise_adagrad_and_decay_by_hand():
    spec = GroupSpec((Table("t.weight", 4, 2),), (Lookup(0, "t", "none", 0, 0),), (2,))
    table = torch.ones(4, 2, dtype=torch.float64)
    state = torch.zeros(4, dtype=torch.float64)
    grad = torch.tensor([[1.0, 2.0], [2.0, 2.0], [5.0, 5.0]], dtype=torch.float64)
    rule = TableUpdate("rowwise_adagrad", lr=0.5, eps=1.0, weight_decay=0.1, state=(state,))
    reference.update(spec, [grad], [table], [torch.tensor([1, 1, 3])], [None], [None], [rule])
    # Row 1: g = (3, 4), mean square 12.5; row 3: g = (5, 5), mean square 25, root 5.
    assert state.tolist() == [0, 12.5, 0, 25]
    torch.testing.assert_close(table[3], torch.full((2,), 0.95 - 0.5 * 5 / 6, dtype=torch.float64))
    torch.testing.assert_close(table[1], 0.95 - 0.5 * torch.tensor([3.0, 4.0], dtype=torch.float64) / (12.5**0.5 + 1))
    assert (table[0] == 1).all() and (table[2] == 1).all()


def test_ids_after_the_last_offset_belong_to_no_bag():
    spec = GroupSpec((Table("t.weight", 9, 1),), (Lookup(0, "t", "mean", 0, 0, include_last_offset=True),), (1,))
    table = torch.arange(9.0)[:, None]
    ids, offsets = torch.tensor([1, 3, 8, 8]), torch.tensor([0, 1, 2])
    (out,) = reference.forward(spec, [table], [ids], [offsets], [None], [])
    assert out.tolist() == [[1], [3]]
    ((rows, _),) = reference.sparse_gradients(spec, [torch.ones(2, 1)], [table], [ids], [offsets], [None], [True])
    assert rows.tolist() == [1, 3]


def test_wrapped_ids_mean_indexing():
    spec = GroupSpec((Table("w", ROWS, DIM),), (Lookup(0, "w[ids]", "none", 0, 0, wrap_negative=True),), (DIM,))
    table, ids = torch.randn(ROWS, DIM), torch.tensor([-1, 0, -ROWS, 5])
    (out,) = reference.forward(spec, [table], [ids], [None], [None], [])
    assert torch.equal(out, table[ids])
    with pytest.raises(IndexError, match=r"id -24 at position 0 .* ids must be in \[-23, 23\)"):
        reference.forward(spec, [table], [ids[:1] - ROWS], [None], [None], [])


def test_a_spec_survives_its_text():
    spec = GroupSpec((Table("w", 3, 4, "sparse"),), (Lookup(0, "w", "mean", 0, 1, padding_idx=2),), (5,))
    assert decode(spec.encode()) == spec and decode(spec.encode()) is decode(spec.encode())
