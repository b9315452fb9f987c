"""How one text differs from another, in the form of a unified diff; in bounded time.

Lines that both texts have once are matched first, as in a patience diff: the longest series of them in the same order
on both sides. What lies between two of them is compared by difflib, whose time is cubic in the worst case, as long as
a budget lasts; then it is shown as replaced as a whole.

Source: POSIX.1-2017, diff, "Diff -u Output Format".
"""

from __future__ import annotations

import bisect
import difflib
from collections import Counter
from collections.abc import Iterator, Sequence

# Lines shown before and after a change.
_CONTEXT = 3
# An upper limit of the steps of difflib, for a whole text: about a second.
_BUDGET = 10_000_000

# Equal lines: where they begin on the one and the other side, and how many they are.
_Block = tuple[int, int, int]
# Lines that differ: from and to on the one side, from and to on the other.
_Gap = tuple[int, int, int, int]


def hunks(old: bytes, new: bytes) -> Iterator[bytes]:
    """The hunks of a unified diff of two texts; none if they are the same."""
    one, other = _lines(old), _lines(new)
    for gaps in _grouped(_gaps(one, other)):
        yield _hunk(one, other, gaps)


def _lines(text: bytes) -> list[bytes]:
    # Not splitlines(), which also splits at carriage returns.
    lines = [line + b"\n" for line in text.split(b"\n")]
    last = lines.pop()[:-1]
    return [*lines, last] if last else lines


def _gaps(one: Sequence[bytes], other: Sequence[bytes]) -> Iterator[_Gap]:
    """What differs, in order."""
    here = there = 0
    for start, begin, count in _equal(one, other):
        if (here, there) != (start, begin):
            yield here, start, there, begin
        here, there = start + count, begin + count


def _equal(one: Sequence[bytes], other: Sequence[bytes]) -> Iterator[_Block]:
    """The lines that are the same on both sides, in order, with an empty block at the end."""
    head = _common(one, other, 0, len(one), 0, len(other), 1)
    yield 0, 0, head
    tail = _common(one, other, head, len(one), head, len(other), -1)
    low, high = head, (len(one) - tail, len(other) - tail)
    budget = _BUDGET
    here, there = low, low
    for start, begin in [*_anchors(one, other, low, high), high]:
        first = _common(one, other, here, start, there, begin, 1)
        yield here, there, first
        here, there = here + first, there + first
        last = _common(one, other, here, start, there, begin, -1)
        a, b = one[here : start - last], other[there : begin - last]
        cost = _cost(a, b)
        if cost <= budget:
            budget -= cost
            for block in difflib.SequenceMatcher(None, a, b, autojunk=False).get_matching_blocks():
                yield here + block.a, there + block.b, block.size
        here, there = start - last, begin - last
    yield here, there, len(one) - here


def _common(
    one: Sequence[bytes], other: Sequence[bytes], start: int, end: int, begin: int, stop: int, step: int
) -> int:
    """How many lines two ranges share, at the beginning or (with -1) at the end."""
    most = min(end - start, stop - begin)
    i, j = (start, begin) if step > 0 else (end - 1, stop - 1)
    count = 0
    while count < most and one[i] == other[j]:
        count, i, j = count + 1, i + step, j + step
    return count


def _anchors(one: Sequence[bytes], other: Sequence[bytes], low: int, high: tuple[int, int]) -> list[tuple[int, int]]:
    """Where lines are that both ranges have once, in the same order: as many as possible."""
    counts = Counter(one[low : high[0]])
    counts_there = Counter(other[low : high[1]])
    places = {other[j]: j for j in range(low, high[1]) if counts_there[other[j]] == 1}
    pairs = [(i, places[one[i]]) for i in range(low, high[0]) if counts[one[i]] == 1 and one[i] in places]
    # The longest increasing subsequence: the smallest place in the other text at which a series of each length may end.
    ends: list[int] = []
    last: list[int] = []
    before: list[int] = []
    for number, (_, j) in enumerate(pairs):
        length = bisect.bisect_left(ends, j)
        before.append(last[length - 1] if length else -1)
        if length == len(ends):
            ends.append(j)
            last.append(number)
        else:
            ends[length], last[length] = j, number
    series = []
    number = last[-1] if last else -1
    while number >= 0:
        series.append(pairs[number])
        number = before[number]
    return series[::-1]


def _cost(a: Sequence[bytes], b: Sequence[bytes]) -> int:
    """An upper limit of difflib's steps: each search for a block goes over all pairs of equal lines."""
    if not a or not b:
        return 0
    there = Counter(b)
    return (len(a) + sum(there[line] for line in a)) * min(len(a), len(b))


def _grouped(gaps: Iterator[_Gap]) -> Iterator[list[_Gap]]:
    """The gaps of each hunk: those whose context would overlap or touch."""
    group: list[_Gap] = []
    for gap in gaps:
        if group and gap[0] - group[-1][1] > 2 * _CONTEXT:
            yield group
            group = []
        group.append(gap)
    if group:
        yield group


def _hunk(one: Sequence[bytes], other: Sequence[bytes], gaps: Sequence[_Gap]) -> bytes:
    above = min(gaps[0][0], _CONTEXT)
    below = min(len(one) - gaps[-1][1], _CONTEXT)
    start, end = gaps[0][0] - above, gaps[-1][1] + below
    begin, stop = gaps[0][2] - above, gaps[-1][3] + below
    parts = [f"@@ -{_range(start, end)} +{_range(begin, stop)} @@\n".encode()]
    here = start
    for a, b, i, j in gaps:
        parts += map(b" ".__add__, one[here:a])
        parts += map(b"-".__add__, one[a:b])
        parts += map(b"+".__add__, other[i:j])
        here = b
    parts += map(b" ".__add__, one[here:end])
    return b"".join(part if part.endswith(b"\n") else part + b"\n\\ No newline at end of file\n" for part in parts)


def _range(start: int, end: int) -> str:
    count = end - start
    # An empty range is named by the line before it.
    return f"{start + 1}" if count == 1 else f"{start + 1 if count else start},{count}"
