"""Which components of the residual stream made a token more probable."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch.nn.utils.rnn import pad_sequence

from tl_contextmix.plotting.panels import Curves, Heatmap, Panel, Table
from tl_contextmix.results import storage
from tl_contextmix.results.axes import (
    as_array,
    largest,
    require_choice,
    require_count,
    require_shape,
)
from tl_contextmix.results.base import Result
from tl_contextmix.results.components import COLUMNS, KINDS, Components, taken
from tl_contextmix.results.labels import Provenance, Tokens

if TYPE_CHECKING:
    import pandas

SHOWN = 20
SCORES: dict[str, str] = {
    "log_prob_increase": "nats",
    "log_prob": "nats",
    "prob_increase": "probability",
    "norm": "norm of the vector",
    "coefficient": "coefficient",
    "rank": "1 / rank",
    "coefficient_norm": "|coefficient| times norm",
    "coefficient_rank": "coefficient / rank",
}
"""What a component may be scored by, and the unit."""


@storage.storable
@dataclass(frozen=True, eq=False)
class LogProbContributions(Result):
    """How much each component of the residual stream raised the log-probability of a token.

    Attributes:
        scores: The scores; NaN at sources that cannot be read (padding, and later positions in a
            causal model), which are no components of that sentence.
        coefficients: What a neuron's vector is multiplied with; NaN for other components.
        logits: The component's own logit of the target, norm scale frozen at the real value (the
            before-softmax value); NaN behind a masked-LM head.
        components: What they belong to.
        by: Into what the stream was cut.
        score: What a score is, one of `SCORES`.
        norm: Rule for the final norm.
        steps: Name of each state of the stream, from nothing to all of it.
        trajectory: The target's log-probability at each state.
        gaps: For each step that was cut: its own increase less the sum of its components'. NaN
            where it was not cut, or not all of its components were evaluated.
        log_prob: The target's log-probability as the model itself gives it.
        evaluated: How many components were evaluated exactly, in each sentence, biases apart.
        possible: How many there are in each sentence, biases apart.
        note: Why all had to be evaluated, where a bound would have spared work; else empty.
        pos: Position whose prediction it is, in each sentence.
        target: The predicted token of each sentence.
        tokens: The tokens of the stack that writes the answer.
        encoder: The tokens of the encoder that it reads, or None.
        provenance: Where the numbers come from.
    """

    scores: Float[torch.Tensor, "batch component"]
    coefficients: Float[torch.Tensor, "batch component"]
    logits: Float[torch.Tensor, "batch component"]
    components: Components
    by: str
    score: str
    norm: str
    steps: tuple[str, ...]
    trajectory: Float[torch.Tensor, "batch step"]
    gaps: Float[torch.Tensor, "batch step"]
    log_prob: Float[torch.Tensor, " batch"]
    evaluated: Int[torch.Tensor, " batch"]
    possible: Int[torch.Tensor, " batch"]
    note: str
    pos: Int[torch.Tensor, " batch"]
    target: Tokens
    tokens: Tokens
    encoder: Tokens | None
    provenance: Provenance

    def __post_init__(self) -> None:
        shape = tuple(self.components.kind.shape)
        for name in ("scores", "coefficients", "logits"):
            require_shape(f"LogProbContributions.{name}", getattr(self, name), shape)
        for name in ("trajectory", "gaps"):
            expected = (shape[0], len(self.steps))
            require_shape(f"LogProbContributions.{name}", getattr(self, name), expected)
        require_choice("LogProbContributions", "score", self.score, tuple(SCORES))
        for name in ("log_prob", "evaluated", "possible", "pos"):
            require_shape(f"LogProbContributions.{name}", getattr(self, name), shape[:1])
        require_shape("Tokens of the target", self.target.ids, (shape[0], 1))

    @property
    def unit(self) -> str:
        """Unit of the scores."""
        return SCORES[self.score]

    def __repr__(self) -> str:
        batch, count = self.scores.shape
        lines = [
            f"LogProbContributions by {self.by}, {self.score}, norm {self.norm}: "
            f"batch {batch}, component {count}"
        ]
        for row in range(min(batch, 3)):
            best = self._row_table(row, 5)
            listed = ", ".join(f"{line[0]} {line[2]:+.3f}" for line in best)
            lines.append(f"  {self.target.strings[row][0]!r}: {listed}")
        return "\n".join(lines)

    def top(self, k: int = 10) -> LogProbContributions:
        """Returns the ``k`` largest scores of each sentence, largest first, biases left out.

        Where a sentence has fewer, its last places are empty: score NaN, see `Components`. What is
        returned can be given to `query_contributions` and `knockout` as ``neurons=``.

        Raises:
            InvalidInput: If ``k`` is not a positive integer.
        """
        index = largest_rows(self.scores, self.components, require_count(k))
        return replace(
            self,
            components=self.components.select(index.cpu()),
            **{
                name: taken(getattr(self, name), index)
                for name in ("scores", "coefficients", "logits")
            },
        )

    def labels(self, row: int = 0) -> tuple[str, ...]:
        """Returns the short name of each component of a sentence."""
        return tuple(self.components.label(row, i) for i in range(self.scores.shape[1]))

    def to_dataframe(self) -> pandas.DataFrame:
        """Returns one row per component; sources that cannot be read are left out.

        Columns: batch, component, kind, layer, pos, head, source, neuron (-1 where there is
        none), source_token, coefficient, logit, score.
        """
        frame = component_frame(self.components, self.tokens, self.encoder)
        for name in ("coefficients", "logits", "scores"):
            frame[name.removesuffix("s")] = as_array(getattr(self, name)).reshape(-1)
        return frame[frame.score.notna()].reset_index(drop=True)

    def panels(self) -> tuple[Panel, ...]:
        """Returns, for each sentence: a map where there is one, the largest, the trajectory."""
        found: list[Panel] = []
        for row in range(len(self.target.strings)):
            found += [*self._grids(row), self._table(row), self._trajectory(row)]
        return tuple(found)

    def _row_table(self, row: int, k: int) -> list[tuple[Any, ...]]:
        """Returns label, source, score, logit and coefficient of the largest, as a table."""
        places = largest(self.scores[row], k).tolist()
        frame = []
        for place in places:
            one = self.components.at(row, place)
            numbers = [float(x[row, place]) for x in (self.scores, self.logits, self.coefficients)]
            word = source_word(one, row, self.tokens, self.encoder)
            frame.append((self.components.label(row, place), word, *numbers))
        return frame

    def _table(self, row: int) -> Table:
        evaluated, possible = int(self.evaluated[row]), int(self.possible[row])
        how = f"{evaluated:,} of {possible:,} evaluated exactly."
        return component_table(
            title=f"Largest of {possible:,} components by {self.by}",
            caption=f"{self.unit}, for {self.target.strings[row][0]!r}. {how} {self.note}".strip(),
            columns=("component", "source", "score", "logit", "coefficient"),
            rows=self._row_table(row, SHOWN),
            signed=("score", "logit"),
        )

    def _trajectory(self, row: int) -> Curves:
        steps = self.trajectory[row].detach().cpu()
        return Curves(
            title=f"Log-probability of {self.target.strings[row][0]!r} through the layers",
            caption="From no stream at all to the whole of it, after each sublayer. Neighbours "
            f"differ by the sublayer's own increase. Norm: {self.norm}; the model itself says "
            f"{float(self.log_prob[row]):.3f}.",
            labels=self.steps,
            series=(("log p", tuple(steps.tolist())),),
            unit="nats",
        )

    def _grids(self, row: int) -> tuple[Heatmap, ...]:
        """Returns the scores as layers by sublayers, heads or sources; none for other cuts."""
        return component_grids(
            self.components,
            self.scores,
            row,
            self.by,
            title=f"Contributions by {self.by} to {self.target.strings[row][0]!r}",
            caption="Blue raises the log-probability of the token, red lowers it.",
            unit=self.unit,
            words=self._words(row),
        )

    def _words(self, row: int) -> dict[str, tuple[str, ...]]:
        own = self.tokens.strings[row]
        return {
            "attn": own,
            "cross_attn": own if self.encoder is None else self.encoder.strings[row],
        }


def component_table(
    title: str,
    caption: str,
    columns: tuple[str, ...],
    rows: list[tuple[Any, ...]],
    signed: tuple[str, ...],
) -> Table:
    """Returns a table without the columns that have no meaning for any of its components."""
    told = [
        index
        for index in range(len(columns))
        if not rows or any(row[index] == row[index] and row[index] != "" for row in rows)
    ]
    names = tuple(columns[index] for index in told)
    return Table(
        title=title,
        caption=caption,
        columns=names,
        # Nothing is not the empty token.
        rows=tuple(
            tuple(None if row[index] == "" else row[index] for index in told) for row in rows
        ),
        signed=tuple(name for name in signed if name in names),
    )


def source_word(one: dict[str, Any], row: int, tokens: Tokens, encoder: Tokens | None) -> str:
    """Returns the token a component reads; empty where it reads none."""
    if one["source"] is None:
        return ""
    side = encoder if one["kind"] == "cross_attn" and encoder is not None else tokens
    return side.strings[row][one["source"]]


def component_frame(
    components: Components, tokens: Tokens, encoder: Tokens | None
) -> pandas.DataFrame:
    """Returns the columns of components as a table, one row each."""
    import numpy as np
    import pandas

    batch, count = components.kind.shape
    frame = pandas.DataFrame(
        {
            "batch": np.repeat(np.arange(batch), count),
            "kind": np.array(KINDS, dtype=object)[components.kind.cpu().numpy().reshape(-1)],
            **{name: getattr(components, name).cpu().numpy().reshape(-1) for name in COLUMNS},
        }
    )
    words = np.full(len(frame), "", dtype=object)
    for kind, side in (("attn", tokens), ("cross_attn", encoder or tokens)):
        chosen = ((frame.kind == kind) & (frame.source >= 0)).to_numpy()
        table = np.array(side.strings, dtype=object).reshape(batch, -1)
        words[chosen] = table[frame.batch[chosen], frame.source[chosen]]
    frame["source_token"] = words
    return frame


def component_grids(
    components: Components,
    scores: torch.Tensor,
    row: int,
    by: str,
    *,
    title: str,
    caption: str,
    unit: str,
    words: dict[str, tuple[str, ...]],
) -> tuple[Heatmap, ...]:
    """Returns layers by sublayers, by heads or by sources, a map for each kind of attention."""
    column = {"head": "head", "position": "source"}.get(by)
    groups = [("attn",), ("cross_attn",)] if column else [("attn", "cross_attn", "mlp")]
    if column is None and by != "layer":
        return ()
    found = []
    for kinds in groups:
        numbers = [KINDS.index(kind) for kind in kinds]
        chosen = torch.isin(components.kind[row], torch.tensor(numbers))
        chosen &= ~scores[row].isnan().cpu()
        if not bool(chosen.any()):
            continue
        if len(components.pos[row][chosen].unique()) > 1:
            continue  # several streams, which one map would draw over each other
        layer = components.layer[row][chosen]
        place = getattr(components, column)[row][chosen] if column else components.kind[row][chosen]
        layers, columns = layer.unique().tolist(), place.unique().tolist()
        values = torch.full((1, len(layers), len(columns)), torch.nan)
        at = torch.searchsorted(layer.unique(), layer), torch.searchsorted(place.unique(), place)
        values[0][at] = scores[row].detach().float().cpu()[chosen]
        names = {
            "head": lambda index: f"head {index}",
            "source": lambda index, kind=kinds[0]: words[kind][index],
            None: lambda index: KINDS[index],
        }[column]
        found.append(
            Heatmap(
                title=title if len(kinds) > 1 else f"{title}, {kinds[0]}",
                caption=caption,
                values=values,
                sheets=(by,),
                rows=tuple(f"layer {number}" for number in layers),
                columns=tuple(map(names, columns)),
                unit=unit,
            )
        )
    return tuple(found)


def largest_rows(
    scores: torch.Tensor, components: Components, k: int
) -> Int[torch.Tensor, "batch some"]:
    """Returns the places of the largest scores of each sentence, biases apart; -1 for no more."""
    kept = scores.detach().masked_fill(components.is_bias().to(scores.device), torch.nan)
    found = [largest(row, k) for row in kept]
    return pad_sequence(found, batch_first=True, padding_value=-1).to(scores.device)
