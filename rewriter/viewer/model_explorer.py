"""The graphs in the JSON form that Google's Model Explorer opens (its "graph collection"): one graph for each step."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def model_explorer(data: Mapping[str, Any]) -> dict[str, Any]:
    """``{"label", "graphs": [{"id", "nodes": [{id, label, namespace, incomingEdges, attrs, outputsMetadata}]}]}``: the captured graph
    of each program and what each pass that changed it left."""
    graphs = []
    for program in data["programs"]:
        stages = [("captured", program["ids"])] + [(step["name"], step["ids"]) for step in program["steps"] if step["ids"] is not None]
        for number, (name, ids) in enumerate(stages):
            title = f"{program['title']}: {number} {name}"
            graphs.append({"id": title, "nodes": [_node(data, data["nodes"][i]) for i in ids]})
    return {"label": data["title"], "graphs": graphs}


def _node(data: Mapping[str, Any], node: Mapping[str, Any]) -> dict[str, Any]:
    place = node.get("place")
    facts = {
        "target": node.get("target", ""), "made by": node.get("made_by", ""), "from": ", ".join(node.get("sources", [])[:50]),
        "where": data["places"][place]["text"] if place is not None else "", "arguments": node.get("args", ""),
        **{key: node[key] for key in ("read", "written", "flops", "wire", "memory", "seconds") if key in node},
    }  # fmt: skip
    return {
        "id": node["name"],
        "label": node["op"],
        "namespace": node.get("module", "").replace(".", "/"),
        "incomingEdges": [
            {"sourceNodeId": source, "sourceNodeOutputId": "0", "targetNodeInputId": str(i)} for i, source in enumerate(node.get("inputs", []))
        ],
        "outputsMetadata": [{"id": "0", "attrs": [{"key": "value", "value": node.get("value", "")}]}],
        "attrs": [{"key": key, "value": str(value)} for key, value in facts.items() if value not in ("", None)],
    }
