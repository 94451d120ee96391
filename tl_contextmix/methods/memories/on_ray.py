"""A corpus on many machines with Ray Data; needs ``pip install tl-contextmix[ray]``.

The table that Ray maps over has one row per part of the corpus, and a worker writes its part to the
shared folder: nothing but the path of a file goes through Ray. A worker that is killed is tried
again and goes on from its last checkpoint, so that the result is what one process would have made.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from tl_contextmix.core.validation import (
    FilePath,
    NotNegativeNumber,
    Positive,
    PositiveNumber,
    checked,
)
from tl_contextmix.engine.registry import method
from tl_contextmix.errors import InvalidInput
from tl_contextmix.methods.memories.mining import merge_triggers, mine_triggers
from tl_contextmix.methods.memories.store import make_folder, part_path
from tl_contextmix.methods.memories.triggers import Triggers, load_triggers

_OURS = ("model", "corpus", "measure", "out", "rank", "world_size")
Work = Callable[[Any, int, int], Path]
"""Works on one part, given the model, the part's number and how many there are; returns its file.

It goes on from the file where there is one, as a worker that was killed is tried again.
"""


class _Worker:
    """One model on one device, and the parts it is given."""

    def __init__(self, load: Callable[[], object], work: Work) -> None:
        self.model, self.work = load(), work

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        parts = zip(batch["rank"].tolist(), batch["world_size"].tolist(), strict=True)
        return {"path": [str(self.work(self.model, *part)) for part in parts]}


def _mine(model: object, rank: int, size: int, *, corpus: str, out: Path, options: Any) -> Path:
    mine_triggers(model, corpus, out=out, rank=rank, world_size=size, **options)
    return part_path(out, rank, size)


@checked
@method(cites=("geva2021transformer",), on_text=False)
def mine_on_ray(
    load: Callable[[], object],
    corpus: FilePath,
    *,
    out: FilePath,
    workers: Positive = 1,
    parts: Positive | None = None,
    num_cpus: PositiveNumber = 1.0,
    num_gpus: NotNegativeNumber = 0.0,
    options: Mapping[str, Any] | None = None,
) -> Triggers:
    """Mines a corpus with Ray Data: the same bytes as `mine_triggers` in one process.

    Ray is started on this machine where it is not running; connect to a cluster with ``ray.init``
    first. One actor per device loads the model once; parts are read, mined and written, and merged
    here at the end.

    Args:
        load: Makes the model, on each worker.
        corpus: Path of a file every worker can read.
        out: A folder every worker can write to.
        workers: How many actors. Leave Ray at least one more CPU: if actors reserve every
            CPU, the job deadlocks.
        parts: In how many parts the corpus is cut; None: four for each worker. At least two.
        num_cpus: CPUs of each actor.
        num_gpus: GPUs of each actor.
        options: Further arguments of `mine_triggers`.

    Returns:
        `Triggers`, without the model: `load_triggers` takes one, and ``labels``.

    Raises:
        InvalidInput: If Ray is not installed, would deadlock, or an option is none of
            `mine_triggers`.
    """
    options = require_options(options, mine_triggers)
    # Workers may be started in another folder than this process.
    corpus, folder = Path(corpus).absolute(), make_folder(out).absolute()
    work = partial(_mine, corpus=str(corpus), out=folder, options=options)
    on_ray(load, work, workers, parts, num_cpus, num_gpus)
    return load_triggers(merge_triggers(folder), corpus=corpus, column=options.get("column"))


def on_ray(
    load: Callable[[], object],
    work: Work,
    workers: int,
    parts: int | None,
    num_cpus: float,
    num_gpus: float,
) -> list[Path]:
    """Has all parts worked on; see `mine_on_ray` for the arguments.

    Returns:
        The file of each part.

    Raises:
        InvalidInput: If Ray is not installed, or would deadlock.
    """
    count = max(2, 4 * workers if parts is None else parts)
    with _ray(workers * num_cpus) as ray:
        table = ray.data.from_items([{"rank": r, "world_size": count} for r in range(count)])
        tasks = table.repartition(count).map_batches(
            _Worker,
            fn_constructor_args=(load, work),
            batch_size=1,
            concurrency=workers,
            num_cpus=num_cpus,
            num_gpus=num_gpus,
            max_restarts=-1,
            max_task_retries=-1,
        )
        return sorted(Path(row["path"]) for row in tasks.take_all())


def require_options(
    given: Mapping[str, Any] | None, function: Callable[..., Any]
) -> dict[str, Any]:
    """Returns further arguments of a function."""
    options, name = dict(given or {}), function.__name__
    known = [n for n in inspect.signature(function).parameters if n not in _OURS]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise InvalidInput(
            f"{name} does not have this option",
            repr(unknown[0]),
            f"some of {known}",
            f"See the docstring of {name}.",
        )
    return options


@contextlib.contextmanager
def _ray(wanted: float) -> Iterator[Any]:
    """Yields Ray, started here and stopped again where it was not running."""
    # Ray asks nobody before it counts its users.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise InvalidInput(
            "there is no Ray to work on",
            str(error),
            "ray[data]",
            "Install tl-contextmix[ray], or share the corpus by rank and world_size.",
        ) from error
    own = not ray.is_initialized()
    if own:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        there = ray.cluster_resources().get("CPU", 0.0)
        if wanted >= there:
            raise InvalidInput(
                "the job would deadlock: actors reserve every CPU",
                f"actors that take {wanted:g} of {there:g} CPUs",
                "a share of a CPU left for reading",
                "Ask for fewer workers, or a smaller num_cpus for each.",
            )
        yield ray
    finally:
        if own:
            ray.shutdown()
