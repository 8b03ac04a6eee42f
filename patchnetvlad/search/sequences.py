# SPDX-License-Identifier: MIT
"""Sequences: the queries of a traverse help each other.

A camera moves: the images after and before a query show places after and before its own. A
candidate of a query is scored by how well the candidates of its neighbours fit a motion through
it. Two models of motion are there: lines, that is a constant speed over the whole window (SeqSLAM,
Milford and Wyeth, 2012), and a hidden Markov model, whose speed may change from query to query
(Viterbi, 1967; Rabiner, 1989).

Evidence. The scores s of the k candidates of a query q are standardised, z = (s - mean) / std over
these k (population std; 0 where all are equal). e_q(x) is the z of the candidate at position x of
an index traverse, and the least z of the query less ``missing`` for all other positions.

Motion. A query is v index images from the one before. The speeds are v = m * ``speed``, with m one
of :data:`SPEEDS`, forward and backward, at a cost of ``deviation`` * c(m) a query, where
c(m) = abs(log2(m)), and c(0) = 2 for standing.

Lines. With t from -behind to ahead, over those of the queries q + t that exist, T in number, the
score of the candidate at x is

    max over v of  mean over t of e_{q+t}(x + round(v t))  -  deviation * c(m).

Positions beyond the ends of the index traverse have the evidence of missing candidates.

Hidden Markov model. A state is a position and a direction, forward or backward. From one query to
the next, the camera jumps to any state with the probability ``jump``; otherwise the direction
turns with the probability ``turn``, and then the position moves by d images in it, d = 0, 1, ...,
with the probability a(d), which is proportional to the sum over m of exp(-deviation * c(m)), each
shared between the whole numbers next to m * ``speed``, linearly by nearness. The log-likelihood
of the scores of a query is e_q(x). All states of the first query of the window are equally
likely. ``viterbi`` scores a candidate by the log-probability of the best path through it over the
window, divided by T; ``posterior`` by the log of its probability given the scores of the window
(forward-backward; with ``ahead = 0`` forward filtering).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.errors import ArgumentError

METHODS = ("viterbi", "posterior", "lines")
SPEEDS = (0.0, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.35, 1.5, 1.75, 2.0)
"""Multiples of the expected speed."""

_STANDING = 2.0  # cost of not moving, as of a quarter of the expected speed
_CELLS = 2**21  # of evidence in memory at once, if the window allows it

Pieces = Sequence[NDArray[np.int64]]
Rows = NDArray[np.int64]
Scores = NDArray[np.float64]


@dataclass(frozen=True)
class SequenceSearch:
    """How the queries of a traverse help each other; see the module for the equations.

    Attributes
    ----------
    length : int, default 10
        Queries in a window, the one that is answered included; at least 2.
    ahead : int, optional
        How many of them come after the one that is answered; 0 does not look ahead, as a robot
        cannot. By default half of ``length``, rounded down.
    method : {"viterbi", "posterior", "lines"}, default "viterbi"
    speed : float, default 1
        Expected motion from one query to the next, in index images.
    deviation : float, default 1
        Cost a query of half or double this speed, in standard deviations of the scores.
    missing : float, default 0
        How much less than the last candidate of a query an image counts that is none of its
        candidates, in standard deviations of the scores.
    turn, jump : float, default 0.02 and 0.001
        Probabilities of turning round, and of going on anywhere, of the hidden Markov model.

    Raises
    ------
    ArgumentError
        A value is out of range.
    """

    length: int = 10
    ahead: int | None = None
    method: str = "viterbi"
    speed: float = 1.0
    deviation: float = 1.0
    missing: float = 0.0
    turn: float = 0.02
    jump: float = 0.001

    def __post_init__(self) -> None:
        for name, count in (("length", self.length), ("ahead", self.ahead)):
            if not isinstance(count, Integral | None):
                raise ArgumentError(f"{name} = {count} is not a whole number")
        if self.length < 2:
            raise ArgumentError(
                f"a sequence of {self.length} queries: it needs at least 2 to help each other"
            )
        if self.ahead is not None and not 0 <= self.ahead < self.length:
            raise ArgumentError(
                f"ahead = {self.ahead} of a sequence of {self.length} queries: give 0 to "
                f"{self.length - 1}"
            )
        if self.method not in METHODS:
            raise ArgumentError(f"there is no method {self.method!r}; there are {METHODS}")
        for name, value, most in (
            ("speed", self.speed, math.inf),
            ("turn", self.turn, 1.0),
            ("jump", self.jump, 1.0),
        ):
            if not 0 < value < most:
                raise ArgumentError(f"{name} = {value:g} must be more than 0 and less than {most}")
        for name, value in (("deviation", self.deviation), ("missing", self.missing)):
            if not 0 <= value < math.inf:
                raise ArgumentError(f"{name} = {value:g} must be 0 or more")

    @property
    def after(self) -> int:
        """Queries of the window that come after the one that is answered."""
        return self.length // 2 if self.ahead is None else self.ahead

    @property
    def before(self) -> int:
        """Queries of the window that come before the one that is answered."""
        return self.length - 1 - self.after

    def speeds(self) -> list[tuple[float, float]]:
        """Return the speeds, forward, in index images a query, each with its cost a query."""
        costs = [abs(math.log2(m)) if m else _STANDING for m in SPEEDS]
        return [(m * self.speed, self.deviation * c) for m, c in zip(SPEEDS, costs, strict=True)]

    def steps(self) -> NDArray[np.float64]:
        """Return the probability of moving by 0, 1, ... index images between two queries."""
        chances = np.zeros(math.ceil(max(SPEEDS) * self.speed) + 2)
        for speed, cost in self.speeds():
            whole = math.floor(speed)
            chances[whole] += (1 - (speed - whole)) * math.exp(-cost)
            chances[whole + 1] += (speed - whole) * math.exp(-cost)
        chances = chances[: np.flatnonzero(chances)[-1] + 1]
        return chances / chances.sum()


@dataclass(frozen=True, eq=False)
class IndexOrder:
    """The index images in the order of their traverses, with room between two traverses.

    Attributes
    ----------
    slots : ndarray [N] of int64
        Position of each row of the index list.
    pieces : ndarray [S] of int64
        Traverse of each position; -1 where there is no image.
    """

    slots: NDArray[np.int64]
    pieces: NDArray[np.int64]

    @classmethod
    def of(cls, index: Pieces, search: SequenceSearch) -> IndexOrder:
        """Lay out traverses, which together hold each row once."""
        room = len(search.steps())  # more than a step
        slots = np.empty(sum(map(len, index)), dtype=np.int64)
        start, known = room, [np.full(room, -1)]
        for number, rows in enumerate(index):
            slots[rows] = np.arange(start, start + len(rows))
            known += [np.full(len(rows), number), np.full(room, -1)]
            start += len(rows) + room
        return cls(slots, np.concatenate(known).astype(np.int64))


def rescore(
    rows: Rows, scores: Scores, queries: Pieces, index: Pieces, search: SequenceSearch
) -> Scores:
    """Score the candidates of every query again, by those of its neighbours.

    Parameters
    ----------
    rows : ndarray [Q, k] of int64
        Candidates: rows of the index list.
    scores : ndarray [Q, k] of float64
        Larger is more similar.
    queries, index : sequence of ndarray of int64
        Traverses: rows of the query list and of the index list, in the order in which the images
        were taken. Each row is in one of them.
    search : SequenceSearch

    Returns
    -------
    ndarray [Q, k] of float64
        Larger is better.

    Raises
    ------
    ArgumentError
        The shapes differ, or scores are not finite.

    Examples
    --------
    Three queries of a drive along five images; the second finds the last image more similar.

    >>> rows = np.array([[0, 4, 2], [4, 1, 2], [2, 0, 4]])
    >>> scores = np.array([[0.9, 0.2, 0.1], [0.9, 0.8, 0.1], [0.9, 0.2, 0.1]])
    >>> search = SequenceSearch(length=3)
    >>> found = rescore(rows, scores, [np.arange(3)], [np.arange(5)], search)
    >>> rows[np.arange(3), found.argmax(axis=1)].tolist()
    [0, 1, 2]
    """
    if rows.ndim != 2 or rows.shape != scores.shape:
        raise ArgumentError(
            f"scores of shape {list(scores.shape)} for candidates of shape {list(rows.shape)}"
        )
    order = IndexOrder.of(index, search)
    slots, evidence = order.slots[rows], standardised(scores)
    found = np.empty(rows.shape)
    together = max(1, _CELLS // len(order.pieces) - search.length)
    for piece in queries:
        for start in range(0, len(piece), together):
            asked = piece[start : start + together]
            first = max(0, start - search.before)
            seen = piece[first : start + together + search.after]
            dense = _dense(slots[seen], evidence[seen], order, search)
            found[asked] = _score(dense, start - first, slots[asked], order, search)
    return found


def rescore_last(
    slots: Sequence[Rows], evidence: Sequence[Scores], order: IndexOrder, search: SequenceSearch
) -> Scores:
    """Score the candidates of the last of several consecutive queries, without looking ahead.

    Parameters
    ----------
    slots : sequence of ndarray [k] of int64
        Positions (:class:`IndexOrder`) of the candidates of each query, the oldest query first;
        k may differ.
    evidence : sequence of ndarray [k] of float64
        Their scores, :func:`standardised`.
    order : IndexOrder
    search : SequenceSearch
        Its ``ahead`` must be 0.

    Returns
    -------
    ndarray [k] of float64
        What :func:`rescore` returns of the last query, to the bit.
    """
    seen = slice(-search.length, None)
    dense = _dense(slots[seen], evidence[seen], order, search)
    return _score(dense, len(dense) - 1, slots[-1][None], order, search)[0]


def standardised(scores: Scores) -> Scores:
    """Return scores [..., k] less their mean over k, divided by their standard deviation.

    Raises
    ------
    ArgumentError
        A score is not finite.
    """
    if not np.isfinite(scores).all():
        raise ArgumentError(f"{np.count_nonzero(~np.isfinite(scores))} scores are not finite")
    largest = np.abs(scores).max(axis=-1, keepdims=True, initial=0)
    scaled = scores / np.where(largest > 0, largest, 1)  # squares of huge scores overflow
    away = scaled - scaled.mean(axis=-1, keepdims=True)
    std = scaled.std(axis=-1, keepdims=True)
    alike = std <= 1e-12
    return np.where(alike, 0.0, away / np.where(alike, 1, std))


def _dense(
    slots: Sequence[Rows] | Rows,
    evidence: Sequence[Scores] | Scores,
    order: IndexOrder,
    search: SequenceSearch,
) -> Scores:
    """Return the evidence [n, S] of n queries at each position; -inf where there is no image."""
    dense = np.empty((len(slots), len(order.pieces)))
    for row, where, values in zip(dense, slots, evidence, strict=True):
        row[:] = values.min() - search.missing
        row[where] = values
    dense[:, order.pieces < 0] = -np.inf
    return dense


def _score(
    dense: Scores, first: int, slots: Rows, order: IndexOrder, search: SequenceSearch
) -> Scores:
    """Score the candidates [b, k] of b of the queries that evidence [n, S] is of."""
    if search.method == "lines":
        return _by_lines(dense, first, slots, order, search)
    return _by_paths(dense, first, slots, order, search)


def _by_lines(
    dense: Scores, first: int, slots: Rows, order: IndexOrder, search: SequenceSearch
) -> Scores:
    """Score candidates by the best line through each."""
    asked = first + np.arange(len(slots))
    absent = np.where(np.isfinite(dense), dense, np.inf).min(axis=1)  # [n]
    piece = order.pieces[slots]  # [b, k]
    times = [t for t in range(-search.before, search.after + 1) if -len(dense) < t < len(dense)]
    there = {t: (asked + t >= 0) & (asked + t < len(dense)) for t in times}
    count = np.sum([there[t] for t in times], axis=0)[:, None]
    best = np.full(slots.shape, -np.inf)
    for pace, cost in search.speeds():
        for speed in (pace, -pace) if pace else (0.0,):
            total = np.zeros(slots.shape)
            for t in times:
                at = (asked + t).clip(0, len(dense) - 1)
                where = slots + int(np.rint(speed * t))
                inside = where.clip(0, len(order.pieces) - 1)
                on = (where == inside) & (order.pieces[inside] == piece)
                values = np.where(on, dense[at[:, None], inside], absent[at][:, None])
                total += np.where(there[t][:, None], values, 0.0)
            np.maximum(best, total / count - cost, out=best)
    return best


def _by_paths(
    dense: Scores, first: int, slots: Rows, order: IndexOrder, search: SequenceSearch
) -> Scores:
    """Score candidates by the paths of the hidden Markov model through each."""
    combine: np.ufunc = np.maximum if search.method == "viterbi" else np.logaddexp
    asked = first + np.arange(len(slots))
    before = _messages(dense, asked, search, combine, -1)
    after = _messages(dense, asked, search, combine, +1)
    found = combine.reduce(before + after, axis=0) + dense[asked]  # [b, S]
    at_slots = np.take_along_axis(found, slots, axis=1)
    if search.method == "posterior":
        return at_slots - combine.reduce(found, axis=1)[:, None]
    earlier = np.minimum(asked, search.before)
    later = np.minimum(len(dense) - 1 - asked, search.after)
    return at_slots / (earlier + later + 1)[:, None]


def _messages(
    dense: Scores, asked: Rows, search: SequenceSearch, combine: np.ufunc, side: int
) -> Scores:
    """Return what the queries on one side of b queries say of their states, [2, b, S].

    ``side`` is -1 for those before, which lead to the state, and +1 for those after, to which it
    leads. The directions of a state are forward and backward.
    """
    with np.errstate(divide="ignore"):  # some steps are not taken
        steps = np.log((1 - search.jump) * search.steps())
    anywhere = math.log(search.jump / 2 / np.count_nonzero(np.isfinite(dense[0])))
    keep, turn = math.log(1 - search.turn), math.log(search.turn)

    def turned(states: Scores) -> Scores:
        return combine(states + keep, states[::-1] + turn)

    said = np.zeros((2, len(asked), dense.shape[1]))
    for away in range(search.before if side < 0 else search.after, 0, -1):
        at = asked + side * away
        there = ((at >= 0) & (at < len(dense)))[:, None]
        if not there.any():
            continue
        said += dense[at.clip(0, len(dense) - 1)]
        jumped = combine.reduce(combine.reduce(said, axis=2), axis=0)[:, None] + anywhere  # [b, 1]
        if side < 0:
            said = _moved(turned(said), steps, combine, (1, -1))
        else:
            said = turned(_moved(said, steps, combine, (-1, 1)))
        said = np.where(there, combine(said, jumped), 0.0)
    return said


def _moved(
    states: Scores, steps: NDArray[np.float64], combine: np.ufunc, signs: tuple[int, int]
) -> Scores:
    """Move the states [2, b, S] of each direction by every step."""
    room = len(steps)
    size = states.shape[2] - room
    moved = np.full(states.shape, -np.inf)
    for direction, sign in enumerate(signs):
        target = moved[direction, :, room:size]
        for step, chance in enumerate(steps):
            from_here = states[direction, :, room - sign * step : size - sign * step]
            combine(target, from_here + chance, out=target)
    return moved
