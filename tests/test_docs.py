"""The documentation: it builds strictly, its links lead somewhere, every command in it is one, and what can run at
tiny size does."""

import importlib.util
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from docs_fixture import (
    DOCS,
    ROOT,
    blocks,
    check_command,
    check_mention,
    made_tiny,
    mentions,
    pages,
    posfield_words,
    split_name,
    write_world,
)
from tool_fixture import ended

from pretrain.errors import UserError

needs_mkdocs = pytest.mark.skipif(
    importlib.util.find_spec("mkdocs") is None, reason="mkdocs is not installed: pip install 'posfield[docs]'"
)
TEXTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted(DOCS.rglob("*.md")),
]
QUICK = ("quickstart-photographs.md", "quickstart-labels.md")
ALL = [block for path in TEXTS for block in blocks(path)]
# What a page may lead to outside the site
DOMAINS = {
    "arxiv.org", "docs.pytorch.org", "github.com", "huggingface.co", "mmsegmentation.readthedocs.io", "openreview.net",
    "opensource.org", "proceedings.mlr.press", "pypi.org", "pytorch.org", "squidfunk.github.io", "www.apache.org",
}  # fmt: skip


class Links(HTMLParser):
    """The addresses, the anchors and what is loaded of a built page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links, self.anchors, self.loaded = [], set(), []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.anchors.add(values.get("id") or values.get("name"))
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])
        elif tag in ("script", "img", "iframe", "link") and (to := values.get("src") or values.get("href")):
            (self.links if values.get("rel") == "canonical" else self.loaded).append(to)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site."""
    folder = tmp_path_factory.mktemp("docs") / "site"
    line = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder]
    done = subprocess.run([*map(str, line)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    return folder


@needs_mkdocs
def test_every_page_is_in_the_site_and_fetches_nothing_from_elsewhere(site):
    built = {path: Links(path.read_text()) for path in site.rglob("*.html") if path.name != "404.html"}
    assert {path.relative_to(site).with_suffix(".md") for path in built} == {
        p.relative_to(DOCS) for p in pages()
    }
    for path, page in built.items():
        for address in page.loaded:
            parts = urlsplit(address)
            assert not parts.netloc and (path.parent / unquote(parts.path)).exists(), (
                f"{path.name}: {address}"
            )
        for address in page.links:
            parts = urlsplit(address)
            if parts.scheme:
                assert parts.netloc in DOMAINS, f"{path.name}: {address}"
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            assert target.exists(), f"{path.name}: {address}"
            if parts.fragment and target in built and parts.fragment != "__skip":
                assert unquote(parts.fragment) in built[target].anchors, f"{path.name}: {address}"


def anchors_of(text: str) -> set[str]:
    """Of the headings, as they are made on the web."""
    titles = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "SECURITY.md"])
def test_links_of_the_texts_at_the_top(name):
    text = (ROOT / name).read_text()
    for address in re.findall(r"\]\(([^)\s]+)\)", text):
        parts = urlsplit(address)
        if parts.scheme:
            assert parts.netloc in DOMAINS, address
            continue
        target = ROOT / parts.path if parts.path else ROOT / name
        assert target.exists(), address
        if parts.fragment:
            assert parts.fragment in anchors_of(target.read_text()), address


def test_every_command_exists_with_its_options_and_keys():
    wrong = []
    for block in ALL:
        # Names files of its page: tests/test_extending.py writes these and runs the commands.
        if "extending" in block.page and not block.is_run:
            continue
        for words in block.commands:
            try:
                check_command(words)
            except (UserError, StopIteration) as error:
                wrong.append(f"{block.where} {' '.join(words)}: {error!r}")
    for path in TEXTS:
        for words in mentions(path):
            try:
                check_mention(words)
            except UserError as error:
                wrong.append(f"{path.relative_to(ROOT)} posfield {' '.join(words)}: {error}")
    assert not wrong, "\n".join(wrong)
    for bad in ("posfield pretrain --nothing", "posfield detect --output x nothing=1", "make nothing"):
        with pytest.raises(UserError):
            check_command(bad.split())
    for bad in ("pretend", "detect --nothing"):
        with pytest.raises(UserError):
            check_mention(bad.split())


def test_every_block_of_python_compiles():
    shown = [block for block in ALL if block.language in ("python", "py", "pycon")]
    assert {"README.md", "docs/api.md"} <= {block.page for block in shown}
    for block in shown:
        assert compile(block.text, block.where, "exec").co_code, block.where


def failures(files: list[Path], folder: Path, monkeypatch, capfd) -> list[str]:
    """Run what the pages show, in order, in a folder that holds what they take for given. What failed, and what was neither
    run nor marked."""
    write_world(folder)
    monkeypatch.chdir(folder)
    wrong = []
    for block in (block for path in files for block in blocks(path) if block.is_run):
        for words in block.commands:
            ours = posfield_words(words)
            if ours is None or words[0] == "torchrun":
                wrong.append(f"{block.where}: run it, or mark it <!-- not run: why -->")
                continue
            name, ours = split_name(ours)
            if code := ended(name, *made_tiny(name, ours)):
                told = capfd.readouterr().err[-600:]
                wrong.append(f"{block.where}: {' '.join(words)}: code {code}\n{told}")
        if block.language in ("python", "py"):
            try:
                exec(compile(block.text, block.where, "exec"), {"__name__": "page"})
            except Exception as error:
                wrong.append(f"{block.where}: {error!r}")
    return wrong


def test_the_quick_starts_run(tmp_path, monkeypatch, capfd):
    assert failures([DOCS / name for name in QUICK], tmp_path, monkeypatch, capfd) == []
    assert {"first", "objects", "regions"} <= {path.name for path in (tmp_path / "runs").iterdir()}


@pytest.mark.slow
def test_all_pages_run(tmp_path, monkeypatch, capfd):
    assert failures(pages(), tmp_path, monkeypatch, capfd) == []
