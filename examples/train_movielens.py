"""Predict who likes which film on MovieLens-100k: the plain model and the optimized one, side by side.

    python examples/train_movielens.py --data ml-100k

The model trains on the older ratings and is judged on the newest ones. Tables are tiny here (943 people, 1,682
films), so this example is about equal results on real data; train_dlrm.py is the one about speed.
"""

import argparse
import copy
import sys
from collections.abc import Iterator
from pathlib import Path

import movielens
import numpy as np
import torch
from side_by_side import Example, Learner, compare
from torch import Tensor, nn


class FilmModel(nn.Module):
    """One table for each feature, a bag of genres, and an MLP over all of them: a logit for "likes it"."""

    def __init__(self, sizes: dict[str, int], dim: int = 16):
        super().__init__()
        self.user = nn.Embedding(sizes["user"], dim)
        self.film = nn.Embedding(sizes["film"], dim)
        self.age = nn.Embedding(sizes["age"], dim)
        self.gender = nn.Embedding(sizes["gender"], dim)
        self.occupation = nn.Embedding(sizes["occupation"], dim)
        self.year = nn.Embedding(sizes["year"], dim)
        self.genres = nn.EmbeddingBag(sizes["genre"], dim, mode="mean")
        self.head = nn.Sequential(nn.Linear(7 * dim + 1, 64), nn.ReLU(), nn.Linear(64, 1))
        for table in self.children():
            if isinstance(table, nn.Embedding | nn.EmbeddingBag):
                nn.init.normal_(table.weight, std=0.1)

    def forward(
        self,
        user: Tensor,
        film: Tensor,
        age: Tensor,
        gender: Tensor,
        occupation: Tensor,
        year: Tensor,
        genres: Tensor,
        genre_offsets: Tensor,
    ) -> Tensor:
        person, movie = self.user(user), self.film(film)
        about_person = [person, self.age(age), self.gender(gender), self.occupation(occupation)]
        about_film = [movie, self.year(year), self.genres(genres, genre_offsets)]
        taste = (person * movie).sum(dim=1, keepdim=True)
        return self.head(torch.cat([*about_person, *about_film, taste], dim=1)).squeeze(1)


def main() -> int:
    args = parse_arguments()
    torch.manual_seed(args.seed)
    ratings = movielens.load(args.data)
    newest = int(len(ratings.liked) * (1 - args.held_out))
    older, newer = np.arange(newest), np.arange(newest, len(ratings.liked))
    steps_per_epoch = -(-len(older) // args.batch_size)
    print(f"data       {args.data}: {len(older):,} older ratings to train on, {len(newer):,} newer ones held out")
    print(f"training   {args.epochs} epochs of {steps_per_epoch} steps of {args.batch_size} rows, torch.optim.Adagrad")

    shuffle = np.random.default_rng(args.seed)

    def examples() -> Iterator[Example]:
        for _ in range(args.epochs):
            yield from ratings.batches(shuffle.permutation(older), args.batch_size)

    held_out = list(ratings.batches(newer, args.batch_size))
    model = FilmModel(ratings.sizes(), args.dim)

    plain = copy.deepcopy(model)
    optim = torch.optim.Adagrad(plain.parameters(), lr=args.lr)
    learners = [Learner("plain", plain, [optim])]

    # ---- All that changes in a plain training script: -------------------------------------------------
    import tablewright as tw

    optim = torch.optim.Adagrad(model.parameters(), lr=args.lr)
    opt, optim = tw.optimize(model, args.plan, optimizer=optim, sample_inputs=held_out[0][0])
    # ---------------------------------------------------------------------------------------------------
    print(f"\n{opt.report}\n")
    learners.append(Learner("optimized", opt, [optim]))

    return compare(learners, examples(), held_out, args.epochs * steps_per_epoch, args.out)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, default=Path("ml-100k"), metavar="DIR",
        help="folder with u.data, u.item and u.user, or RecBole's ml-100k.inter, .item and .user (default: ml-100k)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("outputs/movielens"), help="default: outputs/movielens")
    parser.add_argument("--held-out", type=float, default=0.1, help="share of the ratings, the newest (default: 0.1)")
    parser.add_argument("--dim", type=int, default=16, help="width of the embeddings (default: 16)")
    parser.add_argument("--batch-size", type=int, default=512, help="default: 512")
    parser.add_argument("--epochs", type=int, default=5, help="default: 5")
    parser.add_argument("--lr", type=float, default=0.02, help="default: 0.02")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--plan", default="auto", help="default: auto")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except FileNotFoundError as error:
        sys.exit(str(error))
