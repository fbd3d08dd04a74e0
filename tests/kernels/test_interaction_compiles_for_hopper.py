"""Every interaction kernel is compiled for an H100/H200, with no GPU, and its machine code is held to what makes it fast."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="NOT TESTED: the Triton kernels, because triton is not installed")


@pytest.fixture(scope="module")
def facts() -> dict[str, dict[str, int]]:
    """Kernel case -> registers, spills, loads, ...; compiled in a process where no kernel is interpreted."""
    script = Path(__file__).with_name("hopper.py")
    kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = os.pathsep.join(p for p in sys.path if p)
    command = [sys.executable, str(script), "--interactions"]
    done = subprocess.run(command, env=kept | {"PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


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
