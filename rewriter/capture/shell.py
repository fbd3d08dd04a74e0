"""A shell: a second module tree over the user's own parameters, which capture may instrument freely.

``clone_shell`` copies the tree of modules, never a tensor. ``attach`` gives a captured graph a forward that reads every
parameter, buffer and training flag through the shell at each call, so that whatever happens to the shell is seen.
"""
from __future__ import annotations

import copy
import functools
import types
import weakref
from collections import OrderedDict
from contextlib import contextmanager

import numpy
import torch
from torch import fx, nn
from torch.fx import graph as fx_graph

from ..errors import CaptureError, explain
from . import compressed, stored

TICKET = "_tablewright_ticket"  # an attribute of the shell that is ours
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_WRAPPERS = {
    "torch._dynamo.eval_frame.OptimizedModule": "pass the module given to torch.compile, and compile the result instead",
    "torch.nn.parallel.distributed.DistributedDataParallel": "pass the module it wraps (ddp.module); DDP is not supported yet",
    "torch.nn.parallel.data_parallel.DataParallel": "call optimize() on the wrapped module",
    "torch.fx.graph_module.GraphModule": "pass the model that it was traced from",
}


class RefusingHooks(OrderedDict):
    """The hook dict of a shell's submodule: hooks there would never run, so adding one is an error."""

    path = ""

    def __setitem__(self, key, hook):
        raise CaptureError(explain(
            f"a hook was registered on '{self.path}' of an optimized model", why="the model runs as one graph, which does not "
            "call its submodules one by one, so this hook would never run",
            fix="register it on the optimized model itself, or put it on the plain model's own modules"))

    def __reduce__(self):
        return _refusing, (self.path,)


def _refusing(path: str) -> RefusingHooks:
    hooks = RefusingHooks()
    hooks.path = path
    return hooks


def clone_shell(model: nn.Module) -> nn.Module:
    """A module tree of the same classes that holds the *same* Parameter and buffer objects.

    Each module's ``__dict__`` is copied, and plain containers in it, so that the shell can change without the model.
    Modules that appear twice stay one. Training flags are copied and then independent.
    Raises CaptureError for scripted or wrapped modules, and where a submodule is shadowed on every access path.
    """
    shells: dict[int, nn.Module] = {}
    root = _clone(model, shells)
    for path, module in model.named_modules():
        if path and isinstance(module, nn.Module):
            shell = shells[id(module)]
            for name in _HOOKS:
                if not module.__dict__.get(name):
                    shell.__dict__[name] = _refusing(path)
    return root


def _clone(module: nn.Module, shells: dict[int, nn.Module]) -> nn.Module:
    if id(module) in shells:
        return shells[id(module)]
    cls = type(module)
    for base in cls.__mro__:
        name = f"{base.__module__}.{base.__qualname__}"
        if name in _WRAPPERS:
            raise CaptureError(explain(f"a {base.__name__} cannot be optimized", fix=_WRAPPERS[name]))
    if isinstance(module, torch.jit.ScriptModule):
        raise CaptureError(explain(f"a scripted module ({cls.__name__}) cannot be captured",
                                   fix="pass the plain nn.Module it was scripted from"))
    shell = shells[id(module)] = cls.__new__(cls)
    mine = shell.__dict__
    for key, value in module.__dict__.items():
        if key == "_modules":
            mine[key] = type(value)((name, child if child is None else _clone(child, shells)) for name, child in value.items())
        elif key in ("_parameters", "_buffers", "_non_persistent_buffers_set"):
            mine[key] = copy.copy(value)
        elif key == "_compiled_call_impl":
            mine[key] = None  # module.compile() would run the user's compiled forward, not the shell's
        else:
            mine[key] = _copy_value(value, shells)
    return shell


def _copy_value(value, shells):
    """Containers are copied, what points at the model's modules is turned to their shells, all else is shared."""
    if isinstance(value, nn.Module):
        return _clone(value, shells)
    kind = type(value)
    if kind is numpy.ndarray:
        return value.copy()  # forward() may write to it
    if kind in (list, tuple, set, frozenset):
        return kind(_copy_value(item, shells) for item in value)
    if kind in (dict, OrderedDict):
        return kind((key, _copy_value(item, shells)) for key, item in value.items())
    if kind is types.MethodType and isinstance(value.__self__, nn.Module):
        return types.MethodType(value.__func__, _clone(value.__self__, shells))
    if kind is functools.partial:
        args = [_copy_value(item, shells) for item in value.args]
        return functools.partial(_copy_value(value.func, shells), *args,
                                 **{key: _copy_value(item, shells) for key, item in value.keywords.items()})
    if kind.__name__ == "_WrappedHook" and kind.__module__ == "torch.nn.modules.module":
        owner = value.module() if value.with_module else None
        return kind(_copy_value(value.hook, shells), None if owner is None else _clone(owner, shells))
    return value


def refuse_hooks(shell: nn.Module) -> None:
    """Raises CaptureError naming the first submodule with a forward or backward hook (the root's own hooks are allowed)."""
    for path, module in shell.named_modules():
        for name in _HOOKS:
            hooks = module.__dict__.get(name)
            if path and hooks:
                hook = next(iter(hooks.values()))
                raise CaptureError(explain(
                    f"'{path}' ({type(module).__name__}) has a {name.strip('_').replace('_', ' ')[:-1]}: "
                    f"{getattr(hook, '__qualname__', type(hook).__qualname__)}",
                    why="a captured graph does not call submodules one by one, so the hook would run at capture only",
                    fix="remove the hook, write its work into forward(), or register it on the whole model"))


def deep_copy(shell: nn.Module, memo: dict | None = None) -> nn.Module:
    """``copy.deepcopy``, also where forward() has left results with a history in attributes: those are copied without it."""
    memo = {} if memo is None else memo
    kept: list = []  # the memo goes by id: nothing may be freed meanwhile

    def search(value, depth: int) -> None:
        if isinstance(value, torch.Tensor):
            if not value.is_leaf:
                memo[id(value)] = value.detach().clone()
                kept.append(value)
        elif depth and isinstance(value, dict):
            search(list(value.values()), depth - 1)
        elif depth and isinstance(value, (list, tuple)):
            for item in value:
                search(item, depth - 1)

    for module in shell.modules():
        search([value for key, value in module.__dict__.items() if key not in ("_modules", "_parameters")], 4)
    return copy.deepcopy(shell, memo)


def plain_copy(shell: nn.Module, share: bool = False) -> nn.Module:
    """A plain model from a shell: hooks allowed again, nothing of ours left. ``share`` keeps the same parameter objects."""
    memo: dict = {}
    if share:
        memo.update({id(t): t for t in [*shell.parameters(), *shell.buffers()]})
    result = deep_copy(shell, memo)
    result.__dict__.pop(TICKET, None)
    stored.restore_plain(result)
    compressed.restore_plain(result)
    for module in result.modules():
        for name in _HOOKS:
            if isinstance(module.__dict__[name], RefusingHooks):
                module.__dict__[name] = OrderedDict()
    return result


@contextmanager
def _quoted_names():
    """torch.fx writes a module's name into the code it generates between plain double quotes: a quote, a backslash or a newline in
    the name would break that code, or run as part of it."""
    plain, fx_graph._format_target = fx_graph._format_target, _format_target
    try:
        yield
    finally:
        fx_graph._format_target = plain


def _format_target(base: str, target: str) -> str:
    for part in target.split("."):
        base = f"{base}.{part}" if part.isidentifier() else f"getattr({base}, {part!r})"
    return base


class ShellGraph(fx.GraphModule):
    """A GraphModule whose generated forward runs on the shell: every ``self.a.b`` in it reads the shell's ``a.b``."""

    @property
    def training(self) -> bool:
        shell = self.__dict__.get("_shell")
        return True if shell is None else shell.training

    @training.setter
    def training(self, mode: bool) -> None:
        if (shell := self.__dict__.get("_shell")) is not None:
            shell.training = mode

    def __setattr__(self, name, value):
        if isinstance(getattr(type(self), name, None), property):
            object.__setattr__(self, name, value)  # also where a child module has that name
        else:
            super().__setattr__(name, value)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "_shell" or "_shell" not in self.__dict__:
                raise
            return getattr(self._shell, name)  # plain tensors that the model keeps as attributes, constants of the capture

    def recompile(self):
        with _quoted_names():
            code = super().recompile()
        cls = type(self)
        generated = cls.forward

        def forward(self, *args):
            return generated(self._shell, *args)

        cls.forward = forward
        return code

    def __deepcopy__(self, memo):
        # the shell and the graph are copied, then joined again: GraphModule's own copy would freeze what is live
        return attach(copy.deepcopy(self._shell, memo), copy.deepcopy(self.graph, memo))

    def __reduce__(self):
        raise CaptureError(explain("a captured graph cannot be pickled", why="pickling a GraphModule loses node.meta",
                                   fix="save the plain model and its plan, and optimize again on load"))


def attach(shell: nn.Module, graph: fx.Graph) -> ShellGraph:
    """A GraphModule for ``graph`` whose ``get_attr`` targets resolve live through ``shell``.

    It shares the shell's dicts of modules, parameters and buffers, so ``.to()``, ``load_state_dict(assign=True)`` and
    ``train()`` on either are seen by both, also where a child has a name that GraphModule uses ("graph", "code").
    """
    result = ShellGraph(nn.Module(), fx.Graph(), type(shell).__name__)
    result.__dict__["_shell"] = shell
    for name in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
        result.__dict__[name] = shell.__dict__[name]
    result.graph = graph
    if any(hasattr(fx.GraphModule, name) or name in ("meta", "_graph") for name in shell._modules):
        graph.owning_module = shell  # lint() and friends must look a child "graph" up on the shell, not on the GraphModule
    return result


def weak_modules(model: nn.Module) -> dict[str, weakref.ref]:
    """Every module of ``model`` by path (each once), without keeping the model alive."""
    return {path: weakref.ref(module) for path, module in model.named_modules()}
