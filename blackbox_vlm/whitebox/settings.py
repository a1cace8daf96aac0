"""Every choice of white-box CoFT that the papers leave open, with its default and the reason.

"DeFT" is the public code of the parent of CoFT (NeurIPS 2024). Its text is where "the paper" is
silent here: of CoFT (arXiv 2602.04337) the abstract and introduction were at hand, no equations.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from blackbox_vlm.errors import InputError


@dataclass(frozen=True, slots=True)
class WhiteBoxSettings:
    """How `train` goes about it. Raises InputError: a value that makes no sense."""

    # Ablations: each False or 1 takes one part of the method away.
    models: int = 2  # CoFT: two, which filter for each other; 1: it filters for itself
    negative: bool = True  # False: no negative prompt, hence no L_neg and no cleanliness
    negative_reaches_visual: bool = True  # CoFT's change; False: DeFT, L_neg sees a detached image
    filtering: bool = True  # False: phase 2 takes every pseudo-label
    full_tuning: bool = True  # False: no phase 2

    # Texts.
    context_tokens: int = 4  # DeFT 16; the embedded model holds 32 tokens, and a CPU pays for each
    context_noise: float = 0.02  # DeFT's deviation; ours starts from the template's words, so that
    # training starts at zero-shot, and the noise is what tells the four contexts apart

    # Phase 1: parameter-efficient tuning on seeds.
    seed_share: float = 0.25  # of a class's expected images; UPL takes 16 of each, GRIP 1/10 more
    # in each round: a share suits folders of any size
    fewest_seeds: int = 4  # of a class, where it has so many candidates
    adapted_share: float = 0.5  # of the layers, the last ones: nothing flows back further, which
    # on a CPU halves the time of a step
    rank: int = 4  # of a low-rank update; the usual 4 to 16
    phase_1_steps: int = 80  # DeFT: 10 epochs; steps, as folders differ in size and patience not
    phase_1_rate: float = 2e-3  # AdamW; DeFT's SGD at 0.03 needs its thousands of steps
    warm_up: float = 0.2  # share of the steps before cleanliness gates L_cls; DeFT 1 epoch of 10
    negative_weight: float = 1.0  # of L_neg; DeFT 1
    complementary_temperature: float = 5.0  # wrong labels are drawn by softmax(s+ / this): harder
    # than DeFT's uniform ones, which a model's own confusions pass; inf is DeFT

    # Phase 2: all weights of the image tower.
    phase_2_steps: int = 60
    phase_2_rate: float = 1e-4  # AdamW
    clean_above: float = 0.5  # DeFT: the negative prompt says yes or no at one half
    coverage_floor: float = 0.3  # at least this share is kept, the cleanest ones: a gate that few
    # seeds have trained can close on almost everything

    # Both phases.
    batch_size: int = 32  # DeFT 64
    weight_decay: float = 5e-4  # DeFT
    train_size: float = 4 / 7  # side of training views relative to the model's own, where its tower
    # takes any: a third of the pixels cost a third
    judge_size: float = 5 / 7  # of the whole pictures that are judged: random crops enlarge what
    # they show, hence larger than the views (Touvron et al., arXiv 1906.06423); on training images
    # of four development sets the model's own side was 0.8 points worse, and costs twice as much
    evening: float = 1.0  # share of the classes' mean logits over the images that is taken off: the
    # largest free gain there is (see `coft.mass`), and it leans to even classes; 0 keeps them
    long_tail_above: float = 5.0  # ratio of the largest to the smallest class mass from which on
    # the seeds of a class are as many as its mass says

    # CoFT+.
    rounds: int = 1  # of phase 1, with refreshed pseudo-labels; CoFT+ 3 (GRIP 10)
    share_growth: float = 0.25  # what each round adds to the share of seeds
    contrast_weight: float = 0.0  # of the contrastive term; CoFT+ 0.1
    contrast_temperature: float = 0.07  # MoCo
    momentum: float = 0.999  # of the key encoder; MoCo
    queue: int = 8192  # keys at most; Co-Reg

    def __post_init__(self) -> None:
        if self.models not in (1, 2):
            raise InputError(f"got models={self.models}; wanted 1 or 2")
        for name in ("context_tokens", "rank", "batch_size", "rounds", "queue", "fewest_seeds"):
            if getattr(self, name) < 1:
                raise InputError(f"got {name}={getattr(self, name)}; wanted 1 or more")
        for name in ("seed_share", "adapted_share", "train_size", "judge_size"):
            if not 0 < getattr(self, name) <= 1:
                raise InputError(f"got {name}={getattr(self, name)}; wanted above 0, at most 1")

    def changed(self, **changes: Any) -> WhiteBoxSettings:
        """The same settings but for some."""
        return replace(self, **changes)


COFT = WhiteBoxSettings()
COFT_PLUS = COFT.changed(rounds=3, contrast_weight=0.1)
