// Places boxes: one dagre layout for each open group, inner ones first. Runs in a worker, or in the page where none can start.
"use strict";

const HEAD = 24, PAD = 10; // of an open group: its title line, and the space around its content

/** `box`: {id, w, h, open, boxes}; `edges`: {id of an open box: [{from, to}]}. Returns {boxes: {id: {x, y, w, h}}, edges: [{from, to,
 * points}], w, h} with x, y the upper left corners. */
function place(box, edges, lay = dagre) {
  const spots = {}, lines = [];
  const size = (b) => {
    if (!b.open) return { w: b.w, h: b.h };
    const graph = new lay.graphlib.Graph({ multigraph: false });
    graph.setGraph({ rankdir: "TB", nodesep: 16, ranksep: 22, edgesep: 8, marginx: 0, marginy: 0 });
    graph.setDefaultEdgeLabel(() => ({}));
    for (const kid of b.boxes) {
      const { w, h } = size(kid);
      graph.setNode(kid.id, { width: w, height: h });
    }
    const inner = edges[b.id] || [];
    for (const e of inner) graph.setEdge(e.from, e.to);
    if (b.boxes.length) inner.length ? lay.layout(graph) : grid(graph, b.boxes);
    let right = 0, bottom = 0;
    for (const kid of b.boxes) {
      const n = graph.node(kid.id);
      spots[kid.id] = { x: n.x - n.width / 2, y: n.y - n.height / 2, w: n.width, h: n.height };
      right = Math.max(right, n.x + n.width / 2);
      bottom = Math.max(bottom, n.y + n.height / 2);
    }
    for (const e of inner) for (const p of graph.edge(e.from, e.to).points || []) {
      right = Math.max(right, p.x);
      bottom = Math.max(bottom, p.y);
    }
    b.inner = inner.map((e) => ({ ...e, points: (graph.edge(e.from, e.to).points || []).map((p) => ({ ...p })) }));
    return { w: Math.max(right + 2 * PAD, b.w), h: bottom + HEAD + 2 * PAD };
  };
  const total = size(box);
  const shift = (b, x, y) => {
    for (const kid of b.boxes) {
      spots[kid.id].x += x + PAD;
      spots[kid.id].y += y + HEAD + PAD;
      if (kid.open) shift(kid, spots[kid.id].x, spots[kid.id].y);
    }
    for (const e of b.inner) lines.push({ ...e, points: e.points.map((p) => ({ x: p.x + x + PAD, y: p.y + y + HEAD + PAD })) });
  };
  shift(box, -PAD, -HEAD - PAD);
  return { boxes: spots, edges: lines, w: total.w - 2 * PAD, h: total.h - HEAD - 2 * PAD };
}

/** Boxes without edges among them: rows of about as many columns as rows. */
function grid(graph, boxes) {
  const columns = Math.max(1, Math.ceil(Math.sqrt(boxes.length / 2)));
  let y = 0;
  for (let i = 0; i < boxes.length; i += columns) {
    const row = boxes.slice(i, i + columns).map((b) => graph.node(b.id));
    let x = 0;
    for (const n of row) {
      n.x = x + n.width / 2;
      n.y = y + n.height / 2;
      x += n.width + 16;
    }
    y += Math.max(...row.map((n) => n.height)) + 16;
  }
}

if (typeof module !== "undefined") module.exports = { place, HEAD, PAD };
