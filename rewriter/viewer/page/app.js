// The page itself: state, the timeline, what is shown where, keys and links.
"use strict";

const TABS = [["graph", "Graph"], ["code", "Code"], ["why", "Why not?"], ["tables", "Tables"]];
const VIEWS = [["both", "Both"], ["overlay", "Overlay"], ["before", "Before"], ["after", "After"]];
const byId = (id) => document.getElementById(id);

const app = {
  state: { program: 0, step: 0, tab: "graph", view: "both", heat: "", all: false, near: false, choice: null, rule: "", applied: false },
  open: new Map(), treeOpen: new Map(), sorts: {}, panes: [], turn: 0,

  get program() { return this.data.programs[this.state.program]; },
  get step() { return this.state.step; },

  start(data) {
    this.data = data;
    this.types = new Map(data.modules.map((m) => [m.path, m.type]));
    this.tree = moduleRows(data.modules);
    if (data.programs.length === 0) data.programs.push({ title: "", ids: [], steps: [] });
    this.fromHash();
    this.controls();
    this.update();
  },

  /** The state changed what is shown: everything that follows from it anew. */
  update() {
    const { program, step } = this;
    const last = program.steps.length;
    this.ids = step === 0 ? { before: idsAfter(program, 0), after: idsAfter(program, last) } : { before: idsAfter(program, step - 1), after: idsAfter(program, step) };
    this.diff = difference(this.data, this.ids.before, this.ids.after);
    this.graphs = { before: graphOf(this.data, this.ids.before, this.state.all), after: graphOf(this.data, this.ids.after, this.state.all) };
    const name = step ? program.steps[step - 1].name.replaceAll("_", " ") : "";
    this.words = step ? { before: `Before ${name}`, after: `After ${name}` } : { before: "The plain model", after: "Optimized" };
    this.render();
  },

  render() {
    this.header();
    this.timeline();
    showTree(byId("tree"), this.tree);
    this.bar();
    showDetails(byId("details"));
    const host = byId("view");
    if (this.state.tab === "graph") this.drawGraphs(host);
    else {
      this.panes = [];
      host.replaceChildren(this.state.tab === "code" ? codePage() : this.state.tab === "why" ? whyPage() : this.state.tab === "ranks" ? ranksPage() : tablesPage());
      if (this.state.tab === "code") lightLines(host, this.lit());
    }
    this.toHash();
  },

  header() {
    byId("model").textContent = short(this.data.title, 60);
    const counts = Object.entries(this.data.coverage).filter(([, [, found]]) => found);
    const shown = counts.filter(([kind, [made]]) => made || kind === "lookups");
    const left = counts.filter((c) => !shown.includes(c)).reduce((sum, [, [, found]]) => sum + found, 0);
    const words = shown.map(([kind, [made, found]]) => [el("b", `${made}/${found}`), ` ${kind}`]);
    if (left) words.push([el("button.link", { onclick: () => this.tab("why") }, `${left} left as in the plain model`)]);
    byId("headline").replaceChildren(...(words.length ? words.flatMap((w, i) => [i ? " \u00b7 " : "Rewritten: ", ...w]) : [this.data.summary || "nothing to rewrite was found"]));
  },

  timeline() {
    const { program, step } = this;
    const slider = byId("slider");
    slider.max = program.steps.length;
    slider.value = step;
    slider.setAttribute("aria-valuetext", step ? program.steps[step - 1].name : "all passes");
    const chips = program.steps.map((s, i) => {
      const left = (s.records || []).filter((r) => r.status !== "APPLIED").length;
      const changed = Object.values(s.delta || {});
      const [more, less] = [changed.filter((d) => d > 0), changed.filter((d) => d < 0)].map((d) => d.reduce((a, b) => a + Math.abs(b), 0));
      const kind = s.status !== "ran" ? "hollow.bad" : s.made || s.ids ? "" : left ? "hollow" : "idle";
      const counts = s.made || s.ids ? [el("span.plus", `+${more}`), " ", el("span.minus", `\u2212${less}`), ` \u00b7 ${Math.round(s.ms)} ms`] : s.status !== "ran" ? s.status.toLowerCase() : left ? `${left} left` : "";
      return el("button.chip" + (kind ? "." + kind : ""), { "aria-current": step === i + 1, title: stepWords(s), onclick: () => this.go(i + 1) }, el("span.name", s.name.replaceAll("_", " ")), counts.length ? el("span.what", counts) : null);
    });
    chips.unshift(el("button.chip", { "aria-current": step === 0, onclick: () => this.go(0) }, el("span.name", "All passes"), el("span.what", "plain model \u2192 optimized")));
    byId("chips").replaceChildren(...chips);
    const current = byId("chips").querySelector("[aria-current=true]");
    if (current && step) current.scrollIntoView({ block: "nearest", inline: "nearest" });
    else byId("chips").scrollLeft = 0;
  },

  bar() {
    const { state } = this;
    const left = recordsOf(this.program, this.step).filter((r) => r.status !== "APPLIED").length;
    const tabs = this.hasRanks() ? [...TABS, ["ranks", "Ranks"]] : TABS;
    byId("tabs").replaceChildren(...tabs.map(([key, label]) => el("button", { role: "tab", "aria-selected": state.tab === key, onclick: () => this.tab(key) }, label, key === "why" && left ? ` (${left})` : key === "tables" ? ` (${this.data.tables.length})` : "")));
    byId("views").replaceChildren(...VIEWS.filter(([key]) => state.tab === "graph" || (state.tab === "code" && key !== "overlay")).map(([key, label]) => el("button", { "aria-pressed": state.view === key, onclick: () => { state.view = key; this.render(); } }, label)));
    byId("views").hidden = state.tab !== "graph" && state.tab !== "code";
    const nodes = [...this.ids.before, ...this.ids.after].map((i) => this.data.nodes[i]);
    const known = Object.entries(METRICS).filter(([key, m]) => key === "memory" ? nodes.some((n) => n.memory) : nodes.some((n) => m.of(n)));
    byId("heat").replaceChildren(el("option", { value: "" }, "no colours"), ...known.map(([key, m]) => el("option", { value: key, selected: key === state.heat ? "" : undefined }, m.label)));
    for (const id of ["heat", "all-label", "legend"]) byId(id).hidden = state.tab !== "graph" && !(id === "all-label" && state.tab === "code");
    byId("near").hidden = state.tab !== "graph" || !(state.near || (state.choice && state.choice.name));
    byId("all").checked = state.all;
    byId("near").setAttribute("aria-pressed", String(state.near));
    const { heat } = this.scales();
    const signs = [["added", "added"], ["removed", "removed"], ["replaced", "replaced"]].map(([k, w]) => el("span." + k, el("b", SIGNS[k]), " " + w));
    byId("legend").replaceChildren(...(heat ? [el("span", heat.label), el("span.ramp"), el("span", heat.text(heat.max))] : signs));
    signs.forEach((s) => (s.style.color = `var(--${s.className})`));
  },

  scales() {
    const metric = METRICS[this.state.heat];
    if (!metric) return { heat: null };
    const values = ["before", "after"].flatMap((side) => this.graphs[side].leaves.map((l) => metric.of(l.node, l)));
    return { heat: { ...metric, max: Math.max(1e-12, ...values) } };
  },

  // --- the graphs -----------------------------------------------------------------------------------------------------------

  sides() {
    const { view } = this.state;
    return view === "both" ? ["before", "after"] : [view];
  },

  leavesOf(side) {
    let leaves = side === "overlay" ? this.overlay() : this.graphs[side].leaves;
    const { choice, near } = this.state;
    if (near && choice && choice.name && leaves.some((l) => l.name === choice.name)) {
      const kept = neighbours(leaves, choice.name);
      leaves = leaves.filter((l) => kept.has(l.name));
    }
    return leaves;
  },

  /** The graph after, with what is gone as ghosts where it was. */
  overlay() {
    const after = this.graphs.after.leaves, kept = new Set(after.map((l) => l.name));
    const made = [...after];
    let place = 0;
    for (const leaf of this.graphs.before.leaves) {
      const at = made.findIndex((l) => l.name === leaf.name);
      if (at >= 0) place = Math.max(place, at + 1);
      else if (!kept.has(leaf.name)) made.splice(place++, 0, leaf);
    }
    return made;
  },

  marks(side) {
    if (side === "overlay") return new Map([...this.diff.before].filter(([, m]) => m !== "rewired").concat([...this.diff.after]));
    return side === "before" ? this.diff.before : this.diff.after;
  },

  drawGraphs(host) {
    const sides = this.sides();
    const wanted = sides.join();
    if (this.shown !== wanted || !host.querySelector(".panes")) {
      this.shown = wanted;
      this.panes = sides.map((side) => {
        const box = el("div.host"), head = el("h2");
        const pane = new Pane(box, this.words[side] || "Overlay", (b) => this.pick(side, b), (b) => this.toggle(b));
        const zoom = el("div.zoom", [["+", "Zoom in", () => pane.zoom(1.25)], ["\u2212", "Zoom out", () => pane.zoom(0.8)], ["fit", "Fit (f)", () => pane.fit()], ["SVG", "Save this graph as SVG", () => saveSvg(pane)]].map(([t, label, run]) => el("button", { "aria-label": label, title: label, onclick: run }, t)));
        return Object.assign(pane, { side, head, element: el("div.pane", { "data-side": side }, head, box, zoom) });
      });
      host.replaceChildren(el("div.panes", this.panes.map((p) => p.element)));
    }
    const turn = ++this.turn;
    let left = this.panes.length;
    for (const pane of this.panes) {
      const leaves = this.leavesOf(pane.side);
      pane.head.replaceChildren(el("span", this.words[pane.side] || "Before and after, over each other"), el("span.n", plural(leaves.filter((l) => l.node.kind === "op").length, "operation")));
      const top = present(moduleTree(leaves), this.types, this.open, pane.side === "overlay" ? 60 : 42, this.marks(pane.side));
      measure(top);
      const edges = Object.fromEntries(edgesOf(top));
      const key = JSON.stringify([boxesOf(top).map((b) => [b.id, b.w, b.h, !!b.open]), edges]);
      const finish = (placed) => {
        if (turn !== this.turn) return;
        const kept = pane.lastKey === pane.side + this.step;
        if (!kept) pane.touched = false;
        pane.lastKey = pane.side + this.step;
        pane.draw(top, placed, this.marks(pane.side), this.scales().heat, this.words[pane.side] || "Overlay");
        this.light(false);
        if (!--left) document.body.dataset.drawn = String(turn);
      };
      if (pane.key === key) { finish(pane.last); continue; }
      const waiting = setTimeout(() => { if (turn === this.turn && !pane.host.querySelector(".wait")) pane.host.append(el("div.wait", "placing ", plural(boxesOf(top).length, "box").replace(/xs$/, "xes"), el("button.link", { onclick: () => layout.cancel() }, "stop and read it as code"))); }, 250);
      layout.ask(slim(top), edges).then((placed) => {
        clearTimeout(waiting);
        pane.host.querySelector(".wait")?.remove();
        Object.assign(pane, { key, last: placed });
        finish(placed);
      }, (error) => {
        clearTimeout(waiting);
        if (turn !== this.turn) return;
        console.warn(`layout: ${error.message}; the graph is shown as code`);
        this.tab("code");
      });
    }
  },

  pick(side, box) {
    if (!box) return this.choose(null);
    const at = side === "overlay" ? (box.leaves.some((l) => this.graphs.after.byName.has(l.name)) ? "after" : "before") : side;
    if (box.kind === "leaf") this.choose({ side: at, name: box.leaf.name });
    else this.choose({ side: at, names: new Set(box.leaves.map((l) => l.name)), title: box.title, id: box.id });
  },

  toggle(box) {
    this.open.set(box.id, !box.open);
    this.panes.forEach((p) => (p.touched = p.touched || false));
    this.render();
  },

  /** choice: null, {side, name}, {side, names, title, id} or {module}. */
  choose(choice) {
    this.state.choice = choice;
    if (choice && choice.name) this.openTo(choice.side, choice.name);
    this.render();
    this.light(true);
  },

  chooseRecord(r) {
    const wanted = new Set(r.nodes || []);
    this.state.step = r.step;
    this.state.choice = null;
    this.state.tab = "graph";
    this.update();
    const name = [...wanted].find((n) => this.graphs.before.byName.has(n));
    if (name) this.choose({ side: "before", name });
    else if (r.subject) this.choose({ module: this.types.has(r.subject) ? r.subject : r.subject.slice(0, Math.max(0, r.subject.lastIndexOf("."))) });
  },

  /** Open the groups around a node, in whichever pane shows it. */
  openTo(side, name) {
    for (const shown of this.sides()) {
      if (shown !== "overlay" && shown !== side) continue;
      const leaves = this.leavesOf(shown);
      if (!leaves.some((l) => l.name === name)) continue;
      for (let guard = 0; guard < 12; guard++) {
        const top = present(moduleTree(leaves), this.types, this.open, shown === "overlay" ? 60 : 42, this.marks(shown));
        const box = boxesOf(top).filter((b) => !b.open && b.leaves.some((l) => l.name === name)).at(-1);
        if (!box || box.kind === "leaf" || !box.kids.length) break;
        this.open.set(box.id, true);
      }
    }
  },

  /** Names to light up on each side for what is chosen. */
  lit() {
    const { choice } = this.state;
    if (!choice || choice.rank !== undefined) return { before: null, after: null };
    let before, after;
    const follow = (names, map) => new Set([...names].flatMap((n) => map.get(n) || []));
    if (choice.module !== undefined) {
      before = new Set(this.graphs.before.leaves.filter((l) => inside(l.node, choice.module)).map((l) => l.name));
      after = follow(before, this.diff.heirs);
    } else {
      const names = choice.names || new Set([choice.name]);
      before = choice.side === "before" ? names : follow(names, this.diff.from);
      after = choice.side === "after" ? names : follow(names, this.diff.heirs);
    }
    return { before, after };
  },

  light(reveal) {
    const lit = this.lit();
    for (const pane of this.panes) {
      if (!pane.placed) continue;
      const names = pane.side === "overlay" ? (lit.before || lit.after ? new Set([...(lit.before || []), ...(lit.after || [])]) : null) : lit[pane.side];
      const { choice } = this.state;
      pane.highlight(names, choice && choice.id && (pane.side === choice.side || pane.side === "overlay") ? choice.id : undefined);
      if (reveal && names && names.size) pane.reveal(names);
    }
  },

  // --- moving about -----------------------------------------------------------------------------------------------------------

  go(step) {
    const { program } = this;
    this.state.step = Math.min(program.steps.length, Math.max(0, step));
    if (this.state.choice && this.state.choice.names) this.state.choice = null;
    this.update();
    this.light(true);
  },

  tab(key) {
    this.state.tab = key;
    this.shown = "";
    this.render();
  },

  search(text, forward = 1) {
    const test = query(text);
    const hits = [];
    if (text.trim()) for (const side of this.state.view === "before" ? ["before"] : this.state.view === "after" ? ["after"] : ["before", "after"]) {
      for (const leaf of this.graphs[side].leaves) if (test(leaf.node, this.data.places[leaf.node.place]?.text) || leaf.stored.some((s) => test(s, ""))) hits.push({ side, name: leaf.name });
    }
    this.hit = text === this.lastSearch ? (this.hit + forward + hits.length) % Math.max(1, hits.length) : 0;
    this.lastSearch = text;
    byId("found").textContent = text.trim() ? (hits.length ? `${this.hit + 1}/${hits.length}` : "none") : "";
    if (hits.length) this.choose(hits[this.hit]);
    else if (text.trim()) this.choose(null);
  },

  toHash() {
    const { state } = this, { choice } = state, parts = new URLSearchParams();
    if (state.program) parts.set("graph", state.program);
    if (state.step) parts.set("step", state.step);
    if (state.tab !== "graph") parts.set("tab", state.tab);
    if (state.view !== "both") parts.set("view", state.view);
    if (state.heat) parts.set("heat", state.heat);
    if (state.all) parts.set("sizes", "1");
    if (choice && choice.name) { parts.set("node", choice.name); parts.set("side", choice.side); }
    if (choice && choice.module !== undefined) parts.set("module", choice.module);
    if (choice && choice.rank !== undefined) parts.set("rank", choice.rank);
    const hash = parts.toString();
    if (hash !== location.hash.slice(1)) { this.own = "#" + hash; try { history.replaceState(null, "", hash ? "#" + hash : location.pathname + location.search); } catch { /* about:srcdoc in a notebook */ } }
  },

  fromHash() {
    const parts = new URLSearchParams(location.hash.slice(1)), { state, data } = this;
    const number = (key, most) => Math.min(most, Math.max(0, Math.trunc(Number(parts.get(key)) || 0)));
    const one = (key, known, other) => (known.includes(parts.get(key)) ? parts.get(key) : other);
    state.program = number("graph", data.programs.length - 1);
    state.step = number("step", data.programs[state.program].steps.length);
    state.tab = one("tab", [...TABS.map((t) => t[0]), "ranks"], "graph");
    state.view = one("view", VIEWS.map((v) => v[0]), matchMedia("(max-width: 900px)").matches && !location.hash ? "after" : "both");
    state.heat = one("heat", Object.keys(METRICS), "");
    state.all = parts.get("sizes") === "1";
    state.choice = parts.get("node") ? { side: one("side", ["before", "after"], "after"), name: parts.get("node") } : parts.has("module") ? { module: parts.get("module") } : parts.has("rank") && this.hasRanks() ? { rank: number("rank", data.ranks.length - 1) } : null;
    if (state.tab === "ranks" && !this.hasRanks()) state.tab = "graph";
  },

  hasRanks() { return !!this.data.ranks && this.data.ranks.length > 0; },
};
