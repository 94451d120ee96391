"""What the numbers of a result belong to: tokens, and where it all comes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Bool, Int

from tl_contextmix import storage
from tl_contextmix.errors import InvalidInput, four_parts
from tl_contextmix.results.axes import require_shape
from tl_contextmix.results.words import find_words


@storage.storable
@dataclass(frozen=True, eq=False)
class Tokens:
    """The tokens along one axis of a result.

    Attributes:
        ids: Token ids, padding included.
        strings: The same as text; padding too.
        mask: True at real tokens, False at padding.
        sides: Which stack each stretch of the axis belongs to, with its length. One entry, except
            where a decoder block reads its own tokens and the encoder's: the source axis is then
            ``(("decoder", n), ("encoder", m))``.
    """

    ids: Int[torch.Tensor, "batch pos"]
    strings: tuple[tuple[str, ...], ...]
    mask: Bool[torch.Tensor, "batch pos"]
    sides: tuple[tuple[str, int], ...]

    def __post_init__(self) -> None:
        batch, pos = self.ids.shape
        require_shape("Tokens.mask", self.mask, (batch, pos))
        if self.mask.dtype != torch.bool:
            raise _unbuilt(f"a mask of {self.mask.dtype}", "a mask of torch.bool", "Use .bool().")
        lengths = {len(row) for row in self.strings} | {sum(length for _, length in self.sides)}
        negative = any(length < 0 for _, length in self.sides)
        if len(self.strings) != batch or lengths != {pos} or negative:
            raise _unbuilt(
                f"{len(self.strings)} rows of lengths {sorted(lengths)}, sides {self.sides}",
                f"{batch} rows of {pos} strings and sides of {pos} positions together",
                "Give one string per token id.",
            )

    def __repr__(self) -> str:
        sides = " + ".join(f"{length} {name}" for name, length in self.sides)
        words = [word for row in self.strings[:1] for word in row[:6]]
        more = len(self.strings) > 1 or self.ids.shape[1] > len(words)
        shown = ", ".join(repr(word) for word in words) + (", ..." if more else "")
        return f"Tokens: batch {len(self.strings)}, pos {sides}: {shown}"

    def equals(self, other: Tokens) -> bool:
        """Returns whether both are the same tokens of the same stacks, with the same padding.

        Text counts: a word is labelled with the id of its first token, see `join`.
        """
        return (
            self.sides == other.sides
            and self.strings == other.strings
            and torch.equal(self.ids.cpu(), other.ids.cpu())
            and torch.equal(self.mask.cpu(), other.mask.cpu())
        )

    def select(self, batch: list[int], pos: list[int]) -> Tokens:
        """Returns the tokens at these rows and positions."""
        names = self._side_names()
        return Tokens(
            ids=self.ids[batch][:, pos],
            strings=tuple(tuple(self.strings[row][index] for index in pos) for row in batch),
            mask=self.mask[batch][:, pos],
            sides=tuple((name, len([*run])) for name, run in groupby(names[i] for i in pos))
            or ((self.sides[0][0], 0),),
        )

    def side(self, name: str) -> list[int]:
        """Returns the positions that belong to one stack."""
        return [index for index, side in enumerate(self._side_names()) if side == name]

    def cat(self, other: Tokens) -> Tokens:
        """Returns this axis followed by another one."""
        return Tokens(
            ids=torch.cat([self.ids, other.ids], dim=1),
            strings=tuple(a + b for a, b in zip(self.strings, other.strings, strict=True)),
            mask=torch.cat([self.mask, other.mask], dim=1),
            sides=self.sides + other.sides,
        )

    def words(self) -> list[list[tuple[int, int]]]:
        """Returns the stretches ``(start, stop)`` of tokens that are words, per row; no padding.

        Told from the text of the tokens: where some of them begin with a space (GPT-2, T5), those
        that do not continue the word before; elsewhere those that begin with ``##`` (BERT). Marks
        such as ``<s>`` or ``[MASK]`` and punctuation stand alone, but for apostrophes and hyphens
        inside of a word.
        """
        return [
            find_words(words, mask.tolist())
            for words, mask in zip(self.strings, self.mask, strict=True)
        ]

    def join(self, spans: Sequence[Sequence[tuple[int, int]]]) -> Tokens:
        """Returns one label per stretch of tokens: their text, and the id of the first.

        A stretch is real where any of its tokens is. Rows with fewer stretches are padded.

        Args:
            spans: Stretches ``(start, stop)`` per row.
        """
        longest = max(map(len, spans))
        ids = self.ids.new_zeros(len(spans), longest)
        mask = self.mask.new_zeros(len(spans), longest)
        strings = []
        for row, found in enumerate(spans):
            texts = []
            for index, (start, stop) in enumerate(found):
                real = [place for place in range(start, stop) if self.mask[row, place]]
                # A stretch of padding alone keeps the padding's label.
                kept = real or [*range(start, stop)]
                ids[row, index], mask[row, index] = self.ids[row, kept[0]], bool(real)
                pieces = [self.strings[row][place] for place in kept]
                texts.append(
                    "".join([pieces[0], *(piece.removeprefix("##") for piece in pieces[1:])])
                )
            strings.append((*texts, *[""] * (longest - len(found))))
        return Tokens(
            ids=ids, strings=tuple(strings), mask=mask, sides=((self.sides[0][0], longest),)
        )

    def _side_names(self) -> list[str]:
        return [side for side, length in self.sides for _ in range(length)]


@storage.storable
@dataclass(frozen=True)
class Provenance:
    """Where a number comes from.

    Attributes:
        method: The function that was called.
        options: Its options, as given: text, numbers, booleans, None, and lists, tuples and
            dictionaries of these.
        model: The model's name.
        host: Class of the model object, for example ``"HookedTransformer"``.
        host_version: Version of TransformerLens.
        version: Version of this package.
        processing: Weight processing that was found, for example ``("fold_value_biases",)``;
            empty for weights as published.
        fingerprint: Hash over a sample of every weight.
    """

    method: str
    options: dict[str, Any]
    model: str
    host: str
    host_version: str
    version: str
    processing: tuple[str, ...]
    fingerprint: str


def _unbuilt(seen: str, expected: str, remedy: str) -> InvalidInput:
    return InvalidInput(four_parts("Tokens cannot be built", seen, expected, remedy))
