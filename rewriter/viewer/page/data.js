// The data of the page as graphs, differences and maps. Pure functions: nothing here knows the document.
"use strict";

/** Characters that reorder or hide text are shown by their code, so that a hostile name reads as what it is. */
function clean(text) {
  return String(text).replace(/[\u0000-\u001f\u007f-\u009f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]/g,
    (c) => "\\u" + c.charCodeAt(0).toString(16).padStart(4, "0"));
}

/** At most `most` characters, cut in the middle. */
function short(text, most = 34) {
  const plain = clean(text);
  if (plain.length <= most) return plain;
  const head = Math.ceil((most - 1) * 0.6);
  return plain.slice(0, head) + "\u2026" + plain.slice(plain.length - (most - 1 - head));
}

function bytes(count) {
  if (!count) return "0 B";
  const units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
  const power = Math.min(units.length - 1, Math.max(0, Math.floor(Math.log(count) / Math.log(1024))));
  const value = count / 1024 ** power;
  return (power === 0 || value >= 100 ? Math.round(value) : value.toFixed(1)) + " " + units[power];
}

function thousands(count) {
  for (const [size, unit] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e4, "k"]]) {
    if (count >= size) return (count / (unit === "k" ? 1e3 : size)).toFixed(count / size >= 100 ? 0 : 1) + " " + unit;
  }
  return String(Math.round(count)).replace(/\B(?=(\d{3})+$)/g, "\u2009");
}

function duration(seconds) {
  if (seconds >= 1) return seconds.toFixed(2) + " s";
  if (seconds >= 1e-3) return (seconds * 1e3).toFixed(2) + " ms";
  return (seconds * 1e6).toFixed(1) + " \u00b5s";
}

const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;

/** Numbers of the nodes of the graph after `step` passes; 0 is the graph as it was captured. */
function idsAfter(program, step) {
  let ids = program.ids;
  for (const each of program.steps.slice(0, step)) ids = each.ids || ids;
  return ids;
}

/** The nodes that a person looks at: [{name, node, inputs, stored}]; sizes, indexing of tuples and stored tensors are folded
 * into the edges unless `all`. `inputs` are names of nodes that are shown, `stored` nodes of the tensors that are read. */
function graphOf(data, ids, all = false) {
  const byName = new Map(ids.map((i) => [data.nodes[i].name, data.nodes[i]]));
  const hidden = (node) => node.kind === "stored" || (!all && isPlumbing(node));
  const seen = new Map();
  const through = (name) => {
    if (seen.has(name)) return seen.get(name);
    const found = { inputs: [], stored: [] };
    seen.set(name, found);
    const node = byName.get(name);
    if (!node) return found;
    if (!hidden(node)) found.inputs.push(name);
    else if (node.kind === "stored") found.stored.push(node);
    else for (const each of node.inputs || []) {
      const more = through(each);
      found.inputs.push(...more.inputs);
      found.stored.push(...more.stored);
    }
    return found;
  };
  const leaves = [];
  for (const i of ids) {
    const node = data.nodes[i];
    if (hidden(node)) continue;
    const inputs = new Set(), stored = new Set();
    for (const each of node.inputs || []) {
      const found = through(each);
      found.inputs.forEach((n) => inputs.add(n));
      found.stored.forEach((n) => stored.add(n));
    }
    leaves.push({ name: node.name, node, inputs: [...inputs], stored: [...stored] });
  }
  return { leaves, byName };
}

const PLUMBING = new Set(["getitem", "getattr", "sym_size", "sym_numel", "sym_stride", "wait_tensor"]);

/** Nodes that only carry a size, or pick one output of several. */
function isPlumbing(node) {
  return node.kind === "op" && (PLUMBING.has(node.op) || /^(_operator|math|torch\.sym)/.test(node.target || ""));
}

/** What became of each node between two graphs. `before`: name -> "removed" | "replaced" | "rewired"; `after`: name -> "added" |
 * "rewired"; `heirs`: name of a node before -> names after that stand for the same captured nodes; `from`: the way back. */
function difference(data, idsBefore, idsAfter) {
  const before = new Map(idsBefore.map((i) => [data.nodes[i].name, i]));
  const after = new Map(idsAfter.map((i) => [data.nodes[i].name, i]));
  const bySource = new Map(); // captured name -> names after
  for (const [name, i] of after) for (const s of sourcesOf(data.nodes[i])) push(bySource, s, name);
  const result = { before: new Map(), after: new Map(), heirs: new Map(), from: new Map() };
  for (const [name, i] of before) {
    const node = data.nodes[i];
    const heirs = new Set(after.has(name) ? [name] : []);
    if (!after.has(name)) for (const s of sourcesOf(node)) for (const n of bySource.get(s) || []) if (data.nodes[after.get(n)].kind === node.kind) heirs.add(n);
    result.heirs.set(name, [...heirs]);
    for (const heir of heirs) push(result.from, heir, name);
    if (!after.has(name)) result.before.set(name, heirs.size ? "replaced" : "removed");
    else if (after.get(name) !== i) result.before.set(name, "rewired");
  }
  for (const [name, i] of after) {
    if (!before.has(name)) {
      result.after.set(name, "added");
      const { kind } = data.nodes[i];
      for (const s of sourcesOf(data.nodes[i])) if (before.has(s) && data.nodes[before.get(s)].kind === kind && !(result.from.get(name) || []).includes(s)) {
        push(result.from, name, s);
        push(result.heirs, s, name);
      }
    } else if (before.get(name) !== i) result.after.set(name, "rewired");
  }
  return result;
}

const sourcesOf = (node) => (node.sources && node.sources.length ? node.sources : [node.name]);

function push(map, key, value) {
  if (map.has(key)) map.get(key).push(value);
  else map.set(key, [value]);
}

/** How many marks of each kind a set of names has. */
function countMarks(names, marks) {
  const found = { added: 0, removed: 0, replaced: 0, rewired: 0 };
  for (const name of names) if (marks.has(name)) found[marks.get(name)]++;
  return found;
}

const SIGNS = { added: "+", removed: "\u2212", replaced: "~", rewired: "\u00b7" };

/** The records of a whole program, each with its step. A later step's word on the same thing comes after. */
function recordsOf(program, step) {
  const steps = step === 0 ? program.steps.map((s, i) => [s, i + 1]) : [[program.steps[step - 1], step]];
  return steps.flatMap(([s, i]) => (s.records || []).map((r) => ({ ...r, step: i })));
}

/** Is the node at `path` or inside the module of that path? */
const inside = (node, path) => path === "" || node.module === path || (node.module || "").startsWith(path + ".");

/** A query such as `op:embedding shape:[*,64] user` as a test of nodes. All words must hold. */
function query(text) {
  const words = text.toLowerCase().match(/\S+/g) || [];
  const tests = words.map((word) => {
    const [, key, rest] = /^(op|shape|file|module|by):(.*)$/.exec(word) || [];
    if (key === "op") return (n) => (n.op || "").toLowerCase().includes(rest);
    if (key === "file") return (n, place) => place.toLowerCase().includes(rest);
    if (key === "module") return (n) => (n.module || "").toLowerCase().includes(rest);
    if (key === "by") return (n) => (n.made_by || "").toLowerCase().includes(rest);
    if (key === "shape") {
      const wanted = rest.replace(/[[\]]/g, "").split(",");
      return (n) => (n.value || "").split(/\(|\), |; | x /).some((v) => (v.match(/\[[^\]]*\]/g) || []).some((shape) => {
        const sizes = shape.slice(1, -1).split(", ");
        return sizes.length === wanted.length && wanted.every((w, i) => w === "*" || w === sizes[i]);
      }));
    }
    return (n, place) => [n.name, n.target, n.op, n.module, n.value, place].some((v) => (v || "").toLowerCase().includes(word));
  });
  return words.length ? (node, place) => tests.every((t) => t(node, place || "")) : () => false;
}

/** Names within `hops` edges of `name` in a graph of leaves. */
function neighbours(leaves, name, hops = 2) {
  const near = new Map();
  for (const leaf of leaves) for (const i of leaf.inputs) {
    push(near, leaf.name, i);
    push(near, i, leaf.name);
  }
  let found = new Set([name]);
  for (let hop = 0; hop < hops; hop++) found = new Set([...found, ...[...found].flatMap((n) => near.get(n) || [])]);
  return found;
}

const METRICS = {
  bytes: { label: "bytes moved, forward", of: (n) => (n.read || 0) + (n.written || 0), text: bytes },
  back: { label: "bytes moved, backward", of: (n) => n.back_bytes || 0, text: bytes },
  flops: { label: "FLOPs, forward and backward", of: (n) => (n.flops || 0) + (n.back_flops || 0), text: thousands },
  wire: { label: "bytes on the wire", of: (n) => n.wire || 0, text: bytes },
  predicted: { label: "predicted time", of: (n) => n.predicted || 0, text: duration },
  seconds: { label: "measured time", of: (n) => n.seconds || 0, text: duration },
  memory: { label: "parameter memory", of: (n, leaf) => (leaf ? leaf.stored.reduce((sum, s) => sum + (s.memory || 0), 0) : n.memory || 0), text: bytes },
};

if (typeof module !== "undefined") {
  module.exports = { clean, short, bytes, thousands, duration, plural, idsAfter, graphOf, isPlumbing, difference, countMarks, recordsOf, inside, query, neighbours, METRICS, SIGNS, push, sourcesOf };
}
