"""Puts the committed tables into docs/, so that no figure there is copied by hand.

    python benchmarks/results.py

In docs/RESULTS.md and docs/SETTINGS.md, what stands between ``<!-- benchmarks/NAME.md -->`` and
``<!-- end -->`` is the content of that file. A test holds the two equal.
"""

import argparse
import re

from report import HERE, ROOT, parser

from util.cli import run_command
from util.files import write_atomically

BLOCK = re.compile(r"(<!-- benchmarks/(\w+)\.md -->\n).*?(<!-- end -->)", re.S)


def refreshed(text: str) -> str:
    """The document with every block as its file is now."""

    def block(match: re.Match) -> str:
        content = (HERE / f"{match[2]}.md").read_text(encoding="utf-8").strip()
        return f"{match[1]}\n{content}\n\n{match[3]}"

    return BLOCK.sub(block, text)


def main(args: argparse.Namespace) -> None:
    for name in ("RESULTS", "SETTINGS"):
        file = ROOT / "docs" / f"{name}.md"
        write_atomically(file, refreshed(file.read_text(encoding="utf-8")))
        print(f"written: docs/{name}.md")


if __name__ == "__main__":
    arguments = parser(__doc__).parse_args()
    run_command(lambda: main(arguments))
