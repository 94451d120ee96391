"""A folder may be in use, read-only, of another run or made to do harm: each is told by name."""

from __future__ import annotations

import copy
import errno
import fcntl
import functools
import json
import multiprocessing
import operator
import os
import shutil
import signal
import time
import warnings
import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
import zoo
from asked import case_of
from safetensors import safe_open
from safetensors.torch import save_file
from test_mining import result, texts

import tl_contextmix as cm
from tl_contextmix.errors import FileFormatError
from tl_contextmix.methods.memories import merge_triggers, mining
from tl_contextmix.methods.memories.store import alone, load_part

pytestmark = pytest.mark.once

OPTIONS: dict[str, Any] = {"k": 3, "shard_size": 8, "batch_size": 4}


@pytest.fixture(scope="module")
def mined(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[str], Path]:
    """A model, a corpus and the result of mining it."""
    model, corpus = zoo.build(case_of("gpt2"), dtype=torch.float32), texts(30)
    folder = tmp_path_factory.mktemp("mined")
    cm.mine_triggers(model, corpus, out=folder, **OPTIONS)
    return model, corpus, folder


def ask_everything(model: Any, corpus: list[str], folder: Path) -> None:
    """Asks whatever reads manifest, table and corpus."""
    found = cm.load_triggers(folder, model=model, corpus=corpus)
    repr(found)
    found.to_dataframe()
    found.examples(0, 1)
    found.agreement()
    found.patterns(0, [1])
    found.removal(per_layer=1, k=1)


# Manifests, tables and parts


def places(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every place in nested dictionaries."""
    for key in value if isinstance(value, dict) else ():
        yield (*path, key)
        yield from places(value[key], (*path, key))


def test_no_manifest_breaks_the_reader(mined: Any, tmp_path: Path) -> None:
    """Every entry is left out, or turned into something else, one at a time."""
    model, corpus, folder = mined
    good = json.loads((folder / "manifest.json").read_text())
    shutil.copy(folder / "triggers.parquet", tmp_path)
    path, refused, asked = tmp_path / "manifest.json", 0, 0
    # What nobody reads when triggers are asked for may be anything.
    free = {"host", "dtype", "torch", "hooks", "processing", "TransformerLens", "tl_contextmix"}
    for place in places(good):
        if free & set(place) or (place[-1] not in ("0", "run", "k") and "neurons" in place[:-1]):
            continue
        for bad in ("left out", None, -1, [], {}, "x", 10**30, 1.5):
            changed = copy.deepcopy(good)
            inside = functools.reduce(operator.getitem, place[:-1], changed)
            if bad == "left out":
                del inside[place[-1]]
            else:
                inside[place[-1]] = bad
            path.write_text(json.dumps(changed))
            try:
                found = cm.load_triggers(tmp_path, model=model, corpus=corpus)
                repr(found)
                found.to_dataframe(0, 1)
                asked += 1
            except (FileFormatError, cm.InvalidInput):
                refused += 1
    assert refused > 200
    assert asked < refused / 4
    for text in ("", "[]", "null", "[" * 10**5, '{"format": 1}', "NaN", "\0"):
        path.write_text(text)
        with pytest.raises(FileFormatError, match="cannot read"):
            cm.load_triggers(tmp_path)


TABLES = {
    "a column less": lambda t: t.drop(columns="rank"),
    "another type": lambda t: t.assign(document=t["document"].astype(float)),
    "a negative document": lambda t: t.assign(document=-5),
    "a document too many": lambda t: t.assign(document=30),
    "a negative position": lambda t: t.assign(position=-1),
    "a position too far": lambda t: t.assign(position=10**6),
    "another token": lambda t: t.assign(token=(t["token"] + 1) % 50),
    "no such token": lambda t: t.assign(token=10**6),
    "no such next token": lambda t: t.assign(next_token=10**6),
    "no value": lambda t: t.assign(value=float("nan")),
    "another tail": lambda t: t.assign(tail="negative"),
    "another rank": lambda t: t.assign(rank=3),
}


@pytest.mark.parametrize("change", TABLES.values(), ids=TABLES)
def test_no_table_breaks_the_reader(change: Any, mined: Any, tmp_path: Path) -> None:
    model, corpus, folder = mined
    shutil.copy(folder / "manifest.json", tmp_path)
    good = pandas.read_parquet(folder / "triggers.parquet")
    change(good).to_parquet(tmp_path / "triggers.parquet", index=False)
    with pytest.raises((FileFormatError, cm.InvalidInput)):
        ask_everything(model, corpus, tmp_path)


def test_a_file_that_is_no_table_is_refused(mined: Any, tmp_path: Path) -> None:
    shutil.copy(mined[2] / "manifest.json", tmp_path)
    data = (mined[2] / "triggers.parquet").read_bytes()
    for bad in (b"", b"PAR1" * 5, data[: len(data) // 2], data[:40] + b"\xff" * 40 + data[80:]):
        (tmp_path / "triggers.parquet").write_bytes(bad)
        with pytest.raises(FileFormatError, match="cannot read"):
            cm.load_triggers(tmp_path).to_dataframe()


def test_the_good_folder_answers(mined: Any) -> None:
    ask_everything(*mined)


@pytest.fixture(scope="module")
def part(mined: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[str], Path]:
    """The part of one of two processes."""
    folder = tmp_path_factory.mktemp("part")
    cm.mine_triggers(mined[0], mined[1], out=folder, rank=0, world_size=2, **OPTIONS)
    return *mined[:2], folder / "part-00000-of-00002.safetensors"


def rewritten(path: Path, folder: Path, facts: Any, tensors: Any) -> None:
    """Writes a part again, with some of it changed."""
    with safe_open(str(path), framework="pt") as file:
        known = json.loads(file.metadata()["part"])
        held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    metadata = {"part": json.dumps({**known, **facts})}
    held = {name: one for name, one in {**held, **tensors}.items() if one is not None}
    save_file(held, str(folder / path.name), metadata=metadata)


def test_a_part_with_a_damaged_number_is_refused(part: Any, tmp_path: Path) -> None:
    _, _, path = part
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    (tmp_path / path.name).write_bytes(damaged)
    with pytest.raises(FileFormatError, match="damaged"):
        load_part(tmp_path / path.name, torch.device("cpu"))


@pytest.mark.parametrize(
    ("facts", "tensors"),
    [
        ({"run": 5}, {}),
        ({"run": {}}, {}),
        ({"rank": 2}, {}),
        ({"world_size": "a"}, {}),
        ({"format": 99}, {}),
        ({"shards": 10**30}, {}),
        ({"done": "yes"}, {}),
        ({"counts": {"tokens": "many"}}, {}),
        ({}, {"digests": None}),
        ({}, {"digests": torch.zeros(1, 32, dtype=torch.uint8)}),
        ({}, {"1 positive values": None}),
        ({}, {"1 positive values": torch.zeros(3, 3)}),
        ({}, {"1 positive places": torch.zeros(128, 3)}),
        ({}, {"1 positive values": torch.full((128, 3), torch.nan)}),
        ({}, {"something else": torch.zeros(1)}),
    ],
    ids=lambda value: ", ".join(value) or "-",
)
def test_no_part_breaks_the_reader(facts: Any, tensors: Any, part: Any, tmp_path: Path) -> None:
    model, corpus, path = part
    rewritten(path, tmp_path, facts, tensors)
    with pytest.raises(FileFormatError, match="cannot read"):
        cm.mine_triggers(model, corpus, out=tmp_path, rank=0, world_size=2, **OPTIONS)
    with pytest.raises(FileFormatError, match="cannot read"):
        merge_triggers(tmp_path)


def test_a_part_of_another_corpus_is_not_gone_on_with(part: Any, tmp_path: Path) -> None:
    model, corpus, path = part
    for other in (corpus + corpus[:16], corpus[:16]):
        shutil.copy(path, tmp_path)
        with pytest.raises(cm.InvalidInput, match="shards where there were"):
            cm.mine_triggers(model, other, out=tmp_path, rank=0, world_size=2, **OPTIONS)


@pytest.fixture
def manifest(mined: Any, tmp_path: Path) -> dict[str, Any]:
    """The manifest of a copy of the result."""
    shutil.copytree(mined[2], tmp_path, dirs_exist_ok=True)
    return json.loads((tmp_path / "manifest.json").read_text())


@pytest.mark.parametrize(
    ("place", "value", "problem"),
    [
        (("counts", "others"), 1, "counts of something else"),
        (("run", "options", "k"), 0, "options: k is 0"),
    ],
)
def test_what_is_wrong_with_a_manifest_is_said(
    place: tuple[str, ...], value: int, problem: str, manifest: Any, tmp_path: Path
) -> None:
    *outer, last = place
    functools.reduce(operator.getitem, outer, manifest)[last] = value
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(FileFormatError, match=problem):
        cm.load_triggers(tmp_path)


def test_neurons_that_a_model_does_not_have_are_refused(
    mined: Any, manifest: Any, tmp_path: Path
) -> None:
    too_many = {layer: [10**6] for layer in manifest["neurons"]}
    manifest["neurons"] = manifest["run"]["options"]["neurons"] = too_many
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    cm.load_triggers(tmp_path)
    with pytest.raises(FileFormatError, match="layers or neurons that .* does not have"):
        cm.load_triggers(tmp_path, model=mined[0])


def test_parts_of_processes_that_were_stopped_are_not_merged(part: Any, tmp_path: Path) -> None:
    model, corpus, path = part
    rewritten(path, tmp_path, {"done": False}, {})
    cm.mine_triggers(model, corpus, out=tmp_path, rank=1, world_size=2, **OPTIONS)
    with pytest.raises(cm.InvalidInput, match="an unfinished part of process 0"):
        merge_triggers(tmp_path)


def test_a_decoder_has_nothing_to_mine(tmp_path: Path) -> None:
    model = cm.load_demo("encoder-decoder")
    with pytest.raises(cm.InvalidInput, match="a decoder would see its start token alone"):
        cm.mine_triggers(model, ["the cat"], out=tmp_path, stack="decoder")


# Folders in use


def test_a_finished_part_is_not_mined_again(
    part: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, corpus, path = part
    shutil.copy(path, tmp_path)
    monkeypatch.setattr(
        "tl_contextmix.methods.memories.mining.save_part", lambda *_: pytest.fail("written")
    )
    assert cm.mine_triggers(model, corpus, out=tmp_path, rank=0, world_size=2, **OPTIONS) is None
    assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_whoever_comes_late_finds_what_was_mined(mined: Any, tmp_path: Path) -> None:
    model, corpus, whole = mined
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    found = cm.mine_triggers(model, corpus, out=tmp_path, rank=1, world_size=2, **OPTIONS)
    assert found is not None
    assert result(tmp_path) == result(whole)


@pytest.mark.parametrize("locks", ["a disk without", "a file removed meanwhile"])
def test_where_there_are_no_locks_one_is_done_without(
    locks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, take, tries = tmp_path / "lock", fcntl.flock, []

    def flock(handle: int, how: int) -> None:
        tries.append(handle)
        if locks == "a disk without":
            raise OSError(errno.ENOLCK, "No locks available")
        take(handle, how)
        if len(tries) == 1:
            path.unlink()

    monkeypatch.setattr(fcntl, "flock", flock)
    with alone(path):
        assert path.exists()
        held = locks != "a disk without"
        with (
            (
                pytest.raises(cm.InvalidInput, match="another process at it")
                if held
                else nullcontext()
            ),
            alone(path),
        ):
            pass
    assert not path.exists()


def test_a_folder_that_cannot_be_made_is_named(mined: Any, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(cm.InvalidInput, match="the folder for the result cannot be made"):
        cm.mine_triggers(*mined[:2], out=tmp_path / "file" / "inside", **OPTIONS)


def test_two_processes_do_not_mine_the_same_part(mined: Any, tmp_path: Path) -> None:
    model, corpus, whole = mined
    lock = tmp_path / ".part-00000-of-00001.lock"
    context = multiprocessing.get_context("fork")
    held = context.Event()

    def hold() -> None:
        with alone(lock):
            held.set()
            time.sleep(60)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = context.Process(target=hold)
        child.start()
    assert held.wait(30)
    with pytest.raises(cm.InvalidInput, match="another process at it"):
        cm.mine_triggers(model, corpus, out=tmp_path, **OPTIONS)
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    child.join(30)
    # The lock file of a process that was killed holds nobody up.
    assert lock.exists()
    cm.mine_triggers(model, corpus, out=tmp_path, **OPTIONS)
    assert result(tmp_path) == result(whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest.json", "triggers.parquet"]


def test_a_folder_without_the_right_to_write_is_found_out_first(
    mined: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opening is refused as on a read-only disk: the tests may run as root, who may write all."""
    model, corpus, whole = mined
    passes: list[int] = []
    monkeypatch.setattr(
        "tl_contextmix.methods.memories.mining.run_part", lambda *_: passes.append(1)
    )
    opened = os.open

    def refuse(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if flags & os.O_CREAT:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(cm.InvalidInput, match="cannot be written to: got .*Permission denied"):
        cm.mine_triggers(model, corpus, out=tmp_path / "new", **OPTIONS)
    assert passes == []
    # What is finished may be read.
    assert len(cm.mine_triggers(model, corpus, out=whole, **OPTIONS).to_dataframe()) > 0


def test_who_was_stopped_by_an_error_may_leave_such_documents_out(
    mined: Any, tmp_path: Path
) -> None:
    model, corpus, _ = mined
    longest = "cat " * 200
    cases: list[tuple[str, Any, Any]] = [("malformed", 5, "skip"), ("too_long", longest, "cut")]
    for name, bad, now in cases:
        listed = [*corpus[:20], bad, *corpus[20:]]
        out = tmp_path / name
        options = {**OPTIONS, "checkpoint_seconds": 0.0}
        with pytest.raises(cm.InvalidInput, match="document 20 of a list cannot be used"):
            cm.mine_triggers(model, listed, out=out, **{**options, name: "error"})
        assert list(out.glob("part-*"))
        found = cm.mine_triggers(model, listed, out=out, **{**options, name: now})
        fresh = cm.mine_triggers(
            model, listed, out=tmp_path / f"{name} 2", **OPTIONS, **{name: now}
        )
        assert result(found.folder) == result(fresh.folder)


def test_a_merge_does_not_replace_another_run(mined: Any, part: Any, tmp_path: Path) -> None:
    model, corpus, whole = mined
    for rank in range(2):
        cm.mine_triggers(model, corpus, out=tmp_path, rank=rank, world_size=2, **OPTIONS)
    merge_triggers(tmp_path)
    merge_triggers(tmp_path)
    assert result(tmp_path) == result(whole)
    other = tmp_path / "other"
    cm.mine_triggers(model, corpus, out=other, **{**OPTIONS, "k": 2})
    before = result(other)
    with pytest.raises(cm.InvalidInput, match="differs in options: k"):
        merge_triggers(other, parts=[tmp_path])
    assert result(other) == before


def test_of_the_parts_that_are_merged_two_are_held(
    mined: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part of an 8B model takes 300 MiB: all of a cluster's at once would fit nowhere."""
    model, corpus, whole = mined
    for rank in range(4):
        cm.mine_triggers(model, corpus, out=tmp_path, rank=rank, world_size=4, **OPTIONS)
    held: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def load(path: Path, device: torch.device) -> mining.Part:
        nonlocal most
        part = load_part(path, device)
        held.append(weakref.ref(next(iter(part.tops.values())).values))
        most = max(most, sum(one() is not None for one in held))
        return part

    monkeypatch.setattr(mining, "load_part", load)
    merge_triggers(tmp_path)
    assert most == 2
    assert result(tmp_path) == result(whole)


def test_triggers_know_their_column_and_their_tokenizer(
    mined: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, corpus, _ = mined
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps({"body": text}) + "\n" for text in corpus))
    cm.mine_triggers(model, path, out=tmp_path / "out", column="body", **OPTIONS)
    moved = shutil.move(path, tmp_path / "d.jsonl")
    found = cm.load_triggers(tmp_path / "out", model=model, corpus=moved)
    assert found.examples(0, 1).triggers
    monkeypatch.setattr(model, "tokenizer", zoo.build(case_of("llama")).tokenizer)
    with pytest.raises(cm.InvalidInput, match="mined with another tokenizer"):
        cm.load_triggers(tmp_path / "out", model=model)
