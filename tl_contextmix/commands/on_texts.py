"""Commands on texts: report, explore, compare, explain; and check."""

from __future__ import annotations

from typing import Any

import click
from click.core import ParameterSource

from tl_contextmix import reporting
from tl_contextmix.adapters import check as check_model
from tl_contextmix.adapters.loading import load_model
from tl_contextmix.commands.output_options import Wanted, add_output, wanted
from tl_contextmix.commands.shared_options import (
    add_asked,
    add_model,
    add_page,
    asked,
    flat,
    load_options,
    open_if,
    several,
)
from tl_contextmix.exploring import HOST, MAX_GIB
from tl_contextmix.exploring import explore as exploring
from tl_contextmix.plotting import Page
from tl_contextmix.plotting.display_text import visible
from tl_contextmix.reporting.comparison_section import COMPARED, COMPARISON_PATH, compared_page
from tl_contextmix.reporting.sections import SECTIONS


@click.command(
    epilog="\b\nExample:\n"
    '  tl-contextmix explain causal-lm "the keys to the cabinet" --target " are" --foil " is"'
)
@add_model()
@click.argument("text", metavar="TEXT")
@add_asked()
@add_output(csv=False, written="Write a page.")
def explain(text: str, model: str, **given: Any) -> None:
    """Says in words why a model predicts a token.

    Prints what the model predicts, which layers, sources and neurons wrote it, and whether it falls
    without them; as JSON, the sentences. The numbers are those of log-prob-contributions.
    """
    want = wanted(given, endings=(".html",))
    page = reporting.report(
        load_model(model, **load_options(given)),
        text,
        title="Why this prediction?",
        sections=("prediction", "components"),
        **asked(given),
    )
    lines = [visible(section.finding or section.title) for section in page.sections]
    lines.append(f"\n{Page(page.sections[-1].panels).text()}")
    want.emit(page, *lines, facts=_findings(page))
    if want.output is not None:
        want.wrote(page.save(want.output))


def _findings(page: Page) -> dict[str, Any]:
    """Returns what a page says in sentences."""
    sections = [{"title": one.title, "finding": one.finding or None} for one in page.sections]
    return {"title": page.title, "notes": list(page.notes), "sections": sections}


@click.command(
    epilog="\b\nExamples:\n  tl-contextmix report --open\n"
    '  tl-contextmix report gpt2 "The keys to the cabinet" --sections mixing,components'
)
@add_model(required=False)
@click.argument("text", metavar="[TEXT]", required=False)
@add_asked(generate=True)
@several(
    "--sections",
    kind=click.Choice(tuple(SECTIONS)),
    help=f"Of {', '.join(SECTIONS)}. Default: all but points.",
)
@click.option(
    "--triggers", metavar="DIR", help="Folder of the model's triggers, written by `mine`."
)
@click.option("--pairs", metavar="FILE", help="Minimal pairs to compare methods on; see `compare`.")
@add_page(reporting.DEFAULT_PATH)
@add_output(csv=False, written=None)
def report(model: str | None, text: str | None, opened: bool, sections: Any, **given: Any) -> None:
    """Writes one self-contained page on what a model's blocks do to a sentence.

    Without MODEL it is about the bundled causal language model, with a section on the bundled
    encoder-decoder; without TEXT, about an example. Prints where the page is; as JSON, what it
    finds, too.
    """
    want = wanted(given, endings=(".html",))
    loading = load_options(given)
    loaded = load_model(model or reporting.DEFAULT_MODEL, **loading) if loading else model
    question = asked(given)
    page = reporting.report(loaded, text, sections=flat(sections), **given, **question)
    path = str(page.save(str(want.output)))
    want.emit(page, path, facts={"page": path, **_findings(page)})
    open_if(opened, path)


@click.command(
    epilog="\b\nExamples:\n  tl-contextmix explore\n"
    "  tl-contextmix explore gpt2 --port 8000 --no-browser"
)
@add_model(required=False)
@click.option("--host", default=HOST, show_default=True, help="An address of this machine alone.")
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="Default: a free one.")
@click.option("--browser/--no-browser", default=True, help="Default: open the page.")
@click.option("--max-flops", type=float, metavar="NUMBER", help="Default: 1e13; 1e15 on a GPU.")
@click.option("--max-gib", type=float, default=MAX_GIB, show_default=True, metavar="NUMBER")
def explore(model: str | None, **given: Any) -> None:
    """Serves a page to type a text, a target and a foil, and see what the report says.

    Only this machine can open the page, at the address that is printed. Ctrl-C ends it. --max-flops
    and --max-gib are the most that a question may take, by its estimate.
    """
    loading = load_options(given)
    exploring(
        model or reporting.DEFAULT_MODEL,
        loading=loading,
        ready=lambda address: click.echo(f"{address}\nCtrl-C ends it."),
        **given,
    )


@click.command(
    epilog="\b\nExamples:\n  tl-contextmix compare causal-lm --sentences 3 --csv\n"
    "  tl-contextmix compare gpt2 --pairs blimp.jsonl --sentences 50"
)
@add_model(required=False)
@click.option(
    "--pairs",
    metavar="FILE",
    help="Minimal pairs in BLiMP's format: one JSON object per line with sentence_good, "
    "sentence_bad and optionally cues. Default: pairs from a demo model's grammar.",
)
@click.option(
    "--sentences",
    type=int,
    metavar="N",
    help=f"Number of pairs. Default: all of a file, {COMPARED} from the grammar.",
)
@click.option(
    "--contrast", is_flag=True, help="Ask for the right word rather than the wrong one of a pair."
)
@click.option("--words", is_flag=True, help="Aggregate maps over the tokens of each word.")
@click.option("--drop-unusable", is_flag=True, help="Skip, and list, pairs that cannot be scored.")
@add_page(COMPARISON_PATH)
@add_output(written=None)
def compare(model: str | None, opened: bool, **given: Any) -> None:
    """Compares all methods on the same minimal pairs.

    Prints scores and cost, and writes one self-contained page, or with another ending of --output
    the table; with --json or --csv alone it writes nothing. Without MODEL, on the bundled causal
    language model.
    """
    source = click.get_current_context().get_parameter_source("output")
    if (given["as_json"] or given["csv"]) and source is ParameterSource.DEFAULT:
        given["output"] = None
    want = wanted(given)
    page, found = compared_page(
        load_model(model or reporting.DEFAULT_MODEL, **load_options(given)),
        given["pairs"],
        count=given["sentences"],
        words=given["words"],
        unusable="drop" if given["drop_unusable"] else "error",
        contrast=given["contrast"],
    )
    want.emit(found)
    _write_compared(want, page, found, opened)


def _write_compared(want: Wanted, page: Page, found: Any, opened: bool) -> None:
    """Writes a comparison: its page has a heading and facts that the bare result has not."""
    if want.output is None or not want.output.endswith(".html"):
        want.write(found)
        return
    path = page.save(want.output)
    want.wrote(path)
    open_if(opened, path)


@click.command(epilog="\b\nExample:\n  tl-contextmix check causal-lm")
@add_model()
@add_output()
def check(model: str, **given: Any) -> int:
    """Verifies that a model is read correctly.

    Recomputes its activations from its weights and a few hooks, and prints the largest errors.
    Exits with 1 if an identity does not hold.
    """
    want = wanted(given)
    found = check_model(load_model(model, **load_options(given)))
    want.emit(found)
    want.write(found)
    return 0 if found.ok else 1
