# SPDX-License-Identifier: MIT
"""Live recognition: sources, the loop, overlays, videos, tables, the command."""

from __future__ import annotations

import contextlib
import csv
import http.server
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import cv2
import numpy as np
import pytest
import thin
from conftest import DEVICES, REPOSITORY
from PIL import Image
from place_data import SMALL, write_ini

from patchnetvlad.cli import feature_extract
from patchnetvlad.cli.match_realtime import main
from patchnetvlad.config import Config
from patchnetvlad.engines.local_rerank import Matcher
from patchnetvlad.errors import OutputError, PatchNetVLADError, SourceError
from patchnetvlad.live import (
    Frame,
    KeptFrame,
    Rate,
    Recognition,
    draw_overlay,
    open_source,
    recognise,
)
from patchnetvlad.live import overlay as overlay_module
from patchnetvlad.live.outputs import Outputs, Table, VideoWriter, open_window
from patchnetvlad.live.sources import Camera, Folder, Video
from patchnetvlad.places.answers import Place
from patchnetvlad.places.index import PlaceIndex
from patchnetvlad.places.model import load_model

pytestmark = pytest.mark.usefixtures("thin_network")

HEIGHT, WIDTH = SMALL.image_size


def picture(seed, size=(160, 120)):
    """Coarse random blocks, [H, W, 3], RGB."""
    blocks = np.random.default_rng(seed).integers(0, 255, (9, 12, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(blocks).resize(size, Image.Resampling.BICUBIC))


def write_video(path, pictures, fps=10.0):
    height, width = pictures[0].shape[:2]
    codec = cv2.VideoWriter_fourcc(*("MJPG" if path.suffix == ".avi" else "mp4v"))
    writer = cv2.VideoWriter(str(path), codec, fps, (width, height))
    for image in pictures:
        writer.write(cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    writer.release()
    return path


def read_video(path):
    """Return the frames, RGB."""
    capture = cv2.VideoCapture(str(path))
    frames = []
    while (read := capture.read())[0]:
        frames.append(cv2.cvtColor(read[1], cv2.COLOR_BGR2RGB))
    return frames


def all_of(source):
    with source:
        frames = []
        while not source.ended:
            if (frame := source.read(0.1)) is not None:
                frames.append(frame)
        return frames


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "small.ini"
    return str(write_ini(path, weights="0.6,0.4"))


@pytest.fixture(scope="module")
def model(config):
    return load_model(config, device="cpu")


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    """An index of four places, with positions."""
    folder = tmp_path_factory.mktemp("saved") / "index"
    with PlaceIndex(model) as index:
        index.add(
            [picture(i) for i in range(4)],
            keys=[f"place{i}" for i in range(4)],
            positions=[(10.0 * i, 5.0) for i in range(4)],
        )
        index.save(folder)
    return str(folder)


@pytest.fixture
def reranked(monkeypatch):
    """Numbers of candidates that were re-ranked, one a frame."""
    numbers = []
    original = Matcher.run

    def noted(self, todo, predictions):
        numbers.extend(len(predictions[q]) for q in todo)
        return original(self, todo, predictions)

    monkeypatch.setattr(Matcher, "run", noted)
    return numbers


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """Six frames: places 2, 2, 0, 0, 1, 1."""
    path = tmp_path_factory.mktemp("a video") / "drive.mp4"
    return write_video(path, [picture(i) for i in (2, 2, 0, 0, 1, 1)])


class TestFiles:
    def test_video(self, video):
        source = open_source(video)
        assert isinstance(source, Video)
        assert source.fps == 10
        frames = all_of(source)
        assert [f.number for f in frames] == list(range(6))
        assert [f.time for f in frames] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])
        assert frames[3].name == f"{video}#3"
        for frame, place in zip(frames, (2, 2, 0, 0, 1, 1), strict=True):
            assert frame.image.shape == (120, 160, 3)
            # Lossy, but red is red: not the blue of OpenCV's order.
            assert np.abs(frame.image.astype(int) - picture(place)).mean() < 12

    def test_every_third_frame(self, video):
        source = open_source(video, every=3)
        assert [f.number for f in all_of(source)] == [0, 3]
        assert source.fps == pytest.approx(10 / 3)
        assert (source.counts.seen, source.counts.skipped) == (6, 4)

    def test_folder_in_natural_order_without_what_is_broken(self, tmp_path):
        for i in (10, 2, 1):
            Image.fromarray(picture(i)).save(tmp_path / f"view{i}.png")
        (tmp_path / "view3.jpg").write_bytes(b"no image")
        (tmp_path / "notes.txt").write_text("no image either")
        source = open_source(tmp_path)
        assert isinstance(source, Folder)
        frames = all_of(source)
        assert [os.path.basename(f.name) for f in frames] == [
            "view1.png",
            "view2.png",
            "view10.png",
        ]
        np.testing.assert_array_equal(frames[2].image, picture(10))
        assert [f.number for f in frames] == [0, 1, 3]
        assert (source.counts.seen, source.counts.broken) == (4, 1)

    def test_one_image(self, tmp_path):
        Image.fromarray(picture(0)).save(tmp_path / "one.png")
        (frame,) = all_of(open_source(tmp_path / "one.png"))
        np.testing.assert_array_equal(frame.image, picture(0))

    def test_damaged_frames_of_a_video_are_passed_over(self, tmp_path):
        path = write_video(tmp_path / "v.avi", [picture(i) for i in range(8)])
        raw = bytearray(path.read_bytes())
        third = -1
        for _ in range(3):
            third = raw.index(b"\xff\xd8\xff", third + 1)
        end = raw.index(b"\xff\xd9", third)
        raw[third:end] = bytes(end - third)  # of the same length, so that the rest is found
        path.write_bytes(raw)
        source = open_source(path)
        frames = all_of(source)
        assert [f.number for f in frames] == [0, 1, 3, 4, 5, 6, 7]
        assert (source.counts.seen, source.counts.broken) == (8, 1)
        last = frames[-1].image.astype(int)
        assert np.abs(last - picture(7)).mean() < 12

    def test_a_video_that_breaks_off(self, tmp_path, caplog):
        path = write_video(tmp_path / "v.avi", [picture(i) for i in range(20)])
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        caplog.set_level("INFO", "patchnetvlad")
        frames = all_of(open_source(path))
        assert 5 <= len(frames) < 15
        assert re.search(rf"v\.avi .*\b{len(frames)} of 20\b", caplog.text)

    @pytest.mark.parametrize("every", [0, -1])
    def test_every_must_be_positive(self, video, every):
        with pytest.raises(SourceError, match=f"every = {every}"):
            open_source(video, every=every)

    def test_what_cannot_be_read(self, tmp_path):
        (tmp_path / "empty").mkdir()
        (tmp_path / "void.mp4").touch()
        (tmp_path / "text.mp4").write_text("no video" * 100)
        for name, word in (("empty", "jpg"), ("void.mp4", r"\b0 bytes"), ("text.mp4", "video"),
                           ("absent.mp4", "camera")):  # fmt: skip
            with pytest.raises(SourceError, match=rf"{tmp_path / name}\b.*{word}"):
                open_source(tmp_path / name)

    def test_which_words_are_cameras(self):
        for word, name in ((0, "camera 0"), ("2", "camera 2"), ("rtsp://host/x", "rtsp://host/x")):
            source = open_source(word)
            assert isinstance(source, Camera)
            assert source.live
            assert source.name == name


class StandIn:
    """A camera that does as it is told: a script of what each call of ``read`` does.

    ``"frame"`` gives one, ``"fail"`` and ``"raise"`` fail, ``"hang"`` blocks until it is released,
    ``"empty"`` gives a frame without pixels; at the end of the script it fails.
    """

    def __init__(self, script, interval=0.01, opens=True):
        self.script = iter(script)
        self.interval = interval
        self.opens = opens
        self.released = threading.Event()
        self.free = threading.Event()

    def isOpened(self):
        return self.opens

    def read(self):
        time.sleep(self.interval)
        step = next(self.script, "fail")
        if step == "hang":
            self.free.wait(20)
            return False, None
        if step == "raise":
            raise cv2.error("the driver crashed")
        if step == "empty":
            return True, np.zeros((0, 0, 3), np.uint8)
        if step == "fail":
            return False, None
        return True, np.full((48, 64, 3), (255, 0, 7), np.uint8)  # blue, in OpenCV's order

    def release(self):
        self.released.set()


def stand_in(*cameras, **options):
    """Return a source that opens these cameras one after the other, the last again and again."""
    waiting = list(cameras)

    def open_capture(_):
        return waiting.pop(0) if len(waiting) > 1 else waiting[0]

    return Camera(0, open_capture=open_capture, **options)


def frames_of(camera, count, patience=10.0):
    found = []
    end = time.monotonic() + patience
    while len(found) < count and time.monotonic() < end:
        if (frame := camera.read(0.1)) is not None:
            found.append(frame)
    return found


def read_for_ever(camera):
    while True:
        camera.read(0.05)


class TestCamera:
    def test_colours_times_and_names(self):
        with stand_in(StandIn(["frame"] * 1000)) as camera:
            frames = frames_of(camera, 3)
        assert [f.image[0, 0].tolist() for f in frames] == [[7, 0, 255]] * 3
        assert frames[0].number == 0
        assert 0 <= frames[0].time < frames[1].time < frames[2].time
        assert frames[0].name == "camera 0#0"

    def test_only_the_newest_frame_is_given(self):
        with stand_in(StandIn(["frame"] * 1000)) as camera:
            first = camera.read(5)
            time.sleep(0.5)
            second = camera.read(5)
            assert second.number - first.number > 10
            assert time.monotonic() - second.arrived < 0.1
            assert camera.counts.dropped == second.number - first.number - 1

    def test_every_tenth_frame(self):
        with stand_in(StandIn(["frame"] * 1000, 0.002), every=10) as camera:
            frames = frames_of(camera, 4)
        assert [f.number % 10 for f in frames] == [0] * 4

    def test_it_is_let_go_of(self):
        device = StandIn(["frame"] * 10000)
        with stand_in(device) as camera:
            camera.read(5)
        assert device.released.wait(5)
        assert camera.ended
        assert camera.read(0.1) is None

    @pytest.mark.parametrize("end", ["fail", "raise"])
    def test_a_camera_that_dies_is_opened_anew(self, end, caplog):
        caplog.set_level("INFO", "patchnetvlad")
        first, gone = StandIn(["frame"] * 3 + [end]), StandIn([], opens=False)
        with stand_in(first, gone, gone, StandIn(["frame"] * 10000)) as camera:
            assert camera.read(5).number == 0
            end_of_waiting = time.monotonic() + 10
            lost = 0.0
            while camera.counts.seen < 10 and time.monotonic() < end_of_waiting:
                begin = time.monotonic()
                camera.read(0.05)
                assert time.monotonic() - begin < 1  # never kept waiting
                lost = max(lost, camera.lost)
            assert lost > 0.3  # delays of 0.2 and 0.4 s between the attempts
            assert camera.read(5) is not None
            assert camera.lost == 0
        assert first.released.is_set()
        told = [record.getMessage() for record in caplog.records]
        assert sum("is lost" in text for text in told) == 1
        assert "camera 0 is back" in told
        assert any("the driver crashed" in text for text in told) == (end == "raise")

    def test_a_driver_that_hangs_keeps_nobody_waiting(self):
        hanging = StandIn(["frame", "hang"])
        with stand_in(hanging, StandIn(["frame"] * 10000), read_limit=0.3) as camera:
            assert camera.read(5).number == 0
            begin = time.monotonic()
            assert camera.read(0.1) is None
            assert time.monotonic() - begin < 0.3
            frame = camera.read(5)  # of a second thread, which opened the camera anew
            assert frame.number == 1
            assert time.monotonic() - begin < 3
            assert not hanging.released.is_set()
            hanging.free.set()
            assert hanging.released.wait(5)  # the first thread came back, and let go
        numbers = [f.number for f in frames_of(camera, 1, patience=0.3)]
        assert numbers == []

    def test_threads_that_hang_are_few(self):
        hanging = [StandIn(["hang"]) for _ in range(20)]
        before = threading.active_count()
        with stand_in(*hanging, read_limit=0.05, give_up=3) as camera:
            with pytest.raises(SourceError, match=r"camera 0 .*\b3 s\b.*--give_up"):
                read_for_ever(camera)
            assert threading.active_count() - before <= 4
            for device in hanging:
                device.free.set()

    def test_it_is_given_up(self):
        with stand_in(StandIn(["frame"]), StandIn([], opens=False), give_up=0.8) as camera:
            assert camera.read(5) is not None
            begin = time.monotonic()
            with pytest.raises(SourceError, match=r"camera 0 .*\b0\.8 s\b.*--give_up"):
                read_for_ever(camera)
            assert 0.5 < time.monotonic() - begin < 3

    def test_a_camera_that_was_never_there(self):
        begin = time.monotonic()
        with (
            stand_in(StandIn([], opens=False)) as camera,
            pytest.raises(SourceError, match=r"camera 0 .*opened"),
        ):
            camera.read(5)
        assert time.monotonic() - begin < 4

    def test_frames_without_pixels_are_counted(self):
        with stand_in(StandIn(["empty", "empty", *["frame"] * 1000])) as camera:
            assert camera.read(5).number == 2
            assert camera.counts.broken == 2


class TestLoop:
    def test_video_in_an_index(self, video, saved, model):
        with PlaceIndex.load(saved, model) as index:
            seen = list(recognise(video, index, top_k=2))
            assert [s.place.key for s in seen] == [f"place{i}" for i in (2, 2, 0, 0, 1, 1)]
            for s in seen:
                answer = index.query(s.frame.image, top_k=2)
                assert s.places == answer.places
                assert len(s.places) == 2
                assert s.score == answer.best.score
                other = index.description(s.place.key).descriptor
                assert s.similarity == pytest.approx(float(s.query.descriptor @ other), abs=1e-4)
                assert s.inliers is None
                assert 0 < s.latency < 60
            assert seen[0].fps == 0
            assert seen[-1].fps > 0
            assert seen[2].place.position == (0.0, 5.0)
            (matched,) = recognise(video, index, matches=True, max_frames=1)
            assert matched.inliers == sum(len(a) for a, _ in matched.match.inliers) > 10

    def test_threshold(self, video, saved, model):
        with PlaceIndex.load(saved, model) as index:
            (low,) = recognise(video, index, threshold=0, max_frames=1)
            (high,) = recognise(video, index, threshold=low.score + 0.1, max_frames=1)
            (open_,) = recognise(video, index, max_frames=1)
        assert (low.sure, high.sure, open_.sure) == (True, False, None)
        assert low.place.key == "place2"
        assert high.place is None
        assert high.places == low.places

    def test_without_reranking(self, video, saved, model):
        with PlaceIndex.load(saved, model) as index:
            (seen,) = recognise(video, index, rerank=False, matches=True, max_frames=1)
        assert seen.place.key == "place2"
        assert seen.score == pytest.approx(-seen.place.distance)
        assert seen.match is None

    def test_number_of_candidates(self, video, saved, model, reranked):
        with PlaceIndex.load(saved, model) as index:
            for options in ({}, {"candidates": 3}, {"candidates": 1, "top_k": 2}):
                (seen,) = recognise(video, index, max_frames=1, **options)
                assert seen.place.key == "place2"
        assert reranked == [4, 3, 2]

    @pytest.mark.parametrize("device", DEVICES)
    def test_devices(self, video, config, device):
        with PlaceIndex(load_model(config, device=device)) as index:
            index.add([picture(i) for i in range(4)], keys=list("abcd"))
            found = [seen.place.key for seen in recognise(video, index)]
        assert found == list("ccaabb")

    def test_references_whose_files_are_gone(self, video, model, config, tmp_path, capsys):
        Image.fromarray(picture(2)).save(tmp_path / "ref.png")
        (tmp_path / "list.txt").write_text("ref.png\n")
        features = tmp_path / "features"
        assert feature_extract.main(
            ["--config_path", config, "--dataset_file_path", str(tmp_path / "list.txt"),
             "--dataset_root_dir", str(tmp_path), "--output_features_dir", str(features),
             "--nocuda"]
        ) == 0  # fmt: skip
        words = ["--config_path", config, "--nocuda", "--no-window", "--source", str(video)]
        words += ["--index", str(features), "--max_frames", "1", "--matches"]
        assert main([*words, "--output", str(tmp_path / "o.mkv")]) == 0
        said = capsys.readouterr().out
        assert "drive.mp4#0: ref.png, score" in said
        assert "--matches" in said
        assert re.search(r"\bref\.png .*dataset_root", said)
        assert len(read_video(tmp_path / "o.mkv")) == 1

        words += ["--dataset_root_dir", str(tmp_path), "--csv", str(tmp_path / "t.csv")]
        assert main(words) == 0
        assert "--matches" not in capsys.readouterr().out
        (row,) = csv.DictReader((tmp_path / "t.csv").open(newline=""))
        assert int(row["matched_patches"]) > 0
        assert main([*words, "--no-rerank"]) == 0
        assert "--matches" in capsys.readouterr().out

    def test_the_first_frame_is_kept(self, video, model):
        kept = KeptFrame(model)
        seen = list(recognise(video, kept))
        assert seen[0].kept
        assert seen[0].places == ()
        assert math.isnan(seen[0].score)
        assert math.isnan(seen[0].similarity)
        assert not any(s.kept for s in seen[1:])
        assert {s.place.key for s in seen[1:]} == {f"{video}#0"}
        assert seen[1].score > 3 * max(s.score for s in seen[2:])
        assert seen[1].inliers > 20

    def test_another_frame_is_kept(self, video, model):
        kept = KeptFrame(model)
        scores = []
        for seen in recognise(video, kept):
            scores.append(seen.score)
            if seen.frame.number == 2:
                assert kept.keep(seen)
        assert kept.name == f"{video}#2"
        assert scores[3] > 3 * scores[2]
        assert kept.image(kept.name).shape == (HEIGHT, WIDTH, 3)
        with pytest.raises(KeyError):
            kept.image(f"{video}#0")
        assert not kept.keep(Recognition(None))

    def test_kept_frame_without_patches(self, video, config):
        plain = load_model(replace(Config.load(config), pooling="netvlad"), device="cpu")
        seen = list(recognise(video, KeptFrame(plain, threshold=-0.5)))
        assert seen[1].score == pytest.approx(-seen[1].places[0].distance)
        assert seen[1].place is not None
        assert seen[5].place is None

    def test_word_of_a_lost_camera(self, model):
        gone = [StandIn([], opens=False)] * 4  # 3 s, longer than it takes to describe a frame
        with stand_in(StandIn(["frame"]), *gone, StandIn(["frame"] * 10000)) as camera:
            seen = []
            for recognition in recognise(camera, KeptFrame(model)):
                seen.append(recognition)
                if len(seen) > 1 and recognition.frame is not None:
                    break
        assert seen[0].frame is not None
        lost = [s for s in seen if s.frame is None]
        assert lost
        assert lost[0].lost > 0
        assert lost[0].place is None
        assert seen[-1].frame.number >= 1

    def test_nothing_that_can_be_read(self, tmp_path, model):
        for i in range(3):
            (tmp_path / f"{i}.jpg").write_bytes(b"no image")
        with pytest.raises(SourceError, match=rf"\b3 frames\b.*{tmp_path} "):
            list(recognise(tmp_path, KeptFrame(model)))

    def test_frames_that_are_too_small(self, tmp_path, config):
        native = load_model(replace(Config.load(config), image_size=(0, 0)), device="cpu")
        Image.fromarray(picture(0)).save(tmp_path / "1.png")
        Image.fromarray(picture(0, (20, 20))).save(tmp_path / "2.png")
        Image.fromarray(picture(1)).save(tmp_path / "3.png")
        with open_source(tmp_path) as source:
            assert [s.frame.number for s in recognise(source, KeptFrame(native))] == [0, 2]
            assert source.counts.broken == 1

    @pytest.mark.parametrize("what", ["top_k", "candidates"])
    def test_numbers_must_be_positive(self, video, model, what):
        with pytest.raises(PatchNetVLADError, match=f"{what} = 0"):
            next(recognise(video, KeptFrame(model), **{what: 0}))

    def test_rate(self, video):
        now = time.monotonic()
        rate = Rate()
        assert rate.processed == 0
        assert math.isnan(rate.fps)
        assert rate.report(open_source(video).counts) == "0 frames seen, 0 processed"
        for i in range(20):
            rate.add(Recognition(Frame(i, 0.0, picture(0), "", now - 2), latency=0.1 * (i + 1)))
        rate.add(Recognition(None))
        assert rate.processed == 20
        assert rate.fps == pytest.approx(10, rel=0.1)
        assert rate.latency(50) == pytest.approx(1.05)
        assert rate.latency(95) == pytest.approx(1.905)


def found(key="place1", inside=None, score=0.25, **more):
    """A recognition of a frame."""
    place = Place(key=key, score=score, rank=1, distance=0.5, position=None, row=0)
    frame = Frame(0, 0.0, inside if inside is not None else picture(0), "frame", 0.0)
    return Recognition(frame, **{"place": place, "places": (place,), "fps": 2.5, **more})


class TestOverlay:
    @pytest.mark.parametrize("size", [(320, 240), (1920, 1080), (240, 320), (64, 48), (17, 9)])
    @pytest.mark.parametrize("value", [0, 255])
    def test_legible_on_black_and_white_at_every_size(self, size, value):
        image = np.full((size[1], size[0], 3), value, np.uint8)
        before = image.copy()
        drawn = draw_overlay(image, found("a/very/long/" * 9 + "name.jpg"), thumbnail=picture(3))
        np.testing.assert_array_equal(image, before)
        assert drawn.shape == image.shape
        assert drawn.dtype == np.uint8
        if size[1] >= 240:
            bottom = drawn[-size[1] // 9 :].astype(int)
            assert (bottom.sum(axis=2) < 3 * 80).mean() > 0.5  # the ground
            assert (bottom.max(axis=2) > 200).mean() > 0.01  # text
            middle = drawn[size[1] // 2 : size[1] * 6 // 10, : size[0] // 2]
            assert (middle == value).all()  # the picture is left alone

    def test_text_grows_with_the_frame(self):
        def ink(scale):
            image = np.zeros((240 * scale, 320 * scale, 3), np.uint8)
            return (draw_overlay(image, found()).max(axis=2) > 200).sum()

        assert 6 < ink(3) / ink(1) < 14

    def test_no_match_is_told_from_a_match(self):
        image = np.zeros((480, 640, 3), np.uint8)
        green = draw_overlay(image, found(threshold=0.1)).astype(int)
        orange = draw_overlay(image, found(place=None, threshold=0.3)).astype(int)
        white = draw_overlay(image, found()).astype(int)  # nobody knows
        assert (np.ptp(white, axis=2) < 20).all()
        assert ((green[..., 1] - green[..., 0]) > 100).sum() > 100
        assert ((orange[..., 1] - orange[..., 0]) > 100).sum() == 0
        assert ((orange[..., 0] - orange[..., 2]) > 100).sum() > 100

    def test_thumbnail_and_lines(self, video, saved, model):
        with PlaceIndex.load(saved, model) as index:
            (seen,) = recognise(video, index, matches=True, max_frames=1)
            thumbnail = index.image(seen.place.key)
        image = np.zeros((480, 640, 3), np.uint8)
        bare = draw_overlay(image, seen)
        plain = draw_overlay(image, seen, thumbnail=thumbnail)
        lined = draw_overlay(image, seen, thumbnail=thumbnail, matches=True)
        assert (bare[20:120, 480:600] == 0).all()
        small = cv2.resize(thumbnail, (192, 144), interpolation=cv2.INTER_AREA)
        close = np.abs(plain[9 : 9 + 144, 640 - 9 - 192 : 640 - 9].astype(int) - small).mean()
        assert close < 1
        assert (plain[160:380] == 0).all()
        assert (lined[160:380] > 0).any(axis=2).sum() > 200  # lines

    def test_text_is_never_under_lines(self, video, saved, model):
        with PlaceIndex.load(saved, model) as index:
            (seen,) = recognise(video, index, matches=True, max_frames=1, top_k=3)
            thumbnail = index.picture(seen.place.key)
        image = np.zeros((480, 640, 3), np.uint8)
        plain = draw_overlay(image, seen, thumbnail=thumbnail)
        lined = draw_overlay(image, seen, thumbnail=thumbnail, matches=True)
        changed = (plain != lined).any(axis=2)
        assert changed.sum() > 200
        assert not changed[367:].any()  # the bar of text
        assert not changed[:20, :60].any()  # the rate

    def test_a_lost_camera_is_seen(self):
        image = np.full((240, 320, 3), 200, np.uint8)
        lost = draw_overlay(image, Recognition(None, lost=3.0))
        assert lost[120, 2].tolist() == [0xB0, 0x00, 0x20]
        assert lost[5, 300].max() < 80
        assert (draw_overlay(image, Recognition(None)) == image).all()  # it is only slow

    def test_names_in_any_script(self, monkeypatch):
        image = np.zeros((480, 640, 3), np.uint8)
        # Matplotlib's font has these; each differs from the box for unknown characters.
        drawn = [draw_overlay(image, found(c * 8)) for c in "ЯΩاé\uffff"]
        for i, one in enumerate(drawn):
            assert not any((one == other).all() for other in drawn[:i])
        monkeypatch.setattr(overlay_module, "_other_fonts", tuple)
        assert overlay_module._font(20, False, "写x\n\udc80")[1] == "\\u5199x\\n\\udc80"
        assert draw_overlay(image, found("写真\udc80\n.jpg")).max() == 255

    def test_long_names_keep_their_end(self):
        font, text = overlay_module._fitted(
            "No match, nearest ", "a/" * 90 + "last.jpg", 20, True, 400
        )
        assert text.startswith("No match, nearest …/")
        assert text.endswith("/last.jpg")
        assert 300 < font.getlength(text) <= 400
        assert overlay_module._fitted("2. ", "x" * 99, 20, True, 100)[1].startswith("2. …x")


class TestVideoWriter:
    @pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi", ".MP4"])
    def test_what_is_written_can_be_read(self, tmp_path, suffix):
        path = tmp_path / "new" / f"out{suffix}"
        writer = VideoWriter(path, 8)
        for i in range(7):
            writer.write(picture(i, (161, 121)))
        assert not path.exists()
        writer.close()
        assert [file.name for file in path.parent.iterdir()] == [path.name]
        frames = read_video(path)
        assert len(frames) == writer.count == 7
        assert (
            np.abs(frames[6][:120, :160].astype(int) - picture(6, (161, 121))[:120, :160]).mean()
            < 15
        )

    def test_other_sizes_are_fitted_in(self, tmp_path):
        writer = VideoWriter(tmp_path / "v.avi", 5)
        writer.write(np.full((120, 160, 3), 255, np.uint8))
        writer.write(np.full((240, 120, 3), 255, np.uint8))
        writer.close()
        second = read_video(tmp_path / "v.avi")[1]
        assert second.shape == (120, 160, 3)
        assert second[:, 60:100].min() > 200
        assert second[:, :40].max() < 60

    def test_times_of_a_camera_are_kept(self, tmp_path):
        writer = VideoWriter(tmp_path / "v.mp4", 10)
        for at in (0.0, 0.02, 0.5, 0.51, 1.0):
            writer.write(picture(0), at)
        writer.close()
        assert len(read_video(tmp_path / "v.mp4")) == writer.count == 11

    def test_an_earlier_video_stays_if_nothing_is_written(self, tmp_path):
        path = tmp_path / "v.mp4"
        path.write_bytes(b"earlier")
        VideoWriter(path, 10).close()
        assert path.read_bytes() == b"earlier"

    def test_errors(self, tmp_path):
        with pytest.raises(OutputError, match=rf"{tmp_path}/v\.gif .*\.mp4, \.mkv, \.avi"):
            VideoWriter(tmp_path / "v.gif", 10)
        (tmp_path / "file").touch()
        with pytest.raises(OutputError, match=f"{tmp_path}/file "):
            VideoWriter(tmp_path / "file" / "v.mp4", 10)
        (tmp_path / "v.part.mp4").mkdir()
        writer = VideoWriter(tmp_path / "v.mp4", 10)
        with pytest.raises(OutputError, match=rf"{tmp_path}/v\.mp4 "):
            writer.write(picture(0))
        writer.close()


def test_table(tmp_path):
    table = Table(tmp_path / "new" / "t.csv", top_k=2)
    table.write(found('comma, "quote"', latency=0.1234))
    table.write(Recognition(None, lost=3))
    with table.path.open(newline="") as file:  # before it is closed
        (row,) = csv.DictReader(file)
    assert row == {
        "frame": "0", "time_s": "0.000", "name": "frame", "match": "1", "key": 'comma, "quote"',
        "score": "0.250000", "similarity": "0.875000", "matched_patches": "", "position": "",
        "latency_ms": "123.4", "fps": "2.50", "confidence": "", "key_2": "", "score_2": "",
    }  # fmt: skip
    table.close()
    with pytest.raises(OutputError, match=f"{tmp_path} "):
        Table(tmp_path)


class Screen:
    """A window whose keys are pressed by a script."""

    def __init__(self, keys):
        self.keys = iter(keys)
        self.pictures = []

    def show(self, shown):
        self.pictures.append(shown)
        return next(self.keys)

    def close(self):
        pass


def test_n_keeps_the_present_frame(video, model):
    kept = KeptFrame(model)
    screen = Screen(["", "n", "", "", "n", ""])
    said = []
    with open_source(video) as source:
        outputs = Outputs(source, kept, window=screen, say=said.append)
        seen = []
        for recognition in recognise(source, kept):
            outputs.take(recognition)
            seen.append(recognition)
    assert [s.places[0].key[-1] for s in seen[1:]] == ["0", "1", "1", "1", "4"]
    assert said == [f"kept {video}#1", f"kept {video}#4"]
    assert [p.shape for p in screen.pictures] == [(120, 160, 3)] * 6


@pytest.mark.skipif(not os.environ.get("DISPLAY"), reason="there is no screen")
def test_window():
    pytest.importorskip("tkinter")
    window = open_window("a test")
    assert type(window).__name__ == "_TkWindow"
    try:
        assert window.show(picture(0, (320, 240))) == ""
        root = window._root
        assert (root.winfo_width(), root.winfo_height()) == (320, 240)
        root.focus_force()
        root.event_generate("<Key>", keysym="n")
        root.geometry("400x400")
        assert window.show(picture(0, (320, 240))) == "n"
        assert window.show(picture(1, (320, 240))) == ""
        assert (window._photo.width(), window._photo.height()) == (400, 400)
        root.event_generate("<Key>", keysym="q")
        assert "q" in window.show(picture(0))
        root.tk.call(root.protocol("WM_DELETE_WINDOW"))  # its closing button
        assert window.show(picture(0)) == "q"
        root.destroy()
        assert window.show(picture(0)) == "q"
    finally:
        window.close()


class TestCommand:
    def words(self, config, *more):
        return ["--config_path", config, "--nocuda", "--no-window", *map(str, more)]

    def test_video_in_an_index(self, config, video, saved, tmp_path, capsys):
        out, table = tmp_path / "out.mp4", tmp_path / "t.csv"
        assert main(self.words(
            config, "--source", video, "--index", saved, "--output", out, "--csv", table,
            "--top_k", 2, "--matches", "--threshold", 0.01,
        )) == 0  # fmt: skip
        frames = read_video(out)
        assert len(frames) == 6
        assert frames[0].shape == (120, 160, 3)
        assert cv2.VideoCapture(str(out)).get(cv2.CAP_PROP_FPS) == 10
        with table.open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert [row["key"] for row in rows] == [f"place{i}" for i in (2, 2, 0, 0, 1, 1)]
        assert [row["time_s"] for row in rows] == [f"0.{i}00" for i in range(6)]
        assert {row["match"] for row in rows} == {"1"}
        assert rows[0]["position"] == "20 5"
        assert all(int(row["matched_patches"]) > 10 for row in rows)
        assert all(row["key_2"].startswith("place") for row in rows)
        printed = capsys.readouterr().out
        assert "4 places in" in printed
        assert f"{video}#4: place1, score" in printed
        assert "6 frames seen, 6 processed\n" in printed
        assert "frames/s over" in printed
        assert "95th percentile" in printed
        assert "on cpu (" in printed
        assert f"6 frames of video are in {out}" in printed

    def test_number_of_candidates(self, config, video, saved, reranked):
        words = self.words(config, "--source", video, "--index", saved, "--max_frames", 2)
        assert main([*words, "--candidates", "3"]) == 0
        assert reranked == [3, 3]

    def test_folder_against_the_first_frame(self, config, tmp_path, capsys):
        for i, place in enumerate((3, 3, 1)):
            Image.fromarray(picture(place)).save(tmp_path / f"{i}.png")
        (tmp_path / "1b.png").write_bytes(b"no image")
        words = self.words(config, "--source", tmp_path, "--csv", tmp_path / "t.csv")
        assert main([*words, "--threshold", "0.6"]) == 0
        with (tmp_path / "t.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert [row["match"] for row in rows] == ["0", "1", "0"]
        assert [row["frame"] for row in rows] == ["0", "1", "3"]
        printed = capsys.readouterr().out
        assert "0.png: kept as the reference" in printed
        assert "2.png: no match (" in printed
        assert "4 frames seen, 3 processed, 1 broken" in printed

    def test_every_and_max_frames(self, config, video, tmp_path, capsys):
        words = self.words(config, "--source", video, "--output", tmp_path / "o.avi")
        assert main([*words, "--every", "2", "--max_frames", "2"]) == 0
        assert len(read_video(tmp_path / "o.avi")) == 2
        assert "3 frames seen, 2 processed, 1 left out (--every)" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--source", "absent.mp4"], "'absent.mp4'"),
            (["--source", "text.mp4"], "text.mp4 "),
            (["--source", "empty"], " empty "),
            (["--source", "97"], "camera 97 "),
            (["--source", "one.png", "--index", "empty"], " empty: "),
            (["--source", "one.png", "--output", "o.gif"], "o.gif "),
            (["--source", "one.png", "--device", "cuda:x"], "cuda:x"),
        ],
    )
    def test_errors(self, config, tmp_path, monkeypatch, capsys, words, message):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "empty").mkdir()
        (tmp_path / "text.mp4").write_text("no video")
        Image.fromarray(picture(0)).save(tmp_path / "one.png")
        assert main(["--config_path", config, "--no-window", *words]) == 2
        printed = capsys.readouterr().err
        assert printed.startswith("error: ")
        assert message in printed
        assert "Traceback" not in printed
        assert sorted(f.name for f in tmp_path.iterdir()) == ["empty", "one.png", "text.mp4"]

    @pytest.mark.parametrize(
        "words",
        [
            ["--every", "0"],
            ["--top_k", "x"],
            ["--candidates", "0"],
            ["--threshold", "nan"],
            ["--give_up", "-1"],
        ],
    )
    def test_values_that_mean_nothing(self, config, words, capsys):
        with pytest.raises(SystemExit) as stop:
            main(["--config_path", config, *words])
        assert stop.value.code == 2
        assert f"argument {words[0]}: " in capsys.readouterr().err

    @pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere there is a screen")
    def test_without_a_screen(self, config, video, monkeypatch, capsys):
        for name in ("DISPLAY", "WAYLAND_DISPLAY"):
            monkeypatch.delenv(name, raising=False)
        with pytest.raises(PatchNetVLADError, match="--no-window --output"):
            open_window("x")
        assert main(["--config_path", config, "--source", str(video)]) == 2
        assert "--no-window --output" in capsys.readouterr().err

    @pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
    @pytest.mark.parametrize(
        "number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM]
    )
    def test_a_signal_ends_it_cleanly(self, config, tmp_path, number):
        source = write_video(tmp_path / "long.mp4", [picture(i % 9) for i in range(3000)])
        out, table = tmp_path / "out.mp4", tmp_path / "t.csv"
        words = self.words(config, "--source", source, "--output", out, "--csv", table)
        process = subprocess.Popen(
            [*thin.command("patchnetvlad.cli.match_realtime"), *words],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        end = time.monotonic() + 120
        while time.monotonic() < end:
            if table.exists() and table.read_text().count("\n") > 5:
                break
            time.sleep(0.05)
        process.send_signal(number)
        printed, errors = process.communicate(timeout=60)
        assert process.returncode == 128 + number
        assert errors == ""
        assert "frames/s over" in printed
        lines = table.read_text().count("\n") - 1
        assert 5 <= lines < 3000
        assert len(read_video(out)) == lines
        assert not (tmp_path / "out.part.mp4").exists()

    @pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
    def test_a_film_that_is_killed_can_be_played(self, tmp_path):
        code = (
            "import numpy as np, os, sys\n"
            "from patchnetvlad.live.outputs import VideoWriter\n"
            "w = VideoWriter(sys.argv[1], 10)\n"
            "r = np.random.default_rng(0)\n"
            "for _ in range(60): w.write(r.integers(0, 255, (240, 320, 3), dtype=np.uint8))\n"
            "os.kill(os.getpid(), 9)\n"
        )
        subprocess.run([sys.executable, "-c", code, tmp_path / "v.mkv"], cwd=REPOSITORY)
        assert 40 < len(read_video(tmp_path / "v.part.mkv")) <= 60


class Stream:
    """A network camera: motion JPEG over HTTP, which can be switched off and on."""

    def __init__(self):
        self.port = 0
        self._server = None

    def start(self):
        stream = self
        good, jpeg = cv2.imencode(".jpg", np.full((48, 64, 3), (255, 0, 7), np.uint8))
        assert good
        self._on = True

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(200)
                self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
                self.end_headers()
                with contextlib.suppress(OSError):
                    while stream._on:
                        self.wfile.write(
                            b"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n"
                            % jpeg.size + jpeg.tobytes() + b"\r\n"
                        )  # fmt: skip
                        time.sleep(0.02)

            def log_message(self, *_):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self):
        self._on = False
        self._server.shutdown()
        self._server.server_close()


def test_a_network_camera_that_is_switched_off_and_on(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    stream = Stream()
    stream.start()
    with open_source(f"http://127.0.0.1:{stream.port}/live.mjpg", give_up=60) as camera:
        first = frames_of(camera, 5, patience=60)
        assert len(first) == 5
        assert np.abs(first[4].image.reshape(-1, 3).mean(axis=0) - (7, 0, 255)).max() < 12
        stream.stop()
        end = time.monotonic() + 30
        while not camera.lost and time.monotonic() < end:
            begin = time.monotonic()
            camera.read(0.1)
            assert time.monotonic() - begin < 2
        assert camera.lost
        stream.start()
        again = frames_of(camera, 3, patience=60)
        assert len(again) == 3
        assert not camera.lost
        begin = time.monotonic()
    assert time.monotonic() - begin < 5
    stream.stop()
