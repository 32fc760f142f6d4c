"data_scripts/prepare_hapt.py: a tiny archive written by hand, every number checked; downloads from a server on this machine; the real data if present."
import http.server
import importlib.util
import io
import json
import os
import random
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "data_scripts" / "prepare_hapt.py"
REAL = ROOT.parent / "shared" / "data" / "hapt.zip"
needs_real = pytest.mark.skipif(not REAL.exists(), reason=f"the real recordings are not here ({REAL}); prepare_hapt.py without SOURCE downloads them")

sys.path.insert(0, str(SCRIPT.parent))   # as for a script that is run: its neighbours can be imported
import command_line
import downloads

spec = importlib.util.spec_from_file_location("prepare_hapt", SCRIPT)
hapt = importlib.util.module_from_spec(spec)
sys.modules["prepare_hapt"] = hapt
spec.loader.exec_module(hapt)


# --- A data set by hand: 3 recordings of 2 people, 100 + 50 + 99 samples, 4 segments ---

def value(sensor, sample, axis):
    "A number that tells where it is from: 0.25 * sample, + 100 per axis, negative for the angular velocity."
    return (1 if sensor == "acc" else -1) * (sample / 4 + 100 * axis)


def sensor_text(sensor, samples):
    return "".join(" ".join(str(value(sensor, n, axis)) for axis in range(3)) + "\n" for n in range(samples))


def tiny_files():
    lengths = {"exp01_user01": 100, "exp02_user01": 50, "exp03_user02": 99}
    files = {f"RawData/{s}_{name}.txt": sensor_text(s, n) for name, n in lengths.items() for s in ("acc", "gyro")}
    return files | {"RawData/labels.txt": "1 1 2 1 50\n1 1 1 51 100\n2 1 3 7 7\n3 2 1 26 99\n",
                    "activity_labels.txt": "1 WALKING           \n2 SITTING           \n3 SIT_TO_STAND\n",
                    "Train/subject_id_train.txt": "1\n1\n1\n", "Test/subject_id_test.txt": "2\n2\n", "README.txt": "caf\xe9"}


def zip_bytes(files, prefix=""):
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(prefix + name, content.encode("latin-1") if isinstance(content, str) else content)
    return memory.getvalue()


@pytest.fixture
def tiny(tmp_path):
    "A function that writes tiny_files(), changed as asked, to an archive."
    def write(changes=None, prefix="", name="hapt.zip"):
        files = {n: c for n, c in (tiny_files() | (changes or {})).items() if c is not None}
        (tmp_path / name).write_bytes(zip_bytes(files, prefix))
        return tmp_path / name
    return write


@pytest.fixture
def run(tmp_path, capsys):
    "A function that runs the command line in this process and gives exit code, stdout, stderr."
    def go(*arguments):
        code = hapt.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err
    return go


def check_tiny(out):
    "Every number of the tiny data set, from its own formula."
    found = json.loads((out / "annotations.json").read_text())
    assert list(found) == ["version", "classes", "features", "database"]
    assert found["classes"] == ["WALKING", "SITTING", "SIT_TO_STAND"]
    assert found["features"] == {"folder": "features", "suffix": ".npy", "layout": "TC", "fps": 50, "stride": 25, "num_frames": 50, "channels": 300, "header": {
        "network": "windows", "fps": 50, "stride": 25, "num_frames": 50, "channels": 300, "weights": "", "size": 0, "precision": "float32",
        "columns": ["acc_x", "acc_y", "acc_z", "gyro_x", "gyro_y", "gyro_z"]}}
    walk, sit, stand = ({"label": name, "label_id": i} for i, name in enumerate(found["classes"]))
    assert found["database"] == {
        "exp01_user01": {"subset": "train", "duration": 2.0, "fps": 50, "annotations": [sit | {"segment": [0.0, 1.0]}, walk | {"segment": [1.0, 2.0]}]},
        "exp02_user01": {"subset": "train", "duration": 1.0, "fps": 50, "annotations": [stand | {"segment": [0.12, 0.14]}]},
        "exp03_user02": {"subset": "test", "duration": 1.98, "fps": 50, "annotations": [walk | {"segment": [0.5, 1.98]}]}}
    assert sorted(path.name for path in (out / "features").iterdir()) == ["exp01_user01.npy", "exp02_user01.npy", "exp03_user02.npy"]
    for name, steps in (("exp01_user01", 3), ("exp02_user01", 1), ("exp03_user02", 2)):   # (100-50)//25+1, (50-50)//25+1, (99-50)//25+1
        features = np.load(out / "features" / f"{name}.npy")
        assert features.dtype == np.float32 and features.shape == (steps, 300) and features.flags.c_contiguous
        expected = [[value(sensor, 25 * t + i, axis) for sensor in ("acc", "gyro") for axis in range(3) for i in range(50)] for t in range(steps)]
        assert features.tolist() == expected
    assert not list(out.glob(".partial*"))


def test_every_number_of_a_tiny_archive(tiny, run, tmp_path):
    code, said, notes = run(tiny(), tmp_path / "out")
    assert code == 0
    assert "3 recordings (2 train, 1 test), 4 segments (3 train, 1 test), 6 steps of 300 numbers in " in said
    assert "as UCI distributes it" not in said and "note: this is not UCI's own data" in notes
    check_tiny(tmp_path / "out")
    features = np.load(tmp_path / "out" / "features" / "exp01_user01.npy")                 # the same once more, with a pencil
    assert features[0, 0] == 0 and features[1, 0] == 6.25 and features[2, 49] == 24.75    # acc x of samples 0, 25, 99
    assert features[0, 50] == 100 and features[0, 150] == 0 and features[1, 151] == -6.5  # acc y of 0; gyro x of 0, 26


@pytest.mark.parametrize("prefix", ["", "HAPT Data Set/", "a/b/"])
def test_data_anywhere_in_the_archive(tiny, run, tmp_path, prefix):
    assert run(tiny(prefix=prefix), tmp_path / "out")[0] == 0
    check_tiny(tmp_path / "out")


def test_nested_archive(run, tmp_path):
    inner = zip_bytes(tiny_files(), "HAPT Data Set/")
    (tmp_path / "uci.zip").write_bytes(zip_bytes({"HAPT Data Set.zip": inner, "HAPT Data Set.names": "x"}))
    assert run(tmp_path / "uci.zip", tmp_path / "out")[0] == 0
    check_tiny(tmp_path / "out")


@pytest.mark.parametrize("below", ["", "HAPT Data Set"])
def test_folder(tiny, run, tmp_path, below):
    with zipfile.ZipFile(tiny()) as archive: archive.extractall(tmp_path / "raw" / below)
    assert run(tmp_path / "raw", tmp_path / "out")[0] == 0
    check_tiny(tmp_path / "out")


def test_windows_line_ends_and_blank_last_lines(tiny, run, tmp_path):
    changed = {name: text.replace("\n", "\r\n") + "\r\n" for name, text in tiny_files().items()}
    assert run(tiny(changed), tmp_path / "out")[0] == 0
    check_tiny(tmp_path / "out")


def test_recording_without_labels(tiny, run, tmp_path):
    assert run(tiny({"RawData/labels.txt": "1 1 2 1 50\n"}), tmp_path / "out")[0] == 0
    database = json.loads((tmp_path / "out" / "annotations.json").read_text())["database"]
    assert [len(entry["annotations"]) for entry in database.values()] == [1, 0, 0]


def test_counts_on_known_content(tiny, run, tmp_path, monkeypatch):
    content = hapt.read_content(hapt.source_files(tiny()))
    assert content.counts() == {"train": (2, 3), "test": (1, 1)}
    monkeypatch.setattr(hapt, "UCI_COUNTS", content.counts())
    monkeypatch.setattr(hapt, "UCI_SHA256", content.sha256)
    code, said, notes = run(tiny(), tmp_path / "out")
    assert code == 0 and said.rstrip().endswith("as UCI distributes it") and notes == ""
    one_digit = tiny_files()["RawData/gyro_exp03_user02.txt"].replace("-0.25 ", "-0.26 ", 1)
    changed = hapt.read_content(hapt.source_files(tiny({"RawData/gyro_exp03_user02.txt": one_digit})))
    assert "SHA-256" in hapt.difference(changed) and hapt.difference(content) is None


def test_digest_by_hand(tiny):
    import hashlib, struct
    digest = hashlib.sha256()
    for sensor in ("acc", "gyro"):
        for name, samples in (("exp01_user01", 100), ("exp02_user01", 50), ("exp03_user02", 99)):
            digest.update(f"RawData/{sensor}_{name}.txt".encode())
            for n in range(samples): digest.update(struct.pack("<3d", *(value(sensor, n, axis) for axis in range(3))))
    digest.update(b"RawData/labels.txt" + struct.pack("<20q", 1, 1, 2, 1, 50, 1, 1, 1, 51, 100, 2, 1, 3, 7, 7, 3, 2, 1, 26, 99))
    assert hapt.read_content(hapt.source_files(tiny())).sha256 == digest.hexdigest()
    assert hapt.read_content(hapt.source_files(tiny(prefix="HAPT Data Set/"))).sha256 == digest.hexdigest()


# --- Bad input: what came, where, what to do; exit code 2, nothing written ---

ACC, LABELS = "RawData/acc_exp01_user01.txt", "RawData/labels.txt"
GOOD_LINE, LINES = "0.25 100.25 200.25\n", sensor_text("acc", 100)

BAD_CONTENT = {
    "no labels": ({LABELS: None}, ["no RawData/labels.txt", "contains RawData/"]),
    "no split": ({"Test/subject_id_test.txt": None}, ["Test/subject_id_test.txt is missing"]),
    "no classes": ({"activity_labels.txt": None}, ["activity_labels.txt is missing"]),
    "no gyro": ({"RawData/gyro_exp01_user01.txt": None}, [ACC, "no gyro file"]),
    "no acc": ({ACC: None}, ["RawData/gyro_exp01_user01.txt", "no acc file"]),
    "no sensors": ({n: None for n in tiny_files() if "_exp" in n}, ["no RawData/acc_expXX_userYY.txt"]),
    "twice": ({"RawData/acc_exp1_user1.txt": LINES}, ["are the same recording"]),
    "lengths": ({ACC: sensor_text("acc", 99)}, [ACC, "99 samples", "gyro_exp01_user01.txt has 100"]),
    "short": ({f"RawData/{s}_exp02_user01.txt": sensor_text(s, 49) for s in ("acc", "gyro")}, ["exp02_user01", "49 samples, at least 50"]),
    "empty": ({ACC: "\n"}, [ACC, "empty"]),
    "word": ({ACC: LINES.replace(GOOD_LINE, "0.25 oops 200.25\n")}, [ACC, "line 2", "'0.25 oops 200.25'"]),
    "two dots": ({ACC: LINES.replace(GOOD_LINE, "0.25.5 100.25\n")}, [ACC, "line 2", "'0.25.5 100.25'"]),
    "glued": ({ACC: LINES.replace(GOOD_LINE, "0.25-100.25 200.25\n")}, [ACC, "line 2", "0.25-100.25"]),
    "two columns": ({ACC: LINES.replace(GOOD_LINE, "0.25 100.25\n")}, [ACC, "line 2", "three finite numbers"]),
    "moved column": ({ACC: LINES.replace(GOOD_LINE + "0.5 ", "0.25 100.25 200.25 0.5\n")}, [ACC, "line 2"]),
    "blank line": ({ACC: LINES.replace(GOOD_LINE, "\n" + GOOD_LINE)}, [ACC, "line 2", "''"]),
    "cut": ({ACC: LINES[:-9]}, [ACC, "line 100"]),
    "nan": ({ACC: LINES.replace(GOOD_LINE, "0.25 nan 200.25\n")}, [ACC, "line 2", "nan"]),
    "infinite": ({ACC: LINES.replace(GOOD_LINE, "0.25 1e999 200.25\n")}, [ACC, "line 2", "1e999"]),
    "beyond float32": ({ACC: LINES.replace(GOOD_LINE, "0.25 1e39 200.25\n")}, [ACC, "line 2", "1e39"]),
    "underscore": ({ACC: LINES.replace(GOOD_LINE, "0.25 1_0 200.25\n")}, [ACC, "1_0"]),
    "hash": ({ACC: LINES.replace(GOOD_LINE, "0.25 100.25 200.25 # x\n")}, [ACC, "line 2"]),
    "not text": ({ACC: b"\xff\xfe\x00" * 50}, [ACC, "line 1"]),
    "label word": ({LABELS: "1 1 2 1 50\n1 1 x 51 100\n"}, ["labels.txt, line 2", "'1 1 x 51 100'", "5 whole numbers"]),
    "label columns": ({LABELS: "1 1 2 1\n"}, ["labels.txt, line 1", "5 whole numbers"]),
    "label negative": ({LABELS: "1 1 2 -1 50\n"}, ["labels.txt, line 1", "-1"]),
    "label reversed": ({LABELS: "1 1 2 1 50\n\n1 1 1 60 51\n"}, ["labels.txt, line 3: '1 1 1 60 51' is reversed"]),
    "label beyond": ({LABELS: "1 1 2 1 101\n"}, ["labels.txt, line 1: '1 1 2 1 101' lies outside", "1 to 101 of 1 to 100"]),
    "label zero": ({LABELS: "1 1 2 0 50\n"}, ["labels.txt, line 1", "0 to 50 of 1 to 100"]),
    "label activity": ({LABELS: "1 1 4 1 50\n"}, ["labels.txt, line 1", "activity 4, 1 to 3"]),
    "label activity 0": ({LABELS: "1 1 0 1 50\n"}, ["activity 0"]),
    "label recording": ({LABELS: "1 2 1 1 50\n"}, ["labels.txt, line 1", "experiment 1 of user 2"]),
    "labels empty": ({LABELS: ""}, [LABELS, "empty"]),
    "classes order": ({"activity_labels.txt": "2 A\n1 B\n3 C\n"}, ["activity_labels.txt", "'1 NAME'"]),
    "classes twice": ({"activity_labels.txt": "1 A\n2 A\n3 C\n"}, ["activity_labels.txt", "different names"]),
    "both": ({"Test/subject_id_test.txt": "2\n1\n"}, ["subject 1 is in Train/", "and in Test/"]),
    "neither": ({"Test/subject_id_test.txt": "7\n"}, ["subject 2", "exp03_user02", "neither Train/", "nor Test/"]),
    "split word": ({"Test/subject_id_test.txt": "2\ntwo\n"}, ["Test/subject_id_test.txt, line 2", "'two'"]),
    "outside": ({"../../evil.txt": "x"}, ["'../../evil.txt' points outside"]),
    "absolute": ({"/evil.txt": "x"}, ["'/evil.txt' points outside"]),
    "drive": ({"C:\\evil.txt": "x"}, ["points outside"]),
    "two copies": ({"old/RawData/labels.txt": "1 1 2 1 50\n"}, ["2 copies of RawData/labels.txt"]),
}


@pytest.mark.parametrize("case", BAD_CONTENT)
def test_bad_content(tiny, run, tmp_path, case):
    changes, words = BAD_CONTENT[case]
    code, said, message = run(tiny(changes), tmp_path / "out")
    assert code == 2 and said == ""
    assert message.startswith("prepare_hapt: ") and message.count("\n") == 1, message
    for word in words: assert word in message, message
    assert not (tmp_path / "out").exists() and not list(tmp_path.parent.glob("evil*"))


def test_a_macos_shadow_is_no_second_copy(tiny, run, tmp_path):
    assert run(tiny({"__MACOSX/RawData/labels.txt": "x"}), tmp_path / "out")[0] == 0


def test_bad_archives(tiny, run, tmp_path):
    whole = tiny().read_bytes()
    damaged = bytearray(whole)
    damaged[60:90] = bytes(30)                                           # inside the first member
    cases = {"cut.zip": (whole[:-200], "truncated"), "text.zip": (b"<html>404", "a zip archive is needed"), "empty.zip": (b"", "0 bytes"),
             "damaged.zip": (bytes(damaged), "acc_exp01_user01.txt is damaged")}
    for name, (content, words) in cases.items():
        (tmp_path / name).write_bytes(content)
        code, _, message = run(tmp_path / name, tmp_path / "out")
        assert code == 2 and words in message and message.count("\n") == 1, message
    assert not (tmp_path / "out").exists()


def test_member_that_unpacks_to_too_much(tiny, run, tmp_path, monkeypatch):
    monkeypatch.setattr(hapt, "MEMBER_LIMIT", 100)
    code, _, message = run(tiny(), tmp_path / "out")
    assert code == 2 and "at most 100 are expected" in message


def test_damage_anywhere_never_ends_in_a_traceback(tiny, run, tmp_path):
    whole, chance = tiny().read_bytes(), random.Random(0)
    for _ in range(150):
        content = bytearray(whole)
        for _ in range(chance.randint(1, 3)): content[chance.randrange(len(content))] = chance.randrange(256)
        (tmp_path / "bad.zip").write_bytes(content[:chance.choice([len(content), chance.randrange(len(content))])])
        code, _, message = run(tmp_path / "bad.zip", tmp_path / "out")
        assert code in (0, 2) and (code == 0 or message.startswith("prepare_hapt: "))


def test_doors_of_the_command_line(tiny, run, tmp_path):
    archive = tiny()
    for arguments, words in (
        ([tmp_path / "none.zip", tmp_path / "out"], "no such file or folder"),
        ([archive], "looks like a SOURCE and OUT is missing"),
        ([archive, archive], "is a file, a folder is needed"),
        ([archive, archive / "below"], "is a file, a folder is needed"),
        ([tmp_path, tmp_path / "out"], "no RawData/labels.txt"),
        ([archive, "/proc/nothing/here"], "/proc"),
        (["--url", "ftp://127.0.0.1/x", tmp_path / "out"], "https://"),
    ):
        code, said, message = run(*arguments)
        assert code == 2 and words in message and said == "", (arguments, message)
    assert not (tmp_path / "out").exists()


def test_permission_is_asked_for_before_any_work(tiny, run, tmp_path, monkeypatch):
    monkeypatch.setattr(hapt.os, "access", lambda *_: False)              # also for root, who may write everywhere
    monkeypatch.setattr(hapt, "read_content", lambda *_: pytest.fail("too late"))
    code, _, message = run(tiny(), tmp_path / "out")
    assert code == 2 and "no permission to write" in message


def test_as_a_program(tiny, tmp_path):
    "Exit codes and streams as a shell sees them; numpy is all that is needed."
    def shell(*arguments):
        return subprocess.run([sys.executable, str(SCRIPT), *map(str, arguments)], capture_output=True, text=True, cwd=tmp_path)
    done = shell(tiny(), "out")
    assert done.returncode == 0 and done.stdout.count("\n") == 1
    check_tiny(tmp_path / "out")
    refused = shell(tiny({LABELS: None}), "other")
    assert refused.returncode == 2 and "Traceback" not in refused.stderr and refused.stderr.count("\n") == 1
    help_text = shell("--help").stdout
    assert "examples:" in help_text and "not for commercial use" in help_text and "Neurocomputing 2015" in help_text
    loaded = subprocess.run([sys.executable, "-c", f"import sys, runpy; sys.path.insert(0, {str(SCRIPT.parent)!r}); runpy.run_path({str(SCRIPT)!r}); "
                             "print({name.split('.')[0] for name in sys.modules} & {'torch', 'actloc', 'scipy', 'pandas'})"], capture_output=True, text=True)
    assert loaded.stdout.strip() == "set()"


def test_progress_only_when_it_takes_long(tiny, run, tmp_path, monkeypatch):
    assert "reading" not in run(tiny(), tmp_path / "out")[2]
    monkeypatch.setattr(command_line, "DELAY_S", 0)
    code, said, notes = run(tiny(), tmp_path / "out")
    assert code == 0 and "reading: 100%" in notes and "6/6" in notes and "reading" not in said


# --- Killed at any moment ---

def whole_generation(out):
    "Which data set OUT holds: 'old' or 'new' if annotations.json is there and all features are of one kind, None without it."
    if not (out / "annotations.json").exists(): return None
    database = json.loads((out / "annotations.json").read_text())["database"]
    kinds = {np.load(out / "features" / f"{name}.npy")[0, 1] for name in database}
    assert len(kinds) == 1, "features of two runs under one annotations.json"
    return {.25: "old", 7.25: "new"}[float(kinds.pop())]


def test_killed_at_every_write(tiny, run, tmp_path, monkeypatch):
    old = tiny(name="old.zip")
    new = tiny({n: t.replace(GOOD_LINE, "7.25 100.25 200.25\n") for n, t in tiny_files().items() if "/acc" in n}, name="new.zip")
    out, seen, real = tmp_path / "out", [], {"replace": os.replace, "save": np.save}
    for stop in range(1, 9):                                              # 3 saves, 3 + 1 renames; the 8th never comes
        monkeypatch.setattr(hapt.os, "replace", real["replace"])
        monkeypatch.setattr(hapt.np, "save", real["save"])
        assert run(old, out)[0] == 0 and whole_generation(out) == "old"
        count = iter(range(1, 99))
        def cut(function):
            def wrapped(*arguments):
                if next(count) == stop: raise KeyboardInterrupt
                return function(*arguments)
            return wrapped
        monkeypatch.setattr(hapt.os, "replace", cut(real["replace"]))
        monkeypatch.setattr(hapt.np, "save", cut(real["save"]))
        assert run(new, out)[0] == (0 if stop == 8 else 130)
        seen.append(whole_generation(out))
    assert seen == ["old"] * 3 + [None] * 4 + ["new"]


def test_full_disk_keeps_the_old_data_set(tiny, run, tmp_path, monkeypatch):
    assert run(tiny(), tmp_path / "out")[0] == 0
    def full(*_): raise OSError(28, "No space left on device")
    monkeypatch.setattr(hapt.np, "save", full)
    code, _, message = run(tiny(), tmp_path / "out")
    assert code == 2 and "No space left on device" in message and "free space" in message
    check_tiny(tmp_path / "out")


def test_again_overwrites_and_clears_what_a_killed_run_left(tiny, run, tmp_path):
    out = tmp_path / "out"
    assert run(tiny(), out)[0] == 0
    np.save(out / "features" / "exp01_user01.npy", np.zeros(3))
    (out / ".partial").mkdir()
    (out / ".partial" / "exp01_user01.npy").write_bytes(b"half")
    assert run(tiny(), out)[0] == 0
    check_tiny(out)


# --- Download, from a server on this machine ---

class Server(http.server.ThreadingHTTPServer):
    "Serves `content`; breaks off after `limit` bytes of an answer; `ranges`/`length`: does it do resuming, does it say how long things are?"
    daemon_threads = True

    def __init__(self, content):
        super().__init__(("127.0.0.1", 0), Answer)
        self.content, self.limit, self.ranges, self.length, self.status, self.asked = content, None, True, True, None, []
        self.shift = 0   # how many bytes after the wanted one a resumed answer begins
        self.url = f"http://127.0.0.1:{self.server_address[1]}/hapt.zip"


class Answer(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_): pass

    def do_GET(self):
        server, wanted = self.server, self.headers.get("Range")
        server.asked.append(wanted)
        if server.status: return self.send_error(server.status)
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and server.ranges else 0
        if start and start >= len(server.content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(server.content)}")
            return self.end_headers()
        self.send_response(206 if start else 200)
        start += server.shift if start else 0
        if start: self.send_header("Content-Range", f"bytes {start}-{len(server.content) - 1}/{len(server.content)}")
        if server.length: self.send_header("Content-Length", str(len(server.content) - start))
        self.end_headers()
        self.wfile.write(server.content[start:][:server.limit])


@pytest.fixture
def server(monkeypatch):
    "The tiny archive on a server, and the script told that this is what UCI distributes."
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"): monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(downloads, "WAITS_S", ())                          # one attempt; test_fetch.py has the others
    server = Server(zip_bytes(tiny_files(), "HAPT Data Set/"))
    with zipfile.ZipFile(io.BytesIO(server.content)) as archive:
        files = {name.removeprefix("HAPT Data Set/"): lambda name=name: archive.read(name) for name in archive.namelist()}
        content = hapt.read_content(files)
    monkeypatch.setattr(hapt, "UCI_COUNTS", content.counts())
    monkeypatch.setattr(hapt, "UCI_SHA256", content.sha256)
    threading.Thread(target=server.serve_forever, args=(.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("length", [True, False])
def test_download(server, run, tmp_path, length):
    server.length = length
    code, said, notes = run("--url", server.url, tmp_path / "out")
    assert code == 0 and "as UCI distributes it" in said and "not for commercial use" in notes and "Neurocomputing 2015" in notes
    check_tiny(tmp_path / "out")
    assert (tmp_path / "out" / "hapt.zip").read_bytes() == server.content and not (tmp_path / "out" / "hapt.zip.part").exists()
    code, said, notes = run("--url", server.url, tmp_path / "out")         # a second run says that it does not download again
    assert code == 0 and "downloaded earlier" in notes and server.asked == [None]


@pytest.mark.parametrize("length", [True, False])
def test_a_broken_download_goes_on(server, run, tmp_path, length):
    part, server.limit, server.length = tmp_path / "out" / "hapt.zip.part", 1000, length
    for times in (1, 2):
        code, said, message = run("--url", server.url, tmp_path / "out")
        assert code == 2 and said == "" and "run the same command again to go on" in message
        assert part.read_bytes() == server.content[:1000 * times]
    if length: assert f"broke off after 2,000 of {len(server.content):,} bytes" in message
    assert not (tmp_path / "out" / "annotations.json").exists()
    server.limit = None
    code, said, notes = run("--url", server.url, tmp_path / "out")
    assert code == 0 and "going on with" in notes and server.asked == [None, "bytes=1000-", "bytes=2000-"]
    check_tiny(tmp_path / "out")


def test_a_server_that_cannot_resume_begins_anew(server, run, tmp_path):
    server.limit = 1000
    assert run("--url", server.url, tmp_path / "out")[0] == 2
    server.limit, server.ranges = None, False
    code, _, notes = run("--url", server.url, tmp_path / "out")
    assert code == 0 and "going on" not in notes and server.asked == [None, "bytes=1000-"]
    assert (tmp_path / "out" / "hapt.zip").read_bytes() == server.content   # zipfile would forgive bytes in front
    check_tiny(tmp_path / "out")


def test_a_part_that_is_already_all_there(server, run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "hapt.zip.part").write_bytes(server.content)
    assert run("--url", server.url, tmp_path / "out")[0] == 0 and server.asked == [f"bytes={len(server.content)}-"]
    check_tiny(tmp_path / "out")


def test_a_server_that_resumes_at_another_byte(server, run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "hapt.zip.part").write_bytes(server.content[:1000])
    server.shift = 7
    assert run("--url", server.url, tmp_path / "out")[0] == 0 and server.asked == ["bytes=1000-", None]
    check_tiny(tmp_path / "out")


def test_a_part_longer_than_the_file_is_dropped(server, run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "hapt.zip.part").write_bytes(server.content + b"more")
    assert run("--url", server.url, tmp_path / "out")[0] == 0 and len(server.asked) == 2 and server.asked[1] is None
    check_tiny(tmp_path / "out")


def test_a_part_of_another_file_is_noticed(server, run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "hapt.zip.part").write_bytes(b"x" * 1000)
    code, _, message = run("--url", server.url, tmp_path / "out")
    assert code == 2 and "download it anew" in message and not (tmp_path / "out" / "hapt.zip.part").exists()
    assert run("--url", server.url, tmp_path / "out")[0] == 0
    check_tiny(tmp_path / "out")


@pytest.mark.parametrize("where", ["member", "page"])
def test_a_corrupted_download_is_deleted(server, run, tmp_path, where):
    good = server.content
    server.content = b"<!DOCTYPE html> sign in" if where == "page" else good[:80] + bytes(30) + good[110:]
    code, _, message = run("--url", server.url, tmp_path / "out")
    assert code == 2 and "download it anew" in message and ("is damaged" in message or "a zip archive is needed" in message)
    assert list((tmp_path / "out").iterdir()) == []
    server.content = good
    assert run("--url", server.url, tmp_path / "out")[0] == 0
    check_tiny(tmp_path / "out")


def test_other_content_needs_no_verify(server, run, tmp_path, monkeypatch):
    monkeypatch.setattr(hapt, "UCI_SHA256", "0" * 64)
    code, said, message = run("--url", server.url, tmp_path / "out")
    assert code == 2 and "SHA-256" in message and "--no-verify" in message and not (tmp_path / "out" / "annotations.json").exists()
    code, said, _ = run("--url", server.url, "--no-verify", tmp_path / "out")
    assert code == 0 and "as UCI distributes it" not in said and len(server.asked) == 1       # the archive is not fetched twice
    check_tiny(tmp_path / "out")


def test_other_counts_need_no_verify(server, run, tmp_path, monkeypatch):
    monkeypatch.setattr(hapt, "UCI_COUNTS", {"train": (42, 849), "test": (19, 365)})
    code, _, message = run("--url", server.url, tmp_path / "out")
    assert code == 2 and "train 2 recordings and 3 segments" in message and "train 42 recordings and 849 segments" in message


def test_a_server_that_refuses_or_is_not_there(server, run, tmp_path):
    server.status = 503
    code, _, message = run("--url", server.url, tmp_path / "out")
    assert code == 2 and "answers 503" in message and "SOURCE" in message
    code, _, message = run("--url", "http://127.0.0.1:9/x", tmp_path / "out")
    assert code == 2 and "the download failed" in message and "SOURCE" in message


# --- The real recordings ---

@needs_real
def test_the_real_recordings(run, tmp_path):
    started = time.process_time()                                            # CPU: a busy machine is not the script's fault
    code, said, _ = run(REAL, tmp_path / "out")
    took = time.process_time() - started
    assert code == 0 and said.rstrip().endswith("as UCI distributes it")
    assert "61 recordings (42 train, 19 test), 1214 segments (849 train, 365 test), 44,823 steps" in said
    assert took < 10, f"{took:.1f} CPU-seconds"
    found = json.loads((tmp_path / "out" / "annotations.json").read_text())
    assert found["classes"] == ["WALKING", "WALKING_UPSTAIRS", "WALKING_DOWNSTAIRS", "SITTING", "STANDING", "LAYING", "STAND_TO_SIT",
                                "SIT_TO_STAND", "SIT_TO_LIE", "LIE_TO_SIT", "STAND_TO_LIE", "LIE_TO_STAND"]
    with zipfile.ZipFile(REAL) as archive:                                 # everything once more, read in the plainest way
        rows = [list(map(int, line.split())) for line in archive.read("RawData/labels.txt").decode().splitlines()]
        segments = [(int(name[3:5]), int(name[-2:]), a["label_id"] + 1, round(a["segment"][0] * 50) + 1, round(a["segment"][1] * 50))
                    for name, entry in found["database"].items() for a in entry["annotations"]]
        assert sorted(segments) == sorted(map(tuple, rows))
        for name in ("exp01_user01", "exp12_user06", "exp61_user30"):
            samples = np.array([[*map(float, acc.split()), *map(float, gyro.split())] for acc, gyro in zip(
                *(archive.read(f"RawData/{sensor}_{name}.txt").decode().splitlines() for sensor in ("acc", "gyro")))], np.float32)
            assert found["database"][name]["duration"] == len(samples) / 50
            features = np.load(tmp_path / "out" / "features" / f"{name}.npy")
            assert features.shape == ((len(samples) - 50) // 25 + 1, 300)
            for t in (0, 1, len(features) // 2, len(features) - 1):
                assert (features[t] == samples[25 * t:25 * t + 50].T.reshape(300)).all()
