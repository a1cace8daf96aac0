"""Write a tiny random LLaVA in the Hugging Face format, without a download.

Its answers mean nothing; its wire is real. Usage: `tiny_llava.py OUT`, in an environment with torch
and transformers. Every byte is a token, so that a class letter is one.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

SIDE, PATCH = 64, 16  # pixels
MARKS = ["<s>", "</s>", "<unk>", "<pad>", "<image>"]
TOWER = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
CHAT = """\
{%- for message in messages -%}
{{ message['role'] }}:{{ ' ' }}
{%- if message['content'] is string -%}{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] -%}
{{ '<image>' if part['type'] in ('image', 'image_url') else part['text'] }}
{%- endfor -%}
{%- endif -%}
{{ '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}assistant:{{ ' ' }}{%- endif -%}
"""


def tokenizer():
    words = [*MARKS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(MARKS)
    roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=core, **roles, model_max_length=2048, chat_template=CHAT
    )


def model():
    torch.manual_seed(0)
    words = {"vocab_size": 384, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 3}
    text = LlamaConfig(**TOWER, **words, num_key_value_heads=2, max_position_embeddings=2048)
    vision = CLIPVisionConfig(**TOWER, image_size=SIDE, patch_size=PATCH, projection_dim=64)
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=MARKS.index("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=(SIDE // PATCH) ** 2,
    )
    return LlavaForConditionalGeneration(config)


def save(out):
    """Under the names that published checkpoints have and vLLM reads; transformers 5 cuts one."""
    model().save_pretrained(out)
    weights = load_file(out / "model.safetensors")
    old, new = "vision_tower.", "vision_tower.vision_model."
    named = {n if new in n else n.replace(old, new): value for n, value in weights.items()}
    save_file(named, out / "model.safetensors", metadata={"format": "pt"})


def main(out):
    out.mkdir(parents=True, exist_ok=True)
    save(out)
    square = {"height": SIDE, "width": SIDE}
    LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=square),
        tokenizer=tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=CHAT,
        num_additional_image_tokens=1,
    ).save_pretrained(out)


main(Path(sys.argv[1]))
