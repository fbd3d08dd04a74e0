"""Read off a model and a sample batch what a planner needs: the tables, how they are read, and what the dense part costs.

Nothing of the model's size is allocated: a model on the meta device is captured over tensors of zeros that take address space and no
memory (pages are made where something is written, and a capture only reads). The sample is what one rank sees in one step.
"""
from __future__ import annotations

import math
import mmap
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.optim import Optimizer

from ...kernels.codecs.op import row_bytes
from ...passes.cost import Cost, graph_cost, node_cost
from ...passes.graph import Writes, ancestors, fetch, packet_name, stored_tensor
from ...passes.lookups import LookupNode, read_lookup, tables_read
from ...passes.mixed_precision import PRECISIONS
from ...passes.pool_sequences import PoolSequences
from ...passes.records import Skip
from ...passes.rule import Context
from ..capture import CAPTURING, capture, clone_shell
from ..errors import PlanError
from ..optimizer_plan import EmbeddingOptimizer
from ..plan import Plan, TablePlan
from ..samples import Samples
from ..verify import copy_graph
from .facts import TableFacts, with_ids, with_law

# Bytes of state for each value and for each row; by the plan's word and by the class of a torch optimizer.
_STATE = {"sgd": (0, 0), "adagrad": (4, 0), "rowwise_adagrad": (0, 4), "adam": (8, 0)}
_TORCH_STATE = {"SGD": "sgd", "Adagrad": "adagrad", "Adam": "adam", "AdamW": "adam", "SparseAdam": "adam", "RowwiseAdagrad": "rowwise_adagrad"}


@dataclass(frozen=True)
class ModelFacts:
    """``tables`` with what the plan says of each (``wishes``, resolved). ``samples``: rows of the batch. The dense part's cost in a
    ``forward`` and ``backward`` of one rank, the bytes of its gradients, and the bytes that it holds with gradients, optimizer state and
    activations. ``notes``: what was assumed."""

    tables: list[TableFacts]
    wishes: dict[str, TablePlan]
    samples: int
    forward: Cost = Cost()
    backward: Cost = Cost()
    gradients: float = 0.0
    held: float = 0.0
    notes: list[str] = field(default_factory=list)


def read_model(
    model: nn.Module, sample_inputs: Any, sample_kwargs: Mapping[str, Any] | None = None, *, plan: Plan | None = None,
    optimizer: Optimizer | str | None = None,
) -> ModelFacts:  # fmt: skip
    """The facts of ``model`` at ``sample_inputs`` (one rank's batch). ``plan``: constraints, and optimizers of tables. ``optimizer``: the
    user's own, or its name. Raises :class:`PlanError` without inputs, or where the model is not one graph; what capture raises."""
    plan = plan or Plan()
    samples = Samples.read(sample_inputs, sample_kwargs)
    if samples.args is None:
        raise PlanError("sample_inputs is None; the planner counts ids and sizes on one rank's batch, so it needs one")
    shell = clone_shell(model)
    empty_buffers = _give_address_space(shell)
    with CAPTURING:
        captured = capture(shell, [pytree.tree_map(_with_memory, (samples.args, samples.kwargs))])
    if captured.program is not None:
        raise PlanError(f"the model was captured by {captured.door} and not as one graph, and only one graph can be sharded: {'; '.join(captured.notes)}")
    context = Context(copy_graph(captured.graph), shell)
    PoolSequences().run(context)
    graph = context.graph
    leaves = captured.guards.flatten(samples.args, samples.kwargs or {})
    notes = ["buffers of a meta model hold no values: ids that are computed from them are counted as if they were zero"] if empty_buffers else []
    every = tables_read(graph, shell)
    wishes = plan.resolve(every, _aliases(shell, every))
    reads, others = _lookups(graph, shell)
    ids = _evaluate(graph, shell, leaves, [n for found in reads.values() for r in found for n in (r.ids, r.offsets) if n is not None])
    tables = []
    for name, table in every.items():
        wish, key = wishes[name], id(table)
        if key in others and wish.sharding not in (None, "data_parallel"):
            raise PlanError(f"table '{name}' cannot be {wish.sharding}: {others[key]}. Only fused lookups can be exchanged; say data_parallel")
        if key in others:
            wishes[name] = TablePlan(**{**vars(wish), "sharding": "data_parallel", "ranks": None})
            notes.append(f"'{name}' is data_parallel: {others[key]}")
        tables.append(_table(name, table, reads.get(key, []), ids, wish, optimizer))
    forward, unknown = graph_cost(graph, shell, skip=[r.node for found in reads.values() for r in found])
    both, _ = graph_cost(graph, shell, backward=True, skip=[r.node for found in reads.values() for r in found])
    if unknown:
        notes.append(f"of {len(unknown)} ops the cost is not known ({', '.join(sorted({packet_name(n) for n in unknown})[:4])})")
    notes += sorted({t.assumed for t in tables if t.assumed})
    in_tables = {id(t) for t in every.values()}
    dense = [p for p in shell.parameters() if id(p) not in in_tables]
    trained = float(sum(p.numel() * p.element_size() for p in dense if p.requires_grad))
    per_value, _ = _STATE[_state_kind(optimizer) or "adagrad"]
    made = sum(c.written for n in graph.nodes if (c := node_cost(n, shell)) is not None)
    held = float(sum(p.numel() * p.element_size() for p in dense)) + trained + sum(p.numel() for p in dense if p.requires_grad) * per_value + made
    backward = Cost(*(b - f for b, f in zip(_numbers(both), _numbers(forward))))  # type: ignore[arg-type]
    rows = next((leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()), 0)
    return ModelFacts(tables, wishes, rows, forward, backward, trained, held, notes)


def _numbers(cost: Cost) -> tuple:
    return cost.read, cost.written, cost.flops, cost.wire, cost.calls, cost.messages, cost.inside


# --- a model without memory --------------------------------------------------------------------------------------------------


def _give_address_space(shell: nn.Module) -> bool:
    """Zeros that take no memory in place of meta tensors; True if buffers were among them."""
    made: dict[int, Tensor] = {}
    buffers = False
    for module in shell.modules():
        for home in (module._parameters, module._buffers):
            for name, tensor in home.items():
                if tensor is not None and tensor.is_meta:
                    home[name] = made.setdefault(id(tensor), _zeros_like(tensor))
                    buffers |= home is module._buffers
    return buffers


def _with_memory(value: Any) -> Any:
    """A tensor of zeros for one on the meta device."""
    return torch.zeros_like(value, device="cpu") if isinstance(value, Tensor) and value.is_meta else value


def _zeros_like(tensor: Tensor) -> Tensor:
    count = max(tensor.numel() * tensor.element_size(), 1)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | (0x40 if sys.platform == "darwin" else 0x4000)  # MAP_NORESERVE, in mmap since 3.12
    flat = torch.frombuffer(mmap.mmap(-1, count, flags=flags), dtype=torch.uint8)[: tensor.numel() * tensor.element_size()]
    zeros = flat.view(tensor.dtype).view(tensor.shape)
    return nn.Parameter(zeros, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else zeros


# --- lookups -----------------------------------------------------------------------------------------------------------------


def _aliases(shell: nn.Module, tables: Mapping[str, Tensor]) -> dict[str, list[str]]:
    first = {id(t): name for name, t in tables.items()}
    found: dict[str, list[str]] = {}
    for name, param in shell.named_parameters(remove_duplicate=False):
        if id(param) in first:
            found.setdefault(first[id(param)], []).append(name)
    return found


def _lookups(graph: Graph, shell: nn.Module) -> tuple[dict[int, list[LookupNode]], dict[int, str]]:
    """By table: the lookups that can be exchanged, and why a table must stay whole."""
    writes = Writes(graph, shell)
    reads: dict[int, list[LookupNode]] = {}
    others: dict[int, str] = {}
    exchanged: set[Node] = set()
    for node in graph.nodes:
        found = read_lookup(node, shell, writes)
        if isinstance(found, LookupNode):
            reads.setdefault(id(stored_tensor(found.table, shell)), []).append(found)
            exchanged.add(node)
        elif isinstance(found, Skip):
            for argument in node.all_input_nodes:
                tensor = stored_tensor(argument, shell)
                if tensor is not None:
                    others[id(tensor)] = f"a lookup of it is not fused ({found.reason})"
    for node in graph.nodes:
        tensor = stored_tensor(node, shell)
        if tensor is None or id(tensor) not in reads:
            continue
        other = next((u for u in node.users if u not in exchanged), None)
        if other is not None:
            others.setdefault(id(tensor), f"{packet_name(other) or other.op} reads it as a whole")
    return reads, others


def _evaluate(graph: Graph, shell: nn.Module, leaves: list, wanted: list[Node]) -> dict[Node, Tensor]:
    """The values of ``wanted`` on the sample, as far as they can be computed here."""
    needed = ancestors(wanted)
    inputs = iter(leaves)
    values: dict[Node, Any] = {}
    with torch.no_grad(), torch.random.fork_rng():
        for node in graph.nodes:
            if node.op == "placeholder":
                values[node] = next(inputs)
            elif node.op == "get_attr":
                values[node] = fetch(shell, str(node.target)) if node in needed else None
            elif node in needed and node.op == "call_function" and all(i in values for i in node.all_input_nodes):
                args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
                try:
                    values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
                except Exception:  # values that a meta input does not have
                    continue
    return {n: v for n in wanted if isinstance(v := values.get(n), Tensor) and not v.is_meta}


def _table(name: str, table: Tensor, reads: list[LookupNode], ids: dict[Node, Tensor], wish: TablePlan, optimizer) -> TableFacts:
    rows, dim = int(table.shape[0]), math.prod(table.shape[1:])
    trained = table.requires_grad and wish.trainable is not False
    kind = wish.embedding_optimizer.key if isinstance(wish.embedding_optimizer, EmbeddingOptimizer) else _state_kind(optimizer)
    assumed = "" if kind or not trained else "no optimizer was given: tables are counted with AdaGrad's state"
    per_value, per_row = _STATE[kind or "adagrad"] if trained else (0, 0)
    itemsize = table.element_size() if wish.dtype is None else 1 if wish.dtype == "int8" else PRECISIONS[wish.dtype].itemsize
    per_row += row_bytes("int8", 1) - 1 if wish.dtype == "int8" else 0
    more = {"itemsize": itemsize, "state": per_value, "row_state": per_row, "trained": trained, "assumed": assumed}
    drawn, bags, unknown = [], 0.0, 0.0
    for read in reads:
        shape = _shape(read.ids, ids)
        count = math.prod(shape)
        if read.pooling == "none":
            bags += count
        elif read.offsets is not None:
            bags += math.prod(_shape(read.offsets, ids)) - (1 if read.include_last_offset else 0)
        else:
            bags += shape[0] if shape else 0
        if read.ids in ids:
            flat = ids[read.ids].reshape(-1)
            left_out = None if read.pooling == "none" or read.padding_read else read.padding_idx
            flat = flat if left_out is None else flat[flat != left_out]
            drawn.append(flat.cpu().numpy())
        else:
            unknown += count
    more["pooled"] = any(r.pooling != "none" for r in reads)
    if unknown or not reads:
        more["assumed"] = more["assumed"] or "ids that the sample does not show are counted as uniform"
        return with_law(name, rows, dim, unknown + sum(map(len, drawn)), bags, **more)
    return with_ids(name, rows, dim, [np.asarray(d) for d in drawn], bags, **more)


def _shape(node: Node, values: dict[Node, Tensor]) -> tuple[int, ...]:
    value = values.get(node)
    value = node.meta.get("val") if value is None else value
    if not isinstance(value, Tensor):
        return ()
    return tuple(s.node.hint if isinstance(s, torch.SymInt) else s for s in value.shape)


def _state_kind(optimizer: Optimizer | str | None) -> str | None:
    """The plan's word for an optimizer that keeps as much state; Adam's for those not known."""
    if optimizer is None:
        return None
    name = optimizer if isinstance(optimizer, str) else type(optimizer).__name__
    if name.lower() in _STATE:
        kind = name.lower()
    else:
        kind = _TORCH_STATE.get(name, "adam")
    momentum = isinstance(optimizer, torch.optim.SGD) and any(g.get("momentum") for g in optimizer.param_groups)
    return "adagrad" if momentum else kind
