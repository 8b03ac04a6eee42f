# SPDX-License-Identifier: MIT
"""File formats that hold positions, with advice on those that cannot be read directly."""

from __future__ import annotations

import re
from pathlib import Path

_BY_CREATE = "`patchnetvlad-dataset create --positions FILE` makes ground truth from it"
_TO_GPX = "convert it to GPX, for example by gpsbabel, and give that as positions"
_TO_TABLE = (
    "write a table (.csv) with columns image,lat,lon or image,x,y, and give that as positions"
)

# Its first bytes -> kind, and the way out.
_KINDS = (
    (rb"(?s).{0,2000}<kml\b", "a KML file", _TO_GPX),
    (rb"(?s).{0,2000}<TrainingCenterDatabase\b", "a TCX file", _TO_GPX),
    (rb"(?s).{0,2000}<gpx\b", "a GPX track", f"with the suffix .gpx, {_BY_CREATE}"),
    (rb"(?s).{0,2000}<osm\b", "a file of OpenStreetMap", _TO_GPX),
    (rb"(?s)\s*\$[A-Z]{2}[A-Z]{3},", "a log of NMEA sentences", _TO_GPX),
    (rb"(?s).{8}\.FIT", "a FIT file", _TO_GPX),
    (rb"(?s)\s*\{.{0,2000}\"(FeatureCollection|Feature|Point|LineString)\"", "GeoJSON", _TO_TABLE),
    (rb"(?s)\s*\{.{0,2000}\"frames\"", "transforms of a NeRF in JSON", _TO_TABLE),
    (rb"(?s)\s*[\[{].*[\]}\"0-9,\s]", "JSON", _TO_TABLE),
    (rb"(?s)(#[^\n]*\n)*# *Image list with two lines of data per image", "COLMAP's images.txt",
     _TO_TABLE),
    (rb"MATLAB ", "a MATLAB file",
     "`patchnetvlad-dataset official` reads those of Pittsburgh and Tokyo 24/7"),
    (rb"\x89HDF", "an HDF5 file", _TO_TABLE),
    (rb"#ROSBAG|\x89MCAP", "a bag of ROS", _TO_TABLE),
    (rb"SQLite format 3", "an SQLite database", _TO_TABLE),
    (rb"\0\0\x27\x0a", "a shapefile", _TO_TABLE),
    (rb"LASF", "a LAS file", _TO_TABLE),
    (rb"\x93NUMPY", "a single array of NumPy", "ground truth is an .npz with utmQ and utmDb"),
    (rb"\x80[\x02-\x05]", "a pickle, which is never loaded",
     "ground truth is an .npz with utmQ and utmDb"),
    (rb"PK\x03\x04.{26}(_rels|\[Content|xl/)", "a workbook", "save it as .csv"),
)  # fmt: skip
_FIRST = 4096


def kind_of(file: Path, tables: bool = True) -> str:
    """Describe a file that is neither ground truth nor readable positions.

    Parameters
    ----------
    file : Path
    tables : bool, default True
        Recognise tables, too.

    Returns
    -------
    str
        Such as ``it is a KML file; convert it to GPX``; empty where nothing is recognised, or the
        file cannot be read.
    """
    try:
        with file.open("rb") as opened:
            head = opened.read(_FIRST)
    except (OSError, ValueError):
        return ""
    for mark, name, way in _KINDS:
        if re.match(mark, head):
            return f"it is {name}; {way}"
    if not tables:
        return ""
    lines = head.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "replace").splitlines()[:5]
    counts = {sum(line.count(mark) for mark in ",;\t") for line in lines[:-1] or lines}
    if b"\0" not in head and lines and min(counts) > 0:
        return f"it is a table; with the suffix .csv, {_BY_CREATE}"
    return ""
