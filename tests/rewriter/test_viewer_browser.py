"""The page in a real browser (headless Chromium): it opens from file://, asks the network for nothing, draws what it should, and every
control does what it says. Needs Debian's ``chromium`` and the ``playwright`` package."""
from __future__ import annotations

import os
import shutil
import time

import pytest
import tablewright as tw
import torch
from tablewright.rewriter.viewer.graph_data import graph_data
from tablewright.rewriter.viewer.page import page as page_of
from viewer_models import Hostile, Long, Wide, dlrm, optimized

sync_api = pytest.importorskip("playwright.sync_api", reason="NOT TESTED: playwright is not installed (pip install playwright)")
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="NOT TESTED: chromium is not installed (apt-get install chromium)")


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        options = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=BROWSER, args=options)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Files by name, each model optimized once."""
    folder = tmp_path_factory.mktemp("pages")
    torch.manual_seed(0)
    made = {
        "tiny": dlrm(), "dlrm": dlrm(26, 16), "wide": optimized(Wide(150), torch.randint(0, 10, (4, 150))),
        "long": optimized(Long(60), torch.randint(0, 10, (4,))), "hostile": optimized(Hostile(), torch.randint(0, 10, (3, 2))),
    }  # fmt: skip
    for name, opt in made.items():
        opt.visualize(folder / f"{name}.html")
    return folder


class Seen:
    """A page, and whatever went wrong on it."""

    def __init__(self, browser, file, width=1440, theme="light", hash=""):
        self.wrong: list[str] = []
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=theme, accept_downloads=True)
        context.set_default_timeout(120_000)  # a busy machine
        self.page = page = context.new_page()
        page.on("console", lambda m: self.wrong.append(f"console {m.type}: {m.text}"))
        page.on("pageerror", lambda e: self.wrong.append(f"error: {e}"))
        page.on("dialog", lambda d: (self.wrong.append(f"dialog: {d.message}"), d.dismiss()))
        page.on("request", lambda r: None if r.url.startswith(("file:", "blob:", "data:")) else self.wrong.append(f"request: {r.url}"))
        page.goto(file.as_uri() + hash)
        self.drawn()

    def drawn(self):
        """Wait until what was last asked for is drawn."""
        for _ in range(3000):
            if self.page.evaluate("app.data && (app.state.tab !== 'graph' || document.body.dataset.drawn === String(app.turn)) && !document.querySelector('.wait')"):
                return
            time.sleep(0.02)
        raise AssertionError("the graph was not drawn")

    def state(self, key):
        return self.page.evaluate(f"app.state.{key}")


@pytest.fixture
def see(browser, pages):
    seen: list[Seen] = []

    def open_page(name, **options):
        seen.append(Seen(browser, pages / f"{name}.html", **options))
        return seen[-1]

    yield open_page
    for each in seen:
        each.page.context.close()
        assert not each.wrong


# Facts of the layout: no two closed boxes overlap, none leaves its group, and no text is wider than its box or the panel it is in.
LAYOUT = """() => {
  const faults = [];
  for (const pane of app.panes) {
    const boxes = boxesOf(pane.top), at = pane.placed.boxes, closed = boxes.filter((b) => !b.open);
    for (const a of closed) for (const b of closed) {
      const p = at[a.id], q = at[b.id];
      if (a.id < b.id && p.x < q.x + q.w - 1 && q.x < p.x + p.w - 1 && p.y < q.y + q.h - 1 && q.y < p.y + p.h - 1) faults.push(`${a.id} over ${b.id}`);
    }
    const within = (box) => { for (const kid of box.boxes || []) { const p = at[box.id], q = at[kid.id]; if (p && (q.x < p.x || q.y < p.y || q.x + q.w > p.x + p.w + 1 || q.y + q.h > p.y + p.h + 1)) faults.push(`${kid.id} leaves ${box.id}`); within(kid); } };
    within(pane.top);
    for (const [id, g] of pane.elements) for (const text of g.querySelectorAll(':scope > text')) {
      const right = Number(text.getAttribute('x')) + text.getComputedTextLength();
      if (!text.classList.contains('sign') && right > at[id].w + 0.5) faults.push(`text of ${id} is cut: ${right} > ${at[id].w}`);
    }
  }
  for (const e of document.querySelectorAll('header, nav, .bar, aside, .view')) if (getComputedStyle(e).display !== 'none' && e.scrollWidth > e.clientWidth + 1 && !['auto', 'scroll'].includes(getComputedStyle(e).overflowX)) faults.push(`${e.className || e.tagName} is wider than it may be`);
  if (document.documentElement.scrollWidth > innerWidth) faults.push('the page is wider than the window');
  return faults;
}"""


@pytest.mark.parametrize("name", ["tiny", "dlrm", "wide", "long", "hostile"])
@pytest.mark.parametrize("width, theme", [(1440, "light"), (800, "dark")])
def test_what_is_drawn_is_in_order(see, name, width, theme):
    seen = see(name, width=width, theme=theme)
    for view in ("both", "overlay", "before", "after"):
        seen.page.evaluate(f"app.state.view = '{view}'; app.render()")
        seen.drawn()
        assert seen.page.evaluate(LAYOUT) == [], view
    assert seen.page.evaluate("document.documentElement.dataset.theme") == theme


def test_a_stranger_sees_what_was_done(see):
    page = see("dlrm").page
    assert "26/26 lookups" in page.inner_text("#headline")
    assert "26 lookups of 26 tables in 1 launch" in page.inner_text("#details")
    before, after = (page.locator(f'.pane[data-side="{side}"] svg').text_content() for side in ("before", "after"))
    assert "EmbeddingBag × 26" in before and "embedding bags" in after and "EmbeddingBag" not in after


def test_every_control(see):
    seen = see("tiny")
    page = seen.page
    for tab, words in (("Code", "linear("), ("Why not?", "dropout with p=0.1"), ("Tables", "embs.3.weight")):
        page.click(f"#tabs button:has-text('{tab}')")
        assert words in page.inner_text("#view")
    page.click("th button:has-text('rows')")
    page.click("th button:has-text('rows')")
    assert "embs.3" in page.inner_text("#view tbody tr:first-child")
    page.click("#tabs button:has-text('Why not?')")
    page.check(".page input[type=checkbox]")
    assert "4 lookups" in page.inner_text("#view")
    page.select_option(".page select", "remove_zero_dropout")
    assert page.locator("#view tbody tr").count() == 1
    page.click("#view tbody tr")
    seen.drawn()
    assert seen.state("tab") == "graph" and seen.state("choice.name") == "dropout" and "drops values" in page.inner_text("#details")
    for view in ("Overlay", "Before", "After", "Both"):
        page.click(f"#views button:has-text('{view}')")
        seen.drawn()
    for metric in page.eval_on_selector_all("#heat option", "all => all.map(o => o.value).filter(Boolean)"):
        page.select_option("#heat", metric)
        seen.drawn()
        assert page.locator("rect.heat").count() > 0, metric
    page.select_option("#heat", "")
    page.check("#all")
    seen.drawn()
    assert "sym numel" in page.locator(".panes").text_content() or page.evaluate("app.graphs.before.leaves.some((l) => l.node.op === 'sym_numel')")
    page.uncheck("#all")
    page.click("#near")
    seen.drawn()
    assert page.evaluate("app.leavesOf('before').length < app.graphs.before.leaves.length")
    page.click("#near")
    page.click("#help")
    assert page.locator("#keys").is_visible()
    page.click("#keys button")
    theme = page.evaluate("document.documentElement.dataset.theme")
    page.click("#theme")
    assert page.evaluate("document.documentElement.dataset.theme") != theme
    scale = page.evaluate("app.panes[0].scale")
    page.click(".zoom button >> nth=0")
    assert page.evaluate("app.panes[0].scale") > scale
    page.click(".zoom button >> nth=2")
    with page.expect_download() as download:
        page.click(".zoom button >> nth=3")
    text = open(download.value.path(), encoding="utf-8").read()
    assert text.startswith("<svg") and "EmbeddingBag × 4" in text and "var(--" not in text
    page.keyboard.press("Escape")
    page.click(".chip:has-text('group tables')")
    seen.drawn()
    assert "Before group tables" in page.inner_text(".panes") and "4 lookups of 4 tables" in page.inner_text("#details")


def test_what_a_module_became_and_what_a_node_comes_from(see):
    seen = see("tiny")
    page = seen.page
    page.click("#tree .row:has-text('embs') .twist")
    page.click("#tree .row:has-text('embs')")
    seen.drawn()
    lit = page.eval_on_selector_all(".pane[data-side=after] .box.chosen", "all => all.map(b => b.getAttribute('aria-label'))")
    assert any("embedding bags" in label for label in lit)
    page.click(".pane[data-side=after] .box:has-text('embedding bags')")
    details = page.inner_text("#details")
    assert "Comes from" in details and "embedding_bag_3" in details and "viewer_models.py" in details and "for i, table in enumerate(self.embs)" in details
    page.click("#details .links button:has-text('embedding_bag_3')")
    seen.drawn()
    assert seen.state("choice.side") == "before" and "Became" in page.inner_text("#details")
    page.click("#tabs button:has-text('Code')")
    lines = page.eval_on_selector_all(".ln.lit", "all => all.map(l => l.dataset.name)")
    assert "embedding_bag_3" in lines and any(n.startswith("embedding_bags") for n in lines)


def test_by_keys_alone(see):
    seen = see("tiny")
    page = seen.page
    press = page.keyboard.press
    press("ArrowRight")
    press("ArrowRight")
    press("ArrowRight")
    seen.drawn()
    assert seen.state("step") == 3
    press("Home")
    seen.drawn()
    assert seen.state("step") == 0
    for _ in range(3):
        press("ArrowDown")
    press("Enter")
    assert seen.state("choice") is not None
    press("Escape")
    assert seen.state("choice") is None
    press("/")
    page.keyboard.type("op:embedding_bag")
    press("Enter")
    seen.drawn()
    assert page.inner_text("#found") == "1/5"  # four before, and the fused one after
    press("Enter")
    assert page.inner_text("#found") == "2/5"
    press("Escape")
    for key, tab in (("2", "code"), ("3", "why"), ("4", "tables"), ("1", "graph")):
        press(key)
        assert seen.state("tab") == tab
    seen.drawn()
    boxes = page.evaluate("boxesOf(app.panes[0].top).length")
    page.evaluate("[...document.querySelectorAll('.pane[data-side=before] .box')].find((b) => b.getAttribute('aria-expanded') === 'false').focus()")
    press("o")
    seen.drawn()
    assert page.evaluate("boxesOf(app.panes[0].top).length") > boxes
    press("?")
    assert page.locator("#keys").is_visible()
    press("Escape")


def test_links_lead_back_to_what_was_shown(see):
    seen = see("tiny", hash="#step=9&node=linear&side=after&view=after")
    assert seen.state("step") == 9 and seen.state("choice.name") == "linear" and seen.state("view") == "after"
    assert "step=9" in seen.page.evaluate("location.hash")
    for broken in ("#step=999&tab=nonsense&view=&heat=x", "#node=nothing&side=sideways", "#%%%"):
        other = see("tiny", hash=broken)
        assert other.page.locator("#details h2").count() == 1


def test_ranks(browser, tmp_path):
    data = graph_data(dlrm())
    shard = {"table": "embs.0.weight", "memory": 1600}
    data["ranks"] = [
        {"rank": 0, "memory": 3200, "shards": [{**shard, "range": "rows 0..50"}, {**shard, "table": "embs.1.weight", "range": "rows 0..101"}]},
        {"rank": 1, "memory": 1600, "shards": [{**shard, "range": "rows 50..100"}]},
    ]  # fmt: skip
    (tmp_path / "ranks.html").write_text(page_of(data))
    seen = Seen(browser, tmp_path / "ranks.html", hash="#tab=ranks&rank=1")
    details = seen.page.inner_text("#details")
    assert "Rank 1 of 2" in details and "rows 50..100" in details and "On rank 0 and not here" in details and "embs.1.weight" in details
    assert "computation" in seen.page.inner_text("#view") and seen.page.locator(".lane i").count() > 3
    seen.page.click("#view tbody tr:first-child")
    assert "Rank 0 of 2" in seen.page.inner_text("#details") and "rank=0" in seen.page.evaluate("location.hash")
    assert not seen.wrong
    seen.page.context.close()


def test_hostile_names_are_text(see):
    seen = see("hostile")
    page = seen.page
    assert page.locator("img").count() == 0
    page.click("#tabs button:has-text('Tables')")
    shown = page.inner_text("#view")
    assert "</script><img" in shown and "\\u202e" in shown and "n" * 200 not in shown
    page.click("#tabs button:has-text('Code')")
    assert "\u202e" not in page.inner_text("#view")
    page.click("#tabs button:has-text('Graph')")
    seen.drawn()
    page.locator(".pane[data-side=before] .box:has-text('cat')").last.click()
    assert "alert(1)</script> in the user's own source" in page.inner_text("#details")


def test_where_no_worker_may_start_and_where_the_layout_fails(browser, pages):
    for script, tab in (("window.Worker = function () { throw new Error('no') }", "graph"), ("window.Worker = class { postMessage(m) { setTimeout(() => this.onmessage({ data: { job: m.job, error: 'broken' } })) } terminate() {} }", "code")):
        context = browser.new_context()
        context.add_init_script(script)
        page = context.new_page()
        page.goto((pages / "tiny.html").as_uri())
        page.wait_for_selector("body[data-drawn]" if tab == "graph" else ".twin")
        assert page.evaluate("app.state.tab") == tab
        context.close()


def test_a_notebook_shows_it(browser, tmp_path):
    opt = tw.optimize(torch.nn.Sequential(torch.nn.Embedding(10, 4)), sample_inputs=(torch.tensor([1]),))
    (tmp_path / "notebook.html").write_text(f"<!doctype html><body>{opt._repr_html_()}</body>")
    page = browser.new_context().new_page()
    wrong = []
    page.on("pageerror", lambda e: wrong.append(str(e)))
    page.goto((tmp_path / "notebook.html").as_uri())
    frame = page.frame_locator("iframe")
    frame.locator("svg .box").first.wait_for()
    assert "1/1 lookups" in frame.locator("#headline").inner_text() and not wrong
    page.context.close()
