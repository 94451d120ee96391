"""How a decoder judges a given answer, or a few next tokens, from each encoder layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int

from tl_contextmix.core.text_metrics import metric_items, ratio
from tl_contextmix.core.validation import require_choice
from tl_contextmix.errors import InvalidInput
from tl_contextmix.plotting.panels import Bars, Heatmap, Panel
from tl_contextmix.results import storage
from tl_contextmix.results.axes import positions
from tl_contextmix.results.curves import (
    LayerCurves,
    as_texts,
    category_groups,
    curve_point,
    require_no_whole,
)
from tl_contextmix.results.labelled_arrays import LabelledArray
from tl_contextmix.results.labels import Provenance, Tokens

LIKELIHOOD_METRICS = ("gold NLL", "KL", "accuracy", "MRR")


@storage.storable
@dataclass(frozen=True, eq=False, repr=False)
class LayerwiseLikelihood(LabelledArray):
    """How the decoder judges each token of a given answer, from each encoder layer.

    Attributes:
        log_probs: Log-probability of each token given those before it, in nats; 0 at padding.
        kl: Kullback-Leibler divergence of the last layer's next-token distribution from this
            layer's, KL(last || layer), in nats; 0 at padding.
        ranks: How many tokens are more probable than the right one; 0 at padding.
        predictions: The most probable token.
        strings: The most probable token as text.
        layers: Number of each layer; 0 is the embeddings.
        target: The tokens of the answer, from the first one that is predicted to the end token.
        inputs: The inputs as text; empty for audio.
        provenance: Where it comes from.
    """

    LABELS = {"batch": "inputs", "layer": "layers", "pos": "target"}
    COLUMNS = {"log_prob": "log_probs", "kl": "kl", "rank": "ranks"}
    TEXTS = {"strings": ("batch", "layer", "pos")}

    log_probs: Float[torch.Tensor, "batch layer pos"]
    kl: Float[torch.Tensor, "batch layer pos"]
    ranks: Int[torch.Tensor, "batch layer pos"]
    predictions: Int[torch.Tensor, "batch layer pos"]
    strings: tuple[tuple[tuple[str, ...], ...], ...]
    layers: tuple[int, ...]
    target: Tokens
    inputs: tuple[str, ...]
    provenance: Provenance

    def metrics(
        self,
        *,
        metric: str | Sequence[str] | Mapping[str, str] | None = None,
        categories: Sequence[str] | Sequence[Sequence[str]] | None = None,
    ) -> LayerCurves:
        """Returns ``gold NLL``, ``KL``, ``accuracy`` and ``MRR`` per token, with 95 % intervals.

        Sums over tokens divided by their number; sentences are resampled. Accuracy: the share of
        tokens that are the most probable ones. MRR: the mean of 1 / rank of the right token.

        Args:
            metric: One or several of these names, or a mapping from your own to them; None for
                all.
            categories: A category per sentence, or per token of every sentence (its first tokens;
                those that are not named, such as the end token, count for all only).

        Raises:
            InvalidInput: If a metric is unknown or categories do not fit the sentences.
        """
        names = metric_items(LIKELIHOOD_METRICS if metric is None else metric)
        for what in names.values():
            require_choice("metric", what, LIKELIHOOD_METRICS)
        chosen_tokens = _token_categories(categories, self.target)
        figures = {
            "gold NLL": -self.log_probs,
            "KL": self.kl,
            "accuracy": (self.ranks == 0).to(self.log_probs),
            "MRR": 1 / (1 + self.ranks.to(self.log_probs)),
        }
        points = []
        for name, what in names.items():
            values = figures[str(what)]
            for category, chosen in chosen_tokens.items():
                sums = (values * chosen[:, None]).sum(-1)
                totals = chosen.sum(-1)
                kept = totals > 0
                for place, layer in enumerate(self.layers):
                    counts = torch.stack([sums[:, place], totals.to(sums)], 1)[kept]
                    points.append(curve_point(name, ratio, category, layer, counts.tolist()))
        return LayerCurves(
            points=tuple(points),
            title="What the decoder makes of the answer after each encoder layer",
            caption="Layer 0: the embeddings. Per token. Gold NLL: the negative log-likelihood of "
            "the answer; KL: the Kullback-Leibler divergence of the last layer's prediction from "
            "this one's (both in nats); MRR: the mean reciprocal rank of the answer.",
            provenance=self.provenance,
        )

    def first_correct_layer(self) -> Int[torch.Tensor, "batch pos"]:
        """Returns per token the first layer at which it is the most probable; -1: no layer.

        The first of the layers that were asked; a later one may lose it again. -1 at padding.
        """
        right = (self.ranks == 0) & self.target.mask[:, None]
        first = right.int().argmax(1)
        numbers = torch.tensor(self.layers)[first]
        return numbers.masked_fill(~right.any(1), -1)

    def _columns(self) -> dict[str, Any]:
        import numpy as np

        words = np.array(self.strings, dtype=object).reshape(self.log_probs.shape)
        return {**super()._columns(), "prediction": words}

    def panels(self) -> tuple[Panel, ...]:
        """Returns one map per sentence: probability of each token, layer by layer."""
        found = []
        for row, given in enumerate(self.inputs):
            real = self.target.mask[row].nonzero()[:, 0].tolist()
            values = self.log_probs[row][:, real].exp().detach().cpu()
            found.append(
                Heatmap(
                    title=f"Answer to: {given or f'input {row}'}",
                    caption="Probability of each token of the answer, given those before it, when "
                    "the decoder reads this encoder layer.",
                    values=values[None],
                    sheets=("probability",),
                    rows=tuple(f"layer {layer}" for layer in self.layers),
                    columns=tuple(self.target.strings[row][place] for place in real),
                    unit="probability",
                    axes=("encoder layer", "token of the answer"),
                )
            )
        return tuple(found)


@storage.storable
@dataclass(frozen=True, eq=False, repr=False)
class LayerwiseScores(LabelledArray):
    """Scores of a few next tokens, from each encoder layer.

    Attributes:
        logits: Their logits.
        log_probs: Their log-probabilities among all tokens, in nats.
        tokens: Their ids.
        strings: The same as text.
        layers: Number of each layer; 0 is the embeddings.
        inputs: The inputs as text; empty for audio.
        provenance: Where it comes from.
    """

    LABELS = {"batch": "inputs", "layer": "layers", "token": "strings"}
    COLUMNS = {"logit": "logits", "log_prob": "log_probs"}
    TEXTS = {"tokens": ("token",)}

    logits: Float[torch.Tensor, "batch layer token"]
    log_probs: Float[torch.Tensor, "batch layer token"]
    tokens: tuple[int, ...]
    strings: tuple[str, ...]
    layers: tuple[int, ...]
    inputs: tuple[str, ...]
    provenance: Provenance

    def difference(
        self, right: int | str = 0, wrong: int | str = 1
    ) -> Float[torch.Tensor, "batch layer"]:
        """Returns the logit of one of the tokens minus that of another, by place or as text.

        Raises:
            InvalidInput: If one of them was not scored.
        """
        places = positions("token", [right, wrong], self.strings)
        one, other = (self.logits[..., place] for place in places)
        return one - other

    def panels(self) -> tuple[Panel, ...]:
        """Returns one chart per sentence: probabilities by layer."""
        chances = self.log_probs.exp().detach().cpu()
        return tuple(
            Bars(
                title=f"Next token after: {given or f'input {row}'}",
                caption="Probability when the decoder reads this encoder layer.",
                labels=tuple(f"layer {layer}" for layer in self.layers),
                series=tuple(
                    (string, tuple(chances[row, :, place].tolist()))
                    for place, string in enumerate(self.strings)
                ),
                unit="probability",
                axis="layer",
            )
            for row, given in enumerate(self.inputs)
        )


def _token_categories(categories: Any, target: Tokens) -> dict[str, torch.Tensor]:
    """Returns which tokens belong to each category, and which are real."""
    real = target.mask.cpu()
    if not by_token(categories):
        groups = category_groups(categories, len(real))
        chosen = {name: torch.zeros_like(real) for name in groups}
        for name, rows in groups.items():
            chosen[name][rows] = real[rows]
        return chosen
    assert isinstance(categories, Sequence)
    rows = [as_texts(row, "categories") for row in categories]
    lengths = real.sum(1).tolist()
    if len(rows) != len(real) or any(
        len(row) > length for row, length in zip(rows, lengths, strict=False)
    ):
        raise InvalidInput(
            "categories do not fit the answers",
            f"{len(rows)} lists, of {[len(row) for row in rows][:5]} categories",
            f"{len(real)} lists, of at most {lengths[:5]}",
            "Give a category per token from the first one; the end token is optional.",
        )
    chosen = {"all": real}
    for row, names in enumerate(rows):
        require_no_whole(names)
        for place, name in enumerate(names):
            chosen.setdefault(name, torch.zeros_like(real))[row, place] = True
    return chosen


def by_token(categories: Any) -> bool:
    """Whether categories are those of tokens: a list of lists."""
    listed = isinstance(categories, Sequence) and not isinstance(categories, str)
    return listed and any(not isinstance(one, str) for one in categories)
