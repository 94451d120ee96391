"""The map: how much each source token matters to each target token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import torch
from jaxtyping import Bool, Float

from tl_contextmix.core.rollout import roll_out
from tl_contextmix.core.words import Spans, merge, require_spans
from tl_contextmix.errors import bad, warn
from tl_contextmix.plotting.panels import Heatmap, Panel
from tl_contextmix.results import storage
from tl_contextmix.results.axes import (
    as_array,
    largest,
    layer_positions,
    positions,
    real_pairs,
    require_choice,
    require_count,
    require_shape,
    unravel,
)
from tl_contextmix.results.base import Result
from tl_contextmix.results.labels import Provenance, Tokens

if TYPE_CHECKING:
    import pandas

# A text representation reads the scores only of maps up to this size; larger ones may fill memory.
_SMALL = 1_000_000


@storage.storable
@dataclass(frozen=True, eq=False)
class ContextMap(Result):
    """How much each source token matters to each target token, per layer and head.

    Attributes:
        scores: The map, non-negative (NaN where there is no score). 0 where source or target is
            padding.
        layers: Number of each layer on the axis.
        heads: Label of each head; ``("all",)`` where heads are summed before the score is taken.
        point: Where in the block it was measured, for example ``"block_out"``.
        stack: ``"decoder"``, ``"encoder"`` or ``"cross"``.
        target: Tokens of the rows.
        source: Tokens of the columns.
        unit: What a score is, for example ``"norm"``.
        bias: Score of what belongs to no source token (output biases, norm biases), or None.
        includes_residual: Whether the token's own residual is part of its diagonal score.
        normalized: How rows were scaled: ``"none"``, ``"sum"`` or ``"max"``. It says what was
            done: rows that lost sources to `select` no longer add up to 1.
        from_input: Whether a layer's map reaches back to the tokens of the input (a rollout,
            DecompX, gradients) and not to those of the layer's own input.
        provenance: Where the numbers come from.
    """

    scores: Float[torch.Tensor, "batch layer head target source"]
    layers: tuple[int, ...]
    heads: tuple[str, ...]
    point: str
    stack: str
    target: Tokens
    source: Tokens
    unit: str
    includes_residual: bool
    provenance: Provenance
    bias: Float[torch.Tensor, "batch layer head target"] | None = None
    normalized: Literal["none", "sum", "max"] = "none"
    from_input: bool = False

    def __post_init__(self) -> None:
        batch, target = self.target.ids.shape
        rows = (batch, len(self.layers), len(self.heads), target)
        require_shape("Tokens of the source axis", self.source.ids[:, 0], (batch,))
        require_shape("ContextMap.scores", self.scores, (*rows, self.source.ids.shape[1]))
        if self.bias is not None:
            require_shape("ContextMap.bias", self.bias, rows)
        require_choice("ContextMap", "scaling", self.normalized, ("none", "sum", "max"))
        _require_scores(self.scores, self._real())

    def __repr__(self) -> str:
        batch, layer, head, target, source = self.scores.shape
        lines = [
            f"ContextMap {self.provenance.method} at {self.point} ({self.stack}), {self.unit}: "
            f"batch {batch}, layer {layer}, head {head}, target {target}, source {source}"
        ]
        if self.scores.numel() <= _SMALL:
            lines += [
                f"  batch {row['batch']}, layer {row['layer']}, head {row['head']}: "
                f"{row['source_token']!r} -> {row['target_token']!r} {row['score']:.3g}"
                for row in self.top(5)
            ]
        return "\n".join(lines)

    @property
    def causal(self) -> bool:
        """Whether rows and columns are the same tokens and no target reads a later one."""
        return self.target.equals(self.source) and not any(
            bool(scores.triu(diagonal=1).any()) for scores in self.scores.flatten(0, 1)
        )

    @property
    def layer_names(self) -> tuple[str, ...]:
        """What each layer's map is of, as text: ``"2"``, ``"input to 2"``, or ``"prediction"``."""
        if self.point == "resid_in":
            return ("prediction",) * len(self.layers)
        return tuple(f"input to {n}" if self.from_input else str(n) for n in self.layers)

    def normalize(self, how: Literal["sum", "max"] = "sum") -> ContextMap:
        """Returns the map with each row divided by its sum or by its maximum.

        A row of zeros stays a row of zeros; a row with a NaN becomes NaN. `bias` is divided by the
        same number, so that it keeps its size relative to the scores of its row. `unit` says so.

        Args:
            how: ``"sum"`` (rows add up to 1) or ``"max"`` (the largest score of a row is 1).

        Raises:
            InvalidInput: If ``how`` is neither.
        """
        require_choice("normalize", "how", how, ("sum", "max"))
        reduced = self.scores.sum(-1) if how == "sum" else self.scores.amax(-1)
        divisor = torch.where(reduced == 0, torch.ones_like(reduced), reduced)
        bias = None if self.bias is None else self.bias / divisor
        return replace(
            self,
            scores=self.scores / divisor[..., None],
            bias=bias,
            normalized=how,
            unit=f"{self.unit} / row {'sum' if how == 'sum' else 'maximum'}",
        )

    def mean(self, axis: Literal["head"] = "head") -> ContextMap:
        """Returns the average over heads, the axis kept with length 1 and the label ``"mean"``.

        Layers are not averaged: no number could label the result, and they differ in scale.
        `rollout` combines them; for an average all the same, take ``scores.mean(1)``.

        Args:
            axis: ``"head"``.

        Raises:
            InvalidInput: If ``axis`` is anything else.
        """
        require_choice("mean", "axis", axis, ("head",))
        bias = None if self.bias is None else self.bias.mean(2, keepdim=True)
        return replace(self, scores=self.scores.mean(2, keepdim=True), bias=bias, heads=("mean",))

    def select(
        self,
        *,
        batch: int | Sequence[int] | None = None,
        layer: int | Sequence[int] | None = None,
        head: int | str | Sequence[int | str] | None = None,
        target: int | Sequence[int] | None = None,
        source: int | Sequence[int] | str | None = None,
    ) -> ContextMap:
        """Returns part of the map; every axis is kept, and nothing is renormalised.

        Args:
            batch: Row or rows of the batch.
            layer: Number or numbers of layers, as in `layers`; negative counts from the end.
            head: Position or positions on the head axis, or labels as in `heads`.
            target: Position or positions of targets; negative counts from the end of the axis,
                which in a padded batch is padding for the shorter texts: a warning says so.
            source: The same for sources, or the name of a side (``"encoder"``) to keep its tokens.

        Raises:
            InvalidInput: If something asked for is not there, or nothing is.

        Warns:
            ContextMixWarning: If every target selected of a row is padding.
        """
        if isinstance(source, str):
            sides = tuple(name for name, _ in self.source.sides)
            require_choice("select", "source", source, sides)
            source = self.source.side(source)
        rows = positions("batch", batch, (), self.scores.shape[0])
        targets = positions("target", target, (), self.scores.shape[3])
        padding = [] if target is None else self.target.padding(rows, targets)
        if padding:
            warn(
                f"every target selected of row {padding[0]} is padding, whose scores are 0: "
                f"{targets}. Select one row, and positions of its "
                f"{int(self.target.mask[padding[0]].sum())} tokens."
            )
        return self._part(
            rows,
            layer_positions(layer, self.layers),
            positions("head", head, self.heads, len(self.heads)),
            targets,
            positions("source", source, (), self.scores.shape[4]),
        )

    def _part(
        self,
        rows: list[int],
        layers: list[int],
        heads: list[int],
        targets: list[int],
        sources: list[int],
    ) -> ContextMap:
        scores = self.scores[rows][:, layers][:, :, heads][:, :, :, targets]
        bias = self.bias
        if bias is not None:
            bias = bias[rows][:, layers][:, :, heads][:, :, :, targets]
        return replace(
            self,
            scores=scores[..., sources],
            layers=tuple(self.layers[index] for index in layers),
            heads=tuple(self.heads[index] for index in heads),
            target=self.target.select(rows, targets),
            source=self.source.select(rows, sources),
            bias=bias,
        )

    def words(
        self,
        spans: Spans | None = None,
        *,
        rows: Literal["mean", "max"] = "mean",
        columns: Literal["sum", "max"] = "sum",
    ) -> ContextMap:
        """Returns the map of words by words; a row that sums to 1 still does.

        Args:
            spans: Stretches ``(start, stop)`` of tokens, the same on both axes and in every
                sentence; None for the words, see `Tokens.words`.
            rows: What becomes of the rows of a word's tokens.
            columns: What becomes of their columns. The largest (``"max"``) no longer sums to 1.

        Raises:
            InvalidInput: If a stretch covers no token.
        """
        require_choice("words", "rows", rows, ("mean", "max"))
        require_choice("words", "columns", columns, ("sum", "max"))
        target, source = (
            tokens.words()
            if spans is None
            else [require_spans(spans, tokens.ids.shape[1])] * len(tokens.strings)
            for tokens in (self.target, self.source)
        )
        scores = _merged(self.scores, self.source, source, columns)
        scores = _merged(scores.transpose(3, 4), self.target, target, rows).transpose(3, 4)
        bias = None if self.bias is None else _merged(self.bias, self.target, target, rows)
        return replace(
            self,
            scores=scores,
            target=self.target.join(target),
            source=self.source.join(source),
            bias=bias,
        )

    def rollout(
        self, *, add_identity: bool | None = None, encoder: ContextMap | None = None
    ) -> ContextMap:
        """Returns the map multiplied through the layers; see `tl_contextmix.rollout`."""
        _require_rollable(self, encoder)
        memory = None
        if encoder is not None:
            memory = encoder.rollout(add_identity=add_identity).scores[:, -1, 0]
        residual = not self.includes_residual if add_identity is None else add_identity
        options = {**self.provenance.options, "rollout": True, "add_identity": residual}
        return replace(
            self,
            scores=roll_out(self.scores[:, :, 0], self.target.mask, residual, memory)[:, :, None],
            bias=None,
            unit=f"rollout of {self.unit}",
            includes_residual=self.includes_residual or residual,
            from_input=True,
            provenance=replace(self.provenance, options=options),
        )

    def top(self, k: int = 10) -> list[dict[str, Any]]:
        """Returns the ``k`` largest scores with their labels, largest first; no padding, no NaN.

        Positions are those on this map's axes, so that `select` takes them.

        Raises:
            InvalidInput: If ``k`` is not a positive integer.
        """
        real = self._real().to(self.scores.device)
        scores = self.scores.detach().masked_fill(~real[:, None, None], -torch.inf)
        places = largest(scores, require_count(k))
        values = scores.flatten()[places.to(scores.device)]
        return [
            {**self._labels(unravel(place, tuple(self.scores.shape))), "score": value}
            for place, value in zip(places.tolist(), values.tolist(), strict=True)
        ]

    def _labels(self, place: tuple[int, ...]) -> dict[str, Any]:
        batch, layer, head, target, source = place
        return {
            "batch": batch,
            "layer": self.layers[layer],
            "head": self.heads[head],
            "target": target,
            "source": source,
            "target_token": self.target.strings[batch][target],
            "source_token": self.source.strings[batch][source],
        }

    def to_dataframe(self) -> pandas.DataFrame:
        """Returns one row per score, with labels; positions that are padding are left out.

        Columns: batch, layer, head, target, source, target_token, source_token, score. Positions
        are those on this map's axes.
        """
        import numpy as np
        import pandas

        real = self._real()[:, None, None].expand(self.scores.shape)
        batch, layer, head, target, source = np.nonzero(real.numpy())
        targets, sources = (
            np.array(tokens.strings, dtype=object) for tokens in (self.target, self.source)
        )
        return pandas.DataFrame(
            {
                "batch": batch,
                "layer": np.array(self.layers, dtype=np.int64)[layer],
                "head": np.array(self.heads, dtype=object)[head],
                "target": target,
                "source": source,
                "target_token": targets[batch, target],
                "source_token": sources[batch, source],
                "score": as_array(self.scores)[real.numpy()],
            }
        )

    def panels(self) -> tuple[Panel, ...]:
        """Returns one heatmap per sentence, a sheet per layer and head; padding is left out."""
        found = []
        for row in range(len(self.target.strings)):
            part = self._part(
                [row],
                [*range(len(self.layers))],
                [*range(len(self.heads))],
                self.target.mask[row].nonzero()[:, 0].tolist(),
                self.source.mask[row].nonzero()[:, 0].tolist(),
            )
            found.append(
                Heatmap(
                    title=f"{self.provenance.method} at {self.point}",
                    caption=self._caption(),
                    values=part.scores.detach().cpu().flatten(1, 2)[0],
                    sheets=self._sheet_names(),
                    rows=part.target.strings[0],
                    columns=part.source.strings[0],
                    causal=part.causal,
                    unit=self.unit,
                    groups=self._groups(),
                )
            )
        return tuple(found)

    def _real(self) -> Bool[torch.Tensor, "batch target source"]:
        return real_pairs(self.target.mask.cpu(), self.source.mask.cpu())

    def _sheet_names(self) -> tuple[str, ...]:
        if len(self.heads) == 1:
            return tuple(f"layer {name}" for name in self.layer_names)
        return tuple(f"L{layer}H{head}" for layer in self.layers for head in self.heads)

    def _groups(self) -> tuple[str, ...]:
        if len(self.heads) == 1:
            return ()
        return tuple(f"layer {name}" for name in self.layer_names for _ in self.heads)

    def _caption(self) -> str:
        scale = {
            "none": "",
            "sum": " Each row is divided by its sum.",
            "max": " Each row is divided by its maximum.",
        }[self.normalized]
        return f"Row: the token being written. Column: the token it comes from.{scale}"


def _merged(
    values: torch.Tensor, tokens: Tokens, spans: Sequence[Spans], how: Literal["sum", "mean", "max"]
) -> torch.Tensor:
    """Returns numbers of words from those of tokens, side by side as `Tokens.join` has them."""
    parts = [merge(values, part, how, tokens.mask) for part in tokens.by_side(spans)]
    return torch.cat(parts, dim=-1)


def _require_scores(scores: torch.Tensor, real: torch.Tensor) -> None:
    """Raises InvalidInput for scores below zero or at padding.

    Sums, ranks and products over the source axis count on there being none.
    """
    scores = scores.detach()
    lowest = scores.amin() if scores.numel() else scores.new_zeros(())
    # A NaN hides what is below zero; the comparison costs memory and is left for that case.
    if bool(lowest < 0) or (bool(lowest.isnan()) and bool((scores < 0).any())):
        raise bad(
            "ContextMap.scores are not scores",
            "numbers below 0" if bool(lowest.isnan()) else f"{float(lowest):.3g}",
            "numbers from 0",
            "Clamp what rounding leaves below zero; take the size of what has a sign.",
        )
    for row in (~real).flatten(1).any(dim=1).nonzero()[:, 0].tolist():
        if bool(scores[row][..., ~real[row].to(scores.device)].any()):
            raise bad(
                "ContextMap.scores are not zero at padding",
                f"scores of tokens that the mask of sentence {row} leaves out",
                "0 wherever source or target is padding",
                "Fill them with 0 before building the map.",
            )


def _require_rollable(map: ContextMap, encoder: ContextMap | None) -> None:
    if len(map.heads) != 1:
        _refuse(
            f"{len(map.heads)} heads", "one map per layer", "Take .mean('head') or sum the heads."
        )
    _require_tokens(map, encoder)
    if map.layers != tuple(range(len(map.layers))):
        _refuse(
            f"layers {list(map.layers)}",
            "all layers from 0 in order",
            "Compute the map for every layer (layer=None).",
        )
    if map.from_input:
        _refuse(map.unit, "maps of single layers", "Roll the map out once.")


def _require_tokens(map: ContextMap, encoder: ContextMap | None) -> None:
    """Checks that targets are the first sources, and the others those of the encoder's map."""
    rows = [*range(len(map.target.strings))]
    length = map.target.ids.shape[1]
    places = [*range(map.source.ids.shape[1])]
    first, others = (map.source.select(rows, part) for part in (places[:length], places[length:]))
    if not map.target.equals(first) or (encoder is None and places[length:]):
        _refuse(
            f"targets of {map.target.sides}, sources of {map.source.sides}",
            "the same tokens on both axes, or a decoder's tokens followed by its encoder's",
            "Use the encoder stack, pass the encoder's map as encoder=, "
            "select(source='decoder') to leave the encoder's tokens out, or take the same "
            "positions on both axes.",
        )
    if encoder is not None and not encoder.target.equals(others):
        _refuse(
            f"an encoder map of {encoder.target.sides}, sources of {map.source.sides}",
            "the encoder's map of the same input",
            "Pass the map of stack='encoder' for a decoder that reads an encoder, and none else.",
        )


def _refuse(seen: str, expected: str, remedy: str) -> NoReturn:
    raise bad("this map cannot be rolled out", seen, expected, remedy)
