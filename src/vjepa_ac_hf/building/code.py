"""The code that rows depend on: what other code has built is not reused."""

import hashlib
from pathlib import Path

_SOURCES = (
    "../actions_vjepa2_ac.py",
    "../configuration_encoder_vjepa2_ac.py",
    "../processing_vjepa2_ac.py",
    "../recordings/names.py",
    "../recordings/log.py",
    "../recordings/clips.py",
    "../recordings/observed.py",
    "../recordings/slots.py",
    "../recordings/mp4.py",
    "../recordings/timing.py",
    "../recordings/video.py",
    "../recordings/shards.py",
    "../recordings/splits.py",
    "selection.py",
    "rows.py",
    "vpt_tubelets.py",
)


def code_hash() -> str:
    """SHA-256 of the modules that rows depend on."""
    folder = Path(__file__).parent
    return hashlib.sha256(b"".join((folder / source).read_bytes() for source in _SOURCES)).hexdigest()
