"""MovieLens-100k: 100,000 ratings of 1,682 films by 943 people, as batches of tensors.

Two formats are read, told apart by the names of the files in the folder:

  GroupLens, as published:  u.data, u.item, u.user
  RecBole's atomic files:   ml-100k.inter, ml-100k.item, ml-100k.user
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

WHERE = (
    "Download https://files.grouplens.org/datasets/movielens/ml-100k.zip and unpack it (u.data, u.item, u.user),\n"
    "or take RecBole's version (ml-100k.inter, ml-100k.item, ml-100k.user)."
)
GENRES = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip
AGE_BOUNDS = (18, 25, 35, 45, 50, 56)  # years at which the next age bucket begins
FIRST_YEAR = 1920  # of release; year 0 is "not known"


@dataclass
class Ratings:
    """One entry for each rating, oldest first; ids count from 0. `film_genres` has one list for each film."""

    user: np.ndarray
    film: np.ndarray
    age: np.ndarray
    gender: np.ndarray
    occupation: np.ndarray
    year: np.ndarray
    liked: np.ndarray  # 1 where the rating is 4 or 5
    film_genres: list[list[int]]

    def sizes(self) -> dict[str, int]:
        """Rows of the table that each feature needs."""
        names = ("user", "film", "age", "gender", "occupation", "year")
        return {name: int(getattr(self, name).max()) + 1 for name in names} | {"genre": len(GENRES)}

    def batches(self, rows: np.ndarray, batch_size: int) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
        """Yields ((user, film, age, gender, occupation, year, genres, genre_offsets), liked).

        A film has one to six genres: `genres` holds those of the whole batch end to end, and
        `genre_offsets` where each film's begin, as nn.EmbeddingBag takes them.
        """
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            columns = [getattr(self, field.name)[batch] for field in fields(self)[:6]]
            bags = [self.film_genres[film] for film in columns[1]]
            offsets = np.cumsum([0] + [len(bag) for bag in bags])[:-1]
            inputs = [torch.from_numpy(column) for column in (*columns, np.concatenate(bags).astype(np.int64), offsets)]
            yield tuple(inputs), torch.from_numpy(self.liked[batch])


def load(folder: Path) -> Ratings:
    """Reads the folder, whichever of the two formats it holds."""
    if (folder / "u.data").is_file():
        inter, films, users = _grouplens(folder)
    elif (folder / "ml-100k.inter").is_file():
        inter, films, users = _recbole(folder)
    else:
        raise FileNotFoundError(f"no MovieLens-100k in {folder}: neither u.data nor ml-100k.inter.\n{WHERE}")

    ratings = np.array(inter, dtype=np.int64)
    ratings = ratings[np.argsort(ratings[:, 3], kind="stable")]  # by time
    user, film, stars, _ = ratings.T
    people = np.array([users[u][:2] for u in sorted(users)])  # ids are 1, 2, 3, ... without gaps
    occupations = {name: k for k, name in enumerate(sorted({who[2] for who in users.values()}))}
    occupation = np.array([occupations[users[u][2]] for u in sorted(users)])
    years = np.array([films[f][0] for f in sorted(films)])
    years = np.where(years < FIRST_YEAR, 0, years - FIRST_YEAR + 1)
    return Ratings(
        user=user - 1,
        film=film - 1,
        age=np.searchsorted(AGE_BOUNDS, people[:, 0], side="right")[user - 1],
        gender=people[:, 1][user - 1],
        occupation=occupation[user - 1],
        year=years[film - 1],
        liked=(stars >= 4).astype(np.float32),
        film_genres=[[GENRES.index(genre) for genre in films[f][1]] for f in sorted(films)],
    )


# Both readers return: ratings [(user, film, stars, time)], films {id: (year, genres)}, users {id: (age, is_male, occupation)}


def _grouplens(folder: Path):
    inter = [tuple(map(int, line.split("\t"))) for line in _lines(folder / "u.data")]
    films = {}
    for line in _lines(folder / "u.item", encoding="latin-1"):
        film, _title, released, _video, _url, *flags = line.split("|")
        genres = [genre for genre, flag in zip(GENRES, flags, strict=True) if flag == "1"]
        films[int(film)] = (_year(released[-4:]), genres)  # released: 01-Jan-1995
    users = {}
    for line in _lines(folder / "u.user"):
        user, age, gender, occupation, _zip = line.split("|")
        users[int(user)] = (int(age), int(gender == "M"), occupation)
    return inter, films, users


def _recbole(folder: Path):
    inter = [tuple(map(int, line.split("\t"))) for line in _lines(folder / "ml-100k.inter")[1:]]
    films = {}
    for line in _lines(folder / "ml-100k.item")[1:]:
        film, _title, year, genres = line.split("\t")
        films[int(film)] = (_year(year), genres.split())
    users = {}
    for line in _lines(folder / "ml-100k.user")[1:]:
        user, age, gender, occupation, _zip = line.split("\t")
        users[int(user)] = (int(age), int(gender == "M"), occupation)
    return inter, films, users


def _year(text: str) -> int:
    return int(text) if text.isdigit() else 0  # one film has none


def _lines(path: Path, encoding: str = "utf-8") -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing.\n{WHERE}")
    return path.read_text(encoding).splitlines()
