"""What a component does to a map: Kobayashi et al. 2024, sections 4 to 6."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tl_contextmix.core.statistics import spearman
from tl_contextmix.core.validation import Positive
from tl_contextmix.engine.registry import method
from tl_contextmix.errors import InvalidInput
from tl_contextmix.results import ContextMap, LayerFigures, Pair, PairChanges, Provenance
from tl_contextmix.results.axes import largest

Layout = Literal["post-LN", "pre-LN", "parallel"]
# Maps by point. To a type checker no mapping with keys of type str holds what has keys of type
# Point, which is what `attention_norms` returns.
Maps = Mapping[Any, ContextMap]

# Which two points a component lies between.
_COMPONENTS: dict[Layout, dict[str, tuple[str, str]]] = {
    "post-LN": {
        "FF": ("mlp_in", "mlp_out"),
        "RES": ("mlp_out", "resid_post"),
        "LN": ("resid_post", "block_out"),
    },
    "pre-LN": {
        "LN": ("resid_mid", "mlp_in"),
        "FF": ("mlp_in", "mlp_out"),
        "RES": ("mlp_out", "resid_post"),
    },
    "parallel": {"FF+RES": ("resid_mid", "resid_post")},
}
_POINTS = ("resid_mid", "mlp_in", "mlp_out", "resid_post", "block_out")
# The norm after a post-LN block divides by a standard deviation, so it moves norms by far more
# than this; what is computed twice differs by rounding, 1e-6 of the largest norm in float32.
_EQUAL = 1e-4
# Below this many roundings of the map itself, a difference of maps is noise.
_ROUNDINGS = 16


@method(cites=("kobayashi2024analyzing",))
def contextualization_change(maps: Maps) -> LayerFigures:
    r"""Returns how much FF, RES and LN change the map, layer by layer.

    .. math:: 1 - \rho(\mathrm{flatten}(C^{before}), \mathrm{flatten}(C^{after}))

    with Spearman's rank correlation over the pairs of a sentence, ties sharing their mean rank.
    Pairs that are zero both before and after are omitted: they are those that a mask, a window or
    padding forbids. 0: the component leaves the order of pairs alone; 1: the order after has
    nothing to do with the one before; 2: it is turned round. NaN where there is no order, such as
    for a sentence of one token. Only orders are compared: a component that scales a map, or moves
    norms without overtaking, counts as no change.

    The components depend on the block, which the maps show:

    ======== ============== ======================================================================
    post-LN  FF RES LN      LN is the norm after the feed-forward block
    pre-LN   LN FF RES      LN is the norm in front of it; where FF has a norm of its output
                            (sandwich, Gemma 2), that is part of FF
    parallel FF+RES         FF reads its own token and not the map (GPT-J, Pythia): it changes it
                            only by being added to what attention wrote
    ======== ============== ======================================================================

    Args:
        maps: Maps by point, from ``attention_norms(model, text, at=POINTS)``; in an
            encoder-decoder's decoder with ``stack="cross"``.

    Returns:
        `LayerFigures` [batch layer quantity], quantities in the order data flows.

    Raises:
        InvalidInput: If a map is missing, or the maps are not of the same tokens.
    """
    _require_maps(maps)
    components = _COMPONENTS[_layout(maps)]
    values = [1 - _correlations(maps[one], maps[other]) for one, other in components.values()]
    first = maps[_POINTS[0]]
    return LayerFigures(
        values=torch.stack(values, dim=-1),
        layers=first.layers,
        quantities=tuple(components),
        title="Contextualization change",
        caption="1 - Spearman's rank correlation of the map before and after each component: "
        "0 leaves the order of token pairs as it was.",
        unit="1 - rank correlation",
        provenance=_provenance(first, "contextualization_change"),
    )


@method(cites=("kobayashi2024analyzing",))
def cancellation(maps: Maps) -> LayerFigures:
    r"""Returns whether what FF changes is undone by the rest of the block.

    Three maps are compared: :math:`C^{in}` of the residual stream that FF's output is added to
    (``mlp_in`` in post-LN blocks, ``resid_mid`` in pre-LN ones, where the norm in front of FF
    counts as part of it), :math:`C^{ff}` after FF (``mlp_out``) and :math:`C^{out}` of the block.
    With :math:`N` for rows that sum to 1, :math:`D = N^{ff} - N^{in}` for what FF changes and
    :math:`E = N^{out} - N^{ff}` for what follows, four figures per layer:

    * ``cancel``: :math:`\cos(D, E)`. Below 0 they point against each other, however little of the
      change that concerns: -1 already if the output lies anywhere between the other two maps.
      Three maps that have nothing to do with each other give about -0.5, not 0.
    * ``undone``: :math:`-\langle D, E \rangle / ||D||^2`, the share of FF's change that is taken
      back. 0: all of it is left in the block's output; 1: none is.
    * ``recover``: :math:`\rho(C^{in}, C^{out}) - \rho(C^{in}, C^{ff})` with Spearman's rank
      correlation as in `contextualization_change`; above 0 the block ends nearer to where it was
      before FF.
    * ``ff_res_ratio``: median over pairs of :math:`C^{ff} / C^{in}`: how large what FF adds is
      beside what it is added to. Small: the residual sum is bound to undo.

    NaN where FF changes nothing, and in parallel blocks (GPT-J, Pythia), where it does not read
    the map.

    Args:
        maps: Maps by point, as in `contextualization_change`.

    Returns:
        `LayerFigures` [batch layer quantity].

    Raises:
        InvalidInput: If a map is missing, normalised or in bfloat16, or the maps are not of the
            same tokens.
    """
    _require_maps(maps)
    layout = _layout(maps)
    before = maps["resid_mid" if layout == "pre-LN" else "mlp_in"]
    after, out = maps["mlp_out"], maps["block_out"]
    if before.normalized != "none":
        raise _incomparable(
            f"rows divided by their {before.normalized}",
            "norms: one figure is a ratio of them",
            "Leave .normalize() out; rows are scaled inside where they must be.",
        )
    _require_full(before, after, out)
    figures = [
        *_undoing(before, after, out),
        _correlations(before, out) - _correlations(before, after),
        _per_layer(lambda old, new: (new / old)[old != 0].median(), before, after),
    ]
    values = torch.stack(figures, dim=-1)
    caption = (
        "cancel < 0: what follows FF moves the map against FF's change; about -0.5 by chance. "
        "undone: share of that change taken back. recover > 0: the block's map is nearer to the "
        "one before FF. ff_res_ratio: FF's norm over the norm it is added to."
    )
    if layout == "parallel":
        values = torch.full_like(values, torch.nan)
        caption = "No number: in a parallel block FF reads its own token, not the map."
    return LayerFigures(
        values=values,
        layers=before.layers,
        quantities=("cancel", "undone", "recover", "ff_res_ratio"),
        title="Does the block undo what FF changed?",
        caption=caption,
        unit="",
        provenance=_provenance(before, "cancellation"),
    )


@method(cites=("kobayashi2024analyzing",))
def amplified_pairs(
    before: ContextMap,
    after: ContextMap,
    *,
    k: Positive = 10,
    normalize: Literal["sum", "max", "none"] = "sum",
) -> PairChanges:
    """Returns the pairs of each layer whose score grew most and shrank most (2024, section 5).

    In a parallel block (GPT-J, Pythia) the feed-forward block reads its own token and changes no
    share of a row; what adding it changes is between ``"resid_mid"`` and ``"resid_post"``.

    Args:
        before: Map before a component, for example at ``"mlp_in"``.
        after: Map after it, for example at ``"mlp_out"``.
        k: How many pairs per sentence, layer and direction; fewer where fewer changed that way.
            Equal changes are in the order of target and source.
        normalize: How rows are scaled before they are compared: by their sum, their maximum or
            not at all. The paper does not say; by their sum by default.

    Returns:
        `PairChanges`. Pairs that are NaN in one of the maps are omitted.

    Raises:
        InvalidInput: If the maps are not of the same tokens and layers, or ``k`` is not positive.
    """
    _require_same(before, after)
    if normalize != "none":
        before, after = before.normalize(normalize), after.normalize(normalize)
    options = {"before": before.point, "after": after.point, "k": k, "normalize": normalize}
    return PairChanges(
        amplified=tuple(_changed(before, after, k, sign=1)),
        suppressed=tuple(_changed(before, after, k, sign=-1)),
        before=before.point,
        after=after.point,
        unit=before.unit,
        provenance=_provenance(after, "amplified_pairs", options),
    )


def _changed(before: ContextMap, after: ContextMap, k: int, *, sign: int) -> Iterator[Pair]:
    """Yields the pairs that changed most in one direction, by sentence and layer."""
    old, new = (map.scores[:, :, 0].detach().cpu() for map in (before, after))
    grown = sign * (new - old)
    grown = grown.masked_fill(grown <= 0, torch.nan)
    width, numbers = grown.shape[-1], (before.target.labels(), before.source.labels())
    for row in range(grown.shape[0]):
        for index, layer in enumerate(before.layers):
            for place in largest(grown[row, index], k).tolist():
                target, source = divmod(place, width)
                yield Pair(
                    batch=row,
                    layer=layer,
                    target=numbers[0][target],
                    source=numbers[1][source],
                    target_token=before.target.strings[row][target],
                    source_token=before.source.strings[row][source],
                    before=float(old[row, index, target, source]),
                    after=float(new[row, index, target, source]),
                )


def _layout(maps: Maps) -> Layout:
    """Returns what kind of block the maps are of.

    Behind a feed-forward block that reads the residual stream, every pair that attention mixes is
    still there; and a norm at the end of the block moves every number.
    """
    if _only_own(maps["mlp_in"]) and not _only_own(maps["resid_mid"]):
        return "parallel"
    end, out = maps["resid_post"].scores, maps["block_out"].scores
    tolerance = _EQUAL * float(end.detach().nan_to_num().amax())
    equal = torch.allclose(end, out.to(end), rtol=_EQUAL, atol=tolerance, equal_nan=True)
    return "pre-LN" if equal else "post-LN"


def _only_own(map: ContextMap) -> bool:
    """Returns whether every target has a score from itself only."""
    sides = ([*zip(side.names(), side.labels(), strict=True)] for side in (map.target, map.source))
    target, source = sides
    own = torch.tensor([[one == other for other in source] for one in target])
    return not bool(map.scores.masked_fill(own.to(map.scores.device), 0).any())


def _require_maps(maps: Maps) -> None:
    """Raises InvalidInput unless there is a map of every point, all of the same thing."""
    if any(point not in maps or maps[point].point != point for point in _POINTS):
        raise _incomparable(
            str({name: f"a map at {map.point}" for name, map in maps.items()}),
            f"a map at each of {list(_POINTS)}, by its name",
            f"Compute attention_norms(model, text, at={list(_POINTS)}).",
        )
    for point in _POINTS[1:]:
        _require_same(maps[_POINTS[0]], maps[point])


def _require_full(*maps: ContextMap) -> None:
    """Raises InvalidInput unless the maps are exact enough for cosines of their differences."""
    for map in maps:
        if map.provenance.options.get("precision", "full") != "full":
            raise _incomparable(
                f"norms with precision={map.provenance.options['precision']!r}",
                "norms in full precision: cosines are of small differences between maps",
                "Leave precision out of attention_norms.",
            )


def _require_same(before: ContextMap, after: ContextMap) -> None:
    """Raises InvalidInput unless two maps have the same axes and the same scale."""
    for one, other in ((before.target, after.target), (before.source, after.source)):
        if not one.equals(other):
            seen = "other tokens or other padding"
            if one.sides != other.sides:
                seen = f"{list(one.sides)} at {before.point} and {list(other.sides)}"
            raise _incomparable(
                f"{seen} at {after.point}",
                "the same tokens on the axes of both",
                "Compute both in one call of attention_norms; of an encoder-decoder's decoder "
                "with stack='cross', for every point then has sources of both stacks.",
            )
    if before.layers != after.layers:
        raise _incomparable(
            f"layers {list(before.layers)} and {list(after.layers)}",
            "the same layers in the same order",
            "Compute both in one call of attention_norms with several points.",
        )
    if len(before.heads) != 1 or len(after.heads) != 1:
        raise _incomparable(
            f"{len(before.heads)} and {len(after.heads)} heads",
            "one map per layer",
            "Take .mean('head') or select(head=...).",
        )
    if before.normalized != after.normalized:
        raise _incomparable(
            f"rows scaled by {before.normalized!r} and {after.normalized!r}",
            "both scaled alike",
            "Normalise both or neither.",
        )


def _incomparable(seen: str, expected: str, remedy: str) -> InvalidInput:
    return InvalidInput("these maps cannot be compared", seen, expected, remedy)


def _provenance(
    map: ContextMap, method: str, options: Mapping[str, Any] | None = None
) -> Provenance:
    """Returns the provenance of a map with what was done to it; the point was one of several."""
    kept = {name: value for name, value in map.provenance.options.items() if name != "at"}
    return replace(map.provenance, method=method, options={**kept, **(options or {})})


def _undoing(
    before: ContextMap, after: ContextMap, out: ContextMap
) -> tuple[Float[Tensor, "batch layer"], Float[Tensor, "batch layer"]]:
    """Returns the cosine between a change and the next one, and the share that is taken back."""
    first, second, third = (map.normalize().scores.flatten(2) for map in (before, after, out))
    change, rest = (second - first).detach(), (third - second).detach()
    noise = _ROUNDINGS * torch.finfo(first.dtype).eps * first.norm(dim=-1)
    sizes = [
        torch.where(size > noise, size, torch.nan)
        for size in (change.norm(dim=-1), rest.norm(dim=-1))
    ]
    product = (change * rest).sum(-1)
    return product / (sizes[0] * sizes[1]), -product / sizes[0].square()


def _correlations(before: ContextMap, after: ContextMap) -> Float[Tensor, "batch layer"]:
    return _per_layer(spearman, before, after)


def _per_layer(
    figure: Callable[[Tensor, Tensor], Tensor], before: ContextMap, after: ContextMap
) -> Float[Tensor, "batch layer"]:
    """Returns a figure of the pairs that are not zero in both maps, by sentence and layer."""
    old, new = before.scores[:, :, 0].detach(), after.scores[:, :, 0].detach()
    values = old.new_empty(old.shape[:2])
    for row in range(values.shape[0]):
        for layer in range(values.shape[1]):
            one, other = old[row, layer], new[row, layer]
            kept = (one != 0) | (other != 0)
            values[row, layer] = figure(one[kept], other[kept])
    return values
