import base64
import json
import re
import subprocess
import sys

import numpy as np

from experiments import plots
from experiments.config import Config
from experiments.flags import to_command

MEASURED = {"nll": 20.127, "nll_se": 0.5, "test_elbo": -21.0, "valid_elbo": -22.0}


def report(*args, cwd):
    command = [sys.executable, "-m", "experiments.report", *args]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


def test_a_report_has_what_differs_what_was_measured_and_the_pictures(tmp_path):
    for seed, prior in ((0, "nvp"), (1, "vamp:num_components=3")):
        run = tmp_path / "runs" / "deep" / f"<{seed}>"
        run.mkdir(parents=True)
        config = Config(seed=seed, prior=prior, nll_samples=seed + 1)
        error = {"nll_se": None} if seed else {}  # Of a single test row.
        result = (
            MEASURED
            | error
            | {"best_epoch": 7, "seconds_train": 3.4, "command": to_command(config)}
        )
        (run / "result.json").write_text(json.dumps(config.report() | result))
        plots.image_grid(run / "samples.png", np.full((2, 4, 4), seed), 2)
    done = report("--runs=runs", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["runs"] == 2
    markdown = (tmp_path / "runs" / "report.md").read_text()
    header, _, first, second = [line for line in markdown.splitlines() if line.startswith("|")]
    assert header.split(" | ")[1:3] == ["prior", "seed"] and "nll_samples" not in header
    assert first.startswith("| deep/<0> | nvp | 0 | 20.13 | 0.50 | -21.00 | -22.00 | 7 | 3 |")
    assert second.startswith("| deep/<1> | vamp:num_components=3 | 1 | 20.13 | - | -21.00 |")
    page = (tmp_path / "runs" / "report.html").read_text()
    assert "<h2>deep/&lt;1&gt;</h2>" in page and page.count("<tr>") == 3
    embedded = [base64.b64decode(data) for data in re.findall("base64,([^']*)'", page)]
    pictures = sorted((tmp_path / "runs").rglob("samples.png"))
    assert embedded == [picture.read_bytes() for picture in pictures]
    (tmp_path / "none").mkdir()
    none = report("--runs=none", cwd=tmp_path)
    assert none.returncode == 1
    assert none.stderr.splitlines()[-1].startswith("error: --runs=none holds no finished run")
