"""02_model.py: the network, the grid, match and decode, folding BN, an image in and keypoints out.

Loading weights, good and bad, stands in test_weights.py.
"""

import math
import shutil

import numpy as np
import pytest
import torch

import common
from common import CELL
from conftest import Sees, load, perfect_output

model = load("02_model")

ABOUT_DICT = {"category_list": ["background", "left", "right"], "box_size": [30.0, 20.0],
              "max_per_class": 1, "scale": 1.0, "checksum_list": []}


def random_network(class_count=3, seed=0):
    """A network as training might leave it: BN with statistics, factors and summands of its own."""
    torch.manual_seed(seed)
    network = model.KeypointNet(class_count).eval()
    for layer in network.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.3)
            layer.running_var.uniform_(0.2, 2)
            layer.weight.data.uniform_(0.5, 1.5)
            layer.bias.data.normal_(0, 0.3)
    return network


# ---------------------------------------------------------------- the network

@pytest.mark.parametrize("rows, columns, class_count", [(60, 10, 3), (1, 1, 2), (13, 13, 18)])
def test_each_cell_gets_two_offsets_and_a_score_a_class(rows, columns, class_count):
    network = model.KeypointNet(class_count).eval()
    with torch.no_grad():
        output_4d = network(torch.zeros(1, 3, rows * CELL, columns * CELL, dtype=torch.uint8))
    assert output_4d.shape == (1, 2 + class_count, rows, columns)
    assert output_4d.dtype == torch.float32


def test_a_cell_looks_where_its_prior_is_by_formula_and_by_gradient():
    network = model.KeypointNet(3).eval()
    for parameter in network.parameters():  # positive and equal: nothing cancels, no ReLU is shut
        parameter.data.fill_(0.01 if parameter.dim() == 4 else 1)
    size, jump, centre = model.receptive_field()
    assert jump == CELL and abs(centre - CELL / 2) <= 1
    cells = 2 * math.ceil(size / 2 / CELL) + 1  # so many that the middle cell sees no edge
    image_4d = torch.ones(1, 3, cells * CELL, cells * CELL, requires_grad=True)
    middle = cells // 2
    network(image_4d)[0, 0, middle, middle].backward()
    gradient_2d = image_4d.grad[0].abs().sum(dim=0)
    prior = (middle + 0.5) * CELL
    for dim in (0, 1):
        profile = gradient_2d.sum(dim=dim).double().numpy()
        seen = np.flatnonzero(profile)
        assert seen[-1] - seen[0] + 1 == size
        assert abs((seen[0] + seen[-1] + 1) / 2 - prior) <= 1
        assert abs(profile @ (np.arange(len(profile)) + 0.5) / profile.sum() - prior) <= 1


def test_folding_bn_into_the_convolutions_changes_no_answer_and_not_the_network():
    network = random_network()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    folded = model.fold_batch_norm(network)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert not folded.training
    assert not any(isinstance(layer, torch.nn.BatchNorm2d) for layer in folded.modules())
    image_4d = torch.randint(0, 256, (2, 3, 96, 64), dtype=torch.uint8)
    with torch.no_grad():
        before_4d, after_4d = network(image_4d), folded(image_4d)
    assert (before_4d - after_4d).abs().max() <= 1e-5 * before_4d.abs().max()
    assert before_4d.std() > 1e-2  # a network that says nothing would agree with anything


# ---------------------------------------------------------------- match

def test_priors_are_the_centres_of_the_cells():
    prior_3d = model.make_priors(3, 2)
    assert prior_3d.shape == (2, 3, 2)
    assert prior_3d[0].tolist() == [[CELL / 2, CELL * 1.5]] * 3
    assert prior_3d[1, :, 0].tolist() == [CELL / 2, CELL * 1.5, CELL * 2.5]


def cells_that_learn(x, y, rows=3, columns=3):
    """(row, column) of each cell that a keypoint at this place teaches."""
    _, gt_class_id_3d_array = model.match(np.array([(0, 1, x, y)]), 1, rows, columns)
    return list(map(tuple, np.argwhere(gt_class_id_3d_array[0] == 1).tolist()))


@pytest.mark.parametrize("x, y, expected", [
    (48, 48, [(1, 1)]),  # in the middle of its cell: no other is near
    (39, 48, [(1, 0), (1, 1)]),
    (48, 60, [(1, 1), (2, 1)]),
    (39, 60, [(1, 0), (1, 1), (2, 0), (2, 1)]),
    (40, 56, [(1, 1)]),  # 8 px from both borders
    (32, 32, [(0, 0), (0, 1), (1, 0), (1, 1)]),  # on a corner
    (0, 0, [(0, 0)]), (95.99, 95.99, [(2, 2)]),
    (-4, 39, [(0, 0), (1, 0)]), (39, 100, [(2, 0), (2, 1)]), (-4, -4, [(0, 0)]),  # just outside
    (-40, 16, []), (16, -40, []), (136, 16, []), (16, 136, []), (-9999, 16, [])])  # far outside
def test_a_keypoint_teaches_its_own_cell_and_the_nearest_beside_it(x, y, expected):
    assert cells_that_learn(x, y) == expected


def test_every_cell_that_learns_learns_the_way_from_its_prior_to_the_keypoint():
    label_2d_array = np.array([(0, 1, 70.5, 60.25), (1, 2, 33, 1)], np.float32)
    gt_offset_4d_array, gt_class_id_3d_array = model.match(label_2d_array, 2, 4, 5)
    assert gt_offset_4d_array[0, :, 1, 2].tolist() == [70.5 - 80, 60.25 - 48]
    place_4d_array = gt_offset_4d_array + model.make_priors(4, 5).numpy()
    for image, class_id, x, y in label_2d_array:
        learns = gt_class_id_3d_array[int(image)] == class_id
        assert learns.sum() > 1
        assert np.allclose(place_4d_array[int(image)][:, learns].T, (x, y))
    assert not gt_offset_4d_array.transpose(0, 2, 3, 1)[gt_class_id_3d_array == 0].any()


def test_of_two_keypoints_in_one_cell_the_one_nearer_to_the_prior_has_it():
    near, far = (0, 1, 45, 50), (0, 2, 34, 34)
    for label_list in ([near, far], [far, near]):
        gt_offset_4d_array, gt_class_id_3d_array = model.match(np.array(label_list), 1, 3, 3)
        assert gt_class_id_3d_array[0, 1, 1] == 1
        assert gt_offset_4d_array[0, :, 1, 1].tolist() == [-3, 2]
        assert gt_class_id_3d_array[0, 0, 0] == 2  # a cell beside it answers for the other


def test_the_own_cell_of_a_keypoint_is_never_given_to_a_neighbours_keypoint():
    first, second = (0, 1, 31.5, 16), (0, 2, 62, 2)  # the second is hardly nearer to its own prior
    for label_list in ([first, second], [second, first]):
        _, gt_class_id_3d_array = model.match(np.array(label_list), 1, 2, 3)
        assert gt_class_id_3d_array[0, 0, :2].tolist() == [1, 2]


def test_images_without_keypoints_match_to_background_only():
    gt_offset_4d_array, gt_class_id_3d_array = model.match(np.zeros((0, 4)), 2, 4, 3)
    assert gt_offset_4d_array.shape == (2, 2, 4, 3) and gt_class_id_3d_array.shape == (2, 4, 3)
    assert gt_offset_4d_array.dtype == np.float32 and gt_class_id_3d_array.dtype == np.int64
    assert not gt_offset_4d_array.any() and not gt_class_id_3d_array.any()


# ---------------------------------------------------------------- decode

def places_all_over_the_grid(rows=60, columns=10):
    """Random places, and all kinds of places on borders and in corners of cells and image."""
    place_list = list(np.random.default_rng(0).uniform(0, (columns * CELL, rows * CELL), (100, 2)))
    near = (0, 1e-3, 0.5, CELL / 2, CELL - 1e-2)
    return place_list + [
        (column * CELL + x, row * CELL + y) for column in (0, 1, columns - 1)
        for row in (0, rows // 2, rows - 1) for x in near for y in near]


@pytest.mark.parametrize("max_per_class", [1, 3])
def test_match_then_decode_is_the_identity_all_over_the_grid(max_per_class):
    label_2d_array = np.array([(i, 1 + i % 2, x, y) for i, (x, y)
                               in enumerate(places_all_over_the_grid())], np.float32)
    output_4d = perfect_output(label_2d_array, len(label_2d_array), 60, 10)
    result_list = model.decode(output_4d, max_per_class)
    assert len(result_list) == len(label_2d_array)
    for (_, class_id, x, y), (keypoint_2d, class_id_1d, score_1d) in zip(label_2d_array,
                                                                         result_list):
        assert class_id_1d.tolist() == [class_id] and score_1d[0] > 0.99
        assert np.abs(keypoint_2d[0].numpy() - (x, y)).max() <= 1e-3


def scores(class_count, rows, columns, score_dict):
    """Output with these probabilities {(class_id, row, column): score}, and nearly 0 elsewhere."""
    output_4d = torch.zeros(1, 2 + class_count, rows, columns)
    output_4d[:, 2] = 12
    for (class_id, row, column), score in score_dict.items():
        output_4d[0, 2, row, column] = 0
        output_4d[0, 3:, row, column] = -30
        output_4d[0, 2 + class_id, row, column] = math.log(score / (1 - score))
    return output_4d


def answers(output_4d, **options):
    """What decode finds, as sorted (class id, cell row, cell column, score to two places)."""
    keypoint_2d, class_id_1d, score_1d = model.decode(output_4d, **options)[0]
    return sorted((class_id, int(y // CELL), int(x // CELL), round(score, 2))
                  for (x, y), class_id, score in
                  zip(keypoint_2d.tolist(), class_id_1d.tolist(), score_1d.tolist()))


def test_the_score_is_the_probability_of_the_class_in_its_cell():
    output_4d = torch.zeros(1, 5, 2, 2)
    output_4d[0, 2:, 1, 0] = torch.tensor([0.0, 3.0, 1.0])  # exp: 1, 20.1, 2.7
    (_, class_id_1d, score_1d), = model.decode(output_4d, threshold=0.34)  # elsewhere 1/3 each
    assert class_id_1d.tolist() == [1] and score_1d.item() == pytest.approx(0.8438, abs=1e-4)


def test_the_best_cell_of_a_class_answers_or_every_local_best_where_an_image_holds_several():
    output_4d = scores(3, 6, 6, {(1, 0, 0): 0.8, (1, 1, 1): 0.7, (1, 4, 4): 0.9, (2, 2, 2): 0.6})
    assert answers(output_4d) == [(1, 4, 4, 0.9), (2, 2, 2, 0.6)]
    assert answers(output_4d, max_per_class=2) == [(1, 0, 0, 0.8), (1, 4, 4, 0.9), (2, 2, 2, 0.6)]


@pytest.mark.parametrize("max_per_class", [1, 2])
def test_a_score_equal_to_the_threshold_answers_and_one_below_does_not(max_per_class):
    output_4d = scores(3, 3, 3, {(1, 1, 1): 0.4})
    assert answers(output_4d, max_per_class=max_per_class) == []  # the threshold is 0.5
    (_, _, score_1d), = model.decode(output_4d, max_per_class, 0.3)
    score = score_1d.numpy()[0]  # float32
    above = np.nextafter(score, np.float32(1))
    for threshold, count in ((float(score), 1), (float(score) + 1e-10, 1), (float(above), 0)):
        (_, class_id_1d, _), = model.decode(output_4d, max_per_class, threshold)
        assert len(class_id_1d) == count, (threshold, float(score))


@pytest.mark.parametrize("max_per_class", [1, 2])
def test_two_cells_that_are_equally_sure_give_one_answer(max_per_class):
    output_4d = scores(3, 4, 4, {(1, 1, 1): 0.9, (1, 1, 2): 0.9})
    output_4d[0, 3, 1, 1:3] = 60  # softmax rounds both to exactly 1, as in a well trained network
    output_4d[0, 0, 1, 1], output_4d[0, 0, 1, 2] = 0.9, -0.9  # they mean places 3.2 px apart
    assert [answer[0] for answer in answers(output_4d, max_per_class=max_per_class)] == [1]


def test_with_several_of_a_class_a_cell_between_two_keypoints_silences_neither():
    """Three cells apart: the cell between them has learned the left one and is surest of all."""
    output_4d = scores(3, 3, 5, {(1, 1, 1): 0.8, (1, 1, 2): 0.99, (1, 1, 3): 0.9})
    output_4d[0, 0, 1, 2] = -1.4  # 22 px to the left: in the cell beside it
    assert [cell[:3] for cell in answers(output_4d, max_per_class=3)] == [(1, 1, 1), (1, 1, 3)]


@pytest.mark.parametrize("row, column", [(0, 0), (0, 2), (1, 1), (2, 2)])
def test_a_cell_whose_answer_lies_far_outside_of_it_is_silent_wherever_it_is(row, column):
    output_4d = scores(3, 3, 3, {(1, row, column): 0.9})
    output_4d[0, 0] = -1.4 if column == 2 else 1.4  # all cells answer 22 px beside their prior
    output_4d[0, 1] = 1.4 if row == 0 else -1.4
    assert answers(output_4d, max_per_class=2) == []


@pytest.mark.parametrize("x", [-7.5, -3.0, 5.0, 195.0, 199.5])
def test_a_keypoint_just_outside_is_found_also_where_an_image_holds_several(x):
    output_4d = perfect_output(np.array([[0, 1, x, 40], [0, 1, 100, 40]]), 1, 4, 6)
    (keypoint_2d, _, _), = model.decode(output_4d, max_per_class=2)
    assert sorted(keypoint_2d[:, 0].tolist()) == sorted([x, 100])


# ---------------------------------------------------------------- an image in, keypoints out

@pytest.mark.parametrize("max_per_class", [1, 3])
def test_find_keypoints_is_the_network_and_decode_and_rounds_nothing(max_per_class):
    network, about_dict = random_network(), {**ABOUT_DICT, "max_per_class": max_per_class}
    image_3d_array = np.random.default_rng(0).integers(0, 256, (96, 160, 3), dtype=np.uint8)
    keypoint_list, map_3d_array = model.find_keypoints(network, about_dict, image_3d_array, 0.1)
    with torch.no_grad():
        output_4d = network(torch.from_numpy(image_3d_array).permute(2, 0, 1)[None])
    expected_list = [
        {"class": ABOUT_DICT["category_list"][class_id], "x": x, "y": y, "score": score,
         "box": [x - 15, y - 10, x + 15, y + 10]} for (x, y), class_id, score
        in zip(*(part.tolist() for part in model.decode(output_4d, max_per_class, 0.1)[0]))]
    assert keypoint_list == expected_list and len(keypoint_list) >= 1
    assert map_3d_array.shape == (2, 3, 5)
    assert np.allclose(map_3d_array, output_4d[0, 2:].softmax(dim=0)[1:])


def test_find_keypoints_takes_images_of_any_size_and_gives_px_of_the_image():
    for height, width in ((96, 96), (70, 75), (65, 100), (300, 90)):
        image_3d_array = np.zeros((height, width, 3), np.uint8)
        image_3d_array[60, 70] = (255, 0, 0)
        image_3d_array.flags.writeable = False  # as a mapped data set is
        (keypoint,), map_3d_array = model.find_keypoints(Sees().eval(), ABOUT_DICT, image_3d_array)
        assert keypoint["class"] == "right" and keypoint["score"] > 0.99
        assert np.allclose((keypoint["x"], keypoint["y"]), (70.5, 60.5), atol=0.01)
        assert np.allclose(keypoint["box"], (55.5, 50.5, 85.5, 70.5), atol=0.01)
        assert map_3d_array.shape == (2, -(-height // CELL), -(-width // CELL))


def test_what_lies_in_the_padding_with_all_of_its_box_is_no_keypoint(monkeypatch):
    """40 x 50 px are padded to 64 x 64; the box is 30 x 20 px."""
    inside_list = [(20, 25), (50, 25), (20, 55), (-10, 25), (20, -5)]
    place_list = [*inside_list, (60, 25), (20, 65), (-15, 25), (20, -10)]
    count = len(place_list)
    result = torch.tensor(place_list), torch.ones(count, dtype=int), torch.ones(count)
    monkeypatch.setattr(model, "decode", lambda *arguments: [result])
    image_3d_array = np.zeros((50, 40, 3), np.uint8)
    found_list, _ = model.find_keypoints(Sees().eval(), ABOUT_DICT, image_3d_array)
    assert [(found["x"], found["y"]) for found in found_list] == inside_list


def test_the_default_folder_shows_a_sample_with_its_label():
    image_3d_array, label_2d_array = model.example(common.DATA_FOLDER)
    path = common.DATA_FOLDER / "sample" / "00635"
    assert np.array_equal(image_3d_array, common.read_image(path.with_suffix(".jpg")))
    (label,) = load("01_prepare_data").read_labels(path.with_suffix(".xml"), 320, 1920)
    xmin, ymin, xmax, ymax = label["box"]
    centre = (xmin + xmax) / 2, (ymin + ymax) / 2
    assert np.allclose(label_2d_array, [[0, int(label["class"][-1]), *centre]], atol=0.01)


def test_another_folder_shows_its_first_image_with_a_keypoint(own, tmp_path):
    data = shutil.copytree(own, tmp_path / "data")
    label_2d_array = np.load(own / "train_labels.npy")
    label_2d_array = label_2d_array[label_2d_array[:, 0] >= 2]  # as if two images held none
    np.save(data / "train_labels.npy", label_2d_array)
    image_3d_array, shown_2d_array = model.example(data)
    first = label_2d_array[0, 0]
    assert np.array_equal(image_3d_array, np.load(data / "train_images.npy")[int(first)])
    assert np.array_equal(shown_2d_array[:, 1:],
                          label_2d_array[label_2d_array[:, 0] == first][:, 1:])
    assert not shown_2d_array[:, 0].any()  # image 0 of the one that is shown
