"""The map of the README and docs/architecture.md name files, functions and layers that exist, and leave none out."""

import ast
import re
from pathlib import Path

import pytest
from test_rooms import LAYERS

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "vjepa_ac_hf"
PAGE = (ROOT / "docs" / "architecture.md").read_text()
MAP = (ROOT / "README.md").read_text().split("## Rooms\n")[1].split("\nLicence:")[0]


def find(name: str) -> Path:
    """A file as the page names it: below the package, or below the repository."""
    return next(path for path in (PACKAGE / name, ROOT / name) if path.exists())


def definitions(file: Path) -> set[str]:
    """Names of classes, functions, methods (`Class.method`) and constants."""
    found = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            found.add(node.name)
            members = node.body if isinstance(node, ast.ClassDef) else []
            found |= {f"{node.name}.{member.name}" for member in members if isinstance(member, ast.FunctionDef)}
    return found


def blocks(text: str) -> list[str]:
    """Table rows, and paragraphs or entries of a list."""
    return [block for block in re.split(r"\n(?=[-|])|\n\n", text) if "`" in block]


@pytest.mark.parametrize("block", blocks(PAGE), ids=lambda block: block[:40])
def test_files_and_functions_of_the_page_exist(block):
    named = re.findall(r"`([\w/]+\.(?:py|md))(?::([\w.]+))?`", block)
    files = [find(name) for name, _ in named if name != "file.py"]
    for name, definition in named:
        if definition and name != "file.py":
            assert definition in definitions(find(name)), f"{name} has no {definition}"
    # Other names stand beside a file that has them.
    for word in re.findall(r"`([A-Za-z_]+)`", block):
        assert any(re.search(rf"\b{word}\b", file.read_text()) for file in files), word


def test_the_page_has_the_layers_that_the_imports_are_held_to():
    rows = re.findall(r"^\| (\d) \| (.*) \|$", PAGE.split("## Layers")[1].split("\n## ")[0], flags=re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(len(LAYERS), 0, -1))
    for (_, text), rooms in zip(rows[:-1], reversed(LAYERS[1:]), strict=True):
        assert {name.removesuffix(".py").rstrip("/") for name in re.findall(r"`([\w./]+)`", text)} == rooms


def test_the_five_answers_name_a_file_and_its_test():
    answers = re.findall(r"^- \*\*(.*?)\*\*: `([\w/.]+)`(.*?)(?=^- |\Z)", PAGE, flags=re.MULTILINE | re.DOTALL)
    subjects = ("repair of the log", "choose clips", "figure in the report", "solver", "tracker")
    assert len(answers) == 5
    for (title, file, rest), subject in zip(answers, subjects, strict=True):
        assert subject in title and find(file).exists()
        tests = re.search(r"Test:\s+`(tests/\w+\.py)`", rest)
        assert tests, title
        # The test is of that room.
        room = file.split("/")[0]
        assert re.search(rf"from vjepa_ac_hf\.{room}\b", (ROOT / tests.group(1)).read_text()), title


def test_the_map_has_every_room_and_the_file_that_it_says_to_open():
    rows = re.findall(r"^\| `(\w+)/` \| .* \| `([\w./]+)` \|$", MAP, flags=re.MULTILINE)
    assert sorted(room for room, _ in rows) == sorted(
        room for layer in LAYERS[2:] for room in layer if (PACKAGE / room).is_dir()
    )
    layer_of = {room: level for level, layer in enumerate(LAYERS) for room in layer}
    levels = [layer_of[room] for room, _ in rows]
    assert levels == sorted(levels)  # imports run upwards in the table
    for room, first in rows:
        text = " ".join(ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text())).split())
        assert f"Open `{first}` first." in text, room
    assert len(MAP.splitlines()) < 45


def test_the_map_has_every_program():
    programs = {
        str(file.relative_to(ROOT)) for room in ("examples", "dataset_scripts") for file in ROOT.glob(f"{room}/*.py")
    }
    assert set(re.findall(r"`((?:examples|dataset_scripts)/\w+\.py)`", MAP)) == programs


def test_no_page_names_a_module_of_before_the_rooms():
    rooms = "|".join(room for layer in LAYERS[2:] for room in layer)
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    for page in pages:
        text = page.read_text()
        assert not re.findall(r"(?<![\w/])(?:vjepa_ac_hf/)?data/\w+\.py|vjepa_ac_hf\.data\.\w+", text), page.name
        for name in re.findall(rf"`((?:{rooms})/\w+\.py)", text):
            assert (PACKAGE / name).exists(), f"{page.name}: {name}"
