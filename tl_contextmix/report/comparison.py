"""One page on which map to believe for a model."""

from __future__ import annotations

from pathlib import Path

from tl_contextmix.compare import compare, demo_pairs
from tl_contextmix.demo_models import DEMO_NAMES
from tl_contextmix.errors import InvalidInput, four_parts
from tl_contextmix.evaluate import MinimalPair, load_minimal_pairs
from tl_contextmix.hosts import as_view
from tl_contextmix.inputs import package_version
from tl_contextmix.loading import load_model
from tl_contextmix.render import Page, Section
from tl_contextmix.results import Comparison

COMPARISON_PATH = "tl_contextmix_comparison.html"
COMPARED = 50
_CITATIONS = (
    "Value Zeroing, and alignment with cues: Mohebbi, Zuidema, Chrupala, Alishahi (EACL 2023). "
    "Comprehensiveness and sufficiency: DeYoung et al., ERASER (ACL 2020). Attention rollout: "
    "Abnar, Zuidema (ACL 2020). Norms: Kobayashi, Kuribayashi, Yokoi, Inui (EMNLP 2020, EMNLP "
    "2021, ICLR 2024). GlobEnc: Modarressi et al. (NAACL 2022). ALTI: Ferrando, Gallego, "
    "Costa-jussa (EMNLP 2022). DecompX: Modarressi et al. (ACL 2023). Integrated gradients: "
    "Sundararajan, Taly, Yan (ICML 2017)."
)


def write_comparison(
    model_or_name: object,
    pairs: str | Path | None = None,
    path: str | Path = COMPARISON_PATH,
    *,
    count: int | None = None,
    words: bool = False,
) -> tuple[Path, Comparison]:
    """Writes `compare` of minimal pairs to one page; returns its path and the comparison.

    Args:
        model_or_name: A causal or masked model, or what `load_model` takes.
        pairs: A file as `load_minimal_pairs` reads it; None for a demo model's own grammar.
        path: The page.
        count: How many of them, from the first; None for all of a file, or 50 of the grammar.
        words: See `compare`.

    Raises:
        ContextMixError: If the model, the pairs or the path cannot be used.
    """
    if count is not None and count < 1:
        raise InvalidInput(
            four_parts("nothing can be compared", count, "at least 1 sentence", "Ask for 50.")
        )
    named = isinstance(model_or_name, (str, Path))
    model = load_model(model_or_name) if named else model_or_name
    view = as_view(model)
    listed = _listed(view.name, pairs, count)
    found = compare(model, listed, words=words)
    facts = (
        ("Model", view.name),
        ("Class", f"{view.host}, TransformerLens {view.host_version}"),
        ("Weights", ", ".join(view.processing) or "as published"),
        ("Sentences", f"{len(listed)}, such as: {listed[0].good}"),
        ("tl_contextmix", package_version()),
    )
    text = (
        "Every method looks at the same row: that of the position the answer is predicted from. "
        "Alignment asks whether it points at the words that are known to decide the answer; "
        "faithfulness whether the prediction falls when what it ranks high is blanked. The first "
        "presumes that the model uses the cue; the second puts the model before sentences it "
        "never saw. A method can be right about one layer and poor through all of them."
    )
    section = Section("Which map to believe", text, found.panels(), _CITATIONS, _finding(found))
    page = Page((), title="Comparison of methods", facts=facts, sections=(section,))
    return page.save(path), found


def _listed(name: str, pairs: str | Path | None, count: int | None) -> tuple[MinimalPair, ...]:
    if pairs is not None:
        return load_minimal_pairs(pairs)[:count]
    if name in DEMO_NAMES:
        return demo_pairs(count=count or COMPARED)
    raise InvalidInput(
        four_parts(
            "there are no sentences to compare methods on",
            f"{name}, which is no demo model, without a file of pairs",
            "a file of minimal pairs, a JSON object per line",
            "Give --pairs FILE, for example one of BLiMP's.",
        )
    )


def _finding(found: Comparison) -> str:
    first = found.metrics[0]
    best = found.best(first).iloc[0]
    return (
        f"By {first}: {best['method']} at layer {best['layer']}, {best['value']:.2f} "
        f"({best['low']:.2f} to {best['high']:.2f}; chance {best['chance']:.2f})."
    )
