"""Torch calls whose ATen form is more than a choice of overload: lookups, indexing, dropout, sizes, casts, norms.

``SPECIAL`` maps the torch function object to ``lower(tracer, *args, **kwargs)``, which emits nodes and returns values.
Each one raises GiveUp for the arguments it does not cover.
"""
from __future__ import annotations

import builtins

import torch
import torch.nn.functional as F
from torch import fx

from .value import GiveUp, NumberValue, SequenceValue, TensorValue

aten = torch.ops.aten
SPECIAL: dict = {}
_MODES = {"sum": 0, "mean": 1, "max": 2}


def _lowers(*functions):
    def note(lower):
        for function in functions:
            SPECIAL[function] = lower
        return lower

    return note


def _property(name: str):
    return getattr(torch.Tensor, name).__get__


# lookups ---------------------------------------------------------------------------------------------------------------
@_lowers(F.embedding)
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


@_lowers(F.embedding_bag)
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


@_lowers(torch.Tensor.__getitem__)
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
        for position, tensor in advanced:
            if len(advanced) + len(items) > 2 and tracer.is_mask(tensor):
                raise GiveUp("a mask together with other indices")
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


# sizes, dtypes, devices ------------------------------------------------------------------------------------------------
@_lowers(torch.Tensor.size, _property("shape"))
def size(tracer, value, dim=None):
    if dim is not None:
        return tracer.size(value, dim)
    return tracer.shape(value)


@_lowers(torch.Tensor.dim, torch.Tensor.ndimension, _property("ndim"))
def dim(tracer, value):
    rank = tracer.rank(value)
    if rank is None:
        raise GiveUp(f"the number of dimensions of {tracer.describe(value)} is not known without sample inputs")
    return rank


@_lowers(torch.Tensor.numel, torch.Tensor.nelement, torch.numel)
def numel(tracer, value):
    return tracer.number(aten.sym_numel.default, (value,))


@_lowers(torch.Tensor.__len__)
def length(tracer, value):
    raise GiveUp(f"len() of {tracer.describe(value)}")


@_lowers(_property("dtype"))
def dtype(tracer, value):
    return tracer.dtype(value)


@_lowers(_property("device"))
def device(tracer, value):
    return tracer.device(value)


@_lowers(_property("T"), _property("mT"))
def transposed(tracer, value):
    if tracer.rank(value) != 2:
        raise GiveUp(".T or .mT of what may not be a matrix")
    return tracer.emit(aten.t.default, value)


@_lowers(_property("data"))
def data(tracer, value):
    return tracer.emit(aten.detach.default, value)


# casts -----------------------------------------------------------------------------------------------------------------
def _cast(dtype):
    def lower(tracer, value, memory_format=None):
        if memory_format is not None:
            raise GiveUp("memory_format")
        return tracer.emit(aten.to.dtype, value, dtype)

    return lower


for _name in ("float", "double", "half", "bfloat16", "long", "int", "short", "bool"):
    SPECIAL[getattr(torch.Tensor, _name)] = _cast(getattr(torch, _name))


@_lowers(torch.Tensor.to)
def to(tracer, value, *args, **kwargs):
    wanted = {"dtype": kwargs.pop("dtype", None), "device": kwargs.pop("device", None), "other": kwargs.pop("other", None)}
    kwargs.pop("non_blocking", None)  # a hint: results do not depend on it
    copied = kwargs.pop("copy", False)
    rest = list(args)
    for item in args:
        if isinstance(item, torch.Tensor):
            wanted["other"] = item
        elif isinstance(item, torch.dtype):  # also a NumberValue of that kind
            wanted["dtype"] = item
        elif isinstance(item, (torch.device, str)):
            wanted["device"] = item
        else:
            break
        rest.pop(0)
    if rest or kwargs or copied is not False:
        raise GiveUp(f".to({', '.join(map(str, [*map(type, args), *kwargs]))})")
    if wanted["other"] is not None:
        return tracer.emit(aten.to.other, value, wanted["other"])
    if wanted["device"] is None:
        return tracer.emit(aten.to.dtype, value, wanted["dtype"]) if wanted["dtype"] is not None else value
    keyword = {key: wanted[key] for key in ("dtype", "device") if wanted[key] is not None}
    return tracer.emit(aten.to.dtype_layout, value, **keyword)


@_lowers(torch.Tensor.type_as)
def type_as(tracer, value, other):
    return tracer.emit(aten.type_as.default, value, other)


@_lowers(torch.Tensor.new_tensor)
def new_tensor(tracer, value, data, *, dtype=None, device=None, requires_grad=False):
    if requires_grad or dtype is not None or device is not None:
        raise GiveUp("new_tensor with a dtype, a device or requires_grad")
    return tracer.emit(aten.to.other, _constant(data), value)


@_lowers(torch.tensor, torch.as_tensor)
def tensor(tracer, data, *, dtype=None, device=None, requires_grad=False):
    if requires_grad:
        raise GiveUp("a tensor that requires grad is made inside forward()")
    if isinstance(data, TensorValue):
        raise GiveUp("torch.tensor() of a traced tensor")
    made = _constant(data, dtype if not isinstance(dtype, NumberValue) else None)
    if type(dtype) is NumberValue:
        made = tracer.emit(aten.to.dtype, made, dtype)
    return made if device is None else tracer.emit(aten.to.dtype_layout, made, device=device)


def _constant(data, dtype=None) -> torch.Tensor:
    flat = data if isinstance(data, (list, tuple)) else [data]
    if any(isinstance(item, (TensorValue, NumberValue)) for item in flat):
        raise GiveUp("a tensor is built from traced numbers")
    return torch.tensor(data, dtype=dtype)


# activations with arguments of their own ---------------------------------------------------------------------------------
def _activation(name: str, *parameters):
    plain, in_place = getattr(aten, name).default, getattr(getattr(aten, f"{name}_", None), "default", None)

    def lower(tracer, input, *args, **kwargs):
        settings = dict(zip((*[key for key, _ in parameters], "inplace"), args)) | kwargs
        changes = settings.pop("inplace", False)
        if set(settings) - {key for key, _ in parameters} or (changes and in_place is None):
            raise GiveUp(f"{name} with {sorted(settings)}")
        values = [settings.get(key, default) for key, default in parameters]
        while values and values[-1] == parameters[len(values) - 1][1]:
            values.pop()
        if changes:
            tracer.emit(in_place, input, *values)
            return input
        return tracer.emit(plain, input, *values)

    return lower


for _name, _settings in {"relu": (), "silu": (), "selu": (), "mish": (), "relu6": (), "hardsigmoid": (), "hardswish": (),
                         "leaky_relu": (("negative_slope", 0.01),), "elu": (("alpha", 1.0),), "celu": (("alpha", 1.0),),
                         "hardtanh": (("min_val", -1.0), ("max_val", 1.0))}.items():
    SPECIAL[getattr(F, _name)] = _activation(_name, *_settings)


def _softmax(op):
    def lower(tracer, input, dim=None, _stacklevel=3, dtype=None):
        if dim is None:
            raise GiveUp("softmax without a dim")
        return tracer.emit(op, input, dim, *([dtype] if dtype is not None else []))

    return lower


SPECIAL[F.softmax] = _softmax(aten.softmax.int)
SPECIAL[F.log_softmax] = _softmax(aten.log_softmax.int)


@_lowers(F.glu)
def glu(tracer, input, dim=-1):
    return tracer.emit(aten.glu.default, input, *([dim] if dim != -1 else []))


@_lowers(F.dropout, torch.dropout)
def dropout(tracer, input, p=0.5, training=True, inplace=False, train=None):
    training = training if train is None else train
    if inplace:
        raise GiveUp("dropout in place")
    if not isinstance(p, (int, float)) or isinstance(p, NumberValue) or not 0 <= p <= 1:
        raise GiveUp(f"dropout probability {p!r}")
    return tracer.emit(aten.dropout.default, input, p, training)


# norms -----------------------------------------------------------------------------------------------------------------
@_lowers(F.layer_norm)
def layer_norm(tracer, input, normalized_shape, weight=None, bias=None, eps=1e-05):
    return tracer.emit(aten.layer_norm.default, input, list(normalized_shape), weight, bias, eps)


@_lowers(F.batch_norm)
def batch_norm(tracer, input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-05):
    return tracer.emit(aten.batch_norm.default, input, weight, bias, running_mean, running_var, training, momentum, eps, False)


@_lowers(F.normalize)
def normalize(tracer, input, p=2.0, dim=1, eps=1e-12, out=None):
    if out is not None:
        raise GiveUp("normalize(out=)")
    length = norm(tracer, input, p, dim, True)
    clamped = tracer.emit(aten.clamp_min.default, length, eps)
    return tracer.emit(aten.div.Tensor, input, tracer.emit(aten.expand_as.default, clamped, input))


@_lowers(torch.norm, torch.Tensor.norm)
def norm(tracer, input, p="fro", dim=None, keepdim=False, out=None, dtype=None):
    if out is not None or dtype is not None or p not in ("fro", 2, 2.0, 1, 1.0):
        raise GiveUp(f"norm with p={p!r}")
    dims = dim if dim is None or isinstance(dim, (list, tuple)) else [dim]
    return tracer.emit(aten.linalg_vector_norm.default, input, 2.0 if p == "fro" else float(p), dims, keepdim)


# lists -----------------------------------------------------------------------------------------------------------------
@_lowers(torch.einsum)
def einsum(tracer, equation, *operands):
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = operands[0]
    if not isinstance(equation, str):
        raise GiveUp("einsum in sublist format")
    return tracer.emit(aten.einsum.default, equation, list(operands))


@_lowers(torch.split, torch.Tensor.split)
def split(tracer, tensor, split_size_or_sections=None, dim=0, split_size=None):
    sizes = split_size if split_size_or_sections is None else split_size_or_sections
    if isinstance(sizes, (list, tuple)):
        return tracer.emit(aten.split_with_sizes.default, tensor, list(sizes), *([dim] if dim != 0 else []))
    return tracer.emit(aten.split.Tensor, tensor, sizes, *([dim] if dim != 0 else []))


@_lowers(torch.tensordot)
def tensordot(tracer, a, b, dims=2, out=None):
    if out is not None or isinstance(dims, torch.Tensor):
        raise GiveUp("tensordot(out=)")
    if type(dims) is int:
        if dims and tracer.rank(a) is None:
            raise GiveUp("tensordot by a count of dimensions, on a tensor of unknown rank")
        first = tracer.rank(a) if dims else 0
        dims = (list(range(first - dims, first)), list(range(dims)))
    left, right = ([each] if type(each) is int else list(each) for each in dims)
    return tracer.emit(aten.tensordot.default, a, b, left, right)


@_lowers(F.one_hot)
def one_hot(tracer, tensor, num_classes=-1):
    if type(num_classes) is int and num_classes < 0:
        raise GiveUp("one_hot whose width depends on the largest id")
    return tracer.emit(aten.one_hot.default, tensor, num_classes)


@_lowers(F.pad)
def pad(tracer, input, pad, mode="constant", value=None):
    if mode != "constant":
        raise GiveUp(f"pad in mode {mode!r}")
    return tracer.emit(aten.constant_pad_nd.default, input, list(pad), *([value] if value is not None else []))


# what would need content --------------------------------------------------------------------------------------------------
def _refuse(what: str):
    def lower(tracer, value, *args, **kwargs):
        raise GiveUp(f"{what} of {tracer.describe(value)}, which is known only when the graph runs")

    return lower


for _function, _what in {
        torch.Tensor.__bool__: "a branch on the value", torch.Tensor.__int__: "int()", torch.Tensor.__float__: "float()",
        torch.Tensor.__index__: "use as an index", torch.Tensor.item: ".item()", torch.Tensor.tolist: ".tolist()",
        torch.Tensor.numpy: ".numpy()", torch.Tensor.__array__: "conversion to numpy", torch.Tensor.__iter__: "a loop",
        torch.Tensor.__contains__: "'in'", torch.Tensor.__format__: "formatting", torch.Tensor.__deepcopy__: "a copy",
        torch.Tensor.unique: "unique()", torch.unique: "unique()", torch.Tensor.__setitem__: "assignment to a part"}.items():
    SPECIAL[_function] = _refuse(_what)
_ = (builtins, fx, SequenceValue)
