"""The one ``torch.library`` namespace that every Tablewright op lives in."""
from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

LIBRARY = torch.library.Library("tablewright", "FRAGMENT")
# op -> a Python function that does the same without the trip through torch's dispatcher: what eager mode calls
DIRECT: dict[Any, Callable] = {}

_aten = torch.ops.aten


def _batch_norm(input, weight, bias, mean, variance, training, momentum, eps, _) -> Tensor:
    """As a model calls it: with the check that one value a channel is refused in training, where the op makes the running variance NaN for good."""
    return torch.nn.functional.batch_norm(input, mean, variance, weight, bias, training, momentum, eps)


DIRECT[_aten.batch_norm.default] = _batch_norm
DIRECT.update({  # torch's own functions parse the same arguments in half the time
    _aten.abs.default: torch.abs, _aten.add.Tensor: torch.add, _aten.add_.Tensor: Tensor.add_, _aten.addmm.default: torch.addmm,
    _aten.baddbmm.default: torch.baddbmm, _aten.bmm.default: torch.bmm, _aten.cat.default: torch.cat, _aten.clamp_min.default: torch.clamp_min,
    _aten.clone.default: torch.clone, _aten.contiguous.default: Tensor.contiguous, _aten.cumsum.default: torch.cumsum,
    _aten.div.Tensor: torch.div, _aten.eq.Scalar: torch.eq, _aten.exp.default: torch.exp, _aten.expand_as.default: Tensor.expand_as,
    _aten.flatten.using_ints: torch.flatten, _aten.gather.default: torch.gather, _aten.gt.Scalar: torch.gt,
    _aten.index_select.default: torch.index_select, _aten.layer_norm.default: torch.layer_norm, _aten.linear.default: torch.nn.functional.linear,
    _aten.log.default: torch.log, _aten.lt.Tensor: torch.lt, _aten.masked_fill.Scalar: torch.masked_fill, _aten.matmul.default: torch.matmul,
    _aten.mean.default: torch.mean, _aten.mean.dim: torch.mean, _aten.mm.default: torch.mm, _aten.mul.Tensor: torch.mul, _aten.ne.Scalar: torch.ne,
    _aten.neg.default: torch.neg, _aten.permute.default: torch.permute, _aten.relu.default: torch.relu, _aten.reshape.default: torch.reshape,
    _aten.rsub.Scalar: torch.rsub, _aten.select.int: torch.select, _aten.sigmoid.default: torch.sigmoid, _aten.softmax.int: torch.softmax,
    _aten.sqrt.default: torch.sqrt, _aten.squeeze.default: torch.squeeze, _aten.squeeze.dim: torch.squeeze, _aten.stack.default: torch.stack,
    _aten.sub.Tensor: torch.sub, _aten.sum.default: torch.sum, _aten.sum.dim_IntList: torch.sum, _aten.sym_size.int: Tensor.size,
    _aten.t.default: torch.t, _aten.tanh.default: torch.tanh, _aten.to.dtype: Tensor.to, _aten.transpose.int: torch.transpose,
    _aten.unflatten.int: torch.unflatten, _aten.unsqueeze.default: torch.unsqueeze, _aten.view.default: Tensor.view, _aten.where.self: torch.where,
})  # fmt: skip


def tracing() -> bool:
    """True while torch traces or fakes (AOT autograd, export, fake tensors): an op must then go through the dispatcher so
    that the trace sees it. Otherwise a call may go straight to its implementation, which saves 25 us for 26 tables."""
    return torch._C._len_torch_dispatch_stack() > 0 or torch._C._functorch.peek_interpreter_stack() is not None


def backward_of(function: Callable, op: Callable) -> Callable:
    """What computes the gradients in a backward: ``function(..., again=True)``, in ops that autograd can differentiate, where the
    backward itself is recorded (``create_graph=True``); ``op`` where a trace must see it; else ``function`` itself."""
    if torch.is_grad_enabled():
        return functools.partial(function, again=True)
    return op if tracing() else function


def recorded_gradients(function: Callable[..., Tensor], given: Sequence[Tensor | None], needs: Sequence[bool], grad: Tensor) -> list[Tensor | None]:
    """The gradients of ``function(*given)`` where the backward is recorded (``create_graph=True``), ``None`` where not of ``needs``. Views are asked for:
    one of ``given`` may be made of another, or be it, and the gradient that comes that way is not the function's own."""
    views = [None if t is None else t.view_as(t) for t in given]
    asked = [v for v, need in zip(views, needs) if need and v is not None]
    made = iter(torch.autograd.grad(function(*views), asked, grad, create_graph=True))
    return [next(made) if need else None for need in needs]


def size_from_data() -> Any:
    """In a fake implementation: a size that only the data decides. 0 where the trace knows no symbols."""
    try:
        return torch.library.get_ctx().new_dynamic_size()
    except torch._subclasses.fake_tensor.DynamicOutputShapeException:
        return 0


def traced(op: Callable, trains: bool, *args: Any) -> Any:
    """``op`` below autograd, for a trace. Raises ``RuntimeError`` where gradients are recorded: a trace cannot wait for other ranks."""
    if trains and torch.is_grad_enabled():
        raise RuntimeError("lookups of sharded tables cannot be compiled or exported with gradients: leave torch.compile out over several ranks")
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)
