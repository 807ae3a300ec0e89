"""Imports point one way: each part of qtool knows only the parts named beside it here."""

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "qtool"

NUMERICS = {"errors", "numerics"}
GRAPH = NUMERICS | {"observers", "graph"}
QUANTIZERS = GRAPH | {"quantizers"}
SEARCH = QUANTIZERS | {"algorithms", "deploy", "search"}
PIPELINE = SEARCH | {"data", "models", "report", "config", "run_dir", "launch", "memory", "pipeline"}
MAY_IMPORT = {
    "errors": set(),
    "numerics": NUMERICS,
    "observers": NUMERICS,
    "graph": GRAPH,
    "quantizers": QUANTIZERS,
    "algorithms": QUANTIZERS,
    "deploy": QUANTIZERS,
    "search": SEARCH,
    "data": NUMERICS,
    "models": NUMERICS,
    "report": NUMERICS,
    "config": NUMERICS,
    "run_dir": {"errors"},
    "launch": {"errors"},
    "memory": set(),
    "pipeline": PIPELINE,
    "cli": PIPELINE,
    "__main__": {"cli"},
    "__init__": set(),
}


def imported_parts(source: str, package: str) -> Iterator[str]:
    """The parts of qtool that source imports anywhere, functions included; package is where it stands."""
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            names = [".".join([*above, *filter(None, [node.module]), alias.name]) for alias in node.names]
        yield from (name.split(".")[1] for name in names if name.startswith("qtool."))


def test_imports_point_one_way():
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        inside = path.relative_to(PACKAGE.parent).with_suffix("").parts  # qtool, part, ...
        part = inside[1]
        assert part in MAY_IMPORT, f"{part}: say above what this new part of qtool may import"
        imported = set(imported_parts(path.read_text(encoding="utf-8"), ".".join(inside[:-1])))
        others = (imported & MAY_IMPORT.keys()) - {part}  # the rest are names, such as __version__
        wrong += [f"{'/'.join(inside)} imports {other}" for other in others - MAY_IMPORT[part]]
    assert not wrong


def test_every_form_of_import_counts():
    source = "import qtool.a\nfrom qtool import b\nfrom .. import c\ndef f():\n    from ..d.x import y"
    assert sorted(imported_parts(source, "qtool.numerics")) == ["a", "b", "c", "d"]
