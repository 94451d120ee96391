"""Copies of sentences that run together, each with edits of its own, from where they differ."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_contextmix.adapters.inputs.crops import real_columns
from tl_contextmix.adapters.passes import Pass
from tl_contextmix.adapters.questions import Question
from tl_contextmix.core.blocks import Batch
from tl_contextmix.core.model_view import Edit, ModelView
from tl_contextmix.engine.edited_runs import row_bytes, run_bytes

# Runs a batch with edits; returns the logits.
Run = Callable[[Batch, Mapping[str, Edit]], Tensor]


@dataclass(frozen=True)
class CopiedRuns:
    """Runs of copies of some sentences.

    Attributes:
        question: What is read of one copy, by its own sentences and positions.
        places: Which of all predictions these are.
        rows: The numbers of the sentences.
        targets: The positions that run.
        sources: The positions that these can read.
        at_once: How many copies run together.
        run: Runs copies.
        uncut: The logits of the predictions without edits, of runs like these.
    """

    question: Question
    places: list[int]
    rows: list[int]
    targets: slice
    sources: slice
    at_once: int
    run: Run
    uncut: Float[Tensor, "row d_vocab"]

    def edges(
        self, members: Bool[Tensor, "batch group source"], readers: Bool[Tensor, "batch target"]
    ) -> tuple[Bool[Tensor, "row group _source"], Bool[Tensor, "row _target"]]:
        """Returns groups of sources, and who reads otherwise, by the positions of these runs."""
        return members[self.rows][:, :, self.sources], readers[self.rows][:, self.targets]

    def read(self, copies: int, edits: Mapping[str, Edit]) -> Float[Tensor, "row d_vocab"]:
        """Returns the logits of the predictions of every copy, one copy after the other."""
        several = self.question.repeated(copies)
        return several.read(self.run(several.batch, edits))


def copied_runs(
    forward_pass: Pass,
    question: Question,
    changed: Bool[Tensor, "batch target"],
    logits: Float[Tensor, "batch pos d_vocab"],
    copies: int,
    max_bytes: int,
    whole: Run,
) -> Iterator[CopiedRuns]:
    """Yields runs whose edits change what some positions read; of a prediction, the last counts.

    Positions before the first of these stay as they are. Where the host keeps keys and values, only
    those from there to the last prediction run, sentences of one length together, if that is less
    work. It is relied on once it has been seen: without edits the logits have to be those of the
    whole pass.

    Args:
        forward_pass: A pass over the sentences.
        question: What is read.
        changed: The positions of the stack asked for that may read something else.
        logits: The model's output without edits.
        copies: How many copies are run in all.
        max_bytes: Memory for the copies that run together.
        whole: Runs copies of the sentences as they were given.
    """
    groups = _stretches(forward_pass.view, question, changed, copies)
    for rows, targets, sources in groups:
        wanted = logits[rows, targets]
        runs = _later_runs(forward_pass, question, rows, targets, sources, wanted, max_bytes)
        if runs is None:
            break
        yield runs
    else:
        if groups:
            return
    # Hooks may count on the sentences that were given.
    hooked = forward_pass.view.hooked()
    yield CopiedRuns(
        question,
        places=[*range(len(question.rows))],
        rows=[*range(len(question.batch.main.ids))],
        targets=slice(None),
        sources=slice(None),
        at_once=1 if hooked else max(1, max_bytes // run_bytes(forward_pass)),
        run=whole,
        uncut=question.read(logits),
    )


def _stretches(
    view: ModelView, question: Question, changed: Bool[Tensor, "batch target"], copies: int
) -> list[tuple[list[int], slice, slice]]:
    """Returns sentences of one length, the positions that have to run, and what these can read.

    Nothing where all positions have to, or nearly all.
    """
    batch = question.batch
    causal = [*view.stacks] == ["decoder"] and all(block.attentions for block in view.blocks())
    if view.past is None or not causal or batch.further or view.hooked():
        return []
    run_at = changed.clone()
    run_at[question.sentences, question.rows] = True
    asked = [*zip(question.sentences.tolist(), question.rows.tolist(), strict=True)]
    found = []
    for rows, columns in _equally_long(batch.main.mask):
        start = int(run_at[rows].any(dim=0).int().argmax())
        # What comes after the last prediction changes none.
        stop = 1 + max(pos for row, pos in asked if row in rows)
        before, after = start - columns.start, stop - start
        # The positions before, and a run without a cut, come first.
        saved = copies * (columns.stop - columns.start - after) - before - after
        if min(before, saved) <= 0 or not bool(batch.main.mask[rows, columns].all()):
            return []
        found.append((rows, slice(start, stop), slice(columns.start, stop)))
    return found


def _equally_long(mask: Bool[Tensor, "batch pos"]) -> Iterator[tuple[list[int], slice]]:
    """Yields the numbers of sentences in the same columns, and these."""
    groups: dict[tuple[int, int], list[int]] = {}
    for row, columns in enumerate(real_columns(mask)):
        groups.setdefault(columns, []).append(row)
    for columns, rows in groups.items():
        yield rows, slice(*columns)


def _later_runs(
    forward_pass: Pass,
    question: Question,
    rows: list[int],
    targets: slice,
    sources: slice,
    logits: Float[Tensor, "row target d_vocab"],
    max_bytes: int,
) -> CopiedRuns | None:
    """Returns runs of some positions of sentences of one length; the host keeps what they read.

    None if without a change they do not have these logits, those of the whole pass.
    """
    view = forward_pass.view
    assert view.past is not None
    past = view.past(len(rows))
    earlier = question.batch.each(lambda ids: ids[rows, sources.start : targets.start])
    last = [attention.pattern for block in view.blocks() for attention in block.attentions][-1:]

    def run(batch: Batch, edits: Mapping[str, Edit]) -> Tensor:
        copies = len(batch.main.ids) // len(rows)
        logits = view.run(replace(batch, past=lambda: past(copies)), [], edits=edits).logits
        assert logits is not None
        return logits

    sentences = question.sentences.tolist()
    places = [place for place, row in enumerate(sentences) if row in rows]
    some = question.at(places)
    own = replace(
        some,
        batch=question.batch.each(lambda ids: ids[rows, targets]),
        sentences=torch.tensor([rows.index(sentences[place]) for place in places]),
        rows=some.rows - targets.start,
    )
    length = sources.stop - sources.start
    try:
        # It ends with the last pattern: by then all keys and values are there.
        view.run(replace(earlier, past=lambda: past(0)), last, logits=False)
        found = _alike(forward_pass, run, own.batch, length, logits)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # of a host that keeps nothing, or not this way
        return None
    if found is None:
        return None
    kept = sum(2 * length * block.d_model for block in view.blocks()) * view.dtype.itemsize
    size = len(rows) * (row_bytes(view, targets.stop - targets.start, length) + kept)
    at_once = max(1, max_bytes // size)
    return CopiedRuns(own, places, rows, targets, sources, at_once, run, uncut=own.read(found))


def _alike(
    forward_pass: Pass,
    run: Run,
    batch: Batch,
    length: int,
    logits: Float[Tensor, "row target d_vocab"],
) -> Float[Tensor, "row target d_vocab"] | None:
    """Returns logits of a run without a change; None if these or the patterns' shape are others."""
    shapes = set()

    def look(pattern: Tensor) -> Tensor:
        shapes.add(tuple(pattern.shape[-2:]))
        return pattern

    names = [block.attention(forward_pass.kind).pattern for block in forward_pass.view.blocks()]
    found = run(batch, dict.fromkeys(names, look))
    limit = forward_pass.view.tolerance * logits.abs().amax()
    alike = logits.is_meta or bool((found - logits).abs().amax() <= limit)
    return found if alike and shapes == {(logits.shape[1], length)} else None
