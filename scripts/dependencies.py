"""Writes `docs/dependencies.md`: what the project needs, and under which licences.

python scripts/dependencies.py      in an environment where everything is installed (`make setup`)
"""

from __future__ import annotations

import configparser
import importlib.metadata as metadata
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "dependencies.md"
#: what a dependency's licence may be, in SPDX's words; others need a decision first
ALLOWED = frozenset(
    {
        *("0BSD", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "CC0-1.0", "HPND", "ISC", "MIT", "MIT-0"),
        *("MPL-2.0", "PSF-2.0", "Python-2.0", "Unlicense", "Zlib", "Unicode-3.0", "BSL-1.0", "CNRI-Python"),
    }
)
#: how packages without an SPDX expression word it, lower case → SPDX
_WORDS = {
    "mit": "MIT",
    "mit license": "MIT",
    "apache": "Apache-2.0",
    "apache 2.0": "Apache-2.0",
    "apache-2.0": "Apache-2.0",
    "apache 2.0 license": "Apache-2.0",
    "apache license 2.0": "Apache-2.0",
    "apache license v2.0": "Apache-2.0",
    "apache software license": "Apache-2.0",
    "bsd": "BSD-3-Clause",
    "bsd license": "BSD-3-Clause",
    "bsd-3-clause": "BSD-3-Clause",
    "3-clause bsd license": "BSD-3-Clause",
    "bsd 3-clause license": "BSD-3-Clause",
    "new bsd": "BSD-3-Clause",
    "mozilla public license 2.0 (mpl 2.0)": "MPL-2.0",
    "mpl-2.0": "MPL-2.0",
    "python software foundation license": "PSF-2.0",
    "psf-2.0": "PSF-2.0",
    "isc license (iscl)": "ISC",
}
_GROUPS = {
    "The device": ("install_requires",),
    "The exporter (`edge-reasoner[export]`)": ("export",),
    "The reference server (`edge-reasoner[server]`)": ("server",),
    "Development (`edge-reasoner[dev]`)": ("dev",),
}


def main() -> int:
    """Writes the page; returns the exit status."""
    PAGE.write_text(page(), encoding="utf-8")
    return 0


def page() -> str:
    """The page, from what is installed."""
    lines = [
        "# Dependencies and their licences",
        "",
        "Made by `scripts/dependencies.py`; licences are what the packages declare. What a package brings",
        "with it stands in the group that first needs it. Releases and digests: `requirements/`.",
    ]
    seen: set[str] = set()
    for title, parts in _GROUPS.items():
        wanted = [name for part in parts for name in required(part)]
        lines += ["", f"## {title}", "", "| Package | Licence | Asked for by us |", "|---|---|---|"]
        for name in sorted(closure(wanted) - seen, key=str.lower):
            lines.append(f"| {name} | {licence(name)} | {'yes' if name in wanted else ''} |")
        seen |= closure(wanted)
    return "\n".join(lines) + "\n"


def required(part: str) -> list[str]:
    """Names that setup.cfg asks for in `install_requires` or an extra, as far as they are meant for here."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    text = config["options"][part] if part == "install_requires" else config["options.extras_require"][part]
    lines = [line.strip() for line in text.splitlines()]
    return sorted({_name(line) for line in lines if line and not line.startswith(("#", "edge-reasoner["))})


def closure(names: list[str]) -> set[str]:
    """Those that are installed, and what they need."""
    found: set[str] = set()
    left = list(names)
    while left:
        name = left.pop()
        if name in found:
            continue
        try:
            needs = metadata.requires(name) or ()
        except metadata.PackageNotFoundError:
            continue  # for another platform or another Python
        found.add(name)
        left += [_name(need) for need in needs if "extra ==" not in need]
    return found


def licence(name: str) -> str:
    """What the package declares, in SPDX's words where they are known."""
    about = metadata.metadata(name)
    if expression := about.get("License-Expression"):
        return str(expression)
    told = [str(about.get("License") or "").strip().splitlines()[:1]]
    classifiers = [
        line.rpartition(" :: ")[2] for line in about.get_all("Classifier") or () if "License ::" in line
    ]
    for words in (*(line for lines in told for line in lines), *classifiers):
        if spdx := _WORDS.get(words.lower()):
            return spdx
    return next((line for lines in told for line in lines), "") or ", ".join(classifiers) or "unknown"


def is_allowed(declared: str) -> bool:
    """Whether every licence of an expression is allowed; of alternatives (OR) one is enough."""
    return all(
        any(_known(part)) for part in re.split(r"\s+AND\s+", declared.replace("(", "").replace(")", ""))
    )


def _known(part: str) -> Iterator[bool]:
    for name in re.split(r"\s+OR\s+", part):
        yield name.partition(" WITH ")[0].strip() in ALLOWED


def _name(requirement: str) -> str:
    return re.sub(r"[-_.]+", "-", re.split(r"[\s\[;<>=!~(]", requirement, maxsplit=1)[0]).lower()


if __name__ == "__main__":
    sys.exit(main())
