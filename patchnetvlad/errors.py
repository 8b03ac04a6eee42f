# SPDX-License-Identifier: MIT
"""The errors that this package raises on purpose.

Every message names the file or value at fault and the way out, in one or two lines. Commands
print the message and exit with status 2; notebooks catch :class:`PatchNetVLADError`.
"""

from __future__ import annotations

_MOST_LINES, _MOST_CHARACTERS = 2, 1800


class PatchNetVLADError(Exception):
    """Base class of every error raised on purpose by this package."""

    def __str__(self) -> str:
        return _printable(super().__str__())


def _printable(message: str) -> str:
    """Return a message that can be printed, and read: values in it may be of any length."""
    # Names that are no text, as Linux allows them, could not be printed.
    text = message.encode("utf-8", "backslashreplace").decode("utf-8")
    if text.count("\n") >= _MOST_LINES:
        text = " ".join(text.split())
    if len(text) > _MOST_CHARACTERS:  # the way out comes last
        text = f"{text[: _MOST_CHARACTERS // 2]} ... {text[-_MOST_CHARACTERS // 2 :]}"
    return text


class OutputError(PatchNetVLADError, OSError):
    """A folder or file that cannot be written."""


class ConfigError(PatchNetVLADError, ValueError):
    """A configuration file or value that cannot be used."""


class DeviceError(PatchNetVLADError, RuntimeError):
    """A device was asked for that this machine does not have."""


class ClusterError(PatchNetVLADError, RuntimeError):
    """A cluster that cannot be reached, or workers of it that keep dying."""


class AssetError(PatchNetVLADError, OSError):
    """A checkpoint, image list or image could not be found or downloaded."""


class CheckpointError(PatchNetVLADError, ValueError):
    """A checkpoint that cannot be read, or that does not fit the configuration."""


class ImageListError(PatchNetVLADError, ValueError):
    """An image list that cannot be used, or that names unusable images."""


class ImageError(PatchNetVLADError, OSError):
    """An image that cannot be decoded."""


class RemoteError(PatchNetVLADError, OSError):
    """Object storage that cannot be reached, or that refuses a request."""


class RemoteNotFoundError(RemoteError, FileNotFoundError):
    """An object that does not exist, in a store that can be reached."""


class RemoteAccessError(RemoteError, PermissionError):
    """A request that the credentials do not allow."""


class SourceError(PatchNetVLADError, OSError):
    """A camera, video or folder that gives no frames, or no more."""


class GroundTruthError(PatchNetVLADError, ValueError):
    """Ground truth that cannot be read, or that does not fit the image lists."""


class FeatureError(PatchNetVLADError, ValueError):
    """Features that are missing, or that do not fit the lists or the configuration."""


class OtherFeaturesError(FeatureError):
    """Existing features have other settings, and are neither used nor replaced."""


class DrawingError(PatchNetVLADError, ValueError):
    """Values that cannot be drawn, or a kind of picture that cannot be written."""


class ResultsError(PatchNetVLADError, ValueError):
    """Results of an earlier run that cannot be read, or that do not fit what else was given."""


class ArgumentError(PatchNetVLADError, ValueError, TypeError):
    """An argument of a wrong type or value."""


class KeyNotFoundError(PatchNetVLADError, KeyError):
    """A key that is not in a place index."""

    def __str__(self) -> str:  # a KeyError would put the message in quotes
        return _printable(Exception.__str__(self))
