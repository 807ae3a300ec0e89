"""Write qtool/data/digits.npz: the handwritten digits of scikit-learn, as they come.

    python scripts/make_digits.py [FILE]

Needs scikit-learn, one of the development extras. The file's bytes depend on its content only.
"""

import io
import sys
import zipfile
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

DIGITS = Path(__file__).parents[1] / "qtool" / "data" / "digits.npz"
# The oldest date that a zip file can hold, rather than the time of writing.
TIMESTAMP = (1980, 1, 1, 0, 0, 0)


def main(path: Path) -> None:
    digits = load_digits()
    arrays = {"images": digits.images.astype(np.uint8), "labels": digits.target.astype(np.int64)}
    partial = path.with_name(path.name + ".partial")
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            buffer = io.BytesIO()
            np.save(buffer, array, allow_pickle=False)
            archive.writestr(
                zipfile.ZipInfo(f"{name}.npy", TIMESTAMP), buffer.getvalue(), zipfile.ZIP_DEFLATED
            )
    partial.replace(path)
    print(f"{path}: {len(arrays['labels'])} images, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else DIGITS)
