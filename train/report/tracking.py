"""Where a run's numbers go: metrics.jsonl, a tracker of Accelerate, and a progress bar or lines of a log."""

from __future__ import annotations

import importlib.util
import json
import logging
import re
import sys
import uuid
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from shards import UsageError, UserError, printable_text, replace_atomically
from train.distributed import Team
from train.report.metrics_file import read_metrics
from train.report.run_page import write_run_page

logger = logging.getLogger(__name__)

_LONGEST_ID = 128
"""Characters of the id of a W&B run."""


def resolve_tracker(asked: str) -> str:
    """Return the tracker to use: "auto" is TensorBoard if it is installed.

    Raises:
        UsageError: the tracker that was asked for is not installed.
    """
    if asked == "auto":
        return "tensorboard" if importlib.util.find_spec("tensorboard") else "none"
    if asked != "none" and importlib.util.find_spec(asked) is None:
        raise UsageError(f"--tracker {asked} needs the package {asked}: pip install {asked}")
    return asked


def wandb_run(out: Path) -> dict[str, str]:
    """Return the arguments by which W&B recognises a continued run, and the place of its files.

    Raises:
        UserError: the file with the run's id holds something else.
    """
    kept = out / "wandb-id"
    if not kept.is_file():
        replace_atomically(kept, uuid.uuid4().hex.encode())
    with kept.open("rb") as file:
        name = file.read(_LONGEST_ID + 1)
    if not re.fullmatch(rb"[\w-]{1,%d}" % _LONGEST_ID, name):
        raise UserError(f"{kept} does not hold the id of a W&B run; remove it to begin another W&B run")
    return {"dir": str(out), "name": out.name, "id": name.decode(), "resume": "allow"}


class Journal:
    """Where a run's numbers go: on the leading process to a file, a bar and a tracker; elsewhere nowhere."""

    def __init__(
        self,
        team: Team,
        out: Path,
        *,
        step: int,
        max_steps: int,
        settings: dict[str, Any],
        tracker: str,
        facts: list[str],
    ) -> None:
        """Open the journal at `step`; lines of a killed run that came after it are dropped.

        Args:
            team: the processes.
            out: the run's directory.
            step: steps already taken.
            max_steps: steps the run ends at.
            settings: flat settings for the tracker.
            tracker: "tensorboard", "wandb" or "none".
            facts: lines about what is trained, for the person who watches and the run's page.
        """
        self._team, self._out, self._tracked, self._facts = team, out, tracker != "none", facts
        self._path = out / "metrics.jsonl"
        if team.is_main_process:
            kept = [line for line in read_metrics(self._path) if line["step"] <= step]
            replace_atomically(self._path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        if self._tracked:
            team.accelerator.init_trackers(
                "rae-latents" if tracker == "wandb" else out.name,
                config=settings,
                init_kwargs={"wandb": wandb_run(out)} if tracker == "wandb" and team.is_main_process else {},
            )
        if team.is_main_process:
            sys.stderr.writelines(f"{printable_text(line)}\n" for line in facts)
        # In a file the strokes of a bar would be one endless line; there, `record` writes lines instead.
        self._max_steps, self._has_bar = max_steps, team.is_main_process and sys.stderr.isatty()
        self._bar = tqdm(
            total=max_steps,
            initial=step,
            unit="step",
            disable=not self._has_bar,
            dynamic_ncols=True,
            smoothing=0.05,
        )

    def advance(self) -> None:
        """Count one more step."""
        self._bar.update()

    def record(self, step: int, metrics: dict[str, Any]) -> None:
        """Write one line of what training measured."""
        self._write(step, metrics)
        loss = "none" if metrics["loss"] is None else f"{metrics['loss']:.4f}"
        status = (
            f"loss {loss}, {metrics['images_per_second']:.1f} images/s, "
            f"data wait {100 * metrics['data_wait']:.1f} %"
        )
        if self._has_bar:
            self._bar.set_postfix_str(status)
        else:
            left = tqdm.format_interval((self._max_steps - step) * metrics["step_seconds"])
            self.log(f"step {step} of {self._max_steps}: {status}, {left} left")

    def record_scores(self, step: int, scores: dict[str, float]) -> None:
        """Write one line of what the averaged weights reach on images that are not trained on."""
        self._write(step, scores)
        self.log(f"step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in scores.items()))

    def _write(self, step: int, numbers: dict[str, Any]) -> None:
        if not self._team.is_main_process:
            return
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, **numbers}) + "\n")
        if self._tracked:
            self._team.accelerator.log({k: v for k, v in numbers.items() if v is not None}, step=step)

    def log(self, text: str) -> None:
        """Return a line for the person who watches; what a terminal would act on is escaped."""
        text = printable_text(text)
        if self._has_bar:
            self._bar.write(text, file=sys.stderr)
        elif self._team.is_main_process:
            sys.stderr.write(f"{text}\n")

    def log_image(self, step: int, path: Path) -> None:
        """Hand an image to the tracker."""
        if not (self._team.is_main_process and self._tracked):
            return
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
        for tracker in self._team.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.log_images({"samples": pixels[None]}, step=step, dataformats="NHWC")
            else:
                tracker.log_images({"samples": [pixels]}, step=step)

    def write_page(self) -> None:
        """Write the run's page."""
        if self._team.is_main_process:
            write_run_page(self._out, title=self._out.name, facts=self._facts)

    def close(self) -> None:
        """Finish the progress bar."""
        self._bar.close()
