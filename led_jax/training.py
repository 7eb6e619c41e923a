"""Training: a state, one step, one epoch as one compiled program, and the selection of the best.

Everything is written for whole batches. `epochs` is the only training loop; `fit` iterates over it.
"""

import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache, partial, wraps
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from led_jax import optimizers
from led_jax.checks import checked
from led_jax.data import Dataset, gather
from led_jax.model import LED
from led_jax.objectives import Objective, elbo
from led_jax.sharding import AXIS, METHODS, Placement, one_device

Params = Any
Average = Callable[[Any], Any]

INIT_ROWS = 1000
"""Largest number of training rows that the `init` of a model and an objective are given."""

_ADVICE = "Train again with a lower learning rate, or with the gradient's norm clipped"

_BLOCK_STEPS = 100
"""Number of steps whose rows are sent to the devices together, if data stay on the host."""


class Model(Protocol):
    """A model that can be trained: a `LED`, a `Density`, or any other that an objective takes."""

    @property
    def init(self) -> Callable[..., Params]:
        """`(key, x) -> params`, or `(key, x, context)`, for rows x of the data."""
        ...


class ScoreFn(Protocol):
    """Scores the validation split."""

    def __call__(self, model: Any, params: Params, key: Array, x: Array, /) -> dict[str, Array]:
        """Returns scores by name, `[n]` for the rows x `[n, *x_shape]`; their means are reported.

        If the data have contexts, these, `[n, C]`, are passed as a fifth argument.
        """
        ...


class TrainState(NamedTuple):
    """Everything that the next epoch depends on.

    Attributes:
      params: the model's parameters.
      own: the objective's parameters, `()` for most objectives.
      opt_state: the optimizer's state.
      key: the run's key. It stays the same; epochs and steps derive theirs with `fold_in`.
      epoch: number of finished epochs, an int32 scalar.
    """

    params: Params
    own: Params
    opt_state: optax.OptState
    key: Array
    epoch: Array

    @property
    def eval_params(self) -> Params:
        """The model's parameters to validate, to evaluate and to keep.

        The averaged parameters if the optimizer is `optimizers.averaged`; else `params`.
        """
        return optimizers.average_of(self.opt_state, (self.params, self.own))[0]


class Progress(NamedTuple):
    """The results of training after an epoch, and everything that is needed to continue.

    Attributes:
      state: the state after the epoch.
      best: the state with the best validation score so far; without validation, the last state.
      history: a record for each validated epoch: "epoch", the means of the objective's metrics as
        "train_NAME", and the means of the validation's scores as "valid_NAME".
      best_score: the best validation score, -inf before the first validation.
      skipped: number of updates that were skipped because they were not finite, over all epochs.
      train: means of the objective's metrics over the epoch's steps, except skipped ones; empty if
        all were skipped.
      seconds: wall time of the epoch's steps, without compilation. Exception: with data on the
        host, the first epoch includes it, because programs are compiled at their first block.
      compile_seconds: time to compile the epoch's program, 0 if an earlier epoch did.
    """

    state: TrainState
    best: TrainState
    history: tuple[dict[str, float], ...] = ()
    best_score: float = -np.inf
    skipped: int = 0
    train: dict[str, float] = {}
    seconds: float = 0.0
    compile_seconds: float = 0.0

    @property
    def epoch(self) -> int:
        """Number of finished epochs."""
        return int(self.state.epoch)

    @property
    def params(self) -> Params:
        """The model's parameters in the best state, averaged ones if the optimizer averages."""
        return self.best.eval_params


def to_record(progress: Progress) -> tuple[dict[str, TrainState], dict[str, Any]]:
    """Splits a progress for `checkpoints`: states "last" and "best", and the rest as JSON values.

    To read it again, call `checkpoints.restore` with `state_shape` under both names, and then
    `from_record`.
    """
    record = progress._asdict()
    return {"last": record.pop("state"), "best": record.pop("best")}, record


def from_record(trees: Mapping[str, TrainState], record: Mapping[str, Any]) -> Progress:
    """The inverse of `to_record`; ignores other entries of the record."""
    rest = {name: record[name] for name in Progress._fields if name not in ("state", "best")}
    rest["history"] = tuple(rest["history"])
    return Progress(trees["last"], trees["best"], **rest)


class Steps(NamedTuple):
    """The results of the steps of an epoch, or of a part of one.

    Attributes:
      metrics: the objective's metrics `[num_steps]`, batch means.
      updated: `[num_steps]`, False where an update was skipped.
    """

    metrics: dict[str, Array]
    updated: Array


def adam(
    learning_rate: float,
    num_steps: int,
    *,
    warmup_steps: int = 0,
    clip_norm: float | None = None,
) -> optax.GradientTransformation:
    """Adam under a linear warm-up and a cosine decay to zero: see `optimizers.scheduled`."""
    return optimizers.scheduled(
        optax.adam, learning_rate, num_steps, warmup_steps=warmup_steps, clip_norm=clip_norm
    )


def bound_terms(
    model: Any, params: Params, key: Array, x: Array, context: Array | None = None
) -> dict[str, Array]:
    """The ELBO and its three terms, each `[n]` in nats, with one draw of z for each row."""
    terms = model.elbo(params, key, x, context=context)
    return {"elbo": terms.bound, **terms._asdict()}


@checked
def init_state(
    model: Model,
    optimizer: optax.GradientTransformation,
    key: Array,
    x: Array,
    objective: Objective | None = None,
    context: Array | None = None,
    given: Mapping[str, Params] | None = None,
) -> TrainState:
    """A fresh state.

    Args:
      model: the model.
      optimizer: the optimizer.
      key: the run's key.
      x: rows of the data `[n, *x_shape]`, after `Dataset.prepare`.
      objective: what is minimised; None takes `objectives.elbo()`.
      context: `[n, C]`, what the model is conditional on; None if it is not.
      given: parameters of some parts of the model, if its `init` takes them as `LED.init` does.
    """
    if isinstance(model, LED):
        model.check_data(x)
    init = _compiled_init(model, optimizer, objective or elbo())
    return init(key, x, *_given(context), given=given)


def state_shape(
    model: Model,
    optimizer: optax.GradientTransformation,
    x: Any,
    objective: Objective | None = None,
    context: Any = None,
) -> TrainState:
    """The shapes and dtypes of a state, as `jax.ShapeDtypeStruct`: nothing is computed.

    Args:
      model: the model.
      optimizer: the optimizer.
      x: rows of the data after `Dataset.prepare`, or their shape and dtype.
      objective: as in `init_state`.
      context: as in `init_state`, or its shape and dtype.
    """
    init = partial(_init_state, model, optimizer, objective or elbo())
    return jax.eval_shape(init, jax.eval_shape(jax.random.key, 0), x, *_given(context))


def once_for_equal(build: Callable[..., Any]) -> Callable[..., Any]:
    """Has `build` return for equal arguments what it returned before: the same compiled programs.

    Arguments count as equal only if their types, and those of all entries of tuples within them,
    are equal as well: tuples compare equal whatever their class, and a subclass of a model may
    compute something else.
    """

    @lru_cache(maxsize=16)
    def cached(types: Any, *args: Any) -> Any:
        return build(*args)

    @wraps(build)
    def build_once(*args: Any) -> Any:
        try:
            hash(args)
        except TypeError:  # A part of the model or the objective is not hashable.
            return build(*args)
        return cached(_types(args), *args)

    return build_once


def _types(value: Any) -> Any:
    """The type of a value, and the types of all entries of a tuple."""
    return (type(value), *map(_types, value)) if isinstance(value, tuple) else type(value)


@once_for_equal
def _compiled_init(
    model: Model, optimizer: optax.GradientTransformation, objective: Objective
) -> Any:
    """`_init_state`, compiled at the lowest optimisation level: it runs once or a few times."""
    init = partial(_init_state, model, optimizer, objective)
    return jax.jit(init, compiler_options={"xla_backend_optimization_level": 0})


def _init_state(
    model: Model,
    optimizer: optax.GradientTransformation,
    objective: Objective,
    key: Array,
    x: Array,
    *context: Array,
    given: Mapping[str, Params] | None = None,
) -> TrainState:
    init_key, run_key = jax.random.split(key)
    params_key, own_key = jax.random.split(init_key)
    params = model.init(params_key, x, *context, **({"given": given} if given else {}))
    own = objective.init(own_key, model, params, x, *context)
    opt_state = optimizer.init((params, own))
    return TrainState(params, own, opt_state, run_key, jnp.zeros((), jnp.int32))


def _given(context: Any) -> tuple[Any, ...]:
    """The context as a tuple of arguments, empty for None: functions may lack the argument."""
    return () if context is None else (context,)


@checked
def train_step(
    model: Model,
    optimizer: optax.GradientTransformation,
    objective: Objective,
    trained: tuple[Params, Params],
    opt_state: optax.OptState,
    key: Array,
    x: Array,
    step: Array | int,
    average: Average = lambda tree: tree,
    context: Array | None = None,
) -> tuple[tuple[Params, Params], optax.OptState, dict[str, Array]]:
    """One update on a batch.

    Args:
      model: the model.
      optimizer: the optimizer.
      objective: what is minimised.
      trained: parameters of the model and of the objective.
      opt_state: the optimizer's state.
      key: PRNG key of the step.
      x: the batch `[n, *x_shape]`.
      step: number of steps taken so far.
      average: applied to the gradient and the metrics, if each device computes a part of the batch.
      context: `[n, C]`, what the model is conditional on; None if it is not.

    Returns:
      The new `trained` and optimizer state, and the objective's metrics.
    """

    def loss(trained: tuple[Params, Params]) -> tuple[Array, dict[str, Array]]:
        return objective.loss(model, *trained, key, x, jnp.asarray(step), *_given(context))

    gradient, metrics = average(jax.grad(loss, has_aux=True)(trained))
    updates, opt_state = optimizer.update(gradient, opt_state, trained)
    trained = jax.tree.map(lambda p, u: p + u.astype(p.dtype), trained, updates)
    return trained, opt_state, metrics


@jax.jit
def is_finite(tree: Any) -> Array:
    """Whether no float in a pytree is NaN or infinite."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    # One reduction compiles several times as fast as one for each leaf.
    dtype = jnp.result_type(float)
    return jnp.isfinite(jnp.concatenate([leaf.astype(dtype).ravel() for leaf in leaves])).all()


def epoch_rows(state: TrainState, num_rows: int, batch_size: int) -> Array:
    """The row numbers of an epoch's batches, `[num_steps, batch_size]`, in random order.

    The last `num_rows % batch_size` rows of the order are left out: different ones in every epoch.
    """
    rows = jax.random.permutation(_epoch_keys(state)[0], num_rows)
    return rows[: num_rows - num_rows % batch_size].reshape(-1, batch_size)


class _Epoch(NamedTuple):
    """The computation of an epoch; the caller chooses the placement of arrays on devices.

    Attributes:
      model: the model.
      optimizer: the optimizer.
      objective: what is minimised.
      prepare: `Dataset.prepare`, which turns rows into a batch.
      batch_size: rows a step.
      num_steps: steps an epoch.
      skip_nonfinite: whether to keep the old state in steps whose new state or metrics would have
        a NaN or an infinity. If False, such a step makes all later ones non-finite, which
        `is_finite` detects at the end of the epoch; checking every step takes time.
    """

    model: Model
    optimizer: optax.GradientTransformation
    objective: Objective
    prepare: Callable[[Array, Array], Array]
    batch_size: int
    num_steps: int
    skip_nonfinite: bool = False

    def scan(
        self,
        state: TrainState,
        batches: Any,
        read: Callable[[Any], tuple[Array, ...]] = lambda batch: batch,
        first: Array | int = 0,
        of_part: Callable[[Array], Array] = lambda key: key,
        average: Average = lambda tree: tree,
    ) -> tuple[TrainState, Steps]:
        """Trains on k successive batches of an epoch.

        Args:
          state: the state before them.
          batches: `[k, ...]`, one entry for each step.
          read: maps an entry to the rows of its batch, and their contexts, as `Dataset.rows`.
          first: number of the first of these steps within the epoch.
          of_part: applied to a step's key, if each device computes a part of the batch.
          average: as in `train_step`.
        """
        step_key = _epoch_keys(state)[1]

        def step(carry: Any, inputs: tuple[Array, Any]) -> tuple[Any, Steps]:
            i, batch = inputs
            keys = jax.random.split(of_part(jax.random.fold_in(step_key, i)))
            rows, *context = read(batch)
            x = self.prepare(keys[1], rows)
            trained, opt_state, metrics = train_step(
                self.model,
                self.optimizer,
                self.objective,
                carry[0],
                carry[1],
                keys[0],
                x,
                state.epoch * self.num_steps + i,
                average,
                *(c.astype(x.dtype) for c in context),
            )
            new = trained, opt_state
            if not self.skip_nonfinite:
                return new, Steps(metrics, jnp.array(True))
            updated = is_finite((new, metrics))
            return jax.tree.map(partial(jnp.where, updated), new, carry), Steps(metrics, updated)

        length = len(jax.tree.leaves(batches)[0])
        numbers = first + jnp.arange(length)
        carry = (state.params, state.own), state.opt_state
        ((params, own), opt_state), steps = jax.lax.scan(step, carry, (numbers, batches))
        epoch = state.epoch + (first + length == self.num_steps)
        return TrainState(params, own, opt_state, state.key, epoch), steps


def _epoch_keys(state: TrainState) -> Array:
    """Two keys of an epoch: that of the order of its rows, and that of its steps."""
    return jax.random.split(jax.random.fold_in(state.key, state.epoch))


Rows = tuple[np.ndarray, ...]
"""The result of `Dataset.rows`: a split's rows, and their contexts if it has some."""

RunEpoch = Callable[[TrainState], tuple[TrainState, Steps]]


def _on_devices(epoch: _Epoch, rows: Rows, placement: Placement, state: TrainState) -> RunEpoch:
    """An epoch as one program; every device holds all training rows."""
    data = placement.replicate(rows)
    run = _program(epoch, placement)
    # Compiles nothing if an equal epoch has run on rows of the same shape before.
    compiled = run.lower(state, data).compile()
    return lambda state: compiled(state, data)


@once_for_equal
def _program(epoch: _Epoch, placement: Placement) -> Any:
    @partial(jax.jit, out_shardings=placement.replicated)
    def run(state: TrainState, data: tuple[Array, ...]) -> tuple[TrainState, Steps]:
        order = epoch_rows(state, len(data[0]), epoch.batch_size)
        order = jax.lax.with_sharding_constraint(order, placement.rows(axis=1))
        return epoch.scan(state, order, lambda batch: tuple(a[batch] for a in data))

    return run


def _from_host(epoch: _Epoch, rows: Rows, placement: Placement, state: TrainState) -> RunEpoch:
    """An epoch whose training rows stay on the host, and are read in blocks ahead of their steps.

    Every process reads only the rows of its own devices.
    """

    @partial(jax.jit, out_shardings=placement.replicated)
    def run(
        state: TrainState, first: Array, batches: tuple[Array, ...]
    ) -> tuple[TrainState, Steps]:
        return epoch.scan(state, batches, first=first)

    order = jax.jit(epoch_rows, static_argnums=(1, 2), out_shardings=placement.replicated)

    def take(array: np.ndarray, block: np.ndarray) -> Array:
        shape = (*block.shape, *array.shape[1:])
        return placement.split(shape, lambda part: array[block[part[:2]]], axis=1)

    def blocks(indices: np.ndarray) -> Iterator[tuple[Array, ...]]:
        starts = np.split(indices, range(_BLOCK_STEPS, len(indices), _BLOCK_STEPS))
        return gather(starts, lambda block: tuple(take(array, block) for array in rows))

    def run_epoch(state: TrainState) -> tuple[TrainState, Steps]:
        first, parts = 0, []
        for batches in blocks(np.asarray(order(state, len(rows[0]), epoch.batch_size))):
            state, steps = run(state, placement.replicate(np.int32(first)), batches)
            parts.append(steps)
            first += len(batches[0])
        return state, jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)

    return run_epoch


def _by_pmap(epoch: _Epoch, rows: Rows, placement: Placement, state: TrainState) -> RunEpoch:
    """`_on_devices` by `jax.pmap`: each device computes a part of every batch.

    Gradients and metrics are averaged over devices, so the objective must be a mean over rows. Each
    device folds its index into the steps' keys: random numbers differ from those of one device.
    """
    data, size = placement.replicate(rows), placement.mesh.size

    def on_device(_: Array, state: TrainState, data: tuple[Array, ...]) -> tuple[TrainState, Steps]:
        device = jax.lax.axis_index(AXIS)
        order = epoch_rows(state, len(data[0]), epoch.batch_size)
        return epoch.scan(
            state,
            order.reshape(len(order), size, -1)[:, device],
            lambda batch: tuple(a[batch] for a in data),
            of_part=lambda key: jax.random.fold_in(key, device),
            average=lambda tree: jax.lax.pmean(tree, AXIS),
        )

    mapped = jax.pmap(
        on_device,
        AXIS,
        in_axes=(0, None, None),
        out_axes=None,
        devices=list(placement.mesh.devices.flat),
    )
    numbers = placement.split((size,), lambda part: np.arange(size)[part])
    compiled = mapped.lower(numbers, state, data).compile()
    return lambda state: compiled(numbers, state, data)


@checked
def begin(
    model: Model,
    optimizer: optax.GradientTransformation,
    dataset: Dataset,
    key: Array,
    objective: Objective | None = None,
    given: Mapping[str, Params] | None = None,
) -> Progress:
    """The `Progress` before the first epoch, with which `epochs` begins.

    As the `resume` of `epochs` it starts training from given parts of the model.

    Args:
      model: what to train.
      optimizer: any optax transformation.
      dataset: its first `INIT_ROWS` training rows, prepared, are passed to `init`.
      key: PRNG key of the run, as in `epochs`.
      objective: what is minimised; None takes `objectives.elbo()`.
      given: as in `init_state`.
    """
    prepare_key, state_key = jax.random.split(key)
    rows, *context = dataset.rows("train")
    x = jax.jit(dataset.prepare)(prepare_key, jnp.asarray(rows[:INIT_ROWS]))
    some = [jnp.asarray(c[:INIT_ROWS], x.dtype) for c in context]
    state = init_state(model, optimizer, state_key, x, objective, *some, given=given)
    return Progress(state, state)


@checked
def epochs(
    model: Model,
    optimizer: optax.GradientTransformation,
    dataset: Dataset,
    key: Array,
    *,
    objective: Objective | None = None,
    batch_size: int = 100,
    score: ScoreFn = bound_terms,
    select: str | Callable[[dict[str, float]], float] = "elbo",
    valid_every: int = 1,
    num_epochs: int | None = None,
    patience: int | None = None,
    placement: Placement | None = None,
    on_host: bool = False,
    method: str = "jit",
    max_skipped: int = 10,
    resume: Progress | None = None,
) -> Iterator[Progress]:
    """Trains, and yields a `Progress` after every epoch.

    If an epoch ends with a state or metrics that are not finite, it is run once more from its
    start, with every step checked and non-finite updates skipped.

    Args:
      model: what to train.
      optimizer: any optax transformation.
      dataset: its `train` rows are trained on, its `valid` rows are validated on; `test` is not
        touched.
      key: PRNG key of the run: the same key gives the same parameters.
      objective: what is minimised; None takes `objectives.elbo()`.
      batch_size: rows a step, on all devices together. Rows that do not fill a batch are left out,
        different ones in every epoch.
      score: the scores of the rows of the validation split.
      select: name of the score whose mean selects the best state, or a function of the means of all
        scores by name; larger is better.
      valid_every: epochs between validations; epoch `num_epochs` is always validated.
      num_epochs: the epoch to stop after; None never stops.
      patience: epochs without a better validation score after which training stops; None never
        stops.
      placement: the devices to train on; None takes one.
      on_host: whether to keep the training rows in the host's memory and read them ahead of each
        step; otherwise every device holds all of them.
      method: how several devices share a batch. "jit" runs one program and splits its rows over the
        devices, with the same random numbers as on one device; "pmap" runs one program for each
        device.
      max_skipped: largest number of updates that may be skipped because they are not finite.
      resume: `Progress` of an earlier call, to continue as if it had not stopped.

    Yields:
      `Progress`. The buffers of its states are not reused: the caller may keep them.

    Raises:
      ValueError: if an argument is not as described, or there are fewer rows than batch_size.
      FloatingPointError: if more than max_skipped updates are not finite, or the selected
        validation score is not.
    """
    objective = objective or elbo()
    placement = placement or one_device()
    rows = dataset.rows("train")
    train, *context = rows
    _check_epochs(len(train), batch_size, valid_every, patience, placement, on_host, method)
    epoch = _Epoch(
        model, optimizer, objective, dataset.prepare, batch_size, len(train) // batch_size
    )
    if resume is None:
        resume = begin(model, optimizer, dataset, key, objective)
    progress = resume._replace(
        state=placement.replicate(resume.state), best=placement.replicate(resume.best)
    )
    build = _from_host if on_host else _by_pmap if method == "pmap" else _on_devices
    programs: dict[bool, RunEpoch] = {}

    def run(state: TrainState, skip_nonfinite: bool) -> tuple[TrainState, Steps, float]:
        compile_seconds = 0.0
        if skip_nonfinite not in programs:
            start = time.perf_counter()
            checked = epoch._replace(skip_nonfinite=skip_nonfinite)
            programs[skip_nonfinite] = build(checked, rows, placement, state)
            compile_seconds = time.perf_counter() - start
        return *programs[skip_nonfinite](state), compile_seconds

    validate = _validation(model, score, dataset, placement)
    while not is_finished(progress, num_epochs, patience):
        start = time.perf_counter()
        state, steps, compile_seconds = run(progress.state, False)
        if not is_finite((state, steps)):
            state, steps, more_seconds = run(progress.state, True)
            compile_seconds += more_seconds
        steps = jax.device_get(steps)
        seconds = time.perf_counter() - start - compile_seconds
        skipped = _count_skipped(progress, steps, max_skipped)
        metrics = {
            name: float(np.mean(values[steps.updated], dtype=np.float64))
            for name, values in steps.metrics.items()
            if steps.updated.any()
        }
        progress = progress._replace(
            state=state,
            skipped=skipped,
            train=metrics,
            seconds=seconds,
            compile_seconds=compile_seconds,
        )
        number = progress.epoch
        if validate is None:
            progress = progress._replace(best=state)
        elif number % valid_every == 0 or number == num_epochs:
            progress = _select(progress, validate(state), select)
        yield progress


def is_finished(progress: Progress, num_epochs: int | None, patience: int | None = None) -> bool:
    """Whether `epochs` stops after this progress: at num_epochs, or out of patience."""
    stalled = progress.epoch - int(progress.best.epoch)
    return (num_epochs is not None and progress.epoch >= num_epochs) or (
        patience is not None and stalled >= patience
    )


def _check_epochs(
    num_rows: int,
    batch_size: int,
    valid_every: int,
    patience: int | None,
    placement: Placement,
    on_host: bool,
    method: str,
) -> None:
    if not 1 <= batch_size <= num_rows:
        raise ValueError(
            f"epochs: batch_size must be from 1 to the {num_rows} training rows, got {batch_size}"
        )
    if batch_size % placement.mesh.size:
        raise ValueError(
            f"epochs: batch_size={batch_size} does not divide over {placement.mesh.size} devices"
        )
    if patience is not None and patience < 1:
        raise ValueError(f"epochs: patience must be 1 or more, or None, got {patience}")
    if patience is not None and patience < valid_every:
        raise ValueError(
            f"epochs: patience={patience} ends training before valid_every={valid_every} epochs "
            "have been validated once; take a patience of as many or more"
        )
    if method not in METHODS:
        raise ValueError(f"epochs: method must be one of {', '.join(METHODS)}, got {method!r}")
    if method == "pmap" and on_host:
        raise ValueError("epochs: method='pmap' needs the data on the devices; take 'jit'")
    if jax.config.jax_disable_jit:  # pyright: ignore[reportAttributeAccessIssue]
        raise ValueError(
            "epochs: an epoch is one compiled program, and jit is disabled: unset JAX_DISABLE_JIT, "
            "or to look into a step, differentiate the objective's loss yourself"
        )


def _validation(
    model: Model, score: ScoreFn, dataset: Dataset, placement: Placement, batch_size: int = 1000
) -> Callable[[TrainState], dict[str, float]] | None:
    """The function that scores a state on the whole validation split; None if that is empty."""
    num_rows = len(dataset.valid)
    if not num_rows:
        return None
    rows = placement.replicate(dataset.rows("valid"))
    measure = _measurement(model, score, min(batch_size, num_rows), placement)

    def validate(state: TrainState) -> dict[str, float]:
        means = jax.device_get(measure(state, rows))
        return {name: float(value) for name, value in means.items()}

    return validate


@once_for_equal
def _measurement(model: Model, score: ScoreFn, size: int, placement: Placement) -> Any:
    @partial(jax.jit, out_shardings=placement.replicated)
    def measure(state: TrainState, rows: tuple[Array, ...]) -> dict[str, Array]:
        # Different random numbers from those of the training steps.
        key = jax.random.fold_in(state.key, zlib.crc32(b"validation"))
        key = jax.random.fold_in(key, state.epoch)

        def batch(i: Array, rows: tuple[Array, ...]) -> dict[str, Array]:
            x, *context = (a.astype(jnp.promote_types(a.dtype, jnp.float32)) for a in rows)
            return score(model, state.eval_params, jax.random.fold_in(key, i), x, *context)

        num_rows = len(rows[0])
        whole = num_rows // size
        batches = tuple(a[: whole * size].reshape(whole, size, *a.shape[1:]) for a in rows)
        parts = jax.lax.map(lambda args: batch(*args), (jnp.arange(whole), batches))
        parts = [jax.tree.map(jnp.ravel, parts)]
        if num_rows % size:
            parts.append(batch(jnp.array(whole), tuple(a[whole * size :] for a in rows)))
        return jax.tree.map(lambda *leaves: jnp.concatenate(leaves).mean(), *parts)

    return measure


def _select(
    progress: Progress, valid: dict[str, float], select: str | Callable[[dict[str, float]], float]
) -> Progress:
    """Adds a record to the history, and keeps the state if it is the best."""
    if isinstance(select, str) and select not in valid:
        raise ValueError(f"epochs: select={select!r} is none of the scores {', '.join(valid)}")
    number = progress.epoch
    value = valid[select] if isinstance(select, str) else select(valid)
    if not np.isfinite(value):
        name = select if isinstance(select, str) else "score"
        raise FloatingPointError(
            f"the validation's {name} is {value} after epoch {number}. {_ADVICE}"
        )
    record = {
        "epoch": number,
        **{f"train_{name}": mean for name, mean in progress.train.items()},
        **{f"valid_{name}": mean for name, mean in valid.items()},
    }
    progress = progress._replace(history=(*progress.history, record))
    if value > progress.best_score:
        progress = progress._replace(best=progress.state, best_score=value)
    return progress


def _count_skipped(progress: Progress, steps: Steps, max_skipped: int) -> int:
    skipped = np.flatnonzero(~np.asarray(steps.updated))
    left, total = max_skipped - progress.skipped, progress.skipped + len(skipped)
    if len(skipped) > left:
        raise FloatingPointError(
            f"the objective or its gradient is not finite in step {skipped[left] + 1} of epoch "
            f"{progress.epoch + 1}: {total} updates were skipped for that so far, more than "
            f"max_skipped={max_skipped}. {_ADVICE}"
        )
    return total


@checked
def fit(
    model: Model,
    optimizer: optax.GradientTransformation,
    dataset: Dataset,
    key: Array,
    num_epochs: int,
    *,
    callback: Callable[[Progress], object] = lambda progress: None,
    resume: Progress | None = None,
    **options: Any,
) -> Progress:
    """Trains for a number of epochs, or with `patience` until the validation score stops rising.

    Args:
      model: what to train.
      optimizer: any optax transformation.
      dataset: what to train and to validate on.
      key: PRNG key of the run.
      num_epochs: total number of epochs, including those of `resume`.
      callback: called with the `Progress` of each epoch, for example for a progress bar.
      resume: `Progress` of an earlier call, to continue from.
      **options: as in `epochs`, among them objective, batch_size, patience and placement.

    Returns:
      The last `Progress`: `progress.params` are the best state's parameters.

    Raises:
      ValueError: if num_epochs is not positive, or as in `epochs`.
      FloatingPointError: as in `epochs`.
    """
    progress = resume
    for progress in epochs(
        model, optimizer, dataset, key, num_epochs=num_epochs, resume=resume, **options
    ):
        callback(progress)
    assert progress is not None  # At least one epoch has been trained, here or before.
    return progress
