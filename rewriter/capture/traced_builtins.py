"""``len(x)`` and ``int(x)`` of a traced tensor: Python wants a real number of them, so it would be the sample's and stay it.

In the modules whose code calls them on a tensor the names mean, for the time of a trace, functions that give a number which the
graph knows. Which modules those are is seen when they do: then the trace starts again.
"""
from __future__ import annotations

import builtins
import sys
import types
from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode

from ..errors import CaptureError

_DATA = torch.Tensor.data.__get__
_SET = {torch.Tensor.data.__set__: "data", torch.Tensor.grad.__set__: "grad"}


class Again(BaseException):
    """The trace must start again. No Exception, so that the model's own ``except`` cannot hide it."""


class DataIsDetached(TorchFunctionMode):
    """``x.data`` of a tensor that is being traced would be a tensor nobody traces: it is ``x.detach()`` instead, which differs
    only where forward() writes to it, and then torch says so."""

    def __torch_function__(self, func, _, args=(), kwargs=None):
        return args[0].detach() if func == _DATA else func(*args, **(kwargs or {}))


class TracedCalls(DataIsDetached):
    """``spaces``: the names of builtins that were called on tensors, with the namespace of the module that called."""

    def __init__(self) -> None:
        super().__init__()
        self.spaces: dict[tuple[int, str], dict] = {}

    def __torch_function__(self, func, _, args=(), kwargs=None):
        if func in _SET:  # Python changes the tensor itself, of which a graph has no form: it would be done once, by the capture
            raise CaptureError(f"forward() assigns to the .{_SET[func]} of a tensor")
        if func is torch.Tensor.__len__ and args[0].dim() and isinstance(args[0].shape[0], torch.SymInt):
            self._note("len", sys._getframe(1))
        elif func is torch.Tensor.__int__:
            self._note("int", sys._getframe(1))
        return self.called(func, args, kwargs or {})

    def _note(self, name: str, frame: types.FrameType) -> None:
        while frame.f_globals["__name__"] in ("torch._tensor", "torch.overrides") and frame.f_back is not None:
            frame = frame.f_back
        if (id(frame.f_globals), name) not in self.spaces:
            self.spaces[id(frame.f_globals), name] = frame.f_globals
            raise Again

    def called(self, func, args: tuple, kwargs: dict):
        """What a call of a torch function gives."""
        if func is torch.Tensor.fill_diagonal_ and args[0].dim() == 2 and len(args) == 2 and not kwargs:
            args[0].diagonal().fill_(args[1])  # the same; the fake form of the other takes the sample's sizes for constants
            return args[0]
        return super().__torch_function__(func, (), args, kwargs)


def _len(value):
    return value.shape[0] if isinstance(value, torch.Tensor) and value.dim() else len(value)


class _IntOfTensors(type):
    def __instancecheck__(cls, value) -> bool:
        return isinstance(value, int)

    def __subclasscheck__(cls, other) -> bool:
        return issubclass(other, int)

    def __call__(cls, *args, **kwargs):
        if len(args) == 1 and isinstance(args[0], torch.Tensor) and not args[0].dtype.is_floating_point:
            return args[0].item()
        return args[0] if len(args) == 1 and isinstance(args[0], torch.SymInt) else int(*args, **kwargs)


class _Int(int, metaclass=_IntOfTensors):
    """``int`` for code under trace."""


_FORMS = {"len": _len, "int": _Int}


@contextmanager
def symbolic(spaces: dict[tuple[int, str], dict]):
    """For its body, the builtins named in ``spaces`` (see :class:`TracedCalls`) take traced tensors."""
    own = [(space, name) for (_, name), space in spaces.items() if space.get(name, getattr(builtins, name)) is getattr(builtins, name)]
    had = [name in space for space, name in own]
    for space, name in own:
        space[name] = _FORMS[name]
    try:
        yield
    finally:
        for (space, name), before in zip(own, had):
            space[name] = getattr(builtins, name)
            if not before:
                del space[name]
