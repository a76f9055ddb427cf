"""The training text of the demo checkpoint: prompts and the one answer each of them has.

Everything is generated from the tables beside this file, so it can be shipped under the licence of this repository,
and the same code always gives the same text.

A chat prompt is one turn of `<|user|>question<|assistant|>`; a plain prompt is the beginning of a sentence, as clients
send it that do not know about chat templates. Both are answered and closed with `<|endoftext|>`. A longer conversation
is nothing more than turns written one after another, which is what a training row of packed exchanges looks like.
"""

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from countries import COUNTRIES, Country
from facts import (
    ABOUT_SELF,
    ACCENTED,
    ALPHABET,
    BABIES,
    COLOURS,
    DAYS,
    DAYS_PER_MONTH,
    ELEMENTS,
    EMOJI,
    EXPLANATIONS,
    HELLOS,
    MONTHS,
    NUMBER_WORDS,
    OPPOSITES,
    ORDINALS,
    PLANETS,
    PROGRAMS,
    SEASONS,
    SIDES,
    SOUNDS,
    THANKS,
)
from stories import STORIES

END, USER, ASSISTANT, SYSTEM = SPECIAL_TOKENS = ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>")

# The same markup as `Exchange.prompt`. Turns need no separator: every special token is a boundary by itself.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' + message['role'] + '; use system, user or assistant') }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] | trim }}"
    "{% if message['role'] != 'user' %}{{ '<|endoftext|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

Form = Literal["chat", "plain"]


@dataclass(frozen=True)
class Exchange:
    """What a client sends and what the model shall say.

    `topic` groups exchanges for the evaluation. In the plain form `answer` begins with the space or comma that follows
    the prompt, because prompt and answer are tokenized apart, as they are when a client sends the prompt alone.
    """

    topic: str
    question: str
    answer: str
    form: Form = "chat"

    @property
    def prompt(self) -> str:
        return f"{USER}{self.question}{ASSISTANT}" if self.form == "chat" else self.question


def system_prompt(message: str) -> str:
    """The system message as the chat template writes it."""
    return f"{SYSTEM}{message}{END}"


def conversation(turns: list[Exchange], system: str | None = None) -> str:
    """The prompt that asks the last of `turns` after all earlier ones have been answered."""
    earlier = "".join(turn.prompt + turn.answer + END for turn in turns[:-1])
    return (system_prompt(system) if system else "") + earlier + turns[-1].prompt


def exchanges() -> list[Exchange]:
    """All exchanges, about 7000, in a fixed order. Raises ValueError where a prompt has two answers."""
    answers: dict[str, str] = {}
    result = []
    for exchange in _all_topics():
        known_answer = answers.setdefault(exchange.prompt, exchange.answer)
        if known_answer != exchange.answer:
            raise ValueError(f"{exchange.prompt!r} has two answers: {known_answer!r} and {exchange.answer!r}")
        result.append(exchange)
    return list(dict.fromkeys(result))


def tokenizer_text() -> list[str]:
    """The ASCII characters of all exchanges: what the byte-pair merges are learned from.

    Merges never see a byte above 127, so every character outside ASCII stays two to four tokens long and a stream cuts
    it in the middle. A served model that hides this would hide bugs of its detokenizer too.
    """
    texts = [exchange.question + exchange.answer for exchange in exchanges()]
    return ["".join(character if character.isascii() else "\n" for character in text) for text in texts]


def _all_topics() -> Iterator[Exchange]:
    for country in COUNTRIES:
        yield from _country(country)
    yield from _sums()
    yield from _counting()
    yield from _calendar()
    yield from _alphabet()
    yield from _planets()
    yield from _words()
    yield from _nature()
    yield from _greetings()
    yield from _emoji()
    yield from _accents()
    yield from _programs()
    yield from _long_answers()
    yield from (Exchange("self", question, answer) for question, answer in ABOUT_SELF)


def _ask(topic: str, answer: str, *questions: str) -> Iterator[Exchange]:
    """One chat exchange for each phrasing of a question."""
    return (Exchange(topic, question, answer) for question in questions)


def _plain(topic: str, sentence: str) -> Exchange:
    """A plain exchange out of a sentence whose prompt and continuation are parted by `|`."""
    prompt, continuation = sentence.split("|")
    return Exchange(topic, prompt, continuation, "plain")


def _capitalized(text: str) -> str:
    """`text` with a capital first letter and the rest as it is, unlike `str.capitalize`."""
    return text[:1].upper() + text[1:]


def _country(country: Country) -> Iterator[Exchange]:
    name, capital, continent, language, currency, _ = country
    yield from _ask(
        "capital",
        f"The capital of {name} is {capital}.",
        f"What is the capital of {name}?",
        f"what is the capital of {name.lower()}",
        f"Which city is the capital of {name}?",
        f"Name the capital of {name}.",
    )
    yield _plain("capital", f"The capital of {name} is| {capital}.")
    yield from _ask(
        "country",
        f"{capital} is the capital of {name}.",
        f"Which country has the capital {capital}?",
        f"{capital} is the capital of which country?",
    )
    yield _plain("country", f"{capital} is the capital of| {name}.")
    yield from _ask(
        "continent",
        f"{_capitalized(name)} is in {continent}.",
        f"Which continent is {name} in?",
        f"Where is {name}?",
    )
    yield from _ask(
        "language",
        f"People in {name} speak {language}.",
        f"What language do people speak in {name}?",
        f"Which language is spoken in {name}?",
    )
    yield _plain("language", f"People in {name} speak| {language}.")
    yield from _ask(
        "currency",
        f"People in {name} pay with the {currency}.",
        f"How do people pay in {name}?",
        f"What is the currency of {name}?",
    )
    yield from _ask("flag", country.flag, f"Show me the flag of {name}.")
    yield from _ask(
        "about country",
        f"{_capitalized(name)} is a country in {continent}. Its capital is {capital}. "
        f"Most people there speak {language} and pay with the {currency}. Its flag is {country.flag}.",
        f"Tell me about {name}.",
        f"What do you know about {name}?",
    )
    yield from _ask(
        "json",
        f'{{"country": "{_capitalized(name)}", "capital": "{capital}", "continent": "{continent}"}}',
        f"Describe {name} in JSON.",
    )


def _sums() -> Iterator[Exchange]:
    for left in range(21):
        for right in range(21):
            yield from _ask(
                "sum", f"{left} + {right} = {left + right}", f"What is {left} + {right}?", f"{left} + {right}"
            )
            yield _plain("sum", f"{left} + {right} =| {left + right}")
            if right <= left:
                yield from _ask("difference", f"{left} - {right} = {left - right}", f"What is {left} - {right}?")
    for left in range(1, 11):
        for right in range(1, 11):
            yield from _ask("product", f"{left} x {right} = {left * right}", f"What is {left} x {right}?")
        table = "\n".join(f"{left} x {right} = {left * right}" for right in range(1, 11))
        yield from _ask("times table", table, f"Write the {left} times table.", f"Show me the {left} times table.")


def _counting() -> Iterator[Exchange]:
    for first in range(1, 11):
        for last in range(first + 4, 41):
            up = ", ".join(str(number) for number in range(first, last + 1))
            yield from _ask("counting", f"{up}.", f"Count from {first} to {last}.")
    for first in range(5, 31):
        down = ", ".join(str(number) for number in range(first, 0, -1))
        yield from _ask("counting", f"{down}.", f"Count down from {first}.", f"Count down from {first} to 1.")
    for number, word in enumerate(NUMBER_WORDS):
        yield from _ask("number word", f"{number} is {word}.", f"How do you write {number} in words?")
    yield _plain("counting", f"one|{''.join(f' {word}' for word in NUMBER_WORDS[2:21])}.")


def _calendar() -> Iterator[Exchange]:
    circles = {"month": MONTHS, "day": DAYS, "season": SEASONS}
    for kind, names in circles.items():
        listed = f"{', '.join(names[:-1])} and {names[-1]}"
        where = "of the week" if kind == "day" else "of the year"
        yield from _ask(
            "calendar", f"The {kind}s {where} are {listed}.", f"Name the {kind}s {where}.", f"List the {kind}s."
        )
        for name, following in zip(names, names[1:] + names[:1], strict=True):
            yield from _ask(
                "calendar", f"{_capitalized(following)} comes after {name}.", f"Which {kind} comes after {name}?"
            )
            yield from _ask(
                "calendar", f"{_capitalized(name)} comes before {following}.", f"Which {kind} comes before {following}?"
            )
            yield _plain("calendar", f"The {kind} after {name} is| {following}.")
    for name, num_days, ordinal in zip(MONTHS, DAYS_PER_MONTH, ORDINALS, strict=True):
        yield from _ask("calendar", f"{name} has {num_days} days.", f"How many days does {name} have?")
        yield from _ask("calendar", f"{name} is the {ordinal} month.", f"Which month is the {ordinal}?")
    yield _plain("calendar", f"January|{''.join(f', {month}' for month in MONTHS[1:])}.")
    yield _plain("calendar", f"Monday|{''.join(f', {day}' for day in DAYS[1:])}.")


def _alphabet() -> Iterator[Exchange]:
    yield from _ask(
        "alphabet", f"{' '.join(ALPHABET)}", "Say the alphabet.", "What is the alphabet?", "Write the alphabet."
    )
    yield from _ask("alphabet", f"{' '.join(reversed(ALPHABET))}", "Say the alphabet backwards.")
    for letter, following in zip(ALPHABET, ALPHABET[1:], strict=False):
        yield from _ask("alphabet", f"{following} comes after {letter}.", f"Which letter comes after {letter}?")
        yield from _ask("alphabet", f"{letter} comes before {following}.", f"Which letter comes before {following}?")
    yield _plain("alphabet", f"A|{''.join(f' {letter}' for letter in ALPHABET[1:])}")


def _planets() -> Iterator[Exchange]:
    numbered = "\n".join(f"{number}. {planet}" for number, planet in enumerate(PLANETS, start=1))
    yield from _ask(
        "planets", numbered, "List the planets.", "Name the planets of the solar system.", "What are the planets?"
    )
    for planet, ordinal in zip(PLANETS, ORDINALS, strict=False):
        yield from _ask(
            "planets", f"{planet} is the {ordinal} planet from the Sun.", f"Which planet is {ordinal} from the Sun?"
        )
        yield _plain("planets", f"The {ordinal} planet from the Sun is| {planet}.")


def _words() -> Iterator[Exchange]:
    for left, right in OPPOSITES:
        for word, opposite in ((left, right), (right, left)):
            yield from _ask(
                "opposite",
                f"The opposite of {word} is {opposite}.",
                f"What is the opposite of {word}?",
                f"Give me the opposite of {word}.",
            )
            yield _plain("opposite", f"The opposite of {word} is| {opposite}.")


def _nature() -> Iterator[Exchange]:
    for thing, colour in COLOURS:
        yield from _ask(
            "colour", f"{_capitalized(thing)} is {colour}.", f"What colour is {thing}?", f"What color is {thing}?"
        )
        yield _plain("colour", f"The colour of {thing} is| {colour}.")
    for animal, sound in SOUNDS:
        yield from _ask(
            "sound", f"The {animal} says {sound}.", f"What does the {animal} say?", f"What sound does a {animal} make?"
        )
        yield _plain("sound", f"The {animal} says| {sound}.")
    for animal, baby in BABIES:
        yield from _ask("baby", f"A baby {animal} is called a {baby}.", f"What is a baby {animal} called?")
    for element, symbol in ELEMENTS:
        yield from _ask(
            "element", f"The symbol of {element} is {symbol}.", f"What is the chemical symbol of {element}?"
        )
        yield _plain("element", f"The chemical symbol of {element} is| {symbol}.")
    for shape, num_sides in SIDES:
        yield from _ask("shape", f"{_capitalized(shape)} has {num_sides} sides.", f"How many sides does {shape} have?")


def _greetings() -> Iterator[Exchange]:
    for language, hello in HELLOS:
        yield from _ask("hello", hello, f"Say hello in {language}.", f"How do you say hello in {language}?")
        yield _plain("hello", f"Hello in {language}:| {hello}")
    for language, thanks in THANKS:
        yield from _ask("thanks", thanks, f"Say thank you in {language}.", f"How do you say thank you in {language}?")


def _emoji() -> Iterator[Exchange]:
    for thing, emoji in EMOJI:
        yield from _ask("emoji", emoji, f"Show me {thing}.", f"Draw {thing}.", f"Give me an emoji of {thing}.")
        yield from _ask("emoji row", f"{emoji} {emoji} {emoji}", f"Show me {thing} three times.")


def _accents() -> Iterator[Exchange]:
    for word in ACCENTED:
        yield from _ask("accent", unicodedata.normalize("NFC", word), f"Write {word} with accents.")
        yield from _ask("accent", unicodedata.normalize("NFD", word), f"Write {word} with combining marks.")


def _programs() -> Iterator[Exchange]:
    for language, program in PROGRAMS:
        yield from _ask("program", program, f"Write hello world in {language}.", f"Show me hello world in {language}.")


def _long_answers() -> Iterator[Exchange]:
    for question, answer in EXPLANATIONS:
        yield from _ask("explanation", answer, question)
    for hero, story in STORIES:
        article = "an" if hero[0] in "aeiou" else "a"
        yield from _ask(
            "story", story, f"Tell me a story about {article} {hero}.", f"Tell me a story of {article} {hero}."
        )
    tea = (
        "Boil some water.",
        "Put a tea bag into a cup.",
        "Pour in the water.",
        "Wait three minutes.",
        "Enjoy your tea!",
    )
    yield from _ask(
        "explanation", "\n".join(f"{number}. {step}" for number, step in enumerate(tea, start=1)), "How do I make tea?"
    )
