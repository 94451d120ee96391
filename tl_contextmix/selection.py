"""Which heads and neurons are meant: taken from a result, or named by layer and number."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from tl_contextmix.errors import InvalidInput, four_parts
from tl_contextmix.model_view import Block, ModelView
from tl_contextmix.results import LogProbContributions, QueryContributions
from tl_contextmix.results.components import KINDS, Components, components, join

Named = Sequence[Sequence[int]]
Chosen = LogProbContributions | QueryContributions | Named
_SUBLAYERS = ("attn", "cross_attn", "mlp")


def chosen_components(
    view: ModelView, neurons: Chosen | None, heads: Chosen | None, pos: Int[Tensor, " batch"]
) -> Components:
    """Returns the heads and neurons that are meant, for every sentence.

    Args:
        view: The model.
        neurons: A result whose components are neurons or heads, or a list of ``(layer, neuron)``
            (feed-forward) and ``(layer, head, neuron)`` (self-attention).
        heads: The same, a list of ``(layer, head)``.
        pos: Position whose stream they write to, in each sentence.

    Raises:
        InvalidInput: If nothing is meant, or something the model does not have.
    """
    parts = []
    for name, given in (("neurons", neurons), ("heads", heads)):
        if given is None:
            continue
        if isinstance(given, (LogProbContributions, QueryContributions)):
            parts.append(_of_result(given, len(pos)))
        else:
            parts += [_of_tuple(name, one, pos) for one in _listed(name, given)]
    if not parts:
        raise _bad("nothing was chosen", "no neurons and no heads", "at least one of them")
    found = join(parts)
    _require_there(view, found)
    return found


def _of_result(result: LogProbContributions | QueryContributions, batch: int) -> Components:
    found = result.components
    if found.kind.shape[0] != batch:
        raise _bad(
            "the chosen components belong to other sentences",
            f"components of {found.kind.shape[0]} sentences",
            f"{batch}, as many as the input has",
        )
    whole = (found.head < 0) & (found.neuron < 0)
    if bool(found.is_bias().any() | whole.any()) or not found.kind.shape[1]:
        raise _bad(
            "these components cannot be chosen",
            f"a result by {result.by} with components such as {_odd(found, whole)}",
            "heads or neurons (by 'head', 'ff_neuron' or 'attn_neuron')",
        )
    return found


def _odd(found: Components, whole: Tensor) -> str:
    places = (found.is_bias() | whole).nonzero()
    return found.label(*places[0].tolist()) if len(places) else "none at all"


def _listed(name: str, given: object) -> list[tuple[int, ...]]:
    lengths = (2, 3) if name == "neurons" else (2,)
    listed = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    for one in listed:
        whole = isinstance(one, Sequence) and all(type(n) is int for n in one)
        if not whole or len(one) not in lengths:
            raise _bad(
                f"the {name} cannot be read",
                repr(one),
                "(layer, neuron) or (layer, head, neuron)"
                if name == "neurons"
                else "(layer, head)",
            )
    return [tuple(one) for one in listed]


def _of_tuple(name: str, one: tuple[int, ...], pos: Tensor) -> Components:
    names = ("head",) if name == "heads" else ("head", "neuron")[3 - len(one) :]
    kind = "mlp" if names == ("neuron",) else "attn"
    columns = {key: torch.tensor([value]) for key, value in zip(names, one[1:], strict=True)}
    return components(len(pos), pos, kind, one[0], **columns)


def _require_there(view: ModelView, found: Components) -> None:
    """Raises InvalidInput where a component is none of the model's."""
    blocks = view.blocks()
    for row, place in torch.cartesian_prod(*map(torch.arange, found.kind.shape)).tolist():
        one = found.at(row, place)
        layer = -1 if one["layer"] is None else one["layer"]
        sizes = sublayer_sizes(blocks[layer]) if 0 <= layer < len(blocks) else {}
        heads, neurons = sizes.get(one["kind"], (0, 0))
        head, neuron = (0 if one[name] is None else one[name] for name in ("head", "neuron"))
        if not (0 <= head < max(heads, 1) and 0 <= neuron < neurons):
            raise _bad(
                f"{view.name} has no such component",
                found.label(row, place),
                f"layers 0 to {len(blocks) - 1}; in each, {sublayer_sizes(blocks[0])} "
                "(heads, neurons)",
            )


def sublayer_sizes(block: Block) -> dict[str, tuple[int, int]]:
    """Returns heads and neurons (of a head, or of the feed-forward) of each sublayer."""
    found = {}
    for attention in block.attentions:
        heads, d_head, _ = attention.W_O.shape
        found["attn" if attention.kind == "self" else "cross_attn"] = (heads, d_head)
    if block.feed_forward is not None:
        found["mlp"] = (0, block.feed_forward.W_out.shape[0])
    return found


def others_at_random(view: ModelView, chosen: Components, generator: torch.Generator) -> Components:
    """Returns as many other components of the same kinds, drawn from the whole model.

    Raises:
        InvalidInput: If there are not enough others.
    """
    pools = _pools(view)
    rows = []
    for row in range(chosen.kind.shape[0]):
        parts = []
        for (kind, shape), pool in pools.items():
            of_shape = (chosen.head[row] >= 0, chosen.neuron[row] >= 0)
            mine = (chosen.kind[row] == KINDS.index(kind)) & (of_shape[0] == shape[0])
            mine &= of_shape[1] == shape[1]
            count = int(mine.sum())
            if count:
                parts.append(_draw(pool, _triples(chosen, row)[mine], count, generator, kind))
        rows.append(torch.cat(parts))
    table = torch.stack(rows)
    pos = chosen.pos[:, :1].expand(table.shape[:2])
    kind, layer, head, neuron = table.unbind(-1)
    nothing = torch.full_like(layer, -1)
    return Components(kind, layer, pos.contiguous(), head, nothing, neuron)


def _triples(chosen: Components, row: int) -> Tensor:
    columns = (chosen.kind, chosen.layer, chosen.head, chosen.neuron)
    return torch.stack([column[row] for column in columns], dim=-1)


def _pools(view: ModelView) -> dict[tuple[str, tuple[bool, bool]], Tensor]:
    """Returns kind, layer, head and neuron of everything that could be drawn, by kind and shape."""
    found: dict[tuple[str, tuple[bool, bool]], list[Tensor]] = {}
    for block in view.blocks():
        for kind, (heads, neurons) in sublayer_sizes(block).items():
            head, neuron = torch.arange(max(heads, 1)), torch.arange(neurons)
            start = torch.tensor([[KINDS.index(kind), block.layer]])
            options = {(False, True): torch.cartesian_prod(torch.tensor([-1]), neuron)}
            if heads:
                options = {
                    (True, False): torch.cartesian_prod(head, torch.tensor([-1])),
                    (True, True): torch.cartesian_prod(head, neuron),
                }
            for shape, rest in options.items():
                whole = torch.cat([start.expand(len(rest), 2), rest], dim=1)
                found.setdefault((kind, shape), []).append(whole)
    return {key: torch.cat(parts) for key, parts in found.items()}


def _draw(pool: Tensor, mine: Tensor, count: int, generator: torch.Generator, kind: str) -> Tensor:
    taken = (pool[:, None] == mine[None]).all(dim=-1).any(dim=1)
    others = pool[~taken]
    if len(others) < count:
        raise _bad(
            "there are not enough others for a random control",
            f"{len(others)} others in {kind} for {count} chosen",
            "at least as many others as are chosen",
            "Choose fewer, or give controls=0.",
        )
    return others[torch.randperm(len(others), generator=generator)[:count]]


def _bad(
    failed: str, seen: str, expected: str, remedy: str = "Take them from a result's .top(k)."
) -> InvalidInput:
    return InvalidInput(four_parts(failed, seen, expected, remedy))
