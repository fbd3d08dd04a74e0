"""The Triton kernels of the int8 codec beside the reference: runs ``codecs_triton_cases.py`` in processes of their own."""
from __future__ import annotations

from pathlib import Path

import numpy
import pytest
import torch

triton = pytest.importorskip("triton", reason="NOT TESTED: the Triton kernels, because triton is not installed")

from test_embedding_triton import _release, run_cases  # noqa: E402

CASES = Path(__file__).with_name("codecs_triton_cases.py")


@pytest.mark.skipif(
    _release(triton) < (3, 7) and _release(numpy) >= (2, 4),
    reason="NOT TESTED: the Triton kernels, because the interpreter of triton < 3.7 fails with numpy >= 2.4 (triton #9171)",
)
def test_every_codec_case_in_the_interpreter():
    run_cases(CASES, TRITON_INTERPRET="1")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="NOT TESTED on hardware: there is no GPU here")
def test_every_codec_case_on_the_gpu():
    run_cases(CASES)
