"""Models of single repositories (cloned as ``owner+name`` on PYTHONPATH): Multitask-Recommendation-Library, pmixer's SASRec and TiSASRec,
guoyang9's NCF, HGN, gSASRec, SR-GNN and a NARM."""
from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path

import numpy as np
import torch
from torch import nn
from zoo_schema import BAG, DENSE, DIM, FIELDS, HISTORY, dense, ids, lengths_of, padded, zoo

if not hasattr(np, "long"):  # gone from numpy 1.24 to 1.26
    np.long = np.int64  # type: ignore[attr-defined]

MULTITASK = {
    "SingleTask": ("singletask", "SingleTaskModel", {}), "SharedBottom": ("sharedbottom", "SharedBottomModel", {}),
    "MMoE": ("mmoe", "MMoEModel", {"expert_num": 3}), "OMoE": ("omoe", "OMoEModel", {"expert_num": 3}),
    "PLE": ("ple", "PLEModel", {"shared_expert_num": 2, "specific_expert_num": 2}), "AITM": ("aitm", "AITMModel", {}),
}  # fmt: skip
REPOSITORY = {
    "mtrec": "easezyc+Multitask-Recommendation-Library", "pmixer": "pmixer+SASRec.pytorch", "tisasrec": "pmixer+TiSASRec.pytorch", "ncf": "guoyang9+NCF",
    "hgn": "allenjack+HGN", "gsasrec": "asash+gSASRec-pytorch", "srgnn": "CRIPAC-DIG+SR-GNN",
    "narm": "Wang-Shuo+Neural-Attentive-Session-Based-Recommendation-PyTorch",
}  # fmt: skip
NAMES = (*(f"mtrec_{m}" for m in MULTITASK), "pmixer_SASRec", "tisasrec_TiSASRec", "ncf_MLP", "ncf_GMF", "ncf_NeuMF-end", "hgn_HGN", "gsasrec_GSASRec",
         "srgnn_SessionGraph", "narm_NARM")  # fmt: skip


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
    if kind == "tisasrec":
        args = types.SimpleNamespace(device="cpu", hidden_units=DIM, maxlen=HISTORY, dropout_rate=0.2, time_span=rows - 1, num_blocks=2, num_heads=2)
        return load(kind, "model.py").TiSASRec(rows, rows - 1, rows - 1, args)
    if kind == "ncf":
        return load(kind, "model.py").NCF(rows, rows, DIM, 3, 0.2, which)
    if kind == "hgn":
        return load(kind, "model/gating_network.py").HGN(rows, rows, types.SimpleNamespace(L=HISTORY, d=DIM), "cpu")
    if kind == "gsasrec":
        return load(kind, "gsasrec.py").GSASRec(rows - 2, HISTORY, DIM, 2, 2, 0.2)
    if kind == "srgnn":
        options = types.SimpleNamespace(hiddenSize=DIM, batchSize=6, nonhybrid=False, step=1, lr=0.001, l2=1e-5, lr_dc_step=3, lr_dc=0.1)
        return load(kind, "pytorch_code/model.py").SessionGraph(options, rows)
    if kind == "narm":
        return load(kind, "narm.py").NARM(rows, DIM, DIM, 6)
    file, cls, extra = MULTITASK[which]
    return getattr(load(kind, f"models/{file}.py"), cls)(
        [rows] * FIELDS, DENSE, DIM, bottom_mlp_dims=(32, 16), tower_mlp_dims=(16, 8), task_num=2, dropout=0.2, **extra)  # fmt: skip


def inputs(name: str, rows: int, size: int, seed: int):
    if name.startswith("pmixer"):  # takes numpy arrays, as its sampler gives them
        history = padded(size, HISTORY, rows, seed, left=True).numpy()
        return ids(size, rows, seed).numpy(), history, *(padded(size, HISTORY, rows, seed + k, left=True).numpy() for k in (1, 2))
    kind, history = name.partition("_")[0], padded(size, HISTORY, rows, seed, left=True)
    if kind == "tisasrec":  # arrays too: users, histories, times between their items, positive and negative items
        between = ids(size * HISTORY * HISTORY, rows, seed, low=0).reshape(size, HISTORY, HISTORY)
        return tuple(x.numpy() for x in (ids(size, rows, seed), history, between, history, history.flip(1)))
    if kind == "ncf":
        return ids(size, rows, seed), ids(size, rows, seed + 1)
    if kind == "hgn":
        return history, ids(size, rows, seed), padded(size, 4, rows, seed + 1)
    if kind == "gsasrec":  # its padding is the last row
        return torch.where(history == 0, rows - 1, history.clamp(max=rows - 2))
    if kind == "srgnn":  # the items of a session, and how they follow each other, both ways
        return padded(size, BAG, rows, seed), torch.rand(size, BAG, 2 * BAG, generator=torch.Generator().manual_seed(seed))
    if kind == "narm":  # time first, the longest session first
        sessions = padded(size, HISTORY, rows, seed)
        sessions = sessions[lengths_of(sessions).argsort(descending=True)]
        return sessions.T, lengths_of(sessions)
    return torch.stack([ids(size, rows, seed + 10 * k, low=0) for k in range(FIELDS)], 1), dense(size, seed)


MODELS = zoo(make, tuple(n for n in NAMES if folder(n.partition("_")[0])), inputs)
