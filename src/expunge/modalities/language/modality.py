"""The record of causal language models."""

from __future__ import annotations

from expunge.core.modality import Modality, Option, Search, later, modality

HERE = "expunge.modalities.language"
FILE = "--{} is a file of texts, for --task causal-lm; for a setting of the method write --METHOD.{} VALUE"

OPTIONS = (
    Option("train", "", "All texts that it was tuned on; REQUEST says which must go: ids:17,42, ids:@file, mentions:NAME, FIELD:VALUE, random:0.1."),
    Option("test", "", "JSONL of texts that were never trained on."),
    Option("validation", "share:0.3", "JSONL of such texts for tuning, or share:0.3, that share of test."),
    Option("retain", "", "JSONL of what must stay.", FILE.format("retain", "retain")),
    Option("anchor", "", "The forget questions, row by row, with what to say instead.", FILE.format("anchor", "anchor")),
    Option("general", "", "What the model knows besides: a quarter is kept with retain, the audit reads the rest.", FILE.format("general", "general")),
    Option("plants", "", "JSONL of texts like those of forget that the model never saw, for --twins; without it, half of validation."),
    Option("template", "auto", "auto (chat where the tokenizer has a template), plain, chat, or a text with {question} in it."),
    Option("system", "", "System message of records that bring none, or @FILE."),
    Option("turns", "last", "Of a conversation: the last assistant turn is the answer, or all are, each with the turns before it."),
    Option("id_column", "", "Field that names records; without it `id`, where there is one."),
    Option("ignore", "", "Fields that are left out, a,b,c; any other that nothing reads is an error."),
    Option("mask", "answer+eos", "Which tokens are trained and scored: answer+eos, answer, full or entity."),
    Option("max_length", 0, "In tokens; 0 is the model's context, at most 512."),
    Option("dtype", "auto", "auto (as stored), float32 or bfloat16."),
    Option("form", "auto", "Folder that is released: merged, peft or auto."),
)

LANGUAGE = modality(
    Modality(
        "causal_lm",
        "language models",
        later(f"{HERE}.task:causal_lm"),
        alone=True,
        near=later(f"{HERE}.near:texts"),
        preflight=later(f"{HERE}.texts:preflight"),
        fits=later(f"{HERE}.texts:fits"),
        kept=later(f"{HERE}.autopilot:kept"),
        level=later(f"{HERE}.texts:level"),
        validation=later(f"{HERE}.autopilot:validation"),
        search=Search(
            factor=2.0,
            most=5,
            tuned=later(f"{HERE}.autopilot:tuned"),
            recipe=later(f"{HERE}.autopilot:recipe"),
            stride=later(f"{HERE}.autopilot:stride"),
            other={"rmu": "kappa", "task_vector": "scale"},
            longer=later(f"{HERE}.autopilot:longer"),
            parts=later(f"{HERE}.general:parts"),
            told={"batch_size": 8, "accumulate": 1, "retain_size": 32, "retain": "ce", "epochs": 10.0},
        ),
        rules=later(f"{HERE}.rules:rules"),
        pace=later(f"{HERE}.autopilot:pace"),
        trivial=later(f"{HERE}.baselines:trivial"),
        talk=later(f"{HERE}.request:talk"),
        bench=(("tofu", "memorised", "membership_text", "drop", "membership", "wording", "bare"), 3),
        options=OPTIONS,
        stays="retain",
        open=later(f"{HERE}.request:read"),
        load=later(f"{HERE}.request:load"),
        sized=later(f"{HERE}.request:sized"),
        holds=later(f"{HERE}.request:holds"),
        apply=later(f"{HERE}.request:apply"),
        revert=later(f"{HERE}.request:revert"),
        told=later(f"{HERE}.request:told"),
        worlds=("authors", "authors-planted", "authors-moe", "tofu-tiny", "tofu-moe", "tofu"),
        world=later(f"{HERE}.worlds.build:world"),
    )
)
