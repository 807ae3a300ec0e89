"""Searches for ranges: the sections `lapq` and `search`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click

from qtool.config.options import FILE, PositiveFloat, option

# Those of SciPy's methods that need no derivatives: the loss is constant between steps of the grids.
METHODS = ("Powell", "Nelder-Mead")
INIT_MODES = ("auto", "none", "avg", "laplace", "gauss", "l1", "l2", "l3")


@dataclass(frozen=True)
class LapqConfig:
    """LAPQ: search for the ranges of all tensors together, by the loss"""

    enabled: bool = option(False, click.BOOL, "Search for ranges with LAPQ.", "--qe-lapq")
    maxiter: int | None = option(
        2, click.IntRange(1), "Iterations of the search, each through all ranges.", "--lapq-maxiter"
    )
    maxfev: int | None = option(
        None, click.IntRange(1), "Evaluations of the search.", "--lapq-maxfev", shown_default="no limit"
    )
    method: str = option(
        "Powell",
        click.Choice(METHODS, case_sensitive=False),
        "SciPy's method of the search.",
        "--lapq-method",
    )
    basinhopping: bool = option(
        False,
        click.BOOL,
        "Repeat the search from points nearby, chosen by seed.",
        "--lapq-basinhopping",
        "--lapq-bh",
    )
    basinhopping_niter: int = option(
        100, click.IntRange(1), "How often --lapq-basinhopping repeats it.", "--lapq-basinhopping-niter"
    )
    init_mode: str = option(
        "auto",
        click.Choice(INIT_MODES, case_sensitive=False),
        "Where the search starts: ranges of a clip mode, or those of the smallest error in the p-norm; "
        "auto finds p by a quadratic fit.",
        "--lapq-init-mode",
    )
    init_method: str = option(
        "Powell",
        click.Choice(METHODS, case_sensitive=False),
        "SciPy's method for the ranges of a p-norm.",
        "--lapq-init-method",
    )
    eval_memoize_dataloader: bool = option(
        False,
        click.BOOL,
        "In Distiller's scripts; images always stay in memory.",
        "--lapq-eval-memoize-dataloader",
    )
    search_clipping: bool = option(
        False,
        click.BOOL,
        "Move the two ends of an asymmetric range independently.",
        "--lapq-search-clipping",
    )


@dataclass(frozen=True)
class SearchConfig:
    """Search, by --qe-lapq or search-clipping"""

    eval_size: float = option(
        1.0,
        PositiveFloat(1.0),
        "Share of the calibration images that every trial is evaluated on, chosen by seed.",
        "--lapq-eval-size",
        "--search-eval-size",
    )
    resume: Path | None = option(
        None,
        FILE,
        "Folder of a run that ended in the middle of its search; what it evaluated is taken over.",
        "--resume-search-from",
    )
