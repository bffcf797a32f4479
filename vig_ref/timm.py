"""The models in timm's registry. Needs the extra 'timm'; importing this module registers them.

    import timm, vig_ref.timm
    timm.create_model("vig_tiny_patch16_224", num_classes=10)
    timm.create_model("vig_h_tiny_patch4_224", features_only=True)
"""

import functools
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from vig_ref.model import HierarchicalViG, ViG, create_model

SHARED = {
    "url": "", "num_classes": 1000, "input_size": (3, 224, 224), "pool_size": None, "crop_pct": 0.9,
    "interpolation": "bicubic", "mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD,
    "first_conv": "patch_embed.conv1", "classifier": "head",
}  # fmt: skip
default_cfgs = generate_default_cfgs({
    "vig_tiny_patch16_224": SHARED,
    "vig_small_patch16_224": SHARED,
    "vig_base_patch16_224": SHARED,
    "vig_h_tiny_patch4_224": SHARED,
    "vig_h_small_patch4_224": SHARED,
    "vig_h_base_patch4_224": SHARED,
})


def create(variant: str, pretrained: bool, **options: Any) -> ViG | HierarchicalViG:
    """One of ours through timm's builder, which adds `features_only`, `default_cfg` and the like."""
    feature_cfg = {"feature_cls": "getter", "out_indices": 4}  # the last four levels
    maker: Any = functools.partial(with_timm_names, variant.partition("_patch")[0])
    return build_model_with_cfg(maker, variant, pretrained, feature_cfg=feature_cfg, **options)


def with_timm_names(
    name: str, *, drop_path_rate: float | None = None, drop_rate: float = 0.0, global_pool: str = "avg", **options: Any
) -> ViG | HierarchicalViG:
    """`create_model` with arguments as timm calls them; what neither knows is an error.

    `drop_rate` is there because timm's train.py passes it to every model; ViG has none, so only 0 is taken.
    """
    if drop_rate:
        raise ValueError(f"drop_rate: expected 0.0, got {drop_rate}; ViG has drop path only: pass drop_path_rate")
    model = create_model(name, drop_path=drop_path_rate, **options)
    if global_pool != "avg":
        model.reset_classifier(model.num_classes, global_pool)
    return model


@register_model
def vig_tiny_patch16_224(pretrained: bool = False, **options: Any) -> ViG | HierarchicalViG:
    return create("vig_tiny_patch16_224", pretrained, **options)


@register_model
def vig_small_patch16_224(pretrained: bool = False, **options: Any) -> ViG | HierarchicalViG:
    return create("vig_small_patch16_224", pretrained, **options)


@register_model
def vig_base_patch16_224(pretrained: bool = False, **options: Any) -> ViG | HierarchicalViG:
    return create("vig_base_patch16_224", pretrained, **options)


@register_model
def vig_h_tiny_patch4_224(pretrained: bool = False, **options: Any) -> ViG | HierarchicalViG:
    return create("vig_h_tiny_patch4_224", pretrained, **options)


@register_model
def vig_h_small_patch4_224(pretrained: bool = False, **options: Any) -> ViG | HierarchicalViG:
    return create("vig_h_small_patch4_224", pretrained, **options)


@register_model
def vig_h_base_patch4_224(pretrained: bool = False, **options: Any) -> ViG | HierarchicalViG:
    return create("vig_h_base_patch4_224", pretrained, **options)
