#!/usr/bin/env bash
# PyTorch: label smoothing and class weights, together, teach a detector the wrong class.
#
# Most cells of a picture are background, so a detector gives that class a small weight; label
# smoothing is one more argument of the same call. One expects the weight to say how much a cell
# counts, and the smoothing to leave its class on top. But cross_entropy multiplies each class's
# own term by that class's weight, the smoothed ones too: the shares of the other classes in a
# background cell's target keep their full weight while background's own share is scaled down. At
# weight 0.02, smoothing 0.1 and three classes the loss is smallest where background gets 22 %
# and each object class 39 %. A network that fits faultless labels calls every background cell
# an object. One weight per sample, applied by hand, does not do so.
# Concerns everybody who trains a dense detector or segmentation on rare classes with both.

set -euo pipefail
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 PIP_DISABLE_PIP_VERSION_CHECK=1

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6

"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
from torch.nn import functional as F

torch.set_num_threads(1)
torch.manual_seed(0)
EPS, CLASSES, BACKGROUND_WEIGHT = 0.1, 3, 0.02
weight = torch.tensor([BACKGROUND_WEIGHT, 1.0, 1.0])
print("torch", torch.__version__)

# Three heaps of points, far apart: a linear layer can tell them apart without an error.
middles = torch.tensor([[0.0, 3.0], [-3.0, -2.0], [3.0, -2.0]])
truth = torch.tensor([0] * 200 + [1] * 20 + [2] * 20)
points = middles[truth] + 0.3 * torch.randn(len(truth), 2)


def train(loss):
    layer = torch.nn.Linear(2, CLASSES)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    for _ in range(1500):
        optimizer.zero_grad()
        loss(layer(points), truth).backward()
        optimizer.step()
    with torch.no_grad():
        probability = layer(points).softmax(1)
    right = probability.argmax(1) == truth
    return (right[truth == 0].float().mean().item(), right[truth > 0].float().mean().item(),
            probability[truth == 0].mean(0))


def one_weight_per_sample(logits, labels):
    each = F.cross_entropy(logits, labels, label_smoothing=EPS, reduction="none")
    return (each * weight[labels]).sum() / weight[labels].sum()


ways = {
    "weight alone": lambda z, t: F.cross_entropy(z, t, weight=weight),
    "smoothing alone": lambda z, t: F.cross_entropy(z, t, label_smoothing=EPS),
    "both, weight per sample by hand": one_weight_per_sample,
    "both, in one call": lambda z, t: F.cross_entropy(z, t, weight=weight, label_smoothing=EPS),
}
seen = {name: train(loss) for name, loss in ways.items()}
print("expected: all four label every background point and every object rightly")
for name, (background, objects, mean) in seen.items():
    print(f"  {name:32s} background right {background:4.0%}, objects right {objects:4.0%}, "
          f"mean answer in background {[round(p, 2) for p in mean.tolist()]}")

# Where one background cell's loss is smallest, found by descent and by hand.
logits = torch.zeros(1, CLASSES, requires_grad=True)
optimizer = torch.optim.Adam([logits], lr=0.02)
for _ in range(2000):
    optimizer.zero_grad()
    F.cross_entropy(logits, torch.tensor([0]), weight=weight, label_smoothing=EPS).backward()
    optimizer.step()
found = logits.detach().softmax(1)[0, 0].item()
own = (1 - EPS + EPS / CLASSES) * BACKGROUND_WEIGHT
by_hand = own / (own + (CLASSES - 1) * EPS / CLASSES)
print(f"background's share in the best answer of a background cell: {found:.4f} by descent, "
      f"{by_hand:.4f} by hand; one expects {1 - EPS + EPS / CLASSES:.4f}")

same = (all(seen[name][0] > 0.99 and seen[name][1] > 0.99 for name in list(ways)[:3])
        and seen["both, in one call"][0] < 0.05 and seen["both, in one call"][1] > 0.95
        and abs(found - by_hand) < 0.002 and found < 0.25)
print("as described above" if same else "CHANGED: not as described above")
sys.exit(not same)
PYTHON
