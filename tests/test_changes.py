"""What components do to maps: against literal definitions, on built maps and on models."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import zoo
from hand_built import PROVENANCE, map_of, random_map

import tl_contextmix as cm
from tl_contextmix.core.model_view import StackName
from tl_contextmix.errors import InvalidInput
from tl_contextmix.methods.norm_changes import spearman
from tl_contextmix.results import ContextMap, PairChanges

NAN = float("nan")
POINTS: Any = ("resid_mid", "mlp_in", "mlp_out", "resid_post", "block_out")
Maps = dict[str, ContextMap]
Pairs = list[tuple[int, int]]

# The components by hand, apart from the table of the package.
POST_LN = {"FF": ("mlp_in", "mlp_out"), "RES": ("mlp_out", "resid_post"),
           "LN": ("resid_post", "block_out")}  # fmt: skip
PRE_LN = {"LN": ("resid_mid", "mlp_in"), "FF": ("mlp_in", "mlp_out"),
          "RES": ("mlp_out", "resid_post")}  # fmt: skip
PARALLEL = {"FF+RES": ("resid_mid", "resid_post")}


# Spearman


def _rho(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's correlation from its definition; None of the package's tricks."""

    def ranks(values: Sequence[float]) -> list[float]:
        return [
            sum(other < value for other in values)
            + (sum(other == value for other in values) + 1) / 2
            for value in values
        ]

    x, y = ranks(a), ranks(b)
    mean = (len(a) + 1) / 2
    product = sum((p - mean) * (q - mean) for p, q in zip(x, y, strict=True))
    squares = [sum((p - mean) ** 2 for p in one) for one in (x, y)]
    return product / math.sqrt(squares[0] * squares[1]) if all(squares) else NAN


@pytest.mark.parametrize("ties", [0, 3, 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("length", [2, 5, 60])
def test_spearman_is_its_definition(ties: int, dtype: torch.dtype, length: int):
    a, b = torch.rand(2, length, dtype=dtype)
    if ties:
        a, b = (a * ties).floor(), (b * ties).floor()
    found = spearman(a, b)
    assert found.dtype == dtype
    expected = _rho(a.tolist(), b.tolist())
    assert float(found) == pytest.approx(expected, abs=1e-6, nan_ok=True)
    stats = pytest.importorskip("scipy.stats")
    if not math.isnan(expected):
        assert float(found) == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-6)


def test_spearman_of_equal_and_reversed_orders_is_exact():
    for length in (2, 3, 100, 5000):
        values = torch.rand(length, dtype=torch.float64)
        assert float(spearman(values, values)) == 1
        assert float(spearman(values, values.exp())) == 1
        assert float(spearman(values, -values)) == -1
    assert float(spearman(torch.tensor([1.0, 2.0, 2.0]), torch.tensor([5.0, 7.0, 7.0]))) == 1


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]),
        ([1.0, 2.0], [0.0, 0.0]),
        ([1.0], [1.0]),
        ([], []),
        ([1.0, NAN, 2.0], [1.0, 2.0, 3.0]),
        ([1.0, 2.0, 3.0], [NAN, 2.0, 3.0]),
    ],
)
def test_spearman_without_an_order_is_nan(a: list[float], b: list[float]):
    assert math.isnan(spearman(torch.tensor(a), torch.tensor(b)))


# Maps of a block, built by hand


def _block(
    layout: str = "post-LN", *, batch: int = 2, layer: int = 3, target: int = 5, **options: Any
) -> Maps:
    """Random maps of every point of a block of the layout."""
    found = {
        point: random_map(batch, layer, 1, target, seed=seed, point=point, **options)
        for seed, point in enumerate(POINTS)
    }
    if layout != "post-LN":
        found["block_out"] = dataclasses.replace(found["resid_post"], point="block_out")
    if layout == "parallel":
        own = torch.eye(target, dtype=torch.float64)
        for point in ("mlp_in", "mlp_out"):
            found[point] = dataclasses.replace(found[point], scores=found[point].scores * own)
    return found


LAYOUTS = {"post-LN": POST_LN, "pre-LN": PRE_LN, "parallel": PARALLEL}


def _change_by_hand(
    maps: Maps, component: tuple[str, str], row: int, layer: int, pairs: Pairs
) -> float:
    flat = [
        [float(maps[point].scores[row, layer, 0, i, j]) for i, j in pairs] for point in component
    ]
    return 1 - _rho(*flat)


def _real_pairs(map: ContextMap, row: int) -> Pairs:
    return [
        (i, j)
        for i in map.target.mask[row].nonzero()[:, 0].tolist()
        for j in map.source.mask[row].nonzero()[:, 0].tolist()
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("padding", "left"), [(0, False), (2, True)])
@pytest.mark.parametrize("causal", [False, True])
def test_change_is_its_definition(layout: str, padding: int, left: bool, causal: bool):
    maps = _block(layout, padding=padding, left=left, causal=causal)
    found = cm.contextualization_change(maps)
    assert found.quantities == tuple(LAYOUTS[layout])
    for row in range(2):
        pairs = _real_pairs(maps["mlp_in"], row)
        pairs = [(i, j) for i, j in pairs if j <= i or not causal]
        for layer in range(3):
            for index, component in enumerate(LAYOUTS[layout].values()):
                expected = _change_by_hand(maps, component, row, layer, pairs)
                assert float(found.values[row, layer, index]) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("swapped", [False, True])
def test_zeros_of_one_map_only_count(swapped: bool):
    # The activation may put out a pair that attention mixed.
    numbers = [2.0, 1.0, 3.0], [0.0, 1.0, 3.0]
    maps = _block(batch=1, layer=1, target=2)
    for point, (a, b, c) in zip(
        ("mlp_in", "mlp_out"), numbers[:: -1 if swapped else 1], strict=True
    ):
        scores = torch.tensor([[a, 0.0], [b, c]], dtype=torch.float64)
        maps[point] = map_of(scores, point=point)
    expected = 1 - _rho(*numbers)
    assert float(cm.contextualization_change(maps).values[0, 0, 0]) == pytest.approx(expected)


def test_change_of_one_token_or_of_nan_is_nan():
    assert cm.contextualization_change(_block(target=1)).values.isnan().all()
    maps = _block(layer=2)
    maps["mlp_in"].scores[1, 0, 0, 2, 1] = NAN
    values = cm.contextualization_change(maps).values
    assert values[..., 0].isnan().tolist() == [[False, False], [True, False]]
    assert values[..., 1:].isfinite().all()


def test_the_layout_is_seen_through_rounding_and_nan():
    maps = _block("pre-LN")
    noise = 1 + 1e-6 * torch.randn_like(maps["block_out"].scores)
    noisy = dataclasses.replace(maps["block_out"], scores=maps["block_out"].scores * noise)
    assert cm.contextualization_change(maps | {"block_out": noisy}).quantities == tuple(PRE_LN)
    for point in ("resid_post", "block_out"):
        maps[point].scores[0, 0, 0, 1, 1] = NAN
    assert cm.contextualization_change(maps).quantities == tuple(PRE_LN)
    maps = _block("post-LN")
    near = dataclasses.replace(maps["block_out"], scores=maps["resid_post"].scores * 1.01)
    assert cm.contextualization_change(maps | {"block_out": near}).quantities == tuple(POST_LN)
    # One token attends to itself only, in any block.
    assert cm.contextualization_change(_block("pre-LN", target=1)).quantities == tuple(PRE_LN)


@pytest.mark.parametrize("method", [cm.contextualization_change, cm.cancellation])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_batch_is_its_sentences(method: Callable[[Maps], Any], layout: str):
    maps = _block(layout, padding=2)
    together = method(maps)
    for row in range(2):
        real = maps["mlp_in"].target.mask[row].nonzero()[:, 0].tolist()
        alone = {
            point: map.select(batch=row, target=real, source=real) for point, map in maps.items()
        }
        assert torch.allclose(
            method(alone).values[0], together.values[row], rtol=0, atol=1e-14, equal_nan=True
        )


@pytest.mark.parametrize("method", [cm.contextualization_change, cm.cancellation])
def test_maps_that_do_not_belong_together_are_refused(method: Callable[[Maps], Any]):
    maps = _block()
    wrong = {
        "a map at each of": [
            {point: map for point, map in maps.items() if point != "mlp_in"},
            maps | {"mlp_in": maps["mlp_out"]},
            {},
        ],
        "the same tokens on the axes": [
            maps | {"mlp_out": random_map(2, 3, 1, 6, point="mlp_out")},
            maps | {"mlp_out": random_map(2, 3, 1, 5, padding=1, point="mlp_out")},
            maps | {"mlp_out": random_map(2, 3, 1, 5, source=6, point="mlp_out")},
        ],
        "the same layers": [
            maps | {"mlp_out": random_map(2, 3, layers=(0, 1, 3), point="mlp_out")},
            maps | {"block_out": maps["block_out"].select(layer=[0, 2, 1])},
        ],
        "one map per layer": [
            maps | {"block_out": random_map(2, 3, 2, point="block_out")},
            {point: random_map(2, 3, 2, point=point) for point in POINTS},
        ],
        "both scaled alike": [maps | {"resid_post": maps["resid_post"].normalize()}],
    }
    for expected, cases in wrong.items():
        for case in cases:
            with pytest.raises(InvalidInput, match=f"be compared: got .*; expected {expected}"):
                method(case)


def test_provenance_names_the_method_and_no_single_point():
    maps = _block()
    for method in (cm.contextualization_change, cm.cancellation):
        found = method(maps).provenance
        assert found.method == method.__name__
        assert "at" not in found.options
        assert found.options["heads"] is False
        assert found.fingerprint == PROVENANCE.fingerprint


# Cancellation


def _shares(map: ContextMap, row: int, layer: int) -> list[float]:
    rows = map.scores[row, layer, 0].tolist()
    return [score / sum(scores) if sum(scores) else 0.0 for scores in rows for score in scores]


def _cancellation_by_hand(maps: Maps, before: str, row: int, layer: int) -> list[float]:
    start, middle, end = (
        _shares(maps[point], row, layer) for point in (before, "mlp_out", "block_out")
    )
    change = [m - s for s, m in zip(start, middle, strict=True)]
    rest = [e - m for m, e in zip(middle, end, strict=True)]
    product = sum(c * r for c, r in zip(change, rest, strict=True))
    squares = sum(c * c for c in change), sum(r * r for r in rest)
    pairs = [pair for pair in _real_pairs(maps[before], row)
             if maps[before].scores[row, layer, 0][pair] > 0]  # fmt: skip
    ratios = sorted(
        float(
            maps["mlp_out"].scores[row, layer, 0][pair] / maps[before].scores[row, layer, 0][pair]
        )
        for pair in pairs
    )
    return [
        product / math.sqrt(squares[0] * squares[1]),
        -product / squares[0],
        _change_by_hand(maps, (before, "mlp_out"), row, layer, pairs)
        - _change_by_hand(maps, (before, "block_out"), row, layer, pairs),
        ratios[(len(ratios) - 1) // 2],
    ]


@pytest.mark.parametrize(("layout", "before"), [("post-LN", "mlp_in"), ("pre-LN", "resid_mid")])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padding", [0, 2])
def test_cancellation_is_its_definition(layout: str, before: str, causal: bool, padding: int):
    maps = _block(layout, causal=causal, padding=padding)
    found = cm.cancellation(maps)
    assert found.quantities == ("cancel", "undone", "recover", "ff_res_ratio")
    for row in range(2):
        for layer in range(3):
            expected = _cancellation_by_hand(maps, before, row, layer)
            assert found.values[row, layer].tolist() == pytest.approx(expected, rel=1e-10)


def test_nothing_after_ff_undoes_nothing():
    maps = _block()
    maps["block_out"] = dataclasses.replace(maps["mlp_out"], point="block_out")
    cancel, undone, recover, _ = cm.cancellation(maps).values.unbind(-1)
    assert cancel.isnan().all()
    assert not undone.any()
    assert not recover.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_where_ff_changes_nothing_there_is_nothing_to_undo(dtype: torch.dtype):
    maps = _block(dtype=dtype)
    # Not twice: rounding must not pass for a change.
    maps["mlp_out"] = dataclasses.replace(maps["mlp_out"], scores=maps["mlp_in"].scores * 3)
    cancel, undone, recover, ratio = cm.cancellation(maps).values.unbind(-1)
    assert cancel.isnan().all()
    assert undone.isnan().all()
    assert bool((recover < 0).all())
    assert torch.allclose(ratio, torch.full_like(ratio, 3))


def test_parallel_blocks_have_no_cancellation():
    found = cm.cancellation(_block("parallel"))
    assert found.values.isnan().all()
    assert "parallel block" in found.caption


def test_a_ratio_of_norms_needs_norms():
    maps = {point: map.normalize() for point, map in _block().items()}
    with pytest.raises(InvalidInput, match=r"divided by their sum; .* Leave \.normalize\(\) out"):
        cm.cancellation(maps)
    assert cm.contextualization_change(maps).values.isfinite().all()


# Amplified pairs


def _pairs_by_hand(before: ContextMap, after: ContextMap, k: int, sign: int) -> list[Any]:
    found = []
    for row in range(before.scores.shape[0]):
        for index, layer in enumerate(before.layers):
            pairs = []
            for i, j in _real_pairs(before, row):
                old = float(before.scores[row, index, 0, i, j])
                new = float(after.scores[row, index, 0, i, j])
                if sign * (new - old) > 0:
                    pairs.append((-sign * (new - old), i, j, old, new))
            for _, i, j, old, new in sorted(pairs)[:k]:
                strings = before.target.strings[row][i], before.source.strings[row][j]
                found.append((row, layer, i, j, *strings, old, new))
    return found


def _as_tuples(changes: PairChanges) -> tuple[list[Any], list[Any]]:
    amplified, suppressed = (
        [dataclasses.astuple(pair) for pair in pairs]
        for pairs in (changes.amplified, changes.suppressed)
    )
    return amplified, suppressed


@pytest.mark.parametrize("normalize", ["sum", "max", "none"])
@pytest.mark.parametrize("k", [1, 4, 10**9])
@pytest.mark.parametrize("source", [None, 6])
def test_pairs_are_those_that_changed_most(normalize: Any, k: int, source: int | None):
    before, after = (
        random_map(2, 2, source=source, padding=2, layers=(3, 7), seed=seed) for seed in (1, 2)
    )
    found = cm.amplified_pairs(before, after, k=k, normalize=normalize)
    if normalize != "none":
        before, after = before.normalize(normalize), after.normalize(normalize)
    amplified, suppressed = _as_tuples(found)
    assert amplified == _pairs_by_hand(before, after, k, 1)
    assert suppressed == _pairs_by_hand(before, after, k, -1)
    assert found.unit == before.unit


def test_equal_changes_come_in_the_order_of_the_text():
    # Quarters are exact, so most changes are tied with others.
    before, after = (
        dataclasses.replace(map, scores=(map.scores * 4).floor() / 4)
        for map in (random_map(2, 2, 1, 9, seed=seed) for seed in (1, 2))
    )
    for k in (3, 20, 81):
        found = cm.amplified_pairs(before, after, k=k, normalize="none")
        amplified, suppressed = _as_tuples(found)
        assert amplified == _pairs_by_hand(before, after, k, 1)
        assert suppressed == _pairs_by_hand(before, after, k, -1)


def test_what_did_not_change_is_not_listed():
    map = random_map()
    none = cm.amplified_pairs(map, map)
    assert none.amplified == none.suppressed == ()
    assert cm.amplified_pairs(map, dataclasses.replace(map, scores=2 * map.scores)).amplified == ()
    scores = map.scores.clone()
    scores[0, 0, 0, 1, 1], scores[0, 0, 0, 2, 2] = NAN, 2.0
    found = cm.amplified_pairs(map, dataclasses.replace(map, scores=scores), normalize="none")
    assert [(pair.target, pair.source, pair.after) for pair in found.amplified] == [(2, 2, 2.0)]
    assert found.suppressed == ()


def test_parts_of_maps_have_the_positions_of_the_input():
    before, after = random_map(batch=1, seed=1), random_map(batch=1, seed=2)
    part = {"target": [2, 3], "source": [1, 2, 3]}
    maps = [map.select(**part) for map in (before, after)]
    found = cm.amplified_pairs(*maps, k=20, normalize="none").to_dataframe()
    whole = cm.amplified_pairs(before, after, k=10**6, normalize="none").to_dataframe()
    inside = whole[whole.target.isin(part["target"]) & whole.source.isin(part["source"])]
    assert found.equals(inside.reset_index(drop=True))
    block = {name: map.select(target=[1, 2]) for name, map in _block("parallel").items()}
    assert cm.contextualization_change(block).quantities == ("FF+RES",)


def test_pairs_name_what_was_compared():
    before, after = random_map(point="mlp_in"), random_map(point="mlp_out", seed=1)
    found = cm.amplified_pairs(before, after, k=2, normalize="max")
    assert (found.before, found.after) == ("mlp_in", "mlp_out")
    asked = {"before": "mlp_in", "after": "mlp_out", "k": 2, "normalize": "max"}
    assert asked.items() <= found.provenance.options.items()
    assert found.provenance.method == "amplified_pairs"


@pytest.mark.parametrize("k", [0, -3, True])
def test_a_number_of_pairs_is_positive(k: int):
    with pytest.raises(InvalidInput, match="expected an integer from 1"):
        cm.amplified_pairs(random_map(), random_map(), k=k)


def test_pairs_of_other_tokens_are_refused():
    with pytest.raises(InvalidInput, match="cannot be compared"):
        cm.amplified_pairs(random_map(), random_map(target=6))
    with pytest.raises(InvalidInput, match="one map per layer"):
        cm.amplified_pairs(random_map(), random_map(head=2))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_maps_on_a_gpu_change_the_same(layout: str):
    here = _block(layout, padding=1)
    there = {
        point: dataclasses.replace(map, scores=map.scores.cuda()) for point, map in here.items()
    }
    for method in (cm.contextualization_change, cm.cancellation):
        found, expected = method(there).values.cpu(), method(here).values
        assert torch.allclose(found, expected, rtol=1e-10, equal_nan=True)
    pairs = [cm.amplified_pairs(maps["mlp_in"], maps["mlp_out"]) for maps in (here, there)]
    assert _as_tuples(pairs[0]) == _as_tuples(pairs[1])


# Models


def _cases(*families: str) -> list[Any]:
    return [pytest.param(case, id=case.id) for case in zoo.cases() if case.family in families]


@functools.cache
def _model_maps(case: zoo.Case, stack: StackName | None = None) -> Maps:
    model, given = zoo.shared(case), zoo.inputs(case)
    mask = torch.ones_like(given.tokens)
    mask[0, -1] = 0
    return dict(
        cm.attention_norms(
            model,
            given.tokens,
            at=POINTS,
            stack=stack,
            attention_mask=mask,
            decoder_input=given.decoder_tokens,
        )
    )


def _require_change(maps: Maps, components: Any, allowed: Callable[[int, int, int], bool]) -> None:
    found = cm.contextualization_change(maps)
    assert found.quantities == tuple(components)
    batch, layers = found.values.shape[:2]
    for row in range(batch):
        for layer in range(layers):
            pairs = [pair for pair in _real_pairs(maps["mlp_in"], row) if allowed(layer, *pair)]
            for index, component in enumerate(components.values()):
                expected = _change_by_hand(maps, component, row, layer, pairs)
                assert float(found.values[row, layer, index]) == pytest.approx(expected, abs=1e-12)
                assert expected > 0 or components is PARALLEL


# Pairs that the first layers allow: all, those before, those in a window.
READ: dict[str, Callable[[int, int, int], bool]] = {
    **dict.fromkeys(("bert", "roberta"), lambda layer, i, j: True),
    **dict.fromkeys(("gpt2", "llama", "gqa"), lambda layer, i, j: j <= i),
    "mistral": lambda layer, i, j: 0 <= i - j < 4,
    "gemma2": lambda layer, i, j: 0 <= i - j < (4 if layer == 0 else 99),
}


@pytest.mark.parametrize("case", _cases(*READ))
def test_pre_ln_and_post_ln_models(case: zoo.Case):
    components = POST_LN if case.family in ("bert", "roberta") else PRE_LN
    _require_change(_model_maps(case), components, READ[case.family])


@pytest.mark.parametrize("case", _cases("gptj", "neox", "parallel"))
def test_parallel_models(case: zoo.Case):
    maps = _model_maps(case)
    _require_change(maps, PARALLEL, lambda layer, i, j: j <= i)
    assert cm.cancellation(maps).values.isnan().all()


@pytest.mark.parametrize("case", _cases("t5", "flan", "bart", "marian"))
def test_decoders_that_read_an_encoder(case: zoo.Case):
    post_ln = case.family in ("bart", "marian")
    components = POST_LN if post_ln else PRE_LN
    # 5 decoder tokens, then those of the encoder.
    crossed = _model_maps(case, "cross")
    _require_change(crossed, components, lambda layer, i, j: j <= i or j >= 5)
    assert cm.cancellation(crossed).values.isfinite().all()
    assert cm.amplified_pairs(crossed["mlp_in"], crossed["mlp_out"], k=1).amplified
    _require_change(_model_maps(case, "encoder"), components, lambda layer, i, j: True)
    # Before its cross-attention a decoder block has other sources than behind it.
    own = _model_maps(case, "decoder")
    refused: list[Callable[[], Any]] = [
        lambda: cm.contextualization_change(own),
        lambda: cm.cancellation(own),
        lambda: cm.amplified_pairs(own["resid_mid"], own["mlp_in"]),
    ]
    message = r"\('decoder', 5\)\] at resid_mid and .*\('encoder', 7\)\] at .*stack='cross'"
    for call in refused:
        with pytest.raises(InvalidInput, match=message):
            call()


def test_the_encoder_decoder_cases_run_somewhere():
    if zoo.major() > 2:
        assert _cases("t5", "flan", "bart", "marian")
    assert _cases("bert")
    assert _cases("neox")


@pytest.mark.parametrize(("name", "components"), [("causal-lm", PRE_LN), ("masked-lm", POST_LN)])
def test_trained_models(name: Any, components: Any):
    maps: Any = cm.attention_norms(
        cm.load_demo(name), "the keys to the cabinet are old .", at=POINTS
    )
    change, undone = cm.contextualization_change(maps), cm.cancellation(maps)
    assert change.quantities == tuple(components)
    assert bool(((change.values > 0) & (change.values < 2)).all())
    assert undone.values.isfinite().all()
    for figures in (change, undone):
        assert len(figures.to_dataframe()) == figures.values.numel()
        assert len(figures.panels()) == 1
