"""Records that stand twice, or nearly so, and where: found in time that grows with the data, not with its square.

    shingles S(x)   the runs of 5 characters of a record's normal form, hashed
    J(x, y)         |S(x) & S(y)| / |S(x) | S(y)|; near: at least 0.8
    MinHash         P(min h(S(x)) = min h(S(y))) = J, for a random h; 64 of them, in 16 bands of 4 (Broder 1997)

Two records that agree in all 4 of a band are held against each other by their real J: at J = 0.8 that happens to all
but 0.02 % of the pairs, 1 - (1 - J^4)^16. Within a band, each is compared with the four before it alone, and with the
first four of those that are measured on, so that thousands of records of one template cost no more than others.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import product

import numpy as np
from numpy.typing import NDArray

NEAR = 0.8
RUN, BANDS, ROWS, NEIGHBOURS = 5, 16, 4, 4
LONGEST = 1 << 20  # characters of a text that are looked at


def groups_of_equal(keys: Iterable[object]) -> list[list[int]]:
    """The indices of equal keys together, in the order in which each appears first; a key that is alone, too."""
    groups: dict[object, list[int]] = {}
    for i, key in enumerate(keys):
        groups.setdefault(key, []).append(i)
    return list(groups.values())


def near_pairs(texts: Sequence[str], n_learnt: int | None = None) -> list[tuple[int, int]]:
    """(i, j), i < j, of these different texts: for each j that is near one before it the first that is found.

    n_learnt: so many are learnt, the others measured on. Then pairs of both sides are told apart from the others, and
        for each i that is learnt, since it is that which must go
    """
    n = len(texts) if n_learnt is None else n_learnt
    factors = np.random.default_rng(0).integers(0, 2**63, BANDS * ROWS, np.uint64) * np.uint64(2) + np.uint64(1)
    least = np.array([_min_hashes(_shingles(text), factors) for text in texts]).reshape(-1, BANDS, ROWS)
    shingles = lru_cache(1024)(lambda i: _shingles(texts[i]))  # all of them would be eight times the text
    near = dict[tuple[bool, int], tuple[int, int]]()
    for i, j in sorted(set(_candidates(least, n))):
        leak_or_copy = (True, i) if i < n <= j else (False, j)
        if leak_or_copy not in near and _jaccard(shingles(i), shingles(j)) >= NEAR:
            near[leak_or_copy] = i, j
    return list(near.values())


def _shingles(text: str) -> NDArray[np.uint64]:
    """The shingles, sorted, each once. Fewer than 5 characters are one shingle; a book is known by its beginning."""
    points = np.frombuffer(text[:LONGEST].ljust(RUN).encode("utf-32-le"), np.uint32).astype(np.uint64)
    n = len(points) - RUN + 1
    hashed = np.zeros(n, np.uint64)
    for k in range(RUN):
        hashed = (hashed ^ points[k : k + n]) * np.uint64(0x9E3779B97F4A7C15)
    return np.unique(hashed)


def _min_hashes(shingles: NDArray[np.uint64], factors: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The least of each hash function. High halves are folded in: a product's low bits come of low bits only."""
    folded = shingles ^ (shingles >> np.uint64(32))
    parts = np.array_split(folded, len(folded) // 4096 + 1)  # a long text's products would not fit in memory
    least: NDArray[np.uint64] = np.min([np.min(part[:, None] * factors, axis=0) for part in parts], axis=0)
    return least


def _candidates(least: NDArray[np.uint64], n_learnt: int) -> Iterator[tuple[int, int]]:
    """Pairs that agree in a whole band, neighbours in it or not far, or of both sides."""
    for band in range(BANDS):
        for group in groups_of_equal(row.tobytes() for row in np.ascontiguousarray(least[:, band])):
            for near in range(1, NEIGHBOURS + 1):
                yield from zip(group, group[near:], strict=False)
            first = bisect_left(group, n_learnt)
            yield from product(group[:first], group[first : first + NEIGHBOURS])


def _jaccard(a: NDArray[np.uint64], b: NDArray[np.uint64]) -> float:
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / (len(a) + len(b) - common)
