"""Generators of images from prompts: latent diffusion and flow matching.

The model of a run is the denoiser alone (a UNet or a transformer of diffusers). What stands around it (autoencoder, text
encoders, tokenizers, noise schedule) is frozen and belongs to the task, so latents and prompts are encoded once.

    diffusion   x_t = sqrt(ab_t) x0 + sqrt(1 - ab_t) e,   target e (or v, or x0), t of 0 … T - 1
    flow        x_t = (1 - t) x0 + t e,                    target e - x0,          t of 0 … 1

The loss of an image is the mean square over all entries. Noise and its level are drawn from `draw`, one seed an example of a
window; without it (evaluation) from the example's position, so that two evaluations see the same noise. A batch may carry
`level` and `noise` that a method chose.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from ftrecipes.data.scenes import ASKED, parse, read, score
from ftrecipes.errors import UserError
from ftrecipes.rng import generator
from ftrecipes.tasks import samplers
from ftrecipes.tasks.base import Batch, Encoded, Outputs, Task
from ftrecipes.tasks.samplers import DDIM, Chain, Euler, Predict

if TYPE_CHECKING:
    from ftrecipes.data.base import Example
    from ftrecipes.run import Run

PROMPTS = 4096
"""Encoded prompts that are kept."""
TEXT = ("context", "pooled")
"""What an encoded prompt consists of: its tokens (tokens, d), and one vector (p,) where the model takes one."""

Condition = dict[str, Tensor]


class Denoised(Outputs):
    """prediction, target: (n, channels, h, w), float32. x0, noise, noisy: clean latents, noise, their mixture; level: (n,)."""

    def __init__(self, prediction: Tensor, target: Tensor, x0: Tensor, noise: Tensor, noisy: Tensor, level: Tensor) -> None:
        self.prediction, self.target = prediction, target
        self.x0, self.noise, self.noisy, self.level = x0, noise, noisy, level


class Guided:
    """What a sampler asks: the network under classifier-free guidance of scale `guidance`, 1 for none."""

    def __init__(self, task: Denoising, model: nn.Module, condition: Condition, guidance: float) -> None:
        self.task, self.model, self.condition, self.guidance = task, model, condition, guidance
        null = task.nothing(len(condition["context"]))
        self.null = {name: null[name].to(t) for name, t in condition.items()}
        self.both = {name: torch.cat([self.null[name], t]) for name, t in condition.items()}

    def of(self, model: nn.Module) -> Guided:
        """The same of another model."""
        return Guided(self.task, model, self.condition, self.guidance)

    def pair(self, x: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """The network's outputs for the empty and for the given prompts, each (n, …), in one call."""
        without, given = self.task.network(self.model, torch.cat([x, x]), torch.cat([level, level]), self.both).chunk(2)
        return without, given

    def __call__(self, x: Tensor, level: Tensor, i: int) -> Tensor:
        if self.guidance == 1.0:
            return self.task.network(self.model, x, level, self.condition)
        without, given = self.pair(x, level)
        return without + self.guidance * (given - without)


class Denoising(Task):
    """Images from prompts by a denoiser.

    pipe: the diffusers pipeline that holds what stands around the denoiser. size: (height, width) of images. steps,
    guidance: of sampling. prompt_length: tokens of a T5 encoder. dropout: share of training prompts that become empty.
    """

    unit = "image"
    library: ClassVar[str] = "diffusers"
    target = "exact"
    forgetting: ClassVar[tuple[str, ...]] = ("exact", "loss")

    def __init__(
        self, pipe: Any, *, size: tuple[int, int], positions: int, steps: int, guidance: float, prompt_length: int,
        images: int, dropout: float,
    ) -> None:  # fmt: skip
        self.pipe, self.vae = pipe, pipe.vae
        self.part = "unet" if hasattr(pipe, "unet") else "transformer"
        self.size, self.positions = size, positions
        self.steps, self.guidance, self.prompt_length, self.images, self.dropout = steps, guidance, prompt_length, images, dropout
        self.guide: Callable[[Predict], Predict] | None = None
        self._prompts: dict[str, Condition] = {}
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.latent = (self.vae.config.latent_channels, size[0] // factor, size[1] // factor)

    # -- examples -------------------------------------------------------------------------------------------------

    def encode(self, example: Example) -> Encoded:
        """Bytes of the image (3, h, w) and the prompt; `image` may be an array of bytes or a PIL image."""
        if "image" not in example or "prompt" not in example:
            raise ValueError(f"an example needs `image` and `prompt`, this one has {', '.join(example) or 'nothing'}")
        if not isinstance(example["prompt"], str):
            raise ValueError(f"a prompt must be text, not {type(example['prompt']).__name__}")
        image = example["image"]
        pixels = np.asarray(image.convert("RGB") if hasattr(image, "convert") else image)
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
            raise ValueError(f"an image must hold bytes, height x width x 3, not {pixels.dtype} {pixels.shape}")
        bytes_ = torch.tensor(pixels).permute(2, 0, 1)
        return {"pixels": bytes_, "prompt": example["prompt"], "length": self.positions}

    def collate(self, encoded: Sequence[Encoded]) -> Batch:
        """moments (n, 2 channels, h, w) of the latents, the encoded prompts, and the prompts themselves."""
        for e in encoded:
            if "moments" not in e:  # one by one: in other company the last bits would differ, and a resumed run with them
                e["moments"] = self.moments(self.fitted(e["pixels"])[None])[0]
        prompts = [e["prompt"] for e in encoded]
        return {"moments": torch.stack([e["moments"] for e in encoded]), "prompt": prompts, **self.texts(prompts)}

    def blank(self, examples: int, length: int) -> Batch:
        channels, *space = self.latent
        batch: Batch = {
            "moments": torch.zeros(examples, 2 * channels, *space), "noise": torch.zeros(examples, *self.latent),
            "level": self.levels(0.5, examples), "example": torch.arange(examples), "prompt": [""] * examples,
            "seeds": [0] * examples,
        }  # fmt: skip
        return batch | {name: torch.zeros(examples, *shape) for name, shape in self.text_shapes().items()}

    def fitted(self, pixels: Tensor) -> Tensor:
        """Bytes (3, h, w) as floats from -1 to 1 at the model's size: the shorter side is fitted, the centre kept."""
        image, (height, width) = pixels.float(), self.size
        if image.shape[1:] != self.size:
            scale = max(height / image.shape[1], width / image.shape[2])
            near = [max(side, round(s * scale)) for side, s in zip(self.size, image.shape[1:], strict=True)]
            image = F.interpolate(image[None], near, mode="bicubic", antialias=True)[0].round().clamp(0, 255)
            top, left = (near[0] - height) // 2, (near[1] - width) // 2
            image = image[:, top : top + height, left : left + width]
        return image / 127.5 - 1

    # -- what stands around the denoiser --------------------------------------------------------------------------

    def companions(self) -> list[nn.Module]:
        names = ("vae", "text_encoder", "text_encoder_2", "text_encoder_3")
        return [m for name in names if isinstance(m := getattr(self.pipe, name, None), nn.Module)]

    @torch.no_grad()
    def moments(self, pixels: Tensor) -> Tensor:
        """Mean and deviation of the scaled latents of images from -1 to 1, (n, 2 channels, h, w), on the CPU."""
        posterior = self.vae.encode(pixels.to(self.vae.device, self.vae.dtype)).latent_dist
        config = self.vae.config
        mean = (posterior.mean - (config.shift_factor or 0.0)) * config.scaling_factor
        return torch.cat([mean, posterior.std * config.scaling_factor], 1).float().cpu()

    def decode(self, latents: Tensor) -> Tensor:
        """Images (n, 3, h, w) of latents; from 0 to 1, beyond which a decoder may reach a little. Gradients pass."""
        config = self.vae.config
        z = latents / config.scaling_factor + (config.shift_factor or 0.0)
        device = z.device.type
        with torch.autocast(device, enabled=False) if device != "meta" else nullcontext():
            return self.vae.decode(z.to(self.vae.dtype)).sample.float() / 2 + 0.5  # type: ignore[no-any-return]

    def texts(self, prompts: Sequence[str]) -> Condition:
        """Encoded prompts, `context` (n, tokens, d) and, where the model takes it, `pooled` (n, p), on the CPU; kept by prompt."""
        new = sorted(set(prompts) - set(self._prompts))
        if new and getattr(self.pipe, "text_encoder", None) is None:  # a plan without weights
            return {name: torch.zeros(len(prompts), *shape) for name, shape in self.text_shapes().items()}
        if new:
            if len(self._prompts) + len(new) > PROMPTS:
                self._prompts.clear()
                new = sorted(set(prompts))
            for prompt in new:  # one by one, as images are
                with torch.no_grad():
                    self._prompts[prompt] = {name: t[0].detach().cpu() for name, t in self.encode_prompts([prompt]).items()}
        return {name: torch.stack([self._prompts[p][name] for p in prompts]) for name in self._prompts[prompts[0]]}

    def encode_prompts(self, prompts: list[str]) -> Condition:
        """The text encoders' work, as the model's own pipeline does it."""
        raise NotImplementedError

    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of an encoded prompt, for plans."""
        raise NotImplementedError

    def nothing(self, n: int) -> Condition:
        """The condition that guidance leads away from: the empty prompt, n times."""
        return {name: t.expand(n, *t.shape[1:]) for name, t in self.texts([""]).items()}

    # -- the loss -------------------------------------------------------------------------------------------------

    def levels(self, share: float, n: int) -> Tensor:
        """A level for n examples, as a share of the way to noise."""
        raise NotImplementedError

    def draw_level(self, rng: torch.Generator) -> Tensor:
        """A level of noise as the model is trained with, a scalar."""
        raise NotImplementedError

    def log_snr(self) -> Tensor:
        """The logarithm of the signal-to-noise ratio at all levels, or at both ends of a range."""
        raise NotImplementedError

    def level_at(self, log_snr: Tensor) -> Tensor:
        """The levels of these ratios (n,); the nearest where levels are discrete."""
        raise NotImplementedError

    def mix(self, x0: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        """Noisy latents."""
        raise NotImplementedError

    def goal(self, x0: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        """What the network shall predict."""
        raise NotImplementedError

    def network(self, model: nn.Module, x: Tensor, level: Tensor, condition: Condition) -> Tensor:
        """The denoiser's output (n, channels, h, w), float32."""
        raise NotImplementedError

    def seeds(self, batch: Batch) -> list[int]:
        """One seed an example: of the window's draw, else its position."""
        if "seeds" in batch:  # a plan's tensors hold no numbers
            return list(batch["seeds"])
        return [int(s) for s in (batch["draw"] if "draw" in batch else batch["example"]).tolist()]

    def drawn(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Clean latents x0, noise and level of a batch."""
        mean, deviation = batch["moments"].chunk(2, 1)
        if "noise" in batch:
            x0, noise = mean, batch["noise"]
        else:
            both = torch.stack([torch.randn(2, *self.latent, generator=generator(s, "noise")) for s in self.seeds(batch)])
            both = both.to(mean.device)
            x0, noise = mean + deviation * both[:, 0], both[:, 1]
        level = batch.get("level")
        if level is None:
            level = torch.stack([self.draw_level(generator(s, "level")) for s in self.seeds(batch)])
        return x0, noise, level.to(mean.device)

    def given(self, batch: Batch) -> Condition:
        """The encoded prompts of a batch."""
        return {name: batch[name] for name in TEXT if name in batch}

    def condition(self, batch: Batch) -> Condition:
        """The same for training, where some become the empty prompt."""
        found = self.given(batch)
        if self.dropout and "draw" in batch:
            gone = [float(torch.rand((), generator=generator(s, "dropout"))) < self.dropout for s in self.seeds(batch)]
            drop = torch.tensor(gone, device=found["context"].device)
            null = self.nothing(len(gone))
            found = {k: torch.where(drop.view(-1, *[1] * (t.dim() - 1)), null[k].to(t), t) for k, t in found.items()}
        return found

    def outputs(self, model: nn.Module, batch: Batch) -> Denoised:
        x0, noise, level = self.drawn(batch)
        noisy = self.mix(x0, noise, level)
        prediction = self.network(model, noisy, level, self.condition(batch))
        return Denoised(prediction, self.goal(x0, noise, level), x0, noise, noisy, level)

    def losses(self, outputs: Outputs, batch: Batch) -> Tensor:
        assert isinstance(outputs, Denoised)
        return (outputs.prediction - outputs.target).square().flatten(1).mean(1)

    # -- sampling -------------------------------------------------------------------------------------------------

    def chain(self, steps: int) -> Chain:
        """The steps of the model's sampler."""
        raise NotImplementedError

    def predictor(self, model: nn.Module, condition: Condition, guidance: float) -> Predict:
        """The network under classifier-free guidance, e_null + guidance (e_c - e_null); both halves carry gradients."""
        return Guided(self, model, condition, guidance)

    def start(self, batch: Batch) -> Tensor:
        """Noise that sampling begins with, (n, channels, h, w), by the examples' seeds."""
        drawn = [torch.randn(self.latent, generator=generator(s, "sample")) for s in self.seeds(batch)]
        return torch.stack(drawn).to(batch["moments"].device)

    def step_noise(self, batch: Batch) -> Callable[[int], Tensor]:
        """Noise of the steps of a stochastic sampler, by the examples' seeds."""
        seeds = self.seeds(batch)
        return lambda i: torch.stack([torch.randn(self.latent, generator=generator(s, "step", i)) for s in seeds])

    def sample(
        self, model: nn.Module, batch: Batch, *, steps: int | None = None, guidance: float | None = None, eta: float = 0.0, **options: Any
    ) -> Tensor:
        """Latents of new images for the prompts of a batch (n, channels, h, w); options are those of `samplers.run`."""
        predict = self.predictor(model, self.given(batch), self.guidance if guidance is None else guidance)
        if self.guide:
            predict = self.guide(predict)
        chain = self.chain(steps or self.steps)
        return samplers.run(chain, predict, self.start(batch), eta=eta, noise=self.step_noise(batch), **options)

    def measure(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """`loss` at one level an image; of sampled images the share that shows what the prompt asks for, and their rewards.

        `exact`: all of count, colour, shape and place are right. Prompts of another form are not judged.
        """
        from ftrecipes.methods.rewards.base import judged

        losses = self.losses(self.outputs(model, batch), batch)
        found = {"loss": torch.stack([losses.sum(), losses.new_tensor(float(len(losses)))])}
        few = [i for i, position in enumerate(batch["example"].tolist()) if position < self.images]
        if not few:
            return found
        part = {k: [v[i] for i in few] if isinstance(v, list) else v[few] for k, v in batch.items()}
        images = self.decode(self.sample(model, part)).clamp(0, 1)
        prompts = part["prompt"]
        known = [i for i, prompt in enumerate(prompts) if parse(prompt)]
        if known:
            right = score(images[known], [prompts[i] for i in known])
            values = {"exact": right.prod(1), **{name: right[:, i] for i, name in enumerate(ASKED)}}
            found |= {name: torch.stack([v.sum(), v.new_tensor(float(len(v)))]).to(losses.device) for name, v in values.items()}
        for name, values_ in judged(images, prompts).items():
            found[f"reward/{name}"] = torch.stack([values_.sum(), values_.new_tensor(float(len(values_)))]).to(losses.device)
        return found

    def samples(self, run: Run, examples: Sequence[Example]) -> list[dict[str, str]]:
        """What sampled images show for the prompts of examples; the images lie in the record, `samples/<update>.png`."""
        if not examples:
            return []
        batch = run.move(self.collate([self.encode(example) for example in examples]))
        batch["example"] = torch.arange(len(examples))
        with run.evaluating():
            images = self.decode(self.sample(run.model, batch)).clamp(0, 1)
        if run.record:
            folder = run.record.folder / "samples"
            folder.mkdir(exist_ok=True)
            picture(images).save(folder / f"{run.step:06d}.png")
        prompts = [example["prompt"] for example in examples]
        return [
            {"prompt": prompt, "wanted": prompt if parse(prompt) else "", "answer": seen.words()}
            for prompt, seen in zip(prompts, read(images), strict=True)
        ]

    # -- leaving --------------------------------------------------------------------------------------------------

    def loader(self, model: nn.Module) -> str:
        return type(self.pipe).__name__

    def save_model(self, model: nn.Module, folder: Path, shard: str) -> None:
        """The whole pipeline in the hub's format, the tuned denoiser in it."""
        self.pipe.register_modules(**{self.part: model})
        self.pipe.save_pretrained(folder, max_shard_size=shard, safe_serialization=True)


def picture(images: Tensor, columns: int = 8) -> Any:
    """Images (n, 3, h, w) from 0 to 1 side by side, as a PIL image."""
    from PIL import Image

    n, _, height, width = images.shape
    columns = min(columns, n)
    rows = -(-n // columns)
    sheet = np.zeros((rows * height, columns * width, 3), np.uint8)
    for i, pixels in enumerate((images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()):
        top, left = i // columns * height, i % columns * width
        sheet[top : top + height, left : left + width] = pixels
    return Image.fromarray(sheet)


class Diffusion(Denoising):
    """Latent diffusion with a UNet: Stable Diffusion and Stable Diffusion XL."""

    domain: ClassVar[str] = "diffusion"

    def __init__(self, pipe: Any, **options: Any) -> None:
        super().__init__(pipe, **options)
        config = pipe.scheduler.config
        self.kind: str = config.prediction_type
        self.alphas: Tensor = pipe.scheduler.alphas_cumprod.double()
        self.large = pipe.unet.config.addition_embed_type == "text_time"

    def encode_prompts(self, prompts: list[str]) -> Condition:
        encoder = self.pipe.text_encoder
        found = self.pipe.encode_prompt(prompts, device=encoder.device, num_images_per_prompt=1, do_classifier_free_guidance=False)
        if not self.large:
            return {"context": found[0]}
        context, pooled = found[0], found[2]
        if self.pipe.config.force_zeros_for_empty_prompt:
            filled = torch.tensor([[[1.0 if p else 0.0]] for p in prompts]).to(context)
            context, pooled = context * filled, pooled * filled[:, 0]
        return {"context": context, "pooled": pooled}

    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        config = self.pipe.unet.config
        shapes: dict[str, tuple[int, ...]] = {"context": (self.prompt_length, config.cross_attention_dim)}
        if self.large:
            shapes["pooled"] = (config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim,)
        return shapes

    def levels(self, share: float, n: int) -> Tensor:
        return torch.full((n,), int(share * (len(self.alphas) - 1)))

    def draw_level(self, rng: torch.Generator) -> Tensor:
        return torch.randint(0, len(self.alphas), (), generator=rng)

    def log_snr(self) -> Tensor:
        return (self.alphas / (1 - self.alphas)).log()

    def level_at(self, log_snr: Tensor) -> Tensor:
        return (log_snr[:, None] - self.log_snr().to(log_snr)).abs().argmin(1)

    def scales(self, level: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(ab) and sqrt(1 - ab) of levels, shaped to multiply latents."""
        ab = self.alphas.to(level.device)[level].view(-1, *[1] * (like.dim() - 1))
        return ab.sqrt().to(like), (1 - ab).sqrt().to(like)

    def mix(self, x0: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        a, b = self.scales(level, x0)
        return a * x0 + b * noise

    def goal(self, x0: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        if self.kind == "sample":
            return x0
        if self.kind == "v_prediction":
            a, b = self.scales(level, x0)
            return a * noise - b * x0
        return noise

    def network(self, model: Any, x: Tensor, level: Tensor, condition: Condition) -> Tensor:
        dtype = model.dtype
        options: dict[str, Any] = {}
        if self.large:
            ids = torch.tensor([*self.size, 0, 0, *self.size], device=x.device, dtype=dtype).expand(len(x), 6)
            options["added_cond_kwargs"] = {"text_embeds": condition["pooled"].to(dtype), "time_ids": ids}
        context = condition["context"].to(dtype)
        return model(x.to(dtype), level, encoder_hidden_states=context, **options).sample.float()  # type: ignore[no-any-return]

    def chain(self, steps: int) -> DDIM:
        """The steps that diffusers' DDIM takes with the scheduler's settings."""
        from diffusers import DDIMScheduler

        count = len(self.alphas)
        if steps > count:
            raise UserError(f"{steps} sampling steps were asked for and the model was trained with {count}")
        with _disable_current_modes():  # a plan's tensors hold no numbers
            scheduler = DDIMScheduler.from_config(self.pipe.scheduler.config)
            scheduler.set_timesteps(steps)
            final = float(scheduler.final_alpha_cumprod)
            alphas = [float(self.alphas[t]) for t in scheduler.timesteps.tolist()]
        return DDIM(scheduler.timesteps, alphas, final, self.kind)


class Flow(Denoising):
    """Flow matching with a transformer: Stable Diffusion 3 and FLUX.

    law: of the levels in training, `logit_normal` (0, 1) or `uniform`; both through the scheduler's shift.
    """

    domain: ClassVar[str] = "flow"

    def __init__(self, pipe: Any, *, law: str, **options: Any) -> None:
        super().__init__(pipe, **options)
        self.law = law
        config = pipe.scheduler.config
        self.shift = 1.0 if config.use_dynamic_shifting else float(config.shift)
        self.packed = hasattr(pipe.transformer.config, "axes_dims_rope")

    def encode_prompts(self, prompts: list[str]) -> Condition:
        device = self.pipe.text_encoder.device
        if self.packed:
            context, pooled, _ = self.pipe.encode_prompt(prompts, None, device=device, max_sequence_length=self.prompt_length)
        else:
            context, _, pooled, _ = self.pipe.encode_prompt(
                prompts, None, None, device=device, do_classifier_free_guidance=False, max_sequence_length=self.prompt_length
            )
        return {"context": context, "pooled": pooled}

    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        config = self.pipe.transformer.config
        clip = 0 if self.packed else 77
        return {"context": (self.prompt_length + clip, config.joint_attention_dim), "pooled": (config.pooled_projection_dim,)}

    def levels(self, share: float, n: int) -> Tensor:
        return torch.full((n,), share)

    def draw_level(self, rng: torch.Generator) -> Tensor:
        u = torch.randn((), generator=rng).sigmoid() if self.law == "logit_normal" else torch.rand((), generator=rng)
        return self.shift * u / (1 + (self.shift - 1) * u)

    def log_snr(self) -> Tensor:
        return torch.tensor([math.inf, -math.inf])

    def level_at(self, log_snr: Tensor) -> Tensor:
        return torch.sigmoid(-log_snr.double() / 2).float()

    def mix(self, x0: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        t = level.view(-1, *[1] * (x0.dim() - 1)).to(x0)
        return (1 - t) * x0 + t * noise

    def goal(self, x0: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        return noise - x0

    def network(self, model: Any, x: Tensor, level: Tensor, condition: Condition) -> Tensor:
        dtype, config = model.dtype, model.config
        context, pooled = condition["context"].to(dtype), condition["pooled"].to(dtype)
        if not self.packed:
            return model(  # type: ignore[no-any-return]
                hidden_states=x.to(dtype), timestep=1000 * level.to(x.device), encoder_hidden_states=context, pooled_projections=pooled
            ).sample.float()
        n, channels, height, width = x.shape
        tokens = x.view(n, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, -1, 4 * channels)
        rows, columns = torch.meshgrid(*(torch.arange(s // 2, device=x.device) for s in (height, width)), indexing="ij")
        places = torch.stack([torch.zeros_like(rows), rows, columns], -1).view(-1, 3).to(dtype)
        strength = torch.full((n,), self.guidance, device=x.device, dtype=dtype) if config.guidance_embeds else None
        out = model(
            hidden_states=tokens.to(dtype), timestep=level.to(x.device, dtype), guidance=strength, pooled_projections=pooled,
            encoder_hidden_states=context, txt_ids=places.new_zeros(context.shape[1], 3), img_ids=places,
        ).sample.float()  # fmt: skip
        out = out.view(n, height // 2, width // 2, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
        return out.reshape(n, channels, height, width)  # type: ignore[no-any-return]

    def predictor(self, model: nn.Module, condition: Condition, guidance: float) -> Predict:
        """A model with distilled guidance takes it as an input; the others are guided by two predictions."""
        distilled = self.packed and model.config.guidance_embeds  # type: ignore[union-attr]
        return super().predictor(model, condition, 1.0 if distilled else guidance)

    def chain(self, steps: int) -> Euler:
        """The steps that diffusers' flow-matching Euler scheduler takes with the model's settings."""
        from diffusers import FlowMatchEulerDiscreteScheduler

        scheduler = FlowMatchEulerDiscreteScheduler.from_config(self.pipe.scheduler.config)
        options: dict[str, Any] = {}
        if scheduler.config.use_dynamic_shifting:
            config = scheduler.config
            slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
            options["mu"] = config.base_shift + slope * (self.positions - config.base_image_seq_len)
        if self.packed:
            options["sigmas"] = np.linspace(1.0, 1 / steps, steps)
        scheduler.set_timesteps(steps, **options)
        return Euler(scheduler.sigmas[:-1], scheduler.sigmas.tolist())
