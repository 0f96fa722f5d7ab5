"""The stories of all visitors: what a page asks, answered; memory, time and work within bounds."""

import base64
import io
import json
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..evaluation.decoding import mirror_actions
from ..evaluation.pictures import describe_action
from ..modeling_vjepa2_ac import VJEPA2ACModel
from ..planning.actions import SearchSpace
from ..planning.environments import to_vpt_lines
from ..planning.planner import check_planning, ticks_per_step
from ..processing_vjepa2_ac import VJEPA2ACProcessor
from ..recordings.video import encode_clip
from .goals import CANDIDATES, ITERATIONS, Way, horizon_of, look_ahead
from .scenes import LARGEST_LOG, Scenes, open_video
from .story import HELD, MOST_STEPS, Scene, Step, Story, feature_error, make_action

Answer = dict[str, Any]
MOST_LANES = 4
PLANNED = ("key.w", "key.a", "key.s", "key.d", "key.space")  # beside the view: what moves it
MOST_REAL = 24  # clips whose frames stand in for decoded ones
LOAD_SECONDS = 10.0  # to wait for others' clips
PLAN_SECONDS = 3.0  # a step of a plan may take, by what the one before has taken
MOST_PLANNED = 8  # steps towards a goal
FEWEST = 24  # candidates of a plan's iteration, on however slow a machine


class Refused(ValueError):
    """What a visitor asks for cannot be done; the message says why."""


@dataclass(frozen=True)
class Limits:
    """Bounds of what visitors use together.

    Args:
        sessions: stories at a time.
        idle_seconds: after which a story ends for good.
        spare_seconds: after which it makes way for a new visitor where there is no room.
        cache_bytes: keys and values of all stories; those used longest ago are given up first, and computed again.
        upload_bytes: of a dropped video.
        requests: in work and waiting at a time.
    """

    sessions: int = 32
    idle_seconds: float = 1800.0
    spare_seconds: float = 60.0
    cache_bytes: int = 2**30
    upload_bytes: int = 200 * 2**20
    requests: int = 32


@dataclass
class Session:
    """A visitor's story, the pictures of it, and others put aside: lists of a title and steps as the page has them."""

    used: float
    lock: threading.Lock = field(default_factory=threading.Lock)
    story: Story | None = None
    shown: list[Answer] = field(default_factory=list)
    lanes: list[Answer] = field(default_factory=list)
    way: Way | None = None


class Explorer:
    """Answers a page's requests, each a dictionary with the visitor's `token`, with a dictionary for JSON.

    What a visitor can mend is answered as `{"error": ...}`; what nobody should ask raises.

    Args:
        model: a `VJEPA2ACModel` in eval mode.
        processor: its processor.
        scenes: the clips that are offered.
        decoder: a `VJEPA2ACForFrameDecoding` of the model's features; None: the nearest real frames are shown.
        errors: measured error and that of standing still by horizon (`horizon_errors`).
        limits: see there.
        uploads: folder that dropped videos lie in; None: none can be dropped.
        clock: seconds.

    Raises:
        ValueError: a model that cannot imagine from yaw and pitch, or that does not belong to the processor.
    """

    def __init__(
        self,
        model: VJEPA2ACModel,
        processor: VJEPA2ACProcessor,
        scenes: Scenes,
        *,
        decoder: Any = None,
        errors: Sequence[tuple[float, float]] = (),
        limits: Limits | None = None,
        uploads: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        check_planning(model, processor)
        self.model, self.processor, self.scenes, self.decoder = model, processor, scenes, decoder
        self.errors, self.limits, self.uploads, self.clock = list(errors), limits or Limits(), uploads, clock
        self.seconds_per_step = processor.tubelet_size / processor.fps
        self.sessions: dict[str, Session] = {}
        others = [c for c in processor.action_space if c in HELD and c not in PLANNED]
        statistics = processor.action_statistics
        self._space = SearchSpace(processor.action_space, fixed=dict.fromkeys(others, 0.0), statistics=statistics)
        self._rollout_seconds = 2e-3  # of a step of a candidate
        self._lock = threading.Lock()  # of `sessions`
        self._compute = threading.Lock()
        self._planning = threading.Lock()
        self._loading = threading.BoundedSemaphore(2)
        self._requests = threading.BoundedSemaphore(self.limits.requests)
        self._real: list[Scene] = []  # frames to choose the nearest from, beside a story's own clip
        if decoder is None:
            threading.Thread(target=self._encode_real).start()

    def _encode_real(self) -> None:
        for number in range(min(len(self.scenes), MOST_REAL)):
            if not threading.main_thread().is_alive():
                return  # the program ends: it waits for this thread, since one killed inside PyTorch would abort it
            self._real.append(self.scenes.load(number))

    # --- what the page asks -----------------------------------------------------------------------------------

    def hello(self, request: Answer) -> Answer:
        """What is offered, and the visitor's story where the token is known. A token is given out with a first clip."""
        session = self.sessions.get(str(request.get("token", "")))
        ended = session is None and bool(request.get("token"))
        story = self._tell(session) if session is not None and session.story is not None else None
        return {
            "clips": self.scenes.names,
            "story": story,
            "ended": ended,
            "decoded": self.decoder is not None,
            "steps": self.model.config.num_steps,
            "seconds": self.seconds_per_step,
            "most_steps": MOST_STEPS,
            "upload_bytes": self.limits.upload_bytes if self.uploads is not None else 0,
            "log_bytes": LARGEST_LOG,
        }

    def alive(self, request: Answer) -> Answer:
        """Whether the visitor's story is still there."""
        return {"known": str(request.get("token", "")) in self.sessions}

    def choose(self, request: Answer) -> Answer:
        """Begin a story with one of the clips: `clip`, `context` steps."""
        number = _whole(request, "clip")
        return self._begin(request, lambda: self.scenes.load(number))

    def drop(self, request: Answer) -> Answer:
        """Begin a story with an uploaded video: `video`, perhaps `log`, their paths; `name`, `second`, `context`."""
        paths = {kind: self._uploaded(request[kind]) for kind in ("video", "log") if request.get(kind)}
        try:
            if "video" not in paths:
                raise Refused("a video is needed: an mp4 file, with or without its .jsonl log")
            for path, most in ((paths["video"], self.limits.upload_bytes), (paths.get("log"), LARGEST_LOG)):
                size = 0 if path is None else path.stat().st_size
                if size > most:
                    raise Refused(f"too large: at most {most / 2**20:.0f} MB, found {size / 2**20:.0f} MB")
            name, second = str(request.get("name", "video"))[:100], _number(request, "second")
            log = paths["log"].read_bytes() if "log" in paths else None
            opened = (self.model, self.processor, paths["video"], log, name, second)
            return self._begin(request, lambda: open_video(*opened))
        finally:
            for path in paths.values():
                path.unlink(missing_ok=True)

    def act(self, request: Answer) -> Answer:
        """One step: with `recorded`, what was really done; else the `held` keys and a turn of `yaw` and `pitch`."""
        with self._work(request) as session:
            story = session.story
            if request.get("recorded"):
                action = story.recorded_action()
                if action is None:
                    why = "the clip ends here" if story.followed else "this story has left what was recorded"
                    raise Refused(f"{why}: undo, or begin again")
            else:
                held = request.get("held", [])
                if not isinstance(held, list) or len(held) > len(HELD):
                    raise Refused("held must be a list of keys")
                yaw, pitch = _number(request, "yaw"), _number(request, "pitch")
                action = make_action(held, yaw, pitch, view=story.state(story.now), slot=story.slot)
            session.way = None
            return {"step": self._act(session, action)}

    def undo(self, request: Answer) -> Answer:
        with self._work(request) as session:
            session.story.undo()
            del session.shown[len(session.story.steps) :]
            session.way = None
            return {"steps": len(session.shown)}

    def restart(self, request: Answer) -> Answer:
        """Back to the context; what was imagined is put `aside` for comparison, where that is asked for."""
        with self._work(request) as session:
            if request.get("aside") and session.shown:
                self._put_aside(session, "put aside", session.shown)
            session.story.restart()
            session.shown, session.way = [], None
            return {"story": self._tell(session)}

    def mirror(self, request: Answer) -> Answer:
        """The same story with left for right, beside it."""
        with self._work(request) as session:
            if not session.story.steps:
                raise Refused("nothing is imagined yet: act first")
            other = Story(self.model, self.processor, session.story.scene, session.story.context_steps)
            shown = []
            for step in session.story.steps:
                imagined = other.act(mirror_actions(step.action) + 0.0)  # no -0
                shown.append(self._show(other, imagined))
            self._put_aside(session, "left for right", shown)
            return {"lanes": session.lanes}

    def clear(self, request: Answer) -> Answer:
        """Take away the stories put aside."""
        with self._work(request) as session:
            session.lanes = []
            return {"lanes": []}

    def plan(self, request: Answer) -> Answer:
        """One step towards the clip's frame `goal`, or `done`: `arrived` or not, with a `message`."""
        goal = _whole(request, "goal")
        if not self._planning.acquire(blocking=False):
            raise Refused("another visitor's plan is being made: try again in a few seconds")
        try:
            with self._work(request, compute=False) as session:
                return self._plan(session, goal)
        finally:
            self._planning.release()

    def film(self, request: Answer) -> Answer:
        """The story as a film: `format` "webp" or "mp4", the context's frames and then the imagined ones."""
        kind = request.get("format")
        if kind not in ("webp", "mp4"):
            raise Refused("a film is webp or mp4")
        with self._work(request) as session:
            story, tubelet = session.story, self.processor.tubelet_size
            imagined = [self._frames(story, step) for step in story.steps]
            frames = torch.cat([story.scene.frames[: story.context_steps * tubelet], *imagined])
            fps = self.processor.fps
        if kind == "mp4":
            return _file("story.mp4", "video/mp4", encode_clip(frames, fps))
        pictures = [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in frames]
        buffer = io.BytesIO()
        options: dict[str, Any] = {"save_all": True, "duration": round(1000 / fps), "loop": 0, "quality": 85}
        pictures[0].save(buffer, "WEBP", append_images=pictures[1:], **options)
        return _file("story.webp", "image/webp", buffer.getvalue())

    def log(self, request: Answer) -> Answer:
        """The story's actions as a VPT log, a line a tick, from the first imagined step on."""
        with self._work(request, compute=False) as session:
            story = session.story
            if not story.steps:
                raise Refused("nothing is imagined yet: act first")
            actions = torch.stack([step.action for step in story.steps])
            start = story.state(story.context_steps - 1)
            lines = to_vpt_lines(actions, start, ticks_per_step=ticks_per_step(self.processor))
        content = "".join(json.dumps(line) + "\n" for line in lines).encode()
        return _file("story.jsonl", "application/jsonl", content)

    # --- sessions ---------------------------------------------------------------------------------------------

    def answer(self, name: str, request: Any) -> Answer:
        """A request of the page by its name; `{"error": ...}` for what a visitor can mend."""
        if not isinstance(request, dict):
            return {"error": "a request must be an object"}
        if not self._requests.acquire(blocking=False):
            return {"error": "busy: too many requests at once, try again in a few seconds", "busy": True}
        try:
            return getattr(self, name)(request)
        except ValueError as error:
            return {"error": str(error), "ended": isinstance(error, Ended)}
        finally:
            self._requests.release()

    @contextmanager
    def _work(self, request: Answer, compute: bool = True) -> Any:
        """The visitor's session, which has a story; nobody else works on it meanwhile, nor with the model."""
        with self._lock:
            self._expire()
            session = self.sessions.get(str(request.get("token", "")))
            if session is None or session.story is None:
                raise Ended("this story has ended (nothing was done for long, or the program was started anew)")
            session.used = self.clock()
        with session.lock:
            if not compute:
                yield session
            else:
                with self._compute:
                    yield session
        self._bound_caches(session)

    def _expire(self) -> None:
        now = self.clock()
        for token in [t for t, s in self.sessions.items() if now - s.used > self.limits.idle_seconds]:
            del self.sessions[token]

    def _open(self, token: str) -> tuple[str, Session]:
        """A known visitor's session, or a new one's."""
        with self._lock:
            self._expire()
            now = self.clock()
            if token in self.sessions:
                self.sessions[token].used = now
                return token, self.sessions[token]
            if len(self.sessions) >= self.limits.sessions:
                oldest = min(self.sessions, key=lambda t: self.sessions[t].used)
                if now - self.sessions[oldest].used < self.limits.spare_seconds:
                    raise Refused(f"{len(self.sessions)} visitors are playing: try again in a minute")
                del self.sessions[oldest]
            token = secrets.token_urlsafe(24)
            self.sessions[token] = Session(now)
            return token, self.sessions[token]

    def _begin(self, request: Answer, load: Callable[[], Scene]) -> Answer:
        context = _whole(request, "context")
        if not self._loading.acquire(timeout=LOAD_SECONDS):
            raise Refused("busy: other visitors' clips are being opened, try again in a few seconds")
        try:
            scene = load()
        finally:
            self._loading.release()
        story = Story(self.model, self.processor, scene, context)
        token, session = self._open(str(request.get("token", "")))
        with session.lock:
            session.story, session.shown, session.lanes, session.way = story, [], [], None
            return {"token": token, "story": self._tell(session)}

    def _bound_caches(self, latest: Session) -> None:
        with self._lock:
            others = sorted((s for s in self.sessions.values() if s is not latest), key=lambda s: s.used)
            stories = [s for s in others if s.story is not None]
            held = sum(s.story.cache_bytes for s in [*stories, latest] if s.story is not None)
            for session in stories:
                if held <= self.limits.cache_bytes:
                    return
                if session.lock.acquire(blocking=False):
                    held -= session.story.cache_bytes
                    session.story.forget()
                    session.lock.release()

    def _uploaded(self, path: Any) -> Path:
        """A path that the page names, if it is an uploaded file's: nothing else is ever opened."""
        found = Path(str(path)).resolve()
        if self.uploads is None or not found.is_relative_to(self.uploads.resolve()) or not found.is_file():
            raise Refused("the file is not here: upload it again")
        return found

    # --- what the page shows ----------------------------------------------------------------------------------

    def _tell(self, session: Session) -> Answer:
        """A whole story, for a page that has nothing of it."""
        story = session.story
        assert story is not None
        scene, tubelet = story.scene, self.processor.tubelet_size
        return {
            "name": scene.name,
            "note": scene.note,
            "context": story.context_steps,
            "logged": scene.actions is not None,
            "frames": [picture(frame) for frame in scene.frames[::tubelet]],
            "actions": [_words(a) for a in scene.actions] if scene.actions is not None else [],
            "steps": session.shown,
            "lanes": session.lanes,
        }

    def _act(self, session: Session, action: Tensor) -> Answer:
        assert session.story is not None
        step = session.story.act(action)
        session.shown.append(self._show(session.story, step))
        return session.shown[-1]

    def _show(self, story: Story, step: Step) -> Answer:
        """A step as the page has it."""
        number = len(story.steps)
        shown: Answer = {"picture": picture(self._frames(story, step)[0]), "action": _words(step.action)}
        shown |= {"seconds": number * self.seconds_per_step, "view": [float(v) for v in step.state]}
        shown["sure"] = self._sure(number)
        if story.windows and (number - 1) // (self.model.config.num_steps - story.context_steps):
            shown["sure"] += "; longer than the clips it has learnt from: it goes on from its own imagination"
        if step.followed:
            true = story.scene.features[story.now]
            shown["real"] = picture(story.scene.frames[story.now * self.processor.tubelet_size])
            shown["error"] = feature_error(step.features, true)
            shown["still"] = feature_error(story.scene.features[story.context_steps - 1], true)
        return shown

    def _sure(self, horizon: int) -> str:
        if not self.errors:
            return "how wrong it is was not measured (evaluate.py, --evaluation)"
        if horizon > len(self.errors):
            return f"how wrong it is was measured for {len(self.errors)} steps only"
        error, still = self.errors[horizon - 1]
        below = 100 * (1 - error / still)
        return f"measured error {error:.3f}, {below:.0f} % below that of standing still ({still:.3f})"

    @torch.no_grad()
    def _frames(self, story: Story, step: Step) -> Tensor:
        """What a step looks like, `(u, 3, Y, X)`, uint8: decoded, or the nearest real tubelet."""
        tubelet = self.processor.tubelet_size
        if self.decoder is not None:
            frames = self.decoder(features=step.features[None, None]).frames[0]
            return (frames * 255).round().to(torch.uint8).cpu()
        known = [story.scene, *self._real]
        distances = [(scene.features - step.features).square().flatten(1).mean(dim=1) for scene in known]
        nearest = min(range(len(known)), key=lambda i: float(distances[i].min()))
        at = int(distances[nearest].argmin())
        return known[nearest].frames[at * tubelet : (at + 1) * tubelet]

    def _put_aside(self, session: Session, title: str, shown: Sequence[Answer]) -> None:
        lane = {"title": title, "steps": [{k: s[k] for k in ("picture", "action", "seconds")} for s in shown]}
        session.lanes = [*session.lanes, lane][-MOST_LANES:]

    # --- plans ------------------------------------------------------------------------------------------------

    def _plan(self, session: Session, goal: int) -> Answer:
        story = session.story
        assert story is not None
        if goal not in range(len(story.scene.features)):
            raise Refused(f"a goal is a frame of the clip, 0 to {len(story.scene.features) - 1}, found {goal}")
        if len(story.steps) >= MOST_STEPS:
            raise Refused(f"a story has at most {MOST_STEPS} imagined steps: save it, undo, or begin again")
        wanted = story.scene.features[goal]
        before = feature_error(story.features(story.now), wanted)
        way = session.way
        if way is None or way.goal != goal:
            way = session.way = Way(goal, story.state(story.now), before)
        work = ITERATIONS * horizon_of(story)
        candidates = int(min(max(PLAN_SECONDS / self._rollout_seconds / work, FEWEST), CANDIDATES))
        started = time.perf_counter()
        ahead = way.steps < MOST_PLANNED and look_ahead(self.model, self.processor, story, way, self._space, candidates)
        if not ahead:
            session.way = None
            return {"done": True, "distance": before, "start": way.start} | self._ending(story, way, before)
        self._rollout_seconds = (time.perf_counter() - started) / work / candidates
        assert way.plan is not None
        with self._compute:
            step = self._act(session, way.plan.actions[0])
        way.steps += 1
        after = feature_error(story.features(story.now), wanted)
        answer = {"done": False, "distance": after, "before": before, "start": way.start, "step": step}
        return answer | {"expected": way.expected, "left": way.left - 1}

    def _ending(self, story: Story, way: Way, distance: float) -> Answer:
        """Whether a way has arrived: as near to the goal's frame as what is imagined usually is to what happens."""
        if self.errors:
            near = self.errors[min(max(len(story.steps), 1), len(self.errors)) - 1][0]
            why = f"the model's measured error after so many steps is {near:.3f}"
        else:
            near, why = way.start / 2, "half of that counts as arrived, since the model's error was not measured"
        arrived = distance <= near
        word = "arrived:" if arrived else "gave up: nothing that was tried comes closer than"
        if not arrived and way.steps >= MOST_PLANNED:
            word = f"gave up after {MOST_PLANNED} steps:"
        message = f"{word} {distance:.3f} from the goal, {way.start:.3f} at the start; {why}"
        return {"arrived": arrived, "message": message}


class Ended(Refused):
    """The visitor's story is no longer there."""


def picture(frame: Tensor) -> str:
    """A frame `(3, Y, X)`, uint8, as a data URI."""
    buffer = io.BytesIO()
    Image.fromarray(frame.permute(1, 2, 0).contiguous().numpy()).save(buffer, "WEBP", quality=90, method=0)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def _words(action: Tensor) -> list[str]:
    return describe_action(action).split("\n")


def _file(name: str, kind: str, content: bytes) -> Answer:
    return {"name": name, "type": kind, "data": base64.b64encode(content).decode()}


def _whole(request: Answer, name: str) -> int:
    value = request.get(name)
    if not isinstance(value, int) or isinstance(value, bool):
        raise Refused(f"{name} must be a whole number, found {str(value)[:40]!r}")
    return value


def _number(request: Answer, name: str) -> float:
    value = request.get(name, 0.0)
    if not isinstance(value, int | float) or isinstance(value, bool) or value != value:
        raise Refused(f"{name} must be a number, found {str(value)[:40]!r}")
    return float(value)
