"""Door 2: ``torch.export`` (never ``strict=True``) in training IR, brought to the form that the FX door gives.

One export serves both modes where only torch's own dropout and batch norm read ``training``: they are exported as in
training, and their flags become ``get_attr`` nodes. Sizes that export took for granted become guards.
"""
from __future__ import annotations

import logging
import os
import re
import warnings
from contextlib import ExitStack, contextmanager, nullcontext

import torch
import torch.utils._pytree as pytree
from torch import fx, nn
from torch.export import _trace

from ...passes.origin import KEY, Origin
from ..errors import CaptureError, explain
from .cleanup import make_functional, remove_dead, simplify
from .data_followed import AS_ATEN, FollowsData, check_asserted, forget_values, name_sizes, values_known
from .data_guard import mark
from .fx_frontend import register_outputs, sample_inputs
from .fx_tracer import CONSTANT
from .inputs import Inputs
from .recording import ReadLog, is_users, raised_at, recording
from .traced_builtins import Again, TracedCalls, symbolic

aten = torch.ops.aten
# the argument that is the training flag
_FLAG_ARGUMENT = {aten.dropout.default: 2, aten.dropout_.default: 2, aten.feature_dropout.default: 2,
                  aten.feature_dropout_.default: 2, aten.alpha_dropout.default: 2, aten.alpha_dropout_.default: 2,
                  aten.feature_alpha_dropout.default: 2, aten.batch_norm.default: 5}
_FLAGGED = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm)
_DROPPED = {aten._assert_tensor_metadata.default, aten.sym_constrain_range.default, aten.sym_constrain_range_for_size.default}


class _ExportLog(ReadLog):
    """Export swaps fake parameters in and out by setting them; every other write is the model's own and refused."""

    error: CaptureError | None = None

    def write(self, module, name, value):
        if name in module.__dict__.get("_parameters", ()) or name.startswith("_flat_weight"):
            return True
        try:
            return super().write(module, name, value)
        except CaptureError as error:
            self.error = self.error or error
            raise


class _Seen:
    """Outlives an export, which puts back every attribute of the wrapper that is a plain container."""

    def __init__(self, log: ReadLog):
        self.log, self.out_spec, self.effects = log, None, []


class _Flat(nn.Module):
    """The shell as a function of its tensor leaves, so that every input has a place in one flat list."""

    def __init__(self, shell: nn.Module, inputs: Inputs, leaves: list, log: ReadLog, entry: str, calls: TracedCalls):
        super().__init__()
        self.m = shell
        self._calls = calls
        self._entry = entry
        self.training = shell.training
        self._inputs, self._constants, self.seen = inputs, leaves, _Seen(log)

    def forward(self, *tensors):
        leaves = list(self._constants)
        for position, tensor in zip(self._inputs.tensors, tensors):
            leaves[position] = tensor
        args, kwargs = pytree.tree_unflatten(leaves, self._inputs.spec)
        self.seen.log.written.clear()
        with self._calls:
            result = self.m(*args, **kwargs) if self._entry == "forward" else getattr(self.m, self._entry)(*args, **kwargs)
        self.seen.log.check_containers()  # here, since export puts lists back
        register_outputs(result)
        results, self.seen.out_spec = pytree.tree_flatten(result)
        self.seen.effects, extra = self.seen.log.effects()
        self.seen.log.written.clear()
        return tuple([*results, *extra])


def export(shell: nn.Module, args: tuple, kwargs: dict, entry: str = "forward", exact: bool = False, data: bool = False):
    """(graph, inputs, out_spec, effects, log, conditions) of the shell in its current mode; the shell is left as it was.

    ``conditions`` are Python expressions over ``S`` (the shapes of the tensor leaves) that the graph takes for granted.
    ``exact``: keep a batch of one as it is, though the graph then serves batches of one only. ``data``: where Python looks at data,
    follow what it does with these inputs, and assert in the graph what they decided (see ``data_guard.py``).
    Raises CaptureError with the cause and the user's line.
    """
    inputs, leaves = sample_inputs(shell, args, kwargs, entry)
    tensors = [_no_view(leaves[i]) for i in inputs.tensors]
    if not exact:
        tensors = _at_least_two(tensors)
    constants = [None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
    calls = FollowsData() if data else TracedCalls()
    program, wrapper, log = _run(shell, entry, inputs, constants, tensors, True, calls)
    if log.flags_flipped & log.modes:  # the model itself looks at a dropout's mode: it must see the true one
        program, wrapper, log = _run(shell, entry, inputs, constants, tensors, False, calls)
    graph = _normal_form(program, shell, inputs, log)
    inputs.examples = None
    return graph, inputs, wrapper.seen.out_spec, wrapper.seen.effects, log, _conditions(program)


def _run(shell, entry, inputs, constants, tensors, flip: bool, calls: TracedCalls):
    while True:
        known = len(calls.spaces)
        try:
            result = _run_once(shell, entry, inputs, constants, tensors, flip, calls)
        except Again:
            continue
        if len(calls.spaces) == known:  # else forward() hid what it was asked
            return result


def _run_once(shell, entry, inputs, constants, tensors, flip: bool, calls: TracedCalls):
    log = _ExportLog(shell)
    wrapper = _Flat(shell, inputs, constants, log, entry, calls)
    flagged = {path: module for path, module in shell.named_modules() if isinstance(module, _FLAGGED)} if flip else {}
    log.flags_flipped = {path for path, module in flagged.items() if not module.training}
    log.flagged = set(flagged)
    auto = torch.export.Dim.AUTO
    shapes = (tuple({dim: auto for dim in range(tensor.dim())} for tensor in tensors),)
    modes = {path: module.__dict__["training"] for path, module in flagged.items()}
    values = values_known(shell) if isinstance(calls, FollowsData) else nullcontext()
    with _restored(shell), recording(log, calls=False), quiet(), values, symbolic(dict(calls.spaces)), _no_print():
        try:
            for module in flagged.values():
                module.__dict__["training"] = True
            program = torch.export.export(wrapper, tuple(tensors), strict=False, dynamic_shapes=shapes)
        except Exception as error:
            raise log.error or _failed(error) from error
        finally:
            for path, module in flagged.items():
                module.__dict__["training"] = modes[path]
    if log.error is not None:
        raise log.error
    if isinstance(calls, FollowsData):
        check_asserted(program.graph)
        forget_values(program.graph)
    return program, wrapper, log


def _failed(error: Exception) -> CaptureError:
    if isinstance(error, CaptureError):
        return error
    where = raised_at(error)
    text = str(error).strip()
    first = next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
    data = "data-dependent" in text.lower() or "GuardOnDataDependent" in type(error).__name__
    fix = ("take the decision outside forward(), or write it with torch.where or a mask" if data else
           "rewrite that line with torch operations, or leave this model as it is")
    return CaptureError(explain("the model cannot be captured", where=where, fix=fix,
                                why=f"torch.export stopped with {type(error).__name__}: {first[:400]}"))


@contextmanager
def _restored(shell: nn.Module):
    """Export fakes parameters in place and fills caches; every ``__dict__`` and list of the shell comes back as it was."""
    before = [(module, dict(module.__dict__), {
        key: type(value)(value) for key, value in module.__dict__.items() if type(value) in (list, dict)})
        for module in shell.modules()]
    try:
        yield
    finally:
        for module, attributes, containers in before:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for key, content in containers.items():
                held = module.__dict__[key]
                held.clear()
                (held.extend if isinstance(held, list) else held.update)(content)


@contextmanager
def quiet():
    """No ambient mode of the caller (inference, no_grad, autocast) reaches a capture."""
    with ExitStack() as stack:
        stack.enter_context(silent())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        yield


_FAKE_LOG = logging.getLogger("torch._subclasses.fake_tensor")


@contextmanager
def silent():
    """Torch logs a traceback for every op whose shapes it cannot tell, also where it then finds another way."""
    before, _FAKE_LOG.disabled = _FAKE_LOG.disabled, True
    try:
        yield
    finally:
        _FAKE_LOG.disabled = before


@contextmanager
def _no_print():
    """Export prints the graph that it could not finish."""
    _trace.__dict__["print"] = lambda *_, **__: None
    try:
        yield
    finally:
        del _trace.__dict__["print"]


def _no_view(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor``, or of a part of a larger one a copy: export would also guard the sizes of the larger one, which no call shows."""
    if tensor.layout != torch.strided or not tensor._is_view():
        return tensor
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def _at_least_two(tensors: list) -> list:
    """Export takes a size of 1 for a constant: a batch of one example becomes two, where all inputs share it."""
    sizes = {tensor.shape[0] for tensor in tensors if tensor.dim()}
    if sizes != {1}:
        return tensors
    return [tensor.repeat(2, *[1] * (tensor.dim() - 1)).requires_grad_(tensor.requires_grad) if tensor.dim() else tensor
            for tensor in tensors]


def _conditions(program) -> list[str]:
    """What the export assumed of sizes, over ``S[i][d]``: the size of dimension d of tensor leaf i."""
    codes = getattr(program, "_guards_code", None)
    if codes is None:
        raise CaptureError(explain("this version of torch does not say what torch.export assumed of sizes",
                                   fix="use torch 2.11 or later"))
    codes = list(codes)
    users = [node for node in program.graph.nodes if node.name in program.graph_signature.user_inputs]
    for index, node in enumerate(users):
        for dim, size in enumerate(getattr(node.meta.get("val"), "shape", ())):
            here = f"L['l'][{index}].size()[{dim}]"
            if isinstance(size, int):
                codes.append(f"{here} == {size}")  # made static (0 and 1 always are), which _guards_code leaves out
    return [re.sub(r"L\['\w+'\]\[(\d+)\]\.size\(\)\[(\d+)\]", r"S[\1][\2]", code) for code in codes]


def _normal_form(program, shell, inputs: Inputs, log) -> fx.Graph:
    keep = {"check_guards": False} if "check_guards" in torch.export.ExportedProgram.module.__code__.co_varnames else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = program.module(**keep)
    graph, copies, sizes = fx.Graph(), {}, {}
    placeholders = iter(inputs.tensors)
    made = {}
    for position in inputs.placeholders:
        made[position] = graph.placeholder(inputs.names[position])
        made[position].meta[KEY] = Origin((made[position].name,), "capture")
    for node in module.graph.nodes:
        if node.op == "placeholder":
            copies[node] = made[next(placeholders)]
            copies[node].meta.update({key: value for key, value in node.meta.items() if key in ("val", "tensor_meta")})
        elif node.op == "call_module" and not node.users or node.target in _DROPPED:
            continue
        elif node.op == "get_attr":
            copies[node] = graph.get_attr(_state_name(node.target, module, shell))
            copies[node].meta.update(node.meta)
            owner = copies[node].target.rpartition(".")[0]
            copies[node].meta[KEY] = Origin((copies[node].name,), "capture", owner)
        elif node.op == "output":
            results = pytree.tree_leaves(node.args[0], is_leaf=lambda value: isinstance(value, fx.Node))
            output = graph.output(tuple(fx.node.map_arg(each, copies.__getitem__) for each in results))
            output.meta[KEY] = Origin((output.name,), "capture")
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
            copies[node].target = AS_ATEN.get(node.target, node.target)
            copies[node].meta = dict(node.meta)
            name_sizes(copies[node], sizes)
            _stamp(copies[node])
    mark(graph)
    _open_flags(graph, shell, log)
    simplify(graph, shell)
    make_functional(graph)
    remove_dead(graph)
    return graph


def _state_name(target: str, module: nn.Module, shell: nn.Module) -> str:
    """The plain name of what export calls ``target``; constants that export made go to the shell under a name of ours."""
    value = module
    for part in target.split("."):
        value = getattr(value, part)
    name = target[2:] if target.startswith("m.") else target
    found = shell
    for part in name.split("."):
        found = getattr(found, part, None)
    if found is value:
        return name
    if isinstance(value, torch.Tensor):
        for path, parameter in shell.named_parameters():
            if parameter is value:
                return path
        plain = _plain_tensors(shell).get(value.data_ptr())
        if plain is not None:
            return plain
        if value.requires_grad or value.data_ptr() in _unregistered(shell):
            raise CaptureError(explain("the model uses a parameter that is not registered in it", fix=(
                "keep it in a module, an nn.ModuleList or an nn.ParameterList instead of a plain list; "
                "do not create parameters inside forward()")))
    number = 0
    while f"{CONSTANT}{number}" in shell.__dict__:
        number += 1
    shell.__dict__[f"{CONSTANT}{number}"] = value
    return f"{CONSTANT}{number}"


def _plain_tensors(shell: nn.Module) -> dict[int, str]:
    """Addresses of tensors that modules keep in plain attributes and train, by their names: the graph reads them live."""
    return {value.data_ptr(): f"{path}.{key}" if path else key for path, module in shell.named_modules()
            for key, value in module.__dict__.items() if isinstance(value, torch.Tensor) and value.requires_grad and value.data_ptr()}


def _unregistered(shell: nn.Module) -> set[int]:
    """Addresses of trainable tensors that modules keep in plain attributes or lists, where no optimizer finds them."""
    registered = {id(parameter) for parameter in shell.parameters()}
    found: set[int] = set()

    def search(value, depth: int) -> None:
        if isinstance(value, torch.Tensor):
            if value.requires_grad and id(value) not in registered and value.data_ptr():
                found.add(value.data_ptr())
        elif depth and isinstance(value, nn.Module):
            search(list(value.parameters()), 1)
        elif depth and isinstance(value, (list, tuple)):
            for item in value:
                search(item, depth - 1)
        elif depth and isinstance(value, dict):
            search(list(value.values()), depth - 1)

    for module in shell.modules():
        for key, value in module.__dict__.items():
            if key not in ("_modules", "_parameters", "_buffers", "_flat_weights"):
                search(value, 4)
    return found


def _path_of(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    for path, _ in reversed(list(stack.values())):
        if path == "m" or path.startswith("m."):
            return re.sub(r"@\d+$", "", path[2:])
    return ""


def _stamp(node: fx.Node) -> None:
    stack = node.meta.get("nn_module_stack")
    location = ""
    for file, line in re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or ""):
        if os.path.isabs(file) and is_users(file):
            location = f"{os.path.basename(file)}:{line}"
    node.meta[KEY] = Origin((node.name,), "capture", _path_of(node), location)
    if stack:
        node.meta["nn_module_stack"] = {key: (path[2:], cls) for key, (path, cls) in stack.items()
                                        if path == "m" or path.startswith("m.")}


def _open_flags(graph: fx.Graph, shell: nn.Module, log) -> None:
    """The flags of torch's own dropout and batch norm modules are read from the shell when the graph runs."""
    flags: dict[str, fx.Node] = {}
    first = next(node for node in graph.nodes if node.op != "placeholder")

    def flag(path: str, origin: fx.Node) -> fx.Node:
        target = f"{path}.training" if path else "training"
        if target not in flags:
            with graph.inserting_before(first):
                flags[target] = graph.get_attr(target)
            flags[target].meta[KEY] = Origin((flags[target].name,), "capture", path, origin.meta[KEY].location)
        return flags[target]

    for node in list(graph.nodes):
        path = _path_of_origin(node)
        if node.op != "call_function" or path not in log.flagged or path in log.modes:
            continue
        owner = shell.get_submodule(path) if path else shell
        if node.target in _FLAG_ARGUMENT:
            if isinstance(owner, nn.modules.batchnorm._BatchNorm) and owner.running_mean is None:
                continue  # without running statistics it always uses the batch's
            index = _FLAG_ARGUMENT[node.target]
            if node.args[index] is True:
                node.update_arg(index, flag(path, node))
        elif node.target is aten.add_.Tensor and isinstance(owner, nn.modules.batchnorm._BatchNorm):
            counter = node.args[0]
            while counter.target is aten.add_.Tensor:  # a module that is called again counts on what it made before
                counter = counter.args[0]
            if counter.op == "get_attr" and counter.target.endswith("num_batches_tracked") and node.args[1] == 1:
                node.update_arg(1, flag(path, node))


def _path_of_origin(node: fx.Node) -> str:
    return node.meta[KEY].module_path if KEY in node.meta else ""
