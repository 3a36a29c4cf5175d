"""The closed vocabulary of the mini model, and its tokenizer: one token per word, one per digit.

Numbers are written digit by digit and joined again on decoding (`47` = `4`, `##7`), so decoding gives readable text:
`a red circle moves left. the sign reads 47.` A word outside the list becomes `<|unk|>`.
"""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import WordPiece
from transformers import PreTrainedTokenizerFast

PAD, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
IMAGE_PAD, VIDEO_PAD, UNK = "<|image_pad|>", "<|video_pad|>", "<|unk|>"
SPECIAL = (PAD, IM_START, IM_END, VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD, UNK)

COLORS = ("red", "green", "blue", "yellow", "purple", "orange", "cyan", "white")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
PLURALS = {shape: shape + ("es" if shape == "cross" else "s") for shape in SHAPES}
SIZES = ("small", "large")
MOTIONS = ("still", "left", "right", "up", "down")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")
# Words a sign can show; they use every letter of the alphabet except j, q, v, x, z.
SIGN_WORDS = (
    "stop", "open", "cafe", "bank", "park", "taxi", "exit", "bike", "fish", "milk", "moon", "tree",
    "road", "gate", "shop", "help", "fire", "gold", "lamp", "bird", "door", "wind", "sun", "bus",
)  # fmt: skip
CHOICES = ("a", "b", "c", "d")
SHARES = ("half", "quarter")

_OTHER_WORDS = """
user assistant system you are helpful . , ? ! : ; ' " - ( ) / s
the an this that these those it its they them there here and or not no yes nor both neither either
is was be been being has have had does do did can could will would should may might must
what which who where when why how whose many much few some any all none every each other another only also just
of in on at to from by for with without between among into onto over under through during about near next beside behind
describe caption summarize summary explain list tell me say show shows shown name give write read reads written please
briefly detail detailed short long sentence answer question word words letter letters number numbers digit digits text
sign label title
image images picture pictures photo video videos clip frame frames scene set
object objects thing things shape shapes color colors colour size sizes small large big tiny smaller larger
black gray grey brown pink background foreground plain gradient textured dark light bright
left right up down above below top bottom center middle corner side edge upper lower inside outside
position direction located place placed way toward away
move moves moved moving motion stay stays stayed still static slow slowly fast quickly speed stop stops
appear appears appeared appearing disappear disappears visible hidden present missing absent enter enters leave leaves
come comes remain remains turn turns change changes changed changing happen happens happening event events
first second third fourth fifth sixth last before after then later earlier while until begin beginning start starts end
ends ending once twice time times during second seconds minute minutes order sequence again finally
same different difference differences similar equal more less fewer most least than as like compare total count
nothing something anything everything see seen look looks contain contains correct wrong true false unknown
unanswerable cannot option options choose choice following
"""


def words() -> list[str]:
    """All ordinary words in id order, without duplicates; special tokens come before them."""
    digits = [str(d) for d in range(10)]
    parts = (_OTHER_WORDS.split(), COLORS, SHAPES, PLURALS.values(), SIZES, MOTIONS, NUMBERS, ORDINALS, SIGN_WORDS)
    listed = [word for part in parts for word in part]
    return list(dict.fromkeys([*listed, *CHOICES, *digits, *(f"##{d}" for d in digits), *SHARES]))


def build_tokenizer(chat_template: str) -> PreTrainedTokenizerFast:
    """The tokenizer as a transformers object; lower-cases, splits at spaces and punctuation."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *words()])}
    backend = Tokenizer(WordPiece(vocabulary, unk_token=UNK, continuing_subword_prefix="##"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("isolated")]
    )
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=IM_END,
        unk_token=UNK,
        extra_special_tokens=[IM_START, VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD],
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
        chat_template=chat_template,
    )
