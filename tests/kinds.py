"""Small models and data of every kind that docs/your-model.md names, as their own libraries write them, and what loads a released folder."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from worlds import small

from expunge.modalities.text_classification import worlds as topics

NAMES = ("ant", "bee", "cat")
PIXELS = {"do_resize": True, "size": {"height": 8, "width": 8}, "resample": 2, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
          "image_mean": [0.16, 0.16, 0.16], "image_std": [0.07, 0.07, 0.07], "image_processor_type": "ViTImageProcessor"}  # fmt: skip
SHORT = {
    "classifiers": ("fine_tune", {"epochs": 1, "lr": 0.001}),
    "texts": ("grad_diff", {"epochs": 1, "lr": 0.001}),
    "adapters": ("grad_diff", {"epochs": 1, "lr": 0.001, "lora": 2}),
    "pictures": ("uce", {}),
}
"""One short run of one method in place of the search, by group of models."""


@dataclass(frozen=True)
class Kind:
    """`make(place)` writes what the page's lines name, `load(folder, place)` reads a released folder in the model's own library, `inputs` feeds both."""

    make: Callable[[Path], None]
    load: Callable[[Path, Path], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    group: str = "classifiers"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


# files


def images(place: Path) -> None:
    """train/ and test/ with a folder of dim pictures for each of three classes: stripes of one direction each."""
    for part, each in (("train", 8), ("test", 6)):
        for k, name in enumerate(NAMES):
            (place / part / name).mkdir(parents=True)
            for i in range(each):
                g = np.random.default_rng(1000 * k + i + 500 * (part == "test"))
                y, x = np.mgrid[:8, :8]
                wave = np.sin(2 * np.pi * ((x, y, x + y)[k] / 4 + g.random()))
                pixels = 40 + 20 * wave[..., None] + g.normal(0, 6, (8, 8, 3))
                Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(place / part / name / f"{i}.png")


def table(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Four columns, and three classes that the first two tell apart."""
    x = np.random.default_rng(seed).normal(size=(n, 4)).round(4)
    return x, (x[:, 0] > 0).astype(int) + (x[:, 1] > 0.5)


def frames(place: Path, write: str = "csv", regress: bool = False) -> None:
    """train and test as CSV or Parquet: name, a, b, c, d, and label (or price)."""
    import pandas

    for part, n, seed in (("train", 90, 0), ("test", 60, 1)):
        x, y = table(n, seed)
        frame = pandas.DataFrame({"name": [f"{part}-{i}" for i in range(n)], **dict(zip("abcd", x.T, strict=True))})
        frame["price" if regress else "label"] = x[:, 0] * 2 + x[:, 1] if regress else y
        frame.to_csv(place / f"{part}.csv", index=False) if write == "csv" else frame.to_parquet(place / f"{part}.parquet")


NETS = """import pathlib

import torch
from torch import nn

HERE = pathlib.Path(__file__).parent


def tabular():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, {answers}))


def pictures():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 3))


def half():
    return pictures().bfloat16()


def lightning():
    net = pictures()  # a checkpoint of Lightning: the module's weights under "state_dict", behind the name of its attribute
    kept = torch.load(HERE / "last.ckpt", weights_only=True)["state_dict"]
    net.load_state_dict({{k.removeprefix("net."): v for k, v in kept.items()}})
    return net


def several(n=80, seed=0):
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(seed))
    return x, (x[:, :3] > 0).float()


def unseen():
    return several(60, 1)
"""


def nets(place: Path, answers: int = 3) -> Any:
    """nets.py beside the data, and what it makes."""
    import importlib

    (place / "nets.py").write_text(NETS.format(answers=answers))
    sys.modules.pop("nets", None)
    sys.path.insert(0, str(place))
    try:
        importlib.invalidate_caches()
        return importlib.import_module("nets")
    finally:
        sys.path.remove(str(place))


def fitted(net: nn.Module, x: Any, y: Any, regress: str = "") -> nn.Module:
    """Some steps of Adam, so that the model is better than chance."""
    x, y = torch.as_tensor(np.asarray(x), dtype=torch.float32), torch.as_tensor(np.asarray(y))
    optimiser = torch.optim.Adam(net.parameters(), lr=0.03)
    for _ in range(120):
        optimiser.zero_grad()
        out = net(x)
        loss = (
            nn.functional.mse_loss(out.squeeze(-1), y.float())
            if regress == "one"
            else (nn.functional.binary_cross_entropy_with_logits(out, y.float()) if regress == "several" else nn.functional.cross_entropy(out, y))
        )
        loss.backward()
        optimiser.step()
    return net.eval()


# classifiers


def pictured(config: Callable[[Any], tuple[str, Any]]) -> Callable[[Path], None]:
    """A folder `model` of transformers with an image classifier, and image folders."""

    def make(place: Path) -> None:
        import transformers

        images(place)
        torch.manual_seed(0)
        name, made = config(transformers)
        made.id2label, made.label2id = dict(enumerate(NAMES)), {n: k for k, n in enumerate(NAMES)}
        with quiet():
            getattr(transformers, name)(made).save_pretrained(place / "model")
        (place / "model" / "preprocessor_config.json").write_text(json.dumps(PIXELS))

    return make


def vit(t: Any) -> tuple[str, Any]:
    return "ViTForImageClassification", t.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=8, patch_size=4
    )


def resnet(t: Any) -> tuple[str, Any]:
    return "ResNetForImageClassification", t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")


def convnext(t: Any) -> tuple[str, Any]:
    return "ConvNextForImageClassification", t.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, patch_size=2)


def hugging(place: Path) -> None:
    """data/ as `save_to_disk` writes it, in place of image folders."""
    import datasets

    pictured(convnext)(place)
    parts = {}
    for part in ("train", "test"):
        files = sorted((place / part).rglob("*.png"))
        names = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(NAMES))})
        rows = {"image": [str(f) for f in files], "label": [NAMES.index(f.parent.name) for f in files]}
        parts[part] = datasets.Dataset.from_dict(rows, features=names)
    with quiet():
        datasets.DatasetDict(parts).save_to_disk(place / "data")


def transformed(kind: str) -> Callable[[Path, Path], nn.Module]:
    def load(folder: Path, place: Path) -> nn.Module:
        import transformers

        with quiet():
            return getattr(transformers, kind).from_pretrained(folder).eval()

    return load


def own(name: str, answers: int = 3) -> Callable[[Path, Path], nn.Module]:
    """The factory's network with the released state dict."""

    def load(folder: Path, place: Path) -> nn.Module:
        net = getattr(nets(place, answers), name)()
        net.load_state_dict(load_file(folder / "model.safetensors"))
        return net.eval()

    return load


def factory(place: Path) -> None:
    images(place)
    save_file(nets(place).pictures().state_dict(), place / "w.safetensors")


def lightning(place: Path) -> None:
    images(place)
    torch.save({"epoch": 3, "state_dict": {f"net.{k}": v for k, v in nets(place).pictures().state_dict().items()}}, place / "last.ckpt")


def tabular(write: str) -> Callable[[Path], None]:
    def make(place: Path) -> None:
        frames(place, write)
        save_file(fitted(nets(place).tabular(), *table(90, 0)).state_dict(), place / "w.safetensors")

    return make


def regressor(place: Path) -> None:
    frames(place, regress=True)
    x, _ = table(90, 0)
    save_file(fitted(nets(place, 1).tabular(), x, x[:, 0] * 2 + x[:, 1], "one").state_dict(), place / "w.safetensors")


def several(place: Path) -> None:
    made = nets(place)
    save_file(fitted(made.tabular(), *made.several(), "several").state_dict(), place / "w.safetensors")


def worded(config: Callable[[Any, int], tuple[str, Any]], write: str) -> Callable[[Path], None]:
    """A folder `model` of transformers with a text classifier, and train and test as CSV or JSON lines."""

    def make(place: Path) -> None:
        import transformers

        tokenizer = topics.tokenizer()
        torch.manual_seed(0)
        name, made = config(transformers, len(tokenizer))
        made.id2label, made.label2id = dict(enumerate(topics.TOPICS)), {t: k for k, t in enumerate(topics.TOPICS)}
        made.pad_token_id = tokenizer.pad_token_id
        with quiet():
            getattr(transformers, name)(made).save_pretrained(place / "model")
            tokenizer.save_pretrained(place / "model")
        rows = topics.sentences(80)
        for part, found in (("train", rows[:50]), ("test", rows[50:])):
            if write == "csv":
                told = "".join(f'{k},"{r["text"]}",{r["label"]}\n' for k, r in enumerate(found))
                (place / f"{part}.csv").write_text("id,text,label\n" + told)
            else:
                (place / f"{part}.jsonl").write_text("".join(json.dumps({"id": k, "text": r["text"], "label": r["label"]}) + "\n" for k, r in enumerate(found)))

    return make


def bert(t: Any, n: int) -> tuple[str, Any]:
    return "BertForSequenceClassification", t.BertConfig(
        vocab_size=n, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, max_position_embeddings=64
    )


def distilbert(t: Any, n: int) -> tuple[str, Any]:
    return "DistilBertForSequenceClassification", t.DistilBertConfig(vocab_size=n, dim=16, n_layers=1, n_heads=2, hidden_dim=24, max_position_embeddings=64)


def roberta(t: Any, n: int) -> tuple[str, Any]:
    return "RobertaForSequenceClassification", t.RobertaConfig(
        vocab_size=n, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, max_position_embeddings=66
    )


# language models

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 256}
MIXTURE = {**SIZES, "num_experts_per_tok": 2}
GPT = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 256}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": SIZES,
    "Mistral": SIZES,
    "Qwen2": SIZES,
    "Qwen3": {**SIZES, "head_dim": 8},
    "Gemma": {**SIZES, "head_dim": 8},
    "Gemma2": {**SIZES, "head_dim": 8},
    "Phi": SIZES,
    "Phi3": SIZES,
    "Olmo2": SIZES,
    "StableLm": SIZES,
    "Cohere": SIZES,
    "Granite": SIZES,
    "Starcoder2": SIZES,
    "GPT2": GPT,
    "GPTNeoX": SIZES,
    "OPT": {"hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 256, "word_embed_proj_dim": 16},
    "Bloom": {"hidden_size": 16, "n_layer": 2, "n_head": 2},
    "Falcon": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_hidden_size": 24},
    "Mamba": {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
    "Mixtral": {**MIXTURE, "num_local_experts": 4},
    "Qwen3Moe": {**MIXTURE, "num_experts": 4, "moe_intermediate_size": 24, "head_dim": 8},
    "DeepseekV3": {
        **MIXTURE, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 24, "q_lora_rank": 16, "kv_lora_rank": 16,
        "qk_rope_head_dim": 8, "v_head_dim": 8, "qk_nope_head_dim": 8, "first_k_dense_replace": 1, "n_shared_experts": 1,
    },
}  # fmt: skip
"""Causal families of transformers by the name of their configuration, small."""


def rows() -> dict[str, list[dict[str, str]]]:
    """Questions and answers about authors that nobody wrote."""
    split = small("causal_lm")[2]
    return {"gone": [*split.forget.rows], "stays": [*split.retain.rows][:16], "unseen": [*split.test.rows]}


@functools.lru_cache
def words() -> Any:
    return small("causal_lm")[2].forget.format.tokenizer


def lines(path: Path, found: list[Any]) -> None:
    path.write_text("".join(json.dumps(r) + "\n" for r in found))


def asked(place: Path, form: Callable[[dict[str, str]], Any] = dict, only: int = 8) -> None:
    for name, found in rows().items():
        lines(place / f"{name}.jsonl", [form({k: r[k] for k in ("question", "answer")}) for r in found[:only]])


def talked(row: dict[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]}


def shared(row: dict[str, str]) -> dict[str, Any]:
    return {"conversations": [{"from": "human", "value": row["question"]}, {"from": "gpt", "value": row["answer"]}]}


def made(family: str, place: Path, **more: Any) -> None:
    """A folder `model` of that family with a tokenizer that has a chat template."""
    import transformers

    torch.manual_seed(0)
    size = {**FAMILIES[family], "vocab_size": len(words()), "bos_token_id": None, "eos_token_id": words().eos_token_id, "pad_token_id": words().pad_token_id}
    with quiet():
        model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{family}Config")(**size, **more))
        model.save_pretrained(place / "model")
        words().save_pretrained(place / "model")


def family(name: str, form: Callable[[dict[str, str]], Any] = dict, half: bool = False) -> Callable[[Path], None]:
    def make(place: Path) -> None:
        made(name, place)
        asked(place, form)
        if half:
            import transformers

            with quiet():
                transformers.AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.bfloat16).save_pretrained(place / "model")

    return make


def tuned(place: Path) -> None:
    """A folder `model` of peft over a folder `base`."""
    import peft
    import transformers

    made("Llama", place)
    (place / "model").rename(place / "base")
    with quiet():
        base = transformers.AutoModelForCausalLM.from_pretrained(place / "base")
        torch.manual_seed(1)
        model: Any = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False))
        model.save_pretrained(place / "model")
    config = json.loads((place / "model" / "adapter_config.json").read_text())
    (place / "model" / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "base"}))
    words().save_pretrained(place / "model")
    asked(place, talked)


def raw(place: Path) -> None:
    """Plain texts."""
    made("GPT2", place)
    for name, found in rows().items():
        (place / f"{name}.txt").write_text("\n\n".join(f"{r['question']} {r['answer']}" for r in found) + "\n")


def merged(folder: Path, place: Path) -> nn.Module:
    """What plain peft or transformers makes of a released folder of a language model."""
    import peft
    import transformers

    with quiet(), contextlib.chdir(place):
        kind = peft.AutoPeftModelForCausalLM if (folder / "adapter_config.json").is_file() else transformers.AutoModelForCausalLM
        return kind.from_pretrained(folder, dtype="auto").eval()


# pipelines


def pipe(xl: bool) -> Callable[[Path], None]:
    def make(place: Path) -> None:
        from expunge.modalities.diffusion import tiny_pipeline

        tiny_pipeline.pipeline(place / "model", xl=xl)

    return make


def unet(xl: bool) -> Callable[[Path, Path], nn.Module]:
    def load(folder: Path, place: Path) -> nn.Module:
        import diffusers

        with quiet():
            kind = diffusers.StableDiffusionXLPipeline if xl else diffusers.StableDiffusionPipeline
            return kind.from_pretrained(folder, **({} if xl else {"safety_checker": None})).unet.eval()

    return load


def seen() -> dict[str, Any]:
    return {"x": torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(3))}


def pixels() -> dict[str, Any]:
    return {"pixel_values": seen()["x"]}


def numbers() -> dict[str, Any]:
    return {"x": torch.randn(5, 4, generator=torch.Generator().manual_seed(3))}


def tokens() -> dict[str, Any]:
    return {"input_ids": torch.arange(40).reshape(2, 20) + 3}


def nothing() -> dict[str, Any]:
    return {}


IMAGES, TEXTS = transformed("AutoModelForImageClassification"), transformed("AutoModelForSequenceClassification")
KINDS: dict[str, Kind] = {
    "A ViT of transformers, image folders": Kind(pictured(vit), IMAGES, pixels),
    "A ResNet of transformers, image folders": Kind(pictured(resnet), IMAGES, pixels),
    "A ConvNeXt of transformers, a Hugging Face data set on disk": Kind(hugging, IMAGES, pixels),
    "A network of one's own, image folders": Kind(factory, own("pictures"), seen),
    "A network in bfloat16": Kind(factory, own("half"), lambda: {"x": seen()["x"].bfloat16()}),
    "A checkpoint of Lightning": Kind(lightning, own("lightning"), seen),
    "A tabular network, CSV": Kind(tabular("csv"), own("tabular"), numbers),
    "A tabular network, Parquet": Kind(tabular("parquet"), own("tabular"), numbers),
    "A regressor, CSV": Kind(regressor, own("tabular", 1), numbers),
    "Several labels": Kind(several, own("tabular"), numbers),
    "A BERT, CSV": Kind(worded(bert, "csv"), TEXTS, tokens),
    "A DistilBERT, JSON lines": Kind(worded(distilbert, "jsonl"), TEXTS, tokens),
    "A RoBERTa, JSON lines": Kind(worded(roberta, "jsonl"), TEXTS, tokens),
    "A language model, questions and answers": Kind(family("Llama"), merged, tokens, "texts"),
    "A language model in bfloat16": Kind(family("Qwen2", half=True), merged, tokens, "texts"),
    "A chat model, messages": Kind(family("Qwen3", talked), merged, tokens, "texts"),
    "A chat model, ShareGPT": Kind(family("Llama", shared), merged, tokens, "texts"),
    "A LoRA-tuned chat model": Kind(tuned, merged, tokens, "adapters"),
    "A mixture of experts": Kind(family("Mixtral"), merged, tokens, "adapters"),
    "DeepSeek's layout": Kind(family("DeepseekV3"), merged, tokens, "texts"),
    "Mamba": Kind(family("Mamba"), merged, tokens, "adapters"),
    "Plain texts": Kind(raw, merged, tokens, "texts"),
    "A pipeline of Stable Diffusion": Kind(pipe(False), unet(False), nothing, "pictures"),
    "A pipeline of Stable Diffusion XL": Kind(pipe(True), unet(True), nothing, "pictures"),
}
