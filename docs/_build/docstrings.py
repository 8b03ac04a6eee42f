# SPDX-License-Identifier: MIT
"""Docstrings as Markdown, and as griffe reads them.

Roles of reStructuredText become links, where there is what they name. Entries of several names are
parted, since griffe would show the default of the first one for all, and names no returned values.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|meth|mod|data|attr):`(~?)([\w.]+)`")
SEVERAL = re.compile(r"^(\w+(?:, \w+)+) : (.+\n(?:    .*\n|\n(?=    ))*)", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Rewrites every docstring that griffe has read."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of an object that was read."""
        if obj.docstring is not None:
            text = ROLE.sub(lambda role: self._link(obj, role), obj.docstring.value)
            obj.docstring.value = SEVERAL.sub(self._parted, f"{text}\n").rstrip()

    @staticmethod
    def _parted(entry: re.Match[str]) -> str:
        return "".join(f"{name} : {entry[2].rstrip()}\n" for name in entry[1].split(", "))

    @staticmethod
    def _link(obj: griffe.Object, role: re.Match[str]) -> str:
        short, name = role.groups()
        path = name if name.startswith("patchnetvlad.") else f"{_scope(obj, name)}.{name}"
        shown = name.rsplit(".", 1)[-1] if short else name
        return f'<autoref identifier="{path}" optional><code>{shown}</code></autoref>'


def _scope(obj: griffe.Object, name: str) -> str:
    """Return the path of the object in which a bare name is looked up."""
    scope: griffe.Object | None = obj
    while scope is not None:
        if name.split(".")[0] in scope.members:
            return str(scope.path)
        scope = scope.parent
    # Names of a module are read one by one, so it may not have this one yet.
    return str(obj.module.path)
