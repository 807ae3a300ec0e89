"""Each of Distiller's known defects has a row in the documentation and a test that names it.

The ids are those of docs/distiller.md: D for wrong results, E for silence and bad messages.
"""

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
IDS = [f"D{n}" for n in range(1, 22)] + [f"E{n}" for n in range(1, 14)]


@pytest.fixture(scope="module")
def rows() -> list[list[str]]:
    """The cells of the table, without its head."""
    text = (TESTS.parent / "docs" / "distiller.md").read_text(encoding="utf-8")
    lines = [line.strip() for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:]]


@pytest.fixture(scope="module")
def sources() -> str:
    """The text of all tests but this one."""
    files = [path for path in TESTS.rglob("test_*.py") if path != Path(__file__)]
    return "\n".join(path.read_text(encoding="utf-8") for path in files)


@pytest.mark.parametrize("defect", IDS)
def test_a_defect_has_a_row_and_a_test(defect, rows, sources):
    assert defect in [row[0] for row in rows]
    # In the name of a test, or in its docstring or a comment.
    named = re.search(rf"def test_{defect.lower()}_", sources)
    mentioned = re.search(rf'(?:"""|# |[(, ]){defect}\b(?=[:.,) ])', sources)
    assert named or mentioned


def test_a_row_has_a_known_id_or_none(rows):
    assert {row[0] for row in rows} <= {*IDS, ""}


def test_every_row_says_what_both_do(rows):
    assert len(rows) > len(IDS)
    for row in rows:
        assert len(row) == 4, row
        assert all(row[1:3]), row
