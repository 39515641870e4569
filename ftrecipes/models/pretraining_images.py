"""What tiny-sd and tiny-dit stand on: an autoencoder and a CLIP text encoder, pretrained here on prompted images of all shapes.

As with the real models, these have seen more than the denoiser: words and looks of the shapes that it is tuned on later.
Both are made once, for tiny-sd; tiny-dit takes them over.
"""

from __future__ import annotations

import importlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ftrecipes.data.scenes import COUNTS, PLACES, Asked, asked_for, draw, plural
from ftrecipes.data.shapes import COLOURS, SHAPES, SIDE, render
from ftrecipes.models.base import PACKAGED
from ftrecipes.rng import derive

CHANNELS, WIDTH, LENGTH = 8, 64, 8
"""Channels of the latents; width of the text encoder; tokens of a prompt."""
DRAWN = 6000
SEED = "tiny-sd"


def tiny_sd(folder: Path) -> None:
    """Everything of tiny-sd but the weights of its UNet."""
    diffusers: Any = importlib.import_module("diffusers")  # its classes are not typed
    images, asked = drawn(DRAWN)
    autoencoder(images, folder / "vae")
    tokenizer(folder / "tokenizer")
    text_encoder(images, asked, folder)
    diffusers.UNet2DConditionModel(
        sample_size=SIDE // 4, in_channels=CHANNELS, out_channels=CHANNELS, cross_attention_dim=WIDTH, layers_per_block=1,
        block_out_channels=(32, 64), down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), attention_head_dim=4, norm_num_groups=8,
    ).save_config(folder / "unet")  # fmt: skip
    diffusers.DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, timestep_spacing="trailing"
    ).save_pretrained(folder / "scheduler")
    clip = ["transformers", "CLIPTextModel"], ["transformers", "CLIPTokenizer"]
    parts = {"unet": ["diffusers", "UNet2DConditionModel"], "scheduler": ["diffusers", "DDIMScheduler"]}
    index(folder, "StableDiffusionPipeline", {"text_encoder": clip[0], "tokenizer": clip[1], **parts})


def tiny_dit(folder: Path) -> None:
    """Everything of tiny-dit but the weights of its transformer; autoencoder and text encoder are those of tiny-sd."""
    diffusers: Any = importlib.import_module("diffusers")
    start = PACKAGED / "tiny-sd"
    shutil.copytree(start / "vae", folder / "vae", dirs_exist_ok=True)
    config = json.loads((folder / "vae" / "config.json").read_text())
    (folder / "vae" / "config.json").write_text(json.dumps({**config, "shift_factor": 0.0}, indent=2) + "\n")  # its pipeline adds it
    for number in ("", "_2"):
        shutil.copytree(start / "tokenizer", folder / f"tokenizer{number}", dirs_exist_ok=True)
        shutil.copytree(start / "text_encoder", folder / f"text_encoder{number}", dirs_exist_ok=True)
    diffusers.SD3Transformer2DModel(
        sample_size=SIDE // 4, patch_size=1, in_channels=CHANNELS, out_channels=CHANNELS, num_layers=3, num_attention_heads=4,
        attention_head_dim=20, joint_attention_dim=2 * WIDTH, caption_projection_dim=80, pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=SIDE // 4,
    ).save_config(folder / "transformer")  # fmt: skip
    diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0).save_pretrained(folder / "scheduler")
    clip = ["transformers", "CLIPTextModelWithProjection"], ["transformers", "CLIPTokenizer"]
    parts = {"transformer": ["diffusers", "SD3Transformer2DModel"], "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}
    encoders = {f"{name}{n}": kind for n in ("", "_2") for name, kind in zip(("text_encoder", "tokenizer"), clip, strict=True)}
    index(folder, "StableDiffusion3Pipeline", {**encoders, "text_encoder_3": [None, None], "tokenizer_3": [None, None], **parts})


def index(folder: Path, pipeline: str, parts: dict[str, Any]) -> None:
    """model_index.json."""
    parts = {"_class_name": pipeline, "vae": ["diffusers", "AutoencoderKL"], **parts}
    if pipeline == "StableDiffusionPipeline":
        parts |= {name: [None, None] for name in ("safety_checker", "feature_extractor", "image_encoder")} | {
            "requires_safety_checker": False
        }
    (folder / "model_index.json").write_text(json.dumps(parts, indent=1) + "\n")


def drawn(count: int) -> tuple[Tensor, list[Asked]]:
    """Images of all shapes (count, 3, SIDE, SIDE), bytes, and what each shows."""
    every = asked_for(list(SHAPES))
    r = np.random.default_rng(derive(SEED, "drawn"))
    asked = [every[i] for i in r.integers(len(every), size=count)]
    return torch.tensor(np.stack([render(draw(a, r)) for a in asked])).permute(0, 3, 1, 2), asked


def train(parameters: list[nn.Parameter], loss: Callable[[torch.Generator], Tensor], *, steps: int, lr: float, name: str) -> float:
    """AdamW with warmup and cosine decay; returns the mean loss of the last tenth."""
    rng = torch.Generator().manual_seed(derive(SEED, name))
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
    last: list[float] = []
    for step in range(steps):
        rate = lr * min(1.0, (step + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * step / steps) + 0.01)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        value = loss(rng)
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        last = [*last, float(value)][-max(1, steps // 10) :]
        if step % max(1, steps // 20) == 0:
            print(f"{name} {step}/{steps}  loss {float(value):.4f}", flush=True)
    return sum(last) / len(last)


def autoencoder(images: Tensor, folder: Path) -> None:
    """Train and write it, with the scale that brings its latents to unit deviation."""
    diffusers: Any = importlib.import_module("diffusers")
    torch.manual_seed(derive(SEED, "autoencoder"))
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3, block_out_channels=(12, 24, 32),
        latent_channels=CHANNELS, sample_size=SIDE, norm_num_groups=4, mid_block_add_attention=False, force_upcast=False,
    ).to(memory_format=torch.channels_last)  # fmt: skip

    def loss(rng: torch.Generator) -> Tensor:
        x = images[torch.randint(len(images), (8,), generator=rng)].to(memory_format=torch.channels_last) / 127.5 - 1
        posterior = vae.encode(x).latent_dist
        error = vae.decode(posterior.sample(generator=rng)).sample - x
        colour = (x.amax(1, keepdim=True) - x.amin(1, keepdim=True)) / 2  # things are small and the ground is large
        return ((1 + 4 * colour) * (error.abs() + 2 * error.square())).mean() + 3e-4 * posterior.kl().mean() / 512  # type: ignore[no-any-return]

    train(list(vae.parameters()), loss, steps=3000, lr=3e-3, name="autoencoder")
    vae = vae.to(memory_format=torch.contiguous_format, dtype=torch.bfloat16)
    with torch.no_grad():
        latents = vae.float().encode(images[:512] / 127.5 - 1).latent_dist.mean
    vae.register_to_config(scaling_factor=round(float(1 / latents.std()), 4))
    vae.to(torch.bfloat16).save_pretrained(folder)


def tokenizer(folder: Path) -> None:
    """CLIP's kind of tokenizer, one token for each word of the prompts, letters for other words."""
    from transformers import CLIPTokenizer

    words = [*COUNTS, *COLOURS, *(plural(s, n) for s in SHAPES for n in (1, 2)), *PLACES, "a", "the", "small", "large", "photo", "of", "at"]
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    vocabulary = [*letters, *(f"{c}</w>" for c in letters)]
    merges: list[tuple[str, str]] = []
    for word in words:
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        while len(pieces) > 1:  # the last two first, so that no two words share a beginning by accident
            pair = (pieces[-2], pieces[-1])
            if pair not in merges:
                merges.append(pair)
                vocabulary.append("".join(pair))
            pieces[-2:] = ["".join(pair)]
    names = list(dict.fromkeys([*vocabulary, "<|startoftext|>", "<|endoftext|>"]))
    made = CLIPTokenizer(vocab={name: i for i, name in enumerate(names)}, merges=merges, model_max_length=LENGTH)  # type: ignore[arg-type]
    made.save_pretrained(folder)


def text_encoder(images: Tensor, asked: list[Asked], folder: Path) -> None:
    """Train CLIP's text encoder against a small convolutional network that is thrown away, and write it with its projection."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

    words = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    torch.manual_seed(derive(SEED, "text"))
    config = CLIPTextConfig(
        vocab_size=len(words), hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=LENGTH, projection_dim=WIDTH, bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )  # fmt: skip
    text: Any = CLIPTextModelWithProjection(config)
    layers: list[nn.Module] = []
    for inside, outside in ((3, 24), (24, 48), (48, 64)):
        layers += [nn.Conv2d(inside, outside, 4, stride=2, padding=1), nn.SiLU(), nn.GroupNorm(4, outside)]
    look = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 16, WIDTH))
    ids = words([a.prompt for a in asked], padding="max_length", max_length=LENGTH, return_tensors="pt").input_ids

    def loss(rng: torch.Generator) -> Tensor:
        chosen = torch.randint(len(images), (96,), generator=rng)
        seen = F.normalize(look(images[chosen] / 127.5 - 1), dim=1)
        said = F.normalize(text(input_ids=ids[chosen]).text_embeds, dim=1)
        same = (ids[chosen][:, None] == ids[chosen][None]).all(-1).float()  # a prompt can stand in a batch twice
        goal = same / same.sum(1, keepdim=True)
        logits = 20 * seen @ said.T
        return F.cross_entropy(logits, goal) + F.cross_entropy(logits.T, goal)

    train([*text.parameters(), *look.parameters()], loss, steps=300, lr=2e-3, name="text encoder")
    text.to(torch.bfloat16).save_pretrained(folder / "text_encoder")
