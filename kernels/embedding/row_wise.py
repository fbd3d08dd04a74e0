"""The user's own optimizer as one that steps only the looked-up rows of tables, sharing its param groups and its state, so that
schedulers, ``state_dict`` and the user's own object go on meaning the same thing.
"""
from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, SparseAdam
from torch.optim.optimizer import _global_optimizer_post_hooks as _AFTER_ALL
from torch.optim.optimizer import _global_optimizer_pre_hooks as _BEFORE_ALL

from ..dense.fused_step import adagrad_at_once, fused_step
from . import cpu
from .sparse_steps import apply
from .updates import TableUpdate


def _step_count(state: dict) -> int:
    """Advance ``state["step"]`` (a tensor, as torch keeps it, or an int, as SparseAdam does) and return it."""
    state["step"] += 1
    return int(state["step"])


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

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in the base optimizer."""
        if not set_to_none or _is_watched():
            return super().zero_grad(set_to_none)  # type: ignore[misc]
        for group in self.param_groups:  # type: ignore[attr-defined]
            for param in group["params"]:
                param.grad = None

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
            if not self._unscaled([grad for _, _, grads in taken for grad in grads] + [grad for _, grad in whole]):
                return loss
            for group, tables, grads in taken:
                work += zip(tables, grads, make_updates(self.state, tables, group))  # type: ignore[attr-defined]
            apply(work)
        return loss

    def _unscaled(self, grads: list[Tensor]) -> bool:
        """Where a ``GradScaler`` leaves its work to steps with ``fused=True``: divide ``grads`` by its scale as those do. False: skip the step."""
        found, scale = (getattr(self, name, None) for name in ("found_inf", "grad_scale"))
        if found is not None and bool(found):
            return False
        for grad in grads if scale is not None else ():
            grad._values().div_(scale.to(grad.device))
        return True


_UPDATES = {SGD: _sgd, Adagrad: _adagrad, Adam: _adam, AdamW: _adam, SparseAdam: _sparse_adam}


@functools.cache
def _class(base: type[Optimizer]) -> type[Optimizer]:
    """The row-wise subclass of a torch optimizer class."""
    cls = type(base.__name__, (_RowWise, base), {"__doc__": base.__doc__, "__module__": __name__, "_base": base})
    # torch wraps each class's step with hooks and a profiler range; calling the wrapped base step would run hooks twice.
    cls._base_step = staticmethod(getattr(base.step, "__wrapped__", base.step))  # type: ignore[attr-defined]
    cls.step = _hooked(cls.step)  # type: ignore[method-assign]
    return cls


def _hooked(plain: Callable) -> Callable:
    """What torch makes of an optimizer's ``step``, without the profiler's range (60 us where they have left the caches) while nobody looks."""
    watched = Optimizer.profile_hook_step(plain)

    @functools.wraps(plain)
    def step(self, *args, **kwargs):
        hooks = self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks or _BEFORE_ALL or _AFTER_ALL
        return (watched if hooks or _is_watched() else plain)(self, *args, **kwargs)

    step.hooked = True  # type: ignore[attr-defined]
    return step


def _is_watched() -> bool:
    """Whether a profiler or a compiler wants to see torch's own way."""
    return torch.compiler.is_compiling() or torch._C._autograd._profiler_enabled()


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
