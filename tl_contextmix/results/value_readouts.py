"""What the value vectors of feed-forward sublayers say about the vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int

from tl_contextmix.errors import InvalidInput
from tl_contextmix.plotting.panels import Panel, Table
from tl_contextmix.results import storage
from tl_contextmix.results.axes import as_array
from tl_contextmix.results.base import Result
from tl_contextmix.results.labels import Provenance

if TYPE_CHECKING:
    import pandas

_SIDES = ("v", "-v")


@storage.storable
@dataclass(frozen=True, eq=False)
class ValueReadouts(Result):
    """What values promote and demote, one row per value.

    A memory with a negative coefficient promotes what its value demotes: side 1 is about the
    vector times -1.

    Attributes:
        layer: Layer of each value.
        neuron: Its neuron.
        ids: Tokens with the highest logits of ``v`` (side 0) and of ``-v`` (side 1), highest first.
        logits: Logits of ``v`` at these tokens; on side 1 lowest first.
        max_prob: Probability of the first of them, in the softmax of ``v`` and of ``-v``.
        entropy: Entropy of the softmax of either, in nats.
        norm: Length of the value.
        words: Text of each token that occurs, by its id.
        provenance: Where it comes from.
        expert: Which expert each value belongs to, in mixtures of experts; else None.
    """

    LABELS = {"side": _SIDES}
    NAMED = {"ids": "words"}

    layer: Int[torch.Tensor, " value"]
    neuron: Int[torch.Tensor, " value"]
    ids: Int[torch.Tensor, "value side k"]
    logits: Float[torch.Tensor, "value side k"]
    max_prob: Float[torch.Tensor, "value side"]
    entropy: Float[torch.Tensor, "value side"]
    norm: Float[torch.Tensor, " value"]
    words: dict[str, str]
    provenance: Provenance
    expert: Int[torch.Tensor, " value"] | None = None

    def __repr__(self) -> str:
        count, _, k = self.ids.shape
        layers = self.layer.unique().tolist()
        return f"ValueReadouts: {count} values of layers {layers}, k {k}"

    def tokens(self, layer: int, neuron: int, *, negative: bool = False) -> list[str]:
        """Returns the tokens a value promotes most.

        Args:
            layer: Its layer.
            neuron: Its neuron.
            negative: Those it promotes with a negative coefficient.

        Raises:
            InvalidInput: If it is not here.
        """
        found = ((self.layer == layer) & (self.neuron == neuron)).nonzero()
        if not len(found):
            raise InvalidInput(
                "there is no readout of this value",
                f"layer {layer}, neuron {neuron}",
                f"one of the {len(self.layer)} values that were asked for",
                "Ask ff_values for it.",
            )
        ids = self.ids[int(found[0]), int(negative)].tolist()
        return [self.words[str(one)] for one in ids]

    def to_dataframe(self) -> pandas.DataFrame:
        """Returns one row per value and side; tokens and their logits are lists."""
        import numpy as np
        import pandas

        count, sides, _ = self.ids.shape
        value, side = (axis.reshape(-1) for axis in np.indices((count, sides)))
        ids = as_array(self.ids).reshape(count * sides, -1)
        expert = {} if self.expert is None else {"expert": as_array(self.expert)[value]}
        return pandas.DataFrame(
            {
                "layer": as_array(self.layer)[value],
                **expert,
                "neuron": as_array(self.neuron)[value],
                "side": np.array(_SIDES, dtype=object)[side],
                "tokens": [[self.words[str(one)] for one in row] for row in ids],
                "ids": list(ids),
                "logits": list(as_array(self.logits).reshape(count * sides, -1)),
                "max_prob": as_array(self.max_prob).reshape(-1),
                "entropy": as_array(self.entropy).reshape(-1),
                "norm": as_array(self.norm)[value],
            }
        )

    def panels(self) -> tuple[Panel, ...]:
        """Returns the table of values; the page shows the first rows of a long one."""
        columns = (self.layer, self.neuron, self.ids, self.max_prob[:, 0], self.entropy[:, 0])
        rows = []
        for layer, neuron, ids, *numbers in zip(*(one.tolist() for one in columns), strict=True):
            both = (" ".join(_word(self.words[str(one)]) for one in side) for side in ids)
            promotes, demotes = both
            rows.append((f"L{layer}.{neuron}", promotes, *numbers, demotes))
        return (
            Table(
                title="What values promote",
                caption="Tokens with the highest logits of each value vector, how probable the "
                "first is in its softmax, the entropy in nats, and the tokens it demotes: those "
                "it promotes when its coefficient is negative.",
                columns=("value", "promotes", "largest probability", "entropy", "demotes"),
                rows=tuple(rows),
            ),
        )


def _word(token: str) -> str:
    """Returns a token for a list of them; a line break stays one, and nothing becomes a sign."""
    return token.strip(" ") or ("␣" if token else "∅")
