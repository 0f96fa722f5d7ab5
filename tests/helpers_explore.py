"""A world whose answers are known: frames are their own features, and a turn shifts the picture."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from helpers_clips import write_clips

from vjepa_ac_hf import ACTION_COLUMNS, ActionStatistics, VJEPA2ACConfig, VJEPA2ACModel, VJEPA2ACProcessor
from vjepa_ac_hf.app.explorer import Explorer
from vjepa_ac_hf.app.scenes import Scenes

SIDE, PATCH = 8, 4  # tokens and pixels along an edge: frames of 32 pixels
YAW = ACTION_COLUMNS.index("yaw_delta")


class TurningModel(VJEPA2ACModel):
    """A token's features are its patch's mean colour; a turn to the right moves the picture a token to the left."""

    def encode(self, pixel_values_videos, **_):
        first = pixel_values_videos[:, :: self.config.encoder_config.tubelet_size]
        tokens = torch.nn.functional.avg_pool2d(first.flatten(0, 1), PATCH).flatten(2).transpose(1, 2)
        padded = torch.nn.functional.pad(tokens, (0, self.config.feature_size - 3))
        return padded.unflatten(0, (len(first), -1))

    def rollout(self, features, actions, states, past_key_values=None, max_batch_tokens=None):
        if actions.ndim == 4:  # candidates of a plan
            return torch.stack([self.rollout(features, a[None], states[:, 0]) for a in actions[0]], dim=1)
        latest, found = features[:, -1], []
        for action in actions[0, features.shape[1] - 1 :]:
            picture = latest.unflatten(1, (SIDE, SIDE))
            if float(action[2]):
                right = bool(action[2] > 0)
                edge = picture[:, :, -1:] if right else picture[:, :, :1]
                picture = torch.cat([picture[:, :, 1:], edge] if right else [edge, picture[:, :, :-1]], dim=2)
            latest = picture.flatten(1, 2)
            found.append(latest)
        return torch.stack(found, dim=1)


class Drawer:
    """The decoder of `TurningModel`: every token's colour over its patch."""

    def __init__(self, processor):
        self.processor = processor

    def __call__(self, *, features):
        colours = features[..., :3].transpose(-1, -2).unflatten(-1, (SIDE, SIDE))
        mean, std = (torch.tensor(v)[:, None, None] for v in (self.processor.pixel_mean, self.processor.pixel_std))
        frames = (colours * std + mean).clamp(0, 1).repeat_interleave(PATCH, -1).repeat_interleave(PATCH, -2)
        return SimpleNamespace(frames=frames.repeat_interleave(2, dim=1))


def turning_world(folder: Path, **options) -> Explorer:
    """An explorer of `TurningModel`, over the clips of `write_clips` in the folder, which it makes."""
    torch.manual_seed(0)
    encoder = dict(crop_size=32, patch_size=4, hidden_size=24, num_hidden_layers=1, num_attention_heads=2)
    sizes = dict(pred_hidden_size=24, pred_num_hidden_layers=1, pred_num_attention_heads=2)
    model = TurningModel(VJEPA2ACConfig(encoder_config=encoder, action_space="vpt-38", **sizes)).eval()
    statistics = ActionStatistics().update(np.eye(len(ACTION_COLUMNS)) * 10 - np.eye(len(ACTION_COLUMNS))[::-1] * 10)
    statistics = {**statistics.to_dict(), "mean": [0.0] * 4}
    processor = VJEPA2ACProcessor(resolution=32, action_space="vpt-38", action_statistics=statistics)
    if not folder.is_dir():
        write_clips(folder, train=2, validation=3)
    scenes = Scenes(model, processor, str(folder), split="validation", count=3)
    return Explorer(model, processor, scenes, decoder=Drawer(processor), **options)
