"""The code of README and of the documentation runs, each page in order and in one namespace."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import led_jax

pytestmark = pytest.mark.usefixtures("fast_compile")

ROOT = Path(__file__).parents[1]
EXTENDING = "docs/tutorials/extending.md"
FENCE = re.compile(r"^```(?:python|\{code-cell\})\n(.*?)^```", re.M | re.S)
# The build of the site runs the other tutorials; this one's code is tested, too.
PAGES = ["README.md", EXTENDING] + [
    str(path.relative_to(ROOT))
    for path in sorted((ROOT / "docs").rglob("*.md"))
    if "```python" in path.read_text()
]


def blocks(page):
    return FENCE.findall((ROOT / page).read_text())


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_code_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": page}
    for block in blocks(page):
        exec(compile(block, page, "exec"), namespace)


def test_lines_are_counted():
    """Lines of code without blank ones and comments, of the blocks after the imports."""
    rows = re.findall(r"^\| .* \| `\w+` \| (\d+) \|", (ROOT / EXTENDING).read_text(), re.M)
    counts = [
        sum(bool(line.strip()) and not line.strip().startswith("#") for line in block.splitlines())
        for block in blocks(EXTENDING)[1 : 1 + len(rows)]
    ]
    assert rows and list(map(int, rows)) == counts


def anchor(heading):
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_somewhere(page):
    """The build of the site checks the links between its own pages."""
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", (ROOT / page).read_text()):
        path, _, name = target.partition("#")
        assert (ROOT / path).is_file(), target
        if name:
            headings = re.findall(r"^#+ (.*)$", (ROOT / path).read_text(), re.M)
            assert name in map(anchor, headings), target


MODULES = [info.name for info in pkgutil.walk_packages(led_jax.__path__, "led_jax.")]


@pytest.mark.slow
@pytest.mark.parametrize("name", MODULES)
def test_doctests(name):
    module = importlib.import_module(name)
    names = {"jax": jax, "jnp": jnp, "np": np}
    assert doctest.testmod(module, extraglobs=names).failed == 0


# The others describe types that flax makes, or take a module of the user's.
WITHOUT = {"LED", "MLP", "ResConvDecoder", "ResConvEncoder", "gaussian_encoder"}


def test_public_constructors_have_a_doctest():
    text = "".join(path.read_text() for path in (ROOT / "led_jax").rglob("*.py"))
    found = re.findall(r'^@constructor\n(?:def|class) (\w+).*?"""(.*?)"""', text, re.M | re.S)
    assert {name for name, documentation in found if ">>>" not in documentation} == WITHOUT
