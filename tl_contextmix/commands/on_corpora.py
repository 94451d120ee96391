"""Commands on corpora and data sets: scan; mine, merge and show."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import click

from tl_contextmix.adapters.loading import load_model
from tl_contextmix.commands.output_options import add_output, require_written, wanted
from tl_contextmix.commands.shared_options import (
    Resumable,
    add_model,
    flat,
    load_options,
    model_argument,
    several,
)
from tl_contextmix.errors import InvalidInput
from tl_contextmix.evaluation.prompt_rows import NAMES
from tl_contextmix.evaluation.scan import scan as scanning
from tl_contextmix.methods.memories import Triggers, load_triggers, merge_triggers, mine_triggers
from tl_contextmix.results.scanned import LEVELS


@click.command(
    cls=Resumable,
    epilog="\b\nExample:\n  tl-contextmix scan gpt2 rows.csv --by layer,head --page rows.html",
)
@add_model()
@click.argument("rows", metavar="FILE")
@click.option("-o", "--output", metavar="PATH", help="File for the result; it can be resumed.")
@add_output(written=None)
@several(
    "--by",
    kind=click.Choice(LEVELS),
    default=[["layer", "head"]],
    help=f"Of {', '.join(LEVELS)}. Default: layer,head.",
)
@several(
    "--columns",
    help=f"NAME=COLUMN,...: names of the columns in this file, for some of {', '.join(NAMES)}.",
)
@click.option("--drop-unusable", is_flag=True, help="Skip, and count, rows that cannot be asked.")
@click.option("--batch-size", type=int, default=16, metavar="N", show_default=True)
@click.option("--page", metavar="PATH", help="Write a page.")
def scan(model: str, rows: str, page: str | None, **given: Any) -> None:
    """Finds the layers, heads and neurons that answer many prompts.

    Explains every row of FILE (CSV, TSV, jsonl, JSON or parquet, with the columns prompt, target,
    foil and category, or in the format of BLiMP, CounterFact, known_1000 or IOI), and prints which
    components raise the answers most, on average and by category. If interrupted, run the same
    command to resume.
    """
    want = wanted(given, endings=())
    if page is not None:
        require_written(page, (".html",), "--page")
    found = scanning(
        load_model(model, **load_options(given)),
        rows,
        by=flat(given["by"]) or [],
        columns=dict(_pair(one) for one in flat(given["columns"]) or ()),
        unusable="drop" if given["drop_unusable"] else "error",
        out=want.output,
        batch_size=given["batch_size"],
    )
    want.emit(found, found, found.sentence())
    if page is not None:
        want.wrote(found.show().save(page))


def _pair(given: str) -> tuple[str, str]:
    name, equals, column = given.partition("=")
    if not equals:
        raise InvalidInput(
            "this names no column", repr(given), "NAME=COLUMN", "Write prompt=question."
        )
    return name, column


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


@click.command(
    cls=Resumable, epilog="\b\nExample:\n  tl-contextmix mine gpt2 corpus.jsonl -o mined -k 25"
)
@add_model()
@click.argument("corpus", metavar="CORPUS")
@click.option("-o", "--output", metavar="DIR", required=True, help="Output folder.")
@add_output(csv=False, written=None)
@click.option("-k", type=int, default=25, show_default=True, help="Triggers per memory.")
@click.option("--column", help="Column with the texts.  [default: text]")
@several("--layer", kind=click.INT, help="Default: all.")
@several("--neurons", kind=click.INT, help="Neurons of each layer. Default: all.")
@click.option("--unit", type=click.Choice(("prefix", "document")), default="prefix")
@click.option("--tails", type=click.Choice(("positive", "both", "quadrants")), default="positive")
@click.option(
    "--duplicates",
    type=click.Choice(("keep", "drop")),
    default="keep",
    show_default=True,
    help="drop: count repeated contexts once.",
)
@click.option("--too-long", type=click.Choice(("cut", "skip", "error")), default="cut")
@click.option("--malformed", type=click.Choice(("error", "skip")), default="error")
@click.option("--batch-size", type=int, default=16, metavar="N", show_default=True)
@click.option("--shard-size", type=int, default=256, metavar="N", show_default=True)
@click.option(
    "--rank",
    type=int,
    default=lambda: _share(os.environ)[0],
    help="Rank of this process. Default: from torchrun or SLURM, else 0.",
)
@click.option(
    "--world-size",
    type=int,
    default=lambda: _share(os.environ)[1],
    help="Number of processes that share the corpus; then run `tl-contextmix merge`.",
)
def mine(model: str, corpus: str, **given: Any) -> None:
    """Finds the contexts in a corpus that activate each memory most.

    Reads CORPUS (text, one document per line; jsonl or parquet) once and writes the triggers of
    every feed-forward memory to a folder. If interrupted, run the same command to resume.
    """
    want = wanted(given, endings=())
    loaded = load_model(model, **load_options(given))
    given |= {name: flat(given[name]) for name in ("layer", "neurons")}
    found = mine_triggers(loaded, corpus, out=str(want.output), source=model, **given)
    part = {"part": given["rank"], "of": given["world_size"]}
    part_done = f"part {given['rank']} of {given['world_size']} is done"
    want.emit(found, found or part_done, facts=part if found is None else _mined(found))


@click.command(epilog="\b\nExample:\n  tl-contextmix merge mined")
@click.argument("folder", metavar="DIR")
@click.argument("parts", metavar="[PARTS]...", nargs=-1)
@add_output(csv=False, written=None)
def merge(folder: str, parts: tuple[str, ...], **given: Any) -> None:
    """Merges the results of several processes in DIR.

    Writes the same files, byte for byte, that a single process would write. PARTS are the folders
    that the processes wrote; by default they are in DIR.
    """
    want = wanted(given, endings=())
    found = load_triggers(merge_triggers(folder, parts=list(parts)))
    want.emit(found, facts=_mined(found))


def _mined(found: Triggers) -> dict[str, Any]:
    """Returns what a folder of triggers holds."""
    manifest = {name: found.manifest[name] for name in ("run", "counts")}
    return {"folder": str(found.folder), **manifest}


@click.command(epilog="\b\nExample:\n  tl-contextmix show mined --layer 3 --neuron 17")
@click.argument("folder", metavar="DIR")
@model_argument(required=False)
@click.option("--layer", type=int)
@click.option("--neuron", type=int)
@click.option("--tail", help="Tail of the coefficients. Default: the first mined.")
@click.option("--corpus", metavar="CORPUS", help="Default: the corpus that was mined.")
@click.option("--column", help="Column of the corpus.")
@add_output()
def show(folder: str, model: str | None, **given: Any) -> None:
    """Shows mined triggers.

    Prints a summary, as CSV a row for every trigger; with --layer and --neuron that memory's
    triggers and promoted tokens. MODEL is by default the one that was mined.
    """
    one = given["layer"] is not None or given["neuron"] is not None
    want = wanted(given) if one else wanted(given, endings=(".csv",))
    layer, neuron = given["layer"], given["neuron"]
    bare = load_triggers(folder)
    if not one:
        want.emit(bare, facts=_mined(bare))
        want.write(bare)
        return
    if layer is None or neuron is None:
        raise InvalidInput(
            "cannot show this memory",
            f"layer {layer} and neuron {neuron}",
            "both a layer and a neuron",
            "Pass both --layer and --neuron, or neither for a summary.",
        )
    loaded = load_model(_source(model, bare))
    mined = load_triggers(folder, model=loaded, corpus=given["corpus"], column=given["column"])
    found = mined.examples(layer, neuron, tail=given["tail"])
    want.emit(found)
    want.write(found)


def _source(model: str | None, bare: Any) -> str:
    source = model or bare.manifest["run"]["source"]["model"]
    if source is None:
        raise InvalidInput(
            "cannot show the contexts",
            "triggers that do not record their model's name",
            "the name or folder of the model",
            "Pass MODEL after DIR.",
        )
    return source
