"""Folders of diffusers pipelines with random weights, built from configurations: what tests, benchmarks and a first try run on where no weights can be had.

A tokenizer of single characters stands in for the real vocabulary; names, shapes and files are those of the real thing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from expunge.core.errors import SettingError
from expunge.core.machine.devices import reseeded
from expunge.modalities.diffusion.pipelines import needed, quietly

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "text": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "projection_dim": 24},
        "unet": {
            "sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 4,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        },
        "vae": {
            "block_out_channels": (4, 8), "norm_num_groups": 2,
            "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
        },
        "length": 48,
    },
    "sd15": {
        "text": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "projection_dim": 768},
        "unet": {
            "sample_size": 64, "block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2, "attention_head_dim": 8,
            "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        },
        "vae": {
            "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2,
            "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
        },
        "length": 77,
    },
}  # fmt: skip
"""tiny: some 60,000 parameters. sd15: the UNet (860 M parameters), text encoder and VAE of Stable Diffusion 1.5."""


def characters() -> list[str]:
    """The 256 symbols that stand for bytes in the tokenizers of CLIP and GPT-2: printable ones for themselves, the others moved behind."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    other = [b for b in range(256) if b not in plain]
    return [chr(b) for b in plain] + [chr(256 + k) for k in range(len(other))]


def pipeline(folder: Path | str, size: str = "tiny", *, xl: bool = False, prediction: str = "epsilon", seed: int = 0) -> Path:
    """Write a Stable Diffusion pipeline (`xl`: with SDXL's two text encoders) with random weights to a folder, as `save_pretrained` does, and return it."""
    needed()
    with quietly():
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
        from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
        from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
        from diffusers.schedulers.scheduling_ddim import DDIMScheduler
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
    if size not in SIZES:
        raise SettingError(f"size must be one of {', '.join(SIZES)}, not '{size}'")
    kind, letters = SIZES[size], characters()
    vocab = {c: k for k, c in enumerate([*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"])}
    ends = {"bos_token_id": len(vocab) - 2, "eos_token_id": len(vocab) - 1, "pad_token_id": len(vocab) - 1}
    words = 49408 if size == "sd15" else len(vocab)
    config = CLIPTextConfig(vocab_size=words, max_position_embeddings=kind["length"], **ends, **kind["text"])
    width, pooled = kind["text"]["hidden_size"], kind["text"]["projection_dim"]
    more: dict[str, Any] = {}
    if xl:
        more = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": pooled + 6 * 8}
    with reseeded(seed):
        parts: dict[str, Any] = {
            "unet": UNet2DConditionModel(in_channels=4, out_channels=4, cross_attention_dim=2 * width if xl else width, **kind["unet"], **more),
            "vae": AutoencoderKL(in_channels=3, out_channels=3, latent_channels=4, **kind["vae"]),
            "text_encoder": CLIPTextModel(config),
        }
        if xl:
            parts["text_encoder_2"] = CLIPTextModelWithProjection(config)
    parts["tokenizer"] = CLIPTokenizer(vocab=vocab, merges=[], model_max_length=kind["length"])
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1, prediction_type=prediction)
    if xl:
        parts["tokenizer_2"] = CLIPTokenizer(vocab=vocab, merges=[], model_max_length=kind["length"], pad_token="!")
    with quietly():
        made: Any = (
            StableDiffusionXLPipeline(scheduler=scheduler, **parts)
            if xl
            else StableDiffusionPipeline(scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False, **parts)
        )
        made.save_pretrained(folder)
    return Path(folder)
