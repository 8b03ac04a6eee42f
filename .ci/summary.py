# SPDX-License-Identifier: MIT
"""Add up the closing lines of several pytest runs in a log, and print one of the same form."""

import re
import sys
from collections import Counter
from pathlib import Path

counts: Counter[str] = Counter()
seconds = 0.0
for line in Path(sys.argv[1]).read_text(encoding="utf-8", errors="replace").splitlines():
    if found := re.search(r"\d+ \w+.* in ([\d.]+)s\b", line):
        seconds += float(found[1])
        for number, word in re.findall(r"(\d+) (failed|passed|skipped|error)", line):
            counts[word] += int(number)
counts["errors"] = counts.pop("error", 0)
words = [f"{counts[w]} {w}" for w in ("failed", "passed", "skipped", "errors") if counts[w]]
print(f"{', '.join(words) or 'no tests ran'} in {seconds:.2f}s")
