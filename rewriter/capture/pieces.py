"""A piece: one graph that dynamo captured, in the ATen form of the other doors, and what runs in its place.

Dynamo hands its backend a torch-level graph whose inputs are everything the frame read: tensors, sizes, and the model's
parameters and buffers. ``Piece`` lowers that graph to ATen training IR with the parameters under their plain names. One
compiled frame may serve several modules of one class, so every call checks that the parameters are those the names mean.
What cannot be lowered surely runs as dynamo captured it.
"""
from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import traceback as fx_traceback
from torch.fx.experimental.proxy_tensor import make_fx

from ...passes.origin import KEY, Origin
from .cleanup import make_functional, remove_dead, simplify
from .fx_tracer import CONSTANT
from .recording import is_users
from .shell import attach
from .traced_builtins import DataIsDetached

Rewrite = Callable[[fx.Graph], tuple[Callable[..., Any], Any]]
aten = torch.ops.aten
_MODES = ("_set_grad_enabled", "_enter_autocast", "_exit_autocast", "_enter_inference_mode", "_exit_inference_mode")


class CannotLower(Exception):
    """Why a piece keeps the graph that dynamo made."""


class Form:
    """The ATen graph of a piece for one set of parameters. ``run`` takes the piece's other inputs; ``result`` is what
    rewriting said of it."""

    def __init__(self, shell: nn.Module, graph: fx.Graph, names: tuple[str | None, ...]) -> None:
        self.graph, self.names = graph, names
        self.run: Callable[..., Any] = attach(shell, graph).forward
        self.result: Any = None
        self._homes = [(i, *_home(shell, name)) for i, name in enumerate(names) if name is not None]
        self._given = [i for i, name in enumerate(names) if name is None]

    def serves(self, inputs: tuple) -> bool:
        """Whether the tensors that this form reads by name are the ones given."""
        return all(namespace.get(key) is inputs[i] for i, namespace, key in self._homes)

    def __call__(self, inputs: tuple) -> Any:
        return self.run(*[inputs[i] for i in self._given])


class Piece:
    """One captured graph. ``forms``: its ATen graphs, one for each set of parameters met; ``reason``: why it has none."""

    def __init__(self, shell: nn.Module, module: fx.GraphModule, rewrite: Rewrite | None, called: list[Piece]) -> None:
        self._shell, self._module, self._rewrite, self._called = shell, module, rewrite, called
        self._examples = _examples(module)
        self.forms: list[Form] = []
        self.reason = ""
        grapharg = [node.meta.get("grapharg") for node in module.graph.nodes if node.op == "placeholder"]
        self._add_form(tuple(getattr(each, "example", None) for each in grapharg))

    def __call__(self, *inputs: Any) -> Any:
        self._called.append(self)
        for form in self.forms:
            if form.serves(inputs):
                return form(inputs)
        form = None if self.reason else self._add_form(inputs)
        return self._module.forward(*inputs) if form is None else form(inputs)

    def rewritten_by(self, rewrite: Rewrite) -> None:
        """From now on the forms run as ``rewrite(graph) -> (callable, result)`` makes them."""
        self._rewrite = rewrite
        for form in self.forms:
            form.run, form.result = rewrite(form.graph)

    def _add_form(self, inputs: tuple) -> Form | None:
        known = {id(t): name for name, t in [*self._shell.named_parameters(), *self._shell.named_buffers()]}
        names = tuple(known.get(id(each)) for each in inputs)
        try:
            graph = _lowered(self._module, self._examples, names, self._shell)
        except Exception as error:  # whatever a model's ops say of being traced: dynamo's own graph is right
            first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
            self.reason = str(error) if isinstance(error, CannotLower) else f"{type(error).__name__}: {first[:200]}"
            return None
        form = Form(self._shell, graph, names)
        if self._rewrite is not None:
            form.run, form.result = self._rewrite(graph)
        self.forms.append(form)
        return form


def _home(shell: nn.Module, name: str) -> tuple[dict, str]:
    owner, _, key = name.rpartition(".")
    module = shell.get_submodule(owner) if owner else shell
    return (module._parameters if key in module._parameters else module._buffers), key


def _examples(module: fx.GraphModule) -> list:
    found = []
    for node in module.graph.nodes:
        if node.op == "placeholder":
            found.append(node.meta.get("example_value"))
    return found


def _lowered(module: fx.GraphModule, examples: list, names: tuple, shell: nn.Module) -> fx.Graph:
    """The ATen form of ``module``; raises :class:`CannotLower` for what tracing would not keep as it is."""
    for node in module.graph.nodes:
        if isinstance(node.target, torch._ops.HigherOrderOperator) or (
                node.op == "get_attr" and isinstance(getattr(module, str(node.target), None), nn.Module)):
            raise CannotLower(f"it calls {node.target}, whose inner graph must stay as it is")
        if getattr(node.target, "__name__", "") in _MODES:
            raise CannotLower("it switches gradients or autocast on or off, and rewrites could cross that line")
    mode = next((each.fake_mode for each in examples if isinstance(each, FakeTensor)), None)
    if mode is None or any(each is None for each in examples):
        raise CannotLower("it takes no tensors")

    def replay(*inputs):
        with fx_traceback.preserve_node_meta(), DataIsDetached():
            return fx.Interpreter(module).run(*inputs, enable_io_processing=False)

    with mode, enable_python_dispatcher(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        env = mode.shape_env
        with env.ignore_fresh_unbacked_symbols() if env is not None else warnings.catch_warnings():
            traced = make_fx(replay, pre_dispatch=True, _allow_non_fake_inputs=True)(*examples)
    return _plain_form(traced, names, shell)


def _plain_form(traced: fx.GraphModule, names: tuple, shell: nn.Module) -> fx.Graph:
    graph, copies = fx.Graph(), {}
    paths = {id(module): path for path, module in shell.named_modules()}
    inputs = [node for node in traced.graph.nodes if node.op == "placeholder"]
    for index, (node, name) in enumerate(zip(inputs, names, strict=True)):
        if name is None:
            copies[node] = graph.placeholder(f"arg_{index}")
            copies[node].meta[KEY] = Origin((copies[node].name,), "capture")
            copies[node].meta["val"] = node.meta.get("val")
    for node, name in zip(inputs, names, strict=True):
        if name is not None:
            copies[node] = graph.get_attr(name)
            copies[node].meta["val"] = node.meta.get("val")
            copies[node].meta[KEY] = Origin((copies[node].name,), "capture", name.rpartition(".")[0])
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            continue
        if node.op == "get_attr":
            value = getattr(traced, str(node.target))
            if not isinstance(value, torch.Tensor) or isinstance(value, FakeTensor):
                raise CannotLower(f"it holds a {type(value).__name__}")
            copies[node] = graph.get_attr(keep_constant(shell, value))
            copies[node].meta.update(node.meta)
            copies[node].meta[KEY] = Origin((copies[node].name,), "capture")
        elif node.op == "output":
            results = node.args[0] if isinstance(node.args[0], (tuple, list)) else (node.args[0],)
            output = graph.output(tuple(fx.node.map_arg(each, copies.__getitem__) for each in results))
            output.meta[KEY] = Origin((output.name,), "capture")
        elif node.op == "call_function":
            copies[node] = graph.node_copy(node, copies.__getitem__)
            copies[node].meta = dict(node.meta)
            copies[node].meta[KEY] = _origin(copies[node], paths)
        else:
            raise CannotLower(f"it holds a {node.op}")
    simplify(graph, shell)
    make_functional(graph)
    remove_dead(graph)
    graph.lint()
    return graph


def keep_constant(shell: nn.Module, value: torch.Tensor) -> str:
    """A name on the shell under which ``value``, a constant of a capture, is kept."""
    number = 0
    while f"{CONSTANT}{number}" in shell.__dict__:
        number += 1
    shell.__dict__[f"{CONSTANT}{number}"] = value
    return f"{CONSTANT}{number}"


def _origin(node: fx.Node, paths: dict[int, str]) -> Origin:
    """Dynamo names modules by how the frame reached them, and keys them by the module's id."""
    path, location = "", ""
    for key, (named, _) in (node.meta.get("nn_module_stack") or {}).items():
        number = str(key).partition("_")[0].partition("@")[0]
        if number.isdigit() and int(number) in paths:
            path = paths[int(number)]
        elif found := re.fullmatch(r"L\['\w+'\]\.(.+)", str(named)):
            path = re.sub(r"\[['\"]?(\w+)['\"]?\]", r".\1", found[1])
    for file, line in re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or ""):
        if os.path.isabs(file) and is_users(file):
            location = f"{os.path.basename(file)}:{line}"
    return Origin((node.name,), "capture", path, location)
