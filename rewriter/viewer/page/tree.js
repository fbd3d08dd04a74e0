// The tree of the plain model's modules on the left: equal siblings are one row, dots say what was rewritten.
"use strict";

/** Modules as a tree: [{path, type, kids, same: [path]}]; equal neighbours (class, note and kids) from STACK on are one entry. */
function moduleRows(modules) {
  const made = new Map(modules.map((m) => [m.path, { ...m, kids: [], same: [m.path] }]));
  for (const m of modules) {
    if (m.path === "") continue;
    const cut = m.path.lastIndexOf(".");
    (made.get(cut < 0 ? "" : m.path.slice(0, cut)) || made.get("")).kids.push(made.get(m.path));
  }
  const signs = new Map();
  const sign = (m) => {
    if (!signs.has(m)) signs.set(m, `${m.type}(${m.kids.map(sign).join(",")})${m.kids.length || /^(Embedding|EmbeddingBag)$/.test(m.type) ? "" : m.note}`);
    return signs.get(m);
  };
  const fold = (m) => {
    const groups = new Map();
    m.kids.forEach((k) => push(groups, sign(k), k));
    const seen = new Set();
    m.rows = m.kids.flatMap((k) => {
      const group = groups.get(sign(k));
      if (group.length < STACK || !group.every((g) => g.kids.length === group[0].kids.length)) return [k];
      if (seen.has(group)) return [];
      seen.add(group);
      return [{ ...k, stack: true, same: group.map((g) => g.path), memory: group.reduce((s, g) => s + g.memory, 0), members: group }];
    });
    m.kids.forEach(fold);
  };
  const root = made.get("") || { path: "", type: "", kids: [], same: [""] };
  fold(root);
  return root;
}

function showTree(host, root) {
  const records = recordsOf(app.program, 0);
  const byPath = new Map();
  for (const r of records) for (let p = r.subject || ""; ; p = p.slice(0, Math.max(0, p.lastIndexOf(".")))) {
    const found = byPath.get(p) || { done: 0, left: 0 };
    r.status === "APPLIED" ? found.done++ : found.left++;
    byPath.set(p, found);
    if (p === "") break;
  }
  const chosen = app.state.choice && app.state.choice.module;
  const list = (rows, depth) => el("ul", { role: depth ? "group" : "tree" }, rows.slice(0, 400).map((m) => {
    const path = m.path, count = m.same.length;
    const marks = m.same.reduce((s, p) => ({ done: s.done + (byPath.get(p)?.done || 0), left: s.left + (byPath.get(p)?.left || 0) }), { done: 0, left: 0 });
    const inner = m.stack ? m.members.map((k) => ({ ...k, rows: k.rows || [] })) : m.rows || [];
    const key = (m.stack ? "s:" : "m:") + path;
    const open = app.treeOpen.has(key) ? app.treeOpen.get(key) : !m.stack && depth < 1 && inner.length < 30;
    const name = path === "" ? app.data.title : lastOf(path);
    const row = el("div.row", { role: "treeitem", tabindex: 0, "aria-selected": chosen === path, "aria-expanded": inner.length ? open : undefined, title: clean(path),
      onclick: () => app.choose({ module: path }),
      onkeydown: (e) => { if (e.key === "Enter" || e.key === " ") { e.preventDefault(); e.stopPropagation(); app.choose({ module: path }); } else if (inner.length && (e.key === "o")) { e.stopPropagation(); toggle(); } } },
    el("span.twist", { onclick: (e) => { e.stopPropagation(); toggle(); } }, inner.length ? (open ? "\u25be" : "\u25b8") : ""),
    el("span.name", count > 1 ? `${short(name, 14)} \u2026 ${short(lastOf(m.same.at(-1)), 10)}` : short(name, 24)), el("span.type", count > 1 ? `${m.type} \u00d7 ${count}` : m.type),
    el("span.dots", marks.done ? el("i.done", { title: `${marks.done} rewritten` }) : null, marks.left ? el("i.left", { title: `${marks.left} left as they were` }) : null));
    const toggle = () => { app.treeOpen.set(key, !open); showTree(host, root); };
    return el("li", { role: "none" }, row, open && inner.length ? list(inner, depth + 1) : null);
  }), rows.length > 400 ? el("li.faint", `and ${rows.length - 400} more`) : null);
  host.replaceChildren(list([root], 0));
}
