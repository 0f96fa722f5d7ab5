"""From a built data set to batches on the device, from videos or from stored features (docs/data.md, docs/model.md).

`clips` opens a data set and makes batches of tensors, `loader` makes those of a training run, `order` says which clips
a batch holds, `streaming` reads Parquet where it lies, `labels` says what clips are classified as; `feature_cache`
stores the frozen encoder's features under a `cache_key`, `quantization` halves them, `cached_clips` reads them. Open
`loader.py` first.
"""

from .clips import ClipCollator, load_clips
from .loader import ClipLoader

__all__ = ["ClipCollator", "ClipLoader", "load_clips"]
