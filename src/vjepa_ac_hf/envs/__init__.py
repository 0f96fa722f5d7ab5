"""A first-person game with VPT's inputs, features of its frames for reinforcement learning (docs/environments.md).

Importing registers `vjepa_ac_hf/VizDoomVPT-v0`, `vjepa_ac_hf/VizDoomVPTSteps-v0` and `vjepa_ac_hf/VizDoomVPTGoal-v0`
with Gymnasium (extras "rl" and "vizdoom").

`doom` starts the engine, `vizdoom_env` is the game tick by tick, `recording` writes play as recordings; `steps` makes
one step of the model of eight ticks, `goals` a task of it, `imagined` the same task without the game; `features` puts
the encoder's features in the frames' place, `sb3` hands them to Stable-Baselines3; `episodes` keeps what was played, by
`agents`, towards the frozen goals of `manifests`. Open `vizdoom_env.py` first.
"""

try:
    import gymnasium
except ImportError as error:
    raise ImportError("vjepa_ac_hf.envs needs Gymnasium: pip install 'vjepa-ac-hf[rl,vizdoom]'") from error

from .features import VJEPA2ACFeatureWrapper, VJEPA2ACVectorFeatureWrapper, token_similarities
from .goals import GoalEpisode, GoalViewWrapper, view_distance
from .imagined import ImaginedVPTEnv, ImaginedVPTVectorEnv, RecordedGoals
from .recording import RecordVPT, VPTWriter
from .steps import DiscreteActions, ModelStepWrapper, raw_action, step_options
from .vizdoom_env import VizDoomVPTEnv


def make_steps(*, fps: float = 5, tubelet_size: int = 2, **options) -> gymnasium.Env:
    """`VizDoomVPTEnv` (which takes the options) where one step is one of the model (`step_options`)."""
    return ModelStepWrapper(VizDoomVPTEnv(**options), fps, tubelet_size)


def make_goals(
    *,
    resolution: str = "640x360",
    places: int | None = None,
    render_mode: str | None = None,
    fps: float = 5,
    tubelet_size: int = 2,
    **options,
) -> gymnasium.Env:
    """`make_steps` with a view to be reached; other options are `GoalViewWrapper`'s."""
    game = {"resolution": resolution, "places": places, "render_mode": render_mode}
    return GoalViewWrapper(make_steps(fps=fps, tubelet_size=tubelet_size, **game), **options)


for _name, _entry in (("", "VizDoomVPTEnv"), ("Steps", "make_steps"), ("Goal", "make_goals")):
    # Gymnasium warns where a name is registered twice.
    if f"vjepa_ac_hf/VizDoomVPT{_name}-v0" not in gymnasium.registry:
        gymnasium.register(f"vjepa_ac_hf/VizDoomVPT{_name}-v0", entry_point=f"vjepa_ac_hf.envs:{_entry}")

__all__ = [
    "DiscreteActions",
    "GoalEpisode",
    "GoalViewWrapper",
    "ImaginedVPTEnv",
    "ImaginedVPTVectorEnv",
    "ModelStepWrapper",
    "RecordVPT",
    "RecordedGoals",
    "VJEPA2ACFeatureWrapper",
    "VJEPA2ACVectorFeatureWrapper",
    "VPTWriter",
    "VizDoomVPTEnv",
    "make_goals",
    "make_steps",
    "raw_action",
    "step_options",
    "token_similarities",
    "view_distance",
]
