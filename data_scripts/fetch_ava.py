#!/usr/bin/env python
"""AVA and AVA-Kinetics from where their authors keep them: annotations, person boxes, films, and which Kinetics clips are needed.

examples:
  python data_scripts/fetch_ava.py --dry-run annotations boxes videos kinetics   what would be fetched, from where, to where
  python data_scripts/fetch_ava.py annotations boxes                             all small files
  python data_scripts/fetch_ava.py videos --subset val                           the 64 films that results are reported on
  python data_scripts/fetch_ava.py videos --only -5KQ66BBWC4 053oq2xB3oU         two films, to try things out
  python data_scripts/fetch_ava.py kinetics                                      AVA-Kinetics, and kinetics/clips.csv: the clips it needs
  python data_scripts/fetch_ava.py kinetics --kinetics ~/kinetics700             which of them are in your own copy of Kinetics
  python data_scripts/fetch_ava.py --verify                                      what is there, compared with its recorded checksums
"""
import argparse
import csv
import math
import os
import re
import sys
import urllib.parse
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import downloads
from actloc.core.ava import numbered_rows
from actloc.core.files import replacing

from command_line import DONE, MISSING, BadInput, check_folder, progress, run, say
from downloads import download, md5_of, size_of, unpacked

AVA = "https://s3.amazonaws.com/ava-dataset"                                                     # the CVDF's copy, named by AVA's authors
BOXES = "https://dl.fbaipublicfiles.com/video-long-term-feature-banks/data/ava/annotations"      # by the authors of the long-term feature bank
KINETICS = "https://storage.googleapis.com/deepmind-media/Datasets"

LISTS = {"trainval": "ava_file_names_trainval_v2.1.txt", "test": "ava_file_names_test_v2.1.txt"}    # v2.1 and v2.2 have the same films
FILMS = {"trainval": 299, "train": 235, "val": 64, "test": 131}
ANNOTATED = ("ava_train_v2.2.csv", "ava_val_v2.2.csv", "ava_train_excluded_timestamps_v2.2.csv", "ava_val_excluded_timestamps_v2.2.csv",
             "ava_action_list_v2.2_for_activitynet_2019.pbtxt")
KINETICS_FILES = {"train": "kinetics_train_v1.0.csv", "val": "kinetics_val_v1.0.csv", "test": "kinetics_test_v1.0.csv"}
TABLES = (KINETICS_FILES["train"], KINETICS_FILES["val"])
PREDICTED = tuple(f"ava_{subset}_predicted_boxes.csv" for subset in ("train", "val", "test"))
CHECKSUMS = "checksums.md5"
GIVE_UP = 3     # films that fail one after the other: then it is not the film
SHOWN = 20

PARTS = """parts (default: only a report of what is there; each goes below DATA/ava):
  annotations  annotations/: ava_v2.2.zip unpacked (boxes, actions, excluded seconds, label maps) and the list of films
  boxes        boxes/: the person boxes that a detector found, with scores (train, val, test), as used for published results
  videos       videos/: the films; 299 of training and validation have about 157 GB. Stop and start again at will
  kinetics     kinetics/: the tables of AVA-Kinetics, and made from them clips.csv:
               youtube_id, second of the key frame, time_start, time_end (--margin seconds around it), subset.
               Kinetics itself is not ours to pass on; feed the list to your own copy. With --kinetics FOLDER (files
               ID_000010_000020.mp4 as Kinetics names them, or whole videos ID.mp4, in any folders below) two more:
               clips_found.csv (... file, offset of the key frame in that file in seconds) and clips_missing.csv

checksums:
  None of the three hosts publishes checksums. So the MD5 of everything is recorded when it first comes, in DATA/ava/checksums.md5
  (the layout of md5sum; a colleague's list may be put there before). A file that is fetched again must have the recorded one,
  and --verify compares all that is there. What is inside the archives is also covered by their own checks.

a file that cannot be fetched from here may be put to its place by hand (--dry-run names the places); it is then left alone.
exit code: 0 all of the parts is there, 3 something is missing or changed (named), 2 refused (one sentence says why), 130 interrupted"""


@dataclass(frozen=True)
class Source:
    "One file: where it is, and where it goes below DATA/ava."
    url: str
    place: str


@dataclass(frozen=True)
class Sources:
    "Where everything is; a mirror has all of it under one address."
    ava: str = AVA
    boxes: str = BOXES
    kinetics: str = KINETICS

    def annotations(self) -> Source: return Source(f"{self.ava}/annotations/ava_v2.2.zip", "ava_v2.2.zip")
    def films(self, subset: str) -> Source:
        name = LISTS["test" if subset == "test" else "trainval"]
        return Source(f"{self.ava}/annotations/{name}", f"annotations/{name}")
    def film(self, name: str, subset: str) -> Source:
        return Source(f"{self.ava}/{'test' if subset == 'test' else 'trainval'}/{urllib.parse.quote(name)}", f"videos/{name}")
    def predicted(self) -> list[Source]: return [Source(f"{self.boxes}/{name}", f"boxes/{name}") for name in PREDICTED]
    def tables(self) -> Source: return Source(f"{self.kinetics}/ava_kinetics_v1_0.tar.gz", "ava_kinetics_v1_0.tar.gz")


# --- One file ---

def refuse_page(start: bytes, total: int | None, url: str):
    "Raises BadInput if what comes is a web page or nothing, before anything is overwritten with it."
    if start.lstrip()[:1] == b"<" or total == 0:
        raise BadInput(f"{url}: what comes starts with {start!r} (a web page?); {downloads.BROWSER}")


def read_checksums(folder: Path) -> dict[str, str]:
    "{place: MD5} as recorded; raises BadInput for a line that is none."
    path = folder / CHECKSUMS
    lines = path.read_text().splitlines() if path.exists() else []
    for n, line in enumerate(lines, 1):
        if not re.fullmatch(r"[0-9a-f]{32}  \S.*", line): raise BadInput(f"{path}, line {n}: {line[:80]!r} came, an MD5, two spaces and a file are needed; repair or delete the line")
    return {line[34:]: line[:32] for line in lines}


def record(folder: Path, place: str, md5: str):
    "Adds a file to the recorded checksums."
    known = read_checksums(folder) | {place: md5}
    with replacing(folder / CHECKSUMS) as file: file.writelines(f"{md5}  {place}\n" for place, md5 in sorted(known.items()))


def obtain(source: Source, folder: Path) -> Path:  # where it is
    "Downloads a file, unless it is there; raises BadInput if it cannot be had, or is not what was recorded."
    path = folder / source.place
    part = path.with_name(f"{path.name}.part")
    if size_of(path): return path
    say(f"downloading {source.url}")
    try: download(source.url, part, refuse_page)
    except BadInput as error: raise BadInput(str(error).replace(downloads.BROWSER, f"get it with a browser and put it to {path}")) from error
    md5, known = md5_of(part), read_checksums(folder).get(source.place)
    if known not in (None, md5):
        raise BadInput(f"{part} ({size_of(part):,} bytes) has MD5 {md5}, {folder / CHECKSUMS} has {known} for {source.place}: it changed or is damaged; "
                       f"delete {part} to download it again, or the line in {CHECKSUMS} to believe it")
    os.replace(part, path)
    if known is None: record(folder, source.place, md5)
    return path


def install(archive: Path, target: Path, needed: tuple[str, ...]):
    "Puts the files of an archive into one folder, those that are needed last; raises BadInput if one of them is not in it."
    with unpacked(archive, target.with_name(f".{target.name}.unpacking")) as folder:
        files = {path.name: path for path in sorted(folder.rglob("*")) if path.is_file()}
        lost = [name for name in needed if not size_of(files.get(name, folder / name))]
        if lost: raise BadInput(f"{archive}: {', '.join(lost)} not in it; delete it to download it again")
        target.mkdir(parents=True, exist_ok=True)
        for name in sorted(files, key=lambda name: name in needed): os.replace(files[name], target / name)


def is_there(folder: Path, names: tuple[str, ...]) -> bool: return all(size_of(folder / name) for name in names)


# --- Films ---

def wanted_films(folder: Path, sources: Sources, subset: str, only: list[str]) -> list[str]:
    "File names of the films to fetch; raises BadInput if a list is odd or does not have one of `only`."
    listing = obtain(sources.films(subset), folder)
    names = [line.strip() for line in listing.read_text(errors="replace").splitlines() if line.strip()]
    for n, name in enumerate(names, 1):
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}\.[A-Za-z0-9]{1,8}", name):
            raise BadInput(f"{listing}, line {n}: {name[:80]!r} is no plain file name; delete the file to download it again")
    ids = {name.rsplit(".", 1)[0]: name for name in names}
    if subset in ("train", "val"):
        table = folder / "annotations" / f"ava_{subset}_v2.2.csv"
        if not table.is_file(): raise BadInput(f"{table} is not there, it says which films are in {subset}; fetch annotations first")
        inside = {fields[0] for _, fields in numbered_rows(table)}
        ids = {id: name for id, name in ids.items() if id in inside}
    for id in only:
        if id not in ids: raise BadInput(f"--only {id}: not among the {len(ids)} films of {subset}; give an id of {listing}")
    return [ids[id] for id in only] if only else list(ids.values())


def fetch_films(folder: Path, sources: Sources, subset: str, only: list[str]) -> dict[str, str]:  # {file: why it is missing}
    "Downloads films one by one; one that fails is left, three in a row end it. Raises BadInput for the list of films."
    names, lost, in_a_row = wanted_films(folder, sources, subset, only), {}, 0
    with progress("films", len(names), " films") as bar:
        for i, name in enumerate(names):
            try:
                obtain(sources.film(name, subset), folder)
                in_a_row = 0
            except BadInput as error:
                in_a_row, lost[name] = in_a_row + 1, str(error)
                say(lost[name])
            bar.update()
            if in_a_row == GIVE_UP:
                rest = [name for name in names[i + 1:] if not size_of(folder / "videos" / name)]
                return lost | {name: f"not tried, after {GIVE_UP} in a row failed" for name in rest}
    return lost


# --- The Kinetics part of AVA-Kinetics ---

@dataclass(frozen=True)
class Clip:
    "A key frame of a Kinetics video, and what has to be seen around it; seconds since the video's start."
    video: str
    second: float
    subset: str
    margin: float

    @property
    def start(self) -> float: return max(0., self.second - self.margin)
    @property
    def end(self) -> float: return self.second + self.margin
    def row(self) -> list[str]: return [self.video, f"{self.second:.6f}", f"{self.start:.6f}", f"{self.end:.6f}", self.subset]


@dataclass(frozen=True)
class File:
    "A file of a Kinetics copy: a clip of a video, or all of it."
    path: Path
    start: float
    end: float


HEAD = ["youtube_id", "second", "time_start", "time_end", "subset"]
NAME = re.compile(r"(.{11})(?:_(\d{6})_(\d{6}))?")


def read_clips(folder: Path, margin: float) -> list[Clip]:
    "Every key frame of the tables once; raises BadInput naming file and row."
    found = {}
    for subset, name in KINETICS_FILES.items():
        path = folder / name
        for n, fields in numbered_rows(path) if path.is_file() else ():
            try: second = float(fields[1])
            except (ValueError, IndexError): second = math.nan
            if not fields[0].strip() or not 0 <= second < math.inf:
                raise BadInput(f"{path}, row {n}: {','.join(fields)[:80]!r} came, a video and a second are needed; delete the file to unpack it again")
            found.setdefault((fields[0], second), Clip(fields[0], second, subset, margin))
    return list(found.values())


def write_rows(path: Path, head: list[str], rows: list[list[str]]):
    with replacing(path, newline="") as file: csv.writer(file, lineterminator="\n").writerows([head, *rows])


def kinetics_files(kinetics: Path) -> dict[str, list[File]]:
    "The files of a Kinetics copy by video."
    files = {}
    for place, _, names in os.walk(kinetics):
        for name in sorted(names):
            match = NAME.fullmatch(Path(name).stem)
            if match: files.setdefault(match[1], []).append(File(Path(place, name), float(match[2] or 0), float(match[3] or math.inf)))
    return files


def file_for(clip: Clip, files: list[File]) -> tuple[File | None, str]:
    "The file that shows most around the key frame, or why there is none."
    spare = lambda file: min(clip.second - file.start, file.end - clip.second)
    inside = [file for file in files if spare(file) >= 0]
    whole = [file for file in inside if size_of(file.path)]
    if whole: return max(whole, key=spare), ""
    return None, "the file is empty" if inside else "other seconds of the video" if files else "no such video"


def compare(clips: list[Clip], kinetics: Path, folder: Path) -> int:  # missing clips
    "Says which clips a Kinetics copy has, on the screen and in two files; raises BadInput if there is no such folder."
    if not kinetics.is_dir(): raise BadInput(f"--kinetics {kinetics}: no such folder; give the folder that holds your Kinetics videos")
    files, found, missing, near = kinetics_files(kinetics), [], [], 0
    for clip in clips:
        file, why = file_for(clip, files.get(clip.video, []))
        if file is None: missing.append([*clip.row(), why])
        else:
            near += file.start > clip.start or file.end < clip.end
            found.append([*clip.row(), str(file.path.relative_to(kinetics)), f"{clip.second - file.start:.6f}"])
    write_rows(folder / "clips_found.csv", [*HEAD, "file", "offset"], found)
    write_rows(folder / "clips_missing.csv", [*HEAD, "reason"], missing)
    print(f"kinetics: {len(found):,} of {len(clips):,} clips are in {kinetics}" + (f", {near:,} of them shorter than asked around the key frame" if near else "")
          + f"; listed in {folder / 'clips_found.csv'}")
    for reason, n in Counter(row[-1] for row in missing).most_common(): print(f"kinetics: {n:,} clips are missing ({reason})")
    if missing: print(f"kinetics: every missing clip is listed in {folder / 'clips_missing.csv'}")
    return len(missing)


# --- All of it ---

def plan(parts: list[str], sources: Sources, subset: str, only: list[str], folder: Path) -> list[str]:
    "What would be fetched, a line each."
    lines = []
    def show(source, room="", needed=()):
        there = is_there(folder / room, needed) if room else size_of(folder / source.place)
        lines.append(f"{'there already' if there else 'would fetch'}: {source.url} -> {folder / source.place}" + (f", unpacked to {folder / room}" if room else ""))
    if "annotations" in parts:
        show(sources.annotations(), "annotations", ANNOTATED)
        show(sources.films("trainval"))
    for source in sources.predicted() if "boxes" in parts else (): show(source)
    if "kinetics" in parts: show(sources.tables(), "kinetics", TABLES)
    if "videos" in parts:
        listing = sources.films(subset)
        try: names = wanted_films(folder, sources, subset, only) if size_of(folder / listing.place) else None
        except BadInput as error: names = say(f"note: {error}")
        if names is None:
            if "annotations" not in parts or subset == "test": show(listing)
            chosen = " ".join(only) or f"the {FILMS[subset]} films"
            lines.append(f"would fetch: {chosen} of {subset} from {sources.film('', subset).url} -> {folder / 'videos'}")
        for name in names or (): show(sources.film(name, subset))
    return lines


def fetch(parts: list[str], folder: Path, sources: Sources, subset: str, only: list[str], kinetics: Path | None, margin: float) -> int:  # exit code
    "Fetches the parts and reports; raises ValueError."
    lost = {}
    if "annotations" in parts:
        if not is_there(folder / "annotations", ANNOTATED): install(obtain(sources.annotations(), folder), folder / "annotations", ANNOTATED)
        obtain(sources.films("trainval"), folder)
    for source in sources.predicted() if "boxes" in parts else (): obtain(source, folder)
    if "kinetics" in parts and not is_there(folder / "kinetics", TABLES): install(obtain(sources.tables(), folder), folder / "kinetics", TABLES)
    if "videos" in parts: lost = fetch_films(folder, sources, subset, only)
    return report(folder, lost, kinetics, margin)


def report(folder: Path, lost: dict[str, str], kinetics: Path | None, margin: float) -> int:  # exit code
    "Says what is there and names what is missing."
    count = lambda name: sum(1 for path in (folder / name).iterdir() if path.is_file() and path.suffix != ".part") if (folder / name).is_dir() else 0
    print(f"annotations: {'there' if is_there(folder / 'annotations', ANNOTATED) else 'not complete'}, {count('annotations')} files in {folder / 'annotations'}")
    print(f"boxes: {sum(size_of(folder / 'boxes' / name) > 0 for name in PREDICTED)} of {len(PREDICTED)} files in {folder / 'boxes'}")
    print(f"videos: {count('videos'):,} films in {folder / 'videos'}")
    for name, why in list(lost.items())[:SHOWN]: print(f"missing: {name} ({why})")
    if len(lost) > SHOWN: print(f"missing: {len(lost) - SHOWN:,} more")
    clips = read_clips(folder / "kinetics", margin)
    if kinetics and not clips: raise BadInput(f"--kinetics {kinetics} came, but {folder / 'kinetics'} has no tables; fetch the part kinetics with it")
    if not clips: return MISSING if lost else DONE
    write_rows(folder / "kinetics" / "clips.csv", HEAD, [clip.row() for clip in clips])
    print(f"kinetics: {len(clips):,} clips of {len({clip.video for clip in clips}):,} videos are needed; listed in {folder / 'kinetics' / 'clips.csv'}")
    missing = compare(clips, kinetics, folder / "kinetics") if kinetics else 0
    return MISSING if lost or missing else DONE


def verify(folder: Path) -> int:  # exit code
    "Compares what is there with its recorded checksums; what has none gets one. Raises BadInput for a damaged list."
    known, changed, n = read_checksums(folder), [], 0
    here = [path.relative_to(folder).as_posix() for pattern in ("*", "boxes/*", "videos/*") for path in folder.glob(pattern) if path.is_file() and path.suffix != ".part"]
    places = sorted({*here, *(place for place in known if (folder / place).is_file())} - {CHECKSUMS})
    for place in places:
        md5, n = md5_of(folder / place), n + 1
        if place not in known: record(folder, place, md5)
        elif known[place] != md5: changed.append(f"changed: {place} has MD5 {md5}, {known[place]} was recorded; delete it and fetch it again")
    print(f"checksums: {n - len(changed):,} of {n:,} files are as recorded in {folder / CHECKSUMS}" + (f" ({len(set(places) - set(known)):,} recorded now)" if set(places) - set(known) else ""))
    for line in changed: print(line)
    return MISSING if changed else DONE


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="fetch_ava.py", description=__doc__, epilog=PARTS, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("parts", metavar="PART", nargs="*", help="annotations, boxes, videos, kinetics: any of them")
    found.add_argument("--data", type=Path, default=Path("data"), help="folder for everything (default: data)")
    found.add_argument("--subset", choices=list(FILMS), default="trainval", help="which films (default: trainval)")
    found.add_argument("--only", nargs="+", default=[], metavar="ID", help="of these films only those")
    found.add_argument("--kinetics", type=Path, metavar="FOLDER", help="your own copy of Kinetics, to be compared with the clips that are needed")
    found.add_argument("--margin", type=float, default=1.5, metavar="S", help="seconds to be seen on either side of a Kinetics key frame (default: 1.5; the models look at 1.07)")
    found.add_argument("--mirror", metavar="URL", help="an address with annotations/, trainval/, test/, the boxes and the archive of AVA-Kinetics below it")
    found.add_argument("--dry-run", action="store_true", help="say what would be fetched, and fetch nothing")
    found.add_argument("--verify", action="store_true", help="compare what is there with its recorded checksums")
    return found


def spaced(arguments: list[str]) -> list[str]:
    "Film ids may begin with a dash; argparse would take them for options."
    return [f" {word}" if re.fullmatch(r"-[A-Za-z0-9_-]{10}", word) else word for word in arguments]   # no option has eleven letters


def work(options: argparse.Namespace) -> int:  # exit code
    "What the command line asks for; raises ValueError."
    known = ("annotations", "boxes", "videos", "kinetics")
    parts, only, folder = [part.strip() for part in options.parts], [id.strip() for id in options.only], options.data / "ava"
    for part in parts:
        if part not in known: raise BadInput(f"PART {part}: there is no such part; give {', '.join(known)}")
    if not 0 <= options.margin < math.inf: raise BadInput(f"--margin {options.margin}: a number of seconds from 0 is needed")
    check_folder(folder, "DATA")
    sources = Sources(*[options.mirror.rstrip("/")] * 3) if options.mirror else Sources()
    if options.dry_run:
        print("\n".join(plan(parts or list(known), sources, options.subset, only, folder)))
        return DONE
    if options.verify: return verify(folder)
    return fetch(parts, folder, sources, options.subset, only, options.kinetics, options.margin)


def main(arguments: list[str] | None = None) -> int:  # exit code
    options = parser().parse_args(spaced(sys.argv[1:] if arguments is None else arguments))
    return run("fetch_ava", lambda: work(options), options.data, ValueError)


if __name__ == "__main__":
    sys.exit(main())
