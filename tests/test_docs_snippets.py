"""The Python of the pages: what is complete runs, the rest parses, and what it imports exists."""

import ast
import re
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from fastkd import ops

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PYTHON = re.compile(r"^```python\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
HOSTS = ("transformers", "lightning", "ultralytics", "detectron2", "mmengine", "mmdet")


def snippets(page: Path) -> list[str]:
    return PYTHON.findall(page.read_text(encoding="utf-8"))


def run(page: Path, names: dict) -> dict:
    """Runs a page's snippets one after the other in one namespace, which begins with what the page leaves out."""
    for number, code in enumerate(snippets(page), start=1):
        exec(compile(code, f"{page.name}, snippet {number}", "exec"), names)
    return names


def targets(images: int) -> list[dict]:
    boxes = torch.tensor([[4.0, 8, 40, 50], [20, 20, 60, 60]])
    return [{"boxes": boxes, "labels": torch.tensor([1, 3])} for _ in range(images)]


def test_the_ops_page_runs():
    torch.manual_seed(0)
    run(ROOT / "docs" / "ops.md", {})


def test_every_op_is_on_the_page_with_a_snippet():
    page = ROOT / "docs" / "ops.md"
    shown, code = set(re.findall(r"^::: fastkd\.ops\.(\w+)$", page.read_text(), re.MULTILINE)), " ".join(snippets(page))
    public = {name for name in ops.__all__ if not name.endswith("_reference")}
    assert shown == public
    assert {name for name in public if f"ops.{name}(" in code} == public


def test_own_loop():
    torch.manual_seed(0)
    detector = nn.Conv2d(3, 256, 8, stride=8)
    before = detector.weight.detach().clone()
    names = {
        "detector": detector,
        "loader": [(torch.rand(2, 3, 64, 64), targets(2))],
        "my_features": lambda detector, images: [detector(images)],
        "my_loss": lambda detector, pyramid, targets: sum(level.square().mean() for level in pyramid),
    }
    made = run(ROOT / "docs" / "own-loop.md", names)["made"]
    assert "lgd_distill" in made.losses and made.instructive[0].shape == (2, 256, 8, 8)
    assert not torch.equal(detector.weight, before)


def small_retinanet() -> RetinaNet:
    body = resnet_fpn_backbone(backbone_name="resnet18", weights=None, returned_layers=[2, 3, 4], trainable_layers=5,
                               extra_blocks=LastLevelP6P7(256, 256), norm_layer=nn.BatchNorm2d)  # fmt: skip
    return RetinaNet(body, 10, min_size=64, max_size=64)


def test_the_readme_code_runs():
    torch.manual_seed(0)
    model, images = small_retinanet(), [torch.rand(3, 64, 64) for _ in range(2)]
    names = {
        "model": model,
        "teacher": small_retinanet().eval(),
        "optimizer": torch.optim.SGD(model.parameters(), 1e-4),
        "loader": [(images, targets(2))],
    }
    names = run(ROOT / "README.md", names)
    assert "icd_distill" in names["losses"] and names["kd"].state.steps == 1


@pytest.mark.parametrize("page", [page for page in PAGES if snippets(page)], ids=lambda page: page.name)
def test_snippets_parse_and_import_what_exists(page):
    for code in snippets(page):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and node.module:
                try:
                    module = import_module(node.module)
                except ModuleNotFoundError as error:
                    if error.name is None or error.name.split(".")[0] not in HOSTS:
                        raise
                    continue  # a host that is not installed here
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{page.name}: {node.module} has no {alias.name}"
