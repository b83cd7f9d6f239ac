"""The documents: what they name exists, what they compute comes out, their figures are right.

README.md, its Chinese translation and docs/*.md. No test here pins a sentence, except the one that
states the measured result; the others look for names, links, commands and figures.
"""

import ast
import contextlib
import functools
import io
import json
import re

import numpy as np
import pytest

from conftest import REPOSITORY, load

model, train, analysis = load("02_model"), load("03_train"), load("06_model_analysis")

ENGLISH_PATH, CHINESE_PATH = REPOSITORY / "README.md", REPOSITORY / "docs" / "README.zh-CN.md"
DOCUMENT_LIST = [ENGLISH_PATH, *sorted((REPOSITORY / "docs").glob("*.md"))]
COMMAND_LIST = ["pip install -r requirements.txt && python 03_train.py",
                "pip install -r requirements.txt -r tests/requirements.txt && python -m pytest"]
SENTENCE_DICT = {  # the measured result: number of pictures, precision, recall, mean error
    ENGLISH_PATH: r"On the (\d+) test images: precision ([\d.]+), recall ([\d.]+), "
                  r"mean error ([\d.]+) px\.",
    CHINESE_PATH: r"在 (\d+) 张测试图片上：precision ([\d.]+)，recall ([\d.]+)，"
                  r"平均误差 ([\d.]+) px。"}
WORD_LIST = "no one two three four five six seven eight nine ten".split()
MOST_WORDS, LONGEST_LINE = 3600, 110  # of README.md
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

every_document = pytest.mark.parametrize("path", DOCUMENT_LIST, ids=lambda path: path.name)
both_languages = pytest.mark.parametrize("path", list(SENTENCE_DICT), ids=["English", "Chinese"])


# ---------------------------------------------------------------- taking a document apart

def read(path):
    return path.read_text(encoding="utf-8")


def read_doc(name):
    return read(REPOSITORY / "docs" / name)


def joined(text):
    """The text in one line, since a sentence, and code within it, may be wrapped anywhere."""
    return " ".join(text.split())


def blocks(text, language):
    """The fenced blocks of a language; "" are commands."""
    return [block for name, block in FENCE.findall(text) if name == language]


def code_list(text):
    """Pieces of code: the lines of all fenced blocks, and what stands between backticks."""
    line_list = [line for _, block in FENCE.findall(text) for line in block.splitlines()]
    return line_list + re.findall("`([^`]+)`", joined(FENCE.sub("", text)))


def table(text, first_title):
    """The rows, a list of cells each, of the first table whose head begins with `first_title`."""
    head = rf"^\| {re.escape(first_title)} \|.*\n\|[-| ]+\n"
    found = re.search(head + r"((?:\|.*(?:\n|$))+)", text, re.MULTILINE)
    assert found, f"there is no table that begins with {first_title}"
    return [[cell.strip() for cell in line.strip().strip("|").split("|")]
            for line in found[1].splitlines()]


def section(text, title):
    """What stands below a heading of the second level."""
    return re.split(rf"^## {title}.*\n", text, flags=re.MULTILINE)[1].split("\n## ")[0]


def figures(text):
    """Numbers with a point or with commas: those that somebody has measured or worked out."""
    return set(re.findall(r"\d+(?:[.,]\d+)+", text))


def measured_figures(path):
    found = re.search(SENTENCE_DICT[path], joined(read(path)))
    assert found, f"{path.name} lacks the sentence with the measured result"
    return found.groups()


def is_rounded(text, number):
    """Is `text` the number, rounded to the digits that it shows?

    >>> is_rounded("0.18", 0.1768), is_rounded("0.19", 0.1768)
    (True, False)
    """
    return abs(float(text) - number) <= 0.5001 * 10 ** -len(text.partition(".")[2])


# ---------------------------------------------------------------- taking a script apart

@functools.cache
def defined_names(path):
    """Functions, classes, methods (Class.method) and constants of a script, without running it."""
    name_set = set()
    for node in ast.parse(read(path)).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            name_set.add(node.name)
        if isinstance(node, ast.ClassDef):
            name_set |= {f"{node.name}.{inner.name}" for inner in node.body
                         if isinstance(inner, ast.FunctionDef)}
        if isinstance(node, ast.Assign):
            name_set |= {name.id for target in node.targets for name in ast.walk(target)
                         if isinstance(name, ast.Name)}
        if isinstance(node, ast.ImportFrom) and node.module == "common":
            name_set |= {name.name for name in node.names if name.name.isupper()}  # as CELL
    return name_set


def flags_of(path):
    """The flags of a script: its own, and --data, which common.py gives to all of them."""
    text = read(path) + read(REPOSITORY / "common.py")
    return set(re.findall(r'add_argument\("(--[\w-]+)"', text))


def script_list():
    return sorted(REPOSITORY.glob("0*.py"))


# ---------------------------------------------------------------- what must be there

@both_languages
def test_both_commands_stand_there_word_for_word(path):
    for command in COMMAND_LIST:
        assert f"\n```\n{command}\n```\n" in read(path)


@every_document
def test_no_place_is_left_unfilled(path):
    assert "@@" not in read(path)


@every_document
def test_all_links_and_pictures_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", read(path))):
        if re.match(r"https?:", target):
            continue
        file, _, anchor = target.partition("#")
        linked = path.parent / file if file else path
        assert linked.exists(), target
        if anchor:
            title_list = re.findall(r"^#+ (.*)", FENCE.sub("", read(linked)), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
                              for title in title_list], target


@both_languages
def test_both_languages_lead_to_each_document(path):
    linked_set = {(path.parent / target.partition("#")[0]).resolve()
                  for target in re.findall(r"\]\(([^)\s]+)\)", read(path))}
    assert {document.resolve() for document in DOCUMENT_LIST} - linked_set <= {path.resolve()}


def test_the_two_languages_lead_to_each_other_in_their_first_lines():
    assert "(docs/README.zh-CN.md)" in read(ENGLISH_PATH)[:200]
    assert "(../README.md)" in read(CHINESE_PATH)[:200]


def test_the_readme_can_be_read_in_one_sitting():
    text = read(ENGLISH_PATH)
    assert len(re.findall(r"\S*\w\S*", text)) <= MOST_WORDS
    for line in FENCE.sub("", text).splitlines():
        assert line.startswith("|") or len(line) <= LONGEST_LINE, line


def test_the_study_guide_has_32_questions_and_each_place_it_names_exists():
    block_list = re.findall(r"<details><summary>(\d+)\. (.*?)</summary>\n\nWhere: (.*?)\n\n(.*?)"
                            r"\n</details>", read_doc("study_guide.md"), re.DOTALL)
    assert [int(number) for number, *_ in block_list] == list(range(1, 33))
    for number, question, place, answer in block_list:
        name_set, named = None, []
        for token in re.findall("`([^`]+)`", place):
            path = REPOSITORY / token
            if path.is_file():
                name_set = defined_names(path) if path.suffix == ".py" else set()
            else:
                assert name_set is not None and token in name_set, f"{number}: there is no {token}"
                named.append(token)
        assert any(not name.isupper() for name in named), f"{number}: names no function"
        assert question.endswith("?") and answer.rstrip().endswith((".", ".)")), number


@every_document
def test_every_flag_that_is_shown_exists(path):
    known_set = set().union(*map(flags_of, script_list()))
    for code in code_list(read(path)):
        for script, rest in re.findall(r"\b(0\d_\w+\.py)([^&|;]*)", code):
            assert set(re.findall(r"(?<!\S)--[\w-]+", rest)) <= flags_of(REPOSITORY / script), code
        if code.startswith("--"):
            assert code.split()[0] in known_set, code


# ---------------------------------------------------------------- the two languages

def test_both_languages_show_the_same_blocks_and_commands():
    english, chinese = read(ENGLISH_PATH), read(CHINESE_PATH)
    assert FENCE.findall(english) == FENCE.findall(chinese)
    command_set, other_set = ({code for code in code_list(text) if code.startswith("python ")}
                              for text in (english, chinese))
    assert command_set == other_set


def test_both_languages_state_the_same_figures():
    assert measured_figures(ENGLISH_PATH) == measured_figures(CHINESE_PATH)
    assert figures(read(ENGLISH_PATH)) == figures(read(CHINESE_PATH))


@both_languages
def test_the_line_counts_are_those_of_the_scripts(path):
    count_dict = {}
    for file in script_list():
        line_list = read(file).splitlines()
        end, = [i for i, line in enumerate(line_list) if line.startswith("# ---- The lesson ends")]
        count_dict[file.name] = f"{end}, {len(line_list)}"
    told_dict = dict(re.findall(r"^\| \[(0\w+\.py)\]\(\S+\) \|[^|]*\| (\d+, \d+) \|", read(path),
                                re.MULTILINE))
    assert told_dict == count_dict
    told, = re.findall(r"\[common\.py\]\(\S+\)\s?[(（](\d+)", read(path))
    assert int(told) == len(read(REPOSITORY / "common.py").splitlines())


# ---------------------------------------------------------------- what was measured

@both_languages
def test_the_measured_result_is_that_of_the_default_run(path):
    result_dict = json.loads(read_doc("results.json"))
    _, *figure_list = measured_figures(path)
    for name, figure in zip(("precision", "recall", "mean_error_px"), figure_list):
        assert is_rounded(figure, result_dict[name]), (name, figure)


@pytest.mark.parametrize("path, p95_column", [(ENGLISH_PATH, 4),
                                              (REPOSITORY / "docs" / "results.md", 5)],
                         ids=["README", "results"])
def test_the_row_of_seed_0_is_that_of_the_default_run(path, p95_column):
    result_dict = json.loads(read_doc("results.json"))
    row, = [row for row in table(read(path), "seed") if row[0] == "0"]
    for name, figure in zip(("precision", "recall", "mean_error_px", "p95_px"),
                            (*row[1:4], row[p95_column])):
        assert is_rounded(figure, result_dict[name]), (name, figure)


@pytest.mark.parametrize("number", [0, 1], ids=["OKS", "whole pixels"])
def test_the_snippets_print_what_stands_below_them(number):
    block_list = blocks(read_doc("results.md"), "python")
    assert len(block_list) == 2
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(compile(block_list[number], f"results.md, snippet {number}", "exec"), {})
    printed_list = re.findall("^#> (.*)", block_list[number], re.MULTILINE)
    assert printed_list and output.getvalue().splitlines() == printed_list


def test_the_exercises_change_what_exists_and_their_answers_stand_elsewhere():
    text, experiments = section(read(ENGLISH_PATH), "Exercises"), read_doc("experiments.md")
    name_set = set().union(*map(defined_names, script_list()))
    row_list = table(text, "the line to change")
    assert len(row_list) >= 10
    for change, guess in row_list:
        assert "?" in guess and not re.search(r"\d\.\d{2}", guess), change
        assert f"| {change.split('.')[0]}. " in experiments, change  # the answer to this number
        left = " ".join(code.split(" = ")[0] for code in code_list(change))
        constant_list = re.findall(r"\b[A-Z][A-Z_]*\b", left)
        assert constant_list or re.search(r"0\d_\w+\.py|detection_loss", change), change
        constant_list = [name for name in constant_list if len(name) > 1 or name == "U"]
        assert set(constant_list) <= name_set, change


# ---------------------------------------------------------------- what follows from the code

def test_the_layer_table_is_that_of_the_network():
    network = model.KeypointNet(class_count=3)
    row_list = analysis.describe([*network.body, network.head], 3, 1920, 320)
    saved_list = analysis.predict_saved(row_list, 1)
    first_list = [i for i, row in enumerate(row_list) if row["kind"] == "conv"]
    expected_list = []
    for first, end in zip(first_list, [*first_list[1:], None]):
        conv, parameters = row_list[first], sum(row["parameters"] for row in row_list[first:end])
        saved = sum(saved_list[first:end])
        expected_list.append([
            ", ".join(map(str, conv["geometry"])),
            " x ".join(map(str, conv["out_shape"])), f"{conv['field'][0]} px", f"{parameters:,}",
            f"{conv['multiply_adds'] / 1e6:.1f}", f"{saved / analysis.MB:.2f}"])
    *layer_list, total = table(read(ENGLISH_PATH), "layer")
    assert [cell_list[1:] for cell_list in layer_list] == expected_list
    parameters = sum(row["parameters"] for row in row_list)
    work = sum(row["multiply_adds"] for row in row_list)
    assert total[-3:] == [f"{parameters:,}", f"{work / 1e6:.1f}",
                          f"{sum(saved_list) / analysis.MB:.2f}"]


def test_the_worked_example_is_what_match_says():
    gt_offset_4d_array, gt_class_id_3d_array = model.match(np.array([[0, 2, 67.81, 1340.67]]),
                                                           1, 60, 10)
    expected_list = []
    for row, column in np.argwhere(gt_class_id_3d_array[0]):
        dx, dy = gt_offset_4d_array[0, :, row, column]
        expected_list.append([f"{row}, {column}", f"({column * 32 + 16}, {row * 32 + 16})",
                              str(gt_class_id_3d_array[0, row, column]), f"{dx:.2f}, {dy:.2f}"])
    assert table(read(ENGLISH_PATH), "cell (row, column)") == expected_list


def test_the_constants_that_the_text_spells_out_are_those_of_the_scripts():
    size, _, centre = model.receptive_field()
    assert centre == model.CELL / 2  # a cell looks where its prior is, as the text says
    text = joined(read(ENGLISH_PATH))
    for phrase in (f"{model.CELL} x {model.CELL} px",
                   f"{1920 // model.CELL} x {320 // model.CELL} cells",
                   f"{model.OFFSET_UNIT:g} px", f"{model.REACH:g} px",
                   f"{size} x {size} px", f"{train.CROP} x {train.CROP} px",
                   f"{train.BATCH} crops", f"batch of {train.BATCH * train.STEPS_PER_UPDATE}",
                   f"halved {WORD_LIST[train.HALVINGS]} times", f"{100 * train.WARM_UP:g} % of"):
        assert re.search(rf"(?<![\d.,]){re.escape(phrase)}", text), phrase


def test_the_settings_that_the_study_guide_quotes_are_those_of_the_scripts():
    found_list = re.findall(r"`([A-Z_]+) = ([^`]+)`", read_doc("study_guide.md"))
    assert found_list
    for name, value in found_list:
        assert getattr(train, name) == ast.literal_eval(value), name


def test_the_sums_of_the_study_guide_come_out():
    text = joined(read_doc("study_guide.md"))
    left_side, right_side = r"([\d(][\d,.()]*(?: [-+x/] [\d,.()]+)+)", r"([\d,]*\d(?:\.\d+)?)"
    sum_list = re.findall(f"{left_side} = {right_side}", text)
    assert len(sum_list) >= 8
    for left, right in sum_list:
        value = eval(left.replace(",", "").replace("x", "*"))
        assert is_rounded(right.replace(",", ""), value), (left, right)
    assert f"= {model.receptive_field()[0]} px" in text


def test_the_default_run_as_printed_has_the_shape_that_the_scripts_print():
    training, evaluation, analysis_block, *_ = blocks(read_doc("results.md"), "text")
    line_list = training.splitlines()
    form = (rf"(\d+)/{train.UPDATES}  loss ([\d. ]+) = ([\d. ]+) \+ {train.U:g} x ([\d. ]+)  "
            r"lr \d\.\de-\d\d  +[\d.]+ ms a step, [\d.]+ waiting  \d+:\d\d left")
    for number, line in enumerate(line_list, start=1):
        update, loss, location, confidence = map(float, re.fullmatch(form, line).groups())
        assert update == number * train.SAVE_EVERY
        assert abs(loss - location - train.U * confidence) < 2e-4
    assert len(line_list) == train.UPDATES // train.SAVE_EVERY
    result_dict = json.loads(read_doc("results.json"))
    row, = re.findall(r"^   overall +([\d.]+) +([\d.]+) +[\d.]+ +\d+ +([\d.]+) +([\d.]+)$",
                      evaluation, re.MULTILINE)
    for name, figure in zip(("precision", "recall", "mean_error_px", "p95_px"), row):
        assert is_rounded(figure, result_dict[name]), (name, figure)
    assert re.findall(r"^(\d)\. ([A-Z]+):", analysis_block, re.MULTILINE) == [
        ("1", "SHAPES"), ("2", "PARAMETERS")]
