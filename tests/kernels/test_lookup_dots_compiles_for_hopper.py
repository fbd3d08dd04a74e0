"""The kernels of ``lookup_dots`` are compiled for sm_90 and sm_80, with no GPU, and held to what makes them fast."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="NOT TESTED: the Triton kernels, because triton is not installed")


def test_rows_are_read_16_bytes_at_a_time_without_spills():
    script = Path(__file__).with_name("hopper.py")
    kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = os.pathsep.join(p for p in sys.path if p)
    command = [sys.executable, str(script), "--lookup-dots"]
    done = subprocess.run(command, env=kept | {"PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert len(facts) == 6
    for name, f in facts.items():
        assert f["spills"] == 0 and f["registers"] <= 96 and f["loads_128"] >= 2, (name, f)
        assert f["atomics"] == ("backward" not in name), "only bad ids are reported atomically"
        assert f["hmma"] > 0 or "fp32" in name, name
