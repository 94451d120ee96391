"""Results on disk: one safetensors file that holds numbers, and labels as JSON.

Nothing is ever unpickled or called by name: a file can hold tensors, numbers, text and the
dataclasses that were registered, every field is held against its annotation before an object is
built from it, and reading a hostile file ends in `FileFormatError`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
import types
import typing
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch

from tl_contextmix.errors import FileFormatError, InvalidInput

FORMAT = "tl_contextmix"
FORMAT_VERSION = 2
"""Version 2 added numbers of selected tokens and signed maps; version 1 is read as it is."""
_READ = ("1", "2")
# The labels are a tensor of bytes: safetensors bounds its header, and with it a million labels.
_LABELS = "labels"
# Of all tensors: a byte that changed on the way gives no other number. Older files have none.
CHECKSUM = "crc32"

_CLASSES: dict[str, type] = {}
AnyClass = TypeVar("AnyClass", bound=type)

_SAVE_AGAIN = "Save the result again, or load it with the class that it was saved from."


def storable(cls: AnyClass) -> AnyClass:
    """Registers a dataclass by its name, so that `save` may write it and `load` build it.

    A field that is added to a class later needs a default, or files written before cannot be read.

    Raises:
        InvalidInput: If another class has this name.
    """
    known = _CLASSES.setdefault(cls.__name__, cls)
    if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise InvalidInput(
            f"cannot register {cls.__module__}.{cls.__name__}",
            f"the name of {known.__module__}.{known.__name__}",
            "a name that no other storable class has",
            "Rename one of them: files know classes by name.",
        )
    _CLASSES[cls.__name__] = cls
    return cls


def save(result: object, path: str | Path, *, name: str | None = None) -> Path:
    """Writes an instance of a class that is `storable` to one file and returns the path.

    The file appears, or replaces the one before it, only once it is complete; see `replacing`.

    Raises:
        InvalidInput: If the path is not one of a file in a folder that exists, or the result holds
            something that cannot be stored.
    """
    from safetensors.torch import save_file

    path = Path(path)
    target = Path(os.path.realpath(path))  # a link is written through, not replaced
    if target.is_dir() or not target.parent.is_dir():
        raise InvalidInput(
            f"cannot save {type(result).__name__}",
            str(path),
            "the path of a file in a folder that exists",
            "Make the folder first, and give the file a name.",
        )
    tensors: dict[str, torch.Tensor] = {}
    labels = json.dumps(_pack(result, tensors)).encode()
    tensors[_LABELS] = torch.frombuffer(bytearray(labels), dtype=torch.uint8)
    with replacing(path, name) as part:
        made = {FORMAT: str(FORMAT_VERSION), CHECKSUM: checksum(tensors)}
        save_file(tensors, str(part), metadata=made)
    return path


def checksum(tensors: dict[str, torch.Tensor]) -> str:
    """Returns a checksum over names, types, shapes and bytes of tensors on the CPU."""
    found = 0
    for name, tensor in sorted(tensors.items()):
        found = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode(), found)
        found = zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data, found)
    return f"{found:08x}"


def require_checksum(metadata: dict[str, str], tensors: dict[str, torch.Tensor]) -> None:
    """Raises ValueError unless tensors are those that were written; older files cannot tell."""
    if CHECKSUM in metadata and metadata[CHECKSUM] != checksum(tensors):
        raise ValueError("bytes that are not those that were written: a damaged copy")


@contextmanager
def replacing(path: Path, name: str | None = None) -> Iterator[Path]:
    """Yields where to write a file that appears, or replaces its predecessor, once it is complete.

    It is on the disk by then. A link is written through, not replaced. Until then it is in a folder
    of its own beside it, with what a writer puts there besides (safetensors, a file of a random
    name).

    Args:
        path: The file.
        name: Of that folder, which is emptied first: what a killed process left is not piled up.
            None: a name that no other process uses.
    """
    target = Path(os.path.realpath(path))
    folder = target.with_name(name or f".{uuid.uuid4().hex}.part")
    part = folder / target.name
    try:
        _remove(folder)
        folder.mkdir()
        part.touch()
        mode = part.stat().st_mode  # some versions of safetensors hide the file from everyone else
        yield part
        part.chmod(mode)
        _flush(part)
        part.replace(target)
        with suppress(OSError):  # not every system opens folders
            _flush(target.parent)
    finally:
        with suppress(OSError):
            _remove(folder)


def _remove(path: Path) -> None:
    """Removes a file or a folder, where there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def load(cls: type, path: str | Path) -> Any:
    """Reads back what `save` wrote, a class or one derived from it, onto the CPU.

    Raises:
        FileFormatError: If it is not such a file, of another class, or of a newer version.
    """
    tensors = _read(Path(path))
    try:
        labels = json.loads(bytes(tensors.pop(_LABELS).numpy()))
        result = _unpack(labels, tensors)
    except Exception as error:  # hostile labels can fail in any of the constructors
        raise _unreadable(path, f"labels that cannot be decoded ({_short(error)})") from error
    if not isinstance(result, cls):
        raise _unreadable(path, f"a {type(result).__name__}", f"a {cls.__name__}")
    return result


def _read(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import safe_open

    if not path.is_file():
        raise _unreadable(path, "no file of this name", remedy="Check the path.")
    try:
        with safe_open(str(path), framework="pt") as file:
            made = file.metadata() or {}
            version = made.get(FORMAT)
            # Other tools' files may be large: their tensors are not read.
            names = file.keys() if version in _READ else ()
            tensors = {name: file.get_tensor(name) for name in names}
    except Exception as error:  # safetensors raises its own type, OSError or ValueError
        raise _unreadable(path, f"no safetensors file ({_short(error)})") from error
    if version is None:
        raise _unreadable(path, "a safetensors file of something else")
    if version not in _READ:
        raise _unreadable(
            path,
            f"format version {version[:20]}",
            f"version {' or '.join(_READ)}",
            "Load it with the version of tl_contextmix that wrote it, or a newer one.",
        )
    try:
        require_checksum(made, tensors)
    except ValueError as error:
        raise _unreadable(path, str(error)) from error
    return tensors


def _pack(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Returns a value as JSON; tensors go to ``tensors``, everything with structure gets a tag."""
    if isinstance(value, torch.Tensor):
        name = f"tensor_{len(tensors)}"
        # Two fields may share one tensor, which safetensors refuses: each gets its own copy.
        tensors[name] = value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        return {"tensor": name}
    if isinstance(value, (tuple, list)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_pack(item, tensors) for item in value]}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": {key: _pack(item, tensors) for key, item in value.items()}}
    if type(value) in _CLASSES.values():
        names = field_types(type(value))
        fields = {name: _pack(getattr(value, name), tensors) for name in names}
        return {"class": type(value).__name__, "fields": fields}
    if value is None or isinstance(value, (str, int, float)):
        return value
    raise InvalidInput(
        "the result cannot be saved",
        f"a {type(value).__name__} in it",
        "text, numbers, None, tensors, registered classes; lists, tuples and dictionaries "
        "by name of these",
        "Convert it first.",
    )


def _unpack(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if not isinstance(value, (dict, list)):
        return value
    if isinstance(value, dict) and len(value) == 1:
        ((kind, content),) = value.items()
        if kind == "tensor":
            return tensors[content]
        if kind in ("tuple", "list"):
            items = [_unpack(item, tensors) for item in content]
            return tuple(items) if kind == "tuple" else items
        if kind == "dict":
            return {key: _unpack(item, tensors) for key, item in content.items()}
    if isinstance(value, dict) and value.keys() == {"class", "fields"}:
        return _build(value["class"], value["fields"], tensors)
    raise ValueError(f"unknown structure {_short(value)}")


def _build(name: str, packed: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Any:
    if name not in _CLASSES:
        raise ValueError(f"unknown class {_short(name)}; known are {sorted(_CLASSES)}")
    hints = field_types(_CLASSES[name])
    fields = {key: _unpack(item, tensors) for key, item in packed.items()}
    for key, value in fields.items():
        if key not in hints or not _fits(value, hints[key]):
            raise ValueError(f"{name}.{_short(key)} cannot be a {type(value).__name__} like this")
    made = _CLASSES[name](**fields)
    getattr(made, "_require_whole", lambda: None)()
    return made


@functools.cache
def field_types(cls: type) -> dict[str, Any]:
    """Returns the type of each field of a dataclass."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _fits(value: Any, hint: Any) -> bool:
    """Returns whether a value is what an annotation says, down to the items of containers."""
    kind, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if kind in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in inner)
    if kind is typing.Literal:
        return isinstance(value, str) and value in inner
    if kind is tuple:
        if not isinstance(value, tuple):
            return False
        if inner[-1] is ...:
            return all(_fits(item, inner[0]) for item in value)
        return len(value) == len(inner) and all(map(_fits, value, inner))
    if kind in (list, dict):
        items = value.values() if isinstance(value, dict) else value
        return isinstance(value, kind) and all(_fits(item, inner[-1]) for item in items)
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)


def _short(value: object) -> str:
    text = f"{type(value).__name__}: {value}" if isinstance(value, Exception) else repr(value)
    return text if len(text) <= 300 else f"{text[:300]}..."


def _unreadable(
    path: str | Path, seen: str, expected: str = "", remedy: str = _SAVE_AGAIN
) -> FileFormatError:
    return FileFormatError(
        f"cannot load {path}",
        seen,
        expected or f"a file written by .save() of {FORMAT}, format version {FORMAT_VERSION}",
        remedy,
    )
