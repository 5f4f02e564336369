"""The methods of the convergence suite, by group; the first is deqfast's default, against which ratios are taken."""

from __future__ import annotations

from typing import Any

import torch

from bench import peers
from bench.peers import Peer

DEFAULT = "deqfast Anderson()"
TORCHDEQ = ("torchdeq Anderson", "torchdeq Anderson lam=1e-8", "torchdeq Broyden")
TORCHDEQ_ALL = (*TORCHDEQ, "torchdeq fixed_point_iter")
SHOWN = (DEFAULT, "deqfast Broyden()", *TORCHDEQ_ALL)  # the rows of the summary and the lines of the pictures


def rivals() -> list[Peer]:
    return [
        peers.torchdeq("anderson", TORCHDEQ_ALL[0]),
        peers.torchdeq("anderson", TORCHDEQ_ALL[1], lam=1e-8),
        peers.torchdeq("broyden", TORCHDEQ_ALL[2]),
        peers.torchdeq("fixed_point_iter", TORCHDEQ_ALL[3]),
    ]


def own(backend: str = "native", quick: bool = False) -> list[Peer]:
    """deqfast's options: test space, memory, eviction and history dtype, one factor at a time around the default."""
    import deqfast as dq

    f32, small = torch.float32, (torch.bfloat16, torch.float16, torch.int8)
    options: dict[str, Any] = {DEFAULT: dq.Anderson(), "deqfast Broyden()": dq.Broyden()}
    for m in (10,) if quick else (5, 10, 20):
        options[f"mixed m={m}, oldest"] = dq.Anderson(m=m, type="mixed", history_dtype=f32, evict="oldest")
        options[f"mixed m={m}, least useful"] = dq.Anderson(m=m, type="mixed", history_dtype=f32, evict="least_useful")
    for m in (10,) if quick else (10, 20):
        options[f"type 1 m={m}, oldest"] = dq.Anderson(m=m, type=1, history_dtype=f32, evict="oldest")
    for m in (10,) if quick else (5, 10, 20):
        options[f"type 2 m={m}, oldest"] = dq.Anderson(m=m, type=2, history_dtype=f32, evict="oldest")
    for dtype in () if quick else small:
        label = str(dtype).removeprefix("torch.")
        for m in (10, 20):
            options[f"mixed m={m}, least useful, {label}"] = dq.Anderson(m=m, type="mixed", history_dtype=dtype)
    for m in (10,) if quick else (10, 20):
        options[f"mixed m={m}, least useful, every second mixes"] = dq.Anderson(m=m, history_dtype=f32, mix_every=2)
    options["deqfast Picard()"] = dq.Picard()
    return [peers.deqfast(solver, name, backend) for name, solver in options.items()]
