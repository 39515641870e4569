"""Where metrics go besides the record: Weights & Biases, when it was asked for."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ftrecipes.run import Run


def loggers(run: Run) -> list[Any]:
    """The loggers of a run by its settings."""
    return [WandB(run)] if run.settings.logger.name == "wandb" else []


class WandB:
    """A W&B run with the same config and metrics as the record.

    Its id is derived from the record's folder, so that a resumed run goes on in the same W&B run. Without a key it
    is kept offline in the record, to be sent later with `wandb sync`. W&B being unreachable never stops a run.
    """

    def __init__(self, run: Run) -> None:
        import wandb

        from ftrecipes.rng import derive

        assert run.record
        knobs = run.settings.logger
        key = os.environ.get("WANDB_API_KEY") or _netrc_key()
        mode: Any = knobs.mode if knobs.mode != "auto" else "online" if key else "offline"
        methods = "+".join(run.settings.method)
        os.environ.setdefault("WANDB_SILENT", "true")
        self.run = wandb.init(
            project=knobs.project,
            entity=knobs.entity,
            dir=run.record.folder,
            id=f"{derive(str(run.record.folder.resolve())):x}"[:12],
            resume="allow" if mode == "online" else None,
            name=f"{methods} {run.settings.model.name} s{run.settings.seed}",
            group=f"{run.settings.model.name}/{run.settings.data.name}",
            job_type=methods,
            tags=[*run.settings.method, run.settings.model.name, run.settings.data.name, *run.settings.tags],
            config=dict(run.settings.values),
            mode=mode,
            settings=wandb.Settings(console="off", x_disable_stats=True),
        )

    def row(self, row: dict[str, Any]) -> None:
        self.run.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])

    def close(self, status: str) -> None:
        self.run.summary["status"] = status
        self.run.finish(exit_code=0 if status == "done" else 1)


def _netrc_key() -> bool:
    import netrc

    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False
