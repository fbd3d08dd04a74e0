"""``tablewright.pack_rows``, ``send_rows`` and ``wait_rows``: looked-up rows travel back to the ranks that asked; gradients the same way
in reverse.

::

    pack_rows(slots, anchors, header_in, spec, rank) -> sent         owner: its answers, in the order in which they go out
    send_rows(sent, header_in, header, spec, rank, group) -> wire    starts the collective
    wait_rows(sent, wire, header_in, header, spec, rank, group) -> received

``slots``: one tensor ``[bags of all ranks, columns]`` for each stream of this rank, or, with ``spec.beside``, one that has them side by side:
``sent`` is that, and its gradient comes as one. ``sent`` and ``received`` are flat, in the tables' dtype: for each rank and stream
``bags x columns`` numbers, bag by bag with ``beside``. ``anchors``: any tensor that requires a gradient, so that the backward runs
on a rank without shards too; then this rank's blocks of the tables in ``spec.anchored``, so that it runs on all ranks or none where autograd is
asked for the gradient of some tables alone. A block without rows gets a gradient without rows here. The backward of ``wait_rows`` starts the collective of the gradients and that of ``pack_rows`` waits for
it: what the graph has between the two runs meanwhile, in the backward as in the forward. Gradients are summed by the owner's lookup.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..embedding.in_backward import reaches
from ..embedding.sparse_grads import coalesced, keep_coalesced
from ..library import DIRECT, LIBRARY, size_from_data, traced, tracing
from .spec import ExchangeSpec, decode
from .wire import WireSizes, decoded, encoded, wire_sizes
from .work import all_to_all, finish

LIBRARY.define("pack_rows(Tensor[] slots, Tensor[] anchors, Tensor header_in, str spec, int rank) -> Tensor")
LIBRARY.define("send_rows(Tensor sent, Tensor header_in, Tensor header, str spec, int rank, str group) -> Tensor")
LIBRARY.define("wait_rows(Tensor sent, Tensor wire, Tensor header_in, Tensor header, str spec, int rank, str group) -> Tensor")


# --- layout ------------------------------------------------------------------------------------------------------------------


class Parts(list[list[tuple[int, int]]]):
    """(stream, bags) of what travels, for each rank. ``each``: how many numbers those have, one after another, and ``numbers`` all of them."""

    def __init__(self, spec: ExchangeSpec, parts: list[list[tuple[int, int]]]) -> None:
        super().__init__(parts)
        self.each = [bags * spec.streams[k].shard.columns for rank in parts for k, bags in rank]
        self.numbers = sum(self.each)
        self._elements: dict[WireSizes, list[int]] = {}

    def elements(self, codecs: WireSizes) -> list[int]:
        """How many wire elements go to (or come from) each rank."""
        found = self._elements.get(codecs)
        if found is None:
            found = self._elements[codecs] = [sum(codecs.size(k, bags) for k, bags in rank) for rank in self]
        return found


_KEPT = 64  # steps of other batches


def outgoing(spec: ExchangeSpec, rank: int, header_in: Tensor) -> Parts:
    """What this rank answers, for each rank that asked."""
    bags = header_in[..., 0].tolist()
    return _parts(spec, rank, tuple(map(tuple, bags)), lambda: [list(zip(spec.of_rank[rank], asked)) for asked in bags])


def incoming(spec: ExchangeSpec, header: Tensor) -> Parts:
    """What this rank is answered, for each rank that answers."""
    bags = header[:, 0].tolist()
    return _parts(spec, None, tuple(bags), lambda: [[(k, bags[k]) for k in mine] for mine in spec.of_rank])


def _parts(spec: ExchangeSpec, rank: int | None, bags: tuple, make: Callable[[], list]) -> Parts:
    """Kept with the spec: batches of one size ask for the same again and again."""
    kept: dict[tuple, Parts] = spec.__dict__.setdefault("_parts", {})
    found = kept.get((rank, bags))
    if found is None:
        if len(kept) >= _KEPT:
            kept.clear()
        found = kept[rank, bags] = Parts(spec, make())
    return found


def _exchange(flat: Tensor, spec: ExchangeSpec, out: Parts, into: Parts, direction: str, group: str) -> Tensor:
    """Start the collective; a flat tensor of wire elements that is being filled."""
    codecs = wire_sizes(spec, direction)
    wire = encoded(flat, spec, out, codecs)
    what = "the exchange of rows" if direction == "forward" else "the exchange of rows' gradients"
    return all_to_all(wire, out.elements(codecs), into.elements(codecs), group, what)


# --- pack --------------------------------------------------------------------------------------------------------------------


def _pack(slots, anchors, header_in: Tensor, text: str, rank: int) -> Tensor:
    spec = decode(text)
    if spec.beside and slots:
        return slots[0].detach().view(-1)
    announced = header_in.tolist()
    parts = [slot.split([source[place][0] for source in announced]) for place, slot in enumerate(slots)]
    pieces = [part[source] for source in range(len(announced)) for part in parts]
    if not pieces:
        return anchors[0].new_empty(0, dtype=spec.torch_dtype)
    alike = len({slot.shape[1] for slot in slots}) == 1
    return torch.cat(pieces if alike else [p.reshape(-1) for p in pieces]).view(-1)


@torch.library.register_fake("tablewright::pack_rows", lib=LIBRARY)
def _fake_pack(slots, anchors, header_in, spec, rank):
    return anchors[0].new_empty(size_from_data(), dtype=decode(spec).torch_dtype)


class _Pack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, text, rank, header_in, count, *tensors):
        anchors, slots = tensors[:count], tensors[count:]
        ctx.call = text, rank, header_in, anchors[1:], [slot.shape for slot in slots]
        return _pack(slots, anchors, header_in, text, rank)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        text, rank, header_in, blocks, shapes = ctx.call
        spec, grad = decode(text), _arrived(grad)
        kinds = [spec.group.tables[table].grad for table in spec.anchored(rank)]
        nodes = [node for (node, _), kind in zip(ctx.next_functions[2:], kinds) if kind == "in_backward" and node is not None]
        if nodes:  # every rank comes here, with the same tables: all refuse what one refuses
            reaches(nodes)
        none = None, None, None, None, None, *_without_rows(blocks, kinds)
        if spec.beside:
            return *none, *(grad.view(shape) for shape in shapes)
        pieces = grad.split(outgoing(spec, rank, header_in).each)
        made = []
        for place, (k, shape) in enumerate(zip(spec.of_rank[rank], shapes)):
            made.append(torch.cat(pieces[place :: len(shapes)]).view(shape) if spec.streams[k].trained else None)
        return *none, *made


def _without_rows(blocks: Sequence[Tensor], kinds: Sequence[str]) -> list[Tensor | None]:
    """The gradients of blocks that have no rows, of the kinds that other ranks' blocks get."""
    found: list[Tensor | None] = []
    for block, kind in zip(blocks, kinds):
        empty = None if kind == "in_backward" else torch.empty_like(block)
        found.append(coalesced(block.new_empty(0, dtype=torch.int64), empty, block) if kind == "sparse" else empty)
    keep_coalesced(list(blocks), found)
    return found


def _pack_autograd(slots, anchors, header_in, spec, rank):
    trains = any(s.trained for s in decode(spec).streams)
    if tracing():
        return traced(PACK, trains, slots, anchors, header_in, spec, rank)
    if not torch.is_grad_enabled() or not trains:
        return _pack(slots, anchors, header_in, spec, rank)
    return _Pack.apply(spec, rank, header_in, len(anchors), *anchors, *slots)


# --- send and wait -----------------------------------------------------------------------------------------------------------


def _send(sent: Tensor, header_in: Tensor, header: Tensor, text: str, rank: int, group: str) -> Tensor:
    spec = decode(text)
    return _exchange(sent.detach(), spec, outgoing(spec, rank, header_in), incoming(spec, header), "forward", group)


@torch.library.register_fake("tablewright::send_rows", lib=LIBRARY)
def _fake_send(sent, header_in, header, spec, rank, group):
    return sent.new_empty(size_from_data())


def _wait(sent, wire: Tensor, header_in: Tensor, header: Tensor, text: str, rank: int, group: str) -> Tensor:
    spec = decode(text)
    return decoded(finish(wire), spec, incoming(spec, header), wire_sizes(spec, "forward"))


@torch.library.register_fake("tablewright::wait_rows", lib=LIBRARY)
def _fake_wait(sent, wire, header_in, header, spec, rank, group):
    return sent.new_empty(size_from_data())


# Gradients on their way, by the storage of the tensor that autograd carries in their place; see _Wait.backward.
_arriving: dict[int, tuple[Tensor, Tensor, ExchangeSpec, Parts]] = {}


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx, sent, wire, header_in, header, text, rank, group):
        ctx.call = header_in, header, text, rank, group
        return _wait(sent, wire, header_in, header, text, rank, group).detach()

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        if torch.is_grad_enabled():
            raise RuntimeError("second derivatives through sharded lookups are not provided (create_graph=True)")
        header_in, header, text, rank, group = ctx.call
        spec = decode(text)
        asked = outgoing(spec, rank, header_in)
        wire = _exchange(grad.contiguous(), spec, incoming(spec, header), asked, "backward", group)
        # Autograd wants a gradient of the shape of ``sent``. Nobody but pack_rows reads ``sent``, so this one reaches it as it is.
        carrier = wire.new_empty(1, dtype=grad.dtype).expand(asked.numbers)
        _arriving[carrier.untyped_storage()._cdata] = (carrier, wire, spec, asked)
        return carrier, None, None, None, None, None, None


def _arrived(carrier: Tensor) -> Tensor:
    """The gradients that ``carrier`` stands for, when they are there."""
    found = _arriving.pop(carrier.untyped_storage()._cdata, None)
    if found is None:
        raise RuntimeError("the gradient of sharded rows was changed on its way (a hook, or another reader of the packed rows)")
    _, wire, spec, asked = found
    return decoded(finish(wire), spec, asked, wire_sizes(spec, "backward"))


def _wait_autograd(sent, wire, header_in, header, spec, rank, group):
    if tracing():
        return traced(WAIT, sent.requires_grad, sent, wire, header_in, header, spec, rank, group)
    if not sent.requires_grad:
        return _wait(sent, wire, header_in, header, spec, rank, group)
    return _Wait.apply(sent, wire, header_in, header, spec, rank, group)


for _device in ("CPU", "CUDA"):
    LIBRARY.impl("pack_rows", lambda *args: _pack(*args).clone(), _device)  # for torch.compile, to which no result may be an argument
    LIBRARY.impl("send_rows", _send, _device)
    LIBRARY.impl("wait_rows", _wait, _device)
LIBRARY.impl("pack_rows", _pack_autograd, "Autograd")
LIBRARY.impl("wait_rows", _wait_autograd, "Autograd")
PACK, SEND, WAIT = (getattr(torch.ops.tablewright, name).default for name in ("pack_rows", "send_rows", "wait_rows"))
DIRECT.update({PACK: _pack_autograd, WAIT: _wait_autograd})
DIRECT[SEND] = lambda *args: (SEND if tracing() else _send)(*args)
