"""Models on the Hugging Face Hub; needs the package huggingface_hub (the extra ``hub``)."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelHubMixin, hf_hub_download

from allspark_fast.model import Segmentor
from allspark_fast.weights.spec import ModelSpec, load_model, save_model


class PretrainedSegmentor(Segmentor, ModelHubMixin, library_name="allspark-fast"):
    """A model with ``from_pretrained``, ``save_pretrained`` and ``push_to_hub``; names and colors travel with it.

    The folder is that of ``save_model``: the commands and ``load_model`` take it too, without huggingface_hub.

    Args:
        model: what to save.
        spec: what must be known to use it.
    """

    def __init__(self, model: Segmentor, spec: ModelSpec) -> None:
        super().__init__(model.backbone, model.decoder)
        self.spec = spec

    def _save_pretrained(self, save_directory: Path) -> None:
        save_model(self, self.spec, save_directory)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **options: Any) -> "PretrainedSegmentor":
        if not Path(model_id).is_dir():
            model_id = hf_hub_download(model_id, "model.safetensors", **options)
        return cls(*load_model(model_id)).eval()
