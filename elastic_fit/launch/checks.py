"""What of a command line makes no sense, though each flag was read: found before anything starts."""

from __future__ import annotations

import argparse
import math
import re

from torch.distributed.elastic.multiprocessing import Std
from torch.distributed.run import determine_local_world_size, parse_min_max_nnodes

from elastic_fit.launch._torchelastic import event_log_handlers
from elastic_fit.launch.etcd import ETCD_BACKENDS
from elastic_fit.supervisor.errors import UsageError

BACKENDS = ("static", "c10d", *ETCD_BACKENDS)
LAST_PORT = 65535
RENDEZVOUS_LIMITS = {
    "silence": (2.1, math.inf),  # it spans several beats
    "outage": (0.0, math.inf),
    "port": (0.0, LAST_PORT),
    "last_call_timeout": (0.0, math.inf),
    "join_timeout": (0.0, math.inf),
}
"""The keys of ``--rdzv-conf`` that mean something here, and between what each may be."""


def check_nodes(text: str) -> None:
    """Whether it is a number of nodes, or MIN:MAX. Raises UsageError."""
    try:
        least, most = parse_min_max_nnodes(text)
    except (ValueError, RuntimeError):
        raise UsageError(f"--nnodes {text} is not a number or MIN:MAX", hint="for example --nnodes 1:4") from None
    if not 0 < least <= most:
        raise UsageError(
            f"--nnodes {text}: the minimum must be above zero and not above the maximum",
            hint="write MIN:MAX, for example --nnodes 1:4",
        )


def check_backend(name: str) -> None:
    """Whether nodes can agree there. Raises UsageError."""
    if name not in BACKENDS:
        raise UsageError(
            f"there is no rendezvous backend {name}",
            hint=f"one of {', '.join(BACKENDS)}; or none: then the nodes agree in the run folder",
        )


def rendezvous_config(text: str) -> dict[str, float]:
    """The numbers in ``--rdzv-conf`` that mean something here; torchrun's other keys pass. Raises UsageError."""
    numbers: dict[str, float] = {}
    for pair in filter(None, text.split(",")):
        key, has_value, value = (part.strip() for part in pair.partition("="))
        limits = RENDEZVOUS_LIMITS.get(key)
        if not has_value:
            raise UsageError(f"--rdzv-conf {text}: {pair} is not KEY=VALUE", hint="for example silence=8,port=29500")
        if limits is None:
            continue
        try:
            numbers[key] = float(value)
        except ValueError:
            numbers[key] = math.nan
        if not limits[0] <= numbers[key] <= limits[1]:
            least, most = limits
            span = f"from {least:g}" if most == math.inf else f"from {least:g} to {most:g}"
            raise UsageError(f"--rdzv-conf {pair} is not a number {span}", hint="elastic-fit --help explains it")
    return numbers


def check_ports(parsed: argparse.Namespace) -> None:
    """Whether what is to be a port can be one. Raises UsageError."""
    given = {"--master-port": parsed.master_port or 0}
    _, colon, port = parsed.rdzv_endpoint.rpartition(":")
    if colon and port.isdigit():  # a name without one is looked at where it is used
        given["--rdzv-endpoint"] = int(port)
    for flag, number in given.items():
        if not 0 <= number <= LAST_PORT:
            raise UsageError(f"{flag}: {number} is no port", hint=f"ports go from 1 to {LAST_PORT}; 0 is any free one")


def check_workers(parsed: argparse.Namespace) -> None:
    """What torchrun would only find out later, or not at all. Raises UsageError."""
    try:
        workers = determine_local_world_size(parsed.nproc_per_node)
    except ValueError as error:
        raise UsageError(f"--nproc-per-node {parsed.nproc_per_node}: {error}", hint="a number, auto or cpu") from None
    if workers < 1:
        raise UsageError(f"--nproc-per-node {parsed.nproc_per_node} is not above zero", hint="a number, auto or cpu")
    for flag in ("redirects", "tee"):
        try:
            Std.from_str(getattr(parsed, flag))
        except ValueError:
            hint = f"0 none, 1 stdout, 2 stderr, 3 both; or by local rank: --{flag} 0:3,1:1"
            raise UsageError(f"--{flag} {getattr(parsed, flag)} names no streams", hint=hint) from None
    if not re.fullmatch(r"\d+(,\d+)*|", parsed.local_ranks_filter):
        raise UsageError(
            f"--local-ranks-filter {parsed.local_ranks_filter} is not a list of ranks", hint="for example 0,1"
        )
    if parsed.event_log_handler not in event_log_handlers():
        raise UsageError(
            f"there is no event log handler {parsed.event_log_handler}",
            hint=f"one of {', '.join(event_log_handlers())}",
        )
