"""Compare numbers: outputs, gradients and one optimizer step of the rewritten model against the plain one.

Everything runs on copies of the weights, under one random state, so nothing of the model changes. Gradients are those of a
fixed random combination of all outputs. A difference is judged relative to the largest value of the tensor it is in.
"""
from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph
from torch.utils import _pytree as pytree

from ..kernels.embedding import reference
from ..kernels.embedding.kept_rules import KeptRules
from ..kernels.embedding.op import OP
from ..kernels.embedding.optimizers import RowUpdates, _touched_rows
from ..kernels.embedding.row_wise import row_wise
from ..kernels.embedding.spec import decode
from ..passes.graph import stored_tensor
from ..passes.mixed_precision import lowered
from .capture import Captured, attach, deep_copy
from .edge_batches import copies, edge_batches
from .errors import VerifyError
from .verify import copy_graph

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
# Of a model whose plan asks for low precision: several layers' rounding, and activations that it moves across zero.
LOW_TOLERANCE: dict[torch.dtype | None, float] = {torch.float16: 2e-2, torch.bfloat16: 1.5e-1}


@dataclass(frozen=True)
class Difference:
    """``what``: "output 0", "gradient of x", "x after a step". ``error``: largest difference over the largest value."""

    what: str
    error: float
    tolerance: float

    @property
    def ok(self) -> bool:
        return self.error <= self.tolerance  # a NaN is not


@dataclass(frozen=True)
class Equivalence:
    """All comparisons of one check; true if all agree."""

    differences: tuple[Difference, ...]

    def __bool__(self) -> bool:
        return all(d.ok for d in self.differences)

    def raise_if_failed(self) -> None:
        """Raises :class:`VerifyError` with the comparisons that failed."""
        if not self:
            raise VerifyError(str(self))

    def __str__(self) -> str:
        bad = [d for d in self.differences if not d.ok]
        worst = max((d for d in self.differences if d.ok), key=lambda d: d.error / (d.tolerance or 1.0), default=None)
        lines = [f"{len(self.differences) - len(bad)} of {len(self.differences)} comparisons with the plain model agree"]
        lines += [f"  DIFFERENT: {d.what}: {d.error:.3g} relative to its largest value (allowed {d.tolerance:g})" for d in bad[:20]]
        if worst is not None:
            lines.append(f"  worst that agrees: {worst.what}: {worst.error:.3g} (allowed {worst.tolerance:g})")
        return "\n".join(lines)


def difference(what: str, expected: Tensor | None, actual: Tensor | None, usual: Tensor | None = None) -> Difference:
    """How far ``actual`` is from ``expected``; a missing gradient counts as zeros. ``usual``: the same thing on an ordinary
    batch; where that is larger, the difference is relative to it (nothing but rounding may be left on a degenerate batch)."""
    if expected is None and actual is None:
        return Difference(what, 0.0, 0.0)
    known = expected if expected is not None else actual
    assert known is not None
    tolerance = TOLERANCE.get(known.dtype, 0.0)
    a, b = (torch.zeros_like(known, layout=torch.strided) if t is None else _dense(t) for t in (expected, actual))
    if a.shape != b.shape or a.dtype != b.dtype:
        return Difference(f"{what} (shape {tuple(a.shape)} {a.dtype} against {tuple(b.shape)} {b.dtype})", float("inf"), tolerance)
    if not a.numel():
        return Difference(what, 0.0, tolerance)
    a, b = a.double(), b.double()
    same = (a == b) | (a.isnan() & b.isnan())
    if same.all():
        return Difference(what, 0.0, tolerance)
    error = torch.where(same, 0.0, (a - b).abs()).max()
    finite = [t[t.isfinite()] for t in (a, a if usual is None else _dense(usual).double())]
    largest = max((float(t.abs().max()) for t in finite if t.numel()), default=0.0)
    return Difference(what, float(error) / max(largest, 1e-6), tolerance)


def _dense(tensor: Tensor) -> Tensor:
    return (tensor.to_dense() if tensor.layout != torch.strided else tensor).detach()


def run(call: Callable[[], Any], module: nn.Module) -> tuple[list[Any], dict[str, Tensor | None]]:
    """The flat outputs of ``call`` and the gradients of ``module``'s parameters, from a fixed random state."""
    for param in module.parameters():
        param.grad = None
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(0)
        outputs = pytree.tree_leaves(call())
        torch.manual_seed(1)
        total = sum((o * torch.randn_like(o, memory_format=torch.contiguous_format)).sum() for o in outputs if isinstance(o, Tensor) and o.requires_grad)
        if isinstance(total, Tensor):
            total.backward()
    return outputs, {name: p.grad for name, p in module.named_parameters()}


def compare(expected: tuple, actual: tuple, where: str = "", usual: tuple | None = None) -> list[Difference]:
    """Outputs and gradients of two :func:`run` calls; ``where`` says on which batch, ``usual`` is one on an ordinary batch."""
    outputs, grads = usual or expected
    found = []
    for i, (a, b) in enumerate(zip(expected[0], actual[0], strict=True)):
        if isinstance(a, Tensor):
            found.append(difference(f"output {i}{where}", a, b, outputs[i]))
    return found + [difference(f"gradient of {n}{where}", grad, actual[1][n], grads[n]) for n, grad in expected[1].items()]


def _compare_all(expected: Side, actual: Side, args: tuple, kwargs: dict, edges: list[tuple[str, tuple, dict]]) -> list[Difference]:
    """Outputs and gradients on edge batches and, last (its gradients stay), on the batch itself."""
    usual = expected(args, kwargs)
    found: list[Difference] = []
    for name, edge_args, edge_kwargs in edges:
        where = f" with {name}"
        wanted = expected(edge_args, edge_kwargs)
        try:
            found += compare(wanted, actual(edge_args, edge_kwargs), where, usual)
        except Exception as error:
            found.append(Difference(f"the rewritten graph stops ({type(error).__name__}: {error}){where}", float("inf"), 0.0))
    return compare(expected(args, kwargs), actual(args, kwargs)) + found


def _edges(plain: Side, captured: Captured, args: tuple, kwargs: dict) -> list[tuple[str, tuple, dict]]:
    """The edge batches that the plain model takes (batch norm, say, wants more than one row to train)."""
    taken = []
    for batch in edge_batches(captured.graph, plain.module, captured.guards, args, kwargs):
        try:
            plain(*batch[1:])
        except Exception:  # whatever the user's model says of a batch it was not made for
            continue
        taken.append(batch)
    return taken


class Side:
    """One of two modules that are compared: a call runs it on copies of a batch (:func:`run`) and puts its buffers back.

    ``call``: what to run; ``module``: a copy of the model, which holds the parameters and buffers that ``call`` uses."""

    def __init__(self, module: nn.Module, call: Callable[[tuple, dict], Any]) -> None:
        self.module, self.call = module, call

    def __call__(self, args: tuple, kwargs: dict) -> tuple:
        kept = [(m._buffers, name, b, b.clone()) for m in self.module.modules() for name, b in m._buffers.items() if b is not None]
        args, kwargs = copies((args, kwargs))
        try:
            outputs, grads = run(lambda: self.call(args, kwargs), self.module)
            return [o.detach().clone() if isinstance(o, Tensor) else o for o in outputs], grads
        finally:
            with torch.no_grad():
                for namespace, name, buffer, value in kept:
                    namespace[name] = buffer
                    buffer.copy_(value)


def without_in_backward(graph: Graph) -> Graph:
    """A copy of ``graph`` whose in-backward tables give sparse gradients instead."""
    result = copy_graph(graph)
    for node in result.nodes:
        if node.target is OP:
            spec = decode(node.args[5])  # type: ignore[arg-type]
            tables = tuple(replace(t, grad="sparse") if t.grad == "in_backward" else t for t in spec.tables)
            node.args = (*node.args[:5], replace(spec, tables=tables).encode())
    return result


def _freeze(module: nn.Module, graph: Graph) -> None:
    """Freeze in ``module`` (a copy) the tables that the plan froze in ``graph``: both sides must leave them alone."""
    specs = [decode(node.args[5]) for node in graph.nodes if node.target is OP]  # type: ignore[arg-type]
    frozen = {table.name for spec in specs for table in spec.tables if table.grad == "none"}
    for name, param in module.named_parameters(remove_duplicate=False):
        if name in frozen:
            param.requires_grad_(False)


def numeric_check(shell: nn.Module, captured: Captured, args: tuple, kwargs: dict) -> Callable[[Graph, Graph], None]:
    """A check for the pipeline: two graphs must agree in outputs and gradients on a batch and on the edge batches made of it."""
    edges = _edges(_plain(deep_copy(shell)), captured, args, kwargs)

    def check(before: Graph, after: Graph) -> None:
        twins = [deep_copy(shell) for _ in range(2)]
        for twin in twins:
            _freeze(twin, after)
        expected, actual = (_side(twin, graph, captured) for twin, graph in zip(twins, (before, after)))
        Equivalence(_allowing(_tolerance(after, shell), _compare_all(expected, actual, args, kwargs, edges))).raise_if_failed()

    return check


def _tolerance(graph: Graph, shell: nn.Module) -> float:
    """What the rounding of a plan allows: of low precision, and of tables that are stored low, where plain PyTorch rounds sums of rows
    and of gradients at each addition."""
    wide = [n.args[0][0] for n in graph.nodes if n.target is OP and decode(n.args[5]).wide]  # type: ignore[arg-type, index]
    low = {lowered(graph), *(stored_tensor(table, shell).dtype for table in wide)}  # type: ignore[union-attr]
    return max(LOW_TOLERANCE.get(dtype, 0.0) for dtype in low)


def _allowing(least: float, found: list[Difference]) -> tuple[Difference, ...]:
    """The comparisons with ``least`` as their tolerance, where they have a smaller one."""
    return tuple(replace(d, tolerance=max(d.tolerance, least)) if d.tolerance else d for d in found)


def _plain(twin: nn.Module) -> Side:
    return Side(twin, lambda args, kwargs: twin(*args, **kwargs))


def _side(twin: nn.Module, graph: Graph, captured: Captured) -> Side:
    module = attach(twin, without_in_backward(graph))
    return Side(twin, lambda args, kwargs: captured.result(twin, module(*captured.guards.flatten(args, kwargs))))


def check_model(model, args: tuple, kwargs: dict) -> Equivalence:
    """See :meth:`OptimizedModel.check`."""
    from .programs import on_copy

    variant = model._variant_for(args, kwargs)
    plain, twin = deep_copy(model._shell), deep_copy(model._shell)
    for module in (plain, twin):
        _freeze(module, variant.graph)
    expected, actual = _plain(plain), _side(twin, variant.graph, variant.captured)
    edges = [] if variant.captured.program is not None else _edges(expected, variant.captured, args, kwargs)
    if variant.captured.program is not None:
        program = on_copy(model._compiler.for_copy(twin), variant.captured.program, trained_inside=False)
        actual = Side(twin, program)
    found = _compare_all(expected, actual, args, kwargs, edges)
    compiler = model._compiler
    stepped = False
    if model.embedding_optimizer is not None:
        _reference_step(model.embedding_optimizer, plain)
        _twin_of(model.embedding_optimizer, model, twin).step()
        stepped = True
    optimizer = compiler.user_optimizer() if compiler.user_optimizer is not None else None
    if optimizer is not None:
        base = getattr(type(optimizer), "_base", type(optimizer))
        _rebuilt(base, optimizer, model, plain).step()
        other = _rebuilt(base, optimizer, model, twin)
        tables = dict(twin.named_parameters(remove_duplicate=False))
        sparse = [tables[n] for n in compiler.row_wise_tables]
        (row_wise(other, sparse) if sparse else other).step()
        stepped = True
    if stepped:
        after = dict(twin.named_parameters())
        found += [difference(f"{name} after a step", p, after[name]) for name, p in plain.named_parameters()]
    return Equivalence(_allowing(_tolerance(variant.graph, model._shell), found))


def _places(model: nn.Module, other: nn.Module) -> dict[int, Tensor]:
    """For each parameter of ``model``, the one at the same place in ``other``."""
    twins = dict(other.named_parameters(remove_duplicate=False))
    return {id(p): twins[name] for name, p in model.named_parameters(remove_duplicate=False)}


def _rebuilt(base: type, optimizer, model: nn.Module, other: nn.Module):
    places = _places(model, other)
    groups = [{**g, "params": [places[id(p)] for p in g["params"] if id(p) in places]} for g in optimizer.param_groups]
    for group in groups:
        group.pop("param_names", None)
    kept = [g for g in groups if g["params"]]
    result = base(kept)
    for group in optimizer.param_groups:
        for param in group["params"]:
            if id(param) in places and param in optimizer.state:
                result.state[places[id(param)]] = copy.deepcopy(optimizer.state[param])
    return result


def _twin_of(optimizer: RowUpdates, model: nn.Module, other: nn.Module) -> RowUpdates:
    places = _places(model, other)
    groups = []
    for group in optimizer.param_groups:
        named = [(n, places[id(p)]) for n, p in zip(group["param_names"], group["params"])]
        groups.append({**{k: v for k, v in group.items() if k != "param_names"}, "params": named, "in_backward": False})
    result = RowUpdates(groups)
    for group in optimizer.param_groups:
        for param in group["params"]:
            if param in optimizer.state:
                result.state[places[id(param)]] = copy.deepcopy(optimizer.state[param])
    return result


def _reference_step(optimizer: RowUpdates, plain: nn.Module) -> None:
    """The plan's step on the plain model's own gradients, by the reference implementation."""
    named = dict(plain.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for group in optimizer.param_groups:
            for name, param in zip(group["param_names"], group["params"]):
                table, grad = named[name], named[name].grad
                if grad is None:
                    continue
                touched = grad.coalesce() if grad.is_sparse else _touched_rows(grad)
                lone = RowUpdates([{**{k: v for k, v in group.items() if k != "param_names"}, "params": [(name, table)]}])
                if param in optimizer.state:
                    lone.state[table] = copy.deepcopy(optimizer.state[param])
                (update,) = KeptRules([table], lone.param_groups).next([0], lone.state, lone._start)
                rows, values = touched._indices().squeeze(0), touched._values()
                reference.update_from_sparse([table.detach()], [rows], [values], [update])
