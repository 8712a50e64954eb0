"""A report is one page that needs nothing else, says what the manifest says, and is drawn for light
and dark.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import attrs
import pytest
from fixtures.learner_scheme import runnable_model
from fixtures.toy_scheme import install_toy

import bitpress
from bitpress.conformance.commands import command, plugins, refusal
from bitpress.output import manifest
from bitpress.output.report.heat_map import draw_bits, draw_heat_map
from bitpress.output.report.layer_grid import arrange_layers
from bitpress.output.report.page import render_page


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
    # the strip of bits, a row of errors for each of seven kinds, and how far hidden states drift
    assert len(drawings) == 9
    for drawing in drawings:
        root = ElementTree.fromstring(drawing)
        assert root.get("role") == "img"
        assert root.get("aria-label")
        assert "<text" not in drawing
    style = page[page.index("<style>") : page.index("</style>")]
    assert not re.search(r"#[0-9a-f]{6}", page.replace(style, ""))
    light, dark = (
        set(re.findall(r"(--[\w-]+):", root))
        for root in re.findall(r":root \{(.*?)\}", page, re.DOTALL)
    )
    assert set(re.findall(r"var\((--[\w-]+)\)", page)) <= light
    assert light == dark
    assert "prefers-color-scheme: dark" in page


class Outline(HTMLParser):
    """The titles of a page's sections, its tables, and whether all tags are closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open_tags: list[str] = []
        self.titles: list[str] = []
        self.tables: list[list[list[str]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "br"):
            self.open_tags.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """A shape of a drawing, which is closed at once."""

    def handle_endtag(self, tag: str) -> None:
        assert self.open_tags.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open_tags[-1:] == ["h2"]:
            self.titles.append(data)
        elif "td" in self.open_tags or "th" in self.open_tags:
            self.tables[-1][-1][-1] += data


def read_outline(page: str) -> Outline:
    outline = Outline()
    outline.feed(page)
    assert outline.open_tags == []
    return outline


def test_what_the_model_lost_comes_first(page: str) -> None:
    figures = re.findall(r'<div class="tile"><b>([^<]*)</b><span>([^<]*)', page)
    assert figures[0][1].startswith("KL divergence")
    assert read_outline(page).titles == [
        "Bits of each layer",
        "Error of each layer's weight",
        "How far hidden states drift",
        "Layers with the largest errors",
        "Size",
        "Where it serves",
        "Settings",
        "Provenance",
    ]
    assert "helps most" not in page


def test_without_a_check_it_says_how_to_measure_the_loss(outputs: Path) -> None:
    unchecked = attrs.evolve(manifest.read_manifest(outputs / "out"), check=None)
    shown = render_page(unchecked, "out")
    assert "KL divergence" not in shown
    assert "What the model has lost was not measured" in shown


@pytest.mark.parametrize("missing", ["inputs", "files"])
def test_a_manifest_without_weight_files_is_refused(outputs: Path, missing: str) -> None:
    damaged = attrs.evolve(manifest.read_manifest(outputs / "out"), **{missing: {}})
    with pytest.raises(bitpress.CheckpointError, match=r"out: its bitpress\.json names no weight"):
        render_page(damaged, "out")


def test_a_heat_map_has_its_figures_as_a_table(outputs: Path, page: str) -> None:
    layers = manifest.read_manifest(outputs / "out").layers
    table = next(table for table in read_outline(page).tables if table[0][0] == "block")
    kinds = table[0][1:]
    assert {"q_proj", "down_proj"} <= set(kinds)
    for block, *cells in table[1:]:
        for kind, cell in zip(kinds, cells, strict=True):
            name = next(
                name for name in layers if f".{block}." in name and name.endswith(f".{kind}")
            )
            error = layers[name].error
            assert error is not None
            assert cell == f"{error:.2%}"
    darkest = max(map(float, re.findall(r'fill-opacity="([\d.]+)"', page)))
    assert darkest == 1


def layer(bits: float, error: float | None = 0.1, rows: int = 8) -> manifest.LayerRecord:
    return manifest.LayerRecord(("toy",), (rows, 16), "BF16", bits, error)


def test_the_experts_of_a_block_are_one_cell_with_the_largest_error() -> None:
    layers = {
        f"model.layers.{block}.mlp.experts.{expert}.up_proj": layer(4, 0.1 * (expert + 1))
        for block in (3, 4)
        for expert in range(3)
    }
    layers["model.layers.3.mlp.up_proj"] = layer(4, None)
    layers["lm_head"] = layer(4)
    (grid,) = arrange_layers(layers)
    assert (grid.container, grid.blocks) == ("model.layers", (3, 4))
    assert grid.kinds == ("mlp.experts.*.up_proj", "mlp.up_proj")
    assert grid.summarize(lambda layer: layer.error) == pytest.approx(
        {(3, "mlp.experts.*.up_proj"): 0.3, (4, "mlp.experts.*.up_proj"): 0.3}
    )
    drawn = draw_heat_map(grid, lambda layer: layer.error)
    # names that end alike are shown as far as they differ; a kind without a figure has no row
    assert drawn.count("<svg") == 1
    assert ">experts.<wbr>*.<wbr>up_proj</code>" in drawn
    assert draw_heat_map(grid, lambda layer: layer.output_error) == ""


def test_the_strip_of_bits_joins_neighbors_and_shows_sizes_as_areas() -> None:
    layers = {"a": layer(4.25), "b": layer(4.25), "c": layer(8, rows=16), "d": layer(20, rows=32)}
    strip = ElementTree.fromstring(re.findall(r"<svg.*</svg>", draw_bits(layers))[0])
    rects = [(rect.get("width"), rect.get("height"), rect[0].text) for rect in strip.iter("rect")]
    assert rects == [
        ("250.00", "4.25", "a to b: 4.25 bits per weight"),
        ("250.00", "8.00", "c: 8.00 bits per weight"),
        ("500.00", "16.00", "d: 20.00 bits per weight"),
    ]
    assert strip.get("aria-label") == "bits per weight of 4 layers: 4.25 to 20.00"
    assert draw_bits({}) == ""


def test_the_same_output_gives_the_same_page(outputs: Path, page: str, tmp_path: Path) -> None:
    command("report", outputs / "out", "--html", tmp_path / "again.html", path=outputs / "plugins")
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == page


def test_a_page_goes_beside_the_output_and_leaves_it_proved(outputs: Path) -> None:
    assert command("report", outputs / "out", path=outputs / "plugins").returncode == 0
    assert (outputs / "out.html").is_file()
    assert command("verify", outputs / "out", path=outputs / "plugins").returncode == 0


def test_names_are_written_out_and_not_obeyed(outputs: Path) -> None:
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


def test_it_needs_no_plotting_library(outputs: Path, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['matplotlib'] = None; import bitpress.api; "
        "bitpress.api.report(sys.argv[1], sys.argv[2])"
    )
    page = tmp_path / "page.html"
    subprocess.run([sys.executable, "-c", code, str(outputs / "out"), str(page)], check=True)
    assert page.is_file()


def test_what_bitpress_did_not_write_has_no_report(outputs: Path) -> None:
    assert "was not written by bitpress" in refusal("report", outputs / "model")


def test_inspect_tells_of_the_check_too(outputs: Path) -> None:
    shown = command("inspect", outputs / "out").stdout
    kl = json.loads((outputs / "out/bitpress.json").read_text())["check"]["kl"]
    assert f"KL divergence    {kl:.6f} nats per token" in shown
