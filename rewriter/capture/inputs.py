"""The structure of a call's arguments: leaves, placeholder names, and a fast test that a later call has the same structure."""
from __future__ import annotations

import dataclasses
import inspect
import re
from collections import OrderedDict
from operator import attrgetter, itemgetter

import numpy
import torch
import torch.utils._pytree as pytree
from torch import nn

from ..errors import CaptureError, explain

_BAKED = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_FACTS = attrgetter("dtype", "ndim", "is_cpu")


class Inputs:
    """How one call was made. ``leaves`` are all pytree leaves of ``(args, kwargs)``; tensors and numbers have placeholders.

    ``names[i]`` is the readable name of leaf i ("features_user"), ``spec`` the TreeSpec, ``placeholders`` the leaf
    positions that the graph takes, in order. With ``abstract=True`` nothing is known of the tensors' dtypes and ranks.
    """

    def __init__(self, args: tuple, kwargs: dict, signature: inspect.Signature | None, abstract: bool = False):
        _register_dataclasses((args, kwargs))
        self.leaves, self.spec = pytree.tree_flatten((args, kwargs))
        self.names = _leaf_names(args, kwargs, signature)
        self.abstract = abstract
        self.ranks: dict[int, int] = {}  # leaf -> rank that Python relied on, where nothing else is known
        for leaf, name in zip(self.leaves, self.names):
            if not isinstance(leaf, (torch.Tensor, *_BAKED)):
                if isinstance(leaf, (numpy.ndarray, numpy.generic)):
                    raise CaptureError(explain(f"input '{name}' is a {type(leaf).__name__}", why="a captured graph takes tensors",
                                               fix="pass torch.as_tensor(...)"))
                raise CaptureError(explain(
                    f"input '{name}' is a {type(leaf).__module__}.{type(leaf).__qualname__}, which is neither a tensor nor a "
                    "container of tensors", why="a captured graph takes tensors",
                    fix="pass its tensors, or make the class a dataclass or a registered pytree "
                        "(torch.utils._pytree.register_pytree_node)"))
        self.tensors = [i for i, leaf in enumerate(self.leaves) if isinstance(leaf, torch.Tensor)]
        self.placeholders = [i for i, leaf in enumerate(self.leaves)
                             if isinstance(leaf, torch.Tensor) or type(leaf) in (int, float)]
        self.baked = {i: leaf for i, leaf in enumerate(self.leaves) if not isinstance(leaf, torch.Tensor)}
        self.types = [type(leaf) for leaf in self.leaves]
        self.facts = [] if abstract else [_FACTS(self.leaves[i]) for i in self.tensors]
        self.device = None if abstract or not self.tensors else self.leaves[self.tensors[0]].device
        self.flatten = _flattener(args, kwargs, self.spec)
        self.tensors_of = _getter(self.tensors, len(self.leaves))
        self.pick = _getter(self.placeholders, len(self.leaves))
        self.examples = self.leaves
        self.leaves = [None if isinstance(leaf, torch.Tensor) else leaf for leaf in self.leaves]  # keep no batch alive

    def failure(self, leaves: list | None, args: tuple, kwargs: dict) -> str | None:
        """What is different about a call whose ``flatten`` gave ``leaves``; None where the same graph serves it."""
        if leaves is None:
            return self._explain_structure(args, kwargs)
        if list(map(type, leaves)) != self.types:
            for i, leaf in enumerate(leaves):
                wanted = self.types[i]
                if type(leaf) is not wanted and not (issubclass(wanted, torch.Tensor) and isinstance(leaf, torch.Tensor)):
                    return (f"input '{self.names[i]}' was {_kind(wanted)} when captured and is {_kind(type(leaf))} now")
        for i, value in self.baked.items():
            if leaves[i] is not value and leaves[i] != value:
                return f"input '{self.names[i]}' was {value!r} when captured and is {leaves[i]!r} now"
        tensors = self.tensors_of(leaves)
        if not self.abstract and tensors:
            if list(map(_FACTS, tensors)) != self.facts or tensors[0].device != self.device:
                return self._explain_facts(tensors)
        for i, rank in self.ranks.items():
            if leaves[i].ndim != rank:
                return f"input '{self.names[i]}' had {rank} dimensions when captured and has {leaves[i].ndim} now"
        return None

    def _explain_facts(self, tensors) -> str | None:
        for i, tensor, (dtype, rank, on_cpu) in zip(self.tensors, tensors, self.facts):
            if tensor.dtype != dtype:
                return f"input '{self.names[i]}' was {dtype} when captured and is {tensor.dtype} now"
            if tensor.ndim != rank:
                return f"input '{self.names[i]}' had {rank} dimensions when captured and has {tensor.ndim} now"
            if tensor.is_cpu != on_cpu or tensor.device != self.device:
                return f"input '{self.names[i]}' is on {tensor.device}, which differs from the capture's {self.device}"
        return None

    def _explain_structure(self, args, kwargs) -> str:
        names = _leaf_names(args, kwargs, None)
        return (f"the inputs have another structure than when captured: {len(names)} leaves "
                f"in ({len(args)} positional, {sorted(kwargs)} keyword) arguments now, captured as {_brief(self.spec)}")


def _getter(positions: list[int], total: int):
    if positions == list(range(total)):
        return lambda leaves: leaves
    if len(positions) == 1:
        return lambda leaves, i=positions[0]: [leaves[i]]
    return itemgetter(*positions) if positions else lambda leaves: ()


def _kind(cls: type) -> str:
    if issubclass(cls, torch.Tensor):
        return "a tensor"
    return "None" if cls is type(None) else f"a {cls.__name__}"


def _brief(spec) -> str:
    text = re.sub(r"\s+", " ", str(spec))
    return text if len(text) < 200 else text[:200] + "..."


def _register_dataclasses(value, depth: int = 0) -> None:
    """Dataclass inputs become containers of their fields, once per class."""
    for leaf in pytree.tree_leaves(value):
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type) and depth < 8:
            torch.export.register_dataclass(type(leaf))
            _register_dataclasses([getattr(leaf, field.name) for field in dataclasses.fields(leaf)], depth + 1)


def _leaf_names(args: tuple, kwargs: dict, signature: inspect.Signature | None) -> list[str]:
    names = []
    parameters = [] if signature is None else [
        each for each in signature.parameters.values() if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    try:
        paths = [path for path, _ in pytree.tree_flatten_with_path((args, kwargs))[0]]
    except ValueError:  # a class that was registered without the names of its parts
        return [f"input_{i}" for i in range(len(pytree.tree_leaves((args, kwargs))))]
    for path in paths:
        keys = [getattr(key, "key", getattr(key, "idx", getattr(key, "name", key))) for key in path]
        first = keys[1]
        if keys[0] == 0:
            index = int(str(first))
            first = parameters[index].name if index < len(parameters) else f"arg_{index}"
        names.append(re.sub(r"\W", "_", "_".join(map(str, [first, *keys[2:]]))))
    return names


def _flattener(args: tuple, kwargs: dict, spec):
    """A function (args, kwargs) -> all leaves, or None where the structure differs. Compiled for plain containers."""
    lines, constants, count = [], {}, 0

    def walk(value, expression: str) -> bool:
        """Appends code that extends ``out`` by the leaves of ``expression``; False where only pytree can tell."""
        nonlocal count
        kind = type(value)
        name = f"v{count}"
        count += 1
        if kind in (tuple, list) or (issubclass(kind, tuple) and hasattr(kind, "_fields")):
            constants[f"k{name}"] = kind
            lines.append(f"{name} = {expression}\n if type({name}) is not k{name} or len({name}) != {len(value)}: return None")
            children = list(enumerate(value))
        elif kind in (dict, OrderedDict):
            constants[f"k{name}"], constants[f"n{name}"] = kind, tuple(value)
            lines.append(f"{name} = {expression}\n if type({name}) is not k{name} or tuple({name}) != n{name}: return None")
            children = [(key, value[key]) for key in value]
        elif isinstance(value, (torch.Tensor, *_BAKED)):
            lines.append(f"add({expression})")
            return True
        else:
            return False
        if all(isinstance(child, (torch.Tensor, *_BAKED)) for _, child in children):
            if children:
                lines.append(f"out.extend({name}{'.values()' if kind in (dict, OrderedDict) else ''})")
            return True
        for position, (key, child) in enumerate(children):
            constants[f"c{name}_{position}"] = key
            if not walk(child, f"{name}[c{name}_{position}]"):
                return False
        return True

    if not (walk(args, "args") and walk(kwargs, "kwargs")):
        def slow(args, kwargs):
            leaves, found = pytree.tree_flatten((args, kwargs))
            return leaves if found == spec else None

        return slow
    body = "\n ".join(["out = []", "add = out.append", *lines, "return out"])
    exec(f"def flatten(args, kwargs):\n {body}", constants)
    return constants["flatten"]


def signature_of(shell: nn.Module, entry: str = "forward") -> inspect.Signature | None:
    try:
        return inspect.signature(getattr(shell if entry in shell.__dict__ else type(shell), entry))
    except (TypeError, ValueError):
        return None
