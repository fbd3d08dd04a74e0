"""``training: {accumulate: n}``: ``step()`` takes effect at every n-th call, with the sum of what n backwards gave.

The loop stays ``backward(); optim.step(); optim.zero_grad()`` and does what the plain loop does that calls both at every n-th batch only: in
between, ``zero_grad()`` of the optimizers and of the optimized model keep the gradients. They are summed, as torch does; for the mean
divide the loss by n. Schedulers are stepped where the loop steps them. What is left of an incomplete round goes on with the next batch.
"""
from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from ..kernels.embedding.row_wise import step_for_schedulers
from .errors import InBackwardError, PlanError
from .in_backward_guard import Scalers


class Rounds:
    """Where in its round each optimizer of one model is. Also watches for batches whose gradients the loop wants to drop."""

    def __init__(self, length: int, guard: Any) -> None:
        self.length, self._guard = length, guard
        self.calls: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self.fresh = False  # a backward came since the last step()
        self.scalers = Scalers()

    def before_forward(self) -> None:
        if self._guard is not None:
            self._guard.before_forward()

    def watch(self, outputs) -> None:
        """Notice that a backward of these outputs begins."""
        if self._guard is not None:
            self._guard.watch(outputs)
        for output in outputs:
            if isinstance(output, Tensor) and output.requires_grad:
                output.register_hook(self._begins)

    def _begins(self, grad: Tensor) -> None:
        self.fresh = True

    def keeps_gradients(self, optimizer: Any = None) -> bool:
        """Whether ``zero_grad()`` of an optimizer (of the model) has nothing to do now. Raises :class:`InBackwardError` where it would have to
        drop those of one batch."""
        under_way = any(self.calls.values()) if optimizer is None else bool(self.calls.get(optimizer))
        if under_way and self.fresh:
            raise InBackwardError(
                f"zero_grad() was called between backward() and step() while gradients of {self.length} batches are being summed: those of one batch "
                "cannot be taken out again. Leave a bad batch out before its backward, or take training.accumulate out of the plan"
            )
        return under_way


class _Rounds:
    """Mixed into the class of an optimizer."""

    _rounds: Rounds

    def step(self, closure: Callable[[], float] | None = None):
        """As in the base optimizer at every n-th call; before, only ``closure`` is evaluated, once."""
        rounds = self._rounds
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        rounds.scalers.refuse(
            "it unscales what was unscaled before, where gradients of several batches are summed (training.accumulate). Drop it (bf16 and fp32 need none), or step at every n-th batch yourself"
        )
        rounds.fresh = False
        calls = rounds.calls[self] = (rounds.calls.get(self, 0) + 1) % rounds.length
        if calls == 0:
            self._every_step(self)  # type: ignore[attr-defined]
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch, but for gradients that the step to come still needs: those stay."""
        if not self._rounds.keeps_gradients(self):
            super().zero_grad(set_to_none)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: int):
        """A copy steps at every call."""
        plain = self._parent.__new__(self._parent)  # type: ignore[attr-defined]
        plain.__dict__ = self.__dict__
        return plain.__reduce_ex__(protocol)


@functools.cache
def _class(parent: type[Optimizer]) -> type[Optimizer]:
    own = {"__doc__": parent.__doc__, "__module__": __name__, "_base": getattr(parent, "_base", parent), "_parent": parent}
    cls = type(parent.__name__, (_Rounds, parent), own)
    cls._every_step = staticmethod(getattr(parent.step, "__wrapped__", parent.step))  # type: ignore[attr-defined]
    return cls


def step_by_rounds(model: Any, optimizer: Optimizer | None, length: int) -> Optimizer | None:
    """``optimizer`` as one that steps at every ``length``-th call, sharing everything with the original; the model's own embedding optimizer
    does the same. Raises :class:`PlanError` for LBFGS, whose step runs backwards of its own, and over several ranks."""
    if isinstance(optimizer, LBFGS):
        raise PlanError(f"training.accumulate is {length}, and LBFGS runs several backwards in each step: take it out of the plan")
    if model._sharded is not None:
        raise PlanError(f"training.accumulate is {length} and the model runs over several ranks (mesh=), which is not supported yet: step at every {length}th batch in the loop")
    planned = model.embedding_optimizer
    held = {id(p) for each in (optimizer, planned) if each is not None for group in each.param_groups for p in group["params"]}
    loose = next((n for n, p in model.named_parameters() if p.requires_grad and id(p) not in held and getattr(model._compiler.choices.get(n), "grad", "") != "none"), None)
    if loose is not None:
        raise PlanError(f"training.accumulate is {length}, and no optimizer that optimize() was given holds '{loose}', whose steps could not wait: pass it as optimizer=, freeze it, or step at every {length}th batch in the loop")
    rounds = Rounds(length, model._guard)
    model.__dict__["_guard"] = model.__dict__["_rounds"] = rounds
    if planned is not None:  # made by optimize(): nobody else holds it
        planned.__class__ = _class(type(planned))
        planned._rounds = rounds
        planned._patch_step_function()
    if optimizer is None:
        return None
    cls = _class(type(optimizer))
    result = cls.__new__(cls)
    result.__dict__ = optimizer.__dict__
    result._rounds = rounds  # type: ignore[attr-defined]
    result._patch_step_function()
    if hasattr(result.__dict__.get("step"), "_wrapped_by_lr_sched"):
        step_for_schedulers(result)
    return result
