"""Planning with the world model: search for actions whose imagined future is like a goal (docs/planning.md).

`actions` says what may be searched and makes whole actions of it, `search` holds the methods, `planner` joins them with
the model, `proposals` has an inverse dynamics head say where to begin, `distance` another the steps to a
goal, `headings` turns until a goal is seen, `control` replans as frames come in,
`environments` turns actions into MineRL's and VPT's form, `landscape` looks at the energy over two columns, `report`
shows what plans expected beside what happened. Open `planner.py` first.
"""

from .actions import DEFAULT_FIXED, Distribution, SearchSpace, integrate_view, vary_columns
from .control import Controller
from .distance import DistanceCost
from .environments import VPTLog, to_minerl_action, to_vpt_lines
from .headings import HeadingController
from .landscape import Landscape, energy_landscape, landscape_figure, summarize_landscapes
from .planner import Context, GoalCost, Imagination, Plan, encode_context, encode_goal, plan
from .proposals import InverseDynamicsProposals
from .search import CEM, ICEM, MPPI, GradientRefinement, minimize

__all__ = [
    "CEM",
    "DEFAULT_FIXED",
    "ICEM",
    "MPPI",
    "Context",
    "Controller",
    "DistanceCost",
    "Distribution",
    "GoalCost",
    "GradientRefinement",
    "HeadingController",
    "Imagination",
    "InverseDynamicsProposals",
    "Landscape",
    "Plan",
    "SearchSpace",
    "VPTLog",
    "encode_context",
    "encode_goal",
    "energy_landscape",
    "integrate_view",
    "landscape_figure",
    "minimize",
    "plan",
    "summarize_landscapes",
    "to_minerl_action",
    "to_vpt_lines",
    "vary_columns",
]
