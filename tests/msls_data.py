# SPDX-License-Identifier: MIT
"""A small data set in the form of Mapillary Street-level Sequences."""

from __future__ import annotations

import numpy as np
from PIL import Image
from place_data import picture

SUBTASKS = ("all", "s2w", "w2s", "o2n", "n2o", "d2n", "n2d")
SPACING = 12.0  # metres between index images


def write_side(folder, keys, eastings, seed, panoramas=(), night=(), sideways=()):
    """Write the four csv files and the images; two images of one place are alike."""
    (folder / "images").mkdir(parents=True)
    random = np.random.default_rng(seed)
    views = "Forward", "Sideways"

    def table(name, header, rows):
        lines = [f",key,{header}", *(f"{i},{key},{row}" for i, (key, row) in enumerate(rows))]
        (folder / name).write_text("\n".join(lines) + "\n")

    table(
        "postprocessed.csv",
        "easting,northing,unique_cluster,night,control_panel,view_direction",
        [
            (key, f"{x},7000000.0,{i},{i in night},False,{views[i in sideways]}")
            for i, (key, x) in enumerate(zip(keys, eastings, strict=True))
        ],
    )
    table(
        "raw.csv",
        "lon,lat,ca,captured_at,pano",
        [(key, f"10.0,63.0,0.0,2019-01-01,{i in panoramas}") for i, key in enumerate(keys)],
    )
    table(
        "subtask_index.csv",
        ",".join(SUBTASKS),
        [(key, "True" + ",False" * 6) for key in keys],
    )
    table("seq_info.csv", "sequence_key,frame_number", [(k, f"s,{i}") for i, k in enumerate(keys)])
    for key, x in zip(keys, eastings, strict=True):
        pixels = np.asarray(picture(1000 + int((x - 500_000) / SPACING)), np.int64)
        noise = random.integers(-50, 50, pixels.shape)
        image = Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8))
        image.save(folder / "images" / f"{key}.jpg", quality=95)


def write_msls(root, cities=("trondheim", "cph"), queries=8, index=12):
    """Write cities: every 12 m an index image, and queries 1 m from some of them."""
    for number, city in enumerate(cities):
        folder = root / "train_val" / city
        at = 500_000 + SPACING * np.arange(index)
        rows = np.linspace(0, index - 1, queries).astype(int)
        write_side(folder / "database", [f"{city}d{i}" for i in range(index)], at, number,
                   panoramas=(index - 1,))  # fmt: skip
        write_side(folder / "query", [f"{city}q{i}" for i in range(queries)], at[rows] + 1,
                   100 + number, night=(0, 4), sideways=(0, 1, 2))  # fmt: skip
    return root
