"""Has transformers' Auto classes and `load_dataset` find what is here, once they are there themselves.

To import transformers' models takes as long as torch and transformers, datasets a fifth of that, and many programs need
neither. So `import vjepa_ac_hf` imports neither: a finder in front of Python's own (`sys.meta_path`) waits until
somebody else has. Registration itself is transformers' public one. Where the Auto classes are imported already, it is
done at once.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
import threading
from collections.abc import Sequence
from types import ModuleType
from typing import Any

_AUTO = tuple(f"transformers.models.auto.{name}_auto" for name in ("configuration", "modeling", "processing"))
_BUILDERS = "datasets.packaged_modules"


def register_models() -> None:
    """Make `AutoConfig`, `AutoModel`, `AutoModelForVideoClassification` and `AutoProcessor` know our classes."""
    from transformers import AutoConfig, AutoModel, AutoModelForVideoClassification, AutoProcessor

    from . import modeling_heads_vjepa2_ac as heads
    from .modeling_heads_decoding_vjepa2_ac import VJEPA2ACForFrameDecoding
    from .modeling_heads_distance_vjepa2_ac import VJEPA2ACForTemporalDistance
    from .modeling_vjepa2_ac import VJEPA2ACModel
    from .processing_vjepa2_ac import VJEPA2ACProcessor

    for auto, model in (
        (AutoModel, VJEPA2ACModel),
        (AutoModel, heads.VJEPA2ACForInverseDynamics),
        (AutoModel, heads.VJEPA2ACForActionAnticipation),
        (AutoModel, VJEPA2ACForFrameDecoding),
        (AutoModel, VJEPA2ACForTemporalDistance),
        (AutoModelForVideoClassification, heads.VJEPA2ACForVideoClassification),
    ):
        config = model.config_class
        AutoConfig.register(config.model_type, config, exist_ok=True)
        auto.register(config, model, exist_ok=True)
        AutoProcessor.register(config, VJEPA2ACProcessor, exist_ok=True)


def register_builder() -> None:
    """Make `load_dataset("vpt_tubelets", ...)` find the builder, which is imported when it is asked for."""
    from .building.code import code_hash

    table = sys.modules[_BUILDERS]._PACKAGED_DATASETS_MODULES
    table["vpt_tubelets"] = ("vjepa_ac_hf.building.vpt_tubelets", code_hash())


class _Watch(importlib.abc.MetaPathFinder):
    """Sees modules of transformers, of datasets and of this package being imported.

    Our models are registered when none is in the middle of being imported in this thread. Else they might be imported
    themselves, for their registration, by an import that they have begun (transformers' modelling layers import
    `AutoModel`), and would find half a module.
    """

    def __init__(self) -> None:
        self.under_way = threading.local()
        self.models_known = False

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        watched = name == _BUILDERS or (not self.models_known and name.startswith(("transformers.", "vjepa_ac_hf.")))
        if not watched:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((found for finder in others if (found := finder.find_spec(name, path, target))), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _WatchedLoader(spec.loader, self)
        return spec

    def imported(self, name: str) -> None:
        if name == _BUILDERS:
            register_builder()
        elif not self.models_known and any(auto in sys.modules for auto in _AUTO):
            self.models_known = True  # before it is: registering imports what is watched
            try:
                register_models()
            except BaseException:
                self.models_known = False
                raise


class _WatchedLoader(importlib.abc.Loader):
    """Another loader, that tells the watch; leaves itself out of the module, as `importlib.util.LazyLoader` does."""

    def __init__(self, loader: importlib.abc.Loader, watch: _Watch):
        self.loader, self.watch = loader, watch

    def __getattr__(self, name: str) -> Any:  # `python -m` asks for code, without importing
        return getattr(self.loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader
        name, under_way = module.__name__, self.watch.under_way
        depth = getattr(under_way, "depth", 0)
        under_way.depth = depth + 1
        try:
            self.loader.exec_module(module)
        finally:
            under_way.depth = depth
        if depth == 0 or name == _BUILDERS:
            self.watch.imported(name)


def register() -> None:
    """Register now what can be, and the rest when transformers' Auto classes or datasets are imported."""
    watch = _Watch()
    sys.meta_path.insert(0, watch)
    if _BUILDERS in sys.modules:
        watch.imported(_BUILDERS)
    watch.imported(__name__)
