"""The action-conditioned predictor written straightforwardly: the oracle of tests and the baseline of benchmarks.

The same mathematics as `VJEPA2ACPredictor` (docs/model.md) with the same parameter names, done the way it is usually
written, V-JEPA 2's own code included: a dense boolean mask over the clip; queries, keys and values of action, state and
frame tokens projected separately, rotated axis by axis and merged again; rotary tables made anew in every layer and
call; and the whole prefix run again at every step of a rollout. It shares no code with the package.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def rotate_axis(x: Tensor, positions: Tensor) -> Tensor:
    """Rotate the pairs of the last dimension by their positions: `x (B, H, L, d)`, `positions (L,)`."""
    half = x.shape[-1] // 2
    frequencies = 1.0 / 10000 ** (torch.arange(half, dtype=torch.float32, device=x.device) / half)
    angles = torch.outer(positions.float(), frequencies)
    # The table of d/2 angles is repeated whole, while the pairs are (0, 1), (2, 3), ...: as the released weights need.
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
    pairs = x.unflatten(-1, (half, 2))
    turned = torch.stack([-pairs[..., 1], pairs[..., 0]], dim=-1).flatten(-2)
    return x * cos.to(x.dtype) + turned * sin.to(x.dtype)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, grid: int):
        super().__init__()
        self.heads, self.grid = heads, grid
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        per_step = self.grid**2 + 2
        steps = x.shape[1] // per_step
        tokens = x.unflatten(1, (steps, per_step))
        axis = 2 * ((x.shape[-1] // self.heads // 3) // 2)
        time = torch.arange(steps, device=x.device)
        merged: tuple[list, list, list] = ([], [], [])
        for index in range(2):  # the action token, then the state token
            q, k, v = self._project(tokens[:, :, index])
            q, k = (torch.cat([rotate_axis(t[..., :axis], time), t[..., axis:]], dim=-1) for t in (q, k))
            for parts, tensor in zip(merged, (q, k, v), strict=True):
                parts.append(tensor.unsqueeze(3))  # (B, H, T, 1, d)
        q, k, v = self._project(tokens[:, :, 2:].flatten(1, 2))
        cell = torch.arange(steps * self.grid**2, device=x.device)
        places = (cell // self.grid**2, cell % self.grid**2 // self.grid, cell % self.grid)
        rotated = []
        for tensor in (q, k):
            axes = [rotate_axis(tensor[..., i * axis : (i + 1) * axis], place) for i, place in enumerate(places)]
            rotated.append(torch.cat([*axes, tensor[..., 3 * axis :]], dim=-1))
        for parts, tensor in zip(merged, (*rotated, v), strict=True):
            parts.append(tensor.unflatten(2, (steps, self.grid**2)))
        q, k, v = (torch.cat(parts, dim=3).flatten(2, 3) for parts in merged)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, grid: int, inner: int, eps: float):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=eps), nn.LayerNorm(width, eps=eps)
        self.attention, self.mlp = Attention(width, heads, grid), MLP(width, inner)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))


class StraightforwardPredictor(nn.Module):
    """Takes the sizes, and by `load_state_dict` the weights, of a `VJEPA2ACModel`'s predictor."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        width, features = config.pred_hidden_size, config.encoder_config.hidden_size
        inner = int(width * config.pred_mlp_ratio)
        sizes = (width, config.pred_num_attention_heads, config.grid_size, inner, config.layer_norm_eps)
        self.frame_embed = nn.Linear(features, width)
        self.action_embed = nn.Linear(config.action_dim, width)
        self.state_embed = nn.Linear(config.state_dim, width)
        self.layers = nn.ModuleList([Block(*sizes) for _ in range(config.pred_num_hidden_layers)])
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.head = nn.Linear(width, features)

    def predict(self, features: Tensor, actions: Tensor, states: Tensor) -> Tensor:
        """`(B, T, N, D)`: at t the prediction of step t+1, normalised where the configuration says so."""
        steps, per_step = features.shape[1], features.shape[2] + 2
        tokens = torch.cat(
            [self.action_embed(actions)[:, :, None], self.state_embed(states)[:, :, None], self.frame_embed(features)],
            dim=2,
        )
        step_of = torch.arange(steps * per_step, device=features.device) // per_step
        mask = step_of[:, None] >= step_of[None, :]
        x = tokens.flatten(1, 2)
        for layer in self.layers:
            x = layer(x, mask)
        predicted = self.head(self.norm(x.unflatten(1, (steps, per_step))[:, :, 2:]))
        return F.layer_norm(predicted, predicted.shape[-1:]) if self.config.normalize_features else predicted

    def rollout(self, features: Tensor, actions: Tensor, states: Tensor) -> Tensor:
        """`(B, H, N, D)` after a context `(B, C, N, D)`: predictions are appended and everything is run again."""
        context = features.shape[1]
        for steps in range(context, actions.shape[1] + 1):
            predicted = self.predict(features, actions[:, :steps], states[:, :steps])
            features = torch.cat([features, predicted[:, -1:]], dim=1)
        return features[:, context:]

    def losses(self, features: Tensor, actions: Tensor, states: Tensor, auto_steps: int) -> tuple[Tensor, Tensor]:
        """Teacher-forcing loss and rollout loss; the rollout's first step is taken from teacher forcing."""
        distance = F.mse_loss if self.config.loss_type == "mse" else F.l1_loss
        steps = features.shape[1] - 1
        predicted = self.predict(features[:, :-1], actions, states[:, :steps])
        sequence = torch.cat([features[:, :1], predicted[:, :1]], dim=1)
        for step in range(1, auto_steps):
            latest = self.predict(sequence, actions[:, : step + 1], states[:, : step + 1])[:, -1:]
            sequence = torch.cat([sequence, latest], dim=1)
        return distance(predicted, features[:, 1:]), distance(sequence[:, 1:], features[:, 1 : auto_steps + 1])
