"""Models that see."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.models.text import wordpiece_tokenizer


def tiny_vision(
    folder: str | Path, architecture: str, id2label: Mapping[int, str] | None = None, seed: int = 0
) -> str:
    """A tiny model over images, by its class's name, with what it needs besides. :returns: its folder."""
    config, processor = _vision_parts(architecture)
    torch.manual_seed(seed)
    if id2label:
        config.id2label, config.label2id = dict(id2label), {name: k for k, name in id2label.items()}
    model = getattr(transformers, architecture)(config)
    if architecture == "OwlViTForObjectDetection":
        with torch.no_grad():  # boxes of some width
            model.box_head.dense2.weight.mul_(0.01)
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    if hasattr(config, "text_config"):
        wordpiece_tokenizer(64).save_pretrained(folder)
    return str(folder)


def _vision_parts(architecture: str) -> tuple[Any, Any]:
    """Config and image processor of each architecture that tests use."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    patches = {**sizes, "patch_size": 8, "initializer_range": 0.3}
    square = {"height": 32, "width": 32}
    stages = {
        "depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 16, 16], "num_attention_heads": [1, 1, 2, 2],
        "decoder_hidden_size": 16, "initializer_range": 0.3,
    }  # fmt: skip
    text = {
        **sizes,
        "max_position_embeddings": 64,
        "vocab_size": len(wordpiece_tokenizer()),
        "eos_token_id": 3,
    }
    match architecture:
        case "ViTForImageClassification" | "ViTModel" | "ViTMAEModel":
            kind = transformers.ViTMAEConfig if "MAE" in architecture else transformers.ViTConfig
            return kind(image_size=32, **patches), transformers.ViTImageProcessorPil(size=square)
        case "Dinov2ForImageClassification" | "Dinov2Model":
            del patches["intermediate_size"]
            processor = transformers.BitImageProcessorPil(size={"shortest_edge": 32}, do_center_crop=False)
            return transformers.Dinov2Config(image_size=32, **patches), processor
        case "ResNetModel":
            config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
            return config, transformers.ConvNextImageProcessorPil(size={"shortest_edge": 32})
        case "YolosForObjectDetection":
            longest = {"shortest_edge": 32, "longest_edge": 48}
            config = transformers.YolosConfig(image_size=[32, 32], **patches)
            return config, transformers.YolosImageProcessorPil(size=longest)
        case "DPTForDepthEstimation":
            neck = {
                "neck_hidden_sizes": [8, 8, 8, 8],
                "fusion_hidden_size": 8,
                "backbone_out_indices": [0, 1, 2, 3],
            }
            config = transformers.DPTConfig(
                image_size=32, **{**patches, "num_hidden_layers": 4, "initializer_range": 0.05}, **neck
            )
            return config, transformers.DPTImageProcessorPil(size=square)
        case "SegformerForSemanticSegmentation":
            return transformers.SegformerConfig(**stages), transformers.SegformerImageProcessorPil(
                size=square
            )
        case "MaskFormerForInstanceSegmentation":
            swin = transformers.SwinConfig(
                image_size=64, patch_size=4, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4,
                out_features=["stage1", "stage2", "stage3", "stage4"],
            )  # fmt: skip
            detr = transformers.DetrConfig(
                d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
                encoder_ffn_dim=32, decoder_ffn_dim=32, num_queries=5, use_timm_backbone=False, backbone_config=swin,
            )  # fmt: skip
            config = transformers.MaskFormerConfig(
                backbone_config=swin, decoder_config=detr, fpn_feature_size=32, mask_feature_size=32
            )
            return config, transformers.MaskFormerImageProcessorPil(size={"height": 64, "width": 64})
        case "SiglipModel":
            config = transformers.SiglipConfig(
                text_config={**text, "pad_token_id": 0}, vision_config={**patches, "image_size": 32}
            )
            return config, transformers.SiglipImageProcessorPil(size=square)
        case "CLIPSegModel":
            vision = {**patches, "image_size": 32}
            config = transformers.CLIPSegConfig(text_config=text, vision_config=vision, projection_dim=32)
            return config, transformers.ViTImageProcessorPil(size=square)
        case "CLIPModel" | "OwlViTForObjectDetection":
            name = architecture.removesuffix("Model").removesuffix("ForObjectDetection")
            kind, processor = (
                getattr(transformers, f"{name}Config"),
                getattr(transformers, f"{name}ImageProcessorPil"),
            )
            vision = {**patches, "image_size": 32}
            config = kind(text_config=text, vision_config=vision, projection_dim=32)
            return config, processor(size=square, do_center_crop=False)
    raise ValueError(architecture)
