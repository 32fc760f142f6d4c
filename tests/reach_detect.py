"""Video in, segments out, by hand on a quiet machine (pytest does not collect this file); writes results/detect_reach.json. About 15 minutes on 2 cores.

  python tests/reach_detect.py              all of it
  python tests/reach_detect.py memory       one part (start, speed, memory); the others stay as they are in the file
  python tests/reach_detect.py --minutes 1 3 --json /tmp/detect.json      small, to see that it works

Speed: the real clips of ../shared/data/videos through R3D-18 at 112 pixels (every 16 frames, every 8) and a model, seconds of video per second of wall clock, decoding
and suppression included, loading excluded (it is said apart). Memory: peak of a process that turns a video of 1 and of 60 minutes into segments and writes them.
Start: `import actloc`, `actloc --help`. Weights are random: neither speed nor memory depends on them.
"""
import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import av

from actloc.app.runs import environment
from actloc.core.files import read_json, replacing

ROOT = Path(__file__).resolve().parents[1]
CLIPS = ROOT.parent / "shared/data/videos"


def long_video(path: Path, minutes: float):
    "The first clip again and again, packet by packet, as long as asked for."
    clip, span = CLIPS / "demo.mp4", None
    with av.open(str(path), "w") as out:
        written, shift, stream = 0., 0, None
        while written < minutes * 60:
            with av.open(str(clip)) as video:
                source = video.streams.video[0]
                stream = stream or out.add_stream_from_template(source)
                span = span or round(source.frames / source.average_rate / source.time_base)
                for packet in video.demux(source):
                    if packet.dts is None: continue
                    packet.pts, packet.dts, packet.stream = packet.pts + shift, packet.dts + shift, stream
                    out.mux(packet)
                shift, written = shift + span, written + float(span * source.time_base)


def model_for(how, folder: Path, fps: float):
    "A small model with random weights that reads such features."
    import torch

    from actloc.actionformer.model import ActionFormer, ActionFormerConfig
    from actloc.app.extract import load_network
    from actloc.app.localize import ModelCard, save_model

    torch.manual_seed(0)
    header = load_network(how, "cpu").header_at(fps)
    config = ActionFormerConfig(input_dim=512, num_classes=5, arch=(1, 1, 3), width=64, window=9, max_seq_len=128, regression_ranges=((0, 4), (4, 8), (8, 16), (16, 10000)), offset_activation="softplus")
    save_model(folder, ActionFormer(config), ModelCard(config, tuple("abcde"), header.grid, "random weights", 0., header))
    return folder


def speed(precision: str) -> dict:
    "In a process of its own."
    from actloc.app.detect import DetectConfig, detector_of
    from actloc.app.extract import ExtractConfig
    from actloc.data.video import open_video

    found = {}
    with tempfile.TemporaryDirectory() as place:
        for clip in sorted(CLIPS.glob("*.mp4")):
            begun = time.perf_counter()
            detector = detector_of(model_for(ExtractConfig(precision=precision, weights="random:0"), Path(place) / clip.stem, open_video(clip).fps), DetectConfig(weights="random:0", device="cpu"))
            detector(clip)                  # compiles, and fills caches
            ready, walls, cpu = time.perf_counter() - begun, [], time.process_time()
            for _ in range(3):
                begun = time.perf_counter()
                result = detector(clip)
                walls.append(time.perf_counter() - begun)
            found[clip.name] = {"seconds": result.duration_s, "times_real_time": round(result.duration_s / statistics.median(walls), 2), "wall_s": [round(w, 2) for w in walls],
                                "cpu_s": round((time.process_time() - cpu) / 3, 2), "loading_and_first_pass_s": round(ready, 1)}
    return found


def memory(minutes: float) -> dict:
    "In a process of its own."
    from actloc.app.detect import detect
    from actloc.app.extract import ExtractConfig
    from actloc.data.video import open_video

    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        long_video(place / "long.mp4", minutes)
        model = model_for(ExtractConfig(stride=120, weights="random:0"), place / "model", open_video(place / "long.mp4").fps)
        begun = time.perf_counter()
        found = detect(place / "long.mp4", model, place / "found.json", weights="random:0", device="cpu")
        return {"minutes": minutes, "seconds": round(found.duration_s, 2), "segments": len(found), "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, "wall_s": round(time.perf_counter() - begun, 1)}


def start() -> dict:
    def median(*words):
        walls = []
        for _ in range(7):
            begun = time.perf_counter()
            subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
            walls.append(time.perf_counter() - begun)
        return round(statistics.median(walls), 3)
    bare = median(sys.executable, "-c", "pass")
    return {"python_alone_s": bare, "import_actloc_s": round(median(sys.executable, "-c", "import actloc") - bare, 3), "actloc_help_s": median(str(Path(sys.executable).with_name("actloc")), "--help")}


def apart(what: str) -> dict:
    "This file again in a new process, whose memory and caches are its own."
    return json.loads(subprocess.run([sys.executable, __file__, "--only", what], check=True, capture_output=True, text=True).stdout.splitlines()[-1])


PARTS = {"start": lambda minutes: start(), "speed": lambda minutes: {precision: apart(f"speed={precision}") for precision in ("float32", "bfloat16")},
         "memory": lambda minutes: [apart(f"memory={m}") for m in minutes]}


def main():
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)} (default: all)")
    asked.add_argument("--minutes", nargs=2, type=float, default=[1, 60])
    asked.add_argument("--json", type=Path, default=ROOT / "results/detect_reach.json")
    asked.add_argument("--only", help=argparse.SUPPRESS)
    args = asked.parse_args()
    if args.only:
        what, value = args.only.split("=")
        return print(json.dumps({"speed": speed, "memory": lambda m: memory(float(m))}[what](value)))
    if not CLIPS.is_dir(): sys.exit(f"{CLIPS}: the real clips are not here")
    if wrong := set(args.parts) - set(PARTS): asked.error(f"there is no part {wrong.pop()!r}; there are {', '.join(PARTS)}")
    found = read_json(args.json) if args.json.exists() else {}
    for part in args.parts or PARTS:
        found[part] = {"measured": PARTS[part](args.minutes), "environment": environment()}
        print(part, found[part]["measured"], flush=True)
        with replacing(args.json) as file: json.dump(found, file, indent=1)


if __name__ == "__main__": main()
