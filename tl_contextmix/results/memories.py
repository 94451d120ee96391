"""Feed-forward sublayers as memories: which are active, how their sum gets its top token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int

from tl_contextmix import storage
from tl_contextmix.errors import InvalidInput, four_parts
from tl_contextmix.panels import Bars, Panel, Table
from tl_contextmix.results.axes import (
    as_array,
    layer_positions,
    positions,
    require_count,
    require_shape,
)
from tl_contextmix.results.base import Result
from tl_contextmix.results.labels import Provenance, Tokens

if TYPE_CHECKING:
    import pandas

FIGURES: dict[str, str] = {
    "active": "Share of memories that are active.",
    "zero agreement": "Share of positions where no active memory promotes the top token of the "
    "feed-forward output.",
    "residual = final": "Share of positions where the residual stream's top token is the model's "
    "final one.",
    "probability": "Probability of the model's final token, read from the residual stream.",
}


@storage.storable
@dataclass(frozen=True, eq=False)
class CompositionFigures(Result):
    """The figures of the 2021 paper, per layer, over the positions of a text or of a corpus.

    Attributes:
        sums: Sum over positions of each of `FIGURES` (a yes counts 1), then of each case.
        examples: How many positions.
        layers: Number of each layer.
        cases: Names of the cases.
        provenance: Where it comes from.
    """

    sums: Float[torch.Tensor, "layer quantity"]
    examples: int
    layers: tuple[int, ...]
    cases: tuple[str, ...]
    provenance: Provenance

    def __post_init__(self) -> None:
        shape = (len(self.layers), len(FIGURES) + len(self.cases))
        require_shape("CompositionFigures.sums", self.sums, shape)

    def __repr__(self) -> str:
        return (
            f"CompositionFigures over {self.examples} positions\n"
            f"{self.to_dataframe().round(3).to_string(index=False)}"
        )

    def __add__(self, other: CompositionFigures) -> CompositionFigures:
        """Returns the figures over the positions of both.

        Raises:
            InvalidInput: If the other ones are of another model, or were read in another way.
        """
        if not isinstance(other, CompositionFigures):
            return NotImplemented
        for mine, theirs in zip(self._told_apart_by(), other._told_apart_by(), strict=True):
            if mine != theirs:
                raise InvalidInput(
                    four_parts(
                        "figures cannot be added up",
                        f"{theirs} beside {mine}",
                        "figures of the same model and layers, read in the same way",
                        "Ask for both with the same options.",
                    )
                )
        return CompositionFigures(
            self.sums + other.sums,
            self.examples + other.examples,
            self.layers,
            self.cases,
            self.provenance,
        )

    def _told_apart_by(self) -> tuple[object, ...]:
        where = self.provenance
        how = {name: where.options.get(name) for name in ("active", "projection")}
        return (where.model, where.fingerprint, self.layers, self.cases, how)

    @property
    def values(self) -> Float[torch.Tensor, "layer quantity"]:
        """Means over positions; NaN where there are none."""
        return self.sums / self.examples if self.examples else self.sums * torch.nan

    def to_dataframe(self) -> pandas.DataFrame:
        """Returns one row per layer: every figure, the share of every case, how many positions."""
        import pandas

        columns = [*FIGURES, *self.cases]
        frame = pandas.DataFrame(as_array(self.values), columns=columns)
        frame.insert(0, "layer", list(self.layers))
        frame["examples"] = self.examples
        return frame

    def panels(self) -> tuple[Panel, ...]:
        """Returns the paper's bar charts."""
        labels = tuple(f"layer {layer}" for layer in self.layers)
        columns = as_array(self.values).T.tolist()
        note = f" Over {self.examples:,} positions."
        charts = [
            Bars(name, text + note, labels, ((name, tuple(column)),), "share")
            for (name, text), column in zip(FIGURES.items(), columns, strict=False)
        ]
        series = tuple(
            (name, tuple(column))
            for name, column in zip(self.cases, columns[len(FIGURES) :], strict=True)
        )
        caption = (
            "Whose top token the layer's output has: the residual stream's, the feed-forward "
            "output's, both (agreement) or neither (composition); conflict: both have the same "
            "one, the sum another, which a norm with a bias makes possible."
        )
        return (*charts, Bars("how outputs come about", caption + note, labels, series, "share"))


@storage.storable
@dataclass(frozen=True, eq=False)
class Memories(Result):
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
        promoted: Token each value promotes, and the one it promotes with a negative coefficient.
        norm: Length of each value.
        layers: Number of each layer.
        cases: Names of the cases.
        tokens: The positions.
        words: Text of each token that occurs, by its id.
        provenance: Where it comes from.
    """

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

    def __post_init__(self) -> None:
        batch, pos = self.tokens.ids.shape
        shape = (batch, len(self.layers), pos)
        for name in (
            *("active", "agreeing", "residual_top", "ffn_top", "output_top"),
            *("probability", "case"),
        ):
            require_shape(f"Memories.{name}", getattr(self, name), shape)
        neurons = self.coefficients.shape[3]
        require_shape("Memories.coefficients", self.coefficients, (*shape, neurons))
        require_shape("Memories.promoted", self.promoted, (len(self.layers), neurons, 2))

    def __repr__(self) -> str:
        batch, layer, pos, neuron = self.coefficients.shape
        return f"Memories: batch {batch}, layer {layer}, pos {pos}, neuron {neuron}"

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
        # The same figures as `memories.LayerComposition.sums`, of what is kept here.
        real = self.tokens.mask.to(self.active.device)[:, None]
        rows = [
            self.active,
            self.zero_agreement.to(self.active),
            self.residual_is_final.to(self.active),
            self.probability,
            *((self.case == index).to(self.active) for index in range(len(self.cases))),
        ]
        sums = torch.stack([(row * real).sum((0, 2)) for row in rows], dim=1).cpu().double()
        count = int(self.tokens.mask.sum())
        return CompositionFigures(sums, count, self.layers, self.cases, self.provenance)

    def top(
        self, k: int = 10, *, layer: int | None = None, pos: int = -1, batch: int = 0
    ) -> pandas.DataFrame:
        """Returns the memories that add the longest vectors at a position.

        Args:
            k: How many of each layer.
            layer: Layer; None for all.
            pos: Position; a negative one counts from the end of the row's tokens, padding left
                out.
            batch: Row of the batch.

        Raises:
            InvalidInput: If there is no such layer, position or row.
        """
        import pandas

        k, row = require_count(k), _one("batch", batch, len(self.active))
        real = self.tokens.mask[row].nonzero()[:, 0].tolist()
        place = _one("pos", pos, self.active.shape[2])
        if isinstance(pos, int) and pos < 0:
            place = real[_one("pos", pos, len(real))]
        if place not in real:
            raise InvalidInput(
                four_parts(
                    "there are no memories at padding",
                    f"pos={pos} of row {row}",
                    f"one of {real}",
                    "Count from the end: padding is left out.",
                )
            )
        found = []
        for index in layer_positions(layer, self.layers):
            numbers = self.coefficients[row, index, place]
            size = numbers.abs() * self.norm[index]
            for neuron in size.topk(min(k, len(size))).indices.tolist():
                side = int(numbers[neuron] < 0)
                found.append(
                    {
                        "layer": self.layers[index],
                        "neuron": neuron,
                        "coefficient": float(numbers[neuron]),
                        "length": float(size[neuron]),
                        "promotes": self.words[str(int(self.promoted[index, neuron, side]))],
                    }
                )
        return pandas.DataFrame(found)

    def to_dataframe(self) -> pandas.DataFrame:
        """Returns one row per layer and position that is no padding."""
        import numpy as np
        import pandas

        real = self.tokens.mask.cpu()[:, None].expand(self.active.shape).numpy()
        batch, layer, pos = np.nonzero(real)

        def text(ids: torch.Tensor) -> list[str]:
            return [self.words[str(one)] for one in as_array(ids)[real].tolist()]

        final = self.final_top[:, None].expand(self.active.shape)
        return pandas.DataFrame(
            {
                "batch": batch,
                "layer": np.array(self.layers, dtype=np.int64)[layer],
                "pos": pos,
                "token": np.array(self.tokens.strings, dtype=object)[batch, pos],
                "active": as_array(self.active)[real],
                "agreeing": as_array(self.agreeing)[real],
                "residual": text(self.residual_top),
                "ffn": text(self.ffn_top),
                "output": text(self.output_top),
                "final": text(final),
                "probability": as_array(self.probability)[real],
                "case": np.array(self.cases, dtype=object)[as_array(self.case)[real]],
            }
        )

    def panels(self) -> tuple[Panel, ...]:
        """Returns the paper's charts over these positions, and the largest memories at the last."""
        last = int(self.tokens.mask[0].nonzero()[-1])
        frame = self.top(3, pos=last)
        table = Table(
            title=f"Memories at {self.tokens.strings[0][last]!r}",
            caption="The three memories of each layer that add the longest vectors to the last "
            "position of the first text, and the token each promotes.",
            columns=("memory", "coefficient", "length", "promotes"),
            rows=tuple(
                (f"L{row.layer}.{row.neuron}", row.coefficient, row.length, row.promotes)
                for row in frame.itertuples()
            ),
            signed=("coefficient",),
        )
        return (*self.figures().panels(), table)


def _one(axis: str, wanted: object, length: int) -> int:
    """Returns the one position that is asked for."""
    found = [] if wanted is None else positions(axis, wanted, (), length)
    if len(found) != 1:
        raise InvalidInput(
            four_parts(
                f"one place on the {axis} axis is asked for",
                repr(wanted)[:200],
                f"an integer from {-length} to {length - 1}",
                "Name one.",
            )
        )
    return found[0]


@storage.storable
@dataclass(frozen=True, eq=False)
class TokenMemory(Result):
    """Which source token feeds which memory: shares that add up to the coefficient.

    Attributes:
        shares: Share of each source token in each coefficient; 0 at padding.
        bias: The share of no token; 0 at padding.
        neurons: The memories.
        layers: Number of each layer.
        stack: The stack.
        target: Positions whose memories they are.
        source: Positions they are fed from.
        provenance: Where it comes from.
    """

    shares: Float[torch.Tensor, "batch layer target source neuron"]
    bias: Float[torch.Tensor, "batch layer target neuron"]
    neurons: tuple[int, ...]
    layers: tuple[int, ...]
    stack: str
    target: Tokens
    source: Tokens
    provenance: Provenance

    def __post_init__(self) -> None:
        batch, target = self.target.ids.shape
        shape = (batch, len(self.layers), target)
        count = len(self.neurons)
        sources = self.source.ids.shape[1]
        require_shape("TokenMemory.shares", self.shares, (*shape, sources, count))
        require_shape("TokenMemory.bias", self.bias, (*shape, count))

    def __repr__(self) -> str:
        sizes = zip(
            ("batch", "layer", "target", "source", "neuron"), self.shares.shape, strict=True
        )
        return "TokenMemory: " + ", ".join(f"{name} {size}" for name, size in sizes)

    @property
    def coefficients(self) -> Float[torch.Tensor, "batch layer target neuron"]:
        """Coefficients: the shares of all tokens and of none, added up."""
        return self.shares.sum(3) + self.bias

    def to_dataframe(self) -> pandas.DataFrame:
        """Returns one row per share; rows of padding and columns of padding are left out."""
        import numpy as np
        import pandas

        real = self.target.mask[:, :, None] & self.source.mask[:, None, :]
        shape = self.shares.shape
        real = real[:, None, :, :, None].expand(shape).cpu().numpy()
        batch, layer, target, source, neuron = np.nonzero(real)
        return pandas.DataFrame(
            {
                "batch": batch,
                "layer": np.array(self.layers, dtype=np.int64)[layer],
                "neuron": np.array(self.neurons, dtype=np.int64)[neuron],
                "target": target,
                "source": source,
                "target_token": np.array(self.target.strings, dtype=object)[batch, target],
                "source_token": np.array(self.source.strings, dtype=object)[batch, source],
                "score": as_array(self.shares)[real],
            }
        )

    def panels(self) -> tuple[Panel, ...]:
        """Returns a table per layer: the largest memories of the last target, source by source."""
        last = int(self.target.mask[0].nonzero()[-1])
        columns = [*self.source.strings[0], "no token", "coefficient"]
        # Two sources may be the same word, and columns are told apart by their names.
        heads = [f"{word or '∅'} ({place})" for place, word in enumerate(columns[:-2])] + columns[
            -2:
        ]
        found = []
        for index, layer in enumerate(self.layers):
            total = self.coefficients[0, index, last]
            rows = []
            for place in total.abs().topk(min(10, len(total))).indices.tolist():
                shares = self.shares[0, index, last, :, place].tolist()
                rest = float(self.bias[0, index, last, place])
                name = f"L{layer}.{self.neurons[place]}"
                rows.append((name, *shares, rest, float(total[place])))
            found.append(
                Table(
                    title=f"What feeds the memories of layer {layer} at "
                    f"{self.target.strings[0][last]!r}",
                    caption="Share of every source token in the coefficient of a memory; the "
                    "shares of a row, that of no token included, add up to the coefficient.",
                    columns=("memory", *heads),
                    rows=tuple(rows),
                    signed=tuple(heads),
                )
            )
        return tuple(found)
