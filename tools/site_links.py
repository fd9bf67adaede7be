"""A hook of MkDocs (mkdocs.yml): pages stay where they are, with links that work on GitHub, and the site has its own.

A link to a file that is no page goes to `repo_url`; where that is empty, its text stays.
"""

import posixpath
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit
from xml.etree.ElementTree import Element

from markdown import Extension, Markdown
from markdown.treeprocessors import Treeprocessor
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
OTHERS = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "assets/*.md", "benchmarks/**/*.md", "benchmarks/**/*.png")


def site_link(link: str, page: str, pages: Mapping[str, str], repo_url: str) -> str | None:
    """A link of `page` as the site has it; None to a file that is no page where there is no `repo_url`.

    page: its path in the repository; pages: {path in the repository: path in the site}, of pictures too.
    """
    url = urlsplit(link)
    path = posixpath.normpath(posixpath.join(posixpath.dirname(page), url.path))
    if url.scheme or not url.path or not (ROOT / path).exists():
        return link  # MkDocs names those that are broken
    if path in pages:
        return url._replace(path=posixpath.relpath(pages[path], posixpath.dirname(pages[page]) or ".")).geturl()
    return f"{repo_url.rstrip('/')}/blob/HEAD/{path}" if repo_url else None


class SiteLinks(Extension, Treeprocessor):
    def extendMarkdown(self, md: Markdown) -> None:
        md.treeprocessors.register(self, "site_links", 1)  # MkDocs checks links at 0

    def run(self, root: Element) -> None:
        for element in root.iter():
            for key in {"href", "src"} & element.attrib.keys():
                link = site_link(element.attrib.pop(key), self.page, self.pages, self.repo_url)
                element.tag, element.attrib = (element.tag, element.attrib | {key: link}) if link else ("span", {})


links = SiteLinks()


def on_files(files: Files, config: MkDocsConfig) -> None:
    others = [path.relative_to(ROOT).as_posix() for pattern in OTHERS for path in ROOT.glob(pattern)]
    links.pages = {f"docs/{file.src_uri}": file.src_uri for file in files} | {path: path for path in others}
    links.repo_url = config.repo_url or ""
    config.markdown_extensions.append(links)
    for path in others:
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))


def on_page_markdown(markdown: str, page: Page, **_: object) -> None:
    links.page = Path(page.file.abs_src_path).relative_to(ROOT).as_posix()
