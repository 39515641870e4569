"""Images: the drawn data, the classification task, the packaged ViT, and loading of folders in the hub's format."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tools import SMALL_VIT, build, train, weights

from ftrecipes.anatomy import Anatomy
from ftrecipes.compose import compose
from ftrecipes.data import shapes
from ftrecipes.data.base import Dataset, Splits
from ftrecipes.errors import UserError
from ftrecipes.models.base import PACKAGED
from ftrecipes.plan import plan
from ftrecipes.registry import data as register_data
from ftrecipes.run import Run
from ftrecipes.tasks.classification import ImageClassification

METHODS = ["full", "linear_probe", "lora", "dora", "svft", "lift", "gmt", "mezo", "lisa", "wise_ft", "periodic_lora"]


# -- drawing ----------------------------------------------------------------------------------------------------------


def test_images_are_a_pure_function_of_split_and_index() -> None:
    many, one = shapes.Images("shifted", "train", 50), shapes.Images("shifted", "train", 4000, keep=False)
    alone = one[7]
    for i in range(50):
        many[i]
    again = many[7]
    assert again is many[7]
    assert again["scene"] == alone["scene"] and again["label"] == alone["label"]
    np.testing.assert_array_equal(again["image"], alone["image"])
    assert not np.array_equal(alone["image"], one[7 + len(shapes.CLASSES)]["image"])


def saliency(image: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """How colourful each pixel is, and its colour without the grey, from the bytes alone."""
    pixels = image.reshape(-1, 3) / 255
    tint = pixels - pixels.min(1, keepdims=True)
    return tint.max(1), tint


@pytest.mark.parametrize("domain", ["clean", "shifted"])
def test_labels_can_be_read_off_the_pixels(domain: str) -> None:
    """Of all shapes in the described place the labelled one fits the coloured pixels best, and its hue is nearest."""
    hues = np.array([shapes.rgb(hue, 1.0, 1.0) for hue in shapes.COLOURS.values()])
    for example in (shapes.Images(domain, "proof", 512)[i] for i in range(512)):
        (thing,) = example["scene"].things
        colourful, tint = saliency(example["image"])
        others = [dataclasses.replace(thing, shape=name) for name in shapes.SHAPES]
        fit = [np.corrcoef(colourful, shapes.coverage(other))[0, 1] for other in others]
        seen = (tint * shapes.coverage(thing)[:, None]).sum(0)
        colour = int((hues @ seen / np.linalg.norm(hues, axis=1)).argmax())
        name = f"{list(shapes.COLOURS)[colour]} {list(shapes.SHAPES)[int(np.argmax(fit))]}"
        assert name == thing.name == shapes.CLASSES[example["label"]]


@pytest.mark.parametrize("domain", ["clean", "shifted"])
def test_things_are_where_the_description_says_and_whole(domain: str) -> None:
    for i in range(256):
        scene = shapes.scene(domain, "proof", i)
        (thing,) = scene.things
        changed = (shapes.render(scene) != shapes.render(dataclasses.replace(scene, things=()))).any(-1)
        y, x = (np.nonzero(changed)[axis] + 0.5 for axis in (0, 1))
        away = np.hypot(x / shapes.SIDE - thing.x, y / shapes.SIDE - thing.y).max()
        assert 0.6 * thing.size < away < 1.13 * thing.size + 1 / shapes.SIDE
        inside = shapes.distance(thing).reshape(shapes.SIDE, shapes.SIDE) < -0.5
        edge = np.concatenate([inside[0], inside[-1], inside[:, 0], inside[:, -1]])
        assert inside.any() and not edge.any()


def test_area_of_a_drawn_polygon_is_exact() -> None:
    """Coverage adds up to the polygon's area, at any angle."""
    for name, corners in shapes.SHAPES.items():
        x, y = corners.T
        area = abs((x * np.roll(y, -1) - y * np.roll(x, -1)).sum()) / 2
        thing = shapes.Thing(name, "red", 0.5, 0.5, 0.4, 0.7, (1.0, 0.0, 0.0))
        assert shapes.coverage(thing, 128).sum() / 128**2 == pytest.approx(area * 0.4**2, rel=0.01)


def test_captions() -> None:
    thing = shapes.Thing("star", "red", 0.2, 0.8, 0.2, 0.0, (1.0, 0.0, 0.0))
    other = shapes.Thing("heart", "blue", 0.5, 0.5, 0.35, 0.0, (0.0, 0.0, 1.0))
    scene = shapes.Scene((thing, other), "plain", ((1.0, 1.0, 1.0), (1.0, 1.0, 1.0)))
    assert scene.caption() == "a small red star at the bottom left and a large blue heart at the centre"
    assert len(np.unique(shapes.render(scene).reshape(-1, 3), axis=0)) > 2


def test_no_image_is_in_two_splits() -> None:
    knobs = {"size": 4000}
    splits = shapes.build(knobs, "vit")
    seen: dict[bytes, str] = {}
    for name in ("train", "validation", "test", "retain"):
        for example in getattr(splits, name):
            key = example["image"].tobytes()
            assert key not in seen, (name, seen[key])
            seen[key] = name
    clean = shapes.pretraining({"size": 2000}, "vit")
    held_out = {example["image"].tobytes() for part in (clean.validation, clean.test) for example in part}
    assert held_out.isdisjoint(example["image"].tobytes() for example in clean.train)
    assert len(seen) == 5500 and len(held_out) == 1000


# -- the task ---------------------------------------------------------------------------------------------------------


def task(**changes: Any) -> ImageClassification:
    options: dict[str, Any] = {"size": (32, 32), "mean": [0.5] * 3, "std": [0.25] * 3, "mode": "bilinear", "positions": 65}
    return ImageClassification(["a", "b"], **{**options, **changes})


def test_pixels_are_scaled_by_channel() -> None:
    image = np.zeros((32, 32, 3), np.uint8)
    image[..., 1], image[..., 2] = 255, 51
    few = task(mean=[0.5, 0.25, 0.2], std=[0.5, 0.25, 0.1])
    batch = few.collate([few.encode({"image": image, "label": "b"})])
    torch.testing.assert_close(batch["pixels"].mean((0, 2, 3)), torch.tensor([-1.0, 3.0, 0.0]))
    assert batch["labels"].tolist() == [1]


def test_grey_and_pil_images_and_other_sizes() -> None:
    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    photo = image.fromarray(rng.integers(0, 256, (70, 50, 3), dtype=np.uint8))
    for mode, number in (("bilinear", 2), ("bicubic", 3)):
        some = task(mean=[0.0] * 3, std=[1.0] * 3, mode=mode)
        encoded = [some.encode({"image": x, "label": 0}) for x in (photo, np.full((32, 32), 7, np.uint8))]
        pixels = some.collate(encoded)["pixels"] * 255
        wanted = np.asarray(photo.resize((32, 32), number)).astype(np.float32)
        assert (pixels[0].permute(1, 2, 0) - torch.tensor(wanted)).abs().max() <= 1
        assert (pixels[1] - 7).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("example", "words"),
    [
        ({"image": np.zeros((8, 8, 3), np.uint8)}, "needs `image` and `label`"),
        ({"image": np.zeros((8, 8, 3), np.float32), "label": 0}, "must hold bytes"),
        ({"image": np.zeros((8, 8, 4), np.uint8), "label": 0}, "3 channels, this one has 4"),
        ({"image": np.zeros((8, 8, 3), np.uint8), "label": 2}, "label 2 is none of the model's 2 classes"),
        ({"image": np.zeros((8, 8, 3), np.uint8), "label": "c"}, "label 'c' is none"),
        ({"image": np.zeros((8, 8, 3), np.uint8), "label": None}, "label None is none"),
    ],
)
def test_an_example_that_does_not_fit_says_why(example: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        task().encode(example)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="the train set is empty"):
        Dataset("train", [example], task()).prepare()


@pytest.mark.parametrize(
    "words", [("model=tiny-vit", "data=storyqa"), ("model=tiny-llama", "data=shapes"), ("model=tiny-vit", "method=dft")]
)
def test_what_is_for_another_domain_is_refused(words: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as caught:
        compose(words)
    assert "\n" not in str(caught.value) and "vit" in str(caught.value)


def test_accuracy_and_nll_equal_a_loop_over_images() -> None:
    run = build("model=tiny-vit", "data.size=64", "trainer.eval_examples=90")
    right, nll = 0, 0.0
    run.model.eval()
    for position in run.data["test"].keep:
        example = run.data["test"].raw[position]
        pixels = torch.tensor(example["image"]).permute(2, 0, 1)[None] / 255 * 2 - 1
        with torch.no_grad():
            logits = run.model(pixel_values=pixels).logits[0]
        right += int(logits.argmax() == example["label"])
        nll -= float(logits.log_softmax(-1)[example["label"]])
    found = run.evaluate("test")
    assert found["accuracy"] == pytest.approx(right / 90)
    assert found["nll"] == pytest.approx(nll / 90, rel=1e-5)


def test_the_split_into_micro_batches_does_not_change_the_gradient() -> None:
    found = []
    for micro in ("auto", 3):
        run = build(*SMALL_VIT, "method=full", f"hardware.micro_batch={micro}")
        window = run.window(0)
        run.gradients(window)
        found.append((len(window), {n: p.grad.clone() for n, p in run.trainable().items() if p.grad is not None}))
    (few, whole), (several, parts) = found
    assert (few, several) == (1, 3) and whole.keys() == parts.keys()
    for name in whole:
        torch.testing.assert_close(whole[name], parts[name], rtol=1e-4, atol=1e-7)


# -- the packaged model -----------------------------------------------------------------------------------------------


def test_packaged_weights_know_the_clean_domain_and_not_the_shifted_one() -> None:
    chance = 1 / len(shapes.CLASSES)
    words = ("data.size=64", "trainer.eval_examples=320")
    run = build("model=tiny-vit", "data=shapes-clean", *words)
    clean = run.evaluate("test")
    random = build("model=tiny-vit", "data=shapes-clean", "model.weights=random", *words).evaluate("test")
    shifted = build("model=tiny-vit", *words).evaluate("test")
    assert clean["accuracy"] > 0.9 and random["accuracy"] < 3 * chance
    assert clean["nll"] < 0.15 * random["nll"]
    assert 5 * chance < shifted["accuracy"] < clean["accuracy"] - 0.2
    packaged = list(run.pristine().parameters())
    assert {p.dtype for p in packaged} == {torch.float32}
    assert all(torch.equal(p, p.bfloat16().float()) for p in packaged)
    said = json.loads((PACKAGED / "tiny-vit" / "recipe.json").read_text())
    assert clean["accuracy"] == pytest.approx(said["after"]["test"]["accuracy"], abs=0.03)
    assert (PACKAGED / "tiny-vit" / "model.safetensors").stat().st_size < 2.5e6


def test_samples_show_scene_wanted_and_answer() -> None:
    run = build("model=tiny-vit", "data=shapes-clean", "data.size=64")
    with run.evaluating():
        shown = run.task.samples(run, [run.data["test"].raw[i] for i in range(20)])
    assert sum(s["wanted"] == s["answer"] for s in shown) > 15
    assert all(s["wanted"] in s["prompt"] for s in shown)


def test_roles_of_a_vit() -> None:
    run = build(*SMALL_VIT, data=False)
    anatomy = Anatomy(run.model)
    roles = {
        part.name.replace(f"{anatomy.blocks[part.block][0]}.", "") if part.block is not None else part.name: part.role
        for part in anatomy.parts
    }
    assert len(anatomy.blocks) == 3
    assert sorted(roles.values()) == sorted(["q", "k", "v", "o", "up", "down", "norm", "norm", "norm", "embed", "head"])
    assert roles["classifier"] == "head" and roles["vit.embeddings.patch_embeddings.projection"] == "embed"
    assert all({part.role for part in anatomy.select(["all-linear"], [depth])} == {"q", "k", "v", "o", "up", "down"} for depth in range(3))


@pytest.mark.parametrize("method", METHODS)
def test_methods_train_it(method: str, tmp_path: Path) -> None:
    run = train(*SMALL_VIT, f"method={method}", "trainer.max_steps=4", folder=tmp_path / "run")
    assert run.step == 4
    reopened = Run.open(tmp_path / "run", data=True)
    assert reopened.evaluate("test") == pytest.approx(run.evaluate("test"))
    start = run.pristine()
    merged = run.merge().state_dict()
    assert any(not torch.equal(value, merged[name]) for name, value in start.state_dict().items())


# -- folders in the hub's format --------------------------------------------------------------------------------------


def saved(folder: Path, *, head: bool = True, classes: int = 32, shard: str = "20KB", **changes: Any) -> Any:
    """A small ViT with random weights in a folder as the hub has them."""
    from transformers import ViTConfig, ViTForImageClassification, ViTModel

    shape = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = ViTConfig(**{**shape, "image_size": 32, "patch_size": 8, "num_labels": classes, **changes})
    torch.manual_seed(0)
    model = ViTForImageClassification(config) if head else ViTModel(config)
    model.save_pretrained(folder, max_shard_size=shard)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.4] * 3, "image_std": [0.2] * 3, "resample": 3}))
    return model.eval()


def load(folder: Path, *words: str, model: str = "vit-b16") -> Run:
    return build(f"model={model}", f"model.path={folder}", "data.size=64", "trainer.max_steps=2", *words)


def test_a_sharded_folder_loads_exactly(tmp_path: Path) -> None:
    source = saved(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    run = load(tmp_path)
    batch = run.data["train"].batch(range(8))
    with torch.no_grad():
        logits = run.task.outputs(run.model.eval(), batch).logits
        torch.testing.assert_close(logits, source(pixel_values=batch["pixels"]).logits)
    raw = torch.tensor(np.stack([run.data["train"].raw[i]["image"] for i in range(8)])).permute(0, 3, 1, 2) / 255
    torch.testing.assert_close(batch["pixels"], (raw - 0.4) / 0.2)
    assert run.task.mode == "bicubic" and not run.loaded.fresh


def test_a_bfloat16_folder_keeps_its_dtype_and_trains_in_float32(tmp_path: Path) -> None:
    saved(tmp_path)
    run = load(tmp_path, "model.dtype=bfloat16", "method=lora")
    assert run.model.vit.layernorm.weight.dtype == torch.bfloat16
    assert {p.dtype for p in run.trainable().values()} == {torch.float32}


@pytest.mark.parametrize(("head", "classes", "said"), [(True, 10, "the model's own is for 10"), (False, 2, "the model has none")])
def test_a_new_head_is_said_and_trains_whatever_freezes_the_model(tmp_path: Path, head: bool, classes: int, said: str) -> None:
    saved(tmp_path / "base", head=head, classes=classes)
    run = load(tmp_path / "base", "method=lora")
    assert run.loaded.notes == [f"a new head for 32 classes starts at random and trains ({said})"]
    assert run.loaded.fresh == {"classifier.weight", "classifier.bias"} <= set(run.trainable())
    assert all(name in run.loaded.fresh or "delta" in name for name in run.trainable())
    again, other = load(tmp_path / "base", "method=lora"), load(tmp_path / "base", "method=lora", "seed=1")
    assert torch.equal(run.model.classifier.weight, again.model.classifier.weight)
    assert not torch.equal(run.model.classifier.weight, other.model.classifier.weight)
    assert run.pristine().get_parameter("classifier.weight").equal(run.model.classifier.weight)
    plain = load(tmp_path / "base", "method=full").model.state_dict()

    tuned = train(
        "model=vit-b16", f"model.path={tmp_path / 'base'}", "data.size=64", "trainer.max_steps=2", "method=lora", folder=tmp_path / "run"
    )
    reopened = weights(Run.open(tmp_path / "run"))
    for name, value in weights(tuned).items():
        assert torch.equal(reopened[name], value)
        assert name not in plain or torch.equal(plain[name], value) != (name in run.loaded.fresh)


def test_a_plan_counts_what_the_run_trains(tmp_path: Path) -> None:
    saved(tmp_path / "other", classes=10)
    saved(tmp_path / "same", classes=32)
    for name in ("other", "same"):
        words = ("model=vit-b16", "method=lora", f"model.path={tmp_path / name}", "data.size=64")
        run, planned = build(*words), plan(compose(words))
        assert planned.trainable == sum(p.numel() for p in run.trainable().values())
        assert planned.roles["head"][0] == (24 * 32 + 32 if name == "other" else 0)
        assert planned.length == len(run.model.vit(run.task.blank(1, 0)["pixels"]).last_hidden_state[0])
    assert plan(compose(["model=vit-b16", "method=lora"])).roles["head"] == (768 * 32 + 32,) * 2


def test_gradient_checkpointing_changes_nothing() -> None:
    grads = []
    for on in ("false", "true"):
        run = build(*SMALL_VIT, "method=lora", f"hardware.checkpointing={on}")
        run.model.train()
        run.gradients(run.window(0))
        grads.append({name: p.grad for name, p in run.trainable().items()})
    assert any(g.abs().max() > 0 for g in grads[0].values())
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name])


def test_folders_that_cannot_be_loaded_say_why_in_one_line(tmp_path: Path) -> None:
    def refused(name: str) -> str:
        with pytest.raises(UserError) as caught:
            load(tmp_path / name)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    saved(tmp_path / "shard")
    next((tmp_path / "shard").glob("*-00002-*")).unlink()
    assert "is named in model.safetensors.index.json and missing" in refused("shard")

    saved(tmp_path / "cut", shard="1GB")
    whole = (tmp_path / "cut" / "model.safetensors").read_bytes()
    (tmp_path / "cut" / "model.safetensors").write_bytes(whole[:-100])
    assert "not a whole safetensors file" in refused("cut")

    saved(tmp_path / "wide")
    config = json.loads((tmp_path / "wide" / "config.json").read_text())
    (tmp_path / "wide" / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    assert "of another shape" in refused("wide")

    saved(tmp_path / "pixels")
    (tmp_path / "pixels" / "preprocessor_config.json").write_text('{"image_mean": [0.5]}')
    assert "image_mean and image_std must have 3 numbers each" in refused("pixels")


def test_without_named_classes_and_head_nothing_is_guessed(tmp_path: Path) -> None:
    @register_data("unnamed-images")
    def unnamed(knobs: Any, domain: str) -> Splits:
        rows = [{"image": np.zeros((32, 32, 3), np.uint8), "label": i % 2} for i in range(8)]
        return Splits(rows, rows, rows)

    saved(tmp_path, head=False)
    with pytest.raises(UserError, match="names no classes"):
        build("model=vit-b16", f"model.path={tmp_path}", "data=unnamed-images")
