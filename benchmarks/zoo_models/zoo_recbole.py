"""RecBole: context-aware models (a dict of fields), sequential models (ids of the history and its length), some general ones.

RecBole builds its models from a dataset on disk; the small class here answers the same questions from our schema.
"""
from __future__ import annotations

import importlib
import logging
import warnings

import numpy as np
import torch
from torch import nn
from zoo_schema import BAG, DENSE, DIM, HISTORY, dense, ids, lengths_of, padded, stand_in_for, zoo

stand_in_for("ray", "thop", "lightgbm", "xgboost", "hyperopt", "faiss")

for old, new in (("float_", "float64"), ("complex_", "complex128"), ("unicode_", "str_"), ("long", "int64"), ("bool8", "bool_"), ("object0", "object_")):
    if not hasattr(np, old):  # gone from numpy 2
        setattr(np, old, getattr(np, new))

CONTEXT = ("AFM", "AutoInt", "DCN", "DCNV2", "DeepFM", "DSSM", "EulerNet", "FFM", "FiGNN", "FM", "FNN", "FwFM", "LR", "NFM", "PNN", "WideDeep", "xDeepFM")
VARIANTS = {"DCNV2_mix": ("DCNV2", {"mixed": True}), "PNN_outer": ("PNN", {"use_inner": False, "use_outer": True})}
# what forward takes, in order
SEQUENTIAL = {
    "BERT4Rec": "s", "Caser": "us", "CORE": "s", "DIEN": "usnlt", "DIN": "uslt", "FDSA": "sl", "FEARec": "sl", "FOSSIL": "slu", "FPMC": "uslt",
    "GCSAN": "sl", "GRU4Rec": "sl", "GRU4RecCPR": "sl", "GRU4RecF": "sl", "HGN": "su", "HRM": "sul", "LightSANs": "sl", "NARM": "sl",
    "NextItNet": "s", "NPE": "su", "RepeatNet": "sl", "S3Rec": "s", "SASRec": "sl", "SASRecCPR": "sl", "SASRecF": "sl", "SHAN": "su",
    "SINE": "sl", "SRGNN": "sl", "STAMP": "sl", "TransRec": "usl",
}  # fmt: skip
GENERAL = {"BPR": "ui", "NeuMF": "ui", "DMF": "ui", "FISM": "ui", "NAIS": "ui", "ENMF": "u", "CKE": "ui", "LINE": "ui"}
NAMES = (*CONTEXT, *VARIANTS, *SEQUENTIAL, *GENERAL)
FOLDERS = ("context_aware_recommender", "sequential_recommender", "general_recommender", "knowledge_aware_recommender")
USER, ITEM = ("user_id", "c0", "c1", "c2", "words"), ("item_id", "c3", "c4", "c5", "tags")
NEEDS = ("recbole",)


class Dataset:
    """Answers what RecBole's models ask of their dataset."""

    def __init__(self, config, rows: int, full: bool) -> None:
        from recbole.utils import FeatureSource, FeatureType

        self.config, self.rows = config, rows
        self.dataset_name, self.uid_field, self.iid_field, self.label_field = "zoo", "user_id", "item_id", "label"
        names = [*USER, *ITEM, *(f"d{k}" for k in range(DENSE))] if full else [*USER, *ITEM]
        self.field2type = {n: FeatureType.TOKEN_SEQ if n in ("tags", "words") else FeatureType.FLOAT if n[0] == "d" else FeatureType.TOKEN for n in names}
        self.field2source = {n: FeatureSource.USER if n in USER else FeatureSource.ITEM if n in ITEM else FeatureSource.INTERACTION for n in names}
        self.field2source |= {"user_id": FeatureSource.USER_ID, "item_id": FeatureSource.ITEM_ID}
        self.field2seqlen = {n: BAG if n in ("tags", "words") else 1 for n in names} | {"item_id_list": HISTORY}
        self.user_num = self.item_num = self.entity_num = rows
        self.inter_feat = {"user_id": torch.arange(rows), "item_id": torch.arange(rows), "item_id_list": padded(64, HISTORY, rows), "item_length": torch.full((64,), 3)}

    def fields(self, ftype=None, source=None) -> list[str]:
        return [n for n in self.field2type if (ftype is None or self.field2type[n] in ftype) and (source is None or self.field2source[n] in source)]

    def num(self, field: str) -> int:
        return 1 if field[0] == "d" else self.rows if field != "relation_id" else 5

    def get_item_feature(self):
        from recbole.data.interaction import Interaction

        return Interaction({n: torch.arange(self.rows) if n == "item_id" else padded(self.rows, BAG, self.rows, 3) if n == "tags" else ids(self.rows, self.rows, k)
                            for k, n in enumerate(ITEM)})  # fmt: skip

    def get_user_feature(self):
        from recbole.data.interaction import Interaction

        return Interaction({n: torch.arange(self.rows) if n == "user_id" else padded(self.rows, BAG, self.rows, 4) if n == "words" else ids(self.rows, self.rows, k)
                            for k, n in enumerate(USER)})  # fmt: skip

    def history_item_matrix(self, value_field=None, max_history_len=None):
        history = padded(self.rows, 8, self.rows, 5)
        return history, (history != 0).float(), lengths_of(history)

    history_user_matrix = history_item_matrix

    def inter_matrix(self, form="coo", value_field=None):
        from scipy.sparse import coo_matrix

        users, items = ids(400, self.rows, 8).numpy(), ids(400, self.rows, 9).numpy()
        made = coo_matrix((np.ones(len(users), dtype=np.float32), (users, items)), shape=(self.rows, self.rows))
        return made if form == "coo" else made.tocsr()


def make(name: str, rows: int) -> nn.Module:
    from recbole.config import Config

    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    cls, extra = VARIANTS.get(name, (name, {}))
    options = dict(
        USER_ID_FIELD="user_id", ITEM_ID_FIELD="item_id", RATING_FIELD="rating", LABEL_FIELD="label", LIST_SUFFIX="_list", NEG_PREFIX="neg_",
        ITEM_LIST_LENGTH_FIELD="item_length", MAX_ITEM_LIST_LENGTH=HISTORY, embedding_size=DIM, hidden_size=DIM, n_heads=2, device="cpu", use_gpu=False,
        mlp_hidden_size=[32, 16], selected_features=["c3"], numerical_features=[f"d{k}" for k in range(DENSE)], item_attribute="c3", pretrain_path=None,
        ENTITY_ID_FIELD="entity_id", RELATION_ID_FIELD="relation_id", HEAD_ENTITY_ID_FIELD="head_id", TAIL_ENTITY_ID_FIELD="tail_id",
        train_neg_sample_args=None, **extra,
    )  # fmt: skip
    options |= {"S3Rec": {"train_stage": "pretrain"}, "CKE": {"kg_embedding_size": DIM}}.get(name, {})
    module = next(m for m in map(_module, FOLDERS, [cls] * len(FOLDERS)) if m is not None)
    constructor = getattr(module, cls)
    config = Config(model=constructor, dataset="ml-100k", config_dict=options)
    for key, value in options.items():
        config[key] = value
    config["device"] = torch.device("cpu")
    return constructor(config, Dataset(config, rows, full=name in CONTEXT or name in VARIANTS))


def _module(folder: str, cls: str):
    anomalies = torch.is_anomaly_enabled()
    try:
        return importlib.import_module(f"recbole.model.{folder}.{cls.lower()}")
    except ModuleNotFoundError:
        return None
    finally:  # one file of RecBole's turns the check of every gradient for NaN on, for the whole process
        torch.autograd.set_detect_anomaly(anomalies)


def inputs(name: str, rows: int, size: int, seed: int):
    if name in CONTEXT or name in VARIANTS:
        x = {n: ids(size, rows, seed + 10 * k) for k, n in enumerate((*USER, *ITEM)) if n not in ("tags", "words")}
        x |= {"tags": padded(size, BAG, rows, seed), "words": padded(size, BAG, rows, seed + 1)}
        return x | {f"d{k}": torch.stack([dense(size, seed)[:, k], torch.zeros(size)], 1) for k in range(DENSE)}
    history = padded(size, HISTORY, rows, seed + 2)
    given = {
        "u": ids(size, rows, seed + 5), "i": ids(size, rows, seed + 6), "s": history, "l": lengths_of(history), "t": ids(size, rows, seed + 7),
        "T": ids(size, rows, seed + 7)[:, None],
        "n": torch.randint(1, rows, history.shape, generator=torch.Generator().manual_seed(seed)) * (history != 0),
    }  # fmt: skip
    return tuple(given[c] for c in (SEQUENTIAL | GENERAL)[name])


MODELS = zoo(make, NAMES, inputs)
