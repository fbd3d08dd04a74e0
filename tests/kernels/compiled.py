"""Facts about compiled Triton kernels, from ``hopper.py`` in a process where no kernel is interpreted."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


def facts_of(option: str) -> dict[str, dict[str, int]]:
    """Kernel case -> registers, spills, loads, ... of the cases that ``hopper.py`` has under ``option``."""
    kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = os.pathsep.join(p for p in sys.path if p)
    command = [sys.executable, str(Path(__file__).with_name("hopper.py")), option]
    done = subprocess.run(command, env=kept | {"PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
