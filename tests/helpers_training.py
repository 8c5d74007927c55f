"""Training by the command in a process of its own, killed while it runs."""

import os
import signal
import subprocess
import sys
import time

import torch

from mono_internvl.training.checkpoints import checkpoints


def train_and_kill(recipe, runs, saved):
    """Start the command and kill it once it has `saved` checkpoints; the run's folder, of a recipe `stage.yaml`."""
    command = [sys.executable, "-m", "mono_internvl", "train", str(recipe), "--runs", str(runs), "--resume"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    folder = runs / "stage"
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(checkpoints(folder)) < saved and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert checkpoints(folder), "nothing was saved before the deadline"
    return folder
