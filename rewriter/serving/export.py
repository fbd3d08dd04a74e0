"""``export_serving`` and ``export_delta``: from a trained model to an immutable version directory (its layout: ``manifest.py``)."""
from __future__ import annotations

import fnmatch
import json
import os
import secrets
import shutil
import socket
import time
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

try:
    import onnx
    import onnxscript  # noqa: F401  (the exporter of torch needs it)
except ImportError as error:
    raise ImportError("exports for serving need onnx and onnxscript: pip install 'tablewright[export]'") from error

from ...kernels.gather.local import LocalStore
from ...kernels.gather.tables import CODECS, Table
from ..errors import ExportError, explain, nearest
from ..plan import Plan
from ..samples import Samples
from . import manifest as manifests
from .manifest import Manifest
from .onnx_joins import join_rows
from .onnx_split import Parts, split
from .predictor import DEFAULTS, IDS, PARITY, Version, apart
from .rank_work import RankWork, write_changes, write_tables
from .rows_writer import write_bytes
from .serving_graph import ServingGraph, left_inside, serving_graph, to_onnx
from .together import Together

TOLERANCE = 1e-6  # of outputs, as a part of the largest where that is above 1
_MISSING = ("error", "zeros", "mean")


def export_serving(
    model: nn.Module, sample_inputs: Any, directory: str | os.PathLike, *, sample_kwargs: Mapping[str, Any] | None = None,
    shards: int = 1, row_dtype: str | Mapping[str, str] = "float32", missing: str | Mapping[str, str] = "error",
    shared: Sequence[str] = (), plan: Plan | None = None, version: str | None = None, activate: bool = True,
) -> Path:  # fmt: skip
    """Write the next version of the served model ``directory`` and return its path; ``CURRENT`` then names it (``activate``).

    ``model``: what ``optimize`` returned, or a plain model; nothing of it changes. ``sample_inputs``: as for ``optimize``; their
    answers are recorded for parity. ``shards``: files a table. ``row_dtype``: "float32", "float16", "bfloat16" or "int8_rowwise", or a
    mapping from globs on table names, the first match winning. ``missing``: what stands for an id that is no row: "error" (default),
    "zeros", "mean" or "row:<id>", or a mapping likewise. ``shared``: globs on input names that a request may give once for its whole
    batch (one user, many candidates). Tables below the plan's ``serving.inline_below`` bytes stay inside the graphs. Of a table with
    dynamic ids the ids that have a row go along; all others read the plan's default and are counted, whatever ``missing`` says.

    Of a model over several ranks every rank calls it, and each writes its own rows: no table is ever whole in one process. What the first
    rank passes counts; ``directory`` must be on a file system that all share, and holds what an export of the whole model would. Where a
    rank fails, all raise its error and nothing is published. Tables in tiers are read from their store, a few MB at a time.

    Raises :class:`~tablewright.ExportError` (or CaptureError) saying what cannot be served; what was served before then still is. A rank
    that is gone is a :class:`~tablewright.PeerError`, within the timeout of the process group."""
    return _export(model, sample_inputs, directory, sample_kwargs, shards, row_dtype, missing, shared, plan, version, activate, None)


def export_delta(
    model: nn.Module, sample_inputs: Any, directory: str | os.PathLike, *, base: str | None = None,
    sample_kwargs: Mapping[str, Any] | None = None, plan: Plan | None = None, version: str | None = None, activate: bool = True,
) -> Path:  # fmt: skip
    """As :func:`export_serving`, but of the tables only the rows that differ from version ``base`` (default: the current one, or what
    that is a delta of), in its row formats. The base stays needed: its shards are read where nothing changed.

    Raises :class:`~tablewright.ExportError` where the model's tables are not those of the base."""
    return _export(model, sample_inputs, directory, sample_kwargs, 1, {}, {}, (), plan, version, activate, base or "")


def _export(model: nn.Module, *arguments: Any) -> Path:
    """The first rank leads; on others its arguments count."""
    work = RankWork(model)
    together = work.together()
    if not together.leads:
        return together.follow()
    try:
        path = _led(work, together, model, *arguments)
    except BaseException as error:
        together.end(error=error)
        raise
    together.end(path)
    return path


def _base(directory: str | os.PathLike, version: str) -> Manifest:
    """The full version that a delta is made from."""
    found = manifests.read(Path(directory) / version if version else directory)
    if found.raw["base"] is not None and version:
        raise ExportError(f"base version '{version}' is a delta itself; name the full version '{found.raw['base']['version']}'")
    while found.raw["base"] is not None:
        found = manifests.read(found.base)  # type: ignore[arg-type]
    return found


def _led(
    work: RankWork, together: Together, model, sample_inputs, directory, sample_kwargs, shards, row_dtype, missing, shared, plan, version, activate, based
) -> Path:
    base = None if based is None else _base(directory, based)
    if base is not None and base.raw["shared"]:
        shared = base.raw["shared"]["inputs"]
    if type(shards) is not int or shards < 1:
        raise ExportError(f"shards is {shards!r}; it must be a whole number above 0")
    home = Path(directory).absolute()
    name = version or f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{secrets.token_hex(2)}"
    if not name or name in (".", "..", manifests.CURRENT) or "/" in name or name.startswith(".") or name.endswith(".tmp"):
        raise ExportError(f"version is {name!r}; it must be a file name that does not start with '.' or end with '.tmp'")
    if (home / name).exists():
        raise ExportError(f"{home / name} exists already; a version never changes. Leave version= out, or choose another name")
    graph = serving_graph(model, Samples.read(sample_inputs, sample_kwargs), plan, together)
    work.given = {graph.names[key]: graph.tables[key] for key in graph.ids}
    tables = _tables(graph.tables, row_dtype, missing) if base is None else _tables_of(base, graph.tables)
    wanted = _matching(shared, list(graph.leaves[0]), "shared", "input")
    proto = to_onnx(graph)
    try:
        parts = split(proto, wanted)
    except ValueError as error:
        raise ExportError(f"the inputs {', '.join(wanted)} cannot be shared: {error}") from None
    home.mkdir(parents=True, exist_ok=True)
    _remove_unfinished(home)
    temporary = home / f".{name}.{_host()}.{os.getpid()}.tmp"
    temporary.mkdir()
    try:
        _write(temporary, home, name, graph, proto, parts, tables, shards, base, together)
        manifests.sync(temporary)
        together.ask("ready")
        os.rename(temporary, home / name)
        manifests.sync(home)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if activate:
        manifests.set_current(home, name)
    return home / name


def _write(root: Path, home: Path, name: str, graph: ServingGraph, proto: onnx.ModelProto, parts: Parts,
           tables: dict[str, Table], shards: int, base: Manifest | None, together: Together) -> None:  # fmt: skip
    files: dict[str, Any] = {}
    joins = [] if parts.shared_inputs else join_rows(parts.dense, parts.lookups)

    def put(file: str, content: bytes) -> None:
        _, size, sha256 = write_bytes(root / file, content, root)
        files[file] = {"bytes": size, "sha256": sha256}

    for file, part in (("model", proto), ("dense", parts.dense), ("pre", parts.pre), ("shared", parts.shared), ("rest", parts.rest)):
        if part is not None:
            put(f"{file}.onnx", part.SerializeToString())
    if base is None:
        written, sums = write_tables(together, root, tables, graph.names, shards)
    else:
        written, sums = write_changes(together, root, tables, graph.names, base)
    defaults = {key: np.zeros(t.dim, np.float32) for key, t in written.items() if t.missing in ("zeros", "mean")}
    defaults.update((key, (total / written[key].rows).astype(np.float32)) for key, total in sums.items())
    left_out = {name: padding for name, (_, padding) in graph.ids.items()}
    if left_out:
        _save_arrays(root / IDS, {name: ids.numpy() for name, (ids, _) in graph.ids.items()})
        put(IDS, (root / IDS).read_bytes())
    if defaults:
        _save_arrays(root / DEFAULTS, defaults)
        put(DEFAULTS, (root / DEFAULTS).read_bytes())
    previous = home / manifests.CURRENT
    raw: dict[str, Any] = {
        "format": manifests.FORMAT, "model": home.name, "version": name,
        "previous": previous.read_text().strip() if previous.is_file() else None,
        "producer": {"package": "tablewright", "torch": torch.__version__, "onnx": onnx.__version__},
        "base": None if base is None else {"version": base.version, "digest": base.digest},
        "inputs": graph.inputs, "outputs": graph.outputs, "result": graph.result, "fixed": graph.fixed,
        "lookups": parts.lookups, "joins": joins, "left_inside": left_inside(graph.records),
        "shared": None if not parts.shared_inputs else {
            "inputs": parts.shared_inputs, "lookups": parts.shared_lookups, "cut": parts.cut},
        **({"dynamic_ids": left_out} if left_out else {}),
        "tables": {key: table.to_dict() for key, table in written.items()}, "files": files,
    }  # fmt: skip
    made = Manifest(root, raw, written)
    version = Version(made, LocalStore(written, root, None if base is None else base.root))
    try:
        raw["parity"] = _record(root, version, graph)
        if parts.shared_inputs:
            _check_shared(version, graph, parts)
    finally:
        version.store.close()
    put(PARITY, (root / PARITY).read_bytes())
    raw["digest"] = manifests.digest_of(raw)
    write_bytes(root / manifests.NAME, json.dumps(raw, indent=1).encode(), root)
    manifests.Manifest(root, raw, written).verify("size")


def _save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """What ``np.savez`` writes, under any names (it has arguments of its own called ``file`` and ``allow_pickle``)."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, np.asarray(array))


def _record(root: Path, version: Version, graph: ServingGraph) -> dict[str, Any]:
    """Write ``parity.npz``: inputs, what the training model answers, and what this version does. Refuses a version that is wrong."""
    recorded: dict[str, np.ndarray] = {}
    worst, exact = 0.0, all(t.row_dtype == "float32" for t in version.manifest.tables.values())
    for k, (leaves, answers) in enumerate(zip(graph.leaves, graph.answers)):
        given = {name: leaf.cpu().numpy() for name, leaf in leaves.items()}
        outputs, _ = version.run(given)
        recorded.update({f"{k}.input.{name}": array for name, array in given.items()})
        for description, got, answer in zip(graph.outputs, outputs, answers):
            wanted = answer.numpy()
            difference = apart(got, wanted)
            worst = max(worst, difference)
            if difference == float("inf") or exact and not difference <= TOLERANCE:
                raise ExportError(explain(
                    f"the served model is not the training model: output '{description['name']}' differs by {difference:.3g} "
                    f"(shapes {list(got.shape)} and {list(wanted.shape)}, {got.dtype} and {wanted.dtype}) on the sample inputs",
                    why=f"outputs may differ by {TOLERANCE} at most", fix="report this model; the version was not written"))
            recorded[f"{k}.training.{description['name']}"] = wanted
            recorded[f"{k}.served.{description['name']}"] = got
    np.savez(root / PARITY, **recorded)  # type: ignore[arg-type]
    return {"batches": len(graph.leaves), "tolerance": TOLERANCE, "difference_to_training": worst}


def _check_shared(version: Version, graph: ServingGraph, parts: Parts) -> None:
    """One user beside many candidates gives what that user repeated gives. Raises ExportError."""
    given = {name: leaf.cpu().numpy() for name, leaf in graph.leaves[0].items()}
    batch = len(given[parts.shared_inputs[0]])
    for row in {0, batch - 1}:
        once = {n: a[row : row + 1] if n in parts.shared_inputs else a for n, a in given.items()}
        repeated = {n: np.repeat(a, batch, axis=0) if n in parts.shared_inputs else a for n, a in once.items()}
        for got, wanted in zip(version.run(once)[0], version.run(repeated)[0]):
            if not apart(got, wanted) <= TOLERANCE:
                raise ExportError(
                    f"the inputs {', '.join(parts.shared_inputs)} cannot be shared: given once they lead to answers that differ by {apart(got, wanted):.3g} "
                    "from the repeated ones, so the model mixes rows of its batch"
                )


def _tables(found: Mapping[str, Tensor], row_dtype: str | Mapping[str, str], missing: str | Mapping[str, str]) -> dict[str, Table]:
    dtypes = _per_table(row_dtype, list(found), "row_dtype", "float32")
    defaults = _per_table(missing, list(found), "missing", "error")
    tables = {}
    for name, rows in found.items():
        if dtypes[name] not in CODECS:
            raise ExportError(f"row_dtype of table '{name}' is {dtypes[name]!r}{nearest(str(dtypes[name]), CODECS)}; it must be one of {', '.join(CODECS)}")
        default = defaults[name]
        row = str(default).removeprefix("row:")
        if default not in _MISSING and not (str(default).startswith("row:") and row.isdigit() and int(row) < len(rows)):
            raise ExportError(f"missing of table '{name}' is {default!r}; it must be 'error', 'zeros', 'mean' or 'row:<id>' with an id below {len(rows)}")
        tables[name] = Table(name, *rows.shape, dtypes[name], default)
    return tables


def _tables_of(base: Manifest, found: Mapping[str, Tensor]) -> dict[str, Table]:
    """The base's tables. Raises ExportError where the model's are others."""
    have = {name: (t.rows, t.dim) for name, t in base.tables.items()}
    now = {name: tuple(t.shape) for name, t in found.items()}
    if have != now:
        other = sorted(name for name in {*have, *now} if have.get(name) != now.get(name))[0]
        raise ExportError(
            f"table '{other}' is {list(now.get(other, ())) or 'not'} in the model and {list(have.get(other, ())) or 'not'} in base version "
            f"'{base.version}'; a delta has the tables of its base. Use export_serving"
        )
    return dict(base.tables)  # in the base's order, by which stores number tables


def _per_table(choice: str | Mapping[str, str], names: list[str], what: str, default: str) -> dict[str, Any]:
    if isinstance(choice, str):
        return dict.fromkeys(names, choice)
    for glob in choice:
        if glob != "*":
            _matching([glob], names, what, "table")
    return {name: next((v for glob, v in choice.items() if fnmatch.fnmatchcase(name, glob)), default) for name in names}


def _matching(globs: Sequence[str], names: list[str], what: str, kind: str) -> list[str]:
    if isinstance(globs, str):
        raise ExportError(f"{what} is the text {globs!r}; it must be a list of globs")
    for glob in globs:
        if not fnmatch.filter(names, glob):
            raise ExportError(f"{what}: no {kind} matches '{glob}'{nearest(glob, names)}. There are: {', '.join(names) or 'none'}")
    return [name for name in names if any(fnmatch.fnmatchcase(name, glob) for glob in globs)]


def _host() -> str:
    return socket.gethostname().replace(".", "-")


def _remove_unfinished(home: Path) -> None:
    """What exports of this machine's processes that are gone have left."""
    for left in home.glob(f".*.{_host()}.*.tmp"):
        pid = left.name.split(".")[-2]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(left, ignore_errors=True)
