# SPDX-License-Identifier: MIT
"""A step of training: all layers of the network against those that follow kept maps.

A step of 24 images (8 places x 3) of 320 x 240 px, forwards and backwards, with multi-similarity
loss and AdamW, is taken in turn by the whole network, whose layers before conv5 are frozen, and by
what follows these layers, from maps in float16. Images and weights are by chance. Seconds are those
of processors (user and system time of the process), which other work on the machine hardly changes,
and on the clock.

    python benchmarks/training_step.py [--threads 2] [--repeats 5] [--profile]

Printed: medians of both, and their ratio.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from patchnetvlad.config_train import TrainConfig
from patchnetvlad.models.encoder import build_encoder
from patchnetvlad.models.netvlad import NetVLAD
from patchnetvlad.training.loop import batch_loss, freeze
from patchnetvlad.training.maps import split_encoder
from patchnetvlad.training.recipes import PlaceBatch
from patchnetvlad.training.schedule import make_optimiser


def network(encoder: nn.Module, pool: nn.Module) -> nn.Module:
    made = nn.Module()
    made.add_module("encoder", encoder)
    made.add_module("pool", pool)
    return made


def steps(
    places: int, images: int, height: int, width: int, clusters: int
) -> dict[str, Callable[[], float]]:
    """Return functions that take a step."""
    torch.manual_seed(0)
    encoder = build_encoder()
    freeze(encoder)
    frozen, rest = split_encoder(encoder)
    whole = network(encoder, NetVLAD(clusters, 512))
    config = TrainConfig(optimiser="ADAMW", learning_rate=1e-5)
    optimiser = make_optimiser(whole, config)
    count = places * images
    pixels = torch.randn(count, 3, height, width)
    with torch.no_grad():
        maps = torch.cat([frozen(image[None]) for image in pixels]).half()
    labels = tuple(n for n in range(places) for _ in range(images))
    batch = PlaceBatch(("",) * count, labels)

    def step(net: nn.Module, given: Callable[[], Tensor]) -> float:
        optimiser.zero_grad()
        loss = batch_loss(net, given(), batch)
        loss.backward()
        optimiser.step()
        return loss.item()

    from_maps = network(rest, whole.get_submodule("pool"))
    return {
        "all layers": lambda: step(whole, lambda: pixels),
        "kept maps": lambda: step(from_maps, maps.float),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (
        ("threads", 2), ("repeats", 5), ("places", 8), ("images", 3), ("height", 240),
        ("width", 320), ("clusters", 64),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N")
    parser.add_argument("--profile", action="store_true", help="print where the time goes")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    kinds = steps(given.places, given.images, given.height, given.width, given.clusters)
    for take in kinds.values():
        take()  # memory, and the library's choice of algorithms
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in kinds}
    for _ in range(given.repeats):
        for name, take in kinds.items():
            clock, processor = time.perf_counter(), time.process_time()
            take()
            passed = time.process_time() - processor, time.perf_counter() - clock
            measured[name].append(passed)
    medians = {
        name: [statistics.median(values) for values in zip(*rows, strict=True)]
        for name, rows in measured.items()
    }
    for name, (processor, clock) in medians.items():
        print(f"{name}: {processor:.2f} s of processors, {clock:.2f} s on the clock")
    whole, maps = medians.values()
    ratios = [b / a for a, b in zip(whole, maps, strict=True)]
    print(f"ratio: {ratios[0]:.3f} of processors, {ratios[1]:.3f} on the clock")
    if given.profile:
        with torch.profiler.profile() as profile:
            kinds["kept maps"]()
        print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=12))
    return 0


if __name__ == "__main__":
    sys.exit(main())
