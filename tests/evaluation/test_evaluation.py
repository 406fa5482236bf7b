"""COCO metrics against cases computed by hand, in one process and in two."""

import contextlib
import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from pycocotools import mask as mask_codec
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from rich.console import Console

from fastkd.evaluation import CocoEvaluator, class_table, coco, evaluate, print_metrics, size_table, summary_table
from fastkd.evaluation.coco import Found, encode_masks, scale_boxes
from fastkd.types import Batch, Detections

NAMES, CATEGORIES = ["cat", "dog", "emu"], [7, 90, 13]  # sparse ids, not in order; no object is an emu
# image id -> (label, xywh): one small, one medium, one large object, then four equal ones
TRUTH = {
    100: [(0, [10, 10, 20, 20]), (1, [40, 10, 50, 50])],
    5: [(0, [0, 50, 100, 100])],
    42: [(1, [0, 0, 40, 40]), (1, [50, 0, 40, 40]), (1, [100, 0, 40, 40]), (1, [0, 100, 40, 40])],
    8: [],
}


def write_dataset(folder, truth=TRUTH, size=200, masks=False, **extra):
    """A COCO file of `truth` and what an evaluator reads of a data set. Annotation ids start at 0 on purpose."""
    annotations = []
    for image_id, objects in truth.items():
        for label, (x, y, w, h) in objects:
            entry = {"id": len(annotations), "image_id": image_id, "category_id": CATEGORIES[label]}
            entry |= {"bbox": [x, y, w, h], "area": w * h, "iscrowd": 0}
            if masks:
                entry["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            annotations.append(entry)
    content = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": size, "height": size} for i in truth],
        "categories": [{"id": c, "name": n} for c, n in zip(CATEGORIES, NAMES)],
        "annotations": annotations + extra.get("annotations", []),
    }
    path = folder / "truth.json"
    path.write_text(json.dumps(content))
    return SimpleNamespace(annotation_file=path, image_ids=list(truth), class_names=NAMES, category_ids=CATEGORIES)


def batch_of(image_ids, size=200, original=200):
    count = len(image_ids)
    return Batch(
        images=torch.zeros(count, 3, 4, 4),
        image_sizes=torch.full((count, 2), size),
        boxes=torch.zeros(0, 4),
        labels=torch.zeros(0, dtype=torch.int64),
        image_index=torch.zeros(0, dtype=torch.int64),
        counts=[0] * count,
        image_ids=list(image_ids),
        original_sizes=torch.full((count, 2), original),
    )


def detections(objects, scores=None, scale=1.0, masks=None):
    boxes = torch.tensor([box for _, box in objects], dtype=torch.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    scores = torch.tensor(scores if scores is not None else [0.9] * len(objects), dtype=torch.float32)
    return Detections(boxes * scale, scores, torch.tensor([label for label, _ in objects], dtype=torch.int64), masks)


def box_masks(objects, size):
    planes = torch.zeros(len(objects), size, size, dtype=torch.bool)
    for plane, (_, (x, y, w, h)) in zip(planes, objects):
        plane[y : y + h, x : x + w] = True
    return planes


def measure(dataset, found, **options):
    evaluator = CocoEvaluator(dataset, **options)
    evaluator.add(batch_of(found), list(found.values()))
    return evaluator.compute()


def test_perfect_detections_have_ap_100(tmp_path):
    metrics = measure(write_dataset(tmp_path), {i: detections(o) for i, o in TRUTH.items()})
    assert set(metrics) == {"bbox"}
    values = metrics["bbox"]
    for name in ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100", "ARs", "ARm", "ARl"):
        assert values[name] == pytest.approx(100), name
    assert (values["images"], values["instances"]) == (4, 7)
    assert values["AR1"] == pytest.approx(100 * (1 + 2 / 5) / 2)  # one box per image: both cats, 2 of the 5 dogs
    assert values["per_class"]["cat"]["AP"] == pytest.approx(100)
    assert [values["per_class"][name]["instances"] for name in NAMES] == [2, 5, 0]


def test_half_of_a_class_missed(tmp_path):
    truth = {42: TRUTH[42]}
    values = measure(write_dataset(tmp_path, truth), {42: detections(TRUTH[42][:2])})["bbox"]
    assert values["AP"] == pytest.approx(100 * 51 / 101)  # precision 1 at the 51 recall points 0.00 .. 0.50
    assert values["AR100"] == pytest.approx(50)


def test_a_better_scored_mistake_halves_the_precision(tmp_path):
    truth = {5: TRUTH[5]}
    found = detections([(0, [150, 0, 40, 40]), *TRUTH[5]], scores=[0.9, 0.8])
    assert measure(write_dataset(tmp_path, truth), {5: found})["bbox"]["AP"] == pytest.approx(50)
    found = detections([(0, [150, 0, 40, 40]), *TRUTH[5]], scores=[0.7, 0.8])  # below all hits: free
    assert measure(write_dataset(tmp_path, truth), {5: found})["bbox"]["AP"] == pytest.approx(100)


def test_localisation_counts_by_iou_thresholds(tmp_path):
    truth = {5: [(0, [0, 0, 100, 100])]}
    values = measure(write_dataset(tmp_path, truth), {5: detections([(0, [0, 0, 100, 62])])})["bbox"]  # IoU 0.62
    assert values["AP"] == pytest.approx(30)  # 0.50, 0.55, 0.60 of ten
    assert values["AP50"] == pytest.approx(100)
    assert values["AP75"] == 0


def test_wrong_class_is_wrong(tmp_path):
    truth = {5: TRUTH[5]}
    values = measure(write_dataset(tmp_path, truth), {5: detections([(1, TRUTH[5][0][1])])})["bbox"]
    assert values["AP"] == 0


def plain_pycocotools(truth, results, max_detections):
    """pycocotools' tables of all classes at once, as its own examples compute them."""
    runner = COCOeval(truth, truth.loadRes(results), "bbox")
    runner.params.maxDets = list(max_detections)
    runner.evaluate()
    runner.accumulate()
    return runner.eval["precision"], runner.eval["recall"]


@pytest.mark.parametrize("max_detections", [(1, 10, 100), (3,)], ids=str)
def test_classes_one_by_one_equal_pycocotools_at_once(tmp_path, max_detections):
    """The tables of precision and recall are equal bit by bit, with crowds, ties and images without objects."""
    rng = np.random.default_rng(4)
    ids = [3, 8, 21, 40]  # of the last no image holds an object
    size, annotations, results = 128, [], []
    for image_id in range(1, 41):
        for _ in range(rng.integers(0, 9) if image_id % 4 else 0):
            x, y, w, h = (float(v) for v in (*rng.integers(0, 90, 2), *rng.integers(4, 38, 2)))
            category = int(rng.choice(ids[:3]))
            crowd = int(rng.random() < 0.1)
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, "category_id": category,
                                "bbox": [x, y, w, h], "area": w * h, "iscrowd": crowd})  # fmt: skip
            for _ in range(rng.integers(0, 4)):
                near = [float(v) for v in np.clip(np.add([x, y, w, h], rng.normal(0, 3, 4)), 1, 100).round()]
                guess = category if rng.random() < 0.8 else int(rng.choice(ids))
                score = float(rng.integers(1, 12)) / 12
                results.append({"image_id": image_id, "category_id": guess, "bbox": near, "score": score})
    images = [{"id": i, "width": size, "height": size, "file_name": f"{i}.jpg"} for i in range(1, 41)]
    content = {"images": images, "annotations": annotations, "categories": [{"id": i, "name": str(i)} for i in ids]}
    file = tmp_path / "truth.json"
    file.write_text(json.dumps(content))
    dataset = SimpleNamespace(
        annotation_file=file, image_ids=list(range(1, 41)), category_ids=ids, class_names=[str(i) for i in ids]
    )
    evaluator = CocoEvaluator(dataset, max_detections=max_detections)
    for image_id in range(1, 41):
        found = [r for r in results if r["image_id"] == image_id]
        boxes = np.array([r["bbox"] for r in found]).reshape(-1, 4)
        labels = np.array([ids.index(r["category_id"]) for r in found], np.int32)
        evaluator._images[image_id] = Found(labels, boxes, np.array([r["score"] for r in found]))
    assert evaluator.results() == results
    seen = []
    summarize = coco._summarize
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setattr(coco, "_summarize", lambda *tables: seen.append(tables[:2]) or summarize(*tables))
        evaluator.compute()
        expected = plain_pycocotools(COCO(str(file)), results, max_detections)
    for ours, theirs in zip(seen[0], expected):
        assert np.array_equal(ours, theirs) and (theirs > 0).any() and (theirs == -1).any()


def test_no_detections_at_all(tmp_path):
    metrics = measure(write_dataset(tmp_path, masks=True), {i: detections([]) for i in TRUTH})
    assert metrics["bbox"]["AP"] == 0 and metrics["bbox"]["AR100"] == 0
    assert CocoEvaluator(write_dataset(tmp_path)).compute()["bbox"]["AP"] == 0  # and no image is added


def test_what_cannot_be_measured_is_none(tmp_path):
    truth = {42: TRUTH[42]}
    metrics = measure(write_dataset(tmp_path, truth), {42: detections(TRUTH[42])})
    values = metrics["bbox"]
    assert values["APs"] is None and values["APl"] is None and values["APm"] == pytest.approx(100)
    assert values["per_class"]["emu"]["AP"] is None
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics


def test_dataset_without_any_object(tmp_path):
    values = measure(write_dataset(tmp_path, {8: []}), {8: detections([(0, [0, 0, 9, 9])])})["bbox"]
    assert values["AP"] is None and values["instances"] == 0


def test_max_detections_limits_what_counts(tmp_path):
    truth = {42: TRUTH[42]}
    found = {42: detections(TRUTH[42], scores=[0.9, 0.8, 0.7, 0.6])}
    values = measure(write_dataset(tmp_path, truth), found, max_detections=(1, 2))["bbox"]
    assert values["AP"] == pytest.approx(100 * 51 / 101)
    assert (values["AR1"], values["AR2"]) == (pytest.approx(25), pytest.approx(50))
    assert "AR100" not in values


@pytest.mark.parametrize("wrong", [(), (10, 1), (0, 5), (5, 5)])
def test_max_detections_are_checked(tmp_path, wrong):
    with pytest.raises(ValueError, match="max_detections must be ascending"):
        CocoEvaluator(write_dataset(tmp_path), max_detections=wrong)


def test_boxes_are_scaled_back_to_the_original_image(tmp_path):
    evaluator = CocoEvaluator(write_dataset(tmp_path))
    found = [detections(TRUTH[i], scale=2.5) for i in TRUTH]
    evaluator.add(batch_of(TRUTH, size=500), found)
    assert evaluator.compute()["bbox"]["AP"] == pytest.approx(100)
    assert [r["bbox"] for r in evaluator.results() if r["image_id"] == 100] == [[10, 10, 20, 20], [40, 10, 50, 50]]
    assert {r["category_id"] for r in evaluator.results()} == {7, 90}


def test_scale_boxes_is_per_axis_and_clips():
    boxes = torch.tensor([[10.0, 20.0, 50.0, 101.0]])
    assert scale_boxes(boxes, [100, 50], [200, 25]).tolist() == [[5.0, 40.0, 25.0, 200.0]]


def test_crowds_are_neither_right_nor_wrong(tmp_path):
    crowd = {"id": 77, "image_id": 8, "category_id": 7, "bbox": [0, 0, 150, 150], "area": 22500, "iscrowd": 1}
    found = {i: detections(o) for i, o in TRUTH.items()}
    found[8] = detections([(0, [10, 10, 20, 20]), (0, [50, 50, 30, 30])], scores=[0.99, 0.98])
    values = measure(write_dataset(tmp_path, annotations=[crowd]), found)["bbox"]
    assert values["AP"] == pytest.approx(100) and values["instances"] == 7
    assert measure(write_dataset(tmp_path), found)["bbox"]["AP"] < 100  # now false positives


@pytest.mark.parametrize(
    "broken",
    [
        {"bbox": [0, 0, 0, 5]},
        {"bbox": [0, 0, -4, 5]},
        {"bbox": [float("nan"), 0, 4, 5]},
        {"bbox": [1, 2, 3]},
        {"bbox": None},
        {"bbox": [200, 0, 9, 9]},
        {"bbox": [0, 0, 9, 9], "id": 0},
        {"bbox": [0, 0, 9, 9], "category_id": 55},
        {"bbox": [0, 0, 9, 9], "image_id": 55},
    ],
    ids=str,
)
def test_unusable_annotations_are_left_out(tmp_path, broken):
    entry = {"id": 33, "image_id": 5, "category_id": 7} | broken
    values = measure(write_dataset(tmp_path, annotations=[entry]), {i: detections(o) for i, o in TRUTH.items()})["bbox"]
    assert values["AP"] == pytest.approx(100) and values["instances"] == 7


def test_area_and_crowd_flag_may_be_missing(tmp_path):
    entry = {"id": 33, "image_id": 8, "category_id": 13, "bbox": [0, 0, 100, 100]}
    values = measure(write_dataset(tmp_path, annotations=[entry]), {8: detections([(2, entry["bbox"])])})["bbox"]
    assert values["per_class"]["emu"]["APl"] == pytest.approx(100)


def test_perfect_masks(tmp_path):
    found = {i: detections(o, masks=box_masks(o, 200)) for i, o in TRUTH.items()}
    metrics = measure(write_dataset(tmp_path, masks=True), found)
    assert metrics["segm"]["AP"] == pytest.approx(100) and metrics["bbox"]["AP"] == pytest.approx(100)
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics


def test_masks_are_measured_by_their_own_overlap(tmp_path):
    truth = {5: [(0, [0, 0, 100, 100])]}
    half = box_masks([(0, [0, 0, 100, 62])], 200)  # the exact box with a mask of IoU 0.62
    metrics = measure(write_dataset(tmp_path, truth, masks=True), {5: detections(truth[5], masks=half)})
    assert metrics["bbox"]["AP"] == pytest.approx(100)
    assert metrics["segm"]["AP"] == pytest.approx(30)


def test_masks_are_resized_to_the_original_image(tmp_path):
    evaluator = CocoEvaluator(write_dataset(tmp_path, masks=True))
    small = [
        detections(o, scale=0.5, masks=box_masks([(c, [v // 2 for v in box]) for c, box in o], 100))
        for o in TRUTH.values()
    ]
    evaluator.add(batch_of(TRUTH, size=100), small)
    assert evaluator.compute()["segm"]["AP"] == pytest.approx(100)
    assert all(r["segmentation"]["size"] == [200, 200] for r in evaluator.results())
    json.dumps(evaluator.results())


def test_no_masks_found_still_measures_masks(tmp_path):
    empty = detections([], masks=torch.zeros(0, 200, 200, dtype=torch.bool))
    assert measure(write_dataset(tmp_path, masks=True), {i: empty for i in TRUTH})["segm"]["AP"] == 0


def test_encode_masks_round_trip_of_many():
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(37, 13, 9, generator=generator) > 0.5
    codes = encode_masks(masks, [13, 9])
    assert np.array_equal(mask_codec.decode(codes).transpose(2, 0, 1), masks.numpy())
    assert encode_masks(masks[:0], [13, 9]) == []


def test_mask_metrics_need_masks(tmp_path):
    with pytest.raises(ValueError, match="segmentation must be given"):
        measure(write_dataset(tmp_path), {5: detections(TRUTH[5], masks=box_masks(TRUTH[5], 200))})


@pytest.mark.parametrize(
    "segmentation", [None, [], [[1, 2, 3, 4]], {"size": [9, 9], "counts": [81]}, "circle", 5], ids=str
)
def test_objects_without_a_usable_mask_are_left_out(tmp_path, segmentation):
    entry = {"id": 33, "image_id": 8, "category_id": 13, "bbox": [0, 0, 50, 50], "segmentation": segmentation}
    found = {i: detections(o, masks=box_masks(o, 200)) for i, o in TRUTH.items()}
    values = measure(write_dataset(tmp_path, masks=True, annotations=[entry]), found)["segm"]
    assert values["AP"] == pytest.approx(100) and values["instances"] == 7


def test_a_crowd_without_a_mask_is_its_box(tmp_path):
    crowd = {"id": 77, "image_id": 8, "category_id": 7, "bbox": [0, 0, 150, 150], "area": 22500, "iscrowd": 1}
    found = {i: detections(o, masks=box_masks(o, 200)) for i, o in TRUTH.items()}
    inside = [(0, [10, 10, 20, 20])]
    found[8] = detections(inside, scores=[0.99], masks=box_masks(inside, 200))
    assert measure(write_dataset(tmp_path, masks=True, annotations=[crowd]), found)["segm"]["AP"] == pytest.approx(100)


def test_uncompressed_run_lengths(tmp_path):
    counts = [0, 200 * 100, 200 * 100]  # the left half, column by column
    entry = {"id": 33, "image_id": 8, "category_id": 13, "bbox": [0, 0, 100, 200]}
    entry["segmentation"] = {"size": [200, 200], "counts": counts}
    found = [(2, [0, 0, 100, 200])]
    metrics = measure(
        write_dataset(tmp_path, {8: []}, annotations=[entry]), {8: detections(found, masks=box_masks(found, 200))}
    )
    assert metrics["segm"]["AP"] == pytest.approx(100)


def test_bad_detections_are_refused(tmp_path):
    evaluator = CocoEvaluator(write_dataset(tmp_path))
    with pytest.raises(ValueError, match="labels must be in"):
        evaluator.add(batch_of([5]), [detections([(3, [0, 0, 5, 5])])])
    with pytest.raises(ValueError, match="must be finite"):
        evaluator.add(batch_of([5]), [detections([(0, [0, 0, 5, 5])], scores=[float("nan")])])
    with pytest.raises(ValueError, match="image_ids must be images"):
        evaluator.add(batch_of([6]), [detections([])])
    with pytest.raises(ValueError, match="one entry per image"):
        evaluator.add(batch_of([5, 8]), [detections([])])


def test_an_image_added_twice_counts_once(tmp_path):
    evaluator = CocoEvaluator(write_dataset(tmp_path))
    for _ in range(2):
        evaluator.add(batch_of(TRUTH), [detections(o) for o in TRUTH.values()])
    assert evaluator.compute()["bbox"]["AP"] == pytest.approx(100) and len(evaluator.results()) == 7


def test_classes_of_one_name_are_kept_apart(tmp_path):
    dataset = write_dataset(tmp_path)
    dataset.class_names = ["cat", "cat", "emu"]
    values = measure(dataset, {i: detections(o) for i, o in TRUTH.items()})["bbox"]
    assert list(values["per_class"]) == ["cat (7)", "cat (90)", "emu"]


def test_nothing_is_printed(tmp_path, capsys):
    measure(write_dataset(tmp_path), {5: detections(TRUTH[5])})
    assert capsys.readouterr().out == ""


class FakeDetector(torch.nn.Module):
    """Detects exactly the objects with an even index in the image; asserts eval mode."""

    def features(self, images):
        return [images]

    def detect(self, pyramid, batch):
        assert not self.training and not torch.is_grad_enabled()
        return [detections(TRUTH[i][::2], masks=box_masks(TRUTH[i][::2], 200)) for i in batch.image_ids]


def test_evaluate_runs_a_detector_and_restores_its_mode(tmp_path, capsys):
    detector = FakeDetector().train()
    evaluator = CocoEvaluator(write_dataset(tmp_path, masks=True))
    loader = [batch_of([100, 5]), batch_of([42, 8])]
    metrics = evaluate(detector, loader, evaluator, dtype=torch.bfloat16, progress=True)
    assert detector.training
    cat, dog = metrics["bbox"]["per_class"]["cat"], metrics["bbox"]["per_class"]["dog"]
    assert cat["AP"] == pytest.approx(100) and dog["AR100"] == pytest.approx(40)
    assert capsys.readouterr().out == ""  # the progress bar goes to stderr


SPLITS = [([100, 42], [5, 8]), ([], [100, 5, 42, 8]), ([100, 5, 8], [42, 100])]


def _evaluate_rank(rank, folder, dataset):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    outcomes = []
    for split in SPLITS:
        evaluator = CocoEvaluator(dataset)
        loader = [batch_of([image_id]) for image_id in split[rank]]
        outcomes.append([evaluate(FakeDetector(), loader, evaluator, progress=False), evaluator.results()])
    (folder / f"rank{rank}.json").write_text(json.dumps(outcomes))
    torch.distributed.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    """Also when one process has no images, or both have evaluated the same one."""
    dataset = write_dataset(tmp_path, masks=True)
    evaluator = CocoEvaluator(dataset)
    metrics = evaluate(FakeDetector(), [batch_of(TRUTH)], evaluator, progress=False)
    expected = json.loads(json.dumps([metrics, evaluator.results()]))
    mp.spawn(_evaluate_rank, args=(tmp_path, dataset), nprocs=2)
    for rank in range(2):
        assert json.loads((tmp_path / f"rank{rank}.json").read_text()) == [expected] * len(SPLITS)


def test_tables_show_a_dash_where_nothing_was_measured(tmp_path):
    found = {i: detections(o, masks=box_masks(o, 200)) for i, o in TRUTH.items()}
    metrics = measure(write_dataset(tmp_path, masks=True), found)
    console = Console(file=io.StringIO(), width=160)
    print_metrics(metrics, console)
    text = console.file.getvalue()
    assert "AP boxes" in text and "AP masks" in text and "100.0" in text
    emu = next(line for line in text.splitlines() if "emu" in line)
    assert emu.count(" - ") == 4
    assert summary_table(metrics).row_count == 2
    assert (class_table(metrics).row_count, size_table(metrics).row_count) == (3, 3)


def test_class_names_are_shown_as_they_are(tmp_path):
    dataset = write_dataset(tmp_path)
    dataset.class_names = ["[red]cat", "dog", "emu"]
    console = Console(file=io.StringIO(), width=160)
    print_metrics(measure(dataset, {5: detections(TRUTH[5])}), console)
    assert "[red]cat" in console.file.getvalue()
