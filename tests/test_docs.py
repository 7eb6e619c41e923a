"""The code of README and of the documentation runs, each page in order and in one namespace."""

import dataclasses
import doctest
import importlib
import json
import pkgutil
import re
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import led_jax
from experiments.config import Config
from experiments.flags import from_flags

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
    """The table's counts are of the blocks after the imports, without blanks and comments."""
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


COMMAND = re.compile(r"^ *python -m (experiments\.[\w.]+)((?:.*\\\n)*.*)", re.M)
SHELLS = ["README.md", "CONTRIBUTING.md"] + [
    str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").rglob("*.md"))
]
FIELDS = {field.name for field in dataclasses.fields(Config)}
PARSE = """
import json, os, runpy, sys
import experiments.run  # Once for all.
for module, args in json.load(sys.stdin):
    child = os.fork()
    if not child:
        sys.argv = [module, *args]
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            os._exit(bool(end.code))  # To tear down JAX takes seconds.
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        sys.exit(f"refused: {module} {' '.join(args)}")
"""


def test_commands_are_accepted(tmp_path):
    """Checks all flags; for trainings also their values; for sweeps also what they would run."""
    commands = []
    for page in SHELLS:
        for module, rest in COMMAND.findall((ROOT / page).read_text()):
            args = shlex.split(rest.replace("\\\n", ""), comments=True)
            if module == "experiments.train" and "--prior_from=RUN" not in args:
                from_flags([arg for arg in args if re.findall(r"\w+", arg)[0] in FIELDS])
            check = "--dry_run" if module == "experiments.sweep" else "--only_check_args"
            commands.append((module, [*args, check]))
    assert {module for module, _ in commands} >= {"experiments.train", "experiments.report"}
    child = subprocess.run(
        [sys.executable, "-c", PARSE],
        input=json.dumps(commands),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert not child.returncode, child.stderr
    assert not list(tmp_path.iterdir())


MODULES = [info.name for info in pkgutil.walk_packages(led_jax.__path__, "led_jax.")]


@pytest.mark.slow
@pytest.mark.parametrize("name", MODULES)
def test_doctests(name):
    module = importlib.import_module(name)
    names = {"jax": jax, "jnp": jnp, "np": np}
    assert doctest.testmod(module, extraglobs=names).failed == 0


# Constructors without a doctest: classes, and one that takes a module of the user's.
WITHOUT = {"LED", "MLP", "ResConvDecoder", "ResConvEncoder", "gaussian_encoder"}


def test_public_constructors_have_a_doctest():
    text = "".join(path.read_text() for path in (ROOT / "led_jax").rglob("*.py"))
    found = re.findall(r'^@constructor\n(?:def|class) (\w+).*?"""(.*?)"""', text, re.M | re.S)
    assert {name for name, documentation in found if ">>>" not in documentation} == WITHOUT
