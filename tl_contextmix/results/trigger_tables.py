"""What a corpus says about memories: their triggers, and whether values agree with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int

from tl_contextmix.core.pieces import join_pieces
from tl_contextmix.core.statistics import bootstrap_interval
from tl_contextmix.core.validation import require_number, require_shape
from tl_contextmix.plotting.panels import Bars, Panel, Samples, Table
from tl_contextmix.results import storage
from tl_contextmix.results.axes import as_array, require_place
from tl_contextmix.results.base import Result
from tl_contextmix.results.labels import Provenance
from tl_contextmix.results.row_tables import RowTable, as_text, frame_of, memory_name, table_of

if TYPE_CHECKING:
    import pandas

_QUANTILES = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9], dtype=torch.float64)
_RANKS = tuple(f"rank {quantile:.0%}" for quantile in _QUANTILES.tolist())
_SHOWN = 25


@storage.storable
@dataclass(frozen=True)
class Trigger:
    """One context that excites a memory.

    Attributes:
        rank: Its place among the triggers, from 0.
        value: The coefficient.
        document: Number of the document.
        position: Position of the trigger in it.
        tokens: The document's tokens that the model had read there: those up to the trigger; all
            of them where it reads both ways.
        activations: The memory's coefficient at each of them; NaN where it is not known.
        next_token: The token after it; empty at the end of a document.
        spaced: Whether a word begins with its space, see `Tokens`.
    """

    rank: int
    value: float
    document: int
    position: int
    tokens: tuple[str, ...]
    activations: tuple[float, ...]
    next_token: str
    spaced: bool | None = None

    def _require_whole(self) -> None:
        """Raises InvalidInput for a position or activations that do not fit the tokens."""
        require_place("position", self.position, len(self.tokens))
        require_shape("Trigger.activations", (len(self.activations),), (len(self.tokens),))

    @property
    def token(self) -> str:
        """The trigger itself."""
        return self.tokens[self.position]

    @property
    def context(self) -> str:
        """The text up to the trigger."""
        return join_pieces(self.tokens[: self.position + 1], self.spaced)

    @property
    def after(self) -> str:
        """The text after the trigger, as far as the model read it."""
        return join_pieces(self.tokens[self.position + 1 :], self.spaced)


@storage.storable
@dataclass(frozen=True, eq=False)
class TriggerExamples(Result):
    """The triggers of one memory, with their contexts.

    Attributes:
        layer: Its layer.
        neuron: Its neuron.
        tail: What was looked for: ``"positive"`` or ``"negative"`` coefficients, or a quadrant.
        triggers: The contexts, furthest coefficient first.
        promotes: Tokens the memory promotes there, most first; empty where no vocabulary is read.
        logits: Their logits.
        provenance: Where it comes from.
    """

    layer: int
    neuron: int
    tail: str
    triggers: tuple[Trigger, ...]
    promotes: tuple[str, ...]
    logits: tuple[float, ...]
    provenance: Provenance

    def __repr__(self) -> str:
        lines = [f"{memory_name(self)}, {self.tail}: {len(self.triggers)} triggers"]
        if self.promotes:
            lines.append("promotes: " + ", ".join(repr(token) for token in self.promotes))
        for trigger in self.triggers[:10]:
            lines.append(f"  {trigger.value:8.3f}  {trigger.context!r} -> {trigger.next_token!r}")
        return "\n".join(lines)

    def to_dataframe(self) -> pandas.DataFrame:
        """Returns one row per trigger."""
        computed = ("context", "after", "token", "next_token")
        frame = frame_of(Trigger, self.triggers, computed[:-1])
        return frame[["rank", "value", "document", "position", *computed]]

    def panels(self) -> tuple[Panel, ...]:
        """Returns the tokens that are promoted, and the contexts coloured by the coefficient."""
        name = memory_name(self)
        found: list[Panel] = []
        if self.promotes:
            rows = tuple(zip(self.promotes, self.logits, strict=True))
            caption = "The tokens with the highest logits of its value, as it is read here."
            found.append(Table(f"{name} promotes", caption, ("token", "logit"), rows))
        shown = self.triggers[:_SHOWN]
        labels = [
            f"{t.value:.3f} at {t.token!r} ({t.position}), document {t.document}, "
            f"next: {t.next_token!r}"
            for t in shown
        ]
        whole = any(len(t.tokens) > t.position + 1 for t in shown)
        ends = "documents are shown to their end, as the model reads both ways"
        ends = ends if whole else "each ends at its trigger"
        found.append(
            Samples(
                title=f"Triggers of {name}",
                caption=f"The {len(shown)} contexts that excite it most, most first; {ends}. "
                "Colour: the coefficient at each token.",
                name=name,
                labels=tuple(labels),
                tokens=tuple(t.tokens for t in shown),
                values=tuple(t.activations for t in shown),
                unit="coefficient",
            )
        )
        return tuple(found)


@storage.storable
@dataclass(frozen=True, eq=False)
class TriggerAgreement(Result):
    """Whether the token a value promotes is the one that follows its triggers.

    Memories without a trigger that has a next token are omitted, and counted.

    Attributes:
        layer: Layer of each memory.
        neuron: Its neuron.
        top: Token its value promotes.
        next_token: Token after its first trigger that has one.
        rank: Rank of that token among all that the value promotes, the first being 1.
        max_prob: Probability of the promoted token.
        precision: Share of its triggers, of those with a next token, that are followed by `top`.
        triggers: How many these are.
        left_out: How many memories have none.
        k: How many triggers were looked for.
        words: Text of each token that occurs, by its id.
        provenance: Where it comes from.
    """

    NAMED = {"top": "words", "next_token": "words"}

    layer: Int[torch.Tensor, " memory"]
    neuron: Int[torch.Tensor, " memory"]
    top: Int[torch.Tensor, " memory"]
    next_token: Int[torch.Tensor, " memory"]
    rank: Int[torch.Tensor, " memory"]
    max_prob: Float[torch.Tensor, " memory"]
    precision: Float[torch.Tensor, " memory"]
    triggers: Int[torch.Tensor, " memory"]
    left_out: int
    k: int
    words: dict[str, str]
    provenance: Provenance

    def __repr__(self) -> str:
        head = f"TriggerAgreement of {len(self.layer)} memories, {self.left_out} skipped"
        return f"{head}\n{as_text(self.by_layer(), 4)}"

    @property
    def agree(self) -> torch.Tensor:
        """Where the promoted token is the one after the first trigger."""
        return self.top == self.next_token

    def to_dataframe(self) -> pandas.DataFrame:
        """Returns one row per memory."""
        import pandas

        return pandas.DataFrame(
            {
                "layer": as_array(self.layer),
                "neuron": as_array(self.neuron),
                "promotes": [self.words[str(one)] for one in self.top.tolist()],
                "next_token": [self.words[str(one)] for one in self.next_token.tolist()],
                "agree": as_array(self.agree),
                "rank": as_array(self.rank),
                "max_prob": as_array(self.max_prob),
                f"precision@{self.k}": as_array(self.precision),
                "triggers": as_array(self.triggers),
            }
        )

    def by_layer(self) -> pandas.DataFrame:
        """Returns the agreement rate and the ranks of each layer.

        ``chance``: the rate if the layer's next tokens were dealt out to its memories at random.
        ``low`` and ``high``: 95 % bootstrap interval over memories.
        """
        import pandas

        rows = []
        for layer in self.layer.unique().tolist():
            here = self.layer == layer
            agree, ranks = self.agree[here].double(), self.rank[here].double()
            low, high = bootstrap_interval(agree)
            quantiles = torch.quantile(ranks, _QUANTILES).tolist()
            rows.append(
                {
                    "layer": layer,
                    "agreement": float(agree.mean()),
                    "low": low,
                    "high": high,
                    "chance": _chance(self.top[here], self.next_token[here]),
                    f"precision@{self.k}": float(self.precision[here].mean()),
                    **dict(zip(_RANKS, quantiles, strict=True)),
                    "memories": int(here.sum()),
                }
            )
        return pandas.DataFrame(rows)

    def by_max_prob(self, bins: int = 10) -> pandas.DataFrame:
        """Returns the agreement rate of memories with like max probabilities, in equal groups.

        Args:
            bins: How many groups.

        Raises:
            InvalidInput: If that is no positive integer.
        """
        import pandas

        bins = require_number("bins", bins)
        order = self.max_prob.argsort(stable=True)
        parts = order.tensor_split(min(bins, len(order))) if len(order) else ()
        return pandas.DataFrame(
            {
                "from": float(self.max_prob[part[0]]),
                "to": float(self.max_prob[part[-1]]),
                "agreement": float(self.agree[part].double().mean()),
                "memories": len(part),
            }
            for part in parts
        )

    def panels(self) -> tuple[Panel, ...]:
        """Returns the paper's charts, and the memories whose triggers agree most."""
        layers, bins = self.by_layer(), self.by_max_prob()
        labels = tuple(f"layer {layer}" for layer in layers["layer"])
        precise = f"precision@{self.k}"
        rates = (
            ("agreement", tuple(layers["agreement"])),
            ("chance", tuple(layers["chance"])),
            (precise, tuple(layers[precise])),
        )
        ranks = tuple((name, tuple(layers[name])) for name in _RANKS)
        groups = tuple(f"{row['from']:.2g} to {row['to']:.2g}" for _, row in bins.iterrows())
        best = self.to_dataframe().rename(columns={precise: "precise"})
        best = best.sort_values(["precise", "triggers"], ascending=False, kind="stable")
        return (
            Bars(
                "Values agree with their triggers",
                "Share of memories whose value promotes the token after their first trigger; "
                "chance: had the layer's next tokens been dealt out at random; precision: share "
                "of all their triggers that are followed by it.",
                labels,
                rates,
                "share",
                axis="layer",
            ),
            Bars(
                "Rank of the next token",
                "Among all tokens a value promotes, where the one after its first trigger is: "
                "quantiles over memories.",
                labels,
                ranks,
                "rank",
                axis="layer",
            ),
            Bars(
                "Agreement by probability",
                "Memories in groups of equal size by the probability their value gives to its "
                "first token.",
                groups,
                (("agreement", tuple(bins["agreement"])),),
                "share",
                axis="probability",
            ),
            table_of(
                [*best.head(20).itertuples()],
                {
                    "memory": memory_name,
                    "promotes": "promotes",
                    precise: "precise",
                    "triggers": "triggers",
                    "largest probability": "max_prob",
                },
                "Memories that agree most",
                "By the share of their triggers that are followed by what they promote.",
            ),
        )


def _chance(top: torch.Tensor, following: torch.Tensor) -> float:
    """Returns the mean agreement over all pairs of a value and another memory's next token."""
    ids, counts = following.unique(return_counts=True)
    places = torch.searchsorted(ids, top).clamp(max=len(ids) - 1)
    hits = torch.where(ids[places] == top, counts[places], 0)
    return float(hits.sum()) / (len(top) * len(following))


@storage.storable
@dataclass(frozen=True)
class Pattern:
    """What most triggers of a memory have in common.

    Attributes:
        layer: Its layer.
        neuron: Its neuron.
        kind: ``"ends with"`` or ``"contains"``.
        text: The tokens.
        length: How many tokens.
        share: Share of triggers that have it.
        chance: Share of all prefixes that have it, in up to a thousand documents of the corpus.
        triggers: How many triggers.
        contexts: How many of their contexts differ.
    """

    layer: int
    neuron: int
    kind: str
    text: str
    length: int
    share: float
    chance: float
    triggers: int
    contexts: int


@storage.storable
@dataclass(frozen=True, eq=False, repr=False)
class TriggerPatterns(RowTable):
    """What the triggers of memories have in common, with chance levels.

    Attributes:
        rows: The patterns.
        provenance: Where it comes from.
    """

    ROW = Pattern
    CELLS = {
        "memory": memory_name,
        "pattern": "kind",
        "tokens": "text",
        **{name: name for name in ("share", "chance", "triggers", "contexts")},
    }
    TITLE = "What triggers have in common"
    CAPTION = (
        "The most frequent ending and the most frequent token of each memory's triggers: the share "
        "of triggers that have it, and of all prefixes of the corpus."
    )

    rows: tuple[Pattern, ...]
    provenance: Provenance
