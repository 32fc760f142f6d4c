"""What guards the pictures but does not teach: empty and broken input, crowds, sizes, a report that asks nobody for anything."""
import json
import os
import re
from html.parser import HTMLParser

import numpy as np
import plotly.graph_objects as go
import pytest
import torch
from plotly.offline import get_plotlyjs

from actloc.core.records import Detections, Recording
from actloc.core.segments import FeatureGrid
from actloc.data.synthetic import synthetic, synthetic_classes
from actloc.views.curves import class_ap_bars, loss_curves, outstanding, precision_recall_curves, read_log, running_mean
from actloc.views.report import page, write_report
from actloc.views.timeline import timeline

CLOCK = FeatureGrid(fps=25, stride=4, num_frames=16)
EMPTY = Detections(np.zeros((0, 2)), np.zeros(0, int), np.zeros(0))


def recording(segments=(), labels=(), duration_s=60., name="r"):
    return Recording(name, np.zeros((2, 9), np.float32), CLOCK, duration_s, list(segments), list(labels))


def crowd(count, classes=5, duration_s=59., seed=0):
    rng = np.random.default_rng(seed)
    start = rng.uniform(0, duration_s - 1, count)
    return Detections(np.stack([start, start + rng.uniform(.2, 1, count)], 1), rng.integers(classes, size=count), rng.random(count))


def bars_of(figure):
    return sum(len(trace.x) for trace in figure.data)


def strict(figure):
    "The figure's JSON, refused by the browser's parser if it held NaN or Infinity."
    return json.loads(figure.to_json(), parse_constant=lambda name: pytest.fail(f"{name} in the figure"))


# timeline

def test_timeline_of_nothing():
    for detections in (None, EMPTY):
        for classes in (None, (), ("a",)):
            figure = timeline(recording(), detections, classes)
            assert bars_of(figure) == 0 and figure.layout.annotations[0].text == "no segment to draw"


def test_timeline_of_one_class():
    figure = timeline(recording([[1, 2]], [0]), Detections(np.array([[1., 2.]]), np.array([0]), np.array([1.])), ("only",))
    assert bars_of(figure) == 2 and figure.layout.yaxis.ticktext == ("only",)
    assert figure.data[1].customdata[0].endswith("truth 1.00")


def test_timeline_draws_truth_and_detections_of_every_class():
    truth = recording([[1, 2], [3, 5], [6, 7]], [0, 2, 4])
    figure = timeline(truth, crowd(50, classes=6), tuple("abcdef"), threshold=0)
    assert bars_of(figure) == 53 and figure.layout.yaxis.ticktext == tuple("abcdef")
    for trace in figure.data:                                        # truth above, detections below the middle of the row
        row = round(trace.y[0])
        assert (trace.y[0] < row) == ("annotated" in trace.hovertemplate)
        assert all(0 < opacity <= 1 for opacity in trace.marker.opacity)


def test_timeline_leaves_out_what_has_no_score_and_says_so():
    found = crowd(6)
    found.scores[:] = [np.nan, np.inf, -np.inf, .9, .8, .01]
    found.segments[3] = [np.nan, 3]
    found.segments[4] = [5, 5]
    figure = timeline(recording(), found)
    assert bars_of(figure) == 0
    assert "without a finite score or a length: 5 left out" in figure.layout.title.text
    assert "under score 0.1: 1 not shown" in figure.layout.title.text
    strict(figure)


def test_timeline_thins_a_crowd():
    starts = np.linspace(0, 7000, 10_000)
    truth = recording(np.stack([starts, starts + np.linspace(.1, .6, 10_000)], 1), np.arange(10_000) % 7, 7200.)
    figure = timeline(truth, crowd(10_000, 7, 7200.))
    assert bars_of(figure) == 600 and len(figure.to_json()) < 100_000
    assert "annotated segments: 300 of 10,000 shown, the longest" in figure.layout.title.text
    assert re.search(r"detections: 300 of [\d,]+ shown, the highest scores", figure.layout.title.text)
    assert bars_of(timeline(truth, crowd(10_000, 7, 7200.), max_shown=1)) == 2


def test_timeline_with_many_classes_keeps_the_annotated_ones():
    figure = timeline(recording([[1, 2]], [150]), crowd(3000, classes=200), max_rows=10)
    assert len(figure.layout.yaxis.ticktext) == 10 and "class 150" in figure.layout.yaxis.ticktext
    assert "10 of " in figure.layout.title.text


def test_timeline_leaves_its_input_alone_and_takes_tensors():
    found = crowd(40)
    copies = [x.copy() for x in (found.segments, found.labels, found.scores)]
    expected = timeline(recording([[1, 2]], [0]), found).to_json()
    for before, after in zip(copies, (found.segments, found.labels, found.scores)):
        assert (before == after).all()
    tensors = Detections(*(torch.tensor(x).requires_grad_(x.dtype.kind == "f") for x in copies))
    assert timeline(recording([[1, 2]], [0]), tensors).to_json() == expected
    halves = Detections(*(torch.tensor(x).half() if x.dtype.kind == "f" else torch.tensor(x) for x in copies))
    drawn = timeline(recording(), halves, threshold=0)
    assert bars_of(drawn) == 40
    assert all(start == round(start, 2) for trace in drawn.data for start in trace.base)      # no digits beyond the pixel


def test_timeline_opacity_stays_an_opacity():
    found = Detections(np.array([[1., 2.], [3., 4.], [5., 6.]]), np.zeros(3, int), np.array([-1., .5, 1.5]))
    assert timeline(recording(), found, threshold=-9).data[0].marker.opacity == (.08, .5, 1)


@pytest.mark.parametrize("labels, classes", [([5], ("a", "b")), ([-1], ("a",)), ([-1], None), ([0], ())])
def test_timeline_refuses_labels_without_a_name(labels, classes):
    with pytest.raises(ValueError, match=f"label {labels[0]} came"):
        timeline(recording([[1, 2]], labels), None, classes)
    with pytest.raises(ValueError, match=f"label {labels[0]} came"):
        timeline(recording(), Detections(np.array([[1., 2.]]), np.array(labels), np.array([.9])), classes)


def test_ordinary_timelines_are_small():
    for r in synthetic(8):
        figure = timeline(r, crowd(200, 6, r.duration_s), synthetic_classes())
        assert len(figure.to_json()) < 100_000
        strict(figure)


# curves

@pytest.mark.parametrize("log", [{}, {"total": []}, {"iteration": [1], "learning_rate": [.1]}, {"iteration": [], "learning_rate": [], "total": []}])
def test_loss_curves_of_nothing(log):
    assert loss_curves(log).layout.annotations[0].text == "nothing to draw"


@pytest.mark.parametrize("count", [1, 2, 49, 301, 20_000])
def test_loss_curves_of_any_length(count):
    log = dict(iteration=np.arange(count), learning_rate=np.full(count, 1e-3), total=np.linspace(3, 1, count), other=np.linspace(-1, 1, count))
    figure = loss_curves(log)
    strict(figure)
    assert len(figure.to_json()) < 60_000 and all(1 <= len(trace.x) <= 300 for trace in figure.data)
    total = figure.data[1]
    assert total.x[0] == 0 and total.x[-1] == pytest.approx(count - 1, rel=1e-4)
    assert figure.layout.yaxis.type != "log"                         # a negative loss has no logarithm


def test_loss_curves_with_values_that_are_not_finite():
    total = np.ones(500)
    total[100:200], total[300] = np.nan, np.inf
    figure = loss_curves(dict(total=total))
    strict(figure)
    assert "not finite: 101" in figure.layout.title.text
    strict(loss_curves(dict(total=np.full(10, np.nan))))


def test_a_running_mean_is_the_mean_of_its_window():
    values = np.random.default_rng(0).normal(size=57)
    values[[3, 4, 5, 20]] = np.nan
    for window in (1, 3, 9, 101):
        expected = [np.nanmean(values[max(0, i - window // 2):i + window // 2 + 1]) if
                    np.isfinite(values[max(0, i - window // 2):i + window // 2 + 1]).any() else np.nan for i in range(57)]
        np.testing.assert_allclose(running_mean(values, window), expected, rtol=1e-12, atol=1e-12)


def test_thinning_keeps_order_and_spikes():
    values = np.random.default_rng(0).normal(size=5000)
    values[1234] = 99
    kept = outstanding(values, np.zeros(5000), 100)
    assert len(kept) == 100 and (np.diff(kept) > 0).all() and 1234 in kept


def test_a_log_that_is_still_being_written(tmp_path):
    path = tmp_path / "log.csv"
    whole = "iteration,learning_rate,total,validation\n1,0.1,2.5,\n2,0.1,2.25,0.5\n"
    for torn in ("", "3", "3,0.1,2.", "3,0.1,2.125,0.2"):            # the last one lacks only its end of line
        path.write_text(whole + torn)
        log = read_log(path)
        assert list(log["total"]) == [2.5, 2.25] and np.isnan(log["validation"][0])
        strict(loss_curves(str(path)))
    path.write_text("iteration,learning_rate,total\n")
    assert loss_curves(path).layout.annotations[0].text == "nothing to draw"
    path.write_text("iteration,learning_rate")
    with pytest.raises(ValueError, match="no header"):
        loss_curves(path)


def test_precision_recall_of_nothing_and_of_many():
    for curves in ([], [("a", [], [], np.nan)]):
        assert precision_recall_curves(curves, .5).layout.annotations[0].text == "nothing to draw"
    many = [(f"class {i}", np.linspace(1, .1, 5000), np.linspace(0, 1, 5000), i / 200) for i in range(200)]
    figure = precision_recall_curves(many, .5)
    strict(figure)
    assert len(figure.data) == 20 and "20 of 200 classes shown" in figure.layout.title.text and len(figure.to_json()) < 100_000
    assert figure.data[0].name.startswith("class 199") and figure.data[-1].name.startswith("class 0 ")
    assert figure.data[0].x[-1] == 1 and figure.data[0].y[-1] == pytest.approx(.1)


def test_the_colour_of_a_class_is_the_same_in_every_figure():
    classes = ("worst", "best")
    bars = class_ap_bars(classes, [[.1, .9]], .5).data[0]
    curves = precision_recall_curves([(c, [1.], [1.], ap) for c, ap in zip(classes, (.1, .9))], .5).data
    rows = timeline(recording([[1, 2], [3, 4]], [0, 1]), None, classes).data
    assert [c.line.color for c in curves] == list(bars.marker.color) == [rows[1].marker.color, rows[0].marker.color]


def test_class_bars_of_nothing_one_and_many():
    assert class_ap_bars((), np.zeros((3, 0)), (.3, .5, .7)).layout.annotations[0].text == "nothing to draw"
    one = class_ap_bars(("only",), [.5], .5)
    assert one.data[0].x == (.5,) and one.data[0].error_x.visible is False
    figure = class_ap_bars(tuple(f"class {i}" for i in range(200)), np.random.default_rng(0).random((5, 200)), (.3, .4, .5, .6, .7))
    strict(figure)
    assert len(figure.data[0].x) == 40 and "40 of 200" in figure.layout.title.text and len(figure.to_json()) < 60_000
    assert (np.diff(figure.data[0].x) <= 0).all()


# report

class Sources(HTMLParser):
    "Every attribute of the page that makes a browser fetch something."
    def __init__(self, text):
        super().__init__()
        self.found, self.tags, self.names, self.text = [], [], set(), ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.names |= {name for name, _ in attributes}
        self.found += [(tag, name, value) for name, value in attributes
                       if name in ("src", "srcset", "data", "action", "poster", "background") or (name == "href" and tag != "a")
                       or (name == "href" and not value.startswith("#"))]

    def handle_data(self, data):
        self.text += data


FIGURE = go.Figure(go.Scatter(y=[1, 2])).update_layout(title="A & B <b>bold</b><br><sup>more</sup>")


def test_a_report_fetches_nothing(tmp_path):
    text = write_report(tmp_path / "a.html", "T", [("F", "", FIGURE), ("G", "", FIGURE), ("H", "", [["a"], [1]])]).read_text()
    parsed = Sources(text)
    assert parsed.found == [] and not {"link", "img", "iframe", "object", "embed", "base"} & set(parsed.tags)
    assert "default-src 'none'" in text and text.count(get_plotlyjs()[:500]) == 1
    own = text.replace(get_plotlyjs(), "")
    assert not re.search(r"@import|url\(|//cdn", own)
    assert own.count('role="img" aria-label="Figure') == own.count("<figcaption>") == 2


def test_outside_text_stays_text(tmp_path):
    evil = '"onload="x()">' "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
    figure = go.Figure(go.Scatter(y=[1], name=evil)).update_layout(title=evil)
    parsed = Sources(page(evil, [(evil, evil, figure), (evil, evil, [[evil], [evil]]), ("x", evil, None)]))
    assert "img" not in parsed.tags and parsed.found == [] and "onload" not in parsed.names
    assert parsed.text.count("alert(1)") >= 7
    clean = Sources(page("t", [("h", "x", go.Figure(go.Scatter(y=[1]))), ("h", "x", [["h"], ["x"]]), ("x", "x", None)]))
    assert parsed.tags.count("script") == clean.tags.count("script")


def test_any_language_and_broken_file_names(tmp_path):
    text = write_report(tmp_path / "ä" / "ü.html", "走る \udcff", [("π", "ß\n\n\né", None)]).read_text(encoding="utf-8")
    assert "走る ?" in text and "<p>ß</p>\n<p>é</p>" in text


def test_a_report_without_sections(tmp_path):
    text = write_report(tmp_path / "deep" / "er" / "a.html", "Nothing", []).read_text()
    assert "<h1>Nothing</h1>" in text and len(text) < 5_000


def test_a_refused_or_failed_report_leaves_the_old_one(tmp_path, monkeypatch):
    path = write_report(tmp_path / "a.html", "Old", [])
    for wrong in ([("a", "b")], ["abc"], [("a", "b", 1)], [("a", "b", {})], [("a", "b", [])], [("a", "b", [[]])], [("a", "b", [["x"], []])], [(1, "b", None)]):
        with pytest.raises(ValueError, match="report: "):
            write_report(path, "New", wrong)
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_report(path, "New", [])
    assert "Old" in path.read_text() and [p.name for p in tmp_path.iterdir()] == ["a.html"]


def test_the_same_run_writes_the_same_page():
    sections = [("F", "x", FIGURE), ("T", "", [["a", "b"], [1, np.float32(.5)], [None, np.nan]])]
    assert page("t", sections) == page("t", sections)


def test_table_cells():
    text = page("t", [("h", "", [["a", "b"], [np.int64(7), np.float64(.123456)], [True, 1e-7], [float("inf"), "-"]])])
    assert page("t", [("h", "", [["a"], [None], [np.nan]])]).count(">–<") == 2
    for cell in (">7<", ">0.1235<", ">True<", ">1e-07<", ">inf<", ">-<"):
        assert cell in text, cell
