"""``torch.ops.tablewright.embedding_bags``: many lookups in one launch over the model's own parameter tensors.

::

    embedding_bags(tables, indices, offsets, sample_weights, extras, spec, ticket=None, owner=-1) -> list[Tensor]

``spec`` is an encoded :class:`~.spec.GroupSpec`; ``tables`` has one tensor ``[rows, dim]`` (or int8 rows, ``int8_rows.py``) for each of its tables; ``indices``,
``offsets`` and ``sample_weights`` have one entry for each lookup (``None`` where it has none); ``extras`` one dense tensor for
each extra. The result has one tensor ``[*leading, width]`` for each slot, in the tables' dtype (promoted with its extras').

The backward gives each table what its ``grad`` says: a coalesced sparse gradient ``[rows, dim]``, a dense one, nothing, or an
update in the backward by optimizer ``owner`` (see ``in_backward.py``). ``sample_weights`` and ``extras`` are differentiable;
second derivatives through tables and ``sample_weights`` are not provided: a backward that records itself
(``create_graph=True``) raises ``RuntimeError`` where it reaches one of them. Extras are served in it too.

Raises ``IndexError`` for an id outside its table, ``ValueError`` for offsets that decrease or do not fit, ``TypeError`` for ids
that are not integers; each names the lookup, the table and the first bad position, before anything is written.
"""
from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..library import DIRECT, LIBRARY, tracing
from . import cpu, in_backward
from .reference import row_dtype
from .sparse_grads import coalesced, keep_coalesced, refuse_to_record
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


def forward(tables, indices, offsets, sample_weights, extras, text: str) -> list[Tensor]:
    spec = decode(text)
    if spec.unmade:
        return _unmade(spec, tables, indices, offsets)
    dtype = row_dtype(tables[0])
    same = not extras or all([e.dtype == dtype for e in extras])
    given = extras if same else [e.to(dtype) for e in extras]
    slots = implementation(tables[0].device).forward(spec, tables, indices, offsets, sample_weights, given)
    slots = slots if same else _promote(spec, slots, extras)
    return [slot.float() for slot in slots] if spec.wide else slots


def _unmade(spec: GroupSpec, tables, indices, offsets) -> list[Tensor]:
    """Zeros in the shape of every slot, all in one number's memory."""
    zero = tables[0].new_zeros((), dtype=row_dtype(tables[0]))
    return [zero.expand(*shape, width) for shape, width in zip(leading_shapes(spec, indices, offsets), spec.slots)]


def _promote(spec: GroupSpec, slots: list[Tensor], extras) -> list[Tensor]:
    """``torch.cat`` promotes: a wider extra (fp32 beside fp16 tables) widens its slot and keeps all its bits."""
    slots = list(slots)
    for place, extra in zip(spec.extras, extras):
        slots[place.slot] = slots[place.slot].to(torch.promote_types(slots[place.slot].dtype, extra.dtype))
    for place, extra in zip(spec.extras, extras):
        slots[place.slot].narrow(-1, place.column, place.width).copy_(extra)
    return slots


def _kernel(tables, indices, offsets, sample_weights, extras, spec, ticket=None, owner=-1):
    return forward(tables, indices, offsets, sample_weights, extras, spec)


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
    if parsed.unmade:
        return _unmade(parsed, tables, indices, offsets)
    dtypes = [torch.float32 if parsed.wide else row_dtype(tables[0])] * len(parsed.slots)
    for place, extra in zip(parsed.extras, extras):
        dtypes[place.slot] = torch.promote_types(dtypes[place.slot], extra.dtype)
    shapes = leading_shapes(parsed, indices, offsets)
    return [tables[0].new_empty((*s, w), dtype=d) for s, w, d in zip(shapes, parsed.slots, dtypes)]


# --- backward ----------------------------------------------------------------------------------------------------------------


def _backward(slot_grads, tables, indices, offsets, sample_weights, text: str, wanted_tables, wanted_weights, whole=False) -> list[Tensor]:
    """Per wanted table (rows, values) if sparse (``whole``: one sparse tensor), else a dense gradient; then a gradient for each wanted
    sample weight."""
    spec = decode(text)
    dtype = row_dtype(tables[0])
    slot_grads = [g if g is None or g.dtype == dtype else g.to(dtype) for g in slot_grads]
    run = implementation(tables[0].device)
    args = (spec, slot_grads, tables, indices, offsets, sample_weights)
    out: list[Tensor] = []
    if True in wanted_tables:
        sparse = [w and t.grad == "sparse" for w, t in zip(wanted_tables, spec.tables)]
        dense = [w and t.grad == "dense" for w, t in zip(wanted_tables, spec.tables)]
        nothing = [None] * len(sparse)
        full = run.dense_gradients(*args, dense) if True in dense else nothing
        made = run.coalesced_gradients(*args, sparse) if whole and True in sparse and run is cpu else None
        pairs: Any = run.sparse_gradients(*args, sparse) if made is None and True in sparse else nothing
        for i, table in enumerate(tables):
            if dense[i]:
                out.append(full[i])
            elif sparse[i] and made is not None:
                out.append(made[i])
            elif sparse[i]:
                out += [coalesced(*pairs[i], table)] if whole else pairs[i]
    if True in wanted_weights:
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
    """The autograd formula. Tensors that can have a gradient are arguments of their own, in the order tables, sample weights
    (those that are there), extras: each argument costs time. Where all tables are updated in the backward none of them gets a
    gradient: ``alone`` are the tables then, and one of them stands for all. Ids and offsets are only saved, as autograd saves
    them, so that changing them before the backward is an error, a checkpoint can drop them and a second backward is refused."""

    @staticmethod
    def forward(ctx, text, owner, ticket, indices, offsets, sample_weights, weighted, alone, *tensors):
        ctx.set_materialize_grads(False)
        n_tables, n_weights = 1 if alone else len(decode(text).tables), len(weighted)
        tables, extras = alone or list(tensors[:n_tables]), tensors[n_tables + n_weights :]
        given = list(map(id, offsets))
        distinct = {at: o for at, o in zip(given, offsets) if o is not None}  # lookups often share one tensor of offsets
        ctx.call = text, owner, ticket, weighted, given, list(distinct), [e.dtype for e in extras]
        # The rows themselves are needed for gradients of sample weights only: else tables may change before the backward, as
        # they may in nn.Embedding.
        reads_rows = n_weights and any(ctx.needs_input_grad[8 + n_tables : 8 + n_tables + n_weights])
        ctx.tables = None if reads_rows else tables
        ctx.alone = alone and tuple([table.requires_grad for table in tables])
        ctx.first = -len(tensors)  # of ctx.next_functions, which has one entry for each argument that is a tensor
        ctx.save_for_backward(*indices, *distinct.values(), *tensors[0 if reads_rows else n_tables : n_tables + n_weights])
        slots = _read(ctx, text, owner, ticket, tables, indices, offsets, sample_weights, extras, n_tables)
        needs = ctx.needs_input_grad[8:]
        if False in needs or (ctx.alone and False in ctx.alone):  # what is read of frozen tables alone has no gradient, whoever shares the launch
            trained = ctx.alone or needs[:n_tables]
            ctx.mark_non_differentiable(*[slots[i] for i in _frozen_slots(text, tuple(trained), tuple(weighted), tuple(needs[n_tables:]))])
        return slots

    @staticmethod
    def backward(ctx, *slot_grads):
        text, owner, ticket, weighted, given, distinct, extra_dtypes = ctx.call
        spec = decode(text)
        n_tables, n_lookups = len(spec.tables), len(spec.lookups)
        saved = _saved(ctx)
        indices, saved = list(saved[:n_lookups]), saved[n_lookups:]
        held = dict(zip(distinct, saved))
        offsets: list[Tensor | None] = [held.get(at) for at in given]
        saved = saved[len(distinct) :]
        tables = ctx.tables
        if tables is None:
            tables, saved = list(saved[:n_tables]), saved[n_tables:]
        weights: list[Tensor | None] = [None] * n_lookups
        for place, tensor in zip(weighted, saved):
            weights[place] = tensor

        needs = ctx.needs_input_grad[8:]
        kinds, due, wanted = _due(text, ctx.alone or needs[:n_tables], tuple([g is not None for g in slot_grads]))
        wanted_weights = [False] * n_lookups
        for place, need in zip(weighted, needs[n_tables:]):
            wanted_weights[place] = need and slot_grads[spec.lookups[place].slot] is not None
        traced = tracing()
        if torch.is_grad_enabled():
            asked = [tables[ctx.alone.index(True)]] if ctx.alone else [tables[i] for i in range(n_tables) if wanted[i] or i in due]
            refuse_to_record([*asked, *(w for w, want in zip(weights, wanted_weights) if want)])
            wanted, wanted_weights, kinds, due = [False] * n_tables, [False] * n_lookups, (None,) * n_tables, ()

        made: list[Tensor] = []
        if True in wanted or True in wanted_weights:
            args = (list(slot_grads), tables, indices, offsets, weights, text, wanted, wanted_weights)
            made = torch.ops.tablewright.embedding_bags_backward(*args) if traced else _backward(*args, whole=True)
        if due:
            if traced:
                torch.ops.tablewright.embedding_bags_defer_update(list(slot_grads), indices, offsets, weights, text, owner, ticket)
            elif in_backward.reaches([ctx.next_functions[ctx.first + i][0] for i in ((0,) if ctx.alone else due)]):
                in_backward.defer(owner, text, list(slot_grads), indices, offsets, weights, tables, due)
        parts = iter(made)
        table_grads: list[Tensor | None] = [None] * n_tables
        for i, kind in enumerate(kinds):
            if kind == "sparse" and traced:
                table_grads[i] = coalesced(next(parts), next(parts), tables[i])
            elif kind is not None:
                table_grads[i] = next(parts)
        if "sparse" in kinds and not traced:
            keep_coalesced(tables, table_grads)
        weight_grads = [next(parts) if wanted_weights[place] else None for place in weighted]
        extra_grads = [
            None if slot_grads[e.slot] is None else slot_grads[e.slot].narrow(-1, e.column, e.width).to(dtype)
            for e, dtype in zip(spec.extras, extra_dtypes)
        ]
        return (None,) * 8 + (*(table_grads[:1] if ctx.alone else table_grads), *weight_grads, *extra_grads)


def _read(ctx, text, owner, ticket, tables, indices, offsets, sample_weights, extras, n_tables) -> tuple[Tensor, ...]:
    """The slots of a :class:`_Lookup`."""
    if tracing():
        with torch._C._AutoDispatchBelowAutograd():
            return tuple(torch.ops.tablewright.embedding_bags(tables, indices, offsets, sample_weights, extras, text, ticket, owner))
    if ticket is not None and not isinstance(ticket, Tensor):
        return tuple(ticket.slots(extras, text))
    run = implementation(tables[0].device)
    slots = None if extras or run is not cpu else cpu.read_at_once(text, tables, indices, offsets, sample_weights)
    if slots is not None:
        return tuple(slots)
    spec = decode(text)
    if run is cpu:
        return tuple(forward(tables, indices, offsets, sample_weights, extras, text))
    kinds, due, _ = _due(text, ctx.alone or ctx.needs_input_grad[8 : 8 + n_tables], (True,) * len(spec.slots))
    kinds = ["in_backward" if i in due else kind for i, kind in enumerate(kinds)]
    ctx.ahead = run.ahead_of_backward(spec, tables, indices, offsets, kinds)  # found by the backward while it is kept here
    slots = forward(tables, indices, offsets, sample_weights, extras, text)
    run.join_captured(ctx.ahead)
    return tuple(slots)


@functools.lru_cache(maxsize=4096)
def _frozen_slots(text: str, trained: tuple[bool, ...], weighted: tuple[int, ...], others: tuple[bool, ...]) -> list[int]:
    """The slots to which no gradient is due. ``others``: whether each sample weight, then each extra, has one."""
    spec = decode(text)
    due = {entry.slot for entry in spec.lookups if trained[entry.table]}
    due |= {spec.lookups[i].slot for i, need in zip(weighted, others) if need}
    due |= {extra.slot for extra, need in zip(spec.extras, others[len(weighted) :]) if need}
    return [i for i in range(len(spec.slots)) if i not in due]


def _saved(ctx) -> tuple[Tensor, ...]:
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        if "inplace operation" not in str(error):
            raise
        raise RuntimeError(
            "a lookup's ids, offsets or weights were modified by an inplace operation between its forward and this backward. Of a table with dynamic ids: they were looked up "
            "before the last update, and their rows may belong to other ids since. Nothing was updated. Call no backward of a forward from before a step"
        ) from error


class GivenLookup(_Lookup):
    """A lookup whose rows were read before (``given.py``): they come in place of the ticket."""

    @staticmethod
    def backward(ctx, *slot_grads):
        ctx.call[2].wait()
        return _Lookup.backward(ctx, *slot_grads)


@functools.lru_cache(maxsize=4096)
def _due(
    text: str, needs: tuple[bool, ...], reached: tuple[bool, ...]
) -> tuple[tuple[str | None, ...], tuple[int, ...], list[bool]]:
    """For each table the kind of gradient to make ("sparse", "dense" or None); the tables to update in the backward; and for
    each table whether it has a gradient to make.

    A table none of whose slots got a gradient has none either, as in plain autograd."""
    spec = decode(text)
    touched = {lookup.table for lookup in spec.lookups if reached[lookup.slot]}
    grads = [t.grad if needs[i] and i in touched else None for i, t in enumerate(spec.tables)]
    kinds = tuple(g if g in ("sparse", "dense") else None for g in grads)
    return kinds, tuple(i for i, g in enumerate(grads) if g == "in_backward"), [kind is not None for kind in kinds]


def autograd(tables, indices, offsets, sample_weights, extras, spec, ticket=None, owner=-1, run=None):
    traced = tracing()
    if not traced and not torch.is_grad_enabled():
        return forward(tables, indices, offsets, sample_weights, extras, spec)
    weighted = [i for i, w in enumerate(sample_weights) if w is not None]
    frozen, all_in_backward = _layouts(spec)
    if frozen:
        tables = [t.detach() if place.grad == "none" else t for t, place in zip(tables, decode(spec).tables)]
    alone, leaves = None, tables
    if all_in_backward and not traced and not weighted:
        trained = next((t for t in tables if t.requires_grad), None)
        if trained is not None:
            alone, leaves = tables, [trained]
    tensors = (*leaves, *[sample_weights[i] for i in weighted], *extras) if weighted or extras else leaves
    apply = run or (_Lookup.apply if traced else _APPLY)
    return list(apply(spec, owner, ticket, indices, offsets, sample_weights, weighted, alone, *tensors))


# Without the look through all arguments for wrappers that torch.func left behind: reading such a one raises.
_APPLY = super(torch.autograd.Function, _Lookup).apply


@functools.lru_cache(maxsize=4096)
def _layouts(text: str) -> tuple[bool, bool]:
    """Whether the spec has a table without gradient; whether all its tables are updated in the backward."""
    grads = [t.grad for t in decode(text).tables]
    return "none" in grads, set(grads) == {"in_backward"}


for _device in ("CPU", "CUDA"):
    LIBRARY.impl("embedding_bags", _kernel, _device)
    LIBRARY.impl("embedding_bags_backward", _backward, _device)
    LIBRARY.impl("embedding_bags_defer_update", _defer, _device)
LIBRARY.impl("embedding_bags", autograd, "Autograd")

OP = torch.ops.tablewright.embedding_bags.default


_FEW = 512  # ids: up to here torch's own lookup of one table takes less time, more of it in the backward (benchmarks/shapes_cpu.py)


class _OneLookup(torch.autograd.Function):
    """:class:`_Lookup` for one ``nn.Embedding`` with a sparse gradient: with few ids, what is asked and kept is most of the time."""

    @staticmethod
    def forward(ctx, table, ids, padding, text):
        ctx.call = table, text  # the table's rows are not needed, and may change before the backward
        ctx.save_for_backward(ids)
        return torch.embedding(table, ids, padding)

    @staticmethod
    def backward(ctx, grad):
        table, text = ctx.call
        if torch.is_grad_enabled():
            refuse_to_record([table])
            return None, None, None, None
        ids = _saved(ctx)
        made = cpu.coalesced_gradients(decode(text), [grad], [table], ids, [None], [None], [True])
        if made is None:
            made = _backward([grad], [table], ids, [None], [None], text, [True], [False], whole=True)
        keep_coalesced([table], made)
        return made[0], None, None, None


_APPLY_ONE = super(torch.autograd.Function, _OneLookup).apply


@functools.lru_cache(maxsize=4096)
def _lone(text: str) -> tuple[int, str] | None:
    """The padding row (-1: none) of a spec that is one ``nn.Embedding``, and the kind of its gradient; ``None`` for others."""
    spec = decode(text)
    lookup, grad = spec.lookups[0], spec.tables[0].grad
    if len(spec.lookups) != 1 or spec.extras or spec.unmade or spec.wide or spec.slots[0] != spec.tables[0].dim:
        return None
    if lookup.pooling != "none" or lookup.wrap_negative:
        return None
    return -1 if lookup.padding_idx is None else lookup.padding_idx, grad


def call(tables, indices, offsets, sample_weights, extras, spec, ticket=None, owner=-1) -> list[Tensor]:
    """:data:`OP` without the trip through torch's dispatcher (2 us a lookup), wherever nothing needs to see the op."""
    if torch.compiler.is_compiling() or tracing():
        return OP(tables, indices, offsets, sample_weights, extras, spec, ticket, owner)
    if len(indices) == 1 and indices[0].numel() <= _FEW and (lone := _lone(spec)) and tables[0].is_cpu and tables[0].dtype is not torch.uint8:
        padding, grad = lone
        try:
            if grad == "dense" or not torch.is_grad_enabled():
                return [torch.embedding(tables[0], indices[0], padding)]
            if grad == "sparse":
                return [_APPLY_ONE(tables[0], indices[0], padding, spec)]
        except (IndexError, RuntimeError):  # the words are found below
            pass
    if not extras and not torch.is_grad_enabled() and implementation(tables[0].device) is cpu:
        slots = cpu.read_at_once(spec, tables, indices, offsets, sample_weights)
        if slots is not None:
            return slots
    return autograd(tables, indices, offsets, sample_weights, extras, spec, ticket, owner)


DIRECT[OP] = call
