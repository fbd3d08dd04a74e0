"""The Triton forward over int8 rows beside ``reference.py``. Run by ``test_embedding_triton.py``, in a process of its own."""
from __future__ import annotations

import os

import pytest
import torch
from tablewright.kernels.codecs.op import reference_encode
from tablewright.kernels.embedding import gpu, reference
from tablewright.kernels.embedding.spec import Extra, GroupSpec, Lookup, Table

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
SPARE = 8  # bytes of a row besides its codes


@pytest.fixture(autouse=True)
def _fresh():
    torch.manual_seed(0)
    yield
    gpu.check_ids()


def coded(rows, dim):
    made = torch.randn(rows, dim) * 10.0 ** torch.randint(-3, 3, (rows, 1))
    made[rows // 2] = 0
    return reference_encode(made, "int8").to(DEVICE)


def both(monkeypatch, spec, *inputs):
    """What the kernel and the reference give; the kernel may not hand over."""
    expected = reference.forward(spec, *inputs)
    with monkeypatch.context() as patch:
        patch.setattr(reference, "read_rows", lambda *_: pytest.fail("went to the reference"))
        return gpu.forward(spec, *inputs), expected


@pytest.mark.parametrize("dim", [1, 4, 7, 33, 64, 128, 200])
def test_every_kind_of_lookup_at_any_width(dim, monkeypatch):
    """Rows, ragged bags longer than a tile and empty ones, means with a padding row, weights, negative ids, an extra beside them."""
    lengths = torch.tensor([0, 3, 0, 45, 1, 0])
    ragged = torch.randint(0, 40, (49,))
    ragged[[0, 7, 20]] = torch.tensor([39, 20, 2])  # the last row, the row of zeros, the padding row
    spec = GroupSpec(
        (Table("a", 40, dim, "none"), Table("b", 9, 16, "none")),
        (
            Lookup(0, "sum", "sum", 0, 3), Lookup(0, "mean", "mean", 0, 3 + dim, 2), Lookup(1, "rows", "none", 1, 0, wrap_negative=True),
            Lookup(0, "weighted", "sum", 2, 0, include_last_offset=True), Lookup(0, "plain", "none", 3, 0),
        ),
        (3 + 2 * dim, 16, dim, dim), (Extra(0, 0, 3),),
    )  # fmt: skip
    offsets = lengths.cumsum(0) - lengths
    ids = [ragged, ragged, torch.randint(-9, 9, (4, 3)), ragged, torch.tensor([39, 20, 0, 20])]
    given = [offsets, offsets, None, torch.cat([offsets, torch.tensor([49])]), None]
    weights = [None, None, None, torch.randn(49), None]
    on = [[None if t is None else t.to(DEVICE) for t in each] for each in (ids, given, weights)]
    made, expected = both(monkeypatch, spec, [coded(40, dim), coded(9, 16)], *on, [torch.randn(6, 3, device=DEVICE)])
    for got, want in zip(made, expected, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


def test_rows_that_begin_anywhere(monkeypatch):
    """A part of wider rows: addresses and strides that no wide load fits."""
    wide = torch.zeros(20, 41, dtype=torch.uint8, device=DEVICE)
    wide[:, 5:37] = coded(20, 24)
    spec = GroupSpec((Table("a", 20, 24, "none"),), (Lookup(0, "x", "none", 0, 0),), (24,))
    ids = torch.arange(20, device=DEVICE)
    (made,), (expected,) = both(monkeypatch, spec, [wide[:, 5:37]], [ids], [None], [None], [])
    torch.testing.assert_close(made, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("batch", [0, 1])
def test_small_batches_and_bad_ids(batch, monkeypatch):
    spec = GroupSpec((Table("a", 20, 16, "none"),), (Lookup(0, "x", "sum", 0, 0),), (16,))
    (made,), (expected,) = both(monkeypatch, spec, [coded(20, 16)], [torch.full((batch, 2), 19, device=DEVICE)], [None], [None], [])
    torch.testing.assert_close(made, expected)
    gpu.forward(spec, [coded(20, 16)], [torch.tensor([[3, 20]], device=DEVICE)], [None], [None], [])
    with pytest.raises(IndexError, match="id 20 at position 1 of lookup 'x'"):
        gpu.check_ids()
