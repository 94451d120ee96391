"""Whether a prediction falls when some positions can no longer attend to others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int

from tl_contextmix.plotting.panels import Curves, Heatmap, Panel
from tl_contextmix.results import storage
from tl_contextmix.results.axes import as_array
from tl_contextmix.results.labelled_arrays import LabelledArray
from tl_contextmix.results.labels import Provenance, Tokens, asked_words

if TYPE_CHECKING:
    import pandas

# More lines than this in one chart cannot be told apart.
_CURVES = 8


@storage.storable
@dataclass(frozen=True, eq=False)
class AttentionKnockout(LabelledArray):
    """The answer's probability with the attention edges of each window, head and source group cut.

    Rows are predictions, as in `LogProbContributions`.

    Attributes:
        log_probs: Log-probability of the target with the edges cut; with a foil less the foil's.
        probs: Its probability with the edges cut; with a foil less the foil's.
        log_prob: Log-probability of the target, less the foil's, as the model is.
        prob: Its probability, less the foil's, as the model is.
        layers: The layer in the middle of each window.
        windows: The layers that are cut together, of each window.
        heads: Label of each group of heads; ``("all",)`` where all are cut together.
        source: The groups of tokens that were cut off: names, or texts.
        stack: Whose attention was cut: ``"decoder"``, ``"encoder"`` or ``"cross"``.
        pos: Position of each prediction.
        target: The predicted token of each row; alternatives side by side.
        provenance: Where the numbers come from.
        foil: What the target is contrasted with, or None.
        sentence: Row of the input of each prediction.
    """

    LABELS = {"layer": "layers", "head": "heads", "source": "source"}
    COLUMNS = {"change": "changes", "log_prob": "log_probs", "prob": "probs"}
    SUBTRACTED = ("log_probs", "probs", "log_prob", "prob")
    TEXTS = {"windows": ("layer",)}
    BY_SIZE = True

    log_probs: Float[torch.Tensor, "batch layer head source"]
    probs: Float[torch.Tensor, "batch layer head source"]
    log_prob: Float[torch.Tensor, " batch"]
    prob: Float[torch.Tensor, " batch"]
    layers: tuple[int, ...]
    windows: tuple[tuple[int, ...], ...]
    heads: tuple[str, ...]
    source: Tokens
    stack: str
    pos: Int[torch.Tensor, " batch"]
    target: Tokens
    provenance: Provenance
    foil: Tokens | None
    sentence: Int[torch.Tensor, " batch"]

    @property
    def changes(self) -> Float[torch.Tensor, "batch layer head source"]:
        """How much the log-probability, or with a foil the log-odds, changes: nats."""
        return self.log_probs - self.log_prob[:, None, None, None]

    @property
    def relative(self) -> Float[torch.Tensor, "batch layer head source"]:
        """Change of the probability, as a share of what it is without a cut (2023, Figure 2)."""
        whole = self.prob[:, None, None, None]
        return (self.probs - whole) / whole.abs()

    def asked(self, row: int = 0, quote: Callable[[str], str] = repr) -> str:
        """Returns what a row is about, such as ``' are' rather than ' is'``.

        Args:
            row: The row.
            quote: Puts a token in quotes.
        """
        return asked_words(self.target, self.foil, row, quote)

    @property
    def sentences(self) -> tuple[str, ...]:
        """What matters most for each prediction, in words."""
        found = []
        for row in range(len(self.log_prob)):
            some = self.select(batch=row)
            best = some.top(1)
            if not best or best[0]["change"] == 0:
                found.append(f"No cut changes {self.asked(row)}.")
                continue
            one = best[0]
            window = some.windows[some.layers.index(int(one["layer"]))]
            heads = "" if one["head"] == "all" else f", head {one['head']}"
            what = f"attention to {one['source_token']!r} in {_layers(window)}{heads}"
            of = f"the {self._quantity} of {self.asked(row)}"
            verb = "lowers" if one["change"] < 0 else "raises"
            text = f"Cutting {what} {verb} {of} most"
            if self.is_difference:
                text = f"The effect of cutting {what} on {of} differs most"
            found.append(f"{text}: {one['change']:+.2f} nats.")
        return tuple(found)

    @property
    def _quantity(self) -> str:
        return "log-probability" if self.foil is None else "log-odds"

    def __repr__(self) -> str:
        return "\n".join([super().__repr__(), *(f"  {text}" for text in self.sentences[:3])])

    def to_dataframe(self) -> pandas.DataFrame:
        """Returns one row per number, with labels; padding is omitted.

        Columns: batch (the prediction), its sentence in the input and its position, the other axes,
        the source's text, the numbers.
        """
        frame = super().to_dataframe()
        for place, name in enumerate(("sentence", "pos"), 1):
            frame.insert(place, name, as_array(getattr(self, name))[frame.batch])
        return frame

    def panels(self) -> tuple[Panel, ...]:
        """Returns, for each prediction, curves over layers, one for each source group.

        As in Geva et al. (2023, Figure 2) they show the relative change of the probability; with a
        foil, and in a difference, nats. Many groups, or a single window, are a map instead.
        """
        percent = self.foil is None and not self.is_difference
        values = 100 * self.relative if percent else self.changes
        unit = "change of probability, %" if percent else f"change of {self._quantity}, nats"
        found: list[Panel] = []
        for row, text in enumerate(self.sentences):
            title = f"Attention knockout for {self.asked(row)}"
            labels = tuple(map(_layers, self.windows))
            groups = self.source.mask[row].nonzero()[:, 0].tolist()
            lines = values[row].detach().cpu()[:, :, groups].movedim(1, 0)
            names = tuple(self._name(row, group) for group in groups)
            if len(labels) == 1 or len(groups) > _CURVES:
                caption = f"{text} Rows: the layers that are cut together; columns: sources."
                sheets = tuple("all heads" if h == "all" else f"head {h}" for h in self.heads)
                panel = Heatmap(title, caption, lines, sheets, labels, names, unit=unit)
                found.append(replace(panel, axes=("layers that are cut", "source")))
                continue
            for head, some in zip(self.heads, lines, strict=True):
                which = "" if len(self.heads) == 1 else f", head {head}"
                series = zip(names, map(tuple, some.T.tolist()), strict=True)
                caption = f"{text} A line for each group of tokens that is not attended to."
                heading = title + which
                found.append(Curves(heading, caption, labels, tuple(series), unit, axis="layers"))
        return tuple(found)

    def _name(self, row: int, group: int) -> str:
        """Returns the label of a source group; a token that occurs twice has its position."""
        words = self.source.strings[row]
        twice = words.count(words[group]) > 1
        return f"{words[group]} ({self.source.labels()[group]})" if twice else words[group]


def _layers(window: tuple[int, ...]) -> str:
    """Returns the layers of a window in words."""
    if len(window) == 1:
        return f"layer {window[0]}"
    if window == (*range(window[0], window[-1] + 1),):
        return f"layers {window[0]}-{window[-1]}"
    return f"layers {', '.join(map(str, window))}"
