# SPDX-License-Identifier: MIT
"""Names of all published files: image lists, ground truth, images, checkpoints."""

from __future__ import annotations

import os
from pathlib import Path

LISTS, GROUND_TRUTH, EXAMPLES = "dataset_imagenames", "dataset_gt_files", "example_images"
CHECKPOINTS, DEMO = "pretrained_models", "demo_images"

IMAGE_LISTS = tuple(
    f"{dataset}_imageNames_{part}.txt"
    for dataset in ("example", "mapillarycph", "mapillarysf", "nordland", "pitts30k", "tokyo247")
    for part in ("index", "query")
)
GROUND_TRUTH_FILES = ("nordland.npz", "pitts30k_test.npz", "tokyo247.npz")
EXAMPLE_IMAGES = ("tokyo_query.jpg", "tokyo_db.png")
DEMO_IMAGES = (
    *("montmartre_close", "gcs_close", "tokyo_db", "satellite_img", "visible", "notre_dame"),
    *("chartres", "sist_chapel", "china", "flower", "montmartre_far", "gcs_far", "tokyo_query"),
    *("photo_from_iss", "thermal"),
)

HUB_REPOSITORY = "TobiasRobotics/Patch-NetVLAD"


def hub_revision() -> str:
    """Return the branch, tag or commit of the repository that checkpoints are fetched from."""
    return os.environ.get("PATCHNETVLAD_HUB_REVISION") or "main"


#: Name of each released checkpoint on this machine -> its name on the hub.
RELEASED_CHECKPOINTS = {
    f"{local}_WPCA{size}.pth.tar": f"{hub}_WPCA{size}.pth.tar"
    for local, hub in (("mapillary", "mapillary"), ("pittsburgh", "pitts"))
    for size in (128, 512, 4096)
}
CHECKPOINT_SUFFIXES = (".pth.tar", ".safetensors")

SHIPPED_CHECKPOINT = (
    Path(__file__).resolve().parents[1] / "pretrained_models" / "imagenet_WPCA128.safetensors"
)
