"""Stories of imagined steps, and the visitors who share a program: docs/explore.md."""

import base64
import io
import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from helpers_clips import write_clips
from helpers_data import make_lines, make_video, to_log
from helpers_explore import turning_world
from helpers_models import responsive_model, save_world
from PIL import Image

from vjepa_ac_hf import ACTION_COLUMNS, VJEPA2ACProcessor
from vjepa_ac_hf.app.explorer import Explorer, Limits
from vjepa_ac_hf.app.goals import Arrival, steady
from vjepa_ac_hf.app.load import load_explorer
from vjepa_ac_hf.app.scenes import Scenes, open_video
from vjepa_ac_hf.app.story import MOST_STEPS, Story, horizon_errors, make_action
from vjepa_ac_hf.recordings.log import parse_recording

COLUMN = {name: index for index, name in enumerate(ACTION_COLUMNS)}


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return write_clips(tmp_path_factory.mktemp("explore") / "clips", train=3, validation=6)


@pytest.fixture(scope="module")
def world(clips):
    """A model of 8 steps and 4 tokens whose features actions move, its processor, and scenes."""
    statistics = json.loads((clips / "action_stats.json").read_text())
    processor = VJEPA2ACProcessor(resolution=32, action_space="vpt-38", action_statistics=statistics)
    model = responsive_model(processor.action_space, 8, 24)
    return model, processor, Scenes(model, processor, str(clips), split="validation", count=6)


@pytest.fixture
def explorer(world):
    return Explorer(*world)


def begin(explorer, clip=0, context=2, **more):
    return explorer.answer("choose", {"clip": clip, "context": context, **more})["token"]


def act(explorer, token, *held, yaw=0.0, pitch=0.0):
    return explorer.answer("act", {"token": token, "held": list(held), "yaw": yaw, "pitch": pitch})


def some_action(story, seed):
    rng = np.random.default_rng(seed)
    keys = [k for k in ("key.w", "key.a", "mouse.left") if rng.random() < 0.5]
    return make_action(keys, *rng.uniform(-30, 30, 2), view=story.state(story.now), slot=story.slot)


def rolled_out(world, scene, context, actions):
    """The oracle: one call of `rollout` for a whole story of at most the clip's length, nothing kept before it."""
    model, processor, _ = world
    raw = torch.stack([*(scene.action(i) for i in range(context - 1)), *actions])
    known = processor.normalize_states(scene.states[None, :context])
    states = processor.integrate_states(known, processor.normalize_actions(raw)[None])
    with torch.no_grad():
        return model.rollout(scene.features[None, :context], processor.normalize_actions(raw)[None], states)[0]


# ---------------------------------------------------------------------------------------------------- one story


@pytest.mark.parametrize("context", [1, 2, 5, 7])
def test_step_by_step_is_what_one_rollout_imagines(world, context):
    scene = world[2].load(0)
    story = Story(*world[:2], scene, context)
    for seed in range(8 - context):
        story.act(some_action(story, seed))
    expected = rolled_out(world, scene, context, [step.action for step in story.steps])
    torch.testing.assert_close(torch.stack([step.features for step in story.steps]), expected, rtol=1e-4, atol=1e-5)
    assert story.now == 7 and float((expected - scene.features[context - 1]).abs().mean()) > 0.05


def test_the_past_is_never_run_again(world, monkeypatch):
    model, processor, scenes = world
    story, ran = Story(model, processor, scenes.load(0), 2), []
    forward = type(model.predictor).forward

    def watched(self, features, *others, **options):
        ran.append(features.shape[1])
        return forward(self, features, *others, **options)

    monkeypatch.setattr(type(model.predictor), "forward", watched)
    for seed in range(4):
        story.act(some_action(story, seed))
    assert ran == [2, 1, 1, 1]
    story.undo()
    story.undo()
    story.act(some_action(story, 9))
    assert ran[4:] == [1]
    story.restart()
    story.act(some_action(story, 9))
    assert ran[5:] == [1]  # the context's first step is still there
    story.forget()
    story.act(some_action(story, 9))
    assert ran[6:] == [3]


def test_after_undo_another_action_has_its_own_future(world):
    scene = world[2].load(1)
    story = Story(*world[:2], scene, 2)
    for seed in range(4):
        story.act(some_action(story, seed))
    for _ in range(3):
        story.undo()
    for seed in (7, 8):
        story.act(some_action(story, seed))
    expected = rolled_out(world, scene, 2, [step.action for step in story.steps])
    torch.testing.assert_close(torch.stack([s.features for s in story.steps]), expected, rtol=1e-4, atol=1e-5)


def test_beyond_the_clips_length_a_window_begins_with_the_last_imagined_steps(world):
    model, processor, scenes = world
    scene = scenes.load(0)
    story = Story(model, processor, scene, 3)
    for seed in range(12):
        story.act(some_action(story, seed))
    # Steps 3 to 7 come of the first window; 8 to 12 of one that begins with steps 5, 6, 7; 13 and 14 of 10, 11, 12.
    for first, last in ((5, 12), (10, 14)):
        steps = range(first, last)
        with torch.no_grad():
            expected = model.rollout(
                torch.stack([story.features(step) for step in range(first, first + 3)])[None],
                processor.normalize_actions(torch.stack([story.action(step) for step in steps]))[None],
                processor.normalize_states(torch.stack([story.state(step) for step in steps]))[None],
            )[0]
        found = torch.stack([story.features(step) for step in range(first + 3, last + 1)])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    before = story.steps[-5:]
    for _ in range(5):
        story.undo()
    for step in before:  # back over a window's border and on again
        torch.testing.assert_close(story.act(step.action).features, step.features, rtol=1e-4, atol=1e-5)


def test_a_story_ends(world):
    story = Story(*world[:2], world[2].load(0), 2)
    for _ in range(MOST_STEPS):
        story.act(some_action(story, 0))
    with pytest.raises(ValueError, match=f"at most {MOST_STEPS} imagined steps: save it, undo"):
        story.act(some_action(story, 0))
    with pytest.raises(ValueError, match="1 to 7 steps of context, found 8"):
        Story(*world[:2], world[2].load(0), 8)


def test_mouse_slot_and_pitch_follow():
    view = torch.tensor([10.0, 80.0], dtype=torch.float64)
    action = make_action(["key.w", "key.3", "mouse.left"], -15.0, 30.0, view=view, slot=4)
    told = {name: float(value) for name, value in zip(ACTION_COLUMNS, action, strict=True) if value}
    expected = {"yaw_delta": -15, "mouse_dx": -100, "pitch_delta": 10, "mouse_dy": 10 / 0.15}
    assert told == pytest.approx({**expected, "key.w": 1, "key.3": 1, "mouse.left": 1, "hotbar.4": 1})
    assert not make_action([], 0, 0, view=view, slot=None).any()


@pytest.mark.parametrize(
    ("held", "yaw", "pitch", "message"),
    [
        (["key.x"], 0, 0, r"found \['key.x'\]"),
        (["yaw_delta"], 0, 0, r"found \['yaw_delta'\]"),
        (["key.1", "key.2"], 0, 0, "one number key"),
        ([], 180.0, 0, "found yaw 180.0"),
        ([], float("nan"), 0, "found yaw nan"),
        ([], 0, float("inf"), "pitch inf"),
    ],
)
def test_impossible_actions_are_refused(held, yaw, pitch, message):
    with pytest.raises(ValueError, match=message):
        make_action(held, yaw, pitch, view=torch.zeros(2), slot=0)


def test_recorded_actions_show_what_really_happened(world, explorer):
    scene, token = world[2].load(0), begin(explorer)
    for number in range(6):
        step = explorer.answer("act", {"token": token, "recorded": True})["step"]
        story = explorer.sessions[token].story
        assert torch.equal(story.steps[-1].action, scene.actions[1 + number])
        true = scene.features[2 + number]
        assert step["error"] == pytest.approx(float((story.steps[-1].features - true).abs().mean()), rel=1e-5)
        assert step["still"] == pytest.approx(float((scene.features[1] - true).abs().mean()), rel=1e-5)
        shown = np.asarray(open_picture(step["real"])).astype(int)
        assert np.abs(shown - scene.frames[2 * (2 + number)].permute(1, 2, 0).numpy()).mean() < 12  # WebP
    assert explorer.answer("act", {"token": token, "recorded": True})["error"].startswith("the clip ends here")
    explorer.answer("undo", {"token": token})
    assert "real" not in act(explorer, token, "key.w")["step"]
    assert "has left what was recorded" in explorer.answer("act", {"token": token, "recorded": True})["error"]


def open_picture(uri):
    return Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))


# ---------------------------------------------------------------------------------------- a world that is known


def pixels(answer):
    return np.asarray(open_picture(answer["step"]["picture"])).astype(int)


def test_a_turn_moves_the_picture_and_the_other_one_the_other_way(tmp_path):
    explorer = turning_world(tmp_path / "clips")
    token = begin(explorer)
    story = explorer.sessions[token].story
    last = story.scene.features[1, :, :3].unflatten(0, (8, 8))
    right = act(explorer, token, yaw=15.0)
    moved = story.features(2)[:, :3].unflatten(0, (8, 8))
    assert torch.equal(moved[:, :-1], last[:, 1:])
    explorer.answer("undo", {"token": token})
    left = act(explorer, token, yaw=-15.0)
    assert np.abs(pixels(right)[:, :-8] - pixels(left)[:, 8:]).mean() < 4  # two tokens apart, but for WebP
    assert np.abs(pixels(right) - pixels(left)).mean() > 10
    lane = explorer.answer("mirror", {"token": token})["lanes"][0]
    assert lane["title"] == "left for right" and lane["steps"][0]["picture"] == right["step"]["picture"]


def planned(explorer, token, goal):
    """All answers until the plan ends."""
    answers = [explorer.answer("plan", {"token": token, "goal": goal})]
    while not answers[-1].get("done") and len(answers) < 12:
        answers.append(explorer.answer("plan", {"token": token, "goal": goal}))
    assert answers[-1].get("done"), answers[-1]
    return answers[:-1], answers[-1]


def test_a_plan_finds_the_way(tmp_path):
    """A turn to the right leads to the goal, and nothing comes closer after that."""
    explorer = turning_world(tmp_path / "clips")
    token = begin(explorer, context=1)
    scene = explorer.sessions[token].story.scene
    first = scene.features[0].unflatten(0, (8, 8))
    scene.features[3] = torch.cat([first[:, 1:], first[:, -1:]], dim=1).flatten(0, 1)  # as a turn to the right shows it
    steps, end = planned(explorer, token, 3)
    words = {word for a in steps for word in a["step"]["action"][2].split()}
    assert words <= {"w", "a", "s", "d", "space", "no", "keys"}
    assert steps and steps[-1]["distance"] < 1e-6
    assert end["arrived"] and end["message"].startswith("arrived: 0.000 from the goal")


def paint(scene, columns):
    """All of a scene's frames look like this: a value for each of the eight columns of tokens."""
    scene.features.zero_()
    scene.features[..., :3] = torch.tensor(columns, dtype=torch.float32).repeat(8)[:, None]


@pytest.mark.parametrize("steps_before", [0, 5])
def test_a_plan_leads_over_a_ridge_and_says_how_far_it_is(tmp_path, steps_before):
    """Four turns to the right lead to the goal; after one, two or three of them, or any to the left, it is further away
    than at the start. After five steps three are left of the clip's length, and the plan looks beyond it."""
    explorer = turning_world(tmp_path / "clips")
    token = begin(explorer)
    story = explorer.sessions[token].story
    paint(story.scene, [0, 1, 0, 0, 0, 1, 0, 0])
    for _ in range(steps_before):
        act(explorer, token)
    goal = story.scene.features[7]
    goal.zero_()
    goal.unflatten(0, (8, 8))[:, 1, :3] = 1.0  # columns 4 to 7 of the picture, and the last one again and again
    unit = 3 / goal.shape[-1] / 8  # of a column that differs: three colours of the whole width, one of eight columns
    steps, end = planned(explorer, token, 7)
    assert [a["distance"] / unit for a in steps] == pytest.approx([3, 2, 2, 0], abs=1e-4)
    assert [a["before"] / unit for a in steps] == pytest.approx([1, 3, 2, 2], abs=1e-4)
    assert [a["start"] / unit for a in (*steps, end)] == pytest.approx([1] * 5)
    assert [a["expected"] for a in steps] == pytest.approx([0] * 4, abs=1e-6)
    assert [a["left"] for a in steps] == [3, 2, 1, 0]
    assert end["arrived"] and end["distance"] < 1e-6


@pytest.mark.parametrize(("errors", "arrived"), [([], False), ([(0.2, 0.3)] * 7, True), ([(0.05, 0.3)] * 7, False)])
def test_a_plan_says_whether_it_arrived_or_gave_up(tmp_path, errors, arrived):
    """Whatever is done, a picture of one colour stays 0.1 away from the goal."""
    explorer = turning_world(tmp_path / "clips", errors=errors)
    token = begin(explorer)
    story = explorer.sessions[token].story
    paint(story.scene, [0.5] * 8)
    story.scene.features[5] += 0.1
    steps, end = planned(explorer, token, 5)
    assert not steps and end["arrived"] is arrived
    told = "arrived: 0.100" if arrived else "gave up: nothing that was tried comes closer than 0.100"
    assert end["message"].startswith(f"{told} from the goal, 0.100 at the start; ")
    assert (f"error after so many steps is {errors[0][0]:.3f}" if errors else "half of that") in end["message"]


def test_a_plan_gives_up_after_eight_steps(tmp_path, monkeypatch):
    explorer = turning_world(tmp_path / "clips")
    token = begin(explorer)

    def always(model, processor, story, way, space, candidates):
        way.plan = SimpleNamespace(actions=torch.zeros(1, len(ACTION_COLUMNS)))
        return True

    monkeypatch.setattr("vjepa_ac_hf.app.explorer.look_ahead", always)
    steps, end = planned(explorer, token, 5)
    assert len(steps) == 8 and not end["arrived"] and end["message"].startswith("gave up after 8 steps: ")


def test_a_plan_has_fewer_candidates_where_steps_take_long(explorer, monkeypatch):
    asked = []
    monkeypatch.setattr("vjepa_ac_hf.app.explorer.look_ahead", lambda *given: asked.append(given[-1]))
    token = begin(explorer)
    for explorer._rollout_seconds in (1e-9, 3 / (3 * 6 * 50.5), 1.0):
        explorer.answer("plan", {"token": token, "goal": 5})
    assert asked == [96, 50, 24]


def test_arriving_costs_the_distance_and_the_turn():
    """By hand: from a yaw of 170, -175 is 15 degrees on, and turns of 10, 20 and -40 degrees lead to 25, 45 and 5."""
    begun, now = torch.tensor([170.0, 1.0]), torch.tensor([-175.0, 3.0])
    cost = Arrival(torch.zeros(2, 4), 0.01, begun, now)
    features = torch.tensor([0.5, 0.2, 0.45])[None, :, None, None].expand(1, 3, 2, 4)
    actions = torch.zeros(1, 3, len(ACTION_COLUMNS))
    actions[0, :, COLUMN["yaw_delta"]] = torch.tensor([10.0, 20.0, -40.0])
    actions[0, :, COLUMN["pitch_delta"]] = torch.tensor([-2.0, 0.0, 4.0])  # 2 above where it began: 0, 0 and 4
    expected = [0.5 + 0.25, 0.2 + 0.45, 0.45 + 0.05 + 0.04]
    assert cost.by_step(features, actions)[0].tolist() == pytest.approx(expected)
    assert cost(features, actions).tolist() == pytest.approx([0.54])
    assert float(cost.of_turn(torch.zeros(2))) == pytest.approx(0.15 + 0.02)


def test_turns_are_counted_from_where_the_plan_began(tmp_path, monkeypatch):
    explorer, made = turning_world(tmp_path / "clips"), []

    def watched(*given):
        made.append(given)
        return Arrival(*given)

    monkeypatch.setattr("vjepa_ac_hf.app.goals.Arrival", watched)
    token = begin(explorer)
    story = explorer.sessions[token].story
    views = [story.state(1)]
    for goal in (6, 6, 3):  # another goal begins anew
        answer = explorer.answer("plan", {"token": token, "goal": goal})
        views.append(story.state(story.now))
        assert made[-1][1] == pytest.approx(0.1 * answer["start"] / 90)
    assert not torch.equal(views[0], views[1]) and not torch.equal(views[1], views[2])
    for (_, _, begun, now), at, first in zip(made, views, (0, 0, 2), strict=False):
        assert torch.equal(begun, views[first]) and torch.equal(now, at)


def test_steady_turns_go_all_the_way_around(explorer):
    space = explorer._space
    decisions = steady(space, 3, 10)
    assert decisions.shape == (10, 3, space.width) and torch.equal(decisions, decisions[:, :1].expand_as(decisions))
    yaw, pitch = (decisions[:, 0, space.continuous.index(c)] for c in ("yaw_delta", "pitch_delta"))
    at = space.continuous.index("yaw_delta")
    assert yaw[::2].tolist() == pytest.approx(np.linspace(float(space.low[at]), float(space.high[at]), 5).tolist())
    assert torch.equal(yaw[::2], yaw[1::2]) and not pitch.any()
    raw = space.complete(decisions, pitch=0.0, slot=None)[:, 0]
    assert raw[:, COLUMN["key.w"]].tolist() == [0, 1] * 5
    assert not raw[:, [COLUMN[f"key.{k}"] for k in ("a", "s", "d", "space")]].any()


# ------------------------------------------------------------------------------------------------ many visitors


def test_visitors_do_not_see_each_others_stories(explorer):
    mine, yours = begin(explorer), begin(explorer)
    assert mine != yours and len(mine) > 20
    act(explorer, mine, "key.w", yaw=20.0)
    assert [len(explorer.answer("hello", {"token": t})["story"]["steps"]) for t in (mine, yours)] == [1, 0]
    nobody = explorer.answer("hello", {"token": "guess"})
    assert nobody["story"] is None and nobody["ended"]
    assert explorer.answer("hello", {})["ended"] is False


def test_stories_end_after_long_idleness_and_make_way(world):
    now = [0.0]
    explorer = Explorer(*world, limits=Limits(sessions=2, idle_seconds=100, spare_seconds=10), clock=lambda: now[0])
    first, second = begin(explorer), begin(explorer)
    refused = explorer.answer("choose", {"clip": 0, "context": 2})
    assert refused["error"] == "2 visitors are playing: try again in a minute"
    now[0] = 5.0
    act(explorer, second)
    now[0] = 11.0
    third = begin(explorer)
    assert set(explorer.sessions) == {second, third}
    answer = act(explorer, first)
    assert answer["ended"] and "this story has ended" in answer["error"]
    now[0] = 200.0
    assert act(explorer, third)["ended"] and not explorer.sessions


def test_memory_for_keys_and_values_is_bounded_and_nothing_else_changes(world):
    one = Explorer(*world)
    token = begin(one)
    expected = [act(one, token, "key.w", yaw=5.0 * i)["step"] for i in range(4)]
    undisturbed = one.sessions[token].story.steps[-1].features
    limit = one.sessions[token].story.cache_bytes * 2
    explorer = Explorer(*world, limits=Limits(cache_bytes=limit))
    tokens = [begin(explorer) for _ in range(5)]
    for i in range(4):
        for token in tokens:
            assert act(explorer, token, "key.w", yaw=5.0 * i)["step"]["action"] == expected[i]["action"]
            assert sum(s.story.cache_bytes for s in explorer.sessions.values()) <= limit
    for token in tokens:
        last = explorer.sessions[token].story.steps[-1].features
        torch.testing.assert_close(last, undisturbed, rtol=1e-4, atol=1e-5)


def test_a_hundred_requests_at_once_are_answered(world):
    explorer = Explorer(*world, limits=Limits(requests=8))
    tokens = [begin(explorer) for _ in range(10)]
    barrier = threading.Barrier(100)

    def ask(number):
        barrier.wait()
        return number % 10, act(explorer, tokens[number % 10], "key.w")

    with ThreadPoolExecutor(100) as pool:
        answers = list(pool.map(ask, range(100)))
    assert all(set(a) == {"step"} or a.get("busy") for _, a in answers)
    for number, token in enumerate(tokens):
        done = sum(1 for of, a in answers if of == number and "step" in a)
        assert done == len(explorer.sessions[token].story.steps) == len(explorer.sessions[token].shown)
    assert all("step" in act(explorer, token) for token in tokens)  # and it goes on


def test_a_plan_keeps_others_waiting_for_nothing_but_plans(world):
    explorer = Explorer(*world)
    mine, yours = begin(explorer), begin(explorer)
    with explorer._planning:
        assert "another visitor's plan" in explorer.answer("plan", {"token": mine, "goal": 1})["error"]
        assert "step" in act(explorer, yours, "key.w")
    assert {"done", "distance"} <= set(explorer.answer("plan", {"token": mine, "goal": 1}))


@pytest.mark.slow
def test_memory_is_flat_over_a_thousand_steps_and_twenty_visitors(world):
    explorer = Explorer(*world)
    tokens = [begin(explorer) for _ in range(20)]
    used = []
    for count in range(1000):
        token = tokens[count % 20]
        if "error" in act(explorer, token, "key.w", yaw=float(count % 30 - 15)) or count % 200 == 199:
            explorer.answer("restart", {"token": token, "aside": True})
        if count in (499, 999):
            used.append(psutil.Process().memory_info().rss)
    assert used[1] - used[0] < 16 * 2**20
    assert len(explorer.sessions) == 20 and all(len(s.lanes) <= 4 for s in explorer.sessions.values())


# ------------------------------------------------------------------------------------------------------- saving


def test_the_story_is_saved_as_a_film_and_as_a_log(explorer, world):
    token = begin(explorer)
    for yaw in (10.0, -20.0, 5.0):
        act(explorer, token, "key.w", "key.2", yaw=yaw)
    film = explorer.answer("film", {"token": token, "format": "webp"})
    shown = Image.open(io.BytesIO(base64.b64decode(film["data"])))
    milliseconds = 0
    for number in range(shown.n_frames):  # equal neighbours are one, shown for longer
        shown.seek(number)
        shown.load()
        milliseconds += shown.info["duration"]
    assert film["name"] == "story.webp" and milliseconds == 2 * (2 + 3) * 200
    mp4 = base64.b64decode(explorer.answer("film", {"token": token, "format": "mp4"})["data"])
    from torchcodec.decoders import VideoDecoder

    assert VideoDecoder(mp4).metadata.num_frames == 2 * (2 + 3)
    log = base64.b64decode(explorer.answer("log", {"token": token})["data"])
    recording = parse_recording(log, "story")
    assert recording.num_ticks == 3 * 8
    scene = world[2].load(0)
    assert recording.yaw[[0, 8, 16]] == pytest.approx(float(scene.states[1, 0]) + np.array([0, 10, -10]))
    assert recording.pressed.any(axis=1).all() and "error" in explorer.answer("film", {"token": token, "format": "exe"})
    assert "error" in explorer.answer("log", {"token": begin(explorer)})


# ------------------------------------------------------------------------------------------------ bad, hostile


@pytest.mark.parametrize(
    ("name", "request_", "message"),
    [
        ("choose", {"clip": 99, "context": 2}, "clips are numbered 0 to 5, found 99"),
        ("choose", {"clip": "../../etc", "context": 2}, "clip must be a whole number"),
        ("choose", {"clip": 0, "context": 99}, "1 to 7 steps of context, found 99"),
        ("choose", {"clip": 0, "context": True}, "context must be a whole number"),
        ("choose", ["clip"], "a request must be an object"),
        ("act", {"yaw": "1"}, "yaw must be a number"),
        ("act", {"held": "key.w"}, "held must be a list"),
        ("act", {"held": ["<script>alert(1)</script>"]}, "keys and buttons must be of"),
        ("act", {"held": [{"a": 1}]}, "keys and buttons must be of"),
        ("plan", {"goal": 99}, "a goal is a frame of the clip, 0 to 7, found 99"),
        ("mirror", {}, "nothing is imagined yet"),
        ("drop", {"video": "/etc/passwd", "context": 2}, "the file is not here"),
    ],
)
def test_bad_requests_are_answered_in_words(world, tmp_path, name, request_, message):
    explorer = Explorer(*world, uploads=tmp_path)
    token = begin(explorer)
    answer = explorer.answer(name, {"token": token, **request_} if isinstance(request_, dict) else request_)
    assert message in answer["error"]
    assert "step" in act(explorer, token, "key.w")


def test_no_file_is_opened_but_uploads(world, tmp_path):
    uploads, outside = tmp_path / "uploads", tmp_path / "secret.mp4"
    uploads.mkdir()
    outside.write_bytes(make_video(80))
    (uploads / "link.mp4").symlink_to(outside)
    explorer = Explorer(*world, uploads=uploads)
    for path in (outside, uploads / ".." / "secret.mp4", uploads / "link.mp4", uploads, None, 7):
        answer = explorer.answer("drop", {"video": str(path), "context": 2})
        assert "the file is not here" in answer["error"], path
        assert outside.exists()
    assert "a video is needed" in explorer.answer("drop", {"context": 2})["error"]
    assert "not here" in Explorer(*world).answer("drop", {"video": str(outside), "context": 2})["error"]


@pytest.mark.parametrize(("fps", "size"), [(20, (36, 64)), (30, (64, 36)), (10, (120, 90)), (7, (36, 64))])
def test_videos_of_any_rate_and_size_begin_a_story(world, tmp_path, fps, size):
    """The frame that is shown at each of the clip's times, told by its brightness; resized as the processor does."""
    model, processor, _ = world
    (tmp_path / "a.mp4").write_bytes(make_video(5 * fps, fps=fps, size=size))
    scene = open_video(model, processor, tmp_path / "a.mp4", None, "a.mp4", 1.0)
    from torchcodec.decoders import VideoDecoder

    every = VideoDecoder(str(tmp_path / "a.mp4"))[:]
    expected = processor.resize(every[[int((1.0 + i / 5) * fps + 0.5) for i in range(16)]])
    assert torch.equal(scene.frames, expected)
    assert scene.actions is None and "no log" in scene.note


def test_a_recording_is_dropped_with_its_log(world, tmp_path):
    lines = make_lines(100, 3)
    uploads = tmp_path / "uploads"
    uploads.mkdir()
    (uploads / "a.mp4").write_bytes(make_video(100))
    (uploads / "a.jsonl").write_bytes(to_log(lines))
    explorer = Explorer(*world, uploads=uploads)
    request = {"video": str(uploads / "a.mp4"), "log": str(uploads / "a.jsonl"), "name": "<b>a</b>", "second": 1.5}
    answer = explorer.answer("drop", {**request, "context": 3})
    assert answer["story"]["name"] == "<b>a</b>" and answer["story"]["logged"]
    story = explorer.sessions[answer["token"]].story
    yaw = [lines[30 + 8 * step]["yaw"] for step in range(8)]
    assert story.scene.states[:, 0].numpy() == pytest.approx(np.float32(yaw))
    assert not list(uploads.iterdir())  # what was uploaded does not stay
    assert "step" in explorer.answer("act", {"token": answer["token"], "recorded": True})


@pytest.mark.parametrize(
    ("content", "log", "second", "message"),
    [
        (b"", None, 0, "empty video file"),
        (b"RIFF\x00\x00\x00\x00AVI LIST" + bytes(1000), None, 0, "v.mp4"),
        (b"<html><script>alert(1)</script>", None, 0, "v.mp4"),
        ("short", None, 0, "a clip lasts 3 s"),
        ("long", None, 900, "can begin at a second from 0 to 2.0"),
        ("long", b"not json", 0, "v.mp4"),
        ("thirty", "log", 0, "frame rate: expected 20 FPS, found 30"),
    ],
)
def test_what_is_wrong_with_a_video_is_said(world, tmp_path, content, log, second, message):
    made = {"short": lambda: make_video(20), "long": lambda: make_video(100), "thirty": lambda: make_video(150, fps=30)}
    (tmp_path / "v").write_bytes(made[content]() if isinstance(content, str) else content)
    (tmp_path / "l").write_bytes(to_log(make_lines(100)) if log == "log" else log or b"")
    explorer = Explorer(*world, uploads=tmp_path)
    token = begin(explorer)
    request = {"token": token, "video": str(tmp_path / "v"), "name": "v.mp4", "second": second, "context": 2}
    request |= {"log": str(tmp_path / "l")} if log else {}
    answer = explorer.answer("drop", request)
    assert message in answer["error"]
    assert "step" in act(explorer, token, "key.w")  # the story of before goes on


def test_too_large_uploads_are_refused(world, tmp_path):
    (tmp_path / "v").write_bytes(make_video(100))
    explorer = Explorer(*world, uploads=tmp_path, limits=Limits(upload_bytes=1000))
    answer = explorer.answer("drop", {"video": str(tmp_path / "v"), "context": 2})
    assert "too large: at most" in answer["error"] and not (tmp_path / "v").exists()


# ----------------------------------------------------------------------------------------------------- loading


def test_measured_errors_are_told_by_horizon(world, clips, tmp_path):
    rows = [{"horizon": h, "error": 0.2 + h / 100, "persistence": 0.4} for h in (1, 2)]
    explorer = Explorer(*world, errors=list(horizon_errors({"horizons": rows})))
    token = begin(explorer)
    told = [act(explorer, token)["step"]["sure"] for _ in range(3)]
    assert told[0] == "measured error 0.210, 48 % below that of standing still (0.400)"
    assert (
        told[1].startswith("measured error 0.220, 45 %") and told[2] == "how wrong it is was measured for 2 steps only"
    )
    other = Explorer(*world)
    assert "was not measured" in act(other, begin(other))["step"]["sure"]
    with pytest.raises(ValueError, match=r"horizons\[0\] must have horizon, error and persistence"):
        list(horizon_errors({"horizons": [{"horizon": 1, "error": "<b>"}]}))


def test_parts_are_checked_against_each_other(clips, tmp_path):
    model = save_world(tmp_path / "model")
    explorer = load_explorer(str(model), str(clips), clips=2)
    assert len(explorer.scenes) == 2 and "step" in act(explorer, begin(explorer), "key.w")
    (model / "training_args.json").write_text(json.dumps({"weights_sha256": "aa"}))
    (model / "evaluation").mkdir()
    (model / "evaluation" / "metrics.json").write_text(json.dumps({"weights_sha256": "bb", "horizons": []}))
    with pytest.raises(ValueError, match="of other weights: weights_sha256 bb, the model's in .* is aa"):
        load_explorer(str(model), str(clips))
    shutil.rmtree(model / "evaluation")
    with pytest.raises(ValueError, match="no split 'test'"):
        load_explorer(str(model), str(clips), split="test")
    with pytest.raises(ValueError, match="at least 1 clip"):
        load_explorer(str(model), str(clips), clips=0)


def test_the_end_of_the_program_ends_the_encoding_of_real_frames(world, monkeypatch):
    """A thread that is killed inside PyTorch aborts the program; so it is waited for, and looks whether all ends."""
    started = []
    monkeypatch.setattr(threading.Thread, "start", lambda self: started.append(self))
    explorer = Explorer(*world)
    assert len(started) == 1 and not started[0].daemon
    monkeypatch.setattr(threading, "main_thread", lambda: SimpleNamespace(is_alive=lambda: False))
    started[0].run()
    assert explorer._real == []
