#!/usr/bin/env bash
# ONNX: one valid file with Softmax, read by three programs, gives two answers.
#
# In a detector Softmax over axis 1 of [n, classes, h, w] makes the classes of one cell add up to
# 1, and since operator set 13 this is what ONNX says. In sets up to 12 the same node flattens
# everything behind the axis first: the whole map adds up to 1, each score is about h x w times
# smaller. onnx's own version_converter goes up from 12 rightly (it adds Flatten and Reshape) but
# goes down from 13 by changing the number alone, so asking for an older set for an older device
# changes all scores without a word, and the checker is content. onnxruntime then does what set
# 12 says. OpenVINO and onnx's own ReferenceEvaluator do what set 13 says, so a check with them
# shows no difference, and a file written for set 12 and meaning it is misread by them.
# Concerns who lowers a file's operator set, keeps old files, or compares engines.

set -euo pipefail
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 PIP_DISABLE_PIP_VERSION_CHECK=1

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet \
    onnx==1.23.2 onnxruntime==1.32.0 openvino==2026.4.1 numpy==2.4.6

"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import io
import sys

import numpy as np
import onnx
import onnxruntime
import openvino
from onnx import TensorProto, helper, version_converter
from onnx.reference import ReferenceEvaluator

print("onnx", onnx.__version__, "onnxruntime", onnxruntime.__version__,
      "openvino", openvino.__version__)
SHAPE = [1, 3, 8, 8]
logits = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)


def file_of(opset):
    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, SHAPE) for name in "xy"]
    node = helper.make_node("Softmax", ["x"], ["y"], axis=1)
    graph = helper.make_graph([node], "scores", tensors[:1], tensors[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    model.ir_version = 7
    return model


def sums(model):
    """What the scores of one cell add up to, on average, in each program."""
    onnx.checker.check_model(model, full_check=True)
    data = model.SerializeToString()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(io.BytesIO(data)), "CPU",
                                  {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"})
    answers = {"onnxruntime": session.run(None, {"x": logits})[0],
               "OpenVINO": np.array(compiled(logits)[0], copy=True),
               "ReferenceEvaluator": ReferenceEvaluator(model).run(None, {"x": logits})[0]}
    return {name: float(answer.sum(axis=1).mean()) for name, answer in answers.items()}


models = {"set 13": file_of(13),
          "set 13 converted to 12": version_converter.convert_version(file_of(13), 12),
          "set 12": file_of(12),
          "set 12 converted to 13": version_converter.convert_version(file_of(12), 13)}
print("expected: converting changes no answer, and all programs agree on one file")
seen = {}
for name, model in models.items():
    seen[name] = sums(model)
    print(f"  {name:23s} {'+'.join(n.op_type for n in model.graph.node):31s}",
          ", ".join(f"{program} {value:.4f}" for program, value in seen[name].items()))


def near(row, *values):
    return all(abs(a - b) < 1e-3 for a, b in zip(row.values(), values))


CELL = 1 / 64   # the whole map adds up to 1
nodes = [n.op_type for n in models["set 13 converted to 12"].graph.node]
same = (nodes == ["Softmax"] and near(seen["set 13"], 1, 1, 1)
        and near(seen["set 13 converted to 12"], CELL, 1, 1)
        and near(seen["set 12"], CELL, 1, 1)
        and near(seen["set 12 converted to 13"], CELL, CELL, CELL))
print("as described above" if same else "CHANGED: not as described above")
sys.exit(not same)
PYTHON
