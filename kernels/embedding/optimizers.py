"""The optimizer that a plan asks for: SGD, AdaGrad, rowwise AdaGrad or lazy Adam over tables only, in one launch for all of them."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..memory import use_huge_pages
from . import cpu, low_tables, op
from .kept_rules import STATE, KeptRules
from .rounding import seed_of
from .sparse_steps import apply, coalesced, raise_bad_ids
from .spec import GroupSpec


class RowUpdates(Optimizer):
    """SGD, AdaGrad, rowwise AdaGrad or lazy Adam on embedding tables, touched rows only (formulas: ``updates.py``).

    Each param group has ``kind``, ``lr``, ``eps``, ``betas``, ``weight_decay`` (decoupled, touched rows), ``maximize`` and
    ``in_backward``. Tables of an ``in_backward`` group are updated when a backward ends; for the others ``step()`` reads the
    sparse ``.grad``. A dense ``.grad`` is taken as touching its rows that are not all zero. ``stochastic``: the group's tables, in float16
    or bfloat16, are rounded stochastically where they are updated in a backward (``low_tables.py``).

    ``guard``, if set, is told before and after each update inside a backward, and may refuse it by raising.

    State per table: ``step`` and ``sum`` (``[rows, dim]``, rowwise ``[rows]``), or ``step``, ``exp_avg``, ``exp_avg_sq``.
    """

    guard: Any = None
    huge_pages = False  # ask for them where state is made
    before_update: Callable[[GroupSpec, Sequence[Tensor]], None] | None = None  # may refuse an update inside a backward
    after_update: Callable[[list[Tensor]], None] | None = None  # called with the tables when an update inside a backward is done
    row_squares: Any = None  # for tables whose rows are cut over ranks (kernels/collectives/row_squares.py)

    def __init__(self, groups: list[dict]) -> None:
        defaults = dict(kind="sgd", lr=0.01, eps=0.0, betas=(0.9, 0.999), weight_decay=0.0, maximize=False, in_backward=False, stochastic=False)
        super().__init__(groups, defaults)
        self._index()

    def add_param_group(self, param_group: dict) -> None:
        """For the constructor. Raises ``RuntimeError`` later on: who updates a table is part of the model's graph."""
        if "_by_name" in self.__dict__:
            raise RuntimeError(
                "embedding_optimizer.add_param_group() was called, but which tables it updates, and how, is said by the plan and fixed in the "
                "model: name the table in the plan's tables with an embedding_optimizer of its own and optimize again; other parameters "
                "(opt.dense_parameters()) belong to an optimizer of yours"
            )
        super().add_param_group(param_group)

    def _index(self) -> None:
        self._by_name: dict[str, tuple[Tensor, dict]] = {
            name: (param, group) for group in self.param_groups for name, param in zip(group["param_names"], group["params"])
        }
        self._by_names: dict[tuple[str, ...], list[Tensor | None]] = {}
        self._launches: dict[int, tuple[GroupSpec, KeptRules]] = {}  # by identity: hashing a spec takes long

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._index()

    def load_state_dict(self, state_dict) -> None:
        """As in torch.optim; param groups are replaced by the loaded ones."""
        super().load_state_dict(state_dict)
        self._index()

    def follow(self, named: dict[str, Tensor]) -> None:
        """Hold the parameters that now go by the tables' names, where a model replaced them; their state is kept."""
        for group in self.param_groups:
            for i, name in enumerate(group["param_names"]):
                old, new = group["params"][i], named[name]
                if new is not old:
                    group["params"][i] = new
                    if old in self.state:
                        self.state[new] = {
                            k: v.to(new.device) if isinstance(v, Tensor) and v.dim() else v for k, v in self.state.pop(old).items()
                        }
        self._index()

    def _start(self, param: Tensor, kind: str) -> dict[str, Any]:
        state = self.state[param]
        state["step"] = 0  # a number: 1,000 tables of tensors would take milliseconds to count
        dtype = torch.float64 if param.dtype == torch.float64 else torch.float32
        shape = param.shape[:1] if kind == "rowwise_adagrad" else param.shape
        state.update((name, torch.zeros(shape, dtype=dtype, device=param.device)) for name in STATE[kind])
        if self.huge_pages:
            use_huge_pages(state.values())
        return state

    def make_state(self) -> None:
        """Make the state of tables that have not been updated yet, so that it can be loaded into."""
        for param, group in self._by_name.values():
            if not self.state[param]:
                self._start(param, group["kind"])

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None):  # type: ignore[override]
        """One step of every table that has a gradient. Raises ``RuntimeError`` if all tables are updated in the backward."""
        if self.param_groups and all(group["in_backward"] for group in self.param_groups):
            raise RuntimeError(
                "embedding_optimizer.step() was called, but the plan updates every table inside the backward "
                "(in_backward: true): leave the call out, or set in_backward: false"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step_of([p for group in self.param_groups if not group["in_backward"] for p in group["params"]])
        return loss

    def _step_of(self, params: list[Tensor]) -> None:
        """Step those of ``params`` that have a gradient."""
        chosen = {id(p) for p in params if p.grad is not None}
        given = [(name, param, group) for name, (param, group) in self._by_name.items() if id(param) in chosen]
        rules = KeptRules([param for _, param, _ in given], [group for *_, group in given])
        updates: list[Any] = rules.next(range(len(given)), self.state, self._start)
        work, cut = [], []
        for (name, param, group), update in zip(given, updates):
            grad = param.grad if param.grad.is_sparse else _touched_rows(param.grad)
            if self._is_cut(name, group):
                grad = coalesced(grad)
                cut.append((name, param.detach(), grad._indices()[0], grad._values(), update))
            else:
                work.append((param, grad, update))
        apply(work)
        self._step_cut(cut)

    def _is_cut(self, name: str, group: dict) -> bool:
        """Whether a row's state needs columns that other ranks hold."""
        return self.row_squares is not None and name in self.row_squares and group["kind"] == "rowwise_adagrad"

    def _step_cut(self, work: list[tuple], spent: bool = False) -> None:
        if work:
            self.row_squares.update(work, spent)
            torch.autograd.graph.increment_version([self._by_name[name][0] for name, *_ in work])

    @torch.no_grad()
    def step_held(self, params: list[Tensor]) -> None:
        """Step tables from their ``.grad`` inside a backward, and use it up: whole tables whose gradient was averaged over ranks."""
        if self.guard is not None:
            self.guard.before_update()
        self._step_of(params)
        for param in params:
            param.grad = None

    def tables_of(self, names: tuple[str, ...]) -> list[Tensor | None]:
        """The parameters that go by ``names``; None for one that is not updated here."""
        found = self._by_names.get(names)
        if found is None:
            found = self._by_names[names] = [self._by_name[name][0] if name in self._by_name else None for name in names]
        return found

    def launch_key(self, table: str) -> tuple:
        """Tables with equal keys can be updated in one launch."""
        param, group = self._by_name[table]
        return param.device, param.dtype, bool(group.get("stochastic"))

    def update_rows(self, spec: GroupSpec, slot_grads, indices, offsets, sample_weights) -> None:
        """The in-backward update of the tables of ``spec``; called once by each backward that reached them."""
        if self.guard is not None:
            self.guard.before_update()
        if self.before_update is not None:
            self.before_update(spec, indices)
        kept = self._launches.get(id(spec))
        if kept is None:
            if len(self._launches) >= 256:
                self._launches.clear()
            held = [self._by_name[table.name] for table in spec.tables]
            kept = self._launches[id(spec)] = spec, KeptRules([param for param, _ in held], [group for _, group in held])
        tables, groups = kept[1].tables, kept[1].groups
        # A table that was frozen since has no update, as it would have no gradient.
        due = [i for i, param in enumerate(tables) if param.requires_grad]
        if any([g is None for g in slot_grads]):
            reached = {lookup.table for lookup in spec.lookups if slot_grads[lookup.slot] is not None}
            due = [i for i in due if i in reached]
        updates = kept[1].next(due, self.state, self._start)
        raise_bad_ids(tables[0])
        run = op.implementation(tables[0].device)
        if groups[0].get("stochastic"):
            seeds = [0 if u is None else seed_of(t.name, u.step) for t, u in zip(spec.tables, updates)]
            low_tables.update(run, spec, slot_grads, tables, indices, offsets, sample_weights, updates, seeds)
            return self._updated(tables)
        slot_grads = [None if g is None else g.to(tables[0].dtype) for g in slot_grads]
        cut = [False]
        if self.row_squares is not None:
            cut = [u is not None and self._is_cut(t.name, group) for t, group, u in zip(spec.tables, groups, updates)]
        if any(cut):
            given, names = (spec, slot_grads, tables, indices, offsets, sample_weights), [t.name for t in spec.tables]
            passes = cpu.two_passes(*given, [u if is_cut else None for u, is_cut in zip(updates, cut)]) if run is cpu else None
            if passes is not None:
                self.row_squares.update_in_two(names, passes)
            else:
                pairs = run.sparse_gradients(*given, cut)
                self._step_cut([(n, t, *pair, u) for n, t, pair, u in zip(names, tables, pairs, updates) if pair is not None], spent=True)
            updates = [None if is_cut else u for u, is_cut in zip(updates, cut)]
        if not all(cut):
            run.update(spec, slot_grads, tables, indices, offsets, sample_weights, updates)
        return self._updated(tables)

    def _updated(self, tables: list[Tensor]) -> None:
        if self.after_update is not None:
            self.after_update(tables)
        torch.autograd.graph.increment_version(tables)
        if self.guard is not None:
            self.guard.after_update()


def _touched_rows(grad: Tensor) -> Tensor:
    rows = grad.ne(0).any(dim=1).nonzero().squeeze(1)
    return torch.sparse_coo_tensor(rows.unsqueeze(0), grad[rows], grad.shape, is_coalesced=True, check_invariants=False)
