"""An ensemble as named tensors and a JSON note, and back, for whoever stores adapters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blackbox_vlm.observe.ensemble import Ensemble, Member
from blackbox_vlm.observe.features import FeatureMap
from blackbox_vlm.observe.heads import Fitted, Kernel, Linear, Residual

Tensors = Mapping[str, NDArray[np.float32]]
KINDS: dict[str, type[Fitted]] = {"linear": Linear, "kernel": Kernel, "residual": Residual}


def to_tensors(ensemble: Ensemble) -> tuple[dict[str, NDArray[np.float32]], dict[str, Any]]:
    """The arrays of an ensemble by name, and a note of its other numbers."""
    tensors = {"readout": ensemble.readout}
    members = []
    for number, member in enumerate(ensemble.members):
        parts = {**member.map._asdict(), **member.fitted._asdict()}
        tensors |= {f"member{number}.{name}": np.asarray(array) for name, array in parts.items()}
        members.append({"kind": _kind(member.fitted), "weight": float(member.weight)})
    note = {
        "members": members,
        "prior": float(ensemble.prior),
        "temperature": float(ensemble.temperature),
    }
    return tensors, note


def from_tensors(tensors: Tensors, note: Mapping[str, Any]) -> Ensemble:
    """Undo `to_tensors`.

    Raises:
        KeyError, TypeError, ValueError: the parts are missing or do not fit together.
    """
    readout = tensors["readout"]
    members = []
    for number, described in enumerate(note["members"]):
        prefix = f"member{number}."
        parts = {n.removeprefix(prefix): a for n, a in tensors.items() if n.startswith(prefix)}
        projected = FeatureMap(parts.pop("mean"), parts.pop("projection"))
        fitted = KINDS[described["kind"]](**parts)
        _check(readout, projected, fitted)
        members.append(Member(projected, fitted, float(described["weight"])))
    return Ensemble(
        readout, tuple(members), prior=float(note["prior"]), temperature=float(note["temperature"])
    )


def _kind(fitted: Fitted) -> str:
    return next(name for name, kind in KINDS.items() if isinstance(fitted, kind))


def _check(readout: NDArray[np.float32], projected: FeatureMap, fitted: Fitted) -> None:
    """Try the parts on one image; arrays that do not fit raise ValueError."""
    n_answers, n_classes = readout.shape
    if projected.mean.shape != (n_answers,) or len(projected.projection) != n_answers:
        raise ValueError(f"a member's map is not for {n_answers} answers")
    wanted = _shapes(fitted, projected.projection.shape[1], n_classes)
    for name, shape in wanted.items():
        if getattr(fitted, name).shape != shape:
            raise ValueError(f"{name} is {getattr(fitted, name).shape}, wanted {shape}")


def _shapes(fitted: Fitted, dim: int, n_classes: int) -> dict[str, tuple[int, ...]]:
    if isinstance(fitted, Linear):
        return {"weight": (dim, n_classes), "bias": (n_classes,), "prior": ()}
    if isinstance(fitted, Kernel):
        support = len(fitted.support)
        return {
            "support": (support, dim),
            "coefficients": (support, n_classes),
            "bias": (n_classes,),
            "beta": (),
            "prior": (),
        }
    hidden = len(fitted.hidden_bias)
    return {
        "hidden_weight": (hidden, n_classes),
        "hidden_bias": (hidden,),
        "output_weight": (n_classes, hidden),
        "output_bias": (n_classes,),
    }
