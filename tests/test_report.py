import base64
import html
import io
import json
import re
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from sklearn.metrics import roc_auc_score, roc_curve

from diffense.charts import BINS, MARGIN_LEFT, PLOT_RIGHT, draw_histogram, draw_roc, measure_auroc, trace_roc
from diffense.demo.account import write_summary
from diffense.report import GALLERY, AttackReport, Figures, Judged, Meta, collect_galleries, encode_png, write_report

HOSTILE = "\"><script>alert('x')</script><img src=http://evil.example/a.png onerror=alert(1)>{{ 7*7 }}\udcff"
FIGURES = Figures(
    dataset="digits",
    attack="BadNets",
    clean_accuracy_before=0.98765,
    clean_accuracy_after=0.98765,
    asr_before=0.97531,
    asr_after=0.01234,
    alpha=0.0125,
    fpr=0.0211,
    auroc=0.99871,
    p50_ms_unguarded=1.234,
    p50_ms_guarded=5.678,
    placement="separate",
    loop="bls",
    server_version="2.51.0",
)
SCORES = st.integers(2, 40).flatmap(lambda n: arrays(np.float32, n, elements=st.sampled_from([0.5, 1.0, 1.5, 2.0, 8.0, 90.0])))


def judge(rng: np.random.Generator, count: int, shift: float, threshold: float, label: int | None) -> Judged:
    scores = rng.gamma(3, 1, count).astype(np.float32) + np.float32(shift)
    truth = rng.integers(1, 10, count)
    return Judged(
        images=rng.integers(0, 256, (count, 28, 28, 1), dtype=np.uint8),
        names=[f"{HOSTILE} {index}" for index in range(count)],
        truth=truth,
        labels=truth if label is None else np.full(count, label),
        scores=scores,
        p_values=np.linspace(0.01, 1, count, dtype=np.float32),
        flagged=(scores > threshold).astype(np.uint8),
    )


@pytest.fixture
def section() -> AttackReport:
    rng = np.random.default_rng(0)
    clean, triggered = judge(rng, 90, 0, 7.0, None), judge(rng, 60, 5, 7.0, 0)
    return AttackReport(
        figures=FIGURES,
        settings=[("attack", HOSTILE)],
        target_label=0,
        threshold=7.0,
        clean=clean,
        triggered=triggered,
        originals=triggered.images,
        explain=lambda image: HOSTILE,
    )


class Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))


def render(path: Path, *sections: AttackReport, title: str = "Report") -> str:
    write_report(path / "report.html", sections, Meta(title, "What was done.", [("where", HOSTILE)]))
    return (path / "report.html").read_text(encoding="utf-8")


def test_report_loads_nothing_and_runs_nothing(tmp_path: Path, section: AttackReport) -> None:
    tags = Tags(render(tmp_path, section, section)).seen
    kinds = {tag for tag, _ in tags}
    assert not kinds & {"script", "link", "iframe", "object", "embed", "base", "form", "foreignobject"}
    for tag, attributes in tags:
        assert not [name for name in attributes if name.startswith("on")]
        for name in {"src", "href", "srcset", "data", "action", "style", "background"} & set(attributes):
            assert (tag, name) == ("img", "src")
            assert (attributes[name] or "").startswith("data:image/png;base64,")
    style = re.search(r"<style>(.*?)</style>", (tmp_path / "report.html").read_text(encoding="utf-8"), re.DOTALL)
    assert style is not None
    assert "url(" not in style[1]
    assert "@import" not in style[1]


def test_hostile_names_stay_text(tmp_path: Path, section: AttackReport) -> None:
    text = render(tmp_path, section, title=HOSTILE)
    assert "<script" not in text
    assert "onerror=alert(1)>" not in text
    assert "7*7" in text
    assert text.count(html.escape(HOSTILE[:20])) == 0 or "&lt;script&gt;" in text
    assert text.count("&lt;script&gt;alert(") >= 3 * GALLERY


def test_numbers_of_the_table_are_those_given(tmp_path: Path, section: AttackReport) -> None:
    other = replace(section, figures=replace(FIGURES, attack="WaNet", asr_before=1.0, fpr=0.0, p50_ms_guarded=77.125))
    text = render(tmp_path, section, other)
    body = re.search(r"<tbody>(.*?)</tbody>", text, re.DOTALL)
    assert body is not None
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in body[1].split("<tr>")[1:]]
    first = ["BadNets", "98.77 %", "98.77 %", "97.53 %", "1.23 %", "2.11 %", "1.25 %", "0.9987", "1.23 ms", "5.68 ms"]
    second = ["WaNet", "98.77 %", "98.77 %", "100.00 %", "1.23 %", "0.00 %", "1.25 %", "0.9987", "1.23 ms", "77.12 ms"]
    assert rows == [first, second]


def test_ids_are_unique_and_every_picture_has_words(tmp_path: Path, section: AttackReport) -> None:
    tags = Tags(render(tmp_path, section, section)).seen
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids)) >= 8
    assert all(attributes.get("aria-labelledby") in ids for tag, attributes in tags if tag == "section")
    assert all(attributes.get("alt") for tag, attributes in tags if tag == "img")
    assert all(attributes.get("aria-label") for tag, attributes in tags if tag == "svg")


def test_report_of_nothing_found_and_of_everything_missed(tmp_path: Path, section: AttackReport) -> None:
    blind = replace(
        section,
        clean=replace(section.clean, flagged=np.zeros(90, np.uint8)),
        triggered=replace(section.triggered, flagged=np.zeros(60, np.uint8)),
    )
    caught, alarms, misses = collect_galleries(blind)
    assert (caught.count, alarms.count, misses.count, misses.of) == (0, 0, 60, 60)
    assert len(misses.exhibits) == GALLERY
    assert render(tmp_path, blind).count('<p class="none">None.</p>') == 2


def test_unscored_images_are_told_and_are_no_hits(tmp_path: Path, section: AttackReport) -> None:
    flagged = section.triggered.flagged.copy()
    flagged[:3] = 2
    unsure = replace(section, triggered=replace(section.triggered, flagged=flagged))
    assert "3 images could not be scored" in render(tmp_path, unsure)
    assert collect_galleries(unsure)[0].count == int((flagged == 1).sum())


def test_pictures_are_lossless(section: AttackReport) -> None:
    rng = np.random.default_rng(1)
    for image in (section.clean.images[0], rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)):
        uri = encode_png(image)
        decoded = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))))
        assert np.array_equal(decoded.reshape(image.shape), image)


def test_no_partial_file_is_left(tmp_path: Path, section: AttackReport) -> None:
    render(tmp_path, section)
    write_summary(tmp_path / "summary.json", [FIGURES])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["report.html", "summary.json"]
    assert json.loads((tmp_path / "summary.json").read_text()) == [asdict(FIGURES)]


@given(clean=SCORES, triggered=SCORES)
@settings(deadline=None)
def test_roc_and_auroc_agree_with_sklearn(clean: np.ndarray, triggered: np.ndarray) -> None:
    truth = np.repeat([0, 1], [len(clean), len(triggered)])
    scores = np.concatenate((clean, triggered))
    assert measure_auroc(clean, triggered) == pytest.approx(roc_auc_score(truth, scores), abs=1e-12)
    false, true, _ = roc_curve(truth, scores, drop_intermediate=False)
    np.testing.assert_allclose(trace_roc(clean, triggered), (false, true), atol=1e-12)


@given(clean=SCORES, triggered=SCORES, threshold=st.floats(0.1, 200))
@settings(deadline=None)
def test_histogram_shows_every_score_on_its_side_of_the_threshold(
    clean: np.ndarray, triggered: np.ndarray, threshold: float
) -> None:
    chart = draw_histogram(clean, triggered, threshold)
    assert len(chart.rows) == 2
    for row, scores in zip(chart.rows, (clean, triggered), strict=True):
        assert 1 <= len(row.bars) <= min(BINS, len(np.unique(scores)))
        top_share = float(row.top_text.rstrip("%")) / 100
        shares = [bar.height / (row.base - row.top) * top_share for bar in row.bars]
        assert sum(shares) == pytest.approx(1, rel=0.02)
        for bar in row.bars:
            assert MARGIN_LEFT - 1e-6 <= bar.x <= bar.x + bar.width <= PLOT_RIGHT + 1e-6
    assert MARGIN_LEFT - 1e-6 <= chart.threshold.at <= PLOT_RIGHT + 1e-6
    assert all(MARGIN_LEFT - 1e-6 <= tick.at <= PLOT_RIGHT + 1e-6 for tick in chart.ticks)


def test_wide_scores_get_a_logarithmic_axis() -> None:
    narrow, wide = np.array([1.0, 2.0, 3.0]), np.array([1.0, 30.0, 300.0])
    assert not draw_histogram(narrow, narrow, 2.5).logarithmic
    assert draw_histogram(narrow, wide, 2.5).logarithmic
    assert not draw_histogram(narrow - 1, wide, 2.5).logarithmic


def test_roc_point_lies_on_the_curve(section: AttackReport) -> None:
    clean, triggered = section.clean, section.triggered
    rates = float(clean.is_flagged.mean()), float(triggered.is_flagged.mean())
    chart = draw_roc(clean.scores, triggered.scores, rates)
    corners = [tuple(map(float, pair.split())) for pair in chart.path[1:].split("L")]
    assert min(abs(x - chart.point[0]) + abs(y - chart.point[1]) for x, y in corners) < 0.11
