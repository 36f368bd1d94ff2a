"""Child process of the kill test: imports once, then forks one short life of a run after the other and kills it.

Usage: kill_child.py FOLDER KILLS SEED. Prints one json object: how often a life was killed, the folder of every run
that came to its end, and the newest checkpoint at every kill.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import warnings
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import sklearn.metrics
import tiny
import torch

from ptengine.training import trainer

torch.set_num_threads(1)
warnings.simplefilter("ignore", DeprecationWarning)
trainer.draw_curve = lambda path, *_: path  # type: ignore[attr-defined]
assert sklearn.metrics


def _live(folder: Path) -> int:
    """Run to the end in a process of its own; returns that process."""
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        model = tiny.gpt2()
        result = tiny.trainer(
            folder, model, tiny.prefix(model, projection=True, projection_size=8), evaluation=tiny.rows(6, 1),
            max_steps=60, save_steps=4, eval_strategy="steps", eval_steps=7, gradient_accumulation_steps=2,
            save_total_limit=3, lr_scheduler_type="cosine", warmup_steps=5, metric_for_best_model="loss",
        ).fit(resume=True)  # fmt: skip
        (folder / "result.json").write_text(
            json.dumps({"losses": result.losses, "evaluations": result.evaluations, "best": result.best})
        )
        status = 0
    finally:
        os._exit(status)


def main(root: Path, kills: int, seed: int) -> None:
    draw = random.Random(seed)
    begun = time.monotonic()
    assert os.waitstatus_to_exitcode(os.waitpid(_live(root / "whole"), 0)[1]) == 0
    longest = time.monotonic() - begun
    done, runs, finished, progress = 0, 0, [], []
    while True:
        folder = root / f"cut-{runs}"
        process = _live(folder)
        if done < kills:
            time.sleep(draw.uniform(0, longest))
            os.kill(process, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        if code == -signal.SIGKILL:
            done += 1
            progress.append(max([int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*")], default=0))
            continue
        assert code == 0, f"a life in {folder} ended with {code}"
        finished.append(folder.name)
        runs += 1
        if done == kills:
            break
    print(json.dumps({"kills": done, "finished": finished, "progress": progress}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
