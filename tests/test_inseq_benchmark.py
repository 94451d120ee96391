"""What benchmarks/inseq.py compares with: plain Hugging Face models with values set to zero."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
import zoo
from asked import relative

pytest.importorskip("hf_literal", reason="the benchmarks are part of the repository only")

from hf_literal import as_inseq, half_squared, literal, one_minus_cosine, stacks_of

import tl_contextmix as cm
from tl_contextmix.demo_models import demo_folder

pytestmark = pytest.mark.once

# One host per family: hosts are compared with one another elsewhere.
CASES = {case.family: case for case in zoo.cases() if case.family in zoo.hf_families()}


@pytest.mark.parametrize("case", CASES.values(), ids=str)
def test_value_zeroing_equals_hugging_face_with_zeroed_values(case: zoo.Case) -> None:
    given = zoo.inputs(case, batch=1)
    model, plain = zoo.build(case), zoo.hf_model(case.family)
    ids = [side for side in (given.tokens, given.decoder_tokens) if side is not None]
    for stack in stacks_of(plain):
        options = {"stack": stack, "decoder_input": ids[1]} if len(ids) > 1 else {}
        found = cm.value_zeroing(model, ids[0], **options).scores[0, :, 0]
        # Rotary angles and what zoo.FLOAT32_INSIDE names are in float32: measured up to 1e-6.
        assert relative(found, literal(plain, ids, stack)) <= 1e-5, stack


def test_a_trained_encoder_decoder_in_single_precision() -> None:
    """Its cross-attention underflows to zeros in float32, which is not the same as padding."""
    if zoo.major() == 2:
        pytest.skip("TransformerLens 2 has no encoder-decoder that works")
    plain = transformers.AutoModelForSeq2SeqLM.from_pretrained(
        demo_folder("encoder-decoder"), dtype=torch.float64
    ).eval()
    model = cm.load_demo("encoder-decoder")
    options: dict[str, Any] = {"decoder_input": "le vieux roi voit l ' etoile ."}
    text = "the old king sees the star ."
    cross = cm.attention(model, text, stack="cross", **options)
    assert bool((cross.scores == 0).any())
    ids = [cross.source.ids, cross.target.ids]
    for stack in stacks_of(plain):
        found = cm.value_zeroing(model, text, stack=stack, **options).scores[0, :, 0].double()
        # Measured: 2e-6; 1e-1 where what underflows is taken for padding.
        assert relative(found, literal(plain, ids, stack)) <= 5e-5, stack


def test_distances_are_two_ways_to_say_the_same() -> None:
    changed, kept = torch.randn(2, 5, 7, dtype=torch.float64)
    torch.testing.assert_close(half_squared(changed, kept), one_minus_cosine(changed, kept))


def test_inseqs_convention_by_hand() -> None:
    distances = torch.tensor([[3e-5, 1e-5, 9e-6], [9e-6, 0, 0]])
    expected = torch.tensor([[0.75, 0.25, 0], [0, 0, 0]])
    torch.testing.assert_close(as_inseq(distances), expected)
