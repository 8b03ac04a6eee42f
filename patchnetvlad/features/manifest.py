# SPDX-License-Identifier: MIT
"""The manifest: what features were made from, so that mismatches are refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from patchnetvlad.assets.checkpoints import resolve_checkpoint
from patchnetvlad.base.files import digest, file_sha256
from patchnetvlad.base.names import absolute, is_remote, locate, normal_name
from patchnetvlad.base.remote import RemoteFolder
from patchnetvlad.base.text import one_line, parse_json
from patchnetvlad.config import Config
from patchnetvlad.config_ini import LOCAL_FEATURES
from patchnetvlad.encoders import DEFAULT, ENCODERS
from patchnetvlad.errors import FeatureError, OtherFeaturesError
from patchnetvlad.models.grid import count_patches, feature_map_shape

GLOBAL_FILE = "globalfeats.npy"
MANIFEST_FILE = "features.json"
INDEX_FILE = "features.sqlite"
SHARD_FILES = "features-*.bin"
NOTE_FILES = "features-[0-9]*.json"
SHARE_FILE = "features-share.json"
SHARES_FOLDER = "shards"
NAMINGS = ("stem", "path")


@dataclass(frozen=True)
class Manifest:
    """What the features in a directory were made from.

    Attributes
    ----------
    images : str
        SHA-256 over the names of the image list.
    paths : str
        SHA-256 over the images' absolute paths, or their URLs.
    num_images : int
    checkpoint : str
        SHA-256 of the checkpoint's file.
    pooling : str
    num_pcs : int
    patch_sizes, strides : list of int
        Empty for feature maps, which work with any.
    image_size : list of int
        (height, width) that images were resized to, px; (0, 0) for native sizes.
    patch_vlad : {"direct", "integral", ""}
        Empty for feature maps.
    precision : {"exact", "fast", "half", "int8"}
    local_features : {"float16", "float32", "int8", "map", "npy"}
        "npy" for features without patches.
    naming : {"stem", "path"}
        Whether ``.npy`` files are named by an image's stem or by its whole name in the list.
    encoder : str, default "vgg16"
    rounded : {"", "float16", "int8", "map"}
        The coarser kind that the descriptors were converted from; empty if there was none. Not
        compared: extraction may resume in converted features.
    root : str
        Absolute path, or URL, of the folder that relative names lie under; empty where there are
        none, or it is not known. Not compared: ``paths`` are.
    global_crc32 : int
        CRC-32 of the rows of ``globalfeats.npy`` beside ``.npy`` files, as float32; 0 if it is not
        known. Not compared.
    """

    images: str
    paths: str
    num_images: int
    checkpoint: str
    pooling: str
    num_pcs: int
    patch_sizes: list[int]
    strides: list[int]
    image_size: list[int]
    patch_vlad: str
    precision: str
    local_features: str
    naming: str
    encoder: str = DEFAULT
    rounded: str = field(default="", compare=False)
    root: str = field(default="", compare=False)
    global_crc32: int = field(default=0, compare=False)

    @classmethod
    def of(
        cls,
        config: Config,
        names: Sequence[str],
        checkpoint: str,
        *,
        naming: str = "stem",
        precision: str = "exact",
        root: str | Path = "",
    ) -> Manifest:
        """Return the manifest of the features of an image list with a configuration.

        Parameters
        ----------
        config : Config
        names : sequence of str
        checkpoint : str
            SHA-256 of the checkpoint's file.
        naming : {"stem", "path"}, default "stem"
            Of ``.npy`` files.
        precision : {"exact", "fast", "half", "int8"}, default "exact"
        root : str or Path, default ""
            Folder that relative names lie under.

        Returns
        -------
        Manifest
        """
        check_naming(naming)
        local = config.local_features if config.uses_patches else "npy"
        has_patches = config.uses_patches and local != "map"
        relative = any(not (is_remote(name) or os.path.isabs(name)) for name in names)
        return cls(
            images=digest(normal_name(name) for name in names),
            paths=digest(absolute(locate(root, name)) for name in names),
            num_images=len(names),
            checkpoint=checkpoint,
            pooling=config.pooling,
            num_pcs=config.num_pcs,
            patch_sizes=list(config.patch_sizes) if has_patches else [],
            strides=list(config.strides) if has_patches else [],
            image_size=list(config.image_size),
            patch_vlad=config.patch_vlad if has_patches else "",
            precision=precision,
            local_features=local,
            naming=naming if local == "npy" else "path",
            encoder=config.encoder,
            root=absolute(root or ".") if relative else "",
        )

    @classmethod
    def from_json(
        cls, text: str, source: str | Path, way_out: str = "extract again with --no-resume"
    ) -> Manifest:
        """Read the text of :meth:`to_json`; FeatureError, which names ``source``, if damaged."""
        try:
            content = {**_BEFORE, **parse_json(text)}
            manifest = cls(**{key.name: content[key.name] for key in fields(cls)})
            for key in fields(cls):
                if not _KINDS[str(key.type)](content[key.name]):
                    raise ValueError(f"{key.name} is no {key.type}")
            check_naming(manifest.naming)
            if {manifest.local_features, manifest.rounded or "npy"} - set(LOCAL_FEATURES):
                raise ValueError("unknown values")
            if manifest.encoder not in ENCODERS:
                raise ValueError(f"unknown encoder {manifest.encoder!r:.80}")
            manifest._check_numbers()
        except (ValueError, TypeError, KeyError) as error:
            raise FeatureError(f"{source} is damaged ({one_line(error)}); {way_out}") from None
        return manifest

    def _check_numbers(self) -> None:
        """Raise ValueError for numbers that no features have."""
        sides, strides = self.patch_sizes, self.strides
        least = [*((n, 0) for n in (self.num_images, self.num_pcs, *self.image_size)),
                 *((n, 1) for n in (*sides, *strides))]  # fmt: skip
        if not all(low <= n < 2**31 for n, low in least):
            raise ValueError("a number is out of range")
        if len(self.image_size) != 2 or len(sides) != len(strides) or len({*sides}) != len(sides):
            raise ValueError("image_size, patch_sizes and strides do not fit together")

    def to_json(self) -> str:
        """Return the manifest as JSON text."""
        content = asdict(self)
        if not self.global_crc32:
            del content["global_crc32"]
        if self.encoder == DEFAULT:
            del content["encoder"]  # which older versions do not have
        return json.dumps(content, indent=2) + "\n"

    def to_config(self, source: str | Path) -> Config:
        """Return a configuration for matching these features."""
        height, width = self.image_size
        config = Config(
            pooling=self.pooling,
            num_pcs=self.num_pcs,
            image_size=(height, width),
            match_image_size=(height, width),
            encoder=self.encoder,
            source=str(source),
        )
        if not self.patch_sizes:
            return config
        return replace(
            config,
            patch_sizes=tuple(self.patch_sizes),
            strides=tuple(self.strides),
            patch_vlad=self.patch_vlad,
        )

    def patch_counts(self) -> dict[int, int]:
        """Count the patches of each size on an image; empty for native sizes."""
        if tuple(self.image_size) == (0, 0):
            return {}
        shape = feature_map_shape(self.image_size, ENCODERS[self.encoder])
        counts = count_patches(shape, self.patch_sizes, self.strides)
        return dict(zip(self.patch_sizes, counts, strict=True))

    def lists(self, names: Sequence[str], root: str | Path = "") -> bool:
        """Whether a list is that of the features: of these names, or of the same files."""
        return self.images == digest(map(normal_name, names)) or self.paths == digest(
            absolute(locate(root, name)) for name in names
        )

    def may_continue(self, have: Manifest | None) -> bool:
        """Whether features with the manifest ``have`` can be completed to those of this one.

        The features of a store belong to their images: the list may have gained, lost or reordered
        some. ``.npy`` files are of one list.
        """
        if have is None or self == have:
            return self == have
        ours = replace(self, images=have.images, paths=have.paths, num_images=have.num_images)
        if self.local_features == "npy" or ours != have:
            return False
        if have.root and self.root:
            return have.root == self.root
        return have.images != self.images  # the same names elsewhere are other images

    def differences(self, other: Manifest) -> list[str]:
        """Return the differences, as ``key: this -> that``; hashes are shortened."""
        mine, theirs = asdict(self), asdict(other)

        def short(value: object) -> object:
            if not isinstance(value, str):
                return value
            return value[:12] if len(value) == 64 else one_line(value, 100) if value else value

        found = [
            f"{key}: {short(mine[key])} -> {short(theirs[key])}"
            for key in mine
            if mine[key] != theirs[key] and key not in _NOT_SHOWN
        ]
        if self.root and other.root and self.root != other.root:
            return ["images in another folder", *found]
        if self.images != other.images:
            return ["another image list", *found]
        return ["images in another folder", *found] if self.paths != other.paths else found


def read_manifest(path: Path) -> Manifest | None:
    """Read a manifest; None if there is none, as in directories of the research code."""
    hint = "delete it to use the features unchecked, or extract again with --no-resume"
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise FeatureError(f"{path} is damaged ({one_line(error)}); {hint}") from None
    return Manifest.from_json(text, path, hint)


_KINDS: dict[str, Callable[[Any], bool]] = {
    "str": lambda value: isinstance(value, str),
    "int": lambda value: type(value) is int,
    "list[int]": lambda value: isinstance(value, list) and all(type(n) is int for n in value),
}
"""What values may be, by the types of fields."""

_SHARE: dict[str, Callable[[Any], bool]] = {
    "share": _KINDS["str"],
    "manifest": lambda value: isinstance(value, dict),
    "rows": _KINDS["list[int]"],
    "names": lambda value: isinstance(value, list) and all(isinstance(n, str) for n in value),
    "moved": _KINDS["str"],
}
"""What the file of a share holds."""

# Defaults for manifests written by older versions.
_BEFORE = {
    "precision": "exact",
    "local_features": "npy",
    "rounded": "",
    "encoder": DEFAULT,
    "root": "",
    "global_crc32": 0,
}
_NOT_SHOWN = ("images", "paths", "root", "global_crc32")


def check_naming(naming: str) -> None:
    """Raise FeatureError unless this is a way to name ``.npy`` files."""
    if naming not in NAMINGS:
        raise FeatureError(f"feature_names = {naming!r} is unknown; one of {', '.join(NAMINGS)}")


def other_features_error(
    directory: Path | RemoteFolder,
    have: Manifest | None,
    wanted: Manifest,
    way_out: str = "name another --output_features_dir, or give --no-resume to replace them",
) -> FeatureError:
    """Return the error that existing features are neither resumed nor replaced.

    Parameters
    ----------
    directory : Path or RemoteFolder
    have : Manifest or None
        Of the existing features; None if they have none.
    wanted : Manifest
        Of the features to be written.
    way_out : str
        What the user can do; ends the message.

    Returns
    -------
    FeatureError
        To be raised.
    """
    if have is None:
        difference = "without a note of what they were made from"
    else:
        difference = f"made with other settings ({'; '.join(have.differences(wanted))})"
    return OtherFeaturesError(f"{directory} holds features {difference}; {way_out}")


def feature_files(directory: Path) -> list[Path]:
    """List the files of features in a directory, except ``.npy`` files of patches.

    The files without which the others do not count come first.
    """
    names = (GLOBAL_FILE, INDEX_FILE, MANIFEST_FILE)
    endings = ("", ".part", "-journal", ".part-journal")
    files = [directory / f"{name}{ending}" for name in names for ending in endings]
    files += [*directory.glob(NOTE_FILES), *directory.glob(SHARD_FILES)]
    files.append(directory / SHARE_FILE)  # last: by it the others are found
    return [file for file in files if file.is_file()]


def find_shares(directory: Path) -> list[Path]:
    """Return the folders that jobs with ``feature_extract --shard`` wrote below a directory."""
    files = directory.glob(f"{SHARES_FOLDER}/*-of-*/{SHARE_FILE}")
    return sorted(file.parent for file in files)


def read_share_file(directory: Path) -> dict[str, Any]:
    """Read which share of an extraction is in a folder; FeatureError if there is none."""
    file = directory / SHARE_FILE
    try:
        content = parse_json(file.read_text(encoding="utf-8"))
        about = {key: content[key] for key in _SHARE}
        for key, is_kind in _SHARE.items():
            if not is_kind(about[key]):
                raise ValueError(f"{key} is {about[key]!r:.80}")
        if len(about["rows"]) != len(about["names"]):
            raise ValueError(f"{len(about['rows'])} rows for {len(about['names'])} names")
        return about
    except FileNotFoundError:
        raise FeatureError(
            f"{directory} is not a share of an extraction, such as feature_extract --shard I/N "
            "writes"
        ) from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise FeatureError(
            f"{file} is damaged ({one_line(error)}); extract this share again with --no-resume"
        ) from None


def check_no_share(directory: Path) -> None:
    """Raise FeatureError for the folder of one job, which has to be merged first."""
    if (directory / SHARE_FILE).is_file():
        share = read_share_file(directory)["share"]
        below = directory.absolute().parent
        output = below.parent if below.name == SHARES_FOLDER else "OUT"
        raise FeatureError(
            f"{directory} holds share {share} of an extraction, not all of its features; when all "
            f"shares are done, run patchnetvlad-store merge {output}"
        )


def erase(directory: Path) -> None:
    """Delete the features in a directory, except ``.npy`` files of patches."""
    for file in feature_files(directory):
        file.unlink()


def stored_bytes(directory: Path) -> int:
    """Return the size of what :func:`erase` would delete, in bytes."""
    return sum(file.stat().st_size for file in feature_files(directory))


def check_fits(
    directory: Path,
    have: Manifest,
    names: Sequence[str],
    config: Config,
    dataset_root: str | Path = "",
) -> None:
    """Raise FeatureError unless features fit an image list and a configuration for matching.

    Parameters
    ----------
    directory : Path
        For messages.
    have : Manifest
        Of the features.
    names : sequence of str
        The list.
    config : Config
    dataset_root : str or Path, default ""
        Folder that relative names lie under.
    """
    if not have.lists(names, dataset_root):
        raise FeatureError(
            f"{directory} was extracted from another image list (or the list has changed since); "
            "extract again"
        )
    check_settings(directory, have, config)


def check_settings(directory: Path | RemoteFolder, have: Manifest, config: Config) -> None:
    """Raise FeatureError unless features fit a configuration for matching."""
    mine = Manifest.of(config, (), have.checkpoint, naming=have.naming)
    if have.num_pcs != mine.num_pcs:
        raise FeatureError(
            f"{directory} was extracted with num_pcs = {have.num_pcs}; "
            f"{config.source} has {mine.num_pcs}"
        )
    if _family(have.pooling) != _family(mine.pooling):
        raise FeatureError(
            f"{directory} was extracted with pooling = {have.pooling}; "
            f"{config.source} has {mine.pooling}"
        )
    if have.encoder != mine.encoder:
        raise FeatureError(
            f"{directory} was extracted with encoder = {have.encoder}; "
            f"{config.source} has {mine.encoder}"
        )
    if tuple(have.image_size) != config.match_image_size:
        raise FeatureError(
            f"{directory} was extracted from images of {have.image_size} (height, width) px; "
            f"imageresizeh, imageresizew in [feature_match] of {config.source} are "
            f"{list(config.match_image_size)}"
        )
    if not config.uses_patches or have.local_features == "map":
        return
    made = dict(zip(have.patch_sizes, have.strides, strict=True))
    for size, stride in zip(config.patch_sizes, config.strides, strict=True):
        if made.get(size) != stride:
            has = ", ".join(f"{s} (stride {t})" for s, t in made.items()) or "none"
            raise FeatureError(
                f"{directory} has no patches of size {size} and stride {stride}; it has {has}"
            )


def check_checkpoint(directory: Path | RemoteFolder, have: Manifest | None, config: Config) -> None:
    """Raise FeatureError unless a configuration names the checkpoint of feature maps."""
    checkpoint = resolve_checkpoint(config.resume_path, config.num_pcs)
    if have is None or file_sha256(checkpoint) != have.checkpoint:
        raise FeatureError(
            f"{directory} holds feature maps of another checkpoint than {checkpoint}, which "
            f"{config.source} names"
        )


def _family(pooling: str) -> str:
    """Return the kind of global descriptor; patchnetvlad has that of netvlad."""
    return "netvlad" if pooling == "patchnetvlad" else pooling
