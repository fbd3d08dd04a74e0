// From a graph to the boxes that are shown: the tree of modules, equal siblings stacked, large groups paged. Pure functions.
"use strict";

const PAGE = 120; // the most boxes laid out in one group
const STACK = 3; // equal siblings from this number on are one card

/** The tree of groups by module path. A group: {id, path, title, kids: [group | leaf box], leaves: [leaf]}. */
function moduleTree(leaves) {
  const root = { id: "g:", kind: "group", path: "", kids: [], leaves: [] };
  const groups = new Map([["", root]]);
  const groupAt = (path) => {
    if (groups.has(path)) return groups.get(path);
    const cut = path.lastIndexOf(".");
    const parent = groupAt(cut < 0 ? "" : path.slice(0, cut));
    const made = { id: "g:" + path, kind: "group", path, kids: [], leaves: [] };
    groups.set(path, made);
    parent.kids.push(made);
    return made;
  };
  leaves.forEach((leaf, at) => {
    leaf.at = at;
    const path = leaf.node.module || "";
    groupAt(path).kids.push({ id: "n:" + leaf.name, kind: "leaf", path, leaf, leaves: [leaf], kids: [] });
    for (let p = path; ; p = p.slice(0, Math.max(0, p.lastIndexOf(".")))) {
      groupAt(p).leaves.push(leaf);
      if (p === "") break;
    }
  });
  return root;
}

/** The boxes that stand for the graph: [{id, kind, title, kids?, open?, leaves, members?}] nested as they are drawn.
 * `open`: ids that are open (true) or closed (false) by hand; others open by themselves up to `budget` boxes, first those in which
 * something changed (`marks`). */
function present(root, types, open, budget = 42, marks = new Map()) {
  const by = new Map();
  const index = (box) => { for (const leaf of box.leaves) by.set(leaf.name, leaf); };
  index(root);
  const top = { ...root, open: true, boxes: inGroup(root, by, types) };
  let count = top.boxes.length;
  const known = new Map(); // id of a box -> whether something in it changed
  const changed = (box) => {
    if (!known.has(box.id)) known.set(box.id, box.leaves.some((l) => marks.has(l.name) && marks.get(l.name) !== "rewired"));
    return known.get(box.id);
  };
  const queue = [...top.boxes];
  while (queue.length) {
    const box = queue.splice(Math.max(0, queue.findIndex(changed)), 1)[0];
    if (!box.kids.length) continue;
    const wanted = open.get(box.id);
    if (wanted === false) continue;
    const boxes = inGroup(box, by, types);
    const fits = box.kind === "group" && count + boxes.length <= budget && boxes.length <= 24;
    if (wanted !== true && !fits) continue;
    box.open = true;
    box.boxes = boxes;
    count += boxes.length;
    queue.push(...boxes);
  }
  return top;
}

/** The boxes directly in a group, stack or page. */
function inGroup(group, by, types) {
  let kids = group.kind === "group" ? convex(group.kids).map((kid) => unwrap(kid, by)) : group.kids.map((kid) => unwrap(kid, by));
  if (group.kind === "group") kids = stacked(kids, by, group.id);
  if (kids.length > PAGE) {
    const size = Math.max(24, Math.min(PAGE - 20, Math.ceil(kids.length / Math.ceil(kids.length / (PAGE - 20)))));
    const pages = [];
    for (let i = 0; i < kids.length; i += size) {
      const part = kids.slice(i, i + size);
      pages.push({ id: `p:${group.id}:${i}`, kind: "page", path: group.path, kids: part, leaves: part.flatMap((k) => k.leaves), first: i + 1, last: i + part.length });
    }
    kids = pages;
  }
  return kids.map((box) => ({ ...box, ...titles(box, types) }));
}

/** A group that is left and entered again (layers in a list, with other work between them) cannot be drawn as one box without turning
 * the graph in circles: its members stand in its place, all in the order in which they run. */
function convex(kids) {
  for (;;) {
    const { next } = around(kids);
    const split = new Set(kids.filter((kid, i) => kid.kind === "group" && leads([i], next)));
    if (!split.size) return kids;
    kids = kids.flatMap((kid) => (split.has(kid) ? kid.kids : [kid])).sort((a, b) => a.leaves[0].at - b.leaves[0].at);
  }
}

/** Which of `kids` read which: {from: [Set of indices, -1 for outside], next: [Set of indices]}. */
function around(kids) {
  const home = new Map();
  kids.forEach((kid, i) => kid.leaves.forEach((leaf) => home.set(leaf.name, i)));
  const from = kids.map(() => new Set()), next = kids.map(() => new Set());
  kids.forEach((kid, i) => kid.leaves.forEach((leaf) => leaf.inputs.forEach((name) => {
    const source = home.get(name);
    if (source === i) return;
    from[i].add(source === undefined ? -1 : source);
    if (source !== undefined) next[source].add(i);
  })));
  return { from, next };
}

/** A group with one thing in it, or one stack, is shown as that. */
function unwrap(kid, by) {
  while (kid.kind === "group") {
    const inner = kid.kids.length < STACK ? kid.kids : stacked(kid.kids.map((k) => unwrap(k, by)), by, kid.id);
    if (inner.length !== 1) break;
    kid = inner[0];
  }
  return kid;
}

/** Equal siblings, none of which leads to another, as one stack; the others as they are, in their order. */
function stacked(kids, by, parent) {
  if (kids.length < STACK) return kids;
  const { from, next } = around(kids);
  const shape = kids.map(shapeOf);
  const shapesOf = (set) => [...new Set([...set].map((i) => (i < 0 ? "outside" : shape[i])))].sort().join("|");
  const classes = new Map();
  kids.forEach((kid, i) => {
    if (kid.kind === "leaf" && kid.leaf.node.kind === "output") return;
    push(classes, [shape[i], shapesOf(from[i]), shapesOf(next[i])].join("#"), i);
  });
  const stackOf = new Map();
  for (const members of classes.values()) {
    if (members.length < STACK || leads(members, next)) continue;
    const inside = members.map((i) => kids[i]);
    const stack = { id: `s:${parent}:${inside[0].id}`, kind: "stack", path: common(inside.map((k) => k.path)), kids: inside, leaves: inside.flatMap((k) => k.leaves) };
    members.forEach((i) => stackOf.set(i, stack));
  }
  const made = [];
  kids.forEach((kid, i) => {
    const stack = stackOf.get(i);
    if (!stack) made.push(kid);
    else if (stack.kids[0] === kid) made.push(stack);
  });
  return made;
}

const shapeOf = (kid) => kid.leaves.map((l) => `${l.node.kind} ${l.node.op} ${l.node.value || ""} ${l.stored.length}`).join(";").replace(/^input \S+/, "input");

/** Does a path lead from one of `members` to another? */
function leads(members, next) {
  const goal = new Set(members), seen = new Set(), stack = [...new Set(members.flatMap((m) => [...next[m]]))];
  while (stack.length) {
    const i = stack.pop();
    if (goal.has(i)) return true;
    if (seen.has(i)) continue;
    seen.add(i);
    stack.push(...next[i]);
  }
  return false;
}

function common(paths) {
  const parts = paths.map((p) => p.split("."));
  const same = [];
  for (let i = 0; i < parts[0].length && parts.every((p) => p[i] === parts[0][i]); i++) same.push(parts[0][i]);
  return same.join(".");
}

const COLLECTIVE = /all_to_all|all_gather|all_reduce|reduce_scatter|broadcast|^(exchange_ids|send_rows)$/;
const GATHER = /^distributed_gather/;

/** The words on a box: {title, sub, role}. */
function titles(box, types) {
  const tables = box.leaves.flatMap((l) => l.stored.filter((s) => s.memory));
  const memory = [...new Set(tables.map((t) => t.target))].reduce((sum, t) => sum + tables.find((s) => s.target === t).memory, 0);
  const held = memory ? bytes(memory) : "";
  if (box.kind === "leaf") {
    const node = box.leaf.node;
    if (node.kind === "input") return { title: short(node.name), sub: short(node.value || "input", 26), role: "input" };
    if (node.kind === "output") return { title: "output", sub: "", role: "output" };
    const role = COLLECTIVE.test(node.op) ? "collective" : GATHER.test(node.op) ? "gather" : (node.target || "").startsWith("tablewright.") ? "ours" : "op";
    const where = (box.path && types.get(box.path)) ? short(lastOf(box.path), 20) : "";
    const value = role === "collective" && node.wire ? bytes(node.wire) : held || short(node.value || "", 26);
    return { title: short(node.op.replaceAll("_", " ")), sub: [where, value].filter(Boolean).join(" \u00b7 "), role };
  }
  if (box.kind === "page") {
    const paths = box.leaves.map((l) => l.node.module || "").filter((p) => p !== box.path);
    return { title: `${box.first}\u2013${box.last}`, sub: [plural(box.leaves.length, "op"), paths.length ? short(`${paths[0]} \u2026 ${paths.at(-1)}`, 34) : ""].filter(Boolean).join(" \u00b7 "), role: "page" };
  }
  if (box.kind === "stack") {
    const first = box.kids[0];
    const named = first.kind === "leaf" ? (types.get(first.path) && first.leaf.node.made_by === "capture" && first.path !== box.path ? types.get(first.path) : titles(first, types).title) : types.get(first.path) || lastOf(first.path);
    const range = box.kids.every((k) => k.path && k.path !== box.path) ? short(`${first.path} \u2026 ${lastOf(box.kids.at(-1).path)}`, 30) : "";
    return { title: `${short(named, 28)} \u00d7 ${box.kids.length}`, sub: [range, held].filter(Boolean).join(" \u00b7 "), role: first.kind === "leaf" && GATHER.test(first.leaf.node.op) ? "stack gather" : "stack" };
  }
  const type = types.get(box.path) || "";
  return { title: short(lastOf(box.path) || "model"), sub: [short(type, 24), held || plural(box.leaves.length, "op")].filter(Boolean).join(" \u00b7 "), role: "group" };
}

const lastOf = (path) => path.slice(path.lastIndexOf(".") + 1);

/** Edges between the boxes that are drawn, each in the innermost open box that holds both ends: Map(id -> [{from, to, count}]). */
function edgesOf(top) {
  const chain = new Map(); // leaf name -> boxes around it, outermost first
  const walk = (box, above) => {
    if (box.open) for (const kid of box.boxes) walk(kid, [...above, box]);
    else for (const leaf of box.leaves) chain.set(leaf.name, [...above, box]);
  };
  walk(top, []);
  const found = new Map();
  for (const leaf of top.leaves) {
    const to = chain.get(leaf.name);
    for (const name of leaf.inputs) {
      const from = chain.get(name);
      if (!from || !to) continue;
      let i = 0;
      while (i < from.length && i < to.length && from[i].id === to[i].id) i++;
      if (i >= from.length || i >= to.length) continue;
      const key = from[i].id + "\u0000" + to[i].id;
      const home = found.get(from[i - 1].id) || new Map();
      found.set(from[i - 1].id, home);
      const edge = home.get(key) || { from: from[i].id, to: to[i].id, count: 0 };
      edge.count++;
      home.set(key, edge);
    }
  }
  return new Map([...found].map(([id, edges]) => [id, [...edges.values()]]));
}

/** Every box that is drawn, outermost first. */
function boxesOf(top) {
  const found = [];
  const walk = (box) => {
    for (const kid of box.boxes || []) {
      found.push(kid);
      if (kid.open) walk(kid);
    }
  };
  walk(top);
  return found;
}

if (typeof module !== "undefined") {
  Object.assign(globalThis, require("./data.js"));
  module.exports = { moduleTree, present, convex, edgesOf, boxesOf, stacked, PAGE, STACK };
}
