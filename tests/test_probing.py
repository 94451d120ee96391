"""Probes: the online code by hand, states by other means, and where a label appears."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
import zoo
from asked import bound, case_of, keywords, relative, view_of
from scipy import stats
from scipy.optimize import minimize

import tl_contextmix as cm
from tl_contextmix.adapters.inputs import Given
from tl_contextmix.adapters.passes import run_pass
from tl_contextmix.core.online_code import online_code, stretch_ends
from tl_contextmix.core.residual_stream import needed
from tl_contextmix.core.statistics import spearman
from tl_contextmix.engine.parts import POINTS
from tl_contextmix.engine.stream_points import state_at
from tl_contextmix.evaluation import demo_pairs
from tl_contextmix.results import Comparison, Probing, Result, Score

pytestmark = pytest.mark.once


def code_by_hand(x: np.ndarray, y: np.ndarray, ends: tuple[int, ...]) -> tuple[float, float]:
    """One code, one stretch after the other, by scipy's optimiser."""
    classes, width = int(y.max()) + 1, x.shape[1]
    bits, accuracy = ends[0] * math.log2(classes), math.nan

    def logits(flat: np.ndarray, some: np.ndarray) -> np.ndarray:
        return some @ flat[:-classes].reshape(width, classes) + flat[-classes:]

    def losses(flat: np.ndarray, some: np.ndarray, right: np.ndarray) -> np.ndarray:
        found = logits(flat, some)
        return np.logaddexp.reduce(found, axis=1) - found[np.arange(len(right)), right]

    for start, stop in itertools.pairwise(ends):
        fit = minimize(
            lambda flat, n=start: losses(flat, x[:n], y[:n]).sum() + (flat**2).sum(),
            np.zeros((width + 1) * classes),
            options={"gtol": 1e-8},
        )
        bits += losses(fit.x, x[start:stop], y[start:stop]).sum() / math.log(2)
        accuracy = (logits(fit.x, x[start:stop]).argmax(1) == y[start:stop]).mean()
    return bits, accuracy


def test_codes_are_those_of_one_probe_after_the_other() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 3, generator=generator, dtype=torch.float64)
    labels = torch.stack([(x[:, 0] > 0).long() + (x[:, 1] > 1).long(), torch.arange(60) % 3])
    orders = torch.stack([torch.randperm(60, generator=generator) for _ in range(2)])
    ends = stretch_ends(60)
    assert ends == (1, 2, 4, 8, 15, 30, 60)
    bits, accuracy = online_code(
        x, labels, orders, 3, ends=ends, hidden=None, penalty=2.0, seeds=[0, 1]
    )
    for code, order in enumerate(orders):
        expected = code_by_hand(x[order].numpy(), labels[code, order].numpy(), ends)
        assert float(bits[code]) == pytest.approx(expected[0], rel=1e-3)
        assert float(accuracy[code]) == pytest.approx(expected[1])
    # Each code is the same whatever else is computed with it.
    (alone,), _ = online_code(
        x, labels[1:], orders[1:], 3, ends=ends, hidden=None, penalty=2.0, seeds=[1]
    )
    assert float(alone) == pytest.approx(float(bits[1]), rel=1e-3)


def test_a_hidden_layer_reads_what_no_line_separates() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(160, 2, generator=generator, dtype=torch.float64)
    labels = (x[:, 0] * x[:, 1] > 0).long()[None]
    orders = torch.randperm(160, generator=generator)[None]
    right = {
        hidden: float(
            online_code(
                x, labels, orders, 2, ends=(20, 80, 160), hidden=hidden, penalty=0.1, seeds=[0]
            )[1]
        )
        for hidden in (None, 16)
    }
    assert right[16] > 0.9 > 0.7 > right[None]


@pytest.mark.parametrize("case", zoo.kinds(), ids=str)
def test_states_are_what_decompositions_add_up_to(case: zoo.Case) -> None:
    model, given = zoo.shared(case), zoo.inputs(case)
    if case.family in (*zoo.OPAQUE_FEED_FORWARD, "attn_only"):
        points = ("attn_out", "resid_mid")
    else:
        points = POINTS
    view = view_of(model)
    asked = keywords(given)
    done = run_pass(view, Given(given.tokens, **asked), layer=[1], also=needed)
    for at in points:
        parts = cm.decompose(model, given.tokens, at=at, layer=[1], **asked)
        expected = parts.parts.sum(dim=3) + parts.bias
        found = state_at(done.blocks[0], done.trace, at)
        assert relative(found, expected[:, 0]) <= bound(case), at


def test_a_layer_s_output_is_the_next_one_s_input() -> None:
    model = zoo.shared(case_of("gpt2"))
    ids = torch.arange(5, 45).view(10, 4)
    found = cm.probe(model, ids, [i % 2 for i in range(10)], at=("resid_pre", "block_out"), seeds=1)
    assert found.bits[0, 1, 0] == pytest.approx(float(found.bits[0, 0, 1]), rel=1e-6)


@pytest.fixture(scope="module")
def asked() -> dict[str, Any]:
    pairs = demo_pairs(count=100, seed=11)
    texts = [pair.masked("[MASK]") for pair in pairs]
    return {"input": texts, "classes": [pair.answer.endswith("s") for pair in pairs], "seeds": 2}


@pytest.fixture(scope="module")
def found(masked: Any, asked: dict[str, Any]) -> Probing:
    return cm.probe(masked, **asked)


@pytest.fixture(scope="module")
def compared(masked: Any) -> Comparison:
    methods = ["value_zeroing", "decompx", "gradient_x_input"]
    return cm.compare(masked, demo_pairs(count=6), methods=methods)


def test_the_number_is_read_where_value_zeroing_sees_the_cue(
    found: Probing, compared: Comparison
) -> None:
    """Mohebbi et al. 2023, section 6, in small: both jump in layer 2."""
    compression = found.compression.mean(0)[0].tolist()
    assert max(compression[:2]) < 1.2
    assert min(compression[2:]) > 5
    assert found.accuracy[:, 0, 2:].min() > 0.95
    assert found.selectivity[:, 0, 2:].min() > 0.2
    assert (found.uniform_bits / found.control_bits).max() < 1.2
    beside = found.beside(compared)
    dot = [point.value for point in beside.select("dot", "value_zeroing")]
    assert dot[2] > 3 * max(dot[:2])
    assert [point.value for point in beside.select("compression", "block_out")] == pytest.approx(
        compression
    )


def test_texts_are_read_at_their_own_position(
    masked: Any, asked: dict[str, Any], found: Probing
) -> None:
    pos = [text.split().index("[MASK]") + 1 for text in asked["input"]]
    assert found.provenance.options["pos"] == pos
    same = cm.probe(masked, **asked, pos=pos, layer=[1, 3], batch_size=7)
    assert same.layers == (1, 3)
    torch.testing.assert_close(same.bits, found.bits[..., [1, 3]], rtol=2e-3, atol=0)
    first = cm.probe(masked, **asked, pos=0, layer=0)
    last = cm.probe(masked, **asked, pos=-1, layer=0)
    assert not first.equals(last)


def test_gradients_may_be_off(masked: Any, asked: dict[str, Any]) -> None:
    few = {"input": asked["input"][:20], "classes": asked["classes"][:20], "layer": 2, "seeds": 1}
    on = cm.probe(masked, **few)
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            assert cm.probe(masked, **few).equals(on)


def test_control_labels(masked: Any, asked: dict[str, Any]) -> None:
    few = {**asked, "layer": 0, "seeds": 3}
    # Every text is read at its mask: one token, one class.
    token = cm.probe(masked, **few, control="token")
    assert token.control_accuracy.min() > 0.9
    # A value for each text, all different, is as good as none.
    each = cm.probe(masked, **few, control=[*range(100)])
    assert each.control_accuracy.max() < 0.8
    # What they are does not change what the probe of the classes finds.
    torch.testing.assert_close(each.bits, token.bits, rtol=2e-3, atol=0)


def test_means_and_intervals_over_seeds(found: Probing, compared: Comparison) -> None:
    (point, *_) = found.curves().select("bits", "block_out")
    values = found.bits[:, 0, 0].double()
    low, high = stats.t.interval(0.95, 1, values.mean(), stats.sem(values))
    assert [point.value, point.low, point.high] == pytest.approx([float(values.mean()), low, high])
    assert (found.uniform_bits, found.majority) == (100.0, max(found.counts) / 100)
    single = found.select(seed=0).curves().points[0]
    assert math.isnan(single.low)
    beside = found.beside(compared, "average precision")
    rows = compared.table("average precision").loc["decompx"]
    curve = torch.tensor([rows[f"input to {n}"] for n in range(4)]).double()
    expected = float(spearman(curve, found.compression.mean(0)[0].double()))
    assert beside.correlations()["decompx", "block_out"] == pytest.approx(expected)
    table = beside.panels()[0].table()
    assert [row[0] for row in table.rows] == ["compression, block_out", "value_zeroing", "decompx"]
    assert "Without layers: gradient_x_input" in beside.panels()[0].caption
    alone = Score(rows=compared.rows, title="t", caption="c")
    assert found.beside(alone, "average precision").points == beside.points
    for scores in (compared, alone):
        with pytest.raises(cm.InvalidInput, match="no figures of this metric"):
            found.beside(scores, "accuracy")


def test_saved_and_told(found: Probing, compared: Comparison, tmp_path: Path) -> None:
    assert Result.load(found.save(tmp_path / "p")).equals(found)
    beside = found.beside(compared)
    assert Result.load(beside.save(tmp_path / "b")).equals(beside)
    frame = found.to_dataframe()
    assert len(frame) == 2 * 4
    assert list(frame.columns[:4]) == ["seed", "point", "layer", "compression"]
    assert "Probing: seed 2" in repr(found)


def test_padding_and_hooks_change_nothing(masked: Any, asked: dict[str, Any]) -> None:
    texts, classes = asked["input"][:20], asked["classes"][:20]
    few: dict[str, Any] = {"layer": 1, "seeds": 1}
    plain = cm.probe(masked, texts, classes, **few)
    side = masked.tokenizer(texts, padding=True, return_tensors="pt")
    ids = cm.probe(masked, side["input_ids"], classes, attention_mask=side["attention_mask"], **few)
    torch.testing.assert_close(ids.bits, plain.bits, rtol=2e-3, atol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": [1, 2]}, r"2 classes; expected the class of each of 4 texts"),
        ({"classes": [1] * 4}, r"at least two differ"),
        ({"classes": "abab"}, r"the classes do not fit"),
        ({"classes": [[1], [2], [1], [2]]}, r"the classes do not fit"),
        ({"classes": 3}, r"the classes do not fit"),
        ({"classes": np.array([0, 1, np.nan, np.nan])}, r"got \[0.0, 1.0, nan, nan\]"),
        ({"control": pandas.Series([0, 1, None, None])}, r"'shuffled', 'token', or a list"),
        ({"control": "random"}, r"control"),
        ({"control": [1, 2]}, r"'shuffled', 'token', or a list"),
        ({"at": "mlp_post"}, r"mlp_post"),
        ({"at": []}, r"point"),
        ({"pos": [1, 2]}, r"not one position for each text"),
        ({"pos": 40}, r"no such position"),
        ({"pos": "all"}, r"pos"),
        ({"layer": 9}, r"no such layer"),
        ({"seeds": 0}, r"an integer from 1"),
        ({"input": ["the keys"] * 4, "pos": None}, r"0 masks in sentence 0"),
    ],
)
def test_what_cannot_be_probed(masked: Any, changes: dict[str, Any], message: str) -> None:
    given = {"input": ["the keys [MASK] old ."] * 4, "classes": [0, 1, 0, 1], **changes}
    with pytest.raises(cm.InvalidInput, match=message):
        cm.probe(masked, **given)


def test_constant_activations_are_no_information(masked: Any) -> None:
    """The mask's embedding without its position is the same in every text of one length."""
    texts = ["the keys [MASK] old .", "the dogs [MASK] old ."] * 4
    found = cm.probe(masked, texts, [0, 1] * 4, at="resid_pre", layer=0, seeds=1)
    # Biases alone: a Bernoulli code of the classes seen so far.
    assert bool(found.bits.isfinite().all())
    assert replace(found, points=("x",)).compression.max() < 1.2
