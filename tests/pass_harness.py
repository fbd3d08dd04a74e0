"""Run one pass on the captured graph of a plain model, and the checks that every pass must stand."""
from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from tablewright.kernels.embedding.op import OP
from tablewright.kernels.embedding.spec import decode
from tablewright.passes.graph import packet_name
from tablewright.passes.records import Record
from tablewright.passes.rule import Context, Pass
from tablewright.rewriter.capture import attach, capture, clone_shell
from tablewright.rewriter.equivalence import compare, run
from tablewright.rewriter.verify import check_structure, copy_graph
from torch import nn
from torch.fx import Graph, Node


@dataclass
class Rewritten:
    """``before`` and ``after`` one pass; ``leaves`` are the graph's inputs."""

    shell: nn.Module
    before: Graph
    after: Graph
    records: list[Record]
    leaves: list
    item: Pass
    context: Context

    def nodes(self, name: str) -> list[Node]:
        """The calls of the op ``name`` after the pass."""
        return [n for n in self.after.nodes if packet_name(n) == name]

    @property
    def specs(self):
        return [decode(n.args[5]) for n in self.after.nodes if n.target is OP]

    def of(self, status: str) -> list[Record]:
        return [r for r in self.records if r.status == status]


def rewrite(model: nn.Module, args: tuple | None, item: Pass, *, tables: dict | None = None, budget: int | None = None) -> Rewritten:
    """Capture ``model`` on ``args`` (``None``: without inputs) and run ``item``."""
    shell = clone_shell(model)
    captured = capture(shell, args, {})
    leaves = [] if args is None else list(captured.guards.flatten(args, {}))
    return again(shell, captured.graph, leaves, item, tables, budget)


def again(shell: nn.Module, graph: Graph, leaves: list, item: Pass, tables: dict | None = None, budget: int | None = None) -> Rewritten:
    """Run ``item`` on a copy of ``graph``."""
    context = Context(copy_graph(graph), shell, dict(tables or {}), budget)
    records = item.run(context)
    return Rewritten(shell, graph, context.graph, records, leaves, item, context)


def assert_sound(done: Rewritten, *, idempotent: bool = True, exact: bool = False) -> None:
    """Well formed, every node with an origin, the same outputs and gradients, and nothing left to do a second time."""
    check_structure(done.before, done.after, done.shell)
    old = {n.name for n in done.before.nodes}
    for node in done.after.nodes:
        if node.op != "output" and node.name not in old:
            origin = node.meta["origin"]
            assert origin.made_by == done.item.name, f"{node.name} says it was made by {origin.made_by}"
            assert origin.sources and set(origin.sources) <= old, f"{node.name} comes from {origin.sources}"
            assert origin.location, f"{node.name} does not know the user's line"
    if done.leaves:
        assert_same_numbers(done.shell, done.before, done.after, done.leaves, exact=exact)
    if idempotent:
        second = again(done.shell, done.after, [], done.item, done.context.tables)
        assert not second.of("APPLIED"), second.of("APPLIED")
        assert [n.name for n in second.after.nodes] == [n.name for n in done.after.nodes]


def assert_same_numbers(shell: nn.Module, before: Graph, after: Graph, leaves: list, exact: bool = False) -> None:
    """Two graphs give the same outputs and gradients, in train and eval mode."""
    for training in (True, False):
        results = []
        for graph in (before, after):
            other = copy.deepcopy(shell).train(training)
            module = attach(other, copy_graph(graph))
            given = [x.detach().clone() if isinstance(x, torch.Tensor) else x for x in leaves]
            results.append(run(lambda m=module, g=given: m(*g), other))
        differences = compare(*results)
        assert differences
        for d in differences:
            assert d.ok and not (exact and d.error), f"{d.what}: {d.error}"


def graph_text(graph: Graph) -> str:
    """A graph as lines that a person can compare: name, op, arguments, shape, module path, maker."""
    lines = []
    for node in graph.nodes:
        args = ", ".join(_argument(a) for a in node.args)
        args += "".join(f", {k}={_argument(v)}" for k, v in node.kwargs.items())
        value = node.meta.get("val")
        shape = f" -> {_shape(value)}" if value is not None else ""
        origin = node.meta.get("origin")
        where = f"   # {origin.module_path or 'the model'}, {origin.made_by}" if origin else ""
        call = packet_name(node) or node.op
        target = f"{node.target}" if node.op in ("get_attr", "placeholder") else args
        lines.append(f"{node.name} = {call}({target}){shape}{where}")
    return "\n".join(lines)


def _argument(value) -> str:
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_argument(v) for v in value) + "]"
    if isinstance(value, str) and value.startswith("{"):
        spec = decode(value)
        parts = [*spec.tables, *spec.lookups, *spec.extras]
        return "\n    " + "\n    ".join(map(str, parts)) + f"\n    slots={spec.slots}"
    return str(value)


def _shape(value) -> str:
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_shape(v) for v in value) + "]"
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    sizes = ["?" if not isinstance(s, int) else str(s) for s in value.shape]
    return f"{str(value.dtype).removeprefix('torch.')}[{', '.join(sizes)}]"
