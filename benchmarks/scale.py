"""Mining at scale, the parts of it that need no model: reading, taking in, checkpoints, merging.

``python benchmarks/scale.py [--quick] [--write]`` takes in 10^8 synthetic coefficients of as many
memories as an 8B model of Llama's shape has (32 layers of 14,336 neurons), in four parts, one of
which is stopped and goes on; merges them, and compares the result with that of one process byte by
byte. Then as many coefficients of one layer, for which nearly nothing is new in the end. What is
measured is in docs/pages/scale.md, which ``--write`` updates.
"""

from __future__ import annotations

import json
import multiprocessing
import re
import resource
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from meters import command_line, machine, markdown, show
from torch import Tensor

from tl_contextmix.methods.memories.corpus_formats import open_corpus
from tl_contextmix.methods.memories.mining import finish
from tl_contextmix.methods.memories.shards import read_shards
from tl_contextmix.methods.memories.store import (
    MANIFEST,
    TABLE,
    Part,
    load_part,
    part_path,
    save_part,
)
from tl_contextmix.methods.memories.topk import TopK, pack_places, update_all

PAGE = Path(__file__).parent.parent / "docs" / "pages" / "scale.md"
_MARKED = re.compile(r"(<!-- scale -->\n).*?(<!-- end of scale -->)", re.DOTALL)
K, PARTS, TOKENS = 25, 4, 28
TAIL = "positive"
Row = tuple[str, str]


class Shape(NamedTuple):
    """How much there is: layers, neurons of each, batches of each part, and tokens of a batch."""

    layers: int
    neurons: int
    batches: int
    tokens: int

    @property
    def coefficients(self) -> int:
        """Of one part."""
        return self.layers * self.neurons * self.batches * self.tokens


WIDE, LONG = Shape(32, 14_336, 2, TOKENS), Shape(1, 14_336, 4, 512)
QUICK = Shape(4, 256, 2, TOKENS), Shape(1, 256, 4, 32)


def run_of(shape: Shape) -> dict[str, Any]:
    """Returns what a manifest says of a run, for coefficients that no model made."""
    layers = [*range(shape.layers)]
    options = {
        "k": K,
        "batch_size": shape.tokens,
        "shard_size": 1,
        "stack": "decoder",
        "tails": TAIL,
        "unit": "prefix",
        "duplicates": "keep",
        "prepend_bos": None,
        "too_long": "error",
        "layers": layers,
        "neurons": {str(layer): [*range(shape.neurons)] for layer in layers},
    }
    named = dict.fromkeys(("model", "weights", "tokenizer"), "synthetic")
    source, corpus = {"corpus": "synthetic", "model": None}, {"kind": "list", "column": None}
    return {**named, "source": source, "corpus": corpus, "options": options}


def empty(shape: Shape, rank: int, parts: int) -> Part:
    """Returns a part before its first batch."""
    device = torch.device("cpu")
    tops = {
        (layer, TAIL): TopK.zero(shape.neurons, K, torch.float32, device)
        for layer in range(shape.layers)
    }
    return Part(run_of(shape), rank, parts, tops, torch.zeros(0, 32, dtype=torch.uint8))


def coefficients(shape: Shape, number: int) -> list[Tensor]:
    """Returns those of a batch [token neuron] by layer: log-normal, half of them negative."""
    generator = torch.Generator().manual_seed(number)
    size = shape.layers, shape.tokens, shape.neurons
    positive = torch.rand(size, generator=generator) < 0.5
    drawn = (1.5 * torch.randn(size, generator=generator) - 1.5).exp()
    return [*torch.where(positive, drawn, -drawn)]


def take(part: Part, shape: Shape, numbers: Iterator[int]) -> float:
    """Takes in batches, with what mining takes in of each; returns the seconds without drawing."""
    taken = 0.0
    for number in numbers:
        values = coefficients(shape, number)
        places = pack_places(torch.tensor([number]), shape.tokens).flatten()
        start = time.process_time()
        assert bool(torch.stack([one.sum() for one in values]).isfinite().all())
        counted = torch.ones(shape.tokens, dtype=torch.bool)
        locate = partial(_entries, places)
        update_all([*part.tops.values()], values, counted, locate)
        taken += time.process_time() - start
    return taken


def _entries(places: Tensor, rows: Tensor, *_: Any) -> tuple[Tensor, ...]:
    """Returns places, and numbers in the place of tokens and hashes."""
    return places[rows], places[rows] * 7, places[rows] * 5


def close(part: Part, shape: Shape, shards: int) -> Part:
    """Says of a part that its corpus is at its end."""
    mine = len(range(part.rank, shards, part.world_size))
    part.digests = torch.zeros(mine, 32, dtype=torch.uint8)
    part.done, part.shards = True, shards
    tokens = mine * shape.tokens
    part.counts = Counter(tokens=tokens, positions=tokens, documents=mine)
    return part


def timed(work: Any) -> tuple[Any, float]:
    """Returns what a piece of work returns, and its seconds by the clock."""
    start = time.perf_counter()
    found = work()
    return found, time.perf_counter() - start


def parts_and_merge(shape: Shape, folder: Path) -> Iterator[Row]:
    """Mines in parts and in one; yields rows of the table."""
    shards = shape.batches * PARTS
    cpu, taken, saved, again = torch.device("cpu"), 0.0, 0.0, 0.0
    places = [part_path(folder, rank, PARTS) for rank in range(PARTS)]
    for rank, place in enumerate(places):
        part, numbers = empty(shape, rank, PARTS), iter(range(rank, shards, PARTS))
        if rank == 1:  # stopped after some batches: what it has since its checkpoint is lost
            some = [next(numbers) for _ in range(shape.batches // 2)]
            taken += take(part, shape, iter(some))
            save_part(part, folder)
            part, again = timed(partial(load_part, place, cpu))
        taken += take(part, shape, numbers)
        saved += timed(partial(save_part, close(part, shape, shards), folder))[1]
    size = places[0].stat().st_size
    total, memories = PARTS * shape.coefficients, shape.layers * shape.neurons
    yield "coefficients, all of them new at first", f"{total:,} of {memories:,} memories"
    yield "taken in", f"{total / taken / 1e6:,.0f} million a second"
    yield "a part on disk", f"{size / 2**20:,.0f} MiB, written in {saved / PARTS:.1f} s"
    yield "going on from a checkpoint", f"read in {again:.1f} s"
    merged = folder / "merged"
    merged.mkdir()
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        seconds, most = pool.submit(merge, places, merged).result()
    yield "most memory of the process that merges", f"{most:,.0f} MiB"
    table = merged / TABLE
    yield "the table", f"{table.stat().st_size / 2**20:,.0f} MiB of {memories * K:,} rows at most"
    whole = empty(shape, 0, 1)
    take(whole, shape, iter(range(shards)))
    alone = folder / "alone"
    alone.mkdir()
    _, writing = timed(partial(finish, [close(whole, shape, shards)], alone))
    yield "writing the table", f"{writing:.1f} s"
    each = (seconds - writing) / (PARTS - 1)
    yield "reading and merging one more part", f"{each:.1f} s"
    same = table.read_bytes() == (alone / TABLE).read_bytes()
    same = same and (merged / MANIFEST).read_bytes() == (alone / MANIFEST).read_bytes()
    assert same
    yield "the same bytes as from one process that was never stopped", "yes"


def merge(places: list[Path], folder: Path) -> tuple[float, float]:
    """Merges parts; returns seconds, and the most memory that this process has had, in MiB."""
    torch.set_num_threads(1)
    parts = (load_part(place, torch.device("cpu")) for place in places)
    _, seconds = timed(partial(finish, parts, folder))
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def long_run(shape: Shape) -> Iterator[Row]:
    """Takes in much of few memories; yields how fast that is at first and at the end."""
    part, rates = empty(shape, 0, 1), []
    for number in range(shape.batches * PARTS):
        rates.append(shape.tokens * shape.neurons / take(part, shape, iter([number])))
    total, quarter = PARTS * shape.coefficients, len(rates) // 4
    yield "coefficients of one layer", f"{total:,} of {shape.neurons:,} memories"
    for name, some in (("first", rates[:quarter]), ("last", rates[-quarter:])):
        rate = len(some) / sum(1 / one for one in some)
        yield f"taken in, {name} quarter", f"{rate / 1e6:,.0f} million a second"


def reading(folder: Path, count: int) -> Iterator[Row]:
    """Yields how fast a corpus is read past, as every process does with the shards of others."""
    path = folder / "corpus.jsonl"
    line = json.dumps({"text": "the keys to the cabinet are on the table . " * 50}) + "\n"
    path.write_text(line * count)
    corpus = open_corpus(str(path), "text")
    _, seconds = timed(lambda: sum(shard.size for shard in read_shards(corpus, 1024)))
    yield "reading past the shards of others", f"{path.stat().st_size / seconds / 2**20:,.0f} MiB/s"


def main(arguments: list[str] | None = None) -> None:
    """Measures and prints, or puts the table into the page."""
    parser = command_line(__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes; for a look")
    parser.add_argument("--write", action="store_true", help="update the page")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    wide, long = QUICK if given.quick else (WIDE, LONG)
    with torch.no_grad(), tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        rows = [*parts_and_merge(wide, folder), *long_run(long)]
        rows += reading(folder, 100 if given.quick else 20_000)
    found = f"{markdown(['what', 'measured'], rows)}\n{machine()}.\n"
    show(found)
    if given.write:
        text = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(_MARKED.sub(lambda m: f"{m[1]}\n{found}\n{m[2]}", text), encoding="utf-8")


if __name__ == "__main__":
    main()
