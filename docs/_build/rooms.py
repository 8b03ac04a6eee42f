# SPDX-License-Identifier: MIT
"""Draw the rooms of the package and their imports, as they are in the source code.

The site draws the picture whenever it is built. ``python docs/_build/rooms.py`` also writes it to
docs/images/rooms.svg, for those who read the documentation in the repository.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = "patchnetvlad"
PICTURE = REPOSITORY / "docs" / "images" / "rooms.svg"
MATHS = ("search", "matching", "models")

ROW, STEP = 28, 24  # px from a room to the one below it: down, and to the right
WIDTH, HEIGHT, MARGIN = 112, 21, 10  # of a room's box, and around the picture

STYLE = """
    .rooms {
      --ink: var(--md-default-fg-color, #1c2226);
      --soft: var(--md-default-fg-color--light, #5b666d);
      --paper: var(--md-default-bg-color, #fff);
      --maths: #0f766e; --path: #c2410c;
      font: 13px system-ui, "Helvetica Neue", Arial, sans-serif;
    }
    @media (prefers-color-scheme: dark) {
      .rooms:root { --ink: #e6eaec; --soft: #a4afb5; --paper: #16191b; --maths: #2dd4bf; --path: #fb923c; }
    }
    [data-md-color-scheme="slate"] .rooms { --maths: #2dd4bf; --path: #fb923c; }
    .rooms text { fill: var(--ink); }
    .rooms .name { text-anchor: middle; }
    .rooms .small { font-size: 12.5px; fill: var(--soft); }
    .rooms .sheet { fill: var(--paper); }
    .rooms .box { fill: var(--paper); stroke: var(--soft); }
    .rooms .maths { fill: var(--maths); fill-opacity: .16; stroke: var(--maths); }
    .rooms .line { fill: none; stroke: var(--soft); stroke-width: .7; stroke-opacity: .75; }
    .rooms .dot, .rooms .tip { fill: var(--ink); }
    .rooms g:hover .line { stroke: var(--path); stroke-width: 1.8; stroke-opacity: 1; }
    .rooms g:hover .dot { fill: var(--path); }
    .rooms g:hover .box { stroke: var(--path); stroke-width: 1.8; }
"""


def rooms() -> list[str]:
    """Return the rooms that exist, from the top to the ground, as lint-imports knows them."""
    settings = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    layers = re.search(r"^layers = \[(.*?)^\]", settings, re.MULTILINE | re.DOTALL)
    assert layers is not None
    names = re.findall(r"\w+", layers[1])
    folder = REPOSITORY / PACKAGE
    return [x for x in names if (folder / x).is_dir() or (folder / f"{x}.py").is_file()]


def imports(names: Sequence[str]) -> dict[str, set[str]]:
    """Return which rooms each room imports, wherever in a file; doors are left out."""
    settings = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    doors = set(re.findall(rf'"{PACKAGE}\.([\w.]+) -> ', settings))
    found: dict[str, set[str]] = {name: set() for name in names}
    for file in sorted((REPOSITORY / PACKAGE).rglob("*.py")):
        module = file.relative_to(REPOSITORY / PACKAGE).with_suffix("").parts
        if module[0] in found and ".".join(module) not in doors:
            tree = ast.parse(file.read_text(encoding="utf-8"))
            found[module[0]].update(set(_imported(tree)) & set(names) - {module[0]})
    return found


def _imported(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (x.split(".")[1] for x in modules if x.startswith(f"{PACKAGE}."))


def drawing(names: Sequence[str], found: Mapping[str, set[str]]) -> str:
    """Return the picture as SVG.

    Rooms stand on a diagonal. A line leaves each to the right, and has a dot above every room
    that it imports, from which a line leads down to that room.

    Parameters
    ----------
    names : sequence of str
        Rooms, from the top to the ground.
    found : mapping of str to set of str
        The rooms that each imports.

    Returns
    -------
    str

    Raises
    ------
    ValueError
        A room imports one that is above it.
    """
    row = {name: i for i, name in enumerate(names)}
    upward = [(a, b) for a in names for b in found[a] if row[b] < row[a]]
    if upward:
        raise ValueError(f"imports that lead upwards: {upward}")
    left = [MARGIN + STEP * i for i in range(len(names))]
    top = [MARGIN + ROW * i for i in range(len(names))]
    down = [x + WIDTH - STEP // 2 for x in left]  # where a line comes down to a room
    middle = [y + HEIGHT / 2 for y in top]
    width, height = left[-1] + WIDTH + MARGIN, top[-1] + HEIGHT + MARGIN
    parts = []
    for j, name in enumerate(names):
        above = [row[a] for a in names if name in found[a]]
        if above:
            parts.append(
                f'  <path class="line" d="M{down[j]} {middle[min(above)]:g}V{top[j] - 6}"/>\n'
                f'  <path class="tip" d="M{down[j] - 3} {top[j] - 7}h6l-3 7z"/>'
            )
    for i, name in enumerate(names):
        below = sorted(row[b] for b in found[name])
        told = ", ".join(names[j] for j in below)
        parts += ["  <g>", f"    <title>{name} imports {told or 'no other room'}</title>"]
        if below:
            parts.append(
                f'    <path class="line" d="M{left[i] + WIDTH} {middle[i]:g}H{down[below[-1]]}"/>'
            )
        kind = "maths" if name in MATHS else "box"
        parts += [
            *(f'    <circle class="dot" cx="{down[j]}" cy="{middle[i]:g}" r="2.6"/>' for j in below),
            f'    <rect class="{kind}" x="{left[i]}" y="{top[i]}" width="{WIDTH}"'
            f' height="{HEIGHT}" rx="3"/>',
            f'    <text class="name" x="{left[i] + WIDTH / 2:g}" y="{top[i] + 15}">{name}</text>',
            "  </g>",
        ]
    legend = (
        "Follow the line to the right of a room:",
        "each dot is a room that it imports,",
        "and the line below the dot leads there.",
        "Coloured: the maths, and nothing else.",
    )
    parts += [
        f'  <text class="small" x="{MARGIN}" y="{height - MARGIN - 20 * (len(legend) - n)}">'
        f"{line}</text>"
        for n, line in enumerate(legend)
    ]
    title = "The rooms of the package, from the commands to the ground, and which import which"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img"'
        ' aria-labelledby="rooms-title" class="rooms">\n'
        f'  <title id="rooms-title">{title}</title>\n  <style>{STYLE}  </style>\n'
        f'  <rect class="sheet" width="{width}" height="{height}"/>\n' + "\n".join(parts)
        + "\n</svg>\n"
    )  # fmt: skip


def picture() -> str:
    """Return the picture of the rooms as they are now."""
    names = rooms()
    return drawing(names, imports(names))


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
