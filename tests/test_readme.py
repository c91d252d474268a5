"""The documentation against the code. The commands and examples of README.md itself are run by .ci/readme.py."""

from __future__ import annotations

import importlib.util
import re
import sys
from dataclasses import fields
from pathlib import Path
from types import ModuleType

import pytest

from gtddp_dist.options import Options

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")))


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def ci() -> ModuleType:
    """.ci/readme.py, which is no module of a package."""
    spec = importlib.util.spec_from_file_location("ci_readme", ROOT / ".ci" / "readme.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_examples_of_using_run(ci: ModuleType) -> None:
    """Top to bottom in one namespace, as the page says; an error shows the page's own line."""
    namespace: dict[str, object] = {"__name__": "using"}
    examples = [block for block in ci.blocks(read("docs/using.md")) if block.kind == "python"]
    assert len(examples) > 10
    for block in examples:
        exec(compile("\n" * block.line + block.text, str(ROOT / "docs/using.md"), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str, ci: ModuleType) -> None:
    text = read(page)
    for block in ci.blocks(text):
        text = text.replace(block.text, "")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if "://" in path:
            continue
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
            anchors = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in anchors, f"{page}: {target}"


@pytest.mark.parametrize("option", [option.name for option in fields(Options)])
def test_every_option_is_explained(option: str) -> None:
    page = read("docs/algorithm.md")
    assert f"| `{option}` |" in page, "not in the table of docs/algorithm.md"


def test_commands_of_the_readme_are_found(ci: ModuleType) -> None:
    """What .ci/readme.py would run; and it would notice a promise that does not hold."""
    found = ci.blocks(read("README.md"))
    texts = [block.text.strip() for block in found]
    assert "make train" in texts and set(ci.COVERED) <= set(texts)
    assert read("README.md").splitlines()[found[0].line - 1] == "```" + found[0].kind
    failing = ci.Block("bash", "echo seen; false; echo unseen", 7)
    with pytest.raises(SystemExit) as stop:
        ci.run(failing, ROOT, {"PATH": "/usr/bin:/bin"})
    message = str(stop.value)
    assert "line 7: exited with 1" in message and "echo seen; false" in message
    assert message.partition("--- output")[2].split() == ["seen", "---"]
