"""What a model is to the world around it: features at several depths, another head, less memory, another layer.

Both families, `ViG` and `HierarchicalViG`, are a `Backbone`. Names and signatures are those that timm expects, so that
code written for its models runs on these; docs/backbone.md shows each in use.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor, nn

from vig_ref.ops import resolve_backend


class Backbone(nn.Module):
    """Images through `embed`, then `levels` one after another, a norm, a mean over tokens and a linear head.

    A family supplies `norm`, `head`, and the four members that raise NotImplementedError.

    Args:
        config: its sizes, a dataclass.
        num_features: D, the width of what enters the head.
        img_size: pixels that the model is laid out for.
        num_classes, in_chans: see `ViG`.
    """

    head: nn.Linear | nn.Identity
    norm: nn.Module

    def __init__(
        self, config: Any, *, num_features: int, num_classes: int, img_size: int | tuple[int, int], in_chans: int
    ):
        super().__init__()
        self.config, self.num_features, self.num_classes = config, num_features, num_classes
        self.img_size, self.in_chans = img_size, in_chans
        self.global_pool = "avg"

    @property
    def levels(self) -> list[nn.Module]:
        """The modules whose outputs are the intermediate maps, from the image to the head."""
        raise NotImplementedError

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """For each level: `num_chs` channels, `reduction` pixels from one token to the next, `module` its name."""
        raise NotImplementedError

    def embed(self, images: Tensor) -> Tensor:
        """Images to what enters the first level, `[B, h, w, D]`."""
        raise NotImplementedError

    def keep_levels(self, n: int) -> None:
        """Remove the levels behind the first n."""
        raise NotImplementedError

    # --- running -----------------------------------------------------------------------------------------------------

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))

    def forward_features(self, images: Tensor) -> Tensor:
        """Images to the tokens after the final norm, `[B, T, D]`."""
        x = self.embed(self.checked(images))
        for level in self.levels:
            x = level(x)
        return self.norm(x).flatten(1, 2)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens `[B, T, D]` to logits `[B, num_classes]`, or to their mean `[B, D]` if `pre_logits` or no classes."""
        if self.global_pool:
            x = x.mean(dim=1)
        return x if pre_logits else self.head(x)

    def forward_intermediates(
        self, x: Tensor, indices: int | Sequence[int] | None = None, norm: bool = False, stop_early: bool = False,
        output_fmt: str = "NCHW", intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The maps after several levels: blocks of a plain ViG (one stride), stages of a hierarchical one (four).

        Args:
            x: images.
            indices: the levels, negative from the end; a number n for the last n, or -n for that one; None for all.
            norm: put the final norm on each map of its width: every one of a plain ViG, the last stage of the other.
            stop_early: skip what lies behind the last level asked for; the features then end there, without norm.
            output_fmt: "NCHW", or "NLC" for tokens `[B, T, D]`.
            intermediates_only: return the maps alone.

        Returns:
            (features of `forward_features`, maps), or maps.

        Raises:
            ValueError: a level that is not there, another format.

        Example:
            >>> images = torch.randn(1, 3, 224, 160)
            >>> maps = create_model("vig_h_tiny").forward_intermediates(images, intermediates_only=True)
            >>> [tuple(m.shape[1:]) for m in maps]
            [(96, 56, 40), (192, 28, 20), (384, 14, 10), (768, 7, 5)]
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt: expected 'NCHW' or 'NLC', got {output_fmt!r}")
        taken = self.level_indices(indices)
        levels = self.levels[: max(taken) + 1] if stop_early else self.levels
        maps, x = {}, self.embed(self.checked(x))
        for n, level in enumerate(levels):
            x = level(x)
            if n in taken:
                m = self.norm(x) if norm and x.shape[-1] == self.num_features else x
                maps[n] = m.permute(0, 3, 1, 2) if output_fmt == "NCHW" else m.flatten(1, 2)
        maps = [maps[n] for n in taken]
        if intermediates_only:
            return maps
        return (x if len(levels) < len(self.levels) else self.norm(x)).flatten(1, 2), maps

    def level_indices(self, indices: int | Sequence[int] | None) -> list[int]:
        """`indices` of `forward_intermediates` as numbers from 0, in the order asked for."""
        n = len(self.levels)
        if indices is None:
            return list(range(n))
        if isinstance(indices, int):
            if not indices or not -n <= indices <= n:
                raise ValueError(
                    f"indices: expected a number of last levels from 1 to {n}, or a level from -{n} to -1, got "
                    f"{indices}; for levels counted from the image, pass a list"
                )
            indices = range(n - indices, n) if indices > 0 else [indices]
        if not indices or not all(-n <= i < n for i in indices):
            raise ValueError(f"indices: expected levels from {-n} to {n - 1}, got {list(indices)}")
        return [i % n for i in indices]

    def checked(self, images: Tensor) -> Tensor:
        if images.dim() != 4 or images.shape[1] != self.in_chans:
            raise ValueError(f"images: expected [B, {self.in_chans}, height, width], got {list(images.shape)}")
        return images

    # --- changing ----------------------------------------------------------------------------------------------------

    @property
    def backend(self) -> str:
        """The layer that computes the operator (with "fused", more), one of `vig_ref.BACKENDS`; assign to change it."""
        return self._backend

    @backend.setter
    def backend(self, backend: str):
        resolve_backend(backend, "cpu")  # refuses an unknown name
        self._backend = backend
        for block in self.all_blocks():
            for module in block.modules():
                if hasattr(module, "backend"):  # a mixer, in a row of the roadmap two, and an MLP
                    module.backend = backend

    def all_blocks(self) -> list[Any]:
        """The blocks from the image to the head, whatever stage they are in."""
        # Not hasattr: what wraps a block, as torch.compile(block) does, answers for its attributes too.
        return [module for module in self.modules() if "mixer" in module._modules]

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head, on the device and in the dtype of the model; 0 for none.

        Args:
            num_classes: its width.
            global_pool: "avg", or "" to leave the tokens unpooled (then without a head); None changes nothing.
        """
        if global_pool not in (None, "avg", "") or (global_pool == "" and num_classes):
            raise ValueError(f"global_pool: expected 'avg', or '' with num_classes=0, got {global_pool!r}")
        self.num_classes = num_classes
        self.global_pool = "avg" if num_classes else self.global_pool if global_pool is None else global_pool
        self.head = new_head(self.num_features, num_classes).to(next(self.parameters()))

    def get_classifier(self) -> nn.Module:
        return self.head

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] | None = None, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the levels behind the last one asked for; returns `indices` as numbers from 0.

        Where the last level left is narrower, as in a hierarchical ViG, `num_features` is its width, and the norm, if
        not pruned too, a new one of that width, untrained; a head cannot stay.

        Raises:
            ValueError: a level that is not there, or a head that would have to take other features.
        """
        taken = self.level_indices(indices)
        width = self.feature_info[max(taken)]["num_chs"]
        if width != self.num_features:
            if not prune_head and not isinstance(self.head, nn.Identity):
                raise ValueError(
                    f"prune_head: expected True, as the head takes {self.num_features} features and {width} are left, "
                    f"got False; prune it, then reset_classifier makes a new one"
                )
            self.num_features, self.norm = width, type(self.norm)(width).to(next(self.parameters()))
        self.keep_levels(max(taken) + 1)
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0)
        return taken

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Time for memory, in training: each block keeps only its input, and is computed again for the gradient."""
        for block in self.all_blocks():
            block.grad_checkpointing = enable

    # --- describing --------------------------------------------------------------------------------------------------

    @property
    def head_hidden_size(self) -> int:
        """timm's name for `num_features` of a model whose head has no hidden layer."""
        return self.num_features

    def no_weight_decay(self) -> set[str]:
        """Parameters that optimizers should not decay, beside biases and norms: positions. The authors decayed them."""
        return {name for name, _ in self.named_parameters() if name == "pos_embed"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that assign each parameter to a depth, for a learning rate that decays over depth.

        A depth is a block, or in a hierarchical ViG, if `coarse`, a stage.
        """
        level = self.feature_info[0]["module"].rpartition(".")[0]
        return {"stem": r"^pos_embed|^patch_embed", "blocks": [(rf"^{level}\.(\d+)", None), (r"^norm", (99999,))]}

    def options(self) -> dict[str, Any]:
        """What was passed to make it, beside the backend: a plain dictionary that JSON can hold."""
        return {
            "config": asdict(self.config), "num_classes": self.num_classes, "img_size": self.img_size,
            "in_chans": self.in_chans,
        }  # fmt: skip


def new_head(dim: int, num_classes: int) -> nn.Linear | nn.Identity:
    """A linear head: weights normal(0, 0.02), biases 0."""
    if not num_classes:
        return nn.Identity()
    head = nn.Linear(dim, num_classes)
    nn.init.normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    return head
