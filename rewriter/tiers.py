"""Tables larger than memory, and with dynamic ids: what takes their place, their checkpoints, and snapshots that are complete or absent.

A table with ``storage`` in the plan keeps its rows and their optimizer state in a folder (``kernels/tiers``). Under its plain name the
optimized model has the cache, a parameter of ``slots + 1`` rows; ``state_dict()`` still means the whole table. The user's own model keeps
its table, untouched; one on the meta device holds none, and rows then start from ``storage.init``. A table with dynamic ids
(``dynamic_tables.py``) goes the same way: its parameter has ``capacity + 2`` rows, and its state dict the ids that have one.
"""
from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph
from torch.optim import Optimizer

from ..kernels.dynamic_ids.table import DynamicTable
from ..kernels.embedding.optimizers import RowUpdates
from ..kernels.embedding.spec import GroupSpec
from ..kernels.memory import one_row
from ..kernels.tiers import Part, RowCache, TierError, available
from ..kernels.tiers.cache import WAYS
from ..kernels.tiers.device import DeviceCache, DeviceTable
from ..kernels.tiers.table import SlotTable, TieredTable
from ..passes.table_gradients import Choice
from ..passes.tier_tables import CannotTier, Tier, padding_of
from . import device_tables, dynamic_tables
from .capture import Captured
from .dynamic_ids import DynamicIds
from .errors import PlanError
from .in_backward_guard import UpdatedInBackward
from .plan import Plan, TablePlan
from .sharding import stand_in, whole_tables
from .snapshots import from_manifest, generation_of
from .storage import Storage

_CHUNK = 1 << 26  # bytes of rows that are moved at once
_STATE = {  # by optimizer: the names of what it keeps for each row, and whether that is one number
    "sgd": (), "adagrad": (("sum", False),), "rowwise_adagrad": (("sum", True),), "adam": (("exp_avg", False), ("exp_avg_sq", False)),
    "SGD": (), "Adagrad": (("sum", False),), "Adam": (("exp_avg", False), ("exp_avg_sq", False)), "AdamW": (("exp_avg", False), ("exp_avg_sq", False)),
    "SparseAdam": (("exp_avg", False), ("exp_avg_sq", False)),
}  # fmt: skip


@contextmanager
def stand_ins(shell: nn.Module, plan: Plan, optimizer: Optimizer | None, over_ranks: bool = False) -> Iterator[set[int]]:
    """Tables on the meta device as tables of zeros that take no memory, in ``shell`` and in ``optimizer``, where the plan puts any table in
    tiers, or gives one dynamic ids, or ``over_ranks``: a capture runs the model. Yields the ids of the stand-ins; on an error everything is as it was."""
    if not over_ranks and all(t.storage is None and t.ids is None for t in plan.tables.values()):
        yield set()
        return
    made: dict[int, nn.Parameter] = {}
    undo: list[tuple[Any, Any, Any]] = []
    on_device = any(t.storage is not None and t.storage.on_device for t in plan.tables.values())
    for module in shell.modules():
        for key, param in module._parameters.items():
            if param is None or not param.is_meta or not isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
                continue
            if id(param) not in made:
                zeros = None if on_device else stand_in(param.shape, param.dtype, torch.device("cpu"))
                made[id(param)] = device_tables.stand_in(shell, param) if zeros is None else nn.Parameter(zeros, requires_grad=param.requires_grad)
            undo.append((module._parameters, key, param))
            module._parameters[key] = made[id(param)]
    for group in optimizer.param_groups if optimizer is not None else ():
        undo.append((group, "params", group["params"]))
        group["params"] = [made.get(id(p), p) for p in group["params"]]
    try:
        yield {id(p) for p in made.values()}
    except BaseException:
        for home, key, value in undo:
            home[key] = value
        raise


class TieredTables:
    """The tables of one model that the plan puts in tiers or gives dynamic ids: opened when their lookups are known, put in place when all is rewritten."""

    def __init__(self, shell: nn.Module, resolved: Mapping[str, TablePlan], choices: Mapping[str, Choice], optimizer: Optimizer | None,
                 plan_optimizer: RowUpdates | None, empty: set[int]) -> None:  # fmt: skip
        self.shell, self.user, self.planned = shell, optimizer, plan_optimizer
        self.empty = empty  # ids of stand-ins: tables that hold no rows yet
        self.wanted: dict[str, Storage | DynamicIds] = {n: w for n, t in resolved.items() if (w := t.storage or t.ids) is not None}
        self.open: dict[str, SlotTable] = {}
        self.whole: dict[str, tuple[torch.Size, torch.dtype, torch.device]] = {}  # what the caches stand for
        self._homes: dict[str, tuple[dict, str]] = {}  # where the caches stand: read at every step
        self._names: dict[str, list[str]] = {}  # all names of each, where it is tied
        self._keep_rows_out = False  # of the optimizer's state dicts: a snapshot has them
        self._loaded_ids: dict[str, Tensor] = {}  # of the optimizer state that is being loaded
        self._states: dict[str, tuple[tuple[str, bool], ...]] = {}
        self._spent: dict[str, tuple[int, int, int] | None] = {}  # the gradient that the last step() of a table took
        for name in self.wanted:
            self._states[name] = self._check(name, resolved[name], choices.get(name))

    def _check(self, name: str, plan: TablePlan, choice: Choice | None) -> tuple[tuple[str, bool], ...]:
        table = dict(self.shell.named_parameters(remove_duplicate=False)).get(name)
        what = "be in tiers" if plan.ids is None else "have dynamic ids"
        if available():
            raise PlanError(f"table '{name}' is to {what}, which need the C++ library: {available()}")
        if table is None or choice is None:
            raise PlanError(f"table '{name}' is to {what}, but it is no parameter that a fused lookup reads")
        if plan.sharding is not None:
            raise PlanError(f"table '{name}' has storage and sharding: {plan.sharding}; tables in tiers are on one rank today")
        if plan.storage is not None and plan.storage.on_device:
            device_tables.check(name, plan.storage, table)
        elif table.dtype != torch.float32 or table.device.type != "cpu":
            raise PlanError(f"table '{name}' is to {what}, and is {table.dtype} on {table.device}; there they are float32 tables of the CPU (or nn.Embedding and nn.EmbeddingBag on meta)")
        if choice.grad == "none" or not table.requires_grad:
            return ()
        if choice.grad not in ("sparse", "in_backward"):
            raise PlanError(f"table '{name}' is to {what}, and nobody updates it row by row: {choice.reason}")
        if plan.embedding_optimizer is not None:
            return _STATE[plan.embedding_optimizer.key]
        return _STATE[getattr(type(self.user), "_base", type(self.user)).__name__]

    @property
    def tiers(self) -> dict[str, Tier]:
        """What the pass needs to know."""
        return {n: Tier(t.number, t.home, len(t.memory[0]), isinstance(t, DynamicTable)) for n, t in self.open.items()}

    @property
    def files(self) -> dict[str, TieredTable]:
        """Those in tiers."""
        return {n: t for n, t in self.open.items() if isinstance(t, TieredTable)}

    @property
    def dynamic(self) -> dict[str, DynamicTable]:
        """Those with dynamic ids."""
        return {n: t for n, t in self.open.items() if isinstance(t, DynamicTable)}

    def refuse_program(self, captured: Captured) -> None:
        """Raises :class:`PlanError`: the model is no one graph."""
        name = next(iter(self.wanted))
        what = "puts table '{}' in tiers" if isinstance(self.wanted[name], Storage) else "gives table '{}' dynamic ids"
        raise PlanError(f"the plan {what.format(name)}, which needs {captured.entry}() as one graph; but {captured.notes[0]}")

    # --- opening -----------------------------------------------------------------------------------------------------------------

    def prepare(self, graph: Graph) -> None:
        """Open the stores, once: their padding rows are known from ``graph``, whose lookups are fused."""
        for name, wanted in self.wanted.items():
            try:
                padding = padding_of([graph], name)
            except CannotTier as error:
                raise PlanError(str(error)) from None
            if name not in self.open:
                self.open[name] = self._opened(name, wanted, padding) if isinstance(wanted, Storage) else dynamic_tables.opened(
                    name, wanted, self.shell, self._state_parts(name), padding)  # fmt: skip
            elif padding != self.open[name].padding and (padding is not None or name in self.dynamic):
                raise PlanError(f"table '{name}' has storage or ids in the plan and padding_idx {self.open[name].padding}, and a lookup has {padding}")

    def _state_parts(self, name: str) -> list[Part]:
        table = self.shell.get_parameter(name)
        return [Part(1 if single else table.shape[1], "constant", self._first(name, table, key)) for key, single in self._states[name]]

    def _opened(self, name: str, storage: Storage, padding: int | None) -> TieredTable:
        table = self.shell.get_parameter(name)
        rows, dim = table.shape
        states = self._states[name]
        parts = [Part(dim, storage.init[0], *(*storage.init[1], 0.0)[:2]), *self._state_parts(name)]
        slots = int(storage.cache) // sum(4 * p.width for p in parts) // WAYS * WAYS
        slots = min(slots, (rows + WAYS - 1) // WAYS * WAYS * 2)
        if slots < WAYS:
            raise PlanError(f"table '{name}': storage.cache is {storage.cache} bytes; {WAYS} rows with their optimizer state take {WAYS * sum(4 * p.width for p in parts)}")
        if storage.on_device:
            memory = device_tables.memory(name, storage, table.device, slots + 1, parts)
        else:
            memory = [torch.zeros(slots + 1, p.width) for p in parts]
        if storage.backing == "host":
            cache = device_tables.over_memory(name, storage, rows, parts, [m[:slots] for m in memory])
            self._fill(cache, table, name, states, padding)
            return DeviceTable(name, cache, memory, padding)
        folder = Path(storage.path)
        held = (folder / "COMMIT").exists() or generation_of(folder)
        if held and not storage.resume:
            raise PlanError(f"table '{name}': {folder} holds a snapshot of an earlier run. Go on from it with storage.resume (the folder that "
                            "opt.snapshot() was given), or give another path")  # fmt: skip
        generation = from_manifest(Path(storage.resume), name, folder) if storage.resume else -1
        try:
            cache = (DeviceCache if storage.on_device else RowCache)(folder, rows, parts, slots, seed=storage.seed, policy=storage.policy, memory=[m[:slots] for m in memory], generation=generation)
        except TierError as error:
            raise PlanError(f"table '{name}': {error}") from None
        if storage.resume and cache.counters().generation != generation:
            raise PlanError(f"table '{name}': {folder} is at snapshot {cache.counters().generation}, and {storage.resume} wants {generation}: they are not of one run")
        if not storage.resume:
            self._fill(cache, table, name, states, padding)
        return DeviceTable(name, cache, memory, padding) if isinstance(cache, DeviceCache) else TieredTable(name, cache, memory, padding)

    def _first(self, name: str, table: Tensor, key: str) -> float:
        """What a state of the user's own optimizer starts from."""
        if self.planned is None or name not in self.planned._by_name:
            group = next((g for g in self.user.param_groups if any(p is table for p in g["params"])), {}) if self.user is not None else {}
            return float(group.get("initial_accumulator_value", 0.0)) if key == "sum" else 0.0
        return 0.0

    def _fill(self, cache: RowCache, table: Tensor, name: str, states: Iterable[tuple[str, bool]], padding: int | None) -> None:
        """Write what the model and its optimizer hold already."""
        sources: list[Tensor | None] = [None if id(table) in self.empty else table.detach()]
        given = self.user.state.get(table, {}) if self.user is not None else {}
        sources += [value if isinstance(value := given.get(key), Tensor) and value.dim() and not value.is_meta else None for key, _ in states]
        for part, source in enumerate(sources):
            if source is not None:
                step = max(1, _CHUNK // (4 * (source.numel() // len(source))))
                for first in range(0, len(source), step):
                    values = source[first : first + step].reshape(-1, source.numel() // len(source))
                    cache.write(torch.arange(first, first + len(values)), values, part)
            elif part == 0 and padding is not None:
                cache.write(torch.tensor([padding]), torch.zeros(1, table.shape[1]))  # as nn.Embedding starts it

    # --- in place of the tables ----------------------------------------------------------------------------------------------------

    def cut(self) -> None:
        """Put the caches in place of the whole tables, in the shell and in the user's optimizer; let updates free what they held."""
        for name, tiered in self.open.items():
            whole = self.shell.get_parameter(name)
            cache = nn.Parameter(tiered.memory[0], requires_grad=whole.requires_grad)
            tiered.trains = whole.requires_grad
            if tiered.trains:
                cache.register_hook(partial(self._before_adding, name))
            tiered.weight = partial(self._parameter, name)
            self._names[name] = [n for n, p in self.shell.named_parameters(remove_duplicate=False) if p is whole]
            self.whole[name] = (whole.shape, whole.dtype, whole.device)
            for module in self.shell.modules():
                for key, param in module._parameters.items():
                    if param is whole:
                        module._parameters[key] = cache
            owner, _, key = name.rpartition(".")
            self._homes[name] = self.shell.get_submodule(owner)._parameters, key
            self._cut_state(name, whole, cache, tiered)
        for optimizer in {id(o): o for o in (self.user, self.planned) if o is not None}.values():
            optimizer.register_step_pre_hook(self._before_step)
            optimizer.register_step_post_hook(lambda o, *_: self.updated(self._stepped(o)))
            optimizer.register_state_dict_post_hook(self._save_states)
            optimizer.register_load_state_dict_pre_hook(self._take_ids)
            optimizer.register_load_state_dict_post_hook(self._load_states)
        if self.planned is not None:
            self.planned.before_update, self.planned.after_update = self._check_update, self._updated_inside

    def _parameter(self, name: str) -> Tensor:
        """What the graph reads now under the name of a table."""
        home, key = self._homes[name]
        found = home.get(key)
        return self.shell.get_parameter(name) if found is None else found  # a parametrization, say, has taken it away

    def _before_step(self, optimizer: Optimizer, given: tuple, named: dict) -> None:
        if not any(callable(each) for each in (*given[1:], *named.values())):  # a closure makes its gradients inside the step
            self._check_step(optimizer)

    def _before_adding(self, name: str, _made: Tensor) -> None:
        """A gradient is about to be added to a table's. Raises :class:`TierError` where that one was stepped already."""
        spent = self._spent.pop(name, None)
        if spent is not None and (grad := self._parameter(name).grad) is not None and _content(grad) == spent:
            raise TierError(
                f"table '{name}': its gradient is still the one of the last step(), whose slots may hold the rows of other ids now, and this backward "
                "would be added to it. Nothing was added. Call zero_grad() after each step(), or before the backward"
            )

    def _cut_state(self, name: str, whole: Tensor, cache: nn.Parameter, tiered: TieredTable) -> None:
        planned = self.planned is not None and name in self.planned._by_name
        optimizer = self.planned if planned else self.user
        if optimizer is None:
            return
        for group in optimizer.param_groups:
            group["params"] = [cache if p is whole else p for p in group["params"]]
        old = optimizer.state.pop(whole, {})
        if not self._states[name]:
            return
        state = {k: v for k, v in old.items() if not isinstance(v, Tensor) or not v.dim()}
        state.setdefault("step", 0 if planned or type(optimizer).__name__ == "SparseAdam" else torch.tensor(0.0))
        optimizer.state[cache] = state
        self._point(optimizer, cache, name)

    def _point(self, optimizer: Optimizer, cache: Tensor, name: str) -> None:
        """The optimizer's state of a table is what lies beside its rows in the cache."""
        memory = self.open[name].memory
        for part, (key, single) in enumerate(self._states[name], 1):
            optimizer.state[cache][key] = memory[part].view(-1) if single else memory[part]

    def whole_tables(self, shell: nn.Module) -> AbstractContextManager:
        """The shell as it was before, for a capture."""
        stand_ins = {n: one_row(*self.whole[n], shell.get_parameter(n).requires_grad) for n, t in self.open.items() if isinstance(t, DeviceTable)}
        return whole_tables(shell, self.whole, stand_ins)

    def _owned(self, optimizer: Optimizer) -> list[str]:
        """The tables that ``optimizer`` updates."""
        mine = {id(p) for g in optimizer.param_groups for p in g["params"]}
        return [n for n in self.open if id(self._parameter(n)) in mine]

    def _stepped(self, optimizer: Optimizer) -> list[str]:
        """Those that its ``step()`` updates."""
        inside = {id(p) for g in optimizer.param_groups if g.get("in_backward") for p in g["params"]}
        return [n for n in self._owned(optimizer) if id(self._parameter(n)) not in inside]

    def _check_step(self, optimizer: Optimizer) -> None:
        for name in self._stepped(optimizer):
            grad = self._parameter(name).grad
            if grad is not None and grad.is_sparse:
                self.open[name].check_held(grad._indices()[0])

    def _check_update(self, spec: GroupSpec, slots: Iterable[Tensor]) -> None:
        for lookup, each in zip(spec.lookups, slots):
            if (name := spec.tables[lookup.table].name) in self.open:
                self.open[name].check_held(each)

    def _updated_inside(self, tables: Iterable[Tensor]) -> None:
        done = {id(t) for t in tables}
        self.updated([n for n in self.open if id(self._parameter(n)) in done])

    def updated(self, names: Iterable[str]) -> None:
        """An update of tables is done: what was looked up for it may leave their caches."""
        for name in names:
            grad = self._parameter(name).grad
            self._spent[name] = None if grad is None or isinstance(grad, UpdatedInBackward) or not grad.is_sparse else _content(grad)
            self.open[name].updated()

    def aliases(self) -> list[list[str]]:
        """All names of each table, the plan's first."""
        return [[n, *(a for a in self._names[n] if a != n)] for n in self.open]

    # --- checkpoints ----------------------------------------------------------------------------------------------------------------

    def whole_table(self, name: str, part: int = 0) -> Tensor:
        """A copy of a table, all rows, or of a state of its optimizer. Raises :class:`TierError` where it does not fit the memory that is free."""
        tiered, rows = self.files[name], self.whole[name][0][0]
        dim = tiered.memory[part].shape[1]
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if rows * dim * 4 > free * 0.8:
            raise TierError(
                f"table '{name}' has {rows * dim * 4 / 1e9:.1f} GB and {free / 1e9:.1f} GB of memory are free: state_dict() cannot hold it. "
                "opt.snapshot(folder) keeps everything without copying tables"
            )
        out = torch.empty(rows, dim)
        step = max(1, _CHUNK // (4 * dim))
        for first in range(0, rows, step):
            out[first : first + step] = tiered.read(first, min(rows, first + step), part)
        return out

    def load_table(self, name: str, values: Tensor, part: int = 0) -> None:
        """Set all rows of a table, or of a state of its optimizer. Raises ``RuntimeError`` for another shape."""
        wanted = (self.whole[name][0][0], self.open[name].memory[part].shape[1])
        if values.shape != wanted:
            raise RuntimeError(f"size mismatch for {name}: a table of {tuple(values.shape)} was given, and the model's has {wanted}")
        step = max(1, _CHUNK // (4 * values.shape[1]))
        for first in range(0, len(values), step):
            self.files[name].write(first, values[first : first + step].detach().to(torch.float32), part)

    def _save_states(self, optimizer: Optimizer, saved: dict[str, Any]) -> None:
        """In an optimizer's ``state_dict()`` a table has the state of all its rows (none in a snapshot, which keeps them in the folders); one
        with dynamic ids that of the ids that have a row, beside them."""
        places = {id(p): i for i, p in enumerate(p for g in optimizer.param_groups for p in g["params"])}
        for name in self._owned(optimizer):
            place = places[id(self.shell.get_parameter(name))]
            if place not in saved["state"]:
                continue
            made = saved["state"][place] = dict(saved["state"][place])
            for part, (key, single) in enumerate(self._states[name], 1):
                made.pop(key, None)
                if name in self.dynamic:
                    made["ids"], whole = self.dynamic[name].export(part)
                    made[key] = whole.view(-1) if single else whole
                elif not self._keep_rows_out:
                    whole = self.whole_table(name, part)
                    made[key] = whole.view(-1) if single else whole

    def _take_ids(self, optimizer: Optimizer, given: dict[str, Any]) -> dict[str, Any]:
        """Ids come out of what is loaded before torch makes it floats."""
        names = {id(self.shell.get_parameter(n)): n for n in self._owned(optimizer) if n in self.dynamic}
        places = zip((p for g in given["param_groups"] for p in g["params"]), (p for g in optimizer.param_groups for p in g["params"]))
        found = {place: names[id(p)] for place, p in places if id(p) in names and "ids" in given["state"].get(place, {})}
        self._loaded_ids = {name: given["state"][place]["ids"] for place, name in found.items()}
        state = {place: {k: v for k, v in held.items() if k != "ids"} if place in found else held for place, held in given["state"].items()}
        return {**given, "state": state}

    def _load_states(self, optimizer: Optimizer) -> None:
        """What was loaded goes to the rows, and the optimizer holds the cache again. Raises ``RuntimeError`` where it is no state of the table."""
        wrong = []
        for name in self._owned(optimizer):
            cache = self.shell.get_parameter(name)
            loaded = dict(optimizer.state[cache])
            self._point(optimizer, cache, name)
            for part, (key, single) in enumerate(self._states[name], 1):
                value = loaded.get(key)
                ids = self._loaded_ids.get(name)
                if isinstance(value, Tensor) and (name not in self.dynamic or ids is not None):
                    try:
                        self._load_part(name, part, value.view(-1, 1) if single else value, ids)
                    except RuntimeError as error:
                        wrong.append(f"{key}: {error}")
                elif name in self.dynamic or not self._keep_rows_out:
                    wrong.append(f"it holds no '{'ids' if isinstance(value, Tensor) else key}' of {name}")
        if wrong:
            raise RuntimeError("the optimizer's state does not fit the tables that the plan keeps elsewhere, whose state stays as it was: " + "; ".join(wrong))

    def _load_part(self, name: str, part: int, values: Tensor, ids: Tensor | None) -> None:
        if ids is None:
            self.load_table(name, values, part)
        else:
            self.dynamic[name].load_part(part, ids, values)

    @contextmanager
    def without_rows(self) -> Iterator[None]:
        """While optimizers' state dicts are made for a snapshot, or read from one: the state of tables in tiers is in their folders."""
        self._keep_rows_out = True
        try:
            yield
        finally:
            self._keep_rows_out = False

    def notes(self) -> list[str]:
        """For the report."""
        made = []
        for name, tiered in self.files.items():
            storage, rows = self.storage_of(name), self.whole[name][0][0]
            size = sum(m.numel() * 4 for m in tiered.memory)
            where = storage.path or "the host's memory"
            on = f" on {tiered.memory[0].device}" if storage.on_device else ""
            made.append(f"{name}: {rows:,} rows in {where}, {tiered.cache.slots:,} of them in a cache of {size / 1e9:.2f} GB{on} ({storage.policy})")
        return made

    def counted(self) -> list[str]:
        """For the report, as it is read: how the lookups of tables with caches on a device, and of those with dynamic ids, went."""
        moved = [f"{n}: {t.cache.counters()}" for n, t in self.files.items() if isinstance(t, DeviceTable)]
        return moved + [dynamic_tables.note(t, w) for n, t in self.dynamic.items() if isinstance(w := self.wanted[n], DynamicIds)]

    def storage_of(self, name: str) -> Storage:
        """What the plan says of one in tiers."""
        storage = self.wanted[name]
        assert isinstance(storage, Storage)
        return storage


def _content(grad: Tensor) -> tuple[int, int, int]:
    """Says whether a sparse gradient is what it was."""
    return grad._values().data_ptr(), grad._values().shape[0], grad._version


def hook_checkpoints(model: nn.Module, tables: TieredTables) -> None:
    """``state_dict()`` and ``load_state_dict()`` of ``model`` mean whole tables."""

    def save(module, state, prefix, _):
        for names in tables.aliases():
            if found := [prefix + n for n in names if prefix + n in state]:
                if names[0] in tables.dynamic:
                    dynamic_tables.save(tables.dynamic[names[0]], state, found)
                else:
                    state.update(dict.fromkeys(found, tables.whole_table(names[0])))

    def load(module, state, prefix, *_):
        for names in tables.aliases():
            if found := [prefix + n for n in names if prefix + n in state]:
                if names[0] in tables.dynamic:
                    dynamic_tables.load(tables.dynamic[names[0]], state, found)
                else:
                    tables.load_table(names[0], state[found[-1]])  # as the last of tied names wins in torch
                state.update(dict.fromkeys(found, module.get_parameter(names[0]).detach()))

    model._register_state_dict_hook(save)
    model._register_load_state_dict_pre_hook(load, with_module=True)
