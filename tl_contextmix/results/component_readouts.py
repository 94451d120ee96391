"""Which tokens a component speaks for: its vector, read through the vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int

from tl_contextmix.plotting.panels import Panel
from tl_contextmix.results import storage
from tl_contextmix.results.axes import as_array
from tl_contextmix.results.component_sets import ComponentSet, component_table
from tl_contextmix.results.components import Components
from tl_contextmix.results.labels import Provenance, Tokens

if TYPE_CHECKING:
    import pandas

Words = tuple[tuple[tuple[str, ...], ...], ...]
_IN_TABLE = 6


@storage.storable
@dataclass(frozen=True, eq=False)
class ComponentReadouts(ComponentSet):
    """The tokens that components raise and lower most, before the softmax.

    Where a component has no score (an empty place, a source that cannot be read), logits are NaN,
    ids -1 and words empty.

    Attributes:
        top_logits: The largest logits of each component's vector, largest first.
        top_ids: Their tokens.
        top_words: The same as text, by sentence and component.
        bottom_logits: The smallest logits, smallest first.
        bottom_ids: Their tokens.
        bottom_words: The same as text.
        components: The components.
        scores: What the components were chosen by.
        unit: What a score is.
        tokens: The tokens of the stack that writes the answer.
        encoder: The tokens of the encoder, or None.
        provenance: Where the numbers come from.
    """

    TEXTS = {
        "top_words": ("batch", "component"),
        "bottom_words": ("batch", "component"),
    }

    top_logits: Float[torch.Tensor, "batch component token"]
    top_ids: Int[torch.Tensor, "batch component token"]
    top_words: Words
    bottom_logits: Float[torch.Tensor, "batch component token"]
    bottom_ids: Int[torch.Tensor, "batch component token"]
    bottom_words: Words
    components: Components
    scores: Float[torch.Tensor, "batch component"]
    unit: str
    tokens: Tokens
    encoder: Tokens | None
    provenance: Provenance

    def __repr__(self) -> str:
        lines = [f"ComponentReadouts: component {self.scores.shape[1]}"]
        for place in self._places(0)[:5]:
            lines.append(f"  {self.components.label(0, place)}: {self._list(0, place, 'top')}")
        return "\n".join(lines)

    def _places(self, row: int) -> list[int]:
        """Returns the places of a sentence that hold a component."""
        return (~self.scores[row].isnan()).nonzero()[:, 0].tolist()

    def to_dataframe(self) -> pandas.DataFrame:
        """Returns one row per component and token: its place, direction, rank, logit."""
        import pandas

        frame = self._frame()
        frame["score"] = as_array(self.scores).reshape(-1)
        count = self.top_ids.shape[2]
        parts = []
        for direction in ("top", "bottom"):
            wide = frame.loc[frame.index.repeat(count)].reset_index(drop=True)
            wide["direction"] = direction
            wide["rank"] = list(range(1, count + 1)) * len(frame)
            words = getattr(self, f"{direction}_words")
            nothing = ("",) * count  # of the empty places that `top` leaves
            wide["token"] = [word for row in words for one in row for word in one or nothing]
            wide["token_id"] = as_array(getattr(self, f"{direction}_ids")).reshape(-1)
            wide["logit"] = as_array(getattr(self, f"{direction}_logits")).reshape(-1)
            parts.append(wide[wide.score.notna()])
        return pandas.concat(parts, ignore_index=True)

    def panels(self) -> tuple[Panel, ...]:
        """Returns one table per sentence."""
        return tuple(
            component_table(
                title="What the components speak for",
                caption="Tokens whose logits a component's own vector raises and lowers most, "
                f"before the softmax. Score: {self.unit}.",
                columns=("component", "source", "score", "raises", "lowers"),
                rows=[
                    (
                        self.components.label(row, place),
                        self._word(self.components.at(row, place), row),
                        float(self.scores[row, place]),
                        self._list(row, place, "top"),
                        self._list(row, place, "bottom"),
                    )
                    for place in self._places(row)
                ],
                signed=("score",),
            )
            for row in range(self.scores.shape[0])
        )

    def _list(self, row: int, place: int, direction: str) -> str:
        words = getattr(self, f"{direction}_words")[row][place][:_IN_TABLE]
        return ", ".join(word.strip() or repr(word) for word in words)
