"""Embed pictures and texts with transformers itself, as unit vectors.

Usage: `reference.py MODEL OUT.npz TEXTS.json IMAGE...`
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import CLIPModel, CLIPProcessor


def unit(output):
    vectors = getattr(output, "pooler_output", output)  # from transformers 5 on an object
    return torch.nn.functional.normalize(vectors, dim=-1).numpy()


@torch.inference_mode()
def main(folder, out, texts, *paths):
    model, processor = (
        CLIPModel.from_pretrained(folder).eval(),
        CLIPProcessor.from_pretrained(folder),
    )
    words = json.loads(Path(texts).read_text())
    pictures = [Image.open(path).convert("RGB") for path in paths]
    seen = processor(text=words, images=pictures, padding=True, return_tensors="pt")
    np.savez(
        out,
        images=unit(model.get_image_features(seen["pixel_values"])),
        texts=unit(model.get_text_features(seen["input_ids"], seen["attention_mask"])),
    )


main(*sys.argv[1:])
