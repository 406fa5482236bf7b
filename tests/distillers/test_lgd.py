"""LGD against a transcription of docs/methods.md section 2 in plain loops, sharing only the weights.

The transcription, corners clamped to the padded image, has features and gradients of the published module at equal
weights, for images of one size.
"""

import dataclasses
import math

import pytest
import torch
from ragged import LEVELS, SIZE, assert_close_gradients, gradients, part_of, ragged_batch, ragged_pyramid
from torch.nn import functional as F

from fastkd.distillers import LGD
from fastkd.distillers.lgd import (
    AppearanceEncoder,
    KnowledgeMapper,
    LabelEncoder,
    RelationAdapter,
    TransformNet,
)
from fastkd.distillers.lgd_objects import box_descriptors, gather_objects

CHANNELS, HEADS = 12, 4


# the transcription: one image, one object, one cell at a time


def norm(vector):
    """LayerNorm of a vector (or of everything in a tensor) without affine."""
    centred = vector - vector.mean()
    return centred / (centred.square().mean() + 1e-5).sqrt()


def layer(module, vector):
    return norm(module.linear.weight @ vector + module.linear.bias).clamp(min=0)


def transform(net, vector):
    hidden = vector
    for module in net.layers:
        hidden = layer(module, hidden)
    matrix = (net.matrix.weight @ hidden + net.matrix.bias).reshape(len(vector), len(vector))
    return sum(vector[i] * matrix[i] for i in range(len(vector)))


def mask_crop(mask, box):
    """The mask cropped to the box at 7x7: means of bilinear samples (half-pixel offsets), at least one half."""
    tall, broad, mask = *mask.shape, mask.tolist()
    x1, y1, x2, y2 = (corner - 0.5 for corner in box)
    high, wide = (y2 - y1) / 7, (x2 - x1) / 7
    rows, columns = max(math.ceil(high), 1), max(math.ceil(wide), 1)

    def sample(y, x):
        if not (-1 <= y <= tall and -1 <= x <= broad):
            return 0.0
        y, x = min(max(y, 0), tall - 1), min(max(x, 0), broad - 1)
        top, left = int(y), int(x)
        down, right = min(top + 1, tall - 1), min(left + 1, broad - 1)
        a, b = y - top, x - left
        return (1 - a) * ((1 - b) * mask[top][left] + b * mask[top][right]) + a * (
            (1 - b) * mask[down][left] + b * mask[down][right]
        )

    cells = []
    for i in range(7):
        for j in range(7):
            samples = [
                sample(y1 + high * (i + (p + 0.5) / rows), x1 + wide * (j + (q + 0.5) / columns))
                for p in range(rows)
                for q in range(columns)
            ]
            cells.append(1.0 if sum(samples) / len(samples) >= 0.5 else 0.0)
    return cells


def objects_of(batch, image, context):
    """[(box, label or None, mask or None, is context)] of one image."""
    found = []
    for k in range(len(batch.boxes)):
        if batch.image_index[k] == image:
            mask = None if batch.masks is None else batch.masks[k].double()
            found.append((batch.boxes[k].tolist(), batch.labels[k].item(), mask, False))
    height, width = batch.image_sizes[image].tolist()
    if context or not found:
        box = [0.0, 0.0, float(width), float(height)] if context else [0.0, 0.0, 1.0, 1.0]
        mask = torch.zeros(batch.padded_size, dtype=torch.float64)
        mask[: int(box[3]), : int(box[2])] = 1
        found.append((box, None, mask if batch.masks is not None else None, context))
    return found


def descriptor(obj, num_classes, padded_size, use_masks):
    box, label, mask, _ = obj
    height, width = padded_size
    x1, x2 = (min(max(x, 0), width - 1) for x in box[0::2])
    y1, y2 = (min(max(y, 0), height - 1) for y in box[1::2])
    entries = [x1 / width, y1 / height, x2 / width, y2 / height]
    entries += [1.0 if label == c else 0.0 for c in range(num_classes)]
    if use_masks:
        entries += mask_crop(mask, box)
    return torch.tensor(entries, dtype=torch.float64) * 2 - 1


def covered_cells(obj, padded_size, size, use_masks):
    box, _, mask, _ = obj
    height, width = padded_size
    cells = []
    for y in range(size[0]):
        for x in range(size[1]):
            if use_masks:
                inside = mask[math.floor(y * height / size[0]), math.floor(x * width / size[1])] > 0
            else:
                x1, x2 = (min(max(side, 0), width - 1) * size[1] / width for side in box[0::2])
                y1, y2 = (min(max(side, 0), height - 1) * size[0] / height for side in box[1::2])
                inside = y1 <= y <= y2 and x1 <= x <= x2
            if inside:
                cells.append((y, x))
    return cells


def attend(attention, query, keys):
    """One query vector over a list of key = value vectors, head by head."""
    depth = len(query) // attention.num_heads
    weight, bias = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
    q = weight[0] @ query + bias[0]
    k, v = ([weight[i] @ key + bias[i] for key in keys] for i in (1, 2))
    heads = []
    for head in range(attention.num_heads):
        part = slice(head * depth, (head + 1) * depth)
        logits = torch.stack([q[part] @ key[part] / math.sqrt(depth) for key in k])
        probabilities = logits.exp() / logits.exp().sum()
        heads.append(sum(p * value[part] for p, value in zip(probabilities, v, strict=True)))
    return attention.out_proj.weight @ torch.cat(heads) + attention.out_proj.bias


def label_embeddings(module, descriptors):
    local = [
        transform(module.local_transform, layer(module.local, transform(module.input_transform, d)))
        for d in descriptors
    ]
    features = []
    for vector in local:
        for part in module.expand:
            vector = layer(part, vector)
        features.append(vector)
    highest = torch.stack(features).max(dim=0).values
    return [layer(module.embed, torch.cat([vector, highest])) for vector in local]


def conv(module, level):
    return F.conv2d(level[None], module.weight, module.bias, padding=1)[0]


def transcribe_image(lgd, pyramid, batch, image):
    """The instructive levels [C, H_l, W_l] of one image."""
    objects = objects_of(batch, image, lgd.context)
    query_from = lgd.relation.query
    if query_from != "appearance_only":
        descriptors = [descriptor(o, lgd.num_classes, batch.padded_size, lgd.use_masks) for o in objects]
        labels = [layer(lgd.relation.label, e) for e in label_embeddings(lgd.labels, descriptors)]
    instructive = []
    for level in pyramid:
        source = level[image].detach() if lgd.detach_appearance else level[image]
        size = source.shape[1:]
        cells = [covered_cells(o, batch.padded_size, size, lgd.use_masks) for o in objects]
        if query_from != "label_only":
            encoded = norm(conv(lgd.appearance.conv, source)).clamp(min=0)
            appearance = [
                sum(encoded[:, y, x] for y, x in covered) / len(covered) if covered else torch.zeros(CHANNELS).double()
                for covered in cells
            ]
        queries = appearance if query_from.startswith("appearance") else labels
        keys = appearance if query_from in ("label", "appearance_only") else labels
        related = [attend(lgd.relation.attention, query, keys) for query in queries]
        painted = torch.zeros(CHANNELS, *size, dtype=torch.float64)
        shared = torch.zeros(CHANNELS, dtype=torch.float64)
        for obj, covered, a in zip(objects, cells, related, strict=True):
            if obj[3]:
                shared = lgd.mapper.context.weight @ a + lgd.mapper.context.bias
                continue
            embedding = lgd.mapper.object.weight @ a + lgd.mapper.object.bias
            for y, x in covered:
                one = torch.zeros(size, dtype=torch.float64)
                one[y, x] = 1
                painted = painted + embedding[:, None, None] * one
        result = (conv(lgd.mapper.paint, painted) + shared[:, None, None]).clamp(min=0)
        first, second, third = lgd.mapper.refine
        result = norm(conv(first, result)).clamp(min=0)
        result = norm(conv(second, result)).clamp(min=0)
        instructive.append(norm(conv(third, result)))
    return instructive


def transcribe(lgd, pyramid, batch, detach_student=False):
    """Loss and instructive pyramid."""
    by_image = [transcribe_image(lgd, pyramid, batch, image) for image in range(len(batch))]
    instructive = [torch.stack(levels) for levels in zip(*by_image, strict=True)]
    total, elements = 0, 0
    for level, target in zip(pyramid, instructive, strict=True):
        for image in range(len(batch)):
            student = level[image].detach() if detach_student else level[image]
            for index, module in enumerate(lgd.student_adapter):
                student = conv(module, student) if index % 2 == 0 else student.clamp(min=0)
            for channel in range(CHANNELS):
                difference = norm(student[channel]) - norm(target[image, channel].detach())
                total, elements = total + difference.square().sum(), elements + difference.numel()
    return total / elements, instructive


# the comparisons


def build(num_classes=3, **options):
    torch.manual_seed(1)
    return LGD(num_classes, CHANNELS, heads=HEADS, **options).double()


def objective(losses, instructive):
    """The distillation loss and a stand-in for the detector's loss on the instructive pyramid."""
    weights = [torch.linspace(-1, 2, level.numel(), dtype=level.dtype).reshape(level.shape) for level in instructive]
    return losses + sum((level * weight).square().sum() for level, weight in zip(instructive, weights, strict=True))


VARIANTS = [
    {},
    {"context": False},
    {"detach_appearance": True, "context": False},
    {"use_masks": True},
    {"use_masks": True, "context": False},
    {"adapter_query": "label"},
    {"adapter_query": "appearance_only"},
    {"adapter_query": "label_only", "context": False},
]


@pytest.mark.parametrize(
    ("options", "detach_student"), [(options, False) for options in VARIANTS] + [({}, True)], ids=str
)
def test_equals_transcription(options, detach_student):
    lgd = build(**options)
    batch = ragged_batch((2, 0, 4), masks=lgd.use_masks)
    pyramid = ragged_pyramid(3, CHANNELS)
    made = lgd(pyramid, batch, detach_student=detach_student)
    expected_loss, expected = transcribe(lgd, pyramid, batch, detach_student)
    torch.testing.assert_close(made.losses["lgd_distill"], expected_loss, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(made.instructive, expected, rtol=1e-8, atol=1e-8)
    actual = gradients(objective(made.losses["lgd_distill"], made.instructive), lgd, pyramid)
    wanted = gradients(objective(expected_loss, expected), lgd, pyramid)
    assert_close_gradients(actual, wanted, tolerance=1e-6)
    assert all(value is not None for name, value in actual.items() if not name.startswith("input"))


@pytest.mark.parametrize(("num_classes", "counts", "context"), [
    (1, (0,), True), (1, (0, 0), False), (1, (1,), True), (1, (9, 1), False), (365, (2, 0), False),
])  # fmt: skip
def test_other_class_counts_and_empty_images(num_classes, counts, context):
    """Every parameter has a gradient whatever the batch holds; the pyramid agrees with the transcription."""
    lgd = build(num_classes, context=context)
    batch = ragged_batch(counts, num_classes=num_classes)
    pyramid = ragged_pyramid(len(counts), CHANNELS, levels=LEVELS[1:])
    made = lgd(pyramid, batch)
    expected_loss, expected = transcribe(lgd, pyramid, batch)
    torch.testing.assert_close(made.losses["lgd_distill"], expected_loss, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(made.instructive, expected, rtol=1e-8, atol=1e-8)
    found = gradients(objective(made.losses["lgd_distill"], made.instructive), lgd)
    assert all(value is not None and value.isfinite().all() for value in found.values())


def test_gradient_flows():
    """The distillation loss reaches student and adapter only, with detach_student the adapter only."""
    batch, pyramid = ragged_batch((2, 3)), ragged_pyramid(2, CHANNELS)
    lgd = build()
    found = gradients(lgd(pyramid, batch).losses["lgd_distill"], lgd, pyramid)
    reached = {name.split(".")[0] for name, value in found.items() if value is not None}
    assert reached == {"student_adapter", "input0", "input1", "input2", "input3"}
    found = gradients(lgd(pyramid, batch, detach_student=True).losses["lgd_distill"], lgd, pyramid)
    assert {name.split(".")[0] for name, value in found.items() if value is not None} == {"student_adapter"}
    for detached in (False, True):
        lgd = build(detach_appearance=detached)
        found = gradients(lgd(pyramid, batch).instructive[0].square().sum(), lgd, pyramid)
        assert (found["input0"] is None) == detached
        assert found["appearance.conv.weight"].any()


def test_weight_is_the_distillation_loss_s_alone():
    batch, pyramid = ragged_batch((2, 3)), ragged_pyramid(2, CHANNELS)
    plain, weighted = build()(pyramid, batch), build(weight=0.25)(pyramid, batch)
    torch.testing.assert_close(weighted.losses["lgd_distill"], 0.25 * plain.losses["lgd_distill"])
    assert all(torch.equal(one, two) for one, two in zip(plain.instructive, weighted.instructive, strict=True))


def test_objects_of_a_batch():
    batch = ragged_batch((2, 0, 3))
    with_context = gather_objects(batch, context=True, use_masks=False)
    assert with_context.image_index.tolist() == [0, 0, 2, 2, 2, 0, 1, 2]
    assert torch.equal(with_context.labels[:5], batch.labels) and with_context.labels[5:].tolist() == [-1, -1, -1]
    height, width = batch.image_sizes[1].tolist()
    assert torch.equal(with_context.boxes[:5], batch.boxes) and with_context.boxes[6].tolist() == [0, 0, width, height]
    without = gather_objects(batch, context=False, use_masks=False)
    assert without.image_index.tolist() == [0, 0, 2, 2, 2, 1] and without.labels[5] == -1
    assert without.boxes[5].tolist() == [0, 0, 1, 1]
    assert without.masks is None and without.mask_crops is None


def test_masks_of_dummy_objects_cover_their_boxes():
    batch = ragged_batch((1, 0), masks=True)
    objects = gather_objects(batch, context=True, use_masks=True)
    height, width = batch.image_sizes[1].tolist()
    assert objects.masks[2, :height, :width].all() and objects.masks[2].sum() == height * width
    assert objects.mask_crops.shape == (3, 49) and objects.mask_crops[1:].all()
    unit = gather_objects(batch, context=False, use_masks=True).masks[1]
    assert unit[0, 0] and unit.sum() == 1


def test_descriptor_entries():
    batch = ragged_batch((2, 0))
    batch.boxes = torch.tensor([[0.0, 16.0, 48.0, 64.0], [-3.0, 32.0, 96.0, 48.0]])
    batch.labels = torch.tensor([2, 0])
    found = box_descriptors(gather_objects(batch, context=False, use_masks=False), 3, SIZE)
    bottom, right = 2 * 63 / 64 - 1, 2 * 95 / 96 - 1  # clamped to the last pixel
    expected = [
        [-1, -0.5, 0, bottom, -1, -1, 1],
        [-1, 0, right, 0.5, 1, -1, -1],
        [-1, -1, 2 / 96 - 1, 2 / 64 - 1, -1, -1, -1],
    ]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_prepared_objects_change_nothing():
    lgd, batch, pyramid = build(), ragged_batch((2, 0, 4)), ragged_pyramid(3, CHANNELS)
    prepared = lgd.prepare(batch, [tuple(level.shape[2:]) for level in pyramid])
    batch_without_counts = dataclasses.replace(batch, counts=[])  # nobody looks at them again
    one, other = lgd(pyramid, batch), lgd(pyramid, batch_without_counts, prepared=prepared)
    assert torch.equal(one.losses["lgd_distill"], other.losses["lgd_distill"])


def test_objects_of_other_images_do_not_matter():
    """An image's instructive pyramid is the same alone and in a batch, with boxes in any order."""
    lgd = build()
    batch, pyramid = ragged_batch((3, 6, 1)), ragged_pyramid(3, CHANNELS)
    whole = lgd.instruct(pyramid, batch)
    alone = lgd.instruct([level[:1] for level in pyramid], part_of(batch, range(0, 1)))
    torch.testing.assert_close([level[:1] for level in whole], alone)
    order = torch.tensor([2, 0, 1, *range(3, 10)])
    shuffled = dataclasses.replace(batch, boxes=batch.boxes[order], labels=batch.labels[order])
    torch.testing.assert_close(lgd.instruct(pyramid, shuffled), whole)


def test_split_batch_averages_to_the_whole():
    lgd = build()
    batch, pyramid = ragged_batch((3, 0, 1, 2)), ragged_pyramid(4, CHANNELS)

    def found(images):
        levels = [level[images.start : images.stop] for level in pyramid]
        made = lgd(levels, part_of(batch, images))
        return gradients(made.losses["lgd_distill"] + sum(level.abs().mean() for level in made.instructive), lgd)

    halves = found(range(0, 2)), found(range(2, 4))
    whole = found(range(0, 4))
    averaged = {name: (halves[0][name] + halves[1][name]) / 2 for name in whole}
    assert_close_gradients(averaged, whole, tolerance=1e-8)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_autocast(options):
    """bf16 autocast: float32 loss near the float32 one, finite gradients everywhere."""
    torch.manual_seed(1)
    lgd = LGD(3, 16, heads=4, **options)
    batch, pyramid = ragged_batch((2, 0, 4), masks=lgd.use_masks), ragged_pyramid(3, 16, dtype=torch.float32)
    plain = lgd(pyramid, batch).losses["lgd_distill"]
    with torch.autocast("cpu", torch.bfloat16):
        made = lgd(pyramid, batch)
        total = made.losses["lgd_distill"] + sum(level.float().square().mean() for level in made.instructive)
    assert made.losses["lgd_distill"].dtype == torch.float32
    assert all(level.dtype == torch.bfloat16 for level in made.instructive)
    torch.testing.assert_close(made.losses["lgd_distill"], plain, rtol=0.1, atol=0)
    assert all(value is not None and value.isfinite().all() for value in gradients(total, lgd).values())


def test_parts_have_right_gradients():
    """gradcheck of the small parts."""
    torch.manual_seed(0)
    batch = ragged_batch((2, 0, 1))
    objects = gather_objects(batch, context=True, use_masks=False)
    count = len(objects.labels)
    net = TransformNet(3).double()
    encoder = LabelEncoder(5, 6).double()
    relation = RelationAdapter(4, 2).double()
    mapper = KnowledgeMapper(4, True).double()
    appearance = AppearanceEncoder(4).double()

    def random(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    assert torch.autograd.gradcheck(net, random(2, 3))
    index = objects.image_index
    assert torch.autograd.gradcheck(lambda d: encoder(d, index, 3), random(count, 5), fast_mode=True)
    assert torch.autograd.gradcheck(
        lambda a, b: relation(a, b, index, 2), (random(count, 4), random(2, count, 4)), fast_mode=True
    )
    like = [torch.empty(3, 4, 2, 3)]
    assert torch.autograd.gradcheck(lambda a: mapper(a, objects, SIZE, like)[0], random(1, count, 4), fast_mode=True)
    assert torch.autograd.gradcheck(lambda x: appearance([x], objects, SIZE), random(3, 4, 2, 3), fast_mode=True)


def test_bad_arguments():
    with pytest.raises(ValueError, match="num_classes must be at least 1"):
        LGD(0, 16)
    with pytest.raises(ValueError, match="divisible by heads"):
        LGD(2, 12, heads=8)
    with pytest.raises(ValueError, match="adapter_query must be one of"):
        LGD(2, 16, adapter_query="both")
    with pytest.raises(ValueError, match="LGD: weight must be at least 0, got -1"):
        LGD(2, 16, weight=-1)
    with pytest.raises(ValueError, match="LGD: instructive_weight must be at least 0, got nan"):
        LGD(2, 16, instructive_weight=float("nan"))
    batch, pyramid = ragged_batch((1, 1)), ragged_pyramid(2, 16, dtype=torch.float32)
    with pytest.raises(ValueError, match="student must have 24 channels, got 16"):
        LGD(3, 24)(pyramid, batch)
    with pytest.raises(ValueError, match="masks must be given"):
        LGD(3, 16, use_masks=True)(pyramid, batch)
    with pytest.raises(ValueError, match="counts must add up"):
        LGD(3, 16)(pyramid, dataclasses.replace(batch, counts=[2, 1]))
