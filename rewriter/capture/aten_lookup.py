"""Lookups and indexing in ATen form: ``F.embedding``, ``F.embedding_bag`` and ``x[...]``, as torch itself carries them out."""
from __future__ import annotations

import torch
import torch.nn.functional as F

from ...kernels.embedding.int8_rows import OP as INT8
from .aten_special import lowers
from .value import GiveUp, NumberValue, TensorValue

aten = torch.ops.aten
_MODES = {"sum": 0, "mean": 1, "max": 2}


@lowers(F.embedding)
def embedding(tracer, input, weight, padding_idx=None, max_norm=None, norm_type=2.0, scale_grad_by_freq=False, sparse=False):
    if max_norm is not None:
        raise GiveUp("max_norm renormalises the table inside forward()")
    if padding_idx is None:
        padding_idx = -1
    elif padding_idx < 0:
        padding_idx += tracer.parameter_shape(weight)[0]
    arguments = [weight, input, padding_idx, scale_grad_by_freq, sparse]
    for default in (False, False, -1):  # as export writes it: trailing defaults are left out
        if type(arguments[-1]) is type(default) and arguments[-1] == default:
            arguments.pop()
        else:
            break
    return tracer.emit(aten.embedding.default, *arguments)


@lowers(F.embedding_bag)
def embedding_bag(tracer, input, weight, offsets=None, max_norm=None, norm_type=2, scale_grad_by_freq=False, mode="mean",
                  sparse=False, per_sample_weights=None, include_last_offset=False, padding_idx=None):
    if max_norm is not None:
        raise GiveUp("max_norm renormalises the table inside forward()")
    if mode not in _MODES:
        raise GiveUp(f"embedding_bag mode {mode!r}")
    if isinstance(weight, torch.Tensor) and isinstance(input, torch.Tensor) and tracer.dtype_is_integer(weight):
        raise GiveUp("embedding_bag with the table and the ids swapped")
    if per_sample_weights is not None and mode != "sum":
        raise GiveUp("per_sample_weights with mode other than 'sum' is an error in torch")
    rank = tracer.rank(input)
    if offsets is None:
        if rank not in (None, 2):
            raise GiveUp(f"embedding_bag without offsets needs 2-D ids, got {rank}-D")
        # every row is a bag: offsets 0, L, 2L, ... as torch.export writes it
        total = tracer.number(aten.sym_numel.default, (input,))
        width = tracer.size(input, 1)
        # the offsets have the ids' dtype (int32 ids want int32 offsets)
        offsets = tracer.emit(aten.arange.start_step, 0, total, width, dtype=tracer.dtype(input), device=tracer.device(input))
        input = tracer.emit(aten.reshape.default, input, [-1])
        include_last_offset = False  # as torch does
        if per_sample_weights is not None:
            per_sample_weights = tracer.emit(aten.reshape.default, per_sample_weights, [-1])
    elif rank not in (None, 1):
        raise GiveUp(f"embedding_bag with offsets needs 1-D ids, got {rank}-D")
    if padding_idx is not None and padding_idx < 0:
        padding_idx += tracer.parameter_shape(weight)[0]
    return tracer.emit(aten.embedding_bag.padding_idx, weight, input, offsets, scale_grad_by_freq, _MODES[mode], sparse,
                       per_sample_weights, include_last_offset, padding_idx)[0]


@lowers(INT8)
def embedding_int8(tracer, table, ids, offsets=None, sample_weights=None, pooling="none", padding_idx=-1, include_last_offset=False):
    return tracer.emit(INT8, table, ids, offsets, sample_weights, pooling, padding_idx, include_last_offset)


@lowers(torch.Tensor.__getitem__)
def getitem(tracer, value, index):
    """Basic indexing becomes select/slice/unsqueeze, the rest one aten.index.Tensor, in torch's order of the two."""
    items = list(index) if isinstance(index, tuple) else [index]
    if any(isinstance(item, str) for item in items):
        raise GiveUp(f"{tracer.describe(value)} is indexed by the text {index!r}: it is not a plain tensor")
    if isinstance(index, list):
        if any(isinstance(item, (slice, type(None), type(...), list, tuple)) for item in index):
            raise GiveUp("a list of slices as an index")
        items = [index]
    if any(type(item) is bool or (isinstance(item, NumberValue) and item.kind == "bool") for item in items):
        raise GiveUp("a Python bool as an index")
    used = sum(1 for item in items if item is not None and item is not ...)
    ellipses = [position for position, item in enumerate(items) if item is ...]
    if len(ellipses) > 1:
        raise GiveUp("two ellipses in an index")
    if ellipses:
        where = ellipses[0]
        after = items[where + 1:]
        if any(isinstance(item, torch.Tensor) for item in items):
            raise GiveUp("an ellipsis together with a tensor as an index")
        if after:
            rank = tracer.rank(value)
            if rank is None:
                return _from_the_end(tracer, value, items[:where], after)
            items = items[:where] + [slice(None)] * (rank - used) + after
        else:
            items = items[:where]
    dim, advanced = 0, []
    for item in items:
        if item is None:
            value = tracer.emit(aten.unsqueeze.default, value, dim)
            dim += 1
        elif isinstance(item, slice):
            value = _slice(tracer, value, dim, item)
            dim += 1
        elif isinstance(item, (torch.Tensor, list, range)):
            tensor = item if isinstance(item, torch.Tensor) else _index_list(item)
            if not isinstance(tensor, TensorValue) and tensor.dtype in (torch.uint8,):
                raise GiveUp("a byte mask as an index")
            advanced.append((dim, tensor))
            dim += 1
        elif type(item) is NumberValue or type(item) is int or hasattr(item, "__index__"):
            # an int beside tensors takes part in torch's placement of the result's dimensions
            if any(isinstance(each, (torch.Tensor, list)) for each in items):
                raise GiveUp("an int together with a tensor as an index")
            value = tracer.emit(aten.select.int, value, dim, item if type(item) is NumberValue else item.__index__())
        else:
            raise GiveUp(f"an index of type {type(item).__name__}")
    if advanced:
        tensors: list = [None] * (advanced[-1][0] + 1)
        apart = advanced[-1][0] - advanced[0][0] != len(advanced) - 1
        for position, tensor in advanced:
            if position != dim - 1 and tracer.is_mask(tensor):
                raise GiveUp("what may be a mask, followed by other indices")  # it may take more than one dimension
            if apart and tracer.rank(tensor) in (None, 0):
                raise GiveUp("a tensor index that may be a single number, apart from others")  # torch then selects first
            tensors[position] = tensor
        value = tracer.emit(aten.index.Tensor, value, tensors)
    elif value is not None and not items:
        value = tracer.emit(aten.alias.default, value)
    return value


def _from_the_end(tracer, value, before, after):
    """x[..., k] of a tensor of unknown rank: count from the last dimension."""
    if before or any(isinstance(item, (list, torch.Tensor)) for item in after):
        raise GiveUp("an index with an ellipsis in its middle, on a tensor of unknown rank")
    dim = -1
    for item in reversed(after):
        if item is None:
            value = tracer.emit(aten.unsqueeze.default, value, dim)
            dim -= 1
        elif isinstance(item, slice):
            value = _slice(tracer, value, dim, item)
            dim -= 1
        elif type(item) is NumberValue or hasattr(item, "__index__"):
            value = tracer.emit(aten.select.int, value, dim, item if type(item) is NumberValue else item.__index__())
        else:
            raise GiveUp(f"an index of type {type(item).__name__}")
    return value


def _slice(tracer, value, dim, item):
    bounds = []
    for bound in (item.start, item.stop, item.step):
        if bound is not None and type(bound) is not NumberValue and not hasattr(bound, "__index__"):
            raise GiveUp(f"a slice bound of type {type(bound).__name__}")
        if isinstance(bound, torch.Tensor):
            raise GiveUp("a tensor as a slice bound")
        bounds.append(bound if bound is None or type(bound) is NumberValue else bound.__index__())
    if bounds == [None, None, None]:
        return value
    start, stop, step = bounds[0], bounds[1], bounds[2]
    arguments = [value, dim, 0 if start is None else start, (1 << 63) - 1 if stop is None else stop]
    return tracer.emit(aten.slice.Tensor, *arguments, *([step] if step not in (None, 1) else []))


def _index_list(items) -> torch.Tensor:
    if not all(type(item) is int for item in items):
        raise GiveUp("a list index of anything but ints")
    return torch.tensor(list(items))
