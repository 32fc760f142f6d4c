"""The long way: the real run from raw recordings to its number, and the demo's number."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ACTLOC = Path(sys.executable).with_name("actloc")
pytestmark = pytest.mark.slow


def train(*words):
    done = subprocess.run([ACTLOC, "train", *words], cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"})
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((Path(words[-1]) / "metrics.json").read_text())


def test_hapt_from_raw_recordings_to_its_number(shared, tmp_path):
    subprocess.run([sys.executable, ROOT / "data_scripts/prepare_hapt.py", shared / "data/hapt.zip", tmp_path / "hapt"], check=True)
    metrics = train("-f", "params/hapt.yaml", "-p", f"data={tmp_path / 'hapt'}", "--out", str(tmp_path / "run"))
    print(metrics["average_mAP"], metrics["strict"]["average_mAP"], metrics["cost"])
    assert metrics["videos"] == 19 and metrics["instances"] == 365 and metrics["data"]["train"]["instances"] == 849
    assert metrics["average_mAP"] > .92
    assert metrics["strict"]["average_mAP"] > .54


def test_the_demo_separates_a_good_model_from_a_bad_one(tmp_path):
    good = train("-f", "params/demo.yaml", "--out", str(tmp_path / "good"))
    bad = train("-f", "params/demo.yaml", "-p", "training.epochs=1", "-p", "model.arch=[1, 1, 0]",   # one level, three epochs
                "-p", "model.regression_ranges=[[0, 10000]]", "--out", str(tmp_path / "bad"))
    assert good["average_mAP"] > .8 and bad["average_mAP"] < good["average_mAP"] - .2
    assert "<script" in (tmp_path / "good/report.html").read_text()
