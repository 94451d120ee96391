"""The package as a whole: who imports whom, what an import costs, what lies in the tree."""

from __future__ import annotations

import ast
import importlib
import re
import statistics
import subprocess
from collections import Counter
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import unchecked

pytestmark = pytest.mark.once

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "tl_contextmix"

# Import direction

# The rooms, lowest first: a folder or module may import itself and the rows above its own.
LAYERS = [
    {"errors"},
    {"core", "plotting", "demo_models"},
    {"results"},
    {"adapters"},
    {"engine"},
    {"methods"},
    {"evaluation"},
    {"reporting", "exploring", "commands", "__init__", "__main__"},
]


def _allowed() -> dict[str, set[str]]:
    table: dict[str, set[str]] = {}
    below: set[str] = set()
    for layer in LAYERS:
        table |= {name: set(below) for name in layer}
        below |= layer
    return table


ALLOWED = _allowed()
MODULES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


def _dotted(module: str) -> list[str]:
    """`hosts/reading.py` as ["hosts", "reading"], `hosts/__init__.py` as ["hosts"]."""
    parts = module.removesuffix(".py").split("/")
    return parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts


def _parse(module: str) -> ast.Module:
    return ast.parse((PACKAGE / module).read_text())


def _imports(tree: ast.AST) -> Iterator[list[str]]:
    """Every module of the package that a tree imports, for types and inside functions too.

    `from tl_contextmix.a import b` counts as a.b: whether b is a module is the caller's affair.
    """
    for node in ast.walk(tree):
        for name in _imported_names(node):
            head, *rest = name.split(".")
            if head == "tl_contextmix":
                yield rest


def _imported_names(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"line {node.lineno}: imports are absolute in this package"
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


@pytest.mark.parametrize("module", MODULES)
def test_every_module_has_a_place(module: str):
    unit = _dotted(module)[0]
    assert unit in ALLOWED, f"{module}: give {unit} a row in LAYERS"


def _wrong_imports(own: str, tree: ast.AST) -> list[str]:
    """The imports that unit `own` may not have.

    The face of the package (`import tl_contextmix`, or a name of it that is no unit) is one of
    them: it imports everything.
    """
    wrong = []
    for target in _imports(tree):
        unit = target[0] if target else "__init__"
        if own not in LAYERS[-1] and unit != own and unit not in ALLOWED.get(own, ()):
            wrong.append(".".join(target) or "tl_contextmix")
    return wrong


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module: str):
    assert _wrong_imports(_dotted(module)[0], _parse(module)) == []


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("methods/")])
def test_methods_never_import_each_other(module: str):
    """Those of one folder share what is theirs."""
    own = _dotted(module)
    for target in _imports(_parse(module)):
        assert target[0] != "methods" or target[1] == own[1], f"{module} imports {target}"


def test_the_command_line_leaves_the_work_to_its_commands():
    targets = {target[0] for target in _imports(_parse("__main__.py"))}
    assert targets == {"commands", "errors"}
    assert len((PACKAGE / "__main__.py").read_text().splitlines()) <= 80
    for module in (name for name in MODULES if name.startswith("commands/")):
        functions = [n for n in _parse(module).body if isinstance(n, ast.FunctionDef)]
        # What adds options may be long; what a command does is one call and what is printed.
        for one in functions:
            adds = "add" in one.name or one.name == "asked"
            assert adds or (one.end_lineno or 0) - one.lineno <= 36, f"{module}: {one.name}"


def test_the_import_rules_can_fail():
    tree = ast.parse(
        "from tl_contextmix import core\n"
        "from tl_contextmix.adapters import as_view\n"
        "def show():\n    import tl_contextmix.reporting.story\n"
    )
    assert list(_imports(tree)) == [["core"], ["adapters", "as_view"], ["reporting", "story"]]
    assert _wrong_imports("plotting", tree) == ["core", "adapters.as_view", "reporting.story"]
    assert _wrong_imports("results", tree) == ["adapters.as_view", "reporting.story"]
    assert _wrong_imports("methods", tree) == ["reporting.story"]
    assert _wrong_imports("__main__", tree) == []
    face = ast.parse("import tl_contextmix as cm\nfrom tl_contextmix import attention_norms")
    assert _wrong_imports("methods", face) == ["tl_contextmix", "attention_norms"]
    up = ast.parse("from tl_contextmix import reporting, methods\nimport tl_contextmix.__main__")
    assert _wrong_imports("engine", up) == ["reporting", "methods", "__main__"]
    with pytest.raises(CycleError):
        _order({"a": {"b"}, "b": {"a"}})


def _order(imports: dict[str, set[str]]) -> list[str]:
    return list(TopologicalSorter(imports).static_order())


def test_no_imports_go_round_in_a_circle():
    modules = {".".join(_dotted(module)): module for module in MODULES}
    imports = {
        name: {
            ".".join(target[:size])
            for target in _imports(_parse(module))
            # The module that is named, or the folder's own face.
            for size in [len(target) if ".".join(target) in modules else len(target) - 1]
            if ".".join(target[:size]) in modules
        }
        for name, module in modules.items()
    }
    assert len(_order(imports)) == len(MODULES)


def test_the_house_is_small_enough_to_draw():
    assert len(LAYERS) <= 8
    assert len([module for module in MODULES if "/" not in module]) <= 5
    files = [_dotted(module)[-1] for module in MODULES if not module.endswith("/__init__.py")]
    folders = [_dotted(module)[-1] for module in MODULES if module.endswith("/__init__.py")]
    names = files + [name for name in folders if name != "__init__"]
    assert [name for name, times in Counter(names).items() if times > 1] == []


# Knowledge of the host

_HOOKS = (
    r"\bhook_(resid|attn|mlp|embed|pos|full|normalized|scale|pattern|result|rot|unembed|pre|post"
)
HOOK_NAMES = re.compile(_HOOKS + r"|in|out|q|k|v|z)(_\w+)?\b|\brun_with_(hooks|cache)\b")
CLASS_NAMES = re.compile(
    r"\b(Hooked(Root|Transformer|Encoder)\w*|TransformerBridge\w*|ActivationCache)\b"
)


def _words(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every name and every string of the code, with its line; docstrings and comments are not."""
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield line, node.value
        elif isinstance(node, ast.Name):
            yield line, node.id
        elif isinstance(node, ast.Attribute):
            yield line, node.attr
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from ((line, alias.name) for alias in node.names)


def _found(pattern: re.Pattern[str], tree: ast.AST) -> list[str]:
    return [f"line {line}: {m[0]}" for line, word in _words(tree) for m in pattern.finditer(word)]


@pytest.mark.parametrize("module", MODULES)
def test_only_adapters_know_hook_names(module: str):
    if _dotted(module)[0] != "adapters":
        assert _found(HOOK_NAMES, _parse(module)) == []


@pytest.mark.parametrize("module", MODULES)
def test_only_adapters_know_class_names(module: str):
    if _dotted(module)[0] != "adapters":
        assert _found(CLASS_NAMES, _parse(module)) == []


def test_the_name_rules_can_fail():
    tree = ast.parse(
        '"""About hook_resid_pre of HookedTransformer."""\n'
        "name = f'blocks.{i}.hook_resid_pre'\n"
        "model.run_with_hooks(my_hook_in, hook_value)\n"
        "from transformer_lens import HookedEncoder\n"
        "kinds = ['TransformerBridge', 'attn.hook_z']\n"
    )
    assert sorted(_found(HOOK_NAMES, tree)) == [
        "line 2: hook_resid_pre",
        "line 3: run_with_hooks",
        "line 5: hook_z",
    ]
    assert sorted(_found(CLASS_NAMES, tree)) == [
        "line 4: HookedEncoder",
        "line 5: TransformerBridge",
    ]


# The cost of an import

HEAVY = ("transformer_lens", "transformers", "pandas", "matplotlib", "circuitsvis")
# Seconds of processor time: the wall clock of a shared machine measures its neighbours.
_BUDGET = 0.3
_MEASURE = """
import sys, time
import torch
before = time.process_time()
import tl_contextmix
print(time.process_time() - before, *(name for name in {heavy} if name in sys.modules))
"""


def test_import_is_cheap_and_loads_no_host():
    runs = [unchecked.run("-c", _MEASURE.format(heavy=HEAVY)).split() for _ in range(3)]
    assert {name for run in runs for name in run[1:]} == set()
    assert statistics.median(float(run[0]) for run in runs) < _BUDGET


def test_sources_that_were_not_installed_have_a_version_too(monkeypatch):
    from tl_contextmix.results.labels import package_version

    assert re.match(r"\d+\.\d+", package_version())
    monkeypatch.setattr("importlib.metadata.Distribution.discover", lambda **_: iter(()))
    assert package_version.__wrapped__() == "0+source"  # it is looked up once


def test_public_names_are_listed_before_they_are_loaded():
    listed = "import tl_contextmix as cm; print({*cm.__all__} <= {*dir(cm)}, 'compare' in vars(cm))"
    assert unchecked.run("-c", listed).split() == ["True", "False"]


def test_few_names_are_public_and_old_ones_name_the_new():
    from public import FUNCTIONS

    import tl_contextmix as cm
    from tl_contextmix.core.validation import RENAMED

    assert len(cm.__all__) <= 45
    for old, new in RENAMED.items():
        name, _, option = old.partition(".")
        if option:
            function: Any = FUNCTIONS[name]
            with pytest.raises(cm.InvalidInput, match=f"It is now called {new}"):
                function(**{option: 1})
            continue
        with pytest.raises(AttributeError, match=re.escape(f"is now called {new}")):
            getattr(cm, old)
        if new.startswith("tl_contextmix."):
            module, _, name = new.rpartition(".")
            assert hasattr(importlib.import_module(module), name)


# Annotations


@pytest.mark.typed
def test_annotations_are_enforced_while_testing():
    from tl_contextmix.errors import four_parts

    with pytest.raises(jaxtyping.TypeCheckError, match="'failed'"):
        four_parts(1, 2, "expected", "remedy")  # type: ignore[arg-type]


def test_annotations_are_published():
    assert (PACKAGE / "py.typed").is_file()


# The tree

TOP_LEVEL = {
    ".ci",
    ".github",
    ".gitignore",
    "CHANGELOG.md",
    "CITATION.cff",
    "CONTRIBUTING.md",
    "LICENSE",
    "README.md",
    "benchmarks",
    "reproductions",
    "demos",
    "docs",
    "pyproject.toml",
    "scripts",
    "tests",
    "tl_contextmix",
}
# Folders of one machine, and addresses of one package index: neither means anything elsewhere.
_FOREIGN = re.compile(
    r"(?<![\w.~/-])/(work|farm|root|home|opt|Users|mnt)/\w"
    r"|--(extra-)?index-url|--find[-]links|\bfile:///|\bpypi\.(org|python)|download\.pytorch\.org"
)


def _files() -> list[Path]:
    """What is, or is about to be, under version control."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip("not a git checkout: nothing says which files belong to the project")
    return [ROOT / line for line in done.stdout.splitlines() if (ROOT / line).is_file()]


def test_top_level_holds_only_what_belongs_there():
    assert {path.relative_to(ROOT).parts[0] for path in _files()} <= TOP_LEVEL


def test_no_file_names_a_machine_or_an_index():
    found = []
    for path in _files():
        text = path.read_bytes().decode(errors="replace")
        found += [f"{path.relative_to(ROOT)}: {match[0]}" for match in _FOREIGN.finditer(text)]
    assert found == []


def test_constraints_pin_everything_and_name_no_place():
    files = sorted((ROOT / "tests").glob("constraints-tl*.txt"))
    assert [path.stem[-1] for path in files] == ["2", "3", "4"]
    for path in files:
        lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
        assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines), path.name
        assert f"transformer-lens=={path.stem[-1]}." in path.read_text()
