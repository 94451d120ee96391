"""The command line: what it offers, what it takes, what it prints and where it leaves."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas
import pytest
from click.shell_completion import BashComplete

import tl_contextmix as cm
from tl_contextmix.__main__ import main
from tl_contextmix.commands import commands, on_methods
from tl_contextmix.commands.names import COMMANDS, METHODS
from tl_contextmix.engine.registry import methods
from tl_contextmix.results import Result

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
    root = str(Path(cm.__file__).parents[1])
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from tl_contextmix.__main__ import main; "
        "main(['--help']); print('torch' in sys.modules, 'transformer_lens' in sys.modules)"
    )
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, root], capture_output=True, text=True, check=True
    )
    # A bound that holds on a busy machine too; alone it takes 0.15 seconds.
    assert time.perf_counter() - started < 10
    assert done.stdout.splitlines()[-1] == "False False"
    assert "130  interrupted" in done.stdout
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


def test_neurons_are_numbered_by_layer(capsys):
    asked = ("query-contributions", "causal-lm", TEXT, "--neurons", "2.78,3.5", "--csv")
    code, out, _ = run(capsys, *asked)
    expected = cm.query_contributions(cm.load_demo("causal-lm"), TEXT, neurons=[(2, 78), (3, 5)])
    assert code == 0
    assert len(out.splitlines()) == len(expected.to_dataframe()) + 1
    assert "is not of the form N.N" in run(capsys, *asked[:4], "2.x")[2]


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
    ],
)
def test_errors_are_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert message in err


def test_what_is_not_understood_is_said(capsys):
    mistakes: list[tuple[tuple[str, ...], str]] = [
        (("value-zeroing", "causal-lm"), "Missing argument 'TEXT'"),
        (("value-zeroing", "causal-lm", TEXT, "--metric", "x"), "is not one of 'cosine'"),
        (("value-zeroing", "causal-lm", TEXT, "--layer", "x"), "not a valid integer"),
        (("unknown",), "No such command 'unknown'"),
        (("query-contributions", "causal-lm", TEXT), "expected neurons=, or edge="),
        (("query-contributions", "causal-lm", TEXT, "--edge", "3,0"), "not of the form L.H.T.S"),
    ]
    for given, message in mistakes:
        code, _, err = run(capsys, *given)
        assert code == 2
        assert message in err


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
