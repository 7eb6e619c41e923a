"""Every bad input ends in one clear line and a status, and changes nothing on disk.

All inputs of a binary are given to one process, one after the other.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import pytest
from support.devices import with_devices

from experiments.config import Config
from experiments.run import run
from led_jax.data.binarized_mnist import CACHE, PUBLISHED

pytestmark = [pytest.mark.usefixtures("fast_compile"), pytest.mark.slow]

SERVER = """
import contextlib, importlib, io, json, sys, traceback
from absl import app, flags
module = importlib.import_module(f"experiments.{sys.argv[1]}")
if sys.argv[1] == "train":
    from experiments.flags import define_flags
    define_flags()
answers = []
for args in json.load(sys.stdin):
    for name in flags.FLAGS:
        flags.FLAGS[name].unparse()
    flags.FLAGS.unparse_flags()
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            app.run(module.main, [sys.argv[1], *args])
        except SystemExit as error:  # As the interpreter does.
            status = error.code
            if isinstance(status, str):
                print(status)
                status = 1
        except BaseException:
            traceback.print_exc(file=output)
            status = 1
    answers.append([status or 0, output.getvalue()])
print(json.dumps(answers))
"""
RUN = Config(epochs=1, latent_dim=2, prior_depth=0, nll_samples=1)


class Case(NamedTuple):
    """A command line, in which DIR is the case's directory, prepared with a finished run in w."""

    binary: str
    args: str
    message: str
    prepare: Callable = lambda directory: shutil.rmtree(directory / "w")


def edited(**fields):
    """The run's configuration with other fields."""

    def prepare(directory):
        path = directory / "w" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))
        (directory / "w" / "result.json").unlink()

    return prepare


def written(name, content):
    """Writes this content to `name` in the case's directory."""

    def prepare(directory):
        path = directory / name
        if path.is_dir():
            shutil.rmtree(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    return prepare


def kept(directory):
    """Leaves the finished run as it is."""


def looping(directory):
    (directory / "loop").symlink_to("loop")


def unfinished(directory):
    (directory / "w" / "result.json").unlink()


def damaged(directory):
    unfinished(directory)
    for path in (directory / "w" / "checkpoints").rglob("d/*"):
        path.write_bytes(b"")


def half_deleted(directory):
    unfinished(directory)
    shutil.rmtree(directory / "w" / "checkpoints" / "1" / "arrays")


def without_checkpoints(directory):
    shutil.rmtree(directory / "w" / "checkpoints")


def checkpoints_file(directory):
    unfinished(directory)
    without_checkpoints(directory)
    (directory / "w" / "checkpoints").write_text("x")


def amat(size):
    """The three published files, all zero bytes: of `size`, or of their own sizes if it is None."""

    def prepare(directory):
        for published in PUBLISHED.values():
            with (directory / published.file).open("wb") as file:
                file.truncate(published.rows * 784 * 2 if size is None else size)

    return prepare


def one_amat(directory):
    (directory / PUBLISHED["train"].file).write_bytes(b"0 1\n")


def cache(make):
    """A packed cache with these arrays."""

    def prepare(directory):
        arrays = {split: make(published.rows) for split, published in PUBLISHED.items()}
        np.savez_compressed(directory / CACHE, **arrays)

    return prepare


def npz(**arrays):
    """own.npz with these arrays; no file without arrays."""

    def prepare(directory):
        if arrays:
            np.savez(directory / "own.npz", **arrays)

    return prepare


MNIST = "--dataset=binarized_mnist --data_dir=DIR --workdir=DIR/new"
CASES = [
    Case("train", f"--workdir=DIR/new {flag}", message)
    for flag, message in [
        ("--objective=iwae", "missing a required argument: 'num_samples'"),
        ("--objective=iwae:num_samples=0", "num_samples must be 1 or more, got 0"),
        ("--objective=bernoulli", "--objective=bernoulli is no objective"),
        ("--objective=vae", "--objective=vae is no constructor"),
        ("--optimizer=adamw:decay=1", "--optimizer=adamw:decay=1 is no constructor"),
        ("--optimizer=stl", "--optimizer=stl makes no optimizer: stl has no argument"),
        ("--ema=1", "--ema must be in [0, 1), got 1.0"),
        ("--patience=-1", "--patience must be 0 or more, got -1"),
        ("--prior_depth=-1", "--prior_depth must be 0 or more, got -1"),
        ("--posterior_depth=-2", "--posterior_depth must be 0 or more, got -2"),
        ("--latent_dim=-1", "--latent_dim must be positive, got -1"),
        ("--latent_dim=1", "does not split an event of shape (1,)"),
        ("--latent_dim=many", "invalid literal for int"),
        ("--epochs=-5", "--epochs must be positive, got -5"),
        ("--epochs=1.5", "flag --epochs=1.5"),
        ("--batch_size=0", "--batch_size must be positive, got 0"),
        ("--batch_size=5000", "--batch_size=5000 is more than digits's 1297 training rows"),
        ("--learning_rate=0", "--learning_rate must be positive, got 0.0"),
        ("--learning_rate=nan", "--learning_rate must be positive, got nan"),
        ("--learning_rate=inf", "--learning_rate must be positive, got inf"),
        ("--learning_rate=fast", "could not convert string to float"),
        ("--warmup=1", "--warmup must be in [0, 1), got 1.0"),
        ("--kl_warmup=-0.1", "--kl_warmup must be in [0, 1), got -0.1"),
        ("--clip_norm=-1", "--clip_norm must be 0 or more, got -1.0"),
        ("--clip_norm=nan", "--clip_norm must be 0 or more, got nan"),
        ("--seed=-1", "--seed must be 0 or more, got -1"),
        ("--seed=4294967296", "--seed must be less than 2**32"),
        ("--nll_samples=0", "--nll_samples must be positive, got 0"),
        ("--prior_hidden=a,3", "--prior_hidden must be positive widths"),
        ("--prior_hidden=", "--prior_hidden must be positive widths"),
        ("--posterior_hidden=-3", "--posterior_hidden must be positive widths"),
        ("--posterior_context=-2", "--posterior_context must be 0 or more, got -2"),
        ("--network=transformer", "value should be one of <"),
        ("--prior=maf", "--prior=maf is none of nvp, made, pixelcnn, nor a constructor"),
        ("--posterior=iaf:width=2", "iaf has no argument width"),
        ("--posterior=iaf:hidden=2", "iaf: missing a required argument: 'depth'"),
        ("--binarize=sometimes", "value should be one of <static|dynamic>"),
        ("--dataset=no_such_set", "data set 'no_such_set': expected digits, binarized_mnist"),
        ("--data_dir=absent", "absent' is not an existing directory"),
        ("--devices=-1", "--devices must be 0 or more, got -1"),
        ("--devices=3", "--devices: expected 1 to 2 cpu devices (0 takes all), got num_devices=3"),
        ("--batch_size=25", "--batch_size=25 does not divide over 2 devices"),
        ("--parallel=shard_map", "value should be one of <jit|pmap>"),
        ("--parallel=pmap --data_placement=host", "needs --data_placement=device, got 'host'"),
        ("--data_placement=disk", "value should be one of <device|host>"),
        ("--checkpoint_minutes=-1", "--checkpoint_minutes must be 0 or more, got -1.0"),
        ("--checkpoint_minutes=nan", "--checkpoint_minutes must be 0 or more, got nan"),
        ("--checkpoint_epochs=-1", "--checkpoint_epochs must be 0 or more, got -1"),
        ("--checkpoints_kept=0", "--checkpoints_kept must be positive, got 0"),
        ("--max_skipped=-1", "--max_skipped must be 0 or more, got -1"),
        ("--coordinator=nowhere", "--coordinator must be HOST:PORT or auto, got 'nowhere'"),
        ("--coordinator=localhost:99999", "--coordinator must be HOST:PORT or auto"),
        ("--coordinator=localhost:9", "needs --num_processes and --process_id"),
        ("--num_processes=2", "--num_processes and --process_id need --coordinator"),
        (
            "--coordinator=localhost:9 --num_processes=2 --process_id=2",
            "--process_id must be less than --num_processes=2, got 2",
        ),
        ("--num_processes=0", "not an integer in the range [1, 2147483647]"),
        ("--process_id=-1", "is not a non-negative integer"),
        *(
            (f"--{name}={10**20}", f"--{name} must be less than 2**31, got 1000")
            for name in ("epochs", "latent_dim", "prior_depth", "nll_samples", "checkpoint_epochs")
        ),
        (f"--prior_hidden=2,{10**20}", "--prior_hidden must be less than 2**31, got (2, 1000"),
        ("--colour=red", "Unknown command line flag 'colour'"),
        ("stray", "unknown arguments: stray"),
    ]
] + [
    Case("train", "--workdir=DIR/w", "is not a directory", written("w", b"x")),
    Case("train", "--workdir=DIR/w/config.json/x", "w/config.json is not a directory but", kept),
    Case("train", "--workdir=DIR/loop/x", "loop is not a directory but", looping),
    Case("train", "--workdir=DIR/\udcff", r"\udcff' must be UTF-8; name another one"),
    Case("sweep", "--workdir=DIR/w/config.json/x", "w/config.json is not a directory but", kept),
    Case("evaluate", "--workdir=DIR/loop", "loop is not a directory but", looping),
    Case("train", "--workdir=DIR/v", "it is not a run's directory", written("v/thesis.tex", b"x")),
    Case("train", "--workdir=DIR/w", "config.json cannot be", written("w/config.json", b"{")),
    Case("train", "--workdir=DIR/w", "expected a dict", written("w/config.json", b"[1]")),
    Case("train", "--workdir=DIR/w", "config.json cannot be", written("w/config.json", b"\xff\0")),
    Case(
        "train", "--workdir=DIR/w", "config.json cannot be", written("w/config.json", b"[" * 9999)
    ),
    Case("train", "--workdir=DIR/w", "expected at most", written("w/config.json", b" " * 2**21)),
    Case("train", "--workdir=DIR/w", "it also has colour", edited(colour="red")),
    Case("train", "--workdir=DIR/w", "--epochs must be a whole number, got", edited(epochs="many")),
    Case("train", "--workdir=DIR/w", "--dataset must be like 'digits', got 3", edited(dataset=3)),
    Case("train", "--workdir=DIR/w", "--prior_hidden must be like", edited(prior_hidden="9")),
    Case("train", "--workdir=DIR/w --seed=1", "--seed is 0 there and 1 here", unfinished),
    Case("train", "--workdir=DIR/w", "result.json cannot be", written("w/result.json", b"[]")),
    Case("train", "--workdir=DIR/w", "all 1 checkpoints in", damaged),
    Case("train", "--workdir=DIR/w", "all 1 checkpoints in", half_deleted),
    Case("train", "--workdir=DIR/w", "expected a directory of checkpoints", checkpoints_file),
    Case("train", "--workdir=DIR/w", "is of another model", edited(latent_dim=3)),
    Case("train", "--workdir=DIR/w", "--binarize is static there and", edited(binarize="dynamic")),
    Case("train", "--workdir=DIR/w", "--epochs is 1 there and 2 here", edited(epochs=2)),
    Case("train", "--workdir=DIR/w", "result.json cannot be", written("w/result.json", b"")),
    Case("evaluate", "--workdir=DIR/w", "--seed is 0 there and 1 here", edited(seed=1)),
    Case("train", MNIST, "looked for binarized_mnist_packed.npz"),
    Case("train", MNIST, "lacks binarized_mnist_valid.amat", one_amat),
    Case("train", MNIST, "truncated or altered", amat(100)),
    Case("train", MNIST, "SHA-256 is", amat(None)),
    Case("train", MNIST, "cannot be read as a packed data set", written(CACHE, b"PK nothing")),
    Case("train", MNIST, "unpacks to", cache(lambda n: np.zeros((n, 784), np.uint8))),
    Case("train", MNIST, "train is uint8 (50000, 9)", cache(lambda n: np.zeros((n, 9), np.uint8))),
    Case("train", MNIST, "SHA-256 is", cache(lambda n: np.zeros((n, 98), np.uint8))),
    Case("train", MNIST, "cannot be read", cache(lambda n: np.array([{}] * 9, object))),
    Case("train", f"{MNIST} --binarize=dynamic", "already binary"),
    *(
        Case("train", f"--dataset=own.npz --data_dir=DIR --workdir=DIR/new {flag}", message, own)
        for flag, own, message in [
            ("", npz(), "own.npz is not an existing file"),
            ("", npz(train=np.full((9, 2), 7)), "own: train has values from 7 to 7"),
            ("", npz(train=np.array([{}] * 9)), "holds Python objects, which are never unpickled"),
            ("", npz(x=np.zeros((9, 2))), "expected arrays train, valid and test, or train alone"),
            ("--split=0.8,0.2", npz(train=np.zeros((9, 2))), "expected three positive parts"),
            ("--split=most", npz(train=np.zeros((9, 2))), "--split must be three numbers"),
            ("--split=0.9,0.05,0.05", npz(train=np.zeros((9, 2))), "test empty"),
            ("--data_seed=-1", npz(train=np.zeros((9, 2))), "--data_seed must be 0 or more"),
            ("--decoder=gaussian", npz(), "missing a required argument: 'std'"),
            ("--decoder=stl", npz(), "--decoder=stl is no decoder, but stl()"),
            (
                "--decoder=flow --network=resconv",
                npz(train=np.zeros((999, 4, 4))),
                "--decoder=flow needs --network=mlp",
            ),
            (
                "--decoder=flow:mask=checkerboard",
                npz(train=np.zeros((999, 4))),
                "--decoder=flow:mask=checkerboard takes images [n, H, W] or [n, H, W, C]",
            ),
            (
                "--decoder=categorical:num_categories=3",
                npz(train=np.full((999, 4), 3)),
                "values from 3 to 3, expected whole numbers 0..2",
            ),
            ("--decoder=logistics", npz(), "--decoder=logistics is no constructor"),
            (
                "--decoder=discretized_logistic",
                npz(train=np.full((99, 2), 0.5)),
                "values from 0.5 to 0.5, expected whole numbers 0..255",
            ),
            (
                "--network=resconv",
                npz(train=np.zeros((999, 4))),
                "takes images [n, H, W] or [n, H, W, C]",
            ),
        ]
    ),
    Case("train", "--split=0.8,0.1,0.1 --workdir=DIR/new", "'digits' has splits"),
    Case("evaluate", "", "--workdir is required"),
    Case("evaluate", "--workdir=DIR/absent", "not a run's directory"),
    Case("evaluate", "--workdir=DIR/w --split=best", "value should be one of <train|valid|test>"),
    Case("evaluate", "--workdir=DIR/w --nll_samples=0", "is not a positive integer"),
    Case("evaluate", "--workdir=DIR/w", "has no checkpoint yet", without_checkpoints),
    Case("evaluate", "--workdir=DIR/w", "all 1 checkpoints in", damaged),
    Case("evaluate", "--workdir=DIR/w --data_dir=absent", "not an existing", unfinished),
    Case("sweep", "", "--workdir is required"),
    Case("sweep", "--workdir=DIR/new --table=7", "--table must be one of"),
    Case("sweep", "--workdir=DIR/new --columns=cnn", "--columns of table 1 are"),
    Case("sweep", "--workdir=DIR/new --seeds=x", "--seeds must be different whole numbers"),
    Case("sweep", "--workdir=DIR/new --seeds=1,1", "--seeds must be different whole numbers"),
    Case("sweep", "--workdir=DIR/new --epochs=-1", "is not a non-negative integer"),
    Case("sweep", "--workdir=DIR/new --seeds=0,00", "--seeds must be different whole numbers"),
    Case("sweep", "--workdir=DIR/new --seeds=", "--seeds must be different whole numbers"),
    Case("sweep", "--workdir=DIR/new --data_dir=absent --columns=mlp_prior", "4 of 4 runs failed"),
]


def snapshot(directory):
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """For each case: status, output, and the files before and after."""
    root = tmp_path_factory.mktemp("bad")
    run(RUN, root / "finished")
    for i, case in enumerate(CASES):
        directory = root / str(i)
        shutil.copytree(root / "finished", directory / "w")
        case.prepare(directory)
    before = [snapshot(root / str(i)) for i in range(len(CASES))]
    found = [None] * len(CASES)

    def ask(binary):
        numbers = [i for i, case in enumerate(CASES) if case.binary == binary]
        args = [CASES[i].args.replace("DIR", str(root / str(i))).split() for i in numbers]
        done = subprocess.run(
            [sys.executable, "-c", SERVER, binary],
            input=json.dumps(args),
            env=os.environ | {"XLA_FLAGS": with_devices(2)},
            capture_output=True,
            text=True,
            cwd=root,
        )
        assert done.returncode == 0, done.stderr
        for i, answer in zip(numbers, json.loads(done.stdout.splitlines()[-1]), strict=True):
            found[i] = (*answer, before[i], snapshot(root / str(i)))

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(ask, ("train", "evaluate", "sweep")))
    assert not (root / "runs").exists()
    return found


@pytest.mark.parametrize("i", range(len(CASES)), ids=lambda i: f"{CASES[i].binary} {CASES[i].args}")
def test_a_bad_input_is_one_clear_line(answers, i):
    status, output, before, after = answers[i]
    assert status == 1
    assert "Traceback" not in output
    assert sum(CASES[i].message in line for line in output.splitlines()) == 1, output
    assert after == before
