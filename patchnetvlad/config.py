# SPDX-License-Identifier: MIT
"""Configuration: frozen dataclasses, read once from an INI file.

The sections and keys are those of the research code; keys may be written in either case.
Nothing else in the package reads an INI file.
"""

from __future__ import annotations

import configparser
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from patchnetvlad.base.arguments import checked
from patchnetvlad.base.text import one_line
from patchnetvlad.config_ini import (
    INTERVAL_BLOCKS,
    KEYS,
    LOCAL_FEATURES,
    MATCHERS,
    PATCH_VLADS,
    POOLINGS,
    PRECISIONS,
    RANSACS,
    RERANKS,
    config_error,
    find_config,
    hint_key,
    hint_misplaced,
    is_interval_block,
    nearest,
    parse_parameters,
)
from patchnetvlad.encoders import DEFAULT, ENCODERS, Geometry
from patchnetvlad.errors import ConfigError

MIN_MEMORY_MB = 64
MOST_THREADS = 1024
_KINDS = {
    str: "text",
    type(None): "text, or None",
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    tuple: "a tuple of numbers",
}


@dataclass(frozen=True)
class Config:
    """All settings of extraction and matching. INI keys are in brackets.

    Parameters
    ----------
    pooling : {"patchnetvlad", "netvlad", "max", "avg"}
        How descriptors are pooled from the feature map (``pooling``).
    resume_path : str
        Checkpoint: a file, or a stem to which ``num_pcs`` and an extension are appended
        (``resumePath``).
    num_pcs : int
        Dimension P of whitened descriptors; 0 for a model without a PCA layer (``num_pcs``).
    patch_sizes, strides : tuple of int
        Sides s and strides t of the square patches, in cells of the feature map, one pair per
        scale (``patch_sizes``, ``strides``).
    vladv2 : bool
        Use NetVLAD with a bias in its assignment layer (``vladv2``).
    patch_vlad : {"integral", "direct"}
        How cells are summed: by integral images in the arithmetic of the research code,
        including its rounding errors, which reproduces its results; or directly, which is
        faster and more accurate (``patch_vlad``).
    precision : {"auto", "exact", "fast", "half", "int8"}
        ``exact`` multiplies in float32; ``fast`` in TensorFloat-32 on a CUDA device, and uses
        Winograd convolution on a CPU; ``half``, only on CUDA, in float16 with float32 sums;
        ``int8``, only on CPUs with instructions for it, in 8-bit integers, and then patches are
        summed directly, whatever ``patch_vlad`` is; ``auto`` is ``fast`` on CUDA, otherwise
        ``exact`` (``precision``).
    memory_mb : int
        Memory budget on the device, in MiB: for extraction, in addition to the model, and for
        the descriptors that matching keeps; 0 chooses 1024, or half of the free memory of a CUDA
        device if that is more (``memory_mb``).
    local_features : {"float16", "float32", "int8", "map", "npy"}
        How patch descriptors are stored: as numbers of this type, as the feature map from which
        they are computed again, or as ``.npy`` files like the research code's
        (``local_features``).
    image_size : tuple of int
        (height, width) in px that images are resized to before extraction; (0, 0) keeps the
        native size (``imageresizeH``, ``imageresizeW`` of ``[feature_extract]``).
    batch_size : int
        Images per forward pass in training (``batchsize``); extraction does not use it.
    cache_batch_size : int
        Images per forward pass in extraction (``cacheBatchSize``).
    threads : int
        Threads that decode images in advance; 0 chooses the number (``threads``).
    num_gpus : int
        GPUs that share the images of an extraction; 0 uses all (``nGPU``).
    matcher : {"RANSAC", "spatialApproximator"}
        How matches are scored for spatial consistency (``matcher``).
    ransac : {"opencv", "fast", "batched"}
        Implementation of RANSAC: OpenCV's, as in the research code; OpenCV's USAC_FAST; or all
        candidates of a query at once in PyTorch, for GPUs (``ransac``).
    faiss_index : str
        Type of the index for retrieval, as a FAISS factory string (``faiss_index``).
    faiss_parameters : str
        Search effort of an approximate index, such as ``nprobe=64``
        (``faiss_parameters``).
    faiss_index_path : str or None
        File in which the index is saved, and from which it is loaded (``faiss_index_path``).
    patch_weights : tuple of float
        Weight of each patch size in the fused score (``patchWeights2Use``).
    n_values : tuple of int
        Values of N for recall@N; the largest is the number of candidates retrieved
        (``n_values_all``).
    interval_block : str
        What the 95 % intervals of recalls draw: ``auto`` chooses the length of blocks of
        consecutive queries, ``traverse`` takes whole traverses, and a number takes blocks of that
        many queries, ``1`` for independent ones (``interval_block``).
    confidence : str
        Where the confidences of answers come from: ``auto`` for those that are shipped with the
        bundled checkpoint, if weights and settings are theirs; ``none``; or a file of
        ``patchnetvlad calibrate-confidence`` (``confidence``).
    rerank : {"always", "auto"}
        ``auto`` does not re-rank a query whose first answer is sure by retrieval alone, and keeps
        that answer if re-ranking finds one that is less sure (``rerank``).
    sure : float
        Confidence from which ``auto`` does not re-rank, more than 0 and at most 1 (``sure``).
    match_image_size : tuple of int
        (height, width) of the images from which the features were extracted
        (``imageresizeH``, ``imageresizeW`` of ``[feature_match]``).
    dataset_name : str
        ``tokyo247`` turns on the rule for that data set (``dataset_name``).
    predictions_path : str or None
        File of candidates to re-rank instead of those of retrieval
        (``pred_input_path``).
    encoder : {"vgg16", "resnet18", "resnet50", "dinov2_vits14", "dinov2_vitb14"}
        Network that computes the feature map; that of the checkpoint (``encoder``).
    source : str
        Source of the configuration; only for messages.
    """

    pooling: str = "patchnetvlad"
    resume_path: str = "./pretrained_models/mapillary_WPCA"
    num_pcs: int = 4096
    patch_sizes: tuple[int, ...] = (2, 5, 8)
    strides: tuple[int, ...] = (1, 1, 1)
    vladv2: bool = False
    patch_vlad: str = "integral"
    precision: str = "auto"
    memory_mb: int = 0
    local_features: str = "float16"
    image_size: tuple[int, int] = (480, 640)
    batch_size: int = 5
    cache_batch_size: int = 5
    threads: int = 0
    num_gpus: int = 1
    matcher: str = "RANSAC"
    ransac: str = "opencv"
    faiss_index: str = "Flat"
    faiss_parameters: str = ""
    faiss_index_path: str | None = None
    patch_weights: tuple[float, ...] = (0.45, 0.15, 0.4)
    n_values: tuple[int, ...] = (1, 5, 10, 20, 50, 100)
    interval_block: str = "auto"
    confidence: str = "auto"
    rerank: str = "always"
    sure: float = 0.9
    match_image_size: tuple[int, int] = (480, 640)
    dataset_name: str = "NA"
    predictions_path: str | None = None
    encoder: str = DEFAULT
    source: str = field(default="Config()", compare=False)

    def __post_init__(self) -> None:
        self._check_kinds()
        if self.precision == "int8":  # which has other rounding errors than the research code
            object.__setattr__(self, "patch_vlad", "direct")

        def check(ok: bool, message: str) -> None:
            if not ok:
                raise config_error(self.source, message)

        for key, value, known in (
            ("pooling", self.pooling, POOLINGS),
            ("matcher", self.matcher, MATCHERS),
            ("patch_vlad", self.patch_vlad, PATCH_VLADS),
            ("precision", self.precision, PRECISIONS),
            ("local_features", self.local_features, LOCAL_FEATURES),
            ("ransac", self.ransac, RANSACS),
            ("rerank", self.rerank, RERANKS),
            ("encoder", self.encoder, tuple(ENCODERS)),
        ):
            check(
                value in known,
                f"{key} = {value!r} is unknown{nearest(value, known)}; one of {', '.join(known)}",
            )
        check(
            self.precision != "int8" or self.encoder == DEFAULT,
            f"precision = int8 is for encoder = {DEFAULT}, not {self.encoder}; use precision = "
            "auto",
        )
        check(
            self.memory_mb == 0 or self.memory_mb >= MIN_MEMORY_MB,
            f"memory_mb = {self.memory_mb} must be {MIN_MEMORY_MB} or more, or 0 to choose",
        )
        check(bool(self.faiss_index), "faiss_index is empty; give Flat for exact search")
        try:
            parse_parameters(self.faiss_parameters)
        except ConfigError as error:
            raise config_error(self.source, str(error)) from None
        check(0 < self.sure <= 1, f"sure = {self.sure:g} must be more than 0 and at most 1")
        check(bool(self.confidence), "confidence is empty; give auto, none or a file")
        check(self.num_gpus >= 0, f"ngpu = {self.num_gpus} must be 0 (all) or more")
        check(self.num_pcs >= 0, f"num_pcs = {self.num_pcs} must be 0 (no PCA) or more")
        check(
            0 <= self.threads <= MOST_THREADS,
            f"threads = {self.threads} must be from 0 (choose) to {MOST_THREADS}",
        )
        check(
            self.cache_batch_size >= 1,
            f"cachebatchsize = {self.cache_batch_size} must be 1 or more",
        )
        for name, (height, width) in (
            ("feature_extract", self.image_size),
            ("feature_match", self.match_image_size),
        ):
            native = height == 0 and width == 0
            check(
                native or (height >= 16 and width >= 16),
                f"imageresizeh, imageresizew = {height}, {width} in [{name}] must both be at "
                "least 16 px, or both 0 to keep each image's own size",
            )
        check(
            len(self.n_values) > 0 and min(self.n_values) >= 1,
            f"n_values_all = {_join(self.n_values)} must list whole numbers from 1",
        )
        check(
            is_interval_block(self.interval_block),
            f"interval_block = {self.interval_block} is not {INTERVAL_BLOCKS}",
        )
        if self.uses_patches:
            self._check_patches()

    def _check_kinds(self) -> None:
        """Make tuples of lists; raise ConfigError for a value that is not of its field."""
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, list) and isinstance(entry.default, tuple):
                object.__setattr__(self, entry.name, value := tuple(value))
            if not _fits(value, entry.default):
                kind = _KINDS[type(entry.default)]
                raise config_error(str(self.source), f"{entry.name} = {value!r} is not {kind}")

    def _check_patches(self) -> None:
        """Raise ConfigError unless sizes, strides and weights of patches fit together."""
        sizes, strides, weights = self.patch_sizes, self.strides, self.patch_weights
        if not sizes:
            problem = "patch_sizes is empty; give at least one size"
        elif len(strides) != len(sizes):
            problem = (
                f"strides = {_join(strides)} has {len(strides)} values for {len(sizes)} "
                f"patch_sizes ({_join(sizes)}); give one each"
            )
        elif min(sizes) < 1 or min(strides) < 1:
            problem = (
                f"patch_sizes = {_join(sizes)} and strides = {_join(strides)} must be 1 or more"
            )
        elif len(set(sizes)) != len(sizes):
            problem = (
                f"patch_sizes = {_join(sizes)} names a size twice; feature files are named by "
                "size, so give each size once"
            )
        elif weights and not min(weights) >= 0 < max(weights):
            problem = (
                f"patchweights2use = {_join(weights)} must be 0 or more, and one above 0: "
                "otherwise re-ranking has no effect, or the wrong one"
            )
        else:
            return
        raise config_error(self.source, problem)

    @property
    def uses_patches(self) -> bool:
        """Whether patch descriptors are extracted and matched."""
        return self.pooling == "patchnetvlad"

    @property
    def min_image_side(self) -> int:
        """Shortest side, in px, of an image whose feature map has room for every patch size."""
        return self.geometry.cell * (max(self.patch_sizes) if self.uses_patches else 1)

    @property
    def geometry(self) -> Geometry:
        """Where the cells of the encoder's feature maps lie on the image."""
        return ENCODERS[self.encoder]

    def check_matching(self) -> None:
        """Raise ConfigError unless there is one patch weight per patch size."""
        if not self.uses_patches:
            return
        if not self.patch_weights:
            raise ConfigError(
                f"{self.source}: matching needs the section [feature_match] with matcher and "
                "patchweights2use; see the shipped configuration performance.ini"
            )
        if len(self.patch_weights) != len(self.patch_sizes):
            raise config_error(
                self.source,
                f"patchweights2use = {_join(self.patch_weights)} has "
                f"{len(self.patch_weights)} values for {len(self.patch_sizes)} patch_sizes "
                f"({_join(self.patch_sizes)}); give one weight per size",
            )

    @classmethod
    @checked
    def load(cls, path_or_name: str | Path) -> Config:
        """Read a configuration from an INI file.

        Parameters
        ----------
        path_or_name : str or Path
            A file, or the name of a built-in configuration: ``performance``, ``speed``,
            ``storage``, ``netvlad_extract`` or ``demo``.

        Returns
        -------
        Config

        Raises
        ------
        ConfigError
            The file is missing or not INI, a key is missing or unknown, or a value is of the
            wrong type.

        Examples
        --------
        >>> from patchnetvlad import Config
        >>> config = Config.load("performance")
        >>> config.patch_sizes, config.matcher, config.num_pcs
        ((2, 5, 8), 'RANSAC', 4096)
        >>> Config.load("peformance")
        Traceback (most recent call last):
            ...
        patchnetvlad.errors.ConfigError: there is no configuration 'peformance' (did you mean ...
        """
        parser, source = read_sections(path_or_name)
        return cls.from_mapping(parser, source=source)

    @classmethod
    @checked
    def from_mapping(
        cls, sections: Mapping[str, Mapping[str, object]], source: str = "configuration"
    ) -> Config:
        """Build a configuration from sections of keys and text, such as a ``ConfigParser``.

        Parameters
        ----------
        sections : mapping of str to mapping of str to str or number
            Section name to its keys and values.
        source : str
            Named in error messages.

        Returns
        -------
        Config

        Raises
        ------
        ConfigError
            As for :meth:`load`.

        Examples
        --------
        >>> sections = {
        ...     "global_params": {"pooling": "netvlad", "resumePath": "weights", "num_pcs": 512},
        ...     "feature_extract": {"cachebatchsize": 5, "imageresizeW": 640, "imageresizeH": 480},
        ... }
        >>> Config.from_mapping(sections).image_size
        (480, 640)
        """
        read: dict[str, dict[str, str]] = {}
        # A parser repeats its defaults in every section, fitting or not.
        defaults = sections.defaults() if isinstance(sections, configparser.RawConfigParser) else {}
        for title, values in sections.items():
            section = title.lower()
            if title == configparser.DEFAULTSECT or section == "train":
                continue  # Settings of the training script are not ours to judge.
            known = KEYS.get(section)
            if known is None:
                raise config_error(
                    source,
                    f"unknown section [{title}]{nearest(section, KEYS)}; "
                    f"the sections are {', '.join(f'[{name}]' for name in KEYS)}",
                )
            if section in read:
                raise config_error(source, f"the section [{section}] appears twice; remove one")
            read[section] = {key.lower(): str(value).strip() for key, value in values.items()}
            for key in read[section]:
                if key not in known and key not in defaults:
                    raise config_error(
                        source, f"unknown key {key!r} in [{section}]{hint_key(key, section)}"
                    )

        pooling = read.get("global_params", {}).get("pooling", "").lower()
        fields: dict[str, Any] = {"source": source}
        for section, keys in KEYS.items():
            if section not in read:
                # One command may be configured without the other.
                others = {"feature_extract", "feature_match"} - {section}
                if section == "global_params" or not others & set(read):
                    raise ConfigError(f"{source}: the section [{section}] is missing")
                if section == "feature_match":
                    fields["patch_weights"] = ()
                continue
            for name, spec in keys.items():
                needed = spec.required and (pooling == "patchnetvlad" or not spec.patches_only)
                if name not in read[section]:
                    if needed:
                        raise ConfigError(
                            f"{source}: the key {name!r} is missing in [{section}]"
                            f"{hint_misplaced(name, read)}"
                        )
                    continue
                if spec.field is None:
                    continue
                text = read[section][name]
                try:
                    value = spec.parse(text)
                except ValueError:
                    raise config_error(
                        source, f"{name} = {text!r} in [{section}] must be {spec.kind}"
                    ) from None
                if spec.field.endswith(("_height", "_width")):
                    size = "match_image_size" if section == "feature_match" else "image_size"
                    height, width = fields.get(size, (0, 0))
                    fields[size] = (
                        (value, width) if spec.field.endswith("_height") else (height, value)
                    )
                else:
                    fields[spec.field] = value
        if "image_size" in fields:
            fields.setdefault("match_image_size", fields["image_size"])
        elif "match_image_size" in fields:
            fields["image_size"] = fields["match_image_size"]
        return cls(**fields)

    @classmethod
    def from_json(cls, content: Mapping[str, Any], source: str | None = None) -> Config:
        """Build a configuration from its fields as JSON types, as in ``run.json``.

        Parameters
        ----------
        content : mapping of str to value
            Unknown fields, from later versions, are ignored.
        source : str, optional
            Named in error messages; by default the source in ``content``.

        Returns
        -------
        Config

        Raises
        ------
        ConfigError
            A value does not fit its field.
        """
        if not isinstance(content, Mapping):
            raise config_error(source or "Config()", "this is not a mapping of fields")
        known = {field.name for field in fields(cls)}
        values = {name: value for name, value in content.items() if name in known}
        if source is not None:
            values["source"] = source
        return cls(**values)

    @staticmethod
    def global_params(config: Config | Mapping[str, str]) -> dict[str, str]:
        """Return the ``[global_params]`` of a configuration, or of a mapping, as text.

        Keys are in lower case; unknown keys of a mapping are kept.
        """
        if not isinstance(config, Config):
            return {str(key).lower(): str(value).strip() for key, value in config.items()}
        return {
            "pooling": config.pooling,
            "resumepath": config.resume_path,
            "threads": str(config.threads),
            "num_pcs": str(config.num_pcs),
            "ngpu": str(config.num_gpus),
            "patch_sizes": _join(config.patch_sizes),
            "strides": _join(config.strides),
            "vladv2": str(config.vladv2),
            "patch_vlad": config.patch_vlad,
            "precision": config.precision,
            "memory_mb": str(config.memory_mb),
            "encoder": config.encoder,
        }


def _fits(value: object, default: object) -> bool:
    """Whether a value is of the kind of a field, which its default shows."""
    if default is None or isinstance(default, str):
        return isinstance(value, str | os.PathLike) or (default is None and value is None)
    if isinstance(default, tuple):
        return isinstance(value, tuple) and all(_fits(of, default[0]) for of in value)
    if isinstance(default, bool):
        return isinstance(value, bool | int)
    if isinstance(default, float):
        return isinstance(value, Real) and not isinstance(value, bool)
    return isinstance(value, Integral) or (isinstance(value, float) and value.is_integer())


def _join(values: tuple[Any, ...]) -> str:
    return ",".join(str(value) for value in values)


def read_sections(path_or_name: str | Path) -> tuple[configparser.ConfigParser, str]:
    """Read an INI file, or a built-in one; return its sections and its path.

    Raises
    ------
    ConfigError
        It is missing, or not INI.
    """
    path = find_config(path_or_name)
    parser = configparser.ConfigParser(interpolation=None)  # a path may hold a %
    try:
        # utf-8-sig also reads files that Windows editors save with a byte-order mark.
        with path.open(encoding="utf-8-sig") as file:
            parser.read_file(file)
    except (configparser.Error, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not a readable INI file: {one_line(error)}") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    return parser, str(path)
