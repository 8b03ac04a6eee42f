# SPDX-License-Identifier: MIT
"""What is worked on: photographs and their variants, checkpoints, configurations, arithmetic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from sklearn.datasets import load_sample_image

from patchnetvlad.assets import demo_images
from patchnetvlad.assets.catalog import EXAMPLE_IMAGES, SHIPPED_CHECKPOINT
from patchnetvlad.assets.folders import find_asset
from patchnetvlad.assets.wheels import DEMO_WHEEL
from patchnetvlad.datasets.images import input_transform
from patchnetvlad.models.checkpoint import load_state
from patchnetvlad.models.encoder import build_encoder
from patchnetvlad.models.grid import ENCODER_DIM, feature_map_shape, grid_shape
from patchnetvlad.models.netvlad import NetVLAD

WIDTH, HEIGHT = 640, 480
THREE_SIZES, ONE_SIZE = (2, 5, 8), (5,)
WEIGHTS = {THREE_SIZES: "0.45,0.15,0.4", ONE_SIZE: "1"}


# --- images ---------------------------------------------------------------------------------------


def photographs(fetch: bool = True) -> dict[str, Image.Image]:
    """Read the demonstration's photographs, as RGB of 640 x 480.

    Without ``fetch``, and where they are not on this machine, these are scikit-learn's two.
    """
    if fetch or has_demo_images():
        images = {name: Image.open(path) for name, path in demo_images().items()}
    else:
        names = ("china", "flower")
        images = {name: Image.fromarray(load_sample_image(f"{name}.jpg")) for name in names}
    return {
        name: ImageOps.exif_transpose(image).convert("RGB").resize((WIDTH, HEIGHT))
        for name, image in images.items()
    }


def has_demo_images() -> bool:
    """Whether the demonstration's photographs are on this machine."""
    files = [*(f"example_images/{name}" for name in EXAMPLE_IMAGES), *DEMO_WHEEL.members]
    return all(find_asset(file) is not None for file in files)


def write_images(folder: Path, count: int) -> list[str]:
    """Write photographs, then their mirrored and cropped variants; return their names."""
    folder.mkdir()
    names = []
    for n, (name, image) in enumerate(islice(cycle(photographs().items()), count)):
        copy = n // len(demo_images())
        variant = ImageOps.mirror(image) if copy % 2 else image
        variant = variant.crop((8 * copy, 0, WIDTH - 8 * copy, HEIGHT))
        names.append(f"{name}_{copy}.png")
        variant.save(folder / names[-1])
    return names


def write_views(folder: Path, num_queries: int, num_index: int) -> tuple[list[str], list[str]]:
    """Write queries and index images: each photograph from many viewpoints, in other light.

    A query shares its photograph with one in fifteen index images; all others are wrong.
    """
    folder.mkdir()
    random = np.random.default_rng(0)
    images = list(photographs().values())
    lists = []
    for part, count in (("q", num_queries), ("i", num_index)):
        names = [f"{part}{n:03d}.png" for n in range(count)]
        for n, name in enumerate(names):
            view(images[n % len(images)], random).save(folder / name)
        lists.append(names)
    return lists[0], lists[1]


def view(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """Draw an image's corners somewhat inwards, and change its brightness and contrast."""
    x, y = WIDTH * random.uniform(0, 0.15, 4), HEIGHT * random.uniform(0, 0.15, 4)
    corners = (
        x[0], y[0], x[1], HEIGHT - y[1], WIDTH - x[2], HEIGHT - y[2], WIDTH - x[3], y[3],
    )  # fmt: skip
    image = image.transform(
        (WIDTH, HEIGHT), Image.Transform.QUAD, corners, Image.Resampling.BICUBIC
    )
    image = ImageEnhance.Brightness(image).enhance(random.uniform(0.7, 1.3))
    return ImageEnhance.Contrast(image).enhance(random.uniform(0.8, 1.2))


def write_list(path: Path, names: Sequence[str]) -> Path:
    path.write_text("".join(f"{name}\n" for name in names))
    return path


# --- checkpoints ----------------------------------------------------------------------------------


def write_checkpoint(
    folder: Path, num_clusters: int, num_pcs: int, images: Sequence[Image.Image] = ()
) -> Path:
    """Write a made-up checkpoint of K clusters and P components, once; return its stem.

    The encoder is that of the shipped checkpoint, the clusters are cells of two photographs with
    NetVLAD's usual sharpness, and the whitening is random, its rows of about unit length.
    """
    stem = folder / f"made_up_K{num_clusters}_WPCA"
    file = Path(f"{stem}{num_pcs}.pth.tar")
    if not file.is_file():
        state = {
            key: value
            for key, value in load_state(SHIPPED_CHECKPOINT).items()
            if key.startswith("encoder.")
        }
        cells = _cells(state, images or list(photographs().values())[:2])
        random = torch.Generator().manual_seed(0)
        chosen = torch.randperm(len(cells), generator=random)[:num_clusters]
        pool = NetVLAD(num_clusters, ENCODER_DIM)
        pool.init_params(cells[chosen].numpy(), cells.numpy())
        state |= {f"pool.{key}": value for key, value in pool.state_dict().items()}
        dim = num_clusters * ENCODER_DIM
        whitening = torch.randn(num_pcs, dim, 1, 1, generator=random).div_(dim**0.5)
        state |= {"WPCA.0.weight": whitening, "WPCA.0.bias": torch.zeros(num_pcs)}
        partial = file.with_name(f"{file.name}.part")
        torch.save({"num_pcs": num_pcs, "state_dict": state}, partial)
        partial.replace(file)
    return stem


@torch.inference_mode()
def _cells(state: dict[str, torch.Tensor], images: Sequence[Image.Image]) -> torch.Tensor:
    """Compute the normalised cells [n, D] of photographs."""
    encoder = build_encoder()
    encoder.load_state_dict({key.removeprefix("encoder."): v for key, v in state.items()})
    maps = [encoder(input_transform(image.size[::-1])(image)[None]) for image in images]
    cells = torch.cat([m[0].flatten(1).T for m in maps])
    return torch.nn.functional.normalize(cells, dim=1)


# --- configurations -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """What is extracted: the settings in which the shipped configurations differ."""

    num_pcs: int
    num_clusters: int = 64
    sizes: tuple[int, ...] = ONE_SIZE
    pooling: str = "patchnetvlad"
    image_size: tuple[int, int] = (HEIGHT, WIDTH)

    @property
    def num_patches(self) -> int:
        """Patches of all sizes on one image."""
        if self.pooling != "patchnetvlad":
            return 0
        shape = feature_map_shape(self.image_size)
        grids = [grid_shape(shape, size, 1) for size in self.sizes]
        return sum(rows * columns for rows, columns in grids)

    @property
    def flops(self) -> float:
        """Floating-point operations an image: VGG16's convolutions, and whitening."""
        whitening = 2.0 * self.num_pcs * self.num_clusters * ENCODER_DIM
        return encoder_flops(self.image_size) + (self.num_patches + 1) * whitening

    def write(self, path: Path, checkpoint: Path, **more: object) -> Path:
        """Write a configuration for both programs; ``more`` goes to the section it belongs in."""
        matching = {"matcher": "RANSAC", "n_values_all": "1,5,10,20,50,100"}
        matching |= {"pred_input_path": "None", "dataset_name": "NA"}
        extraction = {"batchsize": 5, "cachebatchsize": 5}
        shared = {"pooling": self.pooling, "resumepath": checkpoint, "threads": 0, "ngpu": 1}
        shared["num_pcs"] = self.num_pcs
        if self.pooling == "patchnetvlad":
            shared["patch_sizes"] = ",".join(map(str, self.sizes))
            shared["strides"] = ",".join("1" for _ in self.sizes)
        for key, value in more.items():
            if key in ("local_features", "cachebatchsize"):
                extraction[key] = value
            elif key in ("matcher", "ransac", "pred_input_path", "n_values_all"):
                matching[key] = value
            else:
                shared[key] = value
        size = dict(zip(("imageresizeh", "imageresizew"), self.image_size, strict=True))
        sections = {"feature_extract": extraction | size, "global_params": shared}
        if self.pooling == "patchnetvlad":
            weights = {"patchweights2use": WEIGHTS[self.sizes]}
            sections["feature_match"] = matching | size | weights
        lines = []
        for title, values in sections.items():
            lines += [f"[{title}]", *(f"{key} = {value}" for key, value in values.items()), ""]
        path.write_text("\n".join(lines))
        return path


def encoder_flops(image_size: tuple[int, int] = (HEIGHT, WIDTH)) -> float:
    """Count the floating-point operations of VGG16's convolutions on one image."""
    pixels, total = math.prod(image_size), 0.0
    for layer in build_encoder():
        if isinstance(layer, torch.nn.MaxPool2d):
            pixels //= 4
        elif isinstance(layer, torch.nn.Conv2d):
            total += 2 * pixels * layer.weight.numel()
    return total


def matching_flops(
    num_pcs: int,
    sizes: Sequence[int],
    num_candidates: int,
    image_size: tuple[int, int] = (HEIGHT, WIDTH),
) -> float:
    """Count the operations of all products of a query's patches with its candidates'."""
    counts = [Settings(num_pcs, sizes=(s,), image_size=image_size).num_patches for s in sizes]
    return 2.0 * num_pcs * num_candidates * sum(n * n for n in counts)
