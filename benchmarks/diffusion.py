"""Erasing concepts from diffusion models: CPU seconds on one thread, ratios in one run.

1  ESD, so many updates: all states of a few frozen trajectories, drawn once   against   a guided trajectory of the frozen model sampled up to a random time
   for every update, as published
2  UCE on the UNet and text encoder of Stable Diffusion 1.5 (random weights, float32): texts encoded once, one factorisation for all 32 matrices   against
   texts encoded and the matrix factored anew for each of them, as in the published code; and the peak of memory over model and touched matrices
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import time

import torch

from expunge.core.edits import Replace
from expunge.core.guard import quiet
from expunge.core.session import scratch
from expunge.core.types import Split
from expunge.engine.run import peak, unlearn
from expunge.methods.diffusion import uce
from expunge.methods.diffusion.esd import negated
from expunge.modalities.diffusion import tiny_pipeline
from expunge.modalities.diffusion.pipelines import quietly
from expunge.modalities.diffusion.task import Schedule, diffusion, draw, states
from expunge.modalities.diffusion.tiny import Diffusion, diffusion_model
from expunge.modalities.diffusion.trajectory import squared
from expunge.modalities.pictures import Pictures
from expunge.modalities.worlds import world
from expunge.parts.scopes.attention import part
from expunge.parts.updates.descend import optimiser
from expunge.parts.updates.ridge import Ridge


class Reached(Exception):
    """The time that was drawn has been reached."""


def esd(steps: int, path: int = 25, size: int = 32) -> None:
    """1: the whole method with its pool, against as many updates that sample anew."""
    w = world("text2digit")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = diffusion_model(w.train.encode.size)
    task, split = w.task, w.split("object")
    start = time.process_time()
    attempt = unlearn("esd", model, task, split, steps=steps, batch_size=size, trajectories=20, path=path)
    pooled = time.process_time() - start
    assert attempt.outcome == "ok", attempt.reason
    session, frozen = scratch(copy.deepcopy(model)), model
    params = [p for n, p in session.model.named_parameters() if "attn2" in n]
    stepper, g = optimiser(params, "adam", 1e-3, 0.0, 0.0), torch.Generator().manual_seed(0)
    start = time.process_time()
    for k in range(steps):
        asked = split.forget.take(torch.randint(len(split.forget), (size,), generator=g))
        at, kept = int(torch.randint(path, (1,), generator=g)), []

        def watch(rows, x, t, cond, null, at=at, kept=kept, tokens=asked.tokens):
            kept.append({"xt": x, "t": t, "y": tokens[rows], "i": rows, "cond": cond, "null": null})
            if len(kept) > at:
                raise Reached

        with contextlib.suppress(Reached):
            draw(task, frozen, asked, guidance=3.0, steps=path, seed=k, watch=watch)
        batch = kept[-1]
        stepper.zero_grad()
        squared(task, session.model, batch, negated(batch["null"], batch["cond"], 1.0)).mean().backward()
        stepper.step()
    anew = time.process_time() - start
    print(f"ESD, {steps} updates of {size} states: {pooled:.1f} s with the pool, {anew:.1f} s sampling anew: {pooled / anew:.2f}")


def prompts(n: int, words: int, length: int, vocabulary: int, seed: int) -> Pictures:
    """n prompts of random words in the layout of CLIP: start, words, end tokens."""
    g = torch.Generator().manual_seed(seed)
    tokens = torch.full((n, length), vocabulary - 1)
    tokens[:, 0], tokens[:, 1 : 1 + words] = vocabulary - 2, torch.randint(vocabulary - 2, (n, words), generator=g)
    return Pictures(None, tokens, seed * 1000 + torch.arange(n), tuple({"prompt": str(k)} for k in range(n)))


def stable_diffusion(retained: int) -> None:
    """2: one factorisation for all layers, and memory."""
    with quietly():
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
        from transformers import CLIPTextConfig, CLIPTextModel
    kind, vocabulary = tiny_pipeline.SIZES["sd15"], 49408
    unet = UNet2DConditionModel(in_channels=4, out_channels=4, cross_attention_dim=768, **kind["unet"])
    encoder = CLIPTextModel(CLIPTextConfig(vocab_size=vocabulary, max_position_embeddings=77, eos_token_id=vocabulary - 1, **kind["text"]))
    model = Diffusion(unet, encoder).eval()
    forget, retain = prompts(4, 3, 77, vocabulary, 1), prompts(retained, 4, 77, vocabulary, 2)
    anchor = Pictures(None, torch.where(torch.arange(77) == 3, 7, forget.tokens), forget.ids, forget.rows)
    null = prompts(1, 0, 77, vocabulary, 3).tokens[0]
    task, split = diffusion(Schedule("epsilon", clamp=0.0), shape=(4, 64, 64), null=null), Split(forget, retain, anchor=anchor)
    scope = part(model, "xattn-kv")
    named = dict(model.named_parameters())
    touched, whole = (sum(p.numel() * p.element_size() for p in some) for some in ([named[n] for n in scope.masks], model.parameters()))
    held = peak(anew=True)
    start = time.process_time()
    attempt = unlearn("uce", model, task, split)
    ours = time.process_time() - start
    assert attempt.outcome == "ok" and attempt.patch is not None, attempt.reason
    mine = {e.name: e for e in attempt.patch.edits if isinstance(e, Replace)}
    start, gap = time.process_time(), 0.0
    for name in scope.masks:
        with quiet(model), torch.no_grad():
            c, g = uce.pairs(model, task, split, "last")
            kept = states(model, retain.tokens).flatten(0, 1)
            W = named[name]
            new = Ridge([(c, 1.0), (kept, 1.0 / len(kept))], 0.5).edit(W, [g @ W.T, kept @ W.T])
        there = mine[name].mask
        gap = max(gap, float(((new if there is None else new[there]) - mine[name].values).abs().max()))
    theirs = time.process_time() - start
    print(f"UCE on {whole / 4e6:.0f} M parameters, {len(scope.masks)} matrices ({touched / 1e6:.0f} MB), {retained} retained prompts: {ours:.1f} s;")
    print(f"  texts and factors anew for each matrix {theirs:.1f} s: {theirs / ours:.1f} times faster; largest difference of a weight {gap:.1e}")
    if held:
        grown = attempt.cost.get("resident", 0)
        print(f"  memory: model {whole / 1e9:.2f} GB, peak while editing {grown / 1e9:+.2f} GB over what the process held ({held / 1e9:.2f} GB);")
        print(f"  peak over (model + touched matrices) {(held + grown) / (whole + touched):.2f}, libraries included")


def main() -> None:
    """Run both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--retained", type=int, default=16)
    parser.add_argument("--only", type=int, default=0, help="1 or 2")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.only != 2:
        esd(options.steps)
    if options.only != 1:
        stable_diffusion(options.retained)


if __name__ == "__main__":
    main()
