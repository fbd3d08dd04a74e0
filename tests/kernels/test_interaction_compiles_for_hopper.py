"""Every interaction kernel is compiled for an H100/H200, with no GPU, and its machine code is held to what makes it fast."""
from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="NOT TESTED: the Triton kernels, because triton is not installed")

from compiled import facts_of  # noqa: E402


@pytest.fixture(scope="module")
def facts() -> dict[str, dict[str, int]]:
    return facts_of("--interactions")


def test_nothing_is_spilled(facts):
    assert len(facts) == 36
    assert not {name: f["spills"] for name, f in facts.items() if f["spills"]}


def test_no_sum_is_added_atomically(facts):
    assert not [name for name, f in facts.items() if f["atomics"]]


def test_rows_are_read_16_bytes_at_a_time(facts):
    """The interactions of half precision multiply on tensor cores, without widening."""
    dots = {name: f for name, f in facts.items() if name.startswith("dots")}
    assert len(dots) == 12
    assert not [name for name, f in dots.items() if f["loads_128"] < 2]
    assert not [name for name, f in dots.items() if "fp32" not in name and not f["hmma"] + f["hgmma"]]
