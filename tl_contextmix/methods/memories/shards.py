"""A corpus in shards and batches that depend on nothing but the corpus and the options.

The shape of a batch decides how products of matrices round, so which documents share a batch must
not depend on how many processes there are, nor on where one was stopped.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tl_contextmix.adapters.inputs import Given, make_batch
from tl_contextmix.core.blocks import Batch
from tl_contextmix.core.model_view import ModelView
from tl_contextmix.errors import InvalidInput, bad
from tl_contextmix.methods.memories.corpus_formats import Corpus, Document
from tl_contextmix.methods.memories.topk import POSITION_BITS

TooLong = Literal["cut", "skip", "error"]
Malformed = Literal["error", "skip"]


@dataclass(frozen=True)
class Cutting:
    """How a corpus is cut up.

    Attributes:
        shard_size: Documents in a shard.
        batch_size: Documents in a batch.
        too_long: What becomes of documents that are longer than the model's context.
        malformed: What becomes of documents that cannot be read.
        prepend_bos: Whether documents get a beginning-of-sequence token; None: model's default.
        special: Whether positions of tokens that frame a document count.
    """

    shard_size: int
    batch_size: int
    too_long: TooLong
    malformed: Malformed
    prepend_bos: bool | None
    special: bool


@dataclass(frozen=True)
class Shard:
    """Consecutive documents.

    Attributes:
        index: Number of the shard.
        first: Number of its first document.
        documents: The documents.
    """

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
            data = b"" if document.text is None else document.text.encode("utf-8")
            found.update(f"{len(data)} {document.problem}\n".encode())
            found.update(data)
        return found.digest()


@dataclass(frozen=True)
class Documents:
    """A batch of documents.

    Attributes:
        batch: What the model is run on.
        numbers: Number of each document.
        counted: Positions whose memories count.
        next_ids: The token behind each position, -1 at the end of a document.
    """

    batch: Batch
    numbers: Int[Tensor, " batch"]
    counted: Bool[Tensor, "batch pos"]
    next_ids: Int[Tensor, "batch pos"]


def read_shards(corpus: Corpus, size: int) -> Iterator[Shard]:
    """Yields a corpus shard by shard, the last one as long as it is."""
    documents = corpus.documents()
    index = 0
    while listed := list(islice(documents, size)):
        yield Shard(index, index * size, listed)
        index += 1


def frame_of(view: ModelView, prepend_bos: bool | None) -> tuple[int, int]:
    """Returns how many tokens the model's own encoding puts before and behind every text."""
    frame, one = view.encode("", prepend_bos), view.encode("a", prepend_bos)
    pairs = enumerate(zip(frame, one, strict=False))
    before = next((place for place, (a, b) in pairs if a != b), min(len(frame), len(one)))
    return before, len(frame) - before


def batches(
    view: ModelView, shard: Shard, how: Cutting, name: str, counts: Counter[str]
) -> Iterator[Documents]:
    """Yields the documents of a shard, those of like length together.

    Args:
        view: The model.
        shard: The shard.
        how: How it is cut up.
        name: Name of the corpus, for messages.
        counts: What there was, by `checks.COUNTS`; added to.

    Raises:
        InvalidInput: If a document cannot be used and is not to be skipped.
    """
    before, behind = frame_of(view, how.prepend_bos)
    rows = []
    for offset, document in enumerate(shard.documents):
        label = f"document {shard.first + offset} of {name}"
        ids = _tokens(view, document, how, behind, label, counts)
        if ids and (how.special or len(ids) > before + behind):
            rows.append((len(ids), shard.first + offset, ids))
    rows.sort(key=lambda row: row[:2])
    for start in range(0, len(rows), how.batch_size):
        found = _batch(view, rows[start : start + how.batch_size], how, before, behind)
        counts["tokens"] += int(found.batch.main.mask.sum())
        counts["positions"] += int(found.counted.sum())
        yield found


def _tokens(
    view: ModelView,
    document: Document,
    how: Cutting,
    behind: int,
    name: str,
    counts: Counter[str],
) -> list[int]:
    counts["documents"] += 1
    if document.text is None:
        if how.malformed == "error":
            raise _unusable(name, document.problem, "a text", "malformed='skip'")
        counts["malformed"] += 1
        return []
    if not document.text.strip():
        counts["empty"] += 1
        return []
    ids = view.encode(document.text, how.prepend_bos)
    kept = cut(view, ids, behind)
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


def cut(view: ModelView, ids: list[int], behind: int) -> list[int]:
    """Returns as many tokens of a document as the model's context takes.

    Args:
        view: The model.
        ids: Tokens of the document.
        behind: How many at its end frame every text: these stay.
    """
    longest = min(view.n_ctx or 1 << POSITION_BITS, 1 << POSITION_BITS)
    return ids if len(ids) <= longest else ids[: longest - behind] + ids[len(ids) - behind :]


def _batch(
    view: ModelView,
    rows: list[tuple[int, int, list[int]]],
    how: Cutting,
    before: int,
    behind: int,
) -> Documents:
    longest = rows[-1][0]
    ids = torch.full((len(rows), longest), view.pad_id(), dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    counted = torch.zeros_like(mask)
    next_ids = torch.full_like(ids, -1)
    for row, (length, _, tokens) in enumerate(rows):
        ids[row, :length] = torch.tensor(tokens)
        mask[row, :length] = True
        start, stop = (0, length) if how.special else (before, length - behind)
        counted[row, start:stop] = True
        next_ids[row, : length - 1] = ids[row, 1:length]
    batch = make_batch(view, Given(ids, attention_mask=mask))
    numbers = torch.tensor([number for _, number, _ in rows])
    return Documents(batch, numbers, counted, next_ids)


def _unusable(name: str, seen: str, expected: str, remedy: str) -> InvalidInput:
    return bad(f"{name} cannot be used", seen, expected, f"Mend it, or leave it out with {remedy}.")
