# SPDX-License-Identifier: MIT
"""Positions from models of COLMAP and from kapture."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from PIL import Image

from patchnetvlad.errors import GroundTruthError
from patchnetvlad.own_data.areas import read_own_images
from patchnetvlad.own_data.create import create_dataset
from patchnetvlad.own_data.positions.reconstruction import positions_from_reconstruction

NAMES = ("map/1.jpg", "map/2.jpg", "map/3.jpg")


def poses():
    """Yield name, centre and pose of cameras on a circle."""
    from scipy.spatial.transform import Rotation

    for i, name in enumerate(NAMES):
        centre = np.array([10.0 * np.cos(i), 0.5 * i, 20.0 * np.sin(i)])
        turn = Rotation.from_euler("y", 40.0 * i, degrees=True)
        x, y, z, w = turn.as_quat()
        yield name, centre, (w, x, y, z, *(-turn.apply(centre)))


def colmap_text(folder):
    lines = ["# Image list with two lines of data per image:\n"]
    for i, (name, _, pose) in enumerate(poses()):
        lines += [f"{i + 1} {' '.join(map(repr, map(float, pose)))} 1 {name}\n", "1.5 2.5 -1\n"]
    (folder / "images.txt").write_text("".join(lines))


def colmap_binary(folder):
    content = struct.pack("<Q", 3)
    for i, (name, _, pose) in enumerate(poses()):
        content += struct.pack("<I7dI", i + 1, *pose, 1) + name.encode() + b"\0"
        content += struct.pack("<Q", i) + bytes(24 * i)
    (folder / "sparse" / "0").mkdir(parents=True)
    (folder / "sparse" / "0" / "images.bin").write_bytes(content)


def kapture(folder):
    (folder / "sensors").mkdir()
    rows = [*enumerate(poses())]
    lines = (f"{i}, cam0, {', '.join(map(repr, map(float, of[2])))}\n" for i, of in rows)
    (folder / "sensors" / "trajectories.txt").write_text("# kapture format: 1.1\n" + "".join(lines))
    records = (f"{i}, cam0, {of[0]}\n" for i, of in rows)
    (folder / "sensors" / "records_camera.txt").write_text("".join(records))


@pytest.mark.parametrize("form", ["colmap_text", "colmap_binary", "kapture"])
def test_forms(tmp_path, form):
    globals()[form](tmp_path)
    names = [f"photos/{name}" for name in (*NAMES[::-1], "map/4.jpg")]
    found = positions_from_reconstruction(tmp_path, names)
    centres = np.array([centre for _, centre, _ in poses()])
    np.testing.assert_allclose(found.values[:3], centres[::-1][:, [0, 2]], atol=1e-9)
    assert np.isnan(found.values[3]).all()
    assert found.kind == "metres"
    assert found.headings[1] == pytest.approx(-40 % 360)
    found = positions_from_reconstruction(tmp_path, names, plane="xy")
    np.testing.assert_allclose(found.values[:3], centres[::-1][:, :2], atol=1e-9)


def test_data_set(tmp_path):
    colmap_binary(tmp_path)
    (tmp_path / "map").mkdir()
    for name in NAMES:
        Image.new("RGB", (32, 32)).save(tmp_path / name)
    summary = create_dataset(
        tmp_path / "out", images=tmp_path / "map", query_every=3, positions=tmp_path,
        threshold=5, draw_map=False,
    )  # fmt: skip
    assert (summary.num_index, summary.num_queries) == (2, 1)


def test_a_kapture_folder_by_itself(tmp_path):
    """``auto`` finds its poses; for training as well, where images without a pose are left out."""
    kapture(tmp_path)
    data = tmp_path / "sensors" / "records_data" / "map"
    data.mkdir(parents=True)
    for name in (*NAMES, "map/4.jpg"):
        Image.new("RGB", (32, 32)).save(data.parent / name)
    summary = create_dataset(
        tmp_path / "out", images=tmp_path, query_every=2, threshold=5, draw_map=False
    )
    assert summary.num_index + summary.num_queries == 3
    area = read_own_images(tmp_path)
    assert [path.name for path in area.queries] == ["1.jpg", "2.jpg", "3.jpg"]
    centres = np.array([centre for _, centre, _ in poses()])[:, [0, 2]]
    apart = np.linalg.norm(area.utm_queries - area.utm_queries[0], axis=1)
    np.testing.assert_allclose(apart, np.linalg.norm(centres - centres[0], axis=1), atol=1e-6)


@pytest.mark.parametrize("cut", [4, 60, 90, -10])
def test_a_binary_model_that_is_cut(tmp_path, cut):
    colmap_binary(tmp_path)
    file = tmp_path / "sparse" / "0" / "images.bin"
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(GroundTruthError, match=f"{file} "):
        positions_from_reconstruction(tmp_path, NAMES)


def test_what_does_not_fit(tmp_path):
    with pytest.raises(GroundTruthError, match=f"{tmp_path} .*COLMAP.*kapture"):
        positions_from_reconstruction(tmp_path, NAMES)
    kapture(tmp_path)
    with pytest.raises(GroundTruthError, match=r"trajectories\.txt .*elsewhere\.jpg"):
        positions_from_reconstruction(tmp_path, ["elsewhere.jpg"])
    (tmp_path / "sensors" / "records_camera.txt").write_text("0, cam1, map/1.jpg\n")
    with pytest.raises(GroundTruthError, match=r"trajectories\.txt .*records_camera\.txt"):
        positions_from_reconstruction(tmp_path, NAMES)
    (tmp_path / "sensors" / "trajectories.txt").write_text("0, cam0, 1, 0, 0\n")
    with pytest.raises(GroundTruthError, match=r"trajectories\.txt, line 1: .*\b3\b"):
        positions_from_reconstruction(tmp_path, NAMES)
