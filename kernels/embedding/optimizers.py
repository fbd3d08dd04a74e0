"""Real ``torch.optim`` optimizers whose step updates only the looked-up rows of tables, all tables in one launch.

Two of them. :func:`row_wise` turns the user's own optimizer into one that does the same on sparse table gradients, sharing its
param groups and its state, so that schedulers, ``state_dict`` and the user's own object go on meaning the same thing.
:class:`RowUpdates` is the one a plan asks for: SGD, AdaGrad, rowwise AdaGrad or lazy Adam over tables only.
"""
from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, SparseAdam

from ..dense.fused_step import adagrad_at_once, fused_step
from ..memory import use_huge_pages
from . import cpu, low_tables
from .kept_rules import STATE, KeptRules
from .rounding import seed_of
from .spec import GroupSpec
from .updates import TableUpdate


def _implementation(table: Tensor):
    from .op import implementation

    return implementation(table.device)


def _raise_bad_ids(table: Tensor) -> None:
    """On a GPU ids are checked without waiting for them: no row may be updated before a bad one has been reported."""
    if table.device.type == "cuda":
        from . import gpu

        gpu.check_ids()


def _apply(work: list[tuple[Tensor, Tensor, TableUpdate]]) -> None:
    """Update every (table, sparse gradient) pair; one launch per dtype and device."""
    launches: dict[tuple, list] = {}
    for item in work:
        launches.setdefault((item[0].device, item[0].dtype), []).append(item)
    for items in launches.values():
        tables, grads, updates = map(list, zip(*items))
        if not (tables[0].is_cpu and cpu.update_from_gradients(tables, grads, updates)):
            held = [table.detach() for table in tables]
            grads = [_coalesced(grad) for grad in grads]
            rows = [g._indices().squeeze(0) for g in grads]
            values = [g._values() for g in grads]
            _raise_bad_ids(held[0])
            _implementation(held[0]).update_from_sparse(held, rows, values, updates)
        torch.autograd.graph.increment_version(tables)  # the kernels write behind autograd's back


def _coalesced(grad: Tensor) -> Tensor:
    """``grad`` with ascending rows, each once. Compiled backwards lose the mark though their rows are: look before sorting."""
    if grad.is_coalesced():
        return grad
    rows = grad._indices()[0]
    return grad if bool((rows[1:] > rows[:-1]).all()) else grad.coalesce()


def _step_count(state: dict) -> int:
    """Advance ``state["step"]`` (a tensor, as torch keeps it, or an int, as SparseAdam does) and return it."""
    state["step"] += 1
    return int(state["step"])


# --- the user's optimizer ------------------------------------------------------------------------------------------------------
# One function per kind of optimizer: the updates of this step for some tables of one param group.


def _sgd(states: dict, tables: list[Tensor], group: dict) -> list[TableUpdate]:
    return [TableUpdate("sgd", lr=float(group["lr"]), maximize=group["maximize"])] * len(tables)


def _adagrad(states: dict, tables: list[Tensor], group: dict) -> list[TableUpdate]:
    held = [states[table] for table in tables]
    lr, decay, eps, maximize = float(group["lr"]), group["lr_decay"], group["eps"], group["maximize"]
    steps = [state["step"] for state in held]
    if cpu.count_up(steps):
        torch.autograd.graph.increment_version(steps)
    else:
        for state in held:
            state["step"] += 1
    rates = [lr] * len(held)
    if decay != 0:  # reading a tensor costs as much as the rest of this function
        rates = [lr / (1 + (int(state["step"]) - 1) * float(decay)) for state in held]
    return [
        TableUpdate("adagrad", lr=rate, eps=eps, maximize=maximize, state=(state["sum"],)) for rate, state in zip(rates, held)
    ]


def _adam(states: dict, tables: list[Tensor], group: dict, first_step=None) -> list[TableUpdate]:
    lr, eps, (beta1, beta2) = float(group["lr"]), group["eps"], map(float, group["betas"])
    updates = []
    for table in tables:
        state = states[table]
        if not state:
            state["step"] = torch.tensor(0.0) if first_step is None else first_step
            state["exp_avg"] = torch.zeros_like(table)
            state["exp_avg_sq"] = torch.zeros_like(table)
        updates.append(
            TableUpdate(
                "adam", lr=lr, eps=eps, beta1=beta1, beta2=beta2, step=_step_count(state),
                weight_decay=group.get("weight_decay", 0.0), maximize=group["maximize"],
                state=(state["exp_avg"], state["exp_avg_sq"]),
            )  # fmt: skip
        )
    return updates


def _sparse_adam(states: dict, tables: list[Tensor], group: dict) -> list[TableUpdate]:
    return _adam(states, tables, group, first_step=0)


def why_not_row_wise(optimizer: Optimizer, group: dict, lazy: bool) -> str | None:
    """Why tables of this param group cannot be updated row by row with the same result, or ``None`` if they can.

    ``lazy`` also allows what only approximates the plain optimizer: Adam and AdamW on touched rows alone.
    """
    kind = getattr(type(optimizer), "_base", type(optimizer))
    name = kind.__name__
    if kind not in _UPDATES:
        return f"{name} is not torch's own SGD, Adagrad, SparseAdam, Adam or AdamW, so what its step does is unknown here"
    if group.get("differentiable") or group.get("capturable"):
        return f"{name} runs with differentiable or capturable set"
    if kind is SGD:
        if group["momentum"] != 0:
            return f"SGD with momentum={group['momentum']} moves rows that were not looked up"
        if group["weight_decay"] != 0:
            return f"SGD with weight_decay={group['weight_decay']} decays rows that were not looked up"
    if kind is Adagrad:
        if group["weight_decay"] != 0:
            return f"Adagrad with weight_decay={group['weight_decay']} decays rows that were not looked up"
        if group["eps"] == 0 and group["initial_accumulator_value"] == 0:
            return "Adagrad with eps=0 and no initial accumulator divides 0 by 0 on rows that were not looked up"
    if kind in (Adam, AdamW):
        if group["amsgrad"]:
            return f"{name} with amsgrad has no row-wise form here"
        if group["weight_decay"] != 0 and not (kind is AdamW or group.get("decoupled_weight_decay")):
            return f"{name} with weight_decay={group['weight_decay']} (not decoupled) has no row-wise form here"
        if not lazy:
            return f"{name} moves rows that were not looked up; `numerics: approximate` allows updating touched rows only"
    return None


class _RowWise:
    """Mixed into the class of the user's optimizer: the tables' sparse gradients are stepped here, all others there."""

    _row_wise_tables: dict[int, Tensor]
    _row_wise_lazy: bool = False

    def __reduce_ex__(self, protocol):
        own = {"_tables": list(self._row_wise_tables.values()), "_row_wise_lazy": self._row_wise_lazy}
        return _new, (self._base,), {**self.__getstate__(), **own}  # type: ignore[attr-defined]

    def __setstate__(self, state: dict) -> None:
        state = dict(state)
        if "_tables" in state:  # a copy has tables of its own
            self._row_wise_tables = {id(t): t for t in state.pop("_tables")}
            self._row_wise_lazy = state.pop("_row_wise_lazy")
        super().__setstate__(state)  # type: ignore[misc]

    def step(self, closure: Callable[[], float] | None = None):
        """As in the base optimizer; ``closure`` is evaluated once, first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        base, make_updates = self._base_step, _UPDATES[self._base]  # type: ignore[attr-defined]
        ours = self._row_wise_tables
        taken: list[tuple[dict, list[Tensor], list[Tensor]]] = []  # by group: tables and their gradients
        whole: list[tuple[Tensor, Tensor]] = []
        others: list[tuple[dict, list[Tensor]]] = []  # by group: what the plain step does
        for group in self.param_groups:  # type: ignore[attr-defined]
            # A scheduler or a loaded state may have changed what the step means: then the plain step does it, on all rows.
            reason = why_not_row_wise(self, group, self._row_wise_lazy)  # type: ignore[arg-type]
            tables, grads, plain = [], [], []
            for param in group["params"]:
                grad = param.grad
                if grad is None:
                    continue
                if not grad.is_sparse or id(param) not in ours:
                    plain.append(param)
                elif reason is None:
                    tables.append(param)
                    grads.append(grad)
                else:
                    whole.append((param, grad))
            if tables:
                taken.append((group, tables, grads))
            if plain:
                others.append((group, plain))
        at_once = [adagrad_at_once(self, *each) for each in others] if self._base is Adagrad and not whole else [None]  # type: ignore[attr-defined, arg-type]
        if others and None not in at_once:
            with torch.no_grad():
                for run in at_once:
                    run()  # type: ignore[misc]
        elif others or whole:
            hidden = [pair for _, tables, grads in taken for pair in zip(tables, grads)]
            try:
                for param, _ in hidden:
                    param.grad = None
                for param, grad in whole:
                    param.grad = grad.to_dense()
                with fused_step(self):  # type: ignore[arg-type]
                    base(self)
            finally:
                for param, grad in [*hidden, *whole]:
                    param.grad = grad
        work = []
        with torch.no_grad():
            for group, tables, grads in taken:
                work += zip(tables, grads, make_updates(self.state, tables, group))  # type: ignore[attr-defined]
            _apply(work)
        return loss


_UPDATES = {SGD: _sgd, Adagrad: _adagrad, Adam: _adam, AdamW: _adam, SparseAdam: _sparse_adam}


@functools.cache
def _class(base: type[Optimizer]) -> type[Optimizer]:
    """The row-wise subclass of a torch optimizer class."""
    cls = type(base.__name__, (_RowWise, base), {"__doc__": base.__doc__, "__module__": __name__, "_base": base})
    # torch wraps each class's step with hooks and a profiler range; calling the wrapped base step would run hooks twice.
    cls._base_step = staticmethod(getattr(base.step, "__wrapped__", base.step))  # type: ignore[attr-defined]
    return cls


def _new(base: type[Optimizer]) -> Optimizer:
    cls = _class(base)
    return cls.__new__(cls)


def row_wise(optimizer: Optimizer, tables: Iterable[Tensor], lazy: bool = False) -> Optimizer:
    """The user's ``optimizer`` as one that steps the sparse gradients of ``tables`` in one fused, row-wise launch.

    The result is an instance of the same class and *shares everything* with the original (one ``__dict__``): param groups, state
    and hooks. So a learning-rate scheduler built on either works for both, ``state_dict`` and ``load_state_dict`` of either mean
    both. Stepping the original still does the same, only slower (not so for ``lazy`` Adam, whose base refuses sparse gradients).
    Every table must have passed :func:`why_not_row_wise`. An optimizer over several models may be passed once for each.
    """
    result = _new(getattr(type(optimizer), "_base", type(optimizer)))
    result.__dict__ = optimizer.__dict__
    earlier = optimizer.__dict__.get("_row_wise_tables", {})
    result._row_wise_tables = {**earlier, **{id(t): t for t in tables}}  # type: ignore[attr-defined]
    result._row_wise_lazy = lazy  # type: ignore[attr-defined]
    result._patch_step_function()
    if hasattr(result.__dict__.get("step"), "_wrapped_by_lr_sched"):
        step_for_schedulers(result)
    return result


def step_for_schedulers(optimizer: Optimizer) -> None:
    """A scheduler built on the plain optimizer has wrapped its step to see that it is called: wrap the row-wise one instead."""
    cls = type(optimizer)

    @functools.wraps(cls.step)
    def step(*args, **kwargs):
        optimizer._opt_called = True  # type: ignore[attr-defined]
        return cls.step(optimizer, *args, **kwargs)

    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    optimizer.step = step  # type: ignore[method-assign]


# --- the plan's optimizer ------------------------------------------------------------------------------------------------------


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
                grad = _coalesced(grad)
                cut.append((name, param.detach(), grad._indices()[0], grad._values(), update))
            else:
                work.append((param, grad, update))
        _apply(work)
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
        _raise_bad_ids(tables[0])
        run = _implementation(tables[0])
        if groups[0].get("stochastic"):
            seeds = [0 if u is None else seed_of(t.name, u.step) for t, u in zip(spec.tables, updates)]
            low_tables.update(run, spec, slot_grads, tables, indices, offsets, sample_weights, updates, seeds)
            return self._updated(tables)
        slot_grads = [None if g is None else g.to(tables[0].dtype) for g in slot_grads]
        cut = [False]
        if self.row_squares is not None:
            cut = [u is not None and self._is_cut(t.name, group) for t, group, u in zip(spec.tables, groups, updates)]
        if any(cut):
            pairs = run.sparse_gradients(spec, slot_grads, tables, indices, offsets, sample_weights, cut)
            names = [t.name for t in spec.tables]
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
