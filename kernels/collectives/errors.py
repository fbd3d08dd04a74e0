"""What goes wrong between ranks, in words."""
from __future__ import annotations


class PeerError(RuntimeError):
    """Another rank died, hung, ran out of batches, or was given inputs that cannot be looked up."""


def lost_peer(what: str, rank: int, world: int, error: BaseException) -> PeerError:
    """The error for a collective ``what`` that did not come to an end."""
    return PeerError(
        f"rank {rank} of {world}: {what} did not complete: another rank died, hung, or did not make the same call within the process "
        "group's timeout. Why that could be: its process ended or raised (read its log first), it had fewer batches than this one "
        "(see tw.even_batches), or it ran the model another number of times. What to do: restart all ranks from the last complete "
        f"checkpoint. The process group said: {error}"
    )
