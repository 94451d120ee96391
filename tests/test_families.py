"""Families beside the zoo's: each is read, adds up, and is zeroed as the host itself does it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import pytest
import torch
import zoo
import zoo_others
from asked import FLOAT32_INSIDE, host_trace, keywords, relative, view_of, words
from test_value_zeroing import literal

import tl_contextmix as cm
from tl_contextmix.core.model_view import StackName

pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(zoo.major() < 3, reason="bridges of TransformerLens 3 and 4"),
]


def given() -> zoo.Inputs:
    """Two sentences of seven tokens."""
    return zoo.Inputs(words(7))


def require_read(model: Any, inputs: zoo.Inputs, stacks: Sequence[StackName | None]) -> None:
    """Parts add up, values are zeroed and a token is as likely as in the host itself."""
    asked = keywords(inputs)
    assert cm.check(model).ok
    for stack in stacks:
        parts = cm.decompose(model, inputs.tokens, at="block_out", stack=stack, **asked)
        trace, blocks = host_trace(view_of(model), inputs, stack)
        own = torch.stack([trace[block.resid_out] for block in blocks], dim=1)
        assert relative(parts.total(), own) <= FLOAT32_INSIDE
        zeroed = cm.value_zeroing(model, inputs.tokens, stack=stack, **asked).scores[:, :, 0]
        assert relative(zeroed, literal(model, inputs, stack)[1]) <= FLOAT32_INSIDE
    scores = cm.log_prob_contributions(model, inputs.tokens, target=9, **asked)
    said = zoo.logits(model, inputs)[:, -1].log_softmax(dim=-1)[:, 9]
    assert relative(scores.trajectory[:, -1], said) <= FLOAT32_INSIDE


CAUSAL = [name for name, other in zoo_others.OTHERS.items() if not other.tokenizer]


@pytest.mark.parametrize("kind", CAUSAL)
def test_a_family_is_read_adds_up_and_is_zeroed_exactly(kind: str) -> None:
    model, inputs = zoo_others.build(kind), given()
    if zoo.major() not in zoo_others.OTHERS[kind].majors:
        with pytest.raises(cm.UnsupportedModel, match="not read correctly"):
            cm.value_zeroing(model, inputs.tokens)
        return
    require_read(model, inputs, [None])
    tops = cm.ff_memories(model, inputs.tokens, layer=-1)  # widths of layers may differ
    assert torch.equal(tops.final_top, zoo.logits(model, inputs).argmax(dim=-1))
    assert torch.equal(tops.output_top[:, -1], tops.final_top)


@pytest.mark.parametrize("kind", [name for name in zoo_others.OTHERS if name not in CAUSAL])
def test_an_encoder_decoder_is_read_and_decoded(kind: str) -> None:
    if zoo.major() not in zoo_others.OTHERS[kind].majors:
        pytest.skip("not on the bridge of this version")
    model, inputs = zoo_others.build(kind), given()
    inputs = zoo.Inputs(inputs.tokens, inputs.tokens[:, 2:6])
    require_read(model, inputs, get_args(StackName))
    found = cm.decoder_lens(model, inputs.tokens, max_new_tokens=6)
    mask = torch.ones_like(inputs.tokens)
    own = model.original_model.generate(
        inputs.tokens, attention_mask=mask, max_new_tokens=6, do_sample=False, num_beams=1
    )
    for row, answer in enumerate(own[:, 1:]):  # behind its start
        real = found.mask[row, -1]
        assert found.ids[row, -1][real].tolist() == answer[: int(real.sum())].tolist()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bitnet": ({"num_key_value_heads": 2}, "not read correctly"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_read_is_refused_by_name(kind: str) -> None:
    options, message = REFUSED[kind]
    with pytest.raises(cm.UnsupportedModel, match=message):
        cm.value_zeroing(zoo_others.build(kind, **options), given().tokens)
