"""Ids of any value have the row that a Python dict says they have: admission, eviction, what a new owner finds, what is loaded."""
from __future__ import annotations

import threading

import pytest
import torch
from id_model import PARTS, Pair
from tablewright.kernels import dynamic_ids, tiers
from tablewright.kernels.dynamic_ids import IdMap, IdMapError
from tablewright.kernels.dynamic_ids.table import DynamicTable
from tablewright.kernels.tiers import Part, TierError

pytestmark = pytest.mark.skipif(bool(dynamic_ids.available() or tiers.available()), reason=f"NOT TESTED: {dynamic_ids.available() or tiers.available()}")
FAR = [-(2**63), 2**63 - 1, -1, 0, 5, 2**62, -(2**31), 2**31]


@pytest.mark.parametrize("policy", ["lru", "lfu", "age"])
@pytest.mark.parametrize("admit_after", [1, 2, 3])
def test_random_operations_against_dicts(policy, admit_after):
    generator = torch.Generator().manual_seed(admit_after)
    for capacity, most in ((40, 400), (7, 30), (1, 5)):
        pair = Pair(capacity, admit_after, policy, padding=11 * 2**40)
        refused = 0
        for step in range(250):
            count = int(torch.randint(0, 30, (1,), generator=generator))
            ids = (torch.rand(count, generator=generator) ** 2 * most).long() * 2**40 - 2**45
            ids = ids if step % 7 else torch.cat([ids, torch.tensor(FAR[: step % 4], dtype=torch.int64), ids]).view(-1, 1)
            ids = ids.flatten()
            refused += not pair.look_up(ids, admit=step % 5 != 0)
            while len(pair.tickets) > step % 3:
                pair.release(int(torch.randint(0, len(pair.tickets), (1,), generator=generator)))
            if step % 50 == 49:
                pair.check_all()
        found = pair.table.counters()
        assert found.evicted and found.lookups and found.evaluated and refused or capacity == 40
        assert found.rows == capacity


@pytest.mark.parametrize("policy", ["lru", "lfu", "age"])
def test_what_was_saved_goes_on_as_if_nothing_had_happened(policy):
    """Also the order in which ids leave, and the counts of those that wait."""
    pair = Pair(20, 2, policy)
    draws = torch.Generator().manual_seed(0)
    batches = [(torch.rand(12, generator=draws) ** 2 * 90).long() for _ in range(120)]
    for ids in batches[:60]:
        pair.look_up(ids)
        pair.release()
    state, accumulated = pair.table.state(), pair.table.export(1)
    other = DynamicTable("t", IdMap(20, 2, policy), PARTS, seed=7, default=-9.0)
    other.ids.fetch(torch.arange(10))  # what it held before is let go
    other.load(**state)
    other.load_part(1, *accumulated)
    assert torch.equal(other.export(1)[1], accumulated[1])
    pair.table = other
    pair.model.evicted = pair.model.forgotten = 0
    for ids in batches[60:]:
        pair.look_up(ids)
        pair.release()
    pair.check_all()
    assert pair.model.evicted and pair.model.forgotten


def test_a_new_owner_inherits_nothing():
    table = DynamicTable("t", IdMap(2), PARTS, seed=3)
    first = table.slots(torch.tensor([10, 20]))
    for part in table.memory:
        part[first] += 5
    table.updated()
    slots = table.slots(torch.tensor([30, 40]))
    assert sorted(slots.tolist()) == sorted(first.tolist())
    for number, part in enumerate(PARTS):
        assert torch.equal(table.memory[number][slots], part.rows(number, 3, torch.tensor([30, 40])))
    table.updated()
    again = table.slots(torch.tensor([20, 10]))
    assert torch.equal(table.memory[0][again], PARTS[0].rows(0, 3, torch.tensor([20, 10])))  # a row does not depend on its slot


def test_rows_whose_update_is_due_stay_and_too_many_ids_are_an_error():
    table = DynamicTable("items", IdMap(4), PARTS, padding=0)
    slots = table.slots(torch.tensor([1, 2, 0, 2]))
    assert slots[2] == table.home and slots[1] == slots[3]
    table.slots(torch.tensor([3, 4]))
    with pytest.raises(IdMapError, match="table 'items': 1 ids are to be admitted, and of 4 rows 4 belong to the batches under way.*2 lookups wait"):
        table.slots(torch.tensor([5, 0]))
    assert table.slots(torch.tensor([1, 2, 3, 4])).tolist() == [0, 1, 2, 3]
    table.check_held(slots)
    table.updated()
    with pytest.raises(TierError, match="table 'items': the update is for rows that were looked up before the last one"):
        table.check_held(slots)
    with pytest.raises(IdMapError, match="5 ids are to be admitted, and of 4 rows 0"):
        table.slots(torch.arange(5, 10))
    assert table.export()[0].tolist() == [1, 2, 3, 4]


def test_evaluation_admits_nothing_and_counts():
    table = DynamicTable("t", IdMap(8), PARTS, default=2.5)
    table.slots(torch.tensor([1, 2]))
    table.updated()
    table.training = lambda: False
    before = table.state()
    slots = table.slots(torch.tensor([[1, 7], [7, -7]]))
    assert slots.tolist() == [[0, 9], [9, 9]] and table.memory[0][9].tolist() == [2.5, 2.5]
    with torch.no_grad():
        table.training = lambda: True
        table.slots(torch.tensor([9]))
    found = table.counters()
    assert (found.rows, found.evaluated, found.unknown, found.lookups, found.defaults, found.waiting) == (2, 5, 4, 2, 0, 0)
    assert all(torch.equal(before[k], v) for k, v in table.state().items())


def test_the_default_row_is_the_same_after_an_update():
    table = DynamicTable("t", IdMap(4, admit_after=2), PARTS, default=1.0)
    slots = table.slots(torch.tensor([5]))
    assert slots.tolist() == [5]
    for part in table.memory:
        part[slots] += 3
    table.updated()
    assert table.memory[0][5].tolist() == [1.0, 1.0] and torch.equal(table.memory[1][5], torch.tensor([0.1]))


def test_bad_loads_change_nothing():
    table = DynamicTable("t", IdMap(3), PARTS)
    table.slots(torch.tensor([1, 2]))
    table.updated()
    before = table.state()
    for words, arguments in (
        ("4 ids do not fit a capacity of 3", (torch.arange(4), torch.zeros(4, 2))),
        ("id 5 is there twice", (torch.tensor([5, 6, 5]), torch.zeros(3, 2))),
        (r"rows \(2, 3\)", (torch.arange(2), torch.zeros(2, 3))),
        ("ids are torch.float32", (torch.zeros(2), torch.zeros(2, 2))),
        (r"uses are \(1,\)", (torch.arange(2), torch.zeros(2, 2), torch.ones(1))),
    ):
        with pytest.raises(IdMapError, match=f"table 't': .*{words}"):
            table.load(*arguments)
    for ids in (torch.tensor([1]), torch.tensor([1, 3]), torch.tensor([1, 2, 3])):
        with pytest.raises(IdMapError, match="load the model's state_dict first"):
            table.load_part(1, ids, torch.ones(len(ids), 1))
    assert all(torch.equal(before[k], v) for k, v in table.state().items())
    with pytest.raises(ValueError, match="a policy of"):
        IdMap(4, 1, "fifo")


def test_threads():
    """Lookups of several threads at once: each reads the rows of its own ids."""
    table = DynamicTable("t", IdMap(4000), [Part(1, "constant", 0.0)])
    ids = torch.arange(3000) * 2**33
    table.slots(ids)
    table.memory[0][table.slots(ids)] = ids.float()[:, None]
    table.updated()
    wrong = []

    def read(seed):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for _ in range(200):
                some = ids[torch.randint(0, 3000, (50,), generator=generator)]
                if not torch.equal(table.memory[0][table.slots(some)][:, 0], some.float()):
                    wrong.append(seed)

    readers = [threading.Thread(target=read, args=(n,)) for n in range(3)]
    for reader in readers:
        reader.start()
    for k in range(100):
        table.slots(torch.arange(9) + k * 9 + 1)
        table.updated()
    for reader in readers:
        reader.join()
    assert not wrong and table.counters().rows == 3900


def test_ids_of_another_order_of_leaving_are_put_into_this_one():
    earlier = IdMap(10, 1, "lru")
    for each in (1, 2, 2, 3):
        earlier.release(earlier.fetch(torch.tensor([each]))[3])
    ids, _, uses = earlier.items()
    assert ids.tolist() == [1, 2, 3] and uses.tolist() == [1, 2, 1]
    later = IdMap(4, 1, "lfu")
    later.load(ids, uses, earlier.waiting())
    for each in (3, 1, 1):  # 1 is used three times then, 2 and 3 twice
        later.release(later.fetch(torch.tensor([each]))[3])
    later.release(later.fetch(torch.tensor([8, 9]))[3])
    assert sorted(later.items()[0].tolist()) == [1, 3, 8, 9]  # 2 was used as often as 3, longer ago


def test_states_that_mean_nothing_are_refused():
    table = DynamicTable("t", IdMap(5, 2), PARTS, seed=1)
    state = {"ids": torch.tensor([4, 5]), "rows": torch.ones(2, PARTS[0].width)}
    for more, words in (({"uses": torch.tensor([1, 0])}, "less than once"), ({"waiting": torch.tensor([[7, 0, 0]])}, "less than once"),
                        ({"ids": [4, 5]}, "tensors were needed"), ({"uses": torch.ones(2, dtype=torch.int64, device="meta")}, "meta")):  # fmt: skip
        with pytest.raises(IdMapError, match=words):
            table.load(**{**state, **more})
    assert table.counters().rows == 0
