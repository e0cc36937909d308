"""The record of diffusion models, and of pipelines of diffusers in files."""

from __future__ import annotations

from expunge.core.modality import Modality, Option, later, modality

HERE = "expunge.modalities.diffusion"

OPTIONS = (
    Option("concept", "", "What must go, in words.", "--concept is for --task diffusion; say --forget", recipe=False),
    Option("anchor", "", "What to draw instead."),
    Option("retain", "", "Concepts to keep: a,b,c or @FILE."),
    Option("dtype", "auto", "auto (as stored), float32 or bfloat16."),
    Option("form", "auto", "Folder that is released: merged, adapter, ungated (an SPM without its gate) or auto.", recipe=False),
    Option(
        "judge", "",
        "A folder of transformers (CLIP, SigLIP, or an image classifier whose labels hold --concept and --retain) that names what is drawn before and after.",
        "--judge looks at drawings, for --task diffusion; other tasks know from their records what is right", recipe=False,
    ),
    Option(
        "drawings", 0, "With --judge: drawings of the concept, twice as many of what is kept; 0 is 40. Fewer than 25 cannot prove that it is gone.",
        "--drawings is how many a judge looks at: name one with --judge", recipe=False,
    ),
)  # fmt: skip
WORLDS = tuple(f"{name}{kind}" for name in ("text2digit", "text2digit-mnist", "shapes", "shapes-small") for kind in ("", "-epsilon", "-v"))

DIFFUSION = modality(
    Modality(
        "diffusion",
        "diffusion models",
        later(f"{HERE}.task:diffusion"),
        kinds=lambda split: ("class",),
        families=("output", "utility"),
        near=later("expunge.modalities.near:inputs"),
        rules=later(f"{HERE}.rules:rules"),
        bench=(("canvas", "prompt_attack"), 0),
        options=OPTIONS,
        asks="concept",
        refuses={"forget": "a pipeline forgets a concept: write --concept in place of --forget"},
        open=later(f"{HERE}.request:read"),
        load=later(f"{HERE}.request:load"),
        sized=later(f"{HERE}.request:sized"),
        holds=later(f"{HERE}.request:holds"),
        apply=later(f"{HERE}.request:apply"),
        revert=later(f"{HERE}.request:revert"),
        worlds=(*WORLDS, "ddpm-digits"),
        world=later(f"{HERE}.ddpm:world"),
    )
)
