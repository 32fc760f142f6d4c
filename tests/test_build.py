"""Building datasets: every kind of file, wrong ones, splits that keep people apart, and the road to a reader that finds nothing to refuse."""
import itertools
import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from actloc.core.header import FeatureHeader
from actloc.data.build import Film, Films, build, find_features, one_sided, read_cvat, read_elan, read_labels, read_subtitles, read_table, read_via, read_xml, seconds, stratified
from actloc.data.doctor import examine
from actloc.data.recordings import read_dataset

SIZED = Films(known=Film(fps=25, width=100, height=50))


def write(path, text, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, **options)
    return path


# --- Tables ---

@pytest.mark.parametrize("text, encoding", [("video,start,end,label\na,1,2,gehen\n", "utf-8-sig"), ("Video;Start;End;Label\r\na;1;2;gehen\r\n", "utf-8"),
                                            ("file\tonset\toffset\tactivity\na.mp4\t0:00:01\t0:02\tgehen\n", "utf-16"), ('"clip name","begin (s)","stop","class"\n"a",1,2,"gehen"\n', "utf-8")])
def test_tables_of_many_looks(tmp_path, text, encoding):
    columns = {"video": "clip name"} if "clip name" in text else None
    [row] = read_table(write(tmp_path / "l.csv", text, encoding=encoding), columns).segments
    assert (row.video, row.start_s, row.end_s, row.label) == ("a", 1, 2, "gehen")


def test_what_looks_like_a_data_frame():
    frame = SimpleNamespace(columns=["video", "start", "end", "label"], to_dict=lambda how: [{"video": "a", "start": np.float64(1), "end": 2, "label": "walk"}])
    assert read_table(frame).segments[0].end_s == 2
    for wrong in (3, "none.csv", [1, 2], {"video": ["a"], "start": [1, 2], "end": [1], "label": ["x"]}):
        with pytest.raises(ValueError): read_table(wrong)


@pytest.mark.parametrize("text, word", [
    ("", "no column for video"), ("video,start,end,label\n", "no row below"), ("video,start,end,label\na,1,2,walk,9\n", "row 2: 4 cells are needed, as in the first line; 5 came"),
    ("video,start,end,label\na,one,2,walk\n", "row 2: start is 'one'"), ("video,start,end,label\na,1,2,\n", "row 2: no label"), ("video,start,end,label\n,1,2,walk\n", "row 2: no video"),
    ("video,start,end,label\na,2,2,walk\n", "row 2: walk ends at 2 s"), ("video,start,end,label\na,1,nan,walk\n", "end is 'nan'"), ("video,start,end,label\na,-1,3,walk\n", "start is '-1'")])
def test_bad_tables(tmp_path, text, word):
    with pytest.raises(ValueError, match="l.csv") as error: read_table(write(tmp_path / "l.csv", text))
    assert word in str(error.value)


def test_a_table_that_is_no_text(tmp_path):
    (tmp_path / "l.csv").write_bytes("video,start,end,label\na,1,2,öffnen\n".encode("latin-1"))
    with pytest.raises(ValueError, match="l.csv: not text in UTF-8"): read_table(tmp_path / "l.csv")


def test_clock_times_sweep():
    draw = np.random.default_rng(0)
    for s in np.r_[0, 59.999, 60, 3599.5, 3600, draw.uniform(0, 99999, 300).round(3)]:
        for text in (f"{s:.3f}", f"{int(s // 3600)}:{int(s % 3600 // 60):02d}:{s % 60:06.3f}", f"{int(s // 3600):02d}:{int(s % 3600 // 60):02d}:{s % 60:06.3f}".replace(".", ",")):
            if text.endswith(("60.000", "60,000")): continue
            assert abs(seconds(text, "", "") - s) < 1e-6, text


# --- Files of programs ---

BOMB = '<?xml version="1.0"?><!DOCTYPE a [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;"><!ENTITY c "&b;&b;&b;&b;&b;&b;">]><a>&c;</a>'

@pytest.mark.parametrize("text", [BOMB, '<!DOCTYPE a SYSTEM "file:///etc/passwd"><a/>', '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/hostname">]><a>&x;</a>'])
@pytest.mark.parametrize("read", [read_xml, read_elan, read_cvat])
def test_no_doctype(tmp_path, text, read):
    with pytest.raises(ValueError, match="DOCTYPE"): read(write(tmp_path / "a.xml", text))


@pytest.mark.parametrize("name, text, word", [
    ("a.eaf", "<ANNOTATION_DOCUMENT>", "cut off"), ("a.eaf", "<ANNOTATION_DOCUMENT/>", "no annotation"), ("a.xml", "<annotations/>", "neither tracks nor tags"),
    ("a.xml", '<annotations><image id="x"><tag label="walk"/></image></annotations>', "line 1: id is 'x'"), ("a.json", "{}", "neither a VIA 3"), ("a.json", "[1]", "neither a VIA 3"), ("a.json", '{"a": 1', "cut off"),
    ("a.srt", "hello\n", "no subtitle"), ("a.srt", "00:00:02,000 --> 00:00:01,000\nwalk\n", "line 1: walk ends"), ("a.srt", "now --> then\nwalk\n", "line 1"), ("a.vtt", "WEBVTT\n\n00:01.000 --> 00:02.000\n\n", "no label"),
    ("a.eaf", '<A><TIME_ORDER><TIME_SLOT TIME_SLOT_ID="1" TIME_VALUE="5"/></TIME_ORDER><TIER TIER_ID="t"><ALIGNABLE_ANNOTATION ANNOTATION_ID="a1" TIME_SLOT_REF1="1" TIME_SLOT_REF2="9"/></TIER></A>', "refers to no time"),
    ("a.txt", "tier\t\t1000\t2000\twalk\n", "a.txt"), ("a.docx", "", "is needed"), ("a.csv", "filename,region_shape_attributes,region_attributes\na_1.jpg,{,{}\n", "row 2")])
def test_bad_files(tmp_path, name, text, word):
    with pytest.raises(ValueError) as error: read_labels(write(tmp_path / name, text), films=SIZED)
    assert word in str(error.value) and name in str(error.value)


def test_references_in_a_circle(tmp_path):
    text = '<A><TIER TIER_ID="t"><REF_ANNOTATION ANNOTATION_ID="a" ANNOTATION_REF="b"/><REF_ANNOTATION ANNOTATION_ID="b" ANNOTATION_REF="a"/></TIER></A>'
    with pytest.raises(ValueError, match="refers to no time"): read_elan(write(tmp_path / "a.eaf", text), "t")


def test_via_2_json(tmp_path):
    region = lambda name, **said: {"shape_attributes": {"name": name, "x": 10, "y": 5, "width": 40, "height": 40}, "region_attributes": said}
    image = {"filename": "match/0902.jpg", "size": 1, "regions": [region("rect", action={"walk": True, "talk": True, "sit": False}), region("rect", action="sit")]}
    for content in ({"_via_img_metadata": {"k": image}}, {"k": image}):
        boxes = read_via(write(tmp_path / "v.json", json.dumps(content)), SIZED).boxes
        assert [(b.video, b.second, b.label) for b in boxes] == [("match", 902, label) for label in ("walk", "talk", "sit")]
    for wrong, word in ((region("circle", action="sit"), "circle"), (region("rect", action=""), "no label"), (region("rect", a="x", b="y"), "--attribute")):
        with pytest.raises(ValueError, match=word): read_via(write(tmp_path / "v.json", json.dumps({"k": {**image, "regions": [wrong]}})), SIZED)
    assert len(read_via(write(tmp_path / "v.json", json.dumps({"k": {**image, "regions": [region("rect", a="x", b="y")]}})), SIZED, "b").boxes) == 1


def test_cvat_with_every_second_frame(tmp_path):
    boxes = "".join(f'<box frame="{f}" outside="0" xtl="-0.5" ytl="0" xbr="50" ybr="40"/>' for f in range(1, 120, 2))
    text = f"<annotations><meta><task><name>m</name><frame_filter>step=2</frame_filter></task></meta><track label='person'>{boxes}</track>" + "".join(f'<image id="{f}"><tag label="walk"/></image>' for f in (10, 12, 14, 18)) + "</annotations>"
    found = read_cvat(write(tmp_path / "a.xml", text), SIZED)
    assert [b.second for b in found.boxes] == [0, 1, 2, 3, 4] and found.boxes[0].box[0] == 0 and found.boxes[0].label == "person"
    assert [(r.start_s, r.end_s) for r in found.segments] == [(.4, .64), (.72, .8)]


# --- Splits ---

def test_splits_sweep():
    draw, perfect, all_ = np.random.default_rng(0), 0, 0
    for seed in range(60):
        n = int(draw.integers(2, 9))
        groups = {f"g{i}": Counter({f"l{k}": int(draw.integers(1, 9)) for k in range(5) if draw.random() < .5}) for i in range(n)}
        sides = stratified(groups, .7, seed)
        assert sides.keys() == groups.keys() and set(sides.values()) <= {"training", "validation"}
        best = min(len(one_sided(groups, dict(zip(groups, choice)))) for choice in itertools.product(("training", "validation"), repeat=n))
        came = len(one_sided(groups, sides))
        perfect, all_ = perfect + (came == best), all_ + 1
        assert came <= best + 1 and sides == stratified(groups, .7, seed)
    assert perfect >= .97 * all_, f"{perfect} of {all_} splits keep as many labels on both sides as any split could"


@pytest.mark.parametrize("share", [.5, .7, .9])
def test_split_shares(share):
    draw = np.random.default_rng(1)
    groups = {f"g{i}": Counter({f"l{k}": 3 for k in draw.choice(20, 6, replace=False)}) for i in range(200)}
    sides = stratified(groups, share, 3)
    assert not one_sided(groups, sides)
    for label in ("l0", "l7"):
        n = Counter(sides[g] for g in groups if groups[g][label])
        assert abs(n["training"] / sum(n.values()) - share) < .1
    assert abs(Counter(sides.values())["training"] / 200 - share) < .03


# --- The whole road ---

HEADER = FeatureHeader("r3d_18", fps=25, stride=4, num_frames=16, channels=6)


def featured(folder, names, header=HEADER, **facts):
    folder.mkdir(exist_ok=True)
    for i, name in enumerate(names): np.savez(folder / f"{name}.npz", feats=np.random.default_rng(i).normal(size=(247, 6)).astype(np.float32), header=json.dumps(header.as_dict()), **facts)
    return folder


def rows(names, **more):
    return [dict(video=f"{name}.mp4", start=2 + k, end=9.5 + k, label=label, **{key: value(name) for key, value in more.items()}) for name in names for k, label in enumerate(("walk", "sit"))]


NAMES = [f"user{i % 5}_take{i}" for i in range(15)]


@pytest.mark.parametrize("facts, duration", [({}, 40.), ({"duration_s": 40.2, "fps": 50., "frames": 2010}, 40.2)])
def test_features_with_headers(tmp_path, facts, duration):
    built = build(rows(NAMES), tmp_path / "mine", features=featured(tmp_path / "features", NAMES, **facts), split="subject", subject_pattern=r"user(\d)")
    content = json.loads(built.path.read_text())
    assert content["features"] == {"folder": "../features", "suffix": ".npz"}
    assert {(e["duration"], e["fps"]) for e in content["database"].values()} == {(duration, facts.get("fps", 25))}
    assert examine(tmp_path / "mine").counts == {}
    data = read_dataset(tmp_path / "mine")
    assert data.header == HEADER and len(data) == 15 and data[0].grid.stride == 4
    by_user = {}
    for r in data: by_user.setdefault(r.id[:5], set()).add(r.subset)
    assert all(len(sides) == 1 for sides in by_user.values()) and {s for sides in by_user.values() for s in sides} == {"training", "validation"}


def test_videos_know_their_length(tmp_path):
    video = pytest.importorskip("actloc.data.video")
    for name in ("a", "b", "spare"): video.write_video(tmp_path / f"clips/{name}.mp4", np.zeros((300, 16, 32, 3), np.uint8), fps=25) if (tmp_path / "clips").mkdir(exist_ok=True) is None else 0
    built = build([dict(video=v, start=1, end=12.5 if v == "a" else 5, label="walk") for v in "ab"], tmp_path / "mine", videos=tmp_path / "clips")
    database = json.loads(built.path.read_text())["database"]
    assert database["a"]["duration"] == pytest.approx(12, abs=.05) and database["a"]["fps"] == pytest.approx(25)
    assert database["a"]["annotations"][0]["segment"][1] == database["a"]["duration"]
    assert any("cut" in note for note in built.notes) and any("spare" in note for note in built.notes)
    assert examine(tmp_path / "mine", videos=tmp_path / "clips").counts == {}
    with pytest.raises(ValueError, match="lasts 12"): build([dict(video=v, start=1, end=14, label="walk") for v in "ab"], tmp_path / "mine", videos=tmp_path / "clips")
    cvat = "<annotations><meta><task><name>a.mp4</name></task></meta><track label='walk'>" + "".join(f'<box frame="{f}" outside="0" xtl="4" ytl="4" xbr="16" ybr="12"/>' for f in range(60)) + "</track></annotations>"
    files = [write(tmp_path / "1.xml", cvat), write(tmp_path / "2.xml", cvat.replace("a.mp4", "b.mp4"))]
    built = build(files, tmp_path / "boxes", videos=tmp_path / "clips")
    assert built.counts == {"training": (1, 3), "validation": (1, 3)} and examine(tmp_path / "boxes", videos=tmp_path / "clips").counts == {}


def test_a_given_split_is_kept(tmp_path):
    where = lambda name: "test" if name.startswith("user2") else "train"
    features = featured(tmp_path / "features", NAMES)
    built = build(rows(NAMES, split=where), tmp_path / "mine", features=features)
    assert {id: e["subset"] for id, e in json.loads(built.path.read_text())["database"].items()} == {name: where(name) for name in NAMES}
    with pytest.raises(ValueError, match="has subset"): build([{**row, "split": f"s{i}"} for i, row in enumerate(rows(NAMES))], tmp_path / "new", features=features)
    with pytest.raises(ValueError, match="have no subset"): build(rows(NAMES, split=lambda name: "" if name == NAMES[3] else "train"), tmp_path / "new", features=features)
    with pytest.raises(ValueError, match="have no subject"): build(rows(NAMES), tmp_path / "new", features=features, split="subject")
    with pytest.raises(ValueError, match="1 of 15 videos have no features"): build(rows(NAMES[:-1] + ["other"]), tmp_path / "new", features=features)
    with pytest.raises(ValueError, match="two are needed"): build(rows(["only"], person=lambda _: "anna"), tmp_path / "new", features=featured(tmp_path / "one", ["only"]))
    assert not (tmp_path / "new").exists()


def test_the_old_dataset_survives_a_refusal(tmp_path):
    features = featured(tmp_path / "features", NAMES)
    before = build(rows(NAMES), tmp_path / "mine", features=features).path.read_bytes()
    with pytest.raises(ValueError): build([{**row, "end": 99} for row in rows(NAMES)], tmp_path / "mine", features=features)
    assert (tmp_path / "mine/annotations.json").read_bytes() == before and [p.name for p in (tmp_path / "mine").iterdir()] == ["annotations.json"]


def test_feature_folders(tmp_path):
    folder = featured(tmp_path / "features", ["a"])
    np.save(folder / "a.npy", np.ones((3, 2)))
    with pytest.raises(ValueError, match="one kind"): find_features(folder, tmp_path)
    with pytest.raises(ValueError, match="stride, num_frames missing"): find_features(folder, tmp_path, {"suffix": ".npy"})
    assert find_features(folder, tmp_path, {"suffix": ".npz"}).names == {"a"}
    with pytest.raises(ValueError, match="no such folder"): find_features(tmp_path / "none", tmp_path)
