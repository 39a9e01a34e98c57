"""The first layers of SmolLM2 as a text tower of open_clip: a text is the mean over its tokens of their embeddings and of what the
layers make of them, side by side.

Eight layers are enough: frozen, on half of the photos' training split, heads over the embeddings alone, 2, 4, 6 and 8 layers found
46, 45, 44, 45 and 46 of 100 dev photos from a human caption, over 24 layers (before the last norm) 44 (MiniLM, made for sentences, 51).
Over embeddings and 8 layers together 48.
"""

from __future__ import annotations

from pathlib import Path

import torch
from open_clip.hf_configs import arch_dict
from open_clip.hf_model import register_pooler
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, LlamaConfig, LlamaModel
from transformers.modeling_outputs import BaseModelOutput

from finecap_ray.scorers.packages import cached_folder
from finecap_ray.smollm2 import GGUF_FILE, VERSION, smollm2_folder

LAYERS = 8
WORDS = 12.0  # what embeddings are multiplied with: they vary as much then as the output of the layers
_PADDING = "<|endoftext|>"  # id 0, as the scorers' other tokenizers pad


class LlamaTextConfig(LlamaConfig):
    """`words`: factor of the token embeddings beside the layers' output; 0: without them."""

    model_type = "llama_text"
    words: float = 0.0

    @property
    def text_width(self) -> int:
        return self.hidden_size * (2 if self.words else 1)


class LlamaTextTower(LlamaModel):
    """open_clip asks every text tower of Hugging Face whether it pools by itself, as BERT can; this one doesn't."""

    config_class = LlamaTextConfig

    def __init__(self, config: LlamaTextConfig, add_pooling_layer: bool = False) -> None:
        assert not add_pooling_layer
        super().__init__(config)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> BaseModelOutput:
        """Token ids [n, T], padded on the right -> hidden states [n, T, text_width]."""
        states = super().forward(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        if self.config.words:
            states = torch.cat([self.config.words * self.embed_tokens(input_ids), states], dim=-1)
        return BaseModelOutput(last_hidden_state=states)


@register_pooler
class MeanPooler(nn.Module):
    """In the place of open_clip's own, which of a text without a token makes 0 / 0: here it is 0, a cosine of 0 with every image.

    SmolLM2's tokenizer adds no token of its own, so "" has none. The name is in the digest of every scorer that pools so.
    """

    def forward(self, x: BaseModelOutput, attention_mask: Tensor) -> Tensor:
        """Hidden states [n, T, F], mask [n, T] -> their mean over the tokens [n, F]."""
        mask = attention_mask.unsqueeze(-1)
        return (x.last_hidden_state * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)


AutoConfig.register(LlamaTextConfig.model_type, LlamaTextConfig)
AutoModel.register(LlamaTextConfig, LlamaTextTower)
arch_dict[LlamaTextConfig.model_type] = {"config_names": {"width": "text_width"}, "pooler": "mean_pooler"}


def smollm2_text_folder(setting: str) -> Path:
    """Folder of that tower and its tokenizer (Hugging Face form), made once from the package, in the user's cache.

    Raises ConfigError, naming the `setting` that asks for it, where the package isn't installed.
    """
    source = smollm2_folder(setting)

    def cut(folder: Path) -> None:
        whole = AutoModel.from_pretrained(source, gguf_file=GGUF_FILE, dtype="float32")
        config = LlamaTextConfig(**whole.config.to_dict() | {"model_type": LlamaTextConfig.model_type})
        config.num_hidden_layers, config.words, config.pad_token_id, config.use_cache = LAYERS, WORDS, 0, False
        tower = LlamaTextTower(config)
        tower.load_state_dict({name: one for name, one in whole.state_dict().items() if name in tower.state_dict()})
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE, pad_token=_PADDING)
        assert tokenizer.pad_token_id == config.pad_token_id
        for part in (tower, tokenizer):
            part.save_pretrained(folder)

    return cached_folder(f"smollm2-{VERSION}-text-{LAYERS}-words", cut)
