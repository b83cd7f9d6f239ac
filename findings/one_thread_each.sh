#!/usr/bin/env bash
# PyTorch: set_num_threads(1) holds for the thread that calls it; others are only told that it does.
#
# A program that looks at several pictures at a time, a Python thread for each, sets PyTorch to one
# thread first, so that the threads do not fight for the cores. In the threads get_num_threads()
# then answers 1. Yet the first convolution or matrix product there starts OpenMP's helpers, as many
# as OMP_NUM_THREADS or the cores allow: each picture computes on all cores after all. An addition
# or exp, which PyTorch splits up by itself, does stay on one. On a quiet machine nobody notices; on
# a busy one, threads that spin while they wait for each other make it crawl. What helps: to call
# set_num_threads(1) in each thread (ThreadPoolExecutor's `initializer`), or OMP_NUM_THREADS=1.
# Concerns whoever serves or evaluates a network from a pool of Python threads on CPUs, and whoever
# trusts get_num_threads() in a log.
# The count of the process's threads is read from /proc: Linux only.

set -euo pipefail
export OMP_NUM_THREADS=2 PIP_DISABLE_PIP_VERSION_CHECK=1
unset MKL_NUM_THREADS

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6

cd "$folder"
cat > count.py <<'PYTHON'
import os
import sys
import threading

import torch

layer, where = sys.argv[1:]
torch.set_num_threads(1)
picture, matrix = torch.rand(1, 16, 300, 300), torch.rand(600, 600)
convolution = torch.nn.Conv2d(16, 32, 3)
job = {"convolution": lambda: convolution(picture), "matrix product": lambda: matrix @ matrix,
       "exp": lambda: picture.exp()}[layer]


def work():
    if where == "told":
        torch.set_num_threads(1)
    before = len(os.listdir("/proc/self/task"))
    with torch.no_grad():
        for _ in range(5):
            job()
    print(torch.get_num_threads(), len(os.listdir("/proc/self/task")) - before)


if where == "main":
    work()
else:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
PYTHON

"$folder/venv/bin/python" - <<'PYTHON'
import subprocess
import sys

import torch

print("torch", torch.__version__)
print("expected: after set_num_threads(1) no job starts further threads, in whatever thread it runs")
seen = {}
for layer in ("convolution", "matrix product", "exp"):
    for where in ("main", "untold", "told"):
        text = subprocess.run([sys.executable, "count.py", layer, where], check=True,
                              capture_output=True, text=True).stdout
        said, started = map(int, text.split())
        seen[layer, where] = said, started
        place = {"main": "in the main thread", "untold": "in another thread",
                 "told": "in another, told again"}[where]
        print(f"  {layer:15s} {place:23s} get_num_threads() {said}, "
              f"further threads started: {started}")
same = all(said == 1 for said, _ in seen.values())
same &= all(started == (where == "untold" and layer != "exp")
            for (layer, where), (_, started) in seen.items())
print("as described above" if same else "CHANGED: not as described above")
sys.exit(not same)
PYTHON
