"""Exact deletion: training laid out so that a record can be taken out again, with the result of a training that never saw it.

    ensemble = fit(sisa(shards=5, slices=6), model, task, data, folder="store")
    ensemble.plan([17]); proof = ensemble.forget([17]); ensemble.predict(x)

Designs: `sisa` (shards and slices), `s3t` (adapter blocks in many orders), `safe` (shards that share data along a graph). `clpu` learns tasks that can be
detached.
"""

from expunge.guarantees.exact.design import DESIGNS, Design, s3t, safe, sisa
from expunge.guarantees.exact.ensemble import Exact, fit, load
from expunge.guarantees.exact.proof import Proof, Touch

__all__ = ["DESIGNS", "Design", "Exact", "Proof", "Touch", "fit", "load", "s3t", "safe", "sisa"]
