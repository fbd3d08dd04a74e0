"""Rows in a Redis Cluster: how a version is published there, and how its rows are read. No torch.

    tw:<model>:<digest, 16 digits>:{p<k>}     one hash a partition, over all tables
        field "m"                             the sentinel, written last: "<digest>:<partitions>"
        field <u16 table><i64 id>             the stored row (both little-endian; tables are numbered in the manifest's order)
    tw:<model>:CURRENT                        the digest of the version that was published last

The partition of a row is ``mix(table << 48 | id) % partitions``. Every answer brings the sentinel of its partition: a node that was
restarted empty, a key that was evicted and a version that was published half are told from rows that are missing.
"""
from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import numpy as np

from ..errors import ServingError, StoreIncomplete, StoreUnavailable
from . import turns
from .hot_rows import mixed
from .local import Requests
from .published import Published
from .tables import Table

try:
    import redis
    from redis.crc import key_slot
except ImportError as error:
    raise ImportError("the Redis store needs redis: pip install 'tablewright[serving]'") from error

PARTITIONS = 24
_SENTINEL = b"m"


def _key(model: str, digest: str, partition: int) -> bytes:
    return f"tw:{model}:{digest[:16]}:{{p{partition}}}".encode()


def _seal(digest: str, partitions: int) -> bytes:
    return f"{digest}:{partitions}".encode()


def partition_of(table: int, ids: np.ndarray, partitions: int) -> np.ndarray:
    """The partition of each row."""
    return (mixed(ids.astype(np.uint64) | np.uint64(table << 48)) % np.uint64(partitions)).astype(np.int64)


def _fields(table: int, ids: np.ndarray) -> list[bytes]:
    raw = np.empty(len(ids), dtype=np.dtype([("table", "<u2"), ("id", "<i8")]))
    raw["table"], raw["id"] = table, ids
    text = raw.tobytes()
    return [text[i : i + 10] for i in range(0, len(text), 10)]


# --- publishing --------------------------------------------------------------------------------------------------------------


def publish(version: Published, rows, address: str, partitions: int = PARTITIONS, chunk: int = 4096) -> int:
    """Write a version (of a delta only what changed) and make it ``CURRENT``; ``rows``: a store of its rows. Returns how many were written.

    Safe to repeat, and to stop midway: a partition counts once its sentinel is there, and those come after all rows."""
    cluster = _cluster(address)
    changed = version.changed() if version.base is not None else None
    written = 0
    for number, (name, table) in enumerate(version.tables.items()):
        every = np.arange(table.rows, dtype=np.int64) if changed is None else changed.get(name, np.empty(0, np.int64))
        for start in range(0, len(every), chunk):
            ids = every[start : start + chunk]
            raw = np.ascontiguousarray(rows.lookup_many([(name, ids)])[0]).view(np.uint8).reshape(len(ids), -1)
            where, fields = partition_of(number, ids, partitions), _fields(number, ids)
            with cluster.pipeline() as pipe:
                for k in np.unique(where):
                    pipe.hset(_key(version.model, version.digest, int(k)), mapping={fields[i]: raw[i].tobytes() for i in np.flatnonzero(where == k)})
                pipe.execute()
            written += len(ids)
    for k in range(partitions):
        cluster.hset(_key(version.model, version.digest, k), _SENTINEL, _seal(version.digest, partitions))
    cluster.set(f"tw:{version.model}:CURRENT", version.digest)
    cluster.close()
    return written


def retire(version: Published, address: str, partitions: int = PARTITIONS) -> None:
    """Take a version out of the cluster. Clients that still read it get :class:`StoreIncomplete`."""
    cluster = _cluster(address)
    for k in range(partitions):
        cluster.unlink(_key(version.model, version.digest, k))
    cluster.close()


def _cluster(address: str):
    nodes = [redis.cluster.ClusterNode(host, port) for host, port in _hosts(address)]
    return redis.cluster.RedisCluster(startup_nodes=nodes, socket_timeout=30, socket_connect_timeout=5)


def _hosts(address: str) -> list[tuple[str, int]]:
    try:
        return [(host, int(port)) for host, _, port in (each.rpartition(":") for each in address.split(","))]
    except ValueError:
        raise ValueError(f"redis-cluster://{address}: each node must be host:port") from None


# --- reading -----------------------------------------------------------------------------------------------------------------


class RedisStore:
    """Reads a published version: one packet to each node, all sent before any answer is read, one deadline.

    ``lookup_many`` wants different ids of each table once (``Unique``). Raises :class:`StoreIncomplete` for a partition without
    the version's sentinel, :class:`StoreUnavailable` for a node that is down or does not answer in time."""

    def __init__(self, address: str, version: Published, deadline: float, partitions: int = PARTITIONS) -> None:
        self._hosts, self._version, self.deadline, self._partitions = _hosts(address), version, deadline, partitions
        self._tables: dict[str, Table] = dict(version.tables)
        self._number = {name: i for i, name in enumerate(version.tables)}
        self._changed = version.changed() if version.base is not None else {}
        # which key holds a partition: of the version itself and, of a delta, of its base
        self._digests = [version.digest] if version.base is None else [version.base, version.digest]
        self._keys = [[_key(version.model, d, k) for k in range(partitions)] for d in self._digests]
        self._seals = [_seal(d, partitions) for d in self._digests]
        self._slots = [key_slot(key) for key in self._keys[0]]  # the hash tag alone decides
        self._lock = threading.Lock()
        self._idle: dict[tuple[str, int], list] = {}
        self._counts: dict[str, int] = dict.fromkeys(("requests", "rows", "bytes"), 0)
        self._owners = self._map(time.monotonic() + 5)
        self._check()

    def _check(self) -> None:
        """All sentinels, at load."""
        asked = [[(which, k, []) for which in range(len(self._digests)) for k in range(self._partitions) if self._owners[k] == node]
                 for node in dict.fromkeys(self._owners)]  # fmt: skip
        self._exchange(dict(zip(dict.fromkeys(self._owners), asked)), time.monotonic() + 5)

    def lookup_many(self, requests: Requests, out: list[np.ndarray]) -> list[np.ndarray]:
        """See the class; the rows are written to ``out``."""
        end = time.monotonic() + self.deadline
        # one run of fields for each partition of each version, and where its rows go
        fields: dict[tuple[int, int], list[bytes]] = {}
        places: dict[tuple[int, int], list[tuple[int, np.ndarray]]] = {}
        for r, (name, ids) in enumerate(requests):
            number = self._number[name]
            where = partition_of(number, ids, self._partitions) + self._partitions * self._which(name, ids)
            order = np.argsort(where, kind="stable")
            names = _fields(number, ids[order])
            kinds, starts = np.unique(where[order], return_index=True)
            for kind, a, b in zip(kinds.tolist(), starts, [*starts[1:], len(ids)]):
                at = divmod(kind, self._partitions)
                fields.setdefault(at, []).extend(names[a:b])
                places.setdefault(at, []).append((r, order[a:b]))
        turns.leave()
        answers = self._fetch(fields, end)
        turns.back()
        found = [rows.view(np.uint8) for rows in out]
        for at, members in places.items():
            rows, start = answers[at], 0
            for r, spots in members:
                mine = rows[start : start + len(spots)]
                start += len(spots)
                found[r][spots] = np.frombuffer(self._joined(mine, requests[r][0]), np.uint8).reshape(len(spots), -1)
        with self._lock:
            self._counts["rows"] += sum(len(ids) for _, ids in requests)
            self._counts["bytes"] += sum(rows.nbytes for rows in found)
        return out

    def _which(self, name: str, ids: np.ndarray) -> np.ndarray | int:
        """1 for rows that the delta changed, 0 for those of its base (or of the version itself)."""
        changed = self._changed.get(name)
        if changed is None or not len(changed):
            return 0
        return (changed[np.minimum(np.searchsorted(changed, ids), len(changed) - 1)] == ids).astype(np.int64)

    def _joined(self, rows: list, name: str) -> bytes:
        try:
            joined = b"".join(rows)
        except TypeError:
            raise StoreIncomplete(f"the cluster lacks {sum(r is None for r in rows)} rows of table '{name}'; publish the version again") from None
        if len(joined) != len(rows) * self._tables[name].row_bytes:
            raise StoreIncomplete(f"rows of table '{name}' in the cluster have another size than the manifest says; publish the version again")
        return joined

    def _fetch(self, fields: dict[tuple[int, int], list[bytes]], end: float) -> dict[tuple[int, int], list]:
        for last in (False, True):
            asked: dict[tuple[str, int], list] = {}
            for (which, k), names in fields.items():
                asked.setdefault(self._owners[k], []).append((which, k, names))
            try:
                return self._exchange(asked, end)
            except (_Moved, StoreUnavailable):
                if last or time.monotonic() >= end:
                    raise
                owners = self._map(end)  # a replica may have taken over, or slots moved
                if owners == self._owners:
                    raise
                self._owners = owners
        raise AssertionError

    def _exchange(self, asked: dict[tuple[str, int], list], end: float) -> dict[tuple[int, int], list]:
        """Send each node its ``HMGET``s in one packet, then read all answers."""
        links, answers = {}, {}
        node = next(iter(asked), None)
        try:
            for node, parts in asked.items():
                links[node] = link = self._take(node, end)
                commands = [("HMGET", self._keys[which][k], _SENTINEL, *names) for which, k, names in parts]
                link.send_packed_command(link.pack_commands(commands), check_health=False)
            for node, parts in asked.items():
                for which, k, _ in parts:
                    links[node]._sock.settimeout(max(1e-3, end - time.monotonic()))
                    answer = links[node].read_response()
                    if answer[0] != self._seals[which]:
                        has = "has no sentinel" if answer[0] is None else f"has the sentinel {answer[0][:80]!r}"
                        raise StoreIncomplete(
                            f"partition {k} of version {self._digests[which][:12]} on {node[0]}:{node[1]} {has}: the node lost it, or it was not published "
                            "whole. Publish the version again"
                        )
                    answers[which, k] = answer[1:]
        except BaseException as error:
            for link in links.values():
                link.disconnect()  # answers that nobody will read must not be taken for others
            if isinstance(error, redis.exceptions.ResponseError) and str(error).startswith(("MOVED", "ASK")):
                raise _Moved(f"{error}") from None
            if isinstance(error, (redis.exceptions.RedisError, OSError)):
                where = f"{node[0]}:{node[1]}" if node else "the cluster"
                raise StoreUnavailable(f"{where} did not answer within {self.deadline * 1e3:.0f} ms ({type(error).__name__}: {error})") from None
            raise
        with self._lock:
            self._counts["requests"] += len(asked)
            for node, link in links.items():
                self._idle.setdefault(node, []).append(link)
        return answers

    def _take(self, node: tuple[str, int], end: float):
        with self._lock:
            idle = self._idle.get(node)
            link = idle.pop() if idle else None
        left = end - time.monotonic()
        if left <= 0:
            raise TimeoutError("no time was left")
        if link is None:
            link = redis.Connection(host=node[0], port=node[1], socket_connect_timeout=left, socket_timeout=left,
                                    retry=redis.retry.Retry(redis.backoff.NoBackoff(), 0))  # fmt: skip
            link.connect()
        link._sock.settimeout(left)
        return link

    def _map(self, end: float) -> list[tuple[str, int]]:
        """The node of each partition, by any node that answers."""
        failed = []
        for host, port in dict.fromkeys([*getattr(self, "_owners", []), *self._hosts]):
            try:
                link = self._take((host, port), min(end, time.monotonic() + max(0.05, (end - time.monotonic()) / 2)))
                link.send_command("CLUSTER", "SLOTS", check_health=False)
                ranges = [(first, last, (_text(master[0]) or host, master[1])) for first, last, master, *_ in link.read_response()]
                with self._lock:
                    self._idle.setdefault((host, port), []).append(link)
                return [next(node for first, last, node in ranges if first <= slot <= last) for slot in self._slots]
            except StopIteration:
                failed.append(f"{host}:{port}: some slots have no node")
            except (redis.exceptions.RedisError, OSError) as error:
                failed.append(f"{host}:{port}: {error}")
        raise StoreUnavailable(f"no node of the Redis cluster answers ({'; '.join(failed) or 'no time was left'})")

    def stats(self) -> dict[str, int]:
        """Packets to nodes, rows and bytes that came back."""
        with self._lock:
            return dict(self._counts)

    def close(self) -> None:
        for link in self._links():
            link.disconnect()

    def _links(self) -> Iterator:
        with self._lock:
            idle, self._idle = self._idle, {}
        return (link for links in idle.values() for link in links)


class _Moved(ServingError):
    """A slot has another node now."""


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
