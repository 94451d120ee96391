"""The modules made for TransformerLens: its own checks pass, and the numbers are this package's."""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import itertools
import json
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformer_lens
import zoo
import zoo_build
import zoo_others
from asked import bound, keywords, relative, stacks
from jaxtyping import install_import_hook
from zoo_refused import REFUSED

import tl_contextmix as cm

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "docs" / "upstream" / "assemble.py"
HOME = "transformer_lens.tools.analysis"
TOOLS = ("value_zeroing", "decoder_lens", "log_prob_contributions")
NAMES = ("_block_reading", *TOOLS)

pytestmark = [
    pytest.mark.newest,  # which has the tools they are made for
    pytest.mark.skipif(not SCRIPT.exists(), reason="a source distribution has no docs"),
]
# LayerNorm, sandwich norms in a gated block, a parallel block, an encoder.
ONE_STACK = [c for c in zoo.cases() if c.family in ("gpt2", "gemma2", "gptj", "bert")]
TWO_STACKS = [c for c in zoo.cases() if c.family in ("t5", "bart")]
# Norms of outputs alone, besides.
DECODERS = [c for c in zoo.cases() if c.family in ("gpt2", "gemma2", "gptj", "olmo2")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The modules, made by the command that CONTRIBUTING.md shows."""
    found = tmp_path_factory.mktemp("upstream")
    run(sys.executable, SCRIPT, found)
    return found


@contextlib.contextmanager
def imported(folder: Path, *, checked: bool) -> Iterator[SimpleNamespace]:
    """The tools as parts of TransformerLens, every annotation checked at each call if asked."""
    modules = [f"{HOME}.{name}" for name in NAMES]
    others = {name: sys.modules.pop(name) for name in modules if name in sys.modules}
    path = importlib.import_module(HOME).__path__
    path.append(str(folder))
    try:
        with install_import_hook(modules if checked else [], "beartype.beartype"):
            found = {name: importlib.import_module(f"{HOME}.{name}") for name in TOOLS}
        yield SimpleNamespace(**found)
    finally:
        path.remove(str(folder))
        for name in modules:
            del sys.modules[name]
        sys.modules.update(others)


@pytest.fixture(scope="module")
def made(folder: Path) -> Iterator[SimpleNamespace]:
    """The tools, annotations checked."""
    with imported(folder, checked=True) as found:
        yield found


@pytest.fixture(scope="module")
def plain(folder: Path) -> Iterator[SimpleNamespace]:
    """The tools as users have them: no annotation is checked before their own words."""
    with imported(folder, checked=False) as found:
        yield found


def run(*command: Any, **options: Any) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=580,
        **options,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_formatted_as_transformer_lens_is(folder: Path) -> None:
    run(sys.executable, "-m", "black", "--check", "--line-length", "100", folder)
    options = ["--profile", "black", "--line-length", "100", "-p", "transformer_lens"]
    run(sys.executable, "-m", "isort", "--check-only", *options, folder)


def test_small_beside_what_they_share(folder: Path) -> None:
    assert len((folder / "log_prob_contributions.py").read_text().splitlines()) <= 700
    trees = {name: ast.parse((folder / f"{name}.py").read_text()) for name in NAMES}
    defined = {name: {getattr(n, "name", "") for n in trees[name].body} - {""} for name in NAMES}
    for one, other in itertools.combinations(NAMES, 2):
        assert not defined[one] & defined[other], (one, other)


@pytest.mark.slow
def test_typed_as_transformer_lens_is(folder: Path, tmp_path: Path) -> None:
    """Its own settings of mypy, inside the installed package, and nothing ignored.

    What TransformerLens itself imports from elsewhere is not read: that takes three times as long.
    """
    copy = tmp_path / "transformer_lens"
    shutil.copytree(Path(transformer_lens.__file__).parent, copy)
    for name in NAMES:
        path = shutil.copy(folder / f"{name}.py", copy / "tools" / "analysis")
        assert not re.search(r"#\s*(type: ?ignore|pyright|noqa)", Path(path).read_text())
    config = tmp_path / "mypy.ini"
    settings = ["[mypy]", "check_untyped_defs = True", "ignore_missing_imports = True"]
    settings += ["follow_imports = silent", f"mypy_path = {tmp_path}"]
    beside = "transformers datasets wandb huggingface_hub pandas numpy rich sympy networkx".split()
    settings += [f"[mypy-{','.join(f'{name}.*' for name in beside)}]", "follow_imports = skip"]
    config.write_text("\n".join(settings))
    options = ["--config-file", config, "--cache-dir", tmp_path / "cache"]
    options += [part for name in NAMES for part in ("-m", f"{HOME}.{name}")]
    assert "Success" in run(sys.executable, "-m", "mypy", *options)


@pytest.mark.parametrize("name", NAMES)
def test_self_contained(name: str, folder: Path) -> None:
    text = (folder / f"{name}.py").read_text()
    assert "tl_contextmix" not in text
    # What TransformerLens itself requires.
    known = {"torch", "einops", "jaxtyping", "tqdm", "pandas", "numpy", "transformers"}
    known |= {"transformer_lens"}
    for node in ast.walk(ast.parse(text)):
        modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        modules += [a.name for a in node.names] if isinstance(node, ast.Import) else []
        for module in modules:
            top = module.partition(".")[0]
            assert top in known | set(sys.stdlib_module_names), module


@pytest.mark.parametrize("name", TOOLS)
def test_docstrings_say_arguments_errors_and_shapes(name: str, folder: Path, made: Any) -> None:
    isolated = ["--isolated", "--select", "D", "--config", 'lint.pydocstyle.convention="google"']
    files = [folder / f"{each}.py" for each in ("_block_reading", name)]
    run(sys.executable, "-m", "ruff", "check", *isolated, *files)
    function = getattr(getattr(made, name), name)
    text = inspect.getdoc(function) or ""
    arguments, _, rest = text.partition("\nReturns:")
    assert "Raises:" in rest
    for parameter in inspect.signature(function).parameters:
        described = re.search(rf"^    {parameter}: (.*?)(?=^    \w+: |\Z)", arguments, re.M | re.S)
        assert described, parameter
        if parameter in ("input", "targets", "target_mask", "attention_mask", "decoder_input"):
            assert re.search(r"``\[batch, \w+\]``", described[1]), parameter
    result = next(v for k, v in vars(getattr(made, name)).items() if k.endswith("Result"))
    for field in ("scores", "ids", "log_probs"):
        if field in result.__annotations__:
            assert re.search(rf"{field}: .*?``\[", inspect.getdoc(result) or "", re.S), field


@pytest.mark.parametrize("name", TOOLS)
def test_the_shape_of_a_tool(name: str, made: Any) -> None:
    function = getattr(getattr(made, name), name)
    kinds = [p.kind for p in inspect.signature(function).parameters.values()]
    assert kinds[:2] == [inspect.Parameter.POSITIONAL_OR_KEYWORD] * 2
    assert set(kinds[2:]) == {inspect.Parameter.KEYWORD_ONLY}


@pytest.mark.parametrize("case", ONE_STACK + TWO_STACKS, ids=str)
def test_value_zeroing_gives_the_numbers_of_this_package(case: zoo.Case, made: Any) -> None:
    model, given = zoo.shared(case), zoo.inputs(case)
    for stack in stacks(case):
        ask = {"stack": stack, **keywords(given)}
        ours = cm.value_zeroing(model, given.tokens, **ask).scores
        found = made.value_zeroing.value_zeroing(model, given.tokens, **ask)
        assert relative(found.scores, ours[:, :, 0].transpose(0, 1)) <= bound(case)
        assert found.labels == [f"L{layer}" for layer in range(ours.shape[1])]
        assert found.identity_error <= 1e-6
        ours = cm.value_zeroing(
            model, given.tokens, heads=True, metric="euclidean", layer=-1, final_norm=False, **ask
        ).scores
        found = made.value_zeroing.value_zeroing(
            model,
            given.tokens,
            per_head=True,
            metric="euclidean",
            layers=[-1],
            final_norm=False,
            max_bytes=1,
            **ask,
        )
        assert relative(found.scores, ours[:, 0].transpose(0, 1)) <= bound(case)


def test_value_zeroing_of_a_cache_and_of_padding(made: Any) -> None:
    case = ONE_STACK[0]
    model, given = zoo.shared(case), zoo.inputs(case)
    ask = made.value_zeroing.value_zeroing
    _, cache = model.run_with_cache(given.tokens)
    assert torch.equal(ask(model, cache=cache).scores, ask(model, given.tokens).scores)
    mask = torch.ones_like(given.tokens)
    mask[1, 4:] = 0
    ours = cm.value_zeroing(model, given.tokens, attention_mask=mask).scores[:, :, 0]
    found = ask(model, given.tokens, attention_mask=mask).scores
    assert relative(found, ours.transpose(0, 1)) <= bound(case)
    assert not found[:, 1, 4:].any()
    assert not found[:, 1, :, 4:].any()


def test_value_zeroing_ranks_and_tabulates(made: Any) -> None:
    model = zoo.shared(ONE_STACK[0])
    found = made.value_zeroing.value_zeroing(model, "a b c d")
    frame = found.to_dataframe()
    assert len(frame) == found.scores.numel()
    others = frame[frame.source != frame.target].sort_values("score", ascending=False)
    names = ["component", "batch", "target", "source", "score"]
    top = [tuple(row) for row in others.head(4)[names].itertuples(index=False)]
    assert found.top(4) == top
    rows = found.normalized().sum(-1)
    assert torch.allclose(rows[:, :, 1:], torch.ones_like(rows[:, :, 1:]))


@pytest.mark.parametrize("case", TWO_STACKS, ids=str)
def test_decoder_lens_gives_the_numbers_of_this_package(case: zoo.Case, made: Any) -> None:
    model, given = zoo.shared(case), zoo.inputs(case)
    mask = torch.ones_like(given.tokens)
    mask[1, 5:] = 0
    for beams in (1, 2):
        ask = {"num_beams": beams, "max_new_tokens": 5, "attention_mask": mask}
        found = made.decoder_lens.decoder_lens(model, given.tokens, **ask)
        said = cm.decoder_lens(model, given.tokens, **ask)
        assert torch.equal(found.ids.transpose(0, 1), said.ids)
        assert torch.equal(found.mask.transpose(0, 1), said.mask)
        assert torch.equal(found.finished.transpose(0, 1), said.finished)
        judged = cm.decoder_lens(model, given.tokens, mode="teacher_forced", **ask)
        # Hugging Face's T5 norms compute in float32 inside a float64 model.
        for name in ("log_probs", "kl"):
            ours = getattr(judged, name)
            assert relative(getattr(found, name).transpose(0, 1), ours) <= 1e-6, name
        assert torch.equal(found.ranks.transpose(0, 1), judged.ranks)
        assert torch.equal(found.target_ids, judged.target.ids)


def test_decoder_lens_of_some_layers_and_given_answers(made: Any) -> None:
    case = TWO_STACKS[0]
    model, given = zoo.shared(case), zoo.inputs(case)
    ask = made.decoder_lens.decoder_lens
    whole = ask(model, given.tokens, max_new_tokens=4)
    some = ask(model, given.tokens, max_new_tokens=4, layers=[1, 0], max_bytes=1)
    assert some.labels == whole.labels[:2]
    assert torch.equal(some.target_ids, whole.target_ids)
    assert relative(some.log_probs, whole.log_probs[:2]) <= 1e-10
    answer = given.decoder_tokens[:, 1:]
    real = torch.ones_like(answer)
    real[1, -1] = 0
    judged = ask(model, given.tokens, targets=answer, target_mask=real, max_new_tokens=1)
    with torch.no_grad():
        logits = model(given.tokens, decoder_input=given.decoder_tokens[:, :-1])
    own = logits.log_softmax(-1).gather(-1, answer[..., None])[..., 0] * real
    assert relative(judged.log_probs[-1], own) <= 1e-6
    assert not judged.kl[-1].any()
    frame = judged.to_dataframe()
    assert frame[frame.batch == 1].log_prob.max() == pytest.approx(judged.top(1, batch=1)[0][1])
    raw = ask(model, given.tokens, max_new_tokens=4, final_norm=False)
    assert not torch.equal(raw.log_probs, whole.log_probs)


def test_decoder_lens_reads_texts_back(made: Any) -> None:
    case = TWO_STACKS[0]
    model, given = zoo.shared(case), zoo.inputs(case)
    found = made.decoder_lens.decoder_lens(model, given.tokens, max_new_tokens=3)
    texts = found.to_dataframe(model.tokenizer).text
    said = found.ids[0, 0][found.mask[0, 0]]
    assert texts[0] == model.tokenizer.decode(said.tolist(), skip_special_tokens=True)


@pytest.mark.parametrize("norm", ["frozen", "frozen+beta", "recompute"])
@pytest.mark.parametrize("case", DECODERS, ids=str)
def test_log_prob_contributions_give_the_numbers_of_this_package(
    case: zoo.Case, norm: Any, made: Any
) -> None:
    model, given = zoo.shared(case), zoo.inputs(case)
    mask = torch.ones_like(given.tokens)
    mask[1, 4:] = 0
    ask = {"norm": norm, "attention_mask": mask}
    count = model.cfg.n_layers * model.cfg.d_mlp
    splits: tuple[tuple[Any, dict[str, Any]], ...]
    splits = (("layer", {}), ("head", {}), ("position", {}), ("ff_neuron", {"top_k": 4}))
    for by, unit in splits:
        ours = cm.log_prob_contributions(model, given.tokens, target=[5, 8], by=by, **ask)
        found = made.log_prob_contributions.log_prob_contributions(
            model, given.tokens, target=[5, 8], by=by.removeprefix("ff_"), **unit, **ask
        )
        expected = ours.scores.T.nan_to_num(0)  # the package has no scores where nothing is read
        if unit:  # the best of each input, and those alone
            own = ours.components.is_bias()[0].logical_not()
            expected = expected[own].view(count, -1)
            best = expected.topk(4, dim=0).indices.unique()
            names = [f"L{n // model.cfg.d_mlp}N{n % model.cfg.d_mlp}" for n in best.tolist()]
            assert found.labels == names
            expected = expected[best]
        assert relative(found.scores, expected) <= bound(case)
        assert relative(found.log_probs, ours.trajectory.T) <= bound(case)
        assert found.positions.tolist() == [given.tokens.shape[1] - 1, 3]
        assert found.target_ids.tolist() == [5, 8]
        assert len(found.labels) == len(found.scores)
        assert found.identity_error <= 1e-6


def test_log_prob_contributions_contrast_with_incorrect_tokens(made: Any) -> None:
    model, given = zoo.build(DECODERS[0]), zoo.inputs(DECODERS[0])
    ask = made.log_prob_contributions.log_prob_contributions
    asked = {"target": [5, 8], "incorrect_tokens": [9, 7]}
    for by in ("layer", "head", "neuron"):
        of = {"top_k": 10**6} if by == "neuron" else {}
        found = ask(model, given.tokens, by=by, **asked, **of)
        ours = cm.log_prob_contributions(
            model,
            given.tokens,
            target=[5, 8],
            foil=[9, 7],
            by="ff_neuron" if by == "neuron" else by,  # type: ignore[arg-type]
        )
        own = ours.components.is_bias()[0].logical_not() if of else slice(None)
        assert relative(found.scores, ours.scores.T[own]) <= 1e-10
        assert relative(found.log_probs, ours.trajectory.T) <= 1e-10
    assert found.incorrect_ids.tolist() == [9, 7]
    with pytest.raises(ValueError, match="incorrect_tokens need a target"):
        ask(model, given.tokens, incorrect_tokens=7)


def test_log_prob_contributions_know_factors_on_logits(made: Any) -> None:
    model, ids = zoo_others.build("cohere"), torch.arange(3, 9)[None]
    ours = cm.log_prob_contributions(model, ids)
    found = made.log_prob_contributions.log_prob_contributions(model, ids)
    assert relative(found.scores, ours.scores.T) <= 1e-9
    assert found.target_ids.tolist() == ours.target.ids[:, 0].tolist()


def test_log_prob_contributions_lead_to_the_log_probability_of_the_model(made: Any) -> None:
    model, given = zoo.build(DECODERS[0]), zoo.inputs(DECODERS[0])
    ask = made.log_prob_contributions.log_prob_contributions
    found = ask(model, given.tokens, max_bytes=1)
    with torch.no_grad():
        best = model(given.tokens)[:, -1].log_softmax(-1).max(-1)
    assert torch.equal(found.target_ids, best.indices)
    assert relative(found.log_probs[-1], best.values) <= bound(DECODERS[0])
    assert relative(found.log_probs[0] + found.scores.sum(0), best.values) <= bound(DECODERS[0])
    _, cache = model.run_with_cache(given.tokens)
    again = ask(model, cache=cache)
    assert relative(again.scores, found.scores) <= bound(DECODERS[0])
    texts = ask(model, ["a b c", "c b a"], target="b")
    assert texts.target_ids.tolist() == 2 * [model.to_single_token("b")]
    frame = found.to_dataframe()
    first = frame[frame.batch == 1].sort_values("score", ascending=False).head(2)
    assert found.top(2, batch=1) == [*zip(first.component, first.score, strict=True)]


def test_log_prob_contributions_search_for_neurons_finds_the_best_of_all(
    monkeypatch: pytest.MonkeyPatch, made: Any
) -> None:
    model, given = zoo.build(DECODERS[0]), zoo.inputs(DECODERS[0])
    module = made.log_prob_contributions
    every = module.log_prob_contributions(model, given.tokens, by="neuron", top_k=10**6)
    assert len(every.labels) == model.cfg.n_layers * model.cfg.d_mlp
    scored = []
    gains = module.Vocabulary.gains
    monkeypatch.setattr(
        module.Vocabulary, "gains", lambda *a: (scored.append(a[2].shape[1]), gains(*a))[1]
    )
    monkeypatch.setattr(module, "_BLOCK", 2)
    some = module.log_prob_contributions(model, given.tokens, by="neuron", top_k=2)
    assert sum(scored) < len(every.labels) / 2
    for row in range(len(given.tokens)):
        assert [name for name, _ in some.top(2, batch=row)] == [
            name for name, _ in every.top(2, batch=row)
        ]


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("value_zeroing", {"metric": "manhattan"}, "metric"),
    ("value_zeroing", {"stack": "both"}, "stack"),
    ("value_zeroing", {"stack": "encoder"}, "one stack"),
    ("value_zeroing", {"layers": [7]}, r"\[7\]"),
    ("value_zeroing", {"layers": []}, "at least one"),
    ("value_zeroing", {"input": None}, "input"),
    ("value_zeroing", {"input": ["a b", "a"]}, "differ in length"),
    ("value_zeroing", {"max_bytes": 0}, "max_bytes"),
    ("log_prob_contributions", {"by": "token"}, "by must be one of"),
    ("log_prob_contributions", {"norm": "thawed"}, "norm must be one of"),
    ("log_prob_contributions", {"pos": 40}, "pos must be"),
    ("log_prob_contributions", {"pos": True}, "pos must be"),
    ("log_prob_contributions", {"top_k": 0}, "top_k"),
    ("log_prob_contributions", {"max_bytes": 0}, "max_bytes"),
    ("log_prob_contributions", {"input": None}, "input"),
    ("log_prob_contributions", {"target": 10**6}, "out of range"),
    ("log_prob_contributions", {"target": [1, 2, 3]}, "one for each input"),
    ("log_prob_contributions", {"attention_mask": torch.ones(2, 2)}, "attention_mask"),
    ("decoder_lens", {"layers": [9]}, "layers"),
    ("decoder_lens", {"num_beams": 0}, "num_beams"),
    ("decoder_lens", {"input": torch.zeros(2, 3)}, "token ids"),
    ("decoder_lens", {"target_mask": torch.ones(2, 2)}, "needs targets"),
    ("decoder_lens", {"attention_mask": torch.ones(2, 2)}, "attention_mask"),
]


@pytest.mark.parametrize(("name", "options", "match"), WRONG)
def test_wrong_arguments_are_refused(
    name: str, options: dict[str, Any], match: str, plain: Any
) -> None:
    case = TWO_STACKS[0] if name == "decoder_lens" else ONE_STACK[0]
    model, given = zoo.shared(case), zoo.inputs(case)
    ask = {"input": given.tokens, **options}
    with pytest.raises(ValueError, match=match):
        getattr(getattr(plain, name), name)(model, **ask)


def test_training_mode_is_refused(made: Any) -> None:
    for name in TOOLS:
        case = TWO_STACKS[0] if name == "decoder_lens" else ONE_STACK[0]
        model, given = zoo.build(case).train(), zoo.inputs(case)
        with pytest.raises(ValueError, match="evaluation mode"):
            getattr(getattr(made, name), name)(model, given.tokens)


_REFUSAL = "support|found|reproduced|read|decoder-only|not the model's"


# Models of images and sound take no tokens: their hosts raise.
_ELSEWHERE = ("vit", "wav2vec2", "hubert")


@pytest.mark.parametrize("case", [c for c in REFUSED if c.family not in _ELSEWHERE], ids=str)
def test_models_are_refused_by_name(case: Any, made: Any) -> None:
    model, tokens = case.build(), torch.arange(3, 9)[None]
    pair = "decoder_blocks" in model._modules
    ask = {"decoder_input": tokens, "stack": "encoder"} if pair else {}
    refused = pytest.raises((NotImplementedError, ValueError), match=_REFUSAL)
    with refused:
        made.value_zeroing.value_zeroing(model, tokens, **ask)
    with refused:
        made.log_prob_contributions.log_prob_contributions(model, tokens)


@pytest.mark.parametrize("family", ["t5", "bert"])
def test_log_prob_contributions_refuse_other_readouts(family: str, made: Any) -> None:
    case = next(case for case in ONE_STACK + TWO_STACKS if case.family == family)
    ask, tokens = made.log_prob_contributions.log_prob_contributions, zoo.inputs(case).tokens
    with pytest.raises((NotImplementedError, ValueError), match="decoder-only|mlm_head"):
        ask(zoo.shared(case), tokens)


def test_log_prob_contributions_refuse_an_edited_stream(made: Any) -> None:
    model, tokens = zoo.build(DECODERS[0]), zoo.inputs(DECODERS[0]).tokens
    ask = made.log_prob_contributions.log_prob_contributions
    for name in ("blocks.1.hook_in", "ln_final.hook_out"):
        point = model.hook_dict[name]
        point.add_hook(lambda value, hook: 2 * value)
        with pytest.raises(NotImplementedError, match="not the model's"):
            ask(model, tokens)
        point.remove_hooks()


def test_decoder_lens_refuses_a_single_stack(made: Any) -> None:
    case = ONE_STACK[0]
    with pytest.raises(NotImplementedError, match="logit_lens"):
        made.decoder_lens.decoder_lens(zoo.shared(case), zoo.inputs(case).tokens)


# The table that registered adapters are not in


def _hunks(path: str, text: str) -> list[tuple[int, str, str]]:
    """Returns where each hunk of a patch begins in a file, and its lines before and after."""
    found = []
    changed = text.split(f"+++ b/{path}\n")[1].split("\ndiff ")[0]
    for hunk in re.split(r"^@@ -", changed, flags=re.MULTILINE)[1:]:
        head, *lines = hunk.splitlines()
        old, new = (
            "".join(f"{line[1:]}\n" for line in lines if line[:1] in (" ", sign, ""))
            for sign in ("-", "+")
        )
        found.append((int(re.split(r"\D", head)[0]), old, new))
    return found


def _patched(path: str, text: str) -> tuple[str, str]:
    """Returns the lines of a file before and after the one hunk of a patch that touches it."""
    ((_, old, new),) = _hunks(path, text)
    return old, new


def _applied(source: str, path: str, text: str) -> str:
    """Returns a file with a patch applied, each hunk at the line that it names."""
    lines = source.splitlines(keepends=True)
    for start, old, new in reversed(_hunks(path, text)):
        stop = start - 1 + len(old.splitlines())
        assert "".join(lines[start - 1 : stop]) == old, (path, start)
        lines[start - 1 : stop] = [new]
    return "".join(lines)


def test_registered_adapters_are_found_with_the_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformer_lens.model_bridge.sources import _hf_format

    text = (ROOT / "docs" / "upstream" / "registered_adapters.patch").read_text(encoding="utf-8")
    _, own_test = _patched("tests/unit/model_bridge/test_registered_adapters.py", text)
    names: dict[str, Any] = {}
    exec(compile(own_test, "test_registered_adapters.py", "exec"), names)
    with monkeypatch.context() as own, pytest.raises(ValueError, match="SomeNewForMaskedLM"):
        names["test_registered_adapter_is_found"](own)  # as it is
    old, new = _patched("transformer_lens/model_bridge/sources/_hf_format.py", text)
    source = Path(_hf_format.__file__).read_text(encoding="utf-8")
    assert source.count(old) == 1
    patched = dict(vars(_hf_format))
    exec(compile(source.replace(old, new), "_hf_format.py", "exec"), patched)
    found = "determine_architecture_from_hf_config"
    monkeypatch.setitem(names, found, patched[found])
    names["test_registered_adapter_is_found"](monkeypatch)


def test_switch_shows_patterns_with_the_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformer_lens.factories import architecture_adapter_factory as factory
    from transformer_lens.model_bridge.supported_architectures import switch_transformers

    path = "transformer_lens/model_bridge/supported_architectures/switch_transformers.py"
    patch = (ROOT / "docs" / "upstream" / "switch_patterns.patch").read_text(encoding="utf-8")
    old, new = _patched(path, patch)
    source = Path(switch_transformers.__file__).read_text(encoding="utf-8")
    assert source.count(old) == 1
    names: dict[str, Any] = {"__name__": switch_transformers.__name__}
    exec(compile(source.replace(old, new), path, "exec"), names)
    hf = zoo_others.direct("SwitchTransformers")
    kind, adapter = type(hf).__name__, names["SwitchTransformersArchitectureAdapter"]
    for table in (factory.SUPPORTED_ARCHITECTURES, factory.ArchitectureAdapterFactory._adapters):
        monkeypatch.setitem(table, kind, adapter)
    with zoo_build.quiet():
        bridge = zoo_build.bridge(hf, "bart", dtype=torch.float64, processed=False)
    assert cm.check(bridge).ok


# CircuitsVis: what of the patches is Python, on the installed package


CIRCUITSVIS = ("escaping", "offline", "palette", "labels")


@pytest.fixture
def circuitsvis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The installed CircuitsVis with all patches applied, in any order, to a copy of it."""
    package = Path(importlib.import_module("circuitsvis").__file__ or "").parent
    shutil.copytree(package, tmp_path / "python" / "circuitsvis")
    for name in reversed(CIRCUITSVIS):
        text = (ROOT / "docs" / "upstream" / f"circuitsvis_{name}.patch").read_text("utf-8")
        for path in re.findall(r"^\+\+\+ b/(python/.*)$", text, re.MULTILINE):
            file = tmp_path / path
            file.write_text(_applied(file.read_text("utf-8"), path, text), "utf-8")
    for name in [name for name in sys.modules if name.split(".")[0] == "circuitsvis"]:
        monkeypatch.delitem(sys.modules, name)
    with monkeypatch.context() as patch:
        patch.syspath_prepend(tmp_path / "python")
        found = importlib.import_module("circuitsvis.attention")
        assert str(tmp_path) in str(found.__file__)
        yield found
    for name in [name for name in sys.modules if name.split(".")[0] == "circuitsvis"]:
        monkeypatch.delitem(sys.modules, name)


def test_circuitsvis_with_the_patches(circuitsvis: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = ["</script><script>alert(1)</script>", "<s>"]
    words = {"source_label": "zeroed", "destination_label": "changed", "title": "Layers"}
    made = circuitsvis.attention_heads([[[1, 0], [0, 1]]], tokens, **words)

    def no_network(*_: Any, **__: Any) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket, "socket", no_network)
    shown = made._repr_html_()
    assert "unpkg.com" not in shown
    assert "var CircuitsVis=" in shown
    # One element that is closed, and one script that no token ends.
    for text in (shown, str(made)):
        assert text.count("<div") == text.count("></div>") == 1
        assert re.findall(r"</script>", text) == ["</script>"]
        props = json.loads(re.findall(r"\{\"attention\".*\}", text)[-1])
        assert props["tokens"] == tokens
        assert [props[name] for name in ("sourceLabel", "destinationLabel", "title")] == [
            "zeroed",
            "changed",
            "Layers",
        ]
    assert "Label" not in str(circuitsvis.attention_pattern(["a"], [[1]]))


def test_circuitsvis_as_it_is_needs_the_patches() -> None:
    attention = importlib.import_module("circuitsvis.attention")
    made = str(attention.attention_pattern(["</script>"], [[1]]))
    assert made.count("</script>") == 2
    assert '<div id="' in made
    assert "</div>" not in made
    render = importlib.import_module("circuitsvis.utils.render")
    assert "google.com" in inspect.getsource(render.internet_on)


@pytest.mark.parametrize("name", CIRCUITSVIS)
def test_patches_of_circuitsvis_can_be_proposed(name: str) -> None:
    """Each says what it changes and why, and brings a test."""
    text = (ROOT / "docs" / "upstream" / f"circuitsvis_{name}.patch").read_text("utf-8")
    told, _, changed = text.partition("\ndiff --git ")
    assert len(told.splitlines()[0]) <= 72
    assert told.splitlines()[1] == ""
    assert len(told) > 300
    files = re.findall(r"^\+\+\+ b/(.*)$", changed, re.MULTILINE)
    assert any("test" in Path(path).name.lower() for path in files)
    # Lines of hunks are as many as their heads say.
    for hunk in re.split(r"^@@ ", changed, flags=re.MULTILINE)[1:]:
        head, *lines = hunk.split("\ndiff ")[0].splitlines()
        counts = [int(n or 1) for n in re.findall(r"[-+]\d+(?:,(\d+))?", head.split("@@")[0])]
        counted = [sum(line[:1] in (" ", sign) for line in lines) for sign in "-+"]
        assert counts == counted, head
