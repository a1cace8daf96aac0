"""How fast the local model encodes, against plain open_clip and ONNX Runtime.

    python benchmarks/encoding.py [--images FOLDER] [--towers ViT-B-32 RN50] [--threads 2]

Rates are the best of several interleaved rounds, on the same threads and the same batches; before
each timed run stands an untimed one, while the threads of the column before stop spinning. What
else runs on the machine disturbs all columns, not quite alike: trust ratios more than rates, and
repeat.
Wants the extra `bench` (onnx, onnxruntime); without it the ONNX columns stay empty.
"""

from __future__ import annotations

import argparse
import io
import platform
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from blackbox_vlm.backends._torchvision import ensure_torchvision
from blackbox_vlm.backends.dual_encoder import (
    CONVOLUTIONAL_BATCH,
    TRANSFORMER_BATCH,
    DualEncoder,
)
from blackbox_vlm.backends.image_tower import fast_image_tower
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

EMBEDDED = f"local-dir:{files('blackbox_vlm') / 'models' / 'nano-dual'}"
NAMES = [
    *("cat", "dog", "boston terrier", "sunflower", "industrial building"),
    *("river", "guitar", "red dress", "bicycle", "hot air balloon"),
]
TEMPLATE = "a photo of a {}."
Tower = Callable[[Tensor], Tensor]


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    _say_where(options.threads)
    ensure_torchvision()
    import open_clip

    print("\nimage towers, images/s (ViT and RN50: random weights)")
    print(
        f"{'tower':14}{'batch':>6}{'eager':>8}{'ours':>8}{'ONNX':>8}{'ours/ONNX':>11}{'difference':>12}"
    )
    for name in ("nano", *options.towers):
        with _quiet():
            model, _, preprocess = open_clip.create_model_and_transforms(
                EMBEDDED if name == "nano" else name
            )
        print(_image_row(name, model.eval().visual, preprocess, options), flush=True)
    print("\nsoft prompts on the embedded model, class prompts/s")
    _prompts(options)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=Path, help="folder of pictures; default: generated ones")
    parser.add_argument("--towers", nargs="*", default=["ViT-B-32", "RN50"], help="open_clip names")
    parser.add_argument("--count", type=int, default=8, help="images per round (default 8)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--candidates", type=int, default=40)
    return parser.parse_args()


def _say_where(threads: int) -> None:
    python = platform.python_version()
    print(f"{platform.machine()}, {_processor()}, {threads} threads, Python {python}")
    names = ("torch", "open_clip_torch", "onnxruntime")
    print(", ".join(f"{name} {_version(name)}" for name in names))


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown processor"
    return next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), "?")


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def _image_row(name: str, visual: Any, preprocess: Any, options: argparse.Namespace) -> str:
    convolutions = sum(isinstance(m, torch.nn.Conv2d) for m in visual.modules())
    size = CONVOLUTIONAL_BATCH if convolutions > 4 else TRANSFORMER_BATCH
    batches = list(_pictures(preprocess, options).split(size))
    batches = [batch for batch in batches if len(batch) == size]
    onnx = _onnx(visual, batches[0], options.threads)  # before the tower is rewritten
    towers = {"eager": torch.inference_mode()(visual), "ours": fast_image_tower(visual, batches[0])}
    if onnx is not None:
        towers["onnx"] = onnx
    rates = _rates({k: _over(t, batches) for k, t in towers.items()}, options.rounds)
    rates = {k: r * len(batches) * size for k, r in rates.items()}
    eager, ours = (F.normalize(towers[k](batches[0]), dim=-1) for k in ("eager", "ours"))
    shown = (
        f"{rates['onnx']:8.1f}{rates['ours'] / rates['onnx']:11.2f}"
        if onnx
        else f"{'-':>8}{'-':>11}"
    )
    difference = (eager - ours).abs().max().item()
    return f"{name:14}{size:6}{rates['eager']:8.1f}{rates['ours']:8.1f}{shown}{difference:12.1e}"


def _pictures(preprocess: Any, options: argparse.Namespace) -> Tensor:
    if options.images:
        paths = sorted(p for p in options.images.rglob("*") if p.suffix.lower() in (".jpg", ".png"))
        pictures = [Image.open(path) for path in paths[: options.count]]
    else:
        rng = np.random.default_rng(0)
        patches = rng.integers(0, 256, (options.count, 12, 12, 3), np.uint8)
        pictures = [Image.fromarray(patch).resize((256, 256)) for patch in patches]
    return torch.stack([preprocess(picture) for picture in pictures])


def _over(tower: Tower, batches: list[Tensor]) -> Callable[[], None]:
    def run() -> None:
        for batch in batches:
            tower(batch)

    return run


def _rates(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Runs per second of each, best of interleaved rounds."""
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds):
        for name, run in runs.items():
            run()
            began = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - began)
    return {name: 1 / seconds for name, seconds in best.items()}


def _onnx(visual: Any, batch: Tensor, threads: int) -> Tower | None:
    try:
        import onnx  # noqa: F401  # the exporter wants it
        import onnxruntime
    except ImportError:
        return None
    file, fast_path = io.BytesIO(), torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # its one fused operator has no ONNX form
    with _quiet():
        torch.onnx.export(visual, (batch,), file, dynamo=False, opset_version=17)
    torch.backends.mha.set_fastpath_enabled(fast_path)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads, settings.log_severity_level = threads, 3
    session = onnxruntime.InferenceSession(file.getvalue(), settings)
    name = session.get_inputs()[0].name
    return lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0])


@contextmanager
def _quiet() -> Iterator[None]:
    """open_clip warns of random weights, the ONNX exporter of its own age."""
    import logging

    logging.disable(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


def _prompts(options: argparse.Namespace) -> None:
    import open_clip

    encoder = DualEncoder.load()
    model = open_clip.create_model(EMBEDDED).eval()
    ids = open_clip.get_tokenizer(EMBEDDED)([TEMPLATE.replace("{}", name) for name in NAMES])
    shape = (options.candidates, 4, encoder.token_width or 0)
    offsets = np.random.default_rng(0).normal(0, 0.02, shape).astype(np.float32)
    runs: dict[str, Callable[[], Any]] = {
        "one by one, full context": lambda: _one_by_one(model, ids, offsets),
        "encode_prompts": lambda: encoder.encode_prompts(TEMPLATE, NAMES, offsets),
    }
    rates = _rates(runs, options.rounds)
    plain, ours = (run() for run in runs.values())
    for name, rate in rates.items():
        print(f"{name:26}{rate * len(NAMES) * options.candidates:10.0f}")
    ratio = rates["encode_prompts"] / rates["one by one, full context"]
    print(f"{'ratio':26}{ratio:10.1f}\n{'difference':26}{np.abs(plain - ours).max():10.1e}")


@torch.inference_mode()
def _one_by_one(model: Any, ids: Tensor, offsets: np.ndarray) -> np.ndarray:
    """The loop of CraFT's code: one candidate after the other through the whole context."""
    vectors = []
    for offset in torch.from_numpy(offsets):
        x = model.token_embedding(ids)
        x[:, 1 : 1 + len(offset)] += offset
        x = model.transformer(x + model.positional_embedding, attn_mask=model.attn_mask)
        x = model.ln_final(x)[torch.arange(len(ids)), ids.argmax(dim=1)] @ model.text_projection
        vectors.append(F.normalize(x, dim=-1))
    return torch.stack(vectors).numpy()


if __name__ == "__main__":
    main()
