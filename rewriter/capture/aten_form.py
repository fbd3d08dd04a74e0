"""The documented table: which torch calls the FX door lowers to ATen, and to which overloads.

``OVERLOADS`` names calls whose torch meaning is the ATen op of the same name; the overload is the first whose schema the
arguments fit, in the order given (as torch's own argument parser does). ``RENAMED`` maps other spellings onto those names.
Everything that needs more than a choice of overload is in ``aten_special.py``. A call on neither list is not captured.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F

from .value import NumberValue, SequenceValue

_POINTWISE = """
abs neg exp exp2 expm1 log log2 log10 log1p sqrt rsqrt square reciprocal sign floor ceil trunc sin cos tan tanh sigmoid erf
relu relu6 silu selu mish softplus log_sigmoid isnan isinf isfinite logical_not bitwise_not logical_and logical_or logical_xor
maximum minimum hardsigmoid hardswish atan2 sinh cosh asin acos atan frac logit
"""
OVERLOADS: dict[str, str] = {name: "default" for name in _POINTWISE.split()}
OVERLOADS.update({
    # arithmetic: "Tensor" takes a Python number too, as torch wraps it
    "add": "Tensor", "sub": "Tensor", "mul": "Tensor", "div": "Tensor Tensor_mode", "rsub": "Scalar Tensor",
    "floor_divide": "default", "remainder": "Scalar Tensor Scalar_Tensor", "fmod": "Scalar Tensor",
    "pow": "Tensor_Scalar Tensor_Tensor Scalar", "addcmul": "default", "addcdiv": "default", "lerp": "Scalar Tensor",
    "eq": "Scalar Tensor", "ne": "Scalar Tensor", "lt": "Scalar Tensor", "le": "Scalar Tensor", "gt": "Scalar Tensor",
    "ge": "Scalar Tensor", "bitwise_and": "Scalar Tensor", "bitwise_or": "Scalar Tensor", "bitwise_xor": "Scalar Tensor",
    "clamp": "default Tensor", "clamp_min": "default Tensor", "clamp_max": "default Tensor", "nan_to_num": "default",
    "gelu": "default", "elu": "default", "celu": "default", "leaky_relu": "default", "hardtanh": "default", "prelu": "default",
    "glu": "default", "where": "self ScalarOther ScalarSelf Scalar", "masked_fill": "Scalar Tensor",
    # matrices
    "linear": "default", "matmul": "default", "mm": "default", "bmm": "default", "mv": "default", "dot": "default",
    "outer": "default", "addmm": "default", "baddbmm": "default", "bilinear": "default", "tensordot": "default",
    "conv1d": "default", "conv2d": "default", "scaled_dot_product_attention": "default", "cosine_similarity": "default",
    # reductions
    "sum": "default dim_IntList", "mean": "default dim", "prod": "default dim_int", "max": "default dim other",
    "min": "default dim other", "amax": "default", "amin": "default", "argmax": "default", "argmin": "default",
    "all": "default dim", "any": "default dim", "logsumexp": "default", "cumsum": "default", "cumprod": "default",
    "std": "default dim correction", "var": "default dim correction", "count_nonzero": "default dim_IntList",
    "softmax": "int", "log_softmax": "int", "topk": "default", "sort": "default stable", "argsort": "default stable",
    "linalg_vector_norm": "default",
    # shapes
    "view": "default dtype", "reshape": "default", "flatten": "using_ints", "unflatten": "int", "transpose": "int",
    "permute": "default", "t": "default", "squeeze": "default dim dims", "unsqueeze": "default", "expand": "default",
    "expand_as": "default", "repeat": "default", "tile": "default", "repeat_interleave": "self_int self_Tensor",
    "chunk": "default", "split": "Tensor sizes", "split_with_sizes": "default", "unbind": "int", "narrow": "default",
    "select": "int", "cat": "default", "stack": "default", "hstack": "default", "vstack": "default", "flip": "default",
    "roll": "default", "tril": "default", "triu": "default", "diagonal": "default", "movedim": "intlist int",
    "swapaxes": "default", "ravel": "default", "clone": "default", "contiguous": "default", "detach": "default",
    # lookups by index
    "index_select": "default", "gather": "default", "take_along_dim": "default", "masked_select": "default",
    "scatter": "src value", "scatter_add": "default", "index_add": "default", "one_hot": "default", "bucketize": "Tensor",
    "searchsorted": "Tensor", "nonzero": "default", "constant_pad_nd": "default",
    # makers
    "zeros": "default", "ones": "default", "empty": "memory_format", "full": "default", "arange": "default start start_step",
    "rand": "default", "randn": "default", "zeros_like": "default", "ones_like": "default", "empty_like": "default",
    "full_like": "default", "rand_like": "default", "randn_like": "default", "bernoulli": "default p", "new_zeros": "default",
    "new_ones": "default", "new_empty": "default", "new_full": "default", "tril_indices": "default",
    "triu_indices": "default", "linspace": "default", "eye": "default m",
})
# other names of the same thing: torch spelling -> ATen name
RENAMED = {
    "concat": "cat", "concatenate": "cat", "multiply": "mul", "subtract": "sub", "divide": "div", "true_divide": "div",
    "absolute": "abs", "negative": "neg", "greater": "gt", "less": "lt", "greater_equal": "ge", "less_equal": "le",
    "not_equal": "ne", "clip": "clamp", "swapdims": "transpose", "swapaxes": "transpose", "moveaxis": "movedim", "arccos": "acos",
    "logsigmoid": "log_sigmoid", "__add__": "add", "__sub__": "sub", "__mul__": "mul", "__truediv__": "div", "__div__": "div",
    "__matmul__": "matmul", "__pow__": "pow", "__neg__": "neg", "__invert__": "bitwise_not", "__mod__": "remainder",
    "__eq__": "eq", "__ne__": "ne", "__lt__": "lt", "__le__": "le", "__gt__": "gt", "__ge__": "ge", "__and__": "bitwise_and",
    "__or__": "bitwise_or", "__xor__": "bitwise_xor", "__radd__": "add", "__rmul__": "mul", "__rsub__": "rsub",
    "__abs__": "abs", "__floordiv__": "floor_divide", "__iadd__": "add_", "__isub__": "sub_", "__imul__": "mul_",
    "__itruediv__": "div_", "__idiv__": "div_", "vector_norm": "linalg_vector_norm",
}
# methods and functions that take their list of ints also as separate arguments
VARARGS = {"view", "reshape", "permute", "expand", "repeat", "tile", "flip", "zeros", "ones", "empty", "rand", "randn",
           "new_zeros", "new_ones", "new_empty"}
# a Python number may stand where these take a tensor
WRAPS_NUMBERS = {"add", "sub", "mul", "div", "floor_divide"}
# not run at capture even where all their arguments are constants: the graph must draw anew each time
RANDOM = {"rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "bernoulli", "multinomial",
          "normal", "poisson", "uniform_", "normal_", "random_", "bernoulli_", "exponential_", "dropout", "empty", "empty_like"}
_IN_PLACE = ("add sub mul div relu sigmoid tanh exp log sqrt neg abs clamp clamp_min clamp_max masked_fill pow floor_divide "
             "remainder silu leaky_relu elu hardtanh relu6 square reciprocal floor ceil round").split()
_KEYWORDS = {"input": "self", "axis": "dim", "keepdims": "keepdim"}  # torch's (and numpy's) names -> the schema's


def overloads(name: str) -> list:
    """The ATen overloads to try for an entry of the table, in order; in-place names ("add_") follow their plain name."""
    plain = name[:-1] if name.endswith("_") else name
    if plain not in OVERLOADS or (plain != name and plain not in _IN_PLACE):
        return []
    packet = getattr(torch.ops.aten, name, None)
    return [getattr(packet, each) for each in OVERLOADS[plain].split() if each in packet.overloads()] if packet else []


def lowered(func, args: tuple, kwargs: dict) -> tuple | None:
    """(op, args, kwargs) for a call of an entry of the table, or None where no overload takes these arguments."""
    name = _NAMES.get(func)
    if name is None:
        return None
    if name in VARARGS and len(args) > 1 and all(_is(each, "int") for each in args[1:]):
        args = (args[0], list(args[1:]))
    if name in VARARGS and name in ("zeros", "ones", "empty", "rand", "randn") and args and _is(args[0], "int"):
        args = (list(args),) if len(args) == 1 else (list(args[:1]) + args[1],)
    kwargs = {_KEYWORDS.get(key, key): value for key, value in kwargs.items()}
    if kwargs.pop("out", None) is not None:
        return None
    if "_stacklevel" in kwargs:
        kwargs.pop("_stacklevel")
    for op in overloads(name):
        bound = bind(op, args, kwargs, name.rstrip("_") in WRAPS_NUMBERS)
        if bound is not None:
            return (op, *bound)
    return None


def bind(op, args: tuple, kwargs: dict, wraps: bool = False) -> tuple[tuple, dict] | None:
    """Arguments in the form the schema of ``op`` wants (trailing defaults left out), or None where they do not fit."""
    positional, keyword, left, extra = [], {}, dict(kwargs), list(args)
    for index, arg in enumerate(op._schema.arguments):
        if not arg.kwarg_only and extra:
            value = extra.pop(0)
            if arg.name in left:
                return None
        elif arg.name in left:
            value = left.pop(arg.name)
        elif arg.has_default_value():
            if not arg.kwarg_only:
                positional.append(arg.default_value)
            continue
        else:
            return None
        fitted = _fit(value, arg.real_type, wraps and index > 0, arg.N)
        if fitted is _NO:
            return None
        if arg.kwarg_only:
            if not (arg.has_default_value() and fitted is arg.default_value):
                keyword[arg.name] = fitted
        else:
            positional.append(fitted)
    if extra or left:
        return None
    plain = [arg for arg in op._schema.arguments if not arg.kwarg_only]
    while positional and plain[len(positional) - 1].has_default_value():
        default = plain[len(positional) - 1].default_value
        if type(positional[-1]) is not type(default) or positional[-1] != default:
            break
        positional.pop()
    return tuple(positional), keyword


_NO = object()


def _is(value, kind: str) -> bool:
    if type(value) is NumberValue:
        return value.kind == kind
    return type(value) is {"int": int, "float": float, "bool": bool}[kind]


def _fit(value, kind, wraps: bool, fixed_length=None):
    """``value`` as an argument of schema type ``kind``, or _NO."""
    text = str(kind)
    if text.startswith("Optional["):
        return None if value is None else _fit(value, kind.getElementType(), wraps, fixed_length)
    if text.startswith("List["):
        element = kind.getElementType()
        if isinstance(value, SequenceValue) and str(element) == "Tensor":
            return value
        if isinstance(value, (list, tuple)):
            items = [_fit(item, element, False) for item in value]
            return _NO if any(item is _NO for item in items) else items
        if fixed_length and not isinstance(value, torch.Tensor):
            item = _fit(value, element, False)
            return _NO if item is _NO else [item]
        return _NO
    number = any(_is(value, each) for each in ("int", "float", "bool"))
    if text == "Tensor":
        return value if isinstance(value, torch.Tensor) or (wraps and number) else _NO
    if text in ("int", "SymInt"):
        return value if _is(value, "int") else _NO
    if text == "float":
        return value if _is(value, "float") or _is(value, "int") else _NO
    if text in ("number", "Scalar"):
        return value if number else _NO
    if text == "bool":
        return value if _is(value, "bool") else _NO
    if text == "Device":
        return value if type(value) is torch.device or isinstance(value, str) or (
            type(value) is NumberValue and value.kind == "device") else _NO
    if text == "str":
        return value if isinstance(value, str) else _NO
    if text == "ScalarType":
        return value if type(value) is torch.dtype or (type(value) is NumberValue and value.kind == "dtype") else _NO
    if text in ("Layout", "MemoryFormat"):
        return value if isinstance(value, (torch.layout, torch.memory_format)) else _NO
    return _NO


def _names() -> dict:
    """Every torch function object of the table -> its ATen name."""
    names: dict = {}
    wanted = {name: name for name in OVERLOADS} | {f"{name}_": f"{name}_" for name in _IN_PLACE} | RENAMED
    places = (torch, torch.Tensor, F, torch.special, torch.linalg)
    for spelling, name in wanted.items():
        for place in places:
            function = getattr(place, spelling, None)
            if function is None or (place is F and spelling in _SPECIAL_IN_F):
                continue
            try:
                names.setdefault(function, name)
            except TypeError:
                continue
    return names


# these Python functions of torch.nn.functional have arguments of their own: see aten_special.py
_SPECIAL_IN_F = {"relu", "silu", "elu", "selu", "celu", "leaky_relu", "hardtanh", "relu6", "mish", "hardsigmoid", "hardswish",
                 "softmax", "log_softmax", "glu", "gumbel_softmax"}
_NAMES = _names()
