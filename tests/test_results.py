"""Results of many runs: broken and foreign files, crowds, what may not be averaged, writers that are read back, a table that is clicked."""
import csv
import io
import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from actloc.app.results import (as_csv, as_latex, as_markdown, compare_runs, find_run, flatten, group_runs, judged_apart, long_rows, notes_on, paired_interval,
                                per_class, read_runs, record, results, run_rows, sections, short_rows, varying)
from actloc.views.runs import class_differences, metric_against, sortable_page

TRACKED = Path(__file__).parents[1] / "results"


def content(seed=1, average=.5, classes=3, model=None, **about):
    ap = {f"class {k}": {"0.3": average + .01 * k, "0.5": average - .01 * k} for k in range(classes)}
    return {"protocol": "p", "average_mAP": average, "mAP": {"0.3": average, "0.5": average}, "AP": ap, "videos": 3, "instances": 9, "excluded": [],
            "parameters": {"seed": seed, "model": {"window": 9, **(model or {})}}, "cost": {"training_cpu_s": 10. + seed}, "data": {"test": {"sha256": "d"}},
            "environment": {"commit": "c", "machine": "m"}} | about


def put(folder, name, what, file="metrics.json"):
    path = folder / name / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(what if isinstance(what, str) else json.dumps(what))
    return path


def made(name="r", **about):
    return record(name, f"/runs/{name}/metrics.json", content(**about))


# ---- reading

@pytest.mark.parametrize("torn", ["", "{", '{"average_mAP": 0.5, "par', "null", "[]", "3", '"text"', "{}", '{"environment": {}}', "[" * 100_000, "\x00\x01", '{"a": 1, "a": 2}',
                                  '{"environment": {}, "average_mAP": 1, "parameters": 3}', '{"environment": {}, "average_mAP": 1, "AP": [1]}',
                                  '{"environment": {}, "average_mAP": 1, "parameters": null}', '{"environment": {}, "mAP": 0.5, "errors": {}}'])
def test_what_is_no_run_is_named_and_the_others_are_read(tmp_path, torn):
    put(tmp_path, "a/deep/er", content())
    path = put(tmp_path, "b", torn)
    found = read_runs([tmp_path])
    assert [r.name for r in found.runs] == ["a/deep/er"] and list(found.left_out) == [str(path)] and found.left_out[str(path)]
    with pytest.raises(ValueError, match="no runs found.*left out"): read_runs([tmp_path / "b"])


def test_every_prefix_of_a_metrics_json_is_left_out_or_whole(tmp_path):
    text = json.dumps(content())
    put(tmp_path, "whole", text)
    for cut in range(0, len(text), 37):
        put(tmp_path, "torn", text[:cut])
        found = read_runs([tmp_path])
        assert len(found.runs) == 1 and len(found.left_out) == 1


def test_odd_values_of_a_run_do_not_stop_the_table(tmp_path):
    odd = content(average=math.nan) | {"protocol": None, "data": None, "excluded": None, "videos": "many", "cost": {"training_cpu_s": None}, "huge": 10 ** 400,
                                       "AP": {"a": None, "b": {}, "c": {"0.5": None}, "d": {"0.5": "x"}}}
    put(tmp_path, "odd", odd)
    put(tmp_path, "even", content())
    answer = results([tmp_path], html=tmp_path / "h.html")
    assert len(answer.groups) == 2 and "1 of 2 runs have no average_mAP" in answer.text() and not find_run(answer.found.runs, "odd").ap
    assert find_run(answer.found.runs, "odd").judged.protocol == "no protocol named"


def test_names_copies_and_places(tmp_path):
    for root in ("one", "two"): put(tmp_path, f"{root}/same", content(average=.5 if root == "one" else .6))
    found = read_runs([tmp_path / "one", tmp_path / "two"])
    assert [r.name for r in found.runs] == [r.path for r in found.runs]                     # one name for two runs: the paths tell them apart
    put(tmp_path, "two/copy", content(average=.5))
    found = read_runs([tmp_path / "one", tmp_path / "two"])
    assert len(found.runs) == 2 and "copy of" in found.left_out[str(tmp_path / "two/copy/metrics.json")]
    put(tmp_path, "one/.ipynb_checkpoints", content(average=.9))
    (tmp_path / "one/loop").symlink_to(tmp_path / "one")
    assert len(read_runs(tmp_path / "one").runs) == 1                                       # hidden folders and links are not walked
    path = put(tmp_path, "x", content(), "any_name.json")
    assert [r.name for r in read_runs([path]).runs] == [r.name for r in read_runs(str(path.parent)).runs] == ["any_name"]
    assert [r.name for r in read_runs([tmp_path / "one/same/metrics.json"]).runs] == [r.name for r in read_runs([tmp_path / "one/same"]).runs] == ["same"]


def test_a_failed_run_is_not_in_the_mean(tmp_path):
    put(tmp_path, "sweep", {"grid": {"seed": [1, 2, 3]}}, "sweep.json")
    for seed in (1, 2, 3):
        put(tmp_path, f"sweep/seed={seed}", content(seed, .1 * seed))
        put(tmp_path, f"sweep/seed={seed}", {"state": "failed" if seed == 3 else "done", "error": "boom\nboom"}, "status.json")
    found = read_runs([tmp_path])
    assert [r.seed for r in found.runs] == [1, 2] and found.left_out == {str(tmp_path / "sweep/seed=3"): "the run failed: boom boom"}
    assert "2 of the 3 runs" in found.notes[0]
    put(tmp_path, "sweep/seed=2", '{"state', "status.json")                                 # killed while a status was written by something else
    assert len(read_runs([tmp_path]).runs) == 1
    for broken in ("[]", "{}", '{"grid": 3}', '{"grid": {"a": 3}}'):
        put(tmp_path, "sweep", broken, "sweep.json")
        assert read_runs([tmp_path]).notes == ()


def test_nothing_there(tmp_path):
    with pytest.raises(ValueError, match="no such file or folder"): read_runs([tmp_path / "nowhere"])
    with pytest.raises(ValueError, match="no runs found"): read_runs([tmp_path])
    with pytest.raises(ValueError, match="no runs found"): read_runs([])


# ---- groups

@pytest.mark.parametrize("change", [{"protocol": "q"}, {"data": {"test": {"sha256": "e"}}}, {"instances": 10}, {"excluded": ["v"]}, {"simulated": "noise"},
                                    {"mAP": {"0.3": .5, "0.7": .5}}])
def test_runs_judged_differently_are_never_averaged(change):
    groups = group_runs((made("a"), made("b", seed=2), made("c", seed=3, **change)))
    assert sorted(len(g.runs) for g in groups) == [1, 2] and len(judged_apart(groups)) == 1
    assert any(note.startswith("Not judged alike") for note in notes_on(groups, ())) and any("only the judging" in note for note in notes_on(groups, ()))
    assert len({len(row) for row in long_rows(groups, ("average_mAP",))}) == 1


def test_the_protocol_of_the_parameters_is_not_a_second_column():
    runs = [made(name, parameters={"seed": 1, "protocol": name, "out": name}, protocol=name) for name in "ab"]
    assert varying(group_runs(runs)) == () and long_rows(group_runs(runs), ("average_mAP",))[0].count("protocol") == 1


def test_groups_by_a_plain_loop():
    rng = np.random.default_rng(0)
    runs = [made(f"r{i}", seed=int(rng.integers(100)), average=float(rng.random()), model={"window": [5, 9, 19][rng.integers(3)], "width": int(rng.integers(2))}) for i in range(200)]
    groups = group_runs(tuple(runs))
    assert sum(len(g.runs) for g in groups) == 200 and varying(groups) == ("model.window", "model.width")
    for g in groups:
        mine = [r.metrics["average_mAP"] for r in runs if r.setting == g.setting]
        mean = sum(mine) / len(mine)
        assert g.mean("average_mAP") == pytest.approx(mean, abs=1e-12)
        assert g.deviation("average_mAP") == pytest.approx(math.sqrt(sum((v - mean) ** 2 for v in mine) / (len(mine) - 1)), abs=1e-12)
    assert [row[0] for row in long_rows(groups, ("average_mAP",))[1:]] == [5, 5, 9, 9, 19, 19]          # by number, not by letters
    assert [row[0] for row in run_rows(tuple(runs), ("average_mAP",))[1:]] == [r.name for r in runs]


def test_numbers_words_and_missing_values_of_one_parameter_sort():
    runs = [made(str(i), model={"window": w} if w != "none" else {"other": 1}) for i, w in enumerate(["a", 19, None, True, 5., [1, 2], 5])]
    assert sum(len(g.runs) for g in group_runs(runs)) == 7
    assert len(group_runs(runs)) == 6                                                      # 5.0 is 5


# ---- writers

NASTY = ["[2, 2, 5]", "*", "a|b", "50% & $x_1^2$ ~ #{}", "\\textbf{x}", "<script>alert(1)</script>", 'say "hi",\nthen', "`code`", "[a](javascript:b)", "=1+1", "–", ""]


def test_csv_is_read_back():
    rows = [["a", "b"], *([word, .1 + .2] for word in NASTY)]
    back = list(csv.reader(io.StringIO(as_csv(rows))))
    assert [row[0] for row in back] == ["a", *NASTY] and float(back[1][1]) == .1 + .2


def test_markdown_keeps_its_columns():
    lines = as_markdown([["a", "b"], *([word, "x"] for word in NASTY)], "\n# no heading", NASTY).splitlines()
    for line in lines[2:4 + len(NASTY)]: assert len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) == 3, line
    assert "<script" not in "\n".join(lines).replace("\\<", "")


def test_latex_has_nothing_open():
    text = as_latex([["a", "b"], *([word, "x"] for word in NASTY)], "c", ("100 % _",))
    bare = re.sub(r"\\[&%$#_{}]", "", text)
    assert bare.count("{") == bare.count("}") and "%" not in bare and "#" not in bare and bare.count("$") == 0
    for row in text.split("\\hline")[2].strip().splitlines():
        assert row.endswith(r" \\") and not row.startswith(("[", "*")) and len(re.findall(r"(?<!\\)&", row)) == 1


def test_tables_are_whole_or_old(tmp_path, monkeypatch):
    put(tmp_path, "r", content())
    (tmp_path / "t.md").write_text("old")
    with pytest.raises(ValueError, match="no metric"): results([tmp_path], ("nothing",), markdown=tmp_path / "t.md")
    assert (tmp_path / "t.md").read_text() == "old"
    results([tmp_path], csv=tmp_path / "t.csv", markdown=tmp_path / "t.md", latex=tmp_path / "t.tex", html=tmp_path / "t.html")
    assert not list(tmp_path.glob(".*")) and (tmp_path / "t.md").read_text() != "old"
    old = {path: path.read_bytes() for path in tmp_path.glob("t*.*")}
    put(tmp_path, "r2", content(seed=2))
    def full(_): raise OSError(28, "No space left on device")
    monkeypatch.setattr("os.fsync", full)
    for kind in ("csv", "markdown", "latex", "html"):
        with pytest.raises(OSError): results([tmp_path], **{kind: next(path for path in old if path.suffix[1] == kind[0] or kind == "latex" and path.suffix == ".tex")})
    assert {path: path.read_bytes() for path in tmp_path.glob("t*.*")} == old and not list(tmp_path.glob(".*"))


def test_names_from_outside_are_text_on_the_page(tmp_path):
    bad = "<img src=x onerror=alert(1)>"
    put(tmp_path, "a", content(protocol=bad, model={"window": bad}, environment={"commit": bad, "machine": bad}))
    put(tmp_path, "b", content(AP={bad: {"0.5": .5}, "x": {"0.5": .5}}))
    put(tmp_path, "c", content(seed=2, AP={bad: {"0.5": .6}, "x": {"0.5": .5}}))
    answer = results([tmp_path], compare=("b", "c"), html=tmp_path / "h.html")
    assert bad not in (tmp_path / "h.html").read_text() and answer.comparison.rows()[1][0] == bad


# ---- names

def test_unknown_names(tmp_path):
    put(tmp_path, "r", content())
    for words, call in ((r"did you mean 'mAP@0.5'", dict(metrics=("mAP@0.55",))), (r"did you mean 'AP.class 1@0.3'", dict(metrics=("AP.clas 1@0.3",))),
                        ("did you mean 'model.window'", dict(against="model.windw")), ("no run 'x'", dict(compare=("r", "x")))):
        with pytest.raises(ValueError, match=words): results([tmp_path], **call)
    assert results([tmp_path], "mAP@0.5", against="seed").against == ("seed",)


# ---- comparison

def test_a_pair_of_runs_without_or_with_other_classes():
    with pytest.raises(ValueError, match="no AP per class"): compare_runs(made("a"), made("b", AP={}))
    with pytest.raises(ValueError, match="1 only in b"): compare_runs(made("a"), made("b", classes=4))
    with pytest.raises(ValueError, match="same thresholds"): compare_runs(made("a"), made("b", AP={f"class {k}": {"0.5": .5} for k in range(3)}))
    frames = [made(name, AP={"sit": .5, "stand": v, "none": None}, iou=.5, mAP=.4) for name, v in (("a", .2), ("b", .3))]
    assert compare_runs(*frames).second - compare_runs(*frames).first == pytest.approx([0, .1]) and per_class({"AP": {"a": .5}}) == {"a": {"": .5}}
    assert "no interval from one class" in compare_runs(made("a", classes=1), made("b", classes=1)).caption


def test_the_interval_covers_the_mean_and_is_seeded():
    rng = np.random.default_rng(0)
    inside = [low <= .02 <= high for low, high in (paired_interval(rng.normal(.02, .05, 30), 1000, seed) for seed in range(400))]
    assert .90 < np.mean(inside) < .97                                                    # 95 %, a little too narrow for 30 classes
    many = rng.normal(size=3000)                                                          # drawn in several parts
    assert paired_interval(many) == paired_interval(many) != paired_interval(many, seed=1)
    low, high = paired_interval(many)
    assert (high - low) / 2 == pytest.approx(1.96 / math.sqrt(3000), rel=.05)


def test_pairs_matter():
    "Classes differ far more than runs do: an interval that resampled the runs apart from each other would be wide."
    ap = {f"class {k}": k / 60 for k in range(50)}
    a, b = made("a", AP=ap, iou=.5), made("b", AP={name: v + .01 for name, v in reversed(ap.items())}, iou=.5)   # and they need not be in one order
    assert compare_runs(a, b).interval == pytest.approx((.01, .01), abs=1e-9)


# ---- the tracked runs

def test_the_tracked_hapt_runs():
    answer = results([TRACKED], ("average_mAP", "strict.average_mAP"), compare=("hapt_seed1", "hapt_seed2"))
    averages = [json.loads((TRACKED / f"hapt_seed{seed}.json").read_text())["average_mAP"] for seed in (1, 2, 3)]
    g, = (g for g in answer.groups if len(g.runs) == 3)
    assert [r.seed for r in g.runs] == [1, 2, 3] and g.mean("average_mAP") == pytest.approx(np.mean(averages), abs=1e-12)
    change = answer.comparison.second - answer.comparison.first
    assert change.mean() == pytest.approx(averages[1] - averages[0], abs=1e-9)            # mAP is the mean of AP
    assert {Path(p).name for p in answer.found.left_out} >= {"kernel_race_cpu.json", "evaluation_race_cpu.json"}


# ---- pictures and page

def test_crowds_stay_small():
    rng = np.random.default_rng(0)
    figure = metric_against(rng.integers(1, 9, 500).tolist(), rng.random(500).tolist(), [f"line {i % 30}" for i in range(500)], [f"r{i}" for i in range(500)], "p", "m")
    assert len(figure.data) == 20 and "10 of 30 lines shown" in figure.layout.title.text and len(figure.to_json()) < 60_000
    assert len(class_differences([f"c{k}" for k in range(3000)], rng.random(3000), rng.random(3000), ("a", "b"), (0., .1)).to_json()) < 20_000


def test_lines_do_not_mix_what_differs():
    runs = tuple(made(f"{w}{d}{s}", seed=s, average=.1 * d + .01 * w, model={"window": w, "width": d}) for w in (5, 9) for d in (1, 2) for s in (1, 2))
    from actloc.app.results import Found, Results, figures
    answer = Results(Found(runs, {}, ()), group_runs(runs), ("average_mAP",), ("model.window",), None)
    lines = [t for t in figures(answer)[0].data if t.mode == "lines"]
    assert {t.name: list(t.y) for t in lines} == {"model.width=1": [.15, .19], "model.width=2": [.25, .29]}
    assert [heading for heading, _, _ in sections(answer)] == ["Means over seeds", "average_mAP against model.window", "Every run", "The same in all runs"]


CLICKS = """<script>
const read = () => [...document.querySelectorAll("tbody tr")].map(row => row.cells[0].textContent).join(" "), heads = document.querySelectorAll("th button"), seen = [];
for (const i of [1, 1, 2, 0]) { heads[i].click(); seen.push(read() + " " + heads[i].parentNode.getAttribute("aria-sort")); }
document.body.replaceChildren(seen.join(";"));
</script>"""


@pytest.mark.skipif(not shutil.which("chromium"), reason="no browser here")
def test_a_click_sorts(tmp_path):
    page = sortable_page("t", [("a", "", [["name", "value", "word"], ["r10", 1e-5, "w19"], ["r2", None, "w9"], ["r1", .5, None], ["r3", 10, "a"]])])
    (tmp_path / "page.html").write_text(page.replace("</body>", CLICKS + "</body>"))
    done = subprocess.run(["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", f"file://{tmp_path}/page.html"],
                          capture_output=True, text=True, timeout=120)
    seen = re.search(r"<body>(.*?)</body>", done.stdout, re.S).group(1).strip().split(";")
    assert seen == ["r10 r1 r3 r2 ascending", "r3 r1 r10 r2 descending", "r3 r2 r10 r1 ascending", "r1 r2 r3 r10 ascending"]      # what is missing is last both ways


def test_names_of_leaves():
    assert flatten({"a": {"0.5": 1, "b.c": {"1": 2}}}) == {"a@0.5": 1, "a.b.c@1": 2} and flatten({"a": {"5": 1}}, at=".") == {"a.5": 1}
    assert short_rows(group_runs((made(),)), ("average_mAP",))[1][0] == "0.5000"
