"""State of a model over several ranks under plain names: state_dict, checkpoints that other numbers of ranks can read, whole tables.

A sharded table appears in ``state_dict()`` as a :class:`ShardedTable`: of the whole table's shape, holding this rank's block. It speaks
the protocol of torch.distributed.checkpoint, which writes each block once and reads what overlaps, so that what N ranks saved loads
on M, or into the plain model; nothing is gathered.

::

    state = tw.training_state(opt, optim)
    dcp.save(state, checkpoint_id=path)                # or dcp.async_save: training goes on, and what is saved is what was
    ...
    state = tw.training_state(opt, optim)              # on any number of ranks
    dcp.load(state, checkpoint_id=path)
    tw.load_training_state(opt, optim, state)
"""
from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.optim import Optimizer

from ..kernels.collectives.spec import Shard
from .errors import PlanError

if TYPE_CHECKING:
    from .optimized_model import OptimizedModel
    from .sharding import ShardedTables

_aten = torch.ops.aten
_ALIKE = (
    _aten.detach.default, _aten.clone.default, _aten._to_copy.default, _aten.new_empty.default, _aten.empty_like.default,
    _aten.zeros_like.default,
)  # fmt: skip


class ShardedTable(Tensor):
    """A table (or a state of its optimizer) of which this rank holds ``local``, from ``offsets`` on. ``writes``: whether this rank saves
    its block (of what several ranks hold alike, one does)."""

    local: Tensor
    offsets: tuple[int, ...]
    writes: bool

    @staticmethod
    def __new__(cls, local: Tensor, offsets: tuple[int, ...], shape: Iterable[int], writes: bool = True) -> ShardedTable:
        made = Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=local.dtype, device=local.device)  # type: ignore[attr-defined]
        made.local, made.offsets, made.writes = local, offsets, writes
        return made

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Everything is done in ``__new__``, as wrapper tensors need."""

    def __repr__(self) -> str:  # type: ignore[override]
        held = "x".join(f"{o}..{o + n}" for o, n in zip(self.offsets, self.local.shape)) if self.local.numel() else "nothing"
        return f"ShardedTable(shape={tuple(self.shape)}, {self.dtype}, this rank holds {held})"

    def __reduce_ex__(self, protocol):
        return ShardedTable, (self.local, self.offsets, tuple(self.shape), self.writes)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        first = args[0]
        if func in _ALIKE and isinstance(first, ShardedTable):
            local = torch.empty_like(first.local) if func is _aten.new_empty.default else func(first.local, *args[1:], **(kwargs or {}))
            return ShardedTable(local, first.offsets, first.shape, first.writes)
        if func is _aten.copy_.default and isinstance(first, ShardedTable) and isinstance(args[1], ShardedTable):
            first.local.copy_(args[1].local)
            return first
        raise RuntimeError(
            f"{func} needs a whole table, and this one is spread over ranks: use its .local block, or opt.whole_state_dict() on all ranks"
        )

    # --- torch.distributed.checkpoint's protocol -----------------------------------------------------------------------------------

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        if not self.writes or not self.local.numel():
            return []
        data = TensorWriteData(self._chunk(), TensorProperties.create_from_tensor(self.local), self.size())
        return [WriteItem(MetadataIndex(fqn, self._chunk().offsets), WriteItemType.SHARD, tensor_data=data)]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [self._chunk()] if self.local.numel() else []

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return self.local

    def _chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(torch.Size(self.offsets), self.local.shape)


def sharded(tables: ShardedTables, name: str, local: Tensor) -> ShardedTable:
    """``local`` (a block of table ``name``, or of state of its shape, or of one number a row) under the shape of the whole."""
    layout = tables.layouts[name]
    mine = tables.mine(layout)
    if not local.dim():  # a count that this rank may not have kept, where it has no block
        return ShardedTable(local, (), (), writes=layout.shards[0].rank == tables.ranks.rank)
    if local.dim() == 2:
        return ShardedTable(local, (mine.row, mine.column), (layout.rows, layout.dim))
    return ShardedTable(local, (mine.row,), (layout.rows,), writes=mine.column == 0)


# --- state_dict --------------------------------------------------------------------------------------------------------------------


def follow_state_dicts(tables: ShardedTables, model: OptimizedModel) -> None:
    """Let ``model.state_dict()`` show whole shapes, and ``load_state_dict`` take whole tables or blocks."""
    blocks = {id(model.get_parameter(name)): name for name in tables.sharded()}
    names = {n: blocks[id(p)] for n, p in model.named_parameters(remove_duplicate=False) if id(p) in blocks}

    def show(module, state: dict, prefix: str, _) -> None:
        for key, name in names.items():
            if prefix + key in state:
                state[prefix + key] = sharded(tables, name, state[prefix + key])

    def take(module, state: dict, prefix: str, *_) -> None:
        for key, name in names.items():
            given = state.get(prefix + key)
            if given is not None:
                state[prefix + key] = _block(given, tables.mine(tables.layouts[name]), tables.layouts[name], name)

    model.register_state_dict_post_hook(show)
    model.register_load_state_dict_pre_hook(take)


def _block(given: Tensor, mine: Shard, layout, name: str) -> Tensor:
    if isinstance(given, ShardedTable):
        if given.offsets != (mine.row, mine.column) or tuple(given.local.shape) != (mine.rows, mine.columns):
            raise PlanError(
                f"table '{name}' was given as {given!r}, but this rank's block is another one: save with torch.distributed.checkpoint and "
                "load from there, which cuts tables anew"
            )
        return given.local
    if tuple(given.shape) == (layout.rows, layout.dim):
        return given[mine.row : mine.row + mine.rows, mine.column : mine.column + mine.columns]
    return given


def whole_state_dict(model: OptimizedModel, rank: int | None = None) -> dict[str, Tensor] | None:
    """See :meth:`OptimizedModel.whole_state_dict`."""
    tables: ShardedTables = model._sharded
    found: dict[str, Any] = {}
    for key, value in model.state_dict().items():
        if not isinstance(value, ShardedTable):
            found[key] = value
            continue
        parts: list[Any] = [None] * tables.ranks.world
        mine = (value.offsets, value.local)
        if rank is None:
            dist.all_gather_object(parts, mine, group=tables.ranks.group)
        else:
            there = dist.get_global_rank(tables.ranks.group, rank)
            dist.gather_object(mine, parts if tables.ranks.rank == rank else None, dst=there, group=tables.ranks.group)
            if tables.ranks.rank != rank:
                continue
        whole = torch.empty(value.shape, dtype=value.dtype)
        for offsets, block in parts:
            whole[tuple(slice(o, o + n) for o, n in zip(offsets, block.shape))] = block
        found[key] = whole
    return found if rank in (None, tables.ranks.rank) else None


# --- training state ------------------------------------------------------------------------------------------------------------------


def training_state(model: OptimizedModel, *optimizers: Optimizer) -> dict[str, Any]:
    """Weights, optimizer state and settings under plain names, for torch.distributed.checkpoint: ``{"model": .., "optimizer": {parameter:
    {state: tensor}}, "groups": ..}``. Tensors are the live ones: what is loaded into them is loaded into the model. The plan's own
    ``embedding_optimizer`` is included. State that an optimizer has not made yet is made, so that it can be loaded into."""
    state: dict[str, Any] = {"model": model.state_dict(), "optimizer": {}, "groups": {}}
    names = {id(p): n for n, p in reversed(list(model.named_parameters(remove_duplicate=False)))}
    tables = model._sharded
    cut = set() if tables is None else set(tables.sharded())
    for number, optimizer in enumerate(_all(model, optimizers)):
        _make_state(optimizer)
        for i, group in enumerate(optimizer.param_groups):
            kept = {k: v for k, v in group.items() if k not in ("params", "param_names") and isinstance(v, (int, float, str, tuple, list))}
            state["groups"][f"{number}.{i}"] = {k: list(v) if isinstance(v, tuple) else v for k, v in kept.items()}
            for param in group["params"]:
                name = names.get(id(param))
                if name is None:
                    raise PlanError("the optimizer holds a parameter that is not the model's: pass the optimizer that optimize() returned")
                held: dict[str, Any] = {}
                for key, value in optimizer.state.get(param, {}).items():
                    if isinstance(value, (int, float)):
                        value = torch.tensor(float(value), dtype=torch.float64)
                    if isinstance(value, Tensor):
                        held[key] = sharded(tables, name, value) if name in cut else value
                if held:
                    state["optimizer"][name] = held
    return state


def load_training_state(model: OptimizedModel, *arguments: Any) -> None:
    """``load_training_state(model, *optimizers, state)``: take over what ``dcp.load`` put into ``state`` (of :func:`training_state`)."""
    *optimizers, state = arguments
    if not isinstance(state, Mapping):
        raise PlanError("load_training_state(model, optimizer, ..., state): the last argument is what training_state() gave")
    model.load_state_dict(state["model"])
    names = {id(p): n for n, p in reversed(list(model.named_parameters(remove_duplicate=False)))}
    for number, optimizer in enumerate(_all(model, optimizers)):
        for i, group in enumerate(optimizer.param_groups):
            for key, value in state["groups"].get(f"{number}.{i}", {}).items():
                group[key] = tuple(value) if isinstance(group.get(key), tuple) else value
            for param in group["params"]:
                for key, value in state["optimizer"].get(names[id(param)], {}).items():
                    held = optimizer.state[param]
                    if isinstance(held.get(key), Tensor):
                        held[key].copy_(value.local if isinstance(value, ShardedTable) else value)
                    elif key in held:
                        held[key] = type(held[key])((value.local if isinstance(value, ShardedTable) else value).item())


def _all(model: OptimizedModel, optimizers: Iterable[Optimizer]) -> list[Optimizer]:
    own = model.embedding_optimizer
    return [*([own] if own is not None else []), *optimizers]


def _make_state(optimizer: Optimizer) -> None:
    make = getattr(optimizer, "make_state", None)
    if make is not None:  # the plan's optimizer
        return make()
    params = [p for group in optimizer.param_groups for p in group["params"]]
    missing = {id(p) for p in params if p.requires_grad and not optimizer.state.get(p)}
    if not missing:
        return
    held = [p.grad for p in params]
    settings = [{k: group[k] for k in ("lr", "weight_decay") if k in group} for group in optimizer.param_groups]
    sparse = getattr(type(optimizer), "_base", type(optimizer)).__name__ == "SparseAdam"
    try:  # a step of nothing: zero gradients at rate zero
        for param in params:
            nothing = torch.sparse_coo_tensor(torch.empty(1, 0), param.new_empty(0, *param.shape[1:]), param.shape) if sparse else None
            param.grad = None if id(param) not in missing else nothing if sparse else torch.zeros_like(param)
        for group, kept in zip(optimizer.param_groups, settings):
            group.update(dict.fromkeys(kept, 0.0))
        optimizer.step()
    finally:
        for param, grad in zip(params, held):
            param.grad = grad
        for group, kept in zip(optimizer.param_groups, settings):
            group.update(kept)
    for param in params:  # as if it had not happened
        state = optimizer.state.get(param, {})
        if id(param) in missing and "step" in state:
            state["step"] = torch.zeros_like(state["step"]) if isinstance(state["step"], Tensor) else 0
