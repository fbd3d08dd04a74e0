// Keys, controls, the layout worker, and the start.
"use strict";

app.controls = function () {
  byId("slider").addEventListener("input", (e) => app.go(Number(e.target.value)));
  const programs = byId("programs");
  programs.hidden = app.data.programs.length < 2;
  programs.replaceChildren(...app.data.programs.map((p, i) => el("option", { value: i, selected: i === app.state.program ? "" : undefined }, p.title || `graph ${i + 1}`)));
  programs.addEventListener("change", () => { app.state.program = Number(programs.value); app.state.step = 0; app.state.choice = null; app.update(); });
  byId("heat").addEventListener("change", (e) => { app.state.heat = e.target.value; app.render(); });
  byId("all").addEventListener("change", (e) => { app.state.all = e.target.checked; app.update(); });
  byId("near").addEventListener("click", () => { app.state.near = !app.state.near; app.render(); });
  byId("theme").addEventListener("click", () => theme(true));
  byId("help").addEventListener("click", showKeys);
  byId("narrow").addEventListener("click", () => document.body.classList.toggle("tree"));
  const search = byId("search");
  search.addEventListener("keydown", (e) => {
    if (e.key === "Enter") { e.preventDefault(); app.search(search.value, e.shiftKey ? -1 : 1); }
    if (e.key === "Escape") { search.value = ""; byId("found").textContent = ""; search.blur(); }
    e.stopPropagation();
  });
  search.addEventListener("change", () => search.value !== app.lastSearch && app.search(search.value));
  addEventListener("keydown", onKey);
  addEventListener("hashchange", () => { if (location.hash !== app.own) { app.fromHash(); app.update(); app.light(true); } });
  let resized;
  addEventListener("resize", () => { clearTimeout(resized); resized = setTimeout(() => app.panes.forEach((p) => p.touched || p.fit()), 80); });
  theme(false);
};

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || byId("keys").open) return;
  if (/^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName) && event.target.type !== "range" && event.target.type !== "checkbox") return;
  const run = {
    ArrowLeft: () => app.go(app.step - 1), ArrowRight: () => app.go(app.step + 1), Home: () => app.go(0), End: () => app.go(app.program.steps.length),
    ArrowDown: () => move(1), ArrowUp: () => move(-1), "/": () => byId("search").focus(), Escape: () => app.choose(null), f: () => app.panes.forEach((p) => p.fit()), d: () => theme(true), n: () => byId("near").click(),
    "?": showKeys, 1: () => app.tab("graph"), 2: () => app.tab("code"), 3: () => app.tab("why"), 4: () => app.tab("tables"), "+": () => app.panes.forEach((p) => p.zoom(1.25)), "-": () => app.panes.forEach((p) => p.zoom(0.8)),
  }[event.key];
  if (!run) return;
  event.preventDefault();
  run();
}

/** The focus to the next or previous box, in the order in which they run. */
function move(by) {
  const all = [...document.querySelectorAll(".panes .box")];
  if (!all.length) return;
  const next = all[(all.indexOf(document.activeElement) + by + all.length) % all.length];
  next.focus({ preventScroll: true });
}

function theme(turn) {
  const root = document.documentElement;
  const wanted = turn ? (root.dataset.theme === "dark" ? "light" : "dark") : root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  root.dataset.theme = wanted;
}

function showKeys() {
  const keys = [["\u2190 \u2192", "the pass before, the next pass"], ["\u2191 \u2193", "move over the boxes"], ["Enter", "choose a box"], ["o", "open or close it"], ["/", "search: words, op:bag shape:[*,64] module:user file:model.py by:group_tables"], ["Enter", "in the search: the next find"], ["Esc", "choose nothing"], ["f + \u2212", "fit, zoom"], ["n", "only what is near the chosen node"], ["d", "dark or light"], ["1 2 3 4", "graph, code, why not, tables"]];
  byId("keys").replaceChildren(el("h2", "Keys"), el("dl", keys.map(([k, what]) => pair("", el("kbd", k), " ", what))), el("p.faint", "Drag to move, Ctrl and wheel to zoom, double click to open a group."), el("form", { method: "dialog" }, el("button.link", "Close")));
  byId("keys").showModal();
}

function saveSvg(pane) {
  if (!pane.placed) return;
  const link = el("a", { href: URL.createObjectURL(new Blob([svgText(pane)], { type: "image/svg+xml" })), download: `${app.data.title.replace(/\W+/g, "_")}_${app.step}_${pane.side}.svg` });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

// --- layout in a worker ---------------------------------------------------------------------------------------------------------

/** Boxes with nothing but what placing them needs. */
const slim = (box) => ({ id: box.id, w: box.w, h: box.h, open: !!box.open, boxes: box.open ? box.boxes.map(slim) : [] });

const layout = {
  jobs: new Map(), next: 0,

  ask(top, edges) {
    if (this.worker === undefined) this._begin();
    if (!this.worker) return new Promise((done, fail) => setTimeout(() => { try { done(place(top, edges, this._inPage())); } catch (e) { fail(e); } }));
    const job = ++this.next;
    return new Promise((done, fail) => {
      this.jobs.set(job, { done, fail });
      this.worker.postMessage({ job, top, edges });
    });
  },

  /** Stop what is under way; whoever waits is told. */
  cancel() {
    if (this.worker) this.worker.terminate();
    this.worker = undefined;
    for (const { fail } of this.jobs.values()) fail(new Error("stopped"));
    this.jobs.clear();
  },

  _begin() {
    const source = `${byId("layout-library").textContent};const HEAD=${HEAD},PAD=${PAD};${place.toString()};${grid.toString()};onmessage=(e)=>{const{job,top,edges}=e.data;try{postMessage({job,placed:place(top,edges,dagre)})}catch(error){postMessage({job,error:String(error.message||error)})}}`;
    try {
      this.worker = new Worker(URL.createObjectURL(new Blob([source], { type: "text/javascript" })));
      this.worker.onmessage = ({ data }) => {
        const waiting = this.jobs.get(data.job);
        this.jobs.delete(data.job);
        if (waiting) data.error ? waiting.fail(new Error(data.error)) : waiting.done(data.placed);
      };
      this.worker.onerror = (e) => { for (const { fail } of this.jobs.values()) fail(new Error(e.message || "the worker failed")); this.jobs.clear(); };
    } catch {
      this.worker = null;
    }
  },

  /** Where no worker may start, dagre becomes a script of the page (its hash is in the page's policy). */
  _inPage() {
    if (typeof dagre === "undefined") document.head.append(Object.assign(document.createElement("script"), { textContent: byId("layout-library").textContent }));
    return dagre;
  },
};

async function unpack(element) {
  if (element.dataset.packed !== "deflate") return JSON.parse(element.textContent);
  const raw = Uint8Array.from(atob(element.textContent.trim()), (c) => c.charCodeAt(0));
  return JSON.parse(await new Response(new Blob([raw]).stream().pipeThrough(new DecompressionStream("deflate"))).text());
}

unpack(byId("data")).then((data) => app.start(data), (error) => { byId("headline").textContent = `The data of this page cannot be read: ${error.message}`; });
