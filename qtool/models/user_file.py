"""A network that the user's own Python file makes: `path/to/file.py:factory`."""

import contextlib
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from qtool.errors import ModelError, nearest
from qtool.models.blueprint import Blueprint, one_line


def split_user_file(arch: str) -> tuple[Path, str] | None:
    """The file and the function that `file.py:factory` names; None for the name of a known network.

    Raises:
        ModelError: if a file is named without a function.

    Example:
        >>> split_user_file("nets/mine.py:small")[1]
        'small'
    """
    match = re.fullmatch(r"(.*\.py)(?::(\w*))?", arch, re.DOTALL)
    if match is None:
        return None
    if not match[2]:
        raise ModelError(f"{arch}: names no function; give {match[1]}:FUNCTION, which returns the network")
    return Path(match[1]), match[2]


def user_blueprint(path: Path, name: str, input_shape: tuple[int, ...] | None) -> Blueprint:
    """The blueprint of the network that function name of the file at path returns.

    The file is imported at once, the function is called when the network is built. Its input_shape is
    the argument, or else an attribute `input_shape` of the function; failing both it is None.

    Raises:
        ModelError: if the file cannot be imported or has no such function.
    """
    factory = _find_factory(_import_file(path), path, name)
    arch = f"{path}:{name}"

    def build(num_classes: int | None) -> nn.Module:
        return _call_factory(factory, path, name, {} if num_classes is None else {"num_classes": num_classes})

    shape = input_shape or getattr(factory, "input_shape", None)
    return Blueprint(arch, build, shape, None, weights=f"weights of {arch}", resizable=False)


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ModelError(f"{path}: no such file; correct --arch")
    spec = importlib.util.spec_from_file_location(f"qtool_user_{path.stem}", path)
    assert spec is not None and spec.loader is not None, "a .py file always has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look their module up there
    with _errors_of(path, "importing it"):
        spec.loader.exec_module(module)
    return module


def _find_factory(module: ModuleType, path: Path, name: str) -> Callable[..., Any]:
    factory: Callable[..., Any] | None = getattr(module, name, None)
    if factory is not None and callable(factory):
        return factory
    known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
    advice = nearest(name, known) or "; define it, or name another"
    raise ModelError(f"{path}: no function called '{name}'{advice}")


def _call_factory(factory: Callable[..., Any], path: Path, name: str, arguments: dict[str, int]) -> nn.Module:
    given = ", ".join(f"{key}={value}" for key, value in arguments.items())
    with contextlib.suppress(ValueError):  # some builtins have no signature
        try:
            inspect.signature(factory).bind(**arguments)
        except TypeError as error:
            raise ModelError(
                f"{path}: {name}({given}) cannot be called, {error}; correct it there"
            ) from error
    with _errors_of(path, f"{name}({given})"):
        model = factory(**arguments)
    if not isinstance(model, nn.Module):
        raise ModelError(f"{path}: {name}() returned a {type(model).__name__}; it should return an nn.Module")
    return model


@contextlib.contextmanager
def _errors_of(path: Path, action: str) -> Iterator[None]:
    """Report what the user's code raises, with the line in the user's file; it may import its neighbours."""
    folder = str(path.absolute().parent)
    sys.path.insert(0, folder)
    try:
        yield
    except (Exception, SystemExit) as error:
        raise ModelError(
            f"{path}{_line_in(path, error)}: {action} raised {one_line(error)}; correct it there"
        ) from error
    finally:
        if folder in sys.path:
            sys.path.remove(folder)


def _line_in(path: Path, error: BaseException) -> str:
    places = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError):
        places.append((error.filename or "", error.lineno))
    lines = [line for file, line in places if Path(file).resolve() == path.resolve()]
    return f":{lines[-1]}" if lines else ""
