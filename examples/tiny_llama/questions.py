"""Questions and answers about the valley: chat rows for fine-tuning, and the two evaluation tasks.

A fact (entity, relation) belongs to one of two halves. Facts of the first half are asked in
fine-tuning, in the training phrasings. Facts of the second half are never asked in fine-tuning:
the model knows them from the documents alone. The tasks ask about both, always in a phrasing or
about a fact that fine-tuning has not seen.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from random import Random

from documents import split_of
from journeys import QUESTIONS, draw_journey, tell, words
from phrases import BY_KIND, Relation
from sentences import fill, sentence
from world import Entity, World

Message = dict[str, str]
Row = dict[str, object]

BRIEF = ("Answer briefly.", "Answer in a few words.", "Give only the answer.")
PASSAGE_LEADS = ("Read this and answer the question.", "Here is a story.", "A passage:", "")
SYSTEM = (
    "You know the valley well.",
    "You answer questions about the valley.",
    "Be short and exact.",
)


def asked_in_training(entity: Entity, relation: Relation) -> bool:
    """Whether fine-tuning may ask for this fact: true for 70% of the facts."""
    return Random(f"half:{entity.name}:{relation.attribute}").random() < 0.7


def _facts(world: World, trained: bool) -> list[tuple[Entity, Relation]]:
    return [
        (entity, relation)
        for entity in world.entities
        for relation in BY_KIND[entity.kind]
        if asked_in_training(entity, relation) == trained
    ]


def _single(rng: Random, entity: Entity, relation: Relation) -> list[Message]:
    """One question; the answer is bare if the prompt asks for that, else a sentence."""
    question = fill(rng.choice(relation.questions), entity, relation)
    if rng.random() < 0.65:
        return _turn(f"{question} {rng.choice(BRIEF)}", entity.facts[relation.attribute])
    return _turn(question, sentence(fill(relation.clauses[0], entity, relation)))


def _turn(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _echo(rng: Random, world: World) -> list[Message]:
    """A request to repeat a few words: it teaches that an answer can be copied from the prompt."""
    values = [value for e in rng.sample(world.entities, 3) for value in e.facts.values()]
    text = " ".join(rng.sample(values, rng.randint(1, 3)))
    return _turn(rng.choice(["Repeat: {v}", "Say this again: {v}"]).format(v=text), text)


def _double(rng: Random, facts: list[tuple[Entity, Relation]]) -> list[Message]:
    """Two turns about two facts."""
    return [message for fact in rng.sample(facts, 2) for message in _single(rng, *fact)]


def _several(rng: Random, world: World, form: str) -> list[Message]:
    """Three attributes of one entity, as a JSON object or as a list."""
    entity = rng.choice(world.entities)
    known = [r for r in BY_KIND[entity.kind] if asked_in_training(entity, r)]
    chosen = rng.sample(known, min(len(known), rng.randint(2, 3)))
    if len(chosen) < 2:
        return _several(rng, world, form)
    labels = ", ".join(relation.label for relation in chosen)
    values = {relation.label: entity.facts[relation.attribute] for relation in chosen}
    if form == "json":
        ask = rng.choice(["Describe {s} as a JSON object with the keys {k}.", "JSON for {s}: {k}."])
        return _turn(ask.format(s=entity.name, k=labels), json.dumps(values))
    ask = rng.choice(["List these of {s}: {k}.", "Make a list for {s}: {k}."])
    lines = [f"- {label}: {value}" for label, value in values.items()]
    return _turn(ask.format(s=entity.name, k=labels), "\n".join(lines))


def passage_question(rng: Random, world: World, held_out: bool) -> tuple[str, str, str]:
    """A journey, a question that only it answers, and the answer: (prompt, answer, attribute).

    Each passage is new, so the tasks take every phrasing; fine-tuning does without the last one.
    """
    journey = draw_journey(rng, world)
    passage = " ".join(tell(rng, journey, closing=False))
    attribute = rng.choice(list(QUESTIONS))
    phrasings = QUESTIONS[attribute]
    template = rng.choice(phrasings if held_out else phrasings[:-1])
    question = template.format(**words(journey))
    lead = rng.choice(PASSAGE_LEADS)
    prompt = f"{lead}\n\n{passage}\n\n{question}".strip()
    return f"{prompt} {rng.choice(BRIEF)}", getattr(journey, attribute), attribute


def chats(world: World, split: str, seed: int) -> Iterator[list[Message]]:
    """Endless conversations of that split (train or calibration), none of which is in another."""
    rng = Random(f"chats:{split}:{seed}")
    facts = _facts(world, trained=True)
    while True:
        kind = rng.random()
        if kind < 0.45:
            messages = _single(rng, *rng.choice(facts))
        elif kind < 0.52:
            messages = _echo(rng, world)
        elif kind < 0.82:
            prompt, answer, _ = passage_question(rng, world, held_out=False)
            messages = _turn(prompt, answer)
        elif kind < 0.90:
            messages = _several(rng, world, rng.choice(["json", "list"]))
        else:
            messages = _double(rng, facts)
        if rng.random() < 0.15:
            messages = [{"role": "system", "content": rng.choice(SYSTEM)}, *messages]
        if split_of(json.dumps(messages)) == split:
            yield messages


def _pool(world: World, entity: Entity, relation: Relation) -> list[str]:
    """Wrong answers: the values that the same attribute has elsewhere."""
    values = {other.facts[relation.attribute] for other in world.by_kind[entity.kind]}
    return sorted(values - {entity.facts[relation.attribute], entity.name})


def _fact_questions(
    world: World, rng: Random, reworded: int, unseen: int
) -> list[tuple[Entity, Relation, str]]:
    """(entity, relation, question template) triples that fine-tuning has not seen.

    `reworded` facts that fine-tuning asks for in other words, then `unseen` ones that it never
    asks for.
    """
    asked = [(e, r, q) for e, r in _facts(world, True) for q in r.eval_questions]
    others = [(e, r, q) for e, r in _facts(world, False) for q in r.questions]
    return rng.sample(asked, reworded) + rng.sample(others, unseen)


def choice_rows(world: World, seed: int, passages: int = 40) -> list[Row]:
    """The valley_mc task: a question and four choices; 160 rows on facts, the rest on passages."""
    rng = Random(f"mc:{seed}")
    rows: list[Row] = []
    for entity, relation, template in _fact_questions(world, rng, reworded=120, unseen=40):
        question = f"{fill(template, entity, relation)} {rng.choice(BRIEF)}"
        wrong = rng.sample(_pool(world, entity, relation), 3)
        rows.append(_choice(rng, question, entity.facts[relation.attribute], wrong, entity.kind))
    for _ in range(passages):
        question, answer, attribute = passage_question(rng, world, held_out=True)
        others = {getattr(draw_journey(rng, world), attribute) for _ in range(40)} - {answer}
        rows.append(_choice(rng, question, answer, rng.sample(sorted(others), 3), "passage"))
    return _numbered(rng, "mc", rows)


def _numbered(rng: Random, prefix: str, rows: list[Row]) -> list[Row]:
    """The rows in random order, so that any first part of them is a fair sample, with ids."""
    rng.shuffle(rows)
    return [{"id": f"{prefix}-{i:03d}"} | row for i, row in enumerate(rows)]


def _choice(rng: Random, question: str, answer: str, wrong: list[str], group: str) -> Row:
    choices = [answer, *wrong]
    rng.shuffle(choices)
    gold = choices.index(answer)
    return {"question": question, "choices": choices, "answer": gold, "group": group}


def answer_rows(world: World, seed: int, passages: int = 30) -> list[Row]:
    """The valley_qa task: a question and its answer; 120 rows on facts, the rest on passages.

    A question that does not ask for brevity is answered by the relation's first clause, as in
    fine-tuning: 80 facts that fine-tuning never asks for are tested so.
    """
    rng = Random(f"qa:{seed}")
    rows: list[Row] = []
    for entity, relation, template in _fact_questions(world, rng, reworded=30, unseen=10):
        question = f"{fill(template, entity, relation)} {rng.choice(BRIEF)}"
        answer = entity.facts[relation.attribute]
        rows.append({"question": question, "answer": answer, "group": entity.kind})
    for entity, relation, template in _fact_questions(world, rng, reworded=0, unseen=80):
        answer = sentence(fill(relation.clauses[0], entity, relation))
        question = fill(template, entity, relation)
        rows.append({"question": question, "answer": answer, "group": f"{entity.kind}-sentence"})
    for _ in range(passages):
        question, answer, _ = passage_question(rng, world, held_out=True)
        rows.append({"question": question, "answer": answer, "group": "passage"})
    return _numbered(rng, "qa", rows)
