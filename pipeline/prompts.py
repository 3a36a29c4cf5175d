"""Chat prompts with vision: the model's own template, and one placeholder token per vision token."""

from typing import Any

import torch
from torch import Tensor

from pipeline.encode import Encoded
from pipeline.errors import ConfigError, UnitError
from pipeline.models import ModelCard


class ChatPrompts:
    """Builds the token ids of a question about a unit's encoded frames."""

    def __init__(self, tokenizer: Any, card: ModelCard) -> None:
        self._tokenizer = tokenizer
        self._card = card

    def tokens(self, prompt: str, encoded: Encoded) -> tuple[Tensor, list[tuple[int, int, int, int]]]:
        """Token ids int64 [1, S] and the span (start, t, y, x) of every item in them.

        Raises `UnitError` (prepare) when the template does not give every item its placeholder.
        """
        content = [{"type": encoded.modality}] * len(encoded.grids) + [{"type": "text", "text": prompt}]
        text = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        # Some templates write the first token themselves, some leave it to the tokenizer.
        begins = bool(self._tokenizer.bos_token) and text.startswith(self._tokenizer.bos_token)
        ids = self._tokenizer(text, add_special_tokens=not begins)["input_ids"]
        placeholder = self.placeholder(encoded.modality)
        found = ids.count(placeholder)
        if found != len(encoded.grids):
            raise UnitError(
                "prepare",
                "PromptTemplate",
                f"expected {len(encoded.grids)} {encoded.modality} placeholder(s) in the chat prompt, got {found}; "
                "a prompt must not hold special tokens",
            )
        expanded: list[int] = []
        spans = []
        grids = iter(encoded.grids)
        for token in ids:
            if token == placeholder:
                t, y, x = next(grids)
                spans.append((len(expanded), t, y, x))
                expanded.extend([placeholder] * (t * y * x))
            else:
                expanded.append(token)
        return torch.tensor([expanded]), spans

    def placeholder(self, modality: str) -> int:
        """The id of the token that stands for vision of this modality (image | video)."""
        for name in (f"{modality}_token_id", f"{modality}_token_index"):
            if getattr(self._card.config, name, None) is not None:
                return int(getattr(self._card.config, name))
        raise ConfigError(f"model.name {self._card.name}: its configuration names no {modality} token")
