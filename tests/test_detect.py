"actloc detect: pieces give what the whole gives; tables, files and formats; one broken source does not stop the others."
import dataclasses
import json
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import actloc
from actloc.actionformer.model import ActionFormer, ActionFormerConfig
from actloc.app import cli
from actloc.app.detect import DetectConfig, Found, Writer, detect
from actloc.app.localize import ModelCard, evaluate, load_model, localize, open_dataset, save_model
from actloc.app.evaluate import evaluate_segments, read_temporal
from actloc.app.stream import Cut, Pool, Stream, StreamConfig, agreement, joined, localize_long, sight
from actloc.core.header import FeatureHeader
from actloc.core.records import Detections, Recording
from actloc.core.segments import FeatureGrid
from actloc.data.sensors import read_sensors, sensor_features, window_header, windows
from actloc.data.synthetic import synthetic
from actloc.data.video import open_video, write_video
from actloc.views.outputs import cues, subtitles, video_page

ROOT = Path(__file__).parents[1]
GRID = FeatureGrid(25, 4, 16)


def loud(seed=0, **settings):
    "A small network that has an opinion everywhere, and its card."
    torch.manual_seed(seed)
    config = ActionFormerConfig(**{**dict(input_dim=8, num_classes=3, arch=(1, 1, 2), width=16, heads=2, window=5, max_seq_len=64, head_layers=2,
                                          regression_ranges=((0, 4), (4, 8), (8, 1e4)), max_segments=100_000, pre_nms_topk=100_000), **settings})
    model = ActionFormer(config).eval()
    for p in model.heads.parameters(): torch.nn.init.normal_(p, 0, .3)
    return model, ModelCard(config, tuple(f"class {k}" for k in range(config.num_classes)), GRID)


def features_of(T, seed=0, channels=8):
    return np.random.default_rng(seed).normal(size=(channels, T)).astype(np.float32)


def at_once(model, features):
    T = features.shape[1]
    return localize(model, [Recording("r", features, GRID, ((T - 1) * 4 + 16) / 25)])[0]


def in_pieces(model, card, features, how=StreamConfig(), sizes=37):
    stream, T = Stream(model, card, how), features.shape[1]
    bounds = range(sizes, T, sizes) if isinstance(sizes, int) else sizes
    return joined([stream.feed(piece) for piece in np.split(features, bounds, 1)] + [stream.end()])


def same(a, b):
    return all(np.array_equal(getattr(a, n), getattr(b, n)) for n in ("segments", "labels", "scores"))


# ---- the stream

VARIANTS = [dict(), dict(backbone="conv"), dict(neck="fpn"), dict(offset_activation="softplus", refine_radius=2.), dict(window=(5, 9, 3)), dict(arch=(2, 2, 2)), dict(standardise=True, embedding_kernel=5, head_kernel=5)]

@pytest.mark.parametrize("settings", VARIANTS, ids=str)
@pytest.mark.parametrize("T", [400, 419])
def test_every_candidate_comes_once_and_as_in_the_whole(settings, T):
    "Nothing is told before the end, and suppression drops nothing: what differs could only be the candidates."
    model, card = loud(nms_method="hard", nms_threshold=1., **settings)
    features = features_of(T)
    whole, streamed = at_once(model, features), in_pieces(model, card, features, StreamConfig(hop=8, settle=10**6))
    assert Cut.of(StreamConfig(hop=8), model.config).whole < 200            # several windows
    assert len(whole) == len(streamed) > 300
    assert agreement(whole, streamed, .16).all() and agreement(streamed, whole, .16).all()


@pytest.mark.parametrize("settings", [dict(), dict(nms_method="hard"), dict(nms_method="linear"), dict(nms_per_class=False), dict(nms_per_class=False, voting_threshold=.7, nms_method="hard")], ids=str)
def test_told_early_and_still_the_same(settings):
    model, card = loud(offset_activation="softplus", **settings)
    features = features_of(700, 1)
    whole = at_once(model, features)
    for how in (StreamConfig(), StreamConfig(hop=16), StreamConfig(hop=100, settle=60)):
        streamed = in_pieces(model, card, features, how)
        assert agreement(whole, streamed, .16).mean() > .97, how
        assert len(np.unique(np.c_[streamed.segments, streamed.labels], axis=0)) == len(streamed), how    # nothing twice


@pytest.mark.parametrize("T", [1, 5, 63, 64, 65, 100, 150])
def test_shorter_than_a_window_is_exact(T):
    model, card = loud()
    features = features_of(T, T)
    if T < Stream(model, card).cut.whole: assert same(localize_long(model, card, [features[:, :T // 2], features[:, T // 2:]], ((T - 1) * 4 + 16) / 25), at_once(model, features))
    else: assert agreement(at_once(model, features), in_pieces(model, card, features), .16).mean() > .97


def test_as_whole_as_asked():
    model, card = loud()
    features = features_of(500)
    assert same(localize_long(model, card, [features[:, :99], features[:, 99:]], (499 * 4 + 16) / 25, StreamConfig(whole=501)), at_once(model, features))
    assert Cut.of(StreamConfig(whole=1), model.config).whole < Cut.of(StreamConfig(), model.config).whole < 100


def test_sizes_of_pieces_do_not_matter():
    model, card = loud()
    features, random = features_of(900, 2), np.random.default_rng(0)
    one = in_pieces(model, card, features)
    for _ in range(3):
        other = in_pieces(model, card, features, sizes=np.sort(random.integers(0, 900, random.integers(0, 12))))
        assert same(*(d[np.lexsort((d.segments[:, 0], d.scores))] for d in (one, other)))


@pytest.mark.parametrize("how", [StreamConfig(), StreamConfig(hop=8, settle=16), StreamConfig(hop=8, settle=16, whole=1), StreamConfig(hop=4, margin=12, settle=4, whole=1)], ids=str)
def test_latency_is_kept(how):
    model, card = loud()
    stream, features = Stream(model, card, how), features_of(600)
    for i in range(600):
        found = stream.feed(features[:, i: i + 1])
        now = GRID.to_seconds(i) + 8 / 25                                # when the last frame of the feature has been seen
        if len(found): assert found.segments.mean(1).min() >= now - stream.latency_s - 1e-4
    late = stream.end()
    assert len(late) and late.segments.mean(1).min() >= now - stream.latency_s


def test_no_end():
    "Positions far away keep their digits, and what is held does not grow."
    pool = Pool(loud()[0].config, 10)
    rng, told = np.random.default_rng(0), []
    for start in range(2**26, 2**26 + 4000, 100):
        at = rng.uniform(0, 100, 50)
        pool.add(Detections(np.stack([at, at + 3.125], 1), np.zeros(50, np.int64), rng.uniform(.1, 1, 50)), start)
        told.append(pool.tell(start + 90))
        assert len(pool.waiting) < 120 and abs(start - pool.origin) <= 100
    segments = np.concatenate([d.segments for d in told])
    assert segments.dtype == np.float64 and np.abs(np.diff(segments) - 3.125).max() < 1e-4 and segments.min() >= 2**26


def test_memory_of_four_hours():
    model, card = loud(max_segments=200, pre_nms_topk=200)
    stream, held = Stream(model, card, StreamConfig(hop=512)), []
    piece = features_of(1000)
    for _ in range(90):                                                  # 90,000 steps of 0.16 s
        stream.feed(piece)
        held.append(sum(p.nbytes for p in stream.pieces) + sum(getattr(stream.pool.waiting, n).nbytes for n in ("segments", "labels", "scores")))
    assert max(held[45:]) <= 1.1 * max(held[:45])


def test_training_mode_comes_back():
    model, card = loud()
    localize_long(model.train(), card, [features_of(20)])
    assert model.training


# ---- tables

def write_table(path, values, fps=10., names=None, times=None):
    times = np.arange(len(values)) / fps if times is None else times
    names = names or ["time", *(f"c{i}" for i in range(values.shape[1]))]
    path.write_text("\n".join([",".join(names), *(",".join([repr(float(t)), *map(repr, row.tolist())]) for t, row in zip(times, values))]) + "\n")
    return path


@pytest.mark.parametrize("seed", range(5))
def test_windows_by_definition(seed):
    random = np.random.default_rng(seed)
    n, S, length, stride = random.integers(20, 60), random.integers(1, 5), random.integers(1, 15), random.integers(1, 9)
    samples = random.normal(size=(n, S)).astype(np.float32)
    out = windows(samples, length, stride)
    assert out.shape == (S * length, (n - length) // stride + 1) and out.dtype == np.float32 and out.T.flags.c_contiguous
    for t in range(out.shape[1]):
        assert (out[:, t].reshape(S, length) == samples[t * stride: t * stride + length].T).all()


@pytest.mark.parametrize("unit, factor", [("s", 1), ("ms", 1e3), ("us", 1e6), ("ns", 1e9)])
@pytest.mark.parametrize("start", [0, 1.7e9])
def test_units_are_found(tmp_path, unit, factor, start):
    values = np.random.default_rng(0).normal(size=(100, 2)).round(4)
    times = np.rint((start + np.arange(100) / 50) * factor * 1000) / 1000
    path = write_table(tmp_path / "a.csv", values, times=times)
    assert (read_sensors(path, fps=50.).values == values.astype(np.float32)).all()
    assert (read_sensors(path, fps=50., unit=unit).values == values.astype(np.float32)).all()


def test_ends_of_lines_separators_and_parquet(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    values = np.random.default_rng(0).normal(size=(30, 2)).round(4)
    plain = write_table(tmp_path / "a.csv", values)
    expected = read_sensors(plain).values
    for name, change in (("crlf.csv", lambda t: t.replace("\n", "\r\n")), ("semicolon.csv", lambda t: t.replace(",", ";")), ("a.tsv", lambda t: t.replace(",", "\t")), ("blank.csv", lambda t: t + "\n\n")):
        (tmp_path / name).write_bytes(change(plain.read_text()).encode())
        assert (read_sensors(tmp_path / name).values == expected).all(), name
    stamps = np.datetime64("2024-01-01T00:00:00", "us") + (np.arange(30) * 100_000).astype("timedelta64[us]")
    parquet.write_table(pa.table({"time": stamps, "c0": values[:, 0], "c1": values[:, 1]}), tmp_path / "a.parquet")
    assert (read_sensors(tmp_path / "a.parquet", fps=10.).values == expected).all()


def test_another_rate_is_read_off_the_lines(tmp_path):
    t = np.arange(400) / 100
    samples = read_sensors(write_table(tmp_path / "a.csv", np.c_[t, 2 * t], 100), fps=40.)
    assert len(samples.values) == 160 and "from 100 to 40" in samples.note
    np.testing.assert_allclose(samples.values, np.c_[np.arange(160), np.arange(160) * 2] / 40, atol=1e-6)


def test_jitter_and_drift(tmp_path):
    random, values = np.random.default_rng(0), np.arange(2000.)[:, None]
    jitter = np.arange(2000) / 50 + random.uniform(-.004, .004, 2000)
    jitter[0] = 0
    still = read_sensors(write_table(tmp_path / "a.csv", values, times=jitter), fps=50.)
    assert (still.values == values).all() and not still.note
    drifting = read_sensors(write_table(tmp_path / "a.csv", values, times=np.arange(2000) / 49.8), fps=50.)    # 0.16 s late in the end
    np.testing.assert_allclose(drifting.values[:, 0], np.arange(len(drifting.values)) / 50 * 49.8, atol=1e-3)
    assert len(drifting.values) == 2008 and drifting.note


def test_a_hole_is_bridged_only_if_asked(tmp_path):
    values = np.arange(100.)[:, None]
    kept = np.r_[0:40, 80:100]
    path = write_table(tmp_path / "a.csv", values[kept], times=kept / 10)
    with pytest.raises(ValueError, match=r"a.csv, row 42: no reading for 4.1 s, from second 3.9 on \(1 such gaps\)"): read_sensors(path)
    np.testing.assert_allclose(read_sensors(path, gaps="interpolate").values, values, atol=1e-4)
    with pytest.raises(ValueError, match="gaps 'ignore' came"): read_sensors(path, gaps="ignore")


# ---- the door

@pytest.fixture(scope="module")
def phone(tmp_path_factory):
    "Raw readings of a few recordings as tables, their windows as a dataset, and a model folder."
    folder = tmp_path_factory.mktemp("phone")
    header = window_header(("x", "y"), 10, 8, 4)
    model, card = loud(input_dim=16, max_segments=200, pre_nms_topk=2000, max_seq_len=256)
    card = dataclasses.replace(card, grid=header.grid, features=header)
    save_model(folder / "model", model, card)
    (folder / "tables").mkdir(), (folder / "features").mkdir()
    random, database = np.random.default_rng(0), {}
    for i in range(4):
        n = int(random.integers(300, 500))
        samples = random.normal(size=(n, 2)).astype(np.float32)
        write_table(folder / "tables" / f"r{i}.csv", samples.astype(np.float64), 10., ["time", "x", "y"])
        np.save(folder / "features" / f"r{i}.npy", windows(samples, 8, 4).T)
        starts = random.uniform(0, n / 10 - 3, 12)
        database[f"r{i}"] = {"subset": "test", "duration": n / 10, "fps": 10, "annotations": [{"label": f"class {k % 3}", "segment": [s, s + 1.5]} for k, s in enumerate(starts.tolist())]}
    features = dict(folder="features", stride=4, num_frames=8, fps=10, header=header.as_dict())
    (folder / "annotations.json").write_text(json.dumps({"classes": list(card.classes), "features": features, "database": database}))
    return folder


def test_tables_get_the_mAP_of_the_evaluation(phone, tmp_path):
    "Raw tables through detect and ActivityNet's JSON, against localize on the prepared windows: the same numbers to the last bit."
    model, card = load_model(phone / "model")
    dataset = open_dataset(phone)
    expected = evaluate(localize(model, dataset), dataset, (.1, .3, .5))
    detect(phone / "tables", phone / "model", tmp_path / "pred.json")
    found = evaluate_segments(read_temporal(phone / "annotations.json", tmp_path / "pred.json", "test"), "0.1,0.3,0.5")
    assert expected.average_mAP > .001
    np.testing.assert_allclose(found.mAP, expected.mAP, rtol=0, atol=1e-12)
    assert dataset.header == card.features


def test_one_broken_source_does_not_stop_the_others(phone, tmp_path):
    for name in ("a", "b"): (tmp_path / f"{name}.csv").write_bytes((phone / "tables" / "r0.csv").read_bytes())
    (tmp_path / "broken.csv").write_text("time,x,y\n0,1,1\n0,1,1\n")
    (tmp_path / "film.mp4").write_text("no film")
    np.save(tmp_path / "nan.npy", np.full((50, 16), np.nan, np.float32))
    np.save(tmp_path / "narrow.npy", np.zeros((50, 3), np.float32))
    np.save(tmp_path / "empty.npy", np.zeros((0, 16), np.float32))
    results = detect([tmp_path, tmp_path / "missing.csv"], phone / "model", tmp_path / "out", ("json", "srt", "csv"), threshold=0.)
    wrong = {id: str(r) for id, r in results.items() if isinstance(r, ValueError)}
    assert [id for id in results if id not in wrong] == ["a", "b"]
    for id, words in {"broken": "row 3: the same time stamp", "film": "film.mp4: a video cannot be used, the model was trained on windows", "nan": "nan.npy: NaN or infinite numbers in step 0",
                      "narrow": "narrow.npy: features [50, 3] came, the model needs 16", "empty": "empty.npy: an array of numbers", "missing": "missing.csv: no such file"}.items():
        assert words in wrong[id], wrong[id]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.csv", "a.json", "a.srt", "b.csv", "b.json", "b.srt"]


def test_writing_fails_for_one(phone, tmp_path, monkeypatch):
    "A source that cannot be written is told of, and the next one is written."
    (tmp_path / "out" / "r1.json").mkdir(parents=True)
    results = detect(phone / "tables", phone / "model", tmp_path / "out")
    assert isinstance(results["r1"], ValueError) and "r1.json: cannot be written" in str(results["r1"])
    assert [p.name for p in sorted((tmp_path / "out").glob("*")) if p.is_file()] == ["r0.json", "r2.json", "r3.json"]


@pytest.mark.parametrize("out, formats, several, words", [
    ("x.doc", (), False, "there is no format 'doc'"), ("x.srt", (), True, "holds one source, several came"), ("x.json", ("srt",), False, "is one file, but the formats srt came"),
    ("x", ("jsn",), False, "did you mean 'json'?"), ("file/x.json", (), False, "cannot be written"), ("/proc/x", (), False, "cannot be written")])
def test_outputs_are_refused_before_any_work(tmp_path, out, formats, several, words):
    from actloc.app.detect import FORMATS

    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=re.escape(words)): Writer(FORMATS, tmp_path / out, formats, None, several)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_features_of_another_network_are_refused(phone, tmp_path):
    model, card = load_model(phone / "model")
    made = FeatureHeader("r3d_18", 25., 8, 16, 16, "ab12", 112)
    card = dataclasses.replace(card, features=made, grid=made.grid)
    features = features_of(40, channels=16).T
    np.savez(tmp_path / "same.npz", feats=features, header=json.dumps(made.as_dict()), duration_s=13.)
    np.savez(tmp_path / "other.npz", feats=features, header=json.dumps(dataclasses.replace(made, weights="cd34", stride=4).as_dict()))
    np.savez(tmp_path / "clock.npz", feats=features, header=json.dumps({**made.as_dict(), "fps": 0}))
    assert detect(tmp_path / "same.npz", (model, card)).duration_s == 13.
    with pytest.raises(ValueError, match="other.npz: the model was trained on other features: stride 4 instead of 8; weights cd34 instead of ab12"): detect(tmp_path / "other.npz", (model, card))
    with pytest.raises(ValueError, match="clock.npz.*fps is 0"): detect(tmp_path / "clock.npz", (model, card))


def test_lazy_door_and_arrays(phone):
    model, card = load_model(phone / "model")
    features = windows(np.random.default_rng(0).normal(size=(200, 2)), 8, 4)
    a = actloc.detect(features, (model, card))
    assert isinstance(a, Found) and a.classes == card.classes and a.duration_s == 20.
    for other in (features.T.copy(), torch.from_numpy(features.copy()), iter([features])): assert same(a, actloc.detect(other, (model, card)))
    assert isinstance(a[a.scores > a.scores[3]], Found) and len(a[:3]) == 3
    with pytest.raises(AttributeError): actloc.detekt


# ---- a video

@pytest.fixture(scope="module")
def film(tmp_path_factory):
    folder = tmp_path_factory.mktemp("film")
    random = np.random.default_rng(0)
    write_video(folder / "film.mp4", (np.full((66, 98, 3), random.integers(0, 255), np.uint8) for _ in range(30)), 10)
    return folder


def test_annotated_video_and_page(film, tmp_path):
    from actloc.app.detect import FORMATS

    found = Found(np.array([[0, 1.5], [1, 3]]), np.array([0, 1]), np.array([.9, .8]), "film", ("walk <&>", "sit"), 3., str(film / "film.mp4"))
    FORMATS["mp4"].write(tmp_path / "out.mp4", [found], .2)
    video = open_video(tmp_path / "out.mp4")
    assert (video.frames, video.height, video.width) == (30, 66, 98) and abs(video.duration_s - 3) < .01
    assert np.abs(video.read([5])[0][:40].astype(int) - open_video(film / "film.mp4").read([5])[0][:40]).mean() < 8
    FORMATS["html"].write(tmp_path / "deep" / "out.html", [found], .2)
    page = (tmp_path / "deep" / "out.html").read_text()
    source = re.search(r'<video[^>]*src="([^"]+)"', page)[1]
    assert (tmp_path / "deep" / source).resolve() == (film / "film.mp4").resolve() and "walk &lt;&amp;&gt;" in page and "http:" not in page.split("</style>")[0]
    with pytest.raises(ValueError, match="source itself would be overwritten"): Writer(FORMATS, film / "film.mp4").write([found])


@pytest.mark.parametrize("seed", range(10))
def test_subtitles_of_random_detections(seed):
    "One after the other, never longer than what goes on, every moment says what is there."
    random = np.random.default_rng(seed)
    n = random.integers(1, 40)
    start = random.uniform(0, 60, n)
    found = Detections(np.stack([start, start + random.exponential(4, n) + .01], 1), random.integers(0, 4, n), random.uniform(0, 1, n))
    pieces = cues(found, .3, most=9)
    assert all(a.end <= b.start for a, b in zip(pieces, pieces[1:])) and all(c.start < c.end and c.labels for c in pieces)
    for t in random.uniform(0, 70, 50):
        expected = {int(k) for (s, e), k, p in zip(found.segments.round(3), found.labels, found.scores) if s <= t < e and p >= .3}
        assert {k for c in pieces if c.start <= t < c.end for k, _ in c.labels} == expected
    text = subtitles(found, ("a", "b\nc", "d --> e", "<f>"), "vtt", .3, 9)
    assert text.startswith("WEBVTT\n\n") and text.count(" --> ") == len(pieces) and "\n\n\n" not in text


# ---- the command line

needs_command = pytest.mark.skipif(not hasattr(cli, "add_detect"), reason="actloc.app.cli has no command detect yet")

@needs_command
def test_exit_codes(phone, tmp_path, capsys):
    (tmp_path / "broken.csv").write_text("time,x,y\n0,1,1\n0,1,1\n")
    good, model = str(phone / "tables" / "r0.csv"), str(phone / "model")
    assert cli.main(["detect", good, "--model", model, "--out", str(tmp_path / "a.json")]) == 0
    assert cli.main(["detect", good, str(tmp_path / "broken.csv"), "--model", model]) == 1
    assert "the same time stamp" in capsys.readouterr().err
    assert cli.main(["detect", good, "--model", str(tmp_path)]) == 2
    assert cli.main(["detect", good, "--model", model, "--out", str(tmp_path / "a.doc")]) == 2
