"""What all tests share: one thread a process, and as many processes as there are cores.

pytest alone leaves all cores but one idle. Here the files of a run are shared out to forked processes, one file at a
time, and their reports come back through pipes. With one core, with -s or --pdb, under `pytest -n`, and where a process
cannot be forked, everything runs as usual.
"""
import json
import multiprocessing
import os
from itertools import groupby
from multiprocessing.connection import wait

import pytest
import torch

from policies import random_policy, save

torch.set_num_threads(1)  # of models this small, threads only make the sums come out in another order


@pytest.fixture
def float64():
    """Everything in float64: what is left of a difference is no rounding."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A random policy that ends about one response in three early, and never samples padding."""
    return save(tmp_path_factory.mktemp("tiny"), random_policy())


@pytest.fixture(scope="session")
def judge(tmp_path_factory):
    """A random reward model."""
    return save(tmp_path_factory.mktemp("judge"), random_policy(5, n_scores=1))


@pytest.fixture(scope="session")
def prompts(tmp_path_factory):
    """A file of prompts of several lengths; half of them hold an earlier turn, and so an end token. A few are tasks of
    the toy world, whose truth is known."""
    path, rows = tmp_path_factory.mktemp("prompts") / "prompts.jsonl", []
    for i in range(40):
        before = [dict(role="user", content="Hm"), dict(role="assistant", content="Yes")] * (i % 2)
        words = ["The red cups", "Describe", "Tell me about the big old van", "a", "Go on!"][i % 5]
        rows.append(dict(prompt=before + [dict(role="user", content=f"{i} {words}")]))
    for i in (*range(0, 40, 3), 19):
        rows[i] |= dict(family="write", key=f"old car {i}", thing="car", category="vehicles")
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def pytest_runtestloop(session):
    config = session.config
    files = [list(items) for _, items in groupby(session.items, key=lambda item: item.path)]
    files.sort(key=len, reverse=True)  # a long file that came last would run alone
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    processes = min(cores, len(files))
    alone = config.option.usepdb or config.option.capture == "no" or config.option.collectonly
    if processes < 2 or alone or config.getoption("numprocesses", None) or hasattr(config, "workerinput"):
        return None

    fork = multiprocessing.get_context("fork")
    queue, end = os.pipe()  # of the files' numbers: who is free reads the next byte
    os.write(end, bytes(range(len(files))))
    os.close(end)
    workers = {}
    for _ in range(processes):
        reports, mine = fork.Pipe(duplex=False)
        workers[reports] = fork.Process(target=run_files, args=(config, files, queue, mine))
        workers[reports].start()
        mine.close()
    try:
        collect(session, workers)
    finally:
        for worker in workers.values():
            worker.terminate()
    return True


def run_files(config, files, queue, reports):
    """A process: run the tests of one file after the other, and send what pytest would have printed."""
    class Sender:
        def pytest_runtest_logreport(self, report):
            reports.send(config.hook.pytest_report_to_serializable(config=config, report=report))

    config.pluginmanager.unregister(name="terminalreporter")
    config.pluginmanager.register(Sender())
    while number := os.read(queue, 1):
        items = files[number[0]]
        for item, following in zip(items, items[1:] + [None]):
            config.hook.pytest_runtest_protocol(item=item, nextitem=following)
    reports.send("done")


def collect(session, workers):
    """Pass the reports on to pytest until all processes are done."""
    hook, left = session.config.hook, set(workers)
    while left:
        for reports in wait(left):
            try:
                said = reports.recv()
            except EOFError:
                raise pytest.UsageError("a process of the tests died; run its file alone: pytest tests/test_x.py")
            if said == "done":
                left.remove(reports)
                continue
            report = hook.pytest_report_from_serializable(config=session.config, data=said)
            hook.pytest_runtest_logreport(report=report)
            if session.shouldfail:
                raise session.Failed(session.shouldfail)
