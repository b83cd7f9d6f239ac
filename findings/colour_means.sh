#!/usr/bin/env bash
# NumPy: the mean and spread of each colour, over some hundred pictures, is wrong by its layout.
#
# To standardise pictures one takes mean and standard deviation of each channel. NumPy adds
# float32 in pairs, so such sums are known to be good, and `pictures.mean()` of 300 white
# pictures is 1. But pairing is done along the innermost axis alone. With colour last, as Pillow
# and OpenCV give pictures, `mean(axis=(0, 1, 2))` keeps three running float32 sums; at 2^24
# adding 1 does nothing any more, and at much smaller sums each addition is already rounded
# coarsely. The same white pictures then have the mean 0.874, evenly bright noise has a mean
# that is 10 % too large and a spread that is 17 % too large; 120 pictures are 0.6 % off. No
# warning, no NaN, all plausible. The same numbers with colour first, or one channel at a time,
# come out right.
# Concerns whoever computes mean and std of a data set of float32 pictures (H, W, 3) with NumPy.

set -euo pipefail
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 PIP_DISABLE_PIP_VERSION_CHECK=1

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpy==2.4.6

"$folder/venv/bin/python" - <<'PYTHON'
import sys

import numpy as np

print("numpy", np.__version__)
SHAPE = (300, 200, 320, 3)
random = np.random.default_rng(0)
last = random.integers(150, 256, size=SHAPE, dtype=np.uint8).astype(np.float32)
last /= np.float32(255)
over = (0, 1, 2)
true_mean = last.mean(axis=over, dtype=np.float64)
true_std = last.std(axis=over, dtype=np.float64)


def off(values, true):
    return float(np.abs(values / true - 1).max())


print(f"300 pictures of 320x200, float32, noise between {150 / 255:.3f} and 1.000")
print("expected: mean and std within 0.1 % of those summed in float64, in any layout")
mean, std = last.mean(axis=over), last.std(axis=over)
seen = {"colour last": (off(mean, true_mean), off(std, true_std))}
print(f"  float64      mean {true_mean.round(4)}  std {true_std.round(4)}")
print(f"  colour last  mean {mean.round(4)}  std {std.round(4)}")

few = last[:120]
seen["colour last, 120 pictures"] = (off(few.mean(axis=over), true_mean),
                                     off(few.std(axis=over), true_std))
red = last[..., 0]
seen["one channel of the same array"] = (off(red.mean(), true_mean[0]), off(red.std(), true_std[0]))
first = np.ascontiguousarray(last.transpose(0, 3, 1, 2))
seen["colour first"] = (off(first.mean(axis=(0, 2, 3)), true_mean),
                        off(first.std(axis=(0, 2, 3)), true_std))
del first
for name, (of_mean, of_std) in seen.items():
    print(f"  {name:30s} mean off by {of_mean:8.3%}, std off by {of_std:8.3%}")

last[:] = 1
white, flat = last.mean(axis=over), float(last.mean())
print(f"  all white: mean of each channel {white.round(4)}, mean of all {flat:.4f}, "
      f"2^24 / pixels {2 ** 24 / (len(last) * 200 * 320):.4f}")

same = (seen["colour last"][0] > 0.05 and seen["colour last"][1] > 0.05
        and seen["colour last, 120 pictures"][0] > 0.002
        and max(seen["colour first"]) < 0.001
        and max(seen["one channel of the same array"]) < 0.001
        and float(np.abs(white - 0.8738).max()) < 0.001 and abs(flat - 1) < 0.001)
print("as described above" if same else "CHANGED: not as described above")
sys.exit(not same)
PYTHON
