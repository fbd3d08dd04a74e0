"""``load_serving``: a served model in a process. numpy in, numpy out, from many threads; imports no torch.

    request -> checks -> [pre.onnx: ids] -> one lookup for all tables -> dense.onnx (ONNX Runtime) -> answer
"""
from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

try:
    import onnxruntime
except ImportError as error:
    raise ImportError("serving needs ONNX Runtime: pip install 'tablewright[serving]'") from error

from ...kernels.errors import ServingError, VersionSkew
from ...kernels.gather.known_ids import KnownIds
from ...kernels.gather.request import Lookups, Store
from ...kernels.gather.turns import Turns, cores
from . import manifest as manifests
from .manifest import Manifest
from .request_inputs import BATCH, Inputs
from .stores import open_store, set_deadline

DEFAULTS = "defaults.npz"
IDS = "ids.npz"  # of tables with dynamic ids
PARITY = "parity.npz"


class Version:
    """One exported version, ready to answer: its graphs and a store that is bound to its digest. Thread-safe; never changes."""

    def __init__(self, manifest: Manifest, store: Store, threads: int = 1) -> None:
        raw = manifest.raw
        self.manifest, self.store = manifest, store
        shared = raw["shared"]
        self.inputs = Inputs(raw["inputs"], shared["inputs"] if shared else ())
        defaults = dict(np.load(manifest.root / DEFAULTS)) if DEFAULTS in raw["files"] else {}
        ids = dict(np.load(manifest.root / IDS)) if IDS in raw["files"] else {}
        known = {name: KnownIds(each, raw["dynamic_ids"][name]) for name, each in ids.items()}
        self.lookups = Lookups(raw["lookups"], raw["joins"], manifest.tables, defaults, store, known)
        self._outputs = raw["outputs"]
        self._result = raw["result"]
        self._dense = _Session(manifest.root / "dense.onnx", threads)
        self._pre = _Session(manifest.root / "pre.onnx", threads) if "pre.onnx" in raw["files"] else None
        self._shared = _Session(manifest.root / "shared.onnx", threads) if "shared.onnx" in raw["files"] else None
        self._rest = _Session(manifest.root / "rest.onnx", threads) if shared else None
        self._repeated = {*shared["inputs"], *(raw["lookups"][i]["rows"] for i in shared["lookups"]), *shared["cut"]} if shared else set()

    def run(self, given: Mapping[str, Any]) -> tuple[list[np.ndarray], tuple[float, float, float]]:
        """Outputs in the manifest's order, and the seconds that checks and ids, the lookup and the dense part took."""
        started = time.perf_counter()
        env, batch, once = self.inputs.checked(given)
        if batch == 0 and (empty := self._empty()) is not None:
            return empty, (time.perf_counter() - started, 0.0, 0.0)
        if self._pre is not None:
            env.update(zip(self._pre.outputs, self._pre(env)))
        ready = time.perf_counter()
        env.update(self.lookups(env))
        looked = time.perf_counter()
        outputs = self._once(env, batch) if once else self._dense(env)
        return outputs, (ready - started, looked - ready, time.perf_counter() - looked)

    def _once(self, env: dict[str, np.ndarray], batch: int | None) -> list[np.ndarray]:
        """The shared part at batch 1, its results repeated for every row of the rest."""
        if self._shared is not None:
            env.update(zip(self._shared.outputs, self._shared(env)))
        rest: _Session = self._rest  # type: ignore[assignment]
        for name in rest.inputs:
            if name in self._repeated:
                env[name] = np.repeat(env[name], batch, axis=0)  # type: ignore[arg-type]
        return rest(env)

    def _empty(self) -> list[np.ndarray] | None:
        """The outputs of an empty batch, where all their other sizes are known."""
        shapes = [[0 if s == BATCH else s for s in o["shape"]] for o in self._outputs]
        if not all(o["shape"][:1] == [BATCH] and all(type(s) is int for s in shape) for o, shape in zip(self._outputs, shapes)):
            return None
        return [np.empty(shape, o["dtype"]) for o, shape in zip(self._outputs, shapes)]

    def result(self, outputs: list[np.ndarray]) -> Any:
        """``outputs`` in the form that the model returns: one array, a tuple, or a dict by name."""
        if self._result == "tensor":
            return outputs[0]
        if self._result == "tuple":
            return tuple(outputs)
        return {o["name"]: value for o, value in zip(self._outputs, outputs)}

    def replay(self) -> float:
        """Run the recorded inputs; the largest difference from what the export computed from them.

        Raises :class:`VersionSkew` where it is more than the manifest allows: these rows and this graph do not belong together."""
        parity, worst = self.manifest.raw["parity"], 0.0
        with np.load(self.manifest.root / PARITY) as recorded:
            for k in range(parity["batches"]):
                outputs, _ = self.run({d["name"]: recorded[f"{k}.input.{d['name']}"] for d in self.manifest.raw["inputs"]})
                for description, got in zip(self._outputs, outputs):
                    wanted = recorded[f"{k}.served.{description['name']}"]
                    difference = apart(got, wanted)
                    if not difference <= parity["tolerance"]:
                        raise VersionSkew(
                            f"version '{self.manifest.version}' does not repeat its recorded answers: output '{description['name']}' differs by "
                            f"{difference:.3g}, and {parity['tolerance']:.3g} is allowed. The store holds other rows, or this machine computes otherwise"
                        )
                    worst = max(worst, difference)
        return worst


def apart(got: np.ndarray, wanted: np.ndarray) -> float:
    """The largest difference, of floats as a part of the largest recorded value where that is above 1; NaN equals NaN."""
    if got.shape != wanted.shape or got.dtype != wanted.dtype:
        return float("inf")
    if got.dtype.kind != "f":
        return 0.0 if np.array_equal(got, wanted) else float("inf")
    same = (got == wanted) | (np.isnan(got) & np.isnan(wanted))
    if same.all():
        return 0.0
    finite = np.abs(wanted[np.isfinite(wanted)])
    with np.errstate(invalid="ignore"):
        difference = np.where(same, 0, np.abs(got.astype(np.float64) - wanted))
    return float(np.max(difference) / max(1.0, float(finite.max()) if finite.size else 1.0))


class _Session:
    """ONNX Runtime on one file. Thread-safe."""

    def __init__(self, path: Path, threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        self._file = path.name
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.inputs = [i.name for i in self._session.get_inputs()]
        self.outputs = [o.name for o in self._session.get_outputs()]

    def __call__(self, env: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        try:
            return self._session.run(self.outputs, {name: env[name] for name in self.inputs})  # type: ignore[return-value]
        except Exception as error:
            shapes = ", ".join(f"{name} {list(env[name].shape)}" for name in self.inputs)
            raise ServingError(f"{self._file} failed on {shapes}: {error}") from error


class Predictor:
    """A served model. ``p(**inputs)`` takes arrays by input name and returns what the model returns, as numpy arrays. Each call is
    answered by one version, however many reloads happen meanwhile. Made by :func:`load_serving`."""

    def __init__(self, home: Path, options: Mapping[str, Any], pinned: bool, at_once: int) -> None:
        self._home, self._options, self._pinned = home, options, pinned
        self._turns = Turns(at_once)
        self._lock = threading.Lock()  # of reloads; requests never wait for it
        self._version = self._load(home)
        self._before: Version | None = None
        self._counts_lock = threading.Lock()
        self._requests = self._failures = 0
        self._latest: deque[tuple[float, float, float]] = deque(maxlen=2048)

    def __call__(self, **inputs: Any) -> Any:
        """Raises :class:`InputError` and :class:`IdOutOfRange` for a wrong request, :class:`StoreUnavailable` and
        :class:`VersionSkew` (named in ``tablewright.ServingError``) where the rows cannot be had."""
        return self.answer(inputs)[0]

    def answer(self, inputs: Mapping[str, Any]) -> tuple[Any, Version]:
        """The result of a call, and the version that made it."""
        outputs, version = self._run(inputs)
        return version.result(outputs), version

    def outputs(self, inputs: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], Version]:
        """The outputs by name, and the version that made them."""
        outputs, version = self._run(inputs)
        return {d["name"]: value for d, value in zip(version.manifest.raw["outputs"], outputs)}, version

    def _run(self, inputs: Mapping[str, Any]) -> tuple[list[np.ndarray], Version]:
        try:
            with self._turns:
                version = self._version  # read once: from here on nothing else is asked which version it is
                outputs, seconds = version.run(inputs)
        except Exception:
            with self._counts_lock:
                self._requests += 1
                self._failures += 1
            raise
        with self._counts_lock:
            self._requests += 1
            self._latest.append(seconds)
        return outputs, version

    @property
    def manifest(self) -> Manifest:
        """Of the version that answers now."""
        return self._version.manifest

    @property
    def version(self) -> str:
        """Name of the version that answers now."""
        return self.manifest.version

    def reload(self, version: str | None = None) -> str:
        """Answer from ``version`` (default: what ``CURRENT`` says) from now on, and return its name. It is loaded and replays its recorded
        answers first; whatever fails, the present version stays. Calls under way end on the version they began with."""
        with self._lock:
            home = self._version.manifest.root.parent
            name = version or manifests.current(home)
            if name != self.version:
                self._swap(self._load(home / name))
            return self.version

    def rollback(self) -> str:
        """Back to the version before this one, here and in ``CURRENT``; returns its name. Raises :class:`ServingError` without one."""
        with self._lock:
            present, before = self._version, self._before
            home = present.manifest.root.parent
            if before is None:
                name = present.manifest.raw["previous"]
                if name is None:
                    raise ServingError(f"version '{self.version}' is the first one: there is none to go back to")
                before = self._load(home / name)
            if not self._pinned:
                manifests.set_current(home, before.manifest.version)
            self._swap(before)
            return self.version

    def _swap(self, version: Version) -> None:
        self._before, self._version = self._version, version

    def _load(self, root: Path) -> Version:
        manifest = manifests.read(root)
        options = dict(self._options)
        threads, deadline = options.pop("threads"), options.pop("deadline_ms")
        store = open_store(manifest, **options)
        try:
            version = Version(manifest, store, threads)
            version.replay()  # the first requests connect and read from disk: they have more time
            set_deadline(store, deadline)
        except BaseException:
            store.close()
            raise
        return version

    def stats(self) -> dict[str, Any]:
        """Counts since loading, and times of the latest requests in milliseconds."""
        with self._counts_lock:
            latest, requests, failures = list(self._latest), self._requests, self._failures
        times = {}
        for k, part in enumerate(("inputs", "lookup", "dense")):
            taken = sorted(each[k] * 1e3 for each in latest)
            times[part] = {f"p{q}": taken[min(len(taken) - 1, len(taken) * q // 100)] for q in (50, 95, 99)} if taken else {}
        version = self._version
        return {"version": version.manifest.version, "requests": requests, "failures": failures, "milliseconds": times,
                "missing_ids": dict(version.lookups.missing), "store": getattr(version.store, "stats", dict)()}  # fmt: skip

    def close(self) -> None:
        """Let go of the store. Calls after it fail."""
        for version in (self._version, self._before):
            if version is not None:
                version.store.close()


def load_serving(
    directory: str | os.PathLike, store: str = "local", *, deadline_ms: float = 50, cache_rows: int = 0, threads: int = 1, at_once: int | None = None,
    verify: str = "full",
) -> Predictor:  # fmt: skip
    """The model that :func:`export_serving` wrote: ``directory`` is the model's (its ``CURRENT`` is followed) or one version's.

    ``store``: "local" (the version's own files, mapped), "flight://host:port,host:port|host:port" (shard servers; ``|`` between
    replicas) or "redis-cluster://host:port,...". ``deadline_ms``: for all rows of a request. ``cache_rows``: rows kept here in front
    of a remote store. ``threads``: of ONNX Runtime, for one request. ``at_once``: how many requests are worked on at the same time, while those of more
    threads wait in the order they came in (one that waits for another machine does not count); default: this process's cores, at least 2.
    More pay only where local rows are read from a disk. ``verify``: "full" compares every checksum, "size" sizes only.

    Raises :class:`~tablewright.ExportError` where there is no version, :class:`CorruptShard`, :class:`VersionSkew`,
    :class:`StoreUnavailable`; the recorded requests are answered once before it returns."""
    if not deadline_ms > 0:
        raise ValueError(f"deadline_ms is {deadline_ms}; it must be above 0")
    if at_once is not None and at_once < 1:
        raise ValueError(f"at_once is {at_once}; it must be 1 or more, or None for the cores of this process")
    home = Path(directory)
    options = {"spec": store, "deadline_ms": deadline_ms, "cache_rows": cache_rows, "threads": threads, "verify": verify}
    return Predictor(home, options, (home / manifests.NAME).is_file(), cores() if at_once is None else at_once)


