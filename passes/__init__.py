"""The rewrites, in the order in which they run."""
from __future__ import annotations

from .batch_experts import BatchExperts
from .concatenated_lookups import ConcatenatedLookups
from .dense_chains import DenseChains
from .fast_dropout import FastDropout
from .fast_tanh import FastTanh
from .field_products import FieldProducts
from .fuse_cin import FuseCin
from .fuse_cross import FuseCross
from .fuse_dice import FuseDice
from .fuse_dot_interaction import FuseDotInteraction
from .fuse_fm import FuseFm
from .fuse_gelu import FuseGelu
from .fuse_gru import FuseGru
from .fuse_lookup_dots import FuseLookupDots
from .fuse_mlp import FuseMlp
from .fuse_pair_products import FusePairProducts
from .group_tables import GroupTables
from .id_columns import IdColumns
from .mixed_precision import MixedPrecision
from .overlap_communication import OverlapCommunication
from .pool_sequences import PoolSequences
from .recompute_modules import RecomputeModules
from .remove_zero_dropout import RemoveZeroDropout
from .row_layers import RowLayers
from .rule import Pass
from .select_features import SelectFeatures
from .shard_tables import ShardTables
from .share_repeats import ShareRepeats
from .short_softmax import ShortSoftmax
from .small_products import SmallProducts
from .table_gradients import TableGradients
from .tier_tables import TierTables
from .wide_rows import WideRows

DEFAULT: tuple[type[Pass], ...] = (
    RemoveZeroDropout, FuseFm, FuseDotInteraction, FusePairProducts, FuseCin, FieldProducts, PoolSequences, ConcatenatedLookups,
    ShareRepeats, IdColumns, GroupTables, TableGradients, WideRows, FuseCross,
    BatchExperts, FuseGelu, MixedPrecision, DenseChains, RowLayers, FuseDice, SmallProducts, SelectFeatures, ShortSoftmax, FuseGru, FastTanh, FastDropout, FuseMlp, FuseLookupDots, RecomputeModules,
)  # fmt: skip
OVER_RANKS: tuple[type[Pass], ...] = (ShardTables, OverlapCommunication)  # then, where a model runs over several ranks; no plan leaves them out
IN_TIERS: tuple[type[Pass], ...] = (TierTables,)  # then, where tables are larger than memory
