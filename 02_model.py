"""Lesson 2: the network, its grid of priors, match (labels to grid), decode (grid to keypoints).

    python 02_model.py

Reads   an image of data/sample; of your own data with --data my_data.
Writes  data/results/grid.png: the grid laid over the image, and what each cell should answer.
Time    a second.
See     1920x320 px become 60x10 cells of five values; a keypoint goes through match and decode.
Next    python 03_train.py trains what stands here.

Every cell of the grid is responsible for 32x32 px. Its prior is its centre, and it answers with
five values: dx and dy, the offset from the prior to the keypoint, and a score for each class:
background, keyPoint_1, keyPoint_2. SSD has several maps and several prior boxes per cell, compares
boxes (IoU) and sorts out double answers (NMS); points of one size need one prior per cell.

Names say what a thing is: output_4d is a torch tensor of four dimensions, label_2d_array a numpy
array of two, _list and _dict are Python's; plain numbers have no suffix. [N, 5, 60, 10] is a shape.
"""

import copy
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import nn

from common import (CELL, COLOUR_LIST, DATA_FOLDER, REACH, UserError, command, make_parser,
                    pad_image, read_data_set, read_image, run_main)

# The layers: (kernel, stride, padding, channels out). Five strides of 2 multiply to 32 = CELL.
# Kernels of down-sampling layers are even: then a cell looks exactly where its prior is. A 3x3
# kernel with stride 2 looks half a pixel up-left of it, and five in a row look 15.5 px off.
LAYER_LIST = [
    (4, 2, 1, 8),  # 1920x320 -> 960x160
    (4, 2, 1, 16),  # -> 480x80
    (4, 2, 1, 32),  # -> 240x40
    (3, 1, 1, 32),
    (4, 2, 1, 64),  # -> 120x20
    (3, 1, 1, 64),
    (4, 2, 1, 128),  # -> 60x10
    (1, 1, 0, 128),
]
OFFSET_UNIT = CELL / 2  # px; the network answers in half cells: -1 to 1 within the cell
ASSIGNMENT_RADIUS = CELL / 2 + REACH  # px, in x and in y; a cell learns keypoints this near


# ---------------------------------------------------------------- the network

class KeypointNet(nn.Module):
    """A plain stack of convolution, BN, ReLU; then a 1x1 convolution, the head.

    Input: `[N, 3, H, W]`, 0 to 255, H and W multiples of 32. Output: `[N, 5, H / 32, W / 32]`.
    """

    def __init__(self, class_count: int):
        super().__init__()  # comes first: it sets up the register of layers
        layer_list, channels_in = [], 3
        for kernel, stride, padding, channels_out in LAYER_LIST:
            # No bias: BN subtracts each channel's mean, and with it any bias; BN has its own.
            conv = nn.Conv2d(channels_in, channels_out, kernel, stride, padding, bias=False)
            layer_list += [conv, nn.BatchNorm2d(channels_out), nn.ReLU(inplace=True)]
            channels_in = channels_out
        # As an attribute a layer is registered: parameters(), to(device) and state_dict() find it.
        # In a plain Python list it would never be trained, moved or saved.
        self.body = nn.Sequential(*layer_list)
        self.head = nn.Conv2d(channels_in, 2 + class_count, kernel_size=1)
        # Weights in memory as images are, channels last: 1.3 times as fast on a processor.
        self.to(memory_format=torch.channels_last)

    def forward(self, images_4d: torch.Tensor) -> torch.Tensor:
        """What network(images_4d) does: PyTorch calls this."""
        # No division by 255: the first BN divides by each channel's spread, and undoes any factor.
        feature_4d = self.body(images_4d.float())  # [N, 128, 60, 10]
        return self.head(feature_4d)  # [N, 5, 60, 10]: dx and dy in half cells, then the scores


def receptive_field(layer_list=None) -> tuple[int, int, float]:
    """What a cell sees: side, px from cell to cell, middle of the first (Dumoulin and Visin, 2016).

    >>> receptive_field([(3, 2, 1, 8)] * 5)  # 3x3 with stride 2: centre 0.5, but the prior is at 16
    (63, 32, 0.5)
    """
    size, jump, centre = 1, 1, 0.5  # a pixel sees itself; the first pixel's middle is at 0.5
    for kernel, stride, padding, *_ in layer_list or LAYER_LIST:
        size += (kernel - 1) * jump
        centre += ((kernel - 1) / 2 - padding) * jump
        jump *= stride
    return size, jump, centre


def make_priors(rows: int, columns: int, device="cpu") -> torch.Tensor:
    """The centres of the cells in px, `[2, rows, columns]`: x, y.

    >>> make_priors(60, 10)[:, 0, :2]
    tensor([[16., 48.],
            [16., 16.]])
    """
    x_1d = (torch.arange(columns, device=device) + 0.5) * CELL  # [10]
    y_1d = (torch.arange(rows, device=device) + 0.5) * CELL  # [60]
    return torch.stack(torch.meshgrid(x_1d, y_1d, indexing="xy"))  # [2, 60, 10]


# ---------------------------------------------------------------- keypoints -> grid -> keypoints

def match(label_2d_array: np.ndarray, image_count: int, rows: int, columns: int):
    """Ground truth onto the grid (target assignment): what each cell should answer.

    label_2d_array: `[M, 4]`, a row a keypoint: image, class id, x, y in px. Returns gt_offset
    `[N, 2, rows, columns]`, float32, px, and gt_class_id `[N, rows, columns]`, int64, 0 background.

    The cell that a keypoint lies in learns it, and so does a cell whose border is less than 8 px
    away, since it looks much the same from there: one label teaches one, two or four cells. Where
    two keypoints compete for a cell, the nearer to its prior wins.

    >>> gt_offset, gt_class_id = match(np.array([[0, 2, 39, 20]]), 1, 2, 3)
    >>> gt_class_id[0].tolist()  # it lies at row 0, column 1, near the border to column 0 ...
    [[2, 2, 0], [0, 0, 0]]
    >>> gt_offset[0, :, 0, 1].tolist()  # ... 9 px left of its prior (48, 16) and 4 down
    [-9.0, 4.0]
    """
    gt_offset_4d_array = np.zeros((image_count, 2, rows, columns), np.float32)
    gt_class_id_3d_array = np.zeros((image_count, rows, columns), np.int64)
    distance_3d_array = np.full((image_count, rows, columns), np.inf)  # px to who has the cell
    for image, class_id, x, y in label_2d_array:
        own_row, own_column = int(y // CELL), int(x // CELL)
        for row in range(max(0, own_row - 1), min(rows, own_row + 2)):
            for column in range(max(0, own_column - 1), min(columns, own_column + 2)):
                dx, dy = x - (column + 0.5) * CELL, y - (row + 0.5) * CELL
                distance = max(abs(dx), abs(dy))  # 16 at the cell's border
                cell = int(image), row, column
                if distance < ASSIGNMENT_RADIUS and distance < distance_3d_array[cell]:
                    distance_3d_array[cell] = distance
                    gt_class_id_3d_array[cell] = class_id
                    gt_offset_4d_array[int(image), :, row, column] = dx, dy
    return gt_offset_4d_array, gt_class_id_3d_array


def decode(output_4d: torch.Tensor, max_per_class: int = 1, threshold: float = 0.5):
    """Network output into keypoints, without the NMS of SSD, which compares boxes.

    Returns for each image (keypoint_2d `[K, 2]`: x and y in px, class_id_1d `[K]`, score_1d `[K]`:
    probability, 0 to 1). max_per_class: the most keypoints that one class has in a training image.
    Where it is 1, the best cell of each class answers; else each cell that beats its neighbours.
    """
    # softmax makes probabilities of scores: exp(score) / sum of exp over the cell's classes. Scores
    # 0, 1, 3 give 1 + 2.7 + 20.1 = 23.8, so 0.04, 0.11, 0.84. dim=1 is where the classes lie.
    score_4d = output_4d[:, 2:].softmax(dim=1)[:, 1:]  # [N, 2, 60, 10]; background is left out
    priors_3d = make_priors(*score_4d.shape[2:], output_4d.device)  # [2, 60, 10]
    place_4d = priors_3d + output_4d[:, :2] * OFFSET_UNIT  # [N, 2, 60, 10]
    result_list = []
    for place_3d, score_3d in zip(place_4d, score_4d):  # for each image
        if max_per_class > 1:
            score_3d = score_3d * answers_inside(place_3d, priors_3d)  # 0 where outside
        place_2d, found_list = place_3d.flatten(start_dim=1), []  # [2, 600]
        for class_id, score_2d in enumerate(score_3d, start=1):  # for each class
            score_1d = score_2d.flatten()  # [600]
            best_1d = score_1d.argmax()[None] if max_per_class == 1 else local_maxima(score_2d)
            cell_1d = best_1d[score_1d[best_1d] >= threshold]  # [K], indices of cells
            found_list.append((place_2d[:, cell_1d].T, torch.full_like(cell_1d, class_id),
                               score_1d[cell_1d]))
        result_list.append(tuple(torch.cat(part) for part in zip(*found_list)))
    return result_list


def local_maxima(score_2d: torch.Tensor) -> torch.Tensor:
    """Indices `[K]` of the cells that beat their eight neighbours, counted row by row.

    It plays the part of NMS, on scores as in CenterNet. A sure network gives several cells a score
    of exactly 1, so indices are compared: no two cells share one.
    """
    _, best_4d = nn.functional.max_pool2d(score_2d[None, None], 3, stride=1, padding=1,
                                          return_indices=True)  # [1, 1, 60, 10]
    best_1d = best_4d.flatten()  # for each cell the index of the best of the nine
    index_1d = torch.arange(best_1d.numel(), device=best_1d.device)
    return index_1d[(best_1d == index_1d) & (score_2d.flatten() > 0)]


def answers_inside(place_3d: torch.Tensor, priors_3d: torch.Tensor) -> torch.Tensor:
    """Which cells answer with a place inside themselves, bool `[60, 10]`.

    A cell between keypoints A and B may point to A, outside of itself, with the highest score, and
    silence the cells of both. So only answers inside their own cell compete: on crowded images
    recall rose from 0.950 to 0.965. 2 px more are allowed, since on a border either side may
    answer, and beyond the grid counts as on its rim.
    """
    corner_3d = priors_3d[:, -1:, -1:] + CELL / 2  # [2, 1, 1]: width and height of the grid
    far_3d = (place_3d.clamp(min=0).minimum(corner_3d) - priors_3d).abs()  # [2, 60, 10], px
    return far_3d.amax(dim=0) <= CELL / 2 + 2


# ---------------------------------------------------------------- using a trained network

def fold_batch_norm(network: KeypointNet) -> KeypointNet:
    """A copy of a trained network for use: each BN goes into the convolution before it.

    In evaluation mode BN is (x - mean) / sqrt(variance + eps) x weight + bias: a factor, which goes
    into the convolution's weights, and a summand, which becomes its bias.
    """
    folded = copy.deepcopy(network).eval()
    body, layer_list = folded.body, []
    for conv, norm, relu in zip(body[::3], body[1::3], body[2::3]):
        factor_1d = norm.weight / torch.sqrt(norm.running_var + norm.eps)  # [channels out]
        conv.weight.data *= factor_1d[:, None, None, None]
        conv.bias = nn.Parameter(norm.bias - norm.running_mean * factor_1d)
        layer_list += [conv, relu]
    folded.body = nn.Sequential(*layer_list)
    return folded


def pick_device() -> torch.device:
    """The GPU, else the processor. CUDA_VISIBLE_DEVICES= before a command hides all cards."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_weights(data_folder: Path) -> tuple[KeypointNet, dict]:
    """The data folder's network in evaluation mode, and what it knows of its data.

    That is "category_list", "box_size" (px), "max_per_class", "scale" and "checksum_list" (of the
    images it learned from). weights_only=True by design runs no code from a file.
    """
    path = data_folder / "weights.pt"
    if not path.exists() and data_folder.resolve() == DATA_FOLDER.resolve():
        path = DATA_FOLDER / "pretrained.pt"  # comes with the repository
    try:
        about_dict = torch.load(path, map_location="cpu", weights_only=True)
        network = KeypointNet(len(about_dict["category_list"]))
        network.load_state_dict(about_dict.pop("network"))
        if not min(*about_dict["box_size"], about_dict["max_per_class"], about_dict["scale"]) > 0:
            raise ValueError("impossible box size, scale or number of keypoints")
    except PermissionError:
        raise  # run_main says so
    except Exception as error:  # damaged bytes can raise nearly anything
        reason = f"not weights of this network ({' '.join(str(error).split())[:90]})"
        raise UserError(f"{path}: {reason if path.exists() else 'no such file'}; train with "
                        f"{command('03_train.py', data_folder)}, or name another folder with "
                        "--data") from None
    print(f"using {path}")
    return network.to(pick_device()).eval(), about_dict


@torch.inference_mode()  # nothing is kept for a backward pass
def find_keypoints(network: KeypointNet, about_dict: dict, image_3d_array: np.ndarray,
                   threshold: float = 0.5) -> tuple[list[dict], np.ndarray]:
    """Keypoints of an image, uint8 `[H, W, 3]` of any size: dicts of class, x, y, score, box (px).

    Second comes each class's probability in each cell, `[2, 60, 10]`.
    """
    assert not network.training, "in training mode BN uses the image's own mean: call eval()"
    height, width = image_3d_array.shape[:2]
    image_3d = torch.from_numpy(pad_image(image_3d_array))  # [1920, 320, 3]
    image_4d = image_3d.to(network.head.weight.device).permute(2, 0, 1)[None]  # [1, 3, 1920, 320]
    output_4d = network(image_4d)  # [1, 5, 60, 10]
    result = decode(output_4d, about_dict["max_per_class"], threshold)[0]
    half_width, half_height = (side / 2 for side in about_dict["box_size"])
    keypoint_list = []
    for (x, y), class_id, score in zip(*(tensor.tolist() for tensor in result)):
        box = [x - half_width, y - half_height, x + half_width, y + half_height]
        # The network saw a padded image. What lies in the padding with all of its box is no
        # keypoint; one just outside stays, as a label that the edge cuts would.
        if box[0] < width - 1 and box[1] < height - 1 and box[2] > 1 and box[3] > 1:
            keypoint_list.append({"class": about_dict["category_list"][class_id], "x": x, "y": y,
                                  "score": score, "box": box})
    return keypoint_list, output_4d[0, 2:].softmax(dim=0)[1:].cpu().numpy()


# ---- The lesson ends here; what follows makes it comfortable to use.

@torch.no_grad()  # nothing is kept for a backward pass
def show_shapes(image_3d_array: np.ndarray) -> None:
    """Push an image through an untrained network and print the shape after every convolution."""
    print("an image as numpy reads it:        ", image_3d_array.dtype, list(image_3d_array.shape),
          " height, width, RGB")
    # copy(): from_numpy shares the memory, and a mapped array must not be written to. permute moves
    # no byte; [None] adds a dimension. .device: "cpu", or "cuda:0" after .to("cuda").
    image_4d = torch.from_numpy(image_3d_array.copy()).permute(2, 0, 1)[None]  # [1, 3, 1920, 320]
    print("as a batch of one for the network: ", image_4d.dtype, list(image_4d.shape), "on",
          image_4d.device, "\n")
    network, feature_4d = KeypointNet(class_count=3).eval(), image_4d.float()
    for index, (kernel, stride, padding, _) in enumerate(LAYER_LIST):
        feature_4d = network.body[3 * index:3 * index + 3](feature_4d)  # conv, BN, ReLU
        print(f"conv {kernel}x{kernel} stride {stride} padding {padding}  ->",
              list(feature_4d.shape))
    print("head 1x1                      ->", list(network.head(feature_4d).shape),
          "2 offsets and 3 scores a cell\n")
    size, jump, centre = receptive_field()
    print(f"a cell sees {size}x{size} px; cells are {jump} px apart; "
          f"the first looks at {centre} px, its prior is at {CELL / 2}\n")


def example(data_folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """An image and its labels `[M, 4]`: a sample, or the first labelled one of your own data."""
    if data_folder.resolve() == DATA_FOLDER.resolve():
        image_3d_array = read_image(DATA_FOLDER / "sample" / "00635.jpg")
        return image_3d_array, np.array([[0, 2, 67.81, 1340.67]])  # as 00635.xml says
    images_4d_array, label_2d_array = read_data_set(data_folder)[1]["train"]
    first = int(label_2d_array[0, 0])
    own_2d_array = label_2d_array[label_2d_array[:, 0] == first]
    return images_4d_array[first], own_2d_array * (0, 1, 1, 1)  # image 0 of those shown


def show_match_and_decode(label_2d_array, gt_offset_4d_array, gt_class_id_3d_array) -> None:
    """What match has made of an image's keypoints, and what decode makes of that."""
    for _, class_id, x, y in label_2d_array:
        print(f"a keypoint of class {class_id:g} at x {x:.2f}, y {y:.2f}")
    print("match: it teaches")
    for row, column in np.argwhere(gt_class_id_3d_array[0]):  # where it is not 0
        dx, dy = gt_offset_4d_array[0, :, row, column]
        print(f"  the cell at row {row}, column {column}: {dx:6.2f}, {dy:6.2f} px from its prior "
              f"({(column + 0.5) * CELL:g}, {(row + 0.5) * CELL:g})")
    # What a perfect network would answer. one_hot makes 1, 0 of background and 0, 1 of class 1.
    class_id_3d = torch.from_numpy(gt_class_id_3d_array)  # [1, 60, 10]
    score_4d = 20.0 * nn.functional.one_hot(class_id_3d).permute(0, 3, 1, 2)  # sure: exp(20) to 1
    output_4d = torch.cat((torch.from_numpy(gt_offset_4d_array) / OFFSET_UNIT, score_4d), dim=1)
    result = decode(output_4d, max_per_class=len(label_2d_array))[0]
    for (x, y), class_id, score in zip(*(tensor.tolist() for tensor in result)):
        print(f"decode: class {class_id} at x {x:.2f}, y {y:.2f}, score {score:g}")


def draw_targets(axes, image_3d_array, gt_offset_3d_array, gt_class_id_2d_array) -> None:
    """The grid over an image: each cell that learns is tinted, an arrow leads to its keypoint."""
    height, width = image_3d_array.shape[:2]
    priors_3d_array = make_priors(*gt_class_id_2d_array.shape).numpy()  # [2, 60, 10]
    for row, column in np.argwhere(gt_class_id_2d_array):
        prior, offset = priors_3d_array[:, row, column], gt_offset_3d_array[:, row, column]
        colour = COLOUR_LIST[gt_class_id_2d_array[row, column] % len(COLOUR_LIST)]
        axes.add_patch(Rectangle((column * CELL, row * CELL), CELL, CELL, alpha=0.35, color=colour))
        axes.annotate("", prior + offset, prior, arrowprops={"arrowstyle": "->", "color": "white"})
        axes.plot(*(prior + offset), "o", color="red", markersize=4)
    axes.imshow(image_3d_array, extent=(0, width, height, 0))  # last: it sets the limits
    axes.set(xticks=range(0, width + 1, CELL), yticks=range(0, height + 1, CELL))
    axes.grid(color="white", alpha=0.4)


def draw_grid(path: Path, image_3d_array, label_2d_array, *target_list) -> None:
    """Part of the image round its first keypoint, with what each cell there learns; softmax."""
    figure = Figure(figsize=(10, 6), layout="constrained")
    axes, bars = figure.subplots(1, 2, width_ratios=(7, 3))
    gt_offset_3d_array, gt_class_id_2d_array = (array[0] for array in target_list)
    draw_targets(axes, image_3d_array, gt_offset_3d_array, gt_class_id_2d_array)
    axes.plot(*make_priors(*gt_class_id_2d_array.shape).flatten(1), "w+", markersize=6)
    for row, column in np.argwhere(gt_class_id_2d_array):
        dx, dy = gt_offset_3d_array[:, row, column]
        y, side = (row * CELL + 2, "top") if dy > 0 else (row * CELL + 30, "bottom")
        axes.text(column * CELL + 1, y, f"{dx:.1f}, {dy:.1f}", va=side, fontsize=9, clip_on=True,
                  bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.6, "pad": 1})
    (_, _, x, y), (height, width, _) = label_2d_array[0], image_3d_array.shape
    axes.set(xlim=(max(0, x - 112), min(width, x + 112)),
             ylim=(min(height, y + 96), max(0, y - 96)), xlabel="x, px", ylabel="y, px",
             title="coloured cells learn the keypoint (red): class; dx, dy from their prior (+)")
    name_list, score_1d = ["background", "keyPoint_1", "keyPoint_2"], torch.tensor([0.0, 1, 3])
    bars.bar(name_list, score_1d, color="lightgrey", label="score")
    probability = bars.bar(name_list, score_1d.softmax(dim=0), width=0.5, label="probability")
    bars.bar_label(probability, fmt="%.2f")
    bars.set(title="softmax of one cell", ylim=(0, 4))
    bars.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    options = make_parser("Show the network, match and decode.", "your data").parse_args()
    image_3d_array, label_2d_array = example(options.data)
    show_shapes(image_3d_array)
    height, width, _ = image_3d_array.shape
    targets = match(label_2d_array, 1, height // CELL, width // CELL)
    show_match_and_decode(label_2d_array, *targets)
    path = options.data / "results" / "grid.png"
    draw_grid(path, image_3d_array, label_2d_array, *targets)
    print(f"\nwrote {path}\nnext: {command('03_train.py', options.data)}")


if __name__ == "__main__":
    run_main(main)
