"""Choosing clips worth looking at: the extremes of a data set and some at random (docs/data.md, "Looking at clips")."""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from heapq import heappush, heappushpop

import numpy as np

from ..actions_vjepa2_ac import ACTION_COLUMNS, DEGREES_PER_PIXEL, wrap_degrees
from .columns import RowPlace

_DX, _YAW, _PITCH = (ACTION_COLUMNS.index(name) for name in ("mouse_dx", "yaw_delta", "pitch_delta"))
_KEYS = [i for i, name in enumerate(ACTION_COLUMNS) if name.startswith("key.")]
_BUTTONS = [ACTION_COLUMNS.index(f"mouse.{side}") for side in ("left", "right", "middle")]
_SLOTS = [ACTION_COLUMNS.index(f"hotbar.{slot}") for slot in range(9)]
_GUI = ACTION_COLUMNS.index("gui_open")
_INPUTS = [0, 1, *_KEYS, *_BUTTONS]


def _turn(actions: np.ndarray) -> np.ndarray:
    return np.abs(actions[..., _YAW])


def _look(actions: np.ndarray) -> np.ndarray:
    return np.abs(actions[..., _PITCH])


def _gui_open(actions: np.ndarray) -> np.ndarray:
    return actions[..., _GUI]


def _gui_changes(actions: np.ndarray) -> np.ndarray:
    return _changes(actions[..., _GUI])


def _slot_changes(actions: np.ndarray) -> np.ndarray:
    slots = actions[..., _SLOTS]
    known = np.asarray(slots.any(axis=-1))
    both = known & np.concatenate([known[..., :1], known[..., :-1]], axis=-1)
    return _changes(slots.argmax(axis=-1)) * both


def _clicks(actions: np.ndarray) -> np.ndarray:
    return actions[..., _BUTTONS].sum(axis=-1)


def _keys(actions: np.ndarray) -> np.ndarray:
    return actions[..., _KEYS].sum(axis=-1)


def _idle(actions: np.ndarray) -> np.ndarray:
    return (actions[..., _INPUTS] == 0).all(axis=-1)


def _disagreement(actions: np.ndarray) -> np.ndarray:
    """Degrees between the turn and what the mouse asked for, where no GUI is open at either end of the action."""
    turn = np.abs(wrap_degrees(actions[..., _YAW].astype(np.float64) - DEGREES_PER_PIXEL * actions[..., _DX]))
    closed = actions[..., _GUI] == 0
    closed[..., :-1] &= closed[..., 1:]
    closed[..., -1] = False  # whether the GUI is open where the last action ends is not known
    return np.where(closed, turn, 0.0)


def _changes(values: np.ndarray) -> np.ndarray:
    """1 at every action whose value differs from the action's before."""
    return np.concatenate([np.zeros_like(values[..., :1]), values[..., 1:] != values[..., :-1]], axis=-1)


@dataclass(frozen=True)
class Event:
    """Something to look for in a clip.

    Args:
        name: what pages call it.
        strengths: raw actions `(n, K, 38)` -> `(n, K)`, how much of it every action has.
        summed: a clip's score is the sum over its actions, else the largest.
        text: the score in words, with `{score}` and, unless summed, `{action}`.
        least: scores below are none of the event.
    """

    name: str
    strengths: Callable[[np.ndarray], np.ndarray]
    summed: bool
    text: str
    least: float

    def scores(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Score of every clip and the action it comes from: float64 `(n,)`, int64 `(n,)`."""
        strengths = np.asarray(self.strengths(actions), dtype=np.float64)
        scores = strengths.sum(axis=-1) if self.summed else strengths.max(axis=-1)
        return scores, strengths.argmax(axis=-1)

    def words(self, score: float, action: int) -> str:
        return self.text.format(score=score, action=action)


EVENTS: tuple[Event, ...] = (
    Event("largest turn", _turn, False, "{score:.1f}° in action {action}", 1e-6),
    Event("GUI opens or closes", _gui_changes, True, "{score:.0f} times between two actions", 1),
    Event("most mouse buttons", _clicks, True, "{score:.0f} buttons down, summed over actions", 1),
    Event("idle", _idle, True, "{score:.0f} actions without any input", 1),
    Event("mouse and view disagree", _disagreement, False, "by {score:.1f}° in action {action}, no GUI open", 1.0),
    Event("most keys", _keys, True, "{score:.0f} keys down, summed over actions", 1),
    Event("hotbar slot changes", _slot_changes, True, "{score:.0f} times between two actions", 1),
    Event("largest look up or down", _look, False, "{score:.1f}° in action {action}", 1e-6),
    Event("GUI open longest", _gui_open, True, "at the start of {score:.0f} actions", 1),
)
# The order in which places on the page are filled, again and again; None: a clip drawn at random.
_TURNS: tuple[Event | None, ...] = (
    EVENTS[0],
    None,
    EVENTS[1],
    EVENTS[2],
    EVENTS[3],
    None,
    *EVENTS[4:],
    None,
)


@dataclass(frozen=True, order=True)
class Candidate:
    """A clip that may be chosen; `lot` is its place in the seeded draw, a hash that no order of files changes."""

    lot: int
    recording_id: str
    start_tick: int
    session_id: str = field(compare=False)
    place: RowPlace = field(compare=False)
    score: float = field(compare=False, default=0.0)
    action: int = field(compare=False, default=0)

    @property
    def clip(self) -> tuple[str, int]:
        return self.recording_id, self.start_tick


@dataclass
class Choice:
    """A chosen clip and why it was."""

    candidate: Candidate
    reasons: list[str]


class ClipChooser:
    """Chooses clips by event, spread over sessions, while the data set streams past.

    Memory grows with the number of sessions, not of clips: for every event the best clip of each session is kept.

    Args:
        num_clips: how many to choose.
        seed: of the draw, which also decides between clips of equal score.

    Raises:
        ValueError: fewer than one clip.
    """

    def __init__(self, num_clips: int, seed: int) -> None:
        if num_clips < 1:
            raise ValueError(f"num_clips must be at least 1, found {num_clips}")
        self.num_clips, self.seed = num_clips, seed
        self.num_seen = 0
        self._best: dict[str, dict[str, Candidate]] = {event.name: {} for event in EVENTS}
        self._drawn: dict[str, Candidate] = {}  # of each session the clip with the lowest lot
        self._lowest: list[tuple[int, Candidate]] = []  # a heap of the lowest lots of all, as negative numbers

    def update(
        self,
        actions: np.ndarray,
        recording_ids: Sequence[str],
        session_ids: Sequence[str],
        start_ticks: Sequence[int],
        places: Sequence[RowPlace],
    ) -> None:
        """Look at n clips: actions `(n, K, 38)` in raw units, and for each its names, first tick and place."""
        names = list(zip(recording_ids, start_ticks, strict=True))
        lots = [_lot(self.seed, *name) for name in names]
        candidates = [
            Candidate(lot, *name, session, place)
            for lot, name, session, place in zip(lots, names, session_ids, places, strict=True)
        ]
        self.num_seen += len(candidates)
        for candidate in candidates:
            other = self._drawn.get(candidate.session_id)
            if other is None or candidate < other:
                self._drawn[candidate.session_id] = candidate
            keep = heappush if len(self._lowest) < self.num_clips else heappushpop
            keep(self._lowest, (-candidate.lot, candidate))
        for event in EVENTS:
            self._update_event(event, actions, candidates)

    def _update_event(self, event: Event, actions: np.ndarray, candidates: list[Candidate]) -> None:
        best = self._best[event.name]
        scores, places = event.scores(actions)
        for index in np.flatnonzero(scores >= event.least):
            candidate, score = candidates[index], float(scores[index])
            other = best.get(candidate.session_id)
            if other is None or (-score, candidate) < (-other.score, other):
                best[candidate.session_id] = replace(candidate, score=score, action=int(places[index]))

    def choose(self) -> list[Choice]:
        """The chosen clips, as many as asked for or as there are, extremes of the whole first."""
        chosen: dict[tuple[str, int], Choice] = {}
        sessions: Counter[str] = Counter()
        first_time, before = True, -1
        while len(chosen) < self.num_clips and before < len(chosen):
            before = len(chosen)
            for event in _TURNS:
                if len(chosen) == self.num_clips:
                    break
                found = self._next(event, first_time, chosen, sessions)
                if found is None:
                    continue
                candidate, reason = found
                if candidate.clip not in chosen:
                    chosen[candidate.clip] = Choice(candidate, [])
                    sessions[candidate.session_id] += 1
                chosen[candidate.clip].reasons.append(reason)
            first_time = False
        return list(chosen.values())

    def _next(
        self, event: Event | None, first_time: bool, chosen: dict[tuple[str, int], Choice], sessions: Counter[str]
    ) -> tuple[Candidate, str] | None:
        def least_shown(candidate: Candidate) -> tuple[int, float, Candidate]:
            return sessions[candidate.session_id], -candidate.score, candidate

        if event is None:
            drawn = [*self._drawn.values(), *(candidate for _, candidate in self._lowest)]
            free = [candidate for candidate in drawn if candidate.clip not in chosen]
            return (min(free, key=least_shown), "drawn at random") if free else None
        candidates = list(self._best[event.name].values())
        if not candidates:
            return None
        if first_time:
            score = max(candidate.score for candidate in candidates)
            equal = [candidate for candidate in candidates if candidate.score == score]
            # One clip may be the extreme in several ways.
            found = next((c for c in equal if c.clip in chosen), None) or min(equal, key=least_shown)
            return found, f"{event.name}, of all {self.num_seen:,} clips: {event.words(found.score, found.action)}"
        free = [candidate for candidate in candidates if candidate.clip not in chosen]
        if not free:
            return None
        found = min(free, key=least_shown)
        return found, f"{event.name}, of its session: {event.words(found.score, found.action)}"


def _lot(seed: int, recording_id: str, start_tick: int) -> int:
    name = f"{seed}/{recording_id}/{start_tick}"
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
