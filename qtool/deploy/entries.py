"""What qtool writes into the files of other programs, to know them again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qtool.errors import ModelError


def check_entry(
    path: Path, entry: str, info: Any, file_format: str, version: int, remedy: str
) -> dict[str, Any]:
    """What an entry holds, once it is of this format and version.

    Args:
        path: of the file.
        entry: what the entry is called, as errors name it.
        info: what was read from it.
        file_format, version: what is wanted.
        remedy: what to do about an entry that is not qtool's.

    Raises:
        ModelError: if it is of another format or version.
    """
    if not isinstance(info, dict) or info.get("format") != file_format:
        raise ModelError(f"{path}: its entry {entry} is not qtool's; {remedy}")
    if info.get("version") != version:
        raise ModelError(
            f"{path}: written by another version of qtool: format version {info.get('version')}, this one "
            f"reads {version}"
        )
    return info
