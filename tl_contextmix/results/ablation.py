"""Whether a prediction falls when components are ablated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int

from tl_contextmix.core.statistics import bootstrap_interval, spearman
from tl_contextmix.core.validation import require_choice
from tl_contextmix.plotting.panels import Curves, Panel, Place, Table
from tl_contextmix.results import storage
from tl_contextmix.results.attribution_graph import GraphNode
from tl_contextmix.results.base import Result
from tl_contextmix.results.component_sets import SHOWN
from tl_contextmix.results.components import Components
from tl_contextmix.results.labels import Provenance, Tokens, asked_words
from tl_contextmix.results.row_tables import as_text

if TYPE_CHECKING:
    import pandas

QUANTITIES = ("log_prob", "probability", "reciprocal_rank")


@storage.storable
@dataclass(frozen=True, eq=False)
class Knockout(Result):
    """A token's probability before and after components were ablated, and with random ones.

    Attributes:
        before: Log-probability, probability and reciprocal rank of the target, model as it is; with
            a foil each less the foil's.
        after: The same with the chosen components ablated.
        controls: The same with as many random ones of the same kinds ablated.
        components: What was ablated: heads and neurons, each once. Sentences may have different
            numbers of them, see `Components`.
        target: The token of each row, or alternatives.
        best: The most probable token of each sentence once they are out.
        provenance: Where the numbers come from.
        foil: What the target is contrasted with, or None.
        pos: Position of each prediction.
        sentence: Row of the input of each prediction.
    """

    LABELS = {"component": "components", "quantity": QUANTITIES}

    before: Float[torch.Tensor, "batch quantity"]
    after: Float[torch.Tensor, "batch quantity"]
    controls: Float[torch.Tensor, "batch control quantity"]
    components: Components
    target: Tokens
    best: Tokens
    provenance: Provenance
    foil: Tokens | None = None
    # None in files of 0.1.0, where each row is a sentence.
    pos: Int[torch.Tensor, " batch"] | None = None
    sentence: Int[torch.Tensor, " batch"] | None = None

    def __repr__(self) -> str:
        return f"Knockout of {self._count()} components\n{as_text(self.summary())}"

    def _count(self) -> str:
        """Returns how many were ablated in a sentence."""
        counts = (~self.components.is_empty()).sum(dim=1)
        least, most = int(counts.min()), int(counts.max())
        return str(most) if least == most else f"{least} to {most}"

    def to_dataframe(self) -> pandas.DataFrame:
        """Returns one row per prediction and quantity: before, after, mean over random controls."""
        import pandas

        found = []
        for row, best in enumerate(self.best.strings):
            where = {"sentence": row if self.sentence is None else int(self.sentence[row])}
            where |= {} if self.pos is None else {"pos": int(self.pos[row])}
            for index, name in enumerate(QUANTITIES):
                when = {w: float(values[row, index]) for w, values in self._times().items()}
                found.append(
                    {
                        "batch": row,
                        **where,
                        "target": self.target.alternatives(row),
                        **({} if self.foil is None else {"foil": self.foil.alternatives(row)}),
                        "quantity": name,
                        **when,
                        "best_after": best[0],
                    }
                )
        return pandas.DataFrame(found)

    def _times(self) -> dict[str, torch.Tensor]:
        """Returns the quantities of each sentence before, after, and without random components."""
        # The mean of no controls is NaN.
        return {"before": self.before, "after": self.after, "control": self.controls.mean(dim=1)}

    def summary(self) -> pandas.DataFrame:
        """Returns the mean over sentences of each quantity, with 95 % bootstrap intervals.

        ``reciprocal_rank`` is then the MRR. Rows: before, after, control.
        """
        import pandas

        rows = []
        for index, name in enumerate(QUANTITIES):
            for when, values in self._times().items():
                column = values[:, index].detach().double().cpu()
                rows.append((name, when, float(column.mean()), *bootstrap_interval(column)))
        return pandas.DataFrame(rows, columns=["quantity", "when", "mean", "low", "high"])

    def panels(self) -> tuple[Panel, ...]:
        """Returns the table of each prediction."""
        frame = self.to_dataframe().drop(columns="batch").rename(columns={"pos": "position"})
        return (
            Table(
                title=f"{self._count()} components ablated",
                caption="The target before, after, and with as many random components of the same "
                f"kinds ablated (mean of {self.controls.shape[1]} draws).",
                columns=tuple(name.replace("_", " ") for name in frame.columns),
                rows=tuple(map(tuple, frame.to_numpy().tolist())),
            ),
        )


@storage.storable
@dataclass(frozen=True, eq=False, repr=False)
class FlowKnockout(Result):
    """How far an answer falls without the nodes of an attribution graph, in nats.

    Attributes:
        scores: Score of each node in the graph.
        alone: How far the answer falls in the model without each node alone.
        together: The same without the first `counts` nodes; with `others` without all but these.
        linear: The same in the linearised model: patterns, norms and slopes stay.
        random: The same in the model without as many random nodes of the same sublayers.
        nodes: The nodes, in the order they are ablated.
        counts: How many are ablated at each step of the curve.
        log_prob: The target's log-probability, less the foil's, with all of them.
        target: The predicted token; alternatives side by side.
        foil: What it is contrasted with, or None.
        provenance: Where the numbers come from.
        others: Whether the curve is of these nodes alone, all others being ablated.
    """

    LABELS = {"node": "nodes", "count": "counts"}

    scores: Float[torch.Tensor, " node"]
    alone: Float[torch.Tensor, " node"]
    together: Float[torch.Tensor, " count"]
    linear: Float[torch.Tensor, " count"]
    random: Float[torch.Tensor, "count control"]
    nodes: tuple[GraphNode, ...]
    counts: tuple[int, ...]
    log_prob: float
    target: Tokens
    foil: Tokens | None
    provenance: Provenance
    others: bool = False

    def __repr__(self) -> str:
        title = f"FlowKnockout of {len(self.nodes)} nodes, {asked_words(self.target, self.foil)}"
        rank = f"rank correlation of score and effect {self.rank_correlation():.2f}"
        return f"{title}: {rank}\n{as_text(self.to_dataframe())}"

    def rank_correlation(self) -> float:
        """Returns Spearman's correlation of the nodes' scores and their effects alone."""
        return float(spearman(self.scores.double(), self.alone.double()))

    def to_dataframe(self, rows: str = "counts") -> pandas.DataFrame:
        """Returns a table.

        Args:
            rows: ``"counts"``: a row for each step of the curve; of the random nodes the mean over
                draws and its 95 % bootstrap interval. ``"nodes"``: a row for each node, with its
                score and its effect alone.
        """
        import pandas

        require_choice("table", rows, ("counts", "nodes"))
        if rows == "nodes":
            pairs = zip(self.nodes, self.scores.tolist(), self.alone.tolist(), strict=True)
            found = [(node.label, node.token, node.pos, *numbers) for node, *numbers in pairs]
            return pandas.DataFrame(found, columns=["label", "token", "pos", "score", "alone"])
        draws = self.random.detach().double().cpu()
        falls = zip(self.counts, self.together.tolist(), self.linear.tolist(), draws, strict=True)
        found = [(*row, float(drawn.mean()), *bootstrap_interval(drawn)) for *row, drawn in falls]
        names = ["count", "together", "linear", "random", "random_low", "random_high"]
        return pandas.DataFrame(found, columns=names)

    def panels(self) -> tuple[Panel, ...]:
        """Returns the curve, and the nodes with score and effect."""
        asked, frame = asked_words(self.target, self.foil), self.to_dataframe()
        names = {
            "together": "the graph's nodes",
            "linear": "the same, linearised",
            "random": "random nodes",
        }
        ends = (("together", "together"), ("linear", "linear"), ("random_low", "random_high"))
        nodes = self.to_dataframe("nodes").head(SHOWN).itertuples(index=False)
        return (
            Curves(
                title=f"{'With' if self.others else 'Without'} nodes of the graph of {asked}",
                caption=f"How far the answer falls, of {self.log_prob:.2f} nats, when so many "
                f"nodes are {'left and all others ' if self.others else ''}ablated: in the model, "
                "in the linearised model (patterns, norms and slopes frozen), and for random nodes "
                f"of the same layers ({self.random.shape[1]} draws, 95 % bootstrap interval of "
                "their mean).",
                labels=tuple(map(str, self.counts)),
                series=tuple((words, tuple(frame[name])) for name, words in names.items()),
                intervals=tuple(tuple(zip(frame[a], frame[b], strict=True)) for a, b in ends),
                unit="nats",
                axis="nodes",
            ),
            Table(
                title=f"Score and effect of nodes of the graph of {asked}",
                caption="Effect: how far the answer falls in the model without the node alone. "
                f"Rank correlation over {len(self.nodes)} nodes: {self.rank_correlation():.2f}.",
                columns=("node", "token", "score", "effect"),
                rows=tuple((n.label, Place(n.token, n.pos), n.score, n.alone) for n in nodes),
                signed=("score", "effect"),
            ),
        )
