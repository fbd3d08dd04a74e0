"""For all tests: golden files, and fresh interpreters."""
from __future__ import annotations

import sys
from pathlib import Path

import pytest

_GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser):
    parser.addoption("--update-golden", action="store_true", help="write the files in tests/golden instead of comparing with them")


@pytest.fixture
def golden(request):
    """``golden(name, text)``: ``text`` must be what ``tests/golden/<name>.txt`` holds."""

    def compare(name: str, text: str) -> None:
        path = _GOLDEN / f"{name}.txt"
        text = text.rstrip() + "\n"
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        assert path.exists(), f"{path} is missing: run pytest with --update-golden and read what it writes"
        assert path.read_text() == text, "the graph changed: if that is meant, run pytest with --update-golden and read the diff"

    return compare


@pytest.fixture
def run_python(tmp_path):
    """``run_python(code)``: what ``code`` prints in a fresh interpreter that imports this checkout as ``tablewright``."""
    import os
    import subprocess

    import tablewright

    def run(code: str, timeout: float = 120, **variables: str) -> str:
        link = tmp_path / "path"
        link.mkdir(exist_ok=True)
        if not (link / "tablewright").exists():
            (link / "tablewright").symlink_to(Path(tablewright.__file__).resolve().parent)
        path = os.pathsep.join([str(link), str(Path(__file__).parent)])
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=timeout,
            env={**os.environ, "PYTHONPATH": path, **variables},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout.strip()

    return run
