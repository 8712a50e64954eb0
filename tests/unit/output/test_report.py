"""A report is one page that needs nothing else, says what the manifest says, and is drawn for light
and dark.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from fixtures.learner_scheme import runnable_model
from fixtures.toy_scheme import install_toy

import bitpress
from bitpress.conformance.commands import command, plugins, refusal
from bitpress.output import manifest


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `plugins`, and `out`, a checked output of a toy model."""
    folder = tmp_path_factory.mktemp("made")
    model = runnable_model(folder / "model")
    with plugins(install_toy(folder / "plugins")):
        bitpress.compress(model, folder / "out", scheme="toy", check=folder / "text.txt", threads=1)
    return folder


@pytest.fixture
def page(outputs: Path, tmp_path: Path) -> str:
    done = command(
        "report", outputs / "out", "--html", tmp_path / "page.html", path=outputs / "plugins"
    )
    assert (done.returncode, done.stdout, done.stderr) == (
        0,
        f"{tmp_path / 'page.html'}: written\n",
        "",
    )
    return (tmp_path / "page.html").read_text(encoding="utf-8")


def test_the_page_holds_every_figure_of_the_manifest(outputs: Path, page: str) -> None:
    document = json.loads((outputs / "out/bitpress.json").read_text())
    for name, layer in document["layers"].items():
        assert f"<code>{name}</code>" in page
        assert f"{layer['error']:.3%}" in page
    for words in (
        f"{document['check']['kl']:.4f}",
        f"{document['check']['top1']:.1%}",
        f"{document['check']['perplexity']:.3f}",
        "runs anywhere",
    ):
        assert words in page
    assert all(
        file["sha256"] in page
        for file in (*document["inputs"].values(), *document["files"].values())
    )


def test_the_page_needs_nothing_but_itself(page: str) -> None:
    assert not re.findall(r"<(?:script|link|img|iframe)\b|@import|url\((?!#)", page)
    links = set(re.findall(r"""(?:href|src)\s*=\s*["']([^"']*)""", page))
    assert all(link.startswith("#") for link in links)


def test_charts_are_drawings_in_colors_that_both_light_and_dark_define(page: str) -> None:
    drawings = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    # sizes, errors, and how far hidden states drift
    assert len(drawings) == 3
    for drawing in drawings:
        ElementTree.fromstring(drawing)
        assert not re.search(
            r"#(?:[0-9a-f]{6})\b", re.sub(r'(?:id|href)="[^"]*"|url\([^)]*\)', "", drawing)
        )
    light, dark = (
        set(re.findall(r"(--[\w-]+):", root))
        for root in re.findall(r":root \{(.*?)\}", page, re.DOTALL)
    )
    assert set(re.findall(r"var\((--[\w-]+)\)", page)) <= light
    assert light == dark
    assert "prefers-color-scheme: dark" in page


def test_words_are_text_that_can_be_searched(page: str) -> None:
    words = set(re.findall(r"<text[^>]*>([^<]*)</text>", page))
    assert {"down_proj", "q_proj", "decoder block", "source", "result"} <= {
        word.strip() for word in words
    }


def test_the_same_output_gives_the_same_page(outputs: Path, page: str, tmp_path: Path) -> None:
    command("report", outputs / "out", "--html", tmp_path / "again.html", path=outputs / "plugins")
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == page


def test_a_page_goes_beside_the_output_and_leaves_it_proved(outputs: Path) -> None:
    assert command("report", outputs / "out", path=outputs / "plugins").returncode == 0
    assert (outputs / "out.html").is_file()
    assert command("verify", outputs / "out", path=outputs / "plugins").returncode == 0


def test_names_are_written_out_and_not_obeyed(outputs: Path) -> None:
    from bitpress.output.report.page import render_page

    shown = render_page(manifest.read_manifest(outputs / "out"), "<script>alert(1)</script>")
    assert "<script>" not in shown
    assert "&lt;script&gt;alert(1)" in shown


def test_a_scheme_that_is_not_installed_costs_only_its_hardware(
    outputs: Path, tmp_path: Path
) -> None:
    assert command("report", outputs / "out", "--html", tmp_path / "page.html").returncode == 0
    assert "not known here: scheme &#x27;toy&#x27; is not installed" in (
        tmp_path / "page.html"
    ).read_text(encoding="utf-8")


def test_without_matplotlib_it_says_what_to_install(
    outputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install 'bitpress-core[report]'" in refusal(
        "report", outputs / "out", "--html", tmp_path / "page.html"
    )
    assert not (tmp_path / "page.html").exists()


def test_what_bitpress_did_not_write_has_no_report(outputs: Path) -> None:
    assert "was not written by bitpress" in refusal("report", outputs / "model")


def test_inspect_tells_of_the_check_too(outputs: Path) -> None:
    shown = command("inspect", outputs / "out").stdout
    kl = json.loads((outputs / "out/bitpress.json").read_text())["check"]["kl"]
    assert f"KL divergence    {kl:.6f} nats per token" in shown
