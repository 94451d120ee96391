"""Makes modules for TransformerLens of three analyses, in the shape of its own tools.

    python docs/upstream/assemble.py FOLDER

writes ``value_zeroing.py``, ``decoder_lens.py`` and ``log_prob_contributions.py``, and what two or
more of them need as ``_block_reading.py``, ready for ``transformer_lens/tools/analysis``. Beside
this script lies one module of each name that holds what the shape asks for (the function, its
result, its refusals) and imports the mathematics from this package. Here each such import is
replaced by the definitions it stands for, with all that they use in turn, as text: comments and
docstrings are those of the source. Methods that nothing calls are left out, and a public class that
a tool defines itself stands in for the package's of that name.
"""

from __future__ import annotations

import ast
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
SHARED, TOOLS = "_block_reading", ("value_zeroing", "decoder_lens", "log_prob_contributions")
HOME = "transformer_lens.tools.analysis"
# Parts of the reading, and sums of its numbers, whichever tools use them today.
ALWAYS_SHARED = ("tl_contextmix.core.model_view", "tl_contextmix.core.log_means")
ISORT = {"profile": "black", "line_length": 100, "known_first_party": ["transformer_lens"]}
# This package's errors are what TransformerLens raises itself.
ERRORS = {"InvalidInput": "ValueError", "UnsupportedModel": "NotImplementedError"}
_PACKAGE = "tl_contextmix"

Reference = tuple[str, str]
"""The module that defines a name, and the name."""


@dataclass(frozen=True)
class Source:
    """One module as text and tree.

    Attributes:
        name: Dotted name.
        lines: Its lines.
        tree: Its tree.
        defined: What it defines, by name.
        imported: Where its other names come from: module and name, or the module alone.
    """

    name: str
    lines: list[str]
    tree: ast.Module
    defined: dict[str, ast.stmt] = field(default_factory=dict)
    imported: dict[str, tuple[str, str | None]] = field(default_factory=dict)


@cache
def read(name: str) -> Source:
    """Returns a module of the package, or of this folder."""
    path = ROOT / name.replace(".", "/")
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    text = (path if name.startswith(_PACKAGE) else HERE / f"{name}.py").read_text()
    source = Source(name, text.splitlines(), ast.parse(text))
    for node in source.tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            source.defined[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [part for target in targets for part in ast.walk(target)]
            source.defined.update({n.id: node for n in names if isinstance(n, ast.Name)})
        elif isinstance(node, ast.Import):
            source.imported.update({a.asname or a.name: (a.name, None) for a in node.names})
        elif isinstance(node, ast.ImportFrom):
            module = str(node.module)
            source.imported.update({a.asname or a.name: (module, a.name) for a in node.names})
    return source


def inside(module: str) -> bool:
    """Whether definitions of a module are pasted, not imported."""
    return module.startswith(_PACKAGE) or module == SHARED


class Assembly:
    """What the tools need of the package, found by following names from their modules."""

    def __init__(self) -> None:
        self._attributes: set[str] = set()
        needed: dict[str, set[Reference]] = {}
        before = -1
        # A method is kept once something kept, of any tool, calls a method of its name.
        while before != len(self._attributes):
            before = len(self._attributes)
            needed = {tool: self._reach(read(tool)) for tool in TOOLS}
        users = Counter(reference for found in needed.values() for reference in found)
        common = {
            reference
            for reference, count in users.items()
            if count > 1 or reference[0] in ALWAYS_SHARED
        }
        self.kept = {SHARED: common, **{tool: needed[tool] - common for tool in TOOLS}}
        self._renamed = self._new_names(needed)

    def text(self, module: str) -> str:
        """Returns one of the modules."""
        pieces = [piece for source in self._order() for piece in self._pieces(module, source)]
        imports = sorted({line for _, lines in pieces for line in lines})
        docstring = _segment(read(module), read(module).tree.body[0])
        head = [docstring, "from __future__ import annotations", "\n".join(imports)]
        text = "\n\n".join([*head, "\n\n\n".join(text for text, _ in pieces)]) + "\n"
        # Constants stand together.
        text = re.sub(
            r"(?m)^(_?[A-Z][\w, ]* = .*)\n\n\n(?=(# .*\n)*_?[A-Z][\w, ]* = )", r"\1\n", text
        )
        for ours, theirs in ERRORS.items():
            text = re.sub(rf"\b{ours}\b", theirs, text)
        return text

    def _reach(self, tool: Source) -> set[Reference]:
        """Returns all definitions that a tool is made of."""
        found = {(tool.name, name) for name in tool.defined}
        waiting = list(found)
        while waiting:
            source, name = waiting.pop()
            for used in self._names(read(source), name):
                target = self._resolve(tool, read(source), used)
                if target is not None and inside(target[0]) and target not in found:
                    found.add(target)
                    waiting.append(target)
        return found

    def _names(self, source: Source, name: str) -> set[str]:
        """Returns the names that a definition uses, and takes note of its attributes."""
        node = source.defined[name]
        parts: list[ast.AST] = [node]
        if isinstance(node, ast.ClassDef):
            parts = [*node.bases, *node.decorator_list, *self._members(source, node)]
        walked = [inner for part in parts for inner in ast.walk(part)]
        self._attributes |= {part.attr for part in walked if isinstance(part, ast.Attribute)}
        return {part.id for part in walked if isinstance(part, ast.Name)}

    def _members(self, source: Source, node: ast.ClassDef) -> list[ast.stmt]:
        """Returns the fields of a class, and the methods that are called; all of a tool's own."""
        return [
            part
            for part in node.body
            if not isinstance(part, ast.FunctionDef)
            or source.name in TOOLS
            or part.name.startswith("__")
            or part.name in self._attributes
        ]

    def _resolve(self, tool: Source, source: Source, name: str) -> Reference | None:
        """Returns where a name is defined, or imported from; None of builtins and variables.

        The second part is empty where it is a module that is imported.
        """
        asked_for = source.name, name
        while name not in source.defined:
            if name not in source.imported:
                if asked_for != (source.name, name):
                    raise ValueError(f"{source.name} has no {name} to import any more")
                return None
            module, origin = source.imported[name]
            if origin is None or not inside(module):
                return module, origin or ""
            source, name = read(module), origin
        if name in ERRORS:
            return None
        own = name in tool.defined and not name.startswith("_")
        return (tool.name if own else source.name), name

    def _order(self) -> list[Source]:
        """Returns all modules, each after those that it imports."""
        found: dict[str, None] = {}

        def visit(name: str, above: tuple[str, ...] = ()) -> None:
            if name in found or name in above:
                return
            for module, _ in read(name).imported.values():
                if inside(module):
                    visit(module, (*above, name))
            found.setdefault(name)

        for tool in TOOLS:
            visit(tool)
        return [read(name) for name in found]

    def _new_names(self, needed: dict[str, set[Reference]]) -> dict[Reference, str]:
        """Returns new names for private ones that two modules define."""
        renamed = {}
        for references in needed.values():
            count = Counter(name for _, name in references)
            for module, name in references:
                if count[name] > 1 and not name.startswith("_"):
                    raise ValueError(f"several modules define {name}: rename one of them")
                if count[name] > 1 and module.startswith(_PACKAGE):
                    renamed[module, name] = f"_{module.rpartition('.')[2]}{name}"
        return renamed

    def _pieces(self, module: str, source: Source) -> Iterator[tuple[str, list[str]]]:
        """Yields the definitions of a source that a module has, with the imports they need."""
        done: set[int] = set()
        for name, node in source.defined.items():
            if (source.name, name) not in self.kept[module] or id(node) in done:
                continue
            done.add(id(node))
            left_out = []
            if isinstance(node, ast.ClassDef):
                members = self._members(source, node)
                left_out = [part for part in node.body if part not in members]
            text, imports = _segment(source, node, left_out), []
            for local in sorted({name, *self._names(source, name)}):
                origin = self._resolve(read(module), source, local)
                if origin is None:
                    continue
                new = self._renamed.get(origin, origin[1])
                if not inside(origin[0]) and origin[0] not in TOOLS:
                    imports.append(_import(local, *origin))
                    continue
                if new != local:
                    text = re.sub(rf"(?<![\w.]){re.escape(local)}(?!\w)", new, text)
                if origin not in self.kept[module]:
                    if origin not in self.kept[SHARED]:
                        raise ValueError(f"{SHARED} needs {origin}, which a tool replaces")
                    imports.append(f"from {HOME}.{SHARED} import {new}")
            yield text, imports


def _import(local: str, module: str, name: str) -> str:
    if not name:
        return f"import {module}" + (f" as {local}" if local != module else "")
    return f"from {module} import {name}" + (f" as {local}" if local != name else "")


def _segment(source: Source, node: ast.stmt, left_out: list[ast.stmt] | None = None) -> str:
    """Returns the lines of a definition, with the comments above it and the text below it."""
    first, last = _first_line(node), node.end_lineno or 0
    while first > 1 and source.lines[first - 2].startswith("#"):
        first -= 1
    body = source.tree.body
    follower = body[body.index(node) + 1] if node is not body[-1] else None
    if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(follower, ast.Expr):
        last = follower.end_lineno or last
    dropped: set[int] = set()
    for part in left_out or ():
        dropped |= set(range(_first_line(part), (part.end_lineno or 0) + 1))
    return "\n".join(source.lines[n - 1] for n in range(first, last + 1) if n not in dropped)


def _first_line(node: ast.stmt) -> int:
    return min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])


def main(folder: str) -> None:
    """Writes every module into a folder, formatted as TransformerLens formats its own."""
    import black
    import isort

    Path(folder).mkdir(parents=True, exist_ok=True)
    assembly = Assembly()
    for name in (SHARED, *TOOLS):
        text = isort.code(assembly.text(name), **ISORT)
        text = black.format_str(text, mode=black.Mode(line_length=100))
        (Path(folder) / f"{name}.py").write_text(text)


if __name__ == "__main__":
    main(*sys.argv[1:])
