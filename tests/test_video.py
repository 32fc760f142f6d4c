"""Video: the frames of every kind of file against decoding everything in order; clocks, turns, files that are cut off, threads, processes, bad input."""
import multiprocessing
import os
import pickle
import socket
import threading
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image

from actloc.data.video import Decoder, Reel, index_file, normalised, open_video, random_window, scaled, window, write_video

HEIGHT, WIDTH = 48, 64


def pictures(n, seed=0, height=HEIGHT, width=WIDTH):
    "Blocks of noise that wander, so that every frame is another and motion is worth a B-frame."
    noise = np.random.default_rng(seed).integers(0, 255, (height // 8 + n, width // 8, 3), dtype=np.uint8)
    return [np.kron(noise[i // 2:i // 2 + height // 8], np.ones((8, 8, 1), np.uint8)) // 2 + np.uint8(i * 7 % 100) for i in range(n)]


def write(path, n=70, codec="libx264", pix_fmt="yuv420p", format_options=None, audio=False, matrix=None, rate=25, **options):
    "Writes a video with PyAV, everything adjustable."
    with av.open(str(path), "w", options=format_options or {}) as container:
        stream = container.add_stream(codec, rate=rate, options={k.replace("_", "-"): str(v) for k, v in options.items()})
        if codec == "libx264": stream.codec_context.options = {"b_strategy": "0", **stream.codec_context.options}
        stream.width, stream.height, stream.pix_fmt, stream.codec_context.thread_count = WIDTH, HEIGHT, pix_fmt, 1
        if matrix: stream.set_display_matrix(matrix)
        sound = container.add_stream("aac", rate=16000, layout="mono") if audio else None
        for i, picture in enumerate(pictures(n)):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            if sound:
                frame = av.AudioFrame.from_ndarray(np.zeros((1, 640), np.float32), format="fltp", layout="mono")
                frame.sample_rate, frame.pts, frame.time_base = 16000, i * 640, Fraction(1, 16000)
                container.mux(sound.encode(frame))
        container.mux(stream.encode())
        if sound: container.mux(sound.encode())
    return path


def everything(path):
    "All frames in order, the judge; as far as the file can be decoded."
    frames = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        try:
            for frame in container.decode(stream): frames.append(frame.to_ndarray(format="rgb24"))
        except av.FFmpegError: pass
    return np.stack(frames)


def edited(path):
    "The same packets under an edit list that begins in the middle of a group of pictures: 7 frames are decoded and never shown."
    source = write(path.with_name("source.mp4"), g=30, bf=2)
    with av.open(str(source)) as old, av.open(str(path), "w", options={"avoid_negative_ts": "disabled"}) as new:
        stream = old.streams.video[0]
        copy = new.add_stream_from_template(stream)
        for packet in old.demux(stream):
            if packet.dts is None: continue
            packet.pts, packet.dts, packet.stream = packet.pts - 7 * 512, packet.dts - 7 * 512, copy
            new.mux(packet)
    return path


FILES = {
    "b_frames.mp4": dict(g=12, bf=3), "one_group.mp4": dict(g=250, bf=3), "no_b.mp4": dict(g=12, bf=0), "all_keys.mp4": dict(g=1),
    "pyramid.mp4": dict(g=30, bf=7, x264_params="b-pyramid=normal:ref=4"), "open_gop.mp4": dict(x264_params="open-gop=1:keyint=12:bframes=3"),
    "refresh.mp4": dict(x264_params="intra-refresh=1:keyint=12:bframes=0"), "fragments.mp4": dict(g=12, format_options={"movflags": "frag_keyframe+empty_moov"}),
    "audio.mp4": dict(g=12, audio=True), "audio.ts": dict(g=12, audio=True), "audio.mkv": dict(g=12, audio=True), "interlaced.ts": dict(g=12, bf=2, flags="+ildct+ilme", x264_params="tff=1"),
    "a.mkv": dict(g=12), "a.flv": dict(g=12), "mpeg2.ts": dict(codec="mpeg2video", g=12, bf=2), "mpeg4.avi": dict(codec="mpeg4", g=12, bf=2), "mpeg4.mp4": dict(codec="mpeg4", g=12, bf=2),
    "motion.avi": dict(codec="mjpeg", pix_fmt="yuvj420p"), "counted.avi": dict(g=12, bf=3), "counted.h264": dict(g=12, bf=3),
    "hevc.mp4": dict(codec="libx265", g=12, x265_params="log-level=0:temporal-layers=3:bframes=4:keyint=12"), "hevc_open.mkv": dict(codec="libx265", x265_params="log-level=0:open-gop=1:keyint=12"),
    "vp8.webm": dict(codec="libvpx", g=24, auto_alt_ref=1, lag_in_frames=16, b="200k", deadline="realtime", cpu_used=8), "vp9.webm": dict(codec="libvpx-vp9", g=24, auto_alt_ref=1, lag_in_frames=16, deadline="realtime", cpu_used=8),
    "a.gif": dict(codec="gif", pix_fmt="rgb8"), "ten_bits.mp4": dict(g=12, pix_fmt="yuv420p10le"), "444.mp4": dict(g=12, pix_fmt="yuv444p"), "ntsc.mp4": dict(g=12, rate=Fraction(30000, 1001)), "edited.mp4": None,
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")

    def file(name):
        if not (folder / name).exists(): edited(folder / name) if FILES[name] is None else write(folder / name, **FILES[name])
        return folder / name
    return file


def random_reading(video, truth, seed, times=25):
    "Single frames, clips, repeats, from front to back and back again: always the frames of the judge."
    rng, n = np.random.default_rng(seed), len(truth)
    for trial in range(times):
        indices = (rng.integers(0, n, rng.integers(1, 12)), window(int(rng.integers(0, n)), 8, int(rng.integers(1, 4)), n),
                   rng.integers(0, n - 9) + np.arange(9), np.arange(n - 1, 0, -7))[trial % 4]
        np.testing.assert_array_equal(video.read(indices), truth[indices])


@pytest.mark.parametrize("name", FILES)
def test_any_frames_of_any_file(files, name):
    truth, video = everything(files(name)), open_video(files(name))
    assert video.frames == len(truth) and (video.height, video.width) == truth.shape[1:3]
    assert len(np.unique(truth.reshape(len(truth), -1), axis=0)) >= .9 * len(truth)           # or the test could not tell them apart
    random_reading(video, truth, 0)
    np.testing.assert_array_equal(np.concatenate(list(video.stream(16))), truth)
    video.close()
    np.testing.assert_array_equal(video.read([len(truth) - 1]), truth[-1:])


def test_short_windows_one_after_another(tmp_path):
    """A frame that was left out on the way to others must not be waited for later: it lies ahead of what was shown, but will not come."""
    pictures = [np.full((36, 48, 3), 6 * i % 250, np.uint8) for i in range(40)]
    for options in ({"g": "8", "crf": "4"}, {"g": "12", "bf": "3"}):
        path = write_video(tmp_path / "short.mp4", pictures, 8, options=options)
        whole = open_video(path).read(range(40))
        for seed in range(30):
            video, rng = open_video(path), np.random.default_rng(seed)
            for _ in range(12):
                first, stride = int(rng.integers(0, 30)), int(rng.integers(1, 3))
                numbers = list(range(first, min(first + 4 * stride, 40), stride))
                assert (video.read(numbers) == whole[numbers]).all()


@pytest.mark.parametrize("name", FILES)
def test_clock_of_any_file(files, name):
    video = open_video(files(name))
    rate = 30000 / 1001 if name == "ntsc.mp4" else 25
    assert video.fps == pytest.approx(rate)
    np.testing.assert_allclose(video.times_s, np.arange(video.frames) / rate, rtol=0, atol=.08 if name.startswith("audio") else .0011)          # sound may begin a little earlier
    assert (np.diff(video.times_s) > 0).all() and video.duration_s == pytest.approx(video.times_s[-1] + 1 / rate, abs=.0011)


def test_frames_that_nobody_needs_are_not_decoded(files):
    index = index_file(files("one_group.mp4"))
    came = []

    class Watched(Reel):
        def step(self, *rest):
            found = super().step(*rest)
            came.extend(n for n, _ in found or [])
            return found
    decoder = Decoder(files("one_group.mp4"), index)
    decoder.reel = Watched(files("one_group.mp4"), index)
    list(decoder.frames([60]))
    assert 60 in came and len(came) < 45                                                     # of 61
    came.clear()
    list(decoder.frames([61, 62]))
    assert set(came) <= set(range(61, 67))                                                   # it went on from there
    list(decoder.frames(range(70)))
    assert decoder.room > 70 and len(decoder.kept) == 70
    decoder.room = 5
    list(decoder.frames(range(30)))
    assert sorted(decoder.kept)[-5:][0] >= 25 and len(decoder.kept) <= 5


def test_memory_of_kept_frames_is_bounded(files, monkeypatch):
    monkeypatch.setattr("actloc.data.video.KEPT_BYTES", 2 * HEIGHT * WIDTH * 6)
    truth, video = everything(files("b_frames.mp4")), open_video(files("b_frames.mp4"))
    random_reading(video, truth, 1)
    assert all(len(d.kept) <= 6 for d in video.decoders.free)
    monkeypatch.setattr("actloc.data.video.KEPT_BYTES", 0)
    random_reading(open_video(files("b_frames.mp4")), truth, 2)


# ---- clocks and turns

@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize("seed", range(3))
def test_variable_rate(tmp_path, suffix, seed):
    rng = np.random.default_rng(seed)
    times = np.cumsum(np.r_[0, rng.choice([.02, .04, .1, .5], 59)])
    path = write_video(tmp_path / f"v{suffix}", pictures(60), 25, times_s=times, options={"g": "12"})
    truth, video = everything(path), open_video(path)
    assert video.frames == 60
    np.testing.assert_allclose(video.times_s, times, rtol=0, atol=.0006)                      # Matroska rounds to milliseconds
    assert video.fps == pytest.approx(59 / times[-1], rel=1e-3)
    random_reading(video, truth, seed)
    for second in rng.uniform(0, times[-1], 50):
        assert video.frame_at(second) in {max(np.flatnonzero(times <= second + e)) for e in (-.0006, .0006)}


def test_the_picture_of_a_second(files):
    video = open_video(files("b_frames.mp4"))
    for i in (0, 1, 33, 69):
        assert video.frame_at(i / 25) == i == video.frame_at(i / 25 + .039)
    for second in (-.1, 2.8, 902, float("nan")):
        with pytest.raises(ValueError, match="b_frames.mp4: second .* lies outside, the video lasts 2.80 s"): video.frame_at(second)


ONE, Z = 1 << 16, 1 << 30


@pytest.mark.parametrize("a, b, c, d", [(1, 0, 0, 1), (-1, 0, 0, 1), (1, 0, 0, -1), (-1, 0, 0, -1), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, -1, 0), (0, -1, -1, 0)])
def test_all_eight_turns(tmp_path, a, b, c, d):
    path = write(tmp_path / "phone.mp4", 12, matrix=[a * ONE, b * ONE, 0, c * ONE, d * ONE, 0, 0, 0, Z])
    stored, video = everything(path)[[0, 7]], open_video(path)
    q, p = np.mgrid[:HEIGHT, :WIDTH]                                                          # a pixel is sent to column a p + c q, row b p + d q
    column, row = a * p + c * q, b * p + d * q
    column, row = column - column.min(), row - row.min()
    expected = np.empty((2, row.max() + 1, column.max() + 1, 3), np.uint8)
    expected[:, row, column] = stored
    assert (video.height, video.width) == expected.shape[1:3]
    np.testing.assert_array_equal(video.read([0, 7]), expected)
    small = video.read([0, 7], 24)
    assert small.shape[1:3] == ((32, 24) if a == 0 else (24, 32))
    assert abs(small.astype(int) - expected.reshape(2, small.shape[1], 2, small.shape[2], 2, 3).mean((2, 4))).mean() < 1


def test_colours(tmp_path):
    "Red stays red, also where a file says that its colours are those of BT.709."
    for space in (5, 1):
        with av.open(str(tmp_path / "red.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=25, options={"crf": "5", "colorspace": str(space)})
            stream.width, stream.height, stream.pix_fmt, stream.codec_context.colorspace = 64, 48, "yuv420p", space
            red = av.VideoFrame.from_ndarray(np.full((48, 64, 3), [200, 40, 30], np.uint8), format="rgb24").reformat(format="yuv420p", dst_colorspace=space)
            container.mux(stream.encode(red)), container.mux(stream.encode())
        seen = open_video(tmp_path / "red.mp4").read([0])[0].reshape(-1, 3)
        assert abs(seen.astype(int) - [200, 40, 30]).max() <= 6


# ---- files that are cut off, files that are damaged

CUT = {"faststart.mp4": dict(format_options={"movflags": "faststart"}), "fragments.mp4": dict(format_options={"movflags": "frag_keyframe+empty_moov"}),
       "b.mkv": {}, "b.flv": {}, "audio.mkv": dict(audio=True), "audio.mp4": dict(audio=True, format_options={"movflags": "faststart"})}


@pytest.mark.parametrize("name", CUT)
@pytest.mark.parametrize("share", [.25, .4, .55, .7, .85, .97])
def test_cut_off(tmp_path, name, share):
    path = write(tmp_path / name, g=24, bf=3, **CUT[name])
    truth, data = everything(path), path.read_bytes()
    path.write_bytes(data[:int(len(data) * share)])
    try: video = open_video(path)
    except ValueError as error:
        assert str(path) in str(error)
        if "0 frames can be read" in str(error): return
        rest = open_video(path, whole=False)
        assert f"{rest.frames} " in str(error).replace(str(path), "") and "cut off" in str(error) and "whole=False" in str(error)
        assert 0 < rest.frames < 70
        np.testing.assert_array_equal(rest.read(range(rest.frames)), truth[:rest.frames])     # the first ones, no hole, no half picture
        random_reading(rest, truth[:rest.frames], 0, 8) if rest.frames > 10 else None
    else:
        assert name == "b.flv", f"{video.frames} of 70 frames, and not a word"                # flv has no list, and a cut between two packets leaves no trace


def test_cut_off_at_every_kilobyte_near_the_end(tmp_path):
    path = write(tmp_path / "a.mp4", g=24, bf=3, format_options={"movflags": "faststart"})
    truth, data, counts = everything(path), path.read_bytes(), []
    for missing in (1, 2, 40, 300, 700, 1500, 3000, 5000):
        path.write_bytes(data[:-missing])
        with pytest.raises(ValueError, match=r"cut off: \d+ of its 70 frames can be read"): open_video(path)
        rest = open_video(path, whole=False)
        counts.append(rest.frames)
        np.testing.assert_array_equal(rest.read([rest.frames - 1]), truth[[rest.frames - 1]])
    assert counts == sorted(counts, reverse=True) and counts[0] >= 64


def test_damage_in_the_middle(tmp_path):
    path = write(tmp_path / "a.mp4", g=20, bf=0)
    truth, data = everything(path), bytearray(path.read_bytes())
    with av.open(str(path)) as container: packets = [(p.pos, p.size) for p in container.demux(video=0) if p.size]
    data[packets[30][0]:packets[30][0] + packets[30][1]] = bytes(packets[30][1])
    path.write_bytes(data)
    video = open_video(path)
    np.testing.assert_array_equal(video.read([0, 29, 40, 69]), truth[[0, 29, 40, 69]])        # other groups are as they were
    for frame in (30, 31, 39):
        with pytest.raises(ValueError, match=r"a.mp4: the file is damaged at second 1.20 \(frame 30"): video.read([frame])
    np.testing.assert_array_equal(video.read([29, 41]), truth[[29, 41]])


# ---- threads and processes

def test_threads(files):
    truth, video, wrong = everything(files("b_frames.mp4")), open_video(files("b_frames.mp4")), []

    def reader(seed):
        try: random_reading(video, truth, seed, 12)
        except Exception as error: wrong.append(error)
    threads = [threading.Thread(target=reader, args=(seed,)) for seed in range(6)]
    walk = video.stream(8)
    first = next(walk)
    for thread in threads: thread.start()
    np.testing.assert_array_equal(np.concatenate([first, *walk]), truth)
    for thread in threads: thread.join()
    assert not wrong and 1 <= len(video.decoders.free) <= 7


def read_in_child(indices): return PARENT.read(indices)


def test_forked_workers_do_not_move_the_file_of_their_parent(tmp_path):
    global PARENT
    noise = np.random.default_rng(0).integers(0, 255, (70, 96, 128, 3), dtype=np.uint8)
    path = write_video(tmp_path / "large.mp4", noise, 25, options={"g": "12", "crf": "10"})   # more than FFmpeg reads ahead
    truth, PARENT = everything(path), open_video(path)
    PARENT.read([0])                                                                          # its decoder is open when the children are born
    with multiprocessing.get_context("fork").Pool(2) as pool:
        jobs = [pool.apply_async(read_in_child, (window(c, 8, 2, 70),)) for c in range(0, 70, 5)]
        random_reading(PARENT, truth, 3)
        for c, job in zip(range(0, 70, 5), jobs): np.testing.assert_array_equal(job.get(60), truth[window(c, 8, 2, 70)])
    random_reading(PARENT, truth, 4, 8)


def test_a_video_can_be_sent_to_another_process(files):
    video = open_video(files("b_frames.mp4"))
    first = video.read([5, 50])
    copy = pickle.loads(pickle.dumps(video))
    np.testing.assert_array_equal(copy.read([5, 50]), first)
    assert len(pickle.dumps(video)) < 20_000


def test_no_file_stays_open(files):
    before = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else pytest.skip("no /proc here")
    for _ in range(5):
        video = open_video(files("b_frames.mp4"))
        video.read([3])
        video.close()
        with pytest.raises(ValueError): open_video(files("b_frames.mp4").with_name("no.mp4"))
    assert len(os.listdir("/proc/self/fd")) == before


# ---- windows, scaling, normalising

def test_window_against_the_rule():
    for total in (1, 3, 31, 63, 64, 65, 66, 100):
        for centre in range(0, total, 1 + total // 9):
            frames = list(range(total))
            if total > 64: frames = frames[min(max(centre - 32, 0), total - 64):][:64]
            for frame in list(frames):
                if len(frames) >= 64: break
            k = 0
            while len(frames) < 64: frames.append(frames[k]); k += 1                          # from the first on
            np.testing.assert_array_equal(window(centre, 32, 2, total), frames[::2])
    for centre in (-1, 50, 900):
        with pytest.raises(ValueError, match="film.mp4: the key frame .* lies outside, there are frames 0 to 49"): window(centre, 32, 2, 50, "film.mp4")


def test_random_window_is_uniform():
    rng = np.random.default_rng(0)
    first = np.array([random_window(32, 2, 68, rng)[0] for _ in range(5000)])
    counts = np.bincount(first)
    assert len(counts) == 5 and counts.min() > 880 and counts.max() < 1120
    np.testing.assert_array_equal(random_window(32, 2, 68, np.random.default_rng(1)), random_window(32, 2, 68, np.random.default_rng(1)))


@pytest.mark.parametrize("size, expected", [(None, (48, 64)), (48, (48, 64)), (30, (30, 40)), (31, (31, 41)), ((20, 100), (20, 100)), (np.int64(24), (24, 32))])
def test_sizes(files, size, expected):
    video = open_video(files("b_frames.mp4"))
    assert video.read([3, 40], size).shape == (2, *expected, 3)
    full = torch.from_numpy(video.read([3, 40])).permute(0, 3, 1, 2).double()
    exact = torch.nn.functional.interpolate(full, size=expected, mode="bilinear", align_corners=False).permute(0, 2, 3, 1).numpy()
    assert abs(video.read([3, 40], size) - exact).max() <= 1.1


@pytest.mark.parametrize("size", [0, -5, 2.5, (3,), (3, 4, 5), "256", (256, None)])
def test_sizes_that_are_none(files, size):
    with pytest.raises(ValueError, match="short side"): open_video(files("b_frames.mp4")).read([0], size)


def test_normalised_leaves_its_input_alone():
    rng = np.random.default_rng(0)
    for _ in range(5):
        frames = rng.integers(0, 256, (3, 10, 14, 3), dtype=np.uint8)
        copy, mean, std, scale = frames.copy(), rng.uniform(0, 1, 3), rng.uniform(.1, 1, 3), rng.choice([1, 1 / 255])
        for view in (frames, frames[:, :, ::-1], frames[:, 2:7, 3:9], frames[:, 2:7, 3:9][:, :, ::-1], frames[:0], frames[:, ::-1][:, ::-1]):
            expected = (view.astype(np.float64) * scale - mean) / std
            np.testing.assert_allclose(normalised(view, mean, std, scale), expected.transpose(3, 0, 1, 2), rtol=1e-5, atol=1e-4 if scale == 1 else 1e-5)
        assert (frames == copy).all()


def test_scaled_leaves_its_input_alone():
    picture = pictures(1)[0]
    copy = picture.copy()
    scaled(picture, 20, 30)[:] = 0
    assert (picture == copy).all()


# ---- images

def image_folder(folder, names, size=(48, 64)):
    folder.mkdir()
    for i, name in enumerate(names): Image.fromarray(np.full((*size, 3), i * 5, np.uint8)).save(folder / name, **({"quality": 95} if name.endswith("jpg") else {}))
    return folder


def test_images_in_their_order(tmp_path):
    for k, names in enumerate([[f"image_{i:06d}.jpg" for i in range(1, 13)], [f"{i}.png" for i in range(8, 20)], [f"f{i}.PNG" for i in range(95, 107)], ["a.png", "b2.png", "c.png", "d7.png"]]):
        folder = image_folder(tmp_path / str(k), names)
        (folder / "notes.txt").touch(), (folder / ".image_000000.jpg").touch()
        video = open_video(folder, fps=10)
        assert video.frames == len(names) and video.duration_s == pytest.approx(len(names) / 10)
        assert abs(video.read(range(len(names)))[:, 5, 5, 0].astype(int) - np.arange(len(names)) * 5).max() <= 1
        assert video.frame_at(.3) == 3 and video.read([2], 24).shape == (1, 24, 32, 3)


def refused(action, *words):
    with pytest.raises(ValueError) as caught: action()
    for word in words: assert word in str(caught.value), str(caught.value)
    assert "\n" not in str(caught.value) and str(caught.value).rstrip()[-1] in ".?", str(caught.value)


def test_images_that_are_missing_damaged_or_odd(tmp_path):
    names = [f"image_{i:06d}.jpg" for i in range(1, 13)]
    folder = image_folder(tmp_path / "a", names)
    video = open_video(folder, fps=10)
    (folder / names[6]).unlink()
    refused(lambda: open_video(folder, fps=10), str(folder), "1 of 12 images are missing: image_000007.jpg")
    refused(lambda: video.read([5, 6]), "image_000007.jpg: this frame is missing")
    (folder / names[7]).write_bytes((folder / names[7]).read_bytes()[:300])
    refused(lambda: video.read([7]), "image_000008.jpg: this frame cannot be read")
    Image.fromarray(np.zeros((10, 10, 3), np.uint8)).save(folder / names[8])
    refused(lambda: video.read([8]), "image_000009.jpg: 10 x 10 pixels, but the first image of the folder has 48 x 64")
    refused(lambda: open_video(image_folder(tmp_path / "b", ["1.jpg", "1.png", "2.jpg"]), fps=10), "the same number")
    refused(lambda: open_video(image_folder(tmp_path / "c", []), fps=10), "no image")
    for fps in (None, 0, -3): refused(lambda: open_video(folder, fps=fps), "fps=30")


# ---- bad input

def test_what_is_no_video(tmp_path):
    at = lambda name, content: (tmp_path / name).write_bytes(content) and tmp_path / name
    refused(lambda: open_video(tmp_path / "no.mp4"), "no.mp4: no such file")
    refused(lambda: open_video(at("page.mp4", b"<html>not found</html>")), "page.mp4: this is not a video")
    refused(lambda: open_video(at("noise.mp4", np.random.default_rng(0).bytes(9000))), "noise.mp4: this is not a video")
    refused(lambda: open_video(at("notes.txt", b"hello world\n" * 50)), "notes.txt: this is a text or a picture")
    (tmp_path / "empty.mp4").touch()
    refused(lambda: open_video(tmp_path / "empty.mp4"), "empty.mp4: the file is empty")
    Image.fromarray(pictures(1)[0]).save(tmp_path / "photo.jpg")
    refused(lambda: open_video(tmp_path / "photo.jpg"), "photo.jpg", "not a video")
    (tmp_path / "photo.mp4").write_bytes((tmp_path / "photo.jpg").read_bytes())
    refused(lambda: open_video(tmp_path / "photo.mp4"), "photo.mp4", "not a video")


def test_a_play_list_calls_nobody(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        (tmp_path / "list.m3u8").write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\nhttp://127.0.0.1:{server.getsockname()[1]}/a.ts\n#EXT-X-ENDLIST\n")
        refused(lambda: open_video(tmp_path / "list.m3u8"), "list.m3u8")
        server.setblocking(False)
        with pytest.raises(BlockingIOError): server.accept()


def test_no_picture_in_it(tmp_path):
    with av.open(str(tmp_path / "sound.m4a"), "w") as container:
        sound = container.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 16000, 0
        container.mux(sound.encode(frame)), container.mux(sound.encode())
    refused(lambda: open_video(tmp_path / "sound.m4a"), "sound.m4a: there is no video stream in it (audio only)")
    for name, words in (("none.mp4", "there is no video stream in it"), ("none.mkv", "0 frames can be read"), ("none.avi", "not one frame")):
        with av.open(str(tmp_path / name), "w") as container:
            stream = container.add_stream("mpeg4", rate=25)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            container.start_encoding()
        refused(lambda: open_video(tmp_path / name), name, words)


def test_frames_outside(files):
    video = open_video(files("b_frames.mp4"))
    for wrong, words in (([70], "frame 70 lies outside, there are frames 0 to 69"), ([3, -1], "frame -1 lies outside"), ([.5], "whole numbers"), ([[1, 2]], "whole numbers"), (3, "whole numbers"), ([True], "whole numbers")):
        refused(lambda: video.read(wrong), "b_frames.mp4", words) if words != "whole numbers" else pytest.raises(ValueError, video.read, wrong)
    assert video.read([]).shape == (0, 48, 64, 3)


def test_a_file_that_vanishes(tmp_path):
    path = write(tmp_path / "a.mp4", 20)
    video = open_video(path)
    path.unlink()
    refused(lambda: video.read([3]), "a.mp4: no such file")


def test_names_that_mean_something_to_ffmpeg(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a:b.mp4", "image_%03d.mp4", "http:x.mp4", "umlaut ä 猫 'q' .mp4", "-y.mp4"):
        path = write_video(name, pictures(5), 25)
        assert open_video(path).read([4]).shape == (1, 48, 64, 3)


def test_writing(tmp_path):
    for suffix, codec in ((".mp4", "libx264"), (".mkv", "libx264"), (".ts", "libx264"), (".avi", "mpeg4"), (".webm", "libvpx"), (".mov", "mpeg4")):
        video = open_video(write_video(tmp_path / f"a{suffix}", pictures(30), 12.5, codec=codec))
        assert video.frames == 30 and video.fps == pytest.approx(12.5)
        assert abs(video.read([17])[0].astype(int) - pictures(30)[17]).mean() < 25
    (tmp_path / "file").touch()
    refused(lambda: write_video(tmp_path / "file" / "x.mp4", pictures(3), 25), "x.mp4: cannot be written")
    refused(lambda: write_video(tmp_path / "x.nonsense", pictures(3), 25), "x.nonsense: cannot be written")
    refused(lambda: write_video(tmp_path / "x.mp4", pictures(3), 25, codec="nonsense"), "x.mp4: cannot be written")
    for frames in ([p[:-1] for p in pictures(3)], [p.astype(float) for p in pictures(3)], [pictures(1)[0][..., 0]]):
        refused(lambda: write_video(tmp_path / "x.mp4", frames, 25), "x.mp4: a picture", "even H and W")

    def breaks():
        yield pictures(1)[0]
        raise KeyError("mine")
    with pytest.raises(KeyError, match="mine"): write_video(tmp_path / "x.mp4", breaks(), 25)
    assert not list(tmp_path.glob("*x.*"))                                                    # nothing half written


def with_sound(path, seconds, offset_s=0., codec="aac"):
    "Pictures, and a tone of falling pitch; both begin late by `offset_s`."
    import fractions
    with av.open(str(path), "w") as out:
        video, sound = out.add_stream("libx264", rate=25), out.add_stream(codec, rate=44_100)
        video.width, video.height, video.pix_fmt, sound.layout = WIDTH, HEIGHT, "yuv420p", "mono"
        for i, picture in enumerate(pictures(25 * seconds)):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = i + round(25 * offset_s), fractions.Fraction(1, 25)
            out.mux(video.encode(frame))
        out.mux(video.encode())
        t = np.arange(44_100 * seconds) / 44_100
        wave = (np.sin(2 * np.pi * (900 * t - 200 * t * t)) * .5).astype(np.float32)
        for i in range(0, len(wave) // 1024 * 1024, 1024):
            frame = av.AudioFrame.from_ndarray(wave[None, i:i + 1024], format="fltp", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = 44_100, i + round(44_100 * offset_s), fractions.Fraction(1, 44_100)
            out.mux(sound.encode(frame))
        out.mux(sound.encode())
    return path


def heard(path):
    "[n] seconds and the bytes of every packet of sound, on the clock of a player; [] if there is none."
    with av.open(str(path)) as video:
        start = max(video.start_time or 0, 0) / 1e6
        return [(float(p.pts * p.time_base) - start, bytes(p)) for p in (video.demux(video.streams.audio[0]) if video.streams.audio else ()) if p.dts is not None]


@pytest.mark.parametrize("suffix, offset_s", [(".mp4", 0.), (".mkv", 1.5), (".ts", 2.)])
def test_sound_comes_along(tmp_path, suffix, offset_s):
    source = with_sound(tmp_path / f"source{suffix}", 4, offset_s)
    video = open_video(source)
    frames = [frame for chunk in video.stream(16) for frame in chunk]
    copy = write_video(tmp_path / "copy.mp4", frames, video.fps, times_s=video.times_s, sound=source)
    was, now = heard(source), heard(copy)
    assert len(now) > 150 and [len(b) for _, b in now] == [len(b) - 7 * (suffix == ".ts") for _, b in was]     # a transport stream puts 7 bytes before each packet of AAC
    if suffix != ".ts": assert [b for _, b in now] == [b for _, b in was]
    assert np.abs(np.array([s for s, _ in now]) - [s for s, _ in was]).max() < 2e-3
    np.testing.assert_allclose(open_video(copy).times_s, video.times_s, atol=2e-3)


def test_sound_that_does_not_fit_is_left_out(tmp_path):
    source = with_sound(tmp_path / "source.mkv", 1, codec="wavpack")
    assert heard(source)
    video = open_video(source)
    assert heard(write_video(tmp_path / "copy.mp4", video.read(range(video.frames)), 25, sound=source)) == []
    assert heard(write_video(tmp_path / "mute.mp4", video.read(range(video.frames)), 25, sound=write(tmp_path / "silent.mp4"))) == []
