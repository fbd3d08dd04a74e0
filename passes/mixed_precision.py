"""The dense part in low precision: what ``torch.autocast`` does at run time, decided once and written into the graph.

``linear(x, W, b)``  ->  ``linear(to(x, bf16), W', b')`` with ``W', b', ... = cast_all([W, b, ...], bf16)``, one call for all weights of the
graph; what follows (activations, dropout, concatenations) runs in the dtype of its inputs, and the outputs are cast back.

Which ops run low is not a list of ours: each op is tried on fake tensors under ``torch.autocast`` for its device, so it follows that
device's own lists. What autocast computes in low precision gets low inputs; what it computes in float32 gets float32 inputs; where
low and float32 values meet, the op's own type promotion holds. In two things the graph is stricter: what follows the last product
(a final sigmoid, a loss) is computed in float32, as the outputs are, and the ops of ``kernels/`` run low only where that pays (``_OURS``);
an interaction whose CPU kernel rounds float32 rows as it reads them is given those.

Parameters stay float32 and get float32 gradients; tables, lookups, their gradients and updates stay float32. Products accumulate in
float32, as in torch. With fp16, gradients may overflow: they arrive infinite, and ``torch.amp.GradScaler`` finds them.
"""
from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree

from ..kernels.cross import matrix, vector
from ..kernels.dense import casts, group
from ..kernels.dense import op as dense
from ..kernels.embedding.op import OP as LOOKUPS
from ..kernels.interaction import cpu as interaction
from ..kernels.interaction.op import DOT_INTERACTION
from ..kernels.mlp import op as mlp
from .graph import Editor, Writes, ancestors, arguments, aten, fetch, is_op, packet_name, stored_tensor, value_of
from .records import APPLIED, DISABLED, SKIPPED, Record, record
from .rule import Context, Pass

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_LOW = (dense.OP, group.OP, mlp.OP)  # ops of ours that compute in the dtype of their inputs
_WEIGHTS = {matrix.OP: (2, 3)}  # ops that take low weights (at these places) and keep everything else in float32
_OURS = {  # why the others take float32
    LOOKUPS: "tables, lookups and their updates stay in float32",
    DOT_INTERACTION: "its CPU kernel computes these pairs in float32, and reads float32 rows without a copy",
    vector.OP: "its time is that of reading memory, not of products, and its sums are exact to float32",
}
_KEPT = "its kernel computes in float32"
_MIX = (aten.cat.default, aten.stack.default, aten.layer_norm.default, aten.batch_norm.default, aten.group_norm.default)


@dataclass
class MixedPrecision(Pass):
    """Run what ``torch.autocast`` would in ``precision``; one record ("ops") for each op that runs low or might have."""

    name: ClassVar[str] = "mixed_precision"
    kind: ClassVar[str] = "ops"
    numerics: ClassVar[str] = "approximate"
    precision: str = "fp32"

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision is {self.precision!r}; it must be one of {', '.join(PRECISIONS)}")

    def run(self, context: Context) -> list[Record]:
        if self.precision == "fp32":
            return []
        if _mode(context.graph) is None:
            first = next(iter(context.graph.nodes))
            reason = "which ops run low depends on dtypes and devices, and they are not known without sample_inputs"
            return [record(self.name, self.kind, SKIPPED, first, reason, subject="")]
        return _Lowering(self, context, PRECISIONS[self.precision]).run()


def lowered(graph: Graph) -> torch.dtype | None:
    """The low dtype that this pass brought into ``graph``, if it did."""
    found = (n.args[1] for n in graph.nodes if is_op(n, casts.OP, aten.to.dtype) and n.meta["origin"].made_by == MixedPrecision.name)
    return next((d for d in found if d != torch.float32), None)  # type: ignore[return-value]


def master(node: Node) -> Node:
    """The float32 parameter that ``node`` is a part of this pass's cast of, or ``node`` itself."""
    if node.target is operator.getitem and is_op(node.args[0], casts.OP):
        return node.args[0].args[0][node.args[1]]  # type: ignore[index,union-attr,return-value]
    return node


def drop_casts(editor: Editor) -> None:
    """Let nobody cast what is no longer read."""
    for node in [n for n in editor.graph.nodes if is_op(n, casts.OP)]:
        for part in [p for p in node.users if not p.users]:
            editor.graph.erase_node(part)
        parts = sorted(node.users, key=lambda part: part.args[1])
        kept = [part.args[1] for part in parts]
        if kept and len(kept) < len(node.args[0]):
            node.meta["val"] = [node.meta["val"][i] for i in kept]
            editor.set_argument(node, 0, [node.args[0][i] for i in kept])
            for place, part in enumerate(parts):
                editor.set_argument(part, 1, place)
    editor.remove_dead()


class _Lowering:
    """One run over a graph. ``low``: nodes whose value was float32 and now is low; values in ``meta["val"]`` follow the changes."""

    def __init__(self, item: MixedPrecision, context: Context, dtype: torch.dtype) -> None:
        self.context, self.item, self.dtype = context, item, dtype
        self.graph, self.root = context.graph, context.root
        self.editor = Editor(context.graph, item.name)
        self.writes = Writes(context.graph, context.root)
        self.mode = _mode(context.graph)
        self.low: set[Node] = set()
        self.casts: dict[tuple[Node, torch.dtype], Node] = {}
        self.weights: dict[Node, list[Node]] = {}  # stored tensors, and who reads them low
        self.records: list[Record] = []
        self.products = {n for n in self.graph.nodes if self._is_product(n)}
        self.before_products = ancestors(self.products)

    def run(self) -> list[Record]:
        for node in list(self.graph.nodes):
            if node.op == "output":
                for given in node.all_input_nodes:
                    if given in self.low:
                        node.replace_input_with(given, self._cast(given, torch.float32, node))
            elif node.op == "call_function":
                self._visit(node)
        self._join_weights()
        return self.records

    def _is_product(self, node: Node) -> bool:
        """Would autocast compute the node in low precision, and nothing else, if all its inputs were float32?"""
        if not isinstance(node.target, torch._ops.OpOverload) or node.target._schema.is_mutable:
            return False
        if node.target.namespace == "tablewright":
            return bool(self._takes_low(node))
        results = [self._try(node, plain=True, autocast=on) for on in (True, False)]
        return all(isinstance(r, Tensor) for r in results) and results[0].dtype == self.dtype != results[1].dtype

    def _takes_low(self, node: Node) -> list[Node]:
        """Which inputs an op of ours takes in low precision."""
        if node.target in _LOW or (node.target is DOT_INTERACTION and self._on_gpu(node)):
            return [n for n in node.all_input_nodes if self._dtypes(n)]
        return [n for i in _WEIGHTS.get(node.target, ()) if isinstance(n := node.args[i], Node)]

    # --- one node ------------------------------------------------------------------------------------------------------------

    def _visit(self, node: Node) -> None:
        floats = [n for n in node.all_input_nodes if self._dtypes(n)]
        lows = [n for n in floats if n in self.low]
        if not floats:
            return
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "tablewright":
            self._ours(node, floats, lows)
        elif node.target is operator.getitem or not isinstance(node.target, torch._ops.OpOverload):
            self._follow(node, lows)
        elif (write := self.writes.to(node)) is not None or node.target._schema.is_mutable:
            self._changed_in_place(node, write or node, lows)
        else:
            self._plain(node, floats, lows)

    def _plain(self, node: Node, floats: list[Node], lows: list[Node]) -> None:
        if node in self.products:
            reason = self._unfit(node, floats)
            if reason is None and self.context.allowed():
                self._lower(node, floats)
                return self._row(APPLIED, node, detail=f"in {self.item.precision}")
            self._row(SKIPPED if reason else DISABLED, node, reason or "beyond the number of rewrites that were asked for")
            return self._raise(node, lows)
        if not lows:
            return None
        if node not in self.before_products:
            if not _is_view(node):
                self._row(SKIPPED, node, "after the last product: outputs and losses are computed in float32")
            return self._raise(node, lows)
        natural, cast = self._try(node), self._try(node, autocast=True)
        if natural is None or (self._is_low(natural) and (cast is None or not self._is_low(cast))):
            on = "torch.autocast computes it in float32" if natural is not None else "it takes inputs of one dtype, and some are float32"
            self._row(SKIPPED, node, on)
            return self._raise(node, lows)
        self._follow(node, lows, natural)
        if not _is_view(node):
            if node in self.low:
                self._row(APPLIED, node, detail=f"in {self.item.precision}, as its inputs")
            elif any(t.dtype == torch.float32 for t in _tensors(natural)):
                self._row(SKIPPED, node, "one of its inputs is float32, and so is its result")
        return None

    def _unfit(self, node: Node, floats: list[Node]) -> str | None:
        other = next((d for n in floats for d in self._dtypes(n) if n not in self.low and d != torch.float32), None)
        if other is not None:
            return f"one of its inputs is {str(other).removeprefix('torch.')} in the plain model; float32 was needed"
        return None

    def _ours(self, node: Node, floats: list[Node], lows: list[Node]) -> None:
        if self._rounds(node):
            return self._round(node, lows)
        wanted = self._takes_low(node)
        if wanted:
            reason = self._unfit(node, wanted)
            if reason is None and self.context.allowed():
                self._raise(node, [n for n in lows if n not in wanted])
                self._lower(node, wanted)
                kept = "" if len(wanted) == len(floats) else ", sums in fp32"
                return self._row(APPLIED, node, detail=f"products in {self.item.precision}{kept}")
            self._row(SKIPPED if reason else DISABLED, node, reason or "beyond the number of rewrites that were asked for")
        elif lows or node.target in _OURS:
            self._row(SKIPPED, node, _OURS.get(node.target, _KEPT))
        return self._raise(node, lows)

    def _rounds(self, node: Node) -> bool:
        """Is it an interaction whose kernel takes float32 rows and rounds them as it reads?"""
        if node.target is not DOT_INTERACTION or self._on_gpu(node):
            return False
        given = arguments(node)
        x = self._value(given["x"])
        return x.dtype == torch.float32 and interaction.rounds(x, given["pairs"], self.dtype)

    def _round(self, node: Node, lows: list[Node]) -> None:
        if not self.context.allowed():
            self._row(DISABLED, node, "beyond the number of rewrites that were asked for")
            return self._raise(node, lows)
        node.kwargs = {**node.kwargs, "dtype": self.dtype}
        with self.mode:
            node.meta["val"] = self._value(node).to(self.dtype)
        self.low.add(node)
        return self._row(APPLIED, node, detail=f"products in {self.item.precision}, rows read in fp32")

    def _changed_in_place(self, node: Node, write: Node, lows: list[Node]) -> None:
        """Memory that is written to stays float32 under all its names: a cast would be another memory."""
        if lows or node in self.products:
            self._row(SKIPPED, node, f"'{write.name}' changes it in place, and what it writes is kept in float32")
        self._raise(node, lows)

    # --- editing -------------------------------------------------------------------------------------------------------------

    def _lower(self, node: Node, inputs: list[Node]) -> None:
        for given in dict.fromkeys(inputs):
            if given not in self.low:
                if self._joins(given):
                    self.weights.setdefault(given, []).append(node)
                else:
                    self._read(node, given, self._cast(given, self.dtype, node))
        self._follow(node, [node])

    def _raise(self, node: Node, lows: list[Node]) -> None:
        """Give the node float32 inputs."""
        for given in dict.fromkeys(lows):
            self._read(node, given, self._cast(given, torch.float32, node))

    def _follow(self, node: Node, lows: list[Node], result: Any = None) -> None:
        """The node runs on its inputs as they now are: note what comes out."""
        if not lows:
            return
        result = self._try(node) if result is None else result
        if result is None:
            raise TypeError(f"{node.target} does not run on inputs of {[str(self._dtypes(n)) for n in node.all_input_nodes]}")
        before, after = _tensors(node.meta.get("val")), _tensors(result)
        if any(a.dtype == self.dtype != b.dtype for b, a in zip(before, after)):
            self.low.add(node)
        node.meta["val"] = result

    def _read(self, node: Node, old: Node, new: Node) -> None:
        self.editor.replace_input(node, old, new)

    def _cast(self, given: Node, dtype: torch.dtype, before: Node) -> Node:
        """``given`` in ``dtype``; made once, unless what it holds is changed in place."""
        if (given, dtype) in self.casts and self.writes.to(given) is None:
            return self.casts[given, dtype]
        with self.mode:
            value = self._value(given).to(dtype)
        made = self.editor.call(aten.to.dtype, given, dtype, before=before, sources=[given], value=value)
        self.casts[given, dtype] = made
        if dtype == self.dtype:
            self.low.add(made)
        return made

    def _joins(self, node: Node) -> bool:
        stored = stored_tensor(node, self.root)
        return stored is not None and stored.dtype == torch.float32 and self.writes.to(node) is None

    def _join_weights(self) -> None:
        """One cast for all stored tensors that are read low, before the first that reads one."""
        names: dict[tuple[str, torch.device], list[Node]] = {}
        for node in self.weights:
            names.setdefault((str(node.target), self._value(node).device), []).append(node)
        for device in dict.fromkeys(device for _, device in names):
            groups = [nodes for (_, d), nodes in names.items() if d == device]
            readers = {reader for nodes in groups for n in nodes for reader in self.weights[n]}
            place = next(n for n in self.graph.nodes if n in readers)
            sources = [nodes[0] for nodes in groups]
            read = [self.editor.attribute(str(n.target), before=place, sources=[n], value=self._value(n)) for n in sources]
            with self.mode:
                values = [self._value(n).to(self.dtype) for n in sources]
            made = self.editor.call(casts.OP, read, self.dtype, before=place, sources=sources, value=values)
            for i, nodes in enumerate(groups):
                part = self.editor.call(operator.getitem, made, i, before=place, sources=nodes, value=values[i])
                for node in nodes:
                    for reader in self.weights[node]:
                        self._read(reader, node, part)
        self.editor.remove_dead()

    def _row(self, status: str, node: Node, reason: str = "", detail: str = "") -> None:
        what = f"{packet_name(node)}: {detail}" if detail else ""
        self.records.append(record(self.item.name, self.item.kind, status, node, reason, what))

    # --- trying --------------------------------------------------------------------------------------------------------------

    def _value(self, node: Node) -> Any:
        value = node.meta.get("val")
        if node.op == "get_attr" and not hasattr(value, "fake_mode"):
            value = fetch(self.root, str(node.target))
            if isinstance(value, Tensor):
                value = self.mode.from_tensor(value.detach(), static_shapes=True)
        return value

    def _dtypes(self, node: Node) -> list[torch.dtype]:
        """Of the floating tensors that the node holds."""
        return [t.dtype for t in _tensors(self._value(node)) if t.dtype.is_floating_point]

    def _is_low(self, value: Any) -> bool:
        return any(t.dtype == self.dtype for t in _tensors(value))

    def _on_gpu(self, node: Node) -> bool:
        value = value_of(node)
        return value is not None and value.device.type == "cuda"

    def _try(self, node: Node, *, plain: bool = False, autocast: bool = False) -> Any:
        """The node's value on fake inputs, or ``None`` where it does not run. ``plain``: as if all inputs were float32. Stored tensors that
        will be cast are taken low."""

        def fake(given: Node) -> Any:
            value = self._value(given)
            if plain and isinstance(value, Tensor) and value.dtype.is_floating_point:
                return value.to(torch.float32)
            if not plain and node in self.weights.get(given, ()):
                return value.to(self.dtype)
            return value

        device = next((t.device.type for n in node.all_input_nodes for t in _tensors(self._value(n))), "cpu")
        try:
            with self.mode, torch.no_grad(), torch.autocast(device, self.dtype, enabled=autocast, cache_enabled=False):
                args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), fake)
                return node.target(*args, **kwargs) if plain or autocast or _mixes(node.target, _tensors((args, kwargs))) else None
        except Exception:  # whatever an op says of inputs of several dtypes
            return None


def _mixes(target: Any, inputs: list[Tensor]) -> bool:
    """May the op have inputs of several floating dtypes? Fake tensors do not always say: ``index_add`` refuses real ones only."""
    several = len({t.dtype for t in inputs if t.dtype.is_floating_point}) > 1
    free = not isinstance(target, torch._ops.OpOverload) or target in _MIX or target in _WEIGHTS
    return not several or free or torch.Tag.pointwise in target.tags


def _mode(graph: Graph) -> Any:
    """The mode of the graph's fake values, if there are any."""
    return next((v.fake_mode for n in graph.nodes if hasattr(v := n.meta.get("val"), "fake_mode")), None)


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _is_view(node: Node) -> bool:
    return any(r.alias_info for r in node.target._schema.returns)
