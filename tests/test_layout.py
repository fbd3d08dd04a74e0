"""The house: imports go down only, files stay small, ``import tablewright`` is cheap, and the folder may have any name."""
from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tablewright

ROOT = Path(tablewright.__file__).resolve().parent
FLOORS = ("kernels", "passes", "rewriter")  # from the ground up


def _sources(*folders: str) -> list[Path]:
    found = [p for folder in folders for p in sorted((ROOT / folder).rglob("*.py"))]
    assert found
    return found


def _imports(path: Path) -> set[str]:
    """Every module that a file imports, absolute, wherever the import stands."""
    package = ["tablewright", *path.relative_to(ROOT).with_suffix("").parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(p for p in (base, node.module) if p)
            found.update({module, *(f"{module}.{alias.name}" for alias in node.names)})
    return found


@pytest.mark.parametrize("path", _sources(*FLOORS), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down_only(path):
    floor = path.relative_to(ROOT).parts[0]
    above = [f"tablewright.{f}" for f in FLOORS[FLOORS.index(floor) + 1 :]]
    if floor == "kernels":
        above.append("torch.fx")
    imported = _imports(path)
    climbs = {name for name in imported for up in above if name == up or name.startswith(up + ".")}
    assert not climbs, f"{path.relative_to(ROOT)} imports {climbs}, which is on a floor above it"
    outright = {n for n in imported if n.split(".")[0] in FLOORS}
    assert not outright, f"{path.relative_to(ROOT)} imports {outright}: inside the package imports are relative"


def test_the_import_check_sees_relative_imports():
    found = _imports(ROOT / "passes" / "group_tables.py")
    assert {"tablewright.kernels.embedding.op", "tablewright.passes.graph", "torch.fx"} <= found


def test_every_file_has_at_most_500_lines():
    folders = [f for f in (*FLOORS, "tests", "examples", "benchmarks") if (ROOT / f).is_dir()]
    long = {str(p.relative_to(ROOT)): n for p in _sources(*folders) if (n := len(p.read_text().splitlines())) > 500}
    assert not long


def test_every_test_file_has_a_name_of_its_own():
    names = [p.name for p in (ROOT / "tests").rglob("*.py") if p.name != "conftest.py"]
    assert len(names) == len(set(names)), "in pytest's prepend mode two test files of one name hide each other"
    assert not list((ROOT / "tests").rglob("__init__.py")) and not (ROOT / "conftest.py").exists()


def test_import_is_lazy_and_every_public_name_exists(run_python):
    assert run_python("import sys, tablewright; print('torch' in sys.modules, 'numpy' in sys.modules)") == "False False"
    for name in tablewright.__all__:
        assert getattr(tablewright, name) is not None
    assert set(dir(tablewright)) == set(tablewright.__all__)
    with pytest.raises(AttributeError, match="optimise"):
        _ = tablewright.optimise


_CLONE_TEST = '''
import multiprocessing
import os
import sys

import tablewright as tw
import torch
from torch import nn


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Embedding(5, 3), nn.Embedding(7, 3)

    def forward(self, ids):
        return self.a(ids) + self.b(ids)


def in_another_process(queue):
    opt = tw.optimize(Model(), sample_inputs=(torch.tensor([1, 2]),))
    queue.put((opt.report.coverage["lookups"], copies()))


def copies():
    """The root names under which this package's files were imported: more than one means it was imported twice."""
    home = os.path.realpath(tw.__path__[0])
    files = {n: getattr(m, "__file__", None) or "" for n, m in list(sys.modules.items())}
    files = {n: os.path.realpath(f) for n, f in files.items() if os.path.isabs(f)}
    ours = {n.split(".")[0] for n, f in files.items() if f.startswith(home + os.sep) and not f.startswith(os.path.join(home, "tests"))}
    return sorted(ours)


def test_one_import_here_and_in_a_spawned_worker():
    assert copies() == ["tablewright"], copies()
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    worker = context.Process(target=in_another_process, args=(queue,))
    worker.start()
    found, names = queue.get()
    worker.join(60)
    in_another_process(queue)
    assert queue.get() == (found, names) == ((2, 2), ["tablewright"])
'''


def test_a_clone_of_another_name_is_imported_once(tmp_path):
    """pytest from a folder called "R x" must not import the root a second time under that name (``--confcutdir=tests``)."""
    clone, path = tmp_path / "R x", tmp_path / "path"
    clone.mkdir()
    path.mkdir()
    for name in (*FLOORS, "__init__.py", "pyproject.toml"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, clone / name, **({"ignore": shutil.ignore_patterns("__pycache__")} if (ROOT / name).is_dir() else {}))
    (clone / "tests" / "deep").mkdir(parents=True)
    shutil.copy(ROOT / "tests" / "pytest.ini", clone / "tests")
    (clone / "tests" / "conftest.py").write_text("import tablewright\n")
    (clone / "tests" / "deep" / "test_clone.py").write_text(_CLONE_TEST)
    (path / "tablewright").symlink_to(clone)
    environment = {**os.environ, "PYTHONPATH": str(path)}
    for folder, argument in ((clone, ()), (tmp_path, (str(clone / "tests"),))):
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:hypothesispytest", *argument], cwd=folder,
            env=environment, capture_output=True, text=True, timeout=180,
        )  # fmt: skip
        assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout[-3000:] + done.stderr[-2000:]


def test_one_build_makes_every_library():
    folders = {file.parts[-3] for file in ROOT.glob("kernels/*/native/*.cpp")}
    built = {file.parent.name for file in ROOT.glob("kernels/*/_native*.so")}
    assert built in (set(), folders), f"not built: {sorted(folders - built)} (python setup.py build_ext --inplace)"
