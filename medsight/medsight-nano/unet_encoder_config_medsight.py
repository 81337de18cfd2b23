"""Configuration of the residual U-Net that encodes images where no pretrained encoder is at hand."""

from typing import Any

from transformers import AutoConfig, PreTrainedConfig


class MedSightUNetConfig(PreTrainedConfig):
    """Configuration of [`MedSightUNetEncoder`].

    Args:
        num_channels (`int`): of the image.
        hidden_size (`int`): channels of the grid of features that it yields.
        patch_size (`int`): pixels a cell of that grid, a power of 2 from 2 to the deepest stride.
        hidden_sizes (`list[int]`): channels at strides 2, 4, 8, ... on the way down.
        depths (`list[int]`): residual blocks at each of these strides but the first, which has the stem alone.
        norm_groups (`int`, *optional*): groups of a group norm, which sees one image alone, in place of batch norms.

    Raises:
        ValueError: for lists that do not fit each other, a `patch_size` that no stride has, or `norm_groups` that do
            not divide all sizes.
    """

    model_type = "medsight_unet"

    def __init__(
        self,
        num_channels: int = 3,
        hidden_size: int = 48,
        patch_size: int = 4,
        hidden_sizes: list[int] | None = None,
        depths: list[int] | None = None,
        norm_groups: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.num_channels = num_channels
        self.hidden_size = hidden_size
        self.patch_size = patch_size
        self.hidden_sizes = hidden_sizes if hidden_sizes is not None else [16, 32, 64, 96, 128]
        self.depths = depths if depths is not None else [1, 1, 2, 2]
        if len(self.depths) != len(self.hidden_sizes) - 1 or min([*self.hidden_sizes, *self.depths]) < 1:
            raise ValueError(
                f"hidden_sizes={self.hidden_sizes} and depths={self.depths}: expected positive numbers, a depth for "
                "every size but the first"
            )
        self.norm_groups = norm_groups
        if norm_groups is not None and (norm_groups < 1 or any(size % norm_groups for size in self.hidden_sizes)):
            raise ValueError(f"norm_groups={norm_groups} does not divide all of hidden_sizes={self.hidden_sizes}")
        strides = [2 ** (i + 1) for i in range(len(self.hidden_sizes))]
        if patch_size not in strides:
            raise ValueError(f"patch_size={patch_size}: hidden_sizes={self.hidden_sizes} gives strides {strides}")
        super().__init__(**kwargs)

    @property
    def level(self) -> int:
        """Index into `hidden_sizes` of the stride that the features have."""
        return self.patch_size.bit_length() - 2

    @property
    def deepest_stride(self) -> int:
        """What the sides of an image must be multiples of."""
        return int(2 ** len(self.hidden_sizes))


AutoConfig.register("medsight_unet", MedSightUNetConfig, exist_ok=True)
