"""A finished mine: pointers and values on disk, contexts fetched from the corpus when asked for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tl_contextmix.corpus.agreement import agreement
from tl_contextmix.corpus.composition import draw
from tl_contextmix.corpus.exports import sampled, write_jsonl, write_sheet
from tl_contextmix.corpus.miner import NEGATIVE, TAILS
from tl_contextmix.corpus.patterns import Base, common
from tl_contextmix.corpus.reading import Corpus, open_corpus
from tl_contextmix.corpus.removal import removal
from tl_contextmix.corpus.shards import frame_of
from tl_contextmix.corpus.store import TABLE, not_mined, read_manifest
from tl_contextmix.errors import InvalidInput, four_parts
from tl_contextmix.hosts import as_view
from tl_contextmix.inputs import Given, make_batch, provenance
from tl_contextmix.memories import coefficients, require_feed_forward, values
from tl_contextmix.model_view import Block, ModelView
from tl_contextmix.panels import Panel, Table
from tl_contextmix.results import (
    Pattern,
    Provenance,
    Trigger,
    TriggerAgreement,
    TriggerExamples,
    TriggerPatterns,
)
from tl_contextmix.results.axes import layer_positions, positions, require_count
from tl_contextmix.results.base import Shown
from tl_contextmix.unembed import unembedding

if TYPE_CHECKING:
    import pandas

    from tl_contextmix.render import Page

_BATCH = 16
_SAMPLE = 1000


def load_triggers(
    folder: str | Path,
    *,
    model: object = None,
    corpus: object = None,
    column: str | None = None,
) -> Triggers:
    """Reads what `mine_triggers` wrote.

    Args:
        folder: The folder.
        model: The model that was mined, for contexts, agreement and everything else that needs
            its tokenizer or its weights; None: tables only.
        corpus: The corpus, as `mine_triggers` takes it; None: the file it was, if it was a file
            and is still there.
        column: Column of the corpus.

    Raises:
        FileFormatError: If the folder holds no finished run.
        InvalidInput: If the model is another one.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    opened = None
    if corpus is not None:
        opened = open_corpus(corpus, column)
    else:
        kept = manifest["run"]["source"]["corpus"]
        if manifest["run"]["corpus"]["kind"] in ("text", "jsonl", "parquet"):
            named = Path(kept)
            opened = (
                open_corpus(named, manifest["run"]["corpus"]["column"])
                if (named.is_file())
                else None
            )
    view = None if model is None else _require_mined(as_view(model), manifest)
    return Triggers(folder, manifest, view, opened, model)


@dataclass(frozen=True, eq=False)
class Triggers(Shown):
    """The triggers of every memory that was mined.

    Attributes:
        folder: Where they are; ``triggers.parquet`` in it is for any reader of Parquet.
        manifest: What was mined, how, and what was left out.
        view: The model, or None.
        corpus: The corpus, or None.
        model: The model of the view, which does not keep it alive.
    """

    folder: Path
    manifest: dict[str, Any] = field(repr=False)
    view: ModelView | None = field(default=None, repr=False)
    corpus: Corpus | None = field(default=None, repr=False)
    model: object = field(default=None, repr=False)

    def __repr__(self) -> str:
        counts = ", ".join(f"{n:,} {name}" for name, n in self.manifest["counts"].items() if n)
        run = self.manifest["run"]
        return (
            f"Triggers of {run['model']}, layers {self.layers}, k {self.k} "
            f"({', '.join(self.tails)}) in {self.folder}: {counts}"
        )

    def panels(self) -> tuple[Panel, ...]:
        """Returns what was mined, how, and from how much; `show` has the triggers of a memory."""
        run = self.manifest["run"]
        told = {
            "model": run["model"],
            "layers": ", ".join(map(str, self.layers)),
            "triggers of each memory": self.k,
            "tails": ", ".join(self.tails),
            **self.manifest["counts"],
        }
        caption = f"In {self.folder}. show(layer, neuron) has the triggers of one memory."
        return (Table("Mined triggers", caption, ("what", "value"), tuple(told.items())),)

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers that were mined."""
        return tuple(self.manifest["run"]["options"]["layers"])

    @property
    def k(self) -> int:
        """How many triggers were looked for."""
        return self.manifest["run"]["options"]["k"]

    @property
    def tails(self) -> tuple[str, ...]:
        """What was looked for."""
        return TAILS[self.manifest["run"]["options"]["tails"]]

    def to_dataframe(
        self, layer: int | None = None, neuron: int | None = None, tail: str | None = None
    ) -> pandas.DataFrame:
        """Returns one row per trigger: pointers, values and token ids.

        Only the layer that is asked for is read from the disk.

        Args:
            layer: Layer; None for all.
            neuron: Neuron; None for all.
            tail: Tail; None for all.

        Raises:
            InvalidInput: If they were not mined.
        """
        import pyarrow.parquet

        conditions = []
        if layer is not None:
            (place,) = layer_positions(layer, self.layers)
            conditions.append(("layer", "=", self.layers[place]))
        if neuron is not None:
            known = set().union(*self.manifest["neurons"].values())
            if neuron not in known:
                raise not_mined("neuron", neuron, f"one of {len(known)} neurons")
            conditions.append(("neuron", "=", neuron))
        if tail is not None:
            if tail not in self.tails:
                raise not_mined("tail", tail, f"one of {self.tails}")
            conditions.append(("tail", "=", tail))
        table = pyarrow.parquet.read_table(self.folder / TABLE, filters=conditions or None)
        return table.to_pandas()

    def examples(
        self, layer: int, neuron: int, *, tail: str | None = None, k: int | None = None
    ) -> TriggerExamples:
        """Returns the triggers of one memory with their contexts, and what it promotes.

        The documents are run again for the coefficient at each of their tokens.

        Args:
            layer: Its layer.
            neuron: Its neuron.
            tail: Tail; None for the first that was mined.
            k: How many; None for all.

        Raises:
            InvalidInput: If it was not mined, or model or corpus are not at hand.
        """
        view = self._require_view()
        tail = self.tails[0] if tail is None else tail
        frame = self.to_dataframe(layer, neuron, tail)
        frame = frame if k is None else frame.head(require_count(k))
        (place,) = layer_positions(layer, self.layers)
        block = view.stacks[self.stack][self.layers[place]]
        contexts = self.contexts(frame)
        rows = [contexts[pair] for pair in zip(frame["document"], frame["position"], strict=True)]
        seen = self.coefficients_of(rows, [block])
        found = []
        for index, (row, ids) in enumerate(zip(frame.itertuples(), rows, strict=True)):
            following = "" if row.next_token < 0 else view.to_string(int(row.next_token))
            activations = seen[index][block.layer][:, neuron].tolist()
            found.append(
                Trigger(
                    rank=int(row.rank),
                    value=float(row.value),
                    document=int(row.document),
                    position=int(row.position),
                    tokens=tuple(view.to_string(one) for one in ids),
                    activations=tuple(activations),
                    next_token=following,
                )
            )
        words, logits = self._promotes(block, neuron, tail in NEGATIVE)
        where = self.describe("examples", {"tail": tail})
        return TriggerExamples(block.layer, neuron, tail, tuple(found), words, logits, where)

    def show(
        self, layer: int, neuron: int, *, tail: str | None = None, k: int | None = None
    ) -> Page:
        """Returns a page with the triggers of one memory; see `examples`."""
        return self.examples(layer, neuron, tail=tail, k=k).show()

    def agreement(self, tail: str | None = None) -> TriggerAgreement:
        r"""Returns whether values promote what follows their triggers (2021, section 4).

        .. math:: \mathrm{top}(v_i) = w_i

        for the token :math:`w_i` behind the first trigger of memory ``i``, the rank of
        :math:`w_i` among the tokens the value promotes, and the share of all triggers that are
        followed by :math:`\mathrm{top}(v_i)` (precision). No forward pass: ``2 N d_model d_vocab``
        operations for N memories.

        Args:
            tail: Tail; None for the first that was mined.

        Raises:
            InvalidInput: If the model is not at hand, or reads no next token.
            UnsupportedModel: If it has no vocabulary readout.
        """
        self._require_view()
        return agreement(self, self.tails[0] if tail is None else tail)

    def patterns(
        self,
        layer: int | None = None,
        neurons: int | Sequence[int] | None = None,
        *,
        tail: str | None = None,
    ) -> TriggerPatterns:
        """Returns what the triggers of memories have in common, with chance levels.

        For each memory the longest ending of up to three tokens that at least half of its triggers
        share (or the most frequent last token), and the most frequent token before the last one.
        Chance is the share of all prefixes that have it, in a thousand documents of the corpus.

        Args:
            layer: Layer; None for all.
            neurons: Neuron or neurons; None for all that were mined.
            tail: Tail; None for the first that was mined.

        Raises:
            InvalidInput: If they were not mined, or model or corpus are not at hand.
        """
        view = self._require_view()
        tail = self.tails[0] if tail is None else tail
        frame = self.to_dataframe(layer, None, tail)
        if neurons is not None:
            size = require_feed_forward(view.stacks[self.stack][self.layers[0]]).W_out.shape[0]
            frame = frame[frame["neuron"].isin(positions("neuron", neurons, (), size))]
        contexts = self.contexts(frame)
        lead = frame_of(view, self.manifest["run"]["options"]["prepend_bos"])[0]
        base = Base(self._sample(), lead)
        rows = []
        for (at, neuron), group in frame.groupby(["layer", "neuron"]):
            pairs = zip(group["document"], group["position"], strict=True)
            some = [tuple(contexts[pair][lead:]) for pair in pairs]
            for kind, tokens, share in common(some):
                rows.append(
                    Pattern(
                        layer=int(at),
                        neuron=int(neuron),
                        kind=kind,
                        text="".join(view.to_string(token) for token in tokens),
                        length=len(tokens),
                        share=share,
                        chance=base.share(kind, tokens),
                        triggers=len(some),
                        contexts=len(set(some)),
                    )
                )
        return TriggerPatterns(tuple(rows), self.describe("patterns", {"tail": tail}))

    def removal(
        self, *, per_layer: int = 100, k: int = 50, tail: str | None = None, seed: int = 0
    ) -> LayerFigures:
        """Returns how coefficients change when a token of a trigger is removed (2021, section 3.2).

        The relative change ``(m' - m) / m`` at the end of a prefix without its first, last or a
        random token, per layer. Causal models; without its last token a prefix has been computed
        already, so that takes no pass of its own. Prefixes of one token are left out.

        Args:
            per_layer: Memories of each layer, drawn by their numbers and the seed.
            k: Triggers of each.
            tail: Tail; None for the first that was mined.
            seed: Of the draws.

        Raises:
            InvalidInput: If the model reads both ways, or model or corpus are not at hand.
        """
        self._require_view()
        frame = self.to_dataframe(tail=self.tails[0] if tail is None else tail)
        return removal(self, sampled(frame, per_layer, k, seed), seed)

    def to_jsonl(
        self, path: str | Path, *, layer: int | None = None, neuron: int | None = None
    ) -> Path:
        """Writes triggers as JSON lines in the form of Neuronpedia's activations.

        One object per trigger: modelId, layer, index, tokens, values along them and their extremes,
        dataIndex. A path that ends in ``.gz`` is compressed.

        Args:
            path: The file.
            layer: Layer; None for all.
            neuron: Neuron; None for all.

        Raises:
            InvalidInput: If model or corpus are not at hand, or the file cannot be written.
        """
        self._require_view()
        return write_jsonl(self, Path(path), self.to_dataframe(layer, neuron))

    def to_sheet(
        self, path: str | Path, *, per_layer: int = 10, k: int = 25, seed: int = 0
    ) -> Path:
        """Writes a sheet (CSV) on which humans note what triggers have in common, as in the paper.

        One row per trigger of ten memories of each layer, with empty columns for four patterns.
        Text that a spreadsheet would run as a formula is quoted.

        Args:
            path: The file.
            per_layer: Memories of each layer, drawn by their numbers and the seed.
            k: Triggers of each.
            seed: Of the draw.

        Raises:
            InvalidInput: If model or corpus are not at hand, or the file cannot be written.
        """
        self._require_view()
        frame = self.to_dataframe(tail=self.tails[0])
        return write_sheet(self, Path(path), sampled(frame, per_layer, k, seed))

    def contexts(self, frame: pandas.DataFrame) -> dict[tuple[int, int], list[int]]:
        """Returns the token ids of contexts, up to the trigger, by document and position.

        Raises:
            InvalidInput: If model or corpus are not at hand, or the corpus has changed.
        """
        ids = self._documents(frame["document"])
        found = {}
        for document, position, token in zip(
            frame["document"], frame["position"], frame["token"], strict=True
        ):
            context = ids[document][: position + 1]
            if not context or context[-1] != token or len(context) != position + 1:
                raise InvalidInput(
                    four_parts(
                        "the corpus is not the one that was mined",
                        f"another token at position {position} of document {document}",
                        f"token {token}",
                        "Give the corpus of then with load_triggers(..., corpus=...).",
                    )
                )
            found[document, position] = context
        return found

    def _sample(self) -> dict[int, list[int]]:
        """Returns the token ids of documents drawn from the whole corpus, always the same."""
        total = self.manifest["counts"]["documents"]
        return self._documents((), {draw(total, 0, index) for index in range(_SAMPLE)})

    def _documents(self, numbers: Iterable[int], spare: Iterable[int] = ()) -> dict[int, list[int]]:
        """Returns the token ids of documents, as they were mined."""
        view, options = self._require_view(), self.manifest["run"]["options"]
        if self.corpus is None:
            raise InvalidInput(
                four_parts(
                    "contexts cannot be shown",
                    "no corpus",
                    "the corpus that was mined",
                    "Call load_triggers(folder, model=..., corpus=...).",
                )
            )
        texts = self.corpus.pick(map(int, numbers), spare)
        behind = frame_of(view, options["prepend_bos"])[1]
        found = {}
        for number, text in texts.items():
            ids = view.encode(text, options["prepend_bos"])
            longest = view.n_ctx or len(ids)
            cut = len(ids) > longest
            found[number] = ids[: longest - behind] + ids[len(ids) - behind :] if cut else ids
        return found

    def coefficients_of(
        self, rows: list[list[int]], blocks: Sequence[Block], *, last: int = 0
    ) -> list[dict[int, Tensor]]:
        """Returns the coefficients [pos neuron] of layers along sequences of token ids.

        Args:
            rows: The sequences.
            blocks: The layers.
            last: How many positions at the end are kept; 0 for all.
        """
        view = self._require_view()
        found: list[dict[int, Tensor]] = []
        names = [require_feed_forward(block).post for block in blocks]
        for start in range(0, len(rows), _BATCH):
            some = rows[start : start + _BATCH]
            longest = max(map(len, some))
            ids = torch.full((len(some), longest), view.pad_id(), dtype=torch.long)
            mask = torch.zeros_like(ids)
            for index, row in enumerate(some):
                ids[index, : len(row)] = torch.tensor(row)
                mask[index, : len(row)] = 1
            with torch.no_grad():
                trace = view.run(make_batch(view, Given(ids, attention_mask=mask)), names)
                layers = {b.layer: coefficients(require_feed_forward(b), trace) for b in blocks}
            found += [
                {layer: one[index, : len(row)][-last:].cpu() for layer, one in layers.items()}
                for index, row in enumerate(some)
            ]
        return found

    def _promotes(
        self, block: Block, neuron: int, negative: bool
    ) -> tuple[tuple[str, ...], tuple[float, ...]]:
        view = self._require_view()
        if view.readout.refusal or self.stack != view.base_stack(None):
            return (), ()
        reader = unembedding(view.readout, None, ("folded", "head"))
        with torch.no_grad():
            vector = values(require_feed_forward(block))[neuron : neuron + 1]
            vector = -vector if negative else vector
            scan = reader.scan(reader.hidden(vector), 10, sides=1)
        words = tuple(view.to_string(token) for token in scan.ids[0, 0].tolist())
        return words, tuple(scan.ends[0, 0].tolist())

    @property
    def stack(self) -> str:
        """The stack that was mined."""
        return self.manifest["run"]["options"]["stack"]

    def _require_view(self) -> ModelView:
        if self.view is None:
            raise InvalidInput(
                four_parts(
                    "this needs the model that was mined",
                    "triggers without one",
                    f"the model {self.manifest['run']['model']}",
                    "Call load_triggers(folder, model=...).",
                )
            )
        return self.view

    def describe(self, name: str, options: dict[str, Any]) -> Provenance:
        """Returns where a result made from these triggers comes from."""
        digest = self.manifest["corpus"]["digest"]
        return provenance(self._require_view(), f"triggers.{name}", {**options, "corpus": digest})


def _require_mined(view: ModelView, manifest: dict[str, Any]) -> ModelView:
    if view.fingerprint != manifest["run"]["weights"]:
        raise InvalidInput(
            four_parts(
                "the triggers are those of another model",
                f"{view.name} with weights {view.fingerprint}",
                f"{manifest['run']['model']} with weights {manifest['run']['weights']}",
                "Give the model that was mined.",
            )
        )
    return view
