"""``tablewright.exchange_ids`` and ``received_bags``: row numbers travel to the ranks that hold the rows.

::

    exchange_ids(header, payload, spec, rank, group, everyone="") -> (header_in, payload_in)
    received_bags(header_in, payload_in, spec, rank) -> [rows_0, offsets_0, rows_1, ...]

``exchange_ids`` sends what ``route_ids`` made. ``header_in`` int64 ``[ranks, streams of this rank, 3]`` is there when it returns;
``payload_in`` is still on its way (``finish`` or ``received_bags`` waits). Two collectives: the header has a known size, and
tells whether all ranks make the same exchange. Where ``group`` has one rank of each node, ``everyone`` is the group of all ranks, node
by node: each tells all of them that its ids are good (one number), so that none waits in a later exchange for one that stopped.
``received_bags`` gives for each stream of this rank the row numbers from all ranks, and, unless the stream is deduplicated or
unpooled, the offsets of their bags (else an empty tensor).

Raises what ``route_ids`` refused, on the rank where it did; :class:`~.errors.PeerError` on the others.
"""
from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ..library import DIRECT, LIBRARY, size_from_data, tracing
from . import route_ids
from .errors import PeerError
from .spec import HEADER, ExchangeSpec, decode
from .work import all_to_all, finish, group_of

_REFUSED = -1

LIBRARY.define('exchange_ids(Tensor header, Tensor payload, str spec, int rank, str group, str everyone="") -> (Tensor, Tensor)')
LIBRARY.define("received_bags(Tensor header_in, Tensor payload_in, str spec, int rank) -> Tensor[]")


def id_counts(spec: ExchangeSpec, announced: list[list[int]]) -> int:
    """How many numbers of payload the streams announce."""
    return sum(rows + (bags if ragged else 0) for bags, rows, ragged in announced)


def _exchange(header: Tensor, payload: Tensor, text: str, rank: int, group: str, everyone: str = "") -> tuple[Tensor, Tensor]:
    spec = decode(text)
    counts_out, counts_in = spec.header_splits(rank)
    announced, refused = header.tolist(), route_ids.refusal(header)
    state = _REFUSED if refused is not None else spec.checksum
    wire = [[state, *(n for k in mine for n in announced[k])] for mine in spec.of_rank]
    peers = list(range(spec.world))  # the ranks of the group, as they are numbered where the headers travel
    if everyone:
        peers, ranks = _places(spec.world, everyone)
        counts_out, counts_in = (_spread(counts, peers, [1] * ranks) for counts in (counts_out, counts_in))
        wire = _spread(wire, peers, [[state]] * ranks)
    there = torch.tensor([number for each in wire for number in each], device=payload.device)
    arrived = finish(all_to_all(there, counts_out, counts_in, everyone or group, "the exchange of id counts")).cpu().split(counts_in)
    if refused is not None:
        raise refused
    for source, theirs in enumerate(torch.stack([part[0] for part in arrived]).tolist()):
        if theirs == _REFUSED:
            raise PeerError(f"rank {source} was given ids or offsets that cannot be looked up, and stopped; its own error says which")
        if theirs != spec.checksum:
            raise PeerError(
                f"rank {source} makes another exchange of ids than rank {rank} ({theirs:x}, here {spec.checksum:x}): the ranks do not "
                "call the same models in the same order, or optimized them by different plans"
            )
    header_in = torch.cat([arrived[r][1:] for r in peers]).view(spec.world, len(spec.of_rank[rank]), HEADER)
    expected = header_in.tolist()
    out = [id_counts(spec, [announced[k] for k in mine]) for mine in spec.of_rank]
    inward = [id_counts(spec, streams) for streams in expected]
    return header_in, all_to_all(payload, out, inward, group, "the exchange of ids")


def _places(count: int, everyone: str) -> tuple[list[int], int]:
    """Which ranks of the group ``everyone`` have this rank's place in their nodes, of which there are ``count``; and how many ranks it has."""
    found = group_of(everyone)
    ranks = dist.get_world_size(found)
    return list(range(dist.get_rank(found) % (ranks // count), ranks, ranks // count)), ranks


def _spread(values: list, places: list[int], others: list) -> list:
    """``others``, with ``values`` at ``places``."""
    for place, value in zip(places, values):
        others[place] = value
    return others


@torch.library.register_fake("tablewright::exchange_ids", lib=LIBRARY)
def _fake_exchange(header, payload, spec, rank, group, everyone=""):
    parsed = decode(spec)
    header_in = header.new_empty(parsed.world, len(parsed.of_rank[rank]), HEADER)
    return header_in, payload.new_empty(size_from_data())


def _is_single(spec: ExchangeSpec, k: int) -> bool:
    """Whether every bag of a stream is one row."""
    stream = spec.streams[k]
    return stream.unique or spec.group.lookups[stream.lookups[0]].pooling == "none"


def _received(header_in: Tensor, payload_in: Tensor, text: str, rank: int) -> list[Tensor]:
    spec = decode(text)
    finish(payload_in)
    streams, announced = spec.of_rank[rank], header_in.tolist()
    pieces = iter(payload_in.split([n for source in announced for bags, rows, ragged in source for n in (bags if ragged else 0, rows)]))
    travelled = [[(next(pieces), next(pieces)) for _ in source] for source in announced]  # lengths (empty where equal), rows
    totals = [sum(source[place][1] for source in announced) for place in range(len(streams))]
    rows = torch.cat([found[place][1] for place in range(len(streams)) for found in travelled]).split(totals) if streams else ()
    out, regular = [], {}  # offsets of bags of one length, by (rows, length)
    for place, k in enumerate(streams):
        out.append(rows[place])
        if _is_single(spec, k):
            out.append(payload_in.new_empty(0))
            continue
        told = [source[place] for source in announced]
        each = {count // bags for bags, count, _ in told if bags}
        if len(each) <= 1 and not any(ragged for _, _, ragged in told):
            step = each.pop() if each else 1
            kind = totals[place], step
            if kind not in regular:
                regular[kind] = torch.arange(0, totals[place], step, device=payload_in.device)
            out.append(regular[kind])
            continue
        lengths = [
            found[place][0] if ragged else payload_in.new_full((bags,), count // max(1, bags))
            for found, (bags, count, ragged) in zip(travelled, told)
        ]
        out.append(torch.cat([payload_in.new_zeros(1), *lengths]).to(torch.int64).cumsum(0)[:-1])
    return out


@torch.library.register_fake("tablewright::received_bags", lib=LIBRARY)
def _fake_received(header_in, payload_in, spec, rank):
    parsed, out = decode(spec), []
    for k in parsed.of_rank[rank]:
        out.append(payload_in.new_empty(size_from_data()))
        single = _is_single(parsed, k)
        out.append(payload_in.new_empty(0 if single else size_from_data(), dtype=payload_in.dtype if single else torch.int64))
    return out


for _device in ("CPU", "CUDA"):
    LIBRARY.impl("exchange_ids", _exchange, _device)
    LIBRARY.impl("received_bags", _received, _device)
EXCHANGE = torch.ops.tablewright.exchange_ids.default
RECEIVED = torch.ops.tablewright.received_bags.default
DIRECT[EXCHANGE] = lambda *args: (EXCHANGE if tracing() else _exchange)(*args)
DIRECT[RECEIVED] = lambda *args: (RECEIVED if tracing() else _received)(*args)
