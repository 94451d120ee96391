"""A bridge against the Hugging Face model that it holds; models in memory; other names."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
import zoo
import zoo_build
import zoo_others
import zoo_refused
from asked import FLOAT32_INSIDE, case_of, relative, view_of
from test_attention_knockout import literal as with_edges_cut
from test_families import given
from test_value_zeroing import literal
from zoo_configs import BERT_LIKE, LLAMA_LIKE

import tl_contextmix as cm
from tl_contextmix.adapters import refusals
from tl_contextmix.adapters.loading.architectures import ALIASES
from tl_contextmix.adapters.verification.identity_report import HUGGING_FACE

pytestmark = pytest.mark.skipif(zoo.major() < 3, reason="bridges of TransformerLens 3 and 4")

BRIDGES = [case for case in zoo.spread() if case.host == "TransformerBridge"]


def compared(model: Any) -> list[float]:
    return [row.error for row in cm.check(model).rows if row.identity == HUGGING_FACE]


@pytest.mark.parametrize("case", BRIDGES)
def test_a_bridge_computes_what_its_model_does(case: zoo.Case) -> None:
    (error,) = compared(zoo.shared(case))
    assert error <= 1e-6


def bridge_of(kind: str) -> Any:
    return zoo.build(zoo.Case(kind, "TransformerBridge"))


def test_edited_weights_are_no_fault_of_the_bridge() -> None:
    shared = bridge_of("llama")
    with torch.no_grad():
        shared.blocks[0].attn.q.weight.mul_(0)
    assert len(compared(shared)) == 1
    split = bridge_of("gpt2")  # its bridge has pieces of fused weights
    piece = split.blocks[0].attn.q.original_component
    piece.weight = torch.nn.Parameter(0 * piece.weight)
    assert compared(split) == []
    assert cm.check(split).ok


def test_processed_weights_are_not_compared() -> None:
    case = case_of("gpt2", host="TransformerBridge")
    assert compared(zoo.build(case, dtype=torch.float32, processed=True)) == []


def test_the_model_is_as_it_was() -> None:
    model = bridge_of("gpt2")
    before = [*model.original_model.named_modules()]
    cm.check(model)
    assert [*model.original_model.named_modules()] == before


def test_a_bridge_that_computes_something_else_is_refused() -> None:
    model = bridge_of("llama")
    before = type(model.embed)
    forward = {"forward": lambda self, *given, **named: 0.5 * before.forward(self, *given, **named)}
    object.__setattr__(model.embed, "__class__", type(before.__name__, (before,), forward))
    match = r"does not compute what the Hugging Face model.*logits of LlamaForCausalLM"
    with pytest.raises(cm.UnsupportedModel, match=match):
        cm.value_zeroing(model, torch.tensor([[5, 9, 17]]))


@pytest.mark.newest
def test_falcon_with_alibi_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}
    options |= zoo_others.OTHERS["falcon"].sizes | {"vocab_size": zoo.rows.D_VOCAB}
    names = "FalconForCausalLM", "FalconConfig"
    hf = zoo_build.hugging_face(*names, options, dtype=torch.float32, seed=0)
    model = cm.load_model(hf, tokenizer=zoo_build.load_tokenizer("gpt"))
    with pytest.raises(cm.UnsupportedModel, match=r"Falcon with ALiBi.*alibi=True"):
        cm.check(model)
    monkeypatch.setattr(refusals, "REFUSALS", ())  # the comparison sees it without being told
    with pytest.raises(cm.UnsupportedModel, match=r"does not compute what the Hugging Face model"):
        cm.attention(model, torch.tensor([[5, 9, 17]]))


@pytest.mark.newest
def test_helium_is_no_llama(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ALIASES, "HeliumForCausalLM", "LlamaForCausalLM")
    options = {**LLAMA_LIKE, "head_dim": 8, "pad_token_id": 0}
    hf = zoo_build.hugging_face(
        "HeliumForCausalLM", "HeliumConfig", options, dtype=torch.float32, seed=0
    )
    model = cm.load_model(hf, tokenizer=zoo_build.load_tokenizer("llama"))
    with pytest.raises(cm.UnsupportedModel, match=r"logits of HeliumForCausalLM"):
        cm.attention(model, torch.tensor([[5, 9, 17]]))


# In memory, and by other names


def held(name: str, dtype: torch.dtype = torch.float64) -> tuple[Any, Any]:
    """A masked model in memory, and its tokenizer."""
    row = zoo_others.ENCODERS[name]
    assert row.tokenizer is not None
    hf = zoo_build.hugging_face(
        f"{name}ForMaskedLM", f"{name}Config", row.sizes | row.options, dtype=dtype, seed=0
    )
    return hf, zoo_build.load_tokenizer(row.tokenizer)


@pytest.mark.newest
@pytest.mark.parametrize("name", zoo_others.ENCODERS)
def test_an_encoder_in_memory_is_read_as_hugging_face_runs_it(name: str) -> None:
    (hf, tokenizer), inputs = held(name), given()
    with torch.no_grad():
        expected = hf(inputs.tokens, output_hidden_states=True)
    model = cm.load_model(hf, tokenizer=tokenizer)
    report = cm.check(model)
    assert report.ok, str(report)
    assert hf.config.architectures == [f"{name}ForMaskedLM"]
    parts = cm.decompose(model, inputs.tokens, at="block_out").total()
    final = view_of(model).final_norms.get("encoder")  # Hugging Face's last states are behind it
    if final is not None:
        parts[:, -1] = final(parts[:, -1])
    limit = FLOAT32_INSIDE if name in ("ModernBert", "EuroBert") else 1e-10
    hidden = torch.stack(expected.hidden_states[1:], dim=1)
    assert relative(parts, hidden) <= limit
    zeroed = cm.value_zeroing(model, inputs.tokens).scores[:, :, 0]
    assert relative(zeroed, literal(model, inputs)[1]) <= limit
    scores = cm.log_prob_contributions(model, inputs.tokens, target=9, pos=3)
    said = expected.logits[:, 3].log_softmax(dim=-1)[:, 9]
    assert relative(scores.trajectory[:, -1], said) <= limit
    assert view_of(model).blocks("encoder")
    asked: dict[str, Any] = {"target": 9, "pos": 3, "sources": 1, "to": 3, "window": None}
    cut = cm.attention_knockout(model, inputs.tokens, heads=[1], **asked).log_probs
    layers = [*range(len(view_of(model).blocks()))]
    said = with_edges_cut(view_of(model), inputs, None, layers, [(1, [3], [1])])
    said = said[:, 3].log_softmax(dim=-1)[:, 9]
    assert relative(cut.flatten(), said.flatten()) <= limit
    assert relative(said, expected.logits[:, 3].log_softmax(dim=-1)[:, 9]) > 1e-6


@pytest.mark.newest
def test_deberta_v3_has_a_head_without_an_unembedding_of_its_own() -> None:
    row, inputs = zoo_others.ENCODERS["DebertaV2"], given()
    options = row.sizes | row.options | {"legacy": False}
    names = "DebertaV2ForMaskedLM", "DebertaV2Config"
    hf = zoo_build.hugging_face(*names, options, dtype=torch.float64, seed=0)
    with torch.no_grad():
        expected = hf(inputs.tokens).logits
    model = cm.load_model(hf, tokenizer=zoo_build.load_tokenizer("bert"))
    assert cm.check(model).ok
    assert model.W_U.data_ptr() == model.W_E.data_ptr()
    scores = cm.log_prob_contributions(model, inputs.tokens, target=9, pos=3)
    said = expected[:, 3].log_softmax(dim=-1)[:, 9]
    assert relative(scores.trajectory[:, -1], said) <= 1e-10


@pytest.mark.newest
def test_deberta_with_a_convolution_is_refused_by_name() -> None:
    row = zoo_others.ENCODERS["DebertaV2"]
    options = row.sizes | row.options | {"conv_kernel_size": 3}
    names = "DebertaV2ForMaskedLM", "DebertaV2Config"
    hf = zoo_build.hugging_face(*names, options, dtype=torch.float32, seed=0)
    model = cm.load_model(hf, tokenizer=zoo_build.load_tokenizer("bert"))
    with pytest.raises(cm.UnsupportedModel, match=r"DeBERTa.*convolution.*conv_kernel_size=3"):
        cm.check(model)


@pytest.mark.newest
@pytest.mark.parametrize("name", zoo_others.WRAPPERS)
def test_a_model_of_images_and_text_is_asked_about_text(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    row, inputs = zoo_others.WRAPPERS[name], given()
    factory = "transformer_lens.factories.architecture_adapter_factory"
    known = importlib.import_module(factory).SUPPORTED_ARCHITECTURES
    # TransformerLens asks for torchvision (Qwen), which only images are read with.
    monkeypatch.setattr(known[f"{name}ForConditionalGeneration"], "required_libraries", [])
    inputs = zoo.Inputs(inputs.tokens.clamp(max=56))  # no image tokens
    names = f"{name}ForConditionalGeneration", f"{name}Config"
    hf = zoo_build.hugging_face(*names, row.sizes | row.options, dtype=torch.float32, seed=0)
    hf.config.pad_token_id = 0
    with torch.no_grad():
        expected = hf(inputs.tokens, output_hidden_states=True)
    model = cm.load_model(hf, tokenizer=zoo_build.load_tokenizer("llama"))
    report = cm.check(model)
    assert report.ok, str(report)
    parts = cm.decompose(model, inputs.tokens, at="block_out", layer=0).total()
    assert relative(parts[:, 0], expected.hidden_states[1]) <= 1e-5
    zeroed = cm.value_zeroing(model, inputs.tokens).scores[:, :, 0]
    assert relative(zeroed, literal(model, inputs)[1]) <= 1e-5
    scores = cm.log_prob_contributions(model, inputs.tokens, target=9)
    said = expected.logits[:, -1].log_softmax(dim=-1)[:, 9]
    assert relative(scores.trajectory[:, -1], said) <= 1e-5


@pytest.mark.newest
def test_what_reads_images_alone_and_what_lacks_a_library_are_told_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = "ViTModel", "ViTConfig"
    sight = zoo_build.hugging_face(*names, zoo_refused._VIT, dtype=torch.float32, seed=0)
    for ask in (lambda: cm.load_model(sight), lambda: cm.attention(sight, "a text")):
        with pytest.raises(cm.UnsupportedModel, match=r"a ViTModel, which reads images"):
            ask()
    factory = "transformer_lens.factories.architecture_adapter_factory"
    known = importlib.import_module(factory).SUPPORTED_ARCHITECTURES
    monkeypatch.setattr(known["GPT2LMHeadModel"], "required_libraries", ["not_a_library"])
    with pytest.raises(cm.UnsupportedModel, match=r"not_a_library.*Install what it names"):
        cm.load_model(zoo.hf_model("gpt2"), tokenizer=zoo_build.load_tokenizer("gpt"))


@pytest.mark.newest
def test_an_encoder_in_a_folder_is_read_by_its_own_name(tmp_path: Any) -> None:
    for name in ("XLMRoberta", "DistilBert"):
        hf, tokenizer = held(name, torch.float32)
        folder = tmp_path / name
        hf.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        with torch.no_grad():
            expected = hf(given().tokens).logits
        model = cm.load_model(folder)
        assert relative(model(given().tokens).detach(), expected) <= 1e-5
        assert cm.check(model).ok


@pytest.mark.newest
def test_a_model_in_memory_keeps_dtype_device_and_weights() -> None:
    hf = zoo.hf_model("gpt2", dtype=torch.float32)
    model = cm.load_model(hf, tokenizer=zoo_build.load_tokenizer("gpt"))
    assert next(model.parameters()).dtype == torch.float32
    assert model.W_E.data_ptr() == hf.transformer.wte.weight.data_ptr()
    assert model.to_tokens("the cat").shape[1] == 3
    text = cm.attention(model, "the cat sat")
    assert text.scores.shape[-1] == 4


@pytest.mark.newest
def test_a_peft_model_is_merged_in_a_copy() -> None:
    class Peft(torch.nn.Module):
        """What PEFT's models are to their users: a base with weights to be merged into it."""

        def __init__(self, base: Any) -> None:
            super().__init__()
            self.base, self.config = base, base.config
            self.added = torch.nn.Parameter(torch.ones(()))

        def merge_and_unload(self) -> Any:
            with torch.no_grad():
                self.base.transformer.wte.weight.add_(self.added)
            return self.base

    hf = zoo.hf_model("gpt2", dtype=torch.float32)
    before = hf.transformer.wte.weight.clone()
    model = cm.load_model(Peft(hf), tokenizer=zoo_build.load_tokenizer("gpt"))
    assert torch.equal(hf.transformer.wte.weight, before)
    torch.testing.assert_close(model.W_E, before + 1)
    assert cm.check(model).ok


def test_what_cannot_be_wrapped_is_refused_by_name() -> None:
    tokenizer = zoo_build.load_tokenizer("gpt")
    with pytest.raises(cm.UnsupportedModel, match=r"cannot load this object.*Linear"):
        cm.load_model(torch.nn.Linear(2, 2))
    classes = "BertForQuestionAnswering", "BertConfig"
    reader = zoo_build.hugging_face(*classes, BERT_LIKE, dtype=torch.float32, seed=0)
    with pytest.raises(cm.UnsupportedModel, match=r"Answering; expected.*modelling head"):
        cm.load_model(reader, tokenizer=tokenizer)
    with pytest.raises(cm.InvalidInput, match=r"has no tokenizer.*Pass tokenizer="):
        cm.load_model(zoo.hf_model("gpt2"))
    with pytest.raises(cm.InvalidInput, match=r"a tokenizer is of no use"):
        cm.load_model("causal-lm", tokenizer=tokenizer)
    for dtype in (torch.int8, torch.float8_e4m3fn):
        packed = zoo.hf_model("llama", dtype=torch.float32)
        layer = packed.model.layers[0].mlp.up_proj
        layer.weight = torch.nn.Parameter(layer.weight.to(dtype), requires_grad=False)
        with pytest.raises(cm.UnsupportedModel, match=f"a quantized model.*{dtype}"):
            cm.load_model(packed, tokenizer=zoo_build.load_tokenizer("llama"))


def test_an_unknown_architecture_is_one_line(tmp_path: Any) -> None:
    hf = zoo_build.hugging_face(
        "BioGptForCausalLM", "BioGptConfig", BERT_LIKE, dtype=torch.float32, seed=0
    )
    with pytest.raises(cm.UnsupportedModel, match=r"got the architecture BioGpt\w+; ") as raised:
        cm.load_model(hf, tokenizer=zoo_build.load_tokenizer("gpt"))
    assert len(str(raised.value)) < 300
