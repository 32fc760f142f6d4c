"data_scripts/fetch_ava.py: parts from a server on this machine, recorded checksums, the clips of a Kinetics copy."
import csv
import hashlib
import http.server
import io
import random
import shutil
import subprocess
import sys
import tarfile
import threading
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "data_scripts"
sys.path.insert(0, str(SCRIPTS))
import command_line
import downloads
import fetch_ava

FILMS = {"aaaaaaaaaaa.mp4": "train", "-bbbbbbbbbb.mkv": "train", "ccccccccccc.webm": "val", "ddddddddddd.mp4": "val"}
TABLES = {f"ava_{subset}_v2.2.csv": "".join(f"{Path(name).stem},0902,0.1,0.1,0.5,0.9,12,1\n" for name, of in FILMS.items() if of == subset) for subset in ("train", "val")}
KINETICS = {"kinetics_train_v1.0.csv": "_kinetics-1,17.000000,0.1,0.1,0.5,0.9,12\n_kinetics-1,17.000000,0.1,0.1,0.5,0.9,17\nkinetics__2,5.016949\n",
            "kinetics_val_v1.0.csv": "kinetics__3,100.5,0.1,0.1,0.5,0.9,12\n", "kinetics_test_v1.0.csv": "kinetics__4,0.5\n"}


def noise(seed, size=5000): return random.Random(seed).randbytes(size)


def zipped(members):
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w") as archive:
        for name, text in members.items(): archive.writestr(name, text)
    return memory.getvalue()


def tarred(members):
    memory = io.BytesIO()
    with tarfile.open(fileobj=memory, mode="w:gz") as archive:
        for name, text in members.items():
            info = tarfile.TarInfo(f"ava_kinetics_v1_0/{name}")
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text.encode()))
    return memory.getvalue()


class Server(http.server.ThreadingHTTPServer):
    "Serves `files`; a path in `broken` answers with that status, or cuts off, or shows a page, as often as it is in the list."
    daemon_threads = True

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), Answer)
        self.files, self.broken, self.asked = files, {}, []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *_): pass


class Answer(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_): pass

    def do_GET(self):
        path, start = self.path.lstrip("/"), int((self.headers.get("Range") or "bytes=0-")[6:-1])
        self.server.asked.append((path, start))
        words = self.server.broken.get(path, [])
        word = words.pop(0) if words else ""
        content = self.server.files.get(path)
        if word == "page": content = b"<!DOCTYPE html>" * 9
        if content is None or word.isdecimal(): return self.send_error(int(word or 404))
        self.send_response(206 if start else 200)
        if start: self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start:start + 2000] if word == "cut" else content[start:])


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"): monkeypatch.delenv(name, raising=False)
    annotations = TABLES | {name: "x,1\n" for name in fetch_ava.ANNOTATED if name not in TABLES} | {"ava_train_excluded_timestamps_v2.2.csv": "x,1\n"}
    files = {"annotations/ava_v2.2.zip": zipped(annotations), "annotations/ava_file_names_trainval_v2.1.txt": "\n".join([*FILMS, ""]).encode(),
             "annotations/ava_file_names_test_v2.1.txt": b"eeeeeeeeeee.mp4\n", "test/eeeeeeeeeee.mp4": noise("e"), "ava_kinetics_v1_0.tar.gz": tarred(KINETICS | {"README.txt": "hello"})}
    files |= {f"trainval/{name}": noise(name) for name in FILMS} | {name: b"aaaaaaaaaaa,0902,0.1,0.1,0.5,0.9,,0.98\n" for name in fetch_ava.PREDICTED}
    server = Server(files)
    threading.Thread(target=server.serve_forever, args=(.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def run(server, tmp_path, capsys, monkeypatch):
    "Runs the script here against the server; gives exit code, stdout, stderr."
    monkeypatch.setattr(downloads, "WAITS_S", (1, 2))
    monkeypatch.setattr(downloads.time, "sleep", lambda seconds: None)
    def go(*arguments):
        code = fetch_ava.main([*map(str, arguments), "--data", str(tmp_path / "data"), "--mirror", server.url])
        captured = capsys.readouterr()
        return code, captured.out, captured.err
    return go


def rows(path): return list(csv.reader(path.open()))


def test_everything(run, server, tmp_path):
    folder = tmp_path / "data" / "ava"
    code, said, _ = run("annotations", "boxes", "videos", "kinetics")
    assert code == 0 and "annotations: there" in said and "boxes: 3 of 3" in said and "videos: 4 films" in said and "4 clips of 4 videos are needed" in said
    for name in FILMS: assert (folder / "videos" / name).read_bytes() == noise(name)
    assert (folder / "annotations" / "ava_val_v2.2.csv").read_text() == TABLES["ava_val_v2.2.csv"] and (folder / "kinetics" / "README.txt").read_text() == "hello"
    assert not [p for p in folder.rglob("*") if p.name.startswith(".") or p.suffix == ".part"]
    lines = (folder / "checksums.md5").read_text().splitlines()
    assert f"{hashlib.md5(noise('aaaaaaaaaaa.mp4')).hexdigest()}  videos/aaaaaaaaaaa.mp4" in lines and len(lines) == 4 + 3 + 3 and lines == sorted(lines, key=lambda line: line[34:])
    if shutil.which("md5sum"): assert subprocess.run(["md5sum", "-c", "--quiet", "checksums.md5"], cwd=folder).returncode == 0
    asked = len(server.asked)
    assert run("annotations", "boxes", "videos", "kinetics")[0] == 0 and len(server.asked) == asked        # nothing is asked for twice
    for name in ("ava_v2.2.zip", "ava_kinetics_v1_0.tar.gz"): (folder / name).unlink()                    # archives may go
    assert run("annotations", "kinetics")[0] == 0 and len(server.asked) == asked
    code, said, _ = run()                                                                                  # only a report
    assert code == 0 and "videos: 4 films" in said


def test_dry_run_asks_nobody(run, server, tmp_path):
    code, said, _ = run("--dry-run")
    assert code == 0 and server.asked == [] and not (tmp_path / "data").exists()
    assert said.count("would fetch") == 7 and f"{server.url}/annotations/ava_v2.2.zip -> {tmp_path / 'data' / 'ava' / 'ava_v2.2.zip'}, unpacked to" in said and "the 299 films of trainval" in said
    run("annotations")
    asked = len(server.asked)
    code, said, _ = run("--dry-run", "videos", "annotations", "--subset", "val")
    assert [line.split("/trainval/")[1].split()[0] for line in said.splitlines() if "/trainval/" in line] == ["ccccccccccc.webm", "ddddddddddd.mp4"]
    assert said.count("there already") == 2 and len(server.asked) == asked
    run("videos", "--only", "ccccccccccc")
    assert run("--dry-run", "videos", "--subset", "val")[1].count("there already") == 1


@pytest.mark.parametrize("subset, names", [("val", ["ccccccccccc.webm", "ddddddddddd.mp4"]), ("train", ["-bbbbbbbbbb.mkv", "aaaaaaaaaaa.mp4"]), ("test", ["eeeeeeeeeee.mp4"])])
def test_subsets(run, tmp_path, subset, names):
    assert run("annotations", "videos", "--subset", subset)[0] == 0
    assert sorted(p.name for p in (tmp_path / "data" / "ava" / "videos").iterdir()) == sorted(names)


def test_only_some_films_and_ids_with_a_dash(run, tmp_path):
    code, said, _ = run("videos", "--only", "-bbbbbbbbbb", "ccccccccccc")
    assert code == 0 and sorted(p.name for p in (tmp_path / "data" / "ava" / "videos").iterdir()) == ["-bbbbbbbbbb.mkv", "ccccccccccc.webm"]
    code, _, message = run("videos", "--only", "nothing")
    assert code == 2 and "--only nothing" in message and message.count("\n") == 1


def test_a_broken_film_is_continued(run, server, tmp_path):
    server.broken["trainval/ccccccccccc.webm"] = ["cut", "cut"]
    assert run("videos")[0] == 0
    assert [start for path, start in server.asked if "ccc" in path] == [0, 2000, 4000]
    assert (tmp_path / "data" / "ava" / "videos" / "ccccccccccc.webm").read_bytes() == noise("ccccccccccc.webm")


def test_one_film_that_fails_does_not_stop_the_others(run, server, tmp_path):
    server.broken |= {"trainval/-bbbbbbbbbb.mkv": ["404"], "trainval/ccccccccccc.webm": ["cut", "503", "503"]}
    code, said, notes = run("videos")
    folder = tmp_path / "data" / "ava" / "videos"
    assert code == 3 and "missing: -bbbbbbbbbb.mkv" in said and "answers 404" in said and "missing: ccccccccccc.webm" in said
    assert f"put it to {folder / '-bbbbbbbbbb.mkv'}" in said and "SOURCE" not in said + notes
    assert sorted(p.name for p in folder.iterdir()) == ["aaaaaaaaaaa.mp4", "ccccccccccc.webm.part", "ddddddddddd.mp4"] and "videos: 2 films" in said
    server.asked.clear()
    assert run("videos")[0] == 0 and sorted(server.asked) == [("trainval/-bbbbbbbbbb.mkv", 0), ("trainval/ccccccccccc.webm", 2000)]


def test_three_in_a_row_end_it(run, server):
    server.broken = {f"trainval/{name}": ["403"] for name in FILMS}
    code, said, _ = run("videos")
    assert code == 3 and said.count("missing: ") == 4 and "ddddddddddd.mp4 (not tried" in said and len([p for p, _ in server.asked if p.startswith("trainval")]) == 3


def test_three_failures_apart_do_not_end_it(run, server, tmp_path):
    names = [f"{i:011d}.mp4" for i in range(6)]
    server.files |= {"annotations/ava_file_names_trainval_v2.1.txt": "\n".join(names).encode()} | {f"trainval/{name}": b"film" for name in names}
    server.broken = {f"trainval/{names[i]}": ["403"] for i in (0, 1, 3)}
    code, said, _ = run("videos")
    assert code == 3 and sorted(p.name for p in (tmp_path / "data" / "ava" / "videos").iterdir()) == [names[2], names[4], names[5]] and "not tried" not in said


def test_killed_while_files_are_moved(run, server, tmp_path, monkeypatch):
    "What is needed comes last: however far it came, the next run puts everything there."
    server.files["annotations/ava_v2.2.zip"] = zipped({name: "x,1\n" for name in (*fetch_ava.ANNOTATED, "zzz_other.txt")})
    real, folder = fetch_ava.os.replace, tmp_path / "data" / "ava" / "annotations"
    for stop in range(1, 7):
        shutil.rmtree(folder.parent, ignore_errors=True)
        folder.parent.mkdir(parents=True)
        (folder.parent / "ava_v2.2.zip").write_bytes(server.files["annotations/ava_v2.2.zip"])
        moves = iter(range(1, 99))
        def cut(source, target):
            if Path(target).parent == folder and next(moves) == stop: raise KeyboardInterrupt
            return real(source, target)
        monkeypatch.setattr(fetch_ava.os, "replace", cut)
        assert run("annotations")[0] == 130
        monkeypatch.setattr(fetch_ava.os, "replace", real)
        assert run("annotations")[0] == 0 and len(list(folder.iterdir())) == 7, stop
        assert not list(folder.parent.glob(".*"))


@pytest.mark.parametrize("path, part", [("trainval/aaaaaaaaaaa.mp4", "videos"), (fetch_ava.PREDICTED[1], "boxes"), ("annotations/ava_v2.2.zip", "annotations")])
def test_a_web_page_is_no_file(run, server, tmp_path, path, part):
    server.broken[path] = ["page"]
    code, said, notes = run(part)
    assert code == (3 if part == "videos" else 2) and "a web page?" in said + notes and not [p for p in (tmp_path / "data").rglob("*.part")]
    assert run(part)[0] == 0


def test_archives_are_still_only_archives_elsewhere(run):
    run("boxes")
    with pytest.raises(command_line.BadInput, match="a tar.gz or a zip archive is needed"): downloads.check_magic(b"vide", 9, "http://x")


def test_a_file_that_changed_at_its_source(run, server, tmp_path):
    film = tmp_path / "data" / "ava" / "videos" / "aaaaaaaaaaa.mp4"
    run("videos")
    film.unlink()
    server.files["trainval/aaaaaaaaaaa.mp4"] = noise("other")
    code, said, _ = run("videos")
    assert code == 3 and "it changed or is damaged" in said and hashlib.md5(noise("other")).hexdigest() in said and not film.exists()
    sums = film.parents[1] / "checksums.md5"
    sums.write_text("".join(line for line in sums.open() if "aaaa" not in line))                           # believed
    assert run("videos")[0] == 0 and film.read_bytes() == noise("other")


def test_verify(run, server, tmp_path):
    folder = tmp_path / "data" / "ava"
    run("videos", "boxes")
    code, said, _ = run("--verify")
    assert code == 0 and "8 of 8 files are as recorded" in said
    film, asked = folder / "videos" / "aaaaaaaaaaa.mp4", len(server.asked)
    film.write_bytes(film.read_bytes()[:-1] + b"?")
    (folder / "videos" / "fffffffffff.mp4").write_bytes(b"by hand")
    code, said, _ = run("--verify")
    assert code == 3 and "changed: videos/aaaaaaaaaaa.mp4" in said and "8 of 9 files" in said and "1 recorded now" in said and len(server.asked) == asked
    (folder / "checksums.md5").write_text("nonsense\n")
    code, _, message = run("--verify")
    assert code == 2 and "checksums.md5, line 1: 'nonsense'" in message


def test_a_file_put_there_by_hand_is_used(run, server, tmp_path):
    folder = tmp_path / "data" / "ava"
    folder.mkdir(parents=True)
    (folder / "ava_v2.2.zip").write_bytes(server.files["annotations/ava_v2.2.zip"])
    assert run("annotations")[0] == 0 and [path for path, _ in server.asked] == ["annotations/ava_file_names_trainval_v2.1.txt"]


def test_doors(run, server, tmp_path):
    folder = tmp_path / "data" / "ava"
    for arguments, words in ((["films"], "PART films: there is no such part"), (["videos", "--subset", "val"], "fetch annotations first"),
                             (["--kinetics", tmp_path / "none"], "has no tables"), (["kinetics", "--kinetics", tmp_path / "none"], "no such folder"), (["--margin", "-1"], "--margin -1.0")):
        code, _, message = run(*arguments)
        assert code == 2 and words in message and message.splitlines()[-1].startswith("fetch_ava: "), (arguments, message)
    server.files["annotations/ava_file_names_trainval_v2.1.txt"] = b"aaaaaaaaaaa.mp4\n../../evil.mp4\n"
    shutil.rmtree(folder)
    code, _, message = run("videos")
    assert code == 2 and "line 2: '../../evil.mp4' is no plain file name" in message
    server.files["annotations/ava_v2.2.zip"] = zipped({"ava_train_v2.2.csv": "x", "ava_val_v2.2.csv": ""})
    code, _, message = run("annotations")
    assert code == 2 and "ava_val_v2.2.csv" in message and "ava_train_v2.2.csv," not in message and not (folder / "annotations" / "ava_train_v2.2.csv").exists()
    (tmp_path / "file").write_bytes(b"")
    assert fetch_ava.main(["--data", str(tmp_path / "file")]) == 2


# --- Kinetics ---

def test_the_clips_that_are_needed(run, tmp_path):
    run("kinetics", "--margin", "2")
    assert rows(tmp_path / "data" / "ava" / "kinetics" / "clips.csv") == [
        ["youtube_id", "second", "time_start", "time_end", "subset"], ["_kinetics-1", "17.000000", "15.000000", "19.000000", "train"],
        ["kinetics__2", "5.016949", "3.016949", "7.016949", "train"], ["kinetics__3", "100.500000", "98.500000", "102.500000", "val"],
        ["kinetics__4", "0.500000", "0.000000", "2.500000", "test"]]


def test_a_kinetics_copy_is_compared(run, tmp_path):
    copy = tmp_path / "k700"
    for name, size in (("train/a b/_kinetics-1_000000_000010.mp4", 9), ("train/a b/_kinetics-1_000008_000018.mp4", 9), ("train/a b/_kinetics-1_000012_000022.mp4", 9),
                       ("val/kinetics__2_000000_000010.mp4", 0), ("val/kinetics__3_000000_000010.mp4", 9), ("val/kinetics__4.mkv", 9), ("readme", 9)):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(bytes(size))
    code, said, _ = run("kinetics", "--kinetics", copy)
    folder = tmp_path / "data" / "ava" / "kinetics"
    assert code == 3 and "2 of 4 clips are in" in said and "1 clips are missing (the file is empty)" in said and "1 clips are missing (other seconds of the video)" in said
    assert rows(folder / "clips_found.csv")[1:] == [["_kinetics-1", "17.000000", "15.500000", "18.500000", "train", "train/a b/_kinetics-1_000012_000022.mp4", "5.000000"],
                                                    ["kinetics__4", "0.500000", "0.000000", "2.000000", "test", "val/kinetics__4.mkv", "0.500000"]]
    assert [(row[0], row[-1]) for row in rows(folder / "clips_missing.csv")] == [("youtube_id", "reason"), ("kinetics__2", "the file is empty"), ("kinetics__3", "other seconds of the video")]
    (copy / "val/kinetics__2_000000_000010.mp4").write_bytes(b"x")
    (copy / "val/kinetics__3_000100_000110.mp4").write_bytes(b"x")
    code, said, _ = run("--kinetics", copy)
    assert code == 0 and "4 of 4 clips" in said and "1 of them shorter than asked" in said and len(rows(folder / "clips_missing.csv")) == 1


def test_a_broken_table_names_its_row(run, tmp_path):
    run("kinetics")
    for text, row in (("kinetics__3,100.5\nkinetics__3,soon\n", 2), ("kinetics__3\n", 1), (",3\n", 1), ("kinetics__3,nan\n", 1), ("kinetics__3,-1\n", 1)):
        (tmp_path / "data" / "ava" / "kinetics" / "kinetics_val_v1.0.csv").write_text(text)
        code, _, message = run()
        assert code == 2 and f"kinetics_val_v1.0.csv, row {row}:" in message


# --- As a program ---

def test_help(tmp_path):
    shown = subprocess.run([sys.executable, str(SCRIPTS / "fetch_ava.py"), "--help"], capture_output=True, text=True, cwd=tmp_path)
    assert shown.returncode == 0 and "python data_scripts/fetch_ava.py" in shown.stdout and "publishes checksums" in shown.stdout and max(map(len, shown.stdout.splitlines())) < 160


def test_as_a_program(server, tmp_path):
    done = subprocess.run([sys.executable, str(SCRIPTS / "fetch_ava.py"), "videos", "--only", "-bbbbbbbbbb", "--mirror", server.url], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and "videos: 1 films" in done.stdout and (tmp_path / "data/ava/videos/-bbbbbbbbbb.mkv").read_bytes() == noise("-bbbbbbbbbb.mkv")
