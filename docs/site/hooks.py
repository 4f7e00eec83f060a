"""What MkDocs leaves open: pages at the repository's root, links out of docs/, drawings that follow the colours.

    make docs        # builds site/ by mkdocs.yml, which names this file

The home page is README.md; SECURITY.md and CHANGELOG.md are pages as they are. Whatever else of the repository a page
links to lies on the site under files/, by its path: the site is whole without a server of the sources.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

REPOSITORY = Path(__file__).resolve().parents[2]
ROOT_PAGES = {"README.md": "index.md", "SECURITY.md": "SECURITY.md", "CHANGELOG.md": "CHANGELOG.md"}
WIDE = ("kill-matrix.md", "peers.md")  # tables that need the room of the table of contents
LINK = re.compile(r"(?<=\]\()(?P<path>[^\s()#:]+)(?P<anchor>#[^\s()]*)?(?=\))")
DRAWING = re.compile(r'<img (?=[^>]*src="(?P<src>[^"]+\.svg)")[^>]*?alt="(?P<alt>[^"]*)"[^>]*>')


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the root, and the files of the repository that pages link to."""
    for source, page in ROOT_PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(REPOSITORY / source)))
    for page in list(files.documentation_pages()):
        for match in LINK.finditer(page.content_string):
            _add_linked(files, config, _in_repository(match["path"], page.src_uri))
    return files


def _add_linked(files: Files, config: MkDocsConfig, path: str) -> None:
    uri = _site_uri(path)
    if uri.startswith("files/") and files.get_file_from_path(uri) is None and (REPOSITORY / path).is_file():
        files.append(File.generated(config, uri, abs_src_path=str(REPOSITORY / path)))


def _in_repository(link: str, page: str) -> str:
    """The path from the repository's root that a link of a page means."""
    source = next((root for root, uri in ROOT_PAGES.items() if uri == page), f"docs/{page}")
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), link))


def _site_uri(path: str) -> str:
    """Where a file of the repository is on the site."""
    if path in ROOT_PAGES:
        return ROOT_PAGES[path]
    return path.removeprefix("docs/") if path.startswith("docs/") else f"files/{path}"


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between files of the repository into links between pages of the site."""
    if page.file.src_uri in WIDE:
        page.meta["hide"] = ["toc"]

    def relinked(match: re.Match[str]) -> str:
        uri = _site_uri(_in_repository(match["path"], page.file.src_uri))
        return posixpath.relpath(uri, posixpath.dirname(page.file.src_uri) or ".") + (match["anchor"] or "")

    return LINK.sub(relinked, markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put drawings into the page, where its text colour is theirs."""

    def drawn(match: re.Match[str]) -> str:
        uri = posixpath.normpath(posixpath.join(posixpath.dirname(page.file.src_uri), match["src"]))
        source = REPOSITORY / "docs" / uri
        if not source.is_file() or "currentColor" not in (text := source.read_text(encoding="utf-8")):
            return match[0]
        text = re.sub(r"<style>:root.*?</style>", "", text[text.index("<svg") :], flags=re.S)
        return f'<div class="drawing" role="img" aria-label="{match["alt"]}">{text}</div>'

    return DRAWING.sub(drawn, html)
