"""Does a rewrite pay? Time the plain nodes against their replacement on the sample's shapes, forward and backward.

A pass that may lose on some shapes derives from :class:`Measured` and asks :meth:`Measured.no_gain` before it edits. The nodes
are copied into a graph of their own; the rewrite is made on a second copy; both run on random inputs of the shapes, dtypes and
devices that the sample batch had, with the model's own parameters (which are only read). What is not faster is skipped, and
the reason says by how much. Equal layers are timed once.
"""
from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from ..kernels.library import DIRECT
from .graph import Editor, ancestors, stored_tensor
from .origin import KEY, Origin
from .records import Skip, skip
from .rule import Context, Pass

# Below this gain a rewrite is not made: the difference is within what a timing on a busy machine can tell.
LEAST_GAIN = 1.05
# A batch that was made for capture may be tiny: a training batch of this size is what counts.
ROWS = 2048
_ROUNDS, _SECONDS = 25, 0.25  # the most rounds, and the time after which no further round starts

Rewrite = Callable[[Editor, dict[Node, Node]], Any]


@dataclass(frozen=True)
class Timing:
    """Seconds of one forward and backward (forward alone where nothing needs a gradient): the least of several rounds, which
    other work on the machine disturbs least."""

    plain: float
    rewritten: float
    rows: int = 0

    @property
    def gain(self) -> float:
        """How many times as fast the rewritten nodes are."""
        return self.plain / self.rewritten


@dataclass
class Measured(Pass):
    """A pass whose rewrites are made only where they are measured faster; ``measure=False`` makes them regardless."""

    measure: bool = True

    def no_gain(self, context: Context, nodes: Sequence[Node], rewrite: Rewrite, least: float = LEAST_GAIN) -> Skip | None:
        """``None`` where replacing ``nodes`` pays (or need not be measured); else a :class:`Skip` that says why not.

        ``rewrite(editor, copy_of)`` edits a copy of the subgraph just as the pass would edit the graph itself: ``copy_of`` maps
        each of ``nodes`` and everything they read to its copy. It must not touch any other node. Measured is at the sample's
        batch, or at ``ROWS`` if that is more and what the nodes read has the batch in its first dimension. ``least``: the gain to be reached.
        """
        if not self.measure:
            return None
        timing = time_both(context, nodes, rewrite, self.name)
        if timing is None:
            return skip("whether it pays is measured on the shapes of sample_inputs, and they are not known here", at=nodes[-1])
        if timing.gain >= least:
            return None
        return skip(
            f"measured on {timing.rows} rows: the rewrite takes {timing.rewritten * 1e6:.0f} us and the plain ops "
            f"{timing.plain * 1e6:.0f} us; it must be {least}x faster to be made", at=nodes[-1],
        )  # fmt: skip


def time_both(context: Context, nodes: Sequence[Node], rewrite: Rewrite, name: str) -> Timing | None:
    """Time ``nodes`` as they are and as ``rewrite`` leaves them; ``None`` where the shape of an input is not known."""
    inputs = _boundary(nodes)
    rows = _rows(inputs)
    try:
        return _time_at(rows, context, nodes, inputs, rewrite, name)
    except Exception:
        if not rows:
            raise
        return _time_at(0, context, nodes, inputs, rewrite, name)  # the nodes hold for the sample's sizes only


def _time_at(
    rows: int, context: Context, nodes: Sequence[Node], inputs: Sequence[Node], rewrite: Rewrite, name: str
) -> Timing | None:  # fmt: skip
    plain, _ = _extract(nodes)
    with _as_in_training():
        made = [_example(n, context.root, rows) for n in inputs]
        if any(m is None for m in made):
            return None
        key = (name, _signature(plain, made, context.root), torch.get_num_threads())
        if key not in context.timings:
            other, copies = _extract(nodes)
            editor = Editor(other, name)
            rewrite(editor, copies)
            editor.remove_dead()  # as the pass does: what it replaced must not run beside the replacement
            modules = [_module(g, context.root) for g in (plain, other)]
            context.timings[key] = _time(modules, made)
    return context.timings[key]


@contextmanager
def _as_in_training() -> Iterator[None]:
    """Gradients on and the random state kept, also where the model is captured under inference mode or inside a checkpoint, whose
    hooks must not see what is saved here."""
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
    with torch.random.fork_rng(), torch.inference_mode(False), torch.enable_grad(), hooks:
        yield


def _boundary(nodes: Sequence[Node]) -> list[Node]:
    """What ``nodes`` read that is neither theirs nor stored, in the order in which :func:`_extract` takes it."""
    wanted = set(nodes)
    ordered = [n for n in nodes[0].graph.nodes if n in wanted]
    return [i for i in dict.fromkeys(i for n in ordered for i in n.all_input_nodes) if i not in wanted and i.op != "get_attr"]


def _rows(inputs: Sequence[Node]) -> int:
    """The batch to measure at: ``ROWS``, or 0 for the sample's, where that is larger or not the first size of every activation."""
    sizes = {_size(v.shape[0]) for n in inputs if isinstance(v := n.meta.get("val"), Tensor) and v.dim() and _is_active(n)}
    numbers = any(not isinstance(n.meta.get("val"), Tensor) for n in inputs)  # sizes that the graph computed fit the sample only
    return 0 if len(sizes) != 1 or None in sizes or numbers or max(sizes) >= ROWS else ROWS


def _is_active(node: Node) -> bool:
    """Does it depend on the batch?"""
    return any(n.op == "placeholder" for n in ancestors([node]))


def _size(size: Any) -> int | None:
    return size.node.hint if isinstance(size, torch.SymInt) else size


def _extract(nodes: Sequence[Node]) -> tuple[Graph, dict[Node, Node]]:
    """A graph of copies of ``nodes`` whose inputs are placeholders (stored tensors stay ``get_attr``), and the map to it."""
    wanted = set(nodes)
    graph = Graph()
    copies: dict[Node, Node] = {}
    ordered = [n for n in nodes[0].graph.nodes if n in wanted]
    needed = dict.fromkeys(i for n in ordered for i in n.all_input_nodes if i not in wanted)
    for node in needed:
        if node.op == "get_attr":
            copies[node] = graph.create_node("get_attr", node.target)
        else:
            copies[node] = graph.placeholder(node.name)
    for node in ordered:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    for node, copied in copies.items():
        copied.meta = dict(node.meta)
        copied.meta.setdefault(KEY, Origin((node.name,), ""))
    read_outside = [copies[n] for n in ordered if any(u not in wanted for u in n.users)]
    graph.output(tuple(read_outside or [copies[ordered[-1]]]))
    return graph, copies


def _example(node: Node, root: nn.Module, rows: int) -> Any:
    """A random input like the sample's: tensors by their fake value, sizes by their hint; ``None`` if neither is known."""
    value = node.meta.get("val")
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return value.node.hint
    if not isinstance(value, Tensor):
        return value if isinstance(value, (int, float, bool)) else None
    shape = [_size(s) for s in value.shape]
    if any(s is None for s in shape):
        return None
    if rows and shape and _is_active(node):
        shape[0] = rows
    if value.dtype.is_floating_point:
        made = torch.randn(shape, dtype=value.dtype, device=value.device)
        return made.requires_grad_(_needs_grad(node, root))
    if value.dtype == torch.bool:
        return torch.rand(shape, device=value.device) < 0.5
    return torch.zeros(shape, dtype=value.dtype, device=value.device)


def _needs_grad(node: Node, root: nn.Module) -> bool:
    stored = (stored_tensor(n, root) for n in ancestors([node]))
    return any(t is not None and t.requires_grad for t in stored)


def _signature(graph: Graph, inputs: list[Any], root: nn.Module) -> tuple:
    numbers = {node: i for i, node in enumerate(graph.nodes)}

    def text(value: Any) -> str:
        return str(torch.fx.node.map_arg(value, lambda n: numbers[n]))

    def facts(value: Any) -> tuple:
        if isinstance(value, Tensor):
            return tuple(value.shape), value.stride(), value.dtype, str(value.device), value.requires_grad
        return (value,)

    calls = tuple((str(n.target) if n.op == "call_function" else n.op, text(n.args), text(n.kwargs)) for n in graph.nodes)
    stored = tuple(facts(t) for n in graph.nodes if (t := stored_tensor(n, root)) is not None)
    return calls, tuple(map(facts, inputs)), stored


def _module(graph: Graph, root: nn.Module) -> GraphModule:
    """Runs ``graph`` on the model's parameters, and on copies of its buffers, which a batch norm in training changes."""
    graph.lint()
    for node in graph.nodes:
        node.target = DIRECT.get(node.target, node.target)
    module = GraphModule(root, graph)
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            part._buffers[name] = buffer.detach().clone()
    return module


def clock_of(tensors: Iterable[Tensor]) -> Callable[[], float]:
    """Seconds by which to time work on ``tensors``: those of this thread alone where nothing else works for it, so that what another
    process takes of the processor counts for neither side."""
    return time.perf_counter if torch.get_num_threads() > 1 or any(t.is_cuda for t in tensors) else time.thread_time


def _time(modules: list[GraphModule], inputs: list[Any]) -> Timing:
    runs = [_step(m, inputs) for m in modules]
    for run in runs:  # the first run of each allocates, the second finds its memory
        run()
        run()
    taken: list[list[float]] = [[] for _ in runs]
    until = time.perf_counter() + _SECONDS
    for _ in range(_ROUNDS):
        for run, times in zip(runs, taken):
            times.append(run())
        if time.perf_counter() > until:
            break
    rows = max((t.shape[0] for t in inputs if isinstance(t, Tensor) and t.dim()), default=0)
    return Timing(*map(min, taken), rows)


def _step(module: GraphModule, inputs: list[Any]) -> Callable[[], float]:
    wanted = [t for t in (*inputs, *module.parameters()) if isinstance(t, Tensor) and t.requires_grad]
    tensors = [t for t in inputs if isinstance(t, Tensor)] + list(module.parameters())
    clock = clock_of(tensors)
    synchronize = torch.cuda.synchronize if any(t.is_cuda for t in tensors) else lambda: None
    seeds: list[Tensor] = []

    def run() -> float:
        synchronize()
        start = clock()
        out = [t for t in module.forward(*inputs) if isinstance(t, Tensor) and t.requires_grad]  # calling it would print why it stops
        if out and wanted:
            if not seeds:
                seeds.extend(torch.rand_like(t) for t in out)
            torch.autograd.grad(out, wanted, seeds, allow_unused=True)
        synchronize()
        return clock() - start

    return run
