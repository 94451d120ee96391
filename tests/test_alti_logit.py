"""ALTI to a prediction: equal to the paper's equations written out, and to the model's logits."""

from __future__ import annotations

from functools import partial
from typing import Any

import oracles_baselines as oracle
import pytest
import torch
import zoo
from asked import bound, case_of, keywords, relative, view_of

import tl_contextmix as cm
from tl_contextmix.adapters.inputs import Given, make_batch
from tl_contextmix.core.residual_stream import needed

TEXT = "the keys to the cabinet"


def short(case: zoo.Case) -> zoo.Inputs:
    given = zoo.inputs(case, batch=2)
    decoder = given.decoder_tokens
    return zoo.Inputs(given.tokens[:, :4], None if decoder is None else decoder[:, :3])


@pytest.mark.parametrize("case", zoo.kinds(), ids=str)
def test_each_layers_update_is_that_of_a_literal_loop(case: zoo.Case) -> None:
    model, given = zoo.shared(case), short(case)
    view, asked = view_of(model), {"target": 9, "foil": 7, "pos": -2, "of": "logit"}
    asked |= keywords(given)
    if view.readout.refusal:
        with pytest.raises(cm.UnsupportedModel):
            cm.alti(model, given.tokens, **asked)
        return
    if view.readout.head is not None or view.readout.soft_cap is not None:
        with pytest.raises(cm.UnsupportedModel, match="no logit is a sum"):
            cm.alti(model, given.tokens, **asked)
        return
    every = [block for _, block in view.every_block()]
    names = [name for block in every for name in (*block.points(), *needed(block))]
    batch = make_batch(view, Given(given.tokens, **keywords(given)))
    trace = view.run(batch, names)
    W_U = view.readout.weights("W_U")
    column, width = W_U[:, 9] - W_U[:, 7], batch.side(view.base_stack(None)).ids.shape[1]
    expected = torch.stack(
        [oracle.alti_logit(view, trace, row, width - 2, column) for row in range(2)]
    )
    layers = [*range(len(view.blocks()))]
    for options in ({}, {"max_bytes": 3000}):
        found = cm.alti(model, given.tokens, layer=layers, **options, **asked)
        assert relative(found.scores[:, :, 0, 0], expected) <= bound(case)
        assert (found.bias, found.layer_names[0]) == (None, "input to 0")
    whole = cm.alti(model, given.tokens, **asked)
    assert relative(whole.scores, found.scores.sum(1, keepdim=True)) <= bound(case)
    last = cm.alti(model, given.tokens, layer=-1, **asked)
    assert relative(last.scores, found.scores[:, -1:]) <= bound(case)
    # What attention does not read is the rest of the model's own difference of logits.
    logits = zoo.logits(model, given)[:, -2].detach()
    assert whole.bias is not None
    total = (whole.scores.sum(-1) + whole.bias)[:, 0, 0, 0]
    assert relative(total, logits[:, 9] - logits[:, 7]) <= bound(case)


@pytest.mark.parametrize("family", ["gpt2", "bart"])
def test_answers_of_a_padded_batch_are_those_of_their_texts_alone(family: str) -> None:
    case = case_of(family)
    model, ids = zoo.shared(case), torch.tensor([[5, 9, 17, 4], [5, 8, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    answers = [[11, 6], [13, 7, 12]]
    start = {"decoder_input": torch.tensor([[2], [2]])} if case.encoder_decoder else {}
    ask: Any = partial(cm.alti, model, of="logit")
    found = ask(ids, attention_mask=mask, target=[*answers], **start)
    assert found.target.mask.tolist() == [[True, True, False], [True] * 3]
    assert found.unit == "logit"
    assert not bool(found.scores[0, 0, 0, 2].any())
    for row, answer in enumerate(answers):
        text = ids[row : row + 1, : int(mask[row].sum())]
        first = {name: value[:1] for name, value in start.items()}
        expected = ask(text, target=[answer], **first)
        kept = found.select(
            batch=row,
            target=[*range(len(answer))],
            source=found.source.mask[row].nonzero()[:, 0].tolist(),
        )
        assert relative(kept.scores, expected.scores) <= bound(case)
        assert relative(kept.bias, expected.bias) <= bound(case)


@pytest.mark.once
def test_the_subject_speaks_for_the_plural() -> None:
    model = cm.load_demo("causal-lm")
    asked: dict[str, Any] = {"target": " are", "foil": " is", "of": "logit"}
    found = cm.alti(model, f"{TEXT} near the dog", **asked)
    best = found.top(1)[0]
    assert best["source_token"] in (" the", " keys")
    assert found.provenance.options["of"] == "logit"
    assert "ferrando2023explaining" in cm.cite(found)
    assert "ferrando2023explaining" not in cm.cite(cm.alti(model, TEXT))
    with pytest.raises(cm.InvalidInput, match="add up as they are"):
        found.normalize()
    with pytest.raises(cm.InvalidInput, match="the same whatever the foil"):
        cm.alti(model, TEXT, target=" are", foil=" is")
    with pytest.raises(cm.InvalidInput, match="no such layer"):
        cm.alti(model, TEXT, layer=9, **asked)
    translator = cm.load_demo("encoder-decoder")
    with pytest.raises(cm.InvalidInput, match="the stack that predicts"):
        cm.alti(translator, TEXT, stack="encoder", of="logit")
    said = cm.alti(translator, f"{TEXT} are red .", generate=6, of="logit")
    best = {row["target_token"]: row["source_token"] for row in reversed(said.top(30))}
    assert (best[" clés"], best[" rouges"]) == (" keys", " red")
