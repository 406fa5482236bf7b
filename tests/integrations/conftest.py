"""Hosts without a network connection, and stand-ins for detectron2's modules."""

import atexit
import contextlib
import os
import shutil
import sys
import tempfile
import types

import pytest
from PIL import Image

SETTINGS = tempfile.mkdtemp(prefix="fastkd-ultralytics-")
atexit.register(shutil.rmtree, SETTINGS, ignore_errors=True)
os.environ |= {  # read when the packages are imported; no weights, fonts, data or reports over the network
    "YOLO_CONFIG_DIR": SETTINGS,
    "YOLO_OFFLINE": "true",
    "YOLO_AUTOINSTALL": "false",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
}
opener = Image.open
with contextlib.suppress(ImportError):
    import ultralytics  # noqa: F401
Image.open = opener  # Ultralytics replaces it for the whole process, and so for the tests of the data sets


class EventStorage:
    """detectron2's store of scalars."""

    current: list["EventStorage"] = []  # noqa: RUF012

    def __init__(self, start_iter=0):
        self.scalars, self.iter = {}, start_iter

    def __enter__(self):
        self.current.append(self)
        return self

    def __exit__(self, *args):
        self.current.pop()

    def put_scalar(self, name, value):
        self.scalars[name] = value

    def put_scalars(self, **scalars):
        self.scalars.update(scalars)


class HookBase:
    """detectron2's base class of a trainer's hooks."""

    def before_train(self): ...

    def after_step(self): ...


def put_modules(monkeypatch, contents):
    """Puts modules with these contents in the place of packages that are not installed."""
    for name, content in contents.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def detectron2_modules(monkeypatch):
    """Stands in for the parts of detectron2 that adapter and example import; returns the storage in use."""
    from detectron2_cases import MODULES, DefaultTrainer

    engine = {"HookBase": HookBase, "DefaultTrainer": DefaultTrainer}
    events = {"EventStorage": EventStorage}
    put_modules(monkeypatch, {"detectron2.engine": engine, "detectron2.utils.events": events, **MODULES})
    with EventStorage() as storage:
        yield storage


@pytest.fixture
def mmdetection_modules(monkeypatch):
    """Stands in for the parts of mmengine that adapter and example import."""
    from mmdetection_cases import MODULES

    put_modules(monkeypatch, {"mmengine.hooks": {"Hook": type("Hook", (), {})}, **MODULES})
