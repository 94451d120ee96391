"""Makes one self-contained module of an analysis, in the shape of TransformerLens' own tools.

    python docs/upstream/assemble.py FOLDER

writes ``value_zeroing.py`` and ``decoder_lens.py``, ready for ``transformer_lens/tools/analysis``.
Beside this script lies one module per analysis that holds what the shape asks for (the function,
its result, its refusals) and imports the mathematics from this package. Here each such import is
replaced by the definitions it stands for, with all that they use in turn, as text: comments and
docstrings are those of the source. Methods that nothing calls are left out.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
# The analyses, each with the classes of the package that its module has a smaller one for.
MODULES: dict[str, frozenset[str]] = {
    "value_zeroing": frozenset(),
    "decoder_lens": frozenset({"EncoderDecoder"}),
}
ISORT = {"profile": "black", "line_length": 100, "known_first_party": ["transformer_lens"]}
# This package's errors are what TransformerLens raises itself.
ERRORS = {"InvalidInput": "ValueError", "UnsupportedModel": "NotImplementedError"}
_PACKAGE = "tl_contextmix"
_WORD = r"(?<![\w.]){}(?!\w)"

Definition = ast.FunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign
Statement = ast.Import | ast.ImportFrom


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
    defined: dict[str, Definition] = field(default_factory=dict)
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
            source.defined.update({t.id: node for t in targets if isinstance(t, ast.Name)})
        elif isinstance(node, ast.Import):
            source.imported.update({a.asname or a.name: (a.name, None) for a in node.names})
        elif isinstance(node, ast.ImportFrom):
            module = str(node.module)
            source.imported.update({a.asname or a.name: (module, a.name) for a in node.names})
    return source


class Assembly:
    """What one analysis needs of the package, found by following names from its module.

    Args:
        name: The module in this folder.
    """

    def __init__(self, name: str) -> None:
        self.main = read(name)
        self.kept: dict[tuple[str, str], None] = {}
        self.outside: dict[str, tuple[str, str | None]] = {}
        self._attributes: set[str] = set()
        self._seen: set[int] = set()
        for node in self.main.tree.body:
            if not isinstance(node, Statement):
                self._follow(self.main, node)
        before = -1
        # A method is kept once something kept calls a method of its name.
        while before != len(self._seen):
            before = len(self._seen)
            for module, own in list(self.kept):
                self._keep(read(module), own)

    def text(self) -> str:
        """Returns the module."""
        sources = [read(name) for name in self._order()]
        pieces = ["\n\n\n".join(self._pieces(source, self._renamed())) for source in sources]
        body = [node for node in self.main.tree.body if not isinstance(node, Statement)]
        docstring, rest = body[0], body[1:]
        whole = [
            _segment(self.main, docstring),
            "from __future__ import annotations",
            "\n".join(self._imports()),
            *pieces,
            *(_segment(self.main, node) for node in rest),
        ]
        text = "\n\n".join(piece for piece in whole if piece) + "\n"
        for ours, theirs in ERRORS.items():
            text = re.sub(rf"\b{ours}\b", theirs, text)
        return text

    def _keep(self, source: Source, name: str) -> None:
        node = source.defined[name]
        self.kept.setdefault((source.name, name))
        if not isinstance(node, ast.ClassDef):
            self._follow(source, node)
            return
        for part in (*node.bases, *node.decorator_list, *self._members(node)):
            self._follow(source, part)

    def _members(self, node: ast.ClassDef) -> list[ast.stmt]:
        """Returns the fields of a class, and the methods that are called."""
        return [
            part
            for part in node.body
            if not isinstance(part, ast.FunctionDef)
            or part.name.startswith("__")
            or part.name in self._attributes
        ]

    def _follow(self, source: Source, node: ast.AST) -> None:
        if id(node) in self._seen:
            return
        self._seen.add(id(node))
        for part in ast.walk(node):
            if isinstance(part, ast.Attribute):
                self._attributes.add(part.attr)
            elif isinstance(part, ast.Name):
                self._find(source, part.id)

    def _find(self, source: Source, name: str) -> None:
        """Keeps what a name stands for, wherever it is defined."""
        if source is self.main and name in self.main.defined:
            return
        asked_for = (source.name, name)
        while name not in source.defined:
            if name not in source.imported:
                if asked_for != (source.name, name):
                    raise ValueError(f"{source.name} has no {name} to import any more")
                return  # a builtin, or a variable of the function
            module, origin = source.imported[name]
            if not module.startswith(_PACKAGE) or origin is None:
                self.outside[name] = (module, origin)
                return
            source, name = read(module), origin
        if name not in MODULES[self.main.name] and name not in ERRORS:
            self._keep(source, name)

    def _order(self) -> list[str]:
        """Returns the modules, each behind those that it imports."""
        found: dict[str, None] = {}
        seen: set[str] = set()

        def visit(name: str) -> None:
            if name in seen:
                return
            seen.add(name)
            for module, _ in read(name).imported.values():
                if module.startswith(_PACKAGE):
                    visit(module)
            found.setdefault(name)

        visit(self.main.name)
        kept = {module for module, _ in self.kept}
        return [name for name in found if name in kept]

    def _renamed(self) -> dict[tuple[str, str], str]:
        """Returns new names for private ones that two modules define."""
        owners: dict[str, list[str]] = {name: [self.main.name] for name in self.main.defined}
        for module, name in self.kept:
            owners.setdefault(name, []).append(module)
        clashes = {name: modules for name, modules in owners.items() if len(modules) > 1}
        public = [name for name in clashes if not name.startswith("_")]
        if public:
            raise ValueError(f"several modules define {', '.join(public)}: rename one of them")
        return {
            (module, name): f"_{module.rpartition('.')[2]}{name}"
            for name, modules in clashes.items()
            for module in modules
            if module != self.main.name
        }

    def _pieces(self, source: Source, renamed: dict[tuple[str, str], str]) -> Iterator[str]:
        done: set[int] = set()
        for name, node in source.defined.items():
            if (source.name, name) not in self.kept or id(node) in done:
                continue
            done.add(id(node))
            text = _segment(source, node, self._left_out(node))
            for own, new in self._new_names(source, renamed).items():
                text = re.sub(_WORD.format(re.escape(own)), new, text)
            yield text

    def _new_names(self, source: Source, renamed: dict[tuple[str, str], str]) -> dict[str, str]:
        """Returns the new names that a module's own text needs, of imported ones too."""
        own = {name: new for (module, name), new in renamed.items() if module == source.name}
        for local, (module, origin) in source.imported.items():
            if origin is not None and (module, origin) in renamed:
                own[local] = renamed[module, origin]
        return own

    def _left_out(self, node: ast.AST) -> list[ast.stmt]:
        if not isinstance(node, ast.ClassDef):
            return []
        members = self._members(node)
        return [part for part in node.body if part not in members]

    def _imports(self) -> Iterator[str]:
        for local, (module, name) in sorted(self.outside.items()):
            if module == "__future__":
                continue
            if name is None:
                yield f"import {module}" + (f" as {local}" if local != module else "")
            else:
                yield f"from {module} import {name}" + (f" as {local}" if local != name else "")


def _segment(source: Source, node: ast.stmt, left_out: list[ast.stmt] | None = None) -> str:
    """Returns the lines of a definition, with the comments above it and the text below it."""
    first, last = _first_line(node), node.end_lineno or 0
    while first > 1 and source.lines[first - 2].startswith("#"):
        first -= 1
    body = source.tree.body
    follower = body[body.index(node) + 1] if node is not body[-1] else None
    if isinstance(node, ast.Assign | ast.AnnAssign) and follower and _is_text(follower):
        last = follower.end_lineno or last
    dropped: set[int] = set()
    for part in left_out or ():
        dropped |= set(range(_first_line(part), (part.end_lineno or 0) + 1))
    lines = [source.lines[n - 1] for n in range(first, last + 1) if n not in dropped]
    return "\n".join(lines)


def _first_line(node: ast.stmt) -> int:
    decorators = getattr(node, "decorator_list", [])
    return min(node.lineno, *(d.lineno for d in decorators)) if decorators else node.lineno


def _is_text(node: ast.stmt | None) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def assemble(name: str) -> str:
    """Returns the text of a self-contained module, formatted as TransformerLens formats its own."""
    import black
    import isort

    text = isort.code(Assembly(name).text(), **ISORT)
    return black.format_str(text, mode=black.Mode(line_length=100))


def main(folder: str) -> None:
    """Writes every module into a folder."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name in MODULES:
        (Path(folder) / f"{name}.py").write_text(assemble(name))


if __name__ == "__main__":
    main(*sys.argv[1:])
