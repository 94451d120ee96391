"""Commands on texts: report, compare, explain, run; and check."""

from __future__ import annotations

import argparse

import tl_contextmix
from tl_contextmix.adapters import check
from tl_contextmix.adapters.loading import load_model
from tl_contextmix.commands.shared_options import (
    MODEL,
    add_asked,
    add_generate,
    add_page,
    asked,
    written,
)
from tl_contextmix.core.validation import require_choice
from tl_contextmix.engine.registry import methods
from tl_contextmix.plotting import Page
from tl_contextmix.plotting.display_text import visible
from tl_contextmix.reporting import DEFAULT_MODEL, DEFAULT_PATH, report, write_report
from tl_contextmix.reporting.comparison_section import COMPARED, COMPARISON_PATH, write_comparison
from tl_contextmix.reporting.sections import SECTIONS


def add(commands: argparse._SubParsersAction) -> None:
    """Adds the commands to a parser."""
    for one in (_add_report, _add_compare, _add_explain, _add_run, _add_check):
        one(commands)


def _add_explain(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "explain",
        help="say in words why a model predicts a token",
        description="Prints what the model predicts, which layers, sources and neurons wrote it, "
        "and whether it falls without them; -o also writes it as an HTML page.",
    )
    command.set_defaults(command=_explain)
    command.add_argument("model", metavar="MODEL", help=MODEL)
    command.add_argument("text", metavar="TEXT", help="the text")
    add_asked(command)
    command.add_argument("-o", "--output", metavar="PATH", help="write a page")


def _explain(parsed: argparse.Namespace) -> int:
    page = report(
        load_model(parsed.model),
        parsed.text,
        title="Why this prediction?",
        sections=("prediction", "components"),
        **asked(parsed),
    )
    for section in page.sections:
        print(visible(section.finding or section.title))
    print(f"\n{Page(page.sections[-1].panels).text()}")
    if parsed.output is not None:
        print(page.save(parsed.output))
    return 0


def _add_report(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "report",
        help="write an HTML report on what a model's blocks do to a sentence",
        description="Writes one self-contained HTML page and prints its path. Without --model, it "
        "covers the bundled causal language model, with a section on the bundled encoder-decoder.",
    )
    command.set_defaults(command=_report)
    add_page(command, DEFAULT_PATH, None)
    command.add_argument("--text", help="the sentence; default: an example")
    add_asked(command)
    command.add_argument(
        "--sections",
        nargs="+",
        choices=tuple(SECTIONS),
        metavar="NAME",
        help=f"sections to include, of: {', '.join(SECTIONS)}; default: all but points",
    )
    command.add_argument(
        "--triggers", metavar="DIR", help="folder of the model's triggers, written by `mine`"
    )
    command.add_argument(
        "--pairs", metavar="FILE", help="minimal pairs to compare methods on; see `compare`"
    )


def _add_compare(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "compare",
        help="compare all methods on minimal pairs",
        description="Runs every method on the same minimal pairs, prints its scores and cost, and "
        "writes one self-contained HTML page.",
    )
    command.set_defaults(command=_compare)
    add_page(command, COMPARISON_PATH, DEFAULT_MODEL)
    command.add_argument(
        "--pairs",
        metavar="FILE",
        help="minimal pairs in BLiMP's format: one JSON object per line with sentence_good, "
        "sentence_bad and optionally cues; default: pairs from a demo model's grammar",
    )
    command.add_argument(
        "--sentences",
        type=int,
        metavar="N",
        help=f"number of pairs; default: all of a file, {COMPARED} from the grammar",
    )
    command.add_argument(
        "--contrast",
        action="store_true",
        help="ask for the right word rather than the wrong one of each pair",
    )
    command.add_argument(
        "--words", action="store_true", help="aggregate maps over the tokens of each word"
    )
    command.add_argument(
        "--drop-unusable",
        action="store_const",
        const="drop",
        default="error",
        dest="unusable",
        help="skip, and list, pairs that cannot be scored on the model",
    )


def _add_run(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "run",
        help="run one method on a text",
        description="Prints the result of a method on a text; -o also writes it as an HTML page.",
    )
    command.set_defaults(command=_run)
    command.add_argument("method", metavar="METHOD", help="a method, such as value_zeroing")
    command.add_argument("model", metavar="MODEL", help=MODEL)
    command.add_argument("text", metavar="TEXT", help="the text")
    add_asked(command)
    add_generate(command)
    command.add_argument("-o", "--output", metavar="PATH", help="write a page")


def _add_check(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "check",
        help="verify that a model is read correctly",
        description="Recomputes a model's activations from its weights and a few hooks, and prints "
        "the largest errors. Exits with code 1 if an identity does not hold.",
    )
    command.set_defaults(command=_check)
    command.add_argument("model", metavar="MODEL", help=MODEL)


def _report(parsed: argparse.Namespace) -> int:
    path = write_report(
        parsed.model,
        parsed.text,
        parsed.output,
        sections=parsed.sections,
        triggers=parsed.triggers,
        pairs=parsed.pairs,
        **asked(parsed),
    )
    return written(path, parsed.open)


def _compare(parsed: argparse.Namespace) -> int:
    path, found = write_comparison(
        parsed.model,
        parsed.pairs,
        parsed.output,
        count=parsed.sentences,
        words=parsed.words,
        unusable=parsed.unusable,
        contrast=parsed.contrast,
    )
    print(found)
    return written(path, parsed.open)


def _run(parsed: argparse.Namespace) -> int:
    known = {name: method for name, method in methods().items() if method.on_text}
    require_choice("METHOD", parsed.method, tuple(known))
    method = getattr(tl_contextmix, parsed.method)  # with its checks of what it is given
    found = method(load_model(parsed.model), parsed.text, **asked(parsed))
    print(found)
    if parsed.output is not None:
        print(found.show().save(parsed.output))
    return 0


def _check(parsed: argparse.Namespace) -> int:
    found = check(load_model(parsed.model))
    print(found)
    return 0 if found.ok else 1
