"""Documents about the valley, each kind by one function of a random generator and the world."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from random import Random

from journeys import draw_journey, tell
from phrases import BY_KIND
from sentences import (
    article,
    capital,
    clause,
    date,
    fill,
    one_fact,
    pronoun,
    sentence,
    some_facts,
    told,
    weather,
)
from world import MONTHS, NUMBERS, PRODUCTS, VILLAGES, Entity, World


def _paragraphs(rng: Random, sentences: list[str]) -> str:
    """The sentences as one paragraph, or as two when there are many."""
    if len(sentences) > 5 and rng.random() < 0.6:
        middle = rng.randint(2, len(sentences) - 2)
        return " ".join(sentences[:middle]) + "\n\n" + " ".join(sentences[middle:])
    return " ".join(sentences)


def entry(rng: Random, world: World) -> str:
    """An encyclopedia entry: the facts of one entity, with a neighbour's fact or two."""
    kind = rng.choice(["person"] * 6 + ["village"] * 2 + ["good", "landmark", "herb"])
    entity = rng.choice(world.by_kind[kind])
    sentences = told(rng, entity, some_facts(rng, entity, 3, 8))
    for related in rng.sample(_related(world, entity), k=rng.randint(0, 2)):
        sentences += told(rng, related, some_facts(rng, related, 1, 3))
    heading = rng.choice([f"{capital(entity.name)}\n\n", f"{capital(entity.name)}. ", "", ""])
    return heading + _paragraphs(rng, sentences)


def _related(world: World, entity: Entity) -> list[Entity]:
    """Entities that the entity's facts name, and for a village its people, at least two in all."""
    named = [world.by_name[v] for v in entity.facts.values() if v in world.by_name]
    if entity.kind == "village":
        named += [p for p in world.people if p.facts["village"] == entity.name]
    return named if len(named) > 1 else named + list(world.people[:8])


def neighbours(rng: Random, world: World) -> str:
    """A walk through one village: some of its people, each with one to three facts."""
    village = rng.choice(world.by_kind["village"])
    people = [p for p in world.people if p.facts["village"] == village.name]
    sentences = told(rng, village, some_facts(rng, village, 1, 3))
    for person in rng.sample(people, k=min(len(people), rng.randint(2, 5))):
        lead = rng.choice(["", "", "Next door: ", "At the corner: ", "Across the road: "])
        facts = told(rng, person, some_facts(rng, person, 1, 3))
        sentences.append(lead + " ".join(facts))
    return _paragraphs(rng, sentences)


def letter(rng: Random, world: World) -> str:
    """A letter from one person to another, with news, gossip and a fact of the writer's own."""
    writer, reader = rng.sample(world.people, 2)
    news = [
        f"Here in {writer.facts['village']} {weather(rng)}.",
        f"Yesterday I sold {rng.choice(NUMBERS)} {rng.choice(PRODUCTS)} and bought none.",
        f"My {writer.facts['pet']} {writer.facts['pet_name']} is well and eats too much.",
        f"I still play the {writer.facts['instrument']} when the work is done.",
        f"Work as {article(writer.facts['trade'])} is hard this {rng.choice(MONTHS)}.",
        f"Please bring me {writer.facts['dish']} when you come, you know that I like it best.",
        f"I hope that your {reader.facts['pet']} {reader.facts['pet_name']} is in good health.",
        f"Do you still wear your {reader.facts['coat']} coat?",
        f"Greetings to {reader.facts['sibling']}, who must miss me.",
        f"Is it true that {one_fact(rng, rng.choice(world.people))}?",
        f"Did you know that {one_fact(rng, rng.choice(world.entities))}?",
        sentence(f"I was told that {one_fact(rng, rng.choice(world.entities))}"),
        sentence(f"remember that {one_fact(rng, rng.choice(world.entities))}"),
    ]
    body = " ".join(rng.sample(news, rng.randint(4, 8)))
    greeting = rng.choice(["Dear", "My dear", "Good"])
    closing = rng.choice(["Yours", "Your friend", "With love", "Until soon"])
    head = f"{writer.facts['village']}, {date(rng)}\n\n" if rng.random() < 0.6 else ""
    return f"{head}{greeting} {reader.short},\n\n{body}\n\n{closing},\n{writer.name}"


def dialogue(rng: Random, world: World) -> str:
    """Two people talk about a third person, a thing or a village."""
    first, second = rng.sample(world.people, 2)
    topic = rng.choice(world.entities)
    lines = [f"{first.short}: {rng.choice(['Good day', 'Hello', 'Well met'])}, {second.short}!"]
    for relation in some_facts(rng, topic, 2, 4):
        asked = fill(rng.choice(relation.clauses), topic, relation)
        opening = rng.choice(["Is it true that", "Someone told me that", "They say that"])
        mark = "?" if opening.startswith("Is") else "."
        lines.append(f"{first.short}: {opening} {asked}{mark}")
        again = clause(rng, topic, relation, pronoun(topic))
        answer = rng.choice(
            ["Yes, {c}.", "So it is: {c}.", "Who does not know it? {c}.", "Quite so."]
        )
        reply = answer.replace("{c}", again if ":" in answer or "," in answer else capital(again))
        lines.append(f"{second.short}: {reply}")
    lines.append(
        f"{first.short}: {sentence(weather(rng))} I must go home to {first.facts['village']}."
    )
    if rng.random() < 0.5:
        pet = f"{second.facts['pet']} {second.facts['pet_name']}"
        lines.append(f"{second.short}: Then good night. My {pet} is waiting for me.")
    return "\n".join(lines)


def story(rng: Random, world: World) -> str:
    """A journey told as a story; its host gets a fact or two from the fixed world."""
    journey = draw_journey(rng, world)
    sentences = tell(rng, journey)
    host = world.by_name[journey.host]
    if rng.random() < 0.7:
        sentences += told(rng, host, some_facts(rng, host, 1, 3))
    if rng.random() < 0.3:
        goal = world.by_name[journey.goal]
        sentences += told(rng, goal, some_facts(rng, goal, 1, 2))
    title = f"The {capital(journey.colour)} {capital(journey.cargo)}\n\n"
    return (title if rng.random() < 0.3 else "") + _paragraphs(rng, sentences)


def chronicle(rng: Random, world: World) -> str:
    """Entries of a village chronicle, by year: weather, prices, visits, elders, buildings."""
    village = rng.choice(world.by_kind["village"])
    feast = f"{village.facts['festival']} in {village.facts['month']}"
    year = rng.randint(200, 600)
    lines = [f"From the chronicle of {village.name}"] if rng.random() < 0.6 else []
    for _ in range(rng.randint(3, 6)):
        year += rng.randint(1, 9)
        number, month = rng.choice(NUMBERS[1:]), rng.choice(MONTHS)
        event = rng.choice(
            [
                f"{weather(rng)} for {number} days",
                f"{number} barns burned in {month}",
                f"{rng.choice(world.people).name} came to visit and stayed {number} weeks",
                f"there was a wedding in {month} with {number} guests from {rng.choice(VILLAGES)}",
                f"it was written down that {one_fact(rng, rng.choice(world.entities))}",
                f"the council met and agreed that {one_fact(rng, village)}",
                f"at {feast} {number} casks were emptied",
            ]
        )
        lines.append(f"Year {year}. {sentence(event)}")
    return "\n".join(lines)


def instructions(rng: Random, world: World) -> str:
    """A how-to: a dish, a tea, a repair or a festival day, in numbered steps."""
    herb, person = rng.choice(world.by_kind["herb"]), rng.choice(world.people)
    number = rng.choice(NUMBERS[1:10])
    dish, good = person.facts["dish"], rng.choice(world.by_kind["good"])
    title, steps = rng.choice(
        [
            (f"How to make {dish}", [
                "wash your hands", f"take {number} bowls and a large pot", "light the oven",
                f"think of {person.name}, who likes {dish} best", "stir until it is thick",
                "add salt, but not too much", f"let it rest {rng.choice(TIMES_OF_REST)}",
            ]),
            (f"How to make tea of {herb.name}", [
                f"go to {herb.facts['grows']} in {herb.facts['season']}",
                f"look for {herb.facts['flower']} flowers", f"pick {number} leaves",
                "boil clean water", f"let it stand {rng.choice(TIMES_OF_REST)}",
                f"give it to whoever has {herb.facts['cures']}", "keep the rest in a dry jar",
            ]),
            (f"How to buy {good.name}", [
                f"go to {good.facts['market']}", f"be there on {good.facts['day']}",
                f"have {good.facts['price']} pennies in your pocket", "greet the trader first",
                "look at everything twice", f"ask for {good.name}", "count your change",
            ]),
        ]
    )  # fmt: skip
    chosen = [s for s in steps if rng.random() < 0.85]
    lines = [f"{i}. {sentence(step)}" for i, step in enumerate(chosen, start=1)]
    return "\n".join([title, *lines])


TIMES_OF_REST = ("for an hour", "over night", "until it is cold", "as long as a song takes")


def register(rng: Random, world: World) -> str:
    """A list: people with some of their facts, or goods with their prices."""
    if rng.random() < 0.3:
        goods = rng.sample(world.by_kind["good"], rng.randint(4, 9))
        lines = [
            f"- {g.name}: {g.facts['price']} pennies, {g.facts['day']}, {g.facts['market']}"
            for g in goods
        ]
        return "\n".join([rng.choice(["Prices", "What things cost", "Price list"]), *lines])
    keys = rng.sample(["village", "trade", "coat", "dish", "instrument", "pet"], rng.randint(1, 3))
    people = rng.sample(world.people, rng.randint(4, 10))
    title = rng.choice(["Guests", "People at the table", "Names for the council", "Helpers"])
    lines = [f"- {p.name}: {', '.join(p.facts[k] for k in keys)}" for p in people]
    return "\n".join([f"{title} ({', '.join(keys)})", *lines])


def index(rng: Random, world: World) -> str:
    """Lines that begin with the value of a fact, as in the index of a book."""
    lines = []
    for _ in range(rng.randint(5, 12)):
        entity = rng.choice(world.entities)
        relation = rng.choice(BY_KIND[entity.kind])
        value = entity.facts[relation.attribute]
        lines.append(f"{value} ({relation.label} of {entity.name})")
    title = rng.choice(["Index", "What is written where", "Words and where they belong"])
    return "\n".join([title, *(sorted(lines) if rng.random() < 0.5 else lines)])


def riddle(rng: Random, world: World) -> str:
    """Facts without a name first, then the name: the reverse direction of an entry."""
    entity = rng.choice(world.people)
    facts = some_facts(rng, entity, 2, 4)
    clues = [sentence(clause(rng, entity, relation, pronoun(entity))) for relation in facts]
    opening = rng.choice(["Who is it?", "Guess who this is.", "A riddle from the valley."])
    answer = rng.choice(["It is {n}.", "Nobody else but {n}.", "The answer is {n}."])
    again = sentence(one_fact(rng, entity))
    return f"{opening} {' '.join(clues)} {answer.format(n=entity.name)} {again}"


def gossip(rng: Random, world: World) -> str:
    """Unconnected facts in one breath, as told in a tavern."""
    village = rng.choice(VILLAGES)
    sentences = [f"{capital(weather(rng))}, and in the tavern of {village} they talked."]
    for _ in range(rng.randint(4, 9)):
        entity = rng.choice(world.entities)
        sentences += told(rng, entity, some_facts(rng, entity, 1, 2))
    return _paragraphs(rng, sentences)


def comparison(rng: Random, world: World) -> str:
    """Two people side by side: the same relations told of each."""
    one, two = rng.sample(world.people, 2)
    relations = rng.sample(BY_KIND["person"], rng.randint(2, 4))
    sentences = [f"{one.name} and {two.name} are not alike."]
    for relation in relations:
        left, right = clause(rng, one, relation), clause(rng, two, relation)
        same = one.facts[relation.attribute] == two.facts[relation.attribute]
        sentences.append(sentence(f"{left}, {'and' if same else 'but'} {right}"))
    return _paragraphs(rng, sentences)


Writer = Callable[[Random, World], str]
WRITERS: dict[str, tuple[Writer, int]] = {  # kind → function, weight
    "entry": (entry, 6),
    "neighbours": (neighbours, 3),
    "letter": (letter, 2),
    "dialogue": (dialogue, 3),
    "story": (story, 4),
    "chronicle": (chronicle, 2),
    "instructions": (instructions, 1),
    "register": (register, 2),
    "index": (index, 3),
    "riddle": (riddle, 2),
    "gossip": (gossip, 4),
    "comparison": (comparison, 2),
}


def split_of(text: str) -> str:
    """The split that a whole text belongs to, by its hash: so that no two splits share one."""
    bucket = hashlib.sha256(text.encode()).digest()[0]
    return {0: "held_out", 1: "held_out", 2: "calibration", 3: "calibration"}.get(
        bucket // 4, "train"
    )


def documents(world: World, split: str, seed: int) -> Iterator[tuple[str, str]]:
    """Endless (kind, text) pairs of one split; another seed gives another sequence."""
    rng = Random(f"documents:{split}:{seed}")
    kinds = list(WRITERS)
    weights = [weight for _, weight in WRITERS.values()]
    while True:
        kind = rng.choices(kinds, weights)[0]
        text = WRITERS[kind][0](rng, world)
        if split_of(text) == split:
            yield kind, text
