"""From evidence to one score: a tap is as surprising as its most surprising piece, and the taps' surprises are averaged.

Both are judged by clean inputs. The average of ``-log p`` is Fisher's combination, weighted (Good 1955). N inputs, E pieces of
evidence, T groups: the strangeness of each tap, then its mismatch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from diffense.scoring import Evidence
from diffense.surprise import Surprise, find_surprise, fit_surprise

Matrix = NDArray[np.float64]

DEEP: Final = 2.0  # weight of the deeper half of the taps: a backdoor acts on the label, patches alone act early as well


@dataclass(frozen=True)
class Rule:
    """Clean statistics and weights of the evidence.

    Attributes:
        pieces: of the E pieces.
        groups: (E, T) one where a piece belongs to a group, else zero.
        taps: of the T groups.
        weights: (T,), they sum to one.
    """

    pieces: Surprise
    groups: Matrix
    taps: Surprise
    weights: Matrix


def fit_rule(blocks: Sequence[Matrix], evidence: list[Evidence]) -> Rule:
    """Fit the statistics on clean evidence that no row has helped to fit.

    Args:
        blocks: (n, E_b) clean evidence, each of rows of its own; no group is in two blocks.
        evidence: names of all the columns, block by block.
    """
    groups, weights = group_evidence(evidence)
    pieces, taps, start = [], [], 0
    for numbers in blocks:
        block = groups[start : start + numbers.shape[1]]
        start += numbers.shape[1]
        pieces.append(fit_surprise(numbers))
        surprises = find_surprise(pieces[-1], numbers, np)
        taps.append(fit_surprise(find_largest(surprises, block[:, block.any(axis=0)], np)))
    return Rule(join_surprises(pieces), groups, join_surprises(taps), weights)


def join_surprises(parts: list[Surprise]) -> Surprise:
    """One after the other."""
    return Surprise(np.concatenate([part.knots for part in parts]), np.concatenate([part.slopes for part in parts]))


def group_evidence(evidence: list[Evidence], deep: float = DEEP) -> tuple[Matrix, Matrix]:
    """(E, T) members of the groups, one a kind and tap, and the groups' (T,) weights.

    The kinds count alike, however many taps they have; of the taps the deeper half counts `deep` times as much.
    """
    names = name_groups(evidence)
    groups = np.array([[float((e.kind, e.tap) == name) for name in names] for e in evidence])
    half = (max(tap for _, tap in names) + 1) // 2
    weights = np.array([deep if tap >= half else 1.0 for _, tap in names])
    for kind in {kind for kind, _ in names}:
        members = np.array([name[0] == kind for name in names])
        weights[members] /= weights[members].sum() * len({k for k, _ in names})
    return groups, weights


def name_groups(evidence: list[Evidence]) -> list[tuple[str, int]]:
    """(kind, tap) of the T groups."""
    return list(dict.fromkeys((e.kind, e.tap) for e in evidence))


def find_largest(surprises: Any, groups: Matrix, xp: Any) -> Any:
    """(N, E) surprises, none negative -> (N, T) largest of each group: an anomaly sits in a few directions."""
    return xp.amax(xp.reshape(surprises, (-1, len(groups), 1)) * groups, axis=1)


def combine(rule: Rule, evidence: Any, xp: Any) -> Any:
    """(N, E) -> (N,) scores; one-sided throughout, so less strange than usual costs nothing."""
    return combine_surprises(rule, find_surprise(rule.pieces, evidence, xp), xp)


def combine_surprises(rule: Rule, surprises: Any, xp: Any) -> Any:
    """(N, E) ``-log p`` -> (N,) scores."""
    return xp.sum(share_score(rule, surprises, xp), axis=1)


def share_score(rule: Rule, surprises: Any, xp: Any) -> Any:
    """(N, E) ``-log p`` -> (N, T) what each group adds to the score."""
    return find_surprise(rule.taps, find_largest(surprises, rule.groups, xp), xp) * rule.weights
