"data_scripts/convert_epic.py and convert_ego4d.py: made-up sets whose answers were computed by hand; EPIC's real CSVs if present."
import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from actloc.core.annotations import read_annotations
from actloc.core.epic import read_epic

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "data_scripts"
REAL = ROOT.parent / "shared" / "data" / "epic_kitchens_100"
needs_real = pytest.mark.skipif(not REAL.exists(), reason=f"the real CSVs are not here ({REAL}); clone epic-kitchens-100-annotations")
sys.path.insert(0, str(SCRIPTS))
import command_line
import convert_ego4d
import convert_epic


@pytest.fixture
def run(capsys):
    "A function that runs a script in this process and gives exit code, stdout, stderr."
    def go(script, *arguments):
        code = script.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err
    return go


# --- EPIC-Kitchens: 2 training videos, 1 of validation, 2 verbs, 3 nouns ---

HEAD = "narration_id,participant_id,video_id,narration_timestamp,start_timestamp,stop_timestamp,start_frame,stop_frame,narration,verb,verb_class,noun,noun_class,all_nouns,all_noun_classes\n"


def action(id, video, start, stop, verb, noun):
    return f"{id},P01,{video},00:00:00.000,{start},{stop},1,2,\"do it, now\",v,{verb},n,{noun},\"['n', 'm']\",\"[0, 1]\"\n"


def epic_files():
    return {
        "EPIC_100_train.csv": HEAD + action("a_1", "P01_01", "00:00:10.50", "00:00:12.25", 1, 2) + action("a_0", "P01_01", "00:00:01.00", "00:00:02.00", 0, 0)
        + action("b_0", "P01_02", "01:02:03.04", "01:02:05.00", 1, 0),
        "EPIC_100_validation.csv": HEAD + action("c_0", "P02_01", "00:00:00.00", "00:00:30.01", 0, 2),   # ends 0.01 s after the video
        "EPIC_100_video_info.csv": "video_id,duration,fps,resolution\nP02_01,30.0,50.0,1920x1080\nP01_01,60.5,59.94,1920x1080\nP01_02,3800,50,1x1\nP09_01,1,50,1x1\n",
        "EPIC_100_verb_classes.csv": "id,key,instances,category\n0,take,\"['take', 'get']\",x\n1,put,\"['put']\",x\n",
        "EPIC_100_noun_classes.csv": "id,key,instances,category\n0,tap,[],x\n1,spoon,[],x\n2,plate,[],x\n"}


def put(folder, changes=None):
    folder.mkdir(exist_ok=True)
    for name, content in (epic_files() | (changes or {})).items():
        if content is not None: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def read(path): return json.loads(path.read_text())


def test_epic_by_hand(run, tmp_path):
    code, said, notes = run(convert_epic, put(tmp_path / "csv"), tmp_path / "out")
    assert code == 0 and notes == "" and "training 2 videos 3 instances, validation 1 videos 1 instances; 3 classes, 1 without an instance" in said
    take, place = {"label": "take", "label_id": 0}, {"label": "put", "label_id": 1}
    assert read(tmp_path / "out" / "epic_kitchens_100_verb.json") == {"version": "EPIC-KITCHENS-100", "classes": ["take", "put"], "database": {
        "P01_01": {"subset": "training", "duration": 60.5, "fps": 59.94, "annotations": [take | {"segment": [1, 2]}, place | {"segment": [10.5, 12.25]}]},
        "P01_02": {"subset": "training", "duration": 3800, "fps": 50, "annotations": [place | {"segment": [3723.04, 3725]}]},   # 3600 + 120 + 3.04
        "P02_01": {"subset": "validation", "duration": 30, "fps": 50, "annotations": [take | {"segment": [0, 30.01]}]}}}
    nouns = read(tmp_path / "out" / "epic_kitchens_100_noun.json")
    assert nouns["classes"] == ["tap", "spoon", "plate"]
    assert [[(a["label"], a["label_id"]) for a in entry["annotations"]] for entry in nouns["database"].values()] == [[("tap", 0), ("plate", 2)], [("tap", 0)], [("plate", 2)]]
    first = (tmp_path / "out" / "epic_kitchens_100_verb.json").read_bytes()
    assert run(convert_epic, tmp_path / "csv", tmp_path / "out")[0] == 0 and (tmp_path / "out" / "epic_kitchens_100_verb.json").read_bytes() == first
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["epic_kitchens_100_noun.json", "epic_kitchens_100_verb.json"]


@pytest.mark.parametrize("name, left", [("train", "validation"), ("validation", "training")])
def test_epic_with_one_split_says_so(run, tmp_path, name, left):
    code, said, notes = run(convert_epic, put(tmp_path / "csv", {f"EPIC_100_{name}.csv": None}), tmp_path / "out")
    assert code == 0 and f"EPIC_100_{name}.csv is not there" in notes and left in said
    assert {e["subset"] for e in read(tmp_path / "out" / "epic_kitchens_100_verb.json")["database"].values()} == {left}


def test_epic_names_every_row_that_it_leaves_out(run, tmp_path):
    rows = HEAD + action("c_0", "P02_01", "00:00:05.00", "00:00:05.00", 0, 2) + action("c_1", "P02_01", "00:00:30.00", "00:00:31.00", 0, 2) + action("c_2", "P02_01", "00:00:05.00", "00:00:04.00", 0, 2)
    code, said, _ = run(convert_epic, put(tmp_path / "csv", {"EPIC_100_validation.csv": rows}), tmp_path / "out")
    assert code == 0 and "left out: c_0 ends at 5 s" in said and "left out: c_1 starts at 30 s, the video lasts 30 s" in said and "left out: c_2" in said
    assert read(tmp_path / "out" / "epic_kitchens_100_verb.json")["database"]["P02_01"]["annotations"] == []


GOOD_ROW = action("c_0", "P02_01", "00:00:00.00", "00:00:30.01", 0, 2)
BAD_EPIC = {
    "no split": ({"EPIC_100_train.csv": None, "EPIC_100_validation.csv": None}, ["neither EPIC_100_train.csv nor EPIC_100_validation.csv"]),
    "no info": ({"EPIC_100_video_info.csv": None}, ["EPIC_100_video_info.csv", "no such file"]),
    "no classes": ({"EPIC_100_verb_classes.csv": None}, ["EPIC_100_verb_classes.csv", "no such file"]),
    "column": ({"EPIC_100_validation.csv": HEAD.replace("stop_timestamp", "end") + GOOD_ROW}, ["validation.csv", "column stop_timestamp is missing"]),
    "empty": ({"EPIC_100_validation.csv": ""}, ["validation.csv", "the first line has nothing"]),
    "no rows": ({"EPIC_100_validation.csv": HEAD}, ["no rows"]),
    "cut off": ({"EPIC_100_validation.csv": HEAD + GOOD_ROW + GOOD_ROW[:30]}, ["validation.csv, line 3", "15 cells"]),
    "not text": ({"EPIC_100_validation.csv": b"\xff\xfe\x00\x81"}, ["not text in UTF-8"]),
    "time": ({"EPIC_100_validation.csv": HEAD + action("c", "P02_01", "00:00:xx", "00:00:30.01", 0, 2)}, ["validation.csv, line 2", "'00:00:xx'", "HH:MM:SS.ss"]),
    "video": ({"EPIC_100_validation.csv": HEAD + action("c", "P77_01", "00:00:00", "00:00:30.01", 0, 2)}, ["line 2", "P77_01 is not in EPIC_100_video_info.csv"]),
    "class": ({"EPIC_100_validation.csv": HEAD + action("c", "P02_01", "00:00:00", "00:00:30.01", 2, 2)}, ["line 2", "verb_class is 2, 0 to 1 are known"]),
    "class word": ({"EPIC_100_validation.csv": HEAD + action("c", "P02_01", "00:00:00", "00:00:30.01", 1, "-1")}, ["noun_class is '-1'"]),
    "class order": ({"EPIC_100_verb_classes.csv": "id,key\n1,take\n"}, ["verb_classes.csv, line 2", "number 0"]),
    "class twice": ({"EPIC_100_verb_classes.csv": "id,key\n0,take\n1,take\n"}, ["verb_classes.csv, line 3", "new name"]),
    "duration": ({"EPIC_100_video_info.csv": "video_id,duration,fps\nP02_01,nan,50\n"}, ["video_info.csv, line 2", "duration is 'nan'"]),
    "video twice": ({"EPIC_100_video_info.csv": "video_id,duration,fps\nP02_01,3,50\nP02_01,3,50\n"}, ["line 3", "P02_01 comes twice"]),
    "both splits": ({"EPIC_100_validation.csv": HEAD + action("c", "P01_01", "00:00:00", "00:00:30.01", 1, 1)}, ["video P01_01 is in"]),
}


@pytest.mark.parametrize("case", BAD_EPIC)
def test_bad_epic(run, tmp_path, case):
    changes, words = BAD_EPIC[case]
    code, said, message = run(convert_epic, put(tmp_path / "csv", changes), tmp_path / "out")
    sentence = message.splitlines()[-1]
    assert code == 2 and said == "" and sentence.startswith("convert_epic: "), message
    for word in words: assert word in sentence, sentence
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", BAD_EPIC)
@pytest.mark.parametrize("task", ["verb", "action"])
def test_the_package_is_as_strict_as_the_script(tmp_path, case, task):
    changes, words = BAD_EPIC[case]
    with pytest.raises(ValueError) as error: read_epic(put(tmp_path / "csv", changes), task, "keep")
    for word in words: assert word in str(error.value)


def test_the_package_reads_what_the_script_writes(run, tmp_path):
    rows = HEAD + GOOD_ROW + action("c_1", "P02_01", "00:00:30.00", "00:00:31.00", 0, 2) + action("c_2", "P02_01", "00:00:05.00", "00:00:04.00", 1, 1) + action("c_3", "P02_01", "00:00:07.00", "00:00:08.00", 1, 1)
    source = put(tmp_path / "csv", {"EPIC_100_validation.csv": rows})
    assert run(convert_epic, source, tmp_path / "out")[0] == 0
    for task in ("verb", "noun"):
        ours = read_epic(source, task, "repair")
        theirs = {r.id: r for r in read_annotations(tmp_path / "out" / f"epic_kitchens_100_{task}.json", bad_segments="repair").recordings}
        assert len(ours) == len(theirs) == 3 and ours.classes == read_annotations(tmp_path / "out" / f"epic_kitchens_100_{task}.json").classes
        for r in ours.recordings:
            order = np.lexsort((r.labels, r.segments_s[:, 1], r.segments_s[:, 0]))
            assert np.array_equal(r.segments_s[order], theirs[r.id].segments_s) and np.array_equal(r.labels[order], theirs[r.id].labels)
            assert (r.subset, r.duration_s, r.fps) == (theirs[r.id].subset, theirs[r.id].duration_s, theirs[r.id].fps)
        note = ours.repaired["P02_01"]
        assert "2 segments left out" in note and "c_1 starts at 30 s" in note and "c_2 ends at 4 s" in note and list(ours.repaired) == ["P02_01"]
    with pytest.raises(ValueError, match="line 3: c_1 starts at 30 s"): read_epic(source, "verb")
    assert [len(r.labels) for r in read_epic(source, "verb", "keep").recordings] == [2, 1, 4]
    assert read_epic(source, "action", "keep").classes == ("0,0", "0,2", "1,0", "1,1", "1,2")


@needs_real
def test_the_real_epic_csvs(run, tmp_path):
    if (REAL / "EPIC_100_train.csv").exists(): pytest.skip("written for the folder without EPIC_100_train.csv")
    code, said, notes = run(convert_epic, REAL, tmp_path)
    assert code == 0 and "no training videos" in notes and said.count("validation 138 videos 9,668 instances") == 2 and "left out" not in said
    assert "97 classes, 19 without" in said and "300 classes, 89 without" in said
    with open(REAL / "EPIC_100_validation.csv", newline="") as file: rows = list(csv.DictReader(file))
    def plain(text): return sum(float(part) * unit for part, unit in zip(text.split(":"), (3600, 60, 1)))
    for task in ("verb", "noun"):                                               # every number once more, read in the plainest way
        database = read(tmp_path / f"epic_kitchens_100_{task}.json")["database"]
        assert list(database) == sorted({row["video_id"] for row in rows})
        found = sorted((id, a["label_id"], *a["segment"]) for id, entry in database.items() for a in entry["annotations"])
        wanted = sorted((row["video_id"], int(row[f"{task}_class"]), plain(row["start_timestamp"]), plain(row["stop_timestamp"])) for row in rows)
        assert [f[:2] for f in found] == [w[:2] for w in wanted] and np.allclose([f[2:] for f in found], [w[2:] for w in wanted], rtol=0, atol=1e-6)
    assert database["P01_11"]["annotations"][0] == {"label": "plate", "label_id": 2, "segment": [0.0, 1.89]}
    assert len(read_annotations(tmp_path / "epic_kitchens_100_noun.json").classes) == 300   # and the package reads it as it is


# --- Ego4D: made up; features[t, c] = 1000 * video + t + c / 10 ---

def moment(name, start, end, primary=True):
    return {"label": name, "primary": primary, "start_time": -1, "end_time": -1, "video_start_time": start, "video_end_time": end}


def clip(uid, frames, seconds, *sheets):
    return {"clip_uid": uid, "video_start_frame": frames[0], "video_end_frame": frames[1], "video_start_sec": seconds[0], "video_end_sec": seconds[1],
            "annotations": [{"annotator_uid": str(i), "labels": sheet} for i, sheet in enumerate(sheets)]}


def ego4d_videos():
    return {
        "train": [{"video_uid": "v1", "clips": [
            # 30 fps. frames 40..200: 8 in front (40 mod 16), 8 behind: 32..208; features 32/16 = 2 up to (208-32)/16 = 11; shift 8/30 s = 0.2667
            clip("odd", (40, 200), (40 / 30, 200 / 30), [moment("wash", 2., 3.), moment("wash", 2., 2.2)], [moment("arrange", 3., 4.5), moment("other", 3., 4., False)]),
            # frames 160..320 lie on the grid: nothing added; features 10 up to (320-32)/16 = 18
            clip("even", (160, 320), (160 / 30, 320 / 30), [moment("cut", 6., 7.)]),
            clip("nolabels", (0, 160), (0, 160 / 30), [moment("wash", 1., 1.2), moment("wash", 1., 3., False)]),
            clip("fast", (0, 160), (0, 1), [moment("wash", .2, .9)])]}],
        "val": [{"video_uid": "v2", "clips": [
            # begins slightly below 0; 15 fps. frames 0..100: 12 behind: 112; features 0 up to (112-32)/16 = 5
            clip("early", (-1, 100), (-.02, 100 / 15), [moment("wash", .5, 1.)])]},
            {"video_uid": "v3", "clips": [clip("lost", (0, 160), (0, 160 / 30), [moment("cut", 1., 2.)])]}]}


def features(video, steps, channels):
    return (1000 * video + torch.arange(steps)[:, None] + torch.arange(channels)[None] / 10).float()


@pytest.fixture
def ego(tmp_path):
    "A function that writes the made-up set and gives the arguments of the script."
    def write(videos=None, lost=("v3",), steps=30):
        for name in ("ann", "S", "O"): (tmp_path / name).mkdir(exist_ok=True)
        for subset, found in (videos or ego4d_videos()).items():
            (tmp_path / "ann" / convert_ego4d.FILES[subset]).write_text(json.dumps({"version": "1", "videos": found}))
        for i, video in enumerate(("v1", "v2", "v3"), 1):
            for folder, channels in (("S", 4), ("O", 3)):
                if video not in lost: torch.save(features(i, steps, channels), tmp_path / folder / f"{video}.pt")
        return [tmp_path / "ann", tmp_path / "out", "--stream", f"slowfast={tmp_path / 'S'}", "--stream", f"omnivore={tmp_path / 'O'}"]
    return write


def cut(video, first, last, channels):
    return np.array([[1000 * video + t + c / 10 for c in range(channels)] for t in range(first, last)], np.float32)


def test_ego4d_by_hand(run, ego, tmp_path):
    code, said, notes = run(convert_ego4d, *ego())
    assert code == 3 and "3 classes came, the published benchmark has 110" in notes       # v3 has no features
    out = tmp_path / "out"
    for folder, channels in (("slowfast_features", 4), ("omnivore_features", 3)):
        assert sorted(p.name for p in (out / folder).iterdir()) == ["early.npy", "even.npy", "odd.npy"]
        for name, wanted in (("odd", cut(1, 2, 11, channels)), ("even", cut(1, 10, 18, channels)), ("early", cut(2, 0, 5, channels))):
            found = np.load(out / folder / f"{name}.npy")
            assert found.dtype == np.float32 and found.flags.c_contiguous and np.array_equal(found, wanted), name
    found = read(out / "annotations" / "ego4d.json")
    assert found["classes"] == ["arrange", "cut", "wash"] and list(found["database"]) == ["early", "even", "odd"]
    odd, even, early = (found["database"][name] for name in ("odd", "even", "early"))
    # 2 - 40/30 + 8/30 = 0.9333, 3 -> 1.9333, 4.5 -> 3.4333; the 0.2 s moment and the one that is not primary are gone
    assert odd["annotations"] == [{"label": "wash", "label_id": 2, "segment": [.93, 1.93]}, {"label": "arrange", "label_id": 0, "segment": [1.93, 3.43]}]
    assert odd["subset"] == "train" and odd["video"] == "v1" and odd["first_frame"] == 32
    assert odd["fps"] == pytest.approx(30) and odd["duration"] == pytest.approx(176 / 30) and odd["shift"] == pytest.approx(8 / 30)
    assert even["annotations"] == [{"label": "cut", "label_id": 1, "segment": [.67, 1.67]}] and even["shift"] == 0 and even["duration"] == pytest.approx(160 / 30)
    assert early["annotations"] == [{"label": "wash", "label_id": 2, "segment": [.5, 1.]}] and early["fps"] == pytest.approx(15) and early["duration"] == pytest.approx(112 / 15)
    listed = dict(line.split("\t") for line in (out / "annotations" / "left_out.txt").read_text().splitlines())
    assert list(listed) == ["fast", "lost", "nolabels"]
    assert "160 fps, outside 10 to 100" in listed["fast"] and "v3.pt: no such file" in listed["lost"] and "no primary label of at least 0.25 s (1 shorter" in listed["nolabels"]
    for id, reason in listed.items(): assert f"left out: {id}: {reason}" in said
    assert "3 of 6 clips (train 2, val 1), 4 labels (1 shorter than 0.25 s left out), 0 clips were converted earlier" in said
    assert read_annotations(out / "annotations" / "ego4d.json").classes == ("arrange", "cut", "wash")


def test_a_label_of_a_quarter_second_counts(run, ego):
    videos = ego4d_videos()
    videos["val"] = [{"video_uid": "v2", "clips": [clip("c", (0, 160), (0, 5), [moment("a", 1., 1.25), moment("b", 1., 1.2499)])]}]
    code, said, _ = run(convert_ego4d, *ego(videos))
    assert code == 0 and "c" in read(ego(videos)[1] / "annotations" / "ego4d.json")["database"]
    assert [a["label"] for a in read(ego(videos)[1] / "annotations" / "ego4d.json")["database"]["c"]["annotations"]] == ["a"]


def test_what_is_converted_is_kept_unless_its_source_is_newer(run, ego, tmp_path):
    arguments = ego(lost=())
    assert run(convert_ego4d, *arguments)[0] == 0
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*/*.npy")}
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.*")}
    code, said, _ = run(convert_ego4d, *arguments)
    assert code == 0 and "4 clips were converted earlier" in said and all(path.stat().st_mtime_ns == at for path, at in written.items())
    half = tmp_path / "out" / "omnivore_features" / "odd.npy"
    half.write_bytes(half.read_bytes()[:-8])                                    # cut off
    code, said, _ = run(convert_ego4d, *arguments)
    assert code == 0 and "2 clips were converted earlier" in said and before == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.*")}
    torch.save(features(7, 30, 4), tmp_path / "S" / "v2.pt")
    os.utime(tmp_path / "S" / "v2.pt", (2**31, 2**31))
    code, said, _ = run(convert_ego4d, *arguments)
    assert "3 clips were converted earlier" in said and np.load(tmp_path / "out" / "slowfast_features" / "early.npy")[0, 0] == 7000


def test_killed_at_every_write_and_continued(run, ego, tmp_path, monkeypatch):
    "No half file under a final name; the annotation file comes last; in the end everything is as in one run."
    arguments = ego(lost=())
    assert run(convert_ego4d, *arguments)[0] == 0
    whole = {path.relative_to(tmp_path / "out"): path.read_bytes() for path in (tmp_path / "out").rglob("*.*")}
    import shutil
    import actloc.core.files
    real = os.replace
    for stop in range(1, 11):                                                   # 4 clips x 2 streams, the list, the annotations
        shutil.rmtree(tmp_path / "out")
        count = iter(range(1, 99))
        def cut_off(*paths):
            if next(count) == stop: raise KeyboardInterrupt
            return real(*paths)
        monkeypatch.setattr(actloc.core.files.os, "replace", cut_off)
        assert run(convert_ego4d, *arguments)[0] == 130
        monkeypatch.setattr(actloc.core.files.os, "replace", real)
        left = {path.relative_to(tmp_path / "out"): path.read_bytes() for path in (tmp_path / "out").rglob("*.*")}
        assert len(left) == stop - 1 and left.items() <= whole.items()
        assert run(convert_ego4d, *arguments)[0] == 0
        assert whole == {path.relative_to(tmp_path / "out"): path.read_bytes() for path in (tmp_path / "out").rglob("*.*")}


def test_features_that_end_early(run, ego, tmp_path):
    "Two features fewer at the end of a clip are tolerated and said, in all streams; three are another video."
    arguments = ego(lost=())
    torch.save(features(1, 16, 3), tmp_path / "O" / "v1.pt")                     # even needs 10..18, odd 2..11
    code, said, _ = run(convert_ego4d, *arguments)
    assert code == 0 and "shortened: even: 2 of 8 features are lacking at the end of" in said
    for name, channels in (("slowfast", 4), ("omnivore", 3)): assert np.array_equal(np.load(tmp_path / "out" / f"{name}_features" / "even.npy"), cut(1, 10, 16, channels))
    torch.save(features(1, 15, 3), tmp_path / "O" / "v1.pt")
    code, said, _ = run(convert_ego4d, *arguments)
    assert code == 3 and "left out: even" in said and "O/v1.pt: 15 features came, the clip ends with feature 18" in said
    assert "even" not in read(tmp_path / "out" / "annotations" / "ego4d.json")["database"]


class Evil:
    def __reduce__(self): return os.system, ("touch evil",)


BAD_TENSORS = {"list": ([1, 2], "a tensor of numbers [T, C] is needed, list"), "flat": (torch.zeros(5), "Tensor [5]"), "none": (torch.zeros(0, 4), "[0, 4]"), "whole numbers": (torch.zeros(30, 4).long(), "Tensor [30, 4]"),
               "nan": (torch.full((30, 4), float("nan")), "NaN"), "code": (Evil(), "v2.pt"), "half": (b"PK\x03\x04", "v2.pt"), "channels": (torch.zeros(30, 9), "9 channels came, the other videos have 4")}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_bad_feature_files_are_named(run, ego, tmp_path, case, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, (content, words) = ego(lost=()), BAD_TENSORS[case]
    path = tmp_path / "S" / "v2.pt"
    if isinstance(content, bytes): path.write_bytes(content)
    else: torch.save(content, path)
    code, said, _ = run(convert_ego4d, *arguments)
    assert code == 3 and "left out: early: " in said and str(path) in said and words in said and not (tmp_path / "evil").exists()
    assert sorted(read(tmp_path / "out" / "annotations" / "ego4d.json")["database"]) == ["even", "lost", "odd"]


def test_test_clips_have_no_labels(run, ego, tmp_path):
    videos = ego4d_videos() | {"test": [{"video_uid": "v3", "clips": [{k: v for k, v in clip("t", (16, 160), (16 / 30, 160 / 30)).items() if k != "annotations"}]}]}
    arguments = ego(videos, lost=())
    assert run(convert_ego4d, *arguments)[0] == 0 and "t" not in read(tmp_path / "out" / "annotations" / "ego4d.json")["database"]
    assert run(convert_ego4d, *arguments, "--test")[0] == 0
    entry = read(tmp_path / "out" / "annotations" / "ego4d.json")["database"]["t"]
    assert entry["subset"] == "test" and entry["annotations"] == [] and np.array_equal(np.load(tmp_path / "out" / "omnivore_features" / "t.npy"), cut(3, 1, 8, 3))


def changed(path, value):
    "The made-up set with one entry replaced (or removed, for None)."
    videos = ego4d_videos()
    place = videos
    for key in path[:-1]: place = place[key]
    if value is None: del place[path[-1]]
    else: place[path[-1]] = value
    return videos


FIRST = ("train", 0, "clips", 0)
BAD_EGO4D = {
    "uid": (changed((*FIRST, "clip_uid"), "../evil"), ["moments_train.json, video v1", "'../evil'"]),
    "video uid": (changed(("train", 0, "video_uid"), "a/evil"), ["'a/evil'"]),
    "frame": (changed((*FIRST, "video_start_frame"), None), ["clip odd: video_start_frame is 'None', a number is needed"]),
    "frame word": (changed((*FIRST, "video_start_frame"), "40"), ["clip odd: video_start_frame is '40'"]),
    "labels": (changed((*FIRST, "annotations", 0, "labels"), None), ["clip odd: labels"]),
    "time": (changed((*FIRST, "annotations", 0, "labels", 0, "video_end_time"), "x"), ["clip odd: video_end_time is 'x'"]),
    "primary": (changed((*FIRST, "annotations", 0, "labels", 0, "primary"), "yes"), ["primary is 'yes', bool is needed"]),
    "clips": (changed(("train", 0, "clips"), None), ["video v1: clips is 'None', list is needed"]),
    "twice": (changed((*FIRST, "clip_uid"), "even"), ["clip even comes twice"]),
    "videos": ({"train": {"a": 1}, "val": []}, ["moments_train.json: videos"]),
}


@pytest.mark.parametrize("case", BAD_EGO4D)
def test_bad_ego4d(run, ego, tmp_path, case):
    videos, words = BAD_EGO4D[case]
    code, said, message = run(convert_ego4d, *ego(videos))
    assert code == 2 and said == "" and message.count("\n") == 1 and message.startswith("convert_ego4d: "), message
    for word in words: assert word in message, message
    assert not (tmp_path / "out").exists() and not (tmp_path / "evil").exists()


def test_doors_of_ego4d(run, ego, tmp_path):
    arguments = ego()
    code, _, message = run(convert_ego4d, *arguments[:2], "--stream", f"slowfast={tmp_path / 'nowhere'}")
    assert code == 2 and "nowhere: no such folder" in message
    (tmp_path / "ann" / "moments_val.json").unlink()
    code, _, message = run(convert_ego4d, *arguments)
    assert code == 2 and "moments_val.json: no such file; the label ids need" in message
    for bad in ("slowfast", "../x=S", f"a={tmp_path}"):
        with pytest.raises(SystemExit): convert_ego4d.main([*map(str, arguments[:2]), "--stream", f"a={tmp_path}", "--stream", bad])


def test_annotations_alone_and_as_a_program(ego, tmp_path):
    done = subprocess.run([sys.executable, str(SCRIPTS / "convert_ego4d.py"), *map(str, ego()[:2])], capture_output=True, text=True)
    assert done.returncode == 0 and "4 of 6 clips" in done.stdout
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["annotations"]


def test_a_long_conversion_shows_a_bar(run, ego, monkeypatch):
    assert "converting" not in run(convert_ego4d, *ego(lost=()))[2]
    monkeypatch.setattr(command_line, "DELAY_S", 0)
    assert "converting: 100%" in run(convert_ego4d, *ego(lost=()))[2]
