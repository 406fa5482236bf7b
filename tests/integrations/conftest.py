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
        self.scalars = {}

    def __enter__(self):
        self.current.append(self)
        return self

    def __exit__(self, *args):
        self.current.pop()

    def put_scalars(self, **scalars):
        self.scalars.update(scalars)


class HookBase:
    """detectron2's base class of a trainer's hooks."""

    def before_train(self): ...

    def after_step(self): ...


@pytest.fixture
def detectron2_modules(monkeypatch):
    """Modules `detectron2.engine` and `detectron2.utils.events` with what the adapter imports; the storage in use."""
    for name, content in (("detectron2.engine", HookBase), ("detectron2.utils.events", EventStorage)):
        module = types.ModuleType(name)
        setattr(module, content.__name__, content)
        monkeypatch.setitem(sys.modules, name, module)
    with EventStorage() as storage:
        yield storage
