"""Code as it comes with a model's weights: the interface of OpenVLA's own class around a very small model."""

import torch
from torch import nn
from transformers import AutoModelForCausalLM, BatchFeature, LlamaConfig, PretrainedConfig, PreTrainedModel
from transformers.processing_utils import ProcessorMixin


class RemoteConfig(PretrainedConfig):
    model_type = "remote_openvla"

    def __init__(self, text_config=None, norm_stats=None, n_action_bins=256, pad_to_multiple_of=64, **rest):
        self.text_config = LlamaConfig(**(text_config or {}))
        self.norm_stats, self.n_action_bins = norm_stats, n_action_bins
        self.pad_to_multiple_of = pad_to_multiple_of
        self.image_sizes = [16, 16]
        super().__init__(**rest)


class Patches(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weights = nn.Conv2d(3, width, 8, stride=8)

    def forward(self, pixel_values):
        return self.weights(pixel_values).flatten(2).transpose(1, 2)


class RemoteOpenVLA(PreTrainedModel):
    config_class = RemoteConfig

    def __init__(self, config):
        super().__init__(config)
        self.vision_backbone = Patches(24)
        self.projector = nn.Linear(24, config.text_config.hidden_size)
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self):
        return self.language_model.get_input_embeddings()

    def forward(
        self, input_ids=None, attention_mask=None, pixel_values=None, past_key_values=None, use_cache=None
    ):
        if input_ids.shape[1] == 1:
            assert input_ids.shape[0] == 1, "cached steps take a batch of one"
            return self.language_model(
                input_ids=input_ids, past_key_values=past_key_values, use_cache=use_cache
            )
        assert input_ids.shape[0] == pixel_values.shape[0]
        patches = self.projector(self.vision_backbone(pixel_values))
        words = self.get_input_embeddings()(input_ids)
        return self.language_model(
            inputs_embeds=torch.cat([words[:, :1], patches, words[:, 1:]], dim=1), use_cache=use_cache
        )


class RemoteProcessor(ProcessorMixin):
    def __init__(self, image_processor=None, tokenizer=None):
        super().__init__(image_processor, tokenizer)

    def __call__(self, text, images, return_tensors="pt"):
        pixels = self.image_processor(images, return_tensors=return_tensors)["pixel_values"]
        return BatchFeature({**self.tokenizer(text, return_tensors=return_tensors), "pixel_values": pixels})
