"""Metrics of an output for `decoder_lens`: aliases, formulas, the language it is in."""

from __future__ import annotations

import importlib
import re
import string
from collections.abc import Mapping, Sequence
from typing import Annotated

from tl_contextmix.core.text_metrics import UserMetric
from tl_contextmix.core.validation import LATER, checked
from tl_contextmix.errors import ContextMixError, InvalidInput, seen

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_MARKS = str.maketrans("", "", string.punctuation)
_BINARY = {
    "&": lambda a, b: a and b,
    "|": lambda a, b: a or b,
    "<->": lambda a, b: a == b,
    "xor": lambda a, b: a != b,
}


@checked
def alias_match(aliases: Annotated[Mapping[str, Sequence[str]], LATER]) -> UserMetric:
    """Returns a metric: whether an output is one of several right answers, as SQuAD compares them.

    Case, punctuation, articles and the number of blanks do not count.

    Args:
        aliases: The right answers of each input, by its text.

    Returns:
        A function for ``metric=`` of `tl_contextmix.decoder_lens`; NaN for an input without
        answers, which leaves it out.

    Raises:
        InvalidInput: If there is no list of texts for each input.

    Example:
        >>> from tl_contextmix.evaluation import alias_match
        >>> right = alias_match({"who wrote it?": ["Tolstoy", "Leo Tolstoy"]})
        >>> right("leo tolstoy.", None, "who wrote it?")
        1.0
    """
    listed = aliases.items() if isinstance(aliases, Mapping) else [("any input", aliases)]
    for source, some in listed:
        texts = isinstance(some, (list, tuple, set)) and all(isinstance(one, str) for one in some)
        if not texts or not isinstance(aliases, Mapping):
            raise InvalidInput(
                "these are no answers",
                f"{seen(some)} for {source!r}",
                "a dictionary with a list of texts for each input",
                "Put a single answer into a list.",
            )
    known = {source: {_plain(one) for one in some} for source, some in aliases.items()}

    def alias_match(output: str, reference: str | None, source: str) -> float:
        return float(_plain(output) in known[source]) if known.get(source) else float("nan")

    return alias_match


def _plain(text: str) -> str:
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_MARKS)).split())


def assigns_variables(output: str, reference: str | None, source: str) -> float:
    """Returns whether an output gives every variable of a formula one value, and no other.

    A metric for ``metric=`` of `tl_contextmix.decoder_lens`. Formulas are in Polish notation, with
    the operators ``!``, ``&``, ``|``, ``<->``, ``xor``, letters as variables, and ``0`` and ``1``;
    outputs are variables with their values, such as ``a 1 b 0`` (blanks do not count): those of
    DeepLTL, which the DecoderLens paper takes.

    Args:
        output: The output.
        reference: Not looked at.
        source: The formula.
    """
    values = _assignment(output)
    return float(values is not None and values.keys() == {*_variables(source)})


def satisfies(output: str, reference: str | None, source: str) -> float:
    """Returns whether an output is an assignment that makes a formula true.

    Variables that it does not name are free: it has to be true whatever their values.

    Args:
        output: The output, see `assigns_variables`.
        reference: Not looked at: a formula may have several solutions.
        source: The formula.

    Raises:
        InvalidInput: If that is no formula.
    """
    values = _assignment(output)
    if values is None:
        return 0.0
    free = [name for name in dict.fromkeys(_variables(source)) if name not in values]
    every = ({name: bool(n >> i & 1) for i, name in enumerate(free)} for n in range(2 ** len(free)))
    return float(all(_truth(source, values | some) for some in every))


def _assignment(text: str) -> dict[str, bool] | None:
    """Returns the values of variables; None where it is no assignment or contradicts itself."""
    pairs = re.findall(r"([a-z])\s*([01])", text)
    if not pairs or re.sub(r"[a-z]\s*[01]|[\s,]", "", text):
        return None
    values = {name: value == "1" for name, value in pairs}
    return values if len(values) == len(pairs) else None


def _tokens(formula: str) -> list[str]:
    return re.findall(r"<->|xor|[!&|]|[a-z01]", formula)


def _variables(formula: str) -> list[str]:
    return [one for one in _tokens(formula) if len(one) == 1 and one.isalpha()]


def _truth(formula: str, values: Mapping[str, bool]) -> bool:
    tokens, stack = _tokens(formula), list[bool]()
    # From the right, operands are there when their operator comes.
    for token in reversed(tokens):
        arity = 1 if token == "!" else 2 if token in _BINARY else 0
        if len(stack) < arity:
            raise _no_formula(formula)
        if token == "!":
            stack.append(not stack.pop())
        elif arity:
            stack.append(_BINARY[token](stack.pop(), stack.pop()))
        else:
            stack.append(token == "1" if token in "01" else values[token])
    if len(stack) != 1 or "".join(tokens) != "".join(formula.split()):
        raise _no_formula(formula)
    return stack[0]


def _no_formula(formula: str) -> Exception:
    return InvalidInput(
        "this is no formula",
        repr(formula[:200]),
        "Polish notation with ! & | <-> xor, letters, 0 and 1, such as '& a ! b'",
        "Pass another metric for other inputs.",
    )


@checked
def in_language(code: str) -> UserMetric:
    """Returns a metric: whether an output is in a language, as py3langid tells it.

    Needs ``pip install tl-contextmix[metrics]``.

    With one metric for the source's language and one for the target's, the curve shows in which
    encoder layer the output changes from one to the other. A short output is hard to tell.

    Args:
        code: The language's ISO 639-1 code, such as ``"fr"``.

    Returns:
        A function for ``metric=`` of `tl_contextmix.decoder_lens`; NaN for an empty output.

    Raises:
        InvalidInput: If py3langid does not know the language.
        ContextMixError: If it is not installed.
    """
    try:
        py3langid = importlib.import_module("py3langid")
    except ImportError as error:
        raise ContextMixError(
            "languages cannot be told apart",
            str(error),
            "the package py3langid",
            'Install it: pip install "tl-contextmix[metrics]".',
        ) from error
    known = sorted({language for language, _ in py3langid.rank("a")})
    if code not in known:
        raise InvalidInput(
            "this language is not known", repr(code), f"one of {known}", "Pass its code."
        )

    def in_language(output: str, reference: str | None, source: str) -> float:
        if not output.strip():
            return float("nan")
        return float(py3langid.classify(output)[0] == code)

    return in_language
