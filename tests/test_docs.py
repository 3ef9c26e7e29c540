"""Checks of the documentation: names, arguments, links, programs."""

import ast
import builtins
import doctest
import importlib
import inspect
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import optax
import pytest

import natgalore_jax as ng

ROOT = pathlib.Path(__file__).resolve().parent.parent
FOLDERS = ("docs", "benchmarks", "examples", "notebooks")
PAGES = [*ROOT.glob("*.md"), *(p for d in FOLDERS for p in ROOT.joinpath(d).rglob("*.md"))]
PUBLIC = {
    name: value
    for module in (ng, ng.training, ng.contrib)
    for name, value in vars(module).items()
    if not name.startswith("_") and not inspect.ismodule(value)
}
MODULES = {"ng": ng, "optax": optax, "jax": jax, "jnp": jnp}
# Blocks that import anything else (programs of examples/, their data) are checked and not run.
RUNNABLE = {"flax", "jax", "natgalore_jax", "numpy", "optax", "orbax", "pathlib", "tempfile"}

FENCE = re.compile(r"^```(\S*)[^\n]*\n(.*?)^```", re.M | re.S)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def relative(path):
    return str(path.relative_to(ROOT))


def markdown_of(path):
    if path.suffix == ".md":
        return path.read_text()
    cells = json.loads(path.read_text())["cells"]
    return "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")


def python_blocks():
    for page in PAGES:
        for number, match in enumerate(FENCE.finditer(page.read_text())):
            if match[1] == "python":
                yield pytest.param(match[2], id=f"{relative(page)}-{number}")


def test_the_method_has_at_most_30_names():
    assert len([name for name in vars(ng) if not name.startswith("_")]) <= 30


def test_the_reference_has_every_public_name_and_no_other():
    text = ROOT.joinpath("docs/api.md").read_text()
    listed = re.findall(r"^\.\. auto(?:function|class):: (\w+)$", text, re.M)
    assert sorted(listed) == sorted(PUBLIC)


@pytest.mark.parametrize("name", [n for n, v in PUBLIC.items() if inspect.isfunction(v)])
def test_functions_explain_each_argument_and_show_an_example(name):
    doc, parameters = inspect.getdoc(PUBLIC[name]), inspect.signature(PUBLIC[name]).parameters
    sections = re.split(r"^(Args|Returns|Raises|References|Example):\n", doc, flags=re.M)
    found = dict(zip(sections[1::2], sections[2::2], strict=True))
    assert {"Args", "Returns", "Example"} <= set(found)
    assert ">>> " in found["Example"]
    names = re.findall(r"^  ([\w, \n]+?):", found["Args"], re.M)
    assert set(re.findall(r"\w+", " ".join(names))) >= set(parameters) - {"transforms"}


@pytest.mark.parametrize("name", [n for n, v in PUBLIC.items() if inspect.isclass(v)])
def test_classes_explain_each_field(name):
    """By a section Args, or by a comment ``#:`` at the field, which the site shows."""
    doc, source = inspect.getdoc(PUBLIC[name]), inspect.getsource(PUBLIC[name])
    assert doc
    lines = source.splitlines()
    fields = [f for f in ast.parse(source).body[0].body if isinstance(f, ast.AnnAssign)]
    for field in fields:
        own, before = lines[field.end_lineno - 1], lines[field.lineno - 2]
        explained = "#: " in own or before.lstrip().startswith("#: ")
        assert explained or f"  {field.target.id}:" in doc, field.target.id


def slugs(markdown):
    """The anchors that GitHub gives headings."""
    headings = re.findall(r"^#+ +(.*)$", FENCE.sub("", markdown), re.M)
    text = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in text}


NOTEBOOKS = sorted(ROOT.joinpath("notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("page", [*PAGES, *NOTEBOOKS], ids=relative)
def test_links_lead_somewhere(page):
    text = re.sub(r"`[^`\n]*`(?!\])", "", FENCE.sub("", markdown_of(page)))
    for link in LINK.findall(text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        # The site cannot link to a directory.
        assert target.is_file() or (target.is_dir() and page.parent.name != "docs"), link
        if anchor and target.suffix == ".md":
            assert anchor in slugs(target.read_text()), link


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_no_line_of_text_is_a_comment(page):
    """MyST leaves out a line that begins with a percent sign, as one wrapped after a number may."""
    assert re.findall(r"^ *%.*", FENCE.sub("", page.read_text()), re.M) == []


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_tests_that_are_named_exist(page):
    for file, name in re.findall(r"(tests/[\w/]+\.py)(?:::(\w+))?", page.read_text()):
        assert ROOT.joinpath(file).exists(), file
        assert not name or f"def {name}(" in ROOT.joinpath(file).read_text(), name


def resolved(node):
    """The object that ``ng.a.b`` stands for; None if its root is not one of ``MODULES``."""
    if isinstance(node, ast.Attribute):
        owner = resolved(node.value)
        return None if owner is None else getattr(owner, node.attr)
    return MODULES.get(node.id) if isinstance(node, ast.Name) else None


def check_names_and_arguments(tree):
    """Every dotted name exists, and functions of the library have the arguments they are given."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            resolved(node)
        if not isinstance(node, ast.Call):
            continue
        function = resolved(node.func)
        if getattr(function, "__module__", "").startswith("natgalore_jax"):
            keywords = {k.arg: None for k in node.keywords if k.arg}
            inexact = [a for a in node.args if isinstance(a, ast.Starred) or is_dots(a)]
            positional = [] if inexact else [None] * len(node.args)
            inspect.signature(function).bind_partial(*positional, **keywords)


def is_dots(node):
    return isinstance(node, ast.Constant) and node.value is Ellipsis


def is_complete(tree):
    """Whether a block defines all that it uses, with nothing left out."""
    nodes = list(ast.walk(tree))
    names = [n for n in nodes if isinstance(n, ast.Name)]
    made = {n.id for n in names if not isinstance(n.ctx, ast.Load)} | set(dir(builtins))
    made |= {n.arg for n in nodes if isinstance(n, ast.arg)}
    made |= {n.name for n in nodes if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    made |= {a.asname or a.name.split(".")[0] for a in imported(nodes)}
    return {n.id for n in names} <= made and not any(map(is_dots, nodes))


def imported(nodes):
    return [a for n in nodes if isinstance(n, (ast.Import, ast.ImportFrom)) for a in n.names]


def modules_of(nodes):
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if not hasattr(importlib.import_module(node.module), alias.name):
                    importlib.import_module(f"{node.module}.{alias.name}")
            yield node.module


@pytest.mark.usefixtures("fast_compile")
@pytest.mark.parametrize("block", list(python_blocks()))
def test_programs_run(block):
    """Complete programs and examples are run; of fragments, names and arguments are checked."""
    if block.lstrip().startswith(">>> "):
        example = doctest.DocTestParser().get_doctest(block, {}, "block", None, 0)
        flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
        assert doctest.DocTestRunner(optionflags=flags).run(example).failed == 0
        return
    tree = ast.parse(block)
    check_names_and_arguments(tree)
    modules = {m.split(".")[0] for m in modules_of(ast.walk(tree))}
    if is_complete(tree) and modules <= RUNNABLE:
        exec(compile(tree, "block", "exec"), {"__name__": "block"})


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_calls_in_the_text_are_possible(page):
    for code in re.findall(r"`([^`\n]*\bng\.[^`\n]*)`", FENCE.sub("", page.read_text())):
        try:
            check_names_and_arguments(ast.parse(code, mode="eval"))
        except SyntaxError:  # half a call: the name is there at least
            for name in re.findall(r"\bng\.(?:training\.|contrib\.)?(\w+)", code):
                assert name in PUBLIC, code


def test_errors_that_are_explained_are_raised():
    """Quoted at the start of a paragraph of the page, with dots for what changes."""
    modules = [ast.parse(p.read_text()) for p in ROOT.joinpath("natgalore_jax").rglob("*.py")]
    texts = [
        node.value
        for module in modules
        for node in ast.walk(module)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    page = ROOT.joinpath("docs/troubleshooting.md").read_text()
    quoted = re.findall(r'"([^"]+)"', " ".join(re.findall(r'^\*\*("[^*]+)\*\*', page, re.M)))
    assert len(quoted) > 5
    for message in quoted:
        for part in filter(None, (p.strip() for p in re.sub(r"\s+", " ", message).split("..."))):
            assert any(part in text for text in texts), part


def test_a_wrong_name_and_a_wrong_argument_are_found():
    for wrong in ("ng.natural_galor(1e-2)", "ng.galore_adamw(1e-2, ranks=3)", "jnp.einsumm"):
        with pytest.raises((AttributeError, TypeError)):
            check_names_and_arguments(ast.parse(wrong))
    assert not is_complete(ast.parse("tx = ng.chain(a)")) and is_complete(ast.parse("x = 1; x"))


def test_contributing_names_every_package_and_no_file_that_is_not_there():
    text = ROOT.joinpath("CONTRIBUTING.md").read_text()
    library = ROOT / "natgalore_jax/_src"
    for package in library.glob("*/__init__.py"):
        assert f"{package.parent.name}/" in text, package.parent.name
    paths = {str(p.relative_to(library)) for p in library.rglob("*.py")}
    # Files that a diff of the page makes.
    paths |= set(re.findall(r"^--- /dev/null\n\+\+\+ b/\S*?(\w+/\w+\.py)$", text, re.M))
    for name in re.findall(r"\b(\w+/\w+\.py)", text):
        assert name in paths or list(ROOT.glob(f"**/{name}")), name


def test_files_are_short():
    lengths = {
        path: len(path.read_text().splitlines())
        for folder in ("natgalore_jax", "examples", "benchmarks", "tests")
        for path in ROOT.joinpath(folder).rglob("*.py")
    }
    assert {relative(p): n for p, n in lengths.items() if n > 400} == {}
