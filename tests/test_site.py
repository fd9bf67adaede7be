"""The site of the pages: all are in its navigation, links work there too, and a broken one fails the build."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.test_docs import PAGES, ROOT, name

site_links = pytest.importorskip("tools.site_links", reason="mkdocs-material is for developers")

SITE = {
    "README.md": "README.md",
    "docs/tasks.md": "tasks.md",
    "benchmarks/lift/results.md": "benchmarks/lift/results.md",
    "benchmarks/lift/main.png": "benchmarks/lift/main.png",
}
WEB = "https://example.org/us/code"


@pytest.mark.parametrize(
    ("link", "page", "there"),
    [
        ("docs/tasks.md#speed", "README.md", "tasks.md#speed"),
        ("../README.md", "docs/tasks.md", "README.md"),
        ("../benchmarks/lift/main.png", "docs/tasks.md", "benchmarks/lift/main.png"),
        ("../../docs/tasks.md", "benchmarks/lift/results.md", "../../tasks.md"),
        ("main.png", "benchmarks/lift/results.md", "main.png"),
        ("../settings/ogpo.py", "docs/tasks.md", f"{WEB}/blob/HEAD/settings/ogpo.py"),
        ("../tools", "docs/tasks.md", f"{WEB}/blob/HEAD/tools"),
        ("#speed", "docs/tasks.md", "#speed"),
        ("https://arxiv.org", "docs/tasks.md", "https://arxiv.org"),
        ("../settings/gone.py", "docs/tasks.md", "../settings/gone.py"),  # left to the strict build
    ],
)
def test_site_link_leads_where_the_repository_leads(link: str, page: str, there: str) -> None:
    assert site_links.site_link(link, page, SITE, f"{WEB}/") == there


def test_site_links_are_text_without_an_address_of_the_repository() -> None:
    import markdown

    links = site_links.SiteLinks()
    links.page, links.pages, links.repo_url = "README.md", SITE, ""
    text = (
        "[`flags`][1] [tasks](docs/tasks.md) ![curve](benchmarks/lift/main.png) `[x](LICENSE)`\n\n[1]: settings/ogpo.py"
    )
    html = markdown.markdown(text, extensions=[links])
    assert "<span><code>flags</code></span> " in html and '<a href="tasks.md">tasks</a>' in html
    assert 'src="benchmarks/lift/main.png"' in html and "<code>[x](LICENSE)</code>" in html


def entries(nav: Any) -> Iterator[str]:
    """The pages of a navigation, which is a page, {title: navigation} or a list of these."""
    if isinstance(nav, str):
        yield nav
    else:
        for item in nav.values() if isinstance(nav, dict) else nav:
            yield from entries(item)


def test_navigation_has_every_page_once() -> None:
    from mkdocs.config import load_config
    from mkdocs.structure.files import get_files

    config = load_config(str(ROOT / "mkdocs.yml"))
    files, nav = get_files(config), sorted(entries(config.nav))
    config.plugins.on_files(files, config=config)
    assert nav == sorted(file.src_uri for file in files.documentation_pages())
    assert {name(page).removeprefix("docs/") for page in [*PAGES, ROOT / "CHANGELOG.md"]} <= set(nav)


@pytest.mark.slow
def test_strict_build_makes_the_site_and_refuses_broken_links(tmp_path: Path) -> None:
    kept = shutil.ignore_patterns(".*", "data", "runs", "site", "*.gz", "*.xz")
    shutil.copytree(ROOT, tmp_path / "copy", ignore=kept)

    def build() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
        return subprocess.run(command, cwd=tmp_path / "copy", capture_output=True, text=True, env=os.environ)

    built = build()
    assert built.returncode == 0, built.stderr
    page = (tmp_path / "copy" / "site" / "baselines.html").read_text()
    assert 'class="arithmatex"' in page and "$$" not in page
    with (tmp_path / "copy" / "docs" / "log.md").open("a") as log:
        log.write("\n[a](gone.md), [b](../gone.py), [c](tasks.md#gone), [d](#gone)\n")
    broken = build()
    assert broken.returncode != 0
    for link in ("'gone.md'", "'../gone.py'", "'tasks.md#gone'", "'#gone'"):
        assert link in broken.stderr
