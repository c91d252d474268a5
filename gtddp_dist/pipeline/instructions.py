"""What a pipeline rank can be told to do. A schedule is, for every rank, a tuple of these; nothing here computes.

An instruction's unit is a micro-batch, or a recursion unit: the micro-batch where each has a recursion of its own
("by micro-batch"), 0 where one recursion follows all backward passes ("by step").
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Op(Enum):
    """The kinds of instruction. Upstream is towards the input, downstream towards the loss."""

    LOAD = "load"
    """Take a micro-batch from the batch: images on the first segment, labels on the last."""
    RECV_ACTIVATION = "receive activation"
    """Live tensors of the cut before this segment, from upstream."""
    FORWARD = "forward"
    """Run the segment on a micro-batch; on the last segment with the loss."""
    SEND_ACTIVATION = "send activation"
    RECV_GRADIENT = "receive gradient"
    """Loss gradient of the live tensors of the cut after this segment, from downstream."""
    BACKWARD = "backward"
    """Back-propagate the loss gradient through the segment; frees the micro-batch's graph."""
    SEND_GRADIENT = "send gradient"

    RECV_COTANGENT = "receive cotangent"
    """Curvature cotangents of the same live tensors, from downstream."""
    COTANGENT = "cotangent"
    """Back-propagate the curvature cotangents, on the graph that BACKWARD is still to use and to free."""
    SEND_COTANGENT = "send cotangent"

    GRAM = "gram"
    """Gram matrices of this segment's players."""
    RECV_VALUE = "receive value"
    """Value state of the cut after this segment, from downstream."""
    SWEEP = "sweep"
    """The recursion backward through this segment's players: a policy each, and the value state of the cut before."""
    SEND_VALUE = "send value"
    RECV_FEEDBACK = "receive feedback"
    """Feedback of the cut before this segment, from upstream."""
    FEEDBACK = "feedback"
    """The linear forward sweep through this segment's players."""
    SEND_FEEDBACK = "send feedback"
    WEIGHT = "weight"
    """Weighted weight-gradients of this segment's players, added up over units."""

    REDUCE = "reduce"
    """Sum over the data axis of the gradients that were formed since the last one."""
    AGREE = "agree"
    """All ranks of the grid agree whether the step is finite so far."""
    STATISTICS = "statistics"
    """New curvature statistics: factors averaged over the data axis, decompositions; not in force yet."""
    UPDATE = "update"
    """Change the weights."""
    RECV_STATE = "receive state"
    """Live tensors of the new trajectory, all micro-batches, from upstream."""
    ROLLOUT = "rollout"
    """The nonlinear forward sweep: feedback, weighted gradients, their sum over the data axis and the update, player
    by player, and the new live tensors."""
    SEND_STATE = "send state"

    @property
    def sends(self) -> bool:
        """Whether it hands a message to a neighbour, without waiting for it to be taken."""
        return self in SENDS

    @property
    def receives(self) -> bool:
        """Whether it waits for a message of a neighbour."""
        return self in RECEIVES


@dataclass(frozen=True)
class Instruction:
    """One thing that a rank does.

    Attributes:
        op: what.
        unit: of which micro-batch or recursion unit. 0 for what is done once a step; AGREE and REDUCE are counted
            within the step: 0 for the first, 1 for the second.
    """

    op: Op
    unit: int = 0

    def __str__(self) -> str:
        return f"{self.op.value} {self.unit}"


@dataclass(frozen=True)
class Message:
    """A kind of message between neighbours.

    Attributes:
        send: the sender's instruction.
        receive: the receiver's.
        downstream: whether it flows from a rank to the next (else to the one before).
    """

    send: Op
    receive: Op
    downstream: bool


MESSAGES = {
    "activation": Message(Op.SEND_ACTIVATION, Op.RECV_ACTIVATION, True),
    "gradient": Message(Op.SEND_GRADIENT, Op.RECV_GRADIENT, False),
    "cotangent": Message(Op.SEND_COTANGENT, Op.RECV_COTANGENT, False),
    "value": Message(Op.SEND_VALUE, Op.RECV_VALUE, False),
    "feedback": Message(Op.SEND_FEEDBACK, Op.RECV_FEEDBACK, True),
    "state": Message(Op.SEND_STATE, Op.RECV_STATE, True),
}
"""Every kind of message by name. Within a kind, a link carries the units in one order at both ends."""

SENDS = {message.send: kind for kind, message in MESSAGES.items()}
"""Sending instruction -> kind of message."""
RECEIVES = {message.receive: kind for kind, message in MESSAGES.items()}
"""Receiving instruction -> kind of message."""
