"""CLPU-DER++: a stream of tasks that are remembered, learned for a time, or forgotten; forgetting detaches a side network and is exact.

    e = begin(model, task, folder="stream")              # or load("stream", model, task)
    e.learn("a", data)                                   # R  into the main network, with replay of what it remembers
    e.learn("b", more, how="temporary")                  # T  into a side network and a memory of its own; the main network stays as it is
    e.plan("b"); e.forget("b")                           # F  both are deleted: nothing else had seen b
    e.learn("b", how="remember")                         #    or consolidate: the memory of b, with the logits of its side network, is distilled into main
    e.predict("a", x)

    R            mean_B CE(f(x), y) + (1/P) sum over the P remembered tasks t' of mean_m [ alpha MSE(f(x_m), z_m) + beta CE(f(x_m), y_m) ]
    T            mean_B CE(f(x), y)
    R after T    mean_m [ alpha MSE(f(x_m), z_m) + beta CE(f(x_m), y_m) ] over the memory of t, plus the same (1/P) sum as in R

f gives the logits of the classes of the task at hand, and of no others; z are the logits that stood when a record entered the memory (`data.records.memory`).

Law: after any stream, the main network and the memories of remembered tasks are bit for bit, files too, those of the stream without the tasks that were
forgotten. Every network and memory is named by a key made of all that it depends on (its parent, the records, the memories replayed, classes, task id,
settings), and its seed is made of the key: no random number that a temporary task draws reaches another. What the guarantee leaves out: the book keeps the
ids of forgotten tasks, so that forgetting twice can be told from a mistake; records that stand in a remembered task too stay there; folders that `save` wrote,
and models taken from here, are copies that no `forget` reaches.

`learner` is the face; `state` says what a stream is, `parts` reads and writes it; `learning` does R and T, `deletion` F, `answers` predicts.

Paper    Liu, Liu and Stone, "Continual Learning and Private Unlearning", CoLLAs 2022, arXiv:2203.12817.
Code     Cranial-XIX/Continual-Learning-Private-Unlearning, MIT.
Card     clpu-der; the loss of replay: continual-retention, loss 3 (`parts.losses.continual.derpp`).
Differs  Other tasks' logits are left out; the code writes -1e11 over them in `.data`: the same loss, without an alias. Records are offered to the memory
         once, in the last epoch of learning, with inputs and logits as training saw them; the code offers them in every epoch, and on a rejection writes
         over the last slot. A temporary task starts from a copy of the main network (use_pretrain) or from fresh weights. Records of a task are
         sorted by id, so that their order does not matter; an augmentation counts in the key as there or not. Consolidation takes as many steps as
         learning the task took, unless `iterations` says else.
"""

from expunge.guarantees.exact.clpu.answers import Masked, masked
from expunge.guarantees.exact.clpu.deletion import Forgotten, Removal
from expunge.guarantees.exact.clpu.learner import Clpu, begin, load
from expunge.guarantees.exact.clpu.learning import replayed, restricted
from expunge.guarantees.exact.clpu.state import DEFAULTS, HOW, Entry, Rule, State

__all__ = ["DEFAULTS", "HOW", "Clpu", "Entry", "Forgotten", "Masked", "Removal", "Rule", "State", "begin", "load", "masked", "replayed", "restricted"]
