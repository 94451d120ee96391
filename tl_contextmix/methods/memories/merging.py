"""The parts of all processes become the result that one process alone would have written."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from tl_contextmix.core.validation import FilePath
from tl_contextmix.errors import InvalidInput, bad
from tl_contextmix.methods.memories.corpus_arguments import COUNTS, require_path
from tl_contextmix.methods.memories.file_lock import alone
from tl_contextmix.methods.memories.run_identity import require_run
from tl_contextmix.methods.memories.store import (
    FORMAT_VERSION,
    MANIFEST,
    Part,
    load_part,
    make_folder,
    read_manifest,
    write_result,
)


def merge_triggers(out: FilePath, *, parts: FilePath | Sequence[FilePath] = ()) -> Path:
    """Puts together what several processes have mined; returns the folder.

    The files are those that one process alone would have written, byte by byte.

    Args:
        out: Folder of the result, and of the parts unless other folders are named.
        parts: Folders of the parts.

    Raises:
        InvalidInput: If parts are missing, unfinished, or of different runs, or the folder holds
            the result of another run.
        FileFormatError: If a file is no part.
    """
    listed = [parts] if isinstance(parts, (str, Path)) else parts
    places = [require_path(part) for part in listed] or [require_path(out)]
    files = sorted(path for place in places for path in place.glob("part-*.safetensors"))
    found = [load_part(path, torch.device("cpu")) for path in files]
    _require_whole(found, places)
    folder = make_folder(out)
    with alone(folder / ".merge.lock"):
        if (folder / MANIFEST).exists():
            require_run(read_manifest(folder)["run"], found[0].run, folder)
        finish(found, folder)
    return folder


def finish(parts: list[Part], folder: Path) -> None:
    """Writes the result of the parts of all processes."""
    parts = sorted(parts, key=lambda part: part.rank)
    tops = dict(parts[0].tops)
    for part in parts[1:]:
        tops = {key: top.merge(part.tops[key]) for key, top in tops.items()}
    counts = sum((part.counts for part in parts), start=Counter())
    whole = hashlib.sha256()
    for index in range(parts[0].shards):
        whole.update(bytes(parts[index % len(parts)].digests[index // len(parts)].tolist()))
    run = parts[0].run
    manifest = {
        "format": FORMAT_VERSION,
        "run": run,
        "neurons": run["options"]["neurons"],
        "corpus": {"digest": whole.hexdigest(), "shards": parts[0].shards},
        "counts": {name: counts[name] for name in COUNTS},
    }
    write_result(folder, tops, manifest)


def _require_whole(parts: list[Part], places: list[Path]) -> None:
    """Raises InvalidInput unless the parts of all processes are there and finished."""
    named = ", ".join(map(str, places))
    if not parts:
        raise _cannot_merge("no part", f"parts of a run in {named}")
    size = parts[0].world_size
    ranks = sorted(part.rank for part in parts)
    if ranks != list(range(size)):
        raise _cannot_merge(f"the parts of processes {ranks}", f"one of each of {size}")
    for part in parts:
        require_run(parts[0].run, part.run, places[0])
        if not part.done or part.shards != parts[0].shards:
            raise _cannot_merge(f"an unfinished part of process {part.rank}", "finished parts")


def _cannot_merge(seen: str, expected: str) -> InvalidInput:
    remedy = "Run the processes that are missing or were stopped again: they go on."
    return bad("the parts cannot be merged", seen, expected, remedy)
