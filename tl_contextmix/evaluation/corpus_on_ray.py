"""Figures over a corpus on many machines; needs ``pip install tl-contextmix[ray]``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
from tl_contextmix.errors import InvalidInput, seen
from tl_contextmix.evaluation.corpus_figures import Measure, over_corpus
from tl_contextmix.evaluation.corpus_state import merge_figures
from tl_contextmix.methods.memories.on_ray import on_ray, require_options
from tl_contextmix.methods.memories.store import make_folder, part_path
from tl_contextmix.results import LayerCurves


def _share(
    model: object,
    rank: int,
    size: int,
    *,
    corpus: str,
    measure: Measure,
    out: Path,
    options: Mapping[str, Any],
) -> Path:
    path = part_path(out, rank, size).with_suffix(".json")
    over_corpus(model, corpus, measure, out=path, rank=rank, world_size=size, **options)
    return path


@checked
def over_corpus_on_ray(
    load: Callable[[], object],
    corpus: FilePath,
    measure: Measure,
    *,
    out: FilePath,
    workers: Positive = 1,
    parts: Positive | None = None,
    num_cpus: PositiveNumber = 1.0,
    num_gpus: NotNegativeNumber = 0.0,
    options: Mapping[str, Any] | None = None,
) -> LayerCurves:
    """Returns figures over a corpus with Ray Data: the same bits as `over_corpus` in one process.

    As `tl_contextmix.methods.memories.mine_on_ray`: Ray is started on this machine where it is not
    running, one actor per device loads the model once, and a part whose worker was killed goes on
    from its last checkpoint. So does a whole run that was stopped, called again with the same
    arguments.

    Args:
        load: Makes the model, or a mapping from names to models, on each worker.
        corpus: Path of a file every worker can read.
        measure: See `over_corpus`; Ray sends it to the workers.
        out: A folder every worker can write to. Beside the parts it has ``figures.json`` in the
            end, the file that `over_corpus` would have written.
        workers: How many actors. Leave Ray at least one more CPU: if actors reserve every
            CPU, the job deadlocks.
        parts: In how many parts the corpus is cut; None: four for each worker. At least two.
        num_cpus: CPUs of each actor.
        num_gpus: GPUs of each actor.
        options: Further arguments of `over_corpus`.

    Raises:
        InvalidInput: If Ray is not installed, would deadlock, an option is none of `over_corpus`,
            or ``measure`` has no name, such as a ``functools.partial``.
    """
    options = require_options(options, over_corpus)
    if not hasattr(measure, "__qualname__"):
        raise InvalidInput(
            "measure= has no name by which parts are known to be of one run",
            seen(measure),
            "a function with a name of its own",
            "Define one with def.",
        )
    # Workers may be started in another folder than this process.
    corpus, folder = str(Path(corpus).absolute()), make_folder(out).absolute()
    work = partial(_share, corpus=corpus, measure=measure, out=folder, options=options)
    paths = on_ray(load, work, workers, parts, num_cpus, num_gpus)
    return merge_figures(paths, out=folder / "figures.json")
