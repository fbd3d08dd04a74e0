"""``torch.ops.tablewright.embedding_bags``: many lookups in one launch over the model's own parameter tensors.

::

    embedding_bags(tables, indices, offsets, sample_weights, extras, spec, ticket=None, owner=-1) -> list[Tensor]

``spec`` is an encoded :class:`~.spec.GroupSpec`; ``tables`` has one tensor ``[rows, dim]`` for each of its tables; ``indices``,
``offsets`` and ``sample_weights`` have one entry for each lookup (``None`` where it has none); ``extras`` one dense tensor for
each extra. The result has one tensor ``[*leading, width]`` for each slot, in the tables' dtype (promoted with its extras').

The backward gives each table what its ``grad`` says: a coalesced sparse gradient ``[rows, dim]``, a dense one, nothing, or an
update in the backward by optimizer ``owner`` (see ``in_backward.py``). ``sample_weights`` and ``extras`` are differentiable;
second derivatives are not provided and raise.

Raises ``IndexError`` for an id outside its table, ``ValueError`` for offsets that decrease or do not fit, ``TypeError`` for ids
that are not integers; each names the lookup, the table and the first bad position, before anything is written.
"""
from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..library import DIRECT, LIBRARY, tracing
from . import cpu, in_backward
from .spec import GroupSpec, decode

LIBRARY.define(
    "embedding_bags(Tensor[] tables, Tensor[] indices, Tensor?[] offsets, Tensor?[] sample_weights, Tensor[] extras,"
    " str spec, Tensor? ticket=None, int owner=-1) -> Tensor[]"
)
LIBRARY.define(
    "embedding_bags_backward(Tensor?[] slot_grads, Tensor[] tables, Tensor[] indices, Tensor?[] offsets,"
    " Tensor?[] sample_weights, str spec, bool[] wanted_tables, bool[] wanted_weights) -> Tensor[]"
)
LIBRARY.define(
    "embedding_bags_defer_update(Tensor?[] slot_grads, Tensor[] indices, Tensor?[] offsets, Tensor?[] sample_weights,"
    " str spec, int owner, Tensor(a!) ticket) -> ()"
)


def implementation(device: torch.device):
    """The module whose functions run on ``device``."""
    if device.type == "cpu":
        return cpu
    from . import gpu  # Triton is imported only where a GPU asks for it

    return gpu


# --- forward -----------------------------------------------------------------------------------------------------------------


def _forward(tables, indices, offsets, sample_weights, extras, text: str) -> list[Tensor]:
    spec = decode(text)
    dtype = tables[0].dtype
    same = all(e.dtype == dtype for e in extras)
    given = extras if same else [e.to(dtype) for e in extras]
    slots = implementation(tables[0].device).forward(spec, tables, indices, offsets, sample_weights, given)
    return slots if same else _promote(spec, slots, extras)


def _promote(spec: GroupSpec, slots: list[Tensor], extras) -> list[Tensor]:
    """``torch.cat`` promotes: a wider extra (fp32 beside fp16 tables) widens its slot and keeps all its bits."""
    slots = list(slots)
    for place, extra in zip(spec.extras, extras):
        slots[place.slot] = slots[place.slot].to(torch.promote_types(slots[place.slot].dtype, extra.dtype))
    for place, extra in zip(spec.extras, extras):
        slots[place.slot].narrow(-1, place.column, place.width).copy_(extra)
    return slots


def _kernel(tables, indices, offsets, sample_weights, extras, spec, ticket=None, owner=-1):
    return _forward(tables, indices, offsets, sample_weights, extras, spec)


def leading_shapes(spec: GroupSpec, indices, offsets) -> list[tuple]:
    """The leading shape of each slot, from the first lookup that writes it."""
    shapes: list[tuple | None] = [None] * len(spec.slots)
    for lookup, ids, offs in zip(spec.lookups, indices, offsets):
        if shapes[lookup.slot] is None:
            if lookup.pooling == "none":
                shape = tuple(ids.shape)
            elif offs is None:
                shape = (ids.shape[0],)
            else:
                shape = (offs.shape[0] - (1 if lookup.include_last_offset else 0),)
            shapes[lookup.slot] = shape
    return [s or () for s in shapes]


@torch.library.register_fake("tablewright::embedding_bags", lib=LIBRARY)
def _fake(tables, indices, offsets, sample_weights, extras, spec, ticket=None, owner=-1):
    parsed = decode(spec)
    dtypes = [tables[0].dtype] * len(parsed.slots)
    for place, extra in zip(parsed.extras, extras):
        dtypes[place.slot] = torch.promote_types(dtypes[place.slot], extra.dtype)
    shapes = leading_shapes(parsed, indices, offsets)
    return [tables[0].new_empty((*s, w), dtype=d) for s, w, d in zip(shapes, parsed.slots, dtypes)]


# --- backward ----------------------------------------------------------------------------------------------------------------


def _backward(slot_grads, tables, indices, offsets, sample_weights, text: str, wanted_tables, wanted_weights) -> list[Tensor]:
    """Per wanted table (rows, values) if sparse, else a dense gradient; then a gradient for each wanted sample weight."""
    spec = decode(text)
    dtype = tables[0].dtype
    slot_grads = [g if g is None or g.dtype == dtype else g.to(dtype) for g in slot_grads]
    run = implementation(tables[0].device)
    args = (spec, slot_grads, tables, indices, offsets, sample_weights)
    sparse = [w and t.grad == "sparse" for w, t in zip(wanted_tables, spec.tables)]
    dense = [w and t.grad == "dense" for w, t in zip(wanted_tables, spec.tables)]
    pairs = run.sparse_gradients(*args, sparse) if any(sparse) else [None] * len(sparse)
    full = run.dense_gradients(*args, dense) if any(dense) else [None] * len(dense)
    out: list[Tensor] = []
    for is_sparse, is_dense, pair, grad in zip(sparse, dense, pairs, full):
        if is_sparse:
            out.extend(pair)
        elif is_dense:
            out.append(grad)
    if any(wanted_weights):
        out.extend(g for g in run.sample_weight_gradients(*args, wanted_weights) if g is not None)
    return out


@torch.library.register_fake("tablewright::embedding_bags_backward", lib=LIBRARY)
def _fake_backward(slot_grads, tables, indices, offsets, sample_weights, spec, wanted_tables, wanted_weights):
    out = []
    for table, place, wanted in zip(tables, decode(spec).tables, wanted_tables):
        if wanted and place.grad == "sparse":
            touched = torch.library.get_ctx().new_dynamic_size()
            out += [table.new_empty(touched, dtype=torch.int64), table.new_empty(touched, table.shape[1])]
        elif wanted and place.grad == "dense":
            out.append(torch.empty_like(table))
    return out + [torch.empty_like(w) for w, wanted in zip(sample_weights, wanted_weights) if wanted]


def _defer(slot_grads, indices, offsets, sample_weights, spec, owner, ticket):
    # Compiled code may reuse a gradient's buffer as soon as this returns, so it is kept as a copy.
    kept = [g if g is None else g.clone() for g in slot_grads]
    in_backward.defer(owner, spec, kept, indices, offsets, sample_weights)
    ticket.add_(1)


@torch.library.register_fake("tablewright::embedding_bags_defer_update", lib=LIBRARY)
def _fake_defer(slot_grads, indices, offsets, sample_weights, spec, owner, ticket):
    return None


class _Lookup(torch.autograd.Function):
    """The autograd formula. Positions after the first six: tables, indices, offsets, sample_weights, extras."""

    @staticmethod
    def forward(ctx, text, owner, ticket, n_tables, n_lookups, n_extras, *tensors):
        ctx.set_materialize_grads(False)
        ctx.text, ctx.owner, ctx.ticket = text, owner, ticket
        ctx.n_tables, ctx.n_lookups, ctx.n_extras = n_tables, n_lookups, n_extras
        tables, indices, offsets, weights, extras = _split(tensors, n_tables, n_lookups)
        # The rows themselves are needed for gradients of sample weights only: else tables may change before the backward, as
        # they may in nn.Embedding.
        reads_rows = any(ctx.needs_input_grad[6 + n_tables + 2 * n_lookups : 6 + n_tables + 3 * n_lookups])
        ctx.tables = None if reads_rows else tables
        ctx.save_for_backward(*tensors[0 if reads_rows else n_tables : n_tables + 3 * n_lookups])
        ctx.extra_dtypes = [e.dtype for e in extras]
        if tracing():
            with torch._C._AutoDispatchBelowAutograd():
                return tuple(torch.ops.tablewright.embedding_bags(tables, indices, offsets, weights, extras, text, ticket, owner))
        return tuple(_forward(tables, indices, offsets, weights, extras, text))

    @staticmethod
    @once_differentiable
    def backward(ctx, *slot_grads):
        n_tables, n_lookups = ctx.n_tables, ctx.n_lookups
        saved = ctx.saved_tensors if ctx.tables is None else (*ctx.tables, *ctx.saved_tensors)
        tables, indices, offsets, weights, _ = _split(saved, n_tables, n_lookups)
        spec = decode(ctx.text)
        needs = ctx.needs_input_grad[6:]
        touched = [False] * n_tables  # a table none of whose slots got a gradient has none either, as in plain autograd
        for lookup in spec.lookups:
            touched[lookup.table] |= slot_grads[lookup.slot] is not None
        wanted = [
            bool(n and t and place.grad in ("sparse", "dense")) for n, t, place in zip(needs[:n_tables], touched, spec.tables)
        ]
        weight_needs = needs[n_tables + 2 * n_lookups : n_tables + 3 * n_lookups]
        wanted_weights = [bool(n and slot_grads[lk.slot] is not None) for n, lk in zip(weight_needs, spec.lookups)]
        due = [i for i, place in enumerate(spec.tables) if touched[i] and needs[i] and place.grad == "in_backward"]

        made: list[Tensor] = []
        if any(wanted) or any(wanted_weights):
            call = torch.ops.tablewright.embedding_bags_backward if tracing() else _backward
            made = call(list(slot_grads), tables, indices, offsets, weights, ctx.text, wanted, wanted_weights)
        if due:
            if tracing():
                torch.ops.tablewright.embedding_bags_defer_update(
                    list(slot_grads), indices, offsets, weights, ctx.text, ctx.owner, ctx.ticket
                )
            elif _accumulates(tables[due[0]]):
                given = {spec.tables[i].name: tables[i] for i in due}
                in_backward.defer(ctx.owner, ctx.text, list(slot_grads), indices, offsets, weights, given)
        parts = iter(made)
        table_grads: list[Tensor | None] = []
        for table, place, want in zip(tables, spec.tables, wanted):
            if not want:
                table_grads.append(None)
            elif place.grad == "sparse":
                table_grads.append(_coalesced(next(parts), next(parts), table))
            else:
                table_grads.append(next(parts))
        if not tracing():
            _keep_coalesced(tables, table_grads)
        weight_grads = [next(parts) if want else None for want in wanted_weights]
        extra_grads = [
            None if slot_grads[e.slot] is None else slot_grads[e.slot].narrow(-1, e.column, e.width).to(dtype)
            for e, dtype in zip(spec.extras, ctx.extra_dtypes)
        ]
        return (None,) * 6 + (*table_grads, *[None] * (2 * n_lookups), *weight_grads, *extra_grads)


def _accumulates(table: Tensor) -> bool:
    """Would the running backward add to ``table.grad``? Not under ``torch.autograd.grad`` of something else."""
    return torch._C._will_engine_execute_node(torch.autograd.graph.get_gradient_edge(table).node)


def _coalesced(rows: Tensor, values: Tensor, table: Tensor) -> Tensor:
    return torch.sparse_coo_tensor(rows.unsqueeze(0), values, table.shape, is_coalesced=True, check_invariants=False)


def _keep_coalesced(tables: list[Tensor], grads: list[Tensor | None]) -> None:
    """Autograd stores a first sparse gradient without its "coalesced" mark: restore it when this backward ends, where nothing
    else was added to it. Without the mark every optimizer would sort the rows again."""
    stored = [(t, g._values().data_ptr()) for t, g in zip(tables, grads) if g is not None and g.is_sparse and t.is_leaf]

    def restore() -> None:
        for table, values in stored:
            grad = table.grad
            if grad is not None and grad.is_sparse and grad._values().data_ptr() == values:
                grad._coalesced_(True)

    if stored:
        torch.autograd.Variable._execution_engine.queue_callback(restore)


def _split(tensors, n_tables: int, n_lookups: int):
    cuts = [0, n_tables, n_tables + n_lookups, n_tables + 2 * n_lookups, n_tables + 3 * n_lookups]
    parts = [list(tensors[a:b]) for a, b in zip(cuts, cuts[1:])]
    return (*parts, list(tensors[cuts[-1] :]))


def _autograd(tables, indices, offsets, sample_weights, extras, spec, ticket=None, owner=-1):
    if not torch.is_grad_enabled() and not tracing():
        return _forward(tables, indices, offsets, sample_weights, extras, spec)
    tables = [t.detach() if place.grad == "none" else t for t, place in zip(tables, decode(spec).tables)]
    tensors = (*tables, *indices, *offsets, *sample_weights, *extras)
    return list(_Lookup.apply(spec, owner, ticket, len(tables), len(indices), len(extras), *tensors))


for _device in ("CPU", "CUDA"):
    LIBRARY.impl("embedding_bags", _kernel, _device)
    LIBRARY.impl("embedding_bags_backward", _backward, _device)
    LIBRARY.impl("embedding_bags_defer_update", _defer, _device)
LIBRARY.impl("embedding_bags", _autograd, "Autograd")

OP = torch.ops.tablewright.embedding_bags.default


def call(tables, indices, offsets, sample_weights, extras, spec, ticket=None, owner=-1) -> list[Tensor]:
    """:data:`OP` without the trip through torch's dispatcher (2 us a lookup), wherever nothing needs to see the op."""
    run = OP if torch.compiler.is_compiling() or tracing() else _autograd
    return run(tables, indices, offsets, sample_weights, extras, spec, ticket, owner)


DIRECT[OP] = call
