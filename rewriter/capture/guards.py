"""What a captured graph takes for granted, because Python read it while the graph was made, and whether it still holds."""
from __future__ import annotations

import copy
import math
import re
import weakref
from collections import OrderedDict
from collections.abc import Callable
from operator import attrgetter, itemgetter

import numpy
import torch
from torch import nn

from .globals_read import globals_read
from .inputs import Inputs
from .recording import ReadLog

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_GONE = object()
_SHAPE = attrgetter("shape")


class Guards:
    """The conditions under which a captured graph is the model.

    Inputs: structure, None-ness, kinds, dtypes, ranks, device, baked numbers, and dimensions that export fixed. Modules:
    plain attributes that Python read, on the shell and on the user's own module; training flags that Python branched on;
    plain globals and closure variables that its methods name; dtypes of parameters where the graph has them baked in.

    >>> reason = guards.failure(args, kwargs)   # None, or a sentence: recapture (after guards.sync()) or raise
    >>> graph_module(*guards.flatten(args, kwargs))
    """

    def __init__(self, shell: nn.Module, originals: dict[str, nn.Module] | None, inputs: Inputs, log: ReadLog, *,
                 conditions: list[str] = (), baked_dtypes: bool = False):
        """``conditions``: Python expressions over ``S[i][d]``, the size of dimension d of the i-th tensor leaf."""
        self.inputs = inputs
        self.conditions: list[str] = []
        self.holds: Callable | None = None  # all conditions, over a sequence of shapes
        self.require(conditions)
        self.modes = {path: _module(shell, path).__dict__["training"] for path in sorted(log.modes)}
        self.reads_training = bool(log.modes or log.flags)  # else the mode cannot matter
        self._names = {path: tuple(seen) for path, seen in log.attributes.items() if seen}
        self._class_names = {path: dict(seen) for path, seen in log.class_attributes.items() if seen}
        self._absent = {path: sorted(names) for path, names in log.absent_attributes.items()}
        self._shell = shell
        self._originals = {path: weakref.ref(module) for path, module in (originals or {}).items()}
        self._baked_dtypes = baked_dtypes
        self.globals = globals_read(shell)
        self._snapshot()

    def _snapshot(self) -> None:
        shell = self._shell
        self._modes = [(path, _module(shell, path).__dict__, value) for path, value in self.modes.items()]
        self._groups = [_Group(path, names, _module(shell, path)) for path, names in self._names.items()]
        self._original_groups = []
        for path, names in self._names.items():
            module = self._originals.get(path, lambda: None)()
            if module is not None:
                mine = tuple(name for name in names if name in module.__dict__)
                if mine:
                    self._original_groups.append((self._originals[path], _Group(path, mine, module)))
        self._class_reads = [(path, name, value, attrgetter(name)) for path, seen in self._class_names.items()
                             for name, value in seen.items()]
        self._dtypes = [(module._parameters, tuple(each.dtype for each in module._parameters.values() if each is not None))
                        for module in shell.modules() if module._parameters] if self._baked_dtypes else []
        self._fast = [(group.values_of, _module(shell, group.path).__dict__, group.values) for group in self._groups]
        self._fast_originals = [(ref, group.values_of, group.values) for ref, group in self._original_groups]
        self._careful = [(weakref.ref(_module(shell, group.path)), group) for group in self._groups if group.careful] + [
            (ref, group) for ref, group in self._original_groups if group.careful]

    def require(self, conditions) -> None:
        """Adds conditions on sizes."""
        self.conditions = list(dict.fromkeys([*self.conditions, *conditions]))
        self.holds = _compiled(" and ".join(f"({each})" for each in self.conditions)) if self.conditions else None

    # the inputs -----------------------------------------------------------------------------------------------------------
    def flatten(self, args: tuple, kwargs: dict) -> list:
        """The graph's inputs, in placeholder order. Raises ValueError where the structure is not the captured one."""
        leaves = self.inputs.flatten(args, kwargs)
        if leaves is None:
            raise ValueError(self.inputs.failure(None, args, kwargs))
        return list(self.inputs.pick(leaves))

    def failure(self, args: tuple, kwargs: dict) -> str | None:
        """None where the graph serves this call, else a sentence that says what changed since the capture."""
        leaves = self.inputs.flatten(args, kwargs)
        reason = self.inputs.failure(leaves, args, kwargs)
        if reason is not None:
            return reason
        if self.holds is not None:
            shapes = list(map(_SHAPE, self.inputs.tensors_of(leaves)))
            if not _true(self.holds, shapes):
                return self._explain_sizes(shapes)
        return self.module_failure()

    def _explain_sizes(self, shapes: list) -> str:
        code = next(each for each in self.conditions if not _true(_compiled(each), shapes))
        names = [self.inputs.names[i] for i in self.inputs.tensors]
        if fixed := re.fullmatch(r"S\[(\d+)\]\[(\d+)\] == (\d+)", code):
            leaf, dim, size = map(int, fixed.groups())
            return (f"dimension {dim} of input '{names[leaf]}' was {size} when captured and is {shapes[leaf][dim]} now, and "
                    f"the captured graph holds for {size} only")
        readable = re.sub(r"S\[(\d+)\]\[(\d+)\]", lambda m: f"{names[int(m[1])]}.shape[{m[2]}]", code)
        return f"the captured graph holds only where {readable}, which is not so for these inputs"

    # the modules ------------------------------------------------------------------------------------------------------------
    def module_failure(self) -> str | None:
        """``failure`` without the inputs."""
        for path, namespace, value in self._modes:
            if namespace["training"] != value:
                return (f"'{path or 'the model'}' was in {_mode(value)} mode when captured and is in "
                        f"{_mode(not value)} mode now, and its forward() branches on self.training")
        try:
            for values_of, namespace, values in self._fast:
                if values_of(namespace) != values:
                    return self._explain()
            for ref, values_of, values in self._fast_originals:
                module = ref()
                if module is not None and values_of(module.__dict__) != values:
                    return self._explain()
            for ref, group in self._careful:
                if (module := ref()) is not None and group.changed_within(module.__dict__):
                    return self._explain()
        except (KeyError, ValueError, RuntimeError, TypeError):
            return self._explain()
        return self._other_failure()

    def _other_failure(self) -> str | None:
        for path, name, value, read in self._class_reads:
            for module in (_module(self._shell, path), self._originals.get(path, lambda: None)()):
                if module is not None and _differs(now := read(module), value):
                    return _changed(name, path, value, now)
        for path, names in self._absent.items():
            for module in (_module(self._shell, path), self._originals.get(path, lambda: None)()):
                if module is not None and (new := next((name for name in names if hasattr(module, name)), None)) is not None:
                    return f"attribute '{new}' of '{path or 'the model'}', which was looked for and missing when captured, is there now"
        for each in self.globals:
            if (reason := each.changed()) is not None:
                return reason
        for parameters, dtypes in self._dtypes:
            if tuple([each.dtype for each in parameters.values() if each is not None]) != dtypes:
                return "the dtype of parameters changed since the capture, and the captured graph has it baked in"
        return None

    # for entry.py: the same conditions, to be compiled ---------------------------------------------------------------------
    def namespaces(self):
        """(dict, [(attribute, value, compare by value?)]) of each module of the shell that was read."""
        for _, namespace, value in self._modes:
            yield namespace, [("training", value, False)]
        for group, (_, namespace, _) in zip(self._groups, self._fast):
            yield namespace, group.attributes()

    def original_namespaces(self):
        """The same for the user's own modules, as (weak reference, attributes)."""
        for ref, group in self._original_groups:
            yield ref, group.attributes()

    def has_more(self) -> bool:
        """Are there conditions besides :meth:`namespaces`?"""
        return bool(self._class_reads or self._absent or self._dtypes or any(
            group.inner or group.arrays or dict in group.types for _, group in self._careful))

    def more_holds(self) -> bool:
        """Whether those hold."""
        for ref, group in self._careful:
            if (module := ref()) is not None and group.changed_within(module.__dict__):
                return False
        return self._other_failure() is None

    def _explain(self) -> str | None:
        for group in self._groups:
            if (reason := group.explain(_module(self._shell, group.path).__dict__)) is not None:
                return reason
        for ref, group in self._original_groups:
            module = ref()
            if module is not None and (reason := group.explain(module.__dict__)) is not None:
                return reason
        return None

    def sync(self) -> list[str]:
        """Copies attributes that changed on the user's own modules to the shell, so that a recapture sees them.

        Returns their names, "head.temperature". Where both sides changed, the user's own module wins.
        """
        copied = []
        for ref, group in self._original_groups:
            module = ref()
            if module is None:
                continue
            shell = _module(self._shell, group.path)
            for name, before in zip(group.names, group.values):
                now = module.__dict__.get(name, _GONE)
                if now is _GONE:
                    shell.__dict__.pop(name, None)
                elif _differs(now, before):
                    shell.__dict__[name] = copy.copy(now) if isinstance(now, (list, dict, set)) else now
                else:
                    continue
                copied.append(f"{group.path}.{name}" if group.path else name)
        asked = [*self._class_names.items(), *self._absent.items()]
        for path, names in asked:
            module = self._originals.get(path, lambda: None)()
            for name in names:
                if module is not None and name in module.__dict__:
                    _module(self._shell, path).__dict__[name] = module.__dict__[name]
                    copied.append(f"{path}.{name}" if path else name)
        return copied

    def __deepcopy__(self, memo):
        """For a copy of the shell: same conditions, on the copy alone; the user's own modules are no longer watched."""
        twin = copy.copy(self)
        twin._shell = copy.deepcopy(self._shell, memo)
        twin._originals = {}
        twin._snapshot()
        return twin


class _Group:
    """The attributes read on one module, with their values at capture."""

    def __init__(self, path: str, names: tuple[str, ...], module: nn.Module):
        self.path, self.names = path, names
        namespace = module.__dict__
        self.values_of: Callable[[dict], tuple] = _one(*names) if len(names) == 1 else itemgetter(*names)
        found = self.values_of(namespace)
        # containers are compared with a copy; numbers also by type (1 and 1.0 are equal, but not the same graph)
        self.values = tuple(copy.deepcopy(value) if _is_plain_container(value) else value for value in found)
        self.inner = [(name, value, dict(vars(value))) for name, value in zip(names, found) if _has_plain_fields(value)]
        self.arrays = [(name, value, value.copy()) for name, value in zip(names, found)
                       if isinstance(value, numpy.ndarray) and value.size <= 100_000]
        self.types = tuple(map(type, self.values))
        # torch's own modules are many and convert their numbers themselves: equality is enough there
        self.careful = bool(self.inner or self.arrays) or (not type(module).__module__.startswith("torch.")
                                            and any(kind in (int, float, bool, dict) for kind in self.types))

    def attributes(self) -> list[tuple[str, object, bool]]:
        """(name, value, compare by value?); the same object is always the same value, but for a container."""
        return [(name, value, _is_plain_container(value)) for name, value in zip(self.names, self.values)]

    def changed_within(self, namespace: dict) -> bool:
        if tuple(map(type, self.values_of(namespace))) != self.types:
            return True
        if any(_order(now) != _order(before) for now, before in zip(self.values_of(namespace), self.values) if type(now) is dict):
            return True
        return any(vars(value) != fields for _, value, fields in self.inner) or any(
            not numpy.array_equal(value, before) for _, value, before in self.arrays)

    def explain(self, namespace: dict) -> str | None:
        for name, before in zip(self.names, self.values):
            now = namespace.get(name, _GONE)
            if now is _GONE:
                return f"attribute '{name}' of '{self.path or 'the model'}' was deleted since the capture"
            if _differs(now, before):
                return _changed(name, self.path, before, now)
        for name, value, fields in self.inner:
            for key, before in fields.items():
                if _differs(now := vars(value).get(key, _GONE), before):
                    return _changed(f"{name}.{key}", self.path, before, now)
            if len(vars(value)) != len(fields):
                return f"attribute '{name}' of '{self.path or 'the model'}' gained fields since the capture"
        for name, value, before in self.arrays:
            if not numpy.array_equal(value, before):
                return f"the array in attribute '{name}' of '{self.path or 'the model'}' was changed since the capture"
        return None


def _compiled(expression: str):
    return eval(f"lambda S: {expression}", {"math": math, "torch": torch})


def _true(holds, shapes: list) -> bool:
    try:
        return holds(shapes)
    except ArithmeticError:  # a division by a size that is 0 now
        return False


def _one(name: str) -> Callable[[dict], tuple]:
    return lambda namespace: (namespace[name],)


def _module(root: nn.Module, path: str) -> nn.Module:
    return root.get_submodule(path) if path else root


def _mode(training: bool) -> str:
    return "training" if training else "evaluation"


def _changed(name: str, path: str, before, now) -> str:
    return f"attribute '{name}' of '{path or 'the model'}' was {_show(before)} when captured and is {_show(now)} now"


def _show(value) -> str:
    if value is _GONE:
        return "missing"
    text = repr(value) if isinstance(value, _PLAIN) or _is_plain_container(value) else f"one {type(value).__name__}"
    return text if len(text) < 80 else text[:77] + "..."


def _differs(now, before) -> bool:
    if now is before:
        return False
    if type(now) is not type(before) or not (isinstance(now, _PLAIN) or _is_plain_container(now)):
        return True
    return bool(now != before) or (type(now) is dict and _order(now) != _order(before))


def _order(value) -> list:
    """The order of the keys of a dict and of those in it, by which dicts are not compared."""
    return [(key, _order(item) if type(item) is dict else None) for key, item in value.items()]


def _is_plain_container(value, depth: int = 0) -> bool:
    kind = type(value)
    if kind not in (list, tuple, set, frozenset, dict, OrderedDict) or depth > 4 or len(value) > 10_000:
        return False
    items = [*value, *value.values()] if kind in (dict, OrderedDict) else value
    return all(isinstance(item, _PLAIN) or _is_plain_container(item, depth + 1) for item in items)


def _has_plain_fields(value) -> bool:
    """A settings object: its fields are watched as well as its identity."""
    fields = getattr(value, "__dict__", None)
    return type(fields) is dict and not isinstance(value, (nn.Module, torch.Tensor, type)) and not callable(value) and all(
        isinstance(item, _PLAIN) or _is_plain_container(item) for item in fields.values())

