"""Stochastic rounding of table rows: the documented bits in every form, the right mean, and nothing that depends on the schedule."""
from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tablewright.kernels.codecs import cpu
from tablewright.kernels.embedding import rounding
from tablewright.kernels.embedding.rounding import LOW, reference, seed_of, write

needs_library = pytest.mark.skipif(cpu._lib is None, reason=f"NOT TESTED: {cpu.describe()}")


@pytest.fixture(params=range(3), ids=cpu._LEVELS)
def level(request):
    if cpu._lib is None:
        pytest.skip(f"NOT TESTED: {cpu.describe()}")
    before = cpu._lib.twc_level(-1)
    if cpu._lib.twc_level(request.param) != request.param:
        pytest.skip("this processor does not have it")
    yield
    cpu._lib.twc_level(before)


def by_hand(value: float, row: int, column: int, seed: int, dtype: torch.dtype) -> float:
    """The docstring, word for word, in Python integers, for one finite value."""

    def mix(h):
        h ^= h >> 16
        h = h * 0x7FEB352D & 0xFFFFFFFF
        h ^= h >> 15
        h = h * 0x846CA68B & 0xFFFFFFFF
        return h ^ (h >> 16)

    first = mix(((row & 0xFFFFFFFF) * 0x85EBCA77 + (row >> 32) * 0xC2B2AE3D + seed) & 0xFFFFFFFF)
    noise = mix(first ^ (column * 0x9E3779B1 & 0xFFFFFFFF))
    size = int(torch.tensor(abs(value)).view(torch.int32))
    if dtype == torch.bfloat16:
        made = torch.tensor(min(size + (noise >> 16), 0x7F7FFFFF) >> 16 << 16, dtype=torch.int32).view(torch.float32)
    elif abs(value) >= 2.0**-14:
        made = torch.tensor((size + (noise >> 19)) >> 13 << 13, dtype=torch.int32).view(torch.float32).clamp(max=65504.0)
    else:
        made = torch.tensor(((int(abs(value) * 2.0**48) + (noise >> 8)) >> 24) * 2.0**-24)
    return -float(made) if value < 0 else float(made)


@pytest.mark.parametrize("dtype", LOW)
@settings(max_examples=300, deadline=None)
@given(st.floats(width=32, allow_nan=False, allow_infinity=False), st.integers(0, 2**40), st.integers(0, 2000), st.integers(0, 2**32 - 1))
def test_the_reference_is_what_is_documented(dtype, value, row, column, seed):
    values = torch.zeros(1, column + 1)
    values[0, column] = value
    assert float(reference(values, torch.tensor([row]), seed, dtype)[0, column]) == by_hand(float(values[0, column]), row, column, seed, dtype)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("dim", [1, 15, 16, 33, 128])
def test_the_cpu_form_gives_the_same_bits(level, dtype, dim):
    torch.manual_seed(dim)
    values = torch.randn(90, dim) * torch.logspace(-45, 38, 90)[:, None]
    values[5, 0], values[6, 0], values[7, 0], values[8, 0] = torch.nan, torch.inf, -torch.inf, -0.0
    rows = torch.randperm(300)[:90]
    table = torch.zeros(300, dim + 3, dtype=dtype)[:, :dim]
    write(table, rows, values, seed=12345)
    expected = reference(values, rows, 12345, dtype)
    assert torch.equal(table[rows].isnan(), values.isnan())
    same = table[rows].contiguous().view(torch.int16) == expected.view(torch.int16)
    assert (same | values.isnan()).all()
    untouched = torch.ones(300, dtype=torch.bool)
    untouched[rows] = False
    assert not table[untouched].any()


@pytest.mark.parametrize("dtype", LOW)
def test_without_the_library(monkeypatch, dtype):
    monkeypatch.setattr(cpu, "_lib", None)
    values, rows, table = torch.randn(4, 6), torch.tensor([3, 0, 7, 1]), torch.zeros(9, 6, dtype=dtype)
    write(table, rows, values, seed=3)
    assert torch.equal(table[rows], reference(values, rows, 3, dtype))


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("value", [1.0009, -3.1, 1e-5, -3e-8, 2.0**-14 * 1.0001])
def test_the_mean_is_right_and_neighbours_are_the_only_results(dtype, value):
    values = torch.full((20_000, 4), value)
    made = reference(values, torch.arange(20_000), 99, dtype).double()
    found = made.unique()
    assert len(found) == 2 and found[0] < value < found[1]
    step = float(found[1] - found[0])
    assert abs(float(made.mean()) - float(values[0, 0].double())) < 4 * step / 2 / (80_000**0.5)


@pytest.mark.parametrize("dtype", LOW)
def test_what_the_dtype_holds_stays_and_finite_stays_finite(dtype):
    held = torch.randn(50, 7).to(dtype)
    held[0, :3] = torch.tensor([0.0, torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal], dtype=dtype)
    for seed in range(5):
        assert torch.equal(reference(held.float(), torch.arange(50), seed, dtype), held)
    beyond = torch.full((100, 2), float(torch.finfo(dtype).max)) * torch.tensor([1.00001, -1.00001])
    assert torch.equal(reference(beyond, torch.arange(100), 1, dtype), beyond.clamp(*(torch.finfo(dtype).min, torch.finfo(dtype).max)).to(dtype))


def test_the_noise_depends_on_row_column_and_seed_alone():
    values, rows = torch.randn(40, 8), torch.randperm(100)[:40]
    whole = reference(values, rows, 5, torch.bfloat16)
    order = torch.randperm(40)
    assert torch.equal(reference(values[order], rows[order], 5, torch.bfloat16), whole[order])
    assert torch.equal(reference(values[:7], rows[:7], 5, torch.bfloat16), whole[:7])
    assert not torch.equal(reference(values, rows, 6, torch.bfloat16), whole)
    assert seed_of("a", 1) != seed_of("a", 2) != seed_of("b", 2) and seed_of("a", 1) == seed_of("a", 1)


@needs_library
def test_threads_change_nothing():
    values, rows = torch.randn(20_000, 16), torch.randperm(30_000)[:20_000]
    tables, before = [], torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        tables.append(torch.zeros(30_000, 16, dtype=torch.bfloat16))
        write(tables[-1], rows, values, seed=1)
    torch.set_num_threads(before)
    assert torch.equal(*tables)


def test_large_row_numbers():
    rows = torch.tensor([5, 5 + 2**32, 5 + 2**33])
    hashes = rounding.row_hashes(rows, 0)
    assert hashes.unique().numel() == 3 and (0 <= hashes).all() and (hashes < 2**32).all()
