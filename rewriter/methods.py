"""Methods besides ``forward``: those that ``optimize(..., methods=[...])`` names are captured and rewritten like it, each in
variants of its own over the same tables; the others run plainly on the shared weights."""
from __future__ import annotations

import inspect
import types
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .capture.check import undisturbed
from .capture.program_check import copied, kept, leaves_of
from .errors import InBackwardError, PlanError, nearest
from .samples import Samples

if TYPE_CHECKING:
    from .optimized_model import OptimizedModel

FORWARD = "forward"


def samples_of(model: nn.Module, methods: Sequence[str], sample_inputs: Any, sample_kwargs: Any) -> dict[str, Samples]:
    """The sample inputs of ``forward`` and of each method that is named, in that order.

    ``sample_inputs``: those of ``forward``, which a method gets too where it runs on them; or, where methods are named, a mapping
    of method names to the inputs of each. A method without any is captured at its first call (its :class:`Samples` are empty).
    Raises :class:`PlanError` for a name that is no method of the model.
    """
    for name in methods:
        if not callable(getattr(type(model), name, None)) or name.startswith("__") or hasattr(nn.Module, name):
            known = [n for n, value in inspect.getmembers(type(model), callable) if not hasattr(nn.Module, n)]
            raise PlanError(f"methods names '{name}', which is no method of {type(model).__name__}{nearest(name, known)}")
    names = list(dict.fromkeys([FORWARD, *methods]))
    if methods and isinstance(sample_inputs, Mapping) and sample_inputs and set(sample_inputs) <= set(names):
        kwargs = sample_kwargs if isinstance(sample_kwargs, Mapping) and set(sample_kwargs) <= set(names) else {FORWARD: sample_kwargs}
        return {name: Samples.read(sample_inputs.get(name), kwargs.get(name)) for name in names}
    given = Samples.read(sample_inputs, sample_kwargs)
    return {name: given if name == FORWARD or _runs(model, name, given) else Samples() for name in names}


def _runs(model: nn.Module, name: str, samples: Samples) -> bool:
    """Whether a method takes the inputs of ``forward``. Nothing of the model changes."""
    if samples.args is None:
        return False
    with undisturbed(), kept(model), torch.no_grad():
        try:
            args, kwargs = copied((samples.args, samples.kwargs))
            getattr(model, name)(*args, **kwargs)
            return True
        except Exception:  # whatever it says of inputs that were never meant for it
            return False


def bound(cls: type, model: nn.Module, name: str) -> types.FunctionType:
    """A method of the optimized class that runs what was captured of ``model``'s own method ``name``."""
    plain = getattr(type(model), name)

    def method(self: OptimizedModel, *args: Any, **kwargs: Any) -> Any:
        from .data_ways import call  # which needs this module

        return call(self, name, args, kwargs)

    method.__name__, method.__doc__, method.__qualname__ = name, plain.__doc__, f"{cls.__name__}.{name}"
    try:
        method.__signature__ = inspect.signature(plain)  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        pass
    return method


def plainly(method: types.MethodType, tables: set[int]) -> Any:
    """An unnamed method of a model whose ``tables`` (ids of parameters) are updated inside the backward: a gradient that it
    sends to one of them would be lost, so a result through which one would flow is refused."""

    def call(*args: Any, **kwargs: Any) -> Any:
        result = method(*args, **kwargs)
        if any(_reaches(leaf, tables) for _, leaf in leaves_of(result)):
            raise InBackwardError(
                f"{method.__name__}() runs plainly, and its result would send a gradient to a table that is updated inside the "
                f"backward of captured graphs only: name it in optimize(..., methods=['{method.__name__}']), or call it under no_grad"
            )
        return result

    return call


def _reaches(leaf: Any, tables: set[int]) -> bool:
    if not isinstance(leaf, Tensor) or leaf.grad_fn is None:
        return False
    left, seen = [leaf.grad_fn], set()
    while left:
        node = left.pop()
        if node in seen:
            continue
        seen.add(node)
        if id(getattr(node, "variable", None)) in tables:
            return True
        left += [each for each, _ in node.next_functions if each is not None]
    return False
