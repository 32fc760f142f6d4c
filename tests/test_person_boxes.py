"""What guards the person boxes but does not teach: stopped runs, odd seconds, other layouts, weights from everywhere and nowhere."""
import json
import pickle
import urllib.error
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from actloc.core.ava import read_boxes
from actloc.data import person_boxes
from actloc.data.clips import VideoFolder
from actloc.data.people import read_people_file
from actloc.data.person_boxes import PERSON, detect, every_second, find_people, fingerprint, person_detector, read_coco_boxes, read_proposals, rows_of
from actloc.data.video import write_video

SMALL = dict(min_size=32, max_size=48, proposals=4, least_score=0.)


class Still:
    "A video whose frame n is filled with n; remembers what was read."
    def __init__(self, frames=50, height=20, width=30): self.frames, self.shape, self.read_numbers = frames, (height, width, 3), []

    def read(self, numbers, size=None):
        self.read_numbers += list(numbers)
        return np.stack([np.full(self.shape, n, np.uint8) for n in numbers])


def by_brightness(pictures):
    "One person per picture: its box starts at the frame's number in pixels, its score is the number by 100."
    numbers = [round(float(p[0, 0, 0]) * 255) for p in pictures]
    return [dict(boxes=torch.tensor([[n % 20, 2., n % 20 + 5, 12.]]), labels=torch.tensor([PERSON]), scores=torch.tensor([n / 100])) for n in numbers]


def answer(boxes, labels, scores): return lambda pictures: [dict(boxes=torch.tensor(boxes).float(), labels=torch.tensor(labels), scores=torch.tensor(scores).float())] * len(pictures)


FRAMES = np.zeros((2, 20, 40, 3), np.uint8)


# --- One batch ---

def test_boxes_are_shares_cut_at_the_border_and_sorted():
    found = answer([[-5, 0, 20, 25], [10, 5, 30, 15], [5, 5, 5, 9], [50, 1, 60, 9], [1, 1, 2, 2]], [1, 1, 1, 1, 3], [.5, .9, .99, .99, .99])
    for boxes, scores in detect(found, FRAMES):
        assert boxes.tolist() == [[.25, .25, .75, .75], [0, 0, .5, 1]] and np.allclose(scores, [.9, .5])
    assert detect(lambda pictures: pytest.fail("asked about no picture"), FRAMES[:0]) == [] and len(detect(found, FRAMES, .6)[0][1]) == 1


def test_nobody():
    boxes, scores = detect(answer(np.zeros((0, 4)), [], []), FRAMES)[0]
    assert boxes.shape == (0, 4) and scores.shape == (0,)


def test_pictures_arrive_as_torchvision_wants_them():
    seen = []
    frames = np.random.default_rng(0).integers(0, 256, (2, 20, 40, 3), np.uint8)
    detect(lambda pictures: seen.extend(pictures) or answer([[0, 0, 1, 1]], [1], [1.])(pictures), frames[:, ::-1, ::-1])
    assert [tuple(p.shape) for p in seen] == [(3, 20, 40)] * 2 and all(p.dtype == torch.float32 for p in seen)
    assert np.allclose(seen[1].numpy().transpose(1, 2, 0) * 255, frames[1, ::-1, ::-1], atol=1e-3)


def test_a_real_detector_batch_of_one_and_of_two():
    torch.manual_seed(0)
    detector = person_detector(None, **SMALL)
    frames = np.random.default_rng(0).integers(0, 256, (2, 24, 32, 3), np.uint8)
    both, single = detect(detector, frames, 0.), [detect(detector, frames[i:i + 1], 0.)[0] for i in range(2)]
    for (boxes, scores), (b, s) in zip(both, single): assert np.allclose(boxes, b, atol=1e-4) and np.allclose(scores, s, atol=1e-5)
    assert not detector.training and not any(p.grad is not None for p in detector.parameters())


# --- Weights ---

def test_weights_from_a_file(tmp_path):
    torch.manual_seed(1)
    first = person_detector(None, **SMALL)
    frames = np.random.default_rng(0).integers(0, 256, (1, 24, 32, 3), np.uint8)
    expected = detect(first, frames, 0.)[0]
    for name, content in (("a.pth", first.state_dict()), ("b.pth", {"model": first.state_dict(), "epoch": 3})):
        torch.save(content, tmp_path / name)
        torch.manual_seed(2)
        again = person_detector(tmp_path / name, **SMALL)
        assert fingerprint(again) == fingerprint(first) and np.allclose(detect(again, frames, 0.)[0][0], expected[0])
    assert fingerprint(person_detector(None, **SMALL)) != fingerprint(first)
    state = first.state_dict()
    state["roi_heads.box_predictor.cls_score.weight"] = state["roi_heads.box_predictor.cls_score.weight"][:5]
    torch.save(state, tmp_path / "few.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "half.pth").write_bytes((tmp_path / "a.pth").read_bytes()[:5000])
    for name, words in (("few.pth", "1 names or shapes differ, the first is 'roi_heads.box_predictor.cls_score.weight'"), ("list.pth", "a list came"), ("half.pth", "torch file"), ("none.pth", "no such file")):
        with pytest.raises(ValueError, match=words): person_detector(tmp_path / name, **SMALL)


@pytest.mark.parametrize("error", [urllib.error.URLError("no route"), RuntimeError('invalid hash value (expected "dd69338a", got "0")'), OSError(28, "No space left on device")])
def test_no_network_is_one_sentence(tmp_path, monkeypatch, error):
    def fail(*_, **__): raise error
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fail)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)
    with pytest.raises(ValueError, match=r"could not be had from https://download.pytorch.org/\S+ \(.*\); download that address .* and pass the file") as caught: person_detector(**SMALL)
    assert "\n" not in str(caught.value)


# --- All key frames ---

def place_in(videos, fps=10): return lambda name, second: (videos[name], int(round(second * fps)))


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_every_key_frame_gets_its_own_people(tmp_path, batch_size):
    videos = {name: Still() for name in "ab"}
    keyframes = [("b", 1), ("a", 3), ("a", 0), ("b", 2), ("a", 4)]
    path = find_people(keyframes, place_in(videos), by_brightness, tmp_path / "x.csv", min_score=.05, batch_size=batch_size)
    table = read_boxes(path, scores=True)
    assert [table.keyframes.name(i) for i in range(5)] == ["b,0001", "b,0002", "a,0003", "a,0004", "a,0000"]      # a,0000 has nobody: declared last
    for i in range(len(table)):
        second = table.keyframes.second[table.keyframe[i]]
        assert np.isclose(table.scores[i], second / 10) and np.allclose(table.boxes[i], [second * 10 % 20 / 30, .1, (second * 10 % 20 + 5) / 30, .6], atol=1e-5)
    assert videos["a"].read_numbers == [0, 30, 40] and (table.labels == -1).all() and len(table) == 4
    assert "a,0000\n" in path.read_text()


def test_seconds_between_whole_ones_are_kept(tmp_path):
    path = find_people([("a", 1.5), ("a", 2.016949), ("a", 3)], place_in({"a": Still()}), by_brightness, tmp_path / "x.csv")
    assert [line.split(",")[1] for line in path.read_text().splitlines()] == ["1.500000", "2.016949", "0003"]
    assert np.allclose(read_people_file(path, detected=True).time_s, [1.5, 2.016949, 3])
    before = path.stat().st_mtime_ns
    assert find_people([("a", 1.5), ("a", 2.016949), ("a", 3)], None, None, path).stat().st_mtime_ns == before


def test_a_video_in_several_files(tmp_path):
    first, second = Still(), Still(height=40, width=50)
    place = lambda name, t: (first, int(t * 10)) if t < 3 else (second, int((t - 3) * 10) + 1)
    table = read_boxes(find_people([("a", t) for t in (1, 2, 3, 4)], place, by_brightness, tmp_path / "x.csv", min_score=0.), scores=True)
    assert first.read_numbers == [10, 20] and second.read_numbers == [1, 11]
    assert np.allclose(table.boxes[:, 0], [10 / 30, 0, 1 / 50, 11 / 50], atol=1e-5)


@pytest.mark.parametrize("stop", range(1, 7))
def test_stopped_anywhere_and_continued(tmp_path, stop):
    keyframes = [(name, t) for name in ("a", "b", "../c d%") for t in range(1, 5)]
    whole = find_people(keyframes, place_in({name: Still() for name, _ in keyframes}), by_brightness, tmp_path / "whole.csv", batch_size=2).read_text()
    videos, calls = {name: Still() for name, _ in keyframes}, []
    def stopping(pictures):
        calls.append(len(pictures))
        if len(calls) == stop: raise KeyboardInterrupt
        return by_brightness(pictures)
    stopping.__name__ = "by_brightness"
    with pytest.raises(KeyboardInterrupt): find_people(keyframes, place_in(videos), stopping, tmp_path / "x.csv", batch_size=2)
    assert not (tmp_path / "x.csv").exists() and len(list((tmp_path / "x.csv.parts").glob("*.csv"))) == (stop - 1) // 2
    assert find_people(keyframes, place_in(videos), stopping, tmp_path / "x.csv", batch_size=2).read_text() == whole
    assert len(calls) == 6 + 1 + (stop - 1) % 2                                          # only the video that was stopped is repeated
    assert sorted(p.name for p in tmp_path.iterdir()) == ["whole.csv", "x.csv"]


def test_boxes_of_two_detectors_do_not_mix(tmp_path):
    def begin(detector, **options):
        def fails(name, second):
            if name == "b": raise ValueError("no video")
            return Still(), 10
        with pytest.raises(ValueError) as error: find_people([("a", 1), ("b", 1)], fails, detector, tmp_path / "x.csv", **options)
        return str(error.value)
    assert begin(by_brightness) == "no video"
    assert "min_score" in begin(by_brightness, min_score=.5) and "was begun with" in begin(by_brightness, min_score=.5)
    assert "was begun with" in begin(answer([[0, 0, 1, 1]], [1], [1.]))
    assert begin(by_brightness) == "no video"


def test_other_key_frames_do_not_reuse_a_part(tmp_path):
    def only_a(name, second):
        if name == "b": raise ValueError("no video")
        return video, int(second * 10)
    video = Still()
    for seconds in ((1, 2), (1, 3)):
        with pytest.raises(ValueError): find_people([*(("a", t) for t in seconds), ("b", 1)], only_a, by_brightness, tmp_path / "x.csv")
    assert video.read_numbers == [10, 20, 10, 30]


def test_real_videos_and_folders_of_images(tmp_path):
    frames = np.zeros((40, 20, 30, 3), np.uint8)
    frames += np.arange(40, dtype=np.uint8)[:, None, None, None] * 6
    write_video(tmp_path / "videos" / "v.mp4", frames, 10)
    folder = VideoFolder(tmp_path / "videos", first_second=900)
    path = find_people(every_second("v", 904, 900), folder.place, by_brightness, tmp_path / "x.csv", min_score=0.)
    assert np.allclose(read_boxes(path, scores=True).scores, [0, .6, 1.2, 1.8], atol=.03)
    with pytest.raises(ValueError, match="lies outside"): find_people([("v", 904)], folder.place, by_brightness, tmp_path / "y.csv")


def test_doors(tmp_path):
    place = place_in({"a": Still()})
    for keyframes, words in (([("a", 1), ("a", 1.)], "came twice"), ([("a,b", 1)], "does not fit into a CSV"), ([("", 1)], "does not fit"), ([("a", float("nan"))], "second nan"), ([("a", -1)], "second -1")):
        with pytest.raises(ValueError, match=words): find_people(keyframes, place, by_brightness, tmp_path / "x.csv")
    assert not list(tmp_path.iterdir())
    for frames in (FRAMES / 255., FRAMES[0], FRAMES[..., :1]):
        with pytest.raises(ValueError, match="uint8 .n, H, W, 3. is needed"): detect(by_brightness, frames)
    path = find_people([("a", 1)], place, by_brightness, tmp_path / "x.csv")
    with pytest.raises(ValueError, match="is there already, with 1 key frames of which 1 are among the 2"): find_people([("a", 1), ("a", 2)], place, by_brightness, path)


@pytest.mark.parametrize("second, key", [(0, "v,0000"), (902, "v,0902"), (12345, "v,12345"), (2.5, "v,2.500000")])
def test_rows(second, key):
    assert rows_of("v", second, [], []) == f"{key}\n"
    assert rows_of("v", second, np.array([[0, .1, .25, 1]]), [.123456789]) == f"{key},0.00000,0.10000,0.25000,1.00000,-1,0.123457\n"


# --- Layouts of others ---

def pickled(path, content):
    path.write_bytes(pickle.dumps(content))
    return path


def test_proposals(tmp_path):
    rng = np.random.default_rng(0)
    content = {}
    for i in range(20):
        corner = rng.uniform(0, .5, (i % 4, 2))
        content[f"film,a{i % 3},{900 + i:04d}"] = np.c_[corner, corner + .3, rng.random(i % 4)].astype(np.float32)
    table = read_proposals(pickled(tmp_path / "p.pkl", content))
    assert len(table.keyframes) == 20 and len(table) == sum(map(len, content.values())) and (table.labels == -1).all()
    for k, (key, array) in enumerate(content.items()):
        rows = table.keyframe == k
        video, second = key.rsplit(",", 1)
        assert table.keyframes.videos[table.keyframes.video[k]] == video and table.keyframes.second[k] == int(second)
        assert np.allclose(table.boxes[rows], array[:, :4]) and np.allclose(table.scores[rows], array[:, 4])
    assert read_proposals(pickled(tmp_path / "q.pkl", {"v,0902": [[.1, .1, .2, .2]]})).scores.tolist() == [1.]


@pytest.mark.parametrize("content, words", [
    ([1], "a list came"), ({}, "at least one entry"), ({"film": np.zeros((1, 5))}, "entry 'film'"), ({"film,soon": np.zeros((1, 5))}, "entry 'film,soon'"), ({"v,1": np.zeros((1, 3))}, r"\[1, 3\]"),
    ({"v,1": np.array([[.1, .1, .2, 1.2, .5]])}, "v,0001: box 0"), ({"v,1": np.array([[-.1, .1, .2, .2, .5]])}, "v,0001: box 0"), ({"v,1": np.array([[.1, .1, .2, .2, .5], [.5, .1, .2, .2, .5]])}, "box 1"), ({"v,1": np.array([[.1, .1, .2, .2, np.nan]])}, "score nan"),
    ({"v,1": np.array([[.1, np.nan, .2, .2, .5]])}, "box 0"), ({"v,1": [["a"] * 5]}, "entry 'v,1'"), ({"v,1": SimpleNamespace()}, "refused|plain")])
def test_broken_proposals_name_their_entry(tmp_path, content, words):
    with pytest.raises(ValueError, match=words) as error: read_proposals(pickled(tmp_path / "p.pkl", content))
    assert str(tmp_path / "p.pkl") in str(error.value)


def coco(tmp_path, results, images):
    for name, content in (("r.json", results), ("i.json", images)): (tmp_path / name).write_text(json.dumps(content))
    return tmp_path / "r.json", tmp_path / "i.json"


IMAGES = {"images": [dict(id="a", movie="film", timestamp=902, width=200, height=100), dict(id=2, file_name="x/y/film/0903.jpg", width=200, height=100), dict(id=3, video="other", second=1, width=10, height=10)]}


def test_coco(tmp_path):
    results = [dict(image_id=2, category_id=1, bbox=[20, 10, 40, 50], score=.5), dict(image_id="a", category_id=1, bbox=[0, 0, 200, 100], score=.9),
               dict(image_id=2, category_id=1, bbox=[0, 0, 200.1, 100], score=.4), dict(image_id=3, category_id=2, bbox=[0, 0, 5, 5], score=.7)]
    table = read_coco_boxes(*coco(tmp_path, results, IMAGES))
    assert [table.keyframes.name(i) for i in range(3)] == ["film,0902", "film,0903", "other,0001"]
    assert table.keyframe.tolist() == [0, 1, 1] and np.allclose(table.boxes, [[0, 0, 1, 1], [.1, .1, .3, .6], [0, 0, 1, 1]]) and table.scores.tolist() == [.9, .5, .4]
    assert len(read_coco_boxes(tmp_path / "r.json", tmp_path / "i.json", category=2)) == 1


@pytest.mark.parametrize("results, images, words", [
    ({}, IMAGES, "r.json: a list"), ([dict(image_id=9, category_id=1, bbox=[0, 0, 1, 1], score=1)], IMAGES, "entry 0: image 9"), ([dict(image_id=2, category_id=1, bbox=[0, 0, 1], score=1)], IMAGES, "entry 0"),
    ([dict(image_id=2, category_id=1, bbox=[0, 0, 1, 1])], IMAGES, "entry 0"), ([3], IMAGES, "entry 0"), ([dict(image_id=2, category_id=1, bbox=[0, 0, 999, 1], score=1)], IMAGES, "film,0903: box 0"),
    ([], {"images": []}, "i.json: .*at least one image"), ([], [], "i.json"), ([], {"images": [dict(id=1, width=2, height=3)]}, "image 0"), ([], {"images": [dict(id=1, video="v", second="x", width=2, height=3)]}, "image 0")])
def test_broken_coco_names_file_and_entry(tmp_path, results, images, words):
    with pytest.raises(ValueError, match=words): read_coco_boxes(*coco(tmp_path, results, images))


def test_importing_it_is_light():
    import subprocess
    import sys
    done = subprocess.run([sys.executable, "-c", "import sys, actloc.data.person_boxes; print([m for m in ('torch', 'torchvision', 'av') if m in sys.modules])"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
