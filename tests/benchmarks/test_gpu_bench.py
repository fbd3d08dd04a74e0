"""``benchmarks/gpu.py`` runs from end to end, at tiny sizes in Triton's interpreter, and writes its page."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import tablewright

triton = pytest.importorskip("triton", reason="NOT TESTED: the GPU benchmark, because triton is not installed")

SCRIPT = Path(tablewright.__file__).resolve().parent / "benchmarks" / "gpu.py"


def _release(module) -> tuple[int, ...]:
    return tuple(map(int, module.__version__.split(".")[:2]))


@pytest.mark.skipif(
    _release(triton) < (3, 7) and _release(numpy) >= (2, 4),
    reason="NOT TESTED: the GPU benchmark, because the interpreter of triton < 3.7 fails with numpy >= 2.4 (triton #9171)",
)
def test_every_section_has_its_rows(tmp_path):
    page = tmp_path / "page.md"
    kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET" and not k.startswith("PYTEST_")}
    path = os.pathsep.join(p for p in sys.path if p)
    command = [sys.executable, str(SCRIPT), "--tiny", "--out", str(page)]
    done = subprocess.run(command, env=kept | {"PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    text = page.read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    for name, count in (
        ("bags forward", 2), ("bags backward", 2), ("forward + backward of bags", 2), ("small tables", 2), ("cross", 2), ("dots", 2), ("lookup + dots", 2), ("MLP forward", 6), ("MLP backward", 6), ("FM", 2),
        ("encode", 3), ("decode", 3), ("DLRM, MLPerf v1", 1), ("DLRM-DCNv2", 1),
    ):  # fmt: skip
        assert sum(row.startswith(f"| {name}") for row in rows) == count, text
    assert "stopped" not in text and "Error" not in text, text
    assert "times mean nothing" in text
