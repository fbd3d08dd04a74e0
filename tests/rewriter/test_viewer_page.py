"""The page as text, and its pure functions under node: grouping, differences, searching, placing."""
from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from tablewright.rewriter import viewer
from tablewright.rewriter.viewer.graph_data import graph_data
from tablewright.rewriter.viewer.page import page
from viewer_models import Long, Wide, dlrm, optimized

HERE = Path(viewer.__file__).parent
needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="NOT TESTED: node is not installed (Debian: nodejs)")


def _empty():
    return {"title": "x", "modules": [], "programs": [], "nodes": [], "places": [], "tables": [], "coverage": {}, "notes": []}


def test_without_data_it_is_small_and_asks_for_nothing():
    text = page(_empty())
    assert len(text.encode()) < 150_000
    assert not re.search(r"""(src|href)\s*=\s*["']|@import|url\((?!#)""", text)
    assert not [u for u in re.findall(r"https?://[\w./]+", text) if u != "http://www.w3.org/2000/svg" and "w3.org" not in u]


def test_only_its_own_scripts_may_run():
    text = page(_empty())
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', text)[1]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    for tag in ("<script>", "<style>"):
        body = text.split(tag, 1)[1].split("</" + tag[1:], 1)[0]
        assert f"sha256-{base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()}" in policy


def test_the_vendored_file_is_the_one_that_is_named():
    said = re.search(r"dagre\.min\.js \| @dagrejs/dagre .* \| MIT .* \| ([0-9a-f]{64})", (HERE / "vendor" / "README.md").read_text())[1]
    assert hashlib.sha256((HERE / "vendor" / "dagre.min.js").read_bytes()).hexdigest() == said
    assert "Permission is hereby granted" in (HERE / "vendor" / "dagre.LEGAL.txt").read_text()


def test_much_data_is_packed():
    data = _empty()
    data["notes"] = ["x" * 2_000_000]
    text = page(data)
    assert 'data-packed="deflate"' in text and len(text) < 200_000


def _node(code, data, tmp_path):
    """What ``code`` prints as JSON; it sees the page's functions and ``data``."""
    (tmp_path / "data.json").write_text(json.dumps(data))
    head = f"""
    const here = {json.dumps(str(HERE))};
    Object.assign(globalThis, require(here + "/page/data.js"), require(here + "/page/group.js"), require(here + "/page/layout.js"));
    const vm = require("vm"); vm.runInThisContext(require("fs").readFileSync(here + "/vendor/dagre.min.js", "utf8").replace("var dagre", "globalThis.dagre"));
    const data = JSON.parse(require("fs").readFileSync("data.json"));
    const types = new Map(data.modules.map((m) => [m.path, m.type]));
    const program = data.programs[0], first = idsAfter(program, 0), last = idsAfter(program, program.steps.length);
    const shown = (ids, open = new Map()) => {{ const top = present(moduleTree(graphOf(data, ids).leaves), types, open); boxesOf(top).forEach((b) => {{ b.w = 120; b.h = 36; }}); top.w = top.h = 0; return top; }};
    const say = (x) => console.log(JSON.stringify(x));
    """
    done = subprocess.run(["node", "-e", head + code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@needs_node
def test_differences(tmp_path):
    found = _node("""
    const d = difference(data, first, last);
    say({ before: [...d.before], after: [...d.after], heirs: Object.fromEntries(d.heirs), from: Object.fromEntries(d.from) });
    """, graph_data(dlrm()), tmp_path)  # fmt: skip
    before, after = dict(found["before"]), dict(found["after"])
    (bags,) = [n for n in after if n.startswith("embedding_bags")]
    assert after[bags] == "added" and before["embedding_bag_3"] == "replaced" and before["bmm"] == "replaced"
    assert found["heirs"]["embedding_bag_3"] == [bags] and set(found["from"][bags]) >= {"embedding_bag", "embedding_bag_1", "embedding_bag_2", "embedding_bag_3"}
    assert before.get("arange") == "removed" and found["heirs"]["arange"] == []
    assert "linear" not in before and found["heirs"]["linear"] == ["linear"]


@needs_node
def test_equal_siblings_are_one_card_and_layers_in_a_row_are_not(tmp_path):
    found = _node("say(boxesOf(shown(first)).map((b) => [b.kind, b.title, b.sub]))", graph_data(dlrm()), tmp_path)
    assert ["stack", "EmbeddingBag × 4"] in [f[:2] for f in found] and ["stack", "slice × 4"] in [f[:2] for f in found]
    assert not [f for f in found if f[1].startswith(("linear ×", "relu ×"))]
    wide = graph_data(optimized(Wide(90), torch.randint(0, 10, (4, 90))))
    titles = [f[0] for f in _node("say(boxesOf(shown(first)).map((b) => [b.title]))", wide, tmp_path)]
    assert {"EmbeddingBag × 30", "EmbeddingBag × 60"} <= set(titles)


@needs_node
@pytest.mark.parametrize("model, inputs", [(Long(60), (4,)), (Wide(200), (4, 200))], ids=["long", "wide"])
def test_boxes_are_few_and_placed_side_by_side(model, inputs, tmp_path):
    """No two boxes of one group overlap, every leaf lies in exactly one closed box, and no edge leads up."""
    data = graph_data(optimized(model, torch.randint(0, 10, inputs)))
    found = _node("""
    const out = [];
    for (const open of [new Map(), "all"]) {
      const state = open === "all" ? new Map(boxesOf(shown(first)).map((b) => [b.id, true])) : open;
      const top = shown(first, state), edges = Object.fromEntries(edgesOf(top)), placed = place(top, edges);
      const closed = boxesOf(top).filter((b) => !b.open), names = closed.flatMap((b) => b.leaves.map((l) => l.name));
      let overlaps = 0, up = 0;
      const look = (box) => { for (const a of box.boxes) { for (const b of box.boxes) { if (a === b) continue; const p = placed.boxes[a.id], q = placed.boxes[b.id]; if (p.x < q.x + q.w && q.x < p.x + p.w && p.y < q.y + q.h && q.y < p.y + p.h) overlaps++; } if (a.open) look(a); } };
      look(top);
      for (const e of placed.edges) if (placed.boxes[e.from].y > placed.boxes[e.to].y) up++;
      out.push({ boxes: boxesOf(top).length, most: Math.max(top.boxes.length, ...boxesOf(top).map((b) => b.open ? b.boxes.length : 0)), twice: names.length - new Set(names).size, missing: graphOf(data, first).leaves.length - names.length, overlaps, up });
    }
    say(out);
    """, data, tmp_path)  # fmt: skip
    for state in found:
        assert state["most"] <= 120 and not (state["twice"] or state["missing"] or state["overlaps"] or state["up"]), state
    assert found[0]["boxes"] <= 60


@needs_node
def test_search(tmp_path):
    found = _node("""
    const hits = (text) => { const t = query(text); return graphOf(data, first).leaves.filter((l) => t(l.node, data.places[l.node.place]?.text)).map((l) => l.name); };
    say(["op:embedding_bag", "shape:[*,5,8]", "shape:[16,5,8] op:stack", "module:bottom op:relu", "file:viewer_models.py op:bmm", "EMBS.2", "nothing", " "].map(hits));
    """, graph_data(dlrm()), tmp_path)  # fmt: skip
    bags, shape, both, relus, file, path, nothing, empty = found
    assert len(bags) == 4 and shape == ["stack"] == both and len(relus) == 2 and file == ["bmm"]
    assert path and all("2" in n for n in path) and nothing == [] == empty


@needs_node
def test_words_are_cut_in_the_middle_and_hidden_characters_are_shown(tmp_path):
    cut, bidi, size = _node('say([short("a".repeat(10000) + "end", 20), clean("a\\u202eb\\n"), bytes(1536)])', _empty() | {"programs": [{"title": "", "ids": [], "steps": []}]}, tmp_path)
    assert len(cut) == 20 and cut.endswith("end") and "…" in cut
    assert bidi == "a\\u202eb\\u000a" and size == "1.5 KiB"
