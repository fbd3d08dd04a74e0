"""Rows from shard servers over Arrow Flight: one request a node, replicas tried in turn, one deadline for all. No torch.

The protocol, for clients in other languages (any Arrow Flight library speaks it), is written down in ``docs/row_protocol.md``.
"""
from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from .. import errors
from ..errors import ServingError, StoreUnavailable, UnknownTable, VersionSkew
from .local import Requests, node_of
from .tables import Table

try:
    import pyarrow
    from pyarrow import flight
except ImportError as error:
    raise ImportError("the Flight store needs pyarrow: pip install 'tablewright[serving]'") from error

ERROR = "tablewright-error:"  # then the error's class, a colon and the message
_NAMED = {name: each for name, each in vars(errors).items() if isinstance(each, type) and issubclass(each, ServingError)}
# a server that comes back is found again within half a second
_CHANNEL = [("grpc.initial_reconnect_backoff_ms", 100), ("grpc.min_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 500),
            ("grpc.use_local_subchannel_pool", 1)]  # fmt: skip


def ticket(digest: str, requests: Requests) -> bytes:
    """A request: u32 length of a JSON header, the header, then the int64 ids of all tables in its order; little-endian."""
    header = json.dumps({"digest": digest, "tables": [[name, len(ids)] for name, ids in requests]}).encode()
    return b"".join([len(header).to_bytes(4, "little"), header, *(np.ascontiguousarray(ids, dtype="<i8") for _, ids in requests)])


def read_ticket(raw: bytes) -> tuple[str, list[tuple[str, np.ndarray]]]:
    """What :func:`ticket` wrote. Raises ``ValueError`` for anything else."""
    size = int.from_bytes(raw[:4], "little")
    header = json.loads(raw[4 : 4 + size])
    counts = [int(n) for _, n in header["tables"]]
    if min(counts, default=0) < 0 or len(raw) != 4 + size + 8 * sum(counts):
        raise ValueError(f"a ticket of {len(raw)} bytes does not hold {sum(counts)} ids")
    ids = np.frombuffer(raw[4 + size :], dtype="<i8")
    edges = np.concatenate([[0], np.cumsum(counts)])
    return header["digest"], [(name, ids[a:b]) for (name, _), a, b in zip(header["tables"], edges, edges[1:])]


class FlightStore:
    """Nodes as "host:port,host:port|host:port": node ``i`` of ``n`` has part ``i`` of every version, ``|`` lies between replicas.

    ``lookup_many`` wants ascending, different ids of each table once (``Unique``). Raises :class:`StoreUnavailable` naming the node, none
    of whose replicas answered within the deadline, and :class:`VersionSkew` where a node does not have this version."""

    wants_unique = True

    def __init__(self, address: str, tables: Mapping[str, Table], digest: str, deadline: float) -> None:
        self._nodes = [part.split("|") for part in address.split(",")]
        if not all(":" in each for node in self._nodes for each in node):
            raise ValueError(f"flight://{address}: each replica must be host:port, ',' between nodes, '|' between a node's replicas")
        self._tables, self._digest, self.deadline = tables, digest, deadline
        self._number = {name: i for i, name in enumerate(tables)}
        self._firsts = {name: np.array([s.first for s in t.shards[1:]], dtype=np.int64) for name, t in tables.items()}
        self._clients = [[self._connect(each) for each in node] for node in self._nodes]
        self._preferred = [os.getpid() % len(node) for node in self._nodes]
        self._pool = ThreadPoolExecutor(max(1, 4 * (len(self._nodes) - 1)), thread_name_prefix="tablewright-rows")
        self._lock = threading.Lock()
        self._counts: dict[str, int] = dict.fromkeys(("requests", "rows", "bytes", "failovers"), 0)
        for number in range(len(self._nodes)):
            self._prepare(number)

    @staticmethod
    def _connect(replica: str):
        return flight.FlightClient(f"grpc://{replica}", generic_options=_CHANNEL)

    def _prepare(self, number: int) -> None:
        """Have the node load this version; takes as long as checking its files does."""
        body, failed = json.dumps({"digest": self._digest, "part": [number, len(self._nodes)]}).encode(), []
        for replica, client in zip(self._nodes[number], self._clients[number]):
            try:
                list(client.do_action(flight.Action("prepare", body), flight.FlightCallOptions(timeout=600)))
                return
            except (pyarrow.ArrowException, OSError) as error:
                failed.append(_named(error) or f"{replica}: {_short(error)}")
        wrong = next((each for each in failed if isinstance(each, ServingError)), None)
        raise wrong or StoreUnavailable(f"no replica of node {number} can be reached ({'; '.join(map(str, failed))})")

    def lookup_many(self, requests: Requests) -> list[np.ndarray]:
        """See the class."""
        end = time.monotonic() + self.deadline
        asked: list[list[tuple[str, np.ndarray]]] = [[] for _ in self._nodes]
        places: list[list[tuple[int, int]]] = [[] for _ in self._nodes]  # for each piece: which request, and its place there
        for k, (name, ids) in enumerate(requests):
            try:
                cuts = [0, *np.searchsorted(ids, self._firsts[name]).tolist(), len(ids)]
            except KeyError:
                raise UnknownTable(f"this version has no table '{name}'; its tables: {', '.join(self._tables)}") from None
            for shard, (a, b) in enumerate(zip(cuts, cuts[1:])):
                if a < b:
                    node = node_of(self._number[name], shard, len(self._nodes))
                    asked[node].append((name, ids[a:b]))
                    places[node].append((k, a))
        busy = [n for n, pieces in enumerate(asked) if pieces]
        others = [self._pool.submit(self._ask, n, asked[n], end) for n in busy[1:]]
        try:
            answers = [self._ask(busy[0], asked[busy[0]], end)] if busy else []
        finally:
            waited = [_outcome(each) for each in others]
        for each in waited:
            if isinstance(each, BaseException):
                raise each
            answers.append(each)
        return self._assembled(requests, [(asked[n], places[n], answer) for n, answer in zip(busy, answers)])

    def _assembled(self, requests: Requests, answers: Sequence[tuple]) -> list[np.ndarray]:
        kinds = {(self._tables[name].row_dtype, self._tables[name].dim) for name, _ in requests}
        if len(kinds) == 1:  # parts of one array, which Unique then need not join
            table = self._tables[requests[0][0]]
            edges = np.cumsum([0, *(len(ids) for _, ids in requests)])
            whole = np.empty((edges[-1], table.width), table.stored)
            found = [whole[a:b] for a, b in zip(edges, edges[1:])]
        else:
            found = [np.empty((len(ids), self._tables[name].width), self._tables[name].stored) for name, ids in requests]
        for asked, places, answer in answers:
            start = 0
            for (name, ids), (k, a) in zip(asked, places):
                table = self._tables[name]
                stop = start + len(ids) * table.row_bytes
                found[k][a : a + len(ids)] = answer[start:stop].view(table.stored).reshape(len(ids), table.width)
                start = stop
        return found

    def _ask(self, number: int, asked: Requests, end: float) -> np.ndarray:
        """One node's rows as one array of bytes."""
        replicas, first = self._nodes[number], self._preferred[number]
        size, raw, failed = sum(len(ids) * self._tables[name].row_bytes for name, ids in asked), ticket(self._digest, asked), []
        for turn in range(len(replicas)):
            which = (first + turn) % len(replicas)
            left = end - time.monotonic()
            if left <= 0:
                break
            options = flight.FlightCallOptions(timeout=left / (len(replicas) - turn))  # a hung one leaves time for the others
            try:
                reader = self._clients[number][which].do_get(flight.Ticket(raw), options)
                digest = (reader.schema.metadata or {}).get(b"digest", b"").decode()
                rows = reader.read_chunk().data.column(0).to_numpy()
            except (pyarrow.ArrowException, OSError, StopIteration) as error:
                if (named := _named(error)) is not None:
                    raise named from None
                failed.append(f"{replicas[which]}: {_short(error)}")
                self._clients[number][which] = self._connect(replicas[which])
                continue
            if digest != self._digest or len(rows) != size:
                raise VersionSkew(f"{replicas[which]} answered {len(rows)} bytes of version {digest[:12]}; {size} of {self._digest[:12]} were asked for")
            with self._lock:
                self._counts["requests"] += 1
                self._counts["rows"] += sum(len(ids) for _, ids in asked)
                self._counts["bytes"] += size
                if turn:
                    self._counts["failovers"] += 1
                    self._preferred[number] = which
            return rows
        raise StoreUnavailable(
            f"node {number} ({'|'.join(replicas)}) did not answer within {self.deadline * 1e3:.0f} ms: {'; '.join(failed) or 'no time was left'}"
        )

    def stats(self) -> dict[str, int]:
        """Requests to nodes, rows and bytes that came back, and how often another replica had to be asked."""
        with self._lock:
            return dict(self._counts)

    def close(self) -> None:
        self._pool.shutdown(wait=False)


def _outcome(future):
    try:
        return future.result()
    except BaseException as error:
        return error


def _named(error: BaseException) -> ServingError | None:
    """The error that the server meant."""
    text = str(error)
    if ERROR not in text:
        return None
    kind, _, message = text[text.index(ERROR) + len(ERROR) :].partition(":")
    message = message.split(". Detail:")[0].split(". gRPC client debug context:")[0]
    return _NAMED.get(kind, ServingError)(message)


def _short(error: BaseException) -> str:
    text = str(error).strip().split(". gRPC client debug context")[0]
    return f"{type(error).__name__}: {text.splitlines()[0][:160] if text else ''}"
