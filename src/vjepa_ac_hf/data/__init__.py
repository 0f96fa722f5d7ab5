"""Names of before 0.2 for what has moved to `recordings`, `building`, `inspection`, `loading` and `downloading`."""

import sys
from importlib import import_module

_MOVED = {
    "loader": "loading.loader",
    "loading": "loading.clips",
    "order": "loading.order",
    "streaming": "loading.streaming",
    "recording": "recordings.log",
    "clips": "recordings.clips",
    "video": "recordings.video",
    "shards": "recordings.shards",
    "splits": "recordings.splits",
    "selection": "building.selection",
    "vpt_tubelets": "building.vpt_tubelets",
    "summary": "inspection.summary",
    "preview": "inspection.preview",
}
for _old, _new in _MOVED.items():
    globals()[_old] = sys.modules[f"{__name__}.{_old}"] = import_module(f"..{_new}", __name__)
