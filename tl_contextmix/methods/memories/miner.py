"""What is read from a batch of documents: coefficients, and the highest of them so far."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tl_contextmix.adapters.dictionary_views import layers_of
from tl_contextmix.core.blocks import Block, Trace
from tl_contextmix.core.experts import Experts
from tl_contextmix.core.finite import why_not_finite
from tl_contextmix.core.model_view import ModelView, StackName, select_blocks
from tl_contextmix.core.pieces import replace_parts
from tl_contextmix.core.token_sums import beside
from tl_contextmix.core.validation import Layers
from tl_contextmix.engine.memory_coefficients import (
    QUADRANTS,
    branch_names,
    quadrants,
    require_feed_forward,
)
from tl_contextmix.errors import InvalidInput, warn
from tl_contextmix.methods.memories.corpus_arguments import TAILS
from tl_contextmix.methods.memories.corpus_formats import Corpus
from tl_contextmix.methods.memories.shards import Cutting, Documents
from tl_contextmix.methods.memories.topk import (
    TopK,
    first_of_each,
    hash_prefixes,
    pack_places,
    pack_tokens,
    update_all,
)
from tl_contextmix.results.axes import positions
from tl_contextmix.results.labels import package_version

Unit = Literal["prefix", "document"]
Tails = Literal["positive", "both", "quadrants"]
Duplicates = Literal["keep", "drop"]
# Of all triggers: no common question needs as many (k=1000 of GPT-2's 36,864 take 0.7 GiB).
_MANY_BYTES = 4 * 2**30
# Of copies of coefficients that are held at once, beyond those of one layer.
_MOST_COPIED = 2**28
# Cases, accents, widths, white space: what tokenizers with one vocabulary treat differently.
_PROBE = "The cat sat, didn't it?\n  3.14 na\u00efve nai\u0308ve \uff21 \u65e5\u672c \U0001f642"
NEGATIVE = ("negative", "+-", "-+")
"""Tails of negative coefficients: the memory promotes what its value demotes."""


@dataclass(frozen=True)
class Miner:
    """Which memories of which model are mined, and how; see `mine_triggers`."""

    view: ModelView
    blocks: tuple[Block, ...]
    neurons: tuple[int, ...] | None
    stack: str
    k: int
    unit: Unit
    tails: Tails
    duplicates: Duplicates
    how: Cutting

    def chosen(self, block: Block) -> list[int]:
        """Returns the neurons of a layer that are mined."""
        return positions("neuron", self.neurons, range(require_feed_forward(block).width))

    def describe(self, corpus: Corpus, source: str | None = None) -> dict[str, Any]:
        """Returns what the result depends on, besides the documents: plain JSON."""
        view, ffs = self.view, {str(block.layer): block.feed_forward for block in self.blocks}
        experts = {layer: list(ff.sizes) for layer, ff in ffs.items() if isinstance(ff, Experts)}
        return {
            "model": view.name,
            "weights": view.fingerprint,
            "processing": list(view.processing),
            "host": view.host,
            "TransformerLens": view.host_version,
            "tl_contextmix": package_version(),
            "torch": torch.__version__,
            "dtype": str(view.dtype),
            "hooks": list(view.hooked()),
            **({"dictionaries": list(view.dictionaries)} if view.dictionaries else {}),
            "tokenizer": tokenizer_hash(view, self.how.prepend_bos),
            "corpus": {"kind": corpus.kind, "column": corpus.column},
            "source": {"model": source, "corpus": corpus.name},
            "options": {
                "k": self.k,
                "layers": [block.layer for block in self.blocks],
                "neurons": {str(block.layer): self.chosen(block) for block in self.blocks},
                **({"experts": experts} if experts else {}),
                "stack": self.stack,
                "unit": self.unit,
                "tails": self.tails,
                "duplicates": self.duplicates,
                **asdict(self.how),
            },
        }

    def zero(self) -> dict[tuple[int, str], TopK]:
        """Returns the state before the first document."""
        view, distinct = self.view, self.duplicates == "drop"
        entry = view.dtype.itemsize + (32 if distinct else 24)
        memories = sum(len(self.chosen(block)) for block in self.blocks) * len(TAILS[self.tails])
        if entry * self.k * memories > _MANY_BYTES:
            warn(
                f"the {self.k:,} highest contexts of {memories:,} memories take "
                f"{entry * self.k * memories / 2**30:.1f} GiB and more while they are sorted, "
                "however small the corpus. Ask for fewer, or for fewer layers or neurons."
            )
        try:
            return {
                (block.layer, tail): TopK.zero(
                    len(self.chosen(block)), self.k, view.dtype, view.device, distinct=distinct
                )
                for block in self.blocks
                for tail in TAILS[self.tails]
            }
        except (RuntimeError, TypeError) as error:  # torch names no size that it cannot allocate
            raise InvalidInput(
                "so many triggers do not fit in memory",
                f"k={self.k}",
                "28 k bytes for each memory",
                "Ask for fewer, or for fewer layers or neurons.",
            ) from error

    def take(self, tops: dict[tuple[int, str], TopK], documents: Documents) -> None:
        """Runs the model on a batch and takes in what it shows."""
        ffs = map(require_feed_forward, self.blocks)
        quads = self.tails == "quadrants"
        names = [name for ff in ffs for name in (branch_names(ff) if quads else (ff.post,))]
        trace = self.view.run(documents.batch, list(dict.fromkeys(names)), logits=False)
        side = documents.batch.side(self.stack)
        there = [documents.counted, side.ids, documents.numbers, documents.hashes]
        there += [documents.next_ids, side.mask]
        counted, ids, numbers, hashes, next_ids, mask = (
            beside(self.view.device, one) for one in there
        )
        entries = [
            pack_places(numbers, ids.shape[1]),
            pack_tokens(ids, next_ids),
            hashes[:, None].expand_as(ids),
        ]
        once = counted
        if self.duplicates == "drop":
            entries.append(self._keys(ids, mask))
            # Each context in the first of its places only.
            once = counted.clone()
            once[counted] = first_of_each(entries[3][counted], entries[0][counted])
        for some in self._together(trace):
            self._require_finite(some, trace, counted)
            named = [(b.layer, *pair) for b, found in some for pair in self._tails(b, found, trace)]
            every = [tops[layer, tail] for layer, tail, _ in named]
            values = [value for _, _, value in named]
            if self.unit == "document":
                self._best(every, values, counted, entries)
            else:
                flat = [entry.flatten() for entry in entries]
                update_all(
                    every,
                    [one.flatten(0, 1) for one in values],
                    once.flatten(),
                    lambda rows, *_, flat=flat: tuple(one.index_select(0, rows) for one in flat),
                )

    def _together(self, trace: Trace) -> Iterator[list[tuple[Block, Tensor]]]:
        """Yields coefficients of layers: of all at once, unless copies of theirs would be held."""
        some, copied = list[tuple[Block, Tensor]](), 0
        for block in self.blocks:
            ff = require_feed_forward(block)
            found = ff.coefficients(trace)
            same = found.data_ptr() == trace.values[ff.post].data_ptr()
            as_is = self.tails == "positive" and same
            copied += 0 if as_is else found.nbytes * len(TAILS[self.tails])
            some.append((block, found))
            if copied > _MOST_COPIED:
                yield some
                some, copied = [], 0
        if some:
            yield some

    def _keys(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Returns a hash of what each position has read."""
        prefixes = hash_prefixes(ids)
        if self.stack == "decoder":
            return prefixes
        whole = prefixes.gather(1, mask.sum(1, keepdim=True) - 1)
        pos = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        pairs = torch.stack([whole.expand_as(ids), pos], dim=-1).flatten(0, 1)
        return hash_prefixes(pairs)[:, 1].view_as(ids)

    @staticmethod
    def _require_finite(
        some: Sequence[tuple[Block, Tensor]], trace: Trace, counted: Tensor
    ) -> None:
        """Raises InvalidInput if a coefficient that counts is not finite."""
        # A sum is finite where every number is; not worth a mask unless it is not.
        if bool(torch.stack([found.sum() for _, found in some]).isfinite().all()):
            return
        for block, found in some:
            if not bool(found[counted].isfinite().all()):
                where = f"the coefficients of layer {block.layer}"
                dtype = trace.values[require_feed_forward(block).post].dtype
                raise InvalidInput(why_not_finite(where, dtype))

    def _tails(self, block: Block, found: Tensor, trace: Trace) -> Iterator[tuple[str, Tensor]]:
        """Yields each tail with its values: positive where there is something to be found."""
        some = None
        if self.neurons is not None:
            some = torch.tensor(self.chosen(block), device=found.device)
            found = found[..., some]
        if self.tails == "quadrants":
            places = quadrants(require_feed_forward(block), trace)
            places = places if some is None else places[..., some]
            for index, tail in enumerate(QUADRANTS):
                yield tail, found.abs().masked_fill(places != index, 0)
            return
        yield "positive", found
        if self.tails == "both":
            yield "negative", -found

    @staticmethod
    def _best(
        tops: list[TopK], values: list[Tensor], counted: Tensor, entries: list[Tensor]
    ) -> None:
        masked = [one.masked_fill(~counted[..., None], -torch.inf) for one in values]
        steps = torch.arange(counted.shape[1], device=counted.device)

        def locate(
            rows: Tensor, columns: Tensor, best: Tensor, here: Tensor | None
        ) -> tuple[Tensor, ...]:
            # The first of the document's positions that have its highest value.
            assert here is not None
            there = here[rows, :, columns] == best[:, None]
            pos = torch.where(there, steps, len(steps)).amin(dim=1)
            return tuple(entry[rows, pos] for entry in entries)

        update_all(
            tops,
            [one.amax(dim=1) for one in masked],
            counted.any(dim=1),
            locate,
            along=masked,
            repeats=tops[0].keys is not None,
        )


def tokenizer_hash(view: ModelView, prepend_bos: bool | None) -> str:
    """Returns a hash of the vocabulary, and of what becomes of a text."""
    found = hashlib.sha256()
    for token in range(view.d_vocab):
        # As version 0.1.0 wrote tokens, so that its folders are still known.
        text = replace_parts(view.to_string(token))
        found.update(text.encode("utf-8", "surrogatepass") + b"\0")
    if view.reads_text():
        found.update(repr(view.encode(_PROBE, prepend_bos)).encode())
    return found.hexdigest()


def make_miner(
    view: ModelView,
    how: Cutting,
    k: int,
    layer: Layers | None,
    neurons: int | Sequence[int] | None,
    stack: StackName | None,
    unit: Unit,
    tails: Tails,
    duplicates: Duplicates,
) -> Miner:
    """Returns what is mined, checked."""
    pair = len(view.stacks) == 2
    base = "encoder" if pair and stack is None else view.base_stack(stack)
    if pair and base != "encoder":
        raise InvalidInput(
            "a corpus cannot be read by this stack",
            f"stack={stack!r}",
            "'encoder': a decoder would see its start token alone",
            "Leave `stack` out.",
        )
    # In the model's order and each once, whatever the order they were asked for in.
    if layer is None and view.dictionaries:
        layer = layers_of(view, base)
    asked = {block.layer: block for block in select_blocks(view.stacks[base], layer)}
    blocks = tuple(asked[number] for number in sorted(asked))
    first = require_feed_forward(blocks[0])
    if tails == "quadrants" and not first.gated:
        raise InvalidInput(
            "there are no quadrants",
            "a feed-forward sublayer without gates",
            "tails='positive' or 'both'",
            "Quadrants are the signs of a gate and of the branch it multiplies.",
        )
    size = first.width
    chosen = None
    if neurons is not None:
        chosen = tuple(sorted(set(positions("neuron", neurons, range(size)))))
    return Miner(view, blocks, chosen, base, k, unit, tails, duplicates, how)
