"""Rules that are kept from step to step say what the groups and the state say at each step."""
from __future__ import annotations

from collections import defaultdict

import torch
from tablewright.kernels.embedding.kept_rules import KeptRules


def make(kind: str = "adagrad"):
    tables = [torch.zeros(4, 2), torch.zeros(3, 2)]
    group = dict(kind=kind, lr=0.5, eps=0.1, betas=(0.9, 0.99), weight_decay=0.0, maximize=False)
    states: dict = defaultdict(dict)

    def start(table, kind):
        states[table].update(step=0, sum=torch.zeros_like(table))
        return states[table]

    return tables, group, states, start


def test_steps_are_counted_for_the_tables_that_are_due_alone():
    tables, group, states, start = make()
    rules = KeptRules(tables, [group, group])
    assert [r.step for r in rules.next([0, 1], states, start)] == [1, 1]
    first, second = rules.next([1], states, start)
    assert first is None and second.step == 2 and states[tables[0]]["step"] == 1


def test_settings_and_state_that_change_between_steps_are_seen():
    tables, group, states, start = make()
    rules = KeptRules(tables, [group, dict(group, lr=0.25)])
    rules.next([0, 1], states, start)
    group["lr"] = torch.tensor(0.125)  # as a scheduler may leave it
    assert [r.lr for r in rules.next([0, 1], states, start)] == [0.125, 0.25]
    states[tables[1]] = {"step": 7, "sum": torch.ones(3, 2)}  # as load_state_dict leaves it
    first, second = rules.next([0, 1], states, start)
    assert second.step == 8 and second.state[0] is states[tables[1]]["sum"] and first.state[0] is states[tables[0]]["sum"]
    group["kind"], group["betas"] = "sgd", (0.5, 0.6)
    changed, _ = rules.next([0, 1], states, start)
    assert changed.kind == "sgd" and changed.state == () and (changed.beta1, changed.beta2) == (0.5, 0.6)
