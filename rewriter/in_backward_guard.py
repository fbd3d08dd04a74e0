"""Refuse loops that an update inside the backward cannot follow: accumulated, clipped or scaled gradients.

Such a loop would go on with wrong numbers, since the tables have moved before it looks at their gradients. What can be seen
is refused with :class:`InBackwardError`; the first two before any table of that backward moves, the third when it is tried:

* *accumulation*: when a backward starts, a dense parameter still holds the gradient of an earlier one; under torch.compile,
  where the start is not seen, a dense gradient was added to since the last update and written by nothing else;
* *loss scaling*: a forward under fp16 autocast, or an enabled ``torch.amp.GradScaler`` in the process;
* *clipping*, and optimizers that hold the tables too: after the backward the tables' ``.grad`` is a placeholder that takes no
  memory and raises as soon as anything computes with it.

Not seen: accumulation where no dense parameter has a gradient; a reentrant checkpoint, which runs backwards of its own; and
``backward(inputs=...)`` of some tables where all of a launch are updated: one stands for them in autograd's graph, so all move, or none (each
in the graph would cost 2 to 5 us a table, a tenth of a small step of 26). Launches with other leaves, and tables over ranks, refuse it.
"""
from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from .errors import InBackwardError

_WAY_OUT = "set in_backward: false in the plan's embedding_optimizer and call opt.embedding_optimizer.step()"
_HARMLESS = {"__get__", "__repr__", "size", "stride", "dim", "storage_offset", "untyped_storage", "data_ptr", "numel", "detach"}
_CLEARING = {"detach_", "zero_", "requires_grad_"}  # what zero_grad(set_to_none=False) calls: there is nothing to clear


class UpdatedInBackward(Tensor):
    """The ``.grad`` of a table whose update has already happened: shape, dtype and device can be read, values cannot.
    ``cleared``: a ``zero_grad`` that keeps gradients has set it to zero."""

    cleared = False

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", str(func))
        if name in _CLEARING:
            args[0].cleared = args[0].cleared or name == "zero_"
            return args[0]
        if name in _HARMLESS or name.startswith(("is_", "_is_")):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        raise InBackwardError(cls.refusal(name))

    @classmethod
    def refusal(cls, name: str) -> str:
        """Why ``name`` cannot be called on it."""
        return (
            f"{name} was called on the gradient of a table that is updated inside the backward "
            "(gradient clipping, a gradient scaler, or an optimizer that holds the tables): that gradient is already used up. "
            f"Clip, scale and step opt.dense_parameters() only, or {_WAY_OUT}"
        )

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{type(self).__name__}(shape={tuple(self.shape)})"


class InBackwardGuard:
    """Watches the forwards and backwards of one optimized model, and each update of its tables."""

    def __init__(self, model) -> None:
        self._model = weakref.ref(model)
        self._scalers = Scalers()
        self.waits: list[Callable[[], None]] = []  # until nothing reads tables ahead (staleness.py)
        self._homes: list[tuple[str, dict, str]] | None = None  # where parameters stand: found once, read at every backward
        self._seen: list[tuple[weakref.ref, int]] = []  # dense gradients after the last update, with their version

    @staticmethod
    def of(model) -> InBackwardGuard | None:
        """A guard for ``model`` if any of its tables is updated inside the backward."""
        optimizer = model.embedding_optimizer
        if optimizer is None or not any(g["in_backward"] for g in optimizer.param_groups):
            return None
        optimizer.guard = InBackwardGuard(model)
        return optimizer.guard

    def before_forward(self) -> None:
        """Raises :class:`InBackwardError` under fp16 autocast, which needs loss scaling."""
        refuse_fp16_autocast("tables updated inside the backward", _WAY_OUT)

    def watch(self, outputs) -> None:
        """Check the loop when the backward of these outputs starts."""
        if not self._dense_homes():
            return
        for output in outputs:
            if isinstance(output, Tensor) and output.requires_grad:
                if output.grad_fn is None:
                    output.register_hook(self._at_start)
                else:
                    output.grad_fn.register_prehook(self._at_start)  # in a third of the time

    def _at_start(self, _) -> None:
        task = torch._C._current_graph_task_id()
        if task == getattr(self, "_task", None):
            return
        self._task = task
        for name, held in self._dense_gradients():
            if bool(held.ne(0).any()):
                raise InBackwardError(_accumulated(f"a backward starts while '{name}' still holds the gradient of an earlier one"))

    def before_update(self) -> None:
        """Raises :class:`InBackwardError` where gradients are scaled, or were accumulated unseen in compiled code."""
        for wait in self.waits:
            wait()
        self._scalers.refuse(
            "tables updated inside the backward would take its scaled gradients. "
            f"Drop it (bf16 and fp32 need none), or {_WAY_OUT}. No table was changed by this backward"
        )
        writes = [grad._version - version for ref, version in self._seen if (grad := ref()) is not None]
        held = list(self._dense_gradients())
        self._seen = [(weakref.ref(grad), grad._version) for _, grad in held]
        if writes and max(writes) == 1:  # zeroing them first would be a second write
            raise InBackwardError(_accumulated("the gradients of an earlier backward were added to"))

    def after_update(self) -> None:
        """Leave placeholders where other code may look for the tables' gradients."""
        model = self._model()
        groups = [] if model is None else model.embedding_optimizer.param_groups
        for param in [p for group in groups if group["in_backward"] for p in group["params"]]:
            if param.grad is None:
                param.grad = placeholder(param)

    def _dense_gradients(self):
        """(name, gradient) of each parameter that is not updated in the backward and has one."""
        for name, parameters, key in self._dense_homes():
            held = None if parameters[key] is None else parameters[key].grad
            if held is not None and not isinstance(held, UpdatedInBackward) and not held.is_sparse:
                yield name, held

    def _dense_homes(self) -> list[tuple[str, dict, str]]:
        model = self._model()
        if self._homes is None and model is not None:
            groups = model.embedding_optimizer.param_groups
            ours = {name for group in groups if group["in_backward"] for name in group["param_names"]}
            named = [(f"{path}.{key}".lstrip("."), m._parameters, key) for path, m in model.named_modules() for key in m._parameters]
            self._homes = [home for home in named if home[0] not in ours]
        return self._homes or []


class Scalers:
    """Looks for enabled ``GradScaler`` objects in the process."""

    def __init__(self) -> None:
        self._seen = -1

    def refuse(self, why: str) -> None:
        """Raises :class:`InBackwardError` where there is one, saying ``why`` that is wrong."""
        scaler_types = (torch.amp.GradScaler, torch.cuda.amp.GradScaler)
        # each instance and subclass holds its class: look when one may have come
        count = sum(sys.getrefcount(t) + sum(map(sys.getrefcount, t.__subclasses__())) for t in scaler_types)
        if count == self._seen:
            return
        if any(issubclass(type(o), scaler_types) and o.is_enabled() for o in gc.get_objects()):
            raise InBackwardError(f"an enabled GradScaler exists, and {why}")
        self._seen = count  # walking all objects takes tens of milliseconds: not at every backward


def _accumulated(what: str) -> str:
    return (
        f"{what}: gradients are being accumulated, and the tables, which are updated inside each backward, cannot wait. "
        f"Call zero_grad() between backwards, or {_WAY_OUT}. No table was changed by this backward"
    )


def refuse_fp16_autocast(what: str, way_out: str) -> None:
    """Raises :class:`InBackwardError` under fp16 autocast, which needs loss scaling: ``what`` would take scaled gradients."""
    for device in ("cpu", "cuda"):
        if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16:
            raise InBackwardError(f"fp16 autocast needs loss scaling, and {what} would take scaled gradients. Use bf16 autocast, or {way_out}")


def placeholder(param: Tensor, kind: type[UpdatedInBackward] = UpdatedInBackward) -> Tensor:
    """Stands in ``param.grad`` for a gradient that is used up."""
    return torch.zeros(1, dtype=param.dtype, device=param.device).expand(param.shape).as_subclass(kind)


def drop_placeholders(model: torch.nn.Module) -> None:
    """Forget the placeholders that an earlier optimized form of ``model`` left on shared parameters."""
    for param in model.parameters():
        if isinstance(param.grad, UpdatedInBackward):
            param.grad = None
