"""Turning until a goal is seen, in a round world of noise, and several models that judge as one."""

import math
import types
from functools import partial

import numpy as np
import pytest
import torch
from helpers_models import responsive_model

from vjepa_ac_hf import ACTION_COLUMNS, VJEPA2ACProcessor
from vjepa_ac_hf.planning import (
    CEM,
    Controller,
    GradientRefinement,
    HeadingController,
    SearchSpace,
    encode_context,
    encode_goal,
    minimize,
    plan,
)
from vjepa_ac_hf.planning.headings import passing_turn
from vjepa_ac_hf.planning.planner import GoalCost, JointCost
from vjepa_ac_hf.planning.search import refine

YAW = ACTION_COLUMNS.index("yaw_delta")
STATISTICS = {"columns": list(ACTION_COLUMNS[:4]), "count": 10, "mean": [0.0] * 4, "std": [80.0, 40.0, 12.0, 6.0]}


def make(seed=0, width=24, **kwargs):
    processor = VJEPA2ACProcessor(
        resolution=32, frames_per_clip=16, action_statistics=STATISTICS, action_space="vpt-38", **kwargs
    )
    model = responsive_model(processor.action_space, 8, width)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.encoder.parameters():
            parameter.add_(0.1 * seed * torch.randn(parameter.shape, generator=generator))
    return model, processor


class RoundWorld:
    """A circle of smooth noise, 4 pixels a degree, of which 90 degrees are seen."""

    def __init__(self, seed=0):
        noise = np.random.default_rng(seed).normal(size=(3, 32, 1440))
        kernel = np.exp(-0.5 * (np.arange(-60, 61) / 16) ** 2)
        smooth = np.apply_along_axis(lambda row: np.convolve(np.tile(row, 3), kernel, "same")[1440:2880], 2, noise)
        self.picture = np.clip(128 + 60 * smooth / smooth.std(), 0, 255).astype(np.uint8)
        self.yaw = 0.0

    def view(self, yaw):
        columns = (np.arange(360) - 180 + round(4 * yaw)) % 1440
        return torch.from_numpy(self.picture[:, :, columns])

    def step(self, turn):
        """Frames since the last call, and the state."""
        middle, self.yaw = self.view(self.yaw + turn / 2), self.yaw + turn
        return torch.stack([middle, self.view(self.yaw)]), (self.yaw, 0.0)


def apart(one, other):
    return abs((one - other + 180) % 360 - 180)


def act_on(controller, world, steps):
    """Headings after each step."""
    frames, state, headings = world.view(world.yaw)[None], (world.yaw, 0.0), []
    for _ in range(steps):
        action = controller.act(frames, state)
        assert abs(float(action[YAW])) <= 45 + 1e-9 and float(action.abs().sum()) < 1000
        frames, state = world.step(float(action[YAW]))
        headings.append(world.yaw)
    return headings


def imagine_truly(controller, world, model, processor, goal, *, false=None):
    """In place of what the model imagines: true distances, but at a `false` heading one that is lower than all."""
    cost = GoalCost(encode_goal(model, processor, goal))

    def imagine(joint, turns):
        costs = []
        for turn in turns:
            heading = world.yaw + turn
            view = encode_goal(model, processor, world.view(heading))
            costs.append(float(cost(view[None, None], None)[0]))
            if false is not None and apart(heading, false) < 12:
                costs[-1] = 0.01
        return costs

    controller._imagine = imagine


@pytest.mark.parametrize("goal", [30.0, -110.0, 171.0])
def test_who_imagines_rightly_goes_straight_to_the_goal_and_stays(goal):
    model, processor = make()
    world = RoundWorld()
    controller = HeadingController(model, processor, world.view(goal))
    imagine_truly(controller, world, model, processor, world.view(goal))
    headings = act_on(controller, world, 8)
    straight = math.ceil(abs(goal) / 45)
    assert all(apart(heading, goal) < 5 for heading in headings[straight:])
    assert headings[-1] == headings[-2]
    assert controller.seen[0] == (0.0, pytest.approx(controller.usual, rel=0.5))
    controller.reset()
    assert controller.seen == [] and controller.plan is None


def chance_of_missing(apart):
    """That a view so many degrees from the goal has more than half of the usual distance; the table's own words."""
    mean, deviation = 1 - 0.9 * math.exp(-apart / 6), 0.09 + 0.1 * (1 - math.exp(-apart / 6))
    return 0.5 * math.erfc((0.5 - mean) / deviation / math.sqrt(2))


@pytest.mark.parametrize("seed", range(4))
def test_the_first_of_two_turns_that_pass_most_of_the_belief(seed):
    """By brute force: every pair of turns, every heading, one after the other."""
    rng = np.random.default_rng(seed)
    headings, now = rng.uniform(-180, 180) + np.arange(24) * 15.0, rng.uniform(-180, 180)
    belief = rng.dirichlet(np.full(24, 0.2))
    best, chosen = -1.0, None
    for first in np.arange(-45, 46, 15.0):
        for second in np.arange(-45, 46, 15.0):
            value = 0.0
            for heading, chance in zip(headings, belief, strict=True):
                missed = [chance_of_missing(apart(heading, now + at)) for at in (first / 2, first)]
                missed += [chance_of_missing(apart(heading, now + first + at)) for at in (second / 2, second)]
                once, twice = math.prod(missed[:2]), math.prod(missed)
                later = 2 + apart(heading, now + first + second) / 45
                value += chance * ((1 - once) + 0.8 * (once - twice) + twice * 0.8**later)
            if value > best + 1e-12:
                best, chosen = value, first
    found = passing_turn(torch.from_numpy(belief), torch.from_numpy(headings), now, 45.0, 15.0)
    assert found == chosen


def test_a_belief_is_what_bayes_makes_of_what_was_seen_and_imagined():
    model, processor = make()
    world = RoundWorld()
    controller = HeadingController(model, processor, world.view(100.0), sharpness=5.0, nearness=1.5)
    act_on(controller, world, 2)
    assert len(controller.seen) == 3  # the view at first, that in the middle of the first step, and the one after it
    believed = []
    controller._believe = lambda *given: believed.append(HeadingController._believe(controller, *given)) or believed[0]
    frames, state = world.step(20.0)
    controller.act(frames, state, executed=torch.tensor([0.0, 0.0, 20.0] + [0.0] * 35))
    headings, belief = (part.tolist() for part in believed[0])
    usual, imagined = controller.usual, sorted(controller._imagined.items())
    places, costs = [h for h, _ in imagined], [c / usual for _, (c, _) in imagined]
    assert len(places) == 48 and np.allclose(headings, np.arange(144) * 2.5) and len(controller.seen) == 5
    expected = []
    for heading in headings:
        weight = -5.0 * np.interp(heading, [*places, 360.0], [*costs, costs[0]]) - 1.5 * apart(heading, 0.0) / 90
        for seen, distance in controller.seen:
            near = math.exp(-apart(heading, seen) / 6)
            deviation = 0.09 + 0.1 * (1 - near)
            weight -= (distance / usual - (1 - 0.9 * near)) ** 2 / (2 * deviation**2) + math.log(deviation)
        expected.append(math.exp(weight))
    assert belief == pytest.approx([e / sum(expected) for e in expected], rel=1e-6)


def test_a_wrong_valley_is_left():
    """The goal is imagined where it is not; once seen, that heading is ruled out, and so it is not gone back to."""
    model, processor = make()
    world = RoundWorld()
    controller = HeadingController(model, processor, world.view(100.0))
    imagine_truly(controller, world, model, processor, world.view(100.0), false=-60.0)
    headings = act_on(controller, world, 14)
    assert min(apart(heading, -60) for heading in headings[:3]) < 12  # it was gone to
    assert all(apart(heading, 100) < 5 for heading in headings[-3:])


def test_a_plan_says_what_is_done():
    model, processor = make()
    world = RoundWorld()
    controller = HeadingController(model, processor, world.view(-100.0))
    action = controller.act(world.view(0.0)[None], (350.0, 10.0), slot=3)
    found = controller.plan
    torch.testing.assert_close(action, found.actions[0])
    turns = found.actions[:, YAW]
    assert turns.min() == turns.max() and 1 <= len(turns) == math.ceil(abs(float(turns.sum())) / 45 - 1e-9)
    assert found.states[-1, 0] == pytest.approx((350 + float(turns.sum()) + 180) % 360 - 180)
    assert (found.states[:, 1] == 10).all() and found.features.shape == (len(turns), 4, 24)
    held = [c for c in ACTION_COLUMNS if action[ACTION_COLUMNS.index(c)] != 0]
    assert set(held) <= {"yaw_delta", "mouse_dx", "hotbar.3"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"largest_turn": 180.0}, r"largest_turn must be within \(0, 180\).*found 180.0 and 7.5"),
        ({"spacing": 60.0}, "spacing within .* found 45.0 and 60.0"),
        ({"arrived": 1.0}, "0 <= arrived < 1 and .*found 1.0, 12.0 and 2.0"),
        ({"sharpness": math.inf}, "finite sharpness and nearness.*found 0.35, inf and 2.0"),
        ({"doubt": -1.0}, "doubt must be a finite number, at least 0, found -1.0"),
        ({"context_steps": 5}, "horizon must be a whole number from 1 to 3 for a context of 5 steps"),
    ],
)
def test_options_out_of_range(options, message):
    model, processor = make()
    with pytest.raises(ValueError, match=message):
        HeadingController(model, processor, RoundWorld().view(0.0), **options)


def test_goals_that_are_no_view():
    model, processor = make()
    with pytest.raises(ValueError, match="needs one view as its goal"):
        HeadingController(model, processor, lambda features, actions: features.mean(dim=(1, 2, 3)))
    with pytest.raises(ValueError, match="needs one view as its goal|goal for every step"):
        HeadingController(model, processor, torch.randn(4, 4, 24))


# --- several models -------------------------------------------------------------------------------------------------


class Valley:
    """A model of which only the cost is left: a quadratic of the decisions with its minimum at `at`."""

    def __init__(self, at, height):
        self.at, self.height = torch.tensor(at, dtype=torch.float64), height

    def costs(self, decisions, cost):
        return self.height * (decisions[..., :1] - self.at).square().sum(dim=(1, 2))

    def costs_and_gradients(self, decisions, complete, cost):
        decisions = complete(decisions).detach().requires_grad_()
        with torch.enable_grad():
            costs = self.costs(decisions, cost)
            (slopes,) = torch.autograd.grad(costs.sum(), decisions)
        return costs.detach(), slopes


def make_joint(doubt=0.0):
    # Heights 1 and 3 of minima at -20 and 12: the mean's minimum is at (-20 + 3 * 12) / 4 = 4, at every step.
    return JointCost([(Valley(-20.0, 1.0), None), (Valley(12.0, 3.0), None)], doubt)


def test_the_minimum_of_a_joint_cost_is_the_analytic_one():
    bounds = {"yaw_delta": (-45.0, 45.0)}
    keys = [c for c in ACTION_COLUMNS if c.startswith(("key.", "mouse.l", "mouse.r", "mouse.m"))]
    space = SearchSpace("vpt-38", bounds=bounds, fixed={**dict.fromkeys(keys, 0), "pitch_delta": 0.0})
    joint, generator = make_joint(), torch.Generator().manual_seed(0)
    found = minimize(joint.costs, space, space.initial(2), method=CEM(iterations=12), generator=generator)
    assert found.decisions[:, 0].tolist() == pytest.approx([4.0, 4.0], abs=0.5)
    gradients = partial(joint.costs_and_gradients, complete=lambda decisions: decisions)
    better = refine(found, joint.costs, gradients, space, GradientRefinement(steps=60, step_size=0.02))
    assert better.decisions[:, 0].tolist() == pytest.approx([4.0, 4.0], abs=0.05)
    # Two steps: (24^2 + 3 * 8^2) / 2 each.
    assert better.cost == pytest.approx(2 * (24**2 + 3 * 8**2) / 2, rel=1e-3)


@pytest.mark.parametrize("doubt", [0.0, 0.7])
def test_doubt_is_the_standard_deviation_and_its_gradient_is_right(doubt):
    joint = make_joint(doubt)
    decisions = torch.tensor([[[3.0]], [[-8.0]], [[30.0]]], dtype=torch.float64)
    by_hand = []
    for x in (3.0, -8.0, 30.0):
        one, two = (x + 20) ** 2, 3 * (x - 12) ** 2
        by_hand.append((one + two) / 2 + doubt * abs(one - two) / 2)
    costs, slopes = joint.costs_and_gradients(decisions, lambda d: d)
    assert costs.tolist() == pytest.approx(by_hand) == joint.costs(decisions).tolist()
    step = 1e-4
    finite = (joint.costs(decisions + step) - joint.costs(decisions - step)) / (2 * step)
    torch.testing.assert_close(slopes.flatten(), finite, rtol=1e-5, atol=1e-5)


def test_costs_of_encoders_of_other_sizes_count_alike():
    """One encoder's features ten times as large change nothing; without the scale they would decide alone."""
    torch.manual_seed(0)
    goal, features = torch.randn(4, 24), torch.randn(5, 1, 4, 24)
    told = types.SimpleNamespace(costs=lambda actions, cost: cost(cost.factor * features, actions).double())
    costs = [GoalCost(goal), GoalCost(10 * goal)]
    costs[0].factor, costs[1].factor = 1, 10
    alone = JointCost([(told, costs[0]), (told, costs[0])]).costs(None)
    torch.testing.assert_close(JointCost([(told, costs[0]), (told, costs[1])]).costs(None), alone)
    deviation = (goal - goal.mean(dim=0)).abs().mean()
    torch.testing.assert_close(alone, (features[:, 0] - goal).abs().mean(dim=(1, 2)).double() / deviation.double())


def test_a_model_twice_plans_as_it_does_alone_and_others_change_the_plan():
    model, processor = make()
    other = make(seed=3, width=16)
    world = RoundWorld()
    goal, frames = world.view(30.0), world.view(0.0)[None]

    def first_action(kind, others, **options):
        if kind is Controller:
            options |= {"horizon": 1, "generator": torch.Generator().manual_seed(0), "method": CEM(2, 16, 4)}
        return kind(model, processor, goal, others=others, **options).act(frames, (0.0, 0.0))

    for kind in (Controller, HeadingController):
        alone = first_action(kind, ())
        torch.testing.assert_close(first_action(kind, [(model, processor)], doubt=5.0), alone)
    assert not torch.equal(first_action(Controller, [other]), first_action(Controller, ()))


def test_every_member_sees_for_itself():
    """The joint cost of a second step is the mean of what each model says alone of what it has encoded itself."""
    (model, processor), (other, its) = make(), make(seed=3, width=16)
    world = RoundWorld()
    goal = world.view(60.0)
    options = dict(horizon=1, generator=torch.Generator().manual_seed(0), method=CEM(1, 8, 2))
    controller = Controller(model, processor, goal, others=[(other, its)], **options)
    action = controller.act(world.view(0.0)[None], (0.0, 0.0))
    frames, state = world.step(float(action[YAW]))
    controller.act(frames, state)
    costs = []
    for one, processor_ in ((model, processor), (other, its)):
        seen = torch.cat([world.view(0.0)[None], frames[:1], frames[1:], frames[1:]])
        context = encode_context(one, processor_, frames=seen, states=[(0.0, 0.0), state], actions=action[None])
        tokens = encode_goal(one, processor_, goal)
        scale = float((tokens - tokens.mean(dim=0)).abs().mean())
        states = torch.cat([context.states, controller.plan.states[1:]])
        actions = torch.cat([context.actions, controller.plan.actions])
        imagined = one.rollout(
            context.features[None],
            processor_.normalize_actions(actions)[None],
            processor_.normalize_states(states[:-1])[None],
        )[0]
        costs.append(float((imagined[-1] - tokens).abs().mean().detach()) / scale)
    assert controller.plan.cost == pytest.approx(sum(costs) / 2, rel=1e-4)


def test_models_that_cannot_plan_together():
    model, processor = make()
    goal = RoundWorld().view(0.0)
    slower = VJEPA2ACProcessor(
        resolution=32, frames_per_clip=16, action_statistics=STATISTICS, action_space="vpt-38", fps=10
    )
    options = dict(horizon=1, generator=torch.Generator())
    with pytest.raises(ValueError, match="need one fps: the first has 5.*, another 10"):
        Controller(model, processor, goal, others=[(model, slower)], **options)
    with pytest.raises(ValueError, match="a goal of frames, which each encodes itself"):
        Controller(model, processor, torch.randn(4, 24), others=[(model, processor)], **options)
    context = encode_context(model, processor, features=torch.randn(1, 4, 24), states=[(0.0, 0.0)])
    with pytest.raises(ValueError, match="need one fps"):
        plan(model, processor, context, torch.randn(4, 24), others=[(model, slower, context, goal)], **options)
