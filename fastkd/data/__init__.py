"""Data: the generated scenes, COCO-format folders, transforms, loaders and class priors."""

from fastkd.data.scenes import SCENE_CLASSES, generate_scenes

__all__ = ["SCENE_CLASSES", "generate_scenes"]
