# SPDX-License-Identifier: MIT
"""Winograd's convolutions against direct ones in double precision."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn

from patchnetvlad.config import Config
from patchnetvlad.models.checkpoint import load_network
from patchnetvlad.models.describer import Describer
from patchnetvlad.models.encoder import build_encoder, for_inference
from patchnetvlad.models.winograd import WinogradEncoder, can_encode


def layers(*channels, rectify=True, bias=True):
    """Convolutions from one number of channels to the next, with pooling after the second."""
    torch.manual_seed(0)
    found = []
    for n, (before, after) in enumerate(pairwise(channels)):
        found.append(nn.Conv2d(before, after, 3, padding=1, bias=bias))
        if rectify or n < len(channels) - 2:
            found.append(nn.ReLU())
        if n == 1:
            found.append(nn.MaxPool2d(2, 2))
    return nn.Sequential(*found)


def deviation(encoder, images):
    """Give the largest error, relative to the largest number."""
    with torch.inference_mode():
        right = copy.deepcopy(encoder).double()(images.double())
        found = WinogradEncoder(encoder)(images)
    assert found.shape == right.shape
    assert found.dtype == torch.float32
    return float((found - right).abs().max() / right.abs().max())


class TestWinogradEncoder:
    @pytest.mark.parametrize("size", [(8, 8), (7, 5), (6, 21), (2, 3), (32, 30), (1, 1)])
    def test_sizes(self, size):
        """Also those that no whole tiles fit on."""
        encoder = nn.Sequential(*layers(20, 24)[:1])
        assert deviation(encoder, torch.randn(1, 20, *size)) < 1e-5

    @pytest.mark.parametrize("size", [(16, 16), (37, 50), (9, 70)])
    @pytest.mark.parametrize("rectify", [True, False])
    @pytest.mark.parametrize("bias", [True, False])
    def test_layers(self, size, rectify, bias):
        """The borders of inner maps are zeros, whatever the size, and with a bias, too."""
        encoder = layers(3, 32, 32, 48, 16, rectify=rectify, bias=bias)
        assert deviation(encoder, torch.randn(2, 3, *size)) < 2e-5

    def test_vgg16(self):
        torch.manual_seed(0)
        encoder = build_encoder()
        assert deviation(encoder, torch.randn(1, 3, 120, 90)) < 1e-4

    def test_nothing_left(self):
        """An image of which pooling leaves no cell."""
        assert WinogradEncoder(layers(3, 32, 32, 16))(torch.randn(1, 3, 9, 1)).shape == (
            1,
            16,
            4,
            0,
        )

    def test_images_do_not_depend_on_each_other(self):
        encode = WinogradEncoder(layers(3, 32, 32, 16))
        images = torch.randn(3, 3, 40, 30)
        together = encode(images)
        for image, found in zip(images, together, strict=True):
            torch.testing.assert_close(encode(image[None])[0], found, rtol=0, atol=0)

    @pytest.mark.parametrize("threads", [1, 3])
    def test_threads(self, threads):
        """Their number decides which tiles are multiplied together, which may round otherwise."""
        encoder = layers(3, 32, 32, 16)
        images = torch.randn(1, 3, 64, 48)
        expected = WinogradEncoder(encoder)(images)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            found = WinogradEncoder(encoder)(images)
        finally:
            torch.set_num_threads(before)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


class TestChoice:
    def test_can_encode(self):
        assert can_encode(build_encoder())
        assert not can_encode(nn.Conv2d(3, 3, 3, padding=1))
        for other in (
            nn.Conv2d(16, 16, 5, padding=2),
            nn.Conv2d(16, 16, 3),
            nn.Conv2d(16, 16, 3, padding=1, stride=2),
            nn.Conv2d(16, 16, 3, padding=1, groups=2),
            nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect"),
            nn.MaxPool2d(3, 2),
            nn.MaxPool2d(2, 2, ceil_mode=True),
            nn.GELU(),
        ):
            assert not can_encode(nn.Sequential(other))

    def test_only_if_asked_for(self):
        encoder = build_encoder()
        assert isinstance(for_inference(encoder, "fast"), WinogradEncoder)
        assert not isinstance(for_inference(encoder), WinogradEncoder)
        other = nn.Sequential(nn.Conv2d(3, 4, 5), nn.GELU())
        assert for_inference(other, "fast") is other

    def test_descriptors(self):
        """With direct sums: integral images blow up the least deviation."""
        config = Config(
            patch_sizes=(2, 5),
            strides=(1, 1),
            patch_weights=(0.5, 0.5),
            resume_path="./pretrained_models/imagenet_WPCA",
            num_pcs=128,
            patch_vlad="direct",
        )
        model = load_network(config, "cpu")
        torch.manual_seed(0)
        images = torch.randn(2, 3, 100, 140)
        exact = Describer(model).describe(images)
        fast = Describer(model, precision="fast").describe(images)
        for ours, theirs in zip(fast, exact, strict=True):
            assert (ours.descriptor - theirs.descriptor).abs().max() < 1e-5
            for a, b in zip(ours.patches, theirs.patches, strict=True):
                assert (a - b).abs().max() < 1e-4
