"""Write a tiny random CLIP in the Hugging Face format, without a download.

Its answers mean nothing; its wire is real. Usage: `tiny_clip.py OUT`, in an environment with torch
and transformers.
"""

import json
import sys
from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizerFast

SIDE = 64  # pixels
TOWER = {
    "hidden_size": 64,  # not above the joint space's, or vLLM's pooler of texts dies
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "projection_dim": 64,
}


def tokenizer(out):
    """Every byte is a token, alone or at the end of a word: a vocabulary without merges."""
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (out / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (out / "merges.txt").write_text("#version: 0.2\n")
    files = (str(out / "vocab.json"), str(out / "merges.txt"))
    return CLIPTokenizerFast(*files, model_max_length=77)


def model(words):
    torch.manual_seed(0)
    marks = {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1}
    texts = {**TOWER, "vocab_size": len(words), "max_position_embeddings": 77, **marks}
    images = {**TOWER, "image_size": SIDE, "patch_size": 16}
    return CLIPModel(CLIPConfig(text_config=texts, vision_config=images, projection_dim=64))


def main(out):
    out.mkdir(parents=True, exist_ok=True)
    words = tokenizer(out)
    model(words).save_pretrained(out)
    square = {"height": SIDE, "width": SIDE}
    pictures = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=square)
    CLIPProcessor(image_processor=pictures, tokenizer=words).save_pretrained(out)


main(Path(sys.argv[1]))
