#!/usr/bin/env python
"""Turn UCI's smartphone recordings (HAPT) into features and one JSON.

SOURCE is hapt.zip as UCI distributes it, or a folder with the same files unpacked.
Without SOURCE the archive is downloaded to OUT/hapt.zip (a broken download goes on where it stopped) and verified.

OUT/features/exp01_user01.npy   float32 [T, 300]: windows of 50 samples every 25, x y z of the acceleration (g),
                                then x y z of the angular velocity (rad/s), 50 numbers each; nothing is normalised
OUT/annotations.json            classes, UCI's split by subject and all segments in seconds (ActivityNet layout)
"""
import argparse
import hashlib
import io
import json
import os
import re
import shutil
import sys
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import numpy as np

from command_line import DONE, BadInput, check_folder, progress, run
from downloads import CutOff, download, open_zip, read_member

URL = "https://archive.ics.uci.edu/static/public/341/smartphone+based+recognition+of+human+activities+and+postural+transitions.zip"
LICENCE = ("The recordings are UCI's, not ours: not for commercial use; cite Reyes-Ortiz et al., Transition-Aware Human Activity "
           "Recognition Using Smartphones, Neurocomputing 2015.")
EXAMPLES = """examples:
  python data_scripts/prepare_hapt.py ../shared/data/hapt.zip data/hapt    from an archive (or an unpacked folder)
  python data_scripts/prepare_hapt.py data/hapt                            download from UCI first

""" + LICENCE

FPS, STRIDE, WINDOW = 50, 25, 50
COLUMNS = ("acc_x", "acc_y", "acc_z", "gyro_x", "gyro_y", "gyro_z")
CHANNELS = len(COLUMNS)
LABELS, CLASSES = "RawData/labels.txt", "activity_labels.txt"
SUBJECTS = {"train": "Train/subject_id_train.txt", "test": "Test/subject_id_test.txt"}
SENSOR = re.compile(r"RawData/(acc|gyro)_exp(\d+)_user(\d+)\.txt")
MEMBER_LIMIT = 512 * 2**20   # bytes; the largest real member has 2 MB, a nested archive 80 MB

# What UCI distributes: SHA-256 of every number in RawData (see `read_content`) and {subset: (recordings, segments)}.
UCI_SHA256 = "d73e1575b8874e4766487ca70dae220203bf9b6b48c9f03f4b216c9c9c57e558"
UCI_COUNTS = {"train": (42, 849), "test": (19, 365)}


# --- Source: an archive or a folder becomes {name: function that reads it}, names relative to the data's root ---

def zip_roots(
    archive: zipfile.ZipFile,
    called: str,
    nested: bool = True,  # look into archives inside the archive too?
) -> list:                # [(archive, folder of the data in it, name in messages)]
    "Every place in an archive that holds RawData/labels.txt."
    names = [name for name in archive.namelist() if not name.startswith("__MACOSX/")]
    roots = [(archive, name.removesuffix(LABELS), called) for name in names if f"/{name}".endswith(f"/{LABELS}")]
    if roots or not nested: return roots
    for name in (name for name in names if name.lower().endswith(".zip")):
        inner = f"{called}/{name}"
        roots += zip_roots(open_zip(io.BytesIO(read_member(archive, name, called, MEMBER_LIMIT)), inner), inner, nested=False)
    return roots


def one_root(roots: list, called: str):
    "The only place with RawData/labels.txt; raises BadInput if there is none or more than one."
    if not roots:
        raise BadInput(f"{called}: no {LABELS} in it; give hapt.zip as UCI distributes it, or the folder that contains RawData/")
    if len(roots) > 1:
        raise BadInput(f"{called}: {len(roots)} copies of {LABELS} in it, one is needed; give the one that you mean")
    return roots[0]


def zip_files(path: Path) -> dict[str, Callable[[], bytes]]:
    "The files of an archive by their name under the data's root, wherever in the archive that is."
    archive, root, called = one_root(zip_roots(open_zip(path, str(path)), str(path)), str(path))
    return {name.removeprefix(root): lambda name=name: read_member(archive, name, called, MEMBER_LIMIT)
            for name in archive.namelist() if name.startswith(root) and not name.endswith("/")}


def folder_files(path: Path) -> dict[str, Callable[[], bytes]]:
    "The files of an unpacked folder by their name under the data's root: the folder itself or one below it."
    roots = [path] if (path / LABELS).is_file() else sorted(found.parent.parent for found in path.glob(f"*/{LABELS}"))
    root = one_root(roots, str(path))
    return {file.relative_to(root).as_posix(): file.read_bytes for file in root.rglob("*.txt") if file.is_file()}


def source_files(path: Path) -> dict[str, Callable[[], bytes]]:
    "{name: function that reads it} of an archive or a folder; raises BadInput if a needed file is missing."
    if not path.exists():
        raise BadInput(f"{path}: no such file or folder; give hapt.zip or its unpacked folder, or leave SOURCE out to download it")
    files = folder_files(path) if path.is_dir() else zip_files(path)
    missing = next((name for name in (CLASSES, *SUBJECTS.values()) if name not in files), None)
    if missing:
        raise BadInput(f"{path}: {missing} is missing beside RawData/; it is part of what UCI distributes, unpack or download all of it again")
    return files


# --- Content: text to numbers, numbers to recordings and segments ---

def read_samples(
    text: str,
    name: str, # of the file, for messages
) -> np.ndarray:  # [samples, 3] float64
    "The three numbers of every line. np.loadtxt is as fast here as anything that also notices a damaged line."
    if not text.strip(): raise BadInput(f"{name}: the file is empty, three numbers per line are needed; unpack or download it again")
    try:
        samples = np.loadtxt(io.StringIO(text), comments=None, ndmin=2)
        if samples.shape == (text.rstrip().count("\n") + 1, 3) and (np.abs(samples) < 3e38).all(): return samples
        raise ValueError("not three finite numbers on every line")
    except ValueError as error:
        raise BadInput(f"{name}{bad_line(text) or f': {error}'}; three finite numbers per line are needed, unpack or download it again") from None


def bad_line(text: str) -> str:
    "Where the first line is that does not hold three finite numbers, and what it holds; empty if there is none."
    for number, line in enumerate(text.rstrip().split("\n"), 1):
        try: good = [abs(float(token)) < 3e38 for token in line.split()] == [True] * 3
        except ValueError: good = False
        if not good: return f", line {number}: {line.strip()[:60]!r} came"
    return ""


def read_integers(
    text: str,
    name: str,
    columns: int,
) -> list[tuple[int, list[int]]]:  # (line number, its numbers) for every line that is not blank
    "A small table of whole numbers; raises BadInput with the line that is none."
    rows = []
    for number, tokens in enumerate(map(str.split, text.splitlines()), 1):
        if not tokens: continue
        if len(tokens) != columns or not all(token.isascii() and token.isdecimal() for token in tokens):
            raise BadInput(f"{name}, line {number}: {' '.join(tokens)[:60]!r} came, {columns} whole number{'s' * (columns > 1)} "
                           "per line needed; correct the line, or unpack or download the file again")
        rows.append((number, [int(token) for token in tokens]))
    if not rows: raise BadInput(f"{name}: the file is empty; unpack or download it again")
    return rows


def read_classes(text: str) -> list[str]:  # names in UCI's order: label_id is the id of UCI less 1
    "The activities of activity_labels.txt; raises BadInput unless the ids are 1, 2, 3 ... and no name comes twice."
    rows = [line.split() for line in text.splitlines() if line.strip()]
    names = [row[-1] for row in rows]
    if not rows or [row[:-1] for row in rows] != [[str(i + 1)] for i in range(len(rows))] or len(set(names)) < len(names):
        raise BadInput(f"{CLASSES}: {text[:60]!r}... came, lines '1 NAME', '2 NAME', ... with different names are needed; unpack or download it again")
    return names


def sensor_pairs(files: dict) -> dict[tuple[int, int], tuple[str, str]]:  # {(experiment, user): (acc file, gyro file)}
    "Which acceleration belongs to which angular velocity; raises BadInput if one of the two is missing."
    found = {}
    for name in sorted(files):
        if match := SENSOR.fullmatch(name):
            pair = found.setdefault((int(match[2]), int(match[3])), {})
            if match[1] in pair: raise BadInput(f"{name} and {pair[match[1]]} are the same recording; remove one of them")
            pair[match[1]] = name
    for pair in found.values():
        if len(pair) < 2:
            name = next(iter(pair.values()))
            raise BadInput(f"{name} has no {'gyro' if 'acc' in pair else 'acc'} file beside it, both are needed; unpack or download the data again")
    if not found: raise BadInput("no RawData/acc_expXX_userYY.txt in the source; unpack or download the data again")
    return {key: (pair["acc"], pair["gyro"]) for key, pair in sorted(found.items())}


def recording_id(experiment: int, user: int) -> str:
    return f"exp{experiment:02d}_user{user:02d}"


def join_sensors(
    acc: np.ndarray,   # [samples, 3] g
    gyro: np.ndarray,  # [samples, 3] rad/s
    names: tuple[str, str],
) -> np.ndarray:       # [samples, 6] float32
    "Both sensors side by side; raises BadInput if one is longer, or shorter than a window."
    if len(acc) != len(gyro):
        raise BadInput(f"{names[0]} has {len(acc)} samples but {names[1]} has {len(gyro)}, equally many are needed; unpack or download them again")
    if len(acc) < WINDOW:
        raise BadInput(f"{names[0]} has {len(acc)} samples, at least {WINDOW} (one window) are needed; remove this experiment or download it again")
    return np.concatenate([acc, gyro], 1, dtype=np.float32)


def read_split(files: dict) -> dict[int, str]:  # {user: "train" or "test"}
    "UCI's split by subject; raises BadInput if a subject is on both sides."
    users = {subset: {row[0] for _, row in read_integers(text_of(files, name), name, 1)} for subset, name in SUBJECTS.items()}
    both = sorted(users["train"] & users["test"])
    if both:
        raise BadInput(f"subject {both[0]} is in {SUBJECTS['train']} and in {SUBJECTS['test']}, one is needed; unpack or download both again")
    return {user: subset for subset in users for user in users[subset]}


def annotation(
    row: list[int],                         # experiment, user, activity, first and last sample (1-based, inclusive)
    lengths: dict[tuple[int, int], int],    # samples of every recording
    classes: list[str],
    where: str,                             # file and line, for messages
) -> dict:                                  # {"label", "label_id", "segment" in seconds}
    "One row of labels.txt as a segment; raises BadInput if it lies outside its recording or is reversed."
    experiment, user, activity, first, last = row
    came, samples = f"{where}: {' '.join(map(str, row))!r}", lengths.get((experiment, user))
    if samples is None:
        raise BadInput(f"{came} labels experiment {experiment} of user {user}, but RawData has no such recording; remove the row or add the files")
    if not 1 <= activity <= len(classes):
        raise BadInput(f"{came} has activity {activity}, 1 to {len(classes)} are known from {CLASSES}; correct the row")
    if last < first:
        raise BadInput(f"{came} is reversed: sample {first} to {last}, first <= last is needed; correct the row or remove it")
    if first < 1 or last > samples:
        raise BadInput(f"{came} lies outside its recording: sample {first} to {last} of 1 to {samples}; correct the row or remove it")
    return {"label": classes[activity - 1], "label_id": activity - 1, "segment": [(first - 1) / FPS, last / FPS]}


def text_of(files: dict, name: str) -> str:
    return files[name]().decode("utf-8", "replace")


@dataclass(frozen=True)
class Content:
    "Everything that is written, still in memory."
    samples: dict[str, np.ndarray]  # {id: [samples, 6] float32}
    database: dict[str, dict]       # {id: subset, duration, fps, annotations}
    classes: list[str]
    sha256: str                     # over every number in RawData

    def counts(self) -> dict[str, tuple[int, int]]:
        "{subset: (recordings, segments)}"
        entries = [(entry["subset"], len(entry["annotations"])) for entry in self.database.values()]
        return {subset: (sum(s == subset for s, _ in entries), sum(n for s, n in entries if s == subset)) for subset in SUBJECTS}


def read_sensors(files: dict, digest) -> dict[tuple[int, int], np.ndarray]:  # {(experiment, user): [samples, 6] float32}
    "All recordings. `digest` gets every file's name and numbers (float64), in the order of the names."
    pairs, samples = sensor_pairs(files), {}
    with progress("reading", 2 * len(pairs), " files") as bar:
        for name in sorted(sum(pairs.values(), ())):
            samples[name] = read_samples(text_of(files, name), name)
            digest.update(name.encode() + np.ascontiguousarray(samples[name], "<f8").tobytes())
            bar.update()
    return {key: join_sensors(*(samples[name] for name in names), names) for key, names in pairs.items()}


def read_content(files: dict[str, Callable[[], bytes]]) -> Content:
    "Recordings, segments and split of the files; raises BadInput for whatever does not fit together."
    classes, split, digest = read_classes(text_of(files, CLASSES)), read_split(files), hashlib.sha256()
    rows = read_integers(text_of(files, LABELS), LABELS, 5)
    samples = read_sensors(files, digest)
    digest.update(LABELS.encode() + np.array([row for _, row in rows], "<i8").tobytes())
    lost = next((key for key in samples if key[1] not in split), None)
    if lost:
        raise BadInput(f"subject {lost[1]} (recording {recording_id(*lost)}) is in neither {SUBJECTS['train']} nor {SUBJECTS['test']}; "
                       "add it to one of them, or unpack or download both again")
    lengths = {key: len(recording) for key, recording in samples.items()}
    database = {recording_id(*key): {"subset": split[key[1]], "duration": lengths[key] / FPS, "fps": FPS, "annotations": []} for key in samples}
    for number, row in rows:
        found = annotation(row, lengths, classes, f"{LABELS}, line {number}")
        database[recording_id(row[0], row[1])]["annotations"].append(found)
    return Content({recording_id(*key): recording for key, recording in samples.items()}, database, classes, digest.hexdigest())


def difference(content: Content) -> str | None:
    "How the content differs from what UCI distributes; None if it is the same."
    if content.counts() != UCI_COUNTS:
        came, needed = (", ".join(f"{subset} {n} recordings and {m} segments" for subset, (n, m) in counts.items())
                        for counts in (content.counts(), UCI_COUNTS))
        return f"{came} came, UCI distributes {needed}"
    if content.sha256 != UCI_SHA256:
        return f"the numbers in RawData have SHA-256 {content.sha256[:16]}..., UCI's have {UCI_SHA256[:16]}..."
    return None


# --- Download: to OUT/hapt.zip, through hapt.zip.part ---

def download_archive(url: str, out: Path) -> Path:  # the archive
    "UCI's archive in OUT, whole: every member fits its CRC. What is damaged is deleted, what is only cut off is kept."
    archive, part = out / "hapt.zip", out / "hapt.zip.part"
    if archive.exists():
        print(f"using {archive}, downloaded earlier (delete it to download it again)", file=sys.stderr)
        return archive
    print(f"downloading {url}\n{LICENCE}", file=sys.stderr)
    complete = download(url, part)
    try: check_archive(part)
    except BadInput as error:
        cut_off = not complete and isinstance(error, CutOff)
        if not cut_off: part.unlink()
        raise BadInput(f"{error} (run the same command again to {'go on' if cut_off else 'download it anew, what came is deleted'})") from error
    os.replace(part, archive)
    return archive


def check_archive(path: Path):
    "Raises BadInput unless every member of the archive can be read and fits its CRC."
    with open_zip(path, str(path)) as archive, progress("testing", len(archive.namelist()), " members") as bar:
        for name in archive.namelist():
            read_member(archive, name, str(path), MEMBER_LIMIT)
            bar.update()


# --- Output: all of it under temporary names first, the JSON last ---

def as_json(content: Content) -> dict:
    "annotations.json, in the ActivityNet layout."
    from actloc.data.sensors import window_header

    features = dict(folder="features", suffix=".npy", layout="TC", fps=FPS, stride=STRIDE, num_frames=WINDOW, channels=CHANNELS * WINDOW,
                    header=window_header(COLUMNS, FPS, WINDOW, STRIDE).as_dict())
    return {"version": "UCI HAPT 2.1", "classes": content.classes, "features": features, "database": content.database}


def write(content: Content, out: Path) -> int:  # steps over all recordings
    "Features and JSON. Killed at any moment, OUT holds the old data set, the new one, or none (no annotations.json)."
    from actloc.data.sensors import windows

    partial, steps, bar = out / ".partial", 0, progress("writing", len(content.samples), " recordings")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        for folder in (partial, out / "features"): folder.mkdir(parents=True, exist_ok=True)
        for name, samples in content.samples.items():
            features = windows(samples, WINDOW, STRIDE).T
            np.save(partial / f"{name}.npy", features)
            steps += len(features)
            bar.update()
        (partial / "annotations.json").write_text(json.dumps(as_json(content), indent=1) + "\n", encoding="utf-8")
        (out / "annotations.json").unlink(missing_ok=True)
        for name in content.samples: os.replace(partial / f"{name}.npy", out / "features" / f"{name}.npy")
        os.replace(partial / "annotations.json", out / "annotations.json")
    finally:
        bar.close()
        shutil.rmtree(partial, ignore_errors=True)
    return steps


def check_out(out: Path, has_source: bool):
    "Raises BadInput, before any work, if OUT cannot become a folder with our files, or looks like a forgotten OUT."
    if not has_source and (out.suffix == ".zip" or (out / LABELS).exists()):
        raise BadInput(f"{out} looks like a SOURCE and OUT is missing; for example: prepare_hapt.py {out} data/hapt")
    check_folder(out)


def prepare(source: Path | None, out: Path, url: str = URL, verify: bool = True) -> str:  # the closing line
    "From SOURCE (or the download) to OUT; raises BadInput."
    began = time.perf_counter()
    check_out(out, source is not None)
    path = source or download_archive(url, out)
    content = read_content(source_files(path))
    wrong = difference(content) if verify else None
    if wrong and source is None:
        raise BadInput(f"{path}: {wrong}; delete it to download it again, or add --no-verify to use it as it is")
    if wrong: print(f"note: this is not UCI's own data: {wrong}", file=sys.stderr)
    steps, counts = write(content, out), content.counts()
    recordings, segments = (", ".join(f"{counts[subset][i]} {subset}" for subset in counts) for i in (0, 1))
    return (f"{out}: {len(content.samples)} recordings ({recordings}), {sum(n for _, n in counts.values())} segments ({segments}), "
            f"{steps:,} steps of {CHANNELS * WINDOW} numbers in {time.perf_counter() - began:.1f} s" + ("" if wrong or not verify else ", as UCI distributes it"))


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SOURCE", nargs="?", type=Path, help="hapt.zip or its unpacked folder; left out: download from UCI")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder for features/ and annotations.json; what is there is overwritten")
    parser.add_argument("--url", default=URL, help="download from here instead (a mirror)")
    parser.add_argument("--no-verify", action="store_true", help="use a download whose content is not the one known from UCI, too")
    return parser


def main(arguments: list[str] | None = None) -> int:  # exit code: 0 done, 2 refused, 130 interrupted
    "The command line: one closing line, or one sentence about what went wrong."
    options = parser().parse_args(arguments)
    def work() -> int:
        print(prepare(options.source, options.out, options.url, not options.no_verify))
        return DONE
    return run("prepare_hapt", work, options.out)


if __name__ == "__main__":
    sys.exit(main())
