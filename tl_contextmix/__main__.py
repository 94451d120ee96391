"""The command line: parse, call, exit."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
import webbrowser
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tl_contextmix
from tl_contextmix.adapters import check
from tl_contextmix.adapters.inputs import package_version
from tl_contextmix.adapters.loading import load_model
from tl_contextmix.core.validation import require_choice
from tl_contextmix.engine.registry import methods
from tl_contextmix.errors import ContextMixError, ContextMixWarning, bad
from tl_contextmix.methods.memories import load_triggers, merge_triggers, mine_triggers
from tl_contextmix.reporting import DEFAULT_MODEL, DEFAULT_PATH, write_report
from tl_contextmix.reporting.comparison_section import COMPARED, COMPARISON_PATH, write_comparison
from tl_contextmix.reporting.sections import SECTIONS

_MODEL = "a demo model (causal-lm, masked-lm, encoder-decoder), a folder or a hub name"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code.

    0: success. 1: `check` found an identity that does not hold. 2: the command failed.
    130: interrupted.

    Args:
        arguments: Command-line arguments; None for those of the process.
    """
    parsed = _parser().parse_args(arguments)
    # These libraries log about calls that the user did not write.
    for name in ("TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY"):
        os.environ.setdefault(name, "error")
    with warnings.catch_warnings():
        warnings.simplefilter("always", ContextMixWarning)
        warnings.showwarning = _show_warning
        try:
            return parsed.command(parsed)
        except ContextMixError as error:
            print(f"tl-contextmix: error: {_one_line(error)}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            kept = "; run the same command to resume" if parsed.command is _mine else ""
            print(f"tl-contextmix: interrupted{kept}", file=sys.stderr)
            return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tl-contextmix",
        description="Context mixing for TransformerLens models.",
    )
    parser.add_argument("--version", action="version", version=f"tl-contextmix {package_version()}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_report(commands)
    _add_compare(commands)
    _add_run(commands)
    _add_check(commands)
    _add_mine(commands)
    _add_merge(commands)
    _add_show(commands)
    return parser


def _add_report(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "report",
        help="write an HTML report on what a model's blocks do to a sentence",
        description="Writes one self-contained HTML page and prints its path. Without --model, it "
        "covers the bundled causal language model, with a section on the bundled encoder-decoder.",
    )
    command.set_defaults(command=_report)
    _add_page(command, DEFAULT_PATH, None)
    command.add_argument("--text", help="the sentence; default: an example")
    _add_asked(command)
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
    _add_page(command, COMPARISON_PATH, DEFAULT_MODEL)
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
    command.add_argument("model", metavar="MODEL", help=_MODEL)
    command.add_argument("text", metavar="TEXT", help="the text")
    _add_asked(command)
    _add_generate(command)
    command.add_argument("-o", "--output", metavar="PATH", help="write a page")


def _add_asked(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--target",
        metavar="TOKEN",
        nargs="+",
        help="the predicted token, its leading space included; several are alternatives; "
        "default: the model's best",
    )
    command.add_argument(
        "--foil", metavar="TOKEN", nargs="+", help="the token that the target is contrasted with"
    )
    command.add_argument(
        "--position",
        type=int,
        metavar="N",
        help="the predicting position, from the end if negative; default: the last, or the mask",
    )


def _add_generate(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--generate",
        type=int,
        metavar="N",
        help="explain what the model itself says next, at most N tokens",
    )


def _asked(parsed: argparse.Namespace) -> dict[str, Any]:
    """Returns what is asked of a prediction, as options of a method."""
    sides = {"target": parsed.target, "foil": parsed.foil}
    found = {
        name: given[0] if len(given) == 1 else set(given)
        for name, given in sides.items()
        if given is not None
    }
    numbers = {"pos": parsed.position, "generate": getattr(parsed, "generate", None)}
    return found | {name: number for name, number in numbers.items() if number is not None}


def _add_page(command: argparse.ArgumentParser, path: str, model: str | None) -> None:
    command.add_argument(
        "--model", metavar="MODEL", default=model, help=f"{_MODEL}; default: {DEFAULT_MODEL}"
    )
    command.add_argument(
        "-o",
        "--output",
        metavar="PATH",
        default=path,
        help="path of the page; default: %(default)s",
    )
    command.add_argument("--open", action="store_true", help="open the page in a browser")


def _add_check(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "check",
        help="verify that a model is read correctly",
        description="Recomputes a model's activations from its weights and a few hooks, and prints "
        "the largest errors. Exits with code 1 if an identity does not hold.",
    )
    command.set_defaults(command=_check)
    command.add_argument("model", metavar="MODEL", help=_MODEL)


def _add_mine(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "mine",
        help="find the contexts in a corpus that activate each memory most",
        description="Reads a corpus once and writes the triggers of every feed-forward memory to a "
        "folder. If interrupted, run the same command to resume.",
    )
    command.set_defaults(command=_mine)
    command.add_argument("model", metavar="MODEL", help=_MODEL)
    command.add_argument(
        "corpus",
        metavar="CORPUS",
        help="a text (one document per line), jsonl or parquet file",
    )
    command.add_argument("-o", "--output", metavar="DIR", required=True, help="output folder")
    command.add_argument("-k", type=int, default=25, help="triggers per memory; default: 25")
    command.add_argument("--column", help="column with the texts; default: text")
    command.add_argument("--layer", type=int, nargs="+", help="layers; default: all")
    command.add_argument("--neurons", type=int, nargs="+", help="neurons per layer; default: all")
    command.add_argument("--unit", choices=("prefix", "document"), default="prefix")
    command.add_argument("--tails", choices=("positive", "both", "quadrants"), default="positive")
    command.add_argument(
        "--duplicates",
        choices=("keep", "drop"),
        default="keep",
        help="drop: count repeated contexts once; default: %(default)s",
    )
    command.add_argument("--too-long", choices=("cut", "skip", "error"), default="cut")
    command.add_argument("--malformed", choices=("error", "skip"), default="error")
    command.add_argument("--batch-size", type=int, default=16, metavar="N")
    command.add_argument("--shard-size", type=int, default=256, metavar="N")
    command.add_argument(
        "--rank",
        type=int,
        default=_share(os.environ)[0],
        help="rank of this process; default: from torchrun or SLURM, else 0",
    )
    command.add_argument(
        "--world-size",
        type=int,
        default=_share(os.environ)[1],
        help="number of processes that share the corpus; then run `tl-contextmix merge`",
    )


def _share(environment: Mapping[str, str]) -> tuple[int, int]:
    """Returns rank and world size from the environment of torchrun or SLURM."""
    for rank, size in (
        ("RANK", "WORLD_SIZE"),
        ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"),
        ("SLURM_PROCID", "SLURM_NTASKS"),
    ):
        pair = environment.get(rank, ""), environment.get(size, "")
        if all(one.isdecimal() for one in pair):
            number, count = map(int, pair)
            if rank == "SLURM_ARRAY_TASK_ID":  # --array=1-7:2 has the tasks 1, 3, 5 and 7
                number -= int(environment.get("SLURM_ARRAY_TASK_MIN", 0))
                number //= int(environment.get("SLURM_ARRAY_TASK_STEP", 1))
            return number, count
    return 0, 1


def _add_merge(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "merge",
        help="merge the results of several processes",
        description="Writes the same files, byte for byte, that a single process would write.",
    )
    command.set_defaults(command=_merge)
    command.add_argument("folder", metavar="DIR", help="folder of the result")
    command.add_argument(
        "parts", metavar="PARTS", nargs="*", help="folders that the processes wrote; default: DIR"
    )


def _add_show(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "show",
        help="show mined triggers",
        description="Prints a summary, or with --layer and --neuron that memory's triggers and "
        "promoted tokens.",
    )
    command.set_defaults(command=_show)
    command.add_argument("folder", metavar="DIR", help="folder of the result")
    command.add_argument("--layer", type=int)
    command.add_argument("--neuron", type=int)
    command.add_argument("--tail", help="tail of the coefficients; default: the first mined")
    command.add_argument("--model", metavar="MODEL", help="default: the model that was mined")
    command.add_argument("--corpus", metavar="CORPUS", help="default: the corpus that was mined")
    command.add_argument("--column", help="column of the corpus")
    command.add_argument("-o", "--output", metavar="PATH", help="write a page")


def _run(parsed: argparse.Namespace) -> int:
    known = {name: method for name, method in methods().items() if method.on_text}
    require_choice("METHOD", parsed.method, tuple(known))
    method = getattr(tl_contextmix, parsed.method)  # with its checks of what it is given
    found = method(load_model(parsed.model), parsed.text, **_asked(parsed))
    print(found)
    if parsed.output is not None:
        print(found.show().save(parsed.output))
    return 0


def _mine(parsed: argparse.Namespace) -> int:
    found = mine_triggers(
        load_model(parsed.model),
        parsed.corpus,
        out=parsed.output,
        k=parsed.k,
        column=parsed.column,
        layer=parsed.layer,
        neurons=parsed.neurons,
        unit=parsed.unit,
        tails=parsed.tails,
        duplicates=parsed.duplicates,
        too_long=parsed.too_long,
        malformed=parsed.malformed,
        batch_size=parsed.batch_size,
        shard_size=parsed.shard_size,
        rank=parsed.rank,
        world_size=parsed.world_size,
        source=parsed.model,
    )
    print(found if found is not None else f"part {parsed.rank} of {parsed.world_size} is done")
    return 0


def _merge(parsed: argparse.Namespace) -> int:
    print(load_triggers(merge_triggers(parsed.folder, parts=parsed.parts)))
    return 0


def _show(parsed: argparse.Namespace) -> int:
    bare = load_triggers(parsed.folder)
    if parsed.layer is None and parsed.neuron is None:
        print(bare)
        return 0
    if parsed.layer is None or parsed.neuron is None:
        raise bad(
            "cannot show this memory",
            f"layer {parsed.layer} and neuron {parsed.neuron}",
            "both a layer and a neuron",
            "Pass both --layer and --neuron, or neither for a summary.",
        )
    source = parsed.model or bare.manifest["run"]["source"]["model"]
    if source is None:
        raise bad(
            "cannot show the contexts",
            "triggers that do not record their model's name",
            "the name or folder of the model",
            "Pass --model.",
        )
    found = load_triggers(
        parsed.folder, model=load_model(source), corpus=parsed.corpus, column=parsed.column
    ).examples(parsed.layer, parsed.neuron, tail=parsed.tail)
    print(found)
    if parsed.output is not None:
        print(found.show().save(parsed.output))
    return 0


def _report(parsed: argparse.Namespace) -> int:
    path = write_report(
        parsed.model,
        parsed.text,
        parsed.output,
        sections=parsed.sections,
        triggers=parsed.triggers,
        pairs=parsed.pairs,
        **_asked(parsed),
    )
    return _written(path, parsed.open)


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
    return _written(path, parsed.open)


def _written(path: Path, opened: bool) -> int:
    if opened:
        webbrowser.open(path.resolve().as_uri())
    print(path)
    return 0


def _check(parsed: argparse.Namespace) -> int:
    found = check(load_model(parsed.model))
    print(found)
    return 0 if found.ok else 1


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: object = None,
    line: str | None = None,
) -> None:
    print(f"tl-contextmix: warning: {_one_line(message)}", file=sys.stderr)


def _one_line(message: object) -> str:
    return " ".join(str(message).split())


if __name__ == "__main__":
    sys.exit(main())
