"""A corpus in shards and batches that depend on nothing but the corpus and the options.

The shape of a batch decides how products of matrices round, so which documents share a batch must
not depend on how many processes there are, nor on where one was stopped.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from tl_contextmix.adapters.inputs import Given, make_batch, pad_rows
from tl_contextmix.adapters.inputs.padding import without_padding
from tl_contextmix.core.blocks import Batch
from tl_contextmix.core.model_view import ModelView
from tl_contextmix.errors import InvalidInput, warn
from tl_contextmix.methods.memories.corpus_formats import Corpus, Document
from tl_contextmix.methods.memories.topk import POSITION_BITS

TooLong = Literal["cut", "skip", "error"]
Malformed = Literal["error", "skip"]


@dataclass(frozen=True)
class Cutting:
    """How a corpus is cut up, see `mine_triggers`."""

    shard_size: int
    batch_size: int
    too_long: TooLong
    malformed: Malformed
    prepend_bos: bool | None
    special: bool


@dataclass(frozen=True)
class Shard:
    """Consecutive documents, with the numbers of the shard and of the first of them."""

    index: int
    first: int
    documents: list[Document]

    @property
    def size(self) -> int:
        """How much of the corpus it is, in the unit of `Corpus.size`."""
        return sum(document.size for document in self.documents)

    def digest(self) -> bytes:
        """Returns a hash of every document."""
        found = hashlib.sha256()
        for document in self.documents:
            found.update(document.data())
        return found.digest()


@dataclass(frozen=True)
class Documents:
    """A batch of documents.

    Attributes:
        batch: What the model is run on.
        numbers: Number of each document.
        hashes: Hash of each document.
        counted: Positions whose memories count.
        next_ids: The token after each position, -1 at the end of a document.
    """

    batch: Batch
    numbers: Int[Tensor, " batch"]
    hashes: Int[Tensor, " batch"]
    counted: Bool[Tensor, "batch pos"]
    next_ids: Int[Tensor, "batch pos"]


class Frame(NamedTuple):
    """The tokens that the model's own encoding puts around every text."""

    first: list[int]
    last: list[int]

    def ends(self, ids: Sequence[int]) -> tuple[int, int]:
        """Returns how many tokens of a document frame it at either end.

        All of the frame in texts; none in token ids that came without it.
        """
        first, last = len(self.first), len(self.last)
        after = last if list(ids[len(ids) - last :]) == self.last else 0
        return first if list(ids[:first]) == self.first else 0, after

    def own(self, ids: Sequence[int], special: frozenset[int]) -> list[bool]:
        """Returns which tokens of a document are neither of its frame nor special."""
        first, last = self.ends(ids)
        inside = ids[first : len(ids) - last]
        own = [True] * len(inside)
        if not special.isdisjoint(inside):
            own = [token not in special for token in inside]
        return [False] * first + own + [False] * (len(ids) - first - len(inside))


def frame_of(view: ModelView, prepend_bos: bool | None) -> Frame:
    """Returns the tokens that frame every text; without a tokenizer none."""
    if not view.reads_text():
        return Frame([], [])
    empty, one = view.encode("", prepend_bos), view.encode("a", prepend_bos)
    first = _common(empty, one)
    last = _common(empty[len(first) :][::-1], one[len(first) :][::-1])
    return Frame(first, last[::-1])


def _common(one: list[int], other: list[int]) -> list[int]:
    pairs = takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return [token for token, _ in pairs]


def read_shards(corpus: Corpus, size: int) -> Iterator[Shard]:
    """Yields a corpus shard by shard; the last one may be shorter."""
    documents, index = corpus.documents(), 0
    while listed := list(islice(documents, size)):
        yield Shard(index, index * size, listed)
        index += 1


def progress(what: str, initial: int = 0, unit: str = "token") -> Any:
    """Returns a bar with units per second, and the time left once the end is in sight."""
    how = {"unit": unit, "unit_scale": True, "delay": 2, "leave": False, "disable": None}
    return tqdm(desc=what, initial=initial, **how)


def expect(bar: Any, read: int, size: int | None) -> None:
    """Extrapolates the bar's total from the fraction of the corpus that was read."""
    if size is not None:
        bar.total = max(bar.n, round(bar.n * size / max(1, read)))


def batches(
    view: ModelView, shard: Shard, how: Cutting, name: str, counts: Counter[str]
) -> Iterator[Documents]:
    """Yields the documents of a shard, those of like length together.

    What there was is added to ``counts``, by `corpus_arguments.COUNTS`.

    Raises:
        InvalidInput: If a document cannot be used and is not to be skipped.
    """
    frame, special, rows = frame_of(view, how.prepend_bos), view.special_tokens(), []
    for number, document in enumerate(shard.documents, shard.first):
        ids = _tokens(view, document, how, frame, f"document {number} of {name}", counts)
        counted = [True] * len(ids) if how.special else frame.own(ids, special)
        if any(counted):
            rows.append((len(ids), number, document.hash(), ids, counted))
        elif ids:
            counts["empty"] += 1
    rows.sort(key=lambda row: row[:2])
    for start in range(0, len(rows), how.batch_size):
        found = _batch(view, rows[start : start + how.batch_size])
        tokens, positions = int(found.batch.main.mask.sum()), int(found.counted.sum())
        counts["tokens"] += tokens
        counts["positions"] += positions
        counts["special"] += tokens - positions
        yield found


def warn_of_little(counts: Mapping[str, int]) -> None:
    """Warns if hardly anything of a corpus was read, with the counts.

    Warns:
        ContextMixWarning: If no position counted, or more tokens were cut off than read.
    """
    listed = ", ".join(f"{number:,} {name}" for name, number in counts.items() if number)
    if not counts["positions"]:
        warn(
            f"no position of the corpus counts ({listed or 'no documents'}). malformed='error' and "
            "too_long='error' name the first document that was skipped."
        )
    elif counts["cut_tokens"] > counts["tokens"]:
        warn(
            f"more of the corpus was cut off than read ({listed}): documents are longer than the "
            "model's context. Split them, or skip them with too_long='skip'."
        )


def _tokens(
    view: ModelView, document: Document, how: Cutting, frame: Frame, name: str, counts: Counter[str]
) -> list[int]:
    counts["documents"] += 1
    problem, ids = document.problem, encode(view, document, how.prepend_bos)
    if max(ids, default=0) >= view.d_vocab:
        problem = f"token {max(ids)}, of a vocabulary of {view.d_vocab}"
    if problem:
        if how.malformed == "error":
            raise _unusable(
                name, problem, "a text or token ids", "malformed='skip'", document.remedy
            )
        counts["malformed"] += 1
        return []
    counts["padding"] += len(document.ids or ids) - len(ids)
    if not ids:
        counts["empty"] += 1
        return []
    kept = cut(view, ids, frame)
    if len(kept) == len(ids):
        return ids
    if how.too_long == "error":
        seen, most = f"{len(ids)} tokens", f"at most {len(kept)}"
        raise _unusable(name, seen, most, "too_long='cut' or 'skip'")
    counts["too_long"] += 1
    if how.too_long == "skip":
        return []
    counts["cut_tokens"] += len(ids) - len(kept)
    return kept


def encode(view: ModelView, document: Document, prepend_bos: bool | None) -> list[int]:
    """Returns the token ids of a document, without padding; of one with nothing in it none."""
    if document.ids is not None:
        return without_padding(view, document.ids)
    text = document.text or ""
    return view.encode(text, prepend_bos) if text.strip() else []


def cut(view: ModelView, ids: list[int], frame: Frame) -> list[int]:
    """Returns as many tokens of a document as fit the model's context, its frame among them."""
    longest, after = min(view.n_ctx or 1 << POSITION_BITS, 1 << POSITION_BITS), frame.ends(ids)[1]
    return ids if len(ids) <= longest else ids[: longest - after] + ids[len(ids) - after :]


def _batch(view: ModelView, rows: list[tuple[int, int, int, list[int], list[bool]]]) -> Documents:
    lengths, numbers, hashes, ids, counted = zip(*rows, strict=True)
    side = pad_rows(ids, view.pad_id())
    steps, stops = torch.arange(lengths[-1]), torch.tensor(lengths)[:, None]
    next_ids = side.ids.roll(-1, 1).masked_fill(steps >= stops - 1, -1)
    return Documents(
        batch=make_batch(view, Given(side.ids, attention_mask=side.mask)),
        numbers=torch.tensor(numbers),
        hashes=torch.tensor(hashes),
        counted=pad_sequence(list(map(torch.tensor, counted)), batch_first=True),
        next_ids=next_ids,
    )


def _unusable(name: str, seen: str, expected: str, way_out: str, remedy: str = "") -> InvalidInput:
    remedy = remedy or "Fix the document"
    return InvalidInput(
        f"{name} cannot be used",
        seen,
        expected,
        f"{remedy.removesuffix('.')}, or skip it with {way_out}.",
    )
