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
import json
import sys
from pathlib import Path

from actloc.core.epic import SPLITS, EpicKitchens, read_csvs
from actloc.core.files import replacing

from command_line import DONE, check_folder, run, say


def convert(source: Path, out: Path) -> int:  # exit code
    "All CSVs to two JSON files; raises ValueError, before anything is written."
    check_folder(out)
    known = read_csvs(source)
    for subset in SPLITS.keys() - set(known.subsets): say(f"note: {source / SPLITS[subset]} is not there; the result has no {subset} videos")
    for narration, reason in known.left_out.items(): print(f"left out: {narration} {reason}")
    for task, classes in (("verb", known.verbs), ("noun", known.nouns)): write(out / f"epic_kitchens_100_{task}.json", classes, entries(known, task, classes), known.subsets)
    return DONE


def entries(known: EpicKitchens, task: str, classes: tuple[str, ...]) -> dict[str, dict]:  # {video: entry}, videos by name and annotations by time
    "The database of one task; a video keeps its entry if all its rows are left out."
    database = {}
    for action in sorted(known.actions, key=lambda a: (a.video, a.segment_s, getattr(a, task))):
        video, number = known.videos[action.video], getattr(action, task)
        entry = database.setdefault(action.video, {"subset": action.subset, "duration": video.duration_s, "fps": video.fps, "annotations": []})
        if not action.unusable: entry["annotations"].append({"label": classes[number], "label_id": number, "segment": list(action.segment_s)})
    return database


def write(path: Path, classes: tuple[str, ...], database: dict, subsets: tuple[str, ...]):
    "One annotation file; says what is in it."
    with replacing(path, encoding="utf-8") as file:
        json.dump({"version": "EPIC-KITCHENS-100", "classes": classes, "database": database}, file, ensure_ascii=False)
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
