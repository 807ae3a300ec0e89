"""A classes file gives folders their class, in any of three forms."""

import pytest

from qtool.data.class_names import read_classes
from qtool.errors import DataError


@pytest.mark.parametrize(
    ("text", "classes"),
    [
        ("3 n01 great shark\n1 n02 tench\n", {"n01": 3, "n02": 1}),
        ("n02\n\nn01\n", {"n02": 0, "n01": 1}),
        ("n02 tench, Tinca tinca\nn01 shark\n", {"n02": 0, "n01": 1}),
        ("7\n5\n", {"7": 0, "5": 1}),  # folders with numbers for names
        ("\ufeff0 n01 shark", {"n01": 0}),
    ],
)
def test_every_form_is_read(tmp_path, text, classes):
    path = tmp_path / "classes.txt"
    path.write_text(text, encoding="utf-8")
    assert read_classes(path) == classes


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", ": is empty; it needs lines such as '0 n01440764 tench'"),
        (b"\xff\xfe\x80", ": is not a text file; it needs lines such as '0 n01440764 tench'"),
        (b"0 a\nb\n", ":2: 'b' is not of the form 'index folder name' of the first line"),
        (b"a\n\n1 b\n", ":3: '1 b' is not of the form 'folder name' of the first line"),
        (b"0 a\n1 a\n", ":2: folder 'a' is already class 0"),
    ],
)
def test_malformed_file_is_refused(tmp_path, data, message):
    path = tmp_path / "classes.txt"
    path.write_bytes(data)
    with pytest.raises(DataError) as error:
        read_classes(path)
    assert str(error.value) == f"{path}{message}"


def test_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"gone\.txt: no such file or folder"):
        read_classes(tmp_path / "gone.txt")


def test_folder_is_no_classes_file(tmp_path):
    with pytest.raises(DataError, match=r"cannot be read: is a directory"):
        read_classes(tmp_path)
