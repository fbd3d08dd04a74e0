"""``distributed_gather`` and ``distributed_gather_bag`` against torch's own lookups."""
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tablewright.kernels.gather.op import BAG, GATHER, bound

TABLE = torch.randn(30, 6)


@pytest.fixture(autouse=True)
def rows():
    with bound(lambda table, ids: {"t": TABLE}[table][ids]):
        yield


def test_gather_equals_embedding():
    for ids in (torch.randint(30, (4, 3)), torch.tensor([29, 29, 0]), torch.empty(0, dtype=torch.int64), torch.tensor([1], dtype=torch.int32)):
        assert torch.equal(GATHER(ids, "t", 30, 6), F.embedding(ids, TABLE))
    assert torch.equal(GATHER(torch.tensor([-1, -30, 5]), "t", 30, 6, True), TABLE[[-1, -30, 5]])


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("padding", [-1, 4])
def test_bag_equals_embedding_bag(mode, padding):
    given = None if padding < 0 else padding
    ids, offsets = torch.tensor([4, 1, 29, 29, 4, 0]), torch.tensor([0, 1, 1, 4])  # one bag is only padding, one is empty
    assert torch.equal(BAG(ids, offsets, None, "t", 30, 6, mode, padding), F.embedding_bag(ids, TABLE, offsets, mode=mode, padding_idx=given))
    last = torch.tensor([0, 1, 1, 6])
    expected = F.embedding_bag(ids, TABLE, last, mode=mode, padding_idx=given, include_last_offset=True)
    assert torch.equal(BAG(ids, last, None, "t", 30, 6, mode, padding, True), expected)
    matrix = ids.reshape(2, 3)
    assert torch.equal(BAG(matrix, None, None, "t", 30, 6, mode, padding), F.embedding_bag(matrix, TABLE, mode=mode, padding_idx=given))
    if mode == "sum":
        weights = torch.randn(2, 3)
        expected = F.embedding_bag(matrix, TABLE, mode=mode, padding_idx=given, per_sample_weights=weights)
        torch.testing.assert_close(BAG(matrix, None, weights, "t", 30, 6, mode, padding), expected)  # torch may fuse multiply and add
    assert BAG(torch.empty(0, 3, dtype=torch.int64), None, None, "t", 30, 6, mode, padding).shape == (0, 6)


def test_errors_name_the_table():
    with pytest.raises(IndexError, match="id 30 is not a row of table 't', which has 30"):
        GATHER(torch.tensor([0, 30]), "t", 30, 6)
    with pytest.raises(IndexError, match="id -31"):
        GATHER(torch.tensor([-31]), "t", 30, 6, True)
    with pytest.raises(RuntimeError, match=r"came as \[1, 6\]; \[1, 7\]"):
        GATHER(torch.tensor([3]), "t", 30, 7)
    with pytest.raises(ValueError, match="mode is 'min'"):
        BAG(torch.tensor([[3]]), None, None, "t", 30, 6, "min")


def test_nothing_bound_is_an_error_that_says_what_to_do():
    import contextvars

    with pytest.raises(RuntimeError, match="table 't' is not in this graph.*load_serving"):
        contextvars.Context().run(GATHER, torch.tensor([3]), "t", 30, 6)


def test_opcheck():
    torch.library.opcheck(GATHER, (torch.tensor([[3, 1]]), "t", 30, 6))
    torch.library.opcheck(BAG, (torch.tensor([3, 1]), torch.tensor([0, 1]), None, "t", 30, 6, "sum"))
    torch.library.opcheck(BAG, (torch.tensor([[3, 1]]), None, torch.rand(1, 2), "t", 30, 6, "sum"))
