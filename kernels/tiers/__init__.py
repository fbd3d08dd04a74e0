"""Tables larger than memory: rows in a file behind a cache in memory."""
from __future__ import annotations

from .cache import Counters, Part, RowCache, TierError, available

__all__ = ["Counters", "Part", "RowCache", "TierError", "available"]
