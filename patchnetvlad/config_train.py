# SPDX-License-Identifier: MIT
"""The settings of training: the section ``[train]`` of an INI file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from patchnetvlad.config import Config, read_sections
from patchnetvlad.config_ini import Key, boolean, config_error, finite, nearest
from patchnetvlad.encoders import DEFAULT
from patchnetvlad.errors import ConfigError

OPTIMISERS = ("SGD", "ADAM", "ADAMW")
LOSSES = ("triplet", "multisimilarity")
SCHEDULES = ("step", "cosine", "linear")
_WHOLE, _NUMBER = "a whole number", "a number"

KEYS = {
    "batchsize": Key("batch_size", int, _WHOLE),
    "cachebatchsize": Key("cache_batch_size", int, _WHOLE),
    "optim": Key("optimiser", str.upper, " or ".join(OPTIMISERS)),
    "seed": Key("seed", int, _WHOLE),
    "lr": Key("learning_rate", finite, _NUMBER),
    "lrstep": Key("step_epochs", int, _WHOLE),
    "lrgamma": Key("step_factor", finite, _NUMBER),
    "weightdecay": Key("weight_decay", finite, _NUMBER),
    "momentum": Key("momentum", finite, _NUMBER),
    "patience": Key("patience", int, _WHOLE),
    "evalevery": Key("epochs_a_validation", int, _WHOLE),
    "margin": Key("margin", finite, _NUMBER),
    "num_clusters": Key("num_clusters", int, _WHOLE),
    "includepanos": Key("panoramas", boolean, "True or False"),
    "nneg": Key("num_negatives", int, _WHOLE),
    "imageresizew": Key("image_width", int, _WHOLE + " of px"),
    "imageresizeh": Key("image_height", int, _WHOLE + " of px"),
    "cachedqueries": Key("cached_queries", int, _WHOLE),
    "cachednegatives": Key("cached_negatives", int, _WHOLE),
    "posdistthr": Key("positive_distance", finite, _NUMBER),
    "negdistthr": Key("negative_distance", finite, _NUMBER),
    "valdistthr": Key("validation_distance", finite, _NUMBER),
    "loss": Key("loss", str.lower, " or ".join(LOSSES)),
    "places": Key("places", int, _WHOLE),
    "imagesperplace": Key("images_a_place", int, _WHOLE),
    "cellsize": Key("cell_size", finite, _NUMBER),
    "cellheading": Key("cell_heading", finite, _NUMBER),
    "schedule": Key("schedule", str.lower, " or ".join(SCHEDULES)),
    "warmup": Key("warm_up_steps", int, _WHOLE),
    "cachemaps": Key("cache_maps", boolean, "True or False"),
    "cachedviews": Key("cached_views", int, _WHOLE),
    "savesteps": Key("save_steps", int, _WHOLE),
    "augment": Key("augment", boolean, "True or False"),
    "accumulate": Key("accumulate", int, _WHOLE),
    "amp": Key("mixed_precision", boolean, "True or False"),
    "trainpca": Key("train_pca", boolean, "True or False"),
}
"""The keys of ``[train]``; what is not given has the default of :class:`TrainConfig`."""


@dataclass(frozen=True)
class TrainConfig:
    """Settings of training. The defaults are those of the built-in ``train.ini``.

    Parameters
    ----------
    batch_size : int
        Triplets per step (``batchsize``).
    cache_batch_size : int
        Images per forward pass when no gradient is needed (``cachebatchsize``).
    optimiser : {"SGD", "ADAM", "ADAMW"}
        (``optim``).
    seed : int
        Seed of all random numbers (``seed``).
    learning_rate : float
        Initial learning rate (``lr``).
    step_epochs, step_factor : int, float
        Number of epochs after which the learning rate is multiplied, and by what
        (``lrstep``, ``lrgamma``). Not for ADAM, and only for the schedule ``step``.
    weight_decay, momentum : float
        Parameters of SGD, the first also of ADAMW (``weightdecay``, ``momentum``).
    patience : int
        Epochs without a better score after which training ends; 0: never (``patience``).
    epochs_a_validation : int
        (``evalevery``).
    margin : float
        In terms of squared distances; the loss uses its square root (``margin``).
    num_clusters : int
        K of the vocabulary (``num_clusters``).
    panoramas : bool
        Whether to use the panoramas of MSLS (``includepanos``).
    num_negatives : int
        Hard negatives per triplet (``nNeg``).
    image_size : tuple of int
        (height, width) in px (``imageresizeh``, ``imageresizew``).
    cached_queries, cached_negatives : int
        Number of queries between searches for hard negatives, and of index images searched
        (``cachedqueries``, ``cachednegatives``).
    positive_distance, negative_distance, validation_distance : float
        An index image within the first is a positive, beyond the second a negative; in validation,
        one within the third is right. In the unit of the positions
        (``posdistthr``, ``negdistthr``, ``valdistthr``).
    loss : {"triplet", "multisimilarity"}
        Batches are triplets with hard negatives, or images of several places (``loss``).
    places, images_a_place : int
        Places per step, and images of each, at most; for ``multisimilarity``
        (``places``, ``imagesperplace``).
    cell_size : float
        Side of the cells whose images show one place; 0: ``positive_distance`` (``cellsize``).
    cell_heading : float
        Headings of a place, in degrees, where they are known; 0: all (``cellheading``).
    schedule : {"step", "cosine", "linear"}
        How the learning rate falls: by ``step_factor``, or to 0 at the last epoch (``schedule``).
    warm_up_steps : int
        Steps in which the learning rate rises from 0 at first (``warmup``).
    cache_maps : bool
        Compute the frozen layers once per image, and keep their output (``cachemaps``).
    cached_views : int
        Versions of each image that are kept, the first of which is the image itself
        (``cachedviews``).
    save_steps : int
        Steps between checkpoints within an epoch; 0: none (``savesteps``).
    augment : bool
        Learn from a view of each image by chance, decoded anew (``augment``).
    accumulate : int
        Batches per step (``accumulate``).
    mixed_precision : bool
        Compute steps in float16 where that is exact enough, on a CUDA device (``amp``).
    train_pca : bool
        Fit a whitening layer of ``num_pcs`` before the first step, and train it as well, so that
        the loss is that of the descriptors in use; otherwise it is added afterwards
        (``trainpca``).
    vladv2 : bool
        (``vladv2`` of ``[global_params]``).
    num_pcs : int
        Dimension of the whitening layer (``num_pcs`` of ``[global_params]``).
    encoder : str
        As in :class:`~patchnetvlad.config.Config` (``encoder`` of ``[global_params]``).
    source : str
        Source of the settings; only for messages.
    """

    batch_size: int = 4
    cache_batch_size: int = 20
    optimiser: str = "SGD"
    seed: int = 123
    learning_rate: float = 0.0001
    step_epochs: int = 5
    step_factor: float = 0.5
    weight_decay: float = 0.001
    momentum: float = 0.9
    patience: int = 10
    epochs_a_validation: int = 1
    margin: float = 0.1
    num_clusters: int = 16
    panoramas: bool = False
    num_negatives: int = 5
    image_size: tuple[int, int] = (480, 640)
    cached_queries: int = 1000
    cached_negatives: int = 1000
    positive_distance: float = 10.0
    negative_distance: float = 25.0
    validation_distance: float = 25.0
    loss: str = "triplet"
    places: int = 8
    images_a_place: int = 4
    cell_size: float = 0.0
    cell_heading: float = 90.0
    schedule: str = "step"
    warm_up_steps: int = 0
    cache_maps: bool = False
    cached_views: int = 1
    save_steps: int = 0
    augment: bool = False
    accumulate: int = 1
    mixed_precision: bool = False
    train_pca: bool = False
    vladv2: bool = False
    num_pcs: int = 4096
    encoder: str = DEFAULT
    source: str = field(default="TrainConfig()", compare=False)

    def __post_init__(self) -> None:
        for key in ("batch_size", "cache_batch_size", "step_epochs", "epochs_a_validation",
                    "num_negatives", "cached_queries", "cached_negatives",
                    "cached_views", "accumulate"):  # fmt: skip
            self._check(getattr(self, key) >= 1, f"{_key(key)} must be 1 or more")
        for key in ("weight_decay", "momentum", "patience", "num_pcs", "positive_distance",
                    "cell_size", "cell_heading", "warm_up_steps", "save_steps"):  # fmt: skip
            self._check(getattr(self, key) >= 0, f"{_key(key)} must be 0 or more")
        for key in ("learning_rate", "step_factor", "margin"):
            self._check(getattr(self, key) > 0, f"{_key(key)} must be more than 0")
        for key, values in (("optimiser", OPTIMISERS), ("loss", LOSSES), ("schedule", SCHEDULES)):
            named = f"{_key(key)} must be {' or '.join(values)}"
            self._check(getattr(self, key) in values, named)
        for key in ("num_clusters", "places", "images_a_place"):
            self._check(getattr(self, key) >= 2, f"{_key(key)} must be 2 or more")
        self._check(min(self.image_size) >= 16, "imageresizeh, imageresizew must be 16 or more")
        self._check(
            self.positive_distance <= self.negative_distance,
            "posdistthr must not exceed negdistthr",
        )
        self._check(self.cached_views == 1 or self.cache_maps, "cachedviews needs cachemaps = True")
        self._check(
            not (self.augment and self.cache_maps),
            "augment needs cachemaps = False; with cachemaps, cachedviews gives views",
        )
        self._check(self.num_pcs > 0 or not self.train_pca, "trainpca needs num_pcs above 0")
        self._check(
            self.loss == "triplet" or max(self.cell_size, self.positive_distance) > 0,
            "cellsize or posdistthr must be more than 0",
        )

    def _check(self, ok: bool, message: str) -> None:
        if not ok:
            raise config_error(self.source, f"[train]: {message}")

    @classmethod
    def load(cls, path_or_name: str | Path) -> TrainConfig:
        """Read the settings from an INI file, or from a built-in one, such as ``train``.

        Raises
        ------
        ConfigError
            The file is missing or not INI, or a key is unknown or of the wrong kind.
        """
        sections, source = read_sections(path_or_name)
        return cls.from_sections(sections, source)

    @classmethod
    def from_sections(
        cls, sections: Mapping[str, Mapping[str, str]], source: str = "configuration"
    ) -> TrainConfig:
        """Build the settings from sections of keys and text, such as a ``ConfigParser``.

        Raises
        ------
        ConfigError
            As for :meth:`load`.
        """
        read = {
            title.lower(): {key.lower(): str(value) for key, value in values.items()}
            for title, values in sections.items()
        }
        if "train" not in read:
            raise ConfigError(f"{source}: the section [train] is missing; see train.ini")
        values: dict[str, object] = {"source": source}
        height, width = cls.image_size
        for name, text in read["train"].items():
            if name not in KEYS:
                raise config_error(
                    source,
                    f"unknown key {name!r} in [train]{nearest(name, KEYS)}; the keys are "
                    f"{', '.join(KEYS)}",
                )
            key = KEYS[name]
            try:
                value = key.parse(text.strip())
            except ValueError:
                raise config_error(
                    source, f"{name} = {text!r} in [train] must be {key.kind}"
                ) from None
            if key.field == "image_height":
                height = value
            elif key.field == "image_width":
                width = value
            else:
                values[str(key.field)] = value
        values["image_size"] = height, width
        return cls(**values, **_global(read.get("global_params", {}), source))  # type: ignore[arg-type]

    def for_images(self, threads: int = 0) -> Config:
        """Return the configuration for reading images and extracting features."""
        return Config(
            pooling="netvlad",
            num_pcs=self.num_pcs if self.train_pca else 0,
            vladv2=self.vladv2,
            precision="exact",
            image_size=self.image_size,
            match_image_size=self.image_size,
            cache_batch_size=self.cache_batch_size,
            threads=threads,
            encoder=self.encoder,
            source=self.source,
        )


def _key(name: str) -> str:
    return next((key for key, spec in KEYS.items() if spec.field == name), name)


def _global(section: dict[str, str], source: str) -> dict[str, object]:
    """Return what ``[global_params]`` says for training."""
    found: dict[str, object] = {}
    if section.get("pooling", "netvlad").strip().lower() not in ("netvlad", "patchnetvlad"):
        raise config_error(source, "pooling must be netvlad to be trained")
    for name, parse, kind in (
        ("vladv2", boolean, "True or False"),
        ("num_pcs", int, _WHOLE),
        ("encoder", str.lower, "a name"),
    ):
        if name in section:
            try:
                found[name] = parse(section[name].strip())
            except ValueError:
                raise config_error(source, f"{name} = {section[name]!r} must be {kind}") from None
    return found
