"""Fused multilayer perceptrons on a GPU, with the signatures and meanings of ``cpu.py``.

Each product of a layer with its weight, forward and backward, takes the layer's ``form``: "blas" is PyTorch's product (cuBLASLt, bias
included) and one kernel for what comes after it; the others are a Triton product that does all of it, in two tile shapes. In a
backward the product that makes the gradient of a layer's input also applies the mask of the layer below and sums the gradient of that
one's bias. Gradients of weights are BLAS products in every form. Triton products are for float16 and bfloat16.

Dropout's bits are drawn before the products, on a stream beside them. Nothing waits for the GPU.
"""

# Triton types what a kernel takes as constexpr.
# pyright: reportArgumentType=false
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from ..embedding.gpu_launch import on_device
from ..side_stream import beside
from . import reference
from .layers import Layer, words
from .triton_kernels import finish_kernel, keep_kernel, masked_kernel, product_kernel

# (tile rows, tile columns, depth of a step, warps, stages) of the Triton products; registers as tests/kernels/hopper.py reads them
TILES = {"square": (128, 128, 64, 8, 4), "wide": (128, 256, 64, 8, 3)}
FINISH_TILE = {"R": 8, "W": 8, "num_warps": 8}  # 2,048 values, 8 a thread
MASKED_TILE = {"R": 8, "W": 4, "STEPS": 16, "num_warps": 4}
_KEEP_BLOCK = 256
_HALF = (torch.float16, torch.bfloat16)


def product_options(form: str, drops: bool = False) -> dict:
    """What :data:`TILES` means for a launch; ``drops``: of a forward with dropout, whose epilogue spills at the wide tile."""
    m, n, k, warps, stages = TILES["square" if drops else form]
    return {"BM": m, "BN": n, "BK": k, "GROUP": 8, "num_warps": warps, "num_stages": stages}


def _own(x: Tensor, form: str) -> bool:
    """Is this product one for the Triton kernel?"""
    return form != "blas" and x.dtype in _HALF and x.numel() > 0


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()


def keep_bits(seed: Tensor, layer: int, rows: int, cols: int, p: float) -> Tensor:
    """Bits that are 1 with probability ``1 - p``, rounded to a multiple of 2**-16: int32 ``[rows, words(cols)]``, a function of the
    seed (int64 ``[1]``) and the layer's number alone."""
    bits = torch.empty(rows, words(cols), dtype=torch.int32, device=seed.device)
    _keep(seed, bits, layer, p)
    return bits


def _keep(seed: Tensor, bits: Tensor, layer: int, p: float) -> None:
    if bits.numel():
        threshold = round(p * 65536)
        with on_device(bits.device):
            keep_kernel[(triton.cdiv(bits.numel(), _KEEP_BLOCK),)](seed, bits, bits.numel(), layer, threshold, BLOCK=_KEEP_BLOCK)


def _product(a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None, bits: Tensor, sums: Tensor | None, layer: Layer, p: float, form: str) -> None:
    """``out = a @ b`` and what comes after it: see ``product_kernel``. ``layer``: the one whose mask ``bits`` is."""
    a = _rows(a)
    (m, k), n = a.shape, b.shape[1]
    options = product_options(form, drops=sums is None and p > 0)
    widen = a.device.type == "cpu" and a.dtype == torch.bfloat16
    grid = (triton.cdiv(m, options["BM"]) * triton.cdiv(n, options["BN"]),)
    with on_device(a.device):
        product_kernel[grid](
            a, b, out, out if bias is None else bias, bits, out if sums is None else sums, m, n, k, a.stride(0), b.stride(0), b.stride(1),
            bits.shape[1], 1 / (1 - p), BACKWARD=sums is not None, RELU=layer.relu, DROP=p > 0, BIASED=bias is not None,
            EVEN=k % options["BK"] == 0, WIDE=widen, **options,
        )  # fmt: skip


def _finish(y: Tensor, bits: Tensor, layer: Layer, p: float) -> None:
    rows, cols = y.shape
    if y.dtype not in (*_HALF, torch.float32):
        keep = reference.unpack(bits, cols) if p else None
        made, passed = reference.finish(y, layer, keep)
        y.copy_(made)
        bits.copy_(passed)
    elif y.numel():
        grid = (triton.cdiv(rows, FINISH_TILE["R"]), triton.cdiv(bits.shape[1], FINISH_TILE["W"]))
        with on_device(y.device):
            finish_kernel[grid](y, bits, rows, cols, bits.shape[1], 1 / (1 - p), RELU=layer.relu, DROP=p > 0, **FINISH_TILE)


def forward(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], layers: Sequence[Layer], train: Sequence[bool],
    seed: Tensor | None,
) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
    """(the result of each layer ``[rows, out]``, the mask of each layer that has one)."""
    rows = x.shape[0]
    chances = [layer.dropped(drops) for layer, drops in zip(layers, train)]
    shapes = [(rows, words(w.shape[0])) if layer.relu or p else None for layer, w, p in zip(layers, weights, chances)]
    bits = [None if shape is None else x.new_empty(shape, dtype=torch.int32) for shape in shapes]
    drawn = beside(x.device)
    if seed is not None:
        with drawn:
            for i, (p, mask) in enumerate(zip(chances, bits)):
                if mask is not None and p:
                    _keep(seed, mask, i, p)
    outs = []
    waits = seed is not None
    for layer, weight, bias, mask, p in zip(layers, weights, biases, bits, chances):
        if mask is None:
            x = torch.nn.functional.linear(x, weight, bias)
        elif _own(x, layer.form):
            if p and waits:
                waits = drawn.join()
            out = x.new_empty((rows, weight.shape[0]))
            _product(x, weight.t(), out, bias, mask, None, layer, p, layer.form)
            x = out
        else:
            x = torch.nn.functional.linear(x, weight, bias)
            if p and waits:
                waits = drawn.join()
            _finish(x, mask, layer, p)
        outs.append(x)
    return outs, [m for m in bits if m is not None]


def _masked(grad: Tensor, bits: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """(the gradient before ReLU and dropout, float32 sums of its columns in parts ``[row blocks, cols]``)."""
    rows, cols = grad.shape
    if grad.dtype not in (*_HALF, torch.float32) or grad.numel() == 0:
        made = reference.masked(grad, bits, p)
        return made, made.sum(0, keepdim=True)
    grad = _rows(grad)
    out = torch.empty(rows, cols, dtype=grad.dtype, device=grad.device)
    blocks = triton.cdiv(rows, MASKED_TILE["R"] * MASKED_TILE["STEPS"])
    sums = torch.empty(blocks, cols, dtype=torch.float32, device=grad.device)
    with on_device(grad.device):
        masked_kernel[(blocks, triton.cdiv(bits.shape[1], MASKED_TILE["W"]))](
            grad, grad.stride(0), bits, out, sums, rows, cols, bits.shape[1], 1 / (1 - p), **MASKED_TILE
        )
    return out, sums


def backward(
    grad: Tensor, x: Tensor, weights: Sequence[Tensor], outs: Sequence[Tensor], masks: Sequence[Tensor], layers: Sequence[Layer],
    train: Sequence[bool], wanted_x: bool, wanted: Sequence[tuple[bool, bool]],
) -> tuple[Tensor | None, list[tuple[Tensor | None, Tensor | None]]]:  # fmt: skip
    """See ``cpu.backward``."""
    given = iter(masks)
    mask_of = [next(given) if layer.masks(drops) else None for layer, drops in zip(layers, train)]
    top = mask_of[-1]
    sums = None
    if top is not None:
        grad, sums = _masked(grad, top, layers[-1].dropped(train[-1]))
    made: list[tuple[Tensor | None, Tensor | None]] = []
    for i in reversed(range(len(layers))):
        below = outs[i - 1] if i else x
        bias = None
        if wanted[i][1]:
            bias = grad.sum(0) if sums is None else sums.sum(0).to(grad.dtype)
        made.append((grad.t() @ below if wanted[i][0] else None, bias))
        if not (wanted_x or any(map(any, wanted[:i]))):
            made += [(None, None)] * i
            return None, made[::-1]
        mask = mask_of[i - 1] if i else None
        if mask is None:
            grad, sums = grad @ weights[i], None
            continue
        layer, p = layers[i - 1], layers[i - 1].dropped(train[i - 1])
        if _own(grad, layers[i].form):
            out = grad.new_empty((grad.shape[0], weights[i].shape[1]))
            blocks = triton.cdiv(grad.shape[0], product_options(layers[i].form)["BM"])
            sums = torch.empty(blocks, weights[i].shape[1], dtype=torch.float32, device=grad.device)
            _product(grad, weights[i], out, None, mask, sums, layer, p, layers[i].form)
            grad = out
        else:
            grad, sums = _masked(grad @ weights[i], mask, p)
    return grad, made[::-1]
