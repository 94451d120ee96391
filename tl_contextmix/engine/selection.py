"""Which heads and neurons are meant: taken from a result, or named by layer and number.

An attention neuron is one dimension of one head's values, whatever source it reads: where a result
names it for several sources, it is chosen once.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tl_contextmix.core.blocks import FeedForward, Trace
from tl_contextmix.core.model_view import ModelView
from tl_contextmix.core.validation import whole_number
from tl_contextmix.errors import InvalidInput
from tl_contextmix.results import LogProbContributions, QueryContributions
from tl_contextmix.results.components import Components, Grid, join

Named = Sequence[Sequence[int] | str] | Sequence[int] | str
Chosen = LogProbContributions | QueryContributions | Named
_REMEDY = "Take them from a result's .top(k)."
_NAMED = {
    "neurons": "(layer, neuron) or (layer, head, neuron), counted from 0, a list of them, or names "
    "such as 'L3N120'",
    "heads": "(layer, head), counted from 0, a list of them, or names such as 'L3H5'",
    "experts": "(layer, expert) or (layer, expert, neuron), counted from 0, a list of them, or "
    "names such as 'L3E2'",
}
# As components and memories are labelled.
_LABELS = {
    "neurons": re.compile(r"L(\d+)(?:H(\d+))?[N.](\d+)"),
    "heads": re.compile(r"L(\d+)H(\d+)"),
    "experts": re.compile(r"L(\d+)E(\d+)(?:N(\d+))?"),
}


def chosen_components(
    view: ModelView,
    neurons: object,
    heads: object,
    pos: Int[Tensor, " batch"],
    experts: object = None,
) -> Components:
    """Returns the heads, experts and neurons that are meant, for every sentence.

    Args:
        view: The model.
        neurons: A result whose components are neurons or heads, or one or a list of ``(layer,
            neuron)`` (feed-forward) and ``(layer, head, neuron)`` (self-attention), or labels.
        heads: The same, of ``(layer, head)``.
        pos: Position whose stream they write to, in each sentence.
        experts: The same, of ``(layer, expert)`` and ``(layer, expert, neuron)``.

    Raises:
        InvalidInput: If nothing is meant, or something the model does not have.
        UnsupportedModel: If a neuron is meant of a feed-forward sublayer whose neurons are not
            known.
    """
    parts = []
    for name, given in (("neurons", neurons), ("heads", heads), ("experts", experts)):
        if given is None:
            continue
        if isinstance(given, (LogProbContributions, QueryContributions)):
            parts.append(_of_result(given, len(pos)))
        else:
            parts += [_of_tuple(name, one, pos) for one in _listed(name, given)]
    result = join(parts) if parts else None
    if result is None or bool(result.is_empty().all()):
        raise InvalidInput(
            "nothing was chosen", "no neurons, heads or experts", "at least one of them", _REMEDY
        )
    _require_there(view, result)
    return result


def _of_result(result: LogProbContributions | QueryContributions, batch: int) -> Components:
    found = result.components
    if found.kind.shape[0] != batch:
        raise InvalidInput(
            "the chosen components belong to other sentences",
            f"components of {found.kind.shape[0]} sentences",
            f"{batch}, as many as the input has",
            _REMEDY,
        )
    # No head, expert or neuron: a sublayer, or one source of a head or of all of them.
    whole = (found.head < 0) & (found.expert < 0)
    odd = (found.neuron < 0) & (whole | (found.source >= 0)) & ~found.is_empty()
    odd |= found.is_bias()
    if bool(odd.any()):
        raise InvalidInput(
            "these components cannot be chosen",
            f"a result by {result.by} with components such as "
            f"{found.label(*odd.nonzero()[0].tolist())}",
            "heads, experts or neurons (by 'head', 'expert', 'ff_neuron' or 'attn_neuron')",
            _REMEDY,
        )
    return found


def _listed(name: str, given: Any) -> list[tuple[int, ...]]:
    lengths = (2,) if name == "heads" else (2, 3)
    several = isinstance(given, Iterable) and not isinstance(given, str)
    listed = [*given] if several else [given]
    if several and listed and all(whole_number(one) is not None for one in listed):
        listed = [listed]  # one alone, not in a list
    found = []
    for one in listed:
        whole = [whole_number(number) for number in _numbers(name, one)]
        # -1 stands for "no head" among components, so nothing counts from the end.
        if len(whole) not in lengths or any(n is None or n < 0 for n in whole):
            raise InvalidInput(f"the {name} cannot be read", repr(one), _NAMED[name], _REMEDY)
        found.append(tuple(n for n in whole if n is not None))
    return list(dict.fromkeys(found))


def _numbers(name: str, one: Any) -> Iterable[Any]:
    """Returns the numbers of a component that is given by them or by its label; none of others."""
    if isinstance(one, str):
        match = _LABELS[name].fullmatch(one)
        return () if match is None else [int(n) for n in match.groups() if n is not None]
    return one if isinstance(one, Iterable) else ()


def _of_tuple(name: str, one: tuple[int, ...], pos: Tensor) -> Components:
    names = {"heads": ("head",), "experts": ("expert", "neuron")[: len(one) - 1]}.get(
        name, ("head", "neuron")[3 - len(one) :]
    )
    kind = "attn" if "head" in names else "mlp"
    numbers = zip(names, one[1:], strict=True)
    return Grid(kind, one[0], pos, tuple((n, range(at, at + 1)) for n, at in numbers)).table()


def _require_there(view: ModelView, found: Components) -> None:
    """Raises InvalidInput where a component is none of the model's."""
    known = found.is_empty()
    for one in every_sublayer(view):
        inside = (found.head < max(one.heads, 1)) & (found.neuron < one.neurons)
        known |= one.holds(found) & inside
    if not bool(known.all()):
        first = (~known).nonzero()[0].tolist()
        _require_known(view, found.at(*first))
        every, layer = [*every_sublayer(view)], int(found.layer[first[0], first[1]])
        here = [one for one in every if one.layer == layer]
        each: dict[tuple[str, int, int], list[Sublayer]] = {}
        for one in here or every:
            each.setdefault((one.kind, one.heads, one.neurons), []).append(one)
        listed = ", ".join(
            f"{_experts(some)}{kind} {heads} x {neurons}"
            for (kind, heads, neurons), some in each.items()
        )
        where = f"layer {layer}" if here else f"its {len(view.blocks())} layers, the first being 0"
        raise InvalidInput(
            f"{view.name} has no such component",
            found.label(*first),
            f"one of {where}: {listed} (heads x neurons)",
            _REMEDY,
        )


def _experts(some: Sequence[Sublayer]) -> str:
    """Returns how many experts these are, as what stands before their sizes."""
    return f"{len(some)} expert{'s' * (len(some) > 1)} of " if some[0].expert >= 0 else ""


def _require_known(view: ModelView, one: Mapping[str, Any]) -> None:
    """Raises UnsupportedModel where a neuron is of a sublayer whose neurons are not known."""
    stack = "encoder" if one["kind"].startswith("encoder ") else view.base_stack(None)
    for block in view.stacks[stack][one["layer"] : one["layer"] + 1]:
        if one["kind"].endswith("mlp") and block.feed_forward is not None:
            block.feed_forward.require_neurons()


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
        expert: The expert that it is, of a feed-forward sublayer with several; else -1.
        columns: Where its neurons are among those of the sublayer.
        feed_forward: The feed-forward sublayer, or None.
    """

    kind: str
    layer: int
    heads: int
    neurons: int
    name: str
    constant: Tensor | None = None
    expert: int = -1
    columns: slice = field(default_factory=lambda: slice(None))
    feed_forward: FeedForward | None = None

    @property
    def place(self) -> tuple[str, int]:
        """What tells it apart."""
        return self.name, self.expert

    def holds(self, some: Components) -> Bool[Tensor, "batch component"]:
        """Returns which components are of this sublayer."""
        mine = some.of_kind(self.kind) & (some.layer == self.layer) & ~some.is_empty()
        # A feed-forward block as a whole has all its experts.
        whole = (some.head < 0) & (some.neuron < 0) & (some.expert < 0)
        return mine & (whole | (some.expert == self.expert))

    def values(self, trace: Trace) -> Tensor:
        """Returns the activation in a pass, position by position."""
        if self.feed_forward is None or not self.feed_forward.routes:
            return trace.values[self.name]
        return self.feed_forward.coefficients(trace)[..., self.columns]


def every_sublayer(view: ModelView) -> Iterator[Sublayer]:
    """Yields what has heads or neurons: sublayers, the encoder's too, and experts one by one."""
    for stack, block in view.every_block():
        prefix = "" if stack == view.base_stack(None) else "encoder "
        for attention in block.attentions:
            kind = prefix + ("attn" if attention.kind == "self" else "cross_attn")
            heads, d_head, _ = attention.W_O.shape
            yield Sublayer(kind, block.layer, heads, d_head, attention.mixed)
        ff = block.feed_forward
        if ff is not None and ff.neurons_known:
            constant = ff.weights("b_post")
            for number, columns, _ in ff.groups():
                yield Sublayer(
                    f"{prefix}mlp",
                    block.layer,
                    0,
                    columns.stop - columns.start,
                    ff.post,
                    constant,
                    -1 if number is None else number,
                    columns,
                    ff,
                )


def every_place(view: ModelView) -> Iterator[Sublayer]:
    """Yields what enters each stack, as if it were a sublayer, and all sublayers.

    A third sublayer is ablated as a whole.
    """
    for stack, blocks in view.stacks.items():
        prefix = "" if stack == view.base_stack(None) else "encoder "
        yield Sublayer(f"{prefix}embed", -1, 0, 0, blocks[0].resid_in)
    yield from every_sublayer(view)
    for _, block in view.every_block():
        ending = block.ending
        if ending is not None:
            kind, post = ending.kind, ending.post
            yield Sublayer(kind, block.layer, 0, 0, post, feed_forward=ending)


def without_sources(chosen: Components, *, per_position: bool) -> Components:
    """Returns the chosen heads and neurons, each once, whatever sources it reads.

    Args:
        chosen: The heads and neurons.
        per_position: Whether those of several positions stay apart; else the first one is kept.
    """
    columns = [chosen.kind, chosen.layer, chosen.head, chosen.neuron, chosen.expert]
    columns += [chosen.pos] if per_position else []
    index = []
    for table, empty in zip(torch.stack(columns, dim=-1), chosen.is_empty(), strict=True):
        _, again = table.unique(dim=0, return_inverse=True)
        places = torch.arange(len(again))
        first = torch.full_like(places, len(places)).scatter_reduce(0, again, places, "amin")
        index.append(places[(first[again] == places) & ~empty])
    found = chosen.select(pad_sequence(index, batch_first=True, padding_value=-1))
    return replace(found, source=torch.full_like(found.source, -1))


class Controls:
    """Random sets of heads and neurons as large as the chosen ones, drawn from the whole model.

    As many of each kind: heads for heads, neurons for neurons, in any layer, at the positions of
    those they stand for. None is a chosen one, part of a chosen head or a head with a chosen
    neuron in it; nor is one part of another.

    Args:
        view: The model.
        chosen: What they are to be compared with, sources apart.
        seed: Of the draws.
    """

    def __init__(self, view: ModelView, chosen: Components, seed: int) -> None:
        by_kind: dict[str, list[Sublayer]] = {}
        for one in every_sublayer(view):
            by_kind.setdefault(one.kind, []).append(one)
        self._numbers = {kind: _Numbers(some) for kind, some in by_kind.items()}
        self._chosen = chosen
        self._random = random.Random(seed)

    def draw(self) -> Components:
        """Returns one more set.

        Raises:
            InvalidInput: If there are not enough others.
        """
        columns = {name: getattr(self._chosen, name).clone() for name in vars(self._chosen)}
        for kind in self._numbers:
            for row, mine in enumerate(self._chosen.of_kind(kind) & ~self._chosen.is_empty()):
                if bool(mine.any()):
                    self._replace(columns, row, kind, mine)
        return Components(**columns)

    def _replace(self, columns: dict[str, Tensor], row: int, kind: str, mine: Tensor) -> None:
        """Replaces the components of one kind in one sentence."""
        numbers = self._numbers[kind]
        names = ("layer", "head", "neuron", "expert")
        layer, head, neuron, expert = (columns[name][row] for name in names)
        heads, neurons = mine & (neuron < 0), mine & (neuron >= 0)
        at = numbers.heads(layer, head, expert)
        inside = numbers.start[at[neurons]] + neuron[neurons]
        # Drawn by number: tables of all neurons would take seconds in a large model.
        used = torch.zeros(len(numbers.layer), dtype=torch.bool)
        used[at[mine]] = True
        new = self._others(at[heads], used, kind)
        used[:] = False
        used[at[heads]] = used[new] = True
        within = used[numbers.head_of]
        within[inside] = True
        drawn = self._others(inside, within, kind)
        new_at = torch.cat([new, numbers.head_of[drawn]])
        both = torch.cat([heads.nonzero()[:, 0], neurons.nonzero()[:, 0]])
        layer[both], head[both] = numbers.layer[new_at], numbers.head[new_at]
        expert[both] = numbers.expert[new_at]
        neuron[neurons] = drawn - numbers.start[numbers.head_of[drawn]]

    def _others(self, chosen: Tensor, used: Tensor, kind: str) -> Tensor:
        """Returns as many numbers that are not taken, the same one for the same."""
        # A neuron selected at several positions is ablated at each; so is its control.
        once, again = chosen.unique(return_inverse=True)
        pool = (~used).nonzero()[:, 0]
        if len(pool) < len(once):
            raise InvalidInput(
                "there are not enough others for a random control",
                f"{len(pool)} others in {kind} for {len(once)} chosen",
                "at least as many others as are chosen",
                "Choose fewer, or give controls=0.",
            )
        return pool[self._random.sample(range(len(pool)), len(once))][again]


class _Numbers:
    """Heads and neurons of a kind, numbered through the layers.

    A feed-forward block is one head, and so is each of its experts.

    Attributes:
        layer: Layer of each head.
        head: Its number there; -1 in feed-forward blocks.
        expert: The expert that it is; else -1.
        start: Number of its first neuron.
        head_of: The head of each neuron.
    """

    def __init__(self, sublayers: list[Sublayer]) -> None:
        layers, experts = (
            torch.tensor([getattr(one, name) for one in sublayers]) for name in ("layer", "expert")
        )
        self._most = int(experts.max()) + 2
        self._keys = layers * self._most + experts + 1
        count = torch.tensor([max(one.heads, 1) for one in sublayers])
        self._first = count.cumsum(0) - count
        self.layer, self.expert = (x.repeat_interleave(count) for x in (layers, experts))
        numbers = [range(one.heads) if one.heads else (-1,) for one in sublayers]
        self.head = torch.tensor([number for some in numbers for number in some])
        size = torch.tensor([one.neurons for one in sublayers]).repeat_interleave(count)
        self.start = size.cumsum(0) - size
        self.head_of = torch.arange(len(size)).repeat_interleave(size)

    def heads(self, layer: Tensor, head: Tensor, expert: Tensor) -> Int[Tensor, " some"]:
        """Returns the numbers of heads; any number for components of other kinds."""
        key = layer * self._most + expert + 1
        place = torch.searchsorted(self._keys, key).clamp(max=len(self._keys) - 1)
        return (self._first[place] + head.clamp(min=0)).clamp(max=len(self.layer) - 1)
