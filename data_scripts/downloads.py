"""Archives from elsewhere: downloaded in as many pieces as it takes, verified, unpacked without trusting them."""
import gzip
import hashlib
import http.client
import io
import re
import shutil
import ssl
import stat
import struct
import sys
import tarfile
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Callable, Iterator

from command_line import BadInput, progress, say

TIMEOUT_S = 60                      # a server that is silent for longer counts as gone
WAITS_S = (1, 2, 4, 8, 16, 32)      # before each further attempt; progress starts the row again
LONGEST_WAIT_S = 120                # however long the server asks to wait
BLOCK = 1 << 16
MAGIC = {b"\x1f\x8b": "tar.gz", b"PK\x03\x04": "zip"}
BROWSER = "download the archive with a browser and give it as SOURCE"

# What tarfile, gzip and zipfile raise for a damaged archive.
DAMAGE = (tarfile.TarError, gzip.BadGzipFile, zipfile.BadZipFile, zlib.error, struct.error, EOFError,
          NotImplementedError, RuntimeError, ValueError, OverflowError)


class Broken(BadInput):
    "A download that stopped and may go on; `wait_s` is what the server asked for."
    def __init__(self, message: str, wait_s: float = 0):
        super().__init__(message)
        self.wait_s = wait_s


class CutOff(BadInput):
    "An archive that begins well but has no end."


# --- Download: to a .part file that only grows, or is corrected where the server says otherwise ---

def download(
    url: str,
    part: Path,  # what is there already is not asked for again
    check=None,  # (first bytes, length or None, url): raises BadInput for what is no such file; None: archives only
) -> bool:       # True if the server said how long the file is, and it is all there
    "Download what `part` still lacks, however often the connection breaks; raises BadInput when waiting does not help (what came is kept)."
    where = urllib.parse.urlsplit(url)
    if where.scheme not in ("http", "https") or not where.netloc:
        raise BadInput(f"--url {url}: an address that starts with https:// or http:// is needed; give a file on this machine as SOURCE")
    part.parent.mkdir(parents=True, exist_ok=True)
    failures = 0
    while True:
        before = size_of(part)
        try: return fetch(url, part, before, check or check_magic)
        except Broken as error:
            if size_of(part) > before: failures = 0
            if failures == len(WAITS_S): raise BadInput(f"{error}; {how_to_go_on(part)}") from error
            wait = max(WAITS_S[failures], min(error.wait_s, LONGEST_WAIT_S))
            say(f"{error}; trying again in {wait:g} s")
        failures += 1
        time.sleep(wait)


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def how_to_go_on(part: Path) -> str:
    "The end of a sentence about a download that stopped."
    kept = f"{size_of(part) / 1e6:.1f} MB are kept in {part}; " if size_of(part) else ""
    return f"{kept}run the same command again{' to go on' if kept else ''}, or {BROWSER}"


def fetch(
    url: str,
    part: Path,
    start: int,  # the first byte that is asked for
    check,       # of the first bytes
) -> bool:       # True if the server said how long the file is, and it is all there
    "One attempt. Raises Broken where another one may help, BadInput where none will."
    with ask(url, start) as answer:
        if answer.status == 416 and answer.headers.get("Content-Range") == f"bytes */{start}": return True   # nothing is lacking
        resumed = answer.status == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {start}-")
        if answer.status in (206, 416) and not resumed:
            if not start: raise BadInput(f"{url}: the server answers {answer.status} though the whole file was asked for; {BROWSER}")
        else:
            if resumed: say(f"going on with {part} after {start / 1e6:.1f} MB")
            return save(answer, url, part, start if resumed else 0, check)
    return fetch(url, part, 0, check)   # not the beginning of this file, or not the range that was asked for


def ask(url: str, start: int):
    "The server's answer for the bytes from `start` on: 200, 206 or 416."
    headers = {"User-Agent": f"actloc {Path(sys.argv[0]).name}"} | ({"Range": f"bytes={start}-"} if start else {})
    try: return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        if error.code == 416: return error
        message = f"{url}: the server answers {error.code} ({error.reason})"
        if error.code in (408, 425, 429) or error.code >= 500: raise Broken(message, seconds_asked(error.headers)) from error
        raise BadInput(f"{message}; check the address, or {BROWSER}") from error
    except http.client.InvalidURL as error: raise BadInput(f"{url}: not an address ({error}); check it, or {BROWSER}") from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLCertVerificationError): raise BadInput(f"{url}: the server cannot be trusted ({reason}); {BROWSER}") from error
        raise Broken(f"{url}: the download failed ({reason or type(error).__name__})") from error


def seconds_asked(headers) -> float:
    "How long the server asks to wait."
    text = (headers or {}).get("Retry-After", "")
    return float(text) if text.isdecimal() else 0


def save(answer, url: str, part: Path, start: int, check) -> bool:
    "Bring `part` in line with the answer, which begins at byte `start`; raises Broken if less came than was announced."
    length = answer.headers.get("Content-Length", "")
    total = start + int(length) if length.isdecimal() else None
    block, done = receive(answer.read, 4, url), start
    if not start: check(block, total, url)
    check_room(part, total)
    with open(part, "r+b" if part.exists() else "w+b") as file, progress("downloading", total, "B", start) as bar:
        file.seek(start)
        while block:
            keep(file, block)
            done += len(block)
            bar.update(len(block))
            block = receive(answer.read1, BLOCK, url)
        if total is not None and done < total: raise Broken(f"{url}: the download failed (it broke off after {done:,} of {total:,} bytes)")
        file.truncate(done)
    return total is not None


def receive(read, size: int, url: str) -> bytes:
    "The next bytes; raises Broken if the connection does."
    try: return read(size)
    except (OSError, http.client.HTTPException) as error: raise Broken(f"{url}: the download failed ({error or type(error).__name__})") from error


def keep(file, block: bytes):
    "Write a block, or leave it where it already is (a server that cannot resume repeats what we have)."
    here = file.tell()
    if file.read(len(block)) == block: return
    file.seek(here)
    file.truncate()
    file.write(block)
    file.flush()


def check_magic(start: bytes, total: int | None, url: str):
    "Raises BadInput if what comes is no archive, before anything is overwritten with it."
    if any(start.startswith(magic) for magic in MAGIC): return
    if len(start) < 4 and (total is None or total >= 4): raise Broken(f"{url}: the download failed (it broke off after {len(start)} bytes)")
    raise BadInput(f"{url}: what comes starts with {start!r} (a web page?), a tar.gz or a zip archive is needed; "
                   f"use the direct link and download it anew, or {BROWSER}")


def check_room(part: Path, total: int | None):
    "Raises BadInput if the rest does not fit on the disk."
    free = shutil.disk_usage(part.parent).free
    if total is not None and total - size_of(part) > free:
        raise BadInput(f"{part}: {(total - size_of(part)) / 1e9:.1f} GB are still to come, {free / 1e9:.1f} GB are free; make room or give another folder")


def md5_of(path: Path) -> str:
    "The MD5 of a file, read in pieces."
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file, progress(f"verifying {path.name}", size_of(path), "B") as bar:
        while block := file.read(1 << 20):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()


# --- Archives in memory, for small ones that may lie in each other ---

def leaves_folder(name: str) -> bool:
    "Does a member of an archive point outside the archive? ('../x', '/x', 'C:x')"
    path = PurePosixPath(name.replace("\\", "/"))
    return path.is_absolute() or ".." in path.parts or re.match("[A-Za-z]:", name) is not None


def refuse_outside(name: str, called: str):
    "Raises BadInput if a member would leave the folder."
    if leaves_folder(name):
        raise BadInput(f"{called}: member {name!r} points outside the archive; do not use this file, get it from its authors")


def open_zip(
    file,        # path, open file, or bytes in memory
    called: str, # its name in messages
) -> zipfile.ZipFile:
    "A zip archive, opened; raises BadInput if it is none, is cut off, or has a member that leaves its folder."
    try: archive = zipfile.ZipFile(file)
    except DAMAGE as error: raise why_no_zip(file, called) from error
    for name in archive.namelist(): refuse_outside(name, called)
    return archive


def why_no_zip(file, called: str) -> BadInput:
    "The error for a file that does not open as a zip archive."
    with (open(file, "rb") if isinstance(file, (str, Path)) else io.BytesIO(file.getvalue()) if isinstance(file, io.BytesIO) else open(file.name, "rb")) as stream:
        start, size = stream.read(16), stream.seek(0, io.SEEK_END)
    if start.startswith(b"PK\x03\x04"):
        return CutOff(f"{called}: starts like a zip archive but its end is missing after {size:,} bytes (truncated?); copy or download it again")
    return BadInput(f"{called}: {size:,} bytes that start with {start!r} came, a zip archive is needed; give it as its authors distribute it")


def read_member(archive: zipfile.ZipFile, name: str, called: str, limit: int) -> bytes:
    "The bytes of one member, read in memory and checked against its CRC; raises BadInput if it is damaged or larger than `limit`."
    size = archive.getinfo(name).file_size
    if size > limit: raise BadInput(f"{called}: {name} unpacks to {size:,} bytes, at most {limit:,} are expected; get the archive from its authors")
    try: return archive.read(name)
    except DAMAGE as error:
        raise BadInput(f"{called}: {name} is damaged ({error}); copy or download the archive again") from error


# --- Unpacking: into a folder that is there whole or not at all ---

@dataclass(frozen=True)
class Member:
    "One entry of an archive."
    name: str
    size: int
    kind: str                      # file, folder, or what it is instead
    open: Callable[[], IO[bytes]]


@contextmanager
def unpacked(
    archive: Path,  # tar.gz or zip
    folder: Path,   # must be ours: what it holds is deleted before and after
) -> Iterator[Path]:
    "The files of an archive, all of them, in `folder` for as long as the block lasts. Raises BadInput for a damaged or a malicious archive."
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(parents=True)
        with open(archive, "rb") as raw, progress("unpacking", size_of(archive), "B") as bar:
            unpack(members(raw, archive), folder, archive, lambda: bar.update(max(0, raw.tell() - bar.n)))
        yield folder
    finally: shutil.rmtree(folder, ignore_errors=True)


def unpack(found: Iterator[Member], folder: Path, archive: Path, tick: Callable):
    "Write members to `folder`, none outside, none that is not a plain file, none beyond what an archive of this size can hold."
    room = most_unpacked(archive)
    for member in whole(found, archive):
        refuse_outside(member.name, str(archive))
        if member.kind not in ("file", "folder"):
            raise BadInput(f"{archive}: member {member.name!r} is a {member.kind}, only files and folders are unpacked; do not use this file, get it from its authors")
        if (room := room - member.size - 512) < 0:   # a file takes room even when it is empty
            raise BadInput(f"{archive}: unpacks to more than {most_unpacked(archive):,} bytes (member {member.name!r} has {member.size:,}), which is absurd for "
                           f"{size_of(archive):,} packed ones; do not use this file, get it from its authors")
        check_room(folder / "x", member.size)
        target = folder / member.name.replace("\\", "/")
        if target.name.startswith("._") or "__MACOSX" in target.parts: continue   # a Mac's notes to itself
        if member.kind == "folder": target.mkdir(parents=True, exist_ok=True)
        else: write_member(member, target, archive)
        tick()


def most_unpacked(archive: Path) -> int:
    "More bytes than any honest archive of features of this size holds."
    return (64 << 20) + 100 * size_of(archive)


def write_member(member: Member, target: Path, archive: Path):
    "One file; its rights are ours, whatever the archive says."
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target, "wb") as file:
        for block in whole(blocks(member), archive): file.write(block)


def blocks(member: Member) -> Iterator[bytes]:
    "The bytes of a member, piece by piece."
    with member.open() as stream:
        while block := stream.read(BLOCK): yield block


def whole(items: Iterator, archive: Path) -> Iterator:
    "The same items; raises BadInput where reading the archive fails."
    try: yield from items
    except BadInput: raise
    except DAMAGE as error:
        raise BadInput(f"{archive}: the archive is damaged or cut off ({error or type(error).__name__}); copy or download it again") from error


def members(raw: IO[bytes], archive: Path) -> Iterator[Member]:
    "What is in an archive; raises BadInput if it is neither a zip nor a tar.gz."
    start = raw.read(4)
    raw.seek(0)
    kind = next((kind for magic, kind in MAGIC.items() if start.startswith(magic)), None)
    if kind is None:
        raise BadInput(f"{archive}: {size_of(archive):,} bytes that start with {start!r} came, a tar.gz or a zip archive is needed; give it as its authors distribute it")
    return zip_members(raw, archive) if kind == "zip" else tar_members(raw)


def zip_members(raw: IO[bytes], archive: Path) -> Iterator[Member]:
    with open_zip(raw, str(archive)) as opened:
        for info in opened.infolist():
            mode = info.external_attr >> 16 if info.create_system == 3 else 0
            kind = "link" if stat.S_ISLNK(mode) else "device" if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR) else "folder" if info.is_dir() else "file"
            yield Member(info.filename, info.file_size, kind, partial(opened.open, info))


def tar_members(raw: IO[bytes]) -> Iterator[Member]:
    with gzip.GzipFile(fileobj=raw) as plain, tarfile.open(fileobj=Sips(plain), mode="r:", errorlevel=2) as opened:
        for info in opened:
            kind = ("folder" if info.isdir() else "link" if info.issym() or info.islnk() else "sparse file" if info.issparse() else "file" if info.isreg() else "device")
            yield Member(info.name, max(info.size, 0), kind, partial(opened.extractfile, info))
        while plain.read(BLOCK): pass   # to the end, where gzip checks its sum


class Sips:
    "A stream that refuses to be read in gulps, as a header of absurd length would make tarfile do."
    def __init__(self, stream): self.seek, self.tell, self.inner = stream.seek, stream.tell, stream

    def read(self, size: int) -> bytes:
        if not 0 <= size <= 1 << 20: raise tarfile.ReadError(f"a header of {size:,} bytes")
        return self.inner.read(size)
