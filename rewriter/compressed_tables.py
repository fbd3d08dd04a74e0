"""Compress the tables for which the plan says so, or store them in int8: smaller ones in their place, in the shell and in the user's optimizer.

The user's own model keeps its tables, untouched. In the optimized model ``user.weight`` becomes the parameters ``user.quotient`` and
``user.remainder`` (or ``user.hashed``; ``user.base`` and ``user.projection``; the buffers ``user.codebooks`` and ``user.codes``, or ``user.int8``), fitted to the
rows that the plain table holds; ``capture/compressed.py`` says what a ``state_dict()`` means then.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..kernels.codecs.op import row_bytes
from ..passes.records import APPLIED, SKIPPED, Record
from .capture.compressed import Compressed, compress, too_wide
from .compression import Compression, Hashing, Int8Rows, MixedDim, ProductQuantization, QuotientRemainder
from .errors import PlanError
from .meta_weights import begin
from .plan import Plan, TablePlan


class CompressedTables:
    """What was done: a record for each table; ``names``: of each part the plain names of its table; ``saved``: bytes, by the plain
    name, in the plain model and here."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.names: dict[str, list[str]] = {}
        self.saved: dict[str, tuple[int, int]] = {}

    def notes(self) -> list[str]:
        """For the report."""
        before, after = (sum(sizes) for sizes in zip(*self.saved.values())) if self.saved else (0, 0)
        said = f"{len(self.saved)} tables in smaller forms have {after:,} bytes instead of {before:,}; report.table() says which and how"
        return [said] if self.saved else []

    def refuse_others(self, resolved: Mapping[str, TablePlan]) -> None:
        """Raises :class:`PlanError` for a table that is to be compressed and belongs to no module that can be."""
        known = {r.subject for r in self.records}
        for name, plan in resolved.items():
            key, what = ("compress", "compressed") if plan.compress is not None else ("dtype", "stored in int8")
            if (plan.compress is not None or plan.dtype == "int8") and name not in known and name not in self.names:
                raise PlanError(
                    f"tables: '{name}' is to be {what}, and it is no weight of an nn.Embedding or nn.EmbeddingBag; only those can be. "
                    f"Take {key} out of that entry of the plan"
                )


def is_table(module: nn.Module, key: str) -> bool:
    """Is tensor ``key`` of ``module`` one that lookups are there to read?"""
    return key in module.tables if isinstance(module, Compressed) else isinstance(module, (nn.Embedding, nn.EmbeddingBag))


@contextmanager
def compressed(shell: nn.Module, plan: Plan, optimizer: Optimizer | None, over_ranks: bool) -> Iterator[CompressedTables]:
    """Compress tables of ``shell``; on an error ``optimizer`` is as it was. Raises :class:`PlanError` where a table cannot be compressed as
    the plan says; one that would not become smaller stays, with the reason in its record."""
    done = CompressedTables()
    owners = _owners(shell) if any(t.compress is not None or t.dtype == "int8" for t in plan.tables.values()) else {}
    undo: list[Callable[[], Any]] = []
    state = {} if optimizer is None else dict(optimizer.state)
    try:
        known = {name: names for name, (_, names, _) in owners.items()}
        wanted = {name: Int8Rows() for name, word in plan.says("dtype", known).items() if word == "int8"} | plan.says("compress", known)
        for name, how in wanted.items():
            table, names, modules = owners[name]
            own = "dtype" if isinstance(how, Int8Rows) else "compress"
            kind = ("stored tables", "storage") if own == "dtype" else ("compressed tables", "compress")
            for key in (f.name for f in fields(TablePlan) if f.name not in (own, "embedding_optimizer", "trainable")):
                other = plan.says(key, {name: names}).get(name, "fp32")
                if other != "fp32":
                    raise PlanError(f"tables: '{name}' has {own} and {key}: {other}, which do not go together yet; leave one of them out")
            _check(name, table, modules, how, over_ranks)
            if own == "dtype" and table.requires_grad and plan.says("trainable", {name: names}).get(name) is not False:
                raise PlanError(
                    f"the plan stores table '{name}' as int8, and it is trained: int8 rows are for tables that are not. "
                    "Say trainable: false for it, or dtype: fp16 or bf16"
                )
            if reason := _too_small(table, how):
                done.records.append(Record(kind[0], SKIPPED, name, kind[1], reason))
                continue
            made = compress(modules, how)
            parts, began = made.parts(), ""
            if optimizer is not None and own == "compress" and _hand_over(optimizer, name, table, parts, how, undo):
                began = "; its optimizer state begins anew"
            before, after = (sum(t.numel() * t.element_size() for t in each) for each in ([table], parts.values()))
            done.saved[name] = before, after
            done.names.update({f"{name.removesuffix('weight')}{part}": list(names) for part in parts})
            difference = float((made.weight.detach() - table.detach()).norm() / table.detach().norm().clamp(min=1e-30))
            detail = (
                f"{_words(how)}: {after:,} bytes instead of {before:,} ({before / after:.1f} times smaller); the plain rows are met to "
                f"{difference:.2g} of their norm{began}"
            )
            done.records.append(Record(kind[0], APPLIED, name, kind[1], detail=detail))
        yield done
    except BaseException:
        for each in reversed(undo):
            each()
        if optimizer is not None and undo:
            optimizer.state.clear()
            optimizer.state.update(state)
        raise


def _owners(shell: nn.Module) -> dict[str, tuple[nn.Parameter, list[str], list[nn.Module]]]:
    """Of each table that is the weight of an embedding module: itself, all its names, and all modules that hold it."""
    found: dict[int, tuple[str, nn.Parameter, list[str], list[nn.Module]]] = {}
    for path, module in shell.named_modules(remove_duplicate=False):
        for key, param in module._parameters.items():
            if param is not None:
                name = f"{path}.{key}" if path else key
                _, _, names, modules = found.setdefault(id(param), (name, param, [], []))
                names.append(name)
                modules += [] if module in modules else [module]
    return {
        name: (param, names, modules) for name, param, names, modules in found.values()
        if any(isinstance(m, (nn.Embedding, nn.EmbeddingBag)) and m._parameters.get("weight") is param for m in modules)
    }  # fmt: skip


def _check(name: str, table: nn.Parameter, modules: list[nn.Module], how: Compression, over_ranks: bool) -> None:
    def refuse(why: str) -> PlanError:
        what, key = ("stored in int8", "dtype") if isinstance(how, Int8Rows) else (f"compressed by {how.key}", "compress")
        return PlanError(f"tables: '{name}' cannot be {what}: {why}. Take {key} out of that entry of the plan")

    if over_ranks:
        raise refuse("the model runs over several ranks (mesh=), which is not supported yet")
    if table.is_meta or table.dtype not in (torch.float32, torch.float64):
        raise refuse(f"it is {table.dtype} on {table.device}; rows in float32 or float64 are needed, to be fitted")
    if isinstance(how, Int8Rows) and table.dtype != torch.float32:
        raise refuse(f"it is {table.dtype}, and int8 rows are read in float32")
    if not bool(torch.isfinite(table).all()):
        raise refuse("it holds numbers that are not finite, which would spread to other rows")
    if isinstance(how, Int8Rows) and too_wide(table):
        raise refuse("a row's largest number less its smallest is beyond float32")
    if name == "weight":
        raise refuse("it is the whole model; a model that holds it as a submodule is needed")
    for module in modules:
        if type(module) not in (nn.Embedding, nn.EmbeddingBag):
            raise refuse(f"a {type(module).__name__} holds it; only weights of nn.Embedding and nn.EmbeddingBag (not of their subclasses) can be")
        if module.max_norm is not None or module.scale_grad_by_freq:
            raise refuse(f"its module has {'max_norm' if module.max_norm is not None else 'scale_grad_by_freq'}, which is about rows that are there no more")
        if module.padding_idx != modules[0].padding_idx:
            raise refuse(f"modules that share it have padding_idx {module.padding_idx} and {modules[0].padding_idx}")
        if isinstance(module, nn.EmbeddingBag) and isinstance(how, QuotientRemainder) and how.combine == "multiply":
            raise refuse("nn.EmbeddingBag pools rows, and a sum of products is no product of sums; combine: add can be pooled")
        if isinstance(module, nn.EmbeddingBag) and module.mode == "max" and not isinstance(how, (Hashing, ProductQuantization)):
            raise refuse("its bags take the largest value, which is not that of the parts")
    padding = modules[0].padding_idx
    if isinstance(how, MixedDim) and padding is not None and bool(table[padding].any()):
        raise refuse(f"the row of its padding_idx ({padding}) is not zero, and would not be met exactly")
    if isinstance(how, ProductQuantization) and table.shape[1] % how.parts:
        raise refuse(f"its rows have {table.shape[1]} numbers, which are not {how.parts} equal parts")


def _too_small(table: Tensor, how: Compression) -> str:
    """Why the table would not become smaller, or ""."""
    (rows, dim), size = table.shape, table.element_size()
    if isinstance(how, Hashing):
        kept = (how.rows + 1) * dim * size
    elif isinstance(how, QuotientRemainder):
        kept = (how.buckets - (-rows // how.buckets) + 2) * dim * size
    elif isinstance(how, MixedDim):
        kept = (rows + dim) * how.dim * size
    elif isinstance(how, Int8Rows):
        kept = rows * row_bytes("int8", dim)
    else:
        kept = rows * how.parts + 257 * dim * size
    whole = rows * dim * size
    return f"it has {whole:,} bytes, and by {how.key} it would have {kept:,}" if kept >= whole else ""


def _hand_over(optimizer: Optimizer, name: str, table: Tensor, parts: dict[str, Tensor], how: Compression, undo: list) -> bool:
    """Put the parts in place of the table in its param group; their state begins anew. Returns whether there was one."""
    group = next((g for g in optimizer.param_groups if any(p is table for p in g["params"])), None)
    kind = type(optimizer).__name__
    if group is None:
        if isinstance(how, MixedDim) and table.requires_grad:
            raise PlanError(
                f"tables: '{name}' is to have mixed_dim, and the {kind} passed as optimizer= does not hold it, so that nobody would train its "
                "projection: build that optimizer on the result's dense_parameters() instead of passing it, or let it hold the table"
            )
        return False
    if isinstance(how, ProductQuantization):
        raise PlanError(
            f"tables: '{name}' is to be product-quantized, which is for trained tables, and the {kind} passed as optimizer= is to train it: "
            "train first, and optimize then without that table in an optimizer"
        )
    if kind == "SparseAdam" and isinstance(how, MixedDim) or hasattr(optimizer, "_params"):
        what = "keeps a list of its parameters of its own" if hasattr(optimizer, "_params") else "takes sparse gradients only, and a projection's is dense"
        raise PlanError(f"tables: '{name}' is to be compressed by {how.key}, and the {kind} passed as optimizer= {what}: use another one")
    undo.append(partial(group.update, {key: group[key] for key in ("params", "param_names") if key in group}))
    at = next(i for i, p in enumerate(group["params"]) if p is table)
    group["params"] = [*group["params"][:at], *parts.values(), *group["params"][at + 1 :]]
    if "param_names" in group:
        old = group["param_names"]
        group["param_names"] = [*old[:at], *(f"{name.removesuffix('weight')}{part}" for part in parts), *old[at + 1 :]]
    held = optimizer.state.pop(table, {})
    for part in parts.values():
        begin(optimizer, group, part)
    return bool(held.get("step", held))


def _words(how: Compression) -> str:
    if isinstance(how, Hashing):
        return f"{how.rows:,} rows by the hashing trick"
    if isinstance(how, QuotientRemainder):
        return f"quotient and remainder by {how.buckets:,} buckets, {'multiplied' if how.combine == 'multiply' else 'added'}"
    if isinstance(how, MixedDim):
        return f"rows of {how.dim} numbers and a projection"
    if isinstance(how, Int8Rows):
        return "int8 rows, with a scale and an offset each, in memory of their own"
    return f"product quantization, {how.parts} bytes a row"
