"""``python -m tablewright serve-shards DIR --part 0/3``: a node that serves its part of every version's rows over Arrow Flight.

It reads the files of a version when a client first asks for that version's digest, and goes on serving older ones, so that clients of
both sides of a version flip are answered. No torch.
"""
from __future__ import annotations

import json
import threading
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pyarrow
from pyarrow import flight

from ...kernels.errors import IdOutOfRange, ServingError, UnknownTable, VersionSkew
from ...kernels.gather.flight import ERROR, read_ticket
from ...kernels.gather.local import LocalStore, node_of
from . import manifest as manifests
from .manifest import Manifest

_SCHEMA = pyarrow.schema([("rows", pyarrow.uint8())])
_KEPT = 4  # versions that stay open


class ShardServer(flight.FlightServerBase):
    """Part ``part = (i, n)`` of the versions below ``home``, on ``host:port`` (port 0: a free one, in ``.port``)."""

    def __init__(self, home: Path, part: tuple[int, int] = (0, 1), host: str = "127.0.0.1", port: int = 0, verify: str = "full") -> None:
        self._home, self._part, self._verify = home, part, verify
        self._open: OrderedDict[str, tuple[Manifest, LocalStore]] = OrderedDict()
        self._lock = threading.Lock()
        super().__init__(f"grpc://{host}:{port}")

    def do_get(self, context, ticket):
        try:
            digest, batch = self._rows(ticket.ticket)
        except (ServingError, ValueError) as error:
            raise _told(error) from None
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
                digest, batch = self._rows(chunk.app_metadata.to_pybytes())
            except (ServingError, ValueError, AttributeError) as error:
                raise _told(error) from None
            if not begun:
                writer.begin(_SCHEMA)
                begun = True
            writer.write_with_metadata(batch, digest.encode())

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
                said = {"part": self._part, "open": list(self._open)}
            return iter([flight.Result(json.dumps(said).encode())])
        except (ServingError, ValueError, KeyError) as error:
            raise _told(error) from None

    def list_actions(self, context):
        return [("prepare", "open the version with a digest"), ("describe", "this node's part and its open versions")]

    def _rows(self, raw: bytes) -> tuple[str, pyarrow.RecordBatch]:
        digest, asked = read_ticket(raw)
        manifest, store = self._version(digest)
        for name, ids in asked:
            table = manifest.tables.get(name)
            if table is None:
                raise UnknownTable(f"version '{manifest.version}' has no table '{name}'; its tables: {', '.join(manifest.tables)}")
            if not (ids.view(np.uint64) < table.rows).all():
                raise IdOutOfRange(f"a request to a shard server has an id that is not a row of table '{name}', which has {table.rows}")
        tables = [manifest.tables[name] for name, _ in asked]
        edges = np.cumsum([0, *(len(ids) * table.row_bytes for table, (_, ids) in zip(tables, asked))])
        joined = np.empty(edges[-1], np.uint8)  # not kept: what is sent may be read after this returns
        store.lookup_many(asked, [joined[a:b].view(t.stored).reshape(-1, t.width) for t, a, b in zip(tables, edges, edges[1:])])
        return digest, pyarrow.record_batch([pyarrow.array(joined)], schema=_SCHEMA)

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


def _told(error: Exception) -> flight.FlightServerError:
    kind = type(error).__name__ if isinstance(error, ServingError) else "InputError"
    return flight.FlightServerError(f"{ERROR}{kind}:{error}")
