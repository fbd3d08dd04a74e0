"""Moves of rows that happen as late as a device may make them: only when something waits for them."""
from __future__ import annotations

import threading

from tablewright.kernels.tiers.slot_moves import Arrival, SlotMoves


class LateMoves(SlotMoves):
    """Rows that come are in their slots only after a wait for them, or for all that was moved."""

    def __init__(self, parts):
        super().__init__(parts)
        self._late, self._guard = [], threading.RLock()

    def into(self, room):
        with self._guard:
            self._late.append(room)

    def arriving(self, slots):
        made = super().arriving(slots)
        with self._guard:
            made.before = list(self._late)
        return made

    def join(self, arrival: Arrival):
        self._move(arrival.before)

    def out(self, slots, parts=None):
        self.settle()
        return super().out(slots, parts)

    def settle(self):
        self._move(None)

    def _move(self, wanted):
        with self._guard:
            for room in list(self._late):
                if wanted is None or any(room is each for each in wanted):
                    self._late = [each for each in self._late if each is not room]
                    super().into(room)
