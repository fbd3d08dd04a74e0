"""Tables with dynamic ids: opening them, their part of a checkpoint, and captures whose sample has ids that the plain model has no row for."""
from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..kernels import tiers
from ..kernels.dynamic_ids import IdMap, IdMapError, available
from ..kernels.dynamic_ids.table import DynamicTable
from ..kernels.tiers import Part
from .dynamic_ids import DynamicIds
from .errors import PlanError
from .plan import Plan

_PARTS = ("ids", "uses", "waiting")  # of a table in a state_dict, beside its rows
_aten = torch.ops.aten
_LOOKUPS: dict[Any, tuple[int, int]] = {  # function -> where it takes its table and its ids
    F.embedding: (1, 0), F.embedding_bag: (1, 0), torch.embedding: (0, 1), torch.embedding_bag: (0, 1), torch.index_select: (0, 2),
    Tensor.index_select: (0, 2), Tensor.__getitem__: (0, 1), _aten.embedding.default: (0, 1), _aten.embedding_bag.default: (0, 1),
    _aten.embedding_bag.padding_idx: (0, 1), _aten.index_select.default: (0, 2), _aten.index.Tensor: (0, 1),
}  # fmt: skip
_NAMES = {"weight": ("weight", "self"), "ids": ("input", "indices", "index")}


class AnyIds(TorchFunctionMode):
    """While a capture runs, lookups of tables with dynamic ids read the row ``id % rows``: the plain model and its graph, both of which run
    on the sample, then read the same rows for any id. What a trace records is not touched."""

    def __init__(self, shell: nn.Module, plan: Plan) -> None:
        super().__init__()
        first = {id(p): name for name, p in shell.named_parameters()}
        aliases: dict[str, list[str]] = {name: [] for name in first.values()}
        for name, param in shell.named_parameters(remove_duplicate=False):
            aliases[first[id(param)]].append(name)
        self.shell, self.names = shell, list(plan.says("ids", aliases))
        for name in self.names:
            if not shell.get_parameter(name).numel():
                raise PlanError(f"table '{name}' has dynamic ids and no rows in the plain model; it needs one at least, for the capture")

    def __enter__(self):
        return super().__enter__() if self.names else self  # a mode that does nothing would still be in dynamo's way

    def __exit__(self, *raised):
        return super().__exit__(*raised) if self.names else None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        where = _LOOKUPS.get(func) if self.names else None
        if where is not None:
            table, ids = (_argument(args, kwargs, place, what) for place, what in zip(where, ("weight", "ids")))
            listed = isinstance(ids, (list, tuple)) and len(ids) == 1  # aten.index takes a list
            given = ids[0] if listed else ids
            if any(table is self.shell.get_parameter(n) for n in self.names) and _is_ids(given):
                mapped: Any = given.remainder(len(table))
                args, kwargs = _replaced(args, kwargs, where[1], [mapped] if listed else mapped)
        return func(*args, **kwargs)


def _argument(args: tuple, kwargs: Mapping[str, Any], place: int, what: str) -> Any:
    return args[place] if place < len(args) else next((kwargs[n] for n in _NAMES[what] if n in kwargs), None)


def _replaced(args: tuple, kwargs: dict, place: int, value: Any) -> tuple[tuple, dict]:
    if place < len(args):
        return (*args[:place], value, *args[place + 1 :]), kwargs
    return args, {**kwargs, next(n for n in _NAMES["ids"] if n in kwargs): value}


def _is_ids(value: Any) -> bool:
    return type(value) is Tensor and value.dtype in (torch.int32, torch.int64)


def opened(name: str, ids: DynamicIds, shell: nn.Module, states: Iterable[Part], padding: int | None) -> DynamicTable:
    """The table that the plan asks for under a parameter's name. ``states``: what its optimizer keeps. Raises :class:`PlanError` where the
    memory for its capacity is not even promised."""
    if why := available() or tiers.available():
        raise PlanError(f"table '{name}' is to have dynamic ids, which need the C++ library: {why}")
    parts = [Part(shell.get_parameter(name).shape[1], ids.init[0], *(*ids.init[1], 0.0)[:2]), *states]
    try:
        made = DynamicTable(name, IdMap(ids.capacity, ids.admit_after, ids.evict), parts, seed=ids.seed, default=ids.default, padding=padding)
    except (OSError, MemoryError) as error:
        size = (ids.capacity + 2) * sum(4 * p.width for p in parts)
        raise PlanError(f"table '{name}': the system does not promise {size / 1e9:.1f} GB for {ids.capacity:,} rows ({error}): lower ids.capacity") from None
    owner = shell.get_submodule(name.rpartition(".")[0])
    made.training = partial(getattr, owner, "training")
    return made


def save(table: DynamicTable, state: MutableMapping[str, Any], names: Iterable[str]) -> None:
    """Its entries of a model's ``state_dict``: under each name the rows ``[n, dim]``, under ``name.ids`` their ids, ``name.uses`` and ``name.waiting``."""
    held = table.state()
    for name in names:
        state[name] = held["rows"]
        state.update({f"{name}.{part}": held[part] for part in _PARTS})


def load(table: DynamicTable, state: MutableMapping[str, Any], names: list[str]) -> None:
    """Take :func:`save`'s entries out of ``state`` but for the rows. Raises ``RuntimeError`` where they are not of such a table."""
    given = [{part: state.pop(f"{name}.{part}", None) for part in _PARTS} for name in names][-1]
    if any(value is None for value in given.values()):
        missing = next(part for part, value in given.items() if value is None)
        raise RuntimeError(
            f"table '{table.name}' has dynamic ids, and the state has rows and no '{names[-1]}.{missing}' for them: it is of a plain model. "
            f"Load it with opt.dynamic_ids['{table.name}'].load(ids, rows)"
        )
    try:
        table.load(rows=state[names[-1]], **given)
    except IdMapError as error:
        raise RuntimeError(str(error)) from None


def note(table: DynamicTable, ids: DynamicIds) -> str:
    """How its lookups went, for the report."""
    c = table.counters()
    said = f"{table.name}: {c.rows:,} ids have a row (at most {ids.capacity:,}, admitted after {ids.admit_after}, {ids.evict})"
    said += f"; {c.defaults:,} of {c.lookups:,} ids looked up in training and {c.unknown:,} of {c.evaluated:,} in evaluation read the default ({ids.default:g})"
    return said + f"; {c.admitted:,} admitted, {c.evicted:,} evicted, {c.waiting:,} wait, {c.forgotten:,} forgotten"
