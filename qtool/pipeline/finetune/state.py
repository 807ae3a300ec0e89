"""Where a training has come to, in a file of the run, so that one that was ended can go on."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from qtool.algorithms.lsq import Trainer
from qtool.config import Config
from qtool.errors import ConfigError
from qtool.pipeline.finetune.images import TrainingImages
from qtool.pipeline.layer_files import fingerprint_of
from qtool.run_dir import write_whole

LOG = logging.getLogger("qtool")

STATE_FILE = "training_state.pt"
FORMAT = 1
RATES = ("learning_rate", "scale_learning_rate")


class TrainingState:
    """Keeps the state of a training; a file holds the last one that was kept, whole.

    Args:
        folder: of the run.
        inputs: from inputs_of.
        rates: of the run; a resumed one may have others.
    """

    def __init__(self, folder: Path, inputs: Mapping[str, Any], rates: Mapping[str, float]) -> None:
        self.path = folder / STATE_FILE
        self.inputs, self.rates = dict(inputs), dict(rates)

    def save(self, trainer: Trainer, losses: list[float]) -> None:
        """Keep where a training is, and the loss of each step.

        Raises:
            OutputError: if the file cannot be written.
        """
        content = {
            "format": FORMAT,
            "inputs": self.inputs,
            "rates": self.rates,
            "losses": torch.tensor(losses, dtype=torch.float64),
            "state": trainer.state(),
        }
        write_whole(self.path, lambda file: torch.save(content, file))

    def resume(self, earlier: Path, trainer: Trainer) -> list[float]:
        """Take the state of an earlier run's folder, and give the losses of its steps.

        Raises:
            ConfigError: if there is none, or it is of a training on something else.
        """
        path = earlier / STATE_FILE
        content = _read(path)
        before = content["inputs"]
        different = [name for name in {**before, **self.inputs} if before.get(name) != self.inputs.get(name)]
        if different:
            raise ConfigError(
                f"{path}: is of a training with other {', '.join(different)}; resume it with the settings of "
                "its config.yaml, or start a new one"
            )
        try:
            trainer.load_state(content["state"])
            losses: list[float] = content["losses"].tolist()
        except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
            raise ConfigError(f"{path}: is damaged; start a new training") from error
        if content["rates"] != self.rates:
            LOG.warning("the learning rates are others from step %d on: the end is another too", trainer.step)
        LOG.info("%d steps were taken from %s", trainer.step, path)
        return losses


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(
            f"--resume-training-from: {path.parent} has no {path.name}: its training had not got far enough; "
            "leave the option out"
        )
    try:
        # Nothing in the file is executed.
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        if content["format"] == FORMAT and {"inputs", "rates", "losses", "state"} <= content.keys():
            return content
    except (OSError, RuntimeError, EOFError, LookupError, TypeError, pickle.UnpicklingError) as error:
        raise ConfigError(f"{path}: is no state of a training, or is cut short; start a new one") from error
    raise ConfigError(f"{path}: is no state of a training that this version reads; start a new one")


def inputs_of(config: Config, trainer: Trainer, images: TrainingImages) -> dict[str, Any]:
    """What the end of a training depends on, by words for messages, as plain values; rates are left out."""
    settings = {name: value for name, value in asdict(trainer.settings).items() if name not in RATES}
    network = trainer.network
    return {
        **{name.replace("_", " "): value for name, value in settings.items()},
        "network or quantization": fingerprint_of({}, [network.folded.traced], network.plan, []),
        "images": images.digest(),
        "preprocessing": repr(images.learn.preprocessing),
        "augmentation or seed": repr(images.augmentation),
        "batch size": config.data.batch_size,
        "device": config.run.chosen_device,
        "version of torch": str(torch.__version__),
        "number of threads": torch.get_num_threads(),
    }
