"""Hooks of the user's own, SAEs and replacement modules: followed by what still holds, or refused.

Oracles are hooks placed by hand on the host, and sums of what they show, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
import zoo
from asked import case_of, keywords, recorded, relative, shared, view_of
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

import tl_contextmix as cm
from tl_contextmix.engine.parts import POINTS
from tl_contextmix.evaluation import hook_names
from tl_contextmix.methods.decompx import decompx_vectors


def cases_of(*families: str) -> list[Any]:
    """A bridge is the same on all versions; the Hooked classes are on the older ones alone."""
    return [
        pytest.param(case, id=case.id, marks=[pytest.mark.once] if "Bridge" in case.host else [])
        for case in zoo.cases()
        if case.family in families
    ]


GPT2, BERT = cases_of("gpt2"), cases_of("bert")
OTHERS = cases_of("bert", "gemma2", "neox", "bart", "t5")
EXACT = 1e-10
SPLITS = ("layer", "head", "position", "attn_neuron", "ff_neuron")
Edit = Callable[[Tensor, Any], Tensor]


def direction(width: int) -> Tensor:
    return torch.randn(width, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def steer(x: Tensor, hook: Any) -> Tensor:
    return x + direction(x.shape[-1])


def steer_in_place(x: Tensor, hook: Any) -> Tensor:
    x += direction(x.shape[-1])
    return x


def ablate_head(x: Tensor, hook: Any) -> Tensor:
    x = x.clone()
    x[:, :, 0] = 0
    return x


def halve_heads(x: Tensor, hook: Any) -> Tensor:
    return 0.5 * x


def mean_heads(x: Tensor, hook: Any) -> Tensor:
    return x.mean(1, keepdim=True).expand_as(x).clone()


def ablate_neuron(x: Tensor, hook: Any) -> Tensor:
    x = x.clone()
    x[..., 3] = 0
    return x


def of_points(*points: str) -> set[str]:
    return {f"decompose {point}" for point in points}


def by(*splits: str) -> set[str]:
    return {f"log_prob by {split}" for split in splits}


SOURCES = by("position", "attn_neuron")
BEHIND = of_points("mlp_out", "resid_post", "block_out")
FLOWS = {"decompx", "flow", "information_flow_routes"}
MAPS = {"value_zeroing", *FLOWS, "alti", "globenc", "token_memory", *of_points(*POINTS)}
READING = MAPS - of_points("attn_out")
# Where a hook is, what it does, and which methods say that what they need no longer holds.
TABLE: dict[str, tuple[str, Edit, set[str]]] = {
    "values": ("blocks.0.attn.hook_v", ablate_head, FLOWS),
    "a head ablated": ("blocks.0.attn.hook_z", ablate_head, set()),
    "heads scaled": ("blocks.0.attn.hook_z", halve_heads, set()),
    "heads replaced": ("blocks.0.attn.hook_z", mean_heads, MAPS | SOURCES),
    "patterns": ("blocks.0.attn.hook_pattern", lambda x, hook: x.flip(1), set()),
    "attention output": ("blocks.0.hook_attn_out", steer, MAPS | SOURCES | by("head")),
    "neurons": (
        "blocks.0.mlp.hook_post",
        ablate_neuron,
        {"value_zeroing", *FLOWS, "token_memory", *BEHIND},
    ),
    "feed-forward output": (
        "blocks.0.hook_mlp_out",
        steer,
        {"value_zeroing", *FLOWS, "globenc", "ff_memories", *BEHIND, *by("ff_neuron")},
    ),
    "stream behind a block": ("blocks.0.hook_resid_post", steer, FLOWS),
    "stream in front of a block": ("blocks.1.hook_resid_pre", steer_in_place, set()),
    "stream in front of the first": ("blocks.0.hook_resid_pre", steer, set()),
    "stream in the middle": ("blocks.0.hook_resid_mid", steer, FLOWS),
}


def asked(model: Any, tokens: Tensor) -> dict[str, Callable[[], Any]]:
    """Every method that looks at a pass."""
    points = {f"decompose {at}": partial(cm.decompose, model, tokens, at=at) for at in POINTS}
    splits = {
        f"log_prob by {split}": partial(cm.log_prob_contributions, model, tokens, by=split)
        for split in SPLITS
    }
    return {
        "attention": partial(cm.attention, model, tokens),
        "value_zeroing": partial(cm.value_zeroing, model, tokens),
        "decompx": partial(decompx_vectors, model, tokens),
        "flow": partial(cm.flow, model, tokens[:1], k=5),
        "information_flow_routes": partial(cm.information_flow_routes, model, tokens[:1]),
        "alti": partial(cm.alti, model, tokens),
        "globenc": partial(cm.globenc, model, tokens),
        "token_memory": partial(cm.token_memory, model, tokens, neurons=[0], pos=[3]),
        "ff_memories": partial(cm.ff_memories, model, tokens),
        **points,
        **splits,
    }


def layer_norm(x: Tensor, norm: Any) -> Tensor:
    return nn.functional.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)


def host_points(model: Any, given: zoo.Inputs) -> list[dict[str, Tensor]]:
    """Every point of two pre-LN blocks as the host computes it, edits included."""
    names = ("resid_pre", "attn_out", "mlp_out", "resid_post", "resid_mid")
    every = [f"blocks.{layer}.hook_{name}" for layer in range(2) for name in names]
    seen, found = recorded(model, given, every), []
    for layer, block in enumerate(view_of(model).blocks()[:2]):
        pre, attn, mlp, post, read = (seen[f"blocks.{layer}.hook_{name}"] for name in names)
        points = {
            "attn_out": attn,
            # A bridge shows what its norm reads, which an edit of it leaves the stream out of.
            "resid_mid": pre + attn if hasattr(model, "original_model") else read,
            "mlp_in": layer_norm(read, block.feed_forward.norm_in),
            "mlp_out": mlp,
            "resid_post": post,
            "block_out": post,
        }
        found.append(points)
    return found


@pytest.mark.parametrize("place", TABLE)
@pytest.mark.parametrize("case", GPT2)
def test_a_method_is_refused_only_where_what_it_needs_is_broken(case: zoo.Case, place: str) -> None:
    model, given = shared(case)
    view_of(model)
    name, edit, broken = TABLE[place]
    bridge = hasattr(model, "original_model")
    if place == "stream in the middle" and bridge:
        broken = READING  # A bridge's hook_resid_mid is what a norm reads, not the stream
    with model.hooks(fwd_hooks=[(name, edit)]):
        logits = zoo.logits(model, given)[:, -1].log_softmax(-1)
        refused, points = set(), host_points(model, given)
        for what, ask in asked(model, given.tokens).items():
            try:
                found = ask()
            except cm.UnsupportedModel as error:
                refused.add(what)
                message = str(error)
                assert "add up" in message or f"hooks of your own at {name}" in message, message
                continue
            if what.startswith("decompose"):
                for layer in range(2):
                    expected = points[layer][what.split()[1]]
                    assert relative(found.total()[:, layer], expected) <= EXACT, (what, layer)
            elif what.startswith("log_prob"):
                own = logits.gather(1, found.target.ids)[:, 0]
                assert relative(found.trajectory[:, -1], own) <= EXACT, what
            elif what == "decompx":
                assert relative(found.total()[:, 1], points[1]["block_out"]) <= EXACT
        assert refused == broken


@pytest.mark.parametrize("case", GPT2)
def test_a_head_ablated_at_its_z_has_no_parts(case: zoo.Case) -> None:
    """As one whose values are zero."""
    model, given = shared(case)
    found = []
    for name in ("hook_z", "hook_v"):
        with model.hooks(fwd_hooks=[(f"blocks.1.attn.{name}", ablate_head)]):
            maps = cm.attention_norms(model, given.tokens, at="attn_out", heads=True, layer=1)
            parts = cm.decompose(model, given.tokens, at="block_out", layer=1).parts
            by_source = cm.log_prob_contributions(model, given.tokens, by="position").scores
            found.append((maps.scores, parts, by_source.nan_to_num()))
    assert float(found[0][0][:, 0, 0].abs().max()) == 0
    assert float(found[0][0][:, 0, 1].abs().max()) > 1e-3
    for one, other in zip(*found, strict=True):
        assert relative(one, other) <= EXACT


def frozen_log_probs(model: Any, vectors: list[Tensor], target: Tensor) -> Tensor:
    """Log-probabilities of a target after each vector is added, the final norm's scale held."""
    readout = view_of(model).readout
    norm, W_U, b_U = readout.norm, readout.weights("W_U"), readout.weights("b_U")
    states = torch.stack([torch.zeros_like(vectors[0]), *vectors], dim=1).cumsum(1)
    whole = states[:, -1:] - states[:, -1:].mean(-1, keepdim=True)
    scale = (whole.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    assert norm.bias is not None
    assert norm.weight is not None
    assert norm is not None
    hidden = (states - states.mean(-1, keepdim=True)) / scale * norm.weight + norm.bias
    assert b_U is not None
    assert W_U is not None
    log_probs = (hidden @ W_U + b_U).log_softmax(-1)
    return log_probs.gather(-1, target[:, None].expand(-1, states.shape[1], 1))[..., 0]


EDITS: list[tuple[str, Edit]] = [
    ("blocks.0.hook_resid_pre", steer),
    ("blocks.0.attn.hook_z", mean_heads),
    ("blocks.0.hook_mlp_out", steer),
    ("blocks.1.hook_resid_pre", steer_in_place),
    ("blocks.1.hook_attn_out", lambda x, hook: 0 * x),
    ("blocks.1.mlp.hook_post", ablate_neuron),
    ("blocks.1.hook_resid_post", steer),
]


@pytest.mark.parametrize("case", GPT2)
def test_layers_and_steering_telescope_to_the_edited_log_probability(case: zoo.Case) -> None:
    model, given = shared(case)
    count = len(view_of(model).blocks())
    at = ("hook_attn_out", "hook_mlp_out", "hook_resid_post")
    names = [f"blocks.{layer}.{name}" for layer in range(count) for name in at]
    clean = recorded(model, given, ["blocks.0.hook_resid_pre"])["blocks.0.hook_resid_pre"]
    with model.hooks(fwd_hooks=EDITS):
        seen = {name: x[:, -1] for name, x in recorded(model, given, names).items()}
        found = cm.log_prob_contributions(model, given.tokens, by="layer")
    added = direction(clean.shape[-1]).expand_as(clean[:, -1])
    vectors, steps = [clean[:, -1], added], ["embed", "L0 resid_pre steering"]
    for layer in range(count):
        if layer == 1:
            vectors, steps = [*vectors, added], [*steps, "L1 resid_pre steering"]
        for kind in ("attn", "mlp"):
            vectors.append(seen[f"blocks.{layer}.hook_{kind}_out"])
            steps.append(f"L{layer} {kind}")
        if layer == 1:
            vectors, steps = [*vectors, added], [*steps, "L1 resid_post steering"]
    expected = frozen_log_probs(model, vectors, found.target.ids)
    assert list(found.steps) == ["nothing", *steps]
    assert [found.components.label(0, place) for place in range(len(steps))] == steps
    assert relative(found.trajectory, expected) <= EXACT
    assert relative(found.scores, expected.diff(dim=1)) <= EXACT
    assert not bool(found.components.is_bias().any())
    assert "resid_post steering" in found._repr_html_()


@pytest.mark.parametrize("case", GPT2)
def test_changed_heads_and_ablated_neurons_are_components_as_they_are(case: zoo.Case) -> None:
    model, given = shared(case)
    block = view_of(model).blocks()[0]
    ff = block.feed_forward
    edits = [("blocks.0.attn.hook_z", mean_heads), ("blocks.0.mlp.hook_post", ablate_neuron)]
    names = ["hook_resid_pre", "attn.hook_z", "hook_attn_out", "mlp.hook_post"]
    with model.hooks(fwd_hooks=edits):
        heads = cm.log_prob_contributions(model, given.tokens, by="head", target=7)
        neurons = cm.log_prob_contributions(model, given.tokens, by="ff_neuron", target=7)
        seen = recorded(model, given, [f"blocks.0.{name}" for name in names])
        last = recorded(model, given, ["blocks.2.hook_resid_post"])["blocks.2.hook_resid_post"]
    pre, z, attn, post = (seen[f"blocks.0.{name}"][:, -1] for name in names)
    for result, before, written, axis in (
        (heads, pre, torch.einsum("bhd,hdm->bhm", z, block.attentions[0].W_O), "head"),
        (neurons, pre + attn, post[..., None] * ff.W_out, "neuron"),
    ):
        numbers = getattr(result.components, axis)[0]
        for index in (0, 1, 3):
            mine = (result.components.layer[0] == 0) & (numbers == index)
            state = [before, written[:, index], last[:, -1] - before - written[:, index]]
            # The scale that is held is that of the whole stream: the rest is added behind.
            log_probs = frozen_log_probs(model, state, torch.full((len(pre), 1), 7))
            expected = log_probs[:, 2] - log_probs[:, 1]
            assert relative(result.scores[:, mine][:, 0], expected) <= 1e-8
    ablated = (neurons.components.layer[0] == 0) & (neurons.components.neuron[0] == 3)
    assert float(neurons.scores[:, ablated].abs().max()) == 0


@pytest.mark.parametrize("case", GPT2)
def test_what_neurons_read_of_steering_is_a_share_of_its_own(case: zoo.Case) -> None:
    model, given = shared(case)
    with model.hooks(fwd_hooks=[("blocks.1.hook_resid_pre", steer)]):
        found = cm.query_contributions(model, given.tokens, neurons=[(2, 5)], target=7)
        pre = recorded(model, given, ["blocks.2.mlp.hook_pre"])["blocks.2.mlp.hook_pre"]
    kinds = [found.components.label(0, place) for place in range(found.scores.shape[1])]
    assert "L1 resid_pre steering" in kinds
    total = found.inner.nansum(dim=-1)[:, 0] + found.constant[:, 0]
    assert relative(total, pre[:, -1, 5]) <= EXACT


def replace_stream(x: Tensor, hook: Any) -> Tensor:
    return torch.ones_like(x)


@pytest.mark.parametrize("case", [*GPT2, *OTHERS])
def test_values_are_zeroed_in_the_edited_pass(case: zoo.Case) -> None:
    """Against the host itself, with a value zeroed and the hooks on."""
    model, given = shared(case)
    tokens = {"input": given.tokens, **keywords(given)}
    view = view_of(model)
    block = view.blocks()[0]
    attention, ff = block.attentions[0], block.feed_forward
    bridge = hasattr(model, "original_model")
    edits: list[tuple[str, Edit]] = [(attention.mixed, ablate_head)]
    for sublayer in (attention, ff):
        # What a bridge's pre-LN norm reads is not the stream.
        points = [name for name in sublayer.edits.stream if name in model.hook_dict]
        if points and not (bridge and sublayer is attention and ff.norm_in):
            edits.append((points[0], steer))
    bound = 1e-6 if (case.family, case.host) in zoo.FLOAT32_INSIDE else EXACT
    with model.hooks(fwd_hooks=edits):
        found = cm.value_zeroing(model, layer=0, metric="euclidean", **tokens).scores[:, 0, 0]
        whole = recorded(model, given, [block.resid_out])[block.resid_out]
        for source in range(found.shape[-1]):

            def zero(x: Tensor, hook: Any, source: int = source) -> Tensor:
                x = x.clone()
                x[:, source] = 0
                return x

            with model.hooks(fwd_hooks=[(attention.value, zero)]):
                without = recorded(model, given, [block.resid_out])[block.resid_out]
            off = found[..., source] - (without - whole).norm(dim=-1)
            assert float(off.abs().max()) <= bound * float(whole.norm(dim=-1).max())
    assert float(found.abs().max()) > 1e-3
    assert relative(cm.value_zeroing(model, layer=0, **tokens).scores[:, 0, 0], found) > 1e-2
    for name in (attention.mixed, ff.edits.stream[0]):
        with (
            model.hooks(fwd_hooks=[(name, replace_stream)]),
            pytest.raises(cm.UnsupportedModel, match=r"something else in layer 0|a factor \*"),
        ):
            cm.value_zeroing(model, layer=0, **tokens)


# Messages, check and caches


@pytest.mark.parametrize("case", GPT2)
def test_messages_name_the_hook_and_the_way_out(case: zoo.Case) -> None:
    model, given = shared(case)
    ways = {
        "heads replaced": (cm.alti, {}, "Edit hook_v instead of hook_z"),
        "attention output": (cm.decompose, {"at": "attn_out"}, "Edit hook_v, or the stream"),
        "neurons": (cm.decompose, {"at": "mlp_out"}, "Ask for a point in front of the neurons"),
        "stream behind a block": (cm.decompx, {}, "Steer at hook_resid_pre"),
    }
    for place, (method, options, way) in ways.items():
        name, edit, _ = TABLE[place]
        bystander = ("blocks.1.attn.hook_q", lambda x, hook: x)
        with (
            model.hooks(fwd_hooks=[bystander, (name, edit)]),
            pytest.raises(cm.UnsupportedModel) as raised,
        ):
            method(model, given.tokens, **options)
        message = str(raised.value)
        assert way in message
        # Of several hooks those that edit something are named, as the user wrote them.
        assert f"with hooks of your own at {name}" in message
        assert "hook_q" not in message


@pytest.mark.parametrize("case", GPT2)
def test_no_logit_is_taken_apart_where_hooks_change_the_readout(case: zoo.Case) -> None:
    model, given = shared(case)
    name = f"ln_final.hook_{'out' if hasattr(model, 'original_model') else 'normalized'}"
    ways = {cm.log_prob_contributions: {}, cm.flow: {}, cm.decompx: {"of": "logit"}}
    for method, options in {**ways, cm.alti: {"of": "logit"}}.items():
        with (
            model.hooks(fwd_hooks=[(name, halve_heads)]),
            pytest.raises(cm.UnsupportedModel, match="Take off hooks on the final norm"),
        ):
            method(model, given.tokens[:1], **options)


@pytest.mark.parametrize("case", GPT2)
def test_check_says_that_hooks_were_off(case: zoo.Case) -> None:
    model, _ = shared(case)
    assert not cm.check(model).hooked
    with model.hooks(fwd_hooks=[("blocks.0.attn.hook_z", ablate_head)]):
        report = cm.check(model)
        assert report.ok
        assert [place.split(" ")[0] for place in report.hooked] == ["blocks.0.attn.hook_z"]
        assert "looked at without your hooks at blocks.0.attn.hook_z" in repr(report)
    assert "your hooks" not in repr(cm.check(model))


NAMED: dict[str, Any] = {
    "attention_norms": {"at": "mlp_out"},
    "attention": {},
    "value_zeroing": {},
    "decompx": {},
    "log_prob_contributions": {"by": "head"},
    "query_contributions": {"neurons": [(1, 2)], "target": 7},
}


@pytest.mark.parametrize("case", GPT2)
def test_a_cache_of_the_names_that_a_method_reads_is_enough(case: zoo.Case) -> None:
    model, given = shared(case)
    for name, options in NAMED.items():
        method = getattr(cm, name)
        names = hook_names(model, partial(method, **options))
        if not options:
            assert hook_names(model, name) == names
        _, cache = model.run_with_cache(given.tokens, names_filter=names)
        found = method(model, given.tokens, cache=cache, **options).scores
        fresh = method(model, given.tokens, **options).scores
        assert relative(found.nan_to_num(), fresh.nan_to_num()) <= 1e-12
    some = hook_names(model, partial(cm.attention, layer=1))
    assert {name.split(".")[1] for name in some if name.startswith("blocks")} == {"1"}
    with pytest.raises(cm.InvalidInput, match="a method that takes `cache`"):
        hook_names(model, "gradient_x_input")
    with pytest.raises(cm.InvalidInput, match="value_zeroing"):
        hook_names(model, "value_zero")


@pytest.mark.parametrize("case", GPT2)
def test_the_error_lists_all_that_a_cache_lacks(case: zoo.Case) -> None:
    model, given = shared(case)
    _, cache = model.run_with_cache(given.tokens, names_filter=lambda name: "pattern" in name)
    with pytest.raises(cm.InvalidInput, match="hook_names") as raised:
        cm.attention_norms(model, given.tokens, cache=cache)
    for block in view_of(model).blocks():
        assert block.resid_in in str(raised.value)
        assert block.attentions[0].value in str(raised.value)
        assert block.attentions[0].pattern not in str(raised.value)


@pytest.mark.parametrize("case", GPT2)
def test_steering_is_found_in_a_cache_too(case: zoo.Case) -> None:
    """Between blocks; inside of one a cache does not show where something was added."""
    model, given = shared(case)
    asked_for = {"by": "layer", "target": 7}
    with model.hooks(fwd_hooks=[("blocks.1.hook_resid_pre", steer)]):
        _, cache = model.run_with_cache(given.tokens)
        fresh = cm.log_prob_contributions(model, given.tokens, **asked_for)
    found = cm.log_prob_contributions(model, given.tokens, cache=cache, **asked_for)
    assert found.steps == fresh.steps
    assert relative(found.scores, fresh.scores) <= EXACT
    with model.hooks(fwd_hooks=[("blocks.1.hook_mlp_out", steer)]):
        _, cache = model.run_with_cache(given.tokens)
    with pytest.raises(cm.UnsupportedModel, match="as the cache holds it"):
        cm.log_prob_contributions(model, given.tokens, cache=cache, **asked_for)


# Other kinds of blocks: a norm behind each sum, behind a sublayer, in front of both, two stacks


@pytest.mark.parametrize("case", OTHERS)
def test_steering_is_followed_in_blocks_of_every_kind(case: zoo.Case) -> None:
    model, given = shared(case)
    view = view_of(model)
    first, block = view.blocks()[:2]
    tokens = {"input": given.tokens, **keywords(given)}
    pos = -1 if view.base_stack(None) == "decoder" else 2
    edits = [(first.attentions[0].mixed, mean_heads), (block.resid_in, steer_in_place)]
    with model.hooks(fwd_hooks=edits):
        logits = zoo.logits(model, given)[:, pos].log_softmax(-1)
        found = cm.log_prob_contributions(model, pos=pos, target=7, **tokens)
        heads = cm.log_prob_contributions(model, pos=pos, target=7, by="head", **tokens)
        parts = cm.decompose(model, layer=1, at="block_out", **tokens)
        kept = recorded(model, given, [block.resid_out])[block.resid_out]
        with pytest.raises(cm.UnsupportedModel, match=r"a factor \* pattern @ v = z"):
            cm.attention_norms(model, layer=0, at="attn_out", **tokens)
    bound = 1e-6 if (case.family, case.host) in zoo.FLOAT32_INSIDE else EXACT
    assert "L1 resid_pre steering" in found.steps
    assert relative(found.trajectory[:, -1], logits[:, 7]) <= bound
    assert relative(heads.trajectory, found.trajectory) <= bound
    assert relative(parts.total()[:, 0], kept) <= bound
    assert math.isfinite(float(heads.scores.nansum()))


@pytest.mark.parametrize("case", BERT)
def test_an_addition_in_front_of_a_norm_passes_it(case: zoo.Case) -> None:
    """A post-LN block's sums are normed: what was added to them goes through all that follow."""
    model, given = shared(case)
    block = view_of(model).blocks()[0]
    attention, ff = block.attentions[0], block.feed_forward
    for name, label in (
        (attention.edits.stream[0], "L0 resid_mid steering"),
        (ff.edits.stream[0], "L0 resid_post steering"),
    ):
        with model.hooks(fwd_hooks=[(name, steer)]):
            logits = zoo.logits(model, given)[:, 2].log_softmax(-1)
            found = cm.log_prob_contributions(model, given.tokens, pos=2, target=7)
            parts = cm.decompose(model, given.tokens, layer=0, at="block_out")
            kept = recorded(model, given, [block.resid_out])[block.resid_out]
        assert label in found.steps
        assert relative(found.trajectory[:, -1], logits[:, 7]) <= 1e-6
        assert relative(parts.total()[:, 0], kept) <= 1e-6


# SAEs


class Sae(nn.Module):
    """What SAELens puts in the place of a hook point: an SAE with hook points of its own."""

    def __init__(self, width: int, error: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        shape = (width, 2 * width)
        weights = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
        self.W_enc, self.W_dec = (nn.Parameter(0.2 * weight) for weight in weights)
        self.b_dec = nn.Parameter(torch.linspace(-1, 1, width, dtype=torch.float64))
        self.error = error
        self.hook_sae_acts_post, self.hook_sae_output = HookPoint(), HookPoint()

    def forward(self, x: Tensor) -> Tensor:
        """Reconstructs activations, all heads of a position at once, and may add what is missed."""
        flat = x if x.shape[-1] == len(self.b_dec) else x.flatten(2)
        features = self.hook_sae_acts_post(((flat - self.b_dec) @ self.W_enc).relu())
        out = features @ self.W_dec.T + self.b_dec
        out = out + (flat - out).detach() if self.error else out
        return self.hook_sae_output(out.view_as(x))


@contextmanager
def attached(model: Any, name: str, sae: Sae) -> Iterator[None]:
    """As `HookedSAETransformer.saes` and `SAETransformerBridge.saes`."""
    registry = getattr(model, "_hook_registry", None)
    path = name if registry is None else model.hook_dict[name].name
    parent, _, last = path.rpartition(".")
    holder = model.get_submodule(parent)
    before = holder._modules[last]
    setattr(holder, last, sae)
    inner: dict[str, Any] = {
        f"{path}.{n}": point for n, point in sae.named_modules() if n.startswith("hook_")
    }
    if registry is None:
        model.setup()
    else:
        registry.update({path: sae, **inner})
        for one, point in inner.items():
            point.name = one
    try:
        yield
    finally:
        holder._modules[last] = before
        if registry is None:
            model.setup()
        else:
            registry[path] = before
            for one in inner:
                del registry[one]


SAES = {
    "blocks.1.hook_resid_pre": set(),
    "blocks.0.attn.hook_v": FLOWS,
    "blocks.0.attn.hook_z": MAPS | SOURCES,
    "blocks.0.hook_mlp_out": TABLE["feed-forward output"][2],
}


SCORED = {"attention", "value_zeroing", "globenc", "decompose mlp_out"}
SCORED |= by("layer", "head", "position", "ff_neuron")


def answers_to(asks: dict[str, Callable[[], Any]]) -> dict[str, Tensor | str]:
    """What methods find, or why they refuse."""
    found: dict[str, Tensor | str] = {}
    for what, ask in asks.items():
        try:
            result = ask()
        except cm.UnsupportedModel as refusal:
            found[what] = str(refusal)
        else:
            found[what] = result.parts if what.startswith("decompose") else result.scores
    return found


@pytest.mark.parametrize("error", [True, False], ids=["with its error", "without"])
@pytest.mark.parametrize("case", GPT2)
def test_an_sae_is_a_hook_that_does_what_it_does(case: zoo.Case, error: bool) -> None:
    model, given = zoo.build(case), zoo.inputs(case)
    sae = Sae(view_of(model).blocks()[0].attentions[0].W_O.shape[2], error)
    asks = {what: ask for what, ask in asked(model, given.tokens).items() if what in SCORED}
    answers = partial(answers_to, asks)
    plain = answers()
    for name, broken in SAES.items():
        with attached(model, name, sae):
            spliced, report = answers(), cm.check(model)
        with model.hooks(fwd_hooks=[(name, lambda x, hook: sae(x))]):
            hooked = answers()
        assert report.ok
        assert [place.split(" ")[0] for place in report.hooked] == [name]
        refused = {what for what, scores in spliced.items() if isinstance(scores, str)}
        assert refused == (set() if error else broken & asks.keys())
        assert all(f"hooks of your own at {name}" in str(spliced[what]) for what in refused)
        for what, scores in spliced.items():
            by_hook, without = hooked[what], plain[what]
            assert isinstance(scores, str) is isinstance(by_hook, str)
            if isinstance(scores, Tensor) and isinstance(by_hook, Tensor):
                assert relative(scores.nan_to_num(), by_hook.nan_to_num()) <= EXACT
                if error and "log_prob" not in what:
                    assert isinstance(without, Tensor)
                    assert relative(scores, without) <= 1e-8
    after, before = answers()["attention"], plain["attention"]  # and off again
    assert isinstance(after, Tensor)
    assert isinstance(before, Tensor)
    assert torch.equal(after, before)
    assert not cm.check(model).hooked


def with_saelens(model: Any) -> Any:
    """The model as SAELens loads it."""
    if hasattr(model, "original_model"):
        analysis = pytest.importorskip("sae_lens.analysis.sae_transformer_bridge")
        model.__class__ = analysis.SAETransformerBridge
        model._acts_to_saes, model._transcoder_output_hooks = {}, {}
        return model
    lens = pytest.importorskip("sae_lens")
    found = lens.HookedSAETransformer(model.cfg, tokenizer=model.tokenizer).to(torch.float64)
    found.load_state_dict(model.state_dict())
    return found.eval()


@pytest.mark.parametrize("error", [True, False], ids=["with its error", "without"])
@pytest.mark.parametrize("case", GPT2)
def test_saelens_itself_attaches_what_a_hook_does(case: zoo.Case, error: bool) -> None:
    """Where SAELens is installed, which pins versions of its own."""
    lens = pytest.importorskip("sae_lens")
    wrapper = pytest.importorskip("sae_lens.analysis.hooked_sae_transformer")._SAEWrapper
    model, given = with_saelens(zoo.build(case)), zoo.inputs(case)
    bridge, width = hasattr(model, "original_model"), model.cfg.d_model
    asks = {what: ask for what, ask in asked(model, given.tokens).items() if what in SCORED}
    # Last z: once its SAE is off, the bridge of SAELens has no values per head any more.
    for name in ("blocks.1.hook_resid_pre", "blocks.0.hook_mlp_out", "blocks.0.attn.hook_z"):
        sae = lens.StandardSAE(
            lens.StandardSAEConfig(
                d_in=width,
                d_sae=2 * width,
                dtype="float64",
                reshape_activations="hook_z" if name.endswith("z") else "none",
            )
        )
        sae.cfg.metadata.hook_name = name
        with torch.no_grad():
            for number, weight in enumerate(sae.parameters()):
                weight.copy_(0.2 * torch.randn(weight.shape, generator=torch.manual_seed(number)))

        if bridge:  # where a hook that edits does something else than a module in its place
            point, kept = "blocks.1.attn.hook_pattern", []
            keep = [(point, lambda x, hook, kept=kept: kept.append(x.detach()))]
            with model.saes([sae], use_error_term=error):
                model.run_with_hooks(given.tokens, fwd_hooks=keep)
                found, report = cm.attention(model, given.tokens), cm.check(model)
            assert report.ok
            assert report.hooked == (model._resolve_hook_name(name),)
            assert relative(found.scores[:, 1], kept[0]) <= EXACT
            continue

        def edit(x: Tensor, hook: Any, sae: Any = sae) -> Tensor:
            return wrapper(sae, use_error_term=error)(x)

        with model.saes([sae], use_error_term=error):
            spliced, report = answers_to(asks), cm.check(model)
        with model.hooks(fwd_hooks=[(name, edit)]):
            hooked = answers_to(asks)
        assert [place.split(" ")[0] for place in report.hooked] == [name]
        for what, found in spliced.items():
            by_hook = hooked[what]
            assert isinstance(found, str) is isinstance(by_hook, str), what
            if isinstance(found, Tensor) and isinstance(by_hook, Tensor):
                assert relative(found.nan_to_num(), by_hook.nan_to_num()) <= EXACT, what
    if not bridge:
        assert not cm.check(model).hooked


# circuit-tracer


class ReplacementMlp(nn.Module):
    """As circuit-tracer's: the model's own feed-forward sublayer with more hook points."""

    def __init__(self, old_mlp: nn.Module) -> None:
        super().__init__()
        self.old_mlp, self.hook_in, self.hook_out = old_mlp, HookPoint(), HookPoint()

    def forward(self, x: Tensor) -> Tensor:
        """Computes what it did."""
        return self.hook_out(self.old_mlp(self.hook_in(x)))


class ReplacementUnembed(nn.Module):
    """As circuit-tracer's."""

    def __init__(self, old_unembed: Any) -> None:
        super().__init__()
        self.old_unembed, self.hook_pre, self.hook_post = old_unembed, HookPoint(), HookPoint()
        self.W_U, self.b_U = old_unembed.W_U, old_unembed.b_U

    def forward(self, x: Tensor) -> Tensor:
        """Computes what it did."""
        return self.hook_post(self.old_unembed(self.hook_pre(x)))


def replace_modules(model: Any) -> None:
    """Makes of a HookedTransformer what `ReplacementModel` is, its permanent hooks included."""

    def skip(acts: Tensor, hook: Any, grad_hook: Any) -> Tensor:
        nothing = acts * 0
        return grad_hook(nothing + (acts - nothing).detach())

    def stop_gradient(acts: Tensor, hook: Any) -> Tensor:
        return acts.detach()

    def enable_gradient(acts: Tensor, hook: Any) -> Tensor:
        acts.requires_grad = True
        return acts

    for block in model.blocks:
        block.mlp = ReplacementMlp(block.mlp)
        block.mlp.hook_out.hook_out_grad = HookPoint()
        edit: Any = partial(skip, grad_hook=block.mlp.hook_out.hook_out_grad)
        block.mlp.hook_out.add_hook(edit, is_permanent=True)
        for point in (block.attn.hook_pattern, block.ln1.hook_scale, block.ln2.hook_scale):
            point.add_hook(stop_gradient, is_permanent=True)
    model.unembed = ReplacementUnembed(model.unembed)
    for parameter in model.parameters():
        parameter.requires_grad = False
    model.hook_embed.add_hook(enable_gradient, is_permanent=True)
    model.setup()


def replaced_by_circuit_tracer(model: Any) -> Any:
    """What circuit-tracer makes of a model with transcoders."""
    replacement = pytest.importorskip(
        "circuit_tracer.replacement_model.replacement_model_transformerlens"
    )
    transcoders = pytest.importorskip("circuit_tracer.transcoder.single_layer_transcoder")
    width, layers = model.cfg.d_model, range(model.cfg.n_layers)
    each = {
        layer: transcoders.SingleLayerTranscoder(
            width, 2 * width, torch.relu, layer, dtype=torch.float64
        )
        for layer in layers
    }
    found = replacement.TransformerLensReplacementModel.from_config(
        model.cfg, transcoders.TranscoderSet(each, "mlp.hook_in", "mlp.hook_out")
    ).to(torch.float64)
    # Its feed-forward sublayers and unembedding are a module further down.
    weights = {
        name.replace(".mlp.", ".mlp.old_mlp.").replace("unembed.", "unembed.old_unembed."): weight
        for name, weight in model.state_dict().items()
    }
    found.load_state_dict({**found.state_dict(), **weights})
    return found.eval()


@pytest.mark.parametrize("real", [False, True], ids=["imitated", "circuit-tracer"])
def test_replacement_modules_are_read_through(real: bool) -> None:
    case = case_of("gpt2", host="HookedTransformer")
    model, given = zoo.build(case), zoo.inputs(case)
    plain, logits = asked(zoo.build(case), given.tokens), zoo.logits(model, given)
    if real:
        model = replaced_by_circuit_tracer(model)
    else:
        replace_modules(model)
    assert torch.equal(zoo.logits(model, given), logits)
    report = cm.check(model)
    assert report.ok
    assert "blocks.0.mlp.hook_out" in report.hooked
    for what, ask in asked(model, given.tokens).items():
        found, expected = ask(), plain[what]()
        if hasattr(found, "scores"):
            same = relative(found.scores.nan_to_num(), expected.scores.nan_to_num())
            assert same <= EXACT, what
    slopes = cm.gradient_x_input(model, given.tokens, pos=-1)
    assert bool(slopes.scores.isfinite().all())
    with model.hooks(fwd_hooks=[("blocks.0.mlp.hook_out", steer)]):
        found = cm.log_prob_contributions(model, given.tokens, by="layer")
        own = zoo.logits(model, given)[:, -1].log_softmax(-1).gather(1, found.target.ids)
        assert relative(found.trajectory[:, -1], own[:, 0]) <= EXACT
        with pytest.raises(cm.UnsupportedModel, match=r"neurons \+ bias = feed-forward output"):
            cm.log_prob_contributions(model, given.tokens, by="ff_neuron")
