"""Lookups in tables of int8 rows: against rows that numpy decodes, in every form, instruction set and kind of lookup."""
from __future__ import annotations

import numpy as np
import pytest
import torch
from tablewright.kernels.codecs.op import encode
from tablewright.kernels.embedding import cpu, op, reference
from tablewright.kernels.embedding.int8_rows import OP
from tablewright.kernels.embedding.spec import Extra, GroupSpec, Lookup, Table

LENGTHS = torch.tensor([0, 3, 0, 45, 1, 0, 700])
IDS = int(LENGTHS.sum())


@pytest.fixture(params=[0, 1, 2], ids=["baseline", "AVX2", "AVX-512"])
def native(request, monkeypatch):
    """The C++ kernels at one level, which may not hand over to the reference."""
    if not cpu.available():
        pytest.skip(cpu.describe())
    best = cpu._lib.tw_level(-1)
    if cpu._lib.tw_level(request.param) != request.param:
        pytest.skip("not on this CPU")
    monkeypatch.setattr(cpu.reference, "forward", lambda *_: pytest.fail("went to the reference"))
    yield cpu
    cpu._lib.tw_level(best)


def table_of(rows: int, dim: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(float32 rows of many magnitudes, one of them zero and one of equal numbers; their int8 rows)"""
    g = torch.Generator().manual_seed(seed)
    plain = torch.randn(rows, dim, generator=g) * 10.0 ** torch.randint(-3, 3, (rows, 1), generator=g) + torch.randn(rows, 1, generator=g)
    plain[rows // 2], plain[rows // 3] = 0, 2.5
    return plain, encode(plain, "int8")


def decoded(payload: torch.Tensor) -> torch.Tensor:
    """float64 rows, by numpy from the layout that ``codecs/op.py`` documents."""
    raw = payload.numpy()
    tail = np.ascontiguousarray(raw[:, -8:]).view("<f4").astype("f8")
    return torch.from_numpy(raw[:, :-8].astype("f8") * tail[:, :1] + tail[:, 1:])


def group(dim: int, id_dtype=torch.int64, seed: int = 0):
    """Rows, ragged, empty and long bags, means with a padding row, weights, negative ids, rectangular bags, an extra; and their answers."""
    g = torch.Generator().manual_seed(seed)
    plain, payload = table_of(50, dim)
    other, second = table_of(9, 16, 1)
    ragged = torch.randint(0, 50, (IDS,), generator=g)
    ragged[[0, 7, 20, IDS - 1]] = torch.tensor([49, 25, 2, 49])  # the last row, the row of zeros, the padding row
    offsets, back, seven = LENGTHS.cumsum(0) - LENGTHS, torch.randint(-9, 9, (4, 3), generator=g), torch.randint(0, 50, (7, 3), generator=g)
    weights, beside = torch.randn(IDS, generator=g), torch.randn(7, 3, generator=g)
    spec = GroupSpec(
        (Table("a", 50, dim, "none"), Table("b", 9, 16, "none")),
        (
            Lookup(0, "sum", "sum", 0, 3), Lookup(0, "mean", "mean", 0, 3 + dim, 2), Lookup(1, "rows", "none", 1, 0, wrap_negative=True),
            Lookup(0, "weighted", "sum", 2, 0, include_last_offset=True), Lookup(0, "plain", "none", 3, 0, 2), Lookup(0, "even", "mean", 4, 1),
        ),
        (3 + 2 * dim, 16, dim, dim, dim + 1), (Extra(0, 0, 3),),
    )  # fmt: skip
    ids = [ragged, ragged, back, ragged, ragged[:11], seven]
    given = [offsets, offsets, None, torch.cat([offsets, torch.tensor([IDS])]), None, None]
    rows, rows2, bag = decoded(payload), decoded(second), torch.arange(7).repeat_interleave(LENGTHS)
    summed = torch.zeros(7, dim, dtype=torch.float64).index_add(0, bag, rows[ragged])
    kept = ragged != 2
    counts = torch.bincount(bag[kept], minlength=7).clamp_min(1)
    means = torch.zeros_like(summed).index_add(0, bag[kept], rows[ragged[kept]]) / counts[:, None]
    weighted = torch.zeros_like(summed).index_add(0, bag, rows[ragged] * weights.double()[:, None])
    answers = [
        torch.cat([beside.double(), summed, means], 1), rows2[back % 9], weighted, rows[ragged[:11]],
        torch.cat([torch.zeros(7, 1, dtype=torch.float64), rows[seven].mean(1)], 1),
    ]  # fmt: skip
    indices = [i.to(id_dtype) for i in ids]
    return spec, ([payload, second], indices, given, [None, None, None, weights, None, None], [beside]), answers


def close(made, answers):
    for got, want in zip(made, answers, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=2e-6 * float(want.abs().max() if want.numel() else 0))


@pytest.mark.parametrize("dim", [1, 3, 7, 33, 64, 128, 200])
def test_the_reference_reads_what_numpy_reads(dim):
    spec, inputs, answers = group(dim)
    close(reference.forward(spec, *inputs), answers)


@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("dim", [1, 3, 7, 33, 64, 128, 200])
def test_the_kernels_read_what_numpy_reads(dim, id_dtype, native, monkeypatch):
    spec, inputs, answers = group(dim, id_dtype)
    close(native.forward(spec, *inputs), answers)
    monkeypatch.setattr(cpu, "_direct", None)  # the same call, packed in Python
    close(native.forward(spec, *inputs), answers)


def test_large_outputs_and_threads(native):
    """Beyond the sizes from which outputs pass the caches by; any number of threads gives the same bits."""
    plain, payload = table_of(40000, 128)
    spec = GroupSpec((Table("a", 40000, 128, "none"),), (Lookup(0, "x", "none", 0, 0), Lookup(0, "y", "sum", 1, 0)), (128, 128))
    ids = torch.randint(0, 40000, (9000,))
    inputs = [payload], [ids, ids.view(-1, 5)], [None, None], [None, None], []
    before, made = torch.get_num_threads(), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        made.append(native.forward(spec, *inputs))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*made))
    close(made[0], [decoded(payload)[ids], decoded(payload)[ids.view(-1, 5)].sum(1)])


def test_rows_inside_wider_ones(native):
    plain, payload = table_of(20, 24)
    wide = torch.zeros(20, 41, dtype=torch.uint8)
    wide[:, 5:37] = payload
    spec = GroupSpec((Table("a", 20, 24, "none"),), (Lookup(0, "x", "none", 0, 0),), (24,))
    close(native.forward(spec, [wide[:, 5:37]], [torch.arange(20)], [None], [None], []), [decoded(payload)])


@pytest.mark.parametrize("batch", [0, 1])
def test_small_batches(batch, native):
    _, payload = table_of(20, 16)
    spec = GroupSpec((Table("a", 20, 16, "none"),), (Lookup(0, "x", "sum", 0, 0), Lookup(0, "y", "none", 1, 0)), (16, 16))
    ids = torch.full((batch, 2), 19)
    row = decoded(payload)[19]
    close(native.forward(spec, [payload], [ids, ids[:, 0]], [None] * 2, [None] * 2, []), [2 * row.expand(batch, 16), row.expand(batch, 16)])


def test_the_stated_bound_of_the_error():
    plain, payload = table_of(500, 48, 5)
    made = OP(payload, torch.arange(500)).double()
    span = (plain.amax(1) - plain.amin(1)).double()
    bound = span / 510 + 2.0**-20 * plain.abs().amax(1)
    error = (made - plain.double()).abs().amax(1)
    assert (error <= bound).all() and (error > 0.9 * span / 510).any()
    assert torch.equal(made[250], torch.zeros(48, dtype=torch.float64)) and bool((made[166] == 2.5).all())


@pytest.mark.parametrize("native_there", [True, False])
def test_gradients_of_sample_weights(native_there, monkeypatch):
    """Weights and extras get theirs, the table none."""
    if not native_there:
        monkeypatch.setattr(cpu, "_lib", None)
        monkeypatch.setattr(cpu, "_direct", None)
    spec, inputs, _ = group(33)
    weights = inputs[3][3].clone().requires_grad_()
    beside = inputs[4][0].clone().requires_grad_()
    made = op.call(*inputs[:3], [None, None, None, weights, None, None], [beside], spec.encode())
    grad, first = torch.randn(made[2].shape), torch.randn(made[0].shape)
    torch.autograd.backward([made[2], made[0]], [grad, first])
    rows, bag = decoded(inputs[0][0]), torch.arange(7).repeat_interleave(LENGTHS)
    expected = (rows[inputs[1][3]] * grad.double()[bag]).sum(1)
    torch.testing.assert_close(weights.grad.double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert torch.equal(beside.grad, first[:, :3])


def test_few_ids_are_not_read_as_codes():
    """torch's own lookup, which serves few ids of one float table, would return the bytes."""
    _, payload = table_of(20, 16)
    spec = GroupSpec((Table("a", 20, 16, "none"),), (Lookup(0, "x", "none", 0, 0),), (16,)).encode()
    with torch.no_grad():
        close(op.call([payload], [torch.tensor([3])], [None], [None], [], spec), [decoded(payload)[3:4]])


def test_what_is_wrong_is_named():
    _, payload = table_of(20, 16)
    with pytest.raises(IndexError, match="id 20 at position 1 of lookup 'embedding_int8'"):
        OP(payload, torch.tensor([0, 20]))
    with pytest.raises(ValueError, match=r"int8 rows are uint8 of shape \[rows, dim \+ 8\]"):
        OP(payload.float(), torch.tensor([0]))
    with pytest.raises(ValueError, match="sample weights with pooling mean"):
        OP(payload, torch.tensor([[0]]), None, torch.ones(1, 1), "mean")
    spec = GroupSpec((Table("a", 20, 17, "none"),), (Lookup(0, "x", "none", 0, 0),), (17,))
    with pytest.raises(ValueError, match=r"has shape \(20, 24\); its graph was built for \(20, 25\)"):
        cpu.forward(spec, [payload], [torch.tensor([0])], [None], [None], [])


def test_opcheck():
    _, payload = table_of(20, 16)
    ids, offsets = torch.tensor([1, 19, 0]), torch.tensor([0, 2])
    torch.library.opcheck(OP, (payload, ids))
    torch.library.opcheck(OP, (payload, ids, offsets, None, "mean", 1, False))
    torch.library.opcheck(OP, (payload, ids, offsets, torch.randn(3), "sum"))
    spec = GroupSpec((Table("a", 20, 16, "none"),), (Lookup(0, "x", "sum", 0, 0),), (16,)).encode()
    torch.library.opcheck(op.OP, ([payload], [ids], [offsets], [torch.randn(3, requires_grad=True)], [], spec))
