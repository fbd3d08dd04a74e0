"""Torch calls whose ATen form is more than a choice of overload: dropout, sizes, casts, norms (lookups: ``aten_lookup.py``).

``SPECIAL`` maps the torch function object to ``lower(tracer, *args, **kwargs)``, which emits nodes and returns values.
Each one raises GiveUp for the arguments it does not cover.
"""
from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from .value import GiveUp, NumberValue, TensorValue

aten = torch.ops.aten
SPECIAL: dict = {}


def lowers(*functions):
    """Registers a lowering for torch function objects."""
    def note(lower):
        for function in functions:
            SPECIAL[function] = lower
        return lower

    return note


def _property(name: str):
    return getattr(torch.Tensor, name).__get__


# sizes, dtypes, devices ------------------------------------------------------------------------------------------------
@lowers(torch.Tensor.size, _property("shape"))
def size(tracer, value, dim=None):
    if dim is not None:
        return tracer.size(value, dim)
    return tracer.shape(value)


@lowers(torch.Tensor.dim, torch.Tensor.ndimension, _property("ndim"))
def dim(tracer, value):
    rank = tracer.rank(value)
    if rank is None:
        raise GiveUp(f"the number of dimensions of {tracer.describe(value)} is not known without sample inputs")
    return rank


@lowers(torch.Tensor.numel, torch.Tensor.nelement, torch.numel)
def numel(tracer, value):
    return tracer.number(aten.sym_numel.default, (value,))


@lowers(torch.Tensor.__len__)
def length(tracer, value):
    raise GiveUp(f"len() of {tracer.describe(value)}")


@lowers(_property("dtype"))
def dtype(tracer, value):
    return tracer.dtype(value)


@lowers(_property("device"))
def device(tracer, value):
    return tracer.device(value)


@lowers(_property("T"), _property("mT"))
def transposed(tracer, value):
    if tracer.rank(value) != 2:
        raise GiveUp(".T or .mT of what may not be a matrix")
    return tracer.emit(aten.t.default, value)


@lowers(_property("data"))
def data(tracer, value):
    return tracer.emit(aten.detach.default, value)


@lowers(torch.Tensor.__rtruediv__, torch.Tensor.__rdiv__)
def divided_by(tracer, value, other):
    return tracer.emit(aten.mul.Tensor, tracer.emit(aten.reciprocal.default, value), other)  # as torch itself does


@lowers(torch.Tensor.__rpow__)
def exponent_of(tracer, value, base):
    if isinstance(base, torch.Tensor):
        return tracer.emit(aten.pow.Tensor_Tensor, base, value)
    return tracer.emit(aten.pow.Scalar, base, value)


# casts -----------------------------------------------------------------------------------------------------------------
def _cast(dtype):
    def lower(tracer, value, memory_format=None):
        if memory_format is not None:
            raise GiveUp("memory_format")
        return tracer.emit(aten.to.dtype, value, dtype)

    return lower


for _name in ("float", "double", "half", "bfloat16", "long", "int", "short", "bool"):
    SPECIAL[getattr(torch.Tensor, _name)] = _cast(getattr(torch, _name))


@lowers(torch.Tensor.to)
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


@lowers(torch.Tensor.type)
def cast_to_type(tracer, value, dtype=None, non_blocking=False):
    if not isinstance(dtype, torch.dtype):
        raise GiveUp(f".type({dtype!r})")
    return tracer.emit(aten.to.dtype, value, dtype)


@lowers(torch.Tensor.type_as)
def type_as(tracer, value, other):
    return tracer.emit(aten.type_as.default, value, other)


@lowers(torch.Tensor.new_tensor)
def new_tensor(tracer, value, data, *, dtype=None, device=None, requires_grad=False):
    if requires_grad or dtype is not None or device is not None:
        raise GiveUp("new_tensor with a dtype, a device or requires_grad")
    return tracer.emit(aten.to.other, _constant(data), value)


@lowers(torch.tensor, torch.as_tensor)
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


@lowers(F.glu)
def glu(tracer, input, dim=-1):
    return tracer.emit(aten.glu.default, input, *([dim] if dim != -1 else []))


@lowers(F.dropout, torch.dropout)
def dropout(tracer, input, p=0.5, training=True, inplace=False, train=None):
    training = training if train is None else train
    if inplace:
        raise GiveUp("dropout in place")
    if not isinstance(p, (int, float)) or isinstance(p, NumberValue) or not 0 <= p <= 1:
        raise GiveUp(f"dropout probability {p!r}")
    return tracer.emit(aten.dropout.default, input, p, training)


# norms -----------------------------------------------------------------------------------------------------------------
@lowers(F.layer_norm)
def layer_norm(tracer, input, normalized_shape, weight=None, bias=None, eps=1e-05):
    return tracer.emit(aten.layer_norm.default, input, list(normalized_shape), weight, bias, eps)


@lowers(F.batch_norm)
def batch_norm(tracer, input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-05):
    return tracer.emit(aten.batch_norm.default, input, weight, bias, running_mean, running_var, training, momentum, eps, False)


@lowers(F.normalize)
def normalize(tracer, input, p=2.0, dim=1, eps=1e-12, out=None):
    if out is not None:
        raise GiveUp("normalize(out=)")
    length = norm(tracer, input, p, dim, True)
    clamped = tracer.emit(aten.clamp_min.default, length, eps)
    return tracer.emit(aten.div.Tensor, input, tracer.emit(aten.expand_as.default, clamped, input))


@lowers(torch.norm, torch.Tensor.norm)
def norm(tracer, input, p="fro", dim=None, keepdim=False, out=None, dtype=None):
    if out is not None or dtype is not None or p not in ("fro", 2, 2.0, 1, 1.0):
        raise GiveUp(f"norm with p={p!r}")
    dims = dim if dim is None or isinstance(dim, (list, tuple)) else [dim]
    return tracer.emit(aten.linalg_vector_norm.default, input, 2.0 if p == "fro" else float(p), dims, keepdim)


# lists -----------------------------------------------------------------------------------------------------------------
@lowers(torch.einsum)
def einsum(tracer, equation, *operands):
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = operands[0]
    if not isinstance(equation, str):
        raise GiveUp("einsum in sublist format")
    return tracer.emit(aten.einsum.default, equation, list(operands))


@lowers(torch.split, torch.Tensor.split)
def split(tracer, tensor, split_size_or_sections=None, dim=0, split_size=None):
    sizes = split_size if split_size_or_sections is None else split_size_or_sections
    if isinstance(sizes, (list, tuple)):
        return tracer.emit(aten.split_with_sizes.default, tensor, list(sizes), *([dim] if dim != 0 else []))
    return tracer.emit(aten.split.Tensor, tensor, sizes, *([dim] if dim != 0 else []))


@lowers(torch.tensordot)
def tensordot(tracer, a, b, dims: Any = 2, out=None):
    if out is not None or isinstance(dims, torch.Tensor):
        raise GiveUp("tensordot(out=)")
    if type(dims) is int:
        if dims and tracer.rank(a) is None:
            raise GiveUp("tensordot by a count of dimensions, on a tensor of unknown rank")
        rank = tracer.rank(a) if dims else 0
        pairs = (list(range(rank - dims, rank)), list(range(dims)))
    else:
        pairs = dims
    left, right = ([each] if isinstance(each, int) else list(each) for each in pairs)
    return tracer.emit(aten.tensordot.default, a, b, left, right)


@lowers(F.one_hot)
def one_hot(tracer, tensor, num_classes=-1):
    if type(num_classes) is int and num_classes < 0:
        raise GiveUp("one_hot whose width depends on the largest id")
    return tracer.emit(aten.one_hot.default, tensor, num_classes)


@lowers(F.pad)
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
