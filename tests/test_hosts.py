"""Every family on every class of TransformerLens: what is read, refused and warned of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
import zoo_build
from asked import bound, case_of, keywords, relative, shared, stacks, view_of
from torch import Tensor
from watched import Watched

import tl_contextmix as cm
from tl_contextmix.adapters import as_view
from tl_contextmix.adapters.inputs import Given, make_batch
from tl_contextmix.adapters.passes import run_pass
from tl_contextmix.adapters.verification import CheckRow
from tl_contextmix.adapters.verification.identity_report import HUGGING_FACE
from tl_contextmix.engine.parts import Point
from tl_contextmix.errors import ContextMixWarning

CASES = [pytest.param(case, id=case.id) for case in zoo.cases()]
REFUSED = [pytest.param(case, id=case.id) for case in zoo.REFUSED]


# Reading


@pytest.mark.parametrize("case", CASES)
def test_every_identity_holds_with_room(case: zoo.Case) -> None:
    report = cm.check(zoo.shared(case))
    assert report.ok, str(report)
    # Measured: 1e-14 at most in float64, 4e-7 where the host has float32 inside; the check itself
    # allows 1e-5.
    # What a bridge rounds otherwise than its model (rotary angles) is in `test_hugging_face.py`.
    own = [row for row in report.rows if row.identity != HUGGING_FACE]
    assert max(row.error for row in own) <= bound(case), report.worst()
    blocks = view_of(zoo.shared(case)).every_block()
    names = {row.where for row in report.rows}
    for stack, block in blocks:
        assert {f"{stack} block {block.layer}"} <= names
    opaque = case.family in zoo.OPAQUE_FEED_FORWARD
    assert bool(report.limits) == opaque
    assert all("SoLU" in limit for limit in report.limits)


# The names by which the classes know the same tensor: post-LN blocks (BERT) differ from one class
# to the next, and aliases of the bridge name other tensors than they say (hook_attn_out of BERT is
# behind LN1, hook_resid_mid before LN2).
_PRE: dict[Point, str] = {
    "attn_out": "hook_attn_out",
    "resid_mid": "hook_resid_mid",
    "mlp_out": "hook_mlp_out",
    "resid_post": "hook_resid_post",
    "block_out": "hook_resid_post",
}
_ENCODER: dict[Point, str] = {
    "attn_out": "hook_attn_out",
    "resid_mid": "hook_resid_mid",
    "mlp_out": "hook_mlp_out",
    "resid_post": "hook_resid_post",
    "block_out": "hook_normalized_resid_post",
}
_BRIDGE_POST: dict[Point, str] = {
    "attn_out": "attn.o.hook_out",
    "resid_mid": "ln1.hook_in",
    "mlp_in": "ln1.hook_out",
    "mlp_out": "mlp.out.hook_out",
    "resid_post": "ln2.hook_in",
    "block_out": "hook_out",
}
LINEAR = ("attn_out", "resid_mid")
_PARALLEL = ("neox", "gptj", "parallel")


def named_points(case: zoo.Case) -> dict[Point, str]:
    """The host's own names of our points."""
    if case.host == "HookedEncoder":
        return _ENCODER
    if case.family in ("bert", "roberta"):
        return _BRIDGE_POST
    names = dict(_PRE)
    if case.family in _PARALLEL:
        del names["resid_mid"]  # such a block has no middle
    if case.family == "attn_only":
        del names["resid_mid"], names["mlp_out"]
    if case.family in zoo.OPAQUE_FEED_FORWARD:
        return {point: name for point, name in names.items() if point in LINEAR}
    return names


NAMED = [case for case in zoo.cases() if not case.encoder_decoder]


@pytest.mark.parametrize("case", NAMED, ids=str)
def test_every_point_is_the_hosts_own_tensor(case: zoo.Case) -> None:
    model, given = zoo.shared(case), zoo.inputs(case)
    _, cache = model.run_with_cache(given.tokens)
    for point, name in named_points(case).items():
        found = cm.decompose(model, given.tokens, at=point)
        total = found.parts.sum(dim=3) + found.bias
        for layer in range(total.shape[1]):
            own = cache[f"blocks.{layer}.{name}"]
            assert relative(total[:, layer], own) <= bound(case), (point, layer)


def test_aliases_of_the_bridge_are_not_what_they_say() -> None:
    model, given = shared(case_of("bert", host="TransformerBridge"))
    _, cache = model.run_with_cache(given.tokens)
    for point in ("attn_out", "resid_mid"):
        found = cm.decompose(model, given.tokens, at=point, layer=0)
        total = (found.parts.sum(dim=3) + found.bias)[:, 0]
        # If this fails, TransformerLens has changed: look at the tables above again.
        assert relative(total, cache[f"blocks.0.hook_{point}"]) > 0.1


@pytest.mark.parametrize("case", CASES)
def test_a_map_is_made_of_the_stream_patterns_and_values(case: zoo.Case) -> None:
    model, given = zoo.shared(case), zoo.inputs(case)
    view = view_of(model)
    for stack in stacks(case):
        done = run_pass(view, Given(given.tokens, **keywords(given)), stack=stack)
        endings = {name.rsplit(".", 1)[1] for name in done.trace.values}
        assert endings <= {"hook_in", "hook_resid_pre", "hook_pattern", "hook_v", "hook_z"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", zoo.kinds(), ids=str)
def test_half_precision_models_give_single_precision_maps(
    case: zoo.Case, dtype: torch.dtype
) -> None:
    at = "resid_mid" if case.family in zoo.OPAQUE_FEED_FORWARD else "block_out"
    given = zoo.inputs(case)
    found = cm.attention_norms(zoo.build(case, dtype=dtype), given.tokens, at=at, **keywords(given))
    whole = zoo.shared(case, torch.float32)
    expected = cm.attention_norms(whole, given.tokens, at=at, **keywords(given))
    assert found.scores.dtype == torch.float32
    # Measured over the zoo: 8e-3 in float16 and 6e-2 in bfloat16, whose own layer outputs are as
    # far from float32's; the maths adds nothing to that.
    limit = 2e-2 if dtype == torch.float16 else 0.15
    assert relative(found.scores, expected.scores) <= limit


def test_toy_models_with_tiny_contexts_and_vocabularies() -> None:
    if zoo.major() == 4:
        pytest.skip("TransformerLens 4 builds no HookedTransformer")
    for n_ctx, d_vocab in ((1, 5), (2, 3), (3, 114)):
        sizes = {"n_ctx": n_ctx, "d_vocab": d_vocab, "d_vocab_out": 7}
        options = {"normalization_type": None, "act_fn": "relu", **sizes}
        with zoo_build.quiet():
            model = zoo_build.config_built(options, dtype=torch.float64, seed=0)
        found = cm.decompose(model, torch.zeros(1, n_ctx, dtype=torch.long))
        assert found.parts.shape[2:4] == (n_ctx, n_ctx)


def test_models_that_transformer_lens_builds_itself() -> None:
    if zoo.major() == 2:
        pytest.skip("TransformerLens 2 has no bridge")
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge import TransformerBridge

    sizes = {"d_model": 32, "d_head": 8, "n_heads": 4, "n_layers": 2, "n_ctx": 16, "d_vocab": 61}
    options = {"d_mlp": 64, "act_fn": "gelu", "normalization_type": "LN", "seed": 0}
    with zoo_build.quiet():
        # Its module adds the ways to boot when it is imported.
        boot: Any = TransformerBridge
        model = boot.boot_native(TransformerBridgeConfig(**sizes, **options)).eval()
    report = cm.check(model)
    assert report.ok, str(report)
    # Norms before any training are plain; that alone does not make them folded.
    assert view_of(model).processing == ()


# Refusals


# What a refusal names, by family.
SEEN = {
    "mamba": "got SSMBlockBridge",
    "led": "got LEDForConditionalGeneration",
    "olmo2": "got a relative error of",
    "t5": "HookedEncoderDecoder",
    "vit": "got ViTForImageClassification",
    "wav2vec2": "got Wav2Vec2ForCTC",
    "hubert": "got HubertForCTC",
}


@pytest.mark.parametrize("case", REFUSED)
def test_models_that_would_be_wrong_are_refused_by_name(case: zoo.RefusedCase) -> None:
    with pytest.raises(cm.UnsupportedModel, match=case.match) as raised:
        cm.attention_norms(case.build(), torch.tensor([[5, 6, 7]]))
    message = str(raised.value)
    # What failed, the value seen, what was expected, what to do.
    assert all(part in message for part in (": got ", "; expected ", ". "))
    assert message.endswith(".")
    assert SEEN[case.family] in message


def test_attention_of_a_solu_model_is_answered() -> None:
    case = case_of("solu")
    model, given = zoo.build(case), zoo.inputs(case)
    found = cm.attention_norms(model, given.tokens, at=["attn_out", "resid_mid", "mlp_in"])
    assert len(found) == 3
    match = r"SoLU.*got act_fn='solu_ln'.*Use 'attn_out'"
    with pytest.raises(cm.UnsupportedModel, match=match):
        cm.attention_norms(model, given.tokens, at="mlp_out")


@pytest.mark.parametrize("model", ["gpt2", None, 3, torch.nn.Linear(2, 2)], ids=type)
def test_what_is_no_model_is_refused(model: Any) -> None:
    match = r"got a .*expected a HookedTransformer"
    with pytest.raises(cm.UnsupportedModel, match=match) as raised:
        cm.check(model)
    assert "load_model(name)" in str(raised.value)


def test_a_hugging_face_model_is_refused_with_the_way_out() -> None:
    with pytest.raises(cm.UnsupportedModel, match=r"GPT2LMHeadModel.*TransformerBridge"):
        cm.check(zoo.hf_model("gpt2"))


def test_a_hook_that_is_not_there_is_named() -> None:
    model = zoo.build(case_of("gpt2"))
    view = as_view(model)
    batch = make_batch(view, Given(torch.tensor([[5, 9, 17]])))
    with pytest.raises(cm.UnsupportedModel, match=r"did not show blocks\.0\.attn\.hook_no"):
        view.run(batch, ["blocks.0.attn.hook_no"])


@pytest.mark.skipif(zoo.major() == 2, reason="TransformerLens 2 has no bridge")
def test_a_norm_of_another_formula_is_named() -> None:
    model = zoo.build(case_of("gpt2", host="TransformerBridge"))
    norm = model.blocks[0].ln1.original_component
    norm.forward = lambda x: torch.tanh(x) * norm.weight
    with pytest.raises(cm.UnsupportedModel, match=r"the norm LayerNorm cannot be read"):
        cm.check(model)


@pytest.mark.skipif(zoo.major() == 2, reason="TransformerLens 2 has no bridge")
def test_points_without_names_are_told_apart_in_compatibility_mode() -> None:
    tokens = torch.tensor([[5, 9, 17]])
    found = []
    for names in (None, "", "the same"):
        case = case_of("gpt2", host="TransformerBridge")
        model = zoo.build(case, dtype=torch.float32, processed=True)
        with pytest.warns(ContextMixWarning, match="processed"):
            found.append(cm.attention_norms(model, tokens).scores)
        for point in model.hook_dict.values():
            point.name = names
        assert torch.equal(cm.attention_norms(model, tokens).scores, found[-1])


def test_a_hook_that_resets_hooks_is_suspected() -> None:
    model = zoo.build(case_of("gpt2"))
    cm.check(model)
    model.add_hook("blocks.0.hook_resid_pre", lambda tensor, hook: model.reset_hooks())
    with pytest.raises(cm.UnsupportedModel, match=r"did not show .*A hook that resets hooks"):
        cm.attention_norms(model, torch.tensor([[5, 9, 17]]))


def test_a_readout_that_gives_other_logits_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.build(case_of("gpt2"))
    off = CheckRow("readout(last residual) = logits", "decoder", 0.5, 1e-5)
    monkeypatch.setattr("tl_contextmix.adapters.building.readout_row", lambda view, probe: off)
    tokens = torch.tensor([[5, 9, 17]])
    assert cm.attention_norms(model, tokens).scores.isfinite().all()
    with pytest.raises(cm.UnsupportedModel, match=r"is not read correctly: got a .* error of 0\.5"):
        cm.gradient_x_input(model, tokens)


def test_fused_attention_is_named_with_the_way_out() -> None:
    if zoo.major() != 3:
        pytest.skip("only the bridge of 3.x leaves attention fused")
    from transformer_lens.model_bridge import TransformerBridge

    hf = zoo.hf_model("bert", dtype=torch.float32)
    hf.set_attn_implementation("sdpa")
    with zoo_build.quiet():
        model = TransformerBridge.boot_transformers(
            "tiny", hf_model=hf, tokenizer=zoo_build.load_tokenizer("bert"), device="cpu"
        )
    match = r"did not show blocks.0.attn.hook_pattern: .* sdpa.*set_attn_implementation\(.eager.\)"
    with pytest.raises(cm.UnsupportedModel, match=match):
        cm.check(model)


def test_a_head_that_was_never_trained_reads_nothing_out() -> None:
    model = zoo.build(case_of("bert"))
    # Loaders mark an encoder that was published without its head.
    model._tl_contextmix_headless = True
    report = cm.check(model)
    assert report.ok
    assert "without a masked-LM head" in report.limits[0]
    with pytest.raises(cm.UnsupportedModel, match="without a masked-LM head"):
        as_view(model).readout(torch.zeros(1, 32, dtype=torch.float64))


# Processed weights


def test_fresh_and_switched_off_weights_are_not_called_processed() -> None:
    case = case_of("gpt2")
    model = zoo.build(case)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            plain = "ln_1" in name or "ln_2" in name or ".ln1." in name or ".ln2." in name
            if plain and weight.ndim == 1:
                weight.fill_(0.0 if name.endswith((".b", "bias")) else 1.0)
    assert view_of(model).processing == ()
    if case.host == "HookedTransformer":
        for block in model.blocks:
            block.attn.W_O.data.zero_()
        assert view_of(model).processing == ()


# Cost


def numbers(work: Callable[[], object]) -> int:
    """How many numbers PyTorch computes in a piece of work."""
    found: list[int] = []

    def see(func: Any, args: Any, out: Any) -> None:
        # A view of a weight is no work.
        if isinstance(out, Tensor) and not func.is_view:
            found.append(out.numel())

    with Watched(see):
        work()
    return sum(found)


def test_a_known_model_costs_next_to_nothing() -> None:
    case = case_of("gpt2")
    model, given = zoo.build(case), zoo.inputs(case)
    forward = numbers(lambda: zoo.logits(model, given))
    view_of(model)
    # Looking again is no pass and no look at every weight; measured: a few numbers per weight.
    assert numbers(lambda: as_view(model)) < forward / 10
    assert numbers(as_view(model).hooked) == 0
