"data_scripts/fetch_*.py: downloads from a bad server on this machine, archives that mean harm, reports of what is missing."
import gzip
import hashlib
import io
import http.server
import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS, SHARED = ROOT / "data_scripts", ROOT.parent / "shared"
sys.path.insert(0, str(SCRIPTS))
import command_line
import downloads
import fetch_anet
import fetch_epic
import fetch_thumos
import releases

THUMOS = fetch_thumos.RELEASES["i3d"]
sleep = time.sleep   # the scripts' own is replaced below


# --- Archives by hand ---

def tar_bytes(members):
    "A tar.gz of (name, bytes) pairs and ready TarInfos."
    memory = io.BytesIO()
    with tarfile.open(fileobj=memory, mode="w:gz") as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo): archive.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                archive.addfile(info, io.BytesIO(member[1]))
    return memory.getvalue()


def zip_bytes(members):
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members: archive.writestr(name, content)
    return memory.getvalue()


def odd(name, kind, link="", size=0):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, size
    return info


def noise(seed, size): return random.Random(seed).randbytes(size)


def annotation_bytes(**subsets):
    return json.dumps({"database": {id: {"subset": subset, "annotations": []} for subset, ids in subsets.items() for id in ids}}).encode()


def thumos_members(top="thumos/", lost=(), size=5000):
    "Three videos with features that do not compress."
    ids = {"Validation": ["val_1", "val_2"], "Test": ["test_1"]}
    features = [(f"{top}i3d_features/{id}.npy", noise(id, size)) for of in ids.values() for id in of if id not in lost]
    return [(f"{top}annotations/thumos14.json", annotation_bytes(**ids)), *features]


# --- A server that does what `plan` says: one word per answer, then whole answers ---

class Server(http.server.ThreadingHTTPServer):
    """Words: whole, cut (breaks off after `limit` bytes), stall (as cut, but silent), ignore (no ranges), ignore cut, shift (resumes at another byte),
    drip (slowly), chunked, chunked cut, redirect, loop, page (HTML, 200), or a status number."""
    daemon_threads = True

    def __init__(self, content):
        super().__init__(("127.0.0.1", 0), Answer)
        self.content, self.plan, self.limit, self.length, self.retry_after, self.asked, self.free = content, [], 4000, True, None, [], threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}/thumos.tar.gz"

    def handle_error(self, *_): pass   # clients that hang up are part of the game


class Answer(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_): pass

    def head(self, status, **headers):
        self.close_connection = True
        self.send_response(status)
        for name, value in headers.items(): self.send_header(name.replace("_", "-"), str(value))
        self.send_header("Connection", "close")
        self.end_headers()

    def do_GET(self):
        server, wanted = self.server, self.headers.get("Range")
        word = server.plan.pop(0) if server.plan else "whole"
        server.asked.append(wanted)
        if word.isdecimal(): return self.head(int(word), **({"Retry-After": server.retry_after} if server.retry_after else {}), Content_Length=0)
        if word in ("redirect", "loop"): return self.head(302, Location=server.url if word == "loop" else server.url + "?at=another", Content_Length=0)
        if word == "page": return self.answer(200, b"<!DOCTYPE html><title>Sign in</title>", {})
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and "ignore" not in word else 0
        size = len(server.content)
        if start and start >= size: return self.head(416, Content_Range=f"bytes */{size}", Content_Length=0)
        begin = start + 7 * (word == "shift" and start > 0)
        headers = {"Content_Range": f"bytes {begin}-{size - 1}/{size}"} if start else {}
        self.answer(206 if start else 200, server.content[begin:], headers, word)

    def answer(self, status, content, headers, word="whole"):
        server = self.server
        if "chunked" in word: headers = headers | {"Transfer_Encoding": "chunked"}
        elif server.length: headers = headers | {"Content_Length": len(content)}
        self.head(status, **headers)
        content, broken = (content[:server.limit], True) if "cut" in word or "stall" in word else (content, False)
        if "chunked" in word:
            for i in range(0, len(content), 1000): self.wfile.write(b"%x\r\n%s\r\n" % (len(content[i:i + 1000]), content[i:i + 1000]))
            if not broken: self.wfile.write(b"0\r\n\r\n")
            return
        for i in range(0, len(content), 500 if "drip" in word else 1 << 20):
            self.wfile.write(content[i:i + (500 if "drip" in word else 1 << 20)])
            self.wfile.flush()
            if "drip" in word: sleep(.01)
        if "stall" in word: server.free.wait(10)


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"): monkeypatch.delenv(name, raising=False)
    server = Server(tar_bytes(thumos_members()))
    threading.Thread(target=server.serve_forever, args=(.01,), daemon=True).start()
    yield server
    server.free.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def waits(monkeypatch):
    "The waiting times, which pass at once."
    took = []
    monkeypatch.setattr(downloads, "WAITS_S", (1, 2, 4))
    monkeypatch.setattr(downloads.time, "sleep", took.append)
    yield took


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    "A function that runs a fetch script here, with a release whose MD5 is that of `content`; gives exit code, stdout, stderr."
    def go(*arguments, content=b"", release=THUMOS, key="i3d"):
        known = {key: replace(release, md5=hashlib.md5(content).hexdigest())}
        code = releases.main("fetch", "about", known, ["--data", str(tmp_path / "data"), *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err
    return go


def check_thumos(data, lost=()):
    folder = data / "thumos"
    assert sorted(p.name for p in (folder / "i3d_features").iterdir()) == sorted(f"{n}.npy" for n in ("test_1", "val_1", "val_2") if n not in lost)
    for path in (folder / "i3d_features").iterdir(): assert path.read_bytes() == noise(path.stem, 5000)
    assert json.loads((folder / "annotations" / "thumos14.json").read_bytes())["database"]["val_1"]["subset"] == "Validation"
    assert not list(data.glob(".*"))


# --- Downloads ---

def fetched(server, tmp_path):
    "Download to a .part, which must become the content."
    part = tmp_path / "x.part"
    complete = downloads.download(server.url, part)
    assert part.read_bytes() == server.content
    return complete


@pytest.mark.parametrize("word", ["whole", "drip", "chunked", "redirect", "ignore"])
def test_a_download_in_one_go(server, waits, tmp_path, word):
    server.plan = [word]
    assert fetched(server, tmp_path) == (word != "chunked") and waits == []
    assert server.asked == [None] * (2 if word == "redirect" else 1)


def test_a_server_that_does_not_say_the_length(server, waits, tmp_path):
    server.length = False
    assert fetched(server, tmp_path) is False and server.asked == [None]


def test_broken_answers_are_continued(server, waits, tmp_path):
    server.plan = ["cut"] * 3
    assert fetched(server, tmp_path) and server.asked == [None, "bytes=4000-", "bytes=8000-", "bytes=12000-"]
    assert waits == [1, 1, 1]                                                  # bytes came each time: the row of waits starts again


def test_a_chunked_answer_that_breaks_is_noticed(server, waits, tmp_path):
    server.plan = ["chunked cut"]
    assert fetched(server, tmp_path) and server.asked == [None, "bytes=4000-"]


def test_a_redirect_keeps_the_range(server, waits, tmp_path):
    server.plan = ["cut", "redirect", "whole"]
    assert fetched(server, tmp_path) and server.asked == [None, "bytes=4000-", "bytes=4000-"]


def test_a_silent_server_is_left_and_asked_again(server, waits, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(downloads, "TIMEOUT_S", .2)
    server.plan = ["stall"]
    assert fetched(server, tmp_path) and server.asked == [None, "bytes=4000-"] and waits == [1]
    assert "timed out" in capsys.readouterr().err


def test_waiting_grows_ends_and_says_how_to_resume(server, waits, tmp_path, capsys):
    server.plan = ["cut", "503", "500", "429", "502"]
    with pytest.raises(command_line.BadInput) as error: downloads.download(server.url, tmp_path / "x.part")
    assert waits == [1, 2, 4] and len(server.asked) == 4                       # one with bytes, three without, no fifth
    assert "answers 429" in str(error.value) and "run the same command again to go on" in str(error.value) and "SOURCE" in str(error.value)
    assert (tmp_path / "x.part").read_bytes() == server.content[:4000] and capsys.readouterr().err.count("trying again in") == 3
    server.plan = []
    assert fetched(server, tmp_path) and server.asked[-1] == "bytes=4000-"


@pytest.mark.parametrize("asked, waited", [("3", 3), ("9999", downloads.LONGEST_WAIT_S), ("soon", 1)])
def test_a_server_may_ask_to_wait(server, waits, tmp_path, asked, waited):
    server.plan, server.retry_after = ["503"], asked
    assert fetched(server, tmp_path) and waits == [waited]


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_a_refusal_is_final(server, waits, tmp_path, status):
    server.plan = ["cut", str(status)]
    with pytest.raises(command_line.BadInput, match=f"answers {status}.*check the address"): downloads.download(server.url, tmp_path / "x.part")
    assert waits == [1] and (tmp_path / "x.part").read_bytes() == server.content[:4000]


def test_addresses_that_lead_nowhere(server, waits, tmp_path):
    server.plan = ["loop"] * 99
    for url, words in ((server.url, "infinite loop"), ("http://127.0.0.1:9/x", "the download failed"), ("ftp://127.0.0.1/x", "https://"),
                       ("http:///x", "https://"), ("x.tar.gz", "https://"), ("http://127.0.0.1:1/a b", "not an address")):
        with pytest.raises(command_line.BadInput, match=words): downloads.download(url, tmp_path / "x.part")
    assert not (tmp_path / "x.part").exists()


def test_a_server_without_ranges_loses_us_nothing(server, waits, tmp_path):
    part, sizes = tmp_path / "x.part", []
    part.write_bytes(server.content[:9000])
    server.plan = ["ignore cut"] * 4                                           # each answer holds less than we have
    with pytest.raises(command_line.BadInput, match="broke off after 4,000"): downloads.download(server.url, part)
    assert part.read_bytes() == server.content[:9000] and waits == [1, 2, 4]
    server.plan, server.limit = ["ignore cut", "ignore"], 12000
    assert fetched(server, tmp_path)


def test_a_damaged_part_is_healed_by_a_whole_answer(server, waits, tmp_path):
    damaged = bytearray(server.content[:9000])
    damaged[5000] ^= 1
    (tmp_path / "x.part").write_bytes(damaged)
    server.plan = ["ignore"]
    assert fetched(server, tmp_path)


@pytest.mark.parametrize("had", ["all", "more", "shift", "none"])
def test_odd_answers_to_a_range(server, waits, tmp_path, had):
    (tmp_path / "x.part").write_bytes({"all": server.content, "more": server.content + b"more", "shift": server.content[:1000], "none": b""}[had])
    server.plan = ["shift"] if had == "shift" else []
    assert fetched(server, tmp_path)
    assert server.asked == {"all": [f"bytes={len(server.content)}-"], "more": [f"bytes={len(server.content) + 4}-", None], "shift": ["bytes=1000-", None], "none": [None]}[had]


def test_a_web_page_does_not_destroy_what_we_have(server, waits, tmp_path):
    part = tmp_path / "x.part"
    for had in (b"", server.content[:9000]):
        if had: part.write_bytes(had)
        server.plan = ["page"]
        with pytest.raises(command_line.BadInput, match="a web page.*direct link"): downloads.download(server.url, part)
        assert downloads.size_of(part) == len(had)
    assert fetched(server, tmp_path)


def test_no_room_is_said_before_anything_is_written(server, waits, tmp_path, monkeypatch):
    monkeypatch.setattr(downloads.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 5000, 5000))
    with pytest.raises(command_line.BadInput, match="still to come.*make room"): downloads.download(server.url, tmp_path / "x.part")
    assert not (tmp_path / "x.part").exists()


def test_killed_at_any_moment_and_resumed(server, tmp_path):
    "SIGKILL while bytes come; the next run asks for the rest only."
    server.content, part = b"\x1f\x8b\x08\x00" + noise(1, 100_000), tmp_path / "x.part"
    program = f"import sys; sys.path.insert(0, {str(SCRIPTS)!r}); import downloads; from pathlib import Path; downloads.download({server.url!r}, Path({str(part)!r}))"
    server.plan = ["drip"]
    child = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while downloads.size_of(part) < 5000 and time.monotonic() < deadline: time.sleep(.005)
    child.kill()
    child.wait()
    kept = downloads.size_of(part)
    assert 5000 <= kept < 100_004 and part.read_bytes() == server.content[:kept]
    assert fetched(server, tmp_path) and server.asked == [None, f"bytes={kept}-"]


# --- From a server to the folders ---

def test_fetch_from_an_address(server, run, tmp_path, monkeypatch):
    monkeypatch.setattr(command_line, "DELAY_S", 0)
    code, said, notes = run("--url", server.url, content=server.content)
    assert code == 0 and "annotated videos: 3 (Test 1, Validation 2)" in said and "features: 3 of 3" in said and "MD5 as in the release" in said
    assert "missing" not in said and "may be deleted" in notes and all(word in notes for word in ("downloading", "verifying", "unpacking", "B/s"))
    check_thumos(tmp_path / "data")
    assert (tmp_path / "data" / "thumos.tar.gz").read_bytes() == server.content and not list((tmp_path / "data").glob("*.part"))
    code, said, notes = run("--url", server.url, content=server.content)        # complete: nothing is asked for
    assert code == 0 and "is complete" in notes and "not verified now" in said and len(server.asked) == 1
    (tmp_path / "data" / "thumos" / "i3d_features" / "val_1.npy").unlink()
    code, said, notes = run("--url", server.url, content=server.content)        # incomplete: from the archive that is here
    assert code == 0 and "downloaded earlier" in notes and len(server.asked) == 1
    check_thumos(tmp_path / "data")


def test_a_wrong_md5_keeps_the_part_and_says_how_to_go_on(server, run, tmp_path):
    good, part = server.content, tmp_path / "data" / "thumos.tar.gz.part"
    server.content = good[:6000] + bytes(10) + good[6010:]
    for _ in range(2):                                                          # the second run finds nothing lacking
        code, said, message = run("--url", server.url, content=good)
        assert code == 2 and said == "" and part.read_bytes() == server.content
        for words in (hashlib.md5(good).hexdigest(), hashlib.md5(server.content).hexdigest(), "run the same command again to go on", f"delete {part}", "--no-verify"):
            assert words in message
        assert not (tmp_path / "data" / "thumos").exists()
    part.unlink()
    server.content = good
    assert run("--url", server.url, content=good)[0] == 0
    check_thumos(tmp_path / "data")


def test_cut_off_without_a_length_is_continued_after_the_md5_complains(server, run, tmp_path):
    server.length, server.plan = False, ["cut"]                                 # looks whole to the downloader
    code, _, message = run("--url", server.url, content=server.content)
    assert code == 2 and "run the same command again to go on" in message
    assert run("--url", server.url, content=server.content)[0] == 0 and server.asked == [None, "bytes=4000-"]
    check_thumos(tmp_path / "data")


def test_no_verify_says_what_is_unverified(server, run, tmp_path):
    code, said, notes = run("--url", server.url, "--no-verify", content=b"other")
    assert code == 0 and "NOT VERIFIED" in said
    assert "NOT VERIFIED" in notes and "thumos14.json" in notes and "i3d_features" in notes and hashlib.md5(b"other").hexdigest() in notes
    check_thumos(tmp_path / "data")


@pytest.mark.parametrize("top", ["", "thumos/", "a/b/"])
@pytest.mark.parametrize("pack", [tar_bytes, zip_bytes])
def test_fetch_from_a_file(run, tmp_path, pack, top):
    junk = [(f"{top}i3d_features/._val_1.npy", b"x"), ("__MACOSX/annotations/thumos14.json", b"x")]
    (tmp_path / "here").write_bytes(content := pack(thumos_members(top) + junk))
    assert run(tmp_path / "here", content=content)[0] == 0
    check_thumos(tmp_path / "data")
    assert (tmp_path / "here").exists() and [p.name for p in (tmp_path / "data").iterdir()] == ["thumos"]


def test_missing_features_are_named(run, tmp_path):
    members = thumos_members(lost=["val_2"]) + [("thumos/i3d_features/val_2.txt", b"x"), ("thumos/i3d_features/old.npy", b"x")]
    members[2] = (members[2][0], b"")                                           # test_1 is empty
    (tmp_path / "a").write_bytes(content := tar_bytes(members))
    code, said, _ = run(tmp_path / "a", content=content)
    listing = tmp_path / "data" / "thumos" / "missing_i3d_features.txt"
    assert code == 3 and "features: 1 of 3" in said and "missing: val_2.npy (absent)" in said and "missing: test_1.npy (empty)" in said
    assert "files that no annotation names: 2 (old.npy, val_2.txt)" in said and listing.read_text() == "test_1.npy\tempty\nval_2.npy\tabsent\n"
    code, said, notes = run()                                                   # a report without fetching
    assert code == 3 and "missing: val_2.npy (absent)" in said and "is incomplete" in notes
    for id in ("val_2", "test_1"): (tmp_path / "data" / "thumos" / "i3d_features" / f"{id}.npy").write_bytes(b"x")
    code, said, _ = run()
    assert code == 0 and "features: 3 of 3" in said and not listing.exists()


def test_the_real_thumos_annotations(run, tmp_path):
    real = SHARED / "data" / "thumos14.json"
    if not real.exists(): pytest.skip(f"the real annotations are not here ({real})")
    ids = sorted(json.loads(real.read_bytes())["database"])
    members = [("thumos/annotations/thumos14.json", real.read_bytes())] + [(f"thumos/i3d_features/{id}.npy", b"x") for id in ids if id not in (ids[3], ids[300])]
    (tmp_path / "a").write_bytes(content := tar_bytes(members))
    code, said, _ = run(tmp_path / "a", content=content)
    assert code == 3 and "annotated videos: 412 (Test 212, Validation 200)" in said and "features: 410 of 412" in said
    assert (tmp_path / "data" / "thumos" / "missing_i3d_features.txt").read_text() == f"{ids[3]}.npy\tabsent\n{ids[300]}.npy\tabsent\n"
    shutil.rmtree(tmp_path / "data" / "thumos" / "i3d_features")
    code, said, _ = run()
    assert code == 3 and "features: 0 of 412" in said and "missing: 312 more" in said and said.count("missing: ") == 101
    assert len((tmp_path / "data" / "thumos" / "missing_i3d_features.txt").read_text().splitlines()) == 412


def test_both_kinds_of_activitynet_share_a_folder(run, tmp_path):
    for key, release in fetch_anet.RELEASES.items():
        members = [(f"anet_1.3/annotations/anet1.3_{key}_filtered.json", annotation_bytes(training=["a", "b"], validation=["c"])),
                   ("anet_1.3/annotations/cuhk_val_simp_share.json", b"{}")] + [(f"anet_1.3/{key}_features/v_{id}.npy", b"x") for id in "abc"]
        (tmp_path / key).write_bytes(content := tar_bytes(members))
        code, said, _ = run(tmp_path / key, content=content, release=release, key=key)
        assert code == 0 and "annotated videos: 3 (training 2, validation 1)" in said
    folder = tmp_path / "data" / "anet_1.3"
    assert sorted(p.relative_to(folder).as_posix() for p in folder.glob("*/*.json")) == [
        f"annotations/{n}.json" for n in ("anet1.3_i3d_filtered", "anet1.3_tsp_filtered", "cuhk_val_simp_share")]
    assert all(len(list((folder / f"{key}_features").iterdir())) == 3 for key in ("tsp", "i3d"))


def test_epic_asks_for_the_videos_of_both_files(run, tmp_path):
    members = [("epic_kitchens/annotations/epic_kitchens_100_verb.json", annotation_bytes(training=["P01_01"])),
               ("epic_kitchens/annotations/epic_kitchens_100_noun.json", annotation_bytes(training=["P01_01", "P02_01"])), ("epic_kitchens/features/P01_01.npz", b"x")]
    (tmp_path / "e").write_bytes(content := tar_bytes(members))
    code, said, _ = run(tmp_path / "e", content=content, release=fetch_epic.RELEASES["slowfast"])
    assert code == 3 and "annotated videos: 2" in said and "missing: P02_01.npz (absent)" in said


def test_doors(run, tmp_path):
    (tmp_path / "short").write_bytes(tar_bytes(thumos_members())[:9000])
    (tmp_path / "wrong").write_bytes(wrong := tar_bytes([("thumos/annotations/thumos14.json", b"[]"), ("thumos/i3d_features/x", b"x")]))
    (tmp_path / "empty").write_bytes(empty := tar_bytes([("readme", b"x")]))
    (tmp_path / "half").write_bytes(half := tar_bytes(thumos_members()[:1]))
    (tmp_path / "file").write_bytes(b"x")
    for arguments, content, words in (
        ([], b"", "neither SOURCE nor --url"),
        ([tmp_path / "x", "--url", "http://127.0.0.1/x"], b"", "one of them is needed"),
        ([tmp_path / "x"], b"", "no such file"),
        ([tmp_path / "short"], b"y", "copy or download it again"),
        ([tmp_path / "short"], (tmp_path / "short").read_bytes(), "damaged or cut off"),
        ([tmp_path / "file"], b"x", "a tar.gz or a zip archive is needed"),
        ([tmp_path / "empty"], empty, "0 files annotations/thumos14.json"),
        ([tmp_path / "half"], half, "i3d_features/ not in it"),
        ([tmp_path / "wrong"], wrong, '{"database"'),
        ([tmp_path / "x", "--data", tmp_path / "file"], b"", "is a file, a folder is needed"),
    ):
        code, said, message = run(*arguments, content=content)
        assert code == 2 and words in message and said == "" and message.count("\n") == 1 and message.startswith("fetch: "), (arguments, message)
        shutil.rmtree(tmp_path / "data", ignore_errors=True)


def test_killed_while_files_are_moved(run, tmp_path, monkeypatch):
    "After a stop at any rename there is no annotation file, or all of the archive; the next run repairs."
    (tmp_path / "a").write_bytes(content := tar_bytes(thumos_members()))
    real, data = os.replace, tmp_path / "data"
    for old in (False, True):                                                   # into an empty place, and over an incomplete one
        for stop in range(1, 6):
            shutil.rmtree(data, ignore_errors=True)
            if old:
                assert run(tmp_path / "a", content=content)[0] == 0
                (data / "thumos" / "i3d_features" / "val_1.npy").write_bytes(b"")
            count = iter(range(1, 99))
            def cut(*paths):
                if next(count) == stop: raise KeyboardInterrupt
                return real(*paths)
            monkeypatch.setattr(releases.os, "replace", cut)
            code = run(tmp_path / "a", content=content)[0]
            monkeypatch.setattr(releases.os, "replace", real)
            assert code == (0 if stop > (4 if old else 2) else 130), (old, stop)
            assert not list(data.glob(".*"))
            if (data / "thumos" / "annotations" / "thumos14.json").exists(): check_thumos(data)
            assert run(tmp_path / "a", content=content)[0] == 0
            check_thumos(data)


# --- Archives that mean harm ---

HARM_TAR = {
    "up": [("../evil", b"x")], "deep up": [("a/../../evil", b"x")], "root": [("HERE/evil", b"x")], "drive": [("C:\\evil", b"x")], "windows up": [("..\\evil", b"x")],
    "symlink": [odd("a", tarfile.SYMTYPE, "../../evil")], "inner symlink": [("b", b"x"), odd("a", tarfile.SYMTYPE, "b")], "through": [odd("a", tarfile.SYMTYPE, ".."), ("a/evil", b"x")],
    "hard link": [("b", b"x"), odd("a", tarfile.LNKTYPE, "b")], "passwd": [odd("a", tarfile.LNKTYPE, "/etc/passwd")],
    "fifo": [odd("a", tarfile.FIFOTYPE)], "device": [odd("a", tarfile.CHRTYPE)], "disk": [odd("a", tarfile.BLKTYPE)],
    "huge": [("b", b"x"), odd("a", tarfile.REGTYPE, size=10**12)], "huge header": [odd("a", tarfile.XHDTYPE, size=10**10)], "huge name": [odd("a", tarfile.GNUTYPE_LONGNAME, size=10**10)],
}


@pytest.mark.parametrize("case", HARM_TAR)
def test_harm_in_a_tar(run, tmp_path, case):
    memory = io.BytesIO()
    with gzip.open(memory, "wb") as plain:                                      # headers as they are: tarfile would repair some
        for member in HARM_TAR[case]:
            info, body = (member, b"") if isinstance(member, tarfile.TarInfo) else (odd(member[0], tarfile.REGTYPE, size=len(member[1])), member[1])
            info.name = info.name.replace("HERE", str(tmp_path))
            plain.write(info.tobuf(tarfile.GNU_FORMAT) + body + bytes(-len(body) % 512))
        plain.write(bytes(1024))
    refused(run, tmp_path, memory.getvalue(), "damaged" if "header" in case or "name" in case else "do not use this file")


def zipped(name, mode=0o100644, body=b"x"):
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr, info.compress_type = 3, mode << 16, zipfile.ZIP_DEFLATED
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w", zipfile.ZIP_DEFLATED) as archive: archive.writestr(info, body)
    return memory.getvalue()


@pytest.mark.parametrize("name, mode", [("../evil", 0o100644), ("HERE/evil", 0o100644), ("a\\..\\..\\evil", 0o100644), ("a", 0o120777), ("a", 0o010644), ("a", 0o020644)])
def test_harm_in_a_zip(run, tmp_path, name, mode):
    refused(run, tmp_path, zipped(name.replace("HERE", str(tmp_path)), mode), "do not use this file")


def test_bombs(run, tmp_path, monkeypatch):
    body = bytes(80 << 20)                                                      # 80 MiB of zeros in some 80 kB
    refused(run, tmp_path, zipped("a", body=body), "absurd")
    refused(run, tmp_path, gzip.compress(odd("a", tarfile.REGTYPE, size=len(body)).tobuf() + body), "absurd")
    monkeypatch.setattr(downloads, "most_unpacked", lambda archive: 100_000)
    refused(run, tmp_path, tar_bytes([(f"{i}", b"") for i in range(300)]), "absurd")   # too many files, however empty


def test_a_header_that_would_fill_the_memory(run, tmp_path):
    info = tarfile.TarInfo("a")
    info.pax_headers = {"comment": "x" * (2 << 20)}
    memory = io.BytesIO()
    with tarfile.open(fileobj=memory, mode="w:gz", format=tarfile.PAX_FORMAT) as archive: archive.addfile(info)
    refused(run, tmp_path, memory.getvalue(), "a header of 2,0")


def refused(run, tmp_path, content, words):
    "Even when the archive is believed, nothing of it is left and nothing lies elsewhere."
    (tmp_path / "a").write_bytes(content)
    code, said, message = run(tmp_path / "a", content=content)
    assert code == 2 and words in message and said == "" and message.count("\n") == 1, message
    assert sorted(p.name for p in tmp_path.iterdir()) in (["a"], ["a", "data"]) and not list((tmp_path / "data").glob("**/*"))


@pytest.mark.parametrize("pack", [tar_bytes, zip_bytes])
def test_damage_anywhere_is_noticed_or_harmless(run, tmp_path, pack):
    whole, chance, codes = pack(thumos_members(size=300)), random.Random(0), set()
    for _ in range(150):
        content = bytearray(whole)
        for _ in range(chance.randint(0, 3)): content[chance.randrange(len(content))] = chance.randrange(256)
        content = bytes(content[:chance.choice([len(content), chance.randrange(len(content))])])
        (tmp_path / "a").write_bytes(content)
        code, _, message = run(tmp_path / "a", content=content)
        codes.add(code)
        assert code in (0, 2, 3) and (code != 2 or message.startswith("fetch: ")) and sorted(p.name for p in tmp_path.iterdir()) == ["a", "data"]
        if code != 2:
            for path in (tmp_path / "data" / "thumos" / "i3d_features").iterdir(): assert path.read_bytes() == noise(path.stem, 300)
        shutil.rmtree(tmp_path / "data")
    assert codes >= {0, 2}


def test_every_cut_of_a_tar_is_noticed(run, tmp_path):
    whole = tar_bytes(thumos_members(size=300))
    for size in range(4, len(whole), 7):
        (tmp_path / "a").write_bytes(whole[:size])
        with pytest.raises(command_line.BadInput):
            with downloads.unpacked(tmp_path / "a", tmp_path / "folder"): pass
        assert not (tmp_path / "folder").exists()


def test_an_archive_is_read_once_from_front_to_end(tmp_path, monkeypatch):
    "A rewind per member would make unpacking quadratic."
    (tmp_path / "a").write_bytes(tar_bytes([(f"{i:03d}", noise(i, 37 * i)) for i in range(100)]))
    monkeypatch.setattr(gzip._GzipReader, "_rewind", lambda self: pytest.fail("rewound"))
    with downloads.unpacked(tmp_path / "a", tmp_path / "folder") as folder:
        assert all((folder / f"{i:03d}").read_bytes() == noise(i, 37 * i) for i in range(100))
        modes = {p.stat().st_mode & 0o7111 for p in folder.iterdir()}
    assert modes == {0}                                                         # nobody's rights but ours


# --- The scripts themselves ---

@pytest.mark.parametrize("name", ["fetch_thumos", "fetch_anet", "fetch_epic", "convert_epic", "convert_ego4d"])
def test_help(name, tmp_path):
    shown = subprocess.run([sys.executable, str(SCRIPTS / f"{name}.py"), "--help"], capture_output=True, text=True, cwd=tmp_path)
    assert shown.returncode == 0 and f"python data_scripts/{name}.py" in shown.stdout
    if "fetch" in name: assert "README" in shown.stdout and "--url" in shown.stdout and "MD5" in shown.stdout and max(map(len, shown.stdout.splitlines())) < 160


def test_checksums_are_the_documented_ones():
    spec = SHARED / "spec" / "actionformer.md"
    if not spec.exists(): pytest.skip(f"the description of the release is not here ({spec})")
    text = spec.read_text()
    for release in (*fetch_thumos.RELEASES.values(), *fetch_anet.RELEASES.values(), *fetch_epic.RELEASES.values()):
        assert f"{release.archive} {release.md5}" in text


def test_as_a_program(tmp_path):
    (tmp_path / "thumos.tar.gz").write_bytes(tar_bytes(thumos_members()))
    def shell(*arguments):
        return subprocess.run([sys.executable, str(SCRIPTS / "fetch_thumos.py"), *arguments], capture_output=True, text=True, cwd=tmp_path)
    refused = shell("thumos.tar.gz")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and THUMOS.md5 in refused.stderr and not (tmp_path / "data" / "thumos").exists()
    done = shell("thumos.tar.gz", "--no-verify")
    assert done.returncode == 0 and "features: 3 of 3" in done.stdout
    check_thumos(tmp_path / "data")
