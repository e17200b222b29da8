"""A compact vision-language-action policy of our own: a prefix language model over transformers' Llama.

The prefix [instruction's pointer, slots | image patches, instruction words, state, BOS] is attended both
ways, the action tokens after it causally (a prefix-LM, as pi0-FAST's PaliGemma is one).
"""

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaModel

from counterpoint.policies.masks import HIDES, Mask
from counterpoint.policies.observation import ObservationSpace
from counterpoint.policies.policy import Inputs, check_mask
from counterpoint.policies.prefix import Prefix, layers_of
from counterpoint.policies.vision import PatchVision, PointerVision, VisionConfig
from counterpoint.section import Section
from counterpoint.seeds import seed_of

COORDINATE_GAIN = 4.0


class CompactConfig(Section):
    """Size of a compact policy, and what it is told."""

    hidden: int = Field(default=96, ge=1)
    """Width of the transformer."""
    layers: int = Field(default=3, ge=1)
    """Transformer layers."""
    heads: int = Field(default=4, ge=1)
    """Attention heads; they must divide `hidden` into even parts."""
    intermediate: int = Field(default=192, ge=1)
    """Width of the gated feed-forward layers."""
    text: bool = True
    """Whether the policy is told the instruction."""
    state: bool = True
    """Whether the policy is told the proprioceptive state, where there is one."""
    vision: VisionConfig = VisionConfig()


class CompactPolicy(nn.Module):
    """A `TokenPolicy`.

    Inputs are "images" uint8 [B,cameras,H,W,3] with cameras in the observation space's order, "words" int64
    [B,words_length] padded with 0 (with text), and "state" float32 [B,D] (with state). `encode` replaces
    "images" by "slots", "pointer" and "null_pointer" [B,tokens,features], or by "patches" [B,tokens,hidden].
    A condition that is masked is replaced by learned null embeddings, in training and afterwards; the pointer
    that the instruction's words steer is part of the text.
    """

    def __init__(
        self,
        config: CompactConfig,
        observation_space: ObservationSpace,
        vocabulary: int,
        end_token: int | None,
        max_tokens: int,
        words_vocabulary: int = 0,
        words_length: int = 0,
        seed: int = 0,
    ) -> None:
        """Build with weights drawn from `seed`; raises ValueError if the parts do not fit."""
        super().__init__()
        self.config, self.observation_space = config, observation_space
        self.vocabulary, self.end_token, self.max_tokens = vocabulary, end_token, max_tokens
        self.words_vocabulary, self.words_length = words_vocabulary, words_length
        has = {"text": config.text, "state": config.state and bool(observation_space.state)}
        self.conditions = frozenset(name for name, told in has.items() if told)
        self._check()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(seed, "policy"))
            self._build()

    def forward(
        self,
        inputs: Inputs,
        tokens: Tensor,
        hide_text: Tensor | None = None,
        hide_state: Tensor | None = None,
    ) -> Tensor:
        """Return the logits of all action tokens given those before, float32 [B,L,V].

        `inputs` may be encoded or not; `tokens` int64 [B,L]. Conditions are hidden in the rows where
        `hide_text` and `hide_state` (bool [B]) say so.
        """
        encoded = self.encode(inputs) if "images" in inputs else inputs
        prefix = self._prefix(encoded, hide_text, hide_state)
        actions = self.language.embed_tokens(tokens[:, :-1])
        length = prefix.shape[1] + actions.shape[1]
        index = torch.arange(length, device=tokens.device)
        seen = (index < prefix.shape[1]) | (index <= index[:, None])
        hidden = self.language(
            inputs_embeds=torch.cat([prefix, actions], 1), attention_mask=seen[None, None], use_cache=False
        ).last_hidden_state
        logits: Tensor = self.head(hidden[:, prefix.shape[1] - 1 :]).float()
        return logits

    def encode(self, inputs: Inputs) -> Inputs:
        """Return `inputs` with images turned into features, once for every mask."""
        encoded = {name: tensor for name, tensor in inputs.items() if name != "images"}
        images = inputs["images"]
        if isinstance(self.vision, PatchVision):
            return encoded | {"patches": self.vision(images)}
        words = inputs["words"][:, None] if "text" in self.conditions else None
        found = self.vision.describe(self.vision(images, words))
        if words is None:
            return encoded | {"slots": found.flatten(1, 2)}
        return encoded | {
            "pointer": found[:, :, 0],
            "null_pointer": found[:, :, 1],
            "slots": found[:, :, 2:].flatten(1, 2),
        }

    def prefill(self, encoded: Inputs, masks: Sequence[Mask]) -> Prefix:
        """Read the observations once per mask, in one pass; rows are mask-major [len(masks)*B]."""
        for mask in masks:
            check_mask(mask, self.conditions)
        rows = len(next(iter(encoded.values())))
        hidden = [self._hidden(mask, rows) for mask in masks]
        text, state = (torch.cat(flags) for flags in zip(*hidden, strict=True))
        copies = {name: x.repeat(len(masks), *[1] * (x.ndim - 1)) for name, x in encoded.items()}
        prefix = self._prefix(copies, text, state)
        length = prefix.shape[1]
        cache = DynamicCache(config=self.language.config)
        everything = torch.ones(1, 1, length, length, dtype=torch.bool, device=prefix.device)
        output = self.language(
            inputs_embeds=prefix, attention_mask=everything, past_key_values=cache, use_cache=True
        )
        return Prefix(
            self.head(output.last_hidden_state[:, -1]).float(),
            layers_of(cache),
            torch.ones(len(prefix), length, dtype=torch.bool, device=prefix.device),
            torch.full((len(prefix),), length, device=prefix.device),
        )

    def advance(self, prefix: Prefix, tokens: Tensor) -> Prefix:
        """Read one more action token per row, `tokens` int64 [R]."""
        cache = prefix.cache()
        mask = torch.cat([prefix.mask, prefix.mask.new_ones(prefix.rows, 1)], 1)
        output = self.language(
            inputs_embeds=self.language.embed_tokens(tokens)[:, None],
            attention_mask=mask[:, None, None],
            position_ids=prefix.positions[:, None],
            past_key_values=cache,
            use_cache=True,
        )
        logits = self.head(output.last_hidden_state[:, -1]).float()
        return Prefix(logits, layers_of(cache), mask, prefix.positions + 1)

    def logits(self, encoded: Inputs, mask: Mask, tokens: Tensor) -> Tensor:
        """Return the logits of every action token given those before it [B,L,V], without any cache."""
        check_mask(mask, self.conditions)
        return self.forward(encoded, tokens, *self._hidden(mask, len(tokens)))

    def standardise_state(self, mean: Tensor, std: Tensor) -> None:
        """Take the training data's mean and standard deviation of each entry of the state [D].

        Entries that never vary are only centred.
        """
        self.state_mean.copy_(mean)
        self.state_std.copy_(torch.where(std > 1e-6, std, torch.ones_like(std)))

    def _check(self) -> None:
        sizes = set(self.observation_space.cameras.values())
        if len(sizes) > 1:
            raise ValueError(
                f"observation_space.cameras={self.observation_space.cameras} differ in size: "
                "render all cameras alike for a compact policy"
            )
        if "text" in self.conditions and min(self.words_vocabulary, self.words_length) < 1:
            raise ValueError(
                f"text=true with words_vocabulary={self.words_vocabulary} and "
                f"words_length={self.words_length}: give both, or set text=false"
            )
        if self.config.hidden % (2 * self.config.heads):
            raise ValueError(
                f"hidden={self.config.hidden} must be an even multiple of heads={self.config.heads}"
            )

    def _build(self) -> None:
        config, hidden = self.config, self.config.hidden
        cameras = len(self.observation_space.cameras)
        size = next(iter(self.observation_space.cameras.values()))
        text, state = ("text" in self.conditions), ("state" in self.conditions)
        self.vision: PointerVision | PatchVision
        if config.vision.kind == "pointer":
            self.vision = PointerVision(config.vision, self.words_vocabulary if text else 0)
            self.project = nn.Linear(self.vision.width, hidden)
            # Beside the places' embeddings coordinates must be loud enough to be learnt from before the
            # pictures are learnt by heart, yet not so loud that normalisation drops how large they are.
            self.project.weight.data[:, :2] *= COORDINATE_GAIN
            images = cameras * (config.vision.keypoints + text)
        else:
            self.vision = PatchVision(config.vision, hidden, size)
            images = cameras * self.vision.tokens
        if text:
            self.words = nn.Embedding(self.words_vocabulary, hidden)
            self.null_words = nn.Parameter(torch.randn(self.words_length, hidden))
        entries = len(self.observation_space.state) if state else 0
        if state:
            self.read_state = nn.Linear(entries, hidden)
            self.null_state = nn.Parameter(torch.randn(1, hidden))
        self.state_mean: Tensor
        self.state_std: Tensor
        self.register_buffer("state_mean", torch.zeros(entries))
        self.register_buffer("state_std", torch.ones(entries))
        # The last place is BOS, which is nothing else.
        length = images + self.words_length * text + state + 1
        self.places = nn.Parameter(torch.randn(length, hidden))
        self.language = LlamaModel(
            LlamaConfig(
                vocab_size=self.vocabulary,
                hidden_size=hidden,
                intermediate_size=config.intermediate,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                max_position_embeddings=length + self.max_tokens,
                initializer_range=hidden**-0.5,
                pad_token_id=None,
                bos_token_id=None,
                eos_token_id=None,
            )
        )
        self.head = nn.Linear(hidden, self.vocabulary, bias=False)

    def _prefix(self, encoded: Inputs, hide_text: Tensor | None, hide_state: Tensor | None) -> Tensor:
        """The prefix's embeddings [B,P,hidden]."""
        parts = []
        text, state = "text" in self.conditions, "state" in self.conditions
        if "patches" in encoded:
            parts.append(encoded["patches"])
        else:
            if text:
                pointer = _replaced(encoded["pointer"], encoded["null_pointer"], hide_text)
                parts.append(self.project(pointer))
            parts.append(self.project(encoded["slots"]))
        if text:
            # Padding is read as a word of its own: a row's length never depends on its instruction.
            parts.append(_replaced(self.words(encoded["words"]), self.null_words, hide_text))
        if state:
            told = self.read_state((encoded["state"] - self.state_mean) / self.state_std)
            parts.append(_replaced(told[:, None], self.null_state, hide_state))
        parts.append(self.places.new_zeros(len(parts[0]), 1, self.config.hidden))
        return torch.cat(parts, 1) + self.places

    def _hidden(self, mask: Mask, rows: int) -> tuple[Tensor, Tensor]:
        """Whether text and state are hidden, for `rows` rows of one mask."""
        text, state = (
            torch.full((rows,), name in HIDES[mask], device=self.places.device) for name in ("text", "state")
        )
        return text, state


def _replaced(told: Tensor, null: Tensor, hide: Tensor | None) -> Tensor:
    """`told` [B,T,C] with the rows that `hide` names (none of them if None) replaced by `null`."""
    if hide is None:
        return told
    return torch.where(hide[:, None, None], null, told)
