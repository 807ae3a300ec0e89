"""Write the JSON Schemas of qtool's YAML files into the package, from the declarations of the options.

python scripts/write_schemas.py            rewrite qtool/config/*.json
python scripts/write_schemas.py --check    exit with 1 if one is out of date
"""

import argparse
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "qtool" / "config"


def main() -> None:
    """Rewrite the schemas, or only check them."""
    parser = argparse.ArgumentParser(description="Write the JSON Schemas of qtool's YAML files.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if out of date")
    check = parser.parse_args().check

    from qtool.config.schema import SCHEMAS, schema_text

    for name, kind in SCHEMAS.items():
        path = FOLDER / kind.file
        old = path.read_text(encoding="utf-8") if path.exists() else ""
        if check and old != schema_text(name):
            raise SystemExit(f"{path.name}: the schema is out of date; run 'make docs'")
        if not check:
            path.write_text(schema_text(name), encoding="utf-8")


if __name__ == "__main__":
    main()
