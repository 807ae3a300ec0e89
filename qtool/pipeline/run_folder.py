"""The folder of a whole run: made at its start, kept when there is something in it to keep."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qtool.config import Config, dump_config
from qtool.pipeline.ranks import ALONE, Ranks
from qtool.run_dir import log_to, make_run_dir, write_text

LOG = logging.getLogger("qtool")

CONFIG_FILE = "config.yaml"


@contextmanager
def run_folder(config: Config, ranks: Ranks = ALONE) -> Iterator[Path]:
    """A new folder with the resolved configuration and a log.

    Only the first process of a run has it; what the others write is gone at their end. A run that ends
    early leaves its folder, and says so, if it has written anything else by then; otherwise it leaves
    none.
    """
    if not ranks.first:
        with tempfile.TemporaryDirectory() as elsewhere:
            yield Path(elsewhere)
        return
    folder = make_run_dir(config.run.out_dir, config.run.name)
    log = folder / f"{folder.name}.log"
    try:
        with log_to(log, LOG):
            write_text(folder / CONFIG_FILE, dump_config(config))
            LOG.info("writing to %s", folder)
            try:
                yield folder
            except BaseException as error:
                LOG.debug("ended by %s: %s", type(error).__name__, error)
                raise
    except BaseException:
        with suppress(OSError):  # the error that ended the run matters more
            _leave(folder, {log.name, CONFIG_FILE})
        raise


def _leave(folder: Path, at_the_start: set[str]) -> None:
    """Remove a folder with only the files of a start in it; say where another one is."""
    files = list(folder.iterdir())
    if {path.name for path in files} - at_the_start:
        LOG.info("ended early; what was written until then is in %s", folder)
        return
    for path in files:
        path.unlink()
    folder.rmdir()
