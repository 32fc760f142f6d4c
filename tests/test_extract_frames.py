"data_scripts/extract_frames.py: which frame becomes which image, resuming, damaged videos, several processes."
import errno
import json
import os
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS, SHARED = ROOT / "data_scripts", ROOT.parent / "shared"
sys.path.insert(0, str(SCRIPTS))
import extract_frames
from actloc.data.clips import VideoFolder
from extract_frames import Settings, main, nearest

BITS, SIDE = 10, 16   # a frame's number, as white and black squares


def frame_of(number):
    squares = [255 * (number >> bit & 1) for bit in range(BITS)]
    return np.kron(np.array([squares, squares[::-1]], np.uint8), np.ones((SIDE, SIDE), np.uint8))[..., None].repeat(3, -1)


def number_in(path):
    pixels = np.asarray(Image.open(path).convert("L").resize((BITS * SIDE, 2 * SIDE)))
    return sum((pixels[SIDE // 2, bit * SIDE + SIDE // 2] > 127) << bit for bit in range(BITS))


def make_video(path, moments, gop=12, base=Fraction(1, 90000), fast_start=False, codec="libx264"):
    "A video whose n-th frame shows the number n at moments[n] seconds."
    with av.open(str(path), "w", options={"movflags": "faststart"} if fast_start else {}) as container:
        stream = container.add_stream(codec, rate=30)
        stream.width, stream.height, stream.pix_fmt, stream.time_base, stream.codec_context.time_base = BITS * SIDE, 2 * SIDE, "yuv420p", base, base
        stream.codec_context.thread_count, stream.gop_size = 1, gop
        for n, moment in enumerate(moments):
            frame = av.VideoFrame.from_ndarray(frame_of(n), format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = round(moment / base), base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def at(fps, count, start=0): return [start + Fraction(n) / Fraction(fps) for n in range(count)]


def numbers(folder): return [number_in(path) for path in sorted(folder.glob("image_*.jpg"))]


def expected(moments, fps, start, end, long):
    "Brute force: the nearest frame, of two the earlier, until the last has been shown for its time."
    wanted = [start + Fraction(k) / Fraction(fps) for k in range(int((end - start) * Fraction(fps)))]
    return [min(range(len(moments)), key=lambda n: (abs(moments[n] - t), n)) for t in wanted if t < moments[-1] + long]


@pytest.fixture
def run(tmp_path, capsys):
    def go(*arguments):
        code = main([*map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err
    return go


# --- Time ---

@pytest.mark.parametrize("fps", [30, 25, 24, Fraction(30000, 1001), 12, 60])
def test_any_rate_becomes_thirty(run, tmp_path, fps):
    moments = at(fps, 120)
    video = make_video(tmp_path / "v.mp4", moments)
    assert run(video, tmp_path / "out", "--whole", "--original-size")[0] == 0
    assert numbers(tmp_path / "out" / "v") == expected(moments, 30, 0, 100, 1 / Fraction(fps))


def test_the_interval_starts_with_its_first_second(run, tmp_path):
    "Second t starts with frame (t - start) * fps + 1, also where the file has key frames elsewhere and B frames."
    moments = at(25, 500)
    video = make_video(tmp_path / "v.mp4", moments, gop=37)
    assert run(video, tmp_path / "out", "--start", 7, "--end", 12, "--original-size")[0] == 0
    shown = numbers(tmp_path / "out" / "v")
    assert len(shown) == 150 and shown == expected(moments, 30, 7, 12, 0)
    for second in range(7, 12): assert shown[(second - 7) * 30] == 25 * second
    assert json.loads((tmp_path / "out" / "v.json").read_text())["frames"] == 150


def test_milliseconds_of_mkv_do_not_shift_a_frame(run, tmp_path):
    moments = at(30, 300)
    video = make_video(tmp_path / "v.mkv", moments, base=Fraction(1, 1000))
    assert run(video, tmp_path / "out", "--start", 3, "--end", 8, "--original-size")[0] == 0
    assert numbers(tmp_path / "out" / "v") == list(range(90, 240))


def test_a_variable_rate_does_not_drift(run, tmp_path):
    steps = np.random.default_rng(0).integers(1, 9, 250)
    moments = [Fraction(int(x), 90) for x in np.cumsum(steps) - steps[0]]
    video = make_video(tmp_path / "v.mp4", moments)
    assert run(video, tmp_path / "out", "--start", 2, "--end", 9, "--original-size", "--fps", "15")[0] == 0
    assert numbers(tmp_path / "out" / "v") == expected(moments, 15, 2, 9, 0)


def test_seconds_count_from_the_start_of_the_file(run, tmp_path):
    video = make_video(tmp_path / "v.mkv", at(30, 150, start=50))
    with av.open(str(video)) as container: assert container.start_time == 50_000_000
    assert run(video, tmp_path / "out", "--start", 1, "--end", 3)[0] == 0
    assert numbers(tmp_path / "out" / "v") == list(range(30, 90))


def test_nearest_by_hand():
    frames = [(Fraction(t), name) for t, name in ((0, "a"), (1, "b"), (3, "c"))]
    quarters = lambda k: Fraction(k, 2)
    assert [f for _, f in nearest(iter(frames), quarters, 0, 99)] == list("aabbbccccc")   # 0.5 and 2.0 lie between two: the earlier; c is shown for 2
    assert list(nearest(iter(frames), quarters, 3, 5)) == [(3, "b"), (4, "b")]
    assert list(nearest(iter([]), quarters, 0, 9)) == []
    assert [f for _, f in nearest(iter(frames[1:]), quarters, 0, 3)] == list("bbb")       # before the first frame the first is shown


def test_nothing_is_decoded_beyond_the_last_wanted_frame():
    pulled = []
    def endless():
        for n in range(10**6):
            pulled.append(n)
            yield Fraction(n, 30), n
    assert [k for k, _ in nearest(endless(), lambda k: Fraction(k, 30), 0, 90)] == list(range(90)) and len(pulled) == 91


class BadIndex:
    "A container that, asked for a second, goes to a later one."
    def __init__(self, container): self.inner = container
    def __getattr__(self, name): return getattr(self.inner, name)
    def seek(self, stamp, stream, backward): self.inner.seek(stamp + int(3 / stream.time_base), stream=stream, backward=True)


def test_a_file_whose_index_is_wrong_is_read_from_the_beginning(run, tmp_path, monkeypatch):
    video, real, times = make_video(tmp_path / "v.mp4", at(25, 250)), extract_frames.opened, []
    def opened(job, threads):
        container, stream = real(job, threads)
        times.append(1)
        return (BadIndex(container), stream)
    monkeypatch.setattr(extract_frames, "opened", opened)
    assert run(video, tmp_path / "out", "--start", 2, "--end", 4, "--original-size")[0] == 0 and len(times) == 2
    assert numbers(tmp_path / "out" / "v") == expected(at(25, 250), 30, 2, 4, 0)


@pytest.mark.parametrize("end, count", [(1800, 27000), (900.5, 15), (900.01, 1)])
def test_how_many(end, count):
    settings = Settings(900, end, "30", 340, None, 90)
    assert settings.count(Fraction(end)) == count and settings.moment(30 * 7) == 907


# --- Images ---

@pytest.mark.parametrize("arguments, size", [([], (1700, 340)), (["--height", "64"], (320, 64)), (["--short-side", "16"], (80, 16)), (["--original-size"], (160, 32))])
def test_sizes(run, tmp_path, arguments, size):
    video = make_video(tmp_path / "v.mp4", at(30, 4))
    assert run(video, tmp_path / "out", "--whole", *arguments)[0] == 0
    assert Image.open(tmp_path / "out" / "v" / "image_000001.jpg").size == size


def test_a_video_that_ends_early_says_so(run, tmp_path):
    video = make_video(tmp_path / "v.mp4", at(30, 90))
    code, said, notes = run(video, tmp_path / "out", "--start", 1, "--end", 5)
    assert code == 0 and "the video ends at 3.0 s, 60 of 120 frames" in notes and "1 of 1 videos are done, 60 frames" in said
    code, said, _ = run(video, tmp_path / "out2", "--start", 8, "--end", 9)
    assert code == 11 and "no frame from second 8 on; the video has 3.0 s" in said


def test_odd_names(run, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    names = ["-5KQ66BBWC4", "my film; rm -rf $HOME", "ein Öl 'zitat' \"x\"", "a.b.c", "100%d"]
    for name in names: make_video(folder / f"{name}.mp4", at(30, 3))
    assert run(folder, tmp_path / "out", "--whole", "--original-size")[0] == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if p.is_dir()) == sorted(names)
    for name in names: assert numbers(tmp_path / "out" / name) == [0, 1, 2]


def test_turned_videos_are_the_right_way_up(run, tmp_path, monkeypatch):
    video = make_video(tmp_path / "v.mp4", at(30, 3))
    monkeypatch.setattr(extract_frames, "turn_of", lambda frame: (True, False, True))          # a quarter to the right
    assert run(video, tmp_path / "out", "--whole", "--short-side", "16")[0] == 0
    image = Image.open(tmp_path / "out" / "v" / "image_000003.jpg")
    upright = np.asarray(image.convert("L").resize((2 * SIDE, BITS * SIDE)))[:, ::-1].T        # back to how it is stored
    assert image.size == (16, 80) and sum((upright[SIDE // 2, bit * SIDE + SIDE // 2] > 127) << bit for bit in range(BITS)) == 2


def test_the_images_are_a_video_to_the_library(run, tmp_path):
    video = make_video(tmp_path / "v.mp4", at(25, 100))
    run(video, tmp_path / "out", "--start", 1, "--end", 3, "--original-size")
    films = VideoFolder(tmp_path / "out", first_second=1, fps=30)
    for second in (1, 1.5, 2.9):
        film, number = films.place("v", second)
        assert film.frames == 60 and number == round((second - 1) * 30)
    assert abs(film.read([0])[0].astype(int) - frame_of(25)).mean() < 12 and list(films.files) == ["v"]


# --- Resuming ---

def test_finished_videos_are_left_alone(run, tmp_path, monkeypatch):
    video = make_video(tmp_path / "v.mp4", at(30, 60))
    assert run(video, tmp_path / "out", "--whole")[0] == 0
    monkeypatch.setattr(extract_frames, "opened", lambda *_: pytest.fail("opened again"))
    code, said, _ = run(video, tmp_path / "out", "--whole")
    assert code == 0 and "60 frames" in said


@pytest.mark.parametrize("whole", [5, 40, 100, 149])
def test_what_is_half_done_goes_on(run, tmp_path, monkeypatch, whole):
    moments = at(25, 200)
    video, folder = make_video(tmp_path / "v.mp4", moments, gop=17), tmp_path / "out" / "v"
    real, count = extract_frames.write, iter(range(1, 9999))
    def killed(path, content):
        if next(count) > whole:
            path.write_bytes(content[:50])
            raise KeyboardInterrupt
        real(path, content)
    monkeypatch.setattr(extract_frames, "write", killed)
    assert run(video, tmp_path / "out", "--start", 1, "--end", 6, "--original-size")[0] == 130
    assert len(list(folder.iterdir())) == whole + 1 and json.loads((tmp_path / "out" / "v.json").read_text())["frames"] is None
    names = []
    monkeypatch.setattr(extract_frames, "write", lambda path, content: (names.append(path.name), real(path, content)))
    assert run(video, tmp_path / "out", "--start", 1, "--end", 6, "--original-size")[0] == 0
    assert numbers(folder) == expected(moments, 30, 1, 6, 0)
    assert names[0] == f"image_{max(0, whole + 1 - 30) + 1:06d}.jpg" and len(names) <= 150 - max(0, whole - 30)


def test_an_image_that_was_deleted_comes_back(run, tmp_path):
    video, folder = make_video(tmp_path / "v.mp4", at(30, 90)), tmp_path / "out" / "v"
    run(video, tmp_path / "out", "--whole", "--original-size")
    (folder / "image_000090.jpg").unlink()
    assert run(video, tmp_path / "out", "--whole", "--original-size")[0] == 0 and numbers(folder) == list(range(90))


def test_other_settings_do_not_mix(run, tmp_path):
    video, out = make_video(tmp_path / "v.mp4", at(30, 30)), tmp_path / "out"
    run(video, out, "--whole", "--original-size")
    code, said, _ = run(video, out, "--whole", "--height", "64")
    assert code == 11 and "height None instead of 64" in said and "--again" in said and len(numbers(out / "v")) == 30
    assert run(video, out, "--whole", "--fps", "10", "--again")[0] == 0 and len(numbers(out / "v")) == 10
    (out / "v.json").unlink()
    code, said, _ = run(video, out, "--whole")
    assert code == 11 and "images of unknown origin" in said


# --- What goes wrong ---

def test_one_video_that_fails_does_not_stop_the_others(run, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.mp4").write_bytes(b"no video")
    (folder / "b.mkv").write_bytes(b"")
    make_video(folder / "c.mp4", at(30, 3))
    with av.open(str(folder / "d.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    code, said, notes = run(folder, tmp_path / "out", "--whole")
    assert code == 13 and "1 of 4 videos are done, 3 frames" in said and said.count("failed: ") == 3 and notes.count("\n") == 3
    assert f"failed: {folder / 'a.mp4'} ({folder / 'a.mp4'}: this is not a video" in said and "no video stream" in said and "the file is empty" in said


@pytest.mark.parametrize("kind", ["mp4", "mkv"])
def test_a_truncated_video_is_noticed(run, tmp_path, kind):
    video = make_video(tmp_path / f"v.{kind}", at(10, 300), fast_start=True)
    video.write_bytes(video.read_bytes()[:video.stat().st_size // 2])
    code, said, _ = run(video, tmp_path / "out", "--whole", "--original-size")
    assert code == 11 and "it breaks off at" in said and "29.9 s are announced" in said
    assert json.loads((tmp_path / "out" / "v.json").read_text())["frames"] is None


def test_damaged_packets_are_passed_over_and_counted(run, tmp_path):
    video = make_video(tmp_path / "v.mp4", at(30, 300))
    with av.open(str(video)) as container:
        hurt = [p for p in container.demux(video=0) if p.size and p.pts][40]
        place, size = hurt.pos, hurt.size
    content = bytearray(video.read_bytes())
    content[place:place + size] = b"\xff" * size
    video.write_bytes(content)
    code, said, notes = run(video, tmp_path / "out", "--whole", "--original-size")
    assert code == 0 and "300 frames" in said and "damaged packets were passed over" in notes
    shown = numbers(tmp_path / "out" / "v")
    assert shown[-60:] == list(range(240, 300)) and shown[:20] == list(range(20))


def test_a_full_disk_ends_it_with_a_sentence(run, tmp_path, monkeypatch):
    for name in "ab": make_video(tmp_path / f"{name}.mp4", at(30, 9))
    real, count = extract_frames.write, iter(range(99))
    def full(path, content):
        if next(count) == 4: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        real(path, content)
    monkeypatch.setattr(extract_frames, "write", full)
    code, said, message = run(tmp_path / "a.mp4", tmp_path / "b.mp4", tmp_path / "out", "--whole", "--original-size")
    assert code == 2 and said == "" and "the disk is full; make room" in message and message.count("\n") == 1 and not (tmp_path / "out" / "b").exists()
    monkeypatch.setattr(extract_frames, "write", real)
    assert run(tmp_path / "a.mp4", tmp_path / "b.mp4", tmp_path / "out", "--whole", "--original-size")[0] == 0 and numbers(tmp_path / "out" / "a") == list(range(9))


def test_half_an_image_is_not_left(tmp_path, monkeypatch):
    def short(self, content):
        with open(self, "wb") as file: file.write(content[:3])
        raise OSError(errno.ENOSPC, "full")
    monkeypatch.setattr(Path, "write_bytes", short)
    with pytest.raises(OSError): extract_frames.write(tmp_path / "x.jpg", b"12345")
    assert not (tmp_path / "x.jpg").exists()


def test_doors(run, tmp_path):
    video, out = make_video(tmp_path / "v.mp4", at(30, 3)), tmp_path / "out"
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_bytes(b"")
    make_video(tmp_path / "v.mkv", at(30, 3), base=Fraction(1, 1000))
    make_video(tmp_path / "...mp4", at(30, 3))
    for arguments, words in (([tmp_path / "none", out], "no such file"), ([tmp_path / "empty", out], "no video in it"), ([video, tmp_path / "file"], "is a file, a folder is needed"),
                             ([video, tmp_path / "v.mkv", out], "2 videos have this name"), ([tmp_path / "...mp4", out], "cannot name a folder"),
                             ([video, out, "--fps", "x"], "--fps x"), ([video, out, "--fps", "0"], "--fps 0"), ([video, out, "--fps", "1/0"], "--fps 1/0"),
                             ([video, out, "--start", "5", "--end", "5"], "--end 5"), ([video, out, "--start", "-1"], "--start -1"), ([video, out, "--start", "nan"], "--start nan"),
                             ([video, out, "--height", "2"], "--height 2"), ([video, out, "--quality", "99"], "--quality 99"), ([video, out, "--processes", "0"], "--processes 0")):
        code, said, message = run(*arguments)
        assert code == 2 and words in message and said == "" and message.count("\n") == 1, (arguments, message)
    assert not out.exists()


# --- Several processes ---

def test_several_processes_give_the_same_and_a_bar(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(3): make_video(folder / f"{i}.mp4", at(25, 30 + i))
    (folder / "bad.mp4").write_bytes(b"x")
    program = [sys.executable, str(SCRIPTS / "extract_frames.py"), str(folder), str(tmp_path / "out"), "--whole", "--original-size", "--processes", "2"]
    done = subprocess.run(program, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 11 and "3 of 4 videos are done" in done.stdout and "failed: " in done.stdout, done.stderr
    for i in range(3): assert numbers(tmp_path / "out" / str(i)) == expected(at(25, 30 + i), 30, 0, 10, Fraction(1, 25))


def test_killed_and_resumed_with_processes(tmp_path):
    for i in range(2): make_video(tmp_path / f"{i}.mp4", at(30, 450))
    out = tmp_path / "out"
    program = [sys.executable, str(SCRIPTS / "extract_frames.py"), *(str(tmp_path / f"{i}.mp4") for i in range(2)), str(out), "--start", "0", "--end", "15", "--height", "128", "--processes", "2"]
    child = subprocess.Popen(program, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
                             preexec_fn=lambda: os.nice(15))                            # or a busy machine lets it finish before it is looked at
    deadline = time.monotonic() + 120
    while len(list(out.glob("*/*.jpg"))) < 60 and child.poll() is None and time.monotonic() < deadline: time.sleep(.01)
    os.killpg(child.pid, 2)                                                     # Ctrl-C reaches every process
    _, message = child.communicate(timeout=120)
    left = len(list(out.glob("*/*.jpg")))
    assert child.returncode == 130 and "interrupted; run the same command again" in message and "Traceback" not in message and 60 <= left < 900, message
    assert subprocess.run(program, capture_output=True).returncode == 0
    for i in range(2): assert numbers(out / str(i)) == list(range(450))


def test_help(tmp_path):
    shown = subprocess.run([sys.executable, str(SCRIPTS / "extract_frames.py"), "--help"], capture_output=True, text=True, cwd=tmp_path)
    assert shown.returncode == 0 and "python data_scripts/extract_frames.py" in shown.stdout and max(map(len, shown.stdout.splitlines())) < 160


def test_a_real_video(run, tmp_path):
    real = SHARED / "data" / "videos" / "demo.mp4"
    if not real.exists(): pytest.skip(f"the real videos are not here ({real})")
    assert run(real, tmp_path / "out", "--start", 2, "--end", 4, "--short-side", 128)[0] == 0
    assert len(list((tmp_path / "out" / "demo").iterdir())) == 60 and Image.open(tmp_path / "out" / "demo" / "image_000060.jpg").size == (170, 128)
