"""The Triton kernels beside the reference: runs ``embedding_triton_cases.py`` and the like in processes of their own.

Triton reads ``TRITON_INTERPRET`` when a kernel is decorated, its own library included. So a process either interprets all
kernels or none, and a pytest process that interprets would break every GPU test after it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

triton = pytest.importorskip("triton", reason="NOT TESTED: the Triton kernels, because triton is not installed")

CASES = [Path(__file__).with_name(name) for name in ("embedding_triton_cases.py", "embedding_small_triton_cases.py", "embedding_sort_triton_cases.py", "embedding_int8_triton_cases.py")]


def run_cases(cases: Path, **environment: str) -> None:
    """All ``cases`` in a new process; its output is shown if one fails or is skipped."""
    kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET" and not k.startswith("PYTEST_")}
    path = os.pathsep.join(p for p in sys.path if p)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--confcutdir", str(cases.parent), "-p", "no:cacheprovider", str(cases)]
    done = subprocess.run(command, env=kept | {"PYTHONPATH": path} | environment, capture_output=True, text=True, check=False)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert "skipped" not in output, output


def _release(module) -> tuple[int, ...]:
    return tuple(map(int, module.__version__.split(".")[:2]))


@pytest.mark.skipif(
    _release(triton) < (3, 7) and _release(numpy) >= (2, 4),
    reason="NOT TESTED: the Triton kernels, because the interpreter of triton < 3.7 fails with numpy >= 2.4 (triton #9171)",
)
@pytest.mark.parametrize("cases", CASES, ids=lambda path: path.stem)
def test_every_case_in_the_interpreter(cases):
    run_cases(cases, TRITON_INTERPRET="1")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="NOT TESTED on hardware: there is no GPU here")
@pytest.mark.parametrize("cases", CASES, ids=lambda path: path.stem)
def test_every_case_on_the_gpu(cases):
    run_cases(cases)
