"""Which heads and neurons are meant: taken from a result, or named by layer and number."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from tl_contextmix.errors import InvalidInput, four_parts
from tl_contextmix.model_view import Batch, ModelView
from tl_contextmix.results import LogProbContributions, QueryContributions
from tl_contextmix.results.components import KINDS, Components, components, join

Named = Sequence[Sequence[int]]
Chosen = LogProbContributions | QueryContributions | Named


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


def answer_of(batch: Batch, view: ModelView, *given: object) -> LogProbContributions | None:
    """Returns the contributions that components were taken from, and checks all results' tokens.

    Args:
        batch: The tokens the components are asked about.
        view: The model.
        *given: What names components; what is no result is passed over.

    Raises:
        InvalidInput: If a result is of other tokens.
    """
    results = [g for g in given if isinstance(g, (LogProbContributions, QueryContributions))]
    for result in results:
        sides = [(result.tokens, batch.side(view.base_stack(None)))]
        if result.encoder is not None:
            sides.append((result.encoder, batch.main))
        for tokens, side in sides:
            same = torch.equal(tokens.ids.cpu(), side.ids.cpu())
            if not same or not torch.equal(tokens.mask.cpu(), side.mask.cpu()):
                raise _bad(
                    "the chosen components belong to another input",
                    f"components found in {tokens.strings[0]}",
                    f"components found in the tokens {side.ids.tolist()}, padding included",
                )
    return next((r for r in results if isinstance(r, LogProbContributions)), None)


def _of_result(result: LogProbContributions | QueryContributions, batch: int) -> Components:
    found = result.components
    if found.kind.shape[0] != batch:
        raise _bad(
            "the chosen components belong to other sentences",
            f"components of {found.kind.shape[0]} sentences",
            f"{batch}, as many as the input has",
        )
    # Neither a head nor a neuron: a sublayer, or one source of a head or of all of them.
    whole = (found.neuron < 0) & ((found.head < 0) | (found.source >= 0))
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
        # -1 stands for "no head" among components, so nothing counts from the end.
        whole = isinstance(one, Sequence) and all(type(n) is int and n >= 0 for n in one)
        if not whole or len(one) not in lengths:
            raise _bad(
                f"the {name} cannot be read",
                repr(one),
                "(layer, neuron) or (layer, head, neuron), counted from 0"
                if name == "neurons"
                else "(layer, head), counted from 0",
            )
    return [tuple(one) for one in listed]


def _of_tuple(name: str, one: tuple[int, ...], pos: Tensor) -> Components:
    names = ("head",) if name == "heads" else ("head", "neuron")[3 - len(one) :]
    kind = "mlp" if names == ("neuron",) else "attn"
    columns = {key: torch.tensor([value]) for key, value in zip(names, one[1:], strict=True)}
    return components(len(pos), pos, kind, one[0], **columns)


def _require_there(view: ModelView, found: Components) -> None:
    """Raises InvalidInput where a component is none of the model's."""
    sizes = {(one.kind, one.layer): one for one in every_sublayer(view)}
    for row, place in torch.cartesian_prod(*map(torch.arange, found.kind.shape)).tolist():
        one = found.at(row, place)
        known = sizes.get((one["kind"], one["layer"]))
        head, neuron = (one[name] or 0 for name in ("head", "neuron"))
        if known is None or head >= max(known.heads, 1) or neuron >= known.neurons:
            listed = ", ".join(f"{s.kind} {s.heads} x {s.neurons}" for s in sizes.values())
            raise _bad(
                f"{view.name} has no such component",
                found.label(row, place),
                f"one of its {len(view.blocks())} layers, the first being 0: {listed} "
                "(heads x neurons)",
            )


@dataclass(frozen=True)
class Sublayer:
    """Where the heads and neurons of a sublayer are.

    Attributes:
        kind: Its kind among components.
        layer: Its layer.
        heads: How many heads; 0 in a feed-forward sublayer.
        neurons: How many neurons, in each head.
        name: The activation that holds them.
        constant: What is added to that activation and is no neuron's own, or None.
    """

    kind: str
    layer: int
    heads: int
    neurons: int
    name: str
    constant: Tensor | None = None


def every_sublayer(view: ModelView) -> Iterator[Sublayer]:
    """Yields the sublayers of a model, an encoder-decoder's encoder included."""
    for stack, block in view.every_block():
        prefix = "" if stack == view.base_stack(None) else "encoder "
        for attention in block.attentions:
            kind = prefix + ("attn" if attention.kind == "self" else "cross_attn")
            heads, d_head, _ = attention.W_O.shape
            yield Sublayer(kind, block.layer, heads, d_head, attention.mixed)
        ff = block.feed_forward
        if ff is not None:
            count, constant = ff.W_out.shape[0], ff.weights("b_post")
            yield Sublayer(f"{prefix}mlp", block.layer, 0, count, ff.post, constant)


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
            mine = chosen.of_kind(kind)[row]
            mine &= ((chosen.head[row] >= 0) == shape[0]) & ((chosen.neuron[row] >= 0) == shape[1])
            if bool(mine.any()):
                # An attention neuron may be chosen for several sources: it goes out once.
                once, again = _table(chosen, row)[mine].unique(dim=0, return_inverse=True)
                drawn = _draw(pool, once, generator, kind)[again]
                parts.append(torch.cat([drawn, chosen.pos[row][mine, None]], dim=1))
        rows.append(torch.cat(parts))
    kind, layer, head, neuron, pos = torch.stack(rows).unbind(-1)
    return Components(kind, layer, pos, head, torch.full_like(layer, -1), neuron)


def _table(chosen: Components, row: int) -> Tensor:
    columns = (chosen.kind, chosen.layer, chosen.head, chosen.neuron)
    return torch.stack([column[row] for column in columns], dim=-1)


def _pools(view: ModelView) -> dict[tuple[str, tuple[bool, bool]], Tensor]:
    """Returns kind, layer, head and neuron of everything that could be drawn, by kind and shape."""
    found: dict[tuple[str, tuple[bool, bool]], list[Tensor]] = {}
    none = torch.tensor([-1])
    for one in every_sublayer(view):
        head, neuron = torch.arange(one.heads), torch.arange(one.neurons)
        options = {(False, True): torch.cartesian_prod(none, neuron)}
        if one.heads:
            options = {
                (True, False): torch.cartesian_prod(head, none),
                (True, True): torch.cartesian_prod(head, neuron),
            }
        start = torch.tensor([[KINDS.index(one.kind), one.layer]])
        for shape, rest in options.items():
            whole = torch.cat([start.expand(len(rest), 2), rest], dim=1)
            found.setdefault((one.kind, shape), []).append(whole)
    return {key: torch.cat(parts) for key, parts in found.items()}


def _draw(pool: Tensor, mine: Tensor, generator: torch.Generator, kind: str) -> Tensor:
    taken = (pool[:, None] == mine[None]).all(dim=-1).any(dim=1)
    others, count = pool[~taken], len(mine)
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
