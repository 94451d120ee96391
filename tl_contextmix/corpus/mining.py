"""Mining: which contexts excite each memory most, over a corpus of any size."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from tl_contextmix.corpus.reading import Corpus, open_corpus
from tl_contextmix.corpus.shards import (
    COUNTS,
    Cutting,
    Documents,
    Malformed,
    Shard,
    TooLong,
    batches,
    read_shards,
)
from tl_contextmix.corpus.store import (
    FORMAT_VERSION,
    MANIFEST,
    Part,
    load_part,
    part_path,
    read_manifest,
    save_part,
    write_result,
)
from tl_contextmix.corpus.topk import TopK, pack_places, pack_tokens
from tl_contextmix.corpus.triggers import Triggers, load_triggers
from tl_contextmix.errors import InvalidInput, four_parts
from tl_contextmix.hosts import as_view
from tl_contextmix.inputs import package_version, select_blocks
from tl_contextmix.memories import (
    QUADRANTS,
    branch_names,
    coefficients,
    quadrants,
    require_feed_forward,
)
from tl_contextmix.model_view import Block, ModelView, StackName, Trace
from tl_contextmix.results.axes import positions, require_choice, require_count

Unit = Literal["prefix", "document"]
Tails = Literal["positive", "both", "quadrants"]
_TAILS: dict[str, tuple[str, ...]] = {
    "positive": ("positive",),
    "both": ("positive", "negative"),
    "quadrants": QUADRANTS,
}


@dataclass(frozen=True)
class Miner:
    """Which memories of which model are mined, and how.

    Attributes:
        view: The model.
        blocks: The layers.
        neurons: Neurons of each layer; None for all.
        stack: The stack.
        k: How many triggers of each memory.
        unit: Whether every prefix can be a trigger, or the best one of each document.
        tails: What is looked for.
        how: How the corpus is cut up.
    """

    view: ModelView
    blocks: tuple[Block, ...]
    neurons: tuple[int, ...] | None
    stack: str
    k: int
    unit: Unit
    tails: Tails
    how: Cutting

    def chosen(self, block: Block) -> list[int]:
        """Returns the neurons of a layer that are mined."""
        return positions("neuron", self.neurons, (), require_feed_forward(block).W_out.shape[0])

    def zero(self) -> dict[tuple[int, str], TopK]:
        """Returns the state before the first document."""
        return {
            (block.layer, tail): TopK.zero(
                len(self.chosen(block)), self.k, self.view.dtype, self.view.device
            )
            for block in self.blocks
            for tail in _TAILS[self.tails]
        }

    def take(self, tops: dict[tuple[int, str], TopK], documents: Documents) -> None:
        """Runs the model on a batch and takes in what it shows."""
        names = [name for block in self.blocks for name in self._names(block)]
        trace = self.view.run(documents.batch, list(dict.fromkeys(names)))
        device = self.view.device
        counted, ids = documents.counted.to(device), documents.batch.side(self.stack).ids.to(device)
        places = pack_places(documents.numbers.to(device), ids.shape[1])
        tokens = pack_tokens(ids, documents.next_ids.to(device))
        for block in self.blocks:
            scores = self._scores(block, trace, counted)
            for tail, values in scores:
                update = self._best if self.unit == "document" else self._every
                update(tops[block.layer, tail], values, counted, places, tokens)

    def _names(self, block: Block) -> tuple[str, ...]:
        ff = require_feed_forward(block)
        return branch_names(ff) if self.tails == "quadrants" else (ff.post,)

    def _scores(self, block: Block, trace: Trace, counted: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yields each tail with its values: positive where there is something to be found."""
        ff = require_feed_forward(block)
        found = coefficients(ff, trace)
        # A sum is finite where every number is; not worth a mask unless it is not.
        if not bool(found.sum().isfinite()) and not bool(found[counted].isfinite().all()):
            raise _not_finite(block.layer)
        some = None
        if self.neurons is not None:
            some = torch.tensor(self.chosen(block), device=found.device)
            found = found[..., some]
        if self.tails == "quadrants":
            places = quadrants(ff, trace)
            places = places if some is None else places[..., some]
            for index, tail in enumerate(QUADRANTS):
                yield tail, found.abs().masked_fill(places != index, 0)
            return
        yield "positive", found
        if self.tails == "both":
            yield "negative", -found

    @staticmethod
    def _every(top: TopK, values: Tensor, counted: Tensor, places: Tensor, tokens: Tensor) -> None:
        flat, named = places.flatten(), tokens.flatten()
        top.update(
            values.flatten(0, 1), counted.flatten(), lambda rows, *_: (flat[rows], named[rows])
        )

    @staticmethod
    def _best(top: TopK, values: Tensor, counted: Tensor, places: Tensor, tokens: Tensor) -> None:
        masked = values.masked_fill(~counted[..., None], -torch.inf)
        steps = torch.arange(values.shape[1], device=values.device)

        def locate(rows: Tensor, columns: Tensor, best: Tensor) -> tuple[Tensor, Tensor]:
            # The first of the document's positions that have its highest value.
            there = masked[rows, :, columns] == best[:, None]
            pos = torch.where(there, steps, len(steps)).amin(dim=1)
            return places[rows, pos], tokens[rows, pos]

        top.update(masked.amax(dim=1), counted.any(dim=1), locate)


def mine_triggers(
    model: object,
    corpus: object,
    *,
    out: str | Path,
    k: int = 25,
    column: str | None = None,
    layer: int | Sequence[int] | None = None,
    neurons: int | Sequence[int] | None = None,
    stack: StackName | None = None,
    unit: Unit = "prefix",
    tails: Tails = "positive",
    special: bool = False,
    prepend_bos: bool | None = None,
    too_long: TooLong = "cut",
    malformed: Malformed = "error",
    batch_size: int = 16,
    shard_size: int = 256,
    checkpoint_seconds: float = 60.0,
    rank: int = 0,
    world_size: int = 1,
    source: str | None = None,
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
        model: Any TransformerLens model with a tokenizer, see `tl_contextmix.check`.
        corpus: Path of a text file (a document per line), jsonl or parquet file; a Hugging Face
            dataset, map-style or streaming; an iterable of texts. Blank documents are skipped and
            counted.
        out: The folder; made if it is not there.
        k: How many triggers of each memory.
        column: Column of the texts in a jsonl file, parquet file or dataset; None: ``"text"``.
        layer: Layer or layers; None for all.
        neurons: Neuron or neurons of each of these layers; None for all.
        stack: Stack; an encoder-decoder's encoder is mined, its decoder reads no corpus.
        unit: ``"prefix"``: every position can be a trigger. ``"document"``: only the best of each
            document.
        tails: ``"positive"`` coefficients; ``"both"``: the most negative ones, too;
            ``"quadrants"``: the largest for each sign of a gated neuron's gate and linear branch.
        special: Whether positions of tokens that frame a text (beginning-of-sequence, [CLS],
            [SEP]) count.
        prepend_bos: Whether documents get a beginning-of-sequence token; None: model's default.
        too_long: Documents longer than the model's context are ``"cut"``, left out (``"skip"``) or
            an ``"error"``; the manifest counts them and the tokens cut off.
        malformed: Documents that cannot be read are an ``"error"`` or left out and counted.
        batch_size: Documents in a batch.
        shard_size: Documents in a shard; documents of like length within a shard share batches.
        checkpoint_seconds: How often progress is written down; at most that much work is lost.
        rank: Number of this process; it takes every ``world_size``-th shard.
        world_size: How many processes share the corpus; `merge_triggers` puts their parts together.
        source: What `load_model` makes the same model from, for the command line to show contexts.

    Returns:
        `Triggers`; None where there are other processes.

    Raises:
        InvalidInput: If an argument does not fit the model, a document cannot be used, the folder
            holds a run with another model, tokenizer, corpus or other options, or a file cannot be
            written.
        UnsupportedModel: If the model is one whose numbers would be wrong.

    Cost: one forward pass over the corpus and a comparison per coefficient; an entry of a memory is
    replaced about ``k ln(N / k)`` times over ``N`` positions. Memory: coefficients of one batch and
    ``20 k`` bytes per memory.
    """
    view = as_view(model)
    how = _cutting(batch_size, shard_size, too_long, malformed, prepend_bos, special)
    miner = _miner(view, how, k, layer, neurons, stack, unit, tails)
    rank, world_size = _require_rank(rank, world_size)
    opened, folder = open_corpus(corpus, column), _folder(out)
    run = describe_run(miner, opened, source)
    if (folder / MANIFEST).exists():
        return _already(folder, run, opened, model, world_size)
    part = run_part(miner, opened, folder, run, rank, world_size, checkpoint_seconds)
    if world_size > 1:
        return None
    finish([part], folder)
    part_path(folder, rank, world_size).unlink(missing_ok=True)
    return load_triggers(folder, model=model, corpus=opened)


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
    seen = 0
    bar = tqdm(unit="token", unit_scale=True, delay=2, leave=False, disable=None, desc="mining")
    with torch.no_grad(), bar:
        for shard in read_shards(corpus, miner.how.shard_size):
            seen = shard.index + 1
            if shard.index % world_size != rank:
                continue
            own = shard.index // world_size
            digest = shard.digest()
            if own < before:
                _require_same(part, own, digest, shard, corpus)
                continue
            if part.done:
                raise _changed(corpus, f"{seen} shards where there were {part.shards}")
            _mine_shard(miner, part, shard, corpus, bar.update)
            part.take(digest)
            if time.monotonic() - last >= checkpoint_seconds:
                save_part(part, folder)
                last = time.monotonic()
    expected = len(range(rank, seen, world_size))
    if len(part.digests) != expected or (part.done and part.shards != seen):
        raise _changed(corpus, f"{seen} shards where there were {len(part.digests)}")
    if not part.done:
        part.done, part.shards = True, seen
        save_part(part, folder)
    return part


def _mine_shard(
    miner: Miner, part: Part, shard: Shard, corpus: Corpus, progress: Callable[[int], object]
) -> None:
    counts = part.counts
    for documents in batches(miner.view, shard, miner.how, corpus.name, counts):
        miner.take(part.tops, documents)
        progress(int(documents.batch.main.mask.sum()))


def merge_triggers(out: str | Path, *, parts: Sequence[str | Path] = ()) -> Path:
    """Puts together what several processes have mined; returns the folder.

    The files are those that one process alone would have written, byte by byte.

    Args:
        out: Folder of the result, and of the parts unless other folders are named.
        parts: Folders of the parts.

    Raises:
        InvalidInput: If parts are missing, unfinished, or of different runs.
        FileFormatError: If a file is no part.
    """
    folder = _folder(out)
    places = [Path(part) for part in parts] or [folder]
    files = sorted(path for place in places for path in place.glob("part-*.safetensors"))
    found = [load_part(path, torch.device("cpu")) for path in files]
    _require_whole(found, places)
    finish(found, folder)
    return folder


def finish(parts: list[Part], folder: Path) -> None:
    """Writes the result of the parts of all processes."""
    parts = sorted(parts, key=lambda part: part.rank)
    tops = dict(parts[0].tops)
    for part in parts[1:]:
        tops = {key: top.merge(part.tops[key]) for key, top in tops.items()}
    counts = sum((part.counts for part in parts), start=type(parts[0].counts)())
    whole = hashlib.sha256()
    for index in range(parts[0].shards):
        whole.update(bytes(parts[index % len(parts)].digests[index // len(parts)].tolist()))
    run = parts[0].run
    manifest = {
        "format": FORMAT_VERSION,
        "run": run,
        "neurons": run["options"]["neurons"],
        "corpus": {"digest": whole.hexdigest(), "shards": parts[0].shards},
        "counts": {name: counts[name] for name in COUNTS},
    }
    write_result(folder, tops, manifest)


def describe_run(miner: Miner, corpus: Corpus, source: str | None = None) -> dict[str, Any]:
    """Returns what the result depends on, besides the documents: plain JSON."""
    view = miner.view
    return {
        "model": view.name,
        "weights": view.fingerprint,
        "processing": list(view.processing),
        "host": view.host,
        "TransformerLens": view.host_version,
        "tl_contextmix": package_version(),
        "torch": torch.__version__,
        "dtype": str(view.dtype),
        "hooks": list(view.hooked()),
        "tokenizer": _tokenizer_hash(view, miner.how.prepend_bos),
        "corpus": {"kind": corpus.kind, "column": corpus.column},
        "source": {"model": source, "corpus": corpus.name},
        "options": {
            "k": miner.k,
            "layers": [block.layer for block in miner.blocks],
            "neurons": {str(block.layer): miner.chosen(block) for block in miner.blocks},
            "stack": miner.stack,
            "unit": miner.unit,
            "tails": miner.tails,
            **asdict(miner.how),
        },
    }


def _tokenizer_hash(view: ModelView, prepend_bos: bool | None) -> str:
    """Returns a hash of the vocabulary, and of what becomes of a text."""
    found = hashlib.sha256()
    for token in range(view.d_vocab):
        found.update(view.to_string(token).encode("utf-8", "surrogatepass") + b"\0")
    found.update(repr(view.encode("The cat sat, didn't it? 3.14", prepend_bos)).encode())
    return found.hexdigest()


def _resumed(folder: Path, miner: Miner, run: dict[str, Any], rank: int, world_size: int) -> Part:
    path = part_path(folder, rank, world_size)
    if path.is_file():
        part = load_part(path, miner.view.device)
        _require_run(part.run, run, folder)
        return part
    strange = [
        other
        for other in folder.glob("part-*.safetensors")
        if not other.name.endswith(f"-of-{world_size:05d}.safetensors")
    ]
    if strange:
        raise InvalidInput(
            four_parts(
                f"{folder} holds parts of another division of the corpus",
                strange[0].name,
                f"parts of {world_size} processes",
                "Go on with as many processes as before, or choose another folder.",
            )
        )
    digests = torch.zeros(0, 32, dtype=torch.uint8)
    return Part(run, rank, world_size, miner.zero(), digests)


def _require_run(before: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    """Raises InvalidInput, naming the first difference, unless two runs are the same."""
    # Where things came from may have another name by now; what they are is told by hashes.
    for name in [name for name in now if name != "source"]:
        old, new = before.get(name), now[name]
        if isinstance(new, dict) and isinstance(old, dict):
            changed = [key for key in new if old.get(key) != new[key]]
            if changed:
                name, old, new = f"{name}: {changed[0]}", old.get(changed[0]), new[changed[0]]
        if old != new:
            raise InvalidInput(
                four_parts(
                    f"{folder} holds a run that differs in {name}",
                    repr(new)[:200],
                    repr(old)[:200],
                    "Give what was given then, or choose another folder.",
                )
            )


def _require_same(part: Part, own: int, digest: bytes, shard: Shard, corpus: Corpus) -> None:
    if bytes(part.digests[own].tolist()) != digest:
        first, last = shard.first, shard.first + len(shard.documents) - 1
        raise _changed(corpus, f"other documents among those from {first} to {last}")


def _changed(corpus: Corpus, seen: str) -> InvalidInput:
    return InvalidInput(
        four_parts(
            f"the corpus {corpus.name} is not the one that was mined before",
            seen,
            "the same documents",
            "Give the corpus of then, or choose another folder.",
        )
    )


def _already(
    folder: Path, run: dict[str, Any], corpus: Corpus, model: object, world_size: int
) -> Triggers:
    """Returns the result of a finished run, once its corpus is known to be this one."""
    manifest = read_manifest(folder)
    _require_run(manifest["run"], run, folder)
    whole, count = hashlib.sha256(), 0
    for shard in read_shards(corpus, run["options"]["shard_size"]):
        whole.update(shard.digest())
        count += 1
    if {"digest": whole.hexdigest(), "shards": count} != manifest["corpus"]:
        raise _changed(corpus, f"{count} shards with another hash")
    if world_size == 1:
        part_path(folder, 0, 1).unlink(missing_ok=True)
    return load_triggers(folder, model=model, corpus=corpus)


def _require_whole(parts: list[Part], places: list[Path]) -> None:
    """Raises InvalidInput unless the parts of all processes are there and finished."""
    named = ", ".join(map(str, places))
    if not parts:
        raise _cannot_merge("no part", f"parts of a run in {named}")
    size = parts[0].world_size
    ranks = sorted(part.rank for part in parts)
    if ranks != list(range(size)):
        raise _cannot_merge(f"the parts of processes {ranks}", f"one of each of {size}")
    for part in parts:
        _require_run(parts[0].run, part.run, places[0])
        if not part.done or part.shards != parts[0].shards:
            raise _cannot_merge(f"an unfinished part of process {part.rank}", "finished parts")


def _cannot_merge(seen: str, expected: str) -> InvalidInput:
    remedy = "Run the processes that are missing or were stopped again: they go on."
    return InvalidInput(four_parts("the parts cannot be merged", seen, expected, remedy))


def _miner(
    view: ModelView,
    how: Cutting,
    k: int,
    layer: int | Sequence[int] | None,
    neurons: int | Sequence[int] | None,
    stack: StackName | None,
    unit: Unit,
    tails: Tails,
) -> Miner:
    require_choice("mine_triggers", "unit", unit, ("prefix", "document"))
    require_choice("mine_triggers", "choice of tails", tails, tuple(_TAILS))
    pair = len(view.stacks) == 2
    base = "encoder" if pair and stack is None else view.base_stack(stack)
    if pair and base != "encoder":
        raise InvalidInput(
            four_parts(
                "a corpus cannot be read by this stack",
                f"stack={stack!r}",
                "'encoder': a decoder would see its start token alone",
                "Leave `stack` out.",
            )
        )
    blocks = select_blocks(view.stacks[base], layer)
    first = require_feed_forward(blocks[0])
    if tails == "quadrants" and not first.gated:
        raise InvalidInput(
            four_parts(
                "there are no quadrants",
                "a feed-forward sublayer without gates",
                "tails='positive' or 'both'",
                "Quadrants are the signs of a gate and of the branch it multiplies.",
            )
        )
    size = first.W_out.shape[0]
    chosen = None if neurons is None else tuple(positions("neuron", neurons, (), size))
    return Miner(view, blocks, chosen, base, require_count(k), unit, tails, how)


def _cutting(
    batch_size: int,
    shard_size: int,
    too_long: TooLong,
    malformed: Malformed,
    prepend_bos: bool | None,
    special: bool,
) -> Cutting:
    require_choice("mine_triggers", "treatment of long documents", too_long, _LONG)
    require_choice("mine_triggers", "treatment of malformed documents", malformed, _MALFORMED)
    sizes = (require_count(shard_size), require_count(batch_size))
    return Cutting(*sizes, too_long, malformed, prepend_bos, special)


_LONG, _MALFORMED = ("cut", "skip", "error"), ("error", "skip")


def _require_rank(rank: int, world_size: int) -> tuple[int, int]:
    if not 0 <= rank < world_size:
        raise InvalidInput(
            four_parts(
                "there is no such process",
                f"rank={rank} of world_size={world_size}",
                "0 <= rank < world_size",
                "Number the processes from 0.",
            )
        )
    return rank, world_size


def _folder(out: str | Path) -> Path:
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidInput(
            four_parts(
                "the folder for the result cannot be made",
                str(error),
                "a path where a folder is or can be",
                "Choose another one.",
            )
        ) from error
    return folder


def _not_finite(layer: int) -> InvalidInput:
    return InvalidInput(
        four_parts(
            "the model's own activations are not finite",
            f"NaN or infinity among the coefficients of layer {layer}",
            "finite activations",
            "Load the model in float32 or bfloat16.",
        )
    )
