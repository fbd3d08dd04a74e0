"""``python -m tablewright serve-shards DIR --part 0/3``: a node that serves its part of every version's rows over Arrow Flight
and, faster, on a plain row port that it names there.

It reads the files of a version when a client first asks for that version's digest, and goes on serving older ones, so that clients of
both sides of a version flip are answered. No torch.
"""
from __future__ import annotations

import itertools
import json
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
from pyarrow import flight

from ...kernels.errors import IdOutOfRange, ServingError, UnknownTable, VersionSkew
from ...kernels.gather.flight import ERROR, read_ticket
from ...kernels.gather.local import LocalStore, node_of
from . import manifest as manifests
from .manifest import Manifest
from .row_port import RowPort

_SCHEMA = pyarrow.schema([("rows", pyarrow.uint8())])
_KEPT = 4  # versions that stay open


class ShardServer(flight.FlightServerBase):
    """Part ``part = (i, n)`` of the versions below ``home``, on ``host:port`` (port 0: a free one, in ``.port``), and rows on ``row_port``
    too (0: a free one; None: not)."""

    def __init__(
        self, home: Path, part: tuple[int, int] = (0, 1), host: str = "127.0.0.1", port: int = 0, verify: str = "full", row_port: int | None = 0,
    ) -> None:  # fmt: skip
        self._home, self._part, self._verify = home, part, verify
        self._open: OrderedDict[str, tuple[Manifest, LocalStore]] = OrderedDict()
        self._lock = threading.Lock()
        self._row_port = None if row_port is None else RowPort(host, row_port, self._rows, _told)
        try:
            super().__init__(f"grpc://{host}:{port}")
        except BaseException:  # the port is taken
            if self._row_port:
                self._row_port.end()
            raise

    def do_get(self, context, ticket):
        try:
            digest, rows = self._rows(ticket.ticket)
        except (ServingError, ValueError) as error:
            raise _told(error) from None
        batch = _batch(rows)
        schema = batch.schema.with_metadata({"digest": digest})
        return flight.RecordBatchStream(pyarrow.RecordBatchReader.from_batches(schema, [batch.cast(schema)]))

    def do_exchange(self, context, descriptor, reader, writer):
        begun = False
        while True:
            try:
                chunk = reader.read_chunk()
            except StopIteration:
                return
            try:
                digest, rows = self._rows(chunk.app_metadata.to_pybytes())
            except (ServingError, ValueError, AttributeError) as error:
                raise _told(error) from None
            if not begun:
                writer.begin(_SCHEMA)
                begun = True
            writer.write_with_metadata(_batch(rows), digest.encode())

    def do_action(self, context, action):
        try:
            body = json.loads(action.body.to_pybytes() or b"{}")
            if action.type == "prepare":
                part = tuple(body.get("part", self._part))
                if part != self._part:
                    raise VersionSkew(f"this node serves part {self._part[0]} of {self._part[1]}; the client takes it for {part[0]} of {part[1]}")
                self._version(body["digest"])
            elif action.type != "describe":
                raise ValueError(f"there is no action '{action.type}'; there are 'prepare' and 'describe'")
            with self._lock:
                said = {"part": self._part, "open": list(self._open), "row_port": self._row_port.port if self._row_port else 0}
            return iter([flight.Result(json.dumps(said).encode())])
        except (ServingError, ValueError, KeyError) as error:
            raise _told(error) from None

    def list_actions(self, context):
        return [("prepare", "open the version with a digest"), ("describe", "this node's part and its open versions")]

    def shutdown(self) -> None:
        """Stop serving."""
        if self._row_port:
            self._row_port.end()
        super().shutdown()

    def _rows(self, raw: bytes | memoryview, room: Callable[[int], np.ndarray] = lambda size: np.empty(size, np.uint8)) -> tuple[str, np.ndarray]:
        """The digest and the bytes of the rows that a ticket asks for; ``room``: where to. Flight reads them after this has returned, so its are new each time."""
        digest, asked = read_ticket(raw)
        manifest, store = self._version(digest)
        try:
            tables = [manifest.tables[name] for name, _ in asked]
        except KeyError as error:
            raise UnknownTable(f"version '{manifest.version}' has no table {error}; its tables: {', '.join(manifest.tables)}") from None
        counts = [len(ids) for _, ids in asked]
        limits = np.repeat(np.array([t.rows for t in tables], np.uint64), counts)
        if asked and not (np.concatenate([ids for _, ids in asked]).view(np.uint64) < limits).all():
            table = next(t for t, (_, ids) in zip(tables, asked) if not (ids.view(np.uint64) < t.rows).all())
            raise IdOutOfRange(f"a request to a shard server has an id that is not a row of table '{table.name}', which has {table.rows}")
        edges = [0, *itertools.accumulate(n * t.row_bytes for n, t in zip(counts, tables))]
        joined = room(edges[-1])
        store.lookup_many(asked, [joined[a:b].view(t.stored).reshape(-1, t.width) for t, a, b in zip(tables, edges, edges[1:])])
        return digest, joined

    def _version(self, digest: str) -> tuple[Manifest, LocalStore]:
        found = self._open.get(digest)
        if found is not None:
            return found
        with self._lock:
            if digest not in self._open:
                self._open[digest] = self._load(digest)
                while len(self._open) > _KEPT:
                    self._open.popitem(last=False)  # requests that use it keep it; else its files are let go
            return self._open[digest]

    def _load(self, digest: str) -> tuple[Manifest, LocalStore]:
        for path in sorted(self._home.glob(f"*/{manifests.NAME}")):
            raw = json.loads(path.read_text())
            if raw.get("digest") == digest:
                manifest = manifests.read(path.parent)
                manifest.verify(self._verify, served=self._serves)
                return manifest, LocalStore(manifest.tables, manifest.root, manifest.base, self._part)
        raise VersionSkew(f"this node has no version with digest {digest[:12]} in {self._home}. Copy the version there first")

    def _serves(self, table: int, shard: int) -> bool:
        return node_of(table, shard, self._part[1]) == self._part[0]


def _batch(rows: np.ndarray) -> pyarrow.RecordBatch:
    return pyarrow.record_batch([pyarrow.array(rows)], schema=_SCHEMA)


def _told(error: Exception) -> flight.FlightServerError:
    """Named where the request or the version is wrong. Anything else is this node's own affair, and a client asks its replica."""
    if isinstance(error, ServingError):
        return flight.FlightServerError(f"{ERROR}{type(error).__name__}:{error}")
    if isinstance(error, (ValueError, KeyError, TypeError, AttributeError)):  # what a ticket that is none raises
        return flight.FlightServerError(f"{ERROR}InputError:{error}")
    return flight.FlightServerError(f"{type(error).__name__}: {error}")
