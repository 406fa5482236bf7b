"""Data: the generated scenes, COCO-format folders, transforms, loaders and class priors."""

from fastkd.data.coco import CocoDataset, Sample
from fastkd.data.images import BadImageError
from fastkd.data.loader import BatchLoader, build_eval_loader, build_train_loader
from fastkd.data.priors import measure_priors
from fastkd.data.scenes import SCENE_CLASSES, generate_scenes
from fastkd.data.scenes_render import SceneStyle
from fastkd.data.transforms import IMAGENET_MEAN, IMAGENET_STD, Augmentation

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "SCENE_CLASSES",
    "Augmentation",
    "BadImageError",
    "BatchLoader",
    "CocoDataset",
    "Sample",
    "SceneStyle",
    "build_eval_loader",
    "build_train_loader",
    "generate_scenes",
    "measure_priors",
]
