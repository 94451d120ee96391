"""The sections of a report, in the order they are told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

from tl_contextmix.adapters.inputs import package_version
from tl_contextmix.errors import bad
from tl_contextmix.plotting import Section
from tl_contextmix.plotting.panels import Table
from tl_contextmix.reporting.comparison_section import comparison
from tl_contextmix.reporting.components_section import components
from tl_contextmix.reporting.feed_forward_section import feed_forward
from tl_contextmix.reporting.layers_section import encoder_layers
from tl_contextmix.reporting.memories_section import memories
from tl_contextmix.reporting.mixing_section import mixing, points
from tl_contextmix.reporting.prediction_section import prediction
from tl_contextmix.reporting.story import Story

SectionName = Literal[
    "prediction",
    "mixing",
    "points",
    "feed-forward",
    "memories",
    "components",
    "encoder-layers",
    "comparison",
]
# Each returns its section, or why there is none.
SECTIONS: dict[SectionName, Callable[[Story], Section | str]] = {
    "prediction": prediction,
    "mixing": mixing,
    "points": points,
    "feed-forward": feed_forward,
    "memories": memories,
    "components": components,
    "encoder-layers": encoder_layers,
    "comparison": comparison,
}
DEFAULT_SECTIONS: tuple[SectionName, ...] = tuple(name for name in SECTIONS if name != "points")


def chosen(names: Sequence[SectionName] | None) -> tuple[SectionName, ...]:
    """Returns the sections to be told, in their order; None for those of the default.

    Raises:
        InvalidInput: If one does not exist, or none is left.
    """
    if names is None:
        return DEFAULT_SECTIONS
    listed = [names] if isinstance(names, str) else list(names)
    unknown = [name for name in listed if name not in get_args(SectionName)]
    if unknown or not listed:
        raise bad(
            "the report has no such section",
            ", ".join(map(repr, unknown)) or "no section at all",
            f"some of {', '.join(SECTIONS)}",
            "Choose among these, or leave it out for the whole story.",
        )
    return tuple(name for name in SECTIONS if name in listed)


def missing_section(reasons: Sequence[tuple[str, str]]) -> Section:
    """Returns what the page does not tell, and why."""
    table = Table(
        title="Left out",
        caption="Parts of the story that this model or this text has no answer to.",
        columns=("section", "reason"),
        rows=tuple(reasons),
    )
    return Section("What is not on this page", "", (table,))


def facts(story: Story) -> tuple[tuple[str, str], ...]:
    """Returns what the report is about, as names and values."""
    view = story.done.view
    facts = [
        ("Text", story.text),
        ("Model", view.name),
        ("Class", f"{view.host}, TransformerLens {view.host_version}"),
        ("Weights", ", ".join(view.processing) or "as published"),
        ("tl_contextmix", package_version()),
    ]
    if story.stack == "encoder":
        facts.insert(3, ("Maps of", "the encoder"))
    return tuple(facts)
