"""The site of the docs builds without a warning; pages show without network or error, none wider than its window."""

import functools
import itertools
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
OWN = REPOSITORY / ".venv" / "docs" / "bin" / "python"  # where `make docs` puts MkDocs
PYTHON = str(OWN) if OWN.exists() else sys.executable
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(
    not OWN.exists() and find_spec("material") is None, reason="no MkDocs Material here: make docs brings it"
)

# Shows each page in a frame of each width and scheme, and sends what it saw.
HARNESS = """<!doctype html><meta charset="utf-8"><link rel="icon" href="data:,"><body><script>
const pages = PAGES, seen = [];
const wait = ms => new Promise(done => setTimeout(done, ms));
async function look(page, width, dark) {
  const scheme = dark ? "slate" : "default";
  localStorage.setItem("/.__palette", JSON.stringify({index: +dark, color: {scheme, primary: "teal", accent: "teal"}}));
  const frame = document.createElement("iframe");
  frame.style = `width:${width}px;height:800px;border:0`;
  frame.src = page;
  await new Promise(done => { frame.onload = done; document.body.append(frame); });
  const inside = frame.contentWindow, root = inside.document.documentElement;
  for (let i = 0; i < 50 && !inside.document$; i++) await wait(20);  // until the theme's own script ran
  seen.push({page, width, scheme: inside.document.body.dataset.mdColorScheme, title: inside.document.title,
    over: root.scrollWidth - root.clientWidth, script: !!inside.document$,
    loaded: inside.performance.getEntriesByType("resource").map(entry => entry.name)});
  frame.remove();
}
(async () => {
  for (const page of pages) for (const width of [1280, 390])
    for (const dark of [false, true]) await look(page, width, dark);
  await fetch("/seen", {method: "POST", body: JSON.stringify(seen)});
})();
</script>"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    command = [PYTHON, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(out)]
    done = subprocess.run(command, cwd=REPOSITORY, env=quiet, capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    return out


def test_every_page_is_on_the_site(site: Path) -> None:
    pages = {
        str(page.relative_to(REPOSITORY / "docs").with_suffix(".html")) for page in REPOSITORY.glob("docs/**/*.md")
    }
    built = {str(page.relative_to(site)) for page in site.rglob("*.html")}
    assert pages | {"index.html", "SECURITY.html", "CHANGELOG.html"} <= built


def test_every_page_is_in_the_navigation(site: Path) -> None:
    home = (site / "index.html").read_text(encoding="utf-8")
    for page in REPOSITORY.glob("docs/**/*.md"):
        assert f'href="{page.relative_to(REPOSITORY / "docs").with_suffix(".html")}"' in home


def fetched(page: str) -> list[str]:
    """What of a page a browser would ask another server for, as tags of its HTML or rules of a style sheet."""
    tags = r"<(?:script|img|iframe|source)[^>]* src=[\"']?(?:\w+:)?//"
    links = r"<link[^>]*(?:stylesheet|preload|preconnect|icon)[^>]* href=[\"']?(?:\w+:)?//"
    return re.findall(rf"{tags}|{links}|(?:@import|url\()[\s\"']*(?:\w+:)?//", page)


def test_nothing_on_a_page_is_fetched_from_elsewhere(site: Path) -> None:
    files = [*site.rglob("*.html"), *site.rglob("*.css")]
    assert len(files) > 20
    assert [(file.name, found) for file in files if (found := fetched(file.read_text("utf-8")))] == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('<script src="https://a.b/c.js">', True),
        ('<link rel="stylesheet" href="//a.b/c.css">', True),
        ("@import url(https://a.b/c.css)", True),
        ('<script src="assets/c.js"><a href="https://a.b"><link rel="canonical" href="https://a.b">', False),
    ],
)
def test_what_is_fetched_is_found(text: str, found: bool) -> None:
    assert bool(fetched(text)) == found


class Server(ThreadingHTTPServer):
    """The site on this machine; `seen` is what the harness sent, once it has."""

    def __init__(self, site: Path) -> None:
        super().__init__(("127.0.0.1", 0), functools.partial(Handler, directory=str(site)))
        self.seen: queue.Queue[list[dict[str, Any]]] = queue.Queue()
        self.address = f"http://127.0.0.1:{self.server_port}"


class Handler(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(204)
        self.end_headers()
        assert isinstance(self.server, Server)
        self.server.seen.put(json.loads(body))


def show(site: Path, profile: Path, pages: list[str]) -> tuple[list[dict[str, Any]], str, list[str]]:
    """What the harness saw of each page, the address of the site, and what Chromium wrote to the console."""
    assert CHROMIUM is not None
    (site / "harness.htm").write_text(HARNESS.replace("PAGES", json.dumps(pages)), encoding="utf-8")
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--enable-logging=stderr"]
    flags += [f"--user-data-dir={profile}", "--window-size=1300,900", "--remote-debugging-port=0"]
    with Server(site) as server, (profile / "stderr").open("w+") as log:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        browser = subprocess.Popen([CHROMIUM, *flags, f"{server.address}/harness.htm"], stderr=log)
        try:
            seen = server.seen.get(timeout=300)
        finally:
            browser.terminate()
            browser.wait()
            server.shutdown()
        log.seek(0)
        return seen, server.address, [line for line in log if "CONSOLE" in line]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")
def test_pages_show_in_both_schemes_and_widths(site: Path, tmp_path: Path) -> None:
    pages = sorted(str(page.relative_to(site)) for page in site.rglob("*.html") if page.name != "404.html")
    seen, address, console = show(site, tmp_path, pages)
    assert console == []
    assert {(look["page"], look["width"], look["scheme"]) for look in seen} == {
        (page, *how) for page in pages for how in itertools.product((1280, 390), ("default", "slate"))
    }
    assert [look["page"] for look in seen if not look["script"] or "nanollama" not in look["title"]] == []
    assert [(look["page"], look["width"], look["over"]) for look in seen if look["over"] > 0] == []
    assert {
        name for look in seen for name in look["loaded"] if not name.startswith((address, "data:", "blob:"))
    } == set()


PLANTED = """<!doctype html><meta charset="utf-8"><title>planted</title><body data-md-color-scheme="default">
<div style="width:3000px">wide</div><img src="http://127.0.0.1:9/picture.png"><script>console.error("planted")</script>"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")
def test_a_page_that_is_wide_noisy_and_fetches_is_seen(tmp_path: Path) -> None:
    (tmp_path / "planted.html").write_text(PLANTED, encoding="utf-8")
    seen, address, console = show(tmp_path, tmp_path, ["planted.html"])
    assert any("planted" in line for line in console)
    assert [look["over"] > 0 for look in seen] == [True] * 4
    assert any(not name.startswith(address) for look in seen for name in look["loaded"])
