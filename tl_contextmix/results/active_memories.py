"""Feed-forward sublayers as memories: which are active, which tokens they promote."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int

from tl_contextmix.core.validation import require_number
from tl_contextmix.errors import InvalidInput
from tl_contextmix.plotting.panels import Panel
from tl_contextmix.results import storage
from tl_contextmix.results.axes import as_array, positions
from tl_contextmix.results.labelled_arrays import LabelledArray
from tl_contextmix.results.labels import Provenance, Tokens
from tl_contextmix.results.layer_metrics import LayerFigures
from tl_contextmix.results.memory_composition import CompositionFigures, figure_rows
from tl_contextmix.results.row_tables import memory_name, table_of

if TYPE_CHECKING:
    import pandas


@storage.storable
@dataclass(frozen=True, eq=False, repr=False)
class Memories(LabelledArray):
    """Coefficients of every memory, and how the memories of each layer make up its output.

    Attributes:
        coefficients: What each value is multiplied with; 0 at padding.
        active: Share of memories that are active.
        agreeing: How many active memories promote the top token of the feed-forward output.
        residual_top: Top token of the stream that the feed-forward output is added to.
        ffn_top: Top token of the feed-forward output.
        output_top: Top token of the layer's output.
        final_top: Top token of the model.
        probability: Probability of the model's top token, read from the residual stream.
        case: Index into `cases`.
        quadrants: Share of gated memories per sign of gate and linear branch (++ +- -+ --); empty
            where there are no gates.
        promoted: Token each value promotes, and the one it promotes with a negative coefficient;
            -1 where it was not read (``pos`` and ``k`` of `ff_memories`).
        norm: Length of each value.
        layers: Number of each layer.
        cases: Names of the cases.
        tokens: The positions.
        words: Text of each token that occurs, by its id.
        provenance: Where it comes from.
        expert: Which expert each memory belongs to, in mixtures of experts; else None.
    """

    LABELS = {"layer": "layers", "pos": "tokens", "side": ("v", "-v")}
    COLUMNS = {"active": "active", "agreeing": "agreeing"}
    ARRAY = "coefficients"
    NAMED = {
        **dict.fromkeys(("residual_top", "ffn_top", "output_top", "final_top", "_told"), "words"),
        "case": "cases",
    }

    coefficients: Float[torch.Tensor, "batch layer pos neuron"]
    active: Float[torch.Tensor, "batch layer pos"]
    agreeing: Int[torch.Tensor, "batch layer pos"]
    residual_top: Int[torch.Tensor, "batch layer pos"]
    ffn_top: Int[torch.Tensor, "batch layer pos"]
    output_top: Int[torch.Tensor, "batch layer pos"]
    final_top: Int[torch.Tensor, "batch pos"]
    probability: Float[torch.Tensor, "batch layer pos"]
    case: Int[torch.Tensor, "batch layer pos"]
    quadrants: Float[torch.Tensor, "batch layer pos quadrant"]
    promoted: Int[torch.Tensor, "layer neuron side"]
    norm: Float[torch.Tensor, "layer neuron"]
    layers: tuple[int, ...]
    cases: tuple[str, ...]
    tokens: Tokens
    words: dict[str, str]
    provenance: Provenance
    expert: Int[torch.Tensor, "layer neuron"] | None = None

    @property
    def _told(self) -> Int[torch.Tensor, " some"]:
        return self.promoted[self.promoted != -1]

    @property
    def zero_agreement(self) -> torch.Tensor:
        """Where no active memory promotes the top token of the feed-forward output."""
        return self.agreeing == 0

    @property
    def residual_is_final(self) -> torch.Tensor:
        """Where the residual stream's top token is the model's."""
        return self.residual_top == self.final_top[:, None]

    def figures(self) -> CompositionFigures:
        """Returns the paper's figures, over all positions that are no padding."""
        real = self.tokens.mask.to(self.active.device)[:, None]
        seen = (self.active, self.agreeing, self.residual_is_final, self.probability, self.case)
        rows = figure_rows(*seen, len(self.cases))
        sums = torch.stack([(row * real).sum((0, 2)) for row in rows], dim=1).cpu().double()
        count = int(self.tokens.mask.sum())
        return CompositionFigures(sums, count, self.layers, self.cases, self.provenance)

    def agreements(self, *, stop_words: str | Collection[str] = (), short: int = 5) -> LayerFigures:
        """Returns what is special about positions where a memory agrees with its layer.

        In the 2021 paper (section 5.1) most of what single memories decide are stop words, or
        follows short prefixes. ``agreeing`` is the share of positions at which an active memory
        promotes the top token of the feed-forward output; ``stop word`` and ``short prefix`` are
        shares of these, ``stop word, all`` and ``short prefix, all`` the same shares of all
        positions, to compare with.

        Args:
            stop_words: Words that count as such, whatever their case and spaces.
            short: A prefix of fewer tokens is short.

        Returns:
            `LayerFigures` [batch layer quantity]; NaN where no memory agrees.
        """
        stop_words = [stop_words] if isinstance(stop_words, str) else stop_words
        short, words = require_number("short", short), {w.strip().lower() for w in stop_words}
        ids = self.ffn_top.cpu()
        stops = [i for i, word in self.words.items() if word.strip(" \u2581").lower() in words]
        stop = torch.isin(ids, torch.tensor([int(i) for i in stops]))
        real = self.tokens.mask.cpu()[:, None].expand(ids.shape)
        early = (real.cumsum(-1) < short) & real
        agree = (self.agreeing.cpu() > 0) & real
        shares = [
            _share(agree, real),
            _share(stop, agree),
            _share(stop, real),
            _share(early, agree),
            _share(early, real),
        ]
        return LayerFigures(
            values=torch.stack(shares, dim=-1),
            layers=self.layers,
            quantities=(
                "agreeing",
                "stop word",
                "stop word, all",
                "short prefix",
                "short prefix, all",
            ),
            title="Where a memory agrees with its layer",
            caption="Shares of positions where an active memory promotes the top token of the "
            f"feed-forward output, and of all; short: fewer than {short} tokens.",
            unit="share",
            provenance=self.provenance,
        )

    def top(
        self, k: int = 10, *, layer: int | None = None, pos: int = -1, batch: int = 0
    ) -> pandas.DataFrame:
        """Returns the memories that add the longest vectors at a position.

        Args:
            k: How many of each layer; up to ``k`` of `ff_memories`.
            layer: Layer; None for all.
            pos: Position, of those that `ff_memories` was asked about; a negative one counts from
                the end of the row's tokens, padding left out.
            batch: Row of the batch.

        Raises:
            InvalidInput: If there is no such layer, position or row, or it was not read what these
                memories promote.
        """
        row, place, label = self._place(pos, batch)
        frame = self._longest(k, layer, row, place)
        if frame["promotes"].isna().any():
            raise InvalidInput(
                "it was not read what these memories promote",
                f"k={k} at position {label}",
                "positions, and as many memories, as ff_memories was asked about",
                f"Call ff_memories with pos={label} and k={k}, or with k=None for all memories, of "
                "which some are then selected.",
            )
        return frame

    def _place(self, pos: int, batch: int) -> tuple[int, int, int]:
        """Returns a row, a place in it that is no padding, and the number of that position."""
        row = _one("batch", batch, range(len(self.active)))
        real = self.tokens.mask[row].nonzero()[:, 0].tolist()
        labels = self.tokens.labels()
        if isinstance(pos, int) and pos < 0:
            labels = [labels[place] for place in real]
        numbers = [self.tokens.labels()[place] for place in real]
        wanted = labels[_one("pos", pos, labels)]
        if wanted not in numbers:
            raise InvalidInput(
                "there are no memories at padding",
                f"pos={pos} of row {row}",
                f"one of {numbers}",
                "Count from the end: padding is omitted.",
            )
        return row, real[numbers.index(wanted)], wanted

    def _longest(self, k: int, layer: int | None, row: int, place: int) -> pandas.DataFrame:
        import pandas

        k, found = require_number("k", k), []
        for index in positions("layer", layer, self.layers):
            numbers = self.coefficients[row, index, place]
            size = numbers.abs() * self.norm[index]
            for neuron in longest(numbers, self.norm[index], k).tolist():
                side = int(numbers[neuron] < 0)
                expert = {} if self.expert is None else {"expert": int(self.expert[index, neuron])}
                found.append(
                    {
                        "layer": self.layers[index],
                        **expert,
                        "neuron": neuron,
                        "coefficient": float(numbers[neuron]),
                        "length": float(size[neuron]),
                        "promotes": self.words.get(str(int(self.promoted[index, neuron, side]))),
                    }
                )
        return pandas.DataFrame(found)

    def _columns(self) -> dict[str, Any]:
        import numpy as np

        words = np.vectorize(lambda one: self.words[str(one)], otypes=[object])
        final = self.final_top[:, None].expand(self.active.shape)
        tops = {"residual": self.residual_top, "ffn": self.ffn_top, "output": self.output_top}
        return {
            **super()._columns(),
            **{name: words(as_array(ids)) for name, ids in {**tops, "final": final}.items()},
            "probability": self.probability,
            "case": np.array(self.cases, dtype=object)[as_array(self.case)],
        }

    def panels(self) -> tuple[Panel, ...]:
        """Returns the paper's charts, and the largest memories where they were asked about."""
        words = self.tokens.strings[0]
        k = min(3, self.provenance.options.get("k") or 3)
        cells = {"memory": memory_name, **{n: n for n in ("coefficient", "length", "promotes")}}
        tables = []
        for place in self._shown():
            frame = self._longest(k, None, 0, place).fillna({"promotes": "(not read)"})
            tables.append(
                table_of(
                    [*frame.itertuples()],
                    cells,
                    f"Memories at {words[place]!r} ({self.tokens.labels()[place]})",
                    "The memories of each layer that add the longest vectors to this position of "
                    "the first text, and the token each promotes.",
                    signed=("coefficient",),
                )
            )
        return (*self.figures().panels(), *tables)

    def _shown(self) -> list[int]:
        """Returns the places of the first text that were asked about; of all, or none, the last."""
        real = self.tokens.mask[0].nonzero()[:, 0].tolist()
        numbers = [self.tokens.labels()[place] for place in real]
        asked = self.provenance.options.get("pos", -1)
        listed = asked if isinstance(asked, list) else [-1 if isinstance(asked, str) else asked]
        there = [one for one in listed if one in numbers or -len(real) <= one < 0]
        return [real[one if one < 0 else numbers.index(one)] for one in there] or real[-1:]


def longest(
    coefficients: Float[torch.Tensor, "*some neuron"], norm: Float[torch.Tensor, " neuron"], k: int
) -> Int[torch.Tensor, "*some k"]:
    """Returns the memories that add the longest vectors, of equally long ones the first."""
    return (coefficients.abs() * norm).sort(dim=-1, descending=True, stable=True).indices[..., :k]


def _share(which: torch.Tensor, among: torch.Tensor) -> torch.Tensor:
    """Returns the share of positions, NaN of none."""
    return (which & among).sum(-1).double() / among.sum(-1).double()


def _one(axis: str, wanted: object, labels: Sequence[int]) -> int:
    """Returns the one place that is asked for."""
    found = [] if wanted is None else positions(axis, wanted, labels)
    if len(found) != 1:
        raise InvalidInput(
            f"one place on the {axis} axis is asked for",
            repr(wanted)[:200],
            f"an integer from {-len(labels)} to {len(labels) - 1}",
            "Name one.",
        )
    return found[0]
