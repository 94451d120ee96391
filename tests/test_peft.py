"""Models with LoRA adapters, by PEFT itself: merged, or followed."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
import zoo
import zoo_build
import zoo_others
from asked import FLOAT32_INSIDE, relative, words
from zoo_configs import TokenizerKind

import tl_contextmix as cm

pytestmark = [
    pytest.mark.newest,
    pytest.mark.once,
    # PEFT's own, with newer releases of transformers.
    pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore:.*checkpointing:FutureWarning"),
]
FAMILIES: dict[str, TokenizerKind] = {
    "llama": "llama",
    "gpt2": "gpt",
    "bert": "bert",
    "bart": "bart",
    "t5": "t5",
}  # and their tokenizers


def adapted(family: str, *modules: str) -> Any:
    """A model with random adapters on some of its layers."""
    hf = zoo.hf_model(family)
    config = peft.LoraConfig(r=2, target_modules=list(modules), init_lora_weights=False)
    return peft.get_peft_model(hf, config).double().eval()


def asked(family: str) -> dict[str, Any]:
    return {"target": 9, "pos": 2 if family == "bert" else -1}


@pytest.mark.parametrize(
    ("family", "modules"),
    [
        ("llama", ("q_proj", "v_proj")),
        ("llama", ("up_proj", "down_proj")),
        ("gpt2", ("c_attn", "c_fc")),
        ("bert", ("query", "value", "dense")),
        # Of tied weights one has adapters, or each its own.
        ("gpt2", ("wte",)),
        ("gpt2", ("lm_head",)),
        ("gpt2", ("wte", "lm_head")),
        ("bert", ("word_embeddings",)),
    ],
)
@pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied")
def test_adapters_are_merged_in_a_copy(family: str, modules: tuple[str, ...]) -> None:
    model, tokens = adapted(family, *modules), words(6)
    with torch.no_grad():
        expected = model(tokens).logits
        without = model.get_base_model()
        with model.disable_adapter():
            assert relative(without(tokens).logits, expected) > 1e-2
    merged = cm.load_model(model, tokenizer=zoo_build.load_tokenizer(FAMILIES[family]))
    report = cm.check(merged)
    assert report.ok, str(report)
    options: dict[str, Any] = asked(family)
    found = cm.log_prob_contributions(merged, tokens, **options)
    said = expected[:, options["pos"]].log_softmax(dim=-1)[:, 9]
    assert relative(found.trajectory[:, -1], said) <= FLOAT32_INSIDE
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, expected)


def load(model: Any, family: str) -> Any:
    return cm.load_model(model, tokenizer=zoo_build.load_tokenizer(FAMILIES[family]))


@pytest.mark.parametrize(
    "further", [{}, {"modules_to_save": ["mlp"]}, {"trainable_token_indices": [3, 9]}]
)
def test_adapters_that_transformers_put_into_a_model_are_merged_in_a_copy(
    further: dict[str, Any],
) -> None:
    hf, tokens = zoo.hf_model("llama"), words(6)
    modules = ["q_proj", "o_proj"]
    hf.add_adapter(peft.LoraConfig(r=2, target_modules=modules, init_lora_weights=False, **further))
    hf.double().eval()
    merged = load(hf, "llama")
    with torch.no_grad():
        expected = hf(tokens).logits
        assert relative(merged(tokens), expected) <= FLOAT32_INSIDE
    cm.decompx(merged, tokens)  # which takes the weights for what they are
    with torch.no_grad():
        assert torch.equal(hf(tokens).logits, expected)


def test_what_cannot_be_merged_is_refused() -> None:
    model = adapted("llama", "q_proj")
    with (
        model.disable_adapter(),
        pytest.raises(cm.UnsupportedModel, match="that are disabled.*load the base model"),
    ):
        load(model, "llama")
    model.add_adapter("other", peft.LoraConfig(target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "other"])
    model.base_model.merge_adapter(["other"])
    with pytest.raises(cm.UnsupportedModel, match="or some of them.*unmerge_adapter"):
        load(model, "llama")
    packed = adapted("llama", "q_proj")
    layer = packed.get_base_model().model.layers[0].self_attn.q_proj.get_base_layer()
    layer.weight = torch.nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(cm.UnsupportedModel, match="a quantized model.*int8"):
        load(packed, "llama")
    task: dict[str, Any] = {"task_type": "CAUSAL_LM"}
    activated = peft.LoraConfig(target_modules=["q_proj"], alora_invocation_tokens=[7], **task)
    with pytest.raises(cm.UnsupportedModel, match="cannot be merged.*aLoRA"):
        load(peft.get_peft_model(zoo.hf_model("llama"), activated), "llama")
    prompted = peft.PromptTuningConfig(num_virtual_tokens=3, **task)
    model = peft.get_peft_model(zoo.hf_model("llama"), prompted)
    for ask in (lambda: load(model, "llama"), lambda: cm.value_zeroing(model, words(6))):
        with pytest.raises(cm.UnsupportedModel, match="virtual tokens"):
            ask()
    with pytest.raises(cm.UnsupportedModel, match=r"load_model\(model\), which merges"):
        cm.value_zeroing(adapted("llama", "q_proj"), words(6))


@pytest.mark.parametrize("module", ["o_proj", "up_proj", "down_proj", "lm_head"])
def test_adapters_in_a_bridge_may_be_switched_off_and_on(module: str) -> None:
    model, tokens = adapted("llama", module), words(6)
    kept = zoo_build.bridge(model.get_base_model(), "llama", dtype=torch.float64, processed=False)
    plain = zoo.build(zoo.Case("llama", "TransformerBridge"))

    def ask(model: Any) -> Any:
        return cm.log_prob_contributions(model, tokens, **asked("llama"), by="ff_neuron").scores

    for _ in range(2):
        with model.disable_adapter():
            assert relative(ask(kept), ask(plain)) <= FLOAT32_INSIDE
        with pytest.raises(cm.UnsupportedModel, match="adapters.*not merged.*load_model"):
            ask(kept)


def test_an_adapter_that_is_not_active_is_none() -> None:
    model, tokens = adapted("llama", "q_proj"), words(6)
    config = peft.LoraConfig(r=2, target_modules=["v_proj", "o_proj"], init_lora_weights=False)
    model.add_adapter("other", config)
    model.double().eval()
    kept = zoo_build.bridge(model.get_base_model(), "llama", dtype=torch.float64, processed=False)
    cm.decompx(kept, tokens)
    model.set_adapter("other")
    with pytest.raises(cm.UnsupportedModel, match=r"W_[VO].*adapters"):
        cm.decompx(kept, tokens)


@pytest.mark.parametrize(
    ("family", "modules"), [("bart", ("q_proj", "v_proj")), ("t5", ("q", "wo"))]
)
def test_the_decoder_lens_follows_adapters(family: str, modules: tuple[str, ...]) -> None:
    hf, tokens = zoo.hf_model(family), words(6)
    config = peft.LoraConfig(r=2, target_modules=list(modules), init_lora_weights=False)
    config.task_type = "SEQ_2_SEQ_LM"
    model = peft.get_peft_model(hf, config).double().eval()
    merged = load(model, family)
    for beams in (1, 2):
        found, expected = (
            cm.decoder_lens(one, tokens, max_new_tokens=5, num_beams=beams)
            for one in (model, merged)
        )
        assert torch.equal(found.ids, expected.ids)
        assert relative(found.log_probs, expected.log_probs) <= FLOAT32_INSIDE
    # Queries with adapters hinder only what asks what a changed query attends to.
    base = model.get_base_model()
    kept = zoo_build.bridge(base, FAMILIES[family], dtype=torch.float64, processed=False)
    if family == "bart":
        pair = [cm.decoder_lens(one, tokens, max_new_tokens=5).ids for one in (kept, merged)]
        assert torch.equal(*pair)
        with pytest.raises(cm.UnsupportedModel, match="W_Q.*adapters"):
            cm.value_zeroing(kept, tokens, decoder_input=tokens)


def test_adapters_of_whisper_are_followed_or_refused() -> None:
    features = torch.randn(1, 8, 24, generator=torch.Generator().manual_seed(0)).double()
    for modules, refused in ((["q_proj", "v_proj"], cm.decompx), (["fc1"], cm.value_zeroing)):
        config = peft.LoraConfig(r=2, target_modules=modules, init_lora_weights=False)
        model = peft.get_peft_model(zoo_others.whisper(), config).double().eval()
        with pytest.raises(cm.UnsupportedModel, match="adapters.*merge_and_unload"):
            refused(model.get_base_model(), features, stack="encoder")
        if refused is cm.decompx:
            own = cm.value_zeroing(model.get_base_model(), features, stack="encoder")
            merged = cm.value_zeroing(model.merge_and_unload(), features, stack="encoder")
            assert relative(own.scores, merged.scores) <= FLOAT32_INSIDE


def test_adapters_in_a_bridge_are_followed_where_weights_are_not_needed() -> None:
    model, tokens = adapted("llama", "q_proj", "v_proj"), words(6)
    merged = cm.load_model(model, tokenizer=zoo_build.load_tokenizer("llama"))
    kept = zoo_build.bridge(model.get_base_model(), "llama", dtype=torch.float64, processed=False)
    plain: list[tuple[Any, dict[str, Any]]] = [
        (cm.value_zeroing, {}),
        (cm.attention_norms, {"at": "block_out"}),
        (cm.gradient_x_input, asked("llama")),
    ]
    for method, options in plain:
        found, expected = (method(one, tokens, **options).scores for one in (kept, merged))
        assert relative(found, expected) <= FLOAT32_INSIDE
    scores, expected = (
        cm.log_prob_contributions(one, tokens, **asked("llama"), by="head")
        for one in (kept, merged)
    )
    assert relative(scores.scores, expected.scores) <= FLOAT32_INSIDE
    match = r"W_V of blocks.\d.attn is not what it computes with.*adapters.*load_model"
    neurons = cm.log_prob_contributions(kept, tokens[:1], **asked("llama"), by="attn_neuron").top(1)
    weighted: list[tuple[Any, dict[str, Any]]] = [
        (cm.decompx, {}),
        (cm.flow, asked("llama")),
        (cm.query_contributions, {"neurons": neurons}),
    ]
    for method, options in weighted:
        with pytest.raises(cm.UnsupportedModel, match=match):
            method(kept, tokens[:1], **options)


def test_fused_projections_with_adapters_are_refused_in_a_bridge() -> None:
    model = adapted("gpt2", "c_attn")
    kept = zoo_build.bridge(model.get_base_model(), "gpt", dtype=torch.float64, processed=False)
    with pytest.raises(cm.UnsupportedModel, match="does not compute what the Hugging Face model"):
        cm.value_zeroing(kept, words(6))
