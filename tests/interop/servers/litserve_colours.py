"""A model behind LitServe's OpenAI embeddings, as its owner would write it.

A picture (a data URI) becomes its mean colour, a text three bytes of its digest; the test computes
the same by itself. Usage: `litserve_colours.py PORT`, with the key in LIT_SERVER_API_KEY.
"""

import base64
import hashlib
import io
import sys

import litserve
import numpy as np
from litserve.specs.openai_embedding import OpenAIEmbeddingSpec
from PIL import Image


class Colours(litserve.LitAPI):
    def setup(self, device):
        pass

    def predict(self, inputs):
        return [_embed(item) for item in ([inputs] if isinstance(inputs, str) else inputs)]


def _embed(item):
    if not item.startswith("data:image/"):
        return (np.frombuffer(hashlib.sha256(item.encode()).digest()[:3], np.uint8) / 255).tolist()
    picture = Image.open(io.BytesIO(base64.b64decode(item.split(",", 1)[1], validate=True)))
    return (np.asarray(picture.convert("RGB")).mean(axis=(0, 1)) / 255).tolist()


if __name__ == "__main__":
    server = litserve.LitServer(Colours(spec=OpenAIEmbeddingSpec()), accelerator="cpu")
    server.run(host="127.0.0.1", port=int(sys.argv[1]), generate_client_file=False)
