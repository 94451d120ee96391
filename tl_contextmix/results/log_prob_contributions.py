"""Which components of the residual stream made a token more probable, or wrote a direction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from jaxtyping import Float, Int

from tl_contextmix.core.validation import require_choice, require_shape
from tl_contextmix.errors import InvalidInput
from tl_contextmix.plotting.panels import Curves, Panel, Table
from tl_contextmix.results import storage
from tl_contextmix.results.axes import largest
from tl_contextmix.results.component_sets import SHOWN, ComponentSet, component_table
from tl_contextmix.results.components import COLUMNS, Components
from tl_contextmix.results.context_map import ContextMap
from tl_contextmix.results.headings import in_plain_words
from tl_contextmix.results.labels import Provenance, Tokens, asked_words
from tl_contextmix.results.predicted_rows import PredictedRows, split_at

SCORES: dict[str, str] = {
    "log_prob_increase": "nats",
    "log_prob": "nats",
    "prob_increase": "probability",
    "norm": "norm of the vector",
    "coefficient": "coefficient",
    "rank": "1 / rank",
    "coefficient_norm": "|coefficient| times norm",
    "coefficient_rank": "coefficient / rank",
    "projection": "inner product",
}
"""What a component may be scored by, and the unit."""


@storage.storable
@dataclass(frozen=True, eq=False)
class LogProbContributions(ComponentSet):
    """How much each component of the residual stream raised the log-probability of a token.

    With a foil: how much it raised the target's log-probability above the foil's. Rows are
    predictions: one for each sentence, or several where more positions, or an answer of several
    tokens, were asked about (`sentence`, `pos`); `summed` adds those of a sentence up.

    Of a direction (score ``"projection"``) all log-probabilities are inner products with it.

    Attributes:
        scores: The scores; NaN at sources that cannot be read (padding, and later positions in a
            causal model), which are no components of that sentence.
        coefficients: What a neuron's vector is multiplied with; NaN for other components.
        logits: The component's own logit of the target, less the foil's, norm scale frozen at the
            real value (the before-softmax value); of several alternatives their mean, each as
            likely as the model finds it among them. NaN with a masked-LM head or a
            direction.
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
        target: The predicted token of each row; alternatives side by side. A direction has its
            name here, and the id -1.
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

    @property
    def of_direction(self) -> bool:
        """Whether a direction was asked about, not a token."""
        return self.score == "projection"

    def asked(self, row: int = 0, quote: Callable[[str], str] = repr) -> str:
        """Returns what a row is about, such as ``' are' rather than ' is'``.

        Args:
            row: The row.
            quote: Puts a token in quotes.
        """
        if self.of_direction:
            return self.target.strings[row][0]
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
                raise InvalidInput(
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
            target=rows.target if once or self.of_direction else _whole(self.target, group, last),
            foil=rows.foil if once or self.foil is None else _whole(self.foil, group, last),
        )

    def as_map(self, *, layers: bool = False) -> ContextMap:
        """Returns contributions by source as a map: rows are predictions, columns source tokens.

        Where an answer follows the text, as with ``generate``, its tokens are a side of their own.
        Scores have a sign. With a foil (single tokens, frozen norm) they are linear, so that sums
        over layers and tokens mean something; without one each is the increase by that part alone,
        and a sum misses `gaps`.

        Args:
            layers: Whether each layer has a map of its own; else they are added up.

        Raises:
            InvalidInput: If these are no contributions by ``"position"`` or ``"head_position"``, or
                not all of them, as after `top`.
        """
        where, count = self.components, self.tokens.shape[1]
        biases = where.is_bias()
        nowhere = biases | where.is_empty()
        sources = bool((where.source >= 0)[~nowhere].all())
        if self.by not in ("position", "head_position") or not (sources and self._all_there()):
            raise InvalidInput(
                "these contributions are no map of source tokens",
                f"by={self.by!r}, {where.shape[1]} components",
                "all of those by='position' or by='head_position'",
                "Ask for these, and take .top of the map.",
            )
        numbers, layer = where.layer.unique(return_inverse=True)
        width = count + (0 if self.encoder is None else self.encoder.shape[1])
        shape = (len(self.scores), len(numbers), 1 + max(0, int(where.head.max())), width)
        column = where.source + count * where.of_kind("cross_attn")
        place = (layer * shape[2] + where.head.clamp(min=0)) * width + column
        device, scores = self.scores.device, self.scores.nan_to_num(0.0)
        read = scores.masked_fill(nowhere.to(device), 0)
        parts = scores.new_zeros(len(scores), prod(shape[1:]))
        parts = parts.scatter_add(1, place.masked_fill(nowhere, 0).to(device), read).view(shape)
        bias = scores.new_zeros(shape[:2]).scatter_add(1, layer.to(device), scores - read)
        if not layers:
            parts, bias = parts.sum(dim=1, keepdim=True), bias.sum(dim=1, keepdim=True)
        rows = PredictedRows.of(self.sentence)
        order, mask = rows.order.to(device), rows.mask.to(device)[:, None, None]
        first = rows.order[:, 0].tolist()
        own = self.tokens.select(first, [*range(count)])

        def source(written: Tokens) -> Tokens:
            if self.encoder is None:
                return written
            return written.cat(self.encoder.select(first, [*range(width - count)]))

        result = ContextMap(
            scores=parts[order].permute(0, 2, 3, 1, 4) * mask[..., None],
            layers=tuple(numbers.tolist()) if layers else (0,),
            heads=("all",) if shape[2] == 1 else tuple(map(str, range(shape[2]))),
            point="attn_out" if layers else "prediction",
            stack="cross" if self.encoder is not None else own.sides[0][0],
            target=rows.label(own, self.pos, self.target),
            source=source(own),
            unit=self.unit,
            includes_residual=False,
            provenance=self.provenance,
            bias=bias[order].transpose(1, 2)[:, :, None] * mask if shape[2] == 1 else None,
            signed=True,
        )
        if not self._continues():
            return result
        prompt = "prompt" if self.encoder is None else "decoder"
        own = split_at(own, [int(self.pos[row]) + 1 for row in first], (prompt, "output"))
        return result.at(result.target, source(own))

    def _all_there(self) -> bool:
        """Whether no component is missing, as biases are after `top`."""
        return bool(self.components.is_bias().any(dim=1).all())

    def _continues(self) -> bool:
        """Whether each prediction is the token that follows, up to the end of the text."""
        follows = (self.pos + 1).cpu()[:, None]
        length = self.tokens.shape[1]
        ids = self.tokens.ids.cpu().gather(1, follows.clamp(max=length - 1))
        ends = self.tokens.mask.cpu().int().cumsum(1).argmax(1)
        last = torch.zeros_like(ends).scatter_reduce(0, self.sentence.cpu(), self.pos.cpu(), "amax")
        reached = last[self.sentence.cpu()] + 1 == ends
        return bool(((ids == self.target.ids.cpu()[:, :1])[:, 0] & reached).all())

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
        if self.by == "position" and len(self.sentence.unique()) < len(self.sentence):
            found += self.as_map().panels() if self._all_there() else ()
        for row in range(len(self.target.strings)):
            title = f"Contributions by {in_plain_words(self.by)} to {self.asked(row)}"
            caption = "Blue raises the log-probability of the token, red lowers it."
            if self.foil is not None:
                caption = "Blue speaks for the first, red for the second."
            if self.of_direction:
                caption = "Blue writes along the direction, red against it."
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
            title=f"Largest of {possible:,} components by {in_plain_words(self.by)}",
            caption=f"{self.unit}, for {self.asked(row)}. {how} {self.note}".strip(),
            columns=("component", "source", "score", "logit", "coefficient"),
            rows=self._row_table(row, SHOWN),
            signed=("score", "logit"),
        )

    def _trajectory(self, row: int) -> Curves:
        steps = self.trajectory[row].detach().cpu()
        what = "Inner product with" if self.of_direction else "Log-probability of"
        return Curves(
            title=f"{what} {self.asked(row)} through the layers",
            caption="From no stream at all to the whole of it, after each sublayer. Neighbours "
            f"differ by the sublayer's own increase. Norm: {self.norm}; the model itself says "
            f"{float(self.log_prob[row]):.3f}.",
            labels=self.steps,
            series=(("value" if self.of_direction else "log p", tuple(steps.tolist())),),
            unit=self.unit if self.of_direction else "nats",
            axis="so far written by",
        )


def _whole(tokens: Tokens, group: torch.Tensor, last: list[int]) -> Tokens:
    """Returns the answer of each sentence, or what it is contrasted with, in one piece."""
    texts = [
        "".join(tokens.strings[row][0] for row in (group == number).nonzero()[:, 0])
        for number in range(len(last))
    ]
    return Tokens(
        ids=tokens.ids[last][:, :1],
        strings=tuple((text,) for text in texts),
        mask=tokens.mask[last][:, :1],
        sides=((tokens.sides[0][0], 1),),
    )
