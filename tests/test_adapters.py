"""LoRA on every layout that peft can adapt, and the folders that come of it: plain peft loads what was audited, an adapter over an adapter too."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import warnings
from dataclasses import replace

import pytest
import torch
from worlds import small

from expunge.audits.core import Probe
from expunge.core.digest import model_digest
from expunge.core.edits import LowRank
from expunge.core.errors import ModelError, PatchError, ScopeError
from expunge.core.modality import Opened
from expunge.core.patch import Patch
from expunge.engine.run import unlearn
from expunge.modalities.language import checkpoints
from expunge.modalities.language.request import released
from expunge.parts import adapter_files
from expunge.parts.scopes.lora import adaptable, lora
from expunge.planning import releasing
from expunge.planning.outcome import Try, Verdict

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
    "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
MIXTURE = {**SIZES, "num_experts_per_tok": 2}
DEEP = {
    **MIXTURE, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 24, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
    "v_head_dim": 8, "qk_nope_head_dim": 8, "first_k_dense_replace": 1, "n_shared_experts": 1,
}  # fmt: skip
FAMILIES = {
    "Llama": SIZES,
    "GPT2": {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2},
    "Mamba": {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "Mixtral": {**MIXTURE, "num_local_experts": 4},
    "Qwen3Moe": {**MIXTURE, "num_experts": 4, "moe_intermediate_size": 24, "head_dim": 8},
    "GptOss": {**MIXTURE, "num_local_experts": 4, "head_dim": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "DeepseekV3": DEEP,
}
ADAPTED = {
    "Llama": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}, "GPT2": {"c_attn", "c_proj", "c_fc"},
    "Mamba": {"in_proj", "x_proj", "dt_proj"}, "Mixtral": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"},
}  # fmt: skip
X = torch.arange(24).reshape(2, 12) + 3


def made(name: str, **changes):
    import transformers

    torch.manual_seed(0)
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        config = getattr(transformers, f"{name}Config")(**{**FAMILIES[name], **changes})
        return transformers.AutoModelForCausalLM.from_config(config).eval()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(X).logits


def trained(model, layers: str = "", rank: int = 2, seed: int = 0):
    """A patch of LoRA that moves the model, and its logits inside the session."""
    torch.manual_seed(seed)
    with lora(model, layers, rank=rank) as e:
        optimiser = torch.optim.SGD(e.params.values(), lr=1.0)
        for _ in range(3):
            optimiser.zero_grad()
            model(X, labels=X).loss.backward()
            optimiser.step()
        inside = logits(model)
    return e.patch, inside


def merged(model, patch):
    twin = copy.deepcopy(model)
    patch.apply(twin)
    return twin


def apart(a, b) -> float:
    return float((a - b).abs().max() / a.abs().max())


@pytest.mark.parametrize("name", FAMILIES)
def test_each_layout_is_adapted_and_left_as_it_was(name):
    model = made(name)
    before, shape, order = model_digest(model), [(n, type(m)) for n, m in model.named_modules()], [n for n, _ in model.named_parameters()]
    plain = logits(model)
    patch, inside = trained(model)
    assert model_digest(model) == before and [(n, type(m)) for n, m in model.named_modules()] == shape and [n for n, _ in model.named_parameters()] == order
    assert torch.equal(logits(model), plain) and apart(plain, inside) > 1e-2
    assert apart(inside, logits(merged(model, patch))) < 1e-5
    moved = {e.name.removesuffix(".weight").rpartition(".")[2] for e in patch.edits}
    assert moved <= ADAPTED.get(name, moved) and (moved == ADAPTED[name] if name in ("Llama", "GPT2", "Mixtral") else True)
    if "experts" in " ".join(order):
        assert {e.name.rpartition(".")[2] for e in patch.edits if e.up.ndim == 3} == {"gate_up_proj", "down_proj"}
        assert patch.places == sum(p.numel() for n, p in model.named_parameters() if n in {e.name for e in patch.edits})


@pytest.mark.parametrize("name", FAMILIES)
def test_plain_peft_loads_what_was_audited(name, tmp_path):
    """DeepSeek's dense layers are called what peft takes for experts: no adapter folder could say which is meant, and none is written."""
    model, tokenizer = made(name), small("causal_lm")[2].forget.format.tokenizer
    checkpoints.save(model, tokenizer, tmp_path / "base")
    patch, _ = trained(model)
    if name == "DeepseekV3":
        with pytest.raises(ModelError, match="release it merged"):
            checkpoints.release(model, tokenizer, patch, tmp_path / "out", form="peft", base=str(tmp_path / "base"))
        return
    out = checkpoints.release(model, tokenizer, patch, tmp_path / "out", form="peft", base=str(tmp_path / "base"))
    served = logits(checkpoints.plain(out, tmp_path / "base"))
    assert apart(logits(merged(model, patch)), served) < 1e-5 < 1e-2 < apart(logits(model), served)
    again, _ = checkpoints.load(out)
    assert apart(served, logits(again)) < 1e-5


def test_tied_heads_and_what_kernels_read_past_are_said_before_the_run():
    tied = made("Llama", tie_word_embeddings=True)
    before = model_digest(tied)
    for layers in ("lm_head", "head|q_proj"):
        with pytest.raises(ScopeError, match=r"names lm_head, whose weight is also another layer's \(a tied head\)"), lora(tied, layers):
            pass
    assert model_digest(tied) == before and "lm_head" in adaptable(made("Llama"), "lm_head").layers
    assert "lm_head" not in adaptable(tied).layers
    with pytest.raises(ScopeError, match="kernels of mamba read its weight past any adapter"), lora(made("Mamba"), "out_proj"):
        pass


def test_a_stack_of_factors_fits_a_stack_of_matrices_alone():
    model = made("Mixtral")
    name = "model.layers.0.mlp.experts.down_proj"
    good = LowRank(name, torch.ones(4, 32, 2), torch.ones(4, 2, 48), 0.5)
    before = dict(model.named_parameters())[name].detach().clone()
    undo = Patch((good,)).apply(model)
    torch.testing.assert_close(dict(model.named_parameters())[name], before + 1.0)
    undo.apply(model)
    assert torch.equal(dict(model.named_parameters())[name], before)
    for up, down in (((3, 32, 2), (3, 2, 48)), ((4, 32, 2), (4, 3, 48)), ((4, 48, 2), (4, 2, 32)), ((4, 32, 2), (2, 48)), ((4, 32, 2), (1, 2, 48))):
        with pytest.raises(PatchError, match="another model"):
            Patch((LowRank(name, torch.ones(up), torch.ones(down)),)).apply(model)


def tuned(folder, model, tokenizer, out, config, spoken=None):
    """A user's own adapter over a base, drawn at random, as peft writes it."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        over = get_peft_model(copy.deepcopy(model), LoraConfig(**config))
        for n, p in over.named_parameters():
            if "lora_" in n:
                torch.nn.init.normal_(p, std=0.2)
        over.peft_config["default"].base_model_name_or_path = str(folder)
        over.save_pretrained(out)
    if spoken is not None:
        twin = copy.deepcopy(tokenizer)
        twin.chat_template = spoken
        twin.save_pretrained(out)
    return over


OWN = [
    {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "up_proj"]},
    {"r": 4, "lora_alpha": 8, "target_modules": ["v_proj", "down_proj"], "use_rslora": True, "rank_pattern": {"v_proj": 2}},
    {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    {"r": 2, "target_modules": ["q_proj"], "use_dora": True},
]


@pytest.mark.parametrize(("config", "both"), list(zip(OWN, (True, True, False, False), strict=True)))
def test_an_adapter_over_an_adapter_is_one_adapter_or_merged(tmp_path, config, both):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model, tokenizer = made("Llama"), copy.deepcopy(small("causal_lm")[2].forget.format.tokenizer)
    checkpoints.save(model, tokenizer, tmp_path / "base")
    (tmp_path / "base" / "LICENSE").write_text("terms of the base")
    over = tuned(tmp_path / "base", model, tokenizer, tmp_path / "first", config, "{{ messages[0].content }} as given")
    (tmp_path / "first" / "NOTICE.md").write_text("terms of the adapter")
    loaded, spoken = checkpoints.load(tmp_path / "first")
    assert spoken.chat_template == "{{ messages[0].content }} as given" and apart(logits(over.eval()), logits(loaded)) < 1e-5
    patch, _ = trained(loaded, "q_proj|o_proj", seed=1)
    wanted = logits(merged(loaded, patch))
    if not both:
        with pytest.raises(ModelError, match=r"cannot be joined with another|release it merged"):
            checkpoints.release(loaded, spoken, patch, tmp_path / "no", form="peft", base=str(tmp_path / "first"))
    form = "peft" if both else "merged"
    out = checkpoints.release(loaded, spoken, patch, tmp_path / "out", form=form, base=str(tmp_path / "first"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base" if both else out)
        served = PeftModel.from_pretrained(base, str(out)).eval() if both else base
    assert apart(wanted, logits(served)) < 1e-5 and apart(logits(model), wanted) > 1e-2
    assert (out / "LICENSE").read_text() == "terms of the base" and (out / "NOTICE.md").read_text() == "terms of the adapter"
    assert "as given" in (out / "chat_template.jinja").read_text()
    if both:
        assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == str(tmp_path / "base")
        assert apart(wanted, logits(checkpoints.load(out)[0])) < 1e-5
        second = adapter_files.joined(patch, Patch(()))
        assert {e.name for e in second.edits} == {e.name for e in patch.edits}


def test_half_precision_is_released_as_it_was_audited(tmp_path):
    """A bfloat16 adapter beside its base is not the merged model that was audited: auto writes the merged one, peft nothing, and the verdict is withdrawn."""
    model, task, split = small("causal_lm", True)
    tokenizer = split.forget.format.tokenizer
    checkpoints.save(copy.deepcopy(model).to(torch.bfloat16), tokenizer, tmp_path / "base")
    half, _ = checkpoints.load(tmp_path / "base")
    attempt = unlearn("grad_diff", half, task, split, epochs=2, lr=3e-2, lora=4)
    one, base = Try(attempt), str(tmp_path / "base")
    verdict = Verdict(True, [], one, (one,), {}, (), Probe(half, half, task, split))
    opened = Opened(
        half, task, split, release=lambda v, folder, form: released(v, half, tokenizer, folder, form=form, base=base), forms=("auto", "merged"),
        reload=lambda folder: checkpoints.plain(folder, base),
    )  # fmt: skip
    passed, facts = releasing.released(opened, verdict, tmp_path / "auto")
    assert passed.passed and facts["form"] == "merged" and facts["bits"] and "written as auto is not the model that was audited" in facts["told"]
    loaded = checkpoints.plain(tmp_path / "auto", base)
    assert model_digest(loaded) == model_digest(attempt.model()) and not (tmp_path / "auto" / "adapter_config.json").exists()
    refused, facts = releasing.released(replace(opened, forms=("peft",)), verdict, tmp_path / "peft")
    assert not refused.passed and refused.chosen is None and "form" not in facts and not (tmp_path / "peft").exists()
    assert "the folder written as peft is not the model that was audited: loaded back, its outputs differ by" in refused.reasons[0]
