"""Recognise lookups in ATen form: which node reads which table with which ids, or why a node that reads one is left alone.

Forms: ``aten.embedding`` (nn.Embedding, F.embedding), ``aten.embedding_bag`` (nn.EmbeddingBag, F.embedding_bag),
``aten.index_select(weight, 0, ids)``, ``weight[ids]``, ``tablewright.embedding_int8`` of tables that a plan stores so and, made by
PoolSequences, ``tablewright.embedding_pool``.
"""
from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node

from ..kernels.embedding.int8_rows import OP as INT8
from ..kernels.embedding.op import OP
from ..kernels.embedding.pooled import POOL
from ..kernels.max_pool.op import OP as MAX
from ..kernels.memory import is_one_row
from .graph import Writes, arguments, aten, is_op, packet_name, stored_tensor, value_of
from .records import Skip, skip

BAG_OPS = (aten.embedding_bag.default, aten.embedding_bag.padding_idx)
_MODES = {0: "sum", 1: "mean"}
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class LookupNode:
    """One lookup of the plain graph. ``result`` is the node whose value is the looked-up rows (a bag's ``getitem``)."""

    node: Node
    result: Node | None
    table: Node
    ids: Node
    offsets: Node | None
    sample_weights: Node | None
    pooling: str
    padding_idx: int | None
    include_last_offset: bool
    wrap_negative: bool
    sparse: bool
    padding_read: bool = False


def read_lookup(node: Node, root: nn.Module, writes: Writes | None, largest: bool = False) -> LookupNode | Skip | None:
    """The lookup that ``node`` makes, a :class:`Skip` if it makes one that cannot be fused, ``None`` if it makes none.

    ``writes``: what the forward itself writes to; ``None`` if it does not matter. ``largest``: bags may also take the largest value."""
    if node.op != "call_function":
        return None
    if node.target is aten.embedding.default:
        found = _embedding(node)
    elif node.target in BAG_OPS:
        found = _bag(node, root, largest)
    elif is_op(node, aten.index_select.default, aten.index.Tensor):
        found = _indexed(node, root)
    elif node.target is POOL:
        found = _pool(node)
    elif node.target is INT8:
        found = _int8(node)
    else:
        return None
    if isinstance(found, LookupNode):
        return _unfit(found, root, writes) or found
    return found


def tables_read(graph: Graph, root: nn.Module) -> dict[str, Tensor]:
    """The stored tensors that lookups of any form read, fused or not, by the plain model's first name for them."""
    found = {}
    for node in graph.nodes:
        if is_op(node, aten.embedding.default, *BAG_OPS, MAX) or isinstance(read_lookup(node, root, None), LookupNode):
            tensor = stored_tensor(node.args[0], root)
            if tensor is not None:
                found[id(tensor)] = tensor
        elif node.target is OP:
            found.update((id(t), t) for t in (stored_tensor(a, root) for a in node.args[0]) if t is not None)
    named = [*root.named_parameters(), *root.named_buffers()]
    return {name: tensor for name, tensor in named if id(tensor) in found}


def _embedding(node: Node) -> LookupNode | Skip:
    a = arguments(node)
    if a["scale_grad_by_freq"]:
        return skip("scale_grad_by_freq=True; the fused backward does not count ids", at=node)
    padding = None if a["padding_idx"] == -1 else a["padding_idx"]
    return LookupNode(node, node, a["weight"], a["indices"], None, None, "none", padding, False, False, bool(a["sparse"]))


def _bag(node: Node, root: nn.Module, largest: bool) -> LookupNode | Skip:
    a = arguments(node)
    if a["scale_grad_by_freq"]:
        return skip("scale_grad_by_freq=True; the fused backward does not count ids", at=node)
    readers = list(node.users)
    if any(not is_op(u, operator.getitem) or (u.args[1] != 0 and u.users) for u in readers):
        return skip("more than the pooled rows of embedding_bag is read (its bag sizes, say)", at=node)
    if a["mode"] not in _MODES and not largest:
        return skip("mode='max'; the fused lookup sums and averages only", at=node)
    result = next((u for u in readers if u.args[1] == 0), None)
    padding, weight = a.get("padding_idx"), stored_tensor(a["weight"], root)
    if padding is not None and padding < 0 and weight is not None:
        padding += weight.shape[0]
    ids, offsets, weights = _without_arange(a["indices"], a["offsets"], a["per_sample_weights"])
    return LookupNode(
        node, result, a["weight"], ids, offsets, weights, _MODES.get(a["mode"], "max"), padding, bool(a["include_last_offset"]), False,
        bool(a["sparse"]),
    )  # fmt: skip


def _pool(node: Node) -> LookupNode:
    a = arguments(node)
    padding = None if a["padding_idx"] < 0 else a["padding_idx"]
    return LookupNode(
        node, node, a["weight"], a["ids"], None, a["sample_weights"], "sum", padding, False, a["wrap_negative"], a["sparse"],
        a["padding_read"],
    )  # fmt: skip


def _int8(node: Node) -> LookupNode:
    a = arguments(node)
    padding = None if a["padding_idx"] < 0 else a["padding_idx"]
    return LookupNode(
        node, node, a["table"], a["ids"], a["offsets"], a["sample_weights"], a["pooling"], padding, a["include_last_offset"], False, False,
    )  # fmt: skip


def _indexed(node: Node, root: nn.Module) -> LookupNode | Skip | None:
    table: object
    if is_op(node, aten.index_select.default):
        table, dim, ids = node.args[0], node.args[1], node.args[2]
        if dim != 0:
            return None
    else:
        table, indices = node.args[0], node.args[1]
        if not isinstance(indices, (list, tuple)) or len(indices) != 1:
            return None
        ids = indices[0]
    weight = stored_tensor(table, root)
    if weight is None or weight.dim() != 2 or not weight.is_floating_point() or not isinstance(ids, Node):
        return None
    known = value_of(ids)
    if known is None:
        return skip("weight[ids] may be a lookup or a mask; the dtype of ids is known only with sample_inputs", at=node)
    if known.dtype not in (torch.int32, torch.int64):
        return None
    wraps = is_op(node, aten.index.Tensor)
    return LookupNode(node, node, table, ids, None, None, "none", None, False, wraps, False)  # type: ignore[arg-type]


def _unfit(found: LookupNode, root: nn.Module, writes: Writes | None) -> Skip | None:
    weight = stored_tensor(found.table, root)
    if weight is None:
        made = packet_name(found.table) or found.table.op
        return skip(f"its table is computed in the graph by {made}; only a stored table can be read in place", at=found.node)
    if weight.dtype not in (*_DTYPES, *((torch.uint8,) if found.node.target in (INT8, POOL) else ())):
        return skip(f"its table is {weight.dtype}; fp32, fp64, fp16 or bf16 is needed", at=found.node)
    if weight.dim() != 2 or weight.layout != torch.strided or not (weight.is_contiguous() or is_one_row(weight)):
        return skip("its table is not a contiguous [rows, dim] tensor", at=found.node)
    if writes is None:
        return None
    writer = writes.to(found.table)
    if writer is not None:
        return skip(f"its table is changed inside the forward by {packet_name(writer)} (max_norm, say)", at=found.node)
    for part in (found.ids, found.offsets, found.sample_weights, found.result):
        writer = writes.to(part)
        if writer is not None:
            return skip(f"{packet_name(writer)} changes its ids, weights or result in place", at=writer)
    return None


def _without_arange(ids: Node, offsets: Node | None, weights: Node | None):
    """F.embedding_bag turns ids ``[B, L]`` into flat ids and ``offsets = arange(0, B * L, L)``: read it as ``[B, L]`` again."""
    source = _flattened(ids)
    if source is None or not isinstance(offsets, Node) or not is_op(offsets, aten.arange.start_step):
        return ids, offsets, weights
    known = value_of(source)
    if known is not None and known.dim() != 2:
        return ids, offsets, weights
    start, step = offsets.args[0], offsets.args[2] if len(offsets.args) > 2 else 1
    by_size = is_op(step, aten.sym_size.int) and step.args[0] is source and step.args[1] == 1  # type: ignore[union-attr]
    # A number is the length only where export fixed it; in a graph that was traced all sizes are numbers, and equal by accident.
    fixed = known is not None and isinstance(known.shape[1], int) and not isinstance(known.shape[0], int)
    by_number = fixed and isinstance(step, int) and known.shape[1] == step  # type: ignore[union-attr]
    if start != 0 or not (by_size or by_number):
        return ids, offsets, weights
    if weights is None:
        return source, None, None
    matrix = _flattened(weights)
    return (source, None, matrix) if matrix is not None else (ids, offsets, weights)


def _flattened(node: Node) -> Node | None:
    """``x`` if ``node`` is ``x`` as one flat dimension."""
    if is_op(node, aten.reshape.default, aten.view.default) and list(node.args[1]) == [-1]:  # type: ignore[arg-type]
        return node.args[0]  # type: ignore[return-value]
    known = value_of(node)
    if is_op(node, aten.reshape.default, aten.view.default, aten.flatten.using_ints) and known is not None and known.dim() == 1:
        source = value_of(node.args[0])
        if source is not None and isinstance(source, Tensor) and source.dim() == 2:
            return node.args[0]  # type: ignore[return-value]
    return None
