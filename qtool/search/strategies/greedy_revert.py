"""Accuracy control: give back bits to the groups whose quantization does the most damage, one by one.

Reference:
    NNCF 3.4, quantization with accuracy control. Unlike there, the group that is reverted first is the one
    whose removal leaves the smallest error, also where errors are those of logits, and success with the
    very last group is success.
"""

from __future__ import annotations

from collections.abc import Sequence

from qtool.search.space import PROBE, RANKING, Candidate, Finding, Proposal, Space, trial
from qtool.search.strategies.types import Part, Steps, one, start


def greedy_revert(space: Space, seed: int) -> Steps:
    """Propose the start, then settings of the whole network, then one group after the other.

    Settings are found one after the other by the error of logits on the images that the start does worst;
    the groups by what they would take off that error.

    Args:
        space: what there is to choose from.
        seed: not used, as nothing is drawn.
    """
    begin = yield from start(space)
    current = yield from _with_settings(space, begin)
    for bits in space.fallback:
        current = yield from _revert(space, current, bits, begin.worst)


def _with_settings(space: Space, begin: Finding) -> Part[Finding]:
    """Each option of one setting after the other, with the earlier winners; ties keep the first."""
    candidate = begin.candidate
    for dimension in space.dimensions:
        options = [candidate.with_setting(dimension.name, option) for option in dimension.options]
        if len(options) > 1:
            probes = [Proposal(o, PROBE, begin.worst, f"probe {dimension.name}") for o in options]
            found = yield probes
            candidate = min(found, key=lambda f: f.error).candidate
    if candidate == begin.candidate:
        return begin
    after = yield from one(trial(candidate, "settings"))
    return after if after.score >= begin.score else begin


def _revert(space: Space, current: Finding, bits: int, images: tuple[int, ...]) -> Part[Finding]:
    """Revert group after group: one step may do harm; a second is undone, and groups are ranked anew."""
    held = dict(current.candidate.raised)
    groups = [g for g in space.groups if held.get(g) != bits]
    left = yield from _ranked(current.candidate, groups, bits, images)
    harmed = False
    while left:
        group = left.pop(0)
        after = yield from one(trial(current.candidate.with_raised(group, bits=bits), f"revert {group}"))
        if after.score >= current.score or not harmed:
            harmed = harmed or after.score < current.score
            current = after
        else:
            again = [g for g in space.groups if g == group or g in left]
            left = yield from _ranked(current.candidate, again, bits, images)
            harmed = False
    return current


def _ranked(
    candidate: Candidate, groups: Sequence[str], bits: int, images: tuple[int, ...]
) -> Part[list[str]]:
    """Groups by how much of the error goes when they are reverted, most first; ties by execution."""
    if len(groups) < 2:
        return list(groups)
    reverted = [candidate.with_raised(group, bits=bits) for group in groups]
    before, *after = yield [Proposal(c, RANKING, images, "ranking") for c in (candidate, *reverted)]
    benefit = {g: before.error - f.error for g, f in zip(groups, after, strict=True)}
    return sorted(groups, key=lambda group: -benefit[group])
