"""A hook of mkdocs: pages that lie outside docs/, and links of any page to files of the repository.

README is the home page; what else is a page stands in `PAGES`. A link to another file of the repository (a script, a
result) gives the reader that file. A link that leads nowhere stays as it is, and mkdocs names it.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
# From the root of the repository -> in the site.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "kernels/README.md": "kernels.md",
    "benchmarks/README.md": "benchmarks.md",
    "benchmarks/CARD.md": "card.md",
    "examples/README.md": "examples.md",
    "ptv2_fast/demo/data/README.md": "demo-data.md",
}
_SOURCES = {uri: source for source, uri in PAGES.items()}
_LINK = re.compile(r"(?<=\]\()([^)\s#]+)(?=[)#])")


def on_files(files: Files, config: Any) -> Files:
    """The pages from outside, beside those of docs/."""
    for source, uri in PAGES.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """The page with links that hold in the site."""
    uri = page.file.src_uri
    folder = posixpath.dirname(_SOURCES.get(uri, f"docs/{uri}"))

    def in_site(match: re.Match[str]) -> str:
        link = match[1]
        target = posixpath.normpath(posixpath.join(folder, link))
        if ":" in link or not (ROOT / target).is_file():
            return link
        there = PAGES.get(target) or target.removeprefix("docs/")
        if there == target and not target.endswith(".md"):
            there = f"repository/{target}"
            if files.get_file_from_path(there) is None:
                files.append(File.generated(config, there, abs_src_path=str(ROOT / target)))
        return posixpath.relpath(there, posixpath.dirname(uri) or ".")

    return _LINK.sub(in_site, markdown)
