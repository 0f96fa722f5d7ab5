"""Worlds that a model imagines: the goals of `GoalViewWrapper` without the game (docs/environments.md, "Imagined").

Letters: B worlds, P pairs, T steps of a clip, N tokens a step, D encoder width, A action columns, K = N + 2.
"""

import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.utils.seeding import np_random
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from torch import Tensor
from transformers import DynamicCache

from ..actions_vjepa2_ac import ACTION_COLUMNS, DEGREES_PER_PIXEL, wrap_degrees
from ..evaluation.clips import check_head_fits, check_model_and_processor, check_same_steps
from ..loading.clips import check_clips, check_geometry, clip_name, decode_clip, load_clips
from ..modeling_vjepa2_ac import CONDITIONING_TOKENS, VJEPA2ACModel
from ..processing_vjepa2_ac import VJEPA2ACProcessor, add_view_changes
from .steps import raw_action_space

_INPUTS = slice(ACTION_COLUMNS.index("key.1"), ACTION_COLUMNS.index("mouse.middle") + 1)
_WALKS = [ACTION_COLUMNS.index(f"key.{key}") for key in ("w", "a", "s", "d", "space")]
_FIRST_SLOT, _GUI = ACTION_COLUMNS.index("hotbar.0"), ACTION_COLUMNS.index("gui_open")
_NUMBER_KEYS = slice(ACTION_COLUMNS.index("key.1"), ACTION_COLUMNS.index("key.9") + 1)
_ENCODED_AT_ONCE, _MEASURED_VIEWS = 64, 1024
Judge = tuple[VJEPA2ACModel, VJEPA2ACProcessor]


def find_turns(actions: np.ndarray, states: np.ndarray, most_degrees: float, most_look: float = 2.0) -> np.ndarray:
    """Pairs of steps of one clip between which the player turned on the spot.

    No movement key is pressed between the two and no GUI is open; each pair counts in both directions.

    Args:
        actions: `(clips, T - 1, 38)`, raw.
        states: `(clips, T, 2)`, degrees.
        most_degrees: largest turn.
        most_look: largest change of the pitch.

    Returns:
        `(P, 3)`: clip, step of the start, step of the goal; sorted by the turn to the right, in degrees.
    """
    moving = (actions[..., _WALKS] > 0).any(axis=-1) | (actions[..., _GUI] > 0)
    found = []
    for first in range(states.shape[1] - 1):
        for last in range(first + 1, states.shape[1]):
            turn, look = np.abs(wrap_degrees(states[:, last] - states[:, first])).T
            fits = ~moving[:, first:last].any(axis=1) & (look <= most_look) & (turn <= most_degrees)
            clips = np.flatnonzero(fits)
            ends = np.full_like(clips, first), np.full_like(clips, last)
            found += [np.stack([clips, *ends], axis=1), np.stack([clips, *ends[::-1]], axis=1)]
    pairs = np.concatenate(found)
    return pairs[np.argsort(turns_of(pairs, states), kind="stable")]


def _goal_pairs(
    actions: np.ndarray, states: np.ndarray, steps: tuple[int, int], turn: tuple[float, float], name: str
) -> np.ndarray:
    """`find_turns` up to the largest goal, at least one of them a goal by itself."""
    if not 1 <= steps[0] <= steps[1] or not 0 < turn[0] <= turn[1] or steps[1] * turn[1] >= 180:
        raise ValueError(
            f"steps must be 1 <= least <= most, turn 0 < least <= most, and together below 180 degrees, found {steps} "
            f"and {turn}"
        )
    pairs = find_turns(actions, states, steps[1] * turn[1])
    largest = np.abs(turns_of(pairs, states)).max(initial=0.0)
    if largest < turn[0]:
        raise ValueError(
            f"{name}: goals are turns on the spot of at least {turn[0]:g} degrees, the largest in these {len(states)} "
            f"clips is of {largest:.1f} degrees"
        )
    return pairs


def turns_of(pairs: np.ndarray, states: np.ndarray) -> np.ndarray:
    """Degrees to the right from start to goal, in [-180, 180), `(P,)`."""
    clips, starts, goals = pairs.T
    return wrap_degrees(states[clips, goals, 0].astype(np.float64) - states[clips, starts, 0])


class RecordedGoals:
    """Starts and goal views for imagined worlds: two frames of a clip between which the player turned on the spot.

    A goal is as far away as the game's: the sum of one to three turns of 10 to 30 degrees to one side, and then the
    nearest of the recorded pairs, by chance one of `choice`. Frames are kept as bytes at the model's size, one a step.

    Args:
        model: a `VJEPA2ACModel`, on the device and in the dtype to be used.
        processor: its processor.
        frames: uint8 `(clips, T, 3, Y, X)`, the first frame of each step, of the model's size.
        actions: `(clips, T - 1, 38)`, raw.
        states: `(clips, T, 2)`, degrees.
        steps: least and most steps of the oracle, as `GoalViewWrapper` has them.
        turn: least and most degrees that it turns in a step, likewise.
        on_the_way: begin anywhere on the way to the goal, not only where the game would: what is imagined fades step by
            step, and policies see views close to the goal as they are. False: at the game's distances alone.
        choice: of how many pairs of about the drawn turn one is taken.
        name: what messages call the clips.

    Attributes:
        pairs: int `(P, 3)`, see `find_turns`.
        turns: float64 `(P,)`, degrees to the right.
        recorded_steps: steps of the model that the recordings hold, each tick counted once; 0 where not known.

    Raises:
        ValueError: no two frames of a turn as large as `turn`'s least; shapes that do not fit together.
    """

    def __init__(
        self,
        model: VJEPA2ACModel,
        processor: VJEPA2ACProcessor,
        frames: Tensor,
        actions: np.ndarray,
        states: np.ndarray,
        *,
        steps: tuple[int, int] = (1, 3),
        turn: tuple[float, float] = (10.0, 30.0),
        on_the_way: bool = True,
        choice: int = 32,
        name: str = "clips",
    ):
        clips, num_steps = frames.shape[:2]
        if actions.shape[:2] != (clips, num_steps - 1) or states.shape != (clips, num_steps, 2):
            raise ValueError(
                f"{name}: {clips} clips of {num_steps} steps need actions ({clips}, {num_steps - 1}, "
                f"{len(ACTION_COLUMNS)}) and states ({clips}, {num_steps}, 2), found {actions.shape} and {states.shape}"
            )
        self.model, self.processor, self.name = model, processor, name
        self.frames, self.states = frames, states.astype(np.float64)
        self.steps, self.turn, self.on_the_way, self.choice = steps, turn, on_the_way, choice
        self.pairs = _goal_pairs(actions, self.states, steps, turn, name)
        self.turns = turns_of(self.pairs, self.states)
        self.slots = actions[..., _FIRST_SLOT:_GUI].argmax(axis=-1)  # of steps 0 .. T - 2
        self.ticks_per_step = round(processor.tubelet_size * processor.native_fps / processor.fps)
        self.recorded_steps = 0
        self._measure()

    @classmethod
    def from_dataset(
        cls,
        dataset: str,
        model: VJEPA2ACModel,
        processor: VJEPA2ACProcessor,
        *,
        split: str = "train",
        most_clips: int = 2048,
        steps: tuple[int, int] = (1, 3),
        turn: tuple[float, float] = (10.0, 30.0),
        **options: Any,
    ) -> "RecordedGoals":
        """Goals from a built data set.

        Args:
            dataset: folder or Hub repository.
            model: as above.
            processor: as above.
            split: the training split, whose players no evaluation sees.
            most_clips: how many of the clips that hold such goals are kept, evenly spaced: their frames are in memory.
            steps: as above.
            turn: as above.
            options: `RecordedGoals`'s.

        Raises:
            ValueError: a model and processor that do not fit together; clips of another frame rate, length or shape;
                no goals.
        """
        check_model_and_processor(model, processor)
        check_geometry(dataset, processor)
        name = f"{dataset}, split {split}"
        clips: Any = load_clips(dataset, split)
        check_clips(clips, processor, name)
        columns = clips.select_columns(["actions", "states"]).with_format("numpy")[:]
        actions, states = (np.asarray(columns[column]) for column in ("actions", "states"))
        pairs = _goal_pairs(actions, states, steps, turn, name)
        held = np.unique(pairs[np.abs(turns_of(pairs, states)) >= turn[0], 0])
        chosen = held[np.unique(np.linspace(0, len(held) - 1, min(most_clips, len(held))).round().astype(int))]
        frames = [
            processor.prepare_frames(
                [decode_clip(row["video"], f"{name}, {clip_name(row)}", processor.frames_per_clip, processor.fps)]
            )[:, :: processor.tubelet_size]
            for row in clips.select(chosen)
        ]
        goals = cls(
            model,
            processor,
            torch.cat(frames),
            actions[chosen],
            states[chosen],
            steps=steps,
            turn=turn,
            name=name,
            **options,
        )
        length = states.shape[1] * goals.ticks_per_step
        covered = _covered(clips["recording_id"], clips["start_tick"], length)
        goals.recorded_steps = covered // goals.ticks_per_step
        return goals

    @property
    def checksum(self) -> str:
        """CRC-32 of frames and pairs."""
        return f"{zlib.crc32(self.frames.numpy().data, zlib.crc32(self.pairs.tobytes())):08x}"

    def draw(self, generator: np.random.Generator) -> int:
        """The number of a pair."""
        side, count = generator.choice([-1, 1]), generator.integers(self.steps[0], self.steps[1] + 1)
        turn = side * generator.uniform(*self.turn, size=count).sum()
        if self.on_the_way:
            turn *= generator.random()
        first = np.searchsorted(self.turns, turn) - self.choice // 2
        first = int(np.clip(first, 0, max(len(self.turns) - self.choice, 0)))
        return first + int(generator.integers(min(self.choice, len(self.turns))))

    def encode(self, clips: np.ndarray, steps: np.ndarray) -> Tensor:
        """Features `(B, N, D)` of the views that begin these steps, as a tubelet that stands still; float32."""
        still = self.frames[torch.from_numpy(clips), torch.from_numpy(steps)].unsqueeze(1)
        still = still.repeat(1, self.processor.tubelet_size, 1, 1, 1).to(self.model.device)
        with torch.no_grad():
            return self.model.encode(self.processor.normalize_pixels(still))[:, 0].float()

    def structure(self, features: Tensor) -> np.ndarray:
        """What a view has of its own, `(B,)`, of features `(B, N, D)`: its mean squared difference from the mean view,
        in units of the recorded views' variance; 1 on average for recorded views, 0 for the mean of all of them."""
        own = (features - self._mean).square().mean(dim=(1, 2)) / self._variance
        return own.cpu().numpy()

    def disagreement(self, imagined: Sequence[Tensor]) -> np.ndarray:
        """Variance `(B,)` over what several models imagine of the same views, `(B, N, D)` each, in the same units."""
        views = torch.stack([features.to(self._mean.device) for features in imagined])
        return (views.var(dim=0, correction=0).mean(dim=(1, 2)) / self._variance).cpu().numpy()

    def _measure(self) -> None:
        """Mean view `(N, D)` and the variance about it."""
        clips, steps = np.unravel_index(
            np.linspace(0, self.frames.shape[0] * self.frames.shape[1] - 1, _MEASURED_VIEWS).round().astype(int),
            tuple(self.frames.shape[:2]),
        )
        total, squares, count = torch.zeros(()), torch.zeros(()), len(clips)
        for start in range(0, count, _ENCODED_AT_ONCE):
            at = slice(start, start + _ENCODED_AT_ONCE)
            features = self.encode(clips[at], steps[at]).double()
            total, squares = total + features.sum(dim=0).cpu(), squares + features.square().sum(dim=0).cpu()
        self._mean = (total / count).float().to(self.model.device)
        self._variance = float((squares / count - (total / count).square()).mean())


def _covered(recordings: Sequence[str], starts: Sequence[int], length: int) -> int:
    """Ticks of recordings that clips of this length cover, each counted once."""
    covered, last = 0, ("", 0)
    for recording, start in sorted(zip(recordings, starts, strict=True)):
        end = start + length
        covered += min(length, end - last[1]) if recording == last[0] else length
        last = recording, end
    return covered


class _Imagination:
    """What a model imagines of B worlds, with its keys and values, in memory that does not grow.

    Worlds that have gone equally far are advanced by one call of the predictor, which sees the new step alone.
    """

    def __init__(self, model: VJEPA2ACModel, processor: VJEPA2ACProcessor, count: int, max_steps: int):
        self.model, self.processor, self.max_steps = model, processor, max_steps
        size = (count, model.config.num_tokens, model.config.feature_size)
        self.features = torch.zeros(size, device=model.device)
        self._past: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def step(self, raw: np.ndarray, view: np.ndarray, done: np.ndarray) -> None:
        """Raw actions `(B, 38)` from views `(B, 2)`, degrees, that are `done` `(B,)` steps from their starts."""
        actions = self.processor.normalize_actions(raw).to(self.model.device)
        states = self.processor.normalize_states(view).to(self.model.device)
        imagined = torch.empty_like(self.features)
        for steps in np.unique(done):
            at = torch.from_numpy(np.flatnonzero(done == steps))
            cache = DynamicCache()
            tokens = int(steps) * (self.model.config.num_tokens + CONDITIONING_TOKENS)
            for layer, (keys, values) in enumerate(self._past if steps else ()):
                cache.update(keys[at, :, :tokens], values[at, :, :tokens], layer)
            step = (t[at].unsqueeze(1) for t in (self.features, actions, states))
            imagined[at] = self.model.rollout(*step, past_key_values=cache)[:, 0].float()
            self._remember(at, tokens, cache)
        self.features = imagined

    def _remember(self, at: Tensor, tokens: int, cache: DynamicCache) -> None:
        """Keep the keys and values of the step that was done, behind those of the `tokens` before."""
        for number, layer in enumerate(cache.layers):
            assert layer.keys is not None and layer.values is not None
            if number == len(self._past):
                size = self.max_steps * (layer.keys.shape[2] - tokens)
                count, (_, heads, _, width) = len(self.features), layer.keys.shape
                made = layer.keys.new_zeros(2, count, heads, size, width)
                self._past.append((made[0], made[1]))
            for kept, new in zip(self._past[number], (layer.keys, layer.values), strict=True):
                kept[at, :, tokens : new.shape[2]] = new[:, :, tokens:]


class _Worlds:
    """B imagined episodes: what each has seen and is to reach."""

    def __init__(
        self,
        goals: RecordedGoals,
        count: int,
        *,
        actions: Mapping[str, np.ndarray] | None = None,
        max_steps: int | None = None,
        tolerance_degrees: float = 5.0,
        hold: int = 1,
        success_reward: float = 0.0,
        max_doubt: float | None = None,
        others: Sequence[Judge] = (),
    ):
        for number, (model, processor) in enumerate(others, start=1):
            check_model_and_processor(model, processor)
            check_same_steps(goals.processor, processor)
            check_head_fits(model, goals.model, f"other model {number}")
        config = goals.model.config
        known = min(model.config.num_steps for model in (goals.model, *[model for model, _ in others])) - 1
        self.max_steps = known if max_steps is None else max_steps
        if not 1 <= self.max_steps <= known:
            raise ValueError(
                f"max_steps must be 1 to {known}, since the model knows clips of {known + 1} steps, the first of which "
                f"is the start; found {max_steps}"
            )
        if not 1 <= hold <= self.max_steps:
            raise ValueError(f"hold must be 1 to max_steps {self.max_steps}, found {hold}")
        if not 0 < tolerance_degrees < math.inf or not 0 <= success_reward < math.inf:
            raise ValueError(
                f"tolerance_degrees must be above 0 and success_reward at least 0, both finite, found "
                f"{tolerance_degrees} and {success_reward}"
            )
        if max_doubt is not None and not max_doubt > 0:
            raise ValueError(f"max_doubt must be above 0, or None for no limit, found {max_doubt}")
        self.goals, self.hold, self.max_doubt = goals, hold, max_doubt
        self.tolerance_degrees, self.success_reward = tolerance_degrees, success_reward
        whole = raw_action_space(goals.ticks_per_step)
        wrong = [name for name, action in (actions or {}).items() if action not in whole]
        if wrong:
            raise ValueError(f"actions must be in {whole}, found others: {wrong}")
        self._table = np.stack(list(actions.values())) if actions else None
        self.action_space = spaces.Discrete(len(actions)) if actions else whole
        shape = (1, config.num_tokens, config.feature_size)
        views = {key: spaces.Box(-np.inf, np.inf, shape, np.float32) for key in ("features", "goal")}
        self.observation_space = spaces.Dict({**views, "state": spaces.Box(-np.inf, np.inf, (2,), np.float32)})
        judges = ((goals.model, goals.processor), *others)
        self.imaginations = [_Imagination(*judge, count, self.max_steps) for judge in judges]
        self.goal = torch.zeros_like(self.features)
        self.state, self.goal_state = np.zeros((count, 2)), np.zeros((count, 2))
        self.done, self.held, self.slots = (np.zeros(count, dtype=int) for _ in range(3))
        self.structure = np.zeros(count)  # of each start

    @property
    def features(self) -> Tensor:
        """The views `(B, N, D)`, as the first model imagines them."""
        return self.imaginations[0].features

    def begin(self, worlds: np.ndarray, generators: Sequence[np.random.Generator]) -> None:
        """New episodes in these worlds, each drawn from its own generator."""
        goals = self.goals
        clips, starts, ends = goals.pairs[[goals.draw(generator) for generator in generators]].T
        encoded = goals.encode(np.concatenate([clips, clips]), np.concatenate([starts, ends]))
        at = torch.from_numpy(worlds)
        start, self.goal[at] = encoded.split(len(worlds))
        for imagination in self.imaginations:
            imagination.features[at] = start.to(imagination.features.device)
        self.state[worlds], self.goal_state[worlds] = goals.states[clips, starts], goals.states[clips, ends]
        self.slots[worlds] = goals.slots[clips, np.minimum(starts, goals.slots.shape[1] - 1)]
        self.structure[worlds] = goals.structure(start)
        self.done[worlds] = self.held[worlds] = 0

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        """Rewards, terminated, truncated and info of all worlds, `(B,)` each."""
        raw = self._executed(actions)
        before = self.degrees()
        for imagination in self.imaginations:
            imagination.step(raw, self.state, self.done)
        self.state = self._turned(raw)
        self.done += 1
        degrees = self.degrees()
        near = degrees <= self.tolerance_degrees
        self.held = np.where(near, self.held + 1, 0)
        success = self.held >= self.hold
        doubt = self.doubt()
        doubtful = np.zeros_like(success) if self.max_doubt is None else (doubt > self.max_doubt) & ~success
        rewards = (before - degrees) / self.tolerance_degrees + self.success_reward * success
        ended = np.where(doubtful, "doubt", "")
        info = self.info() | {"success": success, "doubt": doubt, "ended": ended}
        return rewards, success, ~success & (doubtful | (self.done >= self.max_steps)), info

    def info(self) -> dict[str, np.ndarray]:
        """Of all worlds, where an episode begins."""
        count = len(self.done)
        return {
            "success": np.zeros(count, dtype=bool),
            "goal_degrees": self.degrees(),
            "goal_features": (self.features - self.goal).abs().mean(dim=(1, 2)).cpu().numpy(),
            "doubt": np.zeros(count),
            "ended": np.full(count, "", dtype="<U5"),
        }

    def observe(self) -> dict[str, np.ndarray]:
        views = {"features": self.features, "goal": self.goal}
        return {k: v.unsqueeze(1).cpu().numpy().copy() for k, v in views.items()} | {
            "state": self.state.astype(np.float32)
        }

    def doubt(self) -> np.ndarray:
        """Of several models how far they disagree, of one alone what the views have lost of their own since the start;
        `(B,)`, in units of the recorded views' variance.

        A predictor that is trained to be near predicts what is left open by its mean: what its predictions lack of the
        variance is their expected squared error (law of total variance). No second model is needed.
        """
        if len(self.imaginations) > 1:
            return self.goals.disagreement([imagination.features for imagination in self.imaginations])
        return self.structure - self.goals.structure(self.features)

    def degrees(self) -> np.ndarray:
        """`view_distance` of each world's view and goal."""
        return np.hypot(
            wrap_degrees(self.state[:, 0] - self.goal_state[:, 0]), self.state[:, 1] - self.goal_state[:, 1]
        )

    def _executed(self, actions: np.ndarray) -> np.ndarray:
        """Raw actions `(B, 38)` as the game would do them: the view follows the mouse, the slot the number keys."""
        asked = np.asarray(actions)
        if self._table is not None:
            if asked.shape != self.done.shape or not np.isin(asked, np.arange(len(self._table))).all():
                raise ValueError(f"actions must be {len(self.done)} numbers below {len(self._table)}, found {asked}")
            asked = self._table[asked.astype(int)]
        shape = (len(self.done), len(ACTION_COLUMNS))
        if asked.shape != shape or not np.isfinite(asked).all():
            raise ValueError(f"actions must be raw, {shape} finite numbers, found shape {asked.shape}: {asked}")
        raw = np.zeros(shape)
        raw[:, :2] = np.round(asked[:, :2])
        raw[:, 2:4] = raw[:, :2] * DEGREES_PER_PIXEL
        raw[:, 3] = np.clip(self.state[:, 1] + raw[:, 3], -90, 90) - self.state[:, 1]
        raw[:, _INPUTS] = asked[:, _INPUTS] >= 0.5
        raw[np.arange(len(raw)), _FIRST_SLOT + self.slots] = 1
        keys = raw[:, _NUMBER_KEYS]
        self.slots = np.where(keys.any(axis=1), keys.argmax(axis=1), self.slots)
        return raw

    def _turned(self, raw: np.ndarray) -> np.ndarray:
        """The views after these actions."""
        changes = torch.from_numpy(raw[:, None, 2:4])
        return add_view_changes(torch.from_numpy(self.state), changes)[:, 0].numpy()


class ImaginedVPTEnv(gymnasium.Env):
    """Turn until the view is the goal's, in a model's imagination: `GoalViewWrapper`'s task without a game.

    An episode begins at a recorded view; every step is a rollout of the model by one step, with the keys and values of
    the steps before. Observations are what `VJEPA2ACFeatureWrapper` makes of the game with `pooling="none"`,
    `still_keys=("goal",)` and `still_frames`: `features` and `goal`, float32 `(1, N, D)`, and `state`, float32 `(2,)`,
    yaw and pitch in degrees, integrated from the actions. Reward, success and `hold` are `GoalViewWrapper`'s, over the
    integrated view and that of the goal's recorded state.

    `info` has `success`, `goal_degrees`, `goal_features` (mean absolute difference of imagined and goal features),
    `doubt` (how much the view has lost since the start of what is its own: `RecordedGoals.structure`; with `others` how
    far the models disagree, `RecordedGoals.disagreement`) and `ended`: "doubt" where more than `max_doubt` truncates
    the episode.

    Args:
        goals: starts and goals, and the model.
        actions: `(38,)` raw actions by name, to be chosen among by number; None: raw actions, as `ModelStepWrapper`
            takes them.
        max_steps: then the episode is truncated; None: as many as the model knows, a clip's steps less the start.
        tolerance_degrees: a view as close as this is a success.
        hold: steps in a row that must end so close.
        success_reward: for a success, beside the decrease of the distance in tolerances.
        max_doubt: more than this truncates an episode; None: no limit.
        others: more models with their processors, over the same encoder: each imagines the same episode for itself,
            from the same start, and their disagreement is the doubt. What is observed stays the first one's.

    Raises:
        ValueError: more steps than the models' clips have; values that contradict each other; other models of another
            encoder, other actions or other steps (the message has both values).
    """

    metadata = {"render_modes": []}

    def __init__(self, goals: RecordedGoals, **options: Any):
        self._worlds = _Worlds(goals, 1, **options)
        self.observation_space = self._worlds.observation_space
        self.action_space = self._worlds.action_space
        self._begun = False

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        """A new start and goal, drawn from the seed."""
        super().reset(seed=seed)
        if options:
            raise ValueError(f"reset takes no options, found {options}")
        self._worlds.begin(np.arange(1), [self.np_random])
        self._begun = True
        return self._first(self._worlds.observe()), self._first(self._worlds.info())

    def step(self, action: Any) -> tuple[dict, float, bool, bool, dict]:
        """A step of the model.

        Raises:
            ValueError: another action than the action space's.
            RuntimeError: the episode has ended, or none was begun.
        """
        if not self._begun:
            raise RuntimeError("the episode has ended, or none was begun: call reset()")
        rewards, terminated, truncated, info = self._worlds.step(np.asarray(action)[None])
        self._begun = not (terminated[0] or truncated[0])
        seen = self._first(self._worlds.observe())
        return seen, float(rewards[0]), bool(terminated[0]), bool(truncated[0]), self._first(info)

    def _first(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        return {k: v[0] if v[0].ndim else v[0].item() for k, v in batch.items()}


class ImaginedVPTVectorEnv(gymnasium.vector.VectorEnv):
    """`ImaginedVPTEnv` many times over, advanced together; autoreset mode `SAME_STEP`.

    A step of all worlds is one call of the predictor for those that have gone equally far: one where all began
    together, at most `max_steps`. Memory is that of the features, and of keys and values of `max_steps` steps.

    Args:
        goals: as for `ImaginedVPTEnv`.
        num_envs: B.
        options: `ImaginedVPTEnv`'s.

    Raises:
        ValueError: what `ImaginedVPTEnv` refuses; fewer than one world.
    """

    metadata = {"render_modes": [], "autoreset_mode": AutoresetMode.SAME_STEP}

    def __init__(self, goals: RecordedGoals, num_envs: int, **options: Any):
        if num_envs < 1:
            raise ValueError(f"num_envs must be at least 1, found {num_envs}")
        self.num_envs = num_envs
        self._worlds = _Worlds(goals, num_envs, **options)
        self.single_observation_space = self._worlds.observation_space
        self.single_action_space = self._worlds.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._generators: list[np.random.Generator] = []

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict, dict]:
        """New episodes in all worlds.

        Args:
            seed: of the first world, the next one's is one more; or one a world, None goes on with its random numbers.
            options: none are known.
        """
        if options:
            raise ValueError(f"reset takes no options, found {options}")
        seeds = [seed + i for i in range(self.num_envs)] if isinstance(seed, int) else seed
        seeds = [None] * self.num_envs if seeds is None else list(seeds)
        if len(seeds) != self.num_envs:
            raise ValueError(f"seed must be one number, or one for each of {self.num_envs} worlds, found {len(seeds)}")
        known: list[Any] = [*self._generators] or [None] * self.num_envs
        self._generators = [
            generator if s is None and generator is not None else np_random(s)[0]
            for s, generator in zip(seeds, known, strict=True)
        ]
        self._worlds.begin(np.arange(self.num_envs), self._generators)
        return self._worlds.observe(), _masked(self._worlds.info(), np.ones(self.num_envs, dtype=bool))

    def step(self, actions: Any) -> tuple[dict, np.ndarray, np.ndarray, np.ndarray, dict]:
        """A step of every world; where an episode ends, the next one begins, and `info` has `final_obs` and
        `final_info`."""
        if not self._generators:
            raise RuntimeError("no episode was begun: call reset()")
        rewards, terminated, truncated, info = self._worlds.step(np.asarray(actions))
        ended = terminated | truncated
        if not ended.any():
            return self._worlds.observe(), rewards, terminated, truncated, _masked(info, ~ended)
        last, worlds = self._worlds.observe(), np.flatnonzero(ended)
        finals = np.full(self.num_envs, None, dtype=object)
        for i in worlds:
            finals[i] = {key: value[i] for key, value in last.items()}
        self._worlds.begin(worlds, [self._generators[i] for i in worlds])
        begun = self._worlds.info()
        shown = {k: np.where(ended, begun[k], v) for k, v in info.items()}
        more = {"final_obs": finals, "final_info": _masked(info, ended)}
        everywhere = _masked(shown, np.ones_like(ended))
        return self._worlds.observe(), rewards, terminated, truncated, {**everywhere, **_masked(more, ended)}

    def get_attr(self, name: str) -> tuple[Any, ...]:
        """As Gymnasium's vector environments of single ones have it: of each world."""
        return (getattr(self, name),) * self.num_envs

    def close_extras(self, **_: Any) -> None:
        """Let go of features, keys and values."""
        del self._worlds


def _masked(info: dict[str, Any], who: np.ndarray) -> dict[str, Any]:
    """As Gymnasium's vector environments say whose values these are."""
    return {**info, **{f"_{key}": who.copy() for key in info}}
