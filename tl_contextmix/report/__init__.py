"""One offline page: what a model's blocks do to a sentence, or any results one wants to show."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tl_contextmix.errors import InvalidInput, four_parts
from tl_contextmix.loading import load_model
from tl_contextmix.render import Page, Section, require_writable
from tl_contextmix.report.sections import SECTIONS, facts
from tl_contextmix.report.story import default_text, read
from tl_contextmix.results import Provenance, Result

DEFAULT_MODEL = "causal-lm"
DEFAULT_PATH = "tl_contextmix_report.html"


def build_report(model: object, text: str, *, title: str | None = None) -> Page:
    """Returns a page on what the blocks of a model do to a sentence.

    What it predicts; what the predicting token is made of, layer by layer; which components wrote
    the answer; the map of every scope; how much each component changes it; the pairs the
    feed-forward block changes most; the mixing ratio; what each layer loses without a token; and
    the rollout. Of an encoder-decoder, the maps are those of the encoder, and the components those
    of the decoder; the last section is then what the decoder says after each encoder layer.

    Args:
        model: Any model `as_view` reads.
        text: The sentence.
        title: Heading of the page.

    Raises:
        ContextMixError: If the model or the text cannot be used.

    Warns:
        ContextMixWarning: If a demo model never saw a word of the text.
    """
    with _progress(len(SECTIONS) + 1) as bar:
        return _build(model, text, title, bar)


def write_report(
    model_or_name: object,
    text: str | None = None,
    path: str | Path = DEFAULT_PATH,
    *,
    title: str | None = None,
) -> Path:
    """Writes `build_report` to a file; returns its path.

    Args:
        model_or_name: A model, or what `load_model` takes.
        text: The sentence; None for one that suits the model.
        path: The file.
        title: Heading of the page.

    Raises:
        ContextMixError: If the model, the text or the path cannot be used.
    """
    require_writable(path)
    with _progress(len(SECTIONS) + 2) as bar:
        bar.set_description("loading")
        named = isinstance(model_or_name, (str, Path))
        model = load_model(model_or_name) if named else model_or_name
        bar.update()
        page = _build(model, default_text(model) if text is None else text, title, bar)
    return page.save(path)


def report(results: Result | Sequence[Any], path: str | Path, *, title: str = "Results") -> Path:
    """Writes any results to one page, a section each; returns its path.

    Args:
        results: One result or several, in the order they are to be shown.
        path: The file.
        title: Heading of the page.

    Raises:
        InvalidInput: If something given is no result, or the file cannot be written.
    """
    listed = [results] if isinstance(results, Result) else results
    sections = tuple(_result_section(result) for result in listed)
    return Page((), title=title, sections=sections).save(path)


def _result_section(result: object) -> Section:
    if not isinstance(result, Result):
        raise InvalidInput(
            four_parts(
                "the page cannot be made",
                f"a {type(result).__name__}",
                "results of this package's methods",
                "Give one result or a list of them.",
            )
        )
    provenance: Provenance | None = getattr(result, "provenance", None)
    if provenance is None:
        return Section(type(result).__name__, "", result.panels())
    options = ", ".join(f"{name}={value!r}" for name, value in provenance.options.items())
    processing = ", ".join(provenance.processing) or "as published"
    text = (
        f"{provenance.method}({options}) of {provenance.model} on {provenance.host} "
        f"{provenance.host_version}, weights {processing}."
    )
    return Section(provenance.method, text, result.panels())


def _progress(total: int) -> tqdm:
    # disable=None: on a terminal only.
    return tqdm(total=total, disable=None, leave=False, unit="step")


def _build(model: object, text: str, title: str | None, bar: tqdm) -> Page:
    bar.set_description("maps")
    story = read(model, text)
    bar.update()
    sections = []
    for name, write in SECTIONS.items():
        bar.set_description(name)
        sections.append(write(story))
        bar.update()
    found = tuple(section for section in sections if section is not None)
    return Page((), title=title or "Context-mixing report", facts=facts(story), sections=found)
