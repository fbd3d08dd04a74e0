"""Smaller tables that stand for one table ``[rows, dim]``, fitted to it by least squares.

====================  ================================================================================================================
hashing               row ``i`` is row ``i mod k`` of ``hashed`` (Weinberger et al. 2009, arXiv:0902.2206, without its signs)
quotient, remainder   row ``i`` is ``quotient[i // k] * remainder[i mod k]``, or their sum (Shi et al. 2019, arXiv:1909.02107)
mixed dimensions      row ``i`` is ``base[i] @ projection`` (Ginart et al. 2019, arXiv:1909.11810)
product quantization  row ``i`` is, part by part, the centroid that its byte of ``codes`` names (Jegou et al. 2011, IEEE TPAMI 33(1))
====================  ================================================================================================================

The row of ``padding`` is left out of every fit and stands as it is in a row of its own behind the others, so that no other id shares it.
Sums are in float64; results have the table's dtype.
"""
from __future__ import annotations

import torch
from torch import Tensor

CENTROIDS = 256  # of each part: a code is one byte
_SAMPLE, _ROUNDS, _CHUNK, _SWEEPS = 1 << 14, 12, 1 << 16, 8


def fit_hashed(weight: Tensor, k: int, padding: int | None) -> Tensor:
    """``hashed`` ``[k, dim]`` (``[k + 1, dim]`` with ``padding``): the mean of the rows that share a row."""
    ids = _others(weight, padding)
    total = torch.zeros(k, weight.shape[1], dtype=torch.float64, device=weight.device).index_add_(0, ids % k, weight[ids].double())
    count = torch.bincount(ids % k, minlength=k).clamp_(min=1)
    return _with_padding((total / count[:, None]).to(weight.dtype), weight, padding)


def fit_quotient_remainder(weight: Tensor, k: int, multiply: bool, padding: int | None) -> tuple[Tensor, Tensor]:
    """``quotient`` ``[ceil(rows / k), dim]`` and ``remainder`` ``[k, dim]`` (one row more each with ``padding``).

    Alternating least squares, column by column: exact in one sweep for rows that are such products or sums. The columns of a quotient
    have a mean square of 1 where it multiplies, so that a column of zeros can still be trained, and a mean near 0 where it is added."""
    rows, dim = weight.shape
    places, device = -(-rows // k), weight.device
    known = torch.zeros(places * k, dtype=torch.float64, device=device)
    known[_others(weight, padding)] = 1
    known = known.view(places, k)
    quotient, remainder = torch.empty(places, dim, dtype=weight.dtype, device=device), torch.empty(k, dim, dtype=weight.dtype, device=device)
    fit = _products if multiply else _sums
    for column in range(dim):
        values = torch.zeros(places * k, dtype=torch.float64, device=device)
        values[:rows] = weight[:, column]
        q, r = fit(values.view(places, k) * known, known)
        quotient[:, column], remainder[:, column] = q, r
    if padding is None:
        return quotient, remainder
    neutral = weight.new_full((1, dim), float(multiply))
    return torch.cat([quotient, neutral]), _with_padding(remainder, weight, padding)


def fit_projected(weight: Tensor, narrow: int, padding: int | None) -> tuple[Tensor, Tensor]:
    """``base`` ``[rows, narrow]`` and ``projection`` ``[narrow, dim]``: the truncated singular value decomposition, the projection's rows
    orthonormal. The row of ``padding`` must be zero, and is zero in ``base``."""
    ids = _others(weight, padding)
    kept = weight[ids].double()
    _, vectors = torch.linalg.eigh(kept.t() @ kept)  # in ascending order
    projection = vectors[:, -narrow:].flip(1).t().contiguous()
    base = torch.zeros(len(weight), narrow, dtype=torch.float64, device=weight.device)
    base[ids] = kept @ projection.t()
    return base.to(weight.dtype), projection.to(weight.dtype)


def fit_quantized(weight: Tensor, parts: int, padding: int | None) -> tuple[Tensor, Tensor]:
    """``codebooks`` ``[parts * 257, dim / parts]`` (of each part 256 centroids and the row of ``padding``) and ``codes`` uint8
    ``[rows, parts]``. Lloyd's k-means on at most 16,384 rows, from a fixed seed; unused centroids move to the rows that are worst served."""
    rows, dim = weight.shape
    ids, width = _others(weight, padding), dim // parts
    draw = torch.Generator().manual_seed(0)
    sample = ids[torch.randperm(len(ids), generator=draw)[:_SAMPLE].to(ids.device)]
    codebooks = weight.new_zeros(parts * (CENTROIDS + 1), width)
    codes = torch.zeros(rows, parts, dtype=torch.uint8, device=weight.device)
    for part in range(parts):
        columns, first = weight[:, part * width : (part + 1) * width], part * (CENTROIDS + 1)
        if len(ids) <= CENTROIDS:
            codebooks[first : first + len(ids)] = columns[ids]
            codes[ids, part] = torch.arange(len(ids), device=ids.device).to(torch.uint8)
        else:
            codebooks[first : first + CENTROIDS] = centroids = _k_means(columns[sample].double()).to(weight.dtype)
            for chunk in ids.split(_CHUNK):
                codes[chunk, part] = _nearest(columns[chunk], centroids)[1].to(torch.uint8)
        if padding is not None:
            codebooks[first + CENTROIDS] = columns[padding]
    return codebooks, codes


def _others(weight: Tensor, padding: int | None) -> Tensor:
    """All ids but ``padding``."""
    ids = torch.arange(len(weight), device=weight.device)
    return ids if padding is None else ids[ids != padding]


def _with_padding(rows: Tensor, weight: Tensor, padding: int | None) -> Tensor:
    return rows if padding is None else torch.cat([rows, weight[padding : padding + 1]])


def _products(values: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """``q`` and ``r`` with ``values[i, j]`` near ``q[i] * r[j]`` where ``known`` is 1."""
    size = values.square().sum(1)
    start = torch.where(known.all(1), 1e6 * size, size).argmax()  # a place that is known in part only begins further away
    r = values[start] + (1 - known[start]) * values[start].abs().mean()  # what is not known must not begin as 0
    q = torch.ones(len(values), dtype=torch.float64, device=values.device)
    for _ in range(_SWEEPS):
        q = _divided(values @ r, known @ r.square())
        scale = q.square().mean().sqrt()
        if scale == 0:  # nothing but zeros
            return torch.ones_like(q), torch.zeros_like(r)
        q = q / scale
        r = _divided(q @ values, q.square() @ known)
    return q, r


def _sums(values: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """``q`` and ``r`` with ``values[i, j]`` near ``q[i] + r[j]`` where ``known`` is 1; the last place may be known in part only."""
    full = slice(None, -1) if len(values) > 1 else slice(None)
    r = _divided(values[full].sum(0), known[full].sum(0))
    q = torch.zeros(len(values), dtype=torch.float64, device=values.device)
    for _ in range(_SWEEPS):
        q = _divided(values.sum(1) - known @ r, known.sum(1))
        r = _divided(values.sum(0) - q @ known, known.sum(0))
    return q, r


def _divided(a: Tensor, b: Tensor) -> Tensor:
    return a / b.masked_fill(b == 0, 1)


def _k_means(points: Tensor) -> Tensor:
    """256 centroids of more points than that."""
    centroids = points[:CENTROIDS].clone()  # the points come in a random order
    for _ in range(_ROUNDS):
        distance, nearest = _nearest(points, centroids)
        count = torch.bincount(nearest, minlength=CENTROIDS)
        centroids = torch.zeros_like(centroids).index_add_(0, nearest, points) / count.clamp(min=1)[:, None]
        unused = (count == 0).nonzero().flatten()
        centroids[unused] = points[distance.topk(len(unused)).indices]
    return centroids


def _nearest(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """The squared distance to the nearest centroid of each point, and its number; in float32, around the centroids' mean."""
    middle = centroids.mean(0)
    points, centroids = (points - middle).float(), (centroids - middle).float()
    found = torch.addmm(centroids.square().sum(1) / 2, points, centroids.t(), alpha=-1).min(1)
    return points.square().sum(1) + 2 * found.values, found.indices
