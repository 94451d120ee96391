"""Whatever it is given, the package answers or says what is wrong; and it executes nothing.

Arguments of public functions are fuzzed by fuzz_calls.py; files here: bytes changed, cut off,
swapped for bombs and for pickles that would leave a mark if anything opened them as such.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import unchecked
import zoo
from asked import case_of
from hand_built import one_of_each
from public import FUNCTIONS

import tl_contextmix as cm
from tl_contextmix.errors import FileFormatError
from tl_contextmix.evaluation import load_minimal_pairs
from tl_contextmix.methods.memories import merge_triggers
from tl_contextmix.results import Result

pytestmark = pytest.mark.once

OURS = (cm.InvalidInput, cm.UnsupportedModel, FileFormatError)
ROUNDS = 60  # changed files per reader
SCRIPT = Path(__file__).with_name("fuzz_calls.py")


def test_public_functions_raise_nothing_but_our_own_errors() -> None:
    """In a process of its own, without the type checks that tests put on the package."""
    told = unchecked.run(str(SCRIPT), "10")
    calls, functions = (int(told.split()[place]) for place in (-7, -4))
    assert functions == len(FUNCTIONS) + 1  # and MinimalPair
    assert calls > 3 * functions, told


@dataclass(frozen=True)
class Mark:
    """Pickled, it says what to do when it is opened."""

    path: str

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, ...]]:
        return os.mkdir, (self.path,)


@dataclass(frozen=True)
class Reader:
    """Something that reads files.

    Attributes:
        file: The file that is changed.
        read: Reads it, and everything it would ever read of it.
        fails: Errors it may end in.
    """

    file: Path
    read: Callable[[], object]
    fails: tuple[type[Exception], ...] = (FileFormatError,)


def corpus_reader(path: Path, folder: Path) -> Reader:
    model = zoo.build(case_of("gpt2"))

    def read() -> object:
        return cm.composition(model, path)

    return Reader(path, read, (FileFormatError, cm.InvalidInput))


def pages(path: Path) -> Path:
    import pandas

    pandas.DataFrame({"text": ["the cat sat on the mat", "a dog ran"]}).to_parquet(path)
    return path


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reader]:
    folder = tmp_path_factory.mktemp("readers")
    model = zoo.build(case_of("gpt2"))
    text = folder / "corpus.txt"
    text.write_text("the cat sat on the mat\na dog ran to the house\n" * 2)
    lines = folder / "corpus.jsonl"
    lines.write_text('{"text": "the cat sat on the mat"}\n{"text": "a dog ran"}\n')
    pairs = folder / "pairs.jsonl"
    pairs.write_text('{"sentence_good": "the cat sat", "sentence_bad": "the dog sat"}\n' * 2)
    mined = folder / "mined"
    cm.mine_triggers(model, text, out=mined, k=2)
    half = folder / "half"
    cm.mine_triggers(model, text, out=half, k=2, rank=0, world_size=1)
    (half / "manifest.json").unlink()
    part = next(half.glob("part-*.safetensors"), None)
    result = one_of_each()[0].save(folder / "map.safetensors")

    def triggers() -> object:
        found = cm.load_triggers(mined, model=model)
        return found.to_dataframe(), found.examples(0, 0)

    readers = {
        "result": Reader(result, lambda: Result.load(result)),
        "minimal pairs": Reader(
            pairs, lambda: load_minimal_pairs(pairs), (FileFormatError, cm.InvalidInput)
        ),
        "manifest": Reader(mined / "manifest.json", triggers, OURS),
        "table of triggers": Reader(mined / "triggers.parquet", triggers, OURS),
        "text": corpus_reader(text, folder),
        "jsonl": corpus_reader(lines, folder),
        "parquet": corpus_reader(pages(folder / "corpus.parquet"), folder),
    }
    if part is not None:
        readers["part"] = Reader(part, lambda: merge_triggers(half), OURS)
    return readers


NAMES = (
    "result",
    "minimal pairs",
    "manifest",
    "table of triggers",
    "text",
    "jsonl",
    "parquet",
)


def changed(body: bytes, seed: int) -> bytes:
    """The bytes of a file with a few of them changed, cut out or put in."""
    draw = random.Random(seed)
    found = bytearray(body)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(found) + 1)
        kind = draw.randrange(4)
        if kind == 0:
            found[at : at + 1] = bytes([draw.randrange(256)])
        elif kind == 1:
            del found[at : at + draw.randint(1, 40)]
        elif kind == 2:
            found[at:at] = draw.choice((b"\0", b"\xff\xfe", b"9" * 40, b"{", b"null", b"-1", b'"'))
        else:
            del found[at:]
    return bytes(found)


def swapped(folder: Path, mark: str) -> Iterator[tuple[str, bytes]]:
    """Files that are none of ours."""
    payload = pickle.dumps(Mark(mark))
    yield "nothing", b""
    yield "a pickle", payload
    torch.save(Mark(mark), folder / "evil.pt")
    yield "a torch file", (folder / "evil.pt").read_bytes()
    with zipfile.ZipFile(folder / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("zeros", bytes(2**26))
    yield "a zip bomb", (folder / "bomb.zip").read_bytes()
    yield "deep brackets", b"[" * 200_000
    yield "a deep object", b'{"a":' * 50_000 + b"1" + b"}" * 50_000
    # A header of safetensors that claims more than there is.
    yield "a great header", (2**62).to_bytes(8, "little") + b"{}"
    claims = json.dumps({"x": {"dtype": "F64", "shape": [2**40], "data_offsets": [0, 2**43]}})
    yield "a great tensor", len(claims).to_bytes(8, "little") + claims.encode()
    yield "a number without end", b'{"text": ' + b"9" * 10_000 + b"}\n"


@pytest.mark.parametrize("name", NAMES)
# A corpus of which little is left is warned of.
@pytest.mark.filterwarnings("ignore::tl_contextmix.errors.ContextMixWarning")
def test_no_file_does_anything_but_be_read_or_refused(
    name: str, readers: dict[str, Reader], tmp_path: Path
) -> None:
    reader = readers[name]
    reader.read()  # it can be read as it is
    body, mark = reader.file.read_bytes(), tmp_path / "mark"
    bodies = {f"changed {seed}": changed(body, seed) for seed in range(ROUNDS)}
    bodies |= dict(swapped(tmp_path, str(mark)))
    refused = 0
    try:
        for kind, hostile in bodies.items():
            reader.file.write_bytes(hostile)
            try:
                reader.read()
            except reader.fails:
                refused += 1
            except Exception as error:
                pytest.fail(f"{kind}: {type(error).__name__}: {error!s:.300}")
            assert not mark.exists(), f"{kind} was executed"
    finally:
        reader.file.write_bytes(body)
    assert refused >= 5
    reader.read()


def test_the_mark_would_be_seen(tmp_path: Path) -> None:
    """The pickles above do leave a mark where something opens them."""
    pickle.loads(pickle.dumps(Mark(str(tmp_path / "mark"))))  # noqa: S301
    assert (tmp_path / "mark").exists()


def test_a_folder_of_results_is_not_touched_by_reading(
    readers: dict[str, Reader], tmp_path: Path
) -> None:
    place = tmp_path / "mined"
    shutil.copytree(readers["manifest"].file.parent, place)
    before: dict[Path, Any] = {path: path.read_bytes() for path in place.iterdir()}
    cm.load_triggers(place).to_dataframe()
    assert {path: path.read_bytes() for path in place.iterdir()} == before
