"""``check_parity``: is what is served the model that was trained? Rows bit by bit, outputs within 1e-6."""
from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from ...kernels.codecs.op import decode
from ...kernels.gather.request import Store
from ...kernels.gather.tables import CODECS, Table
from ...passes.lower_to_serving import table_names
from ..errors import ExportError, VerifyError
from ..optimized_model import OptimizedModel
from ..samples import Samples
from .export import TOLERANCE
from .predictor import PARITY, apart, load_serving
from .rows_writer import encoded
from .serving_graph import served_shell
from .table_sources import step_of


@dataclass(frozen=True)
class Parity:
    """What :func:`check_parity` found. ``rows``: how many were compared; ``wrong_rows``: by table, those that are not what the model's row
    is in the stored form, or further from it than the form's bound; ``row_errors``: largest difference by table; ``outputs``: largest
    difference from the model on the stored rows (as a part of the largest output where that is above 1); ``outputs_full``: from the model on
    its own rows, which is the same for float32 tables."""

    version: str
    rows: int
    wrong_rows: Mapping[str, int]
    row_errors: Mapping[str, float]
    outputs: float
    outputs_full: float

    @property
    def ok(self) -> bool:
        """Every row is right, and outputs are within 1e-6."""
        return not any(self.wrong_rows.values()) and self.outputs <= TOLERANCE

    def raise_if_failed(self) -> None:
        """Raises :class:`~tablewright.VerifyError` unless :attr:`ok`."""
        if not self.ok:
            raise VerifyError(f"the served model is not the model that was given. {self}")

    def __str__(self) -> str:
        wrong = {name: n for name, n in self.wrong_rows.items() if n}
        worst = max(self.row_errors.values(), default=0.0)
        said = f"version {self.version}: {self.rows} rows compared, {sum(wrong.values())} wrong" + (f" ({wrong})" if wrong else "")
        return f"{said}, largest row error {worst:.3g}; outputs differ by {self.outputs:.3g} (by {self.outputs_full:.3g} from full precision), {TOLERANCE} allowed"


def check_parity(
    model: nn.Module, directory: str | os.PathLike, store: str = "local", *, sample_inputs: Any = None, sample_kwargs: Mapping[str, Any] | None = None,
    deadline_ms: float = 5000,
) -> Parity:  # fmt: skip
    """Compare ``model`` (optimized or plain, in evaluation mode) with what ``directory``'s version serves from ``store``: all rows of all
    tables, and the outputs on ``sample_inputs`` (default: the inputs recorded at export, where each is an argument of ``forward``).

    Bounds: float32 rows bit by bit; others are the codec's own bytes, and its error is at most that of ``kernels/codecs``. Outputs: within 1e-6 of
    the plain model on the decoded rows. Raises :class:`~tablewright.ExportError` where the model's tables are others."""
    if isinstance(model, OptimizedModel):
        model._alone("check_parity")
        model._follow_plain_model()
        model = model._shell
    shell = served_shell(model)
    names = table_names(shell)
    tensors = {names[id(t)]: t.detach() for t in [*shell.buffers(), *shell.parameters()] if id(t) in names}
    p = load_serving(directory, store, deadline_ms=deadline_ms)
    try:
        version = p._version
        tables = version.manifest.tables
        for name, table in tables.items():
            if name not in tensors or tuple(tensors[name].shape) != (table.rows, table.dim):
                has = list(tensors[name].shape) if name in tensors else "nothing of that name"
                raise ExportError(f"served table '{name}' is [{table.rows}, {table.dim}], and the model has {has}")
        wrong, errors, stored = {}, {}, {}
        for name, table in tables.items():
            wrong[name], errors[name], stored[name] = _rows(table, tensors[name], version.store)
        batches = _batches(version.manifest.root / PARITY, version.manifest.raw, sample_inputs, sample_kwargs)
        outputs = full = 0.0
        for args, kwargs in batches:
            given = dict(zip((d["name"] for d in version.manifest.raw["inputs"]), _tensor_leaves(args, kwargs)))
            got, _ = version.run({name: t.detach().cpu().numpy() for name, t in given.items()})
            outputs = max(outputs, _apart(got, _answers(shell, _with(shell, stored, names), args, kwargs)))
            full = max(full, _apart(got, _answers(shell, {}, args, kwargs)))
        return Parity(p.version, sum(t.rows for t in tables.values()), wrong, errors, outputs, full)
    finally:
        p.close()


def _rows(table: Table, rows: Tensor, store: Store) -> tuple[int, float, Tensor]:
    """How many rows are wrong, the largest error, and all rows as they are served."""
    wrong, worst, served = 0, 0.0, torch.empty(table.rows, table.dim)
    step = min(step_of(table.dim), 65536)
    for start in range(0, table.rows, step):
        ids = np.arange(start, min(start + step, table.rows), dtype=np.int64)
        got = np.ascontiguousarray(store.lookup_many([(table.name, ids)])[0]).view(np.uint8).reshape(len(ids), -1)
        mine = rows[start : start + step].float().cpu()
        served[start : start + step] = decode(torch.from_numpy(got), CODECS[table.row_dtype], table.dim, torch.float32)
        error = (served[start : start + step].double() - mine.double()).abs()
        finite = torch.isfinite(mine).all(1)
        far = (error > _bound(mine.double(), table.row_dtype)).any(1) & finite
        other = torch.from_numpy((got != encoded(mine, table)).any(1))
        wrong += int((far | other).sum())
        worst = max(worst, float(error[finite].max()) if bool(finite.any()) else 0.0)
    return wrong, worst, served


def _bound(rows: Tensor, row_dtype: str) -> Tensor:
    """The largest error that the form may make: see ``kernels/codecs``."""
    if row_dtype == "float32":
        return torch.zeros_like(rows)
    if row_dtype == "float16":
        return torch.where(rows.abs() < 65520, 2.0**-11 * rows.abs() + 2.0**-25, torch.inf)
    if row_dtype == "bfloat16":
        return 2.0**-9 * rows.abs() + 2.0**-134
    extent = rows.amax(1, keepdim=True) - rows.amin(1, keepdim=True)
    return (extent / 510 + 2.0**-20 * rows.abs().amax(1, keepdim=True) + 2.0**-127).expand_as(rows)


def _batches(path: Path, raw: Mapping[str, Any], sample_inputs: Any, sample_kwargs: Mapping[str, Any] | None) -> list[tuple[tuple, dict]]:
    samples = Samples.read(sample_inputs, sample_kwargs)
    if samples.args is not None:
        return [(samples.args, samples.kwargs or {}), *samples.more]
    with np.load(path) as recorded:
        return [
            ((), {d["name"]: torch.from_numpy(recorded[f"{k}.input.{d['name']}"]) for d in raw["inputs"]} | raw["fixed"])
            for k in range(raw["parity"]["batches"])
        ]  # fmt: skip


def _tensor_leaves(args: tuple, kwargs: dict) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]


def _with(shell: nn.Module, stored: Mapping[str, Tensor], names: Mapping[int, str]) -> dict[str, Tensor]:
    """The tables as they are served, by the plain model's names for them."""
    every = [*shell.named_parameters(remove_duplicate=False), *shell.named_buffers(remove_duplicate=False)]
    return {name: stored[names[id(t)]].to(t.device, t.dtype) for name, t in every if names.get(id(t)) in stored}


def _answers(shell: nn.Module, tables: dict[str, Tensor], args: tuple, kwargs: dict) -> list[Tensor]:
    copies = pytree.tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, (args, kwargs))
    try:
        with torch.no_grad():
            result = torch.func.functional_call(shell, tables, *copies)
    except TypeError as error:
        raise ExportError(f"the model could not be called on the recorded inputs ({error}); pass sample_inputs") from error
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


def _apart(got: list[np.ndarray], wanted: list[Tensor]) -> float:
    return max((apart(a, b.detach().cpu().numpy()) for a, b in zip(got, wanted)), default=0.0) if len(got) == len(wanted) else float("inf")
