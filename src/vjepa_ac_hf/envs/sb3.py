"""Features of a frozen encoder for Stable-Baselines3: vector environments, goals, scales (docs/environments.md)."""

from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from torch import Tensor

from .features import token_similarities

try:
    from stable_baselines3.common.env_util import is_wrapped
    from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
    from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper
except ImportError as error:
    raise ImportError("vjepa_ac_hf.envs.sb3 needs Stable-Baselines3: pip install 'vjepa-ac-hf[rl]'") from error

GOAL_POOLINGS = ("similarity", "mean", "none")


class SB3VectorEnv(VecEnv):
    """A Gymnasium vector environment, such as `VJEPA2ACVectorFeatureWrapper`, as Stable-Baselines3 takes them.

    Stable-Baselines3 makes its own from single environments, where each would run the encoder for itself.

    Args:
        env: autoreset mode `SAME_STEP`, as Stable-Baselines3 begins episodes.

    Raises:
        ValueError: a single environment, another autoreset mode.
    """

    def __init__(self, env: VectorEnv):
        mode = env.metadata.get("autoreset_mode") if isinstance(env, VectorEnv) else None
        if mode != AutoresetMode.SAME_STEP:
            raise ValueError(f"env must be a vector environment of autoreset mode SAME_STEP, found {env} ({mode})")
        self.env = env
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)
        self._actions = np.zeros(0)

    def reset(self) -> Any:
        seeds: Any = list(self._seeds)  # one an environment, which VectorEnv's annotation does not know of
        seen, info = self.env.reset(seed=seeds, options=self._one_options())
        self.reset_infos = [_info_of(info, i) for i in range(self.num_envs)]
        self._reset_seeds()
        self._reset_options()
        return seen

    def _one_options(self) -> dict | None:
        if any(options != self._options[0] for options in self._options):
            raise ValueError(f"a vector environment takes the same options for all, found {self._options}")
        return self._options[0] or None

    def step_async(self, actions: np.ndarray) -> None:
        self._actions = actions

    def step_wait(self) -> tuple[Any, np.ndarray, np.ndarray, list[dict]]:
        seen, rewards, terminated, truncated, info = self.env.step(self._actions)
        ended = terminated | truncated
        infos = []
        for i in range(self.num_envs):
            if ended[i]:
                # What belongs to the episode that has begun goes where Stable-Baselines3 looks for it.
                begun = {k: v for k, v in info.items() if k.removeprefix("_") not in ("final_obs", "final_info")}
                self.reset_infos[i] = _info_of(begun, i)
                infos.append({**_info_of(info["final_info"], i), "terminal_observation": info["final_obs"][i]})
            else:
                infos.append(_info_of(info, i))
            infos[i]["TimeLimit.truncated"] = bool(truncated[i] and not terminated[i])
        return seen, np.asarray(rewards, dtype=np.float32), ended, infos

    def close(self) -> None:
        self.env.close()

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        found = self._base.get_attr(attr_name)
        return [found[i] for i in self._get_indices(indices)]

    def env_method(self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any) -> list[Any]:
        """Call a method of all environments, or of those named.

        Raises:
            NotImplementedError: some environments only, where they live in other processes.
        """
        chosen = list(self._get_indices(indices))
        if sorted(chosen) == list(range(self.num_envs)):
            found = self._base.call(method_name, *method_args, **method_kwargs)
            return [found[i] for i in chosen]
        envs = getattr(self._base, "envs", None)
        if envs is None:
            raise NotImplementedError(
                f"{type(self._base).__name__} calls a method of all {self.num_envs} environments at once, found "
                f"indices {chosen}"
            )
        return [envs[i].get_wrapper_attr(method_name)(*method_args, **method_kwargs) for i in chosen]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        if indices is not None:
            raise NotImplementedError("a vector environment sets an attribute of all environments at once")
        self._base.set_attr(attr_name, [value] * self.num_envs)

    def env_is_wrapped(self, wrapper_class: type, indices: Any = None) -> list[bool]:
        envs = getattr(self._base, "envs", [None] * self.num_envs)
        return [envs[i] is not None and is_wrapped(envs[i], wrapper_class) for i in self._get_indices(indices)]

    @property
    def _base(self) -> Any:
        return self.env.unwrapped


def _info_of(info: dict[str, Any], index: int) -> dict[str, Any]:
    """One environment's share of a vector environment's `info`: `_key` says who has `key`."""
    found = {k: v for k, v in info.items() if not k.startswith("_") and (f"_{k}" not in info or info[f"_{k}"][index])}
    return {k: _info_of(v, index) if isinstance(v, dict) else v[index] for k, v in found.items()}


class GoalFeatures(VecEnvWrapper):
    """Tokens of the view and of a goal as one vector, for an `MlpPolicy`.

    Args:
        venv: observations have `features` `(T, N, D)` and `goal` `(1, N, D)`, as `VJEPA2ACVectorFeatureWrapper` gives
            them with `pooling="none"` and `still_keys=("goal",)`; of several steps the last one is used.
        pooling: "similarity", `token_similarities` of the two, `(N * N,)`; "mean" over the tokens of each, and the
            goal's less the view's, `(3 * D,)`; "none", all tokens of both, `(2 * N * D,)`.

    Raises:
        ValueError: another pooling, other observations.
    """

    def __init__(self, venv: VecEnv, pooling: str = "similarity"):
        if pooling not in GOAL_POOLINGS:
            raise ValueError(f"pooling must be one of {GOAL_POOLINGS}, found {pooling!r}")
        space = venv.observation_space
        shapes = {k: v.shape or () for k, v in space.items()} if isinstance(space, spaces.Dict) else {}
        features, goal = shapes.get("features", ()), shapes.get("goal", ())
        if len(features) != 3 or len(goal) != 3 or features[1:] != goal[1:]:
            raise ValueError(f"observations must have features (T, N, D) and goal (1, N, D), found {space}")
        tokens, width = goal[1:]
        size = {"similarity": tokens**2, "mean": 3 * width, "none": 2 * tokens * width}[pooling]
        self.pooling = pooling
        super().__init__(venv, spaces.Box(-np.inf, np.inf, (size,), np.float32))

    def reset(self) -> np.ndarray:
        seen = self.venv.reset()
        self.reset_infos = self.venv.reset_infos
        return self._pool(seen)

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict]]:
        seen, rewards, dones, infos = self.venv.step_wait()
        for info in infos:
            if "terminal_observation" in info:
                last = {key: info["terminal_observation"][key][None] for key in ("features", "goal")}
                info["terminal_observation"] = self._pool(last)[0]
        return self._pool(seen), rewards, dones, infos

    def _pool(self, seen: Any) -> np.ndarray:
        features_BND, goal_BND = seen["features"][:, -1], seen["goal"][:, -1]
        if self.pooling == "similarity":
            return token_similarities(features_BND, goal_BND).reshape(len(goal_BND), -1)
        if self.pooling == "mean":
            features_BD, goal_BD = features_BND.mean(axis=1), goal_BND.mean(axis=1)
            return np.concatenate([features_BD, goal_BD, goal_BD - features_BD], axis=1)
        return np.concatenate([features_BND, goal_BND], axis=1).reshape(len(goal_BND), -1)


class Standardize(BaseFeaturesExtractor):
    """Each number less a mean, over a deviation; both are part of the policy and are saved with it.

    Running statistics, as `VecNormalize` has them, are saved beside the policy and change during a rollout.

    Args:
        observation_space: Box `(D,)`.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, observation_space: spaces.Box):
        super().__init__(observation_space, observation_space.shape[0])
        self.register_buffer("mean", torch.zeros(self.features_dim))
        self.register_buffer("deviation", torch.ones(self.features_dim))

    def fit(self, observations: np.ndarray) -> None:
        """Take mean and deviation from observations `(B, D)`; what does not vary is only centred."""
        deviation = observations.std(axis=0)
        self.mean.copy_(torch.from_numpy(observations.mean(axis=0)))
        self.deviation.copy_(torch.from_numpy(np.where(deviation > 1e-6, deviation, 1.0)))

    def forward(self, observations: Tensor) -> Tensor:
        """`(B, D)`."""
        return (observations - self.mean) / self.deviation
