"""Models that make images, masks or matches of images; and images to give them."""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

from tests.models.text import labels_of


def image_files(count: int = 21, low: int = 20, high: int = 60, seed: int = 0) -> list[bytes]:
    """Files of images of mixed sizes, modes and formats: smooth shapes with noise on them.

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
    """The image in a file."""
    return Image.open(BytesIO(file))


def save(model: Any, processor: Any, folder: str | Path) -> str:
    """Writes a model with its image processor. :returns: the folder."""
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def tiny_swin2sr(folder: str | Path, seed: int = 0) -> str:
    """A Swin2SR that doubles the sides of images. :returns: its folder."""
    config = transformers.Swin2SRConfig(
        image_size=16, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4, upscale=2,
        upsampler="pixelshuffledirect", initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(seed)
    return save(
        transformers.Swin2SRForImageSuperResolution(config), transformers.Swin2SRImageProcessorPil(), folder
    )


def tiny_sam(folder: str | Path, kind: str = "Sam", seed: int = 0) -> str:
    """A SAM over images of 64 pixels, whose masks differ from point to point. :returns: its folder.

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


def spread(model: torch.nn.Module, gain: float) -> None:
    """Draws all weights anew, so wide that answers differ from image to image and from query to query.

    :param gain: 1 keeps the variance of what flows through a layer.
    """
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, gain / weight[0].numel() ** 0.5)


def tiny_maskformer(folder: str | Path, names: Mapping[int, str], seed: int = 0) -> str:
    """A MaskFormer that finds several segments in an image. :returns: its folder."""
    sizes = {
        "image_size": 64, "patch_size": 4, "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2],
        "window_size": 4, "out_features": ["stage1", "stage2", "stage3", "stage4"],
    }  # fmt: skip
    swin = transformers.SwinConfig(**sizes)
    config = transformers.MaskFormerConfig(
        backbone_config=swin, decoder_config=_detr_config(swin, num_queries=5), fpn_feature_size=32,
        mask_feature_size=32, **labels_of(names),
    )  # fmt: skip
    torch.manual_seed(seed)
    model = transformers.MaskFormerForInstanceSegmentation(config)
    spread(model, 1.5)
    with torch.no_grad():
        model.model.transformer_module.queries_embedder.weight.mul_(3)
        model.class_predictor.weight.mul_(2)
    return save(model, transformers.MaskFormerImageProcessorPil(size={"height": 64, "width": 64}), folder)


def tiny_detr(folder: str | Path, names: Mapping[int, str], seed: int = 0) -> str:
    """A DETR that finds up to six objects in an image, whose shape it keeps. :returns: its folder."""
    resnet = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage4"],
    )  # fmt: skip
    torch.manual_seed(seed)
    model = transformers.DetrForObjectDetection(_detr_config(resnet, num_queries=6, **labels_of(names)))
    spread(model, 1.5)
    processor = transformers.DetrImageProcessorPil(size={"shortest_edge": 48, "longest_edge": 80})
    return save(model, processor, folder)


def _detr_config(backbone: Any, **options: Any) -> Any:
    return transformers.DetrConfig(
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=32, decoder_ffn_dim=32, use_timm_backbone=False, backbone=None, backbone_config=backbone,
        **options,
    )  # fmt: skip
