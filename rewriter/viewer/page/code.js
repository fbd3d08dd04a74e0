// The graph as text, before and after beside each other, line by line linked. Also the form for printing and for screen readers.
"use strict";

function codePage() {
  const sides = app.state.view === "before" || app.state.view === "after" ? [app.state.view] : ["before", "after"];
  const twin = el("div.twin");
  if (sides.length === 1) twin.style.gridTemplateColumns = "1fr";
  for (const side of sides) {
    const marks = side === "before" ? app.diff.before : app.diff.after;
    const code = el("div.code", el("h2", side === "before" ? app.words.before : app.words.after));
    for (const i of app.ids[side]) {
      const node = app.data.nodes[i];
      if (node.kind === "stored" && !app.state.all) continue;
      const mark = marks.get(node.name);
      const line = el("span.ln" + (mark && mark !== "rewired" ? "." + mark : ""), { "data-name": node.name, tabindex: -1 },
        el("span.g", mark && mark !== "rewired" ? SIGNS[mark] : " "), lineOf(node, app.graphs[side].byName), node.place !== undefined && el("span.c", `  # ${app.data.places[node.place].text}`));
      code.append(line);
    }
    code.addEventListener("click", (event) => {
      const line = event.target.closest(".ln");
      if (line) app.choose({ side, name: line.dataset.name });
    });
    twin.append(el("div", { "data-side": side, tabindex: 0 }, code));
  }
  return twin;
}

/** `y: f32[16, 8] = linear(x, bottom.0.weight, bottom.0.bias)` */
function lineOf(node, byName) {
  const value = node.value ? `: ${node.value}` : "";
  if (node.kind === "input") return `${short(node.name, 80)}${value} = input`;
  if (node.kind === "stored") return `${short(node.name, 80)}${value} = ${short(node.target, 80)}`;
  const args = (node.args || "").replace(/%([\w.]+)/g, (_, name) => (byName.get(name)?.kind === "stored" ? byName.get(name).target : name));
  const text = args.length > 240 ? args.slice(0, 240) + " \u2026" : args;
  return node.kind === "output" ? `return ${text}` : `${short(node.name, 80)}${value} = ${(node.target || node.op).replace(/^aten\./, "").replace(/\.default$/, "")}(${text})`;
}

function lightLines(host, lit) {
  for (const part of host.querySelectorAll("[data-side]")) {
    const names = lit[part.dataset.side];
    let first = null;
    for (const line of part.querySelectorAll(".ln")) {
      const on = !!names && names.has(line.dataset.name);
      line.classList.toggle("lit", on);
      if (on && !first) first = line;
    }
    if (first) first.scrollIntoView({ block: "nearest" });
  }
}
