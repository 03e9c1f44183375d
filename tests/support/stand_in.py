"""Stands in for save_jax.main where a test is about launching: same flags, files and exit codes.

It "trains" for config.steps steps of STAND_IN_PAUSE seconds, with a checkpoint after each. Seed 1
takes five times as long, seed 13 breaks down. `log.txt` shows what it was given.
"""

import json
import os
import pathlib
import signal
import sys
import time


def main(arguments: list[str]) -> int:
    values = dict(argument.removeprefix("--").split("=", 1) for argument in arguments)
    workdir = pathlib.Path(values["workdir"])
    steps, seed = int(values.get("config.steps", 5)), int(values.get("config.seed", 0))
    rate = float(values.get("config.optimizer.new", 0))
    stop = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
    (workdir / "checkpoints").mkdir(parents=True, exist_ok=True)
    config = {"steps": steps, "epochs": 1, "seed": seed, "optimizer": {"new": rate}}
    (workdir / "config.json").write_text(json.dumps(config))
    done = max((int(p.name) for p in (workdir / "checkpoints").iterdir()), default=0)
    print("devices", os.environ.get("CUDA_VISIBLE_DEVICES"), "first", done + 1, flush=True)
    for step in range(done + 1, steps + 1):
        time.sleep(float(os.environ.get("STAND_IN_PAUSE", "0")) * (5 if seed == 1 else 1))
        if seed == 13:
            print("error: the loss is not finite", flush=True)
            return 1
        with open(workdir / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": step, "loss": 1.0, "epoch": step / steps}) + "\n")
        if step == steps:
            folder = workdir / "evaluation" / str(step)
            folder.mkdir(parents=True, exist_ok=True)
            scores = {"R1": rate * 1e4 + seed, "R5": 2.0, "R10": 3.0, "MdR": 4.0, "MnR": 5.0}
            scores["SumR"] = scores["R1"] + 5.0
            metrics = {"step": step, "t2v": scores, "v2t": scores, "groups": {}}
            (folder / "metrics.json").write_text(json.dumps(metrics))
        (workdir / "checkpoints" / str(step)).mkdir()
        if stop and step < steps:
            return 75
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
