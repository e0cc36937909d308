"""What kind of model a request is about, read from its folder: on the command line, in its help, in recipes and in Python."""

from __future__ import annotations

import json

import pytest
from test_cli_language import call
from worlds import small

import expunge
from expunge.cli import options
from expunge.cli.forget import apart
from expunge.core.errors import RecipeError, SettingError
from expunge.core.modality import MODALITIES, meant
from expunge.planning import recipe

KINDS = {
    "llama": ("config.json", {"architectures": ["LlamaForCausalLM"]}, "causal_lm"),
    "gpt2": ("config.json", {"architectures": ["GPT2LMHeadModel"]}, "causal_lm"),
    "lora": ("adapter_config.json", {"peft_type": "LORA", "task_type": "CAUSAL_LM"}, "causal_lm"),
    "vit": ("config.json", {"architectures": ["ViTForImageClassification"]}, "classification"),
    "bert": ("config.json", {"architectures": ["BertForSequenceClassification"]}, "text_classification"),
    "sd": ("model_index.json", {"_class_name": "StableDiffusionPipeline"}, "diffusion"),
}
UNKNOWN = {
    "encoder": ("config.json", {"architectures": ["BertModel"]}),
    "silent": ("config.json", {"hidden_size": 8}),
    "list": ("config.json", ["LlamaForCausalLM"]),
    "numbers": ("config.json", {"architectures": 3}),
    "other-lora": ("adapter_config.json", {"peft_type": "LORA", "task_type": "SEQ_CLS"}),
}


def folder(home, name: str, file: str, content) -> str:
    (home / name).mkdir()
    (home / name / file).write_text(json.dumps(content))
    return str(home / name)


@pytest.mark.parametrize("name", KINDS)
def test_a_folder_says_what_it_holds(tmp_path, name):
    file, content, kind = KINDS[name]
    assert meant("", folder(tmp_path, name, file, content)).name == kind
    assert meant("", name, tmp_path).name == kind
    assert meant("regression", str(tmp_path / name)).name == "regression"


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_folder_that_does_not_say_is_not_guessed(tmp_path, name):
    file, content = UNKNOWN[name]
    with pytest.raises(SettingError, match=f"{name} does not say what kind of model it holds.*--task"):
        meant("", folder(tmp_path, name, file, content))


def test_factories_are_classifiers_and_what_is_neither_is_one_line(tmp_path):
    assert meant("", "py:nets:make").name == meant("", "timm:resnet10t").name == meant("", "").name == "classification"
    (tmp_path / "w.safetensors").write_bytes(b"")
    with pytest.raises(SettingError, match="is a file: the network whose weights it holds is named as py:"):
        meant("", "w.safetensors", tmp_path)
    with pytest.raises(SettingError, match="no folder nowhere"):
        meant("", "nowhere", tmp_path)


def test_words_that_belong_to_no_setting():
    assert apart(["net", "class:3"]) == (["net", "class:3"], [])
    assert apart(["--keep", "0.3", "net", "--soft=1", "class:3"]) == (["net", "class:3"], ["--keep", "0.3", "--soft=1"])
    assert apart(["net", "--keep", "net", "net"]) == (["net", "net"], ["--keep", "net"])


def test_model_and_request_as_words_or_as_options(tmp_path):
    llama = folder(tmp_path, "llama", *KINDS["llama"][:2])
    pipe = folder(tmp_path, "sd", *KINDS["sd"][:2])
    for given in ((llama, "", ["gone.jsonl"]), ("", "gone.jsonl", [llama]), ("", "", [llama, "gone.jsonl"]), (llama, "gone.jsonl", [])):
        modality, model, what, _ = options.asked("", given[0], {}, given[1], given[2])
        assert (modality.name, model, what) == ("causal_lm", llama, "gone.jsonl")
    modality, _, what, mine = options.asked("", "", {}, "", [pipe, "Van Gogh style"])
    assert modality.name == "diffusion" and what == mine["concept"] == "Van Gogh style"
    for wrong, message in (
        (("", "", {}, "", []), "the model is missing"),
        (("", llama, {}, "", []), "what must go is missing"),
        (("", llama, {}, "a", ["b"]), "cannot read 'b'"),
        (("", "", {}, "", [llama, "a", "b"]), "cannot read 'b'"),
        (("", llama, {"classes": "x"}, "a", []), "--classes is not for language models"),
    ):
        with pytest.raises(SettingError, match=message):
            options.asked(*wrong)


def test_help_is_short_without_a_model_and_that_of_its_kind_with_one(tmp_path):
    folder(tmp_path, "llama", *KINDS["llama"][:2])
    _, common, _ = call(tmp_path, "forget", "--help")
    shown = {name for name in options.known() if f"--{name.replace('_', '-')} <" in common}
    assert shown == {"device", "dtype"} and "MODEL --help" in common and len(common.splitlines()) < 70
    for words in (("llama", "--help"), ("--model", "llama", "--help"), ("--task=causal-lm", "--help")):
        _, text, _ = call(tmp_path, "forget", *words)
        assert "--retain <str>" in text and "--template" in text and "options for language models" in text
        assert "--classes <" not in text and "--concept <" not in text and "Classifiers:" not in text
    _, pictures, _ = call(tmp_path, "audit", "--task", "classification", "--help")
    assert "--train <" in pictures and "--concept <" not in pictures


def test_a_word_too_many_is_one_line(tmp_path):
    folder(tmp_path, "llama", *KINDS["llama"][:2])
    code, _, err = call(tmp_path, "forget", "llama", "gone.jsonl", "more")
    assert code == 2 and err.strip() == "expunge: cannot read 'more': model and request are named already, and settings are written as --name value"


def test_recipes_need_no_task(tmp_path):
    folder(tmp_path, "llama", *KINDS["llama"][:2])
    (tmp_path / "r.toml").write_text('model = "llama"\nforget = "gone.jsonl"\nretain = "kept.jsonl"\n')
    assert recipe.read(tmp_path / "r.toml").task == "causal-lm"
    folder(tmp_path, "silent", *UNKNOWN["silent"])
    (tmp_path / "r.toml").write_text('model = "silent"\nforget = "class:3"\n')
    with pytest.raises(RecipeError, match=r"r.toml: silent does not say"):
        recipe.read(tmp_path / "r.toml")


def test_python_reads_requests_as_the_command_line_does(tmp_path):
    model, _, split = small("causal_lm")
    model.save_pretrained(tmp_path / "llama")
    split.forget.format.tokenizer.save_pretrained(tmp_path / "llama")
    for name, part in (("gone", split.forget), ("kept", split.retain)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(dict(r)) + "\n" for r in part.rows))
    found = expunge.opened("llama", "gone.jsonl", retain=tmp_path / "kept.jsonl", folder=tmp_path)
    assert found.task.name == "causal_lm" and len(found.split.forget) == len(split.forget) and len(found.split.retain) == len(split.retain)
    verdict = expunge.forget(found, methods=["npo"], settings={"npo": {"epochs": 1, "lr": 1e-4}}, slow=False, checks=["known"])
    assert verdict.tries[0].attempt.method == "npo" and verdict.probe.before is not None
    with pytest.raises(SettingError, match="language models have no option 'retian'; did you mean 'retain'"):
        expunge.opened("llama", "gone.jsonl", retian="kept.jsonl", folder=tmp_path)
    with pytest.raises(SettingError, match="name a task and a split"):
        expunge.forget(model)
    assert {m.asks for m in MODALITIES.values() if m.filed} == {"forget", "concept"}
