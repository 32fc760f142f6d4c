"""Whatever views and widgets are fed: a message, a thinned figure or a ValueError with words; never a dead cell."""
import json
import traceback
import warnings
from types import SimpleNamespace

import numpy as np
import plotly.graph_objects as go
import pytest
import torch

from actloc.core.records import Detections, Recording
from actloc.core.segments import FeatureGrid
from actloc.views.attention import attention, memory_attention
from actloc.views.boxes import Shot, draw, frame_slider, strip
from actloc.views.browse import browse, compare, feature_picture
from actloc.views.curves import class_ap_bars, loss_curves, precision_recall_curves
from actloc.views.doctor import duration_histogram, label_bars, length_histogram, level_bars
from actloc.views.errors import error_gains, error_profile, operating_curve, reliability, sensitivity_bars
from actloc.views.exercises import check
from actloc.views.lessons import falling_scores, grid_figure, operating_point, points_figure, sight_figure
from actloc.views.outputs import Overlay, boxed, clock, cues, lanes, rows_of, subtitles, text_table, video_page
from actloc.views.runs import class_differences, metric_against
from actloc.views.timeline import timeline
from actloc.views.widgets import choice, drawn, slider, span, touch

nan, inf, CLOCK, FRAME, MANY = np.nan, np.inf, FeatureGrid(25, 4, 16), np.zeros((36, 64, 3), np.uint8), 10_000
EVIL, LONG = "<b>evil</b> & <i>%{x}</i>", "n" * 5000
RNG = np.random.default_rng(0)
CLASSES = tuple("abcde")


def recording(segments=(), labels=(), duration_s=60., name="r", features=np.zeros((2, 9), np.float32)): return Recording(name, features, CLOCK, duration_s, list(segments), list(labels))


def unchecked(segments=np.zeros((0, 2)), labels=(), duration_s=9., **more): return SimpleNamespace(id="unchecked", segments_s=segments, labels=np.array(labels, int), duration_s=duration_s, **more)


def detections(segments, labels, scores): return Detections(np.array(segments), np.array(labels), np.array(scores))


def crowd(count=MANY, classes=5, duration_s=59.):
    start = RNG.uniform(0, duration_s - 1, count)
    return Detections(np.stack([start, start + RNG.uniform(.2, 1, count)], 1), RNG.integers(classes, size=count), RNG.random(count))


def boxes(count): return np.c_[corner := RNG.uniform(0, .7, (count, 2)), corner + .2]


def noisy(count): return [Shot(RNG.integers(0, 256, (200, 300, 3), np.uint8), boxes(3), title=f"s{i}") for i in range(count)]


FOUND = dict(empty=Detections(np.zeros((0, 2)), np.zeros(0, int), np.zeros(0)), lists=Detections([], [], []), tensors=Detections(torch.ones(1, 2) * torch.tensor([1., 2]), torch.zeros(1), torch.ones(1, requires_grad=True)),
             nan_segments=detections([[nan, 1.], [2, 3]], [0, 0], [.5, .6]), infinite=detections([[1, inf], [-inf, 3.]], [0, 0], [.5, .6]), nan_scores=detections([[1., 2]], [0], [nan]), infinite_scores=detections([[1., 2], [3, 4]], [0, 0], [inf, -inf]),
             outside=detections([[-5., -1], [100, 200]], [0, 0], [.5, .6]), reversed=detections([[2., 1]], [0], [.5]), no_length=detections([[2., 2]], [0], [.5]), label_too_large=detections([[1., 2]], [99], [.5]), label_below_0=detections([[1., 2]], [-1], [.5]),
             label_nan=detections([[1., 2]], [nan], [.5]), label_half=detections([[1., 2]], [.5], [.5]), label_word=detections([[1., 2]], ["run"], [.5]), three_ends=detections([[1., 2, 3]], [0], [.5]), flat=detections([1., 2], [0, 0], [.5, .6]),
             columns=detections([[1., 2]], [[0]], [[.5]]), words=detections([["a", "b"]], [0], [.5]), complex=detections([[1., 2]], [0], [.5 + 1j]), no_detections="detections", one=detections([[1., 2]], [0], [.5]), ten_thousand=crowd())
NAMES = dict(markup=EVIL, long=LONG, unicode="走る\udcff ß", nothing=None, number=3, empty="")

CASES = {}
for key, found in FOUND.items():
    CASES |= {f"{view}, detections {key}": make for view, make in dict(
        timeline=lambda d=found: timeline(recording([[1, 2]], [0]), d, CLASSES), timeline_unnamed=lambda d=found: timeline(recording(), d), compare=lambda d=found: compare(recording([[1, 2]], [0]), [d], CLASSES, live=False),
        lanes=lambda d=found: lanes(d, CLASSES, 60.), text_table=lambda d=found: text_table(d, CLASSES), subtitles=lambda d=found: subtitles(d, CLASSES), rows_of=lambda d=found: rows_of("r", d, CLASSES), cues=lambda d=found: cues(d),
        video_page=lambda d=found: video_page("r", "v.mp4", d, CLASSES, 60.), overlay=lambda d=found: Overlay(d, CLASSES, 60., 90, 160).draw(np.zeros((90, 160, 3), np.uint8), 1.5)).items()}
for key, name in NAMES.items():
    shot = lambda n=name: Shot(FRAME, [[.1, .1, .5, .5]], [[.5]], title=n)
    CASES |= {f"{view}, name {key}": make for view, make in dict(
        timeline=lambda n=name: timeline(recording([[1, 2]], [0], name=n), FOUND["one"], (n,)), lanes=lambda n=name: lanes(FOUND["one"], (n,), 60.), browse=lambda n=name: browse([recording([[1, 2]], [0], name=n)] * 2, (n,), live=False),
        precision_recall=lambda n=name: precision_recall_curves([(n, [1.], [1.], .5)], .5), class_bars=lambda n=name: class_ap_bars((n,), [[.5]], (.5,)), differences=lambda n=name: class_differences([n], [.5], [.6], (n, n), (nan, nan)),
        labels=lambda n=name: label_bars(((n, (3, 4)),), (n, "b")), metric=lambda n=name: metric_against([1, 2], [.5, .6], [n, "b"], [n, n], n, n), sensitivity=lambda n=name: sensitivity_bars(n, n, [0, 1], [1], [.5], [.5], .5),
        losses=lambda n=name: loss_curves({n: [1, 2.]}, title=n), gains=lambda n=name: error_gains([n], [1], [.1], .5), profile=lambda n=name: error_profile([n], [[1]]), points=lambda n=name: points_figure([1.], [0], [0], [[0, 1]], n),
        draw=lambda n=name, s=shot: draw(s(), (n,)), slider=lambda n=name, s=shot: frame_slider([s()] * 2, (n,), title=n), strip=lambda n=name, s=shot: strip([s()] * 2, (n,), title=n), attention=lambda n=name, s=shot: attention(s(), np.ones((1, 1, 2, 2)), 0, (n,)),
        memory=lambda s=shot: memory_attention(s(), np.ones((1, 1, 2, 2)), 0, [1], [0], 1), video_page=lambda n=name: video_page(n, n, FOUND["one"], (n,), 60.)).items()}
CASES |= {f"timeline, {key}": lambda r=r: timeline(r, FOUND["one"]) for key, r in dict(
    no_duration=unchecked(duration_s=0.), nan_duration=unchecked(duration_s=nan), reversed=unchecked(np.array([[3., 1]]), [0]), nan=unchecked(np.array([[nan, 1]]), [0]), lists=unchecked([[1, 2]], [0]), nothing=None, word="film").items()}
CASES |= {f"browse, {key}": lambda r=r: browse(r, live=False) for key, r in dict(
    none=[], one=recording(), no_features=recording(features=np.zeros((2, 0))), nan_features=recording(features=np.full((2, 9), nan)), infinite=recording(features=np.full((2, 9), inf)), flat=recording(features=np.zeros(9)), words=recording(features=np.array([["a"]])),
    large=recording(features=np.zeros((600, 20_000), np.float32)), lost=recording(features=lambda: 1 / 0), no_duration=unchecked(duration_s=0.), nan_duration=unchecked(duration_s=nan), nan=unchecked(np.array([[nan, 1]]), [0]), many=[recording([[1, 2]], [0])] * MANY,
    many_segments=recording(crowd().segments, RNG.integers(200, size=MANY)), number=3, words_in_list=["film"]).items()}
CASES |= {
    "timeline, many of both": lambda: timeline(recording(crowd().segments, RNG.integers(200, size=MANY)), crowd(classes=200)), "timeline, threshold a word": lambda: timeline(recording(), crowd(5), threshold="x"), "timeline, threshold nan": lambda: timeline(recording(), crowd(5), threshold=nan),
    "compare, none": lambda: compare([], [], live=False), "compare, 200 recordings": lambda: compare([recording([[1, 2]], [0])] * 200, [crowd(50)] * 200, live=False), "compare, too few": lambda: compare([recording()] * 2, [crowd(5)], live=False),
    "lanes, no duration": lambda: lanes(crowd(5), CLASSES, 0.), "lanes, duration nan": lambda: lanes(crowd(5), CLASSES, nan), "overlay, no duration": lambda: Overlay(crowd(5), CLASSES, 0., 90, 160), "overlay, one pixel": lambda: Overlay(crowd(5), CLASSES, 9., 5, 1).draw(np.zeros((5, 1, 3), np.uint8), 3.),
    "overlay, second nan": lambda: Overlay(crowd(5), CLASSES, 9., 90, 160).draw(np.zeros((90, 160, 3), np.uint8), nan), "clock": lambda: [clock(t) for t in (nan, inf, -3.2, 1e9)], "boxed, nan": lambda: boxed(np.zeros((90, 160, 3), np.uint8), [[nan, 0, 1, 1], [.9, .9, .1, .1]], ["a", "走る" * 99]), "boxed, none": lambda: boxed(FRAME, [], []),
    "points, none": lambda: points_figure([], [], [], []), "points, many": lambda: points_figure(np.arange(2. * MANY), np.arange(2 * MANY) % 6, np.arange(2 * MANY) % MANY, np.sort(RNG.random((MANY, 2)) * 100, 1)), "points, one action": lambda: points_figure(np.arange(2. * MANY), np.zeros(2 * MANY), np.zeros(2 * MANY), [[1, 2]]),
    "points, nan": lambda: points_figure([nan] * 5, [0] * 5, [nan] * 5, [[nan, 1]]), "points, level nan": lambda: points_figure([0.], [nan], [0], [[0, 1]]), "points, level": lambda: points_figure([1.], [100_000], [0], []), "points, lengths": lambda: points_figure([1., 2], [0], [0], []), "points, three ends": lambda: points_figure([1.], [0], [0], [[1, 2, 3]]),
    "falling, none": lambda: falling_scores([], [[]], [], []), "falling, lists": lambda: falling_scores([[1, 2], [1, 3]], [[.5, .4], [0, .1], [0, 0]], [0, 1], []), "falling, nan": lambda: falling_scores([[nan, 2], [1, 2]], [[nan, .5]], [], [[nan, 1]]), "falling, infinite": lambda: falling_scores([[-inf, inf]], [[inf]], [], [[-inf, inf]]),
    "falling, many": lambda: falling_scores(crowd().segments, [crowd().scores] * 2001, list(range(2000)), crowd().segments), "falling, pick outside": lambda: falling_scores([[1, 2]], [[.5], [.1]], [7], []), "falling, lengths": lambda: falling_scores([[1, 2]], [[.5, .4]], [], []), "falling, no state": lambda: falling_scores([[1, 2]], [], [], []),
    "threshold, none": lambda: operating_point([], [], [], .5, [], [], [], []), "threshold, many": lambda: operating_point(np.ones(MANY), np.linspace(0, 1, MANY), np.linspace(1, 0, MANY), .5, crowd().segments, crowd().segments, crowd().scores, np.full(MANY, -1)), "threshold, nan": lambda: operating_point([nan] * 3, [nan] * 3, [nan] * 3, nan, [[nan, 1]], [[nan, 1]], [nan], [nan]),
    "threshold, find outside": lambda: operating_point([1.], [1.], [.5], .5, [[1, 2]], [[1, 2]], [.5], [9]), "threshold, lengths": lambda: operating_point([1.], [], [.5], .5, [], [], [], []),
    **{f"grid, {g}": lambda g=g: grid_figure(*g) for g in [(0, 4, 16, (1, 2)), (nan, 4, 16, (1, 2)), (25, 0, 16, (1, 2)), (1e9, 1, 16, (1, 2)), (25, 4, 16, (nan, 2)), (25, 4, 16, (3, 1)), (25, 4, 16, (1, 2, 3)), (25, 4, 16, (1, 2), 0), (25, 4, 16, (1, 2), inf), (1e-3, 1e3, 1e5, (1, 2)), (25, 1e-9, 1e300, (1, 2))]},
    **{f"sight, {key}": lambda v=v: sight_figure(v, v, v, v) for key, v in dict(none=[], nan=[nan], infinite=[inf], zero=[0], many=np.arange(MANY), negative=[-1, -2]).items()},
    "losses, many": lambda: loss_curves({f"l{i}": np.arange(500.) for i in range(300)}), "losses, word": lambda: loss_curves({"a": ["x"]}), "losses, iteration nan": lambda: loss_curves({"iteration": [nan, nan], "a": [1, 2.]}), "losses, infinite": lambda: loss_curves({"a": [inf, inf]}), "losses, none": lambda: loss_curves(None), "losses, huge": lambda: loss_curves({"a": [1e300, -1e300]}),
    "precision, many": lambda: precision_recall_curves([(f"c{i}", np.linspace(1, 0, 99), np.linspace(0, 1, 99), i / MANY) for i in range(MANY)], .5), "precision, nan": lambda: precision_recall_curves([("a", [nan, 1], [nan, 1], .5)], nan), "precision, no ap": lambda: precision_recall_curves([("a", [1.], [1.], None)], .5), "precision, three": lambda: precision_recall_curves([("a", [1.], [1.])], .5),
    "class bars, many": lambda: class_ap_bars(tuple(map(str, range(MANY))), RNG.random((5, MANY)), (.3, .4, .5, .6, .7)), "class bars, nan": lambda: class_ap_bars(("a",), [[nan]], (.5,)), "class bars, no tiou": lambda: class_ap_bars((), np.zeros((0, 0)), ()), "class bars, words": lambda: class_ap_bars(("a",), [["x"]], ("y",)),
    "gains, none": lambda: error_gains([], [], [], nan), "gains, nan": lambda: error_gains(["hit"], [nan], [inf], nan), "profile, none": lambda: error_profile([], np.zeros((0, 0))), "profile, zero": lambda: error_profile(["hit"], np.zeros((3, 1))), "profile, nan": lambda: error_profile(["hit"], [[nan]]), "profile, many": lambda: error_profile(["hit", "missed"], np.ones((MANY, 2), int)), "profile, words": lambda: error_profile(["hit"], [["a"]]),
    "sensitivity, none": lambda: sensitivity_bars("length", "s", [0], [], [], [], nan), "sensitivity, nan": lambda: sensitivity_bars("length", "s", [0, inf], [nan], [None], [nan], None), "sensitivity, many": lambda: sensitivity_bars("length", "s", np.arange(MANY + 1), np.arange(MANY), RNG.random(MANY), RNG.random(MANY), .5),
    "cut, none": lambda: operating_curve([], .9, None), "cut, nan": lambda: operating_curve([[nan] * 3], nan, nan), "cut, many": lambda: operating_curve(RNG.random((10 * MANY, 3)), .9, .5), "reliability, none": lambda: reliability([], [], [], nan), "reliability, nan": lambda: reliability([nan], [nan], [3], nan), "reliability, many": lambda: reliability(RNG.random(MANY), RNG.random(MANY), np.ones(MANY), .1),
    "metric, none": lambda: metric_against([], [], [], [], "p", "m"), "metric, nan": lambda: metric_against([nan, inf, 1], [nan, .5, None], ["a"] * 3, ["r"] * 3, "p", "m"), "metric, many": lambda: metric_against(list(range(MANY)), RNG.random(MANY), [f"a{i}" for i in range(MANY)], ["r"] * MANY, "p", "m"), "metric, many runs": lambda: metric_against(list(range(MANY)), RNG.random(MANY), ["a"] * MANY, ["r"] * MANY, "p", "m"), "metric, words": lambda: metric_against([1], ["a"], ["a"], ["r"], "p", "m"), "metric, mixed": lambda: metric_against([1, "a", None, True], [.5] * 4, ["a"] * 4, ["r"] * 4, "p", "m"),
    "differences, none": lambda: class_differences([], [], [], ("a", "b"), (nan, nan)), "differences, nan": lambda: class_differences(["a", "b", "c"], [nan, inf, None], [.5, .6, .5], ("a", "b"), (-inf, inf)), "differences, many": lambda: class_differences(list(map(str, range(MANY))), RNG.random(MANY), RNG.random(MANY), ("a", "b"), (-.1, .1)),
    "durations, none": lambda: duration_histogram([]), "durations, nan": lambda: duration_histogram([nan, inf, -1, 0], (), nan), "durations, wide": lambda: duration_histogram([1e-300, 1e300]), "durations, range nan": lambda: duration_histogram([1, 2], ((nan, nan),)), "durations, words": lambda: duration_histogram(["a"]), "durations, many": lambda: duration_histogram(RNG.random(MANY), ((0, 4), (4, inf)), inf),
    "levels, none": lambda: level_bars((), ()), "levels, nan": lambda: level_bars((nan, inf), ((0, 4), (4, 8))), "lengths, none": lambda: length_histogram([]), "lengths, nan": lambda: length_histogram([nan, inf, 3], nan), "lengths, many": lambda: length_histogram(RNG.integers(1, MANY, MANY), 2304),
    "labels, none": lambda: label_bars((), ()), "labels, nan": lambda: label_bars((("a", (nan,)),), ("t",)), "labels, many": lambda: label_bars(tuple((f"c{i}", (i, 1)) for i in range(MANY)), ("a", "b")), "labels, many subsets": lambda: label_bars((("a", (1,) * MANY),), tuple(f"s{i}" for i in range(MANY))),
    "draw, none": lambda: draw(Shot(FRAME), ()), "draw, many": lambda: draw(Shot(FRAME, boxes(MANY), RNG.random((MANY, 4)), boxes(MANY), np.ones((MANY, 4))), tuple("abcd")), "draw, many classes": lambda: draw(Shot(FRAME, boxes(50), RNG.random((50, 5000)), boxes(50), np.ones((50, 5000))), tuple(f"c{i}" for i in range(5000)), most=5000),
    "draw, nan": lambda: draw(Shot(FRAME, [[nan] * 4], [[.5]]), ("a",)), "draw, words": lambda: Shot(FRAME, [["a"] * 4]), "draw, a number": lambda: Shot(FRAME, 3), "draw, flat": lambda: Shot(FRAME, [0, 0, 1, 1]), "draw, five": lambda: Shot(FRAME, [[0, 0, 1, 1, 1]]), "draw, ragged": lambda: Shot(FRAME, boxes(2), [[.1], [.1, .2]]), "draw, no frame": lambda: Shot(None), "draw, one pixel": lambda: draw(Shot(FRAME[:1, :1]), ()), "draw, no side": lambda: draw(Shot(FRAME), (), max_side=0),
    "strip, many": lambda: strip(noisy(300), ()), "slider, many": lambda: frame_slider(noisy(300), ()), "slider, no boxes": lambda: frame_slider([Shot(FRAME)], ()), "slider, crowds": lambda: frame_slider([Shot(FRAME, boxes(200), RNG.random((200, 4)))] * 60, tuple("abcd")),
    "attention, no boxes": lambda: attention(Shot(FRAME), np.zeros((0, 0, 2, 2)), 0), "attention, nan": lambda: attention(Shot(FRAME, boxes(2)), np.full((2, 2, 2, 2), nan), 0), "attention, below 0": lambda: attention(Shot(FRAME, boxes(2)), -np.ones((2, 2, 2, 2)), 0), "attention, many": lambda: attention(Shot(FRAME, boxes(300)), np.ones((300, 300, 3, 3)), 0),
    "attention, fine grid": lambda: attention(Shot(FRAME, boxes(10)), np.ones((10, 10, 200, 200)), 0), "attention, actor a word": lambda: attention(Shot(FRAME, boxes(2)), np.ones((2, 2, 2, 2)), "x"), "attention, half an actor": lambda: attention(Shot(FRAME, boxes(2)), np.ones((2, 2, 2, 2)), .5), "attention, no bar": lambda: attention(Shot(FRAME, boxes(2)), np.ones((2, 2, 2, 2)), 0, most=0),
    "attention, words": lambda: attention(Shot(FRAME, boxes(1)), [[[["a"]]]], 0), "attention, few names": lambda: attention(Shot(FRAME, boxes(1), [[.1, .9]]), np.ones((1, 1, 2, 2)), 0, ("a",)),
    "memory, many": lambda: memory_attention(Shot(FRAME, boxes(2)), np.ones((2, MANY, 3, 3)), 0, RNG.random(MANY) * 60, RNG.integers(5, size=MANY), 30.), "memory, nan": lambda: memory_attention(Shot(FRAME, boxes(2)), np.ones((2, 1, 3, 3)), 0, [nan], [nan], nan), "memory, no boxes": lambda: memory_attention(Shot(FRAME), np.ones((0, 1, 3, 3)), 0, [1], [0], 3),
    "features, words": lambda: feature_picture([["a"]]), "features, three axes": lambda: feature_picture(np.zeros((1, 2, 3)))}


def texts(x): return [text for value in ((v for k, v in x.items() if k != "bdata") if isinstance(x, dict) else x) for text in texts(value)] if isinstance(x, (dict, list)) else [x] if isinstance(x, str) else []


def place(values):
    "The numbers of a trace, also as they are packed in JSON."
    return [] if values is None else [v for v in values if v is not None and v == v]


def examined(figure):
    "Nothing too large, nothing blank without words, no name read as markup."
    text = figure.to_json()
    whole = json.loads(text)
    marks = sum(len(place(getattr(trace, "x", None))) for trace in figure.data if trace.type != "image") + len(figure.layout.shapes) + len(figure.layout.annotations)
    said = (figure.layout.title.text or "") + "".join(note.text or "" for note in figure.layout.annotations)
    blank = not any(place(getattr(trace, "x", None)) for trace in figure.data if trace.type not in ("image", "heatmap"))
    assert len(text) < 1_000_000 and marks < 5_000 and (figure.layout.height or 0) < 3_000
    assert not blank or "<sup>" in said or figure.layout.annotations, "a blank figure without a word"
    strings = [s for s in texts(whole) if not s.startswith("data:")]
    assert not any("<b>evil" in s or "<i>" in s or "%{x}&lt;/i" in s for s in strings), "a name became markup"
    assert max(map(len, strings), default=0) < 2_500


def values_in(entry):
    parts = entry if isinstance(entry, (tuple, list)) else getattr(entry, "__dict__", {}).values()
    return [value for part in parts for value in values_in(part)] or [entry]


@pytest.mark.parametrize("case", CASES)
def test_a_message_thinned_or_refused_with_words(case):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try: came = CASES[case]()
        except ValueError as error:
            assert "/actloc/" in traceback.extract_tb(error.__traceback__)[-1].filename and len(str(error)) > 25 and " " in str(error), f"refused, but not by us: {error}"
            return
    if isinstance(came, go.Figure): examined(came)
    elif isinstance(came, str) and came.startswith("<!DOCTYPE"): assert "<b>evil" not in came and "\\u003cb\\u003eevil" not in came
    elif isinstance(came, str): assert all(len(line) < 2_500 and line.isprintable() for line in came.replace("\t", " ").splitlines()) and "nan" not in came.lower()
    elif isinstance(came, np.ndarray): assert came.dtype == np.uint8 and came.ndim == 3 and came.shape[2] == 3
    else: assert all(np.isfinite(number) for entry in came for number in values_in(entry) if not isinstance(number, str))


@pytest.mark.parametrize("words, views", [("of 10,000 shown", ("timeline, detections ten_thousand", "points, many", "falling, many", "profile, many", "sensitivity, many", "reliability, many", "metric, many", "metric, many runs", "draw, many", "memory, many", "lanes, detections ten_thousand")),
                                          ("of 300 shown", ("losses, many", "strip, many", "slider, many")), ("of 100,000 shown", ("cut, many",)), ("10,000", ("browse, many", "threshold, many", "class bars, many", "differences, many", "labels, many", "labels, many subsets", "precision, many"))])
def test_what_was_thinned_is_said(words, views):
    for view in views:
        figure = CASES[view]()
        said = json.dumps({name: value for name, value in figure.to_dict()["layout"].items() if name.startswith(("title", "xaxis"))})
        if words == "of 10,000 shown": words_here = "of " in said and " shown" in said
        else: words_here = words in said or words.replace(",", "") in said
        assert words_here, f"{view}: {said}"


# Live

FIGURES = {case: make for case, make in CASES.items() if case.partition(", ")[2] in ("none", "nan", "many", "one", "name markup", "name long", "words", "detections words", "detections one", "detections empty", "detections label_word", "lost")
           and case.split(",")[0] not in ("text_table", "subtitles", "rows_of", "cues", "video_page", "overlay", "boxed")}


def state(figure):
    "What a browser would draw, without the marks that only a live figure has."
    whole = json.loads(go.Figure(figure.data, figure.layout).to_json())
    for trace in whole["data"]: trace.pop("uid", None)
    return whole


def test_a_live_cell_survives_everything_and_shows_what_a_plain_figure_shows(monkeypatch):
    monkeypatch.setenv("ACTLOC_WIDGETS", "1")
    names, plain = list(FIGURES), lambda case: FIGURES[case]()
    box = touch(plain, case=choice("case", names[0], names))
    for name in [*names[1:], *names[::-1]]:
        global RNG
        RNG = np.random.default_rng(1)
        box.controls["case"].value = name
        RNG = np.random.default_rng(1)
        if ", many" in name: assert box.figure.data or box.figure.layout.annotations                     # drawn anew for every comparison: too slow
        else: assert state(box.figure) == state(drawn(plain, dict(case=name))), name
    monkeypatch.setenv("ACTLOC_WIDGETS", "0")
    assert isinstance(touch(plain, case=choice("case", names[0], names)), go.Figure)


@pytest.mark.parametrize("error, words", [(KeyError("a"), "KeyError: 'a'"), (ValueError(), "ValueError: it came without a word"), (RecursionError("deep"), "RecursionError: deep"), (MemoryError(), "MemoryError"), (ValueError("choose <b>"), "choose &lt;b&gt;"), (OSError("x" * 99_999), "OSError")])
def test_an_error_of_any_kind_is_a_sentence_in_both(error, words):
    def fails(n): raise error
    for live in (False, True):
        came = touch(fails, live=live, n=slider("n", 1, 0, 9))
        figure = came.figure if live else came
        assert words in spoken(figure) and len(spoken(figure)) < 1000 and not figure.data
    for nothing in (None, 3, "text", [go.Figure()]): assert "must return a plotly Figure" in spoken(drawn(lambda: nothing, {}))


def test_nothing_to_draw_is_said():
    for case in ("losses, infinite", "profile, zero", "sensitivity, nan", "reliability, nan", "cut, nan", "differences, nan", "durations, nan", "lengths, none", "labels, nan"): assert "nothing to draw" in spoken(CASES[case]()), case


def test_a_figure_that_the_live_one_refuses_is_said(monkeypatch):
    import actloc.views.widgets as widgets
    box, real = touch(lambda n: go.Figure(go.Scatter(y=[n])), live=True, n=slider("n", 1, 0, 9)), widgets.replace_figure
    monkeypatch.setattr(widgets, "replace_figure", lambda figure, new: real(figure, new) if not new.data else (_ for _ in ()).throw(RuntimeError("the front end is gone")))
    box.controls["n"].value = 3
    assert "RuntimeError: the front end is gone" in box.figure.layout.annotations[0].text
    monkeypatch.setattr(widgets, "replace_figure", real)
    box.controls["n"].value = 4
    assert list(box.figure.data[0].y) == [4] and not box.figure.layout.annotations


def spoken(figure): return " ".join([figure.layout.title.text or "", *(note.text for note in figure.layout.annotations)]).replace("</sup><br><sup>", " ").replace("<br>", " ")


def test_widgets_of_records_live():
    films = [recording([[1, 2]], [0], name="a"), recording(name="b", features=lambda: 1 / 0), unchecked(np.array([[nan, 1]]), [0]), recording([[1, 2]], [7], name=EVIL)]
    box = browse(films, ("walk",), live=True)
    for i, words in ((1, "ZeroDivisionError"), (2, "left out"), (3, "label 7 came"), (0, "1 segments")):
        box.controls["recording"].value = i
        examined(go.Figure(box.figure.data, box.figure.layout))
        assert words in spoken(box.figure)
    box = compare(films[:2], [crowd(30, 1), FOUND["label_word"]], ("walk",), live=True)
    for i, threshold, words in ((0, 1., "not shown"), (1, .5, "numbers are needed"), (0, 0., "annotated")):
        box.controls["recording"].value, box.controls["threshold"].value = i, threshold
        assert words in spoken(box.figure)
    assert browse(films * 50, live=True).controls["recording"].max == 199


@pytest.mark.parametrize("make", [lambda: slider("a", 1, 0, inf), lambda: slider("a", 1, nan, 2), lambda: slider("a", None, 0, 1), lambda: slider("a", "1", 0, 2), lambda: slider("a", 1, 0, 2, 0), lambda: slider("a", 1, 0, 2, nan), lambda: slider("a", 1, 0, 0), lambda: span("a", (2, 1), 0, 3),
                                  lambda: span("a", (1,), 0, 3), lambda: span("a", (nan, 1), 0, 3), lambda: choice("a", None, []), lambda: choice("a", 1, [1, ("b", 2)]), lambda: choice("a", np.ones(2), [("x", np.ones(2)), ("y", np.zeros(2))]), lambda: touch(lambda: 1, live=False, a=3)])
def test_controls_are_refused_with_words(make):
    with pytest.raises(ValueError, match=".{10,} "): make()


@pytest.mark.parametrize("control", [slider("a", 1.5, 0, 9), slider("a", np.int64(3), np.int64(0), np.int64(9)), slider("a", np.float32(.5), 0, 1, .1), span("a", (1.5, 2), 0, 9), span("a", (np.float64(1), 2), 0, 9), slider("a", True, 0, 2)])
def test_controls_become_widgets(control):
    assert np.allclose(control.widget().value, control.value)


# Exercises

class Hostile:
    def __getattribute__(self, name): raise RuntimeError("no")


class Unequal:
    def __eq__(self, other): raise RuntimeError("no")
    def __bool__(self): raise RuntimeError("no")
    def __len__(self): raise RuntimeError("no")
    def __array__(self, *a, **k): raise RuntimeError("no")
    def __iter__(self): raise RuntimeError("no")
    def __repr__(self): raise RuntimeError("no")
    __hash__ = None


class Word(str):
    def __eq__(self, other): raise RuntimeError("no")
    __hash__ = str.__hash__


def for_ever(*a): return for_ever(*a)
def leaves(*a): raise SystemExit(3)
def raises(*a): raise KeyError
def spoils(a, b): a.clear(); b.clear()
def yields(*a): yield 1
async def waits(*a): return 1
def dots(*a): return ...
def itself(*a): return itself
def hostile(*a): return Hostile()
def unequal(*a): return Unequal()


LOOP = []
LOOP.append(LOOP)
STRANGE = dict(none=None, text="", bytes=b"3", digits=["1", "2"], complex=1j, complexes=[1 + 0j, 2], dots_inside=(..., 2), ragged=[[1], [1, 2]], dictionary={1: 2}, set={1, 2}, nan=nan, infinite=-inf, huge_number=10 ** 400, nested=LOOP, range=range(10 ** 12), billion=np.broadcast_to(0., (10 ** 9,)),
               objects=np.array([object(), None]), words=np.array(["a"]), dates=np.array(["2020-01-01"], "M8[D]"), gradient=torch.zeros(3, requires_grad=True), gradients=[torch.zeros(2, requires_grad=True)] * 2, meta=torch.empty(2, device="meta"), sparse=torch.eye(2).to_sparse(), half=torch.zeros(3).bfloat16(), generator=(i for i in range(3)),
               iterator=iter([1, 2]), map=map(int, "12"), hostile=Hostile(), unequal=Unequal(), word=Word("other"), of_type=dict, exception=ValueError("x"), module=np, file=open, for_ever=for_ever, leaves=leaves, raises=raises, spoils=spoils, yields=yields, waits=waits, dots=dots, itself=itself, hostile_back=hostile, unequal_back=unequal,
               one_argument=lambda a: a, three=lambda a, b, c: a, keyword=lambda *, a: a, built_in=print, ufunc=np.add, partial_module=torch.nn.Linear(2, 2), false=False, dots_answer=...)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", STRANGE)
def test_every_wrong_answer_gets_a_sentence(name, capsys):
    def overlap(a, b): return max(0, min(a[1], b[1]) - max(a[0], b[0])) + .25
    for solution in (3., 7, [1., 2.5], np.ones((2, 2)), torch.ones(2) * 5, "word", True, None, overlap):
        verdict = check(STRANGE[name], solution, ([0, 4], [2, 6]), ([0, 1], [2, 3])) if not (name == "none" and solution is None) else check("", solution)
        assert not verdict.right and 15 < len(verdict.said) < 400 and verdict.said.endswith(".") and "\n" not in verdict.said and "Traceback" not in verdict.said, verdict.said


@pytest.mark.parametrize("answer, solution", [(np.True_, True), (torch.tensor(True), True), (True, np.True_), (np.str_("a"), "a"), (torch.tensor([1., 2.], requires_grad=True), [1, 2]), ([torch.tensor(1., requires_grad=True), 2], [1, 2]), (np.float16(.5), .5), ((1, 2), [1, 2]), (torch.ones(2).bfloat16(), [1, 1]), ([True, False], [1, 0]), (nan, nan), (inf, inf), (None, None)])
def test_right_answers_of_any_make_are_right(answer, solution): assert check(answer, solution).right


@pytest.mark.parametrize("answer", [["1", "2"], [1 + 0j, 2], np.array(["1", "2"]), [b"1", 2], [1, 2, 3], [[1, 2]], {1: 1, 2: 2}, [1, 2.001], (1, nan)])
def test_what_only_looks_right_is_not(answer): assert not check(answer, [1, 2]).right and not check(np.array(answer, object) if isinstance(answer, list) else answer, np.array([1., 2])).right


def test_an_answer_that_spoils_its_arguments_spoils_nothing():
    nested = ([[1], [2]],)
    check(lambda rows: [row.clear() for row in rows], lambda rows: sum(map(sum, rows)), nested, nested)
    assert nested == ([[1], [2]],) and check(np.maximum, max, (1, 2)) and check(max, max, (1, 2))
