"""The sections on the networks' features: ICD's attention, and LGD's instructive features beside the student's."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd.progress import track
from fastkd.report import pictures, plots
from fastkd.report.html import PictureBook, Section, clean, escape, note, paragraph
from fastkd.report.mistakes import LEFT_OUT, Images
from fastkd.report.networks import Networks, load_networks
from fastkd.report.runs import Run

ATTENTION_IMAGES, INSTANCES_PER_IMAGE = 4, 2
FEATURE_IMAGES = 3
MAX_BYTES = 4_200_000  # these sections add no pictures once all pictures together exceed this number of bytes


class View(NamedTuple):
    """The report's section on the networks of a method: its title, and the function that fills it."""

    title: str
    show: Callable[[Section, Run, Networks, Images, list[int], PictureBook], None]


def sections(runs: list[Run], images: Images, chosen: list[int], device: str, book: PictureBook) -> list[Section]:
    """One section for each method with a View; a run whose networks cannot be loaded gets a note."""
    views = [(run, run.settings.view()) for run in runs if run.settings is not None]
    found: dict[str, Section] = {}
    for run, view in track(views, "look into the networks", "runs"):
        if view is None:
            continue
        section = found.setdefault(view.title, Section(view.title))
        try:
            view.show(section, run, load_networks(run, device), images, chosen, book)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            reason = clean(f"{type(error).__name__}: {error}", 300)
            section.add(note([f"{run.name}: nothing to show, {reason}"]))
    return list(found.values())


def attention_view(title: str) -> View:
    """The View of attention maps, for a distiller with `attention(teacher, batch)` such as ICD."""
    return View(title, _show_attention)


def features_view(title: str) -> View:
    """The View of instructive features, for a distiller with `instruct(pyramid, batch)` and `student_adapter` (LGD)."""
    return View(title, _show_features)


@torch.no_grad()
def _show_attention(
    section: Section, run: Run, loaded: Networks, images: Images, chosen: list[int], book: PictureBook
) -> None:
    if not section.parts:
        section.add(
            paragraph(
                "ICD asks the frozen teacher about each object (its class, size and rough place), and the decoder "
                "answers with attention over the teacher\u2019s features; the student then imitates the teacher mostly "
                "where that attention lies. Each row is one object: first the image with the object framed, then the "
                "attention of each head, bright where the head looks, all heads of an object on one colour scale. "
                "Beside each head\u2019s number stand the pyramid level that gets most of its attention, and the share "
                "it gets. Heads that settle on different parts (a rim, the inside, the context) have learned "
                "something; equal, even maps have not."
            )
        )
    section.add(f"<h3>{escape(run.name)}</h3>")
    assert loaded.teacher is not None  # whose features the attention is over
    figures = []
    for image_id in chosen[:ATTENTION_IMAGES]:
        if book.bytes > MAX_BYTES:
            figures.append(note([LEFT_OUT.format("Further images are")]))
            break
        batch, picture = loaded.batch(images.source, image_id)
        maps = loaded.distiller.attention(loaded.teacher.features(batch.images), batch)
        maps = [level.float().cpu() for level in maps]
        for instance in _instances(batch.boxes):
            heads, shares = attention_over_image([level[instance] for level in maps], batch.padded_size)
            label = images.name(int(batch.labels[instance]))
            titles = [
                label,
                *(
                    f"head {head} \u00b7 {loaded.level_name(level)} {share:.0%}"
                    for head, (level, share) in enumerate(shares, 1)
                ),
            ]
            box = batch.boxes[instance].tolist()
            png = pictures.attention_strip(picture, box, heads[:, : picture.shape[0], : picture.shape[1]], titles)
            width, height = box[2] - box[0], box[3] - box[1]
            caption = f"<b>{escape(label)}</b> of {width:.0f} x {height:.0f} px in image {image_id}"
            figures.append(
                book.figure(
                    png, f"{run.name}_attention_{image_id}_{instance}", f"ICD attention, image {image_id}", caption
                )
            )
    section.add(*(figures or [note(["The chosen images hold no boxes."])]))


def _instances(boxes: Tensor) -> list[int]:
    """Indices of the largest box and of the box with the median area."""
    areas = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).cpu()
    order = areas.argsort(descending=True, stable=True).tolist()
    return list(dict.fromkeys(order[:1] + order[len(order) // 2 : len(order) // 2 + 1]))[:INSTANCES_PER_IMAGE]


def attention_over_image(levels: list[Tensor], size: tuple[int, int]) -> tuple[np.ndarray, list[tuple[int, float]]]:
    """The attention of one instance as a density over the padded image, summed over the levels.

    Args:
        levels: L tensors [G, H_l, W_l], summing to 1 over levels and cells for each head.
        size: (H, W) of the padded image.
    Returns: [G, H, W], summing to about 1 for each head; and for each head (level with most attention, its share).
    """
    total = torch.zeros(levels[0].shape[0], *size)
    for level in levels:
        cells = level.shape[-2] * level.shape[-1]
        density = F.interpolate(level[None], size=size, mode="bilinear", align_corners=False)[0]
        total += density * (cells / (size[0] * size[1]))
    shares = torch.stack([level.sum(dim=(-2, -1)) for level in levels])  # [L, G]
    share, best = shares.max(dim=0)
    return total.numpy(), list(zip(best.tolist(), share.tolist()))


@torch.no_grad()
def _show_features(
    section: Section, run: Run, loaded: Networks, images: Images, chosen: list[int], book: PictureBook
) -> None:
    if not section.parts:
        section.add(
            paragraph(
                "LGD builds instructive features from the labels and the student\u2019s own features, and the student "
                "learns to produce them, through a small adapter, without the labels. A row is a pyramid level. "
                "<b>Strength</b> is the root mean square over the channels after each channel has been normalised over "
                "the image, as in LGD\u2019s loss: how much a place stands out. <b>Component</b> is the first "
                "principal component of the two maps that the loss compares. Maps of one kind in a row share a colour "
                "scale, whose ends are printed below them. Look for instructive maps that stand out on the objects, "
                "and for the student following them."
            )
        )
    section.add(f"<h3>{escape(run.name)}</h3>")
    for image_id in chosen[:FEATURE_IMAGES]:
        if book.bytes > MAX_BYTES:
            section.add(note([LEFT_OUT.format("Further images are")]))
            break
        batch, picture = loaded.batch(images.source, image_id)
        student = loaded.student.features(batch.images)
        instructive = loaded.distiller.instruct(student, batch)
        adapted = [loaded.distiller.student_adapter(level) for level in student]
        rows, names, cells = [], [], []
        for level, pyramids in enumerate(zip(student, adapted, instructive)):
            height, width = pyramids[0].shape[-2:]
            cell = (batch.padded_size[0] / height, batch.padded_size[1] / width)
            seen = [math.ceil(side / length) for side, length in zip(picture.shape[:2], cell)]  # without the padding
            if seen[0] * seen[1] < 4:
                continue  # too few cells to compare patterns
            maps = feature_maps(*(maps[0] for maps in pyramids))
            rows.append([picture, *(values[: seen[0], : seen[1]] for values in maps)])
            names.append(loaded.level_name(level))
            cells.append(cell)
        if not rows:
            section.add(note([f"Image {image_id} is too small for its feature maps to show anything."]))
            continue
        columns = ["image", "student", "adapted student", "instructive", "adapted: component", "instructive: component"]
        png = plots.feature_grid(columns, names, rows, cells, [[1, 2, 3], [4, 5]], batch.boxes.tolist())
        name = escape(images.source.file_name(image_id), 80)
        caption = (
            f"Image {image_id} ({name}): strength of the student\u2019s features, of these after LGD\u2019s adapter, "
            "and of the instructive features; then the component of the two that the loss compares."
        )
        section.add(book.figure(png, f"{run.name}_features_{image_id}", f"LGD features, image {image_id}", caption))
    if not chosen:
        section.add(note(["There are no images with boxes to show."]))


def feature_maps(student: Tensor, adapted: Tensor, instructive: Tensor) -> list[np.ndarray]:
    """Reduces three feature maps [C, h, w] to 2-D: the strength of each, and one component of the last two.

    Strength = root mean square over the channels after normalising each channel over its cells. The component is the
    first principal component of the adapted and the instructive map together, so that both are comparable.
    """
    maps = [_normalised(level) for level in (student, adapted, instructive)]
    strengths = [level.square().mean(dim=0).sqrt() for level in maps]
    cells = torch.cat([level.flatten(1) for level in maps[1:]], dim=1).T  # [2 h w, C]
    _, _, directions = torch.linalg.svd(cells - cells.mean(dim=0), full_matrices=False)
    direction = directions[0] * directions[0][directions[0].abs().argmax()].sign()
    components = [torch.einsum("chw,c->hw", level, direction) for level in maps[1:]]
    return [values.numpy() for values in (*strengths, *components)]


def _normalised(maps: Tensor) -> Tensor:
    maps = maps.detach().double().cpu()
    centred = maps - maps.mean(dim=(1, 2), keepdim=True)
    return centred / (centred.square().mean(dim=(1, 2), keepdim=True) + 1e-5).sqrt()
