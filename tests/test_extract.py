"""Extraction: every network against torchvision's, clips against frames read one by one, weights and headers, folders with broken videos, memory."""
import json
import os
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

import actloc.app.extract as extraction
from actloc.app.extract import NETWORKS, ExtractConfig, FewProducts, Network, extract, feature_chunks, load_network, sampled, serves, steps, video_facts, write_features
from actloc.core.header import FeatureHeader
from actloc.data.features import Place, read_header
from actloc.data.recordings import read_dataset
from actloc.data.video import open_video, write_video

SMALL = ExtractConfig("mc3_18", num_frames=4, stride=2, size=32, weights="random:0")   # the one that is made quickly


def grey(n, height=32, width=48):
    "Frame i is grey of brightness 4 i, so that what a network saw can be read off."
    return [np.full((height, width, 3), 4 * i % 256, np.uint8) for i in range(n)]


@pytest.fixture(scope="module")
def small(): return load_network(SMALL, "cpu")


class Brightness(nn.Module):
    "Says how bright each frame of a clip is."
    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, x): return x[:, 0].mean((2, 3)) * .22803 + .43216


def frames_seen(video, how):
    "Numbers of the frames of grey(n) in each clip, [T, num_frames]."
    found = list(feature_chunks(video, Network(how, Brightness(), "")))
    return np.rint(np.concatenate(found, 1).T * 255 / 4).astype(int)


@pytest.mark.parametrize("name, frames, size", [("r3d_18", 4, 32), ("mc3_18", 5, 30), ("r2plus1d_18", 3, 32), ("swin3d_t", 4, 64), ("s3d", 16, 224),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (("swin3d_s", 4, 64), ("swin3d_b", 4, 64), ("mvit_v1_b", 16, 224), ("mvit_v2_s", 16, 224)))])
def test_features_are_what_the_classifier_gets(name, frames, size):
    network = load_network(ExtractConfig(name, frames, 8, 25., size, "random:3"), "cpu")
    with torch.random.fork_rng():
        torch.manual_seed(3)
        plain, seen = torchvision.models.get_model(name).eval(), []
    getattr(plain, NETWORKS[name].head).register_forward_pre_hook(lambda module, came: seen.append(came[0]))
    clips = torch.randn(2 if size < 100 else 1, 3, frames, size, size)
    with torch.inference_mode(): plain(clips)
    wanted = seen[0].mean((2, 3, 4)) if seen[0].ndim == 5 else seen[0]
    found = network.look(clips)
    assert found.shape == (network.header.channels, len(clips)) and found.dtype == np.float32
    np.testing.assert_allclose(found.T, wanted, atol=2e-5 * float(wanted.abs().max()))


def test_fewer_products_for_many_shapes():
    rng = np.random.default_rng(0)
    for _ in range(12):
        C, D, taps = rng.integers(64, 80), rng.integers(64, 80), int(rng.choice([1, 3]))
        B, F, H, W = rng.integers(1, [4, 5, 18, 18])
        conv, x = nn.Conv3d(C, D, (taps, 3, 3), padding=(taps // 2, 1, 1), bias=bool(rng.integers(2))), torch.randn(B, C, F, H, W)
        assert serves(conv)
        with torch.inference_mode():
            found = FewProducts(conv)(x)
            assert (found.double() - conv.double()(x.double())).abs().max() < 2e-5, (B, C, D, F, H, W, taps)
    for other in (nn.Conv3d(64, 64, 3), nn.Conv3d(64, 64, 3, 2, 1), nn.Conv3d(64, 64, 3, padding=1, groups=2), nn.Conv3d(32, 64, 3, padding=1), nn.Conv3d(64, 64, (3, 1, 1), padding=(1, 0, 0)),
                  nn.Conv3d(64, 64, 3, padding=2, dilation=2), nn.Conv2d(64, 64, 3, padding=1)): assert not serves(other)


def test_every_clip_sees_its_frames_and_each_frame_is_read_once(tmp_path, monkeypatch):
    rng, plain, read = np.random.default_rng(1), extraction.squares, []
    monkeypatch.setattr(extraction, "squares", lambda video, numbers, how: read.append(numbers) or plain(video, numbers, how))
    for n in (1, 3, 17, 60):
        path = write_video(tmp_path / f"{n}.mp4", grey(n), 25, options={"qp": "0"})
        for _ in range(8):
            how = ExtractConfig(num_frames=int(rng.integers(1, 24)), stride=int(rng.integers(1, 20)), size=16, weights="random:0")
            read.clear()
            found = frames_seen(path, how)
            T = max(1, (n - how.num_frames) // how.stride + 1)
            wanted = (np.arange(T)[:, None] * how.stride + np.arange(how.num_frames)) % n
            assert np.array_equal(found, wanted), (n, how)
            numbers = np.concatenate(read)
            if n >= how.num_frames: assert len(np.unique(numbers)) == len(numbers), "a frame was read twice"
            assert max(map(len, read)) <= (extraction.CLIPS - 1) * how.stride + how.num_frames, "more frames in memory than a batch of clips needs"


def test_a_rate_that_varies_gives_an_even_clock(tmp_path):
    rng = np.random.default_rng(2)
    times = np.cumsum(np.r_[0, rng.uniform(.01, .09, 59)])
    video = open_video(write_video(tmp_path / "phone.mp4", grey(60), 25, times_s=times, options={"qp": "0"}))
    how = ExtractConfig(num_frames=4, stride=2, fps=20., size=16, weights="random:0")
    found, (frames, duration_s) = frames_seen(video, how), video_facts(video, Network(how, Brightness(), ""))
    assert frames == round(duration_s * 20) and len(found) == steps(frames, 4, 2)
    shown = [int(np.flatnonzero(video.times_s <= (i + .5) / 20 + .1 / video.fps)[-1]) for i in range(frames)]
    wanted = np.array([[shown[2 * t + k] for k in range(4)] for t in range(len(found))])
    assert np.array_equal(found, wanted)
    grid = FeatureHeader("r3d_18", 20., 2, 4, 512).grid
    for t in range(len(found)): assert abs(grid.to_seconds(t) - video.times_s[found[t]].mean()) < .1


def test_every_second_frame_of_every_container(tmp_path):
    for suffix in ("mp4", "mkv", "webm", "avi"):
        for rate in (25, 30, Fraction(30000, 1001)):
            video = open_video(write_video(tmp_path / f"a.{suffix}", grey(60), rate, codec="libvpx-vp9" if suffix == "webm" else "libx264"))
            numbers = sampled(video, float(rate) / 2)
            assert set(np.diff(numbers)) == {2} and len(numbers) == 30, (suffix, rate)
            assert (sampled(video, None) == np.arange(60)).all()
            (tmp_path / f"a.{suffix}").unlink()


def test_a_turned_phone_video_is_seen_upright(tmp_path, small):
    import av
    picture = np.zeros((64, 96, 3), np.uint8)
    picture[:, :48] = 255
    plain = write_video(tmp_path / "plain.mp4", [picture] * 6, 25)
    with av.open(str(plain)) as old, av.open(str(tmp_path / "turned.mp4"), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        stream.set_display_matrix([0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30])
        for packet in old.demux(video=0):
            if packet.size: packet.stream = stream; new.mux(packet)
    upright, seen = (extraction.squares(open_video(tmp_path / f"{name}.mp4"), np.arange(2), SMALL) for name in ("plain", "turned"))
    assert open_video(tmp_path / "turned.mp4").height == 96
    assert abs(upright[0, 0, :, 8] - upright[0, 0, :, 24]).min() > 1 and abs(seen[0, 0, 8] - seen[0, 0, 24]).min() > 1


def test_weights_of_files(tmp_path, small):
    from safetensors.torch import save_file
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = torchvision.models.video.mc3_18().state_dict()
    torch.save(state, tmp_path / "a.pth")
    torch.save({"state_dict": {**state, "fc.weight": torch.zeros(7, 512), "fc.bias": torch.zeros(7)}, "epoch": 3}, tmp_path / "b.pth")
    save_file({name: value.contiguous() for name, value in state.items() if not name.startswith("fc")}, tmp_path / "c.safetensors")
    for name in ("a.pth", "b.pth", "c.safetensors"):
        assert load_network(replace(SMALL, weights=str(tmp_path / name))).header_at(5) == small.header_at(5), name
    assert load_network(replace(SMALL, weights="random:1")).weights != small.weights
    torch.save(nn.Linear(2, 2), tmp_path / "module.pth")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "c.safetensors").read_bytes()[:5000])
    for name, says in (("module.pth", "would execute code"), ("cut.safetensors", "not a whole safetensors"), ("none.pth", "no such file")):
        with pytest.raises(ValueError, match=says): load_network(replace(SMALL, weights=str(tmp_path / name)))
    with pytest.raises(ValueError, match="weights of another network.*r2plus1d_18 is needed"): load_network(ExtractConfig("r2plus1d_18", weights=str(tmp_path / "a.pth")))


def test_a_hub_that_cannot_be_reached(monkeypatch):
    from urllib.error import URLError

    def nowhere(*args, **more): raise URLError("no network")
    monkeypatch.setattr("torch.hub.download_url_to_file", nowhere)
    monkeypatch.setattr("torch.hub.get_dir", lambda: "/nonexistent/hub")
    with pytest.raises(ValueError, match="r3d_18: its weights cannot be downloaded from https://.*give the file as weights"): load_network(ExtractConfig())


@pytest.mark.parametrize("change, says", [
    (dict(network="i3d"), "no network 'i3d'"), (dict(precision="int8"), "no precision"), (dict(num_frames=0), "num_frames is 0"), (dict(stride=1.5), "stride is 1.5"), (dict(size="112"), "size is '112'"),
    (dict(fps=0), "fps is 0"), (dict(fps=float("nan")), "fps is nan"), (dict(size=8), "at least 1 frames of 16 x 16"), (dict(network="mvit_v1_b", size=224, num_frames=32), "needs 16 frames of 224 x 224 pixels, 32 of"),
    (dict(network="s3d", size=224, num_frames=8), "at least 14 frames"), (dict(network="swin3d_t", size=16), "at least 1 frames of 32")])
def test_settings_that_cannot_be(change, says):
    with pytest.raises(ValueError) as error: ExtractConfig(**change)
    assert says in str(error.value), str(error.value)


def test_settings_of_a_header(small):
    header = small.header_at(25.)
    again = ExtractConfig.of(header, "random:0")
    assert again.fps == 25 and load_network(again).header == header
    with pytest.raises(ValueError, match="no network for videos"): ExtractConfig.of(FeatureHeader("windows", 50, 25, 50, 60))
    with pytest.raises(ValueError, match="stride is 3.5"): ExtractConfig.of(FeatureHeader("r3d_18", 25, 3.5, 16, 512, size=112))


def folder_of_videos(tmp_path):
    "Two videos, and everything that can be wrong with one."
    import av
    videos = tmp_path / "videos"
    videos.mkdir()
    for name, n in (("a", 20), ("b c.d", 30)): write_video(videos / f"{name}.mp4", grey(n), 25)
    (videos / "text.mp4").write_text("no video")
    (videos / "empty.mp4").write_bytes(b"")
    (videos / "cut.mp4").write_bytes((videos / "a.mp4").read_bytes()[:-300])
    with av.open(str(videos / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 16000, 0
        container.mux(stream.encode(frame)), container.mux(stream.encode())
    (videos / "notes.txt").write_text("not taken")
    return videos


def test_a_folder_with_broken_videos(tmp_path, small):
    videos, out = folder_of_videos(tmp_path), tmp_path / "features"
    found = extract(videos, out, SMALL)
    assert [os.path.basename(p) for p in found.done] == ["a.mp4", "b c.d.mp4"] and not found.skipped
    assert sorted(os.path.basename(p) for p in found.failed) == ["cut.mp4", "empty.mp4", "sound.mp4", "text.mp4"]
    assert all(reason.startswith(path) for path, reason in found.failed.items())
    assert sorted(p.name for p in out.iterdir()) == ["a.npz", "b c.d.npz"]
    was = (out / "a.npz").stat().st_mtime_ns
    (out / "b c.d.npz").unlink()
    again = extract([videos / "a.mp4", videos / "b c.d.mp4"], out, SMALL)
    assert (len(again.done), len(again.skipped), again.failed) == (1, 1, {}) and (out / "a.npz").stat().st_mtime_ns == was
    for changed, says in ((dict(stride=4), "stride 4 instead of 2"), (dict(weights="random:1"), "weights"), (dict(fps=12.5), "fps 12.5 instead of 25"), (dict(precision="bfloat16"), "precision bfloat16")):
        with pytest.raises(ValueError, match=f"a.npz: other features lie here.*{says}"): extract(videos / "a.mp4", out, replace(SMALL, **changed))
    half = tmp_path / "half"
    extract(videos / "a.mp4", half, replace(SMALL, fps=12.5))
    with pytest.raises(ValueError, match="fps 25 instead of 12.5"): extract(videos / "a.mp4", half, SMALL)


def test_names_that_clash_and_places_that_are_none(tmp_path):
    (tmp_path / "x").mkdir(), (tmp_path / "y").mkdir(), (tmp_path / "file").write_text("")
    for path in ("x/a.mp4", "y/A.mkv"): (tmp_path / path).write_bytes(b"")
    with pytest.raises(ValueError, match="both features would be called A.npz"): extract([tmp_path / "x", tmp_path / "y"], tmp_path / "out", SMALL)
    with pytest.raises(ValueError, match="no video came"): extract([], tmp_path / "out", SMALL)
    with pytest.raises(ValueError, match="features cannot be written here"): extract(tmp_path / "x", tmp_path / "file/out", SMALL)
    with pytest.raises(ValueError, match="processes is 0"): extract(tmp_path / "x", tmp_path / "out", SMALL, processes=0)
    assert not (tmp_path / "out").exists()


def test_a_file_of_somebody_else_is_not_overwritten(tmp_path):
    write_video(tmp_path / "a.mp4", grey(8), 25)
    np.savez(tmp_path / "a.npz", feats=np.ones((3, 2)))
    with pytest.raises(ValueError, match="a.npz: a file without header is in the way"): extract(tmp_path / "a.mp4", tmp_path, SMALL)
    (tmp_path / "a.npz").write_bytes(b"PK")
    with pytest.raises(ValueError, match="a.npz: cannot be read"): extract(tmp_path / "a.mp4", tmp_path, SMALL)


def test_nothing_is_left_of_half_a_file(tmp_path, small, monkeypatch):
    video, chunks = write_video(tmp_path / "a.mp4", grey(40), 25), extraction.feature_chunks

    def breaks(*what):
        yield next(chunks(*what))
        raise ValueError(f"{video}: the file is damaged")
    monkeypatch.setattr(extraction, "feature_chunks", breaks)
    assert extract(video, tmp_path / "out", SMALL).failed == {str(video): f"{video}: the file is damaged"}
    assert not list((tmp_path / "out").iterdir())


def test_numbers_that_are_not_finite(tmp_path):
    class Nothing(Brightness):
        def forward(self, x): return super().forward(x) / 0
    with pytest.raises(ValueError, match="a.mp4: mc3_18 gave numbers that are not finite in float32"):
        next(feature_chunks(write_video(tmp_path / "a.mp4", grey(8), 25), Network(SMALL, Nothing(), "")))


def test_a_dataset_of_extracted_features(tmp_path, small):
    for name, n in (("a", 50), ("b", 90)): write_features(write_video(tmp_path / f"{name}.mp4", grey(n), 25), tmp_path / f"features/{name}.npz", small)
    content = {"classes": ["wave"], "features": {"folder": "features", "suffix": ".npz"},
               "database": {name: {"subset": "train", "duration": n / 25, "fps": 25, "annotations": [{"label": "wave", "segment": [.5, 1]}]} for name, n in (("a", 50), ("b", 90))}}
    write = lambda: (tmp_path / "annotations.json").write_text(json.dumps(content))
    write()
    data = read_dataset(tmp_path)
    assert data.header == read_header(Place(tmp_path / "features/a.npz")) == small.header_at(25) and [r.features.shape for r in data] == [(512, 24), (512, 44)]
    assert data[0].grid == data.header.grid
    for change, says in ((dict(stride=4), "a.npz: the header says stride 2, the settings say 4"), (dict(fps=30), "a.npz: the header says fps 25, the settings say 30"), (dict(channels=400), "channels 512, the settings say 400")):
        with pytest.raises(ValueError) as error: read_dataset(tmp_path, {**content["features"], "folder": str(tmp_path / "features"), **change})
        assert says in str(error.value), str(error.value)
    write_features(tmp_path / "b.mp4", tmp_path / "features/b.npz", load_network(replace(SMALL, fps=12.5), "cpu"))
    with pytest.raises(ValueError, match="b.npz: other features than those of a: fps 12.5 instead of 25.*say fps"): read_dataset(tmp_path)
    for name in "ab": write_features(tmp_path / f"{name}.mp4", tmp_path / f"features/{name}.npz", load_network(replace(SMALL, fps=12.5), "cpu"))
    assert read_dataset(tmp_path).header.fps == 12.5                      # 25 is the rate of the video, and the file knows it
    content["database"]["b"]["fps"] = 30
    write()
    with pytest.raises(ValueError, match="b.npz: the features were made at 12.5 frames per second of a video of 25, but the annotation of b says 30"): read_dataset(tmp_path)


@pytest.mark.slow
def test_several_processes(tmp_path):
    videos = folder_of_videos(tmp_path)
    program = f"""
from actloc.app.extract import ExtractConfig, extract
if __name__ == "__main__":
    found = extract({str(videos)!r}, {str(tmp_path / "two")!r}, ExtractConfig("mc3_18", num_frames=4, stride=2, size=32, weights="random:0"), processes=2)
    print(len(found.done), len(found.failed))
"""
    (tmp_path / "program.py").write_text(program)
    done = subprocess.run([sys.executable, str(tmp_path / "program.py")], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2", "4"]
    extract(videos, tmp_path / "one", SMALL)
    for name in ("a", "b c.d"):
        one, two = (np.load(tmp_path / folder / f"{name}.npz", allow_pickle=False) for folder in ("one", "two"))
        np.testing.assert_allclose(one["feats"], two["feats"], atol=1e-5)
        assert str(one["header"]) == str(two["header"])


def test_memory_does_not_grow_with_the_video(tmp_path):
    if not os.path.exists("/proc/self/clear_refs"): pytest.skip("the peak of memory can be reset on Linux only")
    for name, seconds in (("short", 20), ("long", 180)): write_video(tmp_path / f"{name}.mp4", (p for _ in range(seconds // 2) for p in grey(60)), 30, options={"preset": "ultrafast"})
    program = """
from torch import nn
from actloc.app.extract import ExtractConfig, Network, write_features
network = Network(ExtractConfig(size=64), nn.Sequential(nn.Conv3d(3, 512, 1, stride=8), nn.AdaptiveAvgPool3d(1), nn.Flatten()).requires_grad_(False), "")
for name in ("short", "short", "long"):
    open("/proc/self/clear_refs", "w").write("5")
    write_features(f"{name}.mp4", f"{name}.npz", network)
    print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    _, short, long = map(int, done.stdout.split())
    assert long - short < 20_000, "kilobytes; the frames of the long video are 250,000 of them"
