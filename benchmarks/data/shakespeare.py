"""Text as rows of characters, each with the character that follows as its target."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.data.dataset import Dataset, find_file

TRAIN_SHARE = 0.9
NUM_SUBSTITUTE_SPEECHES = 3000
SPEAKERS = ["First Sailor", "Second Sailor", "Captain", "Widow", "Miller", "Old Clerk"]
OPENINGS = ["Nay", "Good friend", "By my oath", "Tell me", "Listen", "Mark this", "Alas", "Sir"]
SUBJECTS = ["the king", "my brother", "that pale moon", "a ship", "the miller's daughter", "our harbour", "no man"]
VERBS = ["remembers", "shall forgive", "betrays", "waits for", "has sold", "would not leave", "sings to"]
OBJECTS = ["the grey sea", "an empty purse", "his sworn word", "the north wind", "a crown of reeds", "the long road"]
ENDINGS = [".", "!", "?", ", and so farewell.", "; what then?", ", before the night is out."]


def load_shakespeare(
    folder: str | Path | None = None,
    num_train: int | None = None,
    num_test: int | None = None,
    sequence_length: int = 64,
) -> Dataset:
    """``tiny_shakespeare.txt``, or else text from a small grammar: the first nine tenths train, the last tests.

    The text is cut into consecutive rows of ``sequence_length`` characters. A character's code is its place in
    ``Dataset.vocabulary``, which lists the characters of the whole text in order.
    """
    path, reason = find_file("tiny_shakespeare.txt", folder)
    if path is None:
        text, source = text_from_grammar(), f"text generated from a small grammar instead of Shakespeare ({reason})"
    else:
        text, source = path.read_text(encoding="utf-8"), "Shakespeare, from tiny_shakespeare.txt"
    vocabulary = "".join(sorted(set(text)))
    code = {character: index for index, character in enumerate(vocabulary)}
    codes = np.array([code[character] for character in text], np.int32)
    cut = int(TRAIN_SHARE * len(codes))
    train_inputs, train_targets = rows_with_next(codes[:cut], sequence_length)
    test_inputs, test_targets = rows_with_next(codes[cut:], sequence_length)
    return Dataset(
        name="shakespeare",
        source=source,
        train_inputs=train_inputs,
        train_targets=train_targets,
        test_inputs=test_inputs,
        test_targets=test_targets,
        image_shape=None,
        num_classes=len(vocabulary),
        vocabulary=vocabulary,
    ).first(num_train, num_test)


def rows_with_next(codes: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Consecutive rows of ``length`` codes, and the same rows one code later; what is left over is dropped."""
    used = (len(codes) - 1) // length * length
    return codes[:used].reshape(-1, length), codes[1 : used + 1].reshape(-1, length)


def text_from_grammar() -> str:
    """Speeches of two or three sentences by random speakers, about 400,000 characters."""
    rng = np.random.default_rng(0)

    def one_of(words: list[str]) -> str:
        return words[rng.integers(len(words))]

    def sentence() -> str:
        return f"{one_of(OPENINGS)}, {one_of(SUBJECTS)} {one_of(VERBS)} {one_of(OBJECTS)}{one_of(ENDINGS)}"

    return "".join(
        f"{one_of(SPEAKERS)}:\n" + "".join(f"{sentence()}\n" for _ in range(rng.integers(2, 4))) + "\n"
        for _ in range(NUM_SUBSTITUTE_SPEECHES)
    )
