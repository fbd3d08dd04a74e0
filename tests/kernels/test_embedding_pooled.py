"""One pooled lookup as a call, and the signs of row sums."""
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tablewright.kernels.embedding import cpu, reference
from tablewright.kernels.embedding.pooled import POOL, ROW_SUMS
from tablewright.kernels.embedding.spec import GroupSpec, Lookup, Table


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize(("padding_idx", "read"), [(-1, True), (2, True), (2, False)])
def test_pool_like_plain_torch(padding_idx, read, weighted, native, monkeypatch):
    if not native:
        monkeypatch.setattr(cpu, "_lib", None)
    torch.manual_seed(0)
    table = torch.randn(20, 4, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(0, 20, (6, 9))
    ids[:, 1::3] = 2
    ids[3] = 2
    weights = torch.rand(6, 9, dtype=torch.float64, requires_grad=True) if weighted else None
    given = [t for t in (table, weights) if t is not None]
    rows = F.embedding(ids, table, padding_idx if padding_idx >= 0 else None)
    kept = (ids == ids) if read else ids != 2
    plain = (rows * kept.unsqueeze(2) * (1 if weights is None else weights.unsqueeze(2))).sum(1)
    ours = POOL(table, ids, weights, padding_idx, read)
    torch.testing.assert_close(ours, plain)
    for a, b in zip(torch.autograd.grad(ours.square().sum(), given), torch.autograd.grad(plain.square().sum(), given)):
        torch.testing.assert_close(a, b)


def test_a_padding_row_that_is_read_is_not_updated():
    """In the backward that updates rows at once, too."""
    from tablewright.kernels.embedding.updates import TableUpdate

    spec = GroupSpec((Table("t", 5, 3, "in_backward"),), (Lookup(0, "t", "sum", 0, 0, 1, padding_read=True),), (3,))
    tables = [torch.randn(5, 3) for _ in range(2)]
    tables[1].copy_(tables[0])
    before = tables[0].clone()
    ids = [torch.tensor([[1, 2, 1], [4, 4, 1]])]
    grads = [torch.ones(2, 3)]
    for implementation, table in zip((cpu, reference), tables):
        (sums,) = implementation.forward(spec, [table], ids, [None], [None], [])
        torch.testing.assert_close(sums, before[ids[0]].sum(1))
        implementation.update(spec, grads, [table], ids, [None], [None], [TableUpdate("sgd", 0.1)])
        assert torch.equal(table[[0, 1, 3]], before[[0, 1, 3]])
        torch.testing.assert_close(table[[2, 4]], before[[2, 4]] - torch.tensor([[0.1], [0.2]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("dim", [1, 2, 4, 7, 10, 64])
def test_row_sums_are_zero_where_they_are(dim, dtype):
    """Rows that cancel up to rounding, or exactly, or only in PyTorch's order of summing."""
    torch.manual_seed(dim)
    table = torch.randn(3000, dim, dtype=dtype)
    cancelling = torch.randint(0, 3000, (1500,))
    table[cancelling, -1] = -table[cancelling, :-1].sum(-1)
    table[5] = 0
    table[6, 0] = torch.inf
    zeros = 0
    for given in (table, table[:, torch.randperm(dim)], torch.cat([table, table], 1)[:, :dim]):
        ids = torch.randint(0, 3000, (200, 17), dtype=torch.int32 if dim % 2 else torch.int64)
        found, wanted = ROW_SUMS(given, ids), given[ids.long()].sum(-1)
        assert torch.equal(found != 0, wanted != 0) and torch.equal(found > 0, wanted > 0)
        zeros += int((wanted == 0).sum())
    assert zeros


def test_row_sums_of_bad_ids_and_none():
    table = torch.randn(4, 2)
    for bad in (4, -1):
        with pytest.raises(IndexError, match=str(bad)):
            ROW_SUMS(table, torch.tensor([[1, bad]]))
    assert ROW_SUMS(table, torch.empty(0, 3, dtype=torch.int64)).shape == (0, 3)


def test_compiled():
    table, ids = torch.randn(20, 4), torch.randint(0, 20, (5, 3))

    def run(table, ids):
        return POOL(table, ids) + (ROW_SUMS(table, ids) != 0).sum(1, keepdim=True)

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(table, ids), run(table, ids))
