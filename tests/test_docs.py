"""The code of README and of the documentation runs, each page in order and in one namespace."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "docs/extending.md"]


def blocks(page):
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S)


@pytest.mark.parametrize("page", PAGES)
def test_code_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": page}
    for block in blocks(page):
        exec(compile(block, page, "exec"), namespace)


def test_lines_are_counted():
    """Lines of code without blank ones and comments, of the blocks after the imports."""
    rows = re.findall(
        r"^\| .* \| `\w+` \| (\d+) \|", (ROOT / "docs/extending.md").read_text(), re.M
    )
    counts = [
        sum(bool(line.strip()) and not line.strip().startswith("#") for line in block.splitlines())
        for block in blocks("docs/extending.md")[1 : 1 + len(rows)]
    ]
    assert rows and list(map(int, rows)) == counts
