"""Mining on many machines with Ray Data; needs ``pip install tl-contextmix[ray]``.

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
from tl_contextmix.errors import bad
from tl_contextmix.methods.memories.mining import merge_triggers, mine_triggers
from tl_contextmix.methods.memories.store import make_folder, part_path
from tl_contextmix.methods.memories.triggers import Triggers, load_triggers

_OURS = ("model", "corpus", "out", "rank", "world_size")


class _Worker:
    """One model on one device, and the parts it is given."""

    def __init__(
        self, load: Callable[[], object], corpus: str, out: str, options: Mapping[str, Any]
    ) -> None:
        self.model, self.corpus, self.out, self.options = load(), corpus, out, options

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        paths = []
        for rank, size in zip(batch["rank"].tolist(), batch["world_size"].tolist(), strict=True):
            mine_triggers(
                self.model, self.corpus, out=self.out, rank=rank, world_size=size, **self.options
            )
            paths.append(str(part_path(Path(self.out), rank, size)))
        return {"path": paths}


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
    options = _require_options(options)
    count = max(2, 4 * workers if parts is None else parts)
    # Workers may be started in another folder than this process.
    corpus, folder = Path(corpus).absolute(), make_folder(out).absolute()
    with _ray(workers * num_cpus) as ray:
        table = ray.data.from_items([{"rank": r, "world_size": count} for r in range(count)])
        done = table.repartition(count).map_batches(
            _Worker,
            fn_constructor_args=(load, str(corpus), str(folder), options),
            batch_size=1,
            concurrency=workers,
            num_cpus=num_cpus,
            num_gpus=num_gpus,
            max_restarts=-1,
            max_task_retries=-1,
        )
        done.materialize()
    return load_triggers(merge_triggers(folder), corpus=corpus, column=options.get("column"))


def _require_options(given: Mapping[str, Any] | None) -> dict[str, Any]:
    options = dict(given or {})
    known = [n for n in inspect.signature(mine_triggers).parameters if n not in _OURS]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise bad(
            "mine_triggers does not have this option",
            repr(unknown[0]),
            f"some of {known}",
            "See the docstring of mine_triggers.",
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
        raise bad(
            "there is no Ray to mine on",
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
            raise bad(
                "the job would deadlock: actors reserve every CPU",
                f"actors that take {wanted:g} of {there:g} CPUs",
                "a share of a CPU left for reading",
                "Ask for fewer workers, or a smaller num_cpus for each.",
            )
        yield ray
    finally:
        if own:
            ray.shutdown()
