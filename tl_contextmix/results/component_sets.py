"""Results about components of the residual stream: one number for each of a set of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from jaxtyping import Int
from torch.nn.utils.rnn import pad_sequence

from tl_contextmix.core.validation import require_number
from tl_contextmix.errors import InvalidInput
from tl_contextmix.plotting.panels import Heatmap, Table
from tl_contextmix.results.axes import as_array, largest, require_place
from tl_contextmix.results.base import tensor_axes
from tl_contextmix.results.components import (
    ERRORS,
    FEATURES,
    KINDS,
    STEERING,
    Components,
    taken,
)
from tl_contextmix.results.headings import in_plain_words
from tl_contextmix.results.labelled_arrays import LabelledArray
from tl_contextmix.results.labels import Tokens

if TYPE_CHECKING:
    import pandas
    import xarray

SHOWN = 20
S = TypeVar("S", bound="ComponentSet")


class ComponentSet(LabelledArray):
    """A score for each component of the residual stream, sentence by sentence.

    Where a component has no score, it is NaN: an empty place, or a source that cannot be read.
    """

    LABELS = {"component": "components"}
    ARRAY = "scores"

    scores: torch.Tensor
    components: Components
    tokens: Tokens
    encoder: Tokens | None

    def __post_init__(self) -> None:
        if getattr(self, "sentence", 0) is None:  # files of 0.1.0: each row is a sentence
            object.__setattr__(self, "sentence", torch.arange(len(self.scores)))
        super().__post_init__()

    def _require_whole(self) -> None:
        """Raises InvalidInput for a position that there is not, too."""
        super()._require_whole()
        for kind in self.components.kind.unique().tolist():
            name, mine = KINDS[kind], self.components.kind == kind
            own = self.encoder if name.startswith("encoder") else None
            sides = {"pos": own or self.tokens, "source": self._read().get(name, self.tokens)}
            for column, side in sides.items():
                last = int(getattr(self.components, column)[mine].max())
                require_place(f"components.{column}", last, side.shape[1])

    def labels(self, row: int = 0) -> tuple[str, ...]:
        """Returns the short name of each component of a sentence."""
        return tuple(self.components.label(row, i) for i in range(self.scores.shape[1]))

    def top(self: S, k: int = 10) -> S:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Returns the ``k`` largest scores of each sentence, largest first, without biases.

        Where a sentence has fewer, its last places are empty: score NaN, see `Components`. What is
        returned can be given as ``neurons=`` to `query_contributions` (which components activated
        those) and to `knockout`.

        Raises:
            InvalidInput: If ``k`` is not a positive integer.
        """
        bias = self.components.is_bias().to(self.scores.device)
        kept = self.scores.detach().masked_fill(bias, torch.nan)
        found = [largest(row, require_number("k", k)) for row in kept]
        index = pad_sequence(found, batch_first=True, padding_value=-1).to(self.scores.device)
        return self._at(index)

    def overlap(self, k: int = 10, *, categories: Sequence[str] | None = None) -> pandas.DataFrame:
        """Returns how many of the best components two predictions share, on average.

        Of every two different predictions the share of their ``k`` best components that are in
        both, averaged over all pairs of two categories: facts of a relation that share their
        neurons have a large number on the diagonal. What is read from several sources is one
        component.

        Args:
            k: How many of each prediction, without biases.
            categories: The category of each prediction; None for one row and column each (then 1
                on the diagonal).

        Returns:
            Categories by categories; NaN where there is no pair.

        Raises:
            InvalidInput: If there is not a category for each prediction.
        """
        import pandas

        names = [*range(len(self.scores))] if categories is None else [*categories]
        if len(names) != len(self.scores):
            raise InvalidInput(
                "categories do not fit the predictions",
                f"{len(names)} categories of {len(self.scores)} predictions",
                "one for each",
                "Pass a list as long as the batch.",
            )
        best = self.top(k).components
        nowhere = torch.full_like(best.pos, -1)
        same = replace(best, pos=nowhere, source=nowhere).numbers()
        sets = [{*row[real].tolist()} for row, real in zip(same, ~best.is_empty(), strict=True)]
        found: dict[tuple[object, object], list[float]] = {}
        for row, mine in enumerate(sets):
            for other, theirs in enumerate(sets):
                if row != other or categories is None:
                    size = min(len(mine), len(theirs))
                    share = len(mine & theirs) / size if size else float("nan")
                    found.setdefault((names[row], names[other]), []).append(share)
        kinds = list(dict.fromkeys(names))
        nothing = [float("nan")]
        cells = [
            [sum(one) / len(one) for b in kinds for one in [found.get((a, b), nothing)]]
            for a in kinds
        ]
        return pandas.DataFrame(cells, index=kinds, columns=kinds)

    def _at(self: S, index: Int[torch.Tensor, "batch some"]) -> S:
        """Returns some of the components of each sentence; empty places where the index is -1."""
        changes: dict[str, Any] = {"components": self.components.select(index.cpu())}
        for name, axes in tensor_axes(type(self)).items():
            if "component" not in axes:
                continue
            values = getattr(self, name).movedim(axes.index("component"), -1)
            wide = index.view(len(index), *[1] * (values.ndim - 2), -1)
            wide = wide.expand(*values.shape[:-1], -1)
            some = taken(values.flatten(0, -2), wide.flatten(0, -2)).view(wide.shape)
            changes[name] = some.movedim(-1, axes.index("component"))
        for name in self.TEXTS:
            rows = zip(getattr(self, name), index.tolist(), strict=True)
            changes[name] = tuple(
                tuple(row[i] if i >= 0 else () for i in places) for row, places in rows
            )
        return replace(self, **changes)

    def _frame(self) -> pandas.DataFrame:
        """Returns where each component stands as a table, one row each."""
        import numpy as np
        import pandas

        batch, count = self.components.shape
        frame = pandas.DataFrame(
            {
                "batch": np.repeat(np.arange(batch), count),
                "kind": np.array(KINDS, dtype=object)[as_array(self.components.kind).reshape(-1)],
                **{
                    name: as_array(getattr(self.components, name)).reshape(-1)
                    for name in self.components.named()
                },
            }
        )
        words = np.full(len(frame), "", dtype=object)
        for kind, side in self._read().items():
            chosen = ((frame.kind == kind) & (frame.source >= 0)).to_numpy()
            table = np.array(side.strings, dtype=object).reshape(batch, -1)
            words[chosen] = table[frame.batch[chosen], frame.source[chosen]]
        frame["source_token"] = words
        sentence = getattr(self, "sentence", None)
        if sentence is not None:
            frame.insert(1, "sentence", as_array(sentence)[frame.batch])
        return frame

    def _read(self) -> dict[str, Tokens]:
        """Returns the tokens that each kind of attention reads."""
        return {"attn": self.tokens, "cross_attn": self.encoder or self.tokens}

    def to_dataframe(self) -> pandas.DataFrame:
        """Returns one row per component; those without a score are omitted.

        Columns: batch (the prediction), sentence (of the input), kind, layer, pos, head, source,
        neuron, in models that have any expert (-1 where there is none), source_token; the numbers,
        the score last.
        """
        frame = self._frame()
        for name, field in self.COLUMNS.items():
            frame[name] = as_array(getattr(self, field)).reshape(-1)
        return frame[frame.score.notna()].reset_index(drop=True)

    def to_xarray(self) -> xarray.Dataset:
        """Returns every array of the result, with kind and place of each component."""
        at = ("batch", "component")
        kinds = [[KINDS[place] for place in row] for row in self.components.kind.tolist()]
        places = {"component_kind": (at, kinds)}
        for name in self.components.named():
            places[f"component_{name}"] = (at, as_array(getattr(self.components, name)))
        return super().to_xarray().assign_coords(places)

    def _word(self, one: dict[str, Any], row: int) -> str:
        """Returns the token a component reads; empty where it reads none."""
        side = self._read().get(one["kind"], self.tokens)
        return "" if one["source"] is None else side.strings[row][one["source"]]

    def _grids(self, row: int, by: str, title: str, caption: str, unit: str) -> list[Heatmap]:
        """Returns layers by sublayers, heads, sources or experts, a map for each kind."""
        words = {kind: side.strings[row] for kind, side in self._read().items()}
        return component_grids(self.components, self.scores, row, by, words, title, caption, unit)


def component_grids(
    components: Components,
    scores: torch.Tensor,
    row: int,
    by: str,
    words: Mapping[str, Sequence[str]],
    title: str,
    caption: str,
    unit: str,
) -> list[Heatmap]:
    """Returns the scores of a row by layers and sublayers, heads or sources; of neurons nothing.

    ``words`` are the sources of each kind of attention.
    """
    column = {"head": "head", "position": "source", "expert": "expert"}.get(by)
    every = ("attn", "mixer", "cross_attn", "mlp", "per_layer_embed", *STEERING, *FEATURES, *ERRORS)
    groups = [("attn",), ("cross_attn",)] if column else [every]
    groups = [("mlp",)] if by == "expert" else groups
    if column is None and by != "layer":
        return []
    result = []
    for kinds in groups:
        numbers = [KINDS.index(kind) for kind in kinds]
        chosen = torch.isin(components.kind[row], torch.tensor(numbers))
        chosen &= ~scores[row].isnan().cpu()
        # Of several streams one map would draw one over another.
        if not bool(chosen.any()) or len(components.pos[row][chosen].unique()) > 1:
            continue
        layer, place = components.layer[row], getattr(components, column or "kind")[row]
        layers, rows = layer[chosen].unique(return_inverse=True)
        places, columns = place[chosen].unique(return_inverse=True)
        values = torch.full((1, len(layers), len(places)), torch.nan)
        values[0, rows, columns] = scores[row].detach().float().cpu()[chosen]
        names = {
            "head": lambda index: f"head {index}",
            "expert": lambda index: f"expert {index}",
            "source": lambda index, kind=kinds[0]: words[kind][index],
            None: lambda index: in_plain_words(KINDS[index]),
        }[column]
        result.append(
            Heatmap(
                title=title if len(kinds) > 1 else f"{title}, {in_plain_words(kinds[0])}",
                caption=caption,
                values=values,
                sheets=(in_plain_words(by),),
                rows=tuple(f"layer {number}" for number in layers.tolist()),
                columns=tuple(map(names, places.tolist())),
                unit=unit,
                axes=("layer", "sublayer" if column is None else column),
            )
        )
    return result


def join_rows(parts: Sequence[S]) -> S:
    """Returns the rows of several results one after the other; the rest is that of the first."""
    if len(parts) == 1:
        return parts[0]
    width = max(part.scores.shape[1] for part in parts)
    places = torch.arange(width)
    padded = []
    for part in parts:
        count = part.scores.shape[1]
        index = places.where(places < count, -1).expand(len(part.scores), -1)
        padded.append(part if count == width else part._at(index.to(part.scores.device)))
    first, changes = padded[0], dict[str, Any]()
    for name, axes in tensor_axes(type(first)).items():
        if "batch" in axes:
            changes[name] = torch.cat([getattr(part, name) for part in padded])
    for name, value in vars(first).items():
        listed = [getattr(part, name) for part in padded]
        if isinstance(value, Components):
            columns = zip(*(vars(one).values() for one in listed), strict=True)
            changes[name] = Components(*map(torch.cat, columns))
        elif isinstance(value, Tokens):
            changes[name] = Tokens.stack(listed)
    return replace(first, **changes)


def component_table(
    title: str,
    caption: str,
    columns: tuple[str, ...],
    rows: Sequence[tuple[Any, ...]],
    signed: tuple[str, ...],
) -> Table:
    """Returns a table without the columns that have no meaning for any of its components."""
    filled = [
        index
        for index in range(len(columns))
        if not rows or any(row[index] == row[index] and row[index] != "" for row in rows)
    ]
    names = tuple(columns[index] for index in filled)
    # Nothing is not the empty token.
    cells = [tuple(None if row[i] == "" else row[i] for i in filled) for row in rows]
    return Table(
        title, caption, names, tuple(cells), tuple(name for name in signed if name in names)
    )
