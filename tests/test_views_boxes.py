"""What guards the pictures of boxes and attention but does not teach: broken input, crowds, sizes, random sweeps against slow definitions."""
import base64
import io
import json
import re

import numpy as np
import plotly.graph_objects as go
import pytest
import torch
from PIL import Image

from actloc.views.attention import attention, memory_attention, shares
from actloc.views.boxes import Shot, actors_of, as_jpeg, covered, draw, drawable, frame_slider, overlap, strip
from actloc.views.report import page

NAMES = tuple(f"class {k}" for k in range(4))
BAD_BOXES = np.array([[.1, .1, .3, .3], [.5, .5, .5, .9], [.8, .8, .2, .2], [np.nan, 0, 1, 1], [2, 2, 3, 3], [-1, -1, 2, 2], [0, 0, np.inf, 1], [.9, .9, 1.0005, 1]])


def frame(height=90, width=160, seed=0): return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def boxes(count, seed=0):
    corner = np.random.default_rng(seed).uniform(0, .7, (count, 2))
    return np.c_[corner, corner + np.random.default_rng(seed + 1).uniform(.05, .3, (count, 2))]


def shot(count=3, seed=0, truth=True, **changes):
    rng = np.random.default_rng(seed)
    known = dict(truth_boxes=boxes(count, seed), truth=rng.random((count, 4)) < .3) if truth else {}
    return Shot(**dict(frame=frame(), boxes=boxes(count, seed), scores=rng.random((count, 4)), title="film, 902") | known | changes)


def softmax(asking, answering, h=3, w=5, seed=0):
    weights = np.exp(np.random.default_rng(seed).normal(size=(asking, answering, h, w)))
    return weights / weights.sum(1, keepdims=True)


def strict(figure):
    "The figure's JSON, refused by the browser's parser if it held NaN or Infinity."
    return json.loads(figure.to_json(), parse_constant=lambda name: pytest.fail(f"{name} in the figure"))


def listed(figure): return [trace.name for trace in figure.data if isinstance(trace, go.Scatter) and trace.showlegend]


def all_figures(one, weights, seconds, who):
    yield draw(one, NAMES)
    yield strip([one] * 4, NAMES)
    yield frame_slider([one] * 3, NAMES)
    if len(one.boxes):
        yield attention(one, weights, 0, NAMES)
        yield memory_attention(one, np.resize(weights, (len(one.boxes), len(seconds), 3, 5)), 0, seconds, who, 902)


# --- Pictures ---

def test_the_frame_is_a_jpeg_of_the_right_colours():
    red = np.zeros((60, 90, 3), np.uint8)
    red[..., 0] = 200
    picture = draw(Shot(red), NAMES).data[0]
    assert picture.type == "image" and picture.source.startswith("data:image/jpeg;base64,")
    seen = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture.source.split(",")[1]))))
    assert seen.shape == (60, 90, 3) and abs(seen.reshape(-1, 3).mean(0) - [200, 0, 0]).max() < 4
    assert picture.x0 - picture.dx / 2 == 0 and round(picture.dx * 90, 9) == 1 and round(picture.dy * 60, 9) == 1


@pytest.mark.parametrize("height, width", [(1, 1), (1, 2000), (3000, 2), (240, 320), (1080, 1920)])
def test_pictures_of_any_shape_fit_the_axes(height, width):
    figure = draw(Shot(frame(height, width), [[0, 0, 1, 1]]), NAMES, max_side=100)
    picture = figure.data[0]
    seen = Image.open(io.BytesIO(base64.b64decode(picture.source.split(",")[1])))
    assert max(seen.size) <= 100 and np.allclose([picture.dx * seen.width, picture.dy * seen.height], 1)
    assert figure.layout.yaxis.scaleratio == height / width and figure.layout.yaxis.range == (1, 0)


def test_a_page_of_full_frames_is_small():
    one = shot(8, frame=frame(1080, 1920))
    assert len(draw(one, NAMES).to_json()) < 150_000 and len(frame_slider([one] * 10, NAMES).to_json()) < 1_000_000


def test_frames_that_are_views_of_others_are_drawn():
    whole = frame()
    assert as_jpeg(whole[:, ::-1]) == as_jpeg(np.ascontiguousarray(whole[:, ::-1])) and as_jpeg(whole[::2, ::2]) != as_jpeg(whole)


# --- Boxes ---

def test_boxes_that_cannot_be_drawn_are_counted():
    inside, good, said = drawable(BAD_BOXES, "boxes")
    assert good.tolist() == [True, False, False, False, False, True, False, True]
    assert (inside[5] == [0, 0, 1, 1]).all() and "5 left out" in said[0] and "cut at the border: 1" in said[1]   # half a thousandth is rounding
    figure = draw(Shot(frame(), BAD_BOXES, np.full((8, 4), .5)), NAMES)
    assert [name[:8] for name in sorted(listed(figure))] == ["<b>1</b>", "<b>6</b>", "<b>8</b>"] and "5 left out" in figure.layout.title.text
    strict(figure)


@pytest.mark.parametrize("seed", range(20))
def test_overlap_and_covered_against_loops(seed):
    first, second = boxes(7, seed), boxes(5, seed + 50)
    slow = np.zeros((7, 5))
    for i, a in enumerate(first):
        for j, b in enumerate(second):
            common = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
            slow[i, j] = common / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common)
    assert np.allclose(overlap(first, second), slow)
    assert covered(first, second).tolist() == [int(row.argmax()) if row.max() >= .5 else -1 for row in slow]
    assert covered(first, first[::-1]).tolist() == list(range(7))[::-1]


def test_numbers_are_those_of_the_input_and_small_boxes_lie_on_top():
    areas = boxes(12, 3)
    figure = draw(shot(boxes=areas, scores=np.eye(12, 4), truth=False), NAMES)
    outlines = [trace for trace in figure.data[1:] if trace.showlegend]
    drawn = [int(re.match(r"<b>(\d+)</b>", trace.name)[1]) - 1 for trace in outlines]
    size = (areas[:, 2:] - areas[:, :2]).prod(1)
    assert sorted(drawn) == list(range(12)) and (np.diff(size[drawn]) <= 1e-12).all()
    assert [trace.legendrank - 1000 for trace in outlines] == drawn                       # but the list is in order
    for i, trace in zip(drawn, outlines): assert np.allclose([trace.x[0], trace.y[0], trace.x[2], trace.y[2]], areas[i], atol=1e-4)
    tags = figure.data[-1]
    assert tags.text == tuple(f"<b>{i + 1}</b>" for i in range(12)) and [trace.line.color for trace in outlines] == [tags.marker.color[i] for i in drawn]


# --- Words ---

def test_ticks_and_misses():
    truth_boxes = np.array([[.1, .1, .4, .9], [.6, .1, .9, .9]])
    truth = np.array([[1, 0, 1, 0], [0, 1, 0, 0]], bool)
    one = Shot(frame(), truth_boxes[:1] + .01, [[.9, .6, .04, .2]], truth_boxes, truth)
    actors, _ = actors_of(one, NAMES, .1, 2)
    assert actors[0].words == "class 0 0.90 ✓, class 1 0.60 ✗; missed: class 2 0.04"
    assert (actors[1].number, actors[1].words) == ("–", "not found: class 1") and len(actors) == 2
    lonely, _ = actors_of(Shot(frame(), [[.4, .4, .5, .5]], [[.9, 0, 0, 0]], truth_boxes, truth), NAMES, .1, 2)
    assert lonely[0].words == "class 0 0.90 ✗ (nobody there)" and [a.number for a in lonely] == ["1", "–", "–"]
    unlabelled, _ = actors_of(Shot(frame(), truth_boxes[:1], [[.9, 0, 0, 0]], truth_boxes), NAMES, .1, 2)
    assert unlabelled[0].words == "class 0 0.90" and unlabelled[1].words == "not found: a person"


def test_a_truth_box_that_cannot_be_drawn_takes_its_row_with_it():
    truth_boxes = np.array([[.5, .5, .5, .9], [.1, .1, .4, .9]])
    actors, said = actors_of(Shot(frame(), truth_boxes[1:], [[.9, .2, 0, 0]], truth_boxes, np.eye(2, 4, dtype=bool)), NAMES, .5, 2)
    assert actors[0].words == "class 0 0.90 ✗; missed: class 1 0.20" and "true boxes that are empty" in said[0]


def test_the_dashed_line_is_the_truth():
    figure = draw(shot(2, boxes=boxes(2, 9), scores=None), NAMES)
    dashed = [trace for trace in figure.data[1:] if trace.line and trace.line.dash]
    expected = sum(([a[0], a[2], a[2], a[0], a[0], None] for a in boxes(2, 0).round(4).tolist()), [])
    assert len(dashed) == 1 and list(dashed[0].x) == expected and "dashed" in figure.layout.title.text
    assert not [trace for trace in draw(shot(2, truth=False), NAMES).data[1:] if trace.line and trace.line.dash]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -3., 7.])
def test_scores_of_any_kind_give_words(value):
    one = shot(scores=np.where(np.eye(3, 4) > 0, value, .5))
    for figure in all_figures(one, softmax(3, 3), [900, 901], [0, 1]): strict(figure)
    assert np.isnan(value) == ("actors with scores that are not numbers: 3" in draw(one, NAMES).layout.title.text)


def test_long_names_are_broken_and_markup_is_text():
    names = ("talk to (e.g., self, a person, a group) " * 4, "<b>bold</b> & <a href='x'>", "c" * 200, "d")
    figure = draw(shot(3, scores=np.full((3, 4), .9), title="<i>t</i>"), names, most=4)
    for name in listed(figure):
        lines = name.split("<br>")
        assert max(map(len, lines)) < 100 and len(lines) > 5
        assert "<a" not in name and "&lt;b&gt;bold" in name
    assert figure.layout.title.text.startswith("&lt;i&gt;")
    best_is_markup = attention(shot(scores=np.full((3, 4), .9) * [.5, 1, .5, .5]), softmax(3, 3), 0, names).data[-1].text[0]
    assert "&lt;b&gt;bold" in best_is_markup and "<a" not in best_is_markup


@pytest.mark.parametrize("count", [0, 1, 2, 60, 200])
def test_any_number_of_actors(count):
    one = shot(count)
    for figure in all_figures(one, softmax(count, count) if count else None, [900.5] * 7, range(7)):
        strict(figure)
        assert figure.layout.height < 900
    assert draw(one, NAMES).layout.legend.maxheight <= 260
    assert len(listed(draw(one, NAMES))) == count and len(draw(one, NAMES).to_json()) < 40_000 + 1_000 * count
    assert ("no person box" in draw(one, NAMES).layout.title.text) == (count == 0)


def test_input_is_left_alone_and_tensors_are_taken():
    arrays = dict(frame=frame(), boxes=boxes(3).astype(np.float32), scores=np.random.default_rng(0).random((3, 4)).astype(np.float32), truth_boxes=boxes(3), truth=np.eye(3, 4, dtype=bool))
    copies = {name: x.copy() for name, x in arrays.items()}
    expected = draw(Shot(**arrays), NAMES).to_json()
    for name, x in arrays.items(): assert (x == copies[name]).all()
    tensors = {name: torch.tensor(x).requires_grad_(name == "scores") for name, x in arrays.items()}
    assert draw(Shot(**tensors), NAMES).to_json() == expected
    weights = softmax(3, 3).astype(np.float32)
    assert attention(Shot(**tensors), torch.tensor(weights, requires_grad=True), 1).to_json() == attention(Shot(**arrays), weights, 1).to_json()


# --- Strip and slider ---

@pytest.mark.parametrize("count, columns", [(1, 3), (3, 3), (4, 3), (5, 2), (7, 1)])
def test_every_shot_of_a_strip_has_its_own_axes(count, columns):
    shots = [shot(2, i, title=f"second {i}") for i in range(count)]
    figure = strip(shots, NAMES, columns)
    images = [trace for trace in figure.data if trace.type == "image"]
    assert [image.xaxis for image in images] == [f"x{i + 1}" if i else "x" for i in range(count)]
    assert [text.text for text in figure.layout.annotations] == [f"second {i}" for i in range(count)]
    for i in range(count): assert figure.layout[f"yaxis{i + 1 if i else ''}"].scaleanchor == f"x{i + 1 if i else ''}"
    domains = [(figure.layout[f"xaxis{i + 1 if i else ''}"].domain, figure.layout[f"yaxis{i + 1 if i else ''}"].domain) for i in range(count)]
    assert len(set(domains)) == count


def test_a_slider_shows_one_shot_at_a_time():
    shots = [shot(n, n, truth=n != 3, title=f"second {n}") for n in (2, 0, 3, 5)]
    figure = frame_slider(shots, NAMES)
    steps = figure.layout.sliders[0].steps
    assert [step.label for step in steps] == [f"second {n}" for n in (2, 0, 3, 5)] and not figure.frames
    visible = np.array([step.args[0]["visible"] for step in steps])
    assert (visible.sum(0) == 1).all() and visible.shape[1] == len(figure.data) and [bool(trace.visible) for trace in figure.data] == visible[0].tolist()
    for n, row in zip((2, 0, 3, 5), visible):
        shown = [figure.data[i] for i in np.flatnonzero(row)]
        assert [trace.type for trace in shown].count("image") == 1 and sum(bool(trace.showlegend) for trace in shown[1:]) == n


# --- Attention ---

@pytest.mark.parametrize("seed", range(5))
def test_bars_and_maps_are_the_weights(seed):
    weights, one = softmax(6, 6, seed=seed), shot(6, seed)
    for actor in range(6):
        figure = attention(one, weights, actor, NAMES, most=4)
        bars = figure.data[-2]
        share = [weights[actor, j].mean() for j in range(6)]
        order = sorted(range(6), key=lambda j: -share[j])[:4]
        assert np.allclose(bars.x, [share[j] for j in order], atol=1e-4) and "4 of 6 actors shown" in figure.layout.title.text
        for j, button, text in zip(order, figure.layout.updatemenus[0].buttons, figure.data[-1].text):
            assert np.allclose(button.args[0]["z"][0], weights[actor, j], atol=1e-4) and list(button.args[1]) == [3] and f"<b>{j + 1}" in text
            assert button.label.endswith(f"{j + 1}" + (" (itself)" if j == actor else ""))
        heat = figure.data[3]
        assert heat.type == "heatmap" and np.allclose(heat.z, weights[actor, order[0]], atol=1e-4) and np.isclose(heat.zmax, weights[actor, order].max())
        strict(figure)


def test_the_map_covers_the_extent():
    heat = attention(shot(), softmax(3, 3, 2, 4), 0, extent=(.1, .2, .9, .6)).data[3]
    assert np.allclose([heat.x0 - heat.dx / 2, heat.x0 + 3.5 * heat.dx, heat.y0 - heat.dy / 2, heat.y0 + 1.5 * heat.dy], [.1, .9, .2, .6])


def test_links_lead_from_the_asking_actor_to_the_others():
    one, weights = shot(4), softmax(4, 4)
    figure = attention(one, weights, 2)
    links = figure.data[4:-3]
    middle = (one.boxes[:, :2] + one.boxes[:, 2:]) / 2
    order = [j for j in np.argsort(-shares(weights, 2)) if j != 2]
    assert len(links) == 3
    for j, link in zip(order, links):
        assert np.allclose(np.c_[link.x, link.y], middle[[2, j]], atol=1e-4) and np.isclose(link.line.width, 1 + 9 * shares(weights, 2)[j], atol=.01)


def test_an_actor_without_a_drawable_box_still_has_its_bar():
    one = shot(3, boxes=np.r_[boxes(2), [[np.nan] * 4]])
    for actor in range(3):
        figure = attention(one, softmax(3, 3), actor)
        assert len(figure.data[-2].x) == 3 and "1 left out" in figure.layout.title.text
        assert len(figure.data[4:-3]) == (0 if actor == 2 else 1)                            # links between boxes that are drawn
        strict(figure)


def test_weights_without_numbers_are_said():
    weights = softmax(3, 3)
    weights[0, 1, 0] = np.nan
    weights[0, 0, 1, 1] = np.inf
    figure = attention(shot(), weights, 0)
    assert "weights that are not numbers: 6 drawn as 0" in figure.layout.title.text
    strict(figure)
    strict(attention(shot(), np.zeros((3, 3, 2, 2)), 1))


def test_memory_by_second():
    weights, seconds, who = softmax(3, 7), np.array([892, 892, 897, 897, 897, 902, 910.5]), np.array([0, 1, 0, 1, 2, 0, 0])
    figure = memory_attention(shot(), weights, 1, seconds, who, 902., most=3)
    bars, share = figure.data[-1], weights[1].reshape(7, -1).mean(1)
    assert bars.x == tuple(seconds - 902) and np.allclose(bars.y, share, atol=1e-4)
    assert np.allclose(bars.base, [0, share[0], 0, share[2], share[2] + share[3], 0, 0], atol=1e-4)
    best = int(share.argmax())
    first = figure.layout.updatemenus[0].buttons[0]
    assert len(figure.layout.updatemenus[0].buttons) == 3 and first.label.startswith(f"second {seconds[best]:g} ({seconds[best] - 902:+g} s), actor {who[best] + 1}: {share[best]:.0%}")
    assert np.allclose(figure.data[3].z, weights[1, best], atol=1e-4) and figure.layout.xaxis2.range[0] < -10 and figure.layout.xaxis2.range[1] > 8.5
    strict(figure)


def test_an_empty_memory_is_said():
    for one, actor in ((shot(), 2), (shot(0), 0)):
        figure = memory_attention(one, np.zeros((len(one.boxes), 0, 3, 5)), actor, [], [], 902)
        assert "no memory entry within reach" in figure.layout.title.text
        strict(figure)


# --- Doors ---

@pytest.mark.parametrize("wrong, words", [
    (lambda: Shot(frame() / 255.), "uint8 .H, W, 3. is needed"), (lambda: Shot(frame()[..., 0]), "is needed"), (lambda: Shot(np.zeros((0, 4, 3), np.uint8)), "is needed"),
    (lambda: Shot(frame(), boxes(3), np.zeros((2, 4)), title="film"), "'film': 3 boxes and 2 rows of scores"), (lambda: Shot(frame(), truth=np.zeros((2, 4))), "0 true boxes and 2 rows of truth"),
    (lambda: draw(shot(), NAMES[:2]), "scores of 4 classes came, but 2 names"), (lambda: strip([], NAMES), "0 shots"), (lambda: strip([shot()], NAMES, 0), "in 0 columns"),
    (lambda: frame_slider([], NAMES), "no shot came"), (lambda: frame_slider([shot(), shot(frame=frame(9, 9))], NAMES), "frames of 2 shapes"),
    (lambda: attention(shot(), softmax(3, 2), 0), r"weights \[3, 2, 3, 5\] came; \[3, 3, h, w\]"), (lambda: attention(shot(), softmax(3, 3), 3), "the clip has 0 to 2"),
    (lambda: attention(shot(), softmax(3, 3), -1), "the clip has 0 to 2"), (lambda: attention(shot(), np.zeros((3, 3, 0, 2)), 0), "at least one position"),
    (lambda: attention(shot(0), np.zeros((0, 0, 1, 1)), 0), "is needed"),
    (lambda: memory_attention(shot(), softmax(3, 5), 0, range(5), range(4), 9), "5 seconds but 4 actors"), (lambda: memory_attention(shot(), softmax(3, 5), 0, range(4), range(4), 9), r"\[3, 4, h, w\]")])
def test_refusals(wrong, words):
    with pytest.raises(ValueError, match=words): wrong()


def test_a_report_with_all_of_them_asks_nobody():
    figures = [("a figure", "", figure) for figure in all_figures(shot(), softmax(3, 3), [900, 901], [0, 1])]
    text = page("boxes", figures)
    assert text.count("<figcaption>") == 5 and "Plotly.animate(" not in text.split("</style>")[1].split("<body>")[1] and "film, 902" in text
