"""Dropout on CPU in C++ (native/), with the draws of torch's own generator: same seed, same values, same state afterwards.

torch draws one value at a time (8 ns each); the library makes the generator's words a block at a time (0.5 ns a value with AVX-512).
It reads and sets the state of ``torch.default_generator`` as ``torch.get_rng_state`` shows it. Other builds of PyTorch (on Intel
processors, where MKL draws) have another stream, so :func:`available` compares the two before anything relies on it.
"""
from __future__ import annotations

import ctypes
import functools
import math
from pathlib import Path

import torch
from torch import Tensor

from ..native_library import load

_LEVELS = ("baseline", "AVX2", "AVX-512")  # of twd_level()
_STATE_BYTES = 5056  # of torch.Generator.get_state(): what native/abi.h calls GeneratorState, and the normal distribution's spare

_lib, _why_not = load(Path(__file__).parent, "twd_abi", 3)
if _lib is not None:
    _word, _pointer = ctypes.c_int64, ctypes.c_void_p
    _lib.twd_level.restype, _lib.twd_level.argtypes = _word, [_word]
    _lib.twd_dropout.restype = _lib.twd_back.restype = _lib.twd_finish.restype = _lib.twd_masked.restype = None
    _lib.twd_dropout.argtypes = [_pointer, _pointer, _pointer, _pointer, _word, ctypes.c_uint64, ctypes.c_double]
    _lib.twd_back.argtypes = [_pointer, _pointer, _pointer, _word, ctypes.c_double, _word]
    _lib.twd_finish.argtypes = [*[_pointer] * 3, *[_word] * 4, ctypes.c_uint64, ctypes.c_double, _word]
    _lib.twd_masked.argtypes = [*[_pointer] * 3, *[_word] * 3, ctypes.c_double, _word]


def describe() -> str:
    """What does the work, in a few words: for reports and bug reports."""
    return f"pure PyTorch: {_why_not}" if _lib is None else f"native {_LEVELS[_lib.twd_level(-1)]}"


@functools.cache
def available() -> bool:
    """Is the library there, and are its draws the ones this PyTorch makes?"""
    if _lib is None:
        return False
    ours, torchs = torch.Generator(), torch.Generator()
    for generator in (ours, torchs):
        generator.manual_seed(20261122)
        torch.rand(7, generator=generator)
    ones = torch.ones(1501)
    if ours.get_state().numel() != _STATE_BYTES:
        return False
    for p in (0.5, 0.2):
        plain = torch.empty_like(ones).bernoulli_(1 - p, generator=torchs).div_(1 - p)
        same = torch.equal(dropout(ones, p, ours)[0], plain) and torch.equal(ours.get_state(), torchs.get_state())
        if not same:
            return False
    return True


def serves(x: Tensor, p: float) -> bool:
    """May :func:`dropout` take ``x``: float32 on CPU, contiguous, not empty, ``0 < p < 1``?"""
    return x.is_cpu and x.dtype == torch.float32 and x.is_contiguous() and x.numel() > 0 and 0 < p < 1


def dropout(x: Tensor, p: float, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """``x`` with each value set to 0 with probability ``p`` and else divided by ``1 - p``; and which were kept (uint8)."""
    generator = torch.default_generator if generator is None else generator
    state = generator.get_state()
    out, kept = torch.empty_like(x), torch.empty(x.shape, dtype=torch.uint8)
    limit, scale = math.ceil((1 - p) * 2.0**53), scale_of(p)
    _lib.twd_dropout(state.data_ptr(), x.data_ptr(), out.data_ptr(), kept.data_ptr(), x.numel(), limit, scale)
    generator.set_state(state)
    return out, kept


def gradient(grad: Tensor, kept: Tensor, p: float) -> Tensor:
    """The gradient of the input, from that of the result."""
    grad = grad.contiguous()
    out = torch.empty_like(grad)
    _lib.twd_back(grad.data_ptr(), kept.data_ptr(), out.data_ptr(), grad.numel(), scale_of(p), torch.get_num_threads())
    return out


def finish(y: Tensor, relu: bool, p: float) -> Tensor:
    """ReLU if asked, then dropout if ``p > 0``, in place on ``y`` ``[rows, cols]`` (float32 or bfloat16, contiguous), with
    torch's draws.

    Returns which values pass their gradient on, as bits: int32 ``[rows, ceil(cols / 32)]``."""
    rows, cols = y.shape
    bits = torch.empty(rows, -(-cols // 32), dtype=torch.int32)
    state = torch.default_generator.get_state() if p else None
    limit, scale, half = math.ceil((1 - p) * 2.0**53), scale_of(p, y.dtype), y.dtype == torch.bfloat16
    pointer = None if state is None else state.data_ptr()
    _lib.twd_finish(pointer, y.data_ptr(), bits.data_ptr(), rows, cols, half, relu, limit, scale, torch.get_num_threads())
    if state is not None:
        torch.default_generator.set_state(state)
    return bits


def masked(grad: Tensor, bits: Tensor, p: float) -> Tensor:
    """``grad / (1 - p)`` where the bit of :func:`finish` is set, else 0; ``grad`` ``[rows, cols]`` float32 or bfloat16."""
    grad = grad.contiguous()
    out, half, scale = torch.empty_like(grad), grad.dtype == torch.bfloat16, scale_of(p, grad.dtype)
    _lib.twd_masked(grad.data_ptr(), bits.data_ptr(), out.data_ptr(), *grad.shape, half, scale, torch.get_num_threads())
    return out


@functools.lru_cache(64)
def scale_of(p: float, dtype: torch.dtype = torch.float32) -> float:
    """What a kept value is multiplied with."""
    return torch.ones(1, dtype=dtype).div_(1 - p).item()  # rounded as torch rounds it
