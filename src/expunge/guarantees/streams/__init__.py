"""A stream of requests to learn and to forget, played one after another: what is forgotten, what is kept, what it costs, request by request.

    stream = read("requests.csv")                                            # columns time,kind,what: 3,forget,class:3
    played = play(model, task, train, stream, Course(term="derpp", method="salun"), test=test, folder="stream")
    played.save("report")                                                    # stream.json, stream.csv, stream.html

 learn    the records that `what` selects and that are neither held nor forgotten: trained on alone, with the retention term
 forget   the records that `what` selects and that are held: the method runs (`run.unlearn`), its patch is applied; they leave memory and Fisher sums
          and are never learnt again; then logits of the memory that had seen them are made anew, and `repair` passes over the memory follow

    none      nothing                                   lwf      distillation of the old classes on the new inputs      losses.continual
    ewc       the pull to the weights before            gem, agem    steps that harm no memory                          updates.episodic
    der, derpp    replay with logits                    refresh  the weights stirred before each step of derpp

gem, agem, der, derpp and refresh have a memory (`data.records.memory`), one part per learn request; none, lwf and ewc keep no record.

`requests` and `course` are what is given, `playing` and `retention` the work, `state` what a killed stream goes on from, `rows` and `played` what is left.

Card     continual-retention.
Differs  Records enter the memory at the end of their learn request, with the logits of the model that has learnt them, without augmentation. LwF has no
         warm-up of a new head, since one head has all classes. A Fisher part keeps the weights it was summed at, which knew what was forgotten since:
         `stale` counts such parts and logits. EWC's F is the sum over parts of gamma^age * mean.
"""

from expunge.guarantees.streams.course import REPLAY, TERMS, Course
from expunge.guarantees.streams.played import Played, plot
from expunge.guarantees.streams.playing import play
from expunge.guarantees.streams.requests import COLUMNS, KINDS, MAX_BYTES, Request, read, schedule
from expunge.guarantees.streams.rows import Share, Step
from expunge.guarantees.streams.state import FORMAT

__all__ = [
    "COLUMNS", "FORMAT", "KINDS", "MAX_BYTES", "REPLAY", "TERMS", "Course", "Played", "Request", "Share", "Step", "play", "plot", "read", "schedule",
]  # fmt: skip
