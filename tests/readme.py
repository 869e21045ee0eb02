"""The commands that the README and the guides show."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[1]


def commands(section: str, page: str = "README.md") -> list[list[str]]:
    """The shell commands under a heading of a page, split into words, comments removed: in a guide
    those that are no runs of a recipe (see `test_docs`).
    """
    language = "bash" if page == "README.md" else "sh"
    text = (ROOT / page).read_text()
    body = re.split(r"^## ", text.split(f"## {section}\n")[1], flags=re.MULTILINE)[0]
    blocks = re.findall(rf"```{language}\n(.*?)```", body, flags=re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.strip()]
    return [shlex.split(line, comments=True) for line in lines]
