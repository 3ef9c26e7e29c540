"""The site. Its source is the repository, so that links mean the same here and on GitHub."""

import importlib.util
import inspect
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from sphinx.util import logging  # noqa: E402

import natgalore_jax  # noqa: E402

project = "natgalore_jax"
author = "The natgalore_jax authors"
copyright = author
version = release = natgalore_jax.__version__

root_doc = "docs/index"
# Pages, which stand in the toctrees of docs/index.md; what else they link to can be downloaded.
include_patterns = ["docs/*.md", "benchmarks/README.md", "notebooks/README.md"]
include_patterns += ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"]
exclude_patterns = [".*", "runs"]

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx_copybutton",
]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True

# Defaults and types as they stand in the source: what they mean is under "Args".
autodoc_preserve_defaults = True
autodoc_typehints = "none"
autodoc_member_order = "bysource"
napoleon_use_rtype = False
napoleon_use_param = False
nitpicky = True
# Exceptions of Python in "Raises".
nitpick_ignore_regex = [("py:exc", r"\w+Error")]

# Formulas need no network: one file of MathJax, fonts included, is part of the site.
MATHJAX = pathlib.Path(importlib.util.find_spec("sphinx-mathjax-offline").origin).parent
html_static_path = [str(MATHJAX / "static/mathjax/tex-svg.js"), "site.css"]
html_css_files = ["site.css"]
mathjax_path = "tex-svg.js"

html_theme = "furo"
html_title = f"natgalore_jax {release}"
html_extra_path = ["_root"]
html_copy_source = False
html_show_copyright = False


def _without_fields(app, what, name, obj, options, signature, return_annotation):
    """States are made by transformations: their fields are listed, and need no signature."""
    if inspect.isclass(obj) and issubclass(obj, tuple):
        return "", None
    return None


_comments = {}


def _keep_comment(app, what, name, obj, options, lines):
    """Before napoleon, which takes what stands before a colon in a field's comment for its type."""
    if what == "attribute":
        _comments[name] = lines[:]


def _restore_comment(app, what, name, obj, options, lines):
    if what == "attribute":
        lines[:] = _comments.pop(name)


LOADED = re.compile(r"<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=[\"'](?:https?:)?//[^>]*>")


def _warn_of_other_hosts(app, exception):
    """A page is read without a network: it loads scripts, styles and pictures from the site."""
    for page in sorted(pathlib.Path(app.outdir).rglob("*.html")):
        for tag in LOADED.findall(page.read_text()):
            logging.getLogger(__name__).warning("%s: loads from another host: %s", page.name, tag)


def setup(app):
    """Called by Sphinx."""
    app.connect("build-finished", _warn_of_other_hosts)
    app.connect("autodoc-process-signature", _without_fields)
    app.connect("autodoc-process-docstring", _keep_comment, priority=400)
    app.connect("autodoc-process-docstring", _restore_comment, priority=600)
