"""Rows and families of evidence in plain words."""

from __future__ import annotations

WORDS = {
    "accuracy.forget": "how often the model still gives a forgotten record its label",
    "accuracy.forget_test": "the same, on records of the forgotten classes that it was never trained on",
    "accuracy.retain": "how often the model is right on the records that were kept",
    "accuracy.test": "how often the model is right on records it was never trained on",
    "error.forget": "mean error on the forgotten records, in units of the target",
    "error.test": "mean error on records it was never trained on, in units of the target",
    "drop.test": "what was lost on records it was never trained on (above 0 is worse)",
    "drop.retain": "what was lost on the records that were kept (above 0 is worse)",
    "drop.general": "what was lost on what the model knows besides (above 0 is worse)",
    "gap_closed.klom": "how much of the way to a model trained without the records was gone (1 is all)",
    "gap_closed.kl": "how much of the way to a model trained without the records was gone (1 is all)",
    "gap_closed.margin": "how much of the way to a model trained without the records was gone, by how sure it is of their labels (1 is all)",
    "gap_closed.relearning": "how much slower it comes back than from the model before, when half of it is learnt again (1: as a model trained without)",
    "klom_ratio.forget": "distance to models trained without the records, in units of what they differ by among themselves (1: no different)",
    "klom_ratio.retain": "the same distance on the records that were kept",
    "klom_ratio.test": "the same distance on records it was never trained on",
    "known.excess": "how much more of the forgotten answers is known than models trained without them know (0: no more)",
    "repair.free": "how much comes back when the model is mended without any training (0: nothing, 1: all)",
    "restore.closed": "how much of the way to a model trained without the records is left after training on kept ones (1 is all)",
    "membership.loss_auc": "how well an attack tells forgotten records from unseen ones (0.5 is guessing)",
    "membership.excess": "how much better such an attack does than on a model trained without the records (0: no better)",
    "tofu.d_over_critical": "how far answers about the forgotten texts differ from those of a model trained without them (at most 1: not told apart at 5 %)",
    "memorised.extraction_strength.forget": "how much of a forgotten answer the model can still complete by itself, 0 to 1",
    "wording.retain.lost": "how much of the kept answers' wording was lost (ROUGE-L, 0 is nothing)",
    "wording.test.broken": "share of answers to unseen questions that no longer say anything",
    "wording.forget.broken": "share of answers about the forgotten texts that no longer say anything",
    "canvas.ua": "share of drawings of the forgotten concept that no longer show it",
    "canvas.alias": "share of drawings under the concept's other names and wordings that still show it",
    "canvas.ira_drop": "share of the other concepts' drawings that went wrong (above 0 is worse)",
    "canvas.cra_drop": "share of drawings whose other domains went wrong (above 0 is worse)",
    "redirection.left": "how much of what told the concept from what to draw instead is left in the model's predictions (0 is nothing)",
    "redirection.shift": "how far the predictions for kept prompts moved (0 is not at all)",
    "zero_shot.forget": "share of the forgotten images that are still matched to their own words",
    "zero_shot.forget_other": "the same, under other words for them",
    "zero_shot.retain_drop": "share of kept images that are no longer matched to their own words",
    "zero_shot.test_drop": "share of unseen images that are no longer matched to their own words",
    "gan.erased": "share of drawings that still show what must go",
    "gan.rarest": "share of drawings of the kept class that is drawn least",
    "oracle_gap.closed": "how much of the way to a model trained without the records was gone (1 is all)",
    "oracle_gap.recognised.forget": "how much more often a judge recognises forgotten images than after a model trained without them",
    "oracle_gap.psnr.retain": "how much worse or better kept images are restored than by a model trained without the records, in dB",
    "oracle_gap.psnr.test": "the same, of unseen images",
    "reconstruction.lost.forget": "what was lost in restoring forgotten images, in dB",
    "reconstruction.lost.retain": "what was lost in restoring kept images, in dB",
    "reconstruction.lost.test": "what was lost in restoring unseen images, in dB",
    "reconstruction.recognised.forget": "share of restored forgotten images that a judge still recognises",
}
"""Rows that rules usually read."""

FAMILIES = {
    "output": "what the model answers", "closeness": "how near it is to models that never saw the records", "return": "what brings it back",
    "utility": "what had to stay",
}  # fmt: skip
"""Families of evidence."""
