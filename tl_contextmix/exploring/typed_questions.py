"""What may be picked on the page, and how it is answered: sections of the report, and methods."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from tl_contextmix.adapters import as_view
from tl_contextmix.adapters.questions import Answer
from tl_contextmix.core.model_view import ModelView
from tl_contextmix.engine.registry import methods
from tl_contextmix.errors import ContextMixError, ContextMixWarning, InvalidInput
from tl_contextmix.plotting import Page
from tl_contextmix.plotting.display_text import visible
from tl_contextmix.reporting import TITLE
from tl_contextmix.reporting.sections import (
    SECTIONS,
    SectionName,
    facts,
    notes,
    result_section,
    with_missing,
    write_sections,
)
from tl_contextmix.reporting.story import Story, read

SECTIONS_IN_WORDS: dict[SectionName, str] = {
    "prediction": "what the model predicts",
    "answer": "what each token of a longer answer was made of",
    "mixing": "which tokens were mixed, and where",
    "points": "the map at every point of a block",
    "feed-forward": "what the feed-forward blocks changed",
    "memories": "which memories fired",
    "components": "which components wrote the answer",
    "graph": "how the answer came about",
    "encoder-layers": "what each encoder layer knows",
    "comparison": "which map to believe",
}
FIRST = ("prediction", "mixing", "components")
"""What is picked when the page is opened."""
SAID = 5
"""How many tokens of its answer a decoder gives where no number is typed."""

# Has to be told which neurons or which edge.
_NEEDS_OPTIONS = ("query_contributions",)
_OFFERED = 8
_KEYS = ("text", "target", "foil", "pos", "generate", "show")


@cache
def offered_methods() -> Mapping[str, str]:
    """Returns the methods that need a model and a text alone, with what they return.

    What a method takes must be known, so that the limits hold for it.
    """
    result = {}
    for name, method in methods().items():
        parameters = inspect.signature(method.function).parameters.values()
        needed = [
            one.name
            for one in parameters
            if one.default is one.empty and one.kind != one.VAR_KEYWORD
        ]
        if method.estimated and needed == ["model", "input"] and name not in _NEEDS_OPTIONS:
            summary = (inspect.getdoc(method.function) or "").splitlines()[0]
            result[name] = summary.removeprefix("Returns ").rstrip(".")
    return result


@dataclass(frozen=True)
class TypedQuestion:
    """A text and what is asked about it, as they were typed.

    Attributes:
        text: The text.
        show: Sections of the report and methods, in order.
        target: The predicted token; None: the model's best.
        foil: What it is contrasted with.
        pos: The predicting position; None: the last, or the mask.
        generate: How many tokens of the model's own answer are explained.
    """

    text: str
    show: tuple[str, ...]
    target: str | None = None
    foil: str | None = None
    pos: int | None = None
    generate: int | None = None

    @property
    def sections(self) -> tuple[SectionName, ...]:
        """The sections of the report."""
        return tuple(name for name in SECTIONS if name in self.show)

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods."""
        return tuple(name for name in offered_methods() if name in self.show)

    @property
    def answer(self) -> Answer:
        """What is asked."""
        return Answer(self.target, self.foil, self.pos)


def as_typed(given: object) -> TypedQuestion:
    """Returns the question that a page sent."""
    if not isinstance(given, dict) or not set(given) <= {*_KEYS}:
        raise InvalidInput(
            "this is no question", visible(repr(given))[:80], ", ".join(_KEYS), "Reload the page."
        )
    text, show = given.get("text"), given.get("show")
    if not isinstance(text, str) or not text:
        raise InvalidInput("there is nothing to ask about", "no text", "a text", "Type one.")
    known = (*SECTIONS, *offered_methods())
    if not isinstance(show, list) or not show or not all(one in known for one in show):
        seen = "nothing" if not show else visible(repr(show))[:80]
        raise InvalidInput(
            "nothing to show is chosen", seen, f"some of {', '.join(known)}", "Tick some."
        )
    kept = {name: given.get(name) for name in ("target", "foil", "pos", "generate")}
    for name, value in kept.items():
        kind, words = (str, "a text") if name in ("target", "foil") else (int, "a whole number")
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            raise InvalidInput(
                f"{name} cannot be read", visible(repr(value))[:80], words, "Change it."
            )
    return TypedQuestion(text, tuple(show), **kept)


def require_text_model(model: object) -> ModelView:
    """Returns the view of a model that reads text."""
    view = as_view(model)
    if view.hears is not None or not view.reads_text():
        raise InvalidInput(
            "nothing can be typed for this model",
            f"{view.name}, which {'takes sound' if view.hears else 'has no tokenizer'}",
            "a model of text with its tokenizer",
            "Ask it in Python.",
        )
    return view


@dataclass(frozen=True)
class Explanation:
    """What there is to see, and the most probable tokens at the position, to choose from."""

    page: Page
    likely: tuple[str, ...]


def answered(model: object, question: TypedQuestion, begin: Callable[[str], object]) -> Explanation:
    """Returns a page with what was picked, and the most probable tokens.

    ``begin`` is called with the name of each step before it.

    Raises:
        ContextMixError: If the text or what is asked cannot be used. A method that does not apply
            is named on the page.
    """
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always", ContextMixWarning)
        # On the page this is a note.
        warnings.filterwarnings("ignore", ".* was not trained on some of these words")
        begin("maps")
        view = as_view(model)
        story = read(
            model, question.text, answer=question.answer, generate=_answer_length(view, question)
        )
        sections, skipped = write_sections(story, question.sections, begin)
        if "answer" in question.sections and story.generate is None:
            skipped.append(("answer", "the model has no decoder, which would say more"))
        for name in question.methods:
            begin(name)
            try:
                sections.append(result_section(_called(name, story)))
            except ContextMixError as error:
                skipped.append((name, str(error)))
    ours = [one.message for one in given if issubclass(one.category, ContextMixWarning)]
    page = Page(
        (),
        TITLE,
        facts(story),
        with_missing(sections, skipped),
        (*notes(story), *dict.fromkeys(map(str, ours))),
    )
    return Explanation(page, _likely(story))


def _answer_length(view: ModelView, question: TypedQuestion) -> int | None:
    """Returns how many tokens of its answer a model says; None for what the report does."""
    asked = "answer" in question.sections and "decoder" in view.stacks
    whole = len(view.stacks) == 2 and question.target is None
    return SAID if asked and question.generate is None and not whole else question.generate


def _called(name: str, story: Story) -> Any:
    method = methods()[name]
    asked = {key: one for key, one in vars(story.answer).items() if one is not None}
    return method.function(story.model, story.text, **(asked if method.asks else {}))


def _likely(story: Story) -> tuple[str, ...]:
    """Returns the tokens that can be typed of those that are most probable."""
    view, logits = story.forward_pass.view, story.forward_pass.trace.logits
    if story.focus is None or logits is None or view.readout.refusal:
        return ()
    row = logits[0, story.focus]
    best = row.topk(min(_OFFERED, len(row))).indices.tolist()
    words = dict.fromkeys(view.to_output(token) for token in best)
    return tuple(word for word in words if word.isprintable() and word)
