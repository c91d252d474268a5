"""Ranks that torchrun started, or anything else that sets the variables of torch.distributed (Kubernetes operators)."""

from __future__ import annotations

import socket
from collections.abc import Mapping

from .ranks import Ranks, checked, number


def discover(environ: Mapping[str, str]) -> Ranks | None:
    """This process among the ranks of torchrun; None where torchrun did not start it.

    Without torchrun, RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT together count the same. Raises UserError where one
    of torchrun's variables is missing or no number.
    """
    needed = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if "TORCHELASTIC_RUN_ID" not in environ and not all(name in environ for name in needed):
        return None
    return checked(
        Ranks(
            rank=number(environ, "RANK"),
            world=number(environ, "WORLD_SIZE"),
            local_rank=number(environ, "LOCAL_RANK", 0),
            local_world=number(environ, "LOCAL_WORLD_SIZE", 1),
            host=socket.gethostname(),
            address=environ.get("MASTER_ADDR", "127.0.0.1"),
            port=number(environ, "MASTER_PORT"),
            started_by="torchrun",
            agent_store=environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
            attempt=number(environ, "TORCHELASTIC_RESTART_COUNT", 0),
        )
    )
