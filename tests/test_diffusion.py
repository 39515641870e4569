"""Latent diffusion and flow matching: scenes, losses and samplers against diffusers, loading and writing of pipelines, rewards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from generators import SMALL_DIT, SMALL_SD
from tools import build, train

from ftrecipes import registry
from ftrecipes.compose import compose
from ftrecipes.data import scenes
from ftrecipes.data.base import Splits
from ftrecipes.errors import RunFailed, UserError
from ftrecipes.methods.rewards import base as rewards
from ftrecipes.models.base import PACKAGED
from ftrecipes.plan import plan
from ftrecipes.run import Run
from ftrecipes.tasks import samplers
from ftrecipes.tasks.denoising import picture

diffusers = pytest.importorskip("diffusers")
SMALL = {"diffusion": SMALL_SD, "flow": SMALL_DIT}
MUTATION = ("ftrecipes/tasks/samplers.py", "math.sqrt(max(0.0, 1 - after - s**2)) * e", "math.sqrt(1 - after) * e")


@pytest.fixture(scope="module", params=["diffusion", "flow"])
def run(request: Any) -> Run:
    return build(*SMALL[request.param], "method=full")


@pytest.fixture(scope="module")
def sd() -> Run:
    return build(*SMALL_SD, "method=full")


# -- scenes -----------------------------------------------------------------------------------------------------------


def drawn(shapes: list[str], count: int) -> tuple[torch.Tensor, list[str]]:
    examples = [scenes.Prompted(shapes, "proof", count)[i] for i in range(count)]
    pixels = torch.tensor(np.stack([e["image"] for e in examples])).permute(0, 3, 1, 2) / 255
    return pixels, [e["prompt"] for e in examples]


def test_what_is_drawn_is_read_back() -> None:
    for shapes in (scenes.KNOWN, scenes.NEW):
        images, prompts = drawn(shapes, 240)
        right = scenes.score(images, prompts)
        assert right.prod(1).mean() > 0.98, right.mean(0)


def test_what_is_not_asked_for_is_noticed() -> None:
    images, prompts = drawn(scenes.KNOWN, 240)
    every = [scenes.parse(p) for p in prompts]
    changed = {
        "count": [scenes.Asked(a.count % 3 + 1, a.colour, a.shape, a.place) for a in every],
        "colour": [scenes.Asked(a.count, "red" if a.colour != "red" else "blue", a.shape, a.place) for a in every],
        "shape": [scenes.Asked(a.count, a.colour, "star", a.place) for a in every],
        "place": [scenes.Asked(a.count, a.colour, a.shape, "centre" if a.place != "centre" else "left") for a in every],
    }
    for at, name in enumerate(scenes.ASKED):
        right = scenes.score(images, [a.prompt for a in changed[name]]).mean(0)
        assert right[at] < 0.02 and min(right[i] for i in range(4) if i != at) > 0.98
    grey = torch.rand(8, 1, 32, 32).expand(8, 3, 32, 32)
    assert scenes.score(grey, prompts[:8]).sum() == 0
    assert all(seen.words() == "nothing" for seen in scenes.read(grey))
    with pytest.raises(ValueError, match="is not of the form"):
        scenes.score(grey[:1], ["a photo of a cat"])


def test_scenes_are_a_pure_function_and_no_prompt_is_left_out() -> None:
    a, b = scenes.Prompted(scenes.KNOWN, "train", 480), scenes.Prompted(scenes.KNOWN, "train", 480)
    b[3]
    assert np.array_equal(a[77]["image"], b[77]["image"]) and not np.array_equal(a[77]["image"], a[317]["image"])
    assert len({a[i]["prompt"] for i in range(240)}) == 240 == 4 * 4 * 3 * 5
    assert all(scenes.parse(p).prompt == p for p in {a[i]["prompt"] for i in range(240)})


# -- the loss against diffusers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_diffusion_loss_is_that_of_a_plain_loop(sd: Run, kind: str) -> None:
    """The same latents, noise and steps through diffusers' scheduler and network."""
    batch = sd.window(0).micros[0]
    task = sd.task
    scheduler = diffusers.DDPMScheduler.from_config(task.pipe.scheduler.config, prediction_type=kind)
    task.kind = kind
    try:
        outputs = task.outputs(sd.model, batch)
        found = task.losses(outputs, batch)
    finally:
        task.kind = "epsilon"
    noisy = scheduler.add_noise(outputs.x0, outputs.noise, outputs.level)
    targets = {
        "epsilon": outputs.noise,
        "sample": outputs.x0,
        "v_prediction": scheduler.get_velocity(outputs.x0, outputs.noise, outputs.level),
    }
    prompts = task.pipe.encode_prompt(batch["prompt"], "cpu", 1, False)[0]
    prediction = sd.model(noisy, outputs.level, encoder_hidden_states=prompts).sample
    plain = F.mse_loss(prediction, targets[kind], reduction="none").mean((1, 2, 3))
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-6)
    mean, deviation = batch["moments"].chunk(2, 1)
    assert ((outputs.x0 - mean) / deviation).std() == pytest.approx(1, abs=0.2)


def test_flow_loss_is_that_of_a_plain_loop() -> None:
    run = build(*SMALL_DIT, "method=full")
    batch = run.window(0).micros[0]
    outputs = run.task.outputs(run.model, batch)
    t = outputs.level.view(-1, 1, 1, 1)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=outputs.level.sort(descending=True).values.tolist())
    order = outputs.level.argsort(descending=True)
    noisy = scheduler.scale_noise(outputs.x0[order], scheduler.timesteps, outputs.noise[order])
    torch.testing.assert_close(outputs.noisy[order], noisy, rtol=1e-5, atol=1e-6)
    context, _, pooled, _ = run.task.pipe.encode_prompt(
        batch["prompt"], None, None, do_classifier_free_guidance=False, max_sequence_length=0
    )
    prediction = run.model(
        hidden_states=(1 - t) * outputs.x0 + t * outputs.noise, timestep=1000 * outputs.level, encoder_hidden_states=context,
        pooled_projections=pooled,
    ).sample  # fmt: skip
    plain = F.mse_loss(prediction, outputs.noise - outputs.x0, reduction="none").mean((1, 2, 3))
    torch.testing.assert_close(run.task.losses(outputs, batch), plain, rtol=1e-5, atol=1e-6)


def test_levels_follow_the_models_law(run: Run) -> None:
    rng = torch.Generator().manual_seed(0)
    levels = torch.stack([run.task.draw_level(rng) for _ in range(4000)]).double()
    if run.task.domain == "diffusion":
        assert levels.min() < 5 and levels.max() > 994 and levels.mean() == pytest.approx(499.5, abs=15)
    else:
        logit = (levels / (1 - levels)).log()
        assert abs(float(logit.mean())) < 0.06 and float(logit.std()) == pytest.approx(1, abs=0.05)


def test_draws_belong_to_the_example_and_the_update(run: Run) -> None:
    """The split into micro-batches changes no gradient; each update has other draws; the same example twice has two."""
    found = []
    for micro in ("auto", 3, 1):
        other = build(*SMALL[run.task.domain], "method=full", f"hardware.micro_batch={micro}")
        loss = other.gradients(other.window(2))
        found.append((float(loss), {n: p.grad.clone() for n, p in other.trainable().items() if p.grad is not None}))
    for loss, grads in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-5)
        for name, grad in grads.items():
            torch.testing.assert_close(grad, found[0][1][name], rtol=1e-3, atol=1e-6)
    here, there = run.window(0).micros[0], run.window(6).micros[0]  # 24 examples, 4 an update: the next pass
    seeds = {int(p): int(s) for p, s in zip(here["example"], here["draw"], strict=True)}
    assert all(seeds.get(int(p)) != int(s) for p, s in zip(there["example"], there["draw"], strict=True))
    twice = run.window_of(run.data["train"], [5, 5, 7])
    draws = torch.cat([m["draw"] for m in twice]).tolist()
    assert len(set(draws)) == 3
    (one,), (again,) = run.window(0).micros, run.window(0).micros
    assert torch.equal(run.task.drawn(one)[1], run.task.drawn(again)[1])


# -- samplers against diffusers ---------------------------------------------------------------------------------------


def batch_of(run: Run, n: int = 3) -> Any:
    return run.data["test"].batch(list(run.data["test"].keep)[:n])


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_sampled_images_are_those_of_the_models_own_pipeline(run: Run, guidance: float) -> None:
    """Same noise, steps and scale through diffusers' pipeline, prompts, guidance, schedule and decoder included."""
    batch, task = batch_of(run), run.task
    run.model.eval()
    with torch.no_grad():
        mine = task.decode(task.sample(run.model, batch, steps=5, guidance=guidance)).clamp(0, 1)
        options = {} if task.domain == "diffusion" else {"max_sequence_length": 0}
        theirs = task.pipe(
            batch["prompt"], height=32, width=32, latents=task.start(batch), num_inference_steps=5, guidance_scale=guidance,
            output_type="pt", **options,
        ).images  # fmt: skip
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_ddim_steps_agree_with_diffusers(sd: Run, eta: float, kind: str, spacing: str) -> None:
    theirs = diffusers.DDIMScheduler.from_config(
        sd.task.pipe.scheduler.config, prediction_type=kind, timestep_spacing=spacing, set_alpha_to_one=spacing == "trailing"
    )
    theirs.set_timesteps(8)  # diffusers rounds the next step apart where steps do not divide 1000
    final = float(theirs.final_alpha_cumprod)
    chain = samplers.DDIM(theirs.timesteps, [float(sd.task.alphas[t]) for t in theirs.timesteps], final, kind)
    rng = torch.Generator().manual_seed(0)
    x = y = torch.randn(2, 8, 8, 8, generator=rng)
    for i, t in enumerate(theirs.timesteps):
        output, noise = (torch.randn(2, 8, 8, 8, generator=rng) for _ in range(2))
        mean, deviation = chain.step(output, x, i, eta)
        x = mean + deviation * noise
        y = theirs.step(output, t, y, eta=eta, variance_noise=noise).prev_sample
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


def test_euler_steps_agree_with_diffusers_and_noise_keeps_the_marginals() -> None:
    run = build(*SMALL_DIT, "method=full")
    chain = run.task.chain(6)
    theirs = diffusers.FlowMatchEulerDiscreteScheduler.from_config(run.task.pipe.scheduler.config)
    theirs.set_timesteps(6)
    rng = torch.Generator().manual_seed(0)
    x = y = torch.randn(2, 8, 8, 8, generator=rng)
    for i, t in enumerate(theirs.timesteps):
        output = torch.randn(2, 8, 8, 8, generator=rng)
        x, _ = chain.step(output, x, i)
        y = theirs.step(output, t, y).prev_sample
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
    # data N(0, 0.5^2): the exact velocity is linear, and the stochastic chain must end where the other does
    times = torch.linspace(1, 0, 201).tolist()
    fine = samplers.Euler(torch.tensor(times[:-1]), times)

    def velocity(x: torch.Tensor, level: torch.Tensor, i: int) -> torch.Tensor:
        t = times[i]
        return x * (t - (1 - t) * 0.25) / ((1 - t) ** 2 * 0.25 + t**2)

    start = torch.randn(20000, 1, generator=rng)
    for eta in (0.0, 0.7):
        end = samplers.run(fine, velocity, start, eta=eta, noise=lambda i: torch.randn(20000, 1, generator=rng))
        assert float(end.std()) == pytest.approx(0.5, abs=0.02)


def test_log_probabilities_are_those_of_the_normal() -> None:
    x, mean = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    wanted = torch.distributions.Normal(mean, 0.3).log_prob(x).flatten(1).mean(1)
    torch.testing.assert_close(samplers.log_prob(x, mean, 0.3), wanted)


def test_gradients_pass_the_last_steps_only_and_checkpoints_change_nothing(run: Run) -> None:
    batch, chain = batch_of(run, 2), run.task.chain(4)
    calls: list[bool] = []
    scale = torch.ones((), requires_grad=True)
    predict = run.task.predictor(run.model, run.task.given(batch), 1.0)

    def counted(x: torch.Tensor, level: torch.Tensor, i: int) -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        return scale * predict(x, level, i)

    results = {}
    for last, checkpointing in ((1, False), (2, False), (2, True), (4, False)):
        calls.clear()
        x = samplers.run(chain, counted, run.task.start(batch), gradient_steps=last, checkpointing=checkpointing)
        assert calls == [False] * (4 - last) + [True] * last
        (grad,) = torch.autograd.grad(x.square().mean(), scale)
        results[last, checkpointing] = x.detach(), grad
    assert all(torch.equal(x, results[1, False][0]) for x, _ in results.values())
    torch.testing.assert_close(results[2, False][1], results[2, True][1])
    assert not torch.isclose(results[1, False][1], results[4, False][1], rtol=1e-3)


# -- the run ----------------------------------------------------------------------------------------------------------


def test_full_and_lora_train_and_reload(run: Run, tmp_path: Path) -> None:
    for method in ("full", "lora"):
        small = SMALL[run.task.domain]
        tuned = train(*small, f"method={method}", "trainer.max_steps=3", folder=tmp_path / method)
        reopened = Run.open(tmp_path / method, data=True)
        found = reopened.evaluate("test")
        assert found == pytest.approx(tuned.evaluate("test"))
        assert {"loss", "exact", "count", "colour", "shape", "place", "reward/brightness"} <= set(found)
        pictures = sorted((tmp_path / method / "samples").iterdir())
        assert [p.name for p in pictures] == ["000000.png", "000003.png"]
        frozen = reopened.task.companions()
        assert len(frozen) == (2 if run.task.domain == "diffusion" else 3)
        assert not any(p.requires_grad for m in frozen for p in m.parameters())


def test_tuned_pipeline_is_written_as_the_hub_has_it(tmp_path: Path) -> None:
    from ftrecipes import export

    tuned = train(*SMALL_SD, "method=lora", "trainer.max_steps=3", "optimizer.lr=0.05", folder=tmp_path / "run")
    folder = export.merge(str(tmp_path / "run"))
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, torch_dtype=torch.float32)
    batch, task = batch_of(tuned), tuned.task
    with torch.no_grad():
        tuned.model.eval()
        mine = task.decode(task.sample(tuned.model, batch, steps=4, guidance=3.0)).clamp(0, 1)
        theirs = pipe(batch["prompt"], latents=task.start(batch), num_inference_steps=4, guidance_scale=3.0, output_type="pt").images
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)
    assert "StableDiffusionPipeline" in (folder / "README.md").read_text()


def test_gradient_checkpointing_changes_nothing(run: Run) -> None:
    grads = []
    for on in ("false", "true"):
        other = build(*SMALL[run.task.domain], "method=lora", f"hardware.checkpointing={on}")
        other.model.train()
        other.gradients(other.window(0))
        grads.append({name: p.grad for name, p in other.trainable().items()})
    assert any(g.abs().max() > 0 for g in grads[0].values())
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-4, atol=1e-6)


def test_roles_and_blocks(run: Run) -> None:
    roles = {part.role for part in run.anatomy.select(["attention"])}
    assert roles == {"q", "k", "v", "o"}
    everything = run.anatomy.select(["all-linear"])
    assert {"up", "down", "linear"} <= {part.role for part in everything}
    assert all(part.block is not None for part in everything)
    names = [name for name, _ in run.anatomy.blocks]
    if run.task.domain == "diffusion":
        assert names == ["down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1"]
    else:
        assert names == ["transformer_blocks.0", "transformer_blocks.1"]
        assert sum(p.name.endswith("to_add_out") for p in run.anatomy.select(["o"])) == 1  # the last block drops its text stream


# -- models by name ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("sd15", 859_520_964), ("sdxl", 2_567_463_684), ("sd3-medium", 2_028_328_000), ("flux", 11_901_408_320)],
)
def test_real_counterparts_have_their_sizes(name: str, parameters: int) -> None:
    run = Run(compose([f"model={name}", "method=lora"]))
    run.load_model(meta=True)
    assert sum(p.numel() for p in run.model.parameters()) == parameters
    run.prepare()
    attention = run.anatomy.select(["attention"])
    assert len(attention) > 100 and {p.role for p in attention} == {"q", "k", "v", "o"}


def clip(folder: Path, kind: str, width: int, number: str) -> None:
    """A small CLIP text encoder with the packaged tokenizer."""
    import shutil

    import transformers

    shutil.copytree(PACKAGED / "tiny-sd" / "tokenizer", folder / f"tokenizer{number}")
    known = transformers.CLIPTextConfig.from_pretrained(PACKAGED / "tiny-sd" / "text_encoder")
    known.update({"hidden_size": width, "intermediate_size": 2 * width, "projection_dim": width})
    getattr(transformers, kind)(known).save_pretrained(folder / f"text_encoder{number}")


def test_folder_of_sdxl_loads_and_samples_as_its_pipeline(tmp_path: Path) -> None:
    import shutil

    torch.manual_seed(0)
    clip(tmp_path, "CLIPTextModel", 32, "")
    clip(tmp_path, "CLIPTextModelWithProjection", 48, "_2")
    for part in ("vae", "scheduler"):
        shutil.copytree(PACKAGED / "tiny-sd" / part, tmp_path / part)
    diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=8, out_channels=8, cross_attention_dim=80, layers_per_block=1, block_out_channels=(16, 24),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2, norm_num_groups=8, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=48 + 6 * 8, use_linear_projection=True,
    ).save_pretrained(tmp_path / "unet")  # fmt: skip
    clips = {"text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection"}
    parts = {name: ["transformers", kind] for name, kind in {**clips, "tokenizer": "CLIPTokenizer", "tokenizer_2": "CLIPTokenizer"}.items()}
    parts |= {
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "DDIMScheduler"],
    }
    index = {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True, **parts}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    words = ("model=sdxl", f"model.path={tmp_path}", "model.sampling_steps=3", "data.size=8", "trainer.batch=4", "trainer.eval_examples=4")
    run = build(*words, "method=lora")
    batch, task = batch_of(run), run.task
    assert set(task.given(batch)) == {"context", "pooled"}
    with torch.no_grad():
        run.model.eval()
        mine = task.decode(task.sample(run.model, batch, steps=4, guidance=3.0)).clamp(0, 1)
        theirs = task.pipe(
            batch["prompt"], height=32, width=32, latents=task.start(batch), num_inference_steps=4, guidance_scale=3.0, output_type="pt"
        ).images
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)
    run.fit(2)
    assert run.step == 2


def test_folder_of_flux_loads_and_samples_as_its_pipeline(tmp_path: Path) -> None:
    import shutil

    import transformers

    torch.manual_seed(0)
    clip(tmp_path, "CLIPTextModel", 32, "")
    pieces = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        *((f"\u2581{w}", -2.0) for w in ("one", "two", "red", "star", "left")),
        ("\u2581", -3.0),
    ]
    transformers.T5Tokenizer(vocab=pieces).save_pretrained(tmp_path / "tokenizer_2")
    known = transformers.T5Config(vocab_size=200, d_model=40, d_ff=64, num_layers=1, num_heads=2, d_kv=20)
    transformers.T5EncoderModel(known).save_pretrained(tmp_path / "text_encoder_2")
    shutil.copytree(PACKAGED / "tiny-sd" / "vae", tmp_path / "vae")
    diffusers.FluxTransformer2DModel(
        in_channels=32, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=40,
        pooled_projection_dim=32, guidance_embeds=True, axes_dims_rope=(4, 6, 6),
    ).save_pretrained(tmp_path / "transformer")  # fmt: skip
    schedule = {"use_dynamic_shifting": True, "shift": 3.0, "base_shift": 0.5, "max_shift": 1.15}
    diffusers.FlowMatchEulerDiscreteScheduler(**schedule).save_pretrained(tmp_path / "scheduler")
    kinds = {
        "text_encoder": "CLIPTextModel",
        "text_encoder_2": "T5EncoderModel",
        "tokenizer": "CLIPTokenizer",
        "tokenizer_2": "T5Tokenizer",
    }
    parts = {name: ["transformers", kind] for name, kind in kinds.items()}
    own = {"transformer": "FluxTransformer2DModel", "vae": "AutoencoderKL", "scheduler": "FlowMatchEulerDiscreteScheduler"}
    parts |= {name: ["diffusers", kind] for name, kind in own.items()}
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline", **parts}))
    words = ("model=flux", f"model.path={tmp_path}", "model.resolution=32", "model.prompt_length=6", "model.sampling_steps=3")
    run = build(*words, "data.size=8", "trainer.batch=4", "trainer.eval_examples=4", "method=lora")
    batch, task = batch_of(run), run.task
    run.model.eval()
    level, latents = torch.tensor([0.3, 0.6, 0.9]), task.start(batch)
    with torch.no_grad():
        mine = task.network(run.model, latents, level, task.given(batch))
        packed = diffusers.FluxPipeline._pack_latents(latents, 3, 8, 8, 8)
        ids = diffusers.FluxPipeline._prepare_latent_image_ids(3, 4, 4, "cpu", torch.float32)
        context, pooled, text_ids = task.pipe.encode_prompt(batch["prompt"], None, max_sequence_length=6)
        theirs = run.model(
            hidden_states=packed, timestep=level, guidance=torch.full((3,), 3.5), pooled_projections=pooled,
            encoder_hidden_states=context, txt_ids=text_ids, img_ids=ids,
        ).sample  # fmt: skip
        torch.testing.assert_close(mine, diffusers.FluxPipeline._unpack_latents(theirs, 32, 32, 4), rtol=1e-4, atol=1e-5)
        images = task.decode(task.sample(run.model, batch, steps=4)).clamp(0, 1)
        assert images.shape == (3, 3, 32, 32) and torch.isfinite(images).all()
    run.fit(2)
    assert run.step == 2


def test_folders_that_cannot_be_loaded_say_why_in_one_line(tmp_path: Path) -> None:
    import shutil

    def refused(*words: str) -> str:
        with pytest.raises(UserError) as caught:
            build("model=sd15", f"model.path={tmp_path}", "data.size=8", *words)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "no model_index.json" in refused()
    shutil.copytree(PACKAGED / "tiny-dit", tmp_path, dirs_exist_ok=True)
    assert "StableDiffusion3Pipeline, which is for domain flow" in refused()
    (tmp_path / "model_index.json").write_text('{"_class_name": "KandinskyPipeline"}')
    assert "a KandinskyPipeline; supported are" in refused()
    shutil.copytree(PACKAGED / "tiny-sd", tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "vae")
    assert "vae" in refused("model.weights=random")
    with pytest.raises(UserError, match="random weights need its tokenizers"):
        build("model=sd15", "model.weights=random", "data.size=8")
    with pytest.raises(UserError, match=r"model.resolution=36: tiny-sd takes sides that are multiples of 8"):
        build(*SMALL_SD, "model.resolution=36")


def test_a_plan_counts_what_the_run_trains() -> None:
    for small in SMALL.values():
        words = (*small, "method=lora")
        run, planned = build(*words), plan(compose(words))
        assert planned.trainable == sum(p.numel() for p in run.trainable().values())
        assert planned.memory["further models"] == sum(4 * p.numel() for m in run.held for p in m.parameters())


def test_examples_that_do_not_fit_say_why(sd: Run) -> None:
    image = np.zeros((40, 24, 3), np.uint8)
    for example, why in (
        ({"image": image}, "needs `image` and `prompt`"),
        ({"image": image, "prompt": 3}, "a prompt must be text"),
        ({"image": image.astype(np.float32), "prompt": "a"}, "must hold bytes"),
    ):
        with pytest.raises(ValueError, match=why):
            sd.task.encode(example)
    batch = sd.task.collate([sd.task.encode({"image": image, "prompt": "a"})])
    assert batch["moments"].shape == (1, 16, 8, 8)


# -- rewards ----------------------------------------------------------------------------------------------------------


def test_rewards_say_what_they_say() -> None:
    images, prompts = drawn(scenes.KNOWN, 48)
    assert (rewards.asked(images, prompts) == 1).float().mean() > 0.95
    assert torch.allclose(rewards.brightness(images, prompts), images.mean((1, 2, 3)))
    red = torch.tensor([scenes.parse(p).colour == "red" for p in prompts])
    score = rewards.redness(images, prompts)
    assert score[red].mean() > score[~red].mean() + 0.02
    noise = torch.rand(8, 3, 32, 32)
    for name in ("smoothness", "compressibility"):
        assert rewards.scored(name, images, prompts).min() > rewards.scored(name, noise, prompts[:8]).max()
    for name, reward in rewards.REWARDS.items():
        x = images.clone().requires_grad_()
        assert rewards.scored(name, x, prompts).requires_grad == reward.differentiable


def test_a_reward_that_cannot_be_used_is_one_line() -> None:
    images, prompts = drawn(scenes.KNOWN, 4)
    registry.reward("shapeless")(lambda samples, examples: samples.mean())
    registry.reward("hollow")(lambda samples, examples: samples.mean((1, 2, 3)) * float("nan"))
    try:
        with pytest.raises(RunFailed, match=r"reward shapeless: gave \(\) for 4 images"):
            rewards.scored("shapeless", images, prompts)
        with pytest.raises(RunFailed, match="reward hollow: is not finite for 4 of 4"):
            rewards.scored("hollow", images, prompts)
    finally:
        for name in ("shapeless", "hollow"):
            registry._code.pop(("reward", name))
    with pytest.raises(UserError, match="unknown reward 'brightnes'"):
        build(*SMALL_SD, "method=draft", "method.draft.reward=brightnes")


def test_prompts_in_other_words_are_sampled_and_not_judged() -> None:
    image = np.zeros((32, 32, 3), np.uint8)

    @registry.data("photos")
    def photos(knobs: Any, domain: str) -> Splits:
        rows = [{"image": image, "prompt": f"a photo {i}"} for i in range(8)]
        return Splits(rows, rows, rows)

    run = build(*SMALL_SD[:5], "data=photos", "trainer.batch=4", "method=lora")
    found = run.evaluate("test")
    assert "exact" not in found and "reward/asked" not in found and "reward/brightness" in found
    assert picture(torch.zeros(10, 3, 32, 32)).size == (256, 64)
