"""The pieces of Python in docs/faq.md run, and print what stands below them; figures may differ."""

import contextlib
import importlib.util
import io
import re

import pytest

from conftest import REPOSITORY

FAQ = REPOSITORY / "docs" / "faq.md"


def python_blocks(text):
    """The fenced blocks of Python, as they stand.

    >>> python_blocks("Text.\\n```python\\nprint(1)\\n#> 1\\n```\\nMore.\\n```\\nls\\n```\\n")
    ['print(1)\\n#> 1\\n']
    """
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def missing_packages(block):
    """What a block imports and is not installed here.

    >>> missing_packages("import re\\nfrom no_such_package.part import name\\n")
    ['no_such_package']
    """
    name_list = re.findall(r"^(?:import|from) (\w+)", block, re.MULTILINE)
    return [name for name in name_list if importlib.util.find_spec(name) is None]


def told_output(block):
    """The lines `#> ...` at a block's end.

    >>> told_output("print(1)  #> no\\n#> 1\\n#> 2\\n")
    ['1', '2']
    """
    return re.findall(r"^#> (.*)$", block, re.MULTILINE)


def shape_of(line):
    """A line with each number, and the room it takes, replaced.

    >>> shape_of("numpy      in turn  49.2 ms") == shape_of("numpy in turn 149.0 ms")
    True
    >>> shape_of("Pillow: 1.8 ms") == shape_of("cv2: 1.8 ms")
    False
    """
    return " ".join(re.sub(r"-?\d[\d,]*(\.\d+)?", "0", line).split())


@pytest.mark.parametrize("number, block", list(enumerate(python_blocks(FAQ.read_text("utf-8")))))
def test_a_snippet_prints_what_stands_below_it(monkeypatch, number, block):
    missing_list = missing_packages(block)
    if missing_list:
        pytest.skip(f"not installed: {', '.join(missing_list)}")
    monkeypatch.chdir(REPOSITORY)  # from where a reader runs it
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(compile(block, f"{FAQ.name}, snippet {number}", "exec"), {})
    if told_output(block):
        assert list(map(shape_of, output.getvalue().splitlines())) == (
            list(map(shape_of, told_output(block))))
