"""DecoderLens over data: metrics against their packages and by hand, and what is refused."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import operator
import random
import sys
from typing import Any

import jiwer
import pandas
import pytest
import sacrebleu
import torch
import zoo
from zoo_refused import REFUSED

import tl_contextmix as cm
from tl_contextmix.core.text_metrics import METRICS, Output, edit_distance, make_metrics, repetition
from tl_contextmix.errors import ContextMixError
from tl_contextmix.results import LayerCurves, LayerwiseDecoding, Provenance
from tl_contextmix.results.curves import curve_point

CASES = [case for case in zoo.cases() if case.encoder_decoder]
RIGHT = ["le roi voit une étoile .", "les chats dorment ici .", "la batte brûlait ."]
SAID = [
    ["le", "le roi voit le chat .", "le roi voit une étoile ."],
    ["les les les les", "les chats dorment ici .", "les chats dorment là ."],
    ["", "la batte brûlait .", "la batte brûlait ."],
]
VOCABULARY = sorted(
    {word for text in [*RIGHT, *functools.reduce(operator.iadd, SAID, [])] for word in text.split()}
)
END = len(VOCABULARY)


def decoding(references: tuple[str, ...] | None = tuple(RIGHT)) -> LayerwiseDecoding:
    """Outputs that are known, of three layers."""
    ids = torch.full((3, 3, 8), END)
    mask = torch.zeros(3, 3, 8, dtype=torch.bool)
    for row, texts in enumerate(SAID):
        for place, text in enumerate(texts):
            words = [VOCABULARY.index(word) for word in text.split()]
            ids[row, place, : len(words)] = torch.tensor(words, dtype=torch.long)
            mask[row, place, : len(words) + 1] = True
    finished = torch.ones(3, 3, dtype=torch.bool)
    finished[1, 0] = False
    return LayerwiseDecoding(
        ids=ids,
        mask=mask,
        log_probs=-mask.double(),
        finished=finished,
        content=mask & (ids != END),
        strings=tuple(
            tuple(tuple([*VOCABULARY, "</s>"][i] for i in row) for row in rows)
            for rows in ids.tolist()
        ),
        texts=tuple(map(tuple, SAID)),
        layers=(0, 1, 2),
        depth=2,
        inputs=("a", "b", "c"),
        references=references,
        provenance=Provenance("decoder_lens", {}, "m", "h", "1", "1", (), "f"),
    )


def values(curves: LayerCurves, metric: str, category: str = "all") -> list[float]:
    points = curves.select(metric, category)
    assert [point.layer for point in points] == [0, 1, 2]
    return [point.value for point in points]


def column(place: int) -> list[str]:
    return [texts[place] for texts in SAID]


# Metrics


def test_metrics_of_other_packages_are_theirs_over_the_corpus() -> None:
    found = decoding().metrics(metric=["BLEU", "chrF", "WER", "CER"])
    for place in range(3):
        texts = column(place)
        bleu = sacrebleu.corpus_bleu(texts, [RIGHT]).score
        chrf = sacrebleu.corpus_chrf(texts, [RIGHT]).score
        assert values(found, "BLEU")[place] == pytest.approx(bleu)
        assert values(found, "chrF")[place] == pytest.approx(chrf)
        assert values(found, "WER")[place] == pytest.approx(jiwer.wer(RIGHT, texts))
        assert values(found, "CER")[place] == pytest.approx(jiwer.cer(RIGHT, texts))


@pytest.mark.parametrize("name", ["BLEU", "chrF"])
def test_corpus_scores_and_their_intervals_are_those_of_resampled_corpora(name: str) -> None:
    """Texts of random words, empty ones and ones shorter than the n-grams among them."""
    draw = random.Random(0)
    pool = ["a", "the cat", "le roi", "ß é", "an apple", "zebra", "", "x"]
    said, right = (
        [" ".join(draw.choices(pool, k=draw.randint(1, 5))) for _ in range(40)] for _ in range(2)
    )
    right = [text if text.strip() else "a" for text in right]
    score = {"BLEU": sacrebleu.corpus_bleu, "chrF": sacrebleu.corpus_chrf}[name]
    (metric,) = make_metrics({name: name})
    counts = [
        metric.counts(Output(text, (), True, (), reference, ""))
        for text, reference in zip(said, right, strict=True)
    ]
    for chosen in ([0], [1], [2, 5], range(40), draw.choices(range(40), k=40)):
        sums = [sum(column) for column in zip(*(counts[row] for row in chosen), strict=True)]
        expected = score([said[row] for row in chosen], [[right[row] for row in chosen]]).score
        assert metric.figure(sums) == pytest.approx(expected), chosen
    point = curve_point(name, metric.figure, "all", 0, counts)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(40, (1000, 40), generator=generator)[:, :].tolist()
    every = [
        metric.figure([sum(column) for column in zip(*(counts[i] for i in row), strict=True)])
        for row in drawn
    ]
    low, high = torch.quantile(torch.tensor(every).double(), torch.tensor([0.025, 0.975]).double())
    assert (point.low, point.high) == pytest.approx((float(low), float(high)))
    assert point.low < point.value < point.high


def test_own_metrics_by_hand() -> None:
    found = decoding().metrics()
    assert {point.metric for point in found.points} == set(METRICS) - {"BLEU", "WER", "CER"}
    assert values(found, "exact match") == pytest.approx([0, 2 / 3, 2 / 3])
    assert values(found, "token accuracy")[:2] == pytest.approx(
        [(1 / 6 + 1 / 5 + 0) / 3, (4 / 6 + 1 + 1) / 3]
    )
    assert values(found, "length ratio") == pytest.approx([5 / 15, 1, 1])
    # In tokens, to the last layer's output: 5 words are missing, 3 replaced and 1 missing, all 4.
    assert values(found, "edit distance") == pytest.approx([(5 + 4 + 4) / 3, (2 + 1 + 0) / 3, 0])
    # "les les les les" has one pair of neighbours, three times; "le" and "" have none.
    assert values(found, "repetition") == pytest.approx([2 / 3, 0, 0])
    assert [point.sentences for point in found.select("repetition")] == [1, 3, 3]
    assert values(found, "empty") == pytest.approx([1 / 3, 0, 0])
    assert values(found, "truncated") == pytest.approx([1 / 3, 0, 0])
    assert {point.metric for point in decoding(None).metrics().points} == {
        "edit distance",
        "repetition",
        "empty",
        "truncated",
    }


def test_a_function_of_the_users_and_categories() -> None:
    seen: list[tuple[str, str | None, str]] = []

    def starts_with_le(output: str, reference: str | None, source: str) -> float:
        seen.append((output, reference, source))
        return float("nan") if not output else float(output.startswith("le"))

    found = decoding().metrics(metric=starts_with_le, categories=["x", "y", "x"])
    assert ("le", RIGHT[0], "a") in seen
    assert values(found, "starts_with_le") == pytest.approx([1, 2 / 3, 2 / 3])
    assert values(found, "starts_with_le", "x") == pytest.approx([1, 1 / 2, 1 / 2])
    assert [p.sentences for p in found.select("starts_with_le", "x")] == [1, 2, 2]
    named = decoding().metrics(metric={"one": starts_with_le, "two": lambda o, r, s: 2.0})
    assert values(named, "two") == [2, 2, 2]


def test_a_column_of_a_table_and_names_of_the_users_own() -> None:
    frame = pandas.DataFrame({"kind": ["x", "y", "x"], "right": RIGHT}, index=[7, 8, 9])
    ask = inspect.unwrap(LayerwiseDecoding.metrics)
    found = ask(decoding(None), frame["right"], metric="WER", categories=frame["kind"])
    listed = decoding().metrics(metric="WER", categories=["x", "y", "x"])
    assert found.to_dataframe().equals(listed.to_dataframe())

    def ends(output: str, reference: str | None, source: str) -> float:
        return float(output.endswith("."))

    several = decoding().metrics(metric=["exact match", ends])
    assert values(several, "ends") == [0, 1, 1]
    renamed = decoding().metrics(metric={"right": "exact match", "done": ends})
    assert values(renamed, "right") == values(several, "exact match")
    assert [p.metric for p in renamed.points[::3]] == ["right", "done"]


def test_curves_that_are_not_there() -> None:
    found = decoding().metrics(metric="WER", categories=["x", "y", "x"])
    for asked in (("BLEU", "all"), ("WER", "z")):
        with pytest.raises(cm.InvalidInput, match=r"no such curve.*\('WER', 'x'\)"):
            found.select(*asked)
    with pytest.raises(TypeError, match="unsupported operand"):
        _ = found + 5  # type: ignore[operator]


def test_intervals_hold_the_figure_and_come_again() -> None:
    first, again = (decoding().metrics(metric=["WER", "exact match", "BLEU"]) for _ in range(2))
    assert first.equals(again)
    for point in first.points:
        assert point.low <= point.value + 1e-9
        assert point.value <= point.high + 1e-9
    spread = first.select("exact match")[1]
    assert (spread.low, spread.high) == (0, 1), "one of three sentences is wrong"


def test_figures_of_sentences_average_to_those_of_the_corpus() -> None:
    found = decoding()
    metrics = {"exact match": "exact match", "CER": "CER", "half": lambda out, _, __: len(out) / 2}
    each = found.sentence_metrics(metric=metrics)
    assert [*each.columns] == ["batch", "layer", "quantity", "value"]
    assert len(each) == 3 * len(found.layers) * len(found.inputs)
    means = each.groupby(["quantity", "layer"]).value.mean()
    for name in ("exact match", "half"):
        curve = found.metrics(metric={name: metrics[name]}).select(name)
        assert [means[name, point.layer] for point in curve] == pytest.approx(
            [point.value for point in curve]
        )
    one = each[(each.quantity == "CER") & (each.batch == 1)].value.tolist()
    alone = decoding().metrics(metric="CER", categories=["x", "y", "x"]).select("CER", "y")
    assert one == pytest.approx([point.value for point in alone])
    nothing = found.sentence_metrics(metric=lambda *_: float("nan"))
    assert nothing.value.isna().all()
    with pytest.raises(cm.InvalidInput, match="compares with a right answer"):
        dataclasses.replace(found, references=None).sentence_metrics(metric="WER")


def test_first_layers() -> None:
    found = decoding()
    assert found.first_correct_layer() == (2, 1, 1)
    assert found.first_correct_layer(["le", "nothing", "la  batte brûlait ."]) == (0, None, 1)
    assert found.first_stable_layer() == (2, 2, 1)
    # What lies between the layers that were decoded is not known.
    gap = dataclasses.replace(found, layers=(0, 2, 4), depth=4)
    with pytest.raises(cm.InvalidInput, match=r"layers \[0, 2, 4\]; expected every layer"):
        gap.first_stable_layer()
    assert dataclasses.replace(found, layers=(2, 3, 4), depth=4).first_stable_layer() == (4, 4, 3)
    with pytest.raises(cm.InvalidInput, match="the last encoder layer among them"):
        dataclasses.replace(found, depth=4).first_stable_layer()
    with pytest.raises(cm.InvalidInput, match="the last encoder layer among them"):
        dataclasses.replace(found, depth=4).metrics(metric="edit distance")
    assert found.truncated.tolist()[1] == [True, False, False]
    torch.testing.assert_close(
        found.probabilities[0], torch.tensor([-2.0, -7.0, -7.0]).exp().double()
    )


@pytest.mark.parametrize(
    ("a", "b"), [("", ""), ("kitten", "sitting"), ("abc", ""), ("ab", "ba"), ("flaw", "lawn")]
)
def test_edit_distance_is_the_recursive_one(a: str, b: str) -> None:
    def slow(a: str, b: str) -> int:
        if not a or not b:
            return len(a) + len(b)
        return min(slow(a[1:], b) + 1, slow(a, b[1:]) + 1, slow(a[1:], b[1:]) + (a[0] != b[0]))

    assert edit_distance(a, b) == slow(a, b)


def test_repetition() -> None:
    assert math.isnan(repetition([1]))
    assert repetition([1, 2, 1, 2]) == pytest.approx(1 / 3)


def test_what_needs_references_has_no_answer_without_them() -> None:
    with pytest.raises(cm.InvalidInput, match="BLEU without references"):
        decoding(None).metrics(metric="BLEU")
    with pytest.raises(cm.InvalidInput, match="cannot be compared with a reference"):
        decoding(None).first_correct_layer()


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for package, metric in (("sacrebleu", "BLEU"), ("jiwer", "WER")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ContextMixError, match=rf"needs the package {package}.*\[metrics\]"):
            decoding().metrics(metric=metric)


# The data-set call


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_data_set_call_gives_the_curves_of_the_results(case: zoo.Case) -> None:
    model, texts, right = zoo.shared(case), ["the cat sat", "a dog ran"], ["a cat", "the dog ran"]
    options: dict[str, Any] = {"max_new_tokens": 6, "num_beams": 2}
    curves = cm.decoder_lens(
        model, texts, right, metric=["token accuracy", "KL"], categories=["x", "y"], **options
    )
    free = cm.decoder_lens(model, texts, right, **options)
    forced = cm.decoder_lens(model, texts, right, mode="teacher_forced")
    expected = free.metrics(metric="token accuracy", categories=["x", "y"]) + forced.metrics(
        metric="KL", categories=["x", "y"]
    )
    assert curves.to_dataframe().equals(expected.to_dataframe())
    by_token = forced.metrics(metric="gold NLL", categories=[["n", "m"], ["n"]])
    row = forced.log_probs[:, 0]
    assert by_token.select("gold NLL", "n")[0].value == pytest.approx(-float(row[:, 0].mean()))
    assert by_token.select("gold NLL", "m")[0].value == pytest.approx(-float(row[0, 1]))
    mask = forced.target.mask
    whole = by_token.select("gold NLL")[0].value
    assert whole == pytest.approx(-float(row.sum() / mask.sum()))
    first = forced.first_correct_layer()
    for place in range(int(mask[0].sum())):
        hits = [layer for layer in forced.layers if int(forced.ranks[0, layer, place]) == 0]
        assert int(first[0, place]) == (hits[0] if hits else -1)


# What is refused


@pytest.mark.parametrize("case", [c for c in CASES if c.family in ("bart", "pegasus")], ids=str)
def test_what_does_not_fit_the_context(case: zoo.Case) -> None:
    model, long = zoo.shared(case), torch.full((1, 33), 7)
    with pytest.raises(cm.InvalidInput, match="at most 32"):
        cm.decoder_lens(model, long)
    with pytest.raises(cm.InvalidInput, match="at most 32"):
        cm.decoder_lens(model, "the cat", max_new_tokens=32)
    with pytest.raises(cm.InvalidInput, match="at most 32"):
        cm.decoder_lens(model, "the cat", " ".join(["cat"] * 40), mode="teacher_forced")
    assert cm.decoder_lens(model, "the cat").ids.shape[-1] <= 31
    with pytest.raises(cm.InvalidInput, match="Pad on the right"):
        cm.decoder_lens(model, ["the cat sat", "a"], padding_side="left")


ONE_STACK = [case for case in zoo.cases() if case.family in ("gpt2", "bert")]


@pytest.mark.parametrize("case", ONE_STACK, ids=str)
def test_models_with_one_stack_are_refused(case: zoo.Case) -> None:
    with pytest.raises(cm.UnsupportedModel, match="DecoderLens needs an encoder-decoder"):
        cm.decoder_lens(zoo.shared(case), "the cat")


@pytest.mark.parametrize("case", [c for c in REFUSED if c.family == "t5"], ids=str)
def test_encoder_decoders_that_are_wrong_are_refused_with_the_reason(case: Any) -> None:
    with pytest.raises(cm.UnsupportedModel, match=case.match):
        cm.decoder_lens(case.build(), torch.tensor([[7, 8, 9]]))


def test_a_metric_that_no_sentence_has_is_nan() -> None:
    found = decoding().metrics(metric={"mine": lambda out, right, source: float("nan")})
    assert all(math.isnan(value) for value in values(found, "mine"))
    assert {point.sentences for point in found.points} == {0}


def test_layers_are_asked_once_and_in_order() -> None:
    for case in CASES[:1]:
        model, given = zoo.shared(case), zoo.inputs(case)
        found = cm.decoder_lens(model, given.tokens, layer=[2, 0, 2], max_new_tokens=2)
        assert found.layers == (0, 2)
        assert found.equals(cm.decoder_lens(model, given.tokens, layer=[0, 2], max_new_tokens=2))
