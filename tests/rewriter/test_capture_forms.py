"""Forms that real recommenders take: what forward() leaves on modules, candidates, towers, long sequences; in several spellings."""
import copy
import math

import numpy as np
import pytest
import tablewright as tw
import torch
import torch.nn.functional as F
from torch import nn

ONE_GRAPH = ("fx", "export", "dynamo")


def trains_as_plain(model, batch, rows=(6, 9, 1), doors=ONE_GRAPH, loss=None, tolerance=1e-5):
    """Adagrad steps of plain and optimized model at several batch sizes, then evaluation mode; the optimized model."""
    loss = loss or (lambda result: sum(each.square().mean() for each in torch.utils._pytree.tree_leaves(result)))
    plain = copy.deepcopy(model)
    theirs = torch.optim.Adagrad(plain.parameters(), lr=0.05, eps=1e-3)
    opt, mine = tw.optimize(
        model, optimizer=torch.optim.Adagrad(model.parameters(), lr=0.05, eps=1e-3), sample_inputs=batch(rows[0]))
    assert opt.report.door in doors, opt.report
    for count in rows:
        given = batch(count)
        for each, optim in ((plain, theirs), (opt, mine)):
            torch.manual_seed(count)
            optim.zero_grad()
            loss(each(*given)).backward()
            optim.step()
        for (name, a), b in zip(plain.named_parameters(), opt.parameters()):
            torch.testing.assert_close(b, a, atol=tolerance, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    plain.eval(), opt.eval()
    with torch.no_grad():
        given = batch(rows[-1] + 3)
        torch.manual_seed(0)
        wanted = plain(*given)
        torch.manual_seed(0)
        torch.testing.assert_close(opt(*given), wanted, atol=tolerance, rtol=1e-4)
    return opt, plain


def ids(*shape, high=40):
    return torch.randint(0, high, shape)


# what forward() leaves on modules ---------------------------------------------------------------------------------------------
class Leaving(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.score = nn.Embedding(40, 8), nn.Linear(8, 1)
        self.penalty, self.positions = 0.0, None

    def forward(self, rows):
        x = self.table(rows)
        self.parts = []
        for each in x.unbind(1) if self.loops else [x[:, 0], x[:, 1]]:
            self.parts.append(each.mean())
        self.penalty = x.square().sum() * 0.01
        if self.positions is None:
            self.positions = torch.arange(8.0)
        self.last = {"rows": rows.shape[0], "attention": torch.softmax(x.sum(-1), -1)}
        return self.score((x + self.positions).sum(1)).squeeze(-1) + self.penalty


@pytest.mark.parametrize("loops", [False, True])
def test_results_left_on_the_module(loops):
    model = Leaving()
    model.loops = loops
    opt, plain = trains_as_plain(model, lambda rows: (ids(rows, 3),))
    given = ids(7, 3)
    opt(given), plain(given)
    torch.testing.assert_close(opt.penalty, plain.penalty)
    torch.testing.assert_close(opt.parts, plain.parts)
    torch.testing.assert_close(opt.last, plain.last)
    assert opt.check(given), str(opt.check(given))
    assert not hasattr(model, "last") and model.positions is None and model.penalty == 0.0  # the user's own model stays as it was


def test_a_penalty_left_on_the_module_trains():
    model = Leaving()
    model.loops = False
    opt, optim = tw.optimize(model, optimizer=torch.optim.Adagrad(model.parameters(), lr=0.1), sample_inputs=(ids(4, 3),))
    given = ids(4, 3)
    opt(given)
    opt.penalty.backward()
    plain = copy.deepcopy(model)
    plain.zero_grad()
    plain(given)
    plain.penalty.backward()
    torch.testing.assert_close(opt.table.weight.grad.to_dense(), plain.table.weight.grad)


def test_state_that_forward_reads_again_is_not_lost():
    class Carrying(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.before = nn.Embedding(40, 8), torch.zeros(8)

        def forward(self, rows):
            x = self.table(rows).mean(0) + 0.5 * self.before
            self.before = x.detach()
            return x

    model = Carrying()
    opt, plain = tw.optimize(model, sample_inputs=(ids(5),)), copy.deepcopy(model)
    for rows in (5, 5, 8, 3):
        given = ids(rows)
        torch.testing.assert_close(opt(given), plain(given))
    assert not model.before.any()


def test_arrays_that_forward_writes_to():
    class Cutting(nn.Module):
        """In-batch sampling by arrays of the module, cut and changed in place where the batch is small."""

        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(40, 8)
            self.index = np.arange(12) % 9

        def forward(self, rows):
            x = self.table(rows)
            index = self.index
            if len(rows) != 9:
                index = index[: len(rows)]
                index[np.where(index >= len(rows))] -= len(rows)
            return x[index].sum(0)

    model = Cutting()
    plain, before = copy.deepcopy(model), model.index.copy()
    opt = tw.optimize(model, sample_inputs=(ids(6),))
    assert np.array_equal(model.index, before)
    for rows in (6, 9, 12, 9, 7):
        given = ids(rows)
        torch.testing.assert_close(opt(given), plain(given))


class Filling(nn.Module):
    """Makes a table of its own at the first call, by numpy, which no capture of that call could hold."""

    def __init__(self, kind):
        super().__init__()
        self.table, self.kind, self.hashes = nn.Embedding(40, 8), kind, None

    def forward(self, rows):
        if self.hashes is None:
            if self.kind == "hash":
                self.hashes = torch.from_numpy(np.arange(40) * 7 % 40)
            elif self.kind == "batch":  # what it holds depends on the first batch
                self.hashes = torch.from_numpy((np.arange(40) + int(rows.max())) % 40)
        return self.table(self.hashes[rows] if self.hashes is not None else rows)


@pytest.mark.parametrize("kind", ["hash", "batch"])
def test_a_table_that_the_first_call_fills(kind):
    model = Filling(kind)
    opt, plain = tw.optimize(model, sample_inputs=(torch.tensor([3, 4, 5]),)), copy.deepcopy(model)
    for rows in (5, 3, 8):
        given = ids(rows)
        torch.testing.assert_close(opt(given), plain(given))
    if kind == "hash":
        assert opt.report.door == "export" or opt.report.door == "fx"
    assert model.hashes is None


def test_a_trained_tensor_that_is_no_parameter():
    class Loose(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.scale = nn.Embedding(40, 8), torch.randn(8, requires_grad=True)

        def forward(self, rows):
            x = self.table(rows)
            return x.view(x.shape[0], *[size for size in x.shape[1:]]).mul(self.scale).sum(tuple(range(1, x.dim())))

    model = Loose()
    opt = tw.optimize(model, sample_inputs=(ids(5, 3),))
    given = ids(4, 3)
    opt(given).sum().backward()
    mine, model.scale.grad = model.scale.grad, None
    model(given).sum().backward()
    torch.testing.assert_close(mine, model.scale.grad)


# candidates and towers --------------------------------------------------------------------------------------------------------
class Candidates(nn.Module):
    """One user row, many items: the user's part is computed once and expanded."""

    def __init__(self, spelling):
        super().__init__()
        self.user, self.age, self.item = nn.Embedding(40, 8), nn.Embedding(40, 8), nn.Embedding(40, 8)
        self.top, self.spelling = nn.Sequential(nn.Linear(24, 8), nn.ReLU(), nn.Linear(8, 1)), spelling

    def forward(self, user, age, items):
        mine = torch.cat([self.user(user), self.age(age)], -1)
        count = items.shape[0]
        if self.spelling == "expand":
            mine = mine.expand(count, -1)
        elif self.spelling == "repeat":
            mine = mine.repeat(count, 1)
        else:
            mine = mine[torch.zeros(count, dtype=torch.long)]
        return self.top(torch.cat([mine, self.item(items)], -1)).squeeze(-1)


@pytest.mark.parametrize("spelling", ["expand", "repeat", "index"])
def test_one_user_many_candidates(spelling):
    opt, _ = trains_as_plain(Candidates(spelling), lambda rows: (ids(1), ids(1), ids(rows)), rows=(6, 40, 9))
    assert opt.report.coverage["lookups"][0] >= 2


class ManyCandidates(nn.Module):
    """[B] users with [B, K] candidates each."""

    def __init__(self, spelling):
        super().__init__()
        self.user, self.item, self.spelling = nn.Embedding(40, 8), nn.Embedding(40, 8), spelling

    def forward(self, user, items):
        u, i = self.user(user), self.item(items)
        if self.spelling == "einsum":
            return torch.einsum("bd,bkd->bk", u, i)
        if self.spelling == "bmm":
            return torch.bmm(i, u.unsqueeze(2)).squeeze(2)
        return (u.unsqueeze(1) * i).sum(-1)


@pytest.mark.parametrize("spelling", ["einsum", "bmm", "multiply"])
def test_candidates_of_a_batch(spelling):
    opt, _ = trains_as_plain(ManyCandidates(spelling), lambda rows: (ids(rows), ids(rows, 5)))
    assert opt.report.coverage["lookups"] == (2, 2)


class Towers(nn.Module):
    """Logits [B, B]: every other row's item is a negative."""

    def __init__(self, spelling):
        super().__init__()
        self.user, self.item = nn.Embedding(40, 8), nn.EmbeddingBag(40, 8, mode="mean")
        self.left, self.right, self.spelling = nn.Linear(8, 4), nn.Linear(8, 4), spelling

    def forward(self, user, items):
        u, i = self.left(self.user(user)), self.right(self.item(items))
        if self.spelling == "normalize":
            logits = F.normalize(u, dim=-1) @ F.normalize(i, dim=-1).t() / 0.1
        else:
            logits = torch.matmul(u, i.transpose(0, 1))
        if self.spelling == "loss inside":
            return F.cross_entropy(logits, torch.arange(user.shape[0]))
        if self.spelling == "mask":
            same = user.unsqueeze(0) == user.unsqueeze(1)
            logits = logits.masked_fill(same & ~torch.eye(len(user), dtype=torch.bool), -1e4)
        return logits


@pytest.mark.parametrize("spelling", ["plain", "normalize", "loss inside", "mask"])
def test_towers_with_negatives_of_the_batch(spelling):
    targets = None if spelling == "loss inside" else lambda logits: F.cross_entropy(logits, torch.arange(logits.shape[0]))
    opt, _ = trains_as_plain(Towers(spelling), lambda rows: (ids(rows), ids(rows, 3)), rows=(6, 9, 4), loss=targets, tolerance=1e-4)
    assert opt.report.coverage["lookups"] == (2, 2)


# long sequences ---------------------------------------------------------------------------------------------------------------
class Target(nn.Module):
    """DIN: a small network scores each item of the history against the target."""

    def __init__(self, spelling):
        super().__init__()
        self.item = nn.Embedding(40, 8, padding_idx=0)
        self.score, self.top, self.spelling = nn.Sequential(nn.Linear(32, 8), nn.PReLU(), nn.Linear(8, 1)), nn.Linear(16, 1), spelling

    def forward(self, target, history):
        q, k = self.item(target), self.item(history)
        wide = q.unsqueeze(1).expand(-1, k.size(1), -1) if self.spelling != "repeat" else q.unsqueeze(1).repeat(1, k.size(1), 1)
        weights = self.score(torch.cat([wide, k, wide - k, wide * k], -1)).squeeze(-1)
        mask = history.data.eq(0) if self.spelling == "data" else history == 0
        if self.spelling == "softmax":
            weights = torch.softmax(weights.masked_fill(mask, -1e9), -1)
        else:
            weights = weights * (~mask).float()
        return self.top(torch.cat([q, (weights.unsqueeze(1) @ k).squeeze(1)], -1)).squeeze(-1)


@pytest.mark.parametrize("spelling", ["expand", "repeat", "softmax", "data"])
def test_attention_to_a_target(spelling):
    opt, _ = trains_as_plain(Target(spelling), lambda rows: (ids(rows), ids(rows, 12)))
    assert opt.report.coverage["lookups"] == (2, 2)


class Causal(nn.Module):
    """SASRec: positions by arange, a causal mask, torch's own or a written-out attention; BST with a target at the end."""

    def __init__(self, spelling):
        super().__init__()
        self.item, self.place = nn.Embedding(40, 8, padding_idx=0), nn.Embedding(16, 8)
        self.norm, self.spelling = nn.LayerNorm(8), spelling
        if spelling == "encoder":
            self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        elif spelling == "module":
            self.layer = nn.MultiheadAttention(8, 2, batch_first=True)
        else:
            self.query, self.key, self.value = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, history, target):
        count = history.size(1)
        places = torch.arange(count).unsqueeze(0).expand_as(history)
        x = self.norm(self.item(history) * math.sqrt(8) + self.place(places))
        after = torch.triu(torch.ones(count, count, dtype=torch.bool), 1)
        if self.spelling == "encoder":
            x = self.layer(x, src_mask=after)
        elif self.spelling == "module":
            x = self.layer(x, x, x, attn_mask=after, need_weights=False)[0]
        elif self.spelling == "scaled":
            x = F.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x), is_causal=True)
        elif self.spelling == "pointwise":  # HSTU: silu instead of softmax
            scores = F.silu(self.query(x) @ self.key(x).transpose(1, 2)) / count
            x = (scores * (~after).float()) @ self.value(x)
        else:
            scores = self.query(x) @ self.key(x).transpose(1, 2) / math.sqrt(8)
            x = torch.softmax(scores.masked_fill(after, float("-inf")), -1) @ self.value(x)
        x = x * (history != 0).unsqueeze(-1)
        return (x[:, -1] * self.item(target)).sum(-1)


@pytest.mark.parametrize("spelling", ["written", "scaled", "pointwise", "module", "encoder"])
def test_causal_attention(spelling):
    opt, _ = trains_as_plain(Causal(spelling), lambda rows: (ids(rows, 12), ids(rows)), rows=(6, 9, 2), tolerance=1e-4)
    assert opt.report.coverage["lookups"][0] >= 2


class Recurrent(nn.Module):
    def __init__(self, spelling):
        super().__init__()
        self.item, self.spelling = nn.Embedding(40, 8, padding_idx=0), spelling
        self.cell = (nn.LSTM if spelling == "lstm" else nn.GRU)(8, 8, batch_first=True)

    def forward(self, history, lengths):
        x = self.item(history)
        if self.spelling == "packed":
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
            return self.cell(packed)[1][-1]
        out, _ = self.cell(x)
        return out[torch.arange(len(out)), lengths - 1]


@pytest.mark.parametrize("spelling", ["gru", "lstm", "packed"])
def test_recurrent(spelling):
    doors = (*ONE_GRAPH, "dynamo, in pieces") if spelling == "packed" else ONE_GRAPH
    opt, _ = trains_as_plain(Recurrent(spelling), lambda rows: (ids(rows, 12), torch.randint(1, 13, (rows,))), doors=doors)
    assert opt.report.coverage["lookups"] == (1, 1)
