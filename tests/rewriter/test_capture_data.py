"""Models whose Python looks at data: one graph of the way that a batch takes, asserted at every call, and never a stale one."""
import copy
import warnings

import pytest
import tablewright as tw
import torch
from tablewright.rewriter.capture import data_guard
from torch import nn
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

ROWS, DIM, LENGTH = 30, 4, 5


def sequences(*lengths, seed=0):
    """[len(lengths), LENGTH] ids, padded with 0 at the right."""
    ids = torch.randint(1, ROWS, (len(lengths), LENGTH), generator=torch.Generator().manual_seed(seed + len(lengths)))
    return ids * (torch.arange(LENGTH) < torch.tensor(lengths).unsqueeze(1))


def agree(model, batches, door="export", lookups=None, sample=0, **settings):
    """Three Adagrad steps and eval mode on every batch, plain and optimized, compared. Returns both."""
    plain = copy.deepcopy(model)
    theirs = torch.optim.Adagrad(plain.parameters(), lr=0.1)
    opt, mine = tw.optimize(model, optimizer=torch.optim.Adagrad(model.parameters(), lr=0.1), sample_inputs=(batches[sample],), **settings)
    assert opt.report.door == door, opt.report
    assert lookups is None or opt.report.coverage["lookups"] == lookups, opt.report
    for mode in (True, False):
        for number, given in enumerate(batches * (2 if mode else 1)):
            results = []
            for each, optim in ((plain, theirs), (opt, mine)):
                each.train(mode)
                torch.manual_seed(number)
                optim.zero_grad()
                with torch.set_grad_enabled(mode):
                    results.append(each(given.clone()))
                if mode and results[-1].requires_grad:
                    results[-1].square().sum().backward()
                    optim.step()
                results.append(torch.rand(1))
            a, drawn, b, mine_drawn = results
            torch.testing.assert_close(b, a, atol=1e-5, rtol=1e-4, msg=lambda text, n=number: f"batch {n}: {text}")
            assert torch.equal(drawn, mine_drawn)
            for (name, a), b in zip(plain.state_dict().items(), opt.state_dict().values()):
                torch.testing.assert_close(b, a, atol=1e-5, rtol=1e-4, msg=lambda text, name=name, n=number: f"{n} {name}: {text}")
    return opt, plain


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.item, self.kind = nn.Embedding(ROWS, DIM, padding_idx=0), nn.Embedding(ROWS, DIM)
        self.top = nn.Linear(DIM, 1)


class NonEmptyRows(Base):
    """Rows without history are left out, packed, run through a GRU, and put back: DIEN's first half."""

    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(DIM, DIM, batch_first=True)

    def forward(self, ids):
        lengths = (ids > 0).sum(1)
        keep = lengths > 0
        out = torch.zeros(len(ids), DIM)
        if lengths[keep].shape[0] == 0:
            return self.top(out)
        rows = torch.masked_select(self.item(ids), keep.view(-1, 1, 1)).view(-1, ids.shape[1], DIM)
        packed = pack_padded_sequence(rows, lengths[keep].cpu(), batch_first=True, enforce_sorted=False)
        states, last = self.gru(packed)
        states, _ = pad_packed_sequence(states, batch_first=True, total_length=ids.shape[1])
        out[keep] = last.squeeze(0) + states.sum(1)
        return self.top(out + self.kind(ids[:, 0]))


def test_rows_without_history_are_left_out():
    batches = [sequences(5, 2, 0, 1), sequences(5, 0, 3, 4, 1, 2), sequences(5), sequences(0, 3), sequences(0, 0), sequences(3, 1, 2)]
    opt, _ = agree(NonEmptyRows(), batches, lookups=(2, 2))
    assert opt.report.pieces == 1 and "looks at data" in opt.report.notes[0] and "test_capture_data.py:" in opt.report.notes[0]


class SortedLstm(Base):
    """Sorted by hand, two directions, padded to the longest of the batch."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(DIM, DIM, 2, bidirectional=True)
        self.top = nn.Linear(4 * DIM, 1)

    def forward(self, ids):
        lengths, order = (ids > 0).sum(1).sort(descending=True)
        packed = pack_padded_sequence(self.item(ids[order]).transpose(0, 1), lengths.tolist())
        states, (last, _) = self.lstm(packed)
        states, lengths = pad_packed_sequence(states, padding_value=-1.0)
        pooled = states.amax(0) / lengths.unsqueeze(1)
        return self.top(torch.cat([pooled, last[0], last[1]], 1))[order.argsort()]


def test_sorted_sequences_through_a_lstm():
    agree(SortedLstm(), [sequences(5, 1, 3, 2), sequences(2, 5, 1, 1), sequences(1, 3, 2, 4, 1)])


class CellOverTime(Base):
    """A cell of one's own over the steps of a packed sequence, with int() of a tensor and slices that data bounds."""

    def __init__(self):
        super().__init__()
        self.x, self.h = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)

    def forward(self, ids):
        lengths = (ids > 0).sum(1)
        packed = pack_padded_sequence(self.item(ids), lengths.cpu(), batch_first=True, enforce_sorted=False)
        data, sizes, order, back = packed
        state = torch.zeros(int(sizes[0]), DIM)
        states = torch.zeros(len(data), DIM)
        begin = 0
        for size in sizes:
            state = torch.tanh(self.x(data[begin:begin + size]) + self.h(state[:size]))
            states[begin:begin + size] = state
            begin += size
        states, _ = pad_packed_sequence(PackedSequence(states, sizes, order, back), batch_first=True, total_length=LENGTH)
        last = torch.arange(LENGTH).repeat(len(ids), 1) == (lengths.view(-1, 1) - 1)
        return self.top(states[last])


def test_a_cell_in_a_loop_over_time():
    opt, _ = agree(CellOverTime(), [sequences(3, 1, 2), sequences(3, 3), sequences(1, 2, 3, 1, 1), sequences(2, 1, 1)], lookups=(1, 1))
    assert len(opt._variants) == 2  # three steps, and two


class Branches(Base):
    """Batch norm and a random number before, one of two ways after; each way reads a table of its own."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(DIM)

    def forward(self, ids):
        x = self.norm(self.kind(ids[:, 0])) + torch.rand(DIM)
        if (ids > 20).any():
            return self.top(x + self.item(ids).sum(1))
        return self.top(x * 2)


def test_a_branch_is_asked_for_at_every_call_and_leaves_no_trace():
    low, high = torch.randint(1, 20, (4, 3)), torch.randint(21, 30, (6, 3))
    opt, _ = agree(Branches(), [low, high, low[:3], high[:5]], lookups=(1, 1))
    assert len(opt._variants) == 2
    opt, _ = agree(Branches(), [low, high], lookups=(2, 2), sample=1)
    first = opt._variants[0]
    assert data_guard.asserted(first.graph) and data_guard.MARK in str(data_guard.asserted(first.graph)[0].args)


def test_a_branch_that_export_does_not_assert_is_not_followed(monkeypatch):
    monkeypatch.setattr(ShapeEnv, "guard_or_defer_runtime_assert", lambda self, *args, **kwargs: True)  # as torch 2.11 had it
    low, high = torch.randint(1, 20, (4, 3)), torch.randint(21, 30, (6, 3))
    agree(Branches(), [low, high], door="dynamo, in pieces")


def test_without_the_assertion_the_graph_would_be_stale(monkeypatch):
    from tablewright.rewriter import eager_form

    monkeypatch.setattr(eager_form, "holds", lambda condition, message: None)
    model = Branches().eval()
    low, high = torch.randint(1, 20, (4, 3)), torch.randint(21, 30, (4, 3))
    opt = tw.optimize(model, sample_inputs=(low,))
    assert not torch.allclose(opt(high), model(high))


class ManyWays(Base):
    def forward(self, ids):
        return self.top(self.item(ids).sum(1) * int(ids.max()))


def test_too_many_ways_run_in_pieces():
    class Count(Base):
        def forward(self, ids):
            x = self.item(ids).sum(1)
            for _ in range(int(ids.max())):
                x = x * 0.5
            return self.top(x)

    batches = [torch.tensor([[k, 1], [1, k]]) for k in (3, 1, 4, 2, 6, 5, 7, 3)]
    with pytest.warns(UserWarning, match="run in pieces: 4 ways that data takes"):
        opt, _ = agree(Count(), batches)
    assert opt._variants[-1].captured.door == "dynamo, in pieces" and len(opt._variants) == 5
    assert "in pieces" in str(opt.report)


def test_a_number_of_data_is_a_value_of_the_graph():
    opt, _ = agree(ManyWays(), [torch.tensor([[3, 1], [1, 2]]), torch.tensor([[3, 7], [1, 2], [0, 5]])], lookups=(1, 1))
    assert len(opt._variants) == 1


class Uniques(Base):
    """Every id is looked up once, and spread again."""

    def forward(self, ids):
        once, where = torch.unique(ids, return_inverse=True)
        rows = self.top(self.item(once))
        return rows[where].sum(1)


def test_unique():
    agree(Uniques(), [sequences(5, 2, 1, 3), sequences(1, 1), sequences(4, 5, 5, 3, 2)])


def test_the_models_own_errors_come_through():
    model = NonEmptyRows()
    opt = tw.optimize(model, sample_inputs=(sequences(5, 2, 0),))
    with pytest.raises(IndexError):
        opt(torch.full((2, LENGTH), ROWS + 5))
    torch.testing.assert_close(opt(sequences(3, 2)), model(sequences(3, 2)))


def test_inputs_changed_in_place_before_are_put_back():
    class Changes(Branches):
        def forward(self, ids):
            ids[ids > 29] = 29
            ids += 1
            return super().forward(ids.clamp(max=29))

    agree(Changes(), [torch.randint(1, 20, (4, 3)), torch.randint(21, 40, (6, 3)), torch.randint(1, 20, (6, 3))])


def test_an_input_that_may_have_a_gradient_is_not_put_back():
    class Changes(Branches):
        def forward(self, ids):
            ids.clamp_(max=29)
            return super().forward(ids.long())

    opt, _ = agree(Changes(), [torch.randint(1, 20, (4, 3)).float(), torch.randint(21, 40, (6, 3)).float()], door="dynamo, in pieces")
    assert any("changes an input in place" in note for note in opt.report.notes)


def test_copies_and_files():
    import io

    model = NonEmptyRows()
    opt = tw.optimize(model, sample_inputs=(sequences(5, 2, 0),))
    twin = copy.deepcopy(opt)
    file = io.BytesIO()
    torch.save(opt, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for given in (sequences(3, 1, 0, 2), sequences(0, 0)):
        for each in (twin, loaded):
            torch.testing.assert_close(each(given), model(given))


def test_no_noise(capfd):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        tw.optimize(NonEmptyRows(), sample_inputs=(sequences(5, 2, 0),))
    out, err = capfd.readouterr()
    assert not out and not err and not said, (out, err, said)


class KernelOverKept(Base):
    """A layer without bias over the rows that are kept."""

    def __init__(self):
        super().__init__()
        self.kernel, self.top = nn.Parameter(torch.randn(DIM, 256)), nn.Linear(256, 1)

    def forward(self, ids):
        keep = (ids > 0).any(1)
        if not keep.any():
            return self.kind(ids[:, 0])
        rows = self.item(ids[keep]).sum(1)
        return self.top(torch.relu(rows @ self.kernel))


def test_passes_meet_no_value_of_the_sample():
    opt, _ = agree(KernelOverKept(), [sequences(5, 0, 2), sequences(0, 0, 1, 4)], plan=tw.Plan(passes={"dense_chains": {"measure": False}}))
    assert opt.report.coverage["mlps"] == (1, 1), opt.report
