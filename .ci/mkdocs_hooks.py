"""Hooks of MkDocs: files that lie outside docs/ become pages, and links between files become links between pages."""

import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
SOURCES = {"index.md": "README.md"} | {
    path.relative_to(ROOT).as_posix(): path.relative_to(ROOT).as_posix()
    for pattern in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "bench/results/*.md")
    for path in ROOT.glob(pattern)
}
PAGES = {source: page for page, source in SOURCES.items()}


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that lie elsewhere."""
    for page, source in SOURCES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text("utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let links lead from page to page; the text of a link to anything else stays."""
    here = page.file.src_uri
    folder = posixpath.dirname(SOURCES.get(here, f"docs/{here}"))

    def uri(target: str) -> str | None:
        path = posixpath.normpath(posixpath.join(folder, target))
        found = PAGES.get(path, path.removeprefix("docs/") if path.startswith("docs/") else None)
        return found and os.path.relpath(found, posixpath.dirname(here) or ".")

    def relink(match: re.Match[str]) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        return f"[{text}]({found}{anchor})" if (found := uri(target)) else text

    markdown = re.sub(r'src="([^":]+)"', lambda match: f'src="{uri(match[1])}"', markdown)
    return re.sub(r"\[([^\]]+)\]\((?!https?:)([^)#]+)(#[^)]*)?\)", relink, markdown)
