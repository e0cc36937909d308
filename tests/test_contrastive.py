"""Contrastive models: the two losses, transformers' CLIP, the world of digits with captions, the checks, and SLUG on contrastive and diffusion models."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from worlds import copied, same, small, state, toy

from expunge.audits.core import Probe, audit
from expunge.audits.pictures.zero_shot import recalled
from expunge.core import guard
from expunge.core.errors import ModelError, ScopeError, SettingError, SplitError
from expunge.core.guard import Guard
from expunge.core.registry import METHODS
from expunge.core.types import Out
from expunge.engine.run import unlearn
from expunge.methods.others import slug
from expunge.modalities.contrastive import worlds as clips
from expunge.modalities.contrastive.task import contrastive, images, info_nce, texts
from expunge.modalities.contrastive.tiny import clip_model
from expunge.modalities.diffusion.task import diffusion, emptied
from expunge.modalities.pictures import Pictures
from expunge.modalities.worlds import world
from expunge.parts.reading import score
from expunge.parts.scopes.pareto import matrices
from expunge.parts.scopes.saliency import gradient_sum
from expunge.parts.training import fresh
from expunge.parts.updates.oneshot import search


def every(task, data, generator=None):
    return task.collate(data, torch.arange(len(data)), generator)


def test_in_batch_loss_is_clips_where_all_captions_differ():
    """The mean of the two cross-entropies with the diagonal as labels."""
    z = 3 * torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    at = torch.arange(5)
    by_hand = (F.cross_entropy(z, at, reduction="none") + F.cross_entropy(z.T, at, reduction="none")) / 2
    torch.testing.assert_close(info_nce(z, at[:, None]), by_hand)


def test_equal_captions_are_no_negatives():
    """Two images under one caption: perfect cosines cost log 2 in both directions, and less than when they count as strangers."""
    z = 50 * torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    loss = info_nce(z, torch.tensor([[4, 0], [4, 0], [5, 0]]))
    torch.testing.assert_close(loss, torch.tensor([math.log(2), math.log(2), 0.0]))
    away = info_nce(z - 10 * torch.tensor([[0.0, 1, 0], [1, 0, 0], [0, 0, 0]]), torch.tensor([[4, 0], [4, 0], [5, 0]]))
    assert bool((away[:2] > loss[:2]).all())


def test_what_is_scored_does_not_depend_on_its_company_but_training_does():
    model, task, split = small("contrastive")
    data = split.retain
    together = task.forward(model, every(task, data)).nll
    alone = torch.cat([task.forward(model, task.collate(data, torch.tensor([k]), None)).nll for k in range(len(data))])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    g = torch.Generator()
    whole, first = (task.forward(model, task.collate(data, torch.arange(n), g)).nll for n in (12, 6))
    assert not torch.allclose(whole[:6], first, atol=1e-3)


def test_zero_shot_by_hand():
    """logits = exp(logit_scale) cos(image, mean of a class's wordings); nll is its cross-entropy."""
    model, task, split = small("contrastive")
    out = task.forward(model, every(task, split.retain))
    with torch.no_grad():
        image = F.normalize(model.visual_projection(model.vision_model(split.retain.x)), dim=1)
        classes = torch.stack([F.normalize(model.text_projection(model.text_model(p)), dim=1).mean(0) for p in task.prompts])
        logits = model.logit_scale.exp() * image @ F.normalize(classes, dim=1).T
    torch.testing.assert_close(out.logits, logits, atol=1e-5, rtol=1e-5)
    labels = torch.tensor([task.names.index(r["object"]) for r in split.retain.rows])
    assert torch.equal(out.labels, labels)
    torch.testing.assert_close(out.nll, F.cross_entropy(logits, labels, reduction="none"), atol=1e-5, rtol=1e-5)


def test_a_caption_is_read_up_to_its_first_end():
    model, _, split = small("contrastive")
    tokens = split.retain.encode(["a seven", "a seven", "seven a"])
    tokens[1, 4:] = 3
    with torch.no_grad():
        one, filled, turned = texts(model, tokens)
    assert torch.equal(one, filled) and not torch.allclose(one, turned)
    assert float(one.norm()) == pytest.approx(1)


def test_what_a_task_cannot_do_is_said():
    model, task, split = small("contrastive")
    with pytest.raises(SplitError, match="captions and no images"):
        every(task, replace(split.forget, x=None))
    with pytest.raises(SplitError, match="works on Pictures, not on list"):
        task.collate([1], torch.tensor([0]), None)
    strange = replace(split.forget, rows=tuple({"prompt": "a"} for _ in split.forget.rows))
    with pytest.raises(SplitError, match="none of the task's classes"):
        task.forward(model, every(task, strange))
    assert torch.isfinite(task.forward(model, every(task, strange, torch.Generator())).nll).all()  # pairs alone can be trained on
    with pytest.raises(ModelError, match="Linear has no vision_model"):
        images(nn.Linear(1, 1), split.forget.x)
    with pytest.raises(SettingError, match="at least 2 classes; found"):
        contrastive(["a"], torch.zeros(1, 4, dtype=torch.long))


def test_clip_of_transformers_fits():
    """A CLIPModel built from a small configuration: its own features and logits are what the task reads, and SLUG edits it."""
    transformers = pytest.importorskip("transformers")
    _, task, split = small("contrastive")
    shared = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**shared, "vocab_size": split.forget.encode.size, "max_position_embeddings": 8, "bos_token_id": 1, "eos_token_id": 0, "pad_token_id": 0}
    config = transformers.CLIPConfig(text_config=text, vision_config={**shared, "image_size": 8, "patch_size": 2, "num_channels": 1}, projection_dim=8)
    torch.manual_seed(0)
    model = transformers.CLIPModel(config).eval()
    data = split.retain.take(range(4))
    with torch.no_grad():
        found = model(input_ids=data.tokens, pixel_values=data.x)
        torch.testing.assert_close(images(model, data.x), found.image_embeds)
        torch.testing.assert_close(texts(model, data.tokens), found.text_embeds)
        z = task.forward(model, every(task, data, torch.Generator()))
        torch.testing.assert_close(z.nll, info_nce(found.logits_per_image, data.tokens))
    patch = METHODS["slug"](model, task, split, evaluations=3)
    assert len(patch.edits) == 1 and not any(word in patch.edits[0].name for word in ("token_embedding", "position", "norm", "bias", "scale"))


def test_the_world_keeps_its_parts_apart():
    w = world("clip-digits")
    split = w.split("object")
    split.check()
    assert len(split.forget) + len(split.retain) == len(w.train) == 1200
    assert {r["object"] for r in split.forget.rows} == {"seven"} and "seven" not in {r["object"] for r in split.retain.rows}
    assert all("eight" in p and "seven" not in p and "7" not in p for p in split.anchor.prompts) and split.asked == "object:seven"
    said = {t for p in w.train.tokens for t in [tuple(p.tolist())]}
    assert not any(tuple(p.tolist()) in said for p in w.task.others["other"].flatten(0, 1))
    with pytest.raises(SettingError, match="there is clip-digits"):
        clips.world("clip-cifar")


def test_fresh_weights_are_drawn_anew():
    model = clip_model(10, width=16, depth=1, space=8)
    model.logit_scale.data.fill_(3.0)
    twin = fresh(model, 1)
    assert float(twin.logit_scale.detach()) == pytest.approx(math.log(1 / 0.07))
    assert not torch.equal(twin.visual_projection.weight, model.visual_projection.weight)


def test_recall_by_hand():
    """Captions at 0, 1 and 2 quarters of a circle: each image finds the one in its direction first, the opposite one last."""

    class Circle(nn.Module):
        def __init__(self):
            super().__init__()
            self.logit_scale = nn.Parameter(torch.zeros(()))
            self.visual_projection = self.text_projection = nn.Identity()

        def vision_model(self, x):
            return x.flatten(1)

        def text_model(self, tokens):
            angle = tokens[:, 0] * math.pi / 2
            return torch.stack([angle.cos(), angle.sin()], 1).float()

    x = torch.tensor([[1.0, 0.1], [-1.0, 0.1], [0.1, 1.0]]).view(3, 1, 1, 2)
    tokens = torch.tensor([[0], [0], [1]])
    data = Pictures(torch.cat([x, -x[:1]]), torch.cat([tokens, torch.tensor([[2]])]), torch.arange(4), ({},) * 4)
    assert [recalled(Circle(), data, k).tolist() for k in (1, 2, 3)] == [[True, False, True, True], [True, False, True, True], [True] * 4]


def test_checks_tell_before_from_after():
    """Untouched, nothing is lost; after SLUG the seven is not named, in other words neither, and the rest is."""
    model, task, split = toy("contrastive")
    twin = copied(model)
    METHODS["slug"](model, task, split, drop=0.1).apply(twin)
    seen = {n: {r.name: r for r in audit(Probe(model, m, task, split))} for n, m in (("nothing", model), ("slug", twin))}
    nothing, gone = seen["nothing"], seen["slug"]
    assert nothing["zero_shot.forget"].low > 0.8 and gone["zero_shot.forget"].high < 0.1 and gone["zero_shot.forget_test"].value < 0.1
    assert nothing["zero_shot.forget_other"].low > 0.8 and gone["zero_shot.forget_other"].high < 0.5
    assert nothing["zero_shot.retain_drop"].value == 0 and gone["zero_shot.test_drop"].value < 0.1
    for name in ("zero_shot.forget", "zero_shot.test", "retrieval.forget"):
        assert nothing[name].value == nothing[f"{name}_before"].value == gone[f"{name}_before"].value
    assert gone["retrieval.forget"].value < nothing["retrieval.forget"].value
    assert gone["zero_shot.test"].n + gone["zero_shot.forget_test"].n == len(split.test)
    kept = [r["object"] != "seven" for r in split.test.rows]
    assert gone["retrieval.test"].n == sum(kept)


# SLUG


def test_one_layer_by_hand():
    """Card slug-generation: x = (1, 0), y = (cos 60, sin 60), image W x: at W = I dL/dW = [[0, 0], [-.866, 0]]; up the gradient x turns away from y."""
    y = torch.tensor([[0.5, math.sin(math.pi / 3)]])
    W = torch.eye(2, requires_grad=True)

    def loss(weight):
        image = F.normalize((weight @ torch.tensor([1.0, 0.0]))[None], dim=1)
        return slug.unlike(Out(image, image, pred=image, target=y))

    (g,) = torch.autograd.grad(loss(W), [W])
    torch.testing.assert_close(g, torch.tensor([[0.0, 0.0], [-0.8660, 0.0]]), atol=1e-4, rtol=0)
    here = W.detach()
    assert float(loss(here + 0.5 * g)) > float(loss(here)) > float(loss(here - 0.5 * g))


def test_search_of_the_card():
    """Success from 1.3 on, started at 1: 1, 2, 1.5, 1.25, 1.375, 1.3125, 1.2812, 1.2969."""
    tried = []
    search(1.0, lambda s: (tried.append(s) or s >= 1.3, False), evaluations=8)
    assert tried == pytest.approx([1, 2, 1.5, 1.25, 1.375, 1.3125, 1.28125, 1.296875])


def test_the_gradients_are_of_cosines_and_of_the_training_loss():
    model, task, split = small("contrastive")
    before = state(model)
    gone, held = slug.gradients(model, task, split.forget, split.retain, 64)
    assert same(before, state(model))
    W = model.visual_projection.weight
    cosines = (images(model, split.forget.x) * texts(model, split.forget.tokens)).sum(1)
    torch.testing.assert_close(gone["visual_projection.weight"], torch.autograd.grad((1 - cosines).mean(), [W])[0], atol=1e-6, rtol=1e-4)
    z = model.logit_scale.exp() * images(model, split.retain.x) @ texts(model, split.retain.tokens).T
    torch.testing.assert_close(held["visual_projection.weight"], torch.autograd.grad(info_nce(z, split.retain.tokens).mean(), [W])[0], atol=1e-6, rtol=1e-4)
    assert float(gone["logit_scale"]) == 0 < float(held["visual_projection.weight"].norm())


def test_both_towers_have_their_own_front():
    model, task, split = small("contrastive")
    weights = matrices(model)
    gone, held = slug.gradients(model, task, split.forget, split.retain, 64)
    names = [n for (n,) in slug.candidates(task, weights, gone, held, True)]
    assert names[0].startswith("vis") and names[1].startswith("text_") and len(set(names)) == len(names)
    assert "logit_scale" not in weights and not any("token_embedding" in n for n in weights)
    patch = METHODS["slug"](model, task, split, part="text_model", evaluations=2)
    assert all(e.name.startswith("text_model.") for e in patch.edits)


def test_clip_moves_one_layer_up_its_forget_gradient():
    model, task, split = toy("contrastive")
    with guard.watching(Guard()) as g:
        patch = METHODS["slug"](model, task, split, drop=0.1)
    assert "test" not in g.meter.seen and "validation" in g.meter.seen
    (edit,) = patch.edits
    twin = copied(model)
    patch.apply(twin)
    up = gradient_sum(model, task, task.batches(split.forget, 64, seed=0), slug.unlike)[edit.name]
    moved = twin.get_parameter(edit.name).detach() - model.get_parameter(edit.name).detach()
    assert float(F.cosine_similarity(moved.flatten(), up.flatten(), dim=0)) > 0.999
    kept = split.validation.take([k for k, r in enumerate(split.validation.rows) if r["object"] != "seven"])
    share = [float(score(m, task, kept).correct.float().mean()) for m in (model, twin)]
    assert share[1] >= share[0] - 0.1 and not bool(score(twin, task, split.forget).correct.any())


def test_groups_of_a_text_encoder():
    """The deepest layer of the front comes first and brings its whole group; without `widen` it moves alone."""
    model, task, split = small("diffusion")
    wide, alone = (METHODS["slug"](model, task, split, evaluations=3, layers=1, widen=w) for w in (True, False))
    names = {e.name for e in wide.edits}
    (one,) = (e.name for e in alone.edits)
    assert one in names and all(n.startswith("text_encoder.") for n in names)
    assert names == {n for n in matrices(model) if slug.kin(n) == slug.kin(one)}
    points = {n: (a, r) for n, a, r in (("text.attn.to_q.weight", 0.1, 1), ("text.ff.0.weight", 0.2, 2), ("text.ff.2.weight", 0.3, 1))}
    gone = {n: torch.tensor([[float(r), 0.0]]) for n, (_, r) in points.items()}
    held = {n: torch.tensor([[a, (1 - a * a) ** 0.5]]) for n, (a, _) in points.items()}
    weights = {n: torch.ones(1, 2) for n in points}
    assert slug.candidates(task, weights, gone, held, True) == [["text.ff.0.weight", "text.ff.2.weight"], ["text.attn.to_q.weight"]]
    assert slug.candidates(task, weights, gone, held, False) == [["text.ff.0.weight"], ["text.attn.to_q.weight"]]


@pytest.mark.slow
def test_what_a_prompt_explains():
    """Under the empty prompt itself nothing is explained; the trained model's prompts explain most of its images, and SLUG's step fewer of the concept's."""
    model, task, split = toy("diffusion")
    kept = split.retain.take(range(200))
    nothing = emptied(kept, task.null)
    assert not bool(slug.knowing(model, task, [nothing])(nothing).any())
    knows = slug.knowing(model, task, [kept, split.forget])
    before = [float(knows(d).float().mean()) for d in (kept, split.forget)]
    assert min(before) > 0.6
    METHODS["slug"](model, task, split, drop=0.1, sample=200, part="xattn").apply(twin := copied(model))
    after = [float((score(twin, task, d).nll < score(model, task, emptied(d, task.null)).nll).float().mean()) for d in (kept, split.forget)]
    assert after[1] < before[1] - 0.1 and after[0] > before[0] - 0.2


def test_removed_concepts():
    _, _, split = small("contrastive")
    away = slug.removed(split.forget, split.retain)
    assert bool(away(split.forget).all()) and not bool(away(split.retain).any())
    assert torch.equal(away(split.test), torch.tensor([r["object"] == "seven" for r in split.test.rows]))
    both = slug.removed(split.forget, replace(split.retain, rows=({**split.retain.rows[0], "object": "seven"}, *split.retain.rows[1:])))
    assert not bool(both(split.forget).any())


@pytest.mark.parametrize(
    ("task_name", "settings", "error", "message"),
    [
        ("contrastive", {"buffers": "recompute"}, SettingError, "buffers=recompute is for classifiers, not for contrastive"),
        ("diffusion", {"part": "vae"}, ScopeError, "no weight fits 'vae'"),
        ("contrastive", {"layers": 0}, SettingError, "must be at least 1"),
    ],
)
def test_bad_settings(task_name, settings, error, message):
    model, task, split = small(task_name)
    with pytest.raises(error, match=message):
        METHODS["slug"](model, task, split, **settings)


def test_diffusion_needs_images_and_the_empty_prompt():
    model, task, split = small("diffusion")
    with pytest.raises(SettingError, match="the task needs its tokens"):
        METHODS["slug"](model, diffusion(task.schedule, shape=task.shape), split)
    attempt = unlearn("slug", model, task, replace(split, forget=replace(split.forget, x=None)))
    assert attempt.outcome != "ok" and "prompts and no images" in attempt.reason


def test_classifiers_have_no_groups():
    model, task, split = small("classification")
    one, other = (METHODS["slug"](model, task, split, widen=w).edits for w in (True, False))
    assert len(one) == 1 and one[0].name == other[0].name and one[0].values.equal(other[0].values)
