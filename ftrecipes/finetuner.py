"""The Lightning module: one training step is one update of a whole window, and the methods take part in it.

Optimization is manual. An item of the loader is a window, so no kill, log or checkpoint can fall inside an update, and
the counted units of the window are known before the first backward pass.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from ftrecipes.record import INTERRUPTED
from ftrecipes.update import Window

if TYPE_CHECKING:
    from ftrecipes.run import Run


class FineTuner(pl.LightningModule):
    """A run's model under its stack of methods."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.run = run
        self.model = run.model

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if self.run.stopping else None

    def training_step(self, window: Window, step: int) -> None:
        run = self.run
        window.micros = [run.stack.batch(run, run.move(batch)) for batch in window]
        run.update(window)
        run.finish_window(window)
        run.after_update()

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        return batch  # a micro-batch is moved when it is needed

    def configure_optimizers(self) -> None:
        return None


class Windows(TorchDataset[Window]):
    """The windows of a fit that are still to come."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.first = run.step
        self.count = run.fit_steps - run.fit_step

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Window:
        return self.run.window(self.first + index)


def train(run: Run) -> None:
    """Train a run through the rest of its current fit: every fit has a trainer of its own."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)  # its import sets it to INFO
    loader: DataLoader[Window] = DataLoader(Windows(run), batch_size=None, shuffle=False)
    accelerator = {"cuda": "gpu"}.get(run.device.type, run.device.type)
    trainer = pl.Trainer(
        accelerator=accelerator,
        devices=run.settings.hardware.devices,
        num_nodes=run.settings.hardware.nodes,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        barebones=False,
        num_sanity_val_steps=0,
    )
    if run.stopping != INTERRUPTED:
        trainer.fit(FineTuner(run), loader)
