"""Bayesian optimization, by optuna's tree-structured Parzen estimator.

Reference:
    Bergstra et al. 2011, "Algorithms for Hyper-Parameter Optimization", as optuna has it.
"""

from __future__ import annotations

import importlib
import math
from typing import Any

from qtool.errors import ConfigError
from qtool.search.space import Candidate, Finding, Proposal, Space, trial
from qtool.search.strategies.types import Steps, start

PIP = "pip install 'qtool[bayesian]'"
# Proposals that are made without knowing of one another, and those drawn before anything is learned.
BATCH, DRAWN = 4, 12
# Batches in a row that bring nothing new.
MOST_REPEATS = 50


def bayesian(space: Space, seed: int) -> Steps:
    """Propose what, by the findings so far, promises the highest value.

    What meets the goal has a value above all that does not, the more the less it costs; what does not has
    its score.

    Args:
        space: each of its dimensions, and each group, is a categorical parameter.
        seed: of the sampler.

    Raises:
        ConfigError: if optuna is not installed.
    """
    optuna = load_optuna()
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=DRAWN, constant_liar=True)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    begin = yield from start(space)
    choices = _choices(space)
    study.enqueue_trial(dict.fromkeys(choices, 0))
    study.tell(study.ask(_distributions(optuna, choices)), _value(begin))
    seen, repeats = {begin.candidate}, 0
    while repeats < MOST_REPEATS:
        asked = [study.ask(_distributions(optuna, choices)) for _ in range(BATCH)]
        proposals = [_proposal(space, choices, one.params) for one in asked]
        found = yield proposals
        for one, finding in zip(asked, found, strict=True):
            study.tell(one, _value(finding))
        new = {p.candidate for p in proposals} - seen
        repeats = 0 if new else repeats + 1
        seen |= new


def load_optuna() -> Any:
    """The module.

    Raises:
        ConfigError: if it is not installed.
    """
    try:
        optuna = importlib.import_module("optuna")
    except ImportError as error:
        raise ConfigError(f"--strategy bayesian: needs optuna, which is not installed: {PIP}") from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def _choices(space: Space) -> dict[str, tuple[Any, ...]]:
    """The options of every parameter; the first is that of the start."""
    settings = {f"setting {d.name}": d.options for d in space.dimensions if len(d.options) > 1}
    return settings | {f"group {g}": (None, *space.fallback) for g in space.groups}


def _distributions(optuna: Any, choices: dict[str, tuple[Any, ...]]) -> dict[str, Any]:
    categorical = optuna.distributions.CategoricalDistribution
    return {name: categorical(tuple(range(len(options)))) for name, options in choices.items()}


def _proposal(space: Space, choices: dict[str, tuple[Any, ...]], params: dict[str, int]) -> Proposal:
    chosen = {name: choices[name][number] for name, number in params.items()}
    settings = {d.name: chosen.get(f"setting {d.name}", d.options[0]) for d in space.dimensions}
    raised = {g: chosen[f"group {g}"] for g in space.groups if chosen[f"group {g}"] is not None}
    return trial(Candidate.of(settings, raised), "proposed")


# Above any score.
MET = 1000.0
FAILED = -1000.0


def _value(finding: Finding) -> float:
    if finding.met:
        return MET - (finding.cost if math.isfinite(finding.cost) else 0.0)
    return finding.score if math.isfinite(finding.score) else FAILED
