"""benchmarks/gpu/launches.py: launches of an op against emulation and plans; calls in wrappers; a step, no GPU."""

import json
import os
import subprocess
import sys

import pytest
import simt
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="Triton is not installed")

from benchmarks.gpu import launches, triton_report
from benchmarks.ops.draws import Draw, Shape
from fastkd.ops.triton import attention_backward, attention_forward, attention_mass
from fastkd.ops.triton.configurations import Card

SHAPE = Shape(2, 64, 96, 8, 2, strides=(8, 16), boxes=3)
SIZES = [side for size in SHAPE.level_sizes for side in size]


def calls_of_cuda(draw):
    """(op, arguments) of the CUDA C++ ops that the distillers call."""
    levels, boxes, size = draw.pyramid(), draw.boxes(), SHAPE.image_size
    cells = [level.permute(0, 2, 3, 1) for level in levels]
    taps, bias = torch.randn(2, SHAPE.images * SHAPE.boxes, 9, SHAPE.channels), torch.randn(SHAPE.channels)
    mass = [level.float().square() for level in draw.pyramid(SHAPE.heads)]
    loss, moments = simt.run("instance_norm_mse", levels, levels, 1e-5)
    pooled, kept, normal = simt.run("norm_relu_box_pool", levels, *boxes, *size, 1e-5)
    mimic, total = simt.run("value_mimic", levels, levels, mass, 1e-5)
    return {
        "instance_norm_mse": (levels, levels, 1e-5),
        "instance_norm_mse_backward": (loss, levels, levels, moments, True, False),
        "norm_relu_box_pool": (levels, *boxes, *size, 1e-5),
        "norm_relu_box_pool_backward": (pooled, levels, *boxes, *size, kept, normal),
        "box_paint_conv3x3": (taps, bias, *boxes, *size, SHAPE.images, SIZES, levels[0]),
        "box_paint_conv3x3_backward": (cells, *boxes, *size),
        "value_mimic": (levels, levels, mass, 1e-5),
        "value_mimic_backward": (mimic, levels, levels, mass, total, 1e-5),
    }


@pytest.mark.parametrize("last", [True, False])
def test_ops_launch_as_many_kernels_as_are_counted(last):
    draw = Draw(SHAPE, torch.bfloat16, last, torch.device("cpu"))
    for op, arguments in calls_of_cuda(draw).items():
        simt.run(op, *arguments)
        assert simt.module.traffic()["launches"] == launches.launches_of(op, len(SHAPE.strides), last), op


class Kernels(TorchDispatchMode):
    """Counts torch's own operations that would be launches."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name not in ("empty", "new_empty", "empty_like", "view", "detach", "alias", "select"):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("projected", [True, False])
def test_attention_launches_as_many_kernels_as_are_counted(projected):
    queries, levels, *rest = triton_report._arguments(triton_report.Case("forward", projected=projected))
    arguments, card, casts = [queries, levels, *rest], Card(9, 132), 1 + projected
    number = len(levels)
    chosen = torch.empty(*queries.shape[:3:2], dtype=torch.bool, device="meta")
    # the first call of a shape also makes its table of tiles and copies it to the card
    *_, output, logsumexp, normal = attention_forward.plan_forward(*arguments, card=card)
    attention_backward.plan_backward(output, output, normal, *arguments, True, True, card)
    attention_mass.plan_mass(*arguments[:5], chosen, logsumexp, 1.0, card)
    with Kernels() as kernels:
        planned, output, logsumexp, normal = attention_forward.plan_forward(*arguments, card=card)
    assert kernels.found == ["copy_"] * casts
    assert len(planned) + casts == launches.launches_of("instance_attention", number, True, casts)
    with Kernels() as kernels:
        backward = attention_backward.plan_backward(output, output, normal, *arguments, True, True, card)
        backward[1]()
    counted = launches.launches_of("instance_attention_backward", number, True, casts)
    assert len(backward[0]) + len(kernels.found) == counted, kernels.found
    with Kernels() as kernels:
        planned, _ = attention_mass.plan_mass(*arguments[:5], chosen, logsumexp, 1.0, card)
    assert len(planned) + len(kernels.found) == launches.launches_of("attention_mass", number, True, casts)


TEXT = """
    def call(self, args):
        # extern_kernels.mm(a comment)
        buf0 = extern_kernels.convolution(a, b, stride=(1, 1), bias=None)
        assert_tensor_metadata(buf0, (2, 3), (3, 1), torch.float32, 'torch.ops.aten.convolution.default')
        triton_red_fused_1.run(buf0, 16, stream=raw_stream0)
        extern_kernels.addmm(a, b, c, out=buf2)
        buf3 = torch.ops.aten.convolution_backward.default(g, x, w, [256], [1, 1], False, 1, [True, True, False])
        buf4 = torch.ops.fastkd.instance_norm_mse.default([buf3], [buf0], 1e-05)
        buf5.copy_(buf4, False)
runner = Runner(partitions=[])
"""


def test_calls_are_counted_by_what_they_launch():
    expected = {"convolutions": 3, "generated": 1, "products": 1, "fastkd": 5, "other": 1}
    assert launches.count(TEXT, 5) == expected
    assert launches.count(TEXT, 5, last=False) == expected | {"fastkd": 2}
    for weight, own in (("w", 4), ("None", 3)):
        call = f"torch.ops.fastkd.instance_attention.default(q, [x], {weight}, [r], [c], [v])\nrunner = Runner"
        assert launches.count(TEXT.replace("runner = Runner", call), 5) == expected | {"fastkd": 5 + own}
    with pytest.raises(ValueError, match=r"launches: aten.sort must be in CALLS; add how many kernels it launches"):
        launches.count(TEXT.replace("aten.convolution_backward", "aten.sort"), 5)


@pytest.mark.long
@pytest.mark.skipif(torch.version.cuda is None, reason="torch is built without CUDA")
def test_a_compiled_distiller_without_a_gpu(tmp_path):
    """In a separate process, as it disables CUDA in torch."""
    out = tmp_path / "counts.json"
    sizes = {"images": "2", "height": "64", "width": "64", "channels": "32", "boxes": "2", "strides": "8 16"}
    options = {"method": "icd", "settings": "combined", **sizes}
    words = [word for name, value in options.items() for word in (f"--{name}", *value.split())]
    command = [sys.executable, "-m", "benchmarks.gpu.launches", *words]
    run = subprocess.run(
        [*command, "--json", out], env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert "| icd | combined | both |" in run.stdout
    (sides,) = json.loads(out.read_text()).values()
    # every op used its kernel
    attention, mass, mimic = 2 + 2, 1 + 1, 2
    assert sides["forward"]["fastkd"] == attention + mass + mimic
    assert sides["backward"]["fastkd"] == 5 + 1
    assert all(kinds["generated"] > 0 and kinds["products"] > 0 for kinds in sides.values())
