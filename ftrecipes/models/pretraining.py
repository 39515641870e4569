"""Makes the packaged models: `python -m ftrecipes.models.pretraining tiny-llama`.

Builds tokenizer and architecture, pretrains by the committed recipe `recipes/pretrain/<name>.yaml` through the ordinary
run (so it can be killed and resumed), and writes the weights in bfloat16 with the loss that was reached.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from ftrecipes.catalogue import RECIPES
from ftrecipes.models.base import PACKAGED

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def tiny_llama(folder: Path) -> None:
    """Tokenizer (byte-level BPE, single digits) and architecture of tiny-llama."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    from ftrecipes.data import stories

    specials = ["<|pad|>", "<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    r = random.Random("tokenizer")
    texts = [stories.document(r) for _ in range(20_000)] + [stories.question(r)["prompt"] for _ in range(4000)]
    tokenizer.train_from_iterator(texts, trainer)
    begin = ("<|begin|>", tokenizer.token_to_id("<|begin|>"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[begin])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", bos_token="<|begin|>", eos_token="<|end|>", chat_template=CHAT_TEMPLATE
    )
    fast.save_pretrained(folder)
    LlamaConfig(
        vocab_size=len(fast), hidden_size=256, intermediate_size=640, num_hidden_layers=6, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=True,
        bos_token_id=fast.bos_token_id, eos_token_id=fast.eos_token_id, pad_token_id=fast.pad_token_id,
    ).save_pretrained(folder)  # fmt: skip


def tiny_vit(folder: Path) -> None:
    """Architecture of tiny-vit, and how its pixels are scaled."""
    from transformers import ViTConfig

    from ftrecipes.data.shapes import CLASSES, SIDE

    ViTConfig(
        hidden_size=96, intermediate_size=384, num_hidden_layers=6, num_attention_heads=3, image_size=SIDE, patch_size=4,
        layer_norm_eps=1e-6, initializer_range=0.05,
        architectures=["ViTForImageClassification"], id2label=dict(enumerate(CLASSES)), label2id={n: i for i, n in enumerate(CLASSES)},
    ).save_pretrained(folder)  # fmt: skip
    size = {"height": SIDE, "width": SIDE}
    scaling = {"image_processor_type": "ViTImageProcessor", "size": size, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(scaling, indent=1) + "\n")


def tiny_sd(folder: Path) -> None:
    """Autoencoder, text encoder and architecture of tiny-sd."""
    from ftrecipes.models import pretraining_images

    pretraining_images.tiny_sd(folder)


def tiny_dit(folder: Path) -> None:
    """Architecture of tiny-dit around the autoencoder and text encoder of tiny-sd."""
    from ftrecipes.models import pretraining_images

    pretraining_images.tiny_dit(folder)


SHAPES = {"tiny-llama": tiny_llama, "tiny-vit": tiny_vit, "tiny-sd": tiny_sd, "tiny-dit": tiny_dit}


def make(name: str, words: list[str]) -> dict[str, Any]:
    """Pretrain one model and, when all is done, put it in the place of the packaged one; further words are overrides."""
    from ftrecipes.compose import compose
    from ftrecipes.record import Record
    from ftrecipes.report.console import Console
    from ftrecipes.run import Run, quiet

    quiet()
    start = Path("outputs") / "pretraining" / name
    start.mkdir(parents=True, exist_ok=True)
    SHAPES[name](start)
    recipe = f"pretrain/{name.replace('-', '_')}"
    settings = compose([f"recipe={recipe}", f"model.path={start}", *words])
    record = Record(start.with_name(f"{name}-{settings.hash}"))
    record.lock()
    run = Run(settings, record, Console())
    results = run.train()
    model = run.merge().to(torch.bfloat16)
    finished = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=PACKAGED))
    shutil.copytree(start, finished, dirs_exist_ok=True)
    model.save_pretrained(finished / run.task.part, max_shard_size="1GB")  # type: ignore[operator]
    summary = {
        "recipe": str((RECIPES / f"{recipe}.yaml").relative_to(RECIPES.parent)),
        "overrides": words,
        "seed": settings.seed,
        "steps": results["steps"],
        "parameters": results["total"],
        "before": results["before"],
        "after": results["after"],
        "seconds": record.info["seconds"],
    }
    (finished / "recipe.json").write_text(json.dumps(summary, indent=1) + "\n")
    for file in finished.rglob("*"):
        file.chmod(0o755 if file.is_dir() else 0o644)
    finished.chmod(0o755)
    shutil.rmtree(PACKAGED / name, ignore_errors=True)
    finished.replace(PACKAGED / name)
    return summary


if __name__ == "__main__":
    print(json.dumps(make(sys.argv[1], sys.argv[2:]), indent=1))
