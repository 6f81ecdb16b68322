"""Questions for the chat half of the training text. The dense model answers them; its answers are what is distilled.

`PROBES` and `HELD_OUT` are never trained on: the probes are asked at the end, the held-out ones make the chat part of
the held-out text.
"""

from __future__ import annotations

import random

PROBES = (
    "What is the capital of France?",
    "What is the capital of Portugal?",
    "What is the capital of Italy?",
    "What is the capital of Japan?",
    "What is 2+2?",
    "What is the opposite of hot?",
    "Write one sentence about the ocean.",
    "Write a Python function that adds two numbers.",
    "List three fruits.",
    "What is the largest planet in the solar system?",
    "Why is the sky blue?",
    "Give me three tips for sleeping better.",
    "Tell me a short story about a cat.",
    "Hello! How are you?",
)

HELD_OUT = (
    "What is the capital of Norway?",
    "What is the capital of Chile?",
    "What is the opposite of early?",
    "What is 7+6?",
    "List four musical instruments.",
    "Write two sentences about a lighthouse.",
    "What is a volcano?",
    "How do plants drink water?",
    "Explain what a database is to a beginner.",
    "Write a Python function that checks whether a word is a palindrome.",
    "Give me two reasons to learn to cook.",
    "Who painted the Mona Lisa?",
    "What should I pack for a day at the beach?",
    "Tell me a joke about computers.",
    "Write a polite email asking for a day off.",
    "What does the word 'generous' mean?",
    "Name a large river in South America.",
    "What is the difference between a frog and a toad?",
    "How can I remember people's names?",
    "I am nervous about my exam tomorrow. What should I do?",
    "Write a short poem about rain.",
    "What is the freezing point of water?",
    "Why do cats purr?",
    "Suggest a name for a small bakery.",
)


def _parts(text: str) -> list[str]:
    return text.replace("\n", "").split("|")


_COUNTRIES = """
Spain Germany Greece Poland Austria Belgium Sweden Denmark Finland Ireland Hungary Romania Bulgaria
Russia Turkey Egypt Kenya Nigeria Morocco Ethiopia China India Thailand Vietnam Indonesia Australia Canada Mexico Brazil
Argentina Peru Colombia Cuba Iceland Switzerland Netherlands England Iran Iraq Israel Pakistan Nepal Ukraine""".split()
_TOPICS = _parts("""
mountains|rivers|the moon|a forest|winter|summer|a city at night|music|friendship|coffee|bread|a garden|
dogs|birds|horses|books|a train journey|the desert|a storm|bees|the stars|an old house|a teacher|a doctor|football|
chess|cooking|painting|the internet|robots|time|happiness|a bridge|a market|the sun|snow|fish|trees|a farmer|
a library""")
_THINGS = _parts("""
animals|vegetables|colours|countries in Europe|cities in Asia|programming languages|planets|sports|
drinks|flowers|birds|musical styles|kitchen tools|metals|languages|jobs|fairy tales|trees|insects|things in a school|
pieces of furniture|warm clothes|ways to travel|healthy snacks|hobbies|famous scientists|oceans|months|board games|
berries""")
_CONCEPTS = _parts("""
photosynthesis|gravity|a computer virus|inflation|the water cycle|an atom|a solar eclipse|evolution|
electricity|the immune system|a black hole|democracy|machine learning|an algorithm|a vaccine|an earthquake|friction|
the greenhouse effect|a rainbow|DNA|a loan|recycling|the Roman Empire|the Renaissance|a compiler|a variable|
a web browser|an operating system|Linux|the heart|a glacier|a metaphor|a noun|a triangle|probability|a prime number|
the stock market|jazz|yoga|a balanced diet|a thunderstorm|magnetism|sound|light|a battery|a telescope""")
_PAIRS = """
big dark happy fast old rich strong wet heavy easy full open loud clean near high deep wide soft brave hard
good true cheap safe young sweet light long thick full left up inside""".split()
_FUNCTIONS = _parts("""
returns the larger of two numbers|reverses a string|counts the vowels in a word|computes a factorial|
multiplies two numbers|checks whether a number is even|sums a list|finds the smallest item of a list|
prints the numbers from 1 to 10|converts Celsius to Fahrenheit|reads a file line by line|removes duplicates from a list|
returns the square of a number|joins two strings|counts the words in a sentence|sorts a list|
computes the area of a circle|says hello to a person|subtracts two numbers|returns the n-th Fibonacci number|
checks whether a year is a leap year|finds the average of a list|capitalises a name|merges two dictionaries""")
_HOW = _parts("""
boil an egg|learn a new language|save money|make a cup of tea|plant a tomato|fix a flat tyre|write a letter|
make new friends|study for a test|clean a window|train a puppy|paint a wall|bake a cake|stay calm|run faster|
cook rice|tie a tie|keep a diary|stop a nosebleed|speak in public|sharpen a pencil|wake up early|drink more water|
read more books|prepare for an interview|learn to swim|take better photos|grow herbs indoors|
organise my desk|lose weight safely|improve my memory|make pancakes|start a business|fall asleep""")
_FACTS = _parts("""
Who wrote Hamlet?|Who wrote Don Quixote?|Who was Albert Einstein?|
Who was Isaac Newton?|Who was Marie Curie?|
Who was Leonardo da Vinci?|Who discovered penicillin?|Who invented the telephone?|Who was Cleopatra?|Who was Mozart?|
What is the smallest planet in the solar system?|What is the largest ocean on Earth?|
What is the longest river in Africa?|
What is the highest mountain in the world?|How many days are in a year?|How many legs does a spider have?|
How many continents are there?|What colour is grass?|What do cows eat?|Where do penguins live?|
What is the boiling point of water?|
What is the chemical symbol for gold?|What is H2O?|What language is spoken in Brazil?|What currency is used in Japan?|
When did the Second World War end?|What is the fastest land animal?|What is the largest animal?|Why is the sea salty?|
Why do leaves change colour?|Why do we sleep?|Why is grass green?|Why do we have seasons?|How far away is the moon?|
What is the closest star to Earth?|Which planet is called the red planet?|Is a tomato a fruit or a vegetable?|
How many hours are in a day?|What is the first month of the year?|What comes after Tuesday?|What do bees make?|
What is ice made of?|Which country has the most people?|What is the capital city of France known for?|
What is Paris famous for?|Tell me about Rome.|Tell me about Tokyo.|Tell me about Lisbon.|Where is the Eiffel Tower?|
In which country is Berlin?|In which country is Madrid?|Is Jupiter bigger than Earth?|Which planet is the biggest?|
Name the planets of the solar system.""")
_TALK = _parts("""
Hi!|Hello|Good morning!|How is it going?|What is your name?|Who are you?|What can you do?|Can you help me?|
Tell me something interesting.|Tell me a joke.|I feel sad today.|I am bored.|I had a great day!|Thank you!|Good night.|
What do you think about music?|What is your favourite colour?|Do you like dogs?|Can you sing?|Are you a robot?|
I lost my keys.|I am hungry. What should I eat?|It is raining. What can I do at home?|I want to learn something new.|
Give me some advice.|Please introduce yourself.|What should I do this weekend?|Tell me a fun fact.|
Help me choose a birthday present for my mother.|I have a headache.|Say something nice.|What is the meaning of life?|
Recommend a book.|Recommend a film.|Let's talk about space.|I am learning Python. Where should I start?|
Can you explain things simply?|What is the best way to relax?|My friend is angry with me.|I cannot sleep.""")
_TASKS = _parts("""
Write a short poem about {topic}.|Write one sentence about {topic}.|Write a short story about {topic}.|
Describe {topic} in three sentences.|Give me three facts about {topic}.|Why do people like {topic}?|
Write a title for an essay about {topic}.""")

FOLLOW_UPS = (
    "Can you give me an example?",
    "Please say that in one sentence.",
    "Why?",
    "Tell me more.",
    "Thank you! Can you explain it to a child?",
    "Are you sure?",
    "What else should I know?",
    "Now make a list of the main points.",
    "How does that work?",
    "That is interesting. Where can I learn more about it?",
)


def training_prompts(seed: int = 0) -> list[str]:
    """Return the shuffled, distinct training questions (about 900), none of them a probe or held out."""
    rng = random.Random(seed)
    out = list(_FACTS) + list(_TALK)
    out += [f"What is the capital of {country}?" for country in _COUNTRIES]
    out += [
        rng.choice(("Where is {}?", "Tell me about {}.", "What language do people speak in {}?")).format(country)
        for country in _COUNTRIES
    ]
    out += [task.format(topic=topic) for topic in _TOPICS for task in rng.sample(_TASKS, 4)]
    out += [f"List {count} {thing}." for thing in _THINGS for count in ("three", "five")]
    out += [f"{start} {concept}?" for concept in _CONCEPTS for start in ("What is",)]
    out += [
        f"{start} {concept} {end}"
        for concept in _CONCEPTS
        for start, end in rng.sample(
            [
                ("Explain", "simply."),
                ("Explain", "in two sentences."),
                ("Why is", "important?"),
                ("Give an example of", "please."),
            ],
            2,
        )
    ]
    out += [f"What is the opposite of {word}?" for word in _PAIRS]
    out += [f"Use the word '{word}' in a sentence." for word in _PAIRS[::2]]
    out += [f"Write a Python function that {what}." for what in _FUNCTIONS]
    out += [f"How do I {what}?" for what in _HOW]
    out += [f"Give me {count} tips to {what}." for what in _HOW for count in rng.sample(("two", "three", "five"), 1)]
    for _ in range(70):
        a, b = rng.randint(1, 12), rng.randint(1, 12)
        sums = [f"What is {a}+{b}?", f"What is {a} plus {b}?", f"What is {a} times {b}?", f"Calculate {a + b} - {a}."]
        out.append(rng.choice([*sums, f"I have {a} apples and buy {b} more. How many do I have?"]))
    kept = [prompt.strip() for prompt in dict.fromkeys(out) if prompt.strip() not in PROBES + HELD_OUT]
    rng.shuffle(kept)
    return kept
