#!/usr/bin/env bash
# OpenVINO: a broken network or picture gives calm, finite numbers where PyTorch gives NaN.
#
# Watching an answer for NaN is the usual alarm: a NaN in a convolutional network is passed on
# to everything that it reaches, and in PyTorch so it is. OpenVINO's ReLU is a maximum with 0
# that returns 0 for NaN, and its max-pooling passes NaN by as well. So a network with a negative
# variance in a BatchNorm (after averaging weights badly), with every weight of a hidden layer
# NaN, or fed with a blank picture that was standardised (0 / 0), answers NaN everywhere in
# PyTorch and finite scores, as a healthy one would, after conversion; with a hidden layer all
# NaN they are the head's bias, the same in each cell. Only a NaN behind the last ReLU comes out.
# Concerns whoever serves a network by OpenVINO and trusts a NaN check on the outputs: look at
# weights and inputs instead.

set -euo pipefail
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 PIP_DISABLE_PIP_VERSION_CHECK=1

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 openvino==2026.4.1 numpy==2.4.6

"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import copy
import sys

import numpy as np
import openvino
import torch
from torch import nn

torch.set_num_threads(1)
torch.manual_seed(0)
print("torch", torch.__version__, "openvino", openvino.__version__)
NAN = float("nan")
SETTINGS = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}


def shares_of_nan(network, picture):
    network = network.eval()
    with torch.no_grad():
        ours = network(picture).numpy()
    model = openvino.convert_model(network, example_input=picture)
    compiled = openvino.Core().compile_model(model, "CPU", SETTINGS)
    theirs = np.array(compiled(picture.numpy())[0], copy=True)
    return float(np.isnan(ours).mean()), float(np.isnan(theirs).mean()), ours, theirs


healthy = nn.Sequential(
    nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(),
    nn.Conv2d(16, 16, 3, 1, 1), nn.BatchNorm2d(16), nn.ReLU(),
    nn.Conv2d(16, 5, 1))
picture = torch.rand(1, 3, 64, 64)
blank = torch.full((1, 3, 64, 64), 0.5)
blank = (blank - blank.mean()) / blank.std()

variance = copy.deepcopy(healthy)
variance[1].running_var[3] = -1e-3
layer = copy.deepcopy(healthy)
layer[3].weight.data.fill_(NAN)
head = copy.deepcopy(healthy)
head[6].bias.data.fill_(NAN)
pool = nn.Sequential(nn.Conv2d(3, 4, 1), nn.MaxPool2d(2), nn.MaxPool2d(2))
one_pixel = picture.clone()
one_pixel[0, :, 10, 10] = NAN

cases = {
    "healthy": (healthy, picture),
    "one negative variance in BatchNorm": (variance, picture),
    "all weights of a hidden layer NaN": (layer, picture),
    "blank picture, standardised to NaN": (healthy, blank),
    "one NaN pixel, max-pooling, no ReLU": (pool, one_pixel),
    "bias of the head NaN": (head, picture),
}
print("expected: the same share of NaN in both; seen:")
seen = {}
for name, (network, x) in cases.items():
    seen[name] = shares_of_nan(network, x)
    print(f"  {name:36s} PyTorch {seen[name][0]:7.2%} NaN, OpenVINO {seen[name][1]:7.2%} NaN")

ours, theirs = seen["healthy"][2:]
difference = float(np.abs(ours - theirs).max())
answer = seen["all weights of a hidden layer NaN"][3]
bias = healthy[6].bias.detach().numpy()[None, :, None, None]
only_bias = float(np.abs(answer - bias).max())
print(f"  healthy: largest difference {difference:.1e}")
print(f"  hidden layer NaN: OpenVINO answers, first cell {answer[0, :, 0, 0].round(3)}, "
      f"in no cell further than {only_bias:.1e} from the head's bias")

hidden = [seen[name][:2] for name in list(cases)[1:4]]
pooled = seen["one NaN pixel, max-pooling, no ReLU"]
same = (difference < 1e-4 and only_bias < 1e-4 and all(pair == (1.0, 0.0) for pair in hidden)
        and pooled[0] > 0 and pooled[1] == 0
        and seen["bias of the head NaN"][:2] == (1.0, 1.0))
print("as described above" if same else "CHANGED: not as described above")
sys.exit(not same)
PYTHON
