"""Executors, which train the runs of a sweep: here, in other processes, or on a SLURM cluster."""

import concurrent.futures
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import tqdm

from experiments import distributed
from experiments.config import Config
from experiments.run import read_result, run
from experiments.signals import Stop

Executor = Callable[
    [Mapping[str, Config], pathlib.Path, Stop | None], tuple[dict[str, dict[str, Any]], list[str]]
]
"""(runs by their directories' names, the sweep's directory, stop) -> results, names that failed."""


def here(
    runs: Mapping[str, Config], workdir: pathlib.Path, stop: Stop | None = None
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Trains one run after the other in this process.

    If a run fails, the others are still trained. With several processes the error is raised
    instead, because the other processes may still be in the failed run.
    """
    results, failed = {}, []
    for name, config in runs.items():
        tqdm.tqdm.write(f"== {name}", file=sys.stderr)
        try:
            results[name] = run(config, workdir / name, stop)
        except (*distributed.ERRORS, jax.errors.JaxRuntimeError) as error:
            if jax.process_count() > 1:
                raise
            tqdm.tqdm.write(f"error: {distributed.message_of(error)}", file=sys.stderr)
            failed.append(name)
    return results, failed


def submitted(
    cluster: str, parallel: int = 1, options: Mapping[str, Any] | None = None
) -> Executor:
    """Returns an executor that trains each run in a job of submitit.

    Logs are in "jobs" beside the runs' directories. A job that is preempted, or reaches its time
    limit, is queued again, and its run continues from its last checkpoint. A signal to this process
    cancels the jobs.

    Args:
      cluster: "local", for processes of this machine; "slurm", for a job array.
      parallel: jobs at a time.
      options: parameters of submitit's executor, such as timeout_min and slurm_partition.

    Raises:
      ValueError: if submitit is not installed.
    """
    try:
        import submitit  # The extra `sweep` installs it.
    except ImportError as error:
        raise ValueError(
            f"--executor={cluster} needs submitit: pip install -e '.[sweep]'"
        ) from error

    def execute(
        runs: Mapping[str, Config], workdir: pathlib.Path, stop: Stop | None = None
    ) -> tuple[dict[str, dict[str, Any]], list[str]]:
        workdir = workdir.resolve()
        there = {name: finished_there(config, workdir / name) for name, config in runs.items()}
        finished = {name: result for name, result in there.items() if result}
        executor = submitit.AutoExecutor(workdir / "jobs", cluster=cluster)
        defaults = {"timeout_min": 24 * 60, "slurm_array_parallelism": parallel}
        try:
            executor.update_parameters(**{"name": "led_jax"} | defaults | dict(options or {}))
        except (AssertionError, NameError) as error:
            raise ValueError(f"--submitit: {error}") from error
        jobs: dict[str, Any] = {}

        def cancel() -> str:
            for job in list(jobs.values()):
                job.cancel()
            return f"cancelled {len(jobs)} jobs"

        if stop is not None:
            stop.save = cancel
        calls = {name: (runs[name], workdir / name) for name in runs if name not in finished}
        if cluster == "slurm" and calls:  # SLURM limits how many run at a time.
            jobs.update(zip(calls, submit_array(executor, list(calls.values())), strict=True))

        def wait(name: str) -> None:
            if name not in jobs:
                jobs[name] = executor.submit(RunJob(), *calls[name])
            jobs[name].wait()

        with concurrent.futures.ThreadPoolExecutor(parallel) as pool:
            list(pool.map(wait, calls))
        failed = []
        for name, job in jobs.items():
            # The result is read from the run's directory, not from the job: a local job may have
            # the number of an earlier one, and find the logs of that one.
            result = finished_there(*calls[name]) if job.exception() is None else None
            if result is not None:
                finished[name] = result
            else:
                tqdm.tqdm.write(f"error: {name} failed: see {job.paths.stderr}", file=sys.stderr)
                failed.append(name)
        results = {name: finished[name] for name in runs if name in finished}
        return results, [name for name in runs if name in failed]

    return execute


def finished_there(config: Config, workdir: pathlib.Path) -> dict[str, Any] | None:
    """A run's result, if it is on disk, valid and for as many samples of both kinds; else None.

    What is wrong with a result is left to `run` to report.
    """
    try:
        result = read_result(config, workdir)
    except ValueError:
        return None
    return result if result and config.has_samples(result) else None


def submit_array(executor: Any, calls: Sequence[tuple[Config, pathlib.Path]]) -> list[Any]:
    """Submits the calls of `RunJob` as one array of jobs."""
    with executor.batch():
        return [executor.submit(RunJob(), *call) for call in calls]


class RunJob:
    """`run` as submitit calls it, and submits it again after a time-out or preemption."""

    def __call__(self, config: Config, workdir: pathlib.Path) -> dict[str, Any]:
        """Trains a run, or continues where it stopped."""
        return run(config, workdir)

    def checkpoint(self, config: Config, workdir: pathlib.Path) -> Any:
        """Returns what is submitted again: this call, which continues from the last checkpoint."""
        import submitit

        return submitit.helpers.DelayedSubmission(self, config, workdir)
