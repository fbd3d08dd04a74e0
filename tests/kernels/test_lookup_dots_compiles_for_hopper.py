"""The kernels of ``lookup_dots`` are compiled for sm_90 and sm_80, with no GPU, and held to what makes them fast."""
from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="NOT TESTED: the Triton kernels, because triton is not installed")

from compiled import facts_of  # noqa: E402


def test_rows_are_read_16_bytes_at_a_time_without_spills():
    facts = facts_of("--lookup-dots")
    assert len(facts) == 6
    for name, f in facts.items():
        assert f["spills"] == 0 and f["registers"] <= 96 and f["loads_128"] >= 2, (name, f)
        assert f["atomics"] == ("backward" not in name), "only bad ids are reported atomically"
        assert f["hmma"] > 0 or "fp32" in name, name
