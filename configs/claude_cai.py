"""Constitutional AI's first stage: answers, criticised and revised by the principles of a constitution.

The policy answers a prompt. A critic says what is wrong with the answer by one of sixteen principles (data.PRINCIPLES)
and writes it anew; --rounds times, each time by a principle drawn for it. sft.py then learns the last revisions, and
claude_cai.sh goes on with labels by the same principles. Published: Bai et al. 2212.08073, sec. 3.

    python configs/claude_cai.py       out/sft answers, out/judge criticises -> out/revisions/revisions.jsonl
"""
import math
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs.judging import critique_prompt, revise_prompt
from data import (PRINCIPLES, Count, Families, Run, RunConfig, Temperature, UserError, fits, gold, guard,
                  mean, open_stream, parse)
from model import generate, load_model, seed_step, setup
from reward import write_records


@dataclass
class Config(RunConfig):
    """Answers, criticised and revised by a constitution (2212.08073, sec. 3); one JSON line a prompt, for sft.py."""
    out: str = "out/revisions"  # folder of the run; the demonstrations are in its revisions.jsonl
    policy: str = "out/sft"     # checkpoint that answers
    critic: str = "out/judge"   # language model that criticises and revises
    data: str = "toy"           # prompts: toy, or a file
    families: Families = "safe"  # of the toy world, comma-separated
    n: Count = 2000             # prompts
    rounds: Count = 1           # critiques and revisions of each answer, every time by another principle
    temperature: Temperature = 1.0  # of sampling
    max_new: Count = 80         # longest answer, tokens
    batch: Count = 128          # prompts at a time


def say(model, prompts, cfg):
    """A text for each prompt; None where it was not finished, or where the prompt leaves no room for one."""
    said, places, asked = [None] * len(prompts), [], []
    for place, prompt in enumerate(prompts):
        ids = model.tok.prompt(prompt)
        if len(ids) + cfg.max_new <= model.config.block_size:
            places.append(place)
            asked.append(ids)
    if asked:
        roll = generate(model, asked, cfg.max_new, temperature=cfg.temperature)
        for place, text, done in zip(places, roll.responses(), roll.finished.tolist()):
            said[place] = text.strip() if done else None
    return said


def ask(critic, view, drafts, cfg):
    """What the critic says of each draft. view: critique, or revise."""
    prompts = []
    for draft in drafts:
        question = draft.record["prompt"][-1]["content"]
        text = critique_prompt(question, draft.answer, draft.principle)
        if view == "revise":
            text = revise_prompt(question, draft.answer, draft.principle, draft.critique)
        prompts.append([dict(role="user", content=text)])
    return say(critic, prompts, cfg)


def improve(critic, drafts, rng, cfg):
    """One round: the drafts with their answers revised, without those whose critique or revision did not come."""
    for draft in drafts:
        draft.principle, draft.critique = rng.choice(PRINCIPLES), ""
    for draft, critique in zip(drafts, ask(critic, "critique", drafts, cfg)):
        draft.critique = critique or ""
    kept = []
    for draft, revision in zip(drafts, ask(critic, "revise", drafts, cfg)):
        if draft.critique and revision:
            draft.answer = revision
            draft.critiques.append(draft.critique)
            kept.append(draft)
    return kept


def report(drafts):
    """What share of the answers has changed, and how good they were and are, where that is known."""
    changed, before, after = [], [], []
    for draft in drafts:
        changed.append(float(draft.first != draft.answer))
        if "family" in draft.record:
            before.append(gold(draft.record, draft.first))
            after.append(gold(draft.record, draft.answer))
    return dict(changed=mean(changed), gold_before=mean(before), gold_after=mean(after))


def revise(cfg):
    """Answer, criticise by a principle, revise, and write revisions.jsonl: prompts with their last revision."""
    run = Run(cfg)
    if run.finished:
        return run.rows
    like = setup(cfg, run.tok)
    policy = load_model(cfg.policy, like, n_scores=0, maker="python sft.py")
    critic = load_model(cfg.critic, like, n_scores=0, maker="python sft.py")
    stream, _ = open_stream(cfg.data, "prompt", cfg.seed, cfg.families, n_held=0, skip_bad=cfg.skip_bad,
                            prepare=fits(policy.tok, policy.config.block_size, cfg.max_new))
    n = min(cfg.n, len(stream.items)) if stream.items else cfg.n  # a file's prompts once each
    made = []

    for step in run.progress(0, math.ceil(n / cfg.batch)):
        seed_step(cfg.seed, step)
        rng = random.Random(f"revise {cfg.seed} {step}")

        # 1. The policy answers.
        records, drafts = stream.batch(step, cfg.batch)[:n - step * cfg.batch], []
        answers = say(policy, [record["prompt"] for record in records], cfg)
        for record, text in zip(records, answers):
            if text:
                drafts.append(SimpleNamespace(record=record, first=text, answer=text, critiques=[]))

        # 2. The critic finds fault by a principle, and writes the answer anew.
        for _ in range(cfg.rounds):
            drafts = improve(critic, drafts, rng, cfg)

        # 3. Keep the last revisions, as demonstrations.
        for draft in drafts:
            made.append(draft.record | dict(first=draft.first, response=draft.answer, critiques=draft.critiques))
        run.log(step, ("revised",), revised=len(made), **report(drafts))

    if not made:
        raise UserError(f"{cfg.critic}: of {n} answers none was revised to its end")
    path = run.folder / "revisions.jsonl"
    write_records(path, made)
    print(f"{path}: {len(made)} of {n} answers revised")
    return run.finish(("changed", "gold_before", "gold_after"),
                      then=["sft.py", "--data", path, "--init", cfg.policy, "--out", f"{cfg.out}_sft"])


if __name__ == "__main__":
    guard(lambda: revise(parse(Config)))
