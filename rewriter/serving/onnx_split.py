"""Cut an exported graph at its lookups: what computes ids, the lookups as data, and what follows from the rows, in standard ops only.

    pre.onnx: inputs -> ids        lookups: ids -> rows, by a store        dense.onnx: inputs, rows -> outputs

With shared inputs (a user beside many candidates) also ``shared.onnx``, all that depends on those alone and has a row for each of
theirs, and ``rest.onnx``, which takes its results as further inputs.
"""
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import onnx
from onnx import helper, numpy_helper

from .onnx_ops import DOMAIN

BATCH = "batch"


@dataclass
class Parts:
    """``lookups``: one dict each, as the manifest has them. ``shared`` and ``rest`` only where inputs are shared;
    ``cut``: what the first gives to the second, by name; ``shared_lookups``: the numbers of those whose ids are shared."""

    dense: onnx.ModelProto
    pre: onnx.ModelProto | None
    lookups: list[dict[str, Any]]
    shared: onnx.ModelProto | None = None
    rest: onnx.ModelProto | None = None
    shared_inputs: list[str] = field(default_factory=list)
    shared_lookups: list[int] = field(default_factory=list)
    cut: list[str] = field(default_factory=list)


class Graph:
    """An ONNX graph with the questions that cutting asks."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model, self.graph = model, model.graph
        self.inputs = {i.name: i for i in model.graph.input}
        self.constants = {t.name: t for t in model.graph.initializer}
        self.maker = {name: node for node in model.graph.node for name in node.output if name}
        self.order = {id(node): i for i, node in enumerate(model.graph.node)}
        self.values = {v.name: v for v in (*model.graph.value_info, *model.graph.input, *model.graph.output)}

    def reads(self, node: onnx.NodeProto) -> list[str]:
        """Names that ``node`` reads, those its subgraphs take from outside among them."""
        found = [name for name in node.input if name]
        for attribute in node.attribute:
            for graph in [attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else attribute.graphs:
                inner = {name for n in graph.node for name in n.output} | {i.name for i in graph.input} | {t.name for t in graph.initializer}
                found += [name for n in graph.node for name in self.reads(n) if name not in inner]
                found += [o.name for o in graph.output if o.name not in inner]
        return found

    def nodes_for(self, targets: Iterable[str], stop: Iterable[str] = ()) -> list[onnx.NodeProto]:
        """The nodes that make ``targets``, in order, where ``stop`` and the graph's inputs are given."""
        known, found, stack = set(stop), {}, list(targets)
        while stack:
            node = self.maker.get(name := stack.pop())
            if name not in known and node is not None and id(node) not in found:
                found[id(node)] = node
                stack.extend(self.reads(node))
        return sorted(found.values(), key=lambda n: self.order[id(n)])

    def roots(self, targets: Iterable[str], stop: Iterable[str] = ()) -> set[str]:
        """The inputs and members of ``stop`` that ``targets`` depend on."""
        stop = set(stop)
        read = {name for node in self.nodes_for(targets, stop) for name in self.reads(node)} | set(targets)
        return {name for name in read if name in self.inputs or name in stop}

    def constant(self, name: str) -> list | None:
        """The values of a small constant, flat."""
        tensor = self.constants.get(name)
        return None if tensor is None else numpy_helper.to_array(tensor).reshape(-1).tolist()

    def rank(self, name: str) -> int | None:
        value = self.values.get(name)
        return len(value.type.tensor_type.shape.dim) if value is not None and value.type.tensor_type.HasField("shape") else None

    def has_batch(self, name: str) -> bool:
        """Is the leading dimension of ``name`` the batch?"""
        dims = self.values[name].type.tensor_type.shape.dim if self.rank(name) else []
        return bool(dims) and dims[0].dim_param == BATCH

    def part(self, name: str, nodes: list[onnx.NodeProto], inputs: list[str], outputs: list[str], renamed: dict[str, str]) -> onnx.ModelProto:
        """A model of ``nodes``; ``renamed`` gives values names of their own there."""
        copies = []
        for node in nodes:
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            del copy.metadata_props[:]  # module paths and source lines stay in model.onnx
            rename_values(copy, renamed)
            copies.append(copy)
        made = {n for node in copies for n in node.output}
        results = []
        for output in outputs:
            new = renamed.get(output, output)
            value = _named(self.values[output], new)
            if new not in made:  # an input that is given back as it is
                value = _named(self.values[output], f"{new}.out")
                copies.append(helper.make_node("Identity", [new], [value.name]))
            results.append(value)
        read = {n for node in copies for n in self.reads(node)}
        tensors = [t for key, t in self.constants.items() if key in read]
        graph = helper.make_graph(copies, name, [_named(self.values[i], renamed.get(i, i)) for i in inputs], results, tensors)
        imports = [o for o in self.model.opset_import if o.domain != DOMAIN]
        model = helper.make_model(graph, opset_imports=imports, ir_version=self.model.ir_version, producer_name="tablewright")
        onnx.checker.check_model(model, full_check=True)
        return model


def split(model: onnx.ModelProto, shared: Iterable[str] = ()) -> Parts:
    """The parts of ``model``, whose dimension names are in place (``BATCH`` for the batch) and whose values have shapes.

    Lookups are not to depend on each other; ``shared`` are names of inputs. Raises ``ValueError`` where those cannot be kept apart.
    """
    graph = Graph(model)
    gathers = [n for n in model.graph.node if n.domain == DOMAIN]
    outs = [n.output[0] for n in gathers]
    outputs = [o.name for o in model.graph.output]
    lookups, computed = [], []
    for number, node in enumerate(gathers):
        lookup = _described(graph, node, computed)
        lookup["rows"] = f"rows.{number}.{lookup['table']}"
        lookups.append(lookup)
    renamed = {out: lookup["rows"] for out, lookup in zip(outs, lookups)}
    pre = None
    if computed:
        needed = sorted(graph.roots(computed), key=list(graph.inputs).index)
        pre = graph.part("pre", graph.nodes_for(computed), needed, computed, {})
    dense_nodes = graph.nodes_for(outputs, outs)
    needed = _needed(graph, dense_nodes, outputs, outs)
    parts = Parts(graph.part("dense", dense_nodes, needed, outputs, renamed), pre, lookups)
    shared = list(shared)
    if shared:
        _split_shared(graph, parts, gathers, outs, outputs, renamed, shared, computed)
    return parts


def _split_shared(graph: Graph, parts: Parts, gathers, outs, outputs, renamed, shared: list[str], computed: list[str]) -> None:
    for name in computed:
        roots = graph.roots([name])
        if roots & set(shared) and not roots <= set(shared):
            raise ValueError(f"ids are computed from shared inputs together with others ({', '.join(sorted(roots))})")
    mine = {
        number: out for number, (node, out) in enumerate(zip(gathers, outs))
        if (roots := graph.roots([n for n in node.input if n])) and roots <= set(shared)
    }  # fmt: skip
    given = {*shared, *mine.values()}
    nodes = graph.nodes_for(outputs, outs)
    inside: list[onnx.NodeProto] = []
    have = set(given)
    for node in nodes:
        reads = [n for n in graph.reads(node) if n not in graph.constants]
        if reads and all(n in have for n in reads):
            inside.append(node)
            have.update(node.output)
    while True:  # what leaves the shared part has a row for each of the batch's; what has not is computed outside
        kept = {id(n) for n in inside}
        read = {n for node in nodes if id(node) not in kept for n in graph.reads(node)} | set(outputs)
        wrong = [n for n in inside if any(o in read and not graph.has_batch(o) for o in n.output)]
        if not wrong:
            break
        inside = [n for n in inside if n not in wrong]
    kept = {id(n) for n in inside}
    rest = [n for n in nodes if id(n) not in kept]
    made = {o for n in inside for o in n.output}
    read = {n for node in rest for n in graph.reads(node)} | set(outputs)
    cut = [o for n in inside for o in n.output if o in read]
    if any(not graph.has_batch(name) for name in shared):
        raise ValueError("a shared input does not have the batch as its first dimension")
    if cut:
        parts.shared = graph.part("shared", graph.nodes_for(cut, given), _needed(graph, inside, cut, outs), cut, renamed)
    inputs = _needed(graph, rest, outputs, [*outs, *made])
    parts.rest = graph.part("rest", rest, inputs, outputs, renamed)
    parts.shared_inputs, parts.shared_lookups, parts.cut = shared, sorted(mine), cut


def _needed(graph: Graph, nodes: list, outputs: list[str], given: Iterable[str]) -> list[str]:
    """Of the graph's inputs and ``given`` those that ``nodes`` or ``outputs`` read, in a fixed order."""
    read = {n for node in nodes for n in graph.reads(node)} | set(outputs)
    made = {o for node in nodes for o in node.output}
    return [n for n in (*graph.inputs, *given) if n in read and n not in made]


def _described(graph: Graph, node: onnx.NodeProto, computed: list[str]) -> dict[str, Any]:
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    bag = node.op_type == "DistributedGatherBag"
    names = [*node.input, "", ""]
    lookup: dict[str, Any] = {"kind": "bag" if bag else "gather", "table": attributes["table"].decode(), "dim": attributes["dim"]}
    lookup["ids"] = _source(graph, names[0], computed)
    lookup["wrap_negative"] = bool(attributes["wrap_negative"])
    if bag:
        lookup["offsets"] = _source(graph, names[1], computed) if names[1] else None
        lookup["weights"] = _source(graph, names[2], computed) if names[2] else None
        padding = attributes["padding_idx"]
        lookup.update(mode=attributes["mode"].decode(), padding_idx=None if padding < 0 else padding,
                      include_last_offset=bool(attributes["include_last_offset"]))  # fmt: skip
    return lookup


def _source(graph: Graph, name: str, computed: list[str]) -> dict[str, Any]:
    """Where a tensor of ids comes from: an input, a column of one (as it is, or as ``[batch, 1]``), or pre.onnx."""
    if name in graph.inputs:
        return {"input": name}
    node = graph.maker[name]
    if node.input[0] in graph.inputs and graph.rank(node.input[0]) == 2:
        if node.op_type == "Gather" and helper.get_node_attr_value(node, "axis") == 1 and graph.rank(name) == 1:
            column = graph.constant(node.input[1])
            if column is not None and column[0] >= 0:
                return {"input": node.input[0], "column": column[0]}
        if node.op_type == "Slice":
            start, stop, axes, steps = ([graph.constant(n) for n in node.input[1:]] + [None, [1]])[:4]
            if axes == [1] and steps == [1] and start is not None and stop is not None and start[0] >= 0 and stop[0] == start[0] + 1:
                return {"input": node.input[0], "columns": [start[0], stop[0]]}
    if name not in computed:
        computed.append(name)
    return {"pre": name}


def rename_values(node: onnx.NodeProto, renamed: dict[str, str]) -> None:
    """Give the values that ``node`` reads and makes their new names, in its subgraphs too."""
    for names in (node.input, node.output):
        for i, name in enumerate(names):
            names[i] = renamed.get(name, name)
    for attribute in node.attribute:
        for graph in [attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else attribute.graphs:
            for inner in graph.node:
                rename_values(inner, renamed)
            for output in graph.output:
                output.name = renamed.get(output.name, output.name)


def _named(value: onnx.ValueInfoProto, name: str) -> onnx.ValueInfoProto:
    copy = onnx.ValueInfoProto()
    copy.CopyFrom(value)
    copy.name = name
    return copy
