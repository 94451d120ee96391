"""Which components of the residual stream made a token more probable."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int

from tl_contextmix.errors import require_choice
from tl_contextmix.plotting.panels import Curves, Panel, Table
from tl_contextmix.results import storage
from tl_contextmix.results.axes import largest, require_shape
from tl_contextmix.results.component_sets import SHOWN, ComponentSet, component_table
from tl_contextmix.results.components import Components
from tl_contextmix.results.labels import Provenance, Tokens

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

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("score", self.score, tuple(SCORES))
        require_shape("Tokens of the target", tuple(self.target.shape), (len(self.scores), 1))

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

    def panels(self) -> tuple[Panel, ...]:
        """Returns, for each sentence: a map where there is one, the largest, the trajectory."""
        found: list[Panel] = []
        for row in range(len(self.target.strings)):
            title = f"Contributions by {self.by} to {self.target.strings[row][0]!r}"
            caption = "Blue raises the log-probability of the token, red lowers it."
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
