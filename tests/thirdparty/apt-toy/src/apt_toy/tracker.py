"""A run's losses in one line of text, as bars: `loss.txt` in its folder, made anew at the end of each process."""

import math

from apt.core.providers.tracker import TrackerProvider

BARS = "▁▂▃▄▅▆▇█"


class Sparkline(TrackerProvider):
    """The training loss of all records as bars, from the lowest to the highest."""

    def __init__(self, config=None):
        super().__init__(config)
        self._losses, self._run_dir = {}, None

    def get_name(self):
        return "toy_spark"

    def get_version(self):
        return "0.1.0"

    def start(self, run_dir, config, step):
        self._run_dir = run_dir

    def log(self, record):
        if record.get("event") == "train":
            self._losses[record["step"]] = record["loss"]

    def finish(self):
        losses = [loss for loss in self._losses.values() if math.isfinite(loss)]
        if self._run_dir is not None and losses:
            low, span = min(losses), max(losses) - min(losses) or 1
            bars = "".join(BARS[round((loss - low) / span * (len(BARS) - 1))] for loss in losses)
            (self._run_dir / "loss.txt").write_text(f"{bars} {losses[0]:.3f} to {losses[-1]:.3f}\n", encoding="utf-8")
