"""Is the captured graph the model? Both run on the sample inputs, in train and eval mode, at several batch sizes.

Nothing changes by it: buffers (and parameters that forward() itself changes) are put back, as are random states and modes.
"""
from __future__ import annotations

import random
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import numpy
import torch
import torch.utils._pytree as pytree
from torch import fx, nn
from torch._ops import HigherOrderOperator

from ..errors import CaptureError, explain
from .cleanup import is_mutable
from .data_guard import OtherData, is_other_data
from .fx_tracer import CONSTANT
from .recording import raised_at

_SMALL = 1 << 26  # buffers up to this many bytes are always saved; larger ones, and tables, only where the graph changes them
_LOOKUPS = {"aten::embedding", "aten::embedding_bag", "aten::index_select", "aten::index"}


class PlainModelFails(CaptureError):
    """The user's own forward() raises on the sample inputs: no other door will help."""


@contextmanager
def undisturbed():
    """Random states of torch, Python and numpy are as before, afterwards."""
    cpu, python, other = torch.get_rng_state(), random.getstate(), numpy.random.get_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        random.setstate(python)
        numpy.random.set_state(other)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


def mismatch(shell: nn.Module, captured, args: tuple, kwargs: dict, *, required: bool = True, modes: bool = True) -> str | None:
    """A sentence that says how graph and model differ on this batch, None where they agree. Raises OtherData where the graph says
    that it is not for this batch.

    ``required=False``: a batch of our own making, which the plain model may refuse; then there is nothing to compare.
    ``modes=False``: in the current mode only.
    """
    rows = next((leaf.shape[0] for leaf in pytree.tree_leaves((args, kwargs))
                 if isinstance(leaf, torch.Tensor) and leaf.dim()), None)
    both = modes and not captured.guards.modes and captured.guards.reads_training
    with undisturbed(), modes_kept(shell), torch.no_grad():
        seen = set()
        for mode in [None, True, False] if both else [None]:
            if mode is not None:
                for module in shell.modules():
                    module.__dict__["training"] = mode
            state = tuple(module.__dict__["training"] for module in shell.modules())
            if state in seen:
                continue
            seen.add(state)
            reason = _compare(shell, captured, args, kwargs, required)
            if reason is not None:
                where = "" if mode is None else f" in {'training' if mode else 'evaluation'} mode"
                return f"{reason}{where}, with {rows} rows in the batch"
    return None


def _compare(shell, captured, args, kwargs, required: bool) -> str | None:
    start = torch.get_rng_state()
    with state_kept(shell, captured.graph) as buffers:
        plain_args, plain_kwargs = _fresh((args, kwargs))
        try:
            result = getattr(shell, captured.entry)(*plain_args, **plain_kwargs)
        except Exception as error:
            if not required:
                return None
            raise PlainModelFails(explain("the plain model fails on the sample inputs", where=raised_at(error),
                                          why=f"{type(error).__name__}: {error}",
                                          fix="pass inputs that the plain model takes")) from error
        wanted, spec = pytree.tree_flatten(result)
        set_there = [pytree.tree_leaves(attrgetter(f"{each.path}.{each.name}".lstrip("."))(shell)) for each in captured.effects]
        wanted = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in [*wanted, *sum(set_there, [])]]
        wanted_buffers = {name: buffer.clone() for name, buffer in buffers().items()}
        end = torch.get_rng_state()
    torch.set_rng_state(start)
    with state_kept(shell, captured.graph) as buffers:
        mine_args, mine_kwargs = _fresh((args, kwargs))
        leaves = captured.guards.flatten(mine_args, mine_kwargs)
        try:
            found = fx.Interpreter(shell, graph=captured.graph).run(*leaves, enable_io_processing=False)
        except Exception as error:
            if is_other_data(error):
                raise OtherData(str(error).strip().splitlines()[0]) from None
            return f"the graph stops with {type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
        if spec != captured.out_spec:
            return "the result has another structure"
        if len(wanted) != len(found):
            return "an attribute that forward() sets has another structure"
        for index, (a, b) in enumerate(zip(wanted, found)):
            if (reason := difference(a, b)) is not None:
                return f"result {index} {reason}"
        for a, b in zip(pytree.tree_leaves((plain_args, plain_kwargs)), pytree.tree_leaves((mine_args, mine_kwargs))):
            if (reason := difference(a, b)) is not None:
                return f"an input that forward() changes in place {reason}"
        for name, buffer in buffers().items():
            if (reason := difference(wanted_buffers[name], buffer)) is not None:
                return f"buffer '{name}' afterwards {reason}"
        if not torch.equal(end, torch.get_rng_state()):
            return "another number of random draws is made"
    torch.set_rng_state(start)
    return None


def _fresh(batch):
    """The batch with tensors of its own, since forward() may write to them; one tensor given twice stays one."""
    copies: dict[int, torch.Tensor] = {}
    return pytree.tree_map(lambda leaf: copies.setdefault(id(leaf), leaf.detach().clone().requires_grad_(leaf.requires_grad))
                           if isinstance(leaf, torch.Tensor) else leaf, batch)


def difference(wanted, found, loose: bool = False) -> str | None:
    """What is different about ``found``, or None; ``loose``: relative to the largest value, as sums in another order are."""
    if not isinstance(wanted, torch.Tensor) or not isinstance(found, torch.Tensor):
        return None if type(wanted) is type(found) and wanted == found else f"is {found!r} instead of {wanted!r}"
    if wanted.shape != found.shape or wanted.dtype != found.dtype or wanted.device != found.device:
        return (f"has shape {tuple(found.shape)}, {found.dtype}, on {found.device} instead of {tuple(wanted.shape)}, "
                f"{wanted.dtype}, on {wanted.device}")
    if wanted.layout is not torch.strided:
        if found.layout is not wanted.layout:
            return f"is {found.layout} instead of {wanted.layout}"
        reasons = (difference(a, b, loose) for a, b in zip(_parts(wanted), _parts(found)))
        return next((reason for reason in reasons if reason is not None), None)
    if torch.equal(wanted, found):
        return None
    if not wanted.dtype.is_floating_point and not wanted.dtype.is_complex:
        return f"differs in {int((wanted != found).sum())} of {wanted.numel()} elements"
    if loose and wanted.numel() and float((wanted - found).abs().max()) <= 1e-4 * float(wanted.abs().max()):
        return None
    try:
        torch.testing.assert_close(found, wanted, equal_nan=True)
    except AssertionError:
        return f"differs by up to {float((wanted - found).abs().max()):.3g}"
    return None


def _parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The strided tensors that hold a tensor's contents: itself, or the indices and values of a sparse one."""
    if tensor.layout is torch.strided:
        return [tensor]
    if tensor.layout is torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return []


@contextmanager
def modes_kept(shell: nn.Module):
    """Puts back every training flag."""
    modes = [(module.__dict__, module.__dict__["training"]) for module in shell.modules()]
    try:
        yield
    finally:
        for namespace, mode in modes:
            namespace["training"] = mode


@contextmanager
def state_kept(shell: nn.Module, graph: fx.Graph):
    """Yields a function that gives the watched buffers; puts back buffers, parameters that the graph changes, and lists."""
    changed = _changed_state(shell, graph)
    held = [(module._buffers, name, buffer) for module in shell.modules() for name, buffer in module._buffers.items()
            if buffer is not None]
    tables = _tables_read(shell, graph)
    saved = [(namespace, name, buffer, buffer.clone()) for namespace, name, buffer in held
             if buffer.numel() * buffer.element_size() <= _SMALL and id(buffer) not in tables]
    tensors = {id(buffer) for _, _, buffer, _ in saved}
    others = []
    for path in changed:
        owner, _, name = path.rpartition(".")
        tensor = getattr(shell.get_submodule(owner), name)
        if isinstance(tensor, torch.Tensor) and id(tensor) not in tensors:
            others.append((tensor, tensor.clone()))
    attributes = [(module.__dict__, dict(module.__dict__)) for module in shell.modules()]
    arrays = [(value, value.copy()) for _, before in attributes for value in before.values() if type(value) is numpy.ndarray]
    paths = {id(module._buffers): path for path, module in shell.named_modules()}

    def buffers():
        return {f"{paths[id(namespace)]}.{name}".lstrip("."): namespace[name] for namespace, name, _, _ in saved}

    # what autograd saved in earlier forwards is what it will be again
    counted = [t for t in (*(buffer for _, _, buffer, _ in saved), *(t for t, _ in others)) if t.layout is torch.strided and not t.is_inference()]
    with torch.autograd.grad_mode._unsafe_preserve_version_counter(tuple(counted)):
        try:
            yield buffers
        finally:
            for namespace, before in attributes:
                for name in set(namespace) - set(before):
                    if not name.startswith(CONSTANT):  # what a capture keeps there stays
                        del namespace[name]
                namespace.update(before)
            for array, content in arrays:
                array[...] = content
            for namespace, name, buffer, copy in saved:
                namespace[name] = buffer
                for mine, before in zip(_parts(buffer), _parts(copy)):
                    if not torch.equal(mine, before):
                        mine.copy_(before)
            for tensor, copy in others:
                tensor.copy_(copy)


def _tables_read(shell: nn.Module, graph: fx.Graph) -> set[int]:
    """Buffers that are nothing but lookup tables: frozen embeddings, of which no copy is made."""
    reads: dict[int, bool] = {}
    for node in graph.nodes:
        if node.op == "get_attr" and isinstance(tensor := attrgetter(node.target)(shell), torch.Tensor):
            only = bool(node.users) and all(getattr(getattr(user.target, "_schema", None), "name", "") in _LOOKUPS for user in node.users)
            reads[id(tensor)] = reads.get(id(tensor), True) and only
    return {key for key, only in reads.items() if only}


def _changed_state(shell: nn.Module, graph: fx.Graph) -> set[str]:
    """Parameters and buffers that the graph changes in place."""
    return {str(node.target) for node in _changed(shell, graph) if node.op == "get_attr"}


def _changed(shell: nn.Module, graph: fx.Graph) -> set[fx.Node]:
    """What the graph did not make and changes in place, also in the graphs within it, as export makes of ``torch.no_grad()``."""
    found = set()
    for node in graph.nodes:
        written: Any = node.args[:1] if is_mutable(node) else ()
        if isinstance(node.target, HigherOrderOperator):
            written = node.all_input_nodes  # of a form unknown here: whatever it reads
            for at, arg in enumerate(node.args):
                inner = _module_at(shell, arg)
                if inner is not None:
                    changed = _changed(inner, inner.graph)
                    given = (n for n in inner.graph.nodes if n.op == "placeholder")
                    written = [outer for outer, n in zip(node.args[at + 1 :], given) if n in changed]
                    break
        for source in written:
            while isinstance(source, fx.Node) and source.op == "call_function" and source.args:
                source = source.args[0]
            if isinstance(source, fx.Node):
                found.add(source)
    return found


def _module_at(shell: nn.Module, node: Any) -> fx.GraphModule | None:
    """The graph within a graph that ``node`` reads from ``shell``."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    *path, name = str(node.target).split(".")
    module = getattr(shell.get_submodule(".".join(path)), name, None)
    return module if isinstance(module, fx.GraphModule) else None


def derived_batches(inputs, args: tuple, kwargs: dict) -> list[tuple[int, tuple, dict]]:
    """[(rows, args, kwargs)] at other batch sizes: one row more, one, none. Empty where dimension 0 is not plainly a batch.

    Every tensor must be dense and have the same size in dimension 0, and none may look like offsets or lengths.
    """
    leaves, spec = pytree.tree_flatten((args, kwargs))
    tensors = [(i, leaf) for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    if not tensors or any(leaf.dim() == 0 or leaf.layout != torch.strided for _, leaf in tensors):
        return []
    rows = {leaf.shape[0] for _, leaf in tensors}
    if len(rows) != 1 or rows == {0}:
        return []
    for i, leaf in tensors:
        name = inputs.names[i].lower()
        if "offset" in name or "length" in name:
            return []
        if leaf.dim() == 1 and not leaf.dtype.is_floating_point and leaf.dtype != torch.bool and len(leaf) > 1 and (
                int(leaf[0]) == 0 and bool((leaf[1:] >= leaf[:-1]).all())):
            return []
    count = rows.pop()
    made = []
    changes = {count + 1: lambda t: torch.cat([t, t[:1]]), 1: lambda t: t[:1].clone(), 0: lambda t: t[:0].clone()}
    for wanted, change in changes.items():
        if wanted != count:
            new = list(leaves)
            for i, leaf in tensors:
                new[i] = change(leaf.detach())
            made.append((wanted, *pytree.tree_unflatten(new, spec)))
    return made
