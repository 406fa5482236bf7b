"""ICD against a transcription of methods.md section 1 in plain loops, sharing only the weights."""

import dataclasses
import math

import pytest
import torch
from icd_transcription import CHANNELS, HEADS, TEACHER, cells_of, decode_image, descriptor, draw, transcribe
from ragged import LEVELS, SIZE, assert_close_gradients, gradients, part_of, priors, ragged_batch, ragged_pyramid
from torch.nn import functional as F

from fastkd.distillers import ICD
from fastkd.distillers.decoder import DecoderLayer, position_embeddings, project_cells, valid_sizes
from fastkd.distillers.icd import auxiliary_losses
from fastkd.distillers.queries import (
    QueryEncoder,
    anchor_embedding,
    draw_queries,
    make_noise,
    query_count,
    scale_indicator,
)

# the comparisons


def build(num_classes=3, **options):
    torch.manual_seed(1)
    prior = priors(num_classes)
    module = ICD(num_classes, prior, CHANNELS, teacher_channels=TEACHER, heads=HEADS, **options).double()
    for name, parameter in module.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)  # zeros would hide where a bias goes
    return module, prior


CASES = [
    ((2, 0, 1), {"rho": 2}, 3),
    ((2, 1), {"rho": 1.5, "layers": 2, "weight": 3.0}, 3),
    ((0, 3), {"rho": 2, "temperature": 2.5}, 3),
    ((4,), {"rho": 5, "max_queries": 2}, 1),
    ((1, 2), {"rho": 1}, 365),
]


@pytest.mark.parametrize(
    ("counts", "options", "num_classes", "detach_student"), [(*c, False) for c in CASES] + [(*CASES[3], True)], ids=str
)
def test_equals_transcription(counts, options, num_classes, detach_student):
    module, prior = build(num_classes, **options)
    batch = ragged_batch(counts, num_classes=num_classes)
    student, teacher = ragged_pyramid(len(counts), CHANNELS), ragged_pyramid(len(counts), TEACHER, seed=1)
    losses = module(student, batch, teacher, detach_student=detach_student).losses
    expected = transcribe(module, prior, student, teacher, batch, detach_student)
    assert losses.keys() == expected.keys()
    for name, loss in losses.items():
        torch.testing.assert_close(loss, expected[name], rtol=1e-5, atol=1e-6)  # queries are drawn in float32
        actual, wanted = gradients(loss, module, student), gradients(expected[name], module, student)
        assert_close_gradients(actual, wanted, tolerance=1e-4)
        reached = {key.split(".")[0][:5] for key, value in actual.items() if value is not None}
        wanted_parts = {"stude"} | (set() if detach_student else {"input"})
        assert reached == (wanted_parts if name == "icd_distill" else {"encod", "decod", "auxil"})
    total = gradients(sum(losses.values()), module, teacher)
    assert all((value is None) == name.startswith("input") for name, value in total.items())


@pytest.mark.parametrize("counts", [(0,), (0, 0)], ids=str)
def test_batch_without_boxes(counts):
    """One fake query an image; localisation and distillation are zeros that keep every parameter in the graph."""
    module, prior = build()
    batch = ragged_batch(counts)
    student, teacher = ragged_pyramid(len(counts), CHANNELS), ragged_pyramid(len(counts), TEACHER, seed=1)
    losses = module(student, batch, teacher).losses
    assert losses["icd_localisation"] == 0 and losses["icd_distill"] == 0
    expected = transcribe(module, prior, student, teacher, batch)
    torch.testing.assert_close(losses["icd_identification"], expected["icd_identification"], rtol=1e-5, atol=1e-6)
    found = gradients(sum(losses.values()), module, student)
    assert all(value is not None and value.isfinite().all() for value in found.values())
    maps = module.attention(teacher, batch)
    assert [tuple(level.shape) for level in maps] == [(0, HEADS, *size) for size in LEVELS]


@pytest.mark.parametrize(("count", "rho", "limit", "expected"), [
    (0, 5, 300, 1), (1, 5, 300, 6), (7, 5, 300, 42), (60, 5, 300, 300), (400, 5, 300, 400), (3, 0.5, 300, 4),
    (1, 0, 300, 1), (20, 5, 100, 100),
])  # fmt: skip
def test_query_count(count, rho, limit, expected):
    assert query_count(count, rho, limit) == expected


@pytest.mark.parametrize("num_classes", [1, 11])
def test_queries_equal_transcription(num_classes):
    batch, prior = ragged_batch((3, 0, 5), num_classes=num_classes), priors(num_classes)
    found = draw_queries(batch, make_noise(batch, rho=4, max_queries=20), prior)
    encoder = QueryEncoder(num_classes, 8)
    described = encoder.describe(found)
    assert found.valid.shape == (3, 20) and torch.equal(found.mass_mask, found.real[:, :5])
    for image, queries in enumerate(draw(batch, prior, 4, 20)):
        assert found.valid[image].tolist() == [n < len(queries) for n in range(20)]
        assert found.real[image].tolist() == [n < batch.counts[image] for n in range(20)]
        for n, query in enumerate(queries):
            box, label, anchor, pixels, _ = query
            assert found.labels[image, n] == label
            torch.testing.assert_close(found.boxes[image, n], torch.tensor(box), rtol=0, atol=1e-6)
            torch.testing.assert_close(found.anchors[image, n], torch.tensor(anchor), rtol=0, atol=1e-6)
            torch.testing.assert_close(found.pixel_wh[image, n], torch.tensor(pixels), rtol=0, atol=1e-4)
            torch.testing.assert_close(described[image, n].double(), descriptor(query, num_classes), rtol=0, atol=2e-6)
    assert found.real.flatten()[found.real_index].all()
    real_wh = found.pixel_wh.flatten(0, 1)[found.real_index]
    torch.testing.assert_close(real_wh, batch.boxes[:, 2:] - batch.boxes[:, :2])


def test_fakes_follow_the_priors():
    """Over many draws: class frequencies, sizes within mean +- 2 std and [0.002, 0.7], boxes in the image."""
    batch, prior = ragged_batch((1,) * 4, num_classes=6), priors(6)
    found = draw_queries(batch, make_noise(batch, rho=4000, max_queries=4000), prior)
    fake = found.valid & ~found.real
    labels, boxes, anchors = found.labels[fake], found.boxes[fake], found.anchors[fake]
    share = torch.bincount(labels, minlength=6) / len(labels)
    assert (share - prior.frequency).abs().max() < 0.02 and share[1] == 0
    size = boxes[:, 2:] - boxes[:, :2]
    assert boxes.min() >= 0 and boxes.max() <= 1
    limit = (prior.mean + 2 * prior.std)[labels].clamp(max=0.7)
    assert (size <= limit + 1e-6).all()
    assert ((anchors >= boxes[:, :2] - 1e-6) & (anchors <= boxes[:, 2:] + 1e-6)).all()
    inner = (boxes.min(1).values > 0) & (boxes.max(1).values < 1) & (labels == 0)
    assert (size[inner] >= (prior.mean - 2 * prior.std)[0].clamp(min=0.002) - 1e-6).all()


def test_queries_depend_on_seed_and_image_only():
    batch, prior = ragged_batch((2, 0, 4)), priors(3)
    last = part_of(batch, range(2, 3))
    whole, part = draw_queries(batch, make_noise(batch), prior), draw_queries(last, make_noise(last), prior)
    number = part.valid.shape[1]
    assert torch.equal(whole.boxes[2:, :number], part.boxes) and torch.equal(whole.anchors[2:, :number], part.anchors)
    other = draw_queries(batch, make_noise(dataclasses.replace(batch, seeds=[1, 2, 3])), prior)
    assert not torch.equal(whole.anchors, other.anchors)


def test_scale_indicator_and_anchor_embedding():
    sizes = torch.tensor([[0.0, 1.0], [31.0, 66.0], [131.0, 263.0], [600.0, 5000.0]])
    bins = scale_indicator(sizes).unflatten(1, (2, 5)).argmax(2)
    expected = [[math.floor(min(max(math.log(s) * 1.44 - 5, 0), 4)) if s else 0 for s in row] for row in sizes.tolist()]
    assert bins.tolist() == expected and set(bins.flatten().tolist()) == {0, 1, 2, 3, 4}
    embedding = anchor_embedding(torch.tensor([[0.25, 0.5]]))[0]
    torch.testing.assert_close(embedding[[0, 64, 128, 192]], torch.tensor([1.0, 0, 0, -1]), rtol=0, atol=1e-6)


def test_valid_sizes():
    """ceil(image / stride) with the mean stride, never more than the level has."""
    sizes = torch.tensor([[64, 96], [57, 83], [1, 1]])
    assert [torch.stack(size, dim=1).tolist() for size in valid_sizes(sizes, SIZE, LEVELS)] == [
        [[8, 12], [8, 11], [1, 1]],
        [[4, 6], [4, 6], [1, 1]],
        [[2, 3], [2, 3], [1, 1]],
        [[1, 1], [1, 1], [1, 1]],
    ]
    assert [side.tolist() for side in valid_sizes(torch.tensor([[160, 96]]), (160, 96), [(2, 1)])[0]] == [[2], [1]]


def test_attention_of_real_queries():
    module, prior = build(rho=2, layers=2)
    batch, teacher = ragged_batch((2, 0, 1)), ragged_pyramid(3, TEACHER, seed=1)
    maps = module.attention(teacher, batch)
    assert [tuple(level.shape) for level in maps] == [(3, HEADS, *size) for size in LEVELS]
    torch.testing.assert_close(sum(level.flatten(2).sum(2) for level in maps), torch.ones(3, HEADS).double())
    number = 0
    for image, queries in enumerate(draw(batch, prior, 2, 300)):
        cells = cells_of(batch, image, LEVELS)
        probabilities = decode_image(module, teacher, queries, cells, image, 1.0)[-1][1]
        for n in range(batch.counts[image]):
            expected = [torch.zeros(HEADS, *size, dtype=torch.float64) for size in LEVELS]
            for s, (index, y, x, _) in enumerate(cells):
                expected[index][:, y, x] = torch.stack([probabilities[n][head][s] for head in range(HEADS)])
            torch.testing.assert_close([level[number] for level in maps], expected, rtol=1e-4, atol=1e-6)
            number += 1
    assert not any(level.requires_grad for level in maps)


def test_padding_gets_no_attention():
    """Teacher features outside an image have no effect."""
    module, _ = build()
    batch, student, teacher = ragged_batch((2, 3)), ragged_pyramid(2, CHANNELS), ragged_pyramid(2, TEACHER, seed=1)
    before = module(student, batch, teacher).losses
    changed = [level.detach().clone() for level in teacher]
    rows, columns = (int(side[1]) for side in valid_sizes(batch.image_sizes, SIZE, LEVELS)[0])
    assert columns < LEVELS[0][1]
    changed[0][1, :, rows:] = 1e4
    changed[0][1, :, :, columns:] = 1e4
    torch.testing.assert_close(module(student, batch, changed).losses, before, rtol=0, atol=0)


def test_split_batch_averages_to_the_whole(monkeypatch):
    """Halves, one without boxes: mean counts as normaliser, gradients averaged = the whole batch."""
    module, _ = build(rho=2, layers=2)
    batch, student, teacher = (
        ragged_batch((3, 1, 0, 0)),
        ragged_pyramid(4, CHANNELS),
        ragged_pyramid(4, TEACHER, seed=1),
    )

    def found(images):
        window = slice(images.start, images.stop)
        distilled = module([s[window] for s in student], part_of(batch, images), [t[window] for t in teacher])
        return gradients(sum(distilled.losses.values()), module)

    whole = found(range(0, 4))
    counts = []
    monkeypatch.setattr("fastkd.distillers.icd.global_mean", lambda count: counts.append(count.double()) or count)
    found(range(0, 2)), found(range(2, 4))
    mean = (counts[0] + counts[-1]) / 2
    assert counts[-1][1] == 0
    monkeypatch.setattr("fastkd.distillers.icd.global_mean", lambda count: mean)
    halves = found(range(0, 2)), found(range(2, 4))
    averaged = {name: (halves[0][name] + halves[1][name]) / 2 for name in whole}
    assert_close_gradients(averaged, whole, tolerance=1e-8)


def test_autocast():
    torch.manual_seed(1)
    module = ICD(3, priors(3), 16, teacher_channels=24, heads=4, layers=2)
    batch, student = ragged_batch((2, 0, 4)), ragged_pyramid(3, 16, dtype=torch.float32)
    teacher = [level.detach() for level in ragged_pyramid(3, 24, seed=1, dtype=torch.float32)]
    plain = module(student, batch, teacher).losses
    with torch.autocast("cpu", torch.bfloat16):
        losses = module(student, batch, [level.bfloat16() for level in teacher]).losses
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, plain[name], rtol=0.02, atol=0)
    assert all(value.isfinite().all() for value in gradients(sum(losses.values()), module).values())


def test_start_and_saved_priors():
    """Attention projections are initialised Xavier-uniform with zero bias; the priors are saved in the state dict."""
    prior = priors(4)
    module = ICD(4, prior, 32, teacher_channels=64)
    layer = module.decoder[0]
    for linear in (layer.query, layer.key, layer.value, layer.output, module.student_values[0]):
        bound = math.sqrt(6 / sum(linear.weight.shape))
        assert 0.9 * bound < linear.weight.abs().max() <= bound and not linear.bias.any()
    other = ICD(4, priors(4, seed=5), 32, teacher_channels=64)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other.prior_frequency, prior.frequency)


def test_parts_have_right_gradients():
    """gradcheck of the decoder layer and the auxiliary losses."""
    torch.manual_seed(0)
    layer = DecoderLayer(4, 3, 2).double()
    teacher = [level.detach() for level in ragged_pyramid(2, 3, levels=LEVELS[2:])]
    positions = position_embeddings(torch.tensor([[64, 96], [40, 70]]), SIZE, LEVELS[2:])
    weights = tuple(parameter for parameter in layer.parameters())
    queries = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda q, *_: layer(q, teacher, positions)[0], (queries, *weights), fast_mode=True)
    prior, batch = priors(3), ragged_batch((1, 0))
    drawn = draw_queries(batch, make_noise(batch, rho=2), prior)
    outputs = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: auxiliary_losses(x, drawn), outputs)


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_cells_are_projected_one_by_one(order):
    linear = torch.nn.Linear(6, 4).double()
    levels = [torch.randn(2, 6, *size, dtype=torch.float64) for size in ((3, 4), (2, 2))]
    levels = [level.contiguous(memory_format=order).requires_grad_() for level in levels]
    found = project_cells(linear, levels)
    for mine, level in zip(found, levels, strict=True):
        torch.testing.assert_close(mine.permute(0, 2, 3, 1), linear(level.permute(0, 2, 3, 1)))


def test_biases_that_softmax_ignores_get_zero_gradients():
    """DDP without find_unused_parameters needs a gradient of every parameter."""
    module, _ = build(layers=2)
    batch = ragged_batch((2, 1))
    losses = module(ragged_pyramid(2, CHANNELS), batch, ragged_pyramid(2, TEACHER, seed=1)).losses
    for layer in module.decoder:
        for gradient in torch.autograd.grad(
            sum(losses.values()), [layer.key.bias, layer.position.bias], retain_graph=True
        ):
            assert torch.equal(gradient, torch.zeros_like(gradient))


def test_auxiliary_by_hand():
    """One real query whose outputs are exactly its distances, one fake: losses 0 and log 2."""
    prior, batch = priors(1), ragged_batch((1,), num_classes=1)
    drawn = draw_queries(batch, make_noise(batch, rho=1), prior)
    sides = torch.cat([drawn.anchors - drawn.boxes[..., :2], drawn.boxes[..., 2:] - drawn.anchors], dim=2)
    outputs = torch.cat([torch.zeros(1, 2, 1), sides.clamp(1e-4).logit()], dim=2)
    identification, localisation = auxiliary_losses(outputs, drawn)
    torch.testing.assert_close(identification, torch.tensor(math.log(2)))
    assert localisation < 1e-4
    worse = auxiliary_losses(F.pad(outputs[..., :4], (0, 1), value=-50.0), drawn)[1]  # bottom distance 0
    height = drawn.boxes[0, 0, 3] - drawn.boxes[0, 0, 1]
    torch.testing.assert_close(worse, sides[0, 0, 3] / height, rtol=1e-3, atol=1e-4)


def test_bad_arguments():
    with pytest.raises(ValueError, match="that of the priors"):
        ICD(4, priors(3), 16)
    with pytest.raises(ValueError, match="divisible by heads"):
        ICD(3, priors(3), 12, heads=8)
    for options in ({"layers": 0}, {"rho": -1}, {"weight": -1}, {"max_queries": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} must be at least"):
            ICD(3, priors(3), 16, **options)
    with pytest.raises(ValueError, match="temperature must be > 0"):
        ICD(3, priors(3), 16, temperature=0)
    module, batch = ICD(3, priors(3), 16), ragged_batch((1, 1))
    pyramid = ragged_pyramid(2, 16, dtype=torch.float32)
    with pytest.raises(ValueError, match="student must have 16 channels, got 8"):
        module(ragged_pyramid(2, 8), batch, pyramid)
    with pytest.raises(ValueError, match="teacher must have 16 channels, got 8"):
        module(pyramid, batch, ragged_pyramid(2, 8))
    with pytest.raises(ValueError, match="images and cells"):
        module(pyramid[:2], batch, pyramid)
    with pytest.raises(ValueError, match="seeds must be 2 ints"):
        module(pyramid, dataclasses.replace(batch, seeds=[]), pyramid)
    with pytest.raises(ValueError, match="counts must add up"):
        module(pyramid, dataclasses.replace(batch, counts=[0, 1]), pyramid)
    for call in (lambda: module(pyramid, batch), lambda: module.attention(None, batch)):
        with pytest.raises(ValueError, match="ICD: teacher must be given, got None; pass the frozen teacher's pyramid"):
            call()
