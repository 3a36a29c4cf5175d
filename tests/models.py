"""Tiny vision-language models as folders, like a checkpoint on disk: random weights, whole preprocessing."""

import json

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

_WORDS = "USER ASSISTANT : describe the image video what is this red blue square circle moving a in . ?".split()
_LLAVA_TEMPLATE = (
    "{% for m in messages %}USER : {% for c in m.content %}{% if c.type == 'image' %}<image> "
    "{% else %}{{ c.text }}{% endif %}{% endfor %}{% endfor %} ASSISTANT :"
)


def save_tiny_llava(folder, *, context_tokens=512, seed=0):
    """A LLaVA-1.5 with 32 px images of 16 tokens, in `folder`; returns it."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", "<image>", *_WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>", "<image>"])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
            projection_dim=32,
        ),
        text_config=transformers.LlamaConfig(
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=len(vocabulary),
            max_position_embeddings=context_tokens,
            eos_token_id=1,
            pad_token_id=0,
            bos_token_id=None,
        ),
        image_token_id=3,
        image_seq_length=16,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    torch.manual_seed(seed)
    model = transformers.LlavaForConditionalGeneration(config)
    for parameter in model.parameters():  # the usual initialisation is so small that every image looks alike
        parameter.data.mul_(4)
    model.generation_config.eos_token_id = 1
    model.save_pretrained(folder)
    preprocessor = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": 32},
        "crop_size": {"height": 32, "width": 32},
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.2, 0.3, 0.4],
        "rescale_factor": 1 / 255,
        "do_resize": True,
        "do_center_crop": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_convert_rgb": True,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    processor = {
        "processor_class": "LlavaProcessor",
        "patch_size": 8,
        "num_additional_image_tokens": 1,  # CLIP's class token, which the default strategy drops again
        "vision_feature_select_strategy": "default",
        "image_token": "<image>",
    }
    (folder / "processor_config.json").write_text(json.dumps(processor))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": _LLAVA_TEMPLATE}))
    return folder
