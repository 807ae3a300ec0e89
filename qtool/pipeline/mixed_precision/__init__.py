"""Mixed precision, from the settings to the files: bits for each layer, then a run with them."""

from __future__ import annotations

import csv
import io
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import qtool.config as configs
from qtool.config import CalibrationConfig, Config, QuantizeConfig, dump_quantizers, with_bits_of_layers
from qtool.errors import ConfigError
from qtool.graph.trace import layers
from qtool.numerics.metrics import ratio_db
from qtool.pipeline import runs, steps
from qtool.pipeline.mixed_precision.costs import BOPS, FLOAT_BITS, MEAN, SIZE, WORDS, Costs, costs
from qtool.pipeline.mixed_precision.plot import Curve, as_svg, as_text
from qtool.pipeline.mixed_precision.table import Table, damage_table
from qtool.pipeline.run_folder import run_folder
from qtool.pipeline.sensitivity.opening import Opened, open_measurement
from qtool.pipeline.stats_files import STATS_FILE
from qtool.run_dir import write_text
from qtool.search.mixed_precision import BudgetTooSmall, Choice, choose_bits, pareto_front

LOG = logging.getLogger("qtool")

MIXED_FILE, FRONT_FILE, PLOT_FILE, TABLE_FILE = "mixed.yaml", "pareto.csv", "pareto.svg", "damage.csv"
COMMAND = "tune --bits"


def find_bits(config: Config) -> runs.Outcome:
    """Choose bits for each layer within a budget, then quantize and evaluate with them.

    Raises:
        ConfigError: if settings are wrong, or nothing fits the budget.
    """
    flag, budget = _check(config)
    asked = config.mixed
    assert asked.choices is not None
    opened = open_measurement(config, COMMAND, asked.mixed_images)
    _refuse_hopeless(flag, budget, asked.choices, opened)
    with run_folder(config) as folder:
        LOG.info("network: %s, %s", opened.subject.arch, opened.subject.weights)
        stats = opened.stats(config, folder)
        LOG.info("choosing bits on %s", opened.images.words)
        start = time.perf_counter()
        batches = opened.batches(config)
        images = [x for x, _ in batches]
        choices = tuple(sorted(asked.choices))
        table = damage_table(
            opened.traced, stats, opened.quantizers, images, choices, asked.mixed_activations, config.run.seed
        )
        priced = costs(flag, table.traced, table.plan, table.tensors, table.knobs)
        choice = _choose(flag, budget, priced)
        front = pareto_front(priced.knobs, priced.products, priced.fixed)
        seconds = time.perf_counter() - start
        mixed = _settings(opened, table, choice)
        _write(folder, flag, priced, choice, front, mixed)
        record = _record(flag, budget, priced, choice, sum(len(y) for _, y in batches), seconds)
        write_text(folder / runs.RESULTS_FILE, json.dumps({"mixed_precision": record}, indent=2) + "\n")
        shown = [_layers_text(table, choice), "", as_text(_curve(flag, priced, choice, front))]
        found = runs.quantize(_run_with(config, mixed, folder))
        record["run"] = found.folder.name
        results = {"mixed_precision": record, **found.results}
        write_text(folder / runs.RESULTS_FILE, json.dumps(runs.finite(results), indent=2) + "\n")
    words = f"{choice.cost / priced.unit:.4g} {WORDS[flag]} (at most {budget:g}), in {folder / MIXED_FILE}"
    return runs.Outcome("\n".join([*shown, words, found.text, str(folder)]), folder, results)


def _check(config: Config) -> tuple[str, float]:
    """The one budget, by its flag.

    Raises:
        ConfigError: if there is none or several, or something that cannot be honoured.
    """
    asked = config.mixed
    if asked.choices is None:
        raise ConfigError("--bits: which numbers of bits to choose among is missing; add --bits 2,4,6,8")
    if len(asked.budgets) != 1:
        found = " and ".join(asked.budgets) or "none of --size-budget, --mean-bits and --bops-budget"
        raise ConfigError(f"--bits: one budget is wanted, found {found}; give one of the three")
    ((flag, budget),) = asked.budgets.items()
    if asked.mixed_activations and flag != BOPS:
        raise ConfigError(
            f"--mixed-activations: {flag} counts weights only; give --bops-budget, or leave it out"
        )
    configs.refuse_given(config, ("lapq",), "moves ranges for bits that are fixed; leave out --bits")
    return flag, budget


def _refuse_hopeless(flag: str, budget: float, choices: Sequence[int], opened: Opened) -> None:
    """Refuse, before any long work, a budget below what the fewest bits of any weight take.

    Raises:
        ConfigError: naming the flag.
    """
    specs = steps.specs_for(opened.traced, opened.quantizers).values()
    fewest = min(*choices, *(spec.weight.num_bits for spec in specs if spec.weight is not None))
    least = {MEAN: min(choices), SIZE: fewest / FLOAT_BITS}.get(flag, 0.0)
    if budget < least:
        raise _too_small(flag, budget, least)


def _choose(flag: str, budget: float, priced: Costs) -> Choice:
    try:
        return choose_bits(priced.knobs, budget * priced.unit, priced.products, priced.fixed)
    except BudgetTooSmall as error:
        raise _too_small(flag, budget, error.smallest / priced.unit) from error


def _too_small(flag: str, budget: float, least: float) -> ConfigError:
    return ConfigError(
        f"{flag}: {budget:g} {WORDS[flag]} is less than the fewest bits take; give at least "
        f"{_rounded_up(least):g}, or fewer bits to --bits"
    )


def _rounded_up(value: float) -> float:
    """With four digits behind the point, and not less."""
    return -(-value * 10_000 // 1) / 10_000


def _settings(opened: Opened, table: Table, choice: Choice) -> QuantizeConfig:
    """The settings of the quantizer with an override for each layer whose bits were chosen."""
    bits: dict[str, dict[str, int]] = {}
    for key, knobs in (
        ("bits_weights", table.tensors.weights),
        ("bits_activations", table.tensors.activations),
    ):
        for knob, names in knobs.items():
            for name in names:
                bits.setdefault(name, {})[key] = choice.bits[knob]
    order = [name for name, _, _ in layers(opened.traced)]
    return with_bits_of_layers(opened.quantizers, order, {n: bits[n] for n in order if n in bits})


def _run_with(config: Config, mixed: QuantizeConfig, folder: Path) -> Config:
    """The run that quantizes and evaluates with what was found, inside the folder."""
    stats = config.quantizers.stats_file or folder / STATS_FILE
    needs_images = config.corrections.asked
    return replace(
        config,
        quantizers=replace(mixed, stats_file=stats),
        calibration=config.calibration if needs_images else CalibrationConfig(),
        run=replace(config.run, out_dir=folder, name="mixed"),
    )


def _write(
    folder: Path, flag: str, priced: Costs, choice: Choice, front: Sequence[Choice], mixed: QuantizeConfig
) -> None:
    write_text(folder / MIXED_FILE, dump_quantizers(mixed))
    names = [knob.name for knob in priced.knobs]
    rows = [["cost", "predicted_sqnr_db", "chosen", *names]]
    for one in sorted([*(c for c in front if c.bits != choice.bits), choice], key=lambda c: c.cost):
        cells = [f"{one.cost / priced.unit:.6g}", f"{_db(one):.4f}", str(int(one is choice))]
        rows.append([*cells, *(str(one.bits[name]) for name in names)])
    write_text(folder / FRONT_FILE, _csv(rows))
    table = [["tensor", "bits", "noise", "sqnr_db", "cost"]]
    for knob in priced.knobs:
        prices = knob.cost or (0.0,) * len(knob.bits)
        for bits, damage, cost in zip(knob.bits, knob.damage, prices, strict=True):
            sqnr = f"{ratio_db(1.0, damage):.4f}"
            table.append([knob.name, str(bits), f"{damage:.6g}", sqnr, f"{cost / priced.unit:.6g}"])
    write_text(folder / TABLE_FILE, _csv(table))
    write_text(folder / PLOT_FILE, as_svg(_curve(flag, priced, choice, front)))


def _csv(rows: Sequence[Sequence[str]]) -> str:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(rows)
    return file.getvalue()


def _db(choice: Choice) -> float:
    """The SQNR of the logits that a choice is predicted to have, from the noise of what is chosen alone."""
    return ratio_db(1.0, choice.damage)


def _curve(flag: str, priced: Costs, choice: Choice, front: Sequence[Choice]) -> Curve:
    points = [(one.cost / priced.unit, _db(one)) for one in front]
    label = "share " + WORDS[flag] if flag in (SIZE, BOPS) else WORDS[flag]
    return Curve(points, (choice.cost / priced.unit, _db(choice)), label, "predicted SQNR of the logits, dB")


def _layers_text(table: Table, choice: Choice) -> str:
    width = max((len(name) for name in choice.bits), default=6)
    lines = [f"{'tensor':<{width}}  bits    SQNR, dB alone"]
    for knob in table.knobs:
        bits = choice.bits[knob.name]
        alone = ratio_db(1.0, knob.damage[knob.bits.index(bits)])
        lines.append(f"{knob.name:<{width}}  {bits:>4}{alone:>18.1f}")
    return "\n".join(lines)


def _record(
    flag: str, budget: float, priced: Costs, choice: Choice, images: int, seconds: float
) -> dict[str, Any]:
    return {
        "budget": {"flag": flag, "asked": budget, "used": choice.cost / priced.unit},
        "bits": dict(choice.bits),
        "predicted_sqnr_db": _db(choice),
        "images": images,
        "seconds": round(seconds, 3),
    }
