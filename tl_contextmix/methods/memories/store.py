"""What mining leaves on disk: parts while it goes on, a Parquet table and a manifest at the end.

A file appears only once it is complete: it is written under another name, flushed to the disk and
moved. The manifest comes last, so that where there is one there is a result.
"""

from __future__ import annotations

import errno
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock, Timeout
from jaxtyping import UInt8
from torch import Tensor

from tl_contextmix.errors import FileFormatError, InvalidInput
from tl_contextmix.methods.memories.corpus_arguments import (
    check_manifest,
    check_part,
    check_table,
    require_path,
)
from tl_contextmix.methods.memories.topk import TopK, on_host, unpack_places, unpack_tokens
from tl_contextmix.results.storage import CHECKSUM, checksum, replacing, require_checksum

if TYPE_CHECKING:
    import pandas

_COLUMNS = (
    *("tail", "layer", "neuron", "rank", "value"),
    *("document", "position", "token", "next_token", "hash"),
)
TABLE, MANIFEST = "triggers.parquet", "manifest.json"
FORMAT_VERSION = 2
_READABLE = {1: list(_COLUMNS[:-1]), 2: list(_COLUMNS)}
"""Columns of the table by version of the format; the first had no hashes of documents."""
_FACTS = ("run", "rank", "world_size", "done", "shards")
_SIGNS = {"negative": -1, "+-": -1, "-+": -1}
_ENTRY = ("values", "places", "tokens", "hashes", "keys")


@dataclass
class Part:
    """What one process has mined so far.

    Attributes:
        run: What the result depends on besides the corpus: model, tokenizer, options.
        rank: Number of the process.
        world_size: How many there are.
        tops: The highest values by layer and tail.
        digests: Hash of every shard it has read, in order.
        counts: What there was in them.
        done: Whether the corpus is at its end.
        shards: How many shards the corpus has, where that is known.
    """

    run: dict[str, Any]
    rank: int
    world_size: int
    tops: dict[tuple[int, str], TopK]
    digests: UInt8[Tensor, "shard byte"]
    counts: Counter[str] = field(default_factory=Counter)
    done: bool = False
    shards: int = 0

    def take(self, digest: bytes) -> None:
        """Notes that a shard was read."""
        row = torch.frombuffer(bytearray(digest), dtype=torch.uint8)[None]
        self.digests = torch.cat([self.digests, row])


def part_path(folder: Path, rank: int, world_size: int) -> Path:
    """Returns where a process keeps its part."""
    return folder / f"part-{rank:05d}-of-{world_size:05d}.safetensors"


def save_part(part: Part, folder: Path) -> None:
    """Writes what one process has mined so far.

    Raises:
        InvalidInput: If it cannot be written.
    """
    from safetensors.torch import save_file

    tensors = {"digests": part.digests}
    for (layer, tail), top in on_host(part.tops).items():
        for name, entry in zip(_ENTRY, top.columns(), strict=False):
            tensors[f"{layer} {tail} {name}"] = entry.contiguous()
    facts = {name: getattr(part, name) for name in _FACTS}
    facts |= {"format": FORMAT_VERSION, "counts": dict(part.counts)}
    metadata = {"part": json.dumps(facts, sort_keys=True), CHECKSUM: checksum(tensors)}
    path = part_path(folder, part.rank, part.world_size)
    _write(path, lambda place: save_file(tensors, str(place), metadata=metadata))


def load_part(path: Path, device: torch.device) -> Part:
    """Reads a part back."""
    from safetensors import safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            facts = json.loads(metadata["part"])
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
        if facts["format"] != FORMAT_VERSION:
            raise ValueError(f"format version {facts['format']}")
        require_checksum(metadata, tensors)
        check_part(facts, tensors)
        digests = tensors.pop("digests")
        columns: dict[tuple[int, str], dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            layer, tail, name = key.split(" ")
            columns.setdefault((int(layer), tail), {})[name] = tensor.to(device)
        tops = {key: TopK(**columns[key]) for key in sorted(columns)}
        known = {name: facts[name] for name in _FACTS}
        return Part(tops=tops, digests=digests, counts=Counter(facts["counts"]), **known)
    except Exception as error:  # a hostile file can fail anywhere
        raise unreadable(path, error) from error


def write_result(folder: Path, tops: Mapping[tuple[int, str], TopK], manifest: dict) -> None:
    """Writes the table and then the manifest.

    Raises:
        InvalidInput: If they cannot be written.
    """
    _write(folder / TABLE, lambda place: _write_table(place, tops, manifest["neurons"]))
    text = json.dumps(manifest, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    _write(folder / MANIFEST, lambda place: place.write_text(text, encoding="utf-8"))


def read_manifest(folder: Path) -> dict[str, Any]:
    """Returns the manifest of a finished run."""
    path = folder / MANIFEST
    if not path.is_file():
        parts = len(list(folder.glob("part-*.safetensors"))) if folder.is_dir() else 0
        remedy = "Run the same mining again to finish it, or merge the parts of all processes."
        seen = f"no such file, and {parts} parts of a run in its folder"
        raise unreadable(path, seen, remedy if parts else "")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] not in _READABLE:
            raise ValueError(f"format version {found['format']}")
        return check_manifest(found)
    except Exception as error:  # a hostile file can fail anywhere
        raise unreadable(path, error) from error


def read_table(
    folder: Path, manifest: dict[str, Any], conditions: list[tuple[str, str, Any]]
) -> pandas.DataFrame:
    """Returns the rows of the table that fulfil some conditions."""
    import pyarrow.parquet

    path = folder / TABLE
    try:
        schema = pyarrow.parquet.read_schema(path)
        if schema.names != _READABLE[manifest["format"]]:
            raise ValueError(f"columns {schema.names}")
        result = pyarrow.parquet.read_table(path, filters=conditions or None).to_pandas()
        check_table(result, manifest)
        return result
    except Exception as error:  # a hostile file can fail anywhere
        raise unreadable(path, error) from error


def _write_table(
    path: Path, tops: Mapping[tuple[int, str], TopK], neurons: Mapping[str, list[int]]
) -> None:
    import pyarrow
    import pyarrow.parquet

    writer, tops = None, on_host(tops)
    with ExitStack() as stack:
        for layer, keys in groupby(sorted(tops), lambda key: key[0]):
            rows = [_rows(*key, tops[key], neurons[str(layer)]) for key in keys]
            table = pyarrow.concat_tables(rows)
            if writer is None:
                parquet = pyarrow.parquet.ParquetWriter(path, table.schema, compression="zstd")
                writer = stack.enter_context(parquet)
            writer.write_table(table, row_group_size=max(1, table.num_rows))


def _rows(layer: int, tail: str, top: TopK, neurons: list[int]) -> Any:
    import pyarrow

    values = top.values
    column, rank = (values > -torch.inf).nonzero(as_tuple=True)
    documents, positions = unpack_places(top.places[column, rank])
    tokens, next_tokens = unpack_tokens(top.tokens[column, rank])
    chosen = torch.tensor(neurons)[column]
    numbers = {
        "layer": torch.full_like(column, layer).int(),
        "neuron": chosen.int(),
        "rank": rank.int(),
        "value": values[column, rank] * _SIGNS.get(tail, 1),
        "document": documents,
        "position": positions.int(),
        "token": tokens.int(),
        "next_token": next_tokens.int(),
        "hash": top.hashes[column, rank],
    }
    arrays = {name: pyarrow.array(tensor.numpy()) for name, tensor in numbers.items()}
    names = pyarrow.array([tail] * len(column), type=pyarrow.string())
    return pyarrow.table({"tail": names, **arrays})


def _write(path: Path, write: Callable[[Path], object]) -> None:
    try:
        with replacing(path, f".{path.name}.part") as part:
            write(part)
    except Exception as error:  # safetensors and pyarrow have types of their own
        raise InvalidInput(
            f"{path} cannot be written",
            f"{type(error).__name__}: {error}"[:300],
            "a folder with room and the right to write",
            "Free some space and run the same command again: it goes on from the last "
            "checkpoint, which is whole.",
        ) from error


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Holds a lock file, so that one process at a time writes a part, or a scan.

    The system releases it when the process ends, however it ends. It is taken first of all, so that
    a folder that cannot be written to is found out before a forward pass, not after the last one.
    It is gone afterwards.
    """
    lock = FileLock(path, timeout=0.2)
    try:
        lock.acquire(poll_interval=0.05)
    except (Timeout, OSError) as error:
        if getattr(error, "errno", None) not in (errno.ENOLCK, errno.EOPNOTSUPP):
            seen, expected = str(error), "a folder with the right to write"
            if isinstance(error, Timeout):
                seen, expected = "another process at it", "one process for each part"
            raise InvalidInput(
                f"{path.parent} cannot be written to",
                seen,
                expected,
                "Wait for the other process, or choose another folder.",
            ) from error
        # A file system without locks: the user keeps the processes apart.
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)
        lock.release()


def unreadable(path: Path, seen: str | Exception, remedy: str = "") -> FileFormatError:
    """Returns the error for a file that is none of `mine_triggers`, or of another version."""
    if isinstance(seen, Exception):
        seen = f"{type(seen).__name__}: {seen}"[:300]
    expected = f"a file of mine_triggers, format version {FORMAT_VERSION}"
    remedy = remedy or "Pass the folder that mine_triggers wrote."
    return FileFormatError(f"cannot read {path}", seen, expected, remedy)


def make_folder(out: str | Path) -> Path:
    """Returns the folder for a result, made if it is not there."""
    folder = require_path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidInput(
            "the folder for the result cannot be made",
            str(error),
            "a path where a folder is or can be",
            "Choose another one.",
        ) from error
    return folder


def not_mined(what: str, seen: object, expected: str) -> InvalidInput:
    """Returns the error for something that is not among the triggers."""
    return InvalidInput(
        f"there is no such {what} among these triggers",
        repr(seen),
        expected,
        "Ask for something that was mined, or mine again.",
    )
