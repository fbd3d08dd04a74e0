"""GRU layers of float32 on CPU: products of ``dense/gemm.py``, and between them one pass over memory a step in C++ (native/).

    r = sigmoid(W_r x + b_r + U_r h + c_r)    z = sigmoid(W_z x + b_z + U_z h + c_z)
    n = tanh(W_n x + b_n + r * (U_n h + c_n))    h' = n + z * (h - n)

The products of ``x`` are one for all steps, and so are the weights' gradients. Everything a layer keeps lies step by step, whichever
dimension the caller's steps are.
"""
from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..dense import gemm
from ..native_library import load
from ..small_products import cpu as small

_lib, _why_not = load(Path(__file__).parent, "twg_abi", 1)
if _lib is not None:
    _word, _pointer = ctypes.c_int64, ctypes.c_void_p
    _lib.twg_forward.restype = _lib.twg_backward.restype = None
    _lib.twg_forward.argtypes = [_word, _word, _pointer, _word, _pointer, _pointer, _pointer, _pointer, _word, _pointer]
    _lib.twg_backward.argtypes = [_word, _word, _pointer, _word, *[_pointer] * 5, _word, _pointer]

Kept = tuple[Tensor, Tensor]  # of a layer: its h before each step and after the last [steps + 1, batch, dim], r, z, n, U_n h + c_n [steps, batch, 4 dim]


def describe() -> str:
    """What does the work, in a few words: for reports and bug reports."""
    return "native" if _lib is not None else f"PyTorch's GRU: {_why_not}"


def available() -> bool:
    """Is the library there?"""
    return _lib is not None


def forward(x: Tensor, hx: Tensor, layers: Sequence[Sequence[Tensor]], batch_first: bool) -> tuple[Tensor, list[Kept]]:
    """(the last layer's h of every step, what :func:`backward` reads of each layer). ``x`` ``[steps, batch, in]``, or ``[batch, steps, in]`` where
    ``batch_first``, ``hx`` ``[layers, batch, dim]``; a layer: W ``[3 dim, in]``, U ``[3 dim, dim]`` and maybe b and c ``[3 dim]``. No size may be 0."""
    kept: list[Kept] = []
    out = x
    for i, (w, u, *biases) in enumerate(layers):
        b, c = biases or (None, None)
        of_x = _steps(gemm.linear(out, w, b), batch_first and i == 0)
        steps, batch, dim = len(of_x), of_x.shape[1], u.shape[1]
        states, gates = x.new_empty(steps + 1, batch, dim), x.new_empty(steps, batch, 4 * dim)
        states[0] = hx[i]
        copied = _steps(x.new_empty(batch, steps, dim), True) if batch_first and i + 1 == len(layers) else states[1:]
        for t in range(steps):
            of_h, step = gemm.linear(states[t], u, c), of_x[t]
            _lib.twg_forward(  # type: ignore[union-attr]
                batch, dim, step.data_ptr(), step.stride(0), of_h.data_ptr(), states[t].data_ptr(), states[t + 1].data_ptr(),
                copied[t].data_ptr(), copied.stride(1), gates[t].data_ptr(),
            )  # fmt: skip
        kept.append((states, gates))
        out = copied
    return _steps(out, batch_first), kept


def backward(
    grad: Tensor | None, last: Tensor | None, x: Tensor, layers: Sequence[Sequence[Tensor]], kept: Sequence[Kept], batch_first: bool, wants_x: bool
) -> tuple[Tensor | None, Tensor, list[list[Tensor]]]:
    """The gradients of ``x`` (if wanted), of ``hx`` and of each layer's parameters; ``grad`` of the result, ``last`` of each layer's last h."""
    out = None if grad is None else _steps(grad, batch_first)
    of_hx, made = x.new_empty(len(layers), *kept[0][0].shape[1:]), []
    for i in reversed(range(len(layers))):
        (w, u, *biases), (states, gates), turned = layers[i], kept[i], batch_first and i == 0
        steps, batch, dim = len(gates), gates.shape[1], u.shape[1]
        out = out if out is None or out.stride(2) == 1 else out.contiguous()
        of_x = x.new_empty((batch, steps, 3 * dim) if turned else (steps, batch, 3 * dim))
        of_h, by_step = x.new_empty(steps, batch, 3 * dim), _steps(of_x, turned)
        carried = x.new_zeros(batch, dim) if last is None else last[i].clone(memory_format=torch.contiguous_format)
        back = x.new_zeros(batch, dim)
        for t in reversed(range(steps)):
            _lib.twg_backward(  # type: ignore[union-attr]
                batch, dim, None if out is None else out[t].data_ptr(), 0 if out is None else out.stride(1), carried.data_ptr(), back.data_ptr(),
                gates[t].data_ptr(), states[t].data_ptr(), by_step[t].data_ptr(), by_step.stride(1), of_h[t].data_ptr(),
            )  # fmt: skip
            back = _through(of_h[t], u)
        of_hx[i] = carried + back
        given = x if i == 0 else kept[i - 1][0][1:]
        sums = [gemm.bias_gradient(g, g.dtype) for g in (of_x, of_h)] if biases else []
        made.append([gemm.weight_gradient(of_x, given), gemm.weight_gradient(of_h, states[:-1]), *sums])
        out = _through(of_x, w) if i or wants_x else None
    return out, of_hx, made[::-1]


def _steps(values: Tensor, turned: bool) -> Tensor:
    return values.transpose(0, 1) if turned else values


def _through(grad: Tensor, weight: Tensor) -> Tensor:
    """``grad @ weight``, contiguous."""
    rows = grad.view(1, -1, grad.shape[-1])
    if torch.get_num_threads() == 1 and small.serves(rows, weight.unsqueeze(0)):
        return small.product(rows, weight.unsqueeze(0)).view(*grad.shape[:-1], weight.shape[1])
    return gemm.input_gradient(grad, weight).contiguous()
