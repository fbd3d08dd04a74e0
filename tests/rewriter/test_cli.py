"""``python -m tablewright coverage``: targets, text, JSON and exit codes."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tablewright.rewriter.cli import TargetError, find, main

MODELS = '''
import torch
from torch import nn
import tablewright as tw


class Two(nn.Module):
    def __init__(self, rows):
        super().__init__()
        self.a, self.b, self.over = nn.Embedding(rows, 4), nn.Embedding(rows, 4), nn.Linear(8, 1)

    def forward(self, a, b):
        return self.over(torch.cat([self.a(a), self.b(b)], 1))


def two(rows=20, sizes=(4, 7)):
    return Two(rows), [(torch.randint(0, rows, (n,)), torch.randint(0, rows, (n,))) for n in sizes]


def one_batch():
    model, (batch, _) = two()
    return model, batch


def breaks():
    raise ValueError("no data here")


def returns_a_list():
    return [1, 2, 3]


def no_model():
    return "model", torch.zeros(2)


def no_inputs():
    return two()[0], 3


ZOO = {"first": two, "second": one_batch}
number = 3
'''


@pytest.fixture
def models(tmp_path, monkeypatch):
    (tmp_path / "cli_models.py").write_text(MODELS)
    (tmp_path / "cli_broken.py").write_text("import a_package_nobody_has\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in ("cli_models", "cli_broken"):
        sys.modules.pop(name, None)


def test_text_and_exit_code(models, capsys):
    assert main(["coverage", "cli_models:two", "cli_models.py:one_batch"]) == 0
    out = capsys.readouterr().out
    assert "ok     cli_models:two" in out and "lookups 2/2" in out and "one graph" in out
    assert out.splitlines()[-1] == "2 of 2 models equal plain PyTorch; 2 in one graph"


def test_a_mapping_means_each_of_its_factories(models):
    assert [name for name, _ in find("cli_models:ZOO")] == ["cli_models:ZOO.first", "cli_models:ZOO.second"]
    assert [name for name, _ in find("cli_models:ZOO.second")] == ["cli_models:ZOO.second"]


def test_json_is_one_object_a_line(models, capsys):
    assert main(["coverage", "cli_models:ZOO", "--json", "--speed", "--seconds", "0.01", "--option", "rows=30"]) == 2  # one takes no rows
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [r["ok"] for r in rows] == [True, False]
    assert rows[0]["kinds"]["lookups"] == [2, 2] and rows[0]["speed"]["dense_ratio"] > 0
    assert rows[1]["state"] == "does not run" and "rows" in rows[1]["why"]


def test_options_reach_the_factory(models, capsys):
    assert main(["coverage", "cli_models:two", "--option", "rows=5", "--option", "sizes=[3, 4]", "--no-check", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["outputs"] != 0  # NaN: not compared


@pytest.mark.parametrize(
    "target, said",
    [
        ("cli_models", "is not MODULE:FACTORY"),
        ("cli_models:", "is not MODULE:FACTORY"),
        ("cli_modles:two", "there is no module 'cli_modles'"),
        ("nothing.py:two", "there is no file nothing.py"),
        ("cli_models:towo", "has no attribute 'towo' (did you mean 'two'?)"),
        ("cli_models:ZOO.firts", "has no entry 'firts' (did you mean 'first'?)"),
        ("cli_models:number", "is a int; it must be a function"),
        ("cli_broken:two", "importing cli_broken failed: No module named 'a_package_nobody_has'"),
    ],
)
def test_targets_that_name_nothing(models, target, said, capsys):
    with pytest.raises(TargetError) as raised:
        find(target)
    assert said in str(raised.value)
    assert main(["coverage", target]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "factory, said",
    [
        ("breaks", "breaks() raised ValueError: no data here"),
        ("returns_a_list", "returned a list; it must return (model, inputs)"),
        ("no_model", "returned a str where the model should be"),
        ("no_inputs", "returned inputs that are not a tuple"),
    ],
)
def test_factories_that_return_something_else_cost_one_row(models, factory, said, capsys):
    assert main(["coverage", f"cli_models:{factory}", "cli_models:two"]) == 2
    out = capsys.readouterr().out
    assert said in out and "ok     cli_models:two" in out


def test_wrong_numbers_mean_exit_code_1(models, monkeypatch, capsys):
    from tablewright.rewriter import coverage

    real = coverage._optimized

    def broken(model, case, plan):
        opt, optim = real(model, case, plan)
        opt.register_forward_hook(lambda m, args, out: out * 1.001)
        return opt, optim

    monkeypatch.setattr(coverage, "_optimized", broken)
    assert main(["coverage", "cli_models:two"]) == 1
    assert "WRONG  cli_models:two" in capsys.readouterr().out


def test_an_option_must_have_a_value(models, capsys):
    assert main(["coverage", "cli_models:two", "--option", "rows"]) == 2
    assert "must be NAME=VALUE" in capsys.readouterr().err


def test_it_runs_as_a_module(models):
    import tablewright

    root = Path(tablewright.__file__).parent.resolve()
    links = models / "links"
    links.mkdir()
    (links / "tablewright").symlink_to(root)
    run = subprocess.run(
        [sys.executable, "-m", "tablewright", "coverage", "cli_models:two"], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(links)},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "lookups 2/2" in run.stdout
