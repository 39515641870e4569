"""Randomness as a function of what it is for: no generator lives longer than the draw it was made for."""

from __future__ import annotations

import hashlib

import torch


def derive(*key: object) -> int:
    """A 63-bit seed from any key; equal keys give equal seeds, on every machine and in every process."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(*key: object, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh torch generator for one purpose."""
    return torch.Generator(device=device).manual_seed(derive(*key))
