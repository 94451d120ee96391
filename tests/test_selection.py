"""Parts and differences of results: positions of the input, tokens, NumPy, xarray, old files."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import hand_built
import numpy as np
import pandas
import pytest
import torch
from hand_built import map_of, random_map, sentence, tokens

import tl_contextmix as cm
from tl_contextmix import results
from tl_contextmix.adapters.verification.identity_report import IdentityReport
from tl_contextmix.errors import ContextMixError, InvalidInput
from tl_contextmix.evaluation import agreement, cue_alignment
from tl_contextmix.plotting.panels import Heatmap
from tl_contextmix.results import (
    ContextMap,
    Decomposition,
    LayerFigures,
    LayerwiseDecoding,
    LayerwiseLikelihood,
    LayerwiseScores,
    Memories,
    Result,
    TokenFigures,
    TokenMemory,
    Tokens,
    storage,
)
from tl_contextmix.results.labelled_arrays import LabelledArray

pytestmark = pytest.mark.once

FILES = sorted((Path(__file__).parent / "data/v1").glob("*.safetensors"))
ARRAYS: dict[type, Any] = {
    type(one): one
    for one in (*map(Result.load, FILES), *hand_built.one_of_each())
    if isinstance(one, LabelledArray)
}
EACH = [pytest.param(one, id=kind.__name__) for kind, one in ARRAYS.items()]


def agreement_map() -> ContextMap:
    words = sentence("The", " keys", " to", " the", " cabinet", " and", " the", " keys")
    return map_of(torch.rand(1, 2, 2, 8, 8, dtype=torch.float64), words)


# Positions


def test_positions_stay_those_of_the_input_after_any_selection():
    map = random_map(2, 3, 2, 6)
    part = map.select(target=[5, 2], source=range(1, 5))
    again = part.select(target=2, source=[4, -4])
    assert torch.equal(again.scores, map.scores[:, :, :, 2:3][..., [4, 1]])
    assert "target 1 at 2, source 2 at 4, 1" in repr(again)
    frame = again.to_dataframe()
    assert (set(frame.target), set(frame.source)) == ({2}, {1, 4})
    for row in [*again.top(3), *frame.to_dict("records")]:
        axes = {axis: row[axis] for axis in map.axes}
        for whole in (map, part, again):
            assert whole.select(**axes).scores.item() == row["score"]
    for panel in again.panels():
        assert isinstance(panel, Heatmap)
        assert (panel.row_positions, panel.column_positions) == ((2,), (4, 1))
    with pytest.raises(
        InvalidInput, match=r"target axis: got 0; expected one of \[5, 2\], or -2 to"
    ):
        part.select(target=0)
    assert part.target.positions().tolist() == [[5, 2]] * 2


def test_positions_of_both_stacks_stay_apart():
    words = tokens(2, 3)
    map = map_of(torch.rand(2, 1, 1, 3, 7), words, words.cat(tokens(2, 4, side="encoder")))
    encoder = map.select(source="encoder")
    assert set(encoder.to_dataframe().source) == {3, 4, 5, 6}
    assert torch.equal(encoder.select(source=5).scores, map.select(source=5).scores)
    both = map.select(source=[1, "encoder"])
    assert both.source.labels() == (1, 3, 4, 5, 6)
    assert both.source.sides == (("decoder", 1), ("encoder", 4))


def test_positions_survive_files(tmp_path: Path):
    part = random_map(2, 1, 1, 5).select(target=[4, 1])
    loaded = ContextMap.load(part.save(tmp_path / "part"))
    assert loaded.equals(part)
    assert loaded.target.labels() == (4, 1)


def test_heads_keep_the_model_s_numbers():
    part = random_map(head=4).select(head=[3, 1])
    assert part.select(head=1).heads == part.select(head="1").heads == ("1",)
    with pytest.raises(InvalidInput, match=r"head axis: got 0; expected one of \['3', '1'\]"):
        part.select(head=0)
    grouped = random_map(head=2, heads=("0+1", "2"))
    assert grouped.select(head=1).heads == ("2",)


@pytest.mark.parametrize("result", EACH)
def test_every_array_can_be_cut(result: Any):
    """Each axis in turn, forwards and backwards: the array and its table follow."""
    whole = np.asarray(result)
    assert whole.shape == tuple(getattr(result, result._array).shape)
    for dim, axis in enumerate(result.axes):
        places = [*range(whole.shape[dim])][::-1]
        labels = result._labels(axis)
        numbers = [*(labels.labels() if isinstance(labels, Tokens) else labels)]
        part = result.select(**{axis: numbers[::-1]})
        assert np.array_equal(np.asarray(part), whole.take(places, dim), equal_nan=True)
        labelled = axis in result.LABELS and axis not in ("batch", "component")
        back = part.select(**{axis: numbers if labelled else places})
        assert back.equals(result)
        assert np.asarray(result.select(**{axis: numbers[0]})).shape[dim] == 1


def test_a_part_of_a_decoding_has_its_texts():
    found = ARRAYS[LayerwiseDecoding]
    part = found.select(layer=1)
    assert part.texts == ((found.texts[0][1],),)
    assert part.to_dataframe().to_dict("records") == found.to_dataframe().to_dict("records")[1:]
    likelihood = ARRAYS[LayerwiseLikelihood]
    pos = likelihood.select(pos=[2, 0]).to_dataframe()
    whole = likelihood.to_dataframe()
    kept = pandas.concat(
        [whole[(whole.layer == n) & (whole.pos == p)] for n in (0, 1) for p in (2, 0)]
    )
    pandas.testing.assert_frame_equal(pos, kept.reset_index(drop=True))


def test_memories_at_positions_of_the_input():
    found = ARRAYS[Memories]
    part = found.select(pos=[3, 1])
    pandas.testing.assert_frame_equal(part.top(2, pos=3), found.top(2, pos=3))
    pandas.testing.assert_frame_equal(part.top(2), found.top(2, pos=1))
    with pytest.raises(InvalidInput, match="pos axis: got 0"):
        part.top(2, pos=0)


# Tokens


def test_tokens_select_all_their_occurrences():
    map = agreement_map()
    part = map.select(target=" cabinet", source=[" keys", 0, " to"])
    assert part.source.labels() == (1, 7, 0, 2)
    assert part.target.labels() == (4,)
    assert torch.equal(part.scores, map.scores[:, :, :, [4]][..., [1, 7, 0, 2]])
    assert part.select(source=" keys").source.labels() == (1, 7)


def test_tokens_that_are_not_there_are_refused_with_near_ones():
    map = agreement_map()
    for asked, near in (
        ("cabinet", "' cabinet'"),
        (" cabinets", "' cabinet'"),
        ("the", "'The' or ' the'"),
    ):
        with pytest.raises(InvalidInput, match=f"Did you mean {near}.*\\?$"):
            map.select(target=asked)
    with pytest.raises(InvalidInput, match=r"got ' xyzzy'; .*its space included\.$"):
        map.select(source=[0, " xyzzy"])


def test_tokens_of_a_batch_stand_at_the_same_positions():
    first, second = ("a", " b", " c"), (" b", "a", " c")
    words = Tokens(
        torch.zeros(2, 3).long(), (first, second), torch.ones(2, 3).bool(), (("decoder", 3),)
    )
    map = map_of(torch.rand(2, 1, 1, 3, 3), words)
    assert map.select(source=" c").source.labels() == (2,)
    with pytest.raises(
        InvalidInput, match=r"got ' b', at \[1\] of row 0 and \[0\] of row 1; .*batch=0"
    ):
        map.select(source=" b")
    assert map.select(batch=1, source=" b").source.labels() == (0,)


def test_a_token_of_padding_is_none():
    words = tokens(1, 4, padding=1)
    with pytest.raises(InvalidInput, match="got 'd0.3'"):
        map_of(torch.rand(1, 1, 1, 4, 4), words).select(target="d0.3")


# Differences


def test_a_difference_is_a_signed_map():
    a, b = (
        random_map(head=2, padding=1, bias=True),
        random_map(head=2, padding=1, bias=True, seed=1),
    )
    found = a - b
    assert torch.equal(found.scores, a.scores - b.scores)
    assert found.bias is not None
    assert a.bias is not None
    assert b.bias is not None
    assert torch.equal(found.bias, a.bias - b.bias)
    assert (found.signed, found.unit) == (True, "difference of norm")
    assert repr(found).startswith(
        "Difference of ContextMap by_hand at block_out (decoder), difference"
    )
    assert found.provenance.options["minus"]["method"] == "by_hand"
    assert (b - a).equals(dataclasses.replace(b - a, scores=-found.scores, bias=-found.bias))
    sizes = [abs(row["score"]) for row in found.top(5)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == float(found.scores.abs().max())
    panels: Any = found.panels()
    assert min(float(panel.values.min()) for panel in panels) < 0
    assert found.select(layer=0).mean().words().signed
    assert (a - random_map(head=2, padding=1, seed=1)).bias is None
    assert (a.mean() - b.select(head=1)).heads == ("mean - 1",)
    with pytest.raises(InvalidInput, match=r"head axis: \['1', '0'\]; expected as in the first"):
        _ = a - b.select(head=[1, 0])
    points = a - dataclasses.replace(b, point="mlp_out")
    assert points.point == "block_out - mlp_out"


def test_differences_are_saved_cited_and_shown(tmp_path: Path):
    model = cm.load_demo("causal-lm")
    text = "the cat sees"
    found = cm.attention(model, text, heads=False).normalize() - cm.alti(model, text).normalize()
    assert found.unit.startswith("difference of attention weight / row sum and ")
    assert ContextMap.load(found.save(tmp_path / "map")).equals(found)
    assert {"abnar2020quantifying", "ferrando2022measuring"} <= {
        line.split("{")[1].strip(",") for line in cm.cite(found).splitlines() if "@" in line
    }
    assert "attention - alti at " in repr(found)
    assert found.panels()[0].title.startswith("Attention minus ALTI, ")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"layers": (0, 1, 3)}, r"layer axis: \[0, 1, 3\]; expected as in the first, \[0, 1, 2\]"),
        ({"unit": "cosine distance"}, "unit: 'cosine distance'"),
        ({"normalized": "sum"}, "normalized: 'sum'"),
        ({"from_input": True}, "from_input: True"),
        ({"target": tokens(2, 5, side="encoder")}, "stacks of the target axis"),
        ({"signed": True}, "signed: True"),
    ],
)
def test_what_does_not_agree_is_not_subtracted(other: dict[str, Any], message: str):
    map = random_map()
    with pytest.raises(InvalidInput, match=f"cannot be subtracted: got {message}"):
        _ = map - dataclasses.replace(map, **other)


def test_other_tokens_are_not_subtracted():
    map: Any = random_map()
    with pytest.raises(InvalidInput, match="rows and tokens of the target axis"):
        _ = map - random_map(target=4)
    with pytest.raises(InvalidInput, match="padding of the target axis"):
        _ = map - random_map(padding=1)
    with pytest.raises(InvalidInput, match="positions of the source axis"):
        _ = map.select(source=[0, 1]) - map.select(source=[1, 2])
    with pytest.raises(TypeError, match="unsupported operand"):
        _ = map - map.scores


def test_a_minimal_pair_is_labelled_with_both_words():
    words = [sentence("the", " key", " is"), sentence("the", " keys", " are")]
    one, other = (map_of(torch.rand(3, 3), word) for word in words)
    assert (one - other).target.strings == (("the", " key| keys", " is| are"),)


def test_what_needs_scores_from_0_refuses_a_difference():
    map = random_map(2, 3, 1, 4)
    difference = map - random_map(2, 3, 1, 4, seed=3)
    for refused, name in (
        (difference.normalize, "normalize"),
        (difference.rollout, "rollout"),
        (lambda: cue_alignment(difference, [[0], [0]]), "an evaluation"),
        (lambda: agreement(difference, map), "an evaluation"),
    ):
        with pytest.raises(InvalidInput, match=f"^{name} needs a map of scores from 0: got a diff"):
            refused()
    with pytest.raises(InvalidInput, match="not zero at padding"):
        dataclasses.replace(difference, target=tokens(2, 4, padding=1))


@pytest.mark.parametrize("kind", [LayerFigures, TokenFigures, TokenMemory, Decomposition])
def test_other_differences(kind: type[Any]):
    one = ARRAYS[kind]
    field = one._array
    other = dataclasses.replace(one, **{field: getattr(one, field) * 0.5})
    found: Any = one - other
    assert np.allclose(np.asarray(found), np.asarray(one) / 2, equal_nan=True)
    assert found.is_difference
    assert not one.is_difference
    assert repr(found).startswith(f"Difference of {kind.__name__}")
    assert found.panels()
    if hasattr(found, "title"):
        assert (found.title, found.unit) == ("Difference: Title", "difference of u")


def test_decodings_have_no_difference():
    for kind in (LayerwiseDecoding, LayerwiseScores, Memories):
        with pytest.raises(TypeError, match="unsupported operand"):
            _ = ARRAYS[kind] - ARRAYS[kind]


# NumPy and xarray


def test_a_result_is_its_array():
    map = random_map(dtype=torch.bfloat16)
    assert np.asarray(map).dtype == np.float32
    assert np.asarray(map, dtype=np.float64).dtype == np.float64
    assert np.array_equal(np.asarray(map), map.scores.float().numpy())
    plain = random_map()
    assert np.shares_memory(np.asarray(plain), plain.scores.numpy())
    assert not np.shares_memory(np.array(plain), plain.scores.numpy())
    assert map.axes == ("batch", "layer", "head", "target", "source")


@pytest.mark.parametrize("result", EACH)
def test_every_array_becomes_a_data_set(result: Any):
    pytest.importorskip("xarray")
    found = result.to_xarray()
    assert found[result._array].dims == result.axes
    assert np.array_equal(found[result._array].values, np.asarray(result), equal_nan=True)
    assert {*result.COLUMNS.values()} <= {*found}
    if hasattr(result, "layers"):
        assert tuple(found.layer.values.tolist()) == result.layers


def test_a_data_set_has_the_labels():
    pytest.importorskip("xarray")
    map = random_map(head=2, padding=1, bias=True, layers=(2, 4, 7)).select(target=[3, 1])
    found = map.to_xarray()
    assert found.scores.sel(layer=4, head="1", target=3, source=0, batch=1).item() == float(
        map.scores[1, 1, 1, 0, 0]
    )
    assert found.target_token.sel(batch=1).values.tolist() == ["d1.3", "d1.1"]
    assert found.source_mask.sel(batch=0).values.tolist() == [True] * 4 + [False]
    assert found.bias.shape == (2, 3, 2, 2)
    assert found.attrs["unit"] == "norm"
    parts = hand_built.contributions()[0].to_xarray()
    assert parts.component_kind.values[0].tolist()[0] == "embed"
    scan = hand_built.scan()
    names = scan.to_dataframe().component[: scan.mean.shape[1]]
    assert scan.to_xarray().component_name.values.tolist() == [*names]


def test_without_xarray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "xarray", None)
    with pytest.raises(ContextMixError, match=r"pip install \"tl-contextmix\[xarray\]\""):
        random_map().to_xarray()


# Files of version 0.1.0


def test_there_is_a_file_of_every_class():
    named = {path.stem for path in FILES}
    known = {kind.__name__ for kind in storage._CLASSES.values() if issubclass(kind, Result)}
    later = {
        "AttentionKnockout",
        "AttributionGraph",
        "ContextReliance",
        "Differences",
        "FlowKnockout",
        "HeadDecomposition",
        "ProbedMaps",
        "Probing",
        "Scan",
        "ScoreContributions",
    }
    public = {name for name in known if hasattr(results, name)} - later
    assert public | {IdentityReport.__name__} == named
    assert sum(path.stat().st_size for path in FILES) < 100_000


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_files_of_version_1_load(path: Path, tmp_path: Path):
    result: Any = Result.load(path)
    assert type(result).__name__ == path.stem
    assert result.panels()
    assert repr(result)
    assert len(result.to_dataframe())
    assert type(result).load(result.save(tmp_path / "again")).equals(result)


def test_sources_can_be_left_out_of_the_scale() -> None:
    model = cm.load_demo("causal-lm")
    pattern = cm.attention(model, ["the keys to the cabinet", "the key near the door"])
    kept = pattern.scores.clone()
    kept[..., 0] = 0
    for exclude in (0, [0], "<|endoftext|>"):
        found = pattern.normalize(exclude=exclude)
        sums = found.scores.sum(-1)
        # The first row reads nothing else: it is not spread over what it cannot read.
        assert not sums[..., 0].any()
        torch.testing.assert_close(sums[..., 1:], torch.ones_like(sums[..., 1:]))
        divisor = kept.sum(-1, keepdim=True).clamp(min=1e-30)
        torch.testing.assert_close(found.scores, kept / divisor)
        assert found.unit == "attention weight without source 0 / row sum"
        assert found.provenance.options["exclude"] == [0]
    twice = pattern.normalize("max", exclude=[0, " the"])
    assert twice.provenance.options["exclude"] == [0, 1, 4]
    assert float(twice.scores[..., [0, 1, 4]].abs().max()) == 0
    assert float(twice.scores[..., 2:, :].amax(-1).min()) == pytest.approx(1)
    # Of part of a map, by the positions of the input.
    part = pattern.select(source=[1, 2, 3], target=[3])
    assert not part.normalize(exclude=2).scores[..., 1].any()
    with pytest.raises(cm.InvalidInput, match="9"):
        pattern.normalize(exclude=9)
    # What was left out is remembered by a file.
    assert "exclude" not in pattern.provenance.options
