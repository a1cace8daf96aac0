"""CraFT as its authors run it: the reference that `speed.py` is timed against.

Wang et al., "Connecting the Dots", ICML 2024, arXiv 2402.04050; its public code is mrflogs/CraFT.
Our own transcription of that procedure in plain torch, on open_clip's modules as they are:

    for every generation:
        40 candidates from pycma, in the box [-5, 5]^512, full covariance
        each candidate alone: every class prompt at the model's full context length, one forward
            pass of the text tower, L_I = CE(Y_I, y) + w KL(Y_O || Y_I)
        the current prompt: the mean of 40 samples asked anew
        the refiner: one epoch of L_O = CE(Y_O, y) + w KL(Y_I || Y_O), Adam, batches of 256

Left out, both in the reference's favour: the fresh crops that the refiner sees (every image would
be decoded and encoded again in every generation), and the evaluation on the test set that ends
every generation. Where it runs on CUDA the text tower is in float16, as CLIP's own loader leaves it
there. The settings are those that the public code uses for EuroSAT.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # pycma warns where matplotlib is missing
    import cma

TEMPLATE = "a photo of a {}."
CONTEXT_TOKENS = 4  # "a photo of a"
DIMENSION, POPULATION, BOUND, SIGMA = 512, 40, 5, 0.02
PROJECTION_STD = 1.0
HIDDEN, LEARNING_RATE, BATCH = 256, 1e-3, 256
CONSISTENCY = 0.01  # w


class ClassPrompts:
    """The class prompts under a context `p = p0 + A z`, through the text tower at full length."""

    def __init__(self, model: Any, tokenize: Any, names: tuple[str, ...], seed: int) -> None:
        self._text = getattr(model, "text", model)
        self._ids: Tensor = tokenize([TEMPLATE.replace("{}", name) for name in names])
        self._ids = self._ids.to(model.logit_scale.device)
        self._ends = self._ids.argmax(dim=1)  # [EOT] has the highest id
        tokens = self._text.token_embedding(self._ids)
        self._first = tokens[:, :1]
        self._suffix = tokens[:, 1 + CONTEXT_TOKENS :]
        self._start = tokens[0, 1 : 1 + CONTEXT_TOKENS]  # p0
        self._dtype = torch.float16 if tokens.is_cuda else torch.float32
        self._text.transformer.to(self._dtype)
        torch.manual_seed(seed)
        self._projection = nn.Linear(DIMENSION, self._start.numel(), bias=False)
        nn.init.normal_(self._projection.weight, std=PROJECTION_STD)
        self._projection.to(tokens.device)

    def __call__(self, z: NDArray[np.float64]) -> Tensor:
        """`z` (DIMENSION,) -> normalised class vectors `(n_classes, dim)`."""
        intrinsic = torch.tensor(z, dtype=torch.float32, device=self._start.device)
        return self.vectors(self._projection(intrinsic).reshape(self._start.shape))

    def vectors(self, offset: Tensor) -> Tensor:
        """`A z`, (CONTEXT_TOKENS, width) -> normalised class vectors `(n_classes, dim)`."""
        context = (self._start + offset).expand(len(self._ids), -1, -1)
        x = torch.cat([self._first, context, self._suffix], dim=1)
        x = (x + self._text.positional_embedding).to(self._dtype)
        x = self._text.transformer(x, attn_mask=self._text.attn_mask.to(self._dtype))
        x = self._text.ln_final(x.float())
        x = x[torch.arange(len(x), device=x.device), self._ends] @ self._text.text_projection
        vectors: Tensor = F.normalize(x, dim=-1)
        return vectors


class Refiner(nn.Module):
    """`Y_O = Y_I + g(Y_I)`."""

    def __init__(self, n_classes: int) -> None:
        super().__init__()
        self.g = nn.Sequential(
            nn.Linear(n_classes, HIDDEN), nn.ReLU(inplace=True), nn.Linear(HIDDEN, n_classes)
        )

    def forward(self, logits: Tensor) -> Tensor:
        return logits + self.g(logits)


class PublishedCraft:
    """The search, a generation at a time.

    Args:
        model, tokenize: open_clip's, in evaluation mode on its device.
        features: `(N, dim)`, normalised, of the training images.
        labels: `(N,)` int64.
        names: of the classes.
        seed: of the search, the projection and the refiner.
    """

    def __init__(
        self,
        model: Any,
        tokenize: Any,
        features: Tensor,
        labels: Tensor,
        names: tuple[str, ...],
        seed: int,
    ) -> None:
        self._features, self._labels = features, labels
        self._scale = float(model.logit_scale.exp())
        self.prompts = ClassPrompts(model, tokenize, names, seed)
        self._refiner = Refiner(len(names)).to(features.device)
        self._adam = torch.optim.Adam(self._refiner.parameters(), lr=LEARNING_RATE)
        options = {"popsize": POPULATION, "bounds": [-BOUND, BOUND], "seed": seed + 1}
        steps = cma.sigma_adaptation.CMAAdaptSigmaCSA  # newer ones do not let us ask twice
        options |= {"AdaptSigma": steps, "verbose": -9}
        self._search = cma.CMAEvolutionStrategy(DIMENSION * [0], SIGMA, options)
        self.best: list[float] = []  # lowest fitness of each generation

    def generation(self) -> None:
        """One generation of the search, then one epoch of the refiner."""
        candidates = self._search.ask()
        fitness = [self.fitness(z) for z in candidates]
        self._search.tell(candidates, fitness)
        self.best.append(min(fitness))
        self._train_refiner(np.mean(self._search.ask(), axis=0))

    def fitness(self, z: NDArray[np.float64]) -> float:
        """`L_I` of one candidate."""
        with torch.no_grad():
            logits = self._logits(z)
            loss = F.cross_entropy(logits, self._labels)
            loss = loss + CONSISTENCY * _divergence(self._refiner(logits), logits)
        return loss.item()

    def _train_refiner(self, z: NDArray[np.float64]) -> None:
        with torch.no_grad():
            logits = self._logits(z)
        for batch in torch.randperm(len(logits), device=logits.device).split(BATCH):
            refined = self._refiner(logits[batch])
            loss = F.cross_entropy(refined, self._labels[batch])
            loss = loss + CONSISTENCY * _divergence(logits[batch], refined)
            self._adam.zero_grad()
            loss.backward()
            self._adam.step()

    def _logits(self, z: NDArray[np.float64]) -> Tensor:
        return self._scale * self._features @ self.prompts(z).T


def _divergence(target: Tensor, logits: Tensor) -> Tensor:
    """`KL(softmax target || softmax logits)`, the mean over the images."""
    return F.kl_div(logits.log_softmax(1), target.softmax(1), reduction="batchmean")
