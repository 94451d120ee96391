"""The sections of a report, in order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

from tl_contextmix.errors import InvalidInput
from tl_contextmix.plotting import Section
from tl_contextmix.plotting.panels import Table
from tl_contextmix.reporting.answer_section import answer
from tl_contextmix.reporting.comparison_section import comparison
from tl_contextmix.reporting.components_section import components
from tl_contextmix.reporting.feed_forward_section import feed_forward
from tl_contextmix.reporting.graph_section import graph
from tl_contextmix.reporting.layers_section import encoder_layers
from tl_contextmix.reporting.memories_section import memories
from tl_contextmix.reporting.mixing_section import mixing, points
from tl_contextmix.reporting.prediction_section import prediction
from tl_contextmix.reporting.story import Story
from tl_contextmix.results import Provenance, Result
from tl_contextmix.results.labels import package_version

SectionName = Literal[
    "prediction",
    "answer",
    "mixing",
    "points",
    "feed-forward",
    "memories",
    "components",
    "graph",
    "encoder-layers",
    "comparison",
]
# Each returns its section, or why there is none; nothing where nobody would miss it.
SECTIONS: dict[SectionName, Callable[[Story], Section | str]] = {
    "prediction": prediction,
    "answer": answer,
    "mixing": mixing,
    "points": points,
    "feed-forward": feed_forward,
    "memories": memories,
    "components": components,
    "graph": graph,
    "encoder-layers": encoder_layers,
    "comparison": comparison,
}
DEFAULT_SECTIONS: tuple[SectionName, ...] = tuple(name for name in SECTIONS if name != "points")


def chosen(names: Sequence[SectionName] | None) -> tuple[SectionName, ...]:
    """Returns the sections to include, in order; None for the default ones."""
    if names is None:
        return DEFAULT_SECTIONS
    listed = [names] if isinstance(names, str) else list(names)
    unknown = [name for name in listed if name not in get_args(SectionName)]
    if unknown or not listed:
        raise InvalidInput(
            "the report has no such section",
            ", ".join(map(repr, unknown)) or "an empty list",
            f"some of {', '.join(SECTIONS)}",
            "Pass some of these, or None for the default ones.",
        )
    return tuple(name for name in SECTIONS if name in listed)


def write_sections(
    story: Story, names: Sequence[SectionName], begin: Callable[[str], object]
) -> tuple[list[Section], list[tuple[str, str]]]:
    """Returns the sections that apply, and which do not, each with the reason.

    ``begin`` is called with the name of each section before it is made.
    """
    sections: list[Section] = []
    missing: list[tuple[str, str]] = []
    for name in names:
        begin(name)
        section = SECTIONS[name](story)
        if isinstance(section, Section):
            sections.append(section)
        elif section:
            missing.append((name, section))
    return sections, missing


def with_missing(
    sections: Sequence[Section], reasons: Sequence[tuple[str, str]]
) -> tuple[Section, ...]:
    """Returns sections, and as the last one what was skipped, and why, if anything was."""
    if not reasons:
        return tuple(sections)
    table = Table(
        title="Skipped sections",
        caption="Sections that do not apply to this model or text.",
        columns=("section", "reason"),
        rows=tuple(reasons),
    )
    return (*sections, Section("What is not on this page", "", (table,)))


def result_section(result: object) -> Section:
    """Returns what a result of a method shows, and how it was made."""
    if not isinstance(result, Result):
        raise InvalidInput(
            "cannot write this to a page",
            f"a {type(result).__name__}",
            "results of this package's methods",
            "Pass one result or a list of them.",
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


def facts(story: Story) -> tuple[tuple[str, str], ...]:
    """Returns text, model and versions as names and values."""
    view, text = story.forward_pass.view, story.text
    if not isinstance(text, str):
        text = view.to_text(text.flatten().tolist())
    facts = [
        ("Text", text),
        ("Model", view.name),
        ("Class", f"{view.host}, TransformerLens {view.host_version}"),
        ("Weights", ", ".join(view.processing) or "as published"),
        ("tl_contextmix", package_version()),
    ]
    if story.stack == "encoder":
        facts.insert(3, ("Maps of", "the encoder"))
    return tuple(facts)


def notes(story: Story) -> tuple[str, ...]:
    """Returns what there is to know before anything is read: odd words, and abbreviations."""
    return (
        *story.notes,
        "L2H1 is head 1 of layer 2, counted from 0. A nat is the unit of a natural logarithm: what "
        "is 1 nat more probable is 2.7 times as probable.",
    )
