"""What a tuning may choose from, and one choice: plain data that reads the same everywhere."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# What is done with a candidate.
TRIAL = "trial"  # the metrics on all images that choose
PROBE = "probe"  # the error of the logits on a few images
RANKING = "ranking"  # the same with plain rounding, as corrections of integers take long
CONFIRM = "confirm"  # the metrics again, by the engine that was asked for
FLOAT = 0


@dataclass(frozen=True)
class Candidate:
    """One way to quantize a network.

    Args:
        settings: of the whole network, by name, in alphabetical order.
        raised: groups that have more bits, by name, in alphabetical order; 0 leaves them in float.
    """

    settings: tuple[tuple[str, Any], ...] = ()
    raised: tuple[tuple[str, int], ...] = ()

    @classmethod
    def of(cls, settings: Mapping[str, Any], raised: Mapping[str, int] | None = None) -> Candidate:
        """From mappings in any order."""
        return cls(tuple(sorted(settings.items())), tuple(sorted((raised or {}).items())))

    def with_setting(self, name: str, value: Any) -> Candidate:
        """The same with another setting of the whole network."""
        return Candidate.of({**dict(self.settings), name: value}, dict(self.raised))

    def with_raised(self, *groups: str, bits: int) -> Candidate:
        """The same with more bits for some groups."""
        return Candidate.of(dict(self.settings), {**dict(self.raised), **dict.fromkeys(groups, bits)})

    def plain(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {"settings": dict(self.settings), "raised": dict(self.raised)}

    @classmethod
    def from_plain(cls, tree: Mapping[str, Any]) -> Candidate:
        """What plain gave."""
        return cls.of(tree["settings"], tree["raised"])


@dataclass(frozen=True)
class Proposal:
    """What a strategy wants to know of a candidate.

    Args:
        candidate: the candidate.
        kind: TRIAL, PROBE, RANKING or CONFIRM.
        images: places of the images of a probe among those that choose; none for all.
        stage: of the strategy, in words; it does not change what is measured.
    """

    candidate: Candidate
    kind: str = TRIAL
    images: tuple[int, ...] = ()
    stage: str = field(default="", compare=False)

    def plain(self) -> dict[str, Any]:
        """All that the result depends on, as JSON holds it."""
        return {"kind": self.kind, **self.candidate.plain(), "images": list(self.images)}

    @property
    def key(self) -> str:
        """The same for the same proposal, and no other: SHA-256 of its canonical JSON.

        Example:
            >>> one = Candidate.of({"a": 1, "b": 2}, {"fc": 0, "conv1": 8})
            >>> other = Candidate.of({"b": 2, "a": 1}, {"conv1": 8, "fc": 0})
            >>> Proposal(one).key == Proposal(other, stage="elsewhere").key
            True
        """
        return hashlib.sha256(canonical(self.plain()).encode()).hexdigest()


def canonical(tree: Any) -> str:
    """JSON with sorted keys and no spaces."""
    return json.dumps(tree, sort_keys=True, separators=(",", ":"))


@dataclass(frozen=True)
class Dimension:
    """A setting of the whole network that is tuned.

    Args:
        name: of the setting.
        options: its values; the first is where the tuning starts.
        recipe: whether it mends damage, as corrections do, rather than choosing a grid; the last of the
            options then does the most.
    """

    name: str
    options: tuple[Any, ...]
    recipe: bool = False


@dataclass(frozen=True)
class Space:
    """What a tuning chooses from.

    Args:
        dimensions: settings of the whole network, in the order in which they are tried.
        groups: names of those that can have more bits, in the order of execution.
        fallback: the bits that they can have, in the order in which they are tried; 0 for float.
    """

    dimensions: tuple[Dimension, ...] = ()
    groups: tuple[str, ...] = ()
    fallback: tuple[int, ...] = (FLOAT,)

    @property
    def start(self) -> Candidate:
        """The first option everywhere."""
        return Candidate.of({d.name: d.options[0] for d in self.dimensions})

    @property
    def choices(self) -> tuple[Dimension, ...]:
        """The dimensions that are no recipes."""
        return tuple(d for d in self.dimensions if not d.recipe)

    @property
    def recipes(self) -> tuple[Dimension, ...]:
        """Those that are."""
        return tuple(d for d in self.dimensions if d.recipe)


@dataclass(frozen=True)
class Finding:
    """What a strategy is told of a proposal.

    Args:
        proposal: the proposal.
        score: of a trial, higher is better; minus infinity if it could not be made.
        met: whether a trial meets the goal.
        error: of a probe: how far the logits are from the float network's; infinite if it could not be made.
        cost: by the objective, lower is better.
        worst: of a trial, the places of the images whose logits are farthest off, to be probed.
    """

    proposal: Proposal
    score: float = float("-inf")
    met: bool = False
    error: float = float("inf")
    cost: float = float("inf")
    worst: tuple[int, ...] = ()

    @property
    def candidate(self) -> Candidate:
        """What was tried."""
        return self.proposal.candidate


def trial(candidate: Candidate, stage: str) -> Proposal:
    """The proposal to measure the metrics of a candidate."""
    return Proposal(candidate, TRIAL, (), stage)


def better(one: Finding, other: Finding) -> Finding:
    """The one with the higher score; of equals the other, which came later."""
    return one if one.score > other.score else other
