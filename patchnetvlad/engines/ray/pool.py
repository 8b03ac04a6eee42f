# SPDX-License-Identifier: MIT
"""A fault-tolerant pool of Ray workers."""

from __future__ import annotations

import logging
import re
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from patchnetvlad.engines.ray.connection import import_ray
from patchnetvlad.errors import ClusterError, DeviceError, PatchNetVLADError

logger = logging.getLogger(__name__)

TRIES = 3
"""Number of attempts at a task."""

CPUS_A_WORKER = 8
"""A node with more processors, and no GPU, has several workers."""

CRASHES = 25
"""Abort after this many consecutive worker crashes or failed items."""

TASKS_A_WORKER = 8
"""Tasks per worker that the work is divided into, so that all end at about the same time."""

_AHEAD = 2  # tasks that a worker has at a time, so that it never waits for the driver
_LOOK_SECONDS = 2.0  # between looks for new nodes
_SAY_SECONDS = 60.0


@dataclass(eq=False)
class Task:
    """A task for a worker.

    Attributes
    ----------
    name : str
        Shown in Ray's dashboard.
    items : sequence
        What it works on: if it kills its worker repeatedly, it is tried in halves, until the
        item that does so is found.
    tries : int
        Number of failures.
    """

    name: str
    items: Sequence[Any]
    tries: int = 0


@dataclass(frozen=True, eq=False)
class Failure:
    """The failure of a task that is given up.

    Attributes
    ----------
    error : Exception
        What was raised; Ray's own error after a crash.
    blamed : bool
        Whether the items are to blame: workers died of them, raised what nobody expects, or have
        too little memory. Otherwise the error says what is wrong with folders, or with features.
    """

    error: Exception
    blamed: bool

    @property
    def reason(self) -> str:
        """What happened, in one line."""
        return _reason(self.error)

    @property
    def died(self) -> bool:
        """True if a process died without raising."""
        return _is_death(self.error)


@dataclass(eq=False)
class Worker:
    """An actor and its tasks.

    Attributes
    ----------
    node : str
    known : dict
        What its tasks were about, for choosing the next one.
    """

    actor: Any
    node: str
    started: Any
    ready: bool = False
    tasks: deque[tuple[Task, Any]] = field(default_factory=deque)
    known: dict[Any, None] = field(default_factory=dict)


class Pool:
    """Workers on all nodes: one per GPU, or one per node without GPUs. A context manager.

    Nodes may come and go while tasks are worked on. A task that was lost with its worker is tried
    again.

    Parameters
    ----------
    kind : type
        Its methods are ``ready()`` and ``run(...)``; the constructor's first argument is the
        number of processors.
    arguments : tuple
        Further arguments of its constructor.
    on_gpus : bool
        Only nodes with GPUs have workers, one per GPU.
    """

    def __init__(self, kind: type, arguments: tuple[Any, ...], *, on_gpus: bool) -> None:
        self._ray = import_ray()
        self._kind = self._ray.remote(kind)
        self._arguments = arguments
        self._on_gpus = on_gpus
        self._workers: list[Worker] = []
        self._waiting: deque[Task] = deque()
        self._failed_starts: dict[str, int] = {}
        self._crashes = self._given_up = 0
        self._why = ""
        self._looked = self._said = float("-inf")

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *exception: object) -> None:
        for worker in self._workers:
            self._ray.kill(worker.actor)
        self._workers.clear()

    def add(self, task: Task) -> None:
        """Add a task at the end of the queue."""
        self._waiting.append(task)

    def run(
        self,
        arguments: Callable[[Task], tuple[Any, ...]],
        choose: Callable[[Worker, Sequence[Task]], int] = lambda *_: 0,
        make: Callable[[Sequence[Any]], Task] | None = None,
    ) -> Iterator[tuple[Task, Any]]:
        """Run all tasks, including those added meanwhile.

        Parameters
        ----------
        arguments : callable
            Returns the arguments of a worker's ``run`` for a task, at each attempt.
        choose : callable
            Chooses which of the waiting tasks a worker gets.
        make : callable, optional
            Makes a task of items, such as half of those of another.

        Yields
        ------
        task : Task
        result : object
            What ``run`` returned, or a :class:`Failure`; in any order.

        Raises
        ------
        ClusterError
            No node can start workers, or they keep dying.
        """
        while self._waiting or any(worker.tasks for worker in self._workers):
            self._look_for_nodes()
            self._hand_out(arguments, choose)
            pending: dict[Any, Worker] = {}
            for worker in self._workers:
                if not worker.ready:
                    pending[worker.started] = worker
                elif worker.tasks:
                    pending[worker.tasks[0][1]] = worker
            if not pending:
                time.sleep(0.2)
                continue
            done, _ = self._ray.wait(list(pending), timeout=1.0)
            for reference in done:
                worker = pending[reference]
                if worker.ready:
                    yield from self._finish(worker, make)
                else:
                    self._begin(worker)

    def _look_for_nodes(self) -> None:
        now = time.monotonic()
        if now - self._looked < _LOOK_SECONDS:
            return
        self._looked = now
        nodes = {n["NodeID"]: n["Resources"] for n in self._ray.nodes() if n["Alive"]}
        usable = 0
        for node, resources in nodes.items():
            count, cpus = self._share(resources)
            if self._failed_starts.get(node, 0) >= TRIES:
                continue
            usable += count
            there = sum(worker.node == node for worker in self._workers)
            for _ in range(count - there):
                self._workers.append(self._start(node, cpus))
        if not usable and not self._workers:
            if self._why:
                raise ClusterError(self._why)
            what = "GPU" if self._on_gpus else "CPU"
            raise ClusterError(f"the cluster has no node with a {what} any more; start one")
        if not any(worker.ready for worker in self._workers):
            if now - self._said > _SAY_SECONDS and self._said > 0:
                logger.info("waiting for workers; are the nodes busy with other work?")
            self._said = now if now - self._said > _SAY_SECONDS else self._said

    def _share(self, resources: dict[str, float]) -> tuple[int, float]:
        """Return how many workers a node gets, and the processors of each."""
        cpus = resources.get("CPU", 0)
        if self._on_gpus:
            count = int(resources.get("GPU", 0))
            return count, cpus / max(count, 1)
        if cpus < 1:
            return (1, cpus) if cpus > 0 else (0, 0)
        count = max(1, int(cpus) // CPUS_A_WORKER)
        return count, int(cpus) // count

    def _start(self, node: str, cpus: float) -> Worker:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        actor = self._kind.options(
            # Beside a GPU, processors are for the tasks that decode images.
            num_cpus=0 if self._on_gpus else cpus,
            num_gpus=int(self._on_gpus),
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
        ).remote(max(1, int(cpus)), *self._arguments)
        return Worker(actor, node, actor.ready.options(name="load the model").remote())

    def _begin(self, worker: Worker) -> None:
        """Register a worker that has started, or failed to."""
        try:
            self._ray.get(worker.started)
            worker.ready = True
            self._failed_starts.pop(worker.node, None)
        except self._ray.exceptions.RayError as error:
            self._remove(worker)
            self._failed_starts[worker.node] = self._failed_starts.get(worker.node, 0) + 1
            why = f"a worker cannot start on node {worker.node[:8]}: {_reason(error)}"
            if not self._why or "creation task" in str(error):  # a dead worker gives no reason
                self._why = why
            logger.warning("%s", why)

    def _hand_out(
        self,
        arguments: Callable[[Task], tuple[Any, ...]],
        choose: Callable[[Worker, Sequence[Task]], int],
    ) -> None:
        ready = [worker for worker in self._workers if worker.ready]
        for depth in range(_AHEAD):
            for worker in ready:
                # Near the end, no worker has a second task while others have none.
                if len(worker.tasks) > depth or not self._waiting:
                    continue
                if depth and len(self._waiting) < len(ready):
                    return
                i = choose(worker, self._waiting)
                task = self._waiting[i]
                del self._waiting[i]
                run = worker.actor.run.options(name=task.name)
                worker.tasks.append((task, run.remote(*arguments(task))))

    def _finish(
        self, worker: Worker, make: Callable[[Sequence[Any]], Task] | None
    ) -> Iterator[tuple[Task, Any]]:
        """Handle the outcome of a worker's first task."""
        exceptions = self._ray.exceptions
        task, reference = worker.tasks[0]
        try:
            result = self._ray.get(reference)
        except exceptions.RayTaskError as error:
            if isinstance(error.cause, PatchNetVLADError):
                worker.tasks.popleft()
                blamed = isinstance(error.cause, DeviceError)
                yield from self._again(task, Failure(error.cause, blamed), make)
            elif _is_death(error.cause):  # of another task's process
                worker.tasks.popleft()
                yield from self._again(task, Failure(error.cause, blamed=True), make)
            else:  # which may have left a process, or its GPU, in any state
                yield from self._replace(worker, error.cause, make)
        except exceptions.RayError as error:
            yield from self._replace(worker, error, make)
        else:
            worker.tasks.popleft()
            self._crashes = self._given_up = 0
            yield task, result

    def _replace(
        self, worker: Worker, error: Exception, make: Callable[[Sequence[Any]], Task] | None
    ) -> Iterator[tuple[Task, Any]]:
        """Drop a worker whose first task was too much for it."""
        task, _ = worker.tasks.popleft()
        lost = [other for other, _ in worker.tasks]
        self._remove(worker)
        self._waiting.extendleft(reversed(lost))
        self._crashes += 1
        if self._crashes >= CRASHES:
            raise ClusterError(
                f"{self._crashes} workers died one after the other, the last with "
                f"{task.name!r} ({_reason(error)}); are the nodes too small for memory_mb?"
            ) from None
        nodes = {node["NodeID"] for node in self._ray.nodes() if node["Alive"]}
        what = "died" if _is_death(error) else "failed"
        what = what if worker.node in nodes else "was lost with its node"
        logger.warning("a worker %s (%s); continuing with %r", what, _reason(error), task.name)
        if worker.node in nodes:
            yield from self._again(task, Failure(error, blamed=True), make)
        else:
            self._waiting.appendleft(task)  # not its fault

    def _again(
        self, task: Task, failure: Failure, make: Callable[[Sequence[Any]], Task] | None
    ) -> Iterator[tuple[Task, Any]]:
        task.tries += 1
        if failure.blamed and make is not None and len(task.items) > 1 and task.tries >= 2:
            middle = len(task.items) // 2
            for items in (task.items[middle:], task.items[:middle]):
                part = make(items)
                part.tries = task.tries - 1
                self._waiting.appendleft(part)
        elif task.tries < TRIES:
            self._waiting.appendleft(task)
        else:
            self._crashes = 0
            self._given_up += failure.blamed
            if self._given_up >= CRASHES:
                raise ClusterError(
                    f"{self._given_up} tasks failed one after the other, the last {task.name!r} "
                    f"({failure.reason}); are the nodes too small for memory_mb?"
                )
            yield task, failure

    def _remove(self, worker: Worker) -> None:
        self._workers.remove(worker)
        self._ray.kill(worker.actor)  # where it is unreachable only
        self._looked = float("-inf")


def task_size(count: int, most: int, on_gpus: bool) -> float:
    """Return how many items a task should have, at most ``most``.

    Workers are not known before they start; on CPUs there are about half as many as processors.
    """
    resources = import_ray().cluster_resources()
    workers = resources.get("GPU", 0) if on_gpus else resources.get("CPU", 1) / 2
    return min(most, count / (TASKS_A_WORKER * max(1, workers)))


def _is_death(error: BaseException) -> bool:
    """Return True for an error of Ray itself, which also wraps what cannot be pickled."""
    exceptions = import_ray().exceptions
    told = getattr(exceptions, "UnserializableException", exceptions.RaySystemError)
    return (
        isinstance(error, exceptions.RayError)
        and type(error) is not exceptions.RayError
        and not isinstance(error, told)
    )


def _reason(error: BaseException) -> str:
    """Return the line of an error that says why; Ray's are long and may contain tracebacks."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    if not isinstance(error, (PatchNetVLADError, import_ray().exceptions.RayError)):
        text = f"{type(error).__name__}: {text}"
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [type(error).__name__]
    raised = any("Traceback" in line or "ray::" in line for line in lines)
    return re.sub(r"^patchnetvlad\.errors\.\w+: ", "", lines[-1 if raised else 0])[:300]
