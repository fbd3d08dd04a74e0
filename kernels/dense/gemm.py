"""Matrix products of a linear layer on CPU: PyTorch's BLAS, or where the product is large enough for it oneDNN or the package's own: of
float32 on one thread (``native.py``), of bfloat16 on any number (``bf16.py``).

Where activations are bfloat16 or float16, a weight and its bias may be float32: they count as rounded to the activations' dtype, and
their gradients are float32.

PyTorch sends fp32 products to MKL, whose code for processors that are not Intel's stops at AVX2. The oneDNN that PyTorch also
carries uses AVX-512 on all of them. Measured on an AMD EPYC (Zen 5), torch 2.13, one thread, batch 2048, forward + backward:
13->512 3.0 -> 0.9 ms, 256->64 2.6 -> 1.5, 512->256 17.5 -> 8.9, 479->1024 67 -> 32, 1024->1024 132 -> 64; below
1.5 million multiply-adds MKL's shorter way in wins. Whether oneDNN wins on the machine at hand is for the pass to measure
(``passes/dense_chains.py``): on an Intel processor both run AVX-512.

Only the products go to oneDNN. Its fused activations are not used: its relu turns NaN into 0.
"""
from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..small_products import cpu as small
from . import bf16, gradient_places, native

_BLOCK = 512  # rows of a weight gradient that are summed at a time
LEAST_WORK = 1_500_000  # multiply-adds below which a call of oneDNN costs more than it saves

_has_onednn = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # Of columns of a wider matrix, say, or one row for all, oneDNN makes the product value by value: 750 ms instead of 0.5.
    if not weight.is_contiguous() and not weight.t().is_contiguous():
        weight = weight.contiguous()
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def onednn_serves(x: Tensor, weight: Tensor) -> bool:
    """Is the product of ``x`` ``[*, in]`` and ``weight`` ``[out, in]`` one that oneDNN is asked for?"""
    return (
        _has_onednn and torch.backends.mkldnn.enabled and x.dtype == weight.dtype == torch.float32 and x.is_cpu and weight.is_cpu
        and weight.dim() == 2 and x.numel() * weight.shape[0] >= LEAST_WORK
    )  # fmt: skip


def _is_long(rows: int, values: int) -> bool:
    """Is a weight gradient a sum of so many rows for so few values that oneDNN's packing costs more than its product saves?
    (57344 rows, 16->25: 0.7 ms with BLAS, 1.6 with oneDNN; 40960 rows, 32->32: 1.2 and 1.8; equal at 64->32.)"""
    return rows >= 8192 and values <= 1024


def _is_narrow(grad: Tensor, x: Tensor) -> bool:
    """Is a weight gradient ``[out, in]`` few values, each a sum over many rows, that :func:`_narrow` makes?"""
    (rows, out), fan_in = grad.shape, x.shape[1]
    if rows < 1024 or not (rows >= 8192 or min(out, fan_in) >= 4) or not 0 < out * fan_in <= 1 << 14 or max(out, fan_in) > small.WIDEST:
        return False
    return grad.dtype == x.dtype == torch.float32 and grad.is_cpu and x.is_cpu and small.available() and _is_plain(grad) and _is_plain(x)


def _narrow(grad: Tensor, x: Tensor) -> Tensor:
    """``grad.T @ x`` as products of ``_BLOCK`` rows each, which are then added up: whole sums stay in registers, where BLAS packs both operands.
    The right operand is the one that fills vector registers better. One thread, AMD EPYC (Zen 5): 57344 rows 10->40 3.2 -> 0.26 ms, 40960 rows
    64->16 1.3 -> 0.42, 4096 rows 10->32 0.15 -> 0.03, 2048 rows 64->32 0.094 -> 0.052; its sums are the more accurate ones, too."""
    if x.shape[1] * -(-grad.shape[1] // 16) < grad.shape[1] * -(-x.shape[1] // 16):
        return _narrow(x, grad).t().contiguous()
    whole = len(x) // _BLOCK * _BLOCK
    blocks = (t[:whole].unflatten(0, (-1, _BLOCK)) for t in (grad, x))
    made = small.product(next(blocks).mT, next(blocks)).sum(0)
    return made if whole == len(x) else made.add_(small.product(grad[whole:].t().unsqueeze(0), x[whole:].unsqueeze(0))[0])


def _native_serves(x: Tensor, weight: Tensor, cols: int) -> bool:
    """Is a product of these two (which oneDNN could make) with ``cols`` columns one for the native library? It reads addresses, so both
    must be plain tensors."""
    return cols >= native.LEAST_COLUMNS and native.available() and _is_plain(x) and _is_plain(weight)


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, torch.nn.Parameter) and not tensor.is_neg() and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def matched(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Weight and bias in the dtype in which they meet ``x``: float32 ones in that of a lower ``x``. Autograd knows the cast."""
    if x.dtype in (torch.bfloat16, torch.float16):
        weight = weight.to(x.dtype) if weight.dtype == torch.float32 else weight
        bias = bias.to(x.dtype) if bias is not None and bias.dtype == torch.float32 else bias
    return weight, bias


def _bf16_serves(x: Tensor, weight: Tensor, work: int, cols: int, depth: int = 0) -> bool:
    """Is a product of bfloat16 ``x`` with ``weight`` one for ``bf16.py``: of so many multiply-adds, ``cols`` columns, and ``depth`` where the result is
    bfloat16?"""
    return (
        x.dtype == torch.bfloat16 and weight.dtype in (torch.bfloat16, torch.float32) and x.is_cpu and weight.is_cpu
        and work >= LEAST_WORK and cols >= bf16.LEAST_COLUMNS and depth <= bf16.MOST_DEPTH
        and bf16.available() and _is_plain(x) and _is_plain(weight)
    )  # fmt: skip


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool = False) -> Tensor:
    """``x @ weight.T + bias``, then ReLU if asked: ``[*, in]``, ``[out, in]``, ``[out]`` -> ``[*, out]``, contiguous and fresh."""
    if weight.dim() == 2 and _bf16_serves(x, weight, x.numel() * weight.shape[0], *weight.shape):
        out = bf16.product(x.reshape(-1, x.shape[-1]), weight.t(), bias, relu)
        return out if x.dim() == 2 else out.view(*x.shape[:-1], out.shape[1])
    weight, bias = matched(x, weight, bias)
    if not onednn_serves(x, weight):
        out = F.linear(x, weight, bias)
    elif _native_serves(x, weight, weight.shape[0]) and (bias is None or bias.dtype == x.dtype):
        out = native.product(x.reshape(-1, x.shape[-1]), weight.t(), bias, relu)
        return out if x.dim() == 2 else out.view(*x.shape[:-1], out.shape[1])
    else:
        out = _onednn(x, weight, bias)
    return out.relu_() if relu else out


def input_gradient(grad: Tensor, weight: Tensor, again: bool = False) -> Tensor:
    """``grad @ weight``: ``[*, out]``, ``[out, in]`` -> ``[*, in]``. ``again``: as an op that autograd can differentiate again."""
    if not again and _bf16_serves(grad, weight, grad.numel() * weight.shape[1], *weight.shape[::-1]):
        return bf16.product(grad.reshape(-1, grad.shape[-1]), weight).view(*grad.shape[:-1], weight.shape[1])
    weight, _ = matched(grad, weight)
    if again or not onednn_serves(grad, weight.t()):
        return grad @ weight
    if _native_serves(grad, weight, weight.shape[1]):
        return native.product(grad.reshape(-1, grad.shape[-1]), weight).view(*grad.shape[:-1], weight.shape[1])
    return _onednn(grad, weight.t(), None)


def relu_input_gradient(grad: Tensor, weight: Tensor, out: Tensor) -> tuple[Tensor, Tensor] | None:
    """:func:`relu_gradient` of :func:`input_gradient` and ``out`` ``[*, in]``, in one pass; ``None`` where there is no such pass."""
    if not (onednn_serves(grad, weight.t()) and _native_serves(grad, weight, weight.shape[1]) and _is_plain(out)):
        return None
    if out.dtype != torch.float32 or not out.is_contiguous():
        return None
    made, sums = native.masked_product(grad.reshape(-1, grad.shape[-1]), weight, out.view(-1, out.shape[-1]))
    return made.view(out.shape), sums


def weight_gradient(grad: Tensor, x: Tensor, again: bool = False, dtype: torch.dtype | None = None, weight: Tensor | None = None) -> Tensor:
    """``grad.T @ x`` over all leading dimensions: ``[*, out]``, ``[*, in]`` -> ``[out, in]``, contiguous. ``again``: see above. ``dtype``: of the
    result, the weight's; grad's if not given. ``weight``: whose gradient it is, which may have a place (``gradient_places.py``)."""
    grad, x, dtype = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1]), dtype or grad.dtype
    if not again and x.dtype == grad.dtype and _bf16_serves(grad, x, grad.shape[1] * x.numel(), x.shape[1]):
        return bf16.product(grad.t(), x, dtype=torch.float32).to(dtype)
    if not again and x.dtype == grad.dtype and _bf16_serves(grad, x, grad.shape[1] * x.numel(), grad.shape[1]):
        return bf16.product(x.t(), grad, dtype=torch.float32).t().to(dtype, memory_format=torch.contiguous_format)
    return _weight_gradient(grad, x, again, weight).to(dtype)


def _weight_gradient(grad: Tensor, x: Tensor, again: bool, weight: Tensor | None) -> Tensor:
    if not again and _is_narrow(grad, x):
        return _narrow(grad, x)
    if again or not onednn_serves(grad.t(), x.t()) or _is_long(len(x), x.shape[1] * grad.shape[1]):
        return grad.t() @ x
    if _native_serves(grad, x, x.shape[1]):
        return native.product(grad.t(), x, out=None if weight is None else gradient_places.taken(weight))
    # oneDNN wants its first operand contiguous, which here means a transposed copy: of the narrower one.
    if 2 * x.shape[1] <= grad.shape[1]:
        return _onednn(x.t(), grad.t(), None).t().contiguous()
    return _onednn(grad.t(), x.t(), None)


def bias_gradient(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum of ``grad`` ``[*, out]`` over all leading dimensions, in ``dtype``."""
    return grad.reshape(-1, grad.shape[-1]).sum(0, dtype=dtype)


def relu_gradient(grad: Tensor, out: Tensor) -> tuple[Tensor, Tensor] | None:
    """(the gradient of ReLU's input, its sum over all but the last dimension) in one pass, from that of the result and the result; ``None``
    where there is no such pass, and the caller makes them."""
    if grad.dtype != torch.float32 or out.dtype != torch.float32 or not (grad.is_cpu and out.is_cpu and out.is_contiguous() and out.numel()):
        return None
    if not (native.available() and _is_plain(grad) and _is_plain(out)):
        return None
    made, sums = native.masked(grad.reshape(-1, grad.shape[-1]), out.view(-1, out.shape[-1]))
    return made.view(out.shape), sums


def linear_and_bits(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """(:func:`linear` with ReLU of ``x`` ``[rows, in]``, which values ReLU passes as bits) in one product; ``None`` where there is none that makes both.
    Bits: int32 ``[rows, ceil(out / 32)]``."""
    if not _bf16_serves(x, weight, x.numel() * weight.shape[0], *weight.shape):
        return None
    return bf16.relu_product(x, weight.t(), bias)


def masked_input_gradient(grad: Tensor, weight: Tensor, bits: Tensor, scale: float) -> tuple[Tensor, Tensor] | None:
    """(:func:`input_gradient` of ``grad`` ``[rows, out]`` times ``scale`` where the bit is set and else 0, its sum over the rows in float32) in one
    product; ``None`` as above."""
    work = max(grad.numel(), 16 * len(grad)) * weight.shape[1]  # with the passes over the result that a lone product would leave
    if not grad.numel() or not _bf16_serves(grad, weight, work, *weight.shape[::-1]):
        return None
    return bf16.masked_product(grad, weight, bits, scale)
