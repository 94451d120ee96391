"""The HTML report: what a model's blocks do to a sentence, or a page of given results."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tl_contextmix.adapters.inputs import Ids, Labels
from tl_contextmix.adapters.loading import load_model
from tl_contextmix.adapters.questions import Answer, Target
from tl_contextmix.errors import InvalidInput, UnsupportedModel
from tl_contextmix.evaluation import MinimalPair, load_minimal_pairs
from tl_contextmix.methods.memories import Triggers, load_triggers
from tl_contextmix.plotting import Page, require_writable
from tl_contextmix.reporting.lit_fields import lit_model as lit_model
from tl_contextmix.reporting.sections import (
    SectionName,
    chosen,
    facts,
    notes,
    result_section,
    with_missing,
    write_sections,
)
from tl_contextmix.reporting.story import default_text, read
from tl_contextmix.results import Result

TITLE = "Context-mixing report"
DEFAULT_MODEL = "causal-lm"
DEFAULT_PATH = "tl_contextmix_report.html"
# Provides the section on encoder layers in the default model's report.
COMPANION = "encoder-decoder"


def report(
    model: object = None,
    text: str | Ids | None = None,
    *,
    title: str | None = None,
    sections: Sequence[SectionName] | None = None,
    triggers: Triggers | str | Path | None = None,
    pairs: Sequence[MinimalPair] | str | Path | None = None,
    companion: object = None,
    target: Target | None = None,
    foil: Target | None = None,
    pos: int | None = None,
    generate: int | None = None,
    labels: Labels | None = None,
) -> Page:
    """Returns a page on what a model's blocks do to a sentence, and why it says what it says.

    A notebook shows it; ``.save(path)`` writes it, ``.open()`` shows it in the browser.

    ``prediction``: what the model predicts. ``answer``: what each token of an answer of several was
    made of. ``mixing``: which tokens were mixed, and where. ``feed-forward``: what the feed-forward
    block changed. ``memories``: which memories fired and what triggers them. ``components``: which
    components wrote the answer, tested by knockout. ``graph``: which token went through which head
    and block to make it. ``encoder-layers``: what each encoder layer already knows. ``comparison``:
    which map to believe. ``points``, only on request: the map at every point of a block.

    For an encoder-decoder, maps are the encoder's and components the decoder's. Sections that do
    not apply to the model or text are listed at the end with the reason.

    Args:
        model: A model, or what `load_model` takes. None: the bundled causal language model, with
            the bundled encoder-decoder for ``encoder-layers``.
        text: The sentence, or its token ids; None for an example that suits the demo models.
        title: Heading of the page.
        sections: Sections to include; None for all but ``points``. Their order is fixed.
        triggers: Triggers of the model's memories (`load_triggers`, with model and corpus), or the
            folder that `mine_triggers` wrote for it. None: mined from the grammar of a demo model.
        pairs: Minimal pairs to compare methods on, or a file of them (`load_minimal_pairs`); the
            first 8 are used. None: from the grammar of a demo model.
        companion: An encoder-decoder for ``encoder-layers`` if the model has no encoder.
        target: The predicted token that the page explains, see `Asked`; None: the model's best.
        foil: What it is contrasted with, see `Asked`.
        pos: The predicting position; None: the last, or the mask.
        generate: How many tokens of what the model says next ``answer`` explains, at most. None:
            of an encoder-decoder all, up to 30; else there is no such section.
        labels: Names of the token ids, see `Inputs`.

    Raises:
        ContextMixError: If the model, the text, a file or the sections cannot be used.

    Warns:
        ContextMixWarning: If a demo model was not trained on a word of the text. The page says so,
            too.

    Example:
        >>> import tl_contextmix as cm
        >>> page = cm.report("causal-lm", "the keys to the cabinet", sections=["prediction"])
        >>> page.sections[0].finding.split(" (")[0]
        'After “cabinet” the model predicts “are”'
    """
    if isinstance(model, Result) or (isinstance(model, Sequence) and not isinstance(model, str)):
        # What it took before: results, and the name of a file.
        raise InvalidInput(
            "report explains what a model says to a text",
            f"a {type(model).__name__} in the place of the model",
            "a model and a text",
            "Write results with tl_contextmix.reporting.write_results(results, path).",
        )
    names = chosen(sections)
    if model is None:
        model = DEFAULT_MODEL
        if companion is None and "encoder-layers" in names:
            # No class of TransformerLens 2 computes the bundled encoder-decoder correctly.
            with suppress(UnsupportedModel):
                companion = load_model(COMPANION)
    if isinstance(model, (str, Path)):
        model = load_model(model)
    given = {
        "triggers": load_triggers(triggers, model=model)
        if isinstance(triggers, (str, Path))
        else triggers,
        "pairs": load_minimal_pairs(pairs) if isinstance(pairs, (str, Path)) else pairs,
        "companion": companion,
        "labels": labels,
        "generate": generate,
    }
    # disable=None: only on a terminal.
    with tqdm(total=len(names) + 1, disable=None, leave=False, unit="step") as bar:
        bar.set_description("maps")
        text = default_text(model) if text is None else text
        story = read(model, text, answer=Answer(target, foil, pos), **given)

        def begin(name: str) -> None:
            bar.update()
            bar.set_description(name)

        written = with_missing(*write_sections(story, names, begin))
    return Page((), title or TITLE, facts(story), written, notes(story))


def write_report(
    model: object = None,
    text: str | None = None,
    path: str | Path = DEFAULT_PATH,
    **options: Any,
) -> Path:
    """Writes `report` to a file, which is checked before the work begins; returns its path.

    Args:
        model: See `report`.
        text: See `report`.
        path: The file.
        **options: See `report`.

    Raises:
        ContextMixError: If the model, the text, a file or the path cannot be used.
    """
    require_writable(path)
    return report(model, text, **options).save(path)


def write_results(
    results: Result | Sequence[Any], path: str | Path, *, title: str = "Results"
) -> Path:
    """Writes results to one page, a section each; returns its path.

    Args:
        results: One result or several, in the order to show them.
        path: The file.
        title: Heading of the page.

    Raises:
        InvalidInput: If an item is not a result, or the file cannot be written.
    """
    listed = [results] if isinstance(results, Result) else results
    sections = tuple(result_section(result) for result in listed)
    return Page((), title=title, sections=sections).save(path)
