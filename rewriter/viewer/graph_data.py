"""What a model's rewrite looks like as plain data: graphs before and after each pass, where every node comes from, what it costs.

One dictionary, ready for JSON, is all that the page, the Model Explorer export and the tests read. A node that a pass left as it
was is stored once; a step names the nodes of the graph it left by their numbers.
"""
from __future__ import annotations

import linecache
import re
import time
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.fx.node import _format_arg

from ...passes.cost import Rates, backward_cost, node_cost
from ...passes.graph import fetch, packet_name
from ...passes.origin import KEY, Origin
from ...passes.records import Record
from ...passes.rule import Context
from ..errors import CaptureError
from ..pipeline import Step
from ..verify import copy_graph

VERSION = 1
RATES = Rates(memory=2e10, flops=1e11, wire=1e9, call=5e-6, message=1e-4)  # two cores of a server CPU, and gloo
CONTEXT = 2  # lines of source before and after the user's line
_LONGEST = 4000  # characters of an argument list or a name that are kept
_DTYPES = {
    torch.float32: "f32", torch.float64: "f64", torch.float16: "f16", torch.bfloat16: "bf16", torch.int64: "i64", torch.int32: "i32",
    torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8", torch.bool: "bool",
}  # fmt: skip
_KINDS = {"placeholder": "input", "get_attr": "stored", "output": "output"}


def graph_data(
    model: Any, profile: Mapping[str, float] | None = None, sources: bool = True, rates: Rates = RATES, serving: bool = False
) -> dict[str, Any]:
    """The data of an :class:`~..optimized_model.OptimizedModel`.

    ``profile``: seconds by node name, shown as measured time. ``sources=False``: without lines of the user's files. ``rates``: what
    predicted times are computed from. ``serving``: also the graph that ``export_serving`` would write. Raises ``CaptureError`` where
    there is none.
    """
    shell = model._shell
    book = _Book(shell, dict(profile or {}), sources, rates)
    programs = []
    for variant in model._variants:
        for title, first, steps in _timelines(variant):
            programs.append(book.program(title, first, steps))
    if serving:
        served, first, steps = _serving(model)
        book.shell = served
        programs.append(book.program("serving: a store of rows and a dense graph", first, steps))
        book.shell = shell
    report = model.report
    return {
        "version": VERSION,
        "title": type(shell).__name__,
        "summary": report._summary(),
        "coverage": report.coverage,
        "report": str(report),
        "notes": list(report.notes),
        "door": report.door,
        "modules": _modules(shell),
        "tables": _tables(model),
        "ranks": _ranks(model),
        "rates": {"memory": rates.memory, "flops": rates.flops, "wire": rates.wire},
        "programs": programs,
        "nodes": book.nodes,
        "places": book.places,
    }


def _timelines(variant: Any) -> Iterable[tuple[str, Graph, list[Step]]]:
    """(title, captured graph, steps) of each graph that a variant runs: one, or one for each piece."""
    captured = variant.captured
    modes = set(captured.guards.modes.values()) if captured.guards is not None else set()
    mode = {frozenset({True}): " in training", frozenset({False}): " in eval"}.get(frozenset(modes), "")
    title = f"{captured.entry}{mode}"
    if captured.program is None:
        yield title, captured.graph, variant.steps
        return
    for p, piece in enumerate(captured.program.pieces, 1):
        for f, form in enumerate(piece.forms, 1):
            steps = list(form.result[1]) if form.result is not None else []
            more = f", form {f}" if len(piece.forms) > 1 else ""
            yield f"{title}, piece {p} of {len(captured.program.pieces)}{more}", form.graph, steps


class _Book:
    """Nodes and places in source, each written down once."""

    def __init__(self, shell: nn.Module, profile: dict[str, float], sources: bool, rates: Rates) -> None:
        self.shell = shell
        self.rates = rates
        self.profile = profile
        self.sources = sources
        self.nodes: list[dict[str, Any]] = []
        self.places: list[dict[str, Any]] = []
        self._numbers: dict[tuple, int] = {}
        self._place_numbers: dict[str, int] = {}

    def program(self, title: str, first: Graph, steps: list[Step]) -> dict[str, Any]:
        start = steps[0].before if steps else first
        ids = self._graph(start)
        made = {"title": title, "ids": ids, "steps": []}
        for step in steps:
            same = step.after is step.before
            ids = ids if same else self._graph(step.after)
            made["steps"].append({
                "name": step.name, "status": step.status, "made": step.made, "ms": round(step.seconds * 1e3, 3),
                "check_ms": round(step.verify_seconds * 1e3, 3), "delta": step.op_delta, "ids": ids,
                "records": [self._record(r) for r in step.records],
            })  # fmt: skip
        previous = made["ids"]
        for step in made["steps"]:  # a step that left the graph as it was says so by having none
            if step["ids"] == previous:
                step["ids"] = None
            else:
                previous = step["ids"]
        return made

    def _graph(self, graph: Graph) -> list[int]:
        return [self._node(node) for node in graph.nodes]

    def _node(self, node: Node) -> int:
        origin: Origin = node.meta.get(KEY) or Origin((), "")
        inputs = tuple(n.name for n in node.all_input_nodes)
        key = (node.name, str(node.target), _arguments(node), origin, _value(node.meta.get("val")))
        if key in self._numbers:
            return self._numbers[key]
        made: dict[str, Any] = {
            "name": node.name,
            "kind": _KINDS.get(node.op, "op"),
            "op": packet_name(node) if node.op == "call_function" else str(node.target),
            "target": _target(node),
            "args": key[2],
            "value": key[4],
            "inputs": list(dict.fromkeys(inputs)),
            "module": origin.module_path,
            "made_by": origin.made_by,
            "sources": list(origin.sources),
            "place": self._place(origin, node.meta.get("stack_trace")),
        }
        made.update(self._costs(node))
        self._numbers[key] = len(self.nodes)
        self.nodes.append({k: v for k, v in made.items() if v not in ("", None, [])})
        return self._numbers[key]

    def _costs(self, node: Node) -> dict[str, Any]:
        if node.op == "get_attr":
            value = fetch(self.shell, str(node.target))
            if not isinstance(value, Tensor):
                return {"stored": "flag"}
            kind = "buffer" if not isinstance(value, nn.Parameter) else "parameter" if value.requires_grad else "frozen"
            return {"stored": kind, "memory": value.numel() * value.element_size()}
        cost, back = node_cost(node, self.shell), backward_cost(node, self.shell)
        found: dict[str, Any] = {}
        if cost is None:
            found["unknown"] = True
        else:
            back_bytes = back.moved if back else 0
            found["predicted"] = cost.seconds(self.rates)
            found.update(read=cost.read, written=cost.written, flops=cost.flops, wire=cost.wire + cost.inside, back_bytes=back_bytes, back_flops=back.flops if back else 0)
        if node.name in self.profile:
            found["seconds"] = self.profile[node.name]
        return {k: v for k, v in found.items() if v}

    def _record(self, r: Record) -> dict[str, Any]:
        made = {
            "kind": r.kind, "status": r.status, "subject": r.subject, "rule": r.rule, "reason": r.reason, "detail": r.detail,
            "location": r.location, "nodes": list(r.nodes),
        }  # fmt: skip
        return {k: v for k, v in made.items() if v not in ("", [])}

    def _place(self, origin: Origin, trace: str | None) -> int | None:
        """The number of the user's line, with the lines around it where the file can be read."""
        if not origin.location:
            return None
        base, _, line = origin.location.rpartition(":")
        file = next((f for f, at in re.findall(r'File "([^"]+)", line (\d+)', trace or "") if at == line and f.endswith(base)), "")
        known = self._place_numbers.get(file + ":" + origin.location)
        if known is not None:
            return known
        place: dict[str, Any] = {"text": origin.location}
        if file and self.sources and line.isdigit():
            number = int(line)
            first = max(1, number - CONTEXT)
            lines = [linecache.getline(file, i).rstrip("\n")[:400] for i in range(first, number + CONTEXT + 1)]
            if any(lines):
                place.update(file=file, first=first, line=number, lines=lines)
        self._place_numbers[file + ":" + origin.location] = len(self.places)
        self.places.append(place)
        return len(self.places) - 1


def _target(node: Node) -> str:
    target = node.target
    return str(target) if isinstance(target, (str, torch._ops.OpOverload)) else f"{target.__module__}.{getattr(target, '__name__', target)}"


def _arguments(node: Node) -> str:
    if node.op in ("placeholder", "get_attr"):
        return ""
    parts = [_format_arg(a) for a in node.args] + [f"{k}={_format_arg(v)}" for k, v in node.kwargs.items()]
    text = ", ".join(parts)
    return text if len(text) <= _LONGEST else text[:_LONGEST] + f" ... ({len(text)} characters)"


def _value(value: Any) -> str:
    """``f32[16, 64]``; several outputs in a list; "" where nothing is known."""
    if isinstance(value, Tensor):
        device = "" if value.device.type == "cpu" else f" {value.device}"
        return f"{_DTYPES.get(value.dtype, str(value.dtype).removeprefix('torch.'))}[{', '.join(map(str, value.shape))}]{device}"
    if isinstance(value, (list, tuple)):
        inner = [_value(v) for v in value]
        same = len(inner) > 4 and len(set(inner)) == 1
        return f"{len(inner)} x {inner[0]}" if same else "(" + ", ".join(inner) + ")"
    return "" if value is None else str(value)[:200]


def _serving(model: Any) -> tuple[nn.Module, Graph, list[Step]]:
    """The evaluation form of the model, captured and split as an export does it."""
    from ...passes.eval_form import EvalForm
    from ...passes.fold_batch_norm import FoldBatchNorm
    from ...passes.lower_to_serving import LowerToServing
    from ..capture import capture, clone_shell
    from ..methods import FORWARD

    samples = model._compiler.samples[FORWARD]
    shell = clone_shell(model._shell).eval()
    captured = capture(shell, samples.args if samples.args is None else [(samples.args, samples.kwargs or {}), *(samples.more or [])])
    if captured.program is not None:
        raise CaptureError(f"the model cannot be served, as it does not run as one graph: {'; '.join(captured.notes)}")
    steps, graph = [], captured.graph
    for item in (EvalForm(), FoldBatchNorm(), LowerToServing(model.plan.serving.inline_below)):
        context, started = Context(copy_graph(graph), shell), time.perf_counter()
        records = tuple(item.run(context))
        context.graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))  # tables that nothing reads now
        steps.append(Step(item.name, "ran", records, time.perf_counter() - started, 0.0, graph, context.graph, context.made))
        graph = context.graph
    return shell, captured.graph, steps


def _ranks(model: Any) -> list[dict[str, Any]]:
    """Over several ranks: what each holds of the tables; else nothing."""
    if model._sharded is None:
        return []
    found = []
    for rank in range(model._sharded.ranks.world):
        shards = []
        for layout in model._sharded.layouts.values():
            size = model.get_parameter(layout.name).element_size()
            if layout.replicated:
                shards.append({"table": layout.name, "range": "whole", "memory": layout.rows * layout.dim * size})
            elif (s := layout.on(rank)) is not None:
                span = f"rows {s.row}..{s.row + s.rows}" + (f" columns {s.column}..{s.column + s.columns}" if layout.columns_split else "")
                shards.append({"table": layout.name, "range": span, "memory": s.rows * s.columns * size})
        found.append({"rank": rank, "shards": shards, "memory": sum(s["memory"] for s in shards)})
    return found


def _modules(shell: nn.Module) -> list[dict[str, Any]]:
    """Every module of the plain model: path, class, and bytes of the parameters it holds itself."""
    return [
        {"path": path, "type": type(module).__name__, "memory": sum(p.numel() * p.element_size() for p in module.parameters(recurse=False)), "note": _note(module)}
        for path, module in shell.named_modules(remove_duplicate=False)
    ]  # fmt: skip


def _note(module: nn.Module) -> str:
    """What torch prints of a leaf module, e.g. ``100, 64, mode='sum'``."""
    try:
        return module.extra_repr()[:200] if not list(module.children()) else ""
    except Exception:
        return ""


def _tables(model: Any) -> list[dict[str, Any]]:
    found = []
    named = dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])
    for name in model.table_names():
        table = named[name]
        rows, dim = (tuple(table.shape) + (1,))[:2]
        place = str(table.device)
        if model._tiered is not None and name in model._tiered.open:  # the parameter is its cache
            slots, backing = model._tiered.open[name].home, getattr(model._tiered.wanted[name], "backing", "")
            rows, place = model._tiered.whole[name][0][0], f"{'memory' if backing == 'host' else 'file'}, {slots:,} rows cached"
        found.append({
            "name": name, "rows": rows, "dim": dim, "dtype": _DTYPES.get(table.dtype, str(table.dtype)), "device": str(table.device), "place": place,
            "memory": rows * dim * table.element_size(), "grad": getattr(model._compiler.choices.get(name), "grad", ""),
        })  # fmt: skip
    return found
