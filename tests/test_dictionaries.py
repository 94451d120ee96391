"""Dictionaries: in the place of neurons and of the stream, against hooks placed by hand."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
import torch
import zoo
from asked import bound, case_of, shared, view_of
from test_flow import conserved, one, readable
from torch import Tensor

import tl_contextmix as cm
from tl_contextmix.adapters.dictionary_views import with_dictionaries
from tl_contextmix.plotting.panels import Graph
from tl_contextmix.results import Result
from tl_contextmix.results.components import ERRORS

pytestmark = pytest.mark.mostly_once

TEXT = "the keys to the cabinet"
ARE: Any = {"target": " are", "foil": " is"}
# What a feed-forward block reads and what it writes, by the classes' own names.
READ = ("mlp.hook_in", "ln3.hook_normalized", "ln2.hook_normalized", "ln1.hook_normalized")
WRITTEN = ("hook_mlp_out", "mlp.hook_out")


def made(d_in: int, d_out: int, seed: int, **options: Any) -> cm.Dictionary:
    """A random dictionary of 24 features."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    W_enc, W_dec = draw(d_in, 24) / d_in**0.5, draw(24, d_out) / 3
    if options.get("activation") == "jumprelu":
        options["threshold"] = draw(24).abs() / 5
    return cm.Dictionary(W_enc, W_dec, draw(24) / 5, draw(d_out) / 5, **options)


def pair(model: Any, stack: str, layer: int) -> list[cm.Dictionary]:
    """A transcoder in a block and an SAE in front of the same block."""
    block = view_of(model).stacks[stack][layer]
    prefix, width = block.resid_in.rpartition(".")[0], block.attentions[0].W_O.shape[2]
    sae = made(width, width, 1, hook_name=block.resid_in, activation="topk", k=5)
    if block.feed_forward is None:
        return [sae]
    for read in READ:
        for written in WRITTEN:
            names = {"hook_name": f"{prefix}.{read}", "hook_name_out": f"{prefix}.{written}"}
            transcoder = made(width, width, 2, **names)
            with suppress(cm.InvalidInput):  # not on this class, or something else
                with_dictionaries(view_of(model), transcoder)
                return [sae, transcoder]
    assert zoo.major() < 4
    return [sae]


@pytest.mark.every
@pytest.mark.parametrize("case", zoo.kinds(), ids=str)
def test_sums_hold_in_every_kind_of_model(case: zoo.Case):
    model, given = shared(case)
    limit = max(1e-9, 30 * bound(case)) if bound(case) > 1e-9 else 1e-9
    some = [pair(model, stack, len(b) - 1) for stack, b in view_of(model).stacks.items()]
    features: list[Any] = []
    for dictionary in [*[[d] for d in some[-1]], [d for both in some for d in both]]:
        options = {**one(given), "dictionary": dictionary}
        graph = cm.flow(model, **options, target=3, foil=5, share=1.0, k=20)
        conserved(graph, limit)
        features += [node for node in graph.nodes if node.kind.endswith("feature")]
        found = cm.log_prob_contributions(model, **options, target=3, foil=5)
        total = found.scores.sum() + found.trajectory[0, 0]
        assert float(total) == pytest.approx(float(found.log_prob[0]), abs=1e-6)
    assert features


# ---- against a pass with hooks placed by hand


class ByHand:
    """A pre-LN model with relu, its patterns and scales detached: gradients are frozen effects."""

    def __init__(self, model: Any, sae: cm.Dictionary, transcoder: cm.Dictionary) -> None:
        self.model, self.sae, self.transcoder = model, sae, transcoder
        self.leaves: dict[str, Tensor] = {}
        self.seen: dict[str, Tensor] = {}

    def score(self, ids: Tensor, columns: list[int], direct: bool = False) -> Tensor:
        """The difference of two logits; with ``direct`` only along the stream."""
        hooks: list[Any] = []
        norms = [n for n in self.model.hook_dict if n.endswith(("ln1.hook_in", "ln2.hook_in"))]
        for name in [*norms, "ln_final.hook_in"]:
            hooks.append((name, self._keep))
            hooks.append((name.replace("_in", "_out"), self._norm))
        for layer in range(self.model.cfg.n_layers):
            hooks += [(f"blocks.{layer}.attn.hook_{n}", self._cut) for n in ("q", "k")]
            if direct:
                hooks += [(f"blocks.{layer}.attn.hook_out", self._cut)]
        hooks += [(self.sae.hook_name, self._rewrite), (self.transcoder.hook_name, self._keep)]
        hooks += [(self.transcoder.hook_name_out, self._replace)]
        logits = self.model.run_with_hooks(ids, fwd_hooks=hooks)[0, -1]
        return logits[columns[0]] - logits[columns[1]]

    def _keep(self, x: Tensor, hook: Any) -> Tensor:
        self.seen[hook.name] = x
        return x

    def _cut(self, x: Tensor, hook: Any) -> Tensor:
        return x.detach()

    def _norm(self, out: Tensor, hook: Any) -> Tensor:
        x = self.seen[hook.name.replace("_out", "_in")]
        path = hook.name.rpartition(".")[0]
        module = self.model.get_submodule(path).original_component
        centred = x - x.mean(-1, keepdim=True)
        scale = (centred.square().mean(-1, keepdim=True) + module.eps).sqrt().detach()
        return centred / scale * module.weight + module.bias

    def _features(self, name: str, x: Tensor, d: cm.Dictionary) -> Tensor:
        found = (x @ d.W_enc + d.b_enc).relu()
        if d.k is not None:
            best = found.topk(d.k, dim=-1)
            found = torch.zeros_like(found).scatter(-1, best.indices, best.values)
        found.retain_grad()
        self.leaves[name] = found
        return found @ d.W_dec + d.b_dec

    def _error(self, name: str, whole: Tensor, found: Tensor) -> Tensor:
        self.leaves[name] = (whole - found).detach().requires_grad_()
        return found + self.leaves[name]

    def _rewrite(self, x: Tensor, hook: Any) -> Tensor:
        return self._error("sae error", x, self._features("sae", x, self.sae))

    def _replace(self, y: Tensor, hook: Any) -> Tensor:
        x = self.seen[self.transcoder.hook_name]
        return self._error("mlp error", y, self._features("mlp", x, self.transcoder))


def gradient(leaf: Tensor) -> Tensor:
    return leaf.grad.detach()


@pytest.mark.newest
def test_features_and_errors_are_those_of_hooks_placed_by_hand():
    model, given = shared(case_of("opt", host="TransformerBridge"))
    width = model.cfg.d_model
    sae = made(width, width, 1, hook_name="blocks.1.hook_in", activation="topk", k=6)
    transcoder = made(
        width, width, 2, hook_name="blocks.1.mlp.hook_in", hook_name_out="blocks.1.mlp.hook_out"
    )
    hand, ids = ByHand(model, sae, transcoder), given.tokens[:1]
    with torch.enable_grad():
        hand.score(ids, [3, 5]).backward()
    graph = cm.flow(
        model, ids, pos=-1, target=3, foil=5, dictionary=[sae, transcoder], share=1.0, k=10_000
    )
    kinds = {
        "resid_pre feature": "sae", "resid_pre error": "sae error",
        "mlp feature": "mlp", "mlp error": "mlp error",
    }  # fmt: skip
    counts = dict.fromkeys(kinds, 0)
    for node, score in zip(graph.nodes, graph.scores.tolist(), strict=True):
        if node.kind in kinds:
            leaf = hand.leaves[kinds[node.kind]]
            effect = (leaf.detach() * gradient(leaf))[0, node.pos]
            effect = effect[node.neuron] if node.neuron >= 0 else effect.sum()
            assert score == pytest.approx(float(effect), abs=1e-9)
            counts[node.kind] += abs(score) > 1e-6
    assert min(counts.values()) >= 1
    assert counts["resid_pre feature"] > 5
    # One edge: from the features of the stream to a feature of the block, past the attention.
    place = max(
        (i for i, n in enumerate(graph.nodes) if n.kind == "mlp feature"),
        key=lambda i: abs(float(graph.scores[i])),
    )
    node = graph.nodes[place]
    weight = gradient(hand.leaves["mlp"])[0, node.pos, node.neuron].clone()
    with torch.enable_grad():
        hand.score(ids, [3, 5], direct=True)
        hand.leaves["sae"].grad = None
        (hand.leaves["mlp"][0, node.pos, node.neuron] * weight).backward()
    direct = (hand.leaves["sae"].detach() * gradient(hand.leaves["sae"]))[0]
    edges = {
        (n.pos, n.neuron): float(graph.edges[place, i])
        for i, n in enumerate(graph.nodes)
        if n.kind == "resid_pre feature"
    }
    assert sum(abs(edge) > 1e-6 for edge in edges.values()) > 1
    for (pos, feature), edge in edges.items():
        assert edge == pytest.approx(float(direct[pos, feature]), abs=1e-9)


# ---- what other methods make of it


@pytest.fixture(scope="module")
def transcoder() -> cm.Dictionary:
    return made(
        128,
        128,
        3,
        hook_name="blocks.1.ln2.hook_normalized",
        hook_name_out="blocks.1.hook_mlp_out",
        activation="jumprelu",
    )


def test_contributions_have_features_and_their_error(causal, transcoder):
    found = cm.log_prob_contributions(causal, TEXT, **ARE, by="ff_neuron", dictionary=transcoder)
    frame = found.to_dataframe()
    mine = frame[frame.layer == 1]
    assert set(mine.kind) == {"mlp feature", "mlp feature bias", "mlp error"}
    whole = cm.log_prob_contributions(causal, TEXT, **ARE)
    before = whole.to_dataframe().set_index(["kind", "layer"]).score[("mlp", 1)]
    assert mine.score.sum() == pytest.approx(before, abs=1e-4)
    # Each feature: activation times row of W_dec, read by hand.
    _, cache = causal.run_with_cache(TEXT)
    x = cache["blocks.1.ln2.hook_normalized"][0, -1].double()
    pre = x @ transcoder.W_enc + transcoder.b_enc
    acts = pre.relu() * (pre > transcoder.threshold)
    features = mine[mine.kind == "mlp feature"]
    assert torch.allclose(torch.tensor(features.coefficient.to_numpy()).double(), acts, atol=1e-4)
    assert {"L1F23", "L1 mlp error", "L1 mlp feature bias", "L2N0"} <= {*found.labels()}
    best = cm.log_prob_contributions(
        causal, TEXT, **ARE, by="ff_neuron", k=30, dictionary=transcoder
    )
    assert not set(best.to_dataframe().kind) & set(ERRORS)
    assert "jumprelu" in best.provenance.options["dictionary"][0]


def test_values_and_triggers_are_those_of_features(causal, transcoder, tmp_path):
    read = cm.ff_values(causal, dictionary=transcoder, k=3, projection="none")
    assert read.neuron.tolist() == [*range(24)]
    assert set(read.layer.tolist()) == {1}
    logits = transcoder.W_dec.float() @ causal.W_U
    assert torch.equal(read.ids[:, 0], logits.topk(3).indices)
    corpus = ["the keys to the cabinet are on the table .", "the dogs near the boy run ."]
    mine: Any = {"out": tmp_path / "mined", "k": 4, "dictionary": transcoder}
    mined = cm.mine_triggers(causal, corpus, **mine)
    frame = mined.to_dataframe()
    found: dict[int, list[float]] = {}
    for text in corpus:
        _, cache = causal.run_with_cache(text)
        x = cache["blocks.1.ln2.hook_normalized"][0, 1:].double()
        pre = x @ transcoder.W_enc + transcoder.b_enc
        acts = pre.relu() * (pre > transcoder.threshold)
        for feature in range(24):
            found.setdefault(feature, []).extend(acts[:, feature].tolist())
    for feature, values in found.items():
        expected = sorted((v for v in values if v > 0), reverse=True)[:4]
        own = frame[(frame.layer == 1) & (frame.neuron == feature)].value.tolist()
        assert own == pytest.approx(expected, abs=1e-4)
    most = int(frame.neuron.value_counts().index[0])
    again = cm.load_triggers(tmp_path / "mined", model=causal, corpus=corpus, dictionary=transcoder)
    assert again.examples(1, most).to_dataframe().shape[0] >= 1
    # In a node's detail: the contexts that excite its feature.
    graph = cm.flow(causal, TEXT, **ARE, share=1.0, k=500, dictionary=transcoder)
    told = graph.with_triggers(again, k=2)
    shown = {node.neuron: node.triggers for node in told.nodes if node.triggers}
    assert shown
    for neuron, contexts in shown.items():
        own = again.examples(1, neuron, k=2)
        assert contexts == tuple(trigger.context for trigger in own.triggers)
    assert all(node.kind == "mlp feature" for node in told.nodes if node.triggers)
    assert "triggered by" in told.show().html()
    assert Result.load(told.save(tmp_path / "told.safetensors")).equals(told)
    with pytest.raises(cm.InvalidInput, match="those of other neurons"):
        cm.flow(causal, TEXT, **ARE).with_triggers(again)
    with pytest.raises(cm.InvalidInput, match="those of other features"):
        cm.load_triggers(tmp_path / "mined", model=causal)
    other = made(128, 128, 4, hook_name="blocks.1.hook_resid_pre")
    with pytest.raises(cm.InvalidInput, match="differs in dictionaries"):
        cm.mine_triggers(causal, corpus, **{**mine, "dictionary": other})


def test_a_direction_may_be_the_encoder_of_a_feature(causal, transcoder):
    key = cm.Direction(layer=1, neuron=5)
    found = cm.log_prob_contributions(causal, TEXT, target=key, dictionary=transcoder)
    _, cache = causal.run_with_cache(TEXT)
    x = cache["blocks.1.ln2.hook_normalized"][0, -1].double()
    assert float(found.log_prob[0]) == pytest.approx(float(x @ transcoder.W_enc[:, 5]), abs=1e-4)


def test_graph_files_have_features_and_errors(causal, transcoder, tmp_path):
    sae = made(128, 128, 5, hook_name="blocks.1.hook_resid_mid")
    graph = cm.flow(causal, TEXT, **ARE, dictionary=[sae, transcoder], share=1.0, k=200)
    assert Result.load(graph.save(tmp_path / "graph.safetensors")).equals(graph)
    panel = graph.panels()[0]
    assert isinstance(panel, Graph)
    assert {"L1 resid_mid feature", "L1 mlp feature", "L1 mlp error"} <= {*panel.rows}
    told = graph.to_circuit_tracer("features")
    readable(told)
    ids = [node["node_id"] for node in told["nodes"]]
    assert len({*ids}) == len(ids) == len({node["jsNodeId"] for node in told["nodes"]})
    types = {node["feature_type"] for node in told["nodes"]}
    assert {"cross layer transcoder", "mlp reconstruction error", "resid_mid feature"} <= types
    made_of = {node.label for node in graph.nodes}
    assert "L1 mlp error" in made_of
    assert any(label.startswith("L1 resid_mid F") for label in made_of)


def test_trained_dictionaries_explain_more_than_their_bias():
    from train_dictionaries import train_both

    made = train_both(sentences=128, steps=60)
    for dictionary, share in made.values():
        assert 0.3 < share < 1
        graph = cm.flow(cm.load_demo("causal-lm"), TEXT, **ARE, dictionary=dictionary)
        conserved(graph, 1e-5)


# ---- files, and what does not fit


@pytest.mark.parametrize("kind", ["Standard", "TopK", "JumpReLU", "Transcoder"])
def test_saelens_dictionaries_do_here_what_they_do_there(kind, tmp_path):
    """Where SAELens is installed, which pins versions of its own."""
    lens = pytest.importorskip("sae_lens")
    options: dict[str, Any] = {"d_in": 128, "d_sae": 40}
    options |= {"TopK": {"k": 6, "rescale_acts_by_decoder_norm": True}}.get(kind, {})
    out = {"d_out": 128, "apply_b_dec_to_input": False} if kind == "Transcoder" else {}
    name = "Transcoder" if kind == "Transcoder" else f"{kind}SAE"
    sae = getattr(lens, name)(getattr(lens, f"{name}Config")(**options, **out))
    sae.cfg.metadata.hook_name = "blocks.1.hook_resid_pre"
    if out:
        sae.cfg.metadata.hook_name = "blocks.1.ln2.hook_normalized"
        sae.cfg.metadata.hook_name_out = "blocks.1.hook_mlp_out"
    with torch.no_grad():
        for number, weight in enumerate(sae.parameters()):
            torch.manual_seed(number)
            weight.copy_(torch.randn(weight.shape) / 5)
    sae.save_model(tmp_path / "saved")
    x = torch.randn(7, 128)
    for read in (cm.Dictionary.from_saelens(sae), cm.Dictionary.from_saelens(tmp_path / "saved")):
        acts = read.activation_function()(x @ read.W_enc + read.b_enc)
        assert torch.allclose(acts, sae.encode(x), atol=1e-4)
        assert torch.allclose(acts @ read.W_dec + read.b_dec, sae(x), atol=1e-4)
    found = cm.flow(cm.load_demo("causal-lm"), TEXT, **ARE, dictionary=read, k=30)
    conserved(found, 1e-5)
    gated = lens.GatedSAE(lens.GatedSAEConfig(d_in=8, d_sae=16))
    with pytest.raises(cm.UnsupportedModel, match="'gated'"):
        cm.Dictionary.from_saelens(gated)


def test_saved_and_loaded(transcoder, tmp_path):
    again = cm.Dictionary.load(transcoder.save(tmp_path / "d.safetensors"))
    assert again.fingerprint == transcoder.fingerprint
    assert repr(again) == repr(transcoder)
    assert again.fingerprint != made(4, 4, 1, hook_name="x").fingerprint


def folder_of(path: Any, tensors: dict[str, Tensor], **config: Any) -> Any:
    """What SAELens writes."""
    from safetensors.torch import save_file

    path.mkdir()
    save_file(tensors, path / "sae_weights.safetensors")
    (path / "cfg.json").write_text(json.dumps(config))
    return path


def test_folders_of_saelens_are_read_without_it(tmp_path):
    draw = made(6, 6, 1, hook_name="x")
    tensors = {name: getattr(draw, name) for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
    config = {"architecture": "topk", "k": 3, "apply_b_dec_to_input": True,
              "rescale_acts_by_decoder_norm": True, "normalize_activations": "none",
              "metadata": {"hook_name": "blocks.0.hook_resid_pre"}}  # fmt: skip
    read = cm.Dictionary.from_saelens(folder_of(tmp_path / "one", tensors, **config))
    x, norms = torch.randn(5, 6, dtype=torch.float64), draw.W_dec.norm(dim=-1)
    pre = ((x - draw.b_dec) @ draw.W_enc + draw.b_enc) * norms
    acts = torch.zeros_like(pre).scatter(-1, pre.topk(3).indices, pre.topk(3).values.relu())
    own = read.activation_function()(x @ read.W_enc + read.b_enc)
    assert torch.allclose(own, acts)
    assert torch.allclose(own @ read.W_dec, (acts / norms) @ draw.W_dec)
    refused = {**config, "architecture": "gated"}
    with pytest.raises(cm.UnsupportedModel, match="'gated'"):
        cm.Dictionary.from_saelens(folder_of(tmp_path / "two", tensors, **refused))
    with pytest.raises(cm.InvalidInput, match="holds no SAE"):
        cm.Dictionary.from_saelens(tmp_path)
    nowhere = {**config, "metadata": {}}
    with pytest.raises(cm.InvalidInput, match="not known where"):
        cm.Dictionary.from_saelens(folder_of(tmp_path / "three", tensors, **nowhere))
    short = {"W_enc": draw.W_enc}
    with pytest.raises(cm.InvalidInput, match="no W_dec, b_enc, b_dec"):
        cm.Dictionary.from_saelens(folder_of(tmp_path / "four", short, **config))
    with pytest.raises(cm.InvalidInput, match="no SAE of SAELens"):
        cm.Dictionary.from_saelens(object())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"W_enc": torch.randn(4)}, "with 2 axes"),
        ({"W_enc": torch.randn(4, 3)}, "d_in = d_out"),
        ({"b_enc": torch.randn(3)}, "b_enc of 3 numbers"),
        ({"b_dec": torch.tensor([0.0, torch.nan, 0, 0])}, "finite"),
        ({"activation": "gelu"}, "'relu', 'jumprelu'"),
        ({"activation": "jumprelu"}, "a threshold for"),
        ({"activation": "topk"}, "k from 1 to 8"),
        ({"activation": "topk", "k": 9}, "k from 1 to 8"),
        ({"k": 3}, "and for nothing else"),
        ({"hook_name": ""}, "names of hook points"),
        ({"hook_name_out": 3}, "names of hook points"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(options, words):
    given = {"W_enc": torch.randn(4, 8), "W_dec": torch.randn(8, 4), "hook_name": "x", **options}
    with pytest.raises(cm.InvalidInput, match=words):
        cm.Dictionary(**given)


def test_dictionaries_that_do_not_fit_the_model_are_refused(causal, transcoder):
    def ask(match: str, *some: Any) -> None:
        with pytest.raises(cm.InvalidInput, match=match):
            cm.ff_values(causal, dictionary=[*some])

    square: Any = {"d_in": 128, "d_out": 128, "seed": 1}
    ask("no block for this", made(**square, hook_name="blocks.9.hook_resid_pre"))
    ask("no block for this", made(**square, hook_name="blocks.1.ln2.hook_normalized",
                                  hook_name_out="blocks.2.hook_mlp_out"))  # fmt: skip
    ask("does not show", made(**square, hook_name="blocks.1.hook_resid_between"))
    ask("width", made(64, 64, 1, hook_name="blocks.1.hook_resid_pre"))
    ask("relative error", made(**square, hook_name="blocks.1.hook_attn_out"))
    ask("two dictionaries", transcoder, transcoder)
    ask("expected a Dictionary", object())
    _, cache = causal.run_with_cache(TEXT)
    with pytest.raises(cm.InvalidInput, match="features"):
        cm.log_prob_contributions(causal, TEXT, **ARE, cache=cache, dictionary=transcoder)
