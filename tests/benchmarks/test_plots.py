"""The drawings of docs/numerics.md are those of the committed results, and hold in light and in dark pages."""

import re
from pathlib import Path

import pytest

from benchmarks.plots import DOCS, PLOTS, render

pytest.importorskip("matplotlib", reason="pip install '.[finetune]' brings matplotlib")


def words(svg: str) -> list[str]:
    """Every text of a drawing: names, ticks, axes."""
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


def marks(svg: str) -> list[tuple[int, int]]:
    """Where its marks and bars stand, to a twentieth of its width: fonts move the axes a little."""
    found = re.findall(r"(?:<use [^>]*x=\"|M )([\d.]+)(?:\" y=\"| )([\d.]+)", svg)
    return [(round(float(x) / 27), round(float(y) / 27)) for x, y in found]


@pytest.mark.parametrize("name", PLOTS)
def test_a_drawing_is_the_one_of_the_results(name: str) -> None:
    committed = (DOCS / "plots" / f"{name}.svg").read_text(encoding="utf-8")
    made = render(name)
    assert words(committed) == words(made) and len(words(made)) > 8
    assert len(marks(committed)) == len(marks(made))
    off = [abs(a[0] - b[0]) + abs(a[1] - b[1]) for a, b in zip(marks(committed), marks(made), strict=True)]
    assert max(off) <= 1


@pytest.mark.parametrize("name", PLOTS)
def test_a_drawing_takes_the_colour_of_its_page(name: str) -> None:
    drawn = (DOCS / "plots" / f"{name}.svg").read_text(encoding="utf-8")
    assert "currentColor" in drawn and "#000000" not in drawn and "#ffffff" not in drawn
    assert "prefers-color-scheme:dark" in drawn and "http" not in drawn.replace("http://www.w3.org", "")
    assert len(drawn) < 60_000


def test_the_page_shows_every_drawing() -> None:
    page = (DOCS / "numerics.md").read_text(encoding="utf-8")
    assert re.findall(r"\]\(plots/(\w+)\.svg\)", page) == [*dict.fromkeys(re.findall(r"plots/(\w+)", page))]
    assert set(re.findall(r"\]\(plots/(\w+)\.svg\)", page)) == set(PLOTS)
    assert {Path(name).stem for name in map(str, (DOCS / "plots").glob("*.svg"))} == set(PLOTS)
