// Sharded models: what lies on which rank, how full each is, and what runs beside what.
"use strict";

function ranksPage() {
  const { ranks } = app.data;
  const most = Math.max(1, ...ranks.map((r) => r.memory));
  const columns = [
    { name: "rank", num: true, value: (r) => r.rank }, { name: "tables and shards", num: true, value: (r) => r.shards.length }, { name: "memory", num: true, value: (r) => r.memory, show: (r) => bytes(r.memory) },
    { name: "", value: (r) => r.memory, show: (r) => meter(r.memory / most) }, { name: "predicted", num: true, value: (r) => r.seconds || 0, show: (r) => (r.seconds ? duration(r.seconds) : "") },
    { name: "holds", value: (r) => r.shards.map((s) => s.table).join(), show: (r) => el("span.mono", short(r.shards.map((s) => `${s.table}${s.range ? " " + s.range : ""}`).join(", "), 160)) },
  ];
  return el("div.page", lanes(), el("h3", "Ranks"), sortable(columns, ranks, "ranks", (r) => app.choose({ rank: r.rank })));
}

/** What one rank holds: all of it for the first, and for the others what differs from the first. */
function aboutRank(number) {
  const { ranks } = app.data, rank = ranks.find((r) => r.rank === number) || ranks[0], first = ranks[0];
  const at = (r) => new Map(r.shards.map((s) => [s.table, s]));
  const mine = at(rank), zero = at(first);
  const pick = el("select", { "aria-label": "Rank", onchange: (e) => app.choose({ rank: Number(e.target.value) }) }, ranks.map((r) => el("option", { value: r.rank, selected: r === rank ? "" : undefined }, `rank ${r.rank}`)));
  const list = (shards, mark) => el("table", el("tbody", shards.slice(0, 300).map((s) => el("tr", el("td", mark), el("td.mono", short(s.table, 34)), el("td", s.range), el("td.num", bytes(s.memory))))), shards.length > 300 && el("caption", `and ${shards.length - 300} more`));
  const parts = [el("h2", `Rank ${rank.rank} of ${ranks.length}`), el("p", pick), el("dl", pair("tables and shards", String(rank.shards.length)), pair("memory", bytes(rank.memory)))];
  if (rank === first) return [...parts, list(rank.shards, "")];
  const more = rank.shards.filter((s) => !zero.has(s.table)), less = first.shards.filter((s) => !mine.has(s.table));
  const other = rank.shards.filter((s) => zero.has(s.table) && zero.get(s.table).range !== s.range);
  const same = rank.shards.length - more.length - other.length;
  return [...parts, el("p.soft", `Beside rank ${first.rank}: ${same} the same.`), other.length ? [el("h3", "Another part"), list(other, SIGNS.replaced)] : null, more.length ? [el("h3", "Only here"), list(more, SIGNS.added)] : null, less.length ? [el("h3", `On rank ${first.rank} and not here`), list(less, SIGNS.removed)] : null];
}

/** Two lanes, computation and network, in the order of the graph: a collective runs from where it starts to where it is awaited. */
function lanes() {
  const nodes = app.ids.after.map((i) => app.data.nodes[i]);
  const start = new Map(), bars = [];
  let now = 0, wire = 0;
  for (const n of nodes) {
    const took = n.predicted || 0;
    if (/^wait_/.test(n.op)) now = Math.max(now, ...(n.inputs || []).map((i) => start.get(i) || 0));
    else if (n.wire) {
      wire = Math.max(wire, now) + took;
      start.set(n.name, wire);
      bars.push({ name: n.name, lane: "wire", from: wire - took, to: wire });
    } else if (took) {
      bars.push({ name: n.name, lane: "work", from: now, to: now + took });
      now += took;
    }
  }
  const end = Math.max(now, wire);
  if (!end) return el("p.faint", "No predicted times: the plan names no topology.");
  const lane = (key) => el("div.lane", bars.filter((b) => b.lane === key).map((b) => {
    const bar = el(key === "wire" ? "i.wire" : "i", { title: `${b.name}: ${duration(b.to - b.from)}`, onclick: () => { app.state.tab = "graph"; app.choose({ side: "after", name: b.name }); } });
    bar.style.left = `${(b.from / end) * 100}%`;
    bar.style.width = `${((b.to - b.from) / end) * 100}%`;
    return bar;
  }));
  return el("div", el("h3", `Forward, predicted: ${duration(end)}`), el("p.soft", "computation"), lane("work"), el("p.soft", "network"), lane("wire"));
}
