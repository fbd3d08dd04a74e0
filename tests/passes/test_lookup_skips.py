"""Every reason to leave a lookup alone: the case, the text, the guilty line; and a test that no reason is without a case."""
from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

import pytest
import tablewright
import torch
import torch.nn.functional as F
from pass_harness import assert_sound, rewrite
from tablewright.passes.group_tables import GroupTables
from torch import nn

FILES = ("lookups.py", "group_tables.py")
IDS = torch.tensor([[3, 1], [3, 7], [0, 0]])


class Skips(nn.Module):
    """``ok`` is fused beside whatever ``how`` does with the model and the ids."""

    def __init__(self, how):
        super().__init__()
        self.ok = nn.Embedding(9, 4)
        self.t = nn.Embedding(9, 4)
        self.w = nn.Parameter(torch.randn(9, 4))
        self.turned = nn.Parameter(torch.randn(4, 9).t())
        self.register_buffer("codes", torch.randint(0, 99, (9, 4), dtype=torch.int8))
        self.max_norm = nn.Embedding(9, 4, max_norm=0.5)
        self.how = how

    def forward(self, ids):
        return self.ok(ids), self.how(self, ids)


def _in_place_ids(m, ids):
    ids = ids + 1
    ids[0].sub_(1)
    return m.t(ids)


class Random(nn.Module):
    """The ids of one lookup are drawn after another lookup was read: moving the draw would change the random stream."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Embedding(9, 4), nn.Embedding(9, 4)

    def forward(self, ids):
        first = self.a(ids) * 2
        noise = torch.randint_like(ids, 0, 9)
        return first + self.b(noise)


CASES = {
    "embedding, scale_grad_by_freq": (
        lambda m, ids: F.embedding(ids, m.w, scale_grad_by_freq=True),
        "scale_grad_by_freq=True; the fused backward does not count ids",
    ),
    "bag, scale_grad_by_freq": (
        lambda m, ids: F.embedding_bag(ids, m.w, scale_grad_by_freq=True, mode="sum"),
        "scale_grad_by_freq=True; the fused backward does not count ids",
    ),
    "max": (
        lambda m, ids: F.embedding_bag(ids, m.w, mode="max"),
        "mode='max'; the fused lookup sums and averages only",
    ),
    "bag sizes": (
        lambda m, ids: torch.ops.aten.embedding_bag(m.w, ids.reshape(-1), torch.tensor([0, 2, 4]))[:3:2],
        "more than the pooled rows of embedding_bag is read (its bag sizes, say)",
    ),
    "computed": (
        lambda m, ids: F.embedding(ids, m.w * 2),
        "its table is computed in the graph by mul; only a stored table can be read in place",
    ),
    "int8": (
        lambda m, ids: F.embedding(ids, m.codes) * 0.5,
        "its table is torch.int8; fp32, fp64, fp16 or bf16 is needed",
    ),
    "not contiguous": (
        lambda m, ids: F.embedding(ids, m.turned),
        "its table is not a contiguous [rows, dim] tensor",
    ),
    "max_norm": (
        lambda m, ids: m.max_norm(ids),
        "its table is changed inside the forward by embedding_renorm_ (max_norm, say)",
    ),
    "ids in place": (_in_place_ids, "sub_ changes its ids, weights or result in place"),
}
OTHER_CASES = {
    "mask": "weight[ids] may be a lookup or a mask; the dtype of ids is known only with sample_inputs",
    "random": "its ids depend on randint_like, which may not move ahead of the other lookups' readers",
}


@pytest.mark.parametrize("case", CASES)
def test_left_alone_with_the_reason(case):
    how, reason = CASES[case]
    done = rewrite(Skips(how), (IDS,), GroupTables())
    (row,) = done.of("SKIPPED")
    assert row.reason == reason
    assert "test_lookup_skips.py:" in row.location or "max_norm" in case
    assert [r.subject for r in done.of("APPLIED")] == ["ok"]
    assert_sound(done)


def test_indexing_without_sample_inputs_may_be_a_mask():
    class Indexes(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(9, 4))

        def forward(self, ids):
            return self.w[ids]

    done = rewrite(Indexes(), None, GroupTables())
    assert [r.reason for r in done.records] == [OTHER_CASES["mask"]]
    assert not rewrite(Indexes(), (torch.ones(9, dtype=torch.bool),), GroupTables()).records, "a mask is no lookup"


def test_random_ids_are_not_moved():
    done = rewrite(Random(), (IDS,), GroupTables())
    assert [(r.subject, r.reason) for r in done.of("SKIPPED")] == [("b", OTHER_CASES["random"])]
    assert [t.name for t in done.specs[0].tables] == ["a.weight"]
    assert_sound(done, exact=True, idempotent=False)  # alone, the other lookup can be fused where it stands


# --- no reason without a case --------------------------------------------------------------------------------------------------


def _reasons(path: Path) -> list[str]:
    """A pattern for each text that the file gives to ``skip`` or to a SKIPPED ``record``."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("skip", "record"):
            if node.func.id == "record" and not any(isinstance(a, ast.Name) and a.id == "SKIPPED" for a in node.args):
                continue
            text = node.args[0] if node.func.id == "skip" else node.args[4]
            parts = text.values if isinstance(text, ast.JoinedStr) else [text]
            found.append("".join(re.escape(p.value) if isinstance(p, ast.Constant) else ".+" for p in parts))
    return found


@pytest.mark.parametrize("file", FILES)
def test_every_reason_has_a_case(file):
    texts = [reason for _, reason in CASES.values()] + list(OTHER_CASES.values())
    wanted = Counter(_reasons(Path(tablewright.__file__).resolve().parent / "passes" / file))
    assert wanted
    for pattern, times in wanted.items():
        cases = sum(bool(re.fullmatch(pattern, t)) for t in texts)
        assert cases >= times, f"{file} gives the reason '{pattern}' in {times} places, and {cases} cases test it"
