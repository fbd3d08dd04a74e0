"""A dot interaction whose features are plain lookups looks them up itself: the rows never reach memory.

``slot = embedding_bags(tables, ids, ..., [x]); dot_interaction(slot.view(B, F, D), [x], pairs)``
->  ``lookup_dots(embedding_bags(..., unmade), tables, ids, [x], [x], ...)``

The lookup stays in the graph, for it knows what becomes of each table's gradient, but makes nothing. Saved is the write and the
read of ``[batch, features, dim]`` in the forward; the backward reads the rows a second time. A cast of the result to low precision (which
``mixed_precision`` leaves behind) is made as it is written. Runs after the tables' gradients are settled, and is measured with random ids on the model's own tables: the looking up and the interaction, forward and backward; what comes after
them (sorting, the tables' update) is the same in both.
"""
from __future__ import annotations

import operator
import time
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from ..kernels.embedding import op as embedding
from ..kernels.embedding.spec import GroupSpec, decode
from ..kernels.interaction import op as interaction
from ..kernels.interaction.pairs import decode as decode_pairs
from ..kernels.lookup_dots import op as lookup_dots
from ..kernels.lookup_dots.reference import features, rows_of
from .graph import Editor, Writes, arguments, aten, is_op, stored_tensor, value_of
from .measure import LEAST_GAIN, ROWS, Measured, Timing
from .records import APPLIED, DISABLED, SKIPPED, Record, record
from .rule import Context

_VIEWS = (aten.view.default, aten.reshape.default, aten.unflatten.int)
_SPEC = 5  # argument position of embedding_bags
_ROUNDS = 9


@dataclass
class FuseLookupDots(Measured):
    """Look rows up inside the interaction that alone reads them, where that is measured faster."""

    name: ClassVar[str] = "fuse_lookup_dots"
    kind: ClassVar[str] = "looked-up interactions"
    numerics: ClassVar[str] = "reassociated"

    def run(self, context: Context) -> list[Record]:
        writes = Writes(context.graph, context.root)
        records = []
        for node in list(context.graph.nodes):
            if is_op(node, interaction.DOT_INTERACTION) and (path := _path(node)) is not None:
                records.append(self._rewrite(node, path, context, writes))
        return records

    def _rewrite(self, node: Node, path: list[Node], context: Context, writes: Writes) -> Record:
        source = path[-1]
        reason, gain = _unfit(node, path, writes), ""
        if context.sharding is not None:
            reason = "the tables live on several ranks, and rows come by exchange; tables of this process were needed"
        slots = next((t.name for t in _spec(source).tables if t.name in (context.tiers or ())), None)
        if reason is None and slots is not None:
            reason = f"table '{slots}' is in tiers or has dynamic ids, and its ids become slots for the lookup alone; tables in memory were needed"
        if reason is None and self.measure:
            timing = _timing(node, source, context)
            gain = f"; measured {timing.gain:.2f}x on {timing.rows} rows" if timing is not None else ""
            if timing is None:
                reason = "whether it pays is measured on the shapes of sample_inputs, and they are not known here"
            elif timing.gain < LEAST_GAIN:
                reason = (
                    f"measured on {timing.rows} rows: looking up inside takes {timing.rewritten * 1e6:.0f} us and apart "
                    f"{timing.plain * 1e6:.0f} us; it must be {LEAST_GAIN}x faster to be made"
                )
        if reason is not None:
            return record(self.name, self.kind, SKIPPED, node, reason)
        if not context.allowed():
            return record(self.name, self.kind, DISABLED, node, "beyond the number of rewrites that were asked for")
        spec = _spec(source)
        done = record(self.name, self.kind, APPLIED, node, detail=f"{len(spec.lookups)} lookups inside the interaction{gain}")
        _replace(Editor(context.graph, self.name), node, path, spec)
        return done


def _spec(source: Node) -> GroupSpec:
    return decode(source.args[_SPEC])  # type: ignore[arg-type]


def _path(node: Node) -> list[Node] | None:
    """From the interaction's x back to the fused lookup whose slot it views: [views..., getitem, lookup]; ``None`` if it is none."""
    path = [node.args[0]]
    while is_op(path[-1], *_VIEWS):
        path.append(path[-1].args[0])  # type: ignore[union-attr]
    if not is_op(path[-1], operator.getitem) or not is_op(path[-1].args[0], embedding.OP):  # type: ignore[union-attr]
        return None
    return [*path, path[-1].args[0]]  # type: ignore[list-item, union-attr]


def _unfit(node: Node, path: list[Node], writes: Writes) -> str | None:
    source, spec = path[-1], _spec(path[-1])
    a = arguments(source)
    if len(spec.slots) != 1 or len(path[-2].users) + len(source.users) > 2 or any(len(view.users) > 1 for view in path[:-1]):
        others = sum(len(n.users) for n in path) - len(path)
        return f"the looked-up rows are in {len(spec.slots)} tensors with {others} more readers; one that only the interaction reads was needed"
    pooled = next((lookup for lookup in spec.lookups if lookup.pooling != "none"), None)
    if pooled is not None:
        return f"lookup {pooled.name!r} sums bags; plain lookups of one id a row were needed"
    values = [value_of(n) for n in (node.args[0], *a["indices"], *a["extras"])]
    tables = [value_of(t) for t in a["tables"]]
    if any(v is None for v in (*values, *tables)):
        return "the ranks of the ids and the view of the rows are not known without sample_inputs"
    ids = values[1 : 1 + len(a["indices"])]
    if any(v.dim() != 1 for v in ids):
        return f"ids have {max(v.dim() for v in ids)} dimensions; [batch] was needed"
    if len({spec.tables[lookup.table].dim for lookup in spec.lookups} | {e.width for e in spec.extras}) != 1:
        return "the features have different widths; one was needed"
    if tuple(values[0].shape[1:]) != features(spec):
        return f"the rows are viewed as {[str(s) for s in values[0].shape]}; [batch, features, dim] was needed"
    if spec.wide:
        return f"the tables are stored as {str(tables[0].dtype).removeprefix('torch.')} and read in float32; one dtype was needed"
    if any(v.dtype != tables[0].dtype for v in (*tables, *values[1 + len(a["indices"]) :])):
        return "tables and dense vectors have different dtypes; one was needed"
    written = next((n for n in (*path, *a["tables"], *a["indices"], *a["extras"]) if writes.to(n)), None)
    return None if written is None else f"{written.name} is written to in place; what the interaction reads must stay as it was looked up"


def _replace(editor: Editor, node: Node, path: list[Node], spec: GroupSpec) -> None:
    getitem, source = path[-2], path[-1]
    a, b = arguments(source), arguments(node)
    text = source.args[_SPEC]
    cast = next(iter(node.users)) if len(node.users) == 1 and is_op(next(iter(node.users)), aten.to.dtype) else None
    if cast is not None and (len(cast.args) != 2 or cast.kwargs or not cast.args[1].is_floating_point):  # type: ignore[union-attr]
        cast = None
    last = node if cast is None else cast
    editor.set_argument(source, _SPEC, replace(spec, unmade=True).encode())
    made = editor.call(
        lookup_dots.OP, getitem, list(a["tables"]), list(a["indices"]), list(a["extras"]), list(b["extras"]), text, b["pairs"], b["place"],
        b["multiple"], b["dtype"] if cast is None else cast.args[1], b["constants"], b["digest"], before=node, sources=[node, *path[:-1]], value=value_of(last),
    )  # fmt: skip
    editor.replace(last, made)
    if cast is not None:
        editor.graph.erase_node(node)
    for view in path[:-2]:
        editor.graph.erase_node(view)


# --- is it faster? ---------------------------------------------------------------------------------------------------------------


def _timing(node: Node, source: Node, context: Context) -> Timing | None:
    spec = _spec(source)
    a = arguments(source)
    tables = [stored_tensor(t, context.root) for t in a["tables"]]
    batch = value_of(a["indices"][0]).shape[0]  # type: ignore[union-attr]
    hint = batch.node.hint if isinstance(batch, torch.SymInt) else batch
    if hint is None or any(t is None for t in tables):
        return None
    rows, pairs = max(int(hint), ROWS), str(arguments(node)["pairs"])
    shapes = tuple((tuple(t.shape), t.dtype, str(t.device)) for t in tables)  # type: ignore[union-attr]
    key = (FuseLookupDots.name, shapes, replace(spec, tables=()).encode(), pairs, rows, torch.get_num_threads())
    if key not in context.timings:
        given = [t.detach() for t in tables]  # type: ignore[union-attr]
        ids = [value_of(i).dtype for i in a["indices"]]  # type: ignore[union-attr]
        context.timings[key] = _time(spec, given, ids, pairs, rows)
    return context.timings[key]


def _time(spec: GroupSpec, tables: list[Tensor], id_types: list[torch.dtype], pairs: str, rows: int) -> Timing:
    """Forward and backward of looking up and multiplying, apart and in one, in turns; the least of each."""
    device, dtype = tables[0].device, tables[0].dtype
    inside, apart, dots = (m.implementation(device) for m in (lookup_dots, embedding, interaction))
    with torch.random.fork_rng(), torch.inference_mode(False), torch.no_grad():
        ids = [
            torch.randint(tables[lookup.table].shape[0], (rows,), device=device).to(kind) for lookup, kind in zip(spec.lookups, id_types)
        ]
        dense = [torch.randn(rows, e.width, dtype=dtype, device=device) for e in spec.extras]
        out = torch.empty(rows, len(decode_pairs(pairs)), dtype=dtype, device=device)
        grad = torch.randn_like(out)

    def separate() -> Any:
        x = rows_of(apart, spec, tables, ids, dense)
        dots.dots(x, pairs, out)
        return dots.dots_backward(grad, x, pairs)

    def together() -> Any:
        inside.dots(spec, tables, ids, dense, pairs, out)
        return inside.dots_backward(grad, spec, tables, ids, dense, pairs)

    taken: tuple[list[float], list[float]] = ([], [])
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    with torch.no_grad():
        for _ in range(_ROUNDS + 1):
            for run, times in zip((separate, together), taken):
                wait()
                start = time.perf_counter()
                run()
                wait()
                times.append(time.perf_counter() - start)
    return Timing(*(min(times[1:]) for times in taken), rows)
