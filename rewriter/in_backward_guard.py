"""Refuse loops that an update inside the backward cannot follow: accumulated, clipped or scaled gradients.

Such a loop would go on with wrong numbers, since the tables have moved before it looks at their gradients. What can be seen
is refused with :class:`InBackwardError`, before any table of that backward moves:

* *accumulation*: when a backward starts, a dense parameter still holds the gradient of an earlier one;
* *loss scaling*: a forward under fp16 autocast, or an enabled ``torch.amp.GradScaler`` in the process;
* *clipping*, and optimizers that hold the tables too: after the backward the tables' ``.grad`` is a placeholder that takes no
  memory and raises as soon as anything computes with it.
"""
from __future__ import annotations

import gc
import weakref

import torch
from torch import Tensor

from .errors import InBackwardError

_WAY_OUT = "set in_backward: false in the plan's embedding_optimizer and call opt.embedding_optimizer.step()"
_HARMLESS = {"__get__", "__repr__", "size", "stride", "dim", "storage_offset", "untyped_storage", "data_ptr", "numel", "detach"}
_CLEARING = {"detach_", "zero_", "requires_grad_"}  # what zero_grad(set_to_none=False) calls: there is nothing to clear


class UpdatedInBackward(Tensor):
    """The ``.grad`` of a table whose update has already happened: shape, dtype and device can be read, values cannot."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", str(func))
        if name in _CLEARING:
            return args[0]
        if name in _HARMLESS or name.startswith(("is_", "_is_")):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        raise InBackwardError(
            f"{name} was called on the gradient of a table that is updated inside the backward "
            "(gradient clipping, a gradient scaler, or an optimizer that holds the tables): that gradient is already used up. "
            f"Clip, scale and step opt.dense_parameters() only, or {_WAY_OUT}"
        )

    def __repr__(self) -> str:  # type: ignore[override]
        return f"UpdatedInBackward(shape={tuple(self.shape)})"


class InBackwardGuard:
    """Watches the forwards and backwards of one optimized model."""

    def __init__(self, model) -> None:
        self._model = weakref.ref(model)
        self._looked_for_scaler = False

    @staticmethod
    def of(model) -> InBackwardGuard | None:
        """A guard for ``model`` if any of its tables is updated inside the backward."""
        optimizer = model.embedding_optimizer
        if optimizer is None or not any(g["in_backward"] for g in optimizer.param_groups):
            return None
        return InBackwardGuard(model)

    def before_forward(self) -> None:
        """Raises :class:`InBackwardError` under fp16 autocast, which needs loss scaling."""
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16:
                raise InBackwardError(
                    "fp16 autocast needs loss scaling, and tables updated inside the backward would take scaled gradients. "
                    f"Use bf16 autocast, or {_WAY_OUT}"
                )

    def watch(self, outputs) -> None:
        """Check the loop when the backward of these outputs starts."""
        for output in outputs:
            if isinstance(output, Tensor) and output.requires_grad:
                output.register_hook(self._at_start)

    def _at_start(self, grad: Tensor) -> None:
        task = torch._C._current_graph_task_id()
        if task == getattr(self, "_task", None):
            return
        self._task = task
        model = self._model()
        if model is None:
            return
        self._refuse_scaler()
        for name, param in model.named_parameters():
            held = param.grad
            if held is None or isinstance(held, UpdatedInBackward) or held.is_sparse:
                continue
            if bool(held.ne(0).any()):
                raise InBackwardError(
                    f"a backward starts while '{name}' still holds the gradient of an earlier one: gradients are being "
                    "accumulated, and the tables, which are updated inside each backward, cannot wait. Call zero_grad() "
                    f"between backwards, or {_WAY_OUT}. No table was changed by this backward"
                )
        torch.autograd.Variable._execution_engine.queue_callback(self._at_end)

    def _refuse_scaler(self) -> None:
        if self._looked_for_scaler:
            return
        self._looked_for_scaler = True  # one look: walking all objects takes tens of milliseconds
        scaler_types = tuple({torch.amp.GradScaler, torch.cuda.amp.GradScaler})
        if any(isinstance(o, scaler_types) and o.is_enabled() for o in gc.get_objects() if type(o).__name__ == "GradScaler"):
            self._looked_for_scaler = False
            raise InBackwardError(
                "an enabled GradScaler exists, and tables updated inside the backward would take its scaled gradients. "
                f"Drop it (bf16 and fp32 need none), or {_WAY_OUT}. No table was changed by this backward"
            )

    def _at_end(self) -> None:
        model = self._model()
        if model is None:
            return
        for group in model.embedding_optimizer.param_groups:
            if group["in_backward"]:
                for param in group["params"]:
                    if param.grad is None:
                        param.grad = _placeholder(param)


def _placeholder(param: Tensor) -> Tensor:
    return torch.zeros(1, dtype=param.dtype, device=param.device).expand(param.shape).as_subclass(UpdatedInBackward)


def drop_placeholders(model: torch.nn.Module) -> None:
    """Forget the placeholders that an earlier optimized form of ``model`` left on shared parameters."""
    for param in model.parameters():
        if isinstance(param.grad, UpdatedInBackward):
            param.grad = None
