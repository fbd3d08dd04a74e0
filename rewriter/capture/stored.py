"""Tables that a plan stores in another dtype than the plain model's: float16 or bfloat16, in memory of their own (int8: ``compressed.py``).

In the shell the module that owns such a table becomes a :class:`StoredEmbedding` or :class:`StoredBag`: its weight is a parameter of
the low dtype, its result has the plain dtype, and its part of a ``state_dict`` is in the plain dtype, both ways. Everything that runs
on the shell (captures, methods, comparisons) then sees the same rows.
"""
from __future__ import annotations

from collections import OrderedDict
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...passes.graph import stored_tensor
from ...passes.origin import KEY
from ..errors import PlanError

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


class OwnStorage(nn.Module):
    """A module of the shell that keeps a table in another form than the plain model's: ``kept`` says how, ``key`` is the plan's word."""

    kept: ClassVar[str]
    key: ClassVar[str]


class _Stored(OwnStorage):
    kept, key = "stored in another dtype", "dtype"
    weight: Tensor
    plain_dtype: torch.dtype

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        self.plain_dtype = fn(torch.empty(0, dtype=self.plain_dtype)).dtype  # as ``.half()`` would make of the plain table
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = destination[prefix + "weight"].to(self.plain_dtype)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest):
        name = prefix + "weight"
        if local_metadata.get("assign_to_params_buffers") and isinstance(state_dict.get(name), Tensor):
            state_dict[name] = state_dict[name].to(self.weight.dtype)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


class StoredEmbedding(_Stored, nn.Embedding):
    """nn.Embedding over rows of a lower dtype."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.embedding(
            input, self.weight, self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse
        ).to(self.plain_dtype)


class StoredBag(_Stored, nn.EmbeddingBag):
    """nn.EmbeddingBag over rows of a lower dtype; a bag's sum is rounded to it once."""

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        given = None if per_sample_weights is None else per_sample_weights.to(self.weight.dtype)
        return nn.functional.embedding_bag(
            input, self.weight, offsets, self.max_norm, self.norm_type, self.scale_grad_by_freq, self.mode, self.sparse, given,
            self.include_last_offset, self.padding_idx,
        ).to(self.plain_dtype)  # fmt: skip


_FORMS: dict[type, type] = {nn.Embedding: StoredEmbedding, nn.EmbeddingBag: StoredBag}


def store_tables(shell: nn.Module, plan: Any) -> dict[str, tuple[int, int]]:
    """Give the tables of ``shell`` the storage that ``plan`` asks for; returns the bytes of each, (plain, stored).

    Raises :class:`PlanError` for a table that is not the weight of nn.Embedding or nn.EmbeddingBag modules alone, or not float32."""
    first = {id(p): name for name, p in shell.named_parameters()}
    aliases: dict[str, list[str]] = {name: [] for name in first.values()}
    for name, param in shell.named_parameters(remove_duplicate=False):
        aliases[first[id(param)]].append(name)
    dtype_of = {name: word for name, word in plan.says("dtype", aliases).items() if word in DTYPES}
    named = dict(shell.named_parameters())
    sizes = {}
    for name, word in dtype_of.items():
        table = named[name]
        if table.dtype != torch.float32:
            raise PlanError(f"tables: '{name}' is {table.dtype} in the plain model; only float32 tables can be stored as {word}")
        stored = nn.Parameter(table.detach().to(DTYPES[word]), requires_grad=table.requires_grad)
        for path, module in shell.named_modules():
            for key, param in module._parameters.items():
                if param is not table:
                    continue
                form = _FORMS.get(type(module))
                if form is None or key != "weight" or not path:
                    raise PlanError(
                        f"tables: '{name}' cannot be stored as {word}: '{path or 'the model itself'}', a {type(module).__name__}, holds it; "
                        "only weights of nn.Embedding and nn.EmbeddingBag submodules (not of their subclasses) can be"
                    )
                module._parameters[key] = stored
                module.__dict__["plain_dtype"] = table.dtype
                module.__class__ = form
        sizes[name] = table.numel() * table.element_size(), stored.numel() * stored.element_size()
    return sizes


def refuse_other_reads(captured: Any, shell: nn.Module) -> None:
    """Raises :class:`PlanError` where the model reads a table in such storage other than by calling its module: it would see the low dtype,
    or compute a compressed table as a whole."""
    owners = {path: module for path, module in shell.named_modules(remove_duplicate=False) if isinstance(module, OwnStorage)}
    path, first = next(iter(owners.items()))
    if captured.program is not None:
        raise PlanError(f"tables: '{path}' is {first.kept}, which needs the whole model in one graph; {captured.notes[0]}")
    held = {id(t): path for path, module in owners.items() for t in [*module._parameters.values(), *module._buffers.values()]}
    for node in captured.graph.nodes:
        path = held.get(id(stored_tensor(node, shell)))
        for user in node.users if path is not None else ():
            if user.meta[KEY].module_path not in owners:
                raise PlanError(
                    f"tables: '{path}' is {owners[path].kept}, and {user.meta[KEY].where()} reads its weight; only tables that are read by "
                    f"calling their module can be. Take {owners[path].key} out of that entry of the plan"
                )


def restore_plain(model: nn.Module) -> None:
    """Undo :func:`store_tables` in a copy of a shell: plain classes, and weights in the plain dtype."""
    made: dict[int, nn.Parameter] = {}
    plain: dict[Any, type] = {form: cls for cls, form in _FORMS.items()}
    for module in model.modules():
        if isinstance(module, _Stored):
            low = module.weight
            dtype = module.__dict__.pop("plain_dtype")
            if id(low) not in made:
                made[id(low)] = nn.Parameter(low.detach().to(dtype), requires_grad=low.requires_grad)
            module._parameters = OrderedDict(module._parameters, weight=made[id(low)])  # type: ignore[assignment]
            module.__class__ = plain[type(module)]
