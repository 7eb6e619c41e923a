"""Sphinx settings; `sphinx-build -W --keep-going -b html docs docs/_build/html` builds the site."""

import importlib
import inspect
import os
import re

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.domains.python import PyXRefRole
from sphinx.environment import BuildEnvironment
from sphinx.util import logging

import led_jax

# The notebooks' kernels compile more than they compute.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

project = "led_jax"
author = "The led_jax authors"
copyright = author
release = version = led_jax.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build", "package.md"]  # package.md is for a package index.
suppress_warnings = ["mystnb.unknown_mime_type"]

# Notebooks run while the site is built, and an error in one fails the build. Their outputs are
# cached in _build until the notebook's text changes; a change of the library does not rerun them.
nb_execution_mode = "cache"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "deflist", "colon_fence", "attrs_block"]
myst_heading_anchors = 4
myst_links_external_new_tab = False

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True
autosummary_generate = False
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_preprocess_types = False
python_maximum_signature_line_length = 80
default_role = "name"

html_theme = "sphinx_book_theme"
html_title = "led_jax"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {
    "navbar_persistent": [],  # The search field is in the sidebar.
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    "use_download_button": False,
    "use_fullscreen_button": False,
}

PUBLIC = ["led_jax", "led_jax.checkpoints", "led_jax.interop"] + [
    f"led_jax.{name}" for name in led_jax.__all__ if inspect.ismodule(getattr(led_jax, name))
]


def public_names(module: object) -> list[str]:
    """The names in a module's `__all__`; without one, the functions and classes it defines."""
    if hasattr(module, "__all__"):
        return module.__all__
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isfunction(value) or inspect.isclass(value))
        and value.__module__ == module.__name__
    ]


def check_reference(app: Sphinx, env: BuildEnvironment) -> None:
    """Warns, which fails the build, of every public name that no page documents."""
    documented = {*env.domains["py"].objects, *env.domains["py"].modules}
    modules = [importlib.import_module(name) for name in PUBLIC]
    for module in modules:
        for name in public_names(module):
            value = getattr(module, name)
            places = {f"{m.__name__}.{name}" for m in modules if getattr(m, name, None) is value}
            if not places & documented:
                logging.getLogger(__name__).warning(f"{module.__name__}.{name} is on no page")


def skip_fields(app: Sphinx, what: str, name: str, value: object, skip: bool, options) -> bool:
    """Leaves out a NamedTuple's fields, which the class's "Attributes" describe."""
    return skip or type(value).__name__ == "_tuplegetter"


def name_role(role, rawtext, text, lineno, inliner, options=None, content=()):
    """Renders a docstring's `text` as a link if it is a name in the reference, else as code."""
    if re.fullmatch(r"[A-Za-z_][\w.]*\w", text):
        return PyXRefRole()("py:obj", rawtext, text, lineno, inliner)
    return [nodes.literal(rawtext, text)], []


def escape_bars(
    app: Sphinx, what: str, name: str, value: object, options, lines: list[str]
) -> None:
    """Escapes bars outside of code and examples: log|det J| would be read as a substitution."""
    example = False
    for i, line in enumerate(lines):
        example = bool(line.strip()) and (example or line.lstrip().startswith(">>>"))
        if not example:
            parts = line.split("`")
            parts[::2] = [part.replace("|", "\\|") for part in parts[::2]]
            lines[i] = "`".join(parts)


def link_results(app: Sphinx, docname: str, source: list[str]) -> None:
    """Points links to tables in results/ to the files, as the tables are not pages of the site."""
    source[0] = re.sub(r"\]\((\.\./results/\w+\.md)\)", r"](path:\1)", source[0])


def setup(app: Sphinx) -> None:
    """Registers the above."""
    app.add_role("name", name_role)
    app.connect("source-read", link_results)
    app.connect("autodoc-process-docstring", escape_bars)
    app.connect("autodoc-skip-member", skip_fields)
    app.connect("env-check-consistency", check_reference)
