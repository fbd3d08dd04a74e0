"""Is the rewritten graph still the plain model? Structure after every pass; numbers on request."""
from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.fx import Graph, Interpreter, Node

from ..passes.graph import ancestors, fetch, stored_tensor
from ..passes.origin import KEY
from .capture import attach
from .capture.data_followed import SIZED_BY_DATA
from .capture.data_guard import asserted
from .capture.export_frontend import silent
from .errors import VerifyError


def copy_graph(graph: Graph) -> Graph:
    """An independent copy with the same node names and meta (``Graph.graph_copy`` loses the output's)."""
    result = Graph()
    nodes: dict[Node, Node] = {}
    for node in graph.nodes:
        nodes[node] = result.node_copy(node, nodes.__getitem__)
    return result


_UNKNOWN = object()


class _ShapePropagation(Interpreter):
    """Run a graph on fake tensors and leave each value in ``node.meta["val"]``. An op of the graph before, whose values are
    ``known``, may be one that does not run on fake tensors (``masked_select``, whose size depends on data): it keeps its
    value there, and where it has none, nothing is known of it and of what follows from it."""

    def __init__(self, module, mode: FakeTensorMode, known: Mapping[str, Any]) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.mode = mode
        self.known = known

    def get_attr(self, target, args, kwargs):
        value = fetch(self.module._shell, target)
        if not isinstance(value, Tensor):
            return value
        with unset_fake_temporarily():
            plain = value.detach()
        return self.mode.from_tensor(plain, static_shapes=True)

    def run_node(self, n: Node):
        if n.op != "output" and (SIZED_BY_DATA in n.meta or any(self.env[i] is _UNKNOWN for i in n.all_input_nodes)):
            value = self.known.get(n.name, _UNKNOWN)
        else:
            try:
                value = super().run_node(n)
            except Exception:
                if n.name not in self.known:
                    raise
                value = self.known[n.name]
        n.meta.pop("val", None)
        if value is not _UNKNOWN:
            n.meta["val"] = value
        return value


def propagate(graph: Graph, shell: nn.Module, before: Graph | None = None) -> bool:
    """Fill ``meta["val"]`` of every node from its inputs' values. False where capture knows no shapes (no sample inputs).
    ``before``: the graph that this one was made from, whose values stand in where an op cannot be run on fake tensors."""
    inputs = [node.meta.get("val") for node in graph.nodes if node.op == "placeholder"]
    mode = next((v.fake_mode for v in inputs if isinstance(v, FakeTensor)), None)
    if mode is None or any(v is None for v in inputs):
        return False
    known = {n.name: n.meta.get("val", _UNKNOWN) for n in before.nodes} if before is not None else {}
    with mode, torch.no_grad(), silent():
        _ShapePropagation(attach(shell, graph), mode, known).run(*inputs)
    return True


def _moot(assertion: Node, left: set[str]) -> bool:
    """Is it about the size of a tensor that the graph no longer makes? Then nothing in it depends on that size: whatever would is made from
    the tensor or from its size."""
    stack, seen, gone = [*assertion.all_input_nodes], set(), False
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.target is torch.ops.aten.sym_size.int:
            gone = gone or node.all_input_nodes[0].name not in left
        elif node.op == "call_function" and not isinstance(node.target, torch._ops.OpOverload):
            stack.extend(node.all_input_nodes)  # arithmetic on sizes
        else:
            return False  # about a value
    return gone


def check_structure(before: Graph, after: Graph, shell: nn.Module, elsewhere: Container[str] = ()) -> None:
    """Lint, origins, inputs, outputs, stored tensors (``elsewhere``: those that another rank reads), shapes and dtypes. Raises :class:`VerifyError` naming the first fault."""
    try:
        after.lint()
    except RuntimeError as error:
        raise VerifyError(f"the graph is not well formed: {error}") from error
    for node in after.nodes:
        if KEY not in node.meta and node.op != "output":
            raise VerifyError(f"node '{node.name}' has no origin: make nodes through the pass's Editor only")
    was, now = ([n.target for n in g.nodes if n.op == "placeholder"] for g in (before, after))
    if was != now:
        raise VerifyError(f"the inputs changed from {was} to {now}")
    lost = [n for n in _names(shell, _stored(before, shell) - _stored(after, shell)) if n not in elsewhere]
    if lost:
        raise VerifyError(f"the graph no longer reads {', '.join(sorted(lost))}")
    left = {n.name for n in after.nodes}
    if any(n.name not in left and not _moot(n, left) for n in asserted(before)):
        raise VerifyError("an assertion about data is gone, without which the graph would run on data that it is not for")
    old_values = _outputs(before)
    try:
        known = propagate(after, shell, before)
    except Exception as error:  # whatever an op's fake implementation says of a wrong graph
        raise VerifyError(f"the graph does not run on its own shapes: {type(error).__name__}: {error}") from error
    if known:
        for i, (old, new) in enumerate(zip(old_values, _outputs(after), strict=True)):
            if isinstance(old, Tensor) and isinstance(new, Tensor) and (old.dtype != new.dtype or not _same_shape(old, new)):
                raise VerifyError(
                    f"output {i} was {tuple(old.shape)} {old.dtype} and is now {tuple(new.shape)} {new.dtype}"
                )  # fmt: skip


def _same_shape(a: Tensor, b: Tensor) -> bool:
    sizes = zip(a.shape, b.shape)
    return a.dim() == b.dim() and all(str(x) == str(y) for x, y in sizes if isinstance(x, int) and isinstance(y, int))


def _stored(graph: Graph, shell: nn.Module) -> set[int]:
    """The tensors on which the outputs, or what the graph writes, depend."""
    ends = [n for n in graph.nodes if n.op == "output" or getattr(getattr(n.target, "_schema", None), "is_mutable", False)]
    tensors = (stored_tensor(n, shell) for n in ancestors(ends))
    return {id(t) for t in tensors if t is not None}


def _names(shell: nn.Module, ids: set[int]) -> list[str]:
    return [n for n, t in [*shell.named_parameters(), *shell.named_buffers()] if id(t) in ids]


def _outputs(graph: Graph) -> list[Any]:
    (values,) = next(n for n in reversed(graph.nodes) if n.op == "output").args
    return [v.meta.get("val") if isinstance(v, Node) else v for v in values]
