"""The house: who may import whom, what is public, how long files are, what is annotated."""

import ast
import inspect
from pathlib import Path

import pytest

import bnrewrite

ROOT = Path(bnrewrite.__file__).parent

FILES = sorted(ROOT.rglob("*.py"))

LAYERS = (
    ("__main__",),
    ("cli", "demo"),
    ("environment",),
    ("check", "compiler", "export", "report", "report_page", "shuffle_batch"),
    ("steps",),
    ("roots",),
    ("convert",),
    ("conversion",),
    ("capture",),
    ("passes",),
    ("sites",),
    ("ops",),
    ("kernels", "collectives"),
    ("watch",),
    ("agreement", "naming"),
    (
        "activations", "groups", "reference", "two_branches", "permutations", "modes", "settings",
        "commandline", "differences",
    ),
    ("errors", "guards"),
    ("torch_versions",),
)  # fmt: skip
"""From top to bottom: a part imports from its own layer and from those below it."""

MAX_LINES = 350
"""Over the limit, two ideas share a file."""


def _level(part: str) -> int:
    for level, layer in enumerate(LAYERS):
        if part in layer:
            return level
    raise AssertionError(f"{part} has no layer: add it to LAYERS, above everything it imports")


def _part(file: Path) -> str:
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def _imports(file: Path) -> list[str]:
    """Names of the modules of the package that ``file`` imports, anywhere in it."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: relative import"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
    return [name for name in found if name.split(".")[0] == "bnrewrite"]


def _ids(file: Path) -> str:
    return str(file.relative_to(ROOT))


@pytest.mark.parametrize("file", FILES, ids=_ids)
def test_imports_point_downwards(file: Path) -> None:
    if file == ROOT / "__init__.py":
        return
    level = _level(_part(file))
    for name in _imports(file):
        part = name.split(".")[1] if "." in name else ""
        if not ((ROOT / part).exists() or (ROOT / f"{part}.py").exists()) or not part:
            # The command line speaks as a user does.
            assert level <= _level("environment"), f"{file.name} imports the public package"
            continue
        assert _level(part) >= level, f"{file.name} imports {name} from above"


@pytest.mark.parametrize("file", FILES, ids=_ids)
def test_only_one_file_communicates(file: Path) -> None:
    """Functional collectives and the group's own are named in ``collectives.py`` alone."""
    names = {
        node.attr
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute)
    }
    forbidden = {"_c10d_functional", "c10d_functional", "all_reduce", "all_gather", "broadcast"}
    if _part(file) in ("collectives", "demo"):
        return
    assert not names & forbidden


def test_the_package_imports_nothing_but_public_names() -> None:
    tree = ast.parse((ROOT / "__init__.py").read_text())
    imported = [
        alias.asname or alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    ]
    assert sorted(imported) == sorted(bnrewrite.__all__)
    assert list(bnrewrite.__all__) == sorted(bnrewrite.__all__)
    for node in tree.body:
        # A docstring, imports, the version and __all__: no code.
        assert isinstance(node, (ast.Expr, ast.ImportFrom, ast.Assign)), ast.dump(node)


@pytest.mark.parametrize("name", bnrewrite.__all__)
def test_public_names_are_documented(name: str) -> None:
    value = getattr(bnrewrite, name)
    text = inspect.getdoc(value)
    assert text
    assert text.splitlines()[0].endswith((".", ":"))
    if not inspect.isfunction(value):
        return
    assert "Args:" in text
    assert "Returns:" in text or value.__annotations__["return"] is None
    for parameter in inspect.signature(value).parameters:
        assert f"{parameter}:" in text, f"{name} does not say what {parameter} is"


@pytest.mark.parametrize("file", FILES, ids=_ids)
def test_files_are_short(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= MAX_LINES


def _unannotated(file: Path) -> list[str]:
    """Functions that lack an annotation, but for autograd.Function's and dispatch modes' own."""
    torch_calls_these = {"forward", "backward", "__torch_function__", "__torch_dispatch__"}
    found = []

    def visit(node: ast.AST, inside_class: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                arguments = [*child.args.posonlyargs, *child.args.args, *child.args.kwonlyargs]
                decorators = {getattr(d, "id", "") for d in child.decorator_list}
                if inside_class and "staticmethod" not in decorators:
                    arguments = arguments[1:]
                of_torch = child.name in torch_calls_these and inside_class
                takes_ctx = bool(arguments) and arguments[0].arg == "ctx"
                missing = [a.arg for a in arguments if a.annotation is None]
                if (missing or child.returns is None) and not of_torch and not takes_ctx:
                    found.append(f"{file.name}:{child.lineno} {child.name} {missing}")
            visit(child, isinstance(child, ast.ClassDef))

    visit(ast.parse(file.read_text()), False)
    return found


@pytest.mark.parametrize("file", FILES, ids=_ids)
def test_functions_are_annotated(file: Path) -> None:
    # Annotations of these two would repeat the schema of autograd.Function.
    allowed = ("_backward", "kernel")
    assert [one for one in _unannotated(file) if one.split()[1] not in allowed] == []


@pytest.mark.parametrize("file", FILES, ids=_ids)
def test_library_code_does_not_print(file: Path) -> None:
    if _part(file) in ("cli", "demo", "__main__") or file.name == "command.py":
        return
    calls = [
        node.lineno
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"
    ]
    assert calls == []
