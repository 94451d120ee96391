"""Which tokens of an answer depend on the context, and on which part of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float

from tl_contextmix.plotting.panels import ColoredText, Heatmap, Panel, Table
from tl_contextmix.results import storage
from tl_contextmix.results.headings import in_plain_words
from tl_contextmix.results.labelled_arrays import LabelledArray
from tl_contextmix.results.labels import Provenance, Tokens
from tl_contextmix.results.row_tables import token_at

_METRICS = {"kl": "KL divergence", "pcxmi": "gain in log-probability"}


@storage.storable
@dataclass(frozen=True, eq=False)
class ContextReliance(LabelledArray):
    """How much each token of an answer depends on the context, and on which of its passages.

    Attributes:
        scores: How much each answer token depends on each passage of the context, see `by`.
        kl: Divergence of the predictions with the context from those without, in nats.
        log_prob: Log-probability of each answer token with the context.
        log_prob_without: The same without.
        flagged: Which tokens the metric calls dependent on the context; the others are kept.
        target: The tokens of the answer.
        without: The most probable token without the context, in each place of the answer.
        source: The passages, or tokens, of the context.
        by: How passages were scored: ``"gradient_x_input"``, ``"attention_knockout"`` or
            ``"value_zeroing"``.
        metric: What was held against the threshold: ``"kl"`` or ``"pcxmi"``.
        provenance: Where the numbers come from.
    """

    LABELS = {"target": "target", "source": "source"}
    COLUMNS = {"score": "scores"}
    TEXTS = {"without": ("batch", "target")}
    BY_SIZE = True
    CHOICES = {
        "by": ("gradient_x_input", "attention_knockout", "value_zeroing"),
        "metric": ("kl", "pcxmi"),
    }

    scores: Float[torch.Tensor, "batch target source"]
    kl: Float[torch.Tensor, "batch target"]
    log_prob: Float[torch.Tensor, "batch target"]
    log_prob_without: Float[torch.Tensor, "batch target"]
    flagged: Bool[torch.Tensor, "batch target"]
    target: Tokens
    without: tuple[tuple[str, ...], ...]
    source: Tokens
    by: str
    metric: str
    provenance: Provenance

    @property
    def pcxmi(self) -> Float[torch.Tensor, "batch target"]:
        """Pointwise cross-mutual information: what the context adds to the log-probability."""
        return self.log_prob - self.log_prob_without

    @property
    def sentences(self) -> tuple[str, ...]:
        """What each flagged token depends on, in words."""
        found = []
        for place in self.flagged[0].nonzero()[:, 0].tolist():
            word, instead = self.target.strings[0][place], self.without[0][place]
            preference = (
                "the model prefers the same" if instead == word else f"it prefers {instead!r}"
            )
            best = self.source.strings[0][int(self.scores[0, place].argmax())]
            found.append(
                f"{word!r} depends on the context (KL divergence "
                f"{float(self.kl[0, place]):.2f} nats; without it {preference}), most on {best!r}."
            )
        return tuple(found)

    def _columns(self) -> dict[str, Any]:
        names = ("kl", "log_prob", "log_prob_without", "flagged")
        return {**{name: getattr(self, name)[:, :, None] for name in names}, **super()._columns()}

    def __repr__(self) -> str:
        return "\n".join([super().__repr__(), *(f"  {text}" for text in self.sentences[:5])])

    def panels(self) -> tuple[Panel, ...]:
        """Returns the answer by its dependence, its tokens as a table, and the map of passages."""
        words, sources = self.target.strings[0], self.source.strings[0]
        value = self.kl if self.metric == "kl" else self.pcxmi
        rows = [
            (
                token_at(word, int(self.target.positions()[0, place])),
                float(self.kl[0, place]),
                float(self.log_prob[0, place]),
                float(self.log_prob_without[0, place]),
                self.without[0][place],
                bool(self.flagged[0, place]),
                sources[int(self.scores[0, place].argmax())],
            )
            for place, word in enumerate(words)
        ]
        names = ("token", "KL divergence", "log p", "log p without", "best without")
        names += ("flagged", "most on")
        return (
            ColoredText(
                title="Which tokens depend on the context",
                caption=" ".join(self.sentences) or "None is flagged.",
                tokens=words,
                values=tuple(value[0].tolist()),
                unit=f"{_METRICS[self.metric]}, nats",
            ),
            Table(
                title="The answer with the context and without",
                caption="Nats. KL divergence: how far the prediction with the context is from the "
                f"one without (Kullback-Leibler). Flagged by {_METRICS[self.metric]}; no token is "
                "omitted.",
                columns=names,
                rows=tuple(rows),
            ),
            Heatmap(
                title=f"What the answer depends on, by {in_plain_words(self.by)}",
                caption="Rows: tokens of the answer. Columns: passages of the context.",
                values=self.scores.detach().cpu(),
                sheets=("answer",),
                rows=words,
                columns=sources,
                unit=self.unit,
                axes=("token of the answer", "passage of the context"),
            ),
        )

    @property
    def unit(self) -> str:
        """Unit of the scores."""
        return UNITS[self.by]


UNITS = {
    "gradient_x_input": "log odds, to first order",
    "attention_knockout": "drop in log odds, nats",
    "value_zeroing": "cosine distance",
}
"""How passages may be scored, and in which unit."""
