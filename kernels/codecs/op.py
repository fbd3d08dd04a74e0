"""Row codecs, for rows that are sent between processes or stored for serving: ``encode_rows`` and ``decode_rows``.

A payload is a uint8 tensor ``[n, row_bytes(codec, dim)]``, one encoded row in each, little-endian, readable by numpy alone:

| codec | bytes a row | layout |
|---|---|---|
| ``"int8"`` | ``dim + 8`` | ``dim`` codes (uint8), then ``scale`` and ``offset`` (float32); a value is ``code * scale + offset`` |
| ``"fp16"``, ``"bf16"`` | ``2 * dim`` | the values in that dtype |
| ``"fp32"`` | ``4 * dim`` | the values |

```python
codes, tail = payload[:, :dim], np.ascontiguousarray(payload[:, dim:]).view("<f4")      # int8, in numpy
values = codes.astype("f4") * tail[:, :1] + tail[:, 1:]
```

Rows of any floating dtype are taken to float32 first, and every rounding is to nearest, ties to even.

int8: ``offset`` is the row's least value, ``scale = max((largest - least) / 255, 2^-126)``, ``code = round((x - offset) * (1 / scale))``,
and the value ``code * scale`` is rounded before ``offset`` is added, so every form gives the same bits. A decoded value differs from x
by at most ``scale / 2 + 2^-21 * max|row|``, so by at most ``(largest - least) / 510`` and rounding; rows of one value, zero rows among
them, and the least value of any row come back exact. A row that holds NaN or infinity, or whose range is beyond float32, decodes to NaN
in all its columns: on the wire a bad value stays visible (and is found by a loss scaler) without a synchronisation.
The layout is also that of FBGEMM's fused 8-bit rowwise tables.

fp16: an error of at most ``2^-11 |x| + 2^-25``; from 65520 on a value becomes infinite. bf16: ``2^-8 |x| + 2^-134``.
NaN and infinity stay. fp32: exact.

The ops have no gradient (codes are integers): encoding rows that require one raises ``RuntimeError`` where gradients are recorded.
Collectives encode inside an ``autograd.Function``, where they are not.
"""
from __future__ import annotations

import torch
from torch import Tensor

from ..library import DIRECT, LIBRARY, tracing
from . import cpu

CODECS = ("int8", "fp16", "bf16", "fp32")
_PLAIN = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
_LEAST_SCALE = 2.0**-126

LIBRARY.define("encode_rows(Tensor rows, str codec) -> Tensor")
LIBRARY.define("decode_rows(Tensor payload, str codec, int dim, ScalarType dtype) -> Tensor")


def row_bytes(codec: str, dim: int) -> int:
    """Bytes of one encoded row of ``dim`` values. Raises ``ValueError`` for an unknown codec."""
    if codec not in CODECS:
        raise ValueError(f"codec is {codec!r}; it must be one of {CODECS}")
    return dim + 8 if codec == "int8" else dim * _PLAIN[codec].itemsize


def reference_encode(rows: Tensor, codec: str) -> Tensor:
    """:func:`encode` in plain PyTorch, on any device."""
    _check_rows(rows, codec)
    if codec != "int8":
        return rows.float().to(_PLAIN[codec], copy=True).contiguous().view(torch.uint8)
    x = rows.float()
    least, largest = x.aminmax(dim=1, keepdim=True) if len(x) else (x[:, :1], x[:, :1])
    extent = largest - least
    scale, offset = (extent / 255).clamp_min(_LEAST_SCALE), least + 0.0  # no negative zero
    bad = ~extent.isfinite()
    codes = ((x - offset) * (1 / scale)).round_().masked_fill_(bad, 0)
    tail = torch.cat([scale, offset], 1).masked_fill_(bad, torch.nan)
    return torch.cat([codes.to(torch.uint8), tail.view(torch.uint8)], 1)


def reference_decode(payload: Tensor, codec: str, dim: int, dtype: torch.dtype) -> Tensor:
    """:func:`decode` in plain PyTorch, on any device."""
    _check_payload(payload, codec, dim, dtype)
    if codec != "int8":
        flat = payload.reshape(-1)
        if flat.storage_offset() % _PLAIN[codec].itemsize:
            flat = flat.clone()
        return flat.view(_PLAIN[codec]).view(-1, dim).to(dtype, copy=True)
    tail = payload[:, dim:].clone(memory_format=torch.contiguous_format).view(torch.float32)
    return ((payload[:, :dim] * tail[:, :1]) + tail[:, 1:]).to(dtype)


def _check_rows(rows: Tensor, codec: str) -> None:
    row_bytes(codec, 1)
    if rows.dim() != 2 or rows.shape[1] == 0 or not rows.is_floating_point():
        raise ValueError(f"rows are {rows.dtype} of shape {tuple(rows.shape)}; they must be floating and [n, dim] with dim >= 1")


def _check_payload(payload: Tensor, codec: str, dim: int, dtype: torch.dtype) -> None:
    width = row_bytes(codec, dim)
    if payload.dtype != torch.uint8 or payload.dim() != 2 or payload.shape[1] != width or dim < 1:
        raise ValueError(
            f"the payload is {payload.dtype} of shape {tuple(payload.shape)}; {codec} rows of dim {dim} are uint8 of shape [n, {width}], dim >= 1"
        )
    if not dtype.is_floating_point:
        raise ValueError(f"rows cannot be decoded to {dtype}; a floating dtype was needed")


def _encode_cpu(rows: Tensor, codec: str) -> Tensor:
    _check_rows(rows, codec)
    return cpu.encode(rows) if codec == "int8" and cpu.serves(rows) else reference_encode(rows, codec)


def _decode_cpu(payload: Tensor, codec: str, dim: int, dtype: torch.dtype) -> Tensor:
    _check_payload(payload, codec, dim, dtype)
    return cpu.decode(payload, dim, dtype) if codec == "int8" and cpu.serves(payload) else reference_decode(payload, codec, dim, dtype)


def _encode_gpu(rows: Tensor, codec: str) -> Tensor:
    from . import gpu  # Triton is imported only where a GPU asks for it

    _check_rows(rows, codec)
    return gpu.encode(rows) if codec == "int8" and gpu.serves(rows, rows.shape[1]) else reference_encode(rows, codec)


def _decode_gpu(payload: Tensor, codec: str, dim: int, dtype: torch.dtype) -> Tensor:
    from . import gpu

    _check_payload(payload, codec, dim, dtype)
    fits = codec == "int8" and payload.stride(1) == 1 and gpu.serves(payload.new_empty(len(payload), dtype=dtype), dim)
    return gpu.decode(payload, dim, dtype) if fits else reference_decode(payload, codec, dim, dtype)


def _autograd_encode(rows: Tensor, codec: str) -> Tensor:
    if rows.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            f"encode_rows: the rows require a gradient, and {codec} payloads carry none; encode under torch.no_grad(), or in an "
            "autograd.Function that says what the gradient is"
        )
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.tablewright.encode_rows(rows, codec)


@torch.library.register_fake("tablewright::encode_rows", lib=LIBRARY)
def _fake_encode(rows, codec):
    _check_rows(rows, codec)
    return rows.new_empty((rows.shape[0], row_bytes(codec, rows.shape[1])), dtype=torch.uint8)


@torch.library.register_fake("tablewright::decode_rows", lib=LIBRARY)
def _fake_decode(payload, codec, dim, dtype):
    _check_payload(payload, codec, dim, dtype)
    return payload.new_empty((payload.shape[0], dim), dtype=dtype)


LIBRARY.impl("encode_rows", _encode_cpu, "CPU")
LIBRARY.impl("decode_rows", _decode_cpu, "CPU")
LIBRARY.impl("encode_rows", _encode_gpu, "CUDA")
LIBRARY.impl("decode_rows", _decode_gpu, "CUDA")
LIBRARY.impl("encode_rows", _autograd_encode, "Autograd")

ENCODE, DECODE = torch.ops.tablewright.encode_rows.default, torch.ops.tablewright.decode_rows.default


def encode(rows: Tensor, codec: str) -> Tensor:
    """``rows`` ``[n, dim]``, floating -> payload ``[n, row_bytes(codec, dim)]``, uint8, fresh. Raises ``ValueError`` for other rows or an
    unknown codec, ``RuntimeError`` for rows whose gradient is recorded."""
    direct = rows.is_cpu and not rows.requires_grad and not torch.compiler.is_compiling() and not tracing()
    return _encode_cpu(rows, codec) if direct else ENCODE(rows, codec)


def decode(payload: Tensor, codec: str, dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A payload of :func:`encode` -> its rows, ``[n, dim]`` of ``dtype``, fresh. Raises ``ValueError`` for a payload of another width
    or dtype."""
    direct = payload.is_cpu and not torch.compiler.is_compiling() and not tracing()
    return _decode_cpu(payload, codec, dim, dtype) if direct else DECODE(payload, codec, dim, dtype)


DIRECT.update({ENCODE: encode, DECODE: decode})
