# SPDX-License-Identifier: MIT
"""Where images were taken: every source of positions, and the one plane they are put on."""

from __future__ import annotations

import math

import numpy as np
import pytest
from PIL import Image
from PIL.TiffImagePlugin import IFDRational

from patchnetvlad.datasets.ground_truth import GroundTruth
from patchnetvlad.errors import ConfigError, GroundTruthError
from patchnetvlad.own_data.listing import Listed
from patchnetvlad.own_data.positions.base import Positions, angle_of
from patchnetvlad.own_data.positions.exif import image_times, positions_from_exif
from patchnetvlad.own_data.positions.names import (
    parse_zone,
    positions_from_frames,
    positions_from_names,
    positions_from_order,
)
from patchnetvlad.own_data.positions.plane import project, to_plane, utm_zone
from patchnetvlad.own_data.positions.poses import positions_from_poses
from patchnetvlad.own_data.positions.reader import PositionReader
from patchnetvlad.own_data.positions.table import positions_from_table
from patchnetvlad.own_data.positions.track import interpolate, positions_from_gpx, read_gpx

NAMES = ["map/1.jpg", "map/2.jpg", "day/3.jpg"]


def write(path, text, encoding="utf-8"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(encoding))
    return path


def rational(degrees):
    """Degrees, minutes and seconds, as cameras write them."""
    whole = int(degrees)
    minutes = int((degrees - whole) * 60)
    seconds = (degrees - whole - minutes / 60) * 3600
    return IFDRational(whole), IFDRational(minutes), IFDRational(round(seconds * 10**6), 10**6)


def photo(path, lat=None, lon=None, time=None, zone=None, heading=None, subsec=None, colour=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[0x010F] = "maker"
    if lat is not None:
        gps = exif.get_ifd(0x8825)
        gps[1], gps[2] = "N" if lat >= 0 else "S", rational(abs(lat))
        gps[3], gps[4] = "E" if lon >= 0 else "W", rational(abs(lon))
        if heading is not None:
            gps[16], gps[17] = "T", IFDRational(round(heading * 100), 100)
    if time is not None:
        fields = exif.get_ifd(0x8769)
        fields[0x9003] = time
        if zone is not None:
            fields[0x9011] = zone
        if subsec is not None:
            fields[0x9291] = subsec
    Image.new("RGB", (40, 30), (colour, 0, 0)).save(path, exif=exif.tobytes())


def metres(degrees):
    """Distances, m, of the first position to all by the ellipsoid, which no plane distorts."""
    from pyproj import Geod

    first = np.broadcast_to(degrees[0], degrees.shape)
    return np.array(
        Geod(ellps="WGS84").inv(first[:, 1], first[:, 0], degrees[:, 1], degrees[:, 0])[2]
    )


class TestNames:
    def test_fields(self):
        found = positions_from_names(
            [
                "images/@0544822.18@4179498.5@10@S@037.76@-122.49@pano@03@092.5@@@@201304@@.jpg",
                "@544900@4179400@.jpg",
                "a/@0544822@4179498@56@H@@@@@@@@@@@.jpg",
                "plain.jpg",
                "@@@10@S@.jpg",
                "a@b/1.jpg",
            ]
        )
        assert found.kind == "metres"
        np.testing.assert_array_equal(
            found.values[:3], [[544822.18, 4179498.5], [544900, 4179400], [544822, 4179498]]
        )
        assert found.known.tolist() == [True] * 3 + [False] * 3
        assert found.zones[:3] == ("10N", "", "56S")
        assert found.headings[0] == 92.5
        assert np.isnan(found.headings[1:]).all()

    @pytest.mark.parametrize(
        ("words", "zone"),
        [
            (("10S", 4179498.0), "10N"),  # the band of San Francisco
            (("10S", 4179498.0, -33.0), "10S"),
            (("23S", 7394000.0), "23S"),  # the hemisphere of Sao Paulo
            (("32N",), "32N"),
            (("32 t",), "32N"),
            (("56H",), "56S"),
            (("33",), "33?"),
            (("33", 1.0, -5.0), "33S"),
            (("",), ""),
            (("S",), ""),
            (("61N",), ""),
        ],
    )
    def test_zone(self, words, zone):
        assert parse_zone(*words) == zone

    def test_zones_without_a_letter(self):
        """One will do; of two, the hemisphere must be known."""
        names = ["@700000@6300000@55@.jpg", "@700100@6300000@55@.jpg"]
        plane = to_plane([positions_from_names(names)])
        assert (plane.kind, plane.zone) == ("metres", "55")
        with pytest.raises(GroundTruthError, match=r"zone 55 .*55N.*55S"):
            to_plane([positions_from_names([names[0], "@300000@6300000@56@.jpg"])])


class TestFrames:
    def test_default_pattern(self):
        names = ["b/f7_hall_frame_000012.jpg", "a/f7_hall_frame_9.png", "c/f12 lift-3.jpg", "x.jpg"]
        found = positions_from_frames(names)
        assert found.kind == "frames"
        assert found.sequences == ("f7_hall", "f7_hall", "f12 lift", "")
        np.testing.assert_array_equal(
            found.values, [[1000, 12], [1000, 9], [0, 3], [np.nan, np.nan]]
        )
        assert found.notes == ("clips: 2 (f12 lift, f7_hall)",)

    def test_traverses_of_one_route_share_their_clip(self):
        found = positions_from_frames(["summer/images-00010.png", "winter/images-00012.png"])
        np.testing.assert_array_equal(found.values, [[0, 10], [0, 12]])

    def test_clips_are_not_cut_short_by_their_separator(self):
        found = positions_from_frames(["a_b_frame_1.jpg", "a_frame_1.jpg"])
        assert found.values[:, 0].tolist() == [1000, 0]  # "a" before "a_b"

    def test_own_pattern(self):
        found = positions_from_frames(
            ["c2/00-7-x.jpg", "c1/00-8-x.jpg"], r"(?P<clip>c\d)/\d+-(?P<frame>\d+)"
        )
        np.testing.assert_array_equal(found.values, [[1000, 7], [0, 8]])

    @pytest.mark.parametrize(
        ("pattern", "words"),
        [("(", r"frame_pattern = '\('"), (r"(\d+)", r"'\(\\\\d\+\)'.*\bframe\b")],
    )
    def test_bad_pattern(self, pattern, words):
        with pytest.raises(ConfigError, match=words):
            positions_from_frames(["1.jpg"], pattern)

    def test_order(self):
        np.testing.assert_array_equal(positions_from_order(3).values, [[0, 0], [0, 1], [0, 2]])


class TestTable:
    @pytest.mark.parametrize(
        "text",
        [
            "image,lat,lon\nmap/1.jpg,48.1,11.5\nmap/2.jpg,48.2,11.6\n",
            "Filename;GPS Latitude;GPS Longitude\nmap/1.jpg;48,1;11,5\nmap/2.jpg;48,2;11,6\n",
            "id\tlng\tLAT\tname\n7\t11.5\t48.1\tmap/1.jpg\n8\t11.6\t48.2\tmap/2.jpg\n",
            "# image, lat, lon\n# a comment\nmap/1.jpg, 48.1, 11.5\n\nmap/2.jpg, 48.2, 11.6",
            ',key,lon,lat,ca\r\n0,"map/1",11.5,48.1,\r\n1,map/2,11.6,48.2,\r\n',
            "image,x,y,lat,lon\nmap\\1.jpg,1,2,48.1,11.5\n./map/2.jpg,1,2,48.2,11.6\n",
        ],
        ids=["csv", "semicolons", "tsv", "comments", "msls", "two-kinds"],
    )
    @pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
    def test_degrees(self, tmp_path, text, encoding):
        found = positions_from_table(write(tmp_path / "p.csv", text, encoding), NAMES)
        assert found.kind == "latlon"
        np.testing.assert_array_equal(found.values, [[48.1, 11.5], [48.2, 11.6], [np.nan] * 2])
        assert np.isnan(found.headings).all()

    def test_metres_with_zone_and_heading(self, tmp_path, caplog):
        text = "img,UTM_East,UTM_North,utm zone,Heading\nmap/2.jpg,1.5,6200000,56H,350\n"
        with caplog.at_level("INFO", "patchnetvlad"):
            found = positions_from_table(write(tmp_path / "p.csv", text), NAMES)
        assert found.kind == "metres"
        assert found.values[1].tolist() == [1.5, 6200000]
        assert (found.zones[1], found.headings[1]) == ("56S", 350)
        note = (
            "p.csv: columns image = 'img', x = 'UTM_East', y = 'UTM_North', zone = 'utm zone', "
            "heading = 'Heading'"
        )
        assert found.notes == (note,)
        assert note in caplog.text

    def test_named_columns(self, tmp_path):
        file = write(tmp_path / "p.csv", "what,lat,lon,a,b\nmap/1.jpg,1,2,300,400\n")
        columns = {"image": "what", "x": "a", "y": "b"}
        found = positions_from_table(file, NAMES, columns=columns)
        assert (found.kind, found.values[0].tolist()) == ("metres", [300, 400])

    def test_paths_relative_to_folders(self, tmp_path):
        text = "image,x,y\n1.jpg,1,1\n2.jpg,2,2\nother.jpg,9,9\n"
        for file, folders in (
            (tmp_path / "map" / "p.csv", []),
            (tmp_path / "elsewhere" / "p.csv", [tmp_path / "map"]),
        ):
            found = positions_from_table(write(file, text), NAMES, root=tmp_path, folders=folders)
            assert found.values[:2].tolist() == [[1, 1], [2, 2]]
            assert found.notes[1] == "p.csv: rows of other images: 1"

    def test_no_image_is_known_by_its_basename(self, tmp_path):
        file = write(tmp_path / "p.csv", "image,x,y\n1.jpg,1,1\n")
        with pytest.raises(GroundTruthError, match=rf"{file} .*\b3\b.*'1\.jpg'.*'map/1\.jpg'"):
            positions_from_table(file, NAMES, root=tmp_path)

    def test_empty_cells_are_unknown(self, tmp_path):
        file = write(tmp_path / "p.csv", "image,x,y\nmap/1.jpg,,\nmap/2.jpg,1,nan\nday/3.jpg,1,2\n")
        assert positions_from_table(file, NAMES).known.tolist() == [False, False, True]

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("", "columns"),
            ("a,b\n1,2\n", r"\ba, b\b.*lat=NAME lon=NAME.*image,lat,lon"),
            ("lat,lon\n1,2\n", r"\blat, lon\b.*image=NAME"),
            ("image,lat,lon\nmap/1.jpg,here,2\n", "line 2: 'here' .*'lat'"),
            ("image,lat,lon\n\nmap/1.jpg,111.5,48\n", r"line 3: .*111\.5.*\b48\b"),
            (
                "image,lat,lon\nmap/1.jpg,4179498,544822\n",
                r"line 2: .*4\.1795e\+06.*544822.*metres",
            ),
            ("image,x,y\nmap/1.jpg,1,2\nmap/1.jpg,1,3\n", r"lines 2 and 3 .*map/1\.jpg"),
            ("image,x,y\nmap/1.jpg,1,inf\n", "line 2: 'inf' .*'y'"),
            ("x,y,image\n1\n", r"'nothing'.*'map/1\.jpg'"),
            ("image,x,y\nmap/1.jpg\0,1,2\n", "text"),
        ],
    )
    def test_bad(self, tmp_path, text, words):
        file = write(tmp_path / "p.csv", text)
        with pytest.raises(GroundTruthError, match=words) as caught:
            positions_from_table(file, NAMES)
        assert str(file) in str(caught.value)

    def test_bad_columns(self, tmp_path):
        file = write(tmp_path / "p.csv", "image,x,y\nmap/1.jpg,1,2\n")
        with pytest.raises(ConfigError, match=f"{file} .*'b'.*image, x, y"):
            positions_from_table(file, NAMES, columns={"x": "b"})
        with pytest.raises(ConfigError, match=r"columns: 'latitude'.* lat,"):
            positions_from_table(file, NAMES, columns={"latitude": "y"})

    def test_absent_or_no_text(self, tmp_path):
        with pytest.raises(GroundTruthError, match=rf"{tmp_path}/absent\.csv"):
            positions_from_table(tmp_path / "absent.csv", NAMES)
        (tmp_path / "p.csv").write_bytes(b"image,x,y\n\xff\xff,1,2\n")
        with pytest.raises(GroundTruthError, match=rf"{tmp_path}/p\.csv .*UTF-8.*byte 10\b"):
            positions_from_table(tmp_path / "p.csv", NAMES)

    def test_a_name_that_may_be_two_images(self, tmp_path):
        file = write(tmp_path / "p.csv", "image,x,y\n1.jpg,1,1\n")
        with pytest.raises(
            GroundTruthError, match=rf"{file}, line 2: '1\.jpg' .*a/1\.jpg.* b/1\.jpg"
        ):
            positions_from_table(
                file,
                ["a/1.jpg", "b/1.jpg"],
                root=tmp_path,
                folders=[tmp_path / "a", tmp_path / "b"],
            )

    def test_degrees_that_are_called_x_and_y(self, tmp_path):
        table = tmp_path / "points.csv"
        table.write_text("image,x,y\na.jpg,2.35,48.85\nb.jpg,2.351,48.86\n")
        with pytest.raises(GroundTruthError, match=r"points\.csv: .*--columns lon=x lat=y"):
            positions_from_table(table, ["a.jpg", "b.jpg"], root=tmp_path)
        found = positions_from_table(
            table, ["a.jpg", "b.jpg"], root=tmp_path, columns={"lon": "x", "lat": "y"}
        )
        assert found.values.tolist() == [[48.85, 2.35], [48.86, 2.351]]
        found = positions_from_table(
            table, ["a.jpg", "b.jpg"], root=tmp_path, columns={"x": "x", "y": "y"}
        )
        assert (found.kind, found.values[0].tolist()) == ("metres", [2.35, 48.85])

    def test_nowhere(self, tmp_path):
        (tmp_path / "p.csv").write_text("image,lat,lon\na.jpg,0,0\nb.jpg,48.85,2.35\n")
        found = positions_from_table(tmp_path / "p.csv", ["a.jpg", "b.jpg"], root=tmp_path)
        assert found.known.tolist() == [False, True]
        assert "p.csv: rows at 0, 0, taken for unknown: 1" in found.notes


class TestExif:
    @pytest.mark.parametrize("name", ["1.jpg", "1.png", "1.webp", "1.tif"])
    @pytest.mark.parametrize(("lat", "lon"), [(48.137154, 11.576124), (-33.8688, -70.5)])
    def test_position_and_heading(self, tmp_path, name, lat, lon):
        photo(tmp_path / name, lat, lon, heading=271.25)
        found = positions_from_exif([name], root=tmp_path)
        np.testing.assert_allclose(found.values, [[lat, lon]], atol=1e-8)
        assert found.headings.tolist() == [271.25]
        assert found.kind == "latlon"

    def test_without(self, tmp_path):
        photo(tmp_path / "none.jpg")
        photo(tmp_path / "zero.jpg", 0.0, 0.0)
        photo(tmp_path / "good.jpg", 1.0, 2.0)
        write(tmp_path / "broken.jpg", "no image")
        names = ["none.jpg", "zero.jpg", "broken.jpg", "absent.jpg", "good.jpg"]
        found = positions_from_exif(names, root=tmp_path)
        assert found.known.tolist() == [False] * 4 + [True]
        assert "images that cannot be opened: 2" in found.notes[0]
        assert "broken.jpg" in found.notes[0]
        assert "0, 0" in found.notes[1]
        assert "zero.jpg" in found.notes[1]

    def test_rationals_that_are_none(self, tmp_path):
        exif = Image.Exif()
        gps = exif.get_ifd(0x8825)
        gps[1], gps[2], gps[3] = "N", (IFDRational(0, 0),) * 3, "E"
        gps[4] = rational(2.0)
        Image.new("RGB", (8, 8)).save(tmp_path / "1.jpg", exif=exif)
        assert not positions_from_exif(["1.jpg"], root=tmp_path).known.any()

    def test_times(self, tmp_path):
        photo(tmp_path / "1.jpg", time="2024:05:01 12:00:00")
        photo(tmp_path / "2.jpg", time="2024:05:01 12:00:00", zone="+02:00", subsec="25")
        photo(tmp_path / "3.jpg", time="0000:00:00 00:00:00")
        times, notes = image_times(["1.jpg", "2.jpg", "3.jpg"], tmp_path)
        noon = 1714564800  # 2024-05-01T12:00:00Z
        np.testing.assert_array_equal(times, [noon, noon - 7200 + 0.25, np.nan])
        assert notes == [
            "images whose time has no time zone, taken for UTC: 1",
            "images without a time in their EXIF data: 1",
        ]


GPX = """<?xml version="1.0"?>
<gpx version="1.1" xmlns="http://www.topografix.com/GPX/1/1"><trk><trkseg>
<trkpt lat="48.0" lon="11.0"><ele>500</ele><time>2024-05-01T12:00:00Z</time></trkpt>
<trkpt lat="48.001" lon="11.002"><time>2024-05-01T14:00:10.0+02:00</time></trkpt>
</trkseg><trkseg>
<trkpt lat="48.1" lon="11.1"><time>2024-05-01T13:00:00Z</time></trkpt>
<trkpt lat="48.5" lon="11.5"></trkpt>
</trkseg></trk></gpx>"""


class TestGpx:
    def test_read(self, tmp_path):
        times, points = read_gpx(write(tmp_path / "t.gpx", GPX))
        assert (times - times[0]).tolist() == [0, 10, 3600]
        assert points.tolist() == [[48.0, 11.0], [48.001, 11.002], [48.1, 11.1]]

    def test_interpolation(self, tmp_path):
        file = write(tmp_path / "t.gpx", GPX)
        photo(tmp_path / "1.jpg", time="2024:05:01 12:00:04", zone="+00:00")
        photo(tmp_path / "2.jpg", time="2024:05:01 14:00:05", zone="+02:00")
        photo(tmp_path / "3.jpg", time="2024:05:01 12:30:00", zone="+00:00")
        photo(tmp_path / "4.jpg", time="2024:05:01 11:59:58", zone="+00:00")
        photo(tmp_path / "5.jpg")
        names = [f"{i}.jpg" for i in range(1, 6)]
        found = positions_from_gpx(file, names, root=tmp_path)
        nan = [np.nan, np.nan]
        expected = [[48.0004, 11.0008], [48.0005, 11.001], nan, [48.0, 11.0], nan]
        np.testing.assert_allclose(found.values, expected, atol=1e-9)
        strict = positions_from_gpx(file, names, root=tmp_path, time_tolerance=4)
        assert strict.known.tolist() == [True, False, False, True, False]

    def test_time_offset(self, tmp_path):
        file = write(tmp_path / "t.gpx", GPX)
        photo(tmp_path / "1.jpg", time="2024:05:01 14:00:02")
        with pytest.raises(
            GroundTruthError,
            match=r"t\.gpx: .*2024-05-01 12:00:00.*2024-05-01 13:00:00.*14:00:02.*time_offset",
        ):
            positions_from_gpx(file, ["1.jpg"], root=tmp_path)
        found = positions_from_gpx(file, ["1.jpg"], root=tmp_path, time_offset=-7200)
        np.testing.assert_allclose(found.values, [[48.0002, 11.0004]], atol=1e-9)

    def test_across_the_180th_meridian(self, tmp_path):
        text = GPX.replace('lon="11.0"', 'lon="179.999"').replace('lon="11.002"', 'lon="-179.999"')
        photo(tmp_path / "1.jpg", time="2024:05:01 12:00:05", zone="+00:00")
        found = positions_from_gpx(write(tmp_path / "t.gpx", text), ["1.jpg"], root=tmp_path)
        assert abs(found.values[0, 1]) == pytest.approx(180, abs=1e-9)

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("", r"t\.gpx"),
            ("<gpx/>", "track points"),
            ('<gpx><trkpt lat="1" lon="2"/></gpx>', r"\b1 points\b.* times"),
            ('<gpx><trkpt lat="1" lon="2"><time>noon</time></trkpt></gpx>', "'noon'"),
            (
                '<gpx><trkpt lat="1"><time>2024-05-01T12:00:00Z</time></trkpt></gpx>',
                r"point 1\b.*lat.*lon",
            ),
            ("<!DOCTYPE x [<!ENTITY a 'b'>]><gpx>&a;</gpx>", "document type"),
        ],
    )
    def test_bad(self, tmp_path, text, words):
        file = write(tmp_path / "t.gpx", text)
        with pytest.raises(GroundTruthError, match=words) as caught:
            read_gpx(file)
        assert str(file) in str(caught.value)

    def test_no_times(self, tmp_path):
        photo(tmp_path / "1.jpg")
        with pytest.raises(GroundTruthError, match=r"t\.gpx: .*DateTimeOriginal"):
            positions_from_gpx(write(tmp_path / "t.gpx", GPX), ["1.jpg"], root=tmp_path)


def test_interpolate():
    times, points = np.array([0.0, 10, 20]), np.array([[0.0], [1], [5]])
    wanted = np.array([-1, 0, 5, 16, 23, np.nan])
    np.testing.assert_allclose(
        interpolate(times, points, wanted, 2)[:, 0], [0, 0, np.nan, np.nan, np.nan, np.nan]
    )
    np.testing.assert_allclose(
        interpolate(times, points, wanted, 5)[:, 0], [0, 0, 0.5, 3.4, 5, np.nan]
    )


class TestPoses:
    def test_kitti(self, tmp_path):
        turn = "0 0 1 10 0 1 0 -1 -1 0 0 20"  # a quarter to the right
        file = write(tmp_path / "00.txt", f"1 0 0 0 0 1 0 0 0 0 1 0\n{turn}\n")
        found = positions_from_poses(file, ["a/1.png", "a/2.png"])
        assert found.values.tolist() == [[0, 0], [10, 20]]
        np.testing.assert_allclose(found.headings, [0, 90], atol=1e-12)
        assert "KITTI" in found.notes[0]
        other = positions_from_poses(file, ["a/1.png", "a/2.png"], plane="xy")
        assert other.values.tolist() == [[0, 0], [10, -1]]

    def test_tum_in_order(self, tmp_path):
        half = math.sqrt(0.5)  # the z axis turned to x
        text = f"# timestamp tx ty tz qx qy qz qw\n0.0 1 2 3 0 0 0 1\n0.1 4 5 6 0 {half} 0 {half}\n"
        found = positions_from_poses(write(tmp_path / "t.txt", text), ["0.png", "1.png"])
        assert found.values.tolist() == [[1, 2], [4, 5]]
        assert np.isnan(found.headings[0])  # looks along the axis that is left out
        assert found.headings[1] == pytest.approx(90)

    @pytest.mark.parametrize("scale", ["s", "ns"])
    def test_tum_by_time(self, tmp_path, scale):
        rows = [(1305031102.0 + i / 10, i) for i in range(5)]
        text = "".join(f"{time:.6f} {i} {2 * i} 0 0 0 0 1\n" for time, i in rows)
        names = ["rgb/1305031102.150000.png", "rgb/1305031109.000000.png"]
        if scale == "ns":
            names = ["rgb/1305031102150000000.png", "rgb/1305031109000000000.png"]
        found = positions_from_poses(write(tmp_path / "t.txt", text), names)
        np.testing.assert_allclose(found.values, [[1.5, 3], [np.nan, np.nan]], atol=1e-5)

    def test_counters_are_no_times(self, tmp_path):
        text = "".join(f"{i / 10} {i} 0 0 0 0 0 1\n" for i in range(50))
        with pytest.raises(
            GroundTruthError, match=r"t\.txt .*\b50 poses\b.*\b3 images\b.*4\.900000"
        ):
            positions_from_poses(write(tmp_path / "t.txt", text), ["0.png", "1.png", "2.png"])

    def test_two_sets_are_no_sequence(self, tmp_path):
        file = write(tmp_path / "t.txt", "1 0 0 0 0 1 0 0 0 0 1 0\n" * 2)
        with pytest.raises(
            GroundTruthError, match=r"t\.txt .*\b2 poses\b.*\b2 images\b.*query_positions"
        ):
            positions_from_poses(file, ["a/1.png", "b/1.png"], in_order=False)

    def test_vertical_axis_is_suspected(self, tmp_path):
        text = "".join(f"{i} {i} 0 {i} 0 0 0 1\n" for i in range(30))
        names = [f"{i}.png" for i in range(30)]
        found = positions_from_poses(write(tmp_path / "t.txt", text), names)
        assert "z is left out" in found.notes[-1]

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("", "pose"),
            ("1 2 3\n", r"line 1: 3\b"),
            ("1 0 0 0 0 1 0 0 0 0 1 0\n0 0 0 0 0 0 0 1\n", r"line 2: 8\b"),
            ("1 0 0 0 0 1 0 0 0 0 1 nan\n", "line 1: .*finite"),
            ("1 0 0 0 0 1 0 0 0 0 1 0\n", r"\b1 poses\b.*\b2 images\b.*query_every"),
        ],
    )
    def test_bad(self, tmp_path, text, words):
        with pytest.raises(GroundTruthError, match=rf"t\.txt.*{words}"):
            positions_from_poses(write(tmp_path / "t.txt", text), ["0.png", "1.png"])

    def test_bad_plane(self, tmp_path):
        with pytest.raises(ConfigError, match="plane = 'zz'"):
            positions_from_poses(tmp_path / "t.txt", [], plane="zz")


def latlon(values):
    values = np.array(values, dtype=np.float64)
    return Positions(values, "latlon", np.full(len(values), np.nan))


def utm(values, zones):
    values = np.array(values, dtype=np.float64)
    return Positions(values, "metres", np.full(len(values), np.nan), tuple(zones))


class TestPlane:
    def test_a_known_place(self):
        # The definition: 500 km east on the central meridian, scale 0.9996.
        values = project(np.array([[0.0, 9.0], [0.0, 12.0]]), "32N")
        assert values[0].tolist() == pytest.approx([500000, 0], abs=1e-6)
        assert values[1, 0] == pytest.approx(833978.557, abs=1e-3)

    def test_across_a_zone_border(self):
        index = [[48.0, 11.9999], [48.0, 12.0001], [48.0005, 11.9998], [48.0, 11.9997]]
        query = [[48.0, 12.0002]]
        plane = to_plane([latlon(index), latlon(query)])
        assert plane.zone == "32N"
        both = np.concatenate([query, index])
        flat = np.concatenate(plane.values[::-1])
        planar = np.linalg.norm(flat - flat[0], axis=1)
        np.testing.assert_allclose(planar, metres(both), rtol=1e-3)
        assert planar[2] < 10  # in their own zones they would be 440 km apart

    @pytest.mark.parametrize(
        ("degrees", "zone"),
        [
            ([[-33.8, 151.2], [-33.81, 151.21]], "56S"),
            ([[-0.0003, 33.0], [-0.0002, 33.0], [0.0001, 33.0]], "36S"),
            ([[0.0003, 33.0], [0.0002, 33.0], [-0.0001, 33.0]], "36N"),
            ([[-17.0, 179.9999], [-17.0, -179.9999], [-17.0, -179.9998]], "1S"),
            ([[52.0, 359.9], [52.0, 359.901]], "30N"),
        ],
        ids=["south", "equator-south", "equator-north", "180", "east-of-360"],
    )
    def test_one_zone(self, degrees, zone):
        plane = to_plane([latlon(degrees)])
        assert plane.zone == zone
        (flat,) = plane.values
        np.testing.assert_allclose(
            np.linalg.norm(flat - flat[0], axis=1), metres(np.array(degrees)), rtol=1.1e-3
        )
        if zone == "36S":  # the false northing goes on beyond the equator
            assert flat[2, 1] > 10_000_000 > flat[1, 1]

    def test_median_decides(self):
        degrees = np.array([[48.0, 11.0]] * 3 + [[48.0, 12.5]] * 2)
        assert utm_zone(degrees) == "32N"
        assert utm_zone(degrees[1:][::-1][:3]) == "33N"

    def test_metres_stay_as_they_are(self):
        values = [[544822.18, 4179498.5], [np.nan, np.nan]]
        plane = to_plane([utm(values, ["10N", ""])])
        np.testing.assert_array_equal(plane.values[0], values)
        assert (plane.zone, plane.notes) == ("10N", ())
        plane = to_plane([utm(values, ["", ""])])
        np.testing.assert_array_equal(plane.values[0], values)
        assert (plane.zone, plane.notes) == ("", ())

    def test_metres_of_two_zones(self):
        degrees = np.array([[48.0, 11.9999], [48.0, 12.0001]])
        values = [project(degrees[:1], "32N")[0], project(degrees[1:], "33N")[0]]
        plane = to_plane([utm(values, ["32N", "33N"])])
        flat = plane.values[0]
        assert np.linalg.norm(flat[0] - flat[1]) == pytest.approx(metres(degrees)[1], rel=1e-3)
        assert plane.notes[0] == "UTM zones 32N, 33N; all were put into one"

    def test_metres_and_degrees(self):
        degrees = np.array([[48.0, 11.0]])
        plane = to_plane([latlon(degrees), utm(project(degrees, "33N"), ["33N"])])
        assert plane.zone == "32N"
        np.testing.assert_allclose(plane.values[0], plane.values[1], atol=1e-3)

    def test_far_from_the_zone(self):
        plane = to_plane([latlon([[0.0, 9.0], [0.0, 9.0], [0.0, 24.0]])])
        assert "too long" in plane.notes[-1]

    @pytest.mark.parametrize(
        ("sets", "words"),
        [
            ([positions_from_order(2), utm([[1, 2]], [""])], "frame numbers.*coordinates"),
            ([latlon([[1, 2]]), utm([[1, 2]], [""])], "UTM zone.*degrees"),
            ([utm([[1e300, 2]], [""])], r"1e\+300"),
            ([utm([[5e5, 2]] * 3, ["32N", "33N", ""])], "32N, 33N"),
        ],
    )
    def test_no_common_plane(self, sets, words):
        with pytest.raises(GroundTruthError, match=words):
            to_plane(sets)


class TestFoundInUse:
    """Sound files of programs and people that used to be refused or misread."""

    @pytest.mark.parametrize(
        ("text", "sides", "degrees"),
        [
            ("50 deg 30' 36.00\" N", "NS", 50.51), ("50°30'36\"S", "NS", -50.51),
            ("N 50° 30.6'", "NS", 50.51), ("50:30:36", "NS", 50.51), ("50 30 36 N", "NS", 50.51),
            ("-50.51", "NS", -50.51), ("50.51° N", "NS", 50.51), ("8,25 W", "EW", -8.25),
            ("8°15\u2032O", "EW", -8.25), ("-0°30'0\"", "EW", -0.5), ("0.5W", "EW", -0.5),
            ("8 deg 15' 0.00'' E", "EW", 8.25),
            ("50 deg 70' N", "NS", math.nan), ("50 N", "EW", math.nan), ("-50 S", "NS", math.nan),
            ("N 50 S", "NS", math.nan), ("fifty", "NS", math.nan), ("1 2 3 4", "NS", math.nan),
        ],
    )  # fmt: skip
    def test_angles(self, text, sides, degrees):
        assert angle_of(text, sides) == pytest.approx(degrees, nan_ok=True)

    @pytest.mark.parametrize(
        "head",
        [
            "# a comment\nimage,lat,lon\n",
            "# one\n# two, with commas, and more, and more\n\n#Label,X/Longitude,Y/Latitude\n",
            "sep=,\nimage,lat,lon\n",
            '"sep=;"\nimage;lat;lon\n',
            "Survey of May\nby hand\nimage\tlat\tlon\n",
            "#image,lat,lon\n",
        ],
    )
    def test_what_precedes_the_names_of_columns(self, tmp_path, head):
        mark = next(mark for mark in "\t;," if mark in head.rstrip("\n").rsplit("\n", 1)[-1])
        swap = "Longitude" in head
        rows = [
            mark.join([name, *map(str, (8 + i, 50 + i) if swap else (50 + i, 8 + i))])
            for i, name in enumerate(NAMES)
        ]
        file = write(tmp_path / "t.csv", head + "\n".join(rows) + "\n# the end\n")
        found = positions_from_table(file, NAMES)
        np.testing.assert_array_equal(found.values, [[50 + i, 8 + i] for i in range(3)])

    def test_without_names_of_columns(self, tmp_path):
        file = write(tmp_path / "t.csv", "map/1.jpg,50,8\nmap/2.jpg,51,8\n")
        with pytest.raises(GroundTruthError, match=r"t\.csv .*image,lat,lon"):
            positions_from_table(file, NAMES)

    def test_the_column_that_fits_names_the_images(self, tmp_path):
        """As exiftool writes it, with and without -n, of images in subfolders."""
        for lat, lon in (("50.5", "8.25"), ('"50 deg 30\' 0.00"" N"', '"8 deg 15\' 0.00"" E"')):
            text = "FileName,Note,SourceFile,GPSLatitude,GPSLongitude\n" + "".join(
                f"{name[4:]},x,{name},{lat},{lon}\n" for name in NAMES
            )
            found = positions_from_table(write(tmp_path / "t.csv", text), NAMES)
            np.testing.assert_allclose(found.values, [[50.5, 8.25]] * 3)
            assert "image = 'SourceFile'" in found.notes[0]
        text = "lat,lon,where it is\n" + "".join(f"50,8,{name}\n" for name in NAMES)
        found = positions_from_table(write(tmp_path / "t.csv", text), NAMES)
        assert found.known.all()
        assert "image = 'where it is'" in found.notes[0]
        with pytest.raises(GroundTruthError, match=r"t\.csv .*lat, lon, n\b.*image=NAME"):
            positions_from_table(write(tmp_path / "t.csv", "lat,lon,n\n50,8,x\n"), NAMES)

    @pytest.mark.parametrize(
        ("parts", "expected"),
        [
            ([(50, 1), (305, 10), (0, 0)], 50.50833333),
            ([(505, 10), (0, 0), (0, 0)], 50.5),
            ([(50, 1), (30, 1)], 50.5),
            ([(50, 1), (0, 0), (30, 1)], None),
            ([(0, 0), (30, 1), (0, 0)], None),
        ],
    )
    def test_seconds_that_are_not_given(self, tmp_path, parts, expected):
        exif = Image.Exif()
        gps = exif.get_ifd(0x8825)
        gps[1], gps[2] = "N", tuple(IFDRational(*part) for part in parts)
        gps[3], gps[4] = "E", tuple(IFDRational(*part) for part in parts)
        Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg", exif=exif)
        found = positions_from_exif(["a.jpg"], root=tmp_path)
        if expected is None:
            assert not found.known.any()
        else:
            np.testing.assert_allclose(found.values, [[expected, expected]])

    @pytest.mark.parametrize("scale", [1, 1e3, 1e6, 1e9], ids=["s", "ms", "us", "ns"])
    @pytest.mark.parametrize("words", ["", "rgb_"])
    def test_times_outweigh_the_order(self, tmp_path, scale, words):
        times = [1305031100 + i for i in range(4)]
        names = [f"{words}{round(time * scale)}.png" for time in times]
        rows = [f"{time + 1} {10 * i} 0 0 0 0 0 1\n" for i, time in enumerate(times)]
        for some in (rows, rows[::-1]):  # as many poses as images, of other times
            found = positions_from_poses(write(tmp_path / "p.txt", "".join(some)), names)
            np.testing.assert_array_equal(found.values[:, 0], [np.nan, 0, 10, 20])
        later = "".join(f"{time + 999} 0 0 0 0 0 0 1\n" for time in times)
        with pytest.raises(GroundTruthError, match=r"p\.txt .*\b4 poses\b.*1305031100\.0"):
            positions_from_poses(write(tmp_path / "p.txt", later), names)

    def test_dates_and_counters_are_no_times(self, tmp_path):
        text = "".join(f"{1305031100 + i} {i} 0 0 0 0 0 1\n" for i in range(2))
        for names in (["20240501120000.jpg", "20240501120001.jpg"], ["a_000001.jpg", "b_7.jpg"]):
            found = positions_from_poses(write(tmp_path / "p.txt", text), names)
            np.testing.assert_array_equal(found.values[:, 0], [0, 1])
            assert "order" in found.notes[0]

    @pytest.mark.parametrize(
        ("content", "kind"),
        [
            (b'<?xml version="1.0"?>\n<kml xmlns="x"><Document/></kml>', "KML.*gpsbabel"),
            (b"<?xml version='1.0'?>\n<TrainingCenterDatabase/>", "TCX.*GPX"),
            (b"$GPGGA,123519,4807.038,N,01131.000,E,1,08,0.9,545.4,M,,,,*47\n", "NMEA.*GPX"),
            (b"\x0e\x10\xd9\x07\x00\x00\x00\x00.FIT\0\0", "FIT.*GPX"),
            (b'{"type": "FeatureCollection", "features": []}', "GeoJSON.*image,lat,lon"),
            (b'{"frames": [{"file_path": "a"}]}', "NeRF"),
            (b"#ROSBAG V2.0\n", "ROS"),
            (
                b"# Image list with two lines of data per image:\n1 1 0 0 0 0 0 0 1 a.jpg\n",
                "COLMAP",
            ),
        ],
    )
    @pytest.mark.parametrize("suffix", ["txt", "json", "log"])
    def test_other_kinds_are_named(self, tmp_path, content, kind, suffix):
        file = tmp_path / f"track.{suffix}"
        file.write_bytes(content)
        reader = PositionReader(tmp_path, None, {}, 0, None, None)
        with pytest.raises(GroundTruthError, match=rf"track\.{suffix}.*{kind}"):
            reader.read(str(file), Listed(NAMES, [], []))
        with pytest.raises(GroundTruthError, match=rf"track\.{suffix}.*{kind}"):
            GroundTruth.load(file)


@pytest.mark.parametrize("form", ["vpr-bench", "csv", "npz of objects", "array"])
def test_ground_truth_of_another_form(tmp_path, form):
    objects = np.empty((2, 2), object)
    objects[0], objects[1] = [0, [0, 1]], [1, [1]]
    file = tmp_path / ("gt.csv" if form == "csv" else "gt.npy")
    if form == "csv":
        file.write_text("image,set,x,y,heading\n0.jpg,query,1,2,\n")
    elif form == "npz of objects":
        file = tmp_path / "gt.npz"
        np.savez(file, utmQ=objects, utmDb=objects, posDistThr=1)
    else:
        np.save(file, objects if form == "vpr-bench" else np.zeros((2, 2)))
    with pytest.raises(GroundTruthError, match=str(file)) as caught:
        GroundTruth.load(file)
    assert "pickle" not in str(caught.value)
