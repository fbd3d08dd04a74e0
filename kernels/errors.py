"""The errors that kernels raise by name. Those of ``optimize`` and exports are in ``rewriter/errors.py``."""
from __future__ import annotations


class TablewrightError(Exception):
    """Base of every error that Tablewright raises on purpose."""


class InBackwardError(TablewrightError, RuntimeError):
    """A loop does with gradients what an update inside the backward cannot follow: it accumulates, clips or scales them, or asks for some."""


class ServingError(TablewrightError):
    """Base of what goes wrong between a request and its answer, or while a served version is loaded."""


class InputError(ServingError, ValueError):
    """A request that does not fit the model: an unknown or missing input, a wrong shape, offsets that make no bags."""


class InputTypeError(InputError, TypeError):
    """An input whose dtype cannot be taken without loss."""


class IdOutOfRange(ServingError, IndexError):
    """An id that is no row of its table, where the export did not say what stands for missing rows."""


class UnknownTable(ServingError, LookupError):
    """A table that the store or the manifest does not have."""


class CorruptShard(ServingError):
    """A file of a version whose size or checksum is not what its manifest says, or which is missing."""


class VersionSkew(ServingError):
    """Parts of different versions, or of another format, met: nothing is computed from them."""


class StoreIncomplete(VersionSkew):
    """A store that holds only a part of a version: published half, evicted, or restarted empty."""


class StoreUnavailable(ServingError):
    """A node of the store is down, or did not answer within the deadline."""
