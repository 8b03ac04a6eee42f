# SPDX-License-Identifier: MIT
"""How sure answers are: their probability, its quality, and re-ranking only what is not sure."""

from __future__ import annotations

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
from place_data import SMALL
from place_data import picture as place_picture
from report_data import make_run
from test_cli import world, write_config

from patchnetvlad import Config, PlaceIndex, calibrate_confidence, load_model, write_report
from patchnetvlad.cli import calibrate_confidence as command
from patchnetvlad.cli import feature_match
from patchnetvlad.engines.journal import Journal
from patchnetvlad.errors import ArgumentError, ConfigError, ResultsError
from patchnetvlad.evaluation.calibration import (
    Calibration,
    area_under_risk_coverage,
    measure_calibration,
)
from patchnetvlad.evaluation.confidence import (
    Confidence,
    Logistic,
    find_confidence,
    settings_of,
    shipped_confidence,
)
from patchnetvlad.evaluation.confidence_fit import fit_logistic, groups_of, split_groups
from patchnetvlad.evaluation.signals import reranking_signals, retrieval_signals
from patchnetvlad.pipeline.extract import extract
from patchnetvlad.pipeline.match import rerank
from patchnetvlad.pipeline.run_record import read_run
from patchnetvlad.pipeline.sequence import SequenceOptions

__all__ = ["world"]

pytestmark = pytest.mark.usefixtures("thin_network")


def sure_file(path, config, retrieved, reranked):
    """Write confidences for a configuration; both are (intercept, coefficient of each signal)."""
    methods = {
        "NetVLAD": Logistic(retrieved[0], (retrieved[1],) * 2),
        "PatchNetVLAD": Logistic(reranked[0], (reranked[1],) * 3),
    }
    about = {"name": "imagenet_WPCA128", "sha256": ""}
    Confidence(methods, about, settings_of(config)).save(path)
    return str(path)


class TestQuality:
    def test_by_hand(self):
        sure = [0.95, 0.91, 0.55, 0.51, 0.05]
        found = measure_calibration(sure, [True, False, True, True, False], relevant=4)
        # Bins of .9, .5 and 0: |1.86 - 1| + |1.06 - 2| + |.05 - 0|, of 5 queries.
        assert found.expected_error == pytest.approx((0.86 + 0.94 + 0.05) / 5)
        assert found.aurc == pytest.approx((0 + 1 / 2 + 1 / 3 + 1 / 4 + 2 / 5) / 5)
        assert found.recall_at_full_precision == 1 / 4
        np.testing.assert_allclose(found.bins[:, 1], [0.53, 1, 2])
        np.testing.assert_allclose(
            found.risk, [[0.2, 0.4, 0.6, 0.8, 1], [0, 1 / 2, 1 / 3, 1 / 4, 2 / 5]]
        )

    def test_equal_confidences_are_taken_together(self):
        """In the mean over all orders of three equal ones."""
        expected = (1 / 3 + (1 / 3 * 2) / 2 + 1 / 3) / 3
        assert area_under_risk_coverage([1, 1, 1], [True, False, True]) == pytest.approx(expected)
        found = measure_calibration([0.9, 0.9, 0.2], [True, False, True])
        assert found.recall_at_full_precision == 0
        assert found.risk[0].tolist() == [2 / 3, 1]

    def test_as_json(self):
        found = measure_calibration([0.9, 0.3, 0.2], [True, False, True])
        again = Calibration.from_dict(json.loads(json.dumps(found.to_dict())))
        assert again.to_dict() == found.to_dict()

    @pytest.mark.parametrize(
        ("sure", "right"), [([], []), ([0.5], [True, False]), ([1.5], [True]), ([np.nan], [True])]
    )
    def test_what_is_no_confidence(self, sure, right):
        with pytest.raises(ArgumentError):
            measure_calibration(sure, right)


class TestSignals:
    def test_few_candidates(self):
        """Of a single candidate, none is a rival; a copy of the query is at distance 0."""
        assert retrieval_signals(np.array([[0.4], [0.0]])).tolist() == [[-0.4, 0], [0, 0]]
        assert retrieval_signals(np.array([[0.0, 0.5]])).tolist() == [[0, 1]]
        alone = reranking_signals(np.array([[0.3]]), np.array([0]))
        assert alone.tolist() == [[np.log(0.3), 0, 0]]
        assert np.isfinite(reranking_signals(np.zeros((1, 3)), np.array([2]))).all()

    def test_surer_is_larger(self):
        away = np.array([[0.3, 0.9, 1, 1, 1], [0.5, 0.9, 1, 1, 1]])
        assert (np.diff(retrieval_signals(away), axis=0) < 0).all()
        alike = np.array([[0.9, 0.1, 0.1, 0.1, 0.1], [0.1, 0.5, 0.1, 0.1, 0.1]])
        assert (np.diff(reranking_signals(alike, np.array([0, 1])), axis=0) < 0).all()


class TestFit:
    def test_is_calibrated_on_new_data(self):
        random = np.random.default_rng(0)
        signals = random.normal(size=(40_000, 2)) * [1, 10]
        likely = 1 / (1 + np.exp(-(0.5 + signals @ [2.0, 0.1])))
        right = random.random(len(likely)) < likely
        fitted = fit_logistic(signals[:2000], right[:2000])
        np.testing.assert_allclose(fitted.coefficients, [2.0, 0.1], rtol=0.15)
        found = measure_calibration(fitted.probability(signals[2000:]), right[2000:])
        assert found.expected_error < 0.02
        best = area_under_risk_coverage(likely[2000:], right[2000:])
        assert found.aurc == pytest.approx(best, rel=0.01)

    def test_never_falls(self):
        """A signal that says the contrary of what it should is left out."""
        random = np.random.default_rng(1)
        good, bad = random.normal(size=(2, 500))
        right = random.random(500) < 1 / (1 + np.exp(-2 * good + bad))
        fitted = fit_logistic(np.stack([good, bad], axis=1), right)
        assert fitted.coefficients[0] > 1
        assert fitted.coefficients[1] == 0
        ladder = np.linspace(-5, 5, 20)
        assert (np.diff(fitted.probability(np.stack([ladder, ladder], axis=1))) > 0).all()

    def test_all_right(self):
        fitted = fit_logistic(np.arange(8.0)[:, None], np.ones(8, dtype=bool))
        assert fitted.probability(np.zeros((1, 1))) == pytest.approx([9 / 10])

    def test_groups(self):
        assert groups_of(["a/1.jpg", "a/2.jpg", "b/1.jpg"]) == ["a", "a", "b"]
        assert len(set(groups_of([f"{part}_{i}.jpg" for part in "xy" for i in range(3)]))) == 2
        assert len(set(split_groups(["one"] * 7))) == 5


class TestFile:
    def test_shipped_says_what_it_is_of(self):
        found = shipped_confidence()
        demo = Config.load("demo")
        assert find_confidence(demo) == found
        assert find_confidence(replace(demo, ransac="fast"), found.checkpoint["sha256"]) == found
        assert find_confidence(replace(demo, pooling="netvlad")) == found
        for other in (
            {"matcher": "spatialApproximator"}, {"num_pcs": 64}, {"match_image_size": (96, 128)},
            {"confidence": "none"}, {"pooling": "max"},
        ):  # fmt: skip
            assert find_confidence(replace(demo, **other)) is None
        assert find_confidence(demo, "ab" * 32) is None
        assert sum(of["queries"] for of in found.fitted_on["data"]) == 433

    def test_is_read_again(self, tmp_path):
        file = tmp_path / "c.json"
        sure_file(file, SMALL, (0.1, 2.0), (0.3, 1 / 3))
        again = Confidence.load(file)
        again.save(tmp_path / "d.json")
        assert (tmp_path / "d.json").read_bytes() == file.read_bytes()
        assert find_confidence(replace(SMALL, confidence=str(file))) == again

    @pytest.mark.parametrize(
        ("change", "named"),
        [
            (lambda text: text[:50], "JSON"),
            (lambda text: "[" * 100_000, "JSON"),
            (lambda text: "[1]", "list"),
            (lambda text: text.replace("confidence 1", "confidence 2"), "confidence 2"),
            (lambda text: text.replace('"intercept"', '"interrupt"'), "intercept"),
            (lambda text: text.replace("0.125", "NaN"), "nan"),
            (lambda text: text.replace("0.125", '"x"'), "x"),
            (lambda text: text.replace("0.125", "-1"), "-1"),
            (lambda text: text.replace('"agreement"', '"agreeing"'), "agreeing"),
            (lambda text: text.replace('"NetVLAD"', '"Other"'), "Other"),
            (lambda text: text.replace('"strides"', '"steps"'), "strides"),
            (lambda text: text.replace('"sha256"', '"md5"'), "sha256"),
        ],
    )
    def test_damaged(self, tmp_path, change, named):
        file = tmp_path / "c.json"
        sure_file(file, SMALL, (0.0, 0.125), (0.0, 0.125))
        file.write_text(change(file.read_text()))
        with pytest.raises(ConfigError, match=f"{file} .*{named}"):
            Confidence.load(file)

    def test_missing_or_of_other_settings(self, tmp_path):
        with pytest.raises(ConfigError, match=r"none\.json"):
            find_confidence(replace(SMALL, confidence=str(tmp_path / "none.json")))
        file = sure_file(tmp_path / "c.json", SMALL, (0, 0), (0, 0))
        for other in ({"matcher": "spatialApproximator"}, {"strides": (2, 2)}, {"num_pcs": 64}):
            name = next(iter(other)) if "num_pcs" not in other else "weights"
            with pytest.raises(ConfigError, match=rf"c\.json .*{name}"):
                find_confidence(replace(SMALL, confidence=file, **other))
        for given in ("auto", "none"):
            with pytest.raises(ConfigError, match="rerank = auto"):
                find_confidence(replace(SMALL, confidence=given, rerank="auto"))

    @pytest.mark.parametrize(
        "wrong", [{"sure": 0}, {"sure": 1.1}, {"rerank": "never"}, {"confidence": ""}]
    )
    def test_keys(self, wrong):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            replace(SMALL, **wrong)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"), 60, 40, size=(32, 24), nasty=False)


class TestCalibrate:
    def test_command(self, made, tmp_path, capsys):
        file = tmp_path / "c.json"
        assert command.main([f"street={made.results}", "--output", str(file)]) == 0
        printed = capsys.readouterr().out
        content = json.loads(file.read_text())
        assert content["checkpoint"]["sha256"] == "ab" * 32
        assert [of["name"] for of in content["fitted_on"]["data"]] == ["street"]
        for method, rows in (("NetVLAD", made.retrieved), ("PatchNetVLAD", made.reranked)):
            quality = content["fitted_on"]["methods"][method]
            positives = made.truth.positives()
            right = sum(row[0] in of for row, of in zip(rows, positives, strict=True))
            assert (quality["queries"], quality["right"]) == (60, right)
            assert f"{quality['aurc']:.3f}" in printed
            assert quality["groups_left_out"] == 5
        config = replace(made.config, confidence=str(file))
        assert set(find_confidence(config, "ab" * 32).methods) == {"NetVLAD", "PatchNetVLAD"}

    def test_what_cannot_be_fitted(self, made, tmp_path, capsys):
        output = ["--output", str(tmp_path / "c.json")]
        assert command.main([str(tmp_path / "none"), *output]) == 2
        assert "none" in capsys.readouterr().err
        assert command.main([str(made.root), *output]) == 2
        assert "run.json" in capsys.readouterr().err
        unknown = make_run(tmp_path / "unknown", 12, 10, 5, truth=False, size=(32, 24), nasty=False)
        with pytest.raises(ResultsError, match="without ground truth"):
            calibrate_confidence(unknown.results)
        before = (made.results / "run.json").read_bytes()
        assert command.main([str(made.results), "--output", str(made.results / "run.json")]) == 2
        assert (made.results / "run.json").read_bytes() == before
        assert not (tmp_path / "c.json").exists()

    def test_of_one_setting(self, made, tmp_path):
        other = make_run(
            tmp_path / "other", 12, 10, 5, patches=False, size=(32, 24), nasty=False, seed=1
        )
        alone = calibrate_confidence([made.results, other.results])
        assert set(alone.methods) == {"NetVLAD"}  # of which both have answers
        content = json.loads((other.results / "run.json").read_text())
        content["checkpoint"] = "cd" * 32
        (other.results / "run.json").write_text(json.dumps(content))
        with pytest.raises(ResultsError, match="weights"):
            calibrate_confidence([made.results, other.results])


@pytest.fixture(scope="module")
def case(world, tmp_path_factory):
    """Features of the world, and a configuration."""
    folder = tmp_path_factory.mktemp("sure")
    config = Config.load(write_config(folder / "c.ini", local="float16"))
    for part in ("query", "index"):
        extract(config, world / f"{part}.txt", world, folder / part, device="cpu")
    return folder, config


class TestMatching:
    def run(self, world, case, config=None, **more):
        folder, usual = case
        return rerank(
            config or usual, world / "query.txt", world / "index.txt", folder / "query",
            folder / "index", dataset_root=world, device="cpu", progress=False,
            ground_truth=world / "gt.npz", **more,
        )  # fmt: skip

    def auto(self, folder, config, retrieved, reranked, **more):
        file = sure_file(folder / "c.json", config, retrieved, reranked)
        return replace(config, confidence=file, rerank="auto", **more)

    def test_nothing_sure_is_as_always(self, world, case, tmp_path):
        always = self.run(world, case)
        assert not always.confidences
        assert always.selection is None
        config = self.auto(tmp_path, case[1], (-9, 0), (-9, 0))
        auto = self.run(world, case, config, results_dir=tmp_path / "r")
        np.testing.assert_array_equal(auto.reranked, always.reranked)
        np.testing.assert_array_equal(auto.patch_scores, always.patch_scores)
        np.testing.assert_array_equal(auto.scores["PatchNetVLAD"], always.scores["PatchNetVLAD"])
        assert (auto.selection.reranked, auto.selection.kept) == (3, 0)
        assert auto.selection.saved == 0

    def test_sequences_of_queries_that_were_not_re_ranked(self, world, case, tmp_path):
        options = SequenceOptions(3, traverses="list")
        config = self.auto(tmp_path, case[1], (9, 0), (9, 0))
        found = self.run(world, case, config, sequence=options)
        assert not found.was_reranked.any()
        plain = self.run(world, case, replace(case[1], pooling="netvlad"), sequence=options)
        np.testing.assert_array_equal(found.final, plain.final)
        assert list(found.confidences) == ["NetVLAD", "PatchNetVLAD"]

    def test_all_sure_is_as_retrieved(self, world, case, tmp_path, capsys):
        config = self.auto(tmp_path, case[1], (9, 0), (9, 0))
        found = self.run(
            world, case, config, results_dir=tmp_path / "r", exports=["csv", "kapture11"]
        )
        np.testing.assert_array_equal(found.reranked, found.retrieved)
        assert found.selection.reranked == 0
        assert not found.patch_scores.any()
        assert "PatchNetVLAD" not in found.scores
        assert found.metrics["PatchNetVLAD"].curve is not None  # by confidence
        lines = (tmp_path / "r" / "PatchNetVLAD_kapture11.txt").read_text().splitlines()[2:]
        scores = np.array([float(line.split(", ")[2]) for line in lines]).reshape(3, -1)
        assert (np.diff(scores) <= 0).all()
        read = read_run(tmp_path / "r")
        assert read.selection == found.selection
        assert not read.was_reranked.any()
        page = write_report(tmp_path / "r", device="cpu", progress=False).read_text()
        assert "0 of 3" in page

    def test_some_sure(self, world, case, tmp_path):
        """Whatever is selected, is re-ranked as always; resumed runs and records are the same."""
        plain = self.run(world, case)
        surest = plain.scores["NetVLAD"][:, 0].argsort()
        middle = -plain.scores["NetVLAD"][surest[1], 0]
        config = self.auto(tmp_path, case[1], (0, 0), (0, 0), sure=0.5)
        methods = {"NetVLAD": Logistic(1000 * middle - 1, (1000, 0)),
                   "PatchNetVLAD": Logistic(9, (0, 0, 0))}  # fmt: skip
        Confidence(methods, {"name": "imagenet_WPCA128", "sha256": ""}, settings_of(config)).save(
            config.confidence
        )
        found = self.run(world, case, config, results_dir=tmp_path / "r", exports=["csv"])
        assert found.was_reranked[surest].tolist() == [True, True, False]
        chosen = found.was_reranked
        np.testing.assert_array_equal(found.reranked[chosen], plain.reranked[chosen])
        np.testing.assert_array_equal(found.patch_scores[chosen], plain.patch_scores[chosen])
        np.testing.assert_array_equal(found.reranked[~chosen], plain.retrieved[~chosen])
        content = json.loads((tmp_path / "r" / "metrics.json").read_text())
        assert content["provenance"]["reranking"]["reranked"] == 2
        with (tmp_path / "r" / "PatchNetVLAD_candidates.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        first = [float(row["confidence"]) for row in rows if row["rank"] == "1"]
        np.testing.assert_allclose(first, found.confidences["PatchNetVLAD"])
        assert {row["confidence"] for row in rows if row["rank"] != "1"} == {""}

    def test_resumes(self, world, case, tmp_path, monkeypatch):
        """A run that ended early is taken up, whether all queries or some are to be re-ranked."""
        add, kept = Journal.add, []

        def interrupted(journal, q, scores):
            add(journal, q, scores)
            kept.append(q)
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(Journal, "add", interrupted)
            with pytest.raises(KeyboardInterrupt):
                self.run(world, case, results_dir=tmp_path / "r")
        config = self.auto(tmp_path, case[1], (-9, 0), (-9, 0))
        with monkeypatch.context() as patched:
            patched.setattr(Journal, "add", lambda journal, q, scores: kept.append(q))
            found = self.run(world, case, config, results_dir=tmp_path / "r")
        assert sorted(kept) == [0, 1, 2]  # each was matched once
        np.testing.assert_array_equal(found.reranked, self.run(world, case).reranked)

    def test_a_less_sure_answer_replaces_none(self, world, case, tmp_path):
        config = self.auto(tmp_path, case[1], (1, 0), (-1, 0))
        found = self.run(world, case, config)
        changed = self.run(world, case).reranked[:, 0] != found.retrieved[:, 0]
        assert found.selection.kept == changed.sum()
        np.testing.assert_array_equal(found.reranked[:, 0], found.retrieved[:, 0])
        expected = np.where(changed, 1 / (1 + np.exp(-1)), 1 / (1 + np.exp(1)))
        np.testing.assert_allclose(found.confidences["PatchNetVLAD"], expected)

    def test_metrics(self, world, case, tmp_path):
        config = replace(self.auto(tmp_path, case[1], (0, 1), (0, 1)), rerank="always")
        found = self.run(world, case, config, results_dir=tmp_path / "r")
        written = json.loads((tmp_path / "r" / "metrics.json").read_text())["methods"]
        for method, of in found.metrics.items():
            expected = of.calibration.to_dict()
            assert written[method]["confidence"]["aurc"] == pytest.approx(expected["aurc"])
            assert len(found.confidences[method]) == 3
        np.testing.assert_array_equal(
            read_run(tmp_path / "r").confidences["NetVLAD"], found.confidences["NetVLAD"]
        )

    def test_needs_distances(self, world, case, tmp_path):
        file = tmp_path / "c.npy"
        np.save(file, np.array([[0, 1], [1, 2], [2, 3]]))
        config = self.auto(tmp_path, case[1], (0, 1), (0, 1))
        with pytest.raises(ConfigError, match=r"rerank = auto .*c\.npy"):
            self.run(world, case, config, candidates=file)
        found = self.run(world, case, replace(config, rerank="always"), candidates=file)
        assert not found.confidences

    def test_command_says_what_was_saved(self, world, case, tmp_path, capsys):
        file = sure_file(tmp_path / "c.json", case[1], (9, 0), (9, 0))
        text = (case[0] / "c.ini").read_text()
        ini = tmp_path / "auto.ini"
        more = f"[feature_match]\nconfidence = {file}\nrerank = auto\nsure = 0.8\n"
        ini.write_text(text.replace("[feature_match]\n", more))
        words = ["--config_path", ini, "--dataset_root_dir", world, "--query_file_path",
                 world / "query.txt", "--index_file_path", world / "index.txt",
                 "--query_input_features_dir", case[0] / "query", "--index_input_features_dir",
                 case[0] / "index", "--result_save_folder", tmp_path / "r", "--nocuda"]  # fmt: skip
        assert feature_match.main([str(word) for word in words]) == 0
        printed = capsys.readouterr().out
        assert "0 of 3 queries" in printed
        assert "0.8" in printed
        assert "100 %" in printed


class TestPlaceIndex:
    def index(self, config):
        index = PlaceIndex(load_model(config, device="cpu"))
        index.add([place_picture(i) for i in range(8)], keys=[f"{i}" for i in range(8)])
        return index

    def query(self):
        image = place_picture(3)
        image.paste((9, 9, 9), (0, 0, 60, 50))
        return image

    def test_confidence(self, tmp_path):
        with self.index(SMALL) as index:
            plain = index.query(self.query())
            assert plain.places[0].confidence is None
            with pytest.raises(ConfigError, match="min_confidence"):
                index.query(self.query(), min_confidence=0.5)
        file = sure_file(tmp_path / "c.json", SMALL, (1, 1), (0, 1))
        config = replace(SMALL, confidence=file)
        with self.index(config) as index:
            answer = index.query(self.query())
            assert [place.key for place in answer.places] == [place.key for place in plain.places]
            scores = [place.score for place in index.query(self.query(), 8).places]
            first = index.query(self.query(), 8, rerank=False)
            away = np.array([[place.distance for place in first.places]])
            rows = [place.row for place in first.places]
            at = rows.index(answer.places[0].row)
            by_row = {place.row: place.score for place in index.query(self.query(), 8).places}
            alike = np.array([[by_row[row] for row in rows]])
            assert len(scores) == 8
            known = Confidence.load(file)
            assert first.places[0].confidence == pytest.approx(known.of_retrieval(away)[0])
            expected = known.of_reranking(alike, np.array([at]))[0]
            assert answer.places[0].confidence == pytest.approx(expected)
            assert {place.confidence for place in answer.places[1:]} == {None}
            assert index.query(self.query(), min_confidence=expected - 1e-6).best is not None
            unsure = index.query(self.query(), min_confidence=expected + 1e-6)
            assert unsure.best is None
            assert unsure.places
            with pytest.raises(ArgumentError, match="min_confidence"):
                index.query(self.query(), min_confidence="high")

    def test_auto(self, tmp_path):
        file = sure_file(tmp_path / "c.json", SMALL, (9, 0), (9, 0))
        with self.index(replace(SMALL, confidence=file, rerank="auto")) as index:
            answer = index.query(self.query())
            assert not answer.reranked
            assert answer.places[0].score == -answer.places[0].distance
        sure_file(tmp_path / "c.json", SMALL, (-9, 0), (-9, 0))
        with self.index(replace(SMALL, confidence=file, rerank="auto")) as index:
            assert index.query(self.query()).reranked
        with pytest.raises(ConfigError, match="rerank = auto"):
            self.index(replace(SMALL, rerank="auto"))
