# SPDX-License-Identifier: MIT
"""Cases that hold for features of every kind."""

from __future__ import annotations

from dataclasses import replace


def different(config, names):
    """What features are made of, one thing changed at a time, and what an error says of it.

    Of each: the keywords with which features are written, and the words of the error.
    """
    other = [*names[:4], "other.jpg"]
    count = f"; num_images: {len(names)} -> {len(other)}" if len(names) != len(other) else ""
    return {
        "list": ({"names": other}, f"another image list{count}"),
        "order": ({"names": names[::-1]}, "another image list"),
        "checkpoint": ({"checkpoint": "d"}, "checkpoint: c -> d"),
        "num_pcs": ({"config": replace(config, num_pcs=3)}, f"num_pcs: {config.num_pcs} -> 3"),
        "strides": ({"config": replace(config, strides=(1, 1))}, "strides: [1, 2] -> [1, 1]"),
        "image_size": (
            {"config": replace(config, image_size=(240, 320))},
            "image_size: [480, 640] -> [240, 320]",
        ),
        "patch_vlad": (
            {"config": replace(config, patch_vlad="direct")},
            "patch_vlad: integral -> direct",
        ),
    }
