"""The random states of one rank, so that a resume or a fork draws the numbers that would have come next."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator


def random_state_name(rank: int) -> str:
    """Return the name of a rank's file in a checkpoint folder."""
    return f"random_state_rank_{rank:05d}.pt"


def random_state() -> dict[str, Any]:
    """Return the states of Python's, NumPy's, torch's and the accelerator's generators."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    accelerator = get_accelerator()
    return {
        "python": random.getstate(),
        "numpy": (
            name,
            torch.from_numpy(np.asarray(keys).astype(np.int64)),
            int(position),
            int(has_gauss),
            float(gauss),
        ),
        "torch": torch.get_rng_state(),
        "accelerator": accelerator.get_rng_state() if accelerator.device_name() != "cpu" else None,
    }


def random_state_digest() -> bytes:
    """Return what is another one as soon as a number has been drawn."""
    digest = hashlib.sha256()
    for part in random_state().values():
        for item in part if isinstance(part, tuple) else (part,):
            digest.update(item.numpy().tobytes() if torch.is_tensor(item) else repr(item).encode())
    return digest.digest()


def save_random_state(path: Path) -> None:
    """Write the random states."""
    torch.save(random_state(), path)


def load_random_state(path: Path) -> None:
    """Put back what ``save_random_state`` wrote."""
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    random.setstate(state["python"])
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if state["accelerator"] is not None and get_accelerator().device_name() != "cpu":
        get_accelerator().set_rng_state(state["accelerator"])
