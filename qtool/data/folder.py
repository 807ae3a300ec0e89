"""Images in class folders, as torchvision's ImageFolder and ImageNet have them."""

import os
import warnings
from pathlib import Path
from typing import NoReturn

from PIL import Image, UnidentifiedImageError
from torchvision.datasets.folder import IMG_EXTENSIONS

from qtool.data.class_names import read_classes
from qtool.data.image_dataset import ImageDataset, ReadOptions
from qtool.data.kinds import folder_part, readable
from qtool.errors import DataError


class FolderDataset(ImageDataset):
    """The images below one folder per class, in the order of ImageFolder: by class, then by path.

    Attributes:
        classes: the file that gave folders their class; None if the sorted folder names did.
    """

    def __init__(
        self,
        name: str,
        split: str,
        images: list[tuple[Path, int]],
        num_classes: int | None,
        options: ReadOptions,
    ) -> None:
        super().__init__(name, split, [label for _, label in images], num_classes, options)
        self.classes = options.classes
        self._paths = [str(path) for path, _ in images]

    def image(self, index: int) -> Image.Image:
        return read_image(Path(self._paths[index]), self._mode)

    def path_of(self, index: int) -> str:
        return self._paths[index]

    def identity(self, index: int) -> str:
        return str(Path(self._paths[index]).resolve())


def open_folder(root: Path, split: str, options: ReadOptions) -> FolderDataset:
    """Find the images of one part of root, sorted by path.

    The class of a folder is its place among the sorted folder names, or what the classes file says.
    Names that start with a dot are passed over.

    Args:
        root: holds the class folders, or train/, val/, test/, calibration/ that do.
        split: "evaluation" (val/ or test/ if there is one, otherwise root), "calibration"
            (calibration/ or train/), or the name of a subfolder.
        options: how to read the images.

    Raises:
        DataError: if there is no such part, no class folder, no image, or a folder without a class.
    """
    with readable(root):
        if not root.is_dir():
            root.stat()
            raise DataError(f"{root}: is a file; an image folder has one subfolder per class")
        part = folder_part(root, split)
        folders = sorted(entry for entry in part.iterdir() if _is_visible(entry) and entry.is_dir())
        classes = _classes_of(folders, options.classes)
        images = [(path, classes[folder.name]) for folder in folders for path in images_below(folder)]
    if not images:
        found = f"{len(folders)} folders, but no image in them" if folders else "no class folders"
        raise DataError(f"{part}: {found}; looked for CLASS/NAME with {', '.join(IMG_EXTENSIONS)}")
    name = root.resolve().name + (f" {part.name}" if part != root else "")
    return FolderDataset(name, split, images, None if options.classes else len(folders), options)


def images_below(folder: Path) -> list[Path]:
    """The files below folder, at any depth, whose extension is that of an image, in ImageFolder's order.

    Raises:
        OSError: if a folder cannot be listed.
    """
    found: list[Path] = []
    for parent, _, names in sorted(os.walk(folder, onerror=_raise, followlinks=True)):
        paths = [Path(parent, name) for name in sorted(names)]
        found += [path for path in paths if path.suffix.lower() in IMG_EXTENSIONS and _is_visible(path)]
    return found


def read_image(path: Path, mode: str) -> Image.Image:
    """Read a whole image file and convert it to mode, "RGB" or "L".

    Raises:
        DataError: if the file is not an image, is truncated, or is suspiciously large.
    """
    try:
        if not path.is_file():  # opening a named pipe would wait for ever
            raise FileNotFoundError("no such file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks about EXIF or palettes, in which the pixels are fine
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                return image.convert(mode)
    # Pillow's decoders raise SyntaxError, struct.error, zlib.error and many more on a damaged file.
    except Exception as error:
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else _first_line(error)
        raise DataError(f"{path}: cannot be read: {reason}") from error


def _classes_of(folders: list[Path], classes: Path | None) -> dict[str, int]:
    if classes is None:
        return {folder.name: index for index, folder in enumerate(folders)}
    known = read_classes(classes)
    unknown = [folder for folder in folders if folder.name not in known]
    if unknown:
        others = f" (and {len(unknown) - 1} more folders)" if len(unknown) > 1 else ""
        raise DataError(
            f"{unknown[0]}: folder {unknown[0].name!r}{others} is not in {classes}; add its class"
        )
    return known


def _is_visible(path: Path) -> bool:
    return not path.name.startswith(".")


def _raise(error: OSError) -> NoReturn:
    raise error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
