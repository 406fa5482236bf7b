"""The report: runs with known numbers, hostile names, missing files, real runs."""

import base64
import dataclasses
import functools
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from draws import few
from PIL import Image
from rich.console import Console
from safetensors.torch import save_file

from fastkd import report
from fastkd.data import generate_scenes
from fastkd.detectors import DetectorConfig, build_detector, save_detector
from fastkd.distillers import LGD
from fastkd.report import numbers
from fastkd.report import runs as report_runs
from fastkd.report.runs import baseline_of, difference_in_conditions, load_run
from fastkd.training import get_recipe, train
from fastkd.training.methods import kinds

write_report = functools.partial(report.write_report, methods=kinds())
load_runs = functools.partial(report_runs.load_runs, methods=kinds())

EVIL = '</td><script>alert(1)</script><img src=x onerror="alert(2)">'
DASH, APOSTROPHE = "\u2013", "\u2019"
VOID = {"meta", "img", "br"}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return generate_scenes(tmp_path_factory.mktemp("report") / "scenes", train=8, val=5, processes=1)


class Page(HTMLParser):
    """Collects what a page contains and insists on balanced tags."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data)

    def pictures(self):
        return [base64.b64decode(v.split(",", 1)[1]) for n, v in self.attributes if n == "src"]

    def assert_self_contained(self):
        assert not {"script", "link", "iframe", "object"} & set(self.tags)
        assert not [name for name, _ in self.attributes if name.startswith("on")]
        assert all(value.startswith("data:image/png;base64,") for name, value in self.attributes if name == "src")
        assert all(value.startswith("#") for name, value in self.attributes if name == "href")
        assert "url(" not in dict(self.attributes).get("style", "")


def table_rows(text):
    """{first cell: all cells} of every row of every table."""
    rows = {}
    for row in re.findall(r"<tr>(.*?)</tr>", text, flags=re.S):
        cells = [re.sub(r"<[^>]+>", "", cell) for cell in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row, flags=re.S)]
        rows.setdefault(cells[0], cells)
    return rows


def fake_run(folder, root, *, method=None, teacher=None, inherit=False, ap=30.0, seed=0, steps=40, ledger=None):
    """A run directory as the trainer writes it, with numbers that the tests know."""
    recipe = get_recipe("scenes-retinanet-baseline").to_dict() | {"teacher": teacher, "inherit": inherit, "seed": seed}
    recipe["method"] = None if method is None else get_recipe(f"scenes-retinanet-{method}").to_dict()["method"]
    recipe["data"] = recipe["data"] | {"root": str(root)}
    recipe["schedule"] = recipe["schedule"] | {"steps": steps}
    truth = json.loads((root / "annotations" / "val.json").read_text())
    names = [category["name"] for category in truth["categories"]]
    box = {"AP": ap, "AP50": ap + 9, "AP75": ap - 9, "APs": ap - 5, "APm": ap + 5, "APl": None}
    metrics = {
        "bbox": box | {"images": 5, "instances": 9, "per_class": {name: box | {"instances": 2} for name in names}},
        **{"steps": steps, "seed": seed, "seconds": 77.0, "commit": "0123456789abcdef", "finished": True},
    }
    found = [
        {"image_id": a["image_id"], "category_id": a["category_id"], "bbox": a["bbox"], "score": 0.9}
        for a in truth["annotations"][::2]
    ]
    found += [
        {"image_id": image["id"], "category_id": truth["categories"][0]["id"], "bbox": [2, 2, 9, 9], "score": 0.95}
        for image in truth["images"]
    ]
    log = [
        {"step": step, "loss": 2.0 / step, "losses": {"classification": 1.0 / step}, "lr": {"student": 0.01}}
        for step in range(10, steps + 1, 10)
    ]
    folder.mkdir(parents=True)
    for name, content in (("recipe", recipe), ("metrics", metrics), ("ledger", ledger or {}), ("detections", found)):
        (folder / f"{name}.json").write_text(json.dumps(content))
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    return folder


def fake_ledger(student, extra, teacher_seconds=None, steps=40, spread=None):
    """A ledger as fastkd.training.cost.ledger.totals gives it; the interval of the extra time is +- spread."""
    whole = extra * steps + (teacher_seconds or 0.0)
    ends = None if spread is None else [extra - spread, extra + spread]
    run_ends = ends and [end * steps for end in ends]
    return {
        "student": {"seconds_per_step": student, "peak_bytes": 10 * 2**20},
        "with_method": {"seconds_per_step": student + extra, "peak_bytes": 14 * 2**20},
        "extra": {
            "seconds_per_step": extra,
            "seconds_interval": ends,
            "ratio": 1 + extra / student,
            "ratio_interval": ends and [1 + end / student for end in ends],
            "peak_bytes": 4 * 2**20,
        },
        "device": "cpu",
        "run": {
            "steps": steps,
            "student_seconds": student * steps,
            "extra_seconds": extra * steps,
            "extra_interval": run_ends,
        },
        "teacher": None if teacher_seconds is None else {"file": "t", "seconds": teacher_seconds},
        "extra_with_teacher": {
            "seconds": whole,
            "seconds_per_step": whole / steps,
            "interval": run_ends and [end + (teacher_seconds or 0.0) for end in run_ends],
        },
    }


def test_gains_controls_and_cost(scenes, tmp_path, shown):
    teacher = str(tmp_path / "teacher" / "student.safetensors")
    runs = [
        fake_run(tmp_path / "teacher", scenes, ap=48.0),
        fake_run(tmp_path / "plain", scenes, ap=30.0, ledger=fake_ledger(0.5, 0.0)),
        fake_run(tmp_path / "plain1", scenes, ap=10.0, seed=1),
        fake_run(tmp_path / "kept", scenes, ap=33.5, teacher=teacher, inherit=True),
        fake_run(tmp_path / "lgd", scenes, method="lgd", ap=32.25, ledger=fake_ledger(0.5, 0.1, spread=0.06)),
        fake_run(tmp_path / "icd", scenes, method="icd", ap=37.0, teacher=teacher, inherit=True),
        fake_run(
            tmp_path / "fgfi",
            scenes,
            method="fgfi",
            ap=29.0,
            teacher=teacher,
            ledger=fake_ledger(0.5, 0.2, 12.0, spread=0.05),
        ),
    ]
    out = write_report(runs, tmp_path / "new" / "r.html", title="T & co", images=3, picture_dir=tmp_path / "pictures")
    judged = shown["judge the detections"]
    assert judged[0] == "images" and judged[1] == judged[2] > 0 and "look into the networks" in shown
    text = out.read_text()
    page = Page(text)
    page.assert_self_contained()
    rows = table_rows(text)
    assert rows["run"][2:5] == ["AP", "gain", "gain over inheriting alone"]
    assert [rows[name][1:5] for name in ("teacher", "plain", "kept", "lgd", "icd", "fgfi", "plain1")] == [
        ["teacher", "48.0", DASH, DASH],
        ["baseline", "30.0", DASH, DASH],
        ["inheriting alone", "33.5", "+3.5", DASH],
        ["LGD", "32.2", "+2.2", DASH],
        ["ICD + inheriting", "37.0", "+7.0", "+3.5"],
        ["FGFI", "29.0", "-1.0", DASH],
        ["baseline", "10.0", DASH, DASH],
    ]
    extra = "+0.200 s: +40 % (+30 .. +50)"
    assert ["0.500 s", "0.700 s", extra, "+0.500 s", "10 MiB", "14 MiB", "+4 MiB (+40 %)"] in [
        [re.sub(r"<[^>]+>", "", cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", row)][1:]
        for row in re.findall(r"<tr>(.*?)</tr>", text)
    ]
    assert "T &amp; co" in text and "0123456789ab" in text
    files = sorted((tmp_path / "pictures").glob("*.png"))
    assert [file.read_bytes() for file in files] == page.pictures() and len(files) > 20
    for picture in page.pictures():
        Image.open(io.BytesIO(picture)).load()
    assert out.stat().st_size < 8e6
    for heading in (
        "Results",
        "By size and class",
        "Training curves",
        "What it cost",
        "Worst false positives",
        "Misses",
    ):
        assert f". {heading}</h2>" in text
    assert text.count("icd: nothing to show, ValueError: student.safetensors is missing") == 1


@pytest.mark.parametrize(
    ("spread", "itself", "with_teacher"),
    [
        (0.02, "lgd (4.0 s, 3.2 .. 4.8) and fgfi (8.0 s, 7.2 .. 8.8) differ; lgd takes less", "lgd takes less"),
        (0.06, "cannot tell lgd (4.0 s, 1.6 .. 6.4) and fgfi (8.0 s, 5.6 .. 10.4) apart", "lgd takes less"),
        (None, "lgd (4 s) and fgfi (8 s): not compared", "not compared"),
    ],
    ids=["narrow", "wide", "unknown"],
)
def test_costs_are_compared_as_far_as_their_intervals_allow(scenes, tmp_path, spread, itself, with_teacher):
    teacher = str(tmp_path / "teacher" / "student.safetensors")
    runs = [
        fake_run(tmp_path / "lgd", scenes, method="lgd", ledger=fake_ledger(0.5, 0.1, spread=spread)),
        fake_run(
            tmp_path / "fgfi", scenes, method="fgfi", teacher=teacher, ledger=fake_ledger(0.5, 0.2, 12.0, spread=spread)
        ),
    ]
    text = write_report(runs, tmp_path / "r.html", images=0).read_text()
    lines = re.findall(r"<p>(Extra time [^<]*)</p>", text)
    assert [line.split(" lgd")[0].split(":")[0][:25] for line in lines] == [
        "Extra time in training it",
        "Extra time with the teach",
    ]
    assert itself in lines[0] and with_teacher in lines[1]
    assert (" less" in lines[0]) == (spread == 0.02)


def test_what_makes_a_baseline(scenes, tmp_path):
    plain = fake_run(tmp_path / "a" / "run", scenes)
    longer = fake_run(tmp_path / "b" / "run", scenes, steps=80)
    lgd = fake_run(tmp_path / "lgd", scenes, method="lgd")
    other_seed = fake_run(tmp_path / "lgd1", scenes, method="lgd", seed=1)
    runs = load_runs([longer, plain, lgd, other_seed])
    assert [run.name for run in runs] == ["b/run", "a/run", "lgd", "lgd1"]
    assert baseline_of(runs[2], runs).name == "b/run"  # the first that was given
    assert difference_in_conditions(runs[2], runs[0]) == ["schedule"]
    assert difference_in_conditions(runs[2], runs[1]) == []
    assert baseline_of(runs[0], runs) is None and baseline_of(runs[3], runs) is None
    shipped = fake_run(tmp_path / "kept", scenes, teacher="asset:scenes-retinanet-teacher.safetensors", inherit=True)
    measured = fake_run(tmp_path / "teacher", scenes)
    for name in ("ledger.json", "log.jsonl"):
        (measured / name).unlink()
    runs = load_runs([plain, shipped, measured])
    assert [run.role for run in runs] == ["baseline", "inheriting alone", "teacher"]
    assert runs[2].notes == []  # a teacher that came trained has neither
    metrics = json.loads((lgd / "metrics.json").read_text())
    (lgd / "metrics.json").write_text(json.dumps(metrics | {"commit": "fedcba"}))
    text = write_report([longer, lgd, other_seed], tmp_path / "r.html", images=0).read_text()
    assert "lgd and run differ in schedule" in text and "lgd1 has no baseline here" in text
    assert "different commits (0123456789ab, fedcba)" in text


FILES = ["recipe.json", "metrics.json", "ledger.json", "detections.json", "log.jsonl"]


@pytest.mark.parametrize("content", [None, "", "{", "[]", '"text"', '{"step": "x"}'], ids=str)
@pytest.mark.parametrize("name", FILES)
def test_a_missing_or_broken_file_is_named(scenes, tmp_path, name, content):
    run = fake_run(tmp_path / "run", scenes)
    if content is None:
        (run / name).unlink()
    else:
        (run / name).write_text(content)
    wrong_kind = content == ('{"step": "x"}' if name == "detections.json" else "[]")
    broken = content is None or wrong_kind or (name.endswith(".json") and content in ("", "{", '"text"'))
    if name == "log.jsonl":
        broken = content is None or content in ("{", "[]", '"text"')
    notes = load_run(run).notes
    assert len(notes) == broken and all(note.startswith(name) for note in notes)
    if content in (None, "[]") and name in few(FILES):  # a page takes a second
        page = Page(write_report(run, tmp_path / "r.html", images=1).read_text())
        page.assert_self_contained()
        assert any(name in text and str(run) in text for text in page.text) == broken


def test_an_empty_run_directory_gives_a_page_of_notes(tmp_path):
    (tmp_path / "empty").mkdir()
    text = write_report([tmp_path / "empty"], tmp_path / "r.html").read_text()
    Page(text).assert_self_contained()
    for name in FILES:
        assert f"{name} is missing" in text
    assert "No run has an AP yet" in text and "no curves" in text and "No pictures of images" in text


def test_bad_entries_are_left_out_and_counted(scenes, tmp_path):
    run = fake_run(tmp_path / "run", scenes)
    good = {"image_id": 1, "category_id": 1, "bbox": [0, 0, 1e9, 1e9], "score": 0.5}
    bad = [3, {}, good | {"score": float("nan")}, good | {"bbox": [0, 0, 1]}, good | {"image_id": "1"}]
    (run / "detections.json").write_text(json.dumps([good, *bad]))
    (run / "log.jsonl").write_text('{"step": 10, "loss": 1.0}\nhalf a li\n[1]\n{"step": 20, "loss": NaN}\n')
    loaded = load_run(run)
    assert len(loaded.detections) == 1 and loaded.detections.scores.tolist() == [0.5] and len(loaded.log) == 2
    assert "detections.json has 5 entries" in " ".join(loaded.notes) and "log.jsonl has 2 line" in " ".join(
        loaded.notes
    )
    Page(write_report([run], tmp_path / "r.html", images=1).read_text()).assert_self_contained()


def with_hostile_names(scenes, root):
    """A copy of the scenes whose class names are markup, formulas and control characters."""
    shutil.copytree(scenes, root)
    for file in (root / "annotations").iterdir():
        truth = json.loads(file.read_text())
        names = [EVIL, "$x^2$ \\frac{", "a\u202eb\x00\n c", "x" * 500, "_hidden", "&lt;b&gt;"]
        for category, name in zip(truth["categories"], names):
            category["name"] = name
        file.write_text(json.dumps(truth))
    return root


@pytest.fixture(scope="module")
def hostile_page(scenes, tmp_path_factory):
    """A report of a run whose class names, files, losses, commit and title are markup and control characters."""
    tmp_path = tmp_path_factory.mktemp("hostile")
    root = with_hostile_names(scenes, tmp_path / "data")
    (root / "val" / "broken<b>.jpg").write_bytes(b"no image")
    truth = json.loads((root / "annotations" / "val.json").read_text())
    truth["images"][0]["file_name"] = "broken<b>.jpg"
    for name in ("train", "val"):
        (root / "annotations" / f"{name}.json").write_text(json.dumps(truth))
    run = fake_run(tmp_path / "run<script>$_$", root)
    metrics = json.loads((run / "metrics.json").read_text()) | {"commit": EVIL, "seed": EVIL}
    (run / "metrics.json").write_text(json.dumps(metrics))
    (run / "log.jsonl").write_text(json.dumps({"step": 1, "losses": {EVIL: 1.0}, "lr": {"$\\bad{": 0.1}}) + "\n")
    return write_report([run], tmp_path / "r.html", title=EVIL, images=5, command=EVIL)


def test_hostile_names_are_text(hostile_page):
    text = hostile_page.read_text()
    page = Page(text)
    page.assert_self_contained()
    assert "&lt;script&gt;alert(1)" in text and "\u202e" not in text and "\x00" not in text and "x" * 401 not in text
    assert "broken&lt;b&gt;.jpg: " in text


# Counts scripts, images that do not show, and closed sections; the page's own policy allows no script at all.
PROBE = """<script nonce="probe">onload = () => document.title = [document.scripts.length, document.images.length,
[...document.images].filter(image => !image.naturalWidth).length,
document.querySelectorAll("details:not([open])").length,
document.querySelectorAll("[onerror]").length].join(" ")</script>"""


@pytest.fixture(scope="module")
def real_runs(scenes, tmp_path_factory):
    """Runs of three steps: teacher, LGD and ICD, on data with hostile class names."""
    folder = tmp_path_factory.mktemp("real")
    root = with_hostile_names(scenes, folder / "data")
    for name in ("teacher", "lgd", "icd"):
        recipe = get_recipe(f"scenes-retinanet-{name}")
        recipe = dataclasses.replace(
            recipe,
            detector=dataclasses.replace(recipe.detector, width=0.125, channels=16, head_convs=1, score_threshold=0.0),
            data=dataclasses.replace(recipe.data, root=str(root), workers=0, short_sides=(64,), val_short_side=64),
            schedule=dataclasses.replace(recipe.schedule, steps=3, batch_size=2),
            runtime=dataclasses.replace(recipe.runtime, log_every=1, ledger_pairs=1, eval_every=2),
            teacher=None if recipe.teacher is None else str(folder / "teacher" / "student.safetensors"),
            backbone_weights=None,
        )
        train(recipe, folder / name, device="cpu", console=Console(file=io.StringIO()))
    return [folder / name for name in ("teacher", "lgd", "icd")]


@pytest.fixture(scope="module")
def page_of_real_runs(real_runs):
    folder = real_runs[0].parent
    return write_report(real_runs, folder / "r.html", images=2, picture_dir=folder / "pictures")


def browse(page, folder):
    """Opens a page in Chromium without a window; its output is the document and the console's messages."""
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    command += ["--disable-background-networking", "--enable-logging=stderr", "--virtual-time-budget=5000"]
    command += [f"--user-data-dir={folder}", "--dump-dom", f"file://{page}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """`browse`, where Chromium is installed and starts."""
    folder = tmp_path_factory.mktemp("browser")
    if not shutil.which("chromium"):
        pytest.skip("Chromium is not installed")
    (folder / "empty.html").write_text("<title>it starts</title>")
    try:
        done = browse(folder / "empty.html", folder)
    except subprocess.TimeoutExpired:
        pytest.skip("Chromium does not start here in two minutes")
    if "it starts" not in done.stdout:
        pytest.skip(f"Chromium does not start here: {done.stderr[-300:]}")
    return browse


@pytest.mark.parametrize("written", ["hostile_page", "page_of_real_runs"])
def test_a_browser_shows_every_section_and_runs_nothing(written, tmp_path, request, browser):
    text = request.getfixturevalue(written).read_text()
    text = text.replace("<details>", "<details open>").replace(
        "default-src 'none'", "default-src 'none'; script-src 'nonce-probe'"
    )
    (tmp_path / "probed.html").write_text(text.replace("</body>", f"{PROBE}</body>"))
    done = browser(tmp_path / "probed.html", tmp_path)
    scripts, images, broken, closed, handlers = map(int, re.search(r"<title>([\d ]+)</title>", done.stdout)[1].split())
    assert (scripts, broken, closed, handlers) == (1, 0, 0, 0) and images > 3
    assert "CONSOLE" not in done.stderr, done.stderr


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="write_report: run_dirs must name at least one run"):
        write_report([], tmp_path / "r.html")
    with pytest.raises(ValueError, match=r"write_report: run_dirs must be folders .* got .*absent"):
        write_report([tmp_path / "absent"], tmp_path / "r.html")
    for images in (-1, 1.5, True):
        with pytest.raises(ValueError, match="write_report: images must be an integer"):
            write_report([tmp_path], tmp_path / "r.html", images=images)
    assert not (tmp_path / "r.html").exists()


def test_inside_a_mask_rcnn(scenes, tmp_path):
    """LGD with instance masks, and a pyramid from P2 on."""
    run = fake_run(tmp_path / "run", scenes, method="lgd")
    config = DetectorConfig("mask_rcnn", 10, "resnet18", width=0.125, channels=16, box_head_channels=32)
    save_detector(build_detector(config), run / "student.safetensors", [f"class {k}" for k in range(10)])
    save_file(LGD(10, 16, context=False, use_masks=True).state_dict(), run / "method.safetensors")
    recipe = json.loads((run / "recipe.json").read_text())
    recipe["method"] |= {"context": False, "use_masks": True}
    (run / "recipe.json").write_text(json.dumps(recipe))
    text = write_report(run, tmp_path / "r.html", images=1).read_text()
    assert "LGD features" in text and "nothing to show" not in text
    recipe["method"] |= {"heads": 5}
    (run / "recipe.json").write_text(json.dumps(recipe))
    assert "run: nothing to show, ValueError: LGD" in write_report(run, tmp_path / "r.html", images=1).read_text()


def test_report_of_real_runs(real_runs, page_of_real_runs, tmp_path):
    """The report reads the trainer's output: teacher, LGD and ICD."""
    text, runs = page_of_real_runs.read_text(), real_runs
    page = Page(text)
    page.assert_self_contained()
    assert "What is missing" not in text and "nothing to show" not in text
    names = " ".join(file.name for file in (page_of_real_runs.parent / "pictures").iterdir())
    for part in ("lgd_features", "icd_attention", "training_curves", "cost_time", "cost_memory", "truth"):
        assert part in names
    curves = numbers.curve_points(load_run(runs[1]))
    assert {"total loss", "learning rate: student", "loss: lgd_distill", numbers.AP_PANEL} <= set(curves)
    assert curves["total loss"][0].tolist() == [1, 2, 3]
    assert curves[numbers.AP_PANEL][0].tolist() == [1, 2, 3]  # LGD ends after step 1, where it is evaluated
    # a teacher that has moved is named, and nothing else is lost
    weights = runs[0] / "student.safetensors"
    weights.rename(weights.with_suffix(".moved"))
    text = write_report(runs, tmp_path / "r.html", images=1).read_text()
    weights.with_suffix(".moved").rename(weights)
    assert "icd: nothing to show" in text and "teacher/student.safetensors is missing" in text
    assert "LGD features" in text
