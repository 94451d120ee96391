"""Which components of the residual stream made a token more probable."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int

from tl_contextmix.errors import bad, require_choice
from tl_contextmix.plotting.panels import Curves, Panel, Table
from tl_contextmix.results import storage
from tl_contextmix.results.axes import largest, require_shape
from tl_contextmix.results.component_sets import SHOWN, ComponentSet, component_table
from tl_contextmix.results.components import COLUMNS, Components
from tl_contextmix.results.labels import Provenance, Tokens, asked_words

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
class LogProbContributions(ComponentSet):
    """How much each component of the residual stream raised the log-probability of a token.

    With a foil: how much it raised the target's log-probability above the foil's. Rows are
    predictions: one for each sentence, or several where more positions, or an answer of several
    tokens, were asked about (`sentence`, `pos`); `summed` adds those of a sentence up.

    Attributes:
        scores: The scores; NaN at sources that cannot be read (padding, and later positions in a
            causal model), which are no components of that sentence.
        coefficients: What a neuron's vector is multiplied with; NaN for other components.
        logits: The component's own logit of the target, less the foil's, norm scale frozen at the
            real value (the before-softmax value); of several alternatives their mean, each as
            likely as the model finds it among them. NaN with a masked-LM head.
        components: What they belong to.
        by: Into what the stream was cut.
        score: What a score is, one of `SCORES`.
        norm: Rule for the final norm.
        steps: Name of each state of the stream, from nothing to all of it.
        trajectory: The target's log-probability, less the foil's, at each state.
        gaps: For each step that was cut: its own increase less the sum of its components'. NaN
            where it was not cut, or not all of its components were evaluated.
        log_prob: The target's log-probability, less the foil's, as the model itself gives it.
        evaluated: How many components were evaluated exactly, in each sentence, biases apart.
        possible: How many there are in each sentence, biases apart.
        note: Why all had to be evaluated, where a bound would have spared work; else empty.
        pos: Position of each prediction.
        target: The predicted token of each row; alternatives side by side.
        tokens: The tokens of the stack that writes the answer.
        encoder: The tokens of the encoder that it reads, or None.
        provenance: Where the numbers come from.
        foil: What the target is contrasted with, or None.
        sentence: Row of the input of each prediction.
    """

    LABELS = {"component": "components", "step": "steps"}
    COLUMNS = {"coefficient": "coefficients", "logit": "logits", "score": "scores"}

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
    foil: Tokens | None = None
    sentence: Int[torch.Tensor, " batch"] = None  # pyright: ignore[reportAssignmentType]

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("score", self.score, tuple(SCORES))
        for name, tokens in (("target", self.target), ("foil", self.foil)):
            if tokens is not None:
                expected = (len(self.scores), tokens.shape[1])
                require_shape(f"Tokens of the {name}", tuple(tokens.shape), expected)

    def asked(self, row: int = 0, quote: Callable[[str], str] = repr) -> str:
        """Returns what a row is about, such as ``' are' rather than ' is'``.

        Args:
            row: The row.
            quote: Puts a token in quotes.
        """
        return asked_words(self.target, self.foil, row, quote)

    def summed(self) -> LogProbContributions:
        """Returns the contributions to all predictions of a sentence together, such as an answer.

        Scores, logits, trajectories, gaps and log-probabilities of its rows are added up, component
        by component, whatever position they write to: `log_prob` is that of the whole answer. A
        component that some of the predictions cannot read adds nothing to those.

        Returns:
            One row for each sentence. Its target is the answer in one piece, its position the last
            one; coefficients of several positions have no meaning and are NaN.

        Raises:
            InvalidInput: If rows do not hold the same components, as after `top`.
        """
        sentences, group = self.sentence.cpu().unique(return_inverse=True)
        last = [int((group == number).nonzero()[-1]) for number in range(len(sentences))]
        names = [c for c in COLUMNS if c != "pos"]
        for row, number in enumerate(group.tolist()):
            theirs = [getattr(self.components, name) for name in ("kind", *names)]
            if not all(torch.equal(column[row], column[last[number]]) for column in theirs):
                raise bad(
                    "contributions to several predictions cannot be added up",
                    f"other components in row {row} than in row {last[number]}",
                    "the same components in every row of a sentence",
                    "Ask without k, and take .summed().top(k).",
                )

        def added(values: torch.Tensor) -> torch.Tensor:
            index = group.to(values.device)
            found = values.new_zeros(len(sentences), *values.shape[1:])
            found.index_add_(0, index, values.nan_to_num(0.0))
            known = torch.zeros_like(found).index_add_(0, index, (~values.isnan()).to(values))
            return found.masked_fill(known == 0, torch.nan)

        once = len(group) == len(sentences)
        rows = self._part({"batch": last})
        return replace(
            rows,
            scores=added(self.scores),
            coefficients=rows.coefficients if once else torch.full_like(rows.scores, torch.nan),
            logits=added(self.logits),
            trajectory=added(self.trajectory),
            gaps=added(self.gaps),
            log_prob=added(self.log_prob),
            evaluated=torch.zeros_like(rows.evaluated).index_add_(0, group, self.evaluated.cpu()),
            possible=torch.zeros_like(rows.possible).index_add_(0, group, self.possible.cpu()),
            target=rows.target if once else self._whole(group, last),
        )

    def _whole(self, group: torch.Tensor, last: list[int]) -> Tokens:
        """Returns the answer of each sentence in one piece."""
        texts = [
            "".join(self.target.strings[row][0] for row in (group == number).nonzero()[:, 0])
            for number in range(len(last))
        ]
        return Tokens(
            ids=self.target.ids[last][:, :1],
            strings=tuple((text,) for text in texts),
            mask=self.target.mask[last][:, :1],
            sides=((self.target.sides[0][0], 1),),
        )

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
            lines.append(f"  {self.asked(row)}: {listed}")
        return "\n".join(lines)

    def panels(self) -> tuple[Panel, ...]:
        """Returns, for each sentence: a map where there is one, the largest, the trajectory."""
        found: list[Panel] = []
        for row in range(len(self.target.strings)):
            title = f"Contributions by {self.by} to {self.asked(row)}"
            caption = "Blue raises the log-probability of the token, red lowers it."
            if self.foil is not None:
                caption = "Blue speaks for the first, red for the second."
            found += self._grids(row, self.by, title, caption, self.unit)
            found += [self._table(row), self._trajectory(row)]
        return tuple(found)

    def _row_table(self, row: int, k: int) -> list[tuple[Any, ...]]:
        """Returns label, source, score, logit and coefficient of the largest, as a table."""
        places = largest(self.scores[row], k).tolist()
        frame = []
        for place in places:
            one = self.components.at(row, place)
            numbers = [float(x[row, place]) for x in (self.scores, self.logits, self.coefficients)]
            word = self._word(one, row)
            frame.append((self.components.label(row, place), word, *numbers))
        return frame

    def _table(self, row: int) -> Table:
        evaluated, possible = int(self.evaluated[row]), int(self.possible[row])
        how = f"{evaluated:,} of {possible:,} evaluated exactly."
        return component_table(
            title=f"Largest of {possible:,} components by {self.by}",
            caption=f"{self.unit}, for {self.asked(row)}. {how} {self.note}".strip(),
            columns=("component", "source", "score", "logit", "coefficient"),
            rows=self._row_table(row, SHOWN),
            signed=("score", "logit"),
        )

    def _trajectory(self, row: int) -> Curves:
        steps = self.trajectory[row].detach().cpu()
        return Curves(
            title=f"Log-probability of {self.asked(row)} through the layers",
            caption="From no stream at all to the whole of it, after each sublayer. Neighbours "
            f"differ by the sublayer's own increase. Norm: {self.norm}; the model itself says "
            f"{float(self.log_prob[row]):.3f}.",
            labels=self.steps,
            series=(("log p", tuple(steps.tolist())),),
            unit="nats",
        )
