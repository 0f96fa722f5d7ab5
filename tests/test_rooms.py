"""The layout: rooms whose imports run downwards only, none larger than a fifth of the code (docs/architecture.md)."""

import ast
import importlib
from pathlib import Path

import pytest
import python_forks

PACKAGE = Path(__file__).parent.parent / "src" / "vjepa_ac_hf"
# From the bottom up. What stands side by side imports nothing of each other.
LAYERS = (
    {"flat"},  # shipped to the Hub
    {"console", "pages", "records"},
    {"convert_vjepa2_ac_to_hf", "recordings"},
    {"downloading", "inspection", "loading"},
    {"building", "evaluation"},
    {"envs", "planning", "training"},
    {"hub", "labelling"},
    {"app"},
    {"programs"},
)
LAYER = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
# `__init__` has the names that users import, `registration` has the libraries find them, `data` leads from names of
# before to where things are now.
OUTSIDE = {"__init__", "registration", "data"}
FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(file):
    first = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "flat" if first.endswith("_vjepa2_ac") else first


def imported_rooms(file):
    """Rooms that a file imports from, wherever in the file."""
    place = file.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == "vjepa_ac_hf"):
            parts = (node.module or "").split(".") if node.module else []
            if node.level:
                parts = [*place[: len(place) - node.level + 1], *parts]
            else:
                parts = parts[1:]
            for name in [parts[0]] if parts else [alias.name for alias in node.names]:
                yield room_of(PACKAGE / f"{name}.py")


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_run_downwards_only(file):
    room = room_of(file)
    if room in OUTSIDE:
        return
    for other in imported_rooms(file):
        assert other == room or LAYER[other] < LAYER[room], f"{room} imports {other}"


def test_no_room_is_larger_than_a_fifth_of_the_code():
    lines = {}
    for file in FILES:
        lines.setdefault(room_of(file), []).append(len(file.read_text().splitlines()))
    total = sum(sum(of) for of in lines.values())
    assert {room for room, of in lines.items() if sum(of) > total / 5 or len(of) > 22} == set()


@pytest.mark.parametrize("room", sorted(r for rooms in LAYERS[2:] for r in rooms if (PACKAGE / r).is_dir()))
def test_every_room_says_what_it_is_for_and_which_file_to_open(room):
    text = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text()))
    text = " ".join(text.split())
    assert "Open `" in text and text.split("Open `")[0].strip().endswith(".")
    named = text.split("Open `")[1].split("`")[0]
    assert (PACKAGE / room / named).exists() or (PACKAGE.parent.parent / named).exists()


def test_names_of_before_lead_to_the_same_things():
    from vjepa_ac_hf.data.loader import ClipLoader
    from vjepa_ac_hf.data.loading import load_clips

    loading = importlib.import_module("vjepa_ac_hf.loading")
    assert ClipLoader is loading.ClipLoader and load_clips is loading.load_clips


def test_every_module_can_be_imported_first():
    """No circles: each module alone, in a process of its own at the start of a room's chain, would find one."""
    modules = [
        ".".join(("vjepa_ac_hf", *file.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
        for file in FILES
        if file.parent.name != "envs" and file.name != "cluster.py" and file.name != "upload.py"
    ]
    code = (
        "import importlib, sys\n"
        "import vjepa_ac_hf\n"
        f"for name in {modules!r}:\n"
        "    for known in [m for m in sys.modules if m.startswith('vjepa_ac_hf.')]:\n"
        "        if not known.endswith('_vjepa2_ac'):\n"
        "            del sys.modules[known]\n"
        "    importlib.import_module(name)\n"
    )
    done = python_forks.run(["-c", code])
    assert done.returncode == 0, done.stderr
