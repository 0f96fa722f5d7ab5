"""Pseudo-labels: logs for videos without one, told by an inverse dynamics head (docs/applications.md, "Labelling").

`windows` cuts a video into the head's clips in bounded memory, `actions` makes whole actions and confidences of what
the head tells, `files` keeps what is told on the disk, `videos` labels one video with all of them. Open
`videos.py` first.
"""

from .actions import KEY_DECISIONS, Labeller
from .files import LabelError, LabelFiles, find_videos, label_files
from .videos import label_video

__all__ = [
    "KEY_DECISIONS",
    "LabelError",
    "LabelFiles",
    "Labeller",
    "find_videos",
    "label_files",
    "label_video",
]
