"""What a report shows: one forward pass and the maps at every point."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from tl_contextmix.adapters import as_view
from tl_contextmix.adapters.inputs import Given, Labels, name_tokens
from tl_contextmix.adapters.inputs.tokens import as_tensor
from tl_contextmix.adapters.passes import Pass, run_pass
from tl_contextmix.adapters.questions import Answer, ask
from tl_contextmix.core.model_view import StackName
from tl_contextmix.demo_models import DEMO_NAMES, known_words
from tl_contextmix.engine.parts import POINTS, Point
from tl_contextmix.errors import ContextMixError, InvalidInput, warn
from tl_contextmix.evaluation import MinimalPair
from tl_contextmix.methods.memories import Triggers
from tl_contextmix.methods.norms import attention_norms
from tl_contextmix.results import ContextMap

_TEXT = "the keys to the cabinet"
OUTPUT = 30
"""Of an encoder-decoder every token of the output is explained, up to so many."""
# French has two words for a bat, which the encoder must disambiguate.
_TEXTS = {"encoder-decoder": "the bat burned ."}


@dataclass(frozen=True)
class Story:
    """The data that the sections of a report share.

    Attributes:
        model: The model; where labels name its tokens, its view with these names.
        text: The sentence, or its token ids.
        forward_pass: The forward pass.
        stack: The stack of the maps; None if there is only one.
        maps: Maps by point, without points that do not apply to the model.
        missing: Why points are missing; empty if none are.
        focus: The predicting position; None if there is none.
        answer: What is asked there.
        triggers: Mined triggers of the model's memories, or None.
        pairs: Minimal pairs to compare methods on, or None.
        companion: An encoder-decoder to show if the model has no encoder, or None.
        generate: How many tokens of the answer are explained one by one, or None for none.
        notes: What is odd about the text.
    """

    model: object
    text: str | Tensor
    forward_pass: Pass
    stack: StackName | None
    maps: Mapping[str, ContextMap]
    missing: str
    focus: int | None
    answer: Answer
    triggers: Triggers | None = None
    pairs: Sequence[MinimalPair] | None = None
    companion: object = None
    generate: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether all points have a map."""
        return not self.missing

    @property
    def last_point(self) -> Point:
        """The last point with a map; the block's output if none is missing."""
        return next(point for point in reversed(POINTS) if point in self.maps)

    @property
    def last(self) -> ContextMap:
        """The map at the last point, rows summing to 1."""
        return self.maps[self.last_point].normalize()


def default_text(model: object) -> str:
    """Returns an informative example sentence.

    The verb must agree with "keys", not with the nearer noun; for masked models it is masked.
    """
    view = as_view(model)
    mask = _mask_token(model)
    if "decoder" not in view.stacks and mask:
        return f"{_TEXT} {mask} old ."
    return _TEXTS.get(view.name, _TEXT)


def read(
    model: object,
    text: object,
    *,
    triggers: Triggers | None = None,
    pairs: Sequence[MinimalPair] | None = None,
    companion: object = None,
    answer: Answer | None = None,
    labels: Labels | None = None,
    generate: int | None = None,
) -> Story:
    """Returns the data for a report on a model and a sentence.

    Args:
        model: Any model `as_view` reads.
        text: The sentence, or its token ids.
        triggers: See `Story`.
        pairs: Likewise.
        companion: Likewise.
        answer: What is asked; None for the last position or the mask, and the model's best token.
        labels: Names of the token ids, see `Inputs`.
        generate: See `Story`; None: for an encoder-decoder, 30.

    Raises:
        ContextMixError: If the model or the text cannot be used.

    Warns:
        ContextMixWarning: If a demo model was not trained on a word of the text.
    """
    view = name_tokens(as_view(model), labels)
    asked = as_tensor(text)
    if not isinstance(asked, str) and not (isinstance(asked, Tensor) and asked.squeeze().ndim < 2):
        raise InvalidInput(
            "cannot report on this text",
            f"a {type(text).__name__}",
            "one sentence as a str, or its token ids",
            "Write one report per sentence.",
        )
    notes = _foreign_words(view.name, asked) if isinstance(asked, str) else ()
    if labels is not None:
        model = view  # every method takes it for the model, with its names
    forward_pass = run_pass(view, Given(asked), logits=True)
    stack: StackName | None = "encoder" if len(view.stacks) == 2 else None
    maps, missing = _maps(model, asked, stack)
    answer = answer or Answer()
    focus = _focus(model, forward_pass) if answer.empty else _asked(forward_pass, answer)
    answer = replace(answer, pos=focus)
    notes += _unknown_tokens(model, forward_pass)
    if generate is None and stack is not None and answer.target is None:
        generate = OUTPUT
    shared = (triggers, pairs, companion, generate, notes)
    return Story(model, asked, forward_pass, stack, maps, missing, focus, answer, *shared)


def _asked(forward_pass: Pass, answer: Answer) -> int:
    """Returns the position of the one prediction that is asked about."""
    question = ask(forward_pass.view, forward_pass.trace.batch, answer)
    if len(question.rows) != 1:
        raise InvalidInput(
            "a report is on one prediction",
            f"{len(question.rows)} predictions",
            "one position, and a target of one token or a set of alternatives",
            "Ask about one token of the answer: give the text before it, and that token.",
        )
    return int(question.rows[0])


def _maps(
    model: object, text: str | Tensor, stack: StackName | None
) -> tuple[dict[str, ContextMap], str]:
    """Returns the maps at all points, or those that apply and why others are missing."""
    try:
        return {**attention_norms(model, text, at=POINTS, stack=stack)}, ""
    except ContextMixError as error:
        first = error
    found: dict[str, ContextMap] = {}
    for point in POINTS:
        try:
            found[point] = attention_norms(model, text, at=point, stack=stack)
        except ContextMixError:
            continue
    if not found:
        raise first
    return found, str(first)


def _focus(model: object, forward_pass: Pass) -> int | None:
    """Returns the predicting position: the last one, the mask, or where a classifier answers."""
    if forward_pass.view.answers_at is not None:
        return forward_pass.view.answers_at
    words = forward_pass.target.strings[0]
    if "decoder" in forward_pass.view.stacks:
        return len(words) - 1
    mask = _mask_token(model)
    return next((place for place, word in enumerate(words) if word.strip() == mask), None)


def _mask_token(model: object) -> str | None:
    return getattr(getattr(model, "tokenizer", None), "mask_token", None)


def _foreign_words(name: str, text: str) -> tuple[str, ...]:
    """Returns, and warns of, words that a demo model has never seen."""
    if name not in DEMO_NAMES:
        return ()
    # Marks such as [MASK] and <s> are tokens, not words.
    words = re.findall(r"[^\W_]+|[^\w\s]", re.sub(r"\[\w+\]|<[^<>\s]+>", " ", text))
    foreign = list(dict.fromkeys(word for word in words if word not in known_words(name)))
    if not foreign:
        return ()
    listed = ", ".join(map(repr, foreign))
    warn(
        f"{name} was not trained on some of these words, so its maps of them mean nothing",
        listed,
        "words of its artificial grammar (tl_contextmix.demo_models.known_words)",
        "Use other words, or a model trained on real text.",
    )
    return (f"{name} was never trained on {listed}: what this page says of them means nothing.",)


def _unknown_tokens(model: object, forward_pass: Pass) -> tuple[str, ...]:
    """Returns where the tokenizer knows no piece of the text."""
    tokenizer = getattr(model, "tokenizer", None)
    unknown = getattr(tokenizer, "unk_token_id", None)
    # GPT-2 has one token for what is unknown, which nothing is, and for where a text begins.
    if unknown is None or "unk" not in str(getattr(tokenizer, "unk_token", "")).lower():
        return ()
    ids = forward_pass.tokens["encoder" if "encoder" in forward_pass.tokens else "decoder"].ids
    places = (ids[0] == unknown).nonzero()[:, 0].tolist()
    where = ", ".join(map(str, places))
    note = f"The tokenizer does not know what stands at position {where} of the text."
    return (note,) if places else ()
