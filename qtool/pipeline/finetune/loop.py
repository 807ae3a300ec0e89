"""The steps of a run's training: its images, its progress bar, its states."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from tqdm import tqdm

from qtool.algorithms.lsq import DivergedError, Trainer
from qtool.config import Config
from qtool.errors import ModelError
from qtool.pipeline.finetune.images import TrainingImages
from qtool.pipeline.finetune.state import TrainingState

LOG = logging.getLogger("qtool")

# Between two states, at least; and a state may take this share of the time.
SAVE_SECONDS = 20.0
SAVE_SHARE = 0.05
# Share of the time estimate that is the last step's.
SMOOTHING = 0.02


def train(
    config: Config, trainer: Trainer, images: TrainingImages, state: TrainingState, losses: list[float]
) -> None:
    """Make the steps that are left; losses, those of the steps so far, grows with each.

    The state is kept now and then, and when Ctrl-C ends the training, between two steps.

    Raises:
        ModelError: if the loss is no longer finite.
        KeyboardInterrupt: at Ctrl-C.
    """
    saver = _Saver(lambda: state.save(trainer, losses))
    total = trainer.settings.steps
    if trainer.step >= total:  # a training that had been made, and was ended behind it
        state.save(trainer, losses)
        return
    every = config.data.print_freq
    bar = tqdm(
        desc="training", unit="step", total=total, initial=trainer.step, smoothing=SMOOTHING, leave=False,
        disable=True if every else None,
    )  # fmt: skip
    with bar, _interrupts() as interrupted:
        for step, batch in images.batches(config, trainer.step, total):
            trainer.step = step
            try:
                losses.append(trainer.learn(batch.images, batch.labels))
            except DivergedError as error:
                raise _diverged(error, saver, state) from error
            recent = losses[-20:]
            mean = sum(recent) / len(recent)
            bar.set_postfix_str(f"loss {mean:.4g}", refresh=False)
            bar.update(trainer.step - bar.n)
            if every and (trainer.step % every == 0 or trainer.step == total):
                LOG.info("training: step %d of %d, loss %.4g", trainer.step, total, mean)
            if interrupted():
                saver.save(trainer.step)
                raise KeyboardInterrupt
            if saver.is_due() and trainer.is_finite():
                saver.save(trainer.step)
    trainer.step = total
    saver.save(total)


class _Saver:
    """Saves from time to time.

    Attributes:
        step: the last one that was saved; None for none.
    """

    def __init__(self, save: Callable[[], None]) -> None:
        self._save = save
        self._next = time.monotonic() + SAVE_SECONDS
        self.step: int | None = None

    def is_due(self) -> bool:
        return time.monotonic() >= self._next

    def save(self, step: int) -> None:
        start = time.monotonic()
        self._save()
        now = time.monotonic()
        self._next = now + max(SAVE_SECONDS, (now - start) / SAVE_SHARE)
        self.step = step


def _diverged(error: DivergedError, saver: _Saver, state: TrainingState) -> ModelError:
    kept = "" if saver.step is None else f"; the state of step {saver.step} is in {state.path}"
    rates = ", ".join(f"--{name.replace('_', '-')} {rate:g}" for name, rate in state.rates.items())
    return ModelError(f"training: {error}; lower the rates, which were {rates}{kept}")


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Inside, the first Ctrl-C only makes the function that is given true; a second one interrupts."""
    if threading.current_thread() is not threading.main_thread():  # only that one handles signals
        yield lambda: False
        return
    found: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if found:
            raise KeyboardInterrupt
        found.append(number)
        LOG.info("interrupted: ending behind this step")

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(found)
    finally:
        signal.signal(signal.SIGINT, before)
