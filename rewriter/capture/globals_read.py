"""Python globals and closure variables that a model's methods read, found in their code without running it.

A captured graph has the value of ``TEMPERATURE`` in ``logits / TEMPERATURE`` baked in, so such names are guarded like attributes.
Found are plain values (numbers, strings, ``None``, containers of them) and tensors read by name, or as attribute of a module of the
user's or of a settings object (``config.TEMPERATURE``), in any method of the model's classes and in the user's own functions that those name. That a name is
found which ``forward`` never reaches costs at worst one more capture.
"""
from __future__ import annotations

import copy
import dis
import sys
import types
from typing import Any

import torch
from torch import nn

from .recording import is_users

_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_MOST_FUNCTIONS = 2000  # so that a model which reaches a whole library is not walked for seconds
_SKIPPED = ("__init__", "__repr__", "extra_repr", "__setstate__", "__getstate__", "__deepcopy__", "__reduce__")


class Global:
    """One name: where it lives and the value it had."""

    __slots__ = ("label", "_namespace", "_name", "_cell", "value", "_kept")

    def __init__(self, label: str, value: Any, namespace: dict | None = None, name: str = "", cell: Any = None) -> None:
        self.label, self.value = label, value
        self._namespace, self._name, self._cell = namespace, name, cell
        self._kept = self._content(value)

    def now(self) -> Any:
        """Today's value; a :class:`KeyError` or :class:`ValueError` if the name is gone."""
        return self._cell.cell_contents if self._cell is not None else self._namespace[self._name]  # type: ignore[index]

    @staticmethod
    def _content(value: Any) -> Any:
        """What of ``value`` may change although it stays the same object."""
        if isinstance(value, torch.Tensor):
            return None if value.is_inference() else value._version
        return copy.deepcopy(value) if isinstance(value, (list, dict, set)) else None

    @property
    def by_identity(self) -> bool:
        """Is it unchanged as long as it is the same object?"""
        return self._kept is None

    def place(self) -> tuple[Any, str]:
        """An object and the expression that, written after it, reads today's value."""
        return (self._cell, ".cell_contents") if self._cell is not None else (self._namespace, f"[{self._name!r}]")

    def changed(self) -> str | None:
        """A sentence if the value is another one than it was."""
        try:
            now = self.now()
        except (KeyError, ValueError):
            return f"{self.label} was {self.value!r} when captured and is gone now"
        if isinstance(self.value, torch.Tensor):
            same = now is self.value and self._content(now) == self._kept
            return None if same else f"the tensor in {self.label} was replaced or changed since the capture"
        before = self.value if self._kept is None else self._kept
        if (now is self.value and self._kept is None) or (type(now) is type(before) and now == before):
            return None
        return f"{self.label} was {before!r} when captured and is {now!r} now"


def globals_read(model: nn.Module) -> list[Global]:
    """Every plain global and closure variable that the methods of ``model``'s own classes name, each once."""
    todo: list[types.FunctionType] = []
    own = {""} | {_package(getattr(sys.modules.get(type(m).__module__), "__file__", None) or "") for m in model.modules()}
    for cls in dict.fromkeys(base for module in model.modules() for base in type(module).__mro__):
        todo += [f for name, value in vars(cls).items() if name not in _SKIPPED for f in _functions(value)]
    seen: set[types.CodeType] = set()
    found: dict[tuple, Global] = {}
    while todo and len(seen) < _MOST_FUNCTIONS:
        function = todo.pop()
        file = function.__code__.co_filename
        if function.__code__ in seen or not is_users(file) or _package(file) not in own:
            continue
        seen.add(function.__code__)
        for value in _reads(function, found):
            todo += _functions(value)
    return list(found.values())


def _package(file: str) -> str:
    """The installed package that ``file`` belongs to; "" for the user's own code. Of libraries, only the model's own is read."""
    for site in ("/site-packages/", "/dist-packages/"):
        if site in file:
            return file.partition(site)[2].partition("/")[0]
    return ""


def _functions(value: Any) -> list[types.FunctionType]:
    value = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
    value = getattr(value, "__wrapped__", value)
    return [value] if isinstance(value, types.FunctionType) else []


def _reads(function: types.FunctionType, found: dict[tuple, Global]) -> list[Any]:
    """Add the plain values that ``function`` reads to ``found``; return the other global values it names."""
    space, others = function.__globals__, []
    file = function.__code__.co_filename

    def add(namespace: dict, name: str, label: str) -> None:
        value = namespace[name]
        if _is_plain(value):
            found.setdefault((id(namespace), name), Global(label, value, namespace, name))
        else:
            others.append(value)

    for code in _codes(function.__code__):
        instructions = list(dis.get_instructions(code))
        for step, following in zip(instructions, [*instructions[1:], None]):
            if step.opname not in ("LOAD_GLOBAL", "LOAD_NAME") or step.argval not in space:
                continue
            value = space[step.argval]
            add(space, step.argval, f"global '{step.argval}' of {file}")
            if following is not None and following.opname in ("LOAD_ATTR", "LOAD_METHOD") and _has_settings(value):
                if following.argval in vars(value):
                    add(vars(value), following.argval, f"'{step.argval}.{following.argval}' of {file}")
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or ()):
        try:
            value = cell.cell_contents
        except ValueError:
            continue
        if _is_plain(value):
            found.setdefault((id(cell), name), Global(f"variable '{name}' around {function.__qualname__} of {file}", value, cell=cell))
        else:
            others.append(value)
    return others


def _codes(code: types.CodeType) -> list[types.CodeType]:
    inner = [c for c in code.co_consts if isinstance(c, types.CodeType)]
    return [code, *(found for c in inner for found in _codes(c))]


def _has_settings(value: Any) -> bool:
    """A module or class of the user's, or an object with attributes of its own."""
    if isinstance(value, types.ModuleType):
        return is_users(getattr(value, "__file__", None) or "<")
    if isinstance(value, (nn.Module, torch.Tensor, types.FunctionType)):
        return False
    return hasattr(value, "__dict__") and (not isinstance(value, type) or not value.__module__.startswith("torch"))


def _is_plain(value: Any, depth: int = 0) -> bool:
    if isinstance(value, (*_PLAIN, torch.Tensor)):
        return depth == 0 or not isinstance(value, torch.Tensor)
    kind = type(value)
    if kind not in (tuple, list, set, frozenset, dict) or depth > 3 or len(value) > 1000:
        return False
    items = [*value, *value.values()] if kind is dict else value
    return all(_is_plain(item, depth + 1) for item in items)
