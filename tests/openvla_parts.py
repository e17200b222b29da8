"""Very small random models with OpenVLA's interface, written to disk as transformers writes them."""

import importlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPVisionConfig,
    GemmaConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

WORDS = (
    *("<pad>", "<s>", "</s>", "<unk>", "<image>"),
    *("In", ":", "What", "action", "should", "the", "robot", "take", "to", "?", "Out"),
    *("pick", "up", "red", "block"),
)
VOCABULARY, PADDING, BINS = 96, 8, 16
"""Text tokens without padding, padding behind them, action bins."""
STATISTICS = {
    "q01": [-1.0, -0.5, 0.0, 1.0, -3.0, 0.2, 0.0],
    "q99": [1.0, 0.5, 2.0, 4.0, 3.0, 0.2, 1.0],
    "mean": [0.0] * 7,
    "std": [1.0] * 7,
    "mask": [True] * 6 + [False],
}
NORM_STATS = {"bridge": {"action": STATISTICS, "num_transitions": 123}}
INTERFACE = {"norm_stats": NORM_STATS, "n_action_bins": BINS, "pad_to_multiple_of": PADDING}
TEXT = {
    "vocab_size": VOCABULARY + PADDING,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
SIZE = {"height": 16, "width": 16}


def words(special: dict[int, str] | None = None, size: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """A word tokenizer that puts <s> first, as Llama's does; `special` names further tokens by id."""
    names = [*WORDS, *(f"w{i}" for i in range(len(WORDS), size))]
    for index, name in (special or {}).items():
        names[index] = name
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )


def llava(folder: Path, tokenizer: PreTrainedTokenizerFast | None = None, **changes: Any) -> Path:
    """Write a LLaVA with CLIP and Llama; `changes` are of its configuration."""
    torch.manual_seed(0)
    text = LlamaConfig(**(TEXT | changes.pop("text", {})))
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=text,
        image_token_id=4,
        vision_feature_layer=-1,
        initializer_range=0.3,
        **(INTERFACE | changes),
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=SIZE)
    LlavaProcessor(
        images,
        tokenizer or words(),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    return folder


def paligemma(folder: Path) -> Path:
    """Write a PaliGemma with SigLIP and Gemma, whose prefix looks both ways."""
    torch.manual_seed(1)
    text = GemmaConfig(**TEXT, head_dim=8)
    vision = SiglipVisionConfig(**VISION, projection_dim=32)
    config = PaliGemmaConfig(
        vision_config=vision, text_config=text, image_token_id=4, projection_dim=32, **INTERFACE
    )
    model = PaliGemmaForConditionalGeneration(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    images = SiglipImageProcessorPil(size=SIZE)
    images.image_seq_length = 4
    PaliGemmaProcessor(images, words()).save_pretrained(folder)
    return folder


def remote(folder: Path) -> Path:
    """Write a model with its code beside it, registered as OpenVLA registers its own."""
    code = importlib.import_module("remote_openvla")
    torch.manual_seed(2)
    model = code.RemoteOpenVLA(code.RemoteConfig(text_config=TEXT, **INTERFACE))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=SIZE)
    code.RemoteProcessor(images, words()).save_pretrained(folder)
    shutil.copy(sys.modules["remote_openvla"].__file__ or "", folder / "remote_code.py")
    _add(
        folder / "config.json",
        {"AutoConfig": "remote_code.RemoteConfig", "AutoModelForVision2Seq": "remote_code.RemoteOpenVLA"},
    )
    _add(folder / "processor_config.json", {"AutoProcessor": "remote_code.RemoteProcessor"})
    return folder


def _add(path: Path, auto_map: dict[str, str]) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": auto_map}))
