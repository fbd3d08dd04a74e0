"""The update rules of one launch's tables, kept from step to step: to make them anew takes as long as to look up fifty rows of each table."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from .updates import TableUpdate

STATE = {"sgd": (), "adagrad": ("sum",), "rowwise_adagrad": ("sum",), "adam": ("exp_avg", "exp_avg_sq")}  # by kind: names in an optimizer's state


class KeptRules:
    """The rules of ``tables``, each with its param group (see :class:`.optimizers.RowUpdates`).

    What may change between steps is looked at in each: the settings of the groups, the state of each table. A rule is written to again
    where only its step differs, so a list of them is good until the next is asked for."""

    def __init__(self, tables: Sequence[Tensor], groups: Sequence[dict]) -> None:
        self.tables = list(tables)
        self.groups = list(groups)
        self._distinct = {id(group): group for group in groups}
        self._place = {key: place for place, key in enumerate(self._distinct)}
        self._settings: list[tuple] = []
        self._made: list[TableUpdate | None] = []

    def next(self, due: Sequence[int], states: Mapping[Tensor, dict], start: Callable[[Tensor, str], dict[str, Any]]) -> list[TableUpdate | None]:
        """Count a step of the tables at the places ``due`` and return what to do in it, with None for the others. ``start(table, kind)`` makes
        the state of a table that has none."""
        settings = [
            (g["kind"], float(g["lr"]), g["eps"], *map(float, g["betas"]), g["weight_decay"], g["maximize"]) for g in self._distinct.values()
        ]
        if settings != self._settings:
            self._settings, self._made = settings, [None] * len(self.tables)
        rules: list[TableUpdate | None] = [None] * len(self.tables)
        for i in due:
            table = self.tables[i]
            state, rule = states[table], self._made[i]
            if not state:
                state = start(table, self.groups[i]["kind"])
            state["step"] += 1
            if rule is None or not _holds(rule, state):
                rule = self._made[i] = self._make(i, state)
            rule.step = int(state["step"])
            rules[i] = rule
        return rules

    def _make(self, i: int, state: dict) -> TableUpdate:
        kind, lr, eps, beta1, beta2, decay, maximize = self._settings[self._place[id(self.groups[i])]]
        return TableUpdate(kind, lr, eps, beta1, beta2, decay, 0, maximize, tuple(state[name] for name in STATE[kind]))


def _holds(rule: TableUpdate, state: dict) -> bool:
    """Whether the state of ``rule`` is the one that ``state`` has now."""
    for name, tensor in zip(STATE[rule.kind], rule.state):
        if state[name] is not tensor:
            return False
    return True
