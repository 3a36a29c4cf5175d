import numpy as np

from pipeline.mini.model import build_config, tokenizer
from pipeline.mini.questions import SET_FAMILIES, ask_set
from pipeline.mini.scene import sample_scene
from pipeline.mini.vocabulary import SPECIAL, words
from pipeline.mini.world import questions_of

TOKENIZER = tokenizer()


def test_every_question_and_answer_survives_encoding_and_decoding():
    for seed in range(300):
        rng = np.random.default_rng(seed)
        scene = sample_scene(rng, 192, 192, 8.0 * (seed % 2), max_things=6, sign_words=True)
        scenes = [sample_scene(rng, duration_s=0.0) for _ in range(2 + seed % 5)]
        asked = [*questions_of(scene, rng), *(ask_set(scenes, family, rng) for family in SET_FAMILIES)]
        for text in (text for qa in asked if qa is not None for text in (qa.question, qa.answer)):
            ids = TOKENIZER.encode(text)
            assert TOKENIZER.unk_token_id not in ids, text
            assert TOKENIZER.decode(ids) == text


def test_ids_are_unique_and_fit_the_model():
    assert len(set(words())) == len(words())
    assert TOKENIZER.convert_ids_to_tokens(list(range(len(SPECIAL)))) == list(SPECIAL)
    assert len(TOKENIZER) == len(SPECIAL) + len(words()) <= build_config(TOKENIZER).text_config.vocab_size


def test_numbers_are_digits_and_unknown_words_are_unknown():
    assert TOKENIZER.tokenize("The sign reads 407.") == ["the", "sign", "reads", "4", "##0", "##7", "."]
    assert TOKENIZER.encode("zebra") == [TOKENIZER.unk_token_id]


def test_the_chat_template_takes_images_videos_and_text():
    content = [{"type": "image"}, {"type": "video"}, {"type": "text", "text": "Describe the video."}]
    text = TOKENIZER.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    assert text == (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|><|vision_start|><|video_pad|><|vision_end|>"
        "Describe the video.<|im_end|>\n<|im_start|>assistant\n"
    )
    turns = [
        {"role": "system", "content": "You are helpful."},
        {"role": "user", "content": "What is there?"},
        {"role": "assistant", "content": "a red circle."},
    ]
    assert TOKENIZER.apply_chat_template(turns, tokenize=False) == (
        "<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\nWhat is there?<|im_end|>\n"
        "<|im_start|>assistant\na red circle.<|im_end|>\n"
    )
