"""Words to sentences: articles, capitals, pronouns, and facts spoken in varied ways."""

from __future__ import annotations

from random import Random

from phrases import BY_KIND, JOINERS, WRAPPERS, Relation
from world import MONTHS, Entity

WEATHER = (
    "rain fell all day", "the sun shone", "a cold wind blew from the pass", "fog lay on the fields",
    "snow covered the road", "thunder rolled over the hills", "the air smelled of hay",
    "clouds hung low over the roofs", "the night was clear", "frost sat on the fences",
    "a soft drizzle fell", "the river was high", "the dust of summer lay on everything",
)  # fmt: skip
TIMES = (
    "in the morning", "at noon", "late in the evening", "before dawn", "after supper", "at dusk",
    "when the bells rang", "on the way home", "in the middle of the night", "all afternoon",
)  # fmt: skip


def article(noun: str) -> str:
    """The noun with "a" or "an"."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def capital(text: str) -> str:
    """The text with its first letter in upper case."""
    return text[:1].upper() + text[1:]


def sentence(text: str) -> str:
    """The clause as a sentence, with a capital and a full stop."""
    return capital(text) + ("" if text[-1] in ".?!" else ".")


def forms(entity: Entity, subject: str) -> dict[str, str]:
    """The words that a template may ask for: subject, possessives, kinship, the animal."""
    woman = entity.gender == "f"
    possessive = {"she": "her", "he": "his"}.get(subject) or (
        subject + ("'" if subject.endswith("s") else "'s")
    )
    objective = {"she": "her", "he": "him"}.get(subject, subject)
    words = {"s": subject, "p": possessive, "m": objective}
    if entity.kind == "person":
        own = "her" if woman else "his"
        rel, sib = ("sister", "brother") if woman else ("brother", "sister")
        pet = entity.facts["pet"]
        words |= {"o": own, "rel": rel, "sib": sib, "pet": pet, "apet": article(pet)}
    return words


def fill(template: str, entity: Entity, relation: Relation, subject: str | None = None) -> str:
    """The template about the entity's own value of that relation."""
    value = entity.facts[relation.attribute]
    words = forms(entity, subject or entity.name)
    return template.format(v=value, av=article(value), **words)


def pronoun(entity: Entity) -> str:
    """How a person is called after the first mention; other things keep their name."""
    return {"f": "she", "m": "he"}.get(entity.gender, entity.name)


def clause(rng: Random, entity: Entity, relation: Relation, subject: str | None = None) -> str:
    """One fact as a clause in one of its phrasings."""
    return fill(rng.choice(relation.clauses), entity, relation, subject)


def told(
    rng: Random, entity: Entity, relations: list[Relation], name_first: bool = True
) -> list[str]:
    """Sentences that tell those facts: the name first, then pronouns and names in turn."""
    sentences, pending = [], list(relations)
    while pending:
        first = name_first and not sentences
        names = [entity.name] if first else [entity.name, entity.short, pronoun(entity)]
        text = clause(rng, entity, pending.pop(0), rng.choice(names))
        if pending and rng.random() < 0.35:
            other = clause(rng, entity, pending.pop(0), pronoun(entity))
            text = rng.choice(JOINERS).replace("{a}", text).replace("{b}", other)
        elif not first or rng.random() < 0.3:
            text = rng.choice(WRAPPERS).replace("{c}", text)
        sentences.append(sentence(text))
    return sentences


def some_facts(rng: Random, entity: Entity, least: int = 1, most: int = 8) -> list[Relation]:
    """Between `least` and `most` relations of the entity, in random order."""
    relations = list(BY_KIND[entity.kind])
    rng.shuffle(relations)
    return relations[: rng.randint(least, min(most, len(relations)))]


def one_fact(rng: Random, entity: Entity) -> str:
    """One fact of the entity as a clause that names it in full."""
    return clause(rng, entity, rng.choice(BY_KIND[entity.kind]))


def weather(rng: Random) -> str:
    """A clause on the weather, with or without the time of day."""
    text = rng.choice(WEATHER)
    return f"{rng.choice(TIMES)} {text}" if rng.random() < 0.4 else text


def date(rng: Random) -> str:
    """A day of the valley's calendar."""
    return f"{rng.randint(1, 28)} {rng.choice(MONTHS)}"
