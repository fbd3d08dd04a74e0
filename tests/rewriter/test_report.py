"""The report: one sentence first, every thing found in a row, reasons grouped, at most 25 lines, data for tools."""
from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import tablewright as tw
import torch
import torch.nn.functional as F
from small_models import Dot, Tied, dot_batch, tied_batch
from tablewright import passes as registry
from tablewright.passes.records import APPLIED, SKIPPED, Record
from torch import nn


class Mixed(nn.Module):
    """Two lookups to fuse, one that cannot be, an MLP and a dot interaction."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Embedding(9, 4), nn.Embedding(9, 4)
        self.best = nn.EmbeddingBag(9, 4, mode="sum", scale_grad_by_freq=True)
        self.over = nn.Sequential(nn.Linear(9, 4), nn.ReLU(), nn.Linear(4, 1))

    def forward(self, ids, bag):
        z = torch.stack([self.a(ids), self.b(ids), self.best(bag)], 1)
        return self.over(torch.bmm(z, z.transpose(1, 2)).flatten(1))


LINE = next(i for i, line in enumerate(Path(__file__).read_text().splitlines(), 1) if "self.best(bag)" in line)
BATCH = (torch.tensor([1, 2]), torch.tensor([[1, 2], [3, 3]]))


def report(**more):
    return tw.optimize(Mixed(), sample_inputs=BATCH, **more).report


def test_coverage_counts_every_kind():
    found = report().coverage
    assert {k: found[k] for k in ("lookups", "mlps", "interactions")} == {"lookups": (2, 3), "mlps": (0, 1), "interactions": (0, 1)}
    assert found["updates"] == (0, 3), "without an optimizer no table is updated row by row"

    class Nothing(nn.Module):
        def forward(self, x):
            return x

    empty = tw.optimize(Nothing(), sample_inputs=(torch.ones(2),)).report
    assert empty.coverage == {"lookups": (0, 0), "mlps": (0, 0), "interactions": (0, 0)}
    assert str(empty).startswith("0/0 lookups fused")


def test_the_text_says_what_where_and_why():
    text = str(report())
    first, *lines = text.splitlines()
    assert first.startswith("2/3 lookups fused into 1 group; 0/3 tables updated row by row; 0/1 mlps fused; ")
    assert "; 1/1 concatenations merged" in first and re.search(r"; [01]/1 interactions fused", first)  # measured
    assert len(lines) >= 5
    skipped = next(line for line in lines if "of lookups skipped" in line)
    assert re.search(rf"1 of lookups skipped: best: scale_grad_by_freq=True; .* \(test_report\.py:{LINE}\)", skipped), skipped
    assert any("pass optimizer= to optimize()" in line for line in lines)
    assert lines[-1].split(";")[0] == "  tables: 432 B, of which 0 B copied"


def test_copied_bytes_are_honest():
    assert report(copy=True).copied_bytes == report().table_bytes == 3 * 9 * 4 * 4 and report().copied_bytes == 0


def test_a_tied_table_counts_once():
    found = tw.optimize(Tied(), sample_inputs=tied_batch()).report
    assert found.table_bytes == 20 * 4 * 4 + 20 * 4 * 8
    assert found.coverage["lookups"] == (3, 3) and found.coverage["updates"][1] == 2


def test_at_most_25_lines_and_table_has_every_row():
    class Many(nn.Module):
        def __init__(self):
            super().__init__()
            self.weights = nn.ParameterList(nn.Parameter(torch.randn(9, 4)) for _ in range(40))

        def forward(self, ids):
            return sum(F.embedding(ids, w * i) + F.embedding(ids, w.sin()) for i, w in enumerate(self.weights))

    found = tw.optimize(Many(), sample_inputs=BATCH[:1]).report
    many = tw.Report(tuple(Record("lookups", SKIPPED, f"t{i}", "r", f"reason {i}") for i in range(60)), door="fx")
    assert len(found.records) >= 80
    for each in (found, many):
        assert len(str(each).splitlines()) <= 25
        assert len(each.table().splitlines()) == 1 + len(each.records)
    assert "more lines: report.table() has every row" in str(many) and str(many).splitlines()[-1].startswith("  tables:")


def test_equal_reasons_are_one_line():
    rows = tuple(Record("lookups", SKIPPED, f"t{i}", "r", "the same reason", location="m.py:4") for i in range(5))
    text = str(tw.Report(rows))
    assert "  5 of lookups skipped: t0, t1, t2, ...: the same reason (m.py:4)" in text


def test_skipped_and_of():
    rows = (
        Record("lookups", APPLIED, "a", "group_tables"),
        Record("lookups", SKIPPED, "a.b", "group_tables", "why"),
        Record("mlps", SKIPPED, "ab", "find_dense_layers", "why not"),
    )
    found = tw.Report(rows)
    assert found.skipped() == list(rows[1:]) and found.skipped("group_tables") == [rows[1]]
    assert found.of("a") == list(rows[:2]) and found.of("") == list(rows) and found.of("x") == []


def test_json_holds_everything():
    found = report()
    raw = json.loads(found.to_json())
    assert len(raw["records"]) == len(found.records) and raw["coverage"]["lookups"] == [2, 3]
    assert {"kind", "status", "subject", "rule", "reason", "location"} <= set(raw["records"][0])
    assert raw["launches"] == 1 and raw["seconds"] > 0 and raw["door"] in ("fx", "export")
    assert raw["passes"] == [p.name for p in registry.DEFAULT]


def test_the_report_names_the_kernels_and_the_door():
    from tablewright.kernels.embedding import cpu

    assert cpu.describe() in str(report()) and "captured by " in str(report())


def test_on_skip_error_raises_with_path_line_and_reason():
    with pytest.raises(tw.PlanError, match=rf"on_skip='error': 1 lookups were not fused: best \(test_report.py:{LINE}\): scale_grad_by_freq=True"):
        report(on_skip="error")
    assert tw.optimize(Dot(), sample_inputs=dot_batch(), on_skip="error").report.coverage["lookups"] == (3, 3)
    with pytest.raises(tw.PlanError, match="on_skip"):
        report(on_skip="raise")
