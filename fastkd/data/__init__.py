"""Data: generated scenes and crowds, COCO and CrowdHuman folders, transforms, loaders and class priors."""

from fastkd.data.batch_loader import BatchLoader, LoaderError, explaining_dead_workers
from fastkd.data.coco import CocoDataset, DetectionDataset, Sample
from fastkd.data.crowd import generate_crowd
from fastkd.data.crowd_render import CrowdStyle
from fastkd.data.crowdhuman import CrowdHumanDataset
from fastkd.data.formats import open_dataset
from fastkd.data.images import BadImageError
from fastkd.data.loader import build_eval_loader, build_train_loader
from fastkd.data.priors import measure_priors
from fastkd.data.scenes import SCENE_CLASSES, generate_scenes
from fastkd.data.scenes_render import SCENE_STYLES, SceneStyle
from fastkd.data.transforms import IMAGENET_MEAN, IMAGENET_STD, Augmentation

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "SCENE_CLASSES",
    "SCENE_STYLES",
    "Augmentation",
    "BadImageError",
    "BatchLoader",
    "CocoDataset",
    "CrowdHumanDataset",
    "CrowdStyle",
    "DetectionDataset",
    "LoaderError",
    "Sample",
    "SceneStyle",
    "build_eval_loader",
    "build_train_loader",
    "explaining_dead_workers",
    "generate_crowd",
    "generate_scenes",
    "measure_priors",
    "open_dataset",
]
