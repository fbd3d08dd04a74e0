"""``training: {in_backward: all}``: every parameter is stepped as its gradient arrives in the backward, and the gradient is freed.

The loop stays as it was, ``backward(); optim.step(); optim.zero_grad()``, and so do the numbers: a parameter's gradient is complete when
autograd adds it to ``.grad`` (all its uses in one backward have been summed), and the torch optimizers taken here step each parameter
by itself. ``step()`` then steps what the backward did not reach, and runs hooks and schedulers. Tables whose sparse gradients are
stepped row by row are stepped together, in one launch, when the backward ends.

What such a loop cannot follow is refused with :class:`InBackwardError`: a second backward before ``step()`` (accumulation), before any
parameter moves; ``zero_grad()`` or changed options between the backward and ``step()``, clipping or reading a gradient that is used up,
a gradient written afterwards, an enabled GradScaler, ``create_graph=True``, gradients that a process group may still average. Only backwards of the optimized
model's own outputs count: others (under ``torch.compile`` all of them) leave gradients as ever, for ``step()``.
"""
from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import (
    ASGD,
    SGD,
    Adadelta,
    Adafactor,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
    Rprop,
    SparseAdam,
)  # fmt: skip

from ..kernels.dense.fused_step import fused_step
from ..kernels.embedding.row_wise import step_for_schedulers
from ..passes.records import APPLIED, SKIPPED, Record
from .errors import InBackwardError, PlanError
from .in_backward_guard import InBackwardGuard, Scalers, UpdatedInBackward, placeholder, refuse_fp16_autocast

# They step each parameter by itself, from its own gradient and state.
_ALONE = (SGD, Adam, AdamW, Adagrad, Adamax, NAdam, RAdam, RMSprop, Adadelta, Rprop, ASGD, Adafactor, SparseAdam)
_WAY_OUT = "take training.in_backward out of the plan"
_KIND = "dense updates"


class SteppedInBackward(UpdatedInBackward):
    """The ``.grad`` of a parameter that was stepped in the backward: shape, dtype and device can be read, values cannot."""

    @classmethod
    def refusal(cls, name: str) -> str:
        return (
            f"{name} was called on a gradient that was used up in the backward, where the plan's in_backward: all steps every parameter "
            f"(gradient clipping, a gradient scaler, another optimizer, a logger?). To do that between backward() and step(), {_WAY_OUT}"
        )


def why_not_one_by_one(optimizer: Optimizer) -> str:
    """Why the parameters of ``optimizer`` cannot be stepped one by one with the same result; "" where they can."""
    kind = getattr(type(optimizer), "_base", type(optimizer))
    if kind not in _ALONE:
        known = ", ".join(c.__name__ for c in _ALONE)
        return f"{kind.__name__} may need all gradients at once; torch's own {known} are known to step each parameter by itself"
    for group in optimizer.param_groups:
        found = next((key for key in ("differentiable", "capturable") if group.get(key)), None)
        if found is not None:
            return f"{kind.__name__} runs with {found} set"
        if len({p.device.type for p in group["params"]}) > 1:
            return f"a param group of {kind.__name__} is on several kinds of devices, where stepping one by one picks other kernels"
    return ""


class BackwardSteps:
    """The backwards of one optimized model, whose parameters ``optimizer`` (what :func:`step_in_backward` returned) steps."""

    def __init__(self, model: Any, optimizer: Any, tables: InBackwardGuard | None) -> None:
        self._model, self._optimizer, self._tables = weakref.ref(model), weakref.ref(optimizer), tables
        self._scalers = Scalers()
        self.waits: list[Callable[[], None]] = []  # until nothing reads tables ahead (staleness.py)
        self._task: int | None = None
        self._hooks: list[Any] = []
        self._groups: dict[int, dict] = {}  # of the running backward: parameter -> its param group
        self._options: list[dict] = []  # of the param groups, as the running backward uses them
        self.stepped: dict[int, Tensor] = {}  # by the last backward, for which step() is still to come

    # --- as the model's guard ------------------------------------------------------------------------------------------------

    def before_forward(self) -> None:
        """Raises :class:`InBackwardError` under fp16 autocast, which needs loss scaling."""
        refuse_fp16_autocast("parameters stepped in the backward", _WAY_OUT)

    def watch(self, outputs) -> None:
        """Step parameters in the backward of these outputs."""
        if self._tables is not None:
            self._tables.watch(outputs)
        if self._optimizer() is not None:
            for output in outputs:
                if isinstance(output, Tensor) and output.requires_grad:
                    output.register_hook(self._start)

    # --- one backward --------------------------------------------------------------------------------------------------------

    def _start(self, grad: Tensor) -> None:
        task, optimizer, model = torch._C._current_graph_task_id(), self._optimizer(), self._model()
        if task == self._task or optimizer is None or model is None:
            return
        self.refuse_half()
        self._refuse(optimizer, {id(p) for p in model.parameters()})
        for wait in self.waits:
            wait()
        self._task = task
        mine, by_row = {id(p) for p in model.parameters()}, optimizer.__dict__.get("_row_wise_tables", {})
        self._options = _options(optimizer)
        self._groups = {}
        for group in optimizer.param_groups:
            for param in group["params"]:
                if id(param) not in mine:
                    continue
                if isinstance(param.grad, SteppedInBackward):
                    param.grad = torch.zeros_like(param) if param.grad.cleared else None
                if id(param) not in by_row and param.requires_grad:
                    self._groups[id(param)] = group
                    self._hooks.append(param.register_post_accumulate_grad_hook(self._arrived))
        torch.autograd.Variable._execution_engine.queue_callback(self._end)

    def _refuse(self, optimizer: Optimizer, mine: set[int]) -> None:
        if self.stepped:
            raise InBackwardError(
                "a backward starts before step() was called for the last one: gradients are being accumulated, and the parameters have been "
                f"stepped with those of the last one already. Call step() after each backward, or {_WAY_OUT}. Nothing was changed by this backward"
            )
        held = [p for g in optimizer.param_groups for p in g["params"] if id(p) in mine and isinstance(p.grad, SteppedInBackward) and not p.grad.cleared]
        if held:
            raise InBackwardError(
                "a backward starts and zero_grad() was not called since the last one: gradients are being accumulated, and those of the last one "
                f"are used up. Call zero_grad() before each backward, or {_WAY_OUT}. Nothing was changed by this backward"
            )
        if torch.is_grad_enabled():
            raise InBackwardError(f"this backward records itself (create_graph=True), and parameters would change under it: {_WAY_OUT}")
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise InBackwardError(
                f"gradients of {dist.get_world_size()} processes are to be averaged (DistributedDataParallel?) before a step, and parameters "
                f"stepped in the backward would take this process's own: {_WAY_OUT}"
            )
        self._scalers.refuse(f"parameters stepped in the backward would take its scaled gradients. Drop it (bf16 and fp32 need none), or {_WAY_OUT}. Nothing was changed by this backward")

    @torch.no_grad()
    def _arrived(self, param: Tensor) -> None:
        optimizer = self._optimizer()
        if optimizer is None or torch._C._current_graph_task_id() != self._task or param.grad is None:
            return  # a backward inside this one (a reentrant checkpoint) brings a part
        if id(param) in self.stepped:
            return  # refused at the end
        self.stepped[id(param)] = param
        optimizer.step_only(self._groups[id(param)], [param], one_by_one=True)
        param.grad = None

    @torch.no_grad()
    def _end(self) -> None:
        self._unhook()
        optimizer = self._optimizer()
        if optimizer is None:
            return
        by_row = optimizer.__dict__.get("_row_wise_tables", {})
        for group in optimizer.param_groups:
            tables = [p for p in group["params"] if id(p) in by_row and p.grad is not None and p.grad.is_sparse]
            if tables:
                optimizer.step_only(group, tables)
                self.stepped.update((id(p), p) for p in tables)
                for table in tables:
                    table.grad = None
        late = [p for p in self.stepped.values() if p.grad is not None]
        for param in self.stepped.values():
            param.grad = placeholder(param, SteppedInBackward)
        if late:
            raise InBackwardError(
                f"a gradient of {_described(self._model(), late[0])} arrived in parts, the second after its step (a reentrant checkpoint?): "
                f"parameters have been stepped with less than their gradients. Use use_reentrant=False, or {_WAY_OUT}"
            )

    def refuse_half(self) -> None:
        """Raises :class:`InBackwardError`, once, where the last backward failed half way."""
        if self._task is None:
            return
        self._unhook()
        count, self.stepped = len(self.stepped), {}
        if count:
            raise InBackwardError(
                f"the last backward failed after {count} parameters had been stepped with its gradients; others have not been. Load a checkpoint, or go "
                f"on with zero_grad(). For loops that catch what a backward raises, {_WAY_OUT}"
            )

    def _unhook(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._task = [], None

    # --- what the loop does then -----------------------------------------------------------------------------------------------

    def before_step(self, optimizer: Optimizer) -> list[Tensor]:
        """The parameters that need no step now. Raises :class:`InBackwardError` where the plain loop would have stepped otherwise."""
        if not self.stepped:
            return []
        for param in self.stepped.values():
            what = _described(self._model(), param)
            if param.grad is None:
                raise InBackwardError(f"the gradient of {what} was cleared between backward() and step(), and is used up already. To skip steps, {_WAY_OUT}")
            if not isinstance(param.grad, SteppedInBackward) or param.grad._version or param.grad.cleared:
                raise InBackwardError(f"the gradient of {what} was written after the backward that stepped it. To change gradients before step(), {_WAY_OUT}")
        if not _equal(self._options, _options(optimizer)):
            raise InBackwardError(f"the options of {type(optimizer).__name__} (lr?) changed between backward() and step(); the parameters were stepped with the old ones. Change them after step(), or {_WAY_OUT}")
        done = list(self.stepped.values())
        self.stepped = {}
        return done


class _Stepping:
    """Mixed into the class of the user's optimizer."""

    _arrivals: list[BackwardSteps]

    def step_only(self, group: dict, params: list[Tensor], one_by_one: bool = False) -> None:
        """Step ``params`` of ``group``, by the plain step (``one_by_one``) or by that of tables."""
        groups = self.param_groups  # type: ignore[has-type]
        self.param_groups = [{**group, "params": params}]
        as_whole = fused_step(self) if one_by_one and hasattr(self, "_row_wise_tables") else nullcontext()  # type: ignore[arg-type]
        try:
            with as_whole:
                (self._torch_step if one_by_one else self._whole_step)(self)  # type: ignore[attr-defined]
        finally:
            self.param_groups = groups

    def step(self, closure: Callable[[], float] | None = None):
        """As in the base optimizer; ``closure`` is evaluated once, first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for each in self._arrivals:
            each.refuse_half()
        done = [p for each in self._arrivals for p in each.before_step(self)]  # type: ignore[arg-type]
        held = [p.grad for p in done]
        for param in done:
            param.grad = None
        try:
            self._whole_step(self)  # type: ignore[attr-defined]
        finally:
            for param, grad in zip(done, held):
                param.grad = grad
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch. Raises :class:`InBackwardError` between a backward and its ``step()``."""
        for each in self._arrivals:
            each.refuse_half()
        if any(each.stepped for each in self._arrivals):
            raise InBackwardError(f"zero_grad() was called between backward() and step(), and the gradients are used up already. To skip steps, {_WAY_OUT}")
        for group in self.param_groups:
            for param in group["params"]:
                if isinstance(param.grad, SteppedInBackward):
                    param.grad = None if set_to_none else torch.zeros_like(param)
        super().zero_grad(set_to_none)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: int):
        """A copy steps as ever: no backward knows it."""
        plain = self._parent.__new__(self._parent)  # type: ignore[attr-defined]
        plain.__dict__ = self.__dict__
        return plain.__reduce_ex__(protocol)


@functools.cache
def _class(parent: type[Optimizer]) -> type[Optimizer]:
    base = getattr(parent, "_base", parent)
    own = {"__doc__": parent.__doc__, "__module__": __name__, "_base": base, "_parent": parent}
    cls = type(parent.__name__, (_Stepping, parent), own)
    # torch wraps each class's step with hooks: those run once, around step() itself
    cls._whole_step = staticmethod(getattr(parent.step, "__wrapped__", parent.step))  # type: ignore[attr-defined]
    cls._torch_step = staticmethod(getattr(base.step, "__wrapped__", base.step))  # type: ignore[attr-defined]
    return cls


def step_in_backward(model: Any, optimizer: Optimizer) -> Optimizer:
    """``optimizer`` as one whose parameters in ``model`` (optimized) are stepped in the backward; it shares everything with the original.

    Raises :class:`PlanError` where that would not be the plain loop's result; adds to the model's report what is stepped where.
    """
    reason = why_not_one_by_one(optimizer)
    if not reason and model._sharded is not None:
        reason = "the model runs over several ranks, whose gradients are averaged before a step"
    tiered = next((n for n in (*model.tiers, *model.dynamic_ids) if any(p is model.get_parameter(n) for g in optimizer.param_groups for p in g["params"])), None)
    if not reason and tiered is not None:
        reason = f"table '{tiered}' is in tiers or has dynamic ids, and {type(optimizer).__name__} updates it (give it an embedding_optimizer with in_backward: true)"
    if reason:
        raise PlanError(f"training is in_backward: all, but {reason}. {_WAY_OUT.capitalize()}")
    parent = type(optimizer)._parent if isinstance(optimizer, _Stepping) else type(optimizer)  # type: ignore[attr-defined]
    cls = _class(parent)
    result = cls.__new__(cls)
    result.__dict__ = optimizer.__dict__
    steps = BackwardSteps(model, result, model._guard)
    known = [each for each in optimizer.__dict__.get("_arrivals", []) if each._model() is not None]
    result._arrivals = [*known, steps]  # type: ignore[attr-defined]
    for each in known:
        each._optimizer = weakref.ref(result)
    result._patch_step_function()
    if hasattr(result.__dict__.get("step"), "_wrapped_by_lr_sched"):
        step_for_schedulers(result)
    model.__dict__["_guard"] = steps
    model.__dict__["_report"] = replace(model.report, records=(*model.report.records, *_records(model, result)))
    return result


def without_optimizer(model: Any) -> None:
    """``in_backward: all`` and no ``optimizer=``: it is said in the report."""
    reason = "no optimizer was given: pass optimizer= to optimize()"
    rows = [Record(_KIND, SKIPPED, name, "in_backward", reason) for name, _ in model.named_parameters()]
    model.__dict__["_report"] = replace(model.report, records=(*model.report.records, *rows))


def _records(model: Any, optimizer: Optimizer) -> list[Record]:
    held = {id(p) for g in optimizer.param_groups for p in g["params"]}
    by_row = optimizer.__dict__.get("_row_wise_tables", {})
    ours = model._in_backward_tables()
    made = []
    for name, param in model.named_parameters():
        if id(param) in ours:
            continue  # the plan's own optimizer updates it, and there is a row for that
        if id(param) not in held:
            made.append(Record(_KIND, SKIPPED, name, "in_backward", f"the {type(optimizer).__name__} passed as optimizer= does not hold it"))
        else:
            how = "row by row, when the backward ends" if id(param) in by_row else "as its gradient arrives"
            made.append(Record(_KIND, APPLIED, name, "in_backward", detail=f"stepped by {type(optimizer).__name__} {how}"))
    return made


def _options(optimizer: Optimizer) -> list[dict]:
    return [
        {k: v.clone() if isinstance(v, Tensor) else v for k, v in group.items() if k not in ("params", "initial_lr")} for group in optimizer.param_groups
    ]


def _equal(one: list[dict], other: list[dict]) -> bool:
    return len(one) == len(other) and all(
        a.keys() == b.keys() and all(torch.equal(v, w) if isinstance(v, Tensor) and isinstance(w := b[k], Tensor) else v is b[k] or v == b[k] for k, v in a.items())
        for a, b in zip(one, other)
    )


def _described(model: Any, param: Tensor) -> str:
    found = next((n for n, p in model.named_parameters() if p is param), "") if model is not None else ""
    return f"'{found}'" if found else "a parameter"
