"""Whole models on the Triton kernels: runs ``triton_model_cases.py`` in Triton's interpreter, in a process of its own."""
from __future__ import annotations

import sys
from pathlib import Path

import numpy
import pytest

triton = pytest.importorskip("triton", reason="NOT TESTED: models on the Triton kernels, because triton is not installed")

KERNELS = Path(__file__).parents[1] / "kernels"


@pytest.mark.skipif(
    tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7) and tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4),
    reason="NOT TESTED: the Triton kernels, because the interpreter of triton < 3.7 fails with numpy >= 2.4 (triton #9171)",
)
def test_every_model_in_the_interpreter(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(KERNELS), *sys.path])
    from test_embedding_triton import run_cases

    run_cases(Path(__file__).with_name("triton_model_cases.py"), TRITON_INTERPRET="1")
