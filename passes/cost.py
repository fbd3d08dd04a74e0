"""What a node costs: bytes moved, floating-point operations, bytes sent to other ranks. From shapes alone; nothing is run.

Read by whatever schedules, plans or draws a graph. A node's tensors count once each: what it reads and what it writes. Views, sizes
and stored tensors cost nothing; a lookup reads its ids and one row for each id, not its table. A multiplication and an addition are
two operations; matrix products inside composite ops (``einsum``, attention) are counted by torch's own flop counter on meta tensors.
The result is an estimate: caches, duplicate ids and fusion by a compiler are not in it.
"""
from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from ..kernels.embedding.int8_rows import OP as INT8
from ..kernels.embedding.op import OP
from ..kernels.embedding.pooled import POOL, ROW_SUMS
from ..kernels.embedding.spec import decode
from ..kernels.interaction.pairs import decode as decode_pairs
from ..kernels.max_pool.op import OP as MAX
from .graph import arguments, aten, is_op, stored_tensor
from .lookups import BAG_OPS

KEY = "cost"  # node.meta[KEY]: a Cost that the pass that made the node knows better (sizes that depend on the data)
_ops = torch.ops.tablewright
_wire = torch.ops._c10d_functional
_LOOKUPS = (aten.embedding.default, *BAG_OPS, POOL, INT8, MAX, ROW_SUMS, OP)


@dataclass(frozen=True)
class Rates:
    """How fast one rank is. ``memory``: bytes/s; ``flops``: operations/s in the model's dtype; ``wire``: bytes/s that one rank sends, and
    ``inside`` to ranks of its node (0: the same); ``call``: seconds that any call takes; ``message``: seconds that any collective takes."""

    memory: float
    flops: float
    wire: float
    call: float = 0.0
    message: float = 0.0
    inside: float = 0.0


@dataclass(frozen=True)
class Cost:
    """``read`` and ``written``: bytes of this rank's memory. ``flops``: operations. ``wire``: bytes sent to other ranks in
    ``messages`` collectives, without those that are known to stay ``inside`` the node. ``calls``: ops that run."""

    read: float = 0.0
    written: float = 0.0
    flops: float = 0.0
    wire: float = 0.0
    calls: int = 0
    messages: int = 0
    inside: float = 0.0

    @property
    def moved(self) -> float:
        """Bytes of memory read and written."""
        return self.read + self.written

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.read + other.read, self.written + other.written, self.flops + other.flops, self.wire + other.wire,
            self.calls + other.calls, self.messages + other.messages, self.inside + other.inside,
        )  # fmt: skip

    def seconds(self, rates: Rates) -> float:
        """The time of one call: memory and arithmetic overlap, so the longer counts (the roofline), and so do the links inside and
        between nodes; the wire comes on top."""
        local = max(self.moved / rates.memory, self.flops / rates.flops) + self.calls * rates.call
        return local + max(self.wire / rates.wire, self.inside / (rates.inside or rates.wire)) + self.messages * rates.message


FREE = Cost()


def node_cost(node: Node, root: nn.Module) -> Cost | None:
    """What the forward of ``node`` costs, at the sizes of the sample; ``None`` where a shape is not known (no sample inputs, or a
    size that only the data decides). ``root`` holds the stored tensors."""
    if KEY in node.meta:
        return node.meta[KEY]
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload) or _is_view(node):
        return FREE
    if node.target is _wire.wait_tensor.default:
        return FREE
    taken = [_facts(n, root) for n in _arguments(node)]
    made = _results(node, root)
    if made is None or any(t is None for t in taken):
        return None
    read, written = (sum(size for _, _, size in side) for side in (taken, made))  # type: ignore[misc]
    if node.target in _COLLECTIVES:
        return Cost(read, written, 0.0, _COLLECTIVES[node.target](read, written, _group_size(node)), 1, 1)
    if node.target in _LOOKUPS:
        return _lookup(node, root, written)
    flops = _flops(node, root)
    return None if flops is None else Cost(read, written, flops, calls=1)


def backward_cost(node: Node, root: nn.Module) -> Cost | None:
    """What the backward of ``node`` costs: it reads the gradient of what the node made and what the node read, and writes a gradient
    for each input that needs one. A lookup's also reads and writes each row that was looked up; optimizer state is not counted."""
    forward = node_cost(node, root)
    if forward is None or forward == FREE:
        return forward
    if forward.messages:
        return forward
    if node.target in _LOOKUPS:
        trained = any(t.requires_grad for t in _tables(node, root))
        rows = forward.read
        return Cost(forward.written + rows, rows, forward.flops, calls=1) if trained else FREE
    wanted = [n for n in _arguments(node) if _needs_grad(n, root)]
    if not wanted:
        return FREE
    size = sum(facts[2] for n in wanted if (facts := _facts(n, root)) is not None)
    matrices = sum(len(facts[0]) > 1 for n in wanted if (facts := _facts(n, root)) is not None)
    factor = matrices if _is_product(node) else 1  # a product for each factor; a bias is only summed
    return Cost(forward.written + forward.read, size, forward.flops * factor, calls=1)


def graph_cost(graph: Graph, root: nn.Module, *, backward: bool = False, skip: Iterable[Node] = ()) -> tuple[Cost, list[Node]]:
    """The sum over ``graph`` (forward, or forward and backward) without ``skip``, and the nodes whose cost is not known."""
    left_out, unknown, total = set(skip), [], FREE
    for node in graph.nodes:
        if node in left_out:
            continue
        parts = [node_cost(node, root), *([backward_cost(node, root)] if backward else [])]
        if any(p is None for p in parts):
            unknown.append(node)
        for part in parts:
            total = total + (part or FREE)
    return total, unknown


# --- sizes -------------------------------------------------------------------------------------------------------------------

_Facts = tuple[tuple[int, ...], torch.dtype, int]  # shape, dtype, bytes


def _number(size: Any) -> int | None:
    return (size.node.hint if size.node.has_hint() else None) if isinstance(size, torch.SymInt) else size


def _of_tensor(value: Tensor) -> _Facts | None:
    shape = [_number(s) for s in value.shape]
    if any(s is None for s in shape):
        return None
    return tuple(shape), value.dtype, math.prod(shape) * value.element_size()  # type: ignore[arg-type]


def _facts(node: Node, root: nn.Module) -> _Facts | None:
    """Shape, dtype and bytes of the tensor that ``node`` is, ``((), int64, 0)`` for a number, ``None`` if not known."""
    value = stored_tensor(node, root)
    value = node.meta.get("val") if value is None else value
    if isinstance(value, Tensor):
        return _of_tensor(value)
    return None if value is None and node.op != "get_attr" else ((), torch.int64, 0)


def _results(node: Node, root: nn.Module) -> list[_Facts] | None:
    value = node.meta.get("val")
    if value is None:
        schema = node.target._schema  # type: ignore[union-attr]
        return [] if not schema.returns else None
    parts = value if isinstance(value, (list, tuple)) else [value]
    parts = parts[:1] if node.target in BAG_OPS else parts  # what is beside the pooled rows is for the plain backward
    found = [_of_tensor(v) for v in parts if isinstance(v, Tensor)]
    return None if any(f is None for f in found) else found  # type: ignore[return-value]


def _arguments(node: Node) -> list[Node]:
    """The nodes that ``node`` reads, each once."""
    return list(dict.fromkeys(node.all_input_nodes))


def _is_view(node: Node) -> bool:
    schema = node.target._schema  # type: ignore[union-attr]
    return not schema.is_mutable and any(r.alias_info for r in schema.returns)


def _needs_grad(node: Node, root: nn.Module) -> bool:
    stored = stored_tensor(node, root)
    if stored is not None:
        return stored.requires_grad
    value = node.meta.get("val")
    parts = value if isinstance(value, (list, tuple)) else [value]
    floats = any(isinstance(v, Tensor) and v.dtype.is_floating_point for v in parts)
    return floats and node.op == "call_function"


# --- lookups -----------------------------------------------------------------------------------------------------------------


def _tables(node: Node, root: nn.Module) -> list[Tensor]:
    named = node.args[0] if node.target is OP else [node.args[0]]
    return [t for n in named if (t := stored_tensor(n, root)) is not None]  # type: ignore[union-attr]


def _lookup(node: Node, root: nn.Module, written: float) -> Cost | None:
    """Ids, offsets, weights and extras once, one row for each id."""
    tables = _tables(node, root)
    if node.target is OP:
        spec, all_ids = decode(node.args[5]), node.args[1]  # type: ignore[arg-type]
        pairs = [(tables[lookup.table], ids) for lookup, ids in zip(spec.lookups, all_ids)] if len(tables) == len(spec.tables) else None
    else:
        pairs = [(tables[0], arguments(node)["indices" if node.target in (aten.embedding.default, *BAG_OPS) else "ids"])] if tables else None
    if pairs is None:  # tables that the graph makes: no rows to count
        return None
    rows = flops = 0.0
    for table, ids in pairs:
        facts = _facts(ids, root)
        if facts is None:
            return None
        count = math.prod(facts[0])
        rows += count * table.shape[1] * table.element_size()
        flops += count * table.shape[1]
    held = {id(t) for t in tables}
    others = [_facts(n, root) for n in _arguments(node) if id(stored_tensor(n, root)) not in held]
    if any(o is None for o in others):
        return None
    return Cost(rows + sum(o[2] for o in others if o), written, flops, calls=1)


# --- arithmetic --------------------------------------------------------------------------------------------------------------


def _flops(node: Node, root: nn.Module) -> float | None:
    if node.target in _FORMULAS:
        found = {name: _shapes(value, root) for name, value in arguments(node).items()}
        return float(_FORMULAS[node.target](found, node))
    products = 0.0
    if _may_multiply(node.target):
        shape_of = functools.partial(_facts, root=root)
        key = torch.fx.node.map_arg((node.args, tuple(sorted(node.kwargs.items()))), shape_of)
        counted = _counted(node, key, root)
        if counted is None:
            return None
        products = counted
    sizes = [math.prod(f[0]) for f in (*(_facts(n, root) for n in _arguments(node)), *(_results(node, root) or [])) if f]
    return products or float(max(sizes, default=0))


def _may_multiply(target: Any) -> bool:
    """Is there a matrix product or convolution in it? Counted ones, and composites, which only their parts can tell."""
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), "CompositeImplicitAutograd")
    return target.namespace == "aten" and (target.overloadpacket in flop_registry or composite)


def _counted(node: Node, key: Any, root: nn.Module) -> float | None:
    cache = _COUNTS.setdefault(node.target, {})
    text = repr(key)
    if text not in cache:

        def blank(n: Node) -> Any:
            facts = _facts(n, root)
            value = n.meta.get("val")
            if facts is None or not (isinstance(value, Tensor) or stored_tensor(n, root) is not None):
                return _number(value) if facts is not None else None
            return torch.empty(facts[0], dtype=facts[1], device="meta")

        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), blank)
        try:
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                node.target(*args, **kwargs)  # type: ignore[operator]
            cache[text] = float(counter.get_total_flops())
        except Exception:  # needs values (ids, masks): no product that shapes could tell
            cache[text] = 0.0
    return cache[text]


_COUNTS: dict[Any, dict[str, float]] = {}


def _is_product(node: Node) -> bool:
    return node.target in _PRODUCTS or (isinstance(node.target, torch._ops.OpOverload) and _may_multiply(node.target))


def _shapes(value: Any, root: nn.Module) -> Any:
    """Shapes in place of nodes."""
    if isinstance(value, Node):
        facts = _facts(value, root)
        return facts[0] if facts else ()
    return [_shapes(v, root) for v in value] if isinstance(value, (list, tuple)) else value


def _dense(a: Mapping[str, Any], node: Node) -> float:
    return 2 * math.prod(a["x"]) * a["weight"][0]


def _dense_group(a: Mapping[str, Any], node: Node) -> float:
    return sum(2 * math.prod(a["x"]) * w[0] for w in a["weights"])


def _pairs(a: Mapping[str, Any], node: Node) -> float:
    batch, _, dim = a["x"]
    return len(decode_pairs(a["pairs"])) * batch * dim


_FORMULAS: dict[Any, Callable[[Mapping[str, Any], Node], float]] = {
    _ops.dense.default: _dense,
    _ops.dense_group.default: _dense_group,
    _ops.cross.default: lambda a, node: math.prod(a["x"]) * (2 * a["weight"][0] + 4),
    _ops.cross_vector.default: lambda a, node: math.prod(a["x0"]) * (2 * len(a["weights"]) + 2),
    _ops.dot_interaction.default: lambda a, node: 2 * _pairs(a, node),
    _ops.pair_products.default: _pairs,
    _ops.fm.default: lambda a, node: 3 * math.prod(a["x"]),
}
_PRODUCTS = (_ops.dense.default, _ops.dense_group.default, _ops.cross.default)


# --- collectives -------------------------------------------------------------------------------------------------------------

# Bytes that each rank sends, of the bytes it puts in and gets out, with n ranks: the minimum that any algorithm needs.
_COLLECTIVES: dict[Any, Callable[[float, float, int], float]] = {
    _wire.all_to_all_single.default: lambda taken, made, n: taken * (n - 1) / n,
    _wire.reduce_scatter_tensor.default: lambda taken, made, n: taken * (n - 1) / n,
    _wire.all_gather_into_tensor.default: lambda taken, made, n: made * (n - 1) / n,
    _wire.all_reduce.default: lambda taken, made, n: 2 * taken * (n - 1) / n,
}


def _group_size(node: Node) -> int:
    found = arguments(node)
    if isinstance(found.get("group_size"), int):
        return found["group_size"]
    return torch.distributed.distributed_c10d._get_group_size_by_name(found["group_name"])


def is_collective(node: Node) -> bool:
    """Does ``node`` start an exchange with other ranks?"""
    return is_op(node, *_COLLECTIVES)
