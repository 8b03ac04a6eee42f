# SPDX-License-Identifier: MIT
"""From two folders of images to answers, recalls and a report."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.base.arguments import checked
from patchnetvlad.base.files import (
    check_inputs_stay,
    digest,
    file_sha256,
    make_folder,
    replace_text,
)
from patchnetvlad.base.names import absolute, is_remote
from patchnetvlad.config import Config
from patchnetvlad.datasets.ground_truth import GroundTruth
from patchnetvlad.datasets.image_list import ImageList
from patchnetvlad.datasets.traverses import SOURCES
from patchnetvlad.encoders import DEFAULT
from patchnetvlad.errors import GroundTruthError, OtherFeaturesError, ResultsError
from patchnetvlad.evaluation.recall import queries_without_positives
from patchnetvlad.features.manifest import GLOBAL_FILE
from patchnetvlad.own_data.listing import Listed
from patchnetvlad.own_data.locate import distance_for, locate
from patchnetvlad.own_data.positions.reader import PositionReader
from patchnetvlad.pipeline.extract import extract
from patchnetvlad.pipeline.match import evaluate, rerank
from patchnetvlad.pipeline.outputs import result_files
from patchnetvlad.pipeline.record import RunRecord
from patchnetvlad.pipeline.run_record import read_run
from patchnetvlad.pipeline.sequence import SequenceOptions, check_sequence
from patchnetvlad.report.write import write_report
from patchnetvlad.version import __version__

logger = logging.getLogger(__name__)

FEATURES_FOLDER, TRUTH_FILE, REPORT_FILE = "features", "ground_truth.npz", "report.html"
_MADE_OF = "made_of.sha256"  # of what the results in the folder were made of


@dataclass(frozen=True, eq=False)
class RunResult:
    """Results of :func:`run`.

    Attributes
    ----------
    record : RunRecord
        The candidates of every query, with scores and, if positions are known, recalls.
    positives : list of Q ndarray of int64, or None
        Rows of the right index images of each query; None if unknown.
    folder : Path
        Holds predictions, ``run.json``, features and, if positions are known, ground truth,
        recalls and metrics.
    report : Path
        The HTML report.
    """

    record: RunRecord
    positives: list[NDArray[np.int64]] | None
    folder: Path
    report: Path


@checked
def run(
    config: Config | str | Path,
    index: str | Path | ImageList,
    queries: str | Path | ImageList,
    output_dir: str | Path = "patchnetvlad_run",
    *,
    dataset_root: str | Path = "",
    ground_truth: str | Path | None = None,
    positions: str | Path = "auto",
    threshold: float | None = None,
    sequence: SequenceOptions | None = None,
    device: str = "auto",
    resume: bool = True,
    progress: bool = True,
) -> RunResult:
    """Find the index images that show the same places as the queries, and write a report.

    Lists the images, extracts features, retrieves and re-ranks index images, and evaluates the
    answers if positions are known. If called again, it does only what is new.

    Parameters
    ----------
    config : Config or str or Path
        A configuration, an INI file, or the name of a built-in configuration.
    index, queries : str or Path or ImageList
        Folders, read with their subfolders, or image lists.
    output_dir : str or Path, default "patchnetvlad_run"
        Created if missing.
    dataset_root : str or Path, default ""
        Root folder of relative names in lists.
    ground_truth : str or Path, optional
        A file that :meth:`~patchnetvlad.datasets.ground_truth.GroundTruth.load` reads.
    positions : str or Path, default "auto"
        Source of positions if there is no ``ground_truth``, as for
        :func:`~patchnetvlad.own_data.create.create_dataset`. With ``auto`` (file names, otherwise
        EXIF), nothing is evaluated if there are no positions.
    threshold : float, optional
        Distance within which an index image is right: by default that of ``ground_truth``,
        otherwise 25 m or 2 frames.
    sequence : SequenceOptions, optional
        Also score the candidates along the traverses of the queries.
    device : str, default "auto"
    resume : bool, default True
        Reuse results of earlier calls in ``output_dir``; False starts from scratch.
    progress : bool, default True
        Show progress bars on stderr.

    Returns
    -------
    RunResult

    Raises
    ------
    PatchNetVLADError
        Bad input, or too little disk space.
    """
    config = config if isinstance(config, Config) else Config.load(config)
    config.check_matching()
    lists = [
        given if isinstance(given, ImageList) else ImageList.read(given, dataset_root)
        for given in (index, queries)
    ]
    if sequence is not None:
        k = min(max(config.n_values), len(lists[0]))
        check_sequence(sequence, lists[1].names, lists[0].names, k)
    out = make_folder(output_dir)
    written = [
        *result_files(out),
        out / _MADE_OF,
        *([out / TRUTH_FILE] if not ground_truth else []),
    ]
    read = [ground_truth, config.source, *(images.path for images in lists), positions]
    read.append(None if sequence is None else sequence.traverses)
    check_inputs_stay(written, read, "name another --output, or copy it elsewhere")
    truth_file = None if ground_truth is None else Path(ground_truth)
    if ground_truth is None:
        truth_file = _write_truth(lists, dataset_root, positions, threshold, out)

    features = [
        _extract(config, images, dataset_root, out / part, device, resume, progress)
        for images, part in zip(lists, _feature_folders(config), strict=True)
    ]
    made_of = _made_of(config, lists, features, truth_file, threshold, sequence)
    record = _standing(out, made_of) if resume else None
    if record is None:
        record = rerank(
            config, lists[1], lists[0], features[1], features[0], dataset_root=dataset_root,
            ground_truth=truth_file, threshold=threshold, sequence=sequence, results_dir=out,
            device=device, resume=resume, progress=progress,
        )  # fmt: skip
        replace_text(out / _MADE_OF, [made_of])
    else:
        logger.info("nothing has changed: the answers of %s stand", _date(record))
    report = out / REPORT_FILE
    if not report.is_file():
        write_report(out, title=out.resolve().name, device=device, progress=progress)
    record, positives = _judged(record, truth_file, threshold)
    return RunResult(record, positives, out, report)


def _feature_folders(config: Config) -> tuple[Path, Path]:
    """Return where the features of index images and queries go, below the output."""
    folder = Path(FEATURES_FOLDER, Path(config.source).stem)
    return folder / "index", folder / "query"


def _write_truth(
    lists: list[ImageList],
    root: str | Path,
    source: str | Path,
    threshold: float | None,
    out: Path,
) -> Path | None:
    """Write ground truth, if it is known where all images were taken; return its file."""
    places = [[str(place) for place in images.image_locations(root)] for images in lists]
    file = out / TRUTH_FILE
    file.unlink(missing_ok=True)
    if source == "auto" and any(is_remote(place) for of in places for place in of):
        return None
    folders = [[Path(of.folder)] if of.folder else [] for of in lists]
    listed = [Listed(names, where, []) for names, where in zip(places, folders, strict=True)]
    reader = PositionReader(root, None, {}, 0.0, None, None)
    try:
        found = locate(reader, listed, source, None)
    except GroundTruthError:
        if source != "auto":
            raise
        logger.info("where images were taken is not known, by their names or EXIF: no recalls")
        return None
    if found.without_position:
        logger.info(
            "%d of %d images have no position by %s, such as %s: no recalls",
            len(found.without_position), found.num_images, found.source, found.without_position[0],
        )  # fmt: skip
        return None
    distance = distance_for(threshold, found.plane.kind)
    of_index, of_queries = (part.values for part in found.parts)
    logger.info(
        "positions by %s; index images within %g %s of a query are right", found.source, distance,
        "frames" if found.plane.kind == "frames" else "m",
    )  # fmt: skip
    return GroundTruth(of_queries, of_index, distance).save(file)


def _extract(
    config: Config,
    images: ImageList,
    root: str | Path,
    folder: Path,
    device: str,
    resume: bool,
    progress: bool,
) -> Path:
    """Extract features that are missing, or all if those that are there are of other settings."""
    options = {"device": device, "feature_names": "path", "progress": progress}
    try:
        extract(config, images, root, folder, resume=resume, **options)  # type: ignore[arg-type]
    except OtherFeaturesError:
        if not resume:
            raise
        logger.info("%s has features of other settings; all are extracted again", folder)
        extract(config, images, root, folder, resume=False, **options)  # type: ignore[arg-type]
    return folder


def _made_of(
    config: Config,
    lists: list[ImageList],
    features: list[Path],
    truth: Path | None,
    threshold: float | None,
    sequence: SequenceOptions | None,
) -> str:
    """Return a digest of all that results depend on."""
    settings = asdict(config)
    if config.encoder == DEFAULT:
        del settings["encoder"]  # which older versions did not know
    words = [__version__, repr(sorted(settings.items())), repr(threshold)]
    words += [absolute(images.path) for images in lists]
    words += [name for images in lists for name in images.names]
    words += [file_sha256(folder / GLOBAL_FILE) for folder in features]
    words += [] if truth is None else [str(truth), file_sha256(truth)]
    words += [] if sequence is None else [repr(sequence)]
    if sequence is not None and sequence.traverses not in SOURCES:
        words.append(file_sha256(Path(sequence.traverses)))
    return digest(words)


def _standing(out: Path, made_of: str) -> RunRecord | None:
    """Return the results of an earlier call, if they are of the same things."""
    try:
        if (out / _MADE_OF).read_text(encoding="utf-8") == made_of:
            return read_run(out)
    except (OSError, UnicodeDecodeError, ResultsError):
        pass
    return None


def _date(record: RunRecord) -> str:
    return record.origin.date if record.origin is not None else "before"


def _judged(
    record: RunRecord, truth: Path | None, threshold: float | None
) -> tuple[RunRecord, list[NDArray[np.int64]] | None]:
    """Return the record with its metrics, which its files do not hold, and the right answers."""
    if truth is None:
        return record, None
    right = GroundTruth.load(truth, threshold, (record.query_names, record.index_names))
    positives = right.positives()
    metrics = evaluate(record, right)
    judged = replace(
        record,
        metrics=metrics,
        recalls={method: values.recalls for method, values in metrics.items()},
        num_without_positives=queries_without_positives(positives),
    )
    return judged, positives
