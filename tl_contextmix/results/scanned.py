"""Which components matter over many prompts: means, intervals and ranks, by category."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import reduce
from itertools import combinations, starmap
from math import prod
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int

from tl_contextmix.core.statistics import Moments, common_tail, spearman, t_quantile
from tl_contextmix.core.validation import require_choice, require_number
from tl_contextmix.errors import InvalidInput
from tl_contextmix.plotting.panels import Heatmap, Panel, Table
from tl_contextmix.results import storage
from tl_contextmix.results.axes import as_array, largest, positions
from tl_contextmix.results.component_sets import SHOWN, component_grids, component_table
from tl_contextmix.results.components import KINDS, Components
from tl_contextmix.results.curves import EVERY
from tl_contextmix.results.headings import in_plain_words
from tl_contextmix.results.labelled_arrays import LabelledArray
from tl_contextmix.results.labels import Provenance

if TYPE_CHECKING:
    import pandas
    import xarray

Level = Literal["layer", "head", "ff_neuron"]
LEVELS: tuple[Level, ...] = ("layer", "head", "ff_neuron")
_PLACE = ("layer", "head", "neuron", "expert")


@storage.storable
@dataclass(frozen=True, eq=False)
class Scan(LabelledArray):
    """How much each component raised the answers of many prompts, on average.

    Kept are running means, never the scores of a prompt: its size depends on the model and on how
    many categories there are, not on how many prompts.

    Attributes:
        mean: Mean score of each component over the prompts of a category, in nats.
        squares: Sum of its squared differences from the mean.
        mean_rank: Mean of its rank among the components of its level in each prompt, 1 being the
            largest score; NaN for biases.
        prompts: Number of prompts in each category.
        log_prob: Mean of what was explained: the target's log-probability, less the foil's.
        components: The components: sublayers, heads, neurons, and biases.
        categories: Names of the categories; ``"all"`` where there are none.
        read: Number of rows read so far.
        skipped: Number of those that could not be used.
        reasons: What the first of these were, with their row numbers.
        finished: Whether all rows were read.
        digest: Hash of the rows that were read.
        provenance: Where the numbers come from.
    """

    LABELS = {"category": "categories", "component": "components"}
    COLUMNS = {"mean": "mean"}
    ARRAY = "mean"

    mean: Float[torch.Tensor, "category component"]
    squares: Float[torch.Tensor, "category component"]
    mean_rank: Float[torch.Tensor, "category component"]
    prompts: Int[torch.Tensor, " category"]
    log_prob: Float[torch.Tensor, " category"]
    components: Components
    categories: tuple[str, ...]
    read: int
    skipped: int
    reasons: tuple[str, ...]
    finished: bool
    digest: str
    provenance: Provenance

    # Numbers

    @property
    def half_width(self) -> Float[torch.Tensor, "category component"]:
        """Half of the 95 % interval of each mean, by Student's t; NaN for a single prompt."""
        counts = self.prompts.tolist()
        reach = torch.tensor([t_quantile(count - 1) for count in counts], dtype=torch.float64)
        freedom = (self.prompts - 1).clamp(min=1)
        error = (self.squares / (freedom * self.prompts)[:, None]).sqrt()
        return error * reach[:, None]

    @property
    def low(self) -> Float[torch.Tensor, "category component"]:
        """Lower end of the 95 % interval of each mean."""
        return self.mean - self.half_width

    @property
    def high(self) -> Float[torch.Tensor, "category component"]:
        """Upper end of the 95 % interval of each mean."""
        return self.mean + self.half_width

    @property
    def rank(self) -> Float[torch.Tensor, "category component"]:
        """Rank of each mean among those of its level that are here, from 1; NaN for biases."""
        return ranks(self.mean, self.components)

    @property
    def levels(self) -> tuple[Level, ...]:
        """What the components are: ``"layer"``, ``"head"``, ``"ff_neuron"``."""
        found = level_of(self.components)
        return tuple(name for place, name in enumerate(LEVELS) if bool((found == place).any()))

    def of(self, level: Level) -> Scan:
        """Returns the components of one level: sublayers, heads or neurons, with their biases.

        Raises:
            InvalidInput: If the scan has none.
        """
        require_choice("level", level, self.levels)
        mine = level_of(self.components) == LEVELS.index(level)
        return self._part({"component": mine.nonzero()[:, 0].tolist()})

    def pooled(self) -> Scan:
        """Returns the scan with all categories as one."""
        counts, total = self.prompts.double(), self.prompts.sum()
        each = zip(self.prompts.tolist(), self.mean, self.squares, strict=True)
        moments = reduce(Moments.merge, starmap(Moments, each))
        share = (counts / total)[:, None]
        return replace(
            self,
            mean=moments.mean[None],
            squares=moments.squares[None],
            mean_rank=(self.mean_rank * share).sum(dim=0, keepdim=True),
            prompts=total[None],
            log_prob=(self.log_prob * share[:, 0]).sum()[None],
            categories=(EVERY,),
        )

    # Rankings and tables

    def top(
        self, k: int = 10, *, level: Level | None = None, category: str | None = None
    ) -> list[dict[str, Any]]:
        """Returns the components with the largest means, largest first; biases are skipped.

        Each has its name, layer, head and neuron, of neurons of experts the expert (None where it
        has no meaning), mean, interval and mean rank.

        Args:
            k: How many.
            level: Level of the components; None for heads where they were scanned, else neurons or
                sublayers.
            category: Of this category; None for all prompts together.

        Raises:
            InvalidInput: If ``k`` is not a positive integer, or there is no such level or category.
        """
        finest = self.levels[-1] if "head" not in self.levels else "head"
        found = self.of(level or finest)
        if category is None:
            found = found.pooled()
        else:
            found = found._part({"category": positions("category", category, self.categories)})
        return found._rows(require_number("k", k))

    def _rows(self, k: int) -> list[dict[str, Any]]:
        """Returns the largest of the first category."""
        rows, low, high = [], self.low[0], self.high[0]
        for place in _best(self.mean[0], self.components, k):
            one = self.components.at(0, place)
            numbers = {"mean": self.mean[0], "low": low, "high": high, "mean_rank": self.mean_rank}
            values = {n: float(v.reshape(-1)[place]) for n, v in numbers.items()}
            where = {name: one[name] for name in self.components.named(_PLACE)}
            rows.append({"component": self.components.label(0, place), **where, **values})
        return rows

    def shared(self, k: int = 10) -> pandas.DataFrame:
        """Returns which components are among the best of several categories, against chance.

        Columns: level; the categories (every pair, and all of them where there are more); how many
        of their ``k`` largest means they have in common; how many are expected of sets drawn at
        random, ``k (k / n) ** (categories - 1)``; the chance of so many or more (hypergeometric);
        Spearman's correlation of the means of a pair; the components.

        Raises:
            InvalidInput: If there is one category, or ``k`` is not a positive integer.
        """
        import pandas

        if len(self.categories) == 1:
            raise InvalidInput(
                "nothing can be shared by one category",
                f"the category {self.categories[0]!r}",
                "a scan of rows of several categories",
                "Give the rows a category.",
            )
        require_number("k", k)
        rows = [row for level in self.levels for row in self.of(level)._common(level, k)]
        return pandas.DataFrame(rows)

    def _own(self) -> list[int]:
        return (~self.components.is_bias()[0]).nonzero()[:, 0].tolist()

    def _bests(self, k: int) -> list[set[int]]:
        """Returns the places of the largest means of each category."""
        return [set(_best(row, self.components, k)) for row in self.mean]

    def _common(self, level: str, k: int) -> Iterator[dict[str, Any]]:
        own = self._own()
        best, k = self._bests(k), min(k, len(own))
        groups = [*combinations(range(len(best)), 2)]
        for group in [*groups, *([tuple(range(len(best)))] if len(best) > 2 else [])]:
            common = sorted(
                set.intersection(*(best[row] for row in group)),
                key=lambda place, group=group: -float(self.mean[list(group), place].mean()),
            )
            pair = spearman(*self.mean[list(group)][:, own]) if len(group) == 2 else torch.nan
            yield {
                "level": level,
                "categories": tuple(self.categories[row] for row in group),
                "shared": len(common),
                "expected": k * prod([k / len(own)] * (len(group) - 1)),
                "p": common_tail(len(own), k, len(group), len(common)),
                "spearman": float(pair),
                "components": tuple(self.components.label(0, place) for place in common),
            }

    def to_dataframe(self) -> pandas.DataFrame:
        """Returns one row per category and component.

        Columns: category, prompts, component (its name), level, kind, layer, head, neuron, of
        neurons of experts expert (-1 where there is none), mean, low, high, rank, mean_rank.
        """
        import numpy as np
        import pandas

        categories, count = self.mean.shape
        frame: dict[str, Any] = {
            "category": np.repeat(np.array(self.categories, dtype=object), count),
            "prompts": np.repeat(as_array(self.prompts), count),
            **{name: [*column] * categories for name, column in self._places().items()},
        }
        for name in ("mean", "low", "high", "rank", "mean_rank"):
            frame[name] = as_array(getattr(self, name)).reshape(-1)
        return pandas.DataFrame(frame)

    def to_xarray(self) -> xarray.Dataset:
        """Returns every array of the result, with name, level, kind and place of each component."""
        places = {
            "component_name" if name == "component" else f"component_{name}": ("component", column)
            for name, column in self._places().items()
        }
        return super().to_xarray().assign_coords(places)

    def _places(self) -> dict[str, list[Any]]:
        """Returns the columns that say which component each is."""
        table, levels = self.components, level_of(self.components)
        return {
            "component": [table.label(0, place) for place in range(table.shape[1])],
            "level": [LEVELS[level] for level in levels.tolist()],
            "kind": [KINDS[kind] for kind in table.kind[0].tolist()],
            **{name: getattr(table, name)[0].tolist() for name in table.named(_PLACE)},
        }

    # Words and pictures

    def sentence(self) -> str:
        """Returns in a sentence what adds most, and how much."""
        best, *_ = self.top(1)
        total = self.pooled()
        sentence = f"Over {int(total.prompts):,} prompts, {best['component']} adds most: "
        known = best["low"] == best["low"]
        ends = f" ({best['low']:.2f} to {best['high']:.2f})" if known else ""
        sentence += f"{best['mean']:+.2f} nats{ends} of {float(total.log_prob):+.2f}."
        if len(self.categories) > 1:
            names = [self.top(1, category=name)[0]["component"] for name in self.categories]
            times = names.count(best["component"])
            sentence += f" It is first in {times} of {len(names)} categories."
        return sentence

    def __repr__(self) -> str:
        counts = f"{int(self.prompts.sum()):,} prompts in {len(self.categories)} categories"
        unused = f", {self.skipped:,} of {self.read:,} rows skipped" if self.skipped else ""
        unfinished = "" if self.finished else ", not finished"
        lines = [f"Scan by {', '.join(self.levels)}: {counts}{unused}{unfinished}"]
        for level in self.levels:
            best = self.top(5, level=level)
            listed = ", ".join(f"{one['component']} {one['mean']:+.3f}" for one in best)
            lines.append(f"  {level}: {listed}")
        return "\n".join(lines)

    def panels(self) -> tuple[Panel, ...]:
        """Returns a map of all prompts and the largest means, by level; what categories share."""
        found: list[Panel] = []
        whole, count = self.pooled(), int(self.prompts.sum())
        for level in self.levels:
            part = whole.of(level)
            title = f"Mean contribution by {in_plain_words(level)} over {count:,} prompts"
            caption = "Blue raises the answer, red lowers it."
            found += component_grids(
                part.components, part.mean, 0, level, {}, title, caption, "nats"
            )
            found.append(part._table(f"Largest means by {in_plain_words(level)}, all prompts"))
            if len(self.categories) > 1:
                for row, name in enumerate(self.categories[:SHOWN]):
                    one = self.of(level)._part({"category": [row]})
                    found.append(one._table(f"Largest means by {in_plain_words(level)}, {name}"))
                found.append(self.of(level)._overlaps(level))
        return tuple(found)

    def _table(self, title: str) -> Table:
        rows = self._rows(SHOWN)
        columns = ("component", "mean", "low", "high", "mean_rank")
        return component_table(
            title=title,
            caption=f"nats, with 95 % intervals, over {int(self.prompts):,} prompts.",
            columns=tuple(name.replace("_", " ") for name in columns),
            rows=[tuple(row[name] for name in columns) for row in rows],
            signed=("mean",),
        )

    def _overlaps(self, level: str) -> Heatmap:
        """Returns how many of their ten largest means each two categories have in common."""
        k = 10
        values = torch.zeros(1, len(self.categories), len(self.categories))
        for row, best in enumerate(found := self._bests(k)):
            values[0, row] = torch.tensor([float(len(best & other)) for other in found])
        untold = len(self.categories) - SHOWN
        more = f" {untold} categories more have no table here; see to_dataframe()." * (untold > 0)
        return Heatmap(
            title=f"Shared among the {k} largest means by {in_plain_words(level)}",
            caption=f"Of sets drawn at random, {k * k / len(self._own()):.1f} are expected.{more}",
            values=values,
            sheets=(in_plain_words(level),),
            rows=self.categories,
            columns=self.categories,
            unit="components",
            axes=("category", "category"),
        )


def level_of(components: Components) -> Int[torch.Tensor, " component"]:
    """Returns the place in `LEVELS` of each component of the first row; biases with theirs."""
    result = torch.zeros_like(components.kind[0])
    biases = [KINDS[kind].endswith("bias") for kind in components.kind[0].tolist()]
    heads = ["attn" in KINDS[kind] for kind in components.kind[0].tolist()]
    bias, head = torch.tensor(biases, dtype=torch.bool), torch.tensor(heads, dtype=torch.bool)
    result[(components.head[0] >= 0) | (bias & head)] = 1
    result[(components.neuron[0] >= 0) | (bias & ~head)] = 2
    return result


def ranks(
    scores: Float[torch.Tensor, "row component"], components: Components
) -> Float[torch.Tensor, "row component"]:
    """Returns the rank of each score among those of its level, from 1; NaN for biases."""
    result = torch.full_like(scores, torch.nan, dtype=torch.float64)
    level, bias = level_of(components), components.is_bias()[0]
    for place in range(len(LEVELS)):
        own = ((level == place) & ~bias).nonzero()[:, 0]
        order = scores[:, own].argsort(dim=1, descending=True, stable=True)
        counted = torch.arange(1, len(own) + 1, dtype=torch.float64).expand(order.shape)
        result[:, own] = torch.empty(order.shape, dtype=torch.float64).scatter(1, order, counted)
    return result


def _best(mean: torch.Tensor, components: Components, k: int) -> list[int]:
    return largest(mean.masked_fill(components.is_bias()[0], torch.nan), k).tolist()
