"""Hugging Face's Trainer with RT-DETR and a torchvision teacher: python examples/host_transformers.py [DATA] [STEPS]"""

from __future__ import annotations

import sys
import tempfile

import torch
from host_torchvision import retinanet
from host_torchvision import train as train_torchvision
from scenes import CLASSES, Scenes
from transformers import RTDetrConfig, RTDetrForObjectDetection, RTDetrResNetConfig, Trainer, TrainingArguments

from fastkd.integrations.transformers import attach


def rt_detr() -> RTDetrForObjectDetection:
    """A small RT-DETR of random weights."""
    backbone = RTDetrResNetConfig(embedding_size=16, hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 1, 1],
                                  layer_type="basic", out_features=["stage2", "stage3", "stage4"])  # fmt: skip
    config = RTDetrConfig(
        backbone_config=backbone, encoder_in_channels=[32, 48, 64], encoder_hidden_dim=64, encoder_ffn_dim=128,
        d_model=64, decoder_in_channels=[64] * 3, decoder_ffn_dim=128, decoder_layers=2, num_queries=50,
        num_denoising=10, num_labels=CLASSES,
    )  # fmt: skip
    return RTDetrForObjectDetection(config)


def collate(items: list) -> dict:
    """Boxes as transformers wants them: centre and size, divided by the image's."""
    labels = []
    for image, target in items:
        height, width = image.shape[1:]
        low, high = (target["boxes"] / torch.tensor([width, height, width, height])).split(2, 1)
        labels.append({"class_labels": target["labels"], "boxes": torch.cat([(low + high) / 2, high - low], 1)})
    return {"pixel_values": torch.stack([image for image, _ in items]), "labels": labels}


def main(data: str = "scenes", steps: int = 20) -> None:
    torch.manual_seed(0)
    teacher, student = retinanet("resnet34", CLASSES), rt_detr()
    train_torchvision(teacher, data, steps)
    kd = attach(student, "icd", teacher=teacher.eval(), num_classes=CLASSES)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(folder, max_steps=steps, per_device_train_batch_size=4, logging_steps=5,
                                      report_to=[], remove_unused_columns=False, use_cpu=True)  # fmt: skip
        trainer = Trainer(student, arguments, train_dataset=Scenes(data), data_collator=collate,
                          callbacks=[kd.callback])  # fmt: skip
        trainer.train()
    print(kd.report())


if __name__ == "__main__":
    main(*sys.argv[1:2], *map(int, sys.argv[2:3]))
