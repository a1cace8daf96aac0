"""A local image encoder beside an endpoint: the student's eyes, where the user allows one.

An endpoint that only names labels says little about an image, however often it is asked. Where the
user has any open_clip model at hand, its vectors describe the image for nothing, and the endpoint's
own answer, whatever its access level, is the prior that a head starts from. Nothing passes the
meter by: the local model is a backend like any other, with a ledger of its own beside the run's, so
that a run that is resumed encodes no image twice and no image counts as a query to the endpoint.

An encoder of the endpoint's own weights is embedding access under another name; what it gains says
nothing of what another model would.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from blackbox_vlm.backend import Access, Backend, ImageEmbeddings, open_backend
from blackbox_vlm.errors import InputError
from blackbox_vlm.images import Image, quote
from blackbox_vlm.ledger import Ledger
from blackbox_vlm.meter import Meter
from blackbox_vlm.observations import unit
from blackbox_vlm.observe.observation import Observation
from blackbox_vlm.running import run_sync

Floats = NDArray[np.float32]

EMBEDDED = "nano"
WHOLE = ("hf-hub:", "local-dir:")  # what begins so has no tag after its colon
IMAGES_PER_REQUEST = 64  # encoded together, and so much is lost of a run that is killed
UNLIMITED = 2**62  # queries; they cost time alone
DOMINANT = 1000.0  # length of a vector beside an endpoint's answers, which are of the order of 1


class LocalEncoder:
    """An image encoder that answers through a meter. Opened by `open_local_encoder`."""

    def __init__(self, backend: Backend, ledger: Ledger) -> None:
        self._meter = Meter(backend, ledger, on_lost="resend")

    @property
    def identity(self) -> str:
        """Which weights these are; the same for the same weights, and holds no path."""
        return self._meter.capabilities.model_id

    def check(self, identity: str) -> None:
        """Refuse an encoder whose vectors another one's student cannot read.

        Raises:
            InputError: it is not the encoder of that identity.
        """
        if self.identity != identity:
            raise InputError(
                f"the adapter was tuned on vectors of {quote(identity)}, and this local encoder is "
                f"{quote(self.identity)}; give the same --local-encoder as then"
            )

    async def vectors(self, images: Sequence[Image]) -> Floats:
        """Unit vectors of images, `(n_images, d)` float32; what the ledger holds is not redone.

        Raises:
            InputError: there are no images.
        """
        if not images:
            raise InputError("there are no images to encode; give at least one")
        [vectors] = await self._meter.observe([ImageEmbeddings(tuple(images))], "local encoder")
        return unit(vectors)

    def vectors_sync(self, images: Sequence[Image]) -> Floats:
        """`vectors`, where nothing is awaited."""
        return run_sync(self.vectors(images))


@contextmanager
def open_local_encoder(
    spec: str, ledger: Path | None = None, *, device: str = "auto"
) -> Iterator[LocalEncoder]:
    """Open an image encoder, to be used in a `with`, which closes it.

    Args:
        spec: "nano" (the embedded model), "NAME:TAG" of open_clip, e.g. "ViT-B-32:openai",
            "hf-hub:...", or a folder in open_clip's format.
        ledger: the file that remembers its vectors; None: they are forgotten at the end.
        device: "auto", "cpu" or "cuda".

    Raises:
        InputError: there is no such model, or its weights cannot be had.
        StorageError: the ledger cannot be opened.
    """
    with ExitStack() as stack:
        backend = stack.enter_context(open_local(spec, access=Access.EMBEDDINGS, device=device))
        path = ledger or Path(stack.enter_context(TemporaryDirectory())) / "vectors.sqlite"
        yield LocalEncoder(backend, stack.enter_context(Ledger(path, UNLIMITED)))


@contextmanager
def open_local(spec: str, *, access: Access, device: str = "auto") -> Iterator[Backend]:
    """Open the backend of a spec, which `open_local_encoder` describes; a `with` closes it.

    Raises:
        InputError: there is no such model, or its weights cannot be had.
    """
    model, pretrained = parse_spec(spec)
    most = IMAGES_PER_REQUEST if access is Access.EMBEDDINGS else None
    backend = open_backend(
        "local",
        model=model,
        pretrained=pretrained,
        device=device,
        access=access.value,
        images_per_request=most,
    )
    try:
        yield backend
    finally:
        run_sync(backend.aclose())


def parse_spec(spec: str) -> tuple[str, str | None]:
    """The model and the tag of its weights that a spec names; None where it needs no tag.

    Raises:
        InputError: it is none of the forms of `open_local_encoder`.
    """
    if spec == EMBEDDED or spec.startswith(WHOLE):
        return spec, None
    if spec and Path(spec).expanduser().is_dir():
        return spec, None
    model, colon, pretrained = spec.partition(":")
    if not (model and colon and pretrained):
        raise InputError(
            f"got the local encoder {quote(spec)}; wanted nano (the embedded model), NAME:TAG of "
            "open_clip such as ViT-B-32:openai, hf-hub:OWNER/NAME, or a folder in its format"
        )
    return model, pretrained


def join_vectors(answers: Floats, vectors: Floats) -> Floats:
    """An endpoint's answers `(n, K)` and an encoder's unit vectors `(n, d)`, `(n, K + d)`.

    The vectors are made so long that they decide what features look like; the answers are there for
    the readout.
    """
    return np.hstack([answers, np.float32(DOMINANT) * vectors])


def with_vectors(observation: Observation, vectors: Floats) -> Observation:
    """The observation for a student: the zero-shot logits stay, the features are the vectors."""
    nothing = np.zeros((vectors.shape[1], observation.n_classes), dtype=np.float32)
    readout = np.vstack([observation.readout, nothing])
    return Observation(join_vectors(observation.answers, vectors), readout)
