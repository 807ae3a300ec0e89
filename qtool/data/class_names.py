"""The file that says which class a folder of images stands for."""

from pathlib import Path

from qtool.data.kinds import readable
from qtool.errors import DataError


def read_classes(path: Path) -> dict[str, int]:
    """Read a classes file: from the name of a folder to the number of its class, 0 or more.

    Each line is `index folder name...`, or `folder`, or `folder name...`; in the last two the
    class is the number of the line, from 0, blank lines not counted. The first line tells which.

    Raises:
        DataError: if the file cannot be read, is empty, or mixes the forms or repeats a folder.
    """
    with readable(path):
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}: is not a text file; it needs lines such as '0 n01440764 tench'"
            ) from error
    lines = [(number, line.split()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise DataError(f"{path}: is empty; it needs lines such as '0 n01440764 tench'")
    indexed = _has_index(lines[0][1])
    classes: dict[str, int] = {}
    for position, (number, words) in enumerate(lines):
        if _has_index(words) != indexed:
            form = "'index folder name'" if indexed else "'folder name'"
            raise DataError(
                f"{path}:{number}: {' '.join(words)!r} is not of the form {form} of the first line"
            )
        folder, index = (words[1], int(words[0])) if indexed else (words[0], position)
        if folder in classes:
            raise DataError(f"{path}:{number}: folder {folder!r} is already class {classes[folder]}")
        classes[folder] = index
    return classes


def _has_index(words: list[str]) -> bool:
    """Whether a line starts with a class number; a number alone is the name of a folder."""
    return len(words) > 1 and words[0].isascii() and words[0].isdigit()
