# SPDX-License-Identifier: MIT
"""What MkDocs needs to make a site of files that are also read in the repository.

Pages of the site are also made of the changelog, of measurements and of the notebooks, which lie
outside of docs/, and of the docstrings. Links that lead to them in the repository lead to their
pages here. Formulas become MathML, and the diagrams become part of their page, so that they take
its colours.
"""

from __future__ import annotations

import ast
import base64
import json
import posixpath
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from rooms import PICTURE, picture

REPOSITORY = Path(__file__).resolve().parents[2]
OUTSIDE = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "benchmarks/RESULTS.md",
    "benchmarks/bench.md",
    "benchmarks/bench.png",
    "benchmarks/cluster.md",
    "benchmarks/scale.md",
    "benchmarks/sequences.md",
    "benchmarks/scale.png",
    "benchmarks/scale_recall.png",
    "patchnetvlad/pretrained_models/MODEL_CARD.md",
)
MODULES = {
    "Recognition": (
        "places.model",
        "places.description",
        "places.match",
        "places.usual",
        "places.index",
        "places.sequence",
        "places.answers",
    ),
    "Live": ("live.loop", "live.sources", "live.overlay"),
    "Whole data sets": (
        "recipes.run",
        "recipes.compare",
        "recipes.sequence",
        "recipes.export",
        "pipeline.extract",
        "pipeline.match",
        "pipeline.sequence",
        "pipeline.record",
        "pipeline.run_record",
        "engines.engine",
        "engines.rerank",
    ),
    "Configuration and errors": (
        "config",
        "config_ini",
        "errors",
        "base.device",
        "assets.data_files",
        "assets.checkpoints",
        "assets.folders",
        "assets.catalog",
    ),
    "Data sets": (
        "datasets.image_list",
        "datasets.images",
        "datasets.ground_truth",
        "datasets.right_answers",
        "datasets.traverses",
        "datasets.benchmarks",
        "own_data.create",
        "own_data.summary",
        "own_data.check",
        "own_data.official",
        "own_data.positions.base",
        "own_data.positions.names",
        "own_data.positions.table",
        "own_data.positions.track",
        "own_data.positions.exif",
        "own_data.positions.poses",
        "own_data.positions.reconstruction",
        "own_data.positions.plane",
    ),
    "Training": (
        "config_train",
        "training.start",
        "training.tuples",
        "training.areas",
        "own_data.msls",
        "own_data.areas",
        "training.places",
        "training.recipes",
        "training.mining",
        "training.losses",
        "training.schedule",
        "training.ranks",
        "training.loop",
        "training.maps",
        "training.views",
        "training.history",
        "training.validation",
        "training.fit",
        "training.clusters",
        "training.whitening",
        "training.describe",
        "training.card",
        "training.files",
    ),
    "Features on disk": (
        "features.manifest",
        "features.open",
        "features.interface",
        "features.store.codec",
        "features.store.index",
        "features.store.records",
        "features.store.reader",
        "features.store.writer",
        "features.store.shard_writer",
        "features.store.share",
        "features.npy_files",
        "features.inspect",
        "features.convert",
        "features.merge",
    ),
    "The method, step by step": (
        "models.grid",
        "models.encoder",
        "models.netvlad",
        "models.patchnetvlad",
        "models.portable",
        "models.checkpoint",
        "models.describer",
        "search.exact",
        "search.retrieve",
        "search.index",
        "search.growing",
        "search.candidates",
        "search.by_protocol",
        "search.sequences",
        "search.on_device",
        "matching.nearest",
        "matching.ransac",
        "matching.batched_ransac",
        "matching.spatial",
        "matching.pair",
        "matching.on_device",
        "matching.fusion",
    ),
    "Evaluation": (
        "evaluation.recall",
        "evaluation.metrics",
        "evaluation.per_query",
        "evaluation.intervals",
        "evaluation.comparison",
        "evaluation.comparison_files",
        "evaluation.metrics_file",
        "evaluation.usual",
        "evaluation.exports",
        "evaluation.pairs",
        "evaluation.poses",
        "plots.match",
        "plots.answer",
        "plots.curves",
        "plots.maps",
        "plots.drawing",
        "plots.spread",
        "plots.training",
        "report.write",
        "report.comparison",
        "report.runs",
    ),
}
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)(?=[)#])")
FENCE = re.compile(r"(^```.*?^```[^\n]*$)", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"(`[^`\n]+`)")
NAME = re.compile(r"`(patchnetvlad(?:\.\w+)+)`")
DIAGRAM = re.compile(r"^!\[([^\]]*)\]\((images/\w+\.svg)\)$", re.MULTILINE)


def public_names() -> list[str]:
    """Return the names that the package exports, in its order, without importing it."""
    tree = ast.parse((REPOSITORY / "patchnetvlad" / "__init__.pyi").read_text(encoding="utf-8"))
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    return sorted(alias.name for node in imports for alias in node.names)


def modules() -> list[str]:
    """Return the modules that have a page, by their full names; those that are there."""
    return [
        f"patchnetvlad.{name}"
        for names in MODULES.values()
        for name in names
        if (REPOSITORY / "patchnetvlad" / f"{name.replace('.', '/')}.py").is_file()
    ]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made of other files."""
    made: dict[str, str | bytes] = {}  # by page, relative to docs/
    for name in OUTSIDE:
        path = REPOSITORY / name
        made[name] = path.read_bytes() if path.suffix == ".png" else path.read_text("utf-8")
    for notebook in sorted((REPOSITORY / "examples").glob("*.ipynb")):
        page, pictures = notebook_page(notebook)
        made[f"examples/{notebook.stem}.md"] = page
        made.update({f"examples/{name}": picture for name, picture in pictures.items()})
    made["reference/index.md"] = "\n".join(
        [
            "# Public API\n",
            "What `import patchnetvlad` offers. The modules on the pages after this one can be "
            "imported, too.\n",
            *(f"::: patchnetvlad.{name}\n" for name in public_names()),
        ]
    )
    for module in modules():
        made[f"reference/{module}.md"] = f"# {module}\n\n::: {module}\n    options:\n" + (
            "      show_root_heading: false\n      show_root_toc_entry: false\n"
        )
    for name, content in made.items():
        if name.startswith("reference/"):  # search puts explanations first
            content = f"---\nsearch:\n  boost: 0.4\n---\n{content}"
        files.append(File.generated(config, name, content=content))
    return files


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the pages of the modules into the navigation."""
    there = modules()
    reference: list[Any] = [{"Public API": "reference/index.md"}]
    for title, names in MODULES.items():
        pages = [
            {name: f"reference/{full}.md"}
            for name in names
            if (full := f"patchnetvlad.{name}") in there
        ]
        if pages:
            reference.append({title: pages})
    assert config.nav is not None
    for section in config.nav:
        if isinstance(section, dict) and "Reference" in section:
            entries = section["Reference"]
            entries[entries.index("reference/")] = {"API": reference}
    return config


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links lead to pages of the site, and formulas and diagrams be part of it."""
    source = page.file.src_uri
    if source.startswith("reference/"):
        return markdown
    parts = FENCE.split(markdown)
    for i, part in enumerate(parts):
        if i % 2 == 1:
            if part.startswith("```math"):
                parts[i] = formula("\n".join(part.splitlines()[1:-1]), block=True)
            continue
        part = DIAGRAM.sub(diagram, part)
        words = CODE.split(part)
        for j in range(0, len(words), 2):
            words[j] = re.sub(r"\$([^$\n]+)\$", lambda found: formula(found[1]), words[j])
        part = NAME.sub(
            r'<autoref identifier="\1" optional><code>\1</code></autoref>', "".join(words)
        )
        parts[i] = LINK.sub(lambda found: site_link(found[1], source, files), part)
    return "".join(parts)


def site_link(link: str, source: str, files: Files) -> str:
    """Return where a link of the repository leads on the site.

    Parameters
    ----------
    link : str
        As it stands in the page.
    source : str
        The page, relative to docs/, or, of those that lie outside, to the repository.
    files : Files
        All of the site.
    """
    outside = source in OUTSIDE or source.startswith("examples/")
    path = posixpath.normpath(
        posixpath.join("" if outside else "docs", posixpath.dirname(source), link)
    )
    target = path.removeprefix("docs/") if path.startswith("docs/") else path
    if target == "README.md":
        target = "index.md"
    if target.startswith("examples/"):
        target = target.replace(".ipynb", ".md")
    if files.get_file_from_path(target) is None:
        return link  # which MkDocs then complains of
    return posixpath.relpath(target, posixpath.dirname(source) or ".")


def formula(text: str, block: bool = False) -> str:
    """Return a formula as MathML, which browsers show without a script."""
    shown = convert(text.strip(), display="block" if block else "inline")
    return f'<div class="formula">{shown}</div>' if block else f"<span>{shown}</span>"


def diagram(found: re.Match[str]) -> str:
    """Return a diagram as a part of the page; that of the rooms is drawn again."""
    file = REPOSITORY / "docs" / found[2]
    drawing = picture() if file == PICTURE else file.read_text(encoding="utf-8")
    drawing = re.sub(r"<\?xml.*?\?>|<!--.*?-->", "", drawing, flags=re.DOTALL)
    lines = "\n".join(line for line in drawing.splitlines() if line.strip())
    return f'<div class="diagram" tabindex="0">\n{lines}\n</div>'


def notebook_page(path: Path) -> tuple[str, dict[str, bytes]]:
    """Return a notebook as Markdown, and its pictures by the names that they have there."""
    cells: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            cells.append(source)
            continue
        cells.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/jpeg" in data:
                name = f"{path.stem}_{len(pictures) + 1}.jpg"
                pictures[name] = base64.b64decode("".join(data["image/jpeg"]))
                cells.append(f"![What this cell draws]({name})")
                continue
            printed = "".join(output.get("text", data.get("text/plain", ""))).rstrip()
            cells.append(f'```text title="Output"\n{printed}\n```')
    link = f"*This page is the notebook `examples/{path.name}` of the repository.*"
    return "\n\n".join([*cells[:1], link, *cells[1:]]) + "\n", pictures
