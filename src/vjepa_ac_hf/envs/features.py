"""Features of a frozen encoder in place of frames, for one environment or many (docs/environments.md, "Features").

Letters: B environments, L remembered frames, F frames of a tubelet, T steps, N tokens a step, D encoder width.
"""

from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.utils import RecordConstructorArgs
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from torch import Tensor

from ..modeling_vjepa2_ac import VJEPA2ACModel
from ..processing_vjepa2_ac import VJEPA2ACProcessor, resize_frames

POOLINGS = ("mean", "none")


class FrameEncoder:
    """The latest frames of B environments, and their features.

    Args:
        model: its encoder is used, on the model's device and in its dtype.
        processor: for geometry and normalisation of the frames.
        space: of a single environment's observation: a Box of frames or a Dict that has one.
        frame_key: the Dict's frames.
        still_keys: other frames of the Dict, each of which is encoded on its own, as a tubelet that stands still.
        still_frames: whether each frame of `frame_key` is encoded so too, one a step, and so compares with the stills.
            None: where the Dict has a `tubelet` beside the frames: they are the frames of model steps, and two of them
            are further apart than the frames of any tubelet that the model was trained on.
        num_steps: T, steps of which features are given.
        spacing: environment steps between two frames of a step; between two steps with `still_frames`.
        pooling: "mean" over the tokens of each step, or "none".
        num_envs: B.

    Raises:
        ValueError: model, processor and space do not fit together.
    """

    def __init__(
        self,
        model: VJEPA2ACModel,
        processor: VJEPA2ACProcessor,
        space: gymnasium.Space,
        *,
        frame_key: str = "frame",
        still_keys: tuple[str, ...] = (),
        still_frames: bool | None = None,
        num_steps: int = 1,
        spacing: int = 1,
        pooling: str = "mean",
        num_envs: int = 1,
    ):
        if pooling not in POOLINGS:
            raise ValueError(f"pooling must be one of {POOLINGS}, found {pooling!r}")
        if num_steps < 1 or spacing < 1:
            raise ValueError(f"num_steps and spacing must be at least 1, found {num_steps} and {spacing}")
        config = model.config
        shape, size = config.frame_shape, config.encoder_config.tubelet_size
        if processor.resolution != config.resolution or processor.tubelet_size != size:
            raise ValueError(
                f"the processor makes frames of {processor.resolution} pixels and tubelets of "
                f"{processor.tubelet_size}, the model takes {config.resolution} and {size}"
            )
        self.model, self.processor, self.pooling = model, processor, pooling
        self.is_dict = isinstance(space, spaces.Dict)
        if not self.is_dict and still_keys:
            raise ValueError(f"still_keys {still_keys} need Dict observations, found {space}")
        self.frame_key, self.still_keys = frame_key, tuple(still_keys)
        shapes = {key: _frame_shape(space, key) for key in (frame_key, *still_keys)}
        self.per_push = shapes[frame_key][0] if len(shapes[frame_key]) == 4 else 1
        if self.per_push > 1 and (spacing != 1 or self.per_push != size):
            raise ValueError(
                f"observations of {self.per_push} frames must be tubelets of {size}, with spacing 1, found {spacing}"
            )
        if still_frames is None:
            still_frames = isinstance(space, spaces.Dict) and "tubelet" in space.spaces and self.per_push == 1
        if still_frames and self.per_push > 1:
            raise ValueError(f"still_frames takes single frames, {frame_key!r} has {self.per_push} of a tubelet")
        self.spacing, self.repeats = spacing, size if still_frames else 1
        remembered = (num_steps * size // self.repeats - 1) * spacing + 1
        self.frames_BLCYX = torch.zeros(num_envs, remembered, 3, *shape, dtype=torch.uint8)
        self.stills = {key: np.zeros((num_envs, *self._shape(1)), np.float32) for key in still_keys}
        self.space = self._feature_space(space, num_steps)

    def _shape(self, steps: int) -> tuple[int, ...]:
        """Of `steps` steps' features."""
        config = self.model.config
        width, tokens = config.feature_size, config.num_tokens
        return (steps * width,) if self.pooling == "mean" else (steps, tokens, width)

    def _feature_space(self, space: gymnasium.Space, num_steps: int) -> gymnasium.Space:
        features = spaces.Box(-np.inf, np.inf, self._shape(num_steps), np.float32)
        if not isinstance(space, spaces.Dict):
            return features
        stills = {key: spaces.Box(-np.inf, np.inf, self._shape(1), np.float32) for key in self.still_keys}
        kept = {k: v for k, v in space.spaces.items() if k != self.frame_key and k not in stills}
        return spaces.Dict({**kept, "features": features, **stills})

    def resize(self, frames: np.ndarray) -> Tensor:
        """`(B, Y, X, 3)` or `(B, F, Y, X, 3)` as frames of the model's size, `(B, F, 3, Y, X)`, uint8."""
        frames_BFCYX = torch.from_numpy(np.ascontiguousarray(frames)).movedim(-1, -3)
        frames_BFCYX = frames_BFCYX.unsqueeze(1) if frames.ndim == 4 else frames_BFCYX
        resized = resize_frames(frames_BFCYX.flatten(0, 1), self.processor.resolution, self.processor.resize_mode)
        return resized.unflatten(0, frames_BFCYX.shape[:2])

    def encode(self, windows_BFCYX: Tensor) -> np.ndarray:
        """Pooled features, float32, of frames `(B, T * F, 3, Y, X)` of the model's size."""
        with torch.no_grad():
            pixels = self.processor.normalize_pixels(windows_BFCYX.to(self.model.device))
            features_BTND = self.model.encode(pixels).float()
        pooled = features_BTND.mean(dim=2).flatten(1) if self.pooling == "mean" else features_BTND
        return pooled.cpu().numpy()

    def step(
        self, seen: Any, begins: np.ndarray, finals: dict[int, Any] | None = None, unchanged: np.ndarray | None = None
    ) -> tuple[Any, dict[int, Any]]:
        """Remember what is seen and encode it, all environments at once.

        Args:
            seen: observations, batched.
            begins: bool `(B,)`, where an episode begins: what was seen before is forgotten.
            finals: last observations of episodes that end while `seen` begins the next, by environment.
            unchanged: bool `(B,)`, environments whose observation is that of the last call.

        Returns:
            Observations with features, batched; the same of `finals`.
        """
        finals = finals or {}
        frames_BFCYX = self.resize(seen[self.frame_key] if self.is_dict else seen)
        windows = []
        for index, last in finals.items():
            frame = self.resize((last[self.frame_key] if self.is_dict else last)[None])[0]
            windows.append(torch.cat([self.frames_BLCYX[index], frame])[len(frame) :][:: self.spacing])
        pushed = torch.cat([self.frames_BLCYX, frames_BFCYX], dim=1)[:, frames_BFCYX.shape[1] :]
        first = frames_BFCYX.repeat(1, self.frames_BLCYX.shape[1] // self.per_push, 1, 1, 1)
        fresh = torch.from_numpy(begins)[:, None, None, None, None]
        known = self.frames_BLCYX
        self.frames_BLCYX = torch.where(fresh, first, pushed)
        if unchanged is not None:
            self.frames_BLCYX[torch.from_numpy(unchanged)] = known[torch.from_numpy(unchanged)]
        count = len(self.frames_BLCYX)
        seen_BFCYX = torch.cat([self.frames_BLCYX[:, :: self.spacing], *(w[None] for w in windows)])
        features = self.encode(seen_BFCYX.repeat_interleave(self.repeats, dim=1))
        if not self.is_dict:
            return features[:count], dict(zip(finals, features[count:], strict=True))
        finals = {
            index: self._observe(last, feature, {key: self.stills[key][index].copy() for key in self.still_keys})
            for (index, last), feature in zip(finals.items(), features[count:], strict=True)
        }
        self._encode_stills(seen, begins)
        return self._observe(seen, features[:count], {k: v.copy() for k, v in self.stills.items()}), finals

    def _encode_stills(self, seen: dict, begins: np.ndarray) -> None:
        """Stills belong to an episode: they are encoded where one begins."""
        for key in self.still_keys if begins.any() else ():
            still = self.resize(seen[key][begins]).repeat(1, self.processor.tubelet_size, 1, 1, 1)
            self.stills[key][begins] = self.encode(still)

    def _observe(self, seen: dict, features: np.ndarray, stills: dict) -> dict:
        kept = {k: v for k, v in seen.items() if k != self.frame_key and k not in stills}
        return {**kept, "features": features, **stills}


def _frame_shape(space: gymnasium.Space, key: str) -> tuple[int, ...]:
    if isinstance(space, spaces.Dict):
        if key not in space.spaces:
            raise ValueError(f"observations have no {key!r}: found {list(space.spaces)}")
        space = space[key]
    if not isinstance(space, spaces.Box) or space.dtype != np.uint8 or len(space.shape) not in (3, 4):
        raise ValueError(f"{key!r} must be a Box of uint8 frames (Y, X, 3) or (F, Y, X, 3), found {space}")
    if space.shape[-1] != 3:
        raise ValueError(f"{key!r} must have 3 channels last, found shape {space.shape}")
    return space.shape


def token_similarities(features: np.ndarray, goal: np.ndarray) -> np.ndarray:
    """Which token of one view looks like which of another: what a turn of the view shifts.

    Cosines of all pairs of tokens, each view's mean token taken off before: what all tokens share says nothing about
    where something is.

    Args:
        features: `(..., N, D)`.
        goal: `(..., N, D)`.

    Returns:
        float32 `(..., N, N)`: token of `features`, token of `goal`.

    Raises:
        ValueError: other shapes.
    """
    if features.shape != goal.shape or features.ndim < 2:
        raise ValueError(f"features and goal must have one shape (..., N, D), found {features.shape} and {goal.shape}")
    centred = [x - x.mean(axis=-2, keepdims=True) for x in (features, goal)]
    # A view of one colour has tokens that are all alike: it is similar to nothing.
    one, other = (x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-6) for x in centred)
    return (one @ other.swapaxes(-1, -2)).astype(np.float32)


class VJEPA2ACFeatureWrapper(gymnasium.Wrapper, RecordConstructorArgs):
    """Features of the latest frames of one environment; `VJEPA2ACVectorFeatureWrapper` is for many.

    Observations: in place of frames, float32 `(T * D,)` ("mean") or `(T, N, D)` ("none") features of the latest
    T steps, of `tubelet_size` frames each, `spacing` environment steps apart, or with `still_frames` of one frame each,
    repeated: what a still goal compares with, and the default for frames of model steps. At the beginning of an episode
    the first frame stands for those before it. Of a Dict, other entries stay, and `features` replace `frame_key`.

    Args:
        env: frames are uint8 `(Y, X, 3)`, or a tubelet `(F, Y, X, 3)`.
        model: a `VJEPA2ACModel`, on the device and in the dtype to be used; its encoder is frozen.
        processor: its processor.
        options: `FrameEncoder`'s `frame_key`, `still_keys`, `still_frames`, `num_steps`, `spacing`, `pooling`.

    Raises:
        ValueError: a vector environment, or what `FrameEncoder` refuses.
    """

    def __init__(self, env: gymnasium.Env, model: VJEPA2ACModel, processor: VJEPA2ACProcessor, **options: Any):
        if isinstance(env, gymnasium.vector.VectorEnv):
            raise ValueError("a vector environment needs VJEPA2ACVectorFeatureWrapper")
        # The model in the specification is this one, not a copy.
        RecordConstructorArgs.__init__(self, _disable_deepcopy=True, model=model, processor=processor, **options)
        gymnasium.Wrapper.__init__(self, env)
        self.encoder = FrameEncoder(model, processor, env.observation_space, **options)
        self.observation_space = self.encoder.space
        self._begun = False

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        seen, info = self.env.reset(seed=seed, options=options)
        self._begun = True
        return self._encode(seen, begins=True), info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict]:
        if not self._begun:
            raise RuntimeError("no episode was begun: call reset()")
        seen, reward, terminated, truncated, info = self.env.step(action)
        return self._encode(seen, begins=False), reward, terminated, truncated, info

    def _encode(self, seen: Any, begins: bool) -> Any:
        batch = {key: np.asarray(value)[None] for key, value in seen.items()} if self.encoder.is_dict else seen[None]
        found, _ = self.encoder.step(batch, np.array([begins]))
        return {key: value[0] for key, value in found.items()} if self.encoder.is_dict else found[0]


class VJEPA2ACVectorFeatureWrapper(gymnasium.vector.VectorWrapper):
    """`VJEPA2ACFeatureWrapper` for a vector environment: one batch for the encoder at every step.

    Whichever autoreset mode: an environment that begins an episode has forgotten what was seen before. With
    `SAME_STEP`, `info["final_obs"]` holds features too, of the episode that has ended.

    Args:
        env: a vector environment.
        model: as for `VJEPA2ACFeatureWrapper`.
        processor: likewise.
        options: likewise.

    Raises:
        ValueError: a single environment, or what `FrameEncoder` refuses.
    """

    def __init__(
        self, env: gymnasium.vector.VectorEnv, model: VJEPA2ACModel, processor: VJEPA2ACProcessor, **options: Any
    ):
        if not isinstance(env, gymnasium.vector.VectorEnv):
            raise ValueError("a single environment needs VJEPA2ACFeatureWrapper")
        super().__init__(env)
        mode = env.metadata.get("autoreset_mode")
        if mode not in list(AutoresetMode):
            raise ValueError(f"env.metadata['autoreset_mode'] must say how episodes begin anew, found {mode!r}")
        self.mode = mode
        space = env.single_observation_space
        self.encoder = FrameEncoder(model, processor, space, num_envs=env.num_envs, **options)
        self.single_observation_space = self.encoder.space
        self.observation_space = batch_space(self.encoder.space, env.num_envs)
        self._ended = np.zeros(env.num_envs, dtype=bool)

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        # The environment takes the mask out of the options.
        begins = np.array((options or {}).get("reset_mask", np.ones(self.num_envs, dtype=bool)))
        seen, info = self.env.reset(seed=seed, options=options)
        self._ended = np.where(begins, False, self._ended)
        return self.encoder.step(seen, begins, unchanged=~begins)[0], info

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict]:
        seen, reward, terminated, truncated, info = self.env.step(actions)
        ended = terminated | truncated
        if self.mode == AutoresetMode.SAME_STEP:
            finals = {int(i): info["final_obs"][i] for i in np.flatnonzero(ended)}
            found, finals = self.encoder.step(seen, begins=ended, finals=finals)
            for index, last in finals.items():
                info["final_obs"][index] = last
        else:
            begins = self._ended if self.mode == AutoresetMode.NEXT_STEP else np.zeros_like(ended)
            found, _ = self.encoder.step(seen, begins)
        self._ended = ended
        return found, reward, terminated, truncated, info
