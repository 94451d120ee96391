"""What activates a neuron adds up to the model's own pre-activation, on every model and host."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
import zoo
from asked import bound, case_of, host_trace, keywords, relative, shared, view_of
from test_log_prob import POS

import tl_contextmix as cm
from tl_contextmix.engine.log_prob_scores import By
from tl_contextmix.methods.log_prob.contributions import Score
from tl_contextmix.plotting.panels import Table


def found_by(model: Any, given: zoo.Inputs, by: By, **options: Any) -> Any:
    """Contributions at the last position but one."""
    return cm.log_prob_contributions(
        model, given.tokens, by=by, pos=POS, **keywords(given), **options
    )


def queried(model: Any, given: zoo.Inputs, neurons: Any, **options: Any) -> Any:
    """What activates them."""
    return cm.query_contributions(
        model, given.tokens, neurons=neurons, pos=POS, **keywords(given), **options
    )


def limit(case: zoo.Case) -> float:
    """Relative to the largest entry; some hosts compute norms in float32."""
    return max(1e-9, 30 * bound(case)) if bound(case) > 1e-9 else 1e-9


def late(found: Any, k: int) -> Any:
    """The largest that have other neurons before them: those behind the first layer."""
    scores = found.scores.masked_fill(found.components.layer < 1, torch.nan)
    return replace(found, scores=scores).top(k)


def layer_sums(found: Any, layers: Any) -> None:
    """Heads, sources or neurons and their bias add up to their sublayer."""
    for row in range(2):
        for place in range(layers.scores.shape[1]):
            one = layers.components.at(row, place)
            if one["kind"].removeprefix("encoder ") == "embed":
                continue
            table = found.components
            own = table.of_kind(one["kind"]) | table.of_kind(f"{one['kind']} bias")
            mine = own[row].clone()
            mine &= (table.layer[row] == one["layer"]) & (table.pos[row] == one["pos"])
            if not bool(mine.any()):
                continue
            for name in ("inner", "shares"):
                whole = getattr(layers, name)[row, :, place]
                cut = getattr(found, name)[row][:, mine]
                seen = ~whole.isnan()
                torch.testing.assert_close(cut.sum(-1)[seen], whole[seen], atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("case", zoo.kinds(), ids=str)
def test_inner_products_add_up_to_the_model_s_own_pre_activation(case: zoo.Case) -> None:
    model, given = shared(case)
    view = view_of(model)
    trace, blocks = host_trace(view, given, None)
    if blocks[0].feed_forward is not None:
        neurons = late(found_by(model, given, "ff_neuron"), 4)
        layers = queried(model, given, neurons)
        for row in range(2):
            for i in range(4):
                one = neurons.components.at(row, i)
                ff = blocks[one["layer"]].feed_forward
                at = (row, one["pos"], one["neuron"])
                total = layers.inner[row, i].nansum() + layers.constant[row, i]
                assert relative(total, trace[ff.pre][at]) <= limit(case)
                assert relative(layers.pre[row, i], trace[ff.pre][at]) <= limit(case)
                b_post = ff.weights("b_post")
                post = trace[ff.post][at] - (0 if b_post is None else b_post[one["neuron"]])
                assert relative(layers.activation[row, i], post) <= limit(case)
                assert bool(layers.linear[row, i].isnan().all()) != ff.gated
        for by in ("head", "position", "ff_neuron"):
            layer_sums(queried(model, given, neurons, by=by), layers)
    neurons = late(found_by(model, given, "attn_neuron"), 6)
    layers = queried(model, given, neurons)
    # pattern * value, as it was multiplied with W_O.
    assert relative(layers.activation, neurons.coefficients) <= limit(case)
    torch.testing.assert_close(layers.inner.nansum(-1) + layers.constant, layers.pre)
    layer_sums(queried(model, given, neurons, by="head_position"), layers)
    # The scores of everything and of the biases' own share are the neurons' scores.
    part = layers.shares.nansum(-1) / layers.activation
    torch.testing.assert_close(layers.scores.nansum(-1), (part * neurons.scores).sum(-1))


def test_cross_attention_neurons_read_the_encoder() -> None:
    case = case_of("t5", "bart")
    model, given = shared(case)
    every = found_by(model, given, "attn_neuron")
    places = every.components.of_kind("cross_attn").nonzero(as_tuple=True)
    first = places[1][0]
    index = torch.stack([first, first + 1]).expand(2, 2)
    neurons = replace(
        every,
        components=every.components.select(index),
        **{n: getattr(every, n).gather(1, index) for n in ("scores", "coefficients", "logits")},
    )
    found = queried(model, given, neurons)
    kinds = {found.components.at(0, i)["kind"] for i in range(found.scores.shape[1])}
    assert {"encoder embed", "encoder attn", "encoder mlp"} <= kinds
    # Components of the encoder stand at its words, not at the decoder's.
    for row, words in enumerate(found.encoder.strings):
        every_one = [found.components.at(row, i) for i in range(found.scores.shape[1])]
        mine = torch.tensor([str(one["kind"]).startswith("encoder") for one in every_one])
        shown = replace(found, scores=found.scores.masked_fill(~mine, torch.nan)).panels()
        tables = [panel for panel in shown if isinstance(panel, Table)]
        assert tables[row].rows
        assert {line[1] for line in tables[row].rows} <= {*words, ""}
        assert {line[1] for line in tables[row].rows} & {*words}
    assert relative(found.activation, neurons.coefficients) <= limit(case)
    again = queried(model, given, queried(model, given, neurons, by="ff_neuron", k=3))
    assert "E" in again.neurons.label(0, 0)
    assert relative(again.inner.nansum(-1) + again.constant, again.pre) <= limit(case)


def test_chains_top_k_ratio_and_lists() -> None:
    model, given = shared(case_of("gpt2"))
    every = found_by(model, given, "ff_neuron")
    last = every.components.layer == 2
    neurons = replace(every, scores=every.scores.masked_fill(~last, torch.nan)).top(3)
    every = queried(model, given, neurons, by="ff_neuron")
    best = queried(model, given, neurons, by="ff_neuron", k=5)
    assert best.components.label(1, 0) == every.top(5).components.label(1, 0)
    torch.testing.assert_close(best.scores, every.top(5).scores)
    torch.testing.assert_close(best.inner, every.top(5).inner)
    chain = queried(model, given, best)
    torch.testing.assert_close(chain.weights, best.scores)
    # The authors' ratio: no mean, no scale, no bias; its shares add up to one for each neuron.
    ratio = queried(model, given, neurons, share="ratio")
    torch.testing.assert_close(ratio.scores.sum(-1), neurons.scores.sum(-1))
    view = view_of(model)
    trace, blocks = host_trace(view, given, None)
    one = neurons.components.at(0, 0)
    ff = blocks[2].feed_forward
    weight, gain = ff.weights("W_in"), ff.norm_in.weight
    assert weight is not None
    assert gain is not None
    key = weight[:, one["neuron"]] * gain
    stream = blocks[2].feed_forward_input(trace)[0, one["pos"]]
    start = trace.resid_in(blocks[0])[0, one["pos"]]
    single = queried(model, given, [(2, one["neuron"])], share="ratio")
    # Lists are weighted by the neurons' own log-probability increase.
    assert float(single.weights[0, 0]) == pytest.approx(float(neurons.scores[0, 0]))
    expected = float(start @ key / (stream @ key) * neurons.scores[0, 0])
    assert float(single.scores[0, 0]) == pytest.approx(expected)
    assert single.components.label(0, 0) == "embed"
    assert relative(single.scores, queried(model, given, [(2, one["neuron"])]).scores) > 1e-3


def test_what_cannot_be_asked() -> None:
    model, given = shared(case_of("gpt2"))
    with pytest.raises(cm.InvalidInput, match=r"which stream.*L1H2N3.*by 'attn_neuron'"):
        queried(model, given, [(1, 2, 3)])
    with pytest.raises(cm.InvalidInput, match=r"read no components by ff_neuron.*L0N3"):
        queried(model, given, [(0, 3)], by="ff_neuron")
    with pytest.raises(cm.InvalidInput, match=r"no such component.*L0N999"):
        queried(model, given, [(0, 999)])
    with pytest.raises(cm.InvalidInput, match=r"no such component.*L7N1"):
        queried(model, given, [(7, 1)])
    with pytest.raises(cm.InvalidInput, match=r"cannot be chosen.*by layer.*embed"):
        queried(model, given, found_by(model, given, "layer"))
    with pytest.raises(cm.InvalidInput, match=r"the neurons cannot be read: got \(1, 2, 3, 4\)"):
        queried(model, given, [(1, 2, 3, 4)])
    with pytest.raises(cm.InvalidInput, match=r"nothing was chosen"):
        queried(model, given, [])
    one = cm.log_prob_contributions(model, given.tokens[:1], by="ff_neuron").top(2)
    with pytest.raises(cm.InvalidInput, match=r"belong to another input"):
        queried(model, given, one)


def only(found: Any, layers: list[int]) -> Any:
    """Neurons of one layer in each sentence."""
    own = found.components.layer == torch.tensor(layers)[:, None]
    return replace(found, scores=found.scores.masked_fill(~own, torch.nan))


def test_a_sentence_whose_neurons_read_none_is_empty() -> None:
    model, given = shared(case_of("gpt2"))
    neurons = only(found_by(model, given, "ff_neuron"), [0, 1]).top(3)
    found = queried(model, given, neurons, by="ff_neuron", k=5)
    assert bool(found.scores[0].isnan().all())
    assert bool(found.scores[1].isfinite().all())
    assert found.to_dataframe().batch.unique().tolist() == [1]
    alone = cm.query_contributions(
        model,
        given.tokens[1:],
        neurons=named(neurons),
        pos=POS,
        target=neurons.target.ids[1].tolist(),
        by="ff_neuron",
        k=5,
    )
    torch.testing.assert_close(found.scores[1], alone.scores[0])
    # What is empty can be asked about again, and knocked out: nothing there.
    again = queried(model, given, found)
    assert bool(again.scores[0].isnan().all())
    assert bool(again.pre[0].isnan().all())
    assert bool(again.scores[1].isfinite().all())
    out = cm.knockout(model, given.tokens, neurons=found, pos=POS, controls=1)
    torch.testing.assert_close(out.after[0], out.before[0])
    assert float((out.after[1] - out.before[1]).abs().max()) > 1e-6
    first = only(found_by(model, given, "ff_neuron"), [0, 0]).top(3)
    with pytest.raises(cm.InvalidInput, match=r"read no components by ff_neuron"):
        queried(model, given, first, by="ff_neuron")


def named(neurons: Any) -> list[tuple[int, int]]:
    """The neurons of the second sentence as a list."""
    table = neurons.components
    return list(zip(table.layer[1].tolist(), table.neuron[1].tolist(), strict=True))


def test_scores_of_silent_neurons_cannot_be_shared_out() -> None:
    model, given = shared(case_of("gpt2"))
    for score in get_args(Score):
        neurons = found_by(model, given, "ff_neuron", score=score).top(3)
        if score not in ("log_prob", "norm", "rank"):
            found = queried(model, given, neurons)
            # Shares of a score that vanishes with the activation stay of its size.
            part = (found.shares / found.activation[:, :, None]).nan_to_num()
            expected = torch.einsum("bnc,bn->bc", part, neurons.scores)
            torch.testing.assert_close(found.scores.nan_to_num(), expected)
            continue
        with pytest.raises(cm.InvalidInput, match=rf"silent neurons.*scored by '{score}'.*ratio"):
            queried(model, given, neurons)
        queried(model, given, neurons, share="ratio")


def test_the_constants_share_is_what_is_missing() -> None:
    model, given = shared(case_of("gpt2"))
    neurons = found_by(model, given, "ff_neuron").top(1)
    found = queried(model, given, neurons)
    rest = found.constant / found.pre * neurons.scores
    assert float(rest.abs().min()) > 1e-6
    torch.testing.assert_close(found.scores.nansum(-1) + rest[:, 0], neurons.scores[:, 0])


def test_values_that_hooks_edit_are_no_sum_of_what_was_written() -> None:
    """Those of other sources are; and what is added to the stream was written to it."""
    model, given = shared(case_of("gpt2"))
    block = view_of(model).blocks()[1]

    def edit(stream: torch.Tensor, hook: Any) -> torch.Tensor:
        return torch.cat([stream[:, :1], stream[:, 1:2].flip(-1), stream[:, 2:]], dim=1)

    value = block.attentions[0].value
    for name, source, refused in ((value, 1, True), (value, 2, False), (block.resid_in, 1, False)):
        with model.hooks(fwd_hooks=[(name, edit)]):
            every = found_by(model, given, "attn_neuron")
            table = every.components
            own = (table.layer == 1) & (table.source == source)
            neurons = replace(every, scores=every.scores.masked_fill(~own, torch.nan)).top(3)
            if not refused:
                queried(model, given, neurons)
                continue
            with pytest.raises(cm.UnsupportedModel, match=r"neurons read is not the sum.*hooks"):
                queried(model, given, neurons)


def test_the_representation_says_where_components_write() -> None:
    model, given = shared(case_of("gpt2"))
    neurons = late(found_by(model, given, "attn_neuron"), 8)
    found = queried(model, given, neurons, by="head")
    listed = [part.rsplit(" ", 1)[0] for part in repr(found).splitlines()[1].strip().split(", ")]
    assert len(set(listed)) == 5
    assert all(" at " in one for one in listed)
