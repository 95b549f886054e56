"""What encoders with decoders share: two stacks and three kinds of attention, each of which may have a prompt.

Layers count the encoder's attention first, then the decoder's own, then what the decoder has on the encoder's output
(`Dimensions`); the two stacks get their prompts one by one.
"""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel

from ptv2_fast.backbone.locate import part_at
from ptv2_fast.families.dimensions import place_of
from ptv2_fast.families.family import Family


class EncoderDecoder(Family):
    """The paths of a family are those of its encoder.

    Attributes:
        decoder_path: where the decoder's layers are in a backbone; a backbone may have an encoder alone.
        cross_path: the attention module on the encoder's output, in a decoder's layer.
    """

    absolute_positions = True
    reads_first = True
    # A `layer_idx` is where the decoder's cache keeps keys and values.
    layer_index = "prompt_layer"
    layers_path = "encoder.layers"
    decoder_path: str = "decoder.layers"
    cross_path: str = "encoder_attn"

    def decoder_layers(self, backbone: PreTrainedModel) -> int:
        """How many layers the decoder has; 0 where there is none."""
        stack, _, _ = self.decoder_path.partition(".")
        return len(part_at(backbone, self.decoder_path)) if hasattr(backbone, stack) else 0

    def num_attentions(self, backbone: PreTrainedModel) -> int:
        """Those of both stacks."""
        return len(self.layers(backbone)) + 2 * self.decoder_layers(backbone)

    def place(self, backbone: PreTrainedModel, layer: int) -> tuple[str, int]:
        """The stack ("encoder", "decoder" or "cross") that a layer is of, and its index there."""
        return place_of(layer, len(self.layers(backbone)), self.decoder_layers(backbone))

    def path_of_attention(self, backbone: PreTrainedModel, layer: int) -> str:
        """Where the attention module of a layer is in the backbone."""
        stack, index = self.place(backbone, layer)
        layers = self.layers_path if stack == "encoder" else self.decoder_path
        return f"{layers}.{index}.{self.cross_path if stack == 'cross' else self.attention_path}"

    def attention_input(self, backbone: PreTrainedModel, layer: int, states: Tensor) -> Tensor:
        """What a layer's projections read: its input, normed where it norms; the encoder's output as it is."""
        if self.norm_path is None:
            return states
        stack, index = self.place(backbone, layer)
        if stack == "cross":
            return states
        layers = self.layers_path if stack == "encoder" else self.decoder_path
        normed: Tensor = part_at(backbone, f"{layers}.{index}.{self.norm_path}")(states)
        return normed
