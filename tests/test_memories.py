"""Values, memories and their tokens against what is written out in full."""

from __future__ import annotations

import io
import itertools
import re
import sys
from functools import partial
from typing import Any

import pandas
import pytest
import torch
import zoo
from asked import bound, case_of, host_trace, host_value, keywords, relative, stacks, view_of
from test_estimate import random_gpt2
from torch import Tensor
from watched import Watched

import tl_contextmix as cm
from tl_contextmix.adapters import passes
from tl_contextmix.core import half_weights
from tl_contextmix.core import readout as unembed
from tl_contextmix.core.counters import Operations
from tl_contextmix.core.model_view import Readout
from tl_contextmix.core.readout import Unembedding
from tl_contextmix.core.token_sums import Norm
from tl_contextmix.engine import log_prob_scores, promoted_tokens
from tl_contextmix.engine import memory_coefficients as memories
from tl_contextmix.engine.memory_coefficients import CASES, cases
from tl_contextmix.engine.memory_coefficients import values as value_vectors
from tl_contextmix.methods.memories import shards
from tl_contextmix.results import Memories

ALL = [case for case in zoo.cases() if case.family != "attn_only"]


def values_read(view: Any, vectors: Tensor) -> Tensor:
    """Logits of values, by the projection that suits the model, written out."""
    W_U = view.readout.weights("W_U")
    if view.readout.head is not None:
        return view.readout.head(vectors) * view.readout.scale @ W_U + view.readout.weights("b_U")
    norm = view.readout.norm
    if norm is None:
        return vectors * view.readout.scale @ W_U
    if norm.kind == "ln":
        vectors = vectors - vectors.mean(-1, keepdim=True)
    vectors = vectors if norm.weight is None else vectors * norm.weight
    return vectors * view.readout.scale @ W_U


def require_alike(few: Memories, every: Memories) -> None:
    """Raises AssertionError unless what was read of some values is what was read of all."""
    assert torch.equal(few.agreeing, every.agreeing)
    read = few.promoted >= 0
    assert torch.equal(few.promoted[read], every.promoted[read])
    assert bool((every.promoted >= 0).all())
    pandas.testing.assert_frame_equal(few.top(2), every.top(2))


@pytest.mark.parametrize("case", ALL, ids=str)
def test_a_family_from_values_to_predictions(case: zoo.Case) -> None:
    """Coefficients times values are the host's output; look-ups are what argmax says."""
    model, given = zoo.shared(case), zoo.inputs(case)
    view = view_of(model)
    if view.readout.refusal:
        with pytest.raises(cm.UnsupportedModel):
            cm.ff_values(model)
        with pytest.raises(cm.UnsupportedModel):
            cm.ff_memories(model, given.tokens, **keywords(given))
        return
    view.tables.clear()
    few = cm.ff_memories(model, given.tokens, pos="all", k=2, **keywords(given))
    found = cm.ff_memories(model, given.tokens, k=None, **keywords(given))
    require_alike(few, found)
    again = cm.ff_memories(model, given.tokens, pos="all", k=2, **keywords(given))
    assert torch.equal(again.promoted, few.promoted)
    static = cm.ff_values(model, k=3)
    trace, blocks = host_trace(view, given, None)
    gated = blocks[0].feed_forward.gated
    for index, block in enumerate(blocks):
        ff = block.feed_forward
        m, v = found.coefficients[:, index], ff.W_out
        added = m @ v + ff.followed(trace).constant()
        added = added if ff.norm_out is None else ff.norm_out(added)
        assert relative(added, host_value(block, trace, "mlp_out", "self")) <= bound(case)
        # What values promote, and the readouts of the whole model beside it.
        for side, sign in enumerate((1, -1)):
            assert ff is not None
            logits = values_read(view, sign * value_vectors(ff))
            assert torch.equal(found.promoted[index, :, side], logits.argmax(-1))
            rows = static.layer == index
            cap = view.readout.soft_cap
            logits = logits if cap is None else cap * torch.tanh(logits / cap)
            best = logits.topk(3, dim=-1)
            assert torch.equal(static.ids[rows, side], best.indices)
            p = logits.softmax(-1)
            assert relative(static.max_prob[rows, side], p.amax(-1)) < 1e-9
            entropy = -(p * p.log()).sum(-1)
            assert relative(static.entropy[rows, side], entropy) < 1e-9
        # Composition, by argmax over the whole vocabulary.
        residual, output = block.middle(trace), block.output(trace)
        tops = [view.readout(x).argmax(-1) for x in (residual, added, output)]
        for name, top in zip(("residual_top", "ffn_top", "output_top"), tops, strict=True):
            assert torch.equal(getattr(found, name)[:, index], top)
        p = view.readout(residual).softmax(-1)
        there = p.gather(-1, found.final_top[..., None])[..., 0]
        assert relative(found.probability[:, index], there) < 1e-6
        signed = torch.where(m > 0, found.promoted[index, :, 0], found.promoted[index, :, 1])
        active = m != 0 if gated else m > 0
        agree = (active & (signed == tops[1][..., None])).sum(-1)
        assert torch.equal(found.agreeing[:, index], agree)
        assert relative(found.active[:, index], active.double().mean(-1)) < 1e-12
        assert found.quadrants.shape[3] == (4 if gated else 0)
    assert torch.equal(found.final_top, zoo.logits(model, given).argmax(-1))
    assert torch.equal(found.output_top[:, -1], found.final_top)
    figures = found.figures().to_dataframe()
    assert figures[list(CASES)].sum(axis=1).tolist() == pytest.approx([1.0] * len(blocks))
    if gated:
        # Experts that a token is not routed to have no signs.
        whole = found.active if case.family == "mixtral" else torch.ones_like(found.active)
        assert relative(found.quadrants.sum(-1), whole) < 1e-12


@pytest.mark.once
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_few_values_are_read_as_all_are(
    family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In any tiles, also of tokens that are alike and of weights in half precision."""
    model = zoo.build(case_of(family), dtype=dtype)
    with torch.no_grad():
        head = model.unembed.W_U
        head[:, 1::2] = head[:, : head.shape[1] // 2 * 2 : 2].clone()
    view, ids = view_of(model), torch.randint(5, 60, (4, 14))
    monkeypatch.setattr(half_weights, "STRETCH_BYTES", 1024)
    for active, how in itertools.product(("positive", "nonzero"), ("model", "none")):
        options: dict[str, Any] = {"active": active, "projection": how}
        view.tables.clear()
        every = cm.ff_memories(model, ids, k=None, **options)
        for tile, first, held in ((2**26, 64, 2**28), (2**26, 2, 1), (1, 5, 1)):
            view.tables.clear()
            monkeypatch.setattr(promoted_tokens, "TILE_BYTES", tile)
            monkeypatch.setattr(promoted_tokens, "_FIRST", first)
            monkeypatch.setattr(promoted_tokens, "_HELD", held)
            require_alike(cm.ff_memories(model, ids, k=2, **options), every)
        assert int(every.agreeing.sum()) > 10


@pytest.mark.once
@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_a_text_may_have_no_position_that_is_asked_about(family: str) -> None:
    model, ids = zoo.build(case_of(family)), torch.arange(5, 23).view(2, 9)
    mask = torch.ones_like(ids)
    mask[1, 3:] = 0
    asked: dict[str, Any] = {"neurons": [1, 2], "pos": [7, 8]}
    both = cm.token_memory(model, ids, attention_mask=mask, **asked)
    one = cm.token_memory(model, ids[:1], **asked)
    assert relative(both.coefficients[:1], one.coefficients) < 1e-12


@pytest.mark.once
def test_nothing_agrees_where_nothing_is_active() -> None:
    model = zoo.build(case_of("gpt2"))
    with torch.no_grad():
        for block in model.blocks:
            block.mlp.b_in.fill_(-1000)
    few, every = (cm.ff_memories(model, torch.arange(5, 9)[None], k=k) for k in (2, None))
    require_alike(few, every)
    assert not few.agreeing.any()


@pytest.mark.once
def test_a_first_call_reads_few_values() -> None:
    """Two fifths of a pass and of what reads states; to read all values is more than the whole."""
    model = random_gpt2(words=20_000, positions=64)
    ids = torch.randint(5, 20_000, (1, 64), generator=torch.Generator().manual_seed(0))
    with Operations() as once:
        model(ids)
    with Operations() as first:
        cm.ff_memories(model, ids)
    assert first.total <= 1.4 * (once.total + 5 * 2 * ids.numel() * 64 * 20_000)


@pytest.mark.parametrize("case", zoo.kinds(), ids=str)
@pytest.mark.parametrize("bias", ["contributor", "fixed"])
def test_shares_of_tokens_add_up_to_coefficients(case: zoo.Case, bias: Any) -> None:
    model, given = zoo.shared(case), zoo.inputs(case)
    view = view_of(model)
    for stack in stacks(case):
        found = cm.token_memory(model, given.tokens, stack=stack, bias=bias, **keywords(given))
        parts = cm.decompose(
            model, given.tokens, at="mlp_out", stack=stack, bias=bias, **keywords(given)
        )
        trace, blocks = host_trace(view, given, stack)
        for index, block in enumerate(blocks):
            ff = block.feed_forward
            constant = ff.weights("b_post")
            m = trace[ff.post] if constant is None else trace[ff.post] - constant
            assert relative(found.coefficients[:, index], m) <= bound(case)
            if ff.norm_out is None:
                # The same vectors, cut along the other axis.
                vectors = found.shares[:, index] @ ff.W_out
                assert relative(vectors, parts.parts[:, index]) <= 1e-9
        some = cm.token_memory(
            model,
            given.tokens,
            stack=stack,
            bias=bias,
            layer=-1,
            pos=[-1, 1],
            neurons=[5, 2],
            **keywords(given),
        )
        last = found.shares.shape[2] - 1
        expected = found.shares[:, -1:, [last, 1]][..., [5, 2]]
        assert relative(some.shares, expected) <= 1e-9
        assert relative(some.bias, found.bias[:, -1:, [last, 1]][..., [5, 2]]) <= 1e-9


def test_the_shares_of_a_hand_made_neuron() -> None:
    """A causal model's first token is the only one that feeds its own memories."""
    model, given = zoo.shared(case_of("gpt2")), zoo.inputs(case_of("gpt2"))
    found = cm.token_memory(model, given.tokens)
    upper = torch.ones(6, 6).triu(1).bool()
    assert bool((found.shares.movedim(-1, 2)[..., upper] == 0).all())


# Tiles


def unembedding(d_model: int = 7, d_vocab: int = 53, cap: float | None = None) -> Any:
    """A readout of random weights, with two tokens that are alike, and vectors."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(d_model, d_vocab, generator=generator, dtype=torch.float64)
    weight[:, 40] = weight[:, 3]
    readout = Readout(None, None, {"W_U": weight}.get, soft_cap=cap)
    vectors = torch.randn(31, d_model, generator=generator, dtype=torch.float64) * 3
    return Unembedding(readout, "folded"), vectors, weight


@pytest.mark.parametrize("max_bytes", [1, 4000, 10**6])
@pytest.mark.parametrize("k", [1, 4, 99])
@pytest.mark.parametrize("cap", [None, 2.0])
def test_tiles_give_what_the_whole_vocabulary_gives(
    max_bytes: int, k: int, cap: float | None
) -> None:
    reader, vectors, weight = unembedding(cap=cap)
    targets = torch.arange(31) % 53
    scan = reader.scan(vectors, k, targets=targets, max_bytes=max_bytes)
    logits = vectors @ weight
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    size = min(k, 53)
    for side, sign in enumerate((1, -1)):
        order = (sign * logits).sort(dim=1, descending=True, stable=True)
        assert relative(scan.ends[:, side] * sign, order.values[:, :size]) < 1e-12
        picked = logits.gather(1, scan.ids[:, side])
        assert relative(picked, scan.ends[:, side]) < 1e-12
        log_p = (sign * logits).log_softmax(-1)
        assert relative(scan.entropy[:, side], -(log_p.exp() * log_p).sum(-1)) < 1e-10
        assert relative(scan.max_prob[:, side], log_p.amax(-1).exp()) < 1e-10
        own = logits.gather(1, targets[:, None])
        clearly = (sign * (logits - own) > 1e-9).sum(-1) + 1
        assert torch.equal(scan.rank[:, side], clearly)
    assert relative(scan.target, logits.gather(1, targets[:, None])[:, 0]) < 1e-12


def test_no_tensor_is_as_long_as_the_vocabulary() -> None:
    reader, vectors, _ = unembedding(d_vocab=5000)
    seen: list[int] = []

    def see(func: Any, args: Any, out: Any) -> None:
        if isinstance(out, Tensor) and out.untyped_storage().data_ptr() not in known:
            seen.append(out.numel())

    known = {reader.readout.weights("W_U").untyped_storage().data_ptr()}
    with Watched(see):
        reader.scan(vectors, 2, max_bytes=31 * 8 * 4 * 100)
    assert max(seen) <= 31 * 100


# Cases


def test_the_five_cases() -> None:
    residual, ffn = torch.tensor([1, 2, 3, 1, 5]), torch.tensor([2, 1, 3, 2, 5])
    output = torch.tensor([1, 1, 3, 3, 6])
    assert [CASES[one] for one in cases(residual, ffn, output)] == [
        "residual",
        "ffn",
        "agreement",
        "composition",
        "conflict",
    ]


def test_linear_readouts_have_no_conflict_and_a_norm_with_bias_does() -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weight, residual, ffn = draw(8, 11), draw(4000, 8), draw(4000, 8)
    norm = Norm("ln", 1 + draw(8) / 4, draw(8), 1e-5)
    readout = Readout(norm, None, {"W_U": weight}.get)
    count = {}
    for projection in ("model", "frozen", "none"):
        reader = Unembedding(readout, projection)
        scale = norm.scale(residual + ffn)
        tops = [
            reader.scan(reader.hidden(x, scale), sides=1).ids[:, 0, 0]
            for x in (residual, ffn, residual + ffn)
        ]
        count[projection] = int((cases(*tops) == CASES.index("conflict")).sum())
    assert count["model"] > 0
    assert count["frozen"] == count["none"] == 0
    model = zoo.shared(case_of("gpt2"))
    tokens = torch.randint(5, 60, (16, 24), generator=generator)
    for projection in ("frozen", "none"):
        found = cm.ff_memories(model, tokens, projection=projection)
        assert int((found.case == CASES.index("conflict")).sum()) == 0


def test_options_change_what_they_name() -> None:
    model = zoo.shared(case_of("gpt2"))
    tokens = zoo.inputs(case_of("gpt2")).tokens
    positive = cm.ff_memories(model, tokens)
    every = cm.ff_memories(model, tokens, active="nonzero")
    assert bool((every.active > positive.active).any())
    assert bool((every.active == 1).all())
    bare, folded = (cm.ff_values(model, projection=how) for how in ("none", "folded"))
    frozen = cm.ff_values(model, projection="frozen", text=tokens)
    assert not torch.equal(bare.logits, folded.logits)
    assert torch.equal(folded.ids, frozen.ids)
    view = view_of(model)
    last = view.blocks()[-1].resid_out
    from tl_contextmix.adapters.inputs import Given, make_batch

    stream = view.run(make_batch(view, Given(tokens)), [last])[last]
    scale = view.readout.norm.scale(stream).mean()
    assert relative(frozen.logits * scale, folded.logits) < 1e-12
    one = cm.ff_values(model, layer=1, neurons=[4, 2], k=2)
    assert one.neuron.tolist() == [4, 2]
    rows = [int(((folded.layer == 1) & (folded.neuron == n)).nonzero()) for n in (4, 2)]
    assert torch.equal(one.ids, folded.ids[rows][..., :2])
    assert one.tokens(1, 2, negative=True) == [one.words[str(i)] for i in one.ids[1, 1].tolist()]


def test_half_precision_has_one_top_token() -> None:
    """Logits in bfloat16 tie; a cache has none, and its answer is the same."""
    case = case_of("llama")
    model, tokens = zoo.build(case, dtype=torch.bfloat16), zoo.inputs(case, batch=60).tokens
    _, cache = model.run_with_cache(tokens)
    plain, cached = (cm.ff_memories(model, tokens, cache=held) for held in (None, cache))
    assert torch.equal(plain.final_top, cached.final_top)


def test_padding_is_left_out() -> None:
    model = zoo.shared(case_of("gpt2"))
    tokens = zoo.inputs(case_of("gpt2")).tokens
    mask = torch.ones_like(tokens)
    mask[1, 4:] = 0
    found = cm.ff_memories(model, tokens, attention_mask=mask)
    alone = cm.ff_memories(model, tokens[1:, :4])
    assert relative(found.coefficients[1:, :, :4], alone.coefficients) < 1e-10
    assert bool((found.coefficients[1, :, 4:] == 0).all())
    assert found.figures().examples == 10
    assert len(found.to_dataframe()) == 10 * len(found.layers)
    shares = cm.token_memory(model, tokens, attention_mask=mask)
    assert bool((shares.shares[1, :, 4:] == 0).all())


BAD = {
    "projection": (
        lambda m, t: unembed.unembedding(view_of(m).readout, "lens", ("none",)),
        "got projection='lens'",
    ),
    "head of none": (lambda m, t: cm.ff_values(m, projection="head"), "one of .*'folded'"),
    "no scale": (lambda m, t: cm.ff_values(m, projection="frozen"), "scale of the final norm"),
    "a scale for nothing": (lambda m, t: cm.ff_values(m, text="the cat"), "no source"),
    "k": (lambda m, t: cm.ff_values(m, k=0), "this k: got 0"),
    "neuron": (lambda m, t: cm.ff_values(m, neurons=10**6), "neuron"),
    "layer": (lambda m, t: cm.ff_values(m, layer=9), "no such layer"),
    "active": (lambda m, t: memories.active_rule("some", False), "got active='some'"),
    "states": (lambda m, t: memories.readings(view_of(m), "folded"), "got projection='folded'"),
    "position": (lambda m, t: cm.token_memory(m, t, pos=99), "pos"),
    "encoder": (lambda m, t: memories.require_predicting(view_of(m), "encoder"), "no token is"),
}


@pytest.mark.parametrize(("ask", "message"), BAD.values(), ids=BAD)
def test_bad_questions_are_refused(ask: Any, message: str) -> None:
    model = zoo.shared(case_of("gpt2"))
    tokens = zoo.inputs(case_of("gpt2")).tokens
    with pytest.raises(cm.InvalidInput, match=message):
        ask(model, tokens)


@pytest.mark.skipif(not any(c.family == "attn_only" for c in zoo.cases()), reason="only on 2, 3")
def test_a_model_without_memories_is_refused() -> None:
    model = zoo.shared(case_of("attn_only"))
    with pytest.raises(cm.InvalidInput, match="no memories in layer 0"):
        cm.ff_values(model)
    with pytest.raises(cm.InvalidInput, match="no memories in layer 0"):
        cm.token_memory(model, torch.tensor([[5, 6]]))


@pytest.mark.once
def test_bars_show_on_a_terminal_what_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    model, text = zoo.build(case_of("gpt2"), dtype=torch.float32), "the cat sat"
    screen = io.StringIO()
    screen.isatty = lambda: True  # type: ignore[method-assign]
    # Where nobody looks nothing is shown, and nothing before two seconds have passed.
    monkeypatch.setattr(sys, "stderr", screen)
    cm.ff_memories(model, text, k=None)
    assert not screen.getvalue()
    at_once = {"delay": 0, "mininterval": 0, "miniters": 1, "file": screen, "ncols": 120}
    for module in (promoted_tokens, passes, log_prob_scores, shards):
        bar = module.tqdm
        monkeypatch.setattr(
            module, "tqdm", lambda *rows, bar=bar, **given: bar(*rows, **{**given, **at_once})
        )
    fresh = zoo.build(case_of("gpt2"), dtype=torch.float32)
    shown = {}
    for name, ask in {
        "ff_memories": partial(cm.ff_memories, fresh, text, k=None),
        "again": partial(cm.ff_memories, fresh, text, k=None),
        "composition": partial(cm.composition, fresh, [text]),
        "log_prob_contributions": partial(cm.log_prob_contributions, fresh, text),
    }.items():
        screen.seek(0)
        screen.truncate()
        ask()
        shown[name] = screen.getvalue()
    count = len(view_of(fresh).blocks())
    assert f"what values of layer {count - 1} promote: 100%" in shown["ff_memories"]
    # What depends on weights alone is computed once.
    assert "promote" not in shown["again"]
    assert re.search(rf"ff_memories: 100%\|.*\| {count}/{count} ", shown["again"])
    assert "composition" in shown["composition"]
    assert "token/s" in shown["composition"]
    assert f"/{1 + 2 * count} [" in shown["log_prob_contributions"]
