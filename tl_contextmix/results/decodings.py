"""What a decoder says after each encoder layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int

from tl_contextmix.core.text_metrics import (
    DEFAULT_METRICS,
    UNREFERENCED_METRICS,
    Metric,
    MetricChoice,
    Output,
    UserMetric,
    make_metrics,
    metric_items,
    words,
)
from tl_contextmix.errors import InvalidInput
from tl_contextmix.plotting.panels import Panel, Table
from tl_contextmix.results import storage
from tl_contextmix.results.curves import LayerCurves, as_texts, category_groups, curve_point
from tl_contextmix.results.labelled_arrays import LabelledArray
from tl_contextmix.results.labels import Provenance

if TYPE_CHECKING:
    import pandas


@storage.storable
@dataclass(frozen=True, eq=False)
class LayerwiseDecoding(LabelledArray):
    """What the decoder said from each encoder layer, sentence by sentence.

    Attributes:
        ids: The tokens said, the end token among them; padding after it.
        mask: True up to the end token.
        log_probs: Log-probability of each token, in nats; 0 at padding.
        finished: Whether the end token was reached; False where the length ran out.
        content: True at tokens that are text: no end, no padding, no other special token.
        strings: The tokens as text.
        texts: The outputs as text, by sentence and layer.
        layers: Number of each layer; 0 is the embeddings.
        depth: Number of the last encoder layer, L.
        inputs: The inputs as text; empty for audio.
        references: The right answers, or None.
        provenance: Where it comes from.
    """

    LABELS = {"batch": "inputs", "layer": "layers"}
    COLUMNS = {"log_prob": "output_log_probs"}
    ARRAY = "log_probs"
    TEXTS = {
        "strings": ("batch", "layer", "pos"),
        "texts": ("batch", "layer"),
        "references": ("batch",),
    }

    ids: Int[torch.Tensor, "batch layer pos"]
    mask: Bool[torch.Tensor, "batch layer pos"]
    log_probs: Float[torch.Tensor, "batch layer pos"]
    finished: Bool[torch.Tensor, "batch layer"]
    content: Bool[torch.Tensor, "batch layer pos"]
    strings: tuple[tuple[tuple[str, ...], ...], ...]
    texts: tuple[tuple[str, ...], ...]
    layers: tuple[int, ...]
    depth: int
    inputs: tuple[str, ...]
    references: tuple[str, ...] | None
    provenance: Provenance

    def __repr__(self) -> str:
        lines = [f"LayerwiseDecoding: batch {len(self.inputs)}, layer {len(self.layers)}"]
        for layer, text in zip(self.layers, self.texts[0], strict=True):
            lines.append(f"  batch 0, layer {layer}: {text!r}")
        return "\n".join(lines)

    @property
    def truncated(self) -> Bool[torch.Tensor, "batch layer"]:
        """Whether the length ran out before the end token came."""
        return ~self.finished

    @property
    def output_log_probs(self) -> Float[torch.Tensor, "batch layer"]:
        """Log-probability of each whole output, end token included."""
        return self.log_probs.sum(-1)

    @property
    def probabilities(self) -> Float[torch.Tensor, "batch layer"]:
        """Probability of each whole output, end token included."""
        return self.output_log_probs.exp()

    def first_correct_layer(
        self, references: str | Sequence[str] | None = None
    ) -> tuple[int | None, ...]:
        """Returns per sentence the first layer whose output is the reference; None: no layer.

        The first of the layers that were decoded. Words are compared, not the blanks between them.
        A later layer may lose it again.

        Raises:
            InvalidInput: If there are no references, or not one per sentence.
        """
        right = self._references(references, needed=True)
        assert right is not None
        found = []
        for texts, reference in zip(self.texts, right, strict=True):
            same = [words(text) == words(reference) for text in texts]
            found.append(self.layers[same.index(True)] if True in same else None)
        return tuple(found)

    def first_stable_layer(self) -> tuple[int, ...]:
        """Returns per sentence the first layer from which on the output is the last layer's.

        The first of the layers that were decoded.

        Raises:
            InvalidInput: If the last layer is not among the layers, or one before it is missing:
                its output may be another one.
        """
        if not self._complete:
            raise _no_final_output()
        if self.layers != tuple(range(self.layers[0], self.depth + 1)):
            raise InvalidInput(
                "it is not known from which layer on the output stays the same",
                f"layers {list(self.layers)}",
                f"every layer from the first of them to {self.depth}",
                "Decode those between them too (layer=None decodes all).",
            )
        found, last = [], len(self.layers) - 1
        for row in range(len(self.inputs)):
            tokens = [self._tokens(row, place, self.mask) for place in range(last + 1)]
            other = [place for place in range(last) if tokens[place] != tokens[last]]
            found.append(self.layers[1 + max(other, default=-1)])
        return tuple(found)

    def metrics(
        self,
        reference: str | Sequence[str] | None = None,
        *,
        metric: MetricChoice | None = None,
        categories: Sequence[str] | None = None,
    ) -> LayerCurves:
        """Returns figures by layer over the sentences, with 95 % bootstrap intervals.

        ``exact match``, ``token accuracy`` (words at their place), ``BLEU``, ``chrF``, ``WER``,
        ``CER`` and ``length ratio`` (each of the corpus: of sums over its sentences, which the
        bootstrap draws) need a reference; ``edit distance`` (in tokens, to the last layer's
        output), ``repetition`` (share of repeated bigrams), ``empty`` and ``truncated`` (shares of
        outputs) do not.

        Args:
            reference: The right answer of each sentence; None for those given to `decoder_lens`.
            metric: A name or a function of output, reference and source, several of them, or a
                mapping from names of your own to them; None for all that need no further package.
                A function's NaN leaves the sentence out of its figure.
            categories: A category per sentence, as a list or a column of a table: figures for
                each, beside those for all.

        Raises:
            InvalidInput: If a metric is unknown, lacks its reference or gives no number, or
                lengths do not fit.
            ContextMixError: If a metric's package is not installed.
        """
        chosen, outputs = self._measured(reference, metric)
        groups = category_groups(categories, len(self.inputs))
        points = [
            curve_point(
                one.name, one.figure, name, layer, [one.counts(column[row]) for row in rows]
            )
            for one in chosen
            for name, rows in groups.items()
            for layer, column in zip(self.layers, outputs, strict=True)
        ]
        return LayerCurves(
            points=tuple(points),
            title="What the decoder says after each encoder layer",
            caption="Layer 0: the embeddings. Means or sums over sentences.",
            provenance=self.provenance,
        )

    def sentence_metrics(
        self, reference: str | Sequence[str] | None = None, *, metric: MetricChoice | None = None
    ) -> pandas.DataFrame:
        """Returns the figures of `metrics` sentence by sentence.

        As columns ``batch``, ``layer``, ``quantity`` and ``value``, which
        `tl_contextmix.evaluation.over_corpus` averages. A figure of the corpus (BLEU) is no mean of
        those of its sentences.

        Args:
            reference: See `metrics`.
            metric: Likewise.

        Raises:
            InvalidInput: Likewise.
            ContextMixError: Likewise.
        """
        import pandas

        chosen, outputs = self._measured(reference, metric)
        rows = [
            (row, layer, one.name, one.figure(counts) if any(counts) else float("nan"))
            for one in chosen
            for layer, column in zip(self.layers, outputs, strict=True)
            for row, output in enumerate(column)
            for counts in [one.counts(output)]
        ]
        return pandas.DataFrame(rows, columns=["batch", "layer", "quantity", "value"])

    def _measured(
        self, reference: str | Sequence[str] | None, metric: MetricChoice | None
    ) -> tuple[list[Metric], list[list[Output]]]:
        """Returns metrics, and the outputs by layer and sentence."""
        right = self._references(reference, needed=False)
        default = UNREFERENCED_METRICS if right is None else DEFAULT_METRICS
        items = metric_items(default if metric is None else metric)
        chosen = require_measurable(items, referenced=right is not None, last=self._complete)
        outputs = [
            [self._output(row, place, right) for row in range(len(self.inputs))]
            for place in range(len(self.layers))
        ]
        return chosen, outputs

    def _columns(self) -> dict[str, Any]:
        import numpy as np

        return {
            "input": np.array(self.inputs, dtype=object)[:, None],
            "output": np.array(self.texts, dtype=object),
            "log_prob": self.output_log_probs,
            "tokens": self.mask.sum(-1),
            "truncated": self.truncated,
        }

    def panels(self) -> tuple[Panel, ...]:
        """Returns one table per sentence: layer, output, probability."""
        return tuple(self._table(row) for row in range(len(self.inputs)))

    def _table(self, row: int) -> Table:
        given = self.inputs[row] or f"input {row}"
        reference = "" if self.references is None else f" Right: {self.references[row]}"
        return Table(
            title=f"What the decoder says of: {given}",
            caption="From each encoder layer; 0 is the embeddings. Probability: of the whole "
            f"output, its end included.{reference}",
            columns=("layer", "output", "probability", "ended"),
            rows=tuple(
                (
                    layer,
                    self.texts[row][place] or "(nothing)",
                    float(self.probabilities[row, place]),
                    "yes" if self.finished[row, place] else "cut off",
                )
                for place, layer in enumerate(self.layers)
            ),
        )

    def _tokens(self, row: int, place: int, chosen: torch.Tensor) -> tuple[int, ...]:
        return tuple(self.ids[row, place][chosen[row, place]].tolist())

    def _output(self, row: int, place: int, right: Sequence[str] | None) -> Output:
        return Output(
            text=self.texts[row][place],
            tokens=self._tokens(row, place, self.content),
            finished=bool(self.finished[row, place]),
            final=self._tokens(row, len(self.layers) - 1, self.content),
            reference=None if right is None else right[row],
            source=self.inputs[row],
        )

    def _references(self, given: object, *, needed: bool) -> Sequence[str] | None:
        result = self.references if given is None else as_texts(given, "references")
        if result is None and not needed:
            return None
        if result is None or len(result) != len(self.inputs) or not all(map(words, result)):
            raise InvalidInput(
                "the outputs cannot be compared with a reference",
                "none" if result is None else f"{len(result)} references: {list(result)[:3]}",
                f"{len(self.inputs)} references, one per input, each with a word in it",
                "Pass the right answers.",
            )
        return result

    @property
    def _complete(self) -> bool:
        return self.layers[-1] == self.depth


def require_measurable(
    metrics: Mapping[str, str | UserMetric], *, referenced: bool, last: bool
) -> list[Metric]:
    """Returns metrics of an output, checked for what they need: right answers, the last layer."""
    result = make_metrics(metrics)
    lacking = [one.name for one in result if one.referenced and not referenced]
    if lacking:
        raise InvalidInput(
            "this metric compares with a right answer",
            f"{', '.join(lacking)} without references",
            "one reference per input",
            "Pass references=.",
        )
    if "edit distance" in metrics.values() and not last:
        raise _no_final_output()
    return result


def _no_final_output() -> InvalidInput:
    return InvalidInput(
        "the outputs cannot be compared with the final one",
        "layers without the last one",
        "the last encoder layer among them",
        "Decode it too (layer=None decodes all).",
    )
