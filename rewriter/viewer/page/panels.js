// The panel on the right and the pages beside the graph: overview, one node, one module, "Why not?", tables, ranks.
"use strict";

/** An element: el("p.soft", {title: "x"}, child, "text", ...). Text is always text. */
function el(tag, ...rest) {
  const [name, ...classes] = tag.split(".");
  const made = document.createElement(name);
  if (classes.length) made.className = classes.join(" ");
  for (const each of rest.flat(3)) {
    if (each === null || each === undefined || each === false || each === "") continue;
    if (each instanceof Node) made.appendChild(each);
    else if (typeof each === "object") for (const key in each) key.startsWith("on") ? made.addEventListener(key.slice(2), each[key]) : each[key] !== undefined && made.setAttribute(key, each[key]);
    else made.append(clean(each));
  }
  return made;
}

const pair = (name, ...value) => (value.every((v) => v === "" || v === null || v === undefined) ? [] : [el("dt", name), el("dd", ...value)]);

function copyButton(text) {
  return el("button", { title: "Copy", "aria-label": "Copy", onclick: () => navigator.clipboard && navigator.clipboard.writeText(text) }, "\u29c9");
}

function codeOf(place) {
  if (!place) return [];
  if (!place.lines) return [el("p.mono", place.text)];
  const pre = el("pre");
  place.lines.forEach((line, i) => {
    const no = place.first + i;
    pre.append(el(no === place.line ? "span.here" : "span", el("span.no", String(no)), line || " "), "\n");
  });
  return [el("p.faint.mono", place.file), pre];
}

/** Buttons that choose nodes; at most `most` are listed. */
function nodeLinks(names, side, most = 40) {
  const row = el("div.links", names.slice(0, most).map((n) => el("button", { title: clean(n), onclick: () => app.choose({ side, name: n }) }, short(n, 40))));
  if (names.length > most) row.append(el("span.faint", `and ${names.length - most} more`));
  return row;
}

// --- the panel on the right -------------------------------------------------------------------------------------------------

function showDetails(host) {
  const { choice } = app.state;
  const parts = !choice ? overview() : choice.rank !== undefined ? aboutRank(choice.rank) : choice.module !== undefined ? aboutModule(choice.module) : choice.names ? aboutBox(choice) : aboutNode(choice);
  host.replaceChildren(...parts.flat(4).filter(Boolean));
  host.scrollTop = 0;
}

function totals(ids) {
  const sum = { ops: 0, bytes: 0, back: 0, flops: 0, seconds: 0, predicted: 0, wire: 0, unknown: 0 };
  for (const i of ids) {
    const n = app.data.nodes[i];
    if (n.kind !== "op" || isPlumbing(n)) continue;
    sum.ops++;
    sum.bytes += (n.read || 0) + (n.written || 0);
    sum.back += n.back_bytes || 0;
    sum.flops += (n.flops || 0) + (n.back_flops || 0);
    sum.seconds += n.seconds || 0;
    sum.predicted += n.predicted || 0;
    sum.wire += n.wire || 0;
    sum.unknown += n.unknown ? 1 : 0;
  }
  return sum;
}

function overview() {
  const { program, step } = app;
  const [a, b] = [totals(app.ids.before), totals(app.ids.after)];
  const chosen = step ? program.steps[step - 1] : null;
  const rows = [["operations", "ops", thousands], ["bytes moved, forward", "bytes", bytes], ["bytes moved, backward", "back", bytes], ["FLOPs", "flops", thousands], ["bytes on the wire", "wire", bytes], ["predicted time", "predicted", duration], ["measured time", "seconds", duration]]
    .filter(([, key]) => a[key] || b[key]);
  const made = chosen ? [chosen] : program.steps.filter((s) => s.made || (s.ids && s.records));
  const left = recordsOf(program, step).filter((r) => r.status !== "APPLIED");
  return [
    el("h2", chosen ? chosen.name.replaceAll("_", " ") : "What the compiler did"),
    chosen ? el("p.soft", stepWords(chosen)) : el("p.soft", `${plural(a.ops, "operation")} of the plain model became ${b.ops}.`),
    made.map((s) => el("div.step",
      el("b", chosen ? "" : s.name.replaceAll("_", " ")), chosen ? "" : el("button.link", { onclick: () => app.go(app.program.steps.indexOf(s) + 1) }, "show"),
      [...new Set((s.records || []).filter((r) => r.status === "APPLIED").map((r) => r.detail || r.kind))].slice(0, 4).map((d) => el("p", d)),
      el("p.soft", deltaWords(s)))),
    !made.length && el("p", "No pass changed this graph."),
    el("h3", "Before and after"),
    el("table", el("tbody", rows.map(([label, key, text]) => el("tr", el("td", label), el("td.num", a[key] ? text(a[key]) : "\u2013"), el("td.num", b[key] ? text(b[key]) : "\u2013"))))),
    a.unknown || b.unknown ? el("p.faint", `Estimates from shapes; not known for ${plural(Math.max(a.unknown, b.unknown), "operation")}.`) : el("p.faint", `Estimates from shapes, at the sample's batch${app.data.rates ? `; times at ${bytes(app.data.rates.memory)}/s and ${thousands(app.data.rates.flops)} FLOP/s` : ""}.`),
    left.length ? [el("h3", "Not rewritten"), el("p", `${left.length} ${left.length === 1 ? "thing was" : "things were"} found and left as in the plain model. `, el("button.link", { onclick: () => app.tab("why") }, "Why not?"))] : null,
    app.data.notes.length ? [el("h3", "Notes"), app.data.notes.map((n) => el("p", n))] : null,
    el("h3", "Captured by"), el("p", app.data.door || "nothing", program.title ? ` (${program.title})` : ""),
  ];
}

function stepWords(s) {
  if (s.status === "DISABLED") return "Turned off by the plan.";
  if (s.status === "REJECTED") return "Its check failed, so it was rolled back.";
  const found = (s.records || []).length;
  const took = `${s.ms.toFixed(1)} ms and ${s.check_ms.toFixed(1)} ms of checks`;
  return s.made ? `${plural(s.made, "rewrite")}, ${took}.` : found ? `Found ${found}, rewrote none (${took}).` : `Found nothing to do (${took}).`;
}

function deltaWords(s) {
  return Object.entries(s.delta || {}).filter(([op]) => !PLUMBING.has(op)).map(([op, d]) => `${d > 0 ? "+" : "\u2212"}${Math.abs(d)} ${op}`).join(", ");
}

function recordList(records) {
  return records.map((r) => el("p", el(`span.badge.${r.status}`, r.status.toLowerCase()), " ", el("b", r.rule.replaceAll("_", " ")), ": ", r.reason || r.detail || "rewritten", r.subject ? el("span.faint", ` ${r.subject}`) : ""));
}

function aboutNode({ side, name }) {
  const graph = app.graphs[side];
  const node = graph.byName.get(name);
  if (!node) return [el("h2", name), el("p", "This node is not in the graph of this step.")];
  const leaf = graph.leaves.find((l) => l.name === name) || { inputs: node.inputs || [], stored: [] };
  const users = graph.leaves.filter((l) => l.inputs.includes(name)).map((l) => l.name);
  const other = side === "before" ? "after" : "before";
  const related = (side === "before" ? app.diff.heirs : app.diff.from).get(name) || [];
  const mark = (side === "before" ? app.diff.before : app.diff.after).get(name);
  const type = app.types.get(node.module || "");
  const records = recordsOf(app.program, 0).filter((r) => (r.nodes || []).includes(name) || ((r.nodes || []).some((n) => (node.sources || []).includes(n)) && (r.rule === node.made_by || side === "before")) || (r.subject && r.subject === node.module));
  const costs = [["reads", node.read, bytes], ["writes", node.written, bytes], ["backward moves", node.back_bytes, bytes], ["FLOPs", node.flops, thousands], ["backward FLOPs", node.back_flops, thousands], ["on the wire", node.wire, bytes], ["predicted", node.predicted, duration], ["measured", node.seconds, duration]];
  return [
    el("h2", node.op), el("p.soft", mark ? `${SIGNS[mark]} ${mark} ` : "unchanged ", node.made_by && node.made_by !== "capture" ? `by ${node.made_by.replaceAll("_", " ")}` : ""),
    el("dl", pair("name", el("span.mono", short(name, 60)), copyButton(name)), pair("target", el("span.mono", node.target), copyButton(node.target || "")), pair("result", el("span.mono", node.value || (node.unknown ? "not known without sample_inputs" : ""))),
      pair("module", node.module !== undefined && el("button.link", { onclick: () => app.choose({ module: node.module }) }, `${short(node.module, 40)}${type ? " \u00b7 " + type : ""}`)),
      costs.filter((c) => c[1]).map(([label, value, text]) => pair(label, text(value))), node.unknown ? pair("cost", "not known: a shape depends on the data") : []),
    leaf.stored.length ? [el("h3", leaf.stored.some((s) => s.memory) ? "Parameters and buffers" : "Flags"), storedTable(leaf.stored)] : null,
    related.length && !(related.length === 1 && related[0] === name && !mark) ? [el("h3", side === "before" ? "Became" : "Comes from"), nodeLinks(related, other)] : side === "before" && mark === "removed" ? el("p", "Nothing stands for it any more: its work is not needed.") : null,
    records.length ? [el("h3", "What the passes say"), recordList(records)] : null,
    el("h3", "In the user's code"), codeOf(app.data.places[node.place]).length ? codeOf(app.data.places[node.place]) : el("p.faint", "no line of the user's is known"),
    leaf.inputs.length ? [el("h3", "Reads"), nodeLinks(leaf.inputs, side)] : null,
    users.length ? [el("h3", "Read by"), nodeLinks(users, side)] : null,
    node.args ? [el("h3", "Arguments"), el("pre", node.args)] : null,
  ];
}

function storedTable(stored) {
  const rows = [...new Map(stored.map((s) => [s.target, s])).values()];
  return el("table", el("tbody", rows.slice(0, 200).map((s) => el("tr", el("td.mono", short(s.target, 38)), el("td", s.value || s.stored), el("td.num", s.memory ? bytes(s.memory) : "")))), rows.length > 200 && el("caption", `and ${rows.length - 200} more`));
}

function aboutBox({ side, names, title }) {
  const graph = app.graphs[side];
  const leaves = graph.leaves.filter((l) => names.has(l.name));
  const stored = leaves.flatMap((l) => l.stored.filter((s) => s.memory));
  const ops = new Map();
  for (const l of leaves) ops.set(l.node.op, (ops.get(l.node.op) || 0) + 1);
  const marks = countMarks(names, side === "before" ? app.diff.before : app.diff.after);
  const related = [...new Set(leaves.flatMap((l) => (side === "before" ? app.diff.heirs : app.diff.from).get(l.name) || []))].filter((n) => app.graphs[side === "before" ? "after" : "before"].byName.get(n)?.kind === "op");
  const sum = (of) => leaves.reduce((s, l) => s + (of(l.node) || 0), 0);
  return [
    el("h2", title), el("p.soft", Object.entries(marks).filter(([, n]) => n).map(([k, n]) => `${SIGNS[k]} ${n} ${k}`).join("  ")),
    el("dl", pair("operations", String(leaves.length)), pair("bytes moved", bytes(sum((n) => (n.read || 0) + (n.written || 0)))), pair("FLOPs", thousands(sum((n) => n.flops))), sum((n) => n.seconds) ? pair("measured", duration(sum((n) => n.seconds))) : []),
    el("h3", "Operations"), el("p", [...ops].sort((a, b) => b[1] - a[1]).map(([op, n]) => `${n} ${op}`).join(", ")),
    stored.length ? [el("h3", "Parameters and buffers"), storedTable(stored)] : null,
    related.length ? [el("h3", side === "before" ? "Became" : "Comes from"), nodeLinks(related, side === "before" ? "after" : "before")] : null,
    el("h3", "Nodes"), nodeLinks(leaves.map((l) => l.name), side),
  ];
}

function aboutModule(path) {
  const found = app.data.modules.find((m) => m.path === path) || { path, type: "" };
  const before = app.graphs.before.leaves.filter((l) => inside(l.node, path)).map((l) => l.name);
  const after = [...new Set(before.flatMap((n) => app.diff.heirs.get(n) || []))].filter((n) => app.graphs.after.leaves.some((l) => l.name === n));
  const records = recordsOf(app.program, 0).filter((r) => path === "" || r.subject === path || (r.subject || "").startsWith(path + "."));
  const memory = app.data.modules.filter((m) => path === "" || m.path === path || m.path.startsWith(path + ".")).reduce((s, m) => s + m.memory, 0);
  const place = before.map((n) => app.graphs.before.byName.get(n).place).find((p) => p !== undefined);
  return [
    el("h2", path || app.data.title), el("p.soft", found.type, found.note ? `(${found.note})` : ""),
    el("dl", pair("parameters", memory ? bytes(memory) : "none"), pair("operations", `${before.length}, after: ${after.length}`)),
    records.length ? [el("h3", "What happened to it"), recordList(records.slice(0, 60)), records.length > 60 && el("p.faint", `and ${records.length - 60} more: see "Why not?"`)] : el("p", before.length ? "No rewrite looks at what this module does; it runs as in the plain model." : "No node of this graph comes from it."),
    after.length ? [el("h3", "Became"), nodeLinks(after, "after")] : null,
    place !== undefined ? [el("h3", "In the user's code"), codeOf(app.data.places[place])] : null,
  ];
}

// --- pages beside the graph -------------------------------------------------------------------------------------------------

function sortable(columns, rows, key, onRow) {
  const state = app.sorts[key] || (app.sorts[key] = { by: 0, up: true });
  const sorted = [...rows].sort((a, b) => {
    const [x, y] = [columns[state.by].value(a), columns[state.by].value(b)];
    const order = typeof x === "number" ? x - y : String(x).localeCompare(String(y), undefined, { numeric: true });
    return state.up ? order : -order;
  });
  const head = columns.map((c, i) => el(c.num ? "th.num" : "th", { "aria-sort": state.by === i ? (state.up ? "ascending" : "descending") : "none" },
    el("button", { onclick: () => { state.up = state.by === i ? !state.up : true; state.by = i; app.render(); } }, c.name, state.by === i ? (state.up ? " \u2191" : " \u2193") : "")));
  const body = sorted.slice(0, 2000).map((r) => el("tr.go", { tabindex: 0, onclick: () => onRow(r), onkeydown: (e) => e.key === "Enter" && onRow(r) }, columns.map((c) => el(c.num ? "td.num" : "td", c.show ? c.show(r) : String(c.value(r))))));
  return [el("table", el("thead", el("tr", head)), el("tbody", body)), sorted.length > 2000 && el("p.faint", `and ${sorted.length - 2000} more rows: filter by rule, or use report.table()`)];
}

function whyPage() {
  const all = recordsOf(app.program, app.step);
  const wanted = app.state.applied ? all : all.filter((r) => r.status !== "APPLIED");
  const rules = [...new Set(wanted.map((r) => r.rule))];
  const rows = wanted.filter((r) => !app.state.rule || r.rule === app.state.rule);
  const reasons = new Map();
  for (const r of rows) if (r.status !== "APPLIED") reasons.set(r.reason || r.status, (reasons.get(r.reason || r.status) || 0) + 1);
  const pick = el("select", { "aria-label": "Rule", onchange: (e) => { app.state.rule = e.target.value; app.render(); } }, el("option", { value: "" }, "every rule"), rules.map((r) => el("option", { value: r, selected: r === app.state.rule ? "" : undefined }, r)));
  const too = el("label.soft", el("input", { type: "checkbox", checked: app.state.applied ? "" : undefined, onchange: (e) => { app.state.applied = e.target.checked; app.render(); } }), " also what was rewritten");
  const columns = [
    { name: "what", value: (r) => r.subject || "the model" }, { name: "status", value: (r) => r.status, show: (r) => el(`span.badge.${r.status}`, r.status.toLowerCase()) }, { name: "rule", value: (r) => r.rule },
    { name: "why / how", value: (r) => r.reason || r.detail || "" }, { name: "where", value: (r) => r.location || "", show: (r) => el("span.mono", r.location || "") },
  ];
  return el("div.page", el("p", pick, " ", too),
    reasons.size ? el("p.soft", [...reasons].sort((a, b) => b[1] - a[1]).slice(0, 8).map(([why, n]) => el("span", el("b", `${n} \u00d7 `), short(why, 120), el("br")))) : el("p.soft", wanted.length ? "" : "Everything that was found was rewritten."),
    rows.length ? sortable(columns, rows, "why", (r) => app.chooseRecord(r)) : "");
}

function tablesPage() {
  const rows = app.data.tables;
  const most = Math.max(1, ...rows.map((t) => t.memory));
  const total = rows.reduce((s, t) => s + t.memory, 0);
  const columns = [
    { name: "table", value: (t) => t.name, show: (t) => el("span.mono", short(t.name, 60)) }, { name: "rows", num: true, value: (t) => t.rows, show: (t) => thousands(t.rows) }, { name: "dim", num: true, value: (t) => t.dim }, { name: "dtype", value: (t) => t.dtype },
    { name: "memory", num: true, value: (t) => t.memory, show: (t) => bytes(t.memory) }, { name: "", value: (t) => t.memory, show: (t) => meter(t.memory / most) }, { name: "gradient", value: (t) => t.grad }, { name: "place", value: (t) => t.place || t.device },
  ];
  return el("div.page", el("p.soft", `${plural(rows.length, "table")}, ${bytes(total)}.`), sortable(columns, rows, "tables", (t) => app.choose({ module: t.name.slice(0, Math.max(0, t.name.lastIndexOf("."))) })));
}

function meter(share) {
  const bar = el("i");
  bar.style.width = `${Math.max(0.5, share * 100)}%`;
  return el("div.meter", { role: "img", "aria-label": `${Math.round(share * 100)} %` }, bar);
}
