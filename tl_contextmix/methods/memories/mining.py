"""Mining: which contexts excite each memory most, over a corpus of any size."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tl_contextmix.adapters import as_view
from tl_contextmix.adapters.dictionaries import Dictionaries
from tl_contextmix.adapters.dictionary_views import with_dictionaries
from tl_contextmix.adapters.inputs import Labels
from tl_contextmix.core.model_view import StackName
from tl_contextmix.core.validation import (
    FilePath,
    Layers,
    NotNegative,
    NotNegativeNumber,
    Positive,
    checked,
)
from tl_contextmix.engine.registry import method
from tl_contextmix.errors import InvalidInput
from tl_contextmix.methods.memories.corpus_arguments import COUNTS, require_path
from tl_contextmix.methods.memories.corpus_formats import Corpus, open_corpus
from tl_contextmix.methods.memories.miner import Duplicates, Miner, Tails, Unit, make_miner
from tl_contextmix.methods.memories.shards import (
    Cutting,
    Malformed,
    TooLong,
    batches,
    expect,
    progress,
    read_shards,
    warn_of_little,
)
from tl_contextmix.methods.memories.store import (
    FORMAT_VERSION,
    MANIFEST,
    Part,
    alone,
    load_part,
    make_folder,
    part_path,
    read_manifest,
    save_part,
    write_result,
)
from tl_contextmix.methods.memories.topk import TopK
from tl_contextmix.methods.memories.triggers import Triggers, load_triggers


@method(cites=("geva2021transformer",), on_text=False)
def mine_triggers(
    model: object,
    corpus: object,
    *,
    out: FilePath,
    k: Positive = 25,
    column: str | None = None,
    layer: Layers | None = None,
    neurons: int | Sequence[int] | None = None,
    dictionary: Dictionaries = None,
    stack: StackName | None = None,
    unit: Unit = "prefix",
    tails: Tails = "positive",
    duplicates: Duplicates = "keep",
    special: bool = False,
    prepend_bos: bool | None = None,
    too_long: TooLong = "cut",
    malformed: Malformed = "error",
    batch_size: Positive = 16,
    shard_size: Positive = 256,
    checkpoint_seconds: NotNegativeNumber = 60.0,
    rank: NotNegative = 0,
    world_size: Positive = 1,
    source: str | None = None,
    labels: Labels | None = None,
) -> Triggers | None:
    r"""Finds the contexts that excite each memory most: the trigger examples of every key.

    For each memory the ``k`` prefixes :math:`x_1 \dots x_j` of the corpus with the highest
    coefficient :math:`m_i` (Geva, Schuster, Berant, Levy 2021, EMNLP, section 3), exactly: one
    forward pass over the corpus, the current top ``k`` in memory and nothing else. Ties go to the
    lower document, then the lower position. Only positive coefficients count, so that a memory may
    have fewer than ``k`` triggers.

    The result is a folder: ``triggers.parquet`` (pointers and values, no contexts; a row group per
    layer) and ``manifest.json``. It depends on model, corpus and options only: not on restarts, nor
    on the number of processes; the bytes are the same on the same kind of machine with the same
    number of threads. Another ``batch_size`` or ``shard_size`` changes shapes of matrix products
    and with them values at rounding level.

    A run that was stopped at any moment goes on from its last checkpoint when it is called again
    with the same arguments; documents read before are read again and held against their hashes.

    Args:
        model: Any TransformerLens model, see `tl_contextmix.check`; without a tokenizer, documents
            are token ids.
        corpus: Path of a text file (a document per line), jsonl or parquet file; a Hugging Face
            dataset, map-style or streaming, or a column of one; a pandas or Arrow table; an
            iterable. Documents are texts, or lists of token ids, which are mined exactly as they
            are, without the tokenizer's padding at their ends (as in ids given to any method).
            Blank documents are skipped, and they and the padding counted.
        out: The folder; made if it is not there.
        k: How many triggers of each memory.
        column: Column of the documents in a jsonl or parquet file, dataset or table; None:
            ``"text"``.
        layer: Layer or layers; None for all.
        neurons: Neuron or neurons of each of these layers; None for all.
        dictionary: A `Dictionary`, or several, whose features are mined in the place of neurons;
            ``layer=None`` is then where they stand. `load_triggers` takes them again.
        stack: Stack; an encoder-decoder's encoder is mined, its decoder reads no corpus.
        unit: ``"prefix"``: every position can be a trigger. ``"document"``: only the best of each
            document.
        tails: ``"positive"`` coefficients; ``"both"``: the most negative ones, too;
            ``"quadrants"``: the largest for each sign of a gated neuron's gate and linear branch.
        duplicates: ``"keep"``: as in the paper every prefix counts, so that one that is frequent
            can fill the list. ``"drop"``: the same context (tokens up to the trigger; the whole
            document where the model reads both ways) counts once, where its coefficient is
            highest. Contexts are compared by 64-bit hashes of their tokens.
        special: Whether positions of special tokens (beginning-of-sequence, [CLS], [SEP], turns of
            a chat) count, wherever they stand. Those skipped are counted in the manifest.
        prepend_bos: Whether documents get a beginning-of-sequence token; None: model's default.
        too_long: Documents longer than the model's context are ``"cut"``, skipped (``"skip"``) or
            an ``"error"``; the manifest counts them and the tokens cut off.
        malformed: Documents that cannot be read are an ``"error"`` or skipped (``"skip"``) and
            counted. A run that such an error stopped, or one of ``too_long``, goes on with another
            choice.
        batch_size: Documents in a batch.
        shard_size: Documents in a shard; documents of like length within a shard share batches.
        checkpoint_seconds: How often progress is written down; at most that much work is lost.
        rank: Number of this process; it takes every ``world_size``-th shard.
        world_size: How many processes share the corpus; `merge_triggers` puts their parts together.
        source: What `load_model` makes the same model from, for the command line to show contexts.
        labels: Names of the token ids, for what the result shows; see `Inputs`.

    Returns:
        `Triggers`; None where there are other processes.

    Raises:
        InvalidInput: If an argument does not fit the model, a document cannot be used, the folder
            holds a run with another model, tokenizer, corpus or other options, another process is
            at it, or a file cannot be written.
        UnsupportedModel: If the model is one whose numbers would be wrong.

    Warns:
        ContextMixWarning: If that many triggers take more than 4 GiB, no position counted, or more
            tokens were cut off than read.

    Cost: one forward pass over the corpus and a comparison per coefficient; an entry of a memory is
    replaced about ``k ln(N / k)`` times over ``N`` positions. Memory: coefficients of one batch and
    ``28 k`` bytes per memory (36 without duplicates).
    """
    view = with_dictionaries(as_view(model), dictionary)
    how = Cutting(shard_size, batch_size, too_long, malformed, prepend_bos, special)
    miner = make_miner(view, how, k, layer, neurons, stack, unit, tails, duplicates)
    require_rank(rank, world_size)
    opened, folder = open_corpus(corpus, column), make_folder(out)
    load = partial(load_triggers, folder, model=model, dictionary=dictionary, labels=labels)
    run = miner.describe(opened, source)
    if not (folder / MANIFEST).exists():
        path = part_path(folder, rank, world_size)
        with alone(path.with_name(f".{path.stem}.lock")):
            # Another process may have been at it until now.
            if not (folder / MANIFEST).exists():
                part = run_part(miner, opened, folder, run, rank, world_size, checkpoint_seconds)
                if world_size > 1:
                    return None
                finish([part], folder)
                path.unlink(missing_ok=True)
                return load(corpus=opened)
    _require_finished(folder, run, opened, world_size)
    return load(corpus=opened)


def run_part(
    miner: Miner,
    corpus: Corpus,
    folder: Path,
    run: dict[str, Any],
    rank: int,
    world_size: int,
    checkpoint_seconds: float,
) -> Part:
    """Mines the shards of one process, from its last checkpoint on; returns its part."""
    part = _resumed(folder, miner, run, rank, world_size)
    before, last = len(part.digests), time.monotonic()
    seen, read, size = 0, 0, corpus.size()
    with torch.no_grad(), progress("mining", part.counts["tokens"]) as bar:
        for shard in read_shards(corpus, miner.how.shard_size):
            seen, read = shard.index + 1, read + shard.size
            if shard.index % world_size != rank:
                continue
            own = shard.index // world_size
            digest = shard.digest()
            if own < before:
                if bytes(part.digests[own].tolist()) != digest:
                    end = shard.first + len(shard.documents) - 1
                    where = f"among those from {shard.first} to {end}"
                    raise changed(corpus, f"other documents {where}")
                continue
            if part.done:
                raise changed(corpus, f"{seen} shards where there were {part.shards}")
            for documents in batches(miner.view, shard, miner.how, corpus.name, part.counts):
                miner.take(part.tops, documents)
                bar.update(int(documents.batch.main.mask.sum()))
            expect(bar, read, size)
            part.take(digest)
            if time.monotonic() - last >= checkpoint_seconds:
                save_part(part, folder)
                last = time.monotonic()
    expected = len(range(rank, seen, world_size))
    if len(part.digests) != expected or (part.done and part.shards != seen):
        raise changed(corpus, f"{seen} shards where there were {len(part.digests)}")
    if not part.done:
        part.done, part.shards = True, seen
        save_part(part, folder)
    return part


def _resumed(folder: Path, miner: Miner, run: dict[str, Any], rank: int, world_size: int) -> Part:
    path = part_path(folder, rank, world_size)
    if path.is_file():
        part = load_part(path, miner.view.device)
        require_run(as_far_as(part.run, run), run, folder)
        if part.run["options"] != run["options"]:
            part.run = run
            save_part(part, folder)
        return part
    strange = [
        other
        for other in folder.glob("part-*.safetensors")
        if not other.name.endswith(f"-of-{world_size:05d}.safetensors")
    ]
    if strange:
        raise InvalidInput(
            f"{folder} holds parts of another division of the corpus",
            strange[0].name,
            f"parts of {world_size} processes",
            "Go on with as many processes as before, or choose another folder.",
        )
    digests = torch.zeros(0, 32, dtype=torch.uint8)
    return Part(run, rank, world_size, miner.zero(), digests)


def _require_finished(folder: Path, run: dict[str, Any], corpus: Corpus, world_size: int) -> None:
    """Raises InvalidInput unless a finished run is this one, of this corpus."""
    manifest = read_manifest(folder)
    require_run(manifest["run"], run, folder)
    whole, count = hashlib.sha256(), 0
    for shard in read_shards(corpus, run["options"]["shard_size"]):
        whole.update(shard.digest())
        count += 1
    if {"digest": whole.hexdigest(), "shards": count} != manifest["corpus"]:
        raise changed(corpus, f"{count} shards with another hash")
    if world_size == 1:
        with suppress(OSError):  # a result that may only be read
            part_path(folder, 0, 1).unlink(missing_ok=True)


@checked
def merge_triggers(out: FilePath, *, parts: Sequence[FilePath] = ()) -> Path:
    """Puts together what several processes have mined; returns the folder.

    The files are those that one process alone would have written, byte by byte.

    Args:
        out: Folder of the result, and of the parts unless other folders are named.
        parts: Folders of the parts.

    Raises:
        InvalidInput: If parts are missing, unfinished, or of different runs, or the folder holds
            the result of another run.
        FileFormatError: If a file is no part.

    Warns:
        ContextMixWarning: If no position counted, or more tokens were cut off than read.
    """
    listed = [parts] if isinstance(parts, (str, Path)) else parts
    places = [require_path(part) for part in listed] or [require_path(out)]
    files = sorted(path for place in places for path in place.glob("part-*.safetensors"))
    device = torch.device("cpu")
    # Each is read twice, and its triggers are held only while they are merged.
    heads = [(replace(load_part(path, device), tops={}), path) for path in files]
    heads.sort(key=lambda pair: pair[0].rank)
    found = [head for head, _ in heads]
    _require_whole(found, places)
    folder = make_folder(out)
    with alone(folder / ".merge.lock"):
        if (folder / MANIFEST).exists():
            require_run(read_manifest(folder)["run"], found[0].run, folder)
        finish((load_part(path, device) for _, path in heads), folder)
    return folder


def finish(parts: Iterable[Part], folder: Path) -> None:
    """Writes the result of the parts of all processes, given by rank; two are held at a time."""
    tops: dict[tuple[int, str], TopK] = {}
    run, shards, counts, digests = dict[str, Any](), 0, Counter[str](), list[Tensor]()
    for part in parts:
        tops = {key: tops[key].merge(top) if tops else top for key, top in part.tops.items()}
        run, shards = part.run, part.shards
        counts = counts + part.counts
        digests.append(part.digests)
        del part  # before the next one is read
    whole = hashlib.sha256()
    for index in range(shards):
        whole.update(bytes(digests[index % len(digests)][index // len(digests)].tolist()))
    manifest = {
        "format": FORMAT_VERSION,
        "run": run,
        "neurons": run["options"]["neurons"],
        "corpus": {"digest": whole.hexdigest(), "shards": shards},
        "counts": {name: counts[name] for name in COUNTS},
    }
    write_result(folder, tops, manifest)
    warn_of_little(manifest["counts"])


def _require_whole(parts: list[Part], places: list[Path]) -> None:
    """Raises InvalidInput unless the parts of all processes are there and finished."""
    named = ", ".join(map(str, places))
    if not parts:
        raise cannot_merge("no part", f"parts of a run in {named}")
    size = parts[0].world_size
    ranks = sorted(part.rank for part in parts)
    if ranks != list(range(size)):
        raise cannot_merge(f"the parts of processes {ranks}", f"one of each of {size}")
    for part in parts:
        require_run(parts[0].run, part.run, places[0])
        if not part.done or part.shards != parts[0].shards:
            raise cannot_merge(f"an unfinished part of process {part.rank}", "finished parts")


def cannot_merge(seen: str, expected: str) -> InvalidInput:
    """Returns the error for parts that are no whole."""
    remedy = "Run the processes that are missing or were stopped again: they go on."
    return InvalidInput("the parts cannot be merged", seen, expected, remedy)


def require_rank(rank: int, world_size: int) -> None:
    """Raises InvalidInput unless there is such a process."""
    if rank >= world_size:
        raise InvalidInput(
            "there is no such process",
            f"rank={rank} of world_size={world_size}",
            "0 <= rank < world_size",
            "Number the processes from 0.",
        )


def require_run(before: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    """Raises InvalidInput, naming the first difference, unless two runs are the same."""
    # Files may have been renamed by now; their contents are compared by hashes.
    for name in [name for name in now if name != "source"]:
        old, new = before.get(name), now[name]
        if isinstance(new, dict) and isinstance(old, dict):
            changed = [key for key in new if old.get(key) != new[key]]
            if changed:
                name, old, new = f"{name}: {changed[0]}", old.get(changed[0]), new[changed[0]]
        if old != new:
            raise InvalidInput(
                f"{folder} holds a run that differs in {name}",
                repr(new)[:200],
                repr(old)[:200],
                "Pass the same again, or choose another folder.",
            )


def as_far_as(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Returns a run that was stopped, with what has made no difference to it yet as it is now.

    Where documents of some kind are an error, none has been met so far: whoever was stopped by the
    first one may leave such documents out and go on.
    """
    options = dict(before["options"])
    for name in ("malformed", "too_long", "unusable"):
        if options.get(name) == "error":
            options[name] = now["options"][name]
    return {**before, "options": options}


def changed(corpus: Corpus, seen: str) -> InvalidInput:
    """Returns the error for a corpus that is another one than before."""
    return InvalidInput(
        f"the corpus {corpus.name} is not the one that was mined before",
        seen,
        "the same documents",
        "Pass the corpus that was mined, or choose another folder.",
    )
