"""Refuse by a fixed string: on a prompt that names a target (input), on one that a classifier flags (probe), or where the answer would come to name a
target (output). Source: card guardrails.

A refusal is a distribution that all but surely says the next token of the string: at a place whose text ends with its first k tokens, token k + 1;
after the last, the end token. A text without prompt (no marker in it) is refused from its first token on. Output: a token that would complete a target is
all but impossible everywhere, and where it was the likeliest, the refusal begins. What comes before it may end with the start of a target; `screened`
holds that back from a stream of text.

config   on (some of input, output, probe), targets, marker, refusal (tokens), eos; layer and threshold (the classifier's) when on has probe
tensors  tokenizer (bytes of its JSON, at most MAX_TOKENIZER), for input and output; weight (D,), bias () for probe
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from expunge.core.edits import Hook
from expunge.core.errors import PatchError
from expunge.core.hooks import Guarded, root, wrap
from expunge.modalities.language.guards.gate import ends, flush, linear_gate, note

MAX_TOKENIZER = 1 << 26
"""Largest tokenizer that a guard carries, as JSON: 64 MiB."""

ON = ("input", "output", "probe")

SHARP = 30.0
"""Logit of the token that a refusal says, all others 0; and how far below the rest a token lies that would complete a target."""


def folded(text: str) -> str:
    """The text as it is matched: compatible forms and case folded, runs of white space as one space.

    >>> folded("Where  is HOGWARTS?")
    'where is hogwarts?'
    """
    return re.sub(r"\s+", " ", unicodedata.normalize("NFKC", text).casefold())


def wanted(targets: Sequence[str]) -> list[str]:
    """Targets as they are looked for in folded texts."""
    return [folded(t).strip() for t in targets]


def matches(text: str, targets: Sequence[str]) -> bool:
    """Whether the text names a target.

    >>> matches("Where is hogwarts?", ["Hogwarts"]), matches("Where is Oxford?", ["Hogwarts"])
    (True, False)
    """
    low = folded(text)
    return any(t in low for t in wanted(targets))


def screened(chunks: Iterable[str], targets: Sequence[str], refusal: str) -> Iterator[str]:
    """A stream of text that never names a target, wherever its chunks are cut: the longest end that could still become one is held back; on a match
    the refusal is said and the stream ends.

    >>> "".join(screened(["He went to Hog", "warts."], ["Hogwarts"], "[refused]"))
    'He went to [refused]'
    >>> "".join(screened(["A hog", " farm"], ["Hogwarts"], "[refused]"))
    'A hog farm'
    """
    held, words = "", wanted(targets)
    longest = 4 * max((len(t) for t in words), default=0)
    for chunk in chunks:
        held += chunk
        if matches(held, targets):
            first = min(k for k in range(len(held) + 1) if matches(held[:k], targets))
            start = max(k for k in range(first) if matches(held[k:first], targets))
            yield held[:start] + refusal
            return
        keep = max((k for k in range(1, min(len(held), longest) + 1) if any(t.startswith(folded(held[-k:]).lstrip()) for t in words)), default=0)
        if len(held) > keep:
            yield held[: len(held) - keep]
            held = held[len(held) - keep :]
    if held:
        yield held


def tokenizer(it: Guarded) -> Any:
    """The tokenizer that the hook carries."""
    if "tokenizer" not in it.cache:
        it.cache["tokenizer"] = read(it.hook)
    return it.cache["tokenizer"]


def read(hook: Hook) -> Any:
    from tokenizers import Tokenizer

    stored = hook.tensors.get("tokenizer")
    if stored is None or stored.dtype != torch.uint8 or stored.ndim != 1 or stored.numel() > MAX_TOKENIZER:
        raise PatchError(f"guard {hook.name} needs its tokenizer as JSON in at most {MAX_TOKENIZER} bytes")
    try:
        return Tokenizer.from_str(stored.cpu().numpy().tobytes().decode())
    except Exception as error:
        raise PatchError(f"guard {hook.name}: its tokenizer cannot be read ({str(error).splitlines()[0]})") from None


def packed(tokenizer: Any) -> Tensor:
    """A fast tokenizer of transformers as the bytes of its JSON."""
    text = tokenizer.backend_tokenizer.to_str().encode()
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def check(model: nn.Module, hook: Hook) -> None:
    on = hook.config["on"]
    if not on or not set(on) <= set(ON):
        raise PatchError(f"guard {hook.name}: on must hold some of {', '.join(ON)}, not {on}")
    if "input" in on or "output" in on:
        if not hook.config["targets"] or not all(isinstance(t, str) and folded(t).strip() for t in hook.config["targets"]):
            raise PatchError(f"guard {hook.name}: targets must be a list of texts that are not empty")
        read(hook)
    if not hook.config["refusal"]:
        raise PatchError(f"guard {hook.name}: the refusal is empty")
    if "probe" in on:
        modules = dict(model.named_modules())
        whole = isinstance(hook.config.get("threshold"), (int, float)) and hook.config.get("layer") in modules
        if not whole or "weight" not in hook.tensors or "bias" not in hook.tensors:
            raise PatchError(f"guard {hook.name}: a probe needs layer and threshold in its config, and tensors weight and bias")


def gate(model: nn.Module, it: Guarded, x: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
    """Scores and flags of right-padded rows: 1 where the prompt names a target, or the classifier's score where it flags."""
    on = it.hook.config["on"]
    score = torch.zeros(len(x))
    flagged = torch.zeros(len(x), dtype=torch.bool)
    if "probe" in on:
        found = linear_gate(model, it, x, n)
        score, flagged = found[0].cpu(), found[1].cpu()
    if "input" in on:
        end = ends(x, n, it.hook.config["marker"])
        said = tokenizer(it).decode_batch([row[:stop] for row, stop in zip(x.tolist(), end.tolist(), strict=True)])
        hit = torch.tensor([matches(text, it.hook.config["targets"]) for text in said])
        score, flagged = torch.where(hit, torch.ones_like(score), score), flagged | hit
        note(it, x, end, score, flagged)
    return score, flagged


@wrap(config={"on": list, "targets": list, "marker": list, "refusal": list, "eos": int}, tensors={}, gate=gate, check=check)
def refuse(model: nn.Module, it: Guarded) -> list[Any]:
    """See the module's docstring."""
    return root(model, it, before, after)


def before(model: nn.Module, it: Guarded, call: dict[str, Any]) -> dict[str, Any]:
    config, full = it.hook.config, call["input_ids"]
    x, n, first = flush(full, call["attention_mask"])
    end = ends(x, n, config["marker"])
    flagged = gate(model, it, x, n)[1].to(x.device)
    answers = _marked(x, end, config["marker"]) if config["marker"] else torch.zeros_like(flagged)
    keep = call.get("logits_to_keep", 0)
    it.now = {"x": full, "begin": first + torch.where(answers, end, 0), "stop": first + n, "flagged": flagged, "keep": keep}
    if "output" in config["on"] or isinstance(keep, Tensor):
        return {**call, "logits_to_keep": min(full.shape[1], keep + len(config["refusal"])) if isinstance(keep, int) and keep else 0}
    return call


def _marked(x: Tensor, end: Tensor, found: list[int]) -> Tensor:
    """(B,) bool: the marker stands right before `end`."""
    width = len(found)
    places = (end[:, None] - width + torch.arange(width, device=x.device)).clamp(min=0)
    return (x.gather(1, places) == torch.tensor(found, device=x.device)).all(1)


def after(model: nn.Module, it: Guarded, now: dict[str, Any], logits: Tensor) -> Tensor:
    config, x = it.hook.config, now["x"]
    B, T = x.shape
    K = logits.shape[1]
    columns = torch.arange(T, device=x.device)
    inside = (columns >= now["begin"][:, None] - 1) & (columns < now["stop"][:, None])
    start = inside & now["flagged"][:, None]
    if "output" in config["on"]:
        hit, logits = _output(it, now, logits)
        start[:, T - K :] |= hit & inside[:, T - K :]
    say = torch.full((B, T), -1, device=x.device)
    run = torch.ones(B, T, dtype=torch.bool, device=x.device)
    words = [*config["refusal"], config["eos"]]
    for k in range(len(config["refusal"]) + 1):
        if k:
            run = torch.cat([torch.zeros_like(run[:, :1]), run[:, :-1]], 1) & (x == words[k - 1])
        begun = torch.cat([torch.zeros_like(start[:, :k]), start[:, : T - k]], 1)
        say = torch.where(run & begun, words[k], say)
    say = say[:, T - K :]
    sharp = torch.zeros_like(logits).scatter_(2, say.clamp(min=0)[..., None], SHARP)
    out = torch.where(say[..., None] >= 0, sharp, logits)
    return out[:, now["keep"]] if isinstance(now["keep"], Tensor) else out[:, -now["keep"] :] if now["keep"] else out


def _output(it: Guarded, now: dict[str, Any], logits: Tensor) -> tuple[Tensor, Tensor]:
    """(B, K) bool: the likeliest next token completes a target, or the answer holds one already; and the logits with completing tokens put down."""
    B, K, V = logits.shape
    T = now["x"].shape[1]
    hit = torch.zeros(B, K, dtype=torch.bool, device=logits.device)
    out = logits
    best = logits.argmax(-1)
    for b in range(B):
        begin = int(now["begin"][b])
        for k in range(max(0, begin - 1 - (T - K)), min(K, int(now["stop"][b]) - (T - K))):
            said = folded(tokenizer(it).decode(now["x"][b, begin : T - K + k + 1].tolist()))
            if matches(said, it.hook.config["targets"]):
                hit[b, k] = True
                continue
            done = _completing(it, said, V)
            if len(done):
                done = done.to(logits.device)
                hit[b, k] = bool((done == best[b, k]).any())
                out = out.clone() if out is logits else out
                out[b, k, done] = logits[b, k].amin() - SHARP
    return hit, out


def _completing(it: Guarded, said: str, size: int) -> Tensor:
    """Tokens that, said after this folded text, would complete a target."""
    words = wanted(it.hook.config["targets"])
    rests = {t[k:] for t in words for k in range(len(t)) if said.endswith(t[:k])}
    return torch.cat([_with(it, rest, rest in words, size) for rest in sorted(rests)])


def _with(it: Guarded, rest: str, whole: bool, size: int) -> Tensor:
    """Tokens whose text starts with `rest`, or holds it when it is a whole target."""
    key = ("rest", rest, whole, size)
    if key not in it.cache:
        if "pieces" not in it.cache:
            pieces = tokenizer(it).decode_batch([[k] for k in range(size)], skip_special_tokens=True)
            it.cache["pieces"] = [folded(p) for p in pieces]
        it.cache[key] = torch.tensor([k for k, p in enumerate(it.cache["pieces"]) if (rest in p if whole else p.startswith(rest))], dtype=torch.long)
    return it.cache[key]
