#!/usr/bin/env bash
# onnxruntime: after quantize_dynamic an answer depends on the other pictures of the batch.
#
# A convolution sees its neighbourhood and no other picture; "dynamic" sounds as if each picture
# got the scale that suits it. But one scale is taken from the smallest and largest number of the
# whole tensor, batch and all, at each layer. A dim picture beside a bright one is left with a few
# of the 256 steps: its scores move by more than half of their own spread and cells change class,
# though alone it is answered well. For the same reason locality is lost inside one picture: a
# bright spot in one corner moves the scores in the opposite corner, far outside of what those
# cells can see. In float32 both changes are exactly or nearly nothing.
# Concerns who quantizes a detector this way and then batches requests, or tests it with a batch
# of 1, or looks for a glare's influence near the glare only.

set -euo pipefail
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 PIP_DISABLE_PIP_VERSION_CHECK=1

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet onnx==1.23.2 onnxruntime==1.32.0 numpy==2.4.6

cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import logging
import sys

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic

logging.disable(logging.WARNING)
print("onnx", onnx.__version__, "onnxruntime", onnxruntime.__version__)
random = np.random.default_rng(1)


def kernel(inputs, outputs, size):
    values = random.standard_normal((outputs, inputs, size, size))
    return (values * np.sqrt(2 / (inputs * size * size))).astype(np.float32)


weights = {"w1": kernel(3, 16, 3), "w2": kernel(16, 16, 3), "w3": kernel(16, 5, 1)}
nodes = [helper.make_node("Conv", ["x", "w1"], ["a"], pads=[1] * 4, strides=[2, 2]),
         helper.make_node("Relu", ["a"], ["b"]),
         helper.make_node("Conv", ["b", "w2"], ["c"], pads=[1] * 4, strides=[2, 2]),
         helper.make_node("Relu", ["c"], ["d"]),
         helper.make_node("Conv", ["d", "w3"], ["y"])]
graph = helper.make_graph(
    nodes, "detector",
    [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 128, 128])],
    [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 5, 32, 32])],
    [numpy_helper.from_array(value, name) for name, value in weights.items()])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
model.ir_version = 9
onnx.checker.check_model(model)
onnx.save(model, "float.onnx")
# Unsigned weights: no sum is cut off on processors without the newer int8 instructions.
quantize_dynamic("float.onnx", "dynamic.onnx", weight_type=QuantType.QUInt8)

options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
sessions = {name: onnxruntime.InferenceSession(f"{name}.onnx", options,
                                               providers=["CPUExecutionProvider"])
            for name in ("float", "dynamic")}
dim = 0.05 * random.random((1, 3, 128, 128), dtype=np.float32)
bright = random.random((1, 3, 128, 128), dtype=np.float32)
glare = dim.copy()
glare[:, :, 96:, 96:] = 1
FAR = np.s_[:, :, :20, :20]   # cells that see 7 px each, all 16 px or more from the spot


def moved(before, after):
    classes = before[:, :3].argmax(1) != after[:, :3].argmax(1)
    return float(np.abs(before - after).max() / before.std()), float(classes.mean())


print("expected: a picture's answer is the same whatever lies beside it, or far off in it")
truth = sessions["float"].run(None, {"x": dim})[0]
seen = {}
for name, session in sessions.items():
    def answer(x):
        return session.run(None, {"x": x})[0]
    alone = answer(dim)
    seen[name] = (moved(truth, alone), moved(alone, answer(np.concatenate([dim, dim]))[:1]),
                  moved(alone, answer(np.concatenate([dim, bright]))[:1]),
                  moved(alone[FAR], answer(glare)[FAR]))
    for what, (far, share) in zip(("alone, against float32", "beside itself", "beside a bright one",
                                   "far from a bright spot"), seen[name]):
        print(f"  {name:8s} {what:24s} scores move by up to {far:5.3f} of their spread, "
              f"{share:5.1%} of the cells change class")

exact, dynamic = seen["float"], seen["dynamic"]
same = (max(pair[0] for pair in exact) < 1e-3 and dynamic[0][0] < 0.2 and dynamic[1][0] < 1e-3
        and dynamic[2][0] > 0.3 and dynamic[2][1] > 0.02
        and dynamic[3][0] > 0.3 and dynamic[3][1] > 0.005)
print("as described above" if same else "CHANGED: not as described above")
sys.exit(not same)
PYTHON
