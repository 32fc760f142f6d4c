#!/usr/bin/env python
"""Videos become folders of numbered images: an interval, at exactly the asked number of frames per second, as AVA's models read them.

OUT/NAME/image_000001.jpg ...   frame number 1 + k shows the moment START + k / FPS, so second t starts with frame (t - START) * FPS + 1
OUT/NAME.json                   settings and number of frames (null until NAME is finished)

NAME is the video's file name without its ending. Of the video's frames the one nearest in time is taken, by its time stamp (counted
from the start of the file): any frame rate becomes FPS, constant or not, without drift. Defaults are AVA's: seconds 900 to 1800 at
30 frames per second, height 340. A video that ends before END gives fewer frames, which is said.
What is finished is left alone, what is half done goes on after its last whole second; --again starts anew.
A video that cannot be read does not stop the others.
Exit code: 0 all are done, 10 + n if n videos failed (110: 100 or more), 2 refused or disk full (one sentence says why), 130 interrupted.

examples:
  python data_scripts/extract_frames.py data/ava/videos data/ava/frames                                   all films, 27,000 frames each
  python data_scripts/extract_frames.py data/ava/videos data/ava/frames --processes 8
  python data_scripts/extract_frames.py "my film.mp4" frames --whole --fps 15 --short-side 256            all of a video
"""
import argparse
import errno
import io
import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from fractions import Fraction
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from actloc.core.files import first_line, read_json, replacing
from actloc.data.video import open_file, turn_of, turned

from command_line import DONE, BadInput, check_folder, progress, run, say

SUFFIXES = {".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".ts", ".flv", ".wmv", ".3gp"}
IMAGE = "image_{:06d}.jpg"
SOME_FAILED, MOST = 10, 100   # exit codes
SHORT_S = 5                   # a file that ends so much before its announced end is broken


@dataclass(frozen=True)
class Settings:
    "What is asked for; two runs with the same settings may share a folder."
    start: float                # seconds
    end: float | None           # seconds; None: the end of the video
    fps: str                    # "30" or "30000/1001"
    height: int | None          # of the images; None: see short_side
    short_side: int | None      # of the images; None and no height: as in the video
    quality: int                # of the JPEGs, 1 to 95

    @property
    def rate(self) -> Fraction: return Fraction(self.fps)

    def moment(self, k: int) -> Fraction:
        "When frame number k + 1 is, in seconds."
        return Fraction(self.start) + k / self.rate

    def count(self, end: Fraction) -> int:
        "Frames from the start to `end`, without the one at `end`."
        return max(0, -((Fraction(self.start) - end) * self.rate // 1))

    def size(self, width: int, height: int) -> tuple[int, int]:
        "Width and height of the images."
        scale = Fraction(self.height, height) if self.height else Fraction(self.short_side, min(width, height)) if self.short_side else Fraction(1)
        return max(1, round(width * scale)), max(1, round(height * scale))


@dataclass(frozen=True)
class Job:
    "One video and where its images go."
    video: Path
    out: Path
    settings: Settings
    again: bool = False

    @property
    def name(self) -> str: return self.video.stem
    @property
    def folder(self) -> Path: return self.out / self.name
    @property
    def manifest(self) -> Path: return self.out / f"{self.name}.json"
    def image(self, k: int) -> Path: return self.folder / IMAGE.format(k + 1)
    def about(self) -> dict: return {"video": self.video.name, "bytes": self.video.stat().st_size, **asdict(self.settings)}


@dataclass(frozen=True)
class Outcome:
    "What became of a video."
    job: Job
    frames: int = 0
    note: str = ""
    error: str = ""     # why it failed
    full: bool = False  # because the disk is


class Stopped(Exception):
    "Somebody wants everything to end."


# --- Time ---

def nearest(
    frames: Iterator[tuple[Fraction, object]],  # (moment, frame) in order of time
    moments: Callable[[int], Fraction],         # of the k-th wanted frame
    first: int,                                 # the first wanted one
    count: int,                                 # wanted: first to count - 1
) -> Iterator[tuple[int, object]]:              # (k, frame)
    "For each wanted moment the frame that is nearest, of two the earlier; none after the last frame has been shown for its time."
    k, before, long = first, None, Fraction(0)
    for now in frames:
        while before and k < count and moments(k) * 2 <= before[0] + now[0]:
            yield k, before[1]
            k += 1
        if k >= count: return
        if before: long = now[0] - before[0]
        before = now
    while before and k < count and moments(k) < before[0] + (long or moments(1) - moments(0)):
        yield k, before[1]
        k += 1


def timed(container, stream, damaged: Callable) -> Iterator[tuple[Fraction, object]]:
    "Frames with their moments; packets that cannot be decoded are passed over."
    import av

    zero, last = Fraction(container.start_time or 0, av.time_base), None
    for packet in container.demux(stream):
        try: frames = packet.decode()
        except (av.error.InvalidDataError, av.error.EOFError):
            damaged()
            continue
        for frame in frames:
            stamp = frame.pts if frame.pts is not None else frame.dts
            if stamp is None: continue
            now = stamp * Fraction(stream.time_base) - zero
            if last is not None and now <= last: continue
            last = now
            yield now, frame


def opened(job: Job, threads: int):
    "A video file and its video stream; raises ValueError if there is none."
    container, stream = open_file(job.video)
    stream.codec_context.thread_count = threads
    if threads != 1: stream.thread_type = "AUTO"
    return container, stream


def sought(container, stream, start: Fraction, damaged: Callable) -> Iterator | None:
    "Frames from a key frame at or before `start`; None if the file's index leads elsewhere."
    import av

    if start > 0:
        zero = Fraction(container.start_time or 0, av.time_base)
        container.seek(int((start + zero) / stream.time_base), stream=stream, backward=True)
    frames = timed(container, stream, damaged)
    first = next(frames, None)
    if start > 0 and (first is None or first[0] > start): return None

    def all_of():
        if first: yield first
        yield from frames
    return all_of()


# --- One video ---

def found_frames(job: Job) -> tuple[int, bool]:  # frames that are whole for sure, are these all?
    "What is there of a video. Raises BadInput if it was made with other settings."
    if job.again:
        job.manifest.unlink(missing_ok=True)
        for path in sorted(job.folder.glob("image_*.jpg")): path.unlink()
    if not job.manifest.exists():
        if any(job.folder.glob("image_*.jpg")): raise BadInput(f"{job.folder} has images of unknown origin; give another OUT, or --again to start anew")
        return 0, False
    was = read_json(job.manifest)
    changed = ", ".join(f"{name} {was.get(name)} instead of {value}" for name, value in job.about().items() if was.get(name) != value)
    if changed: raise BadInput(f"{job.folder} was made with {changed}; give another OUT, or --again to start anew")
    frames = was.get("frames")
    if frames and job.image(0).exists() and job.image(frames - 1).exists(): return frames, True
    k = 0
    while (path := job.image(k)).exists() and path.stat().st_size: k += 1
    return max(0, k - max(1, int(job.settings.rate))), False   # a machine that went down may have left its last second half written


def note_down(job: Job, frames: int | None):
    "The manifest; without frames for a video that is begun."
    with replacing(job.manifest) as file: json.dump({**job.about(), "frames": frames}, file)


def as_jpeg(frame, settings: Settings) -> bytes:
    "A frame, scaled and the right way up (telephones store it turned)."
    from PIL import Image

    memory, turn = io.BytesIO(), turn_of(frame)
    shown = (frame.height, frame.width) if turn[0] else (frame.width, frame.height)
    size = settings.size(*shown)[::-1 if turn[0] else 1]
    pixels = frame.reformat(*size, format="rgb24", interpolation="BICUBIC").to_ndarray()
    Image.fromarray(np.ascontiguousarray(turned(pixels, turn))).save(memory, "JPEG", quality=settings.quality)
    return memory.getvalue()


def write(path: Path, content: bytes):
    try: path.write_bytes(content)
    except OSError:
        path.unlink(missing_ok=True)   # half an image is worse than none
        raise


def extract(job: Job, threads: int, tick: Callable[[int], None], stopped: Callable[[], bool]) -> tuple[int, str]:  # frames, note
    "Writes the images of a video; raises BadInput, OSError or PyAV's errors, and Stopped when asked to."
    k, complete = found_frames(job)
    tick(k)
    if complete: return k, ""
    note_down(job, None)
    job.folder.mkdir(parents=True, exist_ok=True)
    written, bad = one_pass(job, k, threads, tick, stopped)
    note = f"{bad} damaged packets were passed over" if bad else ""
    wanted = job.settings.count(Fraction(job.settings.end)) if job.settings.end is not None else written
    if written < wanted: note = "; ".join(filter(None, [note, f"the video ends at {float(job.settings.moment(written)):.1f} s, {written:,} of {wanted:,} frames"]))
    note_down(job, written)
    return written, note


def one_pass(job: Job, first: int, threads: int, tick: Callable[[int], None], stopped: Callable[[], bool]) -> tuple[int, int]:  # frames, damaged packets
    "Decodes the video once and writes its images from number `first` on."
    damage, settings = Counter(), job.settings
    container, stream = opened(job, threads)
    try:
        frames = sought(container, stream, settings.moment(first), lambda: damage.update(["packets"]))
        if frames is None:                      # the index is wrong: from the beginning
            container.close()
            container, stream = opened(job, threads)
            frames = timed(container, stream, lambda: damage.update(["packets"]))
        announced = stream.duration * stream.time_base if stream.duration else Fraction(container.duration or 0, 1_000_000)
        end = Fraction(settings.end) if settings.end is not None else announced + 3600
        k, shown, jpeg = first - 1, None, b""
        for k, frame in nearest(frames, settings.moment, first, settings.count(end)):
            if frame is not shown: shown, jpeg = frame, as_jpeg(frame, settings)
            write(job.image(k), jpeg)
            tick(1)
            if stopped(): raise Stopped
    finally: container.close()
    reached = settings.moment(k + 1)
    if k < 0: raise BadInput(f"no frame from second {settings.start:g} on; the video has {float(announced):.1f} s")
    if reached < min(end, announced) - SHORT_S:
        raise BadInput(f"it breaks off at {float(reached):.1f} s, {float(announced):.1f} s are announced (cut off or damaged?); "
                       "copy or download it again, then run this with --again")
    return k + 1, damage["packets"]


def outcome(job: Job, threads: int, tick: Callable[[int], None], stopped: Callable[[], bool]) -> Outcome:
    "What became of a video, whatever goes wrong in it."
    try: return Outcome(job, *extract(job, threads, tick, stopped))
    except Stopped: return Outcome(job, error="stopped")
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT): return Outcome(job, error=str(error), full=True)
        return Outcome(job, error=first_line(error))
    except Exception as error:                  # a damaged file can raise anything
        return Outcome(job, error=first_line(error) or type(error).__name__)


# --- All of them ---

shared = {}   # in a process of the pool: what it shares with the others


def begin(counter, stop):
    "Of every process of the pool."
    signal.signal(signal.SIGINT, signal.SIG_IGN)   # the first process says when to end
    shared.update(counter=counter, stop=stop)


def in_pool(job: Job) -> Outcome:
    def tick(n):
        with shared["counter"].get_lock(): shared["counter"].value += n
    return outcome(job, 1, tick, shared["stop"].is_set)


def one_by_one(jobs: list[Job], bar) -> Iterator[Outcome]:
    for job in jobs: yield outcome(job, 0, bar.update, lambda: False)


def at_once(jobs: list[Job], processes: int, bar) -> Iterator[Outcome]:
    "Outcomes as they come; closing it ends all processes after the image they are at."
    context = get_context("spawn")
    counter, stop = context.Value("q", 0), context.Event()
    with ProcessPoolExecutor(processes, context, begin, (counter, stop)) as pool:
        waiting = {pool.submit(in_pool, job): job for job in jobs}
        try:
            while waiting:
                ready, _ = wait(waiting, .3, FIRST_COMPLETED)
                bar.update(counter.value - bar.n)
                for future in ready:
                    job = waiting.pop(future)
                    try: yield future.result()
                    except BrokenProcessPool: yield Outcome(job, error="its process ended (killed? out of memory?); run again with fewer --processes")
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)


def find_jobs(videos: list[Path], out: Path, settings: Settings, again: bool) -> list[Job]:
    "The videos that are named, and those in the folders that are; raises BadInput if there are none or two would share a folder."
    files = []
    for path in videos:
        if path.is_dir(): files += sorted(inside for inside in path.iterdir() if inside.suffix.lower() in SUFFIXES and inside.is_file())
        elif path.is_file(): files.append(path)
        else: raise BadInput(f"VIDEO {path}: no such file or folder")
    if not files: raise BadInput(f"VIDEO {', '.join(map(str, videos))}: no video in it; files that end in {', '.join(sorted(SUFFIXES))} are looked for")
    names = Counter(path.stem for path in files)
    for path in files:
        if names[path.stem] > 1: raise BadInput(f"VIDEO {path}: {names[path.stem]} videos have this name, their images would mix; give them to different OUT folders")
        if path.stem.strip(".") == "": raise BadInput(f"VIDEO {path}: its name cannot name a folder; rename it")
    return [Job(path, out, settings, again) for path in files]


def extract_all(jobs: list[Job], out: Path, processes: int) -> int:  # exit code
    "All videos, and a word about each that is worth one. Raises BadInput if the disk is full."
    settings, failed, frames = jobs[0].settings, [], 0
    total = len(jobs) * settings.count(Fraction(settings.end)) if settings.end is not None else None
    with progress("frames", total, " frames") as bar:
        together = processes > 1 and len(jobs) > 1
        outcomes = at_once(jobs, min(processes, len(jobs)), bar) if together else one_by_one(jobs, bar)
        for result in outcomes:
            if result.full:
                outcomes.close()
                raise BadInput(f"{out}: the disk is full; make room and run the same command again to go on")
            if result.error: failed.append(result)
            frames += result.frames
            if result.error or result.note: say(f"{result.job.video}: {result.error or result.note}")
    print(f"{out}: {len(jobs) - len(failed):,} of {len(jobs):,} videos are done, {frames:,} frames")
    for result in failed: print(f"failed: {result.job.video} ({result.error})")
    return SOME_FAILED + min(len(failed), MOST) if failed else DONE


def read_settings(options: argparse.Namespace) -> Settings:
    "From the command line; raises BadInput for numbers that cannot be."
    try: rate = Fraction(options.fps)
    except (ValueError, ZeroDivisionError): rate = 0
    if not 0 < rate <= 1000: raise BadInput(f"--fps {options.fps}: a number like 30 or a share like 30000/1001 is needed")
    start, end = (0., None) if options.whole else (options.start, options.end)
    if not start >= 0 or end is not None and not start < end < 1e7:
        raise BadInput(f"--start {start:g} --end {end:g}: seconds from 0 are needed, the end after the start")
    for name, value in (("--height", options.height), ("--short-side", options.short_side)):
        if value is not None and not 8 <= value <= 8192: raise BadInput(f"{name} {value}: pixels from 8 to 8192 are needed")
    if not 1 <= options.quality <= 95: raise BadInput(f"--quality {options.quality}: a number from 1 to 95 is needed")
    if options.processes < 1: raise BadInput(f"--processes {options.processes}: at least 1 is needed")
    height = None if options.short_side or options.original_size else options.height or 340
    return Settings(start, end, str(rate), height, None if options.original_size else options.short_side, options.quality)


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="extract_frames.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("videos", metavar="VIDEO", nargs="+", type=Path, help="video files, or folders of them")
    found.add_argument("out", metavar="OUT", type=Path, help="folder for the folders of images")
    found.add_argument("--start", type=float, default=900., metavar="S", help="first second (default: 900)")
    found.add_argument("--end", type=float, default=1800., metavar="S", help="up to this second (default: 1800)")
    found.add_argument("--whole", action="store_true", help="all of each video, from second 0")
    found.add_argument("--fps", default="30", help="frames per second of the images (default: 30)")
    size = found.add_mutually_exclusive_group()
    size.add_argument("--height", type=int, metavar="PX", help="height of the images (default: 340); the width follows")
    size.add_argument("--short-side", type=int, metavar="PX", help="shorter side of the images instead")
    size.add_argument("--original-size", action="store_true", help="as in the video")
    found.add_argument("--quality", type=int, default=90, help="of the JPEG files, 1 to 95 (default: 90)")
    found.add_argument("--processes", type=int, default=1, metavar="N", help="videos at once (default: 1)")
    found.add_argument("--again", action="store_true", help="throw away what is there of these videos and start anew")
    return found


def main(arguments: list[str] | None = None) -> int:  # exit code
    options = parser().parse_args(arguments)

    def work():
        settings = read_settings(options)
        check_folder(options.out)
        return extract_all(find_jobs(options.videos, options.out, settings, options.again), options.out, options.processes)
    return run("extract_frames", work, options.out, ValueError)


if __name__ == "__main__":
    sys.exit(main())
