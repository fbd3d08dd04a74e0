"""Rows that a dense graph only puts side by side come as one input: ``Concat(rows.0, rows.1, ...)`` -> ``rows.join.0``.

A store that holds the tables in one file then fills that input with a single gather, and ONNX Runtime, which takes about 2 us for each
input, has one instead of one a table.
"""
from __future__ import annotations

from typing import Any

import onnx
from onnx import helper, numpy_helper


def join_rows(dense: onnx.ModelProto, lookups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Change ``dense`` in place. For each join: ``rows``, the new input's name; ``lookups``, whose rows it holds, by number; ``stacked``:
    ``[batch, lookups, dim]``, else ``[batch, lookups * dim]``. All of a join have one width."""
    graph = dense.graph
    inputs = {i.name: i for i in graph.input}
    number = {lookup["rows"]: k for k, lookup in enumerate(lookups) if lookup["rows"] in inputs}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    constants = {t.name: numpy_helper.to_array(t).reshape(-1).tolist() for t in graph.initializer if len(t.dims) <= 1}
    outputs = {o.name for o in graph.output}
    if any(a.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for node in graph.node for a in node.attribute):
        return []  # a subgraph may read rows too
    maker = {o: node for node in graph.node for o in node.output}

    def source(name: str) -> tuple[int, bool, onnx.NodeProto | None] | None:
        """The lookup whose rows ``name`` is, for this reader alone; whether stacked, and by which node."""
        if len(readers[name]) != 1 or name in outputs:
            return None
        if name in number:
            return number[name], False, None
        node = maker.get(name)
        alone = node is not None and node.op_type == "Unsqueeze" and node.input[0] in number and len(readers[node.input[0]]) == 1
        return (number[node.input[0]], True, node) if alone and constants.get(node.input[1]) == [1] else None  # type: ignore[union-attr]

    joins: list[dict[str, Any]] = []
    for node in [n for n in graph.node if n.op_type == "Concat" and helper.get_node_attr_value(n, "axis") in (1, -1)]:
        stays, run, made = [], [], []
        for name in [*node.input, ""]:
            found = source(name) if name else None
            if found and helper.get_node_attr_value(node, "axis") != 1 and found[1]:
                found = None
            if found and _rank(inputs[lookups[found[0]]["rows"]]) != 2:
                found = None
            if run and (not found or found[1] != run[0][1] or _sizes(inputs, lookups, found) != _sizes(inputs, lookups, run[0])):
                stays.append(run)
                run = []
            if found:
                run.append((*found, name))
            elif name:
                stays.append(name)
        for item in stays:
            if isinstance(item, str) or len(item) == 1:
                made.append(item if isinstance(item, str) else item[0][3])
                continue
            members, stacked, join = [k for k, *_ in item], item[0][1], f"rows.join.{len(joins)}"
            first = inputs[lookups[members[0]]["rows"]].type.tensor_type.shape.dim
            dim = first[1].dim_value
            lead = first[0].dim_param or first[0].dim_value
            shape = [lead, len(members), dim] if stacked else [lead, len(members) * dim]
            graph.input.append(helper.make_tensor_value_info(join, onnx.TensorProto.FLOAT, shape))
            for k, _, unsqueeze, _ in item:
                graph.input.remove(inputs[lookups[k]["rows"]])
                if unsqueeze is not None:
                    graph.node.remove(unsqueeze)
            made.append(join)
            joins.append({"rows": join, "lookups": members, "stacked": stacked})
        node.input[:] = made
    read = {name for node in graph.node for name in node.input}
    for tensor in [t for t in graph.initializer if t.name not in read]:
        graph.initializer.remove(tensor)
    onnx.checker.check_model(dense, full_check=True)
    return joins


def _rank(value: onnx.ValueInfoProto) -> int:
    return len(value.type.tensor_type.shape.dim)


def _sizes(inputs: dict[str, onnx.ValueInfoProto], lookups: list[dict[str, Any]], found: tuple) -> list:
    return [d.dim_param or d.dim_value for d in inputs[lookups[found[0]]["rows"]].type.tensor_type.shape.dim]
