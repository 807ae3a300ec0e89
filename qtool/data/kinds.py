"""What DATA is, told by its content, and where its parts lie on disk; needs no torch."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qtool.errors import ConfigError, DataError, nearest

KINDS = ("folder", "cifar10", "cifar100", "mnist", "fashion-mnist", "npz", "digits")
ALIASES = {"imagenet": "folder"}

# Where torchvision keeps a dataset, below the root that it is given.
TORCHVISION_FOLDERS = {
    "cifar10": "cifar-10-batches-py",
    "cifar100": "cifar-100-python",
    "mnist": "MNIST/raw",
    "fashion-mnist": "FashionMNIST/raw",
}
# The parts of an image folder in which ImageNet and its likes come.
FOLDER_PARTS = ("train", "val", "test", "calibration")


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn what the file system refuses inside the block into a one-line DataError about path."""
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(f"{error.filename or path}: no such file or folder") from error
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise DataError(f"{error.filename or path}: cannot be read: {reason}") from error


def dataset_kind(path: Path | None, kind: str | None = None) -> str:
    """The kind of dataset, one of KINDS: kind where it is given, otherwise told by the content of path.

    Args:
        path: what the user called DATA; None stands for the built-in digits.
        kind: one of KINDS or ALIASES, or None.

    Raises:
        ConfigError: if kind is not known.
        DataError: if path does not exist, is no dataset, or holds several.

    Example:
        >>> dataset_kind(None), dataset_kind(None, "imagenet")
        ('digits', 'folder')
    """
    if kind is not None:
        kind = ALIASES.get(kind, kind)
        if kind not in KINDS:
            raise ConfigError(
                f"unknown kind of dataset {kind!r}{nearest(kind, KINDS)}; known: {', '.join(KINDS)}"
            )
        return kind
    if path is None:
        return "digits"
    with readable(path):
        path.stat()
        return _kind_of_folder(path) if path.is_dir() else _kind_of_file(path)


def _kind_of_file(path: Path) -> str:
    if path.suffix.lower() == ".npz":
        return "npz"
    raise DataError(
        f"{path}: is a file; DATA is a folder of class folders, a torchvision root, or an .npz file"
    )


def _kind_of_folder(path: Path) -> str:
    found = [kind for kind in TORCHVISION_FOLDERS if torchvision_root(path, kind)]
    if len(found) > 1:
        raise DataError(f"{path}: holds {' and '.join(found)}; name the folder of one of them")
    return found[0] if found else "folder"


def torchvision_root(path: Path, kind: str) -> Path | None:
    """The root to give to torchvision, when path is that root or a folder of the dataset below it."""
    below = Path(TORCHVISION_FOLDERS[kind])
    path = path.absolute()
    for root in (path, *list(path.parents)[: len(below.parts)]):
        inside = (root, *(root.joinpath(*below.parts[: i + 1]) for i in range(len(below.parts))))
        if path in inside and (root / below).is_dir():
            return root
    return None


def folder_parts(root: Path) -> list[str]:
    """Those of FOLDER_PARTS that root is split into; empty when root holds the class folders itself.

    A class may be called "test": a part differs from it in that at least one of them has subfolders.
    """
    parts = [name for name in FOLDER_PARTS if (root / name).is_dir()]
    split = any(child.is_dir() for name in parts for child in (root / name).iterdir())
    return parts if split else []


def folder_part(root: Path, split: str) -> Path:
    """The folder of root that holds the class folders of split: "evaluation", "calibration" or a name.

    Raises:
        DataError: if root has no such part.
    """
    parts = folder_parts(root)
    wanted = {"evaluation": ("val", "test"), "calibration": ("calibration", "train")}.get(split, (split,))
    for name in wanted:
        if name in parts or (name == split and (root / name).is_dir()):
            return root / name
    if split == "evaluation" and not parts:
        return root
    there = f"it has {', '.join(name + '/' for name in parts)}" if parts else "it is not split into parts"
    raise DataError(f"{root}: no {' or '.join(name + '/' for name in wanted)} for {split}; {there}")


def has_training_split(path: Path | None, kind: str | None = None) -> bool:
    """Whether the dataset brings training images of its own.

    Raises:
        ConfigError, DataError: as dataset_kind does.
    """
    kind = dataset_kind(path, kind)
    if kind != "folder" or path is None:
        return has_calibration_split(path, kind)
    with readable(path):
        return path.is_dir() and "train" in folder_parts(path)


def has_calibration_split(path: Path | None, kind: str | None = None) -> bool:
    """Whether the dataset brings calibration images of its own, apart from those of the evaluation.

    Raises:
        ConfigError, DataError: as dataset_kind does.
    """
    kind = dataset_kind(path, kind)
    if kind == "digits":
        return True
    if path is None or kind == "npz":
        return False
    with readable(path):
        if kind == "folder":
            return bool({"calibration", "train"} & set(folder_parts(path))) if path.is_dir() else False
        return torchvision_root(path, kind) is not None
