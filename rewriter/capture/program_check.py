"""Is a program (see ``dynamo_frontend.py``) the model? Results, gradients, and all that forward() leaves behind are compared.

Both run from one random state, in training mode with gradients and in evaluation mode without, at two batch sizes. Inputs and
results may be of any class: what counts is the tensors and numbers in them. Nothing changes by it.
"""
from __future__ import annotations

import copy
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import fx, nn

from ..errors import explain
from .check import PlainModelFails, difference, modes_kept, state_kept, undisturbed
from .recording import raised_at

_SMALL = 1 << 26  # bytes: larger parameters are neither copied nor are their gradients compared
_DEPTH = 6


def program_mismatch(shell: nn.Module, program, batches: list[tuple[tuple, dict]]) -> str | None:
    """A sentence that says how program and model differ on ``batches`` (args, kwargs), None where they agree.

    After it ``program.pieces`` are those of the first batch in the present mode. Raises PlainModelFails.
    """
    given = [*batches]
    if len(batches) == 1 and (more := one_more_row(batches[0])) is not None:
        given.append(more)
    present = shell.training
    with undisturbed(), modes_kept(shell):
        start = [module.training for module in shell.modules()]
        for mode in (None, not present):
            for module, was in zip(shell.modules(), start):
                module.__dict__["training"] = was if mode is None else mode
            for number, batch in enumerate(given):
                reason = _compare(shell, program, batch, required=number < len(batches), watch=number == 0 and mode is None)
                if reason is not None:
                    where = "" if mode is None else f" in {'training' if mode else 'evaluation'} mode"
                    return f"{reason}{where}, batch {number + 1}"
    return None


def _compare(shell: nn.Module, program, batch, required: bool, watch: bool) -> str | None:
    def plainly(args, kwargs):
        return getattr(shell, program.entry)(*args, **kwargs)

    try:
        wanted = _everything(shell, plainly, batch)
    except Exception as error:
        if not required:
            return None
        raise plain_fails(error) from error
    found = _everything(shell, lambda args, kwargs: program(args, kwargs), batch)
    if watch:
        program.watch()
    for what, values in wanted.items():
        if len(values) != len(found[what]) or [path for path, _ in values] != [path for path, _ in found[what]]:
            return f"{what}: another structure"
        for (path, a), (_, b) in zip(values, found[what]):
            if (reason := difference(a, b, loose=what == "gradients")) is not None:
                return f"{what}{path} {reason}"
    return None


def plain_fails(error: Exception) -> PlainModelFails:
    """The error that says so."""
    return PlainModelFails(explain("the plain model fails on the sample inputs", where=raised_at(error),
                                   why=f"{type(error).__name__}: {error}", fix="pass inputs that the plain model takes"))


def _everything(shell: nn.Module, call, batch) -> dict[str, list[tuple[str, Any]]]:
    """What a call returns and leaves behind, from the present random state, all of which is put back."""
    with undisturbed(), kept(shell), torch.set_grad_enabled(shell.training):
        before = {path: dict(module.__dict__) for path, module in shell.named_modules()}
        args, kwargs = copied(batch)
        result = call(args, kwargs)
        end = torch.get_rng_state()
        leaves = list(leaves_of(result))
        seen = {"results": [(path, _frozen(value)) for path, value in leaves], "inputs": [], "attributes": [], "random numbers": []}
        seen["inputs"] = [(path, _frozen(value)) for path, value in leaves_of((args, kwargs)) if isinstance(value, torch.Tensor)]
        for path, module in shell.named_modules():
            for key, value in module.__dict__.items():
                if not key.startswith("_tablewright") and (value is not before[path].get(key) or hasattr(value, "__array_interface__")):
                    seen["attributes"] += [(f" '{path}.{key}'{inner}", _frozen(each)) for inner, each in leaves_of(value)]
        seen["buffers"] = [(f" '{name}'", _frozen(buffer)) for name, buffer in shell.named_buffers()
                           if buffer.numel() * buffer.element_size() <= _SMALL]
        seen["random numbers"].append(("", end))
        seen["gradients"] = _gradients(shell, [value for _, value in leaves])
    return seen


def _gradients(shell: nn.Module, leaves: list) -> list[tuple[str, Any]]:
    outputs = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
    named = [(name, p) for name, p in shell.named_parameters() if p.requires_grad and p.numel() * p.element_size() <= _SMALL]
    if not torch.is_grad_enabled() or not outputs or not named:
        return []
    # weights that differ from element to element, so that a permutation shows
    total = sum((each * torch.linspace(0.5, 1.5, each.numel(), dtype=torch.float64).to(each).view(each.shape)).sum() for each in outputs)
    grads = torch.autograd.grad(total, [p for _, p in named], allow_unused=True)
    return [(f" of '{name}'", grad.to_dense() if grad is not None and grad.is_sparse else grad)
            for (name, _), grad in zip(named, grads)]


def _frozen(value):
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def leaves_of(value, path: str = "", depth: int = 0):
    """(path, leaf) of every tensor and number within ``value``, at any depth of containers and of objects with fields."""
    if value is None or isinstance(value, (torch.Tensor, bool, int, float, str)):
        yield path, value
    elif depth > _DEPTH:
        return
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from leaves_of(item, f"{path}[{key!r}]", depth + 1)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from leaves_of(item, f"{path}[{index}]", depth + 1)
    elif isinstance(fields := getattr(value, "__dict__", None), dict) and not isinstance(value, (type, nn.Module)) and not callable(value):
        for key, item in fields.items():
            yield from leaves_of(item, f"{path}.{key}", depth + 1)
    elif hasattr(value, "__array__"):
        yield path, torch.as_tensor(value).clone()


def copied(value: Any) -> Any:
    """A batch with tensors of its own, inside objects of any class too; one tensor given twice stays one."""
    try:
        return copy.deepcopy(value, {id(t): _twin(t) for _, t in leaves_of(value) if isinstance(t, torch.Tensor)})
    except Exception:  # a class that forbids copies: forward() is trusted not to change it
        return value


def _twin(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def one_more_row(batch, only: bool = False) -> Any:
    """The batch with its first row repeated (``only``: and no other row); None where dimension 0 is not plainly a batch."""
    found = [(path, t) for path, t in leaves_of(batch) if isinstance(t, torch.Tensor)]
    if not found or any(t.dim() == 0 for _, t in found) or len({t.shape[0] for _, t in found}) != 1 or not len(found[0][1]):
        return None
    for path, tensor in found:
        if "offset" in path.lower() or "length" in path.lower():
            return None
        if tensor.dim() == 1 and not tensor.dtype.is_floating_point and tensor.dtype != torch.bool and len(tensor) > 1 and (
                int(tensor[0]) == 0 and bool((tensor[1:] >= tensor[:-1]).all())):
            return None
    try:
        return copy.deepcopy(batch, {
            id(t): torch.cat([t.detach()[:1] if only else t.detach(), t.detach()[:1]]) for _, t in found})
    except Exception:
        return None


@contextmanager
def kept(shell: nn.Module):
    """Puts back buffers, attributes and the lists and dicts in them, and parameters of ordinary size."""
    with ExitStack() as stack:
        containers = [(value, type(value)(value)) for module in shell.modules() for key, value in module.__dict__.items()
                      if type(value) in (list, dict) and key != "_flat_weights"]
        parameters = [(p, p.data, p.detach().clone()) for p in shell.parameters() if p.numel() * p.element_size() <= _SMALL]
        stack.enter_context(state_kept(shell, fx.Graph()))
        try:
            yield
        finally:
            for value, content in containers:
                value.clear()
                value.extend(content) if isinstance(value, list) else value.update(content)
            for parameter, data, content in parameters:
                if parameter.layout != torch.strided or data.layout != torch.strided:
                    parameter.data = data  # a sparse matrix is nearly always made anew, hardly ever written into
                    continue
                if parameter.data_ptr() != data.data_ptr():
                    parameter.data = data
                if not torch.equal(parameter.detach(), content):
                    parameter.detach().copy_(content)
