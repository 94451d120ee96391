"""Results: they fit their labels, and every operation on them does what its name says."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import time
from typing import Any

import hand_built
import pandas
import pytest
import torch
import unchecked
from hand_built import PROVENANCE, map_of, random_map, tokens

import tl_contextmix as cm
from tl_contextmix.errors import ContextMixWarning, InvalidInput
from tl_contextmix.plotting.panels import Bars, ColoredText, Heatmap, Table
from tl_contextmix.results import (
    ContextMap,
    Decomposition,
    LayerFigures,
    Pair,
    PairChanges,
    TokenFigures,
)

pytestmark = pytest.mark.once

EACH = [pytest.param(result, id=f"{type(result).__name__}-{index}")
        for index, result in enumerate(hand_built.one_of_each())]  # fmt: skip
NAN = float("nan")


# Labels and shapes


@pytest.mark.parametrize(
    "changes",
    [
        {"layers": (0, 1)},
        {"heads": ("0", "1", "2")},
        {"target": tokens(2, 4)},
        {"target": tokens(3, 5)},
        {"source": tokens(2, 6)},
        {"source": tokens(1, 5)},
        {"scores": torch.zeros(2, 3, 2, 5, 4)},
        {"bias": torch.zeros(2, 3, 1, 5)},
        {"bias": torch.zeros(2, 3, 2, 4)},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_maps_that_do_not_fit_their_labels_are_refused(changes: dict[str, Any]):
    # Two axis lengths that disagree are seen by whichever check comes first.
    with pytest.raises((InvalidInput, TypeError), match="does not fit|Type-check"):
        dataclasses.replace(random_map(head=2, dtype=torch.float32), **changes)


@pytest.mark.parametrize("lowest", [-1e-9, -1.0, -torch.inf])
@pytest.mark.parametrize("beside", [0.5, NAN])
def test_scores_below_zero_are_refused(lowest: float, beside: float):
    with pytest.raises(InvalidInput, match="not scores: got .*expected numbers from 0"):
        map_of(torch.tensor([[lowest, beside], [0.0, 1.0]]))


@pytest.mark.parametrize("value", [0.1, NAN])
@pytest.mark.parametrize("place", [(0, 2), (2, 0), (2, 2)])
def test_scores_at_padding_are_refused(place: tuple[int, int], value: float):
    words = tokens(2, 3, padding=1)
    scores = torch.zeros(2, 1, 1, 3, 3)
    scores[0, 0, 0][place] = value
    with pytest.raises(InvalidInput, match="not zero at padding: .* sentence 0"):
        dataclasses.replace(map_of(torch.zeros_like(scores), words), scores=scores)
    scores = scores.flip(0)  # the other sentence has no padding
    dataclasses.replace(map_of(torch.zeros_like(scores), words), scores=scores)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strings": (("a", "b"),)}, "1 rows"),
        ({"strings": (("a", "b"), ("c",))}, r"lengths \[1, 2\]"),
        ({"sides": (("decoder", 3),)}, r"lengths \[2, 3\]"),
        ({"sides": (("decoder", 3), ("encoder", -1))}, "-1"),
        ({"sides": ()}, r"lengths \[0, 2\]"),
        ({"mask": torch.ones(2, 3, dtype=torch.bool)}, "mask does not fit|Type-check"),
    ],
)
def test_tokens_that_do_not_fit_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises((InvalidInput, TypeError), match=message):
        dataclasses.replace(tokens(2, 2), **changes)


def test_other_results_check_their_labels():
    for result in hand_built.one_of_each():
        if hasattr(result, "layers"):
            with pytest.raises(InvalidInput, match="does not fit its labels"):
                dataclasses.replace(result, layers=(*result.layers, 9))
    figures = next(one for one in hand_built.one_of_each() if isinstance(one, LayerFigures))
    with pytest.raises(InvalidInput, match="LayerFigures.values does not fit"):
        dataclasses.replace(figures, quantities=("a",))


def test_components_are_of_known_kinds():
    six = hand_built.components()
    assert repr(six).startswith("Components: batch 2, component 6: ")
    with pytest.raises(InvalidInput, match=r"kinds from 90 to 99; expected 0 to \d+"):
        dataclasses.replace(six, kind=six.kind + 90)
    none = six.select(torch.zeros(2, 0, dtype=torch.long))
    assert none.kind.shape == (2, 0)
    empty = none.select(torch.full((2, 3), -1))
    assert empty.kind.shape == (2, 3)
    assert repr(none) == "Components: batch 2, component 0: "


# Frozen, comparable, copyable


@pytest.mark.parametrize("result", EACH)
def test_results_are_frozen_and_hashable(result: Any):
    name = dataclasses.fields(result)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(result, name, None)
    assert result == result
    assert len({result, copy.copy(result)}) == 2


@pytest.mark.parametrize("result", EACH)
def test_equals_sees_every_field(result: Any):
    assert result.equals(copy.deepcopy(result))
    assert result.equals(pickle.loads(pickle.dumps(result)))  # noqa: S301
    others = {
        "point": "other",
        "title": "other",
        "unit": "importance",
        "provenance": dataclasses.replace(PROVENANCE, options={"layer": 0}),
    }
    for field in dataclasses.fields(result):
        if field.name in others:
            changed = dataclasses.replace(result, **{field.name: others[field.name]})
            assert not result.equals(changed), field.name


def test_equals_sees_numbers_dtypes_and_nan():
    one = map_of(torch.tensor([[1.0, NAN], [0.5, 1.0]]))
    assert one.equals(map_of(torch.tensor([[1.0, NAN], [0.5, 1.0]])))
    assert not one.equals(map_of(torch.tensor([[1.0, NAN], [0.5, 1.0 + 1e-7]])))
    assert not one.equals(map_of(torch.tensor([[1.0, 0.0], [0.5, 1.0]])))
    assert not one.equals(dataclasses.replace(one, scores=one.scores.double()))
    assert not one.equals(dataclasses.replace(one, bias=torch.zeros(1, 1, 1, 2)))
    assert not one.equals(1)


def test_operations_leave_the_map_alone():
    map = random_map(head=2, padding=1, bias=True)
    before = copy.deepcopy(map)
    parts = [map.normalize(), map.mean(), map.select(), map.mean().rollout()]
    for look in (lambda: map.top(3), map.panels, map.to_dataframe, map.__repr__):
        look()
    for part in parts:
        part.scores.fill_(7)
    assert map.equals(before)


# Scaling


@pytest.mark.parametrize("how", ["sum", "max"])
def test_rows_are_scaled_and_biases_with_them(how: Any):
    map = random_map(2, 3, 2, 4, source=6, bias=True)
    scaled = map.normalize(how)
    rows = scaled.scores.sum(-1) if how == "sum" else scaled.scores.amax(-1)
    assert torch.allclose(rows, torch.ones_like(rows), rtol=0, atol=1e-15)
    assert map.bias is not None
    ratio = map.scores[..., 0] / map.bias
    assert scaled.bias is not None
    assert torch.allclose(scaled.scores[..., 0] / scaled.bias, ratio, rtol=1e-13)
    assert (scaled.normalized, scaled.unit) == (
        how,
        {"sum": "norm / row sum", "max": "norm / row maximum"}[how],
    )
    assert scaled.normalize(how).scores.allclose(scaled.scores, rtol=0, atol=1e-15)
    assert scaled.scores.dtype == torch.float64


@pytest.mark.parametrize("how", ["sum", "max"])
def test_rows_without_numbers_keep_saying_so(how: Any):
    bias = torch.tensor([2.0, 2.0, 2.0])[None, None, None]
    rows = [[0.0, 0.0, 0.0], [1.0, NAN, 1.0], [0.0, 2.0, 2.0]]
    scaled = map_of(torch.tensor(rows), bias=bias).normalize(how)
    assert scaled.scores[0, 0, 0, 0].tolist() == [0, 0, 0]
    assert scaled.scores[0, 0, 0, 1].isnan().all()
    assert scaled.scores[0, 0, 0, 2].isfinite().all()
    assert scaled.bias[0, 0, 0].isnan().tolist() == [False, True, False]


def test_tiny_and_padded_rows_are_scaled():
    tiny = map_of(torch.tensor([[1e-30, 3e-30], [0.0, 5e-30]])).normalize()
    assert torch.allclose(tiny.scores[0, 0, 0], torch.tensor([[0.25, 0.75], [0, 1]]))
    padded = random_map(2, 1, 1, 4, padding=2).normalize()
    assert padded.scores.sum(-1)[:, 0, 0].round(decimals=9).tolist() == [[1, 1, 0, 0], [1] * 4]


def test_heads_are_averaged():
    map = random_map(head=3, bias=True)
    mean = map.mean("head")
    assert torch.allclose(mean.scores[:, :, 0], map.scores.sum(2) / 3)
    assert torch.allclose(mean.bias[:, :, 0], map.bias.sum(2) / 3)
    assert mean.heads == ("mean",)


# Selecting


@pytest.mark.parametrize(
    ("asked", "places"),
    [
        ({}, {}),
        ({"batch": 1}, {0: [1]}),
        ({"batch": [-1, 0]}, {0: [1, 0]}),
        ({"layer": 4}, {1: [1]}),
        ({"layer": [7, 2]}, {1: [2, 0]}),
        ({"layer": -1}, {1: [2]}),
        ({"layer": [-3, -2]}, {1: [0, 1]}),
        ({"head": 9}, {2: [1]}),
        ({"head": "8"}, {2: [0]}),
        ({"head": ["9", -2]}, {2: [1, 0]}),
        ({"target": range(1, 3)}, {3: [1, 2]}),
        ({"target": -1}, {3: [3]}),
        ({"source": (5, -6, 5)}, {4: [5, 0, 5]}),
        ({"batch": 0, "layer": 2, "head": -1, "target": 0, "source": [1]},
         {0: [0], 1: [0], 2: [1], 3: [0], 4: [1]}),
    ],
    ids=str,
)  # fmt: skip
def test_select_is_indexing(asked: dict[str, Any], places: dict[int, list[int]]):
    map = random_map(2, 3, 2, 4, source=6, bias=True, layers=(2, 4, 7), heads=("8", "9"))
    part = map.select(**asked)
    expected, bias = map.scores, map.bias
    for axis, indices in places.items():
        expected = expected.index_select(axis, torch.tensor(indices))
        bias = bias if axis == 4 else bias.index_select(axis, torch.tensor(indices))
    assert torch.equal(part.scores, expected)
    assert part.bias is not None
    assert bias is not None
    assert torch.equal(part.bias, bias)

    def kept(axis: int, labels: Any) -> Any:
        return tuple(labels[index] for index in places.get(axis, range(len(labels))))

    assert part.layers == kept(1, map.layers)
    assert part.heads == kept(2, map.heads)
    rows = [kept(3, row) for row in kept(0, map.target.strings)]
    assert part.target.strings == tuple(rows)
    columns = [kept(4, row) for row in kept(0, map.source.strings)]
    assert part.source.strings == tuple(columns)
    assert part.source.mask.shape == part.source.ids.shape == part.scores.shape[::4]


def test_layers_of_a_part_keep_their_numbers():
    map = random_map(layer=4)
    part = map.select(layer=[3, 1])
    assert part.layers == (3, 1)
    assert torch.equal(part.select(layer=1).scores, map.select(layer=1).scores)
    assert part.select(layer=-1).layers == (1,)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"batch": 2}, "batch axis: got 2; expected an integer from -2 to 1"),
        ({"batch": -3}, "got -3"),
        ({"head": 2}, r"head axis: got 2; .* from -2 to 1, or one of \['0', '1'\]"),
        ({"head": "2"}, "got '2'"),
        ({"target": 5}, "target axis"),
        ({"source": [0, 9]}, "source axis: got 9"),
        ({"layer": 3}, r"layer axis: got 3; expected an integer from -3 to 2"),
        ({"layer": -4}, "layer axis: got -4"),
        ({"layer": True}, "got True; expected integers"),
        ({"target": [False, True]}, "got False; expected integers"),
        ({"batch": []}, "got 'an empty list'; expected at least one entry"),
        ({"layer": ()}, "at least one entry"),
        ({"head": []}, "at least one entry"),
        ({"target": []}, "at least one entry"),
        ({"source": []}, "at least one entry"),
        ({"source": "encoder"}, r"got 'encoder'; .* of the sides \['decoder'\]"),
        ({"source": [0, "d9.9"]}, r"got 'd9.9'; expected one of the tokens \['d0.0', "),
        ({"pos": 0}, r"no such axis: got 'pos'; .*'target', 'source'"),
    ],
)
def test_what_is_not_there_cannot_be_selected(asked: dict[str, Any], message: str):
    with pytest.raises(InvalidInput, match=message):
        random_map(head=2).select(**asked)


def test_padding_can_be_selected_and_stays_padding():
    map = random_map(2, 1, 1, 5, padding=2)
    part = map.select(target=[4, 0], source=[3, 1])
    assert part.target.mask.tolist() == [[False, True], [True, True]]
    assert part.scores[0, 0, 0].tolist() == [[0, 0], [0, float(map.scores[0, 0, 0, 0, 1])]]
    assert len(part.to_dataframe()) == 1 + 4
    with pytest.warns(
        ContextMixWarning, match=r"every target selected of row 0 is padding.*\[4\].*its 1 tok"
    ):
        nothing = part.select(batch=0, target=4)
    assert not nothing.to_dataframe().size
    assert nothing.top() == []
    (panel,) = nothing.panels()
    assert isinstance(panel, Heatmap)
    assert panel.values.shape == (1, 0, 1)


def test_a_side_of_the_source_axis_is_selected_by_name():
    words = tokens(2, 3)
    both = words.cat(tokens(2, 4, side="encoder"))
    map = map_of(torch.rand(2, 2, 1, 3, 7), words, both)
    own, other = map.select(source="decoder"), map.select(source="encoder")
    assert torch.equal(torch.cat([own.scores, other.scores], dim=-1), map.scores)
    assert own.source.equals(own.target)
    assert other.source.sides == (("encoder", 4),)
    with pytest.raises(InvalidInput, match="got 'encoder'"):
        own.select(source="encoder")


def test_tokens_keep_their_sides_in_any_order():
    both = tokens(1, 2).cat(tokens(1, 2, side="encoder"))
    mixed = both.select([0], [3, 0, 2, 1, 1])
    assert mixed.sides == (
        ("encoder", 1),
        ("decoder", 1),
        ("encoder", 1),
        ("decoder", 2),
    )
    assert mixed.strings == (("e0.1", "d0.0", "e0.0", "d0.1", "d0.1"),)
    assert mixed.side("encoder") == [0, 2]
    assert mixed.side("decoder") == [1, 3, 4]
    assert mixed.select([0], mixed.side("encoder")).sides == (("encoder", 2),)
    assert mixed.side("elsewhere") == []


def test_tokens_are_equal_by_ids_padding_and_sides():
    assert tokens(2, 3).equals(tokens(2, 3))
    assert not tokens(2, 3).equals(tokens(2, 3, first=1))
    assert not tokens(2, 3).equals(tokens(2, 3, padding=1))
    assert not tokens(2, 3).equals(tokens(2, 3, side="encoder"))
    assert not tokens(2, 3).equals(tokens(1, 3))


# Ranking


@pytest.mark.parametrize("k", [1, 7, 10_000])
def test_top_is_a_stable_sort(k: int):
    map = random_map(2, 2, 2, 4, padding=1, layers=(3, 5))
    # One decimal: most scores are tied with others.
    map = dataclasses.replace(map, scores=map.scores.round(decimals=1))
    table = map.to_dataframe().to_dict("records")
    expected = sorted(table, key=lambda row: -row["score"])[:k]
    assert map.top(k) == expected
    for row in map.top(k)[:5]:
        axes = ("batch", "layer", "head", "target", "source")
        assert map.select(**{axis: row[axis] for axis in axes}).scores.item() == row["score"]


def test_top_leaves_out_nan_and_keeps_zeros():
    map = map_of(torch.tensor([[NAN, 0.0], [torch.inf, NAN]]))
    assert [row["score"] for row in map.top()] == [torch.inf, 0.0]


@pytest.mark.parametrize("k", [0, -1, True])
def test_top_of_nothing_is_refused(k: int):
    with pytest.raises(InvalidInput, match=f"got k={k}; expected a positive integer"):
        random_map().top(k)


# Tables


def test_a_table_has_one_row_per_score():
    map = random_map(2, 2, 2, 3, source=4, padding=1, layers=(1, 5), heads=("a", "b"))
    rows = []
    for b in range(2):
        for layer_index, layer in enumerate((1, 5)):
            for h, head in enumerate("ab"):
                for t in range(3):
                    for s in range(4):
                        if map.target.mask[b, t]:
                            score = float(map.scores[b, layer_index, h, t, s])
                            row = (b, layer, head, t, s, f"d{b}.{t}", f"e{b}.{s}", score)
                            rows.append(row)
    names = ["batch", "layer", "head", "target", "source", "target_token", "source_token", "score"]
    table = map.to_dataframe()
    pandas.testing.assert_frame_equal(table, pandas.DataFrame(rows, columns=names))
    assert table.dtypes[["batch", "layer", "target", "source"]].eq("int64").all()


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [(torch.float64, "float64"), (torch.float32, "float32"), (torch.bfloat16, "float32")],
)
def test_scores_keep_their_dtype_where_pandas_has_it(dtype: torch.dtype, kept: str):
    map = random_map(dtype=dtype)
    assert map.to_dataframe()["score"].dtype == kept
    assert torch.equal(
        torch.tensor(map.to_dataframe()["score"].to_numpy()).to(dtype), map.scores.flatten()
    )


def test_scores_that_carry_gradients_can_be_used():
    scores = torch.rand(1, 2, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    map = dataclasses.replace(random_map(1, 2, 1, 3), scores=scores)
    plain = dataclasses.replace(map, scores=scores.detach())
    assert map.top(4) == plain.top(4)
    assert repr(map) == repr(plain)
    assert map.causal is plain.causal
    pandas.testing.assert_frame_equal(map.to_dataframe(), plain.to_dataframe())
    assert repr(map.panels()) == repr(plain.panels())
    assert map.equals(plain)
    map.rollout().normalize("max").scores.sum().backward()
    assert scores.grad is not None


def test_large_maps_become_tables_fast():
    map = random_map(1, 12, 12, 128, dtype=torch.float32, padding=2)
    start = time.process_time()
    table = map.to_dataframe()
    # 0.4 s of a processor; a row at a time takes minutes.
    assert time.process_time() - start < 10
    assert table.shape == (144 * 126 * 126, 8)


# Looking


def test_a_text_representation_is_short_and_reads_no_large_map(monkeypatch: pytest.MonkeyPatch):
    small, large = random_map(head=2, layers=(2, 4, 7)), random_map(1, 4, 4, 300)
    best = small.top(1)[0]
    first, second, *more = repr(small).splitlines()
    assert first == (
        "ContextMap by_hand at block_out (decoder), norm: "
        "batch 2, layer 3, head 2, target 5, source 5"
    )
    assert f"layer {best['layer']}, head {best['head']}" in second
    assert f"{best['source_token']!r} -> {best['target_token']!r}" in second
    assert len(more) == 4
    monkeypatch.setattr(ContextMap, "top", lambda *_: pytest.fail("read a large map"))
    assert len(repr(large)) < 200


@pytest.mark.parametrize("result", EACH)
def test_no_text_representation_prints_tensors(result: Any):
    assert len(repr(result)) < 1000
    assert "tensor(" not in repr(result)


def test_tokens_print_a_few_words():
    both = tokens(1, 300).cat(tokens(1, 2, side="encoder"))
    assert repr(both).startswith("Tokens: batch 1, pos 300 decoder + 2 encoder: 'd0.0', 'd0.1'")
    assert repr(both).endswith("...")
    assert repr(tokens(1, 1)) == "Tokens: batch 1, pos 1 decoder: 'd0.0'"


def test_causal_is_seen_on_square_maps_of_one_text():
    assert random_map(causal=True).causal
    assert random_map(causal=True, padding=2).causal
    assert random_map(1, 1, 1, 1).causal
    assert not random_map().causal
    assert not random_map(causal=True, source=6).causal
    causal = random_map(head=2, causal=True)
    assert not dataclasses.replace(causal, source=tokens(2, 5, first=100)).causal
    assert causal.select(target=[2, 3, 4], source=[2, 3, 4]).causal
    later = causal.scores.clone()
    later[1, 2, 1, 3, 4] = 1e-30
    assert not dataclasses.replace(causal, scores=later).causal


def test_a_map_is_shown_sentence_by_sentence_without_padding():
    map = random_map(2, 2, 2, 4, padding=1, left=True, causal=True, layers=(3, 5))
    first, second = map.panels()
    assert isinstance(first, Heatmap)
    assert isinstance(second, Heatmap)
    assert first.sheets == ("L3H0", "L3H1", "L5H0", "L5H1")
    assert first.rows == first.columns == ("d0.1", "d0.2", "d0.3")
    assert second.rows == ("d1.0", "d1.1", "d1.2", "d1.3")
    assert torch.equal(first.values[2], map.scores[0, 1, 0, 1:, 1:])
    assert torch.equal(second.values[1], map.scores[1, 0, 1])
    assert first.causal
    assert first.unit == "norm"


def test_a_rectangular_map_is_shown():
    (panel,) = random_map(1, 2, 1, 3, source=5).normalize("max").panels()
    assert isinstance(panel, Heatmap)
    assert panel.values.shape == (2, 3, 5)
    assert panel.sheets == ("layer 0", "layer 1")
    assert (panel.rows[0], panel.columns[-1]) == ("d0.0", "e0.4")
    assert not panel.causal
    assert "divided by its maximum" in panel.caption
    assert panel.unit == "norm / row maximum"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_maps_on_a_gpu_do_the_same():
    here = random_map(2, 3, 1, 6, padding=2, bias=True)
    there = dataclasses.replace(here, scores=here.scores.cuda(), bias=here.bias.cuda())
    assert there.equals(here)
    assert there.top(5) == here.top(5)
    assert there.causal is here.causal
    assert repr(there.panels()) == repr(here.panels())
    pandas.testing.assert_frame_equal(there.to_dataframe(), here.to_dataframe())
    part = there.select(layer=[0, 1], target=[1, 0], source=[1, 0])
    assert part.equals(here.select(layer=[0, 1], target=[1, 0], source=[1, 0]))
    assert part.scores.is_cuda
    for one, other in (
        (there.normalize(), here.normalize()),
        (there.rollout(), here.rollout()),
        (there.rollout(add_identity=True), here.rollout(add_identity=True)),
    ):
        assert torch.allclose(one.scores.cpu(), other.scores, rtol=1e-12)


# The other classes


def _decomposition(padding: int = 0) -> Decomposition:
    target = tokens(2, 3, padding=padding)
    return Decomposition(
        parts=torch.randn(2, 2, 3, 4, 5),
        bias=torch.randn(2, 2, 3, 5),
        layers=(1, 2),
        point="attn_out",
        stack="cross",
        target=target,
        source=tokens(2, 4, side="encoder"),
        provenance=PROVENANCE,
    )


def test_a_decomposition_adds_up_and_has_norms():
    parts = _decomposition(padding=1)
    assert torch.allclose(parts.total(), sum(parts.parts.unbind(3)) + parts.bias, atol=1e-6)
    map = parts.norms()
    for row, target in ((0, 1), (1, 2)):
        for source in range(4):
            part = parts.parts[row, 1, target, source]
            assert float(map.scores[row, 1, 0, target, source]) == pytest.approx(float(part.norm()))
        bias = parts.bias[row, 1, target].norm()
        assert float(map.bias[row, 1, 0, target]) == pytest.approx(float(bias))
    assert not map.scores[0, :, :, 2].any()
    assert not map.bias[0, :, :, 2].any()
    assert (map.heads, map.layers, map.includes_residual) == (("all",), (1, 2), False)
    assert dataclasses.replace(parts, point="resid_mid").norms().includes_residual
    pandas.testing.assert_frame_equal(parts.to_dataframe(), map.to_dataframe())
    assert len(parts.panels()) == 2


def test_layer_figures_become_tables_and_bars():
    values = torch.tensor([[[1.0, NAN], [3, 4]], [[5, 6], [7, 8]]])
    figures = LayerFigures(values, (2, 3), ("FF", "LN"), "Title", "Caption", "unit", PROVENANCE)
    rows = [
        (b, layer, name, float(values[b, i, j]))
        for b in range(2)
        for i, layer in enumerate((2, 3))
        for j, name in enumerate(("FF", "LN"))
    ]
    expected = pandas.DataFrame(rows, columns=["batch", "layer", "quantity", "value"])
    expected["value"] = expected["value"].astype("float32")
    pandas.testing.assert_frame_equal(figures.to_dataframe(), expected)
    assert figures.panels()[1] == Bars(
        "Title",
        "Caption",
        ("layer 2", "layer 3"),
        (("FF", (5.0, 7.0)), ("LN", (6.0, 8.0))),
        "unit",
        axis="layer",
    )


def test_token_figures_become_tables_and_coloured_text():
    words = tokens(2, 3, padding=1)
    values = torch.tensor([[[0.1, 0.2, 0.0]], [[0.3, 0.4, 0.5]]], dtype=torch.float64)
    figures = TokenFigures(values, (4,), words, "Title", "Caption", "unit", PROVENANCE)
    rows = [(0, 4, 0, "d0.0", 0.1), (0, 4, 1, "d0.1", 0.2), (1, 4, 0, "d1.0", 0.3),
            (1, 4, 1, "d1.1", 0.4), (1, 4, 2, "d1.2", 0.5)]  # fmt: skip
    expected = pandas.DataFrame(rows, columns=["batch", "layer", "pos", "token", "value"])
    pandas.testing.assert_frame_equal(figures.to_dataframe(), expected)
    first, second = figures.panels()
    assert first == ColoredText("Title, layer 4", "Caption", ("d0.0", "d0.1"), (0.1, 0.2), "unit")
    assert isinstance(second, ColoredText)
    assert second.values == (0.3, 0.4, 0.5)


def test_pairs_become_tables():
    grown, shrunk = Pair(0, 1, 3, 2, "cat", "the", 0.25, 0.5), Pair(1, 0, 1, 0, "b", "a", 0.5, 0.25)
    # Two models at one point: the columns must stay apart.
    pairs = PairChanges((grown,), (shrunk, shrunk), "mlp_in", "mlp_in", "norm", PROVENANCE)
    table = pairs.to_dataframe()
    assert table["direction"].tolist() == ["amplified", "suppressed", "suppressed"]
    assert table["change"].tolist() == [0.25, -0.25, -0.25]
    assert table.loc[0, ["target_token", "source_token", "layer"]].tolist() == ["cat", "the", 1]
    first, second = pairs.panels()
    assert isinstance(first, Table)
    assert isinstance(second, Table)
    assert first.rows == ((0, 1, "the (2)", "cat (3)", 0.25, 0.5, 0.25),)
    assert first.title == "Pairs that changed most: amplified"
    assert len(second.rows) == 2
    assert len(set(first.columns)) == len(first.columns)


def test_no_pairs_are_still_a_table():
    none = PairChanges((), (), "a", "b", "norm", PROVENANCE)
    assert list(none.to_dataframe().columns)[:2] == ["direction", "batch"]
    assert none.to_dataframe().empty
    assert all(isinstance(panel, Table) and not panel.rows for panel in none.panels())


# Without the type checker of the test run, as users have it

_SETTING = """
import numpy as np
import torch
from hand_built import map_of, random_map, tokens
from tl_contextmix import amplified_pairs
from tl_contextmix.results import *
map = random_map(head=2)
"""
_REFUSED = {
    "map.normalize('row')": "expected one of ['sum', 'max']",
    "map.normalize(None)": "expected one of ['sum', 'max']",
    "map.mean('layer')": "got 'layer'; expected one of ['head']",
    "map.select(layer=1.0)": "got 1.0; expected integers",
    "map.select(layer='all')": "got 'all'; expected an integer from -3 to 2",
    "map.select(batch=torch.tensor(0.5))": "got 0.5; expected integers",
    "map.select(target=[None])": "got None; expected integers",
    "map.select(target=torch.tensor([True, False]))": "got True; expected integers",
    "map.select(source=slice(0, 2))": "got slice(0, 2, None); expected integers",
    "map.select(head={'0'})": "got {'0'}; expected integers",
    "map.top(2.5)": "got k=2.5; expected a positive integer",
    "map.top('3')": "got k='3'",
    "amplified_pairs(map, map, normalize='row')": "expected one of ['sum', 'max', 'none']",
    "amplified_pairs(map, map, k=2.0)": "this k: got 2.0",
    "map_of(torch.rand(2, 2), normalized='row')": "one of ['none', 'sum', 'max']",
    "random_map(layers=(0, 1))": "does not fit its labels",
    "Tokens(torch.zeros(1, 2).long(), (('a', 'b'),), torch.ones(1, 2).long(), (('encoder', 2),))":
        "got a mask of torch.int64",
}  # fmt: skip
_ACCEPTED = {
    "map.select(layer=np.int64(-1), head=np.array([1, 0])).layers": "(2,)",
    "map.select(layer=torch.tensor([2, 0]), target=torch.tensor(3)).layers": "(2, 0)",
    "map.select(batch=[np.int32(1)]).scores.shape[0]": "1",
}


@pytest.fixture(scope="module")
def answers() -> dict[str, list[str]]:
    return unchecked.answers(_SETTING, *_REFUSED, *_ACCEPTED)


@pytest.mark.parametrize("code", _REFUSED)
def test_wrong_types_end_in_invalid_input(answers: dict[str, list[str]], code: str):
    error, message = answers[code]
    assert error == "InvalidInput", message
    assert _REFUSED[code] in message


@pytest.mark.parametrize("code", _ACCEPTED)
def test_arrays_and_their_scalars_are_numbers_too(answers: dict[str, list[str]], code: str):
    assert answers[code] == ["", _ACCEPTED[code]]


def test_maps_of_two_prompts_are_subtracted_by_stretches() -> None:
    model = cm.load_demo("causal-lm")
    one, other = (
        cm.attention_norms(model, text, at="mlp_out")
        for text in ("the keys to the cabinet", "the key near the old cabinet")
    )
    mine, theirs = [(0, 1), (1, 3), (3, 6)], [(0, 1), (1, 3), (3, 7)]
    found = one.minus(other, mine, theirs)
    for row, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        for column, (c, d) in enumerate(zip(mine, theirs, strict=True)):
            expected = one.scores[..., slice(*a), slice(*c)].sum(-1).mean(-1)
            expected = expected - other.scores[..., slice(*b), slice(*d)].sum(-1).mean(-1)
            torch.testing.assert_close(found.scores[..., row, column], expected)
    assert found.signed
    assert found.is_difference
    assert found.target.strings[0][1] == " the keys| the key"
    # Equal tokens: as a - b.
    same = one.minus(one, mine, mine)
    assert float(same.scores.abs().max()) == 0
    named = one.minus(other, {"noun": " cabinet"}, {"noun": " cabinet"}, rows="max", columns="max")
    assert named.source.strings == (("noun",),)
    last = [
        cm.gradient_x_input(model, text, target=" are") for text in ("the keys", "the old keys")
    ]
    saliency = last[0].minus(last[1], [" keys"], [" keys"])
    expected = last[0].scores[..., -1] - last[1].scores[..., -1]
    torch.testing.assert_close(saliency.scores[..., 0], expected)
    refused: list[tuple[Any, str]] = [
        ((other, mine, theirs[:2]), "rows and tokens of the target axis"),
        ((other, [(1, 3), (0, 1)], theirs[:2]), "not stretches one after the other"),
        ((other.normalize(), mine, theirs), "normalized"),
        ((3, mine, theirs), "type: int"),
    ]
    for wrong, words in refused:
        with pytest.raises(cm.InvalidInput, match=words):
            one.minus(*wrong)
