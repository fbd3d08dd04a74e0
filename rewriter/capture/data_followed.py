"""Tracing one way through a forward() whose Python looks at data: lengths, ``if mask.any()``, packed sequences.

``torch.export`` can carry real values along with its fake tensors; where Python asks for a number, a branch or a size that only
data decides, the sample's answer is taken and an assertion of it goes into the graph (``data_guard.py`` is what they mean when it
runs). This module is what export lacks for that: packed sequences, and tensors that stand where a number is meant.
"""
from __future__ import annotations

import logging
from contextlib import contextmanager

import torch
import torch._functorch.config  # noqa: F401  (not loaded by ``import torch``)
from torch import fx, nn
from torch._dynamo.source import ConstantSource
from torch._subclasses import meta_utils
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, free_unbacked_symbols
from torch.utils import _pytree as pytree

from ..errors import CaptureError, explain
from .traced_builtins import TracedCalls

aten = torch.ops.aten
SIZED_BY_DATA = "tablewright_sized_by_data"  # in the meta of nodes whose fake form cannot be made again
_MOST = 1 << 31  # bytes of parameters and buffers, all of which export copies to have values
_RNN = "(Tensor data, Tensor batch_sizes, {} hx, Tensor[] params, bool has_biases, int layers, float dropout, bool train, bool both)"
_TWO = " -> (Tensor, Tensor)"
# For the time of a trace: the fake forms of these ATen ops look at their data, or, of the last, have a size that cannot be symbolic.
_STAND_INS = {
    "gru": (aten.gru.data, _RNN.format("Tensor") + _TWO), "rnn_tanh": (aten.rnn_tanh.data, _RNN.format("Tensor") + _TWO),
    "rnn_relu": (aten.rnn_relu.data, _RNN.format("Tensor") + _TWO),
    "lstm": (aten.lstm.data, _RNN.format("Tensor[]") + " -> (Tensor, Tensor, Tensor)"),
    "_pack_padded_sequence": (aten._pack_padded_sequence.default, "(Tensor input, Tensor lengths, bool batch_first)" + _TWO),
    "_pad_packed_sequence": (aten._pad_packed_sequence.default,
                             "(Tensor data, Tensor batch_sizes, bool batch_first, Scalar padding_value, SymInt total_length)" + _TWO),
}


def _rows(data, batch_sizes, hx, params, has_biases, layers, dropout, train, both):
    state = hx if isinstance(hx, torch.Tensor) else hx[0]
    return data.new_empty(data.shape[0], state.shape[-1] * (2 if both else 1))


def _fake_rnn(*args):
    return _rows(*args), torch.empty_like(args[2])


def _fake_lstm(*args):
    return _rows(*args), torch.empty_like(args[2][0]), torch.empty_like(args[2][1])


def _fake_pack(input, lengths, batch_first):
    context = torch.library.get_ctx()
    rows, steps = context.new_dynamic_size(min=1), context.new_dynamic_size(min=1)
    return input.new_empty(rows, *input.shape[2:]), torch.empty(steps, dtype=torch.int64)


def _fake_pad(data, batch_sizes, batch_first, padding_value, total_length):
    sequences = torch.library.get_ctx().new_dynamic_size(min=1)
    leading = (sequences, total_length) if batch_first else (total_length, sequences)
    return data.new_empty(*leading, *data.shape[1:]), torch.empty(sequences, dtype=torch.int64)


_FAKES = {"lstm": _fake_lstm, "_pack_padded_sequence": _fake_pack, "_pad_packed_sequence": _fake_pad}
_library = torch.library.Library("tablewright_capture", "DEF")
_CALLS: dict = {}  # torch's own function -> the op that stands for it
AS_ATEN: dict = {}  # that op -> what it is in the graph
for _name, (_op, _schema) in _STAND_INS.items():
    _library.define(_name + _schema)
    _library.impl(_name, _op, "CompositeExplicitAutograd")
    torch.library.register_fake(f"tablewright_capture::{_name}", _FAKES.get(_name, _fake_rnn))
    _CALLS[getattr(torch._VF, _name)] = getattr(torch.ops.tablewright_capture, _name).default
    AS_ATEN[getattr(torch.ops.tablewright_capture, _name).default] = _op

_MAKERS = {getattr(place, name) for place, names in {
    torch: "zeros ones empty full rand randn arange", torch.Tensor: "new_zeros new_ones new_empty new_full view reshape expand narrow "
    "repeat split chunk"}.items() for name in names.split()}  # fmt: skip


class FollowsData(TracedCalls):
    """Also: packed sequences become ops that know their shapes, and a tensor that means a number is read as one."""

    def called(self, func, args: tuple, kwargs: dict):
        if (op := _CALLS.get(func)) is not None and _is_packed(func, args):
            return op(*args)
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            args = (args[0], _bounds(args[0], args[1]), *args[2:])
        elif func in _MAKERS:
            own = args[:1] if args and func not in _TORCH_MAKERS else ()
            args, kwargs = (*own, *_numbers(args[len(own):])), _numbers(kwargs)
        return super().called(func, args, kwargs)


_TORCH_MAKERS = {each for each in _MAKERS if not hasattr(each, "__objclass__")}


def _is_packed(func, args: tuple) -> bool:
    """Whether it is the overload that takes ``batch_sizes``."""
    return func.__name__.startswith("_") or len(args) == 9 and isinstance(args[3], (list, tuple))


def _number(value):
    return value.item() if isinstance(value, torch.Tensor) and value.dim() == 0 and not value.dtype.is_floating_point else value


def _numbers(value):
    return pytree.tree_map(_number, value)


def _bounds(tensor, index):
    """``index`` with the bounds of slices as numbers, of which it is asserted that they lie within ``tensor``, as the sample's do:
    a size like min(max(u, 0), n) - ... would leave nothing to say about what comes after."""
    if not isinstance(index, tuple):
        return _bounds(tensor, (index,))[0]
    found = []
    for dim, each in enumerate(index):
        if isinstance(each, slice):
            each = slice(*map(_number, (each.start, each.stop, each.step)))
            if all(isinstance(before, (int, slice, torch.SymInt)) for before in index[:dim]):
                _within(each, tensor.shape[dim])
        found.append(each)
    return tuple(found)


def _within(bounds: slice, size) -> None:
    start = 0 if bounds.start is None else bounds.start
    for bound in (bounds.start, bounds.stop):
        if isinstance(bound, torch.SymInt) and not (bound >= 0 and bound <= size):
            return
    if isinstance(bounds.stop, torch.SymInt):
        bool(start <= bounds.stop)


@contextmanager
def _mended():
    """Export leaves parameters (a class of their own) without values, and compares what fake and real ops give, by which it takes
    the offsets of the sample's views for constants. It warns of every value that it looks at. Before 2.13 it takes a truth value for a
    number, and the assertion of it for one that can never hold, which it then leaves out."""
    log = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level = log.level
    log.setLevel(logging.ERROR)
    check = "_maybe_infer_fake_kernel_from_pytree_out"
    before = getattr(FakeTensorMode, check), meta_utils._safe_copy, ShapeEnv.set_real_tensor_prop_unbacked_vals
    setattr(FakeTensorMode, check, lambda self, func, fake_in, real_in, fake_out, real_out: fake_out)
    meta_utils._safe_copy = lambda to, data: to.copy_(data) if isinstance(data, torch.Tensor) else None

    def keep(env: ShapeEnv, what, value) -> None:
        before[2](env, what, value if what.is_symbol else bool(value))

    ShapeEnv.set_real_tensor_prop_unbacked_vals = keep
    try:
        yield
    finally:
        ShapeEnv.set_real_tensor_prop_unbacked_vals = before[2]
        setattr(FakeTensorMode, check, before[0])
        meta_utils._safe_copy = before[1]
        log.setLevel(level)


@contextmanager
def values_known(shell: nn.Module):
    """For its body, export carries real values."""
    size = sum(each.numel() * each.element_size() for each in [*shell.parameters(), *shell.buffers()])
    if size > _MOST:
        raise CaptureError(explain("the model's Python looks at data", why=f"to follow it, its parameters are copied, and these are "
                                   f"{size / 2**30:.1f} GiB", fix="capture the model with smaller tables, or write it without looking at data"))
    with torch._functorch.config.patch(fake_tensor_propagate_real_tensors=True), _mended():
        yield


def check_asserted(graph: fx.Graph) -> None:
    """Raises CaptureError where Python asked for a truth value and nothing in ``graph`` asserts what it was told."""
    for node in graph.nodes:
        asked = node.meta.get("val") if node.target is aten.item.default else None
        if isinstance(asked, torch.SymBool) and not any(asked.node.shape_env.deferred_runtime_asserts.get(u) for u in asked.node._expr.free_symbols):
            raise CaptureError(explain(
                "the way that the sample takes through forward() cannot be held on to", why=f"torch.export asserts nothing of {node.args[0]}, "
                "which Python asked for", fix="take the decision outside forward(), or write it with torch.where or a mask"))


def forget_values(graph: fx.Graph) -> None:
    """Let go of the real values: with them whoever runs ``graph`` on its fake tensors would run its kernels too, and copy every table."""
    for node in graph.nodes:
        for value in pytree.tree_leaves(node.meta.get("val")):
            if isinstance(value, FakeTensor):
                value.real_tensor = None
                value.fake_mode.propagate_real_tensors = False
                converter = value.fake_mode.fake_tensor_converter.meta_converter
                converter.copy_data = converter.describer.copy_data = False


def name_sizes(node: fx.Node, sizes: dict) -> None:
    """For passes to read, a size in ``node``'s value that data decides becomes one like an input's, the same for equal expressions
    (``sizes``, by expression). Without a value where there is nothing to say."""
    value = node.meta.get("val")
    if value is None or not free_unbacked_symbols(value):
        return
    node.meta[SIZED_BY_DATA] = True
    node.meta.pop("val")
    if not isinstance(value, FakeTensor):
        return

    def size(each):
        if not free_unbacked_symbols(each):
            return each
        expression, env = each.node.expr, each.node.shape_env
        if expression not in sizes:
            hint = int(expression.xreplace(env.real_tensor_prop_unbacked_vals).xreplace(env.backed_var_to_val))
            source = ConstantSource(f"size_of_data_{len(sizes)}")
            symbol = env.create_symbol(hint, source, DimDynamic.DYNAMIC, None, do_not_specialize_zero_one=True)
            sizes[expression] = env.create_symintnode(symbol, hint=hint, source=source)
        return sizes[expression]

    try:
        shape = [size(each) for each in value.shape]
        with value.fake_mode:
            node.meta["val"] = torch.empty(shape, dtype=value.dtype, device=value.device)
    except TypeError:  # a size whose value is not known
        return
