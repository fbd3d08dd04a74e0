"""Watching what Python reads of a module tree while the tree runs once.

For the time of a capture every shell gets a subclass of its own class that reports attribute reads, writes and calls to
an observer. Nothing global is patched, and the user's own modules are never touched.
"""
from __future__ import annotations

import copy
import functools
import os
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import nn

from ..errors import CaptureError, explain

_TORCH = str(Path(torch.__file__).parent) + os.sep
_PACKAGE = Path(__file__).parents[2]
_OURS = tuple(str(_PACKAGE / floor) + os.sep for floor in ("rewriter", "passes", "kernels"))
_PYTHON = str(Path(copy.__file__).parent)  # the standard library: contextlib, functools, ...
_SITE = ("site-packages", "dist-packages")
_PRIVATE = {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "_is_full_backward_hook", "_forward_hooks",
            "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_forward_hooks_with_kwargs",
            "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs", "_state_dict_hooks", "_state_dict_pre_hooks",
            "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks", "_compiled_call_impl", "call_super_init"}
# library modules whose only use of self.training is to hand it to an op as a flag
_FLAG_READERS = ("modules/dropout.py", "modules/batchnorm.py")


def user_location(depth: int = 1) -> tuple[str, int, str]:
    """(file, line, function) of the innermost frame that is neither torch's, ours nor the standard library's; or ("", 0, "")."""
    frame = sys._getframe(depth)
    while frame is not None:
        if is_users(frame.f_code.co_filename):
            return frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name
        frame = frame.f_back
    return "", 0, ""


@functools.cache
def is_users(file: str) -> bool:
    """Whether a source file is neither torch's, ours nor the standard library's."""
    if file.startswith((_TORCH, *_OURS, "<")):
        return False
    return not file.startswith(_PYTHON) or any(part in file for part in _SITE)


def raised_at(error: BaseException) -> str:
    """file:line of the innermost frame of the traceback that is the user's."""
    where, step = "", error.__traceback__
    while step is not None:
        name = step.tb_frame.f_code.co_filename
        if is_users(name):
            where = f"{name}:{step.tb_lineno}"
        step = step.tb_next
    return where


def _place(module: nn.Module) -> int:
    """What tells modules apart while they are traced: export shows a module that has two names through a proxy, which is another
    object with the module's namespace."""
    return id(object.__getattribute__(module, "__dict__"))


class Effect(NamedTuple):
    """A plain attribute that forward() sets: of the module at ``path``, to a value of structure ``spec``."""

    path: str
    name: str
    spec: pytree.TreeSpec


class ReadLog:
    """What Python read: plain attributes by module path, and which modules' ``training`` was branched on.

    ``attributes[path][name]`` is the value read; ``class_attributes`` likewise for values found on the class;
    ``absent_attributes[path]``: names that were asked for and not there.
    ``flags`` are the paths whose training flag only went to dropout or batch norm; ``modes`` those read by other code.
    """

    def __init__(self, shell: nn.Module):
        self.shell = shell
        self.paths = {_place(module): path for path, module in shell.named_modules()}
        self.attributes: dict[str, dict[str, object]] = {}
        self.class_attributes: dict[str, dict[str, object]] = {}
        self.absent_attributes: dict[str, set[str]] = {}
        self.flags: set[str] = set()
        self.modes: set[str] = set()
        self.written: dict[tuple[int, str], object] = {}  # what forward() has set: (id of the module's namespace, name) -> value
        self._seen: set[tuple[int, str]] = set()  # tensors and missing attributes that were looked at before that
        self._before: list[tuple[str, str, object, object]] = []  # containers as they were at the first read

    def path_of(self, module) -> str | None:
        """The path of a module of the shell."""
        return self.paths.get(_place(module))

    # What the recording classes call. A subclass may replace values (the FX door gives proxies).
    def read(self, module, name, value):
        if name == "training":
            return self.read_training(module, value)
        path = self.path_of(module)
        if path is not None:
            seen = self.attributes.setdefault(path, {})
            if name not in seen:
                seen[name] = value
                if isinstance(value, (list, dict, set)) and name != "_flat_weights":
                    self._before.append((path, name, value, copy.copy(value)))
        return value

    def read_training(self, module, value):
        path = self.path_of(module)
        if path is not None:
            caller = sys._getframe(3).f_code.co_filename
            harmless = caller.startswith(_TORCH) and (caller.endswith(_FLAG_READERS) or "/nn/" not in caller)
            (self.flags if harmless else self.modes).add(path)
        return value

    def read_class(self, module, name, value):
        path = self.path_of(module)
        if path is not None:
            self.class_attributes.setdefault(path, {})[name] = value
        return value

    def tensor(self, module, name, value):
        self._seen.add((_place(module), name))
        return value

    def absent(self, module, name) -> None:
        """Python asked for an attribute that is not there (hasattr, getattr with a default)."""
        self._seen.add((_place(module), name))
        path = self.path_of(module)
        if path is not None and not type(module).__module__.startswith("torch."):
            self.absent_attributes.setdefault(path, set()).add(name)

    def call(self, module, forward, args, kwargs):
        return forward(*args, **kwargs)

    def write(self, module, name, value) -> bool:
        """True where the write may happen. One to a plain attribute is kept in ``written`` instead, and becomes a result of the
        graph that is put back at each call. Raises where the graph would lose it: where forward() also reads what an earlier
        call has left there, or registers a parameter or a module."""
        if name in module.__dict__.get("_buffers", ()):
            return True
        path = self.path_of(module)
        if path is None or name[:2] == "__":
            return True  # a module made on the way, or a copy
        key = (_place(module), name)
        if key not in self.written:
            old = module.__dict__.get(name, _MISSING)
            if old is value or (type(old) is type(value) and isinstance(value, (int, float, str, bool)) and old == value):
                return False
            # None that was read is the form of a cache that is filled once: the guard on it holds until then
            read = key in self._seen or self.attributes.get(path, {}).get(name) is not None
            if read or isinstance(value, (nn.Parameter, nn.Module)) or name in module._parameters or name in module._modules:
                raise self.lost_write(path, name)
        self.written[key] = value
        return False

    def effects(self) -> tuple[list[Effect], list]:
        """What forward() set, and the leaves of all these values, in one list. Raises CaptureError for a value that is no tensor,
        number, text or plain container of them."""
        found, leaves = [], []
        for (number, name), value in self.written.items():
            mine, spec = pytree.tree_flatten(value)
            if not all(isinstance(leaf, (torch.Tensor, bool, int, float, str, type(None))) for leaf in mine):
                raise self.lost_write(self.paths[number], name)
            found.append(Effect(self.paths[number], name, spec))
            leaves += mine
        return found, leaves

    def lost_write(self, path: str, name: str) -> CaptureError:
        file, line, _ = user_location(3)
        return CaptureError(explain(
            f"forward() sets attribute '{name}' of '{path or 'the model'}'", where=f"{file}:{line}" if file else "",
            why="it also reads what an earlier call left there, or the value is more than tensors and numbers; a graph has no "
            "Python state", fix="return the value, or keep it in a buffer that forward() changes in place"))

    def check_containers(self) -> None:
        """Raises CaptureError where forward() changed a list, dict or set that belongs to a module."""
        for path, name, value, before in self._before:
            now, then = list(value), list(before)
            if isinstance(value, dict):
                now, then = now + list(value.values()), then + list(before.values())
            if len(now) != len(then) or any(a is not b for a, b in zip(now, then)):
                raise CaptureError(explain(
                    f"forward() changes attribute '{name}' of '{path or 'the model'}' in place",
                    why="a graph has no Python state, so the change would happen at capture only", fix="return the value instead"))


    def restore_containers(self) -> None:
        """After a capture that was abandoned: lists, dicts and sets of modules hold again what they held before."""
        for _, _, value, before in self._before:
            value.clear()
            (value.extend if isinstance(value, list) else value.update)(before)


_MISSING = object()


def _recording_class(cls: type, log: ReadLog) -> type:
    get, find, put = cls.__getattribute__, getattr(cls, "__getattr__", None), cls.__setattr__

    def __getattribute__(self, name):
        if log.written and (_place(self), name) in log.written:
            return log.written[_place(self), name]
        value = get(self, name)
        if name in _PRIVATE or name[:2] == "__":
            return value
        if name in get(self, "__dict__"):
            if isinstance(value, torch.Tensor):
                return log.tensor(self, name, value)
            if isinstance(value, nn.Module):
                return value
            return log.read(self, name, value)
        if isinstance(value, (int, float, str, type(None), tuple, list, dict)) and not isinstance(value, type):
            for base in cls.__mro__:
                if name in base.__dict__:
                    if not hasattr(type(base.__dict__[name]), "__get__") and not base.__module__.startswith("torch."):
                        return log.read_class(self, name, value)
                    break
        return value

    def __getattr__(self, name):
        assert find is not None
        try:
            value = find(self, name)
        except AttributeError:
            log.absent(self, name)
            raise
        return log.tensor(self, name, value) if isinstance(value, torch.Tensor) else value

    def __setattr__(self, name, value):
        if log.write(self, name, value):
            put(self, name, value)

    def __call__(self, *args, **kwargs):
        return log.call(self, self.forward, args, kwargs)

    body = {"__getattribute__": __getattribute__, "__setattr__": __setattr__, "__call__": __call__, "__module__": cls.__module__,
            "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    if find is not None:
        body["__getattr__"] = __getattr__
    return type(cls.__name__, (cls,), body)


@contextmanager
def recording(log: ReadLog, calls: bool = True):
    """For its body, every module of ``log.shell`` reports to ``log``. ``calls=False`` leaves ``__call__`` as it is."""
    classes: dict[type, type] = {}
    swapped = []
    hooks = {}
    try:
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            hooks[name] = log.shell.__dict__[name]
            log.shell.__dict__[name] = type(hooks[name])()  # the root's hooks run around the graph, not inside it
        for module in log.shell.modules():
            cls = type(module)
            if cls not in classes:
                classes[cls] = _recording_class(cls, log)
                if not calls:
                    del classes[cls].__call__
            try:
                module.__class__ = classes[cls]
            except TypeError as error:
                raise CaptureError(explain(f"the class {cls.__name__} of '{log.path_of(module)}' cannot be watched",
                                           why=str(error), fix="remove __slots__ from the class")) from error
            swapped.append((module, cls))
        yield log
    finally:
        for module, cls in swapped:
            object.__setattr__(module, "__class__", cls)
        log.shell.__dict__.update(hooks)
