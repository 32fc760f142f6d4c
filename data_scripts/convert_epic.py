#!/usr/bin/env python
"""EPIC-Kitchens 100: the official CSVs become one annotation file for verbs and one for nouns (ActivityNet layout).

SOURCE is a folder with files of github.com/epic-kitchens/epic-kitchens-100-annotations:
  EPIC_100_train.csv, EPIC_100_validation.csv (one of them is enough; which are missing is said)
  EPIC_100_video_info.csv (durations, fps), EPIC_100_verb_classes.csv, EPIC_100_noun_classes.csv

OUT/epic_kitchens_100_verb.json and OUT/epic_kitchens_100_noun.json:
  {"classes": [names by label_id], "database": {video: {"subset", "duration", "fps", "annotations": [{"label", "label_id", "segment"}]}}}
Segments are the CSVs' seconds, unchanged, ordered by time. Rows that cannot be used are left out, each named with its reason.

example:
  python data_scripts/convert_epic.py ~/epic-kitchens-100-annotations data/epic_kitchens/annotations
"""
import argparse
import csv
import io
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from actloc.core.files import read_bytes, replacing

from command_line import DONE, BadInput, check_folder, progress, run, say

SPLITS = {"training": "EPIC_100_train.csv", "validation": "EPIC_100_validation.csv"}
INFO = "EPIC_100_video_info.csv"
TASKS = ("verb", "noun")
TIME = re.compile(r"(\d+):(\d\d):(\d\d(?:\.\d+)?)")
AGAIN = "get it again from github.com/epic-kitchens/epic-kitchens-100-annotations"


@dataclass(frozen=True)
class Row:
    "One line of a CSV."
    cells: dict[str, str]
    where: str             # file and line, for messages

    def whole_number(self, name: str) -> int:
        "A cell that counts; raises BadInput."
        text = self.cells[name]
        if not (text.isascii() and text.isdecimal()): raise BadInput(f"{self.where}: {name} is {text!r}, a whole number is needed; {AGAIN}")
        return int(text)

    def positive(self, name: str) -> float:
        "A cell that measures; raises BadInput."
        try: value = float(self.cells[name])
        except ValueError: value = float("nan")
        if not 0 < value < float("inf"): raise BadInput(f"{self.where}: {name} is {self.cells[name]!r}, a positive number is needed; {AGAIN}")
        return value

    def seconds(self, name: str) -> float:
        "A time of day in seconds; raises BadInput."
        match = TIME.fullmatch(self.cells[name])
        if not match: raise BadInput(f"{self.where}: {name} is {self.cells[name]!r}, HH:MM:SS.ss is needed; {AGAIN}")
        return round(3600 * int(match[1]) + 60 * int(match[2]) + float(match[3]), 3)


def read_table(path: Path, columns: tuple[str, ...]) -> list[Row]:
    "The rows of a CSV; raises BadInput for a missing column, a short row or an empty file."
    try: text = read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error: raise BadInput(f"{path}: not text in UTF-8 ({error}); {AGAIN}") from None
    reader = csv.DictReader(io.StringIO(text, newline=""))
    lost = [name for name in columns if name not in (reader.fieldnames or ())]
    if lost: raise BadInput(f"{path}: column {', '.join(lost)} is missing, the first line has {', '.join(reader.fieldnames or ['nothing'])[:120]}; {AGAIN}")
    rows = [Row(cells, f"{path}, line {reader.line_num}") for cells in reader]
    for row in rows:
        if None in row.cells or None in row.cells.values(): raise BadInput(f"{row.where}: {len(reader.fieldnames)} cells are needed (is the file cut off?); {AGAIN}")
    if not rows: raise BadInput(f"{path}: no rows below the first line; {AGAIN}")
    return rows


def read_classes(path: Path) -> list[str]:  # names by number
    "The classes of a task; raises BadInput unless the ids are 0, 1, 2, ... and no name comes twice."
    names = {}
    for row in read_table(path, ("id", "key")):
        number, name = row.whole_number("id"), row.cells["key"]
        if number != len(names) or name in names.values(): raise BadInput(f"{row.where}: class {number} {name!r} came, number {len(names)} with a new name is needed; {AGAIN}")
        names[number] = name
    return list(names.values())


def read_videos(path: Path) -> dict[str, dict]:  # {video: duration and fps}
    "How long videos last; raises BadInput if one comes twice."
    videos = {}
    for row in read_table(path, ("video_id", "duration", "fps")):
        if row.cells["video_id"] in videos: raise BadInput(f"{row.where}: video {row.cells['video_id']} comes twice; {AGAIN}")
        videos[row.cells["video_id"]] = {"duration": row.positive("duration"), "fps": row.positive("fps")}
    return videos


def reason_against(segment: tuple[float, float], duration: float) -> str | None:
    "Why a segment cannot be used; None if it can."
    if segment[0] >= segment[1]: return f"ends at {segment[1]:g} s, not after its start at {segment[0]:g} s"
    if segment[0] >= duration: return f"starts at {segment[0]:g} s, the video lasts {duration:g} s"
    return None


def read_split(
    source: Path,
    subset: str,
    videos: dict,
    classes: dict[str, list],    # names by number, of verbs and of nouns
    left_out: dict[str, str],    # narration -> reason; is added to
) -> dict[str, dict]:            # {task: {video: entry}}
    "One CSV of actions; raises BadInput for a row whose video or class is unknown."
    needed = ("narration_id", "video_id", "start_timestamp", "stop_timestamp", "verb_class", "noun_class")
    databases, rows = {task: {} for task in TASKS}, read_table(source / SPLITS[subset], needed)
    with progress(subset, len(rows), " rows") as bar:
        for row in rows:
            bar.update()
            id, segment = row.cells["video_id"], (row.seconds("start_timestamp"), row.seconds("stop_timestamp"))
            if id not in videos: raise BadInput(f"{row.where}: video {id} is not in {INFO}; get both files in one version")
            if reason := reason_against(segment, videos[id]["duration"]): left_out[row.cells["narration_id"]] = reason
            for task in TASKS:
                number = row.whole_number(f"{task}_class")
                if number >= len(classes[task]): raise BadInput(f"{row.where}: {task}_class is {number}, 0 to {len(classes[task]) - 1} are known; get all files in one version")
                entry = databases[task].setdefault(id, {"subset": subset, **videos[id], "annotations": []})
                if not reason: entry["annotations"].append({"label": classes[task][number], "label_id": number, "segment": list(segment)})
    return databases


def convert(source: Path, out: Path) -> int:  # exit code
    "All CSVs to two JSON files; raises BadInput, before anything is written."
    check_folder(out)
    if not source.is_dir(): raise BadInput(f"{source}: no such folder; give the folder with EPIC_100_validation.csv and the other CSVs")
    present = [subset for subset, name in SPLITS.items() if (source / name).is_file()]
    if not present: raise BadInput(f"{source}: neither {' nor '.join(SPLITS.values())} is in it; {AGAIN.replace('it', 'them', 1)}")
    for subset in SPLITS.keys() - present: say(f"note: {source / SPLITS[subset]} is not there; the result has no {subset} videos")
    classes, videos, left_out, databases = {task: read_classes(source / f"EPIC_100_{task}_classes.csv") for task in TASKS}, read_videos(source / INFO), {}, {task: {} for task in TASKS}
    for subset in present:
        for task, found in read_split(source, subset, videos, classes, left_out).items():
            if both := sorted(found.keys() & databases[task].keys()): raise BadInput(f"{source}: video {both[0]} is in {' and in '.join(SPLITS.values())}; {AGAIN}")
            databases[task] |= found
    for narration, reason in left_out.items(): print(f"left out: {narration} {reason}")
    for task in TASKS: write(out / f"epic_kitchens_100_{task}.json", classes[task], databases[task], present)
    return DONE


def write(path: Path, classes: list[str], database: dict, subsets: list[str]):
    "One annotation file, videos by name and annotations by time; says what is in it."
    for entry in database.values(): entry["annotations"].sort(key=lambda a: (a["segment"], a["label_id"]))
    with replacing(path, encoding="utf-8") as file:
        json.dump({"version": "EPIC-KITCHENS-100", "classes": classes, "database": dict(sorted(database.items()))}, file, ensure_ascii=False)
    counts = ", ".join(f"{subset} {len(entries)} videos {sum(len(e['annotations']) for e in entries):,} instances"
                       for subset in subsets for entries in [[e for e in database.values() if e["subset"] == subset]])
    used = {a["label_id"] for entry in database.values() for a in entry["annotations"]}
    print(f"{path}: {counts}; {len(classes)} classes, {len(classes) - len(used)} without an instance")


def main(arguments: list[str] | None = None) -> int:  # exit code: 0 done, 2 refused, 130 interrupted
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SOURCE", type=Path, help="folder with the official CSVs")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder for the two JSON files, which are replaced")
    options = parser.parse_args(arguments)
    return run("convert_epic", lambda: convert(options.source, options.out), options.out, ValueError)


if __name__ == "__main__":
    sys.exit(main())
