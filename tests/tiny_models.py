"""Tiny random models of transformers, with tokenizers, as folders such as the hub's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

# torchmetrics imports it where it is installed, a second at every start of every process.
transformers = pytest.importorskip("transformers", reason="needs the extra hf: make test-hf")

from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers  # noqa: E402

CORPUS = [
    "a red heart on a blue ground",
    "a picture of a dark green star",
    "one tiny teal triangle",
]


def tokenizer(folder: Path, start: str | None, end: str | None, **options: Any) -> Any:
    """A BPE tokenizer that puts a start and an end around a caption; options as saved with it."""
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<unk>", "<pad>", *(token for token in (start, end) if token)]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    made.train_from_iterator(CORPUS, trainer)
    if start or end:
        made.post_processor = processors.TemplateProcessing(
            single=" ".join(filter(None, (start, "$A", end))),
            special_tokens=[(token, made.token_to_id(token)) for token in (start, end) if token],
        )
    whole = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token=start, eos_token=end, **options
    )
    whole.save_pretrained(folder)
    return whole


def t5(folder: Path) -> Any:
    """T5 with encoder and decoder."""
    torch.manual_seed(1)
    tokenizer(folder, None, "</s>")
    config = transformers.T5Config(
        vocab_size=330, d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=3,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False,
    )  # fmt: skip
    network = transformers.T5ForConditionalGeneration(config).eval()
    network.save_pretrained(folder)
    return network.encoder


def clip(folder: Path, positions: int = 20) -> Any:
    """CLIP: text and images."""
    torch.manual_seed(2)
    made = tokenizer(folder, "<start>", "<end>", model_max_length=positions)
    shared = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}
    config = transformers.CLIPConfig(
        text_config={
            "vocab_size": 330, "hidden_size": 16, "max_position_embeddings": positions,
            "bos_token_id": made.bos_token_id, "eos_token_id": made.eos_token_id,
            "pad_token_id": made.pad_token_id, **shared,
        },
        vision_config={"hidden_size": 16, "image_size": 32, "patch_size": 8, **shared},
        projection_dim=12,
    )  # fmt: skip
    network = transformers.CLIPModel(config).eval()
    network.save_pretrained(folder)
    return network


def qwen(folder: Path) -> Any:
    """A decoder whose tokenizer pads on the left and adds no special tokens."""
    torch.manual_seed(3)
    made = tokenizer(folder, None, None, padding_side="left", truncation_side="left")
    config = transformers.Qwen2Config(
        vocab_size=330, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=made.pad_token_id,
        bos_token_id=None, eos_token_id=made.pad_token_id,
    )  # fmt: skip
    network = transformers.Qwen2ForCausalLM(config).eval()
    network.save_pretrained(folder)
    return network.model
