"""The configuration of a run: its flags, its model and its record on disk."""

import dataclasses
import functools
import json
import math
import os
import pathlib
from typing import Any

from absl import app, flags, logging

from led_jax import densities, flows, networks, parallel
from led_jax.data import Dataset
from led_jax.model import LED

_TRANSFORMERS = {
    "additive": flows.additive,
    "affine": flows.affine,
    "gated": flows.gated,
    "rational_quadratic": flows.rational_quadratic,
    "deep_sigmoid": flows.deep_sigmoid,
}
_FLOWS = ("nvp", "made", "pixelcnn")
_MASKS = ("random", "checkerboard", "channel")
_MASK_HELP = "Masks of nvp; random ones for fully connected layers, the others for convolutions."


def _field(default: Any, help: str, *, free: bool = False, choices: tuple[str, ...] = ()) -> Any:
    return dataclasses.field(
        default=default, metadata={"help": help, "free": free, "choices": choices}
    )


_MAX_JSON_BYTES = 2**20

# Fields that say where and how often files are read and written, and nothing of the result.
_OF_THE_MACHINE = ("data_dir", "checkpoint_minutes", "checkpoint_epochs", "checkpoints_kept")

# Fields on which other fields' defaults depend.
_FIRST = ("dataset", "network", "latent_shape")


@dataclasses.dataclass(frozen=True)
class Config:
    """What a run is, one flag a field. Fields marked free may change when a run is resumed."""

    dataset: str = _field("digits", "digits, binarized_mnist, or a tensorflow-datasets name.")
    data_dir: str = _field(
        "", "Directory of binarized_mnist's .amat files, or of tensorflow-datasets.", free=True
    )
    binarize: str = _field(
        "static", "Binarize grey images once, or afresh each epoch.", choices=("static", "dynamic")
    )
    network: str = _field(
        "mlp",
        "Encoder and decoder: 2 x 200 ReLU units, or residual convolutions.",
        choices=("mlp", "resconv"),
    )
    weight_norm: bool = _field(False, "Normalize the weights of resconv's layers.")
    latent_dim: int = _field(
        0, "Number of latent variables; 0: latent_shape's, else 50 for mlp and 32 for resconv."
    )
    latent_shape: tuple[int, ...] = _field(
        (), "H,W,C: resconv's latent variables are a map, with no fully connected layers."
    )
    prior: str = _field(
        "nvp",
        "Flow of the prior p(z): Real NVP, or a masked autoregressive flow.",
        choices=_FLOWS,
    )
    prior_mask: str = _field("random", _MASK_HELP, choices=_MASKS)
    prior_depth: int = _field(4, "L_prior: prior layers; 0 keeps N(0, I).")
    prior_hidden: tuple[int, ...] = _field((100,), "Hidden widths of each prior layer.")
    prior_transformer: str = _field(
        "affine", "Elementwise map of each prior layer.", choices=tuple(_TRANSFORMERS)
    )
    posterior: str = _field(
        "made",
        "Flow of the posterior q(z|x): an inverse autoregressive flow, or Real NVP.",
        choices=_FLOWS,
    )
    posterior_mask: str = _field("random", _MASK_HELP, choices=_MASKS)
    posterior_depth: int = _field(0, "L_post: posterior layers; 0 keeps the Gaussian.")
    posterior_hidden: tuple[int, ...] = _field((512, 512), "Hidden widths of each layer.")
    posterior_transformer: str = _field(
        "default",
        "Elementwise map of each posterior layer; default: affine for nvp, else a gate.",
        choices=("default", *_TRANSFORMERS),
    )
    posterior_context: int = _field(
        0,
        "Width of the encoder's context for every posterior layer, in maps if the latent variables "
        "are one; 0 for none.",
    )
    epochs: int = _field(0, "Passes over the training split; 0: 200 for digits, 400 otherwise.")
    batch_size: int = _field(100, "Rows a step.")
    learning_rate: float = _field(2e-3, "Adam's peak rate; it decays to 0 along a cosine.")
    warmup: float = _field(0.0, "Part of the training over which the rate rises to its peak.")
    kl_warmup: float = _field(0.1, "Part of the training over which the KL's weight rises to 1.")
    clip_norm: float = _field(0.0, "Largest global norm of the gradient; 0 does not clip.")
    seed: int = _field(0, "Seed of everything random but the data's split and binarization.")
    nll_samples: int = _field(5000, "Importance samples for each test image.", free=True)
    devices: int = _field(0, "Devices of each process; 0 takes all it has.", free=True)
    parallel: str = _field(
        "pmap", "How several devices share a batch.", free=True, choices=parallel.METHODS
    )
    data_placement: str = _field(
        "device",
        "Where training images are: all on each device, or on the host, read ahead of every step.",
        free=True,
        choices=("device", "host"),
    )
    checkpoint_minutes: float = _field(1.0, "Minutes between checkpoints.", free=True)
    checkpoint_epochs: int = _field(
        0, "Epochs between checkpoints; 0 goes by the minutes alone.", free=True
    )
    checkpoints_kept: int = _field(2, "The newest checkpoints kept; each has the best.", free=True)
    max_skipped: int = _field(
        10, "Updates that may be skipped for a NaN or an infinity before the run stops.", free=True
    )

    def __post_init__(self) -> None:
        """Fills in defaults and checks every field."""
        for field in dataclasses.fields(self):
            _check_type(field.name, getattr(self, field.name), field.default)
        if self.epochs == 0:
            object.__setattr__(self, "epochs", 200 if self.dataset == "digits" else 400)
        if self.latent_dim == 0:
            default = 50 if self.network == "mlp" else 32
            size = math.prod(self.latent_shape) if self.latent_shape else default
            object.__setattr__(self, "latent_dim", size)
        for name in ("latent_shape", "prior_hidden", "posterior_hidden"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        positive = ("latent_dim", "epochs", "batch_size", "learning_rate", "nll_samples")
        positive += ("checkpoints_kept",)
        not_negative = ("prior_depth", "posterior_depth", "posterior_context", "clip_norm", "seed")
        not_negative += ("devices", "checkpoint_minutes", "checkpoint_epochs", "max_skipped")
        for name in positive:
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"--{name} must be positive, got {getattr(self, name)}")
        for name in not_negative:
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"--{name} must be 0 or more, got {getattr(self, name)}")
        if self.seed >= 2**32:
            raise ValueError(f"--seed must be less than 2**32, got {self.seed}")
        for field in dataclasses.fields(self):
            choices = field.metadata["choices"]
            if choices and getattr(self, field.name) not in choices:
                raise ValueError(
                    f"--{field.name} must be one of {', '.join(choices)}, "
                    f"got {getattr(self, field.name)!r}"
                )
        if self.weight_norm and self.network != "resconv":
            raise ValueError(f"--weight_norm needs --network=resconv, got {self.network!r}")
        self._check_latent_shape()
        for name in ("warmup", "kl_warmup"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"--{name} must be in [0, 1), got {getattr(self, name)}")

    def _check_latent_shape(self) -> None:
        if not self.latent_shape:
            for name in ("prior", "posterior", "prior_mask", "posterior_mask"):
                if getattr(self, name) in ("pixelcnn", "checkerboard", "channel"):
                    raise ValueError(f"--{name}={getattr(self, name)} needs --latent_shape=H,W,C")
        elif len(self.latent_shape) != 3 or min(self.latent_shape) < 1:
            raise ValueError(f"--latent_shape must be H,W,C, got {self.latent_shape}")
        elif self.network != "resconv":
            raise ValueError(f"--latent_shape needs --network=resconv, got {self.network!r}")
        elif self.latent_dim != math.prod(self.latent_shape):
            raise ValueError(
                f"--latent_dim is {self.latent_dim} and --latent_shape={self.latent_shape} has "
                f"{math.prod(self.latent_shape)} entries; leave --latent_dim away"
            )

    def to_command(self) -> str:
        """The command line that makes this run, without its machine's paths."""
        plain, like = Config(), Config(**{name: getattr(self, name) for name in _FIRST})
        args = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            default = getattr(plain if field.name in _FIRST else like, field.name)
            if field.name in _OF_THE_MACHINE or value == default:
                continue
            value = ",".join(map(str, value)) if isinstance(value, tuple) else value
            args.append(f"--{field.name}={value}")
        return " ".join(["python -m experiments.train", *args])


def build_led(config: Config, dataset: Dataset) -> LED:
    """The model of a configuration for a data set's images."""
    latent_shape = config.latent_shape or (config.latent_dim,)
    # The context is a vector, of maps too.
    context_dim = config.posterior_context * math.prod(config.latent_shape[:2]) or None
    posterior = _stack(
        config.posterior,
        latent_shape,
        config.posterior_depth,
        config.posterior_hidden,
        config.posterior_mask,
        _TRANSFORMERS.get(config.posterior_transformer),
        context_dim=context_dim,
        seed=1000,  # Other masks than the prior's.
    )
    prior = _stack(
        config.prior,
        latent_shape,
        config.prior_depth,
        config.prior_hidden,
        config.prior_mask,
        _TRANSFORMERS[config.prior_transformer],
    )
    if config.prior != "nvp" or config.prior_transformer == "deep_sigmoid":
        prior = flows.invert(prior)  # Scoring, which training does, needs no loop and no root.
    images, weight_norm = dataset.image_shape, config.weight_norm
    if config.network == "mlp":
        encoder = networks.mlp_encoder(config.latent_dim, context_dim=context_dim)
        decoder = networks.mlp_decoder(math.prod(images))
    elif config.latent_shape:
        height, width, channels = config.latent_shape
        encoder = networks.spatial_encoder(
            images,
            (height, width, channels),
            context_maps=config.posterior_context or None,
            weight_norm=weight_norm,
        )
        decoder = networks.spatial_decoder(
            images, (height, width, channels), weight_norm=weight_norm
        )
    else:
        encoder = networks.resconv_encoder(
            images, config.latent_dim, context_dim=context_dim, weight_norm=weight_norm
        )
        decoder = networks.resconv_decoder(images, weight_norm=weight_norm)
    return LED(
        encoder=encoder,
        posterior=posterior,
        prior=densities.transformed(densities.standard_normal(latent_shape), prior),
        decoder=decoder,
    )


def _stack(
    kind: str,
    event_shape: tuple[int, ...],
    depth: int,
    hidden: tuple[int, ...],
    mask: str,
    transformer: flows.Transformer | None,
    *,
    context_dim: int | None = None,
    seed: int = 0,
) -> flows.Flow:
    """The stack of layers that --prior or --posterior names; no transformer: its default."""
    if kind == "nvp":
        convnet = functools.partial(flows.convnet, event_shape)
        return flows.real_nvp(
            event_shape,
            depth,
            hidden,
            mask,
            transformer=transformer or flows.affine,
            context_dim=context_dim,
            seed=seed,
            conditioner=flows.mlp if mask == "random" else convnet,
        )
    pixelcnn = functools.partial(flows.pixelcnn, event_shape)
    return flows.iaf(
        event_shape,
        depth,
        hidden,
        context_dim,
        transformer=transformer,
        conditioner=flows.made if kind == "made" else pixelcnn,
    )


def start(argv: list[str]) -> None:
    """What every binary does first: it quietens logs and refuses stray arguments."""
    logging.set_verbosity(logging.WARNING)  # The checkpointing library reports every file.
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")


def required_workdir() -> pathlib.Path:
    """The directory that --workdir names, for binaries that choose none themselves."""
    if not flags.FLAGS.workdir:
        raise app.UsageError("--workdir is required")
    return pathlib.Path(flags.FLAGS.workdir).expanduser()


def define_flags() -> None:
    """Defines one flag for each field of `Config`."""
    define = {
        str: flags.DEFINE_string,
        int: flags.DEFINE_integer,
        float: flags.DEFINE_float,
        bool: flags.DEFINE_boolean,
    }
    for field in dataclasses.fields(Config):
        default: Any = field.default
        help, choices = field.metadata["help"], field.metadata["choices"]
        if choices:
            flags.DEFINE_enum(field.name, default, choices, help)
        elif isinstance(default, tuple):
            flags.DEFINE_list(field.name, list(map(str, default)), help)
        else:
            define[type(default)](field.name, default, help)


def config_from_flags(workdir: pathlib.Path) -> Config:
    """The run's configuration: the one on record in `workdir`, with the flags given beside it.

    Raises:
      ValueError: if a flag is invalid.
    """
    given = {}
    for field in dataclasses.fields(Config):
        flag = flags.FLAGS[field.name]
        if flag.present:
            value: Any = flag.value
            if field.name == "data_dir" and value:  # The run may go on from another directory.
                value = str(pathlib.Path(value).expanduser().resolve())
            widths = isinstance(field.default, tuple)
            given[field.name] = _parse_widths(field.name, value) if widths else value
    return dataclasses.replace(
        read_config(workdir) or Config(**{name: given[name] for name in _FIRST if name in given}),
        **given,
    )


def check_workdir(config: Config, workdir: pathlib.Path) -> None:
    """Makes sure that a directory is free for, or holds, a run of this configuration.

    Raises:
      ValueError: if it holds anything else.
    """
    recorded = read_config(workdir)
    differing = [
        f"--{field.name} is {getattr(recorded, field.name)} there and {value} here"
        for field in dataclasses.fields(Config)
        if recorded is not None
        and not field.metadata["free"]
        and (value := getattr(config, field.name)) != getattr(recorded, field.name)
    ]
    if differing:
        raise ValueError(
            f"{workdir} holds a run of another configuration: {'; '.join(differing)}. Leave these "
            "flags away to continue that run, or name another --workdir"
        )


def read_config(workdir: pathlib.Path) -> Config | None:
    """The configuration on record in a run's directory, or None if there is none.

    Raises:
      ValueError: if the record cannot be read, or the directory holds something else.
    """
    path = workdir / "config.json"
    if not path.exists():
        if workdir.exists() and not workdir.is_dir():
            raise ValueError(f"--workdir={workdir} is not a directory")
        if workdir.is_dir() and any(entry.suffix != ".tmp" for entry in workdir.iterdir()):
            raise ValueError(
                f"{workdir} has files in it but no config.json: it is not a run's directory. Name "
                "an empty or a new --workdir"
            )
        return None
    try:
        return Config(**(read_json(path) or {}))
    except TypeError as error:
        raise ValueError(f"{path} is not a run's configuration: {error}") from error


def read_json(path: pathlib.Path, kind: type = dict) -> Any:
    """The dict or other `kind` of value in a JSON file, or None if there is no such file.

    Raises:
      ValueError: if the file holds anything else.
    """
    if not path.exists():
        return None
    size = path.stat().st_size
    if size > _MAX_JSON_BYTES:
        raise ValueError(f"{path} cannot be read: {size} bytes, expected at most {_MAX_JSON_BYTES}")
    try:
        value = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, kind):
        found = type(value).__name__
        raise ValueError(f"{path} cannot be read: expected a {kind.__name__}, got {found}")
    return value


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes a JSON file, whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")
    os.replace(temporary, path)


def _check_type(name: str, value: Any, default: Any) -> None:
    """Raises ValueError unless a value, say from a file, is of its default's type."""
    if isinstance(default, tuple):
        right = isinstance(value, tuple | list) and all(type(width) is int for width in value)
    else:
        right = type(value) is type(default) or (type(default) is float and type(value) is int)
    if not right:
        raise ValueError(f"--{name} must be like {default!r}, got {value!r}")


def _parse_widths(name: str, values: list[str]) -> tuple[int, ...]:
    if not values or not all(value.strip().isdecimal() and int(value) > 0 for value in values):
        raise ValueError(
            f"--{name} must be positive widths separated by commas, such as 512,512; "
            f"got {','.join(values)!r}"
        )
    return tuple(int(value) for value in values)
