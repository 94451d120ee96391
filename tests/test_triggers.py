"""What is said about triggers is what a count over their contexts says."""

from __future__ import annotations

import csv
import gzip
import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from asked import case_of, view_of
from test_mining import WORDS, texts

import tl_contextmix as cm
from tl_contextmix.__main__ import main
from tl_contextmix.demo_models.grammar import Grammar
from tl_contextmix.engine.memory_coefficients import CASES, values
from tl_contextmix.errors import FileFormatError
from tl_contextmix.methods.memories import Triggers
from tl_contextmix.methods.memories.composition import draw
from tl_contextmix.methods.memories.trigger_statistics import common
from tl_contextmix.results import CompositionFigures

pytestmark = pytest.mark.once


def records(path: Path, opener: Any = open) -> list[dict[str, Any]]:
    """What a file of JSON lines holds."""
    with opener(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def lines_of(path: Path) -> list[dict[str, str]]:
    """What a spreadsheet holds."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def mined(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[str], Triggers]:
    """The demo model and sentences of its grammar."""
    grammar = Grammar(11, "train")
    corpus = [grammar.sentence().text for _ in range(250)]
    model = cm.load_demo("causal-lm")
    out = tmp_path_factory.mktemp("mined")
    found = cm.mine_triggers(model, corpus, out=out, k=6, tails="both")
    assert found is not None
    return model, corpus, found


def test_examples_have_their_contexts_and_coefficients(mined: Any) -> None:
    model, corpus, triggers = mined
    for tail, sign in (("positive", 1), ("negative", -1)):
        found = triggers.examples(2, 17, tail=tail)
        frame = triggers.to_dataframe(2, 17, tail)
        assert [t.value for t in found.triggers] == frame["value"].tolist()
        for trigger in found.triggers:
            assert sign * trigger.value > 0
            assert len(trigger.tokens) == len(trigger.activations) == trigger.position + 1
            assert trigger.activations[-1] == pytest.approx(trigger.value, abs=1e-5)
            text = "".join(trigger.tokens[1:]).strip()
            assert corpus[trigger.document].startswith(text)
            rest = corpus[trigger.document][len(text) :].split()
            assert trigger.next_token.strip() == (rest[0] if rest else "")
        side = int(tail == "negative")
        readout = cm.ff_values(model, layer=2, neurons=17)
        assert list(found.promotes) == readout.tokens(2, 17, negative=bool(side))
    assert len(triggers.examples(2, 17, k=2).triggers) == 2


def test_agreement_is_what_a_count_says(mined: Any) -> None:
    model, _, triggers = mined
    for tail, side in (("positive", 0), ("negative", 1)):
        found = triggers.agreement(tail)
        frame = triggers.to_dataframe(tail=tail)
        frame = frame[frame["next_token"] >= 0]
        table = cm.ff_values(model, k=1)
        top = {
            (int(a), int(b)): int(c)
            for a, b, c in zip(table.layer, table.neuron, table.ids[:, side, 0], strict=True)
        }
        groups = dict(list(frame.groupby(["layer", "neuron"])))
        assert len(found.layer) == len(groups)
        assert found.left_out == len(top) - len(groups)
        view = view_of(model)
        for row in found.to_dataframe().sample(40, random_state=0).itertuples():
            key = (row.layer, row.neuron)
            group = groups[key].sort_values("rank")
            share = (group["next_token"] == top[key]).mean()
            assert row[8] == pytest.approx(share)
            first = int(group["next_token"].iloc[0])
            assert row.agree == (first == top[key])
            v = values(view.blocks()[row.layer].feed_forward)[row.neuron]
            v = v * (1, -1)[side]
            norm = view.readout.norm
            W_U = view.readout.weights("W_U")
            assert norm is not None
            assert W_U is not None
            logits = norm.linear(v[None])[0] @ W_U
            assert row.rank == int((logits > logits[first]).sum()) + 1
    layers = found.by_layer()
    assert layers["memories"].sum() == len(found.layer)
    here = found.layer == 1
    pairs = found.top[here][:, None] == found.next_token[here][None]
    assert layers["chance"][1] == pytest.approx(float(pairs.double().mean()))
    groups = found.by_max_prob(4)
    assert groups["memories"].sum() == len(found.layer)
    whole = float(found.agree.double().mean())
    assert (groups["agreement"] * groups["memories"]).sum() == pytest.approx(
        whole * len(found.layer)
    )


def test_patterns_are_what_a_count_says(mined: Any) -> None:
    _, corpus, triggers = mined
    found = triggers.patterns(3, [5, 9])
    assert {row.neuron for row in found.rows} == {5, 9}
    for row in found.rows:
        examples = triggers.examples(3, row.neuron)
        contexts = [tuple(t.tokens[1:]) for t in examples.triggers]
        assert row.triggers == len(contexts)
        assert row.contexts == len(set(contexts))
        if row.kind == "ends with":
            ends = Counter("".join(c[-row.length :]) for c in contexts if len(c) >= row.length)
            assert row.share == ends[row.text] / len(contexts)
            assert ends[row.text] == max(ends.values())
        else:
            inside = Counter(token for c in contexts for token in set(c[:-1]))
            assert row.share == inside[row.text] / len(contexts)
            assert inside[row.text] == max(inside.values())
        documents = {draw(len(corpus), 0, index) for index in range(1000)}
        prefixes = [
            tuple(" " + word for word in corpus[d].split()[:end])
            for d in documents
            for end in range(1, len(corpus[d].split()) + 1)
        ]
        words = row.text.split()
        if len(words) == row.length:  # words that are one token each
            tokens = tuple(" " + word for word in words)
            n = len(tokens)
            has = [
                p[-n:] == tokens if row.kind == "ends with" else tokens[0] in p[:-1]
                for p in prefixes
            ]
            assert row.chance == pytest.approx(sum(has) / len(prefixes), rel=0.15)


def test_documents_that_were_not_mined_are_no_chance(tmp_path: Path) -> None:
    model = zoo.build(case_of("gpt2"), dtype=torch.float32)
    corpus = [[5, 9, 17, 20], [6, 9, 17], [8, 5]]
    options: dict[str, Any] = {"k": 2, "layer": 1, "malformed": "skip"}
    expected, found = (
        cm.mine_triggers(model, some, out=tmp_path / name, **options).patterns().to_dataframe()
        for name, some in (("a", corpus), ("b", [*corpus, [5] * 20 + [10**6]]))
    )
    assert found.equals(expected)


def test_contexts_of_one_token_contain_nothing_before_it() -> None:
    assert common([(5,), (5,), (7,)]) == [("ends with", (5,), 2 / 3)]


def test_examples_that_promote_nothing_known_show_their_contexts(mined: Any) -> None:
    found = mined[2].examples(1, 3)
    bare = replace(found, promotes=(), logits=())
    assert "promotes: " in repr(found)
    assert "promotes: " not in repr(bare)
    assert [panel.title for panel in bare.panels()] == [p.title for p in found.panels()[1:]]


def test_removal_is_a_run_without_the_token(mined: Any) -> None:
    model, corpus, triggers = mined
    found = triggers.removal(per_layer=3, k=4, seed=5)
    frame = triggers.to_dataframe(1, tail="positive")
    frame = frame[(frame["rank"] < 4) & (frame["position"] > 1)]
    chosen = sorted(set(triggers.to_dataframe(1, tail="positive")["neuron"]))
    chosen = sorted(chosen, key=lambda n: draw(2**62, 5, 1, int(n)))[:3]
    changes = []
    for row in frame[frame["neuron"].isin(chosen)].itertuples():
        ids = view_of(model).encode(corpus[row.document], None)[: row.position + 1]
        place = 1 + draw(len(ids) - 1, 5, row.document, row.position)
        cuts = [ids[:1] + ids[2:], ids[:-1], ids[:place] + ids[place + 1 :]]
        ends = [
            float(cm.ff_memories(model, torch.tensor([cut])).coefficients[0, 1, -1, row.neuron])
            for cut in (ids, *cuts)
        ]
        changes.append([(end - ends[0]) / ends[0] for end in ends[1:]])
    expected = torch.tensor(changes, dtype=torch.float64).mean(0)
    assert torch.allclose(found.values[0, 1], expected, atol=1e-4)


def test_figures_over_a_corpus_are_those_of_its_texts(tmp_path: Path) -> None:
    model, corpus = zoo.build(case_of("gpt2")), texts(21)
    found = cm.composition(model, corpus, pos="all", batch_size=4)
    total = None
    for text in corpus:
        one = cm.ff_memories(model, text)
        rows = {
            "active": one.active,
            "zero agreement": one.zero_agreement.double(),
            "residual = final": one.residual_is_final.double(),
            "probability": one.probability,
            **{name: (one.case == index).double() for index, name in enumerate(CASES)},
        }
        sums = torch.stack([row[0, :, 1:].sum(-1) for row in rows.values()], dim=-1)
        total = sums if total is None else total + sums
    assert total is not None
    assert torch.allclose(found.sums, total, rtol=1e-9)
    assert found.examples == sum(len(text.split()) for text in corpus)
    drawn = cm.composition(model, corpus, seed=1)
    assert drawn.examples == 21
    assert drawn.equals(cm.composition(model, corpus, seed=1))
    assert not torch.equal(drawn.sums, cm.composition(model, corpus, seed=2).sums)
    assert (found + drawn).examples == found.examples + 21
    again = CompositionFigures.load(found.save(tmp_path / "figures.safetensors"))
    assert again.equals(found)


def test_results_save_load_and_show_themselves(mined: Any, tmp_path: Path) -> None:
    model, _, triggers = mined
    results = [
        triggers.examples(0, 3),
        triggers.agreement(),
        triggers.patterns(0, [1, 2]),
        cm.ff_values(model, layer=0, neurons=[1, 2]),
        cm.ff_memories(model, "the keys to the cabinet are"),
        cm.token_memory(model, "the keys to the cabinet are", layer=1, pos=-1, neurons=[1, 2]),
    ]
    for index, result in enumerate(results):
        again = type(result).load(result.save(tmp_path / f"{index}.safetensors"))
        assert again.equals(result)
        assert len(result.to_dataframe()) > 0
        assert "article" in result.show()._repr_html_()
        assert type(result).__name__ in repr(result) or "triggers" in repr(result)


def test_exports(mined: Any, tmp_path: Path) -> None:
    _, _, triggers = mined
    for name, opener in (("a.jsonl", open), ("a.jsonl.gz", gzip.open)):
        rows = records(triggers.to_jsonl(tmp_path / name, layer=1, neuron=3), opener)
        assert len(rows) == len(triggers.to_dataframe(1, 3))
        assert rows[0]["layer"] == "1-mlp"
        assert rows[0]["index"] == "3"
        assert len(rows[0]["tokens"]) == len(rows[0]["values"])
        assert rows[0]["values"][rows[0]["maxValueTokenIndex"]] == rows[0]["maxValue"]
    lines = lines_of(triggers.to_sheet(tmp_path / "sheet.csv", per_layer=2, k=3))
    assert len(lines) == 4 * 2 * 3
    assert len({(line["layer"], line["neuron"]) for line in lines}) == 8
    assert all(line["pattern_1"] == "" for line in lines)
    with pytest.raises(cm.InvalidInput, match="cannot be written"):
        triggers.to_sheet(tmp_path / "no" / "sheet.csv")


def test_text_that_a_spreadsheet_would_run_is_quoted(tmp_path: Path) -> None:
    from tl_contextmix.methods.memories.trigger_contexts import _plain

    assert [_plain(text) for text in ("=1+1", "-x", "the cat")] == ["'=1+1", "'-x", "the cat"]


def test_tables_need_neither_model_nor_corpus(mined: Any) -> None:
    model, corpus, triggers = mined
    bare = cm.load_triggers(triggers.folder)
    assert bare.to_dataframe().equals(triggers.to_dataframe())
    assert "250 documents" in repr(bare)
    for ask in (bare.agreement, bare.patterns, lambda: bare.show(0, 0), bare.removal):
        with pytest.raises(cm.InvalidInput, match="needs the model that was mined"):
            ask()
    with pytest.raises(cm.InvalidInput, match="no corpus"):
        cm.load_triggers(triggers.folder, model=model).show(0, 0)
    with pytest.raises(cm.InvalidInput, match="another model"):
        cm.load_triggers(triggers.folder, model=cm.load_demo("masked-lm"))
    wrong = cm.load_triggers(triggers.folder, model=model, corpus=corpus[::-1])
    with pytest.raises(cm.InvalidInput, match="not the one that was mined"):
        wrong.patterns(0)
    unknown: list[dict[str, Any]] = [{"layer": 9}, {"neuron": 10**6}, {"tail": "++"}]
    for bad in unknown:
        with pytest.raises(cm.InvalidInput):
            bare.to_dataframe(**bad)
    with pytest.raises(FileFormatError, match="cannot read"):
        cm.load_triggers(triggers.folder / "elsewhere")


def test_what_is_beside_a_trigger_is_what_was_mined(tmp_path: Path) -> None:
    """The same token may stand at a trigger, and another text before it."""
    model, corpus = zoo.build(case_of("gpt2")), ["the cat is in paris", "a dog is on paris"]
    found = cm.mine_triggers(model, corpus, out=tmp_path / "new", k=2, layer=0)
    neuron = int(found.to_dataframe()["neuron"].iloc[0])
    swapped = cm.load_triggers(tmp_path / "new", model=model, corpus=corpus[::-1])
    asked: list[Any] = [
        lambda: swapped.examples(0, neuron),
        swapped.patterns,
        swapped.removal,
        lambda: swapped.to_jsonl(tmp_path / "a.jsonl"),
        lambda: swapped.to_sheet(tmp_path / "a.csv"),
    ]
    for ask in asked:
        with pytest.raises(cm.InvalidInput, match=r"document \d is not the one that was mined"):
            ask()
    # Version 0.1.0 wrote no hashes: such folders are read, and their tokens are compared.
    old = shutil.copytree(tmp_path / "new", tmp_path / "old")
    frame = found.to_dataframe().drop(columns="hash")
    frame.to_parquet(old / "triggers.parquet", index=False)
    manifest = json.loads((old / "manifest.json").read_text())
    (old / "manifest.json").write_text(json.dumps({**manifest, "format": 1}))
    read = cm.load_triggers(old, model=model, corpus=corpus)
    assert read.to_dataframe().equals(frame)
    assert read.examples(0, neuron).triggers == found.examples(0, neuron).triggers
    with pytest.raises(cm.InvalidInput, match="is not the one that was mined"):
        cm.load_triggers(old, model=model, corpus=["a", "a"]).examples(0, neuron)


def test_what_reads_both_ways_has_no_next_token(tmp_path: Path) -> None:
    model = zoo.shared(case_of("bert"))
    triggers = cm.mine_triggers(model, texts(8), out=tmp_path, k=2)
    with pytest.raises(cm.InvalidInput, match="predicts the next token"):
        triggers.agreement()
    with pytest.raises(cm.InvalidInput, match="reads both ways"):
        triggers.removal()
    first = triggers.to_dataframe().iloc[0]
    assert triggers.examples(int(first["layer"]), int(first["neuron"])).triggers
    with pytest.raises(cm.InvalidInput, match="one stack|no token is read"):
        cm.composition(zoo.shared(case_of("t5", "flan", "bart")), texts(3))


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_where_both_ways_are_read_the_whole_document_is_run(family: str, tmp_path: Path) -> None:
    """A coefficient of such a model is no function of what is in front of the trigger."""
    if not any(case.family == family for case in zoo.cases()):
        pytest.skip(f"no {family} on this TransformerLens")
    model, corpus = zoo.shared(case_of(family)), texts(12)
    triggers = cm.mine_triggers(model, corpus, out=tmp_path / "out", k=3, tails="both")
    for tail in ("positive", "negative"):
        examples = triggers.examples(1, 3, tail=tail)
        for trigger in examples.triggers:
            assert trigger.activations[trigger.position] == pytest.approx(trigger.value, rel=1e-9)
            ids = view_of(model).encode(corpus[trigger.document], None)
            assert trigger.tokens == tuple(map(view_of(model).to_string, ids))
        frame = examples.to_dataframe()
        assert frame["token"].tolist() == [t.tokens[t.position] for t in examples.triggers]
        behind = [" ".join(t.tokens[t.position + 1 :]) for t in examples.triggers]
        assert frame["after"].tolist() == behind
    found = records(triggers.to_jsonl(tmp_path / "a.jsonl", layer=1, neuron=3))
    values = triggers.to_dataframe(1, 3)["value"].tolist()
    places = [record["values"][record["qualifyingTokenIndex"]] for record in found]
    assert places == pytest.approx(values, rel=1e-9)
    assert all(row.contexts <= row.triggers for row in triggers.patterns(1, 3).rows)


def test_figures_over_a_corpus_do_not_follow_hooks_they_cannot_follow() -> None:
    corpus = texts(4)
    for end, kind in (("attn.hook_out", "attn"), ("ln_final.hook_normalized", "ln")):
        model = zoo.build(case_of("gpt2"))
        names = [name for name in model.hook_dict if name.endswith(end)]
        if not names:  # TransformerLens 2 has hook_attn_out
            names = [name for name in model.hook_dict if name.endswith(f"hook_{kind}_out")]
        plain = cm.composition(model, corpus, pos="all")
        assert plain.sums.dtype == torch.float64
        model.add_hook(names[0], lambda x, hook: x + torch.linspace(-9, 9, x.shape[-1]).to(x))
        if kind == "attn":  # memories add up all the same, of what they read now
            assert not cm.composition(model, corpus, pos="all").equals(plain)
        else:
            with pytest.raises(cm.UnsupportedModel, match="hooks of your own"):
                cm.composition(model, corpus, pos="all")
            with pytest.raises(cm.UnsupportedModel, match="hooks of your own"):
                cm.ff_memories(model, corpus)
        model.reset_hooks()
        assert cm.composition(model, corpus, pos="all").equals(plain)


def test_jsonl_holds_the_tail_that_is_asked_for(mined: Any, tmp_path: Path) -> None:
    _, _, triggers = mined
    for tail, sign in (("positive", 1), ("negative", -1)):
        found = records(triggers.to_jsonl(tmp_path / "a", layer=0, neuron=3, tail=tail))
        assert len(found) == len(triggers.to_dataframe(0, 3, tail))
        assert all(sign * r["values"][r["qualifyingTokenIndex"]] > 0 for r in found)
    sheet = triggers.to_sheet(tmp_path / "b.csv", per_layer=1, k=1, tail="negative")
    assert all(float(line["value"]) < 0 for line in lines_of(sheet))


def test_shares_of_processes_are_read_from_one_launcher() -> None:
    from tl_contextmix.commands.on_corpora import _share

    numbers = {"ID": "5", "COUNT": "4", "MIN": "1", "STEP": "2"}
    array = {f"SLURM_ARRAY_TASK_{name}": number for name, number in numbers.items()}
    inner = {"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}
    assert _share({}) == (0, 1)
    assert _share({"RANK": "3", "WORLD_SIZE": "8"}) == (3, 8)
    assert _share({**array, **inner}) == (2, 4)
    assert _share({"WORLD_SIZE": "8", "SLURM_PROCID": "1", "SLURM_NTASKS": "2"}) == (1, 2)
    assert _share({"RANK": "a", "WORLD_SIZE": "8"}) == (0, 1)


def test_the_command_line_mines_merges_and_shows(
    mined: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(mined[1][:40]) + "\n")
    common = ["causal-lm", str(corpus), "-k", "3", "--shard-size", "8"]
    assert main(["mine", *common, "-o", str(tmp_path / "one")]) == 0
    for rank in ("0", "1"):
        arguments = ["--rank", rank, "--world-size", "2", "-o", str(tmp_path / "two")]
        assert main(["mine", *common, *arguments]) == 0
    assert main(["merge", str(tmp_path / "two")]) == 0
    for name in ("triggers.parquet", "manifest.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    capsys.readouterr()
    show = ["show", str(tmp_path / "two")]
    assert main(show) == 0
    assert "40 documents" in capsys.readouterr().out
    page = tmp_path / "page.html"
    assert main([*show, "--layer", "1", "--neuron", "3", "-o", str(page)]) == 0
    assert "promotes:" in capsys.readouterr().out
    assert "L1.3" in page.read_text()
    assert main([*show, "--layer", "1", "--neuron", "3"]) == 0
    assert "promotes:" in capsys.readouterr().out
    # What was not mined by the command says nothing of where its model is.
    assert main(["show", str(mined[2].folder), "--layer", "1", "--neuron", "3"]) == 2
    assert "Pass MODEL after DIR" in capsys.readouterr().err
    assert main(["show", str(tmp_path / "no")]) == 2
    assert main([*show, "--layer", "1"]) == 2
    assert main(["merge", str(tmp_path / "typo")]) == 2
    assert not (tmp_path / "typo").exists()
    assert "Pass both --layer and --neuron" in capsys.readouterr().err
    dropped = ["--duplicates", "drop", "--neurons", "3,5", "--layer", "1"]
    assert main(["mine", *common, *dropped, "-o", str(tmp_path / "few")]) == 0
    few = cm.load_triggers(tmp_path / "few")
    assert few.manifest["run"]["options"]["neurons"] == {"1": [3, 5]}
    assert few.manifest["run"]["options"]["duplicates"] == "drop"
    with monkeypatch.context() as patch:
        patch.setattr("tl_contextmix.commands.on_corpora.mine_triggers", interrupt)
        assert main(["mine", *common, "-o", str(tmp_path / "x")]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert main(["mine", "causal-lm", str(tmp_path / "no.txt"), "-o", str(tmp_path / "x")]) == 2
    assert "tl-contextmix: error:" in capsys.readouterr().err


def test_the_tokens_of_the_zoo_are_words() -> None:
    assert len(view_of(zoo.build(case_of("gpt2"))).encode(" ".join(WORDS), False)) == len(WORDS)
