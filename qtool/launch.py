"""How this process was started: alone, or by torchrun as one of several. Needs no torch."""

import os

from qtool.errors import ConfigError


def launched() -> int:
    """How many processes torchrun has started for this run; 1 without it.

    Raises:
        ConfigError: if its environment variables are not as torchrun sets them.
    """
    text = os.environ.get("WORLD_SIZE", "1")
    wanted = ("RANK", "MASTER_ADDR", "MASTER_PORT")
    if text.isdigit() and (int(text) < 2 or all(name in os.environ for name in wanted)):
        return max(1, int(text))
    raise ConfigError(
        f"WORLD_SIZE={text} in the environment, without the rest of what torchrun sets; "
        "unset it, or start with 'torchrun --nproc-per-node K -m qtool ...'"
    )


def speaks() -> bool:
    """Whether this process is the one that prints: the only one, or the first."""
    return os.environ.get("WORLD_SIZE", "1") in ("0", "1") or os.environ.get("RANK", "0") == "0"
