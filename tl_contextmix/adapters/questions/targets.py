"""Tokens that are asked about: one, several as an answer, or alternatives."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

from torch import Tensor

from tl_contextmix.adapters.chats import LastMessage
from tl_contextmix.adapters.questions.directions import Direction
from tl_contextmix.core.model_view import ModelView
from tl_contextmix.core.validation import is_text, whole_number
from tl_contextmix.errors import InvalidInput, seen, warn

# Below this ratio of probabilities, whether a word was meant with its space is a matter of taste.
_MUCH = 10.0
_TARGETS = "a text, a token id, or a set of them as alternatives; or a list with one for each text"
# The alternatives of each token of an answer.
Steps = tuple[tuple[int, ...], ...]


def items(asked: Any) -> list[Any] | None:
    """Returns what a list, an array or a tensor holds; None for anything else."""
    asked = asked.tolist() if hasattr(asked, "tolist") else asked
    several = isinstance(asked, Iterable) and not isinstance(asked, (str, AbstractSet, Mapping))
    return list(asked) if several else None


def plain_numbers(number: Any) -> Any:
    """Returns NumPy's whole numbers, or those in a list, as Python's; anything else as it is."""
    if isinstance(number, list):
        return [plain_numbers(one) for one in number]
    found = whole_number(number)
    return number if found is None else found


def names_of_each(target: object, count: int) -> list[str | None]:
    """Returns the text of each sentence's target, where it is one."""
    listed = one_each(target, count, "target")
    return [one if isinstance(one, str) else None for one in listed]


def one_each(asked: object, count: int, name: str) -> list[Any]:
    """Returns what each of some sentences is asked about, out of one for all or one for each.

    Raises:
        InvalidInput: If a list has another length.
    """
    listed = items(asked)
    if listed is None:
        return [asked] * count
    if len(listed) != count:
        raise InvalidInput(
            f"there is not one {name} for each text",
            seen(asked),
            f"one for all, or a list of {count}",
            "Pass one for all texts, or one for each.",
        )
    return listed


def steps_of_each(view: ModelView, asked: object, count: int, name: str) -> list[Steps] | None:
    """Returns what each sentence is asked about, token by token; None if nothing is.

    Raises:
        InvalidInput: If something else is asked for.
    """
    if asked is None:
        return None
    return [_steps(view, one, name) for one in one_each(asked, count, name)]


def _steps(view: ModelView, one: object, name: str) -> Steps:
    """Returns the tokens of an answer, each with its alternatives."""
    if isinstance(one, str):
        return tuple((token,) for token in _pieces(view, one, name))
    if isinstance(one, LastMessage):
        return tuple((token,) for token in one.tokens(view))
    if isinstance(one, AbstractSet):
        if not one:
            raise no_target(one, name)
        each = [single_token(view, token, name) for token in one]
        return (tuple(sorted(set(each))),)
    listed = items(one)
    if listed:
        return tuple((single_token(view, token, name),) for token in listed)
    return ((single_token(view, one, name),),)


def _pieces(view: ModelView, text: str, name: str) -> list[int]:
    """Returns the tokens of a text that the model is to predict.

    Raises:
        InvalidInput: If there are none, or one is unknown.
    """
    if view.classes:
        return _class_called(view, text, name)
    result = view.pieces(text) if is_text(text) else []
    if not result and view.labelled:
        raise InvalidInput(
            "no label is called that",
            repr(text),
            "one of the labels",
            f"Name the {name} as labels= does, or pass an id.",
        )
    if not result:
        raise no_target(text, name)
    unknown = None if view.labelled else view.special_ids().get("unknown")
    for token in result:
        if token == unknown and view.to_output(token).strip() != text.strip():
            raise InvalidInput(
                f"the {name} is not in the vocabulary",
                f"{text!r}, which becomes {''.join(map(view.to_output, result))!r}",
                "words of this model's vocabulary",
                "Use another word, or pass an id.",
            )
    return result


def _class_called(view: ModelView, text: str, name: str) -> list[int]:
    result = [index for index, called in enumerate(view.classes) if called == text]
    if len(result) != 1:
        raise InvalidInput(
            "no class is called that",
            repr(text),
            f"one of {list(view.classes)}",
            f"Name the {name} as the model's id2label does, or pass its number.",
        )
    return result


def single_token(view: ModelView, one: object, name: str = "target") -> int:
    """Returns the id of a text that is one token, or an id that is one.

    Raises:
        InvalidInput: If it is several, naming them, or a word the model does not know.
    """
    if isinstance(one, str):
        found = _pieces(view, one, name)
        if len(found) != 1:
            raise _not_one(view, one, found, name)
        return found[0]
    number = whole_number(one)
    if number is None or number < 0:
        raise no_target(one, name)
    return number


def _not_one(view: ModelView, text: str, found: list[int], name: str) -> InvalidInput:
    pieces = ", ".join(repr(view.to_output(token)) for token in found)
    spaced = " " + text
    fits = not text.startswith(" ") and len(view.pieces(spaced)) == 1
    hint = f"{spaced!r}, with its space, is one token. " if fits else ""
    return InvalidInput(
        f"the {name} is not one token",
        f"{text!r}, which is {len(found)}: {pieces}",
        "a text that is one token of this model's vocabulary",
        f"{hint}Ask for one of the pieces, or pass an id.",
    )


def require_contrast(target: Sequence[Steps], foil: Sequence[Steps]) -> None:
    """Raises an InvalidInput if a foil is its target, or has not as many tokens."""
    for number, (asked, other) in enumerate(zip(target, foil, strict=True)):
        if [*map(set, asked)] == [*map(set, other)]:
            raise InvalidInput(
                "the foil is the target, so that every score would be 0",
                f"the tokens {[sorted(step) for step in asked]} for both in text {number}",
                "a foil with another token",
                "Pass another foil=, or none for the score of the target alone.",
            )
        if len(asked) != len(other):
            raise InvalidInput(
                "a foil has another number of tokens than the target",
                f"a target of {len(asked)} and a foil of {len(other)} in text {number}",
                "as many: each token is contrasted with the one in its place",
                "Give a foil of each token, or ask about each answer alone and subtract log_prob.",
            )


def require_known(view: ModelView, sets: Sequence[Steps] | None, name: str) -> None:
    """Raises an InvalidInput if there is no logit of a token that is asked about."""
    outputs = view.readout.outputs
    highest = max((token for steps in sets or () for ids in steps for token in ids), default=0)
    if outputs is not None and highest >= outputs:
        raise no_target(highest, name, outputs)


def no_target(asked: object, name: str, count: int | None = None) -> InvalidInput:
    """Returns the error for what is no token, or is not in a vocabulary of so many."""
    if isinstance(asked, Direction):
        return InvalidInput(
            f"a direction is no {name} here",
            "a Direction",
            _TARGETS,
            "log_prob_contributions and query_contributions take a direction, one at a time.",
        )
    return InvalidInput(
        f"this is no {name}",
        seen(asked),
        _TARGETS if count is None else f"{_TARGETS}; ids from 0 to {count - 1}",
        "Pass one for all texts, or one for each.",
    )


def warn_about_spaces(
    view: ModelView, named: Sequence[str | None], ids: Sequence[Sequence[int]], logits: Tensor
) -> None:
    """Warns where a target without its leading space is far less probable than the one with it."""
    if view.classes:
        return
    for row, (text, tokens) in enumerate(zip(named, ids, strict=True)):
        if text is None or text.startswith(" "):
            continue
        spaced = view.pieces(" " + text)[:1]
        if not spaced or spaced[0] == tokens[0]:
            continue
        ratio = float((logits[row, spaced[0]] - logits[row, tokens[0]]).double().exp())
        if ratio > _MUCH:
            warn(
                "the target continues the last word of the text",
                f"{text!r}, which the model finds {ratio:.0f} times less probable than "
                f"{' ' + text!r}",
                "a word with its leading space where a new word begins",
                f"Ask for {' ' + text!r} if that is what was meant.",
            )
