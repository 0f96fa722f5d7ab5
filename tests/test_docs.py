"""The pages for strangers say what is so: configuration keys, error messages, costs, citation, links, commands."""

import ast
import json
import re
import shlex
import sys
import tomllib
import types
from dataclasses import fields
from pathlib import Path

import datasets
import numpy as np
import pytest
import yaml
from helpers_clips import write_clips
from helpers_data import make_video
from helpers_training import load_program
from test_modeling import tiny_model
from test_programs import parser_of
from transformers import PreTrainedConfig, VJEPA2Config

from vjepa_ac_hf import ActionStatistics, VJEPA2ACConfig, VJEPA2ACForFrameDecoding, VJEPA2ACProcessor
from vjepa_ac_hf.configuration_encoder_vjepa2_ac import EncoderFields
from vjepa_ac_hf.programs.command import PROGRAMS
from vjepa_ac_hf.programs.command import run as run_program
from vjepa_ac_hf.recordings.log import PRESSED_COLUMNS, parse_recording
from vjepa_ac_hf.training.presets import PRESETS, build_config

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"


def table(page: str, heading: str) -> list[list[str]]:
    """Rows of the first table below a heading, without its head."""
    text = (DOCS / page).read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line[:1] == "|"]
    return rows[2:]


def named(cell: str) -> list[str]:
    return re.findall(r"`([\w-]+)`", cell)


def value_of(cell: str) -> object:
    """A default as the page writes it: JSON, or a bare word."""
    text = cell.strip("`")
    return json.loads(text) if re.fullmatch(r"true|false|[\d.e-]+", text) else text


def test_every_key_of_a_model_configuration_is_explained(tmp_path):
    (tmp_path / "own.json").write_text("{}")
    config = build_config(str(tmp_path / "own.json"))
    rows = {name: row for row in table("model-config.md", "Keys") for name in named(row[0])}
    assert rows.keys() == VJEPA2ACConfig.own_fields().keys()
    literal = {name: value_of(row[1]) for name, row in rows.items() if re.fullmatch(r"`[^`]+`", row[1])}
    assert literal.pop("action_space") == "vpt-13" and config.action_space == build_config("tiny").action_space
    assert len(literal) >= 10
    assert {name: getattr(config, name) for name in literal} == literal
    assert (config.frame_size, config.resolution, config.action_dim) == (None, 256, 13)
    sizes = (config.pred_hidden_size, config.pred_num_hidden_layers, config.pred_num_attention_heads)
    assert sizes == (1024, 24, 16)


def test_every_key_of_an_encoder_is_explained():
    rows = {name: row for row in table("model-config.md", "Keys of `encoder_config`") for name in named(row[0])}
    framework = {field.name for field in fields(PreTrainedConfig)}
    own = {field.name for kind in (VJEPA2Config, EncoderFields) for field in fields(kind)} - framework
    assert rows.keys() == {name for name in own if not name.startswith("pred_")}
    defaults = {field.name: field.default for field in fields(EncoderFields)} | vars(VJEPA2Config())
    assert rows.pop("hierarchical_layers")[1] == "none" and defaults["hierarchical_layers"] is None
    assert {name: value_of(row[1]) for name, row in rows.items()} == {name: defaults[name] for name in rows}


def test_every_preset_is_explained():
    text = (DOCS / "model-config.md").read_text().split("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \| .* \| (\d+) \| .* \|$", text, re.MULTILINE)
    tokens = {name: int(count) for names, count in rows for name in named(names)}
    assert tokens == {name: build_config(name).num_tokens for name in PRESETS}


# ------------------------------------------------------------------------------------------------ error messages


def texts_of(file: Path) -> list[str]:
    """The texts of a source file, what is filled in being a NUL character."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.JoinedStr):
            found.append("".join(v.value if isinstance(v, ast.Constant) else "\0" for v in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(re.sub(r"%[sdr]|%\.\d+[fg]", "\0", node.value))
    return found


@pytest.fixture(scope="module")
def said() -> str:
    files = [*(ROOT / "src").rglob("*.py"), *(ROOT / "examples").glob("*.py"), *(ROOT / "dataset_scripts").glob("*.py")]
    files.append(Path(datasets.data_files.__file__))  # the one message that is not ours
    return "\1".join(text for file in files for text in texts_of(file))


MESSAGES = [
    cell
    for line in (DOCS / "errors.md").read_text().splitlines()
    if line.startswith("| `")
    for cell in re.findall(r"^\| `([^`]*)`", line)
]


@pytest.mark.parametrize("message", MESSAGES)
def test_messages_that_are_explained_are_said(message, said):
    parts = [part for part in re.split(r"\.\.\.", message) if part.strip()]
    assert max(map(len, parts)) >= 8
    # What is fixed comes in this order within one text; between it, what is filled in.
    assert re.search("[^\1]*".join(map(re.escape, parts)), said), message


def test_many_messages_are_explained():
    assert len(MESSAGES) == len(set(MESSAGES)) >= 50


# ------------------------------------------------------------------------------------------------ links, citation


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted(DOCS.glob("*.md"))], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    def anchors(file: Path) -> set[str]:
        headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
        return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}

    for target in re.findall(r"\]\(((?!http)[^)]+)\)", page.read_text()):
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_the_citation_file_is_valid():
    """What the schema of CFF 1.2.0 requires (citation-file-format/citation-file-format, schema.json)."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    allowed = {"abstract", "authors", "cff-version", "keywords", "license", "message", "references", "title", "type"}
    assert citation.keys() <= allowed | {"version"}
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (str(citation["version"]), citation["license"]) == (project["version"], project["license"])
    assert (
        citation["title"] == project["name"] and citation["abstract"].split() == (project["description"] + ".").split()
    )
    for work in (citation, *citation["references"]):
        assert work["title"] and work["authors"]
        for author in work["authors"]:
            assert author.keys() in ({"name"}, {"family-names", "given-names"})
    for reference in citation["references"]:
        assert {"type", "title", "authors"} <= reference.keys() and reference["type"] == "article"
        assert re.fullmatch(r"https://arxiv\.org/abs/\d{4}\.\d{5}", reference["url"])


# ------------------------------------------------------------------------------------------------ own recordings

PAGE = (DOCS / "own-recordings.md").read_text()


def test_the_example_recording_is_read_as_the_page_says():
    example = DOCS / "example-recording" / "anna-0123456789ab-20260102-153000.jsonl"
    recording = parse_recording(example.read_bytes(), example.stem)
    assert sum(recording.repairs.values()) == recording.repairs["hotbar_injected"] == 0  # key 2 was pressed for it
    assert recording.num_ticks == 4 and recording.hotbar.tolist() == [0, 0, 0, 1]
    assert (recording.mouse_dx.tolist(), recording.mouse_dy.tolist()) == ([0, 20, 20, 0], [0, 0, -10, 0])
    # The view of a line is what the lines before have made of it, at 0.15 degrees a count.
    np.testing.assert_allclose(recording.yaw, 0.15 * np.cumsum([0, *recording.mouse_dx[:-1]]), atol=1e-9)
    np.testing.assert_allclose(recording.pitch, 0.15 * np.cumsum([0, *recording.mouse_dy[:-1]]), atol=1e-9)
    pressed = {PRESSED_COLUMNS[i] for i in np.flatnonzero(recording.pressed[2])}
    assert pressed == {"key.w", "key.2", "mouse.left"}
    shown = re.search(r"```json\n(.*)\n```", PAGE)[1]
    assert json.loads(shown) == json.loads(example.read_text().splitlines()[2])


def write_play(folder: Path, name: str, num_ticks: int, seed: int) -> None:
    """A recording whose lines have the fields of the page's example and no other."""
    line = json.loads(re.search(r"```json\n(.*)\n```", PAGE)[1])
    rng, yaw, lines = np.random.default_rng(seed), 0.0, []
    for _ in range(num_ticks):
        line["mouse"] |= {"dx": float(rng.integers(-20, 20)), "dy": 0.0, "buttons": [], "newButtons": []}
        line["keyboard"] = {"keys": ["key.keyboard.w"] if rng.random() < 0.5 else []}
        lines.append(json.dumps(line | {"yaw": yaw, "pitch": 0.0}))
        yaw += 0.15 * line["mouse"]["dx"]
    (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    (folder / f"{name}.mp4").write_bytes(make_video(num_ticks, seed=seed, size=(72, 128)))


@pytest.mark.slow
def test_the_five_lines_run(tmp_path, monkeypatch, capsys):
    """As they stand, but for fewer steps."""
    pytest.importorskip("matplotlib")
    (tmp_path / "my-play").mkdir()
    layout = sorted(set(re.findall(r"^        ([\w-]+)\.(?:mp4|jsonl)$", PAGE, re.MULTILINE)))
    assert [name.split("-")[0] for name in layout] == ["anna", "ben"]
    for seed, (name, num_ticks) in enumerate(zip(layout, (1100, 200), strict=True)):
        write_play(tmp_path / "my-play", name, num_ticks, seed)
    for folder in ("examples", "dataset_scripts"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    lines = re.search(r"## Five lines\n\n```bash\n(.*?)```", PAGE, re.DOTALL)[1].splitlines()
    assert len(lines) == 5
    for line in lines:
        python, file, *flags = shlex.split(line)
        fewer = ["--max_steps=2", "--warmup_steps=1", "--decay_steps=1"] if file == "examples/train.py" else []
        assert python == "python"
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [file, *flags, *fewer])
            patch.setattr(sys, "path", list(sys.path))
            try:
                run_program(Path(file))
            except SystemExit as end:
                assert end.code in (0, None), (line, capsys.readouterr())
    metrics = json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert (metrics["clips"], metrics["players"]) == (3, 1)  # of 64 ticks, of 200
    assert (tmp_path / "report" / "report.html").exists() and (tmp_path / "preview" / "index.html").exists()


# ------------------------------------------------------------------------------------------------ MineRL


class StandIn:
    """The interface of a MineRL 1.0 environment: gym's of before 0.26, its names, and nothing it would not know."""

    NAMES = {
        *("ESC", "attack", "back", "drop", "forward", "inventory", "jump", "left", "pickItem", "right", "sneak"),
        *("sprint", "swapHands", "use", *(f"hotbar.{i}" for i in range(1, 10))),
    }

    def __init__(self):
        self.ticks, self.views, self.closed = 0, [np.zeros(2)], False

    def _see(self) -> dict:
        shade = (np.arange(640)[None] + 3 * self.views[-1][1] + np.arange(360)[:, None]) % 256
        return {"pov": np.repeat(shade[..., None], 3, axis=-1).astype(np.uint8)}

    def reset(self) -> dict:
        return self._see()

    def step(self, action: dict):
        assert not self.closed and action.keys() == self.NAMES | {"camera"}
        camera = np.asarray(action["camera"], dtype=np.float64)
        assert camera.shape == (2,) and np.abs(camera).max() <= 180
        assert all(type(action[name]) is int and action[name] in (0, 1) for name in self.NAMES)
        assert not (action["ESC"] or action["inventory"] or action["drop"])  # these would end or disturb the play
        self.views.append(self.views[-1] + camera)
        self.ticks += 1
        return self._see(), 0.0, self.ticks == 20, {}

    def close(self) -> None:
        self.closed = True


def test_the_loop_in_minerl(tmp_path, monkeypatch):
    """`minerl` cannot be installed everywhere: a stand-in takes its actions, and ends within the third step."""
    made = []
    gym = types.ModuleType("gym")
    gym.make = lambda name: made.append((name, StandIn())) or made[0][1]
    monkeypatch.setitem(sys.modules, "gym", gym)
    monkeypatch.setitem(sys.modules, "minerl", types.ModuleType("minerl"))
    monkeypatch.chdir(tmp_path)
    statistics = ActionStatistics()
    statistics.update(np.random.default_rng(0).normal(0, 5, (64, 38)))
    tiny_model().save_pretrained("demo/model")
    processor = VJEPA2ACProcessor(resolution=32, action_statistics=statistics.to_dict())
    processor.save_pretrained("demo/model")
    [loop] = re.findall(r"```python\n(.*?)```", (DOCS / "minerl.md").read_text(), re.DOTALL)
    names: dict = {}
    exec(compile(loop, "docs/minerl.md", "exec"), names)
    [(name, env)] = made
    assert name.startswith("MineRLBasalt") and (env.ticks, env.closed) == (20, True)
    assert names["step"] == 2 and names["tick"] == 4
    # Yaw and pitch as added up are those of the two whole steps; MineRL's order is pitch, yaw.
    np.testing.assert_allclose(names["view"], env.views[16][::-1], atol=1e-6)
    assert np.abs(names["view"]).max() > 1


# ------------------------------------------------------------------------------------------------ the picture


def test_the_picture_shows_the_clip_and_turns_the_other_way(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    pytest.importorskip("torchmetrics")
    program = load_program("benchmarks/readme_picture.py")
    turns = np.array([[20, 15, 5], [-30, -11, -1], [20, 9, 5], [20, -15, 5], [11, 11, 1], [12, 30, 90]])
    assert program.choose_clip(turns) == 1  # of rows 4, 0, 1, 5 by their turns (23, 40, 42, 132) the third
    with pytest.raises(SystemExit, match="--clip"):
        program.choose_clip(turns[2:4])

    world = tiny_model()
    statistics = json.loads((write_clips(tmp_path / "clips", train=3, validation=3) / "action_stats.json").read_text())
    world.save_pretrained(tmp_path / "world")
    VJEPA2ACProcessor(resolution=32, action_statistics=statistics).save_pretrained(tmp_path / "world")
    small = {"head_hidden_size": 16, "head_num_hidden_layers": 1, "head_num_attention_heads": 2}
    VJEPA2ACForFrameDecoding.from_world_model(world, **small).save_pretrained(tmp_path / "decoder")
    drawn = []
    monkeypatch.setattr(program, "draw", lambda *given, draw=program.draw: drawn.append(given) or draw(*given))
    flags = {"model": "world", "decoder": "decoder", "dataset": "clips", "output": "out.png", "clip": 1}
    given = [f"--{name}={value if name == 'clip' else tmp_path / value}" for name, value in flags.items()]
    monkeypatch.setattr(sys, "argv", ["readme_picture.py", *given])
    program.main()
    [(frames, turns, _)] = drawn
    clip = datasets.load_dataset(str(tmp_path / "clips"), split="validation")[1]
    seen = clip["video"].get_frames_in_range(0, 12).data[::2].movedim(1, 3).numpy() / 255
    np.testing.assert_allclose(frames[0], seen, atol=1e-6)  # clips of the model's size are shown as they are
    np.testing.assert_allclose(turns, np.array(clip["actions"])[:5, 2])
    assert frames.shape == (3, 6, 32, 32, 3)
    np.testing.assert_array_equal(frames[1, :2], frames[2, :2])  # the context
    assert all(np.abs(frames[1, step] - frames[2, step]).max() > 0 for step in range(2, 6))
    assert (tmp_path / "out.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and "clip 1 of 3" in capsys.readouterr().out


def test_the_readme_shows_a_small_picture():
    assert "](docs/imagined.png)" in (ROOT / "README.md").read_text().split("\n## ")[0]
    assert (DOCS / "imagined.png").stat().st_size < 150_000


# ------------------------------------------------------------------------------------------------ figures

INTERVAL = r"(-?\d+\.\d+)[ %*]*\((-?\d+\.\d+) to (-?\d+\.\d+)\)"


def test_figures_are_those_of_the_log():
    """Figures with intervals, as they stand in the log; those of the README are on the page of results."""
    readme, results, log = ((ROOT / page).read_text() for page in ("README.md", "docs/results.md", "docs/LOG.md"))
    with_interval = [set(re.findall(INTERVAL, page)) for page in (readme, results, log)]
    assert len(with_interval[0]) >= 4 and len(with_interval[1]) >= 20
    assert with_interval[0] <= with_interval[1] <= with_interval[2]
    bold = re.findall(r"\*\*(\d[\d.]*)( %| times)?[^*]*\*\*", readme.split("## What can be done")[1].split("\n## ")[0])
    assert len(bold) >= 9
    for figure, unit in bold:
        assert re.search(rf"(?<![\d.]){re.escape(figure)}(?![\d.]*\d)", results), (figure, unit)


# ------------------------------------------------------------------------------------------------ commands


def commands() -> list[tuple[str, str, str]]:
    """Page, program and flags of every command in code blocks."""
    found = []
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]:
        if page.name != "LOG.md":  # its commands are of programs as they were
            text = re.sub(r" *\\\n *", " ", page.read_text())
            lines = re.findall(
                r"^ *(?:\w+=\S+ )*(?:python|accelerate launch) ((?:.* )?)(\w+/\w+\.py)( .*)?$", text, re.M
            )
            found += [(page.name, program, re.split("#| -- ", flags)[0]) for _, program, flags in lines]
    return [command for command in found if not command[1].startswith(("benchmarks/", "tests/"))]


def test_commands_have_flags_that_exist(monkeypatch):
    names = {file: name for name, (file, _) in PROGRAMS.items()}
    flags_of, used = {}, 0
    for page, program, flags in commands():
        if program not in flags_of:
            flags_of[program] = parser_of(names[program], monkeypatch)._option_string_actions
        for flag in re.findall(r"(?<!\S)--[\w-]+", flags):
            assert flag in flags_of[program], (page, program, flag)
            used += 1
    assert len(flags_of) >= 12 and used >= 100


def test_published_numbers_have_commands_that_choose_clips_by_rule(monkeypatch):
    """The table of docs/evaluation.md: programs, flags and rules that exist, and numbers that the page explains."""
    rows = table("evaluation.md", "The same clips")
    assert [row[0] for row in rows] == [
        *("errors, win rates", "retrieval", "controllability", "decoded frames"),
        *("an inverse dynamics head by itself", "fine landscape", "plans in the game"),
    ]
    programs = {Path(file).name: name for name, (file, _) in PROGRAMS.items()}
    for number, command, *_ in rows:
        words = re.search(r"`([^`]*)`", command)
        if words is None:
            assert command == "the same"
        elif words[1].startswith("--"):
            assert words[1].split()[0] in parser_of("evaluate", monkeypatch)._option_string_actions, number
        else:
            file, *flags = shlex.split(words[1])
            parsed = vars(parser_of(programs[file], monkeypatch).parse_args(flags))
            assert parsed.get("clip_rule", "clips-v1") == "clips-v1", number
            assert parsed.get("clip_rule") or parsed["manifest"] == "view-easy-v1"
