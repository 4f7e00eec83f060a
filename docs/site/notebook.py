"""The tutorial as a notebook: its text and its blocks of Python, cell by cell, without outputs.

python docs/site/notebook.py      # writes docs/tutorial.ipynb from docs/tutorial.md
"""

import json
import re
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(markdown: str) -> list[str]:
    """The Python of a page, block by block."""
    return BLOCK.findall(markdown)


def notebook(markdown: str) -> str:
    """The page as the JSON of a notebook (nbformat 4.5)."""
    cells = []
    for i, part in enumerate(BLOCK.split(markdown)):  # text and code in turns
        lines = part.strip("\n").splitlines(keepends=True)
        cell = {"cell_type": "code", "execution_count": None, "outputs": []} if i % 2 else {"cell_type": "markdown"}
        if lines:
            cells.append(cell | {"id": f"cell-{i}", "metadata": {}, "source": lines})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    made = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(made, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    page = (DOCS / "tutorial.md").read_text(encoding="utf-8")
    (DOCS / "tutorial.ipynb").write_text(notebook(page), encoding="utf-8")
