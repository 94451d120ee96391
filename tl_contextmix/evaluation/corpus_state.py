"""What has been found over a corpus so far: kept in a file, and put together from several."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tl_contextmix.core.statistics import ExactMoments, t_quantile
from tl_contextmix.core.validation import FilePath, checked
from tl_contextmix.errors import FileFormatError, InvalidInput
from tl_contextmix.methods.memories.mining import cannot_merge, require_run
from tl_contextmix.methods.memories.store import alone
from tl_contextmix.results import CurvePoint, LayerCurves
from tl_contextmix.results.curves import EVERY
from tl_contextmix.results.labels import Provenance
from tl_contextmix.results.storage import replacing

Key = tuple[str, str, int]
"""Metric, category and layer."""


@dataclass
class State:
    """What has been found so far.

    Attributes:
        run: Where the figures of each model come from.
        most: How many figures there may be.
        rank: Number of the process.
        world_size: How many there are.
        moments: Moments of each figure over sentences.
        read: Documents read, also those of other processes.
        finished: Whether that was all.
    """

    run: dict[str, dict[str, Any]]
    most: int
    rank: int = 0
    world_size: int = 1
    moments: dict[Key, ExactMoments] = field(default_factory=dict)
    read: int = 0
    finished: bool = False

    def add(self, found: Iterator[tuple[Key, list[float]]], model: str) -> None:
        """Takes in the figures of a batch."""
        for (metric, category, layer), numbers in found:
            if model:
                category = model if category == EVERY else f"{model}: {category}"
            if numbers:
                key = metric, category, layer
                known = self.moments.get(key, ExactMoments())
                self.moments[key] = known.merge(ExactMoments.of(numbers))
        if len(self.moments) > self.most:
            raise InvalidInput(
                "there are too many figures",
                f"{len(self.moments)} metrics, categories and layers",
                f"at most {self.most}",
                "Group by another column, or raise most=.",
            )

    def take(self, other: State) -> None:
        """Takes in what another process found."""
        for key, moments in other.moments.items():
            self.moments[key] = self.moments.get(key, ExactMoments()).merge(moments)

    def curves(self) -> LayerCurves:
        """Returns every figure with its interval."""
        points = []
        for metric, category, layer in sorted(self.moments):
            one = self.moments[metric, category, layer]
            mean, n = one.mean(), one.count
            wide = t_quantile(n - 1) * one.standard_error()
            points.append(CurvePoint(metric, category, layer, mean, mean - wide, mean + wide, n))
        share = f" (share {self.rank + 1} of {self.world_size})" if self.world_size > 1 else ""
        origin = next(iter(self.run.values()))
        return LayerCurves(
            points=tuple(points),
            title="Over a corpus",
            caption=f"Means over the sentences of {self.read:,} documents{share}, with 95 % "
            "intervals (Student's t).",
            provenance=Provenance(**{**origin, "processing": tuple(origin["processing"])}),
        )

    def save(self, path: Path, digest: str) -> None:
        """Writes the state to a file."""
        kept = {
            "run": self.run,
            "share": [self.rank, self.world_size],
            "digest": digest,
            "read": self.read,
            "finished": self.finished,
            "moments": [[*key, *vars(self.moments[key]).values()] for key in sorted(self.moments)],
        }
        with replacing(path, f".{path.name}.part") as part:
            part.write_text(json.dumps(kept), encoding="utf-8")

    def resume(self, path: Path) -> str:
        """Goes on from a file, and returns the hash of what was read."""
        before, digest = load_state(path)
        if (before.rank, before.world_size) != (self.rank, self.world_size):
            raise InvalidInput(
                f"{path} holds another share of the corpus",
                f"rank={self.rank} of world_size={self.world_size}",
                f"rank={before.rank} of world_size={before.world_size}",
                "Pass the same again, or choose another file.",
            )
        require_run(before.run, json.loads(json.dumps(self.run)), path)
        self.moments, self.read, self.finished = before.moments, before.read, before.finished
        return digest


def load_state(path: Path) -> tuple[State, str]:
    """Returns what a file holds, and the hash of what was read for it."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        rank, world_size = kept["share"]
        moments = {
            (metric, category, layer): ExactMoments(int(n), int(total), int(squares), float(rest))
            for metric, category, layer, n, total, squares, rest in kept["moments"]
        }
        state = State(kept["run"], len(moments), rank, world_size, moments)
        state.read, state.finished = kept["read"], kept["finished"]
        return state, kept["digest"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FileFormatError(
            f"{path} holds no figures over a corpus",
            repr(error)[:200],
            "a file that over_corpus wrote",
            "Choose another file.",
        ) from error


@checked
def merge_figures(parts: Sequence[FilePath], *, out: FilePath) -> LayerCurves:
    """Puts together what several processes have found with `over_corpus`.

    The figures and the file are those of one process alone, bit by bit.

    Args:
        parts: The file of each process, its ``out``.
        out: File for all of it.

    Raises:
        InvalidInput: If parts are missing, unfinished, or of different runs or corpora.
        FileFormatError: If a file holds something else.
    """
    paths = [Path(part) for part in parts]
    found = sorted(map(load_state, paths), key=lambda one: one[0].rank)
    if not found:
        raise cannot_merge("no part", "the file of each process")
    (first, digest), size = found[0], found[0][0].world_size
    ranks = [state.rank for state, _ in found]
    if ranks != list(range(size)) or {state.world_size for state, _ in found} != {size}:
        raise cannot_merge(f"the parts of processes {ranks}", f"one of each of {size}")
    whole = State(first.run, 0, read=first.read, finished=True)
    for state, read in found:
        require_run(first.run, state.run, paths[0])
        if not state.finished:
            raise cannot_merge(f"an unfinished part of process {state.rank}", "finished parts")
        if read != digest:
            seen = f"processes 0 and {state.rank} have read different documents"
            raise cannot_merge(seen, "parts of one corpus")
        whole.take(state)
    path = Path(out)
    with alone(path.with_name(f".{path.name}.lock")):
        whole.save(path, digest)
    return whole.curves()
