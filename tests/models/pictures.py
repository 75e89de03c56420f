"""Models that make pictures, masks or matches of pictures; and pictures to give them."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image


def pictures(count: int = 21, low: int = 20, high: int = 60, seed: int = 0) -> list[bytes]:
    """Files of pictures of mixed sizes, modes and formats: smooth shapes with noise on them.

    :param low: least pixels of a side, and `high`, one more than the most.
    """
    random = np.random.default_rng(seed)
    files = []
    for k in range(count):
        width, height = (int(side) for side in random.integers(low, high, 2))
        coarse = Image.fromarray(random.integers(0, 255, (5, 5, 3), np.uint8)).resize((width, height))
        noisy = np.asarray(coarse) + random.normal(0, 8, (height, width, 3))
        image = Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).convert("L" if k % 5 == 4 else "RGB")
        target = BytesIO()
        image.save(target, "JPEG" if k % 3 == 2 else "PNG")
        files.append(target.getvalue())
    return files


def opened(file: bytes) -> Image.Image:
    """The picture in a file."""
    return Image.open(BytesIO(file))


def save(model: Any, processor: Any, folder: str | Path) -> str:
    """Writes a model with its image processor. :returns: the folder."""
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def tiny_swin2sr(folder: str | Path, seed: int = 0) -> str:
    """A Swin2SR that doubles the sides of pictures. :returns: its folder."""
    config = transformers.Swin2SRConfig(
        image_size=16, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4, upscale=2,
        upsampler="pixelshuffledirect", initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(seed)
    return save(
        transformers.Swin2SRForImageSuperResolution(config), transformers.Swin2SRImageProcessorPil(), folder
    )


def tiny_sam(folder: str | Path, kind: str = "Sam", seed: int = 0) -> str:
    """A SAM over pictures of 64 pixels, whose masks differ from point to point. :returns: its folder.

    :param kind: `Sam` or `SamHQ`.
    """
    config = getattr(transformers, f"{kind}Config")(
        vision_config={
            "hidden_size": 32, "output_channels": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
            "image_size": 64, "patch_size": 8, "mlp_dim": 64, "window_size": 4, "global_attn_indexes": [1],
            "num_pos_feats": 8, "scale": 1.0,
        },
        prompt_encoder_config={"hidden_size": 16, "image_size": 64, "patch_size": 8, "mask_input_channels": 4},
        mask_decoder_config={
            "hidden_size": 16, "mlp_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
            "iou_head_hidden_dim": 16, "iou_head_depth": 2, **({"vit_dim": 32} if kind == "SamHQ" else {}),
        },
        initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = getattr(transformers, f"{kind}Model")(config)
    with torch.no_grad():
        model.mask_decoder.iou_prediction_head.proj_out.bias += 0.9  # scores around a threshold
    side = {"height": 64, "width": 64}
    return save(model, transformers.SamImageProcessorPil(size={"longest_edge": 64}, pad_size=side), folder)


def tiny_matcher(folder: str | Path, kind: str, seed: int = 0) -> str:
    """A `SuperGlue` or `LightGlue` over points of a SuperPoint. :returns: its folder."""
    points = transformers.SuperPointConfig(
        encoder_hidden_sizes=[8, 8, 16, 16], decoder_hidden_size=16, descriptor_decoder_dim=16, max_keypoints=24,
        nms_radius=2, border_removal_distance=2, initializer_range=0.3,
    )  # fmt: skip
    sizes = {
        "SuperGlue": {
            "hidden_size": 16, "keypoint_encoder_sizes": [8, 16], "gnn_layers_types": ["self", "cross"],
            "sinkhorn_iterations": 10,
        },
        "LightGlue": {"descriptor_dim": 16, "num_hidden_layers": 2, "filter_threshold": 0.0},
    }  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(
        keypoint_detector_config=points, num_attention_heads=2, initializer_range=0.3, **sizes[kind]
    )
    torch.manual_seed(seed)
    model = getattr(transformers, f"{kind}ForKeypointMatching")(config)
    processor = getattr(transformers, f"{kind}ImageProcessorPil")(size={"height": 48, "width": 64})
    return save(model, processor, folder)
