# SPDX-License-Identifier: MIT
"""Put what ``gpu.py`` needs beside the checkout into one folder, where there is a network.

    python benchmarks/gpu_kit.py [DIR] [--tower DIR] [--faiss VERSION_OF_PYTHON]

The folder, by default ``build/gpu_kit``, gets

research_code/   the research code and what it needs that PyTorch's users do not have anyway
demo_images/     the demonstration's photographs, and example_images/; large ones are made smaller
tower/           a data set, if one is given
site/            with --faiss, FAISS for that version of Python on Linux
reference.npz    the CPU's answers for these data sets
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

LARGE_IMAGE = 2 * 10**5  # bytes
LARGEST_SIDE = 1024  # px


def environment_of(kit: Path | None) -> dict[str, str]:
    """Return the environment in which what a kit has is found; what is set already stays."""
    found = {"MPLBACKEND": "Agg"}
    if kit is not None and (kit / "demo_images").is_dir():
        found["PATCHNETVLAD_HOME"] = str(kit)
    if kit is not None and (kit / "research_code").is_dir():
        found["RESEARCH_CODE"] = str(kit / "research_code")
    return {key: os.environ.get(key, value) for key, value in found.items()}


def add_photographs(kit: Path) -> None:
    """Copy the photographs, and make large ones smaller under the same name."""
    from PIL import Image, ImageOps

    from patchnetvlad.assets import demo_images

    for path in demo_images().values():
        target = kit / path.parent.name / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.stat().st_size <= LARGE_IMAGE:
            shutil.copyfile(path, target)
            continue
        image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
        image.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
        image.save(target, quality=90)


def add_research_code(kit: Path) -> None:
    """Fetch the research code; of its data, nothing is needed."""
    import research_code

    folder = kit / "research_code"
    shutil.copytree(
        research_code.install(),
        folder,
        dirs_exist_ok=True,
        ignore=shutil.ignore_patterns(
            "dataset_*", "example_images", "pretrained_models", "__pycache__"
        ),
    )


def add_faiss(kit: Path, python: str) -> None:
    """Fetch FAISS for another version of Python."""
    words = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    words += ["--no-deps", "--only-binary=:all:", "--python-version", python]
    for glibc in ("2_17", "2_27", "2_28"):
        words += ["--platform", f"manylinux_{glibc}_x86_64"]
    subprocess.run([*words, "--target", str(kit / "site"), "--upgrade", "faiss-cpu"], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path, default=Path("build/gpu_kit"))
    parser.add_argument("--tower", type=Path, metavar="DIR", help="a data set to take along")
    parser.add_argument("--faiss", metavar="VERSION", help="version of Python, such as 3.12")
    parser.add_argument(
        "--without-reference", action="store_true", help="leave the CPU's answers out"
    )
    arguments = parser.parse_args()
    kit = arguments.folder.absolute()
    kit.mkdir(parents=True, exist_ok=True)
    add_photographs(kit)
    add_research_code(kit)
    if arguments.faiss:
        add_faiss(kit, arguments.faiss)
    if arguments.tower:
        parts = shutil.ignore_patterns("expected")
        shutil.copytree(arguments.tower, kit / "tower", dirs_exist_ok=True, ignore=parts)
    if not arguments.without_reference:
        script = Path(__file__).with_name("gpu.py")
        words = [sys.executable, str(script), "--device", "cpu", "--kit", str(kit)]
        subprocess.run([*words, "--make-reference", str(kit / "reference.npz")], check=True)
    size = sum(file.stat().st_size for file in kit.rglob("*") if file.is_file())
    print(f"{kit}: {size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
