"""The stand-ins that flow through ``forward`` while the FX door traces it.

A ``TensorValue`` is a torch.Tensor to everyone who asks (``isinstance`` included), but every operation on it comes to the
tracer. A ``NumberValue`` stands for a size, a flag, a dtype or a device; a ``SequenceValue`` for a list of tensors whose
length is not known. What would need their actual content raises ``GiveUp``: the tracer never guesses.
"""
from __future__ import annotations

import operator

import torch
from torch import fx


class GiveUp(BaseException):
    """This door cannot capture the model. A BaseException, so that the model's own ``except Exception`` cannot hide it."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


class TensorValue(torch.Tensor):
    """Stands for the result of ``node``. It has no storage; its own shape is meaningless and never read."""

    node: fx.Node

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        # reached only outside the tracer's mode: the value escaped from its trace
        raise GiveUp(f"{getattr(func, '__name__', func)} was called on a traced value outside of the trace")


def _method(function):
    """Around torch's C argument parser, which would reject a traced number before anybody could see the call."""
    def method(self, *args, **kwargs):
        return torch.overrides.handle_torch_function(function, (self,), self, *args, **kwargs)

    return method


for _name in ("view reshape expand permute repeat tile flip new_zeros new_ones new_full new_empty narrow chunk split unbind "
              "unflatten select transpose repeat_interleave masked_fill clamp clamp_min clamp_max roll topk").split():
    setattr(TensorValue, _name, _method(getattr(torch.Tensor, _name)))


_EMPTY = torch.empty(0, device="meta")


def tensor_value(node: fx.Node) -> TensorValue:
    with torch._C.DisableTorchFunction():
        value = torch.Tensor._make_subclass(TensorValue, _EMPTY)
    value.__dict__["node"] = node
    return value


class NumberValue:
    """A Python number (or dtype, device) that is known only when the graph runs. ``kind``: int, float, bool, dtype, device.

    Arithmetic becomes nodes; a branch, a loop bound or a text made of it gives up.
    """

    def __init__(self, node: fx.Node, kind: str, tracer):
        self.node, self.kind, self.tracer = node, kind, tracer

    @property
    def __class__(self):
        return {"int": int, "float": float, "bool": bool, "dtype": torch.dtype, "device": torch.device}[self.kind]

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        raise GiveUp(f"{getattr(func, '__name__', func)} was called on a traced number outside of the trace")

    def _refuse(self, what, final: bool = True):
        stop = GiveUp(f"{what} depends on {self.tracer.describe(self.node)}, which is known only when the graph runs")
        if final:
            self.tracer.give_up(stop)  # so that the model's own ``except`` cannot hide it
        raise stop

    def __bool__(self):
        return self.tracer.number_as_bool(self)

    def __int__(self):
        return self if self.kind == "int" else self._refuse("int(...)")

    def __index__(self):
        self._refuse("a loop bound or an index", final=False)  # torch's argument parser tries this, and does without

    def __float__(self):
        self._refuse("float(...)")

    def __hash__(self):
        return id(self)

    def __str__(self):
        self._refuse("a text")

    def __format__(self, spec):
        self._refuse("a text")

    def __reduce_ex__(self, protocol):
        self._refuse("a copy")

    @property
    def type(self):
        if type(self) is NumberValue and self.kind != "device":
            raise AttributeError("type")
        self._refuse("device.type")


def _arithmetic(name: str, reverse: bool = False):
    function = getattr(operator, name)

    def method(self, other):
        if self.kind not in ("int", "float", "bool"):
            self._refuse(f"{name} of a {self.kind}")
        if isinstance(other, torch.Tensor) or not isinstance(other, (int, float)):
            return NotImplemented
        return self.tracer.number(function, (other, self) if reverse else (self, other))

    return method


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"):
    setattr(NumberValue, f"__{_name}__", _arithmetic(_name))
    setattr(NumberValue, f"__r{_name}__", _arithmetic(_name, reverse=True))
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    setattr(NumberValue, f"__{_name}__", _arithmetic(_name))
NumberValue.__neg__ = lambda self: self.tracer.number(operator.neg, (self,))


class SequenceValue:
    """A list of tensors made by one op (split, unbind). Indexable by a number; iterable only where it is unpacked by count."""

    def __init__(self, node: fx.Node, tracer):
        self.node, self.tracer = node, tracer
        self._items: dict[int, TensorValue] = {}

    def __getitem__(self, index):
        if type(index) is not int:
            raise GiveUp(f"the list made by {self.tracer.describe(self.node)} is indexed by {type(index).__name__}")
        if index not in self._items:
            self._items[index] = self.tracer.wrap_tensor(self.tracer.node(operator.getitem, (self.node, index)))
        return self._items[index]

    def __len__(self):
        if self.node.target is torch.ops.aten.split_with_sizes.default:
            return len(self.node.args[1])
        # not GiveUp: list() asks for a length, and does without
        raise TypeError(f"the number of tensors made by {self.tracer.describe(self.node)} is known only when the graph runs")

    def __iter__(self):
        count = self.tracer.known_length(self.node)
        return iter([self[index] for index in range(count)])
