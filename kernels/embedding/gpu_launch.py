"""How launches are described to the kernels: entries on the device, alignment, and inputs brought to one dtype each."""

from __future__ import annotations

import math
from array import array
from collections.abc import Collection, Sequence
from contextlib import nullcontext

import torch
import triton.language as tl
from torch import Tensor

from .checks import OptionalTensors, leading_shape
from .triton_common import LookupEntry

TYPES = {
    torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.int32: tl.int32, torch.int64: tl.int64,
}  # fmt: skip


def triton_type(dtype: torch.dtype):
    """Triton's name of a table's dtype."""
    return tl.uint8 if dtype == torch.uint8 else TYPES[dtype]


def most_registers(kernel: str, kinds: Collection[tuple[int, ...]], coded: bool = False) -> int | None:
    """Triton's ``maxnreg`` for a launch of "forward", "reduce" or "spanning" over KINDS; ``coded``: int8 rows. None: as the assembler sees fit.

    Left alone, ptxas keeps a few numbers in local memory to fit one more block on a processor; told how many registers there are, it uses
    more of them and spills nothing (measured on ptxas of triton 3.6 and 3.7, sm_90, widths 4 to 2048 alone and mixed)."""
    wide = max(kind[1] for kind in kinds) > 1024
    if kernel == "forward" and len(kinds) == 1:
        return None
    return 128 if wide or coded or kernel == "reduce" else {"forward": 96, "spanning": 64}[kernel]


def on_device(device: torch.device):
    """Kernels are launched on the current device, so make it that of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


_ARENA_WORDS = 1 << 19  # 4 MB of int64: about 800 launches over 26 tables
_arena: list[Tensor] = []  # what is left of the pinned memory for launches inside CUDA graphs


def capturing() -> bool:
    """True while a CUDA graph is recorded: nothing may be asked of the GPU, and host memory that is copied must stay as it is."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def send(entries: Sequence[tuple[int, ...]], device: torch.device) -> Tensor:
    """The entries on the device, int64 [n, fields], in one copy that nobody waits for.

    In a CUDA graph the copy is repeated with each replay, so the numbers stay in pinned memory for good: pointers of tensors inside the graph are
    as constant as the graph. Raises RuntimeError where that memory is used up."""
    host = torch.frombuffer(array("q", [v for e in entries for v in e]), dtype=torch.int64).view(len(entries), -1)
    if device.type != "cuda":
        return host
    if not _arena and not capturing():  # pinned memory cannot be allocated while a graph is recorded
        _arena.append(torch.empty(_ARENA_WORDS, dtype=torch.int64, pin_memory=True))
    if not capturing():
        return host.pin_memory().to(device, non_blocking=True)
    if not _arena or _arena[0].numel() < host.numel():
        raise RuntimeError("no pinned memory for launches inside CUDA graphs: run one step before recording, and record fewer graphs")
    kept, _arena[0] = _arena[0][: host.numel()].view(host.shape), _arena[0][host.numel() :]
    kept.copy_(host)
    return kept.to(device, non_blocking=True)


def alignment(itemsize: int, *element_counts: int, addresses: Sequence[int] = ()) -> int:
    """How many elements one load may take, up to 16 bytes, if rows begin at these addresses plus these multiples."""
    return max(1, math.gcd(16, *addresses, *(n * itemsize for n in element_counts)) // itemsize)


def one_type(tensors: OptionalTensors, used: Sequence[bool], widest: torch.dtype) -> tuple[list[Tensor | None], torch.dtype]:
    """The used tensors, contiguous and of one dtype: their own where they agree, else ``widest``."""
    types = {t.dtype for t, u in zip(tensors, used) if u and t is not None}
    dtype = types.pop() if len(types) == 1 else widest
    if dtype not in TYPES:
        dtype = widest
    return [t.detach().to(dtype).contiguous() if u and t is not None else None for t, u in zip(tensors, used)], dtype


class Lookups:
    """The reads of some lookups, ready to be described: ids, offsets and weights contiguous, each kind in one dtype."""

    def __init__(self, spec, tables, indices, offsets, sample_weights, used: Sequence[bool]) -> None:
        self.spec, self.tables = spec, tables
        self.ids, ids = one_type(indices, used, torch.int64)
        self.offsets, offs = one_type(offsets, used, torch.int64)
        self.weights, weights = one_type(sample_weights, used, torch.float32)
        self.types = {"ID_T": TYPES[ids], "OFFSET_T": TYPES[offs]}
        self.weight_type = TYPES[weights] if any(w is not None for w in self.weights) else None

    def entry(self, i: int, program: int, kind: int, out: int, out_stride: int, train: bool, **more: int) -> LookupEntry:
        """The entry of lookup ``i``. ``train``: padding_idx counts even where that row is read (it stops the gradient)."""
        lookup = self.spec.lookups[i]
        table, ids, offs, weights = self.tables[lookup.table], self.ids[i], self.offsets[i], self.weights[i]
        assert ids is not None, "only used lookups have entries"
        bags = math.prod(leading_shape(lookup, ids, offs))
        padding = lookup.padding_idx if train else lookup.left_out
        return LookupEntry(
            program=program, kind=kind, number=i, ids=ids.data_ptr(), n_ids=ids.numel(),
            offsets=0 if offs is None else offs.data_ptr(), n_offsets=0 if offs is None else offs.numel(),
            bag=0 if offs is not None else ids.numel() // max(1, bags), bags=bags, ends=int(lookup.include_last_offset),
            weights=0 if weights is None else weights.data_ptr(), table=table.data_ptr(), rows=table.shape[0],
            dim=self.spec.tables[lookup.table].dim, stride=table.stride(0), padding=-1 if padding is None else padding, wrap=int(lookup.wrap_negative),
            mean=int(lookup.pooling == "mean"), out=out, out_stride=out_stride, **more,
        )  # fmt: skip
