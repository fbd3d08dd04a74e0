"""From ``store="..."`` to the store of one version. Imports no torch, and what a kind of store needs only when it is asked for."""
from __future__ import annotations

from ...kernels.gather.hot_rows import HotRows
from ...kernels.gather.local import LocalStore
from ...kernels.gather.published import Published
from ...kernels.gather.request import RemoteStore, Store
from ...kernels.gather.unique import Unique
from ..errors import nearest
from .manifest import Manifest

_KINDS = ("local", "flight", "redis-cluster")


def open_store(manifest: Manifest, spec: str = "local", *, deadline_ms: float = 5000, cache_rows: int = 0, verify: str = "full") -> Store:
    """The rows of ``manifest``'s version. Raises ``ValueError`` for an unknown ``spec``, and what the store raises."""
    kind, _, address = spec.partition("://")
    if kind not in _KINDS or bool(address) != (kind != "local"):
        raise ValueError(f"store is '{spec}'{nearest(kind, _KINDS)}; it must be 'local', 'flight://host:port,...' or 'redis-cluster://host:port,...'")
    if cache_rows < 0:
        raise ValueError(f"cache_rows is {cache_rows}; it must be 0 (no cache) or more")
    if cache_rows and kind == "local":
        raise ValueError("cache_rows is for remote stores: local rows are in memory as it is")
    manifest.verify(verify, rows=kind == "local")
    if kind == "local":
        return LocalStore(manifest.tables, manifest.root, manifest.base)
    store: RemoteStore
    if kind == "flight":
        from ...kernels.gather.flight import FlightStore

        store = FlightStore(address, manifest.tables, manifest.digest, deadline_ms / 1e3)
    else:
        from ...kernels.gather.redis_rows import RedisStore

        store = RedisStore(address, published(manifest), deadline_ms / 1e3)
    if cache_rows:
        store = HotRows(store, manifest.tables, cache_rows)
    return Unique(store, manifest.tables)


def set_deadline(store, milliseconds: float) -> None:
    """From now on all rows of a request are to be there within so long; a local store has no deadline."""
    while hasattr(store, "store"):
        store = store.store
    if hasattr(store, "deadline"):
        store.deadline = milliseconds / 1e3


def published(manifest: Manifest) -> Published:
    """What a Redis store needs to know of the version."""
    base = None if manifest.base is None else manifest.raw["base"]["digest"]
    return Published(manifest.model, manifest.digest, manifest.tables, base, manifest.root)
