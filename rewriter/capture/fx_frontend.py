"""Door 1 from outside: ``trace`` sets up the stand-ins, runs ``forward`` once under the tracer, and tidies the graph."""
from __future__ import annotations

import dataclasses
from contextlib import contextmanager

import torch
import torch.utils._pytree as pytree
from torch import fx, nn
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode

from ...passes.origin import KEY, Origin
from ..errors import CaptureError, explain
from .cleanup import make_functional, remove_dead
from .fx_tracer import Tracer
from .inputs import Inputs, signature_of
from .recording import Effect, raised_at, recording
from .value import GiveUp, NumberValue


class _Mode(TorchFunctionMode):
    def __init__(self, tracer: Tracer):
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func, types, args=(), kwargs=None):
        tracer = self.tracer
        if tracer.reason is not None:
            raise GiveUp(tracer.reason)
        try:
            return tracer.torch_call(func, args, kwargs or {})
        except GiveUp as stop:
            tracer.give_up(stop)
            raise


@contextmanager
def _makers():
    """torch.zeros(n, 3) with a traced n fails in torch's argument parser before any mode sees it: pack the sizes first."""
    names = ("zeros", "ones", "empty", "rand", "randn")
    plain = {name: getattr(torch, name) for name in names}

    def packing(function):
        def make(*size, **kwargs):
            if any(type(each) is NumberValue for each in size):
                size = (tuple(size),)
            return function(*size, **kwargs)

        return make

    try:
        for name in names:
            setattr(torch, name, packing(plain[name]))
        yield
    finally:
        for name in names:
            setattr(torch, name, plain[name])


def abstract_inputs(shell: nn.Module, entry: str) -> Inputs:
    """Inputs for a trace without examples: one tensor for each required argument, defaults left to forward() itself."""
    signature = signature_of(shell, entry)
    if signature is None:
        raise CaptureError(explain("forward() has no readable signature", fix="pass sample_inputs="))
    required = []
    for name, parameter in list(signature.parameters.items())[entry not in shell.__dict__:]:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if parameter.default is parameter.empty:
            if parameter.kind is parameter.KEYWORD_ONLY:
                raise CaptureError(explain(f"the keyword argument '{name}' is required", why="nothing says what it holds",
                                           fix="pass sample_inputs="))
            required.append(torch.empty(0, device="meta"))
    return Inputs(tuple(required), {}, _without_self(signature, shell, entry), abstract=True)


def sample_inputs(shell: nn.Module, args: tuple, kwargs: dict, entry: str) -> tuple[Inputs, list]:
    """The structure of a call, and its leaves."""
    inputs = Inputs(args, kwargs, _without_self(signature_of(shell, entry), shell, entry))
    return inputs, inputs.examples


def _without_self(signature, shell, entry):
    if signature is None or entry in shell.__dict__:
        return signature
    return signature.replace(parameters=list(signature.parameters.values())[1:])


@contextmanager
def _undone(tracer: Tracer):
    """An abandoned trace leaves nothing in the shell."""
    before = set(tracer.shell.__dict__)
    try:
        yield
    except CaptureError:
        for name in set(tracer.shell.__dict__) - before:
            del tracer.shell.__dict__[name]  # constants of the trace
        tracer.restore_containers()
        raise


def trace(
    shell: nn.Module, args: tuple | None, kwargs: dict | None, entry: str = "forward"
) -> tuple[fx.Graph, Inputs, object, list[Effect], Tracer]:
    """(graph, inputs, out_spec, effects, log) of ``shell.forward(*args, **kwargs)`` (or of another method); with ``args=None``, without examples.

    Raises CaptureError with the reason and the user's line for whatever is not on the documented table.
    """
    if args is None:
        inputs, fake_mode = abstract_inputs(shell, entry), None
    else:
        inputs, _ = sample_inputs(shell, args, kwargs or {}, entry)
        fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
    with torch.enable_grad():
        tracer = Tracer(shell, fake_mode)
    with _undone(tracer), torch.enable_grad(), recording(tracer), _makers():
        leaves = []
        for position, leaf in enumerate(inputs.examples):
            if position not in inputs.placeholders:
                leaves.append(leaf)
                continue
            node = tracer.graph.create_node("placeholder", inputs.names[position], (), {}, inputs.names[position])
            tracer.stamp(node)
            leaves.append(tracer.wrap_tensor(node) if isinstance(leaf, torch.Tensor) else leaf)
            if fake_mode is not None:
                node.meta["val"] = fake_mode.from_tensor(leaf.detach(), static_shapes=True) if isinstance(
                    leaf, torch.Tensor) else leaf
                node.meta["rank_is_sure"] = True
        inputs.examples = None
        result, failure = None, None
        try:
            with _Mode(tracer):
                call_args, call_kwargs = pytree.tree_unflatten(leaves, inputs.spec)  # may run code of the user's containers
                result = getattr(shell, entry)(*call_args, **call_kwargs)
        except GiveUp as stop:
            tracer.give_up(stop)
        except CaptureError:
            raise
        except Exception as error:  # a stand-in met code that needs the real thing, or the model itself is wrong
            failure = error
        if tracer.reason is not None:
            raise CaptureError(f"{tracer.reason}{f' at {tracer.where}' if tracer.where else ''}")
        if failure is not None:
            where = raised_at(failure)
            raise CaptureError(f"{type(failure).__name__}: {failure}{f' at {where}' if where else ''}") from failure
        tracer.check_containers()
        register_outputs(result)
        results, out_spec = pytree.tree_flatten(result)
        effects, extra = tracer.effects()
        try:
            nodes = tuple(tracer.result(leaf) for leaf in [*results, *extra])
        except GiveUp as stop:
            raise CaptureError(f"the result of forward() cannot be captured: {stop.reason}") from stop
        output = tracer.graph.output(nodes)
        _made_anew(tracer)
        make_functional(tracer.graph)
        remove_dead(tracer.graph)
        output.meta[KEY] = Origin((output.name,), "capture")
    for node, rank in tracer.ranks.items():
        inputs.ranks[inputs.names.index(node.target)] = rank
    tracer.written.clear()
    return tracer.graph, inputs, out_spec, effects, tracer


def _made_anew(tracer: Tracer) -> None:
    """Constants that the graph changes in place are copied first: the model makes them anew at each call."""
    for node in dict.fromkeys(tracer.remade):
        with tracer.graph.inserting_after(node):
            fresh = tracer.graph.call_function(torch.ops.aten.clone.default, (node,))
        fresh.meta = dict(node.meta)
        node.replace_all_uses_with(fresh, delete_user_cb=lambda user, fresh=fresh: user is not fresh)


def register_outputs(result) -> None:
    for leaf in pytree.tree_leaves(result):
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            torch.export.register_dataclass(type(leaf))
