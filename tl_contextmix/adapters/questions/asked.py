"""What a caller may ask of a prediction, and in which words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypedDict

from jaxtyping import Int
from torch import Tensor

from tl_contextmix.adapters.chats import LastMessage, chats_of
from tl_contextmix.adapters.inputs.tokens import Given, Input, Inputs, TokenInputs
from tl_contextmix.adapters.questions.directions import Direction
from tl_contextmix.adapters.questions.targets import items, plain_numbers

Token = str | int
Target = (
    Token
    | AbstractSet[Token]
    | Sequence[Token | AbstractSet[Token] | Sequence[Token]]
    | Int[Tensor, "..."]
    | Direction
)
Pos = int | Sequence[int] | Literal["all"]


class Asked(TypedDict, total=False):
    """What a method that explains a prediction is asked."""

    target: Target | None
    """The predicted token as text (its leading space included) or id. A text of several tokens, or
    a list of ids, is an answer that the model is given token by token: each of its tokens is asked
    about. A set holds alternatives, of which any will do. A list has one for each text. None: the
    model's own best. `log_prob_contributions` and `query_contributions` take a `Direction`, too."""

    foil: Target | None
    """The token, or the set, that the target is contrasted with: the score is then
    ``log p(target) - log p(foil)``, for two tokens the difference of their logits. Of an answer of
    several tokens as many: each token is contrasted with the one in its place, after what of the
    target comes before."""

    pos: Pos | None
    """Position that predicts, several, or ``"all"``; negative ones count from the last real token.
    None: that token, or the mask of a masked language model."""

    generate: int | None
    """The answer is what the model itself says next, at most so many tokens (without sampling; by
    the generation settings of a bridge's Hugging Face model)."""


class AnswerInputs(Inputs, Asked, total=False):
    """What methods take that look at a forward pass and explain a prediction."""


class TokenAnswerInputs(TokenInputs, Asked, total=False):
    """What methods take that run the model themselves and explain a prediction."""


@dataclass(frozen=True)
class Answer:
    """What is asked; see `Asked`."""

    target: object = None
    foil: object = None
    pos: object = None
    generate: object = None

    @property
    def empty(self) -> bool:
        """Whether nothing is asked but the default."""
        return all(asked is None for asked in vars(self).values())


def split_answer(input: Input, inputs: Mapping[str, Any]) -> tuple[Given, Answer]:
    """Returns what is given and what is asked, out of the options of one call.

    Where nothing is asked, an assistant's last message is the answer that is asked about.
    """
    names = [field.name for field in fields(Answer)]
    asked = {name: inputs[name] for name in names if name in inputs}
    if "pos" in asked:  # kept with the result: a number of Python, or a list of them
        asked["pos"] = plain_numbers(items(asked["pos"]) or asked["pos"])
    given = Given(input, **{n: v for n, v in inputs.items() if n not in asked})
    return _within_chats(given, Answer(**asked))


def _within_chats(given: Given, answer: Answer) -> tuple[Given, Answer]:
    """Returns chats with what is asked in the assistant's turn.

    Where nothing else is asked, an assistant's last message is the answer; where a token is, the
    message is the beginning of the turn that the token goes on.
    """
    chats = None if isinstance(given.input, str) else chats_of(given.input)
    last = [] if chats is None else [chat[-1] for chat in chats]
    if chats is None or answer.pos is not None or not all(m["role"] == "assistant" for m in last):
        return given, answer
    if not answer.empty:
        return replace(given, open_ended=True), answer
    given = replace(given, input=[chat[:-1] for chat in chats])
    return given, replace(answer, target=[*map(LastMessage, chats)])
