# SPDX-License-Identifier: MIT
"""Encoders other than VGG16: residual networks of torchvision, DINOv2 of timm."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import Tensor, nn

from patchnetvlad.encoders import DEFAULT, ENCODERS
from patchnetvlad.errors import ArgumentError, CheckpointError

_RESNETS = ("resnet18", "resnet50")
_STAGES = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3")
_OF_TIMM = {
    "dinov2_vits14": "vit_small_patch14_dinov2.lvd142m",
    "dinov2_vitb14": "vit_base_patch14_dinov2.lvd142m",
}
_NOT_OF_PATCHES = ("mask_token",)  # of DINOv2's own files; for its training alone
_TORCHVISION = "features."  # of the keys of torchvision's VGG16


def build_backbone(name: str) -> nn.Module:
    """Build an encoder with random weights.

    Parameters
    ----------
    name : {"resnet18", "resnet50", "dinov2_vits14", "dinov2_vitb14"}
        A residual network ends after its third stage, which is rectified. Its batch
        normalisations keep their statistics and weights in training.

    Returns
    -------
    nn.Module
        Maps normalised images [N, 3, H, W] to [N, D, h, w].

    Raises
    ------
    ArgumentError
        timm is not installed.
    """
    if name not in _RESNETS:
        return PatchTokens(_timm().create_model(
            _OF_TIMM[name], pretrained=False, num_classes=0, dynamic_img_size=True
        ))  # fmt: skip
    from torchvision import models
    from torchvision.ops import FrozenBatchNorm2d

    whole = models.get_model(name, weights=None, norm_layer=FrozenBatchNorm2d)
    return nn.Sequential(OrderedDict((stage, getattr(whole, stage)) for stage in _STAGES))


class PatchTokens(nn.Module):
    """The tokens of patches that a vision transformer ends with, as a feature map.

    Px to the right of and below the last whole patch are not looked at. Position embeddings are
    interpolated to the number of patches.

    Parameters
    ----------
    vit : nn.Module
        A ``VisionTransformer`` of timm for images of any size.
    """

    def __init__(self, vit: nn.Module) -> None:
        super().__init__()
        self.vit: Any = vit

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images [N, 3, H, W] to tokens [N, D, h, w]."""
        side: int = self.vit.patch_embed.patch_size[0]
        height, width = (pixels // side for pixels in images.shape[2:])
        tokens = self.vit.forward_features(images[:, :, : height * side, : width * side])
        tokens = tokens[:, self.vit.num_prefix_tokens :]  # [N, h * w, D]
        return tokens.transpose(1, 2).unflatten(2, (height, width)).contiguous()


def frozen_part(encoder: nn.Module) -> list[nn.Module | nn.Parameter]:
    """Return the parts of an encoder that keep their weights in training.

    Trained are the last convolutions of VGG16, from conv5_1 on; the third stage of a residual
    network; and the last block of a transformer, with the normalisation after it. Of an encoder
    that has none of these, such as that of tests, all is trained.
    """
    if isinstance(encoder, PatchTokens):
        vit = encoder.vit
        trained = {id(p) for part in (vit.blocks[-1], vit.norm) for p in part.parameters()}
        return [p for p in vit.parameters() if id(p) not in trained]
    children = dict(encoder.named_children())
    names = list(children)
    first = next((name for name in ("24", "layer3") if name in names), None)
    return [] if first is None else [children[name] for name in names[: names.index(first)]]


def weights_url(name: str) -> str:
    """Return where the pretrained weights of an encoder other than VGG16 are published.

    Those of residual networks are torchvision's, of ImageNet's first version; those of DINOv2 are
    its authors'.

    Raises
    ------
    ArgumentError
        timm is not installed.
    """
    if name not in _RESNETS:
        return str(_timm().get_pretrained_cfg(_OF_TIMM[name]).url)
    from torchvision.models import get_model_weights

    return str(get_model_weights(name).IMAGENET1K_V1.url)


def encoder_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give the tensors of published weights of an encoder the names that they have in the network.

    Known are the files of torchvision (VGG16, residual networks), timm and DINOv2's authors;
    any other state, such as that of a whole network, is returned as it is.
    """
    if f"{_TORCHVISION}0.weight" in state:
        return {
            key.replace(_TORCHVISION, "encoder.", 1): value
            for key, value in state.items()
            if key.startswith(_TORCHVISION)
        }
    if "patch_embed.proj.weight" in state:
        return {
            f"encoder.vit.{key}": value
            for key, value in state.items()
            if not key.startswith((*_NOT_OF_PATCHES, "head."))
        }
    if "layer1.0.conv1.weight" in state:
        return {
            f"encoder.{key}": value
            for key, value in state.items()
            if key.partition(".")[0] in _STAGES and not key.endswith("num_batches_tracked")
        }
    return state


def encoder_of(state: dict[str, Tensor], source: str) -> str:
    """Return the name of the encoder whose weights are in a checkpoint.

    Encoders differ in the names and shapes of their tensors, so that a checkpoint need not say
    which it has.

    Parameters
    ----------
    state : dict of str to Tensor
        With the prefix ``encoder.``.
    source : str
        Named in errors.

    Returns
    -------
    str
        A key of :data:`~patchnetvlad.encoders.ENCODERS`.

    Raises
    ------
    CheckpointError
        It is no checkpoint of this network, or of an encoder that is not supported.
    """
    if "encoder.0.weight" in state:
        return DEFAULT
    if "encoder.layer1.0.conv1.weight" in state:
        return "resnet50" if "encoder.layer1.0.conv3.weight" in state else "resnet18"
    embedding = state.get("encoder.vit.patch_embed.proj.weight")
    if embedding is not None:
        for name in _OF_TIMM:
            if ENCODERS[name].channels == len(embedding):
                return name
        raise CheckpointError(
            f"{source} has a transformer of {len(embedding)} channels; supported are "
            f"{', '.join(f'{name} ({ENCODERS[name].channels})' for name in _OF_TIMM)}"
        )
    some = ", ".join(list(state)[:3]) or "nothing"
    raise CheckpointError(
        f"{source} is not a checkpoint of this network: it has no 'encoder.0.weight', nor the "
        f"tensors of another encoder (it holds {some})"
    )


def _timm() -> Any:
    try:
        import timm
    except ImportError:
        raise ArgumentError(
            "the encoders of DINOv2 need timm: pip install 'patchnetvlad[encoders]'"
        ) from None
    return timm
