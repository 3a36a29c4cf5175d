"""Loads a vision-language model with its tokenizer, chat prompts, frame encoder and context limit."""

from collections.abc import Sequence

from pipeline.captioning.context import ContextLimit
from pipeline.captioning.encode import FrameEncoder, encoder_for
from pipeline.captioning.models import ModelCard, describe, load_model, load_tokenizer
from pipeline.captioning.prompts import ChatPrompts
from pipeline.config import Model


class Resident:
    """A model that stays loaded for the life of its process."""

    def __init__(self, settings: Model) -> None:
        self.card: ModelCard = describe(settings)
        self.encoder: FrameEncoder = encoder_for(self.card.config, self.card.preprocessor)
        self.tokenizer = load_tokenizer(self.card)
        self.prompts = ChatPrompts(self.tokenizer, self.card)
        self.context = ContextLimit(self.card.config, self.encoder, settings.max_new_tokens)
        self.model = load_model(self.card, settings)

    def text(self, tokens: Sequence[int]) -> str:
        """Decode token ids to text, without special tokens."""
        decoded: str = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return decoded.strip()
