"""What can go wrong that a user can fix: every such error is a QtoolError.

The command line turns these, in one place, into one message and exit code 1. Anything else
that escapes is a bug in qtool. Messages read `where: what was found; what would be right`.
"""

import difflib
from collections.abc import Iterable


class QtoolError(Exception):
    """A problem that the user can fix; its text is one line, or one line per problem."""


class ConfigError(QtoolError):
    """A setting, on the command line or in a YAML file, that cannot be honoured."""


class DataError(QtoolError):
    """Images or labels that are missing, unreadable, or do not fit the model."""


class ModelError(QtoolError):
    """A network or checkpoint that cannot be built, loaded or traced."""


class StatsError(QtoolError):
    """Activation statistics that are missing, malformed, or of another network."""


class OutputError(QtoolError):
    """A result that cannot be written."""


class ProcessEnded(QtoolError):
    """Another process of the run has ended, so that this one cannot go on."""


class ShareError(QtoolError):
    """What went wrong in the share of one process, which the others do not know."""


class WorkerError(QtoolError):
    """Workers that do trials die again and again."""


def nearest(name: str, candidates: Iterable[str], count: int = 3) -> str:
    """The candidates spelled most like name, as `; did you mean 'a' or 'b'?`, or nothing.

    Example:
        >>> nearest("conv_1", ["conv1", "fc"])
        "; did you mean 'conv1'?"
    """
    matches = difflib.get_close_matches(name, list(candidates), n=count, cutoff=0.5)
    return f"; did you mean {' or '.join(repr(m) for m in matches)}?" if matches else ""
