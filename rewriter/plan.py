"""What to do to a model, as data: a frozen tree that prints, diffs, and round-trips through YAML and JSON exactly.

```yaml
version: 1
embedding_optimizer: {rowwise_adagrad: {lr: 0.01, eps: 1.0e-8, in_backward: true}}
tables:                       # globs on module paths; every matching entry applies, key by key, the earlier one winning
  "user*": {embedding_optimizer: {adagrad: {lr: 0.02}}}
  "frozen.*": {trainable: false}
  "huge.*": {dtype: bf16}     # fp32 | fp16 | bf16 | int8: in memory of their own; updates in the backward round stochastically
passes: {group_tables: true}  # absent = default, false = off, mapping = options
numerics: reassociated        # exact | reassociated | approximate: the loosest class of rewrite allowed
precision: fp32               # fp32 | bf16 | fp16: of the dense part; parameters, tables and updates stay fp32
huge_pages: true              # ask the kernel to keep big CPU tables on huge pages; moves memory, changes no value
keep_memory: true             # the C allocator of the process keeps up to 1 GiB that a step frees for the next one
serving: {inline_below: 0}    # tables of fewer bytes stay inside the graph that tw.export_serving writes
training: {accumulate: 1}     # of the loop, as is pipeline: {prefetch: 2, staleness: 0} (``loop_plan.py``)
```

Over several ranks an entry of ``tables`` also says where: ``{sharding: row_wise, ranks: [0, 1], exchange: unique, communication:
{forward: fp16, backward: bf16}}`` (``placement.py`` says what each word means). A table that is larger than memory has
``{storage: {cache: 4GB, path: user.rows}}`` (``storage.py``), one that is to be smaller ``{compress: {hashing: {rows: 1000}}}``
(``compression.py``), one whose ids are any 64-bit numbers ``{ids: {dynamic: true, capacity: 50_000_000}}`` (``dynamic_ids.py``).
"""
from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import yaml
from torch import nn

from .. import passes as registry
from ..passes.fuse_mlp import FuseMlp
from ..passes.mixed_precision import PRECISIONS, MixedPrecision
from ..passes.recompute_modules import RecomputeModules
from ..passes.records import NUMERICS
from ..passes.rule import Pass
from .compression import Compression, compression_from, compression_to
from .dynamic_ids import DynamicIds, ids_from
from .errors import PlanError, nearest
from .loop_plan import PipelinePlan, TrainingPlan, refuse_together, said
from .optimizer_plan import EmbeddingOptimizer, check_optimizer, optimizer_from, optimizer_to
from .placement import Communication, check_placement, check_together, communication_from
from .plan_words import expect, part_from, plain, refuse_unknown
from .storage import Storage, storage_from

_STORED = (*PRECISIONS, "int8")  # dtypes of tables


@dataclass(frozen=True)
class TablePlan:
    """What a plan says of the tables that one glob matches; ``None`` says nothing. ``trainable: false`` freezes them in the
    optimized model, whatever ``requires_grad`` says. ``dtype``: store them in it, apart from the plain model's; their optimizer then is
    the plan's, in the backward, if they are trained. int8 (a byte a value, a scale and an offset a row) is for frozen tables. The rest places them on ranks (``placement.py``)."""

    embedding_optimizer: EmbeddingOptimizer | None = None
    trainable: bool | None = None
    dtype: str | None = None
    sharding: str | None = None
    ranks: tuple[int, ...] | None = None
    exchange: str | None = None
    communication: Communication | None = None
    split: str | None = None
    reduce_in_node: bool | None = None
    storage: Storage | None = None
    compress: Compression | None = None
    ids: DynamicIds | None = None

    def __post_init__(self) -> None:
        check_optimizer(self.embedding_optimizer, "tables.<glob>.embedding_optimizer")
        expect(self.trainable is None or isinstance(self.trainable, bool), "tables.<glob>.trainable", self.trainable, "true or false")
        expect(self.storage is None or isinstance(self.storage, Storage), "tables.<glob>.storage", self.storage, "a tw.Storage")
        ok = self.compress is None or isinstance(self.compress, Compression)
        expect(ok, "tables.<glob>.compress", self.compress, "one of tw.Hashing, tw.QuotientRemainder, tw.MixedDim, tw.ProductQuantization")
        expect(self.ids is None or isinstance(self.ids, DynamicIds), "tables.<glob>.ids", self.ids, "a tw.DynamicIds")
        expect(self.dtype is None or self.dtype in _STORED, "tables.<glob>.dtype", self.dtype, " | ".join(_STORED))
        ranks = check_placement(self.sharding, self.ranks, self.exchange, self.communication, self.split, self.reduce_in_node, "tables.<glob>")
        object.__setattr__(self, "ranks", ranks)


@dataclass(frozen=True)
class ServingPlan:
    """What a plan says of exports. ``inline_below``: tables of fewer bytes stay inside the serving graph."""

    inline_below: int = 0

    def __post_init__(self) -> None:
        ok = type(self.inline_below) is int and self.inline_below >= 0
        expect(ok, "serving.inline_below", self.inline_below, "a number of bytes, 0 or more")


@dataclass(frozen=True)
class Plan:
    """A plan. Fields are the keys of its text form; see the module's example. Raises :class:`PlanError` on anything unknown,
    with the nearest match."""

    embedding_optimizer: EmbeddingOptimizer | None = None
    tables: Mapping[str, TablePlan] = field(default_factory=dict)
    passes: Mapping[str, bool | Mapping[str, Any]] = field(default_factory=dict)
    numerics: str = "reassociated"
    precision: str = "fp32"
    huge_pages: bool = True
    keep_memory: bool = True
    serving: ServingPlan = field(default_factory=ServingPlan)
    training: TrainingPlan = field(default_factory=TrainingPlan)
    pipeline: PipelinePlan = field(default_factory=PipelinePlan)
    version: int = 1
    forecast: ClassVar[Any] = None  # of one that the planner made: no part of what the plan says

    def __post_init__(self) -> None:
        expect(self.version == 1 and type(self.version) is int, "version", self.version, "1")
        expect(self.numerics in NUMERICS, "numerics", self.numerics, " | ".join(NUMERICS))
        expect(self.precision in PRECISIONS, "precision", self.precision, " | ".join(PRECISIONS))
        for key in ("huge_pages", "keep_memory"):
            expect(isinstance(getattr(self, key), bool), key, getattr(self, key), "true or false")
        expect(isinstance(self.serving, (ServingPlan, Mapping)), "serving", self.serving, "a mapping, as {inline_below: 4096}")
        if isinstance(self.serving, Mapping):
            for key in self.serving:
                refuse_unknown(key, [f.name for f in fields(ServingPlan)], "serving", "key")
            object.__setattr__(self, "serving", ServingPlan(**self.serving))
        check_optimizer(self.embedding_optimizer, "embedding_optimizer")
        expect(isinstance(self.tables, Mapping), "tables", self.tables, "a mapping from globs to settings")
        expect(isinstance(self.passes, Mapping), "passes", self.passes, "a mapping from pass names to true, false or options")
        for glob in self.tables:
            expect(isinstance(glob, str), "a key of tables", glob, "a glob on module paths")
        tables = {k: v if isinstance(v, TablePlan) else _table_from(v, f"tables.{k}") for k, v in self.tables.items()}
        object.__setattr__(self, "tables", MappingProxyType(tables))
        loose = [(f"{g}.compress: {t.compress.key} gives a table fewer numbers", "compress") for g, t in tables.items() if t.compress is not None]
        loose += [(f"{g}.dtype: int8 keeps a byte of a number", "dtype") for g, t in tables.items() if t.dtype == "int8"]
        if loose and self.numerics != "approximate":
            what, key = loose[0]
            raise PlanError(
                f"tables.{what}, which is approximate, and the plan allows numerics: {self.numerics}. Say numerics: approximate, or leave {key} out"
            )
        known = {p.name: p for p in registry.DEFAULT}
        chosen: dict[str, Any] = {}
        for name, setting in self.passes.items():
            refuse_unknown(name, known, "passes", "pass")
            if isinstance(setting, Mapping):
                setting = dict(setting)
                for option in setting:
                    refuse_unknown(option, [f.name for f in fields(known[name])], f"passes.{name}", "option")
                try:
                    known[name](**setting)
                except (TypeError, ValueError) as error:
                    raise PlanError(f"passes.{name}.{error}") from None
            else:
                expect(isinstance(setting, bool), f"passes.{name}", setting, "true, false or a mapping of options")
            chosen[name] = setting
        object.__setattr__(self, "passes", MappingProxyType(chosen))
        self._check_precision()
        object.__setattr__(self, "training", part_from(TrainingPlan, self.training, "training", "{accumulate: 4}"))
        object.__setattr__(self, "pipeline", part_from(PipelinePlan, self.pipeline, "pipeline", "{staleness: 1}"))
        refuse_together(self.training, self.pipeline, self.numerics, self.tables, self.embedding_optimizer)

    def _check_precision(self) -> None:
        """``precision`` asks for an approximate rewrite by name, so ``numerics: reassociated`` does not forbid it."""
        setting = self.passes.get(MixedPrecision.name, True)
        if isinstance(setting, Mapping) and "precision" in setting:
            raise PlanError(f"passes.{MixedPrecision.name}.precision: say precision: {setting['precision']} at the top of the plan")
        if self.precision != "fp32" and (setting is False or self.numerics == "exact"):
            why = "numerics: exact" if self.numerics == "exact" else f"passes.{MixedPrecision.name}: false"
            raise PlanError(f"precision is {self.precision}, which {why} forbids; take one of them out of the plan")

    def __hash__(self) -> int:
        return hash(json.dumps(self.to_dict()))

    def __reduce__(self):
        return Plan.from_dict, (self.to_dict(),)

    @staticmethod
    def auto(
        model: nn.Module, *, sample_inputs: Any = None, sample_kwargs: Mapping[str, Any] | None = None, topology: Any = None,
        optimizer: Any = None, constraints: Plan | None = None,
    ) -> Plan:  # fmt: skip
        """The plan that ``"auto"`` means: every exact or reassociated rewrite, and the user's own optimizer.

        With a ``topology`` (a preset's name, a YAML file, a :class:`~.planner.topology.Topology`) also where each table goes, for
        ``sample_inputs`` as the batch of one rank; ``model`` may be on the meta device. ``optimizer`` (or its name) says how much state a
        table has; ``constraints`` is a plan that the result agrees with. The result's ``forecast`` has the reasons, and is printed
        with it. Raises :class:`PlanError`, also where the model does not fit, naming the table.
        """
        if topology is None:
            return constraints or Plan()
        from .planner.auto import auto_plan

        return auto_plan(model, topology, sample_inputs, sample_kwargs, optimizer, constraints)

    def __str__(self) -> str:
        """The plan as YAML; what was predicted for it as comments."""
        text = yaml.safe_dump(self.to_dict(), sort_keys=False, default_flow_style=None, width=130)
        said = "" if self.forecast is None else "\n".join(f"# {line}".rstrip() for line in str(self.forecast).splitlines()) + "\n"
        return said + text

    # --- text ----------------------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Plain values; :meth:`from_dict` reads them back to an equal plan. Keys that say nothing are left out."""
        out: dict[str, Any] = {"version": self.version}
        if self.embedding_optimizer is not None:
            out["embedding_optimizer"] = optimizer_to(self.embedding_optimizer)
        if self.tables:
            out["tables"] = {glob: _table_to(t) for glob, t in self.tables.items()}
        if self.passes:
            out["passes"] = {n: s if isinstance(s, bool) else {k: plain(v) for k, v in s.items()} for n, s in self.passes.items()}
        out["numerics"] = self.numerics
        if self.precision != "fp32":
            out["precision"] = self.precision
        out.update({key: False for key in ("huge_pages", "keep_memory") if not getattr(self, key)})
        if self.serving != ServingPlan():
            out["serving"] = {"inline_below": self.serving.inline_below}
        for key, value in (("training", said(self.training)), ("pipeline", said(self.pipeline))):
            if value:
                out[key] = value
        return out

    @staticmethod
    def from_dict(raw: Mapping[str, Any]) -> Plan:
        """A plan from plain values. Raises :class:`PlanError` naming the key and its nearest match."""
        expect(isinstance(raw, Mapping), "the plan", raw, "a mapping")
        expect("version" in raw, "version", None, "1")
        known = [f.name for f in fields(Plan)]
        for key in raw:
            refuse_unknown(key, known, "the plan", "key")
        values = dict(raw)
        for key in ("tables", "passes"):
            if values.get(key) is None:
                values.pop(key, None)
        if values.get("embedding_optimizer") is not None:
            values["embedding_optimizer"] = optimizer_from(values["embedding_optimizer"], "embedding_optimizer")
        return Plan(**values)

    @staticmethod
    def load(path: str | Path) -> Plan:
        """Read a plan from a ``.yaml`` or ``.json`` file."""
        text = Path(path).read_text()
        try:
            raw = json.loads(text) if str(path).endswith(".json") else yaml.safe_load(text)
        except (ValueError, yaml.YAMLError) as error:
            raise PlanError(f"{path} is not valid {'JSON' if str(path).endswith('.json') else 'YAML'}: {error}") from error
        try:
            return Plan.from_dict(raw)
        except PlanError as error:
            raise PlanError(f"{path}: {error}") from None

    def save(self, path: str | Path) -> None:
        """Write this plan as YAML, or as JSON if ``path`` ends so."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n" if str(path).endswith(".json") else str(self))

    # --- meaning -------------------------------------------------------------------------------------------------------------

    def resolve(self, tables: Iterable[str], aliases: Mapping[str, Iterable[str]] | None = None) -> dict[str, TablePlan]:
        """What the plan says of each table (by parameter name, ``"user.emb.weight"``). Globs match that name, its module path,
        or another name of the same parameter (``aliases``, for tied tables).

        Raises :class:`PlanError` for a glob that matches no table, and for ranks that do not go with a table's sharding.
        """
        names = {name: [name, *(aliases or {}).get(name, ())] for name in tables}
        for glob in self.tables:
            if not any(_matches(glob, name) for known in names.values() for name in known):
                paths = [_module_path(n) for n in names]
                raise PlanError(
                    f"tables: no table matches '{glob}'{nearest(glob, paths)}. "
                    f"The model's tables: {', '.join(paths[:20]) or 'none'}{', ...' if len(paths) > 20 else ''}"
                )
        resolved = {}
        for name, known in names.items():
            entries = [t for glob, t in self.tables.items() if any(_matches(glob, each) for each in known)]
            entries.append(TablePlan(embedding_optimizer=self.embedding_optimizer))
            chosen = {
                f.name: next((v for e in entries if (v := getattr(e, f.name)) is not None), None) for f in fields(TablePlan)
            }
            check_together(name, chosen["sharding"], chosen["ranks"], chosen["exchange"], chosen["reduce_in_node"])
            placed = chosen["sharding"] or ("in tiers" if chosen["storage"] is not None else "with dynamic ids" if chosen["ids"] is not None else "")
            if chosen["ids"] is not None and (other := next((k for k in ("sharding", "storage") if chosen[k] is not None), None)):
                raise PlanError(f"tables: '{name}' has dynamic ids and {other}, which do not go together yet")
            if placed and (chosen["dtype"] or "fp32") != "fp32":
                raise PlanError(f"tables: '{name}' is both {placed} and stored as {chosen['dtype']}, which do not go together yet")
            resolved[name] = TablePlan(**chosen)
        return resolved

    def says(self, key: str, names: Mapping[str, Iterable[str]]) -> dict[str, Any]:
        """The value of ``key`` for each table (by parameter name; ``names`` also gives the other names of each) of which the plan says one."""
        found = {}
        for name, aliases in names.items():
            values = (v for glob, t in self.tables.items() if (v := getattr(t, key)) is not None and any(_matches(glob, n) for n in (name, *aliases)))
            if (value := next(values, None)) is not None:
                found[name] = value
        return found

    def make_passes(self) -> list[Pass | Disabled]:
        """The passes to run, in order, and those that are off with the reason."""
        made: list[Pass | Disabled] = []
        for cls in registry.DEFAULT:
            setting = self.passes.get(cls.name, True)
            if setting is False:
                made.append(Disabled(cls, f"the plan says passes.{cls.name}: false"))
            elif cls is MixedPrecision:
                made.append(cls(precision=self.precision))
            elif cls is RecomputeModules and self.training.checkpoint:
                made.append(cls(modules=self.training.checkpoint))
            elif cls is FuseMlp and self.training.in_backward == "all" and cls.name not in self.passes:
                made.append(Disabled(cls, "in_backward: all frees gradients one by one, and a fused perceptron makes all of its own at once; passes.fuse_mlp: true takes it"))
            elif NUMERICS.index(cls.numerics) > NUMERICS.index(self.numerics):
                made.append(Disabled(cls, f"it is {cls.numerics}, and the plan allows {self.numerics} at most"))
            else:
                made.append(cls(**(setting if isinstance(setting, Mapping) else {})))
        return made


@dataclass(frozen=True)
class Disabled:
    """A pass that the plan does not allow."""

    cls: type[Pass]
    reason: str


# --- helpers -----------------------------------------------------------------------------------------------------------------


def _module_path(name: str) -> str:
    return name.removesuffix(".weight")


def _matches(glob: str, name: str) -> bool:
    return fnmatch.fnmatchcase(name, glob) or fnmatch.fnmatchcase(_module_path(name), glob)


def _table_from(raw: Any, where: str) -> TablePlan:
    expect(isinstance(raw, Mapping), where, raw, "a mapping of settings")
    for key in raw:
        refuse_unknown(key, [f.name for f in fields(TablePlan)], where, "key")
    values = dict(raw)
    if values.get("embedding_optimizer") is not None:
        values["embedding_optimizer"] = optimizer_from(values["embedding_optimizer"], f"{where}.embedding_optimizer")
    if values.get("communication") is not None:
        values["communication"] = communication_from(values["communication"], f"{where}.communication")
    if values.get("storage") is not None:
        values["storage"] = storage_from(values["storage"], f"{where}.storage")
    if values.get("compress") is not None:
        values["compress"] = compression_from(values["compress"], f"{where}.compress")
    if values.get("ids") is not None:
        values["ids"] = ids_from(values["ids"], f"{where}.ids")
    try:
        return TablePlan(**values)
    except PlanError as error:
        raise PlanError(str(error).replace("tables.<glob>", where, 1)) from None


def _table_to(value: TablePlan) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for f in fields(value):
        setting = getattr(value, f.name)
        if setting is not None:
            text = optimizer_to(setting) if isinstance(setting, EmbeddingOptimizer) else plain(setting)
            text = setting.to_dict() if isinstance(setting, (Storage, DynamicIds)) else text
            text = compression_to(setting) if isinstance(setting, Compression) else text
            out[f.name] = asdict(setting) if isinstance(setting, Communication) else text
    return out
