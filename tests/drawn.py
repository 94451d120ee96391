"""Blocks and models that nobody has picked by hand, for the tests of properties.

Blocks are drawn as tensors: every combination of norms, branches and biases, also those that no
published family has. Models are drawn as configurations of published families: shapes, grouped
heads, biases, dtypes and padding; the bridge is built on them.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import zoo
import zoo_build
import zoo_configs as rows
from asked import FLOAT32_INSIDE, host_value, keywords
from hypothesis import strategies as st
from torch import Tensor

from tl_contextmix.core.activations import ACTIVATIONS, Activation
from tl_contextmix.core.blocks import AttentionSublayer, Batch, Block, FeedForward, Side, Trace
from tl_contextmix.core.token_sums import Norm

SEEDS = st.integers(0, 2**31 - 1)

# Blocks

NormPlan = tuple[Literal["ln", "rms", "none"], bool, bool]
"""Kind of a norm, whether it has a gain, whether a bias."""
_PLACES = ("self out", "self after", "cross out", "cross after", "ff in", "ff out", "ff after")
_BIASES = ("self b_O", "cross b_O", "b_in", "b_gate", "b_post", "b_out")


@dataclass(frozen=True)
class Plan:
    """A block before its tensors are drawn: sizes, and what it has."""

    batch: int
    target: int
    source: int
    group: int
    kv: int
    d_head: int
    d_model: int
    d_mlp: int
    dtype: torch.dtype
    seed: int
    causal: bool
    stack: Literal["decoder", "cross"]
    norms: dict[str, NormPlan | None]
    biases: frozenset[str]
    feed_forward: Literal["none", "plain", "gated"]
    parallel: bool
    activation: Activation

    def build(self) -> tuple[Block, Trace]:
        """The block, and what a pass of it leaves behind."""
        return _Builder(self).build()


def plans() -> st.SearchStrategy[Plan]:
    """Any block."""
    some, norm = (
        st.integers(1, 4),
        st.tuples(st.sampled_from(["ln", "rms", "none"]), st.booleans(), st.booleans()),
    )
    names = ("batch", "target", "source", "group", "kv", "d_head")
    return st.builds(
        Plan,
        **dict.fromkeys(names, some),
        d_model=st.integers(2, 8),
        d_mlp=st.integers(1, 9),
        dtype=st.sampled_from([torch.float64, torch.float32]),
        seed=SEEDS,
        norms=st.fixed_dictionaries(dict.fromkeys(_PLACES, st.none() | norm)),
        biases=st.frozensets(st.sampled_from(_BIASES)),
        activation=st.sampled_from(ACTIVATIONS),
    )


class _Builder:
    """Draws the tensors of a plan."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.generator = torch.Generator().manual_seed(plan.seed)
        self.values: dict[str, Tensor] = {}

    def random(self, *shape: int) -> Tensor:
        """Normal numbers."""
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.plan.dtype)

    def bias(self, name: str, size: int) -> Tensor | None:
        """A bias, where the plan has it."""
        return self.random(size) if name in self.plan.biases else None

    def norm(self, place: str) -> Norm | None:
        """The norm of a place."""
        plan = self.plan.norms[place]
        if plan is None:
            return None
        kind, weight, bias = plan
        gain, shift = (self.random(self.plan.d_model) if has else None for has in (weight, bias))
        return Norm(kind, gain, shift, 1e-5)

    def attention(self, kind: Literal["self", "cross"]) -> AttentionSublayer:
        """An attention sublayer; its pattern and values go to the activations."""
        plan, heads = self.plan, self.plan.kv * self.plan.group
        source = plan.target if kind == "self" else plan.source
        scores = self.random(plan.batch, heads, plan.target, source)
        if kind == "self" and plan.causal:
            scores = scores.masked_fill(torch.ones(source, source).triu(1).bool(), -torch.inf)
        pattern = scores.softmax(-1)
        value = self.random(plan.batch, source, plan.kv, plan.d_head)
        each = value.repeat_interleave(plan.group, dim=2)
        mixed = torch.einsum("bhts,bshd->bthd", pattern, each)
        self.values |= {f"{kind} p": pattern, f"{kind} v": value, f"{kind} z": mixed}
        W_O = self.random(heads, plan.d_head, plan.d_model)
        return AttentionSublayer(
            stack="decoder",
            kind=kind,
            pattern=f"{kind} p",
            value=f"{kind} v",
            mixed=f"{kind} z",
            key="none",
            weights={"W_O": W_O, "b_O": self.bias(f"{kind} b_O", plan.d_model)}.get,
            norm_out=self.norm(f"{kind} out"),
            norm_after=self.norm(f"{kind} after"),
        )

    def feed_forward(self) -> FeedForward | None:
        """The feed-forward sublayer."""
        plan, gated = self.plan, self.plan.feed_forward == "gated"
        if plan.feed_forward == "none":
            return None
        weights = {name: self.random(plan.d_model, plan.d_mlp) for name in ("W_in", "W_gate")}
        weights["W_out"] = self.random(plan.d_mlp, plan.d_model)
        names = ("b_in", "b_gate", "b_post") if gated else ("b_in",)
        biases = {name: self.bias(name, plan.d_mlp) for name in names}
        biases["b_out"] = self.bias("b_out", plan.d_model)
        return FeedForward(
            pre="pre",
            post="post",
            pre_linear="pre_linear" if gated else None,
            weights={**weights, **biases}.get,
            activation=plan.activation,
            norm_in=self.norm("ff in"),
            norm_out=self.norm("ff out"),
            norm_after=self.norm("ff after"),
        )

    def build(self) -> tuple[Block, Trace]:
        """Everything, the host's own activations computed plainly."""
        plan = self.plan
        self.values["x"] = self.random(plan.batch, plan.target, plan.d_model)
        kinds: tuple[Any, ...] = ("self", "cross") if plan.stack == "cross" else ("self",)
        attentions, ff = tuple(self.attention(kind) for kind in kinds), self.feed_forward()
        block = Block(0, "x", "out", attentions, ff, parallel=plan.parallel)
        mask = self.random(plan.batch, plan.target) > -1
        ids = torch.zeros(plan.batch, plan.target, dtype=torch.long)
        trace = Trace(Batch(Side(ids, mask)), self.values, plan.dtype)
        if ff is not None:
            post = ff.activate(ff.pre_activations(host_value(block, trace, "mlp_in", "self")))
            b_post = ff.weights("b_post")
            self.values["post"] = post if b_post is None else post + b_post
        self.values["out"] = block.output(trace)
        return block, trace


# Models


@dataclass(frozen=True)
class World:
    """A random model and a random input.

    Attributes:
        family: Its row of the zoo, whose model class and tokenizer it has.
        options: What is different in its configuration.
        dtype: Of its weights.
        seed: Of its weights and tokens.
        lengths: Tokens of each sentence; shorter ones are padded.
        left: Whether they are padded before the text.
    """

    family: str
    options: dict[str, Any]
    dtype: torch.dtype
    seed: int
    lengths: tuple[int, ...]
    left: bool

    def build(self) -> Any:
        """The bridge."""
        row = rows.FAMILIES[self.family]
        options = {**row.options, **self.options}
        hf = zoo_build.hugging_face(
            row.model, row.config, options, dtype=self.dtype, seed=self.seed
        )
        with zoo_build.quiet():
            model = zoo_build.bridge(hf, row.tokenizer, dtype=self.dtype, processed=False)
        return model.eval()

    @property
    def mask(self) -> Tensor:
        """1 at real tokens."""
        place = torch.arange(max(self.lengths))
        mask = (place < torch.tensor(self.lengths)[:, None]).long()
        return mask.flip(1) if self.left else mask

    @property
    def given(self) -> zoo.Inputs:
        """Tokens, and a decoder's where there is one."""
        generator = torch.Generator().manual_seed(self.seed)
        shape = (len(self.lengths), max(self.lengths))
        tokens = torch.randint(rows.FIRST_WORD_ID, rows.D_VOCAB, shape, generator=generator)
        start = rows.FAMILIES[self.family].decoder_start
        if start is None:
            return zoo.Inputs(tokens)
        decoder = torch.randint(
            rows.FIRST_WORD_ID, rows.D_VOCAB, (shape[0], 3), generator=generator
        )
        decoder[:, 0] = start
        return zoo.Inputs(tokens, decoder)

    @property
    def asked(self) -> dict[str, Any]:
        """The mask and the decoder side as keyword arguments."""
        return {"attention_mask": self.mask, **keywords(self.given)}

    @property
    def limit(self) -> float:
        """Relative to the largest entry, what is recomputed may be off by."""
        if self.dtype == torch.float64:
            return FLOAT32_INSIDE
        return {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 8e-2}[self.dtype]


FAMILIES = "gpt2 llama qwen2 gemma2 neox opt bert olmo2 bart mbart".split()


def world_of(family: str, chance: random.Random) -> World:
    """A model of a family with options, a dtype and an input that chance picks."""
    dtypes = (torch.float64, torch.float64, torch.float32, torch.bfloat16, torch.float16)
    return World(
        family=family,
        options=_OPTIONS[family](_Common(chance)),
        dtype=chance.choice(dtypes),
        seed=chance.randrange(2**31),
        lengths=tuple(chance.randint(1, 6) for _ in range(chance.randint(1, 3))),
        left=chance.random() < 0.4,
    )


class _Common:
    """Sizes as the configurations of most families name them."""

    def __init__(self, chance: random.Random) -> None:
        self.heads, d_head = chance.randint(1, 4), chance.choice((4, 8))
        self.kv = chance.choice([n for n in range(1, self.heads + 1) if self.heads % n == 0])
        self.width, self.d_head = self.heads * d_head, d_head
        self.neurons, self.layers = chance.randint(1, 40), chance.randint(1, 3)
        self.act = chance.choice(("relu", "gelu", "silu"))
        self.some, self.other = (chance.random() < 0.5 for _ in range(2))
        self.wide = chance.randint(2, 8)

    def plain(self) -> dict[str, Any]:
        """As GPT-NeoX and BERT name them."""
        return {
            "hidden_size": self.width,
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "intermediate_size": self.neurons,
        }

    def grouped(self) -> dict[str, Any]:
        """With heads that share keys and values."""
        return {**self.plain(), "num_key_value_heads": self.kv}

    def both(self) -> dict[str, Any]:
        """Two stacks alike."""
        one = {"layers": self.layers, "attention_heads": self.heads, "ffn_dim": self.neurons}
        sides = ("encoder", "decoder")
        found = {f"{side}_{name}": size for side in sides for name, size in one.items()}
        return {**found, "d_model": self.width}


_OPTIONS: dict[str, Callable[[_Common], dict[str, Any]]] = {
    "gpt2": lambda c: {
        "n_embd": c.width,
        "n_head": c.heads,
        "n_layer": c.layers,
        "n_inner": c.neurons,
        "activation_function": c.act,
    },
    "llama": lambda c: {
        **c.grouped(),
        "head_dim": c.d_head,
        "attention_bias": c.some,
        "mlp_bias": c.other,
        "hidden_act": c.act,
    },
    "qwen2": _Common.grouped,
    # Heads and stream need not be of the same width.
    "gemma2": lambda c: {
        **c.grouped(),
        "head_dim": c.d_head,
        "hidden_size": c.heads * c.wide,
    },
    "neox": lambda c: {
        **c.plain(),
        "use_parallel_residual": c.some,
        "hidden_act": c.act,
        "rotary_pct": 0.5 if c.other else 1.0,
    },
    "opt": lambda c: {
        "hidden_size": c.width,
        "word_embed_proj_dim": c.width,
        "num_attention_heads": c.heads,
        "num_hidden_layers": c.layers,
        "ffn_dim": c.neurons,
        "enable_bias": c.some,
        "layer_norm_elementwise_affine": c.other,
    },
    "bert": lambda c: {**c.plain(), "hidden_act": c.act},
    "olmo2": _Common.grouped,
    "bart": _Common.both,
    "mbart": _Common.both,
}
