"""People from files and tables: a plain-Python definition in random sweeps, real files, and bad input."""
import gzip
import pickle
from collections import defaultdict
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from actloc.core.ava import KeyFrames, LabelMap, box_table, read_boxes, read_label_map
from actloc.data import people
from actloc.data.people import (PersonTable, check_people, grouped, known_but_not_learnt, people_from, read_people, read_people_by_definition, read_people_file,
                                read_release, table_of)

SHARED = Path(__file__).parents[2] / "shared" / "data" / "ava"
needs = lambda name: pytest.mark.skipif(not (SHARED / name).exists(), reason=f"{SHARED / name} is not here (shared files are optional)")
LABELS = LabelMap((2, 3, 5, 7), ("two", "three", "five", "seven"))


def same_table(a, b):
    for f in fields(PersonTable): np.testing.assert_array_equal(getattr(a, f.name), getattr(b, f.name), f.name)


def write(path, text):
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


# ---- reading: both readers say the same, also about what cannot be read

def random_line(rng, width, odd):
    cells = [rng.choice(["v0", "v1", "a-b_c", "v 3"]), rng.choice(["902", "0903", "904.0", "17.010000", "-3.5"]), *(f"{x:.3f}" for x in rng.random(4)),
             rng.choice(["2", "3", "-1", "", "7.0", "80"]), rng.choice(["0", "1", "0.25", "1e-3"])]
    if odd and rng.random() < .02: cells[rng.integers(8)] = rng.choice(["", "x", "nan", "inf", "2.5", " ", "1e30"])
    line = ",".join(cells[:width])
    return line if rng.random() > .01 else rng.choice(["", "   ", '"v1",903', line + "\r"])


@pytest.mark.parametrize("seed", range(60))
def test_the_fast_reader_is_the_definition(seed, tmp_path):
    rng = np.random.default_rng(seed)
    widths = [(8,), (7,), (8, 8, 2), (7, 7, 2), (7, 8), (2,), (2, 8, 8), (3, 8)][seed % 8]
    text = "\n".join(random_line(rng, rng.choice(widths), seed >= 30) for _ in range(rng.integers(1, 60))) + "\n" * rng.integers(3)
    path = write(tmp_path / rng.choice(["x.csv", "x.csv.gz"]), text if seed % 7 else "\ufeff" + text)
    for detected in (True, False):
        try: expected, error = read_people_by_definition(path, detected), None
        except ValueError as e: error = str(e)
        if error is None: same_table(read_people_file(path, detected), expected)
        else:
            with pytest.raises(ValueError) as found: read_people_file(path, detected)
            assert str(found.value) == error and str(path) in error


def test_the_fast_reader_reads(tmp_path, monkeypatch):
    """The sweep would pass with a fast reader that always gives up."""
    text = "v,902,.1,.1,.2,.2,2,.9\nv,903\n\nw,17.5,.1,.1,.2,.2,,.8\nw,904\n"
    for name, detected, width in (("a.csv", True, 8), ("a.csv.gz", True, 8), ("b.csv", False, 8), ("c.csv", False, 7)):
        path = write(tmp_path / name, "\n".join(",".join(line.split(",")[:width]) for line in text.split("\n")))
        table = people._from_columns(f"{path}, row", detected, *people._read_columns(path))
        assert table.row.tolist() == [1, 2, 4, 5] and table.has_box.tolist() == [True, False, True, False]
        same_table(table, read_people_by_definition(path, detected))
    monkeypatch.setattr(people, "read_people_by_definition", lambda *_: pytest.fail("left to the definition"))
    same_table(read_people_file(path, detected), table)


def test_no_column_is_shared_between_score_and_person(tmp_path):
    path = write(tmp_path / "x.csv", "v,902,.1,.1,.2,.2,2,3\n")
    truth, found = read_people_file(path, False), read_people_file(path, True)
    assert (truth.scores, truth.person, found.scores, found.person) == (1, 3, 3, -1)


# ---- people: the definition in plain Python

def people_by_definition(tables, excluded, min_score, label_map):
    """{(video, time): [(box, score, targets)]} as a person would collect it: ground truth first, boxes as they appear."""
    found = defaultdict(dict)
    for table in tables:
        for i in range(len(table)):
            video, time = table.videos[table.video[i]], round(float(table.time_s[i]) * 1e6)
            if (video, time // 10**6) in excluded: continue
            boxes = found[video, time]
            if not table.has_box[i]: continue
            detected = bool(table.detected[i])
            box = boxes.setdefault((detected, -1 if detected else float(table.person[i]), *table.boxes[i].tolist()), [-np.inf, set()])
            box[0] = max(box[0], float(table.scores[i]))
            if int(table.labels[i]) in label_map.ids: box[1].add(label_map.ids.index(int(table.labels[i])))
    videos = list(dict.fromkeys(name for table in tables for name in table.videos))
    result = {}
    for video, time in sorted(found, key=lambda key: (videos.index(key[0]), key[1])):
        rows = [(key[2:], score, targets) for key, (score, targets) in sorted(found[video, time].items(), key=lambda item: item[0][0]) if not key[0] or score >= min_score]
        result[video, time] = rows
    return result


def random_table(rng, detected, source, n=150):
    """Few boxes, so that many rows are one box; some key frames without boxes."""
    boxes = np.array([[.1, .1, .5, .5], [.1, .1, .5, .6], [0, 0, 1, 1], [.2, .2, .2, .2]])
    times = np.array([902, 903, 17.61, 905, 906, 8, 9])
    has_box = rng.random(n) < .8
    return people.person_table(source, ("a", "b", "c") if detected else ("b", "a"), detected, np.arange(1, n + 1), rng.integers(0, 3 if detected else 2, n),
                               rng.choice(times, n), has_box, boxes[rng.integers(0, 4, n)], rng.choice([2, 3, 5, 7, -1, 9], n),
                               rng.integers(0, 4, n) / 4 if detected else None, None if detected else rng.integers(-1, 3, n))


@pytest.mark.parametrize("seed", range(40))
def test_people_are_the_definition(seed):
    rng = np.random.default_rng(seed)
    truth, found = [random_table(rng, False, f"t{i}", rng.integers(0, 90)) for i in range(rng.integers(3))], [random_table(rng, True, f"d{i}", rng.integers(1, 90)) for i in range(rng.integers(1, 3))]
    min_score, excluded = float(rng.choice([0, .5, .75, 1.5])), [("a", 903), ("b", 17), ("z", 902)][:rng.integers(4)]
    exclusions = KeyFrames(("a", "b", "z"), [["a", "b", "z"].index(v) for v, _ in excluded], [s for _, s in excluded]) if excluded else None
    got = people_from(truth, found, label_map=LABELS, exclusions=exclusions, min_score=min_score, ignored=[9])
    expected = people_by_definition(truth + found, excluded, min_score, LABELS)
    assert [(got.video(k), round(got.time_s[k] * 1e6)) for k in range(len(got.keyframes))] == list(expected)
    assert [got.keyframes.second[k] for k in range(len(got.keyframes))] == [time // 10**6 for _, time in expected]
    for k, rows in enumerate(expected.values()):
        mine = got.of(k)
        assert [(tuple(b), s, set(np.flatnonzero(t).tolist())) for b, s, t in zip(got.boxes[mine].tolist(), got.scores[mine], got.targets[mine])] == rows
        source, row = got.named_by[k]
        table = next(t for t in truth + found if t.sources[0] == got.sources[source])
        i = row - 1
        assert (table.videos[table.video[i]], round(table.time_s[i] * 1e6)) == (got.video(k), round(got.time_s[k] * 1e6))
    assert (np.diff(got.keyframe) >= 0).all() and len(got.boxes) == len(got.scores) == len(got.targets) == len(got) == sum(map(len, expected.values()))


def test_inputs_stay_as_they_are():
    rng = np.random.default_rng(0)
    truth, found = random_table(rng, False, "t"), random_table(rng, True, "d")
    before = {f.name: np.copy(getattr(found, f.name)) for f in fields(PersonTable)}
    people_from(truth, found, label_map=LABELS, ignored=[9], min_score=.5)
    for name, value in before.items(): np.testing.assert_array_equal(getattr(found, name), value)


@pytest.mark.parametrize("seed", range(20))
def test_grouped(seed):
    rng = np.random.default_rng(seed)
    columns = [rng.integers(0, 3, rng.integers(0, 50)) for _ in range(1)]
    columns += [rng.integers(0, 2, len(columns[0])) / 3 for _ in range(seed % 3)]
    index = {}
    expected = [index.setdefault(key, len(index)) for key in zip(*columns)]
    group, first = grouped(*columns)
    assert group.tolist() == expected and first.tolist() == [expected.index(g) for g in range(len(index))]


def test_box_tables_are_tables():
    frames, boxes = [("a", 902), ("b", 5), ("a", 903), ("c", 1)], [[[.1, .1, .2, .2]] * 2, [[0, 0, 1, 1]], [], []]
    truth, found = box_table(frames, boxes, [[2, 5], [3], [], []]), box_table(frames, boxes, [[2, -1], [-1], [], []], [[.9, .9], [.3], [], []])
    got = people_from(truth, found, label_map=LABELS, min_score=.5)
    assert [got.keyframes.name(k) for k in range(4)] == ["a,0902", "a,0903", "b,0005", "c,0001"]
    assert got.scores.tolist() == [1, .9, 1] and got.targets.tolist() == [[1, 0, 1, 0], [1, 0, 0, 0], [0, 1, 0, 0]]
    assert got.where(0) == "table of ground truth, row 1 (video a, second 902)"
    again = table_of(people_from(truth, label_map=LABELS))
    assert again.labels.tolist() == [2, 5, 3] and [again.keyframes.name(k) for k in again.keyframe] == ["a,0902", "a,0902", "b,0005"]
    scores = np.arange(12).reshape(3, 4) / 12
    answers = table_of(got, scores[[2, 0]], rows=[2, 0])
    assert answers.scores.tolist() == [*scores[2], *scores[0]] and answers.labels.tolist() == [2, 3, 5, 7] * 2
    assert answers.boxes[:4].tolist() == [[0, 0, 1, 1]] * 4 and answers.keyframe.tolist() == [2] * 4 + [0] * 4


def test_the_same_second_of_two_videos_is_two_key_frames():
    got = people_from(box_table([("a", 902), ("b", 902)], [[[0, 0, 1, 1]], [[0, 0, 1, 1]]], [[2], [3]]), label_map=LABELS)
    assert len(got.keyframes) == 2 and got.keyframe.tolist() == [0, 1]


def test_rounding_errors_of_a_detector_are_no_mistake():
    got = people_from(detections=box_table([("a", 902)], [[[-1e-7, 0, .5, 1 + 1e-7]]], [[2]], [[.9]]), label_map=LABELS)
    assert got.boxes.tolist() == [[0, 0, .5, 1]]


def test_ignored_ids():
    ava = LabelMap(tuple(range(1, 61)), tuple(map(str, range(60))))
    assert 61 in known_but_not_learnt(ava) and 81 not in known_but_not_learnt(ava) and not known_but_not_learnt(LABELS)
    table = box_table([("a", 1)], [[[0, 0, 1, 1]] * 2], [[61, 2]])
    assert people_from(table, label_map=ava).targets.sum() == 1
    with pytest.raises(ValueError, match="does not have this action"): people_from(table, label_map=ava, ignored=())
    for label in (0, 81, -2):
        with pytest.raises(ValueError, match="row 1 .*does not have this action"): people_from(box_table([("a", 1)], [[[0, 0, 1, 1]]], [[label]]), label_map=ava)


# ---- real files

@needs("ava_val_v2.1.csv.gz")
def test_the_real_file():
    label_map = read_label_map(SHARED / "ava_action_list_v2.1_for_activitynet_2018.pbtxt")
    path = SHARED / "ava_val_v2.1.csv.gz"
    table, plain = read_people_file(path, False), read_boxes(path, scores=False)
    assert len(table) == len(plain) and np.array_equal(table.boxes, plain.boxes) and np.array_equal(table.labels, plain.labels)
    people._from_columns("", False, *people._read_columns(path))                    # not left to the definition
    got = read_people(path, label_map=label_map)
    assert len(got.keyframes) == len(plain.keyframes) == 50_029 and len(set(got.keyframes.videos)) == 64 and got.targets.shape == (93_393, 60)
    in_map = np.isin(plain.labels, label_map.ids)
    triples = {(plain.keyframes.name(k), *b, label) for k, b, label in zip(plain.keyframe[in_map], plain.boxes[in_map].tolist(), plain.labels[in_map])}
    row, k = np.nonzero(got.targets)
    assert {(got.keyframes.name(got.keyframe[i]), *got.boxes[i].tolist(), label_map.ids[c]) for i, c in zip(row, k)} == triples
    assert got.where(0) == f"{path}, row 1 (video _7oWZq_s_Sk, second 1636)" or got.named_by[0, 1] > 0


# ---- the release's pickles

CLASSES = {i: {"id": label, "name": name} for i, (label, name) in enumerate(zip(LABELS.ids, LABELS.names))}


@pytest.mark.parametrize("seed", range(10))
def test_release(seed, tmp_path):
    rng = np.random.default_rng(seed)
    entries, rows = [], []
    for n in range(20):
        labels = [{"bounding_box": np.sort(rng.random((2, 2)), 0).ravel() if seed % 2 else np.sort(rng.random((2, 2)), 0).ravel().tolist(),
                   "label": rng.choice(4, rng.integers(0, 4), replace=False).tolist()} for _ in range(rng.integers(0, 4))]
        entries.append({"video": f"v{n % 3}", "time": 900 + n if n % 2 else f"0{900 + n}", "start_frame": 1, "n_frames": 64, "format_str": "image_%06d.jpg", "labels": labels})
        rows += [(f"v{n % 3}", 900 + n, tuple(map(float, box["bounding_box"])), set(box["label"])) for box in labels]
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps((entries, CLASSES), seed % 6))
    got = read_release(path)
    assert got.label_map == LABELS and len(got.keyframes) == 20 and (got.scores == 1).all()
    mine = [(got.video(k), got.keyframes.second[k], tuple(b), set(np.flatnonzero(t).tolist())) for k, b, t in zip(got.keyframe, got.boxes.tolist(), got.targets)]
    key = lambda row: (row[0], row[1], row[2])
    assert sorted(mine, key=key) == sorted(rows, key=key)
    fewer = LabelMap((3, 7), ("three", "seven"))
    with pytest.raises(ValueError, match="entry .*does not have this action"): read_release(path, fewer)


def test_release_of_detections_without_labels_key(tmp_path):
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps(([{"video": "v", "time": 902, "labels": [{"bounding_box": [0, 0, 1, 1]}, {"bounding_box": [0, 0, 1, 1], "label": None}]}], CLASSES)))
    assert read_release(path).targets.tolist() == [[0] * 4] * 2                     # two people in one box stay two


# ---- bad input

GOOD = "v,902,0,0,1,1,2,.9\n"


@pytest.mark.parametrize("line, says", [
    ("v,902,-0.01,0,1,1,2,.9", "row 3 .*leaves the frame"), ("v,902,0,0,1,1.01,2,.9", "row 3 .*leaves the frame"), ("v,902,10,20,110,220,2,.9", "row 3 .*no pixels"),
    ("v,902,nan,0,1,1,2,.9", "row 3 .*NaN"), ("v,902,0,inf,1,1,2,.9", "row 3 .*leaves"), ("v,902,.5,0,.4,1,2,.9", "row 3 .*reversed"), ("v,902,0,.5,1,.4,2,.9", "row 3 .*reversed"),
    ("v,902,0,0,1,1,4,.9", "row 3 .*label map does not have this action; it has 2, 3, 5, 7"), ("v,902,0,0,1,1,2,nan", "row 3 .*score is NaN"), ("v,902,0,0,1,1,2.5,.9", "row 3: the action '2.5'"),
    ("v,902,0,0,1,1,nan,.9", "row 3: the action 'nan'"), ("v,902,0,0,1,1,two,.9", "row 3: the action 'two'"), ("v,902,0,0,1,1,inf,.9", "row 3: the action 'inf'"), ("v,902,0,0,1,1,2,", "row 3: the score ''"), ("v,902,,0,1,1,2,.9", "row 3: x1 ''"),
    ("v,,0,0,1,1,2,.9", "row 3: the second ''"), ("v,1e20,0,0,1,1,2,.9", "row 3: the second '1e20'"), (",902,0,0,1,1,2,.9", "row 3: no video"), ("v,902,0,0,1,1", "row 3: 6 columns"),
    ("v,902,0,0,1,1,2,.9,1", "row 3: 9 columns"), ("v,902.25,0,0,1,1,2,.9", "row 1 .*second 902.* and .*row 3 .*second 902.25.*one second"), ("v", "row 3: 1 columns"), (",903", "row 3: no video")])
def test_bad_rows(line, says, tmp_path):
    path = write(tmp_path / "bad.csv", GOOD + "\n" + line + "\n" + GOOD)
    with pytest.raises(ValueError, match=f"bad.csv, {says}"): read_people(detections=path, label_map=LABELS)


def test_bad_files(tmp_path):
    for name, data, says in (("cut.csv.gz", gzip.compress(GOOD.encode() * 500)[:-9], "cut off or damaged"), ("text.csv", b"\xff\xfe\x00", "no text"), ("none.csv", b"", "empty"), ("blank.csv", b"\n\n", "empty")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=f"{name}.*{says}"): read_people(tmp_path / name, label_map=LABELS)
    with pytest.raises(ValueError, match="absent.csv: no such file"): read_people(tmp_path / "absent.csv", label_map=LABELS)
    with pytest.raises(ValueError, match="no table came"): read_people(label_map=LABELS)


def test_the_row_is_named_across_files(tmp_path):
    a, b = write(tmp_path / "a.csv", GOOD), write(tmp_path / "b.csv", "\n" + GOOD + GOOD.replace("0,0,1,1", "0,0,1,2"))
    with pytest.raises(ValueError, match="b.csv, row 3 .*leaves"): read_people(detections=[a, b], label_map=LABELS)
    with pytest.raises(ValueError, match="b.csv, row 3 .*leaves"): read_people(b, a, label_map=LABELS)


@pytest.mark.parametrize("content, says", [
    ([1, 2], "dictionary of place"), (3, "a pair of annotations"), (([], CLASSES), "no annotations"), (([{"video": "v"}], CLASSES), "entry 1: KeyError 'time'"), (([3], CLASSES), "entry 1: TypeError"),
    (([{"video": "v", "time": 1, "labels": [{"bounding_box": [0, 0, 1], "label": []}]}], CLASSES), "entry 1: ValueError"),
    (([{"video": "v", "time": 1, "labels": [{"bounding_box": [0, 0, 1, 9], "label": [0]}]}], CLASSES), "entry 1 .*leaves the frame"),
    (([{"video": "v", "time": 1, "labels": [{"bounding_box": [0, 0, 1, 1], "label": [4]}]}], CLASSES), "entry 1: KeyError 4"),
    (([{"video": "v", "time": float("nan"), "labels": []}], CLASSES), "entry 1"), (([], {0: {"name": "x"}}), "dictionary of place")])
def test_bad_pickles(content, says, tmp_path):
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=f"x.pkl.*{says}"): read_release(tmp_path / "x.pkl")


def test_a_pickle_that_acts_is_refused(tmp_path):
    class Evil:
        def __reduce__(self): return open, (str(tmp_path / "made"), "w")
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(([Evil()], CLASSES)))
    with pytest.raises(ValueError, match="x.pkl.*refused"): read_release(tmp_path / "x.pkl")
    assert not (tmp_path / "made").exists()
