"""Models with LoRA adapters, by PEFT itself where it is installed: merged, or followed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
import zoo_build
from asked import FLOAT32_INSIDE, relative, words
from zoo_configs import TokenizerKind

import tl_contextmix as cm

peft: Any = pytest.importorskip("peft")
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
    ],
)
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
