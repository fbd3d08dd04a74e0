"""The step of tables that are cut into columns, in C++ and in PyTorch (over real ranks: tests/rewriter/test_sharding.py)."""
from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tablewright.kernels.collectives import row_squares
from tablewright.kernels.embedding.updates import TableUpdate


def work_of(dtype, widths, weight_decay, maximize):
    torch.manual_seed(0)
    work = []
    for number, (count, columns) in enumerate(widths):
        block = torch.randn(50, columns + number, dtype=dtype)[:, :columns]
        rows = torch.randperm(50)[:count].sort().values
        rule = TableUpdate("rowwise_adagrad", lr=0.1, eps=1e-3, weight_decay=weight_decay, maximize=maximize, state=(torch.rand(50, dtype=dtype),))
        work.append((f"t{number}", block, rows, torch.randn(count, columns, dtype=dtype), rule))
    return work


def stepped(work, others):
    """Blocks and states after a step, with the squares of other ranks' columns."""
    squares = row_squares.RowSquares({}, 0, "")
    squares.layouts = {name: SimpleNamespace(dim=2 * block.shape[1]) for name, block, *_ in work}
    seen = []

    def totals(names, mine):
        seen.extend(m.clone() for m in mine)
        return [m + others[n][: len(m)].to(m.dtype) for n, m in zip(names, mine)]

    squares.totals = totals
    squares.update(work)
    return [t for _, block, _, _, rule in work for t in (block, rule.state[0])] + seen


@pytest.mark.skipif(row_squares._lib is None, reason="NOT TESTED: the C++ library was not built")
@pytest.mark.parametrize(("weight_decay", "maximize"), [(0.0, False), (0.2, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_native_step_equals_the_plain_one(dtype, weight_decay, maximize, monkeypatch):
    widths = [(20, 32), (0, 8), (50, 7), (1, 17), (13, 1)]
    others = {f"t{n}": torch.rand(50, dtype=torch.float64) for n in range(len(widths))}
    ran = []
    native = row_squares.RowSquares._update_natively
    monkeypatch.setattr(row_squares.RowSquares, "_update_natively", lambda *args: ran.append(1) or native(*args))
    ours = stepped(work_of(dtype, widths, weight_decay, maximize), others)
    assert ran
    monkeypatch.setattr(row_squares, "_lib", None)
    plain = stepped(work_of(torch.float64 if dtype == torch.float64 else dtype, widths, weight_decay, maximize), others)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_other_dtypes_take_the_plain_way():
    (name, block, rows, values, rule), *_ = work_of(torch.float32, [(20, 32)], 0.0, False)
    assert row_squares._is_native([(name, block, rows, values, rule)])
    assert not row_squares._is_native([(name, block.bfloat16(), rows, values, rule)])
    assert not row_squares._is_native([(name, block.t().contiguous().t(), rows, values, rule)])
