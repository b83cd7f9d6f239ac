"""Out of PyTorch: network and decode in one file, which is kept if it answers as PyTorch does.

    python deploy/export_onnx.py    # writes data/keypoints.onnx; own weights: --data my_data
"""

import importlib
import json
import logging

import torch

from serve import load_model  # first: serve.py tells Python where common.py is
from common import (DATA_FOLDER, UserError, make_parser, pad_image, read_data_set, read_image,
                    replacing, run_main)

model = importlib.import_module("02_model")
THRESHOLD = torch.tensor(0.05)  # compared from here on, where the network is less sure, too


class Detector(torch.nn.Module):
    """The file: an image, uint8 `[1, H, W, 3]`, and a threshold in, `[K, 2]`, `[K]`, `[K]` out."""

    def __init__(self, network: model.KeypointNet, max_per_class: int):
        super().__init__()
        self.network, self.max_per_class = network, max_per_class

    def forward(self, image_4d: torch.Tensor, threshold: torch.Tensor):
        output_4d = self.network(image_4d.permute(0, 3, 1, 2))  # [1, 5, 60, 10]
        return model.decode(output_4d, self.max_per_class, threshold)[0]


def compare(detector: Detector, session, name: str, image_3d_array) -> int:
    """How many keypoints both find. Raises UserError unless the file answers as PyTorch does."""
    image_4d_array = pad_image(image_3d_array)[None]  # [1, 1920, 320, 3]
    wanted = detector(torch.from_numpy(image_4d_array), THRESHOLD)
    found = session.run(None, {"image": image_4d_array, "threshold": THRESHOLD.numpy()})
    for kind, most, want, have in zip(["places", "ids", "scores"], [1e-3, 0, 1e-4], wanted, found):
        if len(want) != len(have) or (want - torch.from_numpy(have)).abs().gt(most).any():
            raise UserError(f"{name}: the file answers with other {kind} than PyTorch; not kept")
    return len(found[0])


def main() -> None:
    options = make_parser("Write DATA/keypoints.onnx.", "folder with the weights").parse_args()
    path, (network, about_dict) = options.data / "keypoints.onnx", model.load_weights(options.data)
    image_dict = {file.name: read_image(file) for file in (DATA_FOLDER / "sample").glob("*.jpg")}
    if (options.data / "train_images.npy").exists():  # then of your own, too
        dataset_dict, array_dict = read_data_set(options.data)
        image_dict |= zip(dataset_dict["train"]["file_list"][:9], array_dict["train"][0])
    about_dict |= {"checksum_list": [], "compared_on": list(image_dict)}
    logging.captureWarnings(True)  # or libraries would warn of each other, and of torchvision,
    logging.disable()  # which we do not need
    detector = Detector(network.cpu(), about_dict["max_per_class"])
    program = torch.onnx.export(
        Detector(model.fold_batch_norm(network), detector.max_per_class).eval(),
        (torch.zeros(1, 128, 64, 3, dtype=torch.uint8), THRESHOLD),
        input_names=["image", "threshold"], output_names=["keypoints", "class_ids", "scores"],
        dynamic_shapes=({1: "height", 2: "width"}, {}), verbose=False)
    program.model.metadata_props["about"] = json.dumps(about_dict)
    with replacing(path) as temporary:
        program.save(temporary, external_data=False)  # else the weights are a file of their own
        session, _ = load_model(temporary)
        count = sum(compare(detector, session, name, part) for name, image in image_dict.items()
                    for part in (image, image[:, :150]))  # a size taken for fixed would show
    print(f"{count} keypoints of {len(image_dict)} images are as PyTorch's; wrote {path}")


if __name__ == "__main__":
    run_main(main)
