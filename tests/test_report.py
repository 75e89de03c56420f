"""The report: numbers that add up, a page that needs nothing else, and data that stays data."""

import io
import json
import re
from html.parser import HTMLParser

import pytest
from rich.console import Console

from hfbatch.errors import HfbatchError
from hfbatch.output.layout import REPORT, REPORT_PAGE
from hfbatch.output.manifest import LENGTH_EDGES, Manifest
from hfbatch.pages import charts
from hfbatch.pages.page import percent, seconds_in_words
from hfbatch.pages.report import (
    MOST_LISTED,
    MOST_POINTS,
    build_report,
    headline,
    render_files,
    render_html,
    status_of,
    summary_lines,
)
from hfbatch.spec.job import JobSpec
from hfbatch.tasks import TASKS, task_class

ENDED = 1_000_061.0
TIMING = {
    "plan": 1.0,
    "connect": 4.0,
    "workers": 9.0,
    "calibrate": 2.0,
    "working": 40.0,
    "first_part": 20.0,
    "total": 61.0,
}
EVIL = "<script>alert('1')</script> & \"$x_{$\" \x00\n日本"
HISTOGRAM = {"name": "score", "edges": [0.0, 0.5, 1.0]}


def job(**more):
    spec = JobSpec.build({"task": "embedding", "model": "org/model", "input": "in", "output": "out"})
    return {
        "spec": spec.model_dump(mode="json"),
        "fingerprint": "f00d",
        "model": {"name": "org/model", "commit": "c0ffee", "parameters": 22_713_216, "bytes": 90_868_376},
        "settled": {"batch_size": 64, "dtype": "float32", "device": "cpu"},
        "versions": {"torch": "2.11.0"},
        **more,
    }


def part(name, after=30.0, **more):
    """A split of ten rows, of which nine come through, committed some seconds after the start."""
    lengths = [0] * (len(LENGTH_EDGES) - 1)
    lengths[3] = 9
    values = {
        "rows_read": 12, "rows_in": 10, "rows_out": 9, "rows_rejected": 1, "rows_truncated": 2, "tokens": 180,
        "padded_tokens": 200, "batches": 1, "seconds": {"forward": 2.0, "read": 0.5}, "lengths": lengths,
        "reasons": {"read: NullInput": 1}, "histogram": [4, 5], "worker": "host cpu", "finished": ENDED - 61 + after,
    }  # fmt: skip
    return Manifest(name, **{**values, **more})


def report(manifests=(), run=None, histogram=HISTOGRAM, **more):
    run = {manifest.part for manifest in manifests} if run is None else run
    return build_report(job(**more), list(manifests), run, TIMING, histogram, ended=ENDED)


class Page(HTMLParser):
    """Checks that every element is closed by its own tag, and gathers elements and text."""

    VOID = frozenset({"meta", "br"})

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *attribute) for attribute in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_rows_splits_and_tokens_add_up_over_the_whole_output():
    got = build_report(
        job(),
        [part("a"), part("b"), Manifest("c", error="gone")],
        {"b"},
        TIMING,
        HISTOGRAM,
        splits_total=5,
        ended=ENDED,
    )
    rows = {"read": 24, "in": 20, "out": 18, "rejected": 2, "truncated": 4, "repeated": 0, "filtered": 4}
    assert got["rows"] == rows
    assert got["splits"] == {"total": 5, "done": 2, "failed": 1, "left": 2, "this_run": 1}
    assert (got["tokens"], got["padded_tokens"]) == (360, 400)
    assert got["padding"] == pytest.approx(0.1)
    assert got["stages"] == {"read": 1.0, "forward": 4.0}
    assert list(got["stages"]) == ["read", "forward"]
    assert got["rejects"] == {"max_fraction": 0.01, "fraction": 0.1, "reasons": {"read: NullInput": 2}}
    assert got["failed"] == [{"part": "c", "error": "gone"}]
    assert sum(got["lengths"]["counts"]) == 18
    assert got["histogram"] == {"name": "score", "edges": [0.0, 0.5, 1.0], "counts": [8, 10]}
    assert (got["devices"], got["dtype"], got["batch_size"]) == (["host cpu"], "float32", 64)
    assert got["finished"] == "1970-01-12T13:47:41+00:00"


def test_rates_are_of_this_run_with_and_without_start_up():
    got = report([part("a"), part("b"), part("earlier")], run={"a", "b"})
    assert got["seconds"]["start_up"] == pytest.approx(16.0)
    assert got["seconds"]["working"] == pytest.approx(40.0)
    assert got["rates"]["rows_per_s"] == pytest.approx(20 / 40)
    assert got["rates"]["tokens_per_s"] == pytest.approx(360 / 40)
    assert got["rates"]["rows_per_s_with_start_up"] == pytest.approx(20 / 61)


def test_the_timeline_adds_up_commits_in_their_order():
    got = report(
        [part("late", after=50.0), part("early", after=20.0), part("earlier", after=-500.0)],
        run={"late", "early"},
    )
    assert got["timeline"] == [
        {"seconds": 20.0, "rows": 10, "tokens": 180},
        {"seconds": 50.0, "rows": 20, "tokens": 360},
    ]


def test_a_commit_by_a_machine_with_a_wrong_clock_stays_inside_the_run():
    got = report([part("a", after=-9.0), part("b", after=900.0)])
    assert [point["seconds"] for point in got["timeline"]] == [0.0, 61.0]


def test_a_long_timeline_is_thinned_but_keeps_its_end():
    got = report([part(f"{k}", after=k / 100) for k in range(3 * MOST_POINTS)])
    assert len(got["timeline"]) == MOST_POINTS
    assert got["timeline"][-1]["rows"] == 30 * MOST_POINTS


def test_lost_rows_are_an_error_that_names_the_part():
    with pytest.raises(HfbatchError, match=r"part-7.*10 rows came in, but 8 went out and 1 were rejected"):
        report([part("a"), part("part-7", rows_out=8)])


def test_a_failed_split_need_not_conserve_rows():
    assert report([part("a", error="died", rows_out=0)])["rows"]["in"] == 0


def test_a_run_with_nothing_to_do_has_no_rates():
    got = build_report(job(), [part("a")], set(), {"plan": 1.0, "total": 1.2}, HISTOGRAM, ended=ENDED)
    assert set(got["rates"].values()) == {None}
    assert got["timeline"] == []
    assert got["seconds"]["working"] == 0
    assert "earlier runs did" in render_html(got)


def test_parts_without_tokens_or_counts_leave_padding_and_bins_alone():
    bare = part("b", tokens=0, padded_tokens=0, lengths=[], histogram=[])
    got = report([part("a"), bare])
    assert got["padding"] == pytest.approx(0.1)
    assert sum(got["histogram"]["counts"]) == 9
    assert report([bare])["padding"] is None


@pytest.mark.parametrize(
    ("manifests", "code", "status", "sentence"),
    [
        (
            [part("a", rows_out=10, rows_rejected=0)],
            None,
            "success",
            "Done: 10 rows predicted, none rejected",
        ),
        ([part("a")], None, "rejects", "Too many rejects: 10% of the rows, where up to 1% are allowed"),
        ([part("a"), Manifest("b", error="x")], None, "failed", "1 split failed: 1 of 2 splits committed"),
        ([part("a")], 130, "interrupted", "Interrupted: 1 of 1 split committed"),
        ([part("a")], 1, "failed", "Stopped: 1 of 1 split committed"),
        ([], None, "success", "Done: the input has no rows"),
    ],
)
def test_the_headline_says_how_the_job_ended(manifests, code, status, sentence):
    got = report(manifests) | ({} if code is None else {"exit_code": code, "message": EVIL})
    assert status_of(got) == status
    assert headline(got) == sentence
    assert sentence in "".join(Page(render_html(got)).text)


def cases():
    full = [part(f"part-{k}", after=20.0 + k) for k in range(5)]
    evil = part(EVIL, after=27.0, rows_out=0, rows_rejected=10, reasons={EVIL: 9, f"{EVIL}2": 1}, worker=EVIL)
    yield "full", report(full)
    yield "empty", report(histogram=None, settled=None)
    yield "one", report(full[:1])
    yield "failed", report([*full, *(Manifest(f"{EVIL}{k}", error=EVIL) for k in range(MOST_LISTED + 3))])
    name = {"name": EVIL, "edges": [0, 1, 2]}
    model = {"name": EVIL, "commit": EVIL, "parameters": 0, "bytes": 0}
    yield (
        "evil",
        report([*full, evil], histogram=name, model=model, versions={EVIL: EVIL})
        | {"exit_code": 3, "message": EVIL},
    )


@pytest.fixture(params=list(cases()), ids=lambda case: case[0])
def any_report(request):
    return request.param[1]


def test_the_page_is_well_formed_and_needs_nothing_else(any_report):
    html = render_html(any_report)
    page = Page(html)
    assert not {"script", "link", "img", "iframe", "object", "image"} & set(page.tags)
    assert "http" not in html
    assert "@import" not in html
    for tag, name, value in page.attributes:
        assert not name.startswith("on"), (tag, name)
        if name in ("href", "src", "xlink:href"):
            assert value.startswith("#"), (tag, name, value)
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))


def test_both_colour_schemes_and_phones_are_provided_for(any_report):
    html = render_html(any_report)
    assert "prefers-color-scheme: dark" in html
    assert ("meta", "content", "width=device-width, initial-scale=1") in Page(html).attributes
    svgs = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    assert not [svg for svg in svgs if re.search(r"#[0-9a-f]{6}\b|<svg[^>]* width=", svg)]


def test_data_comes_out_as_text_also_in_the_charts():
    _, evil = list(cases())[-1]
    html = render_html(evil)
    page = Page(html)
    assert "script" not in page.tags
    assert sum("<script>alert('1')</script>" in text for text in page.text) >= 5
    labels = re.findall(r"<text[^>]*>[^<]*script[^<]*</text>", html)
    assert labels
    assert all("&lt;script&gt;" in label for label in labels)


def test_long_lists_are_cut_and_say_so():
    _, failed = list(cases())[3]
    assert "… and 3 more in report.json" in render_html(failed)


def test_the_files_hold_the_same_report(any_report):
    got = render_files(any_report)
    assert set(got) == {REPORT, REPORT_PAGE}
    assert json.loads(got[REPORT]) == any_report
    assert got[REPORT_PAGE].decode() == render_html(json.loads(got[REPORT]))


def test_a_file_name_that_is_not_utf8_does_not_stop_the_report():
    got = report([part("a", reasons={"bad \udcff": 1}), Manifest("b", error="data/\udcff.parquet")])
    assert b"report" in render_files(got)[REPORT_PAGE]


def test_the_terminal_table_shows_data_as_it_is(any_report):
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(summary_lines(any_report))
    text = console.export_text()
    assert f"{any_report['rows']['out']:,} out of {any_report['rows']['in']:,}" in text
    assert "start-up" in text


def test_the_same_numbers_draw_the_same_bytes():
    draw = [charts.bars("x", {"a": 1.0, "b": 2.0}, ["1", "2"], "t") for _ in range(2)]
    assert draw[0] == draw[1]


def test_charts_of_nothing_are_empty():
    assert charts.throughput([], 3.0, None) == ""
    assert charts.throughput([{"seconds": 2.0, "rows": 0, "tokens": 0}], 1.0, 0.0) == ""
    assert charts.throughput([{"seconds": 1.0, "rows": 5, "tokens": 0}], 1.0, 5.0) == ""
    assert charts.histogram("h", [0, 1, 2], [0, 0], "x") == ""
    assert charts.histogram("h", [], [], "x") == ""
    assert charts.bars("b", {}, [], "t") == ""
    assert charts.share("s", [("a", 0), ("b", 0)], "t") == ""


def test_a_bar_of_zero_seconds_can_be_drawn():
    svg = charts.bars("b", {"read": 0.0}, ["0 s"], "t")
    assert ">0 s<" in svg
    assert "nan" not in svg.lower()
    Page(svg)


def test_a_lone_bin_is_shown_among_its_neighbours():
    svg = charts.histogram("h", list(range(31)), [0] * 15 + [7] + [0] * 14, "x")
    assert charts.LEAST_BINS <= svg.count("var(--accent)") < 30


def test_words_for_numbers():
    assert [percent(share) for share in (None, 0, 0.0001, 0.0416, 0.05, 0.99996, 1)] == [
        "–", "0%", "< 0.1%", "4.2%", "5%", "99.9%", "100%",
    ]  # fmt: skip
    assert [seconds_in_words(s) for s in (None, 0.424, 12.34, 59.97, 185, 8_040)] == [
        "–", "0.42 s", "12.3 s", "1 min 0 s", "3 min 5 s", "2 h 14 min",
    ]  # fmt: skip


@pytest.mark.parametrize("name", TASKS)
def test_the_histogram_of_every_task_is_drawn(name):
    found = task_class(name).histogram
    svg = charts.histogram("histogram", found.edges, [1] * (len(found.edges) - 1), found.name)
    assert svg.startswith("<svg")
    assert found.name in svg
