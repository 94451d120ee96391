"""Any figure over a corpus: streamed, resumable, with intervals."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from tl_contextmix.adapters import as_view
from tl_contextmix.adapters.passes import provenance
from tl_contextmix.core.validation import (
    FilePath,
    NotNegative,
    NotNegativeNumber,
    Positive,
    checked,
)
from tl_contextmix.errors import InvalidInput, seen
from tl_contextmix.evaluation.corpus_state import Key, State
from tl_contextmix.methods.memories.corpus_formats import open_corpus
from tl_contextmix.methods.memories.mining import changed, require_rank
from tl_contextmix.methods.memories.shards import Shard, expect, progress, read_shards
from tl_contextmix.methods.memories.store import alone
from tl_contextmix.results import LayerCurves
from tl_contextmix.results.curves import EVERY
from tl_contextmix.results.scores import ScoreTable

Measure = Callable[[Any, list[Any]], Any]
"""A function of a model and some documents that returns a result or a table with their rows."""


@checked
def over_corpus(
    model: object,
    corpus: object,
    measure: Measure,
    *,
    value: str = "value",
    metric: str | None = None,
    category: str | None = None,
    column: str | None = None,
    rows: bool = False,
    out: FilePath | None = None,
    batch_size: Positive = 16,
    shard_size: Positive = 256,
    checkpoint_seconds: NotNegativeNumber = 60.0,
    most: Positive = 10_000,
    rank: NotNegative = 0,
    world_size: Positive = 1,
) -> LayerCurves:
    r"""Returns the mean over a corpus of whatever a method says of a sentence, layer by layer.

    A sentence's figure :math:`x_i` is the mean of its rows of one layer, metric and category. Of
    these the result has

    .. math:: \bar x \pm t_{n-1} \sqrt{\frac{\sum_i (x_i - \bar x)^2}{n (n - 1)}}

    (Student's t, 95 %, for sentences drawn independently), over the sentences that have such a
    row; NaN is no figure. Of the sentences only sums are kept, of figures and of squares, and these
    exactly: in whatever order, and by however many processes, the result is the same to the bit.

    Args:
        model: Any TransformerLens model, or a mapping from names to models: their figures then
            stand side by side, in categories that begin with the name.
        corpus: As `tl_contextmix.mine_triggers` takes it; blank lines are left out.
        measure: Called with the model and a batch of documents; a function with a name of its own,
            by which ``out`` knows it again. Returns a result or a table with the columns
            ``batch`` and ``layer`` and a number, such as `tl_contextmix.cancellation`,
            `tl_contextmix.mixing_ratio`, `tl_contextmix.amplified_pairs` and `by_kind` have; or
            figures per sentence (`Score`, `Comparison`).
        value: The column of the number.
        metric: The column that names what was measured; None for ``"quantity"`` where there is
            one, else ``value`` names it.
        category: A column to group by, or None.
        column: Column of the texts, see `tl_contextmix.mine_triggers`.
        rows: Whether ``measure`` gets whole rows, as dictionaries, rather than texts.
        out: File of the state. It is written while the corpus is read, and the same call takes up
            one that was stopped, after holding what was read before against its hash.
        batch_size: Documents in a call of ``measure``.
        shard_size: Documents that are read at a time.
        checkpoint_seconds: How often the file is written; at most that much work is lost.
        most: How many figures there may be, so that memory is bounded.
        rank: Number of this process; it takes every ``world_size``-th shard.
        world_size: How many processes share the corpus, each with an ``out`` of its own;
            `merge_figures` puts these together.

    Returns:
        `LayerCurves`, the same whether it was stopped or not; where there are other processes,
        of this one's documents.

    Raises:
        InvalidInput: If a document cannot be read, what ``measure`` returns has no such columns,
            there are too many figures, or the file holds another run.
        FileFormatError: If the file holds something else.

    Cost: that of ``measure``; 1 kB for each figure.

    Example:
        >>> import tl_contextmix as cm
        >>> from tl_contextmix.evaluation import over_corpus
        >>> model = cm.load_demo("causal-lm")
        >>> found = over_corpus(model, ["the keys are old .", "the key is old ."], cm.mixing_ratio)
        >>> {point.sentences for point in found.points}
        {2}
    """
    require_rank(rank, world_size)
    models = dict(model) if isinstance(model, Mapping) else {"": model}
    opened = open_corpus(corpus, column, rows=rows)
    options = {
        "measure": f"{measure.__module__}.{getattr(measure, '__qualname__', seen(measure))}",
        "value": value,
        "metric": metric,
        "category": category,
        "rows": rows,
        "batch_size": batch_size,
        "shard_size": shard_size,
    }
    run = {
        name or "model": vars(provenance(as_view(one), "over_corpus", options))
        for name, one in models.items()
    }
    state = State(run, most, rank, world_size)
    path = None if out is None else Path(out)
    lock = nullcontext() if path is None else alone(path.with_name(f".{path.name}.lock"))
    with lock, torch.no_grad(), progress("over_corpus", unit="document") as bar:
        known = "" if path is None or not path.is_file() else state.resume(path)
        resumed, finished = state.read, state.finished
        digest, last, size, read = hashlib.sha256(), time.monotonic(), opened.size(), 0
        for shard in read_shards(opened, shard_size):
            digest.update(shard.digest())
            read, end = read + shard.size, shard.first + len(shard.documents)
            if end <= resumed:
                if end == resumed and digest.hexdigest() != known:
                    raise changed(opened, f"other documents among the first {end}")
                continue
            if finished or shard.first < resumed:
                raise changed(opened, f"{end} documents where there were {resumed}")
            own = shard.index % world_size == rank
            documents = [*_documents(shard, opened.name, rows)] if own else []
            for start in range(0, len(documents), batch_size):
                given = documents[start : start + batch_size]
                for name, one in models.items():
                    found = _figures(measure(one, given), value, metric, category, len(given))
                    state.add(found, name)
            state.read = end
            bar.update(end - bar.n)
            expect(bar, read, size)
            if path is not None and time.monotonic() - last >= checkpoint_seconds:
                state.save(path, digest.hexdigest())
                last = time.monotonic()
        if state.read and digest.hexdigest() != known and state.read == resumed:
            raise changed(opened, f"fewer than the {resumed} documents there were")
        state.finished = True
        if path is not None:
            state.save(path, digest.hexdigest())
    return state.curves()


def _documents(shard: Shard, name: str, rows: bool) -> Iterator[Any]:
    """Yields texts, token ids or rows; blank lines are left out."""
    for number, document in enumerate(shard.documents, shard.first):
        if document.ids is not None:
            yield document.ids
        elif document.text is None:
            where = f"document {number} of {name}"
            raise InvalidInput(f"{where} cannot be read", document.problem, "a text", "Fix it.")
        elif document.text.strip():
            yield json.loads(document.text) if rows else document.text


def _figures(
    found: Any, value: str, metric: str | None, category: str | None, count: int
) -> Iterator[tuple[Key, list[float]]]:
    """Yields the figures of the sentences of a batch, by metric, category and layer."""
    if isinstance(found, ScoreTable):
        for row in found.rows:
            layer, name = _layer_of(row.layer)
            numbers = [float(value) for value in row.values if not math.isnan(value)]
            yield (row.metric + name, row.method, layer), numbers
        return
    frame = found.to_dataframe() if hasattr(found, "to_dataframe") else found
    columns = [*getattr(frame, "columns", ())]
    metric = metric or ("quantity" if "quantity" in columns else None)
    wanted = ["batch", "layer", value, *filter(None, (metric, category))]
    missing = [name for name in wanted if name not in columns]
    if missing or (len(frame) and not 0 <= frame["batch"].min() <= frame["batch"].max() < count):
        raise InvalidInput(
            "what measure= returns cannot be averaged",
            f"columns {columns}" if missing else f"other rows than those of {count} documents",
            f"a result or table with the columns {wanted}, batch from 0",
            "Name the columns with value=, metric= and category=.",
        )
    import pandas

    numbers = {name: pandas.to_numeric(frame[name], errors="coerce") for name in ("layer", value)}
    wrong = {
        "layer": numbers["layer"].mod(1) != 0,
        value: numbers[value].isna() & frame[value].notna(),
    }
    for name, places in wrong.items():
        if places.any():
            raise InvalidInput(
                "what measure= returns cannot be averaged",
                f"the {name} {frame[name][places].iloc[0]!r}",
                "a whole number for each layer, and numbers that are averaged",
                "Leave out what has no layer or number, or give it one.",
            )
    frame = frame.assign(**numbers)
    names = list(dict.fromkeys([*filter(None, (metric, category)), "layer"]))
    means = frame.groupby([*names, "batch"], sort=False, dropna=False)[value].mean().dropna()
    for key, part in means.groupby(level=names, sort=False, dropna=False):
        one = dict(zip(names, key if isinstance(key, tuple) else (key,), strict=True))
        which = str(one[metric]) if metric else value
        kind = one[category] if category else None
        # NaN is none, either.
        label = EVERY if kind is None or kind != kind else str(kind)
        yield (which, label, int(one["layer"])), part.astype(float).tolist()


def _layer_of(name: str) -> tuple[int, str]:
    """Returns the number of a layer, and what else a table calls it (rollouts)."""
    words = name.replace(",", "").split()
    number = next(int(word) for word in reversed(words) if word.isdigit())
    return number, "" if name.isdigit() else f" ({name.replace(str(number), 'here')})"
