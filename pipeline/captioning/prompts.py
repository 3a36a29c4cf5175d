"""Builds chat prompts with vision from the model's own template; each item is one placeholder token."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.captioning.models import ModelCard
from pipeline.errors import ConfigError, UnitError


@dataclass(frozen=True)
class Frame:
    """The text around a unit's items as token ids, int64: before the first, between two, and after the last."""

    before: Tensor
    between: Tensor
    after: Tensor


class ChatPrompts:
    """Builds the token ids of a question about a unit's frames."""

    def __init__(self, tokenizer: Any, card: ModelCard) -> None:
        self._tokenizer = tokenizer
        self._card = card

    def frame(self, prompt: str, modality: str) -> Frame:
        """The text around the items, for any number of items.

        Derived from the template's prompts for one and for two items. Raises `UnitError` (prepare) like `ids`, and if
        the template's text around a second item differs from that around the first.
        """
        placeholder = self.placeholder(modality)
        one, two = (_parts(self.ids(prompt, modality, count), placeholder) for count in (1, 2))
        if one[0] != two[0] or one[1] != two[2]:
            raise UnitError(
                "prepare",
                "PromptTemplate",
                "expected a chat template with the same text around every item, got one that numbers or counts them",
            )
        return Frame(*(torch.tensor(ids, dtype=torch.int64) for ids in two))

    def ids(self, prompt: str, modality: str, count: int) -> list[int]:
        """Token ids with one placeholder per item.

        Raises `UnitError` (prepare) if the template does not write one placeholder per item.
        """
        content = [{"type": modality}] * count + [{"type": "text", "text": prompt}]
        text = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        # Some templates write the first token (BOS), others leave it to the tokenizer.
        begins = bool(self._tokenizer.bos_token) and text.startswith(self._tokenizer.bos_token)
        ids: list[int] = self._tokenizer(text, add_special_tokens=not begins)["input_ids"]
        found = ids.count(self.placeholder(modality))
        if found != count:
            raise UnitError(
                "prepare",
                "PromptTemplate",
                f"expected {count} {modality} placeholder(s) in the chat prompt, got {found}; "
                "a prompt must not contain special tokens",
            )
        return ids

    def placeholder(self, modality: str) -> int:
        """The id of the placeholder token for this modality (image | video)."""
        for name in (f"{modality}_token_id", f"{modality}_token_index"):
            if getattr(self._card.config, name, None) is not None:
                return int(getattr(self._card.config, name))
        raise ConfigError(f"model.name {self._card.name}: its configuration names no {modality} token")


def _parts(ids: list[int], placeholder: int) -> list[list[int]]:
    """Split ids at the placeholders."""
    parts: list[list[int]] = [[]]
    for token in ids:
        if token == placeholder:
            parts.append([])
        else:
            parts[-1].append(token)
    return parts
