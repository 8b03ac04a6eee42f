# SPDX-License-Identifier: MIT
"""A network of one convolution, for tests whose subject is what happens to features.

Its maps have the channels and the stride of VGG16's, so that all geometry is the same; what the
real network computes is for the tests of models, golden vectors and data sets. A process that is
to use it, too, runs :data:`IN_A_PROCESS` first.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from patchnetvlad.assets import catalog
from patchnetvlad.models import checkpoint
from patchnetvlad.models.grid import ENCODER_DIM, STRIDE
from patchnetvlad.models.netvlad import NetVLAD

CLUSTERS, COMPONENTS = 8, 128
SHARPNESS = 20.0  # of the assignment: a cell belongs to two or three clusters
IN_A_PROCESS = (
    f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r}); import thin; thin.use()\n"
)


def build_encoder() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, ENCODER_DIM, STRIDE, stride=STRIDE))


def state() -> dict[str, Tensor]:
    """Return weights by chance, always the same, that tell pictures apart.

    As in a real whitening, the bias takes away what descriptors have in common.
    """
    random = torch.Generator().manual_seed(0)
    filters = torch.randn(ENCODER_DIM, 3, STRIDE, STRIDE, generator=random)
    centroids = nn.functional.normalize(torch.randn(CLUSTERS, ENCODER_DIM, generator=random), dim=1)
    whitening = torch.randn(COMPONENTS, CLUSTERS * ENCODER_DIM, generator=random)
    whitening = nn.functional.normalize(whitening, dim=1)
    encoder = {"0.weight": filters, "0.bias": 0.1 * torch.randn(ENCODER_DIM, generator=random)}
    pool = {"centroids": centroids, "conv.weight": SHARPNESS * centroids[:, :, None, None]}
    blocks = torch.randn(32, 3, 6, 8, generator=random)
    images = nn.functional.interpolate(blocks, (96, 128), mode="bicubic")
    network = nn.Sequential(build_encoder(), NetVLAD(CLUSTERS, ENCODER_DIM))
    network[0].load_state_dict(encoder)
    network[1].load_state_dict(pool)
    with torch.no_grad():
        mean = network(images).mean(dim=0)
    return {
        **{f"encoder.{key}": value for key, value in encoder.items()},
        **{f"pool.{key}": value for key, value in pool.items()},
        "WPCA.0.weight": whitening[:, :, None, None],
        "WPCA.0.bias": -whitening @ mean,
    }


def write_checkpoint(home: Path) -> None:
    """Write the network to where a data directory has the one that comes with the package."""
    folder = home / "pretrained_models"
    folder.mkdir(parents=True)
    checkpoint.save_safetensors(state(), folder / catalog.SHIPPED_CHECKPOINT.name, torch.float32)


def use() -> None:
    """Load it in place of VGG16, in a process whose environment says where it lies."""
    checkpoint.build_encoder = build_encoder


def command(module: str) -> list[str]:
    """Return the first words of a command line that runs a command of the package with it."""
    run = f"import runpy; runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    return [sys.executable, "-c", IN_A_PROCESS + run]
