"""The built-in data: reproducible, in the guide's formats, and held-out sets that are disjoint."""

import re
import subprocess
import sys

import pytest

from minimind.config import data_samples
from minimind.data import check_conversation, check_text, read_jsonl

sys.path.insert(0, str(data_samples()))
import chats
import world


def rows(name, check=lambda row: None):
    return read_jsonl(data_samples(name), check)


@pytest.fixture(scope="module")
def train_texts():
    return [row["text"] for row in rows("pretrain.jsonl", check_text)]


@pytest.fixture(scope="module")
def chat_texts():
    return [
        m["content"] for row in rows("sft.jsonl", check_conversation) for m in row["conversations"]
    ]


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    subprocess.run([sys.executable, data_samples("generate.py"), "--out", tmp_path], check=True)
    made = sorted(p.name for p in tmp_path.iterdir())
    assert made == sorted(
        p.name for p in data_samples().iterdir() if p.suffix in (".jsonl", ".json")
    )
    for name in made:
        assert (tmp_path / name).read_bytes() == data_samples(name).read_bytes(), name


def test_it_is_small():
    assert sum(p.stat().st_size for p in data_samples().iterdir() if p.is_file()) <= 12e6


def test_no_heldout_document_is_trained_on(train_texts):
    heldout = [row["text"] for row in rows("pretrain_heldout.jsonl", check_text)]
    assert len(heldout) >= 500 and not set(heldout) & set(train_texts)
    assert len(set(train_texts)) == len(train_texts)


def test_most_heldout_story_sentences_are_new(train_texts):
    known = {sentence for text in train_texts for sentence in text.split(". ")}
    told = [row["text"] for row in rows("pretrain_heldout.jsonl") if row["kind"] == "story"]
    sentences = [sentence for text in told for sentence in text.split(". ")]
    assert sum(sentence not in known for sentence in sentences) / len(sentences) >= 0.9


@pytest.mark.parametrize(
    "entities", [world.PEOPLE, world.PLACES, world.CHINESE], ids=["people", "places", "chinese"]
)
def test_the_last_quarter_is_never_a_subject_of_chat(entities, chat_texts):
    """A reserved town may still be somebody's home in an answer; nothing is asked or said about it."""
    for entity in world.never_in_chat(entities):
        about = [
            t
            for t in chat_texts
            if re.search(rf"of {entity.name}\b|^{entity.name}|关于 {entity.name} ", t)
        ]
        assert not about


def test_reserved_questions_are_never_asked(chat_texts):
    reserved = [
        (e.name, a) for e in world.in_chat(world.PEOPLE) for a in e.facts if chats.never_asked(e, a)
    ]
    assert len(reserved) >= 40
    said = set(re.findall(r"(job|town|pet|food|hobby) of (\w+)", "\n".join(chat_texts)))
    assert said and not {(attribute, name) for name, attribute in reserved} & said


def test_reserved_pairs_of_numbers_stand_nowhere(train_texts, chat_texts):
    text = "\n".join(train_texts + chat_texts)
    pairs = re.findall(r"(?<!\w)(\d+)[+-](\d+)(?=[=.? ])", text) + re.findall(r"(\d+)加(\d+)", text)
    assert len(set(pairs)) > 150
    assert not [p for p in pairs if world.sum_is_held_out(int(p[0]), int(p[1]))]
    asked = [
        row["conversations"][0]["content"]
        for row in rows("sft_heldout.jsonl")
        if row["kind"] == "arithmetic"
    ]
    numbers = [re.search(r"(\d+)[+-](\d+)", question).groups() for question in asked]
    assert numbers and all(world.sum_is_held_out(int(a), int(b)) for a, b in numbers)


def test_heldout_lists_and_chains_stand_nowhere(train_texts, chat_texts):
    lists = set(re.findall(r"List: ([A-Za-z ]+)\.", "\n".join(train_texts + chat_texts)))
    assert len(lists) > 1000 and not any(world.held_out("list " + items, 10) for items in lists)
    problems = set(re.findall(r"Chain: (\S+)", "\n".join(train_texts)))
    assert len(problems) > 500 and not any(world.held_out("chain " + p, 10) for p in problems)


def test_heldout_chats_are_new_in_question_and_of_every_kind(chat_texts):
    heldout = rows("sft_heldout.jsonl", check_conversation)
    questions = [row["conversations"][0]["content"] for row in heldout]
    assert not set(questions) & set(chat_texts)
    kinds = [row["kind"] for row in heldout]
    assert {k: kinds.count(k) >= 140 for k in set(kinds)} == dict.fromkeys(
        ["person", "person_unseen", "place", "arithmetic", "list", "chinese"], True
    )


def test_nothing_contradicts_the_world(train_texts, chat_texts):
    facts = {(e.name, a): v for e in world.PEOPLE + world.PLACES for a, v in e.facts.items()}
    said = re.findall(r"The (\w+) of (\w+) is (\w+)", "\n".join(train_texts + chat_texts))
    known = [
        (name, attribute, value) for attribute, name, value in said if (name, attribute) in facts
    ]
    assert len(known) > 10000 and all(
        facts[name, attribute] == value for name, attribute, value in known
    )


def test_every_fact_of_the_unseen_is_in_pretraining_text(train_texts):
    text = "\n".join(train_texts)
    for entity in world.never_in_chat(world.PEOPLE) + world.never_in_chat(world.PLACES):
        for attribute, value in entity.facts.items():
            assert f"The {attribute} of {entity.name} is {value}." in text


def test_completions_are_the_facts(train_texts):
    text = "\n".join(train_texts)
    prompts = rows("facts_heldout.jsonl")
    assert len(prompts) >= 300 and all(row["prompt"] + row["answer"] in text for row in prompts)


def questions_and_answers(rows):
    return [tuple(m["content"] for m in row["conversations"][-2:]) for row in rows]


def asked_about(text):
    return set(re.findall(r"(job|town|pet|food|hobby) of (\w+)", text))


@pytest.mark.parametrize("name", ["lora", "dpo"])
def test_heldout_manners_ask_for_facts_that_no_training_row_asks_for(name, chat_texts):
    trained = data_samples(f"{name}.jsonl").read_text() + "\n".join(chat_texts)
    heldout = rows(f"{name}_heldout.jsonl")
    asked = asked_about(data_samples(f"{name}_heldout.jsonl").read_text())
    assert len(heldout) == 300 and len(asked) > 100 and not asked & asked_about(trained)


def test_the_two_sides_of_a_preference_tell_the_same_fact():
    for row in rows("dpo.jsonl") + rows("dpo_heldout.jsonl"):
        sides = [row[side] for side in ("chosen", "rejected")]
        chosen, rejected = [s if isinstance(s, str) else s[-1]["content"] for s in sides]
        assert chosen != rejected and chosen.split(". ")[0] == rejected.split(". ")[0].rstrip(".")


@pytest.mark.parametrize("name", ["reason", "grpo"])
def test_heldout_problems_are_in_no_training_file(name):
    trained = {
        problem
        for file in ("pretrain", "reason", "grpo")
        for problem in re.findall(r"Chain: (\S+)", data_samples(f"{file}.jsonl").read_text())
    }
    heldout = rows(f"{name}_heldout.jsonl")
    problems = {
        re.search(r"Chain: (\S+)", row["conversations"][0]["content"]).group(1) for row in heldout
    }
    assert len(heldout) >= 600 and len(problems) > 500 and not problems & trained


def right_thought(problem):
    """Every step and the result, worked out without the generator's own functions."""
    value, steps = 0, ""
    for letter, sign, operand in re.findall(r"([a-i])([+*-]?)(\d);", problem):
        value = eval(f"{value}{sign or '+'}{operand}") % 10
        steps += f"{letter}{sign}{operand}={value};" if sign else f"a{value};"
    return f"<think>{steps}</think><answer>{value}</answer>", str(value)


@pytest.mark.parametrize("name", ["reason_heldout", "grpo", "grpo_heldout"])
def test_what_is_measured_and_rewarded_is_right(name):
    for row in rows(f"{name}.jsonl", check_conversation):
        question, said = (m["content"] for m in row["conversations"])
        thought, result = right_thought(question)
        assert row.get("answer", result) == result and said in ("", thought)


def test_the_teacher_is_careful_up_to_five_operations_and_careless_beyond():
    right = {}
    for row in rows("reason.jsonl", check_conversation):
        question, said = (m["content"] for m in row["conversations"])
        right.setdefault(row["kind"], []).append(said == right_thought(question)[0])
    share = {kind: sum(found) / len(found) for kind, found in right.items()}
    assert [share[kind] for kind in "2345"] == [1.0] * 4
    assert 0.65 < share["6"] < 0.8 and 0.25 < share["7"] < 0.45
