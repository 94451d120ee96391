"""Files: everything comes back, nothing half-written stays, nothing hostile gets in."""

from __future__ import annotations

import dataclasses
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hand_built
import pytest
import safetensors.torch
import torch
from hand_built import PROVENANCE, random_map
from safetensors import safe_open

from tl_contextmix.errors import FileFormatError, InvalidInput
from tl_contextmix.results import (
    ContextMap,
    LayerFigures,
    Pair,
    PairChanges,
    Provenance,
    Result,
    Tokens,
    ValueReadouts,
    storage,
)

pytestmark = pytest.mark.once

EACH = [
    pytest.param(result, id=f"{type(result).__name__}-{index}")
    for index, result in enumerate(hand_built.one_of_each())
]


def _rewrite(path: Path, labels: Callable[[Any], Any] = lambda old: old, **metadata: str) -> None:
    """Writes a file again with other labels (a JSON value, or bytes), as one without a checksum."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        kept = {"tl_contextmix": "2"} | metadata
    new = labels(json.loads(bytes(tensors.pop("labels").numpy())))
    body = new if isinstance(new, bytes) else json.dumps(new).encode()
    tensors["labels"] = torch.tensor([*body], dtype=torch.uint8)
    safetensors.torch.save_file(tensors, path, metadata=kept)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return random_map(head=2, padding=1, bias=True).save(tmp_path / "map.safetensors")


# There and back


@pytest.mark.parametrize("result", EACH)
def test_every_result_comes_back(result: Any, tmp_path: Path):
    path = result.save(tmp_path / "result")
    assert path == tmp_path / "result"
    assert [entry.name for entry in tmp_path.iterdir()] == ["result"]
    assert type(result).load(str(path)).equals(result)
    assert type(Result.load(path)) is type(result)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"none": None, "yes": True, "no": False, "one": 1, "real": 1.0, "text": "é\ud83d\u2028"},
        {"list": [1, [True, None]], "tuple": (1, (2.5, "x")), "empty": [[], (), {}]},
        {"tensor": "tensor_0", "class": "ContextMap", "fields": {"class": "x", "fields": {}}},
        {"nested": {"dict": {"tuple": [1]}}, "": {"": ""}},
        {"inf": float("inf"), "minus": -float("inf"), "nan": float("nan"), "small": 5e-324},
        {"big": 2**80, "pi": 3.141592653589793},
    ],
    ids=range(7),
)
def test_options_come_back_as_they_were(options: dict[str, Any], tmp_path: Path):
    provenance = dataclasses.replace(PROVENANCE, options=options)
    map = random_map(1, 1, 1, 2, provenance=provenance)
    # Compared as text: it tells 1 from True and lists from tuples, and NaN equals NaN.
    assert repr(ContextMap.load(map.save(tmp_path / "map")).provenance) == repr(provenance)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.rand(4, 6, dtype=torch.float16)[::2, ::3],
        torch.rand(1, 1, dtype=torch.float64).expand(2, 2),
        torch.rand(2, 2).bfloat16().T,
        torch.rand(2, 2, requires_grad=True),
    ],
    ids=["strided", "expanded", "transposed", "with gradients"],
)
def test_tensors_of_any_layout_are_stored(tensor: torch.Tensor, tmp_path: Path):
    map = dataclasses.replace(random_map(1, 1, 1, 2), scores=tensor[None, None, None])
    loaded = ContextMap.load(map.save(tmp_path / "map"))
    assert loaded.equals(map)
    assert not loaded.scores.requires_grad


def test_labels_beyond_the_header_of_safetensors_are_stored(tmp_path: Path):
    # The library refuses headers over 100 MB.
    pairs = (Pair(0, 0, 0, 0, "x" * 60_000_000, "y" * 60_000_000, 0.0, 1.0),)
    changes = PairChanges(pairs, (), "a", "b", "norm", PROVENANCE)
    assert PairChanges.load(changes.save(tmp_path / "pairs")).equals(changes)


def test_other_tools_can_read_the_numbers(saved: Path):
    tensors = safetensors.torch.load_file(saved)
    assert torch.equal(tensors["tensor_0"], ContextMap.load(saved).scores)


def test_what_cannot_be_stored_is_refused_before_anything_is_written(tmp_path: Path):
    for option in (object(), {1: 2}, {3}, b"x", Path("x")):
        provenance = dataclasses.replace(PROVENANCE, options={"option": option})
        with pytest.raises(InvalidInput, match="cannot be saved: got a .* in it; expected"):
            random_map(provenance=provenance).save(tmp_path / "map")
    assert list(tmp_path.iterdir()) == []


# Replacing


def test_a_new_file_takes_the_place_of_the_old(saved: Path):
    old, new = ContextMap.load(saved), random_map(1, 1, 1, 3)
    kept = old.scores.clone()
    new.save(saved)
    assert ContextMap.load(saved).equals(new)
    # What was loaded from the old file does not live on the new one's bytes.
    assert torch.equal(old.scores, kept)
    assert [entry.name for entry in saved.parent.iterdir()] == [saved.name]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("disk full")])
def test_an_interrupted_save_leaves_the_old_file(
    saved: Path, error: Any, monkeypatch: pytest.MonkeyPatch
):
    def half(tensors: Any, filename: str, metadata: Any) -> None:
        Path(filename).write_bytes(b"half a file")
        raise error

    old = saved.read_bytes()
    monkeypatch.setattr(safetensors.torch, "save_file", half)
    with pytest.raises((KeyboardInterrupt, OSError)):
        random_map(1, 1, 1, 2).save(saved)
    assert saved.read_bytes() == old
    assert [entry.name for entry in saved.parent.iterdir()] == [saved.name]


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions and links")
def test_files_get_ordinary_permissions_and_links_stay_links(tmp_path: Path):
    plain, link = tmp_path / "plain", tmp_path / "link"
    plain.touch()
    usual = stat.S_IMODE(plain.stat().st_mode)
    link.symlink_to(plain)
    random_map(1, 1, 1, 2).save(link)
    assert link.is_symlink()
    assert stat.S_IMODE(plain.stat().st_mode) == usual
    assert Result.load(plain).equals(random_map(1, 1, 1, 2))


def test_saving_needs_a_file_in_a_folder_that_exists(tmp_path: Path):
    for path in (tmp_path / "missing" / "map", tmp_path):
        with pytest.raises(InvalidInput, match="cannot save ContextMap: .* Make the folder first"):
            random_map().save(path)
    assert list(tmp_path.iterdir()) == []


def test_a_path_may_be_relative_and_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for name in ("map", "é" * 120):
        assert ContextMap.load(random_map().save(name)).equals(random_map())


# What is no such file


def _four_parts(message: str) -> bool:
    seen, expected = message.find(": got "), message.find("; expected ")
    return 0 < seen < expected and message.endswith(".")


def _refused(path: Path, cls: type[Result] = ContextMap) -> str:
    with pytest.raises(FileFormatError) as caught:
        cls.load(path)
    assert _four_parts(str(caught.value)), caught.value
    assert len(str(caught.value)) < 1000
    return str(caught.value)


def test_no_file_no_folder_no_safetensors(tmp_path: Path):
    assert "no file of this name" in _refused(tmp_path / "missing")
    assert "no file of this name" in _refused(tmp_path)
    other = tmp_path / "file"
    for body in (b"", b"\0" * 7, b"PK\x03\x04" * 50, b"\xff" * 64, b"\x80\x04K\x01." * 9):
        other.write_bytes(body)
        assert "no safetensors file" in _refused(other)


def test_truncated_files(saved: Path):
    whole = saved.read_bytes()
    for length in (1, 8, 100, len(whole) // 2, len(whole) - 1):
        saved.write_bytes(whole[:length])
        assert "no safetensors file" in _refused(saved)


def test_a_damaged_byte_is_found_wherever_it_is(tmp_path: Path):
    readouts = ValueReadouts(
        layer=torch.tensor([0]),
        neuron=torch.tensor([3]),
        ids=torch.tensor([[[7, 8], [9, 7]]]),
        logits=torch.rand(1, 2, 2),
        max_prob=torch.rand(1, 2),
        entropy=torch.rand(1, 2),
        norm=torch.rand(1),
        words={"7": "a", "8": "b", "9": "c"},
        provenance=PROVENANCE,
    )
    path = readouts.save(tmp_path / "readouts")
    whole = path.read_bytes()
    for place in range(8, len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            found = ValueReadouts.load(path)
        except FileFormatError:
            continue
        assert found.equals(readouts), place  # the name of the checksum, for one
    path.write_bytes(whole)
    # Files of earlier versions have no checksum: what their numbers stand for is looked up.
    _rewrite(path, lambda old: json.loads(json.dumps(old).replace('"9": "c"', '"6": "c"')))
    assert "ValueReadouts.ids do not fit words: got ['9'] without a name" in _refused(path, Result)


@pytest.mark.parametrize(
    ("kind", "field", "labels", "message"),
    [
        ("ComponentReadouts", "top_words", {"tuple": []}, "top_words does not fit its labels"),
        ("ContextReliance", "by", "hope", "value of by"),
        ("AttributionGraph", "unit", "hope", "value of unit"),
        ("ScoreContributions", "target", 4, "no such place on the axis of target"),
        ("LogProbContributions", "tokens", None, "no such place on the axis of components.pos"),
    ],
)
def test_labels_that_do_not_fit_each_other(
    tmp_path: Path, kind: str, field: str, labels: Any, message: str
):
    (result,) = (one for one in hand_built.one_of_each() if type(one).__name__ == kind)
    path = result.save(tmp_path / "result")
    if labels is None:  # a position beyond the tokens
        few = dataclasses.replace(result, tokens=hand_built.tokens(2, 1))
        few.save(path)
    else:
        _rewrite(path, _field(field, labels))
    assert message in _refused(path, Result)


def test_safetensors_files_of_something_else(tmp_path: Path):
    path = tmp_path / "weights"
    for metadata in (None, {"format": "pt"}):
        safetensors.torch.save_file({"labels": torch.zeros(3)}, path, metadata=metadata)
        assert "a safetensors file of something else" in _refused(path)
    safetensors.torch.save_file({"x": torch.zeros(3)}, path, metadata={"tl_contextmix": "1"})
    assert "labels that cannot be decoded" in _refused(path)


def test_results_of_another_class(saved: Path):
    assert "got a ContextMap; expected a LayerFigures" in _refused(saved, LayerFigures)
    storage.save(PROVENANCE, saved)
    assert "got a Provenance; expected a Result" in _refused(saved, Result)
    assert storage.load(Provenance, saved) == PROVENANCE


@pytest.mark.parametrize("version", ["3", "1.5", "", "one", "-1", "9" * 10_000])
def test_files_of_another_format_version(saved: Path, version: str):
    _rewrite(saved, tl_contextmix=version)
    message = _refused(saved)
    assert f"format version {version[:20]}; expected version 1 or 2" in message
    assert "or a newer one" in message


def _nested(depth: int) -> bytes:
    return b'{"tuple": [' * depth + b"]}" * depth


def _field(name: str, value: Any) -> Callable[[Any], Any]:
    def change(labels: Any) -> Any:
        labels["fields"][name] = value
        return labels

    return change


def _without(name: str) -> Callable[[Any], Any]:
    def change(labels: Any) -> Any:
        del labels["fields"][name]
        return labels

    return change


@pytest.mark.parametrize(
    "labels",
    [
        lambda _: b"",
        lambda _: b"{",
        lambda _: b"\xff\xfe",
        lambda _: b"9" * 5000,
        lambda _: _nested(500),
        lambda _: _nested(100_000),
        lambda _: None,
        lambda _: [],
        lambda _: {},
        lambda _: "ContextMap",
        lambda _: {"class": "ContextMap"},
        lambda _: {"class": "ContextMap", "fields": {}},
        lambda _: {"class": "ContextMap", "fields": []},
        lambda old: {**old, "class": "os.system"},
        lambda old: {**old, "class": "Result"},
        lambda old: {**old, "class": "Path"},
        lambda old: {**old, "class": ["ContextMap"]},
        lambda old: {**old, "class": None},
        lambda old: {**old, "module": "os"},
        lambda old: {"tuple": [old]},
        lambda _: {"tensor": "tensor_0"},
        _without("scores"),
        _without("provenance"),
        _field("surprise", 1),
        _field("__class__", "str"),
        _field("scores", {"tensor": "tensor_99"}),
        _field("scores", {"tensor": "labels"}),
        _field("scores", {"tensor": ["tensor_0"]}),
        _field("scores", {"tensor": "tensor_1"}),
        _field("scores", None),
        _field("scores", [[0.5]]),
        _field("bias", {"tensor": "tensor_0"}),
        _field("layers", "012"),
        _field("layers", {"tuple": [0, 1, True]}),
        _field("layers", {"tuple": [0, 1, 2.0]}),
        _field("layers", {"list": [0, 1, 2]}),
        _field("layers", {"tuple": [0, 1]}),
        _field("layers", {"tuple": 3}),
        _field("heads", "01"),
        _field("heads", {"tuple": [0, 1]}),
        _field("point", 3),
        _field("point", None),
        _field("point", {"tensor": "tensor_0"}),
        _field("includes_residual", 1),
        _field("includes_residual", "no"),
        _field("normalized", "row"),
        _field("normalized", True),
        _field("normalized", {"tuple": []}),
        _field("provenance", {"dict": {}}),
        _field("provenance", "me"),
        _field("target", {"class": "Provenance", "fields": {}}),
        _field("unit", {"unknown": 1}),
        _field("unit", {"eval": "1/0"}),
        _field("unit", ["norm"]),
    ],
)
def test_hostile_labels(saved: Path, labels: Callable[[Any], Any]):
    _rewrite(saved, labels)
    message = _refused(saved)
    assert "labels that cannot be decoded" in message or "expected a ContextMap" in message


def test_hostile_labels_are_refused_before_they_are_built(
    saved: Path, monkeypatch: pytest.MonkeyPatch
):
    # The type checker of the test run would refuse them too; users do not have it.
    for name, value in (("layers", "012"), ("heads", "01"), ("includes_residual", 1)):
        random_map().save(saved)
        _rewrite(saved, _field(name, value))
        with monkeypatch.context() as patch:
            patch.setattr(ContextMap, "__post_init__", lambda _: pytest.fail("was built"))
            assert f"ContextMap.'{name}' cannot be a {type(value).__name__}" in _refused(saved)


def test_hostile_tokens(saved: Path):
    def change(labels: Any) -> Any:
        labels["fields"]["target"]["fields"]["sides"] = {"tuple": [{"tuple": ["decoder", 9]}]}
        return labels

    _rewrite(saved, change)
    assert "Tokens cannot be built" in _refused(saved)


def test_hostile_numbers_are_refused_by_the_map_itself(saved: Path):
    tensors = safetensors.torch.load_file(saved)
    tensors["tensor_0"] -= 1
    safetensors.torch.save_file(tensors, saved, metadata={"tl_contextmix": "1"})
    assert "are not scores" in _refused(saved)


# Registering


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_CLASSES", dict(storage._CLASSES))


@pytest.mark.usefixtures("registry")
def test_a_name_belongs_to_one_class():
    other = type("Tokens", (), {"__module__": "elsewhere"})
    with pytest.raises(InvalidInput, match=r"cannot register elsewhere.Tokens: got the name of"):
        storage.storable(other)
    again = type("Tokens", (), {"__module__": Tokens.__module__})
    assert storage.storable(again) is again  # a module that is loaded again


@dataclasses.dataclass(frozen=True)
class Everything:
    """What an annotation of a stored field may be."""

    some: Any
    number: float
    maybe: str | None
    mapping: dict[str, int]
    listed: list[tuple[str, float]]
    empty: tuple[int, ...] = ()


@pytest.mark.usefixtures("registry")
def test_annotations_that_fields_may_have(tmp_path: Path):
    storage.storable(Everything)
    value = Everything({"x": [()]}, 1.5, None, {"a": 1}, [("b", 0.5)])
    path = storage.save(value, tmp_path / "file")
    assert storage.load(Everything, path) == value
    for name, wrong in (
        ("number", "1.5"),
        ("number", True),
        ("maybe", 1),
        ("mapping", {"dict": {"a": "1"}}),
        ("mapping", {"list": []}),
        ("listed", {"list": [{"tuple": ["b", 0.5, 1]}]}),
        ("listed", {"tuple": []}),
        ("empty", {"tuple": [None]}),
    ):
        storage.save(value, path)
        _rewrite(path, _field(name, wrong))
        with pytest.raises(FileFormatError, match=f"Everything.'{name}' cannot be a"):
            storage.load(Everything, path)


@pytest.mark.usefixtures("registry")
def test_a_field_added_later_takes_its_default(tmp_path: Path):
    storage.storable(Everything)
    value = Everything(1, 1.5, "x", {}, [])
    path = storage.save(value, tmp_path / "file")
    _rewrite(path, _without("empty"))
    assert storage.load(Everything, path) == value


@pytest.mark.parametrize("left", ["file", "folder", "nothing"])
def test_what_a_killed_writer_left_is_gone(tmp_path: Path, left: str):
    before, name = tmp_path / ".result.part", ".result.part"
    if left == "file":
        before.touch()
    elif left == "folder":
        before.mkdir()
        (before / ".tmpVa2P4d").touch()  # as safetensors names a file until it is whole
    with storage.replacing(tmp_path / "result", name) as part:
        (part.parent / ".tmpq7Xb1c").touch()
        part.write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["result"]
    assert (tmp_path / "result").read_text() == "whole"
