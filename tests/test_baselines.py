"""The baselines: each equal to its paper's equation, written out with loops."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import oracles_baselines as oracle
import pytest
import torch
import zoo
import zoo_build
from asked import bound, case_of, host_trace, keywords, relative, shared, stacks, view_of
from torch import Tensor

import tl_contextmix as cm
from tl_contextmix.adapters.inputs import Given, make_batch
from tl_contextmix.adapters.passes import ask_in_pass
from tl_contextmix.adapters.questions import Answer
from tl_contextmix.core.counters import Memory
from tl_contextmix.errors import ContextMixWarning
from tl_contextmix.methods import gradients
from tl_contextmix.methods.alti import alti
from tl_contextmix.methods.attention import attention
from tl_contextmix.methods.decompx import decompx, decompx_vectors
from tl_contextmix.methods.globenc import globenc
from tl_contextmix.methods.gradients import Score, gradient_x_input, integrated_gradients

CASES = zoo.cases()
# One host per family for the slow loops: that hosts agree is tested for the engine they share.
FAMILIES = list({case.family: case for case in CASES}.values())
MAPS = {"attention": attention, "globenc": globenc, "alti": alti, "decompx": decompx}
SALIENCY = {"gradient_x_input": gradient_x_input, "integrated_gradients": integrated_gradients}
ASKED = [
    pytest.param(method, case, id=f"{name}-{case}")
    for name, method in MAPS.items()
    for case in FAMILIES
    if not (name == "decompx" and case.family in zoo.OPAQUE_FEED_FORWARD)
]


def short(case: zoo.Case, tokens: int = 3) -> zoo.Inputs:
    """One sentence, short enough for loops."""
    given = zoo.inputs(case, batch=1)
    decoder = given.decoder_tokens
    return zoo.Inputs(given.tokens[:, :tokens], None if decoder is None else decoder[:, :2])


# Attention and its rollout


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_attention_is_what_hugging_face_says_and_rolls_out_as_its_paper(name: str) -> None:
    case = case_of(name)
    given = zoo.inputs(case)
    with torch.no_grad():
        weights = torch.stack(
            zoo.hf_model(name)(given.tokens, output_attentions=True).attentions, dim=1
        )
    model = zoo.shared(case)
    found = attention(model, given.tokens)
    assert relative(found.scores, weights) <= 1e-10
    assert found.heads == tuple(str(head) for head in range(weights.shape[2]))
    mean = attention(model, given.tokens, heads=False)
    torch.testing.assert_close(mean.scores, weights.mean(2, keepdim=True))
    assert not mean.includes_residual
    for row in range(2):
        expected = oracle.rollout(weights[row].mean(1))
        assert relative(mean.rollout().scores[row, :, 0], expected) <= 1e-10


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_is_the_hosts_pattern(case: zoo.Case) -> None:
    model, given = zoo.shared(case), zoo.inputs(case)
    for stack in stacks(case):
        trace, blocks = host_trace(view_of(model), given, stack)
        index = -1 if stack == "cross" else 0
        expected = torch.stack([trace.pattern(b.attentions[index]) for b in blocks], dim=1)
        found = attention(model, given.tokens, stack=stack, **keywords(given))
        assert torch.equal(found.scores, expected)


# One layer: GlobEnc and ALTI


@pytest.mark.parametrize("case", zoo.kinds(), ids=str)
def test_globenc_and_alti_equal_literal_loops(case: zoo.Case) -> None:
    model, given = zoo.shared(case), zoo.inputs(case, batch=1)
    for stack in stacks(case):
        trace, blocks = host_trace(view_of(model), given, stack)
        kwargs = {"stack": stack, **keywords(given)}
        targets = trace.resid_in(blocks[0]).shape[1]
        for method, literal in ((globenc, oracle.globenc), (alti, oracle.alti)):
            expected = torch.stack(
                [
                    torch.stack(
                        [literal(block, trace, 0, i, stack or "decoder") for i in range(targets)]
                    )
                    for block in (blocks[0], blocks[-1])
                ]
            )
            for max_bytes in (2**30, 3000):
                found = method(model, given.tokens, max_bytes=max_bytes, **kwargs)
                kept = found.scores[0, [0, -1], 0]
                assert relative(kept, expected) <= bound(case), (stack, method, max_bytes)


@pytest.mark.once
def test_globenc_computes_layers_anew_in_which_heads_cancel() -> None:
    """One of several layers: heads that read the same, and write opposites but for a little."""
    hf = zoo.hf_model("gpt2")
    attn = hf.transformer.h[1].attn
    with torch.no_grad():
        for read in (attn.c_attn.weight.view(32, 3, 4, 8), attn.c_attn.bias.view(1, 3, 4, 8)):
            read[:, :, 1:] = read[:, :, :1]
        written = attn.c_proj.weight.view(4, 8, 32)
        written[1::2] = (1e-6 - 1) * written[::2]
    with zoo_build.quiet():
        tokenizer = zoo_build.rows.FAMILIES["gpt2"].tokenizer
        model = zoo_build.bridge(hf, tokenizer, dtype=torch.float64, processed=False)
    tokens = zoo.inputs(case_of("gpt2")).tokens
    expected = cm.decompose(model, tokens, at="resid_mid").norms().scores
    assert float(expected[:, 1, 0].tril(-1).max()) < 1e-5
    assert relative(globenc(model, tokens).scores, expected) <= 1e-12
    layer = globenc(model, tokens, layer=1).scores
    assert relative(layer.tril(-1), expected[:, 1:2].tril(-1)) <= 1e-9


# All layers: DecompX


@pytest.mark.parametrize("bias", ["contributor", "fixed"])
@pytest.mark.parametrize("case", zoo.kinds(), ids=str)
def test_decompx_vectors_add_up_after_every_layer(case: zoo.Case, bias: Any) -> None:
    model, given = zoo.shared(case), zoo.inputs(case)
    for stack in stacks(case):
        kwargs = {"stack": stack, "bias": bias, **keywords(given)}
        if case.family in zoo.OPAQUE_FEED_FORWARD:
            with pytest.raises(cm.UnsupportedModel, match="SoLU"):
                decompx(model, given.tokens, **kwargs)
            continue
        trace, blocks = host_trace(view_of(model), given, stack)
        expected = torch.stack([trace[block.resid_out] for block in blocks], dim=1)
        found = decompx_vectors(model, given.tokens, **kwargs)
        assert relative(found.total(), expected) <= bound(case), stack
        for max_bytes in (2**30, 1):
            norms = decompx(model, given.tokens, max_bytes=max_bytes, **kwargs)
            assert relative(norms.scores, found.norms().scores) <= 1e-12
            expected = found.norms().bias
            assert norms.bias is not None
            assert expected is not None
            assert relative(norms.bias, expected) <= 1e-12


@pytest.mark.parametrize("case", zoo.kinds(), ids=str)
def test_decompx_equals_a_literal_loop_over_tokens_and_heads(case: zoo.Case) -> None:
    if case.family in zoo.OPAQUE_FEED_FORWARD:
        pytest.skip("no slope per neuron")
    model, given = zoo.shared(case), short(case)
    view, stack = view_of(model), stacks(case)[-1]
    trace, blocks = host_trace(view, given, stack)
    encoder = list(view.stacks["encoder"]) if case.encoder_decoder else []
    names = [name for block in (*encoder, *blocks) for name in block.points()]
    batch = make_batch(view, Given(given.tokens, decoder_input=given.decoder_tokens))
    trace = view.run(batch, names)
    convention = "fixed" if case.family in ("gpt2", "llama", "t5") else "contributor"
    final = view.final_norms.get("encoder") if encoder else None
    expected = oracle.decompx(blocks, encoder, final, trace, 0, 400, convention)
    kwargs = {"stack": stack, "bias": convention, **keywords(given)}
    found = decompx_vectors(model, given.tokens, **kwargs)
    ff = blocks[0].feed_forward
    relu = ff is not None and ff.require_activation().kink
    # The oracle's midpoint rule; a kink inside a "fixed" path is misplaced by up to half a step.
    limit = 5e-3 if relu and convention == "fixed" else 1e-4 if relu else 2e-5
    for layer, states in enumerate(expected):
        parts = torch.stack([torch.stack(rows) for rows, _ in states])
        shift = torch.stack([row for _, row in states])
        assert relative(found.parts[0, layer], parts) <= limit, layer
        assert relative(found.bias[0, layer], shift) <= limit, layer


def test_decompx_is_not_rolled_out_twice_and_gives_the_layers_asked_for() -> None:
    model, given = shared(case_of("gpt2"))
    whole = decompx(model, given.tokens)
    with pytest.raises(cm.InvalidInput, match="cannot be rolled out"):
        whole.rollout()
    last = decompx(model, given.tokens, layer=[-1, 0])
    assert last.layers == (len(whole.layers) - 1, 0)
    assert torch.equal(last.scores, whole.scores[:, [-1, 0]])


def test_decompx_refuses_vectors_that_do_not_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = shared(case_of("gpt2"))
    view = view_of(model)
    weights = view.blocks()[0].attentions[0].weights
    values = weights("W_V")
    assert values is not None
    wrong = {"W_V": 2 * values}
    broken = view.blocks()[0].attentions[0]
    object.__setattr__(broken, "weights", lambda name: wrong.get(name, weights(name)))
    with pytest.raises(cm.UnsupportedModel, match="do not add up at layer 0"):
        decompx(model, given.tokens)
    object.__setattr__(broken, "weights", weights)


# Conformance of the maps


@pytest.mark.parametrize(("method", "case"), ASKED)
def test_no_score_comes_from_what_cannot_be_read(method: Any, case: zoo.Case) -> None:
    """What every method promises (rows alone, repetition, layers) is in test_conformance.py."""
    model, given = zoo.shared(case), zoo.inputs(case)
    for stack in stacks(case):
        kwargs = {"stack": stack, **keywords(given)}
        found = method(model, given.tokens, **kwargs)
        assert bool(torch.isfinite(found.scores).all())
        bidirectional = stack in ("encoder", "cross") or case.both_ways
        own = found.scores[..., : found.scores.shape[3]]
        if not bidirectional:
            assert not bool(torch.triu(own, diagonal=1).any())
        elif stack != "cross" and method is not alti:
            assert bool((found.scores > 0).all())


@pytest.mark.parametrize(("method", "case"), ASKED)
def test_padding_scores_nothing_and_changes_nothing(method: Any, case: zoo.Case) -> None:
    model, given = zoo.shared(case), zoo.inputs(case)
    mask = torch.ones_like(given.tokens)
    mask[0, -2:] = 0
    for stack in stacks(case):
        kwargs = {"stack": stack, **keywords(given)}
        found = method(model, given.tokens, attention_mask=mask, **kwargs)
        decoder = given.decoder_tokens
        single: dict[str, Any] = {"stack": stack}
        if decoder is not None:
            single["decoder_input"] = decoder[:1]
        alone = method(model, given.tokens[:1, :-2], **single)
        targets = found.target.mask[0].nonzero()[:, 0].tolist()
        kept = found.select(
            batch=0, target=targets, source=found.source.mask[0].nonzero()[:, 0].tolist()
        )
        assert relative(kept.scores, alone.scores) <= bound(case), stack
        assert float(found.scores[0].sum()) == pytest.approx(float(kept.scores.sum()))


@pytest.mark.parametrize("name", ["gpt2", "bert", "bart", "t5"])
@pytest.mark.parametrize("method", MAPS.values(), ids=list(MAPS))
def test_a_cache_gives_the_same_map(method: Any, name: str) -> None:
    case = case_of(name)
    model, given = zoo.shared(case), zoo.inputs(case)
    view = view_of(model)
    names = []
    for _, block in view.every_block():
        names += [*block.points(), block.resid_out]
        names += [] if block.feed_forward is None else [block.feed_forward.post]
    batch = make_batch(view, Given(given.tokens, decoder_input=given.decoder_tokens))
    cache = dict(view.run(batch, names).values)
    fresh = method(model, given.tokens, **keywords(given))
    ready = method(model, given.tokens, cache=cache, **keywords(given))
    assert relative(ready.scores, fresh.scores) <= bound(case)
    with pytest.raises(cm.InvalidInput, match="the cache lacks"):
        method(model, given.tokens, cache={}, **keywords(given))


# Saliency


def by_hand(hf: Any, module: Any, tokens: Tensor, targets: list[int]) -> Tensor:
    """Gradient times what a module of a Hugging Face model puts out [batch pos d_model]."""
    kept = []

    def hook(module: Any, inputs: Any, output: Tensor) -> Tensor:
        kept.append(output.detach().requires_grad_())
        return kept[-1]

    handle = module.register_forward_hook(hook)
    logits = hf(tokens).logits[:, -1]
    handle.remove()
    value = logits[torch.arange(len(targets)), targets].sum()
    return kept[0].detach() * torch.autograd.grad(value, kept[0])[0]


@pytest.mark.parametrize("name", ["gpt2", "bert", "llama", "neox"])
def test_gradient_x_input_equals_autograd_on_the_hugging_face_model(name: str) -> None:
    case, hf = case_of(name), zoo.hf_model(name)
    tokens, targets = zoo.inputs(case).tokens, [5, 7]
    module = {
        "gpt2": lambda: hf.transformer.drop,
        "bert": lambda: hf.bert.embeddings,
        "llama": lambda: hf.model.embed_tokens,
        "neox": lambda: hf.gpt_neox.embed_in,
    }[name]()
    expected = by_hand(hf, module, tokens, targets)
    scores: dict[Score, Tensor] = {
        "l2": expected.norm(dim=-1),
        "l1": expected.abs().sum(-1),
        "sum": expected.sum(-1).abs(),
    }
    for score, value in scores.items():
        found = gradient_x_input(zoo.shared(case), tokens, target=targets, pos=-1, score=score)
        # Hugging Face's Llama computes norms and rotary angles in float32.
        limit = 1e-5 if name in ("llama", "neox") else 1e-10
        assert relative(found.scores[:, 0, 0, 0], value) <= limit


def asked_of(model: Any, given: zoo.Inputs, **options: Any) -> Any:
    inputs = Given(given.tokens, decoder_input=given.decoder_tokens)
    question, whole = ask_in_pass(view_of(model), inputs, Answer(options.get("target"), pos=-1))
    ((turn, _),) = question.rounds()
    (asked,) = gradients._ask(whole, [turn], options.get("of", "logit"))
    return asked


@pytest.mark.parametrize("of", ["logit", "log_prob"])
@pytest.mark.parametrize("case", zoo.kinds(), ids=str)
def test_gradients_are_the_slopes_of_finite_differences(case: zoo.Case, of: Any) -> None:
    """Also where a host computes in float32 inside, to what differences of those can show."""
    inside = (case.family, case.host) in zoo.FLOAT32_INSIDE
    model = zoo.shared(case)
    asked = asked_of(model, zoo.inputs(case), of=of)
    found = asked.slopes_along(torch.ones(1), torch.ones(1))
    for name, x in asked.inputs.items():
        # Downhill, so that the slope is far from zero.
        step = found[name] / found[name].norm(dim=(1, 2), keepdim=True)
        size = (1e-4 if inside else 1e-7) * float(x.norm())
        ends = [asked.at({**asked.inputs, name: x + s * size * step}) for s in (1, -1)]
        slope = (ends[0] - ends[1]) / (2 * size)
        # T5's ReLU has kinks within the longer step.
        limit = (3e-2 if case.family == "t5" else 1e-3) if inside else 1e-5
        assert relative((found[name] * step).sum(dim=(1, 2)), slope) <= limit


@pytest.mark.once
@pytest.mark.parametrize(
    "name",
    ["gpt2", "opt", "bert", "roberta", "bart", "marian", "mbart", "m2m100", "pegasus", "parallel"],
)
def test_integrated_gradients_are_complete(name: str) -> None:
    """To as many digits as the bias says they lack; post-LN models need few steps."""
    case = case_of(name)
    model = zoo.shared(case)
    asked = asked_of(model, zoo.inputs(case))
    zero = {key: torch.zeros_like(x) for key, x in asked.inputs.items()}
    change = asked.at(asked.inputs) - asked.at(zero)
    assert torch.equal(asked.value, asked.at(asked.inputs))
    parts, missed, whole = gradients._integrate(asked, 200, 2**30)
    torch.testing.assert_close(whole, change)
    torch.testing.assert_close(parts.sum(dim=(1, 2)) + missed, change)
    limit = 1e-9 if name in ("bert", "roberta", "marian") else 1e-2
    assert float((missed / change).abs().max()) <= limit


@pytest.mark.once
def test_integrated_gradients_equal_a_riemann_sum() -> None:
    model, given = shared(case_of("bert"))
    asked = asked_of(model, given, target=3)
    ((name, x),) = asked.inputs.items()
    total = asked.slopes_along((torch.arange(400) + 0.5) / 400, torch.full((400,), 1 / 400))[name]
    found = integrated_gradients(model, given.tokens, target=3, pos=-1)
    assert relative(found.scores[:, 0, 0, 0], (total * x).norm(dim=-1)) <= 1e-4
    assert float(found.bias.max()) <= 1e-7


@pytest.mark.once
@pytest.mark.parametrize("case", zoo.kinds(), ids=str)
def test_points_of_a_path_are_one_batch_as_far_as_they_fit(
    case: zoo.Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, given = zoo.shared(case), zoo.inputs(case)
    batches: list[int] = []
    at_once = gradients._Asked.slopes_along

    def counted(self: Any, points: Tensor, shares: Tensor) -> Any:
        batches.append(len(points))
        return at_once(self, points, shares)

    monkeypatch.setattr(gradients._Asked, "slopes_along", counted)
    ask = functools.partial(
        integrated_gradients, model, given.tokens, steps=9, target=3, pos=-1, **keywords(given)
    )
    one, room = ask(max_bytes=1), 2**20
    assert batches == [1] * 9
    with Memory() as memory:
        some = ask(max_bytes=room)
    assert sum(batches[9:]) == 9
    assert 1 < batches[9] < 9
    # The bound is at most four times too careful.
    assert room / 4 * batches[9] / (batches[9] + 1) < memory.peak <= room
    inside = (case.family, case.host) in zoo.FLOAT32_INSIDE
    for name in ("scores", "bias"):
        assert relative(getattr(some, name), getattr(one, name)) <= (1e-4 if inside else 1e-9)


@pytest.mark.once
@pytest.mark.parametrize(("steps", "warned"), [(1, True), (50, False)])
def test_what_the_steps_miss_is_said(
    steps: int, warned: bool, recwarn: pytest.WarningsRecorder
) -> None:
    warnings.simplefilter("always")
    case = case_of("bert")
    found = integrated_gradients(zoo.shared(case), zoo.inputs(case).tokens, steps=steps, pos=-1)
    assert found.bias is not None
    said = [str(one.message) for one in recwarn if one.category is ContextMixWarning]
    assert bool(said) == warned
    if said:
        assert "in 1 steps miss more than a tenth" in said[0]


@pytest.mark.once
@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_hooks_see_the_sentences_that_were_given(direction: Any) -> None:
    case = case_of("gpt2")
    model, given = zoo.build(case), zoo.inputs(case)
    point = next(
        n for n in ("blocks.0.mlp.hook_out", "blocks.0.hook_mlp_out") if n in model.hook_dict
    )
    kept = torch.ones(2, 6, 1)
    hooks = {
        "fwd": lambda activation, hook: activation + kept,
        "bwd": lambda gradient, hook: (gradient * kept,),
    }
    model.add_hook(point, hooks[direction], dir=direction)
    found = integrated_gradients(model, given.tokens, steps=5, pos=-1)
    assert found.bias is not None
    assert bool(found.scores.any())


@pytest.mark.once
def test_a_prediction_that_never_changes_has_nothing_to_miss(
    recwarn: pytest.WarningsRecorder,
) -> None:
    warnings.simplefilter("always")
    case = case_of("gpt2")
    model, given = zoo.build(case), zoo.inputs(case)
    last = view_of(model).blocks()[-1].resid_out
    model.add_hook(last, lambda activation, hook: activation * 0)
    found = integrated_gradients(model, given.tokens, steps=3, pos=-1)
    assert not bool(found.scores.any() or found.bias.any())
    assert not [one for one in recwarn if one.category is ContextMixWarning]


@pytest.mark.once
def test_everything_given_may_come_from_inference_mode() -> None:
    model, given = shared(case_of("bart"))
    plain = gradient_x_input(model, given.tokens, **keywords(given)).scores
    with torch.inference_mode():
        asked = {name: value.clone() for name, value in keywords(given).items()}
        asked["attention_mask"] = torch.ones_like(given.tokens)
        assert torch.equal(gradient_x_input(model, given.tokens.clone(), **asked).scores, plain)


@pytest.mark.parametrize("case", zoo.kinds(), ids=str)
@pytest.mark.parametrize("name", SALIENCY)
def test_saliency_labels_rows_padding_and_the_model(case: zoo.Case, name: str) -> None:
    model, given = zoo.shared(case), zoo.inputs(case)
    options = {"pos": -1, **({"steps": 3} if name == "integrated_gradients" else {})}
    method = SALIENCY[name]
    found = method(model, given.tokens, **options, **keywords(given))
    main = given.tokens if given.decoder_tokens is None else given.decoder_tokens
    assert found.scores.shape[:4] == (2, 1, 1, 1)
    assert found.target.ids[:, 0].tolist() == found.provenance.options["target"]
    assert found.target.positions().tolist() == [[main.shape[1] - 1]] * 2
    assert not found.scores.requires_grad
    assert all(weight.grad is None for weight in model.parameters())
    mask = torch.ones_like(given.tokens)
    mask[0, -2:] = 0
    padded = method(model, given.tokens, attention_mask=mask, **options, **keywords(given))
    decoder = {} if given.decoder_tokens is None else {"decoder_input": given.decoder_tokens[:1]}
    alone = method(model, given.tokens[:1, :-2], **options, **decoder)
    assert torch.equal(padded.target.ids[0], alone.target.ids[0])
    kept = padded.select(batch=0, source=padded.source.mask[0].nonzero()[:, 0].tolist())
    # Gradients of a float32 norm are further off than its values.
    inside = (case.family, case.host) in zoo.FLOAT32_INSIDE
    assert relative(kept.scores, alone.scores) <= (1e-4 if inside else 1e-9)
    assert padded.provenance.options["target"][:1] == alone.provenance.options["target"]


def test_saliency_refuses_what_it_cannot_answer() -> None:
    case = case_of("gpt2")
    model, tokens = zoo.shared(case), zoo.inputs(case).tokens
    wrong: list[dict[str, Any]] = [
        {"target": 10**6},
        {"target": [1]},
        {"target": True},
        {"target": [1, -1]},
        {"pos": 6},
        {"pos": -7},
        {"of": "loss"},
        {"score": "max"},
    ]
    for options in wrong:
        with pytest.raises(cm.InvalidInput):
            cm.gradient_x_input(model, tokens, **options)
    for steps in (0, True):
        with pytest.raises(cm.InvalidInput, match="an integer from 1"):
            cm.integrated_gradients(model, tokens, steps=steps)
    mask = torch.ones_like(tokens)
    mask[0, -2:] = 0
    with pytest.raises(cm.InvalidInput, match="padding in sentence 0"):
        cm.gradient_x_input(model, tokens, pos=5, attention_mask=mask)
    for method in (cm.globenc, cm.alti, cm.decompx, cm.integrated_gradients):
        with pytest.raises(cm.InvalidInput, match="max_bytes"):
            method(model, tokens, max_bytes=0)


@pytest.mark.once
def test_gradients_close_to_zero_do_not_overflow_and_others_are_refused() -> None:
    case = case_of("mistral")  # behind an RMSNorm of 1e-6 gradients are large
    given, model = zoo.inputs(case), zoo.build(case, dtype=torch.float16)
    asked: dict[str, Any] = {"steps": 4, "target": 7}
    found = integrated_gradients(model, given.tokens, **asked).scores
    expected = integrated_gradients(zoo.build(case), given.tokens, **asked).scores
    assert relative(found.double(), expected) <= 1e-2
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.mul_(1e-4 if "embed" in name else 300 if "lm_head" in name else 1)
    with pytest.raises(cm.InvalidInput, match="float16 overflows .* in the gradients"):
        gradient_x_input(model, given.tokens)
