"""The command search-clipping: the best clip mode of each layer, as a file that quantize takes."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from torch import fx
from tqdm import tqdm

import qtool.config as configs
from qtool.config import Config, QuantizeConfig, dump_quantizers, with_settings_of_layers
from qtool.graph.trace import layers
from qtool.numerics.spec import LayerSpec
from qtool.pipeline import runs, steps
from qtool.pipeline.inputs import open_evaluation, open_subject
from qtool.pipeline.ranges import find_ranges, find_stats
from qtool.pipeline.run_folder import run_folder
from qtool.pipeline.searches import journal_of, load_batches, open_search, search_inputs
from qtool.run_dir import write_text
from qtool.search.clipping import MODES, Choice, candidates, layers_to_decide, search_clipping
from qtool.search.journal import Journal
from qtool.search.trials import Score, Trials

LOG = logging.getLogger("qtool")

RESULT_FILE = "greedy_search.yaml"


def run(config: Config) -> runs.Outcome:
    """Decide on a clip mode for each layer; the file of those decided is written after each."""
    configs.check_search(config, searches=True)
    configs.refuse_given(config, ("conversion", "evaluation"), "is of 'qtool quantize', not of this search")
    runs.check_before_work(config, data_needed=True)
    start = time.perf_counter()
    subject = open_subject(config)
    runs.refuse_quantized(subject, "search-clipping")
    evaluation = open_evaluation(config, subject)
    traced = subject.traced()
    specs = specs_by_mode(config.quantizers, traced)
    ranges = find_ranges(config, subject, traced, evaluation, searches=True)
    searched = open_search(config, subject, evaluation, ranges.calibration)
    with run_folder(config) as folder:
        LOG.info("network: %s, %s", subject.arch, subject.weights)
        stats, _ = find_stats(config, traced, ranges, folder)
        assert stats is not None  # dynamic mode is refused
        trials = Trials(traced, stats, load_batches(config, searched), config.run.chosen_device)
        inputs = {"search": "clipping", **search_inputs(config, subject, traced, stats, searched)}
        with journal_of(config, folder, inputs) as journal:
            choices = _search(config, folder, traced, specs, trials, journal)
        record = {
            "search_clipping": {
                "layers": {c.layer: {"mode": c.mode, **asdict(c.score)} for c in choices},
                "evaluations": journal.computed + journal.taken,
                "resumed": journal.taken,
                "images": searched.record(trials.images),
                "seconds": round(time.perf_counter() - start, 3),
            }
        }
        write_text(folder / runs.RESULTS_FILE, json.dumps(record, indent=2) + "\n")
    return runs.Outcome(f"{_table(choices)}\n{folder / RESULT_FILE}", folder, record)


def specs_by_mode(config: QuantizeConfig, traced: fx.GraphModule) -> dict[str, Mapping[str, LayerSpec]]:
    """What is asked of all layers if all were clipped so, by clip mode."""
    names = [name for name, _, _ in layers(traced)]
    return {
        mode: steps.specs_for(
            traced, with_settings_of_layers(config, names, {n: {"clip_activations": mode} for n in names})
        )
        for mode in MODES
    }


def _search(
    config: Config,
    folder: Path,
    traced: fx.GraphModule,
    specs: Mapping[str, Mapping[str, LayerSpec]],
    trials: Trials,
    journal: Journal,
) -> list[Choice]:
    folded = trials.folded.traced
    total = sum(len(candidates(name, specs)) for name in layers_to_decide(folded, specs["none"]))
    names = [name for name, _, _ in layers(traced)]
    choices: list[Choice] = []
    bar = tqdm(desc="searching", total=total, unit="trial", leave=False, disable=None)

    def score(name: str, trial: Mapping[str, LayerSpec]) -> Score:
        loss, top1 = journal(name, lambda: _numbers(trials.score(trial)))
        bar.update()
        return Score(loss, top1)

    with bar:
        for choice in search_clipping(folded, specs, score):
            choices.append(choice)
            bar.set_postfix_str(f"{choice.layer}: {choice.mode}, top-1 {choice.score.top1:.3f}")
            LOG.debug(
                "%s: %s, top-1 %.3f, loss %.6g", choice.layer, choice.mode, *reversed(_numbers(choice.score))
            )
            found = {c.layer: {"clip_activations": c.mode} for c in choices}
            result = with_settings_of_layers(config.quantizers, names, found)
            write_text(folder / RESULT_FILE, dump_quantizers(result))
    return choices


def _numbers(score: Score) -> tuple[float, float]:
    return score.loss, score.top1


def _table(choices: list[Choice]) -> str:
    width = max((len(c.layer) for c in choices), default=5)
    rows = [f"{c.layer:<{width}}  {c.mode:<8}{c.score.top1:>8.3f}{c.score.loss:>9.4f}" for c in choices]
    return "\n".join([f"{'layer':<{width}}  {'clip':<8}{'top-1':>8}{'loss':>9}", *rows])
