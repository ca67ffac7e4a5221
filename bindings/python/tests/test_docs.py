"""The examples of the documentation run."""

import functools
import re
from pathlib import Path

import pytest
import torch

PACKAGE = Path(__file__).parents[1]
PAGES = [PACKAGE / "README.md", PACKAGE.parents[1] / "docs/python.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples(page, monkeypatch):
    # The default compiles for minutes on some machines; test_library.py has it.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    if not page.is_file():
        pytest.skip(f"{page} is not here")
    text = page.read_text(encoding="utf-8")
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    assert blocks
    names = {}
    for block in blocks:
        # Empty lines before the code, so that errors name the page's own line.
        lines = text[: block.start(1)].count("\n")
        exec(compile("\n" * lines + block[1], str(page), "exec"), names)
