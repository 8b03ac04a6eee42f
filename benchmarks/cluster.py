# SPDX-License-Identifier: MIT
"""What Ray costs on one machine: the same extraction and matching with and without ``--cluster``.

Whole processes are timed, start of Ray included, in turn. The table goes to benchmarks/cluster.md.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

import ray
from measure import machine, run
from workload import Settings, write_checkpoint, write_list, write_views

HERE = Path(__file__).parent
ENGINES = {"plain": [], "--cluster local": ["--cluster", "local"]}


def measure(folder: Path, images: int, queries: int, candidates: int, repeats: int) -> str:
    """Time both programs both ways; give the rows of the table."""
    settings = Settings(num_pcs=512)
    checkpoint = write_checkpoint(folder, settings.num_clusters, settings.num_pcs)
    config = settings.write(
        folder / "speed.ini", checkpoint, n_values_all=",".join(map(str, (1, candidates)))
    )
    query_names, index_names = write_views(folder / "images", queries, images)
    lists = {
        "query": write_list(folder / "query.txt", query_names),
        "index": write_list(folder / "index.txt", index_names),
    }

    def program(script: str, *words: str | Path) -> float:
        module = f"patchnetvlad.cli.{script}"
        words = ("--config_path", config, "--dataset_root_dir", folder / "images", *words)
        return run([sys.executable, "-m", module, *map(str, words)]).seconds

    def extraction(part: str, more: list[str]) -> float:
        output = folder / part
        shutil.rmtree(output, ignore_errors=True)
        return program(
            "feature_extract",
            "--dataset_file_path",
            lists[part],
            "--output_features_dir",
            output,
            *more,
        )

    def matching(more: list[str]) -> float:
        shutil.rmtree(folder / "results", ignore_errors=True)
        words: list[str | Path] = ["--result_save_folder", folder / "results"]
        for part in ("query", "index"):
            words += [f"--{part}_file_path", lists[part]]
            words += [f"--{part}_input_features_dir", folder / part]
        return program("feature_match", *words, *more)

    seconds: dict[tuple[str, str], list[float]] = {}
    extraction("query", [])
    for _ in range(repeats):
        for engine, more in ENGINES.items():
            for job in ("extraction", "matching"):
                took = extraction("index", more) if job == "extraction" else matching(more)
                seconds.setdefault((job, engine), []).append(took)
                print(f"{job}, {engine}: {took:.1f} s", flush=True)
    rows = []
    for job, count in (("extraction", images), ("matching", queries)):
        plain, local = (seconds[job, engine] for engine in ENGINES)
        ratios = [there / here for here, there in zip(plain, local, strict=True)]
        what = f"{images} images" if job == "extraction" else f"{count} queries x {candidates}"
        rows.append(
            f"| {job}, {what} | {statistics.median(plain):.1f} s | "
            f"{statistics.median(local):.1f} s | {statistics.median(ratios):.3f} "
            f"({min(ratios):.3f} to {max(ratios):.3f}) |"
        )
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--queries", type=int, default=20)
    parser.add_argument("--candidates", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--output", type=Path, default=HERE / "cluster.md")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(
            Path(folder),
            arguments.images,
            arguments.queries,
            arguments.candidates,
            arguments.repeats,
        )
    about = machine()
    runs = f"medians of {arguments.repeats} runs" if arguments.repeats > 1 else "one run each"
    text = f"""# What Ray costs on one machine

{about["date"]}; {about["machine"]}; {about["versions"]}, Ray {ray.__version__}.
Settings of `speed` (one patch size, K = 64, P = 512, random weights), images of 640 x 480 px; whole
processes, including the start of Ray; {runs}, in turn, made by
`python benchmarks/cluster.py`.

| | plain | `--cluster local` | ratio |
|---|---|---|---|
{rows}
"""
    arguments.output.write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
