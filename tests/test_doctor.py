"""The doctor: never falls over a sick dataset, counts what one counts by hand, and says of a level what the trainer does."""
import copy
import csv
import gzip
import json
import math
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from actloc.app.doctor import advice_as_text, advise, as_json, as_text, training_subset, write_json, write_page
from actloc.core.header import FeatureHeader
from actloc.core.segments import FeatureGrid
from actloc.data.doctor import KINDS, Entry, Spans, channels_of, examine, finding, look_at, segment_findings, worst
from actloc.data.suggest import doubled_ranges, learning_levels, suggest

SHARED = Path(__file__).parents[2] / "shared" / "data"


def needs(*names):
    missing = [name for name in names if not (SHARED / name).exists()]
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} not in {SHARED}")


HEADER = FeatureHeader("r3d_18", fps=25, stride=4, num_frames=16, channels=6)


def prepared(folder, n=6, header=None, change=lambda i, features, facts: (features, facts)):
    "A healthy dataset of n recordings of 40 s; `change` makes it sick."
    (folder / "features").mkdir(parents=True, exist_ok=True)
    database = {}
    for i in range(n):
        features, facts = change(i, np.random.default_rng(i).normal(size=(247, 6)).astype(np.float32), {})
        if header: np.savez(folder / "features" / f"v{i}.npz", feats=features, header=json.dumps({**header.as_dict(), **facts.pop("header", {})}), **facts)
        else: np.save(folder / "features" / f"v{i}.npy", features)
        database[f"v{i}"] = {"subset": "training" if i % 3 else "test", "duration": 40, "fps": 25, "annotations": [{"label": "walk", "segment": [2, 6]}, {"label": "sit", "segment": [10, 21.5]}]}
    entry = {"folder": "features", "suffix": ".npz"} if header else {"folder": "features", "stride": 4, "num_frames": 16}
    (folder / "annotations.json").write_text(json.dumps({"classes": ["sit", "walk"], "features": entry, "database": database}))
    return folder


def test_healthy(tmp_path):
    assert examine(prepared(tmp_path / "npy")).counts == {}
    found = examine(prepared(tmp_path / "npz", header=HEADER))
    assert found.counts == {} and dict(found.facts)["network"] == "r3d_18"
    assert len(found.spans["training"].lengths) == 4 and found.spans["training"].lengths[0] == 247


@pytest.mark.parametrize("kind, change", [
    ("not finite", lambda i, x, f: (np.where((np.arange(247) == 9)[:, None] & (i == 2), np.inf, x), f)),
    ("channels disagree", lambda i, x, f: (x[:, : 5 if i == 2 else 6], f)),
    ("dead channel", lambda i, x, f: (np.where(np.arange(6) == 1, 0, x), f)),
    ("channel of other size", lambda i, x, f: (x * np.where(np.arange(6) == 1, 1e4, 1), f)),
    ("length disagrees", lambda i, x, f: (x[:120] if i == 2 else x, f)),
    ("length a little off", lambda i, x, f: (x[:235] if i == 2 else x, f)),
    ("steps repeat", lambda i, x, f: (np.repeat(x[::2], 2, 0)[:247] if i == 2 else x, f)),
    ("same features in two splits", lambda i, x, f: (np.random.default_rng(0).normal(size=(247, 6)).astype(np.float32) if i == 1 else x, f)),
    ("same features twice", lambda i, x, f: (np.random.default_rng(1).normal(size=(247, 6)).astype(np.float32) if i == 2 else x, f))])
def test_sick_features(tmp_path, kind, change):
    assert examine(prepared(tmp_path, change=change)).counts == {kind: 1}


@pytest.mark.parametrize("change, word", [
    (lambda i, x, f: (x, {"header": {"fps": 10.}} if i == 2 else {}), "fps 10 instead of 25"),
    (lambda i, x, f: (x, {"header": {"weights": "abc"}} if i == 2 else {}), "weights abc instead of unknown")])
def test_headers_that_differ(tmp_path, change, word):
    found = examine(prepared(tmp_path, header=HEADER, change=change))
    assert found.exit_code() == 1 and any(word in one.what and one.where == "v2" for one in found.findings if one.kind == "made differently")


def test_a_resampled_video_is_no_problem(tmp_path):
    "Features looked at 25 frames per second, the video and the annotation have 50."
    folder = prepared(tmp_path, header=HEADER, change=lambda i, x, f: (x, {"fps": 50., "duration_s": 40.}))
    path = folder / "annotations.json"
    path.write_text(path.read_text().replace('"fps": 25', '"fps": 50'))
    assert examine(folder).counts == {}
    path.write_text(path.read_text().replace('"fps": 50', '"fps": 30').replace('"duration": 40', '"duration": 60'))
    assert {"made differently", "video disagrees", "length disagrees"} <= set(examine(folder).counts)


def test_swapped_layout_and_wrong_stride(tmp_path):
    folder = prepared(tmp_path)
    assert "channels disagree" not in examine(folder, dict(folder=str(folder / "features"), stride=4, num_frames=16)).counts
    found = examine(folder, dict(folder=str(folder / "features"), stride=8, num_frames=16))
    assert found.counts["clock is off"] == 1 and "stride 4 instead of 8" in next(one.what for one in found.findings if one.kind == "clock is off")
    assert examine(folder, dict(folder=str(folder / "features"), stride=4, num_frames=16, layout="CT")).exit_code() == 1
    assert examine(folder, dict(folder=str(folder / "features"), stride=4, num_frames=16, channels=7)).counts == {"channels disagree": 6}


def test_videos(tmp_path):
    video = pytest.importorskip("actloc.data.video")
    folder = prepared(tmp_path, n=4)
    (folder / "clips").mkdir()
    frames = np.zeros((1000, 16, 16, 3), np.uint8)
    for i, n in enumerate((1000, 500, 1000)): video.write_video(folder / "clips" / f"v{i}.mp4", frames[:n], fps=25)
    whole = (folder / "clips/v2.mp4").read_bytes()
    (folder / "clips/v2.mp4").write_bytes(whole[: len(whole) // 2])
    found = examine(folder, videos=folder / "clips")
    assert found.counts == {"no video": 1, "video unreadable": 1, "video disagrees": 1}
    assert "lasts 20.00 s, the annotation says 40 s" in next(one.what for one in found.findings if one.kind == "video disagrees")


def test_key_frames_outside(tmp_path):
    video = pytest.importorskip("actloc.data.video")
    (tmp_path / "clips").mkdir()
    video.write_video(tmp_path / "clips/a.mp4", np.zeros((50, 16, 16, 3), np.uint8), fps=10)
    video.write_video(tmp_path / "clips/b_900_905.mp4", np.zeros((50, 16, 16, 3), np.uint8), fps=10)
    (tmp_path / "train.csv").write_text("".join(f"{name},{second},0.1,0.1,0.5,0.9,1,7\n" for name, second in (("a", 3), ("a", 9), ("b", 902), ("b", 3), ("c", 1))))
    found = examine(tmp_path, videos=tmp_path / "clips")
    assert found.counts == {"key frame outside its video": 2, "no video": 1}
    assert {one.where for one in found.findings} == {"train: a,0009", "train: b,0003", "c"}


STRANGE = (None, True, [], {}, "", "nan", -1, 0, 1e300, float("nan"), float("inf"), [[]], "walk", {"label": 3}, ["x", "y"], [5, 2], 10 ** 400)


def places(node, path=()):
    yield path
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else (): yield from places(value, path + (key,))


def test_nothing_makes_it_fall_over(tmp_path):
    "Any one value of the file replaced by anything: the doctor still reports, and its JSON stays JSON."
    healthy = json.loads((prepared(tmp_path, n=2) / "annotations.json").read_text())
    healthy["database"]["v0"]["annotations"][0]["label_id"] = 1
    draw = random.Random(0)
    for path in list(places(healthy))[1:]:
        for strange in draw.sample(STRANGE, 5):
            sick = copy.deepcopy(healthy)
            node = sick
            for key in path[:-1]: node = node[key]
            node[path[-1]] = strange
            (tmp_path / "annotations.json").write_text(json.dumps(sick))
            found = examine(tmp_path)
            json.dumps(as_json(found), allow_nan=False)
            assert as_text(found)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", '{"database": []}', '{"database": {"a": 3, "b": [1]}}', '{"results": {}}', "\x00\x01"])
def test_no_annotations(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    found = examine(tmp_path / "a.json")
    assert found.exit_code() == 1 and as_text(found)
    with pytest.raises(ValueError, match="not known"): advise(found)


def test_box_files_that_are_none(tmp_path):
    (tmp_path / "train.csv").write_text("video,second,x1,y1,x2,y2,class\na,1,0.1,0.1,0.5,0.9,1\na,1e99,0.1,0.1,0.5,0.9,1\na,2,0.1,nan,0.5,0.9,1\n,2,0,0,1,1,1\n")
    (tmp_path / "notes.csv").write_text("hello\n")
    (tmp_path / "gone.csv.gz").write_bytes(gzip.compress(b"a,1,0,0,1,1,1\n" * 500)[:30])
    (tmp_path / "map.pbtxt").write_text("item {")
    found = examine(tmp_path)
    assert found.counts == {"file unreadable": 3, "row unreadable": 3, "box outside": 1}


def test_worst_keeps_the_worst():
    draw = random.Random(1)
    some = [finding(draw.choice(list(KINDS)), str(i), "", draw.randrange(50)) for i in range(3000)]
    few, counts = worst(some, keep=7)
    assert counts == {kind: n for kind in KINDS if (n := sum(one.kind == kind for one in some))}
    for kind in counts:
        kept = [one.number for one in few if one.kind == kind]
        assert kept == sorted((one.number for one in some if one.kind == kind), reverse=True)[:7]


def test_channels_join_in_any_pieces():
    rng = np.random.default_rng(0)
    for _ in range(20):
        x = rng.normal(rng.normal(0, 1e4, 5), rng.uniform(.1, 9, 5), (rng.integers(2, 300), 5))
        cuts, joined = np.sort(rng.integers(0, len(x) + 1, 4)), None
        for piece in np.split(x, cuts):
            if len(piece): joined = channels_of(piece) if joined is None else joined.joined(channels_of(piece))
        np.testing.assert_allclose(joined.mean, x.mean(0), rtol=1e-12)
        np.testing.assert_allclose(joined.deviation, x.std(0), rtol=1e-9)
        assert (joined.n, joined.low.tolist(), joined.high.tolist()) == (len(x), x.min(0).tolist(), x.max(0).tolist())


def test_blocks_do_not_show():
    x = np.random.default_rng(0).normal(size=(5000, 3))
    x[[3000, 4500], 1] = np.nan
    look = look_at(x)
    assert (look.bad, look.first_bad, look.channels.n) == (2, 3000, 4998)
    np.testing.assert_allclose(look.channels.mean, np.nanmean(x[~np.isnan(x).any(1)], 0))


def test_segments_by_definition():
    "Random segments on a coarse raster, so that ends meet points, each other and the recording's end."
    rng, grid = np.random.default_rng(0), FeatureGrid(16, 4, 16)                # exact in binary
    for _ in range(30):
        positions = rng.integers(-6, 60, (40, 2)) / 2
        entry = Entry("a", "", float(grid.to_seconds(24)), 25., grid.to_seconds(positions), ("walk",) * 40)
        found = Counter(one.kind for one in segment_findings(entry, grid, steps=24))
        end, wanted = entry.duration_s, Counter()
        for (s, e), (a, b) in zip(entry.segments_s, positions):
            if s >= e: wanted["segment reversed" if s > e else "segment without length"] += 1
            elif s >= end or e <= 0: wanted["segment outside"] += 1
            else:
                over = max(e - end, -s)
                if over > 0: wanted["segment beyond the end" if over > 1 else "end rounded up"] += 1
                if not any(a < t < b for t in range(24)): wanted["no point inside"] += 1
                elif b - a < 1: wanted["shorter than a step"] += 1
        assert found == wanted


def test_levels_learn_what_the_trainer_assigns():
    torch = pytest.importorskip("torch")
    from actloc.actionformer.points import assign, make_points
    rng, ranges = np.random.default_rng(0), doubled_ranges(6)
    lengths = [512 // 2 ** l for l in range(6)]
    points = make_points(lengths, ranges)
    level = np.repeat(np.arange(6), lengths)
    for _ in range(300):
        start = rng.uniform(0, 250)
        segment = np.array([[start, min(start + np.exp(rng.uniform(np.log(.2), np.log(250))), 500)]])
        positive = assign(points, [torch.tensor(segment).float()], [torch.tensor([0])], 1)[0][0, :, 0].numpy() > 0
        assert set(np.flatnonzero(learning_levels(segment.astype(np.float32).astype(float), ranges)[0])) == set(level[positive]), segment


def test_suggestions_build_a_model():
    torch = pytest.importorskip("torch")
    import yaml
    from actloc.actionformer.model import ActionFormerConfig
    rng = np.random.default_rng(0)
    for longest, length in ((2, 20), (8, 300), (300, 900), (5000, 5000), (5, 3)):
        start = rng.uniform(0, 5, 200)
        spans = Spans(np.stack([start, start + rng.uniform(.1, longest, 200)], 1), rng.integers(max(1, length // 2), length + 1, 30))
        advice = suggest(spans)
        settings = yaml.safe_load(advice.as_yaml())["model"]
        assert ActionFormerConfig(input_dim=8, num_classes=2, **settings).levels == advice.levels == len(advice.regression_ranges)
        assert advice.fitting >= .8 and 0 <= advice.unlearned <= 1 and max(advice.shares) <= 1


def test_page_and_json_are_written(tmp_path):
    folder = prepared(tmp_path / "mine", change=lambda i, x, f: (np.full_like(x, np.nan) if i == 2 else x, f))
    found = examine(folder)
    subset = training_subset(found)
    page = write_page(tmp_path / "page.html", found, advise(found), subset).read_text()
    assert "Not finite" in page and "max_seq_len" in page and "<script>alert" not in page
    content = json.loads(write_json(tmp_path / "out.json", found, advise(found)).read_text())
    assert content["counts"] == found.counts and not content["healthy"]
    assert not list(tmp_path.glob(".*part"))
    assert "max_seq_len" in advice_as_text(found, advise(found), subset)


def test_names_are_escaped(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"database": {"<script>alert(1)</script>": {"subset": "training", "annotations": [{"label": "<b>walk", "segment": [2, 1]}]}}}))
    assert "<script>alert" not in write_page(tmp_path / "page.html", examine(tmp_path / "a.json")).read_text()


# --- Real annotations, counted a second way ---

@needs("thumos14.json")
def test_thumos14():
    found = examine(SHARED / "thumos14.json", dict(folder="none", stride=4, num_frames=16), read_features=False)
    database = json.loads((SHARED / "thumos14.json").read_text())["database"]
    outside = twice = 0
    for entry in database.values():
        rows = entry["annotations"]
        outside += sum(row["segment"][0] >= entry["duration"] for row in rows)
        times = Counter(tuple(row["segment"]) for row in rows)
        twice += sum(math.comb(n, 2) for n in times.values())
    assert found.counts == {"segment outside": outside, "two labels for one segment": twice} and outside == 30
    assert {one.where.split(",")[0] for one in found.findings if one.kind == "segment outside"} == {id for id, e in database.items() if any(r["segment"][0] >= e["duration"] for r in e["annotations"])}
    advice = advise(found, "validation")
    assert (advice.levels, advice.max_seq_len, advice.regression_ranges[-1]) == (6, 2304, (64, 10000))


@needs("anet13_groundtruth.json.gz")
def test_activitynet():
    found = examine(SHARED / "anet13_groundtruth.json.gz")
    database = json.loads(gzip.decompress((SHARED / "anet13_groundtruth.json.gz").read_bytes()))["database"]
    rows = [(entry, row) for entry in database.values() for row in entry["annotations"]]
    assert found.counts["segment without length"] == sum(row["segment"][0] == row["segment"][1] for _, row in rows)
    assert found.counts["no segment"] == sum(not entry["annotations"] for entry in database.values())
    assert found.counts["end rounded up"] == sum(row["segment"][0] < row["segment"][1] and entry["duration"] < row["segment"][1] <= entry["duration"] + 1 for entry, row in rows)


@needs("epic_kitchens_100")
def test_epic_kitchens():
    found = examine(SHARED / "epic_kitchens_100", task="noun")
    with open(SHARED / "epic_kitchens_100/EPIC_100_validation.csv", newline="") as file: used = {row["noun_class"] for row in csv.DictReader(file)}
    assert found.counts["label without example"] == 300 - len(used) and found.exit_code() == 0


@needs("ava")
def test_ava():
    found = examine(SHARED / "ava")
    rows = [line.split(",") for line in gzip.decompress((SHARED / "ava/ava_val_v2.1.csv.gz").read_bytes()).decode().split()]
    assert found.counts["unknown class"] == 1 and f"{sum(row[6] == '2' for row in rows)} rows" in next(one.what for one in found.findings if one.kind == "unknown class")
    assert dict(found.facts)["rows in ava_val_v2.1"] == len(rows)


@pytest.mark.skipif(not (Path(__file__).parents[1] / "data/hapt/annotations.json").exists(), reason="data/hapt is not prepared: make data/hapt/annotations.json")
def test_hapt_is_healthy():
    found = examine(Path(__file__).parents[1] / "data/hapt")
    assert found.counts == {} and dict(found.facts)["feature steps"] == 44823
    assert advise(found).levels == 6
