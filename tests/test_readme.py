"""The README: what it names exists, what it computes comes out, and the figures it states are those that were measured."""

import ast
import contextlib
import io
import json
import re

import numpy as np
import pytest
from torch import nn

from conftest import REPOSITORY, load

ENGLISH_PATH, CHINESE_PATH = REPOSITORY / "README.md", REPOSITORY / "docs" / "README.zh-CN.md"
ENGLISH, CHINESE = (path.read_text(encoding="utf-8") for path in (ENGLISH_PATH, CHINESE_PATH))
COMMAND_LIST = ["pip install -r requirements.txt && python 03_train.py",
                "pip install -r requirements.txt -r tests/requirements.txt && python -m pytest"]
FIGURE_NAMES = ("precision", "recall", "mean_error_px", "p95_px")
WORD_LIST = ["never", "once", "twice", "three times", "four times", "five times", "six times", "seven times", "eight times"]

model, train, analysis = load("02_model"), load("03_train"), load("06_model_analysis")


def section(title):
    """The text below a heading, which may name scripts in brackets, up to the next heading of the same level or a higher one."""
    marks = title.split()[0]
    text = re.split(rf"\n{title}(?: \(.*\))?\n", ENGLISH)[1]
    return re.split(rf"\n#{{2,{len(marks)}}} ", text)[0]


def table_rows(text):
    """The cells of a table's rows, its head and the line below left out."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.split("\n") if line.startswith("|")][2:]


def blocks(text, language):
    """The fenced blocks of a language; "" are commands."""
    return [block for name, block in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL) if name == language]


def defined_names(path):
    """Functions, classes, methods (Class.method) and constants of a script, without running it."""
    name_set = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            name_set.add(node.name)
        if isinstance(node, ast.ClassDef):
            name_set |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
        if isinstance(node, ast.Assign):
            name_set |= {name.id for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    return name_set


# ---------------------------------------------------------------- what must be there

@pytest.mark.parametrize("text", [ENGLISH, CHINESE], ids=["English", "Chinese"])
def test_both_commands_stand_there_word_for_word_and_no_place_is_left_unfilled(text):
    for command in COMMAND_LIST:
        assert f"\n```\n{command}\n```\n" in text
    assert not re.findall("@@.*?@@", text)


@pytest.mark.parametrize("path", [ENGLISH_PATH, CHINESE_PATH], ids=["English", "Chinese"])
def test_all_links_and_pictures_lead_somewhere(path):
    text = path.read_text(encoding="utf-8")
    target_list = [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"https?:", target)]
    assert len(target_list) >= 8
    for target in target_list:
        file, _, anchor = target.partition("#")
        linked = path.parent / file if file else path
        assert linked.exists(), target
        if anchor:
            title_list = re.findall(r"^#+ (.*)", linked.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in title_list]


def test_the_two_languages_lead_to_each_other_in_their_first_lines():
    assert "(docs/README.zh-CN.md)" in "".join(ENGLISH.split("\n")[:4]) and "(../README.md)" in "".join(CHINESE.split("\n")[:4])


def test_the_study_guide_has_all_32_points_and_each_place_it_names_exists():
    row_list = table_rows(section("## Study guide"))
    assert [int(row[0].split(".")[0]) for row in row_list] == list(range(1, 33))
    for point, place, answer in row_list:
        name_set, named = None, 0
        for token in re.findall("`([^`]+)`", place):
            if (REPOSITORY / token).is_file():
                name_set = defined_names(REPOSITORY / token) if token.endswith(".py") else None
            else:
                assert name_set is not None and token in name_set, f"{point}: there is no {token}"
                named += 1
        assert named >= 1 and answer.endswith("."), point


def test_every_script_flag_that_is_shown_exists():
    for text in (ENGLISH, CHINESE):
        for script, rest in re.findall(r"python (0\d_\w+\.py)([^`\n&]*)", text):
            source = (REPOSITORY / script).read_text(encoding="utf-8")
            for flag in re.findall(r"--[\w-]+", rest):
                assert f'add_argument("{flag}"' in source, f"{script} {flag}"


# ---------------------------------------------------------------- what it states

def result_figures(text, pattern):
    found = re.search(pattern, " ".join(text.split()))
    assert found, "the README lacks the sentence with the measured result"
    return found.groups()


def english_figures():
    return result_figures(ENGLISH, r"Measured on the test split \((\d+) drawn pictures\): precision ([\d.]+), recall ([\d.]+), "
                                   r"mean error ([\d.]+) px, 95 % of those found within ([\d.]+) px")


def test_the_measured_result_is_that_of_the_default_run():
    path = REPOSITORY / "docs" / "results.json"
    if not path.is_file():
        pytest.skip("docs/results.json is not there yet")
    results = json.loads(path.read_text(encoding="utf-8"))
    for name, figure in zip(FIGURE_NAMES, english_figures()[1:]):
        assert float(figure) == pytest.approx(results[name], abs=0.5001 * 10 ** -len(figure.partition(".")[2])), name


def test_both_languages_give_the_same_figures_and_commands():
    assert blocks(ENGLISH, "") == blocks(CHINESE, "")
    inline = [set(re.findall(r"`(python 0\d_[^`]+)`", text)) for text in (ENGLISH, CHINESE)]
    assert inline[1] and inline[1] <= inline[0]
    chinese = result_figures(CHINESE, r"在测试集（(\d+) 张）上：precision ([\d.]+)，recall ([\d.]+)，平均误差 ([\d.]+) px，95 % 的误差小于 ([\d.]+) px")
    assert chinese == english_figures()


def test_no_other_figure_of_the_chinese_text_is_unknown_to_the_english_one():
    figure_set = [set(re.findall(r"\d+(?:[.,]\d+)+", text)) for text in (ENGLISH, CHINESE)]
    assert {"13.99", "0.74", "0.26", "237,797"} <= figure_set[1] <= figure_set[0]


@pytest.mark.parametrize("number", [0, 1], ids=["OKS", "whole pixels"])
def test_the_snippets_print_what_stands_below_them(number):
    block_list = blocks(ENGLISH, "python")
    assert len(block_list) == 2
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(compile(block_list[number], f"README.md, snippet {number}", "exec"), {})
    assert output.getvalue().splitlines() == re.findall("^#> (.*)", block_list[number], re.MULTILINE)


def test_the_exercises_quote_figures_that_were_measured():
    experiments = (REPOSITORY / "docs" / "experiments.md").read_text(encoding="utf-8")
    row_list = table_rows(section("## Exercises"))
    assert len(row_list) >= 10
    for change, _, measured in row_list:
        triple_list = re.findall(r"(\d\.\d{3}), (\d\.\d{3}), (\d\.\d\d)", measured)
        assert triple_list
        for triple in triple_list:
            assert f"| {' | '.join(triple)} |" in experiments, triple
        constant_list = [name for names in re.findall("`([A-Z][A-Z_, ]*)(?: =[^`]*)?`", change) for name in names.split(", ")]
        assert constant_list or "python 01_prepare_data.py" in change
        assert set(constant_list) <= defined_names(REPOSITORY / "02_model.py") | defined_names(REPOSITORY / "03_train.py")


def test_the_layer_table_is_that_of_the_network():
    network = model.KeypointNet(class_count=3)
    row_list = analysis.describe([*network.body, network.head], 3, 1920, 320)
    saved_list, first = analysis.predict_memory(row_list, 1)[0], 0
    table = table_rows(section("## The network, layer by layer"))
    block_list = analysis.split_blocks(row_list)
    assert len(table) == len(block_list) + 1
    for cell_list, block in zip(table, block_list):
        saved, first = sum(saved_list[first:first + len(block)]), first + len(block)
        conv, parameters = block[0], sum(row["parameters"] for row in block)
        assert cell_list[1:] == [f"{conv['kernel']}, {conv['stride']}, {conv['padding']}", " x ".join(map(str, conv["out_shape"])),
                                 f"{conv['size']} px", f"{parameters:,}", f"{conv['multiply_adds'] / 1e6:.1f}", f"{saved / 2 ** 20:.2f}"]
    total = sum(row["parameters"] for row in row_list)
    multiply_adds = model.multiply_adds(1920, 320)
    assert table[-1][-3:] == [f"{total:,}", f"{multiply_adds / 1e6:.1f}", f"{sum(saved_list) / 2 ** 20:.2f}"]


def test_the_other_order_of_bn_costs_what_the_text_says():
    size_list = []
    conv_list = [layer for layer in model.KeypointNet(3).body if isinstance(layer, nn.Conv2d)]
    for order in ("conv first", "conv last"):
        chain_list = []
        for conv in conv_list:
            norm = nn.BatchNorm2d(conv.out_channels if order == "conv first" else conv.in_channels)
            chain_list += [conv, norm, nn.ReLU(inplace=True)] if order == "conv first" else [norm, nn.ReLU(inplace=True), conv]
        row_list = analysis.describe(chain_list, 3, 1920, 320)
        size_list.append((sum(row["parameters"] for row in row_list), sum(analysis.predict_memory(row_list, 1)[0]) / 2 ** 20))
    (usual, usual_mb), (other, other_mb) = size_list
    text = " ".join(ENGLISH.split())
    assert f"{other:,} parameters in place of {usual:,} (head left out), but {other_mb:.2f} MB kept for backward in place of {usual_mb:.2f}" in text


def test_the_worked_example_is_what_match_says():
    gt_offset_4d_array, gt_class_id_3d_array = model.match(np.array([[0, 1, 100.25, 700.5]]), 1, 60, 10)
    row_list = table_rows(section("## Match and decode"))
    assert len(row_list) == np.count_nonzero(gt_class_id_3d_array) == 4
    for cell, prior, class_id, offset in row_list:
        row, column = map(int, cell.split(", "))
        assert prior == f"({column * 32 + 16}, {row * 32 + 16})"
        dx, dy = gt_offset_4d_array[0, :, row, column]
        assert int(class_id) == gt_class_id_3d_array[0, row, column] and offset == f"{dx:g}, {dy:g}"


def test_the_constants_that_the_text_spells_out_are_those_of_the_scripts():
    text = " ".join(ENGLISH.split())
    assert f"over a batch of {train.BATCH} crops" in text and f"may train on {train.CROP} x {train.CROP} crops" in text
    assert f"A batch of {train.BATCH * train.STEPS_PER_UPDATE} is learned from with the memory of {train.BATCH}." in text
    assert f"The learning rate is halved {WORD_LIST[train.HALVINGS]}, evenly over the run" in text
    assert f"turned by up to {train.TURN:g} degrees and zoomed by up to {train.ZOOM:.0%}".replace("%", " %") in text
    size, _, centre = model.receptive_field()
    assert f"{size} x {size} px round its prior" in text and centre == 16
