"""The command init: a commented file of settings for a network."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from qtool.config import Config, absolute_arch
from qtool.config.template import NamedLayer, template
from qtool.errors import OutputError
from qtool.graph.trace import layers
from qtool.pipeline import runs, steps
from qtool.pipeline.inputs import load_subject
from qtool.quantizers.plan import WEIGHTED
from qtool.run_dir import check_writable, write_text

STDOUT = Path("-")


def write_template(config: Config, file: Path, force: bool) -> str:
    """Write a file that asks for what config does; what to say at the end, or the text for STDOUT.

    Raises:
        OutputError: if the file is there and force is not given, or if it cannot be written.
        ConfigError, ModelError: if the file would not load, or a pattern matches no layer.
    """
    if file != STDOUT:
        if file.exists() and not force:
            raise OutputError(
                f"{file}: is there already; name another file with -o, or replace it with --force"
            )
        check_writable(file)
    text = _text(config, file)
    if file == STDOUT:
        return text.removesuffix("\n")
    write_text(file, text)
    return f"{file}: run it with 'qtool quantize -c {file}'"


def _text(config: Config, file: Path) -> str:
    runs.check_before_work(config, data_needed=True)
    # Names of layers do not depend on the weights, so none are downloaded.
    subject = load_subject(replace(config, model=replace(config.model, pretrained=False, weights=None)))
    runs.refuse_quantized(subject, "init")
    traced = subject.traced()
    steps.specs_for(traced, config.quantizers)
    named = [
        NamedLayer(name, node.meta["op"], node.meta["op"] in {*WEIGHTED, "embedding"})
        for name, node, _ in layers(traced)
    ]
    title = f"Settings of qtool for {subject.arch}"
    if file != STDOUT:
        title += f": qtool quantize -c {file.name}"
    return template(_found_from(file, config), named, title)


def _found_from(file: Path, config: Config) -> Config:
    """The configuration with paths that hold for a file in another folder."""
    if file == STDOUT or file.absolute().parent == Path.cwd():
        return config
    changed: dict[str, Any] = {}
    for section in ("model", "data", "calibration", "quantizers"):
        values = getattr(config, section)
        paths = {f.name: getattr(values, f.name) for f in fields(values)}
        absolute = {name: path.absolute() for name, path in paths.items() if isinstance(path, Path)}
        changed[section] = replace(values, **absolute)
    changed["model"] = replace(changed["model"], arch=absolute_arch(config.model.arch))
    return replace(config, **changed)
