"""Stored rows, memory that is used again, and the cache's slots, without processes."""
from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from tablewright.kernels.codecs.op import decode as torch_decode
from tablewright.kernels.codecs.op import encode
from tablewright.kernels.errors import VersionSkew
from tablewright.kernels.gather.room import Room
from tablewright.kernels.gather.tables import CODECS, Table, decode


@pytest.mark.parametrize("row_dtype", CODECS)
@pytest.mark.parametrize("dim", [1, 6, 64])
def test_numpy_reads_what_torch_wrote_bit_for_bit(row_dtype, dim):
    rows = torch.randn(50, dim) * torch.logspace(-6, 6, 50)[:, None]
    rows[3], rows[4], rows[5, 0] = 0, 1e-40, torch.inf
    table = Table("t", 50, dim, row_dtype)
    payload = encode(rows, CODECS[row_dtype])
    assert payload.shape[1] == table.row_bytes
    stored = payload.numpy().view(table.stored).reshape(50, table.width)
    wanted = torch_decode(payload, CODECS[row_dtype], dim, torch.float32).numpy()
    assert np.array_equal(decode(stored, table), wanted, equal_nan=True)


def test_an_unknown_form_of_rows_is_named():
    with pytest.raises(VersionSkew, match="row_dtype 'int4'.*reads float32"):
        Table("t", 3, 4, "int4")


def test_room_is_used_again_and_is_a_threads_own():
    a, b, c = Table("a", 10, 4), Table("b", 10, 4), Table("c", 10, 4, "int8_rowwise")
    room, requests = Room(), [("a", np.arange(3)), ("b", np.arange(2)), ("a", np.arange(0))]
    whole, parts = room.for_requests(requests, {"a": a, "b": b})
    for k, part in enumerate(parts):
        part[:] = k
    assert whole.tolist() == [[0] * 4] * 3 + [[1] * 4] * 2 and [len(p) for p in parts] == [3, 2, 0]
    assert np.shares_memory(room.rows(5, a), whole)
    others = []
    thread = threading.Thread(target=lambda: others.append(room.rows(5, a)))
    thread.start()
    thread.join()
    assert not np.shares_memory(others[0], whole)
    whole, parts = room.for_requests([("a", np.arange(3)), ("c", np.arange(2))], {"a": a, "c": c})  # two forms: two arrays
    assert whole is None and [p.shape for p in parts] == [(3, 4), (2, 12)] and parts[1].dtype == np.uint8
