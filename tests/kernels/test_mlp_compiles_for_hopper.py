"""The kernels of the fused multilayer perceptron are compiled for sm_90 and sm_80, with no GPU, and held to what makes them fast."""
from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="NOT TESTED: the Triton kernels, because triton is not installed")

from compiled import facts_of  # noqa: E402


@pytest.fixture(scope="module")
def facts() -> dict[str, dict[str, int]]:
    return facts_of("--mlp")


def test_nothing_is_spilled_and_nothing_added_atomically(facts):
    assert len(facts) == 15
    assert not {name: f for name, f in facts.items() if f["spills"] or f["atomics"]}


def test_products_run_on_tensor_cores(facts):
    products = {name: f for name, f in facts.items() if name.startswith("product")}
    assert len(products) == 8
    for name, f in products.items():
        assert f["hgmma" if "sm_90" in name else "hmma"] > 0, name
        assert f["loads_128"] >= 24 and f["stores_128"] > 0, name
        assert f["shared"] <= (227 if "sm_90" in name else 163) * 1024, name


def test_what_stands_behind_a_product_is_narrow(facts):
    """Memory-bound kernels leave room for 32 warps and move 16 bytes at a time."""
    others = {name: f for name, f in facts.items() if not name.startswith("product")}
    assert not {name: f["registers"] for name, f in others.items() if f["registers"] > 64}
    assert not [name for name, f in others.items() if name != "keep" and not (f["loads_128"] and f["stores_128"])]
