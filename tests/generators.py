"""What tests of image generators share: small denoisers around the packaged autoencoder and text encoder."""

from __future__ import annotations

SMALL_SD = (
    "model=tiny-sd",
    "model.weights=random",
    "model.architecture={block_out_channels:[16,24]}",
    "model.images=4",
    "model.sampling_steps=3",
    "data.size=24",
    "trainer.batch=4",
    "trainer.eval_examples=8",
)
SMALL_DIT = (
    "model=tiny-dit",
    "model.weights=random",
    "model.architecture={num_layers:2,attention_head_dim:8,caption_projection_dim:32}",
    *SMALL_SD[3:],
)
