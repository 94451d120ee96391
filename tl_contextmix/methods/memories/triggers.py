"""A finished mine: pointers and values on disk, contexts fetched from the corpus on demand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tl_contextmix.adapters import as_view
from tl_contextmix.adapters.dictionaries import Dictionaries
from tl_contextmix.adapters.dictionary_views import with_dictionaries
from tl_contextmix.adapters.inputs import Labels, name_tokens
from tl_contextmix.core.model_view import ModelView
from tl_contextmix.core.validation import FilePath, require_number
from tl_contextmix.engine.memory_coefficients import require_feed_forward
from tl_contextmix.errors import InvalidInput
from tl_contextmix.methods.memories.corpus_arguments import one_layer, require_path
from tl_contextmix.methods.memories.corpus_formats import FILE_KINDS, open_corpus
from tl_contextmix.methods.memories.mined import Mined
from tl_contextmix.methods.memories.miner import tokenizer_hash
from tl_contextmix.methods.memories.store import not_mined, read_manifest, unreadable
from tl_contextmix.methods.memories.trigger_contexts import examples, write_jsonl, write_sheet
from tl_contextmix.methods.memories.trigger_statistics import agreement, patterns, removal, sampled
from tl_contextmix.plotting.panels import Panel, Table
from tl_contextmix.results import LayerFigures, TriggerAgreement, TriggerExamples, TriggerPatterns
from tl_contextmix.results.axes import positions

if TYPE_CHECKING:
    from tl_contextmix.plotting import Page


def load_triggers(
    folder: FilePath,
    *,
    model: object = None,
    corpus: object = None,
    column: str | None = None,
    dictionary: Dictionaries = None,
    labels: Labels | None = None,
) -> Triggers:
    """Reads what `mine_triggers` wrote.

    Args:
        folder: The folder.
        model: The model that was mined, for contexts, agreement and everything else that needs
            its tokenizer or its weights; None: tables only.
        corpus: The corpus, as `mine_triggers` takes it; None: the file it was, if it was a file
            and is still there.
        column: Column of the corpus; None: the one that was mined.
        dictionary: The dictionaries whose features were mined.
        labels: Names of the token ids, see `Inputs`.

    Raises:
        FileFormatError: If the folder holds no finished run.
        InvalidInput: If the model or its tokenizer is another one.
    """
    folder = require_path(folder)
    manifest = read_manifest(folder)
    run = manifest["run"]
    opened = None
    if corpus is not None:
        opened = open_corpus(corpus, column, default=run["corpus"]["column"])
    elif run["corpus"]["kind"] in FILE_KINDS and Path(run["source"]["corpus"]).is_file():
        opened = open_corpus(run["source"]["corpus"], column, default=run["corpus"]["column"])
    view = None
    if model is not None:
        whole = with_dictionaries(as_view(model), dictionary)
        view = name_tokens(_require_mined(whole, manifest, folder), labels)
    return Triggers(folder, manifest, view, opened, model)


@dataclass(frozen=True, eq=False, repr=False)
class Triggers(Mined):
    """The triggers of every memory that was mined.

    Attributes:
        folder: Where they are; ``triggers.parquet`` in it is for any reader of Parquet.
        manifest: What was mined, how, and what was skipped.
        view: The model, or None.
        corpus: The corpus, or None.
        model: The model of the view, which does not keep it alive.
    """

    def panels(self) -> tuple[Panel, ...]:
        """Returns what was mined, how, and from how much; `show` has the triggers of a memory."""
        run = self.manifest["run"]
        rows = {
            "model": run["model"],
            "layers": ", ".join(map(str, self.layers)),
            "triggers of each memory": self.k,
            "tails": ", ".join(self.tails),
            **self.manifest["counts"],
        }
        caption = f"In {self.folder}. show(layer, neuron) has the triggers of one memory."
        return (Table("Mined triggers", caption, ("what", "value"), tuple(rows.items())),)

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
        view, tail = self.require_view(), self.known_tail(tail)
        block = view.stacks[self.stack][one_layer(layer, self.layers)]
        neuron = require_number("neuron", neuron, 0)
        frame = self.to_dataframe(block.layer, neuron, tail)
        return examples(
            self, block, neuron, tail, frame if k is None else frame.head(require_number("k", k))
        )

    def show(
        self, layer: int, neuron: int, *, tail: str | None = None, k: int | None = None
    ) -> Page:
        """Returns a page with the triggers of one memory; see `examples`."""
        return self.examples(layer, neuron, tail=tail, k=k).show()

    def agreement(self, tail: str | None = None) -> TriggerAgreement:
        r"""Returns whether values promote what follows their triggers (2021, section 4).

        .. math:: \mathrm{top}(v_i) = w_i

        for the token :math:`w_i` after the first trigger of memory ``i``, the rank of
        :math:`w_i` among the tokens the value promotes, and the share of all triggers that are
        followed by :math:`\mathrm{top}(v_i)` (precision). No forward pass: ``2 N d_model d_vocab``
        operations for N memories.

        Args:
            tail: Tail; None for the first that was mined.

        Raises:
            InvalidInput: If the model is not at hand, or reads no next token.
            UnsupportedModel: If it has no vocabulary readout.
        """
        self.require_view()
        return agreement(self, self.known_tail(tail))

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
        Chance is the share of all prefixes that have it, in a thousand documents of the corpus
        (all of a smaller one).

        Args:
            layer: Layer; None for all.
            neurons: Neuron or neurons; None for all that were mined.
            tail: Tail; None for the first that was mined.

        Raises:
            InvalidInput: If they were not mined, or model or corpus are not at hand.
        """
        view, tail = self.require_view(), self.known_tail(tail)
        frame = self.to_dataframe(layer, None, tail)
        if neurons is not None:
            size = require_feed_forward(view.stacks[self.stack][self.layers[0]]).width
            chosen = set(positions("neuron", neurons, range(size)))
            absent = sorted(chosen.difference(*self.manifest["neurons"].values()))
            if absent:
                raise not_mined("neuron", absent[0], "neurons that were mined")
            frame = frame[frame["neuron"].isin(chosen)]
        return patterns(self, tail, frame)

    def removal(
        self, *, per_layer: int = 100, k: int = 50, tail: str | None = None, seed: int = 0
    ) -> LayerFigures:
        """Returns how coefficients change when a token of a trigger is removed (2021, section 3.2).

        The relative change ``(m' - m) / m`` at the end of a prefix without its first, last or a
        random token, per layer. Causal models; without its last token a prefix has been computed
        already, so that takes no pass of its own. Prefixes of one token are omitted.

        Args:
            per_layer: Memories of each layer, drawn by their numbers and the seed.
            k: Triggers of each.
            tail: Tail; None for the first that was mined.
            seed: Of the draws.

        Raises:
            InvalidInput: If the model reads both ways, or model or corpus are not at hand.
        """
        self.require_view()
        frame = self.to_dataframe(tail=self.known_tail(tail))
        return removal(self, sampled(frame, per_layer, k, seed), seed)

    def to_jsonl(
        self,
        path: str | Path,
        *,
        layer: int | None = None,
        neuron: int | None = None,
        tail: str | None = None,
    ) -> Path:
        """Writes triggers as JSON lines in the form of Neuronpedia's activations.

        One object per trigger: modelId, layer, index, tokens, values along them and their extremes,
        dataIndex, and the trigger's place among the tokens (qualifyingTokenIndex). A path that
        ends in ``.gz`` is compressed.

        Args:
            path: The file. It appears once it is complete.
            layer: Layer; None for all.
            neuron: Neuron; None for all.
            tail: Tail; None for all.

        Raises:
            InvalidInput: If model or corpus are not at hand, or the file cannot be written.
        """
        self.require_view()
        return write_jsonl(self, require_path(path), self.to_dataframe(layer, neuron, tail))

    def to_sheet(
        self,
        path: str | Path,
        *,
        per_layer: int = 10,
        k: int = 25,
        tail: str | None = None,
        seed: int = 0,
    ) -> Path:
        """Writes a sheet (CSV) on which humans note what triggers have in common, as in the paper.

        One row per trigger of ten memories of each layer, with empty columns for four patterns.
        Text that a spreadsheet would run as a formula is quoted.

        Args:
            path: The file. It appears once it is complete.
            per_layer: Memories of each layer, drawn by their numbers and the seed.
            k: Triggers of each.
            tail: Tail; None for the first that was mined.
            seed: Of the draw.

        Raises:
            InvalidInput: If model or corpus are not at hand, or the file cannot be written.
        """
        self.require_view()
        frame = self.to_dataframe(tail=self.known_tail(tail))
        return write_sheet(self, require_path(path), sampled(frame, per_layer, k, seed))


def _require_mined(view: ModelView, manifest: dict[str, Any], folder: Path) -> ModelView:
    run = manifest["run"]
    if view.fingerprint != run["weights"]:
        raise InvalidInput(
            "the triggers are those of another model",
            f"{view.name} with weights {view.fingerprint}",
            f"{run['model']} with weights {run['weights']}",
            "Pass the model that was mined.",
        )
    if tokenizer_hash(view, run["options"]["prepend_bos"]) != run["tokenizer"]:
        raise InvalidInput(
            "the triggers were mined with another tokenizer",
            f"the one of {view.name} as it is now",
            "the tokenizer that mined them",
            "Restore the tokenizer it was mined with.",
        )
    if view.dictionaries != tuple(run.get("dictionaries", ())):
        raise InvalidInput(
            "the triggers are those of other features",
            f"dictionary: {list(view.dictionaries) or None}",
            f"{run.get('dictionaries') or None}",
            "Pass the dictionaries that were mined.",
        )
    blocks = view.stacks.get(run["options"]["stack"], ())
    for layer, neurons in manifest["neurons"].items():
        known = blocks[int(layer)].memories if int(layer) < len(blocks) else None
        if known is None or max(neurons) >= known.width:
            raise unreadable(folder, f"layers or neurons that {view.name} does not have")
    return view
