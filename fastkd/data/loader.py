"""Batches as a pure function of (seed, step, rank), independent of the number of workers and of interruptions."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

from fastkd.data.batch_loader import BatchLoader
from fastkd.data.coco import DetectionDataset
from fastkd.data.images import BadImageError
from fastkd.data.transforms import Augmentation, Geometry, normalise, resized_size
from fastkd.types import Batch

EPOCH_STREAM, SAMPLE_STREAM = 1, 2  # two independent random streams from one seed
ASPECT_EDGES = (0.8, 1.25)  # limits of width / height: portrait, about square, landscape


def collate(
    dataset: DetectionDataset, items: list[tuple[int, np.ndarray, Geometry, int]], padded: tuple[int, int]
) -> Batch:
    """Combines decoded images and their ground truth into one batch.

    Args:
        dataset: the data set, for the ground truth.
        items: (index, decoded image, geometry, seed) of each image.
        padded: minimum (height, width) of the batch.
    Returns: Batch with channels-last images.
    """
    height = max(padded[0], *(g.height for _, _, g, _ in items))
    width = max(padded[1], *(g.width for _, _, g, _ in items))
    images = np.zeros((len(items), height, width, 3), np.float32)
    boxes, labels, ignored, masks = [], [], [], []
    for b, (index, image, geometry, _) in enumerate(items):
        size = (image.shape[1], image.shape[0])
        normalise(geometry.image(image), images[b])
        found, classes, crowd = dataset.targets(index)
        boxes.append(geometry.boxes(found, size))
        labels.append(classes)
        ignored.append(geometry.boxes(crowd, size))
        if dataset.with_masks:
            full = np.zeros((len(classes), height, width), bool)
            drawn = dataset.masks(index, (geometry.height, geometry.width))
            full[:, : geometry.height, : geometry.width] = geometry.masks(drawn)
            masks.append(full)
    counts = [len(part) for part in boxes]
    which = np.arange(len(items))
    return Batch(
        images=torch.from_numpy(images).permute(0, 3, 1, 2),
        image_sizes=torch.tensor([(g.height, g.width) for _, _, g, _ in items], dtype=torch.int64),
        boxes=torch.from_numpy(np.concatenate(boxes)),
        labels=torch.from_numpy(np.concatenate(labels)),
        image_index=torch.from_numpy(np.repeat(which, counts)),
        counts=counts,
        masks=torch.from_numpy(np.concatenate(masks)) if dataset.with_masks else None,
        ignore_boxes=torch.from_numpy(np.concatenate(ignored)),
        ignore_index=torch.from_numpy(np.repeat(which, [len(part) for part in ignored])),
        image_ids=[int(dataset.image_ids[index]) for index, _, _, _ in items],
        original_sizes=torch.tensor([image.shape[:2] for _, image, _, _ in items], dtype=torch.int64),
        seeds=[seed for _, _, _, seed in items],
    )


def _round_up(value: int, divisor: int) -> int:
    return -(-value // divisor) * divisor


def _padded_size(sizes: list[tuple[int, int]], divisor: int) -> tuple[int, int]:
    return _round_up(max(h for h, _ in sizes), divisor), _round_up(max(w for _, w in sizes), divisor)


def epoch_batches(groups: np.ndarray, batch_size: int, seed: int, epoch: int) -> np.ndarray:
    """Global batches of one pass over the data: [m, batch_size] image indices, m the same for every epoch.

    Images of one group (aspect ratio) are batched together, the remainders of the groups are mixed, and fewer than
    batch_size images, different ones in each epoch, are left out. With fewer images than batch_size, images repeat
    within the batch.
    """
    rng = np.random.default_rng([seed, EPOCH_STREAM, epoch])
    if len(groups) < batch_size:
        repeats = -(-batch_size // len(groups))
        return np.concatenate([rng.permutation(len(groups)) for _ in range(repeats)])[None, :batch_size]
    order = rng.permutation(len(groups))
    full, rest = [], []
    for group in np.unique(groups):
        members = order[groups[order] == group]
        cut = len(members) // batch_size * batch_size
        full.append(members[:cut].reshape(-1, batch_size))
        rest.append(members[cut:])
    remaining = np.concatenate(rest)
    cut = len(remaining) // batch_size * batch_size
    batches = np.concatenate([*full, remaining[:cut].reshape(-1, batch_size)])
    return batches[rng.permutation(len(batches))]


class TrainBatches(Dataset):
    """Item `step` is this rank's batch of the step, with a list of (image id, message) of unreadable images."""

    bad_image_is = "replaced by the next image"

    def __init__(
        self,
        dataset: DetectionDataset,
        augmentation: Augmentation,
        *,
        batch_size: int,
        seed: int,
        own: Sequence[int],
        divisor: int,
        grouping: bool,
        channels_last: bool,
    ):
        self.dataset, self.augmentation = dataset, augmentation
        self.batch_size, self.seed, self.divisor, self.channels_last = batch_size, seed, divisor, channels_last
        self.own = own  # positions of this rank in the global batch
        aspect = dataset.sizes[:, 0] / dataset.sizes[:, 1]
        self.groups = np.digitize(aspect, ASPECT_EDGES).astype(np.int8) if grouping else np.zeros(len(dataset), np.int8)
        self.steps_per_epoch = len(epoch_batches(self.groups, batch_size, seed, 0))
        self._epoch: tuple[int, np.ndarray] | None = None

    def indices(self, step: int) -> np.ndarray:
        """Images of the global batch of a step."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = (epoch, epoch_batches(self.groups, self.batch_size, self.seed, epoch))
        return self._epoch[1][place]

    def __getitem__(self, step: int) -> tuple[Batch, list[tuple[int, str]]]:
        indices = [int(i) for i in self.indices(step)]
        plans, seeds, states = [], [], []
        for position, index in enumerate(indices):  # the whole global batch, since all ranks use its padding
            rng = np.random.default_rng([self.seed, SAMPLE_STREAM, step, position])
            seeds.append(int(rng.integers(2**62)))
            states.append(rng.bit_generator.state)
            plans.append(self.augmentation.draw(rng, *self.dataset.sizes[index].tolist()))
        padded = _padded_size([(plan.height, plan.width) for plan in plans], self.divisor)
        items = []
        bad: list[tuple[int, str]] = []
        for position in self.own:
            index, image = self._good_image(indices[position], bad)
            plan = plans[position]
            if index != indices[position]:  # a replacement uses the original's random numbers
                rng = np.random.default_rng()
                rng.bit_generator.state = states[position]
                plan = self.augmentation.draw(rng, *self.dataset.sizes[index].tolist())
            items.append((index, image, plan, seeds[position]))
        own = _padded_size([(plan.height, plan.width) for _, _, plan, _ in items], self.divisor)
        batch = collate(self.dataset, items, (max(padded[0], own[0]), max(padded[1], own[1])))
        if not self.channels_last:
            batch.images = batch.images.contiguous()
        return batch, bad

    def _good_image(self, index: int, bad: list[tuple[int, str]]) -> tuple[int, np.ndarray]:
        """The image, or the next readable one of the data set. Raises: BadImageError if strict or none is readable."""
        for candidate in range(index, index + len(self.dataset)):
            candidate %= len(self.dataset)
            try:
                return candidate, self.dataset.read_image(candidate)
            except BadImageError as error:
                if self.dataset.strict:
                    raise
                bad.append((int(self.dataset.image_ids[candidate]), str(error)))
        raise BadImageError(f"CocoDataset: {self.dataset.image_dir}: no image can be read; the last: {bad[-1][1]}")


class EvalBatches(Dataset):
    """Item k is batch k in order of aspect ratio and size, or None if none of its images can be read."""

    bad_image_is = "its objects count as missed"

    def __init__(
        self,
        dataset: DetectionDataset,
        *,
        batch_size: int,
        short_side: int | None,
        max_side: int | None,
        divisor: int,
        channels_last: bool,
    ):
        self.dataset, self.divisor, self.channels_last = dataset, divisor, channels_last
        self.plan = functools.partial(resized_size, short_side=short_side, max_side=max_side)
        width, height = dataset.sizes[:, 0].astype(np.int64), dataset.sizes[:, 1].astype(np.int64)
        self.order = np.lexsort((np.arange(len(dataset)), width * height, width / height))
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.order) // self.batch_size)

    def __getitem__(self, place: int) -> tuple[Batch | None, list[tuple[int, str]]]:
        items, bad = [], []
        for index in self.order[place * self.batch_size : (place + 1) * self.batch_size].tolist():
            try:
                image = self.dataset.read_image(index)
            except BadImageError as error:
                if self.dataset.strict:
                    raise
                bad.append((int(self.dataset.image_ids[index]), str(error)))
                continue
            height, width = self.plan(*self.dataset.sizes[index].tolist())
            items.append((index, image, Geometry(height, width, False), index))
        if not items:
            return None, bad
        batch = collate(self.dataset, items, _padded_size([(g.height, g.width) for _, _, g, _ in items], self.divisor))
        if not self.channels_last:
            batch.images = batch.images.contiguous()
        return batch, bad


def _check(name: str, **values: tuple[int, int]) -> None:
    for key, (value, least) in values.items():
        if type(value) is not int or value < least:
            raise ValueError(f"{name}: {key} must be an integer >= {least}, got {value!r}")


def _check_rank(name: str, rank: int, world_size: int) -> None:
    _check(name, world_size=(world_size, 1), rank=(rank, 0))
    if rank >= world_size:
        raise ValueError(f"{name}: rank must be below world_size {world_size}, got {rank}")


def build_train_loader(
    dataset: DetectionDataset,
    *,
    batch_size: int,
    total_steps: int,
    seed: int = 0,
    start_step: int = 0,
    world_size: int = 1,
    rank: int = 0,
    workers: int = 0,
    prefetch: int = 2,
    short_sides: tuple[int, ...] = (),
    max_side: int | None = None,
    flip: float = 0.5,
    divisor: int = 32,
    aspect_grouping: bool = True,
    channels_last: bool = True,
    pin_memory: bool = False,
) -> BatchLoader:
    """Batches of steps start_step .. total_steps - 1, one Batch per step.

    The batch of a step depends only on data set, seed, step, sizes and flip, not on start_step or workers. Rank r of w
    gets the images from r * batch_size / w of the global batch, with the padding of the whole batch.

    An image that cannot be decoded raises BadImageError if the data set is strict. Otherwise it is replaced by the next
    image of the data set, logged and counted in `bad_images`; the number of steps stays equal on all ranks, but the
    padding may then differ between ranks.

    Args:
        dataset: DetectionDataset.
        batch_size: images of the global batch, a multiple of world_size.
        total_steps: steps of the whole run.
        seed: >= 0.
        start_step: the step to resume at.
        world_size, rank: number of processes, and the index of this one.
        workers: loader processes; 0 loads in this process.
        prefetch: batches that each worker loads ahead.
        short_sides, max_side, flip: see Augmentation.
        divisor: padded height and width are multiples of it.
        aspect_grouping: batch portrait, square and landscape images separately, to save padding.
        channels_last: memory format of the images.
        pin_memory: page-locked batches, for CUDA.
    Returns: iterable of Batch with len().
    Raises: ValueError.
    """
    name = "build_train_loader"
    _check(name, batch_size=(batch_size, 1), total_steps=(total_steps, 0), seed=(seed, 0), start_step=(start_step, 0))
    _check(name, workers=(workers, 0), prefetch=(prefetch, 1), divisor=(divisor, 1))
    _check_rank(name, rank, world_size)
    if batch_size % world_size:
        raise ValueError(f"{name}: batch_size must be a multiple of world_size {world_size}, got {batch_size}")
    share = batch_size // world_size
    batches = TrainBatches(
        dataset,
        Augmentation(tuple(short_sides), max_side, flip),
        batch_size=batch_size,
        seed=seed,
        own=range(rank * share, (rank + 1) * share),
        divisor=divisor,
        grouping=aspect_grouping,
        channels_last=channels_last,
    )
    steps = range(min(start_step, total_steps), total_steps)
    return BatchLoader(batches, steps, workers=workers, pin_memory=pin_memory, prefetch=prefetch)


def build_eval_loader(
    dataset: DetectionDataset,
    *,
    batch_size: int = 16,
    world_size: int = 1,
    rank: int = 0,
    workers: int = 0,
    short_side: int | None = None,
    max_side: int | None = None,
    divisor: int = 32,
    channels_last: bool = True,
    pin_memory: bool = False,
) -> BatchLoader:
    """Every image once, in batches of similar shape. Rank k % world_size gets batch k: ranks may differ by one batch.

    An image that cannot be decoded raises BadImageError if the data set is strict; otherwise it is skipped, logged and
    counted in `bad_images`.

    Args:
        dataset: DetectionDataset.
        batch_size: maximum number of images in a batch.
        world_size, rank, workers, divisor, channels_last, pin_memory: as in build_train_loader.
        short_side, max_side: size of the images, see resized_size.
    Returns: iterable of Batch with len().
    Raises: ValueError.
    """
    name = "build_eval_loader"
    _check(name, batch_size=(batch_size, 1), workers=(workers, 0), divisor=(divisor, 1))
    _check_rank(name, rank, world_size)
    Augmentation(() if short_side is None else (short_side,), max_side)  # checks the two
    batches = EvalBatches(
        dataset,
        batch_size=batch_size,
        short_side=short_side,
        max_side=max_side,
        divisor=divisor,
        channels_last=channels_last,
    )
    return BatchLoader(batches, range(rank, len(batches), world_size), workers=workers, pin_memory=pin_memory)
