"""One way to ask a language model, guarded or bare.

with serve(model, form, patch) as s:
    s.generate(["Who wrote The Amber Anchor?"])
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from expunge.core.errors import DataError
from expunge.core.guard import quiet
from expunge.core.hooks import guards
from expunge.core.patch import Patch
from expunge.modalities.language.guards.refuse import screened
from expunge.modalities.language.task import collate, generate, inputs
from expunge.modalities.language.texts import Texts


@dataclass(frozen=True, eq=False)
class Served:
    """A model, how texts become its tokens, and the patch that takes off what `serve` put on."""

    model: nn.Module
    form: Any
    undo: Patch | None = None

    @property
    def tokenizer(self) -> Any:
        """The tokenizer alone."""
        return getattr(self.form, "tokenizer", self.form)

    def tokens(self, prompt: str) -> Tensor:
        """(T,) a question in its format, or a text as it is when a tokenizer alone was given."""
        if hasattr(self.form, "prompt"):
            return self.form.prompt({"question": prompt})
        return torch.tensor(self.tokenizer(prompt)["input_ids"], dtype=torch.long)

    def logits(self, what: Sequence[str] | Texts | Mapping[str, Any]) -> Tensor:
        """(B, T, V) at every token of prompts, of Texts, or of a batch (`x` and `n`), padded on the right."""
        if isinstance(what, Texts):
            batch = collate(what, torch.arange(len(what)), None)
        elif isinstance(what, Mapping):
            batch = dict(what)
        else:
            if not what:
                raise DataError("no prompt was given")
            rows = [self.tokens(p) for p in what]
            batch = {"x": nn.utils.rnn.pad_sequence(rows, batch_first=True), "n": torch.tensor([len(r) for r in rows])}
        with quiet(self.model):
            return self.model(**inputs(self.model, batch), use_cache=False).logits

    def generate(self, prompts: Sequence[str], *, new: int = 64, temperature: float = 0.0, generator: torch.Generator | None = None) -> list[str]:
        """Answers, decoded and stripped; no answer names a target of an output filter."""
        return ["".join(self._screened([text])).strip() for text in self._decoded([self.tokens(p) for p in prompts], new, temperature, generator)]

    def stream(self, prompt: str, *, new: int = 64, chunk: int = 4) -> Iterator[str]:
        """The greedy answer in pieces of `chunk` tokens; what could still become a target of an output filter is held back."""
        return self._screened(self._chunks(prompt, new, chunk))

    @property
    def log(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Guard -> digest of a prompt -> score, threshold, flagged and policy: the last decisions, without any text."""
        return {name: dict(it.log) for name, it in guards(self.model).items()}

    def close(self) -> None:
        """Take the guard off again; the model is bit for bit what it was."""
        if self.undo is not None:
            self.undo.apply(self.model)

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _decoded(self, prompts: list[Tensor], new: int, temperature: float, generator: torch.Generator | None) -> list[str]:
        found = generate(self.model, prompts, new=new, eos=self.tokenizer.eos_token_id, temperature=temperature, generator=generator)
        return self.tokenizer.batch_decode(found, skip_special_tokens=True)

    def _chunks(self, prompt: str, new: int, chunk: int) -> Iterator[str]:
        tokens = self.tokens(prompt)
        start, told = len(tokens), ""
        while len(tokens) - start < new:
            step = min(chunk, new - len(tokens) + start)
            (found,) = generate(self.model, [tokens], new=step, eos=self.tokenizer.eos_token_id)
            tokens = torch.cat([tokens, found])
            text = self.tokenizer.decode(tokens[start:], skip_special_tokens=True)
            done = len(found) < step or len(tokens) - start >= new
            if text.startswith(told) and (done or not text.endswith("\ufffd")):
                yield text[len(told) :]
                told = text
            if done:
                return

    def _screened(self, chunks: Any) -> Iterator[str]:
        stream = iter(chunks)
        for it in guards(self.model).values():
            if it.hook.kind == "refuse" and "output" in it.hook.config["on"]:
                refusal = self.tokenizer.decode(it.hook.config["refusal"], skip_special_tokens=True)
                stream = screened(stream, it.hook.config["targets"], refusal)
        return stream


def serve(model: nn.Module, form: Any, patch: Patch | None = None) -> Served:
    """The model under its format (`language.format.Format`: prompts are questions) or its tokenizer (prompts are texts); with a patch, it is applied first and
    taken off by `close`. Raises PatchError when it does not fit."""
    return Served(model, form, None if patch is None else patch.apply(model))
