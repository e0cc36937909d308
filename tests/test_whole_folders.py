"""A folder of a language model is read as it was saved, or not at all: no weight is drawn at random."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_adapters import made
from worlds import small

from expunge.core.errors import ModelError
from expunge.modalities.language import checkpoints


@pytest.fixture
def folder(tmp_path):
    """A tiny Llama with its tokenizer."""
    made("Llama").save_pretrained(tmp_path / "model")
    small("causal_lm")[2].forget.format.tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def without(path, *names, **changed):
    weights = load_file(path)
    save_file({k: v for k, v in weights.items() if not any(n in k for n in names)} | changed, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("lost", "said"),
    [("layers.1.mlp.up_proj.weight", "lacks model.layers.1.mlp.up_proj.weight,"), ("layers.1.", "and 8 more"), ("lm_head", "lacks lm_head.weight")],
)
def test_a_weight_that_is_not_there(folder, lost, said):
    checkpoints.load(folder)
    without(folder / "model.safetensors", lost)
    with pytest.raises(ModelError, match="drawn at random") as told:
        checkpoints.load(folder)
    assert said in str(told.value) and "\n" not in str(told.value)


def test_a_weight_of_another_shape(folder):
    without(folder / "model.safetensors", **{"lm_head.weight": torch.zeros(64, 16)})
    with pytest.raises(ModelError, match=r"lm_head\.weight"):
        checkpoints.load(folder)


def test_weights_that_have_no_place(folder):
    """A configuration of fewer layers than the weights would be read as a model cut short."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    with pytest.raises(ModelError, match="has no place in the model"):
        checkpoints.load(folder)


def test_tied_heads_are_whole(tmp_path):
    made("Llama", tie_word_embeddings=True).save_pretrained(tmp_path)
    small("causal_lm")[2].forget.format.tokenizer.save_pretrained(tmp_path)
    assert not any("lm_head" in name for name in load_file(tmp_path / "model.safetensors"))
    checkpoints.load(tmp_path)


@pytest.mark.parametrize("kind", ["BertForMaskedLM", "LlamaModel", "LlamaForSequenceClassification"])
def test_another_kind_of_model(folder, kind):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": [kind]}))
    with pytest.raises(ModelError, match=f"holds {kind}, no causal language model"):
        checkpoints.load(folder)
    with pytest.raises(ModelError, match=kind):
        checkpoints.skeleton(folder)


def test_an_adapter_that_lacks_weights(folder, tmp_path):
    from peft import LoraConfig, get_peft_model

    model, _ = checkpoints.load(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        peft = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
        peft.save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(folder)}))
    assert checkpoints.load(tmp_path / "adapter")[1].chat_template == checkpoints.load(folder)[1].chat_template
    (tmp_path / "adapter" / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    assert checkpoints.load(tmp_path / "adapter")[1].chat_template == "{{ messages[0]['content'] }}"
    without(tmp_path / "adapter" / "adapter_model.safetensors", "layers.1.")
    with pytest.raises(ModelError, match=r"adapter adapter lacks weights.*layers\.1\.self_attn\.q_proj\.lora_A"):
        checkpoints.load(tmp_path / "adapter")
