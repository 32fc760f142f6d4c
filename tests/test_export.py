"""Exported models: decoding in NumPy against torch, graphs against models, files against both, and bad input."""
import json
import subprocess
import sys
import zipfile
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from actloc.acar.model import ACAR, ACARConfig
from actloc.acar.slowfast import SlowFastConfig
from actloc.actionformer.model import ActionFormer, ActionFormerConfig, Outputs, candidates, needed_length
from actloc.actionformer.numpy_decode import decode, padded, prepare
from actloc.actionformer.points import make_points
from actloc.app import export
from actloc.app.actions import ActionCard, save_action_model
from actloc.app.export import DECODE, ActionGraph, LocalizationGraph, export_model, localization_settings, lost_rows, network_of
from actloc.app.localize import ModelCard, save_model
from actloc.core.ava import LabelMap
from actloc.core.header import FeatureHeader
from actloc.core.records import Detections
from actloc.core.segments import FeatureGrid
from actloc.data.clips import ClipConfig
from actloc.ops.nms import nms
from test_golden_actionformer import CASES, GRID, load_case

CLOCK = FeatureGrid(25., 4., 16.)
needs_onnx = pytest.mark.skipif(any(find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")), reason="onnx, onnxscript and onnxruntime are not installed")
small = dict(input_dim=6, num_classes=3, width=16, heads=2, arch=(1, 1, 2), window=9, max_seq_len=40, regression_ranges=((0, 4), (4, 8), (8, 1e4)), prior=.3)
VARIANTS = {
    "as published": {},
    "refined, with a neck, any length": dict(neck="fpn", refine_radius=1.5, max_seq_len=33, standardise=True, window=(19, 5, 7), arch=(1, 0, 2)),
    "streams and positions": dict(input_dim=(2, 4), width=(10, 6), absolute_position=True, relative_position=True, offset_activation="softplus", embedding_kernel=5, arch=(1, 0, 1), regression_ranges=((0, 4), (4, 1e4))),
    "everything visible": dict(window=(-1, 9, 71), max_seq_len=17, absolute_position=True, arch=(2, 0, 2)),
    "convolutions": dict(backbone="conv", head_kernel=5, head_layers=2, drop_path=0.),
    "one level": dict(arch=(1, 1, 0), regression_ranges=((0, 1e4),), max_seq_len=7),
}


def random_model(seed=0, **settings) -> ActionFormer:
    torch.manual_seed(seed)
    model = ActionFormer(ActionFormerConfig(**{**small, **settings})).eval().requires_grad_(False)
    for p in model.parameters(): torch.nn.init.normal_(p, std=.4)
    return model.set_channels(torch.randn(6), torch.rand(6) + .5)


def settings_of(model) -> dict:
    card = ModelCard(model.config, tuple(f"class {k}" for k in range(model.config.num_classes)), CLOCK)
    return json.loads(json.dumps(localization_settings(card)))


def agree(found, expected):
    """The same rows in the same order."""
    np.testing.assert_array_equal(found[1], expected.labels)
    np.testing.assert_allclose(found[0], expected.segments, rtol=0, atol=1e-4)
    np.testing.assert_allclose(found[2], expected.scores, rtol=0, atol=1e-4)


# ---- decoding in NumPy

@pytest.mark.parametrize("seed", range(40))
def test_decode_is_the_models_decoding(seed):
    """Random outputs at random lengths, every kind of suppression, with and without refinement."""
    rng, levels = np.random.default_rng(seed), int(np.random.default_rng(seed).integers(1, 5))
    config = ActionFormerConfig(**{**small, "num_classes": int(rng.integers(1, 5)), "arch": (1, 1, levels - 1), "regression_ranges": ((0, 1e4),) * levels, "max_seq_len": int(rng.integers(1, 60)),
        "nms_method": ("hard", "soft", "linear")[seed % 3], "nms_per_class": seed % 2 == 0, "nms_threshold": float(rng.uniform(0, 1)), "nms_sigma": float(rng.uniform(.1, 1)),
        "voting_threshold": float(rng.choice([0., .3, .8])), "refine_radius": float(rng.choice([0., 1.5])), "pre_nms_topk": int(rng.choice([3, 30, 2000])),
        "max_segments": int(rng.choice([2, 20, 200])), "min_score": float(rng.choice([.001, .2])), "pre_nms_threshold": float(rng.choice([.001, .4])), "duration_threshold": float(rng.choice([.05, 1.]))})
    n, K = int(rng.integers(1, 100)), config.num_classes
    T = needed_length(config, [n])
    lengths = [-(-T // 2 ** l) for l in range(levels)]
    masks = [torch.arange(m) * 2 ** l < n for l, m in enumerate(lengths)]
    draw = lambda *shape: torch.from_numpy(rng.normal(size=shape).astype(np.float32))
    logits, offsets = [2 * draw(1, m, K) for m in lengths], [2 * draw(1, m, 2).relu() for m in lengths]
    residuals = 2 * draw(1, T, 2) * masks[0][None, :, None] if config.refine_radius > 0 else None
    out = Outputs(torch.cat(logits, 1), torch.cat(offsets, 1), torch.cat(masks)[None], make_points(lengths, config.regression_ranges), lengths, residuals)
    c = config
    (expected,) = nms(candidates(c, out), c.nms_method, per_class=c.nms_per_class, threshold=c.nms_threshold, sigma=c.nms_sigma, min_score=c.min_score, max_segments=c.max_segments, voting_threshold=c.voting_threshold)
    settings = localization_settings(ModelCard(config, ("x",) * K, CLOCK))
    wide = padded(n, settings["network"])[1]
    fitted = lambda parts: torch.cat([F.pad(x, (0, 0, 0, max(0, wide // 2 ** l - x.shape[1])))[:, : wide // 2 ** l] for l, x in enumerate(parts)], 1).numpy()
    exported = [fitted(logits), fitted(offsets), *([] if residuals is None else [fitted([residuals])])]
    duration = float(rng.choice([CLOCK.to_seconds(n), .5]))
    found = decode(exported, n, settings, duration)
    assert found[0].dtype == found[2].dtype == np.float32
    agree(found, expected.numpy().in_seconds(CLOCK, duration))


def test_all_settings_that_decoding_reads_are_exported():
    known = set(asdict(ActionFormerConfig()))
    assert set(DECODE) <= known
    assert set(DECODE) == {name for name in known if name.startswith(("pre_nms", "nms_")) or name in ("duration_threshold", "refine_radius", "min_score", "max_segments", "voting_threshold")}


@pytest.mark.parametrize("case", CASES)
def test_release_detections_through_graph_and_numpy(case):
    model, data, inputs = load_case(case)
    settings = settings_of(model) | {"clock": asdict(GRID)}
    for i, features in enumerate(inputs):
        ready = prepare(features.numpy(), settings)
        with torch.no_grad(): outputs = [x.numpy() for x in LocalizationGraph(model)(*(torch.from_numpy(x) for x in ready.values()))]
        found = decode(outputs, ready["length"], settings, float(data[f"input/{i}/duration"]))
        expected = Detections(*(data[f"eval/{i}/detections/{name}"] for name in ("segments", "labels", "scores")))
        expected = expected[expected.segments[:, 1] > expected.segments[:, 0]]      # the release keeps those outside the recording
        np.testing.assert_array_equal(found[1], expected.labels)
        np.testing.assert_allclose(found[2], expected.scores, atol=1e-5)
        np.testing.assert_allclose(found[0], expected.segments, atol=1e-3)


# ---- graphs

@pytest.mark.parametrize("name", VARIANTS)
def test_graph_is_the_model_at_every_length(name):
    model = random_model(**VARIANTS[name])
    graph, settings = LocalizationGraph(model), settings_of(model)
    for n in [*range(1, 12), 16, 17, 18, 31, 32, 33, 34, 39, 40, 41, 57, 100, 171]:
        features = torch.randn(6, n)
        assert padded(n, settings["network"])[0] == needed_length(model.config, [n])
        ready = prepare(features.numpy(), settings)
        outputs = [x.numpy() for x in graph(*(torch.from_numpy(x) for x in ready.values()))]
        expected = model.predict(features[None], torch.ones(1, n, dtype=torch.bool))[0].numpy().in_seconds(CLOCK, 1e6)
        assert lost_rows(decode(outputs, n, settings, 1e6), (expected.segments, expected.labels, expected.scores)) == 0, n


def test_what_lies_beyond_the_length_does_not_matter():
    model = random_model()
    graph, features = LocalizationGraph(model), torch.randn(1, 6, 24)
    for a, b in zip(graph(features, torch.tensor([17])), graph(features * (torch.arange(24) < 17), torch.tensor([17]))): assert torch.equal(a, b)


# ---- files

def blocks_of_readme(folder: Path, names: dict, monkeypatch) -> list:
    """What the variables are after each block of the README was executed in the folder."""
    monkeypatch.chdir(folder), monkeypatch.syspath_prepend(folder)
    found = []
    for block in (folder / "README.md").read_text().split("```python\n")[1:]:
        sys.modules.pop("decode", None)
        exec(block.split("```")[0], variables := dict(names))
        found.append(variables)
    return found


def runs_of(folder: Path) -> dict:
    """Both files of a folder, read anew, ready to run."""
    return {kind: export.runner(kind, file) for kind, file in (("onnx", str(folder / "model.onnx")), ("pt2", torch.export.load(folder / "model.pt2")))}


@needs_onnx
@pytest.mark.parametrize("name", ["refined, with a neck, any length", "streams and positions"])
def test_files_are_the_model(name, tmp_path, monkeypatch):
    model = random_model(**VARIANTS[name])
    header = FeatureHeader("windows", 25., 4., 16., 6, columns=("x", "y"))
    save_model(tmp_path / "model", model, ModelCard(model.config, ("a", "b", "c"), CLOCK, "a protocol", .25, header))
    checked = export_model(tmp_path / "model", tmp_path / "out")
    assert [c.format for c in checked] == ["onnx", "pt2"] and all(c.difference < 1e-5 and c.lost == 0 and c.detections > 100 for c in checked)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"model.onnx", "model.pt2", "export.json", "decode.py", "README.md"}
    settings = json.loads((tmp_path / "out/export.json").read_text())
    assert settings["classes"] == ["a", "b", "c"] and settings["protocol"] == "a protocol" and settings["average_mAP"] == .25
    assert FeatureHeader.from_dict(settings["features"]) == header and FeatureGrid(**settings["clock"]) == CLOCK
    assert settings["checked"] == json.loads(json.dumps([asdict(c) for c in checked])) and max(settings["checked"][0]["tried"]) > model.config.max_seq_len
    assert json.loads(export.onnx_session(str(tmp_path / "out/model.onnx")).get_modelmeta().custom_metadata_map["actloc"]) == settings
    with zipfile.ZipFile(tmp_path / "out/model.pt2") as archive:
        part = lambda end: next(archive.read(name) for name in archive.namelist() if name.endswith(end))
        assert json.loads(part("export.json")) == settings
        assert part("sample_inputs/model.pt") == b"" and all(b'"use_pickle": true' not in part(end) for end in ("weights_config.json", "constants_config.json"))
    runs = runs_of(tmp_path / "out")
    graph, coarsest = LocalizationGraph(model), 2 ** (model.config.levels - 1)
    for steps in (coarsest, 2 * coarsest, 37 * coarsest):                               # as few as can be, and more
        inputs = {"features": np.random.default_rng(0).normal(size=(1, 6, steps)).astype(np.float32), "length": np.array([steps])}
        for run in runs.values():
            for a, b in zip(run(inputs), graph(*(torch.from_numpy(x) for x in inputs.values()))): np.testing.assert_allclose(a, b.numpy(), atol=1e-4)
    for n in (1, 3, 4, 5, 16, 32, 33, 34, 40, 41, 64, 65, 300):
        features = torch.randn(6, n)
        expected = model.predict(features[None], torch.ones(1, n, dtype=torch.bool))[0].numpy().in_seconds(CLOCK, 1e6)
        for kind, run in runs.items():
            assert lost_rows(decode(run(prepare(features.numpy(), settings)), n, settings, 1e6), (expected.segments, expected.labels, expected.scores)) == 0, (kind, n)
    expected = model.predict(features[None], torch.ones(1, n, dtype=torch.bool))[0].numpy().in_seconds(CLOCK, ((n - 1) * 4 + 16) / 25)
    followed = blocks_of_readme(tmp_path / "out", {"features": features.numpy()}, monkeypatch)
    assert len(followed) == 2 and all(lost_rows((v["segments"], v["labels"], v["scores"]), (expected.segments, expected.labels, expected.scores)) == 0 for v in followed)


def action_model(folder, **settings) -> ACAR:
    torch.manual_seed(1)
    config = ACARConfig(backbone=SlowFastConfig(depths=(1, 1, 1, 1), width=8), num_classes=7, poses=3, **{"reduced": 64, "hidden": 64, "depth": 1, **settings})
    model = ACAR(config).eval()
    with torch.no_grad():
        for p in model.head.parameters(): p.normal_(0, 1.5 * p[0].numel() ** -.5 if p.ndim > 1 else 1.)
    save_action_model(folder, model, ActionCard(config, ClipConfig(), LabelMap(tuple(range(1, 8)), tuple("abcdefg")), "a protocol", .5))
    return model


@needs_onnx
@pytest.mark.parametrize("settings", [{"depth": 1}, {"depth": 2, "mlp_1x1": True, "pooled": False}, {"head": "linear"}], ids=["depth 1", "depth 2", "linear"])
def test_action_files_are_the_head(settings, tmp_path, monkeypatch):
    model = action_model(tmp_path / "model", **settings)
    checked = export_model(tmp_path / "model", tmp_path / "out")
    assert all(c.difference < 1e-5 and c.lost == 0 for c in checked)
    about = json.loads((tmp_path / "out/export.json").read_text())
    assert about["classes"] == list("abcdefg") and about["poses"] == 3 and not (tmp_path / "out/decode.py").exists()
    runs, channels = runs_of(tmp_path / "out"), about["inputs"]["features"][1]
    awkward = torch.tensor([[0, 0, 1, 1], [.5, .5, .5, .5], [.99, .2, 1, .21], [-.1, .3, .4, 1.2]])
    for n, (h, w) in ((1, (5, 5)), (3, (16, 16)), (20, (9, 21)), (4, (8, 6))):
        features, boxes = torch.randn(1, channels, h, w), awkward if n == 4 else export.some_boxes(n)
        with torch.no_grad(): logits = model.head(features, None, boxes, torch.zeros(n, dtype=torch.long))
        assert logits.std() > .3
        expected = torch.cat([logits[:, :3].softmax(1), logits[:, 3:].sigmoid()], 1).numpy()
        for kind, run in runs.items():
            np.testing.assert_allclose(run({"features": features.numpy(), "boxes": boxes.numpy()})[0], expected, rtol=0, atol=1e-4, err_msg=f"{kind} {n}")
    followed = blocks_of_readme(tmp_path / "out", {"features": features.numpy(), "boxes": boxes.numpy()}, monkeypatch)
    assert len(followed) == 2 and all(np.allclose(v["scores"], expected, atol=1e-4) and v["best"] == "abcdefg"[expected[0].argmax()] for v in followed)


# ---- alone

def test_decoding_loads_numpy_only():
    program = "import sys; import actloc.actionformer.numpy_decode; print([m for m in ('torch', 'numba', 'plotly', 'onnxruntime') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    source = export.decode_source()
    assert [line for line in source.splitlines() if line.startswith(("import", "from"))] == ["import numpy as np"]
    compile(source, "decode.py", "exec")


# ---- bad input

@pytest.fixture
def folder(tmp_path):
    model = random_model()
    save_model(tmp_path / "model", model, ModelCard(model.config, ("a", "b", "c"), CLOCK))
    return tmp_path


def no_tracing(graph): raise AssertionError("refused too late: the graph was traced")


@pytest.mark.parametrize("formats, words", [((), "no format came"), (("onxx",), "did you mean 'onnx'"), (("pt2", "coreml"), "no format 'coreml'")])
def test_unknown_formats(folder, formats, words, monkeypatch):
    monkeypatch.setattr(export, "traced", no_tracing)
    with pytest.raises(ValueError, match=words): export_model(folder / "model", folder / "out", formats)
    assert not (folder / "out").exists()


def test_missing_packages_are_named(folder, monkeypatch):
    monkeypatch.setattr(export, "traced", no_tracing)
    monkeypatch.setattr(export, "find_spec", lambda name: None if name in ("onnx", "onnxruntime") else find_spec(name))
    with pytest.raises(ValueError, match="onnx, onnxruntime are not installed; pip install onnx onnxruntime"): export_model(folder / "model", folder / "out")
    export.check_formats(("pt2",))
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == "onnxruntime" else find_spec(name))
    export.check_formats(("onnx",), check=False)


def test_folders_that_hold_no_model(folder, monkeypatch):
    monkeypatch.setattr(export, "traced", no_tracing)
    for wrong in (folder, folder / "nowhere"):
        with pytest.raises(ValueError, match="no model.json lies here"): export_model(wrong, folder / "out", ("pt2",))
    with pytest.raises(ValueError, match="own folder"): export_model(folder / "model", folder / "model" / ".", ("pt2",))
    (folder / "model/model.safetensors").write_bytes(b"cut off")
    with pytest.raises(ValueError, match="weights do not fit"): export_model(folder / "model", folder / "out", ("pt2",))
    action_model(folder / "remembers", memory=True)
    with pytest.raises(ValueError, match="feature bank"): export_model(folder / "remembers", folder / "out", ("pt2",))


def test_a_network_that_differs_is_not_written(folder, monkeypatch):
    honest = lambda graph, change: lambda kind, file: lambda inputs: [x.numpy() + change for x in graph(*(torch.from_numpy(x) for x in inputs.values()))]
    model, graph, _ = export.opened(folder / "model")
    monkeypatch.setattr(export, "traced", lambda graph: torch.export.export(torch.nn.ReLU(), (torch.ones(1),)))
    for change in (1e-2, float("nan")):
        monkeypatch.setattr(export, "runner", honest(graph, np.float32(change)))
        with pytest.raises(ValueError, match="differs from the model|not finite"): export_model(folder / "model", folder / "out", ("pt2",))
        assert not (folder / "out").exists()
    monkeypatch.setattr(export, "runner", honest(graph, np.float32(0)))
    (folder / "out").mkdir(), (folder / "out/model.onnx").write_text("of an older export")
    (checked,) = export_model(folder / "model", folder / "out", ("pt2",))
    assert checked.lost == 0 and not (folder / "out/model.onnx").exists()


@pytest.mark.parametrize("features, mask, words", [
    (np.ones((7, 9)), None, "C = 6"), (np.ones((9, 6)), None, "transpose"), (np.ones(6), None, "C = 6"), (np.ones((1, 6, 9)), None, "C = 6"), (np.ones((6, 0)), None, "without a single step"),
    (np.ones((6, 9)), np.arange(9) != 3, "holes"), (np.ones((6, 9)), np.arange(9) > 3, "holes"), (np.ones((6, 9)), np.zeros(9, bool), "without a single step"),
    (np.ones((6, 9)), np.ones(9), "bool mask"), (np.ones((6, 9)), np.ones(8, bool), "bool mask"), (np.full((6, 9), np.inf), None, "infinite")])
def test_the_numpy_door(features, mask, words):
    with pytest.raises(ValueError, match=words): prepare(features, settings_of(random_model()), mask)


def test_outputs_of_another_recording():
    settings = settings_of(random_model())
    good = [np.zeros((1, 56, 3), np.float32), np.zeros((1, 56, 2), np.float32)]
    assert len(decode(good, 28, settings)[0]) == 0
    for wrong in (good[:1], [good[1], good[0]], [good[0][:, :-1], good[1][:, :-1]], [*good, good[1][:, :32]]):
        with pytest.raises(ValueError, match="outputs of shapes"): decode(wrong, 28, settings)
    with pytest.raises(ValueError, match="not finite"): decode([good[0] * np.nan, good[1]], 28, settings)
