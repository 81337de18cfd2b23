"""An image encoder to train from scratch on little data: a residual U-Net that yields one fine grid of features, with
the sharpness of early layers and the context of late ones (Ronneberger et al., 2015; He et al., 2016)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndNoAttention
from transformers.models.resnet.modeling_resnet import ResNetBasicLayer, ResNetConvLayer, ResNetPreTrainedModel

from configuration_medsight.configuration_medsight import MedSightUNetConfig


class MedSightUNetEncoder(ResNetPreTrainedModel):
    """See [`MedSightUNetConfig`]."""

    config: MedSightUNetConfig
    config_class = MedSightUNetConfig
    _no_split_modules = ["ResNetBasicLayer"]

    def __init__(self, config: MedSightUNetConfig) -> None:
        super().__init__(config)
        widths = config.hidden_sizes
        self.embedder = ResNetConvLayer(config.num_channels, widths[0], stride=2)
        self.down = nn.ModuleList(
            nn.Sequential(
                ResNetBasicLayer(width_in, width, stride=2),
                *(ResNetBasicLayer(width, width) for _ in range(depth - 1)),
            )
            for width_in, width, depth in zip(widths, widths[1:], config.depths, strict=False)
        )
        self.up = nn.ModuleList(
            ResNetBasicLayer(below + beside, beside)
            for below, beside in reversed(list(zip(widths[config.level + 1 :], widths[config.level :], strict=False)))
        )
        self.to_features = nn.Conv2d(widths[config.level], config.hidden_size, kernel_size=1)
        if config.norm_groups is not None:
            for module in list(self.modules()):
                for name, child in module.named_children():
                    if isinstance(child, nn.BatchNorm2d):
                        setattr(module, name, nn.GroupNorm(config.norm_groups, child.num_features))
        self.post_init()

    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPoolingAndNoAttention:
        """
        Args:
            pixel_values: (images, num_channels, H, W), sides multiples of the deepest stride.

        Returns:
            `last_hidden_state`, and as the only hidden state, (images, hidden_size, H / patch_size, W / patch_size).
        """
        # oneDNN's and cuDNN's kernels are twice as fast in this layout. On some processors oneDNN's backward pass
        # writes past its memory there (torch 2.13) if a layer has fewer than 8 channels.
        layout = torch.channels_last if min(self.config.hidden_sizes) >= 8 else torch.contiguous_format
        states = [self.embedder(pixel_values.contiguous(memory_format=layout))]
        for stage in self.down:
            states.append(stage(states[-1]))
        features = states.pop()
        for stage in self.up:
            features = F.interpolate(features, scale_factor=2, mode="bilinear")
            features = stage(torch.cat((features, states.pop()), dim=1))
        features = self.to_features(features)
        return BaseModelOutputWithPoolingAndNoAttention(
            last_hidden_state=features, pooler_output=features.mean((2, 3)), hidden_states=(features,)
        )


AutoModel.register(MedSightUNetConfig, MedSightUNetEncoder, exist_ok=True)
