"""Selection of test cases: rows that together contain every pair of parameter values, and random rows.

A test's parameters are *groups*: one group per `pytest.mark.parametrize`, each a list of values. A row takes one value
of each group, given by its index. The full product of flash-attention's groups has more than 100,000 rows for some
tests; a pairwise cover has little more than the product of the two largest groups.
"""

import itertools
import math
import random


def pairwise_cover(sizes):
    """Returns rows of indices in which every pair of values of two groups occurs at least once.

    `sizes` are the numbers of values of each group. Greedy: a row starts from a pair that is not covered yet, and each
    further group takes the value that covers the most new pairs. Ties go to the value used least so far.
    """
    if len(sizes) < 2:
        return [(i,) for i in range(sizes[0])] if sizes else [()]
    pairs = itertools.combinations(range(len(sizes)), 2)
    missing = {(a, i, b, j) for a, b in pairs for i in range(sizes[a]) for j in range(sizes[b])}
    uses = [[0] * size for size in sizes]
    rows = []
    # Sorted, so that the cover is the same in every process.
    for pair in sorted(missing):
        if pair not in missing:
            continue
        a, i, b, j = pair
        row = {a: i, b: j}
        for group in sorted(set(range(len(sizes))) - {a, b}, key=lambda group: -sizes[group]):
            row[group] = max(
                range(sizes[group]),
                key=lambda value: (
                    sum(_pair(group, value, other, at) in missing for other, at in row.items()),
                    -uses[group][value],
                ),
            )
        for (a, i), (b, j) in itertools.combinations(sorted(row.items()), 2):
            missing.discard((a, i, b, j))
        for group, value in row.items():
            uses[group][value] += 1
        rows.append(tuple(row[group] for group in range(len(sizes))))
    return rows


def random_rows(sizes, count, seed, without=()):
    """Returns up to `count` different random rows that are not in `without`."""
    seen = set(without)
    count = min(count, math.prod(sizes) - len(seen))
    generator = random.Random(seed)
    rows = []
    while len(rows) < count:
        row = tuple(generator.randrange(size) for size in sizes)
        if row not in seen:
            seen.add(row)
            rows.append(row)
    return rows


def _pair(a, i, b, j):
    return (a, i, b, j) if a < b else (b, j, a, i)
