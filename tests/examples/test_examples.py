"""The examples' data readers, their comparison, and a small run of each training script."""
from __future__ import annotations

import gzip
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import criteo  # noqa: E402
import dlrm  # noqa: E402
import movielens  # noqa: E402
import side_by_side  # noqa: E402

TABLES = [1000] * 26
IDS = [b"%08x" % (k * 7919) for k in range(26)]
ROW = b"\t".join([b"1", b"3", b"-2", b"", *[b"7"] * 10, *IDS[:25], b""]) + b"\n"


def read_all(path, rows_per_table=TABLES, batch_size=64, **options):
    return [torch.cat(parts) for parts in zip(*criteo.read_batches(path, rows_per_table, batch_size, **options))]


def damaged(column: int, value: bytes) -> bytes:
    fields = ROW.rstrip(b"\n").split(b"\t")
    fields[column] = value
    return b"\t".join(fields) + b"\n"


# --- Criteo ------------------------------------------------------------------------------------------------------------------


def test_dense_numbers_are_logarithms_and_missing_or_negative_ones_are_zero():
    dense, ids, labels = criteo.parse([ROW], TABLES)
    assert dense.dtype == torch.float32 and ids.dtype == torch.int64 and labels.tolist() == [1.0]
    torch.testing.assert_close(dense[0, :4], torch.log1p(torch.tensor([3.0, 0.0, 0.0, 7.0])))


def test_ids_stay_in_their_tables_and_row_0_is_for_missing_values():
    rows = [2 + 3 * k for k in range(26)]
    ids = criteo.parse([ROW, damaged(20, b"")], rows)[1]
    assert (ids >= 0).all() and (ids < torch.tensor(rows)).all()
    assert (ids == 0).nonzero().tolist() == [[0, 25], [1, 6], [1, 25]]


def test_the_hash_is_the_same_forever():
    text = np.array([[b"68fd1e64", b"a", b""]])
    assert criteo.hash_ids(text, [10**6, 10**6, 10**6]).tolist() == [[329076, 194954, 0]]
    wider = np.array([[b"68fd1e64", b"a", b""], [b"a-much-longer-id-beside-them", b"", b""]])
    assert criteo.hash_ids(wider, [10**6, 10**6, 10**6])[0].tolist() == [329076, 194954, 0]


def test_the_hash_spreads_ids_evenly():
    text = np.array([[b"%08x" % k] for k in range(100_000)])
    counts = np.bincount(criteo.hash_ids(text, [101])[:, 0], minlength=101)
    assert counts[0] == 0 and counts[1:].min() > 850 and counts[1:].max() < 1150  # 1000 expected in each, +-5 deviations


def test_tsv_csv_and_gzip_give_the_same_tensors(tmp_path):
    names = ["label", *(f"I{k}" for k in range(1, 14)), *(f"C{k}" for k in range(1, 27))]
    rows = [ROW, damaged(0, b"0"), damaged(3, b"12")]
    (tmp_path / "a.tsv").write_bytes(b"".join(rows))
    lines = [",".join(names).encode() + b"\n", *rows]
    (tmp_path / "a.csv").write_bytes(b"".join(lines).replace(b"\t", b",").replace(b"\n", b"\r\n"))
    with gzip.open(tmp_path / "a.tsv.gz", "wb") as file:
        file.writelines(rows)
    expected = read_all(tmp_path / "a.tsv")
    assert expected[2].tolist() == [1.0, 0.0, 1.0]
    for name in ("a.csv", "a.tsv.gz"):
        assert criteo.count_rows(tmp_path / name) == 3
        for got, want in zip(read_all(tmp_path / name), expected):
            assert torch.equal(got, want)


def test_skip_and_limit_cut_the_stream(tmp_path):
    path = criteo.write_synthetic(tmp_path / "some.tsv", rows=300)
    everything = read_all(path)
    parts = [read_all(path, batch_size=7, skip=s, limit=n) for s, n in ((0, 100), (100, 150), (250, 1000))]
    for k, want in enumerate(everything):
        assert torch.equal(torch.cat([part[k] for part in parts]), want)
    assert criteo.count_rows(path) == 300 and criteo.count_rows(path, limit=20) == 20


@pytest.mark.parametrize(
    "line, problem",
    [
        (b"1\t2\t3\n", "3 columns; expected 40"),
        (ROW[2:], "a test set without labels?"),
        (damaged(0, b"2"), "the label is '2'"),
        (damaged(4, b"x1"), "I4 is 'x1'"),
        (damaged(4, b"nan"), "I4 is 'nan'"),
        (damaged(15, b"a" * 100), "C2 is 100 bytes long"),
        (damaged(15, b"a" * 10_000), "C2 is 10000 bytes long"),
        (b"\n", "1 columns; expected 40"),
    ],
)
def test_a_malformed_row_is_an_error_that_names_its_line(tmp_path, line, problem):
    path = tmp_path / "bad.tsv"
    path.write_bytes(ROW * 9 + line + ROW)
    with pytest.raises(criteo.MalformedRow, match=r"bad\.tsv, line 10: .*" + problem.replace("?", r"\?").split(" (")[0]):
        read_all(path, batch_size=4)
    with pytest.raises(criteo.MalformedRow, match="line 10"):
        read_all(path, batch_size=4, skip=8)


def test_the_wrong_number_of_tables_or_too_small_ones_are_errors():
    with pytest.raises(ValueError, match="25 entries"):
        next(criteo.read_batches("nowhere", [10] * 25, 4))
    with pytest.raises(ValueError, match="at least 2 rows"):
        criteo.parse([ROW], [1] * 26)


def test_the_synthetic_file_is_reproducible_skewed_and_learnable(tmp_path):
    path = criteo.write_synthetic(tmp_path / "a.tsv", rows=12_000, seed=3, chunk=5_000)
    again = criteo.write_synthetic(tmp_path / "b.tsv", rows=12_000, seed=3, chunk=5_000)
    assert path.read_bytes() == again.read_bytes()
    dense, ids, labels = read_all(path)
    assert 0.15 < labels.mean() < 0.45
    assert (dense == 0).any() and (ids == 0).any()
    share = torch.bincount(ids[:, 2]).max() / len(ids)  # the commonest of ten million values
    assert 0.03 < share < 0.5 and len(ids[:, 2].unique()) > 600

    # Logistic regression, a weight for each id: far better than guessing on rows that it has not seen.
    torch.manual_seed(0)
    weights = [torch.zeros(1000, requires_grad=True) for _ in range(26)] + [torch.zeros(13, requires_grad=True)]
    optimizer = torch.optim.Adagrad(weights, lr=0.1)
    for batch in torch.randperm(10_000).split(200) * 2:
        logit = dense[batch] @ weights[26] + sum(weights[k][ids[batch, k]] for k in range(26))
        F.binary_cross_entropy_with_logits(logit, labels[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        logit = dense[10_000:] @ weights[26] + sum(weights[k][ids[10_000:, k]] for k in range(26))
    assert side_by_side.auc(labels[10_000:].numpy(), logit.numpy()) > 0.65


# --- the model and the comparison --------------------------------------------------------------------------------------------


def test_dlrm_computes_the_same_in_all_modes():
    models = [dlrm.DLRM([9, 5], dim=4, dense_features=3, bottom=[8], top=[8], mode=mode) for mode in ("sum", "mean", "single")]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    dense, ids = torch.rand(6, 3), torch.randint(0, 5, (6, 2))
    outputs = [model(dense, ids) for model in models]
    assert outputs[0].shape == (6,)
    torch.testing.assert_close(outputs[1], outputs[0])
    torch.testing.assert_close(outputs[2], outputs[0])
    with pytest.raises(ValueError, match="mode is 'max'"):
        dlrm.DLRM([9], mode="max")


def test_the_interaction_takes_each_pair_once():
    vectors = torch.rand(2, 4, 3)
    pairs = dlrm.DotInteraction(4)(vectors)
    expected = [vectors[0, i] @ vectors[0, j] for i in range(4) for j in range(i)]
    torch.testing.assert_close(pairs[0], torch.stack(expected))


def test_auc_counts_pairs():
    labels, scores = np.array([0, 1, 0, 1, 1]), np.array([0.1, 0.4, 0.4, 0.8, 0.0])
    pairs = [(p > n) + 0.5 * (p == n) for p in scores[labels == 1] for n in scores[labels == 0]]
    assert side_by_side.auc(labels, scores) == pytest.approx(np.mean(pairs))
    assert np.isnan(side_by_side.auc(np.ones(3), np.arange(3)))


def test_the_comparison_fails_where_a_learner_differs(tmp_path, capsys):
    torch.manual_seed(0)
    batches = [((torch.rand(16, 4),), torch.randint(0, 2, (16,)).float()) for _ in range(6)]

    def learner(name, lr):
        torch.manual_seed(1)
        model = torch.nn.Sequential(torch.nn.Linear(4, 1), torch.nn.Flatten(0))
        return side_by_side.Learner(name, model, [torch.optim.SGD(model.parameters(), lr=lr)])

    def exit_code(lr, **options):
        return side_by_side.compare([learner("plain", 0.1), learner("other", lr)], batches, batches[:2], 6, tmp_path, **options)

    assert exit_code(lr=0.1) == 0
    assert "TOO LARGE" not in capsys.readouterr().out
    assert exit_code(lr=0.3) == 1
    assert "all weights after 3 steps" in (printed := capsys.readouterr().out) and "TOO LARGE" in printed
    assert exit_code(lr=0.3, same_algorithm=False) == 0


# --- MovieLens ---------------------------------------------------------------------------------------------------------------

RATINGS = [(1, 1, 5, 30), (2, 1, 3, 10), (1, 2, 4, 20)]  # user, film, stars, time


def grouplens(folder: Path) -> None:
    def flags(*genres):
        return "|".join("1" if genre in genres else "0" for genre in movielens.GENRES)

    first, second = flags("Comedy", "War"), flags("unknown")
    (folder / "u.data").write_text("".join("\t".join(map(str, row)) + "\n" for row in RATINGS))
    (folder / "u.item").write_text(f"1|Été (1995)|01-Jan-1995||url|{first}\n2|unknown||||{second}\n", encoding="latin-1")
    (folder / "u.user").write_text("1|24|M|writer|85711\n2|56|F|artist|94043\n")


def recbole(folder: Path) -> None:
    rows = "".join("\t".join(map(str, row)) + "\n" for row in RATINGS)
    (folder / "ml-100k.inter").write_text("user_id:token\titem_id:token\trating:float\ttimestamp:float\n" + rows)
    films = "1\tÉté\t1995\tComedy War\n2\tunknown\tunknown\tunknown\n"
    (folder / "ml-100k.item").write_text("item_id:token\tmovie_title\trelease_year\tclass\n" + films, "utf-8")
    people = "1\t24\tM\twriter\t85711\n2\t56\tF\tartist\t94043\n"
    (folder / "ml-100k.user").write_text("user_id:token\tage\tgender\toccupation\tzip_code\n" + people)


@pytest.mark.parametrize("write", [grouplens, recbole])
def test_both_movielens_formats_give_the_same_ratings_oldest_first(tmp_path, write):
    write(tmp_path)
    ratings = movielens.load(tmp_path)
    (inputs, liked), rest = next(both := ratings.batches(np.arange(3), 3)), list(both)
    user, film, age, gender, occupation, year, genres, offsets = (x.tolist() for x in inputs)
    assert rest == [] and liked.tolist() == [0.0, 1.0, 1.0]
    assert (user, film) == ([1, 0, 0], [0, 1, 0])
    assert (age, gender, occupation) == ([6, 1, 1], [0, 1, 1], [0, 1, 1])
    assert year == [76, 0, 76]  # 1995, not known, 1995
    assert (genres, offsets) == ([5, 17, 0, 5, 17], [0, 2, 3])
    assert ratings.sizes() == dict(user=2, film=2, age=7, gender=2, occupation=2, year=77, genre=19)


def test_movielens_says_where_to_get_the_data(tmp_path):
    with pytest.raises(FileNotFoundError, match="files.grouplens.org"):
        movielens.load(tmp_path)


# --- the scripts -------------------------------------------------------------------------------------------------------------


def run_example(script: str, *arguments: object) -> str:
    """What the script prints, in an interpreter of its own that imports this checkout as `tablewright`."""
    tablewright = pytest.importorskip("tablewright")
    if not hasattr(tablewright, "optimize"):
        pytest.skip("NOT TESTED: tablewright has no optimize, so the training examples cannot run")
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *map(str, arguments)], capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


TINY = "--rows-per-table 300 --dim 4 --mlp-scale 0.03 --batch-size 32 --eval-rows 100".split()


def test_train_dlrm_runs_and_agrees(tmp_path):
    printed = run_example("train_dlrm.py", *TINY, "--steps", 12, "--out", tmp_path, "--also", "sparse", "reordered")
    assert "26/26 lookups fused" in printed and "TOO LARGE" not in printed
    assert "optimized" in printed and "Rows per second" in printed and "held-out AUC" in printed
    assert [path.name for path in tmp_path.glob("*.tsv")] == ["criteo_like_484_rows_seed_0.tsv"]
    if "matplotlib is not installed" not in printed:
        assert (tmp_path / "curves.png").stat().st_size > 5000


def test_train_dlrm_takes_a_file_of_odd_length_and_a_plan(tmp_path):
    data = criteo.write_synthetic(tmp_path / "clicks.tsv", rows=150)
    plan = tmp_path / "plan.yaml"
    plan.write_text("version: 1\nembedding_optimizer: {rowwise_adagrad: {lr: 0.01, in_backward: true}}\n")
    printed = run_example(
        "train_dlrm.py", *TINY, "--data", data, "--epochs", 2, "--mode", "single", "--plan", plan, "--out", tmp_path
    )
    assert "8 steps of 32 rows (2 epochs)" in printed and "another algorithm" in printed


def test_train_movielens_runs_and_agrees(tmp_path):
    grouplens(tmp_path)
    (tmp_path / "u.data").write_text("".join(f"{1 + k % 2}\t{1 + k // 2 % 2}\t{1 + k % 5}\t{k}\n" for k in range(200)))
    printed = run_example("train_movielens.py", "--data", tmp_path, "--batch-size", 32, "--epochs", 2, "--out", tmp_path)
    assert "7/7 lookups fused" in printed and "TOO LARGE" not in printed
