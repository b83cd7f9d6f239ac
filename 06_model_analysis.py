"""Lesson 6: where the network's parameters, work, time and memory go, layer by layer.

    python 06_model_analysis.py    # with --batch 2: memory for a batch of 2, not of 8

Reads   the data folder's weights; where none fit, an untrained network will do. An image of
        data/sample; with --data my_data one of yours, and so its size.
Writes  data/results/layers.png and data/results/receptive_field.png.
Time    ten seconds on two CPU cores.
See     six chapters. Each computes by formula, checks that PyTorch says the same, and shows both;
        a difference is an error. A MB is 2^20 bytes.
Next    change a line of LAYER_LIST in 02_model.py and run this again: what did it cost?
"""

import importlib
import inspect
import math
import timeit

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from common import CELL, UserError, command, make_parser, pad_image, print_table, run_main

# A module's name cannot start with a digit in an import statement; importlib takes any name.
model = importlib.import_module("02_model")

MB = 2 ** 20  # bytes
CARD = 3584 * MB  # a card of 4 GB, less the half GB that CUDA itself takes
RUNS = 20  # timed calls; the fastest is shown: other programs can only slow a call down


# ---------------------------------------------------------------- compute: by formula alone

def describe_convolution(conv: nn.Conv2d, in_shape: tuple) -> dict:
    """Shape, parameters and work of a convolution; in_shape: channels, height, width.

    >>> row = describe_convolution(nn.Conv2d(3, 8, 3, stride=2, padding=1), (3, 64, 32))
    >>> row["out_shape"], row["formula"], row["parameters"], row["multiply_adds"]
    ((8, 32, 16), '3x3x3x8 + 8', 224, 110592)
    """
    kernel, stride, padding = conv.kernel_size[0], conv.stride[0], conv.padding[0]
    # The kernel's first place needs `kernel` px of the padded side, each further one `stride` more.
    height, width = ((side + 2 * padding - kernel) // stride + 1 for side in in_shape[1:])
    channels_in, channels_out = in_shape[0] // conv.groups, conv.out_channels
    weights = kernel * kernel * channels_in * channels_out
    biases = channels_out if conv.bias is not None else 0
    formula = f"{kernel}x{kernel}x{channels_in}x{channels_out}" + (f" + {biases}" if biases else "")
    return {"kind": "conv", "geometry": (kernel, stride, padding), "formula": formula,
            "out_shape": (channels_out, height, width), "parameters": weights + biases,
            "multiply_adds": weights * height * width}  # every place uses each weight once


def describe(layer_list, channels: int, height: int, width: int) -> list[dict]:
    """What formulas say of a chain of layers, a row for each. Raises UserError."""
    row_list, geometry_list, shape = [], [], (channels, height, width)
    for layer in layer_list:
        row = {"layer": layer, "in_shape": shape, "out_shape": shape, "formula": "",
               "parameters": 0, "multiply_adds": 0}
        if isinstance(layer, nn.Conv2d):
            row |= describe_convolution(layer, shape)
            geometry_list.append(row["geometry"])
            row["field"] = model.receptive_field(geometry_list)  # size, jump, centre
        elif isinstance(layer, nn.BatchNorm2d):  # a weight and a bias per channel
            row |= {"kind": "BN", "formula": f"2x{shape[0]}", "parameters": 2 * shape[0]}
        elif isinstance(layer, nn.ReLU):
            row["kind"] = "ReLU"
        else:
            raise UserError(f"02_model.py has a {type(layer).__name__}, which describe() in "
                            "06_model_analysis.py does not know; add it there")
        row["name"] = f"{row['kind']} {len(geometry_list)}"
        row_list.append(row)
        shape = row["out_shape"]
    return row_list


def predict_saved(row_list, batch: int) -> list[int]:
    """Bytes that each layer saves for the backward pass; a float32 number takes 4.

    Convolution and BN save their input, BN also its batch's mean and 1 / deviation; ReLU saves its
    output, which is the next layer's input and counts once.
    """
    saved_list, kind_before = [], None
    for row in row_list:
        shape = row["out_shape"] if row["kind"] == "ReLU" else row["in_shape"]
        numbers = 0 if kind_before == "ReLU" else batch * math.prod(shape)
        extra = 2 * shape[0] if row["kind"] == "BN" else 0
        saved_list.append(4 * (numbers + extra))
        kind_before = row["kind"]
    return saved_list


def predict_peak(row_list, batch: int) -> int:
    """The most bytes that saved tensors and gradients of activations take together.

    Backward walks from the last layer to the first; what later layers saved is free again. At a
    layer it needs what this one and those before it saved, and the gradients of output and input.
    """
    peak = saved_so_far = 0
    for row, saved in zip(row_list, predict_saved(row_list, batch)):
        saved_so_far += saved
        # Nobody asks for the gradient of the image, the first layer's input.
        numbers_in = 0 if row is row_list[0] else math.prod(row["in_shape"])
        gradients = 4 * batch * (numbers_in + math.prod(row["out_shape"]))
        peak = max(peak, saved_so_far + gradients)
    return peak


# ---------------------------------------------------------------- check: PyTorch is asked

def check(what: str, by_formula, by_pytorch, tolerance: float = 0.0) -> None:
    """End the script where the two differ by more than `tolerance`, a share."""
    if not np.allclose(by_formula, by_pytorch, rtol=tolerance, atol=0):
        raise UserError(f"{what}: the formula says {by_formula}, PyTorch {by_pytorch}; fix the "
                        "formula in 06_model_analysis.py, or what was changed in 02_model.py")


def times_of(function, tensor) -> list[float]:
    """ms of RUNS calls, after three that fetch memory and fill caches."""
    def call():
        function(tensor)
        if tensor.is_cuda:
            torch.cuda.synchronize()  # a GPU works on its own: without waiting, nothing is timed
    return [1e3 * seconds for seconds in timeit.repeat(call, repeat=3 + RUNS, number=1)[3:]]


def look_back(feature_4d, images_4d, jump: int) -> tuple[np.ndarray, int, float]:
    """What the middle cell sees: |gradient| of each pixel, px across, px that its middle is off."""
    cell = feature_4d.shape[3] // 2
    gradient_4d, = torch.autograd.grad(feature_4d[:, :, cell, cell].sum(), images_4d,
                                       retain_graph=True)  # [24, 3, 224, 224]
    # Back to numpy: cpu() fetches the numbers, since numpy sees no card's memory. (A tensor with a
    # graph behind it, as feature_4d, would need detach() first.)
    map_2d_array = gradient_4d.abs().mean(dim=(0, 1)).cpu().numpy()  # [224, 224]
    column_1d_array = np.flatnonzero(map_2d_array.any(axis=0))  # those with any gradient
    middle = float(column_1d_array.mean()) + 0.5
    return map_2d_array, len(column_1d_array), middle - (cell + 0.5) * jump


def saved_bytes(layer_list, images_4d) -> list[int]:
    """Bytes that autograd saves in each layer; parameters and BN's averages are not counted."""
    known_set = {tensor.untyped_storage().data_ptr() for layer in layer_list
                 for tensor in (*layer.parameters(), *layer.buffers())}
    saved_list = []

    def save(tensor):  # a hook, called with each tensor that is put aside for backward
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known_set:  # two tensors on one piece of memory count once
            known_set.add(storage.data_ptr())
            saved_list[-1] += storage.nbytes()
        return tensor

    feature_4d = images_4d.float()
    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        for layer in layer_list:
            saved_list.append(0)
            feature_4d = layer(feature_4d)  # it holds all before it: no memory is used twice
    return saved_list


def held_bytes(network, images_4d) -> int:
    """Bytes of weights, gradients and Adam's two averages, once training runs."""
    optimizer = torch.optim.Adam(network.parameters(), lr=0.0)  # it changes no weight
    for _ in range(2):  # the first step makes gradients and averages; the second is as all others
        if images_4d.is_cuda:
            torch.cuda.reset_peak_memory_stats()
        network(images_4d).sum().backward()
        optimizer.step()
    return sum(tensor.nbytes for weight, state_dict in optimizer.state.items() for tensor in (
        weight, weight.grad, state_dict["exp_avg"], state_dict["exp_avg_sq"]))


# -------------------------------- show: the chapters; the docstring of each is its heading

def print_shapes(row_list, image_4d) -> None:
    """1. SHAPES: (side + 2 x padding - kernel)/stride + 1, rounded down; BN, ReLU change none."""
    feature_4d, table_list = image_4d.float(), [("layer", "height", "comes out", "MB")]
    for row in row_list:
        feature_4d = row["layer"](feature_4d)
        check(f"shape after {row['name']}", row["out_shape"], feature_4d.shape[1:])
        if row["kind"] == "conv":
            kernel, stride, padding = row["geometry"]
            how = f"({row['in_shape'][1]} + 2x{padding} - {kernel})/{stride} + 1"
            shape = " x ".join(map(str, row["out_shape"]))
            table_list.append((row["name"], how, shape, feature_4d.nbytes / MB))
    print_table(table_list)


def print_parameters(row_list, network) -> None:
    """2. PARAMETERS: kernel x kernel x channels in x channels out, and two per channel for BN.
    BN would subtract a bias, so only the head, which no BN follows, has one.
    """
    table_list = [("layer", "formula", "by formula", "by PyTorch", "share")]
    total = sum(row["parameters"] for row in row_list)
    together = {"name": "together", "formula": "", "parameters": total, "layer": network}
    for row in [*row_list, together]:
        counted = sum(parameter.numel() for parameter in row["layer"].parameters())
        check(f"parameters, {row['name']}", row["parameters"], counted)
        if counted:
            table_list.append((row["name"], row["formula"], row["parameters"], counted,
                               f"{counted / total:.1%}"))
    print_table(table_list)


def print_work(row_list, network, image_4d) -> None:
    """3. WORK AND TIME of one image. BN and ReLU multiply little, but fetch and store it all."""
    total = sum(row["multiply_adds"] for row in row_list)
    with FlopCounterMode(display=False) as counter:
        network(image_4d)
    check("multiply-adds", total, counter.get_total_flops() / 2)  # PyTorch counts two operations
    feature_4d, job_list = image_4d.float(), []
    for row in row_list:
        if row["kind"] == "conv":
            job_list.append((row["name"], row["multiply_adds"], row["layer"], feature_4d))
        feature_4d = row["layer"](feature_4d)
    job_list.append(("all, with BN and ReLU", total, network, image_4d))
    if row_list[1]["kind"] == "BN":  # in another order it cannot be folded
        job_list.append(("all, BN folded", total, model.fold_batch_norm(network), image_4d))
    table_list, unrest = [("layer", "million multiply-adds", "ms", "billion a second")], 1.0
    for name, work, function, tensor in job_list:
        time_list = times_of(function, tensor)
        table_list.append((name, work / 1e6, min(time_list), work / min(time_list) / 1e6))
        first, second = np.median(np.reshape(time_list, (2, -1)), axis=1)
        unrest = max(unrest, first / second, second / first)
    print_table(table_list)
    if unrest > 4 / 3:
        print("   Two halves of a layer's runs differ by more than a third: too busy to be timed.")


def print_receptive_field(row_list) -> np.ndarray:
    """4. RECEPTIVE FIELD: a layer adds (kernel - 1) x jump to what a cell sees, moves its centre by
    ((kernel - 1)/2 - padding) x jump, and multiplies the jump to the next cell by its stride. The
    first cell's prior is at jump/2. Measured by the gradient on random images.
    """
    size, jump, _ = row_list[-1]["field"]
    side = (size // jump // 2 * 2 + 3) * jump  # px: an odd number of cells, more than one sees
    images_4d = 255 * torch.rand(24, 3, side, side, device=model.pick_device())
    feature_4d = images_4d.requires_grad_()  # [24, 3, 224, 224]
    table_list = [("layer", "jump", "centre", "prior", "off by gradient", "sees", "by gradient")]
    for row in row_list:
        feature_4d = row["layer"](feature_4d)  # [24, 5, 7, 7] at the end
        if row["kind"] == "conv":
            size, jump, centre = row["field"]
            map_2d_array, seen, off = look_back(feature_4d, images_4d, jump)
            check(f"what {row['name']} sees", (size, centre - jump / 2), (seen, off))
            table_list.append((row["name"], jump, centre, jump / 2, off, size, seen))
    print_table(table_list)
    return map_2d_array


def print_batch_norm() -> None:
    """5. BN BY ITSELF, on 1, 3, 5, 7. In training: (x - mean)/sqrt(variance) of the batch, mean 4,
    variance (9 + 1 + 1 + 9)/4 = 5. A step also moves two averages a tenth of the way:
      mean      0 to 0.9 x 0 + 0.1 x 4    = 0.4
      variance  1 to 0.9 x 1 + 0.1 x 20/3 = 1.567  (here divided by n - 1)
    In evaluation it uses these.
    """
    norm, value_1d = nn.BatchNorm2d(1).requires_grad_(False), torch.tensor([1.0, 3.0, 5.0, 7.0])
    column_list = [value_1d]
    for is_training, mean, variance in ((True, 4, 5), (False, 0.4, 0.9 + 0.1 * 20 / 3)):
        by_formula_1d = (value_1d - mean) / math.sqrt(variance + norm.eps)  # eps: against 0 / 0
        by_pytorch_1d = norm.train(is_training)(value_1d.view(1, 1, 1, 4)).flatten()
        check("BN by itself", by_formula_1d, by_pytorch_1d, 1e-5)
        column_list += [by_formula_1d, by_pytorch_1d]
    print_table([("x", "training: (x - 4)/sqrt(5)", "by PyTorch",
                  "evaluation: (x - 0.4)/sqrt(1.567)", "by PyTorch"),
                 *torch.stack(column_list).T.tolist()])


def print_memory(row_list, network, batch: int) -> None:
    """6. MEMORY of a training step: convolution and BN save their input, ReLU its output. A layer
    that is not listed shares a tensor with the one above it. Images travel as uint8, in a quarter
    of the bytes, and become float32 on arrival.
    """
    network.train()
    images_4d = torch.randint(0, 256, (batch, *row_list[0]["in_shape"]), dtype=torch.uint8,
                              device=model.pick_device())  # [8, 3, 1920, 320]
    measured_list = saved_bytes([row["layer"] for row in row_list], images_4d)
    saved_list = predict_saved(row_list, batch)
    held = 4 * 4 * sum(row["parameters"] for row in row_list)
    table_list = [("weights, gradients, Adam's two averages", held, held_bytes(network, images_4d)),
                  ("the batch as uint8", images_4d.numel(), images_4d.nbytes)]
    table_list += [(f"saved by {row['name']}", saved, measured) for row, saved, measured
                   in zip(row_list, saved_list, measured_list) if saved or measured]
    table_list.append(("saved by all layers", sum(saved_list), sum(measured_list)))
    for name, by_formula, by_pytorch in table_list:  # a GPU's own kernels may save a little more
        check(f"bytes, {name}", by_formula, by_pytorch, 0.01 if images_4d.is_cuda else 0.0)
    of_images = images_4d.nbytes + predict_peak(row_list, batch)
    table_list.append(("at most, with the gradients of activations", held + of_images,
                       torch.cuda.max_memory_allocated() if images_4d.is_cuda else "no GPU here"))
    print_table([(f"{batch} images", "bytes by formula", "by PyTorch", "MB"),
                 *((*line, line[1] / MB) for line in table_list)])
    print("   A card of 4 GB, of which CUDA takes half a GB, holds a batch of "
          f"{(CARD - held) * batch // of_images:,}.")


# ---- The lesson ends here; what follows makes it comfortable to use.

def draw_layers(row_list) -> Figure:
    """Parameters beside memory; a convolution together with its BN and ReLU."""
    conv_list = [index for index, row in enumerate(row_list) if row["kind"] == "conv"]
    name_list = [row_list[index]["name"] for index in conv_list]
    figure = Figure(figsize=(9, 1 + 0.36 * len(conv_list)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, title, cost_list, unit, colour in (
            (left, "parameters, thousands", [row["parameters"] for row in row_list], 1e3, "C0"),
            (right, "saved for backward, MB per image", predict_saved(row_list, 1), MB, "C1")):
        sum_1d_array = np.add.reduceat(cost_list, [0, *conv_list[1:]]) / unit  # conv to next conv
        axes.bar_label(axes.barh(name_list, sum_1d_array, color=colour), fmt="%.1f", padding=3)
        axes.set(title=f"{title}: {sum_1d_array.sum():.1f}", xlim=(0, 1.15 * sum_1d_array.max()))
    left.invert_yaxis()
    return figure


def draw_receptive_field(map_2d_array, size: int) -> Figure:
    """What the middle cell looks at; size: px that it can see."""
    half, share_2d_array = len(map_2d_array) / 2, map_2d_array / map_2d_array.max()
    axes = Figure(figsize=(6.5, 5.5), layout="constrained").subplots()
    drawn = axes.imshow(np.sqrt(share_2d_array), cmap="magma", extent=(-half, half, half, -half))
    axes.figure.colorbar(drawn, label="root of |gradient|, largest = 1")
    for side, colour, name in ((size, "tab:green", "can see"), (CELL, "tab:red", "its own cell")):
        axes.add_patch(Rectangle((-side / 2, -side / 2), side, side, fill=False, edgecolor=colour,
                                 linewidth=2, label=f"{name}: {side} px"))
    axes.set(xlabel="px from the prior", ylabel="px from the prior",
             title="what one cell looks at, on random images")
    axes.legend(loc="upper left")
    return axes.figure


def run_chapter(chapter, *argument_list):
    print(f"\n{inspect.getdoc(chapter)}")
    return chapter(*argument_list)


def main() -> None:
    parser = make_parser("Analyse the network layer by layer.", "folder with weights and data set")
    parser.add_argument("--batch", type=int, default=8, help="images in chapter 6")
    options = parser.parse_args()
    if not 1 <= options.batch <= 100:  # 30 MB of memory per image
        parser.error("--batch must lie between 1 and 100")
    torch.manual_seed(0)
    try:
        network, _ = model.load_weights(options.data)
    except UserError as error:  # there are none yet, or those of another LAYER_LIST
        print(f"{error}\nso this is an untrained network: shapes, counts and bytes are the same")
        network = model.KeypointNet(class_count=3).to(model.pick_device()).eval()
    # At least two cells a side, since in training BN needs more than one number per channel.
    image_3d_array = pad_image(model.example(options.data)[0], 2 * CELL, 2 * CELL)
    image_3d = torch.from_numpy(image_3d_array).to(model.pick_device())  # [1920, 320, 3]
    image_4d = image_3d.permute(2, 0, 1)[None]  # [1, 3, 1920, 320]
    print(f"an image: {image_4d.dtype} {list(image_4d.shape)} on {image_4d.device}, "
          f"{torch.get_num_threads()} threads")
    row_list = describe([*network.body, network.head], *image_4d.shape[1:])
    row_list[-1]["name"] = "head"
    with torch.no_grad():
        run_chapter(print_shapes, row_list, image_4d)
        run_chapter(print_parameters, row_list, network)
        run_chapter(print_work, row_list, network, image_4d)
    map_2d_array = run_chapter(print_receptive_field, row_list)
    run_chapter(print_batch_norm)
    run_chapter(print_memory, row_list, network, options.batch)
    size, _, _ = row_list[-1]["field"]
    folder = options.data / "results"
    folder.mkdir(parents=True, exist_ok=True)
    draw_layers(row_list).savefig(folder / "layers.png", dpi=110)
    draw_receptive_field(map_2d_array, size).savefig(folder / "receptive_field.png", dpi=110)
    print(f"\nwrote layers.png and receptive_field.png to {folder}")
    print("next: change a line of LAYER_LIST in 02_model.py, and see the price with "
          + command("06_model_analysis.py", options.data))


if __name__ == "__main__":
    run_main(main)
