"""Public names, for type checkers and editors; tests hold them against `_WHERE`."""

from expunge.audits.core import Probe as Probe
from expunge.audits.core import Row as Row
from expunge.audits.core import audit as audit
from expunge.audits.core import gate as gate
from expunge.audits.influence import untrac as untrac
from expunge.core.edits import Hook as Hook
from expunge.core.edits import LowRank as LowRank
from expunge.core.edits import Replace as Replace
from expunge.core.guard import Guard as Guard
from expunge.core.machine.devices import placed as placed
from expunge.core.modality import MODALITIES as MODALITIES
from expunge.core.modality import Modality as Modality
from expunge.core.modality import modality as modality
from expunge.core.patch import Patch as Patch
from expunge.core.registry import CHECKS as CHECKS
from expunge.core.registry import METHODS as METHODS
from expunge.core.registry import check as check
from expunge.core.registry import method as method
from expunge.core.session import edit as edit
from expunge.core.types import Batches as Batches
from expunge.core.types import Out as Out
from expunge.core.types import Scope as Scope
from expunge.core.types import Split as Split
from expunge.core.types import Task as Task
from expunge.engine.run import Attempt as Attempt
from expunge.engine.run import unlearn as unlearn
from expunge.guarantees import certified as certified
from expunge.guarantees import exact as exact
from expunge.guarantees import streams as streams
from expunge.modalities.classification.task import classification as classification
from expunge.modalities.contrastive.task import contrastive as contrastive
from expunge.modalities.diffusion.task import diffusion as diffusion
from expunge.modalities.examples import Examples as Examples
from expunge.modalities.files.division import split as split
from expunge.modalities.gan.task import gan as gan
from expunge.modalities.image_to_image.task import image_to_image as image_to_image
from expunge.modalities.language.guards.serve import serve as serve
from expunge.modalities.language.records.format import Format as Format
from expunge.modalities.language.task import causal_lm as causal_lm
from expunge.modalities.language.texts import Texts as Texts
from expunge.modalities.multilabel.task import multilabel as multilabel
from expunge.modalities.pictures import Pictures as Pictures
from expunge.modalities.regression.task import regression as regression
from expunge.modalities.text_classification.task import text_classification as text_classification
from expunge.modalities.worlds import world as world
from expunge.parts.scopes.lora import lora as lora
from expunge.parts.updates.descend import alternate as alternate
from expunge.parts.updates.descend import descend as descend
from expunge.planning.outcome import Verdict as Verdict
from expunge.planning.outcome import audited as audited
from expunge.planning.plan import forget as forget
from expunge.planning.plan import plan as plan
from expunge.planning.sanity import sanity as sanity

__version__: str
__all__: list[str]
