"""The zoo benchmark outlives models that crash, hang or do not run, and its page says so."""
from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest
import tablewright

FOLDER = Path(tablewright.__file__).resolve().parent / "benchmarks"
FAKE = '''
import os, time
import torch
from torch import nn


def good(rows=20, sizes=(4, 7)):
    model = nn.Sequential(nn.Embedding(rows, 4), nn.Linear(4, 1))
    return model, [(torch.randint(0, rows, (n,)),) for n in sizes]


MODELS = {"crash": lambda **k: os._exit(3), "good": good, "hang": lambda **k: time.sleep(600), "bad": lambda **k: 1 / 0, "again": good}
'''


@pytest.fixture
def zoo(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(FOLDER))
    (tmp_path / "zoo_fake.py").write_text(FAKE)
    import zoo

    monkeypatch.setattr(zoo, "BUILDERS", tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(_link(tmp_path)))
    yield zoo
    for name in ("zoo", "zoo_table"):
        sys.modules.pop(name, None)


def _link(folder: Path) -> Path:
    links = folder / "links"
    links.mkdir()
    (links / "tablewright").symlink_to(FOLDER.parent)
    return links


def test_a_crash_and_a_hang_cost_one_row_each(zoo):
    args = argparse.Namespace(speed=False, threads=1, plan=None, seconds=1, repos=None, memory=14, timeout=30)
    rows = {r["name"].rpartition(".")[2]: r for r in zoo.run("fake", ["crash", "good", "bad", "hang", "again"], args)}
    assert {n: r["ok"] for n, r in rows.items()} == {"crash": False, "good": True, "bad": False, "hang": False, "again": True}, rows
    assert "exit code 3" in rows["crash"]["why"] and "no result within 30 s" in rows["hang"]["why"]
    assert rows["bad"]["state"] == "does not run" and rows["good"]["kinds"]["lookups"] == [1, 1]


def test_the_page_counts_and_lists(zoo):
    from zoo_table import page

    good = {
        "zoo": "fake", "ok": True, "state": "one graph", "door": "fx", "kinds": {"lookups": [3, 4], "mlps": [0, 1]}, "seconds": 1.0, "kind": "check",
        "skipped": [["lookups", "SKIPPED", "mode max", "model.py:3", 1]], "outputs": 1e-7, "gradients": 1e-7, "steps": 1e-7, "wrong": [], "why": "", "notes": [],
    }  # fmt: skip
    rows = [
        {**good, "name": "zoo_fake:MODELS.a"},
        {**good, "name": "zoo_fake:MODELS.b", "ok": False, "wrong": ["output 0 in train mode, batch 9: 0.42 away"]},
        {**good, "name": "zoo_fake:MODELS.c", "ok": False, "state": "failed", "why": "the process ended with signal 9"},
        {**good, "name": "zoo_fake:MODELS.a", "kind": "speed", "speed": {"dense_ratio": 16.0, "sparse_ratio": 0.9}},
        {**good, "name": "zoo_fake:MODELS.b", "kind": "speed", "speed": {"dense_ratio": 4.0, "sparse_ratio": 1.6}},
    ]
    text = page(rows)
    assert "| **all** | 3 | 2/3 (66.7 %) | 1/3 (33.3 %) | 3/12 (25.0 %) | 8.00 | 1.20 | 1 |" in text
    assert "1 x WRONG NUMBERS: output N in train mode, batch N: N away: fake:b" in text
    assert "1 x slower than 0.95x of plain with sparse gradients: fake:a (0.90x)" in text
    assert "| 3 | 3 | lookups skipped: mode max | fake:a model.py:3 |" in text
