"""The command line: what it offers, what it takes, what it prints and where it leaves."""

from __future__ import annotations

import functools
import inspect
import io
import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import pandas
import pytest
import unchecked
from click.shell_completion import BashComplete, FishComplete, ZshComplete

import tl_contextmix as cm
from tl_contextmix.__main__ import main
from tl_contextmix.adapters.loading import load_model
from tl_contextmix.commands import as_options, commands, on_corpora, on_methods, on_texts
from tl_contextmix.commands.names import COMMANDS, DEMOS, METHODS
from tl_contextmix.demo_models import DEMO_NAMES
from tl_contextmix.engine.registry import methods
from tl_contextmix.evaluation.compare import comparable
from tl_contextmix.plotting.panels import Table
from tl_contextmix.results import Memories, Result

pytestmark = pytest.mark.once
TEXT = "the keys to the cabinet"


def test_every_method_on_a_text_is_a_command():
    """What is read from the source, so that help need not wait, is what is declared."""
    on_text = {
        name.replace("_", "-"): inspect.getdoc(one.function) or ""
        for name, one in methods().items()
        if one.on_text and "input" in inspect.signature(one.function).parameters
    }
    assert set(METHODS) == set(on_text)
    for name, told in METHODS.items():
        assert told in on_text[name].splitlines()[0]
    assert not set(METHODS) & set(COMMANDS)


@pytest.mark.parametrize("name", [*COMMANDS, *METHODS])
def test_every_command_has_help_with_an_example(name, capsys):
    assert main([name, "--help"]) == 0
    told = capsys.readouterr().out
    assert f"  tl-contextmix {name} " in told
    assert "Example" in told
    if name in METHODS:
        assert f"Usage: tl-contextmix {name} [OPTIONS] MODEL TEXT" in told
        for option in ("--device", "--dtype", "--quiet", "--json", "--csv", "--output"):
            assert option in told
        takes = inspect.signature(methods()[name.replace("-", "_")].function).parameters
        assert ("--layer" in told) == ("layer" in takes)


def test_help_and_completion_need_no_model(capsys):
    """Without torch they are there in a fraction of a second."""
    code = (
        "import sys; from tl_contextmix.__main__ import main; "
        "main(['--help']); print('torch' in sys.modules, 'transformer_lens' in sys.modules)"
    )
    started = time.perf_counter()
    said = unchecked.run("-c", code)
    # A bound that holds on a busy machine too; alone it takes 0.15 seconds.
    assert time.perf_counter() - started < 10
    assert said.splitlines()[-1] == "False False"
    assert "130  interrupted" in said
    completion = BashComplete(commands, {}, "tl-contextmix", "_TL_CONTEXTMIX_COMPLETE")
    found = [one.value for one in completion.get_completions([], "value")]
    assert found == ["value-zeroing"]


def run(capsys: Any, *arguments: str) -> tuple[int, str, str]:
    code = main([*arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_a_method_prints_its_table(capsys, tmp_path):
    expected = cm.value_zeroing(cm.load_demo("causal-lm"), TEXT, layer=[1, 2]).to_dataframe()
    asked = ("value-zeroing", "causal-lm", TEXT, "--layer", "1,2")
    code, out, err = run(capsys, *asked, "--json")
    assert (code, err) == (0, "")
    told = json.loads(out)
    assert told["method"] == "value_zeroing"
    assert told["model"] == "causal-lm"
    rows = pandas.DataFrame(told["rows"])
    assert rows.source_token.tolist() == expected.source_token.tolist()
    assert rows.score.tolist() == pytest.approx(expected.score.tolist(), rel=1e-6, abs=1e-12)
    path = tmp_path / "map.csv"
    code, out, err = run(capsys, *asked, "--quiet", "-o", str(path))
    assert (code, out, err) == (0, "", "")
    read = pandas.read_csv(path)
    assert read.score.tolist() == pytest.approx(expected.score.tolist(), rel=1e-6, abs=1e-12)
    # As in Python, with an underscore, and once for each layer.
    again = run(capsys, "value_zeroing", *asked[1:3], "--layer", "1", "--layer", "2", "--csv")
    assert again[1] == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("ending", [".html", ".safetensors", ".json", ".svg"])
def test_a_result_is_written_as_its_name_says(ending, capsys, tmp_path):
    path = tmp_path / f"map{ending}"
    code, out, _ = run(
        capsys, "attention-norms", "causal-lm", TEXT, "--at", "mlp_out", "-o", str(path)
    )
    assert code == 0
    assert out.splitlines()[-1] == str(path)
    if ending == ".safetensors":
        assert Result.load(path).equals(
            cm.attention_norms(cm.load_demo("causal-lm"), TEXT, at="mlp_out")
        )
    elif ending == ".json":
        assert json.loads(path.read_text())["unit"] == "norm"
    else:
        assert path.read_text(encoding="utf-8").startswith(("<!DOCTYPE html>", "<?xml"))


def test_memories_are_read_at_the_positions_asked_for(capsys, tmp_path):
    path, k = tmp_path / "found.safetensors", 2
    asked = ("ff-memories", "causal-lm", TEXT, "--layer", "2", "--position", "1,-1", "--k", str(k))
    assert run(capsys, *asked, "--quiet", "-o", str(path)) == (0, "", "")
    found = Memories.load(path)
    expected = cm.ff_memories(cm.load_demo("causal-lm"), TEXT, layer=[2], pos=[1, -1], k=k)
    assert found.equals(expected)
    tables = [one for one in found.panels() if isinstance(one, Table)]
    words, last = found.tokens.strings[0], found.tokens.shape[1] - 1
    assert [one.title for one in tables] == [
        f"Memories at {words[place]!r} ({place})" for place in (1, last)
    ]
    for table, place in zip(tables, (1, last), strict=True):
        assert [row[-1] for row in table.rows] == [*found.top(k, pos=place).promotes]
    # It is named so, too, where there is no prediction.
    asked = ("token-memory", "causal-lm", TEXT, "--layer", "2", "--neurons", "78", "--csv")
    code, out, err = run(capsys, *asked, "--position", "-1")
    assert (code, err) == (0, "")
    assert len(out.splitlines()) == last + 2


def test_neurons_are_numbered_by_layer(capsys):
    asked = ("query-contributions", "causal-lm", TEXT, "--neurons", "2.78,3.5", "--csv")
    code, out, _ = run(capsys, *asked)
    expected = cm.query_contributions(cm.load_demo("causal-lm"), TEXT, neurons=[(2, 78), (3, 5)])
    assert code == 0
    assert len(out.splitlines()) == len(expected.to_dataframe()) + 1
    assert "is not of the form N.N" in run(capsys, *asked[:4], "2.x")[2]


def test_the_decoder_lens_scores_the_words_it_is_given(capsys):
    model, text = "encoder-decoder", "the bat burned ."
    asked = ("decoder-lens", model, text, "--mode", "scores", "--target", "la", "--target", "les")
    rows = pandas.DataFrame(json.loads(run(capsys, *asked, "--json")[1])["rows"])
    found = cm.decoder_lens(cm.load_demo(model), text, mode="scores", target=["la", "les"])
    assert rows.log_prob.tolist() == pytest.approx(found.log_probs.flatten().tolist(), abs=1e-5)
    assert "--task" not in run(capsys, "decoder-lens", "--help")[1]  # which is of sound


def test_precision_and_device_are_those_asked_for(capsys):
    asked = ("attention-norms", "causal-lm", TEXT, "--json", "--layer", "0")
    single, double = (
        pandas.DataFrame(
            json.loads(run(capsys, *asked, "--device", "cpu", "--dtype", dtype)[1])["rows"]
        )
        for dtype in ("float32", "float64")
    )
    assert single.score.tolist() == pytest.approx(double.score.tolist(), rel=1e-4)
    assert single.score.tolist() != double.score.tolist()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("value-zeroing", "causal-lm", TEXT, "-o", "map.xyz"), "a name that ends in .html"),
        (("value-zeroing", "causal-lm", TEXT, "--layer", "9"), "9"),
        (("query-contributions", "causal-lm", TEXT, "--neurons", "9.1"), "9"),
        (("attention-norms", "causal-lm", TEXT, "-o", "no/map.html"), "cannot be written"),
        (("value-zeroing", "nowhere", TEXT), "cannot load the model"),
        (("check", "nowhere"), "cannot load the model"),
        (("report", "causal-lm", ""), "empty"),
        (("report", "--triggers", "no folder", "causal-lm"), "no folder"),
        (("report", "-o", "missing/folder/page.html"), "the page cannot be written"),
        # Before anything is computed.
        (("report", "nowhere", "-o", "page.pdf"), "a name that ends in .html"),
        (("scan", "nowhere", "rows.csv", "--page", "page.csv"), "Give another --page"),
        (("scan", "nowhere", "rows.csv", "--page", "no/page.html"), "cannot be written"),
    ],
)
def test_errors_are_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert err.startswith("tl-contextmix: error: ")
    assert message in err


def test_a_picture_is_refused_before_the_work_without_matplotlib(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("tl_contextmix.plotting.matplotlib_export.find_spec", lambda name: None)
    code, out, err = run(capsys, "attention", "nowhere", TEXT, "-o", str(tmp_path / "map.svg"))
    assert (code, out) == (2, "")
    assert 'pip install "tl-contextmix[figures]"' in err


def test_what_an_output_cannot_write_is_escaped(monkeypatch):
    asked, written = ("value-zeroing", "causal-lm", "é 🗝", "--layer", "2"), {}
    for form in ("--csv", "--json"):
        stream = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
        monkeypatch.setattr(sys, "stdout", stream)
        assert main([*asked, form]) == 0
        stream.flush()
        written[form] = stream.buffer.getvalue().decode("cp1252")
    expected = cm.value_zeroing(cm.load_demo("causal-lm"), asked[2], layer=2).to_dataframe()
    words = expected.source_token.tolist()
    rows = json.loads(written["--json"])["rows"]
    assert [row["source_token"] for row in rows] == words
    read = pandas.read_csv(io.StringIO(written["--csv"])).source_token
    escaped = [word.encode("cp1252", "backslashreplace").decode("cp1252") for word in words]
    assert escaped != words
    assert read.tolist() == escaped


def test_what_is_not_understood_is_said_on_one_line(capsys):
    see = "See 'tl-contextmix value-zeroing --help'."
    mistakes: list[tuple[tuple[str, ...], str]] = [
        (("value-zeroing", "causal-lm"), f"Missing argument 'TEXT'. {see}"),
        (("value-zeroing", "causal-lm", TEXT, "--metric", "x"), "is not one of 'cosine'"),
        (("value-zeroing", "causal-lm", TEXT, "--layer", "x"), "not a valid integer"),
        (("value-zeroing", "causal-lm", TEXT, "--layr", "1"), "Did you mean '--layer'? See '"),
        (("unknown",), "No such command 'unknown'. See 'tl-contextmix --help'."),
        (("check",), "Missing argument 'MODEL'. See 'tl-contextmix check --help'."),
        (("report", "--sections", "x"), "is not one of 'prediction'"),
        (("value-zeroin", "causal-lm", TEXT), "No such command 'value-zeroin'"),
        (("query-contributions", "causal-lm", TEXT, "--edge", "3,0"), "not of the form L.H.T.S"),
        # What is refused names the options of the command, not the arguments in Python.
        (("query-contributions", "causal-lm", TEXT), "expected --neurons, or --edge (layer"),
        (("explain", "causal-lm", TEXT, "--foil", " is"), "got --foil ' is' and no target"),
    ]
    for given, message in mistakes:
        code, out, err = run(capsys, *given)
        assert (code, out) == (2, "")
        assert len(err.splitlines()) == 1
        assert err.startswith("tl-contextmix: error: ")
        assert message in err, err


def test_messages_on_arguments_become_messages_on_options():
    command = commands.get_command(click.Context(commands), "value-zeroing")
    text = "Pass heads=True, heads=False, pos=3 or layer=; see dictionary=, and mylayer=4."
    assert as_options(text, command) == (
        "Pass --heads, --no-heads, --position 3 or --layer; see dictionary=, and mylayer=4."
    )


@pytest.mark.parametrize("name", [*COMMANDS, *METHODS])
def test_model_is_spelled_alike(name):
    command = commands.get_command(click.Context(commands), name)
    models = [one for one in command.params if one.name == "model"]
    assert (name == "merge") == (not models)
    for one in models:
        assert isinstance(one, click.Argument)
        assert one.metavar in ("MODEL", "[MODEL]")
        assert command is not None
        ctx = click.Context(command)
        assert [item.value for item in one.shell_complete(ctx, "ca")] == ["causal-lm"]
        assert [item.type for item in one.shell_complete(ctx, "./ca")] == ["dir"]
    assert set(DEMOS) == set(DEMO_NAMES)


@pytest.fixture
def loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    load = functools.cache(load_model)
    for module in (on_methods, on_texts, on_corpora):
        monkeypatch.setattr(module, "load_model", load)


def test_the_examples_in_the_help_run(capsys, loaded_once, monkeypatch):
    """Those on a demo model: others name a model or a file of the reader's."""
    few = {"attention": comparable()["attention"]}
    monkeypatch.setattr("tl_contextmix.evaluation.compare.comparable", lambda: few)
    ran = []
    for name in (*METHODS, "check", "explain", "compare"):
        told = run(capsys, name, "--help")[1]
        for line in re.findall(rf"^ +(tl-contextmix {name} \S+-\S+.*)$", told, re.MULTILINE):
            code, out, err = run(capsys, *shlex.split(line)[1:])
            assert code == 0, line
            # Few sentences are said to be few.
            assert (name == "compare") or not err, line
            if line.endswith("--json"):
                assert json.loads(out)["rows"], line
            ran.append(name)
    assert set(ran) >= {*METHODS, "check", "explain", "compare"}


def test_what_commands_on_texts_find_as_data(capsys, tmp_path, monkeypatch, loaded_once):
    monkeypatch.chdir(tmp_path)
    asked = ("causal-lm", TEXT, "--target", " are", "--foil", " is")
    told = json.loads(run(capsys, "explain", *asked, "--json")[1])
    prediction, components = told["sections"]
    assert "\u201care\u201d" in prediction["finding"]
    assert components["title"] == "Which components wrote the answer?"
    report = ("report", *asked, "--sections", "prediction")
    told = json.loads(run(capsys, *report, "--json")[1])
    assert told["page"] == "tl_contextmix_report.html"
    assert told["sections"] == [prediction]
    assert run(capsys, *report, "--quiet", "-o", "quiet.html") == (0, "", "")
    assert {path.name for path in tmp_path.iterdir()} == {"tl_contextmix_report.html", "quiet.html"}
    told = json.loads(run(capsys, "check", "causal-lm", "--json")[1])
    expected = cm.check(cm.load_demo("causal-lm"))
    assert [row["identity"] for row in told["rows"]] == [row.identity for row in expected.rows]
    assert all(row["ok"] for row in told["rows"])
    assert run(capsys, "check", "causal-lm", "--quiet") == (0, "", "")


def test_what_a_comparison_finds_as_data(capsys, tmp_path, monkeypatch, loaded_once):
    few = {name: comparable()[name] for name in ("attention", "value_zeroing")}
    monkeypatch.setattr("tl_contextmix.evaluation.compare.comparable", lambda: few)
    monkeypatch.chdir(tmp_path)
    asked = ("compare", "causal-lm", "--sentences", "2")
    rows = json.loads(run(capsys, *asked, "--json")[1])["rows"]
    table = run(capsys, *asked, "--csv")[1]
    assert {row["method"] for row in rows} == {*few}
    assert not [*tmp_path.iterdir()]
    assert run(capsys, *asked, "--quiet", "-o", "found.csv") == (0, "", "")
    read, printed = (
        pandas.read_csv(one).drop(columns="seconds") for one in ("found.csv", io.StringIO(table))
    )
    assert read.equals(printed)
    assert [row["value"] for row in rows] == pytest.approx(read.value.tolist(), nan_ok=True)
    assert len(rows) == len(read)


def test_what_commands_on_corpora_find_as_data(capsys, tmp_path, loaded_once):
    rows = tmp_path / "rows.csv"
    rows.write_text("prompt,target,foil\nthe keys, are, is\nthe key, is, are\n")
    scan = ("scan", "causal-lm", str(rows), "--by", "head")
    told = json.loads(run(capsys, *scan, "--json")[1])
    assert told["method"] == "scan"
    assert {"component", "mean"} <= set(told["rows"][0])
    assert len(run(capsys, *scan, "--csv")[1].splitlines()) == len(told["rows"]) + 1
    assert run(capsys, *scan, "--quiet") == (0, "", "")
    corpus, folder = tmp_path / "corpus.txt", str(tmp_path / "mined")
    corpus.write_text("the keys are old\nthe key is old\n")
    mine = ("mine", "causal-lm", str(corpus), "-o", folder, "-k", "2", "--layer", "1")
    few = ("--neurons", "3,5")
    part = run(capsys, *mine, *few, "--rank", "0", "--world-size", "2", "--json")[1]
    assert json.loads(part) == {"part": 0, "of": 2}
    assert run(capsys, *mine, *few, "--rank", "1", "--world-size", "2", "--quiet")[1] == ""
    told = json.loads(run(capsys, "merge", folder, "--json")[1])
    assert (told["folder"], told["counts"]["documents"]) == (folder, 2)
    assert json.loads(run(capsys, "show", folder, "--json")[1]) == told
    table = pandas.read_csv(io.StringIO(run(capsys, "show", folder, "--csv")[1]))
    assert len(table) == len(cm.load_triggers(folder).to_dataframe())
    one = ("show", folder, "--layer", "1", "--neuron", "3")
    shown = json.loads(run(capsys, *one, "--json")[1])["rows"]
    assert len(shown) == (table.neuron == 3).sum()
    path = tmp_path / "one.csv"
    assert run(capsys, *one, "--quiet", "-o", str(path)) == (0, "", "")
    assert len(pandas.read_csv(path)) == len(shown)
    assert "ends in .csv" in run(capsys, "show", folder, "-o", "page.html")[2]


def test_a_shell_completes_commands_options_and_models(tmp_path):
    """With the line that the help shows, in a real bash."""
    program = tmp_path / "tl-contextmix"
    root = Path(cm.__file__).parents[1]
    program.write_text(
        f'#!/bin/sh\nPYTHONPATH="{root}" exec "{sys.executable}" -m tl_contextmix "$@"\n'
    )
    program.chmod(0o755)
    script = """
eval "$(_TL_CONTEXTMIX_COMPLETE=bash_source tl-contextmix)"
complete -p tl-contextmix
completed() {
  COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
  _tl_contextmix_completion tl-contextmix 2> /dev/null  # compopt is of real completions only
  echo "${COMPREPLY[@]}"
}
completed tl-contextmix value
completed tl-contextmix check mask
completed tl-contextmix check --dt
"""
    done = subprocess.run(
        ["bash", "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )
    assert done.stderr == ""
    bound, *found = done.stdout.splitlines()
    assert "_tl_contextmix_completion" in bound
    assert [line.split()[:1] for line in found] == [["value-zeroing"], ["masked-lm"], ["--dtype"]]
    for shell, kind in (("zsh", ZshComplete), ("fish", FishComplete)):
        made = kind(commands, {}, "tl-contextmix", "_TL_CONTEXTMIX_COMPLETE")
        assert f"_TL_CONTEXTMIX_COMPLETE={shell}_complete" in made.source()


def test_a_reader_that_has_had_enough_is_no_error():
    reads, writes = os.pipe()
    os.close(reads)
    root = Path(cm.__file__).parents[1]
    command = [sys.executable, "-m", "tl_contextmix", "--help"]
    with open(writes, "w") as closed:
        done = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, text=True, cwd=root)
    assert (done.returncode, done.stderr) == (1, "")


def test_a_warning_is_said_once_and_not_at_all_if_quiet(capsys, monkeypatch):
    def warned(*given: Any, **options: Any) -> Any:
        for _ in range(3):
            cm.errors.warn("something is odd")
        return cm.load_demo("causal-lm")

    monkeypatch.setattr(on_methods, "load_model", warned)
    asked = ("attention", "causal-lm", TEXT)
    assert run(capsys, *asked)[2] == "tl-contextmix: warning: something is odd\n"
    assert run(capsys, *asked, "--quiet")[1:] == ("", "")


def test_readme_and_docs_call_commands_that_there_are():
    root = Path(__file__).parents[1]
    pages = [root / "README.md", *(root / "docs" / "pages").rglob("*.md")]
    for page in pages:
        for name in re.findall(r"`tl-contextmix ([a-z][\w-]*)", page.read_text(encoding="utf-8")):
            assert name in (*COMMANDS, *METHODS), f"{page}: {name}"
