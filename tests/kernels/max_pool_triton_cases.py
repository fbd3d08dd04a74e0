"""The Triton kernel of ``embedding_max`` beside ``plain.py``. Run by ``test_max_pool_triton.py``, in a process of its own."""
from __future__ import annotations

import os

import max_pool_cases as data
import pytest
import torch
from tablewright.kernels.embedding import id_status
from tablewright.kernels.max_pool import gpu, plain
from tablewright.kernels.max_pool.op import _starts
from tablewright.kernels.max_pool.plain import How

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_case(dtype):
    table = data.tables(dtype, DEVICE)
    for ids, offsets, mask, kind, fill, mode, padding, last in data.cases():
        if mode == "amax" or dtype == torch.float16 and (kind != "none" or ids.shape[0] == 0):
            continue
        how = How(kind, mode, fill, padding)
        ids, offsets = ids.to(DEVICE), None if offsets is None else offsets.to(DEVICE)
        mask = None if mask is None else mask.to(DEVICE)
        starts = _starts(ids, offsets, last)
        out, chosen = gpu.forward(table, ids.long(), starts, mask, how)
        want, place = plain.forward(table, ids.long(), starts, mask, how)
        assert torch.equal(out, want) and torch.equal(chosen, place)
    id_status.check_ids()


def test_columns_in_blocks_and_special_values():
    table = torch.randn(9, 300, device=DEVICE)
    table[2, ::7], table[3, ::5] = float("nan"), -torch.inf
    ids = torch.randint(0, 9, (4, 6), device=DEVICE)
    ids[0], ids[1, 0] = 3, 2
    for mode in ("max", "bag"):
        how = How(mode=mode)
        for made, want in zip(gpu.forward(table, ids, None, None, how), plain.forward(table, ids, None, None, how)):
            torch.testing.assert_close(made, want, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("bad", [9, -1, 2**40])
def test_bad_ids_are_reported(bad):
    table = torch.randn(9, 4, device=DEVICE)
    ids = torch.tensor([[1, 2], [3, bad]], device=DEVICE)
    _, chosen = gpu.forward(table, ids, None, None, How())
    assert int(chosen.max()) <= 1
    with pytest.raises(IndexError, match=f"id {bad} at position 3"):
        id_status.check_ids()
