"""Rows from shard servers over Arrow Flight: one request a node, replicas tried in turn, one deadline for all. No torch.

The rows themselves come over a plain connection (``row_socket``) where a server offers one and it can be reached, else by Flight's exchange.
The protocol, for clients in other languages (any Arrow Flight library speaks it), is written down in ``docs/row_protocol.md``.
"""
from __future__ import annotations

import functools
import ipaddress
import itertools
import json
import os
import threading
import time
from collections import deque
from collections.abc import Mapping

import numpy as np

from .. import errors
from ..errors import ServingError, StoreUnavailable, UnknownTable, VersionSkew
from . import turns
from .local import Requests, node_of
from .row_socket import RowError, RowSocket
from .tables import Table

try:
    import pyarrow
    from pyarrow import flight
except ImportError as error:
    raise ImportError("the Flight store needs pyarrow: pip install 'tablewright[serving]'") from error

ERROR = "tablewright-error:"  # then the error's class, a colon and the message
_NAMED = {name: each for name, each in vars(errors).items() if isinstance(each, type) and issubclass(each, ServingError)}
_ROW_PORT_SECONDS = 1.0  # to connect to a row port; one that takes longer is behind a firewall
_PATIENCE = 0.005  # seconds that a request keeps its turn while servers on this machine, and so on its cores, work for it
# a server that comes back is found again within half a second; an answer of some MB comes at once, while another node's is read
_CHANNEL = [("grpc.initial_reconnect_backoff_ms", 100), ("grpc.min_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 500),
            ("grpc.use_local_subchannel_pool", 1), ("grpc.http2.lookahead_bytes", 1 << 22), ("grpc.http2.max_frame_size", 1 << 22),
            ("grpc.http2.bdp_probe", 0)]  # fmt: skip


_quoted = functools.lru_cache(1 << 12)(json.dumps)


def ticket(digest: str, requests: Requests) -> bytes:
    """A request: u32 length of a JSON header, the header, then the int64 ids of all tables in its order; little-endian."""
    tables = ",".join([f"[{_quoted(name)},{len(ids)}]" for name, ids in requests])
    header = f'{{"digest":{_quoted(digest)},"tables":[{tables}]}}'.encode()
    header += b" " * (-(4 + len(header)) % 8)  # ids that lie on their own size are read in place
    return b"".join([len(header).to_bytes(4, "little"), header, *(np.ascontiguousarray(ids, dtype="<i8") for _, ids in requests)])


def read_ticket(raw: bytes | memoryview) -> tuple[str, list[tuple[str, np.ndarray]]]:
    """What :func:`ticket` wrote. Raises ``ValueError`` for anything else."""
    size = int.from_bytes(raw[:4], "little")
    header = json.loads(bytes(raw[4 : 4 + size]))
    counts = [int(n) for _, n in header["tables"]]
    if min(counts, default=0) < 0 or len(raw) != 4 + size + 8 * sum(counts):
        raise ValueError(f"a ticket of {len(raw)} bytes does not hold {sum(counts)} ids")
    ids = np.frombuffer(raw, "<i8", offset=4 + size)
    edges = [0, *itertools.accumulate(counts)]
    return header["digest"], [(name, ids[a:b]) for (name, _), a, b in zip(header["tables"], edges, edges[1:])]


class FlightStore:
    """Nodes as "host:port,host:port|host:port": node ``i`` of ``n`` has part ``i`` of every version, ``|`` lies between replicas.

    ``lookup_many`` wants different ids of each table once, ascending where it has several shards (``Unique``). Raises :class:`StoreUnavailable` naming the node, none
    of whose replicas answered within the deadline, and :class:`VersionSkew` where a node does not have this version.
    ``sockets=False``: rows by Flight's exchange only."""

    def __init__(self, address: str, tables: Mapping[str, Table], digest: str, deadline: float, sockets: bool = True) -> None:
        self._nodes = [part.split("|") for part in address.split(",")]
        if not all(":" in each for node in self._nodes for each in node):
            raise ValueError(f"flight://{address}: each replica must be host:port, ',' between nodes, '|' between a node's replicas")
        self._tables, self._digest, self.deadline = tables, digest, deadline
        self._number = {name: i for i, name in enumerate(tables)}
        self._firsts = {name: np.array([s.first for s in t.shards[1:]], dtype=np.int64) for name, t in tables.items()}
        self._clients = [[self._connect(each) for each in node] for node in self._nodes]
        self._preferred = [os.getpid() % len(node) for node in self._nodes]
        # of each replica: its row port, 0 where there is none that can be reached, None where it was not asked yet
        self._row_ports: list[list[int | None]] = [[None if sockets else 0] * len(node) for node in self._nodes]
        self._sockets = sockets
        self._near = all(_here(each) for node in self._nodes for each in node)
        self._idle: dict[tuple[int, int], deque[_Exchange | RowSocket]] = {(n, r): deque() for n, node in enumerate(self._nodes) for r in range(len(node))}
        self._lock = threading.Lock()
        self._counts: dict[str, int] = dict.fromkeys(("requests", "over_row_ports", "rows", "bytes", "failovers"), 0)
        self._watch = _Watch()
        for number in range(len(self._nodes)):
            self._prepare(number)

    @staticmethod
    def _connect(replica: str):
        return flight.FlightClient(f"grpc://{replica}", generic_options=_CHANNEL)

    def _prepare(self, number: int) -> None:
        """Have the node load this version; takes as long as checking its files does."""
        body, failed = json.dumps({"digest": self._digest, "part": [number, len(self._nodes)]}).encode(), []
        for which, (replica, client) in enumerate(zip(self._nodes[number], self._clients[number])):
            try:
                said = _said(client.do_action(flight.Action("prepare", body), flight.FlightCallOptions(timeout=600)))
                self._idle[number, which].append(self._link(number, which, said, _ROW_PORT_SECONDS))
                return
            except (pyarrow.ArrowException, OSError) as error:
                failed.append(_named(error) or f"{replica}: {_short(error)}")
        wrong = next((each for each in failed if isinstance(each, ServingError)), None)
        raise wrong or StoreUnavailable(f"no replica of node {number} can be reached ({'; '.join(map(str, failed))})")

    def lookup_many(self, requests: Requests, out: list[np.ndarray]) -> list[np.ndarray]:
        """See the class; the rows are written to ``out``."""
        end = time.monotonic() + self.deadline
        asked: list[list[tuple[str, np.ndarray]]] = [[] for _ in self._nodes]
        places: list[list[tuple[int, int]]] = [[] for _ in self._nodes]  # for each piece: which request, and its place there
        for k, (name, ids) in enumerate(requests):
            firsts = self._firsts.get(name)
            if firsts is None:
                raise UnknownTable(f"this version has no table '{name}'; its tables: {', '.join(self._tables)}")
            cuts = [0, *np.searchsorted(ids, firsts).tolist(), len(ids)] if len(firsts) else [0, len(ids)]
            for shard, (a, b) in enumerate(zip(cuts, cuts[1:])):
                if a < b:
                    node = node_of(self._number[name], shard, len(self._nodes))
                    asked[node].append((name, ids[a:b]))
                    places[node].append((k, a))
        busy = [n for n, pieces in enumerate(asked) if pieces]
        calls: list[_Call] = []
        try:
            for n in busy:
                pieces = [out[k][a : a + len(ids)] for (_, ids), (k, a) in zip(asked[n], places[n])]
                calls.append(_Call(self, n, asked[n], pieces, end))
            if not (self._near and all(isinstance(call._stream, RowSocket) for call in calls)):
                turns.leave()
            for call in calls:
                call.answer()
        finally:
            for call in calls:
                call.drop()
        turns.back()
        return out

    def _stream(self, number: int, which: int, seconds: float) -> _Exchange | RowSocket:
        try:
            return self._idle[number, which].pop()
        except IndexError:
            turns.leave()  # who connects may wait for long
            said = {}
            if self._row_ports[number][which] is None:
                said = _said(self._clients[number][which].do_action(flight.Action("describe", b""), flight.FlightCallOptions(timeout=seconds)))
            return self._link(number, which, said, min(seconds / 2, _ROW_PORT_SECONDS))

    def _link(self, number: int, which: int, said: Mapping, seconds: float) -> _Exchange | RowSocket:
        """A new connection for rows; ``said``: what the server said of itself, if it was asked."""
        port = self._row_ports[number][which]
        if port is None:
            port = said.get("row_port", 0)
        if port:
            try:
                link = RowSocket(_host(self._nodes[number][which]), port, seconds, _PATIENCE)
            except OSError:
                if self._row_ports[number][which] is not None:
                    raise  # it was there: the server ended, or is another one now
                port = 0
            else:
                self._row_ports[number][which] = port
                return link
        self._row_ports[number][which] = port
        return _Exchange(self._clients[number][which])

    def _count(self, call: _Call, stream: _Exchange | RowSocket) -> None:
        with self._lock:
            self._counts["requests"] += 1
            self._counts["over_row_ports"] += isinstance(stream, RowSocket)
            self._counts["rows"] += sum(len(ids) for _, ids in call._asked)
            self._counts["bytes"] += call._size
            if call._turn:
                self._counts["failovers"] += 1
                self._preferred[call._number] = call._which

    def stats(self) -> dict[str, int]:
        """Requests to nodes, how many of them over row ports, rows and bytes that came back, and how often another replica had to be asked."""
        with self._lock:
            return dict(self._counts)

    def close(self) -> None:
        self._watch.close()
        for streams in self._idle.values():
            while streams:
                streams.pop().drop()


class _Call:
    """One node's part of a request: sent when made, so that all nodes work at the same time; :meth:`answer` waits for the rows."""

    def __init__(self, store: FlightStore, number: int, asked: Requests, pieces: list[np.ndarray], end: float) -> None:
        self._store, self._number, self._asked, self._pieces, self._end = store, number, asked, pieces, end
        self._raw, self._failed, self._turn = ticket(store._digest, asked), [], -1
        self._first = self._which = store._preferred[number]
        self._size = sum(piece.nbytes for piece in pieces)
        self._stream: _Exchange | RowSocket | None = None
        self._send()

    def _send(self, again: bool = False) -> None:
        """Give the request to the next replica that takes it (``again``: to the same one). Raises :class:`StoreUnavailable` when none is left."""
        store, replicas = self._store, self._store._nodes[self._number]
        while (again or self._turn + 1 < len(replicas)) and (left := self._end - time.monotonic()) > 0:
            if not again:
                self._turn += 1
                self._which = (self._first + self._turn) % len(replicas)
            try:
                share = left / (len(replicas) - self._turn)  # one that hangs leaves time for the others
                until = time.monotonic() + share
                self._stream = store._stream(self._number, self._which, share)
                store._watch.add(self._stream, until)
                self._stream.send(self._raw)
                return
            except (pyarrow.ArrowException, OSError, StopIteration) as error:
                again = self._lost(error)
        raise StoreUnavailable(
            f"node {self._number} ({'|'.join(replicas)}) did not answer within {store.deadline * 1e3:.0f} ms: {'; '.join(self._failed) or 'no time was left'}"
        )

    def answer(self) -> None:
        """Wait for the rows; they are in ``pieces`` then."""
        store = self._store
        while True:
            stream: _Exchange | RowSocket = self._stream  # type: ignore[assignment]
            try:
                digest, size = stream.receive(self._pieces)
            except (pyarrow.ArrowException, OSError, StopIteration, RowError) as error:
                self._send(self._lost(error))
                continue
            if digest != store._digest or size != self._size:
                where = store._nodes[self._number][self._which]
                raise VersionSkew(f"{where} answered {size} bytes of version {digest[:12]}; {self._size} of {store._digest[:12]} were asked for")
            if not store._watch.remove(stream):
                self._stream = None  # the deadline and the answer met: the stream is cancelled already
            else:
                stream.fresh, self._stream = False, None
                store._idle[self._number, self._which].append(stream)
            store._count(self, stream)
            return

    def _lost(self, error: BaseException) -> bool:
        """Should the same replica be asked again? Yes on a stream that was kept from another request: the server may have been restarted
        since. Raises the error that the server named, if it did."""
        stream, store = self._stream, self._store
        again = stream is not None and not stream.fresh and store._watch.remove(stream)
        self.drop()
        if (named := _named(error)) is not None:
            raise named from None
        self._failed.append(f"{store._nodes[self._number][self._which]}: {_short(error)}")
        store._idle[self._number, self._which].clear()
        store._row_ports[self._number][self._which] = None if store._sockets else 0  # a new server may have another
        store._clients[self._number][self._which] = store._connect(store._nodes[self._number][self._which])
        return again

    def drop(self) -> None:
        """An answer that nobody will read must not be taken for another one."""
        stream, self._stream = self._stream, None
        if stream is not None:
            self._store._watch.remove(stream)
            stream.drop()


class _Exchange:
    """A stream of Flight's ``DoExchange``; used as a :class:`RowSocket` is."""

    def __init__(self, client) -> None:
        self.client, self.fresh = client, True
        self._writer, self._reader = client.do_exchange(flight.FlightDescriptor.for_command(b"rows"))

    def send(self, raw: bytes) -> None:
        self._writer.write_metadata(raw)

    def receive(self, pieces: list[np.ndarray]) -> tuple[str, int]:
        chunk = self._reader.read_chunk()
        digest, rows, start = chunk.app_metadata.to_pybytes().decode(), chunk.data.column(0).to_numpy(), 0
        if len(rows) == sum(piece.nbytes for piece in pieces):
            for piece in pieces:
                piece[...] = rows[start : start + piece.nbytes].view(piece.dtype).reshape(piece.shape)
                start += piece.nbytes
        return digest, len(rows)

    def drop(self) -> None:
        self._reader.cancel()


class _Watch:
    """Ends streams whose time is over: reads of Arrow Flight have no deadline of their own, and a socket's would be one for each read."""

    _PERIOD = 0.002

    def __init__(self) -> None:
        self._ends: dict[_Exchange | RowSocket, float] = {}
        self._wake, self._closed, self._asleep = threading.Event(), False, False
        self._thread = threading.Thread(target=self._run, daemon=True, name="tablewright-deadlines")
        self._thread.start()

    def add(self, stream: _Exchange | RowSocket, end: float) -> None:
        self._ends[stream] = end
        if self._asleep:
            self._wake.set()

    def remove(self, stream: _Exchange | RowSocket) -> bool:
        """Was its time not over yet?"""
        return self._ends.pop(stream, None) is not None

    def _run(self) -> None:
        idle = 0
        while not self._closed:
            idle = 0 if self._ends else idle + 1
            if idle > 100:
                self._asleep = True
                if not self._ends:  # one may have come since
                    self._wake.wait()
                self._wake.clear()
                self._asleep, idle = False, 0
            time.sleep(self._PERIOD)
            now = time.monotonic()
            for stream, end in list(self._ends.items()):
                if now >= end and self.remove(stream):
                    stream.drop()

    def close(self) -> None:
        self._closed = True
        self._wake.set()


def _host(replica: str) -> str:
    return replica.rpartition(":")[0].strip("[]")


def _here(replica: str) -> bool:
    """Is it certainly on this machine?"""
    host = _host(replica)
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _said(results) -> dict:
    """What a server says of itself in answer to an action."""
    return json.loads(next(iter(results)).body.to_pybytes())


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
