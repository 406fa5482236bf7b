"""The command line: every command on tiny data, and the messages for user errors."""

import dataclasses
import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import fastkd.assets
from fastkd import cli
from fastkd.commands import demo as demo_module
from fastkd.commands import predict as predict_module
from fastkd.commands import train as train_module
from fastkd.commands.drawing import class_colour, draw_detections
from fastkd.data import SCENE_CLASSES, generate_scenes
from fastkd.detectors import DetectorConfig, build_detector, save_detector
from fastkd.training import all_recipes, get_recipe

TINY = {"backbone": "resnet18", "width": 0.25, "channels": 32, "head_convs": 1, "num_classes": 10, "norm": "bn"}
SHRINK = "--detector.width 0.25 --detector.channels 32 --detector.head-convs 1 --data.workers 0 --backbone-weights None"
SHRINK += " --schedule.batch-size 4 --runtime.ledger-pairs 0 --runtime.precision float32"


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return generate_scenes(tmp_path_factory.mktemp("cli") / "scenes", train=8, val=4, processes=1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A run directory with an untrained detector without a score threshold."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    folder.mkdir()
    torch.manual_seed(0)
    detector = build_detector(DetectorConfig(score_threshold=0.0, detections_per_image=6, **TINY))
    save_detector(detector, folder / "student.safetensors", SCENE_CLASSES)
    recipe = get_recipe("scenes-retinanet-baseline")
    (folder / "recipe.json").write_text(json.dumps(recipe.to_dict()))
    return folder


def fastkd_says(capsys, *args, code):
    """The output of `fastkd ARGS`, after checking its exit code."""
    try:
        found = cli.main([str(arg) for arg in args])
    except SystemExit as stop:
        found = stop.code
    captured = capsys.readouterr()
    assert found == code, captured.err
    return SimpleNamespace(out=captured.out, err=captured.err, words=" ".join(captured.err.split()))


def error_line(capsys, *args, code=2):
    """The single error line of `fastkd ARGS`."""
    lines = fastkd_says(capsys, *args, code=code).err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("fastkd: error: "), lines
    return lines[0]


def test_help_is_quick_and_lists_all_commands():
    """The help imports no heavy modules."""
    code = (
        "import sys; from fastkd.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit as stop: assert stop.code == 0\n"
        "heavy = {'torch', 'numpy', 'torchvision', 'matplotlib', 'pycocotools', 'onnx'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for command in ("demo", "data", "recipes", "doctor", "train", "convert", "evaluate", "predict", "export", "report"):
        assert f"• {command}" in done.stdout


@pytest.mark.parametrize(
    "command",
    [
        "demo",
        "data scenes",
        "data crowd",
        "recipes",
        "train",
        "convert",
        "evaluate",
        "predict",
        "export",
        "report",
        "info",
    ],
)
def test_every_command_has_help(capsys, command):
    said = fastkd_says(capsys, *command.split(), "--help", code=0)
    assert f"usage: fastkd {command}" in said.out


def test_no_arguments_show_the_help(capsys):
    assert "First time here?" in fastkd_says(capsys, code=0).out


def test_module_can_be_run():
    done = subprocess.run([sys.executable, "-m", "fastkd.cli", "nonsense"], capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr


def test_data_scenes(capsys, tmp_path):
    args = ["data", "scenes", "--root", tmp_path / "s", "--train", 3, "--val", 2, "--seed", 5, "--processes", 1]
    assert "3 training and 2 validation images" in fastkd_says(capsys, *args, code=0).err
    content = json.loads((tmp_path / "s" / "annotations" / "train.json").read_text())
    assert len(content["images"]) == 3
    assert "seed must be" in error_line(capsys, "data", "scenes", "--root", tmp_path / "t", "--seed", -1)


def test_recipes_are_listed(capsys):
    out = fastkd_says(capsys, "recipes", code=0).out
    assert all(name in out for name in all_recipes())
    lines = {line.split("│")[1].strip(): line for line in out.splitlines() if line.count("│") == 6}
    cells = {name: [cell.strip() for cell in line.split("│")[1:-1]] for name, line in lines.items()}
    assert cells["coco-retinanet-icd"] == ["coco-retinanet-icd", "resnet50", "ICD + inherit", "90000", "40.7"]
    assert cells["coco-fcos-r101-dcn-2x-lgd"][1:] == ["resnet101 DCNv2", "LGD", "180000", "46.3"]
    assert cells["scenes-fcos-fgfi"][-1] == "-"


def test_info(capsys):
    out = fastkd_says(capsys, "info", code=0).out
    assert torch.__version__ in out
    names = {name.removeprefix("fastkd::") for name in torch._C._dispatch_get_all_op_names() if "fastkd::" in name}
    ops = {name for name in names if not name.endswith(("_backward", "_capability", "_build"))}
    ops -= {"conv3x3_taps", "seeded_noise"}  # parts of box_paint_conv3x3 and of the queries of ICD
    assert {"focal_loss", "box_pool"} <= ops and {op for op in ops if f"│ {op} " not in out} == set()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("train scenes-retinet-lgd", "nearest: scenes-retinanet-lgd"),
        ("train --resume", "RECIPE must be given first"),
        ("train missing.json", "which does not exist"),
        ("train scenes-retinanet-baseline --data.root nowhere", "nowhere"),
        ("train scenes-retinanet-baseline --device tpu", "--device must be auto, cpu, cuda or cuda:N"),
        ("evaluate nowhere --annotations a.json --images b", "CHECKPOINT must be an existing run directory"),
        ("evaluate {run} --annotations a.json --images b", "--annotations must be an existing file"),
        (
            "evaluate {run} --annotations {scenes}/annotations/val.json --images b",
            "--images must be an existing folder",
        ),
        ("evaluate {run} --annotations {val} --images {scenes}/val --max-detections 0", "--max-detections must be"),
        ("evaluate {scenes} --annotations {val} --images {scenes}/val", "finish the training first"),
        ("evaluate {val} --annotations {val} --images {scenes}/val", "val.json"),
        ("predict {run} nowhere.jpg", "IMAGES must be existing files or folders"),
        ("predict {run} {scenes}", "IMAGES must hold at least one image"),
        ("predict {run}", "IMAGES must be given"),
        ("predict {run} {scenes}/val --score 2", "--score must be in [0, 1]"),
        ("export {run} --height 100 --out {tmp}/e", "multiples of the coarsest stride 128"),
        ("report nowhere", "RUNS must be existing run directories"),
        ("report", "RUNS must name at least one run directory"),
    ],
)
def test_mistakes_are_explained_in_one_line(capsys, tmp_path, scenes, checkpoint, args, message):
    places = {"run": checkpoint, "scenes": scenes, "val": scenes / "annotations" / "val.json", "tmp": tmp_path}
    assert message in error_line(capsys, *args.format(**places).split())


@pytest.mark.parametrize(
    "args",
    [
        "nonsense",
        "predict",
        "train scenes-retinanet-lgd --schedule.steps 0",
        "evaluate x",
        "train scenes-retinanet-lgd --no-such-field 3",
    ],
)
def test_usage_mistakes_exit_with_2(capsys, args):
    assert "Traceback" not in fastkd_says(capsys, *args.split(), code=2).err


def test_debug_shows_the_traceback(monkeypatch):
    with pytest.raises(ValueError, match="nearest"):
        cli.main(["train", "scenes-retinet-lgd", "--debug"])
    monkeypatch.setenv("FASTKD_DEBUG", "1")
    with pytest.raises(ValueError, match="nearest"):
        cli.main(["train", "scenes-retinet-lgd"])


def test_a_failure_of_ours_points_to_debug(capsys, monkeypatch):
    monkeypatch.setattr(cli, "run", lambda args: {}["missing"])
    said = fastkd_says(capsys, "info", code=1)
    assert said.err == "fastkd: error: KeyError: 'missing'\n(the same command with --debug shows the traceback)\n"


def test_a_closed_pipe_is_no_error():
    command = f"{sys.executable} -m fastkd.cli --help | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 0 and "Error" not in done.stderr, done.stderr


def interrupt(*args, **options):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("args", "hint"),
    [
        (["train", "r", "--seed", "1"], "; continue with: fastkd train r --seed 1 --resume"),
        (["train", "r", "--resume"], "; continue with: fastkd train r --resume"),
        (["demo", "--out", "my runs"], "; continue with: fastkd demo --out 'my runs'"),
        (["report", "a", "b"], "; begin anew with: fastkd report a b"),
    ],
    ids=str,
)
def test_ctrl_c_says_how_to_continue(capsys, monkeypatch, args, hint):
    monkeypatch.setattr(cli, "run", interrupt)
    assert fastkd_says(capsys, *args, code=130).err == f"fastkd: interrupted{hint}\n"


@pytest.mark.parametrize("code", [130, 143])
def test_an_interrupted_training_has_its_exit_code(capsys, monkeypatch, code):
    monkeypatch.setattr("fastkd.training.train", lambda *args, **options: SimpleNamespace(exit_code=code))
    said = fastkd_says(capsys, "train", "scenes-retinanet-lgd", code=code)
    assert "everything is saved; continue with: fastkd train scenes-retinanet-lgd --resume" in said.err


def test_train_takes_every_field_of_its_recipe():
    args = "--schedule.steps 7 --method.heads 4 --seed 3 --run-dir here --data.no-flip --optimizer.milestones 0.5 0.75"
    recipe, options = train_module.parse("scenes-retinanet-lgd", args.split())
    plain = get_recipe("scenes-retinanet-lgd")
    expected = dataclasses.replace(
        plain,
        seed=3,
        schedule=dataclasses.replace(plain.schedule, steps=7),
        method=dataclasses.replace(plain.method, heads=4),
        data=dataclasses.replace(plain.data, flip=False),
        optimizer=dataclasses.replace(plain.optimizer, milestones=(0.5, 0.75)),
    )
    assert recipe == expected
    assert str(options["run_dir"]) == "here" and not options["resume"] and options["device"] == "auto"


def test_train_defaults_are_the_recipes_own(tmp_path):
    for name in ("scenes-retinanet-icd", "coco-mask-rcnn-lgd"):
        recipe, options = train_module.parse(name, [])
        assert recipe == get_recipe(name) and options["run_dir"].name == name
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(get_recipe("scenes-fcos-lgd").to_dict()))
    assert train_module.parse(str(path), [])[0] == get_recipe("scenes-fcos-lgd")


def test_recipe_file_of_another_kind_is_refused(capsys, tmp_path):
    (tmp_path / "recipe.json").write_text('{"name": "x"}')
    assert "RECIPE must be a recipe.json of this version" in error_line(capsys, "train", tmp_path / "recipe.json")


def test_recipe_may_stand_anywhere():
    assert train_module.split_recipe(["--seed", "1", "scenes-fcos-lgd", "--resume"]) == (
        "scenes-fcos-lgd",
        ["--seed", "1", "--resume"],
    )
    assert train_module.split_recipe(["mine.json", "--resume"]) == ("mine.json", ["--resume"])
    assert train_module.split_recipe(["--resume"]) == (None, ["--resume"])


def test_train_then_resume(capsys, tmp_path, scenes):
    args = ["train", "scenes-retinanet-baseline", "--data.root", scenes, "--run-dir", tmp_path / "run"]
    args += ["--schedule.steps", 2, "--device", "cpu", *SHRINK.split()]
    said = fastkd_says(capsys, *args, code=0)
    assert "COCO metrics" in said.err + said.out
    assert (tmp_path / "run" / "student.safetensors").is_file()
    assert "pass --resume" in error_line(capsys, *args)
    assert "nothing to do" in fastkd_says(capsys, *args, "--resume", code=0).words


def evaluate_args(checkpoint, scenes):
    places = ["--annotations", scenes / "annotations" / "val.json", "--images", scenes / "val"]
    return ["evaluate", checkpoint, *places, "--workers", 0, "--device", "cpu"]


def test_evaluate(capsys, tmp_path, scenes, checkpoint, shown):
    outputs = ["--out", tmp_path / "m.json", "--detections", tmp_path / "d.json", "--max-detections", 5]
    said = fastkd_says(capsys, *evaluate_args(checkpoint, scenes), *outputs, code=0)
    assert "AP75" in said.out and "striped disc" in said.out
    metrics = json.loads((tmp_path / "m.json").read_text())
    assert metrics["bbox"]["images"] == 4 and {"AR1", "AR5"} <= set(metrics["bbox"])
    assert len(json.loads((tmp_path / "d.json").read_text())) == 24
    assert shown["evaluate"] == ("batches", 1, 1) and shown["write d.json"] == ("entries", None, 24)


def test_evaluate_refuses_data_with_other_classes(capsys, tmp_path, scenes, checkpoint):
    content = json.loads((scenes / "annotations" / "val.json").read_text())
    args = ["evaluate", checkpoint, "--annotations", tmp_path / "other.json", "--images", scenes / "val"]
    content["categories"][0]["name"] = "elephant"
    (tmp_path / "other.json").write_text(json.dumps(content))
    assert "'elephant'" in error_line(capsys, *args)
    content["categories"].append({"id": 999, "name": "eleventh"})
    (tmp_path / "other.json").write_text(json.dumps(content))
    assert "10 classes, got 11" in error_line(capsys, *args)


def test_predict_draws_files_and_folders(capsys, tmp_path, scenes, checkpoint):
    again = tmp_path / "000000.jpg"  # the name of an image in the folder
    Image.new("L", (50, 40), 99).save(again)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    out = tmp_path / "out"
    args = ["predict", checkpoint, scenes / "val", again, broken, "--score", 0, "--out", out, "--device", "cpu"]
    said = fastkd_says(capsys, *args, code=0)
    assert "30 objects in 5 images" in said.err and "1 left out" in said.err and "broken.png" in said.err
    assert {path.name for path in out.glob("*.png")} == {f"00000{i}.png" for i in range(4)} | {"000000-2.png"}
    found = json.loads((out / "predictions.json").read_text())
    for entry in found[str(again)]:
        x1, y1, x2, y2 = entry["box"]
        assert entry["class"] in SCENE_CLASSES and 0 <= x1 <= x2 <= 50 and 0 <= y1 <= y2 <= 40
    fastkd_says(capsys, "predict", checkpoint, again, "--score", 1, "--out", out, "--device", "cpu", code=0)
    assert json.loads((out / "predictions.json").read_text()) == {str(again): []}
    assert "at least one image must be readable" in fastkd_says(capsys, "predict", checkpoint, broken, code=2).err


def test_predict_turns_pictures_upright(tmp_path):
    picture = Image.new("RGB", (40, 20))
    exif = picture.getexif()
    exif[0x0112] = 6  # taken with the camera on its side
    picture.save(tmp_path / "phone.jpg", exif=exif)
    assert predict_module.read_picture(tmp_path / "phone.jpg").size == (20, 40)


def test_drawing_shows_boxes_masks_and_names():
    image = Image.new("RGB", (100, 60))
    masks = np.zeros((2, 60, 100), bool)
    masks[0, 20:40, 10:30] = True
    boxes, labels = np.array([[10, 20, 30, 40], [60, 5, 95, 50]], float), np.array([0, 3])
    picture = draw_detections(image, boxes, np.array([0.9, 0.8]), labels, ["a", "b", "c", "d"], masks)
    pixels = np.asarray(picture)
    assert picture.size == (400, 240)  # small images are enlarged
    assert tuple(pixels[20 * 4, 25 * 4]) == class_colour(0) and tuple(pixels[30 * 4, 60 * 4]) == class_colour(3)
    assert (pixels[35 * 4, 20 * 4] > 0).any()  # inside the mask
    assert (pixels[40 * 4, 80 * 4] == 0).all()  # inside the other box, which has no mask
    assert np.asarray(image).max() == 0  # the original is untouched
    empty = draw_detections(image, np.zeros((0, 4)), np.zeros(0), np.zeros(0, int), ["a"], np.zeros((0, 60, 100), bool))
    assert np.asarray(empty).max() == 0


def test_colours_of_neighbours_differ():
    colours = np.array([class_colour(label) for label in range(11)], float)
    distances = np.abs(colours[:, None] - colours[None]).sum(-1) + 999 * np.eye(11)
    assert distances.min() > 30


@pytest.fixture
def tiny_recipes(monkeypatch):
    """Recipes with detectors of a few thousand weights, trained in float32."""

    def tiny(name):
        recipe = get_recipe(name)
        return dataclasses.replace(
            recipe,
            detector=DetectorConfig(score_threshold=0.01, **TINY),
            backbone_weights=None,
            schedule=dataclasses.replace(recipe.schedule, batch_size=2),
            data=dataclasses.replace(recipe.data, workers=0),
            runtime=dataclasses.replace(recipe.runtime, precision="float32", ledger_pairs=1),
        )

    monkeypatch.setattr("fastkd.training.get_recipe", tiny)


def test_demo_then_again(capsys, monkeypatch, tmp_path, tiny_recipes):
    monkeypatch.setattr(demo_module, "METHODS", ("baseline", "inherit", "icd"))
    monkeypatch.setattr(demo_module, "REPORT_IMAGES", 1)
    monkeypatch.setattr("fastkd.training.precision.fast_precision", lambda device: "float32")
    teacher = tmp_path / "teacher.safetensors"
    torch.manual_seed(1)
    save_detector(build_detector(DetectorConfig(**TINY | {"width": 0.375})), teacher, SCENE_CLASSES)
    data = tmp_path / "data"
    args = ["demo", "--out", tmp_path / "out", "--data", data, "--images", 6, "--val-images", 2, "--steps", 2]
    args += ["--teacher", teacher, "--device", "cpu", "--quick"]
    said = fastkd_says(capsys, *args, code=0)
    for name in ("teacher", "baseline", "icd", "inherit"):
        assert f"│ {name} " in said.out
        assert (tmp_path / "out" / name / "metrics.json").is_file()
    recipes = {
        n: json.loads((tmp_path / "out" / n / "recipe.json").read_text()) for n in ("baseline", "icd", "inherit")
    }
    for key in ("data", "schedule", "seed", "detector", "optimizer"):
        assert recipes["baseline"][key] == recipes["icd"][key] == recipes["inherit"][key]
    assert recipes["icd"]["runtime"]["precision"] == "float32"
    page = (tmp_path / "out" / "report.html").read_text()
    assert "teacher" in page and str(tmp_path / "out" / "report.html") in said.err.replace("\n", "")
    assert "its figures mean little" in page and "its figures mean little" in said.words
    for text in ("by ICD itself", "of it by inheriting the teacher", "ICD pays where a good teacher is at hand"):
        assert text in page and text in said.out
    again = fastkd_says(capsys, *args, code=0)
    assert again.words.count("nothing to do") == 3 and again.out.count("│ icd ") == 1
    other = fastkd_says(capsys, *args, "--seed", 4, code=2)
    assert "holds a run with other settings; choose another --out" in other.words


def test_demo_has_a_run_for_each_seed(capsys, monkeypatch, tmp_path):
    taken = {}
    monkeypatch.setattr(demo_module, "run_all", lambda recipes, *rest, **options: taken.update(recipes))
    monkeypatch.setattr(demo_module, "evaluate_teacher", lambda *args: None)
    monkeypatch.setattr(demo_module, "write_scenes", lambda *args, **options: None)
    fastkd_says(capsys, "demo", "--out", tmp_path, "--seeds", 2, "--seed", 3, code=0)
    assert [name for name in taken if "icd" in name] == ["icd", "icd-seed4"]
    assert [taken[name].seed for name in ("icd", "icd-seed4", "baseline-seed4")] == [3, 4, 4]
    assert "--seeds must be at least 1" in error_line(capsys, "demo", "--seeds", 0)


def test_interrupted_demo_stops(capsys, monkeypatch, tmp_path, scenes):
    trained = []
    monkeypatch.setattr(
        demo_module, "demo_recipes", lambda **options: {"baseline": fake_recipe(), "lgd": fake_recipe()}
    )
    monkeypatch.setattr(demo_module, "evaluate_teacher", lambda *args: None)
    monkeypatch.setattr(demo_module, "write_scenes", lambda *args, **options: None)
    stopped = SimpleNamespace(exit_code=130)
    monkeypatch.setattr("fastkd.training.train", lambda recipe, *args, **options: trained.append(recipe) or stopped)
    said = fastkd_says(capsys, "demo", "--out", tmp_path, code=130)
    assert len(trained) == 1 and f"continue with: fastkd demo --out {tmp_path}" in said.err


def fake_recipe():
    return SimpleNamespace(teacher="teacher.safetensors", schedule=SimpleNamespace(steps=1))


def test_assets_are_verified(tmp_path):
    (tmp_path / "weights.bin").write_bytes(b"abc")
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    (tmp_path / "SHA256SUMS").write_text(f"{digest}  weights.bin\n{digest} *missing.bin\n")
    assert fastkd.assets.asset("weights.bin", tmp_path) == tmp_path / "weights.bin"
    with pytest.raises(ValueError, match=r"shipped files \(missing.bin, weights.bin\), got 'other'"):
        fastkd.assets.asset("other", tmp_path)
    with pytest.raises(ValueError, match="must exist"):
        fastkd.assets.asset("missing.bin", tmp_path)
    (tmp_path / "weights.bin").write_bytes(b"abd")
    with pytest.raises(ValueError, match="damaged or incomplete"):
        fastkd.assets.asset("weights.bin", tmp_path)


def test_every_shipped_asset_is_intact():
    for name in fastkd.assets.checksums():
        assert fastkd.assets.resolve(f"asset:{name}") == fastkd.assets.FOLDER / name
    assert fastkd.assets.resolve("some/path.safetensors").name == "path.safetensors"
