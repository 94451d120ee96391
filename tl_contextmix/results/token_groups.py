"""Groups of tokens on an axis: by position, stretch or text, each with a label."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Annotated, Any

import torch
from jaxtyping import Bool

from tl_contextmix.core.pieces import join_pieces
from tl_contextmix.core.validation import LATER, whole_number
from tl_contextmix.core.words import find_text, require_spans
from tl_contextmix.errors import InvalidInput, seen
from tl_contextmix.results.labels import Tokens

Group = Annotated[int | str | tuple[int, int] | Sequence[int | str | tuple[int, int]], LATER]
"""A position (a negative one counts from the last real token), a stretch ``(start, stop)``, a text
(every occurrence, of one token or several; where none is written so, whatever its case and spaces),
or a list of these."""

Groups = Annotated[Group | Sequence[Group] | Mapping[str, Group], LATER]
"""One group, a list of several, or several with names."""


@dataclass(frozen=True)
class TokenGroups:
    """Groups of the tokens of each row.

    Attributes:
        labels: What each is called: its name, or the text of its tokens.
        members: Which tokens it holds.
    """

    labels: Tokens
    members: Bool[torch.Tensor, "batch group pos"]

    def spans(self, row: int) -> list[tuple[int, int]]:
        """Returns the groups of a row as stretches ``(start, stop)``.

        Raises:
            InvalidInput: If one has gaps, or does not come after the one before.
        """
        result: list[tuple[int, int]] = []
        for label, chosen in zip(self.labels.strings[row], self.members[row], strict=True):
            places = chosen.nonzero()[:, 0].tolist()
            end = result[-1][1] if result else 0
            if places[0] < end or places[-1] - places[0] >= len(places):
                raise InvalidInput(
                    "these groups of tokens are not stretches one after the other",
                    f"{label!r}, at {places}" + f", after one up to {end - 1}" * bool(result),
                    "neighbouring tokens, in the order of the text",
                    "Name each stretch on its own, as (start, stop), in order.",
                )
            result.append((places[0], places[-1] + 1))
        return result


def find_groups(option: str, tokens: Tokens, wanted: Any) -> TokenGroups:
    """Returns groups of tokens, looked for in each row.

    Args:
        option: The option that asks for them, for messages.
        tokens: The tokens, of one stack.
        wanted: See `Groups`; None: every token alone.

    Raises:
        InvalidInput: If a group is not there in some row, or is padding.
    """
    if wanted is None:
        each = torch.eye(tokens.shape[1], dtype=torch.bool) & tokens.mask.cpu()[:, None]
        return TokenGroups(tokens, each)
    if isinstance(wanted, Mapping):
        names, listed = [*map(str, wanted)], [*wanted.values()]
    else:
        single = isinstance(wanted, (str, tuple)) or not isinstance(_listed(wanted), list)
        listed = [wanted] if single else _listed(wanted)
        names = []
    if not listed:
        raise InvalidInput(
            f"{option} names no group", seen(wanted), "at least one", "Leave it out."
        )
    members = torch.stack(
        [
            torch.stack([_members(option, tokens, row, group) for group in listed])
            for row in range(tokens.shape[0])
        ]
    )
    return TokenGroups(_label(tokens, members, names), members)


def _listed(value: Any) -> Any:
    value = value.tolist() if hasattr(value, "tolist") else value
    iterable = isinstance(value, Iterable) and not isinstance(value, (str, tuple, Mapping))
    return list(value) if iterable else value


def _members(option: str, tokens: Tokens, row: int, group: Any) -> torch.Tensor:
    """Returns which tokens of a row a group holds."""
    real, length = tokens.mask[row].cpu(), tokens.shape[1]
    found = torch.zeros(length, dtype=torch.bool)
    listed = _listed(group)
    for one in listed if isinstance(listed, list) else [listed]:
        number = whole_number(one)
        if isinstance(one, str):
            spans = find_text(tokens.strings[row], real.tolist(), one, tokens.spaced)
        elif isinstance(one, tuple):
            spans = require_spans([one], length)
        else:
            end = int(real.nonzero()[-1]) + 1
            place = -1 if number is None else number if number >= 0 else end + number
            spans = [(place, place + 1)] if 0 <= place < length else []
        chosen = [place for span in spans for place in range(*span)]
        found[chosen] = True
        if not bool(real[chosen].any()):
            raise InvalidInput(
                f"{option} names tokens that are not there",
                f"{seen(one)} in row {row}, {[*tokens.strings[row]][:20]}",
                "a position, a stretch (start, stop) or a text of real tokens",
                "Write a text as the tokens are written, its leading space included.",
            )
    return found & real


def _label(tokens: Tokens, members: torch.Tensor, names: Sequence[str]) -> Tokens:
    """Returns the labels of groups: their names, or their text; the id of the first token."""
    strings, ids = [], []
    for row, groups in enumerate(members):
        chosen = [group.nonzero()[:, 0].tolist() for group in groups]
        strings.append(tuple(names) or tuple(_text(tokens, row, some) for some in chosen))
        ids.append(tokens.ids[row].cpu()[[some[0] for some in chosen]])
    count = members.shape[1]
    return Tokens(
        ids=torch.stack(ids),
        strings=tuple(strings),
        mask=torch.ones(len(ids), count, dtype=torch.bool),
        sides=((tokens.sides[0][0], count),),
        spaced=tokens.spaced,
    )


def _text(tokens: Tokens, row: int, places: list[int]) -> str:
    """Returns the text of some tokens, gaps marked."""
    runs = groupby(enumerate(places), key=lambda pair: pair[1] - pair[0])
    texts = [
        join_pieces([tokens.strings[row][place] for _, place in run], tokens.spaced)
        for _, run in runs
    ]
    return " …".join(texts)
