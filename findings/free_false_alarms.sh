#!/usr/bin/env bash
# pycocotools: for objects of one keypoint, false alarms cost nothing in AP by size.
#
# COCO's keypoint AP is told for all objects and for medium and large ones. If every object is
# medium, one expects AP(medium) to be AP(all). A label has its own area, but a result's area is
# made by loadRes from the rectangle round its keypoints, and with one keypoint that rectangle
# has area 0, however large the object. Results that match nothing and lie outside the range of
# sizes are left out of the count, so each false alarm is dropped: with four of five answers
# false, and these the surest ones, AP(all) is 0.2 and AP(medium) a perfect 1. An "area" in the
# results is overwritten; a "bbox", which keypoint results need not have, is what mends it. And
# objects of 30 x 30 px are neither: among keypoints there is no "small", both ranges say -1.
# Concerns detectors of single points that are measured with pycocotools, or with what wraps it.

set -euo pipefail
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 PIP_DISABLE_PIP_VERSION_CHECK=1

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet pycocotools==2.0.11 numpy==2.4.6

"$folder/venv/bin/python" - <<'PYTHON'
import contextlib
import importlib.metadata
import io
import sys

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

print("pycocotools", importlib.metadata.version("pycocotools"), "numpy", np.__version__)


def evaluate(side, points, boxes=False):
    """Objects of side x side px, found exactly at score 0.5; four false alarms each at 0.9."""
    labels, results = [], []
    spread = side / 2 if points == 2 else 0.0   # two points stand in opposite corners

    def place(x, y, v):
        if points == 1:
            return [x, y, v]
        return [x - spread, y - spread, v, x + spread, y + spread, v]

    for image in (1, 2, 3, 4):
        for x in (60.0, 200.0, 340.0):
            labels.append({"id": len(labels) + 1, "image_id": image, "category_id": 1,
                           "bbox": [x - side / 2, 70 - side / 2, side, side], "area": side * side,
                           "iscrowd": 0, "keypoints": place(x, 70.0, 2), "num_keypoints": points})
            results.append({"image_id": image, "category_id": 1, "score": 0.5,
                            "keypoints": place(x, 70.0, 1), "area": side * side})
        for i in range(12):
            results.append({"image_id": image, "category_id": 1, "score": 0.9,
                            "keypoints": place(40.0 + 30 * i, 300.0, 1), "area": side * side})
    if boxes:
        for one in results:
            x, y = one["keypoints"][:2]
            one["bbox"] = [x - side / 2, y - side / 2, side, side]
    names = ["a", "b"][:points]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {"info": {}, "annotations": labels,
                        "images": [{"id": i, "width": 400, "height": 400} for i in (1, 2, 3, 4)],
                        "categories": [{"id": 1, "name": "mark", "keypoints": names,
                                        "skeleton": []}]}
        coco.createIndex()
        answers = coco.loadRes(results)
        judge = COCOeval(coco, answers, "keypoints")
        judge.params.kpt_oks_sigmas = np.full(points, 0.05)
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    areas = sorted({round(float(a["area"]), 1) for a in answers.anns.values()})
    return judge.stats[0], judge.stats[3], judge.stats[4], areas


print("expected: all objects medium -> AP(medium) = AP(all); all large -> AP(large) = AP(all)")
cases = {"one point,  40 px": (40, 1), "one point, 120 px": (120, 1),
         "two points, 40 px": (40, 2), "one point,  30 px": (30, 1),
         "one point,  40 px, results with a box": (40, 1, True)}
seen = {name: evaluate(*case) for name, case in cases.items()}
for name, (whole, medium, large, areas) in seen.items():
    print(f"  {name}: AP(all) {whole:.3f}, AP(medium) {medium:.3f}, AP(large) {large:.3f}; "
          f"areas of the results {areas}")


def near(row, *values):
    return all(abs(a - b) < 0.01 for a, b in zip(row, values))


same = (near(seen["one point,  40 px"], 0.2, 1, -1) and near(seen["one point, 120 px"], 0.2, -1, 1)
        and near(seen["two points, 40 px"], 0.2, 0.2, -1)
        and near(seen["one point,  30 px"], 0.2, -1, -1)
        and near(seen["one point,  40 px, results with a box"], 0.2, 0.2, -1)
        and seen["one point,  40 px"][3] == [0.0])
print("as described above" if same else "CHANGED: not as described above")
sys.exit(not same)
PYTHON
