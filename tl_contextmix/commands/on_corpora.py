"""Commands on corpora and data sets: scan; mine, merge and show."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping

from tl_contextmix.adapters.loading import load_model
from tl_contextmix.commands.shared_options import MODEL
from tl_contextmix.errors import bad
from tl_contextmix.evaluation.prompt_rows import NAMES
from tl_contextmix.evaluation.scan import scan
from tl_contextmix.methods.memories import load_triggers, merge_triggers, mine_triggers
from tl_contextmix.results.scanned import LEVELS


def add(commands: argparse._SubParsersAction) -> None:
    """Adds the commands to a parser."""
    for one in (_add_scan, _add_mine, _add_merge, _add_show):
        one(commands)


def _add_scan(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "scan",
        help="find the layers, heads and neurons that answer many prompts",
        description="Explains every row of a file and prints which components raise the answers "
        "most, on average and by category. If interrupted, run the same command to resume.",
    )
    command.set_defaults(command=_scan, resumes=True)
    command.add_argument("model", metavar="MODEL", help=MODEL)
    command.add_argument(
        "rows",
        metavar="FILE",
        help="a CSV, TSV, jsonl, JSON or parquet file with the columns prompt, target, foil and "
        "category, or in the format of BLiMP, CounterFact, known_1000 or IOI",
    )
    command.add_argument("-o", "--output", metavar="PATH", help="file for the result")
    command.add_argument("--by", nargs="+", choices=LEVELS, default=["layer", "head"])
    command.add_argument(
        "--columns",
        nargs="+",
        metavar="NAME=COLUMN",
        default=[],
        help=f"names of the columns in this file, for some of {', '.join(NAMES)}",
    )
    command.add_argument(
        "--drop-unusable",
        action="store_const",
        const="drop",
        default="error",
        dest="unusable",
        help="skip, and count, rows that the model cannot be asked",
    )
    command.add_argument("--batch-size", type=int, default=16, metavar="N")
    command.add_argument("--page", metavar="PATH", help="write a page")


def _scan(parsed: argparse.Namespace) -> int:
    found = scan(
        load_model(parsed.model),
        parsed.rows,
        by=parsed.by,
        columns=dict(_pair(one) for one in parsed.columns),
        unusable=parsed.unusable,
        out=parsed.output,
        batch_size=parsed.batch_size,
    )
    print(found)
    print(found.sentence())
    if parsed.page is not None:
        print(found.show().save(parsed.page))
    return 0


def _pair(given: str) -> tuple[str, str]:
    name, equals, column = given.partition("=")
    if not equals:
        raise bad("this names no column", repr(given), "NAME=COLUMN", "Write prompt=question.")
    return name, column


def _add_mine(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "mine",
        help="find the contexts in a corpus that activate each memory most",
        description="Reads a corpus once and writes the triggers of every feed-forward memory to a "
        "folder. If interrupted, run the same command to resume.",
    )
    command.set_defaults(command=_mine, resumes=True)
    command.add_argument("model", metavar="MODEL", help=MODEL)
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
