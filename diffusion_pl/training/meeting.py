"""How a rank was started, and where the ranks of a run meet; no lightning.

A shell inside an allocation, a batch script without srun or an earlier torchrun leave variables
that look like those of a rank. Each such case is an error of one line before any work, since the
run would otherwise wait for ranks that nobody started.
"""

from __future__ import annotations

import errno
import faulthandler
import os
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

from diffusion_pl.errors import UserError

Starter = Literal["itself", "torchrun", "srun", "another"]

# Set by srun for each task, but not in a batch script or the shell of an allocation.
_OF_A_TASK = ("SLURM_STEP_ID", "SLURM_STEPID", "SLURM_STEP_NUM_TASKS", "SLURM_SRUN_COMM_HOST")
# Names of interactive jobs, in which processes start as on any other machine.
_INTERACTIVE = ("bash", "interactive")
# Other launchers that Lightning knows.
_OTHERS = ("KUBERNETES_PORT", "LSB_JOBID", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")

_LOWEST, _PORTS = 15_000, 17_000  # below the ephemeral ports
_STRIDE = 7919  # a prime: neighbouring jobs, and steps of one job, get different ports


class RendezvousError(RuntimeError):
    """The ranks of a run did not meet."""


def starter(environment: Mapping[str, str], nodes: int, devices: int) -> Starter:
    """How this process was started; checks that the number of ranks is the run's.

    Args:
        environment: of the process.
        nodes: machines of the run.
        devices: per machine, hence processes.

    Returns:
        "itself": by hand, so it starts the ranks of its machine.

    Raises:
        UserError: variables of ranks are left over, or state another number of ranks.
    """
    world = nodes * devices
    wanted = f"trainer.nodes x trainer.devices is {world}"
    if "TORCHELASTIC_RUN_ID" in environment:
        if _number(environment, "WORLD_SIZE", world) != world:
            raise UserError(
                f"WORLD_SIZE: torchrun started {environment['WORLD_SIZE']} processes, and "
                f"{wanted}; make them the same"
            )
        return "torchrun"
    if any(name in environment for name in _OTHERS):
        return "another"
    by_slurm = _by_slurm(environment, nodes, devices, wanted)
    if by_slurm is not None:
        return by_slurm
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE"):
        most = {"LOCAL_RANK": devices - 1, "RANK": world - 1, "WORLD_SIZE": world}[name]
        number = _number(environment, name, most)
        if number > most or (name == "WORLD_SIZE" and number != world):
            raise UserError(
                f"{name}: is {number}, and {wanted}; where torchrun or another program has left it "
                f"over: unset RANK LOCAL_RANK WORLD_SIZE NODE_RANK MASTER_ADDR MASTER_PORT"
            )
    if "RANK" in environment and "LOCAL_RANK" not in environment and world > 1:
        raise UserError(
            "RANK: is set and LOCAL_RANK is not, so that this process is no whole rank; unset "
            "RANK, or set both"
        )
    return "itself"


def place_of(environment: Mapping[str, str]) -> tuple[int, int, int]:
    """Rank, number of ranks and rank on its machine of this process; (0, 1, 0) by hand.

    Args:
        environment: of the process: RANK and WORLD_SIZE, as torchrun sets them, else those of a
            task of srun. A batch script and the shell of an allocation are no tasks.

    Raises:
        UserError: variables that are no ranks.
    """
    task = any(environment.get(name) for name in _OF_A_TASK)
    if {"RANK", "WORLD_SIZE"} <= environment.keys():
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    elif "SLURM_PROCID" in environment and task:
        steps = "SLURM_STEP_NUM_TASKS"
        names = ("SLURM_PROCID", steps if steps in environment else "SLURM_NTASKS", "SLURM_LOCALID")
    else:
        return 0, 1, 0
    rank, world = _number(environment, names[0], 0), _number(environment, names[1], 1)
    if rank >= world:
        raise UserError(f"{names[0]}: is {rank}, and {names[1]} {world}; unset or correct them")
    return rank, world, _number(environment, names[2], rank)


def _by_slurm(
    environment: Mapping[str, str], nodes: int, devices: int, wanted: str
) -> Starter | None:
    """ "srun" if srun started this process; None outside SLURM and in interactive jobs."""
    if "SLURM_NTASKS" not in environment:
        return None
    world = nodes * devices
    task = _number(environment, "SLURM_PROCID", 0) > 0
    if task or any(environment.get(name) for name in _OF_A_TASK):
        tasks = environment.get("SLURM_STEP_NUM_TASKS") or environment["SLURM_NTASKS"]
        if tasks == str(world):
            if world > 1 and "SLURM_NTASKS_PER_NODE" not in environment:
                raise UserError(
                    f"SLURM_NTASKS_PER_NODE: is not set; start with srun --nodes={nodes} "
                    f"--ntasks-per-node={devices}, not with --ntasks"
                )
            return "srun"
        if environment.get("SLURM_JOB_NAME") not in _INTERACTIVE:
            raise UserError(
                f"SLURM_NTASKS: srun started {tasks} tasks, and {wanted}; start it with srun "
                f"--nodes={nodes} --ntasks-per-node={devices}, or train with trainer.devices="
                f"{tasks}"
            )
        return None
    if world == 1 or (environment.get("SLURM_JOB_NAME") in _INTERACTIVE and nodes == 1):
        return None
    here = (
        f", or have {devices} processes start here: SLURM_JOB_NAME=interactive make train ..."
        if nodes == 1
        else ""
    )
    raise UserError(
        f"SLURM_JOB_ID: this is inside a job, {wanted}, and srun has not started this process; "
        f"start it with srun --nodes={nodes} --ntasks-per-node={devices}{here}"
    )


def _number(environment: Mapping[str, str], name: str, absent: int) -> int:
    """A variable's whole number; `absent` if it is not set."""
    value = environment.get(name)
    if value is None:
        return absent
    if not value.isdecimal():
        raise UserError(f"{name}: must be a whole number (got {value!r}); unset it")
    return int(value)


def port_of(environment: Mapping[str, str]) -> int | None:
    """Port at which ranks started by srun meet: MASTER_PORT, else derived from job and step.

    The last digits of the job's number alone may be the same for two jobs on a node. None if
    neither is known.

    Raises:
        UserError: MASTER_PORT is not a port.
    """
    given = environment.get("MASTER_PORT")
    if given is not None:
        port = _number(environment, "MASTER_PORT", 0)
        if not 0 < port < 65_536:
            raise UserError(f"MASTER_PORT: must be 1 to 65535 (got {given}); unset it")
        return port
    if "SLURM_JOB_ID" not in environment:
        return None
    job, step = (_number(environment, name, 0) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    return _LOWEST + (job + 31 * step) * _STRIDE % _PORTS


def check_address(environment: Mapping[str, str], by: Starter, leads: bool, nodes: int) -> None:
    """Check the address at which several ranks are to meet.

    Args:
        environment: of the process.
        by: how it was started.
        leads: whether it is rank 0, which listens.
        nodes: machines of the run.

    Raises:
        UserError: an invalid or busy port, an unknown host, or one that is another machine.
    """
    address = environment.get("MASTER_ADDR")
    if address:
        try:
            socket.getaddrinfo(address, None)
        except (OSError, UnicodeError) as error:
            raise UserError(
                f"MASTER_ADDR: {address!r} is no machine that is known here; set or unset it"
            ) from error
    port = port_of(environment) if by == "srun" or "MASTER_PORT" in environment else None
    if not leads or by == "another" or environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return
    if port:
        _see_free("", port)
    if address and by == "itself" and nodes == 1:
        _see_free(address, 0)


def _see_free(address: str, port: int) -> None:
    """Check that this machine can listen at `address` and `port`."""
    if address:
        kind, _, _, _, place = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
    else:
        kind, place = socket.AF_INET, ("", port)
    with socket.socket(kind, socket.SOCK_STREAM) as probe:
        # As torch: a port whose last connection has just ended is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(place)
            if port:
                probe.listen(1)
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                raise UserError(
                    f"MASTER_ADDR: {address} is not this machine, and the run is on one; unset it"
                ) from error
            raise UserError(
                f"MASTER_PORT: the ranks cannot meet at port {port} ({error.strerror}); unset "
                "MASTER_PORT or set one that is free"
            ) from error


@contextmanager
def time_limit(seconds: float, place: str) -> Iterator[None]:
    """End the process if the ranks have not met in time.

    torch limits single waits only, and not all: a rank that finds another service at the port
    waits for its answer.

    Args:
        seconds: limit.
        place: address, for the message.

    Raises:
        RendezvousError: torch gave up by itself.
    """
    text = (
        f"{place}: the ranks have not met in {seconds:g} s (trainer.start_timeout); see that all "
        "of them run, and that nothing else is at this port"
    )

    def end() -> None:
        os.write(2, f"failed: {text}\n".encode())
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    # In case a library holds the interpreter lock while it waits.
    faulthandler.dump_traceback_later(seconds + 10, exit=True, file=2)
    try:
        yield
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise RendezvousError(
            f"{place}: the ranks do not meet ({reason}); see that all of them run"
        ) from (error)
    finally:
        timer.cancel()
        faulthandler.cancel_dump_traceback_later()
