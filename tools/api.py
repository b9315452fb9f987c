"""The public API at a glance: every public name, with its signature and the first paragraph of its docstring.

``.venv/bin/python tools/api.py`` writes ``docs/reference/api.md`` from the source. A test compares the two.
"""

from __future__ import annotations

import ast
import importlib
import re
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path

TOP = Path(__file__).resolve().parents[1]
PAGE = TOP / "docs" / "reference" / "api.md"

_HEAD = """\
# The library at a glance

All public names with their signatures, and one line about each. [The library](python.md) and `help(onlap.Store)`
describe the arguments and the errors. The parentheses after the name of a class have the arguments of its constructor;
those of a value are also its attributes. Names are imported from the module in the heading.

`.venv/bin/python tools/api.py` writes this page from the source.
"""

# The modules of docs/reference/python.md; and of some of them, the names that are public.
_MODULES = {
    "onlap": "trees and snapshots",
    "onlap.snapshots.recorded": "what both snapshotters share",
    "onlap.images": "images and registries",
    "onlap.images.inspection.inspect": "look into images",
    "onlap.images.inspection.origins": "which layer a file comes from",
    "onlap.content.store": "blobs",
    "onlap.content.lease": "what keeps blobs during work",
    "onlap.containers.run": "run a container",
    "onlap.containers.options": "the options of a container",
    "onlap.graphdrivers": "Docker's graph drivers",
    "onlap.check.stores.doctor": "check the stores of other programs",
    "onlap.check.stores.repairing.supply": "where their layers' archives come from",
    "onlap.check.stores.repairing.repair": "repair them",
    "onlap.check.stores.docker.data_root": "look into a Docker data root",
    "onlap.testing": "the conformance suite",
}
_ONLY = {"onlap.snapshots.recorded": ["RecordedSnapshotter"], "onlap.images.inspection.origins": ["Hidden"]}
_FIRST = {"Store", "Images"}  # before the other classes

Definition = ast.ClassDef | ast.FunctionDef
_UNSAID = {"NamedTuple", "Protocol", "ABC", "TypedDict"}  # bases that say nothing to a reader


class Module:
    """The definitions of a module, with its text."""

    def __init__(self, path: Path) -> None:
        self.text = path.read_text(encoding="utf-8")
        self.definitions = {n.name: n for n in ast.parse(self.text).body if isinstance(n, Definition)}

    def code(self, node: ast.expr) -> str:
        """An expression as it is written."""
        return " ".join((ast.get_source_segment(self.text, node) or "").split())

    def parameter(self, name: str, annotation: ast.expr | None, default: ast.expr | None) -> str:
        text = name if annotation is None else f"{name}: {self.code(annotation)}"
        return text if default is None else f"{text} = {self.code(default)}"

    def parameters(self, args: ast.arguments, *, bound: bool) -> list[str]:
        """The public parameters of a function; without ``self`` for a bound one."""
        plain = [*args.posonlyargs, *args.args]
        defaults = [*[None] * (len(plain) - len(args.defaults)), *args.defaults]
        found = [self.parameter(a.arg, a.annotation, d) for a, d in zip(plain, defaults, strict=True)][bound:]
        if args.vararg:
            found.append(self.parameter("*" + args.vararg.arg, args.vararg.annotation, None))
        elif args.kwonlyargs:
            found.append("*")
        keywords = zip(args.kwonlyargs, args.kw_defaults, strict=True)
        found += [self.parameter(a.arg, a.annotation, default) for a, default in keywords if a.arg[0] != "_"]
        if args.kwarg:
            found.append(self.parameter("**" + args.kwarg.arg, args.kwarg.annotation, None))
        return found

    def signature(self, node: ast.FunctionDef, *, bound: bool = False) -> str:
        """A function's signature, or the type of a property."""
        result = self.code(node.returns) if node.returns is not None else "None"
        if "property" in decorators(node):
            return f"{node.name}: {result}"
        bound = bound and "staticmethod" not in decorators(node)
        return f"{node.name}({', '.join(self.parameters(node.args, bound=bound))}) -> {result}"


class Package:
    """All modules of the library."""

    def __init__(self) -> None:
        self.modules: dict[str, Module] = {}
        for path in sorted((TOP / "src" / "onlap").rglob("*.py")):
            name = ".".join(path.relative_to(TOP / "src").with_suffix("").parts).removesuffix(".__init__")
            if not name.startswith("onlap.aio"):  # the same classes, by the same names
                self.modules[name] = Module(path)
        self.shown = {node.name for name in _MODULES for _, node in self.public(name)}

    def public(self, name: str) -> Iterator[tuple[Module, Definition]]:
        """The public definitions of a module, wherever they are defined."""
        loaded = importlib.import_module(name)
        for public in _ONLY.get(name) or getattr(loaded, "__all__", None) or self.modules[name].definitions:
            home = self.modules.get(getattr(getattr(loaded, public), "__module__", name))
            if home is not None and public in home.definitions and not public.startswith("_"):
                yield home, home.definitions[public]

    def find(self, name: str) -> tuple[Module, ast.ClassDef] | None:
        """A class by its name."""
        for module in self.modules.values():
            node = module.definitions.get(name)
            if isinstance(node, ast.ClassDef):
                return module, node
        return None

    def bases(self, node: ast.ClassDef) -> Iterator[tuple[Module, ast.ClassDef]]:
        """The bases of a class that are ours, with theirs."""
        for base in node.bases:
            if found := self.find(ast.unparse(base).rpartition(".")[2]):
                yield found
                yield from self.bases(found[1])

    def methods(self, module: Module, node: ast.ClassDef) -> dict[str, tuple[Module, ast.FunctionDef]]:
        """The public methods of a class, with those of bases that have no entry of their own."""
        bases = list(self.bases(node))
        owners = [node, *(base for _, base in bases)]
        marks = any("public" in decorators(method) for owner in owners for method in functions(owner))
        unlisted = [(home, base) for home, base in bases if base.name not in self.shown]
        found: dict[str, tuple[Module, ast.FunctionDef]] = {}
        for home, owner in [(module, node), *unlisted]:
            for method in functions(owner):
                if not method.name.startswith("_") and (not marks or "public" in decorators(method)):
                    found.setdefault(method.name, (home, method))
        return found

    def referred(self, node: Definition) -> tuple[str, Module, ast.FunctionDef] | None:
        """The class and method that a docstring refers to, as "See :meth:`Snapshotter.stat`"."""
        match = re.match(r"See :meth:`(\w+)\.(\w+)`", ast.get_docstring(node) or "")
        found = self.find(match[1]) if match else None
        if match is None or found is None:
            return None
        return match[1], found[0], next(method for method in functions(found[1]) if method.name == match[2])

    def summary(self, node: Definition) -> str:
        """The first paragraph of a docstring, or of the one that it refers to."""
        if found := self.referred(node):
            return self.summary(found[2])
        text = " ".join((ast.get_docstring(node) or "").partition("\n\n")[0].split())
        return re.sub(r":\w+:`~?([^`]*)`", r"`\1`", text).replace("``", "`")

    def class_items(self, module: Module, node: ast.ClassDef) -> Iterator[str]:
        """A class and its methods."""
        fields = [
            module.parameter(ast.unparse(member.target), member.annotation, member.value)
            for member in node.body
            if isinstance(member, ast.AnnAssign) and "Protocol" not in map(ast.unparse, node.bases)
        ]
        made = next((method for method in functions(node) if method.name == "__init__"), None)
        if made is not None:
            fields = module.parameters(made.args, bound=True)
        bases = [base for base in map(ast.unparse, node.bases) if base.partition("[")[0] not in _UNSAID]
        named = [f"`{base}`" for base in bases if base in self.shown and base != "OnlapError"]
        kind = f" (a {', '.join(named)})" if named else ""
        yield item(f"{node.name}({', '.join(fields)})" if fields else node.name, self.summary(node), kind)
        same: dict[str, list[str]] = {}
        for home, method in self.methods(module, node).values():
            found = self.referred(method)
            if found and found[1].signature(found[2], bound=True) == home.signature(method, bound=True):
                same.setdefault(found[0], []).append(f"`{method.name}`")
            else:
                yield item(home.signature(method, bound=True), self.summary(method), level=1)
        for owner, names in same.items():
            yield wrapped(f"- {', '.join(names)}: see `{owner}`.", level=1)


def functions(node: ast.ClassDef) -> list[ast.FunctionDef]:
    return [member for member in node.body if isinstance(member, ast.FunctionDef)]


def decorators(node: Definition) -> set[str]:
    return {ast.unparse(decorator).rpartition(".")[2] for decorator in node.decorator_list}


def item(signature: str, summary: str, kind: str = "", level: int = 0) -> str:
    return wrapped(f"- `{signature}`{kind}: {summary}", level)


def wrapped(text: str, level: int) -> str:
    first = "  " * level
    return textwrap.fill(
        text, 120, initial_indent=first, subsequent_indent=first + "  ", break_on_hyphens=False, break_long_words=False
    )


def render() -> str:
    """The page."""
    package = Package()

    def is_error(node: Definition) -> bool:
        return isinstance(node, ast.ClassDef) and any(base.name == "OnlapError" for _, base in package.bases(node))

    def is_value(node: Definition) -> bool:
        return isinstance(node, ast.ClassDef) and "NamedTuple" in map(ast.unparse, node.bases)

    def section(title: str, chosen: Iterable[tuple[Module, Definition]]) -> str:
        lines: list[str] = []
        for module, node in chosen:
            if isinstance(node, ast.ClassDef):
                lines += package.class_items(module, node)
            else:
                lines.append(item(module.signature(node), package.summary(node)))
        return "\n".join([title, "", *lines, ""]) if lines else ""

    parts = [_HEAD]
    for name, title in _MODULES.items():
        public = list(package.public(name))
        values = [(module, node) for module, node in public if is_value(node)]
        failures = [(module, node) for module, node in public if is_error(node) or node.name == "OnlapError"]
        others = [pair for pair in public if pair not in values and pair not in failures]
        others.sort(key=lambda pair: (isinstance(pair[1], ast.ClassDef), pair[1].name not in _FIRST))
        parts.append(section(f"## `{name}`: {title}", others + ([] if name == "onlap" else values)))
        if name == "onlap":
            parts += [section("### Values", values), section("### Errors", failures)]
    return "\n".join(part for part in parts if part)


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
