"""The configuration of a run, and the checks of its fields."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from led_jax import descriptions, sharding

TRANSFORMERS = ("additive", "affine", "gated", "rational_quadratic", "deep_sigmoid")
"""The elementwise maps of `led_jax.flows` that the flags name."""

FLOWS = {"nvp": "real_nvp", "made": "iaf", "pixelcnn": "iaf"}
"""Short name of a flow -> constructor. Only these take --prior_depth, --posterior_depth etc."""

_MASKS = ("random", "checkerboard", "channel")
_MASK_HELP = "Masks of nvp; random ones for fully connected layers, the others for convolutions."


# Fields about the places of files and the times of checkpoints, which do not describe the result.
_OF_THE_MACHINE = ("data_dir", "checkpoint_minutes", "checkpoint_epochs", "checkpoints_kept")

OF_THE_POSTERIOR = (
    *("dataset", "data_dir", "split", "data_seed", "binarize", "condition"),
    *("network", "decoder", "weight_norm"),
    *("latent_dim", "latent_shape", "posterior", "posterior_mask", "posterior_depth"),
    *("posterior_hidden", "posterior_transformer", "posterior_context"),
)
"""Fields that determine a run's data, encoder, posterior and decoder."""

# Fields on which other fields' defaults depend.
_FIRST = ("dataset", "network", "latent_shape")


def _field(default: Any, help: str, *, free: bool = False, choices: tuple[str, ...] = ()) -> Any:
    return dataclasses.field(
        default=default, metadata={"help": help, "free": free, "choices": choices}
    )


@dataclasses.dataclass(frozen=True)
class Config:
    """The configuration of a run; each field has a flag of the same name.

    If a field is None, or the decoder is "default", its value depends on other fields: see the
    properties `num_epochs`, `latent_size`, `likelihood` and `num_matching_samples`. Fields marked
    free may change when a run is resumed.

    Raises:
      ValueError: if a field is invalid, or does not go with the others.
    """

    dataset: str = _field(
        "digits",
        "digits, binarized_mnist, caltech101_silhouettes, freyfaces, mnist or another name of "
        "tensorflow-datasets, or FILE.npz in --data_dir, with arrays train, valid and test, or "
        "train alone.",
    )
    data_dir: str = _field(
        "",
        "Directory of binarized_mnist's .amat files, of caltech101_silhouettes_28_split1.npz, "
        "freyfaces.npz or mnist_grey.npz, of tensorflow-datasets, or of FILE.npz.",
        free=True,
    )
    split: str = _field(
        "",
        "Fractions of FILE.npz's array train that become train, valid and test, if it has no "
        "others; by default 0.8,0.1,0.1.",
    )
    data_seed: int = _field(
        0, "Seed of FILE.npz's and freyfaces' splits and of static binarization."
    )
    binarize: str = _field(
        "static",
        "Binarize grey images once, or afresh for every step, for --decoder=bernoulli; other "
        "decoders take the grey levels.",
        choices=("static", "dynamic"),
    )
    condition: str = _field(
        "",
        "labels trains p(x|c), where c are the data's labels, one-hot. FILE.npz has them in arrays "
        "train_labels and so on, which may also be covariates [n, C].",
        choices=("", "labels"),
    )
    network: str = _field(
        "mlp",
        "Encoder and decoder: 2 x 200 ReLU units, or residual convolutions.",
        choices=("mlp", "resconv"),
    )
    decoder: str = _field(
        "default",
        "Likelihood p(x|z), a constructor with its arguments. bernoulli takes black and white "
        "pixels. discretized_logistic takes levels 0..255. categorical:num_categories=K takes "
        "0..K-1. gaussian:std=0.1 and learned_gaussian:scale=one, entry or network take any "
        "numbers, and so do flow, a conditional Real NVP between network and x "
        "(flow:mask=checkerboard for images), and other constructors of flows. The default is "
        "discretized_logistic for freyfaces, bernoulli for all other data.",
    )
    weight_norm: bool = _field(False, "Normalize the weights of resconv's layers.")
    latent_dim: int | None = _field(
        None,
        "Number of latent variables; by default the product of --latent_shape, without it 50 for "
        "mlp and 32 for resconv.",
    )
    latent_shape: tuple[int, ...] = _field(
        (), "H,W,C: resconv's latent variables are a map, with no fully connected layers."
    )
    prior: str = _field(
        "nvp",
        "Prior p(z): nvp (Real NVP), made or pixelcnn (masked autoregressive flows), set by "
        "--prior_depth, --prior_hidden, --prior_mask and --prior_transformer. Or a constructor of "
        "a flow, a density or a prior with its arguments, as nvp:depth=4,hidden=100 or "
        "mixture_of_normals:num_components=9.",
    )
    prior_mask: str = _field("random", _MASK_HELP, choices=_MASKS)
    prior_depth: int = _field(4, "L_prior: prior layers; 0 keeps N(0, I).")
    prior_hidden: tuple[int, ...] = _field((100,), "Hidden widths of each prior layer.")
    prior_transformer: str = _field(
        "affine", "Elementwise map of each prior layer.", choices=TRANSFORMERS
    )
    prior_from: str = _field(
        "",
        "Directory of a finished run, whose encoder, posterior and decoder are held fixed, so that "
        "only the prior is fitted. Data, network, posterior and decoder are those of that run.",
    )
    posterior: str = _field(
        "made",
        "Flow of the posterior q(z|x): made or pixelcnn (inverse autoregressive flows), or nvp; "
        "or a constructor of a flow with its arguments, as for --prior.",
    )
    posterior_mask: str = _field("random", _MASK_HELP, choices=_MASKS)
    posterior_depth: int = _field(0, "L_post: posterior layers; 0 keeps the Gaussian.")
    posterior_hidden: tuple[int, ...] = _field((512, 512), "Hidden widths of each layer.")
    posterior_transformer: str = _field(
        "default",
        "Elementwise map of each posterior layer; default: affine for nvp, a gate for the others.",
        choices=("default", *TRANSFORMERS),
    )
    posterior_context: int = _field(
        0,
        "Width of the encoder's context that every posterior layer reads; with --latent_shape, its "
        "number of maps. 0: no context.",
    )
    epochs: int | None = _field(
        None, "Passes over the training split; by default 200 for digits, 400 otherwise."
    )
    batch_size: int = _field(100, "Rows a step.")
    optimizer: str = _field(
        "adam", "adam, adamax or adamw:weight_decay=W, each a constructor with its arguments."
    )
    learning_rate: float = _field(
        2e-3, "The optimizer's peak rate; it decays to 0 along a cosine over all epochs."
    )
    warmup: float = _field(0.0, "Fraction of the training in which the rate rises to its peak.")
    objective: str = _field(
        "elbo",
        "What is minimised, a constructor with its arguments: elbo (or elbo:free_bits=NATS), stl, "
        "iwae:num_samples=K, dreg:num_samples=K, mmd or adversarial.",
    )
    kl_warmup: float = _field(
        0.1, "Fraction of the training in which the weight of elbo's KL rises to 1."
    )
    ema: float = _field(
        0.0,
        "Decay of a moving average of the parameters, say 0.999, which is then validated, "
        "evaluated and saved; 0 does not average.",
    )
    patience: int = _field(
        0,
        "Epochs without a better validation bound after which training ends; 0 never ends early.",
    )
    clip_norm: float = _field(0.0, "Largest global norm of the gradient; 0 does not clip.")
    seed: int = _field(0, "Seed of everything random but the data's split and binarization.")
    nll_samples: int = _field(5000, "Importance samples for each test image.", free=True)
    matching_samples: int | None = _field(
        None,
        "Draws that split the KL of the test images into I(x; z) and KL(q(z) || p(z)); 0 does not "
        "split it. Default: --nll_samples, or 0 with --posterior_context, because each draw then "
        "inverts the posterior's flow once for each test image. Another number than that of a "
        "finished run measures the run again.",
        free=True,
    )
    devices: int = _field(0, "Devices of each process; 0 takes all it has.", free=True)
    parallel: str = _field(
        "jit",
        "How several devices share a batch: jit runs one program over all of them, pmap one on "
        "each.",
        free=True,
        choices=sharding.METHODS,
    )
    data_placement: str = _field(
        "device",
        "Where training images are kept: whole on each device, or on the host, from which each "
        "step's batch is read in advance.",
        free=True,
        choices=("device", "host"),
    )
    checkpoint_minutes: float = _field(1.0, "Minutes between checkpoints.", free=True)
    checkpoint_epochs: int = _field(
        0, "Epochs between checkpoints; 0 goes by the minutes alone.", free=True
    )
    checkpoints_kept: int = _field(
        2, "Number of newest checkpoints to keep; each holds the best state, too.", free=True
    )
    max_skipped: int = _field(
        10, "Updates that may be skipped for a NaN or an infinity before the run stops.", free=True
    )

    def __post_init__(self) -> None:
        """Checks every field."""
        for field in dataclasses.fields(self):
            _check_type(field, getattr(self, field.name))
        positive = ("batch_size", "learning_rate", "nll_samples", "checkpoints_kept")
        not_negative = (
            "prior_depth",
            "posterior_depth",
            "posterior_context",
            "clip_norm",
            "patience",
        )
        not_negative += (
            "seed",
            "data_seed",
            "matching_samples",
            "devices",
            "checkpoint_minutes",
            "checkpoint_epochs",
            "max_skipped",
        )
        for name in ("latent_dim", "epochs", *positive):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"--{name} must be positive, got {value}")
        for name in not_negative:
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"--{name} must be 0 or more, got {getattr(self, name)}")
        for field in dataclasses.fields(self):
            value, choices = getattr(self, field.name), field.metadata["choices"]
            if choices and value not in choices:
                raise ValueError(
                    f"--{field.name} must be one of {', '.join(choices)}, got {value!r}"
                )
            bits = 32 if field.name == "seed" else 31  # Sizes and counters are int32.
            entries = value if isinstance(value, tuple) else (value,)
            if any(isinstance(entry, int) and entry >= 2**bits for entry in entries):
                raise ValueError(f"--{field.name} must be less than 2**{bits}, got {value}")
        try:
            self.split_parts  # noqa: B018
        except ValueError as error:
            raise ValueError(
                f"--split must be three numbers, as 0.8,0.1,0.1, got {self.split!r}"
            ) from error
        if self.weight_norm and self.network != "resconv":
            raise ValueError(f"--weight_norm needs --network=resconv, got {self.network!r}")
        if self.parallel == "pmap" and self.data_placement != "device":
            raise ValueError(
                f"--parallel=pmap needs --data_placement=device, got {self.data_placement!r}"
            )
        self._check_constructors()
        self._check_latent_shape()
        for name in ("warmup", "kl_warmup", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"--{name} must be in [0, 1), got {getattr(self, name)}")

    def _check_constructors(self) -> None:
        if self.prior_from and self.objective != _defaults()["objective"]:
            raise ValueError(
                f"--prior_from has an objective of its own, prior_only; got {self.objective!r}"
            )
        for name in ("decoder", "objective", "optimizer"):
            try:
                descriptions.parse(
                    self.decoder_constructor if name == "decoder" else getattr(self, name)
                )
            except ValueError as error:
                raise ValueError(
                    f"--{name}={getattr(self, name)} is no constructor: {error}"
                ) from error
        optimizer, _ = descriptions.parse(self.optimizer)
        if self.prior_from and "weight_decay" in descriptions.parameters(optimizer):
            raise ValueError(
                f"--optimizer={optimizer} decays what --prior_from holds fixed; take one without"
            )
        for part in ("prior", "posterior"):
            text = getattr(self, part)
            kind, colon, rest = text.partition(":")
            if text in FLOWS:
                continue
            try:
                descriptions.parse(FLOWS.get(kind, kind) + colon + rest)
            except ValueError as error:
                raise ValueError(
                    f"--{part}={text} is none of {', '.join(FLOWS)}, nor a constructor with its "
                    f"arguments: {error}"
                ) from error
            for name in ("mask", "depth", "hidden", "transformer"):
                field = f"{part}_{name}"
                if getattr(self, field) != _defaults()[field]:
                    raise ValueError(f"--{field} goes with {', '.join(FLOWS)} alone, not {text!r}")

    def _check_latent_shape(self) -> None:
        if not self.latent_shape:
            for name in ("prior", "posterior", "prior_mask", "posterior_mask"):
                if getattr(self, name) in ("pixelcnn", "checkerboard", "channel"):
                    raise ValueError(f"--{name}={getattr(self, name)} needs --latent_shape=H,W,C")
        elif len(self.latent_shape) != 3 or min(self.latent_shape) < 1:
            raise ValueError(f"--latent_shape must be H,W,C, got {self.latent_shape}")
        elif self.network != "resconv":
            raise ValueError(f"--latent_shape needs --network=resconv, got {self.network!r}")
        elif self.latent_size != math.prod(self.latent_shape):
            raise ValueError(
                f"--latent_dim is {self.latent_dim} and --latent_shape={self.latent_shape} has "
                f"{math.prod(self.latent_shape)} entries; leave --latent_dim away"
            )

    @property
    def split_parts(self) -> tuple[float, ...] | None:
        """The numbers of --split, if it is given."""
        return tuple(map(float, self.split.split(","))) if self.split else None

    @property
    def likelihood(self) -> str:
        """The value of --decoder, with "default" replaced by the likelihood for the data set."""
        if self.decoder != "default":
            return self.decoder
        return "discretized_logistic" if self.dataset == "freyfaces" else "bernoulli"

    @property
    def decoder_constructor(self) -> str:
        """`likelihood`, with the short name "flow" replaced by that of its constructor."""
        kind, colon, rest = self.likelihood.partition(":")
        return {"flow": "real_nvp"}.get(kind, kind) + colon + rest

    @property
    def num_epochs(self) -> int:
        """Passes over the training split."""
        return self.epochs or (200 if self.dataset == "digits" else 400)

    @property
    def latent_size(self) -> int:
        """Number of latent variables."""
        default = 50 if self.network == "mlp" else 32
        return self.latent_dim or math.prod(self.latent_shape or (default,))

    @property
    def num_matching_samples(self) -> int:
        """Draws that split the KL; 0 for none."""
        given = self.matching_samples
        return self._default_matching_samples if given is None else given

    @property
    def _default_matching_samples(self) -> int:
        return 0 if self.posterior_context else self.nll_samples

    def record(self) -> dict[str, Any]:
        """The value of every field; values that depend on other fields are resolved."""
        return vars(self) | {
            "epochs": self.num_epochs,
            "latent_dim": self.latent_size,
            "decoder": self.likelihood,
            "matching_samples": self.num_matching_samples,
        }

    def has_samples(self, result: Mapping[str, Any]) -> bool:
        """Whether a result has this configuration's numbers of NLL and of matching samples."""
        names = ("nll_samples", "matching_samples")
        return all(result[name] == self.record()[name] for name in names)

    def fixed(self) -> dict[str, Any]:
        """The fields of `record` that may not change when a run is resumed, as JSON has them."""
        fields = {name: value for name, value in self.record().items() if name not in FREE}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in fields.items()
        }

    def differing(self, there: Mapping[str, Any]) -> str:
        """Says which fields of `fixed` a record from a file lacks or has otherwise; "" if none."""
        return "; ".join(
            f"--{name} is {there.get(name, 'missing')} there and {value} here"
            for name, value in self.fixed().items()
            if name not in there or there[name] != value
        )

    def report(self) -> dict[str, Any]:
        """The fields that a result repeats: all but `_OF_THE_MACHINE`."""
        return {name: value for name, value in self.record().items() if name not in _OF_THE_MACHINE}

    def changes(self) -> dict[str, Any]:
        """The fields of `report` that differ from their defaults.

        For fields other than data set, network and latent shape, the defaults are those of a
        configuration with the same data set, network and latent shape; that of `matching_samples`
        is the one for this configuration's other fields.
        """
        plain = Config().record()
        like = Config(**{name: getattr(self, name) for name in _FIRST}).record()
        defaults = like | {name: plain[name] for name in _FIRST}
        defaults["matching_samples"] = self._default_matching_samples
        return {name: value for name, value in self.report().items() if value != defaults[name]}

    def identity(self) -> dict[str, Any]:
        """The fields of `changes` that are not free: configurations with equal ones are one run."""
        return {name: value for name, value in self.changes().items() if name not in FREE}


FREE = tuple(field.name for field in dataclasses.fields(Config) if field.metadata["free"])
"""Names of the fields that may change when a run is resumed."""


def _defaults() -> dict[str, Any]:
    return {field.name: field.default for field in dataclasses.fields(Config)}


def _check_type(field: dataclasses.Field, value: Any) -> None:
    """Raises ValueError unless a value, say from a file, is of its field's type."""
    default = field.default
    if isinstance(default, tuple):
        right = isinstance(value, tuple) and all(type(width) is int for width in value)
    elif default is None:
        right = value is None or type(value) is int
    else:
        right = type(value) is type(default) or (type(default) is float and type(value) is int)
    if not right:
        like = "a whole number" if default is None else f"like {default!r}"
        raise ValueError(f"--{field.name} must be {like}, got {value!r}")
