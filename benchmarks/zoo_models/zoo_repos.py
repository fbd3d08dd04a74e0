"""Models of single repositories (cloned as ``owner+name`` on PYTHONPATH): Multitask-Recommendation-Library and pmixer's SASRec."""
from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path

import numpy as np
import torch
from torch import nn
from zoo_schema import DENSE, DIM, FIELDS, HISTORY, dense, ids, padded, zoo

if not hasattr(np, "long"):  # gone from numpy 1.24 to 1.26
    np.long = np.int64  # type: ignore[attr-defined]

MULTITASK = {
    "SingleTask": ("singletask", "SingleTaskModel", {}), "SharedBottom": ("sharedbottom", "SharedBottomModel", {}),
    "MMoE": ("mmoe", "MMoEModel", {"expert_num": 3}), "OMoE": ("omoe", "OMoEModel", {"expert_num": 3}),
    "PLE": ("ple", "PLEModel", {"shared_expert_num": 2, "specific_expert_num": 2}), "AITM": ("aitm", "AITMModel", {}),
}  # fmt: skip
REPOSITORY = {"mtrec": "easezyc+Multitask-Recommendation-Library", "pmixer": "pmixer+SASRec.pytorch"}


def folder(key: str) -> Path | None:
    return next((Path(p) for p in sys.path if Path(p).name == REPOSITORY[key]), None)


def load(key: str, file: str) -> types.ModuleType:
    name = f"{key}_{Path(file).stem}"
    package = types.ModuleType(key)
    package.__path__ = [str((folder(key) or Path()) / Path(file).parent)]
    sys.modules.setdefault(key, package)
    sys.path += [p for p in package.__path__ if p not in sys.path]  # some of these files import their neighbours by name
    spec = importlib.util.spec_from_file_location(f"{key}.{Path(file).stem}", (folder(key) or Path()) / file)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make(name: str, rows: int) -> nn.Module:
    kind, _, which = name.partition("_")
    if kind == "pmixer":
        args = types.SimpleNamespace(device="cpu", norm_first=True, hidden_units=DIM, maxlen=HISTORY, dropout_rate=0.2, num_blocks=2, num_heads=2)
        return load(kind, "python/model.py").SASRec(rows, rows - 1, args)
    file, cls, extra = MULTITASK[which]
    return getattr(load(kind, f"models/{file}.py"), cls)(
        [rows] * FIELDS, DENSE, DIM, bottom_mlp_dims=(32, 16), tower_mlp_dims=(16, 8), task_num=2, dropout=0.2, **extra)  # fmt: skip


def inputs(name: str, rows: int, size: int, seed: int):
    if name.startswith("pmixer"):  # takes numpy arrays, as its sampler gives them
        history = padded(size, HISTORY, rows, seed, left=True).numpy()
        return ids(size, rows, seed).numpy(), history, *(padded(size, HISTORY, rows, seed + k, left=True).numpy() for k in (1, 2))
    return torch.stack([ids(size, rows, seed + 10 * k, low=0) for k in range(FIELDS)], 1), dense(size, seed)


MODELS = zoo(make, tuple(n for n in (*(f"mtrec_{m}" for m in MULTITASK), "pmixer_SASRec") if folder(n.partition("_")[0])), inputs)
