"""The sections with single images: detections beside ground truth, worst false positives, missed objects."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from fastkd.progress import showing
from fastkd.report import analysis, pictures, plots
from fastkd.report.analysis import (
    DUPLICATE,
    ERROR_KINDS,
    IGNORED,
    KIND_MEANING,
    KINDS,
    RIGHT,
    SIZES,
    ImageDetections,
    Truth,
    Verdict,
)
from fastkd.report.html import Cell, PictureBook, Section, clean, escape, folded, grid, key, note, paragraph, table
from fastkd.report.pictures import MISSED_COLOUR, OTHER_COLOUR, RIGHT_COLOUR, TRUTH_COLOUR, WRONG_COLOUR, Mark
from fastkd.report.runs import Run
from fastkd.report.sources import ValidationSet

MOST_CROPS = 160
# A section adds no pictures once all pictures exceed this number of bytes: with base64 (+ 1/3) the page is below 8 MB.
DETECTIONS_MAX_BYTES, FALSE_POSITIVES_MAX_BYTES, MISSES_MAX_BYTES = 3_000_000, 4_900_000, 5_700_000
LEFT_OUT = "{} left out here, to keep the file small."


@dataclass
class Judged:
    """A run's detections on the validation images, their verdicts, and the run's score threshold."""

    run: Run
    found: dict[int, ImageDetections]
    verdicts: dict[int, Verdict]
    threshold: float


@dataclass
class Images:
    """Validation images of a report: their data set, ground truth, and the judged runs."""

    source: ValidationSet
    truths: dict[int, Truth]
    judged: list[Judged] = field(default_factory=list)

    def crops(self) -> int:
        """Number of crops per run and kind of mistake."""
        groups = len(ERROR_KINDS) + len(SIZES)
        return min(4, max(1, MOST_CROPS // (groups * max(1, len(self.judged)))))

    def name(self, label: int) -> str:
        """The class name of a label."""
        return clean(self.source.class_names[label], 30)


def judge_runs(source: ValidationSet, runs: list[Run]) -> Images:
    """Judges every run that has detections. Args: source: a ValidationSet or an object with the same methods."""
    images = Images(source, {image_id: source.truth(image_id) for image_id in source.image_ids})
    boxes = sum(len(truth.labels) for truth in images.truths.values())
    measured = [run for run in runs if run.detections is not None]
    with showing("judge the detections", "images", len(measured) * len(images.truths)) as work:
        for run in measured:
            found, verdicts = source.found(run), {}
            for image_id, truth in images.truths.items():
                verdicts[image_id] = analysis.judge(truth, found[image_id])
                work.advance()
            detections = [found[image_id] for image_id in verdicts]
            threshold = analysis.best_threshold(list(verdicts.values()), detections, boxes)
            images.judged.append(Judged(run, found, verdicts, threshold))
    return images


def choose_images(images: Images, count: int) -> list[int]:
    """`count` images with boxes, evenly spaced by rank from the easiest to the hardest for the first student.

    Selection by rank avoids hand-picked examples and includes both extremes.
    """
    candidates = [image_id for image_id, truth in images.truths.items() if len(truth.labels)]
    if not candidates or not images.judged or count == 0:
        return candidates[:count]
    judged = next((item for item in images.judged if not item.run.is_teacher), images.judged[0])

    def share_right(image_id: int) -> float:
        kinds = judged.verdicts[image_id].kinds[judged.found[image_id].scores >= judged.threshold]
        right = (kinds == RIGHT).sum()
        return 2 * right / max(1, (kinds != IGNORED).sum() + len(images.truths[image_id].labels))

    ranked = sorted(candidates, key=lambda image_id: (-share_right(image_id), image_id))
    places = np.unique(np.linspace(0, len(ranked) - 1, min(count, len(ranked))).round().astype(int))
    return [ranked[place] for place in places]


def detections_section(images: Images, chosen: list[int], book: PictureBook) -> Section:
    """The same images for every run, ground truth first."""
    section = Section("Detections beside the ground truth")
    if not chosen:
        section.add(note(["No validation image has a box, so there is nothing to show."]))
        return section
    section.add(
        paragraph(
            "Every run on the same images, taken at even steps from the easiest to the hardest image of the first "
            "student. Each run is shown above its own score threshold (the one with its best F1), since scores of two "
            "detectors are not on one scale. "
            + " &nbsp; ".join(
                (
                    key(TRUTH_COLOUR, "ground truth"),
                    key(RIGHT_COLOUR, "right: class and place (IoU at least 0.5)"),
                    key(WRONG_COLOUR, "false positive"),
                    key(MISSED_COLOUR, "missed object", dashed=True),
                )
            )
        )
    )
    for place, image_id in enumerate(chosen):
        picture, truth = images.source.image(image_id), images.truths[image_id]
        marks = [Mark(tuple(box), TRUTH_COLOUR, images.name(label)) for box, label in zip(truth.boxes, truth.labels)]
        png = pictures.annotated(picture, marks)
        if place and book.bytes + (1 + len(images.judged)) * len(png) > DETECTIONS_MAX_BYTES:
            section.add(note([LEFT_OUT.format(f"The other {len(chosen) - place} of {len(chosen)} images are")]))
            break
        figures = [
            book.figure(
                png,
                f"truth_{image_id}",
                f"Ground truth of image {image_id}",
                f"<b>ground truth</b>: {len(marks)} object{'s' if len(marks) != 1 else ''}",
            )
        ]
        for judged in images.judged:
            figures.append(_run_figure(images, judged, image_id, picture, book))
        name = escape(images.source.file_name(image_id), 80)
        section.add(
            f'<h3>Image {image_id} <small class="soft">{name}</small></h3>',
            grid(figures, 320 if picture.shape[1] >= picture.shape[0] else 235),
        )
    return section


def _run_figure(images: Images, judged: Judged, image_id: int, picture: np.ndarray, book: PictureBook) -> str:
    found, verdict, truth = judged.found[image_id], judged.verdicts[image_id], images.truths[image_id]
    missed = np.flatnonzero(verdict.found_score < judged.threshold)
    marks = [Mark(tuple(truth.boxes[k]), MISSED_COLOUR, dashed=True) for k in missed]
    right = wrong = 0
    for d in np.flatnonzero(found.scores >= judged.threshold):
        if verdict.kinds[d] == IGNORED:
            continue
        is_right = verdict.kinds[d] == RIGHT
        right, wrong = right + int(is_right), wrong + int(not is_right)
        colour = RIGHT_COLOUR if is_right else WRONG_COLOUR
        marks.append(Mark(tuple(found.boxes[d]), colour, f"{images.name(found.labels[d])} {found.scores[d]:.2f}"))
    caption = f"<b>{escape(judged.run.name, 40)}</b>: {right} right, {wrong} false, {len(missed)} missed"
    caption += f" (score from {judged.threshold:.2f})"
    alt = f"Detections of {judged.run.name} in image {image_id}"
    return book.figure(pictures.annotated(picture, marks), f"{judged.run.name}_{image_id}", alt, caption)


def false_positives_section(images: Images, book: PictureBook) -> Section:
    """Counts of false positives by kind, and the highest-scoring ones."""
    section = Section("Worst false positives")
    meanings = "; ".join(f"<b>{KINDS[kind]}</b> {KIND_MEANING[kind]}" for kind in ERROR_KINDS)
    section.add(
        paragraph(
            f"A false positive is of one of four kinds: {meanings}. Counted above each run\u2019s own score threshold."
        )
    )
    names = [judged.run.name for judged in images.judged]
    counts = [analysis.error_counts(*_lists(judged), judged.threshold) for judged in images.judged]
    per_image = {KINDS[kind]: [count[kind] / max(1, len(images.truths)) for count in counts] for kind in ERROR_KINDS}
    picture = plots.error_bars(names, per_image, "false positives an image")
    section.add(
        book.figure(
            picture,
            "false_positives",
            "False positives an image by kind",
            "Shorter is better, at a comparable number found.",
        )
    )
    for judged in images.judged:
        figures = [
            _false_positive(images, judged, *place, book)
            for kind in ERROR_KINDS
            for place in _worst(judged, kind, images.crops())
            if book.bytes < FALSE_POSITIVES_MAX_BYTES
        ]
        legend = paragraph(
            "The highest-scoring false positives of each kind. "
            + key(WRONG_COLOUR, "the detection")
            + " &nbsp; "
            + key(TRUTH_COLOUR, "the objects around it")
        )
        none = f"{judged.run.name} has no false positives."
        content = _crops(legend, figures, none, book.bytes >= FALSE_POSITIVES_MAX_BYTES)
        section.add(folded(f"{clean(judged.run.name, 60)}: the worst of each kind", content))
    return section


def _crops(legend: str, figures: list[str], none: str, full: bool) -> str:
    shown = legend + grid(figures, 150) if figures else ""
    return shown + note([LEFT_OUT.format("Others are")] if full else [] if figures else [none])


def _lists(judged: Judged) -> tuple[list[Verdict], list[ImageDetections]]:
    return list(judged.verdicts.values()), [judged.found[image_id] for image_id in judged.verdicts]


def _worst(judged: Judged, kind: int, count: int) -> list[tuple[int, int]]:
    """(image id, detection) of the highest scores of a kind above the threshold, at most one per image."""
    best = []
    for image_id, verdict in judged.verdicts.items():
        places = np.flatnonzero((verdict.kinds == kind) & (judged.found[image_id].scores >= judged.threshold))
        if len(places):
            best.append((-float(judged.found[image_id].scores[places[0]]), image_id, int(places[0])))
    return [(image_id, place) for _, image_id, place in sorted(best)[:count]]


def _false_positive(images: Images, judged: Judged, image_id: int, place: int, book: PictureBook) -> str:
    found, verdict, truth = judged.found[image_id], judged.verdicts[image_id], images.truths[image_id]
    kind, partner, box = int(verdict.kinds[place]), int(verdict.partner[place]), found.boxes[place]
    marks = [Mark(tuple(other), TRUTH_COLOUR) for other in truth.boxes] + [Mark(tuple(box), WRONG_COLOUR)]
    text = f"<b>{KINDS[kind]}</b><br>{escape(images.name(found.labels[place]))} {found.scores[place]:.2f}"
    if partner >= 0:
        iou = analysis.pairwise_iou(box[None], truth.boxes[partner : partner + 1])[0, 0]
        word = "again" if kind == DUPLICATE else "truth:"
        text += f"<br>{word} {escape(images.name(truth.labels[partner]))}, IoU {iou:.2f}"
    text += f'<br><span class="soft">image {image_id}</span>'
    png = pictures.crop(images.source.image(image_id), marks, box)
    return book.figure(
        png, f"fp_{judged.run.name}_{KINDS[kind]}_{image_id}", f"False positive in image {image_id}", text
    )


def misses_section(images: Images, book: PictureBook) -> Section:
    """Counts of missed objects by size, and examples."""
    section = Section("Misses")
    section.add(
        paragraph(
            "An object is missed when no detection of its class overlaps it with an IoU of at least 0.5 above the "
            "run\u2019s threshold. Sizes are COCO\u2019s: small is under 32 x 32 pixels of the image file, large over "
            "96 x 96."
        ),
        _miss_table(images),
    )
    for judged in images.judged:
        figures = [
            _miss(images, judged, image_id, box, book)
            for size in range(3)
            for image_id, box in _missed(images, judged, size)
            if book.bytes < MISSES_MAX_BYTES
        ]
        legend = paragraph(
            "The largest missed objects of each size, at most one an image. "
            + key(MISSED_COLOUR, "the missed object", dashed=True)
            + " &nbsp; "
            + key(OTHER_COLOUR, "detections above the threshold, right or wrong")
        )
        content = _crops(legend, figures, f"{judged.run.name} misses nothing.", book.bytes >= MISSES_MAX_BYTES)
        section.add(folded(f"{clean(judged.run.name, 60)}: missed objects", content))
    return section


def _miss_table(images: Images) -> str:
    rows, totals = [], {}
    for judged in images.judged:
        counts = analysis.miss_counts(list(judged.verdicts.values()), list(images.truths.values()), judged.threshold)
        totals = {size: total for size, (_, total) in counts.items()}
        cells = [Cell(f"{100 * missed / total:.0f} %" if total else "\u2013") for missed, total in counts.values()]
        missed, total = (sum(values) for values in zip(*counts.values()))
        rows.append([judged.run.name, f"{judged.threshold:.2f}", *cells, f"{100 * missed / max(1, total):.0f} %"])
    header = [
        "run",
        "threshold",
        *(f"{size} ({totals.get(size, 0):,})" for size in SIZES),
        f"all ({sum(totals.values()):,})",
    ]
    return table([header[0], header[1], *(f"missed {text}" for text in header[2:])], rows)


def _missed(images: Images, judged: Judged, size: int) -> list[tuple[int, int]]:
    candidates = []
    for image_id, verdict in judged.verdicts.items():
        truth = images.truths[image_id]
        if not len(truth.labels):
            continue
        areas = (truth.boxes[:, 2:] - truth.boxes[:, :2]).prod(axis=1)
        areas = np.where(
            (verdict.found_score < judged.threshold) & (analysis.size_index(truth.boxes) == size), areas, -1
        )
        if areas.max() >= 0:
            candidates.append((-float(areas.max()), image_id, int(areas.argmax())))
    return [(image_id, box) for _, image_id, box in sorted(candidates)[: images.crops()]]


def _miss(images: Images, judged: Judged, image_id: int, box: int, book: PictureBook) -> str:
    found, truth, verdict = judged.found[image_id], images.truths[image_id], judged.verdicts[image_id]
    frame = truth.boxes[box]
    marks = [Mark(tuple(other), OTHER_COLOUR) for other in found.boxes[found.scores >= judged.threshold]]
    marks.append(Mark(tuple(frame), MISSED_COLOUR, dashed=True))
    size = SIZES[int(analysis.size_index(frame[None])[0])]
    width, height = frame[2:] - frame[:2]
    reason = analysis.miss_reason(box, truth, found, verdict, judged.threshold)
    text = (
        f"<b>{escape(images.name(truth.labels[box]))}</b>, {size} ({width:.0f} x {height:.0f} px)<br>{escape(reason)}"
    )
    text += f'<br><span class="soft">image {image_id}</span>'
    png = pictures.crop(images.source.image(image_id), marks, frame)
    return book.figure(png, f"miss_{judged.run.name}_{image_id}", f"Missed object in image {image_id}", text)
