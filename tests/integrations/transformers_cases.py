"""Small random detectors of transformers, and batches for them."""

import torch

CLASSES = 5
KINDS = ["RTDetr", "RTDetrV2", "DFine", "DeformableDetr"]


def model_of(kind="RTDetr", *, width=32, seed=0, classes=CLASSES):
    """A detector with a pyramid of /8, /16, /32, and of /64 in Deformable DETR. width: of the pyramid."""
    import transformers

    torch.manual_seed(seed)
    backbone = transformers.RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    if kind == "DeformableDetr":
        shared = {
            "d_model": width, "encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
            "encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_feature_levels": 4, "num_queries": 20,
        }  # fmt: skip
    else:
        shared = {
            "encoder_in_channels": [16, 24, 32], "encoder_hidden_dim": width, "encoder_ffn_dim": 32,
            "encoder_attention_heads": 2, "d_model": 32, "decoder_in_channels": [width] * 3, "decoder_ffn_dim": 32,
            "decoder_attention_heads": 2, "decoder_layers": 2, "num_queries": 20, "num_denoising": 4,
            "hidden_expansion": 0.5,
        }  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(backbone_config=backbone, num_labels=classes, **shared)
    return getattr(transformers, f"{kind}ForObjectDetection")(config)


def batch(counts=(2, 1), size=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = []
    for count in counts:
        center, wh = (torch.rand(count, 2, generator=generator) for _ in range(2))
        boxes = torch.cat([0.3 + 0.4 * center, 0.2 + 0.3 * wh], 1)
        labels.append({"class_labels": torch.randint(CLASSES, (count,), generator=generator), "boxes": boxes})
    return {"pixel_values": torch.rand(len(counts), 3, size, size, generator=generator), "labels": labels}
