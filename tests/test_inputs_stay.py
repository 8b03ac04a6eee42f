# SPDX-License-Identifier: MIT
"""No command writes to or deletes what it reads, whatever that is called."""

import os
import shutil

import cv2
import numpy as np
import pytest
from PIL import Image
from place_data import picture, write_ini, write_list, write_pictures
from report_data import make_run
from test_store_cli import write

from patchnetvlad.base.files import check_inputs_stay
from patchnetvlad.cli import feature_extract, feature_match, match_realtime, match_two
from patchnetvlad.cli import report as report_command
from patchnetvlad.datasets.image_list import write_image_list
from patchnetvlad.errors import OutputError
from patchnetvlad.features.convert import convert_features
from patchnetvlad.features.merge import merge_shares
from patchnetvlad.live import KeptFrame, open_source
from patchnetvlad.live.outputs import Outputs, Table
from patchnetvlad.own_data.create import create_dataset
from patchnetvlad.own_data.official import import_official
from patchnetvlad.pipeline.extract import extract
from patchnetvlad.places.index import PlaceIndex
from patchnetvlad.places.model import load_model
from patchnetvlad.recipes.run import run

pytestmark = pytest.mark.usefixtures("thin_network")


def same(path):
    return path


def spelled(path):
    return path.parent / ".." / path.parent.name / path.name


def symbolic(path):
    link = path.with_name(f"link{path.suffix}")
    link.symlink_to(path)
    return link


def hard(path):
    link = path.with_name(f"hard{path.suffix}")
    os.link(path, link)
    return link


def linked_folder(path):
    path.parent.with_name("elsewhere").symlink_to(path.parent)
    return path.parent.with_name("elsewhere") / path.name


NAMES = pytest.mark.parametrize("named", [same, spelled, symbolic, hard, linked_folder])


def contents(folder):
    files = (file for file in folder.rglob("*") if file.is_file() and not file.is_symlink())
    return {file.relative_to(folder): file.read_bytes() for file in files}


@NAMES
def test_a_file_by_any_name(named, tmp_path):
    (tmp_path / "in").mkdir()
    file = tmp_path / "in" / "a.txt"
    file.write_text("a")
    other = tmp_path / "in" / "b.txt"
    other.write_text("b")
    with pytest.raises(OutputError, match=rf"{file}\b"):
        check_inputs_stay([other, named(file)], [None, "s3://bucket/a.txt", file])
    check_inputs_stay([other, tmp_path / "new", "s3://bucket/a.txt"], [file, tmp_path / "new"])
    check_inputs_stay([os.devnull], [os.devnull])


# --- live -----------------------------------------------------------------------------------------


@pytest.fixture
def ini(tmp_path):
    (tmp_path / "ini").mkdir()
    return write_ini(tmp_path / "ini" / "small.ini")


@pytest.fixture
def video(tmp_path):
    (tmp_path / "film").mkdir()
    file = tmp_path / "film" / "drive.avi"
    writer = cv2.VideoWriter(str(file), cv2.VideoWriter_fourcc(*"MJPG"), 10, (128, 96))
    for seed in range(2):
        writer.write(np.asarray(picture(seed))[..., ::-1])
    writer.release()
    return file


def live(*words):
    return match_realtime.main([*map(str, words), "--nocuda", "--no-window"])


@NAMES
@pytest.mark.parametrize("option", ["--output", "--csv"])
def test_live_video(named, option, ini, video, capsys):
    before = video.read_bytes()
    assert live("--config_path", ini, "--source", video, option, named(video)) == 2
    assert "drive.avi" in capsys.readouterr().err
    assert video.read_bytes() == before


def test_live_file_that_a_video_is_written_to_first(ini, video):
    source = video.rename(video.with_name("drive.part.avi"))
    before = source.read_bytes()
    assert live("--config_path", ini, "--source", source, "--output", video) == 2
    assert source.read_bytes() == before


def test_live_folder_index_and_configuration(ini, tmp_path, capsys):
    (tmp_path / "frames").mkdir()
    write_pictures(tmp_path / "frames", ["1.png", "2.png"])
    with PlaceIndex(load_model(str(ini), device="cpu"), tmp_path / "places") as index:
        index.add(picture(0), keys="a")
        index.save()
    words = "--config_path", ini, "--source", tmp_path / "frames", "--index", tmp_path / "places"
    before = contents(tmp_path)
    for file in ("frames/1.png", "places/features.sqlite", "places/index.txt", "ini/small.ini"):
        assert live(*words, "--csv", tmp_path / file) == 2
        assert file in capsys.readouterr().err
    both = tmp_path / "both.avi"
    assert live(*words, "--output", both, "--csv", tmp_path / "ini" / ".." / "both.avi") == 2
    both.unlink()
    (tmp_path / "places" / "features.lock").unlink(missing_ok=True)
    before = {name: x for name, x in before.items() if name.name != "features.lock"}
    assert contents(tmp_path) == before


def test_live_from_python(ini, tmp_path):
    picture(0).save(tmp_path / "frame.png")
    source = open_source(tmp_path / "frame.png")
    table = Table(tmp_path / "frame.png")
    with pytest.raises(OutputError, match=r"frame\.png"):
        Outputs(source, KeptFrame(load_model(str(ini), device="cpu")), table=table)
    table.close()
    assert Image.open(tmp_path / "frame.png").size == (128, 96)


# --- a data set -----------------------------------------------------------------------------------


@pytest.fixture
def extracted(ini, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    write_pictures(data, ["a.png", "b.png"])
    for part, names in (("q", ["a.png"]), ("d", ["a.png", "b.png"])):
        images = write_list(data / f"{part}.txt", names)
        extract(str(ini), images, data, data / f"f{part}", device="cpu", progress=False)
    return data


def match(data, ini, **given):
    words = {
        "config_path": ini,
        "dataset_root_dir": data,
        "query_file_path": data / "q.txt",
        "index_file_path": data / "d.txt",
        "query_input_features_dir": data / "fq",
        "index_input_features_dir": data / "fd",
        "result_save_folder": data / "r",
        **given,
    }
    return feature_match.main(
        ["--nocuda", *(str(w) for key, value in words.items() for w in (f"--{key}", value))]
    )


@pytest.mark.parametrize(
    ("option", "name"),
    [
        ("candidates", "NetVLAD_hloc.txt"),
        ("candidates", "PatchNetVLAD_predictions.txt"),
        ("query_file_path", "recalls.txt"),
        ("index_file_path", "NetVLAD_hloc.txt"),
        ("ground_truth_path", "scores.npz"),
        ("config_path", "metrics.json"),
    ],
)
def test_match(option, name, extracted, ini, capsys):
    made_of = {
        "candidates": b"a.png b.png\n",
        "query_file_path": (extracted / "q.txt").read_bytes(),
        "index_file_path": (extracted / "d.txt").read_bytes(),
        "config_path": ini.read_bytes(),
    }
    results = extracted / "r"
    results.mkdir()
    file = results / name
    if option == "ground_truth_path":
        np.savez(file, utmQ=np.zeros((1, 2)), utmDb=np.array([[0, 0], [90, 0]]), posDistThr=9)
    else:
        file.write_bytes(made_of[option])
    (results / "report.html").write_text("earlier")
    before = contents(results)
    assert match(extracted, ini, **{option: file}) == 2
    assert name in capsys.readouterr().err
    assert contents(results) == before
    link = extracted / "link"
    link.symlink_to(results)
    assert match(extracted, ini, **{option: file, "result_save_folder": link}) == 2
    assert contents(results) == before
    assert match(extracted, ini, **{option: file, "result_save_folder": extracted / "r2"}) == 0


def test_features_are_not_written_over_their_list(extracted, ini, capsys):
    shutil.rmtree(extracted / "fd")
    (extracted / "fd").mkdir()
    images = (extracted / "d.txt").rename(extracted / "fd" / "features-0.json")
    before = images.read_bytes()
    assert feature_extract.main([
        "--config_path", str(ini), "--nocuda", "--no-resume",
        "--dataset_file_path", str(images), "--dataset_root_dir", str(extracted),
        "--output_features_dir", str(extracted / "fd"),
    ]) == 2  # fmt: skip
    assert "features-0.json" in capsys.readouterr().err
    assert images.read_bytes() == before


@pytest.mark.parametrize("name", ["recalls.txt", "ground_truth.npz"])
def test_run(name, extracted, ini):
    (extracted / "out").mkdir()
    images = (extracted / "d.txt").rename(extracted / "out" / name)
    before = contents(extracted)
    with pytest.raises(OutputError, match=f"{images} "):
        run(str(ini), images, images, extracted / "out", dataset_root=extracted, progress=False)
    assert contents(extracted) == before


@NAMES
def test_report(named, tmp_path, capsys):
    made = make_run(tmp_path / "run", num_queries=8, num_index=8, k=4, size=(32, 24))
    before = contents(tmp_path)
    files = (
        made.queries.path,
        made.root / "gt.npz",
        made.results / "scores.npz",
        made.root / made.index.names[-1],
    )
    for file in files:
        output = named(file)
        assert report_command.main([str(made.results), "--output", str(output)]) == 2
        assert output.name in capsys.readouterr().err
        if output.name != file.name:
            output.unlink()
        elif named is linked_folder:
            output.parent.unlink()
    assert contents(tmp_path) == before


def test_match_two(ini, tmp_path, capsys):
    file = tmp_path / "patchMatchings.png"
    picture(0).save(file)
    before = file.read_bytes()
    words = ["--config_path", ini, "--nocuda", "--first_im_path", file, "--second_im_path", file]
    assert match_two.main([*map(str, words), "--plot_save_path", str(tmp_path)]) == 2
    assert file.name in capsys.readouterr().err
    assert file.read_bytes() == before


def test_image_list(tmp_path):
    write_pictures(tmp_path, ["1.png"])
    before = contents(tmp_path)
    with pytest.raises(OutputError, match=rf"{tmp_path}/1\.png "):
        write_image_list(tmp_path, tmp_path / "1.png")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("to", ["float32", "npy"])
def test_convert(to, tmp_path):
    write(tmp_path / "f", "float32")
    before = contents(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "f")
    for target in (tmp_path / "f", tmp_path / "link"):
        with pytest.raises(OutputError, match=rf"{target}\b"):
            convert_features(tmp_path / "f", target, to, progress=False)
    assert contents(tmp_path) == before


def test_merge(extracted, ini, tmp_path):
    options = {"device": "cpu", "progress": False, "shard": "0/1"}
    extract(str(ini), extracted / "d.txt", extracted, tmp_path / "out", **options)
    share = tmp_path / "out" / "shards" / "0-of-1"
    before = contents(share)
    with pytest.raises(OutputError, match=f"{share} "):
        merge_shares(share, [share], resume=False, progress=False)
    assert contents(share) == before
    assert merge_shares(tmp_path / "out", progress=False) == 2


def test_data_set(tmp_path):
    (tmp_path / "images").mkdir()
    names = ["@0585001@4477001@1.jpg", "@0585002@4477002@2.jpg"]
    write_pictures(tmp_path / "images", names)
    out = tmp_path / "out"
    out.mkdir()
    table = out / "positions.csv"
    table.write_text("image,x,y\n" + "".join(f"{name},1,2\n" for name in names))
    (tmp_path / "link.csv").symlink_to(table)
    before = contents(tmp_path)
    for given in (table, tmp_path / "link.csv"):
        with pytest.raises(OutputError, match=rf"{given}\b"):
            create_dataset(
                out, images=tmp_path / "images", positions=given, query_every=2, draw_map=False
            )
    assert contents(tmp_path) == before


def test_official_files(tmp_path):
    file = tmp_path / "ground_truth.npz"
    file.write_bytes(b"structure")
    with pytest.raises(OutputError, match=f"{file} "):
        import_official(file, tmp_path)
    assert file.read_bytes() == b"structure"
