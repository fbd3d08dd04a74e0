// Draws placed boxes as SVG into one pane, and moves the view: pan, zoom, fit.
"use strict";

const SVG = "http://www.w3.org/2000/svg";

function svg(name, attributes, parent, text) {
  const made = document.createElementNS(SVG, name);
  for (const key in attributes) made.setAttribute(key, attributes[key]);
  if (text !== undefined) made.textContent = text;
  if (parent) parent.appendChild(made);
  return made;
}

const pen = document.createElement("canvas").getContext("2d");

/** The width of `text` in pixels; `bold` for titles. */
function widthOf(text, bold) {
  pen.font = bold ? "600 12.5px system-ui, sans-serif" : "11px system-ui, sans-serif";
  return pen.measureText(text).width;
}

/** Gives every drawn box a size that holds its words. */
function measure(top) {
  for (const box of boxesOf(top)) {
    const words = Math.max(widthOf(box.title, true), widthOf(box.sub || "", false));
    const flags = box.note ? widthOf(box.note, false) + 12 : 0;
    box.w = Math.ceil(Math.max(64, words * 1.04 + 40 + (box.kids.length ? 18 : 0), box.open ? widthOf(box.title + "  " + (box.sub || ""), true) + 64 + flags : 0) + (box.open ? 0 : flags));
    box.h = box.role === "collective" ? 26 : box.sub ? 37 : 28;
    if (box.role === "collective") box.w = Math.max(box.w, 280);
  }
  top.w = 0;
  top.h = 0;
}

/** One pane: an SVG that shows a graph. `onPick(box)`, `onToggle(box)` answer clicks. */
class Pane {
  constructor(host, label, onPick, onToggle) {
    this.host = host;
    this.onPick = onPick;
    this.onToggle = onToggle;
    this.root = svg("svg", { class: "graph", role: "group", "aria-label": label, tabindex: "-1" }, host);
    this.view = svg("g", {}, this.root);
    this.scale = 1;
    this.x = this.y = 0;
    this.touched = false;
    this._listen();
  }

  /** `marks`: name -> mark; `heat`: {of, max, text} or null. */
  draw(top, placed, marks, heat, label) {
    this.top = top;
    this.placed = placed;
    this.view.replaceChildren();
    this.elements = new Map();
    this.lines = [];
    const under = svg("g", { class: "frames" }, this.view), edges = svg("g", { class: "edges" }, this.view), over = svg("g", { class: "boxes" }, this.view);
    for (const box of boxesOf(top)) this._box(box, placed.boxes[box.id], box.open ? under : over, marks, heat, label);
    for (const e of placed.edges) this._edge(e, edges, marks);
    if (!this.touched) this.fit();
  }

  _box(box, at, parent, marks, heat, label) {
    const g = svg("g", { class: `box ${box.role}${box.open ? " open" : ""}`, transform: `translate(${at.x} ${at.y})`, tabindex: "0", role: "button", "data-id": box.id }, parent);
    this.elements.set(box.id, g);
    const names = box.leaves.map((l) => l.name);
    const counts = countMarks(names, marks);
    const changed = names.filter((n) => marks.has(n) && marks.get(n) !== "rewired").length;
    const kinds = Object.keys(counts).filter((k) => counts[k]);
    const whole = changed > 0 && changed === names.length; // nothing in it is as it was
    const only = box.kind === "leaf" ? kinds[0] : !whole ? "" : counts.replaced ? "replaced" : kinds.length === 1 ? kinds[0] : "";
    if (only) g.classList.add(only);
    const value = heat ? box.leaves.reduce((sum, l) => sum + heat.of(l.node, l), 0) : 0;
    if (box.kind === "stack" && !box.open) for (const d of [6, 3]) svg("rect", { class: "back", x: d, y: d, width: at.w, height: at.h, rx: 7 }, g);
    svg("rect", { class: "face", width: at.w, height: at.h, rx: box.role === "input" || box.role === "output" ? 15 : 7 }, g);
    if (heat && value > 0 && !box.open) svg("rect", { class: "heat", width: at.w, height: at.h, rx: 7, "fill-opacity": (0.12 + 0.7 * Math.sqrt(value / heat.max)).toFixed(3) }, g);
    const sub = heat && !box.open ? (value > 0 ? heat.text(value) : "") : box.sub;
    const dots = !only && kinds.some((k) => k !== "rewired");
    const left = only || dots ? 24 : 12;
    if (box.open) {
      const title = svg("text", { class: "title", x: left, y: 17 }, g, box.title);
      if (box.sub) svg("tspan", { class: "sub", dx: 8 }, title, box.sub);
    } else if (box.role === "collective") {
      const title = svg("text", { class: "title", x: left, y: 17 }, g, box.title);
      if (sub) svg("tspan", { class: "sub", dx: 8 }, title, sub);
    } else {
      svg("text", { class: "title", x: left, y: sub ? 16 : at.h / 2 + 4.5 }, g, box.title);
      if (sub) svg("text", { class: "sub", x: left, y: 30 }, g, sub);
    }
    if (only) svg("text", { class: "sign", x: 12, y: box.open ? 17 : at.h / 2 + 5 }, g, SIGNS[only]);
    else if (dots) this._dots(g, counts, box.open ? 15 : at.h / 2);
    if (box.kids.length) {
      const x = at.w - 16, y = box.open ? 14 : at.h / 2;
      const knob = svg("g", { class: "knob", transform: `translate(${x} ${y})` }, g);
      svg("circle", { r: 10 }, knob);
      svg("path", { d: box.open ? "M-4 1.5 L0 -2.5 L4 1.5" : "M-4 -1.5 L0 2.5 L4 -1.5" }, knob);
      knob.addEventListener("click", (event) => { event.stopPropagation(); this.onToggle(box); });
    }
    const said = kinds.filter((k) => k !== "rewired").map((k) => `${counts[k]} ${k}`).join(", ");
    g.setAttribute("aria-label", `${label}: ${box.title}${box.sub ? ", " + box.sub : ""}${said ? "; " + said : ""}${box.kids.length ? (box.open ? "; open" : "; closed") : ""}`);
    if (box.kids.length) g.setAttribute("aria-expanded", String(!!box.open));
    g.addEventListener("click", (event) => { event.stopPropagation(); if (!this.dragged) this.onPick(box); });
    g.addEventListener("dblclick", (event) => { event.stopPropagation(); if (box.kids.length) this.onToggle(box); });
    g.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); event.stopPropagation(); this.onPick(box); }
      else if (event.key === "o" && box.kids.length) { event.stopPropagation(); this.onToggle(box); }
    });
  }

  _dots(g, counts, y) {
    const kinds = ["added", "removed", "replaced"].filter((k) => counts[k]);
    kinds.forEach((kind, i) => svg("circle", { class: `dot ${kind}`, cx: 12, cy: y + (i - (kinds.length - 1) / 2) * 8, r: 3 }, g));
  }

  _edge(e, parent, marks) {
    const [first, ...rest] = e.points;
    if (!first) return;
    let d = `M${first.x.toFixed(1)} ${first.y.toFixed(1)}`;
    for (let i = 0; i < rest.length; i++) {
      const p = rest[i], q = rest[i + 1];
      if (q) d += ` Q${p.x.toFixed(1)} ${p.y.toFixed(1)} ${((p.x + q.x) / 2).toFixed(1)} ${((p.y + q.y) / 2).toFixed(1)}`;
      else d += ` L${p.x.toFixed(1)} ${p.y.toFixed(1)}`;
    }
    const line = svg("path", { class: "edge", d, "marker-end": "url(#arrow)", "stroke-width": Math.min(4, 1 + Math.log2(e.count) * 0.5).toFixed(2) }, parent);
    this.lines.push({ ...e, line });
  }

  /** Light up the boxes that hold any of `names`, dim the others; `null`: nothing is chosen. `exact`: the id of the chosen box. */
  highlight(names, exact) {
    if (!this.elements) return;
    this.root.classList.toggle("choosing", !!names && names.size > 0);
    const lit = new Set();
    for (const box of boxesOf(this.top)) {
      const on = !!names && box.leaves.some((l) => names.has(l.name));
      if (on) lit.add(box.id);
      const g = this.elements.get(box.id);
      g.classList.toggle("lit", on);
      g.classList.toggle("chosen", box.id === exact || (on && !box.open && !exact));
    }
    for (const e of this.lines) e.line.classList.toggle("lit", lit.has(e.from) && lit.has(e.to));
  }

  /** Bring the first box that holds any of `names` into view. */
  reveal(names) {
    const box = boxesOf(this.top).filter((b) => !b.open && b.leaves.some((l) => names.has(l.name)))[0];
    if (!box) return;
    const at = this.placed.boxes[box.id], size = this.host.getBoundingClientRect();
    const x = at.x * this.scale + this.x, y = at.y * this.scale + this.y;
    if (x > 8 && y > 8 && x + at.w * this.scale < size.width - 8 && y + at.h * this.scale < size.height - 8) return;
    this.x = size.width / 2 - (at.x + at.w / 2) * this.scale;
    this.y = size.height / 2 - (at.y + at.h / 2) * this.scale;
    this._move();
  }

  fit() {
    const size = this.host.getBoundingClientRect();
    if (!this.placed || !size.width) return;
    const wide = (size.width - 32) / this.placed.w, high = (size.height - 32) / this.placed.h;
    this.scale = Math.min(1, wide, Math.max(high, 0.74));
    this.scale = Math.max(this.scale, Math.min(0.3, wide));
    this.x = (size.width - this.placed.w * this.scale) / 2;
    this.y = Math.max(16, (size.height - this.placed.h * this.scale) / 2);
    this.touched = false;
    this._move();
  }

  zoom(factor, cx, cy) {
    const size = this.host.getBoundingClientRect();
    cx = cx === undefined ? size.width / 2 : cx;
    cy = cy === undefined ? size.height / 2 : cy;
    const to = Math.min(3, Math.max(0.04, this.scale * factor));
    this.x = cx - (cx - this.x) * (to / this.scale);
    this.y = cy - (cy - this.y) * (to / this.scale);
    this.scale = to;
    this.touched = true;
    this._move();
  }

  _move() {
    this.view.setAttribute("transform", `translate(${this.x.toFixed(2)} ${this.y.toFixed(2)}) scale(${this.scale.toFixed(4)})`);
  }

  _listen() {
    const el = this.root;
    let from = null;
    el.addEventListener("pointerdown", (event) => {
      from = { x: event.clientX, y: event.clientY, px: this.x, py: this.y };
      this.dragged = false;
    });
    el.addEventListener("pointermove", (event) => {
      if (!from) return;
      const dx = event.clientX - from.x, dy = event.clientY - from.y;
      if (!this.dragged && Math.abs(dx) + Math.abs(dy) < 5) return;
      if (!this.dragged) { el.setPointerCapture(event.pointerId); el.classList.add("dragging"); }
      this.dragged = this.touched = true;
      this.x = from.px + dx;
      this.y = from.py + dy;
      this._move();
    });
    const stop = () => { from = null; el.classList.remove("dragging"); };
    el.addEventListener("pointerup", stop);
    el.addEventListener("pointercancel", stop);
    el.addEventListener("click", () => { if (!this.dragged) this.onPick(null); });
    el.addEventListener("wheel", (event) => {
      event.preventDefault();
      const size = this.host.getBoundingClientRect();
      if (event.ctrlKey || event.metaKey) this.zoom(Math.exp(-event.deltaY * 0.006), event.clientX - size.left, event.clientY - size.top);
      else { this.x -= event.deltaX; this.y -= event.deltaY; this.touched = true; this._move(); }
    }, { passive: false });
  }
}

/** The pane's whole graph as a file: an SVG with its colours in it. */
function svgText(pane) {
  const copy = pane.root.cloneNode(true);
  const w = Math.ceil(pane.placed.w + 32), h = Math.ceil(pane.placed.h + 32);
  copy.setAttribute("xmlns", SVG);
  copy.setAttribute("viewBox", `-16 -16 ${w} ${h}`);
  copy.setAttribute("width", w);
  copy.setAttribute("height", h);
  copy.querySelector("g").removeAttribute("transform");
  copy.insertBefore(document.getElementById("markers").firstElementChild.cloneNode(true), copy.firstChild);
  const style = getComputedStyle(document.documentElement);
  let css = [...document.styleSheets].flatMap((s) => [...s.cssRules]).map((r) => r.cssText).filter((t) => /svg|\.box|\.edge|\.face|\.title|\.sub\b|\.sign|\.dot|\.knob|\.heat|\.back/.test(t) && !t.startsWith("@")).join("\n");
  css = css.replace(/var\((--[\w-]+)\)/g, (_, name) => style.getPropertyValue(name).trim());
  const sheet = svg("style", {}, null, css + "\ntext { font-family: system-ui, sans-serif }");
  copy.insertBefore(sheet, copy.firstChild);
  svg("rect", { x: -16, y: -16, width: w, height: h, fill: style.getPropertyValue("--paper").trim() }, null);
  copy.insertBefore(svg("rect", { x: -16, y: -16, width: w, height: h, fill: style.getPropertyValue("--paper").trim() }), copy.children[2]);
  return new XMLSerializer().serializeToString(copy);
}
