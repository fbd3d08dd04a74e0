"""Tables whose ids are any 64-bit numbers: a hash map gives each id that is seen often enough a row of its own."""
from __future__ import annotations

from .id_map import Counters, IdMap, IdMapError, available

__all__ = ["Counters", "IdMap", "IdMapError", "available"]
