"""Events that happen once: a traveller carries something from one village to another.

Their details are drawn anew for each document, so nothing about them can be learned by heart: a
question about a journey can only be answered from the passage that tells it.
"""

# ruff: noqa: SIM905 - long lists of words are easier to read and change as text

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from sentences import article, sentence, weather
from world import ANIMALS, COLOURS, DAYS, NUMBERS, TRAVELLERS, VILLAGES, World

CARGO = (
    "stones jars ribbons books lamps apples baskets keys shells cups feathers bells maps coins "
    "letters hats seeds eggs"
).split()
OBSTACLES = (
    "a fallen tree", "a flooded ford", "a broken bridge", "thick fog", "a herd of sheep",
    "a locked gate", "deep snow", "a swarm of bees", "a landslide", "a crowd of pilgrims",
)  # fmt: skip
REWARDS = (
    "a bowl of soup", "a warm bed", "a silver ring", "a loaf of bread", "a new pair of shoes",
    "a song", "a bag of nuts", "a map of the pass", "a wool scarf", "a walking stick",
)  # fmt: skip


@dataclass(frozen=True)
class Journey:
    """One journey; every field is an answer that a question may ask for."""

    traveller: str
    cargo: str
    number: str
    colour: str
    start: str
    goal: str
    day: str
    mount: str
    obstacle: str
    reward: str
    host: str


def draw_journey(rng: Random, world: World) -> Journey:
    """A journey with every detail drawn at random."""
    start, goal = rng.sample(VILLAGES, 2)
    return Journey(
        traveller=rng.choice(TRAVELLERS),
        cargo=rng.choice(CARGO),
        number=rng.choice(NUMBERS[1:12]),
        colour=rng.choice(COLOURS),
        start=start,
        goal=goal,
        day=rng.choice(DAYS),
        mount=rng.choice(ANIMALS[:8]),
        obstacle=rng.choice(OBSTACLES),
        reward=rng.choice(REWARDS),
        host=rng.choice(world.people).name,
    )


_OPENINGS = (
    "on {day} {t} left {start} with {number} {colour} {cargo}",
    "{t} set out from {start} on {day}. In the bag were {number} {colour} {cargo}",
    "one {day}, {t} of nowhere in particular carried {number} {colour} {cargo} out of {start}",
    "it was {day} when {t} packed {number} {colour} {cargo} and took the road from {start}",
    (
        "there once was a traveller called {t}, "
        "who on {day} bought {number} {colour} {cargo} in {start}"
    ),
)
_GOALS = (
    "the way led to {goal}", "{t} wanted to bring them to {goal}", "they were meant for {goal}",
    "somebody in {goal} was waiting for them", "the {cargo} had to be in {goal} before night",
)  # fmt: skip
_MOUNTS = (
    "{amount} carried the load", "{t} had no horse, only {amount}", "{amount} walked beside {t}",
    "for company {t} had {amount}", "the bag was tied to {amount}",
)  # fmt: skip
_OBSTACLES = (
    "halfway there {t} met {obstacle} and had to wait", "then {obstacle} blocked the road",
    "near the old milestone {obstacle} stopped {t}", "{t} lost an hour because of {obstacle}",
    "the road was closed by {obstacle}",
)  # fmt: skip
_ENDS = (
    "in {goal} {host} took the {number} {cargo} and gave {t} {reward}",
    "{host} met {t} at the gate of {goal} and paid with {reward}",
    (
        "at last {t} reached {goal}, "
        "where {host} counted the {cargo}, found {number}, and gave {reward} in return"
    ),
    "{host} opened the door in {goal}. For the {colour} {cargo} {t} got {reward}",
    "{t} came to the house of {host} in {goal} and was given {reward}",
)
_CLOSINGS = (
    "so the {number} {colour} {cargo} came from {start} to {goal}",
    "{t} slept well that night", "the {mount} was glad to rest",
    "that is how {t} earned {reward}", "ever since, {t} tells the story of {obstacle}",
    "and {t} went back to {start} the next day", "people still talk about the {colour} {cargo}",
)  # fmt: skip

# Attribute → its questions: the tasks take all of them, fine-tuning all but the last.
QUESTIONS: dict[str, tuple[str, ...]] = {
    "cargo": (
        "What did {t} carry?",
        "What did {t} bring from {start}?",
        "Which things did {t} take along?",
        "What was in the bag of {t}?",
    ),
    "number": (
        "How many {cargo} did {t} carry?",
        "What was the number of the {cargo}?",
        "How many {cargo} did {host} get?",
        "How many {cargo} were there?",
    ),
    "colour": (
        "What colour were the {cargo}?",
        "Which colour did the {cargo} have?",
        "What was the colour of the {cargo} of {t}?",
        "Of what colour were the {cargo}?",
    ),
    "start": (
        "From which village did {t} set out?",
        "Which village did {t} leave?",
        "Where did the way of {t} begin?",
        "Where did {t} start?",
    ),
    "goal": (
        "To which village did {t} go?",
        "Which village did {t} reach at last?",
        "Where did the way of {t} end?",
        "Where did {t} bring the {cargo}?",
    ),
    "day": (
        "On which day did {t} set out?",
        "On what day did {t} leave {start}?",
        "What day was it when {t} set out?",
        "Which day was it when {t} left?",
    ),
    "mount": (
        "Which animal was with {t}?",
        "What animal did {t} have?",
        "Which animal came from {start} with {t}?",
        "What animal went along with {t}?",
    ),
    "obstacle": (
        "What stopped {t} on the road?",
        "Why did {t} lose time?",
        "What did {t} meet on the way?",
        "What blocked the road?",
    ),
    "reward": (
        "What did {t} get in return?",
        "What did {host} give to {t}?",
        "What did {t} get for the {cargo}?",
        "What was {t} given?",
    ),
    "host": (
        "Who took the {cargo}?",
        "Whom did {t} meet in {goal}?",
        "Who waited for {t} in {goal}?",
        "Who gave {t} {reward}?",
    ),
}


def words(journey: Journey) -> dict[str, str]:
    """The journey's details under the names that the templates use."""
    fields = dict(vars(journey))
    return fields | {"t": journey.traveller, "amount": article(journey.mount)}


def tell(rng: Random, journey: Journey, closing: bool = True) -> list[str]:
    """The journey as sentences, in the order in which it happened."""
    groups = [_OPENINGS, _GOALS, _MOUNTS, _OBSTACLES, _ENDS]
    if rng.random() < 0.5:
        groups[1], groups[2] = groups[2], groups[1]
    sentences = [sentence(rng.choice(group).format(**words(journey))) for group in groups]
    if rng.random() < 0.5:
        sentences.insert(rng.randint(1, 3), sentence(weather(rng)))
    if closing:
        count = rng.randint(1, 2)
        chosen = rng.sample(_CLOSINGS, count)
        sentences += [sentence(text.format(**words(journey))) for text in chosen]
    return sentences
