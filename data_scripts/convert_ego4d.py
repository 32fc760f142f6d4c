#!/usr/bin/env python
"""Ego4D moment queries: annotations and features of whole videos become one annotation file and one .npy per clip and stream.

SOURCE holds moments_train.json and moments_val.json of Ego4D (with --test moments_test_unannotated.json, too).
Each --stream NAME=FOLDER holds VIDEO_UID.pt, a tensor [T, C] with one feature per 16 frames, each of 32 frames.

OUT/annotations/ego4d.json       {"classes", "database": {clip: {"subset", "duration", "fps", "video", "first_frame", "shift", "annotations"}}}
OUT/NAME_features/CLIP_UID.npy   float32 [T, C]
OUT/annotations/left_out.txt     clips that are not in the result, each with its reason

A clip is widened to whole multiples of 16 frames, so that it lies on the grid of its video's features; `shift` seconds were put in front,
and annotations are later by as much. Only primary labels of at least 0.25 s count; label ids number the classes in alphabetical order.
Clips outside 10 to 100 frames per second, without labels or without features are left out, each named with its reason.
What is converted already (and newer than its .pt) is kept: a run that was killed continues where it was. Name all streams in one command:
a clip is in the result only if every stream has it.
Exit code: 0 done, 3 features are missing or unusable (named), 2 refused (one sentence says why), 130 interrupted.

example:
  python data_scripts/convert_ego4d.py ego4d/v1/annotations data/ego4d \\
      --stream slowfast=ego4d/v1/slowfast8x8_r101_k400 --stream omnivore=ego4d/v1/omnivore_video_swinl
"""
import argparse
import json
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from actloc.core.files import read_json, read_torch, replacing

from command_line import DONE, MISSING, BadInput, check_folder, progress, run, say

STRIDE, WINDOW = 16, 32           # frames between features, frames under a feature
FPS_LOW, FPS_HIGH = 10, 100
SHORTEST_S = .25
CLASSES = 110                     # of the published benchmark
SHORT_BY = 2                      # so many features may be missing at the end of a clip; that is said
FILES = {"train": "moments_train.json", "val": "moments_val.json", "test": "moments_test_unannotated.json"}
AGAIN = "get it again from Ego4D"


@dataclass(frozen=True)
class Label:
    "One moment, in seconds of its video."
    name: str
    start: float
    end: float


@dataclass(frozen=True)
class Clip:
    "A clip of a video as Ego4D gives it."
    id: str
    video: str
    subset: str
    frames: tuple[int, int]       # of the video
    seconds: tuple[float, float]  # of the video
    labels: tuple[Label, ...]     # primary ones

    @property
    def fps(self) -> float:
        length = self.seconds[1] - self.seconds[0]
        return (self.frames[1] - self.frames[0]) / length if length > 0 else 0.

    @property
    def widened(self) -> tuple[int, int]:
        "First and last frame on the feature grid."
        return self.frames[0] - self.frames[0] % STRIDE, self.frames[1] + -self.frames[1] % STRIDE

    @property
    def steps(self) -> tuple[int, int]:
        "Which features of the video belong to the clip: from, to (exclusive)."
        return self.widened[0] // STRIDE, (self.widened[1] - WINDOW) // STRIDE

    @property
    def shift(self) -> float:
        "Seconds put in front of the clip."
        return (self.frames[0] - self.widened[0]) / self.fps

    @property
    def kept(self) -> tuple[Label, ...]:
        return tuple(label for label in self.labels if label.end - label.start >= SHORTEST_S)

    def reason_against(self) -> str | None:
        "Why the clip cannot be in the result whatever its features are; None if it can."
        if not FPS_LOW <= self.fps <= FPS_HIGH:
            return f"{self.frames[1] - self.frames[0]} frames in {self.seconds[1] - self.seconds[0]:g} s are {self.fps:.4g} fps, outside {FPS_LOW} to {FPS_HIGH}"
        if not self.kept and self.subset != "test": return f"no primary label of at least {SHORTEST_S} s ({len(self.labels)} shorter ones)"
        if self.steps[1] <= self.steps[0]: return f"{self.frames[1] - self.frames[0]} frames are too few for one feature"
        return None

    def entry(self, numbers: dict[str, int]) -> dict:
        "What the annotation file says about the clip."
        moved = self.shift - self.seconds[0]
        annotations = sorted(([round(label.start + moved, 2), round(label.end + moved, 2)], numbers[label.name], label.name) for label in self.kept)
        return {"subset": self.subset, "duration": (self.widened[1] - self.widened[0]) / self.fps, "fps": self.fps,
                "video": self.video, "first_frame": self.widened[0], "shift": self.shift,
                "annotations": [{"label": name, "label_id": number, "segment": segment} for segment, number, name in annotations]}


# --- Annotations ---

def taken(entry, name: str, kind: type | tuple, where: str):
    "A value of an annotation file; raises BadInput if it is missing or of another kind."
    value = entry.get(name) if isinstance(entry, dict) else None
    if not isinstance(value, kind) or (isinstance(value, float) and not np.isfinite(value)) or (isinstance(value, bool) and kind is not bool):
        raise BadInput(f"{where}: {name} is {str(value)[:60]!r}, {'a number' if kind == (int, float) else kind.__name__} is needed; {AGAIN}")
    return value


def read_label(item: dict, where: str) -> Label:
    start, end = (float(taken(item, name, (int, float), where)) for name in ("video_start_time", "video_end_time"))
    return Label(taken(item, "label", str, where), start, end)


def read_clip(clip: dict, video: str, subset: str, where: str) -> Clip:
    "One clip; raises BadInput naming it. Ego4D has clips that begin at a frame slightly below 0."
    id = plain_name(taken(clip, "clip_uid", str, where), where)
    where = f"{where}, clip {id}"
    frames = tuple(max(0, int(taken(clip, name, (int, float), where))) for name in ("video_start_frame", "video_end_frame"))
    seconds = tuple(max(0., float(taken(clip, name, (int, float), where))) for name in ("video_start_sec", "video_end_sec"))
    sheets = taken(clip, "annotations", list, where) if subset != "test" else []
    items = [item for sheet in sheets for item in taken(sheet, "labels", list, where)]
    labels = tuple(read_label(item, where) for item in items if taken(item, "primary", bool, where))
    return Clip(id, video, subset, frames, seconds, labels)


def plain_name(uid: str, where: str) -> str:
    "A uid that can be the name of a file; raises BadInput for any other."
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", uid): raise BadInput(f"{where}: {uid!r} came, letters, digits and - are needed in a uid; {AGAIN}")
    return uid


def read_clips(path: Path, subset: str) -> list[Clip]:
    "All clips of one annotation file."
    clips = []
    for video in taken(read_json(path), "videos", list, str(path)):
        uid = plain_name(taken(video, "video_uid", str, str(path)), str(path))
        clips += [read_clip(clip, uid, subset, f"{path}, video {uid}") for clip in taken(video, "clips", list, f"{path}, video {uid}")]
    return clips


def read_source(source: Path, test: bool) -> list[Clip]:
    "The clips of all annotation files, by video and uid; raises BadInput if a file is missing or a clip comes twice."
    names = {subset: name for subset, name in FILES.items() if subset != "test" or test}
    for name in names.values():
        if not (source / name).is_file(): raise BadInput(f"{source / name}: no such file; the label ids need the class names of training and validation, put both into {source}")
    clips = [clip for subset, name in names.items() for clip in read_clips(source / name, subset)]
    twice = [id for id, n in Counter(clip.id for clip in clips).items() if n > 1]
    if twice: raise BadInput(f"{source}: clip {twice[0]} comes twice; get the files again from Ego4D in one version")
    return sorted(clips, key=lambda clip: (clip.video, clip.id))


# --- Features ---

def read_stream(path: Path, channels: dict[Path, int]) -> np.ndarray:  # [T, C] float32
    "The features of a video; raises ValueError if the file is missing, damaged, no such tensor, or of another width than its neighbours."
    tensor = read_torch(path)
    shape = list(getattr(tensor, "shape", ()))
    if len(shape) != 2 or 0 in shape or not hasattr(tensor, "is_floating_point") or not tensor.is_floating_point():
        raise BadInput(f"{path}: a tensor of numbers [T, C] is needed, {type(tensor).__name__} {shape} came")
    if channels.setdefault(path.parent, shape[1]) != shape[1]: raise BadInput(f"{path}: {shape[1]} channels came, the other videos have {channels[path.parent]}")
    features = tensor.float().numpy()
    if not np.isfinite(features).all(): raise BadInput(f"{path}: NaN or infinite numbers in it")
    return features


def is_done(path: Path, source: Path, steps: int) -> bool:
    "Is a clip's file whole, of the right length and newer than what it was made from?"
    try:
        if path.stat().st_mtime_ns < source.stat().st_mtime_ns: return False
        return np.load(path, mmap_mode="r", allow_pickle=False).shape[0] == steps
    except (OSError, ValueError, EOFError, IndexError): return False


def outputs(clip: Clip, streams: dict[str, Path], out: Path) -> dict[str, Path]:
    return {name: out / f"{name}_features" / f"{clip.id}.npy" for name in streams}


def cut_video(
    clips: list[Clip],            # of one video
    streams: dict[str, Path],
    out: Path,
    channels: dict[Path, int],    # of every folder; is added to
    left_out: dict[str, str],     # clip -> reason; is added to
    shortened: dict[str, str],    # clip -> by how much; is added to
) -> int:                         # clips that were there already
    "Writes the features of a video's clips, unless all are there."
    sources = {name: folder / f"{clips[0].video}.pt" for name, folder in streams.items()}
    if all(is_done(path, sources[name], clip.steps[1] - clip.steps[0]) for clip in clips for name, path in outputs(clip, streams, out).items()): return len(clips)
    try: arrays = {name: read_stream(path, channels) for name, path in sources.items()}
    except ValueError as error:
        left_out |= {clip.id: str(error) for clip in clips}
        return 0
    shortest = min(sources, key=lambda name: len(arrays[name]))
    for clip in clips:
        first, last = clip.steps
        lacking = last - len(arrays[shortest])
        if lacking > min(SHORT_BY, last - first - 1):
            left_out[clip.id] = f"{sources[shortest]}: {len(arrays[shortest])} features came, the clip ends with feature {last}; is the file of another video or stride?"
            continue
        if lacking > 0: shortened[clip.id] = f"{lacking} of {last - first} features are lacking at the end of {sources[shortest]}"
        for name, path in outputs(clip, streams, out).items():
            with replacing(path, "wb") as file: np.save(file, np.ascontiguousarray(arrays[name][first:last - max(0, lacking)]))
    return 0


# --- All of it ---

def convert(source: Path, out: Path, streams: dict[str, Path], test: bool) -> int:  # exit code
    "From SOURCE to OUT; raises ValueError."
    check_folder(out)
    for folder in streams.values():
        if not folder.is_dir(): raise BadInput(f"--stream {folder}: no such folder; give the folder with VIDEO_UID.pt files")
    clips = read_source(source, test)
    classes = sorted({label.name for clip in clips for label in clip.labels})
    if len(classes) != CLASSES: say(f"note: {len(classes)} classes came, the published benchmark has {CLASSES}; label ids differ from its")
    unfit = {clip.id: reason for clip in clips if (reason := clip.reason_against())}
    lost, shortened, kept, channels, videos = {}, {}, 0, {}, {}
    for clip in clips:
        if clip.id not in unfit: videos.setdefault(clip.video, []).append(clip)
    if streams:
        with progress("converting", len(videos), " videos") as bar:
            for group in videos.values():
                kept += cut_video(group, streams, out, channels, lost, shortened)
                bar.update()
    chosen = [clip for group in videos.values() for clip in group if clip.id not in lost]
    write(chosen, classes, unfit | lost, out)
    report(clips, chosen, kept, unfit | lost, shortened, out)
    return MISSING if lost else DONE


def write(clips: list[Clip], classes: list[str], left_out: dict[str, str], out: Path):
    "The annotation file and the list of what is not in it."
    numbers = {name: i for i, name in enumerate(classes)}
    database = {clip.id: clip.entry(numbers) for clip in sorted(clips, key=lambda clip: clip.id)}
    with replacing(out / "annotations" / "left_out.txt", encoding="utf-8") as file: file.writelines(f"{id}\t{left_out[id]}\n" for id in sorted(left_out))
    with replacing(out / "annotations" / "ego4d.json", encoding="utf-8") as file:
        json.dump({"version": "Ego4D moments", "classes": classes, "database": database}, file, ensure_ascii=False)


def report(clips: list[Clip], chosen: list[Clip], kept: int, left_out: dict[str, str], shortened: dict[str, str], out: Path):
    "What was taken, what was not, and why."
    counts = Counter(clip.subset for clip in chosen)
    short = sum(len(clip.labels) - len(clip.kept) for clip in chosen)
    print(f"{out}: {len(chosen):,} of {len(clips):,} clips (" + ", ".join(f"{subset} {n:,}" for subset, n in counts.items()) + f"), "
          f"{sum(len(clip.kept) for clip in chosen):,} labels ({short:,} shorter than {SHORTEST_S} s left out), {kept:,} clips were converted earlier")
    for id in sorted(shortened): print(f"shortened: {id}: {shortened[id]}")
    for id in sorted(left_out): print(f"left out: {id}: {left_out[id]}")


def stream(text: str) -> tuple[str, Path]:
    "NAME=FOLDER."
    name, _, folder = text.partition("=")
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or not folder: raise argparse.ArgumentTypeError(f"{text!r} came, NAME=FOLDER is needed, for example slowfast=ego4d/slowfast8x8_r101_k400")
    return name, Path(folder)


def main(arguments: list[str] | None = None) -> int:  # exit code
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SOURCE", type=Path, help="folder with moments_train.json and moments_val.json")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder for annotations/ and NAME_features/, for example data/ego4d")
    parser.add_argument("--stream", metavar="NAME=FOLDER", type=stream, action="append", default=[], help="features of whole videos; may come several times; without it only annotations are converted")
    parser.add_argument("--test", action="store_true", help="convert the clips of moments_test_unannotated.json, too (subset test, no labels)")
    options = parser.parse_args(arguments)
    if len(dict(options.stream)) < len(options.stream): parser.error("--stream: one name came twice; give every stream a name of its own")
    return run("convert_ego4d", lambda: convert(options.source, options.out, dict(options.stream), options.test), options.out, ValueError)


if __name__ == "__main__":
    sys.exit(main())
