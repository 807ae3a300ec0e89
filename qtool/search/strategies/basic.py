"""The basic strategy: from settings of the whole network to single groups with more bits.

Reference:
    Intel Neural Compressor 2.6, strategy `basic`, as far as it is about static quantization: its stages for
    weights alone, for dynamic quantization and for blocks of transformers have nothing to do here.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from qtool.search.space import Candidate, Finding, Space, better, trial
from qtool.search.strategies.types import Part, Steps, start


def basic(space: Space, seed: int) -> Steps:
    """Propose, in this order:

    1. the start;
    2. all recipes at once, each at the option that does the most;
    3. every combination of the other settings, the first of them changing slowest;
    4. the recipes one by one, with the best settings so far;
    5. for each number of bits to fall back to: one group at a time, from the output to the input, then
       these groups together, one more each time, those that helped most first.

    Args:
        space: what there is to choose from.
        seed: not used, as nothing is drawn.
    """
    best = yield from start(space)
    best = yield from _all_recipes(space, best)
    best = yield from _combinations(space, best)
    best = yield from _single_recipes(space, best)
    for bits in space.fallback:
        best = yield from _fall_back(space, best, bits)


def _tried(candidates: Sequence[Candidate], stage: str, best: Finding) -> Part[Finding]:
    """The best of what was so far and of some more."""
    if candidates:
        for found in (yield [trial(candidate, stage) for candidate in candidates]):
            best = better(best, found)
    return best


def _all_recipes(space: Space, best: Finding) -> Part[Finding]:
    candidate = space.start
    for recipe in space.recipes:
        candidate = candidate.with_setting(recipe.name, recipe.options[-1])
    return (yield from _tried([candidate] if space.recipes else [], "all recipes", best))


def _combinations(space: Space, best: Finding) -> Part[Finding]:
    names = [d.name for d in space.choices]
    options = itertools.product(*(d.options for d in space.choices))
    # With the recipes of the best so far: a combination is to add to what they mend.
    recipes = {d.name: dict(best.candidate.settings)[d.name] for d in space.recipes}
    candidates = [Candidate.of({**recipes, **dict(zip(names, chosen, strict=True))}) for chosen in options]
    return (yield from _tried(candidates[1:], "settings", best))


def _single_recipes(space: Space, best: Finding) -> Part[Finding]:
    for recipe in space.recipes:
        held = dict(best.candidate.settings)[recipe.name]
        others = [best.candidate.with_setting(recipe.name, o) for o in recipe.options if o != held]
        best = yield from _tried(others, f"recipe {recipe.name}", best)
    return best


def _fall_back(space: Space, best: Finding, bits: int) -> Part[Finding]:
    """Groups one by one, then together."""
    begin = best.candidate
    at = dict(begin.raised)
    names = [name for name in reversed(space.groups) if at.get(name) != bits]
    if not names:
        return best
    found = yield [trial(begin.with_raised(name, bits=bits), f"{name} alone") for name in names]
    for one in found:
        best = better(best, one)
    scores = {name: one.score for name, one in zip(names, found, strict=True)}
    ranked = sorted(names, key=lambda name: -scores[name])
    for count in range(2, len(ranked) + 1):  # the first alone was tried
        candidate = begin.with_raised(*ranked[:count], bits=bits)
        best = yield from _tried([candidate], f"{count} groups together", best)
    return best
