"""The kernels of the int8 row codec are compiled for sm_90, with no GPU, and held to what makes them fast."""
from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="NOT TESTED: the Triton kernels, because triton is not installed")

from compiled import facts_of  # noqa: E402


def test_rows_are_moved_in_wide_pieces_with_few_registers():
    facts = facts_of("--codecs")
    assert len(facts) == 6
    for name, f in facts.items():
        assert f["spills"] == 0 and f["registers"] <= 64 and f["atomics"] == 0, (name, f)
        assert f["loads_128" if "encode" in name else "stores_128"] >= 2, (name, f)
        assert f["loads"] <= 8 and f["stores"] <= 8, (name, f)
