"""How good a text is beside another one: the figures of translation and speech, per sentence.

A metric gives each sentence a few counts and turns sums of counts into one figure: a mean is the
sum of values over the number of sentences, a word error rate the sum of errors over that of words.
So a figure over a data set is the published one (corpus BLEU is no mean of sentences' BLEU), and
resampling sentences gives its interval.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tl_contextmix.errors import ContextMixError, InvalidInput

Counts = tuple[float, ...]
Figure = Callable[[Sequence[float]], float]
UserMetric = Callable[[str, str | None, str], float]
MetricChoice = str | UserMetric | Sequence[str | UserMetric] | Mapping[str, str | UserMetric]
_NONE = (0.0, 0.0)
_CHRF_ORDER, _CHRF_BETA = 6, 2


@dataclass(frozen=True)
class Output:
    """What one layer gave for one sentence, and what it is held against.

    Attributes:
        text: The output.
        tokens: Its tokens, without special ones.
        finished: Whether it came to its end.
        final: Tokens of the last layer's output.
        reference: The right answer, or None.
        source: The input as text; empty for audio.
    """

    text: str
    tokens: tuple[int, ...]
    finished: bool
    final: tuple[int, ...]
    reference: str | None
    source: str


@dataclass(frozen=True)
class Metric:
    """One figure.

    Attributes:
        name: Its name.
        counts: What a sentence adds; as many numbers for every sentence.
        figure: From sums of counts to the figure; NaN where there is none.
        referenced: Whether it needs a reference.
    """

    name: str
    counts: Callable[[Output], Counts]
    figure: Figure
    referenced: bool = True


def edit_distance(a: Sequence[object], b: Sequence[object]) -> int:
    """Returns the least number of insertions, deletions and substitutions from ``a`` to ``b``."""
    row = list(range(len(b) + 1))
    for i, one in enumerate(a, start=1):
        before, row[0] = row[0], i
        for j, other in enumerate(b, start=1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (one != other))
    return row[-1]


def repetition(tokens: Sequence[object]) -> float:
    """Returns the share of pairs of neighbours that were there before; NaN below two tokens."""
    pairs = list(itertools.pairwise(tokens))
    return 1 - len(set(pairs)) / len(pairs) if pairs else float("nan")


def words(text: str | None) -> list[str]:
    """Returns the words of a text."""
    return [] if text is None else text.split()


def token_accuracy(output: str, reference: str) -> float:
    """Returns the share of the reference's words that stand at their place in the output."""
    right = words(reference)
    return sum(a == b for a, b in zip(words(output), right, strict=False)) / len(right)


def mean_metric(name: str, value: Callable[[Output], float], *, referenced: bool = True) -> Metric:
    """Returns a metric that averages a value per sentence; NaN leaves the sentence out."""

    def counts(output: Output) -> Counts:
        found = float(value(output))
        return _NONE if found != found else (found, 1.0)

    return Metric(name, counts, ratio, referenced)


def user_metric(name: str, function: UserMetric) -> Metric:
    """Returns the mean of a user's function of output, reference and source."""

    def value(output: Output) -> float:
        found = function(output.text, output.reference, output.source)
        try:
            # A text may look like a number, and is none.
            return float("" if isinstance(found, str) else found)
        except (TypeError, ValueError) as error:
            raise InvalidInput(
                f"the metric {name!r} gave no number",
                f"{found!r} for the output {output.text!r}",
                "a number, or NaN for a sentence without one",
                "Return a float from the function.",
            ) from error

    return mean_metric(name, value, referenced=False)


def ratio(sums: Sequence[float]) -> float:
    """Returns the first sum divided by the second; NaN where there is nothing to divide by."""
    return sums[0] / sums[1] if sums[1] else float("nan")


def _bleu() -> Metric:
    # Counts are the same; without it sacrebleu advises against scores that are not asked for.
    bleu = _optional("sacrebleu").metrics.BLEU(effective_order=True)

    def counts(output: Output) -> Counts:
        found = bleu.sentence_score(output.text, [output.reference])
        return tuple(map(float, (*found.counts, *found.totals, found.sys_len, found.ref_len)))

    def figure(sums: Sequence[float]) -> float:
        order = (len(sums) - 2) // 2
        whole = [int(number) for number in sums]
        correct, total = whole[:order], whole[order : 2 * order]
        return float(bleu.compute_bleu(correct, total, whole[-2], whole[-1], "exp").score)

    return Metric("BLEU", counts, figure)


def character_ngrams(output: Output) -> Counts:
    """Returns, for 1 to 6 characters, the n-grams of output and reference and those in both.

    Blanks do not count. As sacrebleu does: n-grams that are longer than the reference are none.
    """
    hypothesis, reference = ("".join(words(text)) for text in (output.text, output.reference))
    found: list[float] = []
    for n in range(1, _CHRF_ORDER + 1):
        a, b = (
            Counter(text[i : i + n] for i in range(len(text) - n + 1))
            for text in (hypothesis, reference)
        )
        found += (sum(a.values()) if b else 0, sum(b.values()), sum((a & b).values()))
    return tuple(map(float, found))


def chrf(sums: Sequence[float]) -> float:
    """Returns chrF2 of summed counts (Popovic 2015), 0 to 100: F of mean precision and recall.

    Means over the orders that output and reference both have, as in sacrebleu.
    """
    orders = [sums[i : i + 3] for i in range(0, len(sums), 3)]
    shares = [
        (both / hypothesis, both / reference)
        for hypothesis, reference, both in orders
        if hypothesis and reference
    ]
    if not any(precision for precision, _ in shares):
        return 0.0
    precision, recall = (sum(column) / len(shares) for column in zip(*shares, strict=True))
    weight = _CHRF_BETA**2
    return 100 * (1 + weight) * precision * recall / (weight * precision + recall)


def _error_rate(name: str, function: str) -> Metric:
    process = getattr(_optional("jiwer"), function)

    def counts(output: Output) -> Counts:
        found = process(output.reference, output.text)
        errors = found.substitutions + found.deletions + found.insertions
        return float(errors), float(found.hits + found.substitutions + found.deletions)

    return Metric(name, counts, ratio)


def _optional(package: str) -> Any:
    import importlib

    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ContextMixError(
            f"this metric needs the package {package}",
            str(error),
            "BLEU from sacrebleu, WER and CER from jiwer",
            'Install it: pip install "tl-contextmix[metrics]".',
        ) from error


_MAKERS: dict[str, Callable[[], Metric]] = {
    "exact match": lambda: mean_metric(
        "exact match", lambda out: float(words(out.text) == words(out.reference))
    ),
    "token accuracy": lambda: mean_metric(
        "token accuracy", lambda out: token_accuracy(out.text, out.reference or "")
    ),
    "BLEU": _bleu,
    "chrF": lambda: Metric("chrF", character_ngrams, chrf),
    "WER": lambda: _error_rate("WER", "process_words"),
    "CER": lambda: _error_rate("CER", "process_characters"),
    "length ratio": lambda: Metric(
        "length ratio",
        lambda out: (float(len(words(out.text))), float(len(words(out.reference)))),
        ratio,
    ),
    "edit distance": lambda: mean_metric(
        "edit distance", lambda out: float(edit_distance(out.tokens, out.final)), referenced=False
    ),
    "repetition": lambda: mean_metric(
        "repetition", lambda out: repetition(out.tokens), referenced=False
    ),
    "empty": lambda: mean_metric("empty", lambda out: float(not out.tokens), referenced=False),
    "truncated": lambda: mean_metric(
        "truncated", lambda out: float(not out.finished), referenced=False
    ),
}
METRICS = tuple(_MAKERS)
"""Names of the metrics of an output."""
DEFAULT_METRICS = tuple(name for name in METRICS if name not in ("BLEU", "WER", "CER"))
"""Those that need no further package."""
UNREFERENCED_METRICS = ("edit distance", "repetition", "empty", "truncated")
"""Those that need no reference either."""


def metric_items(given: Any) -> dict[str, str | UserMetric]:
    """Returns what was asked for: names of metrics or functions, by the name of their figure.

    Raises:
        InvalidInput: If there is nothing, or something else.
    """
    pairs: list[Any]
    if isinstance(given, Mapping):
        pairs = list(given.items())
    else:
        one = isinstance(given, str) or callable(given) or not isinstance(given, Sequence)
        listed: Any = [given] if one else given
        pairs = [(_label(what), what) for what in listed]
    named = all(
        isinstance(name, str) and (isinstance(what, str) or callable(what)) for name, what in pairs
    )
    if not named or not pairs or len({name for name, _ in pairs}) < len(pairs):
        raise InvalidInput(
            "there is no such metric",
            repr(given),
            "names or functions, each once, or a mapping from names to them",
            f"Choose from {list(METRICS)}, or give a function of output, reference and source.",
        )
    return dict(pairs)


def _label(what: object) -> object:
    return what if isinstance(what, str) else getattr(what, "__name__", "metric")


def make_metrics(items: Mapping[str, str | UserMetric]) -> list[Metric]:
    """Returns metrics by their names, or made of functions.

    Raises:
        InvalidInput: If there is none of a name.
        ContextMixError: If the package it needs is not installed.
    """
    return [
        replace(_metric_named(what), name=name)
        if isinstance(what, str)
        else user_metric(name, what)
        for name, what in items.items()
    ]


def _metric_named(name: str) -> Metric:
    if name not in _MAKERS:
        raise InvalidInput(
            "there is no such metric",
            repr(name),
            f"one of {list(METRICS)}, 'gold NLL', 'KL', 'accuracy' or 'MRR' of decoder_lens, or "
            "a function",
            "Pass a function of output, reference and source for a metric of your own.",
        )
    return _MAKERS[name]()
