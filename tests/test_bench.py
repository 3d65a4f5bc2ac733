"""bench.py: that it measures what it says it does. How long anything takes is nowhere asserted."""
import json
import os
import select
import sys

import pytest

import bench
import data
import model
import runs

SMALL = ["--device", "cpu", "--threads", "1", "--repeats", "1", "--prompt", "16", "--new", "8", "--length", "32"]


def lines(monkeypatch, capsys, *argv):
    """What the program prints -> its lines of JSON, and the others."""
    monkeypatch.setattr(sys, "argv", ["bench.py", *argv])
    bench.main()
    printed = capsys.readouterr().out.splitlines()
    found = [json.loads(line) for line in printed if line.startswith("{")]
    return found, [line for line in printed if not line.startswith("{")]


@pytest.mark.parametrize("item, tokens, passes", [
    ("generate", 4 * 8, 0), ("sft", 4 * 32, 1), ("reward", 2 * 4 * 24, 0), ("dpo", 2 * 4 * 24, 2),
    ("dpo_ahead", 2 * 4 * 24, 1), ("orpo", 2 * 4 * 24, 1), ("grpo", 4 * 8 * 8, 1), ("ppo", 4 * 8, 2 + 3)])
def test_an_item_works_on_as_many_tokens_as_it_says(item, tokens, passes, monkeypatch, capsys):
    """passes: how often a step asks how likely its tokens are, at all of them that count."""
    steps, asked, real = [], [], model.token_logprobs

    def logprobs(net, tokens, mask, *args, **kwargs):
        asked.append(int((mask > 0).sum()))
        return real(net, tokens, mask, *args, **kwargs)

    def log(self, step, *args, **kwargs):
        steps.append(sum(asked))
        asked.clear()
    monkeypatch.setattr(data.Run, "log", log)
    runs.patch(monkeypatch, "token_logprobs", logprobs)
    (line,), _ = lines(monkeypatch, capsys, item, "--batch", "4", "--epochs", "3", *SMALL)
    assert line["tokens"] == tokens and line["what"] == item
    assert 0 < line["seconds"] and 0 < line["cpu_seconds"] and 0 < line["peak_share"]
    if item != "generate":  # the warm-up, and the one that is timed; the last, which evaluates, is never done
        counted = dict(sft=4 * 31, grpo=4 * 8 * 8, ppo=4 * 8).get(item, 2 * 4 * 8)
        assert len(steps) == 2 and steps[1] == counted * passes


def test_ragged_rows_end_at_two_fifths_on_average(monkeypatch, capsys):
    (line,), _ = lines(monkeypatch, capsys, "ragged", "--batch", "64", *SMALL, "--new", "64")
    assert .3 < line["tokens"] / (64 * 64) < .5


def test_on_a_card_what_fails_does_not_keep_the_others_from_it(monkeypatch, capsys):
    """A target's size does not fit, another's command fails, the last is measured; all are in the table."""
    wrong = bench.TARGETS[0]._replace(options=dict(prompt=10 ** 6))
    failing = bench.TARGETS[-1]._replace(item="false")
    right = next(target for target in bench.TARGETS if target.name == "tiny")
    monkeypatch.setattr(bench, "TARGETS", [wrong._replace(name="a"), failing._replace(name="b"), right])
    monkeypatch.setattr(bench, "SMALLEST", dict(batch=2, new=8, repeats=1))
    found, table = lines(monkeypatch, capsys, "gpu", "--smallest", *SMALL)
    assert [line["target"] for line in found] == ["a", "b", "tiny"]
    assert "error" in found[0] and "exit code 1" in found[1]["error"] and found[2]["tokens"] == 16
    assert len(table) == 2 + 3 and f"{found[2]['seconds']:.3g} s" in table[-1] and right.aim in table[-1]
    found, table = lines(monkeypatch, capsys, "gpu", "--minutes", "0", "--only", "tiny", *SMALL)
    assert len(found) == 1 and "TimeoutError" in found[0]["error"] and len(table) == 3


def test_a_command_that_takes_too_long_is_ended_with_all_that_it_started(monkeypatch, capsys, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    endless = bench.TARGETS[-1]._replace(item=f"sleep 100 > {pipe} & wait; :")
    monkeypatch.setattr(bench, "TARGETS", [endless])
    found, _ = lines(monkeypatch, capsys, "gpu", "--minutes", ".02")
    assert "TimeoutExpired" in found[0]["error"]
    ended, _, _ = select.select([reader], [], [], 60)  # once nobody is left who could write into the pipe
    assert ended


def test_beside_peers_the_ratio_is_to_the_better_of_their_precisions(monkeypatch, capsys, tmp_path):
    peers = tmp_path / "peers.py"
    peers.write_text("import json, sys\nprint({'train_loss': 1.0})\n"
                     "seconds = dict(fp32=6.0, bf16=3.0)[sys.argv[-1]]\n"
                     "print(json.dumps(dict(cpu_seconds=seconds, peak_rss_mb=100 * seconds)))\n")
    seen = iter([1.0, 1.5, 7.0])

    def last_line(command, real=bench.last_line):
        return real(command) if str(peers) in command else dict(cpu_seconds=next(seen), peak_memory_mb=150)
    monkeypatch.setattr(bench, "last_line", last_line)
    _, table = lines(monkeypatch, capsys, "peers", "--only", "sft", "--rounds", "3", "--peers", str(peers),
                     "--peers_python", sys.executable)
    assert table[-1] == "| sft | 6 | 3 | 1.5 | 2.00 | 300 | 150 | 0.50 |"
