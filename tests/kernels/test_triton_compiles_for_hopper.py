"""Every embedding kernel is compiled for an H100/H200, and the chief ones for an A100, with no GPU, and its machine code is held to what makes it fast."""

from __future__ import annotations

import pytest

triton = pytest.importorskip("triton", reason="NOT TESTED: the Triton kernels, because triton is not installed")

from compiled import facts_of  # noqa: E402

# Instructions that touch local memory. The ptxas of triton 3.6 keeps up to 3 cold numbers there in bags of one width, to fit
# one more block on a processor.
ALLOWED_SPILLS = 0 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7) else 4


@pytest.fixture(scope="module")
def facts() -> dict[str, dict[str, int]]:
    return facts_of("--embedding")


def test_nothing_is_spilled(facts):
    allowed = {name: ALLOWED_SPILLS if "bags" in name else 0 for name in facts}
    assert not {name: f["spills"] for name, f in facts.items() if f["spills"] > allowed[name]}


def test_registers_leave_room_for_16_warps(facts):
    assert not {name: f["registers"] for name, f in facts.items() if f["registers"] > 128 and not name.startswith("counts")}


def test_small_tables_are_summed_by_tensor_cores_from_16_byte_loads(facts):
    """A block of sums stays in registers, so there is room for 8 warps only."""
    products = {name: f for name, f in facts.items() if name.startswith("counts")}
    assert len(products) == 9
    assert not {name: f for name, f in products.items() if f["spills"] or not f["hgmma"] or not f["loads_128"]}


def test_rows_are_read_16_bytes_at_a_time(facts):
    """Of a 1024-element tile on 128 threads, each step is 2 (float32) or 1 (half) such loads per thread."""
    gathers = {name: f for name, f in facts.items() if name.startswith(("forward", "reduce", "weight gradients"))}
    assert len(gathers) > 30
    for name, f in gathers.items():
        steps = 1 if "plain" in name else 4 if name.startswith("forward bags") else 2
        assert f["loads_128"] >= steps * (2 if "fp32" in name else 1), name


def test_results_are_written_16_bytes_at_a_time(facts):
    assert not [name for name, f in facts.items() if name.startswith(("forward", "reduce")) and f["stores_128"] == 0]


def test_int8_rows_are_read_8_bytes_at_a_time(facts):
    """Where their width allows: of a 1024-element tile on 128 threads a step is one load of 8 codes a thread, one of the scale and one of
    the offset, where loads of single bytes would be 16."""
    coded = {name: f for name, f in facts.items() if name.startswith("int8 rows")}
    assert len(coded) == 6 and all(f["stores_128"] for f in coded.values())
    assert coded["int8 rows plain VEC8"]["loads"] <= facts["forward plain fp32 D128"]["loads"] + 2
    assert coded["int8 rows bags VEC1"]["loads"] - coded["int8 rows bags VEC8"]["loads"] > 50


def test_no_float_is_added_atomically(facts):
    """Sums have a fixed order: the only atomics are the forward's reports of bad ids."""
    assert not [name for name, f in facts.items() if f["atomics"] and not name.startswith(("forward", "int8 rows"))]
