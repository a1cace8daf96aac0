"""The local model: the same vectors as open_clip's own, whatever makes them fast."""

import json
import logging
import shutil
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from blackbox_vlm.backends import _open, image_tower
from blackbox_vlm.backends._torchvision import ensure_torchvision
from blackbox_vlm.backends.dual_encoder import DualEncoder
from PIL import Image
from torch import nn
from torch.nn import functional as F

from blackbox_vlm.errors import InputError

ensure_torchvision()
import open_clip  # noqa: E402  # needs the declaration above beside a CPU-only torch

NANO = files("blackbox_vlm") / "models" / "nano-dual"
NAMES = ["cat", "industrial building", "boston terrier", "ox"]
TEXTS = [
    "dog",
    "a photo of a cat.",
    "a centered satellite photo of an annual crop land",
    "a",
    "42!",
]
PLAIN_VIT = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16, "head_width": 32}
PLAIN_TEXT = {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}


@pytest.fixture(scope="module")
def nano() -> DualEncoder:
    return DualEncoder.load()


@pytest.fixture(scope="module")
def plain() -> tuple[Any, Any, Any]:
    """open_clip's own model, preprocessing and tokenizer."""
    name = f"local-dir:{NANO}"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    return model.eval(), preprocess, open_clip.get_tokenizer(name)


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(1)
    sizes = [(300, 200), (224, 224), (90, 160), (257, 31), (640, 480)]
    return [
        Image.fromarray(rng.integers(0, 256, (9, 7, 3), np.uint8)).resize(sizes[i % 5])
        for i in range(10)
    ]


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A hub that cannot be reached, and nothing in the cache."""
    from huggingface_hub import constants

    monkeypatch.setattr(_open, "_reachable", lambda endpoint: False)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))


def save(folder: Path, seed: int = 0, **config: Any) -> Path:
    """A tiny model with random weights, in open_clip's format."""
    config = {"embed_dim": 24, "vision_cfg": PLAIN_VIT, "text_cfg": PLAIN_TEXT, **config}
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    torch.manual_seed(seed)
    kind = open_clip.CustomTextCLIP if config.pop("custom_text", False) else open_clip.CLIP
    torch.save(kind(**config).state_dict(), folder / "open_clip_pytorch_model.bin")
    return folder


def reference(plain: tuple[Any, Any, Any], text: str, offset: np.ndarray, last: int) -> np.ndarray:
    """One candidate, one class, full context: CraFT's prompt written plainly.

    `last` is the place after the context's last token, [SOS] counted.
    """
    model, _, tokenize = plain
    ids = tokenize([text])
    with torch.no_grad():
        x = model.token_embedding(ids)
        x[0, last - len(offset) : last] += torch.from_numpy(offset)
        x = model.transformer(x + model.positional_embedding, attn_mask=model.attn_mask)
        x = model.ln_final(x)[0, ids[0].argmax()] @ model.text_projection
        return F.normalize(x, dim=-1).numpy()


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(2).normal(0, 0.05, shape).astype(np.float32)


def test_facts_of_the_embedded_model(nano: DualEncoder) -> None:
    assert nano.identity.startswith("open_clip:nano@embedded#")
    assert len(nano.identity.partition("#")[2]) == 16
    assert (nano.dim, nano.context_length, nano.token_width) == (512, 32, 192)
    assert nano.logit_scale == pytest.approx(15)
    assert nano.logit_bias is None
    assert 0.01 < (nano.token_std or 0) < 0.1


def test_images_as_open_clip(
    nano: DualEncoder, plain: tuple[Any, Any, Any], pictures: list[Image.Image]
) -> None:
    model, preprocess, _ = plain
    with torch.no_grad():
        wanted = model.encode_image(torch.stack([preprocess(p) for p in pictures]), normalize=True)
    vectors = nano.encode_images(pictures)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, wanted.numpy(), atol=1e-3)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_a_picture_has_one_vector(nano: DualEncoder, pictures: list[Image.Image]) -> None:
    together = nano.encode_images(pictures)
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(len(pictures))
        parts = np.split(order, [seed + 1, 7])
        apart = [nano.encode_images([pictures[i] for i in part]) for part in parts]
        np.testing.assert_array_equal(np.concatenate(apart), together[order])


def test_grey_and_transparent_pictures(nano: DualEncoder, pictures: list[Image.Image]) -> None:
    modes = [pictures[0].convert(mode) for mode in ("L", "RGBA", "P")]
    assert np.isfinite(nano.encode_images(modes)).all()


def test_nothing_to_encode(nano: DualEncoder) -> None:
    assert nano.encode_images([]).shape == (0, 512)
    assert nano.encode_texts([]).shape == (0, 512)
    assert nano.encode_prompts("a {}", NAMES, normal(0, 4, 192)).shape == (0, 4, 512)


def test_texts_as_open_clip(nano: DualEncoder, plain: tuple[Any, Any, Any]) -> None:
    model, _, tokenize = plain
    texts = TEXTS * 30  # more than one chunk
    with torch.no_grad():
        wanted = model.encode_text(tokenize(texts), normalize=True).numpy()
    np.testing.assert_allclose(nano.encode_texts(texts), wanted, atol=1e-5)


@pytest.mark.parametrize("template", ["a photo of a {}.", "a centered satellite photo of {}."])
def test_zero_offsets_are_the_text(nano: DualEncoder, template: str) -> None:
    vectors = nano.encode_prompts(template, NAMES, np.zeros((2, 4, 192), np.float32))
    wanted = nano.encode_texts([template.replace("{}", name) for name in NAMES])
    np.testing.assert_allclose(vectors, [wanted, wanted], atol=1e-6)


@pytest.mark.parametrize(
    ("template", "n_ctx", "completed"),
    [
        ("{} texture.", 4, "a photo of a {} texture."),
        ("the {}.", 4, "a photo of the {}."),
        ("{}", 2, "a photo {}"),
        ("{}", 6, "a photo of a a photo {}"),
    ],
)
def test_short_templates_are_completed(
    nano: DualEncoder, template: str, n_ctx: int, completed: str
) -> None:
    vectors = nano.encode_prompts(template, NAMES, np.zeros((1, n_ctx, 192), np.float32))
    wanted = nano.encode_texts([completed.replace("{}", name) for name in NAMES])
    np.testing.assert_allclose(vectors[0], wanted, atol=1e-6)


@pytest.mark.parametrize(
    ("template", "last"), [("a sketch of a {}.", 5), ("a centered satellite photo of {}.", 6)]
)
def test_offsets_move_the_last_context_tokens(
    nano: DualEncoder, plain: tuple[Any, Any, Any], template: str, last: int
) -> None:
    offsets = normal(3, 4, 192)
    vectors = nano.encode_prompts(template, NAMES, offsets)
    for p, offset in enumerate(offsets):
        for c, name in enumerate(NAMES):
            wanted = reference(plain, template.replace("{}", name), offset, last)
            np.testing.assert_allclose(vectors[p, c], wanted, atol=1e-5)
    assert np.abs(vectors[0] - vectors[1]).max() > 1e-2


def test_a_large_population_is_cut_into_passes(nano: DualEncoder) -> None:
    names = [f"{animal} {i}" for i in range(12) for animal in ("cat", "old dog", "gnu")]
    offsets = normal(60, 4, 192)
    vectors = nano.encode_prompts("a photo of a {}.", names, offsets)
    np.testing.assert_array_equal(vectors, nano.encode_prompts("a photo of a {}.", names, offsets))
    few = nano.encode_prompts("a photo of a {}.", names[30:], offsets[-1:])
    np.testing.assert_allclose(vectors[-1:, 30:], few, atol=1e-5)


def test_long_texts_are_refused(nano: DualEncoder) -> None:
    with pytest.raises(InputError, match=r"'cat cat .*\.\.\.' has 42 tokens; .* holds 32"):
        nano.encode_texts(["dog", "cat " * 40])
    assert nano.encode_texts(["cat " * 30]).shape == (1, 512)
    with pytest.raises(InputError, match="33 tokens"):
        nano.encode_prompts("{}", ["cat " * 27], np.zeros((1, 4, 192), np.float32))


@pytest.mark.parametrize(
    ("template", "shape", "message"),
    [
        ("a photo", (1, 4, 192), "needs {} once"),
        ("{} and {}", (1, 4, 192), "needs {} once"),
        ("a photo of a{}", (1, 4, 192), "put a space before"),
        ("a {}", (1, 4, 7), r"wanted \(n_candidates, n_ctx, 192\)"),
        ("a {}", (4, 192), r"wanted \(n_candidates, n_ctx, 192\)"),
    ],
)
def test_prompts_that_make_no_sense(
    nano: DualEncoder, template: str, shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        nano.encode_prompts(template, NAMES, np.zeros(shape, np.float32))


def test_identity_follows_the_weights(tmp_path: Path) -> None:
    first, same = save(tmp_path / "m"), save(tmp_path / "copy")
    other = save(tmp_path / "other", seed=1)
    digests = [DualEncoder.load(str(f)).identity.partition("#")[2] for f in (first, same, other)]
    assert digests[0] == digests[1] != digests[2]
    assert DualEncoder.load(str(first)).identity == f"open_clip:m@folder#{digests[0]}"


@pytest.mark.parametrize("custom", [False, True])
def test_transformers_from_a_folder(tmp_path: Path, custom: bool) -> None:
    text = {**PLAIN_TEXT, "ls_init_value": 0.5, "act_kwargs": {"approximate": "tanh"}}
    folder = save(tmp_path / "vit", custom_text=custom, text_cfg=text)
    encoder = DualEncoder.load(str(folder))
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    picture = Image.new("RGB", (40, 50), "teal")
    with torch.no_grad():
        image = model.eval().encode_image(preprocess(picture)[None], normalize=True)
        texts = model.encode_text(open_clip.tokenize(TEXTS, 20), normalize=True)
    np.testing.assert_allclose(encoder.encode_images([picture]), image.numpy(), atol=1e-3)
    np.testing.assert_allclose(encoder.encode_texts(TEXTS), texts.numpy(), atol=1e-5)
    assert encoder.encode_prompts("a {}", NAMES, np.zeros((1, 4, 32), np.float32)).shape[1] == 4


def test_a_tower_that_looks_both_ways(tmp_path: Path) -> None:
    text = {**PLAIN_TEXT, "no_causal_mask": True, "pool_type": "last"}
    folder = save(tmp_path / "siglip", custom_text=True, text_cfg=text, init_logit_bias=-10.0)
    encoder = DualEncoder.load(str(folder))
    assert encoder.token_width is None
    assert encoder.token_std is None
    assert encoder.logit_bias == -10
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    with torch.no_grad():
        wanted = model.eval().encode_text(open_clip.tokenize(TEXTS, 20), normalize=True)
    np.testing.assert_allclose(encoder.encode_texts(TEXTS), wanted.numpy(), atol=1e-5)
    with pytest.raises(InputError, match="takes no soft prompts"):
        encoder.encode_prompts("a {}", NAMES, np.zeros((1, 4, 32), np.float32))
    with pytest.raises(InputError, match="has 42 tokens"):
        encoder.encode_texts(["cat " * 40])


@pytest.mark.parametrize(
    ("model", "pretrained", "message"),
    [
        ("nanoo", None, "unknown model 'nanoo', did you mean nano?.*list_pretrained"),
        ("vit-b-32", None, "did you mean ViT-B-32 or"),
        ("ViT-B-32", None, "needs weights: give --pretrained TAG .*openai"),
        ("ViT-B-32", "openia", "no weights 'openia', did you mean openai?.*laion2b_s34b_b79k"),
        ("tests", None, "no open_clip_config.json in"),
    ],
)
def test_names_that_do_not_exist(
    model: str,
    pretrained: str | None,
    message: str,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(request.config.rootpath)
    with pytest.raises(InputError, match=message):
        DualEncoder.load(model, pretrained)


@pytest.mark.parametrize(
    ("model", "pretrained"), [("ViT-B-32", "openai"), ("hf-hub:laion/no-such", None)]
)
def test_a_hub_out_of_reach(
    model: str,
    pretrained: str | None,
    offline: None,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with pytest.raises(InputError, match=r"connect, set HF_HOME .*--model nano"):
        DualEncoder.load(model, pretrained)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_loading_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    handlers = logging.root.handlers.copy()
    DualEncoder.load()
    assert capfd.readouterr() == ("", "")
    assert logging.root.handlers == handlers
    assert logging.root.manager.disable == logging.NOTSET


def test_a_folder_without_weights(tmp_path: Path) -> None:
    shutil.copy(str(NANO / "open_clip_config.json"), tmp_path)
    with pytest.raises(InputError, match=f"cannot load {tmp_path.name}@folder: .*weights"):
        DualEncoder.load(str(tmp_path))


@pytest.mark.parametrize("device", ["tpu", "meta", "cuda:99"])
def test_devices_that_are_not_there(device: str) -> None:
    with pytest.raises(InputError, match="device"):
        DualEncoder.load(device=device)


class Residual(nn.Module):
    """Every pattern that the fusion rewrites, and what it must leave alone."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.inner = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.outer = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 5)
        nn.init.normal_(self.norm.running_mean)  # type: ignore[arg-type]
        nn.init.uniform_(self.norm.running_var, 0.5, 2)  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu6(self.norm(self.stem(x)), inplace=True)
        y = F.silu(self.inner(x))
        x = F.relu_(self.outer(y).add_(x))
        x = self.outer(x) + self.inner(x)
        y = self.inner(x)
        x = (y + F.gelu(y)).mean((2, 3))
        return F.gelu(self.head(x), approximate="tanh")


def test_fusion_of_every_pattern() -> None:
    torch.manual_seed(0)
    module, batch = Residual().eval(), torch.randn(2, 3, 9, 9)
    wanted = module(batch).detach()
    fused = image_tower._fused(module, batch)
    targets = [str(node.target) for node in fused.graph.nodes if node.op == "call_function"]
    assert not [t for t in targets if t.startswith(("aten.conv", "aten.batch", "aten.linear"))]
    torch.testing.assert_close(fused(batch), wanted, atol=1e-5, rtol=1e-4)


class Moody(nn.Module):
    """Cannot be captured: what it does depends on the pixels."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3)) if x.sum().item() > 0 else -x.mean((2, 3))


@pytest.fixture
def differing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_tower, "_fused", lambda visual, example: lambda x: visual(-x))


def test_the_plain_tower_where_capture_fails(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    batch = torch.randn(2, 3, 4, 4)
    tower = image_tower.fast_image_tower(Moody(), batch)
    torch.testing.assert_close(tower(batch), Moody()(batch))
    assert "oneDNN fusion failed" in caplog.text


def test_the_plain_tower_where_the_fast_one_differs(
    differing: None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    module = nn.Sequential(nn.Flatten(), nn.Linear(48, 6))
    batch = torch.randn(2, 3, 4, 4)
    tower = image_tower.fast_image_tower(module, batch)
    torch.testing.assert_close(tower(batch), module(batch).detach())
    assert "which is too much" in caplog.text
